"""CUDA arrays as the backend sees them: addresses, shapes, strides."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from ..calls.arrays import as_output

if TYPE_CHECKING:
    from .libraries import Library

Strides = tuple[int, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Strided:
    """How arrays lie in memory; made by `strided`, one object for all that lie alike, so that it is quick to look up.

    Attributes
    ----------
    shape, strides, dtype
        As NumPy has them.
    name : str
        Of the dtype, which NumPy would put together anew, 2 us.
    """

    shape: tuple[int, ...]
    strides: Strides
    dtype: np.dtype[Any]
    name: str


@lru_cache(maxsize=4096)
def strided(shape: tuple[int, ...], strides: Strides, dtype: np.dtype[Any]) -> Strided:
    """Return the one object for this shape, these strides in bytes and this dtype."""
    return Strided(shape, strides, dtype, dtype.name)


class DeviceArray:
    """An array in device memory.

    Attributes
    ----------
    owner : array
        What keeps the memory alive.
    library : Library
        Whose array that is.
    address : int
        Of the first element, in bytes.
    lies : Strided
        Its shape, strides and dtype.
    device : int
        The device that it lies on.
    stream : int or None
        For the input that decides: the stream that the work is queued on. For all others: the stream in which they
        are being computed, None where it is that of their library.
    writeable : bool
        Whether it may be written.
    """

    __slots__ = ("address", "device", "library", "lies", "owner", "stream", "writeable")

    def __init__(
        self,
        owner: Any,
        library: Library,
        address: int,
        lies: Strided,
        device: int,
        stream: int | None = None,
        writeable: bool = True,
    ) -> None:
        self.owner = owner
        self.library = library
        self.address = address
        self.lies = lies
        self.device = device
        self.stream = stream
        self.writeable = writeable

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.lies.shape

    @property
    def strides(self) -> Strides:
        """Its strides in bytes."""
        return self.lies.strides

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its dtype."""
        return self.lies.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.lies.shape)


class Interface:
    """Memory as anything that knows ``__cuda_array_interface__`` reads it."""

    def __init__(self, address: int, lies: Strided, owner: Any, stream: int | None) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": lies.shape,
            "strides": lies.strides,
            "typestr": lies.dtype.str,
            "data": (address, False),
            "stream": stream or None,
            "version": 3,
        }


def contiguous(shape: tuple[int, ...], dtype: np.dtype[Any], order: tuple[int, ...] | None = None) -> Strided:
    """Return how an array without gaps lies whose axes are in memory in this order (C order if None)."""
    strides = [0] * len(shape)
    step = dtype.itemsize
    for axis in reversed(range(len(shape)) if order is None else order):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return strided(shape, tuple(strides), dtype)


def ghost(lies: Strided, writeable: bool = True) -> np.ndarray:
    """Return a NumPy array of no memory that lies so, for what NumPy can tell from that; never to be read."""
    none = np.empty(0, lies.dtype)
    return np.lib.stride_tricks.as_strided(none, lies.shape, lies.strides, writeable=writeable)


def apart(out: DeviceArray, inputs: dict[str, DeviceArray]) -> None:
    """Check that `out` shares no memory with the inputs; `x` and `residual` may be `out` as a whole.

    Raises
    ------
    ValueError
        If it overlaps one of them in part.
    """
    low, high = _bounds(out.lies)
    start, end = out.address + low, out.address + high
    for name, array in inputs.items():
        low, high = _bounds(array.lies)
        if array.address + low >= end or array.address + high <= start:
            continue
        as_output(_addressed(out), out.shape, out.dtype, {name: _addressed(array)})


def share_memory(a: DeviceArray, b: DeviceArray) -> bool:
    """Tell whether two arrays may share memory, from their bounds alone."""
    (low_a, high_a), (low_b, high_b) = (_bounds(c.lies) for c in (a, b))
    return a.address + low_a < b.address + high_b and b.address + low_b < a.address + high_a


@lru_cache(maxsize=4096)
def _bounds(lies: Strided) -> tuple[int, int]:
    """Return where an array begins and ends, in bytes from its first element."""
    if 0 in lies.shape:
        return 0, 0
    reach = [(n - 1) * s for n, s in zip(lies.shape, lies.strides, strict=True)]
    return sum(min(r, 0) for r in reach), sum(max(r, 0) for r in reach) + lies.dtype.itemsize


class _Addressed:
    """An array's address as NumPy takes it."""

    def __init__(self, array: DeviceArray) -> None:
        self.__array_interface__ = {
            "shape": array.shape,
            "strides": array.strides,
            "typestr": f"|V{array.dtype.itemsize}",
            "data": (array.address, False),
            "version": 3,
        }


def _addressed(array: DeviceArray) -> np.ndarray:
    """Return a NumPy array at the address of device memory, for NumPy to compare addresses; never to be read."""
    return np.asarray(_Addressed(array)).view(array.dtype)
