"""What a norm does to a shape, in words: who shares a mean, who shares a weight, and what follows for its use.

Everything here is text and numbers drawn from `Layout` and a norm's record; `main` prints it and `figures` draws it.
"""
# ruff: noqa: RUF001 (γ, β and the minus sign are meant)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numbanorm

from ..core.layout import Layout
from ..core.norms import GROUP, NORMS, NormRecord, record_of

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
_GREEK = {"weight": "γ", "bias": "β"}
_KEPT = {"never": "no", "optional": "on request", "usual": "yes"}
_DIFFERS = {"never": "no", "optional": "if running", "usual": "yes"}
"""Whether running statistics are kept, and whether training and evaluation differ, by a record's `tracking`."""


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
        Groups of channels, for a norm that has them.

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
            A key of `numbanorm.core.norms.NORMS`.
        reading : Reading
            The shape, and what its axes stand for.
        num_groups : int, optional
            Groups of channels, for GroupNorm; the smallest number above 1 that divides the channels if None.
        axis : tuple of int, optional
            Axes that norms over axes of the caller's choice normalize, such as LayerNorm; if None, the embedding of a
            token, or else the whole sample.

        Raises
        ------
        ValueError
            If the norm is unknown, or groups or axes do not fit the shape.
        """
        shape, record = reading.shape, record_of(norm)
        if not record.by_channel:
            rest = tuple(a for a in range(len(shape)) if a != reading.sample)
            chosen = axis or ((reading.channel,) if reading.tokens else rest)
            ascending = tuple(sorted(chosen, key=lambda a: a % len(shape)))
            return cls(Layout.of(norm, shape, axis=ascending), reading)
        if not record.grouped:
            return cls(Layout.of(norm, shape, channel_axis=reading.channel), reading)
        groups = _smallest_divisor(shape[reading.channel]) if num_groups is None else num_groups
        return cls(Layout.of(norm, shape, channel_axis=reading.channel, num_groups=groups), reading, groups)

    @property
    def record(self) -> NormRecord:
        """What is to be known of the norm."""
        return self.layout.record

    @property
    def title(self) -> str:
        """Name of the norm's class."""
        return self.record.title

    @property
    def name(self) -> str:
        """Name of the norm's class, with the number of groups if it has any."""
        return self.title if self.num_groups is None else f"{self.title} ({counted(self.num_groups, GROUP)})"

    @property
    def normalized(self) -> str:
        """What is normalized at a time, as a phrase: ``"each channel by itself"``."""
        return f"each {self.one} by itself" if self.one else "the whole array at once"

    @property
    def statistics(self) -> tuple[str, ...]:
        """What is shared by the elements that share a mean."""
        if self.record.centred:
            return ("mean", "variance")
        return ("mean square",) if self.record.scale == "std" else ("Euclidean norm",)

    @property
    def parameters(self) -> tuple[str, ...]:
        """What is shared by the elements that share a weight."""
        return self.record.parameters

    @property
    def weights(self) -> int:
        """Number of weights."""
        return prod(self.layout.affine_shape)

    @property
    def weighted_axes(self) -> tuple[int, ...]:
        """Axes along which the weight varies; none for one weight that serves all elements."""
        if not self.record.affine_roles:
            return ()
        axes = (self.reading.channel,) if self.record.by_channel else self.layout.reduced_axes
        if not self.record.weights_by_sample:
            return axes
        return (*[axis for axis in range(len(self.layout.shape)) if axis not in axes][:1], *axes)

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
        """The call that makes this norm: by its own name where it has one, or else by the one for every norm."""
        kind, shape, channel = self.record.kind, self.layout.shape, self.reading.channel
        layer = f"nn.{self.title}(" if hasattr(numbanorm, self.title) else f'nn.Norm("{kind}", '
        ndim, axes = len(shape), self.layout.reduced_axes
        if self.record.by_channel:
            groups = "" if self.num_groups is None else f"{self.num_groups}, "
            where = "" if channel == 1 else f", channel_axis={-1 if channel == ndim - 1 else channel}"
            return f"{layer}{groups}{self.reading.channels}{where})"
        lengths = tuple(shape[a] for a in axes)
        normalized = str(lengths[0]) if len(lengths) == 1 else str(lengths)
        if axes == tuple(range(ndim - len(axes), ndim)):
            return f"{layer}{normalized})"
        function = f"nn.{kind}_norm(" if hasattr(numbanorm, f"{kind}_norm") else f'nn.normalize("{kind}", '
        return f"{function}x, {normalized}, axis={axes})"


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
    yield "Formula", _formula(case.record)
    yield "Normalized", case.normalized
    yield (
        "Averaged over" if case.record.scale == "std" else "Summed over",
        f"{case.averaged}: {counted(layout.count, 'element')} for each {case.statistics[0]}",
    )
    yield "Statistics", listed([counted(layout.groups, thing) for thing in case.statistics])
    yield listed(case.parameters).capitalize(), " ".join(_parameters(case))
    yield "Running statistics", _running(case)
    yield "Train and eval", _modes(case)
    yield "In code", case.code
    if layout.count == 1:
        yield "Beware", f"with this shape every element is alone: {_alone(case.record)}"


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
    yield "running stats", [_KEPT[case.record.tracking] for case in cases]
    yield "train ≠ eval", [_DIFFERS[case.record.tracking] for case in cases]


