"""Files larger than memory: norms and statistics of arrays in .npy files and Zarr folders.

A file is read in blocks of a few MB into memory that is used again, so the process stays as small as it is whatever the
file's size; one thread reads, one computes, one writes. Kernels use one thread: it computes at 15 GB/s, a disk reads at
1 to 5, and threads that wait for cores on which the others read and write made a file of 1 GB take 4 s instead of 0.8.
What is written appears under its name when all of it is on the disk, and not before.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import lcm, prod
from pathlib import Path
from typing import Any

import numpy as np

from ..calls import arrays
from ..calls.check import check_eps, check_float, check_shape, check_shared_weights, integers, positive
from ..calls.prepared import prepared_for
from ..core.dtypes import Format, format_of
from ..core.norms import NormRecord, record_of
from ..core.spec import spec_of
from ..core.threads import serial
from ..stats.moments import Moments
from ..stats.partials import normalize
from .atomic import check_target, replacing
from .blocks import RUN, Axes, Region, length, regions, whole
from .maps import Maps
from .opening import open_source
from .stores import NpySink, Sink, Source, is_zarr

__all__ = ["apply", "stats"]

Progress = Callable[[int, int], None]

_Given = tuple[np.ndarray, np.ndarray]
"""Mean and variance of each channel, which a caller gives in place of the file's own."""

BLOCK = 4 << 20
"""Bytes a block. Five are in use at once; more brings nothing, and cores' caches hold no more."""

_BUFFERS = 5
_AHEAD = 2


