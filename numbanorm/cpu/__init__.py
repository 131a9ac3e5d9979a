"""The CPU backend: the contract that every backend keeps, as functions of flat arrays and a plan."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from ..plan import Plan
from . import columns, rows
from .dtypes import NARROW, kernel_view
from .jit import Kernel
from .launch import geometry
from .threads import launch_lock, usable_threads
from .welford import COUNT, M2, MEAN, RSTD

__all__ = ["COUNT", "M2", "MEAN", "RSTD", "apply", "forward", "lane_dtype", "statistics"]

PARALLEL_FROM = 1 << 17
"""Elements from which a parallel launch pays: 128 Ki float32 take about 60 us on one thread, a launch 2 to 10 us."""


def lane_dtype(dtype: np.dtype[Any]) -> type[np.floating[Any]]:
    """Return the dtype in which the kernels compute on elements of `dtype`, that of weight and bias."""
    return np.float32 if dtype.name in NARROW else np.float64


def forward(
    plan: Plan,
    x: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    eps: float,
    mask: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    total: np.ndarray | None = None,
) -> np.ndarray:
    """Normalize `x` into `y` and return its statistics.

    Parameters
    ----------
    plan : Plan
        How the arrays lie in memory.
    x, y : np.ndarray
        Flat spans of the input and the output.
    weight, bias : np.ndarray or None
        Flat, in the lane dtype.
    eps : float
        Added to the variance.
    mask : np.ndarray, optional
        Flat span of bool: where True, the element counts.
    residual, total : np.ndarray, optional
        Rows only: flat span like `x`'s, and a packed array for the sum, which is normalized in place of `x`.

    Returns
    -------
    np.ndarray
        Rows COUNT, MEAN, M2 and RSTD, a column each group, float64.
    """
    layout = plan.layout
    centred = layout.centred
    geo = geometry(plan, weight is not None or bias is not None)
    weight, bias = _affine(layout.size, lane_dtype(x.dtype), weight, bias)
    stats = np.empty((4, layout.groups))
    x, y = kernel_view(x), kernel_view(y)
    threads = _threads(plan)
    if plan.columns:
        if threads == 1 or _units(geo) >= threads:
            _run(columns.forward, threads, x, y, mask, weight, bias, stats, geo, eps, centred)
        else:
            _split_statistics(plan, geo, threads, x, mask, weight, stats, eps, centred)
            _run(columns.apply, threads, x, y, weight, bias, stats, geo)
        return stats
    sums: tuple[Any, Any] = (None, None)
    if residual is not None and total is not None:
        sums = kernel_view(residual), kernel_view(total)
    if threads == 1 or layout.groups >= threads:
        _run(rows.forward, threads, x, *sums, y, mask, weight, bias, stats, geo, eps, centred)
        return stats
    if residual is not None:
        _run(rows.add, threads, x, *sums, geo)
        x = sums[1]
        geo = geo[1:]
    _split_statistics(plan, geo, threads, x, mask, weight, stats, eps, centred)
    _run(rows.apply, threads, x, y, weight, bias, stats, geo)
    return stats


def statistics(plan: Plan, x: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Return the statistics of a flat span as `forward` does, with eps 0."""
    geo = geometry(plan, False)
    weight, _ = _affine(1, lane_dtype(x.dtype), None, None)
    stats = np.empty((4, plan.layout.groups))
    _split_statistics(plan, geo, _threads(plan), kernel_view(x), mask, weight, stats, 0.0, plan.layout.centred)
    return stats


def apply(
    plan: Plan,
    x: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    stats: np.ndarray,
) -> None:
    """Normalize `x` into `y` with given statistics."""
    geo = geometry(plan, weight is not None or bias is not None)
    weight, bias = _affine(plan.layout.size, lane_dtype(x.dtype), weight, bias)
    kernel = columns.apply if plan.columns else rows.apply
    _run(kernel, _threads(plan), kernel_view(x), kernel_view(y), weight, bias, stats, geo)


def _split_statistics(
    plan: Plan,
    geo: np.ndarray,
    threads: int,
    x: np.ndarray,
    mask: np.ndarray | None,
    weight: np.ndarray,
    stats: np.ndarray,
    eps: float,
    centred: bool,
) -> None:
    """Take statistics chunk by chunk, in parallel, and merge the chunks in order."""
    chunks = int(geo[0]["chunks"])
    if plan.columns:
        table = np.empty((_units(geo), chunks, 3, int(geo[0]["tile"])))
        _run(columns.moments, threads, x, mask, weight, table, geo, centred)
        _run(columns.merge_chunks, 1, table, stats, geo, eps)
    else:
        table = np.empty((plan.layout.groups, chunks, 3))
        _run(rows.moments, threads, x, mask, table, geo, centred)
        _run(rows.merge_chunks, 1, table, stats, geo, eps)


def _run(kernel: Kernel, threads: int, *arguments: Any) -> None:
    if threads == 1:
        kernel.serial(*arguments)
    else:
        with launch_lock():
            kernel.parallel(*arguments)


def _threads(plan: Plan) -> int:
    return usable_threads() if plan.size >= PARALLEL_FROM else 1


def _affine(
    size: int, dtype: type[Any], weight: np.ndarray | None, bias: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Put ones and zeros in the place of an absent weight and bias; one of each where both are absent."""
    if weight is None and bias is None:
        size = 1
    return _constant(size, dtype, 1) if weight is None else weight, _constant(size, dtype, 0) if bias is None else bias


@lru_cache(maxsize=64)
def _constant(size: int, dtype: Any, value: int) -> np.ndarray:
    return np.full(size, value, dtype)


def _units(geo: np.ndarray) -> int:
    """Return the tiles of the columns kernel."""
    g = geo[0]
    return int(g["K0"]) * -(-int(g["lanes"]) // int(g["tile"]))
