"""Recipes: what a call on CUDA arrays does, from shapes, strides and dtypes alone; checked and worked out once."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ..calls.arrays import as_mask, as_output
from ..calls.host import public_statistic
from ..core.dtypes import format_of, is_float
from ..core.layout import Layout
from ..core.plan import MEAN, RSTD, Options, Placement, Plan, memory_order, plan
from .arrays import Strided, Strides, contiguous, ghost, strided
from .copying import Copy, copying

FLOAT64 = np.dtype(np.float64)

View = tuple[int, Strided]
"""A part of an array: how far its first element is from that of the array, in bytes, and how it lies."""


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
    total : Strided or None
        The sum of input and residual.
    sum_first : bool
        Whether it is formed before the norm, not within.
    fresh : Strided
        What the kernels write to, unless it is `out`.
    deliver : Strided or None
        Where that is not yet what the caller gets: this is, or `out`.
    y_lowest, y_size : int
        What the kernels write to, as a span.
    stats : Strided
        The statistics.
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
    total: Strided | None
    sum_first: bool
    fresh: Strided
    deliver: Strided | None
    y_lowest: int
    y_size: int
    stats: Strided
    statistics: tuple[View, ...]
    samples: tuple[tuple[int, int], int]


class Backward(NamedTuple):
    """A backward call; attributes as those of `Recipe`.

    Attributes
    ----------
    dy, mean, rstd : Reading
        How these inputs are read.
    gradient : Strided
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
    fresh: Strided
    deliver: Strided | None
    gradient: Strided
    convert: Copy | None


@lru_cache(maxsize=4096)
def forward_recipe(
    norm: str,
    options: Options,
    x: Strided,
    weight: Strided | None,
    bias: Strided | None,
    mask: Strided | None,
    residual: Strided | None,
    out: Strided | None,
    writeable: bool,
) -> Recipe:
    """Work out a forward call.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.
    """
    shape, strides, dtype = x.shape, x.strides, x.dtype
    form = format_of(dtype)
    assert form is not None
    result, lane = form.result, form.lane
    masked = None if mask is None else as_mask(ghost(mask), shape).strides
    if residual is not None:
        _check_residual(residual, x)
    y = None
    if out is not None:
        as_output(ghost(out, writeable), shape, result, {})
        y = out.strides, result.itemsize
    work = plan(norm, options, shape, (strides, dtype.itemsize), y, masked)
    total: Strided | None = None
    sum_first = False
    source = x
    if residual is not None:
        # As on the CPU: only the rows kernel adds on the fly, and only where both lie alike.
        sum_first = work.columns or work.x is None or residual.strides != strides or dtype != result
        if sum_first:
            total = contiguous(shape, result, memory_order(shape, strides, dtype.itemsize))
            source = total
            work = plan(norm, options, shape, (total.strides, result.itemsize), y, masked)
        else:
            total = _fresh(work, result)
    affine = [lies.dtype for lies in (weight, bias) if lies is not None]
    # The rows kernel reads parameters of the result's own dtype, which saves two launches in half precision.
    kind = result if not work.columns and all(dtype == result for dtype in affine) else lane
    weight_reading = None if weight is None else _parameter(weight, "weight", work.layout, kind)
    bias_reading = None if bias is None else _parameter(bias, "bias", work.layout, kind)
    direct = out is not None and work.y is not None
    fresh = _fresh(work, result)
    deliver: Strided | None = None
    if out is not None:
        deliver = None if direct else out
    elif work.reordered:
        deliver = contiguous(shape, result, memory_order(shape, source.strides, source.dtype.itemsize))
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
        stats=contiguous((4 * work.layout.groups,), FLOAT64),
        statistics=tuple(_statistic(row, work.layout) for row in ((MEAN, RSTD) if work.layout.centred else (RSTD,))),
        samples=_samples(work.layout),
    )


