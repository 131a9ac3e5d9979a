"""The functions on dask arrays: lazy, chunk by chunk, each chunk by the same functions on the chunk itself.

Where every group of a norm lies within a chunk, a chunk is normalized by itself. Elsewhere moments of the chunks are
merged by a tree, and the chunks are normalized with the result; chunks are never rechunked. The second stage does not
start before the statistics are there, and reads the chunks anew: otherwise a scheduler would keep every chunk in memory
until the last statistic is known. So what `x` is computed from runs twice; ``x.persist()`` first where that is dear.

Where running statistics are updated, the statistics of the call are computed at once, as the layer's state changes at
once; the result stays lazy. Kernels use one thread in a task: the scheduler runs as many tasks as there are cores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.array.utils import meta_from_array
from dask.base import tokenize
from dask.graph_manipulation import bind

from . import arrays, pieces
from .backends import calls_for
from .calls import _Running
from .checks import check_eps, check_momentum, integer, integers
from .dtypes import Format, format_of, is_float
from .layout import Layout
from .moments import Moments, _moments
from .plan import MEAN, RSTD, Options
from .threads import serial

__all__ = ["as_input", "computed", "moments", "run", "run_tracked"]

PARTS = np.dtype([("count", np.float64), ("mean", np.float64), ("m2", np.float64)])
"""What is known of the elements that share a mean, within a chunk or merged."""


def moments(x: Any, axis: int | tuple[int, ...] | None = None, mask: Any = None) -> Moments:
    """Compute the moments of a dask array: those of its chunks, merged by a tree.

    Parameters
    ----------
    x : dask.array.Array
        Of a dtype that `numbanorm.Moments.of` takes.
    axis : int or tuple of int, optional
        The axes along which to take them; all if None.
    mask : array_like or dask.array.Array of bool, broadcastable to `x`, optional
        True where an element counts.

    Returns
    -------
    Moments
        In memory; float64.

    Raises
    ------
    TypeError, ValueError
        If dtype, axis or mask do not fit, or chunk sizes are unknown.

    Examples
    --------
    >>> import dask.array as da
    >>> moments(da.arange(10, chunks=3)).mean
    np.float64(4.5)
    """
    axes = None if axis is None else integers(axis, "axis")
    return Moments(axes, *computed(x, axes, mask))


def computed(x: Any, axis: tuple[int, ...] | None, mask: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (count, mean, M2) of a dask array, computed; `count` is one number where there is no mask."""
    source, _ = as_input(x, "x")
    if source.ndim == 0:
        source = source.reshape(1)
    axes = tuple(range(source.ndim)) if axis is None else axis
    layout = Layout.of("layer", source.shape, axis=axes)
    parts = _merged(source, layout.reduced_axes, _as_mask(mask, source), keepdims=False).compute()
    mean, m2 = (np.array(parts[name]) for name in ("mean", "m2"))
    count = np.array(layout.count) if mask is None else np.asarray(parts["count"])
    return count.astype(np.int64), mean, m2


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


def run(
    norm: str,
    options: Options,
    x: Any,
    source: Any,
    form: Format,
    weight: Any,
    bias: Any,
    eps: float,
    *,
    mask: Any = None,
    residual: Any = None,
    out: Any = None,
    return_stats: bool = False,
) -> Any:
    """Run a norm with the statistics of its input, as `numbanorm.calls.run` does."""
    total = None
    if residual is not None:
        source = total = _sum(source, residual, form)
    call = _Call(norm, options, source, form, weight, bias, mask, out)
    parts = None
    if return_stats or not call.local:
        parts = call.parts()
    y = call.whole(eps) if call.local else call.apply(call.statistics(parts, eps), bound=True)
    return _results(y, call.statistics(parts, eps) if return_stats else None, total)


def _results(y: Any, stats: _Statistics | None, total: Any = None) -> Any:
    items = [y] if stats is None else [y, *(s for s in stats if s is not None)]
    if total is not None:
        items.append(total)
    return items[0] if len(items) == 1 else tuple(items)


