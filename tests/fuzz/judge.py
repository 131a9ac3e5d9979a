"""What a call must return, in extended precision, and how far its results may be from that.

Every norm is four questions about an array: how to turn it so that groups lie along whole axes, along which axes a
group lies, how a weight lies against it, and how statistics are shown. The answers are written here once, without a
look at `Layout`, for forward and backward alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from reference import LONG, channel_roles, moments, running

from numbanorm import NormRecord

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NARROW = {np.dtype(kind) for kind in (np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.float16, np.float32)}
NARROW.add(BFLOAT16)
FLOATS = {np.dtype(kind) for kind in (np.float16, np.float32, np.float64)} | {BFLOAT16}


def lane(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype in which sums of elements of `dtype` are taken."""
    return np.dtype(np.float32 if dtype.newbyteorder("=") in NARROW else np.float64)


def result_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of results for inputs of `dtype`."""
    native = dtype.newbyteorder("=")
    return native if native in FLOATS else lane(native)


@dataclass(frozen=True)
class View:
    """One norm of arrays of one shape.

    Attributes
    ----------
    turn, back : callable
        Turn an array so that groups lie along `axes`, and back.
    axes : tuple of int
        The axes along which a group lies.
    spread : callable
        Make a weight broadcast against a turned array.
    others : tuple of int
        The axes along which elements share a weight.
    gather : callable
        Make what is left after a sum over `others` a weight again.
    public, private : callable
        Turn statistics, 1 in the place of `axes`, into what users get, and back.
    record : NormRecord
        Whether there is a mean, and by which formula statistics make a factor.
    """

    turn: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]
    axes: tuple[int, ...]
    spread: Callable[[Any], np.ndarray | None]
    others: tuple[int, ...]
    gather: Callable[[np.ndarray], np.ndarray]
    public: Callable[[np.ndarray], np.ndarray]
    private: Callable[[np.ndarray], np.ndarray]
    record: NormRecord


def _same(array: np.ndarray) -> np.ndarray:
    return array


def channel_view(record: NormRecord, shape: tuple[int, ...], channel_axis: int, groups: int = 1) -> View:
    """Return the view of a norm by channel: (N, groups, C / groups, space), or (N, C, 1, space)."""
    ndim = len(shape)
    sample, channel, space = channel_roles(ndim, channel_axis)
    n, c = shape[sample], shape[channel]
    lengths = tuple(shape[a] for a in space)
    order = (sample, channel, *space)
    split = (n, groups, c // groups, *lengths) if record.grouped else (n, c, 1, *lengths)
    roles = ("sample", "group", "channel") if record.grouped else ("sample", "channel", "")
    roles += ("space",) * len(lengths)
    far = tuple(range(3, len(split)))
    one = record.affine == "scalar"

    def turn(array: np.ndarray) -> np.ndarray:
        return array.transpose(order).reshape(split)

    def back(array: np.ndarray) -> np.ndarray:
        return array.reshape(n, c, *lengths).transpose(np.argsort(order))

    def spread(vector: Any) -> np.ndarray | None:
        if vector is None:
            return None
        return np.asarray(vector).reshape([1] * len(split) if one else (1, split[1], split[2], *[1] * len(far)))

    axes = tuple(a for a, role in enumerate(roles) if role in record.reduced)
    kept = tuple(m for a, m in enumerate(split) if roles[a] and a not in axes)
    if not axes:
        axes = (2,)  # instance norm without space: one element a group
    inner = tuple(1 if a in axes else m for a, m in enumerate(split))
    return View(
        turn,
        back,
        axes,
        spread,
        tuple(range(len(split))) if one else (0, *far),
        lambda total: total.reshape(() if one else c),
        lambda stats: stats.reshape(kept),
        lambda stats: np.asarray(stats).reshape(inner),
        record,
    )


def axes_view(record: NormRecord, shape: tuple[int, ...], axes: tuple[int, ...]) -> View:
    """Return the view of a norm over axes."""
    ndim = len(shape)
    axes = tuple(a % ndim for a in axes)
    in_order = sorted(axes)
    one = record.affine == "scalar"

    def spread(parameter: Any) -> np.ndarray | None:
        if parameter is None:
            return None
        if one:
            return np.asarray(parameter).reshape([1] * ndim)
        turned = np.asarray(parameter).transpose([axes.index(a) for a in in_order])
        return turned.reshape([shape[a] if a in axes else 1 for a in range(ndim)])

    def gather(total: np.ndarray) -> np.ndarray:
        if one:
            return total.reshape(())
        plain = total.reshape([shape[a] for a in in_order])
        return plain.transpose([in_order.index(a) for a in axes])

    others = tuple(a for a in range(ndim) if one or a not in axes)
    return View(_same, _same, axes, spread, others, gather, _same, np.asarray, record)


@dataclass(frozen=True)
class Result:
    """One array that a call must return.

    Attributes
    ----------
    name : str
        What it is.
    value : np.ndarray
        Its values; of longdouble where they may be off.
    dtype : np.dtype
        Its dtype.
    allowed : np.ndarray or float
        How far elements may be off, beside their own rounding.
    judged : np.ndarray or True
        Which elements are looked at.
    """

    name: str
    value: np.ndarray
    dtype: np.dtype[Any]
    allowed: Any = 0.0
    judged: Any = True

    def complaint(self, ours: Any) -> str | None:
        """Return what is wrong with an array; None if nothing is."""
        if not isinstance(ours, np.ndarray):
            return f"{self.name}: expected an array, got {type(ours).__name__}"
        if ours.dtype != self.dtype or ours.shape != self.value.shape:
            return f"{self.name}: expected {self.dtype}{self.value.shape}, got {ours.dtype}{ours.shape}"
        if self.dtype.kind in "iub":
            return None if (ours == self.value).all() else f"{self.name}: expected {self.value}, got {ours}"
        limits = ml_dtypes.finfo(self.dtype)
        exact = np.asarray(self.value, LONG)
        wide = ours.astype(LONG)
        rounding = LONG(float(limits.eps)) * np.abs(exact) + LONG(float(limits.smallest_subnormal))
        off = np.abs(wide - exact)
        right = off <= np.asarray(self.allowed, LONG) + rounding
        beyond = np.abs(exact) + self.allowed + rounding >= LONG(float(limits.max))
        uncertain = np.abs(exact) <= self.allowed  # what nothing is left of may have either sign
        right |= beyond & np.isinf(wide) & (uncertain | (np.sign(wide) == np.sign(exact)))
        right |= np.isnan(exact) & np.isnan(wide)
        right |= np.isinf(exact) & (wide == exact)
        right |= ~np.broadcast_to(np.asarray(self.judged), right.shape)
        if right.all():
            return None
        worst = tuple(int(i) for i in np.argwhere(~right)[0])
        return (
            f"{self.name}{list(worst)}: expected {exact[worst]!r}, got {ours[worst]!r}; "
            f"{int((~right).sum())} of {right.size} elements are off"
        )


BASE = {np.dtype(np.float32): 4e-6, np.dtype(np.float64): 2e-11}
"""How far a result may be off, as a share of the largest term that it is made of, by the dtype of the sums.

