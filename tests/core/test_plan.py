"""Plans: where the elements of a strided array lie in the view, and which kernel reads it."""

from __future__ import annotations

import ctypes
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numbanorm.calls.memory import packed
from numbanorm.core.plan import SHORT_RUN, Placement, Plan, memory_order, plan
from numbanorm.core.spec import contiguous

Options = tuple[int, int | None, tuple[int, ...] | None]


def plan_of(norm: str, options: Options, x: np.ndarray, **more: Any) -> Plan:
    return plan(norm, options, x.shape, (x.strides, x.itemsize), **more)


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(prod(shape), dtype=np.float64).reshape(shape)


def through(placement: Placement, span: np.ndarray, work: Plan, *, constant: bool = False) -> np.ndarray:
    """Read a span of memory as the kernels do: an offset, three strides, and neighbours along R1 (and K1)."""
    k0, r0, k1, r1 = work.layout.view
    s0, s1, s2, _ = placement.strides
    read = np.empty(work.layout.view, span.dtype)
    for index in np.ndindex(k0, r0, k1, r1):
        a, b, c, d = index
        inner = c * r1 + d if work.columns else c * s2 + d
        if constant:
            inner = 0 if work.columns else c * s2
        at = placement.start + a * s0 + b * s1 + inner
        assert 0 <= at < placement.span == span.size
        read[index] = span[at]
    return read


def span_of(array: np.ndarray, placement: Placement) -> np.ndarray:
    """Return the memory of an array from its lowest to its highest address, element by element."""
    lowest = array.__array_interface__["data"][0] - placement.start * array.itemsize
    memory = (ctypes.c_char * (placement.span * array.itemsize)).from_address(lowest)
    return np.frombuffer(memory, array.dtype)


def check_reads(x: np.ndarray, work: Plan) -> None:
    expected = x.transpose(work.layout.order).reshape(work.layout.view)
    if work.x is not None:
        np.testing.assert_array_equal(through(work.x, span_of(x, work.x), work), expected)
    copy = packed(x, contiguous(x.shape, x.dtype, work.layout.order))
    np.testing.assert_array_equal(through(work.packed, span_of(copy, work.packed), work), expected)


STRIDED = {
    "c": lambda: numbered((4, 6, 2, 5)),
    "channels last": lambda: numbered((4, 2, 5, 6)).transpose(0, 3, 1, 2),
    "fortran": lambda: np.asfortranarray(numbered((4, 6, 2, 5))),
    "every second sample": lambda: numbered((8, 6, 2, 5))[::2],
    "some channels": lambda: numbered((4, 12, 2, 5))[:, 3:9],
    "every second channel": lambda: numbered((4, 12, 2, 5))[:, ::2],
    "every second row": lambda: numbered((4, 6, 4, 5))[:, :, ::2],
    "every second column": lambda: numbered((4, 6, 2, 10))[..., ::2],
    "cropped": lambda: numbered((4, 6, 4, 9))[:, :, 1:3, 2:7],
    "samples backwards": lambda: numbered((4, 6, 2, 5))[::-1],
    "columns backwards": lambda: numbered((4, 6, 2, 5))[..., ::-1],
    "all backwards": lambda: numbered((4, 6, 2, 5))[::-1, ::-1, ::-1, ::-1],
    "one sample repeated": lambda: np.broadcast_to(numbered((1, 6, 2, 5)), (4, 6, 2, 5)),
    "one channel repeated": lambda: np.broadcast_to(numbered((4, 1, 2, 5)), (4, 6, 2, 5)),
    "one element repeated": lambda: np.broadcast_to(numbered((1, 1, 1, 1)), (4, 6, 2, 5)),
    "one sample": lambda: numbered((1, 6, 2, 5)),
    "one position": lambda: numbered((4, 6, 1, 1)),
}
NORMS: dict[str, tuple[str, Options]] = {
    "batch": ("batch", (1, None, None)),
    "batch, channels last axis": ("batch", (-1, None, None)),
    "instance": ("instance", (1, None, None)),
    "group": ("group", (1, 3, None)),
    "layer": ("layer", (1, None, (3,))),
    "layer over all but samples": ("layer", (1, None, (1, 2, 3))),
    "layer over channels": ("layer", (1, None, (1,))),
    "layer over samples and columns": ("layer", (1, None, (0, 3))),
}


@pytest.mark.parametrize("strided", STRIDED)
@pytest.mark.parametrize("norm", NORMS)
def test_placement_reads_every_element(norm: str, strided: str) -> None:
    x = STRIDED[strided]()
    check_reads(x, plan_of(*NORMS[norm], x))


@pytest.mark.parametrize(
    ("norm", "strided"),
    [
        ("batch", "c"),
        ("batch", "channels last"),
        ("instance", "every second channel"),
        ("instance", "some channels"),
        ("instance", "channels last"),
        ("group", "every second sample"),
        ("group", "samples backwards"),
        ("group", "one sample repeated"),
        ("layer", "every second row"),
        ("layer over all but samples", "every second sample"),
        ("layer over channels", "c"),
        ("layer over channels", "channels last"),
        ("batch", "fortran"),
    ],
)
def test_read_in_place(norm: str, strided: str) -> None:
    """What coalesces to the view is not copied."""
    assert plan_of(*NORMS[norm], STRIDED[strided]()).x is not None


