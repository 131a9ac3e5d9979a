"""Backward of the rows kernel.

With ``g = dy * weight`` and ``h = (x - mean) * rstd``, over the `n` elements that count in a group [1]_::

    dx = rstd * (g - counts * (sum(g) + h * sum(g * h)) / n)
    dweight = sum(dy * h)        dbias = sum(dy)

For the L2 norm, whose rstd is 1 / max(norm, eps), the same holds with `n` 1, or 0 where eps is larger than the norm.

Where weights lie along the rows and registers hold them (LayerNorm, RMSNorm), all is done in one read (`rows_fused`): a
team of threads, or a cluster of blocks, takes some rows, one after the other, and keeps its dweight and dbias in
registers. The next row is read ahead. Elsewhere sums come first, then dx; weights that lie along rows too wide to hold
get their gradients from the threads that write dx, the others from the same sums.

References
----------
.. [1] S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
   Shift", 2015, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from ..core.norms import L2
from ..core.plan import Plan
from . import affine, memory, sums
from . import lanes as ln
from .launch import Call, item_size
from .launch_backward import Backward, BackwardPlan, Merge, as_sums, weighing
from .launch_backward import rows_backward as rows_choices
from .memory import Span
from .rows_fused import fused_kernel, standard_of, statistics_of
from .toolchain import Kernel, cuda, has_clusters, types
from .welford import add, team


@cache
def sums_kernel(c: Backward) -> Kernel:
    """Return the kernel that writes sum(g), sum(g * h) and the count of every chunk of every segment, float64.

    For the L2 norm it is sum(h * h) in place of the count.

    A segment is what of a group has one weight: its sums come without that weight. Where weights lie along the rows,
    or there are none, it is the group, and its sums come with them.
    """
    lane = types.float64 if c.wide else types.float32
    scalar = np.float64 if c.wide else np.float32
    geometry = (lane, c.vector, c.loads, c.rule)
    load_dy, load_x = memory.loader(c.result, *geometry), memory.loader(c.source, *geometry)
    chosen_of = memory.chooser(c.mask, c.vector, c.loads, c.rule)
    weights = affine.gatherer(c.weights or "along", *geometry)
    write_number = memory.write_number
    statistics, standard = statistics_of(c), standard_of(c)
    merged = team(lane, c.team, add)
    fold, count_of = ln.fold(1), ln.count(1, lane)
    weighted, along = c.weights != "", c.weights == "along"
    step, teams = np.int64(c.team), np.int64(c.block // c.team)
    whole_tile = np.int64(c.team * c.loads)
    source_size, result_size = item_size(c.source), item_size(c.result)
    masked, counted, of_norm = c.mask == "elements", c.mask != "all", c.scale == L2
    zero = scalar(0)
    ints = np.int64

    def rows_sums(
        dy, x, mask, weight, mean, rstd, table,
        units, chunks, chunk_pieces, pieces, run, K1, span, R1, segments, segment,
        x_K0, x_R0, x_K1, dy_K0, dy_R0, dy_K1, mask_K0, mask_R0, mask_K1, inner, size,
    ):  # fmt: skip
        thread = ints(cuda.threadIdx.x) % step
        unit = ints(cuda.blockIdx.x) * teams + ints(cuda.threadIdx.x) // step
        there = unit < units
        unit = min(unit, units - 1)
        part = unit // chunks
        chunk = unit - part * chunks
        group = part // segments
        j = (part - group * segments) * segment
        k0 = group // K1
        k1 = group - k0 * K1
        packed_R0 = K1 * R1
        gain, hi, scale, back = statistics(mean, rstd, group)
        x_at = x + (k0 * x_K0 + k1 * x_K1 + j) * source_size
        dy_at = dy + (k0 * dy_K0 + k1 * dy_K1 + j) * result_size
        mask_at = mask + k0 * mask_K0 + k1 * mask_K1
        if masked:
            mask_at += j
        flat = k0 * span + k1 * R1 + j
        if along:
            flat = flat % size
        p = chunk * chunk_pieces + thread
        limit = min((chunk + 1) * chunk_pieces, pieces)
        if not there:
            limit = ints(0)
        a = b = n = none = zero
        while p - thread < limit:
            d = load_dy(dy_at, p, step, limit, run, dy_R0)
            h = standard(load_x(x_at, p, step, limit, run, x_R0), gain, hi, scale, back)
            if weighted:
                d = d * weights(weight, flat, p, step, limit, run, packed_R0, inner, size)
            a += fold(d)
            b += fold(d * h)
            if of_norm:
                n += fold(h * h)
            elif counted:
                n += count_of(chosen_of(mask_at, p, step, limit, run, mask_R0))
            p += whole_tile
        a, b, n, none = merged(a, b, n, none)
        if thread == 0 and there:
            write_number(table, unit, np.float64(a))
            write_number(table, units + unit, np.float64(b))
            write_number(table, 2 * units + unit, np.float64(n))

    return Kernel(rows_sums, (c,), c.block)


@cache
def emit_kernel(c: Backward) -> Kernel:
    """Return the kernel that writes dx from the groups' sums."""
    lane = types.float64 if c.wide else types.float32
    scalar = np.float64 if c.wide else np.float32
    geometry = (lane, c.vector, c.loads, c.rule)
    load_dy, load_x = memory.loader(c.result, *geometry), memory.loader(c.source, *geometry)
    store_dx = memory.storer(c.result, *geometry)
    chosen_of = memory.chooser(c.mask, c.vector, c.loads, c.rule)
    weights = affine.gatherer(c.weights or "along", *geometry)
    read_number = memory.read_number
    statistics, standard = statistics_of(c), standard_of(c)
    choose = ln.choose
    weighted = c.weights != ""
    fixed, centred, masked, zero, one = c.fixed, c.centred, c.mask != "all", scalar(0), scalar(1)
    step, teams = np.int64(c.team), np.int64(c.block // c.team)
    whole_tile = np.int64(c.team * c.loads)
    source_size, result_size = item_size(c.source), item_size(c.result)
    ints = np.int64

    def rows_emit(
        dy, x, dx, mask, weight, mean, rstd, sums,
        units, chunks, chunk_pieces, pieces, run, K1, span, R1, groups,
        x_K0, x_R0, x_K1, dy_K0, dy_R0, dy_K1, mask_K0, mask_R0, mask_K1, inner, size,
    ):  # fmt: skip
        thread = ints(cuda.threadIdx.x) % step
        block = ints(cuda.gridDim.x) - 1 - ints(cuda.blockIdx.x)  # backwards: what was read last is still in L2
        unit = block * teams + ints(cuda.threadIdx.x) // step
        if unit < units:
            group = unit // chunks
            chunk = unit - group * chunks
            k0 = group // K1
            k1 = group - k0 * K1
            packed_R0 = K1 * R1
            gain, hi, scale, back = statistics(mean, rstd, group)
            flat = k0 * span + k1 * R1
            x_at = x + (k0 * x_K0 + k1 * x_K1) * source_size
            dy_at = dy + (k0 * dy_K0 + k1 * dy_K1) * result_size
            dx_at = dx + flat * result_size
            mask_at = mask + k0 * mask_K0 + k1 * mask_K1
            a = b = zero
            if not fixed:
                a = scalar(read_number(sums, group))
                b = scalar(read_number(sums, groups + group))
            p = chunk * chunk_pieces + thread
            limit = min((chunk + 1) * chunk_pieces, pieces)
            while p < limit:
                d = load_dy(dy_at, p, step, limit, run, dy_R0)
                if weighted:
                    d = d * weights(weight, flat, p, step, limit, run, packed_R0, inner, size)
                if not fixed:
                    shift = standard(load_x(x_at, p, step, limit, run, x_R0), gain, hi, scale, back) * b
                    if centred:
                        shift = shift + a
                    if masked:
                        shift = choose(chosen_of(mask_at, p, step, limit, run, mask_R0), shift)
                    d = d - shift
                d = d * scale
                if gain != one:
                    d = d * gain
                store_dx(dx_at, p, step, limit, run, packed_R0, d)
                p += whole_tile

    return Kernel(rows_emit, (c,), c.block)


@cache
def lanes_kernel(c: Backward) -> Kernel:
    """Return the kernel that writes dx from the groups' sums, and slabs of dweight and dbias of weights along rows.

    A thread keeps to its elements of a row, and takes them from all rows of a slab.
    """
    lane = types.float64 if c.wide else types.float32
    name = "float64" if c.wide else "float32"
    scalar = np.float64 if c.wide else np.float32
    geometry = (lane, c.vector, 1, "flat")
    load_dy, load_x = memory.loader(c.result, *geometry), memory.loader(c.source, *geometry)
    store_dx, store_slab = memory.storer(c.result, *geometry), memory.storer(name, *geometry)
    chosen_of = memory.chooser(c.mask, c.vector, 1, "flat")
    weights = affine.gatherer("along", *geometry)
    read_number = memory.read_number
    statistics, standard = statistics_of(c), standard_of(c)
    choose, tile = ln.choose, ln.tile(c.vector)
    weighted = c.weight
    fixed, centred, masked, by_element = c.fixed, c.centred, c.mask != "all", c.mask == "elements"
    source_size, result_size, lane_size = item_size(c.source), item_size(c.result), item_size(name)
    threads, vector = np.int64(c.block), np.int64(c.vector)
    ints = np.int64
    zero, one = scalar(0), scalar(1)

    def lanes_backward(
        dy, x, dx, mask, weight, mean, rstd, sums, slabs,
        tiles, slab_rows, rows, R0, K1, R1, groups,
        x_K0, x_R0, x_K1, dy_K0, dy_R0, dy_K1, mask_K0, mask_R0, mask_K1, size, biased,
    ):  # fmt: skip
        unit = ints(cuda.gridDim.x) - 1 - ints(cuda.blockIdx.x)  # backwards: what was read last is still in L2
        slab = unit // tiles
        lanes = K1 * R1
        column = ((unit - slab * tiles) * threads + ints(cuda.threadIdx.x)) * vector
        if column < lanes:
            k1 = column // R1
            j = column - k1 * R1
            here = ints(0), ints(1), ints(1), ints(1), ints(0)
            w = tile(one)
            if weighted:
                w = weights(weight, column, *here, ints(1), size)
            dweight = dbias = tile(zero)
            k0 = slab * slab_rows // R0
            r0 = slab * slab_rows - k0 * R0
            for row in range(slab * slab_rows, min((slab + 1) * slab_rows, rows)):
                group = k0 * K1 + k1
                gain, hi, scale, back = statistics(mean, rstd, group)
                d = load_dy(dy + (k0 * dy_K0 + r0 * dy_R0 + k1 * dy_K1 + j) * result_size, *here)
                h = load_x(x + (k0 * x_K0 + r0 * x_R0 + k1 * x_K1 + j) * source_size, *here)
                h = standard(h, gain, hi, scale, back)
                dweight = dweight + d * h
                dbias = dbias + d
                d = d * w
                if not fixed:
                    shift = h * scalar(read_number(sums, groups + group))
                    if centred:
                        shift = shift + scalar(read_number(sums, group))
                    if masked:
                        mask_at = mask + k0 * mask_K0 + r0 * mask_R0 + k1 * mask_K1
                        if by_element:
                            mask_at += j
                        shift = choose(chosen_of(mask_at, *here), shift)
                    d = d - shift
                d = d * scale
                if gain != one:
                    d = d * gain
                store_dx(dx + (row * lanes + column) * result_size, *here, d)
                r0 += 1
                if r0 == R0:
                    k0, r0 = k0 + 1, ints(0)
            own = slabs + (slab * 2 * size + column) * lane_size
            store_slab(own, *here, dweight)
            if biased != 0:
                store_slab(own + size * lane_size, *here, dbias)

    return Kernel(lanes_backward, (c,), c.block)


def backward(plan: Plan, call: Call, addresses: tuple[int, ...], stream: int, workspace: Callable[[int], Span]) -> None:
    """Write dx, dweight and dbias."""
    dweight, dbias = addresses[7:]
    how = rows_choices(plan, call, has_clusters())
    dy, x, _, mask, weight, mean, rstd = arrays = _from_first(how, addresses[:7])
    buffer = workspace(how.workspace).address
    part = how.parts.get("fused")
    if part is not None:
        slabs = buffer + how.slabs
        fused_kernel(part.choice)(part.blocks, stream, *arrays, slabs, buffer, *part.numbers, int(dbias != 0))
        count = part.blocks // part.choice.cluster
        sums.add_slabs(part.choice.wide, slabs, dweight, dbias, count, plan.layout.size, stream)
        return
    means = buffer + how.table
    _take_sums(how, (dy, x, mask, weight, mean, rstd), buffer, stream)
    merge_groups(how.groups, how.wide, buffer, weight, means, stream)
    if how.weights is not None:
        merge_weights(how.weights, how.wide, buffer, dweight, dbias, stream)
    _emit(plan, how, arrays, means, buffer, dweight, dbias, stream)


def partial_sums(
    plan: Plan, call: Call, addresses: tuple[int, ...], stream: int, workspace: Callable[[int], Span]
) -> None:
    """Write sum(g) and sum(g * h) of every group."""
    dy, x, weight, mean, rstd, result = addresses
    how = rows_choices(plan, call, fused=False)
    dy, x, *_ = _from_first(how, (dy, x, 0, 0))
    table = workspace(how.workspace).address
    _take_sums(how, (dy, x, 0, weight, mean, rstd), table, stream)
    merge_groups(as_sums(how.groups), how.wide, table, weight, result, stream)


def partial_gradient(
    plan: Plan,
    call: Call,
    addresses: tuple[int, ...],
    weighted: bool,
    stream: int,
    workspace: Callable[[int], Span],
) -> None:
    """Write dx from the means of whole groups, and dweight and dbias if they have addresses.

    `weighted`: the means are those of dy and dy * h, and have yet to be multiplied by the groups' weights.
    """
    means, dweight, dbias = addresses[7:]
    how = rows_choices(plan, call, fused=False)
    dy, x, _, mask, weight, mean, rstd = arrays = _from_first(how, addresses[:7])
    buffer = workspace(how.workspace).address
    if weighted:
        given, means = means, buffer + how.table
        merge_groups(weighing(plan), how.wide, given, weight, means, stream)
    if how.weights is not None and dweight:
        _take_sums(how, (dy, x, mask, weight, mean, rstd), buffer, stream)
        merge_weights(how.weights, how.wide, buffer, dweight, dbias, stream)
    _emit(plan, how, arrays, means, buffer, dweight, dbias, stream)


def _from_first(how: BackwardPlan, arrays: Sequence[int]) -> tuple[int, ...]:
    """Return the addresses of (dy, x, dx, mask, ...) with those of first elements for spans' lowest addresses."""
    dy, x, dx, mask, *rest = arrays
    return dy + how.starts[1], x + how.starts[0], dx, mask + how.starts[2], *rest


def _take_sums(how: BackwardPlan, arrays: tuple[int, ...], table: int, stream: int) -> None:
    part = how.parts["sums"]
    sums_kernel(part.choice)(part.blocks, stream, *arrays, table, *part.numbers)


def _emit(
    plan: Plan,
    how: BackwardPlan,
    arrays: tuple[int, ...],
    means: int,
    buffer: int,
    dweight: int,
    dbias: int,
    stream: int,
) -> None:
    """Queue the writing of dx from the groups' means, and of the gradients of weights that lie along the rows."""
    part = how.parts.get("lanes")
    if part is None:
        part = how.parts["emit"]
        emit_kernel(part.choice)(part.blocks, stream, *arrays, means, *part.numbers)
        return
    slabs = buffer + how.slabs
    lanes_kernel(part.choice)(part.blocks, stream, *arrays, means, slabs, *part.numbers, int(dbias != 0))
    sums.add_slabs(how.wide, slabs, dweight, dbias, part.blocks // part.numbers[0], plan.layout.size, stream)


def merge_groups(part: Merge, wide: bool, table: int, weight: int, means: int, stream: int) -> None:
    """Queue the merge of sums into mean(g) and mean(g * h) of the groups."""
    kernel = sums.groups_kernel(part.team, part.block, wide, *part.options)
    kernel(part.blocks, stream, table, weight, means, *part.numbers)


def merge_weights(part: Merge, wide: bool, table: int, dweight: int, dbias: int, stream: int) -> None:
    """Queue the merge of sums into dweight and dbias."""
    kernel = sums.weights_kernel(part.team, part.block, wide)
    kernel(part.blocks, stream, table, dweight, dbias, *part.numbers)
