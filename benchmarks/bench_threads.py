"""What more threads bring, to kernels and to programs; n/a for more threads than this process has cores."""

from __future__ import annotations

import os
import time

import numpy as np

import numbanorm as nn

from . import common, programs


class Threads(common.Prepared):
    """Large arrays, with out=."""

    param_names = ("case", "threads")
    params = (
        (
            "LayerNorm 4096x1024 float32",
            "BatchNorm NCHW 32x64x56x56 float32",
            "BatchNorm NHWC 32x56x56x64 float32",
        ),
        ("2", "4"),
    )

    def prepare(self, name: str, threads: str) -> None:
        self.threads = int(threads)
        if self.threads > len(os.sched_getaffinity(0)):
            raise NotImplementedError(f"{threads} threads, {len(os.sched_getaffinity(0))} cores")
        case = common.Case(name)
        y = np.empty_like(case.x)
        self.call = case.call(out=y)
        self.on_many()
        case.check(y)
        self.copy = common.copies(np.empty_like(case.x), case.x, self.threads)

    def on_many(self) -> None:
        nn.set_num_threads(self.threads)
        self.call()

    def on_one(self) -> None:
        nn.set_num_threads(1)
        self.call()

    @common.tracked("x")
    def track_over_one_thread(self, name: str, threads: str) -> float:
        """Time on so many threads over the time on one, in turns: 0.5 is perfect for two."""
        return common.median_ratio(self.on_many, self.on_one, time.perf_counter)

    @common.tracked("x")
    def track_over_copyto(self, name: str, threads: str) -> float:
        """Time on so many threads over that of np.copyto on as many, in turns."""
        return common.median_ratio(self.on_many, self.copy, time.perf_counter)


class Programs(common.Prepared):
    """NumPy programs with norms in them, where the threads of NumPy's products hold the cores."""

    param_names = ("program",)
    params = (tuple(programs.PROGRAMS),)

    def prepare(self, name: str) -> None:
        if programs.default_threads() < 2:
            raise NotImplementedError("one core: the default is one thread")

    @common.tracked("x")
    def track_default_over_one_thread(self, name: str) -> float:
        """Time with numbanorm's default threads over the time with one, in turns: more than 1 is what threads hurt."""
        ratio: float = programs.compare(name, seconds=1.0)["ratio"]
        return ratio
