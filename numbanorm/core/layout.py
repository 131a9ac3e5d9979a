"""Layout: which elements share a mean and a variance, and which share a weight and a bias.

A norm is these two maps and nothing else. Both are arithmetic on the index of an element, from the shape alone: this
module knows neither arrays nor kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any

from .norms import CHANNEL, GROUP, NORMALIZED, NORMS, OUTER, SAMPLE, SPACE, NormRecord, record_of

MOST_GROUPS_OF_NOTHING = 1 << 16
"""Groups of 0 channels at most: every number divides 0, but statistics of 2**63 groups fit into no memory."""


@dataclass(frozen=True)
class _Axis:
    """One axis after the channel axis was split into (groups, channels a group)."""

    length: int
    role: str
    axis: int  # of the shape
    reduced: bool
    affine: bool


@dataclass(frozen=True)
class Layout:
    """The two maps of one norm over one shape.

    Make one with `Layout.of`. Statistics live in a coalesced view of the elements in the order of memory,
    ``(K0, R0, K1, R1)``: kept, reduced, kept, reduced, with 1 where there is none. The element at flat index ``f`` of
    that order belongs to the statistic ``(f // (R0*K1*R1), f // R1 % K1)`` and to the weight
    ``f // span * size + f // inner % size``.

    Attributes
    ----------
    norm : str
        A key of `numbanorm.core.norms.NORMS`.
    shape : tuple of int
        Shape of the array.
    order : tuple of int
        Axes of the array from the slowest to the fastest in memory.
    view : tuple of int
        ``(K0, R0, K1, R1)``.
    span, inner, size : int
        The affine map: ``f // span * size + f // inner % size``. With `span` the whole array all samples share weights;
        with less, that many elements do, a sample's, which are a multiple of ``R0 * K1 * R1``.
    reduced_axes : tuple of int
        Axes along which elements share statistics (the channel axis among them for GroupNorm).
    stats_shape : tuple of int
        Shape in which statistics are returned, that of torch's native functions.
    affine_shape : tuple of int
        Shape of weight and bias.
    stats_order, affine_order : tuple of int or None
        How statistics come out of memory's order into the order of `stats_shape`'s axes, and how a weight is brought
        into memory's order; None where they agree, as they do for C-ordered arrays.

    Examples
    --------
    >>> layout = Layout.of("group", (4, 6, 8, 8), num_groups=2)
    >>> layout.view, layout.inner, layout.size
    ((4, 1, 2, 192), 64, 6)
    >>> layout.statistic(3, 5, 0, 0), layout.weight(3, 5, 0, 0)
    (7, 5)
    """

    norm: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    view: tuple[int, int, int, int]
    span: int
    inner: int
    size: int
    reduced_axes: tuple[int, ...]
    stats_shape: tuple[int, ...]
    affine_shape: tuple[int, ...]
    stats_order: tuple[int, ...] | None
    affine_order: tuple[int, ...] | None
    _stats_lengths: tuple[int, ...]

    @classmethod
    @lru_cache(maxsize=4096)
    def of(
        cls,
        norm: str,
        shape: tuple[int, ...],
        *,
        channel_axis: int = 1,
        num_groups: int | None = None,
        axis: tuple[int, ...] | None = None,
        order: tuple[int, ...] | None = None,
        separable: bool = False,
    ) -> Layout:
        """Work out the layout of `norm` over `shape`.

        Parameters
        ----------
        norm : str
            A key of `numbanorm.core.norms.NORMS`.
        shape : tuple of int
            Shape of the array.
        channel_axis : int, optional
            Axis of the channels, for batch, instance and group norm.
        num_groups : int, optional
            Groups of channels, for group norm.
        axis : tuple of int, optional
            The normalized axes, for layer and RMS norm.
        order : tuple of int, optional
            Axes from the slowest to the fastest in memory; C order if None. Where the maps cannot be read in this
            order, the layout comes with an `order` of its own in which they can.

        separable : bool, optional
            True: also take an order of its own where elements of one weight lie under different k1, so that gradients
            of weights are not sums over K0 and the reduced axes alone.

        Raises
        ------
        ValueError
            If the norm is unknown, or axes or groups do not fit the shape.
        """
        rule = record_of(norm)
        if rule.by_channel:
            axes = _by_channel(rule, shape, channel_axis, num_groups)
        else:
            axes = _by_normalized(rule, shape, axis)
        asked = tuple(range(len(shape))) if order is None else order
        memory = sorted(axes, key=lambda a: asked.index(a.axis))
        maps = _maps(memory)
        if maps is None or (separable and not _separable(maps[0], *maps[2:])):
            # Kept before reduced and weighted axes side by side: in this order both maps always read.
            memory = sorted(axes, key=lambda a: (a.reduced, a.affine != a.reduced))
            asked = tuple(dict.fromkeys(a.axis for a in memory))
            maps = _maps(memory)
            assert maps is not None
        view, span, inner, size = maps
        kept = [a for a in axes if not a.reduced]
        if rule.by_channel:
            stats_shape = tuple(a.length for a in kept)
        else:
            stats_shape = tuple(1 if a.reduced else a.length for a in sorted(axes, key=lambda a: a.axis))
        kept_in_memory = [a for a in memory if not a.reduced]
        weighted = _weighted(axes, rule)
        lengths = {axis: prod(a.length for a in axes if a.axis == axis and a.affine) for axis in weighted}
        return cls(
            norm=norm,
            shape=shape,
            order=asked,
            view=view,
            span=span,
            inner=inner,
            size=size,
            reduced_axes=tuple(sorted({a.axis for a in axes if a.reduced})),
            stats_shape=stats_shape,
            affine_shape=tuple(lengths.values()),
            stats_order=_permutation(kept_in_memory, kept),
            affine_order=_permutation(weighted, [axis for axis in asked if axis in lengths]),
            _stats_lengths=tuple(a.length for a in kept_in_memory),
        )

    @cached_property
    def count(self) -> int:
        """Elements that share one mean."""
        return self.view[1] * self.view[3]

    @cached_property
    def groups(self) -> int:
        """Number of means."""
        return self.view[0] * self.view[2]

    @cached_property
    def weights(self) -> int:
        """Number of weights."""
        return prod(self.affine_shape)

    @cached_property
    def samples(self) -> int:
        """Sets of `size` weights, one after the other."""
        return self.weights // self.size if self.size else 1

    @property
    def record(self) -> NormRecord:
        """What is to be known of the norm."""
        return NORMS[self.norm]

    @property
    def centred(self) -> bool:
        """Whether a mean is subtracted."""
        return NORMS[self.norm].centred

    @property
    def stats_lengths(self) -> tuple[int, ...]:
        """Shape of the statistics as they come out of memory's order, before `stats_order`."""
        return self._stats_lengths

    def flat(self, *index: Any) -> Any:
        """Return the flat index, in memory's order, of the element at `index` (integers, or arrays of them)."""
        flat: Any = 0
        for axis in self.order:
            flat = flat * self.shape[axis] + index[axis]
        return flat

    def statistic(self, *index: Any) -> Any:
        """Return which mean the element at `index` uses: a flat index into `stats_shape`."""
        _, r0, k1, r1 = self.view
        flat = self.flat(*index)
        group = flat // (r0 * k1 * r1) * k1 + flat // r1 % k1
        return _reorder(group, self._stats_lengths, self.stats_order)

    def weight(self, *index: Any) -> Any:
        """Return which weight the element at `index` uses: a flat index into `affine_shape`."""
        flat = self.flat(*index)
        channel = flat // max(self.span, 1) * self.size + flat // self.inner % self.size
        if self.affine_order is None:
            return channel
        lengths = tuple(self.affine_shape[a] for a in self.affine_order)
        back = tuple(self.affine_order.index(a) for a in range(len(lengths)))
        return _reorder(channel, lengths, back)


def _by_channel(rule: NormRecord, shape: tuple[int, ...], channel_axis: int, num_groups: int | None) -> list[_Axis]:
    """Name the axes (samples, channels, space): samples first, then groups and channels, as statistics are shaped."""
    ndim = len(shape)
    if ndim < 2:
        raise ValueError(f"x: expected at least 2 dimensions (samples and channels), got shape {shape}")
    if not -ndim <= channel_axis < ndim:
        raise ValueError(f"channel_axis: expected an axis of shape {shape}, got {channel_axis}")
    channel_axis %= ndim
    sample_axis = 1 if channel_axis == 0 else 0
    channels = shape[channel_axis]
    if num_groups is None:
        parts = [(channels, CHANNEL)]
    else:
        if not 1 <= num_groups <= max(channels, MOST_GROUPS_OF_NOTHING) or channels % num_groups:
            raise ValueError(f"num_groups: expected a divisor of the {channels} channels, got {num_groups}")
        parts = [(num_groups, GROUP), (channels // num_groups, CHANNEL)]
    by_sample = rule.weights_by_sample
    named = [(shape[sample_axis], SAMPLE, sample_axis)]
    named += [(length, role, channel_axis) for length, role in parts]
    named += [(shape[a], SPACE, a) for a in range(ndim) if a not in (sample_axis, channel_axis)]
    return [
        _Axis(length, role, axis, role in rule.reduced, role in rule.affine_roles or (role == SAMPLE and by_sample))
        for length, role, axis in named
    ]


def _by_normalized(rule: NormRecord, shape: tuple[int, ...], axis: tuple[int, ...] | None) -> list[_Axis]:
    """Name the axes (outer, normalized): the normalized ones last and in the order of `axis`, as weights are shaped."""
    ndim = len(shape)
    if not axis or any(not -ndim <= a < ndim for a in axis) or len({a % ndim for a in axis}) < len(axis):
        raise ValueError(f"axis: expected one or more different axes of shape {shape}, got {axis}")
    normalized = [a % ndim for a in axis]
    named = [(a, OUTER) for a in range(ndim) if a not in normalized] + [(a, NORMALIZED) for a in normalized]
    sample = named[0][0] if rule.weights_by_sample else None
    return [
        _Axis(shape[a], role, a, role in rule.reduced, role in rule.affine_roles or (role == OUTER and a == sample))
        for a, role in named
    ]


def _weighted(axes: list[_Axis], rule: NormRecord) -> list[int]:
    """Return the array's axes that a weight has, too: by their order in it; of length 1 where it must broadcast."""
    spread = rule.weights_by_sample and not rule.by_channel
    return list(dict.fromkeys(a.axis for a in axes if a.affine or (spread and a.role == OUTER)))


def _maps(memory: list[_Axis]) -> tuple[tuple[int, int, int, int], int, int, int] | None:
    """Return (view, span, inner, size) of axes in memory's order, or None where the two maps have other forms."""
    axes = [a for a in memory if a.length != 1]
    runs: list[list[_Axis]] = []
    for a in axes:
        if runs and runs[-1][0].reduced == a.reduced:
            runs[-1].append(a)
        else:
            runs.append([a])
    pattern = "".join("R" if run[0].reduced else "K" for run in runs)
    lengths = [prod(a.length for a in run) for run in runs]
    if pattern in ("", "K", "KR", "R"):
        kept = runs[0] if pattern.startswith("K") else []
        # Axes with weights go to K1, samples to K0: gradients of weights are sums over K0 and R0.
        split = next((i for i, a in enumerate(kept) if all(b.affine for b in kept[i:])), len(kept))
        reduced = lengths[-1] if pattern.endswith("R") else 1
        view = prod(a.length for a in kept[:split]), 1, prod(a.length for a in kept[split:]), reduced
    elif pattern in ("RK", "RKR", "KRK", "KRKR"):
        if pattern[0] == "R":
            lengths.insert(0, 1)
        k0, r0, k1, *r1 = lengths
        view = k0, r0, k1, r1[0] if r1 else 1
    else:
        return None
    span = whole = prod(a.length for a in memory)
    weighted = [i for i, a in enumerate(axes) if a.affine]
    if not weighted:
        return view, whole, max(whole, 1), 1
    first, last = weighted[0], weighted[-1]
    if last - first + 1 != len(weighted):
        if first != 0 or axes[0].reduced or axes[0].role not in (SAMPLE, OUTER):
            return None
        span, first = whole // max(axes[0].length, 1), weighted[1]
        if last - first + 2 != len(weighted):
            return None
    return view, span, prod(a.length for a in axes[last + 1 :]), prod(a.length for a in axes[first : last + 1])


def _separable(view: tuple[int, int, int, int], inner: int, size: int) -> bool:
    """Tell whether a weight's elements, of each sample, all lie under one k1, or its index is that of R0."""
    _, r0, k1, r1 = view
    return size == 1 or inner * size == k1 * r1 or (r1 == 1 and inner == k1 and size == r0)


def _permutation(source: list[Any], target: list[Any]) -> tuple[int, ...] | None:
    """Return the transposition that brings `source` into the order of `target`, or None if it already is."""
    order = tuple(source.index(a) for a in target)
    return None if order == tuple(range(len(order))) else order


def _reorder(flat: Any, lengths: tuple[int, ...], order: tuple[int, ...] | None) -> Any:
    """Turn a flat index over `lengths` into the flat index over their transposition by `order`."""
    if order is None:
        return flat
    index = [flat // prod(lengths[i + 1 :]) % lengths[i] for i in range(len(lengths))]
    turned: Any = 0
    for i in order:
        turned = turned * lengths[i] + index[i]
    return turned
