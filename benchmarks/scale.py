"""Time and memory against the size of a file and the number of workers, beside other libraries: one command, one table.

    python benchmarks/scale.py [--sizes GB,...] [--workers N,...] [--tasks NAME,...] [--tools NAME;...] [--folder DIR]
                               [--json FILE] [--plot FILE] [--readme]

The file is a .npy of float32, shape (rows, 256). Files smaller than memory are read from the page cache: then computing
and moving are measured, and not the disk. "statistics" takes mean and variance of each column; "normalize" also writes
the normalized file, batch norm for all, and waits until it is on the disk; "layer" normalizes each row, which needs one
read. Every cell is a process of its own, on as many cores as it has workers, after a run on a small file that imports
and compiles. It shows seconds, the median of three runs where they are quick, and what the process's high-water mark of
resident memory rose by. Tools that do not read files get 16 MB at a time, mapped into memory, and write through the
same file object. Results are checked. "cp" copies the same file and waits for the disk. Libraries that are not
installed, and workers that a library has no use for, are n/a. Linux only.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib import metadata
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

RUNS, QUICK = 3, 2.0
"""A cell is run so often, or until it has taken so many seconds."""

SMALL = 0.05
"""GB of the file that imports and compiles: three of dask's chunks."""


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


def rows_of(path: Path, start: int, stop: int) -> np.ndarray:
    """Map some rows into memory, for as long as they are used."""
    part: np.ndarray = np.load(path, mmap_mode="r")[start:stop]
    return part


def batches(path: Path) -> Iterator[tuple[slice, np.ndarray]]:
    length = len(np.load(path, mmap_mode="r"))
    for start in range(0, length, BATCH):
        part = slice(start, min(start + BATCH, length))
        yield part, rows_of(path, part.start, part.stop)


def chunk_of(path: Path, block_info: Any) -> np.ndarray:
    return rows_of(path, *block_info[None]["array-location"][0])


def lazy(path: Path) -> Any:
    """Return the file as a dask array, mapped into memory by the tasks, as dask's documentation maps files.

    Not by `from_array`: since 2025 it copies a memory map, all of it, and hashes the copy (github.com/dask/dask, issue
    11850); that took 0.4 to 1.7 s for 0.5 GB, of which the moments take 0.05 s.
    """
    import dask.array as da

    x = np.load(path, mmap_mode="r")
    chunks = da.core.normalize_chunks((BATCH, -1), x.shape, dtype=x.dtype)
    return da.map_blocks(chunk_of, path, chunks=chunks, dtype=x.dtype, meta=np.empty((0, 0), x.dtype))


class Output:
    """A .npy file of float32 whose rows are written where they belong, from any thread."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self._file = path.open("wb", buffering=0)
        np.lib.format.write_array_header_1_0(self._file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        self._start = self._file.tell()
        self._file.truncate(self._start + 4 * shape[0] * shape[1])

    def __setitem__(self, region: Any, values: np.ndarray) -> None:
        rows = region[0] if isinstance(region, tuple) else region
        memory = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8).data
        offset = self._start + 4 * COLUMNS * rows.start
        while memory:
            written = os.pwrite(self._file.fileno(), memory, offset)
            memory, offset = memory[written:], offset + written

    def close(self) -> None:
        """Wait until all is on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def store(y: Any, target: Path) -> None:
    """Write a dask array into a .npy file."""
    import dask.array as da

    out = Output(target, y.shape)
    da.store(y, out, lock=False)
    out.close()


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
    out = Output(target, np.load(path, mmap_mode="r").shape)
    for part, x in batches(path):
        out[part] = scaler.transform(x)
    out.close()


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

WORDS = {
    "statistics": "mean and variance of each column",
    "normalize": "batch norm into a new file",
    "layer": "layer norm of each row into a new file",
}
TASKS = list(WORDS)


# --- measuring ------------------------------------------------------------------------------------------------------


