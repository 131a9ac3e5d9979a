"""Threads that help with large calls: they look at the board for a while after each call, and sleep then."""

from __future__ import annotations

import os
import threading
from functools import cache
from itertools import count
from time import perf_counter, sleep
from typing import Any, NamedTuple

import numpy as np

from ..backend import Launch
from . import claims
from .board import HELPERS, JOB_LIMIT, OF_HELPER, SLEEPING
from .idle import idle_cores

MOST = 256
"""Helpers of a process, at most."""

LOOKS = 1 << 16
"""Looks at the board before a helper sleeps: 20 to 50 us."""

CLOSE = 2e-5
"""Seconds between calls that follow one another closely: helpers are still awake then."""

_ASK_AGAIN = 1e-3
"""Seconds after which the system is asked anew whether cores are idle, which takes 6 us."""

_TURNS = 1 << 18
"""Looks of the caller for units that helpers have claimed, before it sleeps for a while itself: 100 to 250 us."""

_PAUSE = 2e-5
"""Seconds that it sleeps: it comes back after 100 us at the earliest."""


class Helpers:
    """Threads of Python's that run nothing but compiled code, and never take Python's lock: a caller would wait for it.

    They are started when they are first called, and anew in a forked child.
    """

    def __init__(self) -> None:
        self.board = claims.new_board(MOST)
        self.last = 0.0
        self._job = claims.job_on(self.board)
        self._ask_at = self._alone_until = 0.0
        self._room: int | None = 0
        self._number = 0
        self._places = count()

    def __len__(self) -> int:
        return self._number

    def may_help(self, large: bool) -> bool:
        """Tell whether a call is worth helpers, as it is large or the last one has just ended, and cores were idle."""
        now = perf_counter()
        return (large or now - self.last < CLOSE) and now >= self._alone_until

    def at_hand(self, number: int, large: bool) -> int:
        """Return how many of so many helpers can take part now: as many as cores are idle, or theirs already.

        What holds the cores else may be a thread of another library that looks for work, as OpenMP's and OpenBLAS's do
        for milliseconds: a helper beside it would be held up with units that it has claimed. Where the system does not
        tell, large calls alone are shared.
        """
        now = perf_counter()
        if now >= self._ask_at:
            self._ask_at = now + _ASK_AGAIN
            idle = idle_cores()
            self._room = None if idle is None else idle + self._awake()
            if self._room == 0:
                self._alone_until = self._ask_at
        if self._room is None:
            return number if large else 0
        return min(number, self._room)

    def _awake(self) -> int:
        own = self.board[HELPERS : HELPERS + OF_HELPER * self._number : OF_HELPER]
        return int(np.count_nonzero(own != SLEEPING))

    def start(self, number: int) -> int:
        """Start who is missing of so many; return how many there are.

        By no lock, which a signal's handler could not wait for: of two callers each may start one.
        """
        while self._number < min(number, MOST):
            self._number += 1
            try:
                threading.Thread(target=self._serve, name="numbanorm", daemon=True).start()
            except BaseException as error:
                self._number -= 1
                if isinstance(error, RuntimeError):  # no more threads, or the interpreter ends: the caller does all
                    break
                raise
        return min(number, self._number)

    def _serve(self) -> None:
        helper = next(self._places)
        if helper < MOST and compiled().enlist(self.board, helper):
            compiled().serve(self.board, self._job.copy(), helper, LOOKS)

    def run(self, entry: Launch, number: int, arguments: tuple[Any, ...]) -> Any:
        """Run a kernel with so many helpers.

        Raises
        ------
        MemoryError
            If memory has run out for whichever thread. Nobody works on the arrays any more then.
        """
        own = compiled()
        job = self._job.copy()
        job[JOB_LIMIT] = number = self.start(number)
        try:
            own.wake(self.board, number)
            problem = entry(job, 1, *arguments)
            answer = own.finish(job, _TURNS)
            while answer == claims.WAITING:
                self._pause()
                answer = own.finish(job, _TURNS)
        except BaseException:  # an interrupt, too: whoever has claimed a unit writes to arrays of the caller's
            own.close(job)
            while own.finish(job, _TURNS) == claims.WAITING:
                self._pause()
            raise
        if answer == claims.LOST:
            raise MemoryError
        return problem

    def _pause(self) -> None:
        if self is not _helpers:
            raise RuntimeError("a child process was forked within this call, and its helpers are not there")
        sleep(_PAUSE)


_helpers = Helpers()


def helpers() -> Helpers:
    """Return this process's helpers."""
    return _helpers


class Compiled(NamedTuple):
    """What helpers run, and what the caller asks and tells."""

    enlist: Launch
    serve: Launch
    wake: Launch
    finish: Launch
    close: Launch


@cache
def compiled() -> Compiled:
    """Return it."""
    words, number = claims.JOB, claims.INT64
    return Compiled(
        enlist=claims.enlist.bound(words, number),
        serve=claims.serve.bound(words, words, number, number),
        wake=claims.wake.bound(words, number),
        finish=claims.finish.bound(words, number),
        close=claims.close.bound(words),
    )


def _after_fork() -> None:
    global _helpers
    _helpers = Helpers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
