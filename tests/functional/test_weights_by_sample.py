"""Norms whose samples have weights of their own, as AdaLN, AdaIN and FiLM make them: forward, backward, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
import pytest
import registered
import sharing
from click.testing import CliRunner
from reference import error, normal
from tolerances import FLOAT32, FLOAT64

import numbanorm as nn
from numbanorm import files
from numbanorm.calls import host
from numbanorm.cli.main import cli
from numbanorm.core.layout import Layout


@pytest.fixture(autouse=True)
def _adaptive() -> Iterator[None]:
    with registered.registered(*registered.ADAPTIVE):
        yield


def rows(n: int, t: int, d: int) -> tuple[Any, ...]:
    """Return a case of rows: shape of x, of weights, their axes in x, options."""
    return (n, t, d), (n, 1, d), (0, 1, 2), {"normalized_shape": d}


def channels(shape: tuple[int, ...], axis: int = 1, **more: Any) -> tuple[Any, ...]:
    """Return a case of channels."""
    axis %= len(shape)
    return shape, (shape[0], shape[axis]), (0, axis), {"channel_axis": axis, **more}


CASES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "rows": ("adaptive-layer", rows(4, 40, 64)),
    "one row": ("adaptive-layer", rows(5, 1, 64)),
    "one sample": ("adaptive-layer", rows(1, 9, 30)),
    "narrow rows": ("adaptive-layer", rows(3, 50, 7)),
    "wide rows": ("adaptive-layer", rows(3, 4, 1500)),
    "long rows": ("adaptive-layer", rows(2, 3, 20000)),
    "rows past the caches": ("adaptive-layer", rows(3, 700, 1024)),
    "rows, uncentred": ("adaptive-rms", rows(4, 11, 48)),
    "two axes": ("adaptive-layer", ((3, 4, 5, 6), (3, 1, 5, 6), (0, 1, 2, 3), {"normalized_shape": (5, 6)})),
    "the middle axis": ("adaptive-layer", ((3, 4, 5), (3, 1, 4), (0, 2, 1), {"normalized_shape": 4, "axis": 1})),
    "samples": ("adaptive-instance", channels((4, 6, 9, 9))),
    "samples, short": ("adaptive-instance", channels((4, 6, 7))),
    "samples, channels last": ("adaptive-instance", channels((4, 9, 9, 6), -1)),
    "samples, many channels last": ("adaptive-instance", channels((3, 12, 400), -1)),
    "groups": ("adaptive-group", channels((4, 6, 9, 9), num_groups=2)),
    "groups, no space": ("adaptive-group", channels((4, 6), num_groups=2)),
    "groups, channels last": ("adaptive-group", channels((4, 9, 9, 6), -1, num_groups=3)),
    "batch": ("adaptive-batch", channels((4, 6, 9, 9))),
    "batch, short": ("adaptive-batch", channels((4, 6, 7))),
    "batch, no space": ("adaptive-batch", channels((40, 6))),
    "batch, channels last": ("adaptive-batch", channels((4, 9, 9, 6), -1)),
}


def spread(weight: np.ndarray, axes: tuple[int, ...], ndim: int) -> np.ndarray:
    """Return weights so that they broadcast to x, whose axes they have."""
    lengths = [1] * ndim
    for axis, length in zip(axes, weight.shape, strict=True):
        lengths[axis] = length
    return weight.transpose(np.argsort(axes)).reshape(lengths)


def reduced(kind: str, x: np.ndarray, values: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """Return the mean of values over each element's group."""
    layout = Layout.of(
        kind,
        x.shape,
        channel_axis=options.get("channel_axis", 1),
        num_groups=options.get("num_groups"),
        axis=None if "channel_axis" in options else axes_of(x, options),
    )
    group = np.broadcast_to(layout.statistic(*np.indices(x.shape)), x.shape)
    sums = np.zeros(layout.groups)
    np.add.at(sums, group, values)
    return (sums / layout.count)[group]


def axes_of(x: np.ndarray, options: dict[str, Any]) -> tuple[int, ...]:
    """Return the normalized axes."""
    if "axis" in options:
        return (options["axis"],)
    return tuple(range(x.ndim - np.size(options["normalized_shape"]), x.ndim))


