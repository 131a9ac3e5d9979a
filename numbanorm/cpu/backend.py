"""The CPU backend: the contract that every backend keeps, as functions of flat arrays and a plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numba import typeof

from ..core.dtypes import Format, format_of
from ..core.plan import Plan
from ..core.threads import launch_lock, usable_threads
from . import along_backward, columns, columns_backward, rows, rows_backward
from .dtypes import kernel_view
from .jit import Kernel
from .launch import CHUNK, TABLE_BYTES, geometry

__all__ = [
    "PARALLEL_FROM",
    "Settled",
    "SettledBackward",
    "apply",
    "backward",
    "forward",
    "piece_gradient",
    "piece_sums",
    "statistics",
]

PARALLEL_FROM = 1 << 17
"""Elements from which a parallel launch pays: 128 Ki float32 take about 60 us on one thread, a launch 2 to 10 us."""

_empty = np.empty

_NO_STATS = np.empty((4, 0))
"""Where the rows kernel writes statistics that nobody wants: of rows of 64 they are an eighth of what it writes."""

SLAB_ELEMENTS = 1 << 16
"""Elements from which a slab pays: clearing and adding its gradients takes as long as about a twentieth of these."""

MAX_SLABS = 64
"""Slabs of samples with gradients of weights of their own: enough for 64 threads."""


def forward(
    plan: Plan,
    x: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    eps: float,
    mask: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    total: np.ndarray | None = None,
    keep: bool = True,
) -> np.ndarray:
    """Normalize `x` into `y` and return its statistics.

    Parameters
    ----------
    plan : Plan
        How the arrays lie in memory.
    x, y : np.ndarray
        Flat spans of the input and the output.
    weight, bias : np.ndarray or None
        Flat, in the lane dtype.
    eps : float
        Added to the variance.
    mask : np.ndarray, optional
        Flat span of bool: where True, the element counts.
    residual, total : np.ndarray, optional
        Rows only: flat span like `x`'s, and a packed array for the sum, which is normalized in place of `x`.
    keep : bool, optional
        False: nobody wants the statistics, and what is returned may hold none.

    Returns
    -------
    np.ndarray
        Rows COUNT, MEAN, M2 and RSTD, a column each group, float64.
    """
    layout = plan.layout
    centred = layout.centred
    geo = geometry(plan, weight is not None or bias is not None, x.itemsize)
    weight, bias = _affine(plan, x, weight, bias)
    x, y = kernel_view(x), kernel_view(y)
    threads = _threads(plan)
    together = not plan.columns and (threads == 1 or layout.groups >= threads)
    stats = _NO_STATS if together and not keep else np.empty((4, layout.groups))
    if plan.columns:
        if threads == 1 or _units(geo) >= threads:
            _run(columns.forward, threads, x, y, mask, weight, bias, stats, geo, eps, centred, _by_row(plan, geo))
        else:
            _split_statistics(plan, geo, threads, x, mask, weight, stats, eps, centred)
            _run(columns.apply, threads, x, y, weight, bias, stats, geo, _by_row(plan, geo))
        return stats
    sums: tuple[Any, Any] = (None, None)
    if residual is not None and total is not None:
        sums = kernel_view(residual), kernel_view(total)
    if together:
        ways = _ways(geo, mask is None)
        _run(rows.forward, threads, x, *sums, y, mask, weight, bias, stats, geo, eps, centred, *ways)
        return stats
    if residual is not None:
        _run(rows.add, threads, x, *sums, geo)
        x = sums[1]
        geo = geo[1:]
    _split_statistics(plan, geo, threads, x, mask, weight, stats, eps, centred)
    _run(rows.apply, threads, x, y, weight, bias, stats, geo)
    return stats


class Settled:
    """`forward` and `apply` on one thread, for C-ordered arrays of one shape and dtype: all else is settled.

    Parameters
    ----------
    plan : Plan
        How the arrays lie in memory.
    form : Format
        Of the input's dtype.
    affine : bool
        Whether there will be a weight or a bias.
    """

    __slots__ = (
        "_adding",
        "_apply",
        "_by_row",
        "_centred",
        "_columns",
        "_flattens",
        "_forward",
        "_geometry",
        "_given",
        "_one",
        "_record",
        "_shape",
        "_ways",
        "_zero",
    )

    def __init__(self, plan: Plan, form: Format, affine: bool) -> None:
        layout = plan.layout
        self._columns = plan.columns
        self._centred = layout.centred
        self._geometry = geometry(plan, affine, form.result.itemsize)
        size = layout.size if affine else 1
        self._one, self._zero = _constant(size, form.lane, 1), _constant(size, form.lane, 0)
        self._shape = (4, layout.groups)
        self._flattens = len(layout.affine_shape) > 1
        self._record = form.record
        kernels = columns if plan.columns else rows
        self._forward = _Compiled(kernels.forward)
        self._adding = _Compiled(kernels.forward)
        self._apply = _Compiled(kernels.apply)
        self._given = _Compiled(rows.given)
        self._ways = _ways(self._geometry, True)
        self._by_row = (_by_row(plan, self._geometry),) if plan.columns else ()

    def forward(
        self,
        x: Any,
        y: Any,
        weight: Any,
        bias: Any,
        eps: float,
        residual: Any = None,
        total: Any = None,
        keep: bool = True,
    ) -> np.ndarray:
        """Do what `forward` does, for flat arrays; `residual` in the rows kernel alone."""
        stats = _empty(self._shape) if keep or self._columns else _NO_STATS
        record = self._record
        if record is not None:
            x, y = x.view(record), y.view(record)
        weight = self._one if weight is None else weight.ravel() if self._flattens else weight
        bias = self._zero if bias is None else bias.ravel() if self._flattens else bias
        if self._columns:
            self._forward.run(x, y, None, weight, bias, stats, self._geometry, eps, self._centred, *self._by_row)
        else:
            if residual is not None and record is not None:
                residual, total = residual.view(record), total.view(record)
            kernel = self._forward if residual is None else self._adding
            kernel.run(
                x, residual, total, y, None, weight, bias, stats, self._geometry, eps, self._centred, *self._ways
            )
        return stats

    def given(self, mean: np.ndarray, var: np.ndarray, eps: float) -> np.ndarray:
        """Return running statistics as `apply` takes them."""
        stats = _empty(self._shape)
        self._given.run(mean, var, stats, eps)
        return stats

    def apply(self, x: Any, y: Any, weight: Any, bias: Any, stats: np.ndarray) -> None:
        """Do what `apply` does, for flat arrays."""
        if self._record is not None:
            x, y = x.view(self._record), y.view(self._record)
        w, b = self._one if weight is None else weight, self._zero if bias is None else bias
        self._apply.run(x, y, w, b, stats, self._geometry, *self._by_row)


class SettledBackward:
    """`backward` on one thread, for C-ordered arrays of one shape and dtype: all else is settled.

    Parameters
    ----------
    plan : Plan
        As `backward` takes it; `settles` is true of it.
    form : Format
        Of the dtype of all arrays.
    """

    __slots__ = ("_centred", "_count", "_geometry", "_kernel", "_lane", "_masks", "_one", "_record", "_shape", "_slabs")

    def __init__(self, plan: Plan, form: Format) -> None:
        layout = plan.layout
        self._centred = layout.centred
        self._geometry = geo = geometry(plan, True, form.result.itemsize)
        self._count = np.full(1, layout.count, np.float64)
        self._one = _constant(layout.size, form.lane, 1)
        self._record = form.record
        self._slabs = _slabs(plan, *_items(plan, geo))
        self._shape, self._lane = (2, layout.size), form.lane
        kernels = columns_backward if plan.columns else along_backward if _is_along(plan) else rows_backward
        self._masks = () if kernels is along_backward else (None,)
        self._kernel = _Compiled(kernels.backward)

    @staticmethod
    def settles(plan: Plan) -> bool:
        """Tell whether one launch does it: not where rows are long, and their weights' gradients too many to hold."""
        return plan.columns or not _is_long(plan)

    def backward(self, dy: Any, x: Any, dx: Any, weight: Any, mean: np.ndarray, rstd: np.ndarray) -> np.ndarray:
        """Write dx and return the gradients of weight and bias, in the lane dtype, shape (2, size)."""
        record = self._record
        if record is not None:
            dy, x, dx = dy.view(record), x.view(record), dx.view(record)
        weight = self._one if weight is None else weight.ravel()
        result = _empty(self._shape, self._lane)
        self._kernel.run(
            dy, x, dx, *self._masks, weight, self._count, mean, rstd, self._slabs, result, self._geometry, self._centred
        )
        return result


