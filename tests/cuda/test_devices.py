"""The CUDA backend's host side on arrays whose device memory is host memory; no GPU is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run
from simulated import passed_in_simulator

TESTS = Path(__file__).parents[1]


PARTS = {
    "devices/test_arguments_on_device.py": 400,
    "devices/test_calls.py": 700,
    "devices/test_dask_on_device.py": 60,
    "devices/test_libraries.py": 40,
    "devices/test_norms_on_device.py": 40,
    "devices/test_partials_on_device.py": 50,
    "devices/test_running_on_device.py": 90,
    "gpu/test_behaviour.py": 35,
    "gpu/test_functions.py": 650,
}
"""Files of tests, and how many tests of each pass at least."""


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_in_a_process_of_its_own(part: str) -> None:
    """Numba's simulator must be chosen before numba.cuda is imported, and holds for a whole process."""
    pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install numbanorm[cuda]")
    pytest.importorskip("greenlet", reason="the simulator needs greenlet")
    assert passed_in_simulator(str(TESTS / part)) >= PARTS[part]


def test_no_part_is_left_out() -> None:
    found = {f"{folder}/{file.name}" for folder in ("devices", "gpu") for file in (TESTS / folder).glob("test_*.py")}
    assert found == set(PARTS)


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
