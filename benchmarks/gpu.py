"""Measure every norm on a GPU, forward and backward: one command, one table, and the same as JSON.

    python benchmarks/gpu.py [--only TEXT] [--widths 64,1024] [--dtypes float32,bfloat16] [--peers torch] [--json FILE]

Each row is one norm on one shape. The output is compared with float64 before its time counts. Times are taken by events
on the device, medians over calls in turns with torch, torch.compile, Liger and quack where they are installed; before
every call a buffer beyond the size of L2 is written, so that inputs come from memory, and the device is busy with that
while the host prepares the launch. Effective GB/s count each array once: forward reads x and writes y, backward reads x
and dy and writes dx. "of copy" is their share of what a copy on the device reaches, in the same run and with as many
bytes. The last table is the host's: microseconds from a Python call on small arrays to its return.

Exit status 2 means that there is no GPU to measure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numbanorm as nn

WIDTHS = (64, 128, 256, 512, 768, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)
DTYPES = ("float32", "bfloat16", "float16")
NORMS = ("layer", "rms", "batch", "batch, last", "instance", "group")
DIRECTIONS = ("forward", "backward")
ELEMENTS = 1 << 26
"""Of every input: 128 MB of half precision, 256 MB of float32, beyond any L2."""

CHANNELS, GROUPS, EPS = 64, 8, 1e-5
TOLERANCE = {"float32": 5e-6, "bfloat16": 2.0**-7, "float16": 2.0**-10}
"""Largest error of ours, as a share of the result's scale; peers may be 100 times worse."""

PEERS = ("torch", "compile", "Liger", "quack")
TURNS = 25
FLUSH = 512 << 20
"""Bytes written before every call: 8 times the L2 of an H100, and 0.2 ms in which the host gets ahead."""


