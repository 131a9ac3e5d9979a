"""Gradients: against torch's autograd, finite differences and formulas in extended precision; wrong calls."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradients
import numba
import numpy as np
import pytest
import sharing
from gradients import error_of_sum
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ARRANGEMENTS, error, normal
from training_tolerances import FINITE_DIFFERENCES, GRADIENT_FLOAT32, GRADIENT_FLOAT64, SUM_FLOAT32, SUM_OF_EQUALS

import numbanorm as nn
from numbanorm.calls import host
from numbanorm.cpu import bound

every_arrangement = pytest.mark.parametrize("name", ARRANGEMENTS)
WEIGHT_DTYPES = ["float16", "bfloat16", "float32", "float64"]


def dtype_of(name: str) -> Any:
    """Return a dtype by its name, or skip where it needs ml_dtypes and that is not installed."""
    return pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else np.dtype(name)


# --- against torch's autograd, in float64 ---------------------------------------------------------------------------

MEMORY = ["C", "F", "turned", "sliced", "reversed"]


def in_memory(array: np.ndarray, how: str) -> np.ndarray:
    """Return an equal array that lies in memory in another way."""
    if how == "F":
        return np.asfortranarray(array)
    if how == "turned":  # the first axis fastest, the others in order: channels last becomes channels first and back
        order = [*range(1, array.ndim), 0] if array.ndim > 1 else [0]
        return np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))
    if how == "sliced":
        wide = np.full([2 * n for n in array.shape], np.nan, array.dtype)
        part = wide[(slice(1, None, 2),) * array.ndim]
        part[...] = array
        return part
    if how == "reversed":
        flip = (slice(None, None, -1),) * array.ndim
        return np.ascontiguousarray(array[flip])[flip]
    return np.ascontiguousarray(array)


class Problem:
    """A random call of a norm over channels or over axes, and its gradients by autograd of a plain masked formula."""

    def __init__(self, draw: Any, norm: str) -> None:
        self.norm = norm
        self.rng = rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        self.eps = draw(st.sampled_from([1e-5, 1e-3, 1.0]))
        shape = self.over_axes(draw) if norm in ("layer", "rms") else self.over_channels(draw)
        scale, mean = draw(st.sampled_from([1.0, 1e-2, 1e2])), draw(st.sampled_from([0.0, 1.0, -30.0]))
        self.x = in_memory(scale * (rng.standard_normal(shape) + mean), draw(st.sampled_from(MEMORY)))
        self.dy = in_memory(rng.standard_normal(shape), draw(st.sampled_from(MEMORY)))
        self.weight = rng.standard_normal(self.affine) if draw(st.booleans()) else None
        self.mask = None
        if norm != "rms" and draw(st.booleans()):
            cut = [1 if draw(st.integers(0, 3)) == 0 else n for n in shape]  # broadcast along some axes
            self.mask = in_memory(rng.random(cut) < draw(st.sampled_from([0.7, 0.2])), draw(st.sampled_from(MEMORY)))

    def over_channels(self, draw: Any) -> tuple[int, ...]:
        space = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
        if np.prod(space) < 8:
            space[0] = 8
        self.groups = draw(st.integers(1, 4))
        samples, channels = draw(st.integers(1, 5)), self.groups * draw(st.integers(1, 7))
        self.channel_axis = draw(st.sampled_from([1, -1]))
        self.affine: tuple[int, ...] = (channels,)
        return (samples, channels, *space) if self.channel_axis == 1 else (samples, *space, channels)

    def over_axes(self, draw: Any) -> tuple[int, ...]:
        shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
        self.axis = tuple(draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True)))
        if np.prod([shape[a] for a in self.axis]) < 8:
            shape[self.axis[0]] = 8
        self.affine = tuple(shape[a] for a in self.axis)
        return tuple(shape)

    def run(self) -> tuple[Any, ...]:
        """Call forward, then backward; return dx, dweight and, but for RMSNorm, dbias, and what dx is measured by."""
        own = {"mask": self.mask} if self.norm != "rms" else {}
        if self.norm in ("layer", "rms"):
            own["axis"] = self.axis
            head: tuple[Any, ...] = (self.affine,)
        else:
            own["channel_axis"] = self.channel_axis
            head = (self.groups,) if self.norm == "group" else ()
        into = {"weight": self.weight, "eps": self.eps, "return_stats": True, **own}
        if self.norm == "batch":
            into["training"] = True
        forward, back = getattr(nn, f"{self.norm}_norm"), getattr(nn, f"{self.norm}_norm_backward")
        _, *statistics = forward(self.x, *head, **into)
        return back(self.dy, self.x, *head, *statistics, self.weight, **own)

    def autograd(self, torch: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return dx, dweight and dbias of the definition."""
        shape = self.x.shape
        x, dy = (torch.from_numpy(np.ascontiguousarray(a)) for a in (self.x, self.dy))
        mask = torch.from_numpy(np.array(np.broadcast_to(True if self.mask is None else self.mask, shape)))
        weight = torch.ones(self.affine, dtype=x.dtype) if self.weight is None else torch.from_numpy(self.weight)
        bias = torch.zeros_like(weight)
        for leaf in (x, weight, bias):
            leaf.requires_grad_()
        if self.norm in ("layer", "rms"):
            # To (outer, normalized), the normalized axes in the order of `axis`.
            order = [a for a in range(len(shape)) if a not in self.axis] + list(self.axis)
            sizes = (-1, weight.numel())
            w, b = weight.reshape(1, -1), bias.reshape(1, -1)
            reduced: tuple[int, ...] = (1,)
        else:
            # To (samples, groups, channels of a group, space).
            order = list(range(len(shape)))
            order.insert(1, order.pop(self.channel_axis))
            parts = {"batch": 1, "instance": self.affine[0], "group": self.groups}[self.norm]
            sizes = (shape[0], parts, self.affine[0] // parts, -1)
            w, b = (p.reshape(1, parts, -1, 1) for p in (weight, bias))
            reduced = (0, 3) if self.norm == "batch" else (2, 3)
        view, d, counts = (a.permute(order).reshape(sizes) for a in (x, dy, mask))
        count = counts.sum(reduced, keepdim=True).clamp(min=1)
        zero = torch.zeros((), dtype=x.dtype)
        mean = zero if self.norm == "rms" else torch.where(counts, view, zero).sum(reduced, keepdim=True) / count
        variance = torch.where(counts, (view - mean) ** 2, zero).sum(reduced, keepdim=True) / count
        y = (view - mean) / torch.sqrt(variance + self.eps) * w + b
        y.backward(d)
        return x.grad.numpy(), weight.grad.numpy(), bias.grad.numpy()

    def __repr__(self) -> str:
        parts = {k: v.shape if isinstance(v, np.ndarray) else v for k, v in vars(self).items() if k != "rng"}
        return f"Problem({parts}, strides={self.x.strides}, {self.dy.strides})"


def check_close(ours: Any, theirs: Any, tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=False):  # RMSNorm has no dbias
        assert a.dtype == np.float64
        assert error(a, b) <= tolerance


@pytest.mark.torch
@pytest.mark.parametrize("norm", ["batch", "instance", "group", "layer", "rms"])
def test_functions_against_autograd(torch: Any, norm: str) -> None:
    """Random shapes, axes, groups, masks and orders of memory of x, dy and mask."""

    @given(data=st.data())
    @settings(max_examples=80, derandomize=True)
    def check(data: st.DataObject) -> None:
        problem = Problem(data.draw, norm)
        check_close(problem.run(), problem.autograd(torch), GRADIENT_FLOAT64)

    check()


def torch_function(torch: Any, norm: str, x: Any, weight: Any, bias: Any) -> Any:
    """Call torch's own function on channels of axis 1, or on the last axis."""
    f = torch.nn.functional
    return {
        "batch": lambda: f.batch_norm(x, None, None, weight, bias, training=True),
        "instance": lambda: f.instance_norm(x, None, None, weight, bias),
        "group": lambda: f.group_norm(x, 3, weight, bias),
        "layer": lambda: f.layer_norm(x, x.shape[-1:], weight, bias),
        "rms": lambda: f.rms_norm(x, x.shape[-1:], weight, 1e-5),
    }[norm]()


LAYERS: dict[str, Callable[[], nn.Norm]] = {
    "batch": lambda: nn.BatchNorm(6),
    "instance": lambda: nn.InstanceNorm(6, affine=True),
    "group": lambda: nn.GroupNorm(3, 6),
    "layer": lambda: nn.LayerNorm(11),
    "rms": lambda: nn.RMSNorm(11, eps=1e-5),
}
every_layer = pytest.mark.parametrize("norm", LAYERS)


def ready(norm: str, dtype: Any = np.float64) -> nn.Norm:
    """Return a layer with a random weight and bias."""
    layer = LAYERS[norm]()
    layer.weight = normal(1, layer.weight.shape, dtype)
    if layer.bias is not None:
        layer.bias = normal(2, layer.bias.shape, dtype)
    return layer


@pytest.mark.torch
@every_layer
def test_layers_against_torchs_functions(torch: Any, norm: str) -> None:
    layer = ready(norm)
    x, dy = normal(3, (5, 6, 11), np.float64) + 1.0, normal(4, (5, 6, 11), np.float64)
    leaves = [torch.from_numpy(a).requires_grad_() for a in (x.copy(), layer.weight, layer.bias) if a is not None]
    y = torch_function(torch, norm, *leaves, *[None] * (3 - len(leaves)))
    y.backward(torch.from_numpy(dy))
    layer(x)
    ours = [layer.backward(dy), *layer.grad.values()]
    assert list(layer.grad) == ["weight", "bias"][: len(leaves) - 1]
    check_close(ours, [leaf.grad.numpy() for leaf in leaves], GRADIENT_FLOAT64)


@pytest.mark.torch
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("with_dtotal", [False, True])
def test_residual_against_autograd(torch: Any, norm: str, with_dtotal: bool) -> None:
    """A block of a transformer: y, total = norm(x, residual), and both are used."""
    layer = ready(norm)
    x, residual, dy, dtotal = (normal(seed, (7, 11), np.float64) for seed in range(3, 7))
    a, b = (torch.from_numpy(array.copy()).requires_grad_() for array in (x, residual))
    total = a + b
    weight, bias = (None if p is None else torch.from_numpy(p) for p in (layer.weight, layer.bias))
    loss = (torch_function(torch, norm, total, weight, bias) * torch.from_numpy(dy)).sum()
    if with_dtotal:
        loss = loss + (total * torch.from_numpy(dtotal)).sum()
    loss.backward()
    layer(x, residual=residual)
    dx = layer.backward(dy, dtotal) if with_dtotal else layer.backward(dy)
    check_close([dx, dx], [a.grad.numpy(), b.grad.numpy()], GRADIENT_FLOAT64)


@pytest.mark.torch
def test_inference_against_autograd(torch: Any) -> None:
    """BatchNorm with running statistics, which do not depend on x."""
    x, dy = normal(0, (5, 6, 4, 3), np.float64), normal(1, (5, 6, 4, 3), np.float64)
    mean, var, weight, bias = (normal(seed, (6,), np.float64) for seed in range(2, 6))
    var = var**2 + 0.1
    leaves = [torch.from_numpy(a.copy()).requires_grad_() for a in (x, weight, bias)]
    running = torch.from_numpy(mean), torch.from_numpy(var)
    torch.nn.functional.batch_norm(leaves[0], *running, *leaves[1:], training=False).backward(torch.from_numpy(dy))
    _, *statistics = nn.batch_norm(x, mean, var, weight, bias, return_stats=True)
    ours = nn.batch_norm_backward(dy, x, *statistics, weight, training=False)
    check_close(ours, [leaf.grad.numpy() for leaf in leaves], GRADIENT_FLOAT64)
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1)), np.ascontiguousarray(np.moveaxis(dy, 1, -1))
    nothing = np.zeros(last[0].shape, bool)  # a mask has no say where nothing is averaged
    for mask in (None, nothing):
        dx, *sums = nn.batch_norm_backward(
            last[1], last[0], *statistics, weight, training=False, channel_axis=-1, mask=mask
        )
        check_close([np.moveaxis(dx, -1, 1), *sums], [leaf.grad.numpy() for leaf in leaves], GRADIENT_FLOAT64)