def _ways(geo: np.ndarray, whole: bool) -> tuple[bool | None, bool | None, bool | None]:
    """Return `pairs`, `blocks` and `chunks` as the rows kernel takes them; `whole`: without a mask."""
    blocks = whole and bool(geo[0]["blocks"])
    return True if whole and geo[0]["pairs"] else None, True if blocks else None, None if blocks else True


def _is_along(plan: Plan) -> bool:
    """Tell whether each group is one row with weights along it."""
    _, r0, _, r1 = plan.layout.view
    return plan.layout.inner == r0 == 1 and plan.layout.size == r1


def _is_long(plan: Plan) -> bool:
    """Tell whether rows with weights along them are so long that their gradients are taken block by block."""
    layout = plan.layout
    k0, _, _, r1 = layout.view
    return layout.inner == 1 and layout.groups == k0 and layout.count == r1 > CHUNK


def _items(plan: Plan, geo: np.ndarray) -> tuple[int, int]:
    """Return how many items of work a backward has on each set of weights, and how many such sets."""
    k0, _, k1, _ = plan.layout.view
    if not plan.columns:
        return k0, k1
    tiles = _units(geo) // k0
    return (k0 * tiles, 1) if _by_row(plan, geo) else (k0, tiles)


def _by_row(plan: Plan, geo: np.ndarray) -> bool | None:
    """Return, as the columns kernel takes it, whether each row of it has one weight: True or None."""
    return True if plan.layout.inner % int(geo[0]["lanes"]) == 0 else None


