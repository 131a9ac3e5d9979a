"""The layers: parameters, running statistics, modes, state; the numbers are those of the functions."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
from reference import error, normal
from tolerances import FLOAT32, FLOAT64, RUNNING_FLOAT32

import numbanorm as nn

SHAPE = (8, 6, 5, 7)
X = 2 * normal(0, SHAPE) + np.float32(1)

LAYERS: dict[str, Callable[[], Any]] = {
    "batch": lambda: nn.BatchNorm(6),
    "batch, last axis": lambda: nn.BatchNorm(7, channel_axis=-1),
    "batch, untracked": lambda: nn.BatchNorm(6, track_running_stats=False),
    "batch, no affine": lambda: nn.BatchNorm(6, affine=False),
    "batch, no bias": lambda: nn.BatchNorm(6, bias=False),
    "layer": lambda: nn.LayerNorm(7),
    "layer, two axes": lambda: nn.LayerNorm((5, 7)),
    "layer, no affine": lambda: nn.LayerNorm(7, elementwise_affine=False),
    "layer, no bias": lambda: nn.LayerNorm(7, bias=False),
    "instance": lambda: nn.InstanceNorm(6),
    "instance, affine": lambda: nn.InstanceNorm(6, affine=True),
    "instance, tracked": lambda: nn.InstanceNorm(6, affine=True, track_running_stats=True),
    "group": lambda: nn.GroupNorm(3, 6),
    "group, last axis": lambda: nn.GroupNorm(7, 7, channel_axis=3),
    "group, no affine": lambda: nn.GroupNorm(3, 6, affine=False),
    "rms": lambda: nn.RMSNorm(7),
    "rms, two axes": lambda: nn.RMSNorm((5, 7), eps=1e-3),
    "rms, no affine": lambda: nn.RMSNorm(7, elementwise_affine=False),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def randomize(layer: Any) -> Any:
    """Give a layer parameters and running statistics that differ from one another."""
    for i, name in enumerate(("weight", "bias", "running_mean")):
        if getattr(layer, name) is not None:
            setattr(layer, name, normal(i + 1, getattr(layer, name).shape))
    if layer.running_var is not None:
        layer.running_var = normal(4, layer.running_var.shape) ** 2 + np.float32(0.5)
    return layer


def expected_of(layer: Any, x: np.ndarray) -> reference.Expected:
    """Say what a layer must return in its present mode and state."""
    own = layer.weight, layer.bias
    match layer.kind:
        case "layer":
            axes = tuple(range(x.ndim - len(layer.normalized_shape), x.ndim))
            return reference.layer_norm(x, axes, *own, layer.eps)
        case "rms":
            axes = tuple(range(x.ndim - len(layer.normalized_shape), x.ndim))
            return reference.rms_norm(x, axes, layer.weight, layer.eps)
        case "group":
            return reference.group_norm(x, layer.num_groups, *own, layer.eps, channel_axis=layer.channel_axis)
    function = {"batch": reference.batch_norm, "instance": reference.instance_norm}[layer.kind]
    from_input = layer.training or layer.running_mean is None
    momentum = layer.momentum
    if momentum is None:
        momentum = 1 / (layer.num_batches_tracked + 1)
    running = layer.running_mean, layer.running_var
    return function(x, *running, *own, from_input, momentum, layer.eps, channel_axis=layer.channel_axis)


@every_layer
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_call(name: str, dtype: Any) -> None:
    layer = randomize(LAYERS[name]())
    x = X.astype(dtype)
    for mode in (True, False, True, True):
        layer.train(mode)
        expected = expected_of(layer, x)
        out = reference.sealed(SHAPE, dtype)
        before = None if layer.running_mean is None else (layer.running_mean.copy(), layer.running_var.copy())
        assert layer(x, out=out) is out
        assert error(out, expected.y) <= (FLOAT32 if dtype == np.float32 else FLOAT64)
        if before is None:
            continue
        if mode:
            np.testing.assert_allclose(layer.running_mean, expected.running_mean, RUNNING_FLOAT32, 1e-6)
            np.testing.assert_allclose(layer.running_var, expected.running_var, RUNNING_FLOAT32)
        else:
            np.testing.assert_array_equal(layer.running_mean, before[0])
            np.testing.assert_array_equal(layer.running_var, before[1])


@every_layer
def test_fresh_parameters(name: str) -> None:
    layer = LAYERS[name]()
    assert layer.training is True
    for attribute, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
        array = getattr(layer, attribute)
        if array is not None:
            assert array.dtype == np.float32
            assert (array == value).all()
    assert (layer.weight is None) == ("no affine" in name or name == "instance")
    no_bias = layer.weight is None or "no bias" in name or layer.kind == "rms"
    assert (layer.bias is None) == no_bias
    tracked = name in ("batch", "batch, last axis", "batch, no affine", "batch, no bias", "instance, tracked")
    assert (layer.running_mean is not None) == tracked
    assert (layer.num_batches_tracked == 0) if tracked else (layer.num_batches_tracked is None)


@every_layer
def test_modes(name: str) -> None:
    layer = LAYERS[name]()
    assert layer.eval() is layer
    assert layer.training is False
    assert layer.train() is layer
    assert layer.training is True
    assert layer.train(False).training is False
    assert layer.to("cpu") is layer


@every_layer
def test_only_tracking_norms_change_with_the_mode(name: str) -> None:
    layer = randomize(LAYERS[name]())
    same = np.array_equal(layer(X), layer.eval()(X))
    assert same == (layer.running_mean is None)


@every_layer
def test_state_round_trip(name: str) -> None:
    layer = randomize(LAYERS[name]())
    layer(X)
    state = layer.state_dict()
    assert all(type(value) is np.ndarray for value in state.values())
    other = LAYERS[name]()
    assert other.load_state_dict(state) is other
    for mode in (False, True):
        np.testing.assert_array_equal(other.train(mode)(X), layer.train(mode)(X))
    for key, value in layer.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[key], value)


@every_layer
def test_state_is_copied(name: str) -> None:
    layer = randomize(LAYERS[name]())
    state = layer.state_dict()
    for value in state.values():
        value[...] = 7
    given = {key: np.array(value) for key, value in layer.state_dict().items()}
    kept = {key: value.copy() for key, value in given.items()}
    other = LAYERS[name]().load_state_dict(given)
    for value in given.values():
        value[...] = 7
    for key, value in other.state_dict().items():
        np.testing.assert_array_equal(value, kept[key])


@every_layer
@pytest.mark.parametrize("through", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(name: str, through: Callable[[Any], Any]) -> None:
    layer = randomize(LAYERS[name]())
    other = through(layer)
    y = layer.eval()(X)
    np.testing.assert_array_equal(other.eval()(X), y)
    if layer.weight is not None:
        layer.weight += 1
        np.testing.assert_array_equal(other(X), y)


STATE_NAMES = {
    "batch": ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"],
    "batch, no affine": ["running_mean", "running_var", "num_batches_tracked"],
    "batch, untracked": ["weight", "bias"],
    "instance": [],
    "instance, tracked": ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"],
    "group": ["weight", "bias"],
    "layer": ["weight", "bias"],
    "layer, no bias": ["weight"],
    "rms": ["weight"],
    "rms, no affine": [],
}


@pytest.mark.parametrize("name", STATE_NAMES)
def test_state_names_and_shapes(name: str) -> None:
    state = LAYERS[name]().state_dict()
    assert list(state) == STATE_NAMES[name]
    assert state.get("num_batches_tracked", np.array(0)).shape == ()
    assert state.get("num_batches_tracked", np.array(0)).dtype.kind == "i"


class TestLoad:
    @staticmethod
    def state() -> dict[str, Any]:
        return {
            "weight": normal(1, (6,)),
            "bias": normal(2, (6,)),
            "running_mean": normal(3, (6,)),
            "running_var": normal(4, (6,)) ** 2,
            "num_batches_tracked": np.array(41),
        }

    WRONG = (
        ({"weight": np.ones(5, np.float32)}, ValueError, r"weight: expected shape \(6,\), got \(5,\)"),
        ({"weight": np.ones((6, 1), np.float32)}, ValueError, r"weight: expected shape \(6,\), got \(6, 1\)"),
        ({"running_var": np.ones(7, np.float32)}, ValueError, r"running_var: expected shape \(6,\), got \(7,\)"),
        ({"bias": np.ones(6, int)}, TypeError, "bias: expected a float dtype, got int64"),
        ({"running_mean": np.ones(6, complex)}, TypeError, "running_mean: expected a float dtype, got complex128"),
        (
            {"num_batches_tracked": np.array(1.5)},
            ValueError,
            "num_batches_tracked: .*got dtype float64",
        ),
        ({"num_batches_tracked": np.array([1, 2])}, ValueError, r"num_batches_tracked: expected one integer, .*\(2,\)"),
        ({"scale": np.ones(6)}, ValueError, r"mapping: .*unknown \['scale'\]"),
        ({"weight": "words"}, (TypeError, ValueError), "weight: "),
    )

    @pytest.mark.parametrize(("wrong", "kind", "message"), WRONG)
    def test_wrong_changes_nothing(self, wrong: dict[str, Any], kind: Any, message: str) -> None:
        layer = randomize(nn.BatchNorm(6))
        before = layer.state_dict()
        with pytest.raises(kind, match=message):
            layer.load_state_dict(self.state() | wrong)
        for key, value in layer.state_dict().items():
            np.testing.assert_array_equal(value, before[key])

    @pytest.mark.parametrize("missing", ["weight", "bias", "running_mean", "num_batches_tracked"])
    def test_missing(self, missing: str) -> None:
        layer = nn.BatchNorm(6)
        state = self.state()
        del state[missing]
        with pytest.raises(ValueError, match=rf"mapping: .*missing \['{missing}'\]"):
            layer.load_state_dict(state)
        assert (layer.running_var == 1).all()

    def test_not_strict(self) -> None:
        layer = nn.BatchNorm(6)
        layer.load_state_dict({"bias": self.state()["bias"], "other": None}, strict=False)
        np.testing.assert_array_equal(layer.bias, self.state()["bias"])
        np.testing.assert_array_equal(layer.weight, np.ones(6))
        with pytest.raises(ValueError, match="bias: expected shape"):
            layer.load_state_dict({"bias": np.ones(3)}, strict=False)

    def test_dtypes_are_kept(self) -> None:
        layer = nn.BatchNorm(6)
        state = self.state() | {"weight": np.ones(6, np.float64), "bias": np.ones(6, ">f4")}
        layer.load_state_dict(state)
        assert layer.weight.dtype == np.float64
        assert layer.bias.dtype == np.float32
        assert layer.bias.dtype.isnative
        assert layer.num_batches_tracked == 41
        assert type(layer.num_batches_tracked) is int

    def test_count_of_one_element(self) -> None:
        """Older files hold it with one axis."""
        layer = nn.BatchNorm(6).load_state_dict(self.state() | {"num_batches_tracked": np.array([3])})
        assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("make", [nn.BatchNorm, lambda *a, **k: nn.InstanceNorm(*a, track_running_stats=True, **k)])
class TestRunning:
    def test_momentum_none_is_the_average_of_all_batches(self, make: Any) -> None:
        layer = make(6, momentum=None)
        function = reference.batch_norm if layer.kind == "batch" else reference.instance_norm
        means, variances = [], []
        for i in range(1, 6):
            x = i * normal(i, SHAPE) + np.float32(i)
            layer(x)
            batch = function(x, np.zeros(6), np.zeros(6), None, None, True, 1.0)
            means.append(batch.running_mean)
            variances.append(batch.running_var)
            assert layer.num_batches_tracked == i
            np.testing.assert_allclose(layer.running_mean, np.mean(means, 0), 5 * RUNNING_FLOAT32)
            np.testing.assert_allclose(layer.running_var, np.mean(variances, 0), 5 * RUNNING_FLOAT32)

    def test_variance_is_unbiased(self, make: Any) -> None:
        layer = make(6, momentum=1.0)
        x = normal(0, (1, 6, 3))
        layer(x)
        np.testing.assert_allclose(layer.running_var, x[0].astype(float).var(1, ddof=1), 1e-6)
        np.testing.assert_allclose(layer.running_mean, x[0].astype(float).mean(1), 1e-5, 1e-7)

    def test_arrays_are_updated_in_place(self, make: Any) -> None:
        layer = make(6)
        mean, var = layer.running_mean, layer.running_var
        layer(X)
        assert layer.running_mean is mean
        assert layer.running_var is var
        assert (mean != 0).all()

    @pytest.mark.parametrize("empty", [(0, 6, 5), (3, 6, 0)])
    def test_empty_batches_do_not_count(self, make: Any, empty: tuple[int, ...]) -> None:
        layer = randomize(make(6))
        before = layer.state_dict()
        y = layer(np.zeros(empty, np.float32))
        assert y.shape == empty
        for key, value in layer.state_dict().items():
            np.testing.assert_array_equal(value, before[key])

    def test_a_failed_call_does_not_count(self, make: Any) -> None:
        layer = randomize(make(6))
        before = layer.state_dict()
        for wrong in ({"mask": np.ones(3, bool)}, {"out": np.ones(3)}, {"out": X.astype(float)}):
            with pytest.raises((TypeError, ValueError), match=r"mask: |out: "):
                layer(X, **wrong)
        with pytest.raises(ValueError, match="x: "):
            layer(X[:, :5])
        for key, value in layer.state_dict().items():
            np.testing.assert_array_equal(value, before[key])

    def test_evaluation_does_not_count(self, make: Any) -> None:
        layer = make(6).eval()
        layer(X)
        assert layer.num_batches_tracked == 0

    def test_a_samples_result_does_not_depend_on_the_batch_in_evaluation(self, make: Any) -> None:
        layer = randomize(make(6)).eval()
        y = layer(X)
        for i in range(len(X)):
            np.testing.assert_array_equal(layer(X[i : i + 1])[0], y[i])

    def test_reset(self, make: Any) -> None:
        layer = make(6)
        layer(X)
        layer.reset_running_stats()
        assert layer.num_batches_tracked == 0
        assert (layer.running_mean == 0).all()
        assert (layer.running_var == 1).all()


def test_dispatch() -> None:
    assert type(nn.Norm("batch", 6)) is nn.BatchNorm
    assert type(nn.Norm("layer", 384)) is nn.LayerNorm
    assert type(nn.Norm("instance", 6, affine=True)) is nn.InstanceNorm
    assert type(nn.Norm("group", 3, 6)) is nn.GroupNorm
    assert type(nn.Norm("rms", (5, 7))) is nn.RMSNorm
    assert nn.Norm("layer", 384).normalized_shape == (384,)
    assert nn.Norm("layer", 384, eps=0.5).eps == 0.5
    assert nn.Norm(kind="group", num_groups=3, num_channels=6).num_groups == 3
    assert isinstance(nn.BatchNorm(6), nn.Norm)
    for wrong in ("Layer", "power", None, 3):
        with pytest.raises(ValueError, match=r"kind: expected one of .batch., .*got"):
            nn.Norm(wrong, 6)
    with pytest.raises(ValueError, match="kind: expected one of"):
        nn.Norm()


REPRS = {
    "BatchNorm(6, eps=1e-05, momentum=0.1)": lambda: nn.BatchNorm(6),
    "BatchNorm(6, eps=0.001, momentum=None, channel_axis=-1)": lambda: nn.BatchNorm(6, 1e-3, None, channel_axis=-1),
    "InstanceNorm(6, eps=1e-05, affine=False, momentum=0.1)": lambda: nn.InstanceNorm(6),
    "GroupNorm(3, 6, eps=1e-05)": lambda: nn.GroupNorm(3, 6),
    "LayerNorm((384,), eps=1e-05)": lambda: nn.LayerNorm(384),
    "LayerNorm((5, 7), eps=1e-05, bias=False)": lambda: nn.LayerNorm((5, 7), bias=False),
    "RMSNorm((7,), eps=None)": lambda: nn.RMSNorm(7),
}


@pytest.mark.parametrize("text", REPRS)
def test_repr(text: str) -> None:
    assert repr(REPRS[text]()) == text


WRONG = [
    (lambda: nn.BatchNorm(0), ValueError, "num_features: expected a positive integer, got 0"),
    (lambda: nn.BatchNorm(-3), ValueError, "num_features: .*got -3"),
    (lambda: nn.BatchNorm(6.0), TypeError, "num_features: expected an integer, got float"),
    (lambda: nn.BatchNorm("6"), TypeError, "num_features: expected an integer, got str"),
    (lambda: nn.InstanceNorm(True), TypeError, "num_features: expected an integer, got bool"),
    (lambda: nn.BatchNorm(6, eps=-1), ValueError, "eps: .*got -1"),
    (lambda: nn.BatchNorm(6, eps="1"), TypeError, "eps: expected a number, got str"),
    (lambda: nn.BatchNorm(6, momentum="0.1"), TypeError, "momentum: expected a number.*got str"),
    (lambda: nn.InstanceNorm(6, momentum=True), TypeError, "momentum: expected a number.*got bool"),
    (lambda: nn.BatchNorm(6, channel_axis=1.5), TypeError, "channel_axis: expected an integer, got float"),
    (lambda: nn.GroupNorm(4, 6), ValueError, "num_groups: expected a divisor of the 6 channels, got 4"),
    (lambda: nn.GroupNorm(0, 6), ValueError, "num_groups: expected a positive integer, got 0"),
    (lambda: nn.GroupNorm(2.0, 6), TypeError, "num_groups: expected an integer, got float"),
    (lambda: nn.GroupNorm(2, 0), ValueError, "num_channels: expected a positive integer, got 0"),
    (lambda: nn.LayerNorm(()), ValueError, r"normalized_shape: .*got \(\)"),
    (lambda: nn.LayerNorm((5, -7)), ValueError, "normalized_shape: "),
    (lambda: nn.LayerNorm("7"), TypeError, "normalized_shape: expected an integer, got str"),
    (lambda: nn.LayerNorm(7, eps=None), TypeError, "eps: expected a number, got NoneType"),
    (lambda: nn.RMSNorm(7.5), TypeError, "normalized_shape: expected an integer, got float"),
    (lambda: nn.RMSNorm(7, eps=-1.0), ValueError, "eps: .*got -1.0"),
    (lambda: nn.BatchNorm(5)(X), ValueError, r"x: expected 5 channels along axis 1, got shape \(8, 6, 5, 7\)"),
    (lambda: nn.InstanceNorm(5)(X), ValueError, "x: expected 5 channels along axis 1, got shape"),
    (lambda: nn.BatchNorm(6, channel_axis=-1)(X), ValueError, "x: expected 6 channels along axis -1, got shape"),
    (lambda: nn.GroupNorm(3, 12)(X), ValueError, "x: expected 12 channels along axis 1, got shape"),
    (lambda: nn.GroupNorm(2, 3)(X), ValueError, "(x: expected 3 channels|num_groups: )"),
    (lambda: nn.LayerNorm(6)(X), ValueError, r"x: expected lengths \(6,\).*got shape"),
    (lambda: nn.RMSNorm((7, 5))(X), ValueError, r"x: expected lengths \(7, 5\).*got shape"),
    (lambda: nn.BatchNorm(6)(X[0, 0]), ValueError, "(x|channel_axis): "),
    (lambda: nn.BatchNorm(6)(X[0, 0, 0]), ValueError, "(x|channel_axis): expected at least 2 dimensions"),
    (lambda: nn.BatchNorm(6)(X, residual=X), TypeError, "residual: .*BatchNorm"),
    (lambda: nn.GroupNorm(3, 6)(X, residual=X), TypeError, "residual: .*GroupNorm"),
    (lambda: nn.InstanceNorm(6)(X, residual=X), TypeError, "residual: .*InstanceNorm"),
    (lambda: nn.RMSNorm(7)(X, mask=X > 0), TypeError, "mask: .*RMSNorm"),
    (lambda: nn.BatchNorm(6).to("gpu"), ValueError, "device: .*got 'gpu'"),
    (lambda: nn.BatchNorm(5).layout(SHAPE), ValueError, "x: expected 5 channels along axis 1, got shape"),
    (lambda: nn.LayerNorm(5).layout(SHAPE), ValueError, r"x: expected lengths \(5,\)"),
]


@pytest.mark.parametrize(("call", "kind", "message"), WRONG)
def test_wrong(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        call()


@pytest.mark.parametrize("shape", [(3, 1), (7, 33), (5, 64), (40, 100), (4, 1000), (3, 5000), (2, 40000), (520, 4100)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_a_residual_is_added_first(shape: tuple[int, int], dtype: str) -> None:
    """The same bits as of the sum, wherever they go; (520, 4100) goes past the caches, a constant row another way."""
    kind = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    x, residual = (normal(seed, shape, np.float64).astype(kind) for seed in (0, 1))
    x[1], residual[1] = 3, 1.01
    weight, bias = (normal(seed, shape[1:], np.float32).astype(kind) for seed in (2, 3))
    own = {"x": x.copy(), "residual": residual.copy()}
    beside = np.empty(x.size + 3, kind)[3:].reshape(shape)  # never from the start of a line on
    y = nn.layer_norm(x + residual, shape[1], weight, bias)
    for out in (None, beside, *own.values()):
        given = {name: array if array is out else array.copy() for name, array in own.items()}
        result, total = nn.layer_norm(given["x"], shape[1], weight, bias, residual=given["residual"], out=out)
        np.testing.assert_array_equal(total, x + residual)
        np.testing.assert_array_equal(result, y)
        assert out is None or result is out
        own["x"][...], own["residual"][...] = x, residual


def test_residual() -> None:
    x, residual = normal(0, (4, 9, 64)), normal(1, (4, 9, 64))
    for layer in (randomize(nn.LayerNorm(64)), randomize(nn.RMSNorm(64))):
        y, total = layer(x, residual=residual)
        np.testing.assert_array_equal(total, x + residual)
        assert error(y, expected_of(layer, x + residual).y) <= FLOAT32
        out = np.empty_like(x)
        assert layer(x, residual=residual, out=out)[0] is out
        np.testing.assert_array_equal(out, y)


def test_rms_default_eps_follows_the_input() -> None:
    layer = nn.RMSNorm(64)
    for dtype in (np.float32, np.float64):
        x = (1e-4 * normal(0, (5, 64), np.float64)).astype(dtype)
        expected = reference.rms_norm(x, (1,), eps=float(np.finfo(dtype).eps)).y
        assert error(layer(x), expected) <= FLOAT32


def test_parameters_may_be_assigned() -> None:
    layer = nn.LayerNorm(7)
    layer.weight = np.arange(7, dtype=np.float64)
    layer.bias = np.full(7, 0.5, np.float16)
    expected = reference.layer_norm(X, (-1,), np.arange(7), np.full(7, 0.5)).y
    assert error(layer(X), expected) <= FLOAT32
    layer.bias = None
    assert error(layer(X), reference.layer_norm(X, (-1,), np.arange(7)).y) <= FLOAT32


def test_running_statistics_in_float64_do_not_drift() -> None:
    """Many small steps: float32 running statistics would lose them."""
    layer = nn.BatchNorm(6, momentum=1e-9)
    layer.running_mean = np.zeros(6)
    layer.running_var = np.ones(6)
    x = X + np.float32(100)
    for _ in range(10):
        layer(x)
    expected = 1e-8 * x.astype(float).mean((0, 2, 3))
    np.testing.assert_allclose(layer.running_mean, expected, 1e-7)


@pytest.mark.parametrize("kind", ["layer", "rms", "group"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda norm: pickle.loads(pickle.dumps(norm))])
def test_copies_after_a_call(kind: str, copied: Callable[[Any], Any]) -> None:
    """What a layer keeps from call to call (compiled kernels among it) does not go into copies and other processes."""
    norm = nn.Norm(kind, *((2, 8) if kind == "group" else (8,)))
    x = np.random.default_rng(0).standard_normal((4, 8), dtype=np.float32)
    y = norm(x)
    other = copied(norm)
    dx = norm.backward(y)
    np.testing.assert_array_equal(other.backward(y), dx)
    np.testing.assert_array_equal(other(x), y)
    np.testing.assert_array_equal(norm(x), y)


def test_quick_calls_follow_the_layer() -> None:
    """The way that a layer keeps is for one shape, dtype, weight, bias and eps: whatever changes is seen."""
    x = np.random.default_rng(0).standard_normal((4, 8), dtype=np.float32)
    norm = nn.LayerNorm(8)

    def check(x: Any) -> None:
        function = nn.layer_norm(x, 8, norm.weight, norm.bias, norm.eps)
        y = norm(x)
        assert y.dtype == function.dtype
        np.testing.assert_array_equal(y, function)

    check(x)
    norm.weight = np.full(8, 2.0, np.float32)
    check(x)
    norm.bias[:] = 3.0
    check(x)
    norm.eps = 0.5
    check(x)
    check(x.astype(np.float64))
    check(x[:2])
    check(x[::-1])
    with pytest.raises(ValueError, match="x: expected lengths"):
        norm(x[:, :7])
    norm.eps = -1.0
    with pytest.raises(ValueError, match="eps"):
        norm(x)


CHANNELS_LAST = [
    ("batch", lambda x, **more: nn.batch_norm(x, None, None, *parameters(x), training=True, **more)),
    ("given", lambda x, **more: nn.batch_norm(x, *parameters(x), *parameters(x), **more)),
    ("instance", lambda x, **more: nn.instance_norm(x, None, None, *parameters(x), **more)),
    ("group", lambda x, **more: nn.group_norm(x, 2, *parameters(x), **more)),
]


def parameters(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a positive and another parameter a channel, of the input's dtype."""
    values = np.random.default_rng(1).uniform(0.5, 2, (2, x.shape[1])).astype(x.dtype)
    return values[0], values[1] + values[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("shape", [(3, 6, 5), (3, 6, 5, 7), (2, 4, 3, 3, 5)])
@pytest.mark.parametrize("norm", CHANNELS_LAST, ids=lambda norm: norm[0])
def test_small_arrays_with_channels_last_in_memory(norm: Any, shape: tuple[int, ...], dtype: Any) -> None:
    """They go a quick way, with `out` too; the long one gives the same bits, and `y` lies in memory as `x` does."""
    name, function = norm
    memory = np.random.default_rng(0).standard_normal((shape[0], *shape[2:], shape[1])).astype(dtype)
    x = np.moveaxis(memory, -1, 1)
    y = function(x)
    assert y.strides == x.strides
    np.testing.assert_allclose(
        y, function(np.ascontiguousarray(x)), rtol=2e-3 if dtype is np.float16 else 1e-4, atol=1e-5
    )
    out = np.empty_like(x)
    assert function(x, out=out) is out
    np.testing.assert_array_equal(y, out)
    held = x.copy("K")
    assert function(held, out=held) is held
    np.testing.assert_array_equal(y, held)
    apart = np.empty((2, *memory.shape), memory.dtype)[:, ::-1][0]  # this one goes the long way
    np.testing.assert_array_equal(y, function(x, out=np.moveaxis(apart, -1, 1)))
    if name == "given":
        return
    quick = function(x, return_stats=True)
    for one, other in zip(quick, function(x, return_stats=True, out=out), strict=True):
        assert one.shape == other.shape
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shape", [(3, 6, 5), (3, 6, 5, 7)])
@pytest.mark.parametrize("name", ["batch", "instance", "group"])
def test_gradients_of_small_arrays_with_channels_last_in_memory(name: str, shape: tuple[int, ...]) -> None:
    """They are those of the same arrays with channels first in memory; `dx` lies as `x` does."""
    memory = np.random.default_rng(0).standard_normal((2, shape[0], *shape[2:], shape[1]))
    dy, x = np.moveaxis(memory, -1, 2)
    weight, _ = parameters(x)
    groups = (2,) if name == "group" else ()
    stats = {"batch": nn.batch_norm, "instance": nn.instance_norm, "group": nn.group_norm}[name](
        x, *groups, return_stats=True, **({"training": True} if name == "batch" else {})
    )[1:]
    backward = getattr(nn, f"{name}_norm_backward")
    found = backward(dy, x, *groups, *stats, weight)
    assert found[0].strides == x.strides
    wanted = backward(np.ascontiguousarray(dy), np.ascontiguousarray(x), *groups, *stats, weight)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(3000, 100), (3001, 33), (40, 24, 9, 11)])
