"""Cells of the comparison with peers: an operation on one array, and how each library's own users call it.

Every candidate returns its result as something `numpy.asarray` reads. Libraries that are not installed, or that lack
an operation or a dtype, have no candidate in a cell.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

import numpy as np

import numbanorm as nn

try:
    import torch
except ImportError:
    torch = None
try:
    import onnx
    import onnxruntime
except ImportError:
    onnxruntime = None
try:
    import jax
except ImportError:
    jax = None
try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None

EPS = 1e-5
Call = Callable[[], Any]


@dataclass
class Cell:
    """One row of the table.

    Attributes
    ----------
    operation, shape, dtype, last
        What is computed on which array; `last`: channels last in memory, in the shape of channels first.
    candidates : dict of str to callable
        "numbanorm" and its peers, each with a fresh output.
    reused : dict of str to callable
        The same with an output that is there already.
    copy : callable
        `numpy.copyto` of the same bytes: one of x for each array read or written.
    reference : callable
        The result in float64.
    """

    operation: str
    shape: tuple[int, ...]
    dtype: str
    last: bool
    candidates: dict[str, Call] = field(default_factory=dict)
    reused: dict[str, Call] = field(default_factory=dict)
    copy: Call = lambda: None
    reference: Call = lambda: None

    @property
    def name(self) -> str:
        """Readable: operation, shape, dtype and order."""
        return f"{self.operation} {'x'.join(map(str, self.shape))} {self.dtype}{', channels last' if self.last else ''}"


_ROWS = [(1, 768), (8, 768), (128, 768), (512, 1024), (4096, 1024), (16384, 4096), (8, 1 << 20), (65536, 64)]
_IMAGES = [
    (4, 32, 28, 28),
    (32, 64, 56, 56),
    (32, 3, 224, 224),
    (8, 2048, 7, 7),
    (64, 256, 56, 56),
]
_TABLES = [(4096, 256), (65536, 64)]

GRID: dict[str, list[tuple[int, ...]]] = {
    "layer": _ROWS,
    "rms": _ROWS,
    "residual + rms": [(1, 768), (8, 768), (128, 768), (4096, 1024), (16384, 4096)],
    "batch training": _IMAGES + _TABLES,
    "batch eval": _IMAGES + _TABLES,
    "instance": [(4, 32, 28, 28), (32, 64, 56, 56), (32, 3, 224, 224)],
    "group": [(4, 32, 28, 28), (32, 64, 56, 56), (8, 2048, 7, 7), (64, 256, 56, 56)],
    "layer backward": [(8, 768), (128, 768), (4096, 1024), (16384, 4096), (65536, 64)],
    "batch backward": [(4, 32, 28, 28), (32, 64, 56, 56), (4096, 256)],
    "group backward": [(4, 32, 28, 28), (32, 64, 56, 56)],
}
"""Shapes by operation, in float32: one token to 256 MB, few huge rows, many tiny ones, narrow and wide channels."""

OTHER_DTYPES: dict[str, list[tuple[int, ...]]] = {
    "layer": [(8, 768), (128, 768), (16384, 4096)],
    "rms": [(128, 768), (16384, 4096)],
    "batch training": [(32, 64, 56, 56)],
    "batch eval": [(32, 64, 56, 56)],
    "group": [(32, 64, 56, 56)],
    "instance": [(32, 64, 56, 56)],
    "layer backward": [(4096, 1024)],
}
"""Shapes by operation, in bfloat16 and float64."""


def cells(wanted: re.Pattern[str]) -> Iterator[Cell]:
    """Yield the cells in whose names `wanted` is found, each with its data."""
    for dtype, grid in {"float32": GRID, "bfloat16": OTHER_DTYPES, "float64": OTHER_DTYPES}.items():
        for operation, shapes in grid.items():
            for shape in shapes:
                for last in (False, True) if len(shape) == 4 and grid is GRID else (False,):
                    if wanted.search(Cell(operation, shape, dtype, last).name):
                        yield _Maker(operation, shape, dtype, last).cell


class _Maker:
    """The arrays of a cell, and its candidates over them."""

    def __init__(self, operation: str, shape: tuple[int, ...], dtype: str, last: bool) -> None:
        rng = np.random.default_rng(0)
        kind = np.dtype(bfloat16 if dtype == "bfloat16" else dtype)
        base, _, self.direction = operation.partition(" ")
        if base == "residual":
            base, self.direction = "rms", "residual"
        self.base = base
        self.rows = base in ("layer", "rms")
        self.width = shape[1]
        self.groups = 8

        def fill(size: tuple[int, ...], offset: float) -> np.ndarray:
            values = (rng.standard_normal(size, dtype=np.float32) + np.float32(offset)).astype(kind)
            return np.ascontiguousarray(np.moveaxis(values, 1, -1)).transpose(0, 3, 1, 2) if last else values

        self.x = fill(shape, 3.0)
        self.other = fill(shape, 0.0)  # the residual, or the gradient of the output
        self.y = np.empty_like(self.x)
        self.total = np.empty_like(self.x)
        self.weight = rng.standard_normal(self.width).astype(kind)
        self.bias = rng.standard_normal(self.width).astype(kind)
        self.mean = rng.standard_normal(self.width).astype(kind)
        self.var = (1.0 + rng.random(self.width)).astype(kind)
        self.cell = Cell(operation, shape, dtype, last)
        backward = self.direction == "backward"
        if backward:
            self._save_statistics()
        self.cell.reference = self._reference
        self.cell.copy = lambda: np.copyto(self.y, self.x)
        self._numbanorm()
        if dtype != "bfloat16":
            self._numpy()
        if torch is not None:
            self._torch()
        if onnxruntime is not None and dtype == "float32" and not last and not backward:
            self._onnxruntime()
        if jax is not None and dtype != "float64":
            self._jax()

    # --- float64, and NumPy as its users write it

    @property
    def lead(self) -> tuple[int, ...]:
        return (-1,) if self.rows else (-1,) + (1,) * (self.x.ndim - 2)

    @property
    def axes(self) -> tuple[int, ...]:
        spatial = tuple(range(2, self.x.ndim))
        return {"batch": (0, *spatial), "instance": spatial}.get(self.base, (-1,))

    def _normalized(self, xp: Any, x: Any) -> Any:
        """x without mean and over its standard deviation, in the view of the groups."""
        if self.base == "rms":
            return x / xp.sqrt((x * x).mean(-1, keepdims=True) + EPS)
        return (x - x.mean(self.axes, keepdims=True)) / xp.sqrt(x.var(self.axes, keepdims=True) + EPS)

    def _formula(self, xp: Any, x: Any, other: Any, weight: Any, bias: Any, mean: Any, var: Any) -> Any:
        weight, bias, mean, var = (a.reshape(self.lead) for a in (weight, bias, mean, var))
        if self.direction == "residual":
            x = x + other
        if self.direction == "eval":
            return (x - mean) / xp.sqrt(var + EPS) * weight + bias
        if self.base == "group":
            normal = self._normalized(xp, x.reshape(x.shape[0], self.groups, -1)).reshape(x.shape)
        else:
            normal = self._normalized(xp, x)
        return normal * weight if self.base == "rms" else normal * weight + bias

    def _formula_backward(self, xp: Any, x: Any, dy: Any, weight: Any, *_: Any) -> Any:
        scaled = dy * weight.reshape(self.lead)
        if self.base == "group":
            view = (x.shape[0], self.groups, -1)
            x, scaled = x.reshape(view), scaled.reshape(view)
        normal = self._normalized(xp, x)
        rstd = 1 / xp.sqrt(x.var(self.axes, keepdims=True) + EPS)
        inner = scaled - scaled.mean(self.axes, keepdims=True)
        dx = (inner - normal * (scaled * normal).mean(self.axes, keepdims=True)) * rstd
        dx, normal = dx.reshape(dy.shape), normal.reshape(dy.shape)
        others = tuple(a for a in range(dy.ndim) if a != (1 if not self.rows else dy.ndim - 1))
        return dx, (dy * normal).sum(others), dy.sum(others)

    def _arguments(self, convert: Callable[[np.ndarray], Any]) -> list[Any]:
        return [convert(a) for a in (self.x, self.other, self.weight, self.bias, self.mean, self.var)]

    def _reference(self) -> Any:
        arguments = self._arguments(lambda a: a.astype(np.float64))
        return (self._formula_backward if self.direction == "backward" else self._formula)(np, *arguments)

    def _numpy(self) -> None:
        arguments = self._arguments(lambda a: a)
        formula = self._formula_backward if self.direction == "backward" else self._formula
        self.cell.candidates["NumPy"] = lambda: formula(np, *arguments)

    # --- numbanorm

    def _numbanorm(self) -> None:
        x, other, w, b, shape = self.x, self.other, self.weight, self.bias, self.width
        if self.direction == "backward":
            calls = {
                "layer": lambda: nn.layer_norm_backward(other, x, shape, self.saved_mean, self.saved_rstd, w),
                "batch": lambda: nn.batch_norm_backward(other, x, self.saved_mean, self.saved_rstd, w),
                "group": lambda: nn.group_norm_backward(other, x, 8, self.saved_mean, self.saved_rstd, w),
            }
            self.cell.candidates["numbanorm"] = calls[self.base]
            return

        def run(out: np.ndarray | None = None) -> Any:
            match self.base, self.direction:
                case "layer", _:
                    return nn.layer_norm(x, shape, w, b, EPS, out=out)
                case "rms", "residual":
                    return nn.rms_norm(x, shape, w, EPS, residual=other, out=out)[0]
                case "rms", _:
                    return nn.rms_norm(x, shape, w, EPS, out=out)
                case "batch", "training":
                    return nn.batch_norm(x, None, None, w, b, True, out=out)
                case "batch", _:
                    return nn.batch_norm(x, self.mean, self.var, w, b, out=out)
                case "instance", _:
                    return nn.instance_norm(x, None, None, w, b, out=out)
                case _:
                    return nn.group_norm(x, self.groups, w, b, out=out)

        self.cell.candidates["numbanorm"] = run
        self.cell.reused["numbanorm"] = lambda: run(self.y)

    def _save_statistics(self) -> None:
        """Take the statistics that backward starts from, in float64, shaped as torch's native functions shape them."""
        x = self.x.astype(np.float64)
        if self.base == "group":
            x = x.reshape(x.shape[0], self.groups, -1)
        keep = self.base == "layer"
        self.saved_mean = x.mean(self.axes, keepdims=keep)
        self.saved_rstd = 1 / np.sqrt(x.var(self.axes, keepdims=keep) + EPS)

    # --- torch

    def _torch(self) -> None:
        functional = torch.nn.functional
        names = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
        dtype = names[self.cell.dtype]

        def tensor(a: np.ndarray) -> Any:
            if self.cell.dtype != "bfloat16":
                return torch.from_numpy(a)
            return torch.from_numpy(a.view(np.uint16)).view(torch.bfloat16)

        x, other, w, b, mean, var = self._arguments(tensor)
        shape = (self.width,)
        if self.direction == "backward":
            aten = torch.ops.aten
            m, r = (torch.from_numpy(s).to(dtype) for s in (self.saved_mean, self.saved_rstd))
            n, c, s = x.shape[0], x.shape[1], prod(x.shape[2:])
            every = [True, True, True]
            calls = {
                "layer": lambda: aten.native_layer_norm_backward(other, x, shape, m, r, w, b, every),
                "batch": lambda: aten.native_batch_norm_backward(other, x, w, None, None, m, r, True, EPS, every),
                "group": lambda: aten.native_group_norm_backward(other, x, m, r, w, n, c, s, self.groups, every),
            }
            self.cell.candidates["torch"] = calls[self.base]
            return

        def residual() -> Any:
            return functional.rms_norm(x + other, shape, w, EPS)

        calls = {
            "layer": lambda: functional.layer_norm(x, shape, w, b, EPS),
            "rms": residual if self.direction == "residual" else lambda: functional.rms_norm(x, shape, w, EPS),
            "batch": (lambda: functional.batch_norm(x, None, None, w, b, True))
            if self.direction == "training"
            else (lambda: functional.batch_norm(x, mean, var, w, b)),
            "instance": lambda: functional.instance_norm(x, None, None, w, b),
            "group": lambda: functional.group_norm(x, self.groups, w, b, EPS),
        }
        call = calls[self.base]

        def no_grad() -> Any:
            with torch.inference_mode():
                return call()

        self.cell.candidates["torch"] = no_grad

    # --- onnxruntime

    def _onnxruntime(self) -> None:
        operator = {
            "layer": ("LayerNormalization", ["w", "b"], {"axis": -1, "epsilon": EPS}),
            "rms": ("RMSNormalization", ["w"], {"axis": -1, "epsilon": EPS}),
            "batch": ("BatchNormalization", ["w", "b", "m", "v"], {"epsilon": EPS}),
            "instance": ("InstanceNormalization", ["w", "b"], {"epsilon": EPS}),
            "group": ("GroupNormalization", ["w", "b"], {"num_groups": self.groups, "epsilon": EPS}),
        }[self.base]
        if self.direction == "training":
            return
        session = _session(operator[0], tuple(operator[1]), tuple(operator[2].items()), self.direction == "residual")
        feeds = {"x": self.x, "w": self.weight, "b": self.bias, "m": self.mean, "v": self.var}
        feeds = {name: feeds[name] for name in ("x", *operator[1])}
        if self.direction == "residual":
            feeds["r"] = self.other
        self.cell.candidates["onnxruntime"] = lambda: session.run(["y"], feeds)[0]
        binding = session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        value = onnxruntime.OrtValue.ortvalue_from_numpy(self.y)
        binding.bind_ortvalue_output("y", value)

        def reused() -> Any:
            session.run_with_iobinding(binding)
            return value

        self.cell.reused["onnxruntime"] = reused

    # --- JAX

    def _jax(self) -> None:
        arguments = self._arguments(jax.numpy.asarray)
        formula = self._formula_backward if self.direction == "backward" else self._formula

        def in_float32(*given: Any) -> Any:
            results = formula(jax.numpy, *(a.astype("float32") for a in given))
            return jax.tree.map(lambda r: r.astype(given[0].dtype), results)

        function = jax.jit(in_float32)
        self.cell.candidates["JAX"] = lambda: jax.block_until_ready(function(*arguments))


@cache
def _session(operator: str, inputs: tuple[str, ...], attributes: tuple[tuple[str, Any], ...], residual: bool) -> Any:
    """Return an onnxruntime session of one operator, or of an addition and the operator."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [helper.make_node("Add", ["x", "r"], ["sum"])] if residual else []
    nodes.append(helper.make_node(operator, ["sum" if residual else "x", *inputs], ["y"], **dict(attributes)))
    names = ["x", *(["r"] if residual else []), *inputs]
    graph = helper.make_graph(
        nodes,
        operator,
        [helper.make_tensor_value_info(name, kind, None) for name in names],
        [helper.make_tensor_value_info("y", kind, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
