"""What a call does, from specs and options alone: checked and worked out once for all calls that look alike.

Both backends launch from what is made here; arrays and addresses come later.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from ..backend import Backward, Forward, Reading, View
from ..core.layout import Layout
from ..core.norms import OF_CHANNELS, record_of
from ..core.plan import MEAN, RSTD, Options, Placement, Plan, memory_order, plan
from ..core.spec import ArraySpec, Strides, array_spec, contiguous, dummy
from . import check

FLOAT64 = np.dtype(np.float64)
_BOOL = np.dtype(np.bool_)


@lru_cache(maxsize=4096)
def forward(
    norm: str,
    options: Options,
    x: ArraySpec,
    weight: ArraySpec | None = None,
    bias: ArraySpec | None = None,
    mask: ArraySpec | None = None,
    residual: ArraySpec | None = None,
    out: ArraySpec | None = None,
    *,
    writeable: bool = True,
    half_weights: bool = False,
) -> Forward:
    """Work out a forward call.

    Parameters
    ----------
    norm, options
        As `numbanorm.core.plan.plan` takes them.
    x, weight, bias, mask, residual, out : ArraySpec
        The arrays.
    writeable : bool, optional
        Whether `out` may be written.
    half_weights : bool, optional
        Whether the backend's kernels of rows read weights in the result's own dtype, too.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.
    """
    record = record_of(norm)
    form = check.check_format(x.dtype, "x")
    shape, result = x.shape, form.result
    masked = None if mask is None else check.check_mask(mask, shape)
    if residual is not None:
        check.check_residual(record, residual, x)
    y = None
    if out is not None:
        check.check_output(out, shape, result, writeable)
        y = out.strides, result.itemsize
    work = plan(norm, options, shape, (x.strides, x.dtype.itemsize), y, masked)
    total: ArraySpec | None = None
    sum_first = False
    source = x
    if residual is not None:
        # Only the rows kernels add on the fly, and only where both lie alike.
        sum_first = work.columns or work.x is None or residual.strides != x.strides or x.dtype != result
        if sum_first:
            source = total = contiguous(shape, result, _order_of_sum(x, residual))
            work = plan(norm, options, shape, (total.strides, result.itemsize), y, masked)
        else:
            total = _fresh(work, result)
    layout = work.layout
    check.check_parameters(record, layout, weight, bias)
    kind = result if half_weights and not work.columns and _are(result, weight, bias) else form.lane
    direct = out is not None and work.y is not None
    deliver = _laid_as(source, work, result) if out is None else None if direct else out
    return Forward(
        record=record,
        form=form,
        plan=work,
        x=_array(source, work.x, work),
        weight=None if weight is None else _parameter(weight, layout, kind),
        bias=None if bias is None else _parameter(bias, layout, kind),
        mask=None if mask is None else _mask(mask, masked, work),
        residual=None if residual is None or sum_first else _array(residual, work.x, work),
        total=total,
        sum_first=sum_first,
        fresh=_fresh(work, result),
        deliver=deliver,
        written=out if direct and out is not None else _fresh(work, result),
        target=work.y if direct and work.y is not None else work.packed,
        stats=contiguous((4 * layout.groups,), FLOAT64),
        statistics=tuple(_statistic(row, layout) for row in ((MEAN, RSTD) if layout.centred else (RSTD,))),
        samples=_samples(layout),
    )


@lru_cache(maxsize=4096)
def backward(
    norm: str,
    options: Options,
    x: ArraySpec,
    dy: ArraySpec,
    weight: ArraySpec | None,
    mean: ArraySpec | None,
    rstd: ArraySpec,
    mask: ArraySpec | None = None,
) -> Backward:
    """Work out a backward call.

    Parameters
    ----------
    norm, options
        As `numbanorm.core.plan.plan` takes them.
    x, dy, weight, mean, rstd, mask : ArraySpec
        The arrays.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.
    """
    record = record_of(norm)
    form = check.check_format(x.dtype, "x")
    shape, result, lane = x.shape, form.result, form.lane
    check.check_gradient(dy, x)
    masked = None if mask is None else check.check_mask(mask, shape)
    # A gradient of another dtype is converted on the way, to an array that lies as it does.
    same = dy.dtype == result
    given = dy if same else contiguous(shape, result, memory_order(shape, dy.strides, dy.dtype.itemsize))
    places = (x.strides, x.dtype.itemsize), (given.strides, result.itemsize)
    work = plan(norm, options, shape, *places, masked, separable=True)
    layout = work.layout
    check.check_parameters(record, layout, weight, None)
    if record.centred:
        check.check_statistic(mean, "mean", layout)
    check.check_statistic(rstd, "rstd", layout)
    converted = Reading(dy, given, work.y)
    read_dy = _array(dy, work.y, work, result) if same or work.y is None else converted
    kind = lane if weight is None else weight.dtype
    gradient = contiguous(layout.affine_shape, kind)
    packed: ArraySpec | None = None
    if kind != lane or layout.affine_order is not None:
        packed = contiguous(layout.affine_shape, lane, layout.affine_order)
    return Backward(
        record=record,
        form=form,
        plan=work,
        x=_array(x, work.x, work),
        dy=read_dy,
        weight=None if weight is None else _parameter(weight, layout, lane),
        mean=None if mean is None or not record.centred else _given_statistic(mean, layout),
        rstd=_given_statistic(rstd, layout),
        mask=None if mask is None else _mask(mask, masked, work),
        fresh=_fresh(work, result),
        deliver=_laid_as(x, work, result),
        gradient=gradient,
        packed_gradient=packed,
    )


def _order_of_sum(x: ArraySpec, residual: ArraySpec) -> tuple[int, ...]:
    """Return the order of axes in which NumPy lays out the sum of two arrays: bits of statistics follow it."""
    few = tuple(min(n, 2) for n in x.shape)
    orders = [memory_order(spec.shape, spec.strides, spec.dtype.itemsize) for spec in (x, residual)]
    laid = [
        np.zeros([few[a] for a in order], _BOOL).transpose([order.index(a) for a in range(len(order))])
        for order in orders
    ]
    total = np.logical_or(*laid)
    return memory_order(total.shape, total.strides, total.itemsize)


def _are(dtype: np.dtype[Any], *specs: ArraySpec | None) -> bool:
    """Tell whether all arrays that there are have a dtype."""
    return all(spec.dtype == dtype for spec in specs if spec is not None)


def of_running_statistics(norm: str) -> str:
    """Return the norm whose maps serve a call with running statistics: those of each channel."""
    return OF_CHANNELS if record_of(norm).tracks else norm


def public_statistic(row: np.ndarray, layout: Layout) -> np.ndarray:
    """Return one row of a backend's statistics in the shape that users get."""
    if layout.stats_order is None:
        return row.reshape(layout.stats_shape)
    return row.reshape(layout.stats_lengths).transpose(layout.stats_order).reshape(layout.stats_shape)


