"""Statistics of the rows kernel: sweeps over blocks, the books of chunks, a unit's moments.

A group's moments are taken chunk by chunk, a chunk's block by block, and merged in that order. Neighbouring groups of
several runs are taken run by run, as they lie in memory; each has books of its own.
"""

from __future__ import annotations

import numpy as np

from .dtypes import counts, lane, load, store
from .jit import inlined, scalar
from .lanes import (
    all_lanes,
    choose,
    chosen_count,
    first_lanes,
    fused,
    lanes_for,
    load_lanes,
    load_part,
    marked_lanes,
    no_exact_lanes,
    no_lanes,
    rounded,
    store_sums,
    sum_of_lanes,
    width_of,
)
from .prefetch import prefetch_near
from .welford import BLOCK, HUGE, PREFIX, TINY, least, merge, settle

UNIT_GROUPS = 512
"""Groups a unit at most: a thread holds their moments, 12 KiB."""

HELD_ROOM = 3 * UNIT_GROUPS + 3
"""Numbers that are kept of a unit's groups; `sum_rows` writes up to three more."""

TOGETHER = 64
"""Groups at most that are taken run by run, all of them of one k0."""

_BOOKS = 7
BOOKS_ROOM = _BOOKS * TOGETHER
"""Numbers that a chunk's books hold (`add_block`)."""

CLOSE = 0.0625
"""The shift stays while ``s**2/n`` is below this share of ``q``: the next block need not wait for this one's mean."""


@inlined
def read_lanes(like, x, residual, at):
    """Read lanes of x, or of x + residual, rounded as where that sum is written."""
    v = load_lanes(like, x, at)
    if residual is None:
        return v
    return rounded(v + load_lanes(like, residual, at), x)


@inlined
def read_part(like, x, residual, at, part):
    """Do the same for fewer elements than there are lanes."""
    v = load_part(like, x, at, part)
    if residual is None:
        return v
    return rounded(v + load_part(like, residual, at, part), x)


@scalar
def read_value(x, residual, at):
    """Read one element of x, or of that sum."""
    if residual is None:
        return load(x, at)
    return sum_of_lanes(read_part(no_lanes(x), x, residual, at, 1))


@scalar
def _counting_lanes(like, mask, at, step, count):
    """Choose, of the first `count` lanes, those that count."""
    if mask is None:
        return first_lanes(like, count)
    if step == 0:
        return first_lanes(like, count if counts(mask, at) else 0)
    return marked_lanes(like, mask, at, count)


@scalar
def _exact_moments(x, residual, start, stride, runs, width, mask, mask_start, mask_stride, mask_step, centred):
    """Return (mean, M2) of a block that is not empty, in float64 and two sweeps."""
    mean = pivot = 0.0
    n = 0
    r = 0
    while centred and n == 0:  # the first element that counts: sums around it are exactly 0 where all are equal
        for i in range(width):
            if n == 0 and (mask is None or counts(mask, mask_start + r * mask_stride + i * mask_step)):
                pivot = np.float64(read_value(x, residual, start + r * stride + i))
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
                d = choose(chosen, read_part(s, x, residual, start + r * stride + i, width - i) - around)
                n += chosen_count(chosen)
                s = s + d
                q = fused(d, d, q)
        if squares == 0:
            mean = pivot + sum_of_lanes(s) / n
    return mean, sum_of_lanes(q)


@inlined
def sweep_strip(x, residual, at, shift, s, q, ahead):
    """Add lanes minus the shift to `s`, and their squares to `q`; ask for those `ahead`, unless 0."""
    if ahead != 0:
        prefetch_near(s, x, at + ahead)
        if residual is not None:
            prefetch_near(s, residual, at + ahead)
    d = read_lanes(s, x, residual, at) - shift
    return s + d, fused(d, d, q)


