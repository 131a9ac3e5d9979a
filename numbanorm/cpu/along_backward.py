"""Backward of rows with weights along them, whole and without a mask: LayerNorm's and RMSNorm's.

The formulas, slabs and gradients are those of `rows_backward`. What belongs to a row is made for all rows of a unit at
once, and kept until their dx is written: LayerNorm (1024, 64) takes 37.7 us row by row on Zen 4 and 29.9 so.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from .address import record
from .claims import claim
from .dtypes import lane, load, pointer, retyped, room, store
from .guard import clash
from .jit import Kernel, inlined, scalar
from .lanes import (
    HEAD_FROM,
    LINE,
    all_lanes,
    choose,
    first_lanes,
    fused,
    lanes_for,
    load_lanes,
    load_part,
    load_some,
    no_lanes,
    settle_streams,
    store_lanes,
    store_some,
    store_sums,
    stream_lanes,
    sum_of_lanes,
    until_line,
    width_of,
)
from .prefetch import prefetch, prefetch_near
from .rows import AHEAD_PAIRS
from .rows_backward import (
    FLUSH,
    LONG_RUN,
    average,
    clear_gradients,
    finish_gradients,
    flush,
    products_from,
    room_for,
    run_sums,
    weight_of_slab,
)
from .sums import UNIT_GROUPS
from .welford import BLOCK, least, shift_of

EVEN = 32
"""Lanes of float32: rows of a multiple of it may all begin with lines of dx."""

# What is kept of a unit's rows: (x - hi) * scale + low is h, and c and e are -sum(g)/n and -sum(g * h)/n.
_HI, _SCALE, _LOW, _C, _E = (row * UNIT_GROUPS for row in range(5))
_MAPS_ROOM = 5 * UNIT_GROUPS
_SUMS_ROOM = 2 * UNIT_GROUPS


@scalar
def _map_rows(maps, to, x, means, rstds, mean_step, first, step, n):
    """Keep, as a unit's `to`-th and on, what makes h of x in `n` rows: the `first` group and each `step`-th from it."""
    for i in range(n):
        group = first + i * step
        mean, rstd = load(means, group * mean_step), load(rstds, group)
        hi = lane(x, mean)
        store(maps, _HI + to + i, hi)
        store(maps, _SCALE + to + i, rstd)
        store(maps, _LOW + to + i, shift_of(0.0, mean - np.float64(hi), rstd))


@inlined
def _h_of(maps, x, i, half):
    """Return lanes (hi, scale, low) of the `i`-th row."""
    no = lanes_for(x, half)
    return (
        all_lanes(no, load(maps, _HI + i)),
        all_lanes(no, load(maps, _SCALE + i)),
        all_lanes(no, load(maps, _LOW + i)),
    )


@inlined
def _sum_row(dy, x, weight, maps, sums, i, g, k0, k1):
    """Keep the sums of g and g * h of a unit's `i`-th row."""
    hi, scale, low = _h_of(maps, x, i, None)
    dy_at = k0 * g.y_K0 + k1 * g.y_K1
    x_at = k0 * g.x_K0 + k1 * g.x_K1
    sum_g = sum_gh = 0.0
    for j in range(0, g.R1, BLOCK):
        width = least(np.int64(BLOCK), g.R1 - j)
        a, b = run_sums(dy, x, weight, dy_at + j, x_at + j, j, width, hi, scale, low, g.ahead)
        sum_g += a
        sum_gh += b
    store(sums, i, sum_g)
    store(sums, UNIT_GROUPS + i, sum_gh)


