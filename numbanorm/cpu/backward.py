"""How prepared backward calls become launches: of whole groups, and of parts of groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..backend import Backward, Launch
from ..core.norms import L2
from ..core.plan import M2, Plan
from . import along_backward, columns_backward, rows, rows_backward
from .address import Address, address_type
from .bound import BOOL, FLOAT64_ADDRESS, GEOMETRY_ADDRESS, NONE, Bound, kind_of
from .engine import may_share, may_split, on_threads
from .launch import (
    by_row,
    geometry_of_backward,
    gradients_of,
    group_of_lanes,
    is_along,
    is_long,
    tiles_of,
    units_of_backward,
    variants_of_backward,
)
from .moments import ChunkMoments

CLAMPED = 1e-5
"""By how much a norm times its factor may be below 1 by rounding; more, and the factor was clamped.

Squares of 255 equal rows are added in float32: 1.7e-6 was seen between the factor and the exact one.
"""

COST = 2
"""How much longer a backward takes than a forward, at least: it pays to share one half as large."""

_NO_MEAN = np.zeros(1)

Counts = Callable[[int, Any, Any, Any], np.ndarray]
"""Of x, mask and rstd: what makes, for each group, the count that its formula divides by."""


class _Work:
    """What the launches of one backward call share: geometry, types, and what stands in for what is not there."""

    def __init__(self, call: Backward, *, fixed: bool = False, counted: bool = False) -> None:
        self.plan, self.fixed = call.plan, fixed
        layout = call.plan.layout
        self.geometry = geometry_of_backward(call, counted)
        self.lane_dtype = call.form.lane
        self.one = np.ones(layout.weights, call.form.lane)
        self.lane = address_type(call.form.lane)
        self.mask = NONE if call.mask is None or fixed else Address(BOOL)
        self.reads = kind_of(call.dy), kind_of(call.x)
        self.x = self.reads[1]
        means = FLOAT64_ADDRESS, FLOAT64_ADDRESS
        self.sums = (*self.reads, self.lane, *means, FLOAT64_ADDRESS)
        self.writes = (*self.reads, address_type(call.form.result), self.mask, self.lane, FLOAT64_ADDRESS, *means)

    def bound(self, kernel: Any, *kinds: Any, flags: tuple[Any, ...] = ()) -> Bound:
        """Bind a kernel to the call's geometry."""
        return Bound(kernel, self.geometry, flags, *kinds)

    @property
    def table(self) -> tuple[int, ...]:
        """Shape of the sums of all chunks."""
        g = self.geometry[0]
        if self.plan.columns:
            return tiles_of(self.geometry), int(g["chunks"]), 2, int(g["tile"])
        return self.plan.layout.groups, int(g["chunks"]), 2


class _Whole:
    """Sums and dx in one launch, slab by slab; then the slabs' gradients are added in order."""

    def __init__(self, work: _Work, counted: bool) -> None:
        plan = work.plan
        along = work.mask is NONE and not work.fixed and not counted and is_along(plan)
        module = columns_backward if plan.columns else along_backward if along else rows_backward
        self._work = work
        flags = variants_of_backward(work.geometry) if module is along_backward else ()
        self._kernel = work.bound(module.backward, *work.writes, FLOAT64_ADDRESS, work.lane, flags=flags)
        self._shape = gradients_of(work.geometry), 2, plan.layout.size
        self._units = units_of_backward(plan, work.geometry)
        self._add: Launch | None = None

    def alone(self, count: np.ndarray) -> Launch:
        """Return the launch on one thread where one count serves all groups."""
        kernel, shape, one = self._kernel.alone, self._shape, self._work.one
        unmasked = self._work.mask is NONE  # as where statistics are given: callers' masks mean nothing then

        def launch(dy: Any, x: Any, dx: Any, mask: Any, weight: Any, mean: Any, rstd: Any, gradients: Any) -> Any:
            w = one if weight is None else weight
            m = _NO_MEAN if mean is None else mean
            return kernel(dy, x, dx, None if unmasked else mask, w, count, m, rstd, np.empty(shape), gradients)

        return launch

    def __call__(self, threads: int, *arguments: Any) -> Any:
        *arrays, gradients = arguments
        if threads == 1 or self._units == 1:
            return self._kernel.alone(*arrays, np.empty(self._shape), gradients)
        if self._add is None:
            kinds = GEOMETRY_ADDRESS, FLOAT64_ADDRESS, self._work.lane
            self._add = rows_backward.add_slabs.bound(*kinds)
        slabs = np.zeros(self._shape)
        problem = self._kernel.on(threads, *arrays, slabs, gradients)
        if not problem:
            self._add(self._work.geometry, slabs, gradients)
        return problem


