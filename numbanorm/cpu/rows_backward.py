"""Backward of the rows kernel: dx, and the gradients of weight and bias in the same pass.

With ``g = dy * weight`` and ``h = (x - mean) * rstd``, over the `n` elements that count in a group [1]_::

    dx = rstd * (g - counts * (sum(g) + h * sum(g * h)) / n)
    dweight = sum(dy * h)        dbias = sum(dy)

A unit of work is a slab of samples at one k1; each slab has gradients of its own, added in order at the end.

References
----------
.. [1] S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
   Shift", 2015, section 3.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from .dtypes import counts, lane, load, pointer, store
from .jit import Kernel, scalar
from .lanes import (
    all_lanes,
    choose,
    first_lanes,
    fused,
    load_lanes,
    load_part,
    load_some,
    marked_lanes,
    no_lanes,
    prefetch,
    settle_streams,
    store_some,
    stream_lanes,
    sum_of_lanes,
    until_line,
    width_of,
)
from .rows import LONG_RUN
from .welford import BLOCK, at

FLUSH = 32
"""Rows whose products are added in float32 before they go to the float64 gradients of weight and bias."""


@scalar
def _chunk_sums(sums, channels, dy, x, weight, g, k0, k1, chunk, mean, rstd):
    """Sum one chunk of a group: dy and dy * h for each of its channels, or of all, weighted, where weights lie along.

    `sums` takes the first sum of every channel, then the second.
    """
    for c in range(2 * channels):
        store(sums, c, 0.0)
    r_start = (chunk // g.across) * g.chunk_runs
    j_start = (chunk % g.across) * g.chunk_width
    j_stop = min(j_start + g.chunk_width, g.R1)
    no = no_lanes(x)
    hi = all_lanes(no, lane(x, mean))
    lo = all_lanes(no, lane(x, mean - np.float64(lane(x, mean))))
    scale = all_lanes(no, lane(x, rstd))
    for r0 in range(r_start, min(r_start + g.chunk_runs, g.R0)):
        x_start = g.x_start + k0 * g.x_K0 + r0 * g.x_R0 + k1 * g.x_K1
        dy_start = g.y_start + k0 * g.y_K0 + r0 * g.y_R0 + k1 * g.y_K1
        j = j_start
        while j < j_stop:
            channel = first = 0
            width = min(j_stop - j, BLOCK)
            if g.inner == 1:
                first = (k1 * g.R1 + j) % g.size
            else:
                width = min(width, g.inner - j % g.inner)
                channel = j // g.inner
            a = b = no
            whole = width - width % width_of(no)
            for i in range(0, whole, width_of(no)):
                d = load_lanes(no, dy, dy_start + j + i)
                if g.inner == 1:
                    d = d * load_lanes(no, weight, first + i)
                h = ((load_lanes(no, x, x_start + j + i) - hi) - lo) * scale
                a = a + d
                b = fused(d, h, b)
            if whole < width:
                rest = width - whole
                d = load_part(no, dy, dy_start + j + whole, rest)
                if g.inner == 1:
                    d = d * load_part(no, weight, first + whole, rest)
                h = ((load_part(no, x, x_start + j + whole, rest) - hi) - lo) * scale
                a = a + d
                b = b + choose(first_lanes(no, rest), d * h)
            store(sums, channel, load(sums, channel) + sum_of_lanes(a))
            store(sums, channels + channel, load(sums, channels + channel) + sum_of_lanes(b))
            j += width


@scalar
def _emit(dy, x, dx, mask, weight, products, half, g, k0, r0, k1, start, stop, mean, rstd, mean_g, mean_gh):
    """Write dx of one run from `start` to `stop`, block by block; where weights lie along the run, add to `products`.

    `products` takes `half` sums of dy * h, then as many of dy; none if `half` is 0.
    """
    x_start = g.x_start + k0 * g.x_K0 + r0 * g.x_R0 + k1 * g.x_K1
    dy_start = g.y_start + k0 * g.y_K0 + r0 * g.y_R0 + k1 * g.y_K1
    dx_start = ((k0 * g.R0 + r0) * g.K1 + k1) * g.R1
    mask_start = g.mask_start + k0 * g.mask_K0 + r0 * g.mask_R0 + k1 * g.mask_K1
    no = no_lanes(x)
    hi = all_lanes(no, lane(x, mean))
    lo = all_lanes(no, lane(x, mean - np.float64(lane(x, mean))))
    scale = all_lanes(no, lane(x, rstd))
    # Where dx does not depend on x, as in inference, NaN and Inf in x must not come in by a product with 0.
    depends = (mask is None or g.mask_R1 != 0 or counts(mask, mask_start)) and not (mean_g == 0.0 and mean_gh == 0.0)
    c = all_lanes(no, lane(x, mean_g))
    e = all_lanes(no, lane(x, mean_gh))
    along = g.inner == 1
    gain = no
    j = start
    while j < stop:
        width = stop - j
        first = 0
        if along:
            first = (k1 * g.R1 + j) % g.size
            width = min(width, g.size - first)
        else:
            width = min(width, g.inner - j % g.inner)
            gain = all_lanes(no, load(weight, (k1 * g.R1 + j) // g.inner % g.size))
        out = dx_start + j
        head = 0
        stream = g.stream != 0
        if stream:
            head = until_line(dx, out)
            stream = head == 0 or width >= LONG_RUN
            head = min(head, width) if stream else 0
        i = 0
        while i < width:
            part = min(width_of(no), width - i)
            if i < head:
                part = head - i
            if g.ahead != 0:
                prefetch(no, x, x_start + j + i + g.ahead)
                prefetch(no, dy, dy_start + j + i + g.ahead_dy)
            h = ((load_some(no, x, x_start + j + i, part) - hi) - lo) * scale
            d = load_some(no, dy, dy_start + j + i, part)
            if half > 0:
                p = j - start + i
                store_some(fused(d, h, load_some(no, products, p, part)), products, p, part)
                store_some(load_some(no, products, half + p, part) + d, products, half + p, part)
            centre = fused(h, e, c)
            if mask is not None and g.mask_R1 != 0:
                centre = choose(marked_lanes(no, mask, mask_start + j + i, part), centre)
            elif not depends:
                centre = no
            if along:
                gain = load_some(no, weight, first + i, part)
            v = (d * gain - centre) * scale
            if stream and part == width_of(no):
                stream_lanes(v, dx, out + i)
            else:
                store_some(v, dx, out + i, part)
            i += part
        j += width


@scalar
def _flush(products, gradients, first):
    """Add the products of the last rows to a slab's gradients and clear them."""
    half = products.shape[0] // 2
    for i in range(half):
        gradients[0, first + i] += products[i]
        gradients[1, first + i] += products[half + i]
        products[i] = 0.0
        products[half + i] = 0.0


