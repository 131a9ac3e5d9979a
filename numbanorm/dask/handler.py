"""What serves dask arrays, `numbanorm.calls.dispatch.Handler`: lazily, each chunk by what serves the chunk itself.

Where every group of a norm lies within a chunk, a chunk is normalized by itself. Elsewhere moments of the chunks are
merged by a tree, and the chunks are normalized with the result; chunks are never rechunked. The second stage does not
start before the statistics are there, and reads the chunks anew: otherwise a scheduler would keep every chunk in memory
until the last statistic is known. So what `x` is computed from runs twice; ``x.persist()`` first where that is dear.

Where running statistics are updated, the statistics of the call are computed at once, as the layer's state changes at
once; the result stays lazy. Kernels use one thread in a task: the scheduler runs as many tasks as there are cores.

Chunks may be CUDA arrays, and so are those of the results then; parameters, masks and statistics that lie in host
memory are copied to the device, task by task.
"""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np

from ..calls import check, prepare, running
from ..calls.dispatch import Outcome, Request
from ..calls.host import as_running
from ..calls.memory import look
from ..core.layout import Layout
from ..core.norms import OF_AXES, record_of
from ..core.plan import MEAN, RSTD
from ..core.spec import spec_of
from ..layers.base import Kept
from .backward import backward
from .chunks import Call, as_dask, as_weight, form_of, merged, spec, spread_mask

__all__ = ["add_gradient", "backward", "forward", "moments", "shape_of", "share_memory"]


def forward(request: Request) -> Outcome:
    """Do a forward call; running statistics lie in host memory."""
    if request.out is not None:
        kind = type(request.out).__name__
        raise TypeError(f"out: expected None, the result for a dask array is a new one; got {kind}")
    record = record_of(request.norm)
    x = as_dask(request.x, "x")
    form = form_of(x)
    check.check_shared_weights(record, "for dask arrays", request.weight, request.bias)
    options = check.options_of(record, x.shape, *request.options)
    eps = form.epsilon if request.eps is None and record.eps is None else check.check_eps(request.eps)
    weight, bias = as_weight(request.weight, "weight", form), as_weight(request.bias, "bias", form)
    mask = None if request.mask is None else as_dask(request.mask, "mask")
    residual = None if request.residual is None else as_dask(request.residual, "residual")
    if mask is not None:
        check.check_takes_mask(record)
    norm = request.norm if request.from_input else prepare.of_running_statistics(request.norm)
    layout = prepare.forward(norm, options, *map(spec, (x, weight, bias, mask, residual))).plan.layout
    if request.from_input:
        check.check_count(layout, spec(x))
    own = _running(request, layout.size)
    total = None
    if residual is not None:
        x = total = x.astype(form.result) + residual.rechunk(x.chunks).astype(form.result)
    call = Call(norm, options, x, form, weight, bias, mask if request.from_input else None)
    if own is None or (request.from_input and x.size == 0):
        return _from_input(call, eps, total, request)
    return (_tracking if request.from_input else _from_running)(call, eps, *own, request)


def _from_input(call: Call, eps: float, total: Any, request: Request) -> Outcome:
    """Normalize with the statistics of the input."""
    stats = call.statistics(call.parts(), eps) if request.keep or not call.local else None
    y = call.whole(eps) if call.local or stats is None else call.apply(stats, bound=True)
    return Outcome(y, total, stats, stats, request.batches)


def _from_running(call: Call, eps: float, mean: np.ndarray, var: np.ndarray, request: Request) -> Outcome:
    """Normalize with running statistics."""
    rows = running.fill(mean, var, eps, (4, mean.size))
    stats = Kept(*(da.from_array(rows[row], chunks=-1) for row in (MEAN, RSTD)))
    return Outcome(call.apply(stats, bound=False), None, stats, stats, request.batches)


def _tracking(call: Call, eps: float, mean: np.ndarray, var: np.ndarray, request: Request) -> Outcome:
    """Normalize with the statistics of the input, computed now, and move running ones towards them."""
    batches = request.batches
    share = check.share_of(request.momentum, batches)
    parts = call.parts().compute()
    stats = call.statistics(da.from_array(parts, chunks=-1), eps)
    y = call.apply(stats, bound=False)
    counted = batches is not None and bool(np.any(parts["count"]))
    outcome = Outcome(y, None, stats, stats, batches + 1 if counted else batches)
    running.move(mean, var, parts["count"], parts["mean"], parts["m2"], share)  # last: nothing after it may fail
    return outcome


def _running(request: Request, channels: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return running mean and variance, checked; None where there are none, and none are asked for."""
    given = request.running_mean, request.running_var
    if not check.check_both(*given) and request.from_input:
        return None
    names = "running_mean", "running_var"
    arrays = [None if a is None else as_running(a, n, request.from_input) for n, a in zip(names, given, strict=True)]
    check.check_running(look(arrays[0]), look(arrays[1]), channels)
    mean, var = (array for array in arrays if array is not None)
    if request.from_input:
        for name, array in zip(names, (mean, var), strict=True):
            check.check_updatable(spec_of(array), name, array.flags.writeable)
        check.check_two(mean, var)
        check.share_of(request.momentum, request.batches)
    return mean, var


def shape_of(x: Any) -> tuple[int, ...]:
    """Return the shape of an input, checked to be of known chunks and of a dtype that the kernels take."""
    array = as_dask(x, "x")
    form_of(array)
    return tuple(array.shape)


def add_gradient(dx: Any, dtotal: Any, x: Any) -> Any:
    """Return `dx` with the gradient of the sum added."""
    added = as_dask(dtotal, "dtotal")
    check.check_gradient(spec(added), spec(x), "dtotal")
    return dx + added.rechunk(dx.chunks).astype(dx.dtype)


def share_memory(out: Any, x: Any) -> bool:
    """Tell that no result shares memory with an input: `out` is refused."""
    return False


def moments(x: Any, axis: tuple[int, ...] | None, mask: Any) -> tuple[np.ndarray, ...]:
    """Return (count, mean, M2, low) of a dask array, computed; `count` is one number where there is no mask."""
    source = as_dask(x, "x")
    form_of(source)
    if source.ndim == 0:
        source = source.reshape(1)
    axes = tuple(range(source.ndim)) if axis is None else axis
    layout = Layout.of(OF_AXES, source.shape, axis=axes)
    counted = None if mask is None else as_dask(mask, "mask")
    if counted is not None:
        check.check_mask(spec(counted), source.shape)
        counted = spread_mask(counted, source)
    parts = merged(source, layout.reduced_axes, counted).compute().squeeze(layout.reduced_axes)
    count = np.array(layout.count) if mask is None else parts["count"]
    return count.astype(np.int64), *(np.array(parts[name]) for name in ("mean", "m2", "low"))
