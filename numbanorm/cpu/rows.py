"""The rows kernel: groups of long contiguous runs, in the view (K0, R0, K1, R1).

A group (k0, k1) is R0 runs of R1 elements. Its moments are taken chunk by chunk, a chunk's block by block, and merged
in that order whatever the number of threads, so the bits depend on the shape alone.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from ..core.plan import COUNT, M2, MEAN, RSTD
from .address import record
from .claims import claim
from .dtypes import counts, lane, load, pointer, retyped, room, shifted, store
from .guard import clash
from .jit import Kernel, inlined, scalar
from .lanes import (
    HEAD_FROM,
    all_lanes,
    blended,
    first_lanes,
    fused,
    lanes_for,
    load_after,
    load_lanes,
    load_part,
    load_some,
    no_lanes,
    rounded,
    settle_streams,
    store_after,
    store_lanes,
    store_part,
    store_some,
    stream_lanes,
    sum_of_lanes,
    until_line,
    width_of,
)
from .prefetch import prefetch
from .running import fill_given
from .sums import (
    BOOKS_ROOM,
    HELD_ROOM,
    UNIT_GROUPS,
    add_block,
    books_of,
    close_books,
    first_shift,
    hold,
    read_lanes,
    read_part,
    read_value,
    settle_blocks,
    sum_block,
    sum_chunk,
    sum_rows,
    sweep_strip,
    unit_moments,
)
from .welford import BLOCK, least, merge, most, rstd_of, shift_of

FLOAT32_SAFE = 1e30
"""Groups whose rstd is outside 1/FLOAT32_SAFE to FLOAT32_SAFE are written in float64: float32 would overflow."""


AHEAD_PAIRS = 256
"""Elements by which lines are asked for where two groups are written beside the sums of the next two.

LayerNorm (16384, 4096) takes 24.6 ms, 25.3 with 384, 26.2 with 768 and 24.4 with 128; in groups of 25,088 17.9, 18.4,
18.6 and 18.1.
"""

WHOLE_BYTES = 384
"""Longest rows that go into the caches, in whole vectors, where they should go past them but begin inside a line.

Into NumPy's memory, 16 bytes into a line, LayerNorm (65536, 64) takes 2.32 ms by way of an edge on Zen 4 and 1.53 so,
(43520, 96) 1.97 and 1.74, but (65536, 128) 4.87 and 7.10, in float64 (65536, 64) 2.75 and 4.61.
"""

ROWS_APART = 1024
"""Rows from this length on are written one by one, narrower ones by fours, with weights read once for all of them.

RMSNorm (512, 512) takes 56.0 us one by one on Zen 4 and 50.6 by fours, (128, 768) 21.5 and 20.7, LayerNorm 18.8 and
16.9; (512, 1024), all of whose rows fall in the same sets of L1, 101 and 106.
"""

SHORT = 256
"""Elements of a run from which `_write`, which stores by whole cache lines, pays for its 150 instructions more.

