"""The engines that may do the units of a large call, and what chooses them in another process's environment."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import pytest


def has_tbb() -> bool:
    """Tell whether pip's TBB is there; on one CPU Numba waits for it without end when the interpreter exits."""
    try:
        ctypes.CDLL(str(Path(sys.prefix, "lib", "libtbb.so.12")))
    except OSError:
        return False
    return not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) > 1


def has_omp() -> bool:
    """Tell whether this Numba was built with OpenMP."""
    try:
        from numba.np.ufunc import omppool  # noqa: F401
    except ImportError:
        return False
    return True


LAYERS = [
    pytest.param("omp", marks=pytest.mark.skipif(not has_omp(), reason="Numba has no OpenMP")),
    "workqueue",
    pytest.param("tbb", marks=pytest.mark.skipif(not has_tbb(), reason="no tbb")),
]
"""Numba's threading layers."""

ENGINES = ["claims", *LAYERS]
"""Helpers that claim units, and Numba's threads under each of its layers."""


def choosing(engine: str) -> dict[str, str]:
    """Return the environment variables that choose one of these."""
    if engine == "claims":
        return {"NUMBANORM_THREADS": "claims"}
    return {"NUMBANORM_THREADS": "numba", "NUMBA_THREADING_LAYER": engine}
