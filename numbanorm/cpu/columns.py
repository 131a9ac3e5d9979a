"""The columns kernel: groups that run across memory, in the view (K0, rows, lanes).

The contiguous axes K1 and R1 are the lanes; rows of R0 stream past and every lane keeps its own moments. Lanes go in
tiles of up to `TILE`, whose moments stay in the L1 cache. At the end lanes of one group merge: R1 neighbours, and the
copies made where few lanes were folded (three channels become 255 lanes of 85 rows side by side). Rows are taken
chunk by chunk, block by block, and merged in that order whatever the number of threads.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from ..core.plan import COUNT, M2, MEAN, RSTD
from .address import record
from .claims import claim
from .dtypes import counts, lane, load, pointer, room, shifted, store
from .guard import clash
from .jit import Kernel, elementwise, inlined, scalar
from .lanes import (
    all_lanes,
    choose,
    fused,
    load_lanes,
    load_part,
    load_some,
    marked_lanes,
    no_lanes,
    settle_streams,
    store_lanes,
    store_part,
    stream_lanes,
    until_line,
    width_of,
)
from .prefetch import prefetch
from .rows import FLOAT32_SAFE
from .running import fill_given
from .welford import HUGE, POOR, PREFIX, TINY, least, merge, most, rstd_of, shift_of

TILE = 512
"""Lanes a tile: shift, sum, squares and count in float32 take 8 KiB, a tile's moments in float64 12 KiB."""

BLOCK_ROWS = 128
"""Rows a block, and less than twice as many where they are all: 32 to 64 float32 additions a lane between merges."""

TOGETHER = 4
"""Rows that are taken together, strip by strip, so that what belongs to a lane is loaded once for all of them.

Sums in the caches take twice as many: GroupNorm (4, 32, 28, 28) channels last 23.1 to 22.3 us on Zen 4; beyond them
(32, 64, 56, 56) would take a twentieth longer.
"""

# Offsets in a tile's scratch arrays. One array with constant offsets, not four arrays: LLVM gives up on a vector loop
# that needs more than eight checks of pointers against each other.
_SHIFT, _SUM, _SQUARES, _SEEN = 0, TILE, 2 * TILE, 3 * TILE
_HI, _GAIN, _OFFSET = 0, TILE, 2 * TILE
_TURNED = TILE + 32  # of each of these, and a vector more
_N, _MEAN, _M2 = 0, TILE, 2 * TILE
_BLOCK, _CHUNK, _TOTAL, _EXACT = 0, 3 * TILE, 6 * TILE, 9 * TILE  # of a block, of a chunk, of all, of a second look
# How much room they take; strips may start anywhere, and read a strip beyond the last.
_SUMS_ROOM, _MOMENTS_ROOM = 4 * TILE, 12 * TILE
_PARAMS_ROOM, _TURNED_ROOM, _ROWS_ROOM = 4 * TILE, 3 * _TURNED, TOGETHER * TILE


@inlined
def _add_rows(x, at, stride, part, k, s, q, ahead):
    """Add a strip of four rows minus the shifts `k` to `s`, and their squares to `q`; ask for those `ahead`."""
    if ahead != 0:
        for t in range(TOGETHER):
            prefetch(k, x, at + t * stride + ahead)
    a = load_some(k, x, at, part) - k
    b = load_some(k, x, at + stride, part) - k
    c = load_some(k, x, at + 2 * stride, part) - k
    d = load_some(k, x, at + 3 * stride, part) - k
    return s + ((a + b) + (c + d)), fused(d, d, fused(c, c, fused(b, b, fused(a, a, q))))


