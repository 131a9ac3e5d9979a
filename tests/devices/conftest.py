"""These tests run in a process of their own, which `test_devices.py` starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
    collect_ignore_glob = ["*.py"]
else:
    sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))  # the simulator


@pytest.fixture(autouse=True)
def _fresh_record() -> None:
    """Every test sees its own launches and waits alone."""
    import standin

    standin.LAUNCHES.clear()
    standin.WAITS.clear()
    standin.use_cpu_kernels()
