"""Running statistics: they are moved, and turned into statistics to normalize with, where they lie."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from ..core.plan import COUNT, M2, MEAN, RSTD
from .arrays import DeviceArray
from .lanes import fold, tile
from .memory import Span, loader, read_number, storer, write_number
from .toolchain import Kernel, cuda, types

THREADS = 64
"""Threads that average one channel over the samples: two loads in flight for each of up to 128 samples."""


def as_statistics(mean: DeviceArray, var: DeviceArray, stats: Span, eps: float, stream: int) -> None:
    """Queue the writing of running statistics as those to normalize with: the rows MEAN and RSTD."""
    channels = mean.shape[0]
    steps = [array.spec.strides[0] // array.spec.dtype.itemsize for array in (mean, var)]
    if channels:
        kernel = _as_statistics(mean.spec.name, var.spec.name)
        kernel(-(-channels // THREADS), stream, mean.address, var.address, stats.address, channels, *steps, float(eps))


def update(
    mean: DeviceArray,
    var: DeviceArray,
    stats: Span,
    samples: tuple[int, int],
    step: int,
    momentum: float | None,
    counter: int,
    counts: bool,
    stream: int,
) -> None:
    """Queue the move of running statistics towards the batch's, averaged over the samples that count.

    Parameters
    ----------
    mean, var : DeviceArray, shape (C,)
        Any float dtypes, any strides.
    stats : Span
        All four rows.
    samples : tuple of int
        Samples with statistics of their own, and the groups from one to the next.
    step : int
        Groups from one channel to the next.
    momentum : float or None
        Share of this batch; None for ``1/(batches + 1)`` with the batches of `counter`.
    counter : int
        Address of the number of batches so far, as a float64; 0 if there is none.
    counts : bool
        Whether to count this batch there too, which `momentum` None does not go with.
    stream : int
        Handle.
    """
    channels = mean.shape[0]
    steps = [array.spec.strides[0] // array.spec.dtype.itemsize for array in (mean, var)]
    if channels:
        counts = counts and counter > 0 and momentum is not None
        kernel = _update(mean.spec.name, var.spec.name, momentum is None, counts)
        share = 0.0 if momentum is None else float(momentum)
        addresses = (mean.address, var.address, stats.address, counter)
        kernel(channels, stream, *addresses, stats.size // 4, *samples, step, *steps, share)


def count_batch(counter: int, stats: Span, stream: int) -> None:
    """Queue the counting of a batch, by one where any of its elements counted."""
    _count_batch()(1, stream, counter, stats.address, stats.size // 4)


@cache
def _as_statistics(mean_name: str, var_name: str) -> Kernel:
    load_mean, load_var = (loader(name, types.float64, 1, 1, "flat") for name in (mean_name, var_name))
    scalar = fold(1)
    ints = np.int64

    def given_statistics(mean, var, stats, channels, mean_step, var_step, eps):
        c = ints(cuda.blockIdx.x) * THREADS + ints(cuda.threadIdx.x)
        if c < channels:
            at = c * mean_step
            write_number(stats, MEAN * channels + c, scalar(load_mean(mean, at, ints(1), at + 1, ints(1), ints(1))))
            at = c * var_step
            variance = scalar(load_var(var, at, ints(1), at + 1, ints(1), ints(1)))
            rstd = math.inf if variance + eps == 0.0 else math.nan
            if variance + eps > 0.0:
                rstd = 1.0 / math.sqrt(variance + eps)
            write_number(stats, RSTD * channels + c, rstd)

    return Kernel(given_statistics, (mean_name, var_name), THREADS)


def _storing(name: str) -> Any:
    """Return what stores a number of this dtype, and the type of number that it stores."""
    if name == "float64":
        return storer(name, types.float64, 1, 1, "flat"), np.float64
    return storer(name, types.float32, 1, 1, "flat"), np.float32


@cache
def _update(mean_name: str, var_name: str, cumulative: bool, counts: bool) -> Kernel:
    load_mean, load_var = (loader(name, types.float64, 1, 1, "flat") for name in (mean_name, var_name))
    (store_mean, lane_of_mean), (store_var, lane_of_var) = (_storing(name) for name in (mean_name, var_name))
    scalar, as_lane = fold(1), tile(1)
    ints = np.int64

    def update_running(mean, var, stats, counter, groups, samples, sample_step, step, mean_step, var_step, momentum):
        sums = cuda.shared.array((3, THREADS), types.float64)
        thread = ints(cuda.threadIdx.x)
        channel = ints(cuda.blockIdx.x)
        seen = total = squares = 0.0
        for n in range(thread, samples, THREADS):
            group = channel * step + n * sample_step
            count = read_number(stats, COUNT * groups + group)
            if count > 0.0:
                seen += 1.0
                total += read_number(stats, MEAN * groups + group)
                squares += read_number(stats, M2 * groups + group) / max(count - 1.0, 1.0)
        sums[0, thread] = seen
        sums[1, thread] = total
        sums[2, thread] = squares
        half = THREADS // 2
        while half > 0:
            cuda.syncthreads()
            if thread < half:
                for row in range(3):
                    sums[row, thread] += sums[row, thread + half]
            half //= 2
        if counts and channel == 0 and thread == 0:
            write_number(counter, ints(0), read_number(counter, ints(0)) + 1.0)
        if thread == 0 and sums[0, 0] > 0.0:
            share = momentum
            if cumulative:
                share = 1.0 / (read_number(counter, ints(0)) + 1.0)
            at = channel * mean_step
            old = scalar(load_mean(mean, at, ints(1), at + 1, ints(1), ints(1)))
            new = (1.0 - share) * old + share * (sums[1, 0] / sums[0, 0])
            store_mean(mean, at, ints(1), at + 1, ints(1), ints(1), as_lane(lane_of_mean(new)))
            at = channel * var_step
            old = scalar(load_var(var, at, ints(1), at + 1, ints(1), ints(1)))
            new = (1.0 - share) * old + share * (sums[2, 0] / sums[0, 0])
            store_var(var, at, ints(1), at + 1, ints(1), ints(1), as_lane(lane_of_var(new)))

    return Kernel(update_running, (mean_name, var_name, cumulative, counts), THREADS)


@cache
def _count_batch() -> Kernel:
    ints = np.int64

    def count_batch(counter, stats, groups):
        any_counted = cuda.shared.array(1, types.int32)
        thread = ints(cuda.threadIdx.x)
        if thread == 0:
            any_counted[0] = 0
        cuda.syncthreads()
        for group in range(thread, groups, THREADS):
            if read_number(stats, COUNT * groups + group) > 0.0:
                any_counted[0] = 1
        cuda.syncthreads()
        if thread == 0 and any_counted[0] > 0:
            write_number(counter, ints(0), read_number(counter, ints(0)) + 1.0)

    return Kernel(count_batch, (), THREADS)
