"""Backward of the rows kernel: dx, and the gradients of weight and bias in the same pass.

With ``g = dy * weight`` and ``h = (x - mean) * rstd``, over the `n` elements that count in a group [1]_::

    dx = rstd * (g - counts * (sum(g) + h * sum(g * h)) / n)
    dweight = sum(dy * h)        dbias = sum(dy)

A unit of work is a slab of samples at one k1. Each slab has gradients of its own, each unit where one weight serves all
elements; they are added in order at the end.

References
----------
.. [1] S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
   Shift", 2015, section 3.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from .address import record
from .claims import claim, is_shared
from .dtypes import counts, lane, load, pointer, retyped, shifted, store
from .guard import clash
from .jit import Kernel, elementwise, inlined, scalar
from .lanes import (
    HEAD_FROM,
    LINE,
    all_lanes,
    choose,
    first_lanes,
    fused,
    load_lanes,
    load_part,
    load_some,
    marked_lanes,
    no_exact_lanes,
    no_lanes,
    settle_streams,
    store_lanes,
    store_part,
    store_some,
    stream_lanes,
    sum_of_lanes,
    until_line,
    width_of,
)
from .prefetch import prefetch, prefetch_near
from .rows import map_of
from .welford import BLOCK, least, most

FLUSH = 32
"""Rows whose products are added in float32 before they go to the float64 gradients of weight and bias."""

LONG_RUN = 1024
"""Elements from which a run is streamed although it starts inside a cache line, whose part then goes the usual way."""


@inlined
def run_sums(dy, x, weight, dy_at, x_at, first, width, hi, scale, low, ahead):
    """Sum dy and dy * h over `width` neighbours; dy is weighted from `first` on where there is a weight."""
    a = b = no_lanes(x)
    step = width_of(a)
    whole = width - width % step
    for i in range(0, whole, step):
        if ahead != 0:
            prefetch_near(a, dy, dy_at + i + ahead)
            prefetch_near(a, x, x_at + i + ahead)
        d = load_lanes(a, dy, dy_at + i)
        if weight is not None:
            d = d * load_lanes(a, weight, first + i)
        h = fused(load_lanes(a, x, x_at + i) - hi, scale, low)
        a = a + d
        b = fused(d, h, b)
    if whole < width:
        rest = width - whole
        d = load_part(a, dy, dy_at + whole, rest)
        if weight is not None:
            d = d * load_part(a, weight, first + whole, rest)
        h = fused(load_part(a, x, x_at + whole, rest) - hi, scale, low)
        a = a + d
        b = b + choose(first_lanes(a, rest), d * h)
    return sum_of_lanes(a), sum_of_lanes(b)


@scalar
def _chunk_sums(sums, channels, dy, x, weight, g, k0, k1, n, chunk, means, rstds):
    """Sum one chunk of `n` groups of one k0, from k1 on, run by run of all of them, as they lie in memory.

    Of dy and dy * h for each of a group's channels, or of all, weighted, where weights lie along. `sums` takes, a group
    after the other, the first sum of every channel, then the second.
    """
    for c in range(2 * channels * n):
        store(sums, c, 0.0)
    r_start = (chunk // g.across) * g.chunk_runs
    j_start = (chunk % g.across) * g.chunk_width
    j_stop = least(j_start + g.chunk_width, g.R1)
    for r0 in range(r_start, least(r_start + g.chunk_runs, g.R0)):
        for i in range(n):
            group = k0 * g.K1 + k1 + i
            hi, scale, low = map_of(x, load(means, group * g.mean_step), load(rstds, group))
            x_start = k0 * g.x_K0 + r0 * g.x_R0 + (k1 + i) * g.x_K1
            dy_start = k0 * g.y_K0 + r0 * g.y_R0 + (k1 + i) * g.y_K1
            j = j_start
            while j < j_stop:
                width = least(j_stop - j, np.int64(BLOCK))
                to = 2 * channels * i
                if g.inner == 1:
                    first = ((k1 + i) * g.R1 + j) % g.size
                    a, b = run_sums(dy, x, weight, dy_start + j, x_start + j, first, width, hi, scale, low, g.ahead)
                else:
                    channel = j // g.inner if channels > 1 else 0
                    width = least(width, g.inner - j % g.inner)
                    a, b = run_sums(dy, x, None, dy_start + j, x_start + j, channel, width, hi, scale, low, g.ahead)
                    to += channel
                store(sums, to, load(sums, to) + a)
                store(sums, to + channels, load(sums, to + channels) + b)
                j += width


@inlined
def _emit_strip(dy, x, dx, mask, weight, starts, i, part, products, half, values, depends, marked, line, g):
    """Write `part` elements of dx, up to a vector; add to `products`, if there are any, dy * h and, `half` on, dy."""
    dy_at, x_at, dx_at, mask_at, first, p = starts
    hi, scale, low, gain, c, e = values
    h = fused(load_some(hi, x, x_at + i, part) - hi, scale, low)
    d = load_some(hi, dy, dy_at + i, part)
    if products is not None:
        store_some(fused(d, h, load_some(hi, products, p + i, part)), products, p + i, part)
        store_some(load_some(hi, products, p + half + i, part) + d, products, p + half + i, part)
    centre = fused(h, e, c)
    if mask is not None and marked:
        centre = choose(marked_lanes(hi, mask, mask_at + i, part), centre)
    elif not depends:
        centre = no_lanes(x)
    if weight is not None:
        gain = load_some(hi, weight, first + i, part)
    v = fused(d, gain, centre) * scale
    if line:
        stream_lanes(v, dx, dx_at + i)
    else:
        store_some(v, dx, dx_at + i, part)


@inlined
def _emit_stretch(dy, x, dx, mask, weight, starts, width, products, half, values, depends, marked, g):
    """Write `width` elements of dx under one affine map; what comes before the first whole cache line goes apart."""
    hi = values[0]
    step = width_of(hi)
    head = least(until_line(dx, starts[2]), width) if g.stream != 0 or width >= HEAD_FROM else 0
    stop = width - (width - head) % step
    stream = g.stream != 0 and (head == 0 or width >= LONG_RUN)
    apart = stream and head < 0  # never; Numba would compile the strip anew for a constant
    if head > 0:
        _emit_strip(
            dy, x, dx, mask, weight, starts, np.int64(0), head, products, half, values, depends, marked, apart, g
        )
    for i in range(head, stop, step):
        if stream and g.ahead != 0:
            prefetch(hi, dy, starts[0] + i + g.ahead)
            prefetch(hi, x, starts[1] + i + g.ahead)
        _emit_strip(dy, x, dx, mask, weight, starts, i, step, products, half, values, depends, marked, stream, g)
    if stop < width:
        _emit_strip(
            dy, x, dx, mask, weight, starts, stop, width - stop, products, half, values, depends, marked, apart, g
        )


@inlined
def _emit(dy, x, dx, mask, weight, products, p, half, g, k0, r0, k1, start, stop, mean, rstd, mean_g, mean_gh):
    """Write dx of one run from `start` to `stop`; where weights lie along the run, add to `products`, if any, from `p`.

    `products` takes `half` sums of dy * h, then as many of dy.
    """
    x_start = k0 * g.x_K0 + r0 * g.x_R0 + k1 * g.x_K1
    dy_start = k0 * g.y_K0 + r0 * g.y_R0 + k1 * g.y_K1
    dx_start = ((k0 * g.R0 + r0) * g.K1 + k1) * g.R1
    mask_start = k0 * g.mask_K0 + r0 * g.mask_R0 + k1 * g.mask_K1
    no = no_lanes(x)
    hi, scale, low = map_of(x, mean, rstd)
    marked = g.mask_R1 != 0
    # Where dx does not depend on x, as in inference, NaN and Inf in x must not come in by a product with 0.
    depends = (mask is None or marked or counts(mask, mask_start)) and not (mean_g == 0.0 and mean_gh == 0.0)
    c = all_lanes(no, lane(x, -mean_g))
    e = all_lanes(no, lane(x, -mean_gh))
    j = start
    none = np.int64(0)
    while j < stop:
        starts = (dy_start + j, x_start + j, dx_start + j, mask_start + j)
        width = stop - j
        if g.inner == 1 or half > 0:  # of one element a row, inner tells nothing
            first = j if g.size == g.R1 else (k1 * g.R1 + j) % g.size
            width = least(width, g.size - first)
            starts_along = (*starts, first, p + j - start)
            values = (hi, scale, low, no, c, e)
            _emit_stretch(dy, x, dx, mask, weight, starts_along, width, products, half, values, depends, marked, g)
        else:
            width = least(width, g.inner - j % g.inner)
            gain = all_lanes(no, load(weight, (k1 * g.R1 + j) // g.inner % g.size))
            values = (hi, scale, low, gain, c, e)
            _emit_stretch(dy, x, dx, mask, None, (*starts, none, none), width, None, none, values, depends, marked, g)
        j += width


@inlined
def products_from(dx, dx_at, products, itemsize):
    """Return where to begin in `products`, so that its vectors, too, start with cache lines where those of dx do."""
    lanes = LINE // itemsize
    return until_line(products, 0) + -until_line(dx, dx_at) % lanes


@scalar
def flush(products, p, half, gradients, at, size):
    """Add the products of the last rows to float64 gradients, the second `size` after the first, and clear them."""
    no = no_exact_lanes()
    step = width_of(no)
    whole = half - half % step
    for row in range(2):
        of = p + row * half
        to = at + row * size
        for i in range(0, whole, step):
            store_lanes(load_lanes(no, gradients, to + i) + load_lanes(no, products, of + i), gradients, to + i)
            store_lanes(no, products, of + i)
        if whole < half:
            rest = half - whole
            total = load_part(no, gradients, to + whole, rest) + load_part(no, products, of + whole, rest)
            store_part(total, gradients, to + whole, rest)
            store_part(no, products, of + whole, rest)


@scalar
def average(total, count):
    """Return total/count; 0 where nothing counts, as in inference: then the statistics do not depend on x."""
    return total * (1.0 / count) if count > 0.0 else 0.0


@inlined
def _together(g):
    """Return how many neighbouring groups a unit takes run by run: one channel each, so K0 is 1, and so are slabs."""
    return g.together if g.K0 == 1 and g.inner == g.R1 and g.size == g.K1 else np.int64(1)


@inlined
def add_to(array, place, value):
    """Add to an element."""
    store(array, place, load(array, place) + value)


@inlined
def room_for(count, g):
    """Return how many float64 take as much room as so many lanes."""
    return count * g.lane_itemsize // 8 + 1


@inlined
def weight_of_slab(weight, slab, g):
    """Return where the weights of a slab's samples begin: slabs are as many for each set of weights."""
    return shifted(weight, slab * g.samples // g.slabs * g.size)


@inlined
def weight_of_k0(weight, k0, g):
    """Return where the weights of the sample of some groups begin."""
    return shifted(weight, k0 * g.samples // g.K0 * g.size)


@scalar
def _backward_unit(unit, dy, x, dx, mask, weight, counts_of, means, rstds, gradients, g):
    """Take the samples of one slab at one k1: sums, then dx, while the group is in the cache."""
    centred = g.centred != 0
    along = g.inner == 1  # and masked, of several runs or in inference: the others are `along_backward`'s
    together = _together(g)
    steps = -(-g.K1 // together)
    k1 = unit % steps * together
    n = least(together, g.K1 - k1)  # groups that are taken together
    slab = unit // steps
    slabs = g.slabs
    weight = weight_of_slab(weight, slab, g)
    channels = 1 if along else most(np.int64(1), g.R1 // g.inner)
    first = k1 * g.R1 // g.inner % g.size
    stream = g.stream != 0
    batch = g.unit_groups
    # Sums of a chunk, of all chunks, and means of a batch: one array, not three: 29.4 to 26.5 us for 32 units.
    scratch = np.empty(4 * channels * n + 2 * batch * n)
    total = 2 * channels * n
    means_of = 4 * channels * n
    half = g.R1 if along else 0
    products = np.zeros(room_for(2 * half + 2 * LINE, g))
    # Each array below is used, as an array, after the last call that got its pointer: so it is still alive then.
    p_scratch, p_products = pointer(scratch), retyped(pointer(products), weight)
    size = g.size
    own = unit if size == 1 else slab  # whose gradients
    flush_at = own * 2 * size + first
    start = slab * g.K0 // slabs
    stop = (slab + 1) * g.K0 // slabs
    p = products_from(dx, (start * g.K1 + k1) * g.R1, p_products, g.lane_itemsize)
    for base in range(start, stop, batch):  # as in `rows`: no dx waits for its own sums
        for k0 in range(base, least(base + batch, stop)):
            group = k0 * g.K1 + k1
            for c in range(2 * channels * n):
                store(p_scratch, total + c, 0.0)
            for chunk in range(g.chunks):
                _chunk_sums(p_scratch, channels, dy, x, weight, g, k0, k1, n, chunk, means, rstds)
                for c in range(2 * channels * n):
                    store(p_scratch, total + c, load(p_scratch, total + c) + load(p_scratch, c))
            sum_g, sum_gh = load(p_scratch, total), load(p_scratch, total + channels)
            for i in range(n):
                if not along:
                    sum_g = sum_gh = 0.0
                    of = total + 2 * channels * i
                    for c in range(channels):
                        of_g, of_gh = load(p_scratch, of + c), load(p_scratch, of + channels + c)
                        channel = first + i + c  # groups that are taken together have a channel each
                        sum_g += load(weight, channel) * of_g
                        sum_gh += load(weight, channel) * of_gh
                        add_to(gradients, 2 * own * size + channel, of_gh)
                        add_to(gradients, (2 * own + 1) * size + channel, of_g)
                count = load(counts_of, (group + i) * g.count_step)
                to = means_of + 2 * (k0 - base + i)
                store(p_scratch, to, average(sum_g, count) if centred else 0.0)
                store(p_scratch, to + 1, average(sum_gh, count))
        for k0 in range(base, least(base + batch, stop)):
            at_means = means_of + 2 * (k0 - base)
            for r0 in range(g.R0):
                for i in range(n):
                    group = k0 * g.K1 + k1 + i
                    mean_g, mean_gh = load(p_scratch, at_means + 2 * i), load(p_scratch, at_means + 2 * i + 1)
                    _emit(
                        dy,
                        x,
                        dx,
                        mask,
                        weight,
                        p_products,
                        p,
                        half,
                        g,
                        k0,
                        r0,
                        k1 + i,
                        np.int64(0),
                        g.R1,
                        load(means, group * g.mean_step),
                        load(rstds, group),
                        mean_g,
                        mean_gh,
                    )
            if along and (k0 - start) % FLUSH == FLUSH - 1:
                flush(p_products, p, half, gradients, flush_at, size)
    if stream:
        settle_streams()
    flush(p_products, p, half, gradients, flush_at, size)  # of length 0 where weights do not lie along
    scratch[0] = products[0]


@elementwise
def _clear(gradients, count):
    for i in range(count):
        store(gradients, i, 0.0)


@scalar
def clear_gradients(job, geometry, gradients):
    """Set the slabs' gradients to 0, unless others work on the job: then they were."""
    g = record(geometry)
    if not is_shared(job):
        _clear(gradients, 2 * g.gradients * g.size)


@elementwise
def _add_slabs(gradients, result, slabs, size, apart):
    for slab in range(1, slabs):
        for i in range(2 * size):
            store(gradients, i, load(gradients, i) + load(gradients, slab * 2 * size + i))
    for i in range(size):
        store(result, i, load(gradients, i))
        store(result, apart + i, load(gradients, size + i))


@scalar
def _add_all_slabs(gradients, result, g):
    slabs = g.gradients // g.samples
    for sample in range(g.samples):
        own = shifted(gradients, sample * slabs * 2 * g.size)
        _add_slabs(own, shifted(result, sample * g.size), slabs, g.size, g.samples * g.size)


@scalar
def finish_gradients(job, geometry, gradients, result):
    """Add the slabs' gradients, in order, to those of a sample's first; write them, rounded, to `result`.

    Unless others work on the job: then `add_slabs` does it once they are done.
    """
    g = record(geometry)
    if not is_shared(job):
        _add_all_slabs(gradients, result, g)


@Kernel
def add_slabs(geometry, gradients, result):
    """Do what `finish_gradients` does."""
    p_geometry = pointer(geometry)
    _add_all_slabs(pointer(gradients), pointer(result), record(p_geometry))


@scalar
def _backward_units(job, geometry, dy, x, dx, mask, weight, counts_of, means, rstds, gradients):
    g = record(geometry)
    units = g.slabs * -(-g.K1 // _together(g))
    unit = claim(job, np.int64(-1), units)
    while unit < units:
        _backward_unit(unit, dy, x, dx, mask, weight, counts_of, means, rstds, gradients, g)
        unit = claim(job, unit, units)


@Kernel
def backward(job, workers, geometry, dy, x, dx, mask, weight, counts_of, means, rstds, gradients, result):
    """Write dx, and to `result`, shape (2, samples * size), dweight and dbias; return `clash`'s answer.

    `counts_of` and `means` hold one element a group, or one for all. `gradients`, shape (g.gradients, 2, size), are
    the slabs' own; where several threads work on the job they are 0 before, and added up afterwards.
    """
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
    group = unit // g.chunks
    one = np.int64(1)
    into = shifted(table, 2 * unit)
    weight = weight_of_k0(weight, group // g.K1, g)
    _chunk_sums(into, one, dy, x, weight, g, group // g.K1, group % g.K1, one, unit % g.chunks, means, rstds)


@scalar
def _sum_units(job, geometry, dy, x, weight, means, rstds, table):
    g = record(geometry)
    units = g.K0 * g.K1 * g.chunks
    unit = claim(job, np.int64(-1), units)
    while unit < units:
        _sum_unit(unit, dy, x, weight, means, rstds, table, g)
        unit = claim(job, unit, units)


@Kernel
def chunk_sums(job, workers, geometry, dy, x, weight, means, rstds, table):
    """Write the two sums of every chunk of every group to `table`, shape (groups, chunks, 2); return as `backward`."""
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
def _merge_sums(table, sums, g):
    groups = g.K0 * g.K1
    for group in range(groups):
        for row in range(2):
            s = 0.0
            for chunk in range(g.chunks):
                s += load(table, 2 * (group * g.chunks + chunk) + row)
            store(sums, row * groups + group, s)


@Kernel
def merge_sums(geometry, table, sums):
    """Add the chunks of every group in order into `sums`, shape (2, groups)."""
    p_geometry = pointer(geometry)
    _merge_sums(pointer(table), pointer(sums), record(p_geometry))


@scalar
def _emit_piece(unit, dy, x, dx, mask, weight, counts_of, means, rstds, sums, g):
    """Write dx of some runs, or of a part of one, from the groups' sums."""
    centred = g.centred != 0
    first = unit // g.across * g.piece_runs
    j = unit % g.across * g.chunk_width
    stop = least(j + g.chunk_width, g.R1)
    groups = g.K0 * g.K1
    for run in range(first, least(first + g.piece_runs, g.K0 * g.R0 * g.K1)):
        k0 = run // (g.K1 * g.R0)
        k1 = run % g.K1
        r0 = run // g.K1 % g.R0
        group = k0 * g.K1 + k1
        count = load(counts_of, group * g.count_step)
        mean = load(means, group * g.mean_step)
        rstd = load(rstds, group)
        mean_g = average(load(sums, group), count) if centred else 0.0
        mean_gh = average(load(sums, groups + group), count)
        own = weight_of_k0(weight, k0, g)
        _emit(dy, x, dx, mask, own, None, 0, 0, g, k0, r0, k1, j, stop, mean, rstd, mean_g, mean_gh)
    if g.stream != 0:
        settle_streams()


@scalar
def _emit_pieces(job, geometry, dy, x, dx, mask, weight, counts_of, means, rstds, sums):
    g = record(geometry)
    pieces = -(-(g.K0 * g.R0 * g.K1) // g.piece_runs) * g.across
    piece = claim(job, np.int64(-1), pieces)
    while piece < pieces:
        _emit_piece(piece, dy, x, dx, mask, weight, counts_of, means, rstds, sums, g)
        piece = claim(job, piece, pieces)


@Kernel
def emit(job, workers, geometry, dy, x, dx, mask, weight, counts_of, means, rstds, sums):
    """Write dx from the groups' sums, piece by piece in the order of memory; return as `backward`."""
    p_job, p_geometry = pointer(job), pointer(geometry)
    p_dy, p_x, p_dx, p_mask, p_weight = pointer(dy), pointer(x), pointer(dx), pointer(mask), pointer(weight)
    p_counts, p_means, p_rstds, p_sums = pointer(counts_of), pointer(means), pointer(rstds), pointer(sums)
    problem = clash(p_geometry, None, p_x, p_dy, p_mask, p_weight, None)
    if problem != 0:
        return problem
    for _ in prange(workers):
        _emit_pieces(p_job, p_geometry, p_dy, p_x, p_dx, p_mask, p_weight, p_counts, p_means, p_rstds, p_sums)
    return 0


@scalar
def _emit_lanes_unit(unit, dy, x, dx, mask, weight, counts_of, means, rstds, sums, result, g):
    centred = g.centred != 0
    blocks = -(-g.R1 // BLOCK)
    sample = unit // blocks
    weight = shifted(weight, sample * g.size)
    start = unit % blocks * BLOCK
    stop = least(start + BLOCK, g.R1)
    half = stop - start
    products = np.zeros(room_for(2 * half + 2 * LINE, g))
    gradients = np.zeros((2, half))
    p_products, p_gradients = retyped(pointer(products), weight), pointer(gradients)
    p = products_from(dx, start, p_products, g.lane_itemsize)
    first = sample * g.K0 // g.samples
    for k0 in range(first, (sample + 1) * g.K0 // g.samples):
        count = load(counts_of, k0 * g.count_step)
        mean_g = average(load(sums, k0), count) if centred else 0.0
        mean_gh = average(load(sums, g.K0 + k0), count)
        mean, rstd = load(means, k0 * g.mean_step), load(rstds, k0)
        _emit(dy, x, dx, mask, weight, p_products, p, half, g, k0, 0, 0, start, stop, mean, rstd, mean_g, mean_gh)
        if (k0 - first) % FLUSH == FLUSH - 1:
            flush(p_products, p, half, p_gradients, 0, half)
    if g.stream != 0:
        settle_streams()
    flush(p_products, p, half, p_gradients, 0, half)
    products[0] = 0.0
    of_sample = sample * g.size + start
    for i in range(half):
        store(result, of_sample + i, gradients[0, i])
        store(result, g.samples * g.size + of_sample + i, gradients[1, i])


@scalar
def _emit_lanes_units(job, geometry, dy, x, dx, mask, weight, counts_of, means, rstds, sums, result):
    g = record(geometry)
    units = g.samples * -(-g.R1 // BLOCK)
    unit = claim(job, np.int64(-1), units)
    while unit < units:
        _emit_lanes_unit(unit, dy, x, dx, mask, weight, counts_of, means, rstds, sums, result, g)
        unit = claim(job, unit, units)


@Kernel
def emit_lanes(job, workers, geometry, dy, x, dx, mask, weight, counts_of, means, rstds, sums, result):
    """Write dx and the gradients of long rows, BLOCK weights at a time over all rows: no gradients of slabs to hold.

    `result` has the shape (2, samples * R1), in lanes' dtype. Return as `backward`.
    """
    p_job, p_geometry = pointer(job), pointer(geometry)
    p_dy, p_x, p_dx, p_mask, p_weight = pointer(dy), pointer(x), pointer(dx), pointer(mask), pointer(weight)
    p_counts, p_means, p_rstds, p_sums = pointer(counts_of), pointer(means), pointer(rstds), pointer(sums)
    p_result = pointer(result)
    problem = clash(p_geometry, None, p_x, p_dy, p_mask, p_weight, None)
    if problem != 0:
        return problem
    for _ in prange(workers):
        _emit_lanes_units(
            p_job, p_geometry, p_dy, p_x, p_dx, p_mask, p_weight, p_counts, p_means, p_rstds, p_sums, p_result
        )
    return 0
