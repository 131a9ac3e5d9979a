"""The functions on dask arrays, chunk by chunk."""

from __future__ import annotations

from typing import Any

from ..stats.moments import Moments

__all__ = ["moments"]


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
    return Moments.of(x, axis, mask=mask)
