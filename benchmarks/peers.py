"""Compare the norms with torch and NumPy: one command, one table, and the same as JSON and in the README.

    python benchmarks/peers.py [--threads N] [--json FILE] [--readme]

All candidates of a row run in one process, in turns; a time is the median over the turns, a ratio the median of the
paired ratios. Each result is checked against float64 before its time counts. `out=` and `copyto` reuse their output;
all else returns a fresh array, as its users call it. torch takes part where it is installed.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

import numbanorm as nn

try:
    import torch
    import torch.nn.functional as functional
except ImportError:
    torch = None

TURNS = 9
SECONDS_A_TURN = 0.02
TOLERANCE = 2e-6  # of the result's scale, float32


class Row(NamedTuple):
    """One line of the table: an operation on one array."""

    name: str
    ours: Callable[[], Any]
    out: Callable[[], Any]
    numpy: Callable[[], Any]
    torch: Callable[[], Any] | None
    x: np.ndarray
    y: np.ndarray


def normalized(x: np.ndarray, axes: tuple[int, ...], weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    mean = x.mean(axes, keepdims=True)
    return (x - mean) / np.sqrt(x.var(axes, keepdims=True) + 1e-5) * weight + bias


def rows() -> list[Row]:
    rng = np.random.default_rng(0)
    table = []

    def tensor(a: np.ndarray) -> Any:
        return torch.from_numpy(a) if torch else None

    def add(name: str, shape: tuple[int, ...], last: bool, axis: str, ours: Any, theirs: Any) -> None:
        x = rng.standard_normal(shape, dtype=np.float32) + np.float32(3)
        if last:
            x = np.ascontiguousarray(np.moveaxis(x, 1, -1)).transpose(0, 3, 1, 2)
        size = shape[-1] if axis == "layer" else shape[1]
        w = rng.standard_normal(size, dtype=np.float32)
        b = rng.standard_normal(size, dtype=np.float32)
        tx, tw, tb = tensor(x), tensor(w), tensor(b)
        y = np.empty_like(x)
        lead = (-1,) if axis == "layer" else (-1, 1, 1)
        axes = {"layer": (-1,), "batch": (0, 2, 3), "instance": (2, 3)}.get(axis)

        def plain(x: np.ndarray = x) -> np.ndarray:
            if axis == "group":
                n = x.shape[0]
                h = normalized(x.reshape(n, 8, -1), (2,), x.dtype.type(1), x.dtype.type(0)).reshape(x.shape)
                return h * w.reshape(lead) + b.reshape(lead)
            return normalized(x, axes, w.reshape(lead), b.reshape(lead))

        table.append(
            Row(
                f"{name} {'x'.join(map(str, shape))}{', channels last' if last else ''}",
                lambda: ours(x, w, b),
                lambda: ours(x, w, b, out=y),
                plain,
                (lambda: theirs(tx, tw, tb)) if torch else None,
                x,
                y,
            )
        )

    for shape in ((1, 768), (128, 768), (4096, 1024), (16384, 4096), (65536, 64)):
        add(
            "LayerNorm",
            shape,
            False,
            "layer",
            lambda x, w, b, out=None: nn.layer_norm(x, x.shape[1], w, b, out=out),
            lambda x, w, b: functional.layer_norm(x, (x.shape[1],), w, b),
        )
    for shape in ((4, 32, 28, 28), (32, 64, 56, 56)):
        for last in (False, True):
            add(
                "BatchNorm, training",
                shape,
                last,
                "batch",
                lambda x, w, b, out=None: nn.batch_norm(x, None, None, w, b, True, out=out),
                lambda x, w, b: functional.batch_norm(x, None, None, w, b, True),
            )
            add(
                "GroupNorm(8)",
                shape,
                last,
                "group",
                lambda x, w, b, out=None: nn.group_norm(x, 8, w, b, out=out),
                lambda x, w, b: functional.group_norm(x, 8, w, b),
            )
            add(
                "InstanceNorm",
                shape,
                last,
                "instance",
                lambda x, w, b, out=None: nn.instance_norm(x, None, None, w, b, out=out),
                lambda x, w, b: functional.instance_norm(x, None, None, w, b),
            )
    return table


def check(row: Row) -> float:
    """Return our largest error against float64 as a share of the scale; stop if it is too large."""
    reference = row.numpy(row.x.astype(np.float64))
    scale = np.abs(reference).max()
    errors = [np.abs(call() - reference).max() / scale for call in (row.ours, row.out)]
    if not max(errors) <= TOLERANCE:
        raise SystemExit(f"{row.name}: wrong by {max(errors):.1e}, no time is taken of it")
    return float(max(errors))


def measure(calls: dict[str, Callable[[], Any]]) -> dict[str, np.ndarray]:
    """Return seconds a call for each candidate and turn."""
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(SECONDS_A_TURN / max(time.perf_counter() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: np.array(values) for name, values in times.items()}


def compare(threads: int) -> list[dict[str, Any]]:
    nn.set_num_threads(threads)
    if torch:
        torch.set_num_threads(threads)
    results = []
    for row in rows():
        error = check(row)
        calls: dict[str, Callable[[], Any]] = {"ours": row.ours, "out": row.out, "numpy": row.numpy}
        calls["copyto"] = lambda row=row: np.copyto(row.y, row.x)
        if row.torch:
            calls["torch"] = row.torch
        times = measure(calls)
        ratios = {f"over_{name}": float(np.median(t / times["ours"])) for name, t in times.items() if name != "ours"}
        ratios["out_in_copies"] = float(np.median(times["out"] / times["copyto"]))
        seconds = {name: float(np.median(t)) for name, t in times.items()}
        results.append({"row": row.name, "bytes": 2 * row.x.nbytes, "error": error, **seconds, **ratios})
        print(row.name, file=sys.stderr)
    return results


def show(results: list[dict[str, Any]], threads: int) -> None:
    table = Table(title=f"float32, {threads} thread(s); times in microseconds")
    for column in ("", "numbanorm", "with out=", "torch", "NumPy", "torch / ours", "NumPy / ours", "out= / copyto"):
        table.add_column(column, justify="left" if not column else "right")
    for r in results:
        micro = [f"{r[k] * 1e6:,.1f}" if k in r else "n/a" for k in ("ours", "out", "torch", "numpy")]
        ratio = [f"{r[k]:.2f}" if k in r else "n/a" for k in ("over_torch", "over_numpy", "out_in_copies")]
        table.add_row(r["row"], *micro, *ratio)
    Console(width=150).print(table)


def write_readme(results: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    """Put the ratios between the README's markers."""
    lines = ["| float32 | numbanorm | torch takes, times ours | NumPy takes, times ours |", "|---|--:|--:|--:|"]
    for r in results:
        ratios = [f"{r[k]:.1f}" if k in r else "n/a" for k in ("over_torch", "over_numpy")]
        lines.append(f"| {r['row']} | {r['ours'] * 1e6:,.1f} µs | {' | '.join(ratios)} |")
    lines += ["", "Measured by `benchmarks/peers.py`: " + ", ".join(f"{k} {v}" for k, v in machine.items()) + "."]
    path = Path(__file__).parent.parent / "README.md"
    pattern = r"(<!-- peers: begin -->\n).*(<!-- peers: end -->)"
    text, count = re.subn(pattern, lambda m: m[1] + "\n".join(lines) + "\n" + m[2], path.read_text(), flags=re.S)
    if count != 1:
        raise SystemExit("README.md: expected one pair of peers markers")
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--readme", action="store_true", help="rewrite the table in README.md")
    options = parser.parse_args()
    results = compare(options.threads)
    show(results, options.threads)
    config = nn.config.config()
    machine = {
        "processor": config["processor"],
        "threads": options.threads,
        "numba": config["numba"],
        "numpy": config["numpy"],
        "torch": torch.__version__ if torch else "not installed",
        "Python": platform.python_version(),
        "date": date.today().isoformat(),
    }
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    if options.readme:
        write_readme(results, machine)


if __name__ == "__main__":
    main()
