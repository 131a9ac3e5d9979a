"""Every check of an argument, and its message: each stands here once, for all norms, backends and kinds of arrays.

Checks of arrays look at their specs alone: shape, strides and dtype. Those on how memory overlaps look at addresses.
"""

from __future__ import annotations

import math
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

import numpy as np

from ..core.dtypes import Format, format_of, is_float
from ..core.layout import Layout
from ..core.norms import NormRecord
from ..core.plan import Options
from ..core.spec import ArraySpec, dummy, overlaps_itself

_SUPPORTED = "float16, bfloat16, float32, float64, bool or an integer of 8 to 64 bits"


@lru_cache(maxsize=4096, typed=True)  # typed: True is not 1 here
def _quick_axes(shape: tuple[int, ...], normalized_shape: Any, axis: Any) -> tuple[int, ...]:
    wanted = lengths(normalized_shape, "normalized_shape")
    return _axes(shape, wanted, None if axis is None else integers(axis, "axis"))


def normalized_axes(shape: tuple[int, ...], normalized_shape: Any, axis: Any) -> tuple[int, ...]:
    """Check `normalized_shape` and `axis` against a shape; return the normalized axes, counted from the front."""
    if is_key(normalized_shape) and is_key(axis):
        try:
            return _quick_axes(shape, normalized_shape, axis)
        except TypeError:  # lists cannot be looked up; or the arguments are wrong, and it is raised again
            pass
    wanted = lengths(normalized_shape, "normalized_shape")
    return _axes(shape, wanted, None if axis is None else integers(axis, "axis"))


def options_of(record: NormRecord, shape: tuple[int, ...], first: Any, second: Any) -> Options:
    """Check the options of a norm against a shape; return them as `numbanorm.core.plan.plan` takes them.

    Parameters
    ----------
    record : NormRecord
        The norm.
    shape : tuple of int
        Of the input.
    first, second
        For a norm by channel ``channel_axis`` and ``num_groups``, for the others ``normalized_shape`` and ``axis``.
    """
    if record.by_channel:
        groups = integer(second, "num_groups") if record.grouped else None
        return integer(first, "channel_axis"), groups, None
    return 1, None, normalized_axes(shape, first, second)


def options_for(
    record: NormRecord, normalized_shape: Any, axis: Any, channel_axis: Any, num_groups: Any
) -> tuple[Any, Any]:
    """Return those of a norm's options that it takes, as `options_of` takes them; the others must be left alone."""
    if record.by_channel:
        if normalized_shape is not None or axis is not None:
            raise TypeError(f"normalized_shape, axis: expected None, {record.title} takes channel_axis")
        if (num_groups is None) == record.grouped:
            expected = "a number" if record.grouped else "None"
            raise TypeError(f"num_groups: expected {expected} for {record.title}, got {num_groups}")
        return channel_axis, num_groups
    if num_groups is not None:
        raise TypeError(f"num_groups: expected None, {record.title} takes none")
    return normalized_shape, axis


def is_key(option: Any) -> bool:
    """Tell whether an option can be looked up: no tuple but of int, as (True,) and (1.0,) are found where (1,) is."""
    return type(option) is not tuple or set(map(type, option)) == {int}


def _axes(shape: tuple[int, ...], wanted: tuple[int, ...], axis: tuple[int, ...] | None) -> tuple[int, ...]:
    ndim = len(shape)
    axes = tuple(range(ndim - len(wanted), ndim)) if axis is None else axis
    where = "the last axes" if axis is None else f"axes {axes}"
    if axis is not None:
        if any(not -ndim <= a < ndim for a in axes):
            raise ValueError(f"axis: expected axes of an array of shape {shape}, got {axes}")
        axes = tuple(a % ndim for a in axes)
        if len(set(axes)) < len(axes):
            raise ValueError(f"axis: expected different axes, got {axis}")
    if len(axes) != len(wanted) or axes[0] < 0 or tuple(shape[a] for a in axes) != wanted:
        raise ValueError(f"x: expected lengths {wanted} (normalized_shape) along {where}, got shape {shape}")
    return axes


