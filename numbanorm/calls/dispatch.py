"""Which backend serves an array.

Three modules face the functions, `numbanorm.calls` for arrays in host memory, `numbanorm.cuda.calls` for CUDA arrays
and `numbanorm.dask` for dask arrays, under the same names: as_input, run, run_tracked, run_backward. Behind the first
two stands a backend of kernels each, with one contract: forward, statistics, apply, backward. The third hands dask's
chunks back to the first two.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np


def calls_for(x: Any, stream: Any = None) -> Any:
    """Return what serves `x`: `numbanorm.calls`, `numbanorm.dask`, or `numbanorm.cuda.calls`, on a stream if named.

    Raises
    ------
    TypeError
        If there is a stream for an array in host memory, or `x` is a CUDA array and nothing here serves those.
    """
    if type(x) is np.ndarray or not uses_cuda(x):
        if stream is not None:
            raise TypeError(f"stream: expected None for an array in host memory, got {type(stream).__name__}")
        return _host_calls() if type(x) is np.ndarray or not uses_dask(x) else dask_calls()
    calls = cuda_module("calls")
    return calls if stream is None else calls.OnStream(x, stream)


def uses_dask(x: Any) -> bool:
    """Tell whether an array is dask's; dask is not imported for that."""
    loaded = sys.modules.get("dask.array")
    return loaded is not None and isinstance(x, loaded.Array)


def uses_cuda(x: Any) -> bool:
    """Tell whether an input makes its call one for the CUDA backend.

    Raises
    ------
    TypeError
        If it does, and there is no CUDA backend here.
    """
    if not on_cuda(x):
        return False
    problem = cuda_problem()
    if problem is not None:
        raise TypeError(f"x: expected an array in host memory, got a CUDA array: {problem}")
    return True


def on_cuda(value: Any) -> bool:
    """Tell whether an array lies on a CUDA device."""
    # torch's tensors tell at once; asking one in host memory for its interface raises, and costs 2 us.
    is_cuda = getattr(value, "is_cuda", None)
    return hasattr(value, "__cuda_array_interface__") if is_cuda is None else bool(is_cuda)


@cache
def cuda_problem() -> str | None:
    """Return why nothing here serves CUDA arrays, and what to do about it; None if they are served."""
    try:
        from ..cuda import toolchain
    except ImportError as error:
        return str(error)
    reason = toolchain.unavailable_reason()
    return None if reason is None else " ".join(reason.split())


@cache
def cuda_module(name: str) -> Any:
    """Return a module of `numbanorm.cuda`, imported when it is first needed."""
    return import_module(f"numbanorm.cuda.{name}")


@cache
def dask_calls() -> Any:
    """Return `numbanorm.dask`, imported when there is a dask array."""
    return import_module("numbanorm.dask.calls")


@cache
def _host_calls() -> Any:
    from . import host as calls

    return calls


@cache
def cpu_backend() -> Any:
    """Return `numbanorm.cpu`, imported at the first call: declaring its kernels takes 60 ms."""
    from ..cpu import backend as cpu

    return cpu
