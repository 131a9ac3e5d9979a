"""Pieces: what a norm does on a part of its groups, for arrays that lie in files, chunks or other processes.

Forward: take `Moments` of every piece, merge them, `normalize` every piece with the result. Backward: take the two sums
of every piece (`channel_sums`, `row_sums`), add them, divide them by the count of the whole group, and get every
piece's gradient (`channel_gradient`, `row_gradient`). `numbanorm.stats.groups` has these for any norm. With
``h = (x - mean) * rstd`` and ``g = dy * weight`` [1]_::

    dx = rstd * (g - mean(g) - h * mean(g * h))

where elements that a mask leaves out have ``dx = rstd * g``, and means are sums over all elements by the count of those
that the mask lets in. Of an L2 norm, ``mean(g * h)`` is the sum itself, by 1, or 0 where the factor is clamped.

Pieces may be CUDA arrays; statistics, means, weights and masks lie in host memory then, as sums and gradients of
weights do that are returned.

References
----------
.. [1] S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
   Shift", 2015, section 3.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..calls import check
from ..calls.arrays import as_array, as_input, as_parameter, broadcast_mask
from ..calls.dispatch import handler_of
from ..calls.gradients import partial_for
from ..calls.prepared import applying_for
from ..core.norms import OF_AXES, OF_AXES_UNCENTRED, OF_CHANNELS, OF_SAMPLES_CHANNELS, record_of
from ..core.plan import Options
from ..core.spec import spec_of


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
        A key of `numbanorm.core.norms.NORMS`.
    options : tuple
        ``(channel_axis, num_groups, axis)`` as `numbanorm.core.plan.plan` takes them; for norms over axes the first is
        1 and `axis` the normalized axes.
    x : array_like
        The piece, of any dtype that the functions take.
    mean, rstd : ndarray
        Float dtype, shaped as the functions return them for the piece; `mean` is None where the norm has none.
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
    serving = handler_of(x)
    if serving is not None:
        return serving.normalize(norm, options, x, mean, rstd, weight, bias)
    source = as_input(x, "x")
    lane = check.check_format(source.dtype, "x").lane
    target = None if out is None else as_array(out, "out")
    arrays = source, as_parameter(weight, "weight", lane), as_parameter(bias, "bias", lane)
    prepared = applying_for(norm, options, *arrays, target)
    y = prepared.apply(*arrays, target, prepared.statistics(mean, rstd))
    return y if out is None else out


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
    norm, options = _channelwise(mean), (channel_axis, None, None)
    serving = handler_of(x)
    if serving is not None:
        return serving.partial_sums(norm, options, dy, x, mean, rstd)  # type: ignore[no-any-return]
    parts = _by_sample(x, dy, mean, rstd, None, channel_axis)
    if parts is not None:
        sums = [channel_sums(d, part, m, r, channel_axis=channel_axis) for part, d, m, r, _ in parts]
        return np.concatenate([s for s, _ in sums]), np.concatenate([s for _, s in sums])
    return _Part(norm, options, dy, x, mean, rstd, None).sums()


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
    norm, options = _channelwise(mean), (channel_axis, None, None)
    serving = handler_of(x)
    if serving is not None:
        own = (dy, x, mean, rstd, mean_dy, mean_dyh, weight, mask)
        return serving.partial_gradient(norm, options, *own)[0]  # type: ignore[no-any-return]
    counted = None if mask is None else broadcast_mask(mask, as_array(x, "x").shape)
    parts = _by_sample(x, dy, mean, rstd, counted, channel_axis)
    if parts is not None:
        given = zip(np.split(mean_dy, len(mean_dy)), np.split(mean_dyh, len(mean_dyh)), strict=True)
        results = [
            channel_gradient(d, part, m, r, a, b, weight, channel_axis=channel_axis, mask=c)
            for (part, d, m, r, c), (a, b) in zip(parts, given, strict=True)
        ]
        return np.concatenate(results, axis=_sample_axis(channel_axis, np.ndim(results[0])))
    return _Part(norm, options, dy, x, mean, rstd, weight, counted).gradient(mean_dy, mean_dyh)[0]


def row_sums(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any = None, *, axis: tuple[int, ...]) -> tuple[Any, Any]:
    """Return the sums of ``g`` and of ``g * h`` along the normalized axes of a piece of a norm over axes.

    Parameters
    ----------
    dy, x : array_like
        Gradient of the output, and input.
    mean, rstd : ndarray, shape of `x` with 1 for `axis`
        Statistics; `mean` is None where the norm has none.
    weight : array_like, broadcastable to the shape of the piece along `axis`, optional
        gamma.
    axis : tuple of int
        The normalized axes.

    Returns
    -------
    sum_g, sum_gh : ndarray, float64, shape of `rstd`
        The sums.
    """
    serving = handler_of(x)
    if serving is not None:
        norm, along = _along(serving, x, mean, weight, axis)
        return serving.partial_sums(norm, (1, None, axis), dy, x, mean, rstd, along)  # type: ignore[no-any-return]
    return _Rows(dy, x, mean, rstd, weight, axis, None).sums()


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
) -> tuple[Any, ...]:
    """Return dx, dweight and, where there is a mean, dbias of a piece of a norm over axes, shaped as the weight is.

    Parameters
    ----------
    dy, x, mean, rstd, weight, axis
        As for `row_sums`.
    mean_g, mean_gh : ndarray, shape of `rstd`, float
        The sums that `row_sums` returns, added over all pieces and divided by the count; 0 where nothing counts.
    mask : array_like of bool, optional
        True where an element counted.
    """
    serving = handler_of(x)
    if serving is None:
        dx, *gradients = _Rows(dy, x, mean, rstd, weight, axis, mask).gradient(mean_g, mean_gh)
    else:
        norm, along = _along(serving, x, mean, weight, axis)
        own = (dy, x, mean, rstd, mean_g, mean_gh, along, mask)
        dx, *gradients = serving.partial_gradient(norm, (1, None, axis), *own)
        gradients = [serving.placed(part, "cpu") for part in gradients]
    return dx, *(part if weight is None else _gathered(part, np.shape(weight)) for part in gradients)


def _along(serving: Any, x: Any, mean: Any, weight: Any, axis: tuple[int, ...]) -> tuple[str, Any]:
    """Return the norm over axes that has a mean if there is one, and the weights of all elements along these."""
    shape = serving.shape_of(x)
    whole = None if weight is None else np.ascontiguousarray(np.broadcast_to(weight, [shape[a] for a in axis]))
    return OF_AXES_UNCENTRED if mean is None else OF_AXES, whole


def _gathered(part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Add up what belongs to one weight of so many, which were broadcast."""
    lead = part.ndim - len(shape)
    axes = tuple(a for a, n in enumerate(part.shape) if a < lead or n != shape[a - lead])
    return np.asarray(part.sum(axes, dtype=np.float64)).reshape(shape) if axes else part