Shorter rows of no whole lanes are written by columns.
"""

_MAPS_ROOM = 3 * UNIT_GROUPS

EDGE = 32
"""Elements that may wait for the start of the next run: as many as the widest lanes hold."""


@inlined
def _affine(v, weight, bias, channel, part, hi, gain, shift):
    """Normalize `part` lanes; weight and bias are read from `channel` on, or are in `gain` and `shift` already."""
    d = fused(v - hi, gain, shift)
    if weight is None:
        return d
    return fused(d, load_some(d, weight, channel, part), load_some(d, bias, channel, part))


@inlined
def _whole(x, residual, total, weight, bias, places, i, hi, gain, shift, stream):
    """Return the output of as many elements as there are lanes, the `i`-th of a stretch and on; write their sums."""
    a, t, channel = places
    v = read_lanes(hi, x, residual, a + i)
    if total is not None:
        if stream:
            stream_lanes(v, total, t + i)
        else:
            store_lanes(v, total, t + i)
    return _affine(v, weight, bias, channel + i, width_of(v), hi, gain, shift)


@scalar
def _write_part(x, residual, total, y, weight, bias, places, i, b, part, hi, gain, shift):
    """Write fewer elements than there are lanes, at `b` of `y`, and their sums."""
    a, t, channel = places
    v = read_part(hi, x, residual, a + i, part)
    if total is not None:
        store_part(v, total, t + i, part)
    store_part(_affine(v, weight, bias, channel + i, part, hi, gain, shift), y, b, part)


@inlined
def _joined(x, residual, total, weight, bias, places, held, hi, gain, shift, edge):
    """Return the `held` elements in `edge` and after them the output of as many as a vector lacks; write their sums.

    These are made in their places and not put into `edge`: to read that again would wait for both of its parts to be
    written, 40 ns a row of 1024 on Zen 4.
    """
    a, t, channel = places
    v = load_after(hi, x, a - held, held)
    if residual is not None:
        v = rounded(v + load_after(hi, residual, a - held, held), x)
    if total is not None:
        store_after(v, total, t - held, held)
    d = fused(v - hi, gain, shift)
    if weight is not None:
        d = fused(d, load_after(hi, weight, channel - held, held), load_after(hi, bias, channel - held, held))
    return blended(first_lanes(hi, held), load_lanes(hi, edge, 0), d)


@inlined
def _write_head(x, residual, total, y, weight, bias, places, b, head, hi, gain, shift, edge, joins, held):
    """Write the first `head` elements of a run at `b` of `y`, after those in `edge` where it joins them."""
    if joins:
        v = _joined(x, residual, total, weight, bias, places, held, hi, gain, shift, edge)
        stream_lanes(v, y, b - held)
    elif head > 0:
        _write_part(x, residual, total, y, weight, bias, places, np.int64(0), b, head, hi, gain, shift)


@inlined
def _write(x, residual, total, y, weight, bias, places, b, n, hi, gain, shift, g, edge, carry):
    """Write `n` neighbours of one affine map to `y` from `b` on; return what `edge` holds now.

    ``places = (a, t, channel)`` tells where they begin in x and residual, in total, and in weight and bias.

    What comes before the first whole cache line of `y` goes apart: a vector that lies across two lines takes twice as
    long to store (100,352 elements in the L2 cache: 21 us, and 10.5 with the head apart; a copy takes 10).

    Past the caches only whole vectors go. The end of a run waits in `edge` for the start of the next to fill it up:
    ``carry = (next, held)`` tells where that must start, and how many elements wait. Written by themselves, the two
    would fetch their line, and all streams would wait for it: 0.1 us a run, 28 to 37 ms at (65536, 1024).
    """
    step = width_of(hi)
    after, held = carry
    past = g.stream != 0
    stream = past and n >= 2 * step
    if weight is None and step <= n <= 2 * step:  # two vectors that overlap, both read before one is written
        end = n - step
        apart = n < step  # never; Numba would compile `_whole` anew for a constant
        first = _whole(x, residual, total, None, None, places, np.int64(0), hi, gain, shift, apart)
        last = _whole(x, residual, total, None, None, places, end, hi, gain, shift, apart)
        store_lanes(first, y, b)
        store_lanes(last, y, b + end)
        return carry
    joins = stream and held > 0 and after == b
    head = 0
    if joins:
        head = step - held
    elif past or n >= HEAD_FROM:
        head = least(until_line(y, b), n)
    stop = n - (n - head) % step
    _write_head(x, residual, total, y, weight, bias, places, b, head, hi, gain, shift, edge, joins, held)
    held = 0 if joins else held
    both = stream
    if total is not None:
        both = stream and until_line(total, places[1] + head) == 0
    if stream:
        for i in range(head, stop, step):
            if g.ahead_out != 0:
                prefetch(hi, x, places[0] + i + g.ahead_out)
            stream_lanes(_whole(x, residual, total, weight, bias, places, i, hi, gain, shift, both), y, b + i)
    else:
        for i in range(head, stop, step):
            store_lanes(_whole(x, residual, total, weight, bias, places, i, hi, gain, shift, both), y, b + i)
    if stop < n:
        if stream:
            _write_edge(y, edge, (after, held))
            after, held = b + n, n - stop
        to = edge if stream else y
        at = 0 if stream else b + stop
        _write_part(x, residual, total, to, weight, bias, places, stop, at, n - stop, hi, gain, shift)
    return after, held


@scalar
def _write_edge(y, edge, carry):
    """Write what waits in `edge` by itself."""
    after, held = carry
    if held > 0:
        store_part(load_part(no_lanes(edge), edge, 0, held), y, after - held, held)


@inlined
def map_of(x, mean, rstd):
    """Return lanes (hi, gain, shift) with which (x - mean) * rstd is (x - hi) * gain + shift.

    hi is the mean as a lane holds it; the shift makes up for the rest of it: two operations an element, not three.
    """
    no = no_lanes(x)
    hi = lane(x, mean)
    shift = shift_of(0.0, mean - np.float64(hi), rstd)
    return all_lanes(no, hi), all_lanes(no, lane(x, rstd)), all_lanes(no, lane(x, shift))


@inlined
def _channel_map(x, weight, bias, channel, mean, rstd):
    """Return gain and shift of one channel, weight and bias included."""
    no = no_lanes(x)
    gain = lane(x, rstd) * load(weight, channel)
    # In lanes' own type: by float64, and back, (8, 2048, 7, 7) takes 292 us in inference, not 268.
    shift = shift_of(load(bias, channel), lane(x, mean - np.float64(lane(x, mean))), gain)
    return all_lanes(no, gain), all_lanes(no, shift)


@scalar
def _is_safe(rstd):
    """Tell whether float32 lanes do not overflow on the way to the output."""
    return 1.0 / FLOAT32_SAFE < rstd < FLOAT32_SAFE


@inlined
def _run_of(g, k0, r0, k1):
    """Return where a run begins in x, in y and in packed memory."""
    return (
        k0 * g.x_K0 + r0 * g.x_R0 + k1 * g.x_K1,
        k0 * g.y_K0 + r0 * g.y_R0 + k1 * g.y_K1,
        ((k0 * g.R0 + r0) * g.K1 + k1) * g.R1,
    )


@scalar
def _write_exact(x, residual, total, y, weight, bias, starts, width, mean, rstd, g):
    """Write `width` neighbours one by one, in float64."""
    x_start, y_start, flat = starts
    for i in range(width):
        channel = (flat + i) // g.inner % g.size
        v = read_value(x, residual, x_start + i)
        if total is not None:
            store(total, flat + i, v)
        d = (v - mean) * rstd
        store(y, y_start + i, d * load(weight, channel) + load(bias, channel))


@inlined
def _normalize(x, residual, total, y, weight, bias, g, run, k1, j, width, mean, rstd, edge, carry, along, across):
    """Write `width` elements of one run from `j` on, stretch by stretch of the affine map."""
    x_start, y_start, flat = run[0] + j, run[1] + j, run[2] + j
    if not _is_safe(rstd):
        _write_exact(x, residual, total, y, weight, bias, (x_start, y_start, flat), width, mean, rstd, g)
        return carry
    done = 0
    if along is not None:
        hi, gain, shift = map_of(x, mean, rstd)
        channel = k1 * g.R1 + j if g.size == g.K1 * g.R1 else flat % g.size
        while done < width:
            n = least(width - done, g.size - channel)
            places = (x_start + done, flat + done, channel)
            b = y_start + done
            carry = _write(x, residual, total, y, weight, bias, places, b, n, hi, gain, shift, g, edge, carry)
            channel = np.int64(0)
            done += n
    if across is not None:
        hi = all_lanes(no_lanes(x), lane(x, mean))
        # Counted on, not divided: (8, 2048, 7, 7) in 32 groups 366 to 333 us.
        of, within = (k1, j) if g.inner == g.R1 and g.size == g.K1 else (_channel_of(g, flat), flat % g.inner)
        while done < width:
            n = least(width - done, g.inner - within)
            gain, shift = _channel_map(x, weight, bias, of, mean, rstd)
            within = np.int64(0)
            of = of + 1 if of + 1 < g.size else np.int64(0)
            places = (x_start + done, flat + done, np.int64(0))
            b = y_start + done
            carry = _write(x, residual, total, y, None, None, places, b, n, hi, gain, shift, g, edge, carry)
            done += n
    return carry


@scalar
def _add_run(x, residual, total, g, k0, r0, k1):
    """Write one run of x + residual, rounded to the dtype of `total`, which is packed."""
    start = k0 * g.x_K0 + r0 * g.x_R0 + k1 * g.x_K1
    flat = ((k0 * g.R0 + r0) * g.K1 + k1) * g.R1
    no = no_lanes(x)
    for i in range(0, g.R1, width_of(no)):
        part = g.R1 - i
        if g.ahead_out != 0:
            prefetch(no, x, start + i + g.ahead_out)
            prefetch(no, residual, start + i + g.ahead_out)
        store_some(load_some(no, x, start + i, part) + load_some(no, residual, start + i, part), total, flat + i, part)


@scalar
def _store_statistics(stats, groups, group, count, mean, m2, rstd):
    store(stats, COUNT * groups + group, count)
    store(stats, MEAN * groups + group, mean)
    store(stats, M2 * groups + group, m2)
    store(stats, RSTD * groups + group, rstd)


@inlined
def _next_group(g, k0, k1):
    """Count on, without a division."""
    k1 += 1
    return (k0, k1) if k1 < g.K1 else (k0 + 1, 0)


@inlined
def _channel_of(g, flat):
    """Return the channel of an element, by its place in packed memory."""
    return flat // g.inner % g.size


@scalar
def _write_ends(x, residual, total, y, weight, bias, g, x_at, group, head, mean, rstd, edge, carry):
    """Write the first `head` elements of a group, and as many as a vector lacks then at its end, by way of `edge`."""
    hi, gain, low = map_of(x, mean, rstd)
    rest = width_of(hi) - head
    after, held = carry
    flat = group * g.R1
    y_at = flat
    first, last = np.int64(0), g.R1 - rest
    places = (x_at, flat, first)
    joins = held > 0 and after == y_at
    if not joins:
        _write_edge(y, edge, carry)
    if g.inner == 1:
        _write_head(x, residual, total, y, weight, bias, places, y_at, head, hi, gain, low, edge, joins, held)
        _write_part(x, residual, total, edge, weight, bias, places, last, first, rest, hi, gain, low)
    else:
        gain, shift = _channel_map(x, weight, bias, _channel_of(g, flat), mean, rstd)
        _write_head(x, residual, total, y, None, None, places, y_at, head, hi, gain, shift, edge, joins, held)
        gain, shift = _channel_map(x, weight, bias, _channel_of(g, flat + last), mean, rstd)
        _write_part(x, residual, total, edge, None, None, places, last, first, rest, hi, gain, shift)
    return y_at + g.R1, rest


@inlined
def _x_of(g, group):
    """Return where a group of one run begins in x."""
    return group // g.K1 * g.x_K0 + group % g.K1 * g.x_K1


@scalar
def _stream_pair(x, residual, total, y, weight, bias, g, group, held, edge, carry, centred):
    """Write two groups beside the sums of the next two; return the moments of these, and what `edge` holds now.

    Memory reads and writes best by turns: LayerNorm (16384, 4096) takes 30.0 ms where a row is summed, then written,
    and 24.6 so; GroupNorm (64, 256, 56, 56) 21.8 and 17.9. Blocks, shifts and merges, so also all bits, are those of
    `sum_chunk`. Both outputs are made before one is stored: weights are read once for two.

    Sums go vector by vector from a group's start, the output from its first whole line: what comes before, and as much
    at the end, is written apart, by `edge` (see `_write`).
    """
    no = no_lanes(x)
    step = width_of(no)
    a, b, c, d = _x_of(g, group), _x_of(g, group + 1), _x_of(g, group + 2), _x_of(g, group + 3)
    flat_a, flat_b = group * g.R1, (group + 1) * g.R1
    y_a, y_b = flat_a, flat_b
    mean_a, mean_b = load(held, 0), load(held, 1)
    rstd_a, rstd_b = load(held, UNIT_GROUPS), load(held, UNIT_GROUPS + 1)
    hi_a, gain_a, low_a = map_of(x, mean_a, rstd_a)
    hi_b, gain_b, low_b = map_of(x, mean_b, rstd_b)
    near = np.int64(AHEAD_PAIRS)
    head = until_line(y, y_a)
    if head > 0:
        carry = _write_ends(x, residual, total, y, weight, bias, g, a, group, head, mean_a, rstd_a, edge, carry)
        carry = _write_ends(x, residual, total, y, weight, bias, g, b, group + 1, head, mean_b, rstd_b, edge, carry)
    own = first_lanes(no, step - head)  # the lanes of a stretch in its last strip, which reaches into the next
    both = total is not None and until_line(total, flat_a + head) == 0
    from_a, from_b = (a + head, flat_a + head, head), (b + head, flat_b + head, head)
    of_c = of_d = (0.0, 0.0, 0.0)
    for chunk in range(0, g.R1, g.chunk_width):
        chunk_stop = least(chunk + g.chunk_width, g.R1)
        k_c = first_shift(x, residual, c + chunk, chunk_stop - chunk, centred)
        k_d = first_shift(x, residual, d + chunk, chunk_stop - chunk, centred)
        books_c = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, np.float64(k_c))
        books_d = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, np.float64(k_d))
        for j in range(chunk, chunk_stop, BLOCK):
            width = least(np.int64(BLOCK), chunk_stop - j)
            s_c = q_c = s_d = q_d = no
            around_c, around_d = all_lanes(no, lane(x, books_c[6])), all_lanes(no, lane(x, books_d[6]))
            stop = j + width
            written = stop if head == 0 or stop < g.R1 else stop - step
            i = j
            while i < written:
                part = written
                if g.inner == 1:
                    for t in range(i, part, step):
                        s_c, q_c = sweep_strip(x, residual, c + t, around_c, s_c, q_c, near)
                        s_d, q_d = sweep_strip(x, residual, d + t, around_d, s_d, q_d, near)
                        v_a = _whole(x, residual, total, weight, bias, from_a, t, hi_a, gain_a, low_a, both)
                        v_b = _whole(x, residual, total, weight, bias, from_b, t, hi_b, gain_b, low_b, both)
                        stream_lanes(v_a, y, y_a + head + t)
                        stream_lanes(v_b, y, y_b + head + t)
                else:
                    end = i - i % g.inner + g.inner
                    gain_a, shift_a = _channel_map(x, weight, bias, _channel_of(g, flat_a + i), mean_a, rstd_a)
                    gain_b, shift_b = _channel_map(x, weight, bias, _channel_of(g, flat_b + i), mean_b, rstd_b)
                    if head == 0 or end >= g.R1:
                        part = least(part, end)
                    elif i < end - step:
                        part = least(part, end - step)
                    else:
                        part = end
                        gain, shift = _channel_map(x, weight, bias, _channel_of(g, flat_a + end), mean_a, rstd_a)
                        gain_a, shift_a = blended(own, gain_a, gain), blended(own, shift_a, shift)
                        gain, shift = _channel_map(x, weight, bias, _channel_of(g, flat_b + end), mean_b, rstd_b)
                        gain_b, shift_b = blended(own, gain_b, gain), blended(own, shift_b, shift)
                    for t in range(i, part, step):
                        s_c, q_c = sweep_strip(x, residual, c + t, around_c, s_c, q_c, near)
                        s_d, q_d = sweep_strip(x, residual, d + t, around_d, s_d, q_d, near)
                        v_a = _whole(x, residual, total, None, None, from_a, t, hi_a, gain_a, shift_a, both)
                        v_b = _whole(x, residual, total, None, None, from_b, t, hi_b, gain_b, shift_b, both)
                        stream_lanes(v_a, y, y_a + head + t)
                        stream_lanes(v_b, y, y_b + head + t)
                i = part
            for i in range(written, stop, step):
                s_c, q_c = sweep_strip(x, residual, c + i, around_c, s_c, q_c, near)
                s_d, q_d = sweep_strip(x, residual, d + i, around_d, s_d, q_d, near)
            n = np.float64(width)
            sum_c, squares_c = sum_of_lanes(s_c), sum_of_lanes(q_c)
            sum_d, squares_d = sum_of_lanes(s_d), sum_of_lanes(q_d)
            books_c = add_block(x, residual, c + j, g, g.R0, width, None, c, books_c, n, sum_c, squares_c, centred)
            books_d = add_block(x, residual, d + j, g, g.R0, width, None, d, books_d, n, sum_d, squares_d, centred)
        count, mean, m2 = close_books(books_c, centred)
        of_c = merge(of_c[0], of_c[1], of_c[2], count, mean, m2)
        count, mean, m2 = close_books(books_d, centred)
        of_d = merge(of_d[0], of_d[1], of_d[2], count, mean, m2)
    return of_c, of_d, carry


@scalar
def _settle_unit(held, n, stats, keep, groups, base, eps, scale):
    """Put rstd in the place of the M2 of a unit's `n` groups; keep statistics for those who want them.

    Return whether all of them are safe (`_is_safe`).

    After all of the unit: with its root and divisions at the end of each group LayerNorm (4096, 64) takes 38.7 ns a
    row on Zen 4, and 35.5 so.
    """
    safe = True
    for i in range(n):
        mean, m2, count = load(held, i), load(held, UNIT_GROUPS + i), load(held, 2 * UNIT_GROUPS + i)
        rstd = rstd_of(count, m2, eps, scale)
        safe &= _is_safe(rstd)
        store(held, UNIT_GROUPS + i, rstd)
        if keep:
            _store_statistics(stats, groups, base + i, count, mean, m2, rstd)
    return safe


@inlined
def _map(x, held, i):
    """Return `map_of` a unit's `i`-th group."""
    return map_of(x, load(held, i), load(held, UNIT_GROUPS + i))


