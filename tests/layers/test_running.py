"""Running statistics: as torch keeps them, step by step; what updates, resets and leaves them alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import error, normal
from training_tolerances import RUNNING

import numbanorm as nn

both_layers = pytest.mark.parametrize("kind", ["batch", "instance"])


def tracking(kind: str, **options: Any) -> nn.Norm:
    return nn.Norm(kind, 6, track_running_stats=True, **options)


def batch(seed: int, samples: int = 5, dtype: Any = np.float32) -> np.ndarray:
    """Return data whose channels have other means and scales in every batch."""
    x = normal(seed, (samples, 6, 7), np.float64)
    return ((1 + seed % 3) * x + np.arange(6)[:, None] - seed).astype(dtype)


def snapshot(layer: nn.Norm) -> tuple[bytes, bytes, int]:
    return layer.running_mean.tobytes(), layer.running_var.tobytes(), layer.num_batches_tracked


def by_hand(kind: str, batches: list[np.ndarray], momentum: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the running mean and variance after some batches, from the definition in float64."""
    mean, var = np.zeros(6), np.ones(6)
    axes = (0, 2) if kind == "batch" else (2,)
    for step, x in enumerate(batches, 1):
        share = 1 / step if momentum is None else momentum
        wide = x.astype(np.float64)
        own_mean, own_var = wide.mean(axes), wide.var(axes, ddof=1)
        if kind == "instance":
            own_mean, own_var = own_mean.mean(0), own_var.mean(0)
        mean = (1 - share) * mean + share * own_mean
        var = (1 - share) * var + share * own_var
    return mean, var


def assert_running(layer: nn.Norm, expected: tuple[np.ndarray, np.ndarray]) -> None:
    assert error(layer.running_mean, expected[0]) <= RUNNING
    assert error(layer.running_var, expected[1]) <= RUNNING


# --- the values -----------------------------------------------------------------------------------------------------

MODULES: dict[str, tuple[int, str]] = {
    "BatchNorm1d": (1, "batch"),
    "BatchNorm1d, no space": (0, "batch"),
    "BatchNorm2d": (2, "batch"),
    "BatchNorm3d": (3, "batch"),
    "InstanceNorm1d": (1, "instance"),
    "InstanceNorm2d": (2, "instance"),
    "InstanceNorm3d": (3, "instance"),
}


@pytest.mark.torch
@pytest.mark.parametrize(
    ("module", "momentum"),
    # torch has no cumulative average for InstanceNorm: see `test_by_hand`.
    [(m, f) for m in MODULES for f in (None, 0.0, 0.1, 1.0) if not (f is None and m.startswith("Instance"))],
)
def test_twenty_steps_as_torch_takes_them(torch: Any, module: str, momentum: float | None) -> None:
    """Counter, running statistics, output in training and in inference; the batches are of different sizes."""
    dimensions, kind = MODULES[module]

    @given(data=st.data())
    @settings(max_examples=4, derandomize=True)
    def check(data: st.DataObject) -> None:
        channels = data.draw(st.integers(1, 9))
        last = data.draw(st.booleans())
        theirs = getattr(torch.nn, module.partition(",")[0])(
            channels, momentum=momentum, affine=True, track_running_stats=True
        )
        ours = nn.Norm(
            kind, channels, momentum=momentum, affine=True, track_running_stats=True, channel_axis=-1 if last else 1
        )
        rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
        for _ in range(20):
            space = rng.integers(2, 7, dimensions)
            x = rng.normal(rng.normal(), 1 + rng.random(), (rng.integers(2, 9), channels, *space)).astype(np.float32)
            y = ours(np.ascontiguousarray(np.moveaxis(x, 1, -1)) if last else x)
            expected = theirs(torch.from_numpy(x)).detach().numpy()
            np.testing.assert_allclose(np.moveaxis(y, -1, 1) if last else y, expected, 1e-4, 1e-4)
        assert error(ours.running_mean, theirs.running_mean.numpy()) <= 2 * RUNNING  # theirs has an error of its own
        assert error(ours.running_var, theirs.running_var.numpy()) <= 2 * RUNNING
        if kind == "batch":  # torch's InstanceNorm does not count
            assert ours.num_batches_tracked == int(theirs.num_batches_tracked)
        assert ours.num_batches_tracked == 20
        expected = theirs.eval()(torch.from_numpy(x)).detach().numpy()
        y = ours.eval()(np.ascontiguousarray(np.moveaxis(x, 1, -1)) if last else x)
        assert error(np.moveaxis(y, -1, 1) if last else y, expected) <= 4 * RUNNING

    check()


