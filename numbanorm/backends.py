"""Which backend serves an array.

Two modules face the functions, `numbanorm.calls` for arrays in host memory and `numbanorm.cuda.calls` for CUDA arrays,
under the same names: as_input, run, run_tracked, run_backward. Behind each stands a backend of kernels with one
contract: forward, statistics, apply, backward.
"""

from __future__ import annotations

from functools import cache
from typing import Any


def calls_for(x: Any, stream: Any = None) -> Any:
    """Return what serves `x`: `numbanorm.calls`.

    Raises
    ------
    TypeError
        If there is a stream for an array in host memory.
    """
    if stream is not None:
        raise TypeError(f"stream: expected None for an array in host memory, got {type(stream).__name__}")
    return _host_calls()


def on_cuda(value: Any) -> bool:
    """Tell whether an array lies on a CUDA device."""
    # torch's tensors tell at once; asking one in host memory for its interface raises, and costs 2 us.
    is_cuda = getattr(value, "is_cuda", None)
    return hasattr(value, "__cuda_array_interface__") if is_cuda is None else bool(is_cuda)


@cache
def _host_calls() -> Any:
    from . import calls

    return calls


@cache
def cpu_backend() -> Any:
    """Return `numbanorm.cpu`, imported at the first call: declaring its kernels takes 60 ms."""
    from . import cpu

    return cpu
