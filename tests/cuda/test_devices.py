"""The CUDA backend's host side on arrays whose device memory is host memory; no GPU is needed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import run


def test_in_a_process_of_its_own() -> None:
    """Numba's simulator must be chosen before numba.cuda is imported, and holds for a whole process."""
    pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install numbanorm[cuda]")
    pytest.importorskip("greenlet", reason="the simulator needs greenlet")
    tests = Path(__file__).parents[1]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests / "devices"), str(tests / "gpu")],
        env=own | {"NUMBA_ENABLE_CUDASIM": "1"},
        cwd=tests.parent,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    passed = re.search(r"(\d+) passed", summary)
    assert passed
    assert int(passed[1]) > 2000


ASKS = """
import sys
sys.modules["numba.cuda"] = None  # as where numba-cuda is not installed
import numpy as np
import numbanorm as nn

class Cuda:
    shape, dtype = (4, 6), np.dtype(np.float32)
    __cuda_array_interface__ = {"shape": (4, 6), "typestr": "<f4", "data": (64, False), "version": 3}

calls = [
    lambda: nn.layer_norm(Cuda(), 6),
    lambda: nn.LayerNorm(6)(Cuda()),
    lambda: nn.Moments.of(Cuda()),
    lambda: nn.LayerNorm(6).to("cuda"),
]
for call in calls:
    try:
        call()
    except (TypeError, ValueError) as error:
        print(error)
print(nn.calls.config.config()["gpu"])
print(nn.LayerNorm(6)(np.ones((4, 6))).sum(), nn.LayerNorm(6).to("cpu").device)
"""


def test_without_numba_cuda() -> None:
    """All but CUDA works, and asking for CUDA names what to install."""
    *errors, gpu, works = run(ASKS).splitlines()
    reason = 'CUDA arrays need numba-cuda, which is not installed: pip install "numbanorm[cuda]"'
    assert errors == [f"x: expected an array in host memory, got a CUDA array: {reason}"] * 3 + [
        f"device: expected 'cpu', got 'cuda': {reason}"
    ]
    assert gpu == reason
    assert works == "0.0 cpu"
