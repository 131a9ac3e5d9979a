"""What every norm is, in NumPy and extended precision, straight from the definitions.

Written without a look at `Layout`: statistics are sums over named axes, nothing is coalesced. Two passes in longdouble,
so for float32 and float64 inputs these results are exact to far beyond what the tests allow.

`ARRANGEMENTS` puts groups of values where a norm looks for them: row g of a matrix ``values`` of shape (groups, n)
becomes the elements that share the mean g, in each norm and memory order. What comes out must be, row by row,
``standardize(values)``, whatever the norm; hard data are thus written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import numbanorm as nn

LONG = np.longdouble


@dataclass(frozen=True)
class Expected:
    """What a function must return; float64, statistics in the shapes of torch's native functions."""

    y: np.ndarray
    mean: np.ndarray
    rstd: np.ndarray
    running_mean: np.ndarray | None = None
    running_var: np.ndarray | None = None


def moments(
    x: np.ndarray, axes: tuple[int, ...], mask: np.ndarray | None = None, centred: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (count, mean, M2) over `axes`, with 1 in their place; mean 0 and M2 0 where nothing counts."""
    wide = np.asarray(x).astype(LONG)
    where = np.ones(wide.shape, bool) if mask is None else np.broadcast_to(mask, wide.shape)
    with np.errstate(all="ignore"):
        count = where.sum(axes, keepdims=True)
        some = np.maximum(count, 1)
        mean = wide.sum(axes, keepdims=True, where=where) / some if centred else np.zeros(count.shape, LONG)
        # The sum of 513 integers near 3e18 has more bits than longdouble: what the mean is off by is added.
        rest = (wide - mean).sum(axes, keepdims=True, where=where) / some if centred else mean
        mean = mean + np.where(np.isfinite(rest), rest, 0)
        deviation = wide - mean
        m2 = np.square(deviation).sum(axes, keepdims=True, where=where)
    return count, mean, m2


def normalized(
    x: np.ndarray, mean: np.ndarray, var: np.ndarray, eps: float, weight: np.ndarray | None, bias: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (y, rstd) in longdouble; everything broadcasts against `x`."""
    with np.errstate(all="ignore"):
        rstd = 1 / np.sqrt(np.asarray(var, LONG) + LONG(eps))
        y = (x.astype(LONG) - mean) * rstd
        if weight is not None:
            y = y * weight.astype(LONG)
        if bias is not None:
            y = y + bias.astype(LONG)
    return y, rstd


def double(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float64)


def along(vector: Any, ndim: int, axis: int) -> np.ndarray | None:
    """Return a vector of channels, shaped to broadcast along `axis`."""
    if vector is None:
        return None
    shape = [1] * ndim
    shape[axis] = -1
    return np.asarray(vector).reshape(shape)


def channel_roles(ndim: int, channel_axis: int) -> tuple[int, int, tuple[int, ...]]:
    """Return the axes of samples, channels and space."""
    channel = channel_axis % ndim
    sample = 1 if channel == 0 else 0
    return sample, channel, tuple(a for a in range(ndim) if a not in (sample, channel))


def batch_norm(
    x: np.ndarray,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    mask: Any = None,
) -> Expected:
    sample, channel, space = channel_roles(x.ndim, channel_axis)
    axes = (sample, *space)
    w, b = along(weight, x.ndim, channel), along(bias, x.ndim, channel)
    if not training:
        mean, var = double(running_mean), double(running_var)
        y, rstd = normalized(x, along(mean, x.ndim, channel), along(var, x.ndim, channel), eps, w, b)
        return Expected(double(y), mean, double(rstd).reshape(-1), mean, var)
    count, mean, m2 = moments(x, axes, mask)
    y, rstd = normalized(x, mean, m2 / np.maximum(count, 1), eps, w, b)
    new = running(running_mean, running_var, count, mean, m2, momentum, axes)
    return Expected(double(y), double(mean).reshape(-1), double(rstd).reshape(-1), *new)


def instance_norm(
    x: np.ndarray,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    mask: Any = None,
) -> Expected:
    if not use_input_stats:
        own = (running_mean, running_var, weight, bias, False, momentum, eps)
        return batch_norm(x, *own, channel_axis=channel_axis)
    sample, channel, space = channel_roles(x.ndim, channel_axis)
    count, mean, m2 = moments(x, space, mask)
    w, b = along(weight, x.ndim, channel), along(bias, x.ndim, channel)
    y, rstd = normalized(x, mean, m2 / np.maximum(count, 1), eps, w, b)
    new = running(running_mean, running_var, count, mean, m2, momentum, (sample, *space))

    def by_sample(a: np.ndarray) -> np.ndarray:
        return double(np.moveaxis(a, (sample, channel), (0, 1))).reshape(x.shape[sample], x.shape[channel])

    return Expected(double(y), by_sample(mean), by_sample(rstd), *new)


def running(
    running_mean: Any, running_var: Any, count: np.ndarray, mean: np.ndarray, m2: np.ndarray, momentum: float, axes: Any
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Move the running statistics towards the average, over what is kept beside channels, of groups that count."""
    if running_mean is None:
        return None, None
    seen = count > 0
    groups = seen.sum(axes)
    share = np.where(groups > 0, LONG(momentum), LONG(0))
    unbiased = m2 / np.maximum(count - 1, 1)
    moved = []
    for old, batch in ((running_mean, mean), (running_var, unbiased)):
        average = np.where(seen, batch, LONG(0)).sum(axes) / np.maximum(groups, 1)
        moved.append(double((1 - share) * double(old) + share * average))
    return moved[0], moved[1]


def group_norm(
    x: np.ndarray,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    mask: Any = None,
) -> Expected:
    sample, channel, _ = channel_roles(x.ndim, channel_axis)
    plain = np.moveaxis(x, (sample, channel), (0, 1))
    n, c, *space = plain.shape
    split = (n, num_groups, c // num_groups, *space)
    where = None
    if mask is not None:
        where = np.moveaxis(np.broadcast_to(mask, x.shape), (sample, channel), (0, 1)).reshape(split)
    grouped = plain.reshape(split)
    count, mean, m2 = moments(grouped, tuple(range(2, len(split))), where)

    def by_group(vector: Any) -> np.ndarray | None:
        if vector is None:
            return None
        return np.asarray(vector).reshape(1, num_groups, c // num_groups, *[1] * len(space))

    y, rstd = normalized(grouped, mean, m2 / np.maximum(count, 1), eps, by_group(weight), by_group(bias))
    y = np.moveaxis(y.reshape(plain.shape), (0, 1), (sample, channel))
    return Expected(double(y), double(mean).reshape(n, num_groups), double(rstd).reshape(n, num_groups))


def layer_norm(
    x: np.ndarray,
    axis: tuple[int, ...],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    mask: Any = None,
    centred: bool = True,
) -> Expected:
    """Normalize over `axis`; weight and bias have those axes, in that order."""
    axes = tuple(a % x.ndim for a in axis)

    def in_place(parameter: Any) -> np.ndarray | None:
        if parameter is None:
            return None
        sorted_axes = sorted(axes)
        turned = np.asarray(parameter).transpose([axes.index(a) for a in sorted_axes])
        return turned.reshape([x.shape[a] if a in axes else 1 for a in range(x.ndim)])

    count, mean, m2 = moments(x, axes, mask, centred)
    y, rstd = normalized(x, mean, m2 / np.maximum(count, 1), eps, in_place(weight), in_place(bias))
    return Expected(double(y), double(mean), double(rstd))


def rms_norm(x: np.ndarray, axis: tuple[int, ...], weight: Any = None, eps: float | None = None) -> Expected:
    if eps is None:
        eps = float(np.finfo(result_dtype(x.dtype)).eps)
    return layer_norm(x, axis, weight, None, eps, centred=False)


def result_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype in which results for `dtype` come."""
    if dtype.kind == "f":
        return dtype.newbyteorder("=")
    return np.dtype(np.float32 if dtype.itemsize <= 2 else np.float64)


def standardize(values: np.ndarray, eps: float = 1e-5, centred: bool = True) -> np.ndarray:
    """Return each row minus its mean, over its standard deviation."""
    return layer_norm(values, (1,), eps=eps, centred=centred).y


def error(y: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest error as a share of the output's scale (the largest |expected|)."""
    assert y.shape == expected.shape
    if y.size == 0:
        return 0.0
    assert np.isfinite(y).all()
    scale = float(np.abs(expected).max())
    return float(np.abs(y.astype(LONG) - expected).max()) / (scale or 1.0)


@dataclass(frozen=True)
class Arrangement:
    """One norm in one memory order.

    Attributes
    ----------
    norm : str
        Which norm.
    call : callable
        ``call(x, groups, **options)`` normalizes an array that `place` made.
    place : callable
        Turns values of shape (groups, n) into an array in which each row shares a mean.
    gather : callable
        ``gather(y, groups)`` turns it back.
    shape_of : callable
        ``shape_of(x, groups)``: the shape of a weight.
    """

    norm: str
    call: Callable[..., Any]
    place: Callable[[np.ndarray], np.ndarray]
    gather: Callable[[np.ndarray, int], np.ndarray]
    shape_of: Callable[[np.ndarray, int], tuple[int, ...]]

    @property
    def centred(self) -> bool:
        return self.norm != "rms"

    @property
    def affine(self) -> tuple[str, ...]:
        return ("weight", "bias") if self.centred else ("weight",)

    def expected(self, values: np.ndarray, eps: float = 1e-5) -> np.ndarray:
        return standardize(values, eps, self.centred)


def split(n: int) -> int:
    """Return a divisor of `n` near 4 but below `n`: how many parts a group is cut into."""
    return next((d for d in (4, 3, 2, 5, 7) if n % d == 0 and d < n), 1)


def samples(groups: int) -> int:
    """Return how many of the groups are samples, where samples times channels are groups."""
    return next((d for d in (2, 3, 5) if groups % d == 0 and d < groups), 1)


def _channels(function: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    def call(x: np.ndarray, groups: int, **options: Any) -> Any:
        return function(x, **fixed, **options)

    return call


def _groups(channel_axis: int) -> Callable[..., Any]:
    def call(x: np.ndarray, groups: int, **options: Any) -> Any:
        n = x.shape[0]
        return nn.group_norm(x, groups // n, channel_axis=channel_axis, **options)

    return call


def _over(function: Callable[..., Any], axis: int) -> Callable[..., Any]:
    def call(x: np.ndarray, groups: int, **options: Any) -> Any:
        return function(x, x.shape[axis], axis=axis, **options)

    return call


def _c(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array)


def _channel_count(axis: int) -> Callable[[np.ndarray, int], tuple[int, ...]]:
    return lambda x, groups: (x.shape[axis],)


def _group_last(v: np.ndarray) -> np.ndarray:
    n, per = samples(len(v)), split(v.shape[1])
    grouped = v.reshape(n, len(v) // n, per, -1)
    return _c(grouped.transpose(0, 3, 1, 2)).reshape(n, -1, len(v) // n * per)


def _group_last_back(y: np.ndarray, groups: int) -> np.ndarray:
    n, s, c = y.shape
    per = c // (groups // n)
    return y.reshape(n, s, groups // n, per).transpose(0, 2, 3, 1).reshape(groups, -1)


ARRANGEMENTS = {
    "batch-first": Arrangement(
        "batch",
        _channels(nn.batch_norm, training=True),
        lambda v: _c(v.reshape(len(v), split(v.shape[1]), -1).transpose(1, 0, 2)),
        lambda y, groups: _c(y.transpose(1, 0, 2)).reshape(groups, -1),
        _channel_count(1),
    ),
    "batch-last": Arrangement(
        "batch",
        _channels(nn.batch_norm, training=True, channel_axis=-1),
        lambda v: _c(v.reshape(len(v), split(v.shape[1]), -1).transpose(1, 2, 0)),
        lambda y, groups: _c(y.transpose(2, 0, 1)).reshape(groups, -1),
        _channel_count(-1),
    ),
    "instance-first": Arrangement(
        "instance",
        _channels(nn.instance_norm),
        lambda v: v.reshape(samples(len(v)), -1, v.shape[1]),
        lambda y, groups: y.reshape(groups, -1),
        _channel_count(1),
    ),
    "instance-last": Arrangement(
        "instance",
        _channels(nn.instance_norm, channel_axis=-1),
        lambda v: _c(v.reshape(samples(len(v)), -1, v.shape[1]).transpose(0, 2, 1)),
        lambda y, groups: y.transpose(0, 2, 1).reshape(groups, -1),
        _channel_count(-1),
    ),
    "group-first": Arrangement(
        "group",
        _groups(1),
        lambda v: v.reshape(samples(len(v)), len(v) // samples(len(v)) * split(v.shape[1]), -1),
        lambda y, groups: y.reshape(groups, -1),
        _channel_count(1),
    ),
    "group-last": Arrangement("group", _groups(-1), _group_last, _group_last_back, _channel_count(-1)),
    "layer-last": Arrangement(
        "layer", _over(nn.layer_norm, -1), lambda v: v, lambda y, groups: y, lambda x, groups: (x.shape[-1],)
    ),
    "layer-channel": Arrangement(
        "layer",
        _over(nn.layer_norm, 1),
        lambda v: _c(v.reshape(samples(len(v)), -1, v.shape[1]).transpose(0, 2, 1)),
        lambda y, groups: y.transpose(0, 2, 1).reshape(groups, -1),
        lambda x, groups: (x.shape[1],),
    ),
    "rms-last": Arrangement(
        "rms", _over(nn.rms_norm, -1), lambda v: v, lambda y, groups: y, lambda x, groups: (x.shape[-1],)
    ),
    "rms-channel": Arrangement(
        "rms",
        _over(nn.rms_norm, 1),
        lambda v: _c(v.reshape(samples(len(v)), -1, v.shape[1]).transpose(0, 2, 1)),
        lambda y, groups: y.transpose(0, 2, 1).reshape(groups, -1),
        lambda x, groups: (x.shape[1],),
    ),
}
"""Every norm in both memory orders."""


def normal(seed: int, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Return normal numbers that are the same in every run."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def sealed(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Return an output in which every element that nobody writes stays NaN."""
    return np.full(shape, math.nan, dtype)
