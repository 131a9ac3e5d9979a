"""Layout against brute force from the definitions, element by element."""

from __future__ import annotations

import itertools
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numbanorm as nn
from numbanorm import Layout

Shape = tuple[int, ...]


def by_definition(
    norm: str, shape: Shape, channel_axis: int = 1, num_groups: int | None = None, axis: Shape | None = None
) -> tuple[np.ndarray, np.ndarray, Shape, Shape]:
    """Say of every element which mean and which weight it uses; and the shapes of means and of weights."""
    statistic = np.empty(shape, int)
    weight = np.empty(shape, int)
    ndim = len(shape)
    if norm in ("layer", "rms"):
        assert axis is not None
        normalized = [a % ndim for a in axis]
        stats_shape = tuple(1 if a in normalized else shape[a] for a in range(ndim))
        affine_shape = tuple(shape[a] for a in normalized)
        for index in np.ndindex(*shape):
            kept = tuple(0 if a in normalized else index[a] for a in range(ndim))
            statistic[index] = np.ravel_multi_index(kept, stats_shape)
            weight[index] = np.ravel_multi_index(tuple(index[a] for a in normalized), affine_shape)
        return statistic, weight, stats_shape, affine_shape
    channel_axis %= ndim
    sample_axis = 1 if channel_axis == 0 else 0
    samples, channels = shape[sample_axis], shape[channel_axis]
    for index in np.ndindex(*shape):
        n, c = index[sample_axis], index[channel_axis]
        weight[index] = c
        if norm == "batch":
            statistic[index] = c
        elif norm == "instance":
            statistic[index] = n * channels + c
        else:
            assert num_groups is not None
            statistic[index] = n * num_groups + c // (channels // num_groups)
    stats_shape = {
        "batch": (channels,),
        "instance": (samples, channels),
        "group": (samples, num_groups or 0),
    }[norm]
    return statistic, weight, stats_shape, (channels,)


def check(norm: str, shape: Shape, order: Shape | None = None, **options: Any) -> Layout:
    layout = Layout.of(norm, shape, order=order, **options)
    statistic, weight, stats_shape, affine_shape = by_definition(norm, shape, **options)
    index = np.indices(shape)
    assert layout.stats_shape == stats_shape
    assert layout.affine_shape == affine_shape
    np.testing.assert_array_equal(layout.statistic(*index), statistic)
    np.testing.assert_array_equal(layout.weight(*index), weight)
    assert layout.shape == shape
    assert sorted(layout.order) == list(range(len(shape)))
    assert prod(layout.view) == prod(shape)
    assert layout.groups == prod(stats_shape) == len(np.unique(statistic))
    assert layout.count * layout.groups == prod(shape)
    assert layout.size == prod(affine_shape)
    assert layout.centred == (norm != "rms")
    view_matches_memory(layout, statistic, weight)
    return layout


def view_matches_memory(layout: Layout, statistic: np.ndarray, weight: np.ndarray) -> None:
    """Read the elements in memory's order: the view and (inner, size) alone must tell who shares what."""
    k0, _, k1, _ = layout.view
    in_memory = statistic.transpose(layout.order).reshape(layout.view)
    for i, j in itertools.product(range(k0), range(k1)):
        assert len(np.unique(in_memory[i, :, j, :])) == 1
    assert len({int(in_memory[i, 0, j, 0]) for i in range(k0) for j in range(k1)}) == k0 * k1
    channel = np.arange(prod(layout.shape)) // layout.inner % layout.size
    pairs = np.unique(np.stack([channel, weight.transpose(layout.order).reshape(-1)]), axis=1)
    assert pairs.shape[1] == layout.size  # one weight in the kernel's order to one weight of the user's


def channels_last(ndim: int) -> Shape:
    return (0, *range(2, ndim), 1)


SHAPES = [(3, 6), (2, 6, 5), (3, 4, 2, 5), (2, 4, 3, 2, 3), (2, 4, 2, 1, 3, 2), (1, 6, 3), (4, 1, 3), (2, 6, 1), (1, 1)]
CHANNELWISE = [
    (norm, groups, shape)
    for shape in SHAPES
    for norm, groups in [("batch", None), ("instance", None), *(("group", d) for d in (1, 2, 3, 4, 6))]
    if groups is None or shape[1] % groups == 0
]