def status(name: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def check(tool: str, task: str, result: Any, target: Path) -> None:
    """Raise ValueError where statistics, or the first and last rows of a normalized file, are wrong."""
    if tool == "cp":
        return
    mean, var = expected()
    if task == "statistics":
        pairs = list(zip(result, (mean, var), strict=True))
    else:
        x = tile().astype(np.float64)
        if task == "layer":
            mean, var = x.mean(1, keepdims=True), x.var(1, keepdims=True)
        y = np.load(target, mmap_mode="r")
        pairs = [(rows, (x - mean) / np.sqrt(var + 1e-5)) for rows in (y[: len(x)], y[-len(x) :])]
    for found, exact in pairs:
        if not np.abs(np.asarray(found) - exact).max() <= TOLERANCE * np.abs(exact).max():
            raise ValueError(f"{tool}: the result of {task} is wrong")


def last_output(path: Path) -> Path:
    """Return where the output of the last cell lies."""
    return path.with_name("last.npy")


def free_memory(path: Path, target: Path) -> None:
    """Make the system own as much free memory as the output will lie in.

    A virtual machine gives free memory back to its host within seconds: to get 0.5 GB anew took 1.3 s of the 1.8 that a
    first run took, and none of the 0.4 of the next. So the output before this one is removed only now.
    """
    target.unlink(missing_ok=True)
    last_output(path).unlink(missing_ok=True)
    free = 1024 * int(re.findall(r"MemFree:\s+(\d+) kB", Path("/proc/meminfo").read_text())[0])
    with mmap.mmap(-1, max(min(path.stat().st_size, free - (1 << 30)), mmap.PAGESIZE)) as memory:
        np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1


def measure(tool: str, task: str, path: Path, workers: int) -> dict[str, Any]:
    """Run one cell in this process, on `workers` cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-workers:])
    if find_spec("dask"):
        import dask

        dask.config.set(scheduler="threads", num_workers=workers)
    function = TOOLS[tool][2][task]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        small, target = Path(folder, "small.npy"), Path(folder, "y.npy")
        targets = () if task == "statistics" else (target,)
        make(small, SMALL)
        function(small, *targets)
        small.unlink()
        times: list[float] = []
        peak = 0
        before = status("VmRSS")
        while len(times) < RUNS and sum(times) < QUICK:
            if targets:
                free_memory(path, target)
            Path("/proc/self/clear_refs").write_text("5")
            start = time.perf_counter()
            result = function(path, *targets)
            times.append(time.perf_counter() - start)
            peak = max(peak, status("VmHWM") - before)
        check(tool, task, result, target)
        if targets:
            target.rename(last_output(path))
    return {"seconds": statistics.median_low(times), "peak": peak}


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


def measured(sizes: list[float], workers: list[int], tasks: list[str], tools: list[str], place: Path) -> list[Any]:
    """Measure all cells, each size's on one file, and tell of each when it is done."""
    results = []
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            needed = (1 if tasks == ["statistics"] else 2) * size + SMALL + 1
            if shutil.disk_usage(folder).free < 1e9 * needed:
                print(f"scale.py: {size:g} GB need {needed:.1f} GB in {place}", file=sys.stderr)
                continue
            path = Path(folder, "x.npy")
            make(path, size)
            for task in tasks:
                for number in workers:
                    found = {}
                    for tool in tools:
                        row = found[tool] = cell(tool, task, path, number)
                        if row is not None:
                            line = f"{task:10}  {size:4g} GB  {number} worker(s)  {tool:15}  {shown(row, tool)}"
                            print(line, file=sys.stderr, flush=True)
                    results.append({"task": task, "size": size, "workers": number, "tools": found})
    return results


# --- showing --------------------------------------------------------------------------------------------------------


def shown(row: dict[str, Any] | None, tool: str) -> str:
    if row is None:
        return "n/a"
    return f"{row['seconds']:.2f} s" + ("" if tool == "cp" else f", {row['peak'] / 1e6:.0f} MB")


def show(results: list[dict[str, Any]], tools: list[str]) -> None:
    """Print the table."""
    table = Table("task", title="Seconds, and the memory that the process grew by")
    for heading in ("GB", "workers", *tools):
        table.add_column(heading, justify="right", no_wrap=True)
    for r in sorted(results, key=lambda r: (TASKS.index(r["task"]), r["size"], r["workers"])):
        cells = (shown(row, tool) for tool, row in r["tools"].items())
        table.add_row(r["task"], f"{r['size']:g}", str(r["workers"]), *cells)
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)


