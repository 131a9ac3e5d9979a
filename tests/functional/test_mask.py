"""mask: it limits the statistics, and every element is still normalized."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from reference import error, normal, sealed
from tolerances import FLOAT32, FLOAT64, RUNNING_FLOAT32

import numbanorm as nn

FIRST, LAST = (4, 6, 5, 40), (4, 5, 40, 6)
SMALL_FIRST, SMALL_LAST = (4, 6, 3, 5), (4, 3, 5, 6)
SHAPES = {"first": FIRST, "last": LAST, "small first": SMALL_FIRST, "small last": SMALL_LAST}


def masks(shape: tuple[int, ...], channel_axis: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of masks that broadcast to `shape`."""
    n, *rest = shape
    ones = [1] * (len(shape) - 1)
    channels = [1] * len(shape)
    channels[channel_axis] = shape[channel_axis]
    space = list(shape)
    space[channel_axis] = 1
    return {
        "samples": (n, *ones),
        "samples and space": tuple(space),
        "channels": tuple(channels),
        "samples and channels": (n, *channels[1:]),
        "space": (1, *space[1:]),
        "last axis": (shape[-1],),
        "last two axes": shape[-2:],
        "last two axes, one of 1": (shape[-2], 1),
        "full": shape,
        "without samples": tuple(rest),
        "one element": (1,) * len(shape),
        "scalar": (),
    }


def draw(seed: int, shape: tuple[int, ...], share: float = 0.6) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).random(shape) < share


def call(norm: str, x: np.ndarray, channel_axis: int, mask: Any, **more: Any) -> Any:
    c = x.shape[channel_axis]
    weight, bias = normal(1, (c,)), normal(2, (c,))
    own: dict[str, Any] = {"weight": weight, "bias": bias, "mask": mask, "channel_axis": channel_axis, **more}
    match norm:
        case "batch":
            return nn.batch_norm(x, training=True, **own)
        case "instance":
            return nn.instance_norm(x, **own)
        case "group":
            return nn.group_norm(x, 3, **own)
        case "layer":
            return nn.layer_norm(x, x.shape[-1], mask=mask, **more)
        case "layer, all":
            return nn.layer_norm(x, x.shape[1:], mask=mask, **more)
        case _:
            return nn.layer_norm(x, c, weight, bias, axis=channel_axis, mask=mask, **more)


def expect(norm: str, x: np.ndarray, channel_axis: int, mask: Any) -> reference.Expected:
    c = x.shape[channel_axis]
    weight, bias = normal(1, (c,)), normal(2, (c,))
    own: dict[str, Any] = {"weight": weight, "bias": bias, "mask": mask, "channel_axis": channel_axis}
    match norm:
        case "batch":
            return reference.batch_norm(x, training=True, **own)
        case "instance":
            return reference.instance_norm(x, **own)
        case "group":
            return reference.group_norm(x, 3, **own)
        case "layer":
            return reference.layer_norm(x, (-1,), mask=mask)
        case "layer, all":
            return reference.layer_norm(x, tuple(range(1, x.ndim)), mask=mask)
        case _:
            return reference.layer_norm(x, (channel_axis,), weight, bias, mask=mask)


NORMS = ["batch", "instance", "group", "layer", "layer, all", "layer, channels"]
every_norm = pytest.mark.parametrize("norm", NORMS)
every_shape = pytest.mark.parametrize("shape", SHAPES)


def axis_of(shape: str) -> int:
    return -1 if "last" in shape else 1


def compare(results: Any, expected: reference.Expected, tolerance: float) -> None:
    y, mean, rstd = results
    assert error(y, expected.y) <= tolerance
    np.testing.assert_allclose(rstd, expected.rstd, 5 * tolerance)
    assert float(np.abs((mean - expected.mean) * expected.rstd).max()) <= 5 * tolerance


