"""Pictures of a norm: the array as a block of (N, C, space), coloured by who shares a mean and who a weight.

The colours are read from `Layout.statistic` and `Layout.weight` and never drawn by hand, so a picture cannot disagree
with what the kernels compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from .explain import Case, counted, listed

MEAN, WEIGHT, OTHER = "#0072b2", "#e69f00", "#f3f3ee"
"""Blue and orange, apart in every kind of colour vision and in grey; and pale for all other elements."""

_INK, _GRID = "#303030", "#c9c9c2"
_HEAD, _FOOT = 0.85, 0.55  # inches

MAPS = ("statistic", "weight")

FORMATS: dict[str, dict[str, Any]] = {".png": {"Software": None}, ".svg": {"Date": None}}
"""Suffixes that pictures are written with, and what each leaves out so that the same picture gives the same file."""

MOST = 8
"""Boxes drawn along an edge, at most."""

# Where one step along N, C and space goes on paper. The first element stands at the corner next to the reader, so that
# the groups which it belongs to are always in sight.
_STEPS = np.array([(-0.8, 0.4), (0.8, 0.4), (0.0, -0.9)])
_SIDES = ((0, 1, 1.0), (0, 2, 0.84), (1, 2, 0.92))
"""The sides in sight: the edges along which each runs, and its light."""


@dataclass(frozen=True)
class Block:
    """The part of an array that is drawn, as a block with three edges: samples, channels and space.

    Attributes
    ----------
    case : Case
        The norm and the shape.
    picks : tuple of tuple of int
        The indices that are drawn of each axis of the shape, evenly spread.
    statistic, weight : ndarray of int
        Which mean and which weight each drawn element uses.

    Examples
    --------
    >>> from numbanorm.cli.explain import Reading
    >>> block = Block.of(Case.of("batch", Reading.of((2, 3, 1, 2))))
    >>> block.statistic[:, :, 0].tolist()
    [[0, 1, 2], [0, 1, 2]]
    """

    case: Case
    picks: tuple[tuple[int, ...], ...]
    statistic: NDArray[np.int64]
    weight: NDArray[np.int64]

    @classmethod
    def of(cls, case: Case, groups: int = 1) -> Block:
        """Choose what is drawn of a case, whole groups of channels if there are any, and look up its maps."""
        shape, reading = case.layout.shape, case.reading
        picks: list[tuple[int, ...]] = [()] * len(shape)
        for edge in reading.edges:
            parts = [groups, shape[edge[0]] // groups] if edge == (reading.channel,) else [shape[a] for a in edge]
            spread = [_spread(length, n) for length, n in zip(parts, _drawn(parts), strict=True)]
            if edge == (reading.channel,):
                spread = [tuple(group * parts[1] + channel for group in spread[0] for channel in spread[1])]
            for axis, pick in zip(edge, spread, strict=True):
                picks[axis] = pick
        index = np.meshgrid(*picks, indexing="ij")
        order = [axis for edge in reading.edges for axis in edge]
        lengths = [prod(len(picks[axis]) for axis in edge) for edge in reading.edges]
        statistic, weight = (
            found.transpose(order).reshape(lengths)
            for found in (case.layout.statistic(*index), case.layout.weight(*index))
        )
        return cls(case, tuple(picks), statistic, weight)

    @property
    def omitted(self) -> str:
        """What is left out of the picture, or an empty string."""
        parts = zip(self.case.reading.names, self.picks, self.case.layout.shape, strict=True)
        return ", ".join(
            f"{len(pick)} of {length:,} along {name}" for name, pick, length in parts if len(pick) < length
        )


def draw(cases: Sequence[Case]) -> Figure:
    """Draw who shares the first mean, and who shares the first weight.

    Parameters
    ----------
    cases : sequence of Case
        Norms, all over one shape. One norm gets its two blocks next to each other, several a column each.

    Returns
    -------
    matplotlib.figure.Figure
        The picture.
    """
    single = len(cases) == 1
    groups = max(case.num_groups or 1 for case in cases)
    blocks = [Block.of(case, groups) for case in cases]
    panels = [(block, which) for which in MAPS for block in blocks]
    columns = 2 if single else len(cases)
    # Everything is placed in inches, from the top down; `unit` is the length of one step.
    n, c, s = blocks[0].statistic.shape
    across, upright = (n + c) * _STEPS[1, 0], (n + c) * _STEPS[1, 1] - s * _STEPS[2, 1]
    middle = np.array([(c - n) / 2 * _STEPS[1, 0], upright / 2 + s * _STEPS[2, 1]])
    short = all(case.record.centred for case in cases)  # "mean", where others say "Euclidean norm"
    width = 4.8 if single else 3.3 if short else 4.2
    unit = min(0.42, 0.8 * width / across, 2.9 / upright)
    block_height = upright * unit + 0.4
    row_height = block_height + (0.95 if single else 1.3)
    height = _HEAD + len(panels) // columns * row_height + _FOOT
    figure = Figure(figsize=(width * columns, height))
    for i, (block, which) in enumerate(panels):
        row, column = divmod(i, columns)
        top = height - _HEAD - row * row_height
        question = _question(block.case, which)
        if not single and column == 0:
            figure.text(0.5, (top - 0.1) / height, question, ha="center", va="top", size=12, color=_INK)
        bottom = top - row_height + 0.65
        place = figure.add_axes((column / columns, bottom / height, 1 / columns, block_height / height))
        reach = np.array([width, block_height]) / 2 / unit
        (left, lowest), (right, highest) = middle - reach, middle + reach
        place.set(xlim=(left, right), ylim=(lowest, highest))
        place.set_axis_off()
        place.set_title(question if single else block.case.name, size=11, weight="bold", color=_INK)
        _panel(place, block, which)
    _words(figure, blocks[0], [case.name for case in cases])
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a picture as its suffix says; the same picture gives the same file.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        The picture.
    path : Path
        Where to write it, with one of the suffixes in `FORMATS`.
    """
    metadata = FORMATS[path.suffix.lower()]
    with mpl.rc_context({"svg.hashsalt": "numbanorm"}):
        figure.savefig(path, dpi=120, metadata=metadata)