class _Compiled:
    """A serial kernel for arguments that have the same types at every call: they are looked up once, not each time.

    Numba's dispatcher takes 0.4 us to look at eleven arguments.
    """

    __slots__ = ("_kernel", "run")

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.run: Callable[..., Any] = self._first

    def _first(self, *arguments: Any) -> None:
        dispatcher: Any = self._kernel.serial
        dispatcher(*arguments)
        self.run = dispatcher.overloads[tuple(map(typeof, arguments))].entry_point


def statistics(plan: Plan, x: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Return the statistics of a flat span as `forward` does, with eps 0."""
    geo = geometry(plan, False)
    weight, _ = _affine(plan, x, None, None)
    stats = np.empty((4, plan.layout.groups))
    _split_statistics(plan, geo, _threads(plan), kernel_view(x), mask, weight, stats, 0.0, plan.layout.centred)
    return stats


def apply(
    plan: Plan,
    x: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    stats: np.ndarray,
) -> None:
    """Normalize `x` into `y` with given statistics."""
    geo = geometry(plan, weight is not None or bias is not None)
    weight, bias = _affine(plan, x, weight, bias)
    arguments = (kernel_view(x), kernel_view(y), weight, bias, stats, geo)
    if plan.columns:
        _run(columns.apply, _threads(plan), *arguments, _by_row(plan, geo))
    else:
        _run(rows.apply, _threads(plan), *arguments)


def backward(
    plan: Plan,
    dy: np.ndarray,
    x: np.ndarray,
    dx: np.ndarray,
    weight: np.ndarray | None,
    mean: np.ndarray,
    rstd: np.ndarray,
    mask: np.ndarray | None = None,
    fixed: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Write dx and return the gradients of weight and bias.

    Parameters
    ----------
    plan : Plan
        How the arrays lie in memory; ``plan.y`` places `dy`. Its layout is separable.
    dy, x : np.ndarray
        Flat spans of the output's gradient and of the input.
    dx : np.ndarray
        Packed array for the input's gradient.
    weight : np.ndarray or None
        Flat, in the lane dtype.
    mean, rstd : np.ndarray
        Of every group, float64; `mean` may be one element for all.
    mask : np.ndarray, optional
        Flat span of bool: where True, the element counted.
    fixed : bool, optional
        True: the statistics do not depend on `x`.

    Returns
    -------
    dweight, dbias : np.ndarray, shape (size,)
        In the lane dtype, or in float64; dbias may be empty where there is no mean.
    """
    layout = plan.layout
    geo = geometry(plan, True, x.itemsize)
    weight = _constant(layout.size, _lane(x), 1) if weight is None else weight
    threads = _threads(plan)
    if mask is None:
        count = np.full(1, 0.0 if fixed else layout.count)
    else:
        count = np.empty(layout.groups)
        _run(rows.count, threads, mask, count, geo)
    data = (kernel_view(dy), kernel_view(x))
    out = kernel_view(dx)
    stats = (count, mean, rstd)
    k0, _, k1, _ = layout.view
    if plan.columns:
        tiles = _units(geo) // k0
        if threads > 1 and not _by_row(plan, geo) and k0 == 1 and tiles < threads:
            chunks = int(geo[0]["chunks"])
            table = np.zeros((tiles, chunks, 2, int(geo[0]["tile"])))
            total = np.zeros((2, layout.size))
            _run(columns_backward.chunk_sums, threads, *data, weight, *stats, table, geo)
            _run(columns_backward.emit, threads, *data, out, mask, weight, *stats, table, total, geo, layout.centred)
            return total[0], total[1]
        result = np.empty((2, layout.size), weight.dtype)
        slabs = _slabs(plan, *_items(plan, geo))
        _run(columns_backward.backward, threads, *data, out, mask, weight, *stats, slabs, result, geo, layout.centred)
        return result[0], result[1]
    long = _is_long(plan)
    one_channel = k0 == 1 and layout.inner != 1 and layout.size == k1
    if long or (one_channel and threads > 1 and k1 < threads):
        table = np.empty((layout.groups, int(geo[0]["chunks"]), 2))
        sums = np.empty((2, layout.groups))
        # A group of one channel is summed without its weight: these sums are the gradients too.
        factor = weight if long else _constant(layout.size, _lane(x), 1)
        _run(rows_backward.chunk_sums, threads, *data, factor, *stats, table, geo)
        _run(rows_backward.merge_sums, 1, table, sums)
        if long:
            dweight = np.empty(layout.size, weight.dtype)
            dbias = np.empty(layout.size if layout.centred else 0, weight.dtype)
            ends = (sums, dweight, dbias, geo, layout.centred)
            _run(rows_backward.emit_lanes, threads, *data, out, mask, weight, *stats, *ends)
            return dweight, dbias
        with np.errstate(all="ignore"):
            weighted = sums * weight
        _run(rows_backward.emit, threads, *data, out, mask, weight, *stats, weighted, geo, layout.centred)
        return sums[1], sums[0]
    result = np.empty((2, layout.size), weight.dtype)
    slabs = _slabs(plan, *_items(plan, geo))
    into = (slabs, result, geo, layout.centred)
    if mask is None and not fixed and _is_along(plan):
        _run(along_backward.backward, threads, *data, out, weight, *stats, *into)
    else:
        _run(rows_backward.backward, threads, *data, out, mask, weight, *stats, *into)
    return result[0], result[1]


@np.errstate(all="ignore")
def piece_sums(
    plan: Plan, dy: np.ndarray, x: np.ndarray, weight: np.ndarray | None, mean: np.ndarray, rstd: np.ndarray
) -> np.ndarray:
    """Return the sums of ``g`` and ``g * (x - mean) * rstd`` over every group of a piece, float64, shape (2, groups).

    Parameters
    ----------
    plan : Plan
        As for `backward`; for the columns kernel with K0 of 1.
    dy, x : np.ndarray
        Flat spans.
    weight : np.ndarray or None
        For weights along the runs: flat, in the lane dtype; ``g`` is dy times it, and otherwise dy.
    mean, rstd : np.ndarray
        Of every group, float64; `mean` may be one element for all.
    """
    layout = plan.layout
    geo = geometry(plan, True)
    chunks = int(geo[0]["chunks"])
    threads = _threads(plan)
    if weight is None:
        weight = _constant(layout.size, _lane(x), 1)
    arguments = (kernel_view(dy), kernel_view(x), weight, np.ones(1), mean, rstd)
    if plan.columns:
        table = np.zeros((_units(geo), chunks, 2, int(geo[0]["tile"])))
        _run(columns_backward.chunk_sums, threads, *arguments, table, geo)
        lanes = table.sum(axis=1).transpose(1, 0, 2).reshape(2, -1)
        sums = np.zeros((2, layout.groups))
        for total, row in zip(sums, lanes, strict=True):
            np.add.at(total, _group_of_lanes(plan, geo), row[: int(geo[0]["lanes"])])
        return sums
    table = np.empty((layout.groups, chunks, 2))
    sums = np.empty((2, layout.groups))
    _run(rows_backward.chunk_sums, threads, *arguments, table, geo)
    _run(rows_backward.merge_sums, 1, table, sums)
    return sums


@np.errstate(all="ignore")
def piece_gradient(
    plan: Plan,
    dy: np.ndarray,
    x: np.ndarray,
    dx: np.ndarray,
    weight: np.ndarray | None,
    mean: np.ndarray,
    rstd: np.ndarray,
    means: np.ndarray,
    mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Write dx of a piece from the means over whole groups of what `piece_sums` sums, shape (2, groups).

    Returns the gradients of weight and bias where weights lie along the runs, empty arrays otherwise.
    """
    layout = plan.layout
    geo = geometry(plan, True)
    threads = _threads(plan)
    if weight is None:
        weight = _constant(layout.size, _lane(x), 1)
    arguments = (kernel_view(dy), kernel_view(x), kernel_view(dx), mask, weight, np.ones(1), mean, rstd)
    if plan.columns:
        # The kernel adds up the lanes of a group: its sums go to the group's first lane of the first chunk.
        table = np.zeros((_units(geo), int(geo[0]["chunks"]), 2, int(geo[0]["tile"])))
        groups, first = np.unique(_group_of_lanes(plan, geo), return_index=True)
        tile, lane = np.divmod(first, int(geo[0]["tile"]))
        table[tile, 0, :, lane] = means[:, groups].T
        _run(columns_backward.emit, threads, *arguments, table, np.zeros((2, layout.size)), geo, layout.centred)
        return np.empty(0), np.empty(0)
    if layout.norm in ("layer", "rms"):
        dweight = np.empty(layout.size, weight.dtype)
        dbias = np.empty(layout.size if layout.centred else 0, weight.dtype)
        _run(rows_backward.emit_lanes, threads, *arguments, means, dweight, dbias, geo, layout.centred)
        return dweight, dbias
    weighted = (means.reshape(2, -1, layout.view[2]) * _of_groups(plan, weight)).reshape(2, -1)
    _run(rows_backward.emit, threads, *arguments, weighted, geo, layout.centred)
    return np.empty(0), np.empty(0)


def _of_groups(plan: Plan, weight: np.ndarray) -> np.ndarray:
    """Return the weight of every group of one k0, for norms whose groups are of one channel each."""
    _, _, k1, r1 = plan.layout.view
    return weight[np.arange(k1) * r1 // plan.layout.inner % plan.layout.size]


def _group_of_lanes(plan: Plan, geo: np.ndarray) -> np.ndarray:
    """Return the group of every lane of the columns kernel, where K0 is 1."""
    _, _, k1, r1 = plan.layout.view
    return np.arange(int(geo[0]["lanes"])) // r1 % k1


def _slabs(plan: Plan, items: int, own: int) -> int:
    """Return into how many slabs, from the shape alone, a backward cuts `items` of work on `own` sets of weights."""
    return max(1, min(items, MAX_SLABS // own, TABLE_BYTES // (16 * plan.layout.size), plan.size // SLAB_ELEMENTS))


def _split_statistics(
    plan: Plan,
    geo: np.ndarray,
    threads: int,
    x: np.ndarray,
    mask: np.ndarray | None,
    weight: np.ndarray,
    stats: np.ndarray,
    eps: float,
    centred: bool,
) -> None:
    """Take statistics chunk by chunk, in parallel, and merge the chunks in order."""
    chunks = int(geo[0]["chunks"])
    if plan.columns:
        table = np.empty((_units(geo), chunks, 3, int(geo[0]["tile"])))
        _run(columns.moments, threads, x, mask, weight, table, geo, centred)
        _run(columns.merge_chunks, 1, mask, table, stats, geo, eps)
    else:
        table = np.empty((plan.layout.groups, chunks, 3))
        _run(rows.moments, threads, x, mask, table, geo, centred)
        _run(rows.merge_chunks, 1, table, stats, geo, eps)


def _run(kernel: Kernel, threads: int, *arguments: Any) -> None:
    if threads == 1 or (lock := launch_lock()).locked():
        kernel.serial(*arguments)
    else:
        with lock:
            kernel.parallel(*arguments)


def _threads(plan: Plan) -> int:
    return usable_threads() if plan.size >= PARALLEL_FROM else 1


def _affine(
    plan: Plan, x: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Put ones and zeros in the place of an absent weight and bias; one of each where both are absent."""
    if weight is not None and bias is not None:
        return weight, bias
    size = 1 if weight is bias else plan.layout.size
    return _constant(size, _lane(x), 1) if weight is None else weight, _constant(
        size, _lane(x), 0
    ) if bias is None else bias


def _lane(x: np.ndarray) -> Any:
    form = format_of(x.dtype)
    assert form is not None
    return form.lane


@lru_cache(maxsize=64)
def _constant(size: int, dtype: Any, value: int) -> np.ndarray:
    return np.full(size, value, dtype)


def _units(geo: np.ndarray) -> int:
    """Return the tiles of the columns kernel."""
    g = geo[0]
    return int(g["K0"]) * -(-int(g["lanes"]) // int(g["tile"]))
