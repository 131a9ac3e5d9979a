"""Calls on CUDA arrays: what `numbanorm.calls` does for arrays in host memory, under the same names.

Everything that follows from shapes, strides and dtypes is checked and worked out once (`recipes`). A call then reads
addresses, makes outputs, and queues its kernels on the stream of `x`; nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..calls.arrays import as_mask
from ..calls.check import check_eps, check_momentum, integer
from ..core.dtypes import Format, format_of, is_float
from ..core.layout import Layout
from ..core.plan import RSTD, Options
from . import backend, devices, running
from .arrays import DeviceArray, apart, contiguous, ghost
from .copying import copy, fill
from .libraries import library_of, read, read_beside
from .memory import Span
from .recipes import FLOAT64, Reading, Recipe, backward_recipe, forward_recipe
from .scratch import Scratch, scratch_of
from .transfer import span_to_host

__all__ = ["OnStream", "as_input", "run", "run_backward", "run_tracked"]

_SUPPORTED = "float16, bfloat16, float32, float64, bool or an integer of 8 to 64 bits"


def as_input(value: Any, name: str) -> tuple[DeviceArray, Format]:
    """Return what is to be known of `x`, and of its dtype.

    Raises
    ------
    TypeError
        If its dtype is none that the kernels compute on.
    """
    array = read(value, name)
    return array, _format(array, name)


def _format(array: DeviceArray, name: str) -> Format:
    form = format_of(array.dtype)
    if form is None:
        raise TypeError(f"{name}: expected {_SUPPORTED}, got {array.dtype}")
    return form


class Call:
    """One checked call, as `numbanorm.calls.Call` is."""

    __slots__ = ("bias", "mask", "out", "recipe", "residual", "stats", "total", "weight", "x", "y")

    def __init__(
        self,
        norm: str,
        options: Options,
        x: DeviceArray,
        weight: Any,
        bias: Any,
        *,
        mask: Any = None,
        residual: Any = None,
        out: Any = None,
    ) -> None:
        self.x = x
        self.mask = None if mask is None else read_beside(mask, "mask", x)
        self.residual = None if residual is None else read_beside(residual, "residual", x)
        self.out = None if out is None else read_beside(out, "out", x)
        self.weight = None if weight is None else read_beside(weight, "weight", x)
        self.bias = None if bias is None else read_beside(bias, "bias", x)
        self.recipe: Recipe = forward_recipe(
            norm,
            options,
            x.lies,
            self.weight and self.weight.lies,
            self.bias and self.bias.lies,
            self.mask and self.mask.lies,
            self.residual and self.residual.lies,
            self.out and self.out.lies,
            self.out is None or self.out.writeable,
        )
        if self.out is not None:
            inputs = {"x": x, "residual": self.residual, "weight": self.weight, "bias": self.bias, "mask": self.mask}
            apart(self.out, {name: array for name, array in inputs.items() if array is not None})
        self.total: DeviceArray | None = None
        self.stats: DeviceArray | None = None
        self.y = x

    def statistics(self, keep: bool, scratch: Scratch) -> Span:
        """Return memory for the statistics, of their own where they are to be kept."""
        lies = self.recipe.stats
        size = lies.shape[0]
        if not keep:
            return scratch.take("stats", FLOAT64, size, self.x)
        self.stats = self.x.library.empty(lies, self.x)
        return Span(self.stats.address, FLOAT64, size)

    def forward(self, eps: float, keep: bool, scratch: Scratch) -> Span:
        """Normalize with the statistics of the input; return them, in memory of their own where they are to be kept.

        The scratch memory is entered.
        """
        x, recipe = self.x, self.recipe
        plan, stream = recipe.plan, x.stream or 0
        stats = self.statistics(keep, scratch)
        y = self._output()
        if recipe.total is not None:
            self.total = x.library.empty(recipe.total, x)
        if plan.size == 0:
            _nothing(stats, eps, stream)
            return stats
        weight, bias = self._affine(scratch)
        mask = _span(self.mask, recipe.mask, "mask", x, scratch)
        source, total = x, self.total
        residual = fused = None
        if total is not None and self.residual is not None:
            if recipe.sum_first:
                copy(total, x, stream, self.residual)
                source = total
            else:
                residual = _span(self.residual, recipe.x, "residual", x, scratch)
                fused = Span(total.address, total.dtype, plan.size)
        spanned = _span(source, recipe.x, "x", x, scratch)
        assert spanned is not None
        backend.forward(
            plan,
            spanned,
            Span(y.address - recipe.y_lowest, y.dtype, recipe.y_size),
            weight,
            bias,
            stats,
            eps,
            mask,
            residual,
            fused,
            stream=stream,
            workspace=scratch.workspace(x),
        )
        self._deliver(y)
        return stats

    def apply(self, stats: Span, scratch: Scratch) -> None:
        """Normalize with given statistics."""
        x, recipe = self.x, self.recipe
        y = self._output()
        if recipe.plan.size:
            source = _span(x, recipe.x, "x", x, scratch)
            assert source is not None
            target = Span(y.address - recipe.y_lowest, y.dtype, recipe.y_size)
            backend.apply(recipe.plan, source, target, *self._affine(scratch), stats, stream=x.stream or 0)
            self._deliver(y)

    def result(self, return_stats: bool) -> Any:
        """Return what the caller gets: y, then (mean,) rstd, then the sum with the residual, as asked for."""
        items = [self.y.owner]
        if return_stats and self.stats is not None:
            views = self.recipe.statistics
            items += [self.stats.library.view(self.stats, *view) for view in views]
        if self.total is not None:
            items.append(self.total.owner)
        return items[0] if len(items) == 1 else tuple(items)

    def _affine(self, scratch: Scratch) -> tuple[Span | None, Span | None]:
        return (
            _span(self.weight, self.recipe.weight, "weight", self.x, scratch),
            _span(self.bias, self.recipe.bias, "bias", self.x, scratch),
        )

    def _output(self) -> DeviceArray:
        """Return what the kernels write to; `self.y` becomes what the caller gets."""
        x, recipe = self.x, self.recipe
        if self.out is not None:
            self.y = self.out
            return self.out if recipe.deliver is None else x.library.empty(recipe.fresh, x)
        y = x.library.empty(recipe.fresh, x)
        self.y = y if recipe.deliver is None else x.library.empty(recipe.deliver, x)
        return y

    def _deliver(self, y: DeviceArray) -> None:
        if y is not self.y:
            copy(self.y, y, self.x.stream or 0)


def _span(
    array: DeviceArray | None, reading: Reading | None, name: str, x: DeviceArray, scratch: Scratch
) -> Span | None:
    """Return an array as the kernels read it: its span of memory, or that of a copy."""
    if array is None or reading is None:
        return None
    if reading.copy is None:
        return Span(array.address - reading.lowest, reading.dtype, reading.size)
    if name in ("x", "dy", "mask"):  # as large as the input: not to be kept
        packed = x.library.empty(contiguous((reading.size,), reading.dtype), x)
        scratch.hold(packed)
        span = Span(packed.address, reading.dtype, reading.size)
    else:
        span = scratch.take(name, reading.dtype, reading.size, x)
    reading.copy.run(span.address, array.address, 0, x.stream or 0)
    return span


def _nothing(stats: Span, eps: float, stream: int) -> None:
    """Write the statistics of no elements: mean 0, variance 0."""
    groups = stats.size // 4
    with np.errstate(divide="ignore"):
        rstd = float(1.0 / np.sqrt(np.float64(eps)))
    fill(stats, 0.0, stream)
    fill(Span(stats.address + 8 * RSTD * groups, FLOAT64, groups), rstd, stream)


def run(
    norm: str,
    options: Options,
    x: Any,
    source: DeviceArray,
    form: Format,
    weight: Any,
    bias: Any,
    eps: float,
    *,
    mask: Any = None,
    residual: Any = None,
    out: Any = None,
    return_stats: bool = False,
) -> Any:
    """Run a norm with the statistics of its input."""
    call = Call(norm, options, source, weight, bias, mask=mask, residual=residual, out=out)
    scratch = scratch_of(source)
    with scratch:
        call.forward(eps, return_stats, scratch)
    return call.result(return_stats)


def tracked(
    norm: str,
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    from_input: bool,
    momentum: float | None,
    eps: float,
    channel_axis: int,
    mask: Any,
    out: Any,
    keep: bool,
    counter: int = 0,
) -> Call:
    """Do what `run_tracked` does and return the call.

    With the address of a `counter`, a float64, a batch is counted there, and momentum None takes the average over all
    batches.
    """
    eps = check_eps(eps)
    source, _ = as_input(x, "x")
    options = (integer(channel_axis, "channel_axis"), None, None)
    if not from_input:
        if mask is not None:
            as_mask(ghost(read_beside(mask, "mask", source).lies), source.shape)
        norm, mask = "batch", None  # statistics that are given are not limited by a mask
    call = Call(norm, options, source, weight, bias, mask=mask, out=out)
    layout = call.recipe.plan.layout
    means: DeviceArray | None = None
    if running_mean is not None or running_var is not None:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean, running_var: expected both or neither, got one of them")
        means = _running(running_mean, "running_mean", source, layout.size)
        variances = _running(running_var, "running_var", source, layout.size)
    stream = source.stream or 0
    scratch = scratch_of(source)
    if not from_input:
        if means is None:
            raise ValueError("running_mean, running_var: expected both to normalize with them, got None")
        with scratch:
            stats = call.statistics(keep, scratch)
            running.given(means, variances, stats, eps, stream)
            call.apply(stats, scratch)
        return call
    share: float | None = None
    if means is not None:
        for name, array in (("running_mean", means), ("running_var", variances)):
            if not array.writeable:
                raise ValueError(f"{name}: expected a writeable array, got a read-only one")
        share = None if counter and momentum is None else check_momentum(momentum)
    if layout.count == 1 and source.size > 0:
        raise ValueError(
            f"x: expected more than 1 value per channel to normalize with its own statistics, got shape {source.shape}"
        )
    with scratch:
        stats = call.forward(eps, keep, scratch)
        if means is not None and source.size > 0:
            # Without a mask every batch counts, and the move itself can count it, unless that must read the number.
            own = (share, counter, mask is None)
            running.update(means, variances, stats, *call.recipe.samples, *own, stream)
            if counter and (share is None or mask is not None):
                running.count_batch(counter, stats, stream)
    return call


def run_tracked(
    norm: str,
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    from_input: bool,
    momentum: float | None,
    eps: float,
    channel_axis: int,
    mask: Any,
    out: Any,
    return_stats: bool,
) -> Any:
    """Run a norm that may keep running statistics: from its input and updating them, or from them."""
    own = (weight, bias, from_input, momentum, eps, channel_axis, mask, out, return_stats)
    return tracked(norm, x, running_mean, running_var, *own).result(return_stats)


def _running(value: Any, name: str, x: DeviceArray, channels: int) -> DeviceArray:
    array = read_beside(value, name, x)
    if array.shape != (channels,):
        raise ValueError(f"{name}: expected shape {(channels,)}, got {array.shape}")
    if not is_float(array.dtype):
        raise TypeError(f"{name}: expected a float dtype, got {array.dtype}")
    return array


def run_backward(
    norm: str,
    options: Options,
    dy: Any,
    x: Any,
    source: DeviceArray,
    form: Format,
    mean: Any,
    rstd: Any,
    weight: Any,
    mask: Any,
    *,
    fixed: bool = False,
) -> tuple[Any, ...]:
    """Return dx, dweight and, where there is a mean, dbias; with `fixed` the statistics do not depend on x."""
    given = read_beside(dy, "dy", source)
    _format(given, "dy")
    counted = None if mask is None or fixed else read_beside(mask, "mask", source)
    weights = None if weight is None else read_beside(weight, "weight", source)
    stds = read_beside(rstd, "rstd", source)
    means = None if mean is None else read_beside(mean, "mean", source)
    recipe = backward_recipe(
        norm,
        options,
        source.lies,
        given.lies,
        weights and weights.lies,
        means and means.lies,
        stds.lies,
        counted and counted.lies,
    )
    plan, stream, library = recipe.plan, source.stream or 0, source.library
    size, lane = plan.layout.size, form.lane
    scratch = scratch_of(source)
    with scratch:
        dx = library.empty(recipe.fresh, source)
        result = dx if recipe.deliver is None else library.empty(recipe.deliver, source)
        gradients = [library.empty(recipe.gradient, source) for _ in range(2 if plan.layout.centred else 1)]
        if recipe.convert:
            spans = [scratch.take(name, lane, size, source) for name in ("dweight", "dbias")[: len(gradients)]]
        else:
            spans = [Span(gradient.address, lane, size) for gradient in gradients]
        if plan.size == 0:
            for span in spans:
                fill(span, 0.0, stream)
        else:
            dys, xs, rstds = (
                _span(array, reading, name, source, scratch)
                for array, reading, name in (
                    (given, recipe.dy, "dy"),
                    (source, recipe.x, "x"),
                    (stds, recipe.rstd, "rstd"),
                )
            )
            assert dys is not None
            assert xs is not None
            assert rstds is not None
            backend.backward(
                plan,
                dys,
                xs,
                Span(dx.address, dx.dtype, plan.size),
                _span(weights, recipe.weight, "weight", source, scratch),
                _span(means, recipe.mean, "mean", source, scratch),
                rstds,
                spans[0],
                spans[1] if len(spans) > 1 else None,
                _span(counted, recipe.mask, "mask", source, scratch),
                fixed,
                stream=stream,
                workspace=scratch.workspace(source),
            )
        if recipe.convert:
            for span, gradient in zip(spans, gradients, strict=True):
                recipe.convert.run(gradient.address, span.address, 0, stream)
        if result is not dx:
            copy(result, dx, stream)
    return result.owner, *(gradient.owner for gradient in gradients)


def statistics(x: Any, axis: tuple[int, ...] | None, mask: Any) -> tuple[Layout, np.ndarray, bool]:
    """Return a layout over `axis` (None: all), its statistics in host memory, and whether every element counts.

    This waits for the device.
    """
    source, _ = as_input(x, "x")
    if not source.shape:
        one = contiguous((1,), source.dtype)
        source = DeviceArray(source.owner, source.library, source.address, one, source.device, source.stream)
    counted = None if mask is None else read_beside(mask, "mask", source)
    axes = tuple(range(len(source.shape))) if axis is None else axis
    recipe = forward_recipe(
        "layer", (1, None, axes), source.lies, None, None, counted and counted.lies, None, None, True
    )
    layout = recipe.plan.layout
    rows = 4 * layout.groups
    if recipe.plan.size == 0:
        return layout, np.zeros((4, layout.groups)), counted is None
    scratch = scratch_of(source)
    with scratch:
        stats = scratch.take("stats", FLOAT64, rows, source)
        spans = [
            _span(array, reading, name, source, scratch)
            for array, reading, name in ((source, recipe.x, "x"), (counted, recipe.mask, "mask"))
        ]
        assert spans[0] is not None
        stream = source.stream or 0
        backend.statistics(recipe.plan, spans[0], stats, spans[1], stream=stream, workspace=scratch.workspace(source))
        return layout, span_to_host(stats, scratch, stream).reshape(4, -1), counted is None


class OnStream:
    """The calls of this module, on a stream that the caller named in place of the library's current one."""

    def __init__(self, x: Any, stream: Any) -> None:
        self._array = library_of(x).read(x, "x")
        self._stream = devices.handle_of(stream)

    def __getattr__(self, name: str) -> Any:
        function = globals()[name]

        def on_stream(*arguments: Any, **options: Any) -> Any:
            with self._array.library.on(self._stream, self._array.device):
                return function(*arguments, **options)

        return on_stream
