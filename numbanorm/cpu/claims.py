"""Units of work are claimed: whoever has time takes the next one, and nobody waits for a thread that has taken none.

A job is an array of int64 that the threads of one call share. Each of them runs the same kernel on it, which claims
unit after unit until none is left.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import intrinsic

from .address import Address, number
from .dtypes import pointer
from .jit import Kernel, scalar

_LINE = 8
NEXT, DONE, TOTAL, SHARED = 0, _LINE, 2 * _LINE, 3 * _LINE
"""Where a job holds the next unit, the number of units done, that of all, and whether several threads work on it."""

SIZE = 4 * _LINE

NONE_LEFT = 1 << 62
"""A next unit that is none, in whatever call."""

INT64 = types.int64
JOB = Address(INT64)
"""How kernels take a job."""

ANY = Address(types.uint8)
"""How they take an array whose dtype does not matter."""

ALONE = np.zeros(SIZE, np.int64)
"""The job of every call on one thread: its units are counted, not claimed."""


def shared_job() -> np.ndarray:
    """Return a job that several threads may work on."""
    job = np.zeros(SIZE, np.int64)
    job[SHARED] = 1
    return job


@intrinsic
def _add(typing_context, job, place, value):
    """Add to a number of a job at once; return what it was."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", builder.gep(arguments[0], [arguments[1]]), arguments[2], "seq_cst")

    return types.int64(job, types.intp, types.int64), generate


@intrinsic
def _look(typing_context, job, place):
    """Read a number of a job that another thread may write."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(builder.gep(arguments[0], [arguments[1]]), "acquire", 8)

    return types.int64(job, types.intp), generate


@intrinsic
def _tell(typing_context, job, place, value):
    """Write a number of a job that another thread may read."""

    def generate(context, builder, signature, arguments):
        builder.store_atomic(arguments[2], builder.gep(arguments[0], [arguments[1]]), "release", 8)
        return context.get_dummy_value()

    return types.none(job, types.intp, types.int64), generate


@scalar
def is_shared(job):
    """Tell whether several threads work on a job."""
    return _look(job, SHARED) != 0


@scalar
def claim(job, unit, total):
    """Return the next unit after `unit`, which is done; -1 is before the first, and `total` and more are none."""
    if not is_shared(job):
        return unit + 1
    if unit < 0:
        _tell(job, TOTAL, total)
    else:
        _add(job, DONE, 1)
    return _add(job, NEXT, 1)


@scalar
def _all_done(job):
    return _look(job, DONE) >= _look(job, TOTAL)


@Kernel
def await_units(job, turns):
    """Return whether all units are done, after at most so many looks; those that are left were claimed by others."""
    of = pointer(job)
    for _ in range(turns):  # noqa: SIM110  # Numba knows no generators here
        if _all_done(of):
            return True
    return False


@Kernel
def address_of(array):
    """Return the address of an array's first element."""
    return number(pointer(array))