@inlined
def _put(v, y, at, stream):
    """Write whole lanes, past the caches or into them."""
    if stream:
        stream_lanes(v, y, at)
    else:
        store_lanes(v, y, at)


@inlined
def _write_rows(x, residual, total, y, weight, bias, g, base, n, held, stream):
    """Write a unit's `n` rows, all of whole lanes, with weights along them.

    `_write`, which takes runs of any length from anywhere, has some 150 instructions a run: LayerNorm (65536, 64) takes
    2.07 ms so on Zen 4, and 1.47 by rows, RMSNorm 1.92 and 1.21.
    """
    step = width_of(no_lanes(x))
    a, t = base * g.x_K0, base * g.R1
    b = t
    both = stream if total is None else g.stream != 0 and until_line(total, t) == 0
    a_row, row, none = g.x_K0, g.R1, np.int64(0)
    fours = n - n % 4 if row < ROWS_APART else none  # weights are read once for four rows
    for i in range(0, fours, 4):
        p, q, r, s = _map(x, held, i), _map(x, held, i + 1), _map(x, held, i + 2), _map(x, held, i + 3)
        at_q, at_r, at_s = (
            (a + a_row, t + row, none),
            (a + 2 * a_row, t + 2 * row, none),
            (a + 3 * a_row, t + 3 * row, none),
        )
        for j in range(0, row, step):
            v_p = _whole(x, residual, total, weight, bias, (a, t, none), j, p[0], p[1], p[2], both)
            v_q = _whole(x, residual, total, weight, bias, at_q, j, q[0], q[1], q[2], both)
            v_r = _whole(x, residual, total, weight, bias, at_r, j, r[0], r[1], r[2], both)
            v_s = _whole(x, residual, total, weight, bias, at_s, j, s[0], s[1], s[2], both)
            _put(v_p, y, b + j, stream)
            _put(v_q, y, b + row + j, stream)
            _put(v_r, y, b + 2 * row + j, stream)
            _put(v_s, y, b + 3 * row + j, stream)
        a += 4 * a_row
        t += 4 * row
        b += 4 * row
    for i in range(fours, n):
        p = _map(x, held, i)
        for j in range(0, row, step):
            v = _whole(x, residual, total, weight, bias, (a, t, none), j, p[0], p[1], p[2], both)
            _put(v, y, b + j, stream)
        a += a_row
        t += row
        b += row


