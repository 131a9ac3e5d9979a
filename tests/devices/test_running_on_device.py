"""Running statistics and layers on a device agree with those in host memory, call by call."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from reference import normal
from same import assert_close, assert_same
from standin import LAUNCHES, DeviceNDArray, Foreign, host

import numbanorm as nn

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def batch(seed: int) -> np.ndarray:
    return (2 * normal(seed, (5, 6, 7)) + seed).astype(np.float32)


def assert_near(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == theirs.dtype
    epsilon = 2.0**-8 if theirs.dtype == ml_dtypes.bfloat16 else np.finfo(theirs.dtype).eps
    np.testing.assert_allclose(ours.astype(np.float64), theirs.astype(np.float64), rtol=float(epsilon), atol=1e-15)


@pytest.mark.parametrize("function", [nn.batch_norm, nn.instance_norm])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
def test_functions_update_in_place(function: Any, dtype: Any, last: bool) -> None:
    mean, var = np.zeros(6, dtype), np.ones(6, dtype)
    ours = Foreign(np.repeat(mean, 3)[::3]), Foreign(var)  # one of them with gaps
    for seed in range(3):
        x = batch(seed)
        axis = {"channel_axis": -1} if last else {}
        x = np.ascontiguousarray(x.transpose(0, 2, 1)) if last else x
        mask = normal(seed + 10, x.shape) > 0
        mask[:, 2] = mask[:, :, 2] = False  # a channel in which nothing counts, whichever axis is theirs
        y = function(x, mean, var, None, None, True, 0.3, mask=mask, **axis)
        assert_same(host(function(Foreign(x), *ours, None, None, True, 0.3, mask=Foreign(mask), **axis)), y)
        for a, b in zip(ours, (mean, var), strict=True):
            assert_near(host(a), b)
    assert (host(ours[0])[2], host(ours[1])[2]) == (0, 1)


@pytest.mark.parametrize("function", [nn.batch_norm, nn.instance_norm])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inference(function: Any, dtype: Any) -> None:
    x, mean, var = batch(1), normal(2, (6,)).astype(dtype), (normal(3, (6,)) ** 2).astype(dtype)
    own = (None, None, False)
    theirs = function(x, mean, var, *own, return_stats=True)
    ours = host(function(Foreign(x), Foreign(mean), Foreign(np.repeat(var, 2)[::2]), *own, return_stats=True))
    assert_close(ours, theirs)
    with np.errstate(divide="ignore"):
        theirs = function(x, mean, var * 0, *own, eps=0.0, return_stats=True)
    ours = host(function(Foreign(x), Foreign(mean), Foreign(var * 0), *own, eps=0.0, return_stats=True))
    np.testing.assert_array_equal(ours[2], theirs[2])  # infinite


def test_many_samples() -> None:
    x = normal(0, (200, 2, 3)).astype(np.float32)
    mean, var = np.zeros(2), np.ones(2)
    ours = Foreign(mean), Foreign(var)
    nn.instance_norm(Foreign(x), *ours)
    nn.instance_norm(x, mean, var)
    for a, b in zip(ours, (mean, var), strict=True):
        np.testing.assert_allclose(host(a), b, rtol=1e-14)


# --- layers -----------------------------------------------------------------------------------------------------------

LAYERS = {
    "batch": lambda: nn.BatchNorm(6),
    "batch, cumulative": lambda: nn.BatchNorm(6, momentum=None),
    "batch, plain": lambda: nn.BatchNorm(6, affine=False, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm(6, affine=True),
    "instance, tracked": lambda: nn.InstanceNorm(6, momentum=None, track_running_stats=True),
    "group": lambda: nn.GroupNorm(2, 6),
    "layer": lambda: nn.LayerNorm(7),
    "layer, two axes": lambda: nn.LayerNorm((6, 7), bias=False),
    "rms": lambda: nn.RMSNorm(7),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
TRACKING = [name for name in LAYERS if name in ("batch", "batch, cumulative", "instance, tracked")]


def state(layer: nn.Norm) -> dict[str, Any]:
    return layer.state_dict()


def assert_state(ours: nn.Norm, theirs: nn.Norm) -> None:
    a, b = state(ours), state(theirs)
    assert list(a) == list(b)
    for name in a:
        assert type(a[name]) is np.ndarray
        assert a[name].shape == b[name].shape
        np.testing.assert_allclose(a[name], b[name], rtol=2e-7, atol=1e-12)


def pair(name: str) -> tuple[nn.Norm, nn.Norm]:
    theirs, ours = LAYERS[name](), LAYERS[name]()
    for layer in (theirs, ours):
        for n in ("weight", "bias"):
            if getattr(layer, n) is not None:
                setattr(layer, n, normal(len(n), getattr(layer, n).shape).astype(np.float32))
    assert ours.to("cuda") is ours
    assert ours.device == "cuda:0"
    return ours, theirs


@every_layer
def test_training_and_inference(name: str) -> None:
    ours, theirs = pair(name)
    for seed in range(3):
        x, dy = batch(seed), batch(seed + 5)
        assert_same(host(ours(Foreign(x))), theirs(x))
        assert_close((host(ours.backward(Foreign(dy))),), (theirs.backward(dy),))
        assert list(ours.grad) == list(theirs.grad)
        assert_close([host(g) for g in ours.grad.values()], list(theirs.grad.values()))
        assert_state(ours, theirs)
    x = batch(9)
    assert_close((host(ours.eval()(Foreign(x))),), (theirs.eval()(x),))
    assert_state(ours, theirs)


@every_layer
def test_out(name: str) -> None:
    ours, theirs = pair(name)
    x = batch(0)
    out = Foreign(np.zeros_like(x))
    assert ours(Foreign(x), out=out) is out
    assert_same(host(out), theirs(x))
    assert ours.backward(Foreign(x)).shape == x.shape
    own = Foreign(x)
    assert ours(own, out=own) is own
    with pytest.raises(ValueError, match=r"backward: .*out= has overwritten it"):
        ours.backward(Foreign(x))


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "rms"])
def test_masks(name: str) -> None:
    ours, theirs = pair(name)
    x, mask = batch(0), normal(3, (5, 6, 7)) > 0
    assert_same(host(ours(Foreign(x), mask=Foreign(mask))), theirs(x, mask=mask))
    assert_close((host(ours.backward(Foreign(x))),), (theirs.backward(x),))
    assert_state(ours, theirs)
    nothing = np.zeros(x.shape, bool)
    ours(Foreign(x), mask=Foreign(nothing))
    theirs(x, mask=nothing)
    assert_state(ours, theirs)


def test_rms_norm_takes_no_mask() -> None:
    ours, _ = pair("rms")
    with pytest.raises(TypeError, match="mask: expected None, RMSNorm takes none"):
        ours(Foreign(batch(0)), mask=Foreign(batch(0) > 0))


@pytest.mark.parametrize("name", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_residual(name: str, dtype: Any) -> None:
    ours, theirs = pair(name)
    x, residual, dy, dtotal = batch(0), batch(1), batch(2), batch(3).astype(dtype)
    assert_same(host(ours(Foreign(x), residual=Foreign(residual))), theirs(x, residual=residual))
    assert_close((host(ours.backward(Foreign(dy), Foreign(dtotal))),), (theirs.backward(dy, dtotal),))
    with pytest.raises(ValueError, match="dtotal: expected the shape of x"):
        ours.backward(Foreign(dy), Foreign(dtotal[:1]))
    with pytest.raises(TypeError, match="dtotal: expected a float dtype, got int64"):
        ours.backward(Foreign(dy), Foreign(dtotal.astype(int)))
    with pytest.raises(TypeError, match="dtotal: expected a CUDA array"):
        ours.backward(Foreign(dy), dtotal)
    ours(Foreign(x))
    with pytest.raises(ValueError, match="dtotal: expected None"):
        ours.backward(Foreign(dy), Foreign(dtotal))


@pytest.mark.parametrize("name", TRACKING)
def test_empty_arrays_are_no_batches(name: str) -> None:
    ours, theirs = pair(name)
    for layer, put in ((ours, Foreign), (theirs, lambda a: a)):
        layer(put(batch(0)))
        layer(put(np.zeros((0, 6, 7), np.float32)))
    assert ours.num_batches_tracked == 1
    assert_state(ours, theirs)


@pytest.mark.parametrize("name", TRACKING)
def test_failed_calls_change_nothing(name: str) -> None:
    ours, _ = pair(name)
    ours(Foreign(batch(0)))
    before = state(ours)
    LAUNCHES.clear()
    wrong: list[dict[str, Any]] = [
        {"x": Foreign(batch(1)[:, :5])},
        {"x": Foreign(batch(1)[:1, :, :1])},
        {"x": Foreign(batch(1)), "mask": Foreign(np.ones((5, 6, 7), int))},
        {"x": Foreign(batch(1)), "out": Foreign(np.ones((5, 6, 7)))},
    ]
    for arguments in wrong:
        with pytest.raises((ValueError, TypeError), match=r"(x|mask|out): expected"):
            ours(**arguments)
    assert not LAUNCHES
    for n, value in state(ours).items():
        np.testing.assert_array_equal(value, before[n])


@every_layer
def test_there_and_back(name: str) -> None:
    ours, theirs = pair(name)
    if ours.running_mean is not None:
        for layer, put in ((ours, Foreign), (theirs, lambda a: a)):
            layer(put(batch(0)))
    for n in ("weight", "bias", "running_mean", "running_var"):
        if getattr(ours, n) is not None:
            assert isinstance(getattr(ours, n), DeviceNDArray)
    held = ours.weight
    assert ours.to("cuda:0").weight is held  # it is there
    assert ours.to("cpu").device == "cpu"
    for n in ("weight", "bias", "running_mean", "running_var"):
        assert getattr(ours, n) is None or type(getattr(ours, n)) is np.ndarray
    assert_state(ours, theirs)
    assert_close((ours(batch(1)),), (theirs(batch(1)),))


def test_assigned_arrays_stay() -> None:
    layer = nn.LayerNorm(7)
    weight, bias = Foreign(np.ones(7, np.float16)), Foreign(np.ones(7))
    layer.weight, layer.bias = weight, bias
    y = layer(Foreign(batch(0)))  # no .to() is needed then
    assert layer.to("cuda").weight is weight
    expected = nn.layer_norm(batch(0), 7, np.ones(7), np.ones(7))
    assert_close((host(y),), (expected,))
    assert layer.backward(Foreign(batch(0))).shape == (5, 6, 7)
    assert host(layer.grad["weight"]).dtype == np.float16
    assert host(layer.grad["bias"]).dtype == np.float16  # as on the host: of the weight's dtype


def test_state_goes_to_where_the_layer_is() -> None:
    ours, theirs = pair("batch")
    theirs(batch(0))
    held = theirs.state_dict()
    assert ours.load_state_dict(held) is ours
    assert isinstance(ours.weight, DeviceNDArray)
    assert_state(ours, theirs)
    ours.load_state_dict({name: Foreign(np.asarray(value)) for name, value in held.items()})
    assert_state(ours, theirs)
    with pytest.raises(ValueError, match="weight: expected shape"):
        ours.load_state_dict(held | {"weight": np.ones(5)})
    assert_state(ours, theirs)
    ours(Foreign(batch(1)))
    theirs(batch(1))
    assert_state(ours, theirs)
    ours.reset_running_stats()
    theirs.reset_running_stats()
    assert isinstance(ours.running_mean, DeviceNDArray)
    assert_state(ours, theirs)


def test_layers_that_lie_elsewhere() -> None:
    layer = nn.BatchNorm(6)
    wanted = (
        r"weight: expected a CUDA array, as x is, got ndarray in host memory; move the layer there with .to\('cuda:0'"
    )
    with pytest.raises(TypeError, match=wanted):
        layer(Foreign(batch(0)))
    layer.to("cuda")
    layer.weight = layer.bias = None
    with pytest.raises(TypeError, match="running_mean: expected an array in host memory"):
        layer(batch(0))
    assert not LAUNCHES


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:1", "CUDA", 0, None])
def test_no_such_device(device: Any) -> None:
    with pytest.raises(ValueError, match="device: expected"):
        nn.LayerNorm(7).to(device)


# --- moments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [None, 0, (0, 2), -1])
@pytest.mark.parametrize("masked", [False, True])
def test_moments(axis: Any, masked: bool) -> None:
    ours = theirs = None
    for seed in range(2):
        x = np.repeat(batch(seed), 2, 2)[:, :, ::2]
        mask = {"mask": normal(seed, x.shape) > 0} if masked else {}
        own = {name: Foreign(value) for name, value in mask.items()}
        ours = nn.Moments.of(Foreign(x), axis, **own) if ours is None else ours.update(Foreign(x), **own)
        theirs = nn.Moments.of(x, axis, **mask) if theirs is None else theirs.update(x, **mask)
    np.testing.assert_array_equal(ours.count, theirs.count)
    np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-6)
    np.testing.assert_allclose(ours.var(), theirs.var(), rtol=1e-6)


def test_moments_of_little() -> None:
    assert nn.Moments.of(Foreign(np.float32([3.0]).reshape(()))).mean == 3.0
    assert nn.Moments.of(Foreign(np.zeros((0, 6)))).count == 0


def test_config() -> None:
    assert nn.calls.config.config()["gpu"].startswith("simulated device (compute capability 5.2); numba-cuda ")
