"""The columns kernels: groups that run across memory, in the view (K0, rows, lanes).

A thread keeps the moments of some neighbouring lanes while rows of a chunk stream past; the threads below each other in
a block merge, then chunks and the lanes of a group, in order. Then all is read again and written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from ..core.norms import STD
from ..core.plan import Plan
from . import affine, launch, memory
from . import lanes as ln
from .launch import Call, Columns, item_size
from .memory import Span
from .toolchain import Kernel, cuda, device, types
from .welford import GAIN, SAFE, SMALL, moments, rstd_function, table_moments


@cache
def moments_kernel(c: Columns) -> Kernel:
    """Return the kernel that writes (count, mean, M2) of every lane and chunk to the table."""
    lane = types.float64 if c.wide else types.float32
    scalar = np.float64 if c.wide else np.float32
    load = memory.loader(c.source, lane, c.vector, c.loads, "rows")
    chosen_of = memory.chooser(c.mask, c.vector, c.loads, "rows")
    write_number = memory.write_number
    of_tile, merge = moments(lane, c.vector, c.centred)
    tile_moments = of_tile(c.vector * c.loads)
    merge_numbers = moments(types.float64, 1, True).merge
    tile = ln.tile(c.vector * c.loads)
    zeros = ln.count(c.vector, lane)
    pick, like, some, put = ln.pick, ln.like, ln.some, ln.put
    widened = identity if c.wide else ln.widened
    least, most, small = scalar(SAFE[lane][0]), scalar(SAFE[lane][1]), scalar(SMALL[lane])
    up, down, one, zero = scalar(GAIN[lane]), scalar(1 / GAIN[lane]), scalar(1), scalar(0)
    high, low = np.float64(1 / GAIN[lane]), np.float64(GAIN[lane])
    ints = np.int64
    across, below, vector = np.int64(c.across), np.int64(c.block // c.across), np.int64(c.vector)
    width = np.int64(c.across * c.vector)
    held = c.block * c.vector
    slots = 3 * held
    plane = np.int64(held)
    threads = np.int64(c.block)
    whole_tile = below * np.int64(c.loads)
    source_size = item_size(c.source)
    masked_lanes = c.mask == "elements"

    def columns_moments(
        x, mask, table,
        tiles, chunks, chunk_rows, rows, lanes, plane_stride, x_K0, x_R0, mask_K0, mask_R0,
    ):  # fmt: skip
        shared = cuda.shared.array(slots, types.float64)
        number = ints(cuda.threadIdx.x)
        unit = ints(cuda.blockIdx.x)
        k0 = unit // (chunks * tiles)
        chunk = unit // tiles - k0 * chunks
        first = unit % tiles * width
        ty = number // across
        column = first + number % across * vector
        x_at = x + (k0 * x_K0 + column) * source_size
        mask_at = mask + k0 * mask_K0
        if masked_lanes:
            mask_at += column
        start = chunk * chunk_rows + ty
        limit = min((chunk + 1) * chunk_rows, rows)
        if column >= lanes:
            limit = ints(0)
        nothing = chosen_of(mask_at, ints(0), below, ints(0), ints(1), mask_R0)
        n = hi = lo = squares = zeros(nothing)
        gain = like(n, one)
        for attempt in range(2):
            n = hi = lo = squares = zeros(nothing)
            p = start
            while p < limit:
                values = load(x_at, p, below, limit, ints(1), x_R0) * tile(gain)
                chosen = chosen_of(mask_at, p, below, limit, ints(1), mask_R0)
                n2, hi2, lo2, squares2 = tile_moments(values, chosen)
                n, hi, lo, squares = merge(n, hi, lo, squares, n2, hi2, lo2, squares2)
                p += whole_tile
            size = pick(hi < zero, hi * (zero - one), hi)
            good = pick(squares > least, like(n, one), pick(size > small, like(n, one), like(n, zero)))
            good = pick(squares < most, good, like(n, zero))
            if attempt > 0 or not some(good < one):
                break
            gain = pick(good < one, pick(squares < one, like(n, up), like(n, down)), gain)
        back = like(widened(n), 1.0)
        for_up, for_down = like(back, high), like(back, low)
        back = pick(gain > one, for_up, pick(gain < one, for_down, back))
        at = ty * width + number % across * vector
        put(shared, at, widened(n))
        put(shared, plane + at, (widened(hi) + widened(lo)) * back)
        put(shared, 2 * plane + at, widened(squares) * back * back)
        cuda.syncthreads()
        one_of = number
        while one_of < width and first + one_of < lanes:
            count = mean = rest = m2 = 0.0
            for row in range(below):
                i = row * width + one_of
                count, mean, rest, m2 = merge_numbers(
                    count, mean, rest, m2, shared[i], shared[plane + i], 0.0, shared[2 * plane + i]
                )
            entry = (k0 * chunks + chunk) * lanes + first + one_of
            write_number(table, entry, count)
            write_number(table, plane_stride + entry, mean + rest)
            write_number(table, 2 * plane_stride + entry, m2)
            one_of += threads

    return Kernel(columns_moments, (c,), c.block)


@cache
def close_kernel(team: int, block: int, scale: str = STD) -> Kernel:
    """Return the kernel that merges the table's entries of every group into its statistics."""
    from_table, rstd_of = table_moments(team), rstd_function(scale)
    write_number = memory.write_number
    step, teams = np.int64(team), np.int64(block // team)
    ints = np.int64

    def close(table, stats, groups, K1, K0_stride, K1_stride, entries, across, stride, plane, eps):
        number = ints(cuda.threadIdx.x)
        group = ints(cuda.blockIdx.x) * teams + number // step
        there = group < groups
        group = min(group, groups - 1)
        k0 = group // K1
        start = k0 * K0_stride + (group - k0 * K1) * K1_stride
        thread = number % step
        count, mean, m2 = from_table(table, start, entries, across, stride, plane, thread)
        if thread == 0 and there:
            write_number(stats, group, count)
            write_number(stats, groups + group, mean)
            write_number(stats, 2 * groups + group, m2)
            write_number(stats, 3 * groups + group, rstd_of(count, m2, eps))

    return Kernel(close, (team, block, scale), block)


@device
def identity(value):
    """Return float64 lanes as they are, where float32 lanes would be widened or narrowed."""
    return value


@cache
def spread(c: Columns) -> Any:
    """Return the function that gives a thread's lanes their gain, mean in two parts, and rstd, from the statistics."""
    gather = affine.gatherer("element", types.float64, c.vector, 1, "flat")
    narrowed = identity if c.wide else ln.narrowed
    widened = identity if c.wide else ln.widened
    pick, like = ln.pick, ln.like
    lane = types.float64 if c.wide else types.float32
    up, down, large, small = GAIN[lane], 1 / GAIN[lane], GAIN[lane] ** 0.75, GAIN[lane] ** -0.75
    centred = c.centred
    ints = np.int64

    @device
    def of_lanes(means, rstds, group, column, K1, R1):
        place = ints(0), ints(1), ints(1), ints(1), ints(0)
        rstd = gather(rstds + group * 8, column, *place, R1, K1)
        mean = like(rstd, 0.0)
        if centred:
            mean = gather(means + group * 8, column, *place, R1, K1)
        one = like(rstd, 1.0)
        gain = pick(rstd > large, like(rstd, up), pick(rstd < small, like(rstd, down), one))
        back = pick(rstd > large, like(rstd, down), pick(rstd < small, like(rstd, up), one))
        mean = mean * gain
        hi = narrowed(mean)
        return narrowed(gain), hi, narrowed(mean - widened(hi)), narrowed(rstd * back)

    return of_lanes


@cache
def apply_kernel(c: Columns) -> Kernel:
    """Return the kernel that normalizes with given statistics."""
    lane = types.float64 if c.wide else types.float32
    scalar = np.float64 if c.wide else np.float32
    geometry = (lane, c.vector, c.loads, "rows")
    load = memory.loader(c.source, *geometry)
    by_row = c.weights == "piece"
    store = affine.affine_storer(
        c.result, *geometry, "piece" if by_row and c.weight else "", "piece" if by_row and c.bias else ""
    )
    gather = affine.gatherer("element" if by_row else c.weights, lane, c.vector, 1, "flat")
    weighted, biased = c.weight and not by_row, c.bias and not by_row
    along = c.weights == "along"
    lanes_of = spread(c)
    tile, like = ln.tile(c.vector * c.loads), ln.like
    zero = scalar(0)
    ints = np.int64
    across, below, vector = np.int64(c.across), np.int64(c.block // c.across), np.int64(c.vector)
    width = np.int64(c.across * c.vector)
    whole_tile = below * np.int64(c.loads)
    source_size, result_size = item_size(c.source), item_size(c.result)
    centred = c.centred

    def columns_apply(
        x, y, weight, bias, stats,
        tiles, chunks, chunk_rows, rows, lanes, groups, K1, R1, x_K0, x_R0, y_K0, y_R0, inner, size,
    ):  # fmt: skip
        number = ints(cuda.threadIdx.x)
        unit = ints(cuda.gridDim.x) - 1 - ints(cuda.blockIdx.x)  # backwards: what was read last is still in L2
        k0 = unit // (chunks * tiles)
        chunk = unit // tiles - k0 * chunks
        column = unit % tiles * width + number % across * vector
        if column < lanes:
            x_at = x + (k0 * x_K0 + column) * source_size
            y_at = y + (k0 * y_K0 + column) * result_size
            means, rstds = stats + groups * 8, stats + 3 * groups * 8
            gain, hi, lo, scale = lanes_of(means, rstds, k0 * K1, column, K1, R1)
            add = like(scale, zero)
            channel = column % size if along else column
            place = ints(0), ints(1), ints(1), ints(1), ints(0)
            if weighted:
                scale = scale * gather(weight, channel, *place, inner, size)
            if biased:
                add = gather(bias, channel, *place, inner, size)
            p = chunk * chunk_rows + number // across
            limit = min((chunk + 1) * chunk_rows, rows)
            flat = k0 * rows * lanes + column
            while p < limit:
                values = load(x_at, p, below, limit, ints(1), x_R0) * tile(gain)
                if centred:
                    values = (values - tile(hi)) - tile(lo)
                values = values * tile(scale)
                if biased:
                    values = values + tile(add)
                store(y_at, p, below, limit, ints(1), y_R0, values, weight, bias, flat, lanes, inner, size)
                p += whole_tile

    return Kernel(columns_apply, (c,), c.block)


def statistics(
    plan: Plan,
    call: Call,
    addresses: tuple[int, ...],
    stream: int,
    workspace: Callable[[int], Span],
    eps: float = 0.0,
) -> None:
    """Write statistics: of every lane and chunk, then merged."""
    x, _, _, _, mask, _, _, stats = addresses
    part = launch.columns(plan, call, "moments")
    table = workspace(24 * part.entries).address
    moments_kernel(part.choice)(part.blocks, stream, x + part.starts[0], mask + part.starts[2], table, *part.numbers)
    close(plan, part, table, stats, eps, stream)


def close(plan: Plan, part: launch.ColumnsLaunch, table: int, stats: int, eps: float, stream: int) -> None:
    """Merge the table of `moments_kernel` into statistics."""
    end = launch.close(plan, part)
    close_kernel(end.team, end.block, end.scale)(end.blocks, stream, table, stats, *end.numbers, eps)


def forward(
    plan: Plan, call: Call, addresses: tuple[int, ...], eps: float, stream: int, workspace: Callable[[int], Span]
) -> None:
    """Normalize: statistics in two launches, then the output."""
    statistics(plan, call, addresses, stream, workspace, eps)
    apply(plan, call, addresses, stream)


def apply(plan: Plan, call: Call, addresses: tuple[int, ...], stream: int) -> None:
    """Normalize with given statistics."""
    x, _, _, y, _, weight, bias, stats = addresses
    part = launch.columns(plan, call, "apply")
    apply_kernel(part.choice)(
        part.blocks, stream, x + part.starts[0], y + part.starts[1], weight, bias, stats, *part.numbers
    )
