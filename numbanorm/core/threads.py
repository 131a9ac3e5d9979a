"""How many threads the kernels use, when they must not use any, and what has to be done before Numba's are used."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numba as _typed_numba
from numba.np.ufunc import parallel as _typed_parallel

numba: Any = _typed_numba  # its own annotations leave out what is asked of it here
_parallel: Any = _typed_parallel
_requested: int | None = None
_forked = False
_lock = threading.Lock()


class _Here(threading.local):
    """What holds for one Python thread: whether the kernels that it calls stay on it."""

    serial = False


_here = _Here()
_started = False

ENGINES = ("claims", "numba")
"""What ``NUMBANORM_THREADS`` may be: who does the units of a launch (`numbanorm.cpu.engine`)."""


def set_num_threads(n: int) -> None:
    """Set the number of threads that the CPU kernels use.

    Parameters
    ----------
    n : int
        Between 1 and the number of threads that Numba started with (``numba.config.NUMBA_NUM_THREADS``). Results do
        not depend on it: the same input gives the same bits on any number of threads.

    Raises
    ------
    TypeError
        If `n` is not an integer.
    ValueError
        If `n` is out of range.

    Examples
    --------
    >>> import numbanorm as nn
    >>> nn.set_num_threads(1)
    >>> nn.get_num_threads()
    1
    """
    global _requested
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"n: expected an integer, got {type(n).__name__}")
    most = numba.config.NUMBA_NUM_THREADS
    if not 1 <= n <= most:
        raise ValueError(f"n: expected 1 to {most} threads (NUMBA_NUM_THREADS), got {n}")
    _requested = int(n)


def get_num_threads() -> int:
    """Return the number of threads that the CPU kernels use.

    Returns
    -------
    int
        What `set_num_threads` set, or else Numba's own number.
    """
    if _requested is not None:
        return _requested
    if not _parallel._is_initialized:  # to ask would start Numba's threads
        return int(numba.config.NUMBA_NUM_THREADS)
    return int(_parallel._get_num_threads())  # not by a lock, as from outside: a forked child may find it taken


def _engine() -> str:
    """Return who does units: what the environment asks for; whoever names a layer of Numba's has chosen Numba."""
    asked = os.environ.get("NUMBANORM_THREADS", "").strip().lower()
    if asked in ENGINES:
        return asked
    if asked:
        raise ValueError(f"NUMBANORM_THREADS: expected one of {', '.join(ENGINES)}, got {asked!r}")
    return "claims" if numba.config.THREADING_LAYER == "default" else "numba"


_chosen = _engine()


def uses_numba() -> bool:
    """Tell whether launches run on Numba's threads."""
    return _chosen == "numba"


def usable_threads() -> int:
    """Return the threads that a kernel may use here and now.

    1 under `serial`, in a thread that Python did not start, as those of a parallel region are, and, for Numba's
    threads, in a child that was forked after these had started.
    """
    if _here.serial or isinstance(threading.current_thread(), threading._DummyThread):
        return 1
    if _forked and uses_numba():
        return 1
    return get_num_threads()


@contextmanager
def serial() -> Iterator[None]:
    """Keep the kernels that this Python thread calls on one thread: something else runs many such calls at once."""
    before = _here.serial
    _here.serial = True
    try:
        yield
    finally:
        _here.serial = before


def _prepare() -> None:
    """Note that Numba starts its threads now; before, load pip's TBB if it is asked for.

    It lies where no loader looks in a virtual environment.
    """
    global _started
    if _started:
        return
    _started = True
    if numba.config.THREADING_LAYER in ("tbb", "safe", "threadsafe", "forksafe"):
        with suppress(OSError):  # there is none: Numba looks elsewhere, and tells what it misses
            ctypes.CDLL(os.path.join(sys.prefix, "lib", "libtbb.so.12"), ctypes.RTLD_GLOBAL)


@contextmanager
def numba_launch() -> Iterator[bool]:
    """Set up Numba's threads for a launch, and tell whether they are free.

    One parallel kernel runs at a time: the workqueue layer aborts the process if two Python threads are in one at once,
    and under OpenMP each of them would start as many threads as there are cores. Who finds them taken does all units
    alone: the bits are the same, no one waits, and a signal handler that calls a norm cannot wait for itself.
    """
    _prepare()
    if _requested is not None and numba.get_num_threads() != _requested:
        numba.set_num_threads(_requested)
    free = _lock.acquire(blocking=False)
    try:
        yield free
    finally:
        if free:
            _lock.release()


def _layer() -> str:
    try:
        return str(numba.threading_layer())
    except ValueError:  # no parallel kernel has run yet: which layer it will be is not known
        return "unknown"


def _after_fork() -> None:
    # OpenMP's threads do not survive a fork: a parallel kernel in the child would end it by SIGTERM. `_lock` may have
    # been held by another thread just then, and stays locked: launches take no lock in such a child.
    global _forked
    _forked = _forked or _started or _layer() != "unknown"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
