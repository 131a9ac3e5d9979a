"""Input dtypes: which dtype the result has, and its values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from reference import ARRANGEMENTS, error, normal
from tolerances import FLOAT32, FLOAT64

import numbanorm as nn

NARROW = ["bool", "int8", "uint8", "int16", "uint16"]
WIDE = ["int32", "uint32", "int64", "uint64"]
integers = pytest.mark.parametrize("dtype", NARROW + WIDE)


def draw(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return numbers from all over the range of a dtype; of wide ones up to 2**53, which float64 holds."""
    rng = np.random.default_rng([seed, *shape])
    if dtype == "bool":
        return rng.random(shape) < 0.3
    info = np.iinfo(dtype)
    low, high = max(info.min, -(2**53)), min(info.max, 2**53)
    return rng.integers(low, high, shape, dtype, endpoint=True)


def result(dtype: str) -> np.dtype[Any]:
    return np.dtype(np.float32 if dtype in NARROW else np.float64)


def limit(dtype: str) -> float:
    return FLOAT32 if dtype in NARROW else FLOAT64


@integers
@pytest.mark.parametrize("name", ARRANGEMENTS)
@pytest.mark.parametrize("n", [48, 1000])
def test_values(dtype: str, name: str, n: int) -> None:
    how = ARRANGEMENTS[name]
    values = draw(dtype, (6, n))
    x = how.place(values)
    y = how.call(x, 6, eps=1e-5)
    assert y.dtype == result(dtype)
    assert error(how.gather(y, 6), how.expected(values)) <= limit(dtype)


@integers
def test_evaluation_and_parameters(dtype: str) -> None:
    x = draw(dtype, (5, 6, 40))
    mean, var, weight, bias = (normal(i, (6,), np.float64) for i in range(4))
    y = nn.batch_norm(x, mean, var**2, weight, bias)
    assert y.dtype == result(dtype)
    assert error(y, reference.batch_norm(x, mean, var**2, weight, bias).y) <= limit(dtype)
    y = nn.layer_norm(x, (6, 40), *(normal(i, (6, 40), np.float64) for i in (5, 6)))
    expected = reference.layer_norm(x, (1, 2), *(normal(i, (6, 40), np.float64) for i in (5, 6)))
    assert error(y, expected.y) <= limit(dtype)


@integers
def test_running_statistics(dtype: str) -> None:
    x = draw(dtype, (16, 3, 40))
    mean, var = np.zeros(3), np.ones(3)
    nn.batch_norm(x, mean, var, training=True, momentum=1.0)
    expected = reference.batch_norm(x, np.zeros(3), np.ones(3), training=True, momentum=1.0)
    np.testing.assert_allclose(mean, expected.running_mean, limit(dtype), 1e-6 * float(np.sqrt(var.max())))
    np.testing.assert_allclose(var, expected.running_var, limit(dtype))


@pytest.mark.parametrize("dtype", [*NARROW, *WIDE, "float32", "float64"])
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_default_eps_of_rms_norm_and_dtype_of_statistics(dtype: str, name: str) -> None:
    how = ARRANGEMENTS[name]
    values = normal(0, (6, 48), dtype) if "float" in dtype else draw(dtype, (6, 48))
    y, *statistics = how.call(how.place(values), 6, return_stats=True)
    assert y.dtype == (dtype if "float" in dtype else result(dtype))
    assert all(s.dtype == np.float64 for s in statistics)
    if name == "rms-last":
        eps = np.finfo(y.dtype).eps
        expected = 1 / np.sqrt(np.square(values.astype(float)).mean(1) + eps)
        np.testing.assert_allclose(statistics[0][:, 0], expected, FLOAT32)


def test_limits_of_integers() -> None:
    """Differences of the smallest and the largest value do not wrap."""
    for dtype in NARROW[1:] + WIDE:
        info = np.iinfo(dtype)
        x = np.array([[info.min, info.max] * 50] * 3, dtype)
        y = nn.layer_norm(x, 100, eps=0.0)
        np.testing.assert_allclose(y, [[-1.0, 1.0] * 50] * 3, 1e-6)
        y = nn.batch_norm(np.ascontiguousarray(x.T), training=True, eps=0.0)
        np.testing.assert_allclose(y.T, [[-1.0, 1.0] * 50] * 3, 1e-6)


def test_integers_beyond_float32_keep_their_differences() -> None:
    x = (2**40 + np.arange(12)).reshape(2, 6)
    assert error(nn.layer_norm(x, 6), reference.layer_norm(x - 2**40, (1,)).y) <= FLOAT64
    x = (2**30 + np.arange(12, dtype=np.int32)).reshape(2, 6)
    assert error(nn.layer_norm(x, 6), reference.layer_norm(x - 2**30, (1,)).y) <= FLOAT64


def test_image() -> None:
    """uint8 pixels straight from a file: no float copy is needed, and the result is that of the float copy."""
    x = draw("uint8", (2, 64, 48, 3))
    y = nn.batch_norm(x, training=True, channel_axis=-1)
    np.testing.assert_array_equal(y, nn.batch_norm(x.astype(np.float32), training=True, channel_axis=-1))


@pytest.mark.parametrize("dtype", [np.intc, np.long, np.longlong, np.uintc, np.ulong, np.ulonglong, np.double])
def test_c_names(dtype: Any) -> None:
    x = np.arange(12, dtype=dtype).reshape(2, 6)
    y = nn.layer_norm(x, 6)
    assert y.dtype == np.float64
    assert error(y, reference.layer_norm(x, (1,)).y) <= FLOAT64


@pytest.mark.parametrize("dtype", [">i2", ">i4", ">u8", ">f8", "<i2"])
def test_byte_order(dtype: str) -> None:
    x = np.arange(60).reshape(2, 30).astype(dtype)
    y = nn.layer_norm(x, 30)
    assert y.dtype.isnative
    np.testing.assert_array_equal(y, nn.layer_norm(x.astype(x.dtype.newbyteorder("=")), 30))
