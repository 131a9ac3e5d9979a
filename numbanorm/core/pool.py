"""A pool of memory for large outputs: fresh pages cost more than a kernel does.

The system clears every page before it hands it out: an output of 16 MiB costs 2 ms that way, normalizing it 2 ms. So
the memory of an output goes back to a pool when the last array that looks at it is gone, views and exports included,
and the next output of about that size takes it. Nothing is shared, and nothing handed out that anybody can still see.

Where in a page an output starts matters, too: a CPU tells by the last twelve bits of an address whether a load must
wait for an earlier store. NumPy's own large arrays all start 16 bytes into a page, so that each output would be written
just ahead of where its input is read; see `APART`.

The environment variable ``NUMBANORM_POOL`` bounds the memory that the pool keeps while nobody uses it: bytes, or
``"64M"``, ``"2G"``; ``0`` switches it off. The default is a sixteenth of the machine's memory.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import OrderedDict, deque
from math import prod
from sys import getrefcount
from typing import Any

import numpy as np

SMALLEST = 1 << 20
"""Bytes from which an output comes from the pool: below, malloc itself reuses memory.

Of several arrays of 1 to 4 MiB it does not: four layers of (512, 1024) in a row take 1.24 ms with malloc, 0.80 with the
pool.
"""

LEASED = 1 << 23
"""Bytes from which it comes as a lease: 12 us, 4 of them beside a kernel's 170 for what is told by counts.

A lease tells at once when its memory is free, so that little of it stays; for memory that is not large a look at the
next call will do.
"""

COUNTED = 1 << 26
"""Bytes of memory whose references are counted, at most."""

_IDLE = 3
"""References to a block that is seen by nobody: of its pair in the list, of the loop, of the question."""

_COUNTS = getattr(sys, "_is_gil_enabled", lambda: True)()
"""Whether a count of references is exact, and cannot change while it is looked at."""

ALIGNMENT = 64
"""Bytes: what is streamed past the caches must start with a cache line."""

PAGE = 4096

APART = 1024
"""Bytes of a page by which an output starts after its input.

