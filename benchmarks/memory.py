"""Measure the memory that each norm needs beside its inputs and outputs: one command, one table, and the same as JSON.

    python benchmarks/memory.py [--only WORD] [--threads N] [--json FILE] [--check]

Every call runs in a process of its own, on inputs of 64 MB that have been touched, after a call on a few samples that
compiles its kernels. The process's high-water mark of resident memory is reset, the call is made, and what the mark
rose by, less the bytes of what was returned, is the extra memory. Huge pages are off, because they round up to 2 MB.
Linux only: it needs /proc/self/clear_refs.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

import numbanorm as nn

BOUND = 2 << 20
"""Bytes beside inputs and outputs that a call may take, however large its input."""

_PR_SET_THP_DISABLE = 41


class Case(NamedTuple):
    """One norm on one shape.

    Attributes
    ----------
    norm : str
        "batch", "layer", "instance", "group" or "rms".
    shape : tuple of int
        Shape of the input; its first axis is shortened to 2 for the call that compiles.
    axis : int
        The normalized axis of layer and RMS norm, the channels' of the others; -1 for the last.
    dtype : str
        Of input, weight and bias.
    masked, residual, inference : bool
        Whether there is a mask of x's shape, a residual, and for batch norm running statistics in use.
    """

    norm: str
    shape: tuple[int, ...]
    axis: int = 1
    dtype: str = "float32"
    masked: bool = False
    residual: bool = False
    inference: bool = False


CASES = {
    "LayerNorm D=768": Case("layer", (21845, 768), -1),
    "LayerNorm D=4096": Case("layer", (4096, 4096), -1),
    "LayerNorm D=65536": Case("layer", (256, 65536), -1),
    "LayerNorm D=1048576": Case("layer", (16, 1 << 20), -1),
    "LayerNorm D=4096, mask": Case("layer", (4096, 4096), -1, masked=True),
    "LayerNorm D=4096, residual": Case("layer", (4096, 4096), -1, residual=True),
    "LayerNorm D=4096, float16": Case("layer", (8192, 4096), -1, "float16"),
    "LayerNorm axis=1, C=64": Case("layer", (64, 64, 64, 64)),
    "LayerNorm axis=1, C=768": Case("layer", (28, 768, 28, 28)),
    "LayerNorm axis=1, C=4096": Case("layer", (4, 4096, 32, 32)),
    "RMSNorm D=768": Case("rms", (21845, 768), -1),
    "RMSNorm D=4096": Case("rms", (4096, 4096), -1),
    "RMSNorm D=1048576": Case("rms", (16, 1 << 20), -1),
    "RMSNorm D=4096, residual": Case("rms", (4096, 4096), -1, residual=True),
    "BatchNorm NCHW": Case("batch", (64, 64, 64, 64)),
    "BatchNorm NHWC": Case("batch", (64, 64, 64, 64), -1),
    "BatchNorm NHWC, C=3": Case("batch", (64, 296, 296, 3), -1),
    "BatchNorm (N, C)": Case("batch", (16384, 1024)),
    "BatchNorm NCHW, mask": Case("batch", (64, 64, 64, 64), masked=True),
    "BatchNorm NHWC, mask": Case("batch", (64, 64, 64, 64), -1, masked=True),
    "BatchNorm NCHW, float16": Case("batch", (128, 64, 64, 64), 1, "float16"),
    "BatchNorm NCHW, inference": Case("batch", (64, 64, 64, 64), inference=True),
    "GroupNorm NCHW": Case("group", (64, 64, 64, 64)),
    "GroupNorm NHWC": Case("group", (64, 64, 64, 64), -1),
    "GroupNorm NHWC, mask": Case("group", (64, 64, 64, 64), -1, masked=True),
    "InstanceNorm NCHW": Case("instance", (64, 64, 64, 64)),
    "InstanceNorm NHWC": Case("instance", (64, 64, 64, 64), -1),
    "InstanceNorm NHWC, mask": Case("instance", (64, 64, 64, 64), -1, masked=True),
}
DIRECTIONS = ("forward", "backward")
GROUPS = 8


def touched(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Return normal numbers in memory that is there."""
    array = np.empty(shape, dtype)
    rng = np.random.default_rng(seed)
    for part in array.reshape(shape[0], -1):
        part[...] = rng.standard_normal(part.size, dtype=np.float32)
    return array


