"""Compare the norms with torch, onnxruntime, JAX and NumPy, on one thread and on all: one command, one table.

    python benchmarks/peers.py [--only REGEX] [--threads 1,all] [--budget SECONDS] [--json PATH]

For every number of threads there is one process, kept on as many cores; a cell is measured in one after the other. In
a process all candidates run in turns, each turn in another order; a time is the median over the turns, a ratio the
median of the paired ratios. Each result is checked against float64 before its time counts. Candidates return a fresh
array, as their users call them; `out=` stands apart. "copies" is the time of `numpy.copyto` of x into an array that is
there already. Libraries that are not installed do not take part. Programs (`programs.py`) and what options cost
(`costs.py`) follow the cells. A run of everything writes docs/peers.json; with `--only` nothing is written unless
`--json` says where. `--readme` and `--plot` rewrite the README's tables and draw the picture; with `--from PATH` they
do it from results that are there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import date
from importlib import metadata
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import peer_grid
import peer_report
from peer_report import PEERS

SCHEMA = 2
DEFAULT_JSON = Path(__file__).parents[1] / "docs" / "peers.json"
PACKAGES = {"torch": "torch", "onnxruntime": "onnxruntime", "JAX": "jax"}
BUDGET = 1.5
"""Seconds for a cell on one number of threads, besides at least `FEWEST` turns, data and reference."""

SECONDS_A_TURN = 0.004
SETTLE = 0.005
"""Seconds that a candidate runs on all threads before its time counts: so long may those of the one before it spin."""

FEWEST, MOST = 5, 40
SLOW = 0.05
"""Seconds from which on a call is not repeated beyond the fewest turns, nor run once untimed before."""

TOLERANCE = {"float32": 2e-6, "float64": 1e-9, "bfloat16": 2.0**-8}
"""Largest error of ours, as a share of the result's scale; peers may be 500 times worse."""

ONE = "numbanorm on one thread"


class WrongResultError(Exception):
    """Our result differs from float64: no time is taken of it."""


def pin(threads: int) -> None:
    """Keep this process, and so every library's threads, on the last `threads` cores; leave all as users have them."""
    cores = sorted(os.sched_getaffinity(0))
    if threads >= len(cores):
        return
    os.sched_setaffinity(0, cores[-threads:])
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    if threads == 1:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()


def error_of(result: Any, reference: Any) -> float:
    """Return the largest error as a share of the scale, over all arrays of a result."""
    if not isinstance(reference, tuple):
        result, reference = (result,), (reference,)
    worst = 0.0
    for got, wanted in zip(result, reference, strict=True):
        array = _as_float64(got)
        if array.shape != wanted.shape:
            return math.inf
        worst = max(worst, float(np.abs(array - wanted).max() / np.abs(wanted).max()))
    return worst


def _as_float64(array: Any) -> np.ndarray:
    if type(array).__module__.startswith("torch"):
        array = array.detach()
        array = array.float() if "bfloat16" in str(array.dtype) else array
    return np.asarray(array.numpy() if hasattr(array, "numpy") else array).astype(np.float64)


def check(cell: Any) -> float:
    """Return our error; drop peers whose answer is wrong, raise if ours is."""
    reference = cell.reference()
    allowed = TOLERANCE[cell.spec.dtype]
    worst = 0.0
    for calls, beside in ((cell.candidates, cell.beside), (cell.reused, {})):
        for name in list(calls):
            try:
                result = calls[name]()
                if name in beside:
                    result = (result if isinstance(result, tuple) else (result,)) + beside[name]
                error = error_of(result, reference)
            except NotImplementedError:  # torch says so of an operation that lacks a dtype
                error = math.inf
            if name == "numbanorm":
                worst = max(worst, error)
            if not error <= allowed * (1 if name == "numbanorm" else 500):
                if name == "numbanorm":
                    raise WrongResultError(f"wrong by {error:.1e}, no time is taken of it")
                print(f"{cell.name}: {name} is wrong by {error:.1e} and takes no part", file=sys.stderr)
                del calls[name]
    return worst


Calls = dict[str, Callable[[], Any]]