def _drawn(lengths: Sequence[int]) -> list[int]:
    """Return how many of each axis to draw so that all of them together, as one edge, are at most `MOST`."""
    drawn = [1] * len(lengths)
    grown = True
    while grown:
        grown = False
        for i in reversed(range(len(lengths))):
            wanted = min(lengths[i], 2 * drawn[i])
            if drawn[i] < wanted and prod(drawn) // drawn[i] * wanted <= MOST:
                drawn[i], grown = wanted, True
    return drawn


def _spread(length: int, n: int) -> tuple[int, ...]:
    return tuple(i * (length - 1) // max(n - 1, 1) for i in range(n))


def _panel(place: Axes, block: Block, which: str) -> None:
    """Draw one block, the names of its edges and its legend."""
    group, colour = (block.statistic, MEAN) if which == "statistic" else (block.weight, WEIGHT)
    for first, second, light in _SIDES:
        side = np.asarray(group.take(0, axis=3 - first - second))
        corners = _corners(side.shape, first, second)
        cells = np.stack([corners[:-1, :-1], corners[1:, :-1], corners[1:, 1:], corners[:-1, 1:]], axis=2)
        colours = np.where((side == group[0, 0, 0])[..., None], to_rgb(colour), to_rgb(OTHER)) * light
        boxes = list(cells.reshape(-1, 4, 2))
        place.add_collection(
            PolyCollection(boxes, facecolors=colours.reshape(-1, 3), edgecolors=_GRID, linewidths=0.5, gid=which)
        )
        place.add_collection(LineCollection(_borders(side, corners), colors=_INK, linewidths=1.0))
        outline = corners[[0, 0, -1, -1, 0], [0, -1, -1, 0, 0]]
        place.plot(*outline.T, color=_INK, linewidth=1.4, solid_joinstyle="round")
    _name_edges(place, block)
    place.legend(
        [Rectangle((0, 0), 1, 1, facecolor=colour, edgecolor=_INK)],
        [_legend(block.case, which)],
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        borderaxespad=0,
        frameon=False,
        handlelength=1,
        handleheight=1,
        fontsize=9.5,
        labelcolor=_INK,
    )


def _corners(shape: tuple[int, ...], first: int, second: int) -> NDArray[np.float64]:
    i, j = np.indices((shape[0] + 1, shape[1] + 1))
    return np.asarray(i[..., None] * _STEPS[first] + j[..., None] * _STEPS[second])


def _borders(side: NDArray[np.int64], corners: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Return the lines between neighbours of different groups."""
    down, across = side[1:] != side[:-1], side[:, 1:] != side[:, :-1]
    lines = np.stack([corners[1:-1, :-1], corners[1:-1, 1:]], axis=2)[down]
    return [*lines, *np.stack([corners[:-1, 1:-1], corners[1:, 1:-1]], axis=2)[across]]


def _name_edges(place: Axes, block: Block) -> None:
    n, _, s = block.statistic.shape
    slope = np.degrees(np.arctan2(_STEPS[1, 1], _STEPS[1, 0]))
    foot, left = s * _STEPS[2], n * _STEPS[0]
    # Names start at the corner next to the reader, so that long names of short edges do not meet.
    places = [
        (foot, (-9, -6), -slope, "right"),
        (foot, (9, -6), slope, "left"),
        (left + foot / 2, (-8, 0), 90, "center"),
    ]
    if s < 4:
        places[2] = (left, (-2, 8), 0, "right")
    for name, (at, offset, rotation, align) in zip(block.case.reading.edge_labels, places, strict=True):
        place.annotate(
            name,
            at,
            offset,
            textcoords="offset points",
            rotation=rotation,
            rotation_mode="anchor",
            ha=align,
            va="center",
            size=9,
            color=_INK,
        )


def _question(case: Case, which: str) -> str:
    shared = case.statistics if which == "statistic" else case.parameters
    return f"Which elements share {listed([f'a {thing}' for thing in shared])}?"


def _legend(case: Case, which: str) -> str:
    if which == "statistic":
        total, sharers, shared = case.layout.groups, case.layout.count, case.statistics
    else:
        total, sharers, shared = case.weights, case.sharers, case.parameters
    first = f"these {sharers:,} elements share one" if sharers > 1 else "this element alone has its"
    return f"{first} {shared[0]};\n{listed([counted(total, thing) for thing in shared])} in all"


def _words(figure: Figure, block: Block, names: Sequence[str]) -> None:
    """Write the title above the blocks, and below them how to read them."""
    case, height = block.case, figure.get_figheight()
    array = f"an array ({', '.join(case.reading.names)}) = {case.layout.shape}"
    if len(names) == 1:
        does = "averaging" if case.record.scale == "std" else "summing"
        title, subtitle = f"{names[0]} of {array}", f"normalizes {case.normalized}, {does} over {case.averaged}"
    else:
        title, subtitle = f"{listed(names)}", f"of {array}: two questions tell them apart"
    figure.text(0.5, 1 - 0.18 / height, title, ha="center", va="top", size=14, weight="bold", color=_INK)
    figure.text(0.5, 1 - 0.5 / height, subtitle, ha="center", va="top", size=11, color=_INK)
    notes = ["One box is one element. Dark lines separate the groups; in colour, the group of the first element."]
    if block.omitted:
        notes.append(f"Drawn: {block.omitted}. The numbers are those of the whole array.")
    figure.text(0.5, 0.12 / height, "\n".join(notes), ha="center", va="bottom", size=9, color=_INK)