@pytest.mark.parametrize(("norm", "groups", "shape"), CHANNELWISE, ids=str)
class TestChannels:
    @staticmethod
    def options(shape: Shape, groups: int | None, channel_axis: int = 1) -> dict[str, Any]:
        own = {} if groups is None else {"num_groups": groups}
        return {"channel_axis": channel_axis, **own}

    def test_c_order(self, norm: str, groups: int | None, shape: Shape) -> None:
        layout = check(norm, shape, **self.options(shape, groups))
        assert layout.order == tuple(range(len(shape)))

    def test_channels_first_array_held_channels_last(self, norm: str, groups: int | None, shape: Shape) -> None:
        check(norm, shape, channels_last(len(shape)), **self.options(shape, groups))

    def test_channel_axis_last(self, norm: str, groups: int | None, shape: Shape) -> None:
        last = (shape[0], *shape[2:], shape[1])
        for channel_axis in (-1, len(shape) - 1):
            check(norm, last, **self.options(last, groups, channel_axis))

    def test_channel_axis_first(self, norm: str, groups: int | None, shape: Shape) -> None:
        first = (shape[1], shape[0], *shape[2:])
        check(norm, first, **self.options(first, groups, 0))

    def test_every_order_of_memory(self, norm: str, groups: int | None, shape: Shape) -> None:
        orders = list(itertools.permutations(range(len(shape))))
        for order in orders[:: max(1, len(orders) // 24)]:
            check(norm, shape, order, **self.options(shape, groups))


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_set_of_axes(norm: str, shape: Shape) -> None:
    ndim = len(shape)
    for k in range(1, ndim + 1):
        for axis in itertools.combinations(range(ndim), k):
            check(norm, shape, axis=axis)
            check(norm, shape, axis=tuple(a - ndim for a in axis[::-1]))


def test_every_set_of_axes_in_every_order_of_memory() -> None:
    shape = (2, 3, 4, 5)
    for k in range(1, 5):
        for axis in itertools.combinations(range(4), k):
            for order in itertools.permutations(range(4)):
                check("layer", shape, order, axis=axis)


N, C, H, W, G = 4, 6, 3, 5, 2
S = H * W
FIRST, LAST = (N, C, H, W), (N, H, W, C)
TABLE = [
    # norm, shape, options, (K0, R0, K1, R1), (inner, size)
    ("layer", (7, 8, 9), {"axis": (-1,)}, (56, 1, 1, 9), (1, 9)),
    ("layer", (7, 8, 9), {"axis": (-2, -1)}, (7, 1, 1, 72), (1, 72)),
    ("rms", (7, 8, 9), {"axis": (-1,)}, (56, 1, 1, 9), (1, 9)),
    ("rms", (7, 8, 9), {"axis": (-2, -1)}, (7, 1, 1, 72), (1, 72)),
    ("layer", FIRST, {"axis": (1,)}, (N, C, S, 1), (S, C)),
    ("rms", FIRST, {"axis": (1,)}, (N, C, S, 1), (S, C)),
    ("batch", FIRST, {}, (1, N, C, S), (S, C)),
    ("batch", LAST, {"channel_axis": -1}, (1, N * S, C, 1), (1, C)),
    ("batch", (N, C), {}, (1, N, C, 1), (1, C)),
    ("instance", FIRST, {}, (N, 1, C, S), (S, C)),
    ("instance", LAST, {"channel_axis": -1}, (N, S, C, 1), (1, C)),
    ("group", FIRST, {"num_groups": G}, (N, 1, G, C // G * S), (S, C)),
    ("group", LAST, {"num_groups": G, "channel_axis": -1}, (N, S, G, C // G), (1, C)),
]


@pytest.mark.parametrize(("norm", "shape", "options", "view", "affine"), TABLE)
def test_the_table(norm: str, shape: Shape, options: dict[str, Any], view: Shape, affine: Shape) -> None:
    layout = check(norm, shape, **options)
    assert layout.view == view
    assert (layout.inner, layout.size) == affine


@pytest.mark.parametrize(("norm", "view", "affine"), [(row[0], *row[3:]) for row in TABLE if row[1] is LAST])
def test_the_table_by_memory_order(norm: str, view: Shape, affine: Shape) -> None:
    """An array indexed channels first but held channels last has the channels-last row of the table."""
    own = {"num_groups": G} if norm == "group" else {}
    layout = check(norm, FIRST, (0, 2, 3, 1), **own)
    assert layout.view == view
    assert (layout.inner, layout.size) == affine


@st.composite
def problems(draw: st.DrawFn) -> tuple[str, Shape, Shape, dict[str, Any]]:
    norm = draw(st.sampled_from(["batch", "instance", "group", "layer", "rms"]))
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=6)))
    order = tuple(draw(st.permutations(range(len(shape)))))
    options: dict[str, Any] = {}
    if norm in ("layer", "rms"):
        axes = draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
        options["axis"] = tuple(a - draw(st.sampled_from([0, len(shape)])) for a in axes)
    else:
        channel_axis = draw(st.integers(-len(shape), len(shape) - 1))
        options["channel_axis"] = channel_axis
        if norm == "group":
            channels = shape[channel_axis]
            options["num_groups"] = draw(st.sampled_from([d for d in range(1, channels + 1) if channels % d == 0]))
    return norm, shape, order, options


@given(problems())
def test_any_problem(problem: tuple[str, Shape, Shape, dict[str, Any]]) -> None:
    norm, shape, order, options = problem
    check(norm, shape, order, **options)


def test_scalar_index() -> None:
    layout = Layout.of("group", (4, 6, 8, 8), num_groups=2)
    assert (layout.statistic(3, 5, 0, 0), layout.weight(3, 5, 0, 0)) == (7, 5)
    assert (layout.statistic(0, 2, 7, 7), layout.weight(0, 2, 7, 7)) == (0, 2)
    assert layout.flat(1, 2, 3, 4) == 1 * 384 + 2 * 64 + 3 * 8 + 4


@pytest.mark.parametrize("axis", ["sample", "channel", "space"])
def test_empty(axis: str) -> None:
    shape = tuple(0 if axis == name else n for name, n in [("sample", 2), ("channel", 4), ("space", 3)])
    for norm, options in [("batch", {}), ("instance", {}), ("group", {"num_groups": 2}), ("layer", {"axis": (-1,)})]:
        layout = Layout.of(norm, shape, **options)
        assert prod(layout.view) == 0
        if norm != "layer":
            assert layout.size == shape[1]


WRONG = [
    ("LayerNorm", (2, 3), {"axis": (1,)}, r"norm: expected one of 'batch', .*'rms'.*, got 'LayerNorm'"),
    ("batch", (3,), {}, r"x: expected at least 2 dimensions .*got shape \(3,\)"),
    ("batch", (2, 3), {"channel_axis": 2}, r"channel_axis: .*\(2, 3\), got 2"),
    ("instance", (2, 3), {"channel_axis": -3}, r"channel_axis: .*got -3"),
    ("group", (2, 6), {"num_groups": 4}, r"num_groups: expected a divisor of the 6 channels, got 4"),
    ("group", (2, 6), {"num_groups": 0}, r"num_groups: .*got 0"),
    ("group", (2, 6), {"num_groups": -2}, r"num_groups: .*got -2"),
    ("layer", (2, 3), {}, r"axis: expected one or more different axes of shape \(2, 3\), got None"),
    ("layer", (2, 3), {"axis": ()}, r"axis: .*got \(\)"),
    ("layer", (2, 3), {"axis": (1, -1)}, r"axis: .*different.*got \(1, -1\)"),
    ("rms", (2, 3), {"axis": (2,)}, r"axis: .*got \(2,\)"),
]


@pytest.mark.parametrize(("norm", "shape", "options", "message"), WRONG)
def test_wrong(norm: str, shape: Shape, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout.of(norm, shape, **options)


def test_of_a_norm() -> None:
    shape = (4, 6, 5, 5)
    assert nn.BatchNorm(6).layout(shape) == Layout.of("batch", shape)
    assert nn.BatchNorm(5, channel_axis=-1).layout(shape) == Layout.of("batch", shape, channel_axis=-1)
    assert nn.InstanceNorm(6).layout(shape) == Layout.of("instance", shape)
    assert nn.GroupNorm(3, 6).layout(shape) == Layout.of("group", shape, num_groups=3)
    assert nn.LayerNorm((5, 5)).layout(shape) == Layout.of("layer", shape, axis=(2, 3))
    assert nn.RMSNorm(5).layout(list(shape)) == Layout.of("rms", shape, axis=(3,))
