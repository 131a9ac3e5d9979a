"""Errors: ordinary data, data that break the usual formulas, NIST's certified values; NaN stays in its group."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from reference import ARRANGEMENTS, error, normal
from tolerances import (
    FLOAT32,
    FLOAT32_HARD,
    FLOAT64,
    NIST_DIGITS,
    NIST_OWN_DIGITS,
    STATISTICS_FLOAT32,
    STATISTICS_FLOAT64,
)

import numbanorm as nn

arrangement = pytest.mark.parametrize("name", ARRANGEMENTS)
LENGTHS = [1024, 4096, 16384, 65536]


def run(name: str, values: np.ndarray, **options: Any) -> np.ndarray:
    """Normalize rows of values in an arrangement; the output is full of NaN before."""
    how = ARRANGEMENTS[name]
    x = how.place(values)
    assert x.flags.c_contiguous
    out = reference.sealed(x.shape, x.dtype)
    assert how.call(x, len(values), out=out, **options) is out
    return how.gather(out, len(values))


def check(name: str, values: np.ndarray, tolerance: float, eps: float = 1e-5) -> None:
    y = run(name, values, eps=eps)
    assert error(y, ARRANGEMENTS[name].expected(values, eps)) <= tolerance


class TestOrdinary:
    """Normal data with weight and bias, statistics too."""

    FIRST = (5, 12, 7, 9)
    LAST = (5, 7, 9, 12)
    DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])

    @staticmethod
    def compare(results: Any, expected: reference.Expected, dtype: Any, centred: bool = True) -> None:
        y, *statistics = results
        narrow = dtype == np.float32
        assert y.dtype == dtype
        assert error(y, expected.y) <= (FLOAT32 if narrow else FLOAT64)
        limit = STATISTICS_FLOAT32 if narrow else STATISTICS_FLOAT64
        wanted = [expected.mean, expected.rstd] if centred else [expected.rstd]
        for ours, theirs in zip(statistics, wanted, strict=True):
            assert ours.dtype == np.float64
            assert ours.shape == theirs.shape
        np.testing.assert_allclose(statistics[-1], expected.rstd, limit)
        if centred:
            assert float(np.abs((statistics[0] - expected.mean) * expected.rstd).max()) <= limit

    @staticmethod
    def draw(shape: tuple[int, ...], dtype: Any, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x = (2.5 * normal(0, shape, np.float64) + 1.5).astype(dtype)
        return x, normal(1, (channels,), dtype), normal(2, (channels,), dtype)

    @DTYPES
    @pytest.mark.parametrize("channel_axis", [1, -1, 0, 2])
    @pytest.mark.parametrize("space", [(7, 9), (3, 5), (2, 3, 11), (40,)])
    def test_channels(self, space: tuple[int, ...], channel_axis: int, dtype: Any) -> None:
        if channel_axis == 2 and len(space) == 1:
            channel_axis = -2
        shape = np.moveaxis(np.empty((5, 12, *space)), 1, channel_axis).shape
        x, weight, bias = self.draw(shape, dtype, 12)
        options = {"channel_axis": channel_axis}
        results = nn.batch_norm(x, None, None, weight, bias, True, return_stats=True, **options)
        self.compare(results, reference.batch_norm(x, None, None, weight, bias, True, **options), dtype)
        results = nn.instance_norm(x, None, None, weight, bias, return_stats=True, **options)
        self.compare(results, reference.instance_norm(x, None, None, weight, bias, **options), dtype)
        for groups in (1, 3, 4, 12):
            results = nn.group_norm(x, groups, weight, bias, return_stats=True, **options)
            self.compare(results, reference.group_norm(x, groups, weight, bias, **options), dtype)
        mean, var = normal(3, (12,), dtype), np.square(normal(4, (12,), dtype)) + dtype(0.1)
        for function, expected in [
            (nn.batch_norm, reference.batch_norm),
            (nn.instance_norm, reference.instance_norm),
        ]:
            own = (mean, var, weight, bias, False)
            results = function(x, *own, return_stats=True, **options)
            self.compare(results, expected(x, *own, **options), dtype)

    @DTYPES
    @pytest.mark.parametrize(
        "axis", [(-1,), (2, 3), (1, 2, 3), (0, 1, 2, 3), (1,), (0,), (0, 3), (1, 3), (3, 1), (0, 2), (2, 0, 1)]
    )
    def test_axes(self, axis: tuple[int, ...], dtype: Any) -> None:
        x, _, _ = self.draw((5, 12, 7, 9), dtype, 1)
        lengths = tuple(x.shape[a] for a in axis)
        weight, bias = normal(1, lengths, dtype), normal(2, lengths, dtype)
        results = nn.layer_norm(x, lengths, weight, bias, axis=axis, return_stats=True)
        self.compare(results, reference.layer_norm(x, axis, weight, bias), dtype)
        results = nn.rms_norm(x, lengths, weight, axis=axis, return_stats=True)
        self.compare(results, reference.rms_norm(x, axis, weight), dtype, centred=False)

    @DTYPES
    @pytest.mark.parametrize("which", ["neither", "weight", "bias"])
    def test_one_of_weight_and_bias(self, which: str, dtype: Any) -> None:
        x, weight, bias = self.draw(self.FIRST, dtype, 12)
        own = {"weight": {"weight": weight}, "bias": {"bias": bias}, "neither": {}}[which]
        results = nn.group_norm(x, 3, return_stats=True, **own)
        self.compare(results, reference.group_norm(x, 3, **own), dtype)
        results = nn.layer_norm(x, 12, axis=1, return_stats=True, **own)
        self.compare(results, reference.layer_norm(x, (1,), **own), dtype)
        results = nn.layer_norm(x.reshape(-1, 12), 12, return_stats=True, **own)
        self.compare(results, reference.layer_norm(x.reshape(-1, 12), (1,), **own), dtype)

    @DTYPES
    @pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3, 1.0, 100])
    def test_eps(self, eps: float, dtype: Any) -> None:
        x, weight, bias = self.draw(self.LAST, dtype, 12)
        results = nn.layer_norm(x, 12, weight, bias, eps, return_stats=True)
        self.compare(results, reference.layer_norm(x, (-1,), weight, bias, eps), dtype)
        results = nn.batch_norm(x, None, None, weight, bias, True, 0.1, eps, channel_axis=-1, return_stats=True)
        expected = reference.batch_norm(x, None, None, weight, bias, True, 0.1, eps, channel_axis=-1)
        self.compare(results, expected, dtype)

    @DTYPES
    @pytest.mark.parametrize("shape", [(7, 48), (3, 5, 768), (4, 2000)])
    def test_residual(self, shape: tuple[int, ...], dtype: Any) -> None:
        x, weight, bias = self.draw(shape, dtype, shape[-1])
        residual = normal(5, shape, dtype)
        y, mean, rstd, total = nn.layer_norm(x, shape[-1], weight, bias, residual=residual, return_stats=True)
        np.testing.assert_array_equal(total, x + residual)
        self.compare((y, mean, rstd), reference.layer_norm(x + residual, (-1,), weight, bias), dtype)
        y, total = nn.rms_norm(x, shape[-1], weight, residual=residual)
        np.testing.assert_array_equal(total, x + residual)
        assert error(y, reference.rms_norm(x + residual, (-1,), weight).y) <= FLOAT32

    def test_residual_of_other_strides_and_axes(self) -> None:
        x, residual = normal(0, (4, 6, 50)), normal(1, (4, 50, 6)).transpose(0, 2, 1)
        for axis in ((1,), (2,), (1, 2), (0, 2)):
            lengths = tuple(x.shape[a] for a in axis)
            for a, b in ((x, residual), (residual, x), (x[:, ::-1], residual), (x[..., ::2], residual[..., ::2])):
                if a.shape != x.shape:
                    lengths = tuple(a.shape[i] for i in axis)
                y, total = nn.layer_norm(a, lengths, axis=axis, residual=b)
                np.testing.assert_array_equal(total, a + b)
                assert error(y, reference.layer_norm(a + b, axis).y) <= FLOAT32

    @pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.uint64, np.bool_])
    def test_residual_of_integers(self, dtype: Any) -> None:
        """The sum is formed in the result's dtype: it neither wraps nor saturates."""
        rng = np.random.default_rng(0)
        x, residual = (rng.integers(0, 120, (3, 40)).astype(dtype) for _ in range(2))
        wide = np.float32 if np.dtype(dtype).itemsize < 4 else np.float64
        y, total = nn.layer_norm(x, 40, residual=residual)
        assert y.dtype == total.dtype == wide
        np.testing.assert_array_equal(total, x.astype(wide) + residual.astype(wide))
        assert error(y, reference.layer_norm(total, (-1,)).y) <= FLOAT32