On Zen 4, LayerNorm (16384, 4096) of bfloat16 takes 23.7 ms with 48 bytes, 21.9 with 112, 13.4 with 176 and 12.4 from
1008 to 2032; batch norm in inference (64, 256, 56, 56) 6.1, 9.8, 7.0 and 4.4; LayerNorm (4096, 1024) of float32 1.02
and 0.93.
"""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def limit_from(text: str) -> int:
    """Return a number of bytes.

    Parameters
    ----------
    text : str
        Digits, and K, M or G after them for powers of 1024.

    Raises
    ------
    ValueError
        If it is anything else.

    Examples
    --------
    >>> limit_from("64M")
    67108864
    """
    digits = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = digits[-1:] if digits[-1:] in ("K", "M", "G") else ""
    if not digits.removesuffix(unit).isdecimal():
        raise ValueError(f"NUMBANORM_POOL: expected a number of bytes such as 0, 64M or 2G, got {text!r}")
    return int(digits.removesuffix(unit)) * _UNITS[unit]


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])  # not by `ctypes`, which is imported: leases die at exit, too


def _start(address: int, beside: tuple[np.ndarray, ...]) -> int:
    """Return where in a block at `address` an output starts: at a line, and in its page far from its inputs."""
    if not beside:
        return -address % ALIGNMENT
    taken = [_address(array) for array in beside]
    place = taken[0] + APART
    if len(taken) > 1:
        places = [inputs + steps * APART for inputs in taken for steps in (1, 2)]
        place = max(places, key=lambda p: min(min((p - t) % PAGE, (t - p) % PAGE) for t in taken))
    return (place - place % ALIGNMENT - address) % PAGE


class _Lease:
    """Memory that is in use. Every array over it keeps this object alive; with it goes the last of them."""

    __slots__ = ("__array_interface__", "_block", "_pool")

    def __init__(self, pool: Pool, block: np.ndarray, size: int, beside: tuple[np.ndarray, ...]) -> None:
        self._pool = pool
        self._block = block
        address = _address(block)
        self.__array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address + _start(address, beside), False),
            "version": 3,
        }

    def __del__(self) -> None:
        self._pool.give_back(self._block)


class Pool:
    """Blocks of memory by size, the longest unused first.

    Parameters
    ----------
    limit : int
        Bytes to keep while they are not in use.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept = 0
        self._counted: dict[int, list[tuple[np.ndarray, int]]] = {}  # by size: blocks, in use or not, and addresses
        self._counted_bytes = 0
        self._free: OrderedDict[int, np.ndarray] = OrderedDict()  # by address, in the order of return
        self._returned: deque[np.ndarray] = deque()
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], *beside: np.ndarray) -> np.ndarray:
        """Return a C-ordered array of undefined content, as `numpy.empty` does; its memory may be a reused block.

        Parameters
        ----------
        shape, dtype
            Of the array.
        *beside : ndarray
            What is read, or written, while the array is written: it starts elsewhere in a page (`APART`).
        """
        size = prod(shape) * dtype.itemsize
        if size < SMALLEST or self.limit == 0:
            return np.empty(shape, dtype)
        if size < LEASED and _COUNTS:
            return self._take_counted(shape, dtype, size, beside)
        return np.asarray(_Lease(self, self._take(size), size, beside)).view(dtype).reshape(shape)

    def empty_like(self, x: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
        """Return an output of the shape of the C-ordered `x`, to be written while that is read."""
        return self.empty(x.shape, dtype, x)

    def clear(self) -> None:
        """Give what is kept back to the system."""
        with self._lock:
            self._settle()
            self._free.clear()
            self.kept = 0
            self._counted.clear()
            self._counted_bytes = 0

    def give_back(self, block: np.ndarray) -> None:
        """Take a block that nobody looks at any more. May run at any time, as garbage collection does."""
        self._returned.append(block)
        if self._lock.acquire(blocking=False):  # whoever holds it now, or takes next, settles
            try:
                self._settle()
            finally:
                self._lock.release()

    def _take_counted(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], size: int, beside: tuple[np.ndarray, ...]
    ) -> np.ndarray:
        """Return an array over a block that only this pool refers to: all arrays over a block refer to it."""
        if not self._lock.acquire(blocking=False):  # another thread has it, or what a signal has interrupted
            return np.empty(shape, dtype)
        try:
            for block, address in self._counted.get(size, ()):
                if getrefcount(block) == _IDLE:
                    return np.ndarray(shape, dtype, block, _start(address, beside))
            try:
                block = np.empty(size + PAGE, np.uint8)
            except MemoryError:
                self._drop_idle()
                self._free.clear()
                self.kept = 0
                block = np.empty(size + PAGE, np.uint8)
            address = _address(block)
            most = min(COUNTED, self.limit)
            if self._counted_bytes + block.nbytes > most:
                self._drop_idle()
            if self._counted_bytes + block.nbytes <= most:
                self._counted.setdefault(size, []).append((block, address))
                self._counted_bytes += block.nbytes
            return np.ndarray(shape, dtype, block, _start(address, beside))
        finally:
            self._lock.release()

    def _drop_idle(self) -> None:
        """Give blocks that nobody looks at back to the system; under the lock."""
        for size, blocks in list(self._counted.items()):
            used = []
            for block, address in blocks:
                if getrefcount(block) > _IDLE:
                    used.append((block, address))
                else:
                    self._counted_bytes -= block.nbytes
            if used:
                self._counted[size] = used
            else:
                del self._counted[size]

    def _take(self, size: int) -> np.ndarray:
        step = 1 << max(size.bit_length() - 4, 16)  # so that at most an eighth is wasted
        wanted = -(-size // step) * step + PAGE
        if self._lock.acquire(timeout=0.1):  # a signal's handler does not wait for what it interrupted
            try:
                self._settle()
                for address in reversed(self._free):
                    if self._free[address].nbytes == wanted:
                        self.kept -= wanted
                        return self._free.pop(address)
            finally:
                self._lock.release()
        try:
            return np.empty(wanted, np.uint8)
        except MemoryError:
            self.clear()
            return np.empty(wanted, np.uint8)

    def _settle(self) -> None:
        """Put returned blocks among the free ones, and drop the oldest beyond the limit; under the lock."""
        while self._returned:
            block = self._returned.popleft()
            self._free[_address(block)] = block
            self.kept += block.nbytes
        while self._free and self.kept + self._counted_bytes > self.limit:
            self.kept -= self._free.popitem(last=False)[1].nbytes

    def _after_fork(self) -> None:
        self._lock = threading.Lock()


def _usual_limit() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 512 << 20


POOL = Pool(limit_from(os.environ["NUMBANORM_POOL"]) if "NUMBANORM_POOL" in os.environ else _usual_limit())
"""What outputs come from."""
