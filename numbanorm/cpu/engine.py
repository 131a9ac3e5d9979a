"""Which threads do a launch's units: Python's own, which claim them, or Numba's.

By default the caller's thread does units until none is left, and so do helpers, threads of Python's that wait for work.
The caller never waits for a helper that has claimed nothing: while others hold the cores, as NumPy's products do after
they have returned, a call takes as long as on one thread and no longer. Under ``NUMBANORM_THREADS=numba``, and where a
threading layer of Numba's is asked for, a launch runs on Numba's threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from ..backend import Launch
from ..core import threads
from . import claims

SHARE_FROM = 1 << 21
"""Elements from which a call is worth waking a helper for, which takes 50 to 150 us: about 300 us on one thread."""

HELPERS = 8
"""Helpers for so many elements, at most: each of them waits for Python's lock before it begins."""

NUMBA_FROM = 1 << 17
"""Elements from which a launch on Numba's threads pays: about 60 us on one thread; a launch takes 2 to 10."""

_TURNS = 1 << 14
"""Looks at a job before the caller goes to sleep until a helper is done: some 30 us."""


def may_share(elements: int) -> bool:
    """Tell whether several threads may ever serve a call on so many elements."""
    return elements >= (NUMBA_FROM if threads.uses_numba() else SHARE_FROM)


def threads_for(elements: int) -> int:
    """Return how many threads serve a call on so many elements here and now."""
    if not may_share(elements):
        return 1
    usable = threads.usable_threads()
    return usable if threads.uses_numba() else min(usable, 1 + elements * HELPERS // SHARE_FROM)


def run_shared(entry: Launch, parallel: Callable[[], Launch], count: int, arguments: tuple[Any, ...]) -> Any:
    """Run a kernel on several threads.

    Parameters
    ----------
    entry : callable
        The kernel's entry point: of a job, the number of workers, and `arguments`.
    parallel : callable
        Returns that of its twin for Numba's threads.
    count : int
        Threads.
    arguments : tuple
        All other arguments; the first is the geometry.

    Raises
    ------
    MemoryError
        If memory has run out for whichever thread. Nobody works on the arrays any more then.
    """
    job = claims.shared_job()
    if threads.uses_numba():
        return _run_on_numba(entry, parallel, count, job, arguments)
    await_units, address_of = _compiled()
    task = threads.Task(partial(_apart, address_of, entry, job, arguments), count - 1)
    try:
        task.offer()
        problem = entry(job, 1, *arguments)
        if not problem:
            while not await_units(job, _TURNS):
                task.wait()
        task.close()
    except BaseException:
        job[claims.NEXT] = claims.NONE_LEFT
        task.abort()
        raise
    return problem


def _apart(address_of: Launch, entry: Launch, job: np.ndarray, arguments: tuple[Any, ...]) -> Launch:
    """Return a launch that keeps no array of the caller's alive, only where it begins.

    Whoever finds no unit left reads none of them, and none is gone while a unit is not done.
    """
    geometry, *others = arguments
    places = [np.intp(address_of(a)) if type(a) is np.ndarray else a for a in others]
    return partial(entry, job, 1, geometry, *places)


def _run_on_numba(
    entry: Launch, parallel: Callable[[], Launch], count: int, job: np.ndarray, arguments: tuple[Any, ...]
) -> Any:
    with threads.numba_launch() as free:
        if not free:
            return entry(job, 1, *arguments)
        try:
            problem = parallel()(job, count, *arguments)
        except SystemError as error:  # the caller's own part failed; errors of others are lost
            raise (error.__cause__ or error) from None
    if not problem and job[claims.DONE] < job[claims.TOTAL]:
        raise MemoryError
    return problem


@cache
def _compiled() -> tuple[Launch, Launch]:
    return claims.await_units.bound(claims.JOB, claims.INT64), claims.address_of.bound(claims.ANY)
