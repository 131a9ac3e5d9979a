"""Kinds of arrays: which array is whose, told without importing the library that it comes from."""

from __future__ import annotations

import sys
from typing import Any


def is_dask(x: Any) -> bool:
    """Tell whether an array is dask's."""
    loaded = sys.modules.get("dask.array")
    return loaded is not None and isinstance(x, loaded.Array)


def is_lazy(x: Any) -> bool:
    """Tell whether an array has a graph that would have to be computed first."""
    return hasattr(x, "__dask_graph__")


def on_cuda(value: Any) -> bool:
    """Tell whether an array lies on a CUDA device."""
    # torch's tensors tell at once; asking one in host memory for its interface raises, and costs 2 us.
    is_cuda = getattr(value, "is_cuda", None)
    return hasattr(value, "__cuda_array_interface__") if is_cuda is None else bool(is_cuda)
