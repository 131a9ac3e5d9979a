"""Memory for arrays of the fuzzer: next to pages that nobody may touch, among bytes that must stay as they are.

A read or a write past the end of a guarded array, and a write to an input that is sealed, end the process with a
segmentation fault; `run.py` tells which call it was. Where the system has no `mprotect`, the bytes alone are watched.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from random import Random
from typing import Any
from unittest import mock

import numpy as np

GUARDED = sys.platform != "win32"
PAGE = mmap.PAGESIZE
MARGIN = 256
"""Bytes on either side of an array that are watched: four cache lines, the widest vector of lanes twice."""

_NONE, _READ, _WRITE = 0, 1, 2
_protect: Callable[..., int] | None = None
if GUARDED:
    _protect = ctypes.CDLL(None, use_errno=True).mprotect
    _protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)  # type: ignore[attr-defined]


def _set(start: int, length: int, rights: int) -> None:
    if _protect is not None and _protect(start, length, rights) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def _address(array: np.ndarray) -> int:
    pointer: int = array.__array_interface__["data"][0]
    return pointer


class Region:
    """Whole pages between two that nobody may touch.

    Parameters
    ----------
    size : int
        Bytes; rounded up to pages.
    """

    def __init__(self, size: int) -> None:
        pages = -(-size // PAGE)
        self._map = mmap.mmap(-1, (pages + 2) * PAGE)
        self.bytes = np.frombuffer(self._map, np.uint8)[PAGE:-PAGE]
        start = _address(self.bytes)
        _set(start - PAGE, PAGE, _NONE)
        _set(start + pages * PAGE, PAGE, _NONE)

    def seal(self) -> None:
        """Let nobody write here."""
        _set(_address(self.bytes), self.bytes.size, _READ)

    def open(self) -> None:
        """Let everybody write here."""
        _set(_address(self.bytes), self.bytes.size, _READ | _WRITE)


@dataclass(frozen=True)
class Shape:
    """How an array lies in memory: shape, strides in bytes, bytes below its first element, bytes in all."""

    lengths: tuple[int, ...]
    strides: tuple[int, ...]
    below: int
    span: int

    @classmethod
    def of(cls, lengths: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> Shape:
        if 0 in lengths:
            return cls(lengths, strides, 0, 0)
        reach = [(n - 1) * s for n, s in zip(lengths, strides, strict=True)]
        return cls(lengths, strides, -sum(min(r, 0) for r in reach), itemsize + sum(map(abs, reach)))


def strides_of(rnd: Random, lengths: tuple[int, ...], itemsize: int, *, shared: bool) -> tuple[int, ...]:
    """Draw strides in bytes.

    Parameters
    ----------
    rnd : Random
        What decides.
    lengths : tuple of int
        Lengths of the axes.
    itemsize : int
        Bytes an element.
    shared : bool
        Whether elements may share memory, as they do in arrays that are broadcast and in sliding windows.
    """
    axes = list(range(len(lengths)))
    kind = rnd.random()
    if kind < 0.4:
        return tuple(itemsize * prod(lengths[a + 1 :]) for a in axes)
    if rnd.random() < 0.5:
        rnd.shuffle(axes)
    elif rnd.random() < 0.5 and len(axes) > 1:
        axes.insert(len(axes), axes.pop(1))  # channels last
    strides = [0] * len(axes)
    step = itemsize + (rnd.randint(1, 3) if kind > 0.93 else 0)  # fields of packed records lie at odd distances
    for axis in reversed(axes):
        if kind > 0.6:
            step *= rnd.choice((1, 1, 1, 2, 3))
        strides[axis] = -step if kind > 0.5 and rnd.random() < 0.3 else step
        if shared and rnd.random() < 0.08:
            strides[axis] = 0
            continue
        if shared and rnd.random() < 0.05:
            continue  # the next axis slides over this one
        step *= max(1, lengths[axis])
    return tuple(strides)


class Placed:
    """An array in a region, and what the bytes around it were.

    Attributes
    ----------
    array : np.ndarray
        The array.
    region : Region
        Where it lies.
    window : np.ndarray
        Its bytes, and those on either side that are watched.
    below : int
        How many of these lie below it.
    """

    def __init__(self, region: Region, low: int, high: int, array: np.ndarray) -> None:
        self.region = region
        self.array = array
        self.window = region.bytes[max(0, low - MARGIN) : high + MARGIN]
        self.below = low - max(0, low - MARGIN)
        self._before = self.window.tobytes()

    def watch(self) -> None:
        """Take the bytes as they are now for those that must stay."""
        self._before = self.window.tobytes()

    def unchanged(self) -> bool:
        """Tell whether every byte is as it was."""
        return self.window.tobytes() == self._before

    def unchanged_around(self) -> bool:
        """Tell whether every byte that is not of an element is as it was."""
        own = np.zeros(self.window.size, np.uint8)
        array = self.array
        if array.size:
            first = _address(array) - _address(self.window)
            shadow: np.ndarray = np.ndarray(array.shape, f"V{array.itemsize}", own, first, array.strides)
            shadow[...] = np.frombuffer(b"\1" * array.itemsize, f"V{array.itemsize}")[0]
        before = np.frombuffer(self._before, np.uint8)
        return bool(((before == self.window) | (own == 1)).all())


class Arena:
    """Regions that are used again for every call.

    Parameters
    ----------
    count : int
        How many arrays a call may have.
    size : int
        Bytes that one of them may take.
    """

    def __init__(self, count: int, size: int) -> None:
        self._regions = [Region(size) for _ in range(count)]
        self._garbage = np.random.default_rng(0).integers(0, 256, 4 * size, np.uint8)
        self._used = 0
        self.size = self._regions[0].bytes.size

    def clear(self) -> None:
        """Take all regions for new arrays."""
        self._used = 0

    def place(self, rnd: Random, dtype: np.dtype[Any], how: Shape, *, odd: bool = False) -> Placed:
        """Return an array of garbage: at the low end of a region, at its high end, or between.

        Parameters
        ----------
        rnd : Random
            What decides.
        dtype : np.dtype
            Of the array.
        how : Shape
            How it lies in memory.
        odd : bool, optional
            Whether to start at an address that is no multiple of the item size.
        """
        region = self._regions[self._used]
        self._used += 1
        room = region.bytes.size
        push = rnd.randint(1, dtype.itemsize - 1) if odd and dtype.itemsize > 1 else 0
        where = rnd.choice(("low", "high", "between"))
        low = push
        if where == "high":
            low = room - how.span - push
        elif where == "between":
            low += min(rnd.randrange(0, 64) * 16, (room - how.span - push) // 16 * 16)
        if not push:
            low -= low % dtype.alignment
        from_, to = max(0, low - MARGIN), min(room, low + how.span + MARGIN)
        start = rnd.randrange(0, self._garbage.size - (to - from_))
        region.bytes[from_:to] = self._garbage[start : start + to - from_]
        array: np.ndarray = np.ndarray(how.lengths, dtype, region.bytes, low + how.below, how.strides)
        return Placed(region, low, low + how.span, array)


def guarded_empty(shape: Any, dtype: Any = float) -> np.ndarray:
    """Return what `numpy.empty` returns: every byte 255 (floats are NaN), the end next to a guard page."""
    kind = np.dtype(dtype)
    lengths = (int(shape),) if isinstance(shape, (int, np.integer)) else tuple(shape)
    size = int(prod(lengths)) * kind.itemsize
    region = Region(max(size, 1))
    region.bytes[:] = 255
    start = region.bytes.size - size
    start -= start % max(kind.alignment, 1)
    return region.bytes[start : start + size].view(kind).reshape(lengths)


def guarded_zeros(shape: Any, dtype: Any = float) -> np.ndarray:
    """Return what `numpy.zeros` returns, the end next to a guard page."""
    array = guarded_empty(shape, dtype)
    array.reshape(-1).view(np.uint8)[...] = 0
    return array


ALLOCATES = ("calls.prepared", "calls.gradients", "calls.memory", "cpu.backend")
"""Modules of numbanorm that have a name of their own for `numpy.empty`: `_empty`."""


@contextmanager
def guarded_outputs() -> Iterator[None]:
    """Within, what numbanorm asks NumPy for lies in guarded memory too, and what it leaves unwritten shows."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(np, "empty", guarded_empty))
        stack.enter_context(mock.patch.object(np, "zeros", guarded_zeros))
        for module in ALLOCATES:
            stack.enter_context(mock.patch(f"numbanorm.{module}._empty", guarded_empty))
        yield
