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

from ..backend import Launch
from ..core import threads
from . import claims

SHARE_FROM = 1 << 20
"""Elements from which a call is worth waking a helper for, which takes some 50 us: about 150 us on one thread."""

NUMBA_FROM = 1 << 17
"""Elements from which a launch on Numba's threads pays: about 60 us on one thread; a launch takes 2 to 10."""

_TURNS = 1 << 14
"""Looks at a job before the caller goes to sleep until a helper is done: some 30 us."""


def may_share(elements: int) -> bool:
    """Tell whether several threads may ever serve a call on so many elements."""
    return elements >= (NUMBA_FROM if threads.uses_numba() else SHARE_FROM)


def threads_for(elements: int) -> int:
    """Return how many threads serve a call on so many elements here and now."""
    return threads.usable_threads() if may_share(elements) else 1


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
        All other arguments.
    """
    if threads.uses_numba():
        with threads.numba_launch() as free:
            if free:
                return parallel()(claims.shared_job(), count, *arguments)
        return entry(claims.shared_job(), 1, *arguments)
    job = claims.shared_job()
    launch = partial(entry, job, 1, *arguments)
    with threads.helping(launch, count - 1) as task:
        problem = launch()
        if not problem:
            await_units = _await_units()
            while not await_units(job, _TURNS):
                task.wait()
    return problem


@cache
def _await_units() -> Launch:
    return claims.await_units.bound(claims.JOB, claims.INT64)