@pytest.mark.parametrize(
    ("norm", "strided"),
    [
        ("layer", "every second column"),
        ("layer", "columns backwards"),
        ("instance", "every second column"),
        ("layer", "every second channel"),  # rows at two distances: no K0 holds them
        ("layer over all but samples", "some channels backwards"),
        ("instance", "cropped"),
    ],
)
def test_what_is_no_run_of_neighbours_is_copied(norm: str, strided: str) -> None:
    x = numbered((4, 12, 2, 5))[:, 8:2:-1] if strided == "some channels backwards" else STRIDED[strided]()
    work = plan_of(*NORMS[norm], x)
    assert work.x is None
    check_reads(x, work)


@st.composite
def views(draw: st.DrawFn) -> np.ndarray:
    """Return an array of distinct numbers, sliced, transposed, broadcast at random."""
    ndim = draw(st.integers(2, 5))
    x = numbered(tuple(draw(st.integers(1, 5)) for _ in range(ndim)))
    x = x[tuple(slice(None, None, draw(st.sampled_from([1, 1, 1, 2, -1, -2]))) for _ in range(ndim))]
    x = x.transpose(draw(st.permutations(range(ndim))))
    wanted = tuple(draw(st.integers(1, 3)) if n == 1 else n for n in x.shape)
    return np.broadcast_to(x, wanted)


@given(views(), st.data())
def test_placement_of_any_view(x: np.ndarray, data: st.DataObject) -> None:
    norm = data.draw(st.sampled_from(["batch", "instance", "layer"]))
    channel_axis = data.draw(st.integers(0, x.ndim - 1))
    axes = data.draw(st.lists(st.integers(0, x.ndim - 1), min_size=1, unique=True).map(tuple))
    work = plan_of(norm, (channel_axis, None, axes if norm == "layer" else None), x)
    assert work.size == x.size
    check_reads(x, work)


MASKS = [(4, 6, 2, 5), (1, 6, 2, 5), (4, 1, 2, 5), (4, 1, 1, 1), (1, 6, 1, 1), (1, 1, 2, 5), (1, 1, 1, 5), (1, 1, 1, 1)]


@pytest.mark.parametrize("mask_shape", MASKS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_mask_is_read_as_it_is_broadcast(norm: str, mask_shape: tuple[int, ...]) -> None:
    x = STRIDED["c"]()
    bits = np.random.default_rng(1).random(mask_shape) < 0.5
    mask = np.broadcast_to(bits, x.shape)
    work = plan_of(*NORMS[norm], x, mask=mask.strides)
    expected = mask.transpose(work.layout.order).reshape(work.layout.view)
    placement = work.packed if work.mask is None else work.mask
    read = packed(mask, contiguous(x.shape, mask.dtype, work.layout.order)) if work.mask is None else mask
    span = span_of(read, placement)
    constant = work.mask is not None and work.mask.strides[3] == 0
    np.testing.assert_array_equal(through(placement, span, work, constant=constant), expected)


@pytest.mark.parametrize(
    ("shape", "strides", "order"),
    [
        ((2, 3, 4), (48, 16, 4), (0, 1, 2)),
        ((2, 3, 4), (48, 4, 12), (0, 2, 1)),
        ((2, 3, 4), (4, 8, 24), (2, 1, 0)),
        ((2, 3, 4), (-48, 4, -12), (0, 2, 1)),
        ((1, 3, 4), (999, 16, 4), (0, 1, 2)),
        ((2, 3, 4), (0, 4, 12), (0, 2, 1)),
    ],
)
def test_memory_order(shape: tuple[int, ...], strides: tuple[int, ...], order: tuple[int, ...]) -> None:
    assert memory_order(shape, strides, 4) == order


def test_memory_order_of_every_permutation() -> None:
    x = np.empty((2, 3, 4, 5), np.float32)
    for axes in np.ndindex(4, 4, 4, 4):
        if len(set(axes)) == 4:
            turned = x.transpose(axes)
            order = memory_order(turned.shape, turned.strides, 4)
            assert turned.transpose(order).flags.c_contiguous


@pytest.mark.parametrize(
    ("norm", "shape", "columns"),
    [
        ("batch", (8, 3, 16, 16), False),
        ("batch", (8, 3, SHORT_RUN), False),
        ("batch", (8, 3, SHORT_RUN - 1), True),
        ("batch", (8, 3), True),
        ("instance", (8, 3, 100), False),
        ("layer", (8, 3, 100), False),
        ("layer", (8, 3, 2), False),  # (K0, 1, 1, 2): nothing runs beside anything
    ],
)
def test_which_kernel(norm: str, shape: tuple[int, ...], columns: bool) -> None:
    options = (1, None, (-1,)) if norm == "layer" else (1, None, None)
    assert plan_of(norm, options, np.empty(shape)).columns == columns


def test_inverse_brings_the_order_of_x_back() -> None:
    x = STRIDED["channels last"]()
    work = plan_of("batch", (1, None, None), x)
    assert work.inverse is not None
    y = np.empty([x.shape[a] for a in work.layout.order]).transpose(work.inverse)
    assert y.shape == x.shape
    assert y.strides == x.strides
    assert plan_of("batch", (1, None, None), STRIDED["c"]()).inverse is None


def test_plans_are_made_once() -> None:
    x = numbered((4, 6, 2, 5))
    assert plan_of(*NORMS["group"], x) is plan_of(*NORMS["group"], x.copy())
    assert plan_of(*NORMS["group"], x) is not plan_of(*NORMS["batch"], x)
