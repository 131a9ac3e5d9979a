"""Synchronized batch norm: statistics of the batches of all processes, and gradients that go through them.

``BatchNorm(C, sync=...)`` takes an mpi4py communicator, or any callable that gathers: it takes this process's float64
array of one axis and returns a sequence of all processes' arrays, which have the same length, in the same order
everywhere. Gathering, not a sum, because moments are no sums: (count, mean, M2) merge by Chan's formula, which E[x²] -
E[x]² would undo, and merging in rank order gives every process the same bits. It is one message of 4 C + 2 numbers in
`forward` and one of 2 C + 1 in `backward`.

Processes are weighted by what counts of their batches: these may be of any sizes, empty ones too, and have masks.
Running statistics are the same everywhere if they were before. As in torch's SyncBatchNorm, ``grad["weight"]`` and
``grad["bias"]`` are those of the process's own batch, for the trainer to add up with all other gradients.

Every process has to make the same calls. If one cannot take part in a call, because its input does not fit, it raises
what is wrong, the others raise a RuntimeError that names it, and nothing has changed anywhere. A process that does not
come to the call at all keeps the others waiting, unless the callable gives up.

Examples
--------
Two threads, each with its part of a batch:

>>> import threading
>>> from concurrent.futures import ThreadPoolExecutor
>>> import numpy as np
>>> import numbanorm as nn
>>> board, barrier = [None, None], threading.Barrier(2)
>>> def gather_as(rank):
...     def gather(message):
...         board[rank] = message
...         barrier.wait(timeout=60)
...         messages = list(board)
...         barrier.wait(timeout=60)
...         return messages
...
...     return gather
>>> def train(rank, part):
...     return nn.BatchNorm(1, eps=0.0, sync=gather_as(rank))(part)
>>> parts = [np.array([[1.0]]), np.array([[1.0], [3.0], [3.0]])]
>>> with ThreadPoolExecutor(2) as pool:
...     list(pool.map(train, (0, 1), parts))
[array([[-1.]]), array([[-1.],
       [ 1.],
       [ 1.]])]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..calls import check, running
from ..calls.arrays import as_array, as_input, as_mask, as_parameter, way_back
from ..calls.prepared import applying_for
from ..core.plan import COUNT, M2, MEAN, RSTD, Options
from ..core.spec import spec_of
from . import partials
from .fit import moments_of
from .moments import Moments

if TYPE_CHECKING:
    from ..layers.norms import BatchNorm


class Shared(NamedTuple):
    """What `backward` needs of a synchronized call beside what every layer keeps."""

    sync: Any
    rstd: np.ndarray
    counted: np.ndarray  # elements of all processes, shape (C,)


def check_sync(sync: Any) -> Any:
    """Return a communicator or callable.

    Raises
    ------
    TypeError
        If it is neither.
    """
    if sync is not None and not callable(sync) and not hasattr(sync, "Allgather"):
        raise TypeError(f"sync: expected an mpi4py communicator or a callable that gathers, got {type(sync).__name__}")
    return sync


def forward(layer: BatchNorm, x: Any, mask: Any, out: Any) -> tuple[Any, np.ndarray, np.ndarray, Shared]:
    """Normalize with the statistics of all processes' batches, and move the running ones towards them.

    Returns
    -------
    y : ndarray, shape of `x`
        The normalized batch.
    mean, rstd : ndarray, shape (C,), float64
        The statistics.
    shared : Shared
        For `backward`.
    """
    sync = check_sync(layer.sync)
    channels = layer.num_features
    message = np.zeros(2 + 4 * channels)
    problem: Exception | None = None
    try:
        call = _Call(layer, x, mask, out)
        own = moments_of(layer, x, mask)
        message[1] = call.count
        parts = own.count, own.mean, own.m2, own.low
        message[2:] = np.concatenate([np.broadcast_to(part, channels) for part in parts])
    except Exception as error:  # whatever it is, the others must hear of it
        problem = error
    messages = _gathered(sync, message, problem)
    if messages[:, 1].sum() == 1:
        raise ValueError("x: expected more than 1 value per channel in all processes' batches to normalize with, got 1")
    total = Moments.of(np.empty((0, channels)), 0)
    for seen, *rest in messages[:, 2:].reshape(len(messages), 4, channels):
        total = total + Moments((0,), seen.astype(np.int64), *rest)
    count = np.broadcast_to(total.count, channels)
    stats = np.zeros((4, channels))
    stats[COUNT], stats[MEAN] = count, total.mean
    stats[M2] = np.where(count > 0, total.var() * count, 0.0)
    with np.errstate(all="ignore"):
        stats[RSTD] = layer.record.rstd(stats[M2] / np.maximum(count, 1), count, check.check_eps(layer.eps))
    y = call.run(stats)
    if call.momentum is not None and count.any():
        running_mean: Any = layer.running_mean
        running_var: Any = layer.running_var
        running.move(running_mean, running_var, count, stats[MEAN], stats[M2], call.momentum)
        layer.num_batches_tracked = (layer.num_batches_tracked or 0) + 1
    rstd = stats[RSTD]
    return y, stats[MEAN], rstd, Shared(sync, rstd, count)


def backward(layer: BatchNorm, dy: Any, last: Any, shared: Shared) -> tuple[Any, ...]:
    """Return dx, through the statistics of all processes, and the own batch's dweight and dbias."""
    axis = layer.channel_axis
    channels = layer.num_features
    mean, rstd = last.statistics
    message = np.zeros(1 + 2 * channels)
    problem: Exception | None = None
    try:
        sum_dy, sum_dyh = partials.channel_sums(dy, last.x, mean, rstd, channel_axis=axis)
        message[1:] = np.concatenate([sum_dy, sum_dyh])
    except Exception as error:
        problem = error
    messages = _gathered(shared.sync, message, problem)
    means = messages[:, 1:].sum(axis=0).reshape(2, channels) / np.maximum(shared.counted, 1)
    dx = partials.channel_gradient(
        dy, last.x, mean, rstd, means[0], means[1], layer.weight, channel_axis=axis, mask=last.mask
    )
    lane = check.check_format(as_input(last.x, "x").dtype, "x").lane
    dtype = lane if layer.weight is None else as_array(layer.weight, "weight").dtype
    results = dx, sum_dyh.astype(dtype), sum_dy.astype(dtype)
    back = way_back(last.x)
    return results if back is None else tuple(map(back, results))