def expected(
    kind: str, x: np.ndarray, dy: np.ndarray, weight: np.ndarray, bias: Any, axes: Any, options: dict[str, Any]
) -> tuple[np.ndarray, ...]:
    """Return y, dx, dweight and dbias by their formulas, in float64."""
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    record = registered.NORMS[kind]
    moved = x - reduced(kind, x, x, options) if record.centred else x
    rstd = 1 / np.sqrt(reduced(kind, x, moved * moved, options) + 1e-5)
    h = moved * rstd
    own = spread(weight, axes, x.ndim)
    y = h * own + (0 if bias is None else spread(bias, axes, x.ndim))
    g = dy * own
    mean = reduced(kind, x, g, options) if record.centred else 0
    dx = (g - mean - h * reduced(kind, x, g * h, options)) * rstd
    which = np.broadcast_to(spread(np.arange(weight.size).reshape(weight.shape), axes, x.ndim), x.shape).ravel()
    sums = [np.bincount(which, v.ravel(), weight.size).reshape(weight.shape) for v in (dy * h, dy)]
    return y, dx, *sums


@pytest.mark.parametrize("order", ["C", "F", "sliced"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("case", CASES)
def test_against_the_formulas(case: str, dtype: type, order: str) -> None:
    kind, (shape, weights, axes, options) = CASES[case]
    if order != "C" and np.prod(shape) > 1 << 18:
        pytest.skip("as in C order")
    tolerance = {2: 1e-3, 4: FLOAT32, 8: FLOAT64}[np.dtype(dtype).itemsize]
    x, dy = normal(0, shape, np.float64).astype(dtype) + dtype(1), normal(1, shape, np.float64).astype(dtype)
    if order == "sliced":
        x = np.repeat(x, 2, axis=-1)[..., ::2]
    x = np.asfortranarray(x) if order == "F" else x
    weight = normal(2, weights, np.float64) + 1
    bias = None if kind == "adaptive-rms" else normal(3, weights, np.float64)
    more = {} if bias is None else {"bias": bias}
    y, *stats = nn.normalize(kind, x, weight=weight, eps=1e-5, return_stats=True, **more, **options)
    mean, rstd = (None, *stats)[-2:]
    dx, *sums = nn.normalize_backward(kind, dy, x, mean, rstd, weight, **options)
    true = expected(kind, x, dy, weight, bias, axes, options)
    assert error(y, true[0]) <= tolerance
    assert error(dx, true[1]) <= 4 * tolerance
    assert len(sums) == (1 if bias is None else 2)
    for found, right in zip(sums, true[2:], strict=False):
        assert found.shape == weights
        assert np.abs(found - right).max() <= 4 * tolerance * max(np.abs(right).max(), 1)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("rows") or "last" in case])
