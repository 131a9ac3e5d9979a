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

from ..calls import arrays
from ..calls.check import check_eps, check_momentum
from ..calls.host import Call, _Running
from ..core.plan import COUNT, M2, MEAN, RSTD, Options
from . import partials as pieces
from .fit import moments_of
from .moments import Moments

if TYPE_CHECKING:
    from ..layers.base import BatchNorm


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
        call, running, momentum = _checked(layer, x, mask, out)
        own = moments_of(layer, x, mask)
        message[1] = call.plan.layout.count
        parts = own.count, own.mean, own._m2, own._low
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
        stats[RSTD] = 1.0 / np.sqrt(stats[M2] / np.maximum(count, 1) + check_eps(layer.eps))
    call.apply(stats)
    if running is not None and count.any():
        running.update(stats, momentum)
        layer.num_batches_tracked = (layer.num_batches_tracked or 0) + 1
    rstd = stats[RSTD]
    return call.result(stats, False), stats[MEAN], rstd, Shared(sync, rstd, count)


def backward(layer: BatchNorm, dy: Any, last: Any, shared: Shared) -> tuple[Any, ...]:
    """Return dx, through the statistics of all processes, and the own batch's dweight and dbias."""
    axis = layer.channel_axis
    channels = layer.num_features
    message = np.zeros(1 + 2 * channels)
    problem: Exception | None = None
    try:
        sum_dy, sum_dyh = pieces.channel_sums(dy, last.x, last.mean, last.rstd, channel_axis=axis)
        message[1:] = np.concatenate([sum_dy, sum_dyh])
    except Exception as error:
        problem = error
    messages = _gathered(shared.sync, message, problem)
    means = messages[:, 1:].sum(axis=0).reshape(2, channels) / np.maximum(shared.counted, 1)
    dx = pieces.channel_gradient(
        dy, last.x, last.mean, last.rstd, means[0], means[1], layer.weight, channel_axis=axis, mask=last.mask
    )
    _, form = arrays.as_input(last.x, "x")
    dtype = form.lane if layer.weight is None else arrays.as_array(layer.weight, "weight").dtype
    results = dx, sum_dyh.astype(dtype), sum_dy.astype(dtype)
    back = arrays.way_back(last.x)
    return results if back is None else tuple(map(back, results))


def _checked(layer: BatchNorm, x: Any, mask: Any, out: Any) -> tuple[Call, _Running | None, float]:
    """Check all that may be wrong with a call, and allocate its output, before anything is said to the others."""
    source, form = arrays.as_input(x, "x")
    layer.layout(source.shape)
    options: Options = (layer.channel_axis, None, None)
    call = Call("batch", options, x, source, form, layer.weight, layer.bias, mask=mask, out=out)
    check_eps(layer.eps)
    tracked = layer.num_batches_tracked
    if tracked is None:
        return call, None, 0.0
    running = _Running(layer.running_mean, layer.running_var, layer.num_features)
    running.check_writeable(layer.running_mean, layer.running_var)
    momentum = 1.0 / (tracked + 1) if layer.momentum is None else layer.momentum
    return call, running, check_momentum(momentum)


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
