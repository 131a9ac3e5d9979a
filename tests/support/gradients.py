"""Gradients of every norm in both memory orders, from the formulas in extended precision, and the calls to compare.

The formulas are those that `numbanorm` computes, so they are no judge of themselves: `test_backward` first holds them,
like the package, against torch's autograd and against finite differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from reference import ARRANGEMENTS, LONG, moments

import numbanorm as nn

_WEIGHT_AXIS = {"first": 1, "last": -1, "channel": 1}


@dataclass(frozen=True)
class Gradients:
    """dx, dweight and dbias in extended precision, and the largest terms that dweight and dbias are sums of."""

    dx: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray
    terms: tuple[float, float]
    count: int  # terms a weight


def weight_axis(name: str) -> int:
    return _WEIGHT_AXIS[name.split("-")[1]]


def expected(
    name: str,
    dy: np.ndarray,
    x: np.ndarray,
    groups: int,
    weight: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    eps: float = 1e-5,
) -> Gradients:
    how = ARRANGEMENTS[name]
    axis = weight_axis(name)

    def rows(array: np.ndarray) -> np.ndarray:
        return how.gather(array, groups)

    along = [1] * x.ndim
    along[axis] = -1
    v, d = rows(x.astype(LONG)), rows(dy.astype(LONG))
    counts = np.ones(v.shape, bool) if mask is None else rows(np.broadcast_to(mask, x.shape))
    gain = LONG(1) if weight is None else rows(np.broadcast_to(weight.astype(LONG).reshape(along), x.shape))
    count, mean, m2 = moments(v, (1,), counts, how.centred)
    some = np.maximum(count, 1)
    rstd = 1 / np.sqrt(m2 / some + LONG(eps))
    h = (v - mean) * rstd
    g = d * gain
    mean_g = g.sum(1, keepdims=True) / some if how.centred else LONG(0)
    mean_gh = (g * h).sum(1, keepdims=True) / some
    dx = rstd * (g - counts * (mean_g + h * mean_gh))
    others = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    return Gradients(
        how.place(dx),
        how.place(d * h).sum(others),
        how.place(d).sum(others),
        (float(np.abs(d * h).max()), float(np.abs(d).max())),
        x.size // x.shape[axis],
    )


def forward(name: str, x: np.ndarray, groups: int, **options: Any) -> Any:
    """Return (y, mean, rstd), mean None for RMSNorm."""
    how = ARRANGEMENTS[name]
    y, *mean, rstd = how.call(x, groups, return_stats=True, **options)
    return y, mean[0] if mean else None, rstd


def backward(name: str, dy: Any, x: Any, groups: int, mean: Any, rstd: Any, weight: Any = None, **options: Any) -> Any:
    """Return (dx, dweight, dbias), dbias None for RMSNorm."""
    norm, axis = ARRANGEMENTS[name].norm, weight_axis(name)
    if norm == "rms":
        return *nn.rms_norm_backward(dy, x, x.shape[axis], rstd, weight, axis=axis, **options), None
    if norm == "layer":
        return nn.layer_norm_backward(dy, x, x.shape[axis], mean, rstd, weight, axis=axis, **options)
    if norm == "group":
        return nn.group_norm_backward(dy, x, groups // x.shape[0], mean, rstd, weight, channel_axis=axis, **options)
    function = {"batch": nn.batch_norm_backward, "instance": nn.instance_norm_backward}[norm]
    return function(dy, x, mean, rstd, weight, channel_axis=axis, **options)


def gradients(
    name: str,
    dy: np.ndarray,
    x: np.ndarray,
    groups: int,
    weight: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    eps: float = 1e-5,
) -> Any:
    """Return what the package computes for one call: (dx, dweight, dbias)."""
    options = {} if mask is None else {"mask": mask}
    _, mean, rstd = forward(name, x, groups, eps=eps, **options)
    return backward(name, dy, x, groups, mean, rstd, weight, **options)


def error_of_sum(ours: np.ndarray, exact: np.ndarray, term: float, count: int) -> float:
    """Return the largest error of sums of `count` terms, but for their last rounding, in terms times root of count."""
    assert ours.shape == exact.shape
    off = np.abs(ours.astype(LONG) - exact) - np.finfo(ours.dtype).eps * np.abs(exact)
    return float(off.max()) / (term * count**0.5 or 1.0)
