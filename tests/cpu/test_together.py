"""Runs of neighbouring channels taken one after the other, as they lie in memory: the bits of channels one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import numbanorm as nn
from numbanorm.core.plan import plan
from numbanorm.cpu import launch

RNG = np.random.default_rng(5)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = [(6, 40, 37, 41), (70, 40, 11, 13), (5, 40, 7, 200), (90, 65, 7, 7)]


@pytest.fixture(autouse=True)
def for_two_threads(launch_with: Callable[..., None]) -> None:
    """Share channels as among two threads: among many, these few would be taken one by one."""
    launch_with(SHARES=8)


def awkward(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Draw channels of which some are constant, far from 0, tiny or huge, and some begin far from their mean."""
    x = RNG.standard_normal(shape, np.float32) + 3
    x[:, 1] = 7
    x[:, 2] += 1e4
    x[:, 3] *= 1e-30
    x[:, 4] *= 1e30
    x[0, 5, 0, :20] += 1e5
    return x.astype(dtype)


def together(shape: tuple[int, ...]) -> int:
    """Return how many channels the launch takes together."""
    strides = tuple(4 * int(np.prod(shape[axis + 1 :])) for axis in range(4))
    made = plan("batch", (1, None, None), shape, (strides, 4))
    return int(launch.geometry(made, True)[0]["together"])


def draw_mask(shape: tuple[int, ...], masked: str) -> Any:
    """Draw a mask for all channels, or for each."""
    if not masked:
        return None
    return RNG.random(shape if masked == "each channel" else (shape[0], 1, *shape[2:])) < 0.7


def few(shape: tuple[int, ...]) -> list[slice]:
    """Return channels that come two or three at a time: too few to share among threads, so each by itself."""
    return [slice(c, min(c + 3, shape[1])) for c in range(0, shape[1] - 1, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_launch_takes_several(shape: tuple[int, ...]) -> None:
    assert 2 <= together(shape) <= shape[1] // 2
    assert all(together((shape[0], of.stop - of.start, *shape[2:])) == 1 for of in few(shape))


@pytest.mark.parametrize("masked", ["", "all channels", "each channel"])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape: tuple[int, ...], dtype: np.dtype, masked: str) -> None:
    x = awkward(shape, dtype)
    weight, bias = RNG.standard_normal((2, shape[1]), np.float32)
    mask = draw_mask(shape, masked)
    got = nn.batch_norm(x, None, None, weight, bias, training=True, mask=mask, return_stats=True)
    for of in few(shape):
        part = np.ascontiguousarray(x[:, of])
        some = mask[:, of] if masked == "each channel" else mask
        alone = nn.batch_norm(part, None, None, weight[of], bias[of], training=True, mask=some, return_stats=True)
        np.testing.assert_array_equal(got[0][:, of].view(np.uint8), alone[0].view(np.uint8))
        for a, b in zip(got[1:], alone[1:], strict=True):
            np.testing.assert_array_equal(a[of], b)


@pytest.mark.parametrize("masked", ["", "all channels", "each channel"])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape: tuple[int, ...], dtype: np.dtype, masked: str) -> None:
    x, dy = awkward(shape, dtype), RNG.standard_normal(shape, np.float32).astype(dtype)
    weight = RNG.standard_normal(shape[1], np.float32)
    mask = draw_mask(shape, masked)
    _, mean, rstd = nn.batch_norm(x, training=True, mask=mask, return_stats=True)
    got = nn.batch_norm_backward(dy, x, mean, rstd, weight, mask=mask)
    for of in few(shape):
        parts = [np.ascontiguousarray(array[:, of]) for array in (dy, x)]
        some = mask[:, of] if masked == "each channel" else mask
        alone = nn.batch_norm_backward(*parts, mean[of], rstd[of], weight[of], mask=some)
        np.testing.assert_array_equal(got[0][:, of].view(np.uint8), alone[0].view(np.uint8))
        for a, b in zip(got[1:], alone[1:], strict=True):
            np.testing.assert_array_equal(a[of], b)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64), BFLOAT16], ids=str)
@pytest.mark.parametrize("run", [(3, 11), (7, 7), (8, 8), (5, 13)])
def test_short_runs_in_inference(run: tuple[int, int], dtype: np.dtype) -> None:
    """Runs of a channel that are two vectors long at most: as sample by sample, also with a channel beyond float32."""
    x = awkward((6, 40, *run), dtype)
    mean, weight, bias = RNG.standard_normal((3, 40))
    variance = RNG.random(40) + 0.5
    for beyond in (1.0, 1e-70):
        variance[7] = beyond
        y = nn.batch_norm(x, mean, variance, weight, bias, eps=0.0)
        for sample in range(6):
            alone = nn.batch_norm(x[sample : sample + 1], mean, variance, weight, bias, eps=0.0)
            np.testing.assert_array_equal(y[sample].view(np.uint8), alone[0].view(np.uint8))
        in_place = x.copy()
        nn.batch_norm(in_place, mean, variance, weight, bias, eps=0.0, out=in_place)
        np.testing.assert_array_equal(in_place.view(np.uint8), y.view(np.uint8))