class Case(NamedTuple):
    """One norm on groups, or channels, of one width.

    Attributes
    ----------
    norm : str
        One of `NORMS`.
    direction : str
        "forward" or "backward".
    width : int
        Elements of a row of layer and RMS norm, of a channel of a sample of batch and instance norm, of a group of
        group norm; channels of "batch, last".
    dtype : str
        Of all arrays.
    """

    norm: str
    direction: str
    width: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.norm} {self.direction} {self.width} {self.dtype}"

    def shape(self, elements: int = ELEMENTS) -> tuple[int, ...]:
        """Return the shape of the input, of about so many elements."""
        rows = max(1, elements // self.width)
        if self.norm in ("layer", "rms", "batch, last"):
            return rows, self.width
        if self.norm == "group":
            return max(1, rows // GROUPS), CHANNELS, max(1, self.width * GROUPS // CHANNELS)
        return max(1, rows // CHANNELS), CHANNELS, self.width

    def bytes(self, elements: int = ELEMENTS) -> int:
        """Return the bytes that must be moved: every array of the input's shape once."""
        size = 4 if self.dtype == "float32" else 2
        arrays = 2 if self.direction == "forward" else 3
        count = 1
        for n in self.shape(elements):
            count *= n
        return arrays * count * size


def cases(only: str, widths: tuple[int, ...], dtypes: tuple[str, ...]) -> Iterator[Case]:
    for norm in NORMS:
        for direction in DIRECTIONS:
            for dtype in dtypes:
                for width in widths:
                    case = Case(norm, direction, width, dtype)
                    if re.search(only, case.name):
                        yield case


# --- candidates -------------------------------------------------------------------------------------------------------

Call = Callable[[], Any]


def candidates(
    case: Case, torch: Any, device: str, elements: int = ELEMENTS, wanted: tuple[str, ...] = PEERS
) -> tuple[dict[str, Call], Call]:
    """Return the calls that take part, by name, and the one that gives the results in float64."""
    kind = getattr(torch, case.dtype)
    generator = torch.Generator(device=device).manual_seed(case.width)
    shape = case.shape(elements)
    size = shape[1]

    def draw(*lengths: int) -> Any:
        return torch.randn(lengths, generator=generator, device=device).to(kind)

    x, dy, w, b = draw(*shape), draw(*shape), draw(size), draw(size)
    functional = _functional(case, torch)
    peers = {"torch": functional, **_others(case, functional, torch, device)}
    peers = {name: peer for name, peer in peers.items() if name in wanted}
    wide = [a.double() for a in (x, w, b)]
    if case.direction == "forward":
        calls = {"numbanorm": _ours_forward(case, x, w, b)}
        calls |= {name: lambda f=f: f(x, w, b) for name, f in peers.items()}
        return calls, lambda: (functional(*wide),)
    calls = {"numbanorm": _ours_backward(case, dy, x, w, b)}
    calls |= {name: _gradient(f, dy, (x, w, b), torch) for name, f in peers.items()}
    return calls, _gradient(functional, dy.double(), tuple(wide), torch)


def _functional(case: Case, torch: Any) -> Callable[..., Any]:
    """Return torch's own function of (x, w, b)."""
    functional = torch.nn.functional
    if case.norm == "layer":
        return lambda x, w, b: functional.layer_norm(x, x.shape[1:], w, b, EPS)
    if case.norm == "rms":
        return lambda x, w, b: functional.rms_norm(x, x.shape[1:], w, EPS)
    if case.norm == "group":
        return lambda x, w, b: functional.group_norm(x, GROUPS, w, b, EPS)
    if case.norm == "instance":
        return lambda x, w, b: functional.instance_norm(x, None, None, w, b, True, 0.1, EPS)
    return lambda x, w, b: functional.batch_norm(x, None, None, w, b, True, 0.1, EPS)


def _others(case: Case, functional: Callable[..., Any], torch: Any, device: str) -> dict[str, Callable[..., Any]]:
    """Return what else is installed."""
    if device != "cuda":
        return {}
    found: dict[str, Callable[..., Any]] = {"compile": torch.compile(functional, dynamic=False)}
    try:
        if case.norm == "layer":
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction

            found["Liger"] = lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, EPS)
        elif case.norm == "rms":
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction

            found["Liger"] = lambda x, w, b: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)
    except ImportError:
        pass
    try:
        if case.norm == "rms":
            from quack import rmsnorm

            found["quack"] = lambda x, w, b: rmsnorm(x, w, eps=EPS)
    except ImportError:
        pass
    return found


def _gradient(function: Callable[..., Any], dy: Any, inputs: tuple[Any, ...], torch: Any) -> Call:
    """Return the backward of a function: gradients of (x, w, b), None where there is none."""
    own = [a.detach().requires_grad_() for a in inputs]
    y = function(*own)
    return lambda: torch.autograd.grad(y, own, dy, retain_graph=True, allow_unused=True)


def _ours_forward(case: Case, x: Any, w: Any, b: Any) -> Call:
    if case.norm == "layer":
        return lambda: nn.layer_norm(x, case.width, w, b)
    if case.norm == "rms":
        return lambda: nn.rms_norm(x, case.width, w, EPS)
    if case.norm == "group":
        return lambda: nn.group_norm(x, GROUPS, w, b)
    if case.norm == "instance":
        return lambda: nn.instance_norm(x, None, None, w, b)
    return lambda: nn.batch_norm(x, None, None, w, b, True)


def _ours_backward(case: Case, dy: Any, x: Any, w: Any, b: Any) -> Call:
    if case.norm == "rms":
        _, rstd = nn.rms_norm(x, case.width, w, EPS, return_stats=True)
        return lambda: nn.rms_norm_backward(dy, x, case.width, rstd, w)
    if case.norm == "layer":
        _, mean, rstd = nn.layer_norm(x, case.width, w, b, return_stats=True)
        return lambda: nn.layer_norm_backward(dy, x, case.width, mean, rstd, w)
    if case.norm == "group":
        _, mean, rstd = nn.group_norm(x, GROUPS, w, b, return_stats=True)
        return lambda: nn.group_norm_backward(dy, x, GROUPS, mean, rstd, w)
    if case.norm == "instance":
        _, mean, rstd = nn.instance_norm(x, None, None, w, b, return_stats=True)
        return lambda: nn.instance_norm_backward(dy, x, mean, rstd, w)
    _, mean, rstd = nn.batch_norm(x, None, None, w, b, True, return_stats=True)
    return lambda: nn.batch_norm_backward(dy, x, mean, rstd, w)


def error_of(result: Any, reference: Any) -> float:
    """Return the largest error as a share of the scale, over all arrays of a result; NaN where there is one."""
    worst = 0.0
    for got, wanted in zip(result if isinstance(result, tuple) else (result,), reference, strict=False):
        if got is None or wanted is None:
            continue
        error = float((got.double() - wanted).abs().max() / wanted.abs().max())
        worst = error if error != error else max(worst, error)
    return worst


# --- measuring --------------------------------------------------------------------------------------------------------


class EventTimer:
    """Times on the device, with a cold L2."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")

    def __call__(self, calls: dict[str, Call]) -> dict[str, float]:
        """Return the median seconds of each call."""
        torch = self.torch
        for call in calls.values():
            for _ in range(3):
                call()
        pairs: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
        for _ in range(TURNS):
            for name, call in calls.items():
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.flush.zero_()
                start.record()
                call()
                stop.record()
                pairs[name].append((start, stop))
        torch.cuda.synchronize()
        return {
            name: statistics.median(start.elapsed_time(stop) for start, stop in times) / 1e3
            for name, times in pairs.items()
        }


def evaluate(
    case: Case,
    torch: Any,
    device: str,
    timer: Callable[[dict[str, Call]], dict[str, float]],
    elements: int = ELEMENTS,
    wanted: tuple[str, ...] = PEERS,
) -> dict[str, Any]:
    """Check and measure one case.

    Raises
    ------
    SystemExit
        If our result is wrong.
    """
    calls, reference = candidates(case, torch, device, elements, wanted)
    exact = reference()
    allowed = TOLERANCE[case.dtype]
    errors = {}
    for name in list(calls):
        try:
            errors[name] = error_of(calls[name](), exact)
        except Exception as problem:  # a peer's own, whatever it is
            if name == "numbanorm":
                raise
            print(f"{case.name}: {name} takes no part: {problem}", file=sys.stderr)
            del calls[name]
            continue
        if name == "numbanorm" and not errors[name] <= allowed:
            raise SystemExit(f"{case.name}: wrong by {errors[name]:.1e}, no time is taken of it")
        if not errors[name] <= 100 * allowed:
            print(f"{case.name}: {name} is wrong by {errors[name]:.1e} and takes no part", file=sys.stderr)
            del calls[name]
    del exact, reference
    moved = case.bytes(elements)
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls["copy"] = lambda: target.copy_(source)
    seconds = timer(calls)
    return {**case._asdict(), "shape": case.shape(elements), "bytes": moved, "errors": errors, "seconds": seconds}


def host_overhead(torch: Any, device: str = "cuda") -> dict[str, float]:
    """Return the median microseconds from a Python call on small arrays to its return."""
    x, w, b = torch.randn(64, 768, device=device), torch.ones(768, device=device), torch.zeros(768, device=device)
    out = torch.empty_like(x)
    layer = nn.LayerNorm(768)
    if device == "cuda":
        layer.to(device)
    _, mean, rstd = nn.layer_norm(x, 768, w, b, return_stats=True)
    calls: dict[str, Call] = {
        "layer_norm": lambda: nn.layer_norm(x, 768, w, b),
        "layer_norm, out=": lambda: nn.layer_norm(x, 768, w, b, out=out),
        "LayerNorm, training": lambda: layer(x),
        "layer_norm_backward": lambda: nn.layer_norm_backward(x, x, 768, mean, rstd, w),
        "torch.nn.functional.layer_norm": lambda: torch.nn.functional.layer_norm(x, (768,), w, b),
    }
    found = {}
    for name, call in calls.items():
        times = []
        for _ in range(200):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
            if device == "cuda":
                torch.cuda.synchronize()  # an empty queue before every call: a full one would be waited for
        found[name] = statistics.median(times) * 1e6
    return found


# --- reporting --------------------------------------------------------------------------------------------------------


def gigabytes(row: dict[str, Any], name: str) -> float | None:
    """Return effective GB/s of one candidate of a row; None where it takes no part."""
    seconds = row["seconds"].get(name)
    return None if seconds is None else float(row["bytes"] / seconds / 1e9)


def of_copy(row: dict[str, Any]) -> float:
    """Return our share of the copy's GB/s."""
    return float(row["seconds"]["copy"] / row["seconds"]["numbanorm"])


def show(rows: list[dict[str, Any]], host: dict[str, float], title: str, width: int | None = None) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{title}\nEffective GB/s: forward counts x and y once, backward x, dy and dx once")
    for column in ("norm", "width", "dtype"):
        table.add_column(column)
    for column in ("error", "microseconds", "numbanorm", *PEERS, "copy", "of copy", "best peer / ours"):
        table.add_column(column, justify="right")
    for row in rows:
        speeds = [gigabytes(row, name) for name in ("numbanorm", *PEERS, "copy")]
        peers = [row["seconds"][name] for name in PEERS if name in row["seconds"]]
        ratio = min(peers) / row["seconds"]["numbanorm"] if peers else None
        shown = "n/a" if ratio is None else f"[{'green' if ratio >= 1 else 'red'}]{ratio:.2f}"
        table.add_row(
            f"{row['norm']} {row['direction']}",
            str(row["width"]),
            row["dtype"],
            f"{row['errors']['numbanorm']:.0e}",
            f"{row['seconds']['numbanorm'] * 1e6:,.0f}",
            *("n/a" if speed is None else f"{speed:,.0f}" for speed in speeds),
            f"{of_copy(row):.2f}",
            shown,
        )
    console = Console(width=width)
    console.print(table)
    small = Table("call on 64 x 768 float32", title="Host: microseconds from call to return")
    small.add_column("microseconds", justify="right")
    for name, microseconds in host.items():
        small.add_row(name, f"{microseconds:.1f}")
    console.print(small)


def machine(torch: Any) -> dict[str, str]:
    """Describe what was measured on."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {
        "device": properties.name,
        "multiprocessors": str(properties.multi_processor_count),
        "L2": f"{getattr(properties, 'L2_cache_size', 0) >> 20} MB",
        "memory": f"{properties.total_memory >> 30} GB",
        "driver": driver,
        "CUDA": torch.version.cuda,
        "python": platform.python_version(),
        **versions(),
        "date": date.today().isoformat(),
    }


def versions() -> dict[str, str]:
    """Return the versions of what takes part and is installed."""
    found = {}
    for package in ("numbanorm", "numba-cuda", "numba", "numpy", "torch", "triton", "liger-kernel", "quack-kernels"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write(path: Path, about: dict[str, str], rows: list[dict[str, Any]], host: dict[str, float]) -> None:
    """Write everything that was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": about, "host_microseconds": host, "rows": rows}, indent=1) + "\n")


def default_path(device: str) -> Path:
    """Return where the JSON goes: to the folder that OUT names, or beside this file."""
    folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    return folder / f"gpu-{re.sub(r'[^A-Za-z0-9]+', '-', device).strip('-')}-{date.today().isoformat()}.json"


def missing() -> str | None:
    """Return why nothing can be measured here."""
    from numbanorm.calls.dispatch import cuda_problem

    if cuda_problem() is not None:
        return cuda_problem()
    try:
        import torch
    except ImportError:
        return "the comparison needs torch, which is not installed"
    return None if torch.cuda.is_available() else "the installed torch sees no GPU"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="regular expression; only rows whose name it finds")
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--peers", default=",".join(PEERS), help="of these, those that are installed take part")
    parser.add_argument("--json", type=Path, help="where the JSON goes; in $OUT or benchmarks/results if not given")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    problem = missing()
    if problem is not None:
        print(f"gpu.py: nothing was measured, there is no GPU here: {problem}", file=sys.stderr)
        return 2
    import torch

    about = machine(torch)
    path = options.json or default_path(about["device"])
    timer = EventTimer(torch)
    rows: list[dict[str, Any]] = []
    host = host_overhead(torch)
    widths, dtypes = tuple(map(int, options.widths.split(","))), tuple(options.dtypes.split(","))
    try:
        for case in cases(options.only, widths, dtypes):
            rows.append(evaluate(case, torch, "cuda", timer, wanted=tuple(options.peers.split(","))))
            print(f"{case.name}: {of_copy(rows[-1]):.2f} of copy", file=sys.stderr, flush=True)
            write(path, about, rows, host)  # what was measured stays, whatever happens to the rest
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    finally:
        title = ", ".join(f"{name} {value}" for name, value in about.items())
        show(rows, host, title, None if sys.stdout.isatty() else 170)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