@elementwise
def _block_moments(
    sums, moments, into, x, start, stride, rows, width, mask, mask_start, mask_stride, mask_step, centred, ahead
):
    """Sweep a block around the tile's shifts, write moments at `into`; return how many lanes cannot be trusted.

    The trust is that of `welford.settle`, lane by lane.
    """
    no = no_lanes(x)
    one = all_lanes(no, lane(x, 1.0))
    step = width_of(no)
    for i in range(0, width, step):
        store_lanes(no, sums, _SUM + i)
        store_lanes(no, sums, _SQUARES + i)
        store_lanes(no, sums, _SEEN + i)
    whole_rows = 0
    r = 0
    while r < rows:
        together = least(rows - r, np.int64(TOGETHER))
        if ahead == 0 and r + 2 * TOGETHER <= rows:  # beyond L2 memory has enough to do with four
            together = np.int64(2 * TOGETHER)
        for i in range(0, width, step):
            part = width - i
            k = load_lanes(no, sums, _SHIFT + i)
            s = load_lanes(no, sums, _SUM + i)
            q = load_lanes(no, sums, _SQUARES + i)
            at = start + r * stride + i
            if mask is None and together >= TOGETHER:
                s, q = _add_rows(x, at, stride, part, k, s, q, ahead)
                if together > TOGETHER:
                    s, q = _add_rows(x, at + TOGETHER * stride, stride, part, k, s, q, ahead)
            else:
                seen = load_lanes(no, sums, _SEEN + i)
                for t in range(together):
                    d = load_some(no, x, at + t * stride, part) - k
                    m = mask_start + (r + t) * mask_stride
                    if mask is not None and mask_step != 0:
                        chosen = marked_lanes(no, mask, m + i, part)
                        d = choose(chosen, d)
                        seen = seen + choose(chosen, one)
                    elif mask is not None and not counts(mask, m):
                        d = no
                    s = s + d
                    q = fused(d, d, q)
                store_lanes(seen, sums, _SEEN + i)
            store_lanes(s, sums, _SUM + i)
            store_lanes(q, sums, _SQUARES + i)
        for t in range(together):
            if mask is None or (mask_step == 0 and counts(mask, mask_start + (r + t) * mask_stride)):
                whole_rows += 1
        r += together
    bad = 0
    for i in range(width):
        n = np.float64(whole_rows) if mask is None else np.float64(load(sums, _SEEN + i)) + np.float64(whole_rows)
        block_s = np.float64(load(sums, _SUM + i))
        block_q = np.float64(load(sums, _SQUARES + i))
        offset = (block_s * (1.0 / n) if mask is None else block_s / most(n, 1.0)) if centred else 0.0
        trusted = (block_q > TINY) & (block_q < HUGE) & (block_s * offset <= POOR * block_q)
        good = trusted | (n == 0.0)
        bad += 0 if good else 1
        store(sums, _SEEN + i, lane(x, 1.0 if good else 0.0))  # from here on: whether the lane's moments stand
        store(moments, into + _N + i, n)
        mean = np.float64(load(sums, _SHIFT + i)) + offset
        store(moments, into + _MEAN + i, mean if mask is None or n > 0.0 else 0.0)
        store(moments, into + _M2 + i, block_q - block_s * offset)
    return bad


@elementwise
def _exact_moments(
    sums, moments, into, x, start, stride, rows, width, mask, mask_start, mask_stride, mask_step, centred
):
    """Take the means and M2 of a block's lanes that cannot be trusted again, in float64 and two sweeps.

    All lanes are swept, and the others keep what they have: no lane's bits depend on its neighbours.
    """
    for i in range(width):
        store(moments, _EXACT + _MEAN + i, 0.0)
        store(moments, _EXACT + _M2 + i, 0.0)
        store(moments, _EXACT + _N + i, np.nan if centred else 0.0)
    for r in range(rows if centred else 0):  # a lane's first element: sums around it are exactly 0 if all are equal
        run = start + r * stride
        at = mask_start + r * mask_stride
        for i in range(width):
            seen = True if mask is None else counts(mask, at + i * mask_step)
            pivot = load(moments, _EXACT + _N + i)
            store(moments, _EXACT + _N + i, np.float64(load(x, run + i)) if seen and np.isnan(pivot) else pivot)
    for squares in range(0 if centred else 1, 2):
        around = _EXACT + (_MEAN if squares == 1 else _N)
        for r in range(rows):
            run = start + r * stride
            at = mask_start + r * mask_stride
            for i in range(width):
                seen = True if mask is None else counts(mask, at + i * mask_step)
                d = load(x, run + i) - load(moments, around + i) if seen else 0.0
                m2 = load(moments, _EXACT + _M2 + i)
                store(moments, _EXACT + _M2 + i, m2 + (d * d if squares == 1 else d))
        if squares == 0:
            for i in range(width):
                offset = load(moments, _EXACT + _M2 + i) / most(load(moments, into + _N + i), 1.0)
                store(moments, _EXACT + _MEAN + i, load(moments, _EXACT + _N + i) + offset)
                store(moments, _EXACT + _M2 + i, 0.0)
    for i in range(width):
        if load(sums, _SEEN + i) == 0:
            store(moments, into + _MEAN + i, load(moments, _EXACT + _MEAN + i))
            store(moments, into + _M2 + i, load(moments, _EXACT + _M2 + i))


