"""Backward of the rows kernel.

With ``g = dy * weight`` and ``h = (x - mean) * rstd``, over the `n` elements that count in a group [1]_::

    dx = rstd * (g - counts * (sum(g) + h * sum(g * h)) / n)
    dweight = sum(dy * h)        dbias = sum(dy)

Where weights lie along the rows and registers hold them (LayerNorm, RMSNorm), all is done in one read: a team of
threads, or a cluster of blocks, takes some rows, one after the other, and keeps its dweight and dbias in registers. The
next row is read ahead. Elsewhere sums come first,
then dx; weights that lie along rows too wide to hold get their gradients from the threads that write dx, the others
from the same sums.

References
----------
.. [1] S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
   Shift", 2015, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from ..core.plan import Plan
from . import lanes as ln
from . import memory, sums
from .launch import Call, item_size
from .launch_backward import Backward, Merge
from .launch_backward import rows_backward as rows_choices
from .memory import Span
from .toolchain import Kernel, cuda, device, has_clusters, types
from .welford import WARP, add, add_two, gain_for_rstd, inverse_gain, team, team_pair, team_sum


@cache
def statistics_of(c: Backward) -> Any:
    """Return the function that reads what `standard_of` takes of a group's statistics."""
    scalar = np.float64 if c.wide else np.float32
    lane = types.float64 if c.wide else types.float32
    gain_to_apply, inverse_of = gain_for_rstd(lane), inverse_gain(lane)
    read_number = memory.read_number
    centred = c.centred

    @device
    def read(mean, rstd, group):
        r = read_number(rstd, group)
        gain = gain_to_apply(r)
        m = 0.0
        if centred:
            m = read_number(mean, group) * np.float64(gain)
        hi, scale = scalar(m), scalar(r * inverse_of(gain))
        return gain, hi, scale, scalar(m - np.float64(hi)) * scale

    return read


@cache
def standard_of(c: Backward) -> Any:
    """Return the function of a tile that gives ``h = (x * gain - hi) * scale - back``: two instructions an element."""
    centred = c.centred

    @device
    def standard(values, gain, hi, scale, back):
        if not centred:
            return values * gain * scale
        return (values * gain - hi) * scale - back

    return standard