def run_tracked(
    norm: str,
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    from_input: bool,
    momentum: float | None,
    eps: float,
    channel_axis: int,
    mask: Any,
    out: Any,
    return_stats: bool,
) -> Any:
    """Run a norm that may keep running statistics, as `numbanorm.calls.run_tracked` does; these are NumPy arrays."""
    eps = check_eps(eps)
    source, form = as_input(x, "x")
    options = (integer(channel_axis, "channel_axis"), None, None)
    if not from_input:
        _as_mask(mask, source)
        norm, mask = "batch", None
    call = _Call(norm, options, source, form, weight, bias, mask, out)
    running = None
    if running_mean is not None or running_var is not None:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean, running_var: expected both or neither, got one of them")
        running = _Running(running_mean, running_var, call.layout.size)
    if not from_input:
        if running is None:
            raise ValueError("running_mean, running_var: expected both to normalize with them, got None")
        given = running.given(eps)
        stats = _Statistics(*(da.from_array(given[row], chunks=-1) for row in (MEAN, RSTD)))
        return _results(call.apply(stats, bound=False), stats if return_stats else None)
    if call.layout.count == 1 and source.size > 0:
        raise ValueError(
            f"x: expected more than 1 value per channel to normalize with its own statistics, got shape {source.shape}"
        )
    if running is None or source.size == 0:
        return run(norm, options, x, source, form, weight, bias, eps, mask=mask, return_stats=return_stats)
    running.check_writeable(running_mean, running_var)
    share = check_momentum(momentum)
    parts = call.parts().compute()
    running.update(np.stack([parts[name] for name in ("count", "mean", "m2")]), share)
    stats = call.statistics(da.from_array(parts, chunks=-1), eps)
    return _results(call.apply(stats, bound=False), stats if return_stats else None)


class _Statistics(NamedTuple):
    """Dask arrays in the shapes in which users get statistics; no mean for RMS norm."""

    mean: Any
    rstd: Any


