"""Compare the norms with torch, onnxruntime, JAX and NumPy: one command, one table, the same as JSON and as a plot.

    python benchmarks/peers.py [--threads N] [--only TEXT] [--json FILE] [--plot FILE] [--readme]

All candidates of a row run in one process, in turns, on as many cores as there are threads; a time is the median over
the turns, a ratio the median of the paired ratios. Each result is checked against float64 before its time counts.
Candidates return a fresh array, as their users call them; `out=` stands apart. "copies" is the time of `numpy.copyto`
of x into an array that is there already. Libraries that are not installed do not take part.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

PEERS = ("torch", "onnxruntime", "JAX", "NumPy")
SECONDS_A_TURN = 0.004
TURNS = 25
SECONDS_A_CELL = 4.0
TOLERANCE = {"float32": 2e-6, "float64": 1e-9, "bfloat16": 2.0**-8}
"""Largest error of ours, as a share of the result's scale; peers may be 500 times worse."""


def pin(threads: int) -> None:
    """Keep this process, and so every library's threads, on the last `threads` cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)


def error_of(result: Any, reference: Any) -> float:
    """Return the largest error as a share of the scale, over all arrays of a result."""
    if not isinstance(reference, tuple):
        result, reference = (result,), (reference,)
    worst = 0.0
    for got, wanted in zip(result, reference, strict=False):
        if type(got).__module__.startswith("torch"):
            got = got.float() if "bfloat16" in str(got.dtype) else got
        array = np.asarray(got.numpy() if hasattr(got, "numpy") else got).astype(np.float64)
        worst = max(worst, float(np.abs(array - wanted).max() / np.abs(wanted).max()))
    return worst


def check(cell: Any) -> float:
    """Return our error; drop peers whose answer is wrong, stop if ours is."""
    reference = cell.reference()
    allowed = TOLERANCE[cell.dtype]
    worst = 0.0
    for calls in (cell.candidates, cell.reused):
        for name in list(calls):
            try:
                error = error_of(calls[name](), reference)
            except NotImplementedError:  # torch says so of an operation that lacks a dtype
                error = math.inf
            if name == "numbanorm":
                worst = max(worst, error)
            if not error <= allowed * (1 if name == "numbanorm" else 500):
                if name == "numbanorm":
                    raise SystemExit(f"{cell.name}: wrong by {error:.1e}, no time is taken of it")
                print(f"{cell.name}: {name} is wrong by {error:.1e} and takes no part", file=sys.stderr)
                del calls[name]
    return worst


def measure(calls: dict[str, Callable[[], Any]]) -> dict[str, np.ndarray]:
    """Return seconds a call for each candidate and turn."""
    repeats = {}
    cost = 0.0
    for name, call in calls.items():
        call()
        call()
        start = time.perf_counter()
        call()
        once = max(time.perf_counter() - start, 1e-7)
        repeats[name] = max(1, int(SECONDS_A_TURN / once))
        cost += (1 + repeats[name]) * once
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(max(5, min(TURNS, int(SECONDS_A_CELL / cost)))):
        for name, call in calls.items():
            call()  # not timed: what the one before has left unwritten in the caches is its own cost
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: np.array(values) for name, values in times.items()}


def result_of(cell: Any) -> dict[str, Any]:
    """Check and measure one cell."""
    error = check(cell)
    calls = dict(cell.candidates)
    calls |= {f"{name} out": call for name, call in cell.reused.items()}
    calls["copy"] = cell.copy
    times = measure(calls)
    ours = times["numbanorm"]
    peers = {name: float(np.median(times[name] / ours)) for name in PEERS if name in times}
    best = min(peers, key=lambda name: peers[name]) if peers else None
    result = {
        "cell": cell.name,
        "operation": cell.operation,
        "shape": cell.shape,
        "dtype": cell.dtype,
        "last": cell.last,
        "error": error,
        "seconds": {name: float(np.median(t)) for name, t in times.items()},
        "over": peers,
        "best": best,
        "copies": float(np.median(ours / times["copy"])),
    }
    if "numbanorm out" in times:
        result["out_copies"] = float(np.median(times["numbanorm out"] / times["copy"]))
    return result


def show(results: list[dict[str, Any]], threads: int) -> None:
    """Print the table and the geometric means."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{threads} thread(s); times in microseconds, fresh outputs unless told")
    table.add_column("")
    for column in ("ours", "out=", *PEERS, "best peer / ours", "ours in copies", "out= in copies"):
        table.add_column(column, justify="right")
    for r in results:
        seconds = r["seconds"]
        micro = [_number(seconds.get(k), 1e6, 1) for k in ("numbanorm", "numbanorm out", *PEERS)]
        ratio = r["over"].get(r["best"])
        colour = "red" if ratio and ratio < 0.95 else "green"
        shown = f"[{colour}]{ratio:.2f}[/] {r['best']}" if ratio else "n/a"
        table.add_row(r["cell"], *micro, shown, _number(r["copies"], 1, 2), _number(r.get("out_copies"), 1, 2))
    console = Console(width=170)
    console.print(table)
    for name, mean in means(results).items():
        console.print(f"geometric mean of {name} / ours: {mean:.2f}")