@elementwise
def _merge_lanes(moments, into, part, start, stop, mask):
    """Merge the moments at `part` into those at `into`, lane by lane, by Chan's formula.

    Numba would compile this anew for every constant among the arguments: hence callers' ``np.int64(0)``.
    """
    if mask is None:  # all of these lanes have as many elements as the first, none has 0: one division serves them all
        count = load(moments, into + _N + start) + load(moments, part + _N + start)
        share = load(moments, part + _N + start) / count if count > 0.0 else 0.0
        for i in range(start, stop):
            mean = load(moments, into + _MEAN + i)
            delta = load(moments, part + _MEAN + i) - mean
            more = delta * delta * load(moments, into + _N + i) * share
            store(moments, into + _M2 + i, load(moments, into + _M2 + i) + load(moments, part + _M2 + i) + more)
            store(moments, into + _MEAN + i, mean + delta * share)
            store(moments, into + _N + i, count)
    else:
        for i in range(start, stop):
            n = load(moments, into + _N + i)
            m = load(moments, part + _N + i)
            mean = load(moments, into + _MEAN + i)
            part_mean = load(moments, part + _MEAN + i)
            m2 = load(moments, into + _M2 + i)
            part_m2 = load(moments, part + _M2 + i)
            count = n + m
            share = m / most(count, 1.0)
            delta = part_mean - mean
            merged_mean = mean + delta * share
            merged_m2 = m2 + part_m2 + delta * delta * n * share
            # Where one side is empty the other stands as it is: a mean that is Inf times a count of 0 would be NaN.
            store(moments, into + _N + i, count)
            store(moments, into + _MEAN + i, mean if m == 0.0 else (part_mean if n == 0.0 else merged_mean))
            store(moments, into + _M2 + i, m2 if m == 0.0 else (part_m2 if n == 0.0 else merged_m2))


@scalar
def _merge_chunk(moments, mask, tail, width):
    """Merge a chunk into the total; the lanes of the tail have an element more."""
    if 0 < tail < width:
        _merge_lanes(moments, np.int64(_TOTAL), np.int64(_CHUNK), np.int64(0), tail, mask)
        _merge_lanes(moments, np.int64(_TOTAL), np.int64(_CHUNK), tail, width, mask)
    else:
        _merge_lanes(moments, np.int64(_TOTAL), np.int64(_CHUNK), np.int64(0), width, mask)


@scalar
def _tail_of(g, first, width, chunk):
    """Return how many lanes of a tile have one row more: the last chunk takes what does not fill a folded row."""
    return least(most(g.tail - first, np.int64(0)), width) if chunk == g.chunks - 1 else 0


