"""A GPU of NumPy arrays for Numba's simulator: memory that knows its bounds, warps, lanes.

Import it before numbanorm.cuda. Numba's simulator has no warp operations and runs every thread of a block as a thread
of the process. Here threads are greenlets, which switch where the hardware would wait. Between two barriers they run in
a random order, so that a barrier too few shows; loads and stores outside of what was allocated, or not aligned to their
width, raise.

What one thread holds as lanes is a NumPy array here; the functions that make, join, load and store lanes are replaced
by ones that do the same to arrays. All else is the kernels' own code.
"""

from __future__ import annotations

import os

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"

import contextlib
import random
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import greenlet
import ml_dtypes
import numpy as np
from numba.cuda.simulator import kernel as simulator_kernel
from numba.cuda.simulator import kernelapi

from numbanorm.cuda import affine, lanes, memory, toolchain
from numbanorm.cuda.memory import Span

WARP = 32
RANDOM = random.Random(0)

# --- memory ---------------------------------------------------------------------------------------------------------

_SPACING = 1 << 32
_buffers: dict[int, np.ndarray] = {}


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def allocate(size: int, dtype: Any, shift: int = 0) -> Span:
    """Return a span of garbage, `shift` elements beyond an address of 256 bytes' alignment."""
    dtype = np.dtype(dtype)
    base = (len(_buffers) + 1) * _SPACING
    _buffers[base // _SPACING] = np.full((size + shift) * dtype.itemsize, 0xFF, np.uint8)
    return Span(base + shift * dtype.itemsize, dtype, size)


def place(array: np.ndarray, shift: int = 0) -> Span:
    """Return a span that holds a flat array."""
    span = allocate(array.size, array.dtype, shift)
    view(span)[...] = array
    return span


def view(span: Span) -> np.ndarray:
    """Return the elements of a span, to read or to write."""
    start = span.address % _SPACING
    found = _buffers[span.address // _SPACING][start : start + span.size * span.dtype.itemsize]
    return found.view(span.dtype)


def clear() -> None:
    _buffers.clear()


def access(address: int, offset: int, dtype: np.dtype[Any], count: int) -> np.ndarray:
    """Return neighbours in memory, which must lie in one allocation and be aligned to the words they are moved in."""
    where = int(address) + int(offset) * dtype.itemsize
    nbytes = count * dtype.itemsize
    buffer = _buffers.get(where // _SPACING)
    start = where % _SPACING
    if buffer is None or start + nbytes > len(buffer):
        raise IndexError(f"{count} x {dtype} at {where:#x} lie outside of what was allocated")
    if where % min(nbytes, memory.WORD):
        raise IndexError(f"{count} x {dtype} at {where:#x} are not aligned")
    return buffer[start : start + nbytes].view(dtype)


# --- lanes ----------------------------------------------------------------------------------------------------------


def _scalar_type(lane: Any) -> Any:
    return np.float32 if lane == toolchain.types.float32 else np.float64


def _pick(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, np.ndarray):
        return np.where(condition, a, b)
    return a if condition else b


def _joined(value: np.ndarray, width: int) -> Any:
    """Add lanes that lie `width` apart, by halves."""
    while len(value) > width:
        half = len(value) // 2
        value = value[:half] + value[half:]
    return value[0] if width == 1 else value


@cache
def _fold(width: int) -> Any:
    return lambda value: _joined(value, width)


@cache
def _count(width: int, element: Any) -> Any:
    return lambda choice: _joined(choice.astype(_scalar_type(element)), width)


@cache
def _first(width: int) -> Any:
    def found(choice: np.ndarray, value: np.ndarray) -> Any:
        rows, values = choice.reshape(-1, width), value.reshape(-1, width)
        number = rows.argmax(axis=0)
        result = np.where(rows.any(axis=0), values[number, np.arange(width)], values.dtype.type(0))
        return result[0] if width == 1 else result

    return found


@cache
def _tile(width: int) -> Any:
    def tiled(value: Any) -> np.ndarray:
        value = np.atleast_1d(value)
        return np.tile(value, width // len(value))

    return tiled


def _put(array: np.ndarray, at: int, value: Any) -> None:
    value = np.atleast_1d(value)
    array[at : at + len(value)] = value


lanes.pick = _pick
lanes.some = lambda condition: bool(np.any(condition))
lanes.like = lambda value, scalar: np.full_like(value, scalar) if isinstance(value, np.ndarray) else scalar
lanes.choose = lambda choice, value: np.where(choice, value, value.dtype.type(0))
lanes.narrowed = lambda value: value.astype(np.float32)
lanes.widened = lambda value: value.astype(np.float64)
lanes.inverse = lambda value: np.asarray(value).dtype.type(1) / value
lanes.inverse_root = lambda value: np.float64(1) / np.sqrt(np.float64(value))
lanes.fold, lanes.count, lanes.first, lanes.tile, lanes.put = _fold, _count, _first, _tile, _put

# --- loads and stores -----------------------------------------------------------------------------------------------


def _places(rule: str, vector: int, count: int, p: int, step: int, limit: int, run: int, stride: int) -> Iterator[Any]:
    for i in range(count):
        q = p + i * step
        if rule in ("flat", "whole"):
            assert rule == "flat" or (q < limit) == (p < limit)
            row, within = 0, q * vector
            offset = within
        elif rule == "runs":
            row, within = q // run, q % run * vector
            offset = row * stride + within
        else:
            row, within, offset = q, 0, q * stride
        yield i * vector, q < limit, offset, row, within


@cache
def _loader(name: str, lane: Any, vector: int, count: int, rule: str) -> Any:
    dtype, scalar = dtype_of(name), _scalar_type(lane)

    def load(address: int, *place: int) -> np.ndarray:
        result = np.zeros(vector * count, scalar)
        for i, there, offset, _, _ in _places(rule, vector, count, *place):
            if there:
                result[i : i + vector] = access(address, offset, dtype, vector).astype(scalar)
        return result

    return load


@cache
def _raw_loader(name: str, lane: Any, vector: int, count: int, rule: str) -> Any:
    load, dtype = _loader(name, lane, vector, count, rule), dtype_of(name)
    return lambda *place: load(*place).astype(dtype if name in ("float16", "bfloat16") else _scalar_type(lane))


@cache
def _unpacker(name: str, lane: Any, vector: int, count: int) -> Any:
    return lambda raw: raw.astype(_scalar_type(lane))


@cache
def _affine_storer(
    name: str, lane: Any, vector: int, count: int, rule: str, weight: str, bias: str, stored: str = ""
) -> Any:
    dtype, scalar = dtype_of(name), _scalar_type(lane)
    gathers = [
        _gatherer(kind.replace("same", "along") or "piece", lane, vector, count, rule, stored)
        for kind in (weight, bias)
    ]

    def store(
        address: int, p: int, step: int, limit: int, run: int, stride: int, values: np.ndarray,
        w: int, b: int, start: int, packed: int, inner: int, size: int,
    ) -> None:  # fmt: skip
        assert values.dtype == scalar
        for kind, source, gather, join in ((weight, w, gathers[0], np.multiply), (bias, b, gathers[1], np.add)):
            if kind:
                first = {"along": start % size, "same": 0}.get(kind, start)
                values = join(values, gather(source, first, p, step, limit, run, packed, inner, size))
        for i, there, offset, _, _ in _places(rule, vector, count, p, step, limit, run, stride):
            if there:
                access(address, offset, dtype, vector)[...] = values[i : i + vector].astype(dtype)

    return store


@cache
def _storer(name: str, lane: Any, vector: int, count: int, rule: str) -> Any:
    plain = _affine_storer(name, lane, vector, count, rule, "", "")

    def store(address: int, *rest: Any) -> None:
        plain(address, *rest, 0, 0, 0, 0, 1, 1)

    return store


@cache
def _chooser(kind: str, vector: int, count: int, rule: str) -> Any:
    def chosen(mask: int, *place: int) -> np.ndarray:
        result = np.zeros(vector * count, bool)
        for i, there, offset, row, _ in _places(rule, vector, count, *place):
            if not there:
                continue
            if kind == "all":
                result[i : i + vector] = True
            elif kind == "elements":
                result[i : i + vector] = access(mask, offset, np.dtype(bool), vector)
            else:
                result[i : i + vector] = access(mask, row * place[4], np.dtype(bool), 1)[0]
        return result

    return chosen


@cache
def _gatherer(kind: str, lane: Any, vector: int, count: int, rule: str, stored: str = "") -> Any:
    scalar = np.dtype(_scalar_type(lane))
    dtype = dtype_of(stored) if stored else scalar

    def gather(address: int, start: int, *rest: int) -> np.ndarray:
        *place, inner, size = rest
        result = np.zeros(vector * count, scalar)
        if kind == "shared":
            result[:] = access(address, start // inner % size, dtype, 1)[0]
            return result
        for i, there, offset, _, within in _places(rule, vector, count, *place):
            if not there:
                continue
            if kind == "along":
                result[i : i + vector] = access(address, start + within, dtype, vector)
            else:
                for j in range(vector):
                    flat = start + offset + (j if kind == "element" else 0)
                    result[i + j] = access(address, flat // inner % size, dtype, 1)[0]
        return result

    return gather


@cache
def _rounder(name: str, lane: Any, width: int) -> Any:
    return lambda values: values.astype(dtype_of(name)).astype(_scalar_type(lane))


_DOUBLE = np.dtype(np.float64)


def _write_number(address: int, index: int, value: float) -> None:
    access(address, index, _DOUBLE, 1)[0] = value


memory.loader, memory.storer, affine.affine_storer = _loader, _storer, _affine_storer
memory.raw_loader, memory.unpacker = _raw_loader, _unpacker
memory.chooser, affine.gatherer, memory.rounder = _chooser, _gatherer, _rounder
memory.read_number = lambda address, index: access(address, index, _DOUBLE, 1)[0]
memory.write_number = _write_number

# --- threads --------------------------------------------------------------------------------------------------------


class _Thread(greenlet.greenlet):
    """One thread of a block; it switches to the block's loop with the names of those it waits for."""

    def __init__(self, block: tuple[int, int, int], number: int, run: Any) -> None:
        super().__init__(run)
        self.blockIdx = kernelapi.Dim3(*block)
        self.threadIdx = kernelapi.Dim3(number, 0, 0)
        self.number = number
        self.waits: Any = None
        self.posted: Any = None


class _Block:
    """Runs one block; takes the place of Numba's BlockManager, for blocks of one dimension."""

    def __init__(self, function: Any, grid: Any, block: Any, debug: bool) -> None:
        self.function, self.threads = function, block[0]

    def run(self, at: tuple[int, int, int], *arguments: Any) -> None:
        shared.clear()

        def body() -> None:
            with np.errstate(all="ignore"):
                self.function(*arguments)

        live = [_Thread(at, i, body) for i in range(self.threads)]
        warp = -1
        while live:
            # One warp runs as far ahead as barriers let it, in whatever order its threads come.
            able = [thread for thread in live if thread.waits is None]
            if not any(thread.number // WARP == warp for thread in able):
                warp = RANDOM.choice(able).number // WARP
            own = [thread for thread in able if thread.number // WARP == warp]
            RANDOM.shuffle(own)
            for thread in own:
                thread.switch()
            live = [thread for thread in live if not thread.dead]
            waiting: dict[Any, list[_Thread]] = {}
            for thread in live:
                if thread.waits is not None:
                    waiting.setdefault(thread.waits, []).append(thread)
            moved = False
            for waits, threads in waiting.items():
                if len(threads) == (self.threads if waits == "block" else min(WARP, self.threads - waits[0] * WARP)):
                    moved = True
                    posted = {thread.number % WARP: thread.posted for thread in threads}
                    for thread in threads:
                        thread.waits, thread.posted = None, posted
            if live and not moved and all(thread.waits is not None for thread in live):
                raise RuntimeError(f"threads wait at different barriers: { {k: len(v) for k, v in waiting.items()} }")


def _this() -> Any:
    return greenlet.getcurrent()


def _wait(waits: Any, value: Any = None) -> Any:
    thread = _this()
    thread.waits, thread.posted = waits, value
    thread.parent.switch()
    return thread.posted


def _exchange(operation: str, mask: int, value: Any) -> tuple[dict[int, Any], int]:
    assert mask == 0xFFFFFFFF, "all lanes of a warp take part"
    number = _this().number
    return _wait((number // WARP, operation), value), number % WARP


def _shuffle(name: str, source: Any) -> Any:
    def shuffle(self: Any, mask: int, value: Any, amount: int) -> Any:
        posted, lane = _exchange(name, mask, value)
        return posted[source(lane, int(amount))]

    return shuffle


class _Shared:
    """Shared memory: one array for each place in the code that asks for one."""

    def __init__(self) -> None:
        self._arrays: dict[Any, np.ndarray] = {}

    def clear(self) -> None:
        self._arrays.clear()

    def array(self, size: int, element: Any) -> np.ndarray:
        frame = sys._getframe(1)
        key = frame.f_code, frame.f_lineno
        if key not in self._arrays:
            self._arrays[key] = np.full(size, np.nan, _scalar_type(element))
        return self._arrays[key]


shared = _Shared()
_module = kernelapi.FakeCUDAModule
_module.shfl_sync = _shuffle("shfl", lambda lane, source: source % WARP)
_module.shfl_xor_sync = _shuffle("shfl_xor", lambda lane, bits: lane ^ bits)
_module.any_sync = lambda self, mask, value: any(_exchange("any", mask, bool(value))[0].values())
_module.syncthreads = lambda self: _wait("block") and None
_module.threadIdx = property(lambda self: _this().threadIdx)
_module.blockIdx = property(lambda self: _this().blockIdx)
_module.shared = property(lambda self: shared)


@contextlib.contextmanager
def _swapped(function: Any, fake: Any) -> Iterator[None]:
    """Put the simulated module in the place of ``numba.cuda`` in every module of the backend."""
    modules = [m for name, m in sys.modules.items() if name.startswith("numbanorm.cuda.") and hasattr(m, "cuda")]
    for module in modules:
        module.cuda = fake
    try:
        yield
    finally:
        for module in modules:
            module.cuda = toolchain_cuda


toolchain_cuda = toolchain.cuda
simulator_kernel.BlockManager = _Block
simulator_kernel.swapped_cuda_module = _swapped
