"""Runs the CUDA kernels' tests in Numba's simulator, which must be chosen before numba-cuda is imported."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from simulated import passed_in_simulator

pytest.importorskip("greenlet")
pytest.importorskip("ml_dtypes")
pytest.importorskip("numbanorm.cuda.toolchain", exc_type=ImportError)

KERNELS = Path(__file__).with_name("test_kernels.py")
TESTS = re.findall(r"^def (test_\w+)", KERNELS.read_text(), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("test", TESTS)
def test_kernels_in_the_simulator(test: str) -> None:
    assert passed_in_simulator(f"{KERNELS}::{test}") >= 1


def test_all_are_found() -> None:
    assert len(TESTS) >= 16
