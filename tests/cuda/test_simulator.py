"""Runs the CUDA kernels' tests in Numba's simulator, which must be chosen before numba-cuda is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("greenlet")
pytest.importorskip("ml_dtypes")
pytest.importorskip("numbanorm.cuda.toolchain", exc_type=ImportError)

HERE = Path(__file__).parent


def test_kernels_in_the_simulator() -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_kernels.py")],
        env=own | {"NUMBA_ENABLE_CUDASIM": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-1000:]
    assert int(passed.group(1)) > 500
    assert "skipped" not in done.stdout.splitlines()[-1]
