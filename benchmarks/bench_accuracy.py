"""Errors against float64 on easy and hard data: largest deviation over largest value, of float32 results."""

from __future__ import annotations

import numpy as np

from . import common


class Error(common.Prepared):
    """Every norm, in one of its orders of memory; the input counts as exact, so only the arithmetic is judged."""

    param_names = ("case", "data")
    params = (
        (
            "LayerNorm 64x4096 float32",
            "RMSNorm 64x4096 float32",
            "BatchNorm NCHW 8x32x32x32 float32",
            "BatchNorm NHWC 8x32x32x32 float32",
            "InstanceNorm NCHW 8x32x32x32 float32",
            "GroupNorm NHWC 8x32x32x32 float32",
        ),
        ("unit", "offset 1e6", "std 1e-3"),
    )

    def prepare(self, name: str, data: str) -> None:
        self.case = common.Case(name, data)

    @common.tracked("of the scale")
    def track_forward(self, name: str, data: str) -> float:
        """Error of the output."""
        y = self.case.call()()
        assert np.isfinite(y).all()
        return common.error(y, self.case.exact((slice(None),)))

    @common.tracked("of the scale")
    def track_backward(self, name: str, data: str) -> float:
        """Error of the input's gradient."""
        dy = np.random.default_rng(1).standard_normal(self.case.x.shape, dtype=np.float32)
        dx, *_ = self.case.backward_call(dy)()
        assert np.isfinite(dx).all()
        return common.error(dx, self.case.exact_backward(dy)[0])