def test_masks_residuals_and_outputs(case: str) -> None:
    """Whatever comes along, it is what weights of 1 give, times the weights."""
    kind, (shape, weights, axes, options) = CASES[case]
    x, residual = normal(0, shape), normal(1, shape)
    weight, bias = normal(2, weights), normal(3, weights)
    biased = {} if kind == "adaptive-rms" else {"bias": bias}
    for own in ({"residual": residual}, {"mask": np.random.default_rng(0).random(shape) < 0.8}, {"out": 0}):
        if ("residual" in own and "channel_axis" in options) or ("mask" in own and kind == "adaptive-rms"):
            continue
        if "out" in own:
            own = {"out": np.empty(shape, np.float32)}
        plain = nn.normalize(kind, x, **own, **options)
        plain = (plain[0] if "residual" in own else plain).copy()
        y = nn.normalize(kind, x, weight=weight, **biased, **own, **options)
        y = y[0] if "residual" in own else y
        right = plain * spread(weight, axes, x.ndim) + (spread(bias, axes, x.ndim) if biased else 0)
        assert error(y, right) <= 2 * FLOAT32


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs 2 threads")
@pytest.mark.parametrize("case", [case for case, (_, (shape, *_)) in CASES.items() if np.prod(shape) >= 1000])
def test_same_bits_on_two_threads(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, (shape, weights, _, options) = CASES[case]
    x, dy, weight = normal(0, shape), normal(1, shape), normal(2, weights)
    sharing.always(monkeypatch, 1000)
    host.forget()

    def results() -> list[bytes]:
        y, *stats = nn.normalize(kind, x, weight=weight, return_stats=True, **options)
        mean, rstd = (None, *stats)[-2:]
        return [a.tobytes() for a in (y, *stats, *nn.normalize_backward(kind, dy, x, mean, rstd, weight, **options))]

    alone = results()
    nn.set_num_threads(2)
    assert all(results() == alone for _ in range(3))
    host.forget()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("case", CASES)
def test_map(case: str, order: str) -> None:
    """The layout's arithmetic gives each element its sample's weight."""
    kind, (shape, weights, axes, options) = CASES[case]
    if np.prod(shape) > 1 << 18:
        shape, weights = (shape[0], 2, 8), (shape[0], 1, 8)
        options = {"normalized_shape": 8}
    axis = None if "channel_axis" in options else axes_of(np.empty(shape), options)
    layout = Layout.of(
        kind,
        shape,
        channel_axis=options.get("channel_axis", 1),
        num_groups=options.get("num_groups"),
        axis=axis,
        order=tuple(range(len(shape))) if order == "C" else tuple(range(len(shape)))[::-1],
    )
    assert layout.affine_shape == weights
    assert layout.weights == layout.samples * layout.size == np.prod(weights)
    which = spread(np.arange(layout.weights).reshape(weights), axes, len(shape))
    np.testing.assert_array_equal(layout.weight(*np.indices(shape)), np.broadcast_to(which, shape))


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 2, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = np.ones(shape, np.float32)
    weight = np.ones((shape[0], 1, shape[2]), np.float32)
    options = {"normalized_shape": shape[2]}
    y, mean, rstd = nn.normalize("adaptive-layer", x, weight=weight, bias=weight, return_stats=True, **options)
    assert y.shape == shape
    dx, dweight, dbias = nn.normalize_backward("adaptive-layer", x, x, mean, rstd, weight, **options)
    assert dx.shape == shape
    assert dweight.shape == dbias.shape == weight.shape
    assert not dweight.any()


def test_wrong_shapes() -> None:
    x = np.ones((4, 5, 8), np.float32)
    for shape in ((8,), (1, 1, 8), (4, 8), (4, 5, 8), (5, 1, 8)):
        with pytest.raises(ValueError, match=r"weight: expected shape \(4, 1, 8\), got "):
            nn.normalize("adaptive-layer", x, 8, weight=np.ones(shape))


def test_where_samples_must_share_weights(tmp_path: Any) -> None:
    """Layers, chunks and files have one set of weights; without weights they work."""
    da = pytest.importorskip("dask.array")
    x, weight = normal(0, (4, 5, 8)), np.ones((4, 1, 8), np.float32)
    with pytest.raises(ValueError, match="affine: expected False, AdaLN has weights for each sample"):
        nn.Norm("adaptive-layer", 8)
    plain = nn.normalize("adaptive-layer", x, 8)
    np.testing.assert_array_equal(nn.Norm("adaptive-layer", 8, elementwise_affine=False)(x), plain)
    lazy = da.from_array(x, chunks=(2, 5, 8))
    assert error(nn.normalize("adaptive-layer", lazy, 8).compute(), plain) <= FLOAT32
    with pytest.raises(TypeError, match="weight, bias: expected None for dask arrays, AdaLN has some for each sample"):
        nn.normalize("adaptive-layer", lazy, 8, weight=weight)
    _, mean, rstd = nn.normalize("adaptive-layer", x, 8, return_stats=True)
    with pytest.raises(TypeError, match="for dask arrays"):
        nn.normalize_backward("adaptive-layer", lazy, lazy, mean, rstd, weight, normalized_shape=8)
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(TypeError, match="weight, bias: expected None for files, AdaLN"):
        files.apply(tmp_path / "x.npy", tmp_path / "y.npy", "adaptive-layer", normalized_shape=8, weight=weight)
    assert not (tmp_path / "y.npy").exists()


def test_explained() -> None:
    told = CliRunner().invoke(cli, ["explain", "adaptive-layer", "--shape", "4,5,8"]).output
    assert "shape (4, 1, 8)" in told
    assert "shared by 5 elements" in told