def measure(
    calls: Calls, budget: float = BUDGET, settle: float = 0.0, before: Calls | None = None
) -> dict[str, np.ndarray]:
    """Return seconds a call for each candidate and turn.

    Parameters
    ----------
    calls : dict of str to callable
        The candidates.
    budget : float, optional
        Seconds for all; at least `FEWEST` turns are made.
    settle : float, optional
        Seconds of untimed calls before the timed ones of a turn; there is one such call at least.
    before : dict of str to callable, optional
        What is called before a candidate's turn.
    """
    before = before or {}
    turn = min(SECONDS_A_TURN, max(budget, 0.01) / 20)
    settle = min(settle, turn * 1.25)
    once = {}
    for name, call in calls.items():
        before.get(name, _nothing)()
        call()
        once[name] = _shortest(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), np.random.default_rng(0).shuffle
    end = time.perf_counter() + budget
    for made in range(MOST):
        if made >= FEWEST and time.perf_counter() > end:
            break
        shuffle(order)
        for name in order:
            if once[name] > SLOW and made >= FEWEST:
                continue
            before.get(name, _nothing)()
            times[name].append(_turn(calls[name], once[name], turn, settle))
    return {name: np.array(values) for name, values in times.items()}


def _nothing() -> None:
    pass


def _shortest(call: Callable[[], Any]) -> float:
    """Return the shortest of a few calls, so that one that had to wait does not count as slow."""
    found: list[float] = []
    while len(found) < 5 and sum(found) < SLOW:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return max(min(found), 1e-7)


def _turn(call: Callable[[], Any], once: float, seconds: float, settle: float) -> float:
    """Return seconds a call, after untimed ones: what the candidate before has left in the caches is its own cost."""
    if once <= SLOW:
        end = time.perf_counter() + settle
        call()
        while time.perf_counter() < end:
            call()
    loops = max(1, int(seconds / once))
    start = time.perf_counter()
    for _ in repeat(None, loops):
        call()
    return (time.perf_counter() - start) / loops


def paired(times: np.ndarray, ours: np.ndarray) -> float:
    """Return the median ratio over the turns that both have."""
    n = min(len(times), len(ours))
    return float(np.median(times[:n] / ours[:n]))


def result_of(cell: Any, budget: float = BUDGET, threads: int = 1) -> dict[str, Any]:
    """Check and measure one cell on the threads that this process has; on several also ours on one."""
    import numbanorm as nn

    with cell.context():
        error = check(cell)
        calls = dict(cell.candidates)
        calls |= {f"{name} out": call for name, call in cell.reused.items()}
        calls["copy"] = cell.copy
        before: Calls = {}
        if threads > 1:
            calls[ONE] = calls["numbanorm"]
            before = dict.fromkeys(calls, lambda: nn.set_num_threads(threads)) | {ONE: lambda: nn.set_num_threads(1)}
        times = measure(calls, budget, SETTLE if threads > 1 else 0.0, before)
        nn.set_num_threads(threads)
    ours = times["numbanorm"]
    peers = {name: paired(times[name], ours) for name in PEERS if name in times}
    result: dict[str, Any] = {
        "error": error,
        "turns": len(ours),
        "seconds": {name: float(np.median(t)) for name, t in times.items()},
        "over": peers,
        "best": min(peers, key=lambda name: peers[name]) if peers else None,
        "copies": 1 / paired(times["copy"], ours),
    }
    if "numbanorm out" in times:
        result["out_copies"] = 1 / paired(times["copy"], times["numbanorm out"])
    if ONE in times:
        result["over_one_thread"] = 1 / paired(times[ONE], ours)
    return result


# --- one process for each number of threads


def worker(threads: int, without: str) -> None:
    """Answer tasks, one line of JSON each, from standard input; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    pin(threads)

    import costs
    import peer_calls
    import peer_cells
    import programs

    import numbanorm as nn

    nn.set_num_threads(threads)
    if peer_calls.torch:
        peer_calls.torch.set_num_threads(threads)
    libraries = [name for name in peer_calls.LIBRARIES if not (without and re.fullmatch(without, name))]

    def answer(task: dict[str, Any]) -> Any:
        if "cell" in task:
            cell = peer_cells.make(peer_grid.SPECS[task["cell"]], libraries)
            return result_of(cell, task["budget"], threads)
        if "program" in task:
            return programs.compare(task["program"], task["budget"])
        return costs.measure(task["costs"], task["budget"])

    print("{}", file=answers, flush=True)  # everything is imported: nothing of it shall disturb another process
    for line in sys.stdin:
        try:
            found: Any = answer(json.loads(line))
        except WrongResultError as error:
            found = {"failed": str(error)}
        except Exception as error:  # one cell less, and the others are still measured
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=answers, flush=True)


class Worker:
    """A process that measures on some threads."""

    def __init__(self, threads: int, without: str) -> None:
        command = [sys.executable, __file__, "--worker", str(threads), "--without", without]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def ask(self, **task: Any) -> Any:
        """Return the answer to a task."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process that measures ended with status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def empty_report(counts: dict[str, int]) -> dict[str, Any]:
    """Return a report in which nothing is measured yet."""
    report: dict[str, Any] = {"schema": SCHEMA, "machine": machine(), "threads": counts}
    return report | {"cells": [], "programs": [], "costs": [], "failed": []}


