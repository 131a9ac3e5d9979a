"""Warm up: kernels are in the cache afterwards, and wrong names are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import numbanorm as nn
from numbanorm.cli import cli

COUNT_COMPILED = """
import numpy as np, numbanorm as nn
x = np.ones((4, 64), np.float32)
nn.RMSNorm(64)(x)
from numbanorm.cpu import rows
print(sum(rows.forward.serial.stats.cache_misses.values()), sum(rows.forward.serial.stats.cache_hits.values()))
"""


def test_a_later_process_compiles_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}

    def counts() -> str:
        command = [sys.executable, "-c", COUNT_COMPILED]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    command = [sys.executable, "-m", "numbanorm", "warmup", "--norms", "rms", "--forward"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "2/2" in result.stdout
    assert counts() == "0 1"


def test_every_norm_and_dtype() -> None:
    seen: list[tuple[int, int, str]] = []
    total = nn.warmup(dtypes=["float32"], progress=lambda *step: seen.append(step))
    assert [step[0] for step in seen] == list(range(total + 1))
    assert {step[2].split()[0] for step in seen[:-1]} == {"batch", "layer", "instance", "group", "rms"}


def test_wrong_names() -> None:
    with pytest.raises(ValueError, match=r"norms: expected some of batch.*got 'bath'"):
        nn.warmup(["bath"])
    with pytest.raises(ValueError, match=r"dtype: expected one of .*got 'int8'"):
        nn.warmup(dtypes=["int8"])
    result = CliRunner().invoke(cli, ["warmup", "--dtypes", "float31"])
    assert result.exit_code == 1
    assert "dtype: expected one of" in result.output
