"""Fitting: exact population statistics of a batch norm's channels, from data that need not fit in memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..calls import arrays
from ..calls.dispatch import handler_of
from .moments import Moments

if TYPE_CHECKING:
    from ..layers.norms import BatchNorm

BLOCK_BYTES = 8 << 20
"""Bytes of an array taken at once. Channels of short runs are read once for each channel, from a cache if they fit in
one: 64 channels of 25 float32 went at 0.8 GB/s in blocks of 4 to 32 MB, at 0.6 in 64 MB and at 0.1 in 256 MB."""


def fit(layer: BatchNorm, batches: Any, mask: Any) -> None:
    """Do what ``layer.fit(batches, mask=mask)`` does."""
    _check_tracking(layer, "fit")
    if _is_array(batches):
        pairs: Iterable[tuple[Any, Any]] = [(batches, mask)]
    else:
        pairs = _paired(batches, mask)
    moments: Moments | None = None
    number = 0
    for index, (x, counted) in enumerate(pairs):
        try:
            taken = moments_of(layer, x, counted)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"batches: batch {index}: {error}") from error
        moments = taken if moments is None else moments + taken
        number += bool(np.any(taken.count > 0))
    if moments is None or number == 0:
        raise ValueError("batches: expected one or more elements that count, got none")
    _set(layer, moments, number)


def partial_fit(layer: BatchNorm, x: Any, mask: Any) -> None:
    """Do what ``layer.partial_fit(x, mask=mask)`` does."""
    _check_tracking(layer, "partial_fit")
    taken = moments_of(layer, x, mask)
    if not np.any(taken.count > 0):
        return
    if layer.moments is None:
        _set(layer, taken, 1)
    else:
        _set(layer, layer.moments + taken, (layer.num_batches_tracked or 0) + 1)


def moments_of(layer: BatchNorm, x: Any, mask: Any = None) -> Moments:
    """Return the moments of every channel of a batch, taken block by block where it is large.

    Parameters
    ----------
    layer : BatchNorm
        Whose channels.
    x : array_like, shape (N, C, ...)
        An array in memory, on a CUDA device or mapped from a file; a dask array; or what is sliced like an array and
        read as it is (Zarr, h5py).
    mask : array_like of bool, broadcastable to `x`, optional
        True where an element counts.

    Returns
    -------
    Moments
        Of shape (C,).
    """
    if not _is_array(x) or not hasattr(x, "dtype"):
        x = arrays.as_array(x, "x")
    shape = tuple(x.shape)
    channel = layer.layout(shape).reduced_axes
    if handler_of(x) is not None:
        return Moments.of(x, channel, mask=mask)
    counted = None if mask is None else arrays.broadcast_mask(mask, shape)
    moments: Moments | None = None
    for part in _blocks(x, channel):
        taken = Moments.of(x[part], channel, mask=None if counted is None else counted[part])
        moments = taken if moments is None else moments + taken
        _forget_pages(x)
    assert moments is not None
    return moments


def _blocks(x: Any, axes: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Cut an array into blocks of at most `BLOCK_BYTES`, along that of the axes whose neighbours lie farthest apart.

    Blocks are longer where one position of that axis is.
    """
    strides = getattr(x, "strides", None)
    if not isinstance(strides, tuple):
        strides = range(x.ndim, 0, -1)
    axis = max(axes, key=lambda a: (x.shape[a] > 1, abs(strides[a])))
    length = x.shape[axis]
    each = x.dtype.itemsize * int(np.prod(x.shape, dtype=np.int64)) // max(length, 1)
    step = max(1, BLOCK_BYTES // max(each, 1))
    chunks = getattr(x, "chunks", None)  # of Zarr and h5py: a chunk is read whole, whatever is asked of it
    if isinstance(chunks, tuple) and isinstance(chunks[axis], int):
        step = max(1, step // chunks[axis]) * chunks[axis]
    for start in range(0, max(length, 1), step):
        yield (*[slice(None)] * axis, slice(start, start + step))


def _forget_pages(x: Any) -> None:
    """Give back the pages of a mapped file that were read: they count as this process's memory until then."""
    mapped = getattr(x, "_mmap", None)
    # What was written to a private map ("c") lies in its pages alone, and would be lost.
    if isinstance(x, np.memmap) and x.mode != "c" and mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and (hasattr(value, "dtype") or hasattr(value, "__array__"))


def _paired(batches: Any, mask: Any) -> Iterator[tuple[Any, Any]]:
    """Return batches, each with its mask."""
    for name, value in (("batches", batches), ("mask", mask)):
        if not isinstance(value, Iterable) and not (name == "mask" and value is None):
            raise TypeError(
                f"{name}: expected an array, or an iterable of one for each batch, got {type(value).__name__}"
            )
    if mask is None:
        return ((x, None) for x in batches)
    if _is_array(mask):
        raise TypeError(f"mask: expected an iterable of one mask for each batch, got {type(mask).__name__}")
    return _zipped(batches, mask)


def _zipped(batches: Iterable[Any], masks: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    end = object()
    rest = iter(masks)
    for number, x in enumerate(batches):
        counted = next(rest, end)
        if counted is end:
            raise ValueError(f"mask: expected one for each batch, got {number}")
        yield x, counted
    if next(rest, end) is not end:
        raise ValueError("mask: expected one for each batch, got more")


def _check_tracking(layer: BatchNorm, name: str) -> None:
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError(f"{name}: expected a layer with track_running_stats=True, this one has no running statistics")


def _set(layer: BatchNorm, moments: Moments, batches: int) -> None:
    """Make the moments the running statistics; channels of which nothing counted have mean 0 and variance 1."""
    seen = np.broadcast_to(moments.count > 0, (layer.num_features,))
    mean, var = np.where(seen, moments.mean, 0.0), np.where(seen, moments.var(), 1.0)
    state = {"running_mean": mean, "running_var": var, "num_batches_tracked": np.array(batches)}
    layer.load_state_dict(state, strict=False)
    layer.moments = moments