@inlined
def _row_lanes(dy, x, weight, maps, i, dy_at, x_at, width, ahead, half):
    """Return the sums of g and g * h of a unit's `i`-th row, up to a block, in lanes, as `run_sums` adds them up."""
    hi, scale, low = _h_of(maps, x, i, half)
    a = b = lanes_for(x, half)
    step = width_of(a)
    whole = width - width % step
    for j in range(0, whole, step):
        if ahead != 0:
            prefetch_near(a, dy, dy_at + j + ahead)
            prefetch_near(a, x, x_at + j + ahead)
        d = load_lanes(a, dy, dy_at + j) * load_lanes(a, weight, j)
        a = a + d
        b = fused(d, fused(load_lanes(a, x, x_at + j) - hi, scale, low), b)
    if whole < width:
        rest = width - whole
        d = load_part(a, dy, dy_at + whole, rest) * load_part(a, weight, whole, rest)
        a = a + d
        b = b + choose(first_lanes(a, rest), d * fused(load_part(a, x, x_at + whole, rest) - hi, scale, low))
    return a, b


@scalar
def _sum_blocks(dy, x, weight, maps, sums, n, dy_at, dy_step, x_at, x_step, width, ahead, half):
    """Keep the sums of g and g * h of `n` rows, each of up to a block; by fours, whose lanes are added together."""
    i = np.int64(0)
    while i + 4 <= n:
        dy_b, dy_c, dy_d = dy_at + dy_step, dy_at + 2 * dy_step, dy_at + 3 * dy_step
        x_b, x_c, x_d = x_at + x_step, x_at + 2 * x_step, x_at + 3 * x_step
        a, e = _row_lanes(dy, x, weight, maps, i, dy_at, x_at, width, ahead, half)
        b, f = _row_lanes(dy, x, weight, maps, i + 1, dy_b, x_b, width, ahead, half)
        c, g = _row_lanes(dy, x, weight, maps, i + 2, dy_c, x_c, width, ahead, half)
        d, h = _row_lanes(dy, x, weight, maps, i + 3, dy_d, x_d, width, ahead, half)
        store_sums(a, b, c, d, sums, i)
        store_sums(e, f, g, h, sums, UNIT_GROUPS + i)
        dy_at += 4 * dy_step
        x_at += 4 * x_step
        i += 4
    while i < n:
        a, b = _row_lanes(dy, x, weight, maps, i, dy_at, x_at, width, ahead, half)
        store(sums, i, sum_of_lanes(a))
        store(sums, UNIT_GROUPS + i, sum_of_lanes(b))
        dy_at += dy_step
        x_at += x_step
        i += 1


@scalar
def _settle_rows(maps, to, sums, n, count, centred):
    """Keep c and e of `n` rows, as a unit's `to`-th and on."""
    for i in range(n):
        store(maps, _C + to + i, -average(load(sums, i), count) if centred else 0.0)
        store(maps, _E + to + i, -average(load(sums, UNIT_GROUPS + i), count))


@inlined
def _row(maps, x, i, dy_at, x_at, dx_at):
    """Return where a unit's `i`-th row lies in dy, x and dx, and what is kept of it, in lanes."""
    no = no_lanes(x)
    hi, scale, low = _h_of(maps, x, i, None)
    return dy_at, x_at, dx_at, hi, scale, low, all_lanes(no, load(maps, _C + i)), all_lanes(no, load(maps, _E + i))


@inlined
def _starts(g, k0, k1):
    """Return where group (k0, k1) begins in dy, x and dx."""
    return (
        k0 * g.y_K0 + k1 * g.y_K1,
        k0 * g.x_K0 + k1 * g.x_K1,
        (k0 * g.K1 + k1) * g.R1,
    )


@inlined
def _row_at(maps, x, i, g, k0, k1):
    """Return what `_row` does of a unit's `i`-th row, which is group (k0, k1)."""
    dy_at, x_at, dx_at = _starts(g, k0, k1)
    return _row(maps, x, i, dy_at, x_at, dx_at)


