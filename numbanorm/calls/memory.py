"""Memory of a call on the host: arrays as kernels can read them, and outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
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


@cache
def backend() -> Any:
    """Return the backend, imported at the first call: declaring its kernels takes 60 ms."""
    from ..cpu import backend as cpu

    return cpu


class Packing:
    """Arrays that a kernel cannot read in their place, copied to arrays without gaps."""

    __slots__ = ("_copies",)

    def __init__(self, *readings: Reading | None) -> None:
        self._copies = [(i, _copier(r)) for i, r in enumerate(readings) if r is not None and r.packed is not None]

    def __bool__(self) -> bool:
        return bool(self._copies)

    def __call__(self, *given: Any) -> list[Any]:
        """Return the arrays, copies of those that must be."""
        read = list(given)
        for i, copy in self._copies:
            if read[i] is not None:
                read[i] = copy(read[i])
        return read


def _copier(reading: Reading) -> Callable[[np.ndarray], np.ndarray]:
    """Return what copies an array; halves without gaps are widened by a kernel, in a third of NumPy's time."""
    given, spec = reading.given, reading.packed
    assert spec is not None
    factor = spec.dtype.itemsize // given.dtype.itemsize
    alike = all(s * factor == t for s, t in zip(given.strides, spec.strides, strict=True))
    widen = backend().prepare_conversion(given.dtype, spec.dtype) if alike and len(spec.shape) == 1 else None
    if widen is None:
        return partial(packed, spec=spec)
    n = spec.size

    def widened(array: np.ndarray) -> np.ndarray:
        copy = _empty(n, spec.dtype)
        widen(array, copy, n)
        return copy

    return widened


def packed(array: np.ndarray, spec: ArraySpec) -> np.ndarray:
    """Return a copy of an array that lies as `spec` says; what is too large for its dtype becomes infinite."""
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
        """Return an output, in the order of memory, to be written while those `beside` it are read."""
        return POOL.empty(self.shape, self.dtype, *beside) if self.pooled else _empty(self.shape, self.dtype)
