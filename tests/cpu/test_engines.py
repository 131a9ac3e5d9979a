"""A unit of work has the same bits whoever does it: one thread, helpers that claim units, Numba's threads."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from engine_results import CASES, on_threads, sharing_kernels
from processes import SUPPORT, environment


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Return what one thread gives."""
    return on_threads(1)


def elsewhere(engine: str) -> dict[str, Any]:
    """Return what two threads give in a process with this engine."""
    command = [sys.executable, str(SUPPORT / "engine_results.py"), "2"]
    own = environment(NUMBANORM_THREADS=engine, NUMBA_NUM_THREADS="2")
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return dict(json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["claims", "numba"])
def test_the_same_bits(engine: str, alone: dict[str, Any]) -> None:
    """On every kernel that claims units."""
    found = elsewhere(engine)
    differing = [name for name in CASES if found["digests"][name] != alone["digests"][name]]
    assert differing == []
    assert alone["shared"] == []
    assert set(found["shared"]) == sharing_kernels()
    assert (found["helped"] > 0) == (engine == "claims")
