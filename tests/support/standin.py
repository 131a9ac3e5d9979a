"""Stand-ins for what is on a machine with a GPU: arrays in device memory, streams, events, and a backend.

Device memory is that of the simulator of the kernels' tests: its addresses are none of the process, so whatever took
one for an array of the host would crash, and what reaches beyond an allocation raises. Everything but the norms'
kernels is the real thing here: what arrays say of themselves, plans, copies, streams. In the place of those kernels
stand the CPU backend's, so that results must agree with the same calls on NumPy arrays bit by bit; `use_own_kernels`
takes the CUDA kernels, simulated.

Import this before any part of `numbanorm.cuda`, in a process of its own with ``NUMBA_ENABLE_CUDASIM=1``.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
import simulator
from numba import cuda
from numpy.lib.array_utils import byte_bounds

import numbanorm.cuda.backend as backend
from numbanorm.cpu import backend as cpu
from numbanorm.cuda import copying, prepared, running
from numbanorm.cuda.memory import Span
from numbanorm.cuda.toolchain import Kernel

# --- memory -----------------------------------------------------------------------------------------------------------

HOST: list[tuple[int, int]] = []
"""Host memory that counts as device memory: that of the tensors which torch allocates in these tests."""

_BYTE = np.dtype(np.uint8)
_access = simulator.access


def _memory(address: int, nbytes: int) -> np.ndarray:
    """Return the bytes at an address, all of which must have been allocated as one."""
    if any(start <= address and address + nbytes <= stop for start, stop in HOST):
        return np.frombuffer((ctypes.c_char * nbytes).from_address(address), _BYTE)
    found = simulator.view(Span(address, _BYTE, nbytes))
    if found.size < nbytes:
        raise IndexError(f"{nbytes} bytes at {address:#x} reach outside of what was allocated")
    return found


def access(address: int, offset: int, dtype: np.dtype[Any], count: int) -> np.ndarray:
    where = int(address) + int(offset) * dtype.itemsize
    if any(start <= where < stop for start, stop in HOST):
        return _memory(where, count * dtype.itemsize).view(dtype)
    return _access(address, offset, dtype, count)


simulator.access = access


def array_of(span: Span | None) -> np.ndarray | None:
    """Return device memory as a NumPy array."""
    if span is None:
        return None
    return _memory(span.address, span.size * span.dtype.itemsize).view(span.dtype)


class Foreign:
    """An array of a library that nobody knows, in device memory, with nothing but the interface.

    All memory between the first and the last byte of a NumPy array comes along, gaps included.
    """

    def __init__(self, array: np.ndarray, stream: int | None = None, read_only: bool = False) -> None:
        low, high = byte_bounds(array) if array.size else (0, 0)
        memory = np.frombuffer((ctypes.c_char * (high - low)).from_address(low), _BYTE) if array.size else np.zeros(0)
        self.span = simulator.place(memory.astype(_BYTE))
        self.offset = array.__array_interface__["data"][0] - low if array.size else 0
        self.shape, self.strides, self.dtype = array.shape, array.strides, array.dtype
        self.contiguous = array.flags.c_contiguous
        self.stream, self.read_only = stream, read_only

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "strides": None if self.contiguous else self.strides,
            "typestr": self.dtype.str,
            "data": (self.span.address + self.offset if self.span.size else 0, self.read_only),
            "stream": self.stream,
            "version": 3,
        }

    def copy_to_host(self) -> np.ndarray:
        if not self.span.size:
            return np.empty(self.shape, self.dtype)
        memory = simulator.view(self.span)
        seen = np.ndarray(self.shape, self.dtype, memory.copy(), self.offset, self.strides)
        return seen.copy("K")

    def memory(self) -> np.ndarray:
        """Return all its bytes, gaps included."""
        return simulator.view(self.span).copy()


def host(value: Any) -> Any:
    """Return what lies in device memory: of an array of any of the libraries, or of each of a tuple."""
    if isinstance(value, tuple):
        return tuple(map(host, value))
    return value.copy_to_host() if hasattr(value, "copy_to_host") else value.numpy()


# --- numba's simulator, where it lacks what the backend needs ---------------------------------------------------------


class FakeStream:
    """A stream of which nothing is known but its handle."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __int__(self) -> int:
        return self.handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle

    def synchronize(self) -> None:
        pass


WAITS: list[tuple[int, int]] = []
"""(stream, producer) of every wait that was queued."""


class FakeEvent:
    def __init__(self, timing: bool = True) -> None:
        assert not timing

    def record(self, stream: Any) -> None:
        self.producer = int(stream)

    def wait(self, stream: Any) -> None:
        WAITS.append((int(stream), self.producer))


class DeviceNDArray(Foreign):
    """numba's device array, as far as it is asked for anything."""

    __module__ = "numba.cuda.cudadrv.devicearray"

    def copy_to_device(self, array: np.ndarray) -> None:
        assert self.contiguous
        assert (array.shape, array.dtype) == (self.shape, self.dtype)
        _memory(self.__cuda_array_interface__["data"][0], array.nbytes).view(array.dtype)[:] = array


ALLOCATIONS: list[int] = []
"""Bytes of every array that was allocated through numba, in order."""


def _device_array(shape: Any, dtype: Any, strides: Any = None, stream: Any = 0) -> DeviceNDArray:
    garbage = np.full(
        int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize, 0xFF, np.uint8
    )  # NaN, whichever float
    ALLOCATIONS.append(garbage.size)
    if garbage.size == 0:
        return DeviceNDArray(np.empty(shape, dtype), int(stream) or None)
    return DeviceNDArray(np.ndarray(shape, dtype, garbage, strides=strides), int(stream) or None)


