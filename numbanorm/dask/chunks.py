"""Dask arrays cut into chunks as a norm asks for: what calls on dask arrays share, and what runs on a chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.array.utils import meta_from_array
from dask.base import tokenize
from dask.graph_manipulation import bind

from ..calls import check
from ..calls.arrays import as_array, as_parameter
from ..calls.dispatch import Request, handler_of
from ..calls.host import serve
from ..core.dtypes import Format, native
from ..core.layout import Layout
from ..core.norms import CHANNEL, GROUP, NormRecord, record_of, register_norm
from ..core.plan import Options
from ..core.spec import contiguous
from ..core.threads import serial
from ..layers.base import Kept
from ..stats import partials
from ..stats.groups import Maps
from ..stats.moments import parts_of, two_sum

PARTS = np.dtype([(name, np.float64) for name in ("count", "mean", "m2", "low")])
"""What is known of the elements that share a mean, within a chunk or merged; their mean is `mean` + `low`."""


def as_dask(value: Any, name: str) -> Any:
    """Return `value` as a dask array.

    Raises
    ------
    TypeError
        If it is nothing that NumPy can convert.
    ValueError
        If its chunk sizes are unknown.
    """
    array = value if isinstance(value, da.Array) else da.from_array(as_array(value, name))
    if any(np.isnan(n) for n in array.shape):
        raise ValueError(
            f"{name}: expected known chunk sizes, got shape {array.shape}; call .compute_chunk_sizes() first"
        )
    return array


def as_weight(value: Any, name: str, form: Format) -> Any:
    """Return a weight or bias beside an input of such a dtype as a dask array; None for None."""
    if value is None or isinstance(value, da.Array):
        return value
    return as_dask(as_parameter(value, name, form.lane), name)


def form_of(x: Any) -> Format:
    """Return what is to be known of the dtype of an input."""
    return check.check_format(native(x.dtype), "x")


def spec(array: Any) -> Any:
    """Return how a dask array would lie in memory, for the checks of calls; None for None."""
    return None if array is None else contiguous(array.shape, native(array.dtype))


def spread_mask(mask: Any, x: Any) -> Any:
    """Return a mask broadcast to the shape of `x`, chunked as `x` is."""
    lead = x.ndim - mask.ndim
    chunks = tuple(c if n > 1 else (n,) for n, c in zip(mask.shape, x.chunks[lead:], strict=True))
    return da.broadcast_to(mask.rechunk(chunks), x.shape, chunks=x.chunks)


class Task(NamedTuple):
    """What a task is told of the norm: all of it, as another process may never have heard of a registered one.

    Attributes
    ----------
    record : NormRecord
        The norm.
    channel_axis, axis
        As `numbanorm.core.plan.Options` has them.
    per_group : int
        Channels of a group; 1 where chunks cut groups, and channels have statistics of their own.
    """

    record: NormRecord
    channel_axis: int
    axis: tuple[int, ...] | None
    per_group: int

    @property
    def norm(self) -> str:
        """The norm's name, which is in the table from now on."""
        return register_norm(self.record).kind

    def options(self, shape: tuple[int, ...]) -> Options:
        """Return the norm's options for a chunk."""
        groups = shape[self.channel_axis] // self.per_group if self.record.grouped else None
        return self.channel_axis, groups, self.axis

    def given(self, shape: tuple[int, ...]) -> tuple[Any, Any]:
        """Return the same as `Request` has them."""
        channel_axis, groups, axis = self.options(shape)
        return (channel_axis, groups) if axis is None else (tuple(shape[a] for a in axis), axis)


