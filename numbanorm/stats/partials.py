"""Pieces: what a norm does on a part of its groups, for arrays that lie in files, chunks or other processes.

Forward: take `Moments` of every piece, merge them, `normalize` every piece with the result. Backward: take the two sums
of every piece (`channel_sums`, `row_sums`), add them, divide them by the count of the whole group, and get every
piece's gradient (`channel_gradient`, `row_gradient`). With ``h = (x - mean) * rstd`` and ``g = dy * weight`` [1]_::

    dx = rstd * (g - mean(g) - h * mean(g * h))

where elements that a mask leaves out have ``dx = rstd * g``, and means are sums over all elements by the count of those
that the mask lets in.

References
----------
.. [1] S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
   Shift", 2015, section 3.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..calls import arrays
from ..calls.dispatch import cpu_backend
from ..calls.host import Call, given_statistic, parameter, public_statistic
from ..core.plan import COUNT, M2, MEAN, RSTD, Options, Plan, plan


def normalize(
    norm: str,
    options: Options,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    out: Any = None,
) -> Any:
    """Normalize with given statistics of every group.

    Parameters
    ----------
    norm : str
        ``"batch"``, ``"layer"``, ``"instance"``, ``"group"`` or ``"rms"``.
    options : tuple
        ``(channel_axis, num_groups, axis)`` as `numbanorm.plan.plan` takes them; for layer and RMS norm the first is 1
        and `axis` the normalized axes.
    x : array_like
        The piece, of any dtype that the functions take.
    mean, rstd : ndarray
        Float dtype, shaped as the functions return them for the piece; `mean` is None for RMS norm.
    weight, bias : array_like, optional
        Those of the piece's channels or normalized elements.
    out : ndarray, optional
        Where to write the result.

    Returns
    -------
    y : ndarray, shape of `x`
        The normalized piece.

    Examples
    --------
    >>> import numpy as np
    >>> normalize("layer", (1, None, (1,)), np.array([[1.0, 3.0]]), np.array([[2.0]]), np.array([[0.5]]))
    array([[-0.5,  0.5]])
    """
    source, form = arrays.as_input(x, "x")
    call = Call(norm, options, x, source, form, weight, bias, out=out)
    layout = call.plan.layout
    stats = np.zeros((4, layout.groups))
    stats[COUNT] = layout.count
    stats[MEAN] = given_statistic(mean, "mean", layout) if layout.centred else 0.0
    stats[M2] = 0.0
    stats[RSTD] = given_statistic(rstd, "rstd", layout)
    call.apply(stats)
    return call.result(stats, False)


def channel_sums(dy: Any, x: Any, mean: Any, rstd: Any, *, channel_axis: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of ``dy`` and of ``dy * h`` over the elements of every channel of a piece.

    For batch norm over all pieces, the first is the bias's gradient and the second the weight's.

    Parameters
    ----------
    dy, x : array_like, shape (N, C, ...)
        Gradient of the output, and input.
    mean, rstd : ndarray, shape (C,) or (N, C)
        Statistics of every channel, or of every channel of every sample.
    channel_axis : int, optional
        Axis of the channels.

    Returns
    -------
    sum_dy, sum_dyh : ndarray, float64, shape of `mean`
        The sums; of the weight of nothing.
    """
    parts = _by_sample(x, dy, mean, rstd, None, channel_axis)
    if parts is not None:
        sums = [channel_sums(d, part, m, r, channel_axis=channel_axis) for part, d, m, r, _ in parts]
        return np.concatenate([s for s, _ in sums]), np.concatenate([s for _, s in sums])
    piece = _Piece(_channelwise(mean), (channel_axis, None, None), dy, x, mean, rstd)
    return piece.sums(None)


