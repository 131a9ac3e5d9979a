"""Which threads do a launch's units: helpers, which claim them, or Numba's.

By default the caller's thread does units until none is left, and so do helpers, where that pays: with calls that follow
one another closely, and with such as take long beside waking a thread. The caller never waits for a helper that has
claimed nothing: while others hold the cores, as NumPy's products do after they have returned, a call takes as long as
on one thread and no longer. Under ``NUMBANORM_THREADS=numba``, and where a threading layer of Numba's is asked for, a
launch runs on Numba's threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

from ..backend import Launch
from ..core import threads
from . import claims
from .helpers import helpers
from .profile import profile


def may_share(elements: int) -> bool:
    """Tell whether several threads may ever serve a call on so many elements."""
    cpu = profile()
    return elements >= (cpu.numba_from if threads.uses_numba() else cpu.share_from)


def may_split(elements: int) -> bool:
    """Tell whether a call with too few units is worth several launches, statistics of parts first."""
    return elements >= profile().split_from


def threads_for(elements: int) -> int:
    """Return how many threads serve a call on so many elements here and now."""
    if not may_share(elements):
        return 1
    if threads.uses_numba():
        return threads.usable_threads()
    cpu = profile()
    large = elements >= cpu.wake_from
    if not helpers().may_help(large):
        return 1
    return 1 + helpers().at_hand(min(threads.usable_threads() - 1, max(elements // cpu.share, 1)), large)


def on_threads(elements: int, run: Callable[..., Any]) -> Launch:
    """Return what calls ``run(threads, *arguments)`` with as many threads as serve a call on so many elements."""
    if not may_share(elements):
        return partial(run, 1)

    def launch(*arguments: Any) -> Any:
        problem = run(threads_for(elements), *arguments)
        helpers().last = perf_counter()
        return problem

    return launch


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
    if threads.uses_numba():
        return _run_on_numba(entry, parallel, count, arguments)
    return helpers().run(entry, count - 1, arguments)


def _run_on_numba(entry: Launch, parallel: Callable[[], Launch], count: int, arguments: tuple[Any, ...]) -> Any:
    with threads.numba_launch() as free:
        if not free:
            return entry(claims.job_on(None), 1, *arguments)
        board = claims.new_board(0)
        try:
            problem = parallel()(claims.job_on(board), count, *arguments)
        except SystemError as error:  # the caller's own part failed; errors of others are lost
            raise (error.__cause__ or error) from None
    if not problem and board[claims.DONE] < board[claims.TOTAL]:
        raise MemoryError
    return problem
