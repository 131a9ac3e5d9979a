"""Rows unit by unit: the bits of each row alone, whatever lies beside it and wherever the output begins."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from placing import begin_at

import numbanorm as nn
from numbanorm.calls import memory
from numbanorm.core import pool
from numbanorm.cpu.profile import EMERALD_RAPIDS, ZEN4, CpuProfile

RNG = np.random.default_rng(11)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = [(33_001, 64), (2_201, 1024), (4_111, 512), (701, 3072), (300, 96), (77, 128), (19, 768), (33_001, 72)]


def awkward(shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """Draw rows of which some are constant, tiny, huge, far from where they begin, or not finite."""
    x = RNG.standard_normal(shape, np.float32) + 3
    for row in (0, 3, shape[0] // 2):
        x[row] = 7
        x[row + 1] *= 1e-30
        x[row + 2] *= 1e30
        x[row + 3, 20:] += 1e4
        x[row + 5, 1] = np.inf
    return x.astype(dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64), BFLOAT16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_row_has_the_bits_that_it_has_alone(shape: tuple[int, int], dtype: np.dtype, eps: float) -> None:
    x = awkward(shape, dtype)
    size = shape[1]
    weight, bias = RNG.standard_normal((2, size)).astype(dtype)
    results = []
    for offset in (0, 16):
        out = begin_at(shape, dtype, offset)
        results.append(nn.layer_norm(x, size, weight, bias, eps=eps, out=out, return_stats=True))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
    for row in {*range(9), shape[0] // 2 + 4, *range(0, shape[0], 997), shape[0] - 1}:
        alone = nn.layer_norm(x[row], size, weight, bias, eps=eps, return_stats=True)
        for a, b in zip(results[0], alone, strict=True):
            np.testing.assert_array_equal(a[row].view(np.uint8), b.view(np.uint8))


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_of_rows_that_lie_apart(shape: tuple[int, int]) -> None:
    wide = awkward((shape[0], shape[1] + 8), np.dtype(np.float32))
    x = wide[:, : shape[1]]
    weight = RNG.standard_normal(shape[1], np.float32)
    np.testing.assert_array_equal(nn.rms_norm(x, shape[1], weight), nn.rms_norm(x.copy(), shape[1], weight))


@pytest.mark.parametrize("cpu", [EMERALD_RAPIDS, ZEN4], ids=lambda cpu: cpu.name)
@pytest.mark.parametrize(("stream", "smallest"), [(True, 1), (True, 1 << 30), (False, 1 << 30)])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64), BFLOAT16], ids=str)
@pytest.mark.parametrize("shape", [(301, 64), (83, 1024), (37, 3072), (103, 96), (131, 72), (29, 1100), (403, 4)])
def test_backward_of_each_row_has_the_bits_that_it_has_alone(
    shape: tuple[int, int],
    dtype: np.dtype,
    stream: bool,
    smallest: int,
    cpu: CpuProfile,
    launch_with: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By twos, by pairs or one by one, in whatever units, and with dx from the pool, where it begins with a line."""
    rows, size = shape
    x, dy = RNG.standard_normal((2, *shape)).astype(dtype)
    x[5] = 3
    dy[rows - 9] = 0
    weight = RNG.standard_normal(size).astype(dtype)
    _, mean, rstd = nn.layer_norm(x, size, return_stats=True)
    alone = [nn.layer_norm_backward(dy[i], x[i], size, mean[i], rstd[i], weight) for i in range(rows)]
    for module in (pool, memory):
        monkeypatch.setattr(module, "SMALLEST", smallest)
    backward = cpu.backward_bytes and 1 << 14
    launch_with(cpu, stream_from=1 if stream else 1 << 30, backward_bytes=backward)
    dx, dweight, dbias = nn.layer_norm_backward(dy, x, size, mean, rstd, weight)
    for i in range(rows):
        np.testing.assert_array_equal(dx[i], alone[i][0])
    wide = dy.astype(np.float64)
    h = (x.astype(np.float64) - mean) * rstd
    error = 2**-7 if dtype == BFLOAT16 else 1e-6
    for sums, terms in ((dweight, wide * h), (dbias, wide)):
        np.testing.assert_allclose(sums.astype(np.float64), terms.sum(0), 0, error * np.abs(terms).sum(0).max())
