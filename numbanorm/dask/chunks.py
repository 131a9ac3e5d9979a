"""Dask arrays cut into chunks as a norm asks for: what the functions on dask arrays share, and what runs on a chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.array.utils import meta_from_array
from dask.base import tokenize
from dask.graph_manipulation import bind

from ..calls import arrays
from ..calls.dispatch import calls_for, cuda_module, uses_cuda
from ..core.dtypes import Format, format_of, is_float
from ..core.layout import Layout
from ..core.plan import Options
from ..core.threads import serial
from ..stats import partials as pieces
from ..stats.moments import _precise, _two_sum

PARTS = np.dtype([(name, np.float64) for name in ("count", "mean", "m2", "low")])
"""What is known of the elements that share a mean, within a chunk or merged; their mean is `mean` + `low`."""


def as_input(value: Any, name: str) -> tuple[Any, Format]:
    """Return `value` as a dask array, and what is to be known of its dtype.

    Raises
    ------
    TypeError
        If its dtype is none that the kernels compute on.
    ValueError
        If its chunk sizes are unknown.
    """
    array = _as_dask(value, name)
    if any(np.isnan(n) for n in array.shape):
        raise ValueError(
            f"{name}: expected known chunk sizes, got shape {array.shape}; call .compute_chunk_sizes() first"
        )
    form = format_of(array.dtype.newbyteorder("="))
    if form is None:
        arrays.as_input(np.empty(0, array.dtype), name)  # raises what an array in memory would
        raise TypeError(f"{name}: got {array.dtype}")
    return array, form


def _as_dask(value: Any, name: str) -> Any:
    return value if isinstance(value, da.Array) else da.from_array(arrays.as_array(value, name))


class Statistics(NamedTuple):
    """Dask arrays in the shapes in which users get statistics; no mean for RMS norm."""

    mean: Any
    rstd: Any


class Call:
    """One checked call: its dask arrays, parameters and mask chunked as `x` is.

    Parameters
    ----------
    norm, options
        As `numbanorm.plan.plan` takes them.
    x, form : dask.array.Array, Format
        The input.
    weight, bias, mask, out : array_like, optional
        As the functions take them.

    Attributes
    ----------
    all, stats_axes, weight_axes, over : tuple of int
        All axes of `x`, those of a statistic, those of a weight, and those that moments of a chunk are taken over.
    by_row : bool
        Whether statistics keep all axes (layer and RMS norm), rather than those of samples and channels.
    per_group : int
        Channels of a group of group norm.
    """

    def __init__(
        self, norm: str, options: Options, x: Any, form: Format, weight: Any, bias: Any, mask: Any, out: Any = None
    ) -> None:
        if out is not None:
            raise TypeError(f"out: expected None, the result for a dask array is a new one; got {type(out).__name__}")
        channel_axis, groups, axis = options
        self.norm, self.x, self.form = norm, x, form
        self.layout = Layout.of(norm, x.shape, channel_axis=channel_axis, num_groups=groups, axis=axis)
        self.mask = as_mask(mask, x)
        self.all = tuple(range(x.ndim))
        self.by_row = axis is not None
        if axis is None:
            channel = channel_axis % x.ndim
            sample = 1 if channel == 0 else 0
            self.stats_axes: tuple[int, ...] = (channel,) if norm == "batch" else (sample, channel)
            self.weight_axes: tuple[int, ...] = (channel,)
            self.over = tuple(a for a in self.all if a not in self.stats_axes)  # moments are taken of channels
            self.options: Options = (channel, groups, None)
        else:
            self.weight_axes = tuple(a % x.ndim for a in axis)
            self.stats_axes = self.all
            self.over = tuple(sorted(self.weight_axes))
            self.options = (1, None, self.weight_axes)
        self.per_group = max(self.layout.size // groups, 1) if groups else 1
        self.weight = self._parameter(weight, "weight")
        self.bias = self._parameter(bias, "bias")

    @property
    def local(self) -> bool:
        """Whether every group lies within a chunk, or there are no elements."""
        if self.x.size == 0:
            return True
        if self.norm == "group" and any(n % self.per_group for n in self.x.chunks[self.options[0]]):
            return False
        return all(self.x.numblocks[a] == 1 for a in self.over)

    def whole(self, eps: float) -> Any:
        """Normalize chunk by chunk, each with its own statistics."""
        own = {"norm": self.norm, "options": self.options, "per_group": self.per_group, "eps": eps}
        inputs = ((self.weight, self.weight_axes), (self.bias, self.weight_axes), (self.mask, self.all))
        return self.blocks(_whole, self.x, *inputs, **own)

    def parts(self) -> Any:
        """Return count, mean and M2 of every group, in the shape in which users get statistics."""
        parts = merged(self.x, self.over, self.mask, keepdims=self.by_row)
        if self.stats_axes == (1, 0):
            parts = parts.T
        if self.norm != "group":
            return parts
        groups = self.layout.stats_shape[1]
        parts = parts.rechunk({1: -1})
        return parts.map_blocks(
            _merge_channels, groups, dtype=PARTS, chunks=(parts.chunks[0], (groups,)), meta=np.empty((0, 0), PARTS)
        )

    def statistics(self, parts: Any, eps: float) -> Statistics:
        """Return mean and rstd of merged parts."""
        centred = self.layout.centred
        meta = np.empty((0,) * parts.ndim)
        mean = parts.map_blocks(_mean, dtype=np.float64, meta=meta) if centred else None
        return Statistics(mean, parts.map_blocks(_rstd, eps, centred, dtype=np.float64, meta=meta))

    def apply(self, stats: Statistics, *, bound: bool) -> Any:
        """Normalize with given statistics; `bound`: read the chunks anew once all else is there."""
        inputs = [(s, self.stats_axes) for s in self.spread(stats)]
        inputs += [(self.weight, self.weight_axes), (self.bias, self.weight_axes)]
        x = after([array for array, _ in inputs], self.x)[0] if bound else self.x
        return self.blocks(_apply, x, *inputs, norm=self._applied, options=self.options)

    @property
    def _applied(self) -> str:
        return "instance" if self.norm == "group" else self.norm

    def spread(self, statistics: tuple[Any, ...]) -> list[Any]:
        """Return statistics chunked as `x` is; those of groups, once for each channel."""
        spread = []
        for array in statistics:
            if array is not None:
                if self.norm == "group":
                    array = da.repeat(array, self.per_group, axis=1)
                lengths = [
                    self.x.chunks[a] if n > 1 else (n,) for a, n in zip(self.stats_axes, array.shape, strict=True)
                ]
                array = array.rechunk(tuple(lengths))
            spread.append(array)
        return spread

    def blocks(self, function: Callable[..., Any], x: Any, *inputs: tuple[Any, Any], **options: Any) -> Any:
        """Apply a function to every chunk of `x` and what belongs to it of other arrays, given with their axes."""
        flat: list[Any] = []
        for array, axes in inputs:
            flat += [array, None if array is None else axes]
        dtype = self.form.result
        meta = meta_from_array(x._meta, x.ndim, dtype=dtype)
        return da.blockwise(
            function, self.all, x, self.all, *flat, dtype=dtype, meta=meta, align_arrays=False, **options
        )

    def _parameter(self, value: Any, name: str) -> Any:
        """Return a weight or bias, chunked as `x` is along its axes."""
        if value is None:
            return None
        shape = self.layout.affine_shape
        chunks = tuple(self.x.chunks[a] for a in self.weight_axes)
        if not isinstance(value, da.Array):
            return da.from_array(arrays.as_parameter(value, name, shape, self.form.lane), chunks=chunks)
        if value.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {value.shape}")
        if not is_float(value.dtype.newbyteorder("=")):
            raise TypeError(f"{name}: expected a float dtype, got {value.dtype}")
        return value.rechunk(chunks)


def with_residual(x: Any, residual: Any, form: Format) -> Any:
    """Return the sum of `x` and a residual, chunked as `x` is."""
    added, _ = as_input(residual, "residual")
    if added.shape != x.shape:
        raise ValueError(f"residual: expected the shape of x, {x.shape}, got {added.shape}")
    if added.dtype != x.dtype:
        raise TypeError(f"residual: expected the dtype of x, {x.dtype}, got {added.dtype}")
    return x.astype(form.result) + added.rechunk(x.chunks).astype(form.result)


def as_mask(value: Any, x: Any) -> Any:
    """Return a mask broadcast to the shape of `x`, chunked as `x` is."""
    if value is None:
        return None
    mask = _as_dask(value, "mask")
    if mask.dtype != np.bool_:
        raise TypeError(f"mask: expected dtype bool (True = counts), got {mask.dtype}")
    lead = x.ndim - mask.ndim
    fits = lead >= 0 and all(n in (1, m) for n, m in zip(mask.shape, x.shape[max(lead, 0) :], strict=True))
    if not fits:
        raise ValueError(f"mask: expected a shape that broadcasts to {x.shape}, got {mask.shape}")
    chunks = tuple(c if n > 1 else (n,) for n, c in zip(mask.shape, x.chunks[lead:], strict=True))
    return da.broadcast_to(mask.rechunk(chunks), x.shape, chunks=x.chunks)


def after(parents: list[Any], *again: Any) -> tuple[Any, ...]:
    """Return arrays (or None) under other names, their sources read only once all parents are computed."""
    needed = [parent for parent in parents if parent is not None]
    return tuple(bind(list(again), needed, seed=tokenize(again, needed)))


def merged(x: Any, axes: tuple[int, ...], mask: Any, *, keepdims: bool) -> Any:
    """Return the parts of `x` along some axes: those of every chunk, merged by a tree."""
    indices = tuple(range(x.ndim))
    mask_pair = (None, None) if mask is None else (mask, indices)
    parts = da.blockwise(
        _block_parts,
        indices,
        x,
        indices,
        *mask_pair,
        axes=axes,
        adjust_chunks=dict.fromkeys(axes, 1),
        dtype=PARTS,
        meta=np.empty((0,) * x.ndim, PARTS),
        align_arrays=False,
    )
    if not axes:
        return parts
    return da.reduction(
        parts,
        _merge,
        _merge,
        axis=axes,
        keepdims=keepdims,
        dtype=PARTS,
        meta=np.empty((0,) * (x.ndim if keepdims else x.ndim - len(axes)), PARTS),
    )


def on_device(block: Any) -> bool:
    """Tell whether a chunk is a CUDA array."""
    return type(block) is not np.ndarray and uses_cuda(block)


def beside(block: Any, *inputs: Any) -> tuple[Any, ...]:
    """Return inputs of a chunk's call where the chunk lies: if that is a device, copies of those in host memory."""
    return tuple(cuda_module("pieces").beside(array, block) for array in inputs) if on_device(block) else inputs


