"""Gradients of dask arrays: in any chunks those that arrays in memory have, lazily, and no chunk held."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import normal
from training_tolerances import GRADIENT_FLOAT32, GRADIENT_FLOAT64

import numbanorm as nn

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")

SHAPE = (4, 6, 5, 3)
WEIGHT = normal(1, (6,), np.float64)
WEIGHT[2] = 0.0

Call = Callable[..., Any]


@pytest.fixture(autouse=True, scope="module")
def _synchronous() -> Iterator[None]:
    with dask.config.set(scheduler="synchronous"):
        yield


def channelwise(norm: str, *head: Any, weight: Any = None, eps: float | None = None, **own: Any) -> Call:
    """Return what gives y's statistics and the gradients; of arrays in memory, or of dask arrays."""
    forward, backward = getattr(nn, f"{norm}_norm"), getattr(nn, f"{norm}_norm_backward")
    both: dict[str, Any] = {"training": True} if norm == "batch" else {}
    there = {} if eps is None else {"eps": eps}

    def call(dy: Any, x: Any, statistics: Any = None, **options: Any) -> Any:
        if statistics is None:
            _, *statistics = forward(x, *head, weight=weight, return_stats=True, **both, **there, **own, **options)
        return backward(dy, x, *head, *statistics, weight, **own, **options)

    return call


BACKWARD: dict[str, Call] = {
    "batch": channelwise("batch", weight=WEIGHT),
    "batch, last axis": channelwise("batch", channel_axis=-1),
    "instance": channelwise("instance", weight=WEIGHT),
    "instance, last axis": channelwise("instance", weight=WEIGHT[:3], channel_axis=-1),
    "instance, first axis": channelwise("instance", channel_axis=0),
    "group": channelwise("group", 3, weight=WEIGHT),
    "group, last axis": channelwise("group", 3, channel_axis=-1),
    "group, first axis": channelwise("group", 2, weight=WEIGHT[:4], channel_axis=0),
    "layer": channelwise("layer", (5, 3), weight=normal(3, (5, 3))),
    "layer, axis 1": channelwise("layer", 6, weight=WEIGHT, axis=1),
    "layer, axes turned": channelwise("layer", (3, 6), weight=normal(5, (3, 6)), axis=(3, 1)),
    "layer, all axes": channelwise("layer", SHAPE, weight=normal(6, SHAPE)),
    "rms": channelwise("rms", (5, 3), weight=normal(3, (5, 3))),
    "rms, axis 1": channelwise("rms", 6, axis=1),
    "l2": channelwise("l2", (5, 3), weight=normal(3, (5, 3))),
    "l2, axis 1, some clamped": channelwise("l2", 6, weight=WEIGHT, axis=1, eps=2.4),
}
UNCENTRED = "rms", "l2"


@st.composite
def chunkings(draw: st.DrawFn, shape: tuple[int, ...] = SHAPE) -> tuple[tuple[int, ...], ...]:
    """Cut each axis at most twice: any sizes, up to 81 chunks."""
    chunks = []
    for n in shape:
        cuts = sorted(draw(st.sets(st.integers(1, n - 1), max_size=2)))
        chunks.append(tuple(b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True)))
    return tuple(chunks)


def compare(found: Any, expected: Any, slack: float = 0.0) -> None:
    """Compare dx, dweight and dbias with those in memory, as a share of each one's scale."""
    assert len(found) == len(expected)
    for lazy, exact in zip(found, expected, strict=True):
        array = lazy.compute()
        assert array.dtype == lazy.dtype == exact.dtype
        assert array.shape == lazy.shape == exact.shape
        tolerance = (GRADIENT_FLOAT64 if expected[0].dtype == np.float64 else GRADIENT_FLOAT32) + slack
        scale = max(float(np.abs(exact).max(initial=0)), 1.0)
        assert float(np.abs(array.astype(np.float64) - exact).max(initial=0)) <= tolerance * scale