@pytest.mark.torch
class TestTensors:
    """torch tensors in, torch tensors out."""

    def test_functions(self, torch: Any) -> None:
        x, dy = torch.randn(2, 5, 6, 11)
        weight = torch.randn(11, dtype=torch.float64)
        _, mean, rstd = nn.layer_norm(x, 11, weight, return_stats=True)
        results = nn.layer_norm_backward(dy, x, 11, mean, rstd, weight)
        expected = nn.layer_norm_backward(dy.numpy(), x.numpy(), 11, mean.numpy(), rstd.numpy(), weight.numpy())
        for a, b, dtype in zip(results, expected, (torch.float32, torch.float64, torch.float64), strict=True):
            assert isinstance(a, torch.Tensor)
            assert a.dtype == dtype
            np.testing.assert_array_equal(a.numpy(), b)

    @every_layer
    def test_layers(self, torch: Any, norm: str) -> None:
        x, dy = torch.randn(2, 5, 6, 11)
        layer, other = ready(norm, np.float32), ready(norm, np.float32)
        layer(x)
        other(x.numpy())
        dx = layer.backward(dy)
        assert isinstance(dx, torch.Tensor)
        np.testing.assert_array_equal(dx.numpy(), other.backward(dy.numpy()))
        for name, gradient in layer.grad.items():
            assert isinstance(gradient, torch.Tensor)
            np.testing.assert_array_equal(gradient.numpy(), other.grad[name])

    @pytest.mark.parametrize("norm", ["layer", "rms"])
    def test_residual(self, torch: Any, norm: str) -> None:
        x, residual, dy, dtotal = torch.randn(4, 5, 11)
        layer = ready(norm, np.float32)
        layer(x, residual=residual)
        plain = layer.backward(dy)
        dx = layer.backward(dy, dtotal)
        assert isinstance(dx, torch.Tensor)
        torch.testing.assert_close(dx, plain + dtotal)

    def test_mask(self, torch: Any) -> None:
        x, dy = torch.randn(2, 5, 6, 11)
        mask = torch.rand(5, 1, 11) < 0.6
        layer, other = nn.BatchNorm(6), nn.BatchNorm(6)
        layer(x, mask=mask)
        other(x.numpy(), mask=mask.numpy())
        np.testing.assert_array_equal(layer.backward(dy).numpy(), other.backward(dy.numpy()))
        assert layer.num_batches_tracked == 1