class TestHard:
    @arrangement
    @pytest.mark.parametrize("n", LENGTHS)
    @pytest.mark.parametrize("mean", [1e3, 1e6, -1e6])
    def test_large_mean(self, name: str, n: int, mean: float) -> None:
        values = (normal(0, (6, n), np.float64) + mean).astype(np.float32)
        check(name, values, FLOAT32_HARD)

    @arrangement
    @pytest.mark.parametrize("n", [1024, 16384])
    def test_mean_changes_from_group_to_group(self, name: str, n: int) -> None:
        means = np.array([[1e6], [0], [-1e5], [1e-3], [3e7], [1]])
        values = (normal(0, (6, n), np.float64) + means).astype(np.float32)
        check(name, values, FLOAT32_HARD)

    @arrangement
    @pytest.mark.parametrize("n", [1024, 16384])
    def test_float64_at_a_mean_of_1e8(self, name: str, n: int) -> None:
        """float64 keeps its mean in one float64: half an ulp of 1e8 is 7e-9, which over std 1 is what may be lost."""
        values = normal(0, (6, n), np.float64) + 1e8
        check(name, values, 1e-8)
        values = normal(0, (6, n), np.float64) + 1e3
        check(name, values, 1e-12)

    @arrangement
    @pytest.mark.parametrize("n", [1024, 16384])
    @pytest.mark.parametrize(("mean", "std"), [(0.0, 1e30), (1e30, 1e24), (1e30, 1e30), (1e37, 1e37), (-1e38, 3e37)])
    def test_near_the_float32_maximum(self, name: str, n: int, mean: float, std: float) -> None:
        values = (std * normal(0, (6, n), np.float64) + mean).clip(-3e38, 3e38).astype(np.float32)
        check(name, values, FLOAT32_HARD)

    @arrangement
    def test_both_ends_of_float32(self, name: str) -> None:
        """Differences of two elements overflow float32."""
        values = (3.4e38 * np.sign(normal(0, (6, 1024), np.float64))).astype(np.float32)
        values[:, ::7] = 1.0
        check(name, values, FLOAT32_HARD)

    @arrangement
    @pytest.mark.parametrize("n", [1024, 65536])
    @pytest.mark.parametrize("outlier", [1e8, -1e8, 1e20])
    @pytest.mark.parametrize("where", [0, 1, -1, 600])
    def test_outlier(self, name: str, n: int, outlier: float, where: int) -> None:
        values = normal(0, (6, n))
        values[:, where] = outlier
        check(name, values, FLOAT32_HARD)

    @arrangement
    def test_outlier_in_one_group(self, name: str) -> None:
        values = normal(0, (6, 4096))
        clean = run(name, values, eps=1e-5)
        values[2, 0] = 1e8
        y = run(name, values, eps=1e-5)
        expected = ARRANGEMENTS[name].expected(values)
        for group in range(6):
            assert error(y[group], expected[group]) <= FLOAT32_HARD
        np.testing.assert_array_equal(np.delete(y, 2, 0), np.delete(clean, 2, 0))

    @arrangement
    @pytest.mark.parametrize("n", [1024, 65536])
    @pytest.mark.parametrize("mean", [0.0, 1e6])
    @pytest.mark.parametrize("direction", [1, -1])
    def test_sorted(self, name: str, n: int, mean: float, direction: int) -> None:
        values = (np.sort(normal(0, (6, n), np.float64)) + mean).astype(np.float32)[:, ::direction]
        check(name, np.ascontiguousarray(values), FLOAT32_HARD)

    @arrangement
    @pytest.mark.parametrize("n", [1024, 16384])
    def test_sorted_along_each_axis(self, name: str, n: int) -> None:
        how = ARRANGEMENTS[name]
        x = how.place((100 * normal(0, (6, n), np.float64)).astype(np.float32))
        for axis in (*range(x.ndim), None):
            ascending = np.sort(x, axis=axis).reshape(x.shape)
            expected = how.expected(how.gather(ascending, 6))
            assert error(how.gather(how.call(ascending, 6), 6), expected) <= FLOAT32_HARD

    @arrangement
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("constant", [0.1, 1e6, 16777217.0, -3.7, 1e-30, 1e30])
    @pytest.mark.parametrize("n", [48, 1024, 16384])
    def test_constant_gives_the_bias(self, name: str, constant: float, n: int, dtype: Any) -> None:
        how = ARRANGEMENTS[name]
        x = how.place(np.full((6, n), constant, dtype))
        shape = how.shape_of(x, 6)
        weight, bias = normal(1, shape, dtype), normal(2, shape, dtype)
        if how.centred:
            y, mean, rstd = how.call(x, 6, weight=weight, bias=bias, return_stats=True)
            np.testing.assert_array_equal(mean, np.full(mean.shape, dtype(constant), np.float64))
            np.testing.assert_allclose(rstd, 1e-5**-0.5, 1e-14)
            axis = {"layer-channel": 1, "batch-first": 1, "instance-first": 1, "group-first": 1}.get(name, -1)
            np.testing.assert_array_equal(y, np.broadcast_to(reference.along(bias, x.ndim, axis), x.shape))
        else:
            y = how.call(x, 6, eps=0.0)
            np.testing.assert_allclose(y, np.full(x.shape, np.sign(constant)), 1e-6)

    @pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint64])
    def test_constant_integers_that_float32_cannot_hold(self, dtype: Any) -> None:
        x = np.full((4, 6, 100), 16777217, dtype)
        for y in (nn.layer_norm(x, 100), nn.batch_norm(x, training=True), nn.group_norm(x, 2)):
            np.testing.assert_array_equal(y, np.zeros(x.shape))

    @arrangement
    @pytest.mark.parametrize("n", [1024, 16384])
    @pytest.mark.parametrize("std", [1e-15, 1e-18, 1e-20, 1e-21, 1e-22, 1e-23, 1e-30, 1e-37])
    def test_tiny_variance(self, name: str, n: int, std: float) -> None:
        """Squares that float32 cannot hold."""
        values = (std * normal(0, (6, n), np.float64)).astype(np.float32)
        check(name, values, FLOAT32_HARD, eps=0.0)

    @arrangement
    def test_tiny_variance_around_one(self, name: str) -> None:
        values = (1 + 1e-6 * normal(0, (6, 4096), np.float64)).astype(np.float32)
        check(name, values, FLOAT32_HARD, eps=0.0)

    @arrangement
    def test_subnormal(self, name: str) -> None:
        values = (1e-41 * normal(0, (6, 1024), np.float64)).astype(np.float32)
        check(name, values, FLOAT32_HARD, eps=0.0)

    @arrangement
    def test_drift(self, name: str) -> None:
        """Every block has another mean: shifts are always those of the past."""
        values = (normal(0, (6, 65536), np.float64) + np.linspace(0, 1e5, 65536)).astype(np.float32)
        check(name, values, FLOAT32_HARD)

    @arrangement
    def test_statistics_at_a_large_mean(self, name: str) -> None:
        how = ARRANGEMENTS[name]
        values = (normal(0, (6, 16384), np.float64) + 1e6).astype(np.float32)
        *_, rstd = how.call(how.place(values), 6, return_stats=True)
        count, _, m2 = reference.moments(values, (1,), centred=how.centred)
        expected = 1 / np.sqrt(m2 / count + reference.LONG(1e-5))
        np.testing.assert_allclose(rstd.reshape(-1), reference.double(expected).reshape(-1), STATISTICS_FLOAT32)


