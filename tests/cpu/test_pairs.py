"""Long groups past the caches, two written beside the sums of the next two: the bits of each group alone."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from placing import begin_at

import numbanorm as nn
from numbanorm.core.plan import plan
from numbanorm.core.pool import POOL
from numbanorm.cpu import launch
from numbanorm.cpu.profile import EMERALD_RAPIDS, ZEN4

RNG = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def on_each_cpu(launch_with: Callable[..., None]) -> None:
    """Take pairs on CPUs, too, that do better without."""
    launch_with(EMERALD_RAPIDS)


def awkward(shape: tuple[int, ...]) -> np.ndarray:
    """Draw samples of which some are constant, tiny, huge, or far from where they begin."""
    x = RNG.standard_normal(shape, np.float32) + 3
    x[1] = 7
    x[2] *= 1e-30
    x[3] *= 1e30
    x[4].flat[20::700] = 1e6
    x[5].flat[20:] += 1e4
    return x


@pytest.mark.parametrize("offset", [0, 16, 48, 4])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((601, 4096), 0), ((120, 20480), 0), ((12, 64, 56, 56), 32), ((12, 64, 56, 56), 64), ((9, 6, 240, 240), 3)],
)
def test_each_group_has_the_bits_that_it_has_alone(
    shape: tuple[int, ...], groups: int, affine: bool, offset: int
) -> None:
    x = awkward(shape)
    size = shape[1]
    weight, bias = (RNG.standard_normal(size, np.float32) for _ in range(2)) if affine else (None, None)

    def normalize(x: np.ndarray, out: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        if groups == 0:
            return nn.layer_norm(x, size, weight, bias, out=out, return_stats=True)
        return nn.group_norm(x, groups, weight, bias, out=out, return_stats=True)

    out = begin_at(shape, np.float32, offset)
    out[...] = np.nan
    before = nn.get_num_threads()
    for threads in {1, before}:
        nn.set_num_threads(threads)
        try:
            together = normalize(x, out)
        finally:
            nn.set_num_threads(before)
        for sample in range(0, shape[0], 1 if shape[0] < 20 else 7):
            for got, wanted in zip(together, normalize(x[sample : sample + 1]), strict=True):
                np.testing.assert_array_equal(got[sample], wanted[0])
    np.testing.assert_array_equal(normalize(x.copy(), None)[0], out)


def test_in_place() -> None:
    x = awkward((700, 4096))
    wanted = nn.layer_norm(x, 4096)
    for offset in (0, 16):
        y = begin_at(x.shape, x.dtype, offset)
        y[...] = x
        nn.layer_norm(y, 4096, out=y)
        np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_residual_and_dtypes(dtype: object) -> None:
    x, residual = (RNG.standard_normal((530, 4096), np.float32).astype(dtype) for _ in range(2))
    weight = RNG.standard_normal(4096).astype(dtype)
    for offset in (0, 16):
        out = begin_at(x.shape, dtype, offset)
        y, total = nn.rms_norm(x, 4096, weight, residual=residual, out=out)
        np.testing.assert_array_equal(total, x + residual)
        for sample in range(0, 530, 50):
            alone, _ = nn.rms_norm(x[sample], 4096, weight, residual=residual[sample])
            np.testing.assert_array_equal(y[sample].view(np.uint8), alone.view(np.uint8))


NARROW = [(33_003, 64), (66_001, 32), (33_400, 63)]


@pytest.mark.parametrize("shape", [(2100, 1000), (2100, 1024), (701, 4096), (701, 4095), (1030, 2048), *NARROW])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_backward(shape: tuple[int, int], dtype: object) -> None:
    x, dy = (RNG.standard_normal(shape, np.float32).astype(dtype) for _ in range(2))
    weight = RNG.standard_normal(shape[1]).astype(dtype)
    _, mean, rstd = nn.layer_norm(x, shape[1], weight, return_stats=True)
    got = nn.layer_norm_backward(dy, x, shape[1], mean, rstd, weight)
    exact = [array.astype(np.float64) for array in (dy, x)]
    wanted = nn.layer_norm_backward(*exact, shape[1], mean, rstd, weight.astype(np.float64))
    for a, b in zip(got, wanted, strict=True):
        limit = 3e-7 if dtype is np.float32 else 2.0**-8
        assert np.abs(a.astype(np.float64) - b).max() <= limit * np.abs(b).max()


@pytest.mark.parametrize("shape", NARROW)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_narrow_rows_of_backward(shape: tuple[int, int], dtype: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed by four where their memory begins with a line: dx of each row alone, gradients wherever dx lies."""
    x, dy = (RNG.standard_normal(shape).astype(dtype) for _ in range(2))
    weight = RNG.standard_normal(shape[1]).astype(dtype)
    _, mean, rstd = nn.layer_norm(x, shape[1], weight, return_stats=True)
    got = nn.layer_norm_backward(dy, x, shape[1], mean, rstd, weight)
    assert got[0].ctypes.data % 64 == 0
    monkeypatch.setattr(POOL, "empty", lambda shape, dtype, *_: begin_at(shape, dtype, 16))
    elsewhere = nn.layer_norm_backward(dy, x, shape[1], mean, rstd, weight)
    assert elsewhere[0].ctypes.data % 64 == 16
    for a, b in zip(got, elsewhere, strict=True):
        np.testing.assert_array_equal(a, b)
    for first in range(0, shape[0], 4999):
        part = slice(first, first + 5)
        alone, *_ = nn.layer_norm_backward(dy[part], x[part], shape[1], mean[part], rstd[part], weight)
        np.testing.assert_array_equal(got[0][part], alone)


@pytest.mark.parametrize("shape", [(601, 4096), (120, 20480)])
def test_the_launch_takes_them_so(shape: tuple[int, int]) -> None:
    made = plan("layer", (None, None, (1,)), shape, ((4 * shape[1], 4), 4))
    assert launch.geometry(made, True)[0]["pairs"] == 1
    short = plan("layer", (None, None, (1,)), (8, shape[1]), ((4 * shape[1], 4), 4))
    assert launch.geometry(short, True)[0]["pairs"] == 0


def test_zen_does_without(launch_with: Callable[..., None]) -> None:
    launch_with(ZEN4)
    made = plan("layer", (None, None, (1,)), (2048, 2048), ((8192, 4), 4))
    g = launch.geometry(made, True)[0]
    assert (g["pairs"], g["ahead"], g["ahead_out"], g["unit_groups"]) == (0, 0, 0, 8)