@both_layers
@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 0.5, 1.0])
def test_by_hand(kind: str, momentum: float | None) -> None:
    layer = tracking(kind, momentum=momentum)
    batches = [batch(seed, samples=3 + seed) for seed in range(6)]
    for step, x in enumerate(batches, 1):
        layer(x)
        assert layer.num_batches_tracked == step
        assert_running(layer, by_hand(kind, batches[:step], momentum))
    if momentum == 0.0:
        assert not layer.running_mean.any()
        assert (layer.running_var == 1.0).all()


@both_layers
def test_large_means(kind: str) -> None:
    """Variances of data at 1e4 are those of data at 0."""
    layer = tracking(kind, momentum=1.0)
    x = (normal(0, (16, 6, 100), np.float64) + 1e4).astype(np.float32)
    layer(x)
    assert_running(layer, by_hand(kind, [x], 1.0))


@both_layers
def test_the_estimate_is_unbiased(kind: str) -> None:
    """Of 1 and 3 the variance is 2, not 1."""
    layer = tracking(kind, momentum=1.0)
    x = np.tile(np.float32([[1, 3]]), (1, 6, 1))
    layer(x)
    np.testing.assert_array_equal(layer.running_var, np.full(6, 2, np.float32))
    np.testing.assert_array_equal(layer.running_mean, np.full(6, 2, np.float32))


@both_layers
def test_masked_batches(kind: str) -> None:
    """What does not count is not averaged; channels of which nothing counts keep what they have."""
    layer = tracking(kind, momentum=0.25)
    x = batch(1, samples=4)
    mask = np.random.default_rng(0).random(x.shape) < 0.6
    mask[:, 2] = False
    mask[1, 3] = False  # one sample of a channel: its average is over the other three
    layer(x, mask=mask)
    wide = np.where(mask, x, np.nan).astype(np.float64)
    for c in range(6):
        if c == 2:
            assert (layer.running_mean[c], layer.running_var[c]) == (0.0, 1.0)
            continue
        groups = [wide[:, c]] if kind == "batch" else [wide[n, c] for n in range(4) if mask[n, c].any()]
        mean = np.mean([np.nanmean(g) for g in groups])
        var = np.mean([np.nanvar(g, ddof=1) for g in groups])
        np.testing.assert_allclose(layer.running_mean[c], 0.25 * mean, RUNNING)
        np.testing.assert_allclose(layer.running_var[c], 0.75 + 0.25 * var, RUNNING)
    assert layer.num_batches_tracked == 1


@both_layers
def test_nothing_counts(kind: str) -> None:
    layer = tracking(kind)
    layer(batch(0))
    before = snapshot(layer)
    y = layer(batch(1), mask=np.zeros((5, 6, 7), bool))
    assert y.shape == (5, 6, 7)
    assert snapshot(layer) == before


@both_layers
@pytest.mark.parametrize("spoilt", [np.nan, np.inf])
def test_nan_spoils_its_channel_alone(kind: str, spoilt: float) -> None:
    clean, layer = tracking(kind), tracking(kind)
    x = batch(0)
    clean(x)
    x[2, 4, 1] = spoilt
    layer(x)
    others = np.arange(6) != 4
    np.testing.assert_array_equal(layer.running_mean[others], clean.running_mean[others])
    np.testing.assert_array_equal(layer.running_var[others], clean.running_var[others])
    assert not np.isfinite(layer.running_var[4])


# --- modes ----------------------------------------------------------------------------------------------------------


@both_layers
def test_inference_uses_them_and_leaves_them_alone(kind: str) -> None:
    layer = tracking(kind)
    for seed in range(3):
        layer(batch(seed))
    before = snapshot(layer)
    assert layer.eval() is layer
    assert not layer.training
    x = batch(9)
    mean, var = (a.astype(np.float64)[:, None] for a in (layer.running_mean, layer.running_var))
    expected = (x - mean) / np.sqrt(var + 1e-5)
    assert error(layer(x), expected) <= RUNNING
    assert error(layer(x[:1]), expected[:1]) <= RUNNING  # one sample: no matter what else is in the batch
    assert snapshot(layer) == before
    assert layer.train() is layer
    layer(x)
    assert layer.num_batches_tracked == 4
    assert snapshot(layer) != before