class _Call:
    """A call whose arguments have all been checked, before anything is said to the others."""

    def __init__(self, layer: BatchNorm, x: Any, mask: Any, out: Any) -> None:
        source = as_input(x, "x")
        self.count = layer.layout(source.shape).count
        check.check_eps(layer.eps)
        marked = as_mask(mask, layer.record)
        if marked is not None:
            check.check_mask(spec_of(marked), source.shape)
        lane = check.check_format(source.dtype, "x").lane
        weight = as_parameter(layer.weight, "weight", lane)
        bias = as_parameter(layer.bias, "bias", lane)
        target = None if out is None else as_array(out, "out")
        self._arrays = source, weight, bias
        self._out, self._target = out, target
        self._back = way_back(x)
        options: Options = (layer.channel_axis, None, None)
        self._prepared = applying_for(layer.kind, options, *self._arrays, target)
        if target is not None:
            check.check_output(spec_of(target), target.shape, target.dtype, target.flags.writeable)
            check.check_apart(target, {"x": source, "weight": weight, "bias": bias, "mask": marked})
        tracked = layer.num_batches_tracked
        self.momentum = None if tracked is None else check.share_of(layer.momentum, tracked)
        if tracked is not None:
            statistics: Any = (layer.running_mean, layer.running_var)
            for name, array in zip(("running_mean", "running_var"), statistics, strict=True):
                if not isinstance(array, np.ndarray):
                    raise TypeError(f"{name}: expected an array to update in place, got {type(array).__name__}")
                check.check_updatable(spec_of(array), name, array.flags.writeable)
            mean, var = map(spec_of, statistics)
            check.check_running(mean, var, layer.num_features)
            check.check_two(*statistics)

    def run(self, stats: np.ndarray) -> Any:
        """Return the batch, normalized with these statistics."""
        x, weight, bias = self._arrays
        y = self._prepared.apply(x, weight, bias, self._target, stats)
        if self._out is not None:
            return self._out
        return y if self._back is None else self._back(y)


def _gathered(sync: Any, message: np.ndarray, problem: Exception | None) -> np.ndarray:
    """Return all processes' messages, one a row; the first number of each tells of a problem.

    Raises
    ------
    Exception
        `problem`, once the others know that there is one.
    RuntimeError
        If another process has one, or what was gathered does not fit.
    """
    message[0] = problem is not None
    if hasattr(sync, "Allgather"):
        messages = np.empty((sync.Get_size(), message.size))
        sync.Allgather(message, messages)
    else:
        gathered = [np.asarray(part, np.float64) for part in sync(message)]
        shapes = {part.shape for part in gathered}
        if shapes != {message.shape} and problem is None:
            raise RuntimeError(
                f"sync: expected an array of shape {message.shape} of every process, got {shapes or '{}'}"
            )
        messages = np.stack(gathered) if len(shapes) == 1 else message[None]
    if problem is not None:
        raise problem
    failed = np.flatnonzero(messages[:, 0])
    if failed.size:
        raise RuntimeError(f"sync: expected all processes to take part, but it failed in {failed.tolist()}: see there")
    return messages
