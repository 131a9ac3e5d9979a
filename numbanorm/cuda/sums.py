"""Sums of partial sums, in fixed order: what the backward kernels leave, merged for groups and for weights."""

from __future__ import annotations

from functools import cache

import numpy as np

from ..core.norms import L2, STD
from . import affine, memory
from . import lanes as ln
from .toolchain import Kernel, cuda, types
from .welford import add, free_count, team

BLOCK = 256


@cache
def groups_kernel(threads: int, block: int, wide: bool, weighted: bool, counted: bool, scale: str = STD) -> Kernel:
    """Return the kernel that writes mean(g) and mean(g * h) of every group, shape (2, groups), float64.

    A group's entries are ``(i1, i2)`` of `n1` times `n2`, at ``start + i1 * s1 + i2 * s2``; each is multiplied by the
    weight of its channel where the sums come without. Three planes: sums of g, of g * h, and counts, or, for the L2
    norm, of h * h.
    """
    lane = types.float64 if wide else types.float32
    weight_of = affine.gatherer("element", lane, 1, 1, "flat")
    read_number, write_number, fold = memory.read_number, memory.write_number, ln.fold(1)
    merged, inverse = team(types.float64, threads, add), ln.inverse
    scalar, of_norm, free = np.float64 if wide else np.float32, scale == L2, free_count(lane)
    step, teams = np.int64(threads), np.int64(block // threads)
    ints = np.int64

    def group_sums(
        table, weight, sums, groups, K1, S0, S1, n1, n2, s1, s2, plane, base, w1, w2, inner, size, count
    ):  # fmt: skip
        number = ints(cuda.threadIdx.x)
        group = ints(cuda.blockIdx.x) * teams + number // step
        there = group < groups
        group = min(group, groups - 1)
        k0 = group // K1
        k1 = group - k0 * K1
        start = k0 * S0 + k1 * S1
        a = b = n = none = 0.0
        i = number % step
        while i < n1 * n2:
            i1 = i // n2
            i2 = i - i1 * n2
            at = start + i1 * s1 + i2 * s2
            w = 1.0
            if weighted:
                flat = k1 * base + i1 * w1 + i2 * w2
                w = np.float64(fold(weight_of(weight, flat, ints(0), ints(1), ints(1), ints(1), ints(0), inner, size)))
            a += w * read_number(table, at)
            b += w * read_number(table, plane + at)
            if counted or of_norm:
                n += read_number(table, 2 * plane + at)
            i += step
        a, b, n, none = merged(a, b, n, none)
        if of_norm:
            n = np.float64(free(scalar(n)))
        elif not counted:
            n = np.float64(count)
        # Where nothing counts, as in inference, the statistics do not depend on x.
        share = inverse(n) if n > 0.0 else 0.0
        if number % step == 0 and there:
            write_number(sums, group, a * share)
            write_number(sums, groups + group, b * share)

    return Kernel(group_sums, (threads, block, wide, weighted, counted, scale), block)


@cache
def weights_kernel(threads: int, block: int, wide: bool) -> Kernel:
    """Return the kernel that writes dweight and dbias from the sums of dy * h and dy.

    A weight's entries are ``(i0, i1, i2)`` of `n0` times `n1` times `n2`, at ``weight * S + i0 * s0 + i1 * s1 + i2``.
    """
    name = "float64" if wide else "float32"
    lane = types.float64 if wide else types.float32
    store = memory.storer(name, lane, 1, 1, "flat")
    read_number, tile = memory.read_number, ln.tile(1)
    merged = team(types.float64, threads, add)
    scalar = np.float64 if wide else np.float32
    step, teams = np.int64(threads), np.int64(block // threads)
    ints = np.int64

    def weight_sums(table, dweight, dbias, size, S, n0, n1, n2, s0, s1, plane):
        number = ints(cuda.threadIdx.x)
        weight = ints(cuda.blockIdx.x) * teams + number // step
        there = weight < size
        weight = min(weight, size - 1)
        a = b = none = 0.0
        i = number % step
        while i < n0 * n1 * n2:
            i0 = i // (n1 * n2)
            i1 = i // n2 - i0 * n1
            at = weight * S + i0 * s0 + i1 * s1 + i % n2
            a += read_number(table, at)
            b += read_number(table, plane + at)
            i += step
        a, b, none, none = merged(a, b, none, none)
        if number % step == 0 and there:
            store(dweight, weight, ints(1), weight + 1, ints(1), ints(0), tile(scalar(b)))
            if dbias != 0:
                store(dbias, weight, ints(1), weight + 1, ints(1), ints(0), tile(scalar(a)))

    return Kernel(weight_sums, (threads, block, wide), block)


@cache
def slabs_kernel(wide: bool) -> Kernel:
    """Return the kernel that adds the slabs' dweight and dbias, shape (slabs, 2, size) in lanes, in float64."""
    name = "float64" if wide else "float32"
    lane = types.float64 if wide else types.float32
    load = memory.loader(name, lane, 1, 1, "flat")
    store = memory.storer(name, lane, 1, 1, "flat")
    fold, tile = ln.fold(1), ln.tile(1)
    scalar = np.float64 if wide else np.float32
    ints = np.int64
    slots = BLOCK
    across = np.int64(32)
    below = BLOCK // 32

    def slab_sums(slabs, dweight, dbias, count, size):
        shared = cuda.shared.array(slots, types.float64)
        number = ints(cuda.threadIdx.x)
        tiles = (size + across - 1) // across
        unit = ints(cuda.blockIdx.x)
        which = unit // tiles
        i = (unit - which * tiles) * across + number % across
        s = 0.0
        slab = number // across
        while slab < count:
            at = (slab * 2 + which) * size + i
            s += np.float64(fold(load(slabs, at, ints(1), at + (1 if i < size else 0), ints(1), ints(0))))
            slab += below
        shared[number] = s
        cuda.syncthreads()
        if number < across and i < size:
            s = 0.0
            for row in range(below):
                s += shared[row * across + number]
            target = dweight if which == 0 else dbias
            store(target, i, ints(1), size, ints(1), ints(0), tile(scalar(s)))

    return Kernel(slab_sums, (wide,), BLOCK)


def add_slabs(wide: bool, slabs: int, dweight: int, dbias: int, count: int, size: int, stream: int) -> None:
    """Queue the sum of slabs."""
    slabs_kernel(wide)((2 if dbias else 1) * -(-size // 32), stream, slabs, dweight, dbias, count, size)
