"""Tests in a process of their own, in which Numba's simulator is chosen before numba-cuda is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def passed_in_simulator(*tests: str) -> int:
    """Run tests, none of which may fail; return how many passed."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env=own | {"NUMBA_ENABLE_CUDASIM": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-1000:]
    return int(passed[1])
