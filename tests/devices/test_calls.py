"""The functions on CUDA arrays give what they give on NumPy arrays: the same bits, since the kernels are the same here.

So what is tested is all that lies around the kernels: plans, copies, dtypes, masks, `out`, residuals, statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from reference import normal
from same import assert_close, assert_same
from standin import LAUNCHES, Foreign, host

import numbanorm as nn

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.bool_, np.int64]
SHAPE = (4, 6, 5, 3)

LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C": lambda a: a,
    "channels last": lambda a: np.ascontiguousarray(np.moveaxis(a, 1, -1)).transpose(0, 3, 1, 2),
    "F": np.asfortranarray,
    "rows apart": lambda a: np.concatenate([a, a], -2)[:, :, : a.shape[2]],
    "every second": lambda a: np.repeat(a, 2, -1)[..., ::2],
    "backwards": lambda a: np.ascontiguousarray(a[::-1, :, ::-1])[::-1, :, ::-1],
    "samples backwards": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "broadcast": lambda a: np.broadcast_to(a[:, :, :1], a.shape),
    "transposed": lambda a: np.ascontiguousarray(a.transpose(2, 0, 3, 1)).transpose(1, 3, 0, 2),
}


def values(seed: int, dtype: Any, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return (3 * normal(seed, shape) + 4).astype(dtype)


def foreign(value: Any) -> Any:
    """Put every NumPy array among some arguments on the device."""
    if isinstance(value, dict):
        return {name: foreign(v) for name, v in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(map(foreign, value))
    return Foreign(value) if isinstance(value, np.ndarray) else value


FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], int]] = {
    "batch": (nn.batch_norm, (None, None), {"training": True}, 6),
    "batch, last": (nn.batch_norm, (None, None), {"training": True, "channel_axis": -1}, 3),
    "instance": (nn.instance_norm, (None, None), {}, 6),
    "instance, last": (nn.instance_norm, (None, None), {"channel_axis": -1}, 3),
    "group": (nn.group_norm, (2,), {}, 6),
    "group, last": (nn.group_norm, (3,), {"channel_axis": -1}, 3),
    "layer": (nn.layer_norm, (3,), {}, 3),
    "layer, axis=1": (nn.layer_norm, (6,), {"axis": 1}, 6),
    "rms": (nn.rms_norm, (3,), {}, 3),
    "rms, axis=1": (nn.rms_norm, (6,), {"axis": 1}, 6),
}
BACKWARD = {
    "batch": nn.batch_norm_backward,
    "instance": nn.instance_norm_backward,
    "group": nn.group_norm_backward,
    "layer": nn.layer_norm_backward,
    "rms": nn.rms_norm_backward,
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def both(name: str, x: np.ndarray, **options: Any) -> tuple[Any, Any]:
    """Call one function with NumPy arrays and with the same arrays on the device."""
    function, arguments, fixed, _ = FUNCTIONS[name]
    theirs = function(x.copy("K") if 0 not in x.strides else x, *arguments, **fixed, **options)
    ours = function(foreign(x), *arguments, **fixed, **foreign(options))
    return host(ours), theirs


def affine(name: str, dtype: Any) -> dict[str, np.ndarray]:
    size = FUNCTIONS[name][3]
    names = ("weight",) if name.startswith("rms") else ("weight", "bias")
    return {n: values(i, dtype, (size,)) for i, n in enumerate(names)}


@every_function
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(name: str, layout: str) -> None:
    x = LAYOUTS[layout](values(0, np.float32))
    assert_same(*both(name, x, **affine(name, np.float32), return_stats=True))
    assert_same(*both(name, x))


@every_function
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(name: str, dtype: Any) -> None:
    for layout in ("C", "every second"):
        x = LAYOUTS[layout](values(0, dtype))
        assert_same(*both(name, x, **affine(name, np.float32), return_stats=True))


@every_function
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_dtypes_of_weights(name: str, dtype: Any) -> None:
    for x in (values(0, np.float32), values(0, np.float64), values(0, ml_dtypes.bfloat16)):
        assert_same(*both(name, x, **affine(name, dtype)))
    apart = {n: np.repeat(a, 3)[::3] for n, a in affine(name, np.float32).items()}
    assert_same(*both(name, x, **apart))


SEVERAL = pytest.mark.parametrize("axis", [(3, 1), (3, 2), (2, 3, 1)])


@SEVERAL
def test_weights_of_several_axes_in_another_order(axis: tuple[int, ...]) -> None:
    shape = tuple(SHAPE[a] for a in axis)
    x, weight = values(0, np.float32), values(1, np.float32, shape)
    for array in (x, LAYOUTS["channels last"](x), LAYOUTS["transposed"](x)):
        ours = nn.layer_norm(Foreign(array), shape, Foreign(weight), axis=axis, return_stats=True)
        assert_same(host(ours), nn.layer_norm(array, shape, weight, axis=axis, return_stats=True))


MASKS = {
    "elements": lambda: normal(9, SHAPE) > -0.5,
    "rows": lambda: normal(9, (4, 1, 5, 1)) > -0.5,
    "columns": lambda: normal(9, (6, 1, 1)) > -0.5,
    "one": lambda: np.array(True),
    "strided": lambda: np.repeat(normal(9, SHAPE) > -0.5, 2, -1)[..., ::2],
    "transposed": lambda: np.ascontiguousarray((normal(9, SHAPE) > -0.5).T).T,
    "nothing": lambda: np.zeros(SHAPE, bool),
}


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if not name.startswith("rms")])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(name: str, mask: str) -> None:
    for layout in ("C", "channels last"):
        x = LAYOUTS[layout](values(0, np.float32))
        assert_same(*both(name, x, **affine(name, np.float32), mask=MASKS[mask](), return_stats=True))


@every_function
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "broadcast"])
def test_out(name: str, layout: str) -> None:
    function, arguments, fixed, _ = FUNCTIONS[name]
    x = LAYOUTS["channels last"](values(0, np.float32))
    expected = function(x, *arguments, **fixed)
    around = np.full((6, 8, 8, 10), 7, np.float32)
    for target in (LAYOUTS[layout](np.zeros(SHAPE, np.float32)), around[1:5, 1:7, 1:6, 2:8:2]):
        out = Foreign(target)
        assert function(Foreign(x), *arguments, **fixed, out=out) is out
        target[...] = expected
        np.testing.assert_array_equal(out.memory(), Foreign(target).memory())  # and what lies between was not touched


@every_function
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "broadcast"])
def test_out_is_x(name: str, layout: str) -> None:
    function, arguments, fixed, _ = FUNCTIONS[name]
    x = LAYOUTS[layout](values(0, np.float32))
    expected = function(x.copy("K"), *arguments, **fixed)
    out = Foreign(x)
    assert function(out, *arguments, **fixed, out=out) is out
    np.testing.assert_array_equal(host(out), expected)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name.startswith(("layer", "rms"))])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32])
def test_residual(name: str, layout: str, dtype: Any) -> None:
    x = LAYOUTS[layout](values(0, dtype))
    for residual in (LAYOUTS[layout](values(1, dtype)), values(1, dtype)):
        (y, *stats, total), theirs = both(name, x, **affine(name, np.float32), residual=residual, return_stats=True)
        assert_same(total, theirs[-1])
        # NumPy lays a sum of unlike arrays out as it likes, and the order in memory is that of the sums.
        assert_close((y, *stats), theirs[:-1])
        assert [a.shape for a in both(name, x, residual=residual)[0]] == [SHAPE, SHAPE]


@every_function
@pytest.mark.parametrize("shape", [(0, 6, 5, 3), (4, 6, 0, 3), (4, 6, 5, 0)])
def test_empty_arrays(name: str, shape: tuple[int, ...]) -> None:
    function, arguments, fixed, _ = FUNCTIONS[name]
    x = np.zeros(shape, np.float32)
    if name in ("layer", "rms"):
        arguments = (shape[-1],)
    theirs = function(x, *arguments, **fixed, return_stats=True)
    assert_same(host(function(Foreign(x), *arguments, **fixed, return_stats=True)), theirs)
    assert not any(launch.name == "forward" for launch in LAUNCHES)


def test_eps_zero_of_nothing() -> None:
    x = np.zeros((0, 6), np.float32)
    _, mean, rstd = host(nn.batch_norm(Foreign(x), training=True, eps=0.0, return_stats=True))
    assert (mean == 0).all()
    assert np.isposinf(rstd).all()


# --- backward ---------------------------------------------------------------------------------------------------------


def both_backward(
    name: str, dy: np.ndarray, x: np.ndarray, weight: np.ndarray | None, mask: np.ndarray | None = None
) -> tuple[Any, Any]:
    kind = name.partition(",")[0]
    function, arguments, fixed, _ = FUNCTIONS[name]
    fixed = {key: value for key, value in fixed.items() if key != "training"}
    arguments = () if arguments == (None, None) else arguments
    options = {} if mask is None else {"mask": mask}
    training = {"training": True} if kind == "batch" else {}
    _, *stats = function(x, *arguments, **fixed, **options, **training, return_stats=True)
    theirs = BACKWARD[kind](dy, x, *arguments, *stats, weight, **fixed, **options)
    ours = BACKWARD[kind](*foreign((dy, x)), *arguments, *foreign(stats), foreign(weight), **fixed, **foreign(options))
    return host(ours), theirs


@every_function
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_layouts(name: str, layout: str) -> None:
    x, weight = LAYOUTS[layout](values(0, np.float32)), affine(name, np.float32)["weight"]
    for dy in (LAYOUTS[layout](values(1, np.float32)), values(1, np.float32)):
        assert_close(*both_backward(name, dy, x, weight))
        assert_close(*both_backward(name, dy, x, None))


@every_function
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_dtypes(name: str, dtype: Any) -> None:
    x = values(0, dtype)
    for gradient, weight in ((np.float32, np.float32), (np.float64, ml_dtypes.bfloat16), (np.float16, np.float64)):
        assert_close(*both_backward(name, values(1, gradient), x, affine(name, weight)["weight"]))
    assert_close(*both_backward(name, LAYOUTS["transposed"](values(1, np.float64)), x, None))


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if not name.startswith("rms")])
@pytest.mark.parametrize("mask", MASKS)
def test_backward_masks(name: str, mask: str) -> None:
    x, dy = values(0, np.float32), values(1, np.float32)
    assert_close(*both_backward(name, dy, x, affine(name, np.float32)["weight"], MASKS[mask]()))


@SEVERAL
def test_backward_weights_of_several_axes_in_another_order(axis: tuple[int, ...]) -> None:
    shape = tuple(SHAPE[a] for a in axis)
    x, dy, weight = values(0, np.float32), values(1, np.float32), values(2, np.float32, shape)
    for array in (x, LAYOUTS["channels last"](x), LAYOUTS["transposed"](x)):
        _, mean, rstd = nn.layer_norm(array, shape, axis=axis, return_stats=True)
        theirs = nn.layer_norm_backward(dy, array, shape, mean, rstd, weight, axis=axis)
        own = foreign((mean, rstd, weight))
        assert_close(host(nn.layer_norm_backward(Foreign(dy), Foreign(array), shape, *own, axis=axis)), theirs)


def test_backward_of_inference() -> None:
    x, dy, mean, rstd = values(0, np.float32), values(1, np.float32), values(2, np.float32, (6,)), np.ones(6)
    own = foreign((dy, x, mean, rstd))
    theirs = nn.batch_norm_backward(dy, x, mean, rstd, training=False)
    assert_close(host(nn.batch_norm_backward(*own, training=False)), theirs)


def test_backward_of_nothing() -> None:
    x, weight = np.zeros((0, 6), np.float32), np.ones(6, np.float16)
    own = foreign((x, x, np.zeros(6), np.ones(6), weight))
    dx, dweight, dbias = host(nn.batch_norm_backward(*own))
    assert dx.shape == (0, 6)
    for gradient in (dweight, dbias):
        assert gradient.dtype == np.float16
        assert (gradient == 0).all()
