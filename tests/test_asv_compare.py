"""`suite.py compare` tells a slower function from a change that changes nothing, in a scratch clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHANGED = Path("numbanorm/functional.py")
COMPARED = r"bench_(latency\.Hot|throughput\.Seconds)\.time_forward\('LayerNorm (128x768|4096x1024) float32'\)"
SLOWER = '''

def _slower(function):
    """Make every call take half as long again."""
    from time import thread_time

    def slow(*arguments, **options):
        start = thread_time()
        result = function(*arguments, **options)
        end = thread_time()
        while thread_time() < end + 0.5 * (end - start):
            pass
        return result

    return slow


layer_norm = _slower(layer_norm)
'''
"""Appended to the module of the functions: 1.5 times as slow, whatever the kernels and the way to them."""

NO_CHANGE = "\n# A comment, and nothing else.\n"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="measures time: run it without other tests"),
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a clone with two commits on top: `slower` and `same`; its suite is that of the working tree."""
    pytest.importorskip("asv", reason="asv is not installed (it is in the bench extra)")
    pytest.importorskip("virtualenv", reason="virtualenv is not installed (it is in the bench extra)")
    folder = tmp_path_factory.mktemp("scratch") / "numbanorm"
    git("clone", "-q", "--no-hardlinks", str(ROOT), str(folder))
    shutil.copy(ROOT / "asv.conf.json", folder)
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", dirs_exist_ok=True)
    own = ("-C", str(folder))
    for name, added in {"slower": SLOWER, "same": NO_CHANGE}.items():
        git(*own, "checkout", "-q", "-B", name, "HEAD" if name == "slower" else "slower^")
        with (folder / CHANGED).open("a") as file:
            file.write(added)
        git(*own, "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-q", "-m", name, str(CHANGED))
    return folder


def git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], check=True)


def compare(clone: Path, name: str) -> tuple[int, str]:
    """Return the exit status and the output of a comparison of a branch with its parent."""
    command = [sys.executable, "benchmarks/suite.py", "compare", f"{name}^", name, "--bench", COMPARED, "--rounds", "2"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("NUMBA", "PYTHON"))}
    done = subprocess.run(
        command, cwd=clone, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    return done.returncode, done.stdout


def test_slower_function_is_caught(clone: Path) -> None:
    status, output = compare(clone, "slower")
    assert "PERFORMANCE DECREASED" in output, output
    assert status == 1
    caught = [line for line in output.splitlines() if line.startswith("| +")]
    assert len(caught) == 2, output


def test_no_change_passes(clone: Path) -> None:
    status, output = compare(clone, "same")
    assert "BENCHMARKS NOT SIGNIFICANTLY CHANGED" in output, output
    assert status == 0
