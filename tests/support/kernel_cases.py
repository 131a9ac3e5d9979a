"""Calls of the CUDA backend at the level of its contract, and what they must give, by formulas in longdouble."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from numbanorm.calls import prepare
from numbanorm.core.dtypes import format_of
from numbanorm.core.layout import Layout
from numbanorm.core.norms import NormRecord, record_of
from numbanorm.core.plan import COUNT, M2, MEAN, RSTD
from numbanorm.core.spec import contiguous, spec_of
from numbanorm.cuda import backend as cuda

LONG = np.longdouble


@dataclass(frozen=True)
class Case:
    """One norm of one shape; arrays of any strides are made by `arrays`."""

    norm: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    axis: tuple[int, ...] | None = None
    channel_axis: int = 1
    num_groups: int | None = None
    mask: str = ""  # "elements": one truth value each; "rows": broadcast along the last axis
    weight: bool = True
    bias: bool = True
    residual: bool = False
    order: str = "C"  # "C", "F", "sliced"
    shift: int = 0  # elements that spans lie beyond an aligned address
    mean: float = 0.5
    scale: float = 1.0
    parameter: str = ""  # dtype of weight and bias, that of the lanes if none is named

    @property
    def record(self) -> NormRecord:
        return record_of(self.norm)


def dtype_of(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


class Problem:
    """A case's arrays, its plan and its statistics in extended precision."""

    def __init__(self, case: Case, separable: bool = False) -> None:
        self.case = case
        rng = np.random.default_rng([7, *case.shape])
        dtype = dtype_of(case.dtype)
        self.form = format_of(dtype)
        shape = case.shape
        values = (rng.standard_normal(shape) + case.mean) * case.scale
        if case.dtype == "bool":
            values = values > case.mean * case.scale
        self.x = self.laid(values, dtype)
        self.dy = self.laid(rng.standard_normal(shape), self.form.result)
        self.residual = self.laid(rng.standard_normal(shape), dtype) if case.residual else None
        self.mask = None
        if case.mask:
            cut = shape if case.mask == "elements" else (*shape[:-1], 1)
            self.mask = np.broadcast_to(rng.random(cut) < 0.6, shape)
        self.counts = self.mask
        options = (case.channel_axis, case.num_groups, case.axis)
        layout = Layout.of(case.norm, shape, channel_axis=case.channel_axis, num_groups=case.num_groups, axis=case.axis)
        lane = dtype_of(case.parameter) if case.parameter else self.form.lane
        self.weight = rng.standard_normal(layout.size).astype(lane) if case.weight else None
        self.bias = rng.standard_normal(layout.size).astype(lane) if case.bias and case.record.bias else None
        x, residual, mask = (None if a is None else spec_of(a) for a in (self.x, self.residual, self.mask))
        if separable:
            statistic = contiguous(layout.stats_shape, np.dtype(np.float64))
            weight = None if self.weight is None else contiguous(layout.affine_shape, self.form.lane)
            self.call: Any = prepare.backward(
                case.norm, options, x, spec_of(self.dy), weight, statistic, statistic, mask
            )
        else:
            weight, bias = (
                None if a is None else contiguous(layout.affine_shape, lane) for a in (self.weight, self.bias)
            )
            self.call = prepare.forward(case.norm, options, x, weight, bias, mask, residual, half_weights=True)
        self.plan = self.call.plan
        layout = self.plan.layout
        assert self.plan.x is not None
        if self.mask is not None and self.plan.mask is None:
            self.counts = np.array(self.mask.transpose(layout.order), order="C").reshape(-1)
        index = np.indices(shape)
        view, inner = layout.view, layout.inner
        flat = layout.flat(*index)
        _, r0, k1, r1 = view
        self.group = flat // (r0 * k1 * r1) * k1 + flat // r1 % k1
        self.channel = flat // inner % layout.size

    def laid(self, values: np.ndarray, dtype: Any) -> np.ndarray:
        values = values.astype(dtype)
        if self.case.order == "F":
            return np.asfortranarray(values)
        if self.case.order == "sliced":
            wide = np.zeros([2 * values.shape[0], *values.shape[1:-1], values.shape[-1] + 8], dtype)
            part = wide[::2, ..., : values.shape[-1]]
            part[...] = values
            return part
        return np.ascontiguousarray(values)

    def sums(self, values: np.ndarray, by: np.ndarray, size: int) -> np.ndarray:
        result = np.zeros(size, LONG)
        np.add.at(result, by.ravel(), values.astype(LONG).ravel())
        return result

    def statistics(self, x: np.ndarray, eps: float) -> np.ndarray:
        """Return (count, mean, M2, rstd) of every group."""
        groups = self.plan.layout.groups
        counted = np.ones(x.shape) if self.mask is None else self.mask
        x = x.astype(LONG)
        count = self.sums(counted, self.group, groups)
        some = np.maximum(count, 1)
        mean = self.sums(np.where(counted, x, 0), self.group, groups) / some if self.case.record.centred else 0 * count
        m2 = self.sums(np.where(counted, (x - mean[self.group]) ** 2, 0), self.group, groups)
        with np.errstate(divide="ignore"):
            if self.case.record.scale == "l2":
                return np.stack([count, mean, m2, 1 / np.maximum(np.sqrt(m2), LONG(eps))])
            return np.stack([count, mean, m2, 1 / np.sqrt(m2 / some + LONG(eps))])

    def normalized(self, x: np.ndarray, stats: np.ndarray) -> np.ndarray:
        y = (x.astype(LONG) - stats[MEAN][self.group]) * stats[RSTD][self.group]
        if self.weight is not None:
            y = y * self.weight.astype(LONG)[self.channel]
        return y if self.bias is None else y + self.bias.astype(LONG)[self.channel]

    def gain(self) -> Any:
        """Return the size of every element's weight."""
        return 1.0 if self.weight is None else np.abs(self.weight.astype(float))[self.channel]

    def gradients(self, stats: np.ndarray, fixed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return dx, dweight and dbias."""
        layout = self.plan.layout
        dy = self.dy.astype(LONG)
        h = (self.x.astype(LONG) - stats[MEAN][self.group]) * stats[RSTD][self.group]
        g = dy if self.weight is None else dy * self.weight.astype(LONG)[self.channel]
        share = np.where(stats[COUNT] > 0, 1 / np.maximum(stats[COUNT], 1), 0)
        if self.case.record.scale == "l2":  # where it is clamped, rstd does not depend on x
            share = np.where(np.sqrt(stats[M2]) * stats[RSTD] < 1 - 1e-6, 0, 1)
        share = share * (0 if fixed else 1)
        mean_g = self.sums(g, self.group, layout.groups) * share * (1 if self.case.record.centred else 0)
        mean_gh = self.sums(g * h, self.group, layout.groups) * share
        counted = 1 if self.mask is None else self.mask
        dx = stats[RSTD][self.group] * (g - counted * (mean_g[self.group] + h * mean_gh[self.group]))
        return dx, self.sums(dy * h, self.channel, layout.size), self.sums(dy, self.channel, layout.size)


class Device:
    """Where a problem's arrays go: the simulator, or a GPU.

    Attributes
    ----------
    place : callable
        ``place(flat array, shift)`` returns a span that holds it.
    allocate : callable
        ``allocate(size, dtype, shift)`` returns a span of garbage.
    view : callable
        ``view(span)`` returns its elements.
    """

    def __init__(self, place: Any, allocate: Any, view: Any) -> None:
        self.place, self.allocate, self.view = place, allocate, view

    def workspace(self, nbytes: int) -> Any:
        return self.allocate(nbytes, np.uint8, 0)

    def span_of(self, array: np.ndarray | None, shift: int = 0) -> Any:
        """Place an array's whole span of memory, whatever its strides."""
        if array is None:
            return None
        if array.ndim == 1:
            return self.place(array, shift)
        reach = [(n - 1) * s // array.itemsize for n, s in zip(array.shape, array.strides, strict=True)]
        assert min(reach) >= 0
        whole = np.lib.stride_tricks.as_strided(array, (1 + sum(reach),), (array.itemsize,))
        return self.place(np.array(whole), shift)

    def back(self, problem: Problem, span: Any) -> np.ndarray:
        """Return a packed span in the order of the input's axes."""
        layout = problem.plan.layout
        packed = np.array(self.view(span)).reshape([layout.shape[a] for a in layout.order])
        return packed if problem.plan.inverse is None else packed.transpose(problem.plan.inverse)

    @property
    def options(self) -> dict[str, Any]:
        return {"stream": 0, "workspace": self.workspace}

    def forward(self, problem: Problem, eps: float, in_place: bool = False) -> tuple[np.ndarray, np.ndarray, Any]:
        """Return y, the statistics and, with a residual, the sum."""
        case, plan = problem.case, problem.plan
        shift, result = case.shift, problem.form.result
        x = self.span_of(problem.x, shift)
        y = x if in_place else self.allocate(plan.size, result, shift)
        stats = self.allocate(4 * plan.layout.groups, np.float64, 0)
        residual = self.span_of(problem.residual, shift)
        total = None if residual is None else self.allocate(plan.size, result, shift)
        affine = self.span_of(problem.weight, shift), self.span_of(problem.bias, shift)
        mask = self.span_of(problem.counts, shift)
        launch = cuda.prepare_forward(problem.call)
        launch(x, residual, total, y, mask, *affine, stats, eps, **self.options)
        rows = np.array(self.view(stats)).reshape(4, -1)
        return self.back(problem, y), rows, None if total is None else self.back(problem, total)

    def statistics(self, problem: Problem) -> np.ndarray:
        x, mask = (self.span_of(a, problem.case.shift) for a in (problem.x, problem.counts))
        stats = self.allocate(4 * problem.plan.layout.groups, np.float64, 0)
        cuda.prepare_statistics(problem.call)(x, mask, stats, **self.options)
        return np.array(self.view(stats)).reshape(4, -1)

    def apply(self, problem: Problem, stats: np.ndarray) -> np.ndarray:
        shift = problem.case.shift
        arrays = self.span_of(problem.x, shift), self.allocate(problem.plan.size, problem.form.result, shift)
        affine = self.span_of(problem.weight, shift), self.span_of(problem.bias, shift)
        given = self.place(stats.astype(np.float64).ravel(), 0)
        cuda.prepare_apply(problem.call)(*arrays, *affine, None, None, given, 0.0, stream=0)
        return self.back(problem, arrays[1])

    def inputs(self, problem: Problem, stats: np.ndarray) -> tuple[Any, ...]:
        """Return spans of dy, x, mask, weight, mean and rstd."""
        shift, lane = problem.case.shift, problem.form.lane
        mean = self.place(stats[MEAN].astype(np.float64), 0) if problem.case.record.centred else None
        weight = None if problem.weight is None else problem.weight.astype(lane)
        arrays = [self.span_of(a, shift) for a in (problem.dy, problem.x, problem.counts, weight)]
        return *arrays, mean, self.place(stats[RSTD].astype(np.float64), 0)

    def gradients(self, problem: Problem) -> list[Any]:
        size = problem.plan.layout.size
        return [self.allocate(size, problem.form.lane, 0) for _ in problem.case.record.parameters]

    def backward(self, problem: Problem, stats: np.ndarray, fixed: bool) -> tuple[np.ndarray, Any, Any]:
        """Return dx, dweight and dbias (None where the norm has none)."""
        dx = self.allocate(problem.plan.size, problem.form.result, problem.case.shift)
        dy, x, *others = self.inputs(problem, stats)
        gradients = self.gradients(problem)
        cuda.prepare_backward(problem.call, fixed)(dy, x, dx, *others, gradients, **self.options)
        dweight, dbias = (*(np.array(self.view(g)) for g in gradients), None)[:2]
        return self.back(problem, dx), dweight, dbias

    def partial_sums(self, problem: Problem, stats: np.ndarray) -> np.ndarray:
        """Return the sums of g and g * h of every group, shape (2, groups)."""
        dy, x, _, weight, mean, rstd = self.inputs(problem, stats)
        sums = self.allocate(2 * problem.plan.layout.groups, np.float64, 0)
        cuda.prepare_partial_sums(problem.call)(dy, x, weight, mean, rstd, sums, **self.options)
        return np.array(self.view(sums)).reshape(2, -1)

    def partial_gradient(
        self, problem: Problem, stats: np.ndarray, means: np.ndarray, wanted: bool
    ) -> tuple[np.ndarray, Any, Any]:
        """Return dx and, if wanted, dweight and dbias, from the means of g and g * h."""
        dx = self.allocate(problem.plan.size, problem.form.result, problem.case.shift)
        dy, x, *others = self.inputs(problem, stats)
        given = self.place(means.astype(np.float64).ravel(), 0)
        gradients = self.gradients(problem) if wanted else []
        cuda.prepare_partial_gradient(problem.call)(dy, x, dx, *others, given, gradients, **self.options)
        dweight, dbias = (*(np.array(self.view(g)) for g in gradients), None, None)[:2]
        return self.back(problem, dx), dweight, dbias


__all__ = ["COUNT", "M2", "MEAN", "RSTD", "Case", "Device", "Problem"]
