"""Running statistics: turned into statistics to normalize with, and moved towards those of a batch."""

from __future__ import annotations

import numpy as np

from ..core.plan import COUNT, M2, MEAN, RSTD
from .address import number, record
from .claims import is_shared
from .dtypes import load, pointer, store
from .jit import Kernel, scalar
from .welford import most

READY, OVERLAP, MISALIGNED = 0, 1, 2


@scalar
def _fill(mean, var, stats, channels, eps):
    for channel in range(channels):
        store(stats, COUNT * channels + channel, 0.0)
        store(stats, MEAN * channels + channel, np.float64(load(mean, channel)))
        store(stats, M2 * channels + channel, 0.0)
        store(stats, RSTD * channels + channel, 1.0 / np.sqrt(np.float64(load(var, channel)) + eps))


@scalar
def fill_given(job, mean, var, stats, g, eps):
    """Fill `stats`, shape (4, channels), with running statistics, unless the job is shared: then they are there."""
    if not is_shared(job):
        _fill(mean, var, stats, g.K0 * g.K1, eps)


@Kernel
def given(mean, var, stats, channels, eps):
    """Fill `stats`, shape (4, channels), with running statistics, to normalize with."""
    _fill(pointer(mean), pointer(var), pointer(stats), channels, eps)


@scalar
def _move_one(mean, var, stats, groups, channels, momentum):
    """Move towards the statistics of one sample: a channel of which nothing counts stays."""
    keep = 1.0 - momentum
    for channel in range(channels):
        n = load(stats, COUNT * groups + channel)
        old_mean, old_var = np.float64(load(mean, channel)), np.float64(load(var, channel))
        unbiased = load(stats, M2 * groups + channel) / most(n - 1.0, 1.0)
        new_mean = keep * old_mean + momentum * (load(stats, MEAN * groups + channel) + 0.0)
        new_var = keep * old_var + momentum * (unbiased + 0.0)
        store(mean, channel, new_mean if n > 0.0 else old_mean)
        store(var, channel, new_var if n > 0.0 else old_var)


@scalar
def _move(array, place, momentum, batch):
    old = np.float64(load(array, place))
    store(array, place, (1.0 - momentum) * old + momentum * batch)


@scalar
def _update(g, stats, mean, var, momentum):
    """Average statistics over the samples in which a channel counts; the operations are NumPy's, bit by bit."""
    groups = g.K0 * g.K1
    if g.run_samples == 1 and g.run_step == 1:
        _move_one(mean, var, stats, groups, g.run_channels, momentum)
        return
    for channel in range(g.run_channels):
        seen = total = squares = 0.0
        for sample in range(g.run_samples):
            group = sample * g.run_sample_step + channel * g.run_step
            n = load(stats, COUNT * groups + group)
            if n > 0.0:
                seen += 1.0
                total += load(stats, MEAN * groups + group)
                squares += load(stats, M2 * groups + group) / most(n - 1.0, 1.0)
        if seen > 0.0:
            _move(mean, channel, momentum, total / seen)
            _move(var, channel, momentum, squares / seen)


@Kernel
def update(geometry, mean, var, stats, momentum, check):
    """Move running statistics towards the batch's; return whether both are `READY` for it. With `check`, only tell."""
    p_geometry = pointer(geometry)
    p_mean, p_var, p_stats = pointer(mean), pointer(var), pointer(stats)
    g = record(p_geometry)
    mean_at, var_at = number(p_mean), number(p_var)
    if mean_at % g.run_mean_itemsize != 0 or var_at % g.run_var_itemsize != 0:
        return MISALIGNED
    if (
        mean_at < var_at + g.run_channels * g.run_var_itemsize
        and var_at < mean_at + g.run_channels * g.run_mean_itemsize
    ):
        return OVERLAP
    if not check:
        _update(g, p_stats, p_mean, p_var, momentum)
    return READY