@every_norm
@every_shape
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", masks(FIRST, 1))
def test_every_shape_of_mask(norm: str, shape: str, kind: str, dtype: Any) -> None:
    x = (normal(0, SHAPES[shape], np.float64) + 2).astype(dtype)
    channel_axis = axis_of(shape)
    for seed, share in ((0, 0.6), (1, 0.15), (2, 0.95)):
        mask = draw(seed, masks(x.shape, channel_axis)[kind], share)
        out = sealed(x.shape, dtype)
        results = call(norm, x, channel_axis, mask, out=out, return_stats=True)
        compare(results, expect(norm, x, channel_axis, mask), FLOAT32 if dtype == np.float32 else FLOAT64)


@every_norm
@every_shape
def test_all_counts(norm: str, shape: str) -> None:
    x = normal(0, SHAPES[shape])
    expected = call(norm, x, axis_of(shape), None)
    for mask in (True, np.ones(x.shape, bool), np.ones((1,) * 4, bool), [[[[True]]]]):
        assert error(call(norm, x, axis_of(shape), mask), reference.double(expected)) <= FLOAT32


@every_norm
@every_shape
@pytest.mark.parametrize("full", [False, True])
def test_nothing_counts(norm: str, shape: str, full: bool) -> None:
    """mean 0 and variance 0."""
    x = normal(0, SHAPES[shape])
    mask = np.zeros(x.shape, bool) if full else np.zeros((), bool)
    y, mean, rstd = call(norm, x, axis_of(shape), mask, return_stats=True)
    np.testing.assert_array_equal(mean, np.zeros(mean.shape))
    np.testing.assert_allclose(rstd, np.full(rstd.shape, 1e-5**-0.5), 1e-15)
    assert error(y, expect(norm, x, axis_of(shape), mask).y) <= FLOAT32


@every_norm
@every_shape
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_what_does_not_count_does_not_matter(norm: str, shape: str, bad: float) -> None:
    x = normal(0, SHAPES[shape])
    for kind in ("full", "samples", "samples and space", "last axis", "channels", "without samples"):
        mask = np.broadcast_to(draw(3, masks(x.shape, axis_of(shape))[kind]), x.shape)
        expected = expect(norm, x, axis_of(shape), mask)
        spoiled = x.copy()
        spoiled[~mask] = bad
        y, mean, rstd = call(norm, spoiled, axis_of(shape), mask, return_stats=True)
        if not np.isfinite(bad):
            assert np.isfinite(y[mask]).all()
            assert not np.isfinite(y[~mask]).any()
        compare((np.where(mask, y, np.float32(0)), mean, rstd), replaced(expected, mask), FLOAT32)


def replaced(expected: reference.Expected, mask: np.ndarray) -> reference.Expected:
    return dataclasses.replace(expected, y=np.where(mask, expected.y, 0.0))


@every_norm
@every_shape
def test_strided_masks(norm: str, shape: str) -> None:
    x = normal(0, SHAPES[shape])
    n, a, b, c = x.shape
    room = draw(5, (n, a, 2 * b, c))
    for mask in (
        room[:, :, ::2],
        room[:, :, b:],
        room[:, :, :b][::-1],
        room[:, :, :b, ::-1],
        np.asfortranarray(room[:, :, :b]),
        np.broadcast_to(room[:1, :, :b], x.shape),
        np.broadcast_to(room[:, :, :b, :1], x.shape),
        draw(6, (c, b, a, n)).transpose(3, 2, 1, 0),
    ):
        results = call(norm, x, axis_of(shape), mask, return_stats=True)
        compare(results, expect(norm, x, axis_of(shape), mask), FLOAT32)
        held = call(norm, np.asfortranarray(x), axis_of(shape), mask, return_stats=True)
        compare(held, expect(norm, x, axis_of(shape), mask), FLOAT32)


