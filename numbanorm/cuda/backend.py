"""The CUDA backend: the contract of `numbanorm.cpu`, on spans of device memory and on a stream.

Nothing here waits for the device: every function queues its kernels on `stream` and returns. After one call that has
compiled them, the same call may be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from ..core.plan import Plan
from . import columns, columns_backward, rows, rows_backward
from .launch import Call
from .memory import WORD, Span

__all__ = ["Span", "Workspace", "apply", "backward", "forward", "statistics"]

Workspace = Callable[[int], Span]
"""``workspace(nbytes)`` returns a buffer of at least so many bytes, aligned to 256, that belongs to the stream until
the next call of the backend on that stream. Called at most once a call."""


def forward(
    plan: Plan,
    x: Span,
    y: Span,
    weight: Span | None,
    bias: Span | None,
    stats: Span,
    eps: float,
    mask: Span | None = None,
    residual: Span | None = None,
    total: Span | None = None,
    *,
    stream: int,
    workspace: Workspace,
) -> None:
    """Normalize `x` into `y` and write its statistics.

    Parameters
    ----------
    plan : Plan
        How the arrays lie in memory.
    x, y : Span
        Input and output; they may be the same.
    weight, bias : Span or None
        Contiguous, in the lane dtype or, in rows, both in that of `y`, in the order of memory of `x`.
    stats : Span of float64, ``4 * groups`` elements
        Takes the rows COUNT, MEAN, M2 and RSTD of `numbanorm.plan`.
    eps : float
        Added to the variance.
    mask : Span of bool, optional
        Where True, the element counts.
    residual, total : Span, optional
        Rows only: a span like `x`'s, and a packed one for the sum, which is normalized in place of `x`.
    stream : int
        Handle of the stream; 0 is the legacy default stream.
    workspace : callable
        See `Workspace`.
    """
    call = _call(x, y, weight, bias, mask, residual, total)
    part = columns if plan.columns else rows
    part.forward(
        plan, call, _addresses(x, residual, total, y, mask, weight, bias, stats), float(eps), stream, workspace
    )


def statistics(
    plan: Plan, x: Span, stats: Span, mask: Span | None = None, *, stream: int, workspace: Workspace
) -> None:
    """Write the statistics of a span as `forward` does, with eps 0."""
    call = _call(x, x, None, None, mask)
    part = columns if plan.columns else rows
    part.statistics(plan, call, _addresses(x, None, None, None, mask, None, None, stats), stream, workspace)


def apply(plan: Plan, x: Span, y: Span, weight: Span | None, bias: Span | None, stats: Span, *, stream: int) -> None:
    """Normalize `x` into `y` with given statistics (the rows MEAN and RSTD are read)."""
    call = _call(x, y, weight, bias, None)
    part = columns if plan.columns else rows
    part.apply(plan, call, _addresses(x, None, None, y, None, weight, bias, stats), stream)


def backward(
    plan: Plan,
    dy: Span,
    x: Span,
    dx: Span,
    weight: Span | None,
    mean: Span | None,
    rstd: Span,
    dweight: Span,
    dbias: Span | None,
    mask: Span | None = None,
    fixed: bool = False,
    *,
    stream: int,
    workspace: Workspace,
) -> None:
    """Write dx and the gradients of weight and bias.

    Parameters
    ----------
    plan : Plan
        How the arrays lie in memory; ``plan.y`` places `dy`. Its layout is separable.
    dy, x : Span
        The output's gradient, in the dtype of `dx`, and the input.
    dx : Span
        Packed, for the input's gradient.
    weight : Span or None
        Contiguous, in the lane dtype.
    mean, rstd : Span of float64
        Of every group; `mean` is None where there is none (RMSNorm).
    dweight, dbias : Span of the lane dtype, ``plan.layout.size`` elements
        Take the gradients of weight and bias; `dbias` is None where there is no mean.
    mask : Span of bool, optional
        Where True, the element counted.
    fixed : bool, optional
        True: the statistics do not depend on `x`.
    stream, workspace
        As in `forward`.
    """
    call = _call(x, dx, weight, None, mask, dy, fixed=fixed)
    part = columns_backward if plan.columns else rows_backward
    part.backward(plan, call, _addresses(dy, x, dx, mask, weight, mean, rstd, dweight, dbias), stream, workspace)


def _addresses(*spans: Span | None) -> tuple[int, ...]:
    return tuple([0 if span is None else span.address for span in spans])


@cache  # NumPy puts the name together anew, 2 us
def _name(dtype: np.dtype[Any]) -> str:
    return dtype.name


def _call(
    x: Span,
    y: Span,
    weight: Span | None,
    bias: Span | None,
    mask: Span | None,
    residual: Span | None = None,
    total: Span | None = None,
    fixed: bool = False,
) -> Call:
    spans = (x, y, mask, weight, bias, residual, total)
    low = _LOW
    for span in spans:
        if span is not None and span.address % WORD:
            low = tuple([0 if s is None else s.address % WORD for s in spans])
            break
    # By position: names cost a microsecond.
    own = weight is not None, bias is not None, mask is not None, total is not None, False, fixed
    parameter = weight or bias
    result = _name(y.dtype)
    affine = result if parameter is not None and parameter.dtype.itemsize == y.dtype.itemsize == 2 else ""
    return Call(_name(x.dtype), result, *own, affine, low)


_LOW: tuple[int, ...] = ()