# --- independent of torch -------------------------------------------------------------------------------------------


def numerical(loss: Callable[[], float], array: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Return the gradient of `loss` by central differences; `array` is changed in place and restored."""
    gradient = np.empty(array.shape)
    for index in np.ndindex(array.shape):
        kept = array[index]
        array[index] = kept + step
        above = loss()
        array[index] = kept - step
        below = loss()
        array[index] = kept
        gradient[index] = (above - below) / (2 * step)
    return gradient


@every_arrangement
@pytest.mark.parametrize("masked", [False, True])
def test_finite_differences(name: str, masked: bool) -> None:
    """The package, and the formulas that the tests below compare with, against the slopes of the forward functions."""
    how = ARRANGEMENTS[name]
    if masked and not how.centred:
        return
    groups = 6
    x = how.place(normal(0, (groups, 12), np.float64))
    dy = normal(1, x.shape, np.float64)
    weight, bias = (normal(seed, how.shape_of(x, groups), np.float64) for seed in (2, 3))
    parameters = dict(zip(how.affine, (weight, bias), strict=False))
    mask = np.random.default_rng(4).random(x.shape) < 0.7 if masked else None
    options: dict[str, Any] = parameters | ({} if mask is None else {"mask": mask})

    def loss() -> float:
        return float((how.call(x, groups, eps=1e-5, **options) * dy).sum())

    slopes = [numerical(loss, array) for array in (x, *parameters.values())]
    exact = gradients.expected(name, dy, x, groups, weight, mask)
    ours = gradients.gradients(name, dy, x, groups, weight, mask)
    for slope, formula, mine in zip(slopes, (exact.dx, exact.dweight, exact.dbias), ours, strict=False):
        assert error(slope, formula) <= FINITE_DIFFERENCES
        assert error(mine, formula) <= GRADIENT_FLOAT64


def check_float32(name: str, dy: np.ndarray, x: np.ndarray, groups: int, **options: Any) -> None:
    exact = gradients.expected(name, dy, x, groups, **options)
    dx, *sums = gradients.gradients(name, dy, x, groups, **options)
    assert dx.dtype == np.float32
    assert error(dx, exact.dx) <= GRADIENT_FLOAT32
    for ours, theirs, term in zip(sums, (exact.dweight, exact.dbias), exact.terms, strict=True):
        if ours is not None:
            assert error_of_sum(ours, theirs, term, exact.count) <= SUM_FLOAT32


@every_arrangement
@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize(("groups", "n"), [(6, 768), (48, 96), (6, 20000)])
def test_float32(name: str, mean: float, groups: int, n: int) -> None:
    """Data far from zero are as good as data around it."""
    how = ARRANGEMENTS[name]
    x = how.place((normal(0, (groups, n), np.float64) + mean).astype(np.float32))
    dy, weight = normal(1, x.shape), normal(2, how.shape_of(x, groups))
    check_float32(name, dy, x, groups, weight=weight)


@every_arrangement
@pytest.mark.parametrize("shape_of_mask", ["whole", "of samples", "of positions"])
def test_float32_with_masks(name: str, shape_of_mask: str) -> None:
    """Masks of every element, along samples alone and along the last axis alone; the first group counts nothing."""
    how = ARRANGEMENTS[name]
    if not how.centred:
        return
    groups = 6
    x = how.place(normal(0, (groups, 768)) + np.float32(3.0))
    some = np.random.default_rng(5).random(x.shape) < 0.6
    if shape_of_mask == "whole":
        rows = how.gather(some, groups).copy()
        rows[0] = False
        mask = how.place(rows)
    else:
        mask = some[(slice(None), *[slice(1)] * (x.ndim - 1))] if shape_of_mask == "of samples" else some[:1, ..., :]
        mask = mask if shape_of_mask == "of samples" else mask[..., :1, :]
    check_float32(name, normal(1, x.shape), x, groups, weight=normal(2, how.shape_of(x, groups)), mask=mask)


@every_arrangement
def test_nothing_counts(name: str) -> None:
    """Mean 0 and variance 0 do not depend on x: what is left is a scale."""
    how = ARRANGEMENTS[name]
    if not how.centred:
        return
    x = how.place(normal(0, (6, 96)))
    dy, weight = normal(1, x.shape), normal(2, how.shape_of(x, 6))
    dx, dweight, dbias = gradients.gradients(name, dy, x, 6, weight, np.zeros(x.shape, bool), eps=0.25)
    along = [1] * x.ndim
    along[gradients.weight_axis(name)] = -1
    np.testing.assert_allclose(dx, 2.0 * dy * weight.reshape(along), 1e-6)
    exact = gradients.expected(name, dy, x, 6, weight, np.zeros(x.shape, bool), 0.25)
    for ours, theirs, term in zip((dweight, dbias), (exact.dweight, exact.dbias), exact.terms, strict=True):
        assert error_of_sum(ours, theirs, term, exact.count) <= SUM_FLOAT32


LONG_SUMS = {
    "rows": ("layer-last", (2000, 16384)),  # 4 slabs of 500 samples
    "long rows": ("layer-last", (1000, 16400)),  # lanes of all samples
    "columns": ("batch-last", (128, 60000)),  # rows stream past, 960 a chunk
    "columns, weights along rows": ("layer-channel", (6000, 128)),
    "runs": ("batch-first", (4, 400_000)),
}


@pytest.mark.parametrize("path", LONG_SUMS)
def test_sums_of_many_equal_terms(path: str) -> None:
    """Equal terms round the same way each time: they must not be added in float32 for long."""
    name, (groups, n) = LONG_SUMS[path]
    how = ARRANGEMENTS[name]
    shape = how.place(np.broadcast_to(np.uint8(0), (groups, n))).shape
    dy = np.broadcast_to(np.float32(0.1), shape)
    row = normal(0, shape[-1:])
    x = np.broadcast_to(row, shape) if path in ("rows", "long rows") else normal(0, shape)
    _, mean, rstd = gradients.forward(name, x, groups)
    _, dweight, dbias = gradients.backward(name, dy, x, groups, mean, rstd)
    count = dy.size // len(dbias)
    assert error(dbias, np.full(len(dbias), np.float64(dy.flat[0]) * count)) <= SUM_OF_EQUALS
    if path in ("rows", "long rows"):
        terms = np.float64(dy.flat[0]) * (row.astype(np.float64) - mean.flat[0]) * rstd.flat[0]
        assert error(dweight, terms * count) <= SUM_OF_EQUALS


# --- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batch-first", "batch-last", "layer-last", "layer-channel"])
@pytest.mark.parametrize("x_dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
def test_gradients_have_the_weights_dtype(name: str, x_dtype: Any, weight_dtype: str) -> None:
    how = ARRANGEMENTS[name]
    x = how.place(normal(0, (6, 96), x_dtype))
    dy = normal(1, x.shape, x_dtype)
    weight = normal(2, how.shape_of(x, 6)).astype(dtype_of(weight_dtype))
    plain = gradients.gradients(name, dy, x, 6, weight.astype(np.float64))
    dx, *sums = gradients.gradients(name, dy, x, 6, weight)
    assert dx.dtype == x_dtype
    np.testing.assert_array_equal(dx, plain[0])
    for ours, wide in zip(sums, plain[1:], strict=True):
        assert ours.dtype == weight.dtype
        np.testing.assert_array_equal(ours.astype(np.float64), wide.astype(weight.dtype).astype(np.float64))


@pytest.mark.parametrize("name", ["batch-first", "group-last", "layer-last", "layer-channel", "rms-last"])
@pytest.mark.parametrize(("x_dtype", "wide"), [(np.uint8, np.float32), (np.int32, np.float64), (bool, np.float32)])
def test_integer_inputs(name: str, x_dtype: Any, wide: Any) -> None:
    """Integers give the gradients of their float copy."""
    how = ARRANGEMENTS[name]
    x = how.place(np.random.default_rng(0).integers(0, 2 if x_dtype is bool else 120, (6, 96)).astype(x_dtype))
    dy, weight = normal(1, x.shape, wide), normal(2, how.shape_of(x, 6))
    ours = gradients.gradients(name, dy, x, 6, weight)
    theirs = gradients.gradients(name, dy, x.astype(wide), 6, weight)
    assert ours[0].dtype == wide
    for a, b in zip(ours, theirs, strict=True):
        if a is not None:
            assert a.dtype == b.dtype
            assert error(a, b) <= (GRADIENT_FLOAT32 if wide is np.float32 else GRADIENT_FLOAT64)
    assert gradients.gradients(name, dy, x, 6)[1].dtype == wide  # no weight: the lane dtype


def test_dy_of_another_dtype_is_converted() -> None:
    x, dy = normal(0, (5, 96)), normal(1, (5, 96), np.float64)
    for ours, theirs in zip(
        gradients.gradients("layer-last", dy, x, 5),
        gradients.gradients("layer-last", dy.astype(np.float32), x, 5),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_gradients_lie_as_the_input_lies() -> None:
    x = normal(0, (4, 5, 9, 6)).transpose(0, 3, 1, 2)
    _, mean, rstd = nn.group_norm(x, 3, return_stats=True)
    dx, _, _ = nn.group_norm_backward(normal(1, x.shape), x, 3, mean, rstd)
    assert dx.strides == x.strides


# --- empty arrays, NaN, threads -------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("shape", [(0, 6, 11), (5, 6, 0)])
def test_empty(norm: str, shape: tuple[int, ...]) -> None:
    if norm in ("layer", "rms") and shape[-1] == 0:
        x = np.empty((5, 0), np.float32)
        if norm == "layer":
            dx, *sums = nn.layer_norm_backward(x, x, 0, np.zeros((5, 1)), np.ones((5, 1)))
        else:
            dx, *sums = nn.rms_norm_backward(x, x, 0, np.ones((5, 1)))
        assert dx.shape == (5, 0)
        assert all(a.shape == (0,) for a in sums)
        return
    layer = ready(norm, np.float32)
    x = np.empty(shape, np.float32)
    layer(x)
    dx = layer.backward(x)
    assert dx.shape == shape
    assert dx.dtype == np.float32
    for name, gradient in layer.grad.items():
        assert gradient.shape == getattr(layer, name).shape
        assert not gradient.any()


@every_arrangement
def test_nan_stays_in_its_group(name: str) -> None:
    """The other groups' dx does not change by a bit, nor do the gradients of weights that the group does not use."""
    how = ARRANGEMENTS[name]
    clean = normal(0, (6, 96))
    spoilt = clean.copy()
    spoilt[2, 5] = np.nan
    shape = how.place(clean).shape
    dy, weight = normal(1, shape), normal(2, how.shape_of(how.place(clean), 6))
    results = [gradients.gradients(name, dy, how.place(values), 6, weight) for values in (clean, spoilt)]
    before, after = (how.gather(result[0], 6) for result in results)
    assert np.isnan(after[2]).all()
    np.testing.assert_array_equal(np.delete(after, 2, 0), np.delete(before, 2, 0))
    axis = gradients.weight_axis(name)
    touched = np.isnan(how.place(np.where(np.arange(6)[:, None] == 2, np.nan, clean)))
    touched = touched.any(tuple(a for a in range(touched.ndim) if a != axis % touched.ndim))
    assert np.isfinite(results[1][1][~touched]).all()
    np.testing.assert_array_equal(results[1][1][~touched], results[0][1][~touched])


PATHS: dict[str, tuple[str, tuple[int, int], set[str]]] = {
    "rows, slabs": ("layer-last", (512, 512), {"along_backward.backward"}),
    "rows, long": (
        "layer-last",
        (9, 20000),
        {"rows_backward.chunk_sums", "rows_backward.merge_sums", "rows_backward.emit_lanes"},
    ),
    "rows, one channel": (
        "batch-first",
        (1, 160000),
        {"rows_backward.chunk_sums", "rows_backward.merge_sums", "rows_backward.emit"},
    ),
    "rows, channels": ("group-first", (24, 8000), {"rows_backward.backward"}),
    "columns, by row": ("layer-channel", (3000, 64), {"columns_backward.backward"}),
    "columns, split": ("batch-last", (12, 16000), {"columns_backward.chunk_sums", "columns_backward.emit"}),
    "columns, tiles": ("batch-last", (1100, 160), {"columns_backward.backward"}),
    "columns, samples": ("instance-last", (12, 16000), {"columns_backward.backward"}),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_same_bits_on_any_number_of_threads(path: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way through the backend, and again: what a call returns does not depend on threads or on luck."""
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("needs 2 threads")
    name, (groups, n), kernels = PATHS[path]
    if masked:
        kernels = {kernel.replace("along_", "rows_") for kernel in kernels}
    how = ARRANGEMENTS[name]
    x = how.place(normal(0, (groups, n)))
    sharing.always(monkeypatch, x.size)
    host.forget()
    dy, weight = normal(1, x.shape), normal(2, how.shape_of(x, groups))
    options = {"mask": np.random.default_rng(3).random(x.shape) < 0.5} if masked else {}
    _, mean, rstd = gradients.forward(name, x, groups, **options)

    def run() -> Any:
        return gradients.backward(name, dy, x, groups, mean, rstd, weight, **options)

    serial = run()
    used: list[tuple[str, int]] = []
    original = bound.Bound.on

    def traced(self: bound.Bound, threads: int, *arguments: Any) -> Any:
        used.append((self.name, threads))
        return original(self, threads, *arguments)

    monkeypatch.setattr(bound.Bound, "on", traced)
    host.forget()
    nn.set_num_threads(2)
    for _ in range(3):
        for a, b in zip(run(), serial, strict=True):
            np.testing.assert_array_equal(a, b)
    assert {kernel for kernel, _ in used if "backward" in kernel} == kernels - {"rows_backward.merge_sums"}
    assert {threads for _, threads in used} == {2}
    host.forget()


IN_ANOTHER_PROCESS = """
import hashlib, sys
import numpy as np
import numbanorm as nn

rng = np.random.default_rng(0)
x, dy = rng.standard_normal((2, 512, 512), dtype=np.float32)
weight = rng.standard_normal(512, dtype=np.float32)
for threads in map(int, sys.argv[1]):
    nn.set_num_threads(threads)
    digest = hashlib.sha256()
    for shape, axis in [((512, 512), -1), ((8, 64, 512), 1)]:
        of_shape = [a.reshape(shape) for a in (x, dy)]
        n = shape[axis]
        y, mean, rstd = nn.layer_norm(of_shape[0], n, axis=axis, return_stats=True)
        results = nn.layer_norm_backward(*of_shape[::-1], n, mean, rstd, weight[:n], axis=axis)
        for array in (y, mean, rstd, *results):
            digest.update(array.tobytes())
    print(digest.hexdigest())
"""


@pytest.mark.slow
def test_same_bits_compiled_and_from_the_cache(tmp_path: Path) -> None:
    """A first process compiles the kernels; a second one loads them and compiles their twins for threads."""
    threads = "12" if numba.config.NUMBA_NUM_THREADS > 1 else "1"
    bits = []
    for which in ("1", threads):
        command = [sys.executable, "-c", IN_ANOTHER_PROCESS, which]
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True)
        bits += done.stdout.split()
    assert len(bits) == 1 + len(threads)
    assert len(set(bits)) == 1, bits


# --- the layers' backward -------------------------------------------------------------------------------------------


@every_layer
def test_the_input_is_held_without_a_copy(norm: str) -> None:
    layer = ready(norm)
    x = normal(3, (5, 6, 11))
    layer(x)
    assert layer._last is not None
    assert layer._remembered().x is x


@every_layer
def test_backward_uses_the_last_training_call(norm: str) -> None:
    layer = ready(norm, np.float32)
    first, second, dy = (normal(seed, (5, 6, 11)) for seed in (3, 4, 5))
    layer(first)
    layer(second)
    expected = layer.backward(dy)
    grad = layer.grad
    layer.eval()(first)
    layer(normal(6, (5, 6, 11)))
    np.testing.assert_array_equal(layer.backward(dy), expected)
    for name, gradient in layer.grad.items():
        np.testing.assert_array_equal(gradient, grad[name])
    layer.train()(first)
    assert np.abs(layer.backward(dy) - expected).max() > 0.01


@every_layer
def test_layer_without_weights(norm: str) -> None:
    plain = {
        "batch": nn.BatchNorm(6, affine=False),
        "instance": nn.InstanceNorm(6),
        "group": nn.GroupNorm(3, 6, affine=False),
        "layer": nn.LayerNorm(11, elementwise_affine=False),
        "rms": nn.RMSNorm(11, eps=1e-5, elementwise_affine=False),
    }[norm]
    x, dy = normal(3, (5, 6, 11)), normal(4, (5, 6, 11))
    ones = LAYERS[norm]()
    plain(x)
    ones(x)
    np.testing.assert_array_equal(plain.backward(dy), ones.backward(dy))
    assert plain.grad == {}
    assert ones.grad["weight"].shape == ones.weight.shape


def test_a_weight_alone() -> None:
    layer = nn.LayerNorm(11, bias=False)
    layer(normal(3, (5, 11)))
    layer.backward(normal(4, (5, 11)))
    assert list(layer.grad) == ["weight"]


def test_gradients_of_state_that_was_assigned() -> None:
    layer = nn.LayerNorm(11)
    layer.load_state_dict({"weight": np.ones(11, np.float64), "bias": np.zeros(11, np.float64)})
    layer(normal(3, (5, 11)))
    layer.backward(normal(4, (5, 11)))
    assert layer.grad["weight"].dtype == layer.grad["bias"].dtype == np.float64


def test_masked_layer() -> None:
    """The layer holds the mask too."""
    layer = ready("batch", np.float32)
    x, dy = normal(3, (5, 6, 11)), normal(4, (5, 6, 11))
    mask = np.random.default_rng(0).random((5, 1, 11)) < 0.5
    layer(x, mask=mask)
    _, mean, rstd = nn.batch_norm(x, training=True, mask=mask, return_stats=True)
    expected = nn.batch_norm_backward(dy, x, mean, rstd, layer.weight, mask=mask)
    np.testing.assert_array_equal(layer.backward(dy), expected[0])
    np.testing.assert_array_equal(layer.grad["weight"], expected[1])


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("other", ["float16", "float32", "float64"])
def test_dx_keeps_its_dtype_whatever_that_of_dtotal(dtype: str, other: str) -> None:
    layer = nn.LayerNorm(11)
    x, dy = (normal(seed, (5, 11)).astype(dtype_of(dtype)) for seed in (3, 4))
    layer(x, residual=x)
    plain = layer.backward(dy).astype(np.float64)
    dx = layer.backward(dy, np.full((5, 11), 2.0, other))
    assert dx.dtype == x.dtype
    roundings = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(dtype, 1e-6)
    np.testing.assert_allclose(dx.astype(np.float64), plain + 2.0, roundings)


# --- wrong calls ----------------------------------------------------------------------------------------------------

X, DY = normal(0, (4, 6, 8)), normal(1, (4, 6, 8))
OF_CHANNELS, OF_ROWS, OF_GROUPS, OF_SAMPLES = np.ones(6), np.ones((4, 6, 1)), np.ones((4, 3)), np.ones((4, 6))

WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "dy, shape": (
        lambda: nn.batch_norm_backward(DY[:3], X, OF_CHANNELS, OF_CHANNELS),
        ValueError,
        r"dy: expected .*\(4, 6, 8\), got \(3, 6, 8\)",
    ),
    "dy, integers": (
        lambda: nn.layer_norm_backward(DY.astype(int), X, 8, OF_ROWS, OF_ROWS),
        TypeError,
        "dy: expected a float dtype, got int64",
    ),
    "dy, complex": (
        lambda: nn.layer_norm_backward(DY.astype(complex), X, 8, OF_ROWS, OF_ROWS),
        TypeError,
        "dy: expected .*complex128",
    ),
    "dy, missing": (lambda: nn.layer_norm_backward(None, X, 8, OF_ROWS, OF_ROWS), TypeError, "dy: expected"),
    "x, strings": (
        lambda: nn.rms_norm_backward(DY, np.full(X.shape, "a"), 8, OF_ROWS),
        TypeError,
        "x: expected .*got <U1",
    ),
    "mean, shape": (
        lambda: nn.batch_norm_backward(DY, X, np.ones(5), OF_CHANNELS),
        ValueError,
        r"mean: expected shape \(6,\), got \(5,\)",
    ),
    "mean, of another norm": (
        lambda: nn.instance_norm_backward(DY, X, OF_CHANNELS, OF_SAMPLES),
        ValueError,
        r"mean: expected shape \(4, 6\), got \(6,\)",
    ),
    "mean, integers": (
        lambda: nn.batch_norm_backward(DY, X, np.ones(6, int), OF_CHANNELS),
        TypeError,
        "mean: expected a float dtype, got int64",
    ),
    "mean, missing": (lambda: nn.batch_norm_backward(DY, X, None, OF_CHANNELS), (TypeError, ValueError), "mean: "),
    "rstd, shape": (
        lambda: nn.layer_norm_backward(DY, X, 8, OF_ROWS, OF_ROWS[..., 0]),
        ValueError,
        r"rstd: expected shape \(4, 6, 1\), got \(4, 6\)",
    ),
    "rstd, of rms": (
        lambda: nn.rms_norm_backward(DY, X, 8, OF_CHANNELS),
        ValueError,
        r"rstd: expected shape \(4, 6, 1\), got \(6,\)",
    ),
    "rstd, missing": (lambda: nn.rms_norm_backward(DY, X, 8, None), (TypeError, ValueError), "rstd: "),
    "num_groups, no divisor": (
        lambda: nn.group_norm_backward(DY, X, 4, OF_GROUPS, OF_GROUPS),
        ValueError,
        "num_groups: expected a divisor of the 6 channels, got 4",
    ),
    "num_groups, others than before": (
        lambda: nn.group_norm_backward(DY, X, 2, OF_GROUPS, OF_GROUPS),
        ValueError,
        r"expected shape \(4, 2\), got \(4, 3\)",
    ),
    "num_groups, a float": (
        lambda: nn.group_norm_backward(DY, X, 3.0, OF_GROUPS, OF_GROUPS),
        TypeError,
        "num_groups: expected an integer, got float",
    ),
    "normalized_shape": (
        lambda: nn.layer_norm_backward(DY, X, 7, OF_ROWS, OF_ROWS),
        ValueError,
        r"x: expected lengths \(7,\)",
    ),
    "axis": (lambda: nn.layer_norm_backward(DY, X, 8, OF_ROWS, OF_ROWS, axis=3), ValueError, "axis: expected"),
    "channel_axis": (
        lambda: nn.batch_norm_backward(DY, X, OF_CHANNELS, OF_CHANNELS, channel_axis=3),
        ValueError,
        "channel_axis: expected",
    ),
    "weight, shape": (
        lambda: nn.batch_norm_backward(DY, X, OF_CHANNELS, OF_CHANNELS, np.ones(5)),
        ValueError,
        r"weight: expected shape \(6,\), got \(5,\)",
    ),
    "weight, integers": (
        lambda: nn.batch_norm_backward(DY, X, OF_CHANNELS, OF_CHANNELS, np.ones(6, int)),
        TypeError,
        "weight: expected a float dtype, got int64",
    ),
    "mask, integers": (
        lambda: nn.batch_norm_backward(DY, X, OF_CHANNELS, OF_CHANNELS, mask=np.ones(X.shape, int)),
        TypeError,
        "mask: expected dtype bool",
    ),
    "mask, shape": (
        lambda: nn.batch_norm_backward(DY, X, OF_CHANNELS, OF_CHANNELS, mask=np.ones((4, 5, 8), bool)),
        ValueError,
        "mask: expected a shape that broadcasts",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_calls(what: str) -> None:
    call, kind, message = WRONG[what]
    with pytest.raises(kind, match=message):
        call()


@every_layer
class TestWrongCallsOfLayers:
    def test_no_call_before(self, norm: str) -> None:
        layer = ready(norm)
        with pytest.raises(ValueError, match="backward: expected a call in training mode before, got none"):
            layer.backward(np.ones((5, 6, 11)))
        layer.eval()(np.ones((5, 6, 11)))
        with pytest.raises(ValueError, match="backward: expected a call in training mode before, got none"):
            layer.backward(np.ones((5, 6, 11)))
        assert layer.grad == {}

    def test_failed_calls_are_no_calls(self, norm: str) -> None:
        """Neither does a failed call in training mode count, nor make the one before forgotten."""
        layer = ready(norm)
        with pytest.raises(ValueError, match=r"(x|num_groups): expected"):
            layer(np.ones((5, 7, 12)))
        with pytest.raises(ValueError, match="backward: expected a call"):
            layer.backward(np.ones((5, 7, 12)))
        x, dy = normal(3, (5, 6, 11)), normal(4, (5, 6, 11))
        layer(x)
        expected = layer.backward(dy)
        with pytest.raises(ValueError, match=r"(x|num_groups): expected"):
            layer(np.ones((5, 7, 12)))
        np.testing.assert_array_equal(layer.backward(dy), expected)

    def test_input_overwritten(self, norm: str) -> None:
        layer = ready(norm)
        x = normal(3, (5, 6, 11))
        layer(x, out=x)
        with pytest.raises(ValueError, match=r"backward: .*out= has overwritten"):
            layer.backward(x)
        layer(x, out=np.empty_like(x))
        assert layer.backward(x).shape == x.shape

    def test_grad_is_kept(self, norm: str) -> None:
        layer = ready(norm)
        x, dy = normal(3, (5, 6, 11)), normal(4, (5, 6, 11))
        layer(x)
        layer.backward(dy)
        before = layer.grad
        copies = {name: gradient.copy() for name, gradient in before.items()}
        for wrong in (dy[:4], dy[0], dy.astype(int), None, "dy"):
            with pytest.raises((ValueError, TypeError), match="dy: expected"):
                layer.backward(wrong)
            assert layer.grad is before
        with pytest.raises(ValueError, match="dtotal: expected"):
            layer.backward(2 * dy, dy[:4])
        for name, gradient in layer.grad.items():
            np.testing.assert_array_equal(gradient, copies[name])


def test_dtotal_without_residual() -> None:
    layer = nn.LayerNorm(11)
    layer(normal(3, (5, 11)))
    with pytest.raises((ValueError, TypeError), match="dtotal: expected None"):
        layer.backward(normal(4, (5, 11)), normal(5, (5, 11)))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_dtotal_that_does_not_fit(norm: str) -> None:
    layer = ready(norm)
    x, dy = normal(3, (5, 11)), normal(4, (5, 11))
    layer(x, residual=x)
    layer.backward(dy)
    before = layer.grad
    for wrong in (dy[:4], dy[0], dy.astype(int), dy.astype(complex)):
        with pytest.raises((ValueError, TypeError), match="dtotal: expected"):
            layer.backward(2 * dy, wrong)
        assert layer.grad is before


def test_input_overwritten_through_the_sum() -> None:
    """With a residual the sum is what is held: out= may then be x."""
    layer = nn.LayerNorm(11)
    x, residual, dy = (normal(seed, (5, 11)) for seed in (3, 4, 5))
    layer(x.copy(), residual=residual)
    expected = layer.backward(dy)
    layer(x, residual=residual, out=x)
    np.testing.assert_array_equal(layer.backward(dy), expected)


@pytest.mark.parametrize(("norm", "shape"), [("instance", (8, 4, 64, 64)), ("batch", (2, 1, 256, 400))])
def test_infinite_gradients_tell_no_warning(norm: str, shape: tuple[int, ...], threads: int) -> None:
    """The sums of Inf in one slab of samples and -Inf in another are NaN; NumPy would warn of it."""
    x, dy = normal(0, shape), np.zeros(shape, np.float32)
    dy[0, 0, 0, 0], dy[-1, 0, 0, 0] = np.inf, -np.inf
    more = {"training": True} if norm == "batch" else {}
    _, mean, rstd = getattr(nn, f"{norm}_norm")(x, **more, return_stats=True)
    back = getattr(nn, f"{norm}_norm_backward")
    _, _, dbias = back(dy, x, mean, rstd, np.zeros(shape[1], np.float32))
    assert np.isnan(dbias[0])
    assert not dbias[1:].any()
    dy[-1, 0, 0, 0] = np.inf
    _, _, dbias = back(dy, x, mean, rstd, np.zeros(shape[1], np.float32))
    assert dbias[0] == np.inf
