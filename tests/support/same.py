"""Whether two results are the same arrays, or close."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)


def assert_same(ours: Any, theirs: Any) -> None:
    """Both must be the same arrays: shapes, dtypes, bits."""
    if not isinstance(theirs, tuple):
        ours, theirs = (ours,), (theirs,)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(bits(a), bits(b))


def assert_close(ours: Any, theirs: Any) -> None:
    """As `assert_same`, but sums may run in another order, and round to the lane dtype before they do to their own."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        epsilon = 2.0**-7 if b.dtype == ml_dtypes.bfloat16 else np.finfo(b.dtype).eps
        wide = max(2 * float(epsilon), 2e-6)
        np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), rtol=wide, atol=wide)
