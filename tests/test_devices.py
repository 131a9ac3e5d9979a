"""The CUDA backend's host side on arrays whose device memory is host memory; no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_in_a_process_of_its_own() -> None:
    """Numba's simulator must be chosen before numba.cuda is imported, and holds for a whole process."""
    pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install numbanorm[cuda]")
    tests = Path(__file__).parent / "devices"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", str(tests)],
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTEST_ADDOPTS": ""},
        cwd=tests.parents[1],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    assert "passed" in summary
    assert "failed" not in summary
