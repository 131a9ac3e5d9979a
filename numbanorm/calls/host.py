"""Calls: what every function does with its arguments, from the checks to the backend and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.dtypes import Format, is_float
from ..core.layout import Layout
from ..core.plan import COUNT, M2, MEAN, RSTD, Options, plan
from . import arrays
from .arrays import as_input
from .check import check_eps, check_momentum, integer
from .dispatch import cpu_backend

__all__ = ["as_input", "run", "run_backward", "run_tracked"]


ROWS_OF = {True: (MEAN, RSTD), False: (RSTD,)}
"""Which statistics users get, by whether the norm has a mean."""


class Call:
    """One checked call: its arrays as the backend reads them, its plan, its output.

    Parameters
    ----------
    norm, options
        As `numbanorm.plan.plan` takes them.
    x : array_like
        What the caller gave; results are of its kind.
    source, form : np.ndarray, Format
        The same as an array of a supported dtype, and what is to be known of that.
    weight, bias, mask, residual, out : array_like, optional
        As the functions take them.
    """

    __slots__ = ("_back", "_mask", "_out", "_residual", "_source", "_target", "_total", "_y", "bias", "plan", "weight")

    def __init__(
        self,
        norm: str,
        options: Options,
        x: Any,
        source: np.ndarray,
        form: Format,
        weight: Any,
        bias: Any,
        *,
        mask: Any = None,
        residual: Any = None,
        out: Any = None,
    ) -> None:
        shape = source.shape
        dtype = form.result
        counted = None if mask is None else arrays.as_mask(mask, shape)
        added = None
        if residual is not None:
            added = _residual(residual, source)
            source = arrays.cast(source, dtype)
            added = arrays.cast(added, dtype)
        target = None
        if out is not None:
            inputs = {"x": source, "residual": added, "weight": weight, "bias": bias, "mask": counted}
            held = {name: arrays.as_array(array, name) for name, array in inputs.items() if array is not None}
            target = arrays.as_output(out, shape, dtype, held)
        y = None if target is None or not target.flags.aligned else (target.strides, target.itemsize)
        masked = None if counted is None else counted.strides
        self.plan = plan(norm, options, shape, (source.strides, source.itemsize), y, masked)
        total: np.ndarray | None = None
        if added is not None:
            if self.plan.columns or self.plan.x is None or added.strides != source.strides:
                # Only the rows kernel adds on the fly, and only where both lie alike.
                with np.errstate(all="ignore"):
                    source = total = np.add(source, added)
                added = None
                self.plan = plan(norm, options, shape, (source.strides, source.itemsize), y, masked)
            else:
                total = arrays.fresh(self.plan, dtype, source)
        layout, lane = self.plan.layout, form.lane  # of the sum, where that was taken above
        self.weight = None if weight is None else parameter(weight, "weight", layout, lane)
        self.bias = None if bias is None else parameter(bias, "bias", layout, lane)
        self._source = source
        self._residual = added
        self._total = total
        self._mask = counted
        if target is None and self.plan.reordered:
            target = np.empty_like(source, dtype)
        self._out, self._target = out, target
        direct = y is not None and self.plan.y is not None
        read = [source] if total is None or total is source else [source, total]
        self._y = target if direct and target is not None else arrays.fresh(self.plan, dtype, *read)
        self._back = None if type(x) is np.ndarray else arrays.way_back(x)

    def forward(self, eps: float, keep: bool = True) -> np.ndarray:
        """Normalize with the statistics of the input; return them as `cpu.forward` does."""
        plan = self.plan
        if plan.size == 0:
            return self._nothing(eps)
        x = arrays.flat(self._source, plan.x, plan)
        y = arrays.flat(self._y, plan.y or plan.packed, plan)
        mask = residual = total = None
        if self._mask is not None:
            mask = arrays.flat(self._mask, plan.mask, plan)
        if self._residual is not None and self._total is not None:
            residual = arrays.flat(self._residual, plan.x, plan)
            total = arrays.flat(self._total, plan.packed, plan)
        arguments = (plan, x, y, self.weight, self.bias, eps, mask, residual, total, keep)
        stats: np.ndarray = cpu_backend().forward(*arguments)
        self._deliver()
        return stats

    def apply(self, stats: np.ndarray) -> None:
        """Normalize with given statistics."""
        plan = self.plan
        if plan.size > 0:
            x = arrays.flat(self._source, plan.x, plan)
            y = arrays.flat(self._y, plan.y or plan.packed, plan)
            cpu_backend().apply(plan, x, y, self.weight, self.bias, stats)
        self._deliver()

    def result(self, stats: np.ndarray, return_stats: bool) -> Any:
        """Return what the caller gets: y, then (mean,) rstd, then the sum with the residual, as asked for."""
        back = self._back
        y = self._y if self._target is None else self._target
        if back is not None:
            y = back(y)
        if self._out is not None:
            y = self._out
        if not return_stats and self._total is None:
            return y
        items: list[Any] = []
        if return_stats:
            layout = self.plan.layout
            items += [public_statistic(stats[row], layout) for row in ROWS_OF[layout.centred]]
        if self._total is not None:
            items.append(self._total)
        return (y, *(items if back is None else map(back, items)))

    def _deliver(self) -> None:
        """Copy the result to `out` where it could not be written there directly."""
        if self._target is not None and self._y is not self._target:
            np.copyto(self._target, self._y)

    def _nothing(self, eps: float) -> np.ndarray:
        """Return the statistics of no elements: mean 0, variance 0."""
        stats = np.zeros((4, self.plan.layout.groups))
        with np.errstate(all="ignore"):
            stats[RSTD] = 1.0 / np.sqrt(np.float64(eps))
        if self._total is not None and self._residual is not None:
            np.add(self._source, self._residual, out=self._total)
        return stats


def run(
    norm: str,
    options: Options,
    x: Any,
    source: np.ndarray,
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
    call = Call(norm, options, x, source, form, weight, bias, mask=mask, residual=residual, out=out)
    return call.result(call.forward(eps, return_stats), return_stats)


def public_statistic(row: np.ndarray, layout: Layout) -> np.ndarray:
    """Return one row of a backend's statistics in the shape that users get."""
    if layout.stats_order is None:
        return row.reshape(layout.stats_shape)
    return row.reshape(layout.stats_lengths).transpose(layout.stats_order).reshape(layout.stats_shape)