@scalar
def _average(total, count):
    """Return total/count; 0 where nothing counts, as in inference: then the statistics do not depend on x."""
    return total * (1.0 / count) if count > 0.0 else 0.0


@scalar
def _backward_unit(unit, dy, x, dx, mask, weight, counts_of, means, rstds, gradients, geometry, centred):
    """Take the samples of one slab at one k1: sums, then dx, while the group is in the cache."""
    g = geometry[0]
    k1 = unit % g.K1
    slab = unit // g.K1
    slabs = gradients.shape[0]
    along = g.inner == 1
    channels = 1 if along else max(1, g.R1 // g.inner)
    first = k1 * g.R1 // g.inner % g.size
    sums = np.empty(2 * channels)
    total = np.empty(2 * channels)
    half = g.R1 if along else 0
    products = np.zeros(2 * half, weight.dtype)
    # Each array below is used, as an array, after the last call that got its pointer: so it is still alive then.
    p_dy, p_x, p_dx, p_mask, p_weight = pointer(dy), pointer(x), pointer(dx), pointer(mask), pointer(weight)
    p_sums, p_products = pointer(sums), pointer(products)
    start = slab * g.K0 // slabs
    for k0 in range(start, (slab + 1) * g.K0 // slabs):
        group = k0 * g.K1 + k1
        mean = at(means, group)
        rstd = at(rstds, group)
        total[:] = 0.0
        for chunk in range(g.chunks):
            _chunk_sums(p_sums, channels, p_dy, p_x, p_weight, g, k0, k1, chunk, mean, rstd)
            for c in range(2 * channels):
                total[c] += sums[c]
        sum_g, sum_gh = total[0], total[channels]
        if not along:
            sum_g = sum_gh = 0.0
            for c in range(channels):
                sum_g += weight[first + c] * total[c]
                sum_gh += weight[first + c] * total[channels + c]
                gradients[slab, 0, first + c] += total[channels + c]
                gradients[slab, 1, first + c] += total[c]
        count = at(counts_of, group)
        mean_g = _average(sum_g, count) if centred else 0.0
        mean_gh = _average(sum_gh, count)
        for r0 in range(g.R0):
            _emit(
                p_dy, p_x, p_dx, p_mask, p_weight, p_products, half, g, k0, r0, k1, 0, g.R1, mean, rstd, mean_g, mean_gh
            )
        if along and (k0 - start) % FLUSH == FLUSH - 1:
            _flush(products, gradients[slab], first)
    if g.stream != 0:
        settle_streams()
    _flush(products, gradients[slab], first)  # of length 0 where weights do not lie along


@Kernel
def backward(dy, x, dx, mask, weight, counts_of, means, rstds, gradients, geometry, centred):
    """Write dx, and add to `gradients`, shape (slabs, 2, size), dweight and dbias of each slab.

    `counts_of`, `means` and `rstds` hold one element a group, or one for all.
    """
    for unit in prange(gradients.shape[0] * geometry[0].K1):
        _backward_unit(np.int64(unit), dy, x, dx, mask, weight, counts_of, means, rstds, gradients, geometry, centred)


@scalar
def _sum_unit(unit, dy, x, weight, counts_of, means, rstds, table, geometry):
    g = geometry[0]
    group = unit // g.chunks
    k0 = group // g.K1
    k1 = group % g.K1
    chunk = unit % g.chunks
    sums = np.empty(2)
    mean, rstd = at(means, group), at(rstds, group)
    _chunk_sums(pointer(sums), 1, pointer(dy), pointer(x), pointer(weight), g, k0, k1, chunk, mean, rstd)
    table[group, chunk, 0] = sums[0]
    table[group, chunk, 1] = sums[1]


@Kernel
def chunk_sums(dy, x, weight, counts_of, means, rstds, table, geometry):
    """Write the two sums of every chunk of every group to `table`, shape (groups, chunks, 2)."""
    for unit in prange(table.shape[0] * table.shape[1]):
        _sum_unit(np.int64(unit), dy, x, weight, counts_of, means, rstds, table, geometry)


@Kernel
def merge_sums(table, sums):
    """Add the chunks of every group in order into `sums`, shape (2, groups)."""
    for group in range(table.shape[0]):
        for row in range(2):
            s = 0.0
            for chunk in range(table.shape[1]):
                s += table[group, chunk, row]
            sums[row, group] = s


@scalar
def _emit_piece(unit, dy, x, dx, mask, weight, counts_of, means, rstds, sums, g, centred):
    """Write dx of some runs, or of a part of one, from the groups' sums."""
    first = unit // g.across * g.piece_runs
    j = unit % g.across * g.chunk_width
    stop = min(j + g.chunk_width, g.R1)
    groups = g.K0 * g.K1
    for run in range(first, min(first + g.piece_runs, g.K0 * g.R0 * g.K1)):
        k0 = run // (g.K1 * g.R0)
        k1 = run % g.K1
        r0 = run // g.K1 % g.R0
        group = k0 * g.K1 + k1
        count = at(counts_of, group)
        mean = at(means, group)
        rstd = at(rstds, group)
        mean_g = _average(load(sums, group), count) if centred else 0.0
        mean_gh = _average(load(sums, groups + group), count)
        _emit(dy, x, dx, mask, weight, weight, 0, g, k0, r0, k1, j, stop, mean, rstd, mean_g, mean_gh)
    if g.stream != 0:
        settle_streams()


@scalar
def _emit_unit(unit, dy, x, dx, mask, weight, counts_of, means, rstds, sums, geometry, centred):
    _emit_piece(
        unit,
        pointer(dy),
        pointer(x),
        pointer(dx),
        pointer(mask),
        pointer(weight),
        counts_of,
        means,
        rstds,
        pointer(sums),
        geometry[0],
        centred,
    )


@Kernel
def emit(dy, x, dx, mask, weight, counts_of, means, rstds, sums, geometry, centred):
    """Write dx from the groups' sums, piece by piece in the order of memory."""
    g = geometry[0]
    for unit in prange(-(-(g.K0 * g.R0 * g.K1) // g.piece_runs) * g.across):
        _emit_unit(np.int64(unit), dy, x, dx, mask, weight, counts_of, means, rstds, sums, geometry, centred)


@scalar
def _emit_lanes_unit(unit, dy, x, dx, mask, weight, counts_of, means, rstds, sums, dweight, dbias, geometry, centred):
    g = geometry[0]
    start = unit * BLOCK
    stop = min(start + BLOCK, g.R1)
    half = stop - start
    products = np.zeros(2 * half, weight.dtype)
    gradients = np.zeros((2, half))
    p_dy, p_x, p_dx, p_mask, p_weight = pointer(dy), pointer(x), pointer(dx), pointer(mask), pointer(weight)
    p_products = pointer(products)
    for k0 in range(g.K0):
        mean, rstd, count = at(means, k0), at(rstds, k0), at(counts_of, k0)
        mean_g = _average(sums[0, k0], count) if centred else 0.0
        mean_gh = _average(sums[1, k0], count)
        _emit(
            p_dy, p_x, p_dx, p_mask, p_weight, p_products, half, g, k0, 0, 0, start, stop, mean, rstd, mean_g, mean_gh
        )
        if k0 % FLUSH == FLUSH - 1:
            _flush(products, gradients, 0)
    if g.stream != 0:
        settle_streams()
    _flush(products, gradients, 0)
    for i in range(half):
        dweight[start + i] = gradients[0, i]
        if dbias.shape[0] > 0:
            dbias[start + i] = gradients[1, i]


@Kernel
def emit_lanes(dy, x, dx, mask, weight, counts_of, means, rstds, sums, dweight, dbias, geometry, centred):
    """Write dx and the gradients of long rows, BLOCK weights at a time over all rows: no gradients of slabs to hold.

    `dbias` may be empty.
    """
    for unit in prange(-(-geometry[0].R1 // BLOCK)):
        _emit_lanes_unit(
            np.int64(unit), dy, x, dx, mask, weight, counts_of, means, rstds, sums, dweight, dbias, geometry, centred
        )
