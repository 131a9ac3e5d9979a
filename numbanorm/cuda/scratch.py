"""Scratch memory: buffers that the calls of one stream take turns in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from ..core.spec import contiguous
from . import devices
from .arrays import DeviceArray
from .libraries import Library
from .memory import Span

_BYTES = np.dtype(np.uint8)
_SMALLEST = 1 << 12

PER_THREAD = 2
"""The handle that means the per-thread default stream, in CUDA and in ``__cuda_array_interface__``."""


class Scratch:
    """The buffers of one stream.

    A call enters them from its first launch to its last: their device is the current one then, and the kernels of two
    threads do not mix. Buffers grow
    by doubling, and what they have outgrown is kept: a captured CUDA graph goes on using the addresses that it has
    seen. Two graphs that were captured on one stream share its buffers and must not be replayed at the same time.

    Memory comes from the library of the arrays: while torch captures a graph, only its own allocator may allocate.
    """

    def __init__(self, device: int) -> None:
        self._lock = threading.RLock()
        self._device = devices.within(device)
        self._buffers: dict[str, tuple[Span, int]] = {}
        self._kept: list[DeviceArray] = []
        self._held: list[DeviceArray] = []

    def __enter__(self) -> Self:
        self._lock.acquire()
        if self._device is not None:
            self._device.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._device is not None:
            self._device.__exit__(*error)
        if self._held:
            self._held = []
        self._lock.release()

    def hold(self, array: DeviceArray) -> None:
        """Keep an array until the call has queued its last kernel; its memory then is reused in the stream's order."""
        self._held.append(array)

    def workspace(self, like: DeviceArray) -> Callable[[int], Span]:
        """Return what gives the backend its workspace."""
        return lambda nbytes: self.take("workspace", _BYTES, nbytes, like)

    def take(self, name: str, dtype: np.dtype[Any], size: int, like: DeviceArray) -> Span:
        """Return the buffer of this name as `size` elements; what it held is lost."""
        needed = size * dtype.itemsize
        found = self._buffers.get(name)
        if found is None or found[1] < needed:
            before = 0 if found is None else found[1]
            room = max(_SMALLEST, needed, 2 * before)
            array = like.library.empty(contiguous((room,), _BYTES), like)
            self._kept.append(array)
            found = self._buffers[name] = Span(array.address, _BYTES, room), room
        return Span(found[0].address, dtype, size)


_OF_STREAM: dict[tuple[Library, int, int, int], Scratch] = {}


def scratch_of(array: DeviceArray) -> Scratch:
    """Return the scratch memory for an array's library, device and stream."""
    stream = array.stream or 0
    # Each thread has a stream of its own behind the handle of the per-thread default stream.
    key = array.library, array.device, stream, threading.get_ident() if stream == PER_THREAD else 0
    found = _OF_STREAM.get(key)
    return _OF_STREAM.setdefault(key, Scratch(array.device)) if found is None else found
