"""Wrong calls: each raises its own error, which names the argument and what came, and changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from reference import normal
from wrong_calls import CASES, FUNCTIONS, ONES, ZEROS, X

import numbanorm as nn

FLATTENED = [
    pytest.param(function, given, error, message, id=f"{function}: {', '.join(given)} {i}")
    for i, (functions, given, error, message) in enumerate(CASES)
    for function in functions
]


def bits(given: dict[str, Any]) -> dict[str, bytes]:
    arrays = {name: value for name, value in given.items() if isinstance(value, np.ndarray)}
    arrays |= {"X": X, "ZEROS": ZEROS, "ONES": ONES}
    return {name: value.tobytes() for name, value in arrays.items() if value.dtype != object}


@pytest.mark.parametrize(("function", "given", "error", "message"), FLATTENED)
def test_wrong(function: str, given: dict[str, Any], error: type[Exception], message: str) -> None:
    before = bits(given)
    with pytest.raises(error) as caught:
        FUNCTIONS[function](**given)
    assert type(caught.value) is error  # its own, not a NumPy or Numba error that happens to be a subclass
    assert re.match(message, str(caught.value)), f"message: {caught.value}"
    assert bits(given) == before


OTHERS = {
    "x": X.astype(np.complex64),
    "weight": np.ones(7, np.float32),
    "bias": np.ones(6, int),
    "eps": -1.0,
    "channel_axis": 7,
    "mask": np.ones(3, bool),
    "momentum": "0.1",
    "running_var": np.ones(7, np.float32),
}


@pytest.mark.parametrize("function", [nn.batch_norm, nn.instance_norm])
@pytest.mark.parametrize("wrong", OTHERS)
def test_nothing_changes(function: Callable[..., Any], wrong: str) -> None:
    """With running statistics and `out` that are right, and one argument that is not."""
    mean, var = normal(1, (6,)), normal(2, (6,)) ** 2
    out = np.full(X.shape, np.nan, np.float32)
    given: dict[str, Any] = {"x": X, "running_mean": mean, "running_var": var, "out": out}
    given |= {wrong: OTHERS[wrong]}
    before = bits(given)
    own = {"training": True} if function is nn.batch_norm else {}
    with pytest.raises((TypeError, ValueError), match=f"{wrong}: "):
        function(**given, **own)
    assert bits(given) == before
    assert np.isnan(out).all()


@pytest.mark.parametrize("wrong", ["x", "weight", "bias", "eps", "mask", "residual", "axis"])
def test_nothing_changes_in_layer_norm(wrong: str) -> None:
    out = np.full(X.shape, np.nan, np.float32)
    given = {"x": X, "normalized_shape": 5, "out": out} | OTHERS | {"residual": X[0], "axis": 7}
    given = {name: given[name] for name in ("x", "normalized_shape", "out")} | {wrong: given[wrong]}
    if wrong != "x":
        given["x"] = X
    with pytest.raises((TypeError, ValueError), match=f"{wrong}: "):
        nn.layer_norm(**given)
    assert np.isnan(out).all()


@pytest.mark.parametrize("shape", [(1, 6, 1), (1, 6)])
def test_one_value_per_channel_changes_nothing(shape: tuple[int, ...]) -> None:
    mean, var, out = np.zeros(6), np.ones(6), np.full(shape, np.nan)
    with pytest.raises(ValueError, match="x: expected more than 1 value per channel"):
        nn.batch_norm(np.ones(shape), mean, var, training=True, out=out)
    assert (mean == 0).all()
    assert (var == 1).all()
    assert np.isnan(out).all()
    layer = nn.BatchNorm(6)
    with pytest.raises(ValueError, match="x: expected more than 1 value per channel"):
        layer(np.ones(shape))
    assert layer.num_batches_tracked == 0
    assert (layer.running_var == 1).all()
    assert layer.eval()(np.ones(shape)).shape == shape  # inference has no such limit


def test_what_is_allowed() -> None:
    """The other side of the lines above."""
    x = normal(0, (4, 6))
    assert nn.batch_norm(x, training=True).shape == (4, 6)
    assert nn.group_norm(x, np.int64(3)).shape == (4, 6)
    assert nn.layer_norm(x, [6]).shape == (4, 6)
    assert nn.layer_norm(x, np.int32(6), eps=np.float32(1e-5)).shape == (4, 6)
    assert nn.layer_norm(x, 6, axis=[1]).shape == (4, 6)
    assert nn.layer_norm(x, 6, eps=0).shape == (4, 6)
    assert nn.layer_norm(x[:, :1], 1).tolist() == [[0.0]] * 4
    assert nn.layer_norm(normal(0, (6,)), 6).shape == (6,)
    mean, var = np.zeros(6), np.ones(6)
    nn.batch_norm(x, mean, var, training=True, momentum=1)
    np.testing.assert_allclose(mean, x.mean(0, dtype=float), 1e-6)
    nn.batch_norm(x, mean, var, training=True, momentum=np.float32(0))
    np.testing.assert_allclose(mean, x.mean(0, dtype=float), 1e-6)


def test_residual_is_none_of_batch_norms() -> None:
    with pytest.raises(TypeError, match="residual"):
        nn.batch_norm(X, training=True, residual=X)
    with pytest.raises(TypeError, match="mask"):
        nn.rms_norm(X, 5, mask=X > 0)
    with pytest.raises(TypeError, match="bias"):
        nn.rms_norm(X, 5, bias=ONES)


def test_out_of_integers_is_a_float_array() -> None:
    x = np.arange(30, dtype=np.int16).reshape(6, 5)
    with pytest.raises(TypeError, match="out: expected dtype float32, got int16"):
        nn.layer_norm(x, 5, out=x)
    with pytest.raises(TypeError, match="out: expected dtype float64, got float32"):
        nn.layer_norm(x.astype(np.int64), 5, out=np.ones((6, 5), np.float32))


def test_running_statistics_side_by_side() -> None:
    """Two columns of one table overlap in their bounds alone."""
    table = np.array([[0.0, 1.0]] * 6, np.float32)
    nn.batch_norm(X, table[:, 0], table[:, 1], training=True)
    mean, var = ZEROS.copy(), ONES.copy()
    nn.batch_norm(X, mean, var, training=True)
    np.testing.assert_array_equal(table, np.stack([mean, var], 1))


def test_true_is_not_one_where_one_is_known() -> None:
    """Equal options are one key of what is kept from call to call, and (True,) equals (1,)."""
    x = np.ones((5, 1), np.float32)
    nn.layer_norm(x, (1,))
    nn.layer_norm(x, 1, axis=(1,))
    with pytest.raises(TypeError, match=r"normalized_shape: expected .*got .*bool"):
        nn.layer_norm(x, (True,))
    with pytest.raises(TypeError, match=r"normalized_shape: expected .*got .*float"):
        nn.layer_norm(x, (1.0,))
    with pytest.raises(TypeError, match=r"axis: expected .*got .*bool"):
        nn.layer_norm(x, 1, axis=(True,))
    _, mean, rstd = nn.layer_norm(x, (1,), return_stats=True)
    nn.layer_norm_backward(x, x, (1,), mean, rstd)
    with pytest.raises(TypeError, match=r"normalized_shape: expected .*got .*bool"):
        nn.layer_norm_backward(x, x, (True,), mean, rstd)
