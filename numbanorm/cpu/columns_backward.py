"""Backward of the columns kernel: the formulas of `rows_backward`, with lanes along the contiguous axis.

Every lane keeps its two sums; lanes of one group merge, then dx is written row by row. Gradients of weights that lie
along the lanes come from the lanes' sums, those of weights that lie along the rows from sums over each row.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from .address import record
from .claims import claim
from .columns import TILE, TOGETHER
from .dtypes import counts, lane, load, pointer, room, shifted, store
from .guard import clash
from .jit import Kernel, elementwise, scalar
from .lanes import (
    all_lanes,
    choose,
    first_lanes,
    fused,
    load_lanes,
    load_some,
    marked_lanes,
    no_lanes,
    settle_streams,
    store_lanes,
    store_some,
    stream_lanes,
    sum_of_lanes,
    until_line,
    width_of,
)
from .prefetch import prefetch
from .rows_backward import add_to, clear_gradients, finish_gradients, weight_of_slab
from .welford import least, most

FLUSH_ROWS = 64
"""Rows whose products are added in float32 before they go to a lane's float64 sums."""

# One scratch array with constant offsets, as in `columns`.
_HI, _LO, _SCALE, _GAIN, _MEAN_G, _MEAN_GH, _A, _B = (i * TILE for i in range(8))
_ROOM, _SUMS_ROOM = 9 * TILE, 2 * TILE  # strips may start anywhere, and read a strip beyond the last


@elementwise
def _copy_folded(scratch, rows, once, width):
    """Give lanes that were folded, copies of the first `once`, what those have in some rows of a tile's scratch."""
    for row in range(rows[0], rows[1], TILE):
        for i in range(row + once, row + width):
            store(scratch, i, load(scratch, i - once))


@scalar
def _spread(scratch, x, weight, means, rstds, g, k0, first, width, by_row):
    """Give every lane of a tile its mean (in two parts), rstd and weight."""
    once = least(width, g.K1 * g.R1)
    start = k0 * g.K1
    group, left = start + first // g.R1 % g.K1, g.R1
    channel, channel_left = first // g.inner % g.size, g.inner - first % g.inner
    for i in range(once):  # counted on, not divided
        mean = load(means, (group) * g.mean_step)
        hi = lane(x, mean)
        store(scratch, _HI + i, hi)
        store(scratch, _LO + i, mean - np.float64(hi))
        store(scratch, _SCALE + i, load(rstds, group))
        store(scratch, _GAIN + i, 1.0 if by_row else load(weight, channel))
        left -= 1
        if left == 0:
            left = g.R1
            group = group + 1 if group + 1 < start + g.K1 else start
        channel_left -= 1
        if channel_left == 0:
            channel_left = g.inner
            channel = channel + 1 if channel + 1 < g.size else 0
    _copy_folded(scratch, (_HI, _MEAN_G), once, width)


@scalar
def _chunk_sums(sums, scratch, dy, x, weight, gradients, g, k0, first, width, chunk, by_row):
    """Sum one chunk of rows in each lane: dy and dy * h, weighted where weights lie along the rows.

    `sums` holds the first sum of every lane, then (from TILE on) the second.
    """
    for i in range(2 * TILE):
        store(sums, i, 0.0)
    no = no_lanes(x)
    r_start = chunk * g.chunk_rows
    r_stop = least(r_start + g.chunk_rows, g.rows)
    tail = least(most(g.tail - first, np.int64(0)), width) if chunk == g.chunks - 1 else 0
    stop = r_stop + (1 if tail > 0 else 0)
    for block in range(r_start, stop, FLUSH_ROWS):
        for i in range(0, width, width_of(no)):
            store_lanes(no, scratch, _A + i)
            store_lanes(no, scratch, _B + i)
        block_stop = least(block + FLUSH_ROWS, stop)
        r = block
        while r < block_stop:
            wide = tail if r == r_stop else width
            # Several rows at once, so that what belongs to a lane is loaded once for all of them.
            together = 1 if by_row else most(np.int64(1), least(np.int64(TOGETHER), least(block_stop, r_stop) - r))
            x_at = k0 * g.x_K0 + r * g.x_R0 + first
            dy_at = k0 * g.y_K0 + r * g.y_R0 + first
            channel = 0
            w = no
            if by_row:
                channel = (k0 * g.rows + r) * g.lanes // g.inner % g.size
                w = all_lanes(no, load(weight, channel))
            row_a = row_b = no
            for i in range(0, wide, width_of(no)):
                rest = wide - i
                hi = load_lanes(no, scratch, _HI + i)
                lo = load_lanes(no, scratch, _LO + i)
                scale = load_lanes(no, scratch, _SCALE + i)
                a = load_lanes(no, scratch, _A + i)
                b = load_lanes(no, scratch, _B + i)
                for t in range(together):
                    if g.ahead != 0:
                        prefetch(no, dy, dy_at + t * g.y_R0 + i + g.ahead)
                        prefetch(no, x, x_at + t * g.x_R0 + i + g.ahead)
                    d = load_some(no, dy, dy_at + t * g.y_R0 + i, rest)
                    h = ((load_some(no, x, x_at + t * g.x_R0 + i, rest) - hi) - lo) * scale
                    if by_row:
                        if rest < width_of(no):
                            h = choose(first_lanes(no, rest), h)
                        row_a = row_a + d
                        row_b = fused(d, h, row_b)
                        d = d * w
                    a = a + d
                    b = fused(d, h, b)
                store_lanes(a, scratch, _A + i)
                store_lanes(b, scratch, _B + i)
            if by_row:
                add_to(gradients, channel, sum_of_lanes(row_b))
                add_to(gradients, g.size + channel, sum_of_lanes(row_a))
            r += together
        for i in range(width):
            store(sums, i, load(sums, i) + load(scratch, _A + i))
            store(sums, TILE + i, load(sums, TILE + i) + load(scratch, _B + i))


