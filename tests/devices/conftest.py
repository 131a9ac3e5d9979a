"""These tests run in a process of their own, which `tests/cuda/test_devices.py` starts."""

from __future__ import annotations

import os

import pytest

if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
    collect_ignore_glob = ["*.py"]


@pytest.fixture(autouse=True)
def _fresh_record() -> None:
    """Every test sees its own launches and waits alone."""
    import standin

    standin.LAUNCHES.clear()
    standin.WAITS.clear()
    standin.use_cpu_kernels()
