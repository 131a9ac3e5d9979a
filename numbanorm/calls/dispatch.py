"""Which handler serves an array.

Arrays in host memory are served by `numbanorm.calls.host`. Every other kind has a handler, a module that keeps
`Handler` and is loaded by its name below when the first array of its kind arrives.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..core.kinds import is_dask, on_cuda

HANDLERS = {"cuda": "numbanorm.cuda.handler", "dask": "numbanorm.dask.handler"}
"""Modules that serve arrays which do not lie in host memory, by the kind that `kind_of` tells."""


class Request(NamedTuple):
    """A forward call, as the caller made it: nothing is checked yet.

    Attributes
    ----------
    norm : str
        The norm's name.
    options : tuple
        For a norm by channel ``(channel_axis, num_groups)``, for the others ``(normalized_shape, axis)``.
    x, weight, bias, eps, mask, residual, out
        As the functions take them; `eps` may be None where the norm's record has None.
    running_mean, running_var, momentum
        Running statistics, where the norm may keep them.
    from_input : bool
        False: normalize with the running statistics.
    keep : bool
        Whether the statistics are wanted.
    batches : int, counter or None
        What a layer counts its batches in; None where nothing is counted. Then `momentum` may be None, for the average
        over all batches.
    """

    norm: str
    options: tuple[Any, Any]
    x: Any
    weight: Any
    bias: Any
    eps: Any
    mask: Any = None
    residual: Any = None
    out: Any = None
    running_mean: Any = None
    running_var: Any = None
    momentum: Any = None
    from_input: bool = True
    keep: bool = False
    batches: Any = None


class Outcome(NamedTuple):
    """What came of a forward call.

    Attributes
    ----------
    y : array
        The result, as the caller gets it.
    total : array or None
        The sum of input and residual.
    stats : object
        The statistics as whatever made them keeps them; ``prepared.public(stats)`` gives what users get.
    prepared : object
        What served the call.
    batches : int, counter or None
        The batches counted now.
    """

    y: Any
    total: Any
    stats: Any
    prepared: Any
    batches: Any = None

    def results(self, return_stats: bool) -> Any:
        """Return what the functions return: y, then (mean,) rstd, then the sum with the residual, as asked for."""
        items = [self.y]
        if return_stats:
            items += self.prepared.public(self.stats)
        if self.total is not None:
            items.append(self.total)
        return items[0] if len(items) == 1 else tuple(items)


class Handler(Protocol):
    """What serves the arrays of one kind: a module with these functions."""

    def forward(self, request: Request) -> Outcome:
        """Do a forward call."""

    def backward(
        self,
        norm: str,
        options: tuple[Any, Any],
        dy: Any,
        x: Any,
        mean: Any,
        rstd: Any,
        weight: Any,
        mask: Any,
        fixed: bool,
    ) -> tuple[Any, ...]:
        """Return dx, dweight and, where the norm has a bias, dbias; `fixed`: the statistics do not depend on x."""

    def shape_of(self, x: Any) -> tuple[int, ...]:
        """Return the shape of an input, checked to be one that the kernels take."""

    def add_gradient(self, dx: Any, dtotal: Any, x: Any) -> Any:
        """Return `dx` with the gradient of the sum added, which is checked against the input."""

    def moments(self, x: Any, axis: tuple[int, ...] | None, mask: Any) -> tuple[np.ndarray, ...]:
        """Return (count, mean, M2, low) over some axes, in host memory: the mean is ``mean + low``."""


def kind_of(x: Any) -> str:
    """Return the kind of an input: "host", or a key of `HANDLERS`.

    Raises
    ------
    TypeError
        If it is a CUDA array, and nothing here serves those.
    """
    if type(x) is np.ndarray:
        return "host"
    if on_cuda(x):
        problem = cuda_problem()
        if problem is not None:
            raise TypeError(f"x: expected an array in host memory, got a CUDA array: {problem}")
        return "cuda"
    return "dask" if is_dask(x) else "host"


def handler_of(x: Any, stream: Any = None) -> Any:
    """Return the handler of an input that does not lie in host memory, on a stream if one is named; else None.

    Raises
    ------
    TypeError
        If there is a stream for an array that does not lie on a CUDA device.
    """
    kind = kind_of(x)
    if stream is not None:
        if kind != "cuda":
            raise TypeError(f"stream: expected None for an array in host memory, got {type(stream).__name__}")
        return handler(kind).on_stream(x, stream)
    return None if kind == "host" else handler(kind)


@cache
def handler(kind: str) -> Any:
    """Return the handler of a kind of arrays, imported when it is first needed."""
    return import_module(HANDLERS[kind])


@cache
def cuda_problem() -> str | None:
    """Return why nothing here serves CUDA arrays, and what to do about it; None if they are served."""
    try:
        toolchain = import_module("numbanorm.cuda.toolchain")
    except ImportError as error:
        return str(error)
    reason = toolchain.unavailable_reason()
    return None if reason is None else " ".join(reason.split())
