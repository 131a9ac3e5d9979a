"""The arrays of a cell of the comparison, and what the operation makes of them, by its definition.

`Data.formula` is the definition, for NumPy and for JAX alike: with float64 arrays it is the reference, with the cell's
own it is what a user of NumPy or JAX writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None

EPS = 1e-5
GROUPS = 8
MOMENTUM = 0.1
MARGIN = 2
"""Elements that ", cropped" cuts off at every side of an image."""


@dataclass(frozen=True)
class Spec:
    """What a cell computes, and on which array.

    Attributes
    ----------
    operation : str
        "layer", "batch eval", "module batch step": whether by layers, the norm, and how it is called: "training" takes
        the batch's statistics, "running" updates running statistics, too, "step" is forward and backward.
    shape : tuple of int
        (rows, features), (N, L, features) or (N, C, ...), whatever the order in memory.
    dtype : str
        Of every array.
    view : str
        "": contiguous. "channels last": in memory, the shape being (N, C, H, W). "sliced": the middle of rows three
        times as long. "cropped": the middle of images. "transposed": (L, N, features) in memory. "Fortran": in that
        order.
    """

    operation: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    view: str = ""

    @property
    def name(self) -> str:
        """Readable: operation, shape, dtype and view."""
        view = f", {self.view}" if self.view else ""
        return f"{self.operation} {'x'.join(map(str, self.shape))} {self.dtype}{view}"

    @property
    def module(self) -> bool:
        """Whether the libraries' layers are called, not their functions."""
        return self.operation.startswith("module ")

    @property
    def base(self) -> str:
        """The norm: "layer", "rms", "batch", "instance" or "group"."""
        return "rms" if self.mode == "residual" else self.operation.removeprefix("module ").partition(" ")[0]

    @property
    def mode(self) -> str:
        """How it is called; "" where there is only one way."""
        if self.operation.startswith("residual"):
            return "residual"
        return self.operation.removeprefix("module ").partition(" ")[2]

    @property
    def rows(self) -> bool:
        """Whether the last axis is normalized."""
        return self.base in ("layer", "rms")

    @property
    def tracks(self) -> bool:
        """Whether running statistics are updated, and are a part of the result."""
        return self.mode == "running" or (self.module and self.operation == "module batch training")

    @property
    def records(self) -> bool:
        """Whether torch has to keep what backward needs: else it is called in inference mode."""
        return self.module and self.mode in ("training", "step")


