"""Spans in the memory of a GPU, as the simulator has them in its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from numbanorm.cuda.memory import Span
from numbanorm.cuda.toolchain import cuda

_held: dict[int, Any] = {}


def allocate(size: int, dtype: Any, shift: int = 0) -> Span:
    """Return a span of garbage, `shift` elements beyond the start of an allocation."""
    dtype = np.dtype(dtype)
    array = cuda.to_device(np.full(max(1, (size + shift) * dtype.itemsize), 0xFF, np.uint8))
    address = array.device_ctypes_pointer.value + shift * dtype.itemsize
    _held[address] = array, shift * dtype.itemsize
    return Span(address, dtype, size)


def place(array: np.ndarray, shift: int = 0) -> Span:
    """Return a span that holds a flat array."""
    span = allocate(array.size, array.dtype, shift)
    held, start = _held[span.address]
    held[start:].copy_to_device(np.ascontiguousarray(array).view(np.uint8))
    return span


def view(span: Span) -> np.ndarray:
    """Return a copy of the elements of a span."""
    held, start = _held[span.address]
    return held.copy_to_host()[start : start + span.size * span.dtype.itemsize].view(span.dtype)


def clear() -> None:
    cuda.synchronize()
    _held.clear()
