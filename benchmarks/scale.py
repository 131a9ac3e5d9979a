"""Time and memory against the size of a file and the number of workers, beside other libraries: one command, one table.

    python benchmarks/scale.py [--sizes GB,...] [--workers N,...] [--tasks NAME,...] [--folder DIR] [--json FILE]

The file is a .npy of float32, shape (rows, 256). Files smaller than memory are read from the page cache: then computing
and moving are measured, and not the disk. "statistics" takes mean and variance of each column; "normalize" also writes
the normalized file, batch norm for all, and waits until it is on the disk; "layer" normalizes each row, which needs one
read. Every cell is a process of its own, on as many cores as it has workers, after a run on a small file that imports
and compiles. It shows seconds, and what the process's high-water mark of resident memory rose by; pages of a file that
a tool maps into memory count, as they do wherever memory is limited. "cp" copies the same file and waits for the disk.
Libraries that are not installed, and workers that a library has no use for, are n/a. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

COLUMNS = 256
TOLERANCE = 1e-3
"""Largest error of a peer's statistics, as a share of the largest: these sum in float32."""

BATCH = 1 << 14
"""Rows that tools without chunks of their own are given at once, 16 MB; also the length of dask's chunks."""


def tile() -> np.ndarray:
    """Return the rows that the file repeats."""
    return np.random.default_rng(0).standard_normal((4096, COLUMNS), dtype=np.float32) + np.float32(3)


def make(path: Path, size: float) -> None:
    """Write a file of about `size` GB, tile by tile, to the disk."""
    rows = tile()
    tiles = max(int(size * 1e9) // rows.nbytes, 1)
    with path.open("wb") as file:
        fields = {"descr": "<f4", "fortran_order": False, "shape": (tiles * len(rows), COLUMNS)}
        np.lib.format.write_array_header_1_0(file, fields)
        for _ in range(tiles):
            file.write(rows.data)
        file.flush()
        os.fsync(file.fileno())


def expected() -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance of the columns of the file that `make` writes."""
    rows = tile().astype(np.float64)
    return rows.mean(0), rows.var(0)


# --- tools: statistics return (mean, variance); the others write `target` -------------------------------------------


def batches(path: Path) -> Iterator[tuple[slice, np.ndarray]]:
    x = np.load(path, mmap_mode="r")
    for start in range(0, len(x), BATCH):
        part = slice(start, min(start + BATCH, len(x)))
        yield part, x[part]


def rows_of(path: Path, block_info: Any) -> np.ndarray:
    """Return the rows of one chunk of a dask array."""
    start, stop = block_info[None]["array-location"][0]
    part: np.ndarray = np.load(path, mmap_mode="r")[start:stop]
    return part


def lazy(path: Path) -> Any:
    """Return the file as a dask array, mapped into memory by the tasks, as dask's documentation maps files.

    Not by `from_array`: since 2025 it copies a memory map, all of it, and hashes the copy (github.com/dask/dask, issue
    11850); that took 0.4 to 1.7 s for 0.5 GB, of which the moments take 0.05 s.
    """
    import dask.array as da

    x = np.load(path, mmap_mode="r")
    chunks = da.core.normalize_chunks((BATCH, -1), x.shape, dtype=x.dtype)
    return da.map_blocks(rows_of, path, chunks=chunks, dtype=x.dtype, meta=np.empty((0, 0), x.dtype))


def store(y: Any, target: Path) -> None:
    """Write a dask array into a .npy file, and wait until it is on the disk."""
    import dask.array as da

    out = np.lib.format.open_memmap(target, "w+", np.float32, y.shape)
    da.store(y, out, lock=False)
    out.flush()


def ours_statistics(path: Path) -> Any:
    from numbanorm import files

    moments = files.stats(path, 0)
    return moments.mean, moments.var()


def ours(norm: str) -> Callable[[Path, Path], None]:
    def run(path: Path, target: Path) -> None:
        from numbanorm import files

        files.apply(path, target, norm)

    return run


def ours_dask_statistics(path: Path) -> Any:
    import numbanorm as nn

    moments = nn.Moments.of(lazy(path), 0)
    return moments.mean, moments.var()


def ours_dask(norm: str) -> Callable[[Path, Path], None]:
    def run(path: Path, target: Path) -> None:
        import numbanorm as nn

        x = lazy(path)
        store(nn.batch_norm(x, training=True) if norm == "batch" else nn.layer_norm(x, COLUMNS), target)

    return run


def dask_statistics(path: Path) -> Any:
    import dask

    x = lazy(path)
    return dask.compute(x.mean(0), x.var(0))


def dask_batch(path: Path, target: Path) -> None:
    x = lazy(path)
    mean, var = dask_statistics(path)
    store((x - mean.astype(np.float32)) / np.sqrt(var + 1e-5).astype(np.float32), target)


def dask_layer(path: Path, target: Path) -> None:
    x = lazy(path)
    mean, var = x.mean(1, keepdims=True), x.var(1, keepdims=True)
    store((x - mean) / np.sqrt(var + np.float32(1e-5)), target)


def fitted() -> Any:
    from sklearn.preprocessing import StandardScaler

    return StandardScaler()


def sklearn_statistics(path: Path) -> Any:
    scaler = fitted()
    for _, x in batches(path):
        scaler.partial_fit(x)
    return scaler.mean_, scaler.var_


def sklearn_batch(path: Path, target: Path) -> None:
    scaler = fitted()
    for _, x in batches(path):
        scaler.partial_fit(x)
    out = np.lib.format.open_memmap(target, "w+", np.float32, np.load(path, mmap_mode="r").shape)
    for part, x in batches(path):
        out[part] = scaler.transform(x)
    out.flush()


def dask_ml_statistics(path: Path) -> Any:
    from dask_ml.preprocessing import StandardScaler

    scaler = StandardScaler().fit(lazy(path))
    return np.asarray(scaler.mean_), np.asarray(scaler.var_)


def dask_ml_batch(path: Path, target: Path) -> None:
    from dask_ml.preprocessing import StandardScaler

    x = lazy(path)
    store(StandardScaler().fit(x).transform(x).astype(np.float32), target)


def copy(path: Path, target: Path) -> None:
    subprocess.run(["cp", "--sparse=never", "--reflink=never", path, target], check=True)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


TOOLS: dict[str, tuple[str | None, int, dict[str, Callable[..., Any]]]] = {
    "numbanorm.files": (None, 99, {"statistics": ours_statistics, "normalize": ours("batch"), "layer": ours("layer")}),
    "numbanorm, dask": (
        "dask",
        99,
        {"statistics": ours_dask_statistics, "normalize": ours_dask("batch"), "layer": ours_dask("layer")},
    ),
    "dask.array": ("dask", 99, {"statistics": dask_statistics, "normalize": dask_batch, "layer": dask_layer}),
    "StandardScaler": ("sklearn", 1, {"statistics": sklearn_statistics, "normalize": sklearn_batch}),
    "dask-ml": ("dask_ml", 99, {"statistics": dask_ml_statistics, "normalize": dask_ml_batch}),
    "cp": (None, 1, {"normalize": copy, "layer": copy}),
}
"""What is compared: the module that it needs, the workers that it has use for, and its tasks."""


# --- measuring ------------------------------------------------------------------------------------------------------


def status(name: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def measure(tool: str, task: str, path: Path, workers: int) -> dict[str, Any]:
    """Run one cell in this process, on `workers` cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-workers:])
    if find_spec("dask"):
        import dask

        dask.config.set(scheduler="threads", num_workers=workers)
    function = TOOLS[tool][2][task]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        small = Path(folder, "small.npy")
        make(small, 0.05)
        targets = () if task == "statistics" else (Path(folder, "y.npy"),)
        function(small, *targets)
        small.unlink()
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        start = time.perf_counter()
        result = function(path, *targets)
        seconds = time.perf_counter() - start
        peak = status("VmHWM") - before
    if result is not None:
        for found, exact in zip(result, expected(), strict=True):
            if not np.abs(np.asarray(found) - exact).max() <= TOLERANCE * np.abs(exact).max():
                raise ValueError(f"{tool}: the statistics are wrong")
    return {"seconds": seconds, "peak": max(peak, 0)}


