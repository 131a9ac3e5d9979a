"""The rows kernel: groups of long contiguous runs, in the view (K0, R0, K1, R1).

A group (k0, k1) is R0 runs of R1 elements. Its moments are taken chunk by chunk, a chunk's block by block, and merged
in that order whatever the number of threads, so the bits depend on the shape alone.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from ..plan import COUNT, M2, MEAN, RSTD
from .dtypes import counts, deviation, lane, load, pointer, store
from .jit import Kernel, scalar
from .lanes import (
    all_lanes,
    choose,
    chosen_count,
    first_lanes,
    fused,
    load_lanes,
    load_part,
    load_some,
    marked_lanes,
    no_exact_lanes,
    no_lanes,
    prefetch,
    settle_streams,
    store_lanes,
    store_part,
    store_some,
    stream_lanes,
    sum_of_lanes,
    until_line,
    width_of,
)
from .welford import BLOCK, PREFIX, merge, rstd_of, settle

FLOAT32_SAFE = 1e30
"""Groups whose rstd is outside 1/FLOAT32_SAFE to FLOAT32_SAFE are written in float64: float32 would overflow."""


LONG_RUN = 1024
"""Elements from which a run is streamed although it starts inside a cache line, whose part then goes the usual way."""

CLOSE = 0.0625
"""The shift stays while ``s**2/n`` is below this share of ``q``: the next block need not wait for this one's mean."""


@scalar
def _counting_lanes(like, mask, at, step, count):
    """Choose, of the first `count` lanes, those that count."""
    if mask is None:
        return first_lanes(like, count)
    if step == 0:
        return first_lanes(like, count if counts(mask, at) else 0)
    return marked_lanes(like, mask, at, count)


@scalar
def _exact_moments(x, start, stride, runs, width, mask, mask_start, mask_stride, mask_step, centred):
    """Return (mean, M2) of a block that is not empty, in float64 and two sweeps."""
    mean = pivot = 0.0
    n = 0
    r = 0
    while centred and n == 0:  # the first element that counts: sums around it are exactly 0 where all are equal
        for i in range(width):
            if n == 0 and (mask is None or counts(mask, mask_start + r * mask_stride + i * mask_step)):
                pivot = np.float64(load(x, start + r * stride + i))
                n = 1
        r += 1
    s = q = no_exact_lanes()
    for squares in range(0 if centred else 1, 2):
        around = all_lanes(s, mean if squares == 1 else pivot)
        s = q = no_exact_lanes()
        n = 0
        for r in range(runs):
            at = mask_start + r * mask_stride
            for i in range(0, width, width_of(s)):
                chosen = _counting_lanes(s, mask, at + i * mask_step, mask_step, width - i)
                d = choose(chosen, load_part(s, x, start + r * stride + i, width - i) - around)
                n += chosen_count(chosen)
                s = s + d
                q = fused(d, d, q)
        if squares == 0:
            mean = pivot + sum_of_lanes(s) / n
    return mean, sum_of_lanes(q)