@both_layers
def test_a_mask_has_no_say_in_inference(kind: str) -> None:
    layer = tracking(kind)
    layer(batch(0))
    layer.eval()
    x = batch(1)
    np.testing.assert_array_equal(layer(x, mask=np.zeros(x.shape, bool)), layer(x))


@both_layers
def test_without_them_inference_is_training(kind: str) -> None:
    layer = nn.Norm(kind, 6, track_running_stats=False)
    assert layer.running_mean is layer.running_var is layer.num_batches_tracked is None
    x = batch(0)
    y = layer(x)
    np.testing.assert_array_equal(layer.eval()(x), y)
    assert layer.num_batches_tracked is None
    layer.reset_running_stats()
    assert layer.running_mean is layer.num_batches_tracked is None
    assert "running_mean" not in layer.state_dict()


@both_layers
def test_reset(kind: str) -> None:
    layer = tracking(kind, momentum=None)
    fresh = snapshot(layer)
    batches = [batch(seed) for seed in range(3)]
    for x in batches:
        layer(x)
    assert snapshot(layer) != fresh
    layer.reset_running_stats()
    assert snapshot(layer) == fresh == (bytes(24), np.ones(6, np.float32).tobytes(), 0)
    for x in batches[1:]:  # the cumulative average starts anew
        layer(x)
    assert_running(layer, by_hand(kind, batches[1:], None))


@both_layers
def test_they_go_on_after_load_state_dict(kind: str) -> None:
    batches = [batch(seed) for seed in range(5)]
    whole, first, second = (tracking(kind, momentum=None) for _ in range(3))
    for x in batches:
        whole(x)
    for x in batches[:3]:
        first(x)
    second.load_state_dict(first.state_dict())
    for x in batches[3:]:
        second(x)
    assert snapshot(second) == snapshot(whole)
    assert first.num_batches_tracked == 3  # the state is a copy
    assert_running(first, by_hand(kind, batches[:3], None))


def test_instance_norm_does_not_track_unless_asked() -> None:
    assert nn.InstanceNorm(6).running_mean is None
    assert nn.BatchNorm(6).running_mean is not None


# --- what leaves them alone -----------------------------------------------------------------------------------------

X = batch(1)
FAILING: dict[str, Callable[[nn.Norm], Any]] = {
    "channels": lambda layer: layer(X[:, :5]),
    "one value a channel": lambda layer: layer(X[:1, :, :1]),
    "dtype": lambda layer: layer(X.astype(complex)),
    "mask, dtype": lambda layer: layer(X, mask=np.ones(X.shape, int)),
    "mask, shape": lambda layer: layer(X, mask=np.ones((5, 5, 7), bool)),
    "out, shape": lambda layer: layer(X, out=np.empty((5, 6, 8), np.float32)),
    "out, dtype": lambda layer: layer(X, out=np.empty(X.shape)),
    "out, read-only": lambda layer: layer(X, out=np.broadcast_to(np.float32(0), X.shape)),
    "residual": lambda layer: layer(X, residual=X),
}


@both_layers
@pytest.mark.parametrize("what", FAILING)
def test_failed_calls(kind: str, what: str) -> None:
    layer = tracking(kind)
    layer(batch(0))
    before = snapshot(layer)
    with pytest.raises((ValueError, TypeError), match=r"(x|mask|out|residual): expected"):
        FAILING[what](layer)
    assert snapshot(layer) == before


@both_layers
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_failed_calls_with_a_weight_that_does_not_fit(kind: str, name: str) -> None:
    layer = tracking(kind, affine=True)
    before = snapshot(layer)
    setattr(layer, name, np.ones(5, np.float32))
    with pytest.raises(ValueError, match=f"{name}: expected shape"):
        layer(X)
    assert snapshot(layer) == before


@both_layers
def test_momentum_that_is_no_number(kind: str) -> None:
    layer = tracking(kind)
    layer.momentum = "0.1"
    before = snapshot(layer)
    with pytest.raises(TypeError, match="momentum: expected a number, got str"):
        layer(X)
    assert snapshot(layer) == before


@both_layers
@pytest.mark.parametrize("shape", [(0, 6, 7), (5, 6, 0)])
def test_empty_arrays(kind: str, shape: tuple[int, ...]) -> None:
    layer = tracking(kind, momentum=None)
    layer(batch(0))
    before = snapshot(layer)
    assert layer(np.empty(shape, np.float32)).shape == shape
    assert snapshot(layer) == before
    assert layer.eval()(np.empty(shape, np.float32)).shape == shape
    assert snapshot(layer) == before


