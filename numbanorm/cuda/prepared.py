"""Prepared calls: what a call on CUDA arrays does, worked out once for all calls whose arrays look alike.

A prepared call then takes arrays: it makes outputs, copies what the kernels cannot read in its place, and queues the
launches on the stream of `x`.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..backend import Backward, Forward, Launch, Reading
from ..calls import check, prepare
from ..calls.prepare import FLOAT64
from ..core.norms import record_of
from ..core.plan import RSTD, Options
from ..core.spec import ArraySpec, contiguous
from . import backend
from .arrays import DeviceArray
from .copying import Copy, copy, copying, fill
from .memory import Span
from .scratch import Scratch


class Source(NamedTuple):
    """How an array becomes a span: by its address, or by a copy.

    Attributes
    ----------
    dtype, size
        Of the span.
    lowest : int
        Bytes between the lowest address of the array and its first element.
    copy : Copy or None
        The copy to be made first, to an array without gaps.
    buffer : str
        The scratch buffer that takes the copy; "" for memory of its own, which is not kept: that of large arrays.
    """

    dtype: np.dtype[Any]
    size: int
    lowest: int = 0
    copy: Copy | None = None
    buffer: str = ""

    def span(self, array: DeviceArray, x: DeviceArray, scratch: Scratch) -> Span:
        """Return an array as the kernels read it: its span of memory, or that of a copy."""
        if self.copy is None:
            return Span(array.address - self.lowest, self.dtype, self.size)
        if self.buffer:
            span = scratch.take(self.buffer, self.dtype, self.size, x)
        else:
            packed = x.library.empty(contiguous((self.size,), self.dtype), x)
            scratch.hold(packed)
            span = Span(packed.address, self.dtype, self.size)
        self.copy.run(span.address, array.address, 0, x.stream or 0)
        return span


def _source(reading: Reading, buffer: str) -> Source:
    spec, place = reading.packed or reading.given, reading.placement
    copied = None if reading.packed is None else copying(reading.packed, reading.given)
    if place is None:
        return Source(spec.dtype, spec.size, 0, copied, buffer)
    return Source(spec.dtype, place.span, place.start * spec.dtype.itemsize, copied)


class Prepared:
    """A call, forward or backward, and how its arrays are read.

    Parameters
    ----------
    call : Forward or Backward
        What was worked out.
    """

    names: tuple[str, ...]

    def __init__(self, call: Forward | Backward) -> None:
        readings = [(name, getattr(call, name)) for name in self.names]
        self._sources = {name: _source(reading, name) for name, reading in readings if reading is not None}

    def span(self, name: str, array: DeviceArray | None, x: DeviceArray, scratch: Scratch) -> Span | None:
        """Return the span of the array of this name; None where there is none."""
        return None if array is None else self._sources[name].span(array, x, scratch)


class Inputs(NamedTuple):
    """The arrays of a forward call."""

    x: DeviceArray
    weight: DeviceArray | None = None
    bias: DeviceArray | None = None
    mask: DeviceArray | None = None
    residual: DeviceArray | None = None
    out: DeviceArray | None = None

    @property
    def specs(self) -> tuple[Any, ...]:
        """Their specs."""
        x, weight, bias, mask, residual, out = self
        return (
            x.spec,
            weight and weight.spec,
            bias and bias.spec,
            mask and mask.spec,
            residual and residual.spec,
            out and out.spec,
        )


class Made(NamedTuple):
    """What a forward call makes.

    Attributes
    ----------
    y : DeviceArray
        What the caller gets.
    written : DeviceArray
        What the kernels write to.
    total : DeviceArray or None
        The sum of input and residual.
    kept : DeviceArray or None
        The statistics, where they are wanted.
    stats : Span
        The statistics.
    """

    y: DeviceArray
    written: DeviceArray
    total: DeviceArray | None
    kept: DeviceArray | None
    stats: Span


class PreparedForward(Prepared):
    """A forward call."""

    names = ("x", "weight", "bias", "mask", "residual")

    def __init__(self, call: Forward) -> None:
        super().__init__(call)
        self.call = call
        self._result = call.fresh.dtype
        self._lowest = call.target.start * self._result.itemsize

    @cached_property
    def _forward(self) -> Launch:
        return backend.prepare_forward(self.call)

    @cached_property
    def _apply(self) -> Launch:
        return backend.prepare_apply(self.call)

    @cached_property
    def _running(self) -> Launch:
        return backend.prepare_running(self.call)

    @cached_property
    def _statistics(self) -> Launch:
        return backend.prepare_statistics(self.call)

    def public(self, stats: DeviceArray) -> tuple[Any, ...]:
        """Return (mean,) rstd, in the statistics that a call has kept, as users get them."""
        return tuple([stats.library.view(stats, *view) for view in self.call.statistics])

    def forward(self, given: Inputs, eps: float, keep: bool, scratch: Scratch) -> Made:
        """Normalize with the statistics of the input; `scratch` is entered."""
        x, call = given.x, self.call
        stream = x.stream or 0
        made = self._make(given, keep, scratch)
        total = made.total
        if call.plan.size == 0:
            _nothing(call, made.stats, eps, stream)
            return made
        source = x
        residual = fused = None
        if total is not None and given.residual is not None:
            if call.sum_first:
                copy(total, x, stream, given.residual)
                source = total
            else:
                residual = self.span("residual", given.residual, x, scratch)
                fused = Span(total.address, total.dtype, call.plan.size)
        self._forward(
            self.span("x", source, x, scratch),
            residual,
            fused,
            self._target(made),
            self.span("mask", given.mask, x, scratch),
            self.span("weight", given.weight, x, scratch),
            self.span("bias", given.bias, x, scratch),
            made.stats,
            eps,
            stream=stream,
            workspace=scratch.workspace(x),
        )
        _deliver(made, stream)
        return made

    def apply(
        self,
        given: Inputs,
        running: tuple[DeviceArray, DeviceArray] | None,
        stats: Span | None,
        eps: float,
        keep: bool,
        scratch: Scratch,
    ) -> Made:
        """Normalize with running mean and variance, or with the statistics in `stats`."""
        x = given.x
        made = self._make(given, keep, scratch, stats)
        self._apply(
            self.span("x", x, x, scratch),
            self._target(made),
            self.span("weight", given.weight, x, scratch),
            self.span("bias", given.bias, x, scratch),
            *(running or (None, None)),
            made.stats,
            eps,
            stream=x.stream or 0,
        )
        _deliver(made, x.stream or 0)
        return made

    def update(
        self, x: DeviceArray, made: Made, mean: DeviceArray, var: DeviceArray, momentum: float | None, counter: int
    ) -> None:
        """Move running statistics towards those of a call that was made."""
        self._running(made.stats, mean, var, momentum, counter, stream=x.stream or 0)

    def statistics(self, given: Inputs, scratch: Scratch) -> Span:
        """Return the statistics of the input alone, in scratch memory."""
        x = given.x
        stats = scratch.take("stats", FLOAT64, self.call.stats.size, x)
        xs, masks = self.span("x", x, x, scratch), self.span("mask", given.mask, x, scratch)
        self._statistics(xs, masks, stats, stream=x.stream or 0, workspace=scratch.workspace(x))
        return stats

    def _make(self, given: Inputs, keep: bool, scratch: Scratch, stats: Span | None = None) -> Made:
        x, call = given.x, self.call
        empty = x.library.empty
        kept: DeviceArray | None = None
        if stats is None and keep:
            kept = empty(call.stats, x)
            stats = Span(kept.address, FLOAT64, call.stats.size)
        elif stats is None:
            stats = scratch.take("stats", FLOAT64, call.stats.size, x)
        total = None if call.total is None else empty(call.total, x)
        if given.out is not None and call.deliver is None:
            return Made(given.out, given.out, total, kept, stats)
        written = empty(call.fresh, x)
        y = given.out or (written if call.deliver is None else empty(call.deliver, x))
        return Made(y, written, total, kept, stats)

    def _target(self, made: Made) -> Span:
        return Span(made.written.address - self._lowest, self._result, self.call.target.span)


def _deliver(made: Made, stream: int) -> None:
    """Copy the result to where the caller gets it, if it is not there."""
    if made.written is not made.y:
        copy(made.y, made.written, stream)


def _nothing(call: Forward, stats: Span, eps: float, stream: int) -> None:
    """Write the statistics of no elements: mean 0, variance 0."""
    groups = stats.size // 4
    fill(stats, 0.0, stream)
    fill(Span(stats.address + 8 * RSTD * groups, FLOAT64, groups), float(call.record.rstd(0.0, 0, eps)), stream)


class PreparedBackward(Prepared):
    """A backward call; `fixed`: the statistics do not depend on x."""

    names = ("dy", "x", "mask", "weight", "mean", "rstd")

    def __init__(self, call: Backward, fixed: bool) -> None:
        super().__init__(call)
        self.call = call
        self._fixed = fixed
        packed = call.packed_gradient
        self._convert = None if packed is None else copying(call.gradient, packed)
        self._lane = call.form.lane

    @cached_property
    def _backward(self) -> Launch:
        return backend.prepare_backward(self.call, self._fixed)

    @cached_property
    def _sums(self) -> Launch:
        return backend.prepare_partial_sums(self.call)

    @cached_property
    def _gradient(self) -> Launch:
        return backend.prepare_partial_gradient(self.call)

    def backward(
        self,
        dy: DeviceArray,
        x: DeviceArray,
        mask: DeviceArray | None,
        weight: DeviceArray | None,
        mean: DeviceArray | None,
        rstd: DeviceArray,
        scratch: Scratch,
        *,
        means: Span | None = None,
        gradients: bool = True,
    ) -> tuple[DeviceArray, ...]:
        """Return dx and, if wanted, dweight and dbias, from the groups' `means` where they lie in parts."""
        call = self.call
        plan, stream, library = call.plan, x.stream or 0, x.library
        dx = library.empty(call.fresh, x)
        result = dx if call.deliver is None else library.empty(call.deliver, x)
        names = call.record.parameters if gradients else ()
        made = [library.empty(call.gradient, x) for _ in names]
        if self._convert is None:
            spans = [Span(array.address, self._lane, plan.layout.size) for array in made]
        else:
            spans = [scratch.take(f"d{name}", self._lane, plan.layout.size, x) for name in names]
        if plan.size == 0:
            for span in spans:
                fill(span, 0.0, stream)
        else:
            arrays = (
                self.span("dy", dy, x, scratch),
                self.span("x", x, x, scratch),
                Span(dx.address, dx.dtype, plan.size),
                self.span("mask", mask, x, scratch),
                self.span("weight", weight, x, scratch),
                self.span("mean", mean, x, scratch),
                self.span("rstd", rstd, x, scratch),
            )
            own = {"stream": stream, "workspace": scratch.workspace(x)}
            if means is None:
                self._backward(*arrays, spans, **own)
            else:
                self._gradient(*arrays, means, spans, **own)
        if self._convert is not None:
            for span, array in zip(spans, made, strict=True):
                self._convert.run(array.address, span.address, 0, stream)
        if result is not dx:
            copy(result, dx, stream)
        return result, *made

    def sums(
        self,
        dy: DeviceArray,
        x: DeviceArray,
        weight: DeviceArray | None,
        mean: DeviceArray | None,
        rstd: DeviceArray,
        scratch: Scratch,
    ) -> Span:
        """Return the partial sums of all groups, shape (2, groups), in scratch memory."""
        sums = scratch.take("stats", FLOAT64, 2 * self.call.plan.layout.groups, x)
        arrays = (("dy", dy), ("x", x), ("weight", weight), ("mean", mean), ("rstd", rstd))
        spans = [self.span(name, array, x, scratch) for name, array in arrays]
        self._sums(*spans, sums, stream=x.stream or 0, workspace=scratch.workspace(x))
        return sums