def textbook(*others: str) -> list[str]:
    """Return the norms that textbooks put side by side, in their order, and then the others that are not among them."""
    return list(dict.fromkeys([*(kind for kind, record in NORMS.items() if record.textbook), *others]))


def counted(n: int, thing: str) -> str:
    """Write how many there are of something: ``"1 mean"``, ``"4,096 elements"``."""
    plural = "" if n == 1 else "es" if thing.endswith("s") else "s"
    return f"{n:,} {thing}{plural}"


def listed(words: Sequence[str]) -> str:
    """Write words as a list: ``"sample, row and column"``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _formula(record: NormRecord) -> str:
    above = "(x − mean)" if record.centred else "x"
    spread = "variance" if record.centred else "mean of x²"
    below = f"√({spread} + ε)" if record.scale == "std" else "max(‖x‖₂, ε)"
    return f"y = {above} / {below} · γ{' + β' * record.bias}"


def _alone(record: NormRecord) -> str:
    if record.tracks:
        return "it has no variance, and numbanorm refuses to normalize with such statistics (ValueError)."
    greek = listed([_GREEK[name] for name in record.parameters])
    return (
        f"it has no variance and becomes 0 before {greek}." if record.centred else f"it becomes 1 or −1 before {greek}."
    )


def _company(case: Case) -> str:
    if not case.mixes_samples:
        return "no"
    return "in training" if case.record.tracking == "usual" else "yes"


def _parameters(case: Case) -> Iterator[str]:
    record = case.record
    one = listed([f"one {_GREEK[name]}" for name in record.parameters])
    nouns = [case.reading.noun(axis) for axis in case.weighted_axes]
    yield f"shape {case.layout.affine_shape}: {one} for {f'each {listed(nouns)}' if nouns else 'the whole array'},"
    yield f"shared by {counted(case.sharers, 'element')}."
    if not record.affine_by_default:
        yield f"Only with {'affine' if record.by_channel else 'elementwise_affine'}=True."
    missing = ["No mean is subtracted"] * (not record.centred) + ["no bias added"] * (not record.bias)
    if missing:
        yield f"{', '.join(missing).capitalize()}."


def _running(case: Case) -> str:
    both = f"running_mean and running_var of shape {(case.reading.channels,)}."
    match case.record.tracking:
        case "usual":
            return (
                f"{both} Every call in training moves them a tenth of the way towards the batch's own (momentum=0.1)."
            )
        case "optional":
            return f"none, unless track_running_stats=True: then {both}"
        case _:
            return "none: nothing is remembered from one call to the next."


def _modes(case: Case) -> str:
    match case.record.tracking:
        case "usual":
            mixed, alone = "", ""
            if case.mixes_samples:
                mixed = ", so the samples in a batch affect each other"
                alone = ", so a sample's result no longer depends on the others"
            return f"differ. Training uses the batch's own statistics{mixed}; evaluation uses the running ones{alone}."
        case "optional":
            return "the same, unless track_running_stats=True: then evaluation uses the running ones."
        case _ if case.mixes_samples:
            return "the same: always the statistics of the array at hand."
        case _:
            return f"the same: the result of a {case.reading.noun(case.reading.sample)} never depends on the others."


def _smallest_divisor(n: int) -> int:
    return next((d for d in range(2, int(n**0.5) + 1) if n % d == 0), n)
