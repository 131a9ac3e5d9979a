"""Gradients of the functions on dask arrays, chunk by chunk.

As forward, chunks of whole groups are differentiated by themselves. Elsewhere the two sums of every chunk (see
`numbanorm.pieces`) are added up by a tree, then the chunks of `x` and `dy` are read anew. All results are lazy;
gradients of weight and bias are sums over the chunks, added in float64. Chunks of whole groups may be CUDA arrays; the
kernels for sums of parts are the CPU's alone.
"""

from __future__ import annotations

from math import prod
from typing import Any

import dask.array as da
import numpy as np
from dask.array.utils import meta_from_array

from ..calls.arrays import as_array
from ..calls.dispatch import calls_for, cuda_module
from ..core.dtypes import Format, is_float
from ..core.plan import Options
from ..core.threads import serial
from ..stats import partials as pieces
from .chunks import Call, Statistics, after, as_input, beside, on_device, to_host


def run_backward(
    norm: str,
    options: Options,
    dy: Any,
    x: Any,
    source: Any,
    form: Format,
    mean: Any,
    rstd: Any,
    weight: Any,
    mask: Any,
    *,
    fixed: bool = False,
) -> tuple[Any, ...]:
    """Return dx, dweight and, where there is a mean, dbias, as `numbanorm.calls.run_backward` does."""
    gradient, gradient_form = as_input(dy, "dy")
    if gradient.shape != source.shape:
        raise ValueError(f"dy: expected the shape of x, {source.shape}, got {gradient.shape}")
    if not gradient_form.is_float:
        raise TypeError(f"dy: expected a float dtype, got {gradient.dtype}")
    call = Call(norm, options, source, form, weight, None, None if fixed else mask)
    kind = form.lane
    if weight is not None:
        assert call.weight is not None
        given = weight.dtype if isinstance(weight, da.Array) else as_array(weight, "weight").dtype
        kind = given if is_float(given) else kind  # a list of integers has none
        call.weight = call.weight.astype(form.lane)
    centred = call.layout.centred
    stats = Statistics(_statistic(mean, "mean", call) if centred else None, _statistic(rstd, "rstd", call))
    work = _Backward(call, gradient.rechunk(source.chunks), stats)
    if source.size == 0:
        dx = da.zeros(source.shape, dtype=form.result, chunks=source.chunks)
        sums = [da.zeros(call.layout.affine_shape)] * 2
    else:
        dx, *sums = work.by_chunk(fixed) if fixed or call.local else work.across_chunks()
    return dx, *(part.astype(kind) for part in (sums if centred else sums[:1]))


def _statistic(value: Any, name: str, call: Call) -> Any:
    array, form = as_input(value, name)
    if array.shape != call.layout.stats_shape:
        raise ValueError(f"{name}: expected shape {call.layout.stats_shape}, got {array.shape}")
    if not form.is_float:
        raise TypeError(f"{name}: expected a float dtype, got {array.dtype}")
    return array


