"""Blocks: how an array that does not fit in memory is cut up. Arithmetic on shapes only.

A *tile* holds whole groups (all elements that share a mean). A *block* is what is in memory at once: the whole tile
where that fits, which then is read once; or a part of it, and the tile is read twice, for its statistics and to be
normalized. Both are boxes of equal extents, laid out as a grid, cut short at the far edges.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

Region = tuple[slice, ...]

RUN = 1 << 17
"""Bytes that lie side by side in a file from which reading them one by one costs no more than reading all."""

MOST_GROUPS = 1 << 20
"""Groups a tile, where it is more than one block: their statistics (24 bytes each, and as much again to merge) are kept
in memory."""


@dataclass(frozen=True)
class Axes:
    """The axes of an array in a file, and what a norm asks of them.

    Attributes
    ----------
    shape : tuple of int
        Their lengths.
    order : tuple of int
        Axes from the slowest to the fastest in the file.
    reduced : frozenset of int
        Axes along which whole groups extend.
    unit : tuple of int
        Extents of which blocks are multiples: 1, or those of a store's chunks.
    group_unit : tuple of int
        The same for tiles: where groups are parts of an axis (channels of group norm), no tile may cut one.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    reduced: frozenset[int]
    unit: tuple[int, ...]
    group_unit: tuple[int, ...]

    def extents(self, budget: int, run: int = 1, one_tile: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the extents of tiles and of blocks; they are equal where one read is enough.

        Parameters
        ----------
        budget : int
            Elements a block may have. Its unit may be larger.
        run : int, optional
            Elements that should lie side by side in the file.
        one_tile : bool, optional
            True: the whole array is one tile, for statistics.

        Examples
        --------
        >>> rows = Axes((1000, 64), (0, 1), frozenset({1}), (1, 1), (1, 1))
        >>> rows.extents(6400)
        ((100, 64), (100, 64))
        >>> rows.extents(40)
        ((1, 64), (1, 40))
        """
        shape = self.shape
        if 0 in shape:
            return (1,) * len(shape), (1,) * len(shape)
        fast = self.order[::-1]
        least = [n if a in self.reduced else min(self.group_unit[a], n) for a, n in enumerate(shape)]
        kept = [a for a in fast if a not in self.reduced]
        tile = list(shape)
        if not one_tile:
            if prod(least) <= budget:
                tile = _grown(least, kept, shape, self.group_unit, budget)
                if self._run(tile) >= min(run, prod(tile)):
                    return tuple(tile), tuple(tile)
            tile = self._side_by_side(least, kept)
        block = _grown([min(u, n) for u, n in zip(self.unit, tile, strict=True)], list(fast), tile, self.unit, budget)
        return tuple(tile), tuple(block)

    def _side_by_side(self, least: list[int], kept: list[int]) -> list[int]:
        """Return the smallest tile that lies in one run, or the largest whose groups may be kept."""
        tile = list(least)
        for a in kept:
            if self._run(tile) == prod(tile):
                break
            others = prod(tile[b] for b in kept if b != a)
            fits = MOST_GROUPS // (others * self.group_unit[a]) * self.group_unit[a]
            tile[a] = min(self.shape[a], max(fits, tile[a]))
            if tile[a] < self.shape[a]:
                break
        return tile

    def _run(self, extents: list[int]) -> int:
        """Return how many elements of a box lie side by side in the file."""
        run = 1
        for a in self.order[::-1]:
            run *= extents[a]
            if extents[a] < self.shape[a]:
                break
        return run


def _grown(
    start: list[int], axes: list[int], shape: list[int] | tuple[int, ...], unit: tuple[int, ...], budget: int
) -> list[int]:
    """Return a box grown along axes, one after the other and each to its end before the next, within a budget."""
    box = list(start)
    for a in axes:
        others = prod(box) // box[a]
        box[a] = min(shape[a], max(budget // (others * unit[a]) * unit[a], box[a]))
        if box[a] < shape[a]:
            break
    return box


def regions(within: Region, extents: tuple[int, ...], order: tuple[int, ...]) -> Iterator[Region]:
    """Cut a region into a grid of boxes, in the order of the file.

    Examples
    --------
    >>> for region in regions((slice(0, 3), slice(0, 2)), (2, 2), (0, 1)):
    ...     print(region)
    (slice(0, 2, None), slice(0, 2, None))
    (slice(2, 3, None), slice(0, 2, None))
    """
    cuts = [
        [slice(at, min(at + extents[a], within[a].stop)) for at in range(within[a].start, within[a].stop, extents[a])]
        for a in order
    ]
    place = [order.index(a) for a in range(len(order))]
    for box in product(*cuts):
        yield tuple(box[i] for i in place)


def whole(shape: tuple[int, ...]) -> Region:
    """Return the region that is all of an array."""
    return tuple(slice(0, n) for n in shape)


def length(part: slice) -> int:
    """Return the extent of a region along one axis."""
    return int(part.stop - part.start)
