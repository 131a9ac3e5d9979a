"""The rows kernel: groups of long contiguous runs, in the view (K0, R0, K1, R1).

A team of threads takes a group, or one chunk of it. Its threads hold tiles of it in registers; where one tile is all,
the output is written from there and memory is read once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np

from ..core.plan import Plan
from . import affine, launch, memory
from . import lanes as ln
from .cluster import show_to_cluster, wait_for_cluster
from .launch import Call, Launch, Rows, item_size
from .memory import Span
from .toolchain import Kernel, cuda, device, has_clusters, types
from .welford import ALL, WARP, around_mean, gain_for_rstd, gain_of, inverse_gain, moments, rstd_function, team, trust


@cache
def split_mean(wide):
    """Return the function that turns a float64 mean into two lanes."""
    lane = np.float64 if wide else np.float32

    @device
    def split(mean):
        hi = lane(mean)
        return hi, lane(mean - np.float64(hi))

    return split


@cache
def kernel(c: Rows) -> Kernel:
    """Return the kernel for a choice."""
    lane = types.float64 if c.wide else types.float32
    scalar = np.float64 if c.wide else np.float32
    ints = np.int64
    width = c.vector * c.loads
    geometry = (lane, c.vector, c.loads, c.rule)
    load = memory.loader(c.source, *geometry)
    load_sum = memory.loader(c.result, lane, c.vector, c.loads, c.rule)
    store = memory.storer(c.result, *geometry)
    chosen_of = memory.chooser(c.mask, c.vector, c.loads, c.rule)
    store_y = affine.affine_storer(c.result, *geometry, c.weight, c.bias, c.affine)
    rounded = memory.rounder(c.result, lane, width)
    of_tile, merge = moments(lane, 1, c.centred)
    tile_moments = of_tile(width)
    merged = team(lane, c.team, merge)
    around = around_mean(lane, width, c.team, c.centred, c.mask != "all", c.rule == "whole")
    first_of = ln.fold(1)
    load_first, round_first = memory.loader(c.source, lane, 1, 1, "flat"), memory.rounder(c.result, lane, 1)
    pivoted = c.held and c.centred and c.mask == "all" and c.takes == "x"
    vector = c.vector
    merge_two = moments(types.float64, 1, c.centred).merge
    of_warp, of_cluster = team(types.float64, WARP, merge_two), team(types.float64, launch.CLUSTER, merge_two)
    mean_in_lanes, gain_to_apply = split_mean(c.wide), gain_for_rstd(lane)
    trusted, gain_for = trust(lane), gain_of(lane)
    one, zero = scalar(1), scalar(0)
    teams = c.block // c.team
    read_number, write_number = memory.read_number, memory.write_number
    held, added, writes, centred, split, kept = c.held, c.added, c.writes, c.centred, c.split, c.kept
    joined, on_the_way = c.joined, c.held and c.takes == "x"
    from_x, from_stats, from_table_alone = c.takes == "x", c.takes == "stats", c.takes == "table"
    to_table, to_stats = c.leaves == "table", c.leaves == "stats"
    cluster = ints(launch.CLUSTER)
    block_wide = c.team > WARP
    whole_tile = np.int64(c.team * c.loads)
    step = np.int64(c.team)
    source_size, result_size = item_size(c.source), item_size(c.result)
    inverse_of, rstd_of = inverse_gain(lane), rstd_function(c.scale)

    @device
    def read(x, residual, total, p, limit, run, x_r0, total_r0):
        """Load a tile; with a residual form the sum, keep it and return it as it was rounded."""
        values = load(x, p, step, limit, run, x_r0)
        if added:
            values = rounded(values + load(residual, p, step, limit, run, x_r0))
            store(total, p, step, limit, run, total_r0, values)
        return values

    @device
    def from_table(table, start, entries, plane, number):
        """Merge the partial moments of a group, a warp for itself."""
        n = hi = lo = m2 = 0.0
        for i in range(number, entries, WARP):
            count, mean = read_number(table, start + i), read_number(table, plane + start + i)
            n, hi, lo, m2 = merge_two(n, hi, lo, m2, count, mean, 0.0, read_number(table, 2 * plane + start + i))
        n, hi, lo, m2 = of_warp(n, hi, lo, m2)
        return n, hi + lo, m2

    @device
    def first(x, residual, limit):
        """Return the first element of a group, as its tile has it."""
        limit = min(limit, ints(1))
        value = load_first(x, ints(0), ints(1), limit, ints(1), ints(0))
        if added:
            value = round_first(value + load_first(residual, ints(0), ints(1), limit, ints(1), ints(0)))
        return first_of(value)

    def rows(
        x, residual, total, y, mask, weight, bias, stats, table,
        units, chunks, chunk_pieces, pieces, run, K1, span, R1,
        x_K0, x_R0, x_K1, y_K0, y_R0, y_K1, mask_K0, mask_R0, mask_K1,
        inner, size, eps,
    ):  # fmt: skip
        thread = ints(cuda.threadIdx.x) % step
        packed_R0 = K1 * R1
        block = ints(cuda.blockIdx.x)
        if from_table_alone:
            block = ints(cuda.gridDim.x) - 1 - block  # backwards: what was read last is still in L2
        unit = block * teams + ints(cuda.threadIdx.x) // step
        there = unit < units
        unit = min(unit, units - 1)
        groups, group, chunk = units, unit, ints(0)
        if split:
            parts = cluster if joined else chunks
            groups = units // parts
            group = unit // parts
            chunk = unit - group * parts
        k0, k1 = group, ints(0)
        if kept:
            k0 = group // K1
            k1 = group - k0 * K1
        flat = k0 * span + k1 * R1
        x_at = x + (k0 * x_K0 + k1 * x_K1) * source_size
        residual_at = residual + (k0 * x_K0 + k1 * x_K1) * source_size
        total_at = total + flat * result_size
        y_at = y + (k0 * y_K0 + k1 * y_K1) * result_size
        mask_at = mask + k0 * mask_K0 + k1 * mask_K1
        start = chunk * chunk_pieces + thread
        limit = min((chunk + 1) * chunk_pieces, pieces)
        if not there:
            limit = ints(0)
        count = 0.0
        mean = 0.0
        m2 = 0.0
        rstd = 0.0
        pivot = zero
        if held:
            tile = read(x_at, residual_at, total_at, start, limit, run, x_R0, packed_R0)
        if pivoted:
            pivot = first(x_at, residual_at, limit)
        gain = one
        hi = lo = zero
        if from_x and held:
            chosen = chosen_of(mask_at, start, step, limit, run, mask_R0)
            here = scalar(max(limit - (start - thread), ints(0)) * vector)
            n, hi, lo, squares, rest = around(tile, chosen, here, pivot)
            good = trusted(hi, squares)
            if (block_wide and not good) or (not block_wide and cuda.any_sync(ALL, not good)):
                if not good:
                    gain = gain_for(squares)
                if block_wide:
                    cuda.syncthreads()  # the sums have been read
                # Read once more, rather than kept so long: 125 registers would be 80.
                tile = read(x_at, residual_at, total_at, start, limit, run, x_R0, packed_R0)
                n, hi, lo, squares, rest = around(tile * gain, chosen, here, pivot * gain)
        elif from_x:
            n = hi = lo = squares = zero
            for attempt in range(2):
                n = hi = lo = squares = zero
                p = start
                while p - thread < limit:
                    values = read(x_at, residual_at, total_at, p, limit, run, x_R0, packed_R0)
                    chosen = chosen_of(mask_at, p, step, limit, run, mask_R0)
                    n2, hi2, lo2, squares2 = tile_moments(values * gain, chosen)
                    n, hi, lo, squares = merge(n, hi, lo, squares, n2, hi2, lo2, squares2)
                    p += whole_tile
                n, hi, lo, squares = merged(n, hi, lo, squares)
                if attempt > 0 or trusted(hi, squares):
                    break
                gain = gain_for(squares)
        if from_x:
            count = np.float64(n)
            undo = inverse_of(gain)
            mean, m2 = (np.float64(hi) + np.float64(lo)) * undo, np.float64(squares) * undo * undo
        elif from_stats:
            mean = read_number(stats, groups + group)
            rstd = read_number(stats, 3 * groups + group)
        else:
            count, mean, m2 = from_table(table, group * chunks, chunks, units, thread % WARP)
        if joined:  # pragma: no cover (the simulator has no clusters)
            if thread == 0:
                write_number(table, unit, count)
                write_number(table, units + unit, mean)
                write_number(table, 2 * units + unit, m2)
                show_to_cluster()
            wait_for_cluster()
            # As `from_table`, to the last bit, without its loop: every eight threads merge the eight entries.
            entry = group * cluster + thread % cluster
            count, mean = read_number(table, entry), read_number(table, units + entry)
            count, mean, low, m2 = of_cluster(count, mean, 0.0, read_number(table, 2 * units + entry))
            mean += low
        if not from_stats:
            rstd = rstd_of(count, m2, eps)
        if thread == 0 and there:
            if to_table:
                write_number(table, unit, count)
                write_number(table, units + unit, mean)
                write_number(table, 2 * units + unit, m2)
            if to_stats and chunk == 0:
                write_number(stats, group, count)
                write_number(stats, groups + group, mean)
                write_number(stats, 2 * groups + group, m2)
                write_number(stats, 3 * groups + group, rstd)
        if writes:
            around_part, ratio = np.float64(hi), one
            if joined:  # pragma: no cover
                # From around the mean of this block's part to around that of the group.
                around_part, ratio = around_part * inverse_of(gain), scalar(inverse_of(gain))
            if joined or not from_x:
                gain = gain_to_apply(rstd)
                hi, lo = mean_in_lanes(mean * np.float64(gain))
            ratio, move = ratio * gain, scalar((around_part - mean) * np.float64(gain))
            scale = scalar(rstd * inverse_of(gain))
            back = lo * scale
            p = start
            while p - thread < limit:
                if joined:  # pragma: no cover
                    values = rest * ratio
                    if centred:
                        values = values + move
                elif on_the_way:
                    values = rest
                else:
                    if held:
                        values = tile
                    elif added:
                        values = load_sum(total_at, p, step, limit, run, packed_R0)
                    else:
                        values = load(x_at, p, step, limit, run, x_R0)
                    values = values * gain
                    if centred:
                        values = values - hi
                values = values * scale
                if centred and not joined:
                    values = values - back
                store_y(y_at, p, step, limit, run, y_R0, values, weight, bias, flat, packed_R0, inner, size)
                if held:
                    break
                p += whole_tile

    return Kernel(rows, (c,), c.block, c.registers, launch.CLUSTER if joined else 1)


@lru_cache(maxsize=4096)
def _made(plan: Plan, call: Call, takes: str, leaves: str, writes: bool) -> tuple[Kernel, Launch]:
    part = launch.rows(plan, call, takes, leaves, writes)
    return kernel(part.choice), part


def _launch(made: tuple[Kernel, Launch], addresses: tuple[int, ...], table: int, eps: float, stream: int) -> None:
    own, (_, blocks, (x_start, y_start, mask_start), numbers) = made
    x, residual, total, y, mask, weight, bias, stats = addresses
    own(
        blocks, stream, x + x_start, residual + x_start, total, y + y_start, mask + mask_start, weight, bias, stats,
        table, *numbers, eps,
    )  # fmt: skip


def forward(
    plan: Plan, call: Call, addresses: tuple[int, ...], eps: float, stream: int, workspace: Callable[[int], Span]
) -> None:
    """Normalize: in one launch where a block, or a cluster of blocks, has a group to itself, else in two."""
    whole = _made(plan, call, "x", "stats", True)
    choice = whole[1].choice
    if not choice.split:
        _launch(whole, addresses, 0, eps, stream)
        return
    table = workspace(24 * whole[1].numbers[0]).address
    if choice.joined and has_clusters():
        _launch(whole, addresses, table, eps, stream)
        return
    _launch(_made(plan, call, "x", "table", False), addresses, table, 0.0, stream)
    if call.added:
        _, _, total, *rest = addresses
        addresses = (total, 0, 0, *rest)
        call = launch.summed(call)
    _launch(_made(plan, call, "table", "stats", True), addresses, table, eps, stream)


def statistics(
    plan: Plan, call: Call, addresses: tuple[int, ...], stream: int, workspace: Callable[[int], Span]
) -> None:
    """Write statistics alone."""
    whole = _made(plan, call, "x", "stats", False)
    if not whole[1].choice.split:
        _launch(whole, addresses, 0, 0.0, stream)
        return
    table = workspace(24 * whole[1].numbers[0]).address
    _launch(_made(plan, call, "x", "table", False), addresses, table, 0.0, stream)
    _launch(_made(plan, call, "table", "stats", False), addresses, table, 0.0, stream)


def apply(plan: Plan, call: Call, addresses: tuple[int, ...], stream: int) -> None:
    """Normalize with given statistics."""
    _launch(_made(plan, call, "stats", "nowhere", True), addresses, 0, 0.0, stream)
