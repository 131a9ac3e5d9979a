"""The kernels' cache on disk: whatever is wrong with it, calls are right, at worst slower, with one warning.

Nor does it serve code of other sources, or with other constants in it, than those that are there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from processes import run

import numbanorm
from numbanorm.cpu import jit

pytestmark = pytest.mark.slow

CALL = """
import json, warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import numpy as np, numbanorm as nn
    from numbanorm.cpu import columns, rows
    x = np.random.default_rng(0).standard_normal((16, 64), dtype=np.float32)
    y = nn.layer_norm(x, 64)
    columns.forward.serial, columns.forward.parallel  # their caches opened, nothing compiled
    expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    stats = rows.forward.serial.stats
    from numba.core.registry import cpu_target
    contexts = vars(cpu_target.typing_context) | vars(cpu_target.target_context)
    print(json.dumps({
        "right": bool(np.abs(y - expected).max() < 1e-5),
        "compiled": sum(stats.cache_misses.values()),
        "loaded": sum(stats.cache_hits.values()),
        "cache": stats.cache_path,
        "changed": [name for name in ("resolve_function_type", "get_abi_sizeof", "get_function") if name in contexts],
        "warnings": [str(warning.message) for warning in seen],
    }))
"""


def call(code: str = CALL, **environment: str | Path) -> Any:
    found = json.loads(run(code, **{name: str(value) for name, value in environment.items()}))
    assert found["right"]
    return found


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache that holds one kernel; what is remembered to compile it is not remembered by Numba itself."""
    folder = tmp_path_factory.mktemp("cache") / "not" / "there"
    found = call(NUMBA_CACHE_DIR=folder)
    assert found["changed"] == []
    assert (found["compiled"], found["warnings"]) == (1, [])
    assert folder.is_dir()  # made, although it was missing
    return folder


@pytest.fixture
def cache(filled: Path, tmp_path: Path) -> Path:
    """Return a copy of it, for one test."""
    return Path(shutil.copytree(filled, tmp_path / "cache"))


def test_later_process_loads(cache: Path) -> None:
    found = call(NUMBA_CACHE_DIR=cache)
    assert (found["compiled"], found["loaded"], found["warnings"]) == (0, 1, [])


def garbage(path: Path) -> None:
    path.write_bytes(b"\x93garbage\n" * 50)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("suffix", "damage", "repaired"),
    [
        (".nbi", garbage, True),
        (".nbi", truncated, True),
        (".nbi", emptied, True),
        (".nbi", folder_instead, False),
        (".nbc", garbage, True),
        (".nbc", truncated, True),
    ],
)
def test_damaged_files(cache: Path, suffix: str, damage: Callable[[Path], None], repaired: bool) -> None:
    """They are compiled anew, and written anew where that can be."""
    for path in cache.rglob(f"*{suffix}"):
        damage(path)
    first = call(NUMBA_CACHE_DIR=cache)
    assert (first["compiled"], first["loaded"]) == (1, 0)
    assert len(first["warnings"]) == 1
    assert first["cache"] in first["warnings"][0]
    if repaired:
        second = call(NUMBA_CACHE_DIR=cache)
        assert (second["compiled"], second["loaded"], second["warnings"]) == (0, 1, [])


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Return a folder with a copy of the package."""
    home = Path(numbanorm.__file__).parent
    shutil.copytree(home, tmp_path / "site" / "numbanorm", ignore=shutil.ignore_patterns("__pycache__", "data"))
    return tmp_path / "site"


@pytest.fixture
def read_only(site: Path) -> Path:
    """Return one whose ``__pycache__`` cannot be made: root may write anywhere else."""
    (site / "numbanorm" / "cpu" / "__pycache__").write_bytes(b"")
    return site


def test_read_only_install(read_only: Path, tmp_path: Path) -> None:
    """The user's own cache serves."""
    own = {"PYTHONPATH": read_only, "NUMBA_CACHE_DIR": "", "HOME": tmp_path, "XDG_CACHE_HOME": tmp_path / "xdg"}
    first, second = call(**own), call(**own)
    assert first["cache"].startswith(str(tmp_path / "xdg"))
    assert (first["compiled"], first["warnings"]) == (1, [])
    assert (second["loaded"], second["warnings"]) == (1, [])


@pytest.mark.parametrize("folder", ["", "file", "file/below"])
def test_no_folder_at_all(read_only: Path, tmp_path: Path, folder: str) -> None:
    """Read-only install, home that cannot be written, NUMBA_CACHE_DIR unset or a file: one warning for all kernels."""
    file = tmp_path / "file"
    file.write_bytes(b"")
    own = {"PYTHONPATH": read_only, "HOME": file / "home", "XDG_CACHE_HOME": file / "xdg"}
    code = CALL.replace("stats.cache_path", "None")
    found = call(code, NUMBA_CACHE_DIR=tmp_path / folder if folder else "", **own)
    assert len(found["warnings"]) == 1
    assert str(read_only / "numbanorm" / "cpu" / "__pycache__") in found["warnings"][0]


FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
def test_full_disk(tmp_path: Path) -> None:
    """Files can be made, but not filled: what a full disk and a full quota do as well."""
    found = call(FULL + CALL, NUMBA_CACHE_DIR=tmp_path)
    assert found["compiled"] == 1
    assert len(found["warnings"]) == 1
    assert found["cache"] in found["warnings"][0]
    assert not list(tmp_path.rglob("*.nbc"))


def test_two_processes_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(call, NUMBA_CACHE_DIR=tmp_path) for _ in range(2)]
    assert all(one.result()["warnings"] == [] for one in both)
    third = call(NUMBA_CACHE_DIR=tmp_path)
    assert (third["compiled"], third["loaded"], third["warnings"]) == (0, 1, [])


@pytest.mark.parametrize("written", [0, 1], ids=["nothing", "index"])
def test_killed_while_it_writes(tmp_path: Path, written: int) -> None:
    """A process that dies before the index is there, or the code that it names, leaves nothing to stumble over."""
    code = f"""
import os
replace, calls = os.replace, []
def dying(*paths):
    calls.append(paths)
    os._exit(9) if len(calls) > {written} else replace(*paths)
os.replace = dying
"""
    code += CALL
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(numbanorm.__file__).parents[1]),
    }
    died = subprocess.run([sys.executable, "-P", "-c", code], env=environment, timeout=300, check=False)
    assert died.returncode == 9
    assert len(list(tmp_path.rglob("*.nbi"))) == written
    assert not list(tmp_path.rglob("*.nbc"))
    found = call(NUMBA_CACHE_DIR=tmp_path)
    assert (found["compiled"], found["warnings"]) == (1, [])


def test_cache_of_another_cpu(cache: Path) -> None:
    """A home on a network drive serves machines of all kinds: each compiles for itself, and keeps the others' code."""
    other = call(NUMBA_CACHE_DIR=cache, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")
    assert (other["compiled"], other["loaded"], other["warnings"]) == (1, 0, [])
    assert call(NUMBA_CACHE_DIR=cache)["loaded"] == 1
    assert call(NUMBA_CACHE_DIR=cache, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")["loaded"] == 1


def test_code_of_other_sources_is_not_loaded(site: Path, tmp_path: Path) -> None:
    """Of constants neither: rows of statistics in another order, norms by other numbers; results are right."""
    own = {"PYTHONPATH": site, "NUMBA_CACHE_DIR": tmp_path / "cache"}
    assert call(**own)["compiled"] == 1
    for module, *changes in (
        ("core/plan.py", ("COUNT, MEAN, M2, RSTD = range(4)", "COUNT, RSTD, M2, MEAN = range(4)")),
        (
            "core/norms.py",
            ('SCALES = ("std", "l2")', 'SCALES = ("l2", "std")'),
            ("STD, L2 = SCALES", "L2, STD = SCALES"),
        ),
        ("core/dtypes.py", ('"""', '"""Another. ')),
        ("cpu/sums.py", ('"""', '"""Another. ')),
    ):
        path = site / "numbanorm" / module
        for old, new in changes:
            assert old in path.read_text()
            path.write_text(path.read_text().replace(old, new, 1))
        changed = call(**own)
        assert (changed["compiled"], changed["loaded"], changed["warnings"]) == (1, 0, []), module
        assert call(**own)["loaded"] == 1


def test_sources_that_no_kernel_takes_constants_from_do_not_count(site: Path, tmp_path: Path) -> None:
    own = {"PYTHONPATH": site, "NUMBA_CACHE_DIR": tmp_path / "cache"}
    assert call(**own)["compiled"] == 1
    for module in ("core/pool.py", "core/threads.py", "calls/host.py", "cpu/profile.py", "cpu/columns.py"):
        path = site / "numbanorm" / module
        path.write_text(path.read_text().replace('"""', '"""Another. ', 1))
    assert call(**own)["loaded"] == 1


def test_two_processes_that_save_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has seen no other's code when it saves its own: none is served for the types of another, at worst none."""
    files = jit._Files(str(tmp_path), "kernel", "sources")
    write = files._save_data

    def while_another_saves(name: str, data: Any) -> None:
        other = jit._Files(str(tmp_path), "kernel", "sources")
        monkeypatch.setattr(other, "_load_index", dict)
        other.save("other types", "other code")
        write(name, data)

    monkeypatch.setattr(files, "_save_data", while_another_saves)
    files.save("types", "code")
    later = jit._Files(str(tmp_path), "kernel", "sources")
    assert later.load("other types") == "other code"
    assert later.load("types") in ("code", None)
    later.save("types", "code")
    assert (later.load("types"), later.load("other types")) == ("code", "other code")


def test_died_between_index_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What older sources left there is not served, and is gone."""
    jit._Files(str(tmp_path), "kernel", "old").save("types", "old code")
    dying = jit._Files(str(tmp_path), "kernel", "new")
    monkeypatch.setattr(dying, "_save_data", lambda name, data: None)
    dying.save("types", "code")
    assert jit._Files(str(tmp_path), "kernel", "new").load("types") is None
    assert not list(tmp_path.glob("*.nbc"))
