"""Warm up: kernels are in the cache afterwards, and wrong names are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import numbanorm as nn
from numbanorm.cli.main import cli
from numbanorm.core.norms import NORMS

COUNT_COMPILED = """
import numpy as np, numbanorm as nn
x = np.ones(({rows}, {width}), np.float32)
nn.set_num_threads(1)
nn.RMSNorm({width})(x)
from numbanorm.cpu import rows
print(sum(rows.forward.serial.stats.cache_misses.values()), sum(rows.forward.serial.stats.cache_hits.values()))
"""


def test_a_later_process_compiles_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}

    def counts(rows: int = 4, width: int = 64) -> str:
        command = [sys.executable, "-c", COUNT_COMPILED.format(rows=rows, width=width)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    command = [sys.executable, "-m", "numbanorm", "warmup", "--norms", "rms", "--forward"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "2/2" in result.stdout
    assert counts() == "0 1"
    assert counts(1 << 10, 2048) == "0 1"  # long rows past the caches, whose kernel is another


def test_every_norm_and_dtype() -> None:
    seen: list[tuple[int, int, str]] = []
    total = nn.warmup(dtypes=["float32"], progress=lambda *step: seen.append(step))
    assert [step[0] for step in seen] == list(range(total + 1))
    assert {step[2].split()[0] for step in seen[:-1]} == set(NORMS)


def test_wrong_names() -> None:
    with pytest.raises(ValueError, match=r"norms: expected some of batch.*got 'bath'"):
        nn.warmup(["bath"])
    with pytest.raises(ValueError, match=r"dtype: expected one of .*got 'int8'"):
        nn.warmup(dtypes=["int8"])
    result = CliRunner().invoke(cli, ["warmup", "--dtypes", "float31"])
    assert result.exit_code == 1
    assert "dtype: expected one of" in result.output
