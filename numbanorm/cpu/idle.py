"""Whether a core is idle: a thread that is woken where none is takes part late, and holds up who waits for it."""

from __future__ import annotations

import os

_LOAD = "/proc/loadavg"


def idle_cores() -> int | None:
    """Return how many cores run nothing just now; None where the system does not say.

    Linux tells how many threads run, in the fourth field of ``/proc/loadavg`` (proc_loadavg(5)), the caller's among
    them. Where a process may use only some of the cores, it is not known on which of them the others run.
    """
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) != os.cpu_count():
        return None
    try:
        file = os.open(_LOAD, os.O_RDONLY | os.O_CLOEXEC)
        try:
            load = os.read(file, 128)
        finally:
            os.close(file)
        running = int(load.split()[3].partition(b"/")[0])
    except (OSError, ValueError, IndexError):
        return None
    return max((os.cpu_count() or 1) - running, 0) if running > 0 else None