@inlined
def _write_column(x, residual, total, y, weight, bias, g, base, n, maps, j, part, half):
    """Write up to a vector, from the `j`-th element on, of each of `n` rows; the weights stay in registers."""
    no = lanes_for(x, half)
    a, b = base * g.x_K0 + j, base * g.R1 + j
    gain_of, bias_of = load_some(no, weight, j, part), load_some(no, bias, j, part)
    for i in range(n):
        hi = all_lanes(no, load(maps, i))
        gain, shift = all_lanes(no, load(maps, UNIT_GROUPS + i)), all_lanes(no, load(maps, 2 * UNIT_GROUPS + i))
        v = load_some(no, x, a, part)
        if residual is not None:
            v = rounded(v + load_some(no, residual, a, part), x)
        if total is not None:
            store_some(v, total, b, part)
        store_some(fused(fused(v - hi, gain, shift), gain_of, bias_of), y, b, part)
        a += g.x_K0
        b += g.R1


@scalar
def _write_columns(x, residual, total, y, weight, bias, g, base, n, held, half):
    """Write `n` narrow rows into the caches: as many elements of each at a time as there are lanes.

    What the rows share stays in registers, what belongs to a row is made for all of them at once: RMSNorm in rows of 16
    takes 11.5 ns a row on Zen 4 row by row, and 6.8 so, in rows of 64 as long as by `_write_rows`.
    """
    maps = room(weight, _MAPS_ROOM)
    for i in range(n):
        mean, rstd = load(held, i), load(held, UNIT_GROUPS + i)
        hi = lane(x, mean)
        store(maps, i, hi)
        store(maps, UNIT_GROUPS + i, lane(x, rstd))
        store(maps, 2 * UNIT_GROUPS + i, lane(x, shift_of(0.0, mean - np.float64(hi), rstd)))
    step = width_of(lanes_for(x, half))
    whole = g.R1 - g.R1 % step
    for j in range(0, whole, step):
        _write_column(x, residual, total, y, weight, bias, g, base, n, maps, j, step, half)
    if whole < g.R1:
        _write_column(x, residual, total, y, weight, bias, g, base, n, maps, whole, g.R1 - whole, half)


