"""Calls on arrays in host memory: one look-up by what the arrays look like, one prepared object, one bound launch.

What decides a call is the norm, its options, and the shape, strides and dtype of every array; `_PREPARED` holds what
serves a call under these. Whatever depends on them alone is checked when it is made, and a call that is wrong raises
then and leaves nothing. A call that is found tests what can differ among calls that look alike: whether arrays are
NumPy's own, and the values of eps and momentum. All other calls go the long way round, to the same object.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import Any

import numpy as np

from ..core.norms import record_of
from ..core.spec import spec_of
from . import check
from .arrays import Back, as_array, as_input, as_mask, as_parameter, way_back
from .dispatch import Outcome, Request, handler_of
from .gradients import caches as gradient_caches
from .gradients import prepared_backward_for
from .prepare import of_running_statistics
from .prepared import caches as prepared_caches
from .prepared import prepared_for

__all__ = ["are_plain", "as_running", "backward", "find", "forget", "forward", "serve", "tracked"]

_ndarray = np.ndarray

_PREPARED: dict[Any, Any] = {}
"""What serves calls, by what they look like."""

_LAST: dict[str, tuple[Any, ...]] = {}
_LAST_TRACKED: dict[str, tuple[Any, ...]] = {}
_LAST_BACKWARD: dict[str, tuple[Any, ...]] = {}
"""What served each norm's last call of a kind: what its arrays look like, its options, and what served it. To compare
with it takes half the time of a look-up."""

_NO_EXTRAS = (None, None, None)

MOST_PREPARED = 1 << 14
"""Prepared calls to look up, a few KB each; a program that makes more begins anew."""


def forward(
    norm: str,
    options: tuple[Any, Any],
    x: Any,
    weight: Any,
    bias: Any,
    eps: Any,
    extras: tuple[Any, Any, Any] | None,
    return_stats: bool,
    stream: Any,
) -> Any:
    """Normalize with the statistics of the input; return what the functions return.

    Parameters
    ----------
    norm, options, x, weight, bias, eps
        As `numbanorm.calls.dispatch.Request` has them.
    extras : tuple or None
        ``(mask, residual, out)``; None where all of them are.
    return_stats, stream
        As the functions take them.
    """
    key: Any = None
    try:
        w = weight if weight is None else (weight.shape, weight.strides, weight.dtype)
        b = bias if bias is None else (bias.shape, bias.strides, bias.dtype)
        e = extras if extras is None else looks(*extras)
        last = _LAST.get(norm)
        if last is not None and x.shape == last[0] and w == last[3] and b == last[4] and options == last[5]:
            prepared = last[7] if x.strides == last[1] and x.dtype is last[2] and e == last[6] else None
        else:
            prepared = None
        if prepared is None:
            key = norm, options, x.shape, x.strides, x.dtype, w, b, e
            prepared = _PREPARED[key]
            _LAST[norm] = x.shape, x.strides, x.dtype, w, b, options, e, prepared
    except (KeyError, AttributeError, TypeError, ValueError):
        prepared = None
    if (
        prepared is not None
        and type(x) is _ndarray
        and (weight is None or type(weight) is _ndarray)
        and (bias is None or type(bias) is _ndarray)
        and (extras is None or are_plain(extras))
        and ((type(options[0]) is int and options[1] is None) or are_integers(options))
        and stream is None
    ):
        if eps is None and prepared.epsilon is not None:
            eps = prepared.epsilon
        elif type(eps) is not float or not 0.0 <= eps < inf:
            eps = check.check_eps(eps)
        mask, residual, out = extras or _NO_EXTRAS
        y, stats, total = prepared.run(x, weight, bias, eps, mask, residual, out, return_stats)
        if return_stats or total is not None:
            return prepared.results(y, stats, total, return_stats)
        return y
    mask, residual, out = extras or _NO_EXTRAS
    request = Request(norm, options, x, weight, bias, eps, mask, residual, out, keep=return_stats)
    return serve(request, stream, key).results(return_stats)


def tracked(
    norm: str,
    options: tuple[Any, None],
    x: Any,
    running: tuple[Any, Any, bool, Any],
    weight: Any,
    bias: Any,
    eps: Any,
    extras: tuple[Any, Any, Any] | None,
    return_stats: bool,
    stream: Any,
) -> Any:
    """Run a norm that may keep running statistics: from its input and updating them, or from them.

    Parameters
    ----------
    running : tuple
        ``(running_mean, running_var, from_input, momentum)``.
    norm, options, x, weight, bias, eps, extras, return_stats, stream
        As for `forward`.
    """
    mean, var, from_input, momentum = running
    if mean is None and var is None and from_input:
        return forward(norm, options, x, weight, bias, eps, extras, return_stats, stream)
    key: Any = None
    try:
        w = weight if weight is None else (weight.shape, weight.strides, weight.dtype)
        b = bias if bias is None else (bias.shape, bias.strides, bias.dtype)
        m, v = (mean.shape, mean.strides, mean.dtype), (var.shape, var.strides, var.dtype)
        key = norm, options, not from_input, x.shape, x.strides, x.dtype, w, b, m, v, extras and looks(*extras)
        last = _LAST_TRACKED.get(norm)
        if last is not None and key == last[0]:
            prepared = last[1]
        else:
            prepared = _PREPARED[key]
            _LAST_TRACKED[norm] = key, prepared
    except (KeyError, AttributeError, TypeError, ValueError):
        prepared = None
    mask, residual, out = extras or _NO_EXTRAS
    if (
        prepared is None
        or not (type(x) is type(mean) is type(var) is _ndarray)
        or not (weight is None or type(weight) is _ndarray)
        or not (bias is None or type(bias) is _ndarray)
        or not (extras is None or are_plain(extras))
        or not ((type(options[0]) is int and options[1] is None) or are_integers(options))
        or stream is not None
    ):
        given = (mask, residual, out, mean, var, momentum, bool(from_input), return_stats)
        return serve(Request(norm, options, x, weight, bias, eps, *given), stream, key).results(return_stats)
    if type(eps) is not float or not 0.0 <= eps < inf:
        eps = check.check_eps(eps)
    if from_input:
        if type(momentum) is not float or not -inf < momentum < inf:
            momentum = check.check_momentum(momentum)
        y, stats = prepared.train(x, weight, bias, eps, mask, out, mean, var, momentum)
    else:
        y, stats = prepared.given(x, weight, bias, eps, out, mean, var)
    return prepared.results(y, stats, None, True) if return_stats else y


def backward(
    norm: str,
    options: tuple[Any, Any],
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    mask: Any,
    fixed: bool,
    stream: Any,
) -> Any:
    """Return dx, dweight and, where the norm has a bias, dbias; `fixed`: the statistics do not depend on x."""
    key: Any = None
    try:
        key = (
            norm,
            fixed,
            options,
            x.shape,
            x.strides,
            x.dtype,
            (dy.shape, dy.strides, dy.dtype),
            mean if mean is None else (mean.shape, mean.strides, mean.dtype),
            (rstd.shape, rstd.strides, rstd.dtype),
            weight if weight is None else (weight.shape, weight.strides, weight.dtype),
            mask if mask is None else (mask.shape, mask.strides, mask.dtype),
        )
        last = _LAST_BACKWARD.get(norm)
        if last is not None and key == last[0]:
            prepared = last[1]
        else:
            prepared = _PREPARED[key]
            _LAST_BACKWARD[norm] = key, prepared
    except (KeyError, AttributeError, TypeError, ValueError):
        prepared = None
    if (
        prepared is None
        or not (type(x) is type(dy) is type(rstd) is _ndarray)
        or not (mean is None or type(mean) is _ndarray)
        or not (weight is None or type(weight) is _ndarray)
        or not (mask is None or type(mask) is _ndarray)
        or not ((type(options[0]) is int and options[1] is None) or are_integers(options))
        or stream is not None
    ):
        handler = handler_of(x, stream)
        own = (norm, options, dy, x, mean, rstd, weight, mask, fixed)
        return _serve_backward(key, *own) if handler is None else handler.backward(*own)
    return prepared.run(dy, x, mean, rstd, weight, mask)


def forget() -> None:
    """Forget what serves calls; the next ones are prepared anew."""
    for known in (_PREPARED, _LAST, _LAST_TRACKED, _LAST_BACKWARD):
        known.clear()
    for cached in (*prepared_caches, *gradient_caches):
        cached.cache_clear()


def looks(mask: Any, residual: Any, out: Any) -> tuple[Any, Any, Any]:
    """Return what arrays look like."""
    return (
        mask if mask is None else (mask.shape, mask.strides, mask.dtype),
        residual if residual is None else (residual.shape, residual.strides, residual.dtype),
        out if out is None else (out.shape, out.strides, out.dtype),
    )


def are_plain(given: tuple[Any, ...]) -> bool:
    """Tell whether all arrays that there are, are NumPy's own."""
    for array in given:  # noqa: SIM110  # not `all` over a generator: 0.2 us less
        if array is not None and type(array) is not _ndarray:
            return False
    return True


