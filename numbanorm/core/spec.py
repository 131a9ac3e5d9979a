"""Array specs: how arrays lie in memory, which decides what a call does; their elements are never looked at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

Strides = tuple[int, ...]


@dataclass(frozen=True, eq=False, slots=True)
class ArraySpec:
    """How arrays lie in memory; made by `array_spec`, one object for all that lie alike, for quick look-ups.

    Attributes
    ----------
    shape, strides, dtype
        As NumPy has them; strides in bytes.
    name : str
        Of the dtype, which NumPy would put together anew, 2 us.
    """

    shape: tuple[int, ...]
    strides: Strides
    dtype: np.dtype[Any]
    name: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@lru_cache(maxsize=4096)
def array_spec(shape: tuple[int, ...], strides: Strides, dtype: np.dtype[Any]) -> ArraySpec:
    """Return the one spec for this shape, these strides in bytes and this dtype.

    Examples
    --------
    >>> array_spec((2, 3), (12, 4), np.dtype(np.float32)) is spec_of(np.zeros((2, 3), np.float32))
    True
    """
    return ArraySpec(shape, strides, dtype, dtype.name)


def spec_of(array: np.ndarray) -> ArraySpec:
    """Return how an array lies."""
    return array_spec(array.shape, array.strides, array.dtype)


def contiguous(shape: tuple[int, ...], dtype: np.dtype[Any], order: tuple[int, ...] | None = None) -> ArraySpec:
    """Return how an array without gaps lies whose axes are in memory in this order, the slowest first (None: C order).

    Examples
    --------
    >>> contiguous((2, 3), np.dtype(np.int8), (1, 0)).strides
    (1, 2)
    """
    strides = [0] * len(shape)
    step = dtype.itemsize
    for axis in reversed(range(len(shape)) if order is None else order):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return array_spec(shape, tuple(strides), dtype)


def dummy(spec: ArraySpec, writeable: bool = True) -> np.ndarray:
    """Return a NumPy array of no memory that lies so, for what NumPy can tell from that; never to be read."""
    none = np.empty(0, spec.dtype)
    return np.lib.stride_tricks.as_strided(none, spec.shape, spec.strides, writeable=writeable)


@lru_cache(maxsize=4096)
def bounds(spec: ArraySpec) -> tuple[int, int]:
    """Return where an array begins and ends, in bytes from its first element.

    Examples
    --------
    >>> bounds(array_spec((3,), (-8,), np.dtype(np.float64)))
    (-16, 8)
    """
    if 0 in spec.shape:
        return 0, 0
    reach = [(n - 1) * s for n, s in zip(spec.shape, spec.strides, strict=True)]
    return sum(min(r, 0) for r in reach), sum(max(r, 0) for r in reach) + spec.dtype.itemsize


def overlaps_itself(spec: ArraySpec) -> bool:
    """Tell whether elements may share memory: an axis takes steps that are shorter than what the faster axes span."""
    span = spec.dtype.itemsize
    for step, length in sorted((abs(s), n) for n, s in zip(spec.shape, spec.strides, strict=True) if n > 1):
        if step < span:
            return spec.size > 0
        span += (length - 1) * step
    return False
