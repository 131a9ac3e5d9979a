"""Sums and gradients of pieces, as `numbanorm.stats.partials` has them by channel and by row, for any norm.

Where a piece cuts groups of channels, each channel is a group of its own: add up what is known of a group's channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..calls.dispatch import handler_of
from ..core.norms import CHANNEL, SAMPLE, SPACE, record_of
from ..core.plan import Options
from .partials import channel_gradient, channel_sums, row_gradient, row_sums


class Maps:
    """Which axes of a piece do what for a norm; groups of channels are of one channel in a piece.

    Parameters
    ----------
    norm, options
        As `numbanorm.stats.partials.normalize` takes them.
    ndim : int
        Dimensions of the piece.

    Attributes
    ----------
    record : NormRecord
        The norm.
    channel : int
        The axis of the channels, for a norm by channel.
    over : tuple of int
        The axes along which elements share statistics.
    stats_axes : tuple of int
        Those of a statistic, in the order in which the functions return it: samples and channels first, or all axes.
    weight_axes : tuple of int
        Those of a weight; none where one serves all elements.
    channelwise : bool
        Whether statistics are those of channels, or of channels of samples.
    """

    def __init__(self, norm: str, options: Options, ndim: int) -> None:
        self.record = record_of(norm)
        channel_axis, _, axis = options
        every = tuple(range(ndim))
        self.channel = channel = channel_axis % ndim
        if axis is not None:
            self.over = along = tuple(a % ndim for a in axis)
            self.stats_axes, self.channelwise = every, False
        else:
            sample, along = 1 if channel == 0 else 0, (channel,)
            roles = dict.fromkeys(every, SPACE) | {sample: SAMPLE, channel: CHANNEL}
            shared = self.record.reduced - ({CHANNEL} if self.record.grouped else set())
            self.over = tuple(a for a in every if roles[a] in shared)
            self.stats_axes = tuple(a for a in dict.fromkeys((sample, channel, *every)) if a not in self.over)
            self.channelwise = self.stats_axes in ((channel,), (sample, channel))
        self.weight_axes = along if self.record.affine_roles else ()

    def rows(self, statistic: Any) -> Any:
        """Return a statistic with 1 for the axes that it is taken over; None for None."""
        if statistic is None or not self.record.by_channel:
            return statistic
        return np.expand_dims(np.asarray(statistic).transpose(np.argsort(self.stats_axes)), self.over)

    def public(self, rows: np.ndarray) -> np.ndarray:
        """Return what has 1 for these axes as the functions return it."""
        if not self.record.by_channel:
            return rows
        return rows.squeeze(self.over).transpose(np.argsort(np.argsort(self.stats_axes)))

    def weight(self, weight: Any, shape: tuple[int, ...], axes: tuple[int, ...] | None = None) -> Any:
        """Return a weight with 1 for those of `axes`, all if None, along which it does not differ; None for None."""
        of = range(len(shape)) if axes is None else axes
        lengths = [shape[a] if a in self.weight_axes else 1 for a in of]
        return None if weight is None else np.asarray(weight).reshape(lengths)


def sums(
    norm: str, options: Options, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of ``g`` and of ``g * h`` over the part of every group that lies in a piece.

    Parameters
    ----------
    norm, options, x, mean, rstd
        As `numbanorm.stats.partials.normalize` takes them; groups of channels are of one channel.
    dy : array_like, shape of `x`
        Gradient of the result.
    weight : array_like, optional
        gamma, where it differs within the groups of the piece; elsewhere None, and ``g`` is `dy`.

    Returns
    -------
    sum_g, sum_gh : ndarray, float64, shape of `rstd`
        The sums.
    """
    serving = handler_of(x)
    if serving is not None:
        return serving.partial_sums(norm, options, dy, x, mean, rstd, weight)  # type: ignore[no-any-return]
    maps = Maps(norm, options, np.ndim(x))
    if maps.channelwise:
        return channel_sums(dy, x, np.zeros_like(rstd) if mean is None else mean, rstd, channel_axis=maps.channel)
    of_rows = maps.weight(weight, x.shape, maps.over)
    first, second = row_sums(dy, x, maps.rows(mean), maps.rows(rstd), of_rows, axis=maps.over)
    return maps.public(first), maps.public(second)


def gradient(
    norm: str,
    options: Options,
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    mean_g: Any,
    mean_gh: Any,
    weight: Any = None,
    mask: Any = None,
) -> tuple[Any, ...]:
    """Return dx of a piece and, where weights differ within its groups, its share of dweight and dbias.

    Parameters
    ----------
    norm, options, dy, x, mean, rstd
        As for `sums`.
    mean_g, mean_gh : ndarray, float64, shape of `rstd`
        What `sums` returns, added over all pieces and divided by the count of the whole group; 0 where nothing counts.
        Where `NormRecord.weights_within_groups` is true, ``g`` has the weight in it.
    weight : array_like, optional
        gamma.
    mask : array_like of bool, optional
        True where an element counted.
    """
    serving = handler_of(x)
    if serving is not None:
        given = (dy, x, mean, rstd, mean_g, mean_gh, weight, mask)
        return serving.partial_gradient(norm, options, *given)  # type: ignore[no-any-return]
    maps = Maps(norm, options, np.ndim(x))
    record, shape = maps.record, x.shape
    spread = maps.weight(weight, shape)
    if maps.channelwise:
        if weight is not None and record.weights_within_groups:  # the means have it in them
            dy, weight = dy * spread, None
        elif weight is not None:
            weight = np.broadcast_to(weight, shape[maps.channel])
        if mean is None:
            mean = mean_g = np.zeros_like(rstd)
        means = mean_g, mean_gh
        return (channel_gradient(dy, x, mean, rstd, *means, weight, channel_axis=maps.channel, mask=mask),)
    within = set(maps.weight_axes) <= set(maps.over)
    factor = 1.0 if weight is None or record.weights_within_groups else spread
    means = maps.rows(mean_g) * factor, maps.rows(mean_gh) * factor
    if weight is not None and not within:
        dy, weight = dy * spread, None
    elif weight is None and within and record.by_channel:
        weight = np.ones([shape[a] for a in maps.weight_axes])
    of_weight = maps.weight(weight, shape, maps.over)
    own = (dy, x, maps.rows(mean), maps.rows(rstd), *means, of_weight)
    dx, *parts = row_gradient(*own, axis=maps.over, mask=mask)
    if not (within and record.weights_within_groups):
        return (dx,)
    return dx, *(part.reshape([shape[a] for a in maps.weight_axes]) for part in parts)