@inlined
def _strip_of(dy, x, dx, row, i, part, gain, of_h, of_d, line):
    """Write `part` elements of dx of a row, up to a vector; return `of_h` with dy * h added and `of_d` with dy."""
    dy_at, x_at, dx_at, hi, scale, low, c, e = row
    h = fused(load_some(hi, x, x_at + i, part) - hi, scale, low)
    d = load_some(hi, dy, dy_at + i, part)
    v = fused(d, gain, fused(h, e, c)) * scale
    if line:
        stream_lanes(v, dx, dx_at + i)
    else:
        store_some(v, dx, dx_at + i, part)
    return fused(d, h, of_h), of_d + d


@inlined
def _emit_strip(dy, x, dx, weight, row, i, part, products, p, half, line):
    """Write `part` elements of dx of a row; add to `products` dy * h and, `half` on, dy."""
    no = no_lanes(x)
    gain = load_some(no, weight, i, part)
    of_h, of_d = load_some(no, products, p + i, part), load_some(no, products, p + half + i, part)
    of_h, of_d = _strip_of(dy, x, dx, row, i, part, gain, of_h, of_d, line)
    store_some(of_h, products, p + i, part)
    store_some(of_d, products, p + half + i, part)


@inlined
def _emit_strips(dy, x, dx, weight, a, b, i, part, products, p, half, line):
    """Do the same for two rows; add to `products` what both add."""
    no = no_lanes(x)
    gain = load_some(no, weight, i, part)
    of_h, of_d = load_some(no, products, p + i, part), load_some(no, products, p + half + i, part)
    of_h, of_d = _strip_of(dy, x, dx, a, i, part, gain, of_h, of_d, line)
    of_h, of_d = _strip_of(dy, x, dx, b, i, part, gain, of_h, of_d, line)
    store_some(of_h, products, p + i, part)
    store_some(of_d, products, p + half + i, part)


@scalar
def _emit_row(dy, x, dx, weight, maps, i, products, p, g, k0, k1):
    """Write dx of a row; what comes before the first whole cache line goes apart."""
    row = _row_at(maps, x, i, g, k0, k1)
    step = width_of(row[3])
    head = least(until_line(dx, row[2]), g.R1) if g.stream != 0 or g.R1 >= HEAD_FROM else 0
    stop = g.R1 - (g.R1 - head) % step
    stream = g.stream != 0 and (head == 0 or g.R1 >= LONG_RUN)
    apart = stream and head < 0  # never; Numba would compile the strip anew for a constant
    if head > 0:
        _emit_strip(dy, x, dx, weight, row, np.int64(0), head, products, p, g.R1, apart)
    for j in range(head, stop, step):
        if stream and g.ahead != 0:
            prefetch(row[3], dy, row[0] + j + g.ahead)
            prefetch(row[3], x, row[1] + j + g.ahead)
        _emit_strip(dy, x, dx, weight, row, j, step, products, p, g.R1, stream)
    if stop < g.R1:
        _emit_strip(dy, x, dx, weight, row, stop, g.R1 - stop, products, p, g.R1, apart)


@scalar
def _emit_pairs(dy, x, dx, weight, maps, i, n, products, p, g, k0, k1, head, line):
    """Write dx of `n` rows two by two, `head` elements of each apart, and add to `products`.

    For a row alone products and weights are most of what is read and written in the L1 cache. What belongs to four
    rows is more than registers hold.
    """
    dy_at, x_at, dx_at = _starts(g, k0, k1)
    dy_step, x_step, dx_step, width = g.y_K0, g.x_K0, g.K1 * g.R1, g.R1
    step = width_of(no_lanes(x))
    stop = width - (width - head) % step
    for row in range(i, i + n, 2):
        a = _row(maps, x, row, dy_at, x_at, dx_at)
        b = _row(maps, x, row + 1, dy_at + dy_step, x_at + x_step, dx_at + dx_step)
        if head > 0:
            _emit_strips(dy, x, dx, weight, a, b, np.int64(0), head, products, p, width, line)
        for j in range(head, stop, step):
            _emit_strips(dy, x, dx, weight, a, b, j, step, products, p, width, line)
        if stop < width:
            _emit_strips(dy, x, dx, weight, a, b, stop, width - stop, products, p, width, line)
        dy_at += 2 * dy_step
        x_at += 2 * x_step
        dx_at += 2 * dx_step


