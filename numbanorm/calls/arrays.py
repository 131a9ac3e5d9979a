"""Arrays in and out: what callers hand over becomes NumPy arrays, and results go back as what the input was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from ..core.dtypes import format_of, native
from ..core.kinds import is_lazy, on_cuda
from ..core.norms import NormRecord
from ..core.spec import spec_of
from . import check

Back = Callable[[np.ndarray], Any]


def as_array(value: Any, name: str) -> np.ndarray:
    """Return `value` as a NumPy array, without a copy wherever it is an array already.

    Raises
    ------
    TypeError
        If it lies on another device, is lazy, is a masked array, or is nothing that NumPy can convert.
    """
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected an array, got a masked array; pass its data, and ~{name}.mask as mask=")
    if isinstance(value, np.ndarray):
        return value.view(np.ndarray)
    if on_cuda(value):
        raise TypeError(f"{name}: expected an array in host memory, got a CUDA array")
    if is_lazy(value):
        raise TypeError(
            f"{name}: expected an array in memory, got a lazy {type(value).__name__}; call .compute() first"
        )
    try:
        return np.from_dlpack(value) if hasattr(value, "__dlpack__") else np.asarray(value)
    except (TypeError, ValueError, BufferError, RuntimeError) as error:
        raise TypeError(f"{name}: expected an array, got {type(value).__name__} ({error})") from error


def way_back(value: Any) -> Back | None:
    """Return what turns a NumPy array into an array of the kind of `value`; None where that is NumPy, or unknown."""
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack__"):
        return None
    module = sys.modules.get(type(value).__module__.partition(".")[0])
    namespace = value.__array_namespace__() if hasattr(value, "__array_namespace__") else module
    back: Back | None = getattr(namespace, "from_dlpack", None)
    return back


def as_input(value: Any, name: str) -> np.ndarray:
    """Return `value` as an aligned array of a supported dtype in native byte order.

    Raises
    ------
    TypeError
        If its dtype is none that the kernels compute on.
    """
    array = value if type(value) is np.ndarray else as_array(value, name)
    if format_of(array.dtype) is None:
        dtype = native(array.dtype)
        if format_of(dtype) is None:
            check.check_format(array.dtype, name)
        array = array.astype(dtype)
    return array if array.flags.aligned else array.copy("K")


def as_parameter(value: Any, name: str, lane: np.dtype[Any]) -> Any:
    """Return a weight or bias as an array, None for None; a list of integers becomes floats."""
    if value is None or type(value) is np.ndarray:
        return value
    array = as_array(value, name)
    return cast(array, lane) if not hasattr(value, "dtype") and array.dtype.kind in "iu" else array


def as_mask(value: Any, record: NormRecord) -> Any:
    """Return a mask as an array, None for None.

    Raises
    ------
    TypeError
        If the norm takes none.
    """
    if value is None:
        return None
    check.check_takes_mask(record)
    return as_array(value, "mask")


def broadcast_mask(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return a mask broadcast to a shape."""
    mask = as_array(value, "mask")
    strides = check.check_mask(spec_of(mask), shape)
    return np.lib.stride_tricks.as_strided(mask, shape, strides, writeable=False)


def cast(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Return an array in another dtype, itself if it has it; what is too large for that is infinite, and no warning."""
    if array.dtype == dtype:
        return array
    with np.errstate(all="ignore"):
        return array.astype(dtype)