@pytest.mark.parametrize("length", [100, 5000, 40000])
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_lengths_of_sequences(length: int, channel_axis: int) -> None:
    """Padding: each sample counts up to its own length, as sequences of unequal length are batched."""
    lengths = np.array([length, length // 2, 1, 0])
    x = (normal(0, (4, 3, length), np.float64) + 1e4).astype(np.float32)
    mask = (np.arange(length) < lengths[:, None])[:, None, :]
    if channel_axis == -1:
        x, mask = np.ascontiguousarray(x.transpose(0, 2, 1)), mask.transpose(0, 2, 1)
    for norm in ("batch", "instance", "group"):
        y, mean, rstd = call(norm, x, channel_axis, mask, return_stats=True)
        expected = expect(norm, x, channel_axis, mask)
        np.testing.assert_allclose(rstd, expected.rstd, 1e-6)
        np.testing.assert_allclose(mean, expected.mean, 1e-9)
        assert error(y, expected.y) <= FLOAT32


@pytest.mark.parametrize("name", [name for name, how in reference.ARRANGEMENTS.items() if how.centred])
@pytest.mark.parametrize("n", [1024, 16384])
def test_hard_data(name: str, n: int) -> None:
    """Under a mask the first elements, of which the first shift is made, may be far from all that count."""
    how = reference.ARRANGEMENTS[name]
    values = (normal(0, (6, n), np.float64) + 1e6).astype(np.float32)
    counts = draw(7, (6, n), 0.5)
    counts[:, : n // 2] = False
    values[:, : n // 2] = -1e8
    x, mask = how.place(values), how.place(counts)
    _, mean, rstd = how.call(x, 6, mask=mask, return_stats=True)
    rows = reference.layer_norm(values, (1,), mask=counts)
    np.testing.assert_allclose(rstd.reshape(-1), rows.rstd.reshape(-1), 1e-6)
    assert float(np.abs(mean.reshape(-1) - rows.mean.reshape(-1)).max()) <= 1e-6


class TestRunning:
    @staticmethod
    def tracked(function: Any, x: np.ndarray, mask: Any, channel_axis: int) -> tuple[np.ndarray, np.ndarray]:
        c = x.shape[channel_axis]
        mean, var = normal(3, (c,)), normal(4, (c,)) ** 2 + np.float32(0.5)
        function(x, mean, var, None, None, True, 0.3, mask=mask, channel_axis=channel_axis)
        return mean, var

    @pytest.mark.parametrize("norm", ["batch", "instance"])
    @every_shape
    @pytest.mark.parametrize("kind", masks(FIRST, 1))
    def test_values(self, norm: str, shape: str, kind: str) -> None:
        x = normal(0, SHAPES[shape]) + np.float32(3)
        channel_axis = axis_of(shape)
        c = x.shape[channel_axis]
        function, model = {
            "batch": (nn.batch_norm, reference.batch_norm),
            "instance": (nn.instance_norm, reference.instance_norm),
        }[norm]
        for seed, share in ((0, 0.6), (1, 0.1)):
            mask = draw(seed, masks(x.shape, channel_axis)[kind], share)
            mean, var = self.tracked(function, x, mask, channel_axis)
            before = normal(3, (c,)), normal(4, (c,)) ** 2 + np.float32(0.5)
            own = (*before, None, None, True, 0.3)
            expected = model(x, *own, mask=mask, channel_axis=channel_axis)
            np.testing.assert_allclose(mean, expected.running_mean, RUNNING_FLOAT32, 1e-6)
            np.testing.assert_allclose(var, expected.running_var, RUNNING_FLOAT32, 1e-6)

    @pytest.mark.parametrize("function", [nn.batch_norm, nn.instance_norm])
    @every_shape
    def test_untouched_where_nothing_counts(self, function: Any, shape: str) -> None:
        x = normal(0, SHAPES[shape])
        channel_axis = axis_of(shape)
        before = normal(3, (6,)), normal(4, (6,)) ** 2 + np.float32(0.5)
        counts = np.ones(6, bool)
        counts[[1, 4]] = False
        mask = reference.along(counts, 4, channel_axis)
        after = self.tracked(function, x, mask, channel_axis)
        for a, b in zip(after, before, strict=True):
            np.testing.assert_array_equal(a[~counts], b[~counts])
            assert (a[counts] != b[counts]).all()
        after = self.tracked(function, x, np.False_, channel_axis)
        for a, b in zip(after, before, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_one_value_of_a_channel(self) -> None:
        """A variance of one value is 0, not NaN."""
        x = normal(0, (5, 3, 4))
        mask = np.zeros(x.shape, bool)
        mask[2, :, 1] = True
        mean, var = np.zeros(3), np.ones(3)
        y, batch_mean, rstd = nn.batch_norm(x, mean, var, training=True, mask=mask, return_stats=True)
        np.testing.assert_array_equal(batch_mean, x[2, :, 1].astype(float))
        np.testing.assert_allclose(rstd, 1e-5**-0.5)
        np.testing.assert_allclose(mean, 0.1 * x[2, :, 1])
        np.testing.assert_allclose(var, 0.9)
        np.testing.assert_array_equal(y[2, :, 1], np.zeros(3))

    def test_masked_layers_count_batches_that_count(self) -> None:
        layer = nn.BatchNorm(3)
        x = normal(0, (5, 3, 4))
        layer(x, mask=np.zeros((5, 1, 1), bool))
        assert layer.num_batches_tracked == 0
        np.testing.assert_array_equal(layer.running_mean, np.zeros(3))
        layer(x, mask=np.arange(5).reshape(5, 1, 1) < 2)
        assert layer.num_batches_tracked == 1
        np.testing.assert_allclose(layer.running_mean, 0.1 * x[:2].mean((0, 2), dtype=float), 1e-6)


def test_layers_take_masks() -> None:
    x, mask = normal(0, FIRST), draw(0, FIRST)
    for layer, norm in (
        (nn.BatchNorm(6, affine=False), "batch"),
        (nn.InstanceNorm(6), "instance"),
        (nn.GroupNorm(3, 6, affine=False), "group"),
        (nn.LayerNorm(40, elementwise_affine=False), "layer"),
        (nn.LayerNorm((6, 5, 40)), "layer, all"),
    ):
        own = {"weight": None, "bias": None} if "layer" not in norm else {}
        np.testing.assert_array_equal(layer(x, mask=mask), call(norm, x, 1, mask, **own))


def test_evaluation_needs_no_statistics() -> None:
    """In inference nothing is taken from the input, so a mask changes nothing."""
    x = normal(0, FIRST)
    mean, var = normal(3, (6,)), normal(4, (6,)) ** 2
    np.testing.assert_array_equal(nn.batch_norm(x, mean, var, mask=draw(0, FIRST)), nn.batch_norm(x, mean, var))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.bool_, np.int64])
@every_norm
def test_other_dtypes(norm: str, dtype: Any) -> None:
    x = np.random.default_rng(0).integers(0, 100, FIRST).astype(dtype)
    mask = draw(0, FIRST)
    y, mean, rstd = call(norm, x, 1, mask, return_stats=True)
    compare((y, mean, rstd), expect(norm, x, 1, mask), FLOAT32)


def test_residual() -> None:
    x, residual, mask = normal(0, (7, 300)), normal(1, (7, 300)), draw(0, (7, 300))
    y, total = nn.layer_norm(x, 300, residual=residual, mask=mask)
    np.testing.assert_array_equal(total, x + residual)
    assert error(y, reference.layer_norm(x + residual, (-1,), mask=mask).y) <= FLOAT32


@given(data=st.data())
def test_any_mask(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=4)))
    mask_shape = tuple(data.draw(st.sampled_from([1, n])) for n in shape)[data.draw(st.integers(0, len(shape))) :]
    mask = draw(data.draw(st.integers(0, 1000)), mask_shape, data.draw(st.sampled_from([0.1, 0.5, 0.9])))
    axes = tuple(data.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True)))
    order = data.draw(st.permutations(range(len(shape))))
    x = np.ascontiguousarray(normal(0, shape, np.float64).transpose(order)).transpose(np.argsort(order))
    results = nn.layer_norm(x, tuple(shape[a] for a in axes), axis=axes, mask=mask, return_stats=True)
    expected = reference.layer_norm(x, axes, mask=mask)
    compare(results, expected, 1e-10)
    moments = nn.Moments.of(x, axes, mask=mask)
    np.testing.assert_allclose(moments.mean, expected.mean.squeeze(axes), 1e-10, 1e-12)