@inlined
def _emit_column(dy, x, dx, weight, maps, i, n, products, p, g, k0, k1, j, part, half):
    """Write up to a vector of dx, from the `j`-th element on, of each of `n` rows.

    The weights, and the products, to which all of the rows add dy * h and dy, stay in registers.
    """
    no = lanes_for(x, half)
    dy_at, x_at, dx_at = _starts(g, k0, k1)
    gain = load_some(no, weight, j, part)
    of_h, of_d = load_some(no, products, p + j, part), load_some(no, products, p + g.R1 + j, part)
    for row in range(i, i + n):
        hi, scale, low = _h_of(maps, x, row, half)
        c, e = all_lanes(no, load(maps, _C + row)), all_lanes(no, load(maps, _E + row))
        h = fused(load_some(no, x, x_at + j, part) - hi, scale, low)
        d = load_some(no, dy, dy_at + j, part)
        store_some(fused(d, gain, fused(h, e, c)) * scale, dx, dx_at + j, part)
        of_h, of_d = fused(d, h, of_h), of_d + d
        dy_at += g.y_K0
        x_at += g.x_K0
        dx_at += g.K1 * g.R1
    store_some(of_h, products, p + j, part)
    store_some(of_d, products, p + g.R1 + j, part)


@scalar
def _emit_columns(dy, x, dx, weight, maps, i, n, products, p, g, k0, k1, half):
    """Write dx of `n` narrow rows into the caches, as many elements of each at a time as there are lanes.

    Rows of 16 take 36 ns each row by row on Zen 4, and 11 so.
    """
    step = width_of(lanes_for(x, half))
    whole = g.R1 - g.R1 % step
    for j in range(0, whole, step):
        _emit_column(dy, x, dx, weight, maps, i, n, products, p, g, k0, k1, j, step, half)
    if whole < g.R1:
        _emit_column(dy, x, dx, weight, maps, i, n, products, p, g, k0, k1, whole, g.R1 - whole, half)


@inlined
def _sum_strip(dy, x, row, i, gain, a, b):
    """Add, of a row's elements from `i` on, g to `a` and g * h to `b`."""
    dy_at, x_at, _, hi, scale, low, _, _ = row
    prefetch_near(a, dy, dy_at + i + AHEAD_PAIRS)
    prefetch_near(a, x, x_at + i + AHEAD_PAIRS)
    d = load_lanes(a, dy, dy_at + i) * gain
    return a + d, fused(d, fused(load_lanes(a, x, x_at + i) - hi, scale, low), b)


@inlined
def _strip_beside(dy, x, row, i, gain, of_h, of_d):
    """Return lanes of dx of a row, `of_h` with dy * h added, and `of_d` with dy added."""
    dy_at, x_at, _, hi, scale, low, c, e = row
    h = fused(load_lanes(hi, x, x_at + i) - hi, scale, low)
    d = load_lanes(hi, dy, dy_at + i)
    return fused(d, gain, fused(h, e, c)) * scale, fused(d, h, of_h), of_d + d