class _Part:
    """The checked arrays of one part, and what serves it."""

    def __init__(
        self, norm: str, options: Options, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, mask: Any = None
    ) -> None:
        source, gradient = as_input(x, "x"), as_input(dy, "dy")
        form = check.check_format(source.dtype, "x")
        w = as_parameter(weight, "weight", form.lane)
        means = None if mean is None else np.asarray(mean)
        self._arrays = gradient, source, means, np.asarray(rstd), w
        self._mask = mask
        self._served = partial_for(norm, options, *self._arrays, mask)

    @property
    def columns(self) -> bool:
        """Whether the kernel of columns serves it."""
        return self._served.call.plan.columns

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        return self._served.sums(*self._arrays)

    def gradient(self, first: Any, second: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return dx and the gradients of weights along the groups, shape (2, size)."""
        return self._served.gradient(*self._arrays, self._mask, (first, second))


class _Rows:
    """A piece of a norm over axes as rows: normalized axes moved last, shape (rows, elements)."""

    def __init__(self, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, axis: tuple[int, ...], mask: Any) -> None:
        source = as_array(x, "x")
        counted = None if mask is None else broadcast_mask(mask, source.shape)
        self._shape = source.shape
        self._axis = axis
        self._along = tuple(source.shape[a] for a in axis)
        self._outer = np.shape(rstd)
        width = int(np.prod(self._along, dtype=np.int64))
        self._rows = (source.size // width if width else int(np.prod(self._outer, dtype=np.int64)), width)
        given = None if weight is None else as_array(weight, "weight")
        flat = None if given is None else np.broadcast_to(given, self._along).reshape(-1)
        one = flat is not None and flat.size == 1  # which the kernel takes for that of a channel
        self._factor = np.float64(flat[0]) if one and flat is not None else 1.0
        norm = OF_AXES_UNCENTRED if mean is None else OF_AXES
        self._gradients = len(record_of(norm).parameters)
        gradient = as_array(dy, "dy")
        check.check_gradient(spec_of(gradient), spec_of(source))
        arrays = (self._moved(gradient), self._moved(source))
        statistics = (None if mean is None else _column(mean), _column(rstd))
        marked = None if counted is None else self._moved(counted)
        self._part = _Part(norm, (1, None, (1,)), *arrays, *statistics, flat, marked)
        self._unweighted = _Part(norm, (1, None, (1,)), *arrays, *statistics, None) if one else self._part

    def _moved(self, array: np.ndarray) -> np.ndarray:
        last = tuple(range(-len(self._axis), 0))
        return np.ascontiguousarray(np.moveaxis(array, self._axis, last)).reshape(self._rows)

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the two sums of every row."""
        first, second = self._unweighted.sums()
        return (first * self._factor).reshape(self._outer), (second * self._factor).reshape(self._outer)

    def gradient(self, mean_g: Any, mean_gh: Any) -> tuple[np.ndarray, ...]:
        """Return dx and the gradients of the weights of all elements along the axes."""
        dx, gradients = self._part.gradient(_column(mean_g), _column(mean_gh))
        last = tuple(range(-len(self._axis), 0))
        axes = [a % len(self._shape) for a in self._axis]
        outer = [n for a, n in enumerate(self._shape) if a not in axes]
        dx = np.moveaxis(dx.reshape(*outer, *self._along), last, self._axis)
        return dx, *gradients[: self._gradients].reshape(-1, *self._along)


def _column(statistic: Any) -> np.ndarray:
    return np.asarray(statistic).reshape(-1, 1)


def _channelwise(mean: Any) -> str:
    return OF_SAMPLES_CHANNELS if np.ndim(mean) == 2 else OF_CHANNELS


def _sample_axis(channel_axis: int, ndim: int) -> int:
    return 1 if channel_axis % ndim == 0 else 0


def _by_sample(
    x: Any, dy: Any, mean: Any, rstd: Any, mask: np.ndarray | None, channel_axis: int
) -> list[tuple[Any, ...]] | None:
    """Cut a piece into samples where the columns kernel would have to take several at once, which it cannot here."""
    if np.ndim(mean) != 2 or np.shape(mean)[0] < 2:
        return None
    if not _Part(OF_SAMPLES_CHANNELS, (channel_axis, None, None), dy, x, mean, rstd, None, mask).columns:
        return None
    source = as_input(x, "x")
    axis = _sample_axis(channel_axis, source.ndim)
    n = source.shape[axis]
    cut = [np.split(as_array(a, "dy"), n, axis) for a in (source, dy)]
    statistics = [np.split(np.asarray(s), n) for s in (mean, rstd)]
    masks = [None] * n if mask is None else np.split(mask, n, axis)
    return list(zip(*cut, *statistics, masks, strict=True))
