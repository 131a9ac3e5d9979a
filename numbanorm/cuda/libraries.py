# ruff: noqa: D102 (what the methods do is said in Library)
"""CUDA arrays in and out: what callers hand over is read as addresses, and results are arrays of the same library.

torch and CuPy are asked directly, which is faster than their ``__cuda_array_interface__`` (and torch has none for
bfloat16 in some versions); their allocators make the outputs, and their current stream takes the work. Arrays of any
other library come in through the interface; the work is queued on the stream that it names, or else on the default
one, and outputs are numba's device arrays.
"""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, lru_cache
from typing import Any

import numpy as np

from ..core.dtypes import NARROW, WIDE
from ..core.spec import ArraySpec, array_spec, contiguous
from . import devices
from .arrays import DeviceArray, Interface
from .toolchain import cuda


class Library(ABC):
    """How the arrays of one library are read and made."""

    @abstractmethod
    def read(self, value: Any, name: str) -> DeviceArray:
        """Return what is to be known of an array of this library.

        Raises
        ------
        TypeError, ValueError
            If it is no plain array in device memory.
        """

    @abstractmethod
    def empty(self, spec: ArraySpec, like: DeviceArray) -> DeviceArray:
        """Return a new array of this spec, without gaps, on the device and for the stream of `like`."""

    @abstractmethod
    def view(self, array: DeviceArray, offset: int, spec: ArraySpec) -> Any:
        """Return some elements of an array that `empty` made, `offset` bytes from its first, as an array."""

    @abstractmethod
    def stream(self, array: DeviceArray) -> int:
        """Return the current stream for an array's device."""

    @abstractmethod
    def on(self, stream: int, device: int) -> AbstractContextManager[Any]:
        """Return a context in which `stream` is the current stream."""


