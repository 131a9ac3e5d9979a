"""The CPU kernels as plain Python: what the compiled code does to lanes is done to arrays of NumPy here.

Under NUMBA_DISABLE_JIT=1 Numba leaves functions as they are, but its intrinsics, and the overloads of a raising
function, exist for compiled code alone. `install` puts stand-ins of the same names in their place, in every module of
the backend that has imported them. So the lines of the kernels can be counted, and an index beyond an array, which
compiled code would follow, raises.

`shrink` makes chunks, tiles and blocks so small that little arrays go the ways of large ones.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numba
import numpy as np
from numba.core.extending import _Intrinsic

from numbanorm.core.dtypes import format_of
from numbanorm.cpu import launch
from numbanorm.cpu.lanes import LINE, WIDTHS

_WIDTH = {np.dtype(np.float32): WIDTHS[numba.float32], np.dtype(np.float64): WIDTHS[numba.float64]}


def _elements(array: np.ndarray) -> np.ndarray:
    """Return a flat array with half precision, which kernels get as records, as the numbers that it holds."""
    if array.dtype.names is None:
        return array
    (name,) = array.dtype.names
    return array.view(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _window(array: np.ndarray, index: int, count: int) -> np.ndarray:
    if not 0 <= index <= index + count <= array.size:
        raise IndexError(f"{count} elements from {index} on lie outside of an array of {array.size}")
    return _elements(array)[index : index + count]


def _lane_dtype(array: np.ndarray) -> np.dtype[Any]:
    form = format_of(_elements(array).dtype)
    assert form is not None
    return form.lane


def _write(lanes: np.ndarray, array: np.ndarray, index: int, count: int) -> None:
    target = _window(array, index, count)
    target[...] = (lanes[:count].astype(np.float32) if target.itemsize == 2 else lanes[:count]).astype(target.dtype)


class StandIns:
    """What replaces the functions of these names."""

    @staticmethod
    def no_lanes(array: np.ndarray) -> np.ndarray:
        dtype = _lane_dtype(array)
        return np.zeros(_WIDTH[dtype], dtype)

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
    def load_lanes(like: np.ndarray, array: np.ndarray, index: int) -> np.ndarray:
        return _window(array, index, len(like)).astype(like.dtype)

    @staticmethod
    def load_part(like: np.ndarray, array: np.ndarray, index: int, count: int) -> np.ndarray:
        lanes = np.zeros_like(like)
        count = max(0, min(count, len(like)))
        lanes[:count] = _window(array, index, count) if count else 0
        return lanes

    @staticmethod
    def load_after(like: np.ndarray, array: np.ndarray, index: int, skip: int) -> np.ndarray:
        lanes = np.zeros_like(like)
        lanes[skip:] = _window(array, index + skip, len(like) - skip)
        return lanes

    @staticmethod
    def store_lanes(lanes: np.ndarray, array: np.ndarray, index: int) -> None:
        _write(lanes, array, index, len(lanes))

    @staticmethod
    def store_part(lanes: np.ndarray, array: np.ndarray, index: int, count: int) -> None:
        if count > 0:
            _write(lanes, array, index, min(count, len(lanes)))

    @staticmethod
    def store_after(lanes: np.ndarray, array: np.ndarray, index: int, skip: int) -> None:
        _write(lanes[skip:], array, index + skip, len(lanes) - skip)

    @staticmethod
    def stream_lanes(lanes: np.ndarray, array: np.ndarray, index: int) -> None:
        if StandIns.until_line(array, index) != 0:
            raise IndexError(f"element {index} does not begin a line: the store would fault")
        _write(lanes, array, index, len(lanes))

    @staticmethod
    def settle_streams() -> None:
        pass

    @staticmethod
    def until_line(array: np.ndarray, index: int) -> int:
        address = array.__array_interface__["data"][0] + index * array.itemsize
        return int(-address % LINE // array.itemsize)

    @staticmethod
    def prefetch(like: np.ndarray, array: np.ndarray, index: int) -> None:
        pass  # anywhere: no memory need be there

    prefetch_near = prefetch

    @staticmethod
    def first_lanes(like: np.ndarray, count: int) -> np.ndarray:
        return np.arange(len(like)) < count

    @staticmethod
    def marked_lanes(like: np.ndarray, mask: np.ndarray, index: int, count: int) -> np.ndarray:
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
    def rounded(lanes: np.ndarray, array: np.ndarray) -> np.ndarray:
        return lanes.astype(_elements(array).dtype).astype(lanes.dtype)

    @staticmethod
    def sum_of_lanes(lanes: np.ndarray) -> np.float64:
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = lanes[:half] + lanes[half:]
        return np.float64(lanes[0])

    @staticmethod
    def pointer(array: Any) -> Any:
        if array is None:
            return None
        assert array.flags.c_contiguous
        return array.reshape(-1)

    @staticmethod
    def room(like: np.ndarray, count: int) -> np.ndarray:
        array = np.full(count + LINE, np.nan, like.dtype)  # what is read before it is written shows
        return array[StandIns.until_line(array, 0) :][:count]

    @staticmethod
    def load(array: np.ndarray, index: int) -> Any:
        return _lane_dtype(array).type(_window(array, index, 1)[0])

    @staticmethod
    def counts(mask: np.ndarray, index: int) -> bool:
        return bool(_window(mask, index, 1)[0])

    @staticmethod
    def store(array: np.ndarray, index: int, value: Any) -> None:
        _write(np.full(1, value), array, index, 1)

    @staticmethod
    def lane(array: np.ndarray, value: Any) -> Any:
        return _lane_dtype(array).type(value)


class _Geometry(types.SimpleNamespace):
    """One record of a call's geometry, read by name in both ways."""

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def _geometry(plan: Any, affine: bool, itemsize: int = 4) -> list[_Geometry]:
    records = _true_geometry(plan, affine, itemsize)
    return [_Geometry(**{name: int(record[name]) for name in record.dtype.names}) for record in records]


