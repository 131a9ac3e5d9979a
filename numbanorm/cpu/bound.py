"""Bound kernels: a kernel, the types of its arguments and a call's geometry, put together once."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numba import from_dtype, types

from ..backend import Forward, Launch, Reading
from .address import Address, address_type
from .claims import ALONE, JOB
from .engine import run_shared
from .jit import Kernel
from .launch import GEOMETRY

NONE = types.none
GEOMETRY_ADDRESS = Address(from_dtype(GEOMETRY))
FLOAT64_ADDRESS = Address(types.float64)
FLOAT64, BOOL, INT64 = types.float64, types.boolean, types.int64


class Bound:
    """A kernel that claims units of work, for arguments of known types.

    Parameters
    ----------
    kernel : Kernel
        Whose first arguments are a job, the number of workers and a geometry.
    geometry : np.ndarray
        The geometry.
    flags : tuple
        What follows it: None, or True where the kernel's variant says so.
    kinds : tuple
        Numba's types of all other arguments.
    """

    __slots__ = ("_entry", "_head", "_kernel", "_kinds", "alone")

    def __init__(self, kernel: Kernel, geometry: np.ndarray, flags: tuple[Any, ...], *kinds: Any) -> None:
        told = [NONE if flag is None else BOOL for flag in flags]
        self._kernel = kernel
        self._kinds = (JOB, INT64, GEOMETRY_ADDRESS, *told, *kinds)
        self._head = (geometry, *flags)
        self._entry = kernel.bound(*self._kinds)
        self.alone: Launch = partial(self._entry, ALONE, 1, *self._head)

    @property
    def name(self) -> str:
        """The kernel's module and name: ``"rows.forward"``."""
        return self._kernel.name

    def on(self, threads: int, *arguments: Any) -> Any:
        """Launch on so many threads."""
        if threads == 1:
            return self.alone(*arguments)
        return run_shared(self._entry, self._parallel, threads, (*self._head, *arguments))

    def _parallel(self) -> Launch:
        """Return the entry point of the twin that uses Numba's threads."""
        return self._kernel.bound(*self._kinds, parallel=True)


class Kinds(NamedTuple):
    """Numba's types of the arrays of a forward call."""

    x: Any
    residual: Any
    total: Any
    y: Any
    mask: Any
    lane: Any

    @classmethod
    def of(cls, call: Forward) -> Kinds:
        """Return them."""
        y = address_type(call.form.result)
        residual = NONE if call.residual is None else kind_of(call.residual)
        total = NONE if call.residual is None else y
        mask = NONE if call.mask is None else Address(BOOL)
        return cls(kind_of(call.x), residual, total, y, mask, address_type(call.form.lane))


def kind_of(reading: Reading) -> Address:
    """Return the type under which a kernel takes an array."""
    return address_type((reading.given if reading.packed is None else reading.packed).dtype)
