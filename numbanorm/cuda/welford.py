"""Moments of what threads hold in registers, and their merges across lanes, warps and blocks.

A thread's tile is swept twice where it lies, in registers: for its mean, then around it. So no shift is ever poor, and
the triple (count, mean, M2) of a tile is as exact as float32 gives; it merges by Chan's formula [1]_, with the mean in
two numbers, ``hi + lo``: at mean 1e6 one float32 would be off by 0.03. Everything is written for lanes and for scalars:
the rows kernel keeps one triple a thread (`width` 1), the columns kernel one a lane.

Squares that overflow or underflow leave an M2 outside `SAFE`; the group is then taken again, times a power of two.

References
----------
.. [1] T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
   Variances", 1979.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from ..core.norms import L2
from . import lanes as ln
from . import memory
from .toolchain import cuda, device, types

SAFE = {types.float32: (1e-30, 1e37), types.float64: (1e-250, 1e250)}
"""Bounds between which M2 is trusted, by lane type: beyond, squares may have underflowed or overflowed."""

SMALL = {types.float32: 1e-6, types.float64: 1e-100}
"""Where the mean is larger than this, an M2 below `SAFE` is 0: one unit in the last place has a larger square."""

GAIN = {types.float32: 2.0**100, types.float64: 2.0**500}
"""What values are multiplied by, or divided by, before a second look: 1e-45 to 1e-15, 1e38 to 1e8."""

FREE = {types.float32: 1 - 1e-5, types.float64: 1 - 2e-6}
"""What the square of a group's norm times its rstd is above where it is 1, however it rounds, by lane type."""

WARP = 32
ALL = 0xFFFFFFFF


class Moments(NamedTuple):
    """Device functions on (count, hi, lo, M2)."""

    of_tile: object
    merge: object


@cache
def moments(lane, width, centred):
    """Return the functions for tiles of `lane` numbers, with one triple for lanes that lie `width` apart."""
    fold, count, first = ln.fold(width), ln.count(width, lane), ln.first(width)
    pick, choose, inverse = ln.pick, ln.choose, ln.inverse
    scalar = np.float32 if lane == types.float32 else np.float64

    @device
    def merge(n_a, hi_a, lo_a, m2_a, n_b, hi_b, lo_b, m2_b):
        n = n_a + n_b
        if not centred:
            return n, hi_a, lo_a, m2_a + m2_b
        share = n_b * inverse(pick(n > scalar(0), n, n + scalar(1)))
        delta = (hi_b - hi_a) + (lo_b - lo_a)
        step = delta * share
        hi = hi_a + step
        back = hi - hi_a
        lo = lo_a + ((hi_a - (hi - back)) + (step - back))  # what the sum has rounded away
        m2 = m2_a + m2_b + delta * step * n_a
        # Where one side is empty the other stands as it is: a mean that is Inf times a count of 0 would be NaN.
        none_a, none_b = n_a < scalar(0.5), n_b < scalar(0.5)
        hi = pick(none_b, hi_a, pick(none_a, hi_b, hi))
        lo = pick(none_b, lo_a, pick(none_a, lo_b, lo))
        m2 = pick(none_b, m2_a, pick(none_a, m2_b, m2))
        return n, hi, lo, m2

    @cache
    def of_tile(tile_width):
        tile = ln.tile(tile_width)

        @device
        def tile_moments(values, chosen):
            n = count(chosen)
            if not centred:
                squares = fold(choose(chosen, values * values))
                return n, n - n, n - n, squares
            share = inverse(pick(n > scalar(0), n, n + scalar(1)))
            # Around the first element, sums are exactly 0 where all elements are equal.
            pivot = first(chosen, values)
            hi = pivot + fold(choose(chosen, values - tile(pivot))) * share
            d = choose(chosen, values - tile(hi))
            s = fold(d)
            lo = s * share
            m2 = fold(d * d) - s * lo
            return n, hi, lo, pick(m2 < scalar(0), n - n, m2)

        return tile_moments

    return Moments(of_tile, merge)


