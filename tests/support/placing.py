"""Arrays that begin where a test wants them to."""

from __future__ import annotations

import numpy as np


def begin_at(shape: tuple[int, ...], dtype: object, offset: int) -> np.ndarray:
    """Return an array that begins `offset` bytes into a cache line."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    return raw[start : start + size].view(dtype).reshape(shape)