def are_integers(options: tuple[Any, Any]) -> bool:
    """Tell whether options are integers, tuples of them, or None: True and 1.0 are found where 1 is."""
    first, second = options
    return (type(first) is int or (type(first) is tuple and set(map(type, first)) == {int})) and (
        second is None or type(second) is int or (type(second) is tuple and set(map(type, second)) == {int})
    )


def _are_same(arrays: tuple[Any, ...], given: tuple[Any, ...]) -> bool:
    """Tell whether the arrays are those of the caller, none converted: then what serves them may be remembered."""
    return all(array is own for array, own in zip(arrays, given, strict=True))


def keep(key: Any, prepared: Any) -> None:
    """Remember what serves a call; what cannot be a key is not."""
    if len(_PREPARED) >= MOST_PREPARED:
        _PREPARED.clear()
    with suppress(TypeError):  # an option is a list
        _PREPARED[key] = prepared


def serve(request: Request, stream: Any = None, key: Any = None) -> Outcome:
    """Do a forward call on arrays of any kind, and remember what served it under `key`, if it can be found there again.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; nothing is written then.
    """
    handler = handler_of(request.x, stream)
    if handler is not None:
        outcome: Outcome = handler.forward(request)
        return outcome
    x = as_input(request.x, "x")
    record = record_of(request.norm)
    options = check.options_of(record, x.shape, *request.options)
    form = check.check_format(x.dtype, "x")
    lane = form.lane
    weight, bias = as_parameter(request.weight, "weight", lane), as_parameter(request.bias, "bias", lane)
    mask = as_mask(request.mask, record)
    residual = None if request.residual is None else as_input(request.residual, "residual")
    out = _as_output(request.out)
    mean, var = (
        None if array is None else as_running(array, name, request.from_input)
        for name, array in (("running_mean", request.running_mean), ("running_var", request.running_var))
    )
    arrays = (x, weight, bias, mask, residual, out, mean, var)
    prepared = prepared_for(request.norm, options, *arrays, from_input=request.from_input)
    eps = form.epsilon if request.eps is None and record.eps is None else check.check_eps(request.eps)
    total, batches = None, request.batches
    if not request.from_input:
        y, stats = prepared.given(x, weight, bias, eps, out, mean, var)
    elif mean is not None:
        momentum = check.share_of(request.momentum, batches)
        counted = batches is not None and x.size > 0 and (mask is None or bool(np.any(mask)))  # nothing fails later
        y, stats = prepared.train(x, weight, bias, eps, mask, out, mean, var, momentum)
        batches = batches + 1 if counted else batches
    else:
        y, stats, total = prepared.run(x, weight, bias, eps, mask, residual, out, request.keep)
    given = request.x, request.weight, request.bias, request.residual
    if key is not None and type(request.x) is _ndarray and _are_same((x, weight, bias, residual), given):
        keep(key, prepared)
    back = way_back(request.x)
    y = y if request.out is None else request.out
    if back is None:
        return Outcome(y, total, stats, prepared, batches)
    y = back(y) if request.out is None else y
    return Outcome(y, None if total is None else back(total), stats, _Elsewhere(prepared, back), batches)


