"""Imports and first calls, each in a Python of its own."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile

from . import common

_IMPORT = """
import time
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""

_FIRST_CALL = """
import time
import numpy as np
import numbanorm as nn
nn.set_num_threads(1)
x = np.random.default_rng(0).standard_normal((128, 768), dtype=np.float32)
start = time.perf_counter()
y = nn.layer_norm(x, 768)
print(time.perf_counter() - start)
assert abs(y.std() - 1) < 1e-3, "not a layer norm"
"""


def seconds(code: str, cache: str | None = None) -> float:
    """Run code that prints seconds, with Numba's cache in a given folder, or where it always is."""
    environment = dict(os.environ) if cache is None else os.environ | {"NUMBA_CACHE_DIR": cache}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout)


class Import:
    """Nothing is compiled at import."""

    version = "1"

    @common.tracked("seconds")
    def track_import(self) -> float:
        """Median seconds of `import numbanorm` in a fresh Python."""
        return statistics.median(seconds(_IMPORT.format(module="numbanorm")) for _ in range(5))

    @common.tracked("x")
    def track_import_over_import_numba(self) -> float:
        """Time of `import numbanorm` over that of `import numba`, in turns."""
        pairs = [[seconds(_IMPORT.format(module=name)) for name in ("numbanorm", "numba")] for _ in range(5)]
        return statistics.median(ours / theirs for ours, theirs in pairs)


class FirstCall:
    """The first layer norm of a process."""

    version = "1"

    @common.tracked("seconds")
    def track_cold(self) -> float:
        """Seconds of the first call where no kernel is in the cache."""
        with tempfile.TemporaryDirectory() as cache:
            return seconds(_FIRST_CALL, cache)

    @common.tracked("seconds")
    def track_warm(self) -> float:
        """Median seconds of the first call where the kernel comes from the cache."""
        with tempfile.TemporaryDirectory() as cache:
            seconds(_FIRST_CALL, cache)
            return statistics.median(seconds(_FIRST_CALL, cache) for _ in range(3))