class _RowsSplit:
    """Sums of chunks first, then dx piece by piece: for rows too long to hold their gradients, or few groups."""

    def __init__(self, work: _Work, along: bool) -> None:
        self._work, self._along = work, along
        last = work.lane if along else FLOAT64_ADDRESS
        self._sums = work.bound(rows_backward.chunk_sums, *work.sums)
        self._merge = rows_backward.merge_sums.bound(GEOMETRY_ADDRESS, FLOAT64_ADDRESS, FLOAT64_ADDRESS)
        kernel = rows_backward.emit_lanes if along else rows_backward.emit
        self._emit = work.bound(kernel, *work.writes, FLOAT64_ADDRESS, *((last,) if along else ()))

    def sums(self, threads: int, dy: Any, x: Any, weight: Any, mean: Any, rstd: Any, sums: np.ndarray) -> Any:
        """Write the sums of every group, shape (2, groups)."""
        table = np.empty(self._work.table)
        problem = self._sums.on(threads, dy, x, weight, mean, rstd, table)
        if not problem:
            self._merge(self._work.geometry, table, sums)
        return problem

    def emit(self, threads: int, *arguments: Any) -> Any:
        """Write dx from the groups' sums; `emit_lanes` gradients, too."""
        return self._emit.on(threads, *arguments)

    def __call__(self, threads: int, *arguments: Any) -> Any:
        dy, x, dx, mask, weight, count, mean, rstd, gradients = arguments
        sums = np.empty((2, self._work.plan.layout.groups))
        # A group of one channel is summed without its weight: these sums are the gradients too.
        problem = self.sums(threads, dy, x, weight if self._along else self._work.one, mean, rstd, sums)
        if problem:
            return problem
        if self._along:
            return self.emit(threads, dy, x, dx, mask, weight, count, mean, rstd, sums, gradients)
        with np.errstate(all="ignore"):
            gradients[0], gradients[1] = sums[1], sums[0]
            weighted = sums * weight
        return self.emit(threads, dy, x, dx, mask, weight, count, mean, rstd, weighted)


class _ColumnsSplit:
    """The same for columns of one K0: sums of all chunks of all tiles, then dx."""

    def __init__(self, work: _Work) -> None:
        self._work = work
        self._sums = work.bound(columns_backward.chunk_sums, *work.sums)
        self._emit = work.bound(columns_backward.emit, *work.writes, FLOAT64_ADDRESS, FLOAT64_ADDRESS)

    def sums(self, threads: int, dy: Any, x: Any, weight: Any, mean: Any, rstd: Any) -> tuple[Any, np.ndarray]:
        """Return the problem, if there is one, and the sums of every lane of every chunk."""
        table = np.zeros(self._work.table)
        return self._sums.on(threads, dy, x, weight, mean, rstd, table), table

    def emit(self, threads: int, *arguments: Any) -> Any:
        """Write dx from such sums, and gradients of weights."""
        return self._emit.on(threads, *arguments)

    def __call__(self, threads: int, *arguments: Any) -> Any:
        dy, x, dx, mask, weight, count, mean, rstd, gradients = arguments
        problem, table = self.sums(threads, dy, x, weight, mean, rstd)
        if problem:
            return problem
        total = np.zeros((2, self._work.plan.layout.size))
        problem = self.emit(threads, dy, x, dx, mask, weight, count, mean, rstd, table, total)
        with np.errstate(all="ignore"):
            gradients[...] = total
        return problem