def compare(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Measure what is asked for, and put it into the report."""
    import costs
    import programs

    only = re.compile(options.only)
    specs = {name: spec for name, spec in peer_grid.SPECS.items() if only.search(name)}
    wanted = [name for name in programs.PROGRAMS if only.search(name)]
    costly = [name for name in costs.OPTIONS if only.search(f"costs {name}")]
    for name, package in PACKAGES.items():
        if report["machine"][package] == "not installed":
            print(f"{name} is not installed and takes no part", file=sys.stderr)
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        workers = {}
        for label, count in options.counts.items():
            workers[label] = Worker(count, options.without)
            stack.callback(workers[label].close)
        for done, (name, spec) in enumerate(specs.items(), 1):
            part = "kernels" if spec in peer_grid.KERNELS else "calls"
            row: dict[str, Any] = {"cell": name, "set": part, "operation": spec.operation}
            row |= {"shape": list(spec.shape), "dtype": spec.dtype, "view": spec.view, "threads": {}}
            for label, asked in workers.items():
                found = asked.ask(cell=name, budget=options.budget)
                if _noted(found, name, report):
                    row["threads"][label] = found
            report["cells"].append(row)
            progress(f"{done}/{len(specs)}", start, peer_report.line(row))
        many = [label for label, count in options.counts.items() if count > 1]
        for name in wanted if many else []:
            found = workers[many[-1]].ask(program=name, budget=options.budget * 3)
            if _noted(found, name, report):
                report["programs"].append(found)
                progress("program", start, f"{name:45s} default / one thread {found['ratio']:.2f}")
        ones = [label for label, count in options.counts.items() if count == 1]
        for name in costly if ones else []:
            found = workers[ones[0]].ask(costs=name, budget=options.budget / 3)
            if _noted(found, name, report):
                report["costs"] += found
                progress("costs", start, name)


def _noted(found: Any, name: str, report: dict[str, Any]) -> bool:
    """Return whether this is a result; note what is wrong with it otherwise."""
    if isinstance(found, dict) and "failed" in found:
        print(f"{name}: {found['failed']}", file=sys.stderr)
        report["failed"].append(f"{name}: {found['failed']}")
        return False
    return True


def progress(what: str, start: float, text: str) -> None:
    print(f"[{what} {(time.perf_counter() - start) / 60:.1f} min] {text}", file=sys.stderr, flush=True)


def machine() -> dict[str, str]:
    """Return what the figures depend on."""
    import numbanorm as nn

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        nn.show_config()
    processor = re.search(r"^processor\W+(.*)$", shown.getvalue(), re.MULTILINE)
    found = {"processor": processor[1].strip() if processor else platform.processor()}
    for package in ("numbanorm", "numba", "numpy", *PACKAGES.values()):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"Python": platform.python_version(), "date": date.today().isoformat()}


def thread_counts(text: str) -> dict[str, int]:
    """Return numbers of threads by label, "all" being the cores of this process; none twice."""
    cores = len(os.sched_getaffinity(0))
    counts: dict[str, int] = {}
    for label in text.split(","):
        count = cores if label == "all" else int(label)
        if not 1 <= count <= cores:
            raise argparse.ArgumentTypeError(f"expected 1 to {cores} threads or all, got {label}")
        if count not in counts.values():
            counts[label] = count
    return counts


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression: cells, programs, costs whose name it finds")
    parser.add_argument("--threads", type=thread_counts, default="1,all", dest="counts", help="default: %(default)s")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds a cell and number of threads")
    parser.add_argument("--without", default="", help="regular expression; peers that take no part")
    parser.add_argument("--json", type=Path, help="where to write the results; of everything: docs/peers.json")
    parser.add_argument("--from", type=Path, dest="read", help="measure nothing: take the results from this file")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    parser.add_argument("--readme", action="store_true", help="rewrite the tables in README.md")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if a result of ours was wrong."""
    options = parse(arguments)
    if options.worker:
        worker(options.worker, options.without)
        return 0
    if options.read:
        report = peer_report.read(options.read)
    else:
        whole = not (options.only or options.without) and len(options.counts) > 1
        path = options.json or (DEFAULT_JSON if whole else None)
        report = empty_report(options.counts)
        try:
            compare(options, report)
        except BaseException:
            path = path and path.with_suffix(".part")
            raise
        finally:
            if path:
                path.write_text(json.dumps(report, indent=1) + "\n")
    peer_report.show(report)
    if options.plot:
        peer_report.plot(report, options.plot)
    if options.readme:
        peer_report.write_readme(report)
    return int(bool(report["failed"]))


if __name__ == "__main__":
    sys.exit(main())
