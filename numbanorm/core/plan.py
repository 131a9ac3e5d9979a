"""Plan: where the elements of given arrays lie in a Layout's view, worked out once for each shape and strides.

Like `Layout`, this is arithmetic on shapes; it never touches the elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np

from .layout import Layout

COUNT, MEAN, M2, RSTD = range(4)
"""Rows of a backend's array of statistics, one column a group: count, mean, M2, 1/sqrt(variance + eps); float64."""

Options = tuple[int, int | None, tuple[int, ...] | None]
"""What `Layout.of` needs beside norm and shape: (channel_axis, num_groups, axis)."""


@dataclass(frozen=True)
class Placement:
    """How one array is read in a view: offset and strides in elements over its own span of memory.

    Attributes
    ----------
    start : int
        Offset of the first element from the lowest address of the array.
    span : int
        Elements between the lowest and the highest address, both included.
    strides : tuple of int
        Strides along K0, R0, K1, R1.
    """

    start: int
    span: int
    strides: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Plan:
    """One call's layout and the placements of its arrays.

    Attributes
    ----------
    layout : Layout
        The norm's maps, in the order of memory of `x`.
    columns : bool
        Which kernel reads the view: columns (lanes along K1 and R1) or rows (runs along R1).
    x, y, mask : Placement or None
        Where the elements lie. None: the array must be copied to be read (for `mask`: or there is none).
    packed : Placement
        The placement of a copy, and of a fresh output: contiguous in ``layout.order``.
    inverse : tuple of int or None
        The transposition that brings an array of the view's order back to that of `x`; None if it is the same.
    reordered : bool
        Whether the layout has an order of its own, not that of `x`: a fresh output in it is not laid out as `x` is.
    size : int
        Number of elements.
    """

    layout: Layout
    columns: bool
    x: Placement | None
    y: Placement | None
    mask: Placement | None
    packed: Placement
    inverse: tuple[int, ...] | None
    reordered: bool
    size: int


SHORT_RUN = 32
"""Runs along R1 shorter than this go to the columns kernel: calling a loop for each costs more than merging lanes."""

MANY_RUNS = 128
"""Runs a group from which merging lanes, once a group, is cheap enough for runs four times as long."""


@lru_cache(maxsize=4096)
def plan(
    norm: str,
    options: Options,
    shape: tuple[int, ...],
    x: tuple[tuple[int, ...], int],
    y: tuple[tuple[int, ...], int] | None = None,
    mask: tuple[int, ...] | None = None,
    separable: bool = False,
) -> Plan:
    """Plan one call.

    Parameters
    ----------
    norm : str
        A key of `numbanorm.layout.NORMS`.
    options : tuple
        ``(channel_axis, num_groups, axis)`` as `Layout.of` takes them.
    shape : tuple of int
        Shape of the input.
    x, y : tuple
        Strides in bytes and item size of the input, and of the output where the caller gave one.
    mask : tuple of int, optional
        Strides in bytes of the mask, broadcast to `shape`.
    separable : bool, optional
        As `Layout.of` takes it; backward needs it.
    """
    channel_axis, num_groups, axis = options
    order = memory_order(shape, *x)
    layout = Layout.of(
        norm,
        shape,
        channel_axis=channel_axis,
        num_groups=num_groups,
        axis=axis,
        order=order,
        separable=separable,
    )
    _, r0, k1, r1 = layout.view
    short = SHORT_RUN if r0 < MANY_RUNS else 4 * SHORT_RUN
    columns = r1 < short and k1 > 1 and (r0 > 1 or r1 == 1)
    if columns and not separable and layout.record.weights_by_sample:  # a lane's weight is the same in all its rows
        return plan(norm, options, shape, x, y, mask, separable=True)
    reordered = tuple(shape[a] for a in layout.order)
    strides = tuple(prod(reordered[i + 1 :]) for i in range(len(shape)))
    packed = _place(layout, columns, tuple(strides[layout.order.index(a)] for a in range(len(shape))), 1)
    assert packed is not None
    plain = layout.order == tuple(range(len(shape)))
    return Plan(
        layout=layout,
        columns=columns,
        x=_place(layout, columns, *x),
        y=packed if y is None else _place(layout, columns, *y),
        mask=None if mask is None else _place(layout, columns, mask, 1, constant=True),
        packed=packed,
        inverse=None if plain else tuple(layout.order.index(a) for a in range(len(shape))),
        reordered=layout.order != order,
        size=prod(shape),
    )


def memory_order(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the axes from the slowest to the fastest in memory; axes of length 1 or stride 0 come first.

    Examples
    --------
    >>> memory_order((2, 3, 4), (48, 4, 12), 4)
    (0, 2, 1)
    """
    axes = range(len(shape))
    if all(shape[a] == 1 or strides[a] == itemsize * prod(shape[a + 1 :]) for a in axes):
        return tuple(axes)
    return tuple(sorted(axes, key=lambda a: (shape[a] > 1 and strides[a] != 0, -abs(strides[a]))))


def _place(
    layout: Layout, columns: bool, strides: tuple[int, ...], itemsize: int, *, constant: bool = False
) -> Placement | None:
    """Return where an array lies in the view, or None where the view's innermost elements are not neighbours.

    With `constant`, they may also be one and the same element (a mask broadcast along them).
    """
    if 0 in layout.shape:
        return Placement(0, 0, (0, 0, 0, 0))
    if any(s % itemsize for s in strides):
        return None
    # An array of no memory with these strides: NumPy itself tells whether its axes coalesce to the view.
    ghost = np.lib.stride_tricks.as_strided(np.empty(0, f"V{itemsize}"), layout.shape, strides)
    try:
        view = ghost.transpose(layout.order).reshape(layout.view, copy=False)
    except ValueError:
        return None
    steps = [s // itemsize if n > 1 else 0 for n, s in zip(layout.view, view.strides, strict=True)]
    _, _, k1, r1 = layout.view
    inner = ([(steps[3], 1)] if r1 > 1 else []) + ([(steps[2], r1)] if columns and k1 > 1 else [])
    is_constant = constant and all(step == 0 for step, _ in inner)
    if not is_constant and any(step != wanted for step, wanted in inner):
        return None
    reach = [(n - 1) * s // itemsize for n, s in zip(layout.shape, strides, strict=True)]
    return Placement(
        start=-sum(min(r, 0) for r in reach),
        span=1 + sum(abs(r) for r in reach),
        strides=(steps[0], steps[1], steps[2], 0 if is_constant else 1),
    )
