"""Memory of a call on the host: arrays as kernels can read them, and outputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backend import Backward, Forward, Reading
from ..core.pool import POOL, SMALLEST
from ..core.spec import ArraySpec, spec_of

_empty = np.empty


def look(array: np.ndarray | None) -> ArraySpec | None:
    """Return the spec of an array, if there is one."""
    return None if array is None else spec_of(array)


def aligned(array: np.ndarray | None) -> np.ndarray | None:
    """Return an array whose elements lie where kernels can read them: itself, or a copy."""
    return array if array is None or array.flags.aligned else array.copy("K")


class Packing:
    """Arrays that a kernel cannot read in their place, copied to arrays without gaps."""

    __slots__ = ("_of",)

    def __init__(self, *readings: Reading | None) -> None:
        self._of = [None if r is None or r.packed is None else r.packed for r in readings]

    def __bool__(self) -> bool:
        return any(spec is not None for spec in self._of)

    def __call__(self, *given: Any) -> list[Any]:
        return [
            array if spec is None or array is None else packed(array, spec)
            for array, spec in zip(given, self._of, strict=True)
        ]


def packed(array: np.ndarray, spec: ArraySpec) -> np.ndarray:
    """Return a copy of an array that lies as `spec` says; what is too large for its dtype is infinite, and no warning."""
    copy = new(spec)
    with np.errstate(all="ignore"):
        np.copyto(copy, array, casting="unsafe")
    return copy


def new(spec: ArraySpec) -> np.ndarray:
    """Return a new array that lies as `spec`, without gaps, says."""
    order = sorted(range(len(spec.shape)), key=lambda a: -spec.strides[a])
    if order == list(range(len(order))):
        return _empty(spec.shape, spec.dtype)
    lengths = tuple(spec.shape[a] for a in order)
    return _empty(lengths, spec.dtype).transpose([order.index(a) for a in range(len(order))])


class Output:
    """How a result is allocated: in the order of memory, from the pool where it is large, and seen in the caller's."""

    __slots__ = ("back", "dtype", "pooled", "shape")

    def __init__(self, call: Forward | Backward) -> None:
        layout = call.plan.layout
        self.back = call.plan.inverse
        self.shape = layout.shape if self.back is None else tuple(layout.shape[a] for a in layout.order)
        self.dtype = call.form.result
        self.pooled = call.plan.size * self.dtype.itemsize >= SMALLEST

    def new(self, *beside: np.ndarray) -> np.ndarray:
        return POOL.empty(self.shape, self.dtype, *beside) if self.pooled else _empty(self.shape, self.dtype)
