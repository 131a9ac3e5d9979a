"""benchmarks/peers.py: every cell is checked against float64 with its peers; measuring, JSON, picture, README."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from math import prod
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import numbanorm as nn

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "benchmarks"
OURS = ("peer_data", "peer_grid", "peer_calls", "peer_cells", "peer_report", "peers", "programs", "costs")


@pytest.fixture(scope="module")
def scripts() -> Any:
    """Return the scripts' modules by name, which import each other by bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        patch.setitem(sys.modules, "jax", None)  # half a second a cell
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in OURS})
        for name in OURS:
            sys.modules.pop(name)


def grid() -> ModuleType:
    """Return the grid alone, to name tests by: it imports none of the libraries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        found = importlib.import_module("peer_grid")
        for name in ("peer_grid", "peer_data"):
            sys.modules.pop(name)
        return found


GRID = grid()


def cell_names() -> list[Any]:
    """Return the cells that are new, those of more than 4 MB among the slow tests."""
    return [
        pytest.param(spec.name, marks=[pytest.mark.slow] if prod(spec.shape) > 1 << 20 else [], id=spec.name)
        for spec in GRID.CALLS
    ]


# --- the cells


def test_old_cells_have_their_names() -> None:
    old = json.loads((ROOT / "docs" / "peers-xeon.json").read_text())["results"]
    assert [spec.name for spec in GRID.KERNELS] == [row["cell"] for row in old]


def test_cells_are_what_users_call() -> None:
    assert len(GRID.SPECS) == len(GRID.KERNELS) + len(GRID.CALLS)  # no name twice
    operations = {spec.operation for spec in GRID.CALLS}
    for base in ("layer", "rms", "batch", "instance", "group"):
        assert {f"module {base} eval", f"module {base} step"} <= operations
    assert {"batch running", "module batch training"} <= operations
    assert {f"{base} masked" for base in ("layer", "batch", "instance", "group")} <= operations
    assert {spec.view for spec in GRID.CALLS} == {"", "channels last", "sliced", "Fortran", "transposed", "cropped"}
    rows = {spec.shape[-1] for spec in GRID.CALLS if spec.operation in ("layer", "rms")}
    assert rows >= {8, 12, 16, 28, 48, 56, 64, 100, 300, 769, 1000}
    images = {spec.shape for spec in GRID.CALLS if len(spec.shape) == 4}
    assert {shape[2:] for shape in images} >= {(4, 4), (7, 7)}
    assert {shape[1] for shape in images} >= {1280, 2048}


@pytest.mark.torch
@pytest.mark.parametrize("name", cell_names())
def test_numbanorm_torch_and_numpy_agree(
    scripts: SimpleNamespace, torch: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = GRID.SPECS[name]
    cell = scripts.peer_cells.make(scripts.peer_data.Spec(*vars(spec).values()), ("torch", "NumPy"))
    with cell.context():
        error = scripts.peers.check(cell)
    assert 0 < error <= scripts.peers.TOLERANCE[spec.dtype]
    assert cell.candidates.keys() == {"numbanorm", "torch", "NumPy"}, capsys.readouterr().err


def test_what_is_normalized_is_the_view(scripts: SimpleNamespace) -> None:
    contiguous = {}
    for view in ("", "sliced", "Fortran", "cropped", "channels last"):
        data = scripts.peer_data.Data(scripts.peer_data.Spec("batch running", (4, 6, 8, 10), view=view))
        contiguous[view] = data.x.flags.c_contiguous
        assert data.x.shape == (4, 6, 8, 10)
        assert data.x.mean() == pytest.approx(3, abs=0.1)
    assert contiguous == {"": True, "sliced": False, "Fortran": False, "cropped": False, "channels last": False}
    data = scripts.peer_data.Data(scripts.peer_data.Spec("layer", (4, 6, 8), view="transposed"))
    assert data.x.strides == (8 * 4, 4 * 8 * 4, 4)


def test_wrong_results(scripts: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    spec = scripts.peer_data.Spec("layer", (4, 16))
    cell = scripts.peer_cells.make(spec, ("NumPy",))
    right = cell.candidates["numbanorm"]
    cell.candidates |= {"torch": lambda: right() * 1.01, "JAX": lambda: right()[:, :1]}
    assert scripts.peers.check(cell) <= 2e-6
    assert cell.candidates.keys() == {"numbanorm", "NumPy"}
    assert capsys.readouterr().err.count("is wrong by") == 2
    cell.candidates["numbanorm"] = lambda: right() * 1.01
    with pytest.raises(scripts.peers.WrongResultError, match=r"wrong by 1\.0e-02"):
        scripts.peers.check(cell)


def test_running_statistics_belong_to_the_result(scripts: SimpleNamespace) -> None:
    spec = scripts.peer_data.Spec("batch running", (16, 8))
    cell = scripts.peer_cells.make(spec, ())
    scripts.peers.check(cell)
    with pytest.raises(scripts.peers.WrongResultError):  # a second call has moved them further
        scripts.peers.check(cell)


# --- measuring


def test_ratios_are_paired(scripts: SimpleNamespace) -> None:
    assert scripts.peers.paired(np.array([2.0, 40.0, 6.0]), np.array([1.0, 10.0, 3.0, 9.0])) == 2.0


def test_measure_takes_turns(scripts: SimpleNamespace) -> None:
    peers, told = scripts.peers, []
    calls = {"short": lambda: told.append("short"), "long": lambda: time.sleep(0.06)}
    times = peers.measure(calls, 0.01, before={"short": lambda: told.append("before")})
    assert len(times["long"]) == peers.FEWEST
    assert peers.FEWEST <= len(times["short"]) <= peers.MOST
    assert times["long"].min() >= 0.06 > times["short"].max()
    assert told.count("before") == len(times["short"]) + 1
    assert told.count("short") > len(times["short"])


def test_numbers_of_threads(scripts: SimpleNamespace) -> None:
    cores = len(os.sched_getaffinity(0))
    assert scripts.peers.thread_counts("1") == {"1": 1}
    assert list(scripts.peers.thread_counts("all,all").items()) == [("all", cores)]
    for wrong in ("0", str(cores + 1), "many"):
        with pytest.raises(SystemExit):
            scripts.peers.parse(["--threads", wrong])


# --- programs and costs


@pytest.mark.parametrize("name", ["product", "elementwise", "alone", "transformer", "residual_block"])
def test_programs_use_their_norms(scripts: SimpleNamespace, name: str) -> None:
    programs = scripts.programs
    program = getattr(programs, name)
    ours, exact, without = (program(norms, 2)() for norms in (programs.OURS, programs.EXACT, programs.WITHOUT))
    scale = np.abs(exact).max()
    assert ours.dtype == exact.dtype == np.float32
    assert np.abs(ours - exact).max() < programs.TOLERANCE * scale
    assert np.abs(without - exact).max() > 0.1 * scale
    assert {case.program.__name__ for case in programs.PROGRAMS.values()} >= {name}


def test_program_by_default_and_on_one_thread(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("add; layer norm; maximum 256x1024", "layer norm 256x1024 after 20 ms asleep"):
        found = scripts.programs.compare(name, 0.0)
        asleep = "asleep" in name
        assert found["seconds"].keys() == {"default", "one"} | (set() if asleep else {"without"})
        assert found["turns"] == 5
        low, high = found["quartiles"]
        assert 0 < low <= found["ratio"] <= high
        assert nn.get_num_threads() == 1  # as before
    wrong = scripts.programs.Norms(lambda x, *_: x, lambda x, *_: x)
    monkeypatch.setattr(scripts.programs, "OURS", wrong)
    with pytest.raises(ValueError, match="the result is off by"):
        scripts.programs.compare("add; layer norm; maximum 256x1024", 0.0)


def test_costs_of_every_option(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = scripts.costs
    for norm, options in costs.OPTIONS.items():
        assert options[0] == "plain"
        assert {"mask", "out=", "channels last", "sliced", "Fortran", "float16 weights"} <= set(options)
        rows = costs.measure(norm, 0.0)
        assert [row["option"] for row in rows] == list(options)
        assert rows[0]["extra"] == 0.0
        assert all(0 < row["seconds"] < 1 for row in rows)
    assert "running statistics" in costs.OPTIONS["BatchNorm 32x256"]

    def refuses(*_: Any, mask: Any = None, **__: Any) -> None:
        raise TypeError("no such option")

    monkeypatch.setattr(costs.nn, "layer_norm", refuses)
    with pytest.raises(NotImplementedError, match="refuses mask"):
        costs.call_of("LayerNorm 32x768", "mask")
    monkeypatch.setattr(costs.nn, "layer_norm", lambda x, *_, **__: x)
    with pytest.raises(ValueError, match="is off by"):
        costs.call_of("LayerNorm 32x768", "mask")


# --- the report


SECONDS = {"numbanorm": 2e-6, "torch": 4e-6, "onnxruntime": 6e-6, "copy": 1e-6}


def result(ratio: float, **more: Any) -> dict[str, Any]:
    over = {"torch": ratio, "onnxruntime": ratio * 2}
    return {"error": 1e-8, "turns": 5, "seconds": SECONDS, "over": over, "best": "torch", "copies": 2.0} | more


def report() -> dict[str, Any]:
    cells = []
    for name, part, one, many in (
        ("layer 1x768 float32", "kernels", 2.0, 1.0),
        ("batch running 32x256 float32", "calls", 0.5, 0.25),
    ):
        spec = GRID.SPECS[name]
        row = {"cell": name, "set": part, "operation": spec.operation, "shape": list(spec.shape), "dtype": spec.dtype}
        row |= {"view": spec.view, "threads": {"1": result(one), "all": result(many, over_one_thread=1.5)}}
        cells.append(row)
    seconds = {"default": 0.008, "one": 0.004, "without": 0.003}
    programs = [{"program": "product", "seconds": seconds, "ratio": 2.0, "quartiles": [1.9, 2.1], "turns": 5}]
    costs = [
        {"norm": "LayerNorm 32x768", "option": "plain", "seconds": 5e-6, "extra": 0.0},
        {"norm": "LayerNorm 32x768", "option": "mask", "seconds": 9e-6, "extra": 4e-6},
        {"norm": "LayerNorm 32x768", "option": "new", "missing": "this commit refuses new"},
    ]
    machine = {"processor": "P", "date": "2026-11-30"}
    return {
        "schema": 2,
        "machine": machine,
        "threads": {"1": 1, "all": 2},
        "cells": cells,
        "programs": programs,
        "costs": costs,
        "failed": [],
    }


def assert_schema(found: dict[str, Any]) -> None:
    """Fail unless a report has what docs/peers.json promises."""
    assert found.keys() == report().keys()
    assert found["schema"] == 2
    assert found["machine"].keys() >= {"processor", "date"}
    labels = found["threads"].keys()
    assert all(isinstance(count, int) for count in found["threads"].values())
    for row in found["cells"]:
        assert row.keys() == {"cell", "set", "operation", "shape", "dtype", "view", "threads"}
        assert row["set"] in ("kernels", "calls")
        spec = GRID.SPECS[row["cell"]]
        assert (row["operation"], tuple(row["shape"]), row["dtype"], row["view"]) == tuple(vars(spec).values())
        assert row["threads"].keys() <= labels
        for label, cell in row["threads"].items():
            optional = {"out_copies"} | ({"over_one_thread"} if found["threads"][label] > 1 else set())
            assert cell.keys() - optional == {"error", "turns", "seconds", "over", "best", "copies"}
            assert cell["seconds"].keys() >= {"numbanorm", "copy", *cell["over"]}
            assert all(value > 0 for value in (*cell["seconds"].values(), *cell["over"].values(), cell["copies"]))
            assert cell["best"] == min(cell["over"], key=cell["over"].get, default=None)
    for row in found["programs"]:
        assert row.keys() == {"program", "seconds", "ratio", "quartiles", "turns"}
        assert row["seconds"].keys() >= {"default", "one"}
    for row in found["costs"]:
        assert row.keys() in ({"norm", "option", "seconds", "extra"}, {"norm", "option", "missing"})


def test_tracked_results_have_the_schema() -> None:
    found = json.loads((ROOT / "docs" / "peers.json").read_text())
    if "schema" not in found:
        pytest.skip("docs/peers.json is of the first comparisons: run benchmarks/peers.py")
    assert_schema(found)
    assert {row["cell"] for row in found["cells"]} == GRID.SPECS.keys()


def test_made_up_report_has_the_schema() -> None:
    assert_schema(report())


def test_readme_shows_all_threads_first(scripts: SimpleNamespace, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- peers: begin -->\nold\n<!-- peers: end -->\nafter\n")
    scripts.peer_report.write_readme(report(), readme)
    peers = "torch / ours | onnxruntime / ours | JAX / ours"
    assert readme.read_text().splitlines() == [
        "before",
        "<!-- peers: begin -->",
        "float32, fresh outputs:",
        "",
        f"| | numbanorm, all threads | {peers} | numbanorm, one thread | {peers} |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        "| layer 1x768 | 2.0 µs | 1.0 | 2.0 | n/a | 2.0 µs | 2.0 | 4.0 | n/a |",
        "| batch running 32x256 | 2.0 µs | 0.2 | 0.5 | n/a | 2.0 µs | 0.5 | 1.0 | n/a |",
        "",
        "Geometric mean over all 2 cells, all threads: torch 0.50, onnxruntime 1.00.",
        "Geometric mean over the first 1 cells, all threads: torch 1.00, onnxruntime 2.00.",
        "Behind the best peer by more than 5 per cent, all threads: batch running 32x256 float32 (0.25, torch).",
        "",
        "Geometric mean over all 2 cells, one thread: torch 1.00, onnxruntime 2.00.",
        "Geometric mean over the first 1 cells, one thread: torch 2.00, onnxruntime 4.00.",
        "Behind the best peer by more than 5 per cent, one thread: batch running 32x256 float32 (0.50, torch).",
        "",
        "Norms in NumPy programs, with as many threads as numbanorm takes by default, and with one:",
        "",
        "| program | without norm | norm on one thread | by default | default / one |",
        "|---|--:|--:|--:|--:|",
        "| product | 3.00 ms | 4.00 ms | 8.00 ms | 2.00 |",
        "",
        "What an option costs over the plain call (batch norm in training):",
        "",
        "| one thread, in cache | LayerNorm 32x768 |",
        "|---|--:|",
        "| plain | 5.0 µs |",
        "| mask | +4.0 µs |",
        "| new | n/a |",
        "",
        "Measured by `benchmarks/peers.py`: processor P, date 2026-11-30.",
        "<!-- peers: end -->",
        "after",
    ]
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="peers markers"):
        scripts.peer_report.write_readme(report(), readme)


def test_readme_has_the_markers_and_the_cells(scripts: SimpleNamespace) -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- peers: begin -->") == text.count("<!-- peers: end -->") == 1
    assert set(scripts.peer_report.README_CELLS) <= GRID.SPECS.keys()


def test_cells_behind_come_worst_first(scripts: SimpleNamespace) -> None:
    made = report()
    made["cells"][0]["threads"]["1"] = result(0.9)
    found = [name for _, name, _ in scripts.peer_report.behind(made, "1")]
    assert found == ["batch running 32x256 float32", "layer 1x768 float32"]
    made["cells"] = made["cells"][:1] * 6
    assert "one thread: 6 cells, first of all layer 1x768" in scripts.peer_report.summary(made, "1")[-1]


def test_table_and_picture_of_results_that_are_there(
    scripts: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "p.json", tmp_path / "p.png"
    path.write_text(json.dumps(report()))
    assert scripts.peers.main(["--from", str(path), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert printed.index("all threads; times") < printed.index("one thread; times")
    assert "| mask | +4.0 µs |" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    path.write_text(json.dumps({"machine": {}, "results": []}))
    with pytest.raises(SystemExit, match="schema 2"):
        scripts.peers.main(["--from", str(path)])


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    path = tmp_path / "p.json"
    only = r"^(layer 1x768 float32|batch running 16x8 float32|layer norm 256x1024 after.*|costs LayerNorm.*)$"
    command = [sys.executable, str(HERE / "peers.py"), "--only", only, "--budget", "0.01", "--json", str(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(nn.__file__).parents[1]), *sys.path[1:]])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert_schema(found)
    assert [row["cell"] for row in found["cells"]] == ["layer 1x768 float32", "batch running 16x8 float32"]
    assert all(row["threads"].keys() == found["threads"].keys() for row in found["cells"])
    assert "NumPy" in found["cells"][0]["threads"]["1"]["over"]
    several = max(found["threads"].values()) > 1
    assert len(found["programs"]) == several
    assert len(found["costs"]) > 5
    assert "[1/2 " in done.stderr
    assert "[2/2 " in done.stderr


# --- the suite's benchmarks


@pytest.mark.parametrize("module", ["bench_latency", "bench_peers", "bench_threads"])
def test_benchmarks_keep_names_and_versions(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the package adds its own folder
    suite = importlib.import_module(f"benchmarks.{module}")
    known = json.loads((HERE / "results" / "benchmarks.json").read_text())
    mine = {name: known[name] for name in known if name.startswith(f"{module}.")}
    assert mine or module == "bench_peers"
    for name, benchmark in mine.items():
        _, kind, function = name.split(".")
        assert callable(getattr(getattr(suite, kind), function))
        assert getattr(suite, kind).version == benchmark["version"] == "1"
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
