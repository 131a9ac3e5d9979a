"""A GPU's arrays, in every library that is installed; where there is no GPU, what stands in for one elsewhere.

``pytest -m gpu`` runs these files on a GPU. `tests/cuda/test_devices.py` runs them without one on the stand-ins of
``tests/support/standin.py``, so that they are known to work before they meet a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


class Library(NamedTuple):
    """How arrays of a library are made and read."""

    name: str
    put: Callable[[np.ndarray], Any]
    get: Callable[[Any], np.ndarray]


def _numba() -> Library:
    from numba import cuda

    def put(array: np.ndarray) -> Any:
        raw = cuda.to_device(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        strides = np.empty(array.shape, array.dtype).strides
        return type(raw)(array.shape, strides, array.dtype, gpu_data=raw.gpu_data)

    def get(array: Any) -> np.ndarray:
        return array.copy_to_host()

    return Library("numba", put, get)


def _torch() -> Library:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch sees no GPU")

    def put(array: np.ndarray) -> Any:
        raw = torch.from_numpy(np.array(array, order="C").reshape(-1).view(np.uint8)).cuda()
        return raw.view(getattr(torch, array.dtype.name)).reshape(array.shape)

    def get(tensor: Any) -> np.ndarray:
        name = str(tensor.dtype).removeprefix("torch.")
        dtype = np.dtype(name) if name != "bfloat16" else np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
        return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().view(dtype).reshape(tuple(tensor.shape))

    return Library("torch", put, get)


def _cupy() -> Library:
    cupy = pytest.importorskip("cupy")

    def put(array: np.ndarray) -> Any:
        return cupy.asarray(array)

    return Library("cupy", put, lambda array: array.get())


def _stand_in() -> Library:
    import standin

    standin.use_cpu_kernels()
    return Library("stand-in", standin.Foreign, standin.host)


def _reason() -> str | None:
    from numbanorm.calls.dispatch import cuda_problem

    return cuda_problem()


MAKERS = {"stand-in": _stand_in} if SIMULATED else {"torch": _torch, "cupy": _cupy, "numba": _numba}


@pytest.fixture(scope="session")
def gpu() -> None:
    if _reason() is not None:
        pytest.skip(f"no GPU: {_reason()}")


@pytest.fixture(params=MAKERS)
def each_library(request: pytest.FixtureRequest, gpu: None) -> Library:
    """Return every library in turn."""
    return MAKERS[request.param]()


@pytest.fixture
def library(gpu: None) -> Iterator[Library]:
    """Return the first library that is installed: torch, CuPy, numba."""
    for make in MAKERS.values():
        try:
            found = make()
        except pytest.skip.Exception:
            continue
        yield found
        return