@pytest.mark.parametrize("name", BACKWARD)
@settings(max_examples=8)
@given(data=st.data())
def test_any_chunks(name: str, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    mean = data.draw(st.sampled_from([0.0, 1e6])) if dtype == np.float64 else 0.0
    x = (normal(0, SHAPE, np.float64) + mean).astype(dtype)
    dy = normal(7, SHAPE, dtype)
    chunks = data.draw(chunkings())
    lazy = da.from_array(x, chunks=chunks)
    options: dict[str, Any] = {}
    if not name.startswith(UNCENTRED) and data.draw(st.booleans()):
        shape = data.draw(st.sampled_from([SHAPE, SHAPE[1:], (4, 1, 1, 1), (1, 6, 1, 3)]))
        options["mask"] = np.random.default_rng(0).random(shape) < 0.6
    expected = BACKWARD[name](dy, x, **options)
    if options and data.draw(st.booleans()):
        options["mask"] = da.from_array(options["mask"], chunks=2)
    found = BACKWARD[name](da.from_array(dy, chunks=data.draw(chunkings())), lazy, **options)
    assert all(isinstance(gradient, da.Array) for gradient in found)
    assert found[0].chunks == lazy.chunks
    compare(found, expected, 8 * np.spacing(mean))  # rstd reaches 5 among a few elements of std 1


def test_statistics_of_arrays_in_memory_and_dy_too() -> None:
    x, dy = normal(0, SHAPE, np.float64), normal(7, SHAPE, np.float64)
    _, *statistics = nn.group_norm(x, 3, WEIGHT, return_stats=True)
    for chunks in ((1, 2, 5, 3), (3, 4, 2, 2)):
        found = BACKWARD["group"](dy, da.from_array(x, chunks=chunks), statistics)
        compare(found, BACKWARD["group"](dy, x, statistics))


@pytest.mark.parametrize("chunks", [(2, 3, 5, 2), SHAPE])
def test_running_statistics_are_constants(chunks: tuple[int, ...]) -> None:
    x, dy = normal(0, SHAPE, np.float64), normal(7, SHAPE, np.float64)
    statistics = normal(8, (6,), np.float64), np.abs(normal(9, (6,), np.float64))
    call = channelwise("batch", weight=WEIGHT, training=False)
    compare(call(dy, da.from_array(x, chunks=chunks), statistics), call(dy, x, statistics))


@pytest.mark.parametrize("dtype", [np.float16, np.uint8, ">f4"])
@pytest.mark.parametrize("name", ["batch", "group", "layer", "l2"])
@pytest.mark.parametrize("chunks", [(2, 3, 2, 3), SHAPE])
def test_dtypes(name: str, dtype: Any, chunks: tuple[int, ...]) -> None:
    x = (normal(0, SHAPE, np.float64) * 20 + 60).astype(dtype)
    dy = normal(7, SHAPE, np.float16)
    found, expected = BACKWARD[name](dy, da.from_array(x, chunks=chunks)), BACKWARD[name](dy, x)
    compare(found, expected, 2e-3 if x.dtype.itemsize == 2 else 0.0)


@pytest.mark.parametrize("weight", [WEIGHT.astype(np.float16), [1, 2, 3, 4, 5, 6], da.from_array(WEIGHT, chunks=4)])
def test_weights(weight: Any) -> None:
    """Their dtype is that of their gradient, which is added up in float64 before it is rounded."""
    x, dy = normal(0, SHAPE, np.float64), normal(7, SHAPE, np.float64)
    plain = weight.compute() if isinstance(weight, da.Array) else weight
    for norm, head in (("batch", ()), ("group", (3,))):
        expected = channelwise(norm, *head, weight=plain)(dy, x)
        found = channelwise(norm, *head, weight=weight)(dy, da.from_array(x, chunks=(1, 4, 2, 3)))
        compare(found, expected, 1e-3 if expected[1].dtype == np.float16 else 0.0)


@pytest.mark.parametrize("name", BACKWARD)
def test_empty_chunks_and_arrays(name: str) -> None:
    x, dy = normal(0, SHAPE), normal(7, SHAPE)
    chunks = ((0, 1, 3), 6, (4, 0, 1), 3)
    compare(BACKWARD[name](da.from_array(dy, chunks=2), da.from_array(x, chunks=chunks)), BACKWARD[name](dy, x))
    if name not in ("layer, all axes", "group, first axis", "instance, first axis"):
        nothing = BACKWARD[name](da.from_array(dy[:0]), da.from_array(x[:0], chunks=2))
        compare(nothing, BACKWARD[name](dy[:0], x[:0]))


@pytest.mark.parametrize("name", BACKWARD)
def test_lazy_with_names_that_come_from_the_inputs(name: str) -> None:
    def forbidden(block: np.ndarray) -> np.ndarray:
        raise AssertionError("computed")

    x = da.ones(SHAPE, chunks=2).map_blocks(forbidden, meta=np.empty((0,) * 4))
    dx, *_ = BACKWARD[name](da.ones(SHAPE), x)
    with pytest.raises(AssertionError, match="computed"):
        dx.compute()
    values, dy = normal(0, SHAPE), normal(7, SHAPE)
    results = [BACKWARD[name](dy.copy(), da.from_array(values.copy(), chunks=2)) for _ in range(2)]
    assert [r.name for r in results[0]] == [r.name for r in results[1]]


@pytest.mark.parametrize(
    ("name", "chunks", "reads"),
    [
        ("batch", (4, 2, 5, 3), 1),
        ("batch", (2, 6, 5, 3), 2),
        ("instance", (1, 2, 5, 3), 1),
        ("group", (1, 4, 5, 3), 1),
        ("group", (4, 3, 5, 3), 2),
        ("layer", (1, 1, 5, 3), 1),
        ("layer", (4, 6, 5, 2), 2),
        ("rms", (4, 6, 2, 3), 2),
        ("l2", (4, 6, 2, 3), 2),
    ],
)
def test_reads(name: str, chunks: tuple[int, ...], reads: int) -> None:
    """Chunks of x and dy are read once where groups lie in them, twice where not, and never held in between."""
    alive, most, total = 0, 0, 0

    def release() -> None:
        nonlocal alive
        alive -= 1

    def read(block: np.ndarray) -> np.ndarray:
        nonlocal alive, most, total
        alive, total = alive + 1, total + 1
        most = max(most, alive)
        copy = block.copy()
        weakref.finalize(copy, release)
        return copy

    values = normal(0, SHAPE)
    lazy = da.from_array(values, chunks=chunks)
    _, *statistics = FORWARD_STATISTICS[name](values)
    x, dy = (lazy.map_blocks(read, meta=np.empty((0,) * 4, np.float32), token=token) for token in ("x", "dy"))
    dx, *_ = BACKWARD[name](dy, x, statistics)
    dx = dx.map_blocks(lambda block: block[:0, :0, :0, :0], chunks=tuple((0,) * n for n in x.numblocks))
    dx.compute(optimize_graph=False)
    assert total == 2 * reads * x.npartitions
    assert most <= 4


FORWARD_STATISTICS: dict[str, Call] = {
    "batch": lambda x: nn.batch_norm(x, training=True, return_stats=True),
    "instance": lambda x: nn.instance_norm(x, return_stats=True),
    "group": lambda x: nn.group_norm(x, 3, return_stats=True),
    "layer": lambda x: nn.layer_norm(x, (5, 3), return_stats=True),
    "rms": lambda x: nn.rms_norm(x, (5, 3), return_stats=True),
    "l2": lambda x: nn.l2_norm(x, (5, 3), return_stats=True),
}


@pytest.mark.parametrize("masked", [False, True])
def test_layers(masked: bool) -> None:
    x, dy, dtotal = (normal(seed, SHAPE, np.float64) for seed in (0, 7, 8))
    lazy = da.from_array(x, chunks=(2, 6, 5, 2))
    layers: list[Call] = [
        lambda: nn.BatchNorm(6),
        lambda: nn.InstanceNorm(6, affine=True),
        lambda: nn.GroupNorm(2, 6),
        lambda: nn.LayerNorm((5, 3)),
        lambda: nn.RMSNorm(3),
        lambda: nn.L2Norm((5, 3), elementwise_affine=True),
    ]
    for make in layers:
        ours, theirs = make(), make()
        options = {"mask": x > -0.5} if masked and ours.record.takes_mask else {}
        ours(lazy, **options)
        theirs(x, **options)
        compare([ours.backward(da.from_array(dy, chunks=2))], [theirs.backward(dy)])
        assert ours.grad.keys() == theirs.grad.keys()
        compare(list(ours.grad.values()), list(theirs.grad.values()), 1e-6)  # float32, like the weights
    ours, theirs = nn.LayerNorm(3), nn.LayerNorm(3)
    ours(lazy, residual=lazy)
    theirs(x, residual=x)
    compare([ours.backward(dy, da.from_array(dtotal, chunks=3))], [theirs.backward(dy, dtotal)])


ONES = np.ones(3)
WRONG: list[tuple[Call, type[Exception], str]] = [
    (lambda x: nn.batch_norm_backward(np.ones((4, 2)), x, ONES, ONES), ValueError, "dy: expected the shape of x"),
    (lambda x: nn.batch_norm_backward(np.ones((4, 3), int), x, ONES, ONES), TypeError, "dy: expected a float dtype"),
    (lambda x: nn.batch_norm_backward(x, x, np.ones(4), ONES), ValueError, r"mean: expected shape \(3,\), got \(4,\)"),
    (lambda x: nn.batch_norm_backward(x, x, ONES, np.ones(3, int)), TypeError, "rstd: expected a float dtype"),
    (lambda x: nn.batch_norm_backward(x, x, ONES, ONES, np.ones(2)), ValueError, "weight: expected shape"),
    (lambda x: nn.batch_norm_backward(x, x, ONES, ONES, mask=np.ones(3)), TypeError, "mask: expected dtype bool"),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_come_with_the_call(wrong: tuple[Call, type[Exception], str]) -> None:
    call, error, message = wrong
    with pytest.raises(error, match=message):
        call(da.ones((4, 3), chunks=2))