@cache
def fused_kernel(c: Backward) -> Kernel:
    """Return the kernel that writes dx and, slab by slab, dweight and dbias, of rows that registers hold."""
    lane = types.float64 if c.wide else types.float32
    name = "float64" if c.wide else "float32"
    scalar = np.float64 if c.wide else np.float32
    geometry = (lane, c.vector, c.loads, c.rule)
    width = c.vector * c.loads
    read_dy, read_x = memory.raw_loader(c.result, *geometry), memory.raw_loader(c.source, *geometry)
    unpack_dy = memory.unpacker(c.result, lane, c.vector, c.loads)
    unpack_x = memory.unpacker(c.source, lane, c.vector, c.loads)
    store_dx = memory.storer(c.result, *geometry)
    load_slab, store_slab = memory.loader(name, *geometry), memory.storer(name, *geometry)
    chosen_of = memory.chooser(c.mask, c.vector, c.loads, c.rule)
    weights = memory.gatherer("along", *geometry)
    statistics, standard = statistics_of(c), standard_of(c)
    count_team, add_team = team_sum(lane, c.team), team_pair(lane, c.team, add_two)
    fold, count_of, choose, tile = ln.fold(1), ln.count(1, lane), ln.choose, ln.tile(width)
    inverse = ln.inverse
    weighted, centred, fixed, masked = c.weight, c.centred, c.fixed, c.mask != "all"
    block_wide, vector = c.team > WARP, c.vector
    ahead = c.block < 512  # whose threads have no registers left for that
    clustered, cluster = c.cluster > 1, np.int64(c.cluster)
    add_cluster = team_pair(types.float64, c.cluster, add_two)
    show_to_cluster, wait_for_cluster = memory.show_to_cluster, memory.wait_for_cluster
    read_number, write_number = memory.read_number, memory.write_number
    step, teams = np.int64(c.team), c.block // c.team
    source_size, result_size, lane_size = item_size(c.source), item_size(c.result), item_size(name)
    zero, one = scalar(0), scalar(1)
    ints = np.int64

    def rows_backward(
        dy, x, dx, mask, weight, mean, rstd, slabs, exchange,
        rows, slab_rows, pieces, part_pieces, size, dy_K0, x_K0, mask_K0, biased,
    ):  # fmt: skip
        thread = ints(cuda.threadIdx.x) % step
        number = ints(cuda.threadIdx.x) // step
        slab = ints(cuda.blockIdx.x) // cluster
        part = ints(cuda.blockIdx.x) % cluster
        start = part * part_pieces + thread
        stop = min((part + 1) * part_pieces, pieces)
        place = start, step, stop, ints(1), ints(0)
        dweight = dbias = tile(zero)
        first = (slab * teams + number) * slab_rows
        end = min(first + slab_rows, rows)
        if ahead:
            row = min(first, rows - 1)
            here = start, step, stop if first < end else ints(0), ints(1), ints(0)
            next_dy = read_dy(dy + row * dy_K0 * result_size, *here)
            next_x = read_x(x + row * x_K0 * source_size, *here)
        for i in range(slab_rows):
            row = min(first + i, rows - 1)
            limit = stop if first + i < end else ints(0)
            here = start, step, limit, ints(1), ints(0)
            if ahead:
                raw_dy, raw_x = next_dy, next_x
                # The next row is under way while the threads add up this one.
                later = min(first + i + 1, rows - 1)
                there = start, step, stop if first + i + 1 < end else ints(0), ints(1), ints(0)
                next_dy = read_dy(dy + later * dy_K0 * result_size, *there)
                next_x = read_x(x + later * x_K0 * source_size, *there)
            else:
                raw_dy = read_dy(dy + row * dy_K0 * result_size, *here)
                raw_x = read_x(x + row * x_K0 * source_size, *here)
            gain, hi, scale, back = statistics(mean, rstd, row)
            d = unpack_dy(raw_dy)
            h = standard(unpack_x(raw_x), gain, hi, scale, back)
            # Beyond the row dy is 0, and so is all that it is a factor of.
            dweight = dweight + d * h
            dbias = dbias + d
            if weighted:
                d = d * weights(weight, ints(0), *here, ints(1), size)
            if not fixed:
                n = scalar(pieces * vector)
                if masked:
                    chosen = chosen_of(mask + row * mask_K0, *here)
                    n = count_team(count_of(chosen))
                if block_wide:
                    cuda.syncthreads()  # the last sums have been read
                a, b = add_team(fold(d), fold(d * h))
                if clustered:  # pragma: no cover (the simulator has no clusters)
                    # By turns in two places: when a block writes to the first again, all have read it.
                    at = (2 * slab + i % 2) * cluster
                    if thread == 0:
                        write_number(exchange, 3 * (at + part), np.float64(a))
                        write_number(exchange, 3 * (at + part) + 1, np.float64(b))
                        write_number(exchange, 3 * (at + part) + 2, np.float64(n))
                        show_to_cluster()
                    wait_for_cluster()
                    at = 3 * (at + thread % cluster)
                    a_all, b_all = add_cluster(read_number(exchange, at), read_number(exchange, at + 1))
                    a, b = scalar(a_all), scalar(b_all)
                    if masked:
                        n_all, b_all = add_cluster(read_number(exchange, at + 2), 0.0)
                        n = scalar(n_all)
                share = zero
                if n > zero:
                    share = inverse(n)
                shift = h * (b * share)
                if centred:
                    shift = shift + tile(a * share)
                if masked:
                    shift = choose(chosen, shift)
                d = d - shift
            d = d * scale
            if gain != one:
                d = d * gain
            store_dx(dx + row * size * result_size, *here, d)
        own = slabs + slab * 2 * size * lane_size
        for turn in range(teams):
            if number == turn:
                if turn > 0:
                    dweight = dweight + load_slab(own, *place)
                    dbias = dbias + load_slab(own + size * lane_size, *place)
                store_slab(own, *place, dweight)
                if biased != 0:
                    store_slab(own + size * lane_size, *place, dbias)
            cuda.syncthreads()

    return Kernel(rows_backward, (c,), c.block, cluster=c.cluster)


