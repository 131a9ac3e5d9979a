"""The CPU kernels as plain Python: what the compiled code does to lanes is done to arrays of NumPy here.

Under NUMBA_DISABLE_JIT=1 Numba leaves functions as they are, but its intrinsics, and the overloads of a raising
function, exist for compiled code alone. `install` puts stand-ins of the same names in their place, in every module of
the backend that has imported them. So the lines of the kernels can be counted, and an address beyond an array's memory,
which compiled code would follow, raises; so does an argument that is none of the type for which a kernel was bound,
which compiled code would take for one.

`shrink` makes chunks, tiles and blocks so small that little arrays go the ways of large ones.
"""

from __future__ import annotations

import ctypes
import pkgutil
import threading
import types
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import numba
import numpy as np
import sharing
from numba.core.extending import _Intrinsic

import numbanorm.cpu
from numbanorm.calls import host
from numbanorm.core.dtypes import format_of
from numbanorm.cpu import board, jit, launch, profile
from numbanorm.cpu.address import Address, address_type
from numbanorm.cpu.helpers import MOST
from numbanorm.cpu.lanes import LINE, WIDTHS
from numbanorm.cpu.profile import EMERALD_RAPIDS

_WIDTH = {np.dtype(np.float32): WIDTHS[numba.float32], np.dtype(np.float64): WIDTHS[numba.float64]}