def means(results: list[dict[str, Any]]) -> dict[str, float]:
    """Return each peer's geometric mean ratio over the cells that it takes part in."""
    found = {name: [r["over"][name] for r in results if name in r["over"]] for name in PEERS}
    return {name: statistics.geometric_mean(ratios) for name, ratios in found.items() if ratios}


def _number(value: float | None, factor: float, digits: int) -> str:
    return "n/a" if value is None else f"{value * factor:,.{digits}f}"


def plot(results: list[dict[str, Any]], path: Path, threads: int) -> None:
    """Draw every peer's time over ours, cell by cell."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = plt.subplots(figsize=(9, 0.19 * len(results) + 1.2), layout="constrained")
    places = range(len(results))
    for name, marker in zip(PEERS, "osD^", strict=True):
        points = [(r["over"][name], place) for r, place in zip(results, places, strict=True) if name in r["over"]]
        if points:
            axes.scatter(*zip(*points, strict=True), marker=marker, s=18, label=name)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks([0.25, 0.5, 1, 2, 4, 8, 16, 32])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(places, [r["cell"] for r in results], fontsize=7)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_xlabel(f"time over numbanorm's, {threads} thread(s): right of the line numbanorm is faster")
    axes.grid(axis="x", alpha=0.25)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


README_CELLS = re.compile(
    r"(layer|rms|batch|instance|group)( training| eval| backward)? "
    r"(1x768|128x768|4096x1024|16384x4096|65536x64|32x64x56x56) float32"
)


def write_readme(results: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    """Put the ratios of some cells between the README's markers."""
    lines = [
        "| | numbanorm | " + " | ".join(f"{p} / ours" for p in PEERS) + " |",
        "|---|--:" + "|--:" * len(PEERS) + "|",
    ]
    for r in results:
        if README_CELLS.fullmatch(r["cell"]):
            ratios = [_number(r["over"].get(p), 1, 1) for p in PEERS]
            lines.append(f"| {r['cell']} | {r['seconds']['numbanorm'] * 1e6:,.1f} µs | {' | '.join(ratios)} |")
    average = ", ".join(f"{name} {mean:.2f}" for name, mean in means(results).items())
    lines += ["", f"Geometric mean over all {len(results)} cells: {average}."]
    lines += ["", "Measured by `benchmarks/peers.py`: " + ", ".join(f"{k} {v}" for k, v in machine.items()) + "."]
    path = Path(__file__).parent.parent / "README.md"
    pattern = r"(<!-- peers: begin -->\n).*(<!-- peers: end -->)"
    text, count = re.subn(pattern, lambda m: m[1] + "\n".join(lines) + "\n" + m[2], path.read_text(), flags=re.S)
    if count != 1:
        raise SystemExit("README.md: expected one pair of peers markers")
    path.write_text(text)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="regular expression; only cells whose name it finds")
    parser.add_argument("--without", default="", help="regular expression; peers that take no part")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--readme", action="store_true", help="rewrite the table in README.md")
    options = parser.parse_args()
    pin(options.threads)

    import peer_cells

    import numbanorm as nn

    nn.set_num_threads(options.threads)
    if peer_cells.torch:
        peer_cells.torch.set_num_threads(options.threads)
    results = []
    for cell in peer_cells.cells(re.compile(options.only)):
        if options.without:
            for name in list(cell.candidates):
                if re.fullmatch(options.without, name):
                    del cell.candidates[name]
        results.append(result_of(cell))
        r = results[-1]
        print(
            f"{r['cell']:45s} {r['seconds']['numbanorm'] * 1e6:12,.1f} us"
            f"  {r['copies']:6.2f} copies  out {r.get('out_copies', math.nan):6.2f}   "
            + "  ".join(f"{name} {ratio:.2f}" for name, ratio in r["over"].items()),
            file=sys.stderr,
            flush=True,
        )
    show(results, options.threads)
    machine = {"processor": nn.config.config()["processor"], "threads": options.threads}
    for package in ("numba", "numpy", "torch", "onnxruntime", "jax"):
        try:
            machine[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            machine[package] = "not installed"
    machine |= {"Python": platform.python_version(), "date": date.today().isoformat()}
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot, options.threads)
    if options.readme:
        write_readme(results, machine)


if __name__ == "__main__":
    main()
