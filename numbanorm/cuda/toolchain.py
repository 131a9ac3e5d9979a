"""Everything that the backend takes from numba-cuda and cuda.core: no other module imports them."""

from __future__ import annotations

import inspect
import os
import re
import threading
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

try:
    from cuda.core import LaunchConfig, Linker, LinkerOptions, ObjectCode, Stream
    from cuda.core import launch as _launch
    from cuda.core.utils import FileStreamProgramCache
    from llvmlite import ir
    from numba import cuda
    from numba.cuda import types
    from numba.cuda.core import config
    from numba.cuda.extending import intrinsic, lower_builtin, models, register_model
    from numba.cuda.typing.templates import AbstractTemplate, infer_global, signature
except ImportError as _error:
    raise ImportError('CUDA arrays need numba-cuda, which is not installed: pip install "numbanorm[cuda]"') from _error

from ..core.stamp import stamp_of

__all__ = [
    "SIMULATED",
    "AbstractTemplate",
    "Kernel",
    "available",
    "cuda",
    "device",
    "has_clusters",
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


class Assembled(NamedTuple):
    """A kernel's code for one kind of device.

    Attributes
    ----------
    ptx : str
        As Numba compiled it.
    cubin : bytes
        What the assembler made of that.
    log : str
        What it said: registers, spills, shared memory.
    """

    ptx: str
    cubin: bytes
    log: str


_FLOATS = ("eps", "momentum", "value")
"""Arguments of kernels that are float64; all others are int64: addresses, sizes, strides."""

CACHE_BYTES = 1 << 28
"""Room for the code on disk: a kernel takes 10 to 60 KB, and versions come and go."""


class Kernel:
    """A kernel whose arguments are integers and float64 alone: addresses, sizes, strides.

    Numba's own launch wraps each of those in ctypes and lets cuda.core unwrap it again, 0.6 us an argument. cuda.core
    itself takes plain numbers at 0.01 us. So Numba compiles; cuda.core assembles, keeps on disk, loads and launches.

    Parameters
    ----------
    function : callable
        The kernel's Python code, made by a function of its module.
    made_from : tuple
        The arguments of that function: with its name they tell this kernel from all others.
    threads : int
        Threads of a block.
    registers : int, optional
        Registers that a thread may use on devices of compute capability 9.0 and later.
    cluster : int, optional
        Blocks of a cluster, of which the number of blocks must be a multiple.
    """

    def __init__(
        self,
        function: Callable[..., None],
        made_from: tuple[Any, ...],
        threads: int,
        registers: int = 255,
        cluster: int = 1,
    ) -> None:
        self.function = function
        self.made_from = made_from
        self.threads = threads
        self.cluster = cluster
        self.registers = registers
        self.name = f"numbanorm_{function.__name__}"
        self._simulated = cuda.jit(function) if SIMULATED else None
        self._loaded: dict[int, Any] = {}

    def __call__(self, blocks: int, stream: int, *arguments: float) -> None:
        """Queue `blocks` blocks on a stream."""
        if self._simulated is not None:
            self._simulated[blocks, self.threads](*arguments)
            return
        device = _device()
        loaded = self._loaded.get(device)
        if loaded is None:
            loaded = self._loaded[device] = self._load(tuple(cuda.get_current_device().compute_capability))
        _launch(_stream(stream), _configuration(blocks, self.threads, self.cluster), loaded, *arguments)

    def registers_on(self, capability: tuple[int, int]) -> int:
        """Return how many registers a thread may use on devices of a compute capability."""
        wanted = self.registers if capability >= (9, 0) else 255  # for older ones the assembler needs more
        return min(wanted, REGISTERS // self.threads, 255)

    def assemble(self, capability: tuple[int, int]) -> Assembled:
        """Compile the kernel for devices of a compute capability."""
        names = inspect.signature(self.function).parameters
        signature = tuple(types.float64 if name in _FLOATS else types.int64 for name in names)
        ptx, _ = cuda.compile_ptx(self.function, signature, cc=capability)
        (entry,) = re.findall(r"\.entry (\w+)", ptx)
        ptx = ptx.replace(entry, self.name)
        options = LinkerOptions(
            arch="sm_{}{}".format(*capability), ptxas_options=["-v"], max_register_count=self.registers_on(capability)
        )
        linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
        return Assembled(ptx, linker.link("cubin").code, linker.get_info_log())

    def _load(self, capability: tuple[int, int]) -> Any:
        """Return the loaded kernel, from disk if it is there.

        Raises
        ------
        TypeError
            If the device is too old for its dtype.
        """
        if capability < (8, 0) and "bfloat16" in repr(self.made_from):
            raise TypeError(
                "bfloat16: expected a device of compute capability 8.0 or later, got {}.{}".format(*capability)
            )
        path = f"{self.function.__module__}.{self.function.__qualname__}"
        stamp = _stamp(Path(inspect.getfile(self.function)))
        key = repr((path, self.made_from, self.registers, capability, stamp)).encode()
        try:
            cubin = _store().get(key)
            if cubin is not None:
                return ObjectCode.from_cubin(cubin).get_kernel(self.name)
        except Exception as error:  # whatever loading garbage may raise
            _warn_no_cache(f"cannot read it: {error!r}")
        cubin = self.assemble(capability).cubin
        try:
            _store()[key] = cubin
        except OSError as error:
            _warn_no_cache(f"cannot write it: {error!r}")
        return ObjectCode.from_cubin(cubin).get_kernel(self.name)


@cache
def _store() -> Any:
    """Return the kernels' code on disk: in NUMBA_CACHE_DIR, beside the package, or in the user's cache folder."""
    folder = Path(config.CACHE_DIR or Path(__file__).with_name("__pycache__")) / "numbanorm-cuda"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    return FileStreamProgramCache(folder if writable else None, max_size_bytes=CACHE_BYTES)


@cache
def _stamp(module: Path) -> str:
    """Identify what a kernel's code depends on beside its own choice: the compilers and the sources."""
    compilers = map(version, ("numba", "numba-cuda", "cuda-core"))
    return sha256("".join([*compilers, stamp_of(module)]).encode()).hexdigest()


@cache  # once a process for each reason
def _warn_no_cache(reason: str) -> None:
    warnings.warn(
        f"numbanorm compiles CUDA kernels that its cache on disk should hold: {reason}. NUMBA_CACHE_DIR names another "
        "folder.",
        RuntimeWarning,
        stacklevel=4,
    )


class _Here(threading.local):
    ready = False


_here = _Here()


@lru_cache(maxsize=1024)
def _configuration(blocks: int, threads: int, cluster: int) -> Any:
    # cuda.core counts the grid in clusters where there are any.
    return LaunchConfig(grid=blocks // cluster, block=threads, cluster=None if cluster == 1 else cluster)


@lru_cache(maxsize=1024)
def _stream(handle: int) -> Any:
    return Stream.from_handle(handle)


@cache
def _devices() -> int:
    return len(cuda.gpus)


def has_clusters() -> bool:
    """Tell whether blocks can form clusters on the current device."""
    return not SIMULATED and _has_clusters(_device())


@cache
def _has_clusters(device: int) -> bool:
    return bool(tuple(cuda.gpus[device].compute_capability) >= (9, 0))


def _device() -> int:
    """Return the number of the current device; a thread that has none yet gets it."""
    if _here.ready and _devices() == 1:
        return 0
    _here.ready = True
    return int(cuda.get_current_device().id)
