"""Running statistics in NumPy, where no kernel is bound to their dtype or strides, or parts merge elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.plan import M2, MEAN, RSTD


def fill(mean: np.ndarray, var: np.ndarray, eps: float, shape: tuple[int, ...]) -> np.ndarray:
    """Return running statistics as a backend's, to normalize with: rows COUNT, MEAN, M2 and RSTD."""
    stats = np.empty(shape)
    stats[:MEAN] = stats[M2] = 0.0
    stats[MEAN] = mean
    rstd = stats[RSTD]
    with np.errstate(all="ignore"):  # zero, negative or NaN: as arithmetic has it
        np.add(var, eps, out=rstd, dtype=np.float64)
        np.reciprocal(np.sqrt(rstd, out=rstd), out=rstd)
    return stats


def move(
    mean: np.ndarray, var: np.ndarray, count: np.ndarray, batch_mean: np.ndarray, m2: np.ndarray, momentum: float
) -> None:
    """Move running statistics, shape (C,), towards a batch's, averaged over the samples that count.

    Parameters
    ----------
    mean, var : ndarray, shape (C,)
        The running statistics.
    count, batch_mean, m2 : ndarray, shape (C,) or (N, C)
        Those of the batch, or of each of its samples.
    momentum : float
        The batch's share.
    """
    if count.ndim == 1:
        count, batch_mean, m2 = count[None], batch_mean[None], m2[None]
    seen = count > 0
    samples = seen.sum(axis=0)
    with np.errstate(all="ignore"):  # NaN, Inf and what is too large for the dtype go the way of all arithmetic
        unbiased = m2 / np.maximum(count - 1.0, 1.0)
        moved: list[Any] = []
        for array, values in ((mean, batch_mean), (var, unbiased)):
            batch = np.where(seen, values, 0.0).sum(axis=0) / np.maximum(samples, 1)
            old = array.astype(np.float64)
            moved.append(np.where(samples > 0, (1.0 - momentum) * old + momentum * batch, old))
        mean[...], var[...] = moved  # both or neither: memory may run out above