class Torch(Library):
    """Tensors of torch."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        names = [name for name in (NARROW | WIDE) - {"bfloat16"} if hasattr(torch, name)]
        self.dtypes: dict[Any, np.dtype[Any]] = {getattr(torch, name): np.dtype(name) for name in names}
        try:
            from ml_dtypes import bfloat16
        except ImportError:
            pass
        else:
            self.dtypes[torch.bfloat16] = np.dtype(bfloat16)
        self.own = {dtype: own for own, dtype in self.dtypes.items()}
        self.strided = torch.strided
        self._specs = lru_cache(maxsize=4096)(self._spec)
        self._makes = lru_cache(maxsize=4096)(self._make)
        # The public way makes an object of class Stream, 1 us; torch's own compilers ask so too.
        self.raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", self._public_stream)

    def _public_stream(self, device: int) -> int:
        return int(self.torch.cuda.current_stream(device).cuda_stream)

    def read(self, value: Any, name: str) -> DeviceArray:
        if not value.is_cuda or value.requires_grad or value.layout is not self.strided:
            raise TypeError(f"{name}: {self._refusal(value)}")
        if value.is_neg():
            raise TypeError(f"{name}: expected a tensor that is in memory as it reads; call .resolve_neg() first")
        spec = self._specs(value.shape, value.stride(), value.dtype)
        if spec is None:
            raise TypeError(f"{name}: {self._refusal(value)}")
        return DeviceArray(value, self, value.data_ptr(), spec, value.get_device())

    def _spec(self, shape: Any, steps: tuple[int, ...], own: Any) -> ArraySpec | None:
        dtype = self.dtypes.get(own)
        return None if dtype is None else array_spec(tuple(shape), tuple(s * dtype.itemsize for s in steps), dtype)

    def _make(self, spec: ArraySpec) -> tuple[tuple[int, ...], list[int], Any]:
        return spec.shape, [s // spec.dtype.itemsize for s in spec.strides], self.own[spec.dtype]

    def _refusal(self, value: Any) -> str:
        if not value.is_cuda:
            return f"expected a CUDA array, as x is, got a tensor on {value.device}"
        if value.requires_grad:
            return "expected a tensor that does not require grad (call .detach() first)"
        if value.layout is not self.strided:
            return f"expected a strided tensor, got layout {value.layout}"
        if value.dtype is self.torch.bfloat16:
            return 'bfloat16 needs ml_dtypes, which is not installed: pip install "numbanorm[half]"'
        known = "float16, bfloat16, float32, float64, bool or an integer of 8 to 64 bits"
        return f"expected {known}, got {value.dtype}"

    def empty(self, spec: ArraySpec, like: DeviceArray) -> DeviceArray:
        shape, steps, dtype = self._makes(spec)
        device = like.owner.device if like.library is self else f"cuda:{like.device}"
        tensor = self.torch.empty_strided(shape, steps, dtype=dtype, device=device)
        return DeviceArray(tensor, self, tensor.data_ptr(), spec, like.device, like.stream)

    def view(self, array: DeviceArray, offset: int, spec: ArraySpec) -> Any:
        shape, steps, _ = self._makes(spec)
        return array.owner.as_strided(shape, steps, offset // spec.dtype.itemsize)

    def stream(self, array: DeviceArray) -> int:
        return self.raw_stream(array.device)

    def on(self, stream: int, device: int) -> AbstractContextManager[Any]:
        external = self.torch.cuda.ExternalStream(stream, device)
        context: AbstractContextManager[Any] = self.torch.cuda.stream(external)
        return context


class CuPy(Library):
    """Arrays of CuPy."""

    def __init__(self, cupy: Any) -> None:
        self.cupy = cupy

    def read(self, value: Any, name: str) -> DeviceArray:
        return DeviceArray(
            value, self, value.data.ptr, array_spec(value.shape, value.strides, value.dtype), value.device.id
        )

    def empty(self, spec: ArraySpec, like: DeviceArray) -> DeviceArray:
        array = self.cupy.empty(spec.shape, spec.dtype)
        if array.strides != spec.strides and array.size:
            array = self.cupy.ndarray(spec.shape, spec.dtype, array.data, spec.strides)
        return DeviceArray(array, self, array.data.ptr, spec, like.device, like.stream)

    def view(self, array: DeviceArray, offset: int, spec: ArraySpec) -> Any:
        return self.cupy.ndarray(spec.shape, spec.dtype, array.owner.data + offset, spec.strides)

    def stream(self, array: DeviceArray) -> int:
        return int(self.cupy.cuda.get_current_stream().ptr)

    def on(self, stream: int, device: int) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.cupy.cuda.ExternalStream(stream, device)
        return context


class Other(Library):
    """Arrays of numba, and whatever else has the interface."""

    def __init__(self) -> None:
        self._given = threading.local()

    def read(self, value: Any, name: str) -> DeviceArray:
        try:
            interface = value.__cuda_array_interface__
        except (AttributeError, RuntimeError):
            kind = type(value).__name__
            raise TypeError(f"{name}: expected a CUDA array, as x is, got {kind} in host memory") from None
        if interface.get("mask") is not None:
            raise TypeError(f"{name}: expected an array, got a masked {type(value).__name__}")
        dtype = getattr(value, "dtype", None)  # a type string knows no bfloat16
        if not isinstance(dtype, np.dtype):
            dtype = np.dtype(interface["typestr"])
        shape = tuple(interface["shape"])
        strides = interface.get("strides")
        spec = contiguous(shape, dtype) if strides is None else array_spec(shape, tuple(strides), dtype)
        address, read_only = interface["data"]
        address = address or 0
        if address == 0 and 0 not in shape:
            raise TypeError(f"{name}: expected an array in host memory or in CUDA memory, got one at the address 0")
        if address % (dtype.itemsize or 1):
            raise ValueError(f"{name}: expected an address that is a multiple of {dtype.itemsize}, got {address:#x}")
        try:
            device = devices.device_of(address)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        stream = interface.get("stream")
        return DeviceArray(value, self, address, spec, device, stream, not read_only)

    def empty(self, spec: ArraySpec, like: DeviceArray) -> DeviceArray:
        stream = devices.numba_stream(like.stream or 0)
        array = cuda.device_array(spec.shape, spec.dtype, strides=spec.strides, stream=stream)
        address = array.__cuda_array_interface__["data"][0] or 0
        return DeviceArray(array, self, address, spec, like.device, like.stream)

    def view(self, array: DeviceArray, offset: int, spec: ArraySpec) -> Any:
        seen = Interface(array.address + offset, spec, array.owner, array.stream)
        return cuda.as_cuda_array(seen, sync=False)

    def stream(self, array: DeviceArray) -> int:
        given: int | None = getattr(self._given, "stream", None)
        return given if given is not None else array.stream or 0

    @contextmanager
    def on(self, stream: int, device: int) -> Iterator[None]:
        before = getattr(self._given, "stream", None)
        self._given.stream = stream
        try:
            yield
        finally:
            self._given.stream = before


OTHER = Other()
_BY_TYPE: dict[type, Library] = {}


@cache
def _torch() -> Library:
    return Torch(sys.modules["torch"])


@cache
def _cupy() -> Library:
    return CuPy(sys.modules["cupy"])


def library_of(value: Any) -> Library:
    """Return the library whose array this is."""
    kind = type(value)
    library = _BY_TYPE.get(kind)
    if library is None:
        roots = {base.__module__.partition(".")[0] for base in kind.__mro__}
        library = _torch() if "torch" in roots else _cupy() if "cupy" in roots else OTHER
        _BY_TYPE[kind] = library
    return library


def read(value: Any, name: str) -> DeviceArray:
    """Return what is to be known of the input that decides: its device and stream are those of the whole call."""
    if type(value) is DeviceArray:
        return value
    library = library_of(value)
    array = library.read(value, name)
    stream = library.stream(array)
    if array.stream is not None and array.stream != stream:
        devices.wait(stream, array.stream)
    array.stream = stream
    return array


def read_beside(value: Any, name: str, first: DeviceArray) -> DeviceArray:
    """Return what is to be known of an array beside the first: on the same device, and computed before it is used.

    Raises
    ------
    TypeError
        If it lies in host memory, or in foreign byte order.
    ValueError
        If it lies on another device.
    """
    if type(value) is DeviceArray:
        array = value
    else:
        library = library_of(value)
        array = library.read(value, name)
        if library is not first.library and library is not OTHER:
            array.stream = library.stream(array)
        if array.stream is not None and array.stream != first.stream:
            devices.wait(first.stream or 0, array.stream)
    if array.device != first.device:
        raise ValueError(f"{name}: expected an array on device {first.device}, as x is, got one on {array.device}")
    if not array.dtype.isnative:
        raise TypeError(f"{name}: expected the byte order of this machine, got {array.dtype}")
    return array
