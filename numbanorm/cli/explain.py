"""What a norm does to a shape, in words: who shares a mean, who shares a weight, and what follows for its use.

Everything here is text and numbers drawn from `Layout`; `cli` prints it and `figures` draws it.
"""
# ruff: noqa: RUF001 (γ, β and the minus sign are meant)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from ..core.layout import Layout
from ..core.norms import NORMS

TITLES = {
    "batch": "BatchNorm",
    "layer": "LayerNorm",
    "instance": "InstanceNorm",
    "group": "GroupNorm",
    "rms": "RMSNorm",
}
TEXTBOOK = ("batch", "layer", "instance", "group")
"""The norms that textbooks put side by side, in their order."""

_NOUNS = {
    "N": "sample",
    "C": "channel",
    "H": "row",
    "W": "column",
    "D": "slice",
    "L": "position",
    "sentence": "sentence",
    "position": "position",
    "embedding": "feature",
}
_SPACE_NAMES = {0: (), 1: ("L",), 2: ("H", "W"), 3: ("D", "H", "W")}


@dataclass(frozen=True)
class Reading:
    """What the axes of a shape stand for.

    Attributes
    ----------
    shape : tuple of int
        The shape.
    names : tuple of str
        A short name for each axis, such as ``("N", "C", "H", "W")``.
    sample, channel : int
        The axes of the samples and of the channels.
    space : tuple of int
        All other axes.

    Examples
    --------
    >>> Reading.of((4, 6, 8, 8)).names
    ('N', 'C', 'H', 'W')
    >>> Reading.of((4, 6, 8), channel_axis=-1).names
    ('sentence', 'position', 'embedding')
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    sample: int
    channel: int
    space: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], channel_axis: int = 1) -> Reading:
        """Read a shape as samples, channels and space; three axes with the channels last as tokens of sentences.

        Parameters
        ----------
        shape : tuple of int
            The shape: two axes or more, no empty ones.
        channel_axis : int, optional
            Axis of the channels.

        Raises
        ------
        ValueError
            If the shape has fewer than two axes, an empty axis, too many elements, or no such channel axis.
        """
        written = ",".join(map(str, shape))
        if len(shape) < 2:
            raise ValueError(f"shape: expected two axes or more (samples and channels), got {written}")
        if min(shape) < 1:
            raise ValueError(f"shape: expected axes of length 1 or more, got {written}")
        if prod(shape) >= 2**63:
            raise ValueError(f"shape: expected fewer than 2**63 elements, got {written}")
        if not -len(shape) <= channel_axis < len(shape):
            raise ValueError(f"channel axis: expected an axis of shape {written}, got {channel_axis}")
        channel = channel_axis % len(shape)
        sample = 1 if channel == 0 else 0
        space = tuple(axis for axis in range(len(shape)) if axis not in (sample, channel))
        if len(shape) == 3 and channel == 2:
            return cls(shape, ("sentence", "position", "embedding"), sample, channel, space)
        spatial = _SPACE_NAMES.get(len(space), tuple(f"S{i}" for i in range(1, len(space) + 1)))
        named = {sample: "N", channel: "C"} | dict(zip(space, spatial, strict=True))
        return cls(shape, tuple(named[axis] for axis in range(len(shape))), sample, channel, space)

    @property
    def tokens(self) -> bool:
        """Whether the shape is read as (sentence, position, embedding)."""
        return self.names[-1] == "embedding"

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.shape[self.channel]

    @property
    def edges(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The axes as the three edges of a block: samples, channels, space."""
        return (self.sample,), (self.channel,), self.space

    @property
    def edge_labels(self) -> tuple[str, str, str]:
        """What runs along the three edges, with its length; empty for no space."""
        if self.tokens:
            return f"N: {self.shape[0]} sentences", f"embedding: {self.shape[2]}", f"sentence position: {self.shape[1]}"
        positions = prod(self.shape[axis] for axis in self.space)
        return (
            f"N: {counted(self.shape[self.sample], 'sample')}",
            f"C: {counted(self.channels, 'channel')}",
            f"{'·'.join(self.names[axis] for axis in self.space)}: {counted(positions, 'position')}"
            if self.space
            else "",
        )

    def noun(self, axis: int) -> str:
        """Name an axis as a thing: ``"row"``."""
        return _NOUNS.get(self.names[axis], self.names[axis])


