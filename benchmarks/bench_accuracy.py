"""Errors against float64 on easy and hard data: largest deviation over largest value, of float32 results."""

from __future__ import annotations

import numpy as np

from . import common

CASES = (
    "LayerNorm 64x4096 float32",
    "RMSNorm 64x4096 float32",
    "BatchNorm NCHW 8x32x32x32 float32",
    "BatchNorm NHWC 8x32x32x32 float32",
    "InstanceNorm NCHW 8x32x32x32 float32",
    "GroupNorm NHWC 8x32x32x32 float32",
)
DATA = ("unit", "offset 1e6", "std 1e-3")


class Forward(common.Prepared):
    """Every norm, in one of its orders of memory; the input counts as exact, so only the arithmetic is judged."""

    param_names = ("case", "data")
    params = (CASES, DATA)

    def prepare(self, name: str, data: str) -> None:
        case = common.Case(name, data)
        self.y, self.exact = case.call()(), case.exact((slice(None),))
        assert np.isfinite(self.y).all()

    @common.tracked("of the scale")
    def track_error(self, name: str, data: str) -> float:
        """Error of the output."""
        return common.error(self.y, self.exact)


class Backward(common.Prepared):
    """The same for gradients."""

    param_names = ("case", "data")
    params = (CASES, DATA)

    def prepare(self, name: str, data: str) -> None:
        case = common.Case(name, data)
        dy = np.random.default_rng(1).standard_normal(case.x.shape, dtype=np.float32)
        self.dx, *_ = case.backward_call(dy)()
        self.exact, *_ = case.exact_backward(dy)
        assert np.isfinite(self.dx).all()

    @common.tracked("of the scale")
    def track_error(self, name: str, data: str) -> float:
        """Error of the input's gradient."""
        return common.error(self.dx, self.exact)