def channel_gradient(
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    mean_dy: Any,
    mean_dyh: Any,
    weight: Any = None,
    *,
    channel_axis: int = 1,
    mask: Any = None,
) -> np.ndarray:
    """Return dx of a piece of batch norm, or of another norm whose groups are channels.

    For group norm, give ``dy * weight`` as `dy`, the group's means for each of its channels, and no weight.

    Parameters
    ----------
    dy, x, mean, rstd, channel_axis
        As for `channel_sums`.
    mean_dy, mean_dyh : ndarray, shape of `mean`, float
        The sums that `channel_sums` returns, added over all pieces and divided by the count; 0 where nothing counts.
    weight : array_like, shape (C,), optional
        gamma.
    mask : array_like of bool, optional
        True where an element counted.

    Returns
    -------
    dx : ndarray, shape of `x`
        Gradient of the input.
    """
    counted = None if mask is None else arrays.as_mask(mask, arrays.as_array(x, "x").shape)
    parts = _by_sample(x, dy, mean, rstd, counted, channel_axis)
    if parts is not None:
        given = zip(np.split(mean_dy, len(mean_dy)), np.split(mean_dyh, len(mean_dyh)), strict=True)
        options: dict[str, Any] = {"channel_axis": channel_axis}
        results = [
            channel_gradient(d, part, m, r, a, b, weight, mask=c, **options)
            for (part, d, m, r, c), (a, b) in zip(parts, given, strict=True)
        ]
        return np.concatenate(results, axis=_sample_axis(channel_axis, np.ndim(results[0])))
    piece = _Piece(_channelwise(mean), (channel_axis, None, None), dy, x, mean, rstd, counted)
    return piece.gradient(weight, mean_dy, mean_dyh)[0]


def row_sums(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any = None, *, axis: tuple[int, ...]) -> tuple[Any, Any]:
    """Return the sums of ``g`` and of ``g * h`` along the normalized axes of a piece of layer or RMS norm.

    Parameters
    ----------
    dy, x : array_like
        Gradient of the output, and input.
    mean, rstd : ndarray, shape of `x` with 1 for `axis`
        Statistics; `mean` is None for RMS norm.
    weight : array_like, shape of the piece along `axis`, optional
        gamma.
    axis : tuple of int
        The normalized axes.

    Returns
    -------
    sum_g, sum_gh : ndarray, float64, shape of `rstd`
        The sums.
    """
    rows = _Rows(dy, x, mean, rstd, weight, axis, None)
    return rows.sums()