class _Running:
    """Running statistics of the channels, as arrays that can be updated in place."""

    def __init__(self, mean: Any, var: Any, channels: int) -> None:
        self.mean = arrays.as_array(mean, "running_mean")
        self.var = arrays.as_array(var, "running_var")
        for name, array in (("running_mean", self.mean), ("running_var", self.var)):
            if array.shape != (channels,):
                raise ValueError(f"{name}: expected shape {(channels,)}, got {array.shape}")
            if not is_float(array.dtype):
                raise TypeError(f"{name}: expected a float dtype, got {array.dtype}")

    def given(self, eps: float) -> np.ndarray:
        """Return them as a backend's statistics, to normalize with."""
        stats = np.empty((4, self.mean.size))
        stats[:MEAN] = stats[M2] = 0.0
        stats[MEAN] = self.mean
        rstd = stats[RSTD]
        np.add(self.var, eps, out=rstd, dtype=np.float64)
        if rstd.min(initial=1.0) > 0.0:
            np.sqrt(rstd, out=rstd)
            np.reciprocal(rstd, out=rstd)
        else:  # zero, negative or NaN: as arithmetic has it, without a warning
            with np.errstate(all="ignore"):
                np.reciprocal(np.sqrt(rstd, out=rstd), out=rstd)
        return stats

    def check_writeable(self, mean: Any, var: Any) -> None:
        for name, given, array in (("running_mean", mean, self.mean), ("running_var", var, self.var)):
            if not hasattr(given, "dtype"):
                raise TypeError(f"{name}: expected an array to update in place, got {type(given).__name__}")
            if not array.flags.writeable:
                raise ValueError(f"{name}: expected a writeable array, got a read-only one")
            if array.size > 1 and abs(array.strides[0]) < array.itemsize:
                raise ValueError(f"{name}: expected an element of memory for each channel, got a broadcast array")
        if np.may_share_memory(self.mean, self.var) and arrays.overlap(self.mean, self.var):
            raise ValueError("running_mean, running_var: expected memory of their own, got one array for both")

    def update(self, stats: np.ndarray, momentum: float) -> None:
        """Move towards the statistics (3 rows: count, mean, M2; channels last), averaged over samples that count."""
        count, mean, m2 = stats[COUNT], stats[MEAN], stats[M2]
        if count.ndim == 1:
            count, mean, m2 = count[None], mean[None], m2[None]
        seen = count > 0
        samples = seen.sum(axis=0)
        with np.errstate(all="ignore"):  # NaN, Inf and what is too large for the dtype go the way of all arithmetic
            unbiased = m2 / np.maximum(count - 1.0, 1.0)
            moved = []
            for array, values in ((self.mean, mean), (self.var, unbiased)):
                batch = np.where(seen, values, 0.0).sum(axis=0) / np.maximum(samples, 1)
                old = array.astype(np.float64)
                moved.append(np.where(samples > 0, (1.0 - momentum) * old + momentum * batch, old))
            self.mean[...], self.var[...] = moved  # both or neither: memory may run out above


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
    eps = check_eps(eps)
    source, form = arrays.as_input(x, "x")
    options = (integer(channel_axis, "channel_axis"), None, None)
    if not from_input:
        if mask is not None:
            arrays.as_mask(mask, source.shape)
        norm, mask = "batch", None  # statistics that are given are not limited by a mask
    call = Call(norm, options, x, source, form, weight, bias, mask=mask, out=out)
    layout = call.plan.layout
    running = None
    if running_mean is not None or running_var is not None:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean, running_var: expected both or neither, got one of them")
        running = _Running(running_mean, running_var, layout.size)
    if not from_input:
        if running is None:
            raise ValueError("running_mean, running_var: expected both to normalize with them, got None")
        stats = running.given(eps)
        call.apply(stats)
        return call.result(stats, return_stats)
    if running is not None:
        running.check_writeable(running_mean, running_var)
        check_momentum(momentum)
    if layout.count == 1 and source.size > 0:
        raise ValueError(
            f"x: expected more than 1 value per channel to normalize with its own statistics, got shape {source.shape}"
        )
    stats = call.forward(eps, return_stats or running is not None)
    if running is not None and source.size > 0:
        shape = layout.stats_shape
        rows = np.stack([public_statistic(row, layout).reshape(shape) for row in stats])
        running.update(rows, check_momentum(momentum))
    return call.result(stats, return_stats)