def cell(tool: str, task: str, path: Path, workers: int) -> dict[str, Any] | None:
    """Run one cell in a process of its own; None where there is none."""
    module, most, tasks = TOOLS[tool]
    if task not in tasks or workers > most or (module is not None and find_spec(module) is None):
        return None
    command = [sys.executable, __file__, "--one", tool, task, str(path), str(workers)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), str(workers))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | threads)
    if done.returncode:
        print(f"{tool}, {task}: {done.stderr}", file=sys.stderr)
        return None
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def shown(row: dict[str, Any] | None, tool: str) -> str:
    if row is None:
        return "n/a"
    return f"{row['seconds']:.2f} s" if tool == "cp" else f"{row['seconds']:.2f} s {row['peak'] / 1e6:6.0f} MB"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", default="0.1,0.5,2,8", help="sizes of the file in GB")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--tasks", default="statistics,normalize,layer")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files lie for a while"
    )
    parser.add_argument("--json", type=Path, help="write the table there too")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not Path("/proc/self/clear_refs").exists():
        print("scale.py: needs Linux, /proc/self/clear_refs is not there", file=sys.stderr)
        return 2
    if options.one:
        tool, task, path, workers = options.one
        print(json.dumps(measure(tool, task, Path(path), int(workers))))
        return 0
    most = len(os.sched_getaffinity(0))
    table = Table("task", title="Seconds, and the memory that the process grew by")
    for heading in ("GB", "workers", *TOOLS):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = []
    for task in options.tasks.split(","):
        for size in map(float, options.sizes.split(",")):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                if shutil.disk_usage(folder).free < (1 if task == "statistics" else 2.1) * 1e9 * size + 1e9:
                    print(f"scale.py: no room for {size:g} GB in {options.folder}", file=sys.stderr)
                    continue
                path = Path(folder, "x.npy")
                make(path, size)
                for workers in map(int, options.workers.split(",")):
                    if workers > most:
                        continue
                    found = {tool: cell(tool, task, path, workers) for tool in TOOLS}
                    rows += [{"task": task, "size": size, "workers": workers, "tools": found}]
                    table.add_row(task, f"{size:g}", str(workers), *(shown(row, tool) for tool, row in found.items()))
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)
    if options.json is not None:
        about = {"date": date.today().isoformat(), "python": platform.python_version(), "numpy": np.__version__}
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