def _compiled(function: Callable[..., None], *, parallel: bool) -> Callable[..., None]:
    def run(*arguments: Any) -> None:
        with np.errstate(all="ignore"):  # compiled code tells nothing of overflow
            function(*arguments)

    return run


class _Plain:
    """What looks up a compiled kernel once: there is nothing to look up."""

    def __init__(self, kernel: Any) -> None:
        self.run = kernel.serial


_true_geometry = launch.geometry


def _modules() -> list[Any]:
    return [module for name, module in sys.modules.items() if name.startswith("numbanorm.cpu")]


def install() -> None:
    """Put the stand-ins in the place of what can be compiled only.

    Raises
    ------
    NotImplementedError
        If a kernel uses an intrinsic for which there is none.
    """
    assert numba.config.DISABLE_JIT, "NUMBA_DISABLE_JIT=1 must be set before Numba is imported"
    own = {name: value.__func__ for name, value in vars(StandIns).items() if isinstance(value, staticmethod)}
    own |= {"geometry": _geometry, "_Compiled": _Plain, "_compiled": _compiled}
    for module in _modules():
        kernels = module.__name__.rpartition(".")[2] not in ("dtypes", "jit")
        for name, value in list(vars(module).items()):
            if name in own:
                setattr(module, name, own[name])
            elif kernels and isinstance(value, _Intrinsic):
                raise NotImplementedError(f"{module.__name__}: tests/interpreter.py has no stand-in for {name}")


SMALL = {
    "CHUNK": 160,
    "BLOCK": 64,
    "BLOCK_ROWS": 8,
    "FOLD_LANES": 48,
    "FLUSH": 2,
    "FLUSH_ROWS": 4,
    "LONG_RUN": 96,
    "STREAM_FROM": 256,
    "AHEAD_FROM": 128,
    "SLAB_ELEMENTS": 480,
    "PARALLEL_FROM": 200,
    "PIECE": 256,
    "UNIT": 128,
    "UNIT_BYTES": 800,
    "ASKS_AHEAD": True,
    "TOGETHER_RUN": 100,
    "TOGETHER_SIZE": 2000,
    "SHARES": 1,
    "SPAN": 256,
    "SPANS": 2,
    "HEAD_FROM": 40,
}
"""What `shrink` sets, wherever a module of the backend has it."""


def shrink() -> None:
    """Make little arrays large."""
    for module in _modules():
        for name, value in SMALL.items():
            if hasattr(module, name):
                setattr(module, name, value)
    launch.TILE = min(launch.TILE, 64)  # type: ignore[misc]  # how wide tiles are cut, not what scratch arrays hold
