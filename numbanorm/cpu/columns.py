"""The columns kernel: groups that run across memory, in the view (K0, rows, lanes).

The contiguous axes K1 and R1 are the lanes; rows of R0 stream past and every lane keeps its own moments. Lanes go in
tiles of up to `TILE`, whose moments stay in the L1 cache. At the end lanes of one group merge: R1 neighbours, and the
copies made where few lanes were folded (three channels become 255 lanes of 85 rows side by side). Rows are taken
chunk by chunk, block by block, and merged in that order whatever the number of threads.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from .dtypes import deviation, lane, load, store
from .jit import Kernel, lanes, scalar
from .rows import FLOAT32_SAFE
from .welford import COUNT, HUGE, M2, MEAN, POOR, PREFIX, RSTD, TINY, merge, rstd_of

TILE = 512
"""Lanes a tile: shift, sum, squares and count in float32 take 8 KiB, a tile's moments in float64 24 KiB."""

BLOCK_ROWS = 128
"""Rows a block: 32 float32 additions a lane (four rows at a time) between merges."""

# Offsets in a tile's scratch arrays. One array with constant offsets, not four arrays: LLVM gives up on a vector loop
# that needs more than eight checks of pointers against each other.
_SHIFT, _SUM, _SQUARES, _SEEN = 0, TILE, 2 * TILE, 3 * TILE
_N, _MEAN, _M2 = 0, TILE, 2 * TILE
_HI, _LO, _SCALE, _BIAS = 0, TILE, 2 * TILE, 3 * TILE


@lanes
def _sweep_rows(sums, x, start, stride, rows, width):
    """Add (x - shift) and (x - shift)**2 of `rows` rows to a tile's sums, four rows at a time."""
    shift = sums[_SHIFT : _SHIFT + width]
    s = sums[_SUM : _SUM + width]
    q = sums[_SQUARES : _SQUARES + width]
    whole = rows - rows % 4
    for r in range(0, whole, 4):
        o = start + r * stride
        a = x[o : o + width]
        b = x[o + stride : o + stride + width]
        c = x[o + 2 * stride : o + 2 * stride + width]
        d = x[o + 3 * stride : o + 3 * stride + width]
        for i in range(width):
            k = shift[i]
            da = deviation(a, i, k)
            db = deviation(b, i, k)
            dc = deviation(c, i, k)
            dd = deviation(d, i, k)
            s[i] += (da + db) + (dc + dd)
            q[i] += (da * da + db * db) + (dc * dc + dd * dd)
    for r in range(whole, rows):
        o = start + r * stride
        a = x[o : o + width]
        for i in range(width):
            da = deviation(a, i, shift[i])
            s[i] += da
            q[i] += da * da


@lanes
def _sweep_row_masked(sums, x, start, mask, mask_start, width):
    """Add one row to a tile's sums where `mask` is True."""
    shift = sums[_SHIFT : _SHIFT + width]
    s = sums[_SUM : _SUM + width]
    q = sums[_SQUARES : _SQUARES + width]
    seen = sums[_SEEN : _SEEN + width]
    a = x[start : start + width]
    m = mask[mask_start : mask_start + width]
    zero = lane(x, 0.0)
    one = lane(x, 1.0)
    for i in range(width):
        d = deviation(a, i, shift[i]) if m[i] else zero
        seen[i] += one if m[i] else zero
        s[i] += d
        q[i] += d * d


@scalar
def _block_sums(sums, x, start, stride, rows, width, mask, mask_start, mask_stride, mask_step):
    """Sum a block around the tile's shifts; count the elements seen in each lane."""
    sums[_SUM:] = lane(x, 0.0)
    seen = 0
    if mask is None:
        _sweep_rows(sums, x, start, stride, rows, width)
        seen = rows
    else:
        for r in range(rows):
            m = mask_start + r * mask_stride
            if mask_step != 0:
                _sweep_row_masked(sums, x, start + r * stride, mask, m, width)
            elif mask[m]:
                _sweep_rows(sums, x, start + r * stride, stride, 1, width)
                seen += 1
    for i in range(width):
        sums[_SEEN + i] += lane(x, seen)