def prepare_backward(call: Backward, fixed: bool = False) -> Launch:
    """Return ``launch(dy, x, dx, mask, weight, mean, rstd, gradients)``.

    It writes dx and, to `gradients`, shape (2, size) in the lanes' dtype, dweight and dbias. `fixed`: the statistics do
    not depend on x.
    """
    plan = call.plan
    counts = None if fixed else _counts_of(call)
    work = _Work(call, fixed=fixed, counted=counts is not None)
    count = np.full(1, 0.0 if fixed else plan.layout.count, np.float64)
    long = not plan.columns and is_long(plan)
    # Compiled when they are needed: seconds.
    whole = None if long else _Whole(work, counts is not None)
    split: list[Callable[..., Any]] = [_RowsSplit(work, True)] if long else []
    if whole is not None and counts is None and not may_share(COST * plan.size):
        return whole.alone(count)
    few = _few_units(plan, work.geometry)

    def run(
        threads: int, dy: Any, x: Any, dx: Any, mask: Any, weight: Any, mean: Any, rstd: Any, gradients: Any
    ) -> Any:
        mask = None if fixed else mask
        of = count if counts is None else counts(threads, x, mask, rstd)
        w = work.one if weight is None else weight
        arrays = (dy, x, dx, mask, w, of, _NO_MEAN if mean is None else mean, rstd, gradients)
        if whole is not None and not (few < threads and may_split(COST * plan.size)):
            return whole(1 if few < threads else threads, *arrays)
        if not split:
            split.append(_ColumnsSplit(work) if plan.columns else _RowsSplit(work, False))
        return split[0](threads, *arrays)

    return on_threads(COST * plan.size, run)


def _few_units(plan: Plan, geometry: np.ndarray) -> float:
    """Return how many units the one launch has where it can be split instead; else infinity."""
    layout = plan.layout
    k0, _, k1, _ = layout.view
    if k0 != 1:
        return np.inf
    if plan.columns:
        return np.inf if by_row(plan, geometry) else tiles_of(geometry)
    return k1 if layout.inner != 1 and layout.size == k1 else np.inf


def _counts_of(call: Backward) -> Counts | None:
    """Return what makes the counts of groups where they are not all the same."""
    if call.record.scale == L2:
        return _unclamped(call)
    return None if call.mask is None else _marked(call)


def _marked(call: Backward) -> Counts:
    """Return what counts the elements that a mask lets in."""
    plan = call.plan
    kernel = Bound(rows.count, geometry_of_backward(call), (), Address(BOOL), FLOAT64_ADDRESS)

    def counts(threads: int, x: Any, mask: Any, rstd: Any) -> np.ndarray:
        result = np.empty(plan.layout.groups)
        kernel.on(threads, mask, result)
        return result

    return counts


def _unclamped(call: Backward) -> Counts:
    """Return what tells groups whose factor is 1/norm, 1, from those whose factor is clamped, and a constant, 0."""
    plan = call.plan
    work = _Work(call)
    moments = ChunkMoments(plan, work.geometry, work.x, NONE, work.lane)

    def counts(threads: int, x: Any, mask: Any, rstd: Any) -> np.ndarray:
        stats = np.empty((4, plan.layout.groups))
        moments(threads, x, None, work.one, stats, 0.0)
        with np.errstate(all="ignore"):
            clamped = np.sqrt(stats[M2]) * rstd.ravel("K") < 1.0 - CLAMPED
        return np.where(clamped, 0.0, 1.0)

    return counts


