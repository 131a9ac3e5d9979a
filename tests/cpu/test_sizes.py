"""Sizes at which kernels change their ways: blocks, chunks, tiles, folds, tails; very many rows, one, none."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import psutil
import pytest
import reference
from reference import ARRANGEMENTS, error, normal, sealed
from tolerances import FLOAT32, FLOAT64

import numbanorm as nn


def data(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return (2 * normal(0, shape, np.float64) + 5).astype(dtype)


def affine(n: int) -> tuple[np.ndarray, np.ndarray]:
    return normal(1, (n,)), normal(2, (n,))


def check(y: np.ndarray, out: np.ndarray, expected: reference.Expected, tolerance: float = FLOAT32) -> None:
    assert y is out
    assert error(out, expected.y) <= tolerance


def check_rows(rows: int, width: int, dtype: Any = np.float32) -> None:
    """LayerNorm, RMSNorm and the channels-first norms, of runs of `width`."""
    x = data((rows, width), dtype)
    tolerance = FLOAT32 if dtype == np.float32 else FLOAT64
    weight, bias = affine(width)
    out = sealed(x.shape, dtype)
    check(nn.layer_norm(x, width, weight, bias, out=out), out, reference.layer_norm(x, (1,), weight, bias), tolerance)
    out = sealed(x.shape, dtype)
    check(nn.rms_norm(x, width, weight, out=out), out, reference.rms_norm(x, (1,), weight), tolerance)


def check_channels(shape: tuple[int, ...], groups: int, channel_axis: int, dtype: Any = np.float32) -> None:
    """Every norm over channels, and LayerNorm across them."""
    x = data(shape, dtype)
    c = shape[channel_axis]
    tolerance = FLOAT32 if dtype == np.float32 else FLOAT64
    weight, bias = affine(c)
    own = {"channel_axis": channel_axis}
    n = x.size // c
    if n > 1:
        out = sealed(shape, dtype)
        y = nn.batch_norm(x, None, None, weight, bias, True, out=out, **own)
        check(y, out, reference.batch_norm(x, None, None, weight, bias, True, **own), tolerance)
    out = sealed(shape, dtype)
    running = normal(3, (c,)), normal(4, (c,)) ** 2 + np.float32(0.3)
    y = nn.batch_norm(x, *running, weight, bias, out=out, **own)
    check(y, out, reference.batch_norm(x, *running, weight, bias, **own), tolerance)
    if n // shape[0] > 1:
        out = sealed(shape, dtype)
        y = nn.instance_norm(x, None, None, weight, bias, out=out, **own)
        check(y, out, reference.instance_norm(x, None, None, weight, bias, **own), tolerance)
    out = sealed(shape, dtype)
    y = nn.group_norm(x, groups, weight, bias, out=out, **own)
    check(y, out, reference.group_norm(x, groups, weight, bias, **own), tolerance)
    out = sealed(shape, dtype)
    y = nn.layer_norm(x, c, weight, bias, axis=channel_axis, out=out)
    check(y, out, reference.layer_norm(x, (channel_axis,), weight, bias), tolerance)


class TestWidths:
    @pytest.mark.parametrize("width", range(1, 71))
    def test_narrow(self, width: int) -> None:
        check_rows(11, width)

    @pytest.mark.parametrize("width", [*range(500, 1101, 43), 511, 512, 513, 767, 768, 769, 1023, 1024, 1025])
    def test_around_a_block(self, width: int) -> None:
        check_rows(5, width)
        check_rows(5, width, np.float64)

    @pytest.mark.parametrize("width", [4095, 4096, 4097, 16383, 16384, 16385, 16896, 16897, 32767, 32768, 32769, 50257])
    def test_around_a_chunk(self, width: int, threads: int) -> None:
        check_rows(3, width)

    @pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129])
    def test_short_runs_many_of_them(self, width: int) -> None:
        """Runs that are shorter than a block go several to a block."""
        shape = (9, 4, width)
        check_channels(shape, 2, 1)
        check_channels((70, 6, width), 3, 1)

    @pytest.mark.parametrize("width", [1, 3, 31, 32, 33, 250, 255, 256, 257, 513, 4097, 16385, 20000])
    def test_space(self, width: int, threads: int) -> None:
        check_channels((3, 4, width), 2, 1)


class TestChannelsLast:
    @pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6, 7, 12, 48, 63, 64, 65, 96, 97, 191, 192, 193])
    @pytest.mark.parametrize("rows", [1, 2, 7, 8, 63, 64, 65, 127, 128, 129, 500, 511, 513, 1023, 1025])
    def test_folded_lanes_and_tails(self, channels: int, rows: int) -> None:
        """Few lanes are folded to rows side by side; what is left over is the tail."""
        groups = next(d for d in (4, 3, 2, 5, 7, 1) if channels % d == 0)
        check_channels((2, rows, channels), groups, -1)

    @pytest.mark.parametrize("channels", [1, 2, 3, 5, 6, 24])
    @pytest.mark.parametrize(
        "rows", [4095, 4096, 4097, 10007, 16384, 16385, 32767, 32768, 43690, 43691, 46000, 65536, 65537, 70001]
    )
    def test_folds_of_many_rows(self, channels: int, rows: int, threads: int) -> None:
        if rows * channels > 300_000:
            rows //= 2
        x = data((rows, channels))
        weight, bias = affine(channels)
        out = sealed(x.shape)
        y = nn.batch_norm(x, None, None, weight, bias, True, out=out)
        check(y, out, reference.batch_norm(x, None, None, weight, bias, True))
        x = x[None]
        out = sealed(x.shape)
        y = nn.instance_norm(x, None, None, weight, bias, channel_axis=-1, out=out)
        check(y, out, reference.instance_norm(x, None, None, weight, bias, channel_axis=-1))
        out = sealed(x.shape)
        y = nn.group_norm(x, 1, weight, bias, channel_axis=-1, out=out)
        check(y, out, reference.group_norm(x, 1, weight, bias, channel_axis=-1))

    @pytest.mark.parametrize("channels", [511, 512, 513, 514, 1023, 1024, 1025, 1026, 1536, 2048])
    @pytest.mark.parametrize("rows", [1, 5, 129, 300])
    def test_many_channels(self, channels: int, rows: int) -> None:
        groups = next(d for d in (32, 27, 19, 11, 7, 2, 3, 1) if channels % d == 0)
        check_channels((2, rows, channels), groups, -1)

    @pytest.mark.parametrize("per_group", [1, 2, 3, 5, 7, 16, 30, 31, 32, 33, 64, 100])
    @pytest.mark.parametrize("groups", [1, 2, 5, 16, 17, 40])
    def test_channels_of_a_group(self, per_group: int, groups: int) -> None:
        """Lanes of one group merge; tiles hold whole groups; groups of 32 channels are rows."""
        for rows in (3, 130):
            x = data((2, rows, groups * per_group))
            weight, bias = affine(groups * per_group)
            out = sealed(x.shape)
            y = nn.group_norm(x, groups, weight, bias, channel_axis=-1, out=out)
            check(y, out, reference.group_norm(x, groups, weight, bias, channel_axis=-1))

    @pytest.mark.parametrize("space", [*range(1, 32, 3), 31])
    @pytest.mark.parametrize("channels", [2, 17, 100, 600])
    def test_short_space(self, space: int, channels: int) -> None:
        """Channels first, but runs too short for the rows kernel: C*S lanes, S of them a channel."""
        for samples in (2, 9, 140):
            x = data((samples, channels, space))
            weight, bias = affine(channels)
            out = sealed(x.shape)
            y = nn.batch_norm(x, None, None, weight, bias, True, out=out)
            check(y, out, reference.batch_norm(x, None, None, weight, bias, True))

    @pytest.mark.parametrize("dtype", [np.float64])
    @pytest.mark.parametrize("channels", [1, 3, 64, 193, 513, 1025])
    def test_float64(self, channels: int, dtype: Any) -> None:
        check_channels((2, 130, channels), 1, -1, dtype)

    @pytest.mark.parametrize("channels", [1, 2, 3, 5, 64, 513])
    @pytest.mark.parametrize("rows", [9, 129, 1000])
    def test_masks(self, channels: int, rows: int) -> None:
        x = data((3, rows, channels))
        for mask_shape in ((3, rows, channels), (3, rows, 1), (3, 1, 1), (1, 1, channels)):
            mask = np.random.default_rng(0).random(mask_shape) < 0.6
            for function, model in ((nn.batch_norm, reference.batch_norm), (nn.instance_norm, reference.instance_norm)):
                own = {"training": True} if function is nn.batch_norm else {}
                out = sealed(x.shape)
                y = function(x, mask=mask, channel_axis=-1, out=out, **own)
                check(y, out, model(x, mask=mask, channel_axis=-1, **own))


class TestManyRows:
    """More than 2**16."""

    @pytest.mark.parametrize("width", [1, 2, 3, 8, 33])
    def test_layer(self, width: int, threads: int) -> None:
        check_rows(2**16 + 5, width)

    @pytest.mark.parametrize("shape", [(2**16 + 5, 3), (2**16 + 5, 2, 3), (3, 2**15, 2)])
    def test_channels_first(self, shape: tuple[int, ...], threads: int) -> None:
        check_channels(shape, 1, 1)

    @pytest.mark.parametrize("shape", [(2, 2**16 + 5, 3), (2**16 + 5, 2, 3)])
    def test_channels_last(self, shape: tuple[int, ...], threads: int) -> None:
        check_channels(shape, 3, -1)

    def test_many_groups(self, threads: int) -> None:
        x = data((300, 300, 5))
        assert error(nn.instance_norm(x), reference.instance_norm(x).y) <= FLOAT32
        assert error(nn.group_norm(x, 100), reference.group_norm(x, 100).y) <= FLOAT32


class TestOne:
    @pytest.mark.parametrize("width", [1, 2, 5, 768, 20000])
    def test_row(self, width: int) -> None:
        check_rows(1, width)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_element(self, dtype: Any) -> None:
        x = np.full((1, 1), 3, dtype)
        weight, bias = np.array([7], dtype), np.array([0.25], dtype)
        assert nn.layer_norm(x, 1, weight, bias).tolist() == [[0.25]]
        assert nn.group_norm(x, 1, weight, bias).tolist() == [[0.25]]
        assert nn.rms_norm(x, 1, weight, 0.0).tolist() == [[7.0]]
        assert nn.batch_norm(x, [1.0], [4.0], weight, bias, eps=0.0).tolist() == [[7.25]]
        y, mean, rstd = nn.layer_norm(x, 1, eps=0.25, return_stats=True)
        assert (y.tolist(), mean.tolist(), rstd.tolist()) == ([[0.0]], [[3.0]], [[2.0]])
        assert nn.layer_norm(x[0], 1, weight, bias).tolist() == [0.25]

    @pytest.mark.parametrize("shape", [(1, 1, 5), (1, 3, 1, 7), (4, 1, 1, 2), (1, 1, 1, 1, 40), (2, 1), (2, 5, 1, 1)])
    def test_axes_of_one(self, shape: tuple[int, ...]) -> None:
        check_channels(shape, 1, 1)
        check_channels((shape[0], *shape[2:], shape[1]), 1, -1)


EMPTY = [(0, 4), (0, 4, 5), (3, 4, 0), (0, 4, 0), (3, 4, 0, 5), (3, 4, 5, 0), (0, 4, 5, 6), (3, 0), (3, 0, 5), (0, 0)]


class TestEmpty:
    @pytest.mark.parametrize("shape", EMPTY, ids=str)
    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int64])
    @pytest.mark.parametrize("last", [False, True])
    def test_channels(self, shape: tuple[int, ...], dtype: Any, last: bool) -> None:
        x = np.zeros(shape, dtype)
        c = shape[1]
        if last:
            x = np.moveaxis(x, 1, -1)
        own = {"channel_axis": -1 if last else 1}
        mean, var = normal(1, (c,)), normal(2, (c,)) ** 2
        before = mean.copy(), var.copy()
        wide = reference.result_dtype(x.dtype)
        out = np.empty(x.shape, wide)
        for function, statistics in ((nn.batch_norm, (c,)), (nn.instance_norm, (shape[0], c))):
            training = {"training": True} if function is nn.batch_norm else {}
            y, m, r = function(x, mean, var, mean, var, return_stats=True, **training, **own)
            assert (y.shape, y.dtype) == (x.shape, wide)
            assert m.shape == r.shape == statistics
            np.testing.assert_array_equal(m, np.zeros(statistics))
            np.testing.assert_allclose(r, np.full(statistics, 1e-5**-0.5))
            assert function(x, mean, var, out=out, **training, **own) is out
            assert function(x, mask=np.ones(x.shape, bool), **training, **own).shape == x.shape
            np.testing.assert_array_equal(mean, before[0])
            np.testing.assert_array_equal(var, before[1])
        assert nn.batch_norm(x, mean, var, **own).shape == x.shape
        if c:
            y, m, r = nn.group_norm(x, 2, return_stats=True, **own)
            assert y.shape == x.shape
            assert m.shape == r.shape == (shape[0], 2)

    @pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 5), (0, 0)], ids=str)
    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8])
    def test_axes(self, shape: tuple[int, ...], dtype: Any) -> None:
        x = np.zeros(shape, dtype)
        wide = reference.result_dtype(x.dtype)
        for axis in {(len(shape) - 1,), (0,), tuple(range(len(shape)))}:
            lengths = tuple(shape[a] for a in axis)
            y, mean, rstd = nn.layer_norm(x, lengths, np.ones(lengths), axis=axis, return_stats=True)
            assert (y.shape, y.dtype) == (shape, wide)
            assert mean.shape == tuple(1 if a in axis else n for a, n in enumerate(shape))
            y, rstd, total = nn.rms_norm(x, lengths, axis=axis, residual=x, return_stats=True)
            assert y.shape == total.shape == shape
            assert total.dtype == wide
            assert rstd.shape == mean.shape

    def test_layers(self) -> None:
        for layer in (nn.BatchNorm(4), nn.InstanceNorm(4, track_running_stats=True), nn.GroupNorm(2, 4)):
            for shape in ((0, 4, 5), (3, 4, 0)):
                assert layer(np.zeros(shape, np.float32)).shape == shape
            assert layer.num_batches_tracked in (0, None)
        assert nn.LayerNorm(5)(np.zeros((0, 5))).shape == (0, 5)
        assert nn.RMSNorm(5)(np.zeros((0, 5))).shape == (0, 5)

    def test_moments(self) -> None:
        for shape, axis in (((0, 3), 0), ((3, 0), 1), ((0,), None), ((2, 0, 3), (0, 1)), ((2, 0, 3), 0)):
            m = nn.Moments.of(np.zeros(shape), axis)
            assert m.count == (0 if axis != 0 or shape[0] == 0 else 2)
            assert np.isnan(m.var()).all()
            assert (m.mean == 0).all()


@pytest.mark.parametrize("name", ARRANGEMENTS)
@pytest.mark.parametrize("groups", [1, 2, 7, 30])
@pytest.mark.parametrize("n", [2, 6, 40, 512, 1030])
def test_arrangements(name: str, groups: int, n: int) -> None:
    how = ARRANGEMENTS[name]
    values = data((groups, n))
    x = how.place(values)
    out = sealed(x.shape)
    if name.startswith("instance") and n == 1:
        return
    how.call(x, groups, out=out, eps=1e-5)
    assert error(how.gather(out, groups), how.expected(values)) <= FLOAT32


WIDTH = 1025
ROWS = 2**31 // WIDTH + 1000
PERIOD = 997


@pytest.fixture(scope="module")
def huge() -> np.ndarray:
    """Return more than 2**31 bytes, which repeat every 997 rows."""
    if psutil.virtual_memory().available < 14e9:
        pytest.skip("needs 14 GB of free memory")
    pattern = np.random.default_rng(0).integers(0, 256, (PERIOD, WIDTH), np.uint8)
    x = np.empty((ROWS, WIDTH), np.uint8)
    for start in range(0, ROWS, PERIOD):
        x[start : start + PERIOD] = pattern[: ROWS - start]
    assert x.size > 2**31
    return x


@pytest.mark.huge
@pytest.mark.slow
class TestHuge:
    """More than 2**31 elements: indices must not wrap at 32 bits."""

    def test_rows(self, huge: np.ndarray) -> None:
        if psutil.virtual_memory().available < 10e9:
            pytest.skip("needs 10 GB of free memory beside the input")
        nn.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))
        y, mean, rstd = nn.layer_norm(huge, WIDTH, return_stats=True)
        for rows in (slice(0, 5), slice(2**30 // WIDTH, 2**30 // WIDTH + 5), slice(2**31 // WIDTH - 3, None, 50)):
            expected = reference.layer_norm(huge[rows], (1,))
            assert error(y[rows], expected.y) <= FLOAT32
            np.testing.assert_allclose(rstd[rows], expected.rstd, 1e-6)
            np.testing.assert_allclose(mean[rows], expected.mean, 1e-6)
        # The input repeats: so must the output, to the last bit.
        last = (ROWS // PERIOD - 1) * PERIOD
        np.testing.assert_array_equal(y[last : last + PERIOD], y[:PERIOD])

    def test_statistics(self, huge: np.ndarray) -> None:
        nn.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))
        whole = nn.Moments.of(huge)
        columns = nn.Moments.of(huge, 0)
        assert whole.count == huge.size
        assert columns.count == ROWS
        times, rest = divmod(ROWS, PERIOD)
        counts = np.full(PERIOD, times)
        counts[:rest] += 1
        pattern = huge[:PERIOD].astype(np.float64)
        mean = (counts[:, None] * pattern).sum(0) / ROWS
        var = (counts[:, None] * (pattern - mean) ** 2).sum(0) / ROWS
        np.testing.assert_allclose(columns.mean, mean, 1e-7)
        np.testing.assert_allclose(columns.var(), var, 1e-6)
        assert whole.mean == pytest.approx(mean.mean(), rel=1e-9)
        # Squares are added in float32, 32 to a lane: 1.3e-7 here.
        assert whole.var() == pytest.approx((var + (mean - mean.mean()) ** 2).mean(), rel=3e-7)
