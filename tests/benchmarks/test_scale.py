"""benchmarks/scale.py: its cells are checked, its table goes to JSON, picture and README."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import numbanorm as nn

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scale.py"

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs")


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("rich")
    spec = importlib.util.spec_from_file_location("scale", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "scale", module)
    spec.loader.exec_module(module)
    return module


def test_two_tools(
    scale: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(nn.__file__).parents[1]), *sys.path]))
    own = ["--sizes", "0.004", "--workers", "1", "--tasks", "statistics,layer", "--tools", "numbanorm.files;cp"]
    assert scale.main([*own, "--folder", str(tmp_path), "--json", str(tmp_path / "s.json")]) == 0
    results = json.loads((tmp_path / "s.json").read_text())["results"]
    assert [(r["task"], r["size"], r["workers"], r["tools"].keys()) for r in results] == [
        (task, 0.004, 1, {"numbanorm.files", "cp"}) for task in ("statistics", "layer")
    ]
    assert results[0]["tools"]["cp"] is None
    for cell in (results[0]["tools"]["numbanorm.files"], *results[1]["tools"].values()):
        assert 0 < cell["seconds"] < 60
        assert 0 <= cell["peak"] < 1e9
    assert os.listdir(tmp_path) == ["s.json"]
    printed = capsys.readouterr()
    assert "statistics" in printed.out
    assert printed.err.count("worker(s)") == 3


def test_wrong_results_are_no_cells(scale: ModuleType, tmp_path: Path) -> None:
    mean, var = scale.expected()
    scale.check("a tool", "statistics", (mean, var), tmp_path)
    with pytest.raises(ValueError, match="a tool: the result of statistics is wrong"):
        scale.check("a tool", "statistics", (mean, var * 1.01), tmp_path)
    x = scale.tile()
    for task, y in (("normalize", nn.batch_norm(x, training=True)), ("layer", nn.layer_norm(x, x.shape[1]))):
        both = np.concatenate([y, y])
        np.save(tmp_path / "y.npy", both)
        scale.check("a tool", task, None, tmp_path / "y.npy")
        both[-1, -1] += 0.1
        np.save(tmp_path / "y.npy", both)
        with pytest.raises(ValueError, match=f"a tool: the result of {task} is wrong"):
            scale.check("a tool", task, None, tmp_path / "y.npy")


def row(task: str, size: float, workers: int, seconds: float) -> dict[str, Any]:
    tools: dict[str, Any] = {tool: {"seconds": seconds, "peak": 20e6} for tool in ("numbanorm.files", "cp")}
    return {"task": task, "size": size, "workers": workers, "tools": tools | {"dask.array": None}}


def test_readme_has_the_largest_file_on_all_cores(scale: ModuleType, tmp_path: Path) -> None:
    results = [row("layer", size, workers, size / workers) for size in (1.0, 2.0) for workers in (2, 1)]
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- scale: begin -->\nold\n<!-- scale: end -->\nafter\n")
    scale.write_readme(results, {"processor": "P"}, readme)
    assert readme.read_text().splitlines()[:5] == [
        "before",
        "<!-- scale: begin -->",
        "| 2 GB of float32 | numbanorm.files | cp |",
        "|---|--:|--:|",
        "| layer norm of each row into a new file | 1.00 s, 20 MB | 1.00 s |",
    ]
    assert readme.read_text().endswith("processor P.\n<!-- scale: end -->\nafter\n")
    with pytest.raises(SystemExit, match="scale markers"):
        scale.write_readme(results, {}, Path(__file__).with_name("test_gpu.py"))


def test_picture(scale: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scale.plot([row("layer", 1.0, 1, 0.5), row("statistics", 2.0, 1, 0.0)], tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