class TestNotFinite:
    @arrangement
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("n", [48, 1024, 20000])
    @pytest.mark.parametrize("where", [0, 17, -1])
    def test_spoils_its_own_group_alone(self, name: str, n: int, bad: float, where: int) -> None:
        values = normal(0, (30, n))
        clean = run(name, values)
        values[13, where] = bad
        y = run_not_finite(name, values)
        np.testing.assert_array_equal(np.delete(y, 13, 0), np.delete(clean, 13, 0))
        if ARRANGEMENTS[name].centred:
            assert np.isnan(y[13]).all()
        else:
            assert np.isnan(y[13, where])
            assert np.isnan(y[13]).all() if np.isnan(bad) else (np.delete(y[13], where) == 0).all()

    def test_running_statistics_of_other_channels(self) -> None:
        for function, shape in ((nn.batch_norm, (6, 5, 40)), (nn.instance_norm, (6, 5, 40)), (nn.batch_norm, (64, 5))):
            x = normal(0, shape)
            clean, spoiled = [[np.zeros(5), np.ones(5)] for _ in range(2)]
            function(x, *clean, None, None, True)
            x[2, 3] = np.nan
            function(x, *spoiled, None, None, True)
            for a, b in zip(clean, spoiled, strict=True):
                np.testing.assert_array_equal(np.delete(a, 3), np.delete(b, 3))
                assert np.isnan(b[3])

    def test_evaluation_spoils_the_element_alone(self) -> None:
        x = normal(0, (6, 5, 40))
        running = np.zeros(5), np.ones(5)
        clean = nn.batch_norm(x, *running)
        x[2, 3, 7] = np.nan
        y = nn.batch_norm(x, *running)
        assert np.isnan(y[2, 3, 7])
        y[2, 3, 7] = clean[2, 3, 7]
        np.testing.assert_array_equal(y, clean)

    def test_infinite_bias_and_weight(self) -> None:
        weight, bias = np.ones(8), np.zeros(8)
        weight[2], bias[5] = np.nan, np.inf
        y = nn.layer_norm(normal(0, (3, 8), np.float64), 8, weight, bias)
        assert np.isnan(y[:, 2]).all()
        assert (y[:, 5] == np.inf).all()
        assert np.isfinite(np.delete(y, [2, 5], 1)).all()