@scalar
def _stream_pair(i, k0, dy, x, dx, weight, maps, sums, products, p, g):
    """Write dx of a unit's `i`-th row and the next beside the sums of the two after them; `i` is 0 and 2 by turns."""
    k1 = np.int64(0)
    last_a = _row_at(maps, x, i, g, k0, k1)
    last_b = _row_at(maps, x, i + 1, g, k0 + 1, k1)
    next_a = _row_at(maps, x, 2 - i, g, k0 + 2, k1)
    next_b = _row_at(maps, x, 3 - i, g, k0 + 3, k1)
    g_a = gh_a = g_b = gh_b = 0.0
    for j in range(0, g.R1, BLOCK):
        s_a = q_a = s_b = q_b = no_lanes(x)
        for t in range(j, least(j + BLOCK, g.R1), width_of(s_a)):
            gain = load_lanes(s_a, weight, t)
            s_a, q_a = _sum_strip(dy, x, next_a, t, gain, s_a, q_a)
            s_b, q_b = _sum_strip(dy, x, next_b, t, gain, s_b, q_b)
            of_h, of_d = load_lanes(s_a, products, p + t), load_lanes(s_a, products, p + g.R1 + t)
            v_a, of_h, of_d = _strip_beside(dy, x, last_a, t, gain, of_h, of_d)
            v_b, of_h, of_d = _strip_beside(dy, x, last_b, t, gain, of_h, of_d)
            stream_lanes(v_a, dx, last_a[2] + t)
            stream_lanes(v_b, dx, last_b[2] + t)
            store_lanes(of_h, products, p + t)
            store_lanes(of_d, products, p + g.R1 + t)
        g_a += sum_of_lanes(s_a)
        gh_a += sum_of_lanes(q_a)
        g_b += sum_of_lanes(s_b)
        gh_b += sum_of_lanes(q_b)
    store(sums, 0, g_a)
    store(sums, 1, g_b)
    store(sums, UNIT_GROUPS, gh_a)
    store(sums, UNIT_GROUPS + 1, gh_b)


@scalar
def _stream_pairs(
    start, stop, dy, x, dx, weight, count, means, rstds, maps, sums, products, p, gradients, to, g, centred
):
    """Take all but the last two or three of some long rows, whose dx goes past the caches; return where they begin.

    On a Xeon memory reads and writes best by turns: (16384, 4096) takes 42 ms so, 54 where a row is summed and then
    written, 50 where four are. Not on Zen: `CpuProfile.backward_bytes`.
    """
    k0 = start
    i, one, two = np.int64(0), np.int64(1), np.int64(2)
    if until_line(dx, start * g.R1) == 0 and stop - start >= 4:
        _map_rows(maps, i, x, means, rstds, g.mean_step, k0, one, two)
        for row in range(2):
            _sum_row(dy, x, weight, maps, sums, row, g, k0 + row, np.int64(0))
        _settle_rows(maps, i, sums, two, count, centred)
        while k0 + 4 <= stop:
            _map_rows(maps, 2 - i, x, means, rstds, g.mean_step, k0 + 2, one, two)
            _stream_pair(i, k0, dy, x, dx, weight, maps, sums, products, p, g)
            i = 2 - i
            _settle_rows(maps, i, sums, two, count, centred)
            k0 += 2
            if (k0 - start) % FLUSH == 0:
                flush(products, p, g.R1, gradients, to, g.size)
    return k0


