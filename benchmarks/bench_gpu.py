"""Norms on the GPU, timed by events; n/a without one, and for commits without a CUDA backend."""

from __future__ import annotations

import statistics
import warnings
from typing import Any

import numpy as np

from . import common

COLD = 256 << 20
"""Bytes written between two calls: more than the L2 cache of any GPU holds."""


def device() -> Any:
    """Return numba.cuda, or make the benchmark n/a."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from numba import cuda
        except ImportError as error:
            raise NotImplementedError("numba has no CUDA target here") from error
        if not cuda.is_available():
            raise NotImplementedError("no GPU")
    return cuda


class Events(common.Prepared):
    """Arrays that are on the device already, with out=, and a cold L2 cache."""

    param_names = ("case",)
    params = (
        "LayerNorm 4096x8192 float32",
        "RMSNorm 4096x8192 float32",
        "BatchNorm NCHW 32x64x56x56 float32",
        "GroupNorm NHWC 32x56x56x64 float32",
    )

    def prepare(self, name: str) -> None:
        self.cuda = device()
        case = common.Case(name)
        x, y = self.cuda.to_device(case.x), self.cuda.to_device(np.zeros_like(case.x))
        affine = {key: self.cuda.to_device(vector) for key, vector in case.affine.items()}
        options = affine | case.mode | case.options | {"out": y}
        self.call = lambda: case.forward(x, *case.head, **options)
        try:
            self.call()
        except TypeError as error:
            raise NotImplementedError("this commit takes no CUDA arrays") from error
        case.check(y.copy_to_host())
        self.flush = self.cuda.device_array(COLD, np.uint8)
        self.zeros = self.cuda.to_device(np.zeros(COLD, np.uint8))
        self.nbytes = case.x.nbytes + y.nbytes

    def seconds(self) -> float:
        times = []
        for _ in range(25):
            self.flush.copy_to_device(self.zeros)
            begin, end = self.cuda.event(), self.cuda.event()
            begin.record()
            self.call()
            end.record()
            end.synchronize()
            times.append(self.cuda.event_elapsed_time(begin, end) / 1e3)
        return statistics.median(times)

    @common.tracked("seconds")
    def track_forward(self, name: str) -> float:
        """Median seconds between two events around a forward call."""
        return self.seconds()

    @common.tracked("GB/s", less_is_better=False)
    def track_gigabytes_per_second(self, name: str) -> float:
        """Bytes read once and written once, by those seconds. More is better; for display."""
        return self.nbytes / self.seconds() / 1e9