class Place:
    """An address, and the memory that may be read and written around it.

    Parameters
    ----------
    memory : np.ndarray
        All elements of that memory, one after the other.
    first : int
        Which of them lies at the address.
    """

    __slots__ = ("first", "memory")

    def __init__(self, memory: np.ndarray, first: int) -> None:
        self.memory, self.first = memory, first

    @classmethod
    def of(cls, array: np.ndarray) -> Place:
        """Return the address of an array's first element; its memory is all that lies between two elements of it."""
        if array.size == 0:
            return cls(np.empty(0, array.dtype), 0)
        steps = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
        below, beyond = (sum(step for step in steps if step * sign > 0) for sign in (-1, 1))
        assert below % array.itemsize == beyond % array.itemsize == 0, "no kernel reads such strides"
        lowest = array[tuple(slice(None, None, -1) if step < 0 else slice(None) for step in steps)]
        count = (beyond - below) // array.itemsize + 1
        flat = np.lib.stride_tricks.as_strided(lowest, (count,), (array.itemsize,))
        return cls(flat, -below // array.itemsize)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the elements."""
        return self.memory.dtype

    def window(self, index: int, count: int) -> np.ndarray:
        """Return some elements, counted from the address.

        Raises
        ------
        IndexError
            If they are not all there.
        """
        start = self.first + index
        if not 0 <= start <= start + count <= self.memory.size:
            raise IndexError(
                f"{count} elements from {index} on lie outside of memory that begins {-self.first} on, "
                f"and holds {self.memory.size}"
            )
        return self.memory[start : start + count]

    def address(self, index: int = 0) -> int:
        """Return where an element lies."""
        return _address(self.memory) + (self.first + int(index)) * self.memory.itemsize


def _address(array: np.ndarray) -> int:
    start: int = array.__array_interface__["data"][0]
    return start


def _lane_dtype(place: Place) -> np.dtype[Any]:
    form = format_of(place.dtype)
    assert form is not None
    return form.lane


def _write(lanes: np.ndarray, place: Place, index: int, count: int) -> None:
    target = place.window(index, count)
    target[...] = (lanes[:count].astype(np.float32) if target.itemsize == 2 else lanes[:count]).astype(target.dtype)


_JOBS = threading.Lock()
_LOCKS: list[threading.Lock] = []
"""Those that helpers wait for, by their numbers less one."""


class StandIns:
    """What replaces the functions of these names."""

    @staticmethod
    def no_lanes(array: Place) -> np.ndarray:
        dtype = _lane_dtype(array)
        return np.zeros(_WIDTH[dtype], dtype)

    @staticmethod
    def lanes_for(array: Place, half: bool | None) -> np.ndarray:
        lanes = StandIns.no_lanes(array)
        return lanes if half is None else lanes[: len(lanes) // 2]

    @staticmethod
    def no_exact_lanes() -> np.ndarray:
        return np.zeros(WIDTHS[numba.float64])

    @staticmethod
    def width_of(lanes: np.ndarray) -> int:
        return len(lanes)

    @staticmethod
    def all_lanes(like: np.ndarray, value: Any) -> np.ndarray:
        return np.full_like(like, value)

    @staticmethod
    def load_lanes(like: np.ndarray, array: Place, index: int) -> np.ndarray:
        return array.window(index, len(like)).astype(like.dtype)

    @staticmethod
    def load_part(like: np.ndarray, array: Place, index: int, count: int) -> np.ndarray:
        lanes = np.zeros_like(like)
        count = max(0, min(count, len(like)))
        lanes[:count] = array.window(index, count) if count else 0
        return lanes

    @staticmethod
    def load_after(like: np.ndarray, array: Place, index: int, skip: int) -> np.ndarray:
        lanes = np.zeros_like(like)
        lanes[skip:] = array.window(index + skip, len(like) - skip)
        return lanes

    @staticmethod
    def store_lanes(lanes: np.ndarray, array: Place, index: int) -> None:
        _write(lanes, array, index, len(lanes))

    @staticmethod
    def store_part(lanes: np.ndarray, array: Place, index: int, count: int) -> None:
        if count > 0:
            _write(lanes, array, index, min(count, len(lanes)))

    @staticmethod
    def store_after(lanes: np.ndarray, array: Place, index: int, skip: int) -> None:
        _write(lanes[skip:], array, index + skip, len(lanes) - skip)

    @staticmethod
    def stream_lanes(lanes: np.ndarray, array: Place, index: int) -> None:
        if StandIns.until_line(array, index) != 0:
            raise IndexError(f"element {index} does not begin a line: the store would fault")
        _write(lanes, array, index, len(lanes))

    @staticmethod
    def settle_streams() -> None:
        pass

    @staticmethod
    def until_line(array: Place, index: int) -> int:
        return -array.address(index) % LINE // array.dtype.itemsize

    @staticmethod
    def prefetch(like: np.ndarray, array: Place, index: int) -> None:
        pass  # anywhere: no memory need be there

    prefetch_near = prefetch

    @staticmethod
    def first_lanes(like: np.ndarray, count: int) -> np.ndarray:
        return np.arange(len(like)) < count

    @staticmethod
    def marked_lanes(like: np.ndarray, mask: Place, index: int, count: int) -> np.ndarray:
        return StandIns.load_part(np.zeros(len(like), bool), mask, index, count)

    @staticmethod
    def choose(choice: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        return np.where(choice, lanes, lanes.dtype.type(0))

    @staticmethod
    def blended(choice: np.ndarray, lanes: np.ndarray, others: np.ndarray) -> np.ndarray:
        return np.where(choice, lanes, others)

    @staticmethod
    def chosen_count(choice: np.ndarray) -> int:
        return int(choice.sum())

    @staticmethod
    def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return a * b + c

    @staticmethod
    def rounded(lanes: np.ndarray, array: Place) -> np.ndarray:
        return lanes.astype(array.dtype).astype(lanes.dtype)

    @staticmethod
    def sum_of_lanes(lanes: np.ndarray) -> np.float64:
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = lanes[:half] + lanes[half:]
        return np.float64(lanes[0])

    @staticmethod
    def store_sums(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, array: Place, index: int) -> None:
        array.window(index, 4)[...] = [StandIns.sum_of_lanes(lanes) for lanes in (a, b, c, d)]

    @staticmethod
    def pointer(array: Any) -> Any:
        return array if array is None or isinstance(array, Place) else Place.of(array)

    @staticmethod
    def record(array: Place) -> types.SimpleNamespace:
        (first,) = array.window(0, 1)
        return types.SimpleNamespace(**{name: int(first[name]) for name in first.dtype.names})

    @staticmethod
    def number(array: Place | None) -> int:
        return 0 if array is None else array.address()

    @staticmethod
    def shifted(array: Place, count: int) -> Place:
        return Place(array.memory, array.first + count)

    @staticmethod
    def retyped(array: Place, like: Place) -> Place:
        return Place(array.memory.view(like.dtype), array.first * array.dtype.itemsize // like.dtype.itemsize)

    @staticmethod
    def room(like: Place, count: int) -> Place:
        array = np.full(count + LINE, np.nan, like.dtype)  # what is read before it is written shows
        start = StandIns.until_line(Place(array, 0), 0)
        return Place(array[start : start + count], 0)

    @staticmethod
    def _look(job: Place, place: int) -> int:
        return int(job.window(place, 1)[0])

    @staticmethod
    def _tell(job: Place, place: int, value: int) -> None:
        job.window(place, 1)[...] = value

    @staticmethod
    def _add(job: Place, place: int, value: int) -> int:
        with _JOBS:
            before = StandIns._look(job, place)
            StandIns._tell(job, place, before + value)
        return before

    @staticmethod
    def _swap(job: Place, place: int, old: int, new: int) -> bool:
        with _JOBS:
            found = StandIns._look(job, place) == old
            if found:
                StandIns._tell(job, place, new)
        return found

    @staticmethod
    def _at(number: int) -> Place:
        words = (ctypes.c_int64 * (board.HELPERS + board.OF_HELPER * MOST)).from_address(number)
        return Place(np.frombuffer(words, np.int64), 0)

    @staticmethod
    def _new_lock() -> int:
        _LOCKS.append(threading.Lock())
        return len(_LOCKS)

    @staticmethod
    def _wait_for(lock: int) -> None:
        _LOCKS[lock - 1].acquire()

    @staticmethod
    def _release(lock: int) -> None:
        _LOCKS[lock - 1].release()

    @staticmethod
    def _run(board: Place, job: Place) -> int:
        function, places = _OFFERED[board.address()]
        try:
            function(job, *places)
        except Exception:
            return -1
        return 0

    @staticmethod
    def load(array: Place, index: int) -> Any:
        return _lane_dtype(array).type(array.window(index, 1)[0])

    @staticmethod
    def counts(mask: Place, index: int) -> bool:
        return bool(mask.window(index, 1)[0])

    @staticmethod
    def store(array: Place, index: int, value: Any) -> None:
        _write(np.full(1, value), array, index, 1)

    @staticmethod
    def lane(array: Place, value: Any) -> Any:
        return _lane_dtype(array).type(value)


def _fits(kind: Any, value: Any) -> bool:
    """Tell whether compiled code may take an argument as one of a type: it looks at no array before it reads it."""
    if kind == numba.none:
        return value is None
    if isinstance(kind, Address):
        return isinstance(value, np.ndarray) and _address_type(value.dtype) == kind
    if kind == numba.boolean:
        return isinstance(value, (bool, np.bool_))
    if kind == numba.int64:
        return isinstance(value, (int, np.integer))
    return kind == numba.float64 and isinstance(value, (float, np.floating))


def _address_type(dtype: np.dtype[Any]) -> Any:
    return address_type(dtype) if dtype.isnative else None


_OFFERED: dict[int, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
"""What is on each board, by its address: a kernel and its arguments but for the job."""


def _offer(function: Callable[..., Any], job: Place, places: tuple[Any, ...]) -> None:
    """Put a call on its board, as the code around a compiled kernel does; see `numbanorm.cpu.board`."""
    number = StandIns._look(job, board.JOB_BOARD)
    if number == 0:
        return
    words = StandIns._at(number)
    if not StandIns._swap(words, board.BUSY, 0, 1):
        StandIns._tell(job, board.JOB_BOARD, 0)
        return
    StandIns._tell(job, board.JOB_MINE, 1)
    for place in (board.TOTAL, board.DONE, board.FAILED):
        StandIns._tell(words, place, 0)
    call = (StandIns._look(words, board.TICKET) >> board.CALL_BITS) + 1
    StandIns._tell(words, board.TICKET, call << board.CALL_BITS)
    StandIns._tell(words, board.LIMIT, StandIns._look(job, board.JOB_LIMIT))
    _OFFERED[number] = function, places


def _bound(kernel: jit.Kernel, *signature: Any, parallel: bool = False) -> Callable[..., Any]:
    """Return what calls a kernel as the plain function that it is; stands in for `Kernel.bound`."""
    function: Callable[..., Any] = kernel._function

    def run(*arguments: Any) -> Any:
        for kind, value in zip(signature, arguments, strict=True):
            if not _fits(kind, value):
                shown = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else repr(value)
                raise TypeError(f"{function.__module__}.{function.__name__} was bound for {kind}, and got {shown}")
        if kernel.shares:
            _offer(function, Place.of(arguments[0]), arguments[1:])
        with np.errstate(all="ignore"):  # compiled code tells nothing of overflow
            return function(*arguments)

    return run


def _modules() -> list[Any]:
    """Return all modules of the CPU backend: one that is imported only later would go on compiling."""
    return [import_module(found.name) for found in pkgutil.walk_packages(numbanorm.cpu.__path__, "numbanorm.cpu.")]


def install() -> None:
    """Put the stand-ins in the place of what can be compiled only.

    Raises
    ------
    NotImplementedError
        If a kernel uses an intrinsic for which there is none.
    """
    assert numba.config.DISABLE_JIT, "NUMBA_DISABLE_JIT=1 must be set before Numba is imported"
    own = {name: value.__func__ for name, value in vars(StandIns).items() if isinstance(value, staticmethod)}
    jit.Kernel.bound = _bound  # type: ignore[method-assign]
    for module in _modules():
        for name, value in list(vars(module).items()):
            if not isinstance(value, _Intrinsic):
                continue
            if name in own:
                setattr(module, name, own[name])
            elif module.__name__ != "numbanorm.cpu.dtypes":  # which has conversions that no kernel calls
                raise NotImplementedError(f"{module.__name__}: tests/support/interpreter.py has no stand-in for {name}")
    _forget()


def _forget() -> None:
    launch.geometry.cache_clear()
    host.forget()


SMALL = {
    "CHUNK": 160,
    "BLOCK": 64,
    "BLOCK_ROWS": 8,
    "FOLD_LANES": 48,
    "FLUSH": 2,
    "FLUSH_ROWS": 4,
    "LONG_RUN": 96,
    "SLAB_ELEMENTS": 480,
    "LOOKS": 4,
    "_TURNS": 4,
    "PIECE": 256,
    "UNIT": 128,
    "TOGETHER_RUN": 100,
    "SHARES": 1,
    "SPAN": 256,
    "SPANS": 2,
    "HEAD_FROM": 40,
}
"""What `shrink` sets, wherever a module of the backend has it."""

_PROFILE = replace(
    EMERALD_RAPIDS,  # which does all that any does
    name="shrunk",
    stream_from=256,
    ahead_from=128,
    unit_bytes=800,
    together_size=2000,
    share_from=200,
    wake_from=200,
    share=200,
    numba_from=200,
)


def shrink() -> None:
    """Make little arrays large.

    Raises
    ------
    AttributeError
        If no module has what is to be set.
    """
    modules = _modules()
    for name, value in SMALL.items():
        found = [module for module in modules if hasattr(module, name)]
        if not found:
            raise AttributeError(f"no module of numbanorm.cpu has {name}")
        for module in found:
            setattr(module, name, value)
    profile.use(_PROFILE)
    sharing.always(elements=_PROFILE.share_from)
    launch.TILE = min(launch.TILE, 64)  # type: ignore[misc]  # how wide tiles are cut, not what scratch arrays hold
    _forget()
