"""Weights of a dtype that kernels do not read, and their gradients: converted by a kernel, faster than by NumPy."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ..backend import Launch
from .address import address_type
from .bound import INT64
from .dtypes import load, pointer, store
from .jit import Kernel, elementwise


@elementwise
def _convert(source, target, n):
    for i in range(n):
        store(target, i, load(source, i))


@Kernel
def convert(source, target, n):
    """Write `n` elements as those of another dtype."""
    _convert(pointer(source), pointer(target), n)


@cache
def converter(source: np.dtype[Any], target: np.dtype[Any]) -> Launch:
    """Return ``launch(source, target, n)`` for arrays without gaps of these dtypes."""
    return convert.bound(address_type(source), address_type(target), INT64)
