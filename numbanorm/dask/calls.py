"""The functions on dask arrays: lazy, chunk by chunk, each chunk by the same functions on the chunk itself.

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

from ..calls.check import check_eps, check_momentum, integer, integers
from ..calls.host import _Running
from ..core.dtypes import Format
from ..core.layout import Layout
from ..core.plan import MEAN, RSTD, Options
from ..stats.moments import Moments
from .backward import run_backward
from .chunks import Call, Statistics, as_input, as_mask, merged, with_residual

__all__ = ["as_input", "computed", "moments", "run", "run_backward", "run_tracked"]


def moments(x: Any, axis: int | tuple[int, ...] | None = None, mask: Any = None) -> Moments:
    """Compute the moments of a dask array: those of its chunks, merged by a tree.

    Parameters
    ----------
    x : dask.array.Array
        Of a dtype that `numbanorm.Moments.of` takes.
    axis : int or tuple of int, optional
        The axes along which to take them; all if None.
    mask : array_like or dask.array.Array of bool, broadcastable to `x`, optional
        True where an element counts.

    Returns
    -------
    Moments
        In memory; float64.

    Raises
    ------
    TypeError, ValueError
        If dtype, axis or mask do not fit, or chunk sizes are unknown.

    Examples
    --------
    >>> import dask.array as da
    >>> moments(da.arange(10, chunks=3)).mean
    np.float64(4.5)
    """
    axes = None if axis is None else integers(axis, "axis")
    return Moments(axes, *computed(x, axes, mask))


def computed(x: Any, axis: tuple[int, ...] | None, mask: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return (count, mean, M2, low) of a dask array, computed; `count` is one number where there is no mask."""
    source, _ = as_input(x, "x")
    if source.ndim == 0:
        source = source.reshape(1)
    axes = tuple(range(source.ndim)) if axis is None else axis
    layout = Layout.of("layer", source.shape, axis=axes)
    parts = merged(source, layout.reduced_axes, as_mask(mask, source), keepdims=False).compute()
    mean, m2, low = (np.array(parts[name]) for name in ("mean", "m2", "low"))
    count = np.array(layout.count) if mask is None else np.asarray(parts["count"])
    return count.astype(np.int64), mean, m2, low


def run(
    norm: str,
    options: Options,
    x: Any,
    source: Any,
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
    """Run a norm with the statistics of its input, as `numbanorm.calls.run` does."""
    total = None
    if residual is not None:
        source = total = with_residual(source, residual, form)
    call = Call(norm, options, source, form, weight, bias, mask, out)
    parts = None
    if return_stats or not call.local:
        parts = call.parts()
    y = call.whole(eps) if call.local else call.apply(call.statistics(parts, eps), bound=True)
    return _results(y, call.statistics(parts, eps) if return_stats else None, total)


def _results(y: Any, stats: Statistics | None, total: Any = None) -> Any:
    items = [y] if stats is None else [y, *(s for s in stats if s is not None)]
    if total is not None:
        items.append(total)
    return items[0] if len(items) == 1 else tuple(items)


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
    """Run a norm that may keep running statistics, as `numbanorm.calls.run_tracked` does; these are NumPy arrays."""
    eps = check_eps(eps)
    source, form = as_input(x, "x")
    options = (integer(channel_axis, "channel_axis"), None, None)
    if not from_input:
        as_mask(mask, source)
        norm, mask = "batch", None
    call = Call(norm, options, source, form, weight, bias, mask, out)
    running = None
    if running_mean is not None or running_var is not None:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean, running_var: expected both or neither, got one of them")
        running = _Running(running_mean, running_var, call.layout.size)
    if not from_input:
        if running is None:
            raise ValueError("running_mean, running_var: expected both to normalize with them, got None")
        given = running.given(eps)
        stats = Statistics(*(da.from_array(given[row], chunks=-1) for row in (MEAN, RSTD)))
        return _results(call.apply(stats, bound=False), stats if return_stats else None)
    if call.layout.count == 1 and source.size > 0:
        raise ValueError(
            f"x: expected more than 1 value per channel to normalize with its own statistics, got shape {source.shape}"
        )
    if running is None or source.size == 0:
        return run(norm, options, x, source, form, weight, bias, eps, mask=mask, return_stats=return_stats)
    running.check_writeable(running_mean, running_var)
    share = check_momentum(momentum)
    parts = call.parts().compute()
    stats = call.statistics(da.from_array(parts, chunks=-1), eps)
    result = _results(call.apply(stats, bound=False), stats if return_stats else None)
    running.update(np.stack([parts[name] for name in ("count", "mean", "m2")]), share)
    return result