@cache
def team(lane, threads, merge):
    """Return the function that merges what the threads of a team hold, four numbers each; all get the result.

    A team is a part of a warp, or a whole block of several warps; `merge` takes two sets of numbers, in order. Merges
    are by halves, whatever runs beside.
    """
    pick = ln.pick
    inside = min(threads, WARP)
    warps = threads // WARP if threads > WARP else 1
    over = 1 << (warps - 1).bit_length()
    slots = 4 * WARP
    steps_inside = inside.bit_length() - 1
    steps_over = over.bit_length() - 1
    zero = np.float32(0) if lane == types.float32 else np.float64(0)

    @device
    def within(a, b, c, d, steps, base):
        for i in range(steps):
            bit = 1 << i
            a2 = cuda.shfl_xor_sync(ALL, a, bit)
            b2 = cuda.shfl_xor_sync(ALL, b, bit)
            c2 = cuda.shfl_xor_sync(ALL, c, bit)
            d2 = cuda.shfl_xor_sync(ALL, d, bit)
            a, b, c, d = merge(a, b, c, d, a2, b2, c2, d2)
        # The merge is not symmetric to the last bit: all take the first thread's.
        a = cuda.shfl_sync(ALL, a, base)
        b = cuda.shfl_sync(ALL, b, base)
        c = cuda.shfl_sync(ALL, c, base)
        d = cuda.shfl_sync(ALL, d, base)
        return a, b, c, d

    @device
    def merged(a, b, c, d):
        number = cuda.threadIdx.x % WARP
        if threads > 1:
            a, b, c, d = within(a, b, c, d, steps_inside, number // inside * inside)
        if threads > WARP:
            shared = cuda.shared.array(slots, lane)
            warp = cuda.threadIdx.x // WARP
            cuda.syncthreads()  # the last merge has been read
            if number == 0:
                shared[warp] = a
                shared[WARP + warp] = b
                shared[2 * WARP + warp] = c
                shared[3 * WARP + warp] = d
            cuda.syncthreads()
            at = number if number < warps else 0
            there = number < warps
            a = pick(there, shared[at], zero)
            b = pick(there, shared[WARP + at], zero)
            c = pick(there, shared[2 * WARP + at], zero)
            d = pick(there, shared[3 * WARP + at], zero)
            a, b, c, d = within(a, b, c, d, steps_over, 0)
        return a, b, c, d

    return merged


@cache
def team_sum(lane, threads):
    """Return the function that adds a number of every thread of a team, 1, 2, 4, ... of them; all get the same bits.

    Sums are by halves, and ``a + b`` is ``b + a``. A block that calls it twice needs a barrier in between, as that of
    another function of this kind.
    """
    inside, warps = min(threads, WARP), max(threads // WARP, 1)
    steps_inside, steps_over = inside.bit_length() - 1, warps.bit_length() - 1

    @device
    def summed(a):
        for i in range(steps_inside):
            a = a + cuda.shfl_xor_sync(ALL, a, 1 << i)
        if threads > WARP:
            shared = cuda.shared.array(warps, lane)
            number = cuda.threadIdx.x % WARP
            if number == 0:
                shared[cuda.threadIdx.x // WARP] = a
            cuda.syncthreads()
            a = shared[number % warps]
            for i in range(steps_over):
                a = a + cuda.shfl_xor_sync(ALL, a, 1 << i)
        return a

    return summed


@cache
def team_pair(lane, threads, join):
    """Return the function that joins two numbers of every thread of a team, as `team_sum` does; `join` commutes."""
    inside, warps = min(threads, WARP), max(threads // WARP, 1)
    steps_inside, steps_over = inside.bit_length() - 1, warps.bit_length() - 1
    slots = 2 * warps

    @device
    def joined(a, b):
        for i in range(steps_inside):
            a, b = join(a, b, cuda.shfl_xor_sync(ALL, a, 1 << i), cuda.shfl_xor_sync(ALL, b, 1 << i))
        if threads > WARP:
            shared = cuda.shared.array(slots, lane)
            number, warp = cuda.threadIdx.x % WARP, cuda.threadIdx.x // WARP
            if number == 0:
                shared[warp] = a
                shared[warps + warp] = b
            cuda.syncthreads()
            a, b = shared[number % warps], shared[warps + number % warps]
            for i in range(steps_over):
                a, b = join(a, b, cuda.shfl_xor_sync(ALL, a, 1 << i), cuda.shfl_xor_sync(ALL, b, 1 << i))
        return a, b

    return joined


@device
def add_two(a, b, a2, b2):
    """Add two numbers each."""
    return a + a2, b + b2


@cache
def largest():
    """Return the function that adds the first numbers and takes the larger of the second."""
    pick = ln.pick

    @device
    def join(a, b, a2, b2):
        return a + a2, pick(b2 > b, b2, b)

    return join


@cache
def around_mean(lane, width, threads, centred, masked, whole):
    """Return the function that takes a group, a tile a thread, around its mean.

    The sum around a pivot, an element of the group, gives a mean that is off by a few units in the last place of the
    pivot's distance from it. What it is off by is the mean around it, which is exact, as is M2. This takes a third of
    the instructions that merging the triples of all threads takes, which in half precision took longer than memory.

    ``around(values, chosen, n, pivot)`` returns the count, the mean as ``hi + lo``, M2, and the values less `hi`; `n`
    and `pivot` are those of the group where there is no mask.
    """
    scalar = np.float32 if lane == types.float32 else np.float64
    fold, count, tile, first = ln.fold(1), ln.count(1, lane), ln.tile(width), ln.first(1)
    pick, choose, inverse = ln.pick, ln.choose, ln.inverse
    summed, both_summed = team_sum(lane, threads), team_pair(lane, threads, add_two)
    count_and_pivot = team_pair(lane, threads, largest())
    zero, one, least = scalar(0), scalar(1), scalar(-np.inf)
    cut = masked or not whole

    @device
    def around(values, chosen, n, pivot):
        if masked:
            n = count(chosen)
            n, pivot = count_and_pivot(n, pick(n > zero, first(chosen, values), least))
            pivot = pick(n > zero, pivot, zero)
        if not centred:
            return n, zero, zero, summed(fold(values * values)), values
        share = inverse(pick(n > zero, n, one))
        rest = values - tile(pivot)
        if cut:
            rest = choose(chosen, rest)
        hi = pivot + summed(fold(rest)) * share
        rest = values - tile(hi)
        counted = rest
        if cut:
            counted = choose(chosen, rest)
        s, squares = both_summed(fold(counted), fold(counted * counted))
        lo = s * share
        m2 = squares - s * lo
        return n, hi, lo, pick(m2 < zero, zero, m2), rest

    return around


@device
def add(a, b, c, d, a2, b2, c2, d2):
    """Merge four sums."""
    return a + a2, b + b2, c + c2, d + d2


@cache
def trust(lane):
    """Return the function that tells whether a team's (hi, M2) can be trusted."""
    scalar = np.float32 if lane == types.float32 else np.float64
    least, most, small = scalar(SAFE[lane][0]), scalar(SAFE[lane][1]), scalar(SMALL[lane])

    @device
    def trusted(hi, m2):
        return m2 < most and (m2 > least or abs(hi) > small)

    return trusted


@cache
def gain_of(lane):
    """Return the function that chooses the gain of a second look; NaN takes the one for large values."""
    scalar = np.float32 if lane == types.float32 else np.float64
    up, down, one = scalar(GAIN[lane]), scalar(1 / GAIN[lane]), scalar(1)

    @device
    def gain(m2):
        return up if m2 < one else down

    return gain


@cache
def gain_for_rstd(lane):
    """Return the function that chooses the gain under which a given rstd applies without overflow."""
    scalar = np.float32 if lane == types.float32 else np.float64
    large, small = GAIN[lane] ** 0.75, GAIN[lane] ** -0.75
    up, down, one = scalar(GAIN[lane]), scalar(1 / GAIN[lane]), scalar(1)

    @device
    def gain(rstd):
        return up if rstd > large else (down if rstd < small else one)

    return gain


@cache
def inverse_gain(lane):
    """Return the function that gives 1/gain, float64."""
    up, down = GAIN[lane], 1 / GAIN[lane]

    @device
    def inverse(gain):
        return np.float64(1.0) if gain == 1.0 else (np.float64(down) if gain > 1.0 else np.float64(up))

    return inverse


@cache
def rstd_function(scale):
    """Return the function that gives rstd, float64, as `NormRecord.rstd` does; an empty group has variance 0."""
    inverse, inverse_root = ln.inverse, ln.inverse_root
    of_norm = scale == L2

    @device
    def rstd(count, m2, eps):
        if of_norm:
            most, factor = inverse(eps), inverse_root(m2)
            return most if factor > most else factor
        variance = m2 * inverse(count) if count > 0.0 else 0.0
        return inverse_root(variance + eps)

    return rstd


@cache
def free_count(lane):
    """Return the function that makes the count of a group of L2 norm from its sum of h * h, for the backward formulas.

    It is 1, or 0 where `eps` was larger than the group's norm, so that rstd does not depend on x; NaN gives 1.
    """
    scalar = np.float32 if lane == types.float32 else np.float64
    least, zero, one = scalar(FREE[lane]), scalar(0), scalar(1)

    @device
    def count(squares):
        return zero if squares < least else one

    return count


@cache
def table_moments(threads):
    """Return the function that merges a group's partial moments, `entries` of them, with a team of threads.

    Entry ``i`` lies at ``start + i // across * stride + i % across``, its three numbers `plane` apart.
    """
    merge = moments(types.float64, 1, True).merge
    merged = team(types.float64, threads, merge)
    read_number = memory.read_number

    @device
    def from_table(table, start, entries, across, stride, plane, thread):
        n = hi = lo = m2 = 0.0
        for i in range(thread, entries, threads):
            at = start + i // across * stride + i % across
            count = read_number(table, at)
            mean = read_number(table, plane + at)
            n, hi, lo, m2 = merge(n, hi, lo, m2, count, mean, 0.0, read_number(table, 2 * plane + at))
        n, hi, lo, m2 = merged(n, hi, lo, m2)
        return n, hi + lo, m2

    return from_table
