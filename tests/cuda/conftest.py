"""The CUDA kernels' tests: in Numba's simulator, on a GPU, and compiled for GPUs that need not be there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


@pytest.fixture
def device() -> Iterator[Any]:
    """Return where the kernels run: the simulator, or the GPU."""
    if SIMULATED:
        import simulator as memory
    else:
        import gpu_memory as memory
    from kernel_cases import Device

    yield Device(memory.place, memory.allocate, memory.view)
    memory.clear()
