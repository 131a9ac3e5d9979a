"""Backward: gradients of the input, the weight and the bias in one call."""

from __future__ import annotations

import numpy as np

from . import common


class Seconds(common.Timed):
    """After a forward call that left mean and rstd."""

    param_names = ("case",)
    params = (
        "LayerNorm 128x768 float32",
        "LayerNorm 4096x1024 float32",
        "LayerNorm 4096x1024 bfloat16",
        "LayerNorm 4096x1024 float64",
        "RMSNorm 4096x1024 float32",
        "BatchNorm NCHW 16x64x56x56 float32",
        "BatchNorm NHWC 16x56x56x64 float32",
        "InstanceNorm NCHW 16x64x56x56 float32",
        "InstanceNorm NHWC 16x56x56x64 float32",
        "GroupNorm NCHW 16x64x56x56 float32",
        "GroupNorm NHWC 16x56x56x64 float32",
    )

    def prepare(self, name: str) -> None:
        case = common.Case(name)
        dy = np.random.default_rng(1).standard_normal(case.x.shape, dtype=np.float32).astype(case.dtype, copy=False)
        self.call, self.read = case.backward_call(dy), case.x
        case.check_backward(self.call(), dy)

    def time_backward(self, name: str) -> None:
        """Seconds of a backward call with fresh outputs."""
        self.run()
