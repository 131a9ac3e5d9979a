"""Arrays in and out: what callers hand over becomes NumPy arrays and flat spans of memory, and results go back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from ..core.dtypes import Format, format_of, is_float, native
from ..core.plan import Placement, Plan
from ..core.pool import POOL
from .dispatch import on_cuda

Back = Callable[[np.ndarray], Any]

_SUPPORTED = "float16, bfloat16, float32, float64, bool or an integer of 8 to 64 bits"


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
    if hasattr(value, "__dask_graph__"):
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


def as_input(value: Any, name: str) -> tuple[np.ndarray, Format]:
    """Return `value` as an aligned array of a supported dtype in native byte order, and what is to be known of it.

    Raises
    ------
    TypeError
        If its dtype is none that the kernels compute on.
    """
    array = value if type(value) is np.ndarray else as_array(value, name)
    form = format_of(array.dtype)
    if form is None:
        dtype = native(array.dtype)
        form = format_of(dtype)
        if form is None:
            raise TypeError(f"{name}: expected {_SUPPORTED}, got {array.dtype}")
        array = array.astype(dtype)
    return array if array.flags.aligned else array.copy("K"), form


def as_parameter(value: Any, name: str, shape: tuple[int, ...], lane: np.dtype[Any]) -> np.ndarray:
    """Return a weight or bias of the given shape, contiguous, in the lane dtype.

    Raises
    ------
    TypeError
        If its dtype is not a float.
    ValueError
        If it has another shape.
    """
    array = value if type(value) is np.ndarray else as_array(value, name)
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    if array.dtype is lane and array.flags.carray:
        return array
    is_list = not hasattr(value, "dtype")
    if not is_float(array.dtype) and not (is_list and array.dtype.kind in "iu"):
        raise TypeError(f"{name}: expected a float dtype, got {array.dtype}")
    return np.require(cast(array, lane), None, ["C", "A", "W"])


def cast(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Return an array in another dtype, itself if it has it; what is too large for that is infinite, and no warning."""
    if array.dtype == dtype:
        return array
    with np.errstate(all="ignore"):
        return array.astype(dtype)


def as_mask(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return a mask broadcast to `shape`.

    Raises
    ------
    TypeError
        If it is not boolean.
    ValueError
        If it does not broadcast.
    """
    mask = as_array(value, "mask")
    if mask.dtype != np.bool_:
        raise TypeError(f"mask: expected dtype bool (True = counts), got {mask.dtype}")
    try:
        return np.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(f"mask: expected a shape that broadcasts to {shape}, got {mask.shape}") from None


def as_output(value: Any, shape: tuple[int, ...], dtype: np.dtype[Any], inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Return `out` as an array that may be written.

    Parameters
    ----------
    value : array_like
        What the caller gave.
    shape, dtype
        What it must have.
    inputs : dict of str to np.ndarray
        The arrays that it must not overlap, by name; `x` and `residual` may be `out` as a whole.

    Raises
    ------
    TypeError
        If it is no array, or of another dtype.
    ValueError
        If it has another shape, is read-only, or overlaps an input in part.
    """
    if not hasattr(value, "__array__") and not hasattr(value, "__dlpack__"):
        raise TypeError(f"out: expected an array, got {type(value).__name__}")
    out = as_array(value, "out")
    if out.shape != shape:
        raise ValueError(f"out: expected shape {shape}, got {out.shape}")
    if out.dtype != dtype or not out.dtype.isnative:
        raise TypeError(f"out: expected dtype {dtype}, got {out.dtype}")
    if not out.flags.writeable:
        raise ValueError("out: expected a writeable array, got a read-only one")
    if not out.flags.c_contiguous and _overlaps_itself(out):
        raise ValueError("out: expected an element of memory for each element, got a broadcast or overlapping array")
    if out is inputs.get("x"):
        inputs = {name: array for name, array in inputs.items() if name != "x"}
    for name, array in inputs.items():
        if not np.may_share_memory(out, array):  # bounds alone: 0.3 us
            continue
        whole = name in ("x", "residual") and _same_memory(out, array)
        if not whole and overlap(out, array):
            raise ValueError(f"out: expected memory apart from {name} (or all of x itself), got a partial overlap")
    return out


def _overlaps_itself(array: np.ndarray) -> bool:
    """Tell whether elements may share memory: an axis takes steps that are shorter than what the faster axes span."""
    span = array.itemsize
    for step, length in sorted((abs(s), n) for n, s in zip(array.shape, array.strides, strict=True) if n > 1):
        if step < span:
            return array.size > 0
        span += (length - 1) * step
    return False


def _same_memory(a: np.ndarray, b: np.ndarray) -> bool:
    return address(a) == address(b) and a.strides == b.strides and a.dtype == b.dtype


def overlap(a: np.ndarray, b: np.ndarray) -> bool:
    """Tell whether two arrays share an element; yes where that is hard to tell."""
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]  # NumPy's stubs know -1 and 0 alone
    except np.exceptions.TooHardError:
        return True


def address(array: np.ndarray) -> int:
    """Return the address of the first element."""
    pointer: int = array.__array_interface__["data"][0]
    return pointer


class _Span:
    """Memory of an array as a flat array of its own, which keeps its owner alive."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, owner: np.ndarray, start: int, length: int) -> None:
        self.owner = owner
        # Declared writeable whatever the owner is: kernels are compiled once, for writeable arrays, and write only to
        # outputs, which were checked.
        self.__array_interface__ = {
            "shape": (length,),
            "typestr": f"|V{owner.itemsize}",
            "data": (address(owner) - start * owner.itemsize, False),
            "version": 3,
        }


def flat(array: np.ndarray, placement: Placement | None, plan: Plan) -> np.ndarray:
    """Return an aligned array as the kernels read it: its span of memory, or that of a copy where there is no place."""
    if placement is None:
        return packed(array, plan)
    if array.flags.carray:
        return array.reshape(-1)
    return np.asarray(_Span(array, placement.start, placement.span)).view(array.dtype)


def packed(array: np.ndarray, plan: Plan) -> np.ndarray:
    """Return a flat copy of `array`, contiguous in the order of the plan's layout."""
    return np.array(array.transpose(plan.layout.order), order="C").reshape(-1)


def fresh(plan: Plan, dtype: np.dtype[Any], *beside: np.ndarray) -> np.ndarray:
    """Return a new output, in the order of memory of the input, to be written while those `beside` it are read."""
    layout = plan.layout
    if plan.inverse is None:
        return POOL.empty(layout.shape, dtype, *beside)
    return POOL.empty(tuple(layout.shape[a] for a in layout.order), dtype, *beside).transpose(plan.inverse)