def test_inference_in_several_pieces(shape: tuple[int, ...]) -> None:
    """Columns are written piece by piece, of some chunks of rows each; the last piece is shorter."""
    x = normal(0, shape)
    mean, scale = normal(1, (shape[1],)), np.abs(normal(2, (shape[1],))) + np.float32(0.5)
    along = (-1, *(1,) * (len(shape) - 2))
    exact = (x.astype(np.float64) - mean.reshape(along)) / np.sqrt(scale.reshape(along).astype(np.float64) + 1e-5)
    np.testing.assert_allclose(nn.batch_norm(x, mean, scale), exact, rtol=1e-5, atol=1e-6)
    last = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    np.testing.assert_allclose(nn.batch_norm(last, mean, scale), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [32, 33, 49, 63, 64])
@pytest.mark.parametrize("norm", ["inference", "training", "instance"])
def test_short_runs_in_place(norm: str, length: int) -> None:
    """A run of 32 to 64 is two vectors that overlap: the second must not read what the first has written."""
    x = normal(0, (5, 6, length))
    mean, var = normal(1, (6,)), np.ones(6, np.float32)
    function: dict[str, Callable[..., Any]] = {
        "inference": lambda out=None: nn.batch_norm(x, mean, var, out=out),
        "training": lambda out=None: nn.batch_norm(x, training=True, out=out),
        "instance": lambda out=None: nn.instance_norm(x, out=out),
    }
    y = function[norm]()
    function[norm](out=x)
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("offset", [0, 1, 5, 15, 31])
def test_large_outputs_that_start_anywhere(offset: int, dtype: str) -> None:
    """Past the caches go whole vectors: the end of a row waits for the start of the next, also where there is none."""
    shape, before = (2201, 1003), 64 + offset
    memory = np.full(before + 2201 * 1003 + 64, 7.0, dtype)
    out = memory[before:-64].reshape(shape)
    x, weight, bias = normal(0, shape).astype(dtype), normal(1, shape[1:]), normal(2, shape[1:])

    def in_the_caches(width: int) -> np.ndarray:
        own = (width, weight[:width], bias[:width])
        return np.concatenate([nn.layer_norm(part[:, :width], *own) for part in np.array_split(x, 20)])

    wanted = in_the_caches(1003)
    assert nn.layer_norm(x, 1003, weight, bias, out=out) is out
    np.testing.assert_array_equal(out, wanted)
    assert (memory[:before] == 7.0).all()
    assert (memory[-64:] == 7.0).all()
    out[...] = 7.0
    nn.layer_norm(x[:, :960], 960, weight[:960], bias[:960], out=out[:, :960])  # no row starts where another ends
    np.testing.assert_array_equal(out[:, :960], in_the_caches(960))
    assert (out[:, 960:] == 7.0).all()
    nn.layer_norm(x, 1003, weight, bias, out=x)
    np.testing.assert_array_equal(x, wanted)


@pytest.mark.parametrize("offset", [0, 3, 17])
def test_large_outputs_of_inference(offset: int) -> None:
    """The same run by run: (C, S) of one sample after the other."""
    shape = (300, 7, 33, 37)
    memory = np.full(offset + 300 * 7 * 33 * 37 + 64, 7.0, np.float32)
    out = memory[offset:-64].reshape(shape)
    x, mean, var = normal(0, shape), normal(1, (7,)), np.abs(normal(2, (7,))) + np.float32(0.5)
    wanted = np.concatenate([nn.batch_norm(part, mean, var) for part in np.array_split(x, 30)])
    np.testing.assert_array_equal(nn.batch_norm(x, mean, var, out=out), wanted)
    assert (memory[:offset] == 7.0).all()
    assert (memory[-64:] == 7.0).all()
