"""What a kernel on disk was made from: every module that its own takes something from, and no other."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

import numbanorm
from numbanorm.core import stamp

HOME = Path(numbanorm.__file__).parent
KERNELS = sorted(
    path for folder in ("cpu", "cuda") for path in (HOME / folder).rglob("*.py") if "@Kernel" in path.read_text()
)


def imported(module: Path) -> set[Path]:
    """Return what Python's own parser finds imported from this package at the top of a module."""
    files = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            place = module.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            files |= {place.with_suffix(".py"), *(place / f"{name.name}.py" for name in node.names)}
    return {file for file in files if file.is_file()}


def test_kernels_are_found() -> None:
    assert {"rows.py", "columns.py", "running.py"} <= {path.name for path in KERNELS}


@pytest.mark.parametrize("module", KERNELS, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_sources(module: Path) -> None:
    found = {module}
    while new := {file for path in found for file in imported(path)} - found:
        found |= new
    assert set(stamp.sources(module)) == found
    assert stamp.sources(module)[0] == module


@pytest.mark.parametrize("name", ["cpu/rows.py", "cpu/along_backward.py", "cpu/columns_backward.py", "cpu/running.py"])
def test_another_constant_in_any_of_them(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(HOME, tmp_path / "numbanorm", ignore=shutil.ignore_patterns("__pycache__", "data")))
    monkeypatch.setattr(stamp, "_HOME", copy)
    module, stamps = copy / name, set()
    counted = stamp.sources(module)
    assert {"welford.py", "dtypes.py", "norms.py"} <= {path.name for path in counted}
    for changes, path in enumerate(counted):
        stamp.stamp_of.cache_clear()
        stamps.add(stamp.stamp_of(module))
        assert len(stamps) == changes + 1, path
        path.write_text(path.read_text() + "\nANOTHER = 1\n")
    stamp.stamp_of.cache_clear()
    last = stamp.stamp_of(module)
    assert last not in stamps
    for path in set(copy.rglob("*.py")) - set(counted):
        path.write_text(path.read_text() + "\nANOTHER = 1\n")
    stamp.stamp_of.cache_clear()
    assert stamp.stamp_of(module) == last


def test_ways_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamp, "_HOME", tmp_path / "numbanorm")
    files = {
        "numbanorm/cpu/kernel.py": "from . import a\nfrom .b import (\n    x,\n)\nfrom ..core.c import z as q\n",
        "numbanorm/cpu/a.py": "from numbanorm.core import d\nfrom numpy import e\n\ndef f():\n    from .e import g\n",
        "numbanorm/cpu/b.py": "import os\nfrom __future__ import annotations\n",
        "numbanorm/core/c.py": "from ..cpu.kernel import a\n",
        "numbanorm/core/d.py": "",
        "numbanorm/cpu/e.py": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = [path.stem for path in stamp.sources(tmp_path / "numbanorm/cpu/kernel.py")]
    assert (found[0], sorted(found)) == ("kernel", ["a", "b", "c", "d", "kernel"])
