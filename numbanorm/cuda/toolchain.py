"""Everything that the backend takes from numba-cuda: no other module imports it."""

from __future__ import annotations

from functools import cache

try:
    from numba import cuda
except ImportError as _error:
    raise ImportError('CUDA arrays need numba-cuda, which is not installed: pip install "numbanorm[cuda]"') from _error

__all__ = ["available", "cuda", "unavailable_reason"]


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
