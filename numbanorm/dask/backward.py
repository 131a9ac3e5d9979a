"""Gradients of the functions on dask arrays, chunk by chunk.

As forward, chunks of whole groups are differentiated by themselves. Elsewhere the two sums of every chunk (see
`numbanorm.stats.partials`) are added up by a tree, then the chunks of `x` and `dy` are read anew. All results are lazy;
gradients of weight and bias are sums over the chunks, added in float64.
"""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
from dask.array.utils import meta_from_array

from ..calls import check, host, prepare
from ..core.norms import L2, record_of
from ..core.threads import serial
from ..layers.base import Kept
from ..stats import groups
from .chunks import Call, Task, after, as_dask, as_weight, beside, block_parts, empty, form_of, in_order, spec, to_host

CLAMPED = 5e-6
"""By how much a norm times its factor may be below 1 by rounding, float32 kernels' too; more, and it was clamped."""


def backward(
    norm: str,
    options: tuple[Any, Any],
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    mask: Any,
    fixed: bool,
) -> tuple[Any, ...]:
    """Return dx, dweight and, where the norm has a bias, dbias; `fixed`: the statistics do not depend on x."""
    record = record_of(norm)
    source = as_dask(x, "x")
    form = form_of(source)
    check.check_shared_weights(record, "for dask arrays", weight)
    own = check.options_of(record, source.shape, *options)
    if fixed:
        norm, mask = prepare.of_running_statistics(norm), None
    elif mask is not None:
        check.check_takes_mask(record)
        mask = as_dask(mask, "mask")
    record = record_of(norm)
    gradient = as_dask(dy, "dy")
    weight = as_weight(weight, "weight", form)
    stats = Kept(
        *(
            None if value is None or name not in record.statistics else as_dask(value, name)
            for name, value in (("mean", mean), ("rstd", rstd))
        )
    )
    arrays = map(spec, (source, gradient, weight, *stats, mask))
    checked = prepare.backward(norm, own, *arrays)
    call = Call(norm, own, source, form, None if weight is None else weight.astype(form.lane), mask=mask)
    work = _Backward(call, gradient.rechunk(source.chunks), stats)
    if source.size == 0:
        dx = da.zeros(source.shape, dtype=form.result, chunks=source.chunks)
        sums = [da.zeros(call.layout.affine_shape) for _ in record.parameters]
    else:
        dx, *sums = work.by_chunk(fixed) if fixed or call.local else work.across_chunks()
    return dx, *(part.astype(checked.gradient.dtype) for part in sums)


class _Backward:
    """One checked call, the gradient of its output, and its statistics."""

    def __init__(self, call: Call, dy: Any, stats: Kept) -> None:
        self._call, self._dy, self._stats = call, dy, stats
        self._parameters = range(1, 1 + len(call.record.parameters))
        self._weight = (call.weight, call.weight_axes)

    def by_chunk(self, fixed: bool) -> tuple[Any, ...]:
        """Return all gradients where no group lies in several chunks, or, `fixed`, statistics are constants."""
        call = self._call
        task = call.whole_groups if call.local else call.channels
        stats = [(array, call.stats_axes) for array in call.spread(self._stats, task)]
        inputs = [(self._dy, call.all), *stats, self._weight, (call.mask, call.all)]
        own = {"task": task, "axes": call.weight_axes, "result": call.form.result, "fixed": fixed}
        bundle = call.blocks(_of_whole_groups, call.x, *inputs, dtype=object, **own)
        return self._dx(bundle), *(self._over_chunks(bundle, i, call.weight_axes) for i in self._parameters)

    def across_chunks(self) -> tuple[Any, ...]:
        """Return all gradients from sums over all chunks of a group."""
        call = self._call
        task, record = call.channels, call.record
        along = record.weights_within_groups and not record.grouped
        stats = [(array, call.stats_axes) for array in call.spread(self._stats, task)]
        inputs = [(self._dy, call.all), *stats, self._weight if along else (None, None)]
        own: dict[str, Any] = {"task": task, "axes": call.stats_axes, "over": call.over}
        bundle = call.blocks(_sums, call.x, *inputs, dtype=object, **own)
        sums = [self._over_chunks(bundle, i, call.stats_axes, call.over) for i in range(3 if self._clamps else 2)]
        means = call.spread(self._means(sums), task)
        x, dy, mask = after(means, call.x, self._dy, call.mask)
        means = [(array, call.stats_axes) for array in means]
        inputs = [(dy, call.all), *stats, *means, self._weight, (mask, call.all)]
        own = {"task": task, "axes": call.weight_axes if along else None, "result": call.form.result}
        bundle = call.blocks(_from_means, x, *inputs, dtype=object, **own)
        if along:
            return self._dx(bundle), *(self._over_chunks(bundle, i, call.weight_axes) for i in self._parameters)
        others = tuple(i for i, a in enumerate(call.stats_axes) if a not in call.weight_axes)
        return self._dx(bundle), *(sums[2 - i].sum(axis=others) if others else sums[2 - i] for i in self._parameters)

    @property
    def _clamps(self) -> bool:
        return self._call.record.scale == L2

    def _means(self, sums: list[Any]) -> tuple[Any, ...]:
        """Divide sums, in the shape of statistics (of channels, for groups of these), by the elements that count."""
        call = self._call
        count: Any = call.layout.count
        if self._clamps:
            squares = call.of_groups(sums.pop(), np.sum)
            count = squares.map_blocks(_unclamped, self._stats.rstd.rechunk(squares.chunks), dtype=np.float64)
        elif call.mask is not None:
            counted = call.mask.sum(axis=call.over, keepdims=True) if call.over else call.mask.astype(np.int64)
            count = call.of_groups(in_order(counted, call.over, call.stats_axes), np.sum)
        if call.record.grouped and call.record.weights_within_groups and call.weight is not None:
            lengths = [-1 if a in call.weight_axes else 1 for a in call.stats_axes]
            sums = [part * call.weight.astype(np.float64).reshape(lengths) for part in sums]
        parts = [call.of_groups(part, np.sum) for part in sums]
        return tuple(da.where(count > 0, part / da.maximum(count, 1), 0.0) for part in parts)

    def _dx(self, bundle: Any) -> Any:
        x, dtype = self._call.x, self._call.form.result
        return bundle.map_blocks(_item, 0, dtype=dtype, chunks=x.chunks, meta=meta_from_array(x._meta, dtype=dtype))

    def _over_chunks(self, bundle: Any, index: int, axes: tuple[int, ...], over: tuple[int, ...] = ()) -> Any:
        """Return the sum over all chunks of an item, which has 1 for all axes but `axes`, and for those in `over`."""
        call = self._call
        keeps = tuple(a for a in axes if a not in over)
        chunks = tuple(
            n if a in keeps else (1,) * k for a, (n, k) in enumerate(zip(call.x.chunks, call.x.numblocks, strict=True))
        )
        item = bundle.map_blocks(_item, index, dtype=np.float64, chunks=chunks, meta=np.empty((0,) * len(chunks)))
        others = tuple(a for a in call.all if a not in keeps)
        return in_order(item.sum(axis=others, keepdims=True) if others else item, others, axes)