@scalar
def _chunk_moments(moments, into, sums, x, mask, g, k0, first, width, chunk, centred):
    """Take the moments of one chunk of rows in the lanes from `first` on."""
    start = k0 * g.x_K0 + first
    mask_start = k0 * g.mask_K0 + first * g.mask_R1
    r_start = chunk * g.chunk_rows
    r_stop = least(r_start + g.chunk_rows, g.rows)
    prefix = least(np.int64(PREFIX), r_stop - r_start) if centred else 0
    no = no_lanes(x)
    share = all_lanes(no, lane(x, 1.0 / most(prefix, np.int64(1))))
    for i in range(0, width, width_of(no)):
        k = no
        for r in range(prefix):
            k = k + load_some(no, x, start + (r_start + r) * g.x_R0 + i, width - i)
        store_lanes(k * share, sums, _SHIFT + i)
    blocks = -(-(r_stop - r_start) // g.block_rows)
    tail = _tail_of(g, first, width, chunk)
    for b in range(blocks + (1 if tail > 0 else 0)):
        r = r_start + b * g.block_rows
        rows = least(g.block_rows, r_stop - r)
        wide = width
        if b == blocks:
            r, rows, wide = r_stop, 1, tail
        x_at = start + r * g.x_R0
        mask_at = mask_start + r * g.mask_R0
        at = into if b == 0 else _BLOCK
        bad = _block_moments(
            sums, moments, at, x, x_at, g.x_R0, rows, wide, mask, mask_at, g.mask_R0, g.mask_R1, centred, g.ahead
        )
        if bad > 0:
            _exact_moments(sums, moments, at, x, x_at, g.x_R0, rows, wide, mask, mask_at, g.mask_R0, g.mask_R1, centred)
        if b > 0:
            _merge_lanes(moments, into, np.int64(_BLOCK), np.int64(0), wide, mask)
        if centred:
            for i in range(wide):
                if mask is None or load(moments, at + _N + i) > 0.0:
                    store(sums, _SHIFT + i, load(moments, at + _MEAN + i))


@scalar
def _close_groups(moments, mask, g, k0, first, width, stats, eps):
    """Merge the lanes of a tile into the statistics of its groups: first those that were folded, all at once."""
    once = least(width, g.K1 * g.R1)
    for copy in range(once, width, once):
        _merge_lanes(moments, np.int64(_TOTAL), _TOTAL + copy, np.int64(0), once, mask)
    groups = g.K0 * g.K1
    a = k0 * g.K1 + first // g.R1
    b = k0 * g.K1 + least((first + width) // g.R1, g.K1)
    for group in range(a, b):
        store(stats, COUNT * groups + group, 0.0)
        store(stats, MEAN * groups + group, 0.0)
        store(stats, M2 * groups + group, 0.0)
    start = k0 * g.K1 + first // g.R1 % g.K1  # tiles start with a group, and hold whole ones
    for r in range(g.R1):
        for j in range(once // g.R1):  # group after group: one's divisions do not wait for another's
            group = start + j
            i = j * g.R1 + r
            n, mean, m2 = merge(
                load(stats, COUNT * groups + group),
                load(stats, MEAN * groups + group),
                load(stats, M2 * groups + group),
                load(moments, _TOTAL + _N + i),
                load(moments, _TOTAL + _MEAN + i),
                load(moments, _TOTAL + _M2 + i),
            )
            store(stats, COUNT * groups + group, n)
            store(stats, MEAN * groups + group, mean)
            store(stats, M2 * groups + group, m2)
    for group in range(a, b):
        rstd = rstd_of(load(stats, COUNT * groups + group), load(stats, M2 * groups + group), eps, g.scale)
        store(stats, RSTD * groups + group, rstd)


@inlined
def _strip(like, x, at, count, params, i):
    """Normalize `count` neighbours, at most as many as there are lanes, with the parameters from `i` on."""
    d = load_some(like, x, at, count) - load_lanes(like, params, _HI + i)
    return fused(d, load_lanes(like, params, _GAIN + i), load_lanes(like, params, _OFFSET + i))


@scalar
def _write_packed(params, x, y, x_at, y_at, lanes, n, stream, ahead):
    """Write `n` neighbours, whose lanes come round again and again: whole vectors from the first cache line of `y` on.

    Row by row, each would have a part of a vector at both ends, and where the output goes past the caches such a part
    waits for its line: 256 channels, 205 MB, took 3.2 copies that way.
    """
    no = no_lanes(x)
    step = width_of(no)
    head = least(until_line(y, y_at), n)
    if head > 0:
        i = 0
        while i < head:  # fewer lanes than that come round within the head
            part = least(head - i, lanes)
            store_part(_strip(no, x, x_at + i, part, params, 0), y, y_at + i, part)
            i += part
    # The parameters in the order in which lanes come from there on, and a vector more.
    turned = room(params, _TURNED_ROOM)
    first = head % lanes
    for row in range(3):
        to = row * _TURNED
        of = row * TILE
        for i in range(first, lanes):
            store(turned, to + i - first, load(params, of + i))
        for i in range(first):
            store(turned, to + lanes - first + i, load(params, of + i))
        for i in range(step):
            store(turned, to + lanes + i, load(turned, to + i))
    stop = n - (n - head) % step
    begin = head
    if not stream and (lanes == step or lanes == 2 * step):  # these read the same parameters again and again: once
        begin = head + (n - head) // (2 * step) * (2 * step)
        hi, hi_after = load_lanes(no, turned, 0), load_lanes(no, turned, step)
        gain, gain_after = load_lanes(no, turned, _TURNED), load_lanes(no, turned, _TURNED + step)
        offset, offset_after = load_lanes(no, turned, 2 * _TURNED), load_lanes(no, turned, 2 * _TURNED + step)
        for i in range(head, begin, 2 * step):
            v = fused(load_lanes(no, x, x_at + i) - hi, gain, offset)
            after = fused(load_lanes(no, x, x_at + i + step) - hi_after, gain_after, offset_after)
            store_lanes(v, y, y_at + i)
            store_lanes(after, y, y_at + i + step)
    at = 0
    for i in range(begin, stop, step):
        if stream and ahead != 0:
            prefetch(no, x, x_at + i + ahead)
        d = load_lanes(no, x, x_at + i) - load_lanes(no, turned, at)
        v = fused(d, load_lanes(no, turned, _TURNED + at), load_lanes(no, turned, 2 * _TURNED + at))
        if stream:
            stream_lanes(v, y, y_at + i)
        else:
            store_lanes(v, y, y_at + i)
        at += step
        if at >= lanes:
            at = at - lanes if at < 2 * lanes else at % lanes
    rest = n - stop
    if rest > 0:
        d = load_part(no, x, x_at + stop, rest) - load_lanes(no, turned, at)
        v = fused(d, load_lanes(no, turned, _TURNED + at), load_lanes(no, turned, 2 * _TURNED + at))
        store_part(v, y, y_at + stop, rest)
    if stream:
        settle_streams()


@scalar
def _spread(params, unsafe, x, weight, bias, stats, g, k0, first, width, by_row):
    """Give every lane of a tile its mean, as a lane holds it, gain and offset; list those float32 is unsafe for.

    By row, where weight and bias are the rows', gain and offset lack them.
    """
    groups = g.K0 * g.K1
    unsafe_count = 0
    group = k0 * g.K1 + first // g.R1 % g.K1
    left = g.R1
    channel = 0 if by_row is not None else first // g.inner % g.size
    channel_left = g.inner - first % g.inner
    mean = load(stats, MEAN * groups + group)
    rstd = load(stats, RSTD * groups + group)
    once = least(width, g.K1 * g.R1)  # further lanes are copies of these, rows side by side
    for i in range(once):
        if not 1.0 / FLOAT32_SAFE < rstd < FLOAT32_SAFE:
            for j in range(i, width, once):
                store(unsafe, unsafe_count, j)
                unsafe_count += 1
        hi = lane(x, mean)
        store(params, _HI + i, hi)
        gain, offset = rstd, 0.0
        if by_row is None:
            gain, offset = rstd * load(weight, channel), np.float64(load(bias, channel))
        store(params, _GAIN + i, gain)
        store(params, _OFFSET + i, shift_of(offset, mean - np.float64(hi), gain))
        left -= 1
        if left == 0:
            left = g.R1
            group += 1
            if group == (k0 + 1) * g.K1:
                group = k0 * g.K1
            mean = load(stats, MEAN * groups + group)
            rstd = load(stats, RSTD * groups + group)
        channel_left -= 1
        if channel_left == 0 and by_row is None:
            channel_left = g.inner
            channel = channel + 1 if channel + 1 < g.size else 0
    for i in range(once, width):
        for row in (_HI, _GAIN, _OFFSET):
            store(params, row + i, load(params, row + i - once))
    return unsafe_count


@elementwise
def _write_tile(x, y, weight, bias, stats, g, k0, first, width, chunk_start, chunk_stop, by_row):
    """Normalize chunks of rows of a tile, in lanes; in float64 where float32 overflows."""
    params = room(weight, _PARAMS_ROOM)
    unsafe = room(stats, TILE)
    exact = room(stats, _ROWS_ROOM)
    row_gain = room(weight, TOGETHER)
    row_shift = room(weight, TOGETHER)
    groups = g.K0 * g.K1
    unsafe_count = _spread(params, unsafe, x, weight, bias, stats, g, k0, first, width, by_row)
    r_start = chunk_start * g.chunk_rows
    r_stop = least(chunk_stop * g.chunk_rows, g.rows)
    tail = _tail_of(g, first, width, chunk_stop - 1)
    if by_row is None and unsafe_count == 0 and width == g.lanes == g.x_R0 == g.y_R0:
        x_at = k0 * g.x_K0 + r_start * width
        y_at = k0 * g.y_K0 + r_start * width
        once = least(width, g.K1 * g.R1)
        lanes = once if once % width_of(no_lanes(x)) == 0 else width  # of folded ones, rows side by side, one row's
        _write_packed(params, x, y, x_at, y_at, lanes, (r_stop - r_start) * width + tail, g.stream != 0, g.ahead_out)
        return
    no = no_lanes(x)
    stop = r_stop + (1 if tail > 0 else 0)
    for r in range(r_start, stop, TOGETHER):
        x_at = k0 * g.x_K0 + r * g.x_R0 + first
        y_at = k0 * g.y_K0 + r * g.y_R0 + first
        together = least(np.int64(TOGETHER), stop - r)
        whole = least(together, r_stop - r)
        for t in range(together):
            if by_row is not None:
                channel = (k0 * g.rows + r + t) * g.lanes // g.inner % g.size
                store(row_gain, t, load(weight, channel))
                store(row_shift, t, load(bias, channel))
            for u in range(unsafe_count):  # before the row is written: x and y may be one array
                i = np.int64(load(unsafe, u))
                group = k0 * g.K1 + (first + i) // g.R1 % g.K1
                if i < (width if t < whole else tail):
                    d = load(x, x_at + t * g.x_R0 + i) - load(stats, MEAN * groups + group)
                    store(exact, t * TILE + u, d * load(stats, RSTD * groups + group))
        head = least(until_line(y, y_at), width) if g.stream != 0 else 0  # as in `columns_backward`
        i = 0
        while i < width:
            part = least(width_of(no), width - i)
            if i < head:
                part = head - i
            hi = load_lanes(no, params, _HI + i)
            gain = load_lanes(no, params, _GAIN + i)
            offset = load_lanes(no, params, _OFFSET + i)
            for t in range(together):
                a = x_at + t * g.x_R0 + i
                b = y_at + t * g.y_R0 + i
                here = part if t < whole else least(part, tail - i)
                if here == width_of(no):
                    if g.stream != 0:
                        prefetch(no, x, a + TOGETHER * g.x_R0)
                    v = fused(load_lanes(no, x, a) - hi, gain, offset)
                    if by_row is not None:
                        v = fused(v, all_lanes(no, load(row_gain, t)), all_lanes(no, load(row_shift, t)))
                    if g.stream != 0 and until_line(y, b) == 0:
                        stream_lanes(v, y, b)
                    else:
                        store_lanes(v, y, b)
                elif here > 0:
                    v = fused(load_part(no, x, a, here) - hi, gain, offset)
                    if by_row is not None:
                        v = fused(v, all_lanes(no, load(row_gain, t)), all_lanes(no, load(row_shift, t)))
                    store_part(v, y, b, here)
            i += part
        for t in range(together if unsafe_count > 0 else 0):
            for u in range(unsafe_count):
                i = np.int64(load(unsafe, u))
                channel = (first + i) // g.inner % g.size
                w = load(row_gain, t) if by_row is not None else load(weight, channel)
                if i < (width if t < whole else tail):
                    offset_here = load(row_shift, t) if by_row is not None else load(bias, channel)
                    store(y, y_at + t * g.y_R0 + i, load(exact, t * TILE + u) * w + offset_here)
    if g.stream != 0:
        settle_streams()


@scalar
def _forward_tile(unit, x, y, mask, weight, bias, stats, g, eps, by_row):
    """Take the statistics of one tile's groups and write its output."""
    centred = g.centred != 0
    tiles = -(-g.lanes // g.tile)
    k0 = unit // tiles
    of_sample = k0 * g.samples // g.K0 * g.size
    weight, bias = shifted(weight, of_sample), shifted(bias, of_sample)
    first = unit % tiles * g.tile
    width = least(g.tile, g.lanes - first)
    sums = room(weight, _SUMS_ROOM)
    moments = room(stats, _MOMENTS_ROOM)
    for chunk in range(g.chunks):
        into = _TOTAL if chunk == 0 else _CHUNK
        _chunk_moments(moments, into, sums, x, mask, g, k0, first, width, chunk, centred)
        if chunk > 0:
            _merge_chunk(moments, mask, _tail_of(g, first, width, chunk), width)
    _close_groups(moments, mask, g, k0, first, width, stats, eps)
    for last in range(g.chunks, 0, -g.piece_chunks):  # the last rows first: they may still be in the L2 cache
        start = most(last - g.piece_chunks, np.int64(0))
        _write_tile(x, y, weight, bias, stats, g, k0, first, width, start, last, by_row)


@scalar
def _forward_tiles(job, geometry, x, y, mask, weight, bias, stats, eps, by_row):
    g = record(geometry)
    tiles = g.K0 * -(-g.lanes // g.tile)
    tile = claim(job, np.int64(-1), tiles)
    while tile < tiles:
        _forward_tile(tile, x, y, mask, weight, bias, stats, g, eps, by_row)
        tile = claim(job, tile, tiles)


@Kernel
def forward(job, workers, geometry, by_row, x, residual, total, y, mask, weight, bias, stats, eps, keep):
    """Normalize tile by tile: statistics, then output, while the tile is in the cache if it fits.

    Arguments are those of `rows.forward`; `residual` and `total` are None, and statistics are always kept. `by_row` is
    None, or True where each row has one weight: the type tells, so that a first call does not wait for it.
    """
    p_job, p_geometry = pointer(job), pointer(geometry)
    p_x, p_y, p_mask, p_weight, p_bias = pointer(x), pointer(y), pointer(mask), pointer(weight), pointer(bias)
    p_stats = pointer(stats)
    problem = clash(p_geometry, p_y, p_x, None, p_mask, p_weight, p_bias)
    if problem != 0:
        return problem
    for _ in prange(workers):
        _forward_tiles(p_job, p_geometry, p_x, p_y, p_mask, p_weight, p_bias, p_stats, eps, by_row)
    return 0


@scalar
def _store_chunk(unit, x, mask, weight, table, g):
    centred = g.centred != 0
    tiles = -(-g.lanes // g.tile)
    chunk = unit % g.chunks
    tile = unit // g.chunks
    first = tile % tiles * g.tile
    width = least(g.tile, g.lanes - first)
    sums = room(weight, _SUMS_ROOM)
    scratch = room(table, _MOMENTS_ROOM)
    _chunk_moments(scratch, _CHUNK, sums, x, mask, g, tile // tiles, first, width, chunk, centred)
    for row in range(3):
        for i in range(width):
            store(table, (3 * unit + row) * g.tile + i, load(scratch, _CHUNK + row * TILE + i))


@scalar
def _store_chunks(job, geometry, x, mask, weight, table):
    g = record(geometry)
    units = g.K0 * -(-g.lanes // g.tile) * g.chunks
    unit = claim(job, np.int64(-1), units)
    while unit < units:
        _store_chunk(unit, x, mask, weight, table, g)
        unit = claim(job, unit, units)


@Kernel
def moments(job, workers, geometry, x, mask, weight, table):
    """Write (count, mean, M2) of every lane of every chunk to `table`, shape (K0 * tiles, chunks, 3, tile).

    `weight` tells the lanes' dtype.
    """
    p_job, p_geometry = pointer(job), pointer(geometry)
    p_x, p_mask, p_weight, p_table = pointer(x), pointer(mask), pointer(weight), pointer(table)
    problem = clash(p_geometry, None, p_x, None, p_mask, None, None)
    if problem != 0:
        return problem
    for _ in prange(workers):
        _store_chunks(p_job, p_geometry, p_x, p_mask, p_weight, p_table)
    return 0


@scalar
def _merge_tile(tile, mask, table, stats, g, eps):
    tiles = -(-g.lanes // g.tile)
    first = tile % tiles * g.tile
    width = least(g.tile, g.lanes - first)
    scratch = room(table, _MOMENTS_ROOM)
    for chunk in range(g.chunks):
        into = _TOTAL if chunk == 0 else _CHUNK
        for row in range(3):
            for i in range(width):
                store(scratch, into + row * TILE + i, load(table, ((tile * g.chunks + chunk) * 3 + row) * g.tile + i))
        if chunk > 0:
            _merge_chunk(scratch, mask, _tail_of(g, first, width, chunk), width)
    _close_groups(scratch, mask, g, tile // tiles, first, width, stats, eps)


@Kernel
def merge_chunks(geometry, mask, table, stats, eps):
    """Merge the chunks of every tile in order, then its lanes, into `stats`, shape (4, groups)."""
    p_geometry = pointer(geometry)
    g = record(p_geometry)
    p_mask, p_table, p_stats = pointer(mask), pointer(table), pointer(stats)
    for tile in range(g.K0 * -(-g.lanes // g.tile)):
        _merge_tile(np.int64(tile), p_mask, p_table, p_stats, g, eps)


@scalar
def _apply_unit(unit, x, y, weight, bias, stats, g, by_row):
    tiles = -(-g.lanes // g.tile)
    # Tiles change fastest: neighbouring units are neighbours in memory.
    pieces = -(-g.chunks // g.piece_chunks)
    first = unit % tiles * g.tile
    chunk = unit // tiles % pieces * g.piece_chunks
    k0 = unit // (tiles * pieces)
    of_sample = k0 * g.samples // g.K0 * g.size
    weight, bias = shifted(weight, of_sample), shifted(bias, of_sample)
    width = least(g.tile, g.lanes - first)
    stop = least(chunk + g.piece_chunks, g.chunks)
    _write_tile(x, y, weight, bias, stats, g, k0, first, width, chunk, stop, by_row)


@scalar
def _apply_units(job, geometry, x, y, weight, bias, stats, by_row):
    g = record(geometry)
    units = g.K0 * -(-g.chunks // g.piece_chunks) * -(-g.lanes // g.tile)
    unit = claim(job, np.int64(-1), units)
    while unit < units:
        _apply_unit(unit, x, y, weight, bias, stats, g, by_row)
        unit = claim(job, unit, units)


@Kernel
def apply(job, workers, geometry, by_row, x, y, weight, bias, mean, var, stats, eps):
    """Normalize with given statistics, some chunks at a time; as `rows.apply`."""
    p_job, p_geometry = pointer(job), pointer(geometry)
    p_x, p_y, p_weight, p_bias, p_stats = pointer(x), pointer(y), pointer(weight), pointer(bias), pointer(stats)
    p_mean, p_var = pointer(mean), pointer(var)
    problem = clash(p_geometry, p_y, p_x, None, None, p_weight, p_bias)
    if problem != 0:
        return problem
    if mean is not None:
        fill_given(p_job, p_mean, p_var, p_stats, record(p_geometry), eps)
    for _ in prange(workers):
        _apply_units(p_job, p_geometry, p_x, p_y, p_weight, p_bias, p_stats, by_row)
    return 0
