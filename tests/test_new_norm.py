"""A norm is one record: what a user adds to the table works in every part of the package, with no other line written.

The CUDA kernels do too: `tests/cuda/test_kernels.py` and `tests/devices/test_norms_on_device.py` run the same record.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import registered
from click.testing import CliRunner
from reference import error, normal
from tolerances import FLOAT32, FLOAT64

import numbanorm as nn
from numbanorm import files
from numbanorm.cli.main import cli

X = normal(0, (6, 5, 8), np.float64)
DY = normal(1, X.shape, np.float64)
WEIGHT = np.array(1.75)


@pytest.fixture(autouse=True)
def _scale_norm() -> Iterator[None]:
    with registered.registered(registered.SCALE):
        yield


def expected_gradients(x: np.ndarray, dy: np.ndarray, weight: float, eps: float) -> tuple[np.ndarray, float]:
    """Return dx and dweight of ScaleNorm over the last axis, in longdouble."""
    wide, g = x.astype(np.longdouble), dy.astype(np.longdouble) * weight
    rstd = 1 / np.sqrt((wide**2).mean(-1, keepdims=True) + eps)
    h = wide * rstd
    dx = rstd * (g - h * (g * h).mean(-1, keepdims=True))
    return np.asarray(dx, np.float64), float((dy * h).sum())


def test_the_record_is_short() -> None:
    lines = inspect.getsource(registered).split("SCALE = ")[1].split("\n)\n")[0].splitlines()
    assert len(lines) + 1 <= 12


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("axis", [(2,), (1,), (1, 2), (0,)], ids=str)
def test_forward_and_backward(dtype: type, axis: tuple[int, ...]) -> None:
    x, dy = X.astype(dtype), DY.astype(dtype)
    shape = tuple(x.shape[a] for a in axis)
    y, rstd = nn.normalize("scale", x, shape, weight=WEIGHT, axis=axis, return_stats=True)
    tolerance = FLOAT32 if dtype == np.float32 else FLOAT64
    assert error(y, registered.by_formula(registered.SCALE, x, WEIGHT, axis=axis)) < tolerance
    dx, dweight = nn.normalize_backward(
        "scale", dy, x, None, rstd, WEIGHT.astype(dtype), normalized_shape=shape, axis=axis
    )
    last = tuple(range(-len(axis), 0))
    moved = [np.moveaxis(a, axis, last).reshape(-1, int(np.prod(shape))) for a in (x, dy)]
    expected_dx, expected_dweight = expected_gradients(*moved, float(WEIGHT), 1e-5)
    assert error(np.moveaxis(dx, axis, last).reshape(moved[0].shape), expected_dx) < 10 * tolerance
    assert dweight.shape == ()
    assert dweight.dtype == dtype
    np.testing.assert_allclose(dweight, expected_dweight, rtol=1e-5 if dtype == np.float32 else 1e-12)


def test_layer() -> None:
    layer = nn.Norm("scale", 8)
    assert repr(layer) == "ScaleNorm((8,), eps=1e-05)"
    assert layer.weight is not None
    assert layer.weight.shape == ()
    layer.load_state_dict({"weight": WEIGHT})
    for _ in range(2):  # the second call is served as the first was
        y = layer(X)
    np.testing.assert_array_equal(y, nn.normalize("scale", X, 8, weight=WEIGHT))
    dx = layer.backward(DY)
    expected_dx, expected_dweight = expected_gradients(X, DY, float(WEIGHT), 1e-5)
    assert error(dx, expected_dx) < 10 * FLOAT64
    np.testing.assert_allclose(layer.grad["weight"], expected_dweight, rtol=1e-12)


@pytest.mark.parametrize("chunks", [(2, 5, 8), (2, 3, 8), (6, 5, 3)], ids=str)
def test_dask(chunks: tuple[int, ...]) -> None:
    da = pytest.importorskip("dask.array")
    x, dy = (da.from_array(array, chunks=chunks) for array in (X, DY))
    y, rstd = nn.normalize("scale", x, 8, weight=WEIGHT, return_stats=True)
    np.testing.assert_allclose(y.compute(), nn.normalize("scale", X, 8, weight=WEIGHT), rtol=1e-12)
    gradients = nn.normalize_backward("scale", dy, x, None, rstd, WEIGHT, normalized_shape=8)
    dx, dweight = (part.compute() for part in gradients)
    expected_dx, expected_dweight = expected_gradients(X, DY, float(WEIGHT), 1e-5)
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(dweight, expected_dweight, rtol=1e-12)


def test_files_and_command_line(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "weight.npy", WEIGHT)
    files.apply(tmp_path / "x.npy", tmp_path / "y.npy", "scale", weight=WEIGHT)
    expected = nn.normalize("scale", X, 8, weight=WEIGHT)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-12)
    arguments: list[Any] = ["apply", tmp_path / "x.npy", "-o", tmp_path / "z.npy", "--norm", "scale"]
    result = CliRunner().invoke(cli, [*map(str, arguments), "--weight", str(tmp_path / "weight.npy")])
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(np.load(tmp_path / "z.npy"), np.load(tmp_path / "y.npy"))
    told = CliRunner().invoke(cli, ["explain", "scale", "--shape", "4,6,8,8"])
    assert told.exit_code == 0, told.output
    assert "ScaleNorm" in told.output


def test_warmup() -> None:
    assert nn.warmup(["scale"], ["float32"]) == 2


def test_what_a_record_may_not_say() -> None:
    with pytest.raises(TypeError, match="record: expected a NormRecord, got str"):
        nn.register_norm("scale")
    with pytest.raises(ValueError, match="kind: expected a name that no other norm has, got 'layer'"):
        nn.register_norm(nn.NormRecord(kind="layer", title="Mine", reduced=frozenset({"normalized"})))
    with pytest.raises(ValueError, match="reduced: expected some of"):
        nn.register_norm(nn.NormRecord(kind="odd", title="Odd", reduced=frozenset({"channel"})))
    with pytest.raises(ValueError, match="scale: expected one of 'std', 'l2', got 'l1'"):
        nn.register_norm(
            nn.NormRecord(kind="odd", title="Odd", reduced=frozenset({"normalized"}), scale="l1")  # type: ignore[arg-type]
        )
    with pytest.raises(ValueError, match=r"kind: expected one of .batch.*got .odd."):
        nn.Norm("odd", 8)
