"""Everything that the backend takes from numba-cuda and cuda.core: no other module imports them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

try:
    from llvmlite import ir
    from numba import cuda
    from numba.cuda import types
    from numba.cuda.core import config
    from numba.cuda.core.errors import NumbaPerformanceWarning
    from numba.cuda.extending import intrinsic, lower_builtin, models, register_model
    from numba.cuda.typing.templates import AbstractTemplate, infer_global, signature
except ImportError as _error:
    raise ImportError('CUDA arrays need numba-cuda, which is not installed: pip install "numbanorm[cuda]"') from _error

__all__ = [
    "SIMULATED",
    "AbstractTemplate",
    "Kernel",
    "available",
    "cuda",
    "device",
    "infer_global",
    "intrinsic",
    "ir",
    "lower_builtin",
    "models",
    "register_model",
    "signature",
    "types",
    "unavailable_reason",
]

REGISTERS = 1 << 16
"""Registers of a multiprocessor: a block whose threads would need more cannot be launched."""

SIMULATED = bool(config.ENABLE_CUDASIM)
"""Whether kernels run in Numba's simulator, as the tests have them do where there is no GPU."""


@cache
def unavailable_reason() -> str | None:
    """Return why no kernel can run here, or None if one can."""
    error = cuda.cuda_error()
    if error is not None:
        return str(error)
    return None if cuda.is_available() else "no CUDA device was found"


def available() -> bool:
    """Tell whether there is a CUDA device with a driver."""
    return unavailable_reason() is None


def device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function into the kernels that call it."""
    # Simulated, it stays a plain function: the simulator's own wrapper swaps globals while other threads use them.
    return function if SIMULATED else cuda.jit(device=True, forceinline=True)(function)


class Kernel:
    """A kernel whose arguments are integers and float64 alone: addresses, sizes, strides.

    Numba's own launch wraps each of those in ctypes and lets cuda.core unwrap it again, 0.6 us an argument. cuda.core
    itself takes plain numbers at 0.01 us, so the first launch is Numba's, which compiles and loads, and all others hand
    the loaded kernel to cuda.core.

    Parameters
    ----------
    function : callable
        The kernel's Python code.
    threads : int
        Threads of a block.
    registers : int, optional
        Registers that a thread may use.
    """

    def __init__(self, function: Callable[..., None], threads: int, registers: int = 255) -> None:
        self.threads = threads
        self.registers = min(registers, REGISTERS // threads, 255)
        self.function = function
        self._dispatcher = cuda.jit(function) if SIMULATED else cuda.jit(max_registers=self.registers)(function)
        self._loaded: dict[int, Any] = {}

    def __call__(self, blocks: int, stream: int, *arguments: float) -> None:
        """Queue `blocks` blocks on a stream."""
        if SIMULATED:
            self._dispatcher[blocks, self.threads](*arguments)
            return
        loaded = self._loaded.get(_device())
        if loaded is None:
            with warnings.catch_warnings():
                # That a small array cannot fill the device is nothing that its owner could change.
                warnings.simplefilter("ignore", NumbaPerformanceWarning)
                self._dispatcher[blocks, self.threads, _stream_of_numba(stream)](*arguments)
            overload = next(iter(self._dispatcher.overloads.values()))
            self._loaded[_device()] = overload._codelibrary.get_cufunc().kernel
            return
        _launch(_stream(stream), _configuration(blocks, self.threads), loaded, *arguments)


if not SIMULATED:
    from cuda.core import LaunchConfig, Stream
    from cuda.core import launch as _launch

    @lru_cache(maxsize=1024)
    def _configuration(blocks: int, threads: int) -> Any:
        return LaunchConfig(grid=blocks, block=threads)

    @lru_cache(maxsize=1024)
    def _stream(handle: int) -> Any:
        return Stream.from_handle(handle)

    @lru_cache(maxsize=1024)
    def _stream_of_numba(handle: int) -> Any:
        return cuda.external_stream(handle) if handle else 0

    @cache
    def _devices() -> int:
        return len(cuda.gpus)

    def _device() -> int:
        return cuda.get_current_device().id if _devices() > 1 else 0