@scalar
def _chunk_moments(x, mask, g, k0, k1, chunk, centred):
    """Return (count, mean, M2) of one chunk of the group (k0, k1)."""
    r_start = j_start = 0
    if g.chunks > 1:
        r_start = (chunk // g.across) * g.chunk_runs
        j_start = (chunk % g.across) * g.chunk_width
    r_stop = min(r_start + g.chunk_runs, g.R0)
    j_stop = min(j_start + g.chunk_width, g.R1)
    start = g.x_start + k0 * g.x_K0 + k1 * g.x_K1
    mask_start = g.mask_start + k0 * g.mask_K0 + k1 * g.mask_K1
    k = lane(x, 0.0)
    if centred:
        prefix = min(PREFIX, j_stop - j_start)
        first = load_part(no_lanes(x), x, start + r_start * g.x_R0 + j_start, prefix)
        k = lane(x, sum_of_lanes(first) / prefix)
    count = mean = m2 = 0.0
    for r in range(r_start, r_stop, g.block_runs):
        runs = min(g.block_runs, r_stop - r)
        for j in range(j_start, j_stop, BLOCK):
            width = min(BLOCK, j_stop - j)
            at = start + r * g.x_R0 + j
            mask_at = mask_start + r * g.mask_R0 + j * g.mask_R1
            seen = 0
            s = q = no_lanes(x)
            shift = all_lanes(s, k)
            whole = width - width % width_of(s)
            for t in range(runs):
                run = at + t * g.x_R0
                m = mask_at + t * g.mask_R0
                if mask is not None and g.mask_R1 != 0:
                    for i in range(0, width, width_of(s)):
                        chosen = marked_lanes(s, mask, m + i, width - i)
                        d = choose(chosen, load_part(s, x, run + i, width - i) - shift)
                        seen += chosen_count(chosen)
                        s = s + d
                        q = fused(d, d, q)
                elif mask is None or counts(mask, m):
                    for i in range(0, whole, width_of(s)):
                        d = load_lanes(s, x, run + i) - shift
                        s = s + d
                        q = fused(d, d, q)
                    if whole < width:
                        rest = width - whole
                        d = choose(first_lanes(s, rest), load_part(s, x, run + whole, rest) - shift)
                        s = s + d
                        q = fused(d, d, q)
                    seen += width
            if seen > 0:
                n = np.float64(seen)
                block_mean, block_m2, trusted = settle(n, sum_of_lanes(s), sum_of_lanes(q), np.float64(k), centred)
                if not trusted:
                    block_mean, block_m2 = _exact_moments(
                        x, at, g.x_R0, runs, width, mask, mask_at, g.mask_R0, g.mask_R1, centred
                    )
                count, mean, m2 = merge(count, mean, m2, n, block_mean, block_m2)
                # The last block's mean, not the mean so far: an outlier then spoils one shift, not all that follow.
                if not n * (block_mean - np.float64(k)) ** 2 <= CLOSE * block_m2:
                    k = lane(x, block_mean)
    return count, mean, m2


@scalar
def _normalize(x, y, weight, bias, g, k0, r0, k1, j, width, mean, rstd):
    """Write `width` elements of one run, with the mean in two lanes, stretch by stretch of the affine map."""
    x_start = g.x_start + k0 * g.x_K0 + r0 * g.x_R0 + k1 * g.x_K1 + j
    y_start = g.y_start + k0 * g.y_K0 + r0 * g.y_R0 + k1 * g.y_K1 + j
    flat = ((k0 * g.R0 + r0) * g.K1 + k1) * g.R1 + j
    if not 1.0 / FLOAT32_SAFE < rstd < FLOAT32_SAFE:
        for i in range(width):
            channel = (flat + i) // g.inner % g.size
            store(y, y_start + i, deviation(x, x_start + i, mean) * rstd * load(weight, channel) + load(bias, channel))
        return
    no = no_lanes(x)
    hi = all_lanes(no, lane(x, mean))
    lo = all_lanes(no, lane(x, mean - np.float64(lane(x, mean))))
    scale = lane(x, rstd)
    along = g.inner == 1
    gain = all_lanes(no, scale)
    shift = no
    done = 0
    while done < width:
        a = x_start + done
        b = y_start + done
        if along:
            channel = (flat + done) % g.size
            n = min(width - done, g.size - channel)
        else:
            channel = (flat + done) // g.inner % g.size
            n = min(width - done, g.inner - (flat + done) % g.inner)
            gain = all_lanes(no, scale * load(weight, channel))
            shift = all_lanes(no, load(bias, channel))
        head = 0
        stream = g.stream != 0
        if stream:
            head = until_line(y, b)
            stream = head == 0 or n >= LONG_RUN
            head = min(head, n) if stream else 0
        i = 0
        while i < n:
            part = min(width_of(no), n - i)
            if i < head:
                part = head - i
            if part == width_of(no):
                if g.ahead != 0:
                    prefetch(no, x, a + i + g.ahead)
                d = (load_lanes(no, x, a + i) - hi) - lo
                if along:
                    v = fused(d * gain, load_lanes(no, weight, channel + i), load_lanes(no, bias, channel + i))
                else:
                    v = fused(d, gain, shift)
                if stream:
                    stream_lanes(v, y, b + i)
                else:
                    store_lanes(v, y, b + i)
            else:
                d = (load_part(no, x, a + i, part) - hi) - lo
                if along:
                    w = load_part(no, weight, channel + i, part)
                    v = fused(d * gain, w, load_part(no, bias, channel + i, part))
                else:
                    v = fused(d, gain, shift)
                store_part(v, y, b + i, part)
            i += part
        done += n


@scalar
def _add_run(x, residual, total, g, k0, r0, k1):
    """Write one run of x + residual, rounded to the dtype of `total`, which is packed."""
    start = g.x_start + k0 * g.x_K0 + r0 * g.x_R0 + k1 * g.x_K1
    flat = ((k0 * g.R0 + r0) * g.K1 + k1) * g.R1
    no = no_lanes(x)
    for i in range(0, g.R1, width_of(no)):
        part = g.R1 - i
        store_some(load_some(no, x, start + i, part) + load_some(no, residual, start + i, part), total, flat + i, part)


@scalar
def _store_statistics(stats, groups, group, count, mean, m2, rstd):
    store(stats, COUNT * groups + group, count)
    store(stats, MEAN * groups + group, mean)
    store(stats, M2 * groups + group, m2)
    store(stats, RSTD * groups + group, rstd)


@scalar
def _forward_group(group, x, residual, total, y, mask, weight, bias, stats, g, g_total, eps, centred):
    """Take one group's statistics and write its output while it is in the cache."""
    k0 = group // g.K1
    k1 = group - k0 * g.K1
    groups = g.K0 * g.K1
    if residual is None:
        source = x
    else:
        for r0 in range(g.R0):
            _add_run(x, residual, total, g, k0, r0, k1)
        source = total
        g = g_total
    count = mean = m2 = 0.0
    for chunk in range(g.chunks):
        n, chunk_mean, chunk_m2 = _chunk_moments(source, mask, g, k0, k1, chunk, centred)
        count, mean, m2 = merge(count, mean, m2, n, chunk_mean, chunk_m2)
    rstd = rstd_of(count, m2, eps)
    _store_statistics(stats, groups, group, count, mean, m2, rstd)
    for r0 in range(g.R0):
        _normalize(source, y, weight, bias, g, k0, r0, k1, 0, g.R1, mean, rstd)


@scalar
def _forward_unit(unit, x, residual, total, y, mask, weight, bias, stats, geometry, eps, centred):
    g = geometry[0]
    first = unit * g.unit_groups
    for group in range(first, min(first + g.unit_groups, g.K0 * g.K1)):
        _forward_group(
            group,
            pointer(x),
            pointer(residual),
            pointer(total),
            pointer(y),
            pointer(mask),
            pointer(weight),
            pointer(bias),
            pointer(stats),
            g,
            geometry[1],
            eps,
            centred,
        )
    if g.stream != 0:
        settle_streams()


@Kernel
def forward(x, residual, total, y, mask, weight, bias, stats, geometry, eps, centred):
    """Normalize group by group: statistics, then output, while the group is in the cache.

    With `residual`, x + residual is formed first, kept in `total` (contiguous) and normalized in place of `x`;
    ``geometry[1]`` then tells how to read `total`.
    """
    for unit in prange(-(-stats.shape[1] // geometry[0].unit_groups)):
        _forward_unit(np.int64(unit), x, residual, total, y, mask, weight, bias, stats, geometry, eps, centred)


@scalar
def _moments_unit(unit, x, mask, table, geometry, centred):
    g = geometry[0]
    group = unit // g.chunks
    chunk = unit % g.chunks
    k0 = group // g.K1
    count, mean, m2 = _chunk_moments(pointer(x), pointer(mask), g, k0, group % g.K1, chunk, centred)
    table[group, chunk, COUNT] = count
    table[group, chunk, MEAN] = mean
    table[group, chunk, M2] = m2


@Kernel
def moments(x, mask, table, geometry, centred):
    """Write (count, mean, M2) of every chunk of every group to `table`, shape (groups, chunks, 3)."""
    for unit in prange(table.shape[0] * table.shape[1]):
        _moments_unit(np.int64(unit), x, mask, table, geometry, centred)


@Kernel
def merge_chunks(table, stats, geometry, eps):
    """Merge the chunks of every group in order into `stats`, shape (4, groups)."""
    for group in range(table.shape[0]):
        count, mean, m2 = table[group, 0, COUNT], table[group, 0, MEAN], table[group, 0, M2]
        for chunk in range(1, table.shape[1]):
            n, chunk_mean, chunk_m2 = table[group, chunk, COUNT], table[group, chunk, MEAN], table[group, chunk, M2]
            count, mean, m2 = merge(count, mean, m2, n, chunk_mean, chunk_m2)
        _store_statistics(pointer(stats), stats.shape[1], group, count, mean, m2, rstd_of(count, m2, eps))


@scalar
def _apply_piece(piece, x, y, weight, bias, stats, g):
    """Normalize some runs, or a part of one, with given statistics."""
    first = piece // g.across * g.piece_runs
    j = piece % g.across * g.chunk_width
    width = min(g.chunk_width, g.R1 - j)
    groups = g.K0 * g.K1
    k1 = first % g.K1
    r0 = first // g.K1 % g.R0
    k0 = first // (g.K1 * g.R0)
    for _ in range(min(g.piece_runs, g.K0 * g.R0 * g.K1 - first)):
        group = k0 * g.K1 + k1
        mean = load(stats, MEAN * groups + group)
        rstd = load(stats, RSTD * groups + group)
        _normalize(x, y, weight, bias, g, k0, r0, k1, j, width, mean, rstd)
        k1 += 1  # counted on: three divisions a run take as long as 30 elements
        if k1 == g.K1:
            k1 = 0
            r0 += 1
            if r0 == g.R0:
                r0 = 0
                k0 += 1
    if g.stream != 0:
        settle_streams()


@scalar
def _apply_unit(piece, x, y, weight, bias, stats, geometry):
    g = geometry[0]
    _apply_piece(piece, pointer(x), pointer(y), pointer(weight), pointer(bias), pointer(stats), g)


@Kernel
def apply(x, y, weight, bias, stats, geometry):
    """Normalize with given statistics, piece by piece in the order of memory."""
    g = geometry[0]
    pieces = -(-(g.K0 * g.R0 * g.K1) // g.piece_runs) * g.across
    for piece in prange(pieces):
        _apply_unit(np.int64(piece), x, y, weight, bias, stats, geometry)


@scalar
def _add_unit(run, x, residual, total, geometry):
    g = geometry[0]
    _add_run(pointer(x), pointer(residual), pointer(total), g, run // (g.K1 * g.R0), run // g.K1 % g.R0, run % g.K1)


@Kernel
def add(x, residual, total, geometry):
    """Write x + residual to `total`, packed, run by run."""
    g = geometry[0]
    for run in prange(g.K0 * g.R0 * g.K1):
        _add_unit(np.int64(run), x, residual, total, geometry)


@scalar
def _count_unit(group, mask, count, geometry):
    g = geometry[0]
    fold = max(1, g.lanes // (g.K1 * g.R1))  # the columns kernel's rows may be several of R0 side by side
    p_mask = pointer(mask)
    start = g.mask_start + group // g.K1 * g.mask_K0 + group % g.K1 * g.mask_K1
    n = 0
    for r0 in range(g.R0):
        for r1 in range(g.R1):
            n += counts(p_mask, start + r0 * (g.mask_R0 // fold) + r1 * g.mask_R1)
    count[group] = n


@Kernel
def count(mask, count, geometry):
    """Write how many elements of each group count."""
    for group in prange(count.shape[0]):
        _count_unit(np.int64(group), mask, count, geometry)
