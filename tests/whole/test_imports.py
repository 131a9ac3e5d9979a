"""What `import numbanorm` brings along, and what it costs; each in a process of its own."""

from __future__ import annotations

import statistics

import pytest
from processes import run
from tolerances import IMPORT_SECONDS

import numbanorm

FORBIDDEN = [
    "numba.cuda",
    "numba_cuda",
    "matplotlib",
    "torch",
    "dask",
    "click",
    "rich",
    "ml_dtypes",
    "pandas",
    "onnx",
    "sklearn",
    "safetensors",
]


def test_nothing_heavy_is_imported() -> None:
    code = f"""
import sys
import numbanorm
print([name for name in {FORBIDDEN!r} if name in sys.modules])
"""
    assert run(code) == "[]"


def test_nothing_heavy_is_imported_by_a_call() -> None:
    code = f"""
import sys
import numpy as np
import numbanorm as nn
x = np.ones((4, 6), np.float32)
nn.layer_norm(x, 6)
nn.BatchNorm(6)(x)
nn.Moments.of(x)
print([name for name in {FORBIDDEN!r} if name in sys.modules])
"""
    assert run(code) == "[]"


def test_nothing_is_compiled_or_started_by_the_import() -> None:
    code = """
import threading
import numba.core.dispatcher as dispatcher
compiled = []
compile = dispatcher.Dispatcher.compile
dispatcher.Dispatcher.compile = lambda self, sig: (compiled.append(self.py_func.__name__), compile(self, sig))[1]
import numbanorm
print(compiled, threading.active_count())
"""
    assert run(code) == "[] 1"


def test_it_is_the_same_package() -> None:
    assert run("import numbanorm; print(numbanorm.__file__)") == numbanorm.__file__


def test_no_warnings() -> None:
    assert run("import numbanorm; print(numbanorm.__version__)", "-W", "error") == numbanorm.__version__


def test_public_names() -> None:
    for name in numbanorm.__all__:
        assert getattr(numbanorm, name) is not None
    assert sorted(set(numbanorm.__all__)) == sorted(numbanorm.__all__)
    wanted = {
        *("batch_norm", "layer_norm", "instance_norm", "group_norm", "rms_norm"),
        *("BatchNorm", "LayerNorm", "InstanceNorm", "GroupNorm", "RMSNorm", "Norm"),
        *("Layout", "Moments", "set_num_threads", "get_num_threads"),
    }
    assert wanted <= set(numbanorm.__all__)


# Collecting first: a full pass over Numba's objects, 55 ms, is due soon after its import, whatever comes next.
TIMED = """
import gc
import time
import numba
gc.collect()
start = time.perf_counter()
import numbanorm
print(time.perf_counter() - start)
"""


@pytest.mark.slow
def test_cost_beside_numba() -> None:
    """The median of fresh processes; other work on the machine may disturb it, so there are three attempts."""
    run(TIMED)  # leaves compiled bytecode behind
    medians = []
    for _ in range(3):
        seconds = [float(run(TIMED)) for _ in range(5)]
        medians.append(statistics.median(seconds))
        if medians[-1] <= IMPORT_SECONDS:
            return
    pytest.fail(f"import numbanorm costs {min(medians):.3f} s beside numba, expected {IMPORT_SECONDS}")
