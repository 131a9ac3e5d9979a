"""Moments: mergeable (count, mean, M2), the streaming face of the statistics."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..calls.arrays import as_array, as_input, broadcast_mask
from ..calls.check import integers
from ..calls.dispatch import handler_of
from ..calls.prepare import public_statistic
from ..calls.prepared import measuring_for
from ..core.dtypes import WIDE
from ..core.layout import Layout
from ..core.norms import OF_AXES, OF_CHANNELS
from ..core.plan import COUNT, M2, MEAN


class Moments:
    """Count, mean and sum of squared deviations (M2) of the elements along some axes, in float64.

    Make one with `Moments.of`, feed it with `update`, merge two with ``+``. Merging follows Chan's formula [1]_, with
    the mean kept in two floats: it is as exact as taking all elements at once, whatever the batches and their order.

    Attributes
    ----------
    count : int64, scalar or shape of `mean`
        Elements seen; an array once a mask was used.
    mean : float64, scalar or ndarray
        Their mean, of the input's shape without the reduced axes; 0 where nothing was seen.

    References
    ----------
    .. [1] T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
       Variances", 1979.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> m = nn.Moments.of(np.array([[1.0, 2.0], [3.0, 6.0]]), axis=0)
    >>> m.mean, m.var()
    (array([2., 4.]), array([1., 4.]))
    >>> m.update(np.array([[5.0, 1.0]])).mean
    array([3., 3.])
    """

    __slots__ = ("_axis", "_count", "_low", "_m2", "_mean")

    def __init__(
        self,
        axis: tuple[int, ...] | None,
        count: np.ndarray,
        mean: np.ndarray,
        m2: np.ndarray,
        low: np.ndarray | None = None,
    ) -> None:
        self._axis = axis
        self._count = count
        self._mean = mean
        self._m2 = m2
        self._low = np.zeros_like(mean) if low is None else low  # the mean is the sum of both

    @classmethod
    def of(cls, x: Any, axis: int | tuple[int, ...] | None = None, *, mask: Any = None) -> Self:
        """Take the moments of an array.

        Parameters
        ----------
        x : array_like
            float16, bfloat16, float32, float64, bool or an integer dtype.
        axis : int or tuple of int, optional
            The axes along which to take them; all if None.
        mask : array_like of bool, broadcastable to `x`, optional
            True where an element counts.

        Raises
        ------
        TypeError, ValueError
            If dtype, axis or mask do not fit.
        """
        axes = None if axis is None else integers(axis, "axis")
        return cls(axes, *parts_of(x, axes, mask))

    @property
    def count(self) -> Any:
        """Elements seen."""
        return self._count[()]

    @property
    def mean(self) -> Any:
        """Their mean."""
        return self._mean[()]

    @property
    def low(self) -> Any:
        """What rounding the mean to float64 left of it."""
        return self._low[()]

    @property
    def m2(self) -> Any:
        """The sum of their squared deviations from the mean."""
        return self._m2[()]

    def var(self, ddof: float = 0) -> Any:
        """Return the variance, ``M2 / (count - ddof)``; NaN where that is not positive.

        Parameters
        ----------
        ddof : float, optional
            0: biased, as it normalizes. 1: unbiased.
        """
        freedom = np.broadcast_to(self._count - ddof, self._m2.shape)
        return np.divide(self._m2, freedom, out=np.full(self._m2.shape, np.nan), where=freedom > 0)[()]

    def std(self, ddof: float = 0) -> Any:
        """Return the standard deviation, the root of `var`."""
        return np.sqrt(self.var(ddof))

    def update(self, x: Any, *, mask: Any = None) -> Self:
        """Take in another batch, along the same axes, and return this object.

        Parameters
        ----------
        x : array_like
            Its axes that are not reduced must have the lengths that they had before.
        mask : array_like of bool, broadcastable to `x`, optional
            True where an element counts.

        Raises
        ------
        TypeError, ValueError
            If the batch does not fit; nothing has changed then.
        """
        self._count, self._mean, self._m2, self._low = self._merged(*parts_of(x, self._axis, mask))
        return self

    def __add__(self, other: Moments) -> Moments:
        """Merge with the moments of other elements."""
        if not isinstance(other, Moments):
            return NotImplemented
        return Moments(self._axis, *self._merged(other._count, other._mean, other._m2, other._low))

    def _merged(self, count: np.ndarray, mean: np.ndarray, m2: np.ndarray, low: np.ndarray) -> Parts:
        if mean.shape != self._mean.shape:
            raise ValueError(f"x: expected moments of shape {self._mean.shape}, got {mean.shape}")
        total = self._count + count
        share = np.divide(count, total, out=np.zeros(np.shape(total)), where=total > 0)
        with np.errstate(all="ignore"):  # Inf and NaN among the elements, as in NumPy's own mean
            delta = np.where((self._count > 0) & (count > 0), (mean - self._mean) + (low - self._low), 0.0)
            seen = self._count > 0
            merged, rest = two_sum(np.where(seen, self._mean, mean), delta * share)
            merged, rest = two_sum(merged, rest + np.where(seen, self._low, low))
            rest = np.where(np.isfinite(rest), rest, 0.0)
            return np.asarray(total), merged, self._m2 + m2 + delta * delta * self._count * share, rest

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to an ``.npz`` file of exactly this name, whole or not at all.

        Parameters
        ----------
        path : str or path
            Where to.
        """
        target = Path(path)
        scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        axis: dict[str, Any] = {} if self._axis is None else {"axis": np.array(self._axis, np.int64)}
        try:
            with scratch.open("wb") as file:
                np.savez(file, count=self._count, mean=self._mean, mean_low=self._low, m2=self._m2, **axis)
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote. Pickles are refused.

        Parameters
        ----------
        path : str or path
            Where from.

        Raises
        ------
        ValueError
            If the file does not hold moments.
        """
        try:
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
                stored = {name: np.asarray(file[name]) for name in file.files}
            count, mean, m2 = (stored[name] for name in ("count", "mean", "m2"))
            low = stored.get("mean_low", np.zeros_like(mean))  # files of version 0.1.0 have none
        except OSError:
            raise
        except Exception as error:  # zipfile, zlib and NumPy each have their own for garbage
            raise ValueError(
                f"path: expected a file written by Moments.save, got {os.fspath(path)}: {error!r}"
            ) from error
        fits = mean.shape == m2.shape == low.shape and count.shape in ((), mean.shape)
        if not fits or count.dtype != np.int64 or {mean.dtype, m2.dtype, low.dtype} != {np.dtype(np.float64)}:
            raise ValueError(f"path: expected a file written by Moments.save, got {os.fspath(path)}: shapes differ")
        axis = tuple(int(a) for a in stored["axis"]) if "axis" in stored else None
        return cls(axis, count, mean, m2, low)

    def __repr__(self) -> str:
        return f"Moments(count={self.count}, mean={self.mean}, var={self.var()})"


Parts = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""(count, mean, M2, low): the mean is the sum of the second and the last."""

