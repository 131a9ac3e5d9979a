"""Backward of rows that registers hold, all in one read; the formulas are those of `rows_backward`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ..core.norms import L2
from . import affine, memory
from . import lanes as ln
from .cluster import show_to_cluster, wait_for_cluster
from .launch import item_size
from .launch_backward import Backward
from .toolchain import Kernel, cuda, device, types
from .welford import WARP, add, add_two, free_count, gain_for_rstd, inverse_gain, team, team_pair, team_sum


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
    weights = affine.gatherer("along", *geometry)
    statistics, standard = statistics_of(c), standard_of(c)
    count_team, add_team = team_sum(lane, c.team), team_pair(lane, c.team, add_two)
    fold, count_of, choose, tile = ln.fold(1), ln.count(1, lane), ln.choose, ln.tile(width)
    inverse = ln.inverse
    weighted, centred, fixed, masked = c.weight, c.centred, c.fixed, c.mask != "all"
    of_norm, free, add_four = c.scale == L2, free_count(lane), team(lane, c.team, add)
    block_wide, vector = c.team > WARP, c.vector
    ahead = c.block < 512  # whose threads have no registers left for that
    clustered, cluster = c.cluster > 1, np.int64(c.cluster)
    add_cluster = team_pair(types.float64, c.cluster, add_two)
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
                if of_norm:
                    a, b, n, _ = add_four(fold(d), fold(d * h), fold(h * h), zero)
                else:
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
                    if masked or of_norm:
                        n_all, b_all = add_cluster(read_number(exchange, at + 2), 0.0)
                        n = scalar(n_all)
                if of_norm:
                    n = free(n)
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