@cache
def sums_kernel(c: Backward) -> Kernel:
    """Return the kernel that writes sum(g), sum(g * h) and the count of every chunk of every segment, float64.

    A segment is what of a group has one weight: its sums come without that weight. Where weights lie along the rows,
    or there are none, it is the group, and its sums come with them.
    """
    lane = types.float64 if c.wide else types.float32
    scalar = np.float64 if c.wide else np.float32
    geometry = (lane, c.vector, c.loads, c.rule)
    load_dy, load_x = memory.loader(c.result, *geometry), memory.loader(c.source, *geometry)
    chosen_of = memory.chooser(c.mask, c.vector, c.loads, c.rule)
    weights = memory.gatherer(c.weights or "along", *geometry)
    write_number = memory.write_number
    statistics, standard = statistics_of(c), standard_of(c)
    merged = team(lane, c.team, add)
    fold, count_of = ln.fold(1), ln.count(1, lane)
    weighted, along = c.weights != "", c.weights == "along"
    step, teams = np.int64(c.team), np.int64(c.block // c.team)
    whole_tile = np.int64(c.team * c.loads)
    source_size, result_size = item_size(c.source), item_size(c.result)
    masked, counted = c.mask == "elements", c.mask != "all"
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
            if counted:
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
    weights = memory.gatherer(c.weights or "along", *geometry)
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
    weights = memory.gatherer("along", *geometry)
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
    dy, x, dx, mask, weight, mean, rstd, dweight, dbias = addresses
    how = rows_choices(plan, call, has_clusters())
    x, dy, mask = x + how.starts[0], dy + how.starts[1], mask + how.starts[2]
    buffer = workspace(how.workspace).address
    size = plan.layout.size
    biased = int(dbias != 0)
    part = how.parts.get("fused")
    if part is not None:
        slabs = buffer + how.slabs
        fused_kernel(part.choice)(
            part.blocks, stream, dy, x, dx, mask, weight, mean, rstd, slabs, buffer, *part.numbers, biased
        )
        sums.add_slabs(part.choice.wide, slabs, dweight, dbias, part.blocks // part.choice.cluster, size, stream)
        return
    part = how.parts["sums"]
    wide = part.choice.wide
    means = buffer + how.table
    sums_kernel(part.choice)(part.blocks, stream, dy, x, mask, weight, mean, rstd, buffer, *part.numbers)
    merge_groups(how.groups, wide, buffer, weight, means, stream)
    part = how.parts.get("lanes")
    if part is not None:
        slabs = buffer + how.slabs
        lanes_kernel(part.choice)(
            part.blocks, stream, dy, x, dx, mask, weight, mean, rstd, means, slabs, *part.numbers, biased
        )
        sums.add_slabs(wide, slabs, dweight, dbias, part.blocks // part.numbers[0], size, stream)
        return
    merge_weights(how.weights, wide, buffer, dweight, dbias, stream)
    part = how.parts["emit"]
    emit_kernel(part.choice)(part.blocks, stream, dy, x, dx, mask, weight, mean, rstd, means, *part.numbers)


def merge_groups(part: Merge, wide: bool, table: int, weight: int, means: int, stream: int) -> None:
    """Queue the merge of sums into mean(g) and mean(g * h) of the groups."""
    kernel = sums.groups_kernel(part.team, part.block, wide, *part.options)
    kernel(part.blocks, stream, table, weight, means, *part.numbers)


def merge_weights(part: Merge, wide: bool, table: int, dweight: int, dbias: int, stream: int) -> None:
    """Queue the merge of sums into dweight and dbias."""
    kernel = sums.weights_kernel(part.team, part.block, wide)
    kernel(part.blocks, stream, table, dweight, dbias, *part.numbers)