@scalar
def _write_cached(x, residual, total, y, weight, bias, g, base, n, held, safe, rows, narrow, half):
    """Write a unit's `n` rows into the caches, with weights along them: all at once where all are safe."""
    i = np.int64(0)
    while i < n:
        several = n - i if safe else np.int64(1)
        first = base + i
        mean, rstd = load(held, i), load(held, UNIT_GROUPS + i)
        if safe or _is_safe(rstd):
            own = shifted(held, i)
            if narrow is not None:
                _write_columns(x, residual, total, y, weight, bias, g, first, several, own, half)
            if rows is not None:
                past = g.stream != 0
                _write_rows(x, residual, total, y, weight, bias, g, first, several, own, past)
        else:
            starts = first * g.x_K0, first * g.R1, first * g.R1
            _write_exact(x, residual, total, y, weight, bias, starts, g.R1, mean, rstd, g)
        i += several


@scalar
def _write_groups(x, residual, total, y, weight, bias, g, base, after, held, edge, carry, along, across):
    """Write the groups from `base` on, before `after`, run by run of those that are taken together."""
    k0, k1 = base // g.K1, base % g.K1
    i = np.int64(0)
    while base < after:
        n = after - base if g.R0 == 1 else least(g.together, least(after - base, g.K1 - k1))
        k0_of, k1_of = k0, k1
        for r0 in range(g.R0):
            k0_of, k1_of = k0, k1
            for group in range(i, i + n):
                mean, rstd = load(held, group), load(held, UNIT_GROUPS + group)
                run = _run_of(g, k0_of, r0, k1_of)
                carry = _normalize(
                    x, residual, total, y, weight, bias, g, run, k1_of, 0, g.R1, mean, rstd, edge, carry, along, across
                )
                k0_of, k1_of = _next_group(g, k0_of, k1_of)
        i += n
        base += n
        k0, k1 = k0_of, k1_of
    return carry


