"""Narrow rows are written by columns, several rows together; the bits are those of each row by itself."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import numbanorm as nn
from numbanorm.core.plan import plan
from numbanorm.cpu import launch, profile

RNG = np.random.default_rng(8)
WIDTHS = [1, 5, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 100, 255]
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int16]


def apart(array: np.ndarray) -> np.ndarray:
    """Return the same rows with memory between them: such are not taken together."""
    rows, width = array.shape
    wide = np.zeros((rows, width + 7), array.dtype)
    wide[:, :width] = array
    return wide[:, :width]


def data(rows: int, width: int, dtype: Any) -> np.ndarray:
    x = RNG.standard_normal((rows, width)) * RNG.choice([1e-3, 1, 200], (rows, 1)) + RNG.choice([0, 3, -50], (rows, 1))
    return x.astype(dtype)


def same(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_array_equal(np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_forward(width: int, dtype: Any) -> None:
    for rows in (1, 2, 3, 4, 5, 6, 7, 40, 333):
        x = data(rows, width, dtype)
        if rows == 333 and dtype is not np.int16:
            x[100], x[200, 0], x[300] = 0, np.nan, 3e4
        lane = np.float64 if dtype is np.float64 else np.float32
        weight, bias = RNG.standard_normal((2, width)).astype(lane)
        for norm, affine in ((nn.layer_norm, (weight, bias)), (nn.rms_norm, (weight,))):
            together = norm(x, width, *affine, return_stats=True)
            out = apart(np.empty_like(together[0]))
            by_itself = norm(x, width, *affine, return_stats=True, out=out)
            assert by_itself[0] is out
            for a, b in zip(together, by_itself, strict=True):
                same(a, b)
            if dtype is not np.int16:
                residual = data(rows, width, dtype)
                y, total = norm(x, width, *affine, residual=residual)
                alone, of_alone = norm(x, width, *affine, residual=residual, out=out)
                same(y, alone)
                same(total, of_alone)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_backward(width: int, dtype: Any) -> None:
    for rows in (1, 3, 4, 31, 32, 33, 100):
        x, dy = data(rows, width, dtype), data(rows, width, dtype)
        weight = RNG.standard_normal(width).astype(np.float64 if dtype is np.float64 else np.float32)
        _, mean, rstd = nn.layer_norm(x, width, weight, return_stats=True)
        together = nn.layer_norm_backward(dy, x, width, mean, rstd, weight)
        by_itself = nn.layer_norm_backward(apart(dy), x, width, mean, rstd, weight)
        for a, b in zip(together, by_itself, strict=True):
            same(a, b)


@pytest.mark.parametrize("width", [8, 16, 24, 64])
def test_past_the_caches(width: int) -> None:
    """As many elements as are else written past them."""
    rows = profile.profile().stream_from // width + 5
    x, dy = data(rows, width, np.float32), data(rows, width, np.float32)
    weight = RNG.standard_normal(width).astype(np.float32)
    y, mean, rstd = nn.layer_norm(x, width, weight, return_stats=True)
    dx, *_ = nn.layer_norm_backward(dy, x, width, mean, rstd, weight)
    for first in range(0, rows, 20_011):
        part = slice(first, first + 5)
        alone, of_alone, _ = nn.layer_norm(x[part], width, weight, return_stats=True, out=apart(x[part]))
        same(y[part], alone)
        same(mean[part], of_alone)
        same(dx[part], nn.layer_norm_backward(apart(dy[part]), x[part], width, mean[part], rstd[part], weight)[0])


@pytest.mark.parametrize(
    ("rows", "width", "forward", "backward"),
    [
        (64, 64, 1, 1),
        (64, 96, 0, 0),
        (64, 100, 1, 1),
        (64, 256, 0, 0),
        (200_000, 16, 1, 1),
        (200_000, 32, 0, 0),
        (30_000, 100, 0, 1),
    ],
)
def test_the_launch_takes_them_so(rows: int, width: int, forward: int, backward: int) -> None:
    made = plan("layer", (None, None, (1,)), (rows, width), ((4 * width, 4), 4))
    g = launch.geometry(made, True)[0]
    assert (g["narrow"], g["back_narrow"]) == (forward, backward)
