"""Small calls: what one token or one small image costs, mostly in Python and in NumPy's allocation."""

from __future__ import annotations

import statistics
import time

import numpy as np

from . import common, costs


class Hot(common.Timed):
    """One call after another."""

    param_names = ("case",)
    params = (
        "LayerNorm 1x768 float32",
        "LayerNorm 1x768 bfloat16",
        "LayerNorm 1x768 float64",
        "LayerNorm 128x768 float32",
        "RMSNorm 1x768 float32",
        "BatchNorm NCHW 4x32x28x28 float32",
        "BatchNorm NHWC 4x28x28x32 float32",
        "BatchNormEval NCHW 1x64x8x8 float32",
        "InstanceNorm NCHW 4x32x28x28 float32",
        "InstanceNorm NHWC 4x28x28x32 float32",
        "GroupNorm NCHW 4x32x28x28 float32",
        "GroupNorm NHWC 4x28x28x32 float32",
    )

    def prepare(self, name: str) -> None:
        case = common.Case(name)
        self.call, self.read = case.call(), case.x
        case.check(self.call())

    def time_forward(self, name: str) -> None:
        """Seconds of a forward call with a fresh output, hot."""
        self.run()


class Idle(common.Prepared):
    """One call now and then, as a server sees them."""

    param_names = ("case",)
    params = ("LayerNorm 1x768 float32", "BatchNormEval NCHW 1x64x8x8 float32", "GroupNorm NHWC 4x28x28x32 float32")

    def prepare(self, name: str) -> None:
        case = common.Case(name)
        self.call = case.call()
        case.check(self.call())

    @common.tracked("seconds")
    def track_forward_after_10_ms(self, name: str) -> float:
        """Median seconds of a forward call after 10 ms of sleep."""
        times = []
        for _ in range(25):
            time.sleep(0.01)
            start = time.perf_counter()
            self.call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


class Options(common.Timed):
    """A call in cache with one option, in the order that `peers.py` tells the costs in."""

    param_names = ("call",)
    params = tuple(f"{norm} float32, {option}" for norm, found in costs.OPTIONS.items() for option in found)

    def prepare(self, name: str) -> None:
        norm, _, option = name.partition(" float32, ")
        self.call, self.read = costs.call_of(norm, option), np.ones(costs.SHAPES[norm], np.float32)

    def time_forward(self, name: str) -> None:
        """Seconds of a forward call, hot; batch norm in training."""
        self.run()