@inlined
def _sweep(x, residual, at, width, shift, s, q, ahead):
    """Add `width` neighbours minus the shift to `s`, and their squares to `q`; ask for those `ahead`, unless 0."""
    step = width_of(s)
    whole = width - width % step
    for i in range(at, at + whole, step):
        s, q = sweep_strip(x, residual, i, shift, s, q, ahead)
    if whole < width:
        rest = width - whole
        d = choose(first_lanes(s, rest), read_part(s, x, residual, at + whole, rest) - shift)
        s = s + d
        q = fused(d, d, q)
    return s, q


@inlined
def _sweep_marked(x, residual, at, width, shift, s, q, mask, m):
    """Do the same for those that the mask marks from `m` on; return how many these are, too."""
    seen = 0
    for i in range(0, width, width_of(s)):
        chosen = marked_lanes(s, mask, m + i, width - i)
        d = choose(chosen, read_part(s, x, residual, at + i, width - i) - shift)
        seen += chosen_count(chosen)
        s = s + d
        q = fused(d, d, q)
    return s, q, seen


@inlined
def first_shift(x, residual, at, width, centred):
    """Return the mean of the first elements of a run."""
    if not centred:
        return lane(x, 0.0)
    prefix = least(PREFIX, width)
    # In lanes' own type, and without a division: what follows waits for it.
    return lane(x, sum_of_lanes(read_part(no_lanes(x), x, residual, at, prefix))) * lane(x, 1.0 / prefix)


@scalar
def _merge_near(count, mean, m2, near, near_s, near_q, k, centred):
    """Merge blocks that were swept around one shift; their sums were trusted one by one, and so is what they add to."""
    if near == 0.0:
        return count, mean, m2
    near_mean, near_m2, _ = settle(near, near_s, near_q, np.float64(k), centred)
    return merge(count, mean, m2, near, near_mean, near_m2)


@scalar
def _add_far(x, residual, at, g, runs, width, mask, mask_at, books, n, s, q, centred):
    """Merge the blocks that were near their shift, and one that was not; return (count, mean, M2) and its mean."""
    count, mean, m2, near, near_s, near_q, k = books
    count, mean, m2 = _merge_near(count, mean, m2, near, near_s, near_q, k, centred)
    block_mean, block_m2, trusted = settle(n, s, q, np.float64(k), centred)
    if not trusted:
        block_mean, block_m2 = _exact_moments(
            x, residual, at, g.x_R0, runs, width, mask, mask_at, g.mask_R0, g.mask_R1, centred
        )
    count, mean, m2 = merge(count, mean, m2, n, block_mean, block_m2)
    return count, mean, m2, block_mean


@inlined
def add_block(x, residual, at, g, runs, width, mask, mask_at, books, n, s, q, centred):
    """Add a block of `n` elements, swept around the shift of the books, to the books of a chunk.

    ``books = (count, mean, m2, near, near_s, near_q, k)``: what is merged, count and sums of the last blocks, whose
    shift was k and near their means, and the next shift, which lanes hold exactly; all in float64.
    """
    count, mean, m2, near, near_s, near_q, k = books
    # Compared without a division, at the end of which the next block would have to wait.
    if TINY < q < HUGE and (not centred or s * s <= CLOSE * q * n):
        return count, mean, m2, near + n, near_s + s, near_q + q, k
    count, mean, m2, block_mean = _add_far(x, residual, at, g, runs, width, mask, mask_at, books, n, s, q, centred)
    # Not the mean so far: an outlier spoils one shift, not all that follow.
    return count, mean, m2, 0.0, 0.0, 0.0, np.float64(lane(x, block_mean))


@inlined
def close_books(books, centred):
    """Return (count, mean, M2) of a chunk."""
    count, mean, m2, near, near_s, near_q, k = books
    return _merge_near(count, mean, m2, near, near_s, near_q, k, centred)


@inlined
def books_of(held, i):
    """Return the books of the `i`-th group."""
    at = _BOOKS * i
    merged = load(held, at), load(held, at + 1), load(held, at + 2)
    return (*merged, load(held, at + 3), load(held, at + 4), load(held, at + 5), load(held, at + 6))


