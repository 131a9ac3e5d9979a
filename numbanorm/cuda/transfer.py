"""Transfers between host and device memory: these, and these alone, wait for the device."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.spec import contiguous
from . import devices
from .arrays import DeviceArray, Interface
from .copying import copy
from .libraries import OTHER, read
from .memory import Span
from .scratch import scratch_of
from .toolchain import cuda

_BYTES = np.dtype(np.uint8)


def to_device(array: np.ndarray, device: int) -> Any:
    """Return a copy of a NumPy array as a numba device array."""
    array = np.ascontiguousarray(array).reshape(array.shape)  # which makes one dimension of none
    spec = contiguous(array.shape, array.dtype)
    like = DeviceArray(None, OTHER, 0, spec, device, 0)
    with scratch_of(like):
        made = OTHER.empty(spec, like)
        if array.size:
            _bytes(made.address, array.nbytes, made.owner).copy_to_device(array.reshape(-1).view(_BYTES))
            devices.synchronize(0)
    return made.owner


def to_memory_of(x: DeviceArray, array: np.ndarray) -> DeviceArray:
    """Return a copy of a NumPy array in memory of the library of `x`, for the stream of `x`; its scratch is entered.

    A library that reuses memory in the order of a stream may give what a kernel queued before still reads; so this
    waits for the stream before it writes, too.
    """
    array = np.ascontiguousarray(array).reshape(array.shape)
    made = x.library.empty(contiguous(array.shape, array.dtype), x)
    if array.size:
        devices.synchronize(x.stream or 0)
        _bytes(made.address, array.nbytes, made.owner).copy_to_device(array.reshape(-1).view(_BYTES))
        devices.synchronize(0)
    return made


def to_host(value: Any) -> np.ndarray:
    """Return a copy of a CUDA array as a NumPy array, once what writes it is done."""
    array = read(value, "value")
    if array.size == 0:
        return np.empty(array.shape, array.dtype)
    packed = contiguous(array.shape, array.dtype)
    with scratch_of(array):
        if array.spec is not packed:
            gathered = array.library.empty(packed, array)
            copy(gathered, array, array.stream or 0)
            array = gathered
        span = Span(array.address, array.dtype, array.size)
        return span_to_host(span, array.owner, array.stream or 0).reshape(array.shape)


def span_to_host(span: Span, owner: Any, stream: int) -> np.ndarray:
    """Return a copy of a span, once what `stream` holds by now is done."""
    devices.synchronize(stream)
    found = _bytes(span.address, span.size * span.dtype.itemsize, owner).copy_to_host()
    return np.asarray(found).view(span.dtype)


def _bytes(address: int, size: int, owner: Any) -> Any:
    return cuda.as_cuda_array(Interface(address, contiguous((size,), _BYTES), owner, None), sync=False)