def to_host(array: Any) -> np.ndarray:
    """Return an array in host memory: a copy of one on a device."""
    found: np.ndarray = cuda_module("transfer").to_host(array) if on_device(array) else arrays.as_array(array, "x")
    return found


def _block_parts(block: Any, mask: Any, *, axes: tuple[int, ...]) -> np.ndarray:
    """Return the parts of one chunk, with 1 for the axes."""
    kept = tuple(1 if a in axes else n for a, n in enumerate(block.shape))
    parts = np.zeros(kept, PARTS)
    if not axes:
        parts["count"] = 1 if mask is None else mask
        parts["mean"] = np.where(parts["count"] > 0, to_host(block), 0)
    elif 0 not in block.shape:
        with serial():
            found = _precise(block, axes, *beside(block, mask))
        for name, values in zip(PARTS.names or (), found, strict=True):
            parts[name] = values if values.ndim == 0 else values.reshape(kept)
    return parts


def _merge(parts: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
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
            merged["mean"], low = _two_sum(pivot["mean"][..., 0], pivot["low"][..., 0] + shift)
            merged["low"] = np.where(np.isfinite(low), low, 0)
            merged["m2"] = (rows["m2"] + count * (delta - shift[..., None]) ** 2).sum(-1)
    return np.expand_dims(merged, axes) if keepdims else merged


def _merge_channels(parts: np.ndarray, groups: int) -> np.ndarray:
    """Merge the parts of channels, shape (N, C), into those of groups."""
    n, channels = parts.shape
    return _merge(parts.reshape(n, groups, channels // groups if groups else 0), 2, False)


def _mean(parts: np.ndarray) -> np.ndarray:
    return np.array(parts["mean"])


def _rstd(parts: np.ndarray, eps: float, centred: bool) -> np.ndarray:
    with np.errstate(all="ignore"):
        square = parts["m2"] / np.maximum(parts["count"], 1)
        if not centred:
            square = square + parts["mean"] ** 2
        return np.asarray(1.0 / np.sqrt(square + eps))


def _whole(
    block: Any, weight: Any, bias: Any, mask: Any, *, norm: str, options: Options, per_group: int, eps: float
) -> Any:
    """Normalize a chunk of whole groups."""
    calls = calls_for(block)
    source, form = calls.as_input(block, "x")
    if source.size == 0:
        return cuda_module("pieces").empty(source, form) if on_device(block) else np.empty(source.shape, form.result)
    channel_axis, groups, axis = options
    if groups is not None:
        options = (channel_axis, source.shape[channel_axis] // per_group, axis)
    weight, bias, mask = beside(block, weight, bias, mask)
    with serial():
        return calls.run(norm, options, block, source, form, weight, bias, eps, mask=mask)


def _apply(block: Any, *inputs: Any, norm: str, options: Options) -> Any:
    """Normalize a chunk with the statistics of its groups."""
    mean, rstd, weight, bias = inputs
    normalize = cuda_module("pieces").normalize if on_device(block) else pieces.normalize
    with serial():
        return normalize(norm, (options[0], None, options[2]), block, mean, rstd, weight, bias)