@inlined
def _keep_books(held, i, books):
    """Keep the books of the `i`-th group."""
    at = _BOOKS * i
    count, mean, m2, near, near_s, near_q, k = books
    store(held, at, count)
    store(held, at + 1, mean)
    store(held, at + 2, m2)
    store(held, at + 3, near)
    store(held, at + 4, near_s)
    store(held, at + 5, near_q)
    store(held, at + 6, k)


@scalar
def sum_chunk(x, residual, mask, g, k0, k1, n, chunk, held, centred):
    """Write to `held` the books of one chunk of `n` groups of one k0, from k1 on.

    Run by run of all of them, as they lie in memory: where each run of 12 KB is 3 MB from the group's next, batch norm
    in training (64, 256, 56, 56) takes 25.3 ms group by group on Zen 4, and 16.3 so (`launch.TOGETHER_RUN`).
    """
    r_start = j_start = 0
    if g.chunks > 1:
        r_start = (chunk // g.across) * g.chunk_runs
        j_start = (chunk % g.across) * g.chunk_width
    r_stop = least(r_start + g.chunk_runs, g.R0)
    j_stop = least(j_start + g.chunk_width, g.R1)
    start = k0 * g.x_K0 + k1 * g.x_K1
    mask_start = k0 * g.mask_K0 + k1 * g.mask_K1
    for i in range(n):
        first = start + i * g.x_K1 + r_start * g.x_R0 + j_start
        k = first_shift(x, residual, first, j_stop - j_start, centred)
        _keep_books(held, i, (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, np.float64(k)))
    for r in range(r_start, r_stop, g.block_runs):
        runs = least(g.block_runs, r_stop - r)
        for i in range(n):
            books = books_of(held, i)
            for j in range(j_start, j_stop, BLOCK):
                width = least(BLOCK, j_stop - j)
                at = start + i * g.x_K1 + r * g.x_R0 + j
                mask_at = mask_start + i * g.mask_K1 + r * g.mask_R0 + j * g.mask_R1
                seen = 0
                s = q = no_lanes(x)
                shift = all_lanes(s, lane(x, books[6]))
                for t in range(runs):
                    run = at + t * g.x_R0
                    if mask is None:
                        s, q = _sweep(x, residual, run, width, shift, s, q, g.ahead)
                        seen += width
                    else:
                        m = mask_at + t * g.mask_R0
                        if g.mask_R1 != 0:
                            s, q, marked = _sweep_marked(x, residual, run, width, shift, s, q, mask, m)
                            seen += marked
                        elif counts(mask, m):
                            s, q = _sweep(x, residual, run, width, shift, s, q, g.ahead)
                            seen += width
                if seen > 0:
                    of = sum_of_lanes(s), sum_of_lanes(q), np.float64(seen)
                    books = add_block(
                        x, residual, at, g, runs, width, mask, mask_at, books, of[2], of[0], of[1], centred
                    )
            _keep_books(held, i, books)


@inlined
def sum_block(x, residual, g, k0, k1, held, i, centred):
    """Keep the two sums of a group that is one block, and what they are around, as a unit's `i`-th."""
    at = k0 * g.x_K0 + k1 * g.x_K1
    k = first_shift(x, residual, at, g.R1, centred)
    no = no_lanes(x)
    s, q = _sweep(x, residual, at, g.R1, all_lanes(no, k), no, no, g.ahead)
    store(held, i, sum_of_lanes(s))
    store(held, UNIT_GROUPS + i, sum_of_lanes(q))
    store(held, 2 * UNIT_GROUPS + i, np.float64(k))


@inlined
def _sweep_row(x, residual, at, g, held, i, half):
    """Return the lanes of the two sums of a unit's `i`-th row around the shift that is kept of it."""
    no = lanes_for(x, half)
    return _sweep(x, residual, at, g.R1, all_lanes(no, lane(x, load(held, 2 * UNIT_GROUPS + i))), no, no, g.ahead)


@scalar
def sum_rows(x, residual, g, base, n, held, half, centred):
    """Do what `sum_block` does for `n` narrow rows by fours, whose lanes are added together.

    What is kept of up to three more, of which the last stands in for those that a four lacks, means nothing.
    """
    no = lanes_for(x, half)
    prefix = least(np.int64(PREFIX), g.R1)
    share = lane(x, 1.0 / prefix)  # in lanes' own type, as `first_shift`
    for i in range(0, n, 4):
        a = (base + i) * g.x_K0
        b, c, d = a, a, a
        if i + 4 <= n:
            b, c, d = a + g.x_K0, a + 2 * g.x_K0, a + 3 * g.x_K0
        elif i + 1 < n:
            b = a + g.x_K0
            c = d = (base + n - 1) * g.x_K0
        for j in range(2 * UNIT_GROUPS + i, 2 * UNIT_GROUPS + i + 4):
            store(held, j, 0.0)
        if centred:
            v_a, v_b = read_part(no, x, residual, a, prefix), read_part(no, x, residual, b, prefix)
            v_c, v_d = read_part(no, x, residual, c, prefix), read_part(no, x, residual, d, prefix)
            store_sums(v_a, v_b, v_c, v_d, held, 2 * UNIT_GROUPS + i)
            for j in range(2 * UNIT_GROUPS + i, 2 * UNIT_GROUPS + i + 4):
                store(held, j, np.float64(lane(x, load(held, j)) * share))
        s_a, q_a = _sweep_row(x, residual, a, g, held, i, half)
        s_b, q_b = _sweep_row(x, residual, b, g, held, i + 1, half)
        s_c, q_c = _sweep_row(x, residual, c, g, held, i + 2, half)
        s_d, q_d = _sweep_row(x, residual, d, g, held, i + 3, half)
        store_sums(s_a, s_b, s_c, s_d, held, i)
        store_sums(q_a, q_b, q_c, q_d, held, UNIT_GROUPS + i)


@inlined
def hold(held, i, moments):
    """Keep the moments of a unit's `i`-th group."""
    count, mean, m2 = moments
    store(held, i, mean)
    store(held, UNIT_GROUPS + i, m2)
    store(held, 2 * UNIT_GROUPS + i, count)


@inlined
def _held(held, i):
    """Return (count, mean, M2) of a unit's `i`-th group."""
    return load(held, 2 * UNIT_GROUPS + i), load(held, i), load(held, UNIT_GROUPS + i)


@scalar
def unit_moments(x, residual, mask, g, k0, k1, n, books, held, i, centred):
    """Put the moments of `n` groups of one k0, from k1 on, where `held` keeps those of a unit's `i`-th and on."""
    for chunk in range(g.chunks):
        sum_chunk(x, residual, mask, g, k0, k1, n, chunk, books, centred)
        for group in range(n):
            of = close_books(books_of(books, group), centred)
            if chunk > 0:
                so_far = _held(held, i + group)
                of = merge(so_far[0], so_far[1], so_far[2], of[0], of[1], of[2])
            hold(held, i + group, of)


@scalar
def settle_blocks(x, residual, g, base, n, held, centred):
    """Put the moments of a unit's `n` groups, each one block, in the place of their sums: in vectors, but for a few."""
    count = np.float64(g.R1)
    all_trusted = True
    for i in range(n):
        s, q, k = load(held, i), load(held, UNIT_GROUPS + i), load(held, 2 * UNIT_GROUPS + i)
        mean, m2, trusted = settle(count, s, q, k, centred)
        store(held, i, mean)
        store(held, UNIT_GROUPS + i, m2)
        store(held, 2 * UNIT_GROUPS + i, count if trusted else 0.0)
        all_trusted &= trusted
    if not all_trusted:
        for i in range(n):
            if load(held, 2 * UNIT_GROUPS + i) == 0.0:
                at = (base + i) // g.K1 * g.x_K0 + (base + i) % g.K1 * g.x_K1
                mean, m2 = _exact_moments(  # without constants, for which Numba would compile it anew
                    x, residual, at, g.x_R0, g.R0, g.R1, None, np.int64(0), g.mask_R0, g.mask_R1, centred
                )
                hold(held, i, (count, mean, m2))