def lengths(value: Any, name: str) -> tuple[int, ...]:
    """Check one or more lengths of axes."""
    checked = integers(value, name)
    if not checked or min(checked) < 0:
        raise ValueError(f"{name}: expected one or more lengths, got {value}")
    return checked


def integers(value: Any, name: str) -> tuple[int, ...]:
    """Check one integer, or a tuple or list of them."""
    items = value if isinstance(value, (tuple, list)) else (value,)
    return tuple([integer(item, name) for item in items])


def integer(value: Any, name: str) -> int:
    """Check an integer (not a bool)."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    return int(value)


def positive(value: Any, name: str) -> int:
    """Check an integer above 0."""
    checked = integer(value, name)
    if checked < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value}")
    return checked


def check_momentum(momentum: Any) -> float:
    """Check the share of a batch in the running statistics: a finite number."""
    if isinstance(momentum, bool) or not isinstance(momentum, Real):
        raise TypeError(f"momentum: expected a number, got {type(momentum).__name__}")
    checked = _double(momentum)
    if not math.isfinite(checked):
        raise ValueError(f"momentum: expected a finite number, got {checked}")
    return checked


def share_of(momentum: Any, batches: int | None) -> float:
    """Return the share of a batch: `momentum`, or, where that is None and batches are counted, that of an average."""
    return 1.0 / (batches + 1) if momentum is None and batches is not None else check_momentum(momentum)


def _double(value: Any) -> float:
    """Return a number as a float; infinity where it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def check_eps(eps: Any) -> float:
    """Check eps: a finite number, not negative."""
    if type(eps) is not float and (isinstance(eps, bool) or not isinstance(eps, Real)):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    checked = _double(eps)
    if not 0.0 <= checked < math.inf:
        raise ValueError(f"eps: expected a finite number not below 0, got {checked}")
    return checked


def check_format(dtype: np.dtype[Any], name: str) -> Format:
    """Return what is to be known of the dtype of an input, in native byte order."""
    form = format_of(dtype)
    if form is None:
        raise TypeError(f"{name}: expected {_SUPPORTED}, got {dtype}")
    return form


def check_float(spec: ArraySpec, name: str) -> None:
    """Check that elements are floats, of either byte order."""
    if not is_float(spec.dtype):
        raise TypeError(f"{name}: expected a float dtype, got {spec.dtype}")


def check_shape(spec: ArraySpec, name: str, shape: tuple[int, ...]) -> None:
    """Check the shape of a parameter, a statistic or a gradient."""
    if spec.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {spec.shape}")


def check_like(spec: ArraySpec, name: str, x: ArraySpec) -> None:
    """Check that an array has the shape of the input."""
    if spec.shape != x.shape:
        raise ValueError(f"{name}: expected the shape of x, {x.shape}, got {spec.shape}")


def check_parameters(record: NormRecord, layout: Layout, weight: ArraySpec | None, bias: ArraySpec | None) -> None:
    """Check weight and bias."""
    for name, spec in (("weight", weight), ("bias", bias)):
        if spec is not None:
            if name not in record.parameters:
                raise TypeError(f"{name}: expected None, {record.title} takes none")
            check_shape(spec, name, layout.affine_shape)
            check_float(spec, name)


def check_shared_weights(record: NormRecord, where: str, *parameters: Any) -> None:
    """Check that all samples share weights, where no other ones can be."""
    if record.weights_by_sample and any(parameter is not None for parameter in parameters):
        raise TypeError(f"weight, bias: expected None {where}, {record.title} has some for each sample")


def check_statistic(spec: ArraySpec | None, name: str, layout: Layout) -> None:
    """Check a mean or rstd that the caller gave."""
    if spec is None:
        raise TypeError(f"{name}: expected an array, got None")
    check_shape(spec, name, layout.stats_shape)
    check_float(spec, name)


