"""The quick way of arrays for one thread: what shape, dtype and options decide is settled once and looked up.

A call of a few thousand elements is over in 1 us in the kernel; checks, plans and geometry would take 7 us more, and
10 of 170 us at (512, 1024): larger arrays go this way, too, where one thread serves them. It takes plain calls only:
C-ordered arrays, parameters as the kernels read them, no mask, an `out` that is `x` or apart from all inputs. `find`
returns None for all else, and where an argument is wrong: the long way, `numbanorm.calls`, serves or refuses it.
"""

from __future__ import annotations

from functools import lru_cache
from math import inf, prod
from typing import Any

import numpy as np

from ..core.dtypes import Format, format_of
from ..core.plan import Options, Plan, plan
from ..core.pool import POOL, SMALLEST
from ..core.threads import usable_threads
from .check import integer, is_key, normalized_axes
from .dispatch import cpu_backend
from .host import ROWS_OF, public_statistic

__all__ = [
    "Bound",
    "Quick",
    "QuickBackward",
    "Turned",
    "TurnedBackward",
    "find",
    "find_backward",
    "find_backward_by_channel",
    "find_by_channel",
    "find_given",
]

_empty_like, _ndarray, _may_share = np.empty_like, np.ndarray, np.may_share_memory
_FLOAT64 = np.dtype(np.float64)

LARGEST = 1 << 22
"""Elements: beyond, the kernel takes milliseconds."""

_NO_MEAN = np.zeros(1)


def _is_pooled(work: Plan, form: Format) -> bool:
    """Tell whether outputs come from the pool."""
    return work.size * form.result.itemsize >= SMALLEST


def _is_small(work: Plan) -> bool:
    """Tell whether one thread serves an array, however many there are."""
    return bool(work.size < cpu_backend().PARALLEL_FROM)


def _is_parameter(value: Any, lane: np.dtype[Any], shape: tuple[int, ...]) -> bool:
    return value is None or (
        type(value) is _ndarray and value.dtype is lane and value.shape == shape and value.flags.carray
    )


