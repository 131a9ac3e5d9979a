"""Spans: device memory as the kernels are handed it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Span(NamedTuple):
    """Elements that lie side by side in device memory.

    Attributes
    ----------
    address : int
        Of the first element of the span (its lowest address), in bytes.
    dtype : np.dtype
        As `numbanorm.dtypes.format_of` takes it.
    size : int
        Number of elements.
    """

    address: int
    dtype: np.dtype[Any]
    size: int