def _as_cuda_array(value: Any, sync: bool = True) -> DeviceNDArray:
    assert not sync, "the host must not wait"
    interface = value.__cuda_array_interface__
    seen = DeviceNDArray(np.empty(0, interface["typestr"]), interface["stream"])
    seen.shape, seen.strides, seen.owner = interface["shape"], interface["strides"], value
    seen.contiguous = np.lib.stride_tricks.as_strided(
        np.empty(0, seen.dtype), seen.shape, seen.strides
    ).flags.c_contiguous
    address = interface["data"][0]
    seen.span = Span(address, _BYTE, int(np.prod(seen.shape, dtype=np.int64)) * seen.dtype.itemsize)
    return seen


class FakeDefaultStream(FakeStream):
    def __init__(self) -> None:
        super().__init__(0)


cuda.external_stream = FakeStream
cuda.default_stream = FakeDefaultStream
cuda.event = FakeEvent
cuda.device_array = _device_array
cuda.as_cuda_array = _as_cuda_array


def mover(size: int) -> Any:
    dtype = np.dtype(f"uint{8 * size}")

    def move(target: int, at: int, source: int, index: int) -> None:
        access(target, at, dtype, 1)[0] = access(source, index, dtype, 1)[0]

    return move


copying.mover = mover

# --- what is launched -------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """A kernel of the backend, or a small one."""

    name: str
    stream: int


LAUNCHES: list[Launch] = []
"""Every launch, in order."""

_run = Kernel.__call__


def _launch(self: Kernel, blocks: int, stream: int, *arguments: float) -> None:
    LAUNCHES.append(Launch(self.function.__name__, stream))
    assert all(type(a) in (int, float) for a in arguments), "the launch takes plain numbers alone"
    _run(self, blocks, stream, *arguments)


Kernel.__call__ = _launch


def _uses(workspace: Any) -> None:
    """Write to the workspace, as the kernels do, all of it."""
    for size in (64, 5000):
        span = workspace(size)
        assert span.size >= size
        array_of(span)[:] = 0xFF


def _from_first(span: Span | None, reading: Any) -> Any:
    """Return an array as the CPU's kernels take it: its memory from its first element on."""
    array = array_of(span)
    return None if array is None else array[reading.placement.start :]


def _parameter(span: Span | None, call: Any, value: int, alone: bool = False) -> Any:
    """Return a weight or bias as the CPU's kernels take it: in lanes, and always there."""
    if span is None:
        return np.full(1 if alone else call.plan.layout.size, value, call.form.lane)
    return array_of(span).astype(call.form.lane)


def _done(launch: Any, *arguments: Any) -> None:
    """Launch; where the kernel sees that memory overlaps, from copies of what it reads first."""
    if launch(*arguments):
        assert not launch(*(np.array(a) if i == 0 else a for i, a in enumerate(arguments)))


def prepare_forward(call):
    own = cpu.prepare_forward(call)

    def launch(x, residual, total, y, mask, weight, bias, stats, eps, *, stream, workspace):
        LAUNCHES.append(Launch("forward", stream))
        _uses(workspace)
        alone = weight is bias is None
        affine = _parameter(weight, call, 1, alone), _parameter(bias, call, 0, alone)
        inputs = _from_first(x, call.x), _from_first(residual, call.residual), array_of(total)
        target, kept = array_of(y)[call.target.start :], array_of(stats).reshape(4, -1)
        _done(own, *inputs, target, _from_first(mask, call.mask), *affine, kept, eps, True)

    return launch


def prepare_statistics(call):
    own = cpu.prepare_statistics(call)

    def launch(x, mask, stats, *, stream, workspace):
        LAUNCHES.append(Launch("statistics", stream))
        _uses(workspace)
        _done(own, _from_first(x, call.x), _from_first(mask, call.mask), array_of(stats).reshape(4, -1))

    return launch


def prepare_apply(call):
    def launch(x, y, weight, bias, mean, var, stats, eps, *, stream):
        if mean is not None:
            running.as_statistics(mean, var, stats, eps, stream)
        LAUNCHES.append(Launch("apply", stream))
        if call.plan.size:
            alone = weight is bias is None
            affine = _parameter(weight, call, 1, alone), _parameter(bias, call, 0, alone)
            target = array_of(y)[call.target.start :]
            arrays = _from_first(x, call.x), target, *affine, None, None, array_of(stats).reshape(4, -1)
            _done(cpu.prepare_apply(call), *arrays, eps)

    return launch


def prepare_backward(call, fixed):
    own = cpu.prepare_backward(call, fixed)

    def launch(dy, x, dx, mask, weight, mean, rstd, gradients, *, stream, workspace):
        LAUNCHES.append(Launch("backward", stream))
        _uses(workspace)
        found = np.empty((2, call.plan.layout.size), call.form.lane)
        inputs = _from_first(dy, call.dy), _from_first(x, call.x)
        statistics = array_of(mean), array_of(rstd)
        marked = None if mask is None else _from_first(mask, call.mask)
        _done(own, *inputs, array_of(dx), marked, _parameter(weight, call, 1), *statistics, found)
        for span, values in zip(gradients, found, strict=False):
            array_of(span)[:] = values

    return launch


_STAND_INS = (prepare_forward, prepare_statistics, prepare_apply, prepare_backward)
_OWN = {function.__name__: getattr(backend, function.__name__) for function in _STAND_INS}


def use_own_kernels() -> None:
    for name, function in _OWN.items():
        setattr(backend, name, function)
    prepared.forget()


def use_cpu_kernels() -> None:
    for function in _STAND_INS:
        setattr(backend, function.__name__, function)
    prepared.forget()