def run_backward(
    norm: str,
    options: Options,
    dy: Any,
    x: Any,
    source: np.ndarray,
    form: Format,
    mean: Any,
    rstd: Any,
    weight: Any,
    mask: Any,
    *,
    fixed: bool = False,
) -> tuple[Any, ...]:
    """Return dx, dweight and, where there is a mean, dbias; with `fixed` the statistics do not depend on x."""
    shape = source.shape
    dtype, lane = form.result, form.lane
    gradient, gradient_form = arrays.as_input(dy, "dy")
    if gradient.shape != shape:
        raise ValueError(f"dy: expected the shape of x, {shape}, got {gradient.shape}")
    if not gradient_form.is_float:
        raise TypeError(f"dy: expected a float dtype, got {gradient.dtype}")
    gradient = arrays.cast(gradient, dtype)
    counted = None if mask is None or fixed else arrays.as_mask(mask, shape)
    work = plan(
        norm,
        options,
        shape,
        (source.strides, source.itemsize),
        (gradient.strides, gradient.itemsize),
        None if counted is None else counted.strides,
        separable=True,
    )
    layout = work.layout
    flat_weight = None if weight is None else parameter(weight, "weight", layout, lane)
    flat_rstd = given_statistic(rstd, "rstd", layout)
    flat_mean = given_statistic(mean, "mean", layout) if layout.centred else np.zeros(1)
    dx = arrays.fresh(work, dtype, source, gradient)
    if work.size == 0:
        gradients = (np.zeros(layout.size), np.zeros(layout.size))
    else:
        flat_x = arrays.flat(source, work.x, work)
        flat_dy = arrays.flat(gradient, work.y, work)
        flat_dx = arrays.flat(dx, work.packed, work)
        flat_mask = None if counted is None else arrays.flat(counted, work.mask, work)
        gradients = cpu_backend().backward(
            work, flat_dy, flat_x, flat_dx, flat_weight, flat_mean, flat_rstd, flat_mask, fixed
        )
    kind = lane if weight is None else arrays.as_array(weight, "weight").dtype
    if not is_float(kind):  # a list of integers
        kind = lane
    if work.reordered:
        packed, dx = dx, np.empty_like(source, dtype)
        np.copyto(dx, packed)
    results = [dx]
    for gradient_row in gradients if layout.centred else gradients[:1]:
        values = gradient_row
        if layout.affine_order is not None:
            lengths_in_memory = [layout.affine_shape[a] for a in layout.affine_order]
            values = values.reshape(lengths_in_memory).transpose(np.argsort(layout.affine_order))
        results.append(arrays.cast(values.reshape(layout.affine_shape), kind))
    back = None if type(x) is np.ndarray else arrays.way_back(x)
    return tuple(results if back is None else map(back, results))


def given_statistic(value: Any, name: str, layout: Layout) -> np.ndarray:
    """Return a statistic that the caller gave, in the order of memory of the input."""
    array = arrays.as_array(value, name)
    if array.shape != layout.stats_shape:
        raise ValueError(f"{name}: expected shape {layout.stats_shape}, got {array.shape}")
    if array.dtype != np.float64 or not array.flags.carray:
        if not is_float(array.dtype):
            raise TypeError(f"{name}: expected a float dtype, got {array.dtype}")
        array = np.require(arrays.cast(array, np.dtype(np.float64)), None, ["C", "A", "W"])
    if layout.stats_order is None:
        return array.reshape(-1)
    lengths_in_order = [layout.stats_lengths[a] for a in layout.stats_order]
    return array.reshape(lengths_in_order).transpose(np.argsort(layout.stats_order)).reshape(-1)


def _residual(value: Any, x: np.ndarray) -> np.ndarray:
    residual, _ = arrays.as_input(value, "residual")
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected the shape of x, {x.shape}, got {residual.shape}")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual: expected the dtype of x, {x.dtype}, got {residual.dtype}")
    return residual


def parameter(value: Any, name: str, layout: Layout, lane: np.dtype[Any]) -> np.ndarray:
    """Return a weight or bias as the kernels read it: flat, in the lane dtype, in the order of memory of the input."""
    array = arrays.as_parameter(value, name, layout.affine_shape, lane)
    if layout.affine_order is not None:
        array = np.ascontiguousarray(array.transpose(layout.affine_order))
    return array.reshape(-1)
