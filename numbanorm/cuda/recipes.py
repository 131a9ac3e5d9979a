"""Recipes: what a call on CUDA arrays does, from shapes, strides and dtypes alone; checked and worked out once."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ..arrays import as_mask, as_output
from ..calls import public_statistic
from ..dtypes import format_of, is_float
from ..layout import Layout
from ..plan import MEAN, RSTD, Options, Placement, Plan, memory_order, plan
from .arrays import Strides, contiguous, ghost
from .copying import Copy, copying

FLOAT64 = np.dtype(np.float64)

Key = tuple[tuple[int, ...], Strides, np.dtype[Any]]
"""Shape, strides in bytes and dtype of an array."""

New = tuple[tuple[int, ...], Strides, np.dtype[Any]]
"""Shape, strides in bytes and dtype of an array to be made."""

View = tuple[int, tuple[int, ...], Strides]
"""Offset in bytes, shape and strides in bytes of a part of an array."""


class Reading(NamedTuple):
    """How an array becomes a span: by its address, or by a copy.

    Attributes
    ----------
    dtype, size
        Of the span.
    lowest : int
        Bytes between the lowest address of the array and its first element.
    copy : Copy or None
        The copy to be made first, to an array without gaps.
    """

    dtype: np.dtype[Any]
    size: int
    lowest: int = 0
    copy: Copy | None = None


class Recipe(NamedTuple):
    """A forward call.

    Attributes
    ----------
    plan : Plan
        Of what is normalized.
    x, weight, bias, mask : Reading
        How the inputs are read; where there is a residual, what is normalized is read as `x`.
    total : New or None
        The sum of input and residual.
    sum_first : bool
        Whether it is formed before the norm, not within.
    fresh : New
        What the kernels write to, unless it is `out`.
    deliver : New or None
        Where that is not yet what the caller gets: this is, or `out`.
    y_lowest, y_size : int
        What the kernels write to, as a span.
    statistics : tuple of View
        (mean,) rstd, in the statistics.
    samples : tuple
        ``(samples, groups from one to the next), groups from one channel to the next``, for running statistics.
    """

    plan: Plan
    x: Reading
    weight: Reading | None
    bias: Reading | None
    mask: Reading | None
    total: New | None
    sum_first: bool
    fresh: New
    deliver: New | None
    y_lowest: int
    y_size: int
    statistics: tuple[View, ...]
    samples: tuple[tuple[int, int], int]


class Backward(NamedTuple):
    """A backward call; attributes as those of `Recipe`.

    Attributes
    ----------
    dy, mean, rstd : Reading
        How these inputs are read.
    gradient : New
        dweight and dbias, as the caller gets them.
    convert : Copy or None
        How they come out of the kernels' spans.
    """

    plan: Plan
    x: Reading
    dy: Reading
    weight: Reading | None
    mean: Reading | None
    rstd: Reading
    mask: Reading | None
    fresh: New
    deliver: New | None
    gradient: New
    convert: Copy | None


@lru_cache(maxsize=4096)
def forward_recipe(
    norm: str,
    options: Options,
    x: Key,
    weight: Key | None,
    bias: Key | None,
    mask: Key | None,
    residual: Key | None,
    out: tuple[tuple[int, ...], Strides, np.dtype[Any], bool] | None,
) -> Recipe:
    """Work out a forward call.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.
    """
    shape, strides, dtype = x
    form = format_of(dtype)
    assert form is not None
    result, lane = form.result, form.lane
    masked = None if mask is None else as_mask(ghost(*mask), shape).strides
    if residual is not None:
        _check_residual(residual, x)
    y = None
    if out is not None:
        as_output(ghost(*out), shape, result, {})
        y = out[1], result.itemsize
    work = plan(norm, options, shape, (strides, dtype.itemsize), y, masked)
    weight_reading = None if weight is None else _parameter(weight, "weight", work.layout, lane)
    bias_reading = None if bias is None else _parameter(bias, "bias", work.layout, lane)
    total: New | None = None
    sum_first = False
    source = x
    if residual is not None:
        # As on the CPU: only the rows kernel adds on the fly, and only where both lie alike.
        sum_first = work.columns or work.x is None or residual[1] != strides or dtype != result
        if sum_first:
            total = shape, contiguous(shape, result, memory_order(shape, strides, dtype.itemsize)), result
            source = total
            work = plan(norm, options, shape, (total[1], result.itemsize), y, masked)
        else:
            total = _fresh(work, result)
    direct = out is not None and work.y is not None
    fresh = _fresh(work, result)
    deliver: New | None = None
    if out is not None:
        deliver = None if direct else (shape, out[1], result)
    elif work.reordered:
        deliver = shape, contiguous(shape, result, memory_order(shape, source[1], source[2].itemsize)), result
    target = work.y if direct and work.y is not None else work.packed
    return Recipe(
        plan=work,
        x=_array(source, work.x, work),
        weight=weight_reading,
        bias=bias_reading,
        mask=_mask(masked, work),
        total=total,
        sum_first=sum_first,
        fresh=fresh,
        deliver=deliver,
        y_lowest=target.start * result.itemsize,
        y_size=target.span,
        statistics=tuple(_statistic(row, work.layout) for row in ((MEAN, RSTD) if work.layout.centred else (RSTD,))),
        samples=_samples(work.layout),
    )


@lru_cache(maxsize=4096)
def backward_recipe(
    norm: str,
    options: Options,
    x: Key,
    dy: Key,
    weight: Key | None,
    mean: Key | None,
    rstd: Key,
    mask: Key | None,
) -> Backward:
    """Work out a backward call.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.
    """
    shape, strides, dtype = x
    form = format_of(dtype)
    assert form is not None
    result, lane = form.result, form.lane
    if dy[0] != shape:
        raise ValueError(f"dy: expected the shape of x, {shape}, got {dy[0]}")
    if not is_float(dy[2]):
        raise TypeError(f"dy: expected a float dtype, got {dy[2]}")
    masked = None if mask is None else as_mask(ghost(*mask), shape).strides
    # A gradient of another dtype is converted on the way, to an array that lies as it does.
    same = dy[2] == result
    order = memory_order(shape, dy[1], dy[2].itemsize)
    steps = dy[1] if same else contiguous(shape, result, order)
    work = plan(
        norm,
        options,
        shape,
        (strides, dtype.itemsize),
        (steps, result.itemsize),
        masked,
        separable=True,
    )
    layout = work.layout
    weight_reading = None if weight is None else _parameter(weight, "weight", layout, lane)
    rstd_reading = _given_statistic(rstd, "rstd", layout)
    mean_reading = None
    if layout.centred:
        if mean is None:
            raise TypeError("mean: expected an array, got None")
        mean_reading = _given_statistic(mean, "mean", layout)
    if same or work.y is None:
        dy_reading = _array((shape, dy[1], dy[2]), work.y, work, result)
    else:
        converted = copying(shape, (steps, result), (dy[1], dy[2]))
        dy_reading = Reading(result, work.size, 0, converted)
    kind = lane if weight is None else weight[2]
    gradient = layout.affine_shape, contiguous(layout.affine_shape, kind), kind
    convert = None
    if kind != lane or layout.affine_order is not None:
        order = layout.affine_order or tuple(range(len(layout.affine_shape)))
        in_memory = contiguous(layout.affine_shape, lane, order)
        convert = copying(layout.affine_shape, gradient[1:], (in_memory, lane))
    deliver: New | None = None
    if work.reordered:
        deliver = shape, contiguous(shape, result, memory_order(shape, strides, dtype.itemsize)), result
    return Backward(
        plan=work,
        x=_array(x, work.x, work),
        dy=dy_reading,
        weight=weight_reading,
        mean=mean_reading,
        rstd=rstd_reading,
        mask=_mask(masked, work),
        fresh=_fresh(work, result),
        deliver=deliver,
        gradient=gradient,
        convert=convert,
    )


def _check_residual(residual: Key, x: Key) -> None:
    if format_of(residual[2]) is None:
        raise TypeError(f"residual: expected the dtype of x, {x[2]}, got {residual[2]}")
    if residual[0] != x[0]:
        raise ValueError(f"residual: expected the shape of x, {x[0]}, got {residual[0]}")
    if residual[2] != x[2]:
        raise TypeError(f"residual: expected the dtype of x, {x[2]}, got {residual[2]}")


def _fresh(work: Plan, dtype: np.dtype[Any]) -> New:
    shape = work.layout.shape
    return shape, contiguous(shape, dtype, work.layout.order), dtype


def _array(key: Key, placement: Placement | None, work: Plan, dtype: np.dtype[Any] | None = None) -> Reading:
    """Read an array in its place, or packed: integers as the kernels compute on them, truth values as they are."""
    shape, strides, own = key
    if placement is not None:
        return Reading(own, placement.span, placement.start * own.itemsize)
    form = format_of(own)
    assert form is not None
    kind = dtype or form.result
    packed = contiguous(shape, kind, work.layout.order)
    return Reading(kind, work.size, 0, copying(shape, (packed, kind), (strides, own)))


def _mask(strides: Strides | None, work: Plan) -> Reading | None:
    if strides is None:
        return None
    kind = np.dtype(np.bool_)
    if work.mask is not None:
        return Reading(kind, work.mask.span, work.mask.start)
    shape = work.layout.shape
    return Reading(
        kind, work.size, 0, copying(shape, (contiguous(shape, kind, work.layout.order), kind), (strides, kind))
    )


def _parameter(key: Key, name: str, layout: Layout, lane: np.dtype[Any]) -> Reading:
    """Read a weight or bias: flat, in the lane dtype, in the order of memory of the input."""
    shape, _, dtype = key
    if shape != layout.affine_shape:
        raise ValueError(f"{name}: expected shape {layout.affine_shape}, got {shape}")
    if not is_float(dtype):
        raise TypeError(f"{name}: expected a float dtype, got {dtype}")
    return _flat(key, contiguous(shape, lane, layout.affine_order), lane)


def _given_statistic(key: Key, name: str, layout: Layout) -> Reading:
    """Read a statistic that the caller gave: flat, in float64, in the order of memory of the input."""
    shape, _, dtype = key
    if shape != layout.stats_shape:
        raise ValueError(f"{name}: expected shape {layout.stats_shape}, got {shape}")
    if not is_float(dtype):
        raise TypeError(f"{name}: expected a float dtype, got {dtype}")
    return _flat(key, _stats_strides(layout), FLOAT64)


def _flat(key: Key, packed: Strides, dtype: np.dtype[Any]) -> Reading:
    """Read an array flat: in its place if it lies as `packed` says, else as a copy that does."""
    shape, strides, own = key
    size = prod(shape)
    lies_so = all(n <= 1 or s == p for n, s, p in zip(shape, strides, packed, strict=True))
    if own == dtype and (lies_so or size == 0):
        return Reading(dtype, size)
    return Reading(dtype, size, 0, copying(shape, (packed, dtype), (strides, own)))


def _stats_strides(layout: Layout) -> Strides:
    """Return where the statistics of `stats_shape` lie in a row of a backend's statistics, in bytes."""
    return public_statistic(ghost((layout.groups,), (8,), FLOAT64), layout).strides


def _statistic(row: int, layout: Layout) -> View:
    return 8 * row * layout.groups, layout.stats_shape, _stats_strides(layout)


def _samples(layout: Layout) -> tuple[tuple[int, int], int]:
    if len(layout.stats_shape) == 1:
        return (1, 0), _stats_strides(layout)[0] // 8
    if layout.norm != "instance":
        return (0, 0), 0
    by_sample, by_channel = _stats_strides(layout)
    return (layout.stats_shape[0], by_sample // 8), by_channel // 8