@scalar
def _backward_unit(unit, dy, x, dx, weight, counts_of, means, rstds, gradients, g, pairs, wide, narrow, half):
    """Take the rows of one slab at one k1: sums of a few, then their dx, while they are in the cache."""
    centred = g.centred != 0
    k1 = unit % g.K1
    slab = unit // g.K1
    weight = weight_of_slab(weight, slab, g)
    first = start = slab * g.K0 // g.slabs
    stop = (slab + 1) * g.K0 // g.slabs
    count = load(counts_of, 0)
    stream = g.stream != 0
    whole = g.R1 % EVEN == 0  # then all rows of dx begin alike in lines
    products = np.zeros(room_for(2 * g.R1 + 2 * LINE, g))
    p_products = retyped(pointer(products), weight)  # the array is used after the last use of its pointer
    maps = room(weight, _MAPS_ROOM)
    sums = room(gradients, _SUMS_ROOM)
    to = slab * 2 * g.size
    p = products_from(dx, (start * g.K1 + k1) * g.R1, p_products, g.lane_itemsize)
    if pairs is not None:
        start = _stream_pairs(
            start,
            stop,
            dy,
            x,
            dx,
            weight,
            count,
            means,
            rstds,
            maps,
            sums,
            p_products,
            p,
            gradients,
            to,
            g,
            centred,
        )
    none = np.int64(0)
    dx_at = (start * g.K1 + k1) * g.R1
    head = until_line(dx, dx_at)
    lines = stream and whole and head == 0
    alike = head == until_line(dx, dx_at + g.K1 * g.R1)
    head = head if alike and g.R1 >= HEAD_FROM else none
    for base in range(start, stop, g.back_groups):  # as in `rows`: no dx waits for its own sums
        n = least(g.back_groups, stop - base)
        _map_rows(maps, none, x, means, rstds, g.mean_step, base * g.K1 + k1, g.K1, n)
        if narrow is not None or g.R1 <= BLOCK:
            dy_at = base * g.y_K0 + k1 * g.y_K1
            x_at = base * g.x_K0 + k1 * g.x_K1
            _sum_blocks(dy, x, weight, maps, sums, n, dy_at, g.y_K0, x_at, g.x_K0, g.R1, g.ahead, half)
        else:
            for i in range(n):
                _sum_row(dy, x, weight, maps, sums, i, g, base + i, k1)
        _settle_rows(maps, none, sums, n, count, centred)
        i = none
        while i < n:
            done = least(n - i, FLUSH - (base + i - first) % FLUSH)
            if narrow is not None:
                _emit_columns(dy, x, dx, weight, maps, i, done, p_products, p, g, base + i, k1, half)
            if wide is not None:
                if done == 1 or (stream and not whole):
                    done = np.int64(1)
                    _emit_row(dy, x, dx, weight, maps, i, p_products, p, g, base + i, k1)
                else:
                    done -= done % 2
                    _emit_pairs(dy, x, dx, weight, maps, i, done, p_products, p, g, base + i, k1, head, lines)
            i += done
            if (base + i - first) % FLUSH == 0:
                flush(p_products, p, g.R1, gradients, to, g.size)
    if stream:
        settle_streams()
    flush(p_products, p, g.R1, gradients, to, g.size)
    products[0] = 0.0


@scalar
def _backward_units(job, geometry, dy, x, dx, weight, counts_of, means, rstds, gradients, pairs, wide, narrow, half):
    g = record(geometry)
    units = g.slabs * g.K1
    unit = claim(job, np.int64(-1), units)
    while unit < units:
        _backward_unit(unit, dy, x, dx, weight, counts_of, means, rstds, gradients, g, pairs, wide, narrow, half)
        unit = claim(job, unit, units)


@Kernel
def backward(
    job,
    workers,
    geometry,
    pairs,
    wide,
    narrow,
    half,
    dy,
    x,
    dx,
    mask,
    weight,
    counts_of,
    means,
    rstds,
    gradients,
    result,
):
    """Do what `rows_backward.backward` does; `mask` is None.

    `pairs`, `wide`, `narrow` and `half` are None, or True where the geometry says so: dx is written beside the sums of
    the next rows (`_stream_pairs`), by rows, or by columns (`_emit_columns`); half of the usual lanes hold a row. The
    type tells, so that a first call does not wait for what other arrays take.
    """
    p_job, p_geometry = pointer(job), pointer(geometry)
    p_dy, p_x, p_dx, p_weight = pointer(dy), pointer(x), pointer(dx), pointer(weight)
    p_counts, p_means, p_rstds, p_gradients = pointer(counts_of), pointer(means), pointer(rstds), pointer(gradients)
    problem = clash(p_geometry, None, p_x, p_dy, None, p_weight, None)
    if problem != 0:
        return problem
    clear_gradients(p_job, p_geometry, p_gradients)
    for _ in prange(workers):
        _backward_units(
            p_job,
            p_geometry,
            p_dy,
            p_x,
            p_dx,
            p_weight,
            p_counts,
            p_means,
            p_rstds,
            p_gradients,
            pairs,
            wide,
            narrow,
            half,
        )
    finish_gradients(p_job, p_geometry, p_gradients, pointer(result))
    return 0