def run_not_finite(name: str, values: np.ndarray) -> np.ndarray:
    how = ARRANGEMENTS[name]
    return how.gather(how.call(how.place(values), len(values)), len(values))


NIST = json.loads((Path(__file__).parents[1] / "data" / "nist_strd.json").read_text())["datasets"]


def digits(value: float, certified: float) -> float:
    """Return the log relative error: how many digits are right, 15 at most."""
    if value == certified:
        return 15.0
    return min(15.0, -float(np.log10(abs(value - certified) / abs(certified))))


def exact_std(data: list[float]) -> float:
    """Return the standard deviation of the float64 data, without rounding until the last step."""
    exact = [Fraction(v) for v in data]
    mean = sum(exact) / len(exact)
    return float(np.sqrt(np.longdouble(1) * float(sum((v - mean) ** 2 for v in exact) / (len(exact) - 1))))


class TestNist:
    """Statistical Reference Datasets: certified to 15 digits."""

    def test_all_are_there(self) -> None:
        assert sorted(NIST) == sorted(NIST_DIGITS)

    @staticmethod
    def check(name: str, mean: float, std: float) -> None:
        certified = NIST[name]
        assert digits(mean, certified["mean"]) >= 14.5
        assert digits(std, certified["std"]) >= NIST_DIGITS[name]
        assert digits(std, exact_std(certified["data"])) >= NIST_OWN_DIGITS[name]

    @pytest.mark.parametrize("name", NIST_DIGITS)
    def test_moments(self, name: str) -> None:
        data = np.array(NIST[name]["data"])
        moments = nn.Moments.of(data)
        self.check(name, moments.mean, moments.std(ddof=1))

    @pytest.mark.parametrize("name", NIST_DIGITS)
    def test_moments_of_columns(self, name: str) -> None:
        data = np.array(NIST[name]["data"])
        moments = nn.Moments.of(np.stack([data, -data, data], axis=1), axis=0)
        for column, sign in enumerate((1, -1, 1)):
            self.check(name, sign * moments.mean[column], moments.std(ddof=1)[column])

    @pytest.mark.parametrize("name", NIST_DIGITS)
    def test_moments_of_batches(self, name: str) -> None:
        data = np.array(NIST[name]["data"])
        moments = nn.Moments.of(data[:2])
        for i in range(2, len(data), 97):
            moments.update(data[i : i + 97])
        self.check(name, moments.mean, moments.std(ddof=1))

    @pytest.mark.parametrize("name", NIST_DIGITS)
    @pytest.mark.parametrize("across", [False, True])
    def test_norms(self, name: str, across: bool) -> None:
        data = np.array(NIST[name]["data"])
        n = len(data)
        if across:
            x = np.stack([data, data], axis=1)
            _, mean, rstd = nn.batch_norm(x, training=True, eps=0.0, return_stats=True)
        else:
            _, mean, rstd = nn.layer_norm(data, n, eps=0.0, return_stats=True)
        self.check(name, float(mean[0]), float(np.sqrt(n / (n - 1)) / rstd[0]))
