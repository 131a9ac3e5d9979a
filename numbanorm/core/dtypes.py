"""Which dtypes the norms take, what they compute in and what they return."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

NARROW = frozenset(["bool", "int8", "uint8", "int16", "uint16", "float16", "bfloat16", "float32"])
"""Names of the dtypes that compute in float32: every value of theirs is a float32 value."""

WIDE = frozenset(["int32", "uint32", "int64", "uint64", "float64"])
"""Names of the dtypes that compute in float64."""

FLOATS = frozenset(["float16", "bfloat16", "float32", "float64"])
"""Names of the dtypes that a result, a weight or a gradient may have."""

HALF_RECORDS = {name: np.dtype([(name, np.uint16)]) for name in ("float16", "bfloat16")}
"""What a CPU kernel is handed in place of an array of half precision, by the name of its dtype."""


class Format(NamedTuple):
    """What is to be known of a dtype."""

    lane: np.dtype[Any]  # float32 or float64: what sums are taken in, and the dtype of weights in the kernels
    result: np.dtype[Any]  # of the output: the dtype itself where it is a float, else the lane
    is_float: bool
    epsilon: float  # machine epsilon of the result
    record: np.dtype[Any] | None  # the view under which the CPU kernels take it, where they need one


@cache  # dtype.name costs 2 us, a look-up 0.1
def format_of(dtype: np.dtype[Any]) -> Format | None:
    """Return what is to be known of a dtype; None where the norms do not take it, as they do not in foreign byte order.

    Examples
    --------
    >>> format_of(np.dtype(np.uint8)).result
    dtype('float32')
    >>> format_of(np.dtype(np.complex64)) is None
    True
    """
    name = dtype.name
    if not dtype.isnative or name not in NARROW | WIDE:
        return None
    lane = np.dtype(np.float32 if name in NARROW else np.float64)
    is_float = name in FLOATS
    result = dtype if is_float else lane
    epsilon = 2.0**-7 if name == "bfloat16" else float(np.finfo(result.type).eps)
    return Format(lane, result, is_float, epsilon, HALF_RECORDS.get(name))


def native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return a dtype in the byte order of this machine.

    Examples
    --------
    >>> native(np.dtype(">f4")) == native(np.dtype("<f4")) == np.float32
    True
    """
    return dtype if dtype.isnative else dtype.newbyteorder("=")  # strings of any length know no byte order at all


def is_float(dtype: np.dtype[Any]) -> bool:
    """Tell whether a weight or a gradient may have this dtype, or it in the other byte order."""
    form = format_of(native(dtype))
    return form is not None and form.is_float


def float_dtype(value: Any) -> np.dtype[Any]:
    """Return a float dtype that the norms take, also bfloat16 by its name.

    Raises
    ------
    ValueError
        If it is none.

    Examples
    --------
    >>> float_dtype("float32")
    dtype('float32')
    """
    try:
        if value == "bfloat16":
            import ml_dtypes

            value = ml_dtypes.bfloat16
        dtype: np.dtype[Any] = np.dtype(value)
    except (TypeError, ImportError) as error:
        raise ValueError(f"dtype: expected one of {', '.join(sorted(FLOATS))}, got {value!r} ({error})") from error
    if not is_float(dtype):
        raise ValueError(f"dtype: expected one of {', '.join(sorted(FLOATS))}, got {value!r}")
    return dtype