class Call:
    """One checked call: its dask arrays, parameters and mask chunked as `x` is.

    Parameters
    ----------
    norm, options
        As `numbanorm.core.plan.plan` takes them.
    x, form : dask.array.Array, Format
        The input.
    weight, bias, mask : dask.array.Array or None
        As the functions take them.

    Attributes
    ----------
    all, stats_axes, weight_axes, over : tuple of int
        All axes of `x`, those of a statistic, those of a weight, and those that moments of a chunk are taken over.
    whole_groups, channels : Task
        For chunks of whole groups, and for those that cut groups, of channels if there are groups of these.
    """

    def __init__(
        self, norm: str, options: Options, x: Any, form: Format, weight: Any, bias: Any = None, mask: Any = None
    ) -> None:
        record = record_of(norm)
        channel_axis, groups, axis = options
        if record.grouped and record.reduced & {GROUP, CHANNEL} != {CHANNEL}:
            raise TypeError(f"x: expected an array in memory for {record.title}, whose means are not those of groups")
        self.record, self.x, self.form = record, x, form
        self.layout = Layout.of(norm, x.shape, channel_axis=channel_axis, num_groups=groups, axis=axis)
        self.all = tuple(range(x.ndim))
        maps = Maps(norm, options, x.ndim)
        self.over, self.stats_axes, self.weight_axes = maps.over, maps.stats_axes, maps.weight_axes
        self.channels = Task(record, maps.channel, axis, 1)
        per_group = max(x.shape[maps.channel] // groups, 1) if groups else 1
        self.whole_groups = self.channels._replace(per_group=per_group)
        chunks = tuple(x.chunks[a] for a in self.weight_axes)
        self.weight, self.bias = (None if array is None else array.rechunk(chunks) for array in (weight, bias))
        self.mask = None if mask is None else spread_mask(mask, x)

    @property
    def local(self) -> bool:
        """Whether every group lies within a chunk, or there are no elements."""
        if self.x.size == 0:
            return True
        channel, per_group = self.channels.channel_axis, self.whole_groups.per_group
        if self.record.grouped and any(n % per_group for n in self.x.chunks[channel]):
            return False
        return all(self.x.numblocks[a] == 1 for a in self.over)

    def whole(self, eps: float) -> Any:
        """Normalize chunk by chunk, each with its own statistics."""
        inputs = ((self.weight, self.weight_axes), (self.bias, self.weight_axes), (self.mask, self.all))
        own = {"task": self.whole_groups, "eps": eps, "result": self.form.result}
        return self.blocks(_whole, self.x, *inputs, dtype=self.form.result, **own)

    def parts(self) -> Any:
        """Return count, mean and M2 of every group, in the shape in which users get statistics."""
        return self.of_groups(in_order(merged(self.x, self.over, self.mask), self.over, self.stats_axes), merge)

    def of_groups(self, array: Any, function: Callable[..., Any]) -> Any:
        """Return what a function of arrays and an axis makes of what is known of channels, for groups of these."""
        if not self.record.grouped:
            return array
        at = self.stats_axes.index(self.channels.channel_axis)
        groups = self.layout.stats_shape[at]
        array = array.rechunk({at: -1})
        chunks = (*array.chunks[:at], (groups,), *array.chunks[at + 1 :])
        own = {"dtype": array.dtype, "chunks": chunks, "meta": np.empty((0,) * array.ndim, array.dtype)}
        return array.map_blocks(_of_groups, function, at, groups, **own)

    def statistics(self, parts: Any, eps: float) -> Kept:
        """Return mean and rstd of merged parts."""
        own = {"dtype": np.float64, "meta": np.empty((0,) * parts.ndim)}
        mean = parts.map_blocks(_mean, **own) if self.record.centred else None
        return Kept(mean, parts.map_blocks(_rstd, self.record, eps, **own))

    def apply(self, stats: Kept, *, bound: bool) -> Any:
        """Normalize with given statistics; `bound`: read the chunks anew once all else is there."""
        inputs = [(array, self.stats_axes) for array in self.spread(stats, self.channels)]
        inputs += [(self.weight, self.weight_axes), (self.bias, self.weight_axes)]
        x = after([array for array, _ in inputs], self.x)[0] if bound else self.x
        result = self.form.result
        return self.blocks(_apply, x, *inputs, dtype=result, task=self.channels, result=result)

    def spread(self, statistics: tuple[Any, ...], task: Task) -> list[Any]:
        """Return statistics chunked as `x` is; those of groups, once for each channel where tasks take channels."""
        chunks = dict(enumerate(self.x.chunks))
        spread = []
        for array in statistics:
            if array is not None and self.record.grouped:
                channel, per_group = task.channel_axis, self.whole_groups.per_group
                at = self.stats_axes.index(channel)
                chunks[channel] = tuple(n // task.per_group for n in self.x.chunks[channel])
                array = da.repeat(array, per_group, axis=at) if task.per_group < per_group else array
            if array is not None:
                lengths = zip(self.stats_axes, array.shape, strict=True)
                array = array.rechunk(tuple(chunks[a] if n > 1 else (n,) for a, n in lengths))
            spread.append(array)
        return spread

    def blocks(self, function: Callable[..., Any], x: Any, *inputs: tuple[Any, Any], dtype: Any, **options: Any) -> Any:
        """Apply a function to every chunk of `x` and what belongs to it of other arrays, given with their axes."""
        flat = [item for array, axes in inputs for item in (array, None if array is None else axes)]
        meta = np.empty((0,) * x.ndim, object) if dtype is object else meta_from_array(x._meta, x.ndim, dtype=dtype)
        own = {"dtype": dtype, "meta": meta, "align_arrays": False}
        return da.blockwise(function, self.all, x, self.all, *flat, **own, **options)


def after(parents: list[Any], *again: Any) -> tuple[Any, ...]:
    """Return arrays (or None) under other names, their sources read only once all parents are computed."""
    needed = [parent for parent in parents if parent is not None]
    return tuple(bind(list(again), needed, seed=tokenize(again, needed)))


def in_order(array: Any, lost: tuple[int, ...], axes: tuple[int, ...]) -> Any:
    """Return an array of all dimensions without those of its axes that are not among `axes`, these in their order."""
    gone = tuple(a for a in lost if a not in axes)
    kept = [a for a in range(array.ndim) if a not in gone]
    array = array.squeeze(axis=gone) if gone else array
    order = [kept.index(a) for a in axes]
    return array if order == sorted(order) else array.transpose(order)


def merged(x: Any, axes: tuple[int, ...], mask: Any) -> Any:
    """Return the parts of `x` along some axes, with 1 for these: those of every chunk, merged by a tree."""
    indices = tuple(range(x.ndim))
    own = {"dtype": PARTS, "meta": np.empty((0,) * x.ndim, PARTS)}
    parts = da.blockwise(
        block_parts,
        indices,
        x,
        indices,
        *((None, None) if mask is None else (mask, indices)),
        axes=axes,
        adjust_chunks=dict.fromkeys(axes, 1),
        align_arrays=False,
        **own,
    )
    return da.reduction(parts, merge, merge, axis=axes, keepdims=True, **own) if axes else parts


def beside(block: Any, *inputs: Any) -> tuple[Any, ...]:
    """Return inputs of a chunk's call where the chunk lies: if that is a device, copies of those in host memory."""
    handler = handler_of(block)
    return inputs if handler is None else tuple(handler.beside(array, block) for array in inputs)


def to_host(array: Any) -> np.ndarray:
    """Return an array in host memory: a copy of one on a device."""
    handler = handler_of(array)
    found: np.ndarray = as_array(array, "x") if handler is None else handler.placed(array, "cpu")
    return found


def empty(block: Any, dtype: Any) -> Any:
    """Return the result for a chunk without elements."""
    handler = handler_of(block)
    return np.empty(block.shape, dtype) if handler is None else handler.empty(block)


def block_parts(block: Any, mask: Any, *, axes: tuple[int, ...]) -> np.ndarray:
    """Return the parts of one chunk, with 1 for the axes."""
    kept = tuple(1 if a in axes else n for a, n in enumerate(block.shape))
    parts = np.zeros(kept, PARTS)
    if not axes:
        parts["count"] = 1 if mask is None else mask
        parts["mean"] = np.where(parts["count"] > 0, to_host(block), 0)
    elif 0 not in block.shape:
        with serial():
            found = parts_of(block, axes, *beside(block, mask))
        for name, values in zip(PARTS.names or (), found, strict=True):
            parts[name] = values if values.ndim == 0 else values.reshape(kept)
    return parts


def merge(parts: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
    """Merge parts along axes by Chan's formula, around the mean of the part that counts most."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    kept = [n for a, n in enumerate(parts.shape) if a not in axes]
    merged = np.zeros(kept, PARTS)
    if parts.size:
        rows = np.moveaxis(parts, axes, range(-len(axes), 0)).reshape(*kept, -1)
        count, total = rows["count"], rows["count"].sum(-1)
        share = count / np.maximum(total, 1)[..., None]
        pivot = np.take_along_axis(rows, count.argmax(-1)[..., None], -1)
        with np.errstate(all="ignore"):  # Inf and NaN among the elements
            delta = np.where(count > 0, (rows["mean"] - pivot["mean"]) + (rows["low"] - pivot["low"]), 0)
            shift = (share * delta).sum(-1)
            merged["count"] = total
            merged["mean"], low = two_sum(pivot["mean"][..., 0], pivot["low"][..., 0] + shift)
            merged["low"] = np.where(np.isfinite(low), low, 0)
            merged["m2"] = (rows["m2"] + count * (delta - shift[..., None]) ** 2).sum(-1)
    return np.expand_dims(merged, axes) if keepdims else merged


def _of_groups(array: np.ndarray, function: Callable[..., Any], at: int, groups: int) -> np.ndarray:
    """Cut an axis of channels into groups, and have a function take each as one."""
    channels = array.shape[at] // groups if groups else 0
    split = array.reshape(*array.shape[:at], groups, channels, *array.shape[at + 1 :])
    return np.asarray(function(split, axis=at + 1, keepdims=False))


def _mean(parts: np.ndarray) -> np.ndarray:
    return np.array(parts["mean"])


def _rstd(parts: np.ndarray, record: NormRecord, eps: float) -> np.ndarray:
    with np.errstate(all="ignore"):
        square = parts["m2"] / np.maximum(parts["count"], 1)
        if not record.centred:
            square = square + parts["mean"] ** 2
    return np.asarray(record.rstd(square, parts["count"], eps))


def _whole(block: Any, weight: Any, bias: Any, mask: Any, *, task: Task, eps: float, result: Any) -> Any:
    """Normalize a chunk of whole groups."""
    if 0 in block.shape:
        return empty(block, result)
    weight, bias, mask = beside(block, weight, bias, mask)
    with serial():
        return serve(Request(task.norm, task.given(block.shape), block, weight, bias, eps, mask)).y


def _apply(block: Any, *inputs: Any, task: Task, result: Any) -> Any:
    """Normalize a chunk with the statistics of its groups."""
    if 0 in block.shape:
        return empty(block, result)
    with serial():
        return partials.normalize(task.norm, task.options(block.shape), block, *inputs)