@dataclass(frozen=True)
class Case:
    """One norm over one shape.

    Attributes
    ----------
    layout : Layout
        The norm's two maps.
    reading : Reading
        What the axes stand for.
    num_groups : int or None
        Groups of channels, for GroupNorm.

    Examples
    --------
    >>> case = Case.of("batch", Reading.of((4, 6, 8, 8)))
    >>> case.layout.groups, case.layout.count, case.sharers
    (6, 256, 256)
    """

    layout: Layout
    reading: Reading
    num_groups: int | None = None

    @classmethod
    def of(
        cls, norm: str, reading: Reading, *, num_groups: int | None = None, axis: tuple[int, ...] | None = None
    ) -> Case:
        """Lay a norm over a shape, with the textbook's choice for whatever is left open.

        Parameters
        ----------
        norm : str
            A key of `numbanorm.layout.NORMS`.
        reading : Reading
            The shape, and what its axes stand for.
        num_groups : int, optional
            Groups of channels; the smallest number above 1 that divides the channels if None.
        axis : tuple of int, optional
            Axes that LayerNorm and RMSNorm normalize; if None, the embedding of a token, or else the whole sample.

        Raises
        ------
        ValueError
            If groups or axes do not fit the shape.
        """
        shape = reading.shape
        if not NORMS[norm].by_channel:
            rest = tuple(a for a in range(len(shape)) if a != reading.sample)
            chosen = axis or ((reading.channel,) if reading.tokens else rest)
            ascending = tuple(sorted(chosen, key=lambda a: a % len(shape)))
            return cls(Layout.of(norm, shape, axis=ascending), reading)
        if norm != "group":
            return cls(Layout.of(norm, shape, channel_axis=reading.channel), reading)
        groups = _smallest_divisor(shape[reading.channel]) if num_groups is None else num_groups
        return cls(Layout.of(norm, shape, channel_axis=reading.channel, num_groups=groups), reading, groups)

    @property
    def norm(self) -> str:
        """Name of the norm."""
        return self.layout.norm

    @property
    def title(self) -> str:
        """Name of the norm's class."""
        return TITLES[self.norm]

    @property
    def name(self) -> str:
        """Name of the norm's class, with the number of groups if it has any."""
        return self.title if self.num_groups is None else f"{self.title} ({counted(self.num_groups, 'group')})"

    @property
    def normalized(self) -> str:
        """What is normalized at a time, as a phrase: ``"each channel by itself"``."""
        return f"each {self.one} by itself" if self.one else "the whole array at once"

    @property
    def statistics(self) -> tuple[str, ...]:
        """What is shared by the elements that share a mean."""
        return ("mean", "variance") if self.layout.centred else ("mean square",)

    @property
    def parameters(self) -> tuple[str, ...]:
        """What is shared by the elements that share a weight."""
        return ("weight", "bias") if self.layout.centred else ("weight",)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return prod(self.layout.affine_shape)

    @property
    def weighted_axes(self) -> tuple[int, ...]:
        """Axes along which the weight varies."""
        return (self.reading.channel,) if NORMS[self.norm].by_channel else self.layout.reduced_axes

    @property
    def sharers(self) -> int:
        """Elements that share one weight."""
        return prod(self.layout.shape) // self.weights

    @property
    def kept_axes(self) -> tuple[int, ...]:
        """Axes that are not averaged over."""
        return tuple(axis for axis in range(len(self.layout.shape)) if axis not in self.layout.reduced_axes)

    @property
    def one(self) -> str:
        """What is normalized by itself: ``"token"``, ``"channel of a sample"``; "" if it is the whole array."""
        if self.reading.tokens and self.kept_axes == (0, 1):
            return "token"
        space = self.reading.space
        anywhere = len(space) > 1 and set(space) <= set(self.kept_axes)
        things = [self.reading.noun(axis) for axis in self.kept_axes if not (anywhere and axis in space)]
        if anywhere:
            things.append("position")
        if self.num_groups is not None:
            things.append(
                f"group of {counted(self.reading.channels // self.num_groups, self.reading.noun(self.reading.channel))}"
            )
        return " of a ".join(reversed(things))

    @property
    def averaged(self) -> str:
        """Axes that are averaged over: ``"N, H, W"``; GroupNorm's share of the channels as ``"C/G"``."""
        names = self.reading.names
        inside = self.reading.channel if self.num_groups is not None else None
        return ", ".join(f"{names[a]}/G" if a == inside else names[a] for a in self.layout.reduced_axes) or "nothing"

    @property
    def mixes_samples(self) -> bool:
        """Whether what happens to a sample depends on the other samples in the array."""
        return self.reading.sample in self.layout.reduced_axes

    @property
    def code(self) -> str:
        """The call that makes this norm."""
        ndim, channel, axes = len(self.layout.shape), self.reading.channel, self.layout.reduced_axes
        if NORMS[self.norm].by_channel:
            groups = "" if self.num_groups is None else f"{self.num_groups}, "
            where = "" if channel == 1 else f", channel_axis={-1 if channel == ndim - 1 else channel}"
            return f"nn.{self.title}({groups}{self.reading.channels}{where})"
        lengths = self.layout.affine_shape
        shape = str(lengths[0]) if len(lengths) == 1 else str(lengths)
        if axes == tuple(range(ndim - len(axes), ndim)):
            return f"nn.{self.title}({shape})"
        return f"nn.{self.norm}_norm(x, {shape}, axis={axes})"