class Data:
    """The arrays of a cell; those that few operations need are made when they are asked for."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.kind = np.dtype(bfloat16 if spec.dtype == "bfloat16" else spec.dtype)
        self.random = np.random.default_rng(0)
        self.x = self._fill(3.0)
        self.width = spec.shape[-1] if spec.rows else spec.shape[1]
        self.weight, self.bias, self.mean = (self.random.standard_normal(self.width).astype(self.kind) for _ in "wbm")
        self.var = (1.0 + self.random.random(self.width)).astype(self.kind)

    @cached_property
    def other(self) -> np.ndarray:
        """The residual, or the gradient of the output."""
        return self._fill(0.0)

    @cached_property
    def y(self) -> np.ndarray:
        """An output that is there already."""
        return np.empty_like(self.x)

    @cached_property
    def mask(self) -> np.ndarray | None:
        """What counts, four fifths of all: elements of a row, rows of a batch, or positions of all channels."""
        if self.spec.mode != "masked":
            return None
        shape = self.spec.shape
        size = shape if self.spec.rows else (shape[0], 1, *shape[2:])
        mask = self.random.random(size) < 0.8
        mask[..., :2] |= self.spec.rows or len(shape) > 2  # something counts in every group
        return mask

    def _fill(self, offset: float) -> np.ndarray:
        shape = self.spec.shape
        values = self.random.standard_normal(shape, dtype=np.float32)
        values += np.float32(offset)
        values = values.astype(self.kind, copy=False)
        match self.spec.view:
            case "channels last":
                return np.moveaxis(np.ascontiguousarray(np.moveaxis(values, 1, -1)), -1, 1)
            case "transposed":
                return np.ascontiguousarray(values.swapaxes(0, 1)).swapaxes(0, 1)
            case "Fortran":
                return np.asfortranarray(values)
            case "sliced":
                whole = np.zeros((*shape[:-1], 3 * shape[-1]), self.kind)
                view = whole[..., shape[-1] : 2 * shape[-1]]
            case "cropped":
                whole = np.zeros((*shape[:2], *(n + 2 * MARGIN for n in shape[2:])), self.kind)
                view = whole[(..., *(slice(MARGIN, -MARGIN) for _ in shape[2:]))]
            case _:
                return values
        view[...] = values
        return view

    # --- the definitions

    @property
    def lead(self) -> tuple[int, ...]:
        """The shape in which a vector of weights broadcasts to x."""
        return (-1,) if self.spec.rows else (-1,) + (1,) * (len(self.spec.shape) - 2)

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes that are averaged over, in `_view`."""
        spatial = tuple(range(2, len(self.spec.shape)))
        return {"batch": (0, *spatial), "instance": spatial}.get(self.spec.base, (-1,))

    def _view(self, array: Any) -> Any:
        return array.reshape(array.shape[0], GROUPS, -1) if self.spec.base == "group" else array

    def _statistics(self, xp: Any, view: Any) -> tuple[Any, Any]:
        """Return mean and variance; RMS norm's mean is 0."""
        if self.spec.base == "rms":
            return 0, (view * view).mean(-1, keepdims=True)
        counts = {}
        if self.mask is not None:
            counts["where"] = self._view(np.broadcast_to(self.mask, self.spec.shape))
        return tuple(f(self.axes, keepdims=True, **counts) for f in (view.mean, view.var))

    def formula(self, xp: Any, *arrays: Any) -> Any:
        """Return the result: of `arguments`, by an array library."""
        if self.spec.mode == "backward":
            return self._gradients(xp, *arrays)
        if self.spec.mode == "step":
            return (self._output(xp, *arrays), *self._gradients(xp, *arrays))
        return self._output(xp, *arrays)

    def _output(self, xp: Any, x: Any, other: Any, weight: Any, bias: Any, mean: Any, var: Any) -> Any:
        spec = self.spec
        weight, bias = weight.reshape(self.lead), bias.reshape(self.lead)
        if spec.mode == "residual":
            x = x + other
        if spec.base == "batch" and spec.mode == "eval":
            return (x - mean.reshape(self.lead)) / xp.sqrt(var.reshape(self.lead) + EPS) * weight + bias
        view = self._view(x)
        centre, spread = self._statistics(xp, view)
        normal = ((view - centre) / xp.sqrt(spread + EPS)).reshape(x.shape)
        y = normal * weight if spec.base == "rms" else normal * weight + bias
        if not spec.tracks:
            return y
        n = x.size // self.width
        moved = (centre.reshape(-1) - mean) * MOMENTUM, (spread.reshape(-1) * (n / (n - 1)) - var) * MOMENTUM
        return y, mean + moved[0], var + moved[1]

    def _gradients(self, xp: Any, x: Any, dy: Any, weight: Any, *_: Any) -> Any:
        view, scaled = self._view(x), self._view(dy * weight.reshape(self.lead))
        centre, spread = self._statistics(xp, view)
        rstd = 1 / xp.sqrt(spread + EPS)
        normal = (view - centre) * rstd
        inner = scaled if self.spec.base == "rms" else scaled - scaled.mean(self.axes, keepdims=True)
        dx = (inner - normal * (scaled * normal).mean(self.axes, keepdims=True)) * rstd
        dx, normal = dx.reshape(x.shape), normal.reshape(x.shape)
        features = x.ndim - 1 if self.spec.rows else 1
        others = tuple(a for a in range(x.ndim) if a != features)
        gradients = dx, (dy * normal).sum(others), dy.sum(others)
        return gradients[:2] if self.spec.base == "rms" else gradients

    @property
    def needs_other(self) -> bool:
        """Whether the operation has a second array of x's shape."""
        return self.spec.mode in ("residual", "backward", "step")

    def arguments(self, convert: Any) -> list[Any]:
        """Return x, the other array or None, weight, bias, mean and variance, converted."""
        other = convert(self.other) if self.needs_other else None
        return [convert(self.x), other, *map(convert, (self.weight, self.bias, self.mean, self.var))]

    def reference(self) -> Any:
        """Return the result in float64."""
        return self.formula(np, *self.arguments(lambda a: a.astype(np.float64)))

    def saved(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the statistics that backward starts from, in float64, shaped as torch's native functions do it."""
        x = self._view(self.x.astype(np.float64))
        keep = self.spec.base == "layer"
        return x.mean(self.axes, keepdims=keep), 1 / np.sqrt(x.var(self.axes, keepdims=keep) + EPS)