class _Backward:
    """One checked call, the gradient of its output, and its statistics."""

    def __init__(self, call: Call, dy: Any, stats: Statistics) -> None:
        self._call, self._dy, self._stats = call, dy, stats
        self._weight = (call.weight, call.weight_axes)
        self._mask = (call.mask, call.all)

    def by_chunk(self, fixed: bool) -> tuple[Any, ...]:
        """Return dx, dweight and dbias where no group lies in several chunks, or, `fixed`, statistics are constants."""
        call = self._call
        if call.norm == "group":
            sample, channel = call.stats_axes
            groups = tuple(n // call.per_group for n in call.x.chunks[channel])
            stats = [array.rechunk((call.x.chunks[sample], groups)) for array in self._stats]
        else:
            stats = call.spread(self._stats)
        inputs = [(self._dy, call.all), *((array, call.stats_axes) for array in stats), self._weight, self._mask]
        own = {"norm": call.norm, "options": call.options, "per_group": call.per_group, "fixed": fixed}
        bundle = self._bundle(_of_whole_groups, call.x, *inputs, **own)
        return self._dx(bundle), *(self._over_chunks(bundle, i, call.weight_axes) for i in (1, 2))

    def across_chunks(self) -> tuple[Any, ...]:
        """Return dx, dweight and dbias from sums over all chunks of a group."""
        call = self._call
        _in_host_memory(call.x._meta)
        stats = [(array, call.stats_axes) for array in call.spread(self._stats)]
        along = call.weight_axes if call.by_row else None
        weight = self._weight if call.by_row else (None, None)
        own = {"axes": call.stats_axes, "channel_axis": call.options[0], "along": along}
        sums = self._bundle(_sums, call.x, (self._dy, call.all), *stats, weight, **own)
        over = call.over if call.by_row else ()
        of_groups = [self._over_chunks(sums, i, call.stats_axes, over) for i in (0, 1)]  # of channels, for group norm
        means = call.spread(tuple(self._mean(part) for part in of_groups))
        x, dy, mask = after(means, call.x, self._dy, call.mask)
        inputs = [(dy, call.all), *stats, *((array, call.stats_axes) for array in means), self._weight]
        own = {"norm": call.norm, "channel_axis": call.options[0], "along": along}
        bundle = self._bundle(_from_means, x, *inputs, (mask, call.all), **own)
        if call.by_row:
            return self._dx(bundle), *(self._over_chunks(bundle, i, call.weight_axes) for i in (1, 2))
        sample = tuple(range(of_groups[0].ndim - 1))  # the channels are last
        return self._dx(bundle), *(part.sum(axis=sample) if sample else part for part in of_groups[::-1])

    def _mean(self, sums: Any) -> Any:
        """Divide sums, in the shape of statistics (for group norm, of channels), by the elements that count."""
        call = self._call
        count: Any = call.layout.count
        if call.mask is not None:
            count = _in_order(call.mask.sum(axis=call.over, keepdims=True), call.over, call.stats_axes)
            if call.norm == "group":
                count = self._of_groups(count)
        if call.norm == "group":
            sums = self._of_groups(sums if call.weight is None else sums * call.weight.astype(np.float64))
        return da.where(count > 0, sums / da.maximum(count, 1), 0.0)

    def _of_groups(self, sums: Any) -> Any:
        groups = self._call.layout.stats_shape[1]
        sums = sums.rechunk({1: -1})
        chunks = (sums.chunks[0], (groups,))
        return sums.map_blocks(_add_channels, groups, dtype=np.float64, chunks=chunks, meta=np.empty((0, 0)))

    def _bundle(self, function: Any, x: Any, *inputs: tuple[Any, Any], **options: Any) -> Any:
        """Return an array whose chunks are tuples of arrays."""
        flat = [item for array, axes in inputs for item in (array, None if array is None else axes)]
        meta = np.empty((0,) * x.ndim, object)
        along = self._call.all
        return da.blockwise(function, along, x, along, *flat, dtype=object, meta=meta, align_arrays=False, **options)

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
        return _in_order(item.sum(axis=others, keepdims=True), others, axes) if others else _in_order(item, (), axes)


def _in_order(array: Any, lost: tuple[int, ...], axes: tuple[int, ...]) -> Any:
    """Return an array of all dimensions without those of its axes that are not among `axes`, these in their order."""
    gone = tuple(a for a in lost if a not in axes)
    kept = [a for a in range(array.ndim) if a not in gone]
    array = array.squeeze(axis=gone) if gone else array
    order = [kept.index(a) for a in axes]
    return array if order == sorted(order) else array.transpose(order)


def _item(bundle: Any, index: int) -> Any:
    return bundle[index]


def _add_channels(sums: np.ndarray, groups: int) -> np.ndarray:
    n, channels = sums.shape
    return np.asarray(sums.reshape(n, groups, channels // groups).sum(2, dtype=np.float64))


def _spread(values: Any, axes: tuple[int, ...], ndim: int) -> Any:
    """Return values along `axes`, in their order, as float64 of `ndim` dimensions."""
    ordered = values.transpose(np.argsort(axes)) if len(axes) > 1 else values
    lengths = iter(ordered.shape)
    return ordered.reshape([next(lengths) if a in axes else 1 for a in range(ndim)]).astype(np.float64)


def _zeros(shape: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
    return np.zeros([n if a in axes else 1 for a, n in enumerate(shape)])


def _of_whole_groups(
    x: Any, dy: Any, *inputs: Any, norm: str, options: Options, per_group: int, fixed: bool
) -> tuple[Any, ...]:
    """Return dx, dweight and dbias of a chunk of whole groups."""
    mean, rstd, weight, mask = inputs
    calls = calls_for(x)
    source, form = calls.as_input(x, "x")
    channel, groups, axis = options
    axes = (channel,) if axis is None else axis
    if prod(source.shape) == 0:
        dx = cuda_module("pieces").empty(source, form) if on_device(x) else np.zeros(source.shape, form.result)
        return dx, *(_zeros(source.shape, axes) for _ in range(2))
    if groups is not None:
        options = (channel, source.shape[channel] // per_group, axis)
    inputs = beside(x, mean, rstd, weight, mask)
    with serial():
        dx, *sums = calls.run_backward(norm, options, dy, x, source, form, *inputs, fixed=fixed)
    parts = [_spread(to_host(part), axes, len(source.shape)) for part in sums]
    return dx, parts[0], parts[-1]  # RMS norm has no dbias; nobody asks for it


def _in_host_memory(chunk: Any) -> None:
    """Refuse chunks of groups that lie in several, where they are CUDA arrays: only the CPU has kernels for their sums.

    Dask may know of it before it has a chunk, or not.
    """
    if on_device(chunk):
        raise TypeError(
            "x: expected chunks in host memory where groups lie in several chunks, got CUDA arrays; rechunk x and dy so"
            " that every group lies within a chunk"
        )


def _sums(
    x: Any, dy: Any, *inputs: Any, axes: tuple[int, ...], channel_axis: int, along: tuple[int, ...] | None
) -> tuple[Any, Any]:
    """Return the two sums of a chunk, with 1 for the axes that they are taken over."""
    mean, rstd, weight = inputs
    _in_host_memory(x)
    with serial():
        if along is not None:
            first, second = pieces.row_sums(dy, x, mean, rstd, weight, axis=along)
            return first, second
        first, second = pieces.channel_sums(dy, x, mean, rstd, channel_axis=channel_axis)
    return _spread(first, axes, x.ndim), _spread(second, axes, x.ndim)


def _from_means(
    x: Any, dy: Any, *inputs: Any, norm: str, channel_axis: int, along: tuple[int, ...] | None
) -> tuple[Any, ...]:
    """Return dx, and for layer and RMS norm dweight and dbias, of a chunk from the means of its groups."""
    mean, rstd, mean_g, mean_gh, weight, mask = inputs
    with serial():
        if along is not None:
            dx, *sums = pieces.row_gradient(dy, x, mean, rstd, mean_g, mean_gh, weight, axis=along, mask=mask)
            return dx, *(_spread(part, along, x.ndim) if part.size else _zeros(x.shape, along) for part in sums)
        if norm == "group" and weight is not None:
            dy = dy * weight.reshape([-1 if a == channel_axis else 1 for a in range(x.ndim)])
            weight = None
        return (
            pieces.channel_gradient(dy, x, mean, rstd, mean_g, mean_gh, weight, channel_axis=channel_axis, mask=mask),
        )
