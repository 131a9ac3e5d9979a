"""The GPU benchmark, as far as it needs no GPU: shapes, bytes, checks against float64, table, JSON, errors."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", HERE / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wall(calls: dict[str, Any]) -> dict[str, float]:
    seconds = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        seconds[name] = time.perf_counter() - start
    return seconds


def test_every_norm_width_and_dtype_is_there(gpu: ModuleType) -> None:
    every = list(gpu.cases("", gpu.WIDTHS, gpu.DTYPES))
    assert len(every) == 6 * 2 * 3 * len(gpu.WIDTHS)
    assert {case.norm.partition(",")[0] for case in every} == {"layer", "rms", "batch", "instance", "group"}
    assert (min(gpu.WIDTHS), max(gpu.WIDTHS)) == (64, 262144)
    assert [case.name for case in gpu.cases("^rms backward 64 ", gpu.WIDTHS, ("float16",))] == [
        "rms backward 64 float16"
    ]


def test_shapes_and_bytes(gpu: ModuleType) -> None:
    for case in gpu.cases("", gpu.WIDTHS, gpu.DTYPES):
        shape = case.shape()
        count = math.prod(shape)
        assert gpu.ELEMENTS // 2 <= count <= gpu.ELEMENTS * 2
        arrays = {"forward": 2, "backward": 3}[case.direction]
        assert case.bytes() == arrays * count * {"float32": 4, "bfloat16": 2, "float16": 2}[case.dtype]
        if case.norm == "group":
            assert shape[1] * shape[2] // gpu.GROUPS == case.width
        else:
            assert shape[-1] == case.width


@pytest.mark.torch
@pytest.mark.parametrize("norm", ["layer", "rms", "batch", "batch, last", "instance", "group"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_ours_and_torch_agree_with_float64(gpu: ModuleType, torch: Any, norm: str, direction: str) -> None:
    """The candidates of every row, on the CPU: they compute the same, and are compared with the right thing."""
    row = gpu.evaluate(gpu.Case(norm, direction, 64, "float32"), torch, "cpu", wall, elements=1 << 15)
    assert set(row["errors"]) == {"numbanorm", "torch"}
    assert 0 < row["errors"]["numbanorm"] <= gpu.TOLERANCE["float32"]
    assert 0 < row["errors"]["torch"] <= 100 * gpu.TOLERANCE["float32"]
    assert set(row["seconds"]) == {"numbanorm", "torch", "copy"}


@pytest.mark.torch
def test_wrong_results_are_not_timed(gpu: ModuleType, torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = gpu.Case("layer", "forward", 64, "float32")
    right = gpu.nn.layer_norm
    monkeypatch.setattr(gpu.nn, "layer_norm", lambda *a, **o: right(*a, **o) * 1.0001)
    with pytest.raises(SystemExit, match=r"layer forward 64 float32: wrong by 1[.]0e-04, no time is taken"):
        gpu.evaluate(case, torch, "cpu", wall, elements=1 << 15)
    monkeypatch.setattr(gpu.nn, "layer_norm", lambda *a, **o: right(*a, **o) * float("nan"))
    with pytest.raises(SystemExit, match="wrong by nan"):
        gpu.evaluate(case, torch, "cpu", wall, elements=1 << 15)


@pytest.mark.torch
def test_wrong_peers_take_no_part(gpu: ModuleType, torch: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def others(*arguments: Any) -> dict[str, Any]:
        def fails(x: Any, w: Any, b: Any) -> Any:
            raise NotImplementedError("no such width")

        return {"Liger": lambda x, w, b: x, "quack": fails}

    monkeypatch.setattr(gpu, "_others", others)
    row = gpu.evaluate(gpu.Case("layer", "forward", 64, "float32"), torch, "cpu", wall, elements=1 << 15)
    assert set(row["seconds"]) == {"numbanorm", "torch", "copy"}
    said = capsys.readouterr().err
    assert "Liger is wrong by" in said
    assert "quack takes no part: no such width" in said


@pytest.mark.torch
def test_host_overhead(gpu: ModuleType, torch: Any) -> None:
    found = gpu.host_overhead(torch, "cpu")
    assert len(found) == 5
    assert all(0 < microseconds < 1e6 for microseconds in found.values())


ROW = {
    "norm": "layer",
    "direction": "forward",
    "width": 1024,
    "dtype": "bfloat16",
    "shape": (65536, 1024),
    "bytes": 2 * 65536 * 1024 * 2,
    "errors": {"numbanorm": 2e-3, "torch": 2e-3},
    "seconds": {"numbanorm": 1e-4, "torch": 2e-4, "quack": 1.25e-4, "copy": 0.8e-4},
}


def test_table(gpu: ModuleType, capsys: Any) -> None:
    assert gpu.gigabytes(ROW, "numbanorm") == pytest.approx(2684.35456)
    assert gpu.gigabytes(ROW, "Liger") is None
    assert gpu.of_copy(ROW) == pytest.approx(0.8)
    gpu.show([ROW], {"layer_norm": 12.345}, "device A", 170)
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if "layer forward" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == [
        *("layer forward", "1024", "bfloat16", "2e-03", "100", "2,684", "1,342"),
        *("n/a", "n/a", "2,147", "3,355", "0.80", "1.25"),
    ]
    assert any("device A" in line for line in lines)
    assert any("12.3" in line for line in lines)


def test_json(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    path = gpu.default_path("NVIDIA H100 80GB HBM3")
    assert path.parent == tmp_path / "out"
    assert path.name.startswith("gpu-NVIDIA-H100-80GB-HBM3-20")
    gpu.write(path, {"device": "A", "date": "2026-01-01"}, [ROW], {"layer_norm": 12.3})
    found = json.loads(path.read_text())
    assert found["machine"]["device"] == "A"
    assert found["rows"][0]["seconds"]["quack"] == 1.25e-4
    monkeypatch.delenv("OUT")
    assert gpu.default_path("A").parent == HERE / "results"
    assert {"numbanorm", "numba", "numpy"} <= set(gpu.versions())


def test_without_a_gpu(gpu: ModuleType) -> None:
    if gpu.missing() is None:
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, str(HERE / "gpu.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "nothing was measured, there is no GPU here: " in done.stderr
    assert done.stdout == ""
