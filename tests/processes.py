"""Fresh interpreters for what must be seen from the start of a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numbanorm


def environment(**own: str) -> dict[str, str]:
    """Return the environment of an interpreter that finds the same numbanorm as this one."""
    home = str(Path(numbanorm.__file__).parents[1])
    path = os.pathsep.join(p for p in (home, os.environ.get("PYTHONPATH", "")) if p)
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
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    return done.stdout.strip()