class Quick:
    """Calls of one norm on C-ordered arrays of one shape and dtype, on one thread, with or without weight and bias."""

    __slots__ = (
        "_apply",
        "_columns",
        "_forward",
        "_given",
        "_half",
        "_lane",
        "_layout",
        "_new",
        "_public",
        "_result",
        "_shape",
        "epsilon",
        "size",
        "small",
    )

    def __init__(self, work: Plan, form: Format, affine: bool) -> None:
        layout = work.layout
        kernels = cpu_backend().Settled(work, form, affine)
        self._forward, self._apply, self._given = kernels.forward, kernels.apply, kernels.given
        self._columns = work.columns
        self._layout = layout
        self._lane = form.lane
        self._result = form.result
        self._half = form.result.itemsize == 2
        self._new = POOL.empty_like if _is_pooled(work, form) else _empty_like
        self._shape = layout.affine_shape
        self._public = (4, *layout.stats_shape) if layout.stats_order is None else None
        self.epsilon = form.epsilon
        self.size = layout.size
        self.small = _is_small(work)

    def fits(self, parameter: Any) -> bool:
        """Tell whether a weight, bias or running statistic is what the kernel reads."""
        return _is_parameter(parameter, self._lane, self._shape)

    def reads(self, parameter: Any) -> bool:
        """Tell whether a weight or bias is what the kernel reads, or what `widened` turns into that."""
        return parameter is None or (
            type(parameter) is _ndarray
            and (parameter.dtype is self._lane or (self._half and parameter.dtype is self._result))
            and parameter.shape == self._shape
            and parameter.flags.carray
        )

    def widened(self, parameter: Any) -> Any:
        """Return a weight or bias of half precision as float32, any other as it is."""
        return parameter if parameter is None or parameter.dtype is self._lane else parameter.astype(self._lane)

    def adds(self, x: np.ndarray, residual: Any) -> bool:
        """Tell whether the kernel can add a residual, if there is one."""
        return residual is None or (
            type(residual) is _ndarray
            and not self._columns
            and residual.dtype is x.dtype is self._result
            and residual.shape == x.shape
            and residual.flags.carray
        )

    def writes(self, out: Any, x: np.ndarray, *inputs: Any) -> bool:
        """Tell whether the kernel can write to an array that the caller gave, apart from all inputs or `x` itself."""
        if type(out) is not _ndarray or out.dtype is not self._result or out.shape != x.shape or not out.flags.carray:
            return False
        if out is not x and _may_share(out, x):
            return False
        for array in inputs:  # noqa: SIM110  # not `any` over a generator: 0.3 us less
            if array is not None and _may_share(out, array):
                return False
        return True

    def run(
        self,
        x: np.ndarray,
        weight: np.ndarray | None,
        bias: np.ndarray | None,
        eps: float,
        return_stats: bool,
        out: np.ndarray | None = None,
        residual: np.ndarray | None = None,
    ) -> Any:
        """Normalize with the statistics of the input; return what the caller gets."""
        if residual is None:
            y, stats = self.forward(x, weight, bias, eps, out, return_stats)
            return (y, *self.public(stats)) if return_stats else y
        y = self._new(x, self._result) if out is None else out
        total = self._new(y, self._result)
        flat = residual.ravel(), total.ravel()
        if self._half:
            weight, bias = self.widened(weight), self.widened(bias)
        stats = self._forward(x.ravel(), y.ravel(), weight, bias, eps, *flat, return_stats)
        return (y, *self.public(stats), total) if return_stats else (y, total)

    def forward(
        self, x: np.ndarray, weight: Any, bias: Any, eps: float, out: np.ndarray | None = None, keep: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the result and, if they are to be kept, the backend's statistics."""
        y = self._new(x, self._result) if out is None else out
        if self._half:
            weight, bias = self.widened(weight), self.widened(bias)
        return y, self._forward(x.ravel(), y.ravel(), weight, bias, eps, None, None, keep)

    def public(self, stats: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return a backend's statistics as users get them: mean, where there is one, and rstd."""
        rows = ROWS_OF[self._layout.centred]
        if self._public is None:
            return tuple([public_statistic(stats[row], self._layout) for row in rows])
        shaped = stats.reshape(self._public)
        return tuple([shaped[row] for row in rows])

    def apply(
        self,
        x: np.ndarray,
        mean: np.ndarray,
        var: np.ndarray,
        weight: Any,
        bias: Any,
        eps: float,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Normalize with running statistics."""
        y = self._new(x, self._result) if out is None else out
        if self._half:
            weight, bias = self.widened(weight), self.widened(bias)
        self._apply(x.ravel(), y.ravel(), weight, bias, self._given(mean, var, eps))
        return y


class QuickBackward:
    """Backward of one norm for C-ordered arrays of one shape and dtype, on one thread."""

    __slots__ = ("_backward", "_centred", "_lane", "_pooled", "_result", "_shape", "_statistics", "small")

    def __init__(self, work: Plan, form: Format) -> None:
        self._backward = cpu_backend().SettledBackward(work, form).backward
        self.small = _is_small(work)
        self._pooled = _is_pooled(work, form)
        self._centred = work.layout.centred
        self._lane, self._result = form.lane, form.result
        self._shape, self._statistics = work.layout.affine_shape, work.layout.stats_shape

    def takes(self, dy: Any, x: np.ndarray, mean: Any, rstd: Any, weight: Any) -> bool:
        """Tell whether all arrays are what the kernel reads."""
        return (
            type(dy) is _ndarray
            and dy.dtype is x.dtype
            and dy.shape == x.shape
            and dy.flags.carray
            and self._given(rstd)
            and (self._given(mean) if self._centred else mean is None)
            and _is_parameter(weight, self._lane, self._shape)
        )

    def _given(self, statistic: Any) -> bool:
        return (
            type(statistic) is _ndarray
            and statistic.dtype is _FLOAT64
            and statistic.shape == self._statistics
            and statistic.flags.carray
        )

    def run(self, dy: np.ndarray, x: np.ndarray, mean: Any, rstd: np.ndarray, weight: Any) -> tuple[np.ndarray, ...]:
        """Return dx, dweight and, where there is a mean, dbias."""
        dx = POOL.empty(x.shape, self._result, x, dy) if self._pooled else _empty_like(x, self._result)
        flat_mean = mean.ravel() if self._centred else _NO_MEAN
        flat = dy.ravel(), x.ravel(), dx.ravel()
        gradients = self._backward(*flat, weight, flat_mean, rstd.ravel())
        dweight = gradients[0].reshape(self._shape)
        return (dx, dweight, gradients[1].reshape(self._shape)) if self._centred else (dx, dweight)


class _Turn:
    """The transposition that brings the channels of arrays of some number of axes from second to last, and back."""

    __slots__ = ("_back", "_there")

    def __init__(self, axes: int) -> None:
        self._there = (0, *range(2, axes), 1)
        self._back = (0, axes - 1, *range(1, axes - 1))

    @staticmethod
    def of(x: Any, channel_axis: Any) -> tuple[_Turn, np.ndarray] | None:
        """Return it, and the view there, for channels-first arrays that lie channels last; None for others."""
        if type(x) is not _ndarray or x.flags.carray:
            return None
        axes = x.ndim
        if axes < 3 or type(channel_axis) is not int or channel_axis not in (1, 1 - axes):
            return None
        turn = _TURNS.get(axes)
        if turn is None:
            turn = _TURNS[axes] = _Turn(axes)
        there = turn.there(x)
        return (turn, there) if there.flags.carray else None

    def there(self, x: np.ndarray) -> np.ndarray:
        """Return the view in the order of memory."""
        return x.transpose(self._there)

    def back(self, y: np.ndarray) -> np.ndarray:
        """Return the view in the order of the caller's axes."""
        return y.transpose(self._back)


_TURNS: dict[int, _Turn] = {}


class Turned:
    """A call of one norm on channels-first arrays that lie channels last in memory: that on their transposed views."""

    __slots__ = ("_into", "_there", "_turn", "_way", "fits")

    def __init__(self, turn: _Turn, way: Any, there: np.ndarray, into: np.ndarray | None) -> None:
        self._turn, self._way, self._there, self._into = turn, way, there, into
        self.fits = way.fits

    def run(
        self, _x: np.ndarray, weight: Any, bias: Any, eps: float, return_stats: bool, out: np.ndarray | None = None
    ) -> Any:
        """Do what `Quick.run` does."""
        result = self._way.run(self._there, weight, bias, eps, return_stats, self._into)
        if not return_stats:
            return self._turn.back(result) if out is None else out
        return (self._turn.back(result[0]) if out is None else out, *result[1:])

    def apply(
        self,
        _x: np.ndarray,
        mean: np.ndarray,
        var: np.ndarray,
        weight: Any,
        bias: Any,
        eps: float,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Do what `Quick.apply` does."""
        y = self._way.apply(self._there, mean, var, weight, bias, eps, self._into)
        return self._turn.back(y) if out is None else out


class TurnedBackward:
    """Backward for such arrays."""

    __slots__ = ("_dy", "_turn", "_way", "_x")

    def __init__(self, turn: _Turn, way: Any, dy: np.ndarray, x: np.ndarray) -> None:
        self._turn, self._way, self._dy, self._x = turn, way, dy, x

    def run(self, _dy: np.ndarray, _x: np.ndarray, mean: Any, rstd: np.ndarray, weight: Any) -> tuple[np.ndarray, ...]:
        """Do what `QuickBackward.run` does."""
        dx, *gradients = self._way.run(self._dy, self._x, mean, rstd, weight)
        return (self._turn.back(dx), *gradients)


class Bound:
    """A layer's last quick way, for further inputs of the same shape and dtype while its parameters are the same."""

    __slots__ = ("_bias", "_dtype", "_eps", "_shape", "_weight", "eps", "way")

    def __init__(self, way: Quick, x: np.ndarray, weight: Any, bias: Any, eps: float | None) -> None:
        self.way = way
        self.eps = way.epsilon if eps is None else eps
        self._shape, self._dtype, self._weight, self._bias, self._eps = x.shape, x.dtype, weight, bias, eps

    def serves(self, x: Any, weight: Any, bias: Any, eps: float | None) -> bool:
        """Tell whether this is the quick way for an input and parameters."""
        return (
            type(x) is _ndarray
            and x.shape == self._shape
            and x.dtype is self._dtype
            and weight is self._weight
            and bias is self._bias
            and eps is self._eps
            and x.flags.carray
            and (self.way.small or usable_threads() == 1)
        )


def find(
    norm: str, x: Any, weight: Any, bias: Any, eps: Any, out: Any, residual: Any, first: Any, second: Any = None
) -> Quick | None:
    """Return the quick way of a call that normalizes with its input's statistics, or None.

    Parameters
    ----------
    norm : str
        A key of `numbanorm.layout.NORMS`.
    x, weight, bias, eps, out, residual
        The call's arguments.
    first, second
        For layer and RMS norm `normalized_shape` and `axis`, for the others `channel_axis` and `num_groups`.
    """
    if type(x) is not _ndarray or type(eps) is not float or not 0.0 <= eps < inf:
        return None
    if not (is_key(first) and is_key(second)):
        return None
    try:
        quick = _look_up(norm, x.shape, x.dtype, weight is None, bias is None, first, second)
    except TypeError:  # what cannot be looked up, such as a list
        return None
    if quick is None or not quick.reads(weight) or not quick.reads(bias):
        return None
    if not x.flags.carray or not (quick.small or usable_threads() == 1):
        return None
    if not quick.adds(x, residual):
        return None
    return quick if out is None or quick.writes(out, x, weight, bias, residual) else None


def find_by_channel(
    norm: str, x: Any, weight: Any, bias: Any, eps: Any, out: Any, channel_axis: Any, num_groups: Any = None
) -> Quick | Turned | None:
    """Do what `find` does for a norm with a channel axis; channels may also lie last in memory."""
    turned = _Turn.of(x, channel_axis)
    if turned is None:
        return find(norm, x, weight, bias, eps, out, None, channel_axis, num_groups)
    turn, there = turned
    into = there if out is x else out
    if out is not None and out is not x:
        if type(out) is not _ndarray or out.ndim != x.ndim:
            return None
        into = turn.there(out)
    way = find(norm, there, weight, bias, eps, into, None, x.ndim - 1, num_groups)
    return None if way is None else Turned(turn, way, there, into)


def find_given(
    x: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: Any, channel_axis: Any, out: Any
) -> Quick | Turned | None:
    """Return the quick way of a call that normalizes with running statistics, or None."""
    if mean is None or var is None:
        return None
    quick = find_by_channel("given", x, weight, bias, eps, out, channel_axis)
    if quick is None or not quick.fits(mean) or not quick.fits(var):
        return None
    return quick if out is None or not (_may_share(out, mean) or _may_share(out, var)) else None


def find_backward(
    norm: str, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, first: Any, second: Any = None
) -> QuickBackward | None:
    """Return the quick way of a backward through the input's statistics, or None; otherwise as `find`."""
    if type(x) is not _ndarray:
        return None
    if not (is_key(first) and is_key(second)):
        return None
    try:
        quick = _look_up_backward(norm, x.shape, x.dtype, first, second)
    except TypeError:
        return None
    if quick is None or not x.flags.carray or not (quick.small or usable_threads() == 1):
        return None
    return quick if quick.takes(dy, x, mean, rstd, weight) else None


def find_backward_by_channel(
    norm: str, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, channel_axis: Any, num_groups: Any = None
) -> QuickBackward | TurnedBackward | None:
    """Do what `find_backward` does for a norm with a channel axis; channels may also lie last in memory."""
    turned = _Turn.of(x, channel_axis)
    if turned is None:
        return find_backward(norm, dy, x, mean, rstd, weight, channel_axis, num_groups)
    if type(dy) is not _ndarray or dy.ndim != x.ndim:
        return None
    turn, there = turned
    dy_there = turn.there(dy)
    way = find_backward(norm, dy_there, there, mean, rstd, weight, x.ndim - 1, num_groups)
    return None if way is None else TurnedBackward(turn, way, dy_there, there)


@lru_cache(maxsize=4096, typed=True)
def _look_up_backward(
    norm: str, shape: tuple[int, ...], dtype: np.dtype[Any], first: Any, second: Any
) -> QuickBackward | None:
    form = format_of(dtype)
    if form is None or not form.is_float:
        return None
    work = _plain_plan(norm, shape, dtype, first, second, separable=True)
    if work is None or work.layout.stats_order is not None or not cpu_backend().SettledBackward.settles(work):
        return None
    return QuickBackward(work, form)


@lru_cache(maxsize=4096, typed=True)  # typed: True is not 1 here
def _look_up(
    norm: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    no_weight: bool,
    no_bias: bool,
    first: Any,
    second: Any,
) -> Quick | None:
    form = format_of(dtype)
    work = None if form is None else _plain_plan(norm, shape, dtype, first, second)
    if form is None or work is None:
        return None
    if norm in ("batch", "instance") and work.layout.count == 1:  # refused
        return None
    return Quick(work, form, not (no_weight and no_bias))


def _plain_plan(
    norm: str, shape: tuple[int, ...], dtype: np.dtype[Any], first: Any, second: Any, separable: bool = False
) -> Plan | None:
    """Return the plan for C-ordered arrays; None where arguments do not fit or the layout is no plain one."""
    if not 0 < prod(shape) <= LARGEST:
        return None
    placed = tuple(dtype.itemsize * prod(shape[axis + 1 :]) for axis in range(len(shape))), dtype.itemsize
    try:
        options = _options(norm, shape, first, second)
        name = "batch" if norm == "given" else norm
        work = plan(name, options, shape, placed, placed if separable else None, separable=separable)
    except (TypeError, ValueError):
        return None
    plain = work.x == work.packed and work.inverse is None and not work.reordered and work.layout.affine_order is None
    return work if plain else None


def _options(norm: str, shape: tuple[int, ...], first: Any, second: Any) -> Options:
    if norm in ("layer", "rms"):
        return 1, None, normalized_axes(shape, first, second)
    return integer(first, "channel_axis"), integer(second, "num_groups") if norm == "group" else None, None
