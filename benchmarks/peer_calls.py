"""How the users of each library call an operation: one function for each library adds its calls to a cell.

Libraries that are not installed, or that lack an operation or a dtype, add nothing. Every call returns something that
`numpy.asarray` reads, or a tuple of such.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from peer_data import EPS, GROUPS, MOMENTUM

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

if TYPE_CHECKING:
    from peer_cells import Cell
    from peer_data import Data

Call = Callable[[], Any]


def add_numbanorm(cell: Cell, data: Data) -> None:
    spec, x, w, b, shape = cell.spec, data.x, data.weight, data.bias, data.width
    if spec.module:
        cell.candidates["numbanorm"] = _layer_call(cell, data)
        return
    if spec.mode == "backward":
        mean, rstd = data.saved()
        dy = data.other
        cell.candidates["numbanorm"] = {
            "layer": lambda: nn.layer_norm_backward(dy, x, shape, mean, rstd, w),
            "batch": lambda: nn.batch_norm_backward(dy, x, mean, rstd, w),
            "group": lambda: nn.group_norm_backward(dy, x, GROUPS, mean, rstd, w),
        }[spec.base]
        return
    running = (data.mean.copy(), data.var.copy()) if spec.tracks else (None, None)
    if spec.tracks:
        cell.beside["numbanorm"] = running
    masked = {} if data.mask is None else {"mask": data.mask}

    def run(out: np.ndarray | None = None) -> Any:
        match spec.base, spec.mode:
            case "layer", _:
                return nn.layer_norm(x, shape, w, b, EPS, out=out, **masked)
            case "rms", "residual":
                return nn.rms_norm(x, shape, w, EPS, residual=data.other, out=out)[0]
            case "rms", _:
                return nn.rms_norm(x, shape, w, EPS, out=out)
            case "batch", "eval":
                return nn.batch_norm(x, data.mean, data.var, w, b, out=out)
            case "batch", _:
                return nn.batch_norm(x, *running, w, b, True, out=out, **masked)
            case "instance", _:
                return nn.instance_norm(x, None, None, w, b, out=out, **masked)
            case _:
                return nn.group_norm(x, GROUPS, w, b, out=out, **masked)

    cell.candidates["numbanorm"] = run
    if not spec.tracks:
        cell.reused["numbanorm"] = lambda: run(data.y)


def _layer_call(cell: Cell, data: Data) -> Call:
    spec, x, width = cell.spec, data.x, data.width
    make = {
        "layer": lambda: nn.LayerNorm(width, EPS),
        "rms": lambda: nn.RMSNorm(width, EPS),
        "batch": lambda: nn.BatchNorm(width, EPS, MOMENTUM),
        "instance": lambda: nn.InstanceNorm(width, EPS, affine=True),
        "group": lambda: nn.GroupNorm(GROUPS, width, EPS),
    }
    norm = make[spec.base]()
    norm.weight[...] = data.weight
    if norm.bias is not None:
        norm.bias[...] = data.bias
    if norm.running_mean is not None:
        norm.running_mean[...], norm.running_var[...] = data.mean, data.var
    if spec.tracks:
        cell.beside["numbanorm"] = norm.running_mean, norm.running_var
    if spec.mode == "eval":
        norm.eval()
    if spec.mode != "step":
        return lambda: norm(x)
    dy, names = data.other, ("weight",) if norm.bias is None else ("weight", "bias")

    def step() -> Any:
        y = norm(x)
        return (y, norm.backward(dy), *[norm.grad[name] for name in names])

    return step


def add_numpy(cell: Cell, data: Data) -> None:
    if cell.spec.dtype != "bfloat16":
        arguments = data.arguments(lambda a: a)
        cell.candidates["NumPy"] = lambda: data.formula(np, *arguments)


def add_torch(cell: Cell, data: Data) -> None:
    if torch is None:
        return
    spec = cell.spec
    x, other, w, b, mean, var = data.arguments(_tensor)
    if spec.module:
        cell.candidates["torch"] = _module_call(cell, data)
        return
    functional, shape = torch.nn.functional, (data.width,)
    if spec.mode == "backward":
        aten = torch.ops.aten
        m, r = (torch.from_numpy(s).to(x.dtype) for s in data.saved())
        n, c, s = x.shape[0], x.shape[1], prod(x.shape[2:])
        every = [True, True, True]
        cell.candidates["torch"] = {
            "layer": lambda: aten.native_layer_norm_backward(other, x, shape, m, r, w, b, every),
            "batch": lambda: aten.native_batch_norm_backward(other, x, w, None, None, m, r, True, EPS, every),
            "group": lambda: aten.native_group_norm_backward(other, x, m, r, w, n, c, s, GROUPS, every),
        }[spec.base]
        return
    if spec.mode == "masked":
        cell.candidates["torch"] = _masked_in_torch(data, x, w, b)
        return
    running = (mean.clone(), var.clone()) if spec.tracks else (None, None)
    if spec.tracks:
        cell.beside["torch"] = running
    calls = {
        "layer": lambda: functional.layer_norm(x, shape, w, b, EPS),
        "rms": lambda: functional.rms_norm(x, shape, w, EPS),
        "rms residual": lambda: functional.rms_norm(x + other, shape, w, EPS),
        "batch": lambda: functional.batch_norm(x, *running, w, b, True),
        "batch eval": lambda: functional.batch_norm(x, mean, var, w, b),
        "instance": lambda: functional.instance_norm(x, None, None, w, b),
        "group": lambda: functional.group_norm(x, GROUPS, w, b, EPS),
    }
    cell.candidates["torch"] = calls.get(f"{spec.base} {spec.mode}", calls[spec.base])


def _tensor(a: np.ndarray) -> Any:
    if a.dtype.name != "bfloat16":
        return torch.from_numpy(a)
    return torch.from_numpy(a.view(np.uint16)).view(torch.bfloat16)


def _masked_in_torch(data: Data, x: Any, w: Any, b: Any) -> Call:
    """Return the few lines that its users write, as torch's norms take no mask."""
    mask, whole = torch.from_numpy(data.mask), x.shape
    w, b = w.reshape(data.lead), b.reshape(data.lead)

    def masked() -> Any:
        v, m = x, mask
        if data.spec.base == "group":
            v, m = (t.reshape(len(x), GROUPS, -1) for t in (x, mask.expand(whole)))
        m = m.expand_as(v)
        count = m.sum(data.axes, keepdim=True)
        centred = v - (v * m).sum(data.axes, keepdim=True) / count
        spread = (centred * centred * m).sum(data.axes, keepdim=True) / count
        return (centred * torch.rsqrt(spread + EPS)).reshape(whole) * w + b

    return masked


