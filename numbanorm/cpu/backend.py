"""The CPU backend: how prepared calls become launches of the kernels for arrays in host memory.

It keeps the contract of `numbanorm.backend`. A launch takes NumPy arrays alone, and returns 0, or what
`numbanorm.cpu.guard.clash` found: nothing is written then.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np

from ..backend import Forward, Launch
from ..core.plan import Plan
from . import columns, rows, running
from .address import address_type
from .backward import prepare_backward, prepare_partial_gradient, prepare_partial_sums
from .bound import BOOL, FLOAT64, FLOAT64_ADDRESS, GEOMETRY_ADDRESS, INT64, NONE, Bound, Kinds
from .convert import converter
from .engine import may_share, may_split, on_threads
from .launch import affine_ways, by_row, geometry_of_forward, tiles_of, units_of_apply, variants
from .moments import ChunkMoments

__all__ = [
    "prepare_apply",
    "prepare_backward",
    "prepare_forward",
    "prepare_partial_gradient",
    "prepare_partial_sums",
    "prepare_running",
    "prepare_statistics",
]

_empty = np.empty


def prepare_forward(call: Forward) -> Launch:
    """Return ``launch(x, residual, total, y, mask, weight, bias, stats, eps, keep)``.

    `keep` is false where nobody wants the statistics; the kernel of rows may then be given none to write to.
    """
    plan = call.plan
    geometry = geometry_of_forward(call)
    kinds = Kinds.of(call)
    arrays = (kinds.x, kinds.residual, kinds.total, kinds.y, kinds.mask, kinds.lane, kinds.lane, FLOAT64_ADDRESS)
    if plan.columns:
        fused = Bound(columns.forward, geometry, (by_row(plan, geometry),), *arrays, FLOAT64, BOOL)
    else:
        fused = Bound(rows.forward, geometry, variants(geometry, call.mask is None), *arrays, FLOAT64, BOOL)
    if not may_share(plan.size) or (plan.columns and plan.layout.view[0] == 1 and not may_split(plan.size)):
        return fused.alone
    units = tiles_of(geometry) if plan.columns else plan.layout.groups
    split = _Split(call, geometry)

    def run(threads: int, *arguments: Any) -> Any:
        if threads == 1 or units >= threads:
            return fused.on(threads, *arguments)
        return split(threads, *arguments) if may_split(plan.size) else fused.alone(*arguments)

    return on_threads(plan.size, run)


class _Split:
    """A forward call of fewer groups than threads: moments of chunks, merged in order, then the output."""

    def __init__(self, call: Forward, geometry: np.ndarray) -> None:
        self._call, self._geometry = call, geometry
        self._stages: tuple[Bound | None, ChunkMoments, Bound] | None = None

    def _bound(self) -> tuple[Bound | None, ChunkMoments, Bound]:
        """Bind the kernels once they are needed: they take seconds to compile."""
        if self._stages is None:
            plan, kinds = self._call.plan, Kinds.of(self._call)
            summed = self._call.residual is not None
            read = self._geometry[1:] if summed else self._geometry  # the second record reads the packed sum
            add = Bound(rows.add, self._geometry, (), kinds.x, kinds.residual, kinds.total) if summed else None
            x = kinds.y if summed else kinds.x
            moments = ChunkMoments(plan, read, x, kinds.mask, kinds.lane)
            self._stages = add, moments, _apply(plan, read, x, kinds, NONE, NONE)
        return self._stages

    def __call__(
        self, threads: int, x: Any, residual: Any, total: Any, y: Any, mask: Any, weight: Any, bias: Any, *rest: Any
    ) -> Any:
        add, moments, apply = self._bound()
        stats, eps, _ = rest
        if stats.size == 0:  # nobody wants them
            stats = _empty((4, self._call.plan.layout.groups))
        if add is not None:
            add.on(threads, x, residual, total)
            x = total
        problem = moments(threads, x, mask, weight, stats, eps)
        return problem or apply.on(threads, x, y, weight, bias, None, None, stats, eps)


def _apply(plan: Plan, geometry: np.ndarray, x: Any, kinds: Kinds, mean: Any, var: Any) -> Bound:
    flags = (by_row(plan, geometry),) if plan.columns else affine_ways(geometry)
    kernel = columns.apply if plan.columns else rows.apply
    return Bound(kernel, geometry, flags, x, kinds.y, kinds.lane, kinds.lane, mean, var, FLOAT64_ADDRESS, FLOAT64)


def prepare_apply(call: Forward, mean: np.dtype[Any] | None = None, var: np.dtype[Any] | None = None) -> Launch:
    """Return ``launch(x, y, weight, bias, mean, var, stats, eps)``.

    `mean` and `var` are running statistics of these dtypes, without gaps; where there are none, the rows MEAN and RSTD
    of `stats` are what normalizes.
    """
    plan = call.plan
    geometry = geometry_of_forward(call)
    kinds = Kinds.of(call)
    given = [NONE if dtype is None else address_type(dtype) for dtype in (mean, var)]
    apply = _apply(plan, geometry, kinds.x, kinds, *given)
    if not may_share(plan.size):
        return apply.alone

    # With fewer than two units a thread one waits for the other, and they share lines where their columns meet.
    most = units_of_apply(plan, geometry) // 2

    @cache
    def filler() -> Launch:
        return running.given.bound(*given, FLOAT64_ADDRESS, INT64, FLOAT64)

    def run(threads: int, x: Any, y: Any, weight: Any, bias: Any, mean: Any, var: Any, stats: Any, eps: float) -> Any:
        threads = max(min(threads, most), 1)
        if threads > 1 and mean is not None:
            filler()(mean, var, stats, plan.layout.groups, eps)
        return apply.on(threads, x, y, weight, bias, mean, var, stats, eps)

    return on_threads(plan.size, run)


def prepare_running(call: Forward, mean: np.dtype[Any], var: np.dtype[Any]) -> Launch:
    """Return ``launch(mean, var, stats, momentum, check)``, which moves running statistics towards those of a batch.

    They are of these dtypes, without gaps. With `check` it only tells whether it could; see `running.update`.
    """
    geometry = geometry_of_forward(call).copy()
    g = geometry[0]
    (g["run_samples"], g["run_sample_step"]), g["run_step"] = call.samples
    g["run_channels"] = call.plan.layout.size
    g["run_mean_itemsize"], g["run_var_itemsize"] = mean.itemsize, var.itemsize
    kinds = address_type(mean), address_type(var)
    update = running.update.bound(GEOMETRY_ADDRESS, *kinds, FLOAT64_ADDRESS, FLOAT64, BOOL)

    def launch(mean: Any, var: Any, stats: Any, momentum: float, check: bool) -> Any:
        return update(geometry, mean, var, stats, momentum, check)

    return launch


def prepare_statistics(call: Forward) -> Launch:
    """Return ``launch(x, mask, stats)``, which writes statistics alone, with an eps of 0."""
    plan = call.plan
    kinds = Kinds.of(call)
    moments = ChunkMoments(plan, geometry_of_forward(call), kinds.x, kinds.mask, kinds.lane)
    weight = _one(call.form.lane)

    def run(threads: int, x: Any, mask: Any, stats: Any) -> Any:
        return moments(threads, x, mask, weight, stats, 0.0)

    return on_threads(plan.size, run)


def prepare_conversion(source: np.dtype[Any], target: np.dtype[Any]) -> Launch | None:
    """Return ``launch(source, target, n)``, which converts halves without gaps, or to them; None for other dtypes."""
    half = {source.itemsize, target.itemsize} == {2, 4} and source.isnative and target.isnative
    return converter(source, target) if half else None


@lru_cache
def _one(lane: np.dtype[Any]) -> np.ndarray:
    return np.ones(1, lane)
