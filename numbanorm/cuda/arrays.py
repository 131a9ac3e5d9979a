"""CUDA arrays as the backend sees them: addresses and specs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..calls.check import check_apart, check_two
from ..core.spec import ArraySpec, bounds

if TYPE_CHECKING:
    from .libraries import Library


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
    spec : ArraySpec
        Its shape, strides and dtype.
    device : int
        The device that it lies on.
    stream : int or None
        For the input that decides: the stream that the work is queued on. For all others: the stream in which they
        are being computed, None where it is that of their library.
    writeable : bool
        Whether it may be written.
    """

    __slots__ = ("address", "device", "library", "owner", "spec", "stream", "writeable")

    def __init__(
        self,
        owner: Any,
        library: Library,
        address: int,
        spec: ArraySpec,
        device: int,
        stream: int | None = None,
        writeable: bool = True,
    ) -> None:
        self.owner = owner
        self.library = library
        self.address = address
        self.spec = spec
        self.device = device
        self.stream = stream
        self.writeable = writeable

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.spec.shape

    @property
    def strides(self) -> tuple[int, ...]:
        """Its strides in bytes."""
        return self.spec.strides

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its dtype."""
        return self.spec.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.spec.size


class Interface:
    """Memory as anything that knows ``__cuda_array_interface__`` reads it."""

    def __init__(self, address: int, spec: ArraySpec, owner: Any, stream: int | None) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": spec.shape,
            "strides": spec.strides,
            "typestr": spec.dtype.str,
            "data": (address, False),
            "stream": stream or None,
            "version": 3,
        }


def check_no_overlap(out: DeviceArray, inputs: Any) -> None:
    """Check that `out` overlaps none of a call's `Inputs`, but `x` and `residual` as a whole.

    Raises
    ------
    ValueError
        If it overlaps one of them in part.
    """
    named = zip(inputs._fields, inputs, strict=True)
    near = {name: a for name, a in named if a is not None and a is not out and share_memory(out, a)}
    if near:
        check_apart(_addressed(out), {name: _addressed(a) for name, a in near.items()})


def check_apart_from_each_other(mean: DeviceArray, var: DeviceArray) -> None:
    """Check that running mean and variance have memory of their own."""
    if share_memory(mean, var):
        check_two(_addressed(mean), _addressed(var))


def share_memory(a: DeviceArray, b: DeviceArray) -> bool:
    """Tell whether two arrays may share memory, from their bounds alone."""
    (low_a, high_a), (low_b, high_b) = bounds(a.spec), bounds(b.spec)
    return a.address + low_a < b.address + high_b and b.address + low_b < a.address + high_a


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
