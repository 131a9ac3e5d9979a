"""Backward of the columns kernels: sums of every lane and chunk, merged, then dx; the formulas are `rows_backward`'s.

Gradients of weights that lie along the lanes come from the lanes' sums, those of weights that lie along the rows from
sums over each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from ..core.norms import L2
from ..core.plan import Plan
from . import affine, memory
from . import lanes as ln
from .columns import identity, spread
from .launch import Call, Columns, item_size
from .launch_backward import Backward, ColumnsBackward, as_sums, columns_backward, weighing
from .memory import Span
from .rows_backward import merge_groups, merge_weights
from .toolchain import Kernel, cuda, types
from .welford import add, team


@cache
def sums_kernel(c: Columns) -> Kernel:
    """Return the kernel that writes sum(g), sum(g * h) and the count of every lane and chunk, float64.

    For the L2 norm it is sum(h * h) in place of the count. Weights that lie along the lanes are left out of g.
    """
    lane = types.float64 if c.wide else types.float32
    geometry = (lane, c.vector, c.loads, "rows")
    load_dy, load_x = memory.loader(c.result, *geometry), memory.loader(c.source, *geometry)
    chosen_of = memory.chooser(c.mask, c.vector, c.loads, "rows")
    weights = affine.gatherer("piece", *geometry)
    write_number = memory.write_number
    weighted = c.weight and c.weights == "piece"
    lanes_of = spread(c)
    fold, tile, count_of, put = ln.fold(c.vector), ln.tile(c.vector * c.loads), ln.count(c.vector, lane), ln.put
    widened = identity if c.wide else ln.widened
    ints = np.int64
    across, below, vector = np.int64(c.across), np.int64(c.block // c.across), np.int64(c.vector)
    width = np.int64(c.across * c.vector)
    held = c.block * c.vector
    slots, plane = 3 * held, np.int64(held)
    threads = np.int64(c.block)
    whole_tile = below * np.int64(c.loads)
    source_size, result_size = item_size(c.source), item_size(c.result)
    masked_lanes, of_norm = c.mask == "elements", c.scale == L2

    def columns_sums(
        dy, x, mask, weight, mean, rstd, table,
        tiles, chunks, chunk_rows, rows, lanes, groups, K1, R1,
        x_K0, x_R0, dy_K0, dy_R0, inner, size, plane_stride, mask_K0, mask_R0,
    ):  # fmt: skip
        shared = cuda.shared.array(slots, types.float64)
        number = ints(cuda.threadIdx.x)
        unit = ints(cuda.blockIdx.x)
        k0 = unit // (chunks * tiles)
        chunk = unit // tiles - k0 * chunks
        first = unit % tiles * width
        ty = number // across
        column = first + number % across * vector
        there = column < lanes
        p = chunk * chunk_rows + ty
        limit = min((chunk + 1) * chunk_rows, rows) if there else ints(0)
        column = column if there else ints(0)
        x_at = x + (k0 * x_K0 + column) * source_size
        dy_at = dy + (k0 * dy_K0 + column) * result_size
        mask_at = mask + k0 * mask_K0
        if masked_lanes:
            mask_at += column
        gain, hi, lo, scale = lanes_of(mean, rstd, k0 * K1, column, K1, R1)
        flat = k0 * rows * lanes + column
        nothing = chosen_of(mask_at, ints(0), below, ints(0), ints(1), mask_R0)
        a = b = n = count_of(nothing)
        while p < limit:
            d = load_dy(dy_at, p, below, limit, ints(1), dy_R0)
            h = load_x(x_at, p, below, limit, ints(1), x_R0) * tile(gain)
            h = ((h - tile(hi)) - tile(lo)) * tile(scale)
            if weighted:
                d = d * weights(weight, flat, p, below, limit, ints(1), lanes, inner, size)
            a = a + fold(d)
            b = b + fold(d * h)
            n = n + (fold(h * h) if of_norm else count_of(chosen_of(mask_at, p, below, limit, ints(1), mask_R0)))
            p += whole_tile
        at = ty * width + number % across * vector
        put(shared, at, widened(a))
        put(shared, plane + at, widened(b))
        put(shared, 2 * plane + at, widened(n))
        cuda.syncthreads()
        one_of = number
        while one_of < width and first + one_of < lanes:
            entry = (k0 * chunks + chunk) * lanes + first + one_of
            for which in range(3):
                s = 0.0
                for row in range(below):
                    s += shared[which * plane + row * width + one_of]
                write_number(table, which * plane_stride + entry, s)
            one_of += threads

    return Kernel(columns_sums, (c,), c.block)


@cache
def emit_kernel(c: Columns, fixed: bool) -> Kernel:
    """Return the kernel that writes dx from the groups' sums."""
    lane = types.float64 if c.wide else types.float32
    geometry = (lane, c.vector, c.loads, "rows")
    load_dy, load_x = memory.loader(c.result, *geometry), memory.loader(c.source, *geometry)
    store_dx = memory.storer(c.result, *geometry)
    chosen_of = memory.chooser(c.mask, c.vector, c.loads, "rows")
    by_row = c.weights == "piece"
    row_weights = affine.gatherer("piece", *geometry)
    lane_weights = affine.gatherer("element" if by_row else c.weights, lane, c.vector, 1, "flat")
    means_of = affine.gatherer("element", types.float64, c.vector, 1, "flat")
    narrowed = identity if c.wide else ln.narrowed
    weighted = c.weight
    along = c.weights == "along"
    lanes_of = spread(c)
    choose, like, tile = ln.choose, ln.like, ln.tile(c.vector * c.loads)
    centred = c.centred
    ints = np.int64
    across, below, vector = np.int64(c.across), np.int64(c.block // c.across), np.int64(c.vector)
    width = np.int64(c.across * c.vector)
    whole_tile = below * np.int64(c.loads)
    source_size, result_size = item_size(c.source), item_size(c.result)
    masked_lanes = c.mask == "elements"

    def columns_emit(
        dy, x, dx, mask, weight, mean, rstd, sums,
        tiles, chunks, chunk_rows, rows, lanes, groups, K1, R1,
        x_K0, x_R0, dy_K0, dy_R0, inner, size, plane_stride, mask_K0, mask_R0,
    ):  # fmt: skip
        number = ints(cuda.threadIdx.x)
        unit = ints(cuda.gridDim.x) - 1 - ints(cuda.blockIdx.x)  # backwards: what was read last is still in L2
        k0 = unit // (chunks * tiles)
        chunk = unit // tiles - k0 * chunks
        column = unit % tiles * width + number % across * vector
        if column < lanes:
            flat = k0 * rows * lanes + column
            x_at = x + (k0 * x_K0 + column) * source_size
            dy_at = dy + (k0 * dy_K0 + column) * result_size
            dx_at = dx + flat * result_size
            mask_at = mask + k0 * mask_K0
            if masked_lanes:
                mask_at += column
            gain, hi, lo, scale = lanes_of(mean, rstd, k0 * K1, column, K1, R1)
            place = ints(0), ints(1), ints(1), ints(1), ints(0)
            w = scale * gain
            if weighted and not by_row:
                w = w * lane_weights(weight, column % size if along else column, *place, inner, size)
            e_of = means_of(sums + (groups + k0 * K1) * 8, column, *place, R1, K1)
            c_of = like(e_of, 0.0)
            if centred:
                c_of = means_of(sums + k0 * K1 * 8, column, *place, R1, K1)
            c_lanes, e_lanes = narrowed(c_of) * scale * gain, narrowed(e_of) * scale * gain
            p = chunk * chunk_rows + number // across
            limit = min((chunk + 1) * chunk_rows, rows)
            while p < limit:
                d = load_dy(dy_at, p, below, limit, ints(1), dy_R0) * tile(w)
                if weighted and by_row:
                    d = d * row_weights(weight, flat, p, below, limit, ints(1), lanes, inner, size)
                if not fixed:
                    h = load_x(x_at, p, below, limit, ints(1), x_R0) * tile(gain)
                    h = ((h - tile(hi)) - tile(lo)) * tile(scale)
                    chosen = chosen_of(mask_at, p, below, limit, ints(1), mask_R0)
                    d = d - choose(chosen, h * tile(e_lanes) + tile(c_lanes))
                store_dx(dx_at, p, below, limit, ints(1), lanes, d)
                p += whole_tile

    return Kernel(columns_emit, (c, fixed), c.block)


@cache
def rows_kernel(c: Backward) -> Kernel:
    """Return the kernel that writes sum(dy) and sum(dy * h) of every row, float64."""
    lane = types.float64 if c.wide else types.float32
    scalar = np.float64 if c.wide else np.float32
    geometry = (lane, c.vector, c.loads, "flat")
    load_dy, load_x = memory.loader(c.result, *geometry), memory.loader(c.source, *geometry)
    statistic = affine.gatherer("element", types.float64, c.vector, c.loads, "flat")
    narrowed = identity if c.wide else ln.narrowed
    widened = identity if c.wide else ln.widened
    write_number = memory.write_number
    merged = team(lane, c.team, add)
    fold = ln.fold(1)
    centred = c.centred
    step, teams = np.int64(c.team), np.int64(c.block // c.team)
    whole_tile = np.int64(c.team * c.loads)
    source_size, result_size = item_size(c.source), item_size(c.result)
    zero = scalar(0)
    ints = np.int64

    def row_sums(dy, x, mean, rstd, table, all_rows, rows, pieces, K1, R1, x_K0, x_R0, dy_K0, dy_R0):
        thread = ints(cuda.threadIdx.x) % step
        unit = ints(cuda.blockIdx.x) * teams + ints(cuda.threadIdx.x) // step
        there = unit < all_rows
        unit = min(unit, all_rows - 1)
        k0 = unit // rows
        row = unit - k0 * rows
        limit = pieces if there else ints(0)
        group = k0 * K1 * 8
        a = b = none = zero
        p = thread
        while p < limit:
            place = p, step, limit, ints(1), ints(0)
            d = load_dy(dy + (k0 * dy_K0 + row * dy_R0) * result_size, *place)
            h = load_x(x + (k0 * x_K0 + row * x_R0) * source_size, *place)
            if centred:
                m = statistic(mean + group, ints(0), *place, R1, K1)
                hi = narrowed(m)
                h = (h - hi) - narrowed(m - widened(hi))
            h = h * narrowed(statistic(rstd + group, ints(0), *place, R1, K1))
            a += fold(d)
            b += fold(d * h)
            p += whole_tile
        a, b, none, none = merged(a, b, none, none)
        if thread == 0 and there:
            write_number(table, unit, np.float64(a))
            write_number(table, all_rows + unit, np.float64(b))

    return Kernel(row_sums, (c,), c.block)


def backward(plan: Plan, call: Call, addresses: tuple[int, ...], stream: int, workspace: Callable[[int], Span]) -> None:
    """Write dx, dweight and dbias."""
    dweight, dbias = addresses[7:]
    how = columns_backward(plan, call)
    dy, x, _, mask, weight, mean, rstd = arrays = _from_first(how, addresses[:7])
    table = workspace(how.workspace).address
    means = table + how.table
    _take_sums(how, (dy, x, mask, weight, mean, rstd), table, stream)
    merge_groups(how.groups, how.sums.choice.wide, table, weight, means, stream)
    _merge_weights(how, (dy, x, mean, rstd), table, dweight, dbias, stream)
    _emit(how, call, arrays, means, stream)


def partial_sums(
    plan: Plan, call: Call, addresses: tuple[int, ...], stream: int, workspace: Callable[[int], Span]
) -> None:
    """Write sum(g) and sum(g * h) of every group."""
    dy, x, weight, mean, rstd, result = addresses
    how = columns_backward(plan, call)
    dy, x, *_ = _from_first(how, (dy, x, 0, 0))
    table = workspace(how.workspace).address
    _take_sums(how, (dy, x, 0, weight, mean, rstd), table, stream)
    merge_groups(as_sums(how.groups), how.sums.choice.wide, table, weight, result, stream)


def partial_gradient(
    plan: Plan,
    call: Call,
    addresses: tuple[int, ...],
    weighted: bool,
    stream: int,
    workspace: Callable[[int], Span],
) -> None:
    """Write dx from the means of whole groups, and dweight and dbias if they have addresses: see `rows_backward`."""
    means, dweight, dbias = addresses[7:]
    how = columns_backward(plan, call)
    dy, x, _, mask, weight, mean, rstd = arrays = _from_first(how, addresses[:7])
    table = workspace(how.workspace).address
    if weighted:
        given, means = means, table + how.table
        merge_groups(weighing(plan), how.sums.choice.wide, given, weight, means, stream)
    if dweight:
        if how.rows is None:
            _take_sums(how, (dy, x, mask, weight, mean, rstd), table, stream)
        _merge_weights(how, (dy, x, mean, rstd), table, dweight, dbias, stream)
    _emit(how, call, arrays, means, stream)


def _from_first(how: ColumnsBackward, arrays: Sequence[int]) -> tuple[int, ...]:
    """Return the addresses of (dy, x, dx, mask, ...) with those of first elements for spans' lowest addresses."""
    dy, x, dx, mask, *rest = arrays
    starts = how.sums.starts
    return dy + starts[1], x + starts[0], dx, mask + starts[2], *rest


def _take_sums(how: ColumnsBackward, arrays: tuple[int, ...], table: int, stream: int) -> None:
    part = how.sums
    sums_kernel(part.choice)(part.blocks, stream, *arrays, table, *part.numbers)


def _merge_weights(
    how: ColumnsBackward, arrays: tuple[int, ...], table: int, dweight: int, dbias: int, stream: int
) -> None:
    """Queue the writing of dweight and dbias, from the lanes' sums or, where weights lie along the rows, the rows'."""
    if how.rows is not None:
        table += how.table + how.means
        rows_kernel(how.rows.choice)(how.rows.blocks, stream, *arrays, table, *how.rows.numbers)
    merge_weights(how.weights, how.sums.choice.wide, table, dweight, dbias, stream)


def _emit(how: ColumnsBackward, call: Call, arrays: tuple[int, ...], means: int, stream: int) -> None:
    part = how.emit
    emit_kernel(part.choice, call.fixed)(part.blocks, stream, *arrays, means, *part.numbers)
