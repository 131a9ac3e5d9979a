"""Threads that help with large calls: they look at the board for a while after each call, and sleep then."""

from __future__ import annotations

import os
import threading
from _queue import SimpleQueue  # `queue` has it, and takes milliseconds to import
from functools import cache
from time import perf_counter, sleep
from typing import Any

from ..backend import Launch
from . import claims
from .board import ASLEEP, JOB_LIMIT
from .idle import idle_cores

MOST = 256
"""Helpers of a process, at most."""

LOOKS = 1 << 16
"""Looks at the board before a helper sleeps: 20 to 50 us."""

CLOSE = 1e-5
"""Seconds between calls that follow one another closely: helpers are still awake then."""

_ASK_AGAIN = 1e-3
"""Seconds after which the system is asked anew whether cores are idle, which takes 6 us."""

_TURNS = 1 << 14
"""Looks of the caller for units that helpers have claimed, before it lets Python's other threads run: some 30 us."""

_PAUSE = 2e-5
"""Seconds that it gives them."""


class Helpers:
    """Threads of Python's that run nothing but compiled code, and wait for Python's lock only when they wake.

    They are started when they are first called, and anew in a forked child.
    """

    def __init__(self) -> None:
        self.board = claims.new_board(MOST)
        self.last = 0.0
        self._job = claims.job_on(self.board)
        self._ask_at = self._alone_until = 0.0
        self._room: int | None = 0
        self._calls: list[SimpleQueue[None]] = []

    def __len__(self) -> int:
        return len(self._calls)

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
        asleep = self.board[ASLEEP : ASLEEP + len(self._calls)]
        return len(asleep) - int(asleep.sum())

    def wake(self, number: int) -> None:
        """Wake so many, unless they are awake; start who is missing."""
        number = min(number, MOST)
        if len(self._calls) < number:
            self._start(number)
        for helper in range(min(number, len(self._calls))):
            if self.board[ASLEEP + helper] and self._calls[helper].empty():
                self._calls[helper].put(None)

    def _start(self, number: int) -> None:
        """Start who is missing of so many; by no lock, which a signal's handler could not wait for."""
        while len(self._calls) < number:
            calls: SimpleQueue[None] = SimpleQueue()
            own = len(self._calls), calls
            self._calls.append(calls)
            try:
                threading.Thread(target=self._serve, args=own, name="numbanorm", daemon=True).start()
            except BaseException as error:
                self._calls.remove(calls)
                if isinstance(error, RuntimeError):  # no more threads, or the interpreter ends: the caller does all
                    return
                raise

    def _serve(self, helper: int, calls: SimpleQueue[None]) -> None:
        serve, _, _ = compiled()
        job = self._job.copy()
        while True:
            calls.get()
            serve(self.board, job, helper, LOOKS)

    def run(self, entry: Launch, number: int, arguments: tuple[Any, ...]) -> Any:
        """Run a kernel with so many helpers.

        Raises
        ------
        MemoryError
            If memory has run out for whichever thread. Nobody works on the arrays any more then.
        """
        _, finish, close = compiled()
        job = self._job.copy()
        job[JOB_LIMIT] = number
        try:
            self.wake(number)
            problem = entry(job, 1, *arguments)
            answer = finish(job, _TURNS)
            while answer == claims.WAITING:
                self._pause()
                answer = finish(job, _TURNS)
        except BaseException:  # an interrupt, too: whoever has claimed a unit writes to arrays of the caller's
            close(job)
            while finish(job, _TURNS) == claims.WAITING:
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


@cache
def compiled() -> tuple[Launch, Launch, Launch]:
    """Return what helpers run, and what the caller asks and tells."""
    job, number = claims.JOB, claims.INT64
    return claims.serve.bound(job, job, number, number), claims.finish.bound(job, number), claims.close.bound(job)


def _after_fork() -> None:
    global _helpers
    _helpers = Helpers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