def _fresh(work: Plan, dtype: np.dtype[Any]) -> ArraySpec:
    return contiguous(work.layout.shape, dtype, work.layout.order)


def _laid_as(x: ArraySpec, work: Plan, dtype: np.dtype[Any]) -> ArraySpec | None:
    """Return how a result lies that is to lie as `x` does, where what the kernels write does not."""
    if not work.reordered:
        return None
    return contiguous(x.shape, dtype, memory_order(x.shape, x.strides, x.dtype.itemsize))


def _array(given: ArraySpec, placement: Placement | None, work: Plan, dtype: np.dtype[Any] | None = None) -> Reading:
    """Read an array in its place, or packed."""
    if placement is not None:
        return Reading(given, None, placement)
    return Reading(given, _fresh(work, given.dtype if dtype is None else dtype), work.packed)


def _mask(given: ArraySpec, strides: Strides | None, work: Plan) -> Reading:
    assert strides is not None
    shape = work.layout.shape
    spread = array_spec(shape, strides, _BOOL)
    if work.mask is not None:
        return Reading(spread, None, work.mask)
    return Reading(spread, contiguous(shape, _BOOL, work.layout.order), work.packed)


def _parameter(given: ArraySpec, layout: Layout, kind: np.dtype[Any]) -> Reading:
    """Read a weight or bias: flat, in a dtype that the kernels read, in the order of memory of the input."""
    return _flat(given, contiguous(given.shape, kind, layout.affine_order))


def _given_statistic(given: ArraySpec, layout: Layout) -> Reading:
    """Read a statistic that the caller gave: flat, in float64, in the order of memory of the input."""
    return _flat(given, statistic_spec(layout))


def statistic_spec(layout: Layout) -> ArraySpec:
    """Return how a statistic lies that is flat, in float64, in the order of memory of the input."""
    return array_spec(layout.stats_shape, _stats_strides(layout), FLOAT64)


def _flat(given: ArraySpec, packed: ArraySpec) -> Reading:
    """Read an array flat: in its place if it lies as `packed` does, else as a copy that does."""
    size = prod(given.shape)
    axes = zip(given.shape, given.strides, packed.strides, strict=True)
    if given.dtype == packed.dtype and (size == 0 or all(n == 1 or s == p for n, s, p in axes)):
        return Reading(given)
    return Reading(given, packed)


def _stats_strides(layout: Layout) -> Strides:
    """Return where the statistics of `stats_shape` lie in a row of a backend's statistics, in bytes."""
    return public_statistic(dummy(array_spec((layout.groups,), (8,), FLOAT64)), layout).strides


def _statistic(row: int, layout: Layout) -> View:
    return 8 * row * layout.groups, statistic_spec(layout)


def _samples(layout: Layout) -> tuple[tuple[int, int], int]:
    """Return where the statistics of a channel lie, sample by sample, for a norm that may keep running ones."""
    if not layout.record.tracks:
        return (0, 0), 0
    if len(layout.stats_shape) == 1:
        return (1, 0), _stats_strides(layout)[0] // 8
    by_sample, by_channel = _stats_strides(layout)
    return (layout.stats_shape[0], by_sample // 8), by_channel // 8