_FEW = 1 << 16
"""Elements a group up to which a batch gets a second look. Means of parts that are rounded to float64 before they merge
cost the variance about ``1e-16 * abs(mean) / std / sqrt(n)``, relative, with n the elements of all batches."""

_FAR = 500
"""Standard deviations from 0 beyond which it is: nearer, rounding the mean costs less than 1e-13 of one."""


def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of two floats and what rounding left of it: Knuth, TAOCP volume 2, section 4.2.2, theorem B."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def parts_of(x: Any, axis: tuple[int, ...] | None, mask: Any) -> Parts:
    """Return (count, mean, M2, low) of one array; `count` is one number where there is no mask."""
    handler = handler_of(x)
    if handler is not None:
        return handler.moments(x, axis, mask)  # type: ignore[no-any-return]
    count, mean, m2 = _moments(x, axis, mask)
    low = np.zeros_like(mean)
    if not 1 < count.max(initial=0) <= _FEW:
        return count, mean, m2, low
    source = as_input(x, "x")
    if source.dtype.name not in WIDE:
        return count, mean, m2, low
    some = np.maximum(count, 1)
    with np.errstate(all="ignore"):
        far = np.abs(mean) > _FAR * np.sqrt(m2 / some)
    if far.any():
        rest, squares = _deviations(source, mean, axis, mask)
        with np.errstate(all="ignore"):
            left = rest / some
            far &= np.isfinite(squares)
            m2 = np.where(far, squares - left * rest, m2)
            mean, low = two_sum(mean, np.where(far, left, 0.0))
    return count, mean, m2, np.where(np.isfinite(low), low, 0.0)


def _deviations(
    x: np.ndarray, mean: np.ndarray, axis: tuple[int, ...] | None, mask: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of ``x - mean`` and of its squares along the axes, from some of the batch at a time."""
    axes = tuple(range(x.ndim)) if axis is None else tuple(a % x.ndim for a in axis)
    spread = np.expand_dims(mean, axes)
    counted = None if mask is None else broadcast_mask(mask, x.shape)
    along = max(axes, key=x.shape.__getitem__)
    step = max(1, (1 << 17) * x.shape[along] // x.size)  # 1 MB of float64
    sums = np.zeros_like(mean), np.zeros_like(mean)
    for start in range(0, x.shape[along], step):
        part = (*[slice(None)] * along, slice(start, start + step))
        where: Any = True if counted is None else counted[part]
        with np.errstate(all="ignore"):
            rest = np.subtract(x[part], spread, dtype=np.float64)
            sums[0][...] += rest.sum(axes, where=where)
            sums[1][...] += np.square(rest, out=rest).sum(axes, where=where)
    return sums


def _moments(x: Any, axis: tuple[int, ...] | None, mask: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (count, mean, M2) of one array in host memory."""
    source = as_input(x, "x")
    if source.ndim == 0:
        source = source.reshape(1)
    counted = None if mask is None else as_array(mask, "mask")
    axes = tuple(range(source.ndim)) if axis is None else axis
    measuring = measuring_for(OF_AXES, (1, None, axes), source, counted)
    if measuring.call.x.packed is not None:  # rows would be gathered in a copy; a single axis that stays needs none
        kept = [a for a in range(source.ndim) if a not in measuring.call.plan.layout.reduced_axes]
        if len(kept) == 1:
            measuring = measuring_for(OF_CHANNELS, (kept[0], None, None), source, counted)
    return statistics_of(measuring.call.plan.layout, measuring.run(source, counted), counted is None)


def statistics_of(layout: Layout, stats: np.ndarray, whole: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (count, mean, M2) of a backend's statistics; `whole`: every element counts."""
    kept = tuple(n for a, n in enumerate(layout.shape) if a not in layout.reduced_axes)
    count, mean, m2 = (public_statistic(stats[row], layout).reshape(kept) for row in (COUNT, MEAN, M2))
    if whole:
        return np.array(layout.count, np.int64), mean.copy(), m2.copy()
    return count.astype(np.int64), mean.copy(), m2.copy()