@lru_cache(maxsize=4096)
def prepared_forward(
    norm: str,
    options: Options,
    x: ArraySpec,
    weight: ArraySpec | None = None,
    bias: ArraySpec | None = None,
    mask: ArraySpec | None = None,
    residual: ArraySpec | None = None,
    out: ArraySpec | None = None,
    writeable: bool = True,
) -> PreparedForward:
    """Return the prepared call for arrays that look so; arguments and errors are those of `prepare.forward`."""
    arrays = (x, weight, bias, mask, residual, out)
    check.check_shared_weights(record_of(norm), "for CUDA arrays", weight, bias)
    return PreparedForward(prepare.forward(norm, options, *arrays, writeable=writeable, half_weights=True))


@lru_cache(maxsize=4096)
def prepared_backward(
    norm: str,
    options: Options,
    x: ArraySpec,
    dy: ArraySpec,
    weight: ArraySpec | None,
    mean: ArraySpec | None,
    rstd: ArraySpec,
    mask: ArraySpec | None = None,
    fixed: bool = False,
) -> PreparedBackward:
    """Return the prepared call for arrays that look so; arguments and errors are those of `prepare.backward`."""
    check.check_shared_weights(record_of(norm), "for CUDA arrays", weight)
    return PreparedBackward(prepare.backward(norm, options, x, dy, weight, mean, rstd, mask), fixed)


def forget() -> None:
    """Let every call be prepared anew."""
    prepared_forward.cache_clear()
    prepared_backward.cache_clear()