def find(
    norm: str,
    options: tuple[Any, Any],
    x: np.ndarray,
    weight: Any,
    bias: Any,
    eps: Any,
    mean: Any = None,
    var: Any = None,
    *,
    from_input: bool = True,
) -> tuple[float, Any]:
    """Return the value of eps, and what serves a layer's calls on inputs that look like this one."""
    record = record_of(norm)
    form = check.check_format(x.dtype, "x")
    own = check.options_of(record, x.shape, *options)
    prepared = prepared_for(norm, own, x, weight, bias, None, None, None, mean, var, from_input=from_input)
    number = form.epsilon if eps is None and record.eps is None else check.check_eps(eps)
    return number, prepared


class _Elsewhere:
    """What served a call on arrays of another library, whose statistics are of its kind, too."""

    def __init__(self, prepared: Any, back: Back) -> None:
        self._prepared, self._back = prepared, back

    def public(self, stats: Any) -> tuple[Any, ...]:
        """Return statistics as users get them."""
        return tuple(map(self._back, self._prepared.public(stats)))


def _as_output(out: Any) -> Any:
    if out is None:
        return None
    if not hasattr(out, "__array__") and not hasattr(out, "__dlpack__"):
        raise TypeError(f"out: expected an array, got {type(out).__name__}")
    return as_array(out, "out")


def as_running(array: Any, name: str, update: bool) -> np.ndarray:
    """Return a running statistic as an array; to `update` it, it must be one."""
    if update and not hasattr(array, "dtype"):
        raise TypeError(f"{name}: expected an array to update in place, got {type(array).__name__}")
    statistic = as_array(array, name)
    if update:
        check.check_updatable(spec_of(statistic), name, statistic.flags.writeable)
    return statistic


def _serve_backward(
    key: Any,
    norm: str,
    options: tuple[Any, Any],
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    mask: Any,
    fixed: bool,
) -> tuple[Any, ...]:
    """Do a backward call on arrays in host memory of any library."""
    source = as_input(x, "x")
    record = record_of(norm)
    own = check.options_of(record, source.shape, *options)
    form = check.check_format(source.dtype, "x")
    gradient = as_input(dy, "dy")
    w = as_parameter(weight, "weight", form.lane)
    means = as_array(mean, "mean") if record.centred else None
    arrays = (gradient, source, means, as_array(rstd, "rstd"), w, None if fixed else as_mask(mask, record))
    norm = of_running_statistics(norm) if fixed else norm
    prepared = prepared_backward_for(norm, own, *arrays, fixed=fixed)
    results = prepared.run(*arrays)
    if type(x) is _ndarray and _are_same(arrays[:-1], (dy, x, mean if record.centred else None, rstd, weight)):
        keep(key, prepared)
    back: Callable[[Any], Any] | None = way_back(x)
    return results if back is None else tuple(map(back, results))
