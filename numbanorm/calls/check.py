"""Checks of arguments that are not arrays: integers, lengths, axes, eps."""

from __future__ import annotations

import math
from functools import lru_cache
from numbers import Integral, Real
from typing import Any


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
