"""Fresh interpreters for what must be seen from the start of a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numbanorm

SUPPORT = Path(__file__).parent
"""Where the modules lie that tests share, for the path of another process."""

WATCH = """
import faulthandler, os, signal, sys, threading, time
def watch():
    "End a process that hangs, and tell where. Naps, not a date: time in which all is stopped does not count."
    for _ in range(60):
        time.sleep(1)
    print("still running after a minute", file=sys.stderr, flush=True)
    faulthandler.dump_traceback()
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)  # children, too, which may hang as well
    os._exit(1)
threading.Thread(target=watch, daemon=True).start()
"""
"""Code for `run`: what follows it has a minute, whatever it waits for."""


def environment(**own: str) -> dict[str, str]:
    """Return the environment of an interpreter that finds the same numbanorm as this one."""
    home = str(Path(numbanorm.__file__).parents[1])
    path = os.pathsep.join(p for p in (home, str(SUPPORT), os.environ.get("PYTHONPATH", "")) if p)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPATH": path} | own


def run(code: str, *options: str, **own: str) -> str:
    """Run code in a fresh interpreter that finds the same numbanorm as this one; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-P", *options, "-c", code],  # -P: not the numbanorm that may lie in the current folder
        env=environment(**own),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        start_new_session=True,  # so that a watch can kill it with all its children
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    return done.stdout.strip()
