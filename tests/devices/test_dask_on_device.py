"""Dask arrays whose chunks are CUDA arrays give what arrays in host memory give.

Parameters, masks and statistics lie in host memory meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from reference import normal
from standin import LAUNCHES, Foreign, host
from tolerances import FLOAT32, STATISTICS_FLOAT32

import numbanorm as nn

da = pytest.importorskip("dask.array")

SHAPE = (4, 6, 5, 3)
CHUNKS = {"whole groups": (2, 6, 5, 3), "channels apart": (4, 2, 5, 3), "all apart": (2, 3, 2, 2)}
WEIGHT, BIAS = normal(1, (6,)), normal(2, (6,), np.float64)
MASK = np.random.default_rng(0).random(SHAPE) < 0.7


def on_device(x: np.ndarray, chunks: tuple[int, ...]) -> Any:
    """Cut an array into chunks in device memory; dask does not know where they lie."""
    return da.from_array(x, chunks=chunks).map_blocks(Foreign, dtype=x.dtype, meta=np.empty((0,) * x.ndim, x.dtype))


def computed(array: Any, *, device: bool) -> np.ndarray:
    """Return what an array's tasks compute, all of it where it should lie."""

    def chunk(block: Any) -> Any:
        assert isinstance(block, np.ndarray) != device
        return host(block) if device else block

    meta = np.empty((0,) * array.ndim, array.dtype)
    return array.map_blocks(chunk, dtype=array.dtype, meta=meta).compute(scheduler="synchronous")


def close(found: np.ndarray, expected: np.ndarray) -> None:
    """Compare as shares of the scale: on a device, moments are taken in another order."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    tolerance = 1e-3 if expected.dtype == np.float16 else FLOAT32
    assert np.abs(found.astype(np.float64) - expected).max() <= tolerance * np.abs(expected).max()


FORWARD: dict[str, Callable[[Any], Any]] = {
    "batch": lambda x: nn.batch_norm(x, weight=WEIGHT, bias=BIAS, training=True, return_stats=True),
    "batch, mask": lambda x: nn.batch_norm(x, training=True, mask=MASK, return_stats=True),
    "batch, given": lambda x: nn.batch_norm(x, normal(3, (6,)), normal(4, (6,)) ** 2, WEIGHT, return_stats=True),
    "batch, running": lambda x: nn.batch_norm(x, np.zeros(6), np.ones(6), WEIGHT, BIAS, True, return_stats=True),
    "instance, last axis": lambda x: nn.instance_norm(x, channel_axis=-1, return_stats=True),
    "group": lambda x: nn.group_norm(x, 2, WEIGHT, BIAS, return_stats=True),
    "layer": lambda x: nn.layer_norm(x, (5, 3), normal(3, (5, 3)), return_stats=True),
    "layer, axis 1, mask": lambda x: nn.layer_norm(x, 6, WEIGHT, axis=1, mask=MASK, return_stats=True),
    "rms": lambda x: nn.rms_norm(x, (5, 3), normal(3, (5, 3)), return_stats=True),
}


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_forward(name: str, chunks: str, dtype: Any) -> None:
    x = (3 * normal(0, SHAPE) + 1).astype(dtype)
    theirs = FORWARD[name](x)
    ours = FORWARD[name](on_device(x, CHUNKS[chunks]))
    assert len(ours) == len(theirs)
    close(computed(ours[0], device=True), theirs[0])
    assert {launch.name for launch in LAUNCHES} & {"forward", "apply"}
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_allclose(computed(a, device=False), b, STATISTICS_FLOAT32, 1e-6)


@pytest.mark.parametrize("axis", [None, 1, (0, 2, 3)])
@pytest.mark.parametrize("mask", [None, MASK])
def test_moments(axis: Any, mask: Any) -> None:
    x = normal(0, SHAPE)
    ours = nn.Moments.of(on_device(x, CHUNKS["all apart"]), axis, mask=mask)
    theirs = nn.Moments.of(x, axis, mask=mask)
    np.testing.assert_array_equal(ours.count, theirs.count)
    np.testing.assert_allclose(ours.mean, theirs.mean, STATISTICS_FLOAT32, 1e-6)
    np.testing.assert_allclose(ours.var(), theirs.var(), STATISTICS_FLOAT32)


def test_channels_of_one_element() -> None:
    x = normal(0, (4, 6))
    close(computed(nn.group_norm(on_device(x, (4, 2)), 2, WEIGHT), device=True), nn.group_norm(x, 2, WEIGHT))


def backward(name: str, x: Any, dy: Any, array: np.ndarray) -> tuple[Any, ...]:
    if name == "layer":
        own = nn.layer_norm(array, (5, 3), return_stats=True)[1:]
        return nn.layer_norm_backward(dy, x, (5, 3), *own, normal(3, (5, 3)))
    if name == "l2":
        return nn.l2_norm_backward(dy, x, (5, 3), nn.l2_norm(array, (5, 3), return_stats=True)[1])
    if name == "group":
        return nn.group_norm_backward(dy, x, 3, *nn.group_norm(array, 3, return_stats=True)[1:], WEIGHT)
    own = nn.batch_norm(array, training=True, mask=MASK, return_stats=True)[1:]
    return nn.batch_norm_backward(dy, x, *own, WEIGHT, training=name != "given", mask=MASK)


@pytest.mark.parametrize(
    ("name", "chunks"),
    [
        ("layer", "channels apart"),
        ("group", "channels apart"),
        ("batch", "channels apart"),
        ("given", "all apart"),
    ],
)
def test_backward_of_whole_groups(name: str, chunks: str) -> None:
    x, dy = normal(0, SHAPE), normal(7, SHAPE)
    ours = backward(name, *(on_device(a, CHUNKS[chunks]) for a in (x, dy)), x)
    theirs = backward(name, x, dy, x)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        close(computed(a, device=i == 0), b)


@pytest.mark.parametrize("name", ["batch", "layer", "group", "l2"])
def test_backward_across_chunks(name: str) -> None:
    """Sums of all chunks are added up, and every chunk gets its gradient where it lies."""
    x, dy = normal(0, SHAPE), normal(7, SHAPE)
    chunks = (2, 2, 5, 3) if name in ("batch", "group") else (4, 6, 3, 2)
    own = [on_device(a, chunks) for a in (x, dy)]
    ours, theirs = backward(name, *own, x), backward(name, x, dy, x)
    assert {launch.name for launch in LAUNCHES} == set()
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        close(computed(a, device=i == 0), b)


def test_empty_chunks() -> None:
    x = on_device(normal(0, SHAPE), ((0, 4), 6, 5, 3))
    assert computed(nn.layer_norm(x, (5, 3)), device=True).shape == SHAPE
    assert computed(nn.batch_norm(x, training=True), device=True).shape == SHAPE
    statistics = nn.layer_norm(normal(0, SHAPE), (5, 3), return_stats=True)[1:]
    assert computed(nn.layer_norm_backward(x, x, (5, 3), *statistics)[0], device=True).shape == SHAPE
