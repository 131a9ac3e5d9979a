"""Large arrays, one thread: the time, and how it compares with NumPy copying the same memory."""

from __future__ import annotations

import numpy as np

from . import common

CASES = (
    "LayerNorm 4096x1024 float32",
    "LayerNorm 4096x1024 bfloat16",
    "LayerNorm 4096x1024 float64",
    "LayerNorm 4096x4096 float32",
    "LayerNorm NCHW 32x64x56x56 float32",
    "RMSNorm 4096x1024 float32",
    "BatchNorm NCHW 32x64x56x56 float32",
    "BatchNorm NHWC 32x56x56x64 float32",
    "BatchNormEval NCHW 32x64x56x56 float32",
    "BatchNormEval NHWC 32x56x56x64 float32",
    "InstanceNorm NCHW 32x64x56x56 float32",
    "InstanceNorm NHWC 32x56x56x64 float32",
    "GroupNorm NCHW 32x64x56x56 float32",
    "GroupNorm NHWC 32x56x56x64 float32",
)


class Seconds(common.Timed):
    """As users call it."""

    param_names = ("case",)
    params = CASES

    def prepare(self, name: str) -> None:
        case = common.Case(name)
        self.call, self.read = case.call(), case.x
        case.check(self.call())

    def time_forward(self, name: str) -> None:
        """Seconds of a forward call with a fresh output."""
        self.run()


class Copies(common.Prepared):
    """Against the memory: both write to an array that is there already."""

    param_names = ("case",)
    params = CASES

    def prepare(self, name: str) -> None:
        case = common.Case(name)
        y = np.empty_like(case.x)
        self.call = case.call(out=y)
        self.call()
        case.check(y)
        self.copy = common.copies(np.empty_like(case.x), case.x)

    @common.tracked("x")
    def track_forward_over_copyto(self, name: str) -> float:
        """Time with out=, over that of np.copyto on the same array; both on one thread, in turns."""
        return common.median_ratio(self.call, self.copy)


class Bandwidth(common.Prepared):
    """The unit in which hardware is sold, for display."""

    param_names = ("case",)
    params = (
        "LayerNorm 4096x4096 float32",
        "RMSNorm 4096x1024 float32",
        "BatchNorm NCHW 32x64x56x56 float32",
        "BatchNormEval NCHW 32x64x56x56 float32",
        "GroupNorm NHWC 32x56x56x64 float32",
    )

    def prepare(self, name: str) -> None:
        case = common.Case(name)
        y = np.empty_like(case.x)
        self.call = case.call(out=y)
        self.call()
        case.check(y)
        self.nbytes = case.x.nbytes + y.nbytes

    @common.tracked("GB/s", less_is_better=False)
    def track_gigabytes_per_second(self, name: str) -> float:
        """Bytes read once and written once, by seconds with out=. More is better."""
        return self.nbytes / common.median_seconds(self.call) / 1e9