def prepare(case: Case, direction: str, shape: tuple[int, ...]) -> Callable[[], Any]:
    """Make the inputs of one call, and return the call."""
    n = shape[case.axis]
    x = touched(shape, case.dtype, 0)
    weight, bias = (touched((n,), case.dtype, seed) for seed in (1, 2))
    options: dict[str, Any] = {"mask": np.arange(x.size).reshape(shape) % 3 > 0} if case.masked else {}
    forward, backward = getattr(nn, f"{case.norm}_norm"), getattr(nn, f"{case.norm}_norm_backward")
    head: tuple[Any, ...] = {"layer": (n,), "rms": (n,), "group": (GROUPS,)}.get(case.norm, ())
    options |= {"axis" if case.norm in ("layer", "rms") else "channel_axis": case.axis}
    into: dict[str, Any] = {"weight": weight} | ({} if case.norm == "rms" else {"bias": bias})
    if case.norm == "batch":
        into |= {"training": not case.inference}
    if case.inference:
        into |= {"running_mean": np.zeros(n), "running_var": np.ones(n)}
    if case.residual:
        into |= {"residual": touched(shape, case.dtype, 3)}
    if direction == "forward":
        return lambda: forward(x, *head, **into, **options)
    y, *statistics = forward(x, *head, **into, **options, return_stats=True)
    if case.residual:
        x = statistics.pop()
    if case.inference:
        options["training"] = False
    dy = y
    return lambda: backward(dy, x, *head, *statistics, weight, **options)


def status(name: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def measure(case: Case, direction: str, threads: int) -> dict[str, Any]:
    """Return the extra memory of one call, made in this process."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    nn.set_num_threads(threads)
    prepare(case, direction, (2, *case.shape[1:]))()
    call = prepare(case, direction, case.shape)
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = call()
    peak = status("VmHWM")
    returned = sum(array.nbytes for array in (result if isinstance(result, tuple) else (result,)))
    itemsize = np.dtype(case.dtype).itemsize
    return {"input": int(np.prod(case.shape)) * itemsize, "returned": returned, "extra": peak - before - returned}


def run(name: str, direction: str, threads: int) -> dict[str, Any]:
    """Measure one call in a process of its own."""
    command = [sys.executable, __file__, "--one", name, direction, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}, {direction}: {done.stderr}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"case": name, "direction": direction, **row, "ok": row["extra"] <= BOUND}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the table there too")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a call is above the bound")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not Path("/proc/self/clear_refs").exists():
        print("memory.py: needs Linux, /proc/self/clear_refs is not there", file=sys.stderr)
        return 2
    if options.one:
        name, direction = options.one
        print(json.dumps(measure(CASES[name], direction, options.threads)))
        return 0
    table = Table("norm", "direction", title=f"Memory beside inputs and outputs, {options.threads} thread(s)")
    for heading in ("input", "extra bytes", f"at most {BOUND >> 20} MB"):
        table.add_column(heading, justify="right")
    rows = []
    for name in CASES:
        for direction in DIRECTIONS if options.only.lower() in name.lower() else ():
            row = run(name, direction, options.threads)
            rows.append(row)
            verdict = "[green]yes" if row["ok"] else "[red]no"
            table.add_row(name, direction, f"{row['input'] / 2**20:.0f} MB", f"{row['extra']:,}", verdict)
    Console().print(table)
    if options.json is not None:
        about = {
            "date": date.today().isoformat(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "numbanorm": nn.__version__,
            "threads": options.threads,
            "bound": BOUND,
        }
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return 1 if options.check and not all(row["ok"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