class _Call:
    """One checked call: its dask arrays, parameters and mask chunked as `x` is.

    Parameters
    ----------
    norm, options
        As `numbanorm.plan.plan` takes them.
    x, form : dask.array.Array, Format
        The input.
    weight, bias, mask, out : array_like, optional
        As the functions take them.
    """

    def __init__(
        self, norm: str, options: Options, x: Any, form: Format, weight: Any, bias: Any, mask: Any, out: Any = None
    ) -> None:
        if out is not None:
            raise TypeError(f"out: expected None, the result for a dask array is a new one; got {type(out).__name__}")
        channel_axis, groups, axis = options
        self.norm, self.x, self.form = norm, x, form
        self.layout = Layout.of(norm, x.shape, channel_axis=channel_axis, num_groups=groups, axis=axis)
        self.mask = _as_mask(mask, x)
        self._all = tuple(range(x.ndim))
        if axis is None:
            channel = channel_axis % x.ndim
            sample = 1 if channel == 0 else 0
            self._stats_axes: tuple[int, ...] = (channel,) if norm == "batch" else (sample, channel)
            self._weight_axes: tuple[int, ...] = (channel,)
            self._over = tuple(a for a in self._all if a not in self._stats_axes)  # moments are taken of channels
            self.options: Options = (channel, groups, None)
        else:
            self._weight_axes = tuple(a % x.ndim for a in axis)
            self._stats_axes = self._all
            self._over = tuple(sorted(self._weight_axes))
            self.options = (1, None, self._weight_axes)
        self._per_group = max(self.layout.size // groups, 1) if groups else 1
        self.weight = self._parameter(weight, "weight")
        self.bias = self._parameter(bias, "bias")

    @property
    def local(self) -> bool:
        """Whether every group lies within a chunk, or there are no elements."""
        if self.x.size == 0:
            return True
        if self.norm == "group" and any(n % self._per_group for n in self.x.chunks[self.options[0]]):
            return False
        return all(self.x.numblocks[a] == 1 for a in self._over)

    def whole(self, eps: float) -> Any:
        """Normalize chunk by chunk, each with its own statistics."""
        own = {"norm": self.norm, "options": self.options, "per_group": self._per_group, "eps": eps}
        inputs = ((self.weight, self._weight_axes), (self.bias, self._weight_axes), (self.mask, self._all))
        return self.blocks(_whole, self.x, *inputs, **own)

    def parts(self) -> Any:
        """Return count, mean and M2 of every group, in the shape in which users get statistics."""
        by_row = self._stats_axes == self._all
        parts = _merged(self.x, self._over, self.mask, keepdims=by_row)
        if not by_row and list(self._stats_axes) != sorted(self._stats_axes):
            parts = parts.T
        if self.norm != "group":
            return parts
        groups = self.layout.stats_shape[1]
        parts = parts.rechunk({1: -1})
        return parts.map_blocks(
            _merge_channels, groups, dtype=PARTS, chunks=(parts.chunks[0], (groups,)), meta=np.empty((0, 0), PARTS)
        )

    def statistics(self, parts: Any, eps: float) -> _Statistics:
        """Return mean and rstd of merged parts."""
        centred = self.layout.centred
        meta = np.empty((0,) * parts.ndim)
        mean = parts.map_blocks(_mean, dtype=np.float64, meta=meta) if centred else None
        return _Statistics(mean, parts.map_blocks(_rstd, eps, centred, dtype=np.float64, meta=meta))

    def apply(self, stats: _Statistics, *, bound: bool) -> Any:
        """Normalize with given statistics; `bound`: read the chunks anew once all else is there."""
        inputs = [(s, self._stats_axes) for s in self.spread(stats)]
        inputs += [(self.weight, self._weight_axes), (self.bias, self._weight_axes)]
        x = _after([array for array, _ in inputs], self.x) if bound else self.x
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
                    array = da.repeat(array, self._per_group, axis=1)
                lengths = [
                    self.x.chunks[a] if n > 1 else (n,) for a, n in zip(self._stats_axes, array.shape, strict=True)
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
            function, self._all, x, self._all, *flat, dtype=dtype, meta=meta, align_arrays=False, **options
        )

    def _parameter(self, value: Any, name: str) -> Any:
        """Return a weight or bias, chunked as `x` is along its axes."""
        if value is None:
            return None
        shape = self.layout.affine_shape
        chunks = tuple(self.x.chunks[a] for a in self._weight_axes)
        if not isinstance(value, da.Array):
            return da.from_array(arrays.as_parameter(value, name, shape, self.form.lane), chunks=chunks)
        if value.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {value.shape}")
        if not is_float(value.dtype.newbyteorder("=")):
            raise TypeError(f"{name}: expected a float dtype, got {value.dtype}")
        return value.rechunk(chunks)


def _sum(x: Any, residual: Any, form: Format) -> Any:
    added, _ = as_input(residual, "residual")
    if added.shape != x.shape:
        raise ValueError(f"residual: expected the shape of x, {x.shape}, got {added.shape}")
    if added.dtype != x.dtype:
        raise TypeError(f"residual: expected the dtype of x, {x.dtype}, got {added.dtype}")
    return x.astype(form.result) + added.rechunk(x.chunks).astype(form.result)


def _as_mask(value: Any, x: Any) -> Any:
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


def _after(parents: list[Any], x: Any) -> Any:
    """Return `x` under another name, its sources read only once all parents are computed."""
    needed = [parent for parent in parents if parent is not None]
    return bind(x, needed, seed=tokenize(x, needed))


def _merged(x: Any, axes: tuple[int, ...], mask: Any, *, keepdims: bool) -> Any:
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


def _block_parts(block: Any, mask: Any, *, axes: tuple[int, ...]) -> np.ndarray:
    """Return the parts of one chunk, with 1 for the axes."""
    kept = tuple(1 if a in axes else n for a, n in enumerate(block.shape))
    parts = np.zeros(kept, PARTS)
    if not axes:
        parts["count"] = 1 if mask is None else mask
        parts["mean"] = np.where(parts["count"] > 0, arrays.as_array(block, "x"), 0)
    elif block.size:
        with serial():
            found = _moments(block, axes, mask)
        for name, values in zip(("count", "mean", "m2"), found, strict=True):
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
        pivot = np.take_along_axis(rows["mean"], count.argmax(-1)[..., None], -1)
        with np.errstate(invalid="ignore", over="ignore"):  # Inf and NaN among the elements
            delta = np.where(count > 0, rows["mean"] - pivot, 0)
            shift = (share * delta).sum(-1)
            merged["count"] = total
            merged["mean"] = pivot[..., 0] + shift
            merged["m2"] = (rows["m2"] + count * (delta - shift[..., None]) ** 2).sum(-1)
    return np.expand_dims(merged, axes) if keepdims else merged


def _merge_channels(parts: np.ndarray, groups: int) -> np.ndarray:
    """Merge the parts of channels, shape (N, C), into those of groups."""
    n, channels = parts.shape
    return _merge(parts.reshape(n, groups, channels // groups if groups else 0), 2, False)


def _mean(parts: np.ndarray) -> np.ndarray:
    return np.array(parts["mean"])


def _rstd(parts: np.ndarray, eps: float, centred: bool) -> np.ndarray:
    square = parts["m2"] / np.maximum(parts["count"], 1)
    if not centred:
        square = square + parts["mean"] ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(1.0 / np.sqrt(square + eps))


def _whole(
    block: Any, weight: Any, bias: Any, mask: Any, *, norm: str, options: Options, per_group: int, eps: float
) -> Any:
    """Normalize a chunk of whole groups."""
    calls = calls_for(block)
    source, form = calls.as_input(block, "x")
    if source.size == 0:
        return np.empty(source.shape, form.result)
    channel_axis, groups, axis = options
    if groups is not None:
        options = (channel_axis, source.shape[channel_axis] // per_group, axis)
    with serial():
        return calls.run(norm, options, block, source, form, weight, bias, eps, mask=mask)


def _apply(block: Any, *inputs: Any, norm: str, options: Options) -> Any:
    """Normalize a chunk with the statistics of its groups."""
    mean, rstd, weight, bias = inputs
    with serial():
        return pieces.normalize(norm, (options[0], None, options[2]), block, mean, rstd, weight, bias)
