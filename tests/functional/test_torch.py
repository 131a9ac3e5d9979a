"""Against torch in float64: the functions on random problems, and the layers with torch's own state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerances import FLOAT64_TORCH, FLOAT64_TORCH_ZERO, RUNNING_FLOAT32

import numbanorm as nn

pytestmark = pytest.mark.torch


def assert_close(ours: Any, theirs: Any, rtol: float = FLOAT64_TORCH) -> None:
    theirs = theirs.detach().numpy()
    scale = float(np.abs(theirs).max(initial=0.0))
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol, FLOAT64_TORCH_ZERO * max(scale, 1e-300))


class Problem:
    """A random input with everything that a norm over channels takes, for NumPy and for torch."""

    def __init__(self, draw: Any, *, spatial: int | None = None) -> None:
        low = 0 if spatial is None else spatial
        space = draw(st.lists(st.integers(1, 9), min_size=low, max_size=3))
        samples = draw(st.integers(1, 6))
        self.groups = draw(st.integers(1, 4))
        channels = self.groups * draw(st.integers(1, 8))
        if samples * int(np.prod(space)) == 1:
            samples = 2
        if spatial is not None and int(np.prod(space)) == 1:
            space[0] = 2
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        self.scale = draw(st.sampled_from([1.0, 1e-3, 1e3]))
        self.mean = draw(st.sampled_from([0.0, 1.0, -30.0]))
        self.first = (samples, channels, *space)
        self.channels_last = draw(st.booleans())
        shape = (samples, *space, channels) if self.channels_last else self.first
        self.x = self.scale * (self.rng.standard_normal(shape) + self.mean)
        self.channel_axis = -1 if self.channels_last else 1
        self.weight = self.rng.standard_normal(channels) if draw(st.booleans()) else None
        self.bias = self.rng.standard_normal(channels) if draw(st.booleans()) else None
        self.eps = draw(st.sampled_from([1e-5, 1e-3, 1.0]))
        self.momentum = draw(st.sampled_from([0.1, 0.0, 0.5, 1.0]))
        self.running_mean = self.rng.standard_normal(channels)
        self.running_var = self.rng.random(channels) + 0.5

    def turned(self, array: np.ndarray) -> np.ndarray:
        """Bring channels to axis 1."""
        return np.moveaxis(array, self.channel_axis, 1)


@st.composite
def channel_problems(draw: st.DrawFn) -> Problem:
    return Problem(draw)


@st.composite
def spatial_problems(draw: st.DrawFn) -> Problem:
    return Problem(draw, spatial=1)


def tensors(torch: Any, *arrays: np.ndarray | None) -> list[Any]:
    return [None if a is None else torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]


@given(problem=channel_problems(), training=st.booleans(), track=st.booleans())
def test_batch_norm(torch: Any, problem: Problem, training: bool, track: bool) -> None:
    check_tracked(torch, problem, nn.batch_norm, torch.nn.functional.batch_norm, training, track)


@given(problem=spatial_problems(), use_input_stats=st.booleans(), track=st.booleans())
def test_instance_norm(torch: Any, problem: Problem, use_input_stats: bool, track: bool) -> None:
    check_tracked(torch, problem, nn.instance_norm, torch.nn.functional.instance_norm, use_input_stats, track)


def check_tracked(torch: Any, p: Problem, ours: Any, theirs: Any, from_input: bool, track: bool) -> None:
    """Compare outputs, and the running statistics that both update in place."""
    running = [p.running_mean, p.running_var] if track or not from_input else [None, None]
    x, weight, bias, *their_running = tensors(torch, p.turned(p.x), p.weight, p.bias, *running)
    our_running = [None if a is None else a.copy() for a in running]
    their_running = [None if a is None else a.clone() for a in their_running]
    expected = theirs(x, *their_running, weight, bias, from_input, p.momentum, p.eps)
    options = {"channel_axis": p.channel_axis}
    y = ours(p.x, *our_running, p.weight, p.bias, from_input, p.momentum, p.eps, **options)
    assert_close(p.turned(y), expected)
    for a, b in zip(our_running, their_running, strict=True):
        if a is not None:
            assert_close(a, b)


@given(problem=channel_problems())
def test_batch_norm_statistics(torch: Any, problem: Problem) -> None:
    p = problem
    x, weight, bias = tensors(torch, p.turned(p.x), p.weight, p.bias)
    expected = torch.native_batch_norm(x, weight, bias, None, None, True, p.momentum, p.eps)
    options = {"channel_axis": p.channel_axis, "return_stats": True}
    results = nn.batch_norm(p.x, None, None, p.weight, p.bias, True, p.momentum, p.eps, **options)
    for a, b in zip((p.turned(results[0]), *results[1:]), expected, strict=True):
        assert a.shape == b.shape
        assert_close(a, b)


@given(problem=spatial_problems())
def test_group_norm(torch: Any, problem: Problem) -> None:
    p = problem
    x, weight, bias = tensors(torch, p.turned(p.x), p.weight, p.bias)
    n, c = x.shape[:2]
    space = x.numel() // (n * c)
    expected = torch.native_group_norm(x, weight, bias, n, c, space, p.groups, p.eps)
    options = {"channel_axis": p.channel_axis, "return_stats": True}
    y, mean, rstd = nn.group_norm(p.x, p.groups, p.weight, p.bias, p.eps, **options)
    for a, b in zip((p.turned(y), mean, rstd), expected, strict=True):
        assert a.shape == b.shape
        assert_close(a, b)
    assert_close(p.turned(y), torch.nn.functional.group_norm(x, p.groups, weight, bias, p.eps))


@st.composite
def layer_problems(draw: st.DrawFn) -> tuple[Any, ...]:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    normalized = shape[draw(st.integers(0, len(shape) - 1)) :]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = draw(st.sampled_from([1.0, 1e-3, 1e3])) * (
        rng.standard_normal(shape) + draw(st.sampled_from([0.0, 1.0, -30.0]))
    )
    if draw(st.booleans()):  # the other memory order
        x = np.asfortranarray(x)
    weight = rng.standard_normal(normalized) if draw(st.booleans()) else None
    bias = rng.standard_normal(normalized) if draw(st.booleans()) else None
    return x, normalized, weight, bias, draw(st.sampled_from([1e-5, 1e-3, 1.0]))


@given(problem=layer_problems())
def test_layer_norm(torch: Any, problem: Any) -> None:
    x, normalized, weight, bias, eps = problem
    tensor, w, b = tensors(torch, x, weight, bias)
    expected = torch.native_layer_norm(tensor, normalized, w, b, eps)
    results = nn.layer_norm(x, normalized, weight, bias, eps, return_stats=True)
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.shape == theirs.shape
        assert_close(ours, theirs)


@given(problem=layer_problems(), default_eps=st.booleans())
def test_rms_norm(torch: Any, problem: Any, default_eps: bool) -> None:
    x, normalized, weight, _, eps = problem
    eps = None if default_eps else eps
    tensor, w = tensors(torch, x, weight)
    assert_close(nn.rms_norm(x, normalized, weight, eps), torch.nn.functional.rms_norm(tensor, normalized, w, eps))


@given(problem=layer_problems(), data=st.data())
def test_layer_norm_over_any_axes(torch: Any, problem: Any, data: st.DataObject) -> None:
    """Any set of axes is the last axes of a transposed array."""
    x, _, _, _, eps = problem
    axes = tuple(data.draw(st.lists(st.integers(0, x.ndim - 1), min_size=1, unique=True)))
    rng = np.random.default_rng(5)
    lengths = tuple(x.shape[a] for a in axes)
    weight, bias = rng.standard_normal(lengths), rng.standard_normal(lengths)
    order = [a for a in range(x.ndim) if a not in axes] + list(axes)
    tensor, w, b = tensors(torch, x.transpose(order), weight, bias)
    y = nn.layer_norm(x, lengths, weight, bias, eps, axis=axes)
    assert_close(y.transpose(order), torch.nn.functional.layer_norm(tensor, lengths, w, b, eps))
    y = nn.rms_norm(x, lengths, weight, eps, axis=axes)
    assert_close(y.transpose(order), torch.nn.functional.rms_norm(tensor, lengths, w, eps))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rms_norm_default_eps(torch: Any, dtype: str) -> None:
    """Small enough numbers that the machine epsilon matters."""
    x = 1e-4 * np.random.default_rng(0).standard_normal((3, 40)).astype(dtype)
    expected = torch.nn.functional.rms_norm(torch.from_numpy(x), (40,))
    np.testing.assert_allclose(nn.rms_norm(x, 40), expected.numpy(), 2e-6)


LAYERS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "batch": (lambda t: t.nn.BatchNorm2d(6), lambda: nn.BatchNorm(6), (4, 6, 5, 5)),
    "batch 1d": (lambda t: t.nn.BatchNorm1d(6, eps=1e-3), lambda: nn.BatchNorm(6, eps=1e-3), (8, 6)),
    "batch 3d": (lambda t: t.nn.BatchNorm3d(6), lambda: nn.BatchNorm(6), (2, 6, 3, 3, 3)),
    "batch, no affine": (
        lambda t: t.nn.BatchNorm2d(6, affine=False),
        lambda: nn.BatchNorm(6, affine=False),
        (4, 6, 5, 5),
    ),
    "batch, cumulative": (
        lambda t: t.nn.BatchNorm2d(6, momentum=None),
        lambda: nn.BatchNorm(6, momentum=None),
        (4, 6, 5, 5),
    ),
    "batch, momentum": (
        lambda t: t.nn.BatchNorm2d(6, momentum=0.7),
        lambda: nn.BatchNorm(6, momentum=0.7),
        (4, 6, 5, 5),
    ),
    "batch, untracked": (
        lambda t: t.nn.BatchNorm2d(6, track_running_stats=False),
        lambda: nn.BatchNorm(6, track_running_stats=False),
        (4, 6, 5, 5),
    ),
    "instance": (lambda t: t.nn.InstanceNorm2d(6), lambda: nn.InstanceNorm(6), (4, 6, 5, 5)),
    "instance, affine": (
        lambda t: t.nn.InstanceNorm2d(6, affine=True),
        lambda: nn.InstanceNorm(6, affine=True),
        (4, 6, 5, 5),
    ),
    "instance, tracked": (
        lambda t: t.nn.InstanceNorm1d(6, affine=True, track_running_stats=True),
        lambda: nn.InstanceNorm(6, affine=True, track_running_stats=True),
        (4, 6, 25),
    ),
    "group": (lambda t: t.nn.GroupNorm(3, 6), lambda: nn.GroupNorm(3, 6), (4, 6, 5, 5)),
    "group, no affine": (
        lambda t: t.nn.GroupNorm(2, 6, affine=False),
        lambda: nn.GroupNorm(2, 6, affine=False),
        (4, 6),
    ),
    "layer": (lambda t: t.nn.LayerNorm(48), lambda: nn.LayerNorm(48), (4, 7, 48)),
    "layer 2d": (lambda t: t.nn.LayerNorm((7, 48)), lambda: nn.LayerNorm((7, 48)), (4, 7, 48)),
    "layer, no bias": (lambda t: t.nn.LayerNorm(48, bias=False), lambda: nn.LayerNorm(48, bias=False), (4, 7, 48)),
    "layer, no affine": (
        lambda t: t.nn.LayerNorm(48, elementwise_affine=False),
        lambda: nn.LayerNorm(48, elementwise_affine=False),
        (4, 7, 48),
    ),
    "rms": (lambda t: t.nn.RMSNorm(48), lambda: nn.RMSNorm(48), (4, 7, 48)),
    "rms, eps": (lambda t: t.nn.RMSNorm((7, 48), eps=1e-3), lambda: nn.RMSNorm((7, 48), eps=1e-3), (4, 7, 48)),
}


def randomized(torch: Any, module: Any) -> Any:
    """Give a torch layer random parameters and running statistics, in float64."""
    torch.manual_seed(0)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
        for name, buffer in module.named_buffers():
            if name != "num_batches_tracked":
                buffer.uniform_(0.5, 2.0)
    return module


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("through", ["torch", "numpy", "safetensors"])
def test_layer_with_torchs_state(torch: Any, kind: str, through: str) -> None:
    make_theirs, make_ours, shape = LAYERS[kind]
    theirs, ours = randomized(torch, make_theirs(torch)), make_ours()
    state = dict(theirs.state_dict())
    if through == "numpy":
        state = {name: value.numpy() for name, value in state.items()}
    elif through == "safetensors":
        safetensors = pytest.importorskip("safetensors.numpy")
        state = safetensors.load(safetensors.save({name: value.numpy() for name, value in state.items()}))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.load_state_dict(state) is ours
    rng = np.random.default_rng(3)
    for training in (True, True, False, True):
        ours.train(training)
        theirs.train(training)
        x = rng.standard_normal(shape) + 2.0
        y = ours(x)
        assert y.dtype == np.float64
        assert_close(y, theirs(torch.from_numpy(x)))
    back = ours.state_dict()
    assert list(back) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert back[name].shape == tuple(value.shape)
        if name == "num_batches_tracked" and kind == "instance, tracked":
            assert back[name] == 3  # torch never counts here; without a count there is no cumulative average
            continue
        assert_close(back[name], value)
    theirs.load_state_dict({name: torch.from_numpy(np.asarray(value)) for name, value in back.items()})


def test_float32_running_statistics_as_torch_keeps_them(torch: Any) -> None:
    theirs, ours = torch.nn.BatchNorm1d(5), nn.BatchNorm(5)
    rng = np.random.default_rng(0)
    for _ in range(20):
        x = (3.0 * rng.standard_normal((16, 5)) - 1.0).astype(np.float32)
        ours(x)
        theirs(torch.from_numpy(x))
    assert ours.running_mean.dtype == ours.running_var.dtype == np.float32
    assert ours.num_batches_tracked == int(theirs.num_batches_tracked) == 20
    np.testing.assert_allclose(ours.running_mean, theirs.running_mean.numpy(), 20 * RUNNING_FLOAT32)
    np.testing.assert_allclose(ours.running_var, theirs.running_var.numpy(), 20 * RUNNING_FLOAT32)


class TestTensors:
    """torch tensors in, torch tensors out."""

    def test_functions(self, torch: Any) -> None:
        x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
        weight, bias = torch.randn(2, 6, dtype=torch.float64)
        f = torch.nn.functional
        pairs = [
            (nn.group_norm(x, 3, weight, bias), f.group_norm(x, 3, weight, bias)),
            (nn.instance_norm(x), f.instance_norm(x)),
            (nn.batch_norm(x, training=True), f.batch_norm(x, None, None, training=True)),
            (nn.layer_norm(x, (5, 5)), f.layer_norm(x, (5, 5))),
            (nn.rms_norm(x, 5, eps=1e-6), f.rms_norm(x, (5,), eps=1e-6)),
        ]
        for ours, theirs in pairs:
            assert isinstance(ours, torch.Tensor)
            assert ours.dtype == torch.float64
            assert_close(ours.numpy(), theirs)

    def test_channels_last_stays_channels_last(self, torch: Any) -> None:
        x = torch.randn(4, 6, 5, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        y = nn.group_norm(x, 3)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_close(y.numpy(), torch.nn.functional.group_norm(x, 3))

    def test_running_statistics_are_updated_in_place(self, torch: Any) -> None:
        x = torch.randn(4, 6, 5, dtype=torch.float64)
        ours = torch.zeros(6), torch.ones(6)
        theirs = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
        nn.batch_norm(x, *ours, training=True)
        torch.nn.functional.batch_norm(x, *theirs, training=True)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a.numpy(), b.numpy(), RUNNING_FLOAT32)

    def test_statistics_and_sum_are_tensors(self, torch: Any) -> None:
        x, residual = torch.randn(2, 3, 8)
        y, mean, rstd, total = nn.layer_norm(x, 8, residual=residual, return_stats=True)
        assert all(isinstance(a, torch.Tensor) for a in (y, mean, rstd, total))
        torch.testing.assert_close(total, x + residual, rtol=0, atol=0)
        torch.testing.assert_close(y, torch.nn.functional.layer_norm(x + residual, (8,)))
        torch.testing.assert_close(mean[:, 0], (x + residual).double().mean(-1), rtol=1e-6, atol=1e-7)

    def test_out(self, torch: Any) -> None:
        x = torch.randn(3, 8)
        expected = torch.nn.functional.layer_norm(x, (8,))
        out = torch.full((3, 8), float("nan"))
        assert nn.layer_norm(x, 8, out=out) is out
        torch.testing.assert_close(out, expected)
        assert nn.layer_norm(x, 8, out=x) is x
        torch.testing.assert_close(x, expected)

    def test_mask(self, torch: Any) -> None:
        x = torch.randn(3, 8)
        mask = torch.arange(8) < 5
        y = nn.layer_norm(x, 8, mask=mask)
        torch.testing.assert_close(y[:, :5], torch.nn.functional.layer_norm(x[:, :5], (5,)))

    def test_layer(self, torch: Any) -> None:
        x = torch.randn(16, 6)
        ours, theirs = nn.BatchNorm(6), torch.nn.BatchNorm1d(6)
        y = ours(x)
        assert isinstance(y, torch.Tensor)
        torch.testing.assert_close(y, theirs(x))
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))

    def test_tensor_that_requires_grad(self, torch: Any) -> None:
        """Gradients cannot be tracked through NumPy: say so instead of dropping them."""
        with pytest.raises(TypeError, match=r"x: .*Tensor"):
            nn.layer_norm(torch.randn(3, 8, requires_grad=True), 8)