@scalar
def spans_of_sample(g):
    """Return into how many spans the groups are cut that share weights."""
    return -(-(g.K0 * g.K1 // g.samples) // g.span_groups)


@scalar
def _forward_span(
    span,
    x,
    residual,
    total,
    y,
    mask,
    weight,
    bias,
    stats,
    keep,
    g,
    eps,
    pairs,
    blocks,
    chunks,
    along,
    across,
    rows,
    narrow,
    half,
):
    """Take some groups, unit by unit: statistics of a unit's groups, then their output, while they are in the cache.

    A group's statistics end in a chain of divisions; those of the next do not wait for it, its own output would. A
    fence after each group would wait for its streams: 3 of 34 ms at (16384, 4096).
    """
    centred = g.centred != 0
    edge = room(y, EDGE)
    held = room(stats, HELD_ROOM)
    books = room(stats, BOOKS_ROOM)
    carry = (np.int64(0), np.int64(0))
    groups = g.K0 * g.K1
    own, spans = groups // g.samples, spans_of_sample(g)
    sample = span // spans
    first = sample * own + span % spans * g.span_groups
    stop = least(first + g.span_groups, (sample + 1) * own)
    weight, bias = shifted(weight, sample * g.size), shifted(bias, sample * g.size)
    k0, k1 = first // g.K1, first % g.K1
    base = first
    while base < stop:
        after = least(base + g.unit_groups, stop)
        group = base
        if narrow is not None:
            sum_rows(x, residual, g, base, after - base, held, half, centred)
            settle_blocks(x, residual, g, base, after - base, held, centred)
        if rows is not None:
            for i in range(after - base):
                sum_block(x, residual, g, base + i, k1, held, i, centred)
            settle_blocks(x, residual, g, base, after - base, held, centred)
        if blocks is not None:
            for i in range(after - base):
                sum_block(x, residual, g, k0, k1, held, i, centred)
                k0, k1 = _next_group(g, k0, k1)
            settle_blocks(x, residual, g, base, after - base, held, centred)
        if chunks is not None:
            while group < after:
                n = least(g.together, least(after - group, g.K1 - k1))
                unit_moments(x, residual, mask, g, k0, k1, n, books, held, group - base, centred)
                group += n
                k0, k1 = _next_group(g, k0, k1 + n - 1)
        safe = _settle_unit(held, after - base, stats, keep, groups, base, eps, g.scale)
        if pairs is not None:
            while base + 4 <= stop and _is_safe(load(held, UNIT_GROUPS)) and _is_safe(load(held, UNIT_GROUPS + 1)):
                moments, others, carry = _stream_pair(
                    x, residual, total, y, weight, bias, g, base, held, edge, carry, centred
                )
                base += 2
                after += 2
                hold(held, np.int64(0), moments)
                hold(held, np.int64(1), others)
                _settle_unit(held, np.int64(2), stats, keep, groups, base, eps, g.scale)
                k0, k1 = after // g.K1, after % g.K1
        if rows is not None:
            _write_cached(x, residual, total, y, weight, bias, g, base, after - base, held, safe, rows, narrow, half)
        if narrow is not None:
            _write_cached(x, residual, total, y, weight, bias, g, base, after - base, held, safe, rows, narrow, half)
        if blocks is not None:
            in_lines = until_line(y, 0) == 0
            if safe and g.by_rows != 0 and (in_lines or g.stream == 0 or g.R1 * g.y_itemsize <= WHOLE_BYTES):
                past = g.stream != 0 and in_lines
                _write_rows(x, residual, total, y, weight, bias, g, base, after - base, held, past)
            else:
                carry = _write_groups(
                    x, residual, total, y, weight, bias, g, base, after, held, edge, carry, along, across
                )
        if chunks is not None:
            carry = _write_groups(x, residual, total, y, weight, bias, g, base, after, held, edge, carry, along, across)
        base = after
    if blocks is not None:
        _write_edge(y, edge, carry)
    if chunks is not None:
        _write_edge(y, edge, carry)
    if g.stream != 0:
        settle_streams()


@scalar
def _forward_spans(
    job,
    geometry,
    x,
    residual,
    total,
    y,
    mask,
    weight,
    bias,
    stats,
    keep,
    eps,
    pairs,
    blocks,
    chunks,
    along,
    across,
    rows,
    narrow,
    half,
):
    g = record(geometry)
    spans = g.samples * spans_of_sample(g)
    span = claim(job, np.int64(-1), spans)
    while span < spans:
        _forward_span(
            span,
            x,
            residual,
            total,
            y,
            mask,
            weight,
            bias,
            stats,
            keep,
            g,
            eps,
            pairs,
            blocks,
            chunks,
            along,
            across,
            rows,
            narrow,
            half,
        )
        span = claim(job, span, spans)


@Kernel
def forward(
    job,
    workers,
    geometry,
    pairs,
    blocks,
    chunks,
    along,
    across,
    rows,
    narrow,
    half,
    x,
    residual,
    total,
    y,
    mask,
    weight,
    bias,
    stats,
    eps,
    keep,
):
    """Normalize group by group: statistics, then output, while the group is in the cache; return `clash`'s answer.

    `stats` has a column for each group; `keep` is false where nobody wants them, and it may have none.

    With `residual`, which lies as `x` does, x + residual is normalized in place of `x`, and written to `total`, packed,
    beside the output: to write it before its statistics would cost a fetch of its lines.

    What follows the geometry is None, or True where the geometry says so: two groups are written beside the statistics
    of the next two (`_stream_pair`); each group is a block of its own, or chunks of blocks; weights lie along a run, or
    each is a stretch's of it; groups are rows that are written into the caches (`_write_rows`), or narrow ones
    (`_write_columns`), which half of the usual lanes hold. The type tells, so that a first call does not wait for what
    other arrays take.
    """
    p_job, p_geometry = pointer(job), pointer(geometry)
    p_x, p_y, p_mask, p_weight, p_bias = pointer(x), pointer(y), pointer(mask), pointer(weight), pointer(bias)
    p_residual, p_total, p_stats = pointer(residual), pointer(total), pointer(stats)
    problem = clash(p_geometry, p_y, p_x, p_residual, p_mask, p_weight, p_bias)
    if problem != 0:
        return problem
    for _ in prange(workers):
        _forward_spans(
            p_job,
            p_geometry,
            p_x,
            p_residual,
            p_total,
            p_y,
            p_mask,
            p_weight,
            p_bias,
            p_stats,
            keep,
            eps,
            pairs,
            blocks,
            chunks,
            along,
            across,
            rows,
            narrow,
            half,
        )
    return 0


@scalar
def _chunk_moments(unit, x, mask, table, g):
    centred = g.centred != 0
    group = unit // g.chunks
    chunk = unit % g.chunks
    books = room(table, BOOKS_ROOM)
    one = np.int64(1)
    sum_chunk(x, None, mask, g, group // g.K1, group % g.K1, one, chunk, books, centred)
    count, mean, m2 = close_books(books_of(books, np.int64(0)), centred)
    store(table, 3 * unit + COUNT, count)
    store(table, 3 * unit + MEAN, mean)
    store(table, 3 * unit + M2, m2)


@scalar
def _all_moments(job, geometry, x, mask, table):
    g = record(geometry)
    units = g.K0 * g.K1 * g.chunks
    unit = claim(job, np.int64(-1), units)
    while unit < units:
        _chunk_moments(unit, x, mask, table, g)
        unit = claim(job, unit, units)


@Kernel
def moments(job, workers, geometry, x, mask, table):
    """Write (count, mean, M2) of every chunk of every group to `table`, shape (groups, chunks, 3)."""
    p_job, p_geometry = pointer(job), pointer(geometry)
    p_x, p_mask, p_table = pointer(x), pointer(mask), pointer(table)
    problem = clash(p_geometry, None, p_x, None, p_mask, None, None)
    if problem != 0:
        return problem
    for _ in prange(workers):
        _all_moments(p_job, p_geometry, p_x, p_mask, p_table)
    return 0


@scalar
def _merge_chunks(table, stats, g, eps):
    groups = g.K0 * g.K1
    for group in range(groups):
        of = 3 * g.chunks * group
        count, mean, m2 = load(table, of + COUNT), load(table, of + MEAN), load(table, of + M2)
        for chunk in range(1, g.chunks):
            at = of + 3 * chunk
            count, mean, m2 = merge(
                count, mean, m2, load(table, at + COUNT), load(table, at + MEAN), load(table, at + M2)
            )
        _store_statistics(stats, groups, group, count, mean, m2, rstd_of(count, m2, eps, g.scale))


@Kernel
def merge_chunks(geometry, table, stats, eps):
    """Merge the chunks of every group in order into `stats`, shape (4, groups)."""
    p_geometry = pointer(geometry)
    _merge_chunks(pointer(table), pointer(stats), record(p_geometry), eps)


@scalar
def _apply_piece(sample, piece, x, y, weight, bias, stats, g, edge, carry, along, across):
    """Normalize some runs of a sample, or a part of one, with given statistics."""
    runs = g.K0 * g.R0 * g.K1 // g.samples
    first = sample * runs + piece // g.across * g.piece_runs
    j = piece % g.across * g.chunk_width
    width = least(g.chunk_width, g.R1 - j)
    groups = g.K0 * g.K1
    k1 = first % g.K1
    r0 = first // g.K1 % g.R0
    k0 = first // (g.K1 * g.R0)
    run = _run_of(g, k0, r0, k1)
    for _ in range(least(g.piece_runs, (sample + 1) * runs - first)):
        group = k0 * g.K1 + k1
        mean = load(stats, MEAN * groups + group)
        rstd = load(stats, RSTD * groups + group)
        carry = _normalize(x, None, None, y, weight, bias, g, run, k1, j, width, mean, rstd, edge, carry, along, across)
        k1 += 1  # counted on: three divisions a run take as long as 30 elements
        run = run[0] + g.x_K1, run[1] + g.y_K1, run[2] + g.R1
        if k1 == g.K1:
            k1 = 0
            r0 += 1
            if r0 == g.R0:
                r0 = 0
                k0 += 1
            run = _run_of(g, k0, r0, k1)
    return carry


@scalar
def _channel_maps(maps, x, weight, bias, stats, g):
    """Write (hi, gain, shift) of all channels, one array after the other; tell whether all are safe.

    Each channel comes once a sample: (8, 2048, 7, 7) takes 177 us on Zen 4 where its map is made for each run, which is
    then written as runs of any length are, and 107 so.
    """
    channels = g.K1
    for channel in range(channels):
        mean, rstd = load(stats, MEAN * channels + channel), load(stats, RSTD * channels + channel)
        if not _is_safe(rstd):
            return False
        hi = lane(x, mean)
        gain = lane(x, rstd) * load(weight, channel)
        store(maps, channel, hi)
        store(maps, channels + channel, gain)
        store(maps, 2 * channels + channel, shift_of(load(bias, channel), lane(x, mean - np.float64(hi)), gain))
    return True


@scalar
def _apply_short(piece, x, y, maps, g):
    """Normalize some runs, each a channel's and one to two vectors long, as two vectors that overlap."""
    no = no_lanes(x)
    first = piece * g.piece_runs
    left = least(g.piece_runs, g.R0 * g.K1 - first)
    r0, k1 = first // g.K1, first % g.K1
    end = g.R1 - width_of(no)
    while left > 0:
        a, b, _ = _run_of(g, np.int64(0), r0, k1)
        for channel in range(k1, least(g.K1, k1 + left)):
            hi = all_lanes(no, load(maps, channel))
            gain, shift = all_lanes(no, load(maps, g.K1 + channel)), all_lanes(no, load(maps, 2 * g.K1 + channel))
            # Both read before one is written: they may be the same array.
            v, w = load_lanes(no, x, a), load_lanes(no, x, a + end)
            store_lanes(fused(v - hi, gain, shift), y, b)
            store_lanes(fused(w - hi, gain, shift), y, b + end)
            a += g.x_K1
            b += g.y_K1
        left -= g.K1 - k1
        k1 = np.int64(0)
        r0 += 1


@scalar
def _pieces_of_sample(g):
    """Return into how many pieces the runs are cut that share weights."""
    return -(-(g.K0 * g.R0 * g.K1 // g.samples) // g.piece_runs) * g.across


@scalar
def _apply_span(span, x, y, weight, bias, stats, maps, short, g, along, across):
    pieces = _pieces_of_sample(g)
    spans = -(-pieces // g.span_pieces)
    sample = span // spans
    span = span % spans
    weight, bias = shifted(weight, sample * g.size), shifted(bias, sample * g.size)
    edge = room(y, EDGE)
    carry = (np.int64(0), np.int64(0))
    for piece in range(span * g.span_pieces, least((span + 1) * g.span_pieces, pieces)):
        if short:
            _apply_short(piece, x, y, maps, g)
        else:
            carry = _apply_piece(sample, piece, x, y, weight, bias, stats, g, edge, carry, along, across)
    _write_edge(y, edge, carry)
    if g.stream != 0:
        settle_streams()


@scalar
def _apply_spans(job, geometry, x, y, weight, bias, stats, channels, along, across):
    g = record(geometry)
    maps = np.empty(3 * channels)
    p_maps = retyped(pointer(maps), weight)
    spans = g.samples * -(-_pieces_of_sample(g) // g.span_pieces)
    span = claim(job, np.int64(-1), spans)
    short = channels > 0 and span < spans and _channel_maps(p_maps, x, weight, bias, stats, g)
    while span < spans:
        _apply_span(span, x, y, weight, bias, stats, p_maps, short, g, along, across)
        span = claim(job, span, spans)
    if channels > 0:
        maps[0] = 0.0  # used as an array after its pointer: so it is still alive above


@Kernel
def apply(job, workers, geometry, along, across, x, y, weight, bias, mean, var, stats, eps):
    """Normalize with given statistics, piece by piece in the order of memory; return `clash`'s answer.

    `along` and `across` are as in `forward`. With running `mean` and `var` these are put into `stats` first, unless the
    job is shared: then they are there.
    """
    p_job, p_geometry = pointer(job), pointer(geometry)
    p_x, p_y, p_weight, p_bias, p_stats = pointer(x), pointer(y), pointer(weight), pointer(bias), pointer(stats)
    p_mean, p_var = pointer(mean), pointer(var)
    problem = clash(p_geometry, p_y, p_x, None, None, p_weight, p_bias)
    if problem != 0:
        return problem
    g = record(p_geometry)
    if mean is not None:
        fill_given(p_job, p_mean, p_var, p_stats, g, eps)
    step = width_of(no_lanes(p_x))
    channels = g.K1 if g.channel_runs != 0 and step <= g.R1 <= 2 * step else 0
    for _ in prange(workers):
        _apply_spans(p_job, p_geometry, p_x, p_y, p_weight, p_bias, p_stats, channels, along, across)
    return 0


@scalar
def _add_runs(job, geometry, x, residual, total):
    g = record(geometry)
    runs = g.K0 * g.R0 * g.K1
    run = claim(job, np.int64(-1), runs)
    while run < runs:
        _add_run(x, residual, total, g, run // (g.K1 * g.R0), run // g.K1 % g.R0, run % g.K1)
        run = claim(job, run, runs)


@Kernel
def add(job, workers, geometry, x, residual, total):
    """Write x + residual to `total`, packed, run by run."""
    p_job, p_geometry = pointer(job), pointer(geometry)
    p_x, p_residual, p_total = pointer(x), pointer(residual), pointer(total)
    for _ in prange(workers):
        _add_runs(p_job, p_geometry, p_x, p_residual, p_total)


@scalar
def _count_group(group, mask, count, g):
    fold = most(np.int64(1), g.lanes // (g.K1 * g.R1))  # the columns kernel's rows may be several of R0 side by side
    start = group // g.K1 * g.mask_K0 + group % g.K1 * g.mask_K1
    n = 0
    for r0 in range(g.R0):
        for r1 in range(g.R1):
            n += counts(mask, start + r0 * (g.mask_R0 // fold) + r1 * g.mask_R1)
    store(count, group, np.float64(n))


@scalar
def _count_groups(job, geometry, mask, count):
    g = record(geometry)
    groups = g.K0 * g.K1
    group = claim(job, np.int64(-1), groups)
    while group < groups:
        _count_group(group, mask, count, g)
        group = claim(job, group, groups)


@Kernel
def count(job, workers, geometry, mask, count):
    """Write how many elements of each group count."""
    p_job, p_geometry = pointer(job), pointer(geometry)
    p_mask, p_count = pointer(mask), pointer(count)
    for _ in prange(workers):
        _count_groups(p_job, p_geometry, p_mask, p_count)
