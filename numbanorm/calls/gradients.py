"""Prepared backward calls on arrays in host memory: of whole groups, and of parts of groups."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from ..backend import Backward
from ..core.plan import Options
from ..core.pool import POOL
from ..core.spec import ArraySpec
from . import prepare
from .arrays import cast
from .memory import Output, Packing, aligned, backend, look, new, packed
from .prepare import public_statistic

_empty = np.empty


class PreparedBackward:
    """Gradients of a call."""

    __slots__ = (
        "_call",
        "_fixed",
        "_gradients",
        "_kind",
        "_lane",
        "_launch",
        "_narrow",
        "_options",
        "_output",
        "_pack",
        "_plain",
        "_rows",
        "_shape",
    )

    def __init__(self, call: Backward, options: Options, fixed: bool) -> None:
        self._call, self._options, self._fixed = call, options, fixed
        self._lane = call.form.lane
        self._output = Output(call)
        self._pack = Packing(call.dy, call.x, call.mask, call.weight, call.mean, call.rstd)
        layout = call.plan.layout
        self._gradients = (2, layout.weights)
        self._shape = layout.affine_shape
        self._rows = len(call.record.parameters)
        self._kind = call.gradient.dtype
        self._narrow = self._narrowing() if call.packed_gradient is not None and call.plan.size else None
        self._plain = not self._pack and call.deliver is None and call.packed_gradient is None and call.plan.size > 0
        self._launch = backend().prepare_backward(call, fixed) if call.plan.size else None

    def run(self, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, mask: Any) -> tuple[np.ndarray, ...]:
        """Return dx, dweight and, where the norm has a bias, dbias."""
        call, output, given = self._call, self._output, (dy, x, mean, rstd, weight, mask)
        if not self._plain:
            dy, x, mask, weight, mean, rstd = self._pack(dy, x, mask, weight, mean, rstd)
        dx = POOL.empty(output.shape, output.dtype, x, dy) if output.pooled else _empty(output.shape, output.dtype)
        gradients = _empty(self._gradients, self._lane)
        if self._launch is None:
            gradients[...] = 0.0
        elif self._launch(dy, x, dx, mask, weight, mean, rstd, gradients):
            dy, x, mean, rstd, weight, mask = given  # packed, a weight would lend its gradient another dtype
            arrays: Any = (aligned(dy), aligned(x), mean, rstd, aligned(weight), mask)
            return prepared_backward_for(call.record.kind, self._options, *arrays, fixed=self._fixed).run(*arrays)
        if output.back is not None:
            dx = dx.transpose(output.back)
        if self._plain:
            if len(self._shape) != 1:
                gradients = gradients.reshape(2, *self._shape)
            return (dx, gradients[0, ...], gradients[1, ...]) if self._rows == 2 else (dx, gradients[0, ...])
        if call.deliver is not None:
            packed_dx, dx = dx, new(call.deliver)
            np.copyto(dx, packed_dx)
        if self._narrow is not None:
            gradients, lanes = _empty((2, *self._shape), self._kind), gradients
            self._narrow(lanes, gradients, lanes.size)
            return (dx, gradients[0, ...], gradients[1, ...]) if self._rows == 2 else (dx, gradients[0, ...])
        return dx, *(self._as_given(gradients[row]) for row in range(self._rows))

    def _narrowing(self) -> Any:
        """Return what converts gradients to half precision, in a quarter of NumPy's time, where that is all."""
        if self._call.plan.layout.affine_order is not None:
            return None
        return backend().prepare_conversion(self._lane, self._kind)

    def _as_given(self, gradient: np.ndarray) -> np.ndarray:
        """Return a gradient in the dtype and order of the weight."""
        order = self._call.plan.layout.affine_order
        if order is not None:
            gradient = gradient.reshape([self._shape[a] for a in order]).transpose(np.argsort(order))
        return cast(gradient.reshape(self._shape), self._call.gradient.dtype)


def prepared_backward_for(
    norm: str,
    options: Options,
    dy: np.ndarray,
    x: np.ndarray,
    mean: Any,
    rstd: np.ndarray,
    weight: Any,
    mask: Any,
    *,
    fixed: bool = False,
) -> PreparedBackward:
    """Return what serves backward calls whose arrays look like these."""
    specs = map(look, (x, dy, weight, mean, rstd, None if fixed else mask))
    return _prepare_backward(norm, options, *specs, fixed=fixed)


@lru_cache(maxsize=4096)
def _prepare_backward(norm: str, options: Options, *specs: ArraySpec | None, fixed: bool) -> PreparedBackward:
    return PreparedBackward(prepare.backward(norm, options, *specs), options, fixed)


class PartialBackward:
    """Sums over parts of groups, and the gradient of a part from those of whole groups."""

    def __init__(self, call: Backward) -> None:
        self.call = call
        self._pack = Packing(call.dy, call.x, call.mask, call.weight, call.mean, call.rstd)
        self._output = Output(call)

    @cached_property
    def _sums(self) -> Any:
        return backend().prepare_partial_sums(self.call)

    @cached_property
    def _gradient(self) -> Any:
        return backend().prepare_partial_gradient(self.call)

    def sums(self, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the sums of g and of g * h over every group's part, float64, shaped as statistics are."""
        layout = self.call.plan.layout
        sums = np.zeros((2, layout.groups))
        if self.call.plan.size:
            dy, x, _, weight, mean, rstd = self._pack(aligned(dy), aligned(x), None, weight, mean, rstd)
            self._sums(dy, x, weight, mean, rstd, sums)
        first, second = (public_statistic(row, layout) for row in sums)
        return first, second

    def gradient(
        self, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, mask: Any, means: tuple[Any, Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return dx, and dweight and dbias, shape (2, size), where weights lie along the groups; else 0."""
        call, output = self.call, self._output
        layout = call.plan.layout
        dx = output.new(x, dy)
        gradients = np.zeros((2, layout.weights), call.form.lane)
        if call.plan.size:
            dy, x, mask, weight, mean, rstd = self._pack(aligned(dy), aligned(x), mask, weight, mean, rstd)
            spec = prepare.statistic_spec(layout)
            both = np.stack([packed(np.asarray(part), spec).ravel("K") for part in means])
            self._gradient(dy, x, dx, mask, weight, mean, rstd, both, gradients)
        if output.back is not None:
            dx = dx.transpose(output.back)
        if call.deliver is not None:
            packed_dx, dx = dx, new(call.deliver)
            np.copyto(dx, packed_dx)
        return dx, gradients


def partial_for(
    norm: str, options: Options, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any = None, mask: Any = None
) -> PartialBackward:
    """Return what serves parts of groups whose arrays look like these."""
    return _prepare_partial(norm, options, *map(look, (x, dy, weight, mean, rstd, mask)))


@lru_cache(maxsize=4096)
def _prepare_partial(norm: str, options: Options, *specs: ArraySpec | None) -> PartialBackward:
    return PartialBackward(prepare.backward(norm, options, *specs))


caches = (_prepare_backward, _prepare_partial)
"""What has been prepared, by specs."""