def _module_call(cell: Cell, data: Data) -> Call:
    spec, width, modules = cell.spec, data.width, torch.nn
    flat = len(spec.shape) < 4
    make = {
        "layer": lambda: modules.LayerNorm(width, EPS),
        "rms": lambda: modules.RMSNorm(width, EPS),
        "batch": lambda: (modules.BatchNorm1d if flat else modules.BatchNorm2d)(width, EPS, MOMENTUM),
        "instance": lambda: (modules.InstanceNorm1d if flat else modules.InstanceNorm2d)(width, EPS, affine=True),
        "group": lambda: modules.GroupNorm(GROUPS, width, EPS),
    }
    module = make[spec.base]()
    given = {"weight": data.weight, "bias": data.bias, "running_mean": data.mean, "running_var": data.var}
    state = module.state_dict()
    module.load_state_dict(state | {name: torch.from_numpy(given[name].copy()) for name in given if name in state})
    if spec.tracks:
        cell.beside["torch"] = module.running_mean, module.running_var
    module.train(spec.mode != "eval")
    x = torch.from_numpy(data.x)
    if spec.mode != "step":
        return lambda: module(x)
    x.requires_grad_()
    dy, inputs = torch.from_numpy(data.other), (x, *module.parameters())

    def step() -> Any:
        y = module(x)
        return (y, *torch.autograd.grad(y, inputs, dy))

    return step


def add_onnxruntime(cell: Cell, data: Data) -> None:
    spec = cell.spec
    plain = spec.dtype == "float32" and spec.view != "channels last" and not spec.module
    if onnxruntime is None or not plain or spec.mode not in ("", "eval", "residual"):
        return
    operator, names, attributes = {
        "layer": ("LayerNormalization", ("w", "b"), {"axis": -1, "epsilon": EPS}),
        "rms": ("RMSNormalization", ("w",), {"axis": -1, "epsilon": EPS}),
        "batch": ("BatchNormalization", ("w", "b", "m", "v"), {"epsilon": EPS}),
        "instance": ("InstanceNormalization", ("w", "b"), {"epsilon": EPS}),
        "group": ("GroupNormalization", ("w", "b"), {"num_groups": GROUPS, "epsilon": EPS}),
    }[spec.base]
    session = _session(operator, names, tuple(attributes.items()), spec.mode == "residual")
    given = {"x": data.x, "w": data.weight, "b": data.bias, "m": data.mean, "v": data.var}
    feeds = {name: given[name] for name in ("x", *names)}
    if spec.mode == "residual":
        feeds["r"] = data.other
    cell.candidates["onnxruntime"] = lambda: session.run(["y"], feeds)[0]
    if spec.view:
        return  # it copies what is not contiguous, and binds no such array
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    value = onnxruntime.OrtValue.ortvalue_from_numpy(data.y)
    binding.bind_ortvalue_output("y", value)

    def reused() -> Any:
        session.run_with_iobinding(binding)
        return value

    cell.reused["onnxruntime"] = reused


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


def add_jax(cell: Cell, data: Data) -> None:
    """Add the formula, compiled; JAX has no strided arrays: of views it takes part in those channels last, copied."""
    spec = cell.spec
    if jax is None or spec.dtype == "float64" or spec.view not in ("", "channels last"):
        return
    arguments = data.arguments(jax.numpy.asarray)

    def in_float32(*given: Any) -> Any:
        results = data.formula(jax.numpy, *(None if a is None else a.astype("float32") for a in given))
        return jax.tree.map(lambda r: r.astype(given[0].dtype), results)

    function = jax.jit(in_float32)
    cell.candidates["JAX"] = lambda: jax.block_until_ready(function(*arguments))


LIBRARIES: dict[str, Callable[[Cell, Data], None]] = {
    "torch": add_torch,
    "onnxruntime": add_onnxruntime,
    "JAX": add_jax,
    "NumPy": add_numpy,
}