def check_residual(record: NormRecord, residual: ArraySpec, x: ArraySpec) -> None:
    """Check what is added to the input."""
    if not record.takes_residual:
        raise TypeError(f"residual: expected None, {record.title} takes none")
    check_like(residual, "residual", x)
    if residual.dtype != x.dtype:
        raise TypeError(f"residual: expected the dtype of x, {x.dtype}, got {residual.dtype}")


def check_gradient(dy: ArraySpec, x: ArraySpec, name: str = "dy") -> None:
    """Check the gradient of an output."""
    check_like(dy, name, x)
    check_float(dy, name)


def check_mask(mask: ArraySpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Check a mask; return its strides, broadcast to the shape of the input."""
    if mask.dtype != np.bool_:
        raise TypeError(f"mask: expected dtype bool (True = counts), got {mask.dtype}")
    try:
        return np.broadcast_to(dummy(mask), shape).strides
    except ValueError:
        raise ValueError(f"mask: expected a shape that broadcasts to {shape}, got {mask.shape}") from None


def check_takes_mask(record: NormRecord) -> None:
    """Refuse a mask where the norm takes none."""
    if not record.takes_mask:
        raise TypeError(f"mask: expected None, {record.title} takes none")


def check_output(out: ArraySpec, shape: tuple[int, ...], dtype: np.dtype[Any], writeable: bool) -> None:
    """Check an array to write to."""
    check_shape(out, "out", shape)
    if out.dtype != dtype or not out.dtype.isnative:
        raise TypeError(f"out: expected dtype {dtype}, got {out.dtype}")
    if not writeable:
        raise ValueError("out: expected a writeable array, got a read-only one")
    if overlaps_itself(out):
        raise ValueError("out: expected an element of memory for each element, got a broadcast or overlapping array")


def check_count(layout: Layout, x: ArraySpec) -> None:
    """Refuse to normalize channels of one element with their own statistics, where these may be running ones."""
    if layout.record.tracks and layout.count == 1 and 0 not in x.shape:
        raise ValueError(
            f"x: expected more than 1 value per channel to normalize with its own statistics, got shape {x.shape}"
        )


def check_both(mean: Any, var: Any) -> bool:
    """Tell whether there are running statistics: both or neither."""
    if (mean is None) != (var is None):
        raise ValueError("running_mean, running_var: expected both or neither, got one of them")
    return mean is not None


def check_running(mean: ArraySpec | None, var: ArraySpec | None, channels: int) -> None:
    """Check running statistics to normalize with."""
    for name, spec in (("running_mean", mean), ("running_var", var)):
        if spec is None:
            raise ValueError("running_mean, running_var: expected both to normalize with them, got None")
        check_shape(spec, name, (channels,))
        check_float(spec, name)


def check_updatable(spec: ArraySpec, name: str, writeable: bool) -> None:
    """Check a running statistic that is to be updated in place."""
    if not writeable:
        raise ValueError(f"{name}: expected a writeable array, got a read-only one")
    if spec.size > 1 and abs(spec.strides[0]) < spec.dtype.itemsize:
        raise ValueError(f"{name}: expected an element of memory for each channel, got a broadcast array")


def check_apart(out: np.ndarray, inputs: dict[str, np.ndarray | None]) -> None:
    """Check that `out` overlaps no input, but `x` and `residual` as a whole, from the addresses of all."""
    for name, array in inputs.items():
        if array is None or not np.may_share_memory(out, array):  # bounds alone: 0.3 us
            continue
        whole = name in ("x", "residual") and _same_memory(out, array)
        if not whole and overlap(out, array):
            raise ValueError(f"out: expected memory apart from {name} (or all of x itself), got a partial overlap")


def check_two(mean: np.ndarray, var: np.ndarray) -> None:
    """Check that running mean and variance have memory of their own."""
    if np.may_share_memory(mean, var) and overlap(mean, var):
        raise ValueError("running_mean, running_var: expected memory of their own, got one array for both")


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