@scalar
def _close_groups(total, groups, scratch, weight, counts_of, gradients, keep, g, k0, first, width, by_row, centred):
    """Merge the lanes' sums into groups and channels, and give every lane its group's means of g and g * h."""
    once = least(width, g.K1 * g.R1)
    for copy in range(once, width, once):
        for i in range(once):
            store(total, i, load(total, i) + load(total, copy + i))
            store(total, TILE + i, load(total, TILE + i) + load(total, TILE + copy + i))
    for i in range(-(-once // g.R1)):
        store(groups, i, 0.0)
        store(groups, TILE + i, 0.0)
    group, left = np.int64(0), g.R1
    channel, channel_left = first // g.inner % g.size, g.inner - first % g.inner
    for i in range(once):
        a, b = load(total, i), load(total, TILE + i)
        w = 1.0
        if not by_row:
            w = np.float64(load(weight, channel))
            if keep:
                add_to(gradients, channel, b)
                add_to(gradients, g.size + channel, a)
        store(groups, group, load(groups, group) + w * a)
        store(groups, TILE + group, load(groups, TILE + group) + w * b)
        left -= 1
        if left == 0:
            left = g.R1
            group += 1
        channel_left -= 1
        if channel_left == 0:
            channel_left = g.inner
            channel = channel + 1 if channel + 1 < g.size else 0
    group, left = k0 * g.K1 + first // g.R1 % g.K1, g.R1
    own = np.int64(0)
    for i in range(once):
        count = load(counts_of, (group) * g.count_step)
        # Where nothing counts, as in inference, the statistics do not depend on x.
        share = 1.0 / count if count > 0.0 else 0.0
        store(scratch, _MEAN_G + i, load(groups, own) * share if centred else 0.0)
        store(scratch, _MEAN_GH + i, load(groups, TILE + own) * share)
        left -= 1
        if left == 0:
            left = g.R1
            own += 1
            group = group + 1 if group + 1 < (k0 + 1) * g.K1 else k0 * g.K1
    _copy_folded(scratch, (_MEAN_G, _A), once, width)


@scalar
def _emit_chunk(scratch, dy, x, dx, mask, weight, counts_of, g, k0, first, width, chunk, by_row):
    """Write dx of one chunk of rows of a tile."""
    no = no_lanes(x)
    r_start = chunk * g.chunk_rows
    r_stop = least(r_start + g.chunk_rows, g.rows)
    tail = least(most(g.tail - first, np.int64(0)), width) if chunk == g.chunks - 1 else 0
    packed = g.lanes * g.rows + g.tail
    # Where dx does not depend on x, as in inference, NaN and Inf in x must not come in by a product with 0.
    fixed = g.count_step == 0 and load(counts_of, 0) == 0.0
    r = r_start
    while r < r_stop + (1 if tail > 0 else 0):
        wide = tail if r == r_stop else width
        together = most(np.int64(1), least(np.int64(TOGETHER), r_stop - r))
        x_at = k0 * g.x_K0 + r * g.x_R0 + first
        dy_at = k0 * g.y_K0 + r * g.y_R0 + first
        dx_at = k0 * packed + r * g.lanes + first
        # Past the caches only whole lines can go; in them parts of vectors at both ends of every row take longer than
        # vectors across lines: 80 us, not 35, for 100,352 elements in rows of 192.
        head = least(until_line(dx, dx_at), wide) if g.stream != 0 else 0
        i = 0
        while i < wide:
            part = least(width_of(no), wide - i)
            if i < head:
                part = head - i
            hi = load_lanes(no, scratch, _HI + i)
            lo = load_lanes(no, scratch, _LO + i)
            scale = load_lanes(no, scratch, _SCALE + i)
            gain = load_lanes(no, scratch, _GAIN + i)
            mean_g = load_lanes(no, scratch, _MEAN_G + i)
            mean_gh = load_lanes(no, scratch, _MEAN_GH + i)
            for t in range(together):
                if g.ahead != 0:
                    prefetch(no, dy, dy_at + t * g.y_R0 + i + g.ahead)
                    prefetch(no, x, x_at + t * g.x_R0 + i + g.ahead)
                h = ((load_some(no, x, x_at + t * g.x_R0 + i, part) - hi) - lo) * scale
                c = fused(h, mean_gh, mean_g)
                if fixed:
                    c = no
                elif mask is not None:
                    mask_at = k0 * g.mask_K0 + (r + t) * g.mask_R0 + first * g.mask_R1
                    if g.mask_R1 != 0:
                        c = choose(marked_lanes(no, mask, mask_at + i, part), c)
                    elif not counts(mask, mask_at):
                        c = no
                d = load_some(no, dy, dy_at + t * g.y_R0 + i, part) * gain
                if by_row:
                    d = d * all_lanes(no, load(weight, (k0 * g.rows + r + t) * g.lanes // g.inner % g.size))
                to = dx_at + t * g.lanes + i
                v = (d - c) * scale
                if g.stream != 0 and part == width_of(no) and until_line(dx, to) == 0:
                    stream_lanes(v, dx, to)
                else:
                    store_some(v, dx, to, part)
            i += part
        r += together
    if g.stream != 0:
        settle_streams()


@scalar
def _backward_tile(dy, x, dx, mask, weight, counts_of, means, rstds, gradients, g, k0, first, width, by_row, centred):
    """Take one tile: sums over its rows, then dx."""
    scratch = room(weight, _ROOM)
    sums = room(means, _SUMS_ROOM)
    total = room(means, _SUMS_ROOM)
    for i in range(2 * TILE):
        store(total, i, 0.0)
    _spread(scratch, x, weight, means, rstds, g, k0, first, width, by_row)
    for chunk in range(g.chunks):
        _chunk_sums(sums, scratch, dy, x, weight, gradients, g, k0, first, width, chunk, by_row)
        for i in range(2 * TILE):
            store(total, i, load(total, i) + load(sums, i))
    _close_groups(total, sums, scratch, weight, counts_of, gradients, True, g, k0, first, width, by_row, centred)
    for chunk in range(g.chunks - 1, -1, -1):  # the last rows may still be in the L2 cache
        _emit_chunk(scratch, dy, x, dx, mask, weight, counts_of, g, k0, first, width, chunk, by_row)


@scalar
def _backward_unit(unit, dy, x, dx, mask, weight, counts_of, means, rstds, gradients, g):
    """Take one slab: the samples of one tile, or, where weights lie along the rows, some tiles of all samples."""
    centred = g.centred != 0
    tiles = -(-g.lanes // g.tile)
    by_row = g.inner % g.lanes == 0
    slabs = g.slabs
    own = 1 if by_row else tiles  # tiles with weights of their own: they may share a slab's gradients
    slab = unit // own
    items = g.K0 * tiles // own
    of_slab = shifted(gradients, slab * 2 * g.size)
    weight = weight_of_slab(weight, slab, g)
    for item in range(slab * items // slabs, (slab + 1) * items // slabs):
        k0 = item // tiles if by_row else item
        first = (item if by_row else unit) % tiles * g.tile
        width = least(g.tile, g.lanes - first)
        _backward_tile(dy, x, dx, mask, weight, counts_of, means, rstds, of_slab, g, k0, first, width, by_row, centred)


@scalar
def _backward_units(job, geometry, dy, x, dx, mask, weight, counts_of, means, rstds, gradients):
    g = record(geometry)
    units = g.slabs * (1 if g.inner % g.lanes == 0 else -(-g.lanes // g.tile))
    unit = claim(job, np.int64(-1), units)
    while unit < units:
        _backward_unit(unit, dy, x, dx, mask, weight, counts_of, means, rstds, gradients, g)
        unit = claim(job, unit, units)


@Kernel
def backward(job, workers, geometry, dy, x, dx, mask, weight, counts_of, means, rstds, gradients, result):
    """Do what `rows_backward.backward` does."""
    p_job, p_geometry = pointer(job), pointer(geometry)
    p_dy, p_x, p_dx, p_mask, p_weight = pointer(dy), pointer(x), pointer(dx), pointer(mask), pointer(weight)
    p_counts, p_means, p_rstds, p_gradients = pointer(counts_of), pointer(means), pointer(rstds), pointer(gradients)
    problem = clash(p_geometry, None, p_x, p_dy, p_mask, p_weight, None)
    if problem != 0:
        return problem
    clear_gradients(p_job, p_geometry, p_gradients)
    for _ in prange(workers):
        _backward_units(p_job, p_geometry, p_dy, p_x, p_dx, p_mask, p_weight, p_counts, p_means, p_rstds, p_gradients)
    finish_gradients(p_job, p_geometry, p_gradients, pointer(result))
    return 0


@scalar
def _sum_unit(unit, dy, x, weight, means, rstds, table, g):
    tile = unit // g.chunks
    chunk = unit % g.chunks
    first = tile * g.tile
    width = least(g.tile, g.lanes - first)
    scratch = room(weight, _ROOM)
    sums = room(means, _SUMS_ROOM)
    _spread(scratch, x, weight, means, rstds, g, 0, first, width, False)
    _chunk_sums(sums, scratch, dy, x, weight, table, g, 0, first, width, chunk, False)
    for i in range(width):
        store(table, 2 * unit * g.tile + i, load(sums, i))
        store(table, (2 * unit + 1) * g.tile + i, load(sums, TILE + i))


@scalar
def _sum_units(job, geometry, dy, x, weight, means, rstds, table):
    g = record(geometry)
    units = -(-g.lanes // g.tile) * g.chunks
    unit = claim(job, np.int64(-1), units)
    while unit < units:
        _sum_unit(unit, dy, x, weight, means, rstds, table, g)
        unit = claim(job, unit, units)


@Kernel
def chunk_sums(job, workers, geometry, dy, x, weight, means, rstds, table):
    """Write the two sums of every lane of every chunk to `table`, shape (tiles, chunks, 2, tile); K0 is 1."""
    p_job, p_geometry = pointer(job), pointer(geometry)
    p_dy, p_x, p_weight = pointer(dy), pointer(x), pointer(weight)
    p_means, p_rstds, p_table = pointer(means), pointer(rstds), pointer(table)
    problem = clash(p_geometry, None, p_x, p_dy, None, p_weight, None)
    if problem != 0:
        return problem
    for _ in prange(workers):
        _sum_units(p_job, p_geometry, p_dy, p_x, p_weight, p_means, p_rstds, p_table)
    return 0


@scalar
def _emit_unit(unit, dy, x, dx, mask, weight, counts_of, means, rstds, table, gradients, g):
    centred = g.centred != 0
    tiles = -(-g.lanes // g.tile)
    tile = unit % tiles
    first = tile * g.tile
    width = least(g.tile, g.lanes - first)
    scratch = room(weight, _ROOM)
    groups = room(means, _SUMS_ROOM)
    total = room(means, _SUMS_ROOM)
    for i in range(2 * TILE):
        store(total, i, 0.0)
    for chunk in range(g.chunks):
        of = 2 * (tile * g.chunks + chunk) * g.tile
        for i in range(width):
            store(total, i, load(total, i) + load(table, of + i))
            store(total, TILE + i, load(total, TILE + i) + load(table, of + g.tile + i))
    _spread(scratch, x, weight, means, rstds, g, 0, first, width, False)
    # Every chunk closes the groups for itself; the first alone adds to the gradients.
    keep = unit // tiles == 0
    _close_groups(total, groups, scratch, weight, counts_of, gradients, keep, g, 0, first, width, False, centred)
    _emit_chunk(scratch, dy, x, dx, mask, weight, counts_of, g, 0, first, width, unit // tiles, False)


@scalar
def _emit_units(job, geometry, dy, x, dx, mask, weight, counts_of, means, rstds, table, gradients):
    g = record(geometry)
    units = -(-g.lanes // g.tile) * g.chunks
    unit = claim(job, np.int64(-1), units)
    while unit < units:
        _emit_unit(unit, dy, x, dx, mask, weight, counts_of, means, rstds, table, gradients, g)
        unit = claim(job, unit, units)


@Kernel
def emit(job, workers, geometry, dy, x, dx, mask, weight, counts_of, means, rstds, table, gradients):
    """Write dx, and add to `gradients` dweight and dbias, from the sums of all chunks; K0 is 1.

    `gradients`, shape (2, size), is 0 before.
    """
    p_job, p_geometry = pointer(job), pointer(geometry)
    p_dy, p_x, p_dx, p_mask, p_weight = pointer(dy), pointer(x), pointer(dx), pointer(mask), pointer(weight)
    p_counts, p_means, p_rstds = pointer(counts_of), pointer(means), pointer(rstds)
    p_table, p_gradients = pointer(table), pointer(gradients)
    problem = clash(p_geometry, None, p_x, p_dy, p_mask, p_weight, None)
    if problem != 0:
        return problem
    for _ in prange(workers):
        _emit_units(
            p_job, p_geometry, p_dy, p_x, p_dx, p_mask, p_weight, p_counts, p_means, p_rstds, p_table, p_gradients
        )
    return 0