@lru_cache(maxsize=4096)
def backward_recipe(
    norm: str,
    options: Options,
    x: Strided,
    dy: Strided,
    weight: Strided | None,
    mean: Strided | None,
    rstd: Strided,
    mask: Strided | None,
) -> Backward:
    """Work out a backward call.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.
    """
    shape, strides, dtype = x.shape, x.strides, x.dtype
    form = format_of(dtype)
    assert form is not None
    result, lane = form.result, form.lane
    if dy.shape != shape:
        raise ValueError(f"dy: expected the shape of x, {shape}, got {dy.shape}")
    if not is_float(dy.dtype):
        raise TypeError(f"dy: expected a float dtype, got {dy.dtype}")
    masked = None if mask is None else as_mask(ghost(mask), shape).strides
    # A gradient of another dtype is converted on the way, to an array that lies as it does.
    same = dy.dtype == result
    given = dy if same else contiguous(shape, result, memory_order(shape, dy.strides, dy.dtype.itemsize))
    work = plan(
        norm,
        options,
        shape,
        (strides, dtype.itemsize),
        (given.strides, result.itemsize),
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
        dy_reading = _array(dy, work.y, work, result)
    else:
        dy_reading = Reading(result, work.size, 0, copying(given, dy))
    kind = lane if weight is None else weight.dtype
    gradient = contiguous(layout.affine_shape, kind)
    convert = None
    if kind != lane or layout.affine_order is not None:
        convert = copying(gradient, contiguous(layout.affine_shape, lane, layout.affine_order))
    deliver: Strided | None = None
    if work.reordered:
        deliver = contiguous(shape, result, memory_order(shape, strides, dtype.itemsize))
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


def _check_residual(residual: Strided, x: Strided) -> None:
    if format_of(residual.dtype) is None:
        raise TypeError(f"residual: expected the dtype of x, {x.dtype}, got {residual.dtype}")
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected the shape of x, {x.shape}, got {residual.shape}")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual: expected the dtype of x, {x.dtype}, got {residual.dtype}")


def _fresh(work: Plan, dtype: np.dtype[Any]) -> Strided:
    return contiguous(work.layout.shape, dtype, work.layout.order)


def _array(given: Strided, placement: Placement | None, work: Plan, dtype: np.dtype[Any] | None = None) -> Reading:
    """Read an array in its place, or packed: integers as the kernels compute on them, truth values as they are."""
    own = given.dtype
    if placement is not None:
        return Reading(own, placement.span, placement.start * own.itemsize)
    form = format_of(own)
    assert form is not None
    kind = dtype or form.result
    return Reading(kind, work.size, 0, copying(contiguous(given.shape, kind, work.layout.order), given))


def _mask(strides: Strides | None, work: Plan) -> Reading | None:
    if strides is None:
        return None
    kind = np.dtype(np.bool_)
    if work.mask is not None:
        return Reading(kind, work.mask.span, work.mask.start)
    shape = work.layout.shape
    packed = contiguous(shape, kind, work.layout.order)
    return Reading(kind, work.size, 0, copying(packed, strided(shape, strides, kind)))


def _parameter(given: Strided, name: str, layout: Layout, kind: np.dtype[Any]) -> Reading:
    """Read a weight or bias: flat, in a dtype that the kernels read, in the order of memory of the input."""
    shape, dtype = given.shape, given.dtype
    if shape != layout.affine_shape:
        raise ValueError(f"{name}: expected shape {layout.affine_shape}, got {shape}")
    if not is_float(dtype):
        raise TypeError(f"{name}: expected a float dtype, got {dtype}")
    return _flat(given, contiguous(shape, kind, layout.affine_order))


def _given_statistic(given: Strided, name: str, layout: Layout) -> Reading:
    """Read a statistic that the caller gave: flat, in float64, in the order of memory of the input."""
    shape, dtype = given.shape, given.dtype
    if shape != layout.stats_shape:
        raise ValueError(f"{name}: expected shape {layout.stats_shape}, got {shape}")
    if not is_float(dtype):
        raise TypeError(f"{name}: expected a float dtype, got {dtype}")
    return _flat(given, strided(shape, _stats_strides(layout), FLOAT64))


def _flat(given: Strided, packed: Strided) -> Reading:
    """Read an array flat: in its place if it lies as `packed` does, else as a copy that does."""
    size = prod(given.shape)
    axes = zip(given.shape, given.strides, packed.strides, strict=True)
    if given.dtype == packed.dtype and (size == 0 or all(n == 1 or s == p for n, s, p in axes)):
        return Reading(packed.dtype, size)
    return Reading(packed.dtype, size, 0, copying(packed, given))


def _stats_strides(layout: Layout) -> Strides:
    """Return where the statistics of `stats_shape` lie in a row of a backend's statistics, in bytes."""
    return public_statistic(ghost(strided((layout.groups,), (8,), FLOAT64)), layout).strides


def _statistic(row: int, layout: Layout) -> View:
    return 8 * row * layout.groups, strided(layout.stats_shape, _stats_strides(layout), FLOAT64)


def _samples(layout: Layout) -> tuple[tuple[int, int], int]:
    if len(layout.stats_shape) == 1:
        return (1, 0), _stats_strides(layout)[0] // 8
    if layout.norm != "instance":
        return (0, 0), 0
    by_sample, by_channel = _stats_strides(layout)
    return (layout.stats_shape[0], by_sample // 8), by_channel // 8