def describe(case: Case) -> Iterator[tuple[str, str]]:
    """Explain a norm over a shape.

    Parameters
    ----------
    case : Case
        The norm and the shape.

    Yields
    ------
    tuple of str
        What is explained, and the explanation.
    """
    layout = case.layout
    yield "Formula", "y = (x − mean) / √(variance + ε) · γ + β" if layout.centred else "y = x / √(mean of x² + ε) · γ"
    yield "Normalized", case.normalized
    yield "Averaged over", f"{case.averaged}: {counted(layout.count, 'element')} for each {case.statistics[0]}"
    yield "Statistics", listed([counted(layout.groups, thing) for thing in case.statistics])
    yield "Weight and bias" if layout.centred else "Weight", " ".join(_parameters(case))
    yield "Running statistics", _running(case)
    yield "Train and eval", _modes(case)
    yield "In code", case.code
    if layout.count == 1:
        yield "Beware", f"with this shape every element is alone: {_alone(case)}"


def compare(cases: Sequence[Case]) -> Iterator[tuple[str, list[str]]]:
    """Put some norms side by side.

    Parameters
    ----------
    cases : sequence of Case
        The norms, all over one shape.

    Yields
    ------
    tuple of str and list of str
        What is compared, and how it is for each norm.
    """
    yield "averages over", [case.averaged for case in cases]
    yield "means", [f"{case.layout.groups:,}" for case in cases]
    yield "elements each", [f"{case.layout.count:,}" for case in cases]
    yield "γ and β", [str(case.layout.affine_shape) for case in cases]
    yield "elements per γ", [f"{case.sharers:,}" for case in cases]
    yield "batch matters", [_company(case) for case in cases]
    yield "running stats", [{"batch": "yes", "instance": "on request"}.get(case.norm, "no") for case in cases]
    yield "train ≠ eval", [{"batch": "yes", "instance": "if running"}.get(case.norm, "no") for case in cases]


def counted(n: int, thing: str) -> str:
    """Write how many there are of something: ``"1 mean"``, ``"4,096 elements"``."""
    plural = "" if n == 1 else "es" if thing.endswith("s") else "s"
    return f"{n:,} {thing}{plural}"


def listed(words: Sequence[str]) -> str:
    """Write words as a list: ``"sample, row and column"``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _alone(case: Case) -> str:
    if case.norm in ("batch", "instance"):
        return "it has no variance, and numbanorm refuses to normalize with such statistics (ValueError)."
    return "it has no variance and becomes 0 before γ and β." if case.layout.centred else "it becomes 1 or −1 before γ."


def _company(case: Case) -> str:
    if case.norm == "batch":
        return "in training"
    return "yes" if case.mixes_samples else "no"


def _parameters(case: Case) -> Iterator[str]:
    things = listed([case.reading.noun(axis) for axis in case.weighted_axes])
    yield f"shape {case.layout.affine_shape}: one γ{' and one β' * case.layout.centred} for each {things},"
    yield f"shared by {counted(case.sharers, 'element')}."
    if case.norm == "instance":
        yield "Only with affine=True."
    if case.norm == "rms":
        yield "No mean is subtracted, no bias added."


def _running(case: Case) -> str:
    shape = (case.reading.channels,)
    if case.norm == "batch":
        return (
            f"running_mean and running_var of shape {shape}. Every call in training moves them a tenth of the way "
            "towards the batch's own (momentum=0.1)."
        )
    if case.norm == "instance":
        return f"none, unless track_running_stats=True: then running_mean and running_var of shape {shape}."
    return "none: nothing is remembered from one call to the next."


def _modes(case: Case) -> str:
    if case.norm == "batch":
        return (
            "differ. Training uses the batch's own statistics, so the samples in a batch affect each other; evaluation "
            "uses the running ones, so a sample's result no longer depends on the others."
        )
    if case.norm == "instance":
        return "the same, unless track_running_stats=True: then evaluation uses the running ones."
    if case.mixes_samples:
        return "the same: always the statistics of the array at hand."
    return f"the same: the result of a {case.reading.noun(case.reading.sample)} never depends on the others."


def _smallest_divisor(n: int) -> int:
    return next((d for d in range(2, int(n**0.5) + 1) if n % d == 0), n)