def apply(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    norm: str,
    normalized_shape: Any = None,
    num_groups: int | None = None,
    weight: Any = None,
    bias: Any = None,
    eps: float | None = None,
    *,
    axis: Any = None,
    channel_axis: int = 1,
    running_mean: Any = None,
    running_var: Any = None,
    moments: Moments | None = None,
    block: int = BLOCK,
    progress: Progress | None = None,
) -> None:
    """Normalize an array in a file into another file, or into the same.

    Parameters
    ----------
    source : str or path
        A .npy file (any version, byte order and memory order), or the folder of a Zarr array.
    target : str or path
        A name that ends in .npy or .zarr; may be the source. It appears, or is replaced, when all of it is on the disk.
    norm : str
        ``"batch"``, ``"layer"``, ``"instance"``, ``"group"``, ``"rms"``, ``"l2"``, or one that was registered.
    normalized_shape : int or tuple of int, optional
        For layer, RMS and L2 norm: lengths of the normalized axes.
    num_groups : int, optional
        For group norm, which needs it.
    weight, bias : array_like, optional
        gamma and beta, shape (C,), or that of the normalized axes; of a norm with one weight for all, shape ().
    eps : float, optional
        Added to the variance (L2 norm: the least divisor); if None, what is usual for the norm, 1e-5 for most; for RMS
        norm it is the machine epsilon of the result's dtype.
    axis : int or tuple of int, optional
        For layer, RMS and L2 norm: the normalized axes; the last ones if None, and the last one without
        `normalized_shape`.
    channel_axis : int, optional
        For batch, instance and group norm: axis of the channels.
    running_mean, running_var : array_like, shape (C,), optional
        For batch norm: what to normalize with, in place of the file's own statistics.
    moments : Moments, optional
        The same, as `stats` returns it; its (biased) variance is used.
    block : int, optional
        Bytes that are read at once.
    progress : callable, optional
        Called with the bytes that are done and those there are in all.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or the source is damaged; the target is as it was.
    OSError
        If reading or writing fails; the target is as it was.

    Notes
    -----
    The result's dtype is that of `numbanorm.layer_norm` and the others. bfloat16 lies in a .npy file as ``V2``, as
    `numpy.save` writes it. Where all that shares a mean fits in a block the source is read once, otherwise twice.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> np.save(folder / "x.npy", np.array([[1.0, 3.0], [10.0, 30.0]]))
    >>> apply(folder / "x.npy", folder / "y.npy", "layer", eps=0.0)
    >>> np.load(folder / "y.npy")
    array([[-1.,  1.],
           [-1.,  1.]])
    """
    file = open_source(source)
    place = Path(target)
    as_zarr = is_zarr(place, file)
    record = record_of(norm)
    given = _given(record, running_mean, running_var, moments)
    maps = Maps.of(record, file.shape, normalized_shape, num_groups, axis, channel_axis)
    work = _Work(file, maps, {"weight": weight, "bias": bias}, eps, given)
    check_target(place, folder=as_zarr)
    if as_zarr and place.exists() and any(place.iterdir()):
        open_source(place)  # nothing but a Zarr array is replaced
    itemsize = max(file.dtype.itemsize, work.form.result.itemsize)
    budget = max(positive(block, "block") // itemsize, 1)
    run = RUN // itemsize if file.runs or not as_zarr else 1
    tile, part = work.axes.extents(budget, run)
    steps = _steps(work.axes, tile, part)
    meter = _Meter(progress, prod(file.shape) * file.dtype.itemsize * (1 if tile == part else 2))
    with (
        replacing(place, folder=as_zarr) as scratch,
        file,
        _sink(scratch, as_zarr, file, work.form.result, part) as sink,
    ):
        _stream(file, steps, prod(part), work, sink.write, meter)


def stats(
    source: str | os.PathLike[str],
    axis: int | tuple[int, ...] | None = None,
    *,
    block: int = BLOCK,
    progress: Progress | None = None,
) -> Moments:
    """Take the moments of an array in a file, in one read.

    Parameters
    ----------
    source : str or path
        As for `apply`.
    axis : int or tuple of int, optional
        The axes along which to take them; all if None.
    block, progress
        As for `apply`.

    Returns
    -------
    Moments
        Count, mean and variance of the elements along the axes, as `Moments.of` gives them in memory.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or the source is damaged.
    OSError
        If reading fails.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "x.npy"
    >>> np.save(path, np.array([[1.0, 2.0], [3.0, 6.0]]))
    >>> stats(path, 0).mean
    array([2., 4.])
    """
    file = open_source(source)
    ndim = len(file.shape)
    chosen = tuple(range(ndim)) if axis is None else integers(axis, "axis")
    if any(not -ndim <= a < ndim for a in chosen) or len({a % ndim for a in chosen}) < len(chosen):
        raise ValueError(f"axis: expected different axes of an array of shape {file.shape}, got {axis}")
    budget = max(positive(block, "block") // file.dtype.itemsize, 1)
    if prod(file.shape) == 0:
        return Moments.of(np.zeros(file.shape, file.dtype.newbyteorder("=")), chosen if ndim else None)
    reduced = frozenset(a % ndim for a in chosen)
    axes = Axes(file.shape, file.order, reduced, file.unit, file.unit)
    _, part = axes.extents(budget, one_tile=True)
    tally = _Tally(reduced if ndim else None)
    steps = (_Step(region, whole(file.shape), _MEASURE) for region in regions(whole(file.shape), part, file.order))
    with file:
        _stream(file, steps, prod(part), tally, None, _Meter(progress, prod(file.shape) * file.dtype.itemsize))
    return tally.moments(whole(file.shape))


_ONLY, _MEASURE, _NORMALIZE = range(3)


@dataclass(frozen=True, slots=True)
class _Step:
    """One block to read and what to do with it: normalize it by itself, or in its tile measure or normalize it."""

    region: Region
    tile: Region
    stage: int


def _steps(axes: Axes, tile: tuple[int, ...], part: tuple[int, ...]) -> Iterator[_Step]:
    if 0 in axes.shape:
        return
    for box in regions(whole(axes.shape), tile, axes.order):
        if tile == part:
            yield _Step(box, box, _ONLY)
            continue
        for stage in (_MEASURE, _NORMALIZE):
            for region in regions(box, part, axes.order):
                yield _Step(region, box, stage)


class _Meter:
    """Tells how far the work is."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, size: int) -> None:
        self._done += size
        if self._progress is not None:
            self._progress(self._done, self._total)


def _stream(
    file: Source,
    steps: Iterable[_Step],
    size: int,
    work: Callable[[_Step, np.ndarray], np.ndarray | None],
    write: Callable[[Region, np.ndarray], None] | None,
    meter: _Meter,
) -> None:
    """Read, compute and write at the same time, in memory for a few blocks of `size` elements that is used again."""
    pending = iter(steps)
    free = deque(memoryview(mmap.mmap(-1, size * file.dtype.itemsize or 1)) for _ in range(_BUFFERS))
    reads: deque[tuple[_Step, memoryview, Future[np.ndarray]]] = deque()
    writes: deque[tuple[memoryview, Future[None]]] = deque()
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:

        def read_ahead() -> None:
            while free and len(reads) < _AHEAD and (step := next(pending, None)) is not None:
                memory = free.popleft()
                reads.append((step, memory, reader.submit(file.read, step.region, memory)))

        def release(to: int) -> None:
            while len(writes) > to:
                memory, written = writes.popleft()
                written.result()
                free.append(memory)

        read_ahead()
        while reads:
            step, memory, ready = reads.popleft()
            values = ready.result()
            count = values.nbytes
            with serial():
                result = work(step, values)
            if result is None or write is None:
                free.append(memory)
            else:
                writes.append((memory, writer.submit(write, step.region, result)))
                release(_BUFFERS - _AHEAD - 1)
            del values, result
            meter.add(count)
            read_ahead()
        release(0)


class _Tally:
    """The moments of a tile, block by block: those with the same place along the kept axes are merged."""

    def __init__(self, reduced: frozenset[int] | None) -> None:
        self._reduced = reduced  # None: all of an array of no dimensions
        self._parts: dict[tuple[tuple[int, int], ...], Moments] = {}

    def __call__(self, step: _Step, values: np.ndarray) -> None:
        if self._reduced:
            moments = Moments.of(values, tuple(self._reduced))
        elif self._reduced is None:
            moments = Moments.of(values)
        else:  # along no axis: every element by itself
            moments = Moments.of(values[..., None], -1)
        key = tuple((s.start, s.stop) for a, s in enumerate(step.region) if a not in (self._reduced or ()))
        self._parts[key] = self._parts[key] + moments if key in self._parts else moments

    def moments(self, tile: Region) -> Moments:
        """Return the moments of the whole tile."""
        if len(self._parts) == 1:
            return next(iter(self._parts.values()))
        kept = [s for a, s in enumerate(tile) if a not in (self._reduced or ())]
        mean, m2 = np.empty((2, *map(length, kept)))
        count = np.array(0, np.int64)
        for key, part in self._parts.items():
            place = tuple(slice(start - t.start, stop - t.start) for (start, stop), t in zip(key, kept, strict=True))
            mean[place], m2[place] = part.mean, part.var() * part.count
            count = np.asarray(part.count)
        return Moments(tuple(sorted(self._reduced or ())), count, mean, m2)


def _given(record: NormRecord, mean: Any, var: Any, moments: Moments | None) -> _Given | None:
    """Return the statistics that the caller gave."""
    if moments is not None:
        if not isinstance(moments, Moments):
            raise TypeError(f"moments: expected numbanorm.Moments, got {type(moments).__name__}")
        if mean is not None or var is not None:
            raise ValueError("moments: expected None beside running_mean and running_var")
        mean, var = moments.mean, moments.var()
    if mean is None and var is None:
        return None
    if record.tracking != "usual":
        raise ValueError(f"running_mean, running_var, moments: expected None for {record.kind} norm")
    if mean is None or var is None:
        raise ValueError("running_mean, running_var: expected both or neither, got one of them")
    return arrays.as_array(mean, "running_mean"), arrays.as_array(var, "running_var")


class _Work:
    """What `apply` does with a block: a norm with its parameters, checked against the shape and dtype of a file."""

    def __init__(
        self, file: Source, maps: Maps, parameters: dict[str, Any], eps: float | None, given: _Given | None
    ) -> None:
        record, layout, shape = maps.record, maps.layout, file.shape
        form = format_of(file.dtype if file.dtype.isnative else file.dtype.newbyteorder("="))
        assert form is not None
        self.form: Format = form
        self._maps = maps
        if record.tracks and given is None and layout.count == 1 and 0 not in shape:
            raise ValueError(f"source: expected more than 1 value per channel, got shape {shape}")
        usual = form.epsilon if record.eps is None else record.eps
        self._eps = usual if eps is None else check_eps(eps)
        check_shared_weights(record, "for files", *parameters.values())
        self._parameters: dict[str, np.ndarray] = {}
        for name, value in parameters.items():
            if value is not None and name not in record.parameters:
                raise ValueError(f"{name}: expected None for {record.kind} norm")
            if value is not None:
                array = arrays.as_parameter(value, name, form.lane)
                check_shape(spec_of(array), name, layout.affine_shape)
                check_float(spec_of(array), name)
                self._parameters[name] = arrays.cast(array, form.lane)
        self._tally: _Tally | None = None
        self._measured = maps.reduced
        self._given = given is not None
        self._mean = self._rstd = np.zeros(1)
        if given is not None:
            self._mean, self._rstd = self._of_channels(*given)
        group_unit = list(file.unit)
        if maps.groups is not None:
            group_unit[maps.along[0]] = lcm(group_unit[maps.along[0]], maps.group)
        whole_groups = frozenset[int]() if self._given else maps.reduced
        self.axes = Axes(shape, file.order, whole_groups, file.unit, tuple(group_unit))

    def _of_channels(self, mean: np.ndarray, var: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and rstd from given statistics, with 1 for all axes but that of the channels."""
        shape, channel = self._maps.layout.shape, self._maps.along[0]
        for name, array in (("running_mean", mean), ("running_var", var)):
            if array.shape != (shape[channel],):
                raise ValueError(f"{name}: expected shape {(shape[channel],)}, got {array.shape}")
        lengths = [n if a == channel else 1 for a, n in enumerate(shape)]
        rstd = self._maps.record.rstd(np.asarray(var, np.float64), self._maps.layout.count, self._eps)
        return mean.reshape(lengths), rstd.reshape(lengths)

    def __call__(self, step: _Step, values: np.ndarray) -> np.ndarray | None:
        """Do a step; return what is to be written."""
        if step.stage == _MEASURE:
            if self._tally is None:
                maps = self._maps
                one_group = maps.groups is not None and length(step.tile[maps.along[0]]) == maps.group
                self._measured = maps.reduced | frozenset(maps.along if one_group else ())
                self._tally = _Tally(self._measured)
            self._tally(step, values)
            return None
        x = arrays.as_input(values, "source")
        own = step.stage == _ONLY and not self._given
        return self._normalized(x, step.region, None if own else self._statistics(step))

    def _normalized(
        self, x: np.ndarray, region: Region, statistics: tuple[np.ndarray, np.ndarray] | None
    ) -> np.ndarray:
        """Normalize a block, with its own statistics where none are given. Nothing else here asks for a norm's kernels.

        Statistics that are given are those of every channel by itself, where the norm has groups: a block may cut them.
        """
        maps, kind = self._maps, self._maps.record.kind
        out = x if x.dtype == self.form.result else None
        weight, bias = (
            self._parameters[name][maps.weights(region)] if name in self._parameters else None
            for name in ("weight", "bias")
        )
        if statistics is None:
            prepared = prepared_for(kind, maps.options(region, maps.group), x, weight, bias, None, None, out)
            return prepared.run(x, weight, bias, self._eps, None, None, out, False)[0]  # type: ignore[no-any-return]
        return normalize(kind, maps.options(region, 1), x, *statistics, weight, bias, out=out)  # type: ignore[no-any-return]

    def _statistics(self, step: _Step) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and rstd of a block's groups, in the shape in which the norm has them."""
        if self._tally is not None:  # the tile has been measured, and this is the first block to be normalized
            self._mean, self._rstd = self._merged(self._tally.moments(step.tile), step.tile)
            self._tally = None
        tile = whole(self.axes.shape) if self._given else step.tile
        place = tuple(
            slice(None) if n == 1 else slice(s.start - t.start, s.stop - t.start)
            for s, t, n in zip(step.region, tile, self._mean.shape, strict=True)
        )
        statistics = self._maps.statistics
        return statistics(self._mean[place], step.region), statistics(self._rstd[place], step.region)

    def _merged(self, moments: Moments, tile: Region) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and rstd of a tile's groups, with 1 for the axes along which there is but one."""
        maps, record = self._maps, self._maps.record
        lengths = [1 if a in self._measured else length(s) for a, s in enumerate(tile)]
        mean = np.reshape(moments.mean, lengths)
        var = np.reshape(moments.var(), lengths)
        with np.errstate(all="ignore"):  # Inf and NaN among the elements
            if maps.groups is not None and maps.along[0] not in self._measured:
                mean, var = _of_groups(mean, var, maps.along[0], maps.group)
            square = var if record.centred else var + mean * mean
        return mean, record.rstd(square, maps.layout.count, self._eps)


def _of_groups(mean: np.ndarray, var: np.ndarray, channel: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Merge means and variances of as many elements each over groups of `size` channels; the shape stays."""
    groups = mean.shape[channel] // size
    split = (*mean.shape[:channel], groups, size, *mean.shape[channel + 1 :])
    means, variances = mean.reshape(split), var.reshape(split)
    near = means.take([0], channel + 1)  # sums of differences round less than sums of means
    merged = near + (means - near).mean(channel + 1, keepdims=True)
    spread = (variances + (means - merged) ** 2).mean(channel + 1, keepdims=True)
    return np.broadcast_to(merged, split).reshape(mean.shape), np.broadcast_to(spread, split).reshape(mean.shape)


def _sink(scratch: Path, as_zarr: bool, file: Source, dtype: np.dtype[Any], unit: tuple[int, ...]) -> Sink:
    if as_zarr:
        from .zarr import ZarrSink

        return ZarrSink(scratch, file, dtype, unit)
    return NpySink(scratch, file.shape, dtype, file.order)