@lanes
def _moments_of_sums(sums, block, width, centred):
    """Turn a tile's sums into moments; return how many lanes cannot be trusted, as `shift_is_good` judges."""
    bad = 0
    for i in range(width):
        n = np.float64(sums[_SEEN + i])
        s = np.float64(sums[_SUM + i])
        q = np.float64(sums[_SQUARES + i])
        offset = s / max(n, 1.0) if centred else 0.0
        good = (TINY < q) & (q < HUGE) & (s * offset <= POOR * q)
        bad += 0 if good | (n == 0.0) else 1
        block[_N + i] = n
        block[_MEAN + i] = np.float64(sums[_SHIFT + i]) + offset
        block[_M2 + i] = q - s * offset
    return bad


@lanes
def _exact_row(block, x, start, width, squares):
    """Add one row to a tile's float64 sums: x to the means, or (x - mean)**2 to M2."""
    a = x[start : start + width]
    if squares:
        for i in range(width):
            d = deviation(a, i, block[_MEAN + i])
            block[_M2 + i] += d * d
    else:
        for i in range(width):
            block[_MEAN + i] += np.float64(load(a, i))


@lanes
def _exact_row_masked(block, x, start, mask, mask_start, width, squares):
    """Do as `_exact_row` where `mask` is True."""
    a = x[start : start + width]
    m = mask[mask_start : mask_start + width]
    if squares:
        for i in range(width):
            d = deviation(a, i, block[_MEAN + i]) if m[i] else 0.0
            block[_M2 + i] += d * d
    else:
        for i in range(width):
            block[_MEAN + i] += np.float64(load(a, i)) if m[i] else 0.0


@scalar
def _exact_moments(block, x, start, stride, rows, width, mask, mask_start, mask_stride, mask_step, centred):
    """Take a block's means and M2 again in float64, in two sweeps; its counts are known."""
    block[_MEAN:] = 0.0
    for squares in (False, True):
        if squares or centred:
            for r in range(rows):
                if mask is None:
                    _exact_row(block, x, start + r * stride, width, squares)
                else:
                    m = mask_start + r * mask_stride
                    if mask_step != 0:
                        _exact_row_masked(block, x, start + r * stride, mask, m, width, squares)
                    elif mask[m]:
                        _exact_row(block, x, start + r * stride, width, squares)
        if not squares:
            for i in range(width):
                block[_MEAN + i] /= max(block[_N + i], 1.0)


@scalar
def _merge_lanes(moments, block, width):
    """Merge a block's moments into a tile's, lane by lane, by Chan's formula."""
    for i in range(width):
        n = moments[_N + i]
        m = block[_N + i]
        count = n + m
        share = m / max(count, 1.0)
        mean = moments[_MEAN + i]
        delta = block[_MEAN + i] - mean
        merged_mean = mean + delta * share
        merged_m2 = moments[_M2 + i] + block[_M2 + i] + delta * delta * n * share
        # Either side may be empty; then the other stands as it is (its mean times 0 may be NaN).
        merged_mean = block[_MEAN + i] if n == 0.0 else merged_mean
        merged_m2 = block[_M2 + i] if n == 0.0 else merged_m2
        moments[_MEAN + i] = mean if m == 0.0 else merged_mean
        moments[_M2 + i] = moments[_M2 + i] if m == 0.0 else merged_m2
        moments[_N + i] = count


