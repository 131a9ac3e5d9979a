"""The CUDA backend: the contract of `numbanorm.backend`, on spans of device memory and on a stream.

Every launch takes, by name, ``stream``, the handle of a stream (0 is the legacy default stream), and ``workspace``. It
waits for nothing: it queues its kernels on the stream and returns. After one call that has compiled them, the same call
may be captured in a CUDA graph.

Spans of inputs are what `numbanorm.calls.prepare` says of their readings; that of a weight or bias is contiguous, those
of `mean` and `rstd` are float64, one element a group. Running statistics are device arrays, of any float dtypes and any
strides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..backend import Backward, Forward, Launch, Reading
from . import columns, columns_backward, rows, rows_backward, running
from .arrays import DeviceArray
from .launch import Call
from .memory import WORD, Span

Workspace = Callable[[int], Span]
"""``workspace(nbytes)`` returns a buffer of at least so many bytes, aligned to 256, that belongs to the stream until
the next call of the backend on that stream. Called at most once a launch."""


def prepare_forward(call: Forward) -> Launch:
    """Return ``launch(x, residual, total, y, mask, weight, bias, stats, eps)``, which normalizes.

    `residual` and `total` are spans like `x`'s and a packed one for the sum, which is normalized in place of `x`; the
    rows kernels alone take them. Weight and bias may, in rows, both be of the dtype of `y`.
    """
    plan = call.plan
    part = columns if plan.columns else rows
    own = _of_forward(call)._replace(mask=call.mask is not None, added=call.residual is not None)

    def launch(*arguments: Any, stream: int, workspace: Workspace) -> None:
        x, residual, total, y, mask, weight, bias, stats, eps = arguments
        aligned = _aligned(own, x, y, mask, weight, bias, residual, total)
        addresses = _addresses(x, residual, total, y, mask, weight, bias, stats)
        part.forward(plan, aligned, addresses, eps, stream, workspace)

    return launch


def prepare_apply(call: Forward) -> Launch:
    """Return ``launch(x, y, weight, bias, mean, var, stats, eps)``, which normalizes with given statistics.

    They are running ones, which are also written to `stats`, or, where `mean` and `var` are None, those in the rows
    MEAN and RSTD of `stats`.
    """
    plan = call.plan
    part = columns if plan.columns else rows
    own = _of_forward(call)

    def launch(*arguments: Any, stream: int) -> None:
        x, y, weight, bias, mean, var, stats, eps = arguments
        if mean is not None:
            running.as_statistics(mean, var, stats, eps, stream)
        if plan.size:
            addresses = _addresses(x, None, None, y, None, weight, bias, stats)
            part.apply(plan, _aligned(own, x, y, None, weight, bias), addresses, stream)

    return launch


def prepare_running(call: Forward) -> Launch:
    """Return ``launch(stats, mean, var, momentum, counter)``, which moves running statistics towards those of a batch.

    With the address of a `counter`, a float64, a batch is counted there, and a `momentum` of None takes the average
    over all batches.
    """
    samples, step = call.samples
    whole = call.mask is None

    def launch(
        stats: Span, mean: DeviceArray, var: DeviceArray, momentum: float | None, counter: int = 0, *, stream: int
    ) -> None:
        # Without a mask every batch counts, and the move itself can count it, unless that must read the number.
        running.update(mean, var, stats, samples, step, momentum, counter, whole, stream)
        if counter and (momentum is None or not whole):
            running.count_batch(counter, stats, stream)

    return launch


def prepare_statistics(call: Forward) -> Launch:
    """Return ``launch(x, mask, stats)``, which writes the statistics alone, with eps 0."""
    plan = call.plan
    part = columns if plan.columns else rows
    own = Call(_name(call.x), _name(call.x), mask=call.mask is not None)

    def launch(x: Span, mask: Span | None, stats: Span, *, stream: int, workspace: Workspace) -> None:
        addresses = _addresses(x, None, None, None, mask, None, None, stats)
        part.statistics(plan, _aligned(own, x, x, mask), addresses, stream, workspace)

    return launch


def prepare_backward(call: Backward, fixed: bool) -> Launch:
    """Return ``launch(dy, x, dx, mask, weight, mean, rstd, gradients)``.

    It writes dx, packed, and, to the spans of `gradients`, dweight and, where there is a second, dbias, in the dtype
    of the lanes; `fixed`: the statistics do not depend on x. Weights are of that dtype, too.
    """
    plan = call.plan
    part = columns_backward if plan.columns else rows_backward
    own = _of_backward(call, fixed)

    def launch(*arguments: Any, stream: int, workspace: Workspace) -> None:
        dy, x, dx, mask, weight, mean, rstd, gradients = arguments
        addresses = _addresses(dy, x, dx, mask, weight, mean, rstd, *_two(gradients))
        part.backward(plan, _aligned(own, x, dx, mask, weight, None, dy), addresses, stream, workspace)

    return launch


def prepare_partial_sums(call: Backward) -> Launch:
    """Return ``launch(dy, x, weight, mean, rstd, sums)``.

    It writes, for groups that lie in parts, the sums of ``g`` and ``g * (x - mean) * rstd`` over each group's part,
    float64, shape (2, groups): ``g`` is dy, times the weight where weights differ within the groups.
    """
    plan = call.plan
    part = columns_backward if plan.columns else rows_backward
    own = _of_backward(call, False)
    own = own._replace(weight=own.weight and call.record.weights_within_groups, mask=False)

    def launch(*arguments: Any, stream: int, workspace: Workspace) -> None:
        dy, x, weight, mean, rstd, sums = arguments
        addresses = _addresses(dy, x, weight, mean, rstd, sums)
        part.partial_sums(plan, _aligned(own, x, x, None, weight, None, dy), addresses, stream, workspace)

    return launch


def prepare_partial_gradient(call: Backward) -> Launch:
    """Return ``launch(dy, x, dx, mask, weight, mean, rstd, means, gradients)``.

    It writes dx of a part from the means of those sums over whole groups, and, where spans of `gradients` are given,
    the part's share of the gradients.
    """
    plan = call.plan
    part = columns_backward if plan.columns else rows_backward
    own = _of_backward(call, False)
    weighted = own.weight and not call.record.weights_within_groups

    def launch(*arguments: Any, stream: int, workspace: Workspace) -> None:
        dy, x, dx, mask, weight, mean, rstd, means, gradients = arguments
        addresses = _addresses(dy, x, dx, mask, weight, mean, rstd, means, *_two(gradients))
        aligned = _aligned(own, x, dx, mask, weight, None, dy)
        part.partial_gradient(plan, aligned, addresses, weighted, stream, workspace)

    return launch


def _name(reading: Reading) -> str:
    return (reading.packed or reading.given).name


def _of_forward(call: Forward) -> Call:
    """Return what of a call decides its launches, but for alignment, as far as it applies given statistics."""
    result = call.form.result
    readings = [reading for reading in (call.weight, call.bias) if reading is not None]
    half = any((reading.packed or reading.given).dtype == result for reading in readings) and result != call.form.lane
    affine = result.name if half else ""
    return Call(_name(call.x), result.name, call.weight is not None, call.bias is not None, affine=affine)


def _of_backward(call: Backward, fixed: bool) -> Call:
    own = call.weight is not None, False, call.mask is not None
    return Call(_name(call.x), call.form.result.name, *own, fixed=fixed)


def _two(gradients: Sequence[Span]) -> tuple[Span | None, Span | None]:
    first, second, *_ = (*gradients, None, None)
    return first, second


def _addresses(*spans: Span | None) -> tuple[int, ...]:
    return tuple([0 if span is None else span.address for span in spans])


def _aligned(own: Call, *spans: Span | None) -> Call:
    """Return a call with the addresses modulo 16 of (x, y, mask, weight, bias, residual, total)."""
    for span in spans:
        if span is not None and span.address % WORD:
            return own._replace(low=tuple([0 if s is None else s.address % WORD for s in (*spans, None, None)[:7]]))
    return own
