"""Frames and series of pandas: arrays of one numeric dtype are taken, all else is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from reference import normal

import numbanorm as nn

pd = pytest.importorskip("pandas")
X = normal(0, (7, 5))


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "int64", "bool"])
def test_frame_and_series(dtype: str) -> None:
    values = np.rint(X * 3).astype(dtype)
    frame = pd.DataFrame(values, columns=list("abcde"))
    weight, bias = pd.Series(np.arange(5.0)), pd.Series(np.arange(5, dtype=np.float32), index=list("edcba"))
    before = frame.copy()
    y = nn.layer_norm(frame, 5, weight, bias)
    assert type(y) is np.ndarray
    np.testing.assert_array_equal(y, nn.layer_norm(frame.to_numpy(), 5, weight.to_numpy(), bias.to_numpy()))
    np.testing.assert_array_equal(nn.Moments.of(frame, 0).mean, nn.Moments.of(frame.to_numpy(), 0).mean)
    pd.testing.assert_frame_equal(frame, before)


def test_running_statistics_are_not_written_to_a_copy() -> None:
    """A series hands out its memory, or a read-only view of it: it moves, or the call says that it cannot."""
    mean, var = pd.Series(np.zeros(5)), pd.Series(np.ones(5))
    try:
        nn.batch_norm(X, mean, var, training=True)
    except ValueError as error:
        assert str(error).startswith("running_mean: expected a writeable array")  # noqa: PT017
        assert not mean.any()
    else:
        assert mean.all()


WRONG: dict[str, Any] = {
    "mixed": pd.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]}),
    "missing": pd.DataFrame({"a": pd.array([1.0, None], dtype="Float64"), "b": pd.array([1, 2], dtype="Int64")}),
    "dates": pd.DataFrame({"a": pd.to_datetime(["2026-01-01", "2026-01-02"])}),
    "categories": pd.DataFrame({"a": pd.Categorical(["x", "y"])}),
    "complex": pd.DataFrame({"a": [1j, 2j]}),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str) -> None:
    with pytest.raises(TypeError, match=r"^x: expected "):
        nn.layer_norm(WRONG[name], WRONG[name].shape[1])