def row_gradient(
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    mean_g: Any,
    mean_gh: Any,
    weight: Any = None,
    *,
    axis: tuple[int, ...],
    mask: Any = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return dx, dweight and dbias of a piece of layer or RMS norm; dbias is empty for RMS norm.

    Parameters
    ----------
    dy, x, mean, rstd, weight, axis
        As for `row_sums`.
    mean_g, mean_gh : ndarray, shape of `rstd`, float
        The sums that `row_sums` returns, added over all pieces and divided by the count; 0 where nothing counts.
    mask : array_like of bool, optional
        True where an element counted.
    """
    rows = _Rows(dy, x, mean, rstd, weight, axis, mask)
    dx, dweight, dbias = rows.piece.gradient(rows.weight, rows.inner(mean_g), rows.inner(mean_gh))
    return rows.whole(dx), dweight.reshape(rows.along), dbias.reshape(rows.along if dbias.size else 0)


class _Piece:
    """The checked arrays of one piece and their plan."""

    def __init__(
        self, norm: str, options: Options, dy: Any, x: Any, mean: Any, rstd: Any, mask: np.ndarray | None = None
    ) -> None:
        source, form = arrays.as_input(x, "x")
        gradient, gradient_form = arrays.as_input(dy, "dy")
        if gradient.shape != source.shape:
            raise ValueError(f"dy: expected the shape of x, {source.shape}, got {gradient.shape}")
        if not gradient_form.is_float:
            raise TypeError(f"dy: expected a float dtype, got {gradient.dtype}")
        gradient = gradient.astype(form.result, copy=False)
        places = (source.strides, source.itemsize), (gradient.strides, gradient.itemsize)
        masked = None if mask is None else mask.strides
        self.plan: Plan = plan(norm, options, source.shape, *places, masked, separable=True)
        self._x, self._dy, self._mask, self._form = source, gradient, mask, form
        layout = self.plan.layout
        self._mean = given_statistic(mean, "mean", layout) if layout.centred else np.zeros(1)
        self._rstd = given_statistic(rstd, "rstd", layout)

    def _flat(self) -> tuple[np.ndarray, np.ndarray]:
        work = self.plan
        return arrays.flat(self._dy, work.y, work), arrays.flat(self._x, work.x, work)

    def _parameter(self, weight: Any) -> np.ndarray | None:
        return None if weight is None else parameter(weight, "weight", self.plan.layout, self._form.lane)

    def sums(self, weight: Any) -> tuple[np.ndarray, np.ndarray]:
        work = self.plan
        if work.size == 0:
            sums = np.zeros((2, work.layout.groups))
        else:
            sums = cpu_backend().piece_sums(work, *self._flat(), self._parameter(weight), self._mean, self._rstd)
        first, second = (public_statistic(row, work.layout) for row in sums)
        return first, second

    def gradient(self, weight: Any, first: Any, second: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        work = self.plan
        layout = work.layout
        dx = arrays.fresh(work, self._form.result, self._x, self._dy)
        if work.size == 0:
            return dx, np.zeros(layout.size), np.zeros(layout.size if layout.centred else 0)
        means = np.stack([given_statistic(a, "means", layout) for a in (first, second)])
        mask = None if self._mask is None else arrays.flat(self._mask, work.mask, work)
        target = arrays.flat(dx, work.packed, work)
        statistics = self._mean, self._rstd, means
        dweight, dbias = cpu_backend().piece_gradient(
            work, *self._flat(), target, self._parameter(weight), *statistics, mask
        )
        if work.reordered:
            packed, dx = dx, np.empty_like(self._x, self._form.result)
            np.copyto(dx, packed)
        return dx, dweight, dbias


class _Rows:
    """A piece of layer or RMS norm as rows: normalized axes moved last, shape (rows, elements)."""

    def __init__(self, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, axis: tuple[int, ...], mask: Any) -> None:
        source = arrays.as_array(x, "x")
        counted = None if mask is None else arrays.as_mask(mask, source.shape)
        self._shape = source.shape
        self._axis = axis
        self.along = tuple(source.shape[a] for a in axis)
        self._outer = np.shape(rstd)
        width = int(np.prod(self.along, dtype=np.int64))
        self._rows = (source.size // width if width else int(np.prod(self._outer, dtype=np.int64)), width)
        self.weight = None if weight is None else arrays.as_array(weight, "weight").reshape(-1)
        norm = "rms" if mean is None else "layer"
        given_mean = None if mean is None else self.inner(mean)
        dy_rows, x_rows = self._moved(arrays.as_array(dy, "dy")), self._moved(source)
        mask_rows = None if counted is None else self._moved(counted)
        self.piece = _Piece(norm, (1, None, (1,)), dy_rows, x_rows, given_mean, self.inner(rstd), mask_rows)

    def _moved(self, array: np.ndarray) -> np.ndarray:
        if array.shape != self._shape:
            raise ValueError(f"dy: expected the shape of x, {self._shape}, got {array.shape}")
        last = tuple(range(-len(self._axis), 0))
        return np.ascontiguousarray(np.moveaxis(array, self._axis, last)).reshape(self._rows)

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        one = self.weight is not None and self.weight.size == 1  # which the kernel takes for that of a channel
        first, second = self.piece.sums(None if one else self.weight)
        factor = np.float64(self.weight[0]) if one and self.weight is not None else 1.0
        return (first * factor).reshape(self._outer), (second * factor).reshape(self._outer)

    def inner(self, statistic: Any) -> np.ndarray:
        return np.asarray(statistic).reshape(-1, 1)

    def whole(self, dx: np.ndarray) -> np.ndarray:
        last = tuple(range(-len(self._axis), 0))
        axes = [a % len(self._shape) for a in self._axis]
        outer = [n for a, n in enumerate(self._shape) if a not in axes]
        return np.moveaxis(dx.reshape(*outer, *self.along), last, self._axis)


def _channelwise(mean: Any) -> str:
    return "instance" if np.ndim(mean) == 2 else "batch"


def _sample_axis(channel_axis: int, ndim: int) -> int:
    return 1 if channel_axis % ndim == 0 else 0


def _by_sample(
    x: Any, dy: Any, mean: Any, rstd: Any, mask: np.ndarray | None, channel_axis: int
) -> list[tuple[Any, ...]] | None:
    """Cut a piece into samples where the columns kernel would have to take several at once, which it cannot here."""
    if np.ndim(mean) != 2 or np.shape(mean)[0] < 2:
        return None
    if not _Piece("instance", (channel_axis, None, None), dy, x, mean, rstd, mask).plan.columns:
        return None
    source, _ = arrays.as_input(x, "x")
    axis = _sample_axis(channel_axis, source.ndim)
    n = source.shape[axis]
    cut = [np.split(arrays.as_array(a, "dy"), n, axis) for a in (source, dy)]
    statistics = [np.split(np.asarray(s), n) for s in (mean, rstd)]
    masks = [None] * n if mask is None else np.split(mask, n, axis)
    return list(zip(*cut, *statistics, masks, strict=True))
