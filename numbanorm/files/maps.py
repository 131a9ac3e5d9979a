"""Maps: which elements share statistics and weights, in any region of an array that does not fit in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..calls.check import integer, integers, normalized_axes
from ..core.layout import Layout
from ..core.norms import NormRecord
from ..core.plan import Options
from .blocks import Region, length


@dataclass(frozen=True)
class Maps:
    """A norm over the whole array of a file.

    Attributes
    ----------
    record : NormRecord
        The norm.
    layout : Layout
        Its maps, as if all of the array were in memory.
    along : tuple of int
        The axis of the channels, or the normalized axes.
    groups : int or None
        Groups of channels, if the norm has any.
    """

    record: NormRecord
    layout: Layout
    along: tuple[int, ...]
    groups: int | None

    @classmethod
    def of(
        cls,
        record: NormRecord,
        shape: tuple[int, ...],
        normalized_shape: Any,
        num_groups: Any,
        axis: Any,
        channel_axis: Any,
    ) -> Maps:
        """Check what a caller of `apply` has chosen, and lay the norm over a shape.

        Raises
        ------
        TypeError, ValueError
            If the norm has no such argument or lacks one, or they do not fit the shape.
        """
        if record.by_channel and (normalized_shape is not None or axis is not None):
            raise ValueError(f"normalized_shape, axis: expected None for {record.kind} norm")
        if (num_groups is None) == record.grouped:
            wanted = "a number" if record.grouped else "None"
            raise ValueError(f"num_groups: expected {wanted} for {record.kind} norm")
        groups = None if num_groups is None else integer(num_groups, "num_groups")
        channel = integer(channel_axis, "channel_axis")
        if record.by_channel:
            along: tuple[int, ...] = (channel,)
        elif normalized_shape is not None:
            along = normalized_axes(shape, normalized_shape, axis)
        else:
            along = (-1,) if axis is None else integers(axis, "axis")
        layout = Layout.of(record.kind, shape, channel_axis=channel, num_groups=groups, axis=along)
        return cls(record, layout, tuple(a % len(shape) for a in along), groups)

    @cached_property
    def group(self) -> int:
        """Channels of a group."""
        return 1 if self.groups is None else max(self.layout.shape[self.along[0]] // self.groups, 1)

    @cached_property
    def reduced(self) -> frozenset[int]:
        """Axes along which all elements share statistics; groups of channels are parts of an axis."""
        return frozenset(self.layout.reduced_axes) - frozenset(() if self.groups is None else self.along)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The axes as statistics have them: samples and channels first, where there are channels."""
        axes = tuple(range(len(self.layout.shape)))
        if not self.record.by_channel:
            return axes
        channel = self.along[0]
        first = (1 if channel == 0 else 0), channel
        return (*first, *(a for a in axes if a not in first))

    def options(self, region: Region, group: int) -> Options:
        """Return the norm's options for a region, with groups of as many channels."""
        if not self.record.by_channel:
            return 1, None, self.along
        channel = self.along[0]
        return channel, None if self.groups is None else length(region[channel]) // group, None

    def weights(self, region: Region) -> tuple[Any, ...]:
        """Return which part of a weight the elements of a region use."""
        return (*(region[a] for a in self.along if self.record.affine_roles), ...)

    def statistics(self, values: np.ndarray, region: Region) -> np.ndarray:
        """Bring statistics of a region, with 1 for axes along which they are the same, into the norm's own shape."""
        lengths = [1 if a in self.reduced else length(s) for a, s in enumerate(region)]
        kept = [lengths[a] for a in self.order if not (self.record.by_channel and a in self.reduced)]
        return np.broadcast_to(values, lengths).transpose(self.order).reshape(kept)
