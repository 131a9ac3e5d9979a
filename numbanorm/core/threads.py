"""How many threads the kernels use, and when they must not use any."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numba as _typed_numba

numba: Any = _typed_numba  # its own annotations leave out what is asked of it here
_requested: int | None = None
_forked = False
_lock = threading.Lock()
_here = threading.local()
_started = False


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
    _prepare()
    return int(numba.get_num_threads())


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


def usable_threads() -> int:
    """Return the threads that a kernel may use here and now.

    1 under `serial`, in a child forked after threads had started, and in a parallel region of the workqueue layer.
    """
    return 1 if _forked or getattr(_here, "serial", False) or _in_workqueue() else get_num_threads()


@contextmanager
def serial() -> Iterator[None]:
    """Keep the kernels that this Python thread calls on one thread: something else runs many such calls at once."""
    before = getattr(_here, "serial", False)
    _here.serial = True
    try:
        yield
    finally:
        _here.serial = before


def launch_lock() -> threading.Lock:
    """Set up Numba's threads for a parallel kernel; return the lock that its launch must hold.

    One parallel kernel runs at a time: the workqueue layer aborts the process if two Python threads are in one at once,
    and under OpenMP each of them would start as many threads as there are cores. Who finds the lock taken runs the
    serial twin: the bits are the same, no one waits, and a signal handler that calls a norm cannot wait for itself.
    """
    _prepare()
    if _requested is not None and numba.get_num_threads() != _requested:
        numba.set_num_threads(_requested)
    return _lock


def _in_workqueue() -> bool:
    """Tell whether this is one of workqueue's own threads, in a parallel region: a second launch would abort."""
    return isinstance(threading.current_thread(), threading._DummyThread) and _layer() == "workqueue"


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