Twice FLOAT32_HARD of `tolerances`, twenty times FLOAT64: a few elements' largest term is not far above the typical one.
"""

MEAN_BITS = {np.dtype(np.float32): 2.0**-45, np.dtype(np.float64): 2.0**-50}
"""How far a mean is off, as a share of the largest element: kept in two float32 (48 bits), or in one float64."""


EDGE = LONG(1e-4)
"""How near the length of a vector must be to eps for either side of `max(length, eps)` to be right in a gradient."""

LEAST = {kind: LONG(np.finfo(kind).smallest_subnormal) for kind in BASE}
"""How far a small result may be off at least: subnormal numbers have few bits."""

RANGE = {np.dtype(np.float32): LONG(1e37), np.dtype(np.float64): LONG(1e300)}
"""Gradients are promised where x, 1/std and the products of both with dy stay within this: sums are taken in lanes."""


class Judge:
    """What calls on one array must return.

    Parameters
    ----------
    x : np.ndarray
        The input, or its sum with a residual.
    dtype : np.dtype
        The dtype that the caller gave.
    view : View
        Of the norm.
    mask : np.ndarray, optional
        True where an element counts.
    """

    def __init__(self, x: np.ndarray, dtype: np.dtype[Any], view: View, mask: np.ndarray | None = None) -> None:
        self.view = view
        self.lane, self.dtype = lane(dtype), result_dtype(dtype)
        self.x = view.turn(x.astype(LONG))
        self.size = x.size
        self.mask = None if mask is None else view.turn(np.broadcast_to(mask, x.shape))
        self.counts = np.ones(self.x.shape, bool) if self.mask is None else self.mask
        self.count, self.mean, self.m2 = moments(self.x, view.axes, self.mask, view.record.centred)
        self.base, self.bits = LONG(BASE[self.lane]), LONG(MEAN_BITS[self.lane])

    def settle(self, eps: float) -> None:
        """Take the statistics of the input."""
        self.var = self.m2 / np.maximum(self.count, 1)
        if self.view.record.scale == "l2":
            self.rstd = 1 / np.maximum(np.sqrt(self.m2), LONG(eps))
        else:
            self.rstd = 1 / np.sqrt(self.var + LONG(eps))

    def give(self, mean: np.ndarray, rstd: np.ndarray) -> None:
        """Take statistics that the caller gives, in the shape that users have them in."""
        self.mean = self.view.private(mean).astype(LONG) if self.view.record.centred else np.zeros(1, LONG)
        self.rstd = self.view.private(rstd).astype(LONG)

    def _largest(self, values: np.ndarray) -> np.ndarray:
        finite = np.where(np.isfinite(values) & self.counts, np.abs(values), 0)
        largest: np.ndarray = finite.max(self.view.axes, keepdims=True, initial=0)
        return largest

    def slack(self) -> np.ndarray:
        """Return how far (x - mean) * rstd may be off for the mean alone: it is kept in so many bits."""
        return (self.bits * np.maximum(self._largest(self.x), np.abs(self.mean)) + LEAST[self.lane]) * self.rstd

    def forward(self, weight: Any, bias: Any) -> Result:
        """Return the normalized array."""
        w, b = self.view.spread(weight), self.view.spread(bias)
        h = (self.x - self.mean) * self.rstd
        y = h if w is None else h * w.astype(LONG)
        gain = 1 if w is None else np.abs(w.astype(LONG))
        shift = 0 if b is None else np.abs(b.astype(LONG))
        y = y if b is None else y + b.astype(LONG)
        allowed = self.base * ((self._largest(h) + np.abs(h)) * gain + shift) + 4 * self.slack() * gain
        allowed = allowed + 2 * LEAST[self.lane] * (1 + self.rstd) * gain
        allowed = np.where(np.isfinite(allowed), allowed, 0)
        judged = ~(np.isfinite(h) & (np.abs(h) >= RANGE[self.lane]))  # what does not count may be beyond all bounds
        # Inf times what may round to 0 may be NaN; what it multiplies is told from 0 by the mean as one lane holds it.
        held = LONG(np.finfo(self.lane).eps) * np.maximum(self._largest(self.x), np.abs(self.mean)) * self.rstd
        judged &= ~(np.isinf(gain) & (np.abs(h) <= held + 4 * self.slack() + 2 * LEAST[self.lane] * (1 + self.rstd)))
        back = self.view.back
        return Result("y", back(y), self.dtype, back(np.broadcast_to(allowed, y.shape)), back(judged))

    def statistics(self) -> list[Result]:
        """Return mean and rstd as users get them; those of spoiled groups need not be judged."""
        kind = np.dtype(np.float64)
        whole = np.isfinite(self.mean) & np.isfinite(self.m2)
        deviation = np.sqrt(self.m2 / np.maximum(self.count, 1))
        off = self.base * deviation + self.bits * self._largest(self.x)
        relative = self.base + self.bits * self._largest(self.x) * np.where(np.isfinite(self.rstd), self.rstd, 0)
        shown = [("mean", self.mean, off)] if self.view.record.centred else []
        shown.append(("rstd", self.rstd, 4 * relative * self.rstd))
        public = self.view.public
        return [
            Result(name, public(value), kind, public(np.where(whole, limit, 0)), public(whole))
            for name, value, limit in shown
        ]

    def running(self, mean: np.ndarray, var: np.ndarray, momentum: float) -> list[Result]:
        """Return what the running statistics must become; those that NaN or Inf spoils are not judged."""
        old = [a.astype(np.float64).reshape(-1, 1) for a in (mean, var)]
        moved: list[Any] = old
        if self.size > 0:
            others = (0, *range(3, self.x.ndim))
            moved = list(running(*old, self.count, self.mean, self.m2, momentum, others))
        means, variances = (np.asarray(a, LONG).reshape(mean.shape) for a in moved)
        sane = np.isfinite(variances) & np.isfinite(means)
        deviation = np.sqrt(np.where(sane, np.abs(variances), 0)) + np.sqrt(np.abs(old[1].reshape(-1)))
        off_mean = self.base * (np.abs(means) + np.abs(old[0].reshape(-1)) + deviation)
        # As for rstd: means that are merged are kept in so many bits.
        kept = self.bits * self._largest(self.x).max(initial=0) * deviation
        off_var = 4 * (self.base * (np.abs(variances) + np.abs(old[1].reshape(-1))) + kept)
        return [
            Result(name, value, given.dtype, np.where(sane, off, 0), sane)
            for name, value, given, off in (
                ("running_mean", means, mean, off_mean),
                ("running_var", variances, var, off_var),
            )
        ]

    def backward(self, dy: np.ndarray, weight: Any, weight_dtype: np.dtype[Any], fixed: bool) -> list[Result]:
        """Return dx, dweight and dbias; groups and weights that NaN or Inf spoils are not judged."""
        view, axes = self.view, self.view.axes
        d = view.turn(dy.astype(self.dtype).astype(LONG))
        w = view.spread(weight)
        g = d if w is None else d * w.astype(LONG)
        h = (self.x - self.mean) * self.rstd
        centred = view.record.centred
        some, depends, certain = np.maximum(self.count, 1), np.bool_(True), np.bool_(True)
        if view.record.scale == "l2":
            length = np.sqrt(self.m2) * self.rstd  # 1, or less where eps is larger than the norm: a constant factor
            depends = ~(length < 1 - self.base)
            certain = depends | (length < 1 - EDGE)
            some = np.ones_like(some)
        mean_g = g.sum(axes, keepdims=True) / some if centred else LONG(0)
        mean_gh = np.where(depends, (g * h).sum(axes, keepdims=True) / some, 0)
        counts = np.zeros(self.x.shape, bool) if fixed else self.counts
        dx = self.rstd * (g - counts * (mean_g + h * mean_gh))
        sum_g = np.abs(g).sum(axes, keepdims=True) / some if centred else LONG(0)
        sum_gh = np.where(depends, np.abs(g * h).sum(axes, keepdims=True) / some, 0)
        slack = 4 * self.slack()
        allowed = self.rstd * self.base * (np.abs(g) + sum_g + (1 + np.abs(h)) * (sum_gh + sum_g))
        allowed = allowed + self.rstd * slack * (sum_gh + (1 + np.abs(h)) * sum_g)
        # A product of subnormal numbers is off by LEAST; it meets h in the mean of g * h, and h again.
        twice = (1 + np.abs(h)) * (1 + np.abs(h).sum(axes, keepdims=True, where=self.counts) / some)
        allowed = allowed + 4 * LEAST[self.lane] * (1 + self.rstd) * twice * (1 if w is None else 1 + np.abs(w))
        limit = RANGE[self.lane]
        judged = (np.abs(dx) < limit) & certain
        for part in (
            (g, d, h, g * h) if fixed else (self.x, g, d, h, d * h, g * h, h * mean_gh, self.rstd, 1 / self.rstd)
        ):
            judged = judged & (np.abs(part) < limit)
        if not fixed:
            judged = judged.all(axes, keepdims=True)
        judged = np.broadcast_to(judged, dx.shape)
        allowed = view.back(np.where(judged, allowed, 0))
        results = [Result("dx", view.back(dx), self.dtype, allowed, view.back(judged))]
        sums = [("dweight", d * h, np.abs(d) * slack), ("dbias", d, np.zeros_like(d))]
        for name, terms, more in sums if view.record.bias else sums[:1]:
            fine = view.gather((judged & (np.abs(terms) < limit)).all(view.others))
            off = view.gather((self.base * np.abs(terms) + more + 4 * LEAST[self.lane]).sum(view.others))
            total = view.gather(terms.sum(view.others))
            results.append(Result(name, total, weight_dtype, np.where(fine, off, 0), fine))
        return results
