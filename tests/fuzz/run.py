"""Make calls drawn by chance, right ones and wrong ones, and judge each: `python tests/fuzz/run.py --calls 100000`.

Call number i of a seed is the same on every machine with the same NumPy: a failure names seed and number, and `--only
NUMBER` makes that call again. The calls run in a process of their own, so that a crash is told like any other failure.
With NUMBA_DISABLE_JIT=1 the kernels run as plain Python, which checks every index. Every call must give what
`judge.py` works out, or raise the documented error; no input changes, and nothing is written beside an output.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from random import Random

import numba

import numbanorm as nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000, help="how many calls to make")
    parser.add_argument("--seed", type=int, default=0, help="which calls to make")
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--only", type=int, help="make this one call alone, in this process")
    parser.add_argument("--here", action="store_true", help="make the calls in this process")
    parser.add_argument("--most", type=int, default=10, help="after how many failures to stop")
    parser.add_argument("--few-dtypes", action="store_true", help="four dtypes of thirteen: less to compile")
    parser.add_argument(
        "--shrunk", action="store_true", help="with NUMBA_DISABLE_JIT=1: chunks, tiles, blocks are small"
    )
    parser.add_argument("--progress", help=argparse.SUPPRESS)
    return parser.parse_args()


def work(given: argparse.Namespace) -> int:
    """Make the calls; return how many went wrong."""
    from check import WrongError, check, draw, make_arena
    from draws import ALL_DTYPES, FEW_DTYPES, OTHERS

    if numba.config.DISABLE_JIT:
        import interpreter

        interpreter.install()
        if given.shrunk:
            interpreter.shrink()
            nn.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))
    for record in OTHERS:
        nn.register_norm(record)
    faulthandler.enable()
    warnings.simplefilter("error")
    arena = make_arena()
    dtypes = FEW_DTYPES if given.few_dtypes else ALL_DTYPES
    first, calls = (given.first, given.calls) if given.only is None else (given.only, 1)
    progress = None
    if given.progress:
        with Path(given.progress).open("r+b") as file:
            progress = mmap.mmap(file.fileno(), 8)
    told: collections.Counter[str] = collections.Counter()
    failures = 0
    start = time.perf_counter()
    for number in range(first, first + calls):
        if progress is not None:
            progress[:] = struct.pack("q", number)
        rnd = Random(given.seed << 40 | number)
        try:
            case = draw(rnd, arena, dtypes)
            if given.only is not None:
                print(case)
            told[f"{case.name} {check(case, rnd)}"] += 1
        except Exception as error:
            failures += 1
            if not isinstance(error, WrongError) or given.only is not None:
                traceback.print_exc()
            print(f"call {number} of seed {given.seed}: {error}\n", flush=True)
            if failures == given.most:
                break
    seconds = time.perf_counter() - start
    for name, count in sorted(told.items()):
        print(f"{count:8d} {name}")
    right = sum(count for name, count in told.items() if name.endswith("right"))
    refused = told.total() - right
    print(f"{told.total()} calls passed in {seconds:.1f} s: {right} right, {refused} refused; {failures} failed")
    return failures


def main() -> int:
    given = options()
    if given.only is not None or given.progress or given.here:
        return min(work(given), 1)
    descriptor, progress = tempfile.mkstemp()
    try:
        os.write(descriptor, struct.pack("q", -1))
        os.close(descriptor)
        done = subprocess.run([sys.executable, *sys.argv, "--progress", progress], check=False)
        (number,) = struct.unpack("q", Path(progress).read_bytes())
    finally:
        os.unlink(progress)
    if done.returncode not in (0, 1):
        name = signal.Signals(-done.returncode).name if done.returncode < 0 else f"status {done.returncode}"
        print(f"call {number} of seed {given.seed} ended the process: {name}")
        print(f"again: python {sys.argv[0]} --seed {given.seed} --only {number}")
        return 1
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
