"""Pieces in device memory whose parameters and statistics lie in host memory: the chunks of a dask array.

Here `normalize` does what that of `numbanorm.pieces` does for pieces in host memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..calls.dispatch import on_cuda
from ..calls.host import given_statistic
from ..core.dtypes import Format
from ..core.plan import COUNT, MEAN, RSTD, Options
from .arrays import DeviceArray, contiguous
from .calls import Call, as_input
from .libraries import read
from .memory import Span
from .recipes import FLOAT64
from .scratch import scratch_of
from .transfer import to_memory_of


def beside(value: Any, x: Any) -> Any:
    """Return an array on the device of `x`, for the call on it alone; itself if it is None or lies on a device."""
    return value if value is None or on_cuda(value) else _beside(np.asarray(value), read(x, "x"))


def _beside(array: np.ndarray, x: DeviceArray) -> DeviceArray:
    with scratch_of(x):
        return to_memory_of(x, array)


def empty(x: DeviceArray, form: Format) -> Any:
    """Return the result for an empty piece."""
    return x.library.empty(contiguous(x.shape, form.result), x).owner


def normalize(norm: str, options: Options, x: Any, mean: Any, rstd: Any, weight: Any = None, bias: Any = None) -> Any:
    """Normalize a piece in device memory with statistics in host memory, as `numbanorm.pieces.normalize` does."""
    source, _ = as_input(x, "x")
    call = Call(norm, options, source, beside(weight, source), beside(bias, source))
    layout = call.recipe.plan.layout
    stats = np.zeros((4, layout.groups))
    stats[COUNT] = layout.count
    stats[MEAN] = given_statistic(mean, "mean", layout) if layout.centred else 0.0
    stats[RSTD] = given_statistic(rstd, "rstd", layout)
    scratch = scratch_of(source)
    with scratch:
        there = to_memory_of(source, stats)
        scratch.hold(there)
        call.apply(Span(there.address, FLOAT64, stats.size), scratch)
    return call.result(False)