def _item(bundle: Any, index: int) -> Any:
    return bundle[index]


def _unclamped(squares: np.ndarray, rstd: np.ndarray) -> np.ndarray:
    """Return 1 for groups whose factor is 1 by their norm, from the squares of these, and 0 for a constant factor."""
    with np.errstate(all="ignore"):
        return np.where(np.sqrt(squares) * rstd < 1.0 - CLAMPED, 0.0, 1.0)


def _spread(values: Any, axes: tuple[int, ...], ndim: int) -> np.ndarray:
    """Return values along `axes`, in their order, as float64 of `ndim` dimensions."""
    ordered = to_host(values)
    ordered = ordered.transpose(np.argsort(axes)) if len(axes) > 1 else ordered
    lengths = iter(ordered.shape)
    return ordered.reshape([next(lengths) if a in axes else 1 for a in range(ndim)]).astype(np.float64)


def _nothing(shape: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
    return np.zeros([n if a in axes else 1 for a, n in enumerate(shape)])


def _of_whole_groups(
    x: Any, dy: Any, *inputs: Any, task: Task, axes: tuple[int, ...], result: Any, fixed: bool
) -> tuple[Any, ...]:
    """Return all gradients of a chunk of whole groups."""
    if 0 in x.shape:
        return empty(x, result), *(_nothing(x.shape, axes) for _ in task.record.parameters)
    dy, mean, rstd, weight, mask = beside(x, dy, *inputs)
    with serial():
        dx, *sums = host.backward(task.norm, task.given(x.shape), dy, x, mean, rstd, weight, mask, fixed, None)
    return dx, *(_spread(part, axes, len(x.shape)) for part in sums)


def _sums(
    x: Any, dy: Any, *inputs: Any, task: Task, axes: tuple[int, ...], over: tuple[int, ...]
) -> tuple[np.ndarray, ...]:
    """Return the two sums of a chunk, and that of squares where it is asked for, with 1 for the axes `over`."""
    if 0 in x.shape:
        return (_nothing(x.shape, tuple(a for a in axes if a not in over)),) * 3
    (dy,) = beside(x, dy)
    with serial():
        sums = groups.sums(task.norm, task.options(x.shape), dy, x, *inputs)
    spread = [_spread(part, axes, len(x.shape)) for part in sums]
    if task.record.scale != L2:
        return tuple(spread)
    parts = block_parts(x, None, axes=over)
    return *spread, parts["m2"] + parts["count"] * parts["mean"] ** 2


def _from_means(x: Any, dy: Any, *inputs: Any, task: Task, axes: Any, result: Any) -> tuple[Any, ...]:
    """Return dx of a chunk from the means of its groups, and the gradients of weights along the groups' `axes`."""
    if 0 in x.shape:
        return empty(x, result), *(_nothing(x.shape, axes or ()) for _ in task.record.parameters)
    (dy,) = beside(x, dy)
    with serial():
        dx, *sums = groups.gradient(task.norm, task.options(x.shape), dy, x, *inputs)
    return (dx,) if axes is None else (dx, *(_spread(part, axes, len(x.shape)) for part in sums))