def prepare_partial_sums(call: Backward) -> Launch:
    """Return ``launch(dy, x, weight, mean, rstd, sums)``.

    It writes the sums of ``g`` and ``g * (x - mean) * rstd`` over each group's part, float64, shape (2, groups). For
    the columns kernel K0 is 1.
    """
    plan = call.plan
    work = _Work(call)
    if not plan.columns:
        split = _RowsSplit(work, _weights_along(plan))

        def of_rows(threads: int, dy: Any, x: Any, weight: Any, mean: Any, rstd: Any, sums: np.ndarray) -> Any:
            w, m = work.one if weight is None else weight, _NO_MEAN if mean is None else mean
            return split.sums(threads, dy, x, w, m, rstd, sums)

        return on_threads(COST * plan.size, of_rows)
    columns = _ColumnsSplit(work)
    groups, lanes = group_of_lanes(plan, work.geometry), int(work.geometry[0]["lanes"])

    def of_columns(threads: int, dy: Any, x: Any, weight: Any, mean: Any, rstd: Any, sums: np.ndarray) -> Any:
        w, m = work.one if weight is None else weight, _NO_MEAN if mean is None else mean
        problem, table = columns.sums(threads, dy, x, w, m, rstd)
        sums[...] = 0.0
        with np.errstate(all="ignore"):
            for total, row in zip(sums, table.sum(axis=1).transpose(1, 0, 2).reshape(2, -1), strict=True):
                np.add.at(total, groups, row[:lanes])
        return problem

    return on_threads(COST * plan.size, of_columns)


def prepare_partial_gradient(call: Backward) -> Launch:
    """Return ``launch(dy, x, dx, mask, weight, mean, rstd, means, gradients)``.

    It writes dx of a part from the means over whole groups of what `prepare_partial_sums` sums, shape (2, groups), and,
    where weights lie along the groups, dweight and dbias to `gradients`, shape (2, size) in the lanes' dtype.
    """
    plan = call.plan
    work = _Work(call)
    emit = _emit_columns(work) if plan.columns else _emit_rows(work)
    one = np.ones(1)

    def run(
        threads: int, dy: Any, x: Any, dx: Any, mask: Any, weight: Any, mean: Any, rstd: Any, means: Any, gradients: Any
    ) -> Any:
        w, m = work.one if weight is None else weight, _NO_MEAN if mean is None else mean
        return emit(means, gradients, threads, dy, x, dx, mask, w, one, m, rstd)

    return on_threads(COST * plan.size, run)


def _weights_along(plan: Plan) -> bool:
    layout = plan.layout
    return not layout.record.by_channel and layout.size == layout.view[3] and 1 in (layout.inner, layout.size)


def _emit_rows(work: _Work) -> Callable[..., Any]:
    layout = work.plan.layout
    along = _weights_along(work.plan)
    split = _RowsSplit(work, along)
    _, _, k1, r1 = layout.view
    weight_of_group = np.arange(k1) * r1 // layout.inner % layout.size

    def emit(means: np.ndarray, gradients: np.ndarray, threads: int, *arrays: Any) -> Any:
        if along:
            return split.emit(threads, *arrays, np.ascontiguousarray(means), gradients)
        with np.errstate(all="ignore"):
            weighted = (means.reshape(2, -1, k1) * arrays[4][weight_of_group]).reshape(2, -1)
        return split.emit(threads, *arrays, weighted)

    return emit


def _emit_columns(work: _Work) -> Callable[..., Any]:
    split = _ColumnsSplit(work)
    groups, first = np.unique(group_of_lanes(work.plan, work.geometry), return_index=True)
    tile, lane = np.divmod(first, int(work.geometry[0]["tile"]))
    size = work.plan.layout.size

    def emit(means: np.ndarray, gradients: np.ndarray, threads: int, *arrays: Any) -> Any:
        # The kernel adds up the lanes of a group: its sums go to the group's first lane of the first chunk.
        table = np.zeros(work.table)
        table[tile, 0, :, lane] = means[:, groups].T
        return split.emit(threads, *arrays, table, np.zeros((2, size)))

    return emit