@scalar
def _chunk_moments(moments, block, sums, x, mask, g, k0, first, width, chunk, centred):
    """Take the moments of one chunk of rows in the lanes from `first` on."""
    moments[:] = 0.0
    start = g.x_start + k0 * g.x_K0 + first
    mask_start = g.mask_start + k0 * g.mask_K0 + first * g.mask_R1
    r_start = chunk * g.chunk_rows
    r_stop = min(r_start + g.chunk_rows, g.rows)
    sums[:] = lane(x, 0.0)
    if centred:
        prefix = min(PREFIX, r_stop - r_start)
        _sweep_rows(sums, x, start + r_start * g.x_R0, g.x_R0, prefix, width)
        for i in range(width):
            sums[_SHIFT + i] = sums[_SUM + i] / lane(x, max(prefix, 1))
    blocks = -(-(r_stop - r_start) // BLOCK_ROWS)
    # The last chunk also takes the tail: the leftover rows, fewer than a folded row holds.
    tail = min(max(g.tail - first, 0), width) if chunk == g.chunks - 1 else 0
    for b in range(blocks + (1 if tail > 0 else 0)):
        r = r_start + b * BLOCK_ROWS
        rows = min(BLOCK_ROWS, r_stop - r)
        wide = width
        if b == blocks:
            r, rows, wide = r_stop, 1, tail
        x_at = start + r * g.x_R0
        mask_at = mask_start + r * g.mask_R0
        _block_sums(sums, x, x_at, g.x_R0, rows, wide, mask, mask_at, g.mask_R0, g.mask_R1)
        if _moments_of_sums(sums, block, wide, centred) > 0:
            _exact_moments(block, x, x_at, g.x_R0, rows, wide, mask, mask_at, g.mask_R0, g.mask_R1, centred)
        _merge_lanes(moments, block, wide)
        if centred:
            for i in range(wide):
                if block[_N + i] > 0.0:
                    sums[_SHIFT + i] = lane(x, block[_MEAN + i])


@scalar
def _close_groups(moments, g, k0, first, width, stats, eps):
    """Merge the lanes of a tile into the statistics of its groups."""
    a = k0 * g.K1 + first // g.R1
    b = k0 * g.K1 + min((first + width) // g.R1, g.K1)
    stats[COUNT, a:b] = 0.0
    stats[MEAN, a:b] = 0.0
    stats[M2, a:b] = 0.0
    for i in range(width):
        group = k0 * g.K1 + (first + i) // g.R1 % g.K1
        n, mean, m2 = stats[COUNT, group], stats[MEAN, group], stats[M2, group]
        n, mean, m2 = merge(n, mean, m2, moments[_N + i], moments[_MEAN + i], moments[_M2 + i])
        stats[COUNT, group] = n
        stats[MEAN, group] = mean
        stats[M2, group] = m2
    for group in range(a, b):
        stats[RSTD, group] = rstd_of(stats[COUNT, group], stats[M2, group], eps)


@scalar
def _spread(params, weight, bias, stats, g, k0, first, width, x):
    """Give every lane of a tile its mean (in two parts), scale and bias; tell whether float32 lanes can hold them."""
    by_row = g.inner % g.lanes == 0
    safe = True
    for i in range(width):
        group = k0 * g.K1 + (first + i) // g.R1 % g.K1
        mean = stats[MEAN, group]
        rstd = stats[RSTD, group]
        safe &= (rstd > 1.0 / FLOAT32_SAFE) & (rstd < FLOAT32_SAFE)
        hi = np.float64(lane(x, mean))
        channel = (first + i) // g.inner % g.size
        params[_HI + i] = hi
        params[_LO + i] = mean - hi
        params[_SCALE + i] = rstd if by_row else rstd * weight[channel]
        params[_BIAS + i] = 0.0 if by_row else bias[channel]
    return safe


@scalar
def _write_row(params, x, x_start, y, y_start, width, weight, bias):
    """Normalize one row of a tile; `weight` and `bias` are those of the row, on top of the lanes' own."""
    a = x[x_start : x_start + width]
    out = y[y_start : y_start + width]
    for i in range(width):
        centred = deviation(a, i, params[_HI + i]) - params[_LO + i]
        store(out, i, centred * params[_SCALE + i] * weight + (params[_BIAS + i] + bias))


@scalar
def _write_chunk(params, x, y, weight, bias, g, k0, first, width, chunk):
    """Normalize one chunk of rows of a tile."""
    by_row = g.inner % g.lanes == 0
    r_start = chunk * g.chunk_rows
    r_stop = min(r_start + g.chunk_rows, g.rows)
    tail = min(max(g.tail - first, 0), width) if chunk == g.chunks - 1 else 0
    w = lane(params, 1.0)
    b = lane(params, 0.0)
    for r in range(r_start, r_stop + (1 if tail > 0 else 0)):
        if by_row:
            channel = (k0 * g.rows + r) * g.lanes // g.inner % g.size
            w = weight[channel]
            b = bias[channel]
        x_at = g.x_start + k0 * g.x_K0 + r * g.x_R0 + first
        y_at = g.y_start + k0 * g.y_K0 + r * g.y_R0 + first
        _write_row(params, x, x_at, y, y_at, tail if r == r_stop else width, w, b)


@scalar
def _write_tile(x, y, weight, bias, stats, g, k0, first, width, chunk_start, chunk_stop):
    """Normalize chunks of rows of a tile, in float32 lanes where they can hold its statistics."""
    wide = np.empty(4 * TILE, np.float64)
    if _spread(wide, weight, bias, stats, g, k0, first, width, x):
        params = np.empty(4 * TILE, weight.dtype)
        for i in range(4 * TILE):
            params[i] = wide[i]
        for chunk in range(chunk_start, chunk_stop):
            _write_chunk(params, x, y, weight, bias, g, k0, first, width, chunk)
    else:
        for chunk in range(chunk_start, chunk_stop):
            _write_chunk(wide, x, y, weight, bias, g, k0, first, width, chunk)


@scalar
def _scratch(weight):
    """Make a tile's scratch arrays: sums in lanes, moments of a block, of a chunk and of the tile in float64."""
    return np.empty(4 * TILE, weight.dtype), np.empty(3 * TILE), np.empty(3 * TILE), np.empty(3 * TILE)


@scalar
def _forward_tile(unit, x, y, mask, weight, bias, stats, geometry, eps, centred):
    """Take the statistics of one tile's groups and write its output."""
    g = geometry[0]
    tiles = -(-g.lanes // g.tile)
    k0 = unit // tiles
    first = unit % tiles * g.tile
    width = min(g.tile, g.lanes - first)
    sums, block, moments, merged = _scratch(weight)
    merged[:] = 0.0
    for chunk in range(g.chunks):
        _chunk_moments(moments, block, sums, x, mask, g, k0, first, width, chunk, centred)
        _merge_lanes(merged, moments, width)
    _close_groups(merged, g, k0, first, width, stats, eps)
    _write_tile(x, y, weight, bias, stats, g, k0, first, width, 0, g.chunks)


@Kernel
def forward(x, y, mask, weight, bias, stats, geometry, eps, centred):
    """Normalize tile by tile: statistics, then output, while the tile is in the cache if it fits."""
    g = geometry[0]
    for unit in prange(g.K0 * -(-g.lanes // g.tile)):
        _forward_tile(unit, x, y, mask, weight, bias, stats, geometry, eps, centred)


@scalar
def _store_chunk(unit, x, mask, weight, table, geometry, centred):
    g = geometry[0]
    tiles = -(-g.lanes // g.tile)
    chunk = unit % g.chunks
    tile = unit // g.chunks
    first = tile % tiles * g.tile
    width = min(g.tile, g.lanes - first)
    sums, block, moments, _ = _scratch(weight)
    _chunk_moments(moments, block, sums, x, mask, g, tile // tiles, first, width, chunk, centred)
    out = table[tile, chunk]
    for i in range(width):
        out[0, i] = moments[_N + i]
        out[1, i] = moments[_MEAN + i]
        out[2, i] = moments[_M2 + i]


@Kernel
def moments(x, mask, weight, table, geometry, centred):
    """Write (count, mean, M2) of every lane of every chunk to `table`, shape (K0 * tiles, chunks, 3, tile)."""
    for unit in prange(table.shape[0] * table.shape[1]):
        _store_chunk(unit, x, mask, weight, table, geometry, centred)


@scalar
def _merge_tile(tile, table, stats, geometry, eps):
    g = geometry[0]
    tiles = -(-g.lanes // g.tile)
    first = tile % tiles * g.tile
    width = min(g.tile, g.lanes - first)
    block = np.empty(3 * TILE)
    merged = np.zeros(3 * TILE)
    for chunk in range(g.chunks):
        part = table[tile, chunk]
        for i in range(width):
            block[_N + i] = part[0, i]
            block[_MEAN + i] = part[1, i]
            block[_M2 + i] = part[2, i]
        _merge_lanes(merged, block, width)
    _close_groups(merged, g, tile // tiles, first, width, stats, eps)


@Kernel
def merge_chunks(table, stats, geometry, eps):
    """Merge the chunks of every tile in order, then its lanes, into `stats`, shape (4, groups)."""
    for tile in prange(table.shape[0]):
        _merge_tile(tile, table, stats, geometry, eps)


@scalar
def _apply_unit(unit, x, y, weight, bias, stats, geometry):
    g = geometry[0]
    tiles = -(-g.lanes // g.tile)
    # Tiles change fastest: neighbouring units are neighbours in memory.
    first = unit % tiles * g.tile
    chunk = unit // tiles % g.chunks
    k0 = unit // (tiles * g.chunks)
    width = min(g.tile, g.lanes - first)
    _write_tile(x, y, weight, bias, stats, g, k0, first, width, chunk, chunk + 1)


@Kernel
def apply(x, y, weight, bias, stats, geometry):
    """Normalize with given statistics, chunk by chunk."""
    g = geometry[0]
    for unit in prange(g.K0 * g.chunks * -(-g.lanes // g.tile)):
        _apply_unit(unit, x, y, weight, bias, stats, geometry)