# --- the functions update in place ----------------------------------------------------------------------------------

every_function = pytest.mark.parametrize(
    ("function", "kind"), [(nn.batch_norm, "batch"), (nn.instance_norm, "instance")]
)


@every_function
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_functions_update_in_place(function: Any, kind: str, dtype: Any) -> None:
    mean, var = np.zeros(6, dtype), np.ones(6, dtype)
    x = batch(1)
    function(x, mean, var, None, None, True, 0.3)
    expected = by_hand(kind, [x], 0.3)
    for ours, theirs in zip((mean, var), expected, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours, theirs, max(RUNNING, np.finfo(dtype).eps))


@every_function
def test_bfloat16_statistics(function: Any, kind: str) -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    mean, var = np.zeros(6, bfloat16), np.ones(6, bfloat16)
    x = batch(1)
    function(x, mean, var, None, None, True, 0.3)
    for ours, theirs in zip((mean, var), by_hand(kind, [x], 0.3), strict=True):
        np.testing.assert_allclose(ours.astype(np.float64), theirs, 2.0**-8)


@every_function
def test_statistics_in_slices(function: Any, kind: str) -> None:
    """Views of another array are updated where they lie; what is around them is not touched."""
    both = np.full((6, 4), 7.0)
    both[:, 0], both[:, 2] = 0.0, 1.0
    x = batch(1)
    function(x, both[:, 0], both[:, 2], None, None, True, 0.3)
    for ours, theirs in zip((both[:, 0], both[:, 2]), by_hand(kind, [x], 0.3), strict=True):
        np.testing.assert_allclose(ours, theirs, RUNNING)
    assert (both[:, 1::2] == 7.0).all()


@both_layers
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_layers_keep_the_arrays_that_were_assigned(kind: str, dtype: Any) -> None:
    layer = tracking(kind, momentum=0.3)
    mean, var = np.zeros(6, dtype), np.ones(6, dtype)
    layer.running_mean, layer.running_var = mean, var
    x = batch(1)
    layer(x)
    assert layer.running_mean is mean
    assert layer.running_var is var
    for ours, theirs in zip((mean, var), by_hand(kind, [x], 0.3), strict=True):
        np.testing.assert_allclose(ours, theirs, max(RUNNING, np.finfo(dtype).eps))


@pytest.mark.torch
@every_function
def test_torch_statistics_through_shared_memory(torch: Any, function: Any, kind: str) -> None:
    mean, var = torch.zeros(6), torch.ones(6)
    addresses = mean.data_ptr(), var.data_ptr()
    x = batch(1)
    function(torch.from_numpy(x), mean, var, None, None, True, 0.3)
    assert (mean.data_ptr(), var.data_ptr()) == addresses
    for ours, theirs in zip((mean, var), by_hand(kind, [x], 0.3), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, RUNNING)


@every_function
class TestWrongStatistics:
    def refuse(self, function: Any, mean: Any, var: Any, kind: type[Exception], message: str) -> None:
        copies = [np.array(a) for a in (mean, var) if a is not None]
        with pytest.raises(kind, match=message):
            function(X, mean, var, None, None, True)
        for array, copy in zip([a for a in (mean, var) if a is not None], copies, strict=True):
            np.testing.assert_array_equal(array, copy)

    def test_one_of_two(self, function: Any, kind: str) -> None:
        self.refuse(function, np.zeros(6), None, ValueError, "running_mean, running_var: expected both or neither")
        self.refuse(function, None, np.ones(6), ValueError, "running_mean, running_var: expected both or neither")

    def test_shape(self, function: Any, kind: str) -> None:
        self.refuse(function, np.zeros(6), np.ones(5), ValueError, r"running_var: expected shape \(6,\), got \(5,\)")
        self.refuse(function, np.zeros((6, 1)), np.ones(6), ValueError, r"running_mean: expected shape \(6,\)")

    def test_dtype(self, function: Any, kind: str) -> None:
        self.refuse(function, np.zeros(6), np.ones(6, int), TypeError, "running_var: expected a float dtype")

    def test_not_an_array(self, function: Any, kind: str) -> None:
        self.refuse(function, [0.0] * 6, np.ones(6), TypeError, "running_mean: expected an array to update in place")

    def test_read_only(self, function: Any, kind: str) -> None:
        var = np.ones(6)
        var.setflags(write=False)
        self.refuse(function, np.zeros(6), var, ValueError, "running_var: expected a writeable array")