def machine() -> dict[str, str]:
    """Return what the figures hold for."""
    from numbanorm.calls.config import config

    with open("/proc/meminfo") as file:
        memory = int(file.readline().split()[1]) / 1e6
    found = {"processor": config()["processor"], "memory": f"{memory:.0f} GB"}
    for package in ("numba", "numpy", "dask", "scikit-learn", "dask-ml"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"Python": platform.python_version(), "date": date.today().isoformat()}


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw seconds and memory against the file's size, task by task, on as many workers as each tool has use for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    best = best_of(results)
    sizes = sorted({size for _, size in best})
    tasks = [task for task in TASKS if any(t == task for t, _ in best)]
    figure, axes = plt.subplots(2, len(tasks), figsize=(9, 5.6), sharex=True, sharey="row", squeeze=False)
    for column, task in enumerate(tasks):
        for number, (tool, marker) in enumerate(zip(TOOLS, "os^vDx", strict=True)):
            points = [(size, best[task, size][tool]) for size in sizes if best.get((task, size), {}).get(tool)]
            for row, (key, unit) in enumerate((("seconds", 1), ("peak", 1e6))):
                if points and (tool, key) != ("cp", "peak"):
                    heights = [max(cell[key] / unit, 1e-3) for _, cell in points]
                    look: dict[str, Any] = {"color": f"C{number}", "marker": marker, "ms": 4, "lw": 1, "label": tool}
                    axes[row, column].plot([size for size, _ in points], heights, **look)
        axes[0, column].set_title(task)
        axes[1, column].set_xlabel("GB")
    for name, panel in zip(("seconds", "MB of memory"), axes[:, 0], strict=True):
        panel.set_ylabel(name)
    for panel in axes.flat:
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.set_xticks(sizes)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.25)
    labels = {
        label: line for panel in axes.flat for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.legend(labels.values(), labels.keys(), loc="upper center", ncols=6, frameon=False)
    figure.savefig(path, dpi=130)


def best_of(results: list[dict[str, Any]]) -> dict[tuple[str, float], dict[str, Any]]:
    """Return for every task and size each tool's cell with the most workers."""
    best: dict[tuple[str, float], dict[str, Any]] = {}
    for r in sorted(results, key=lambda r: r["workers"]):
        there = best.setdefault((r["task"], r["size"]), {})
        there |= {tool: row for tool, row in r["tools"].items() if row is not None}
    return best


def write_readme(results: list[dict[str, Any]], about: dict[str, str], path: Path) -> None:
    """Put the cells of the largest file between the README's markers."""
    best = best_of(results)
    largest = max(size for _, size in best)
    most = max(r["workers"] for r in results)
    tools = [tool for tool in TOOLS if any(tool in row for row in best.values())]
    lines = [f"| {largest:g} GB of float32 | " + " | ".join(tools) + " |", "|---|" + "--:|" * len(tools)]
    for task in TASKS:
        row = best.get((task, largest))
        if row:
            cells = " | ".join(shown(row.get(tool), tool) for tool in tools)
            lines.append(f"| {WORDS[task]} | {cells} |")
    lines += ["", f"On {most} cores where a tool uses them, and the memory that its process grew by."]
    lines += ["Measured by `benchmarks/scale.py`: " + ", ".join(f"{k} {v}" for k, v in about.items()) + "."]
    pattern = r"(<!-- scale: begin -->\n).*(<!-- scale: end -->)"
    text, count = re.subn(pattern, lambda m: m[1] + "\n".join(lines) + "\n" + m[2], path.read_text(), flags=re.S)
    if count != 1:
        raise SystemExit(f"{path}: expected one pair of scale markers")
    path.write_text(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", default="0.1,0.5,2,8", help="sizes of the file in GB")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--tools", default=";".join(TOOLS), help="names, separated by semicolons")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files lie for a while"
    )
    parser.add_argument("--json", type=Path, help="write the table there too")
    parser.add_argument("--plot", type=Path, help="draw it there")
    parser.add_argument("--readme", action="store_true", help="rewrite the table in README.md")
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
    workers = [n for n in map(int, options.workers.split(",")) if n <= most]
    sizes = [float(size) for size in options.sizes.split(",")]
    tools = options.tools.split(";")
    results = measured(sizes, workers, options.tasks.split(","), tools, options.folder)
    show(results, tools)
    about = machine()
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)
    if options.readme:
        write_readme(results, about, Path(__file__).parents[1] / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
