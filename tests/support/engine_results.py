"""Results of calls that several threads share: every kernel that claims units of work takes part in one of them.

Run as a program, with ``NUMBANORM_THREADS`` in its environment: it prints what `on_threads` returns, as JSON.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import sharing
from registered import SCALE, registered

import numbanorm as nn
import numbanorm.cpu
from numbanorm.cpu import board, helpers
from numbanorm.cpu.bound import Bound
from numbanorm.cpu.jit import Kernel
from numbanorm.cpu.profile import profile

ROWS, WIDTH = 2100, 1024
SIZE = ROWS * WIDTH
HALF = np.dtype(ml_dtypes.bfloat16)


class _Data:
    """One input, one gradient and one mask, in the shapes that are asked for."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._x, self._dy = rng.standard_normal((2, SIZE), np.float32)
        self._x += 0.5
        self._mask = rng.random(SIZE) < 0.7

    def x(self, *shape: int, dtype: Any = np.float32) -> np.ndarray:
        return self._x.reshape(shape).astype(dtype, copy=False)

    def dy(self, x: np.ndarray) -> np.ndarray:
        return self._dy.reshape(x.shape).astype(x.dtype, copy=False)

    def mask(self, x: np.ndarray) -> np.ndarray:
        return self._mask.reshape(x.shape)


def _parameters(size: int, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    weight, bias = np.random.default_rng(size).standard_normal((2, size)).astype(dtype)
    return weight, bias


def _both(norm: str, of: _Data, x: np.ndarray, size: int, masked: bool, **options: Any) -> Iterator[np.ndarray]:
    """Give results and gradients of a norm."""
    weight, bias = _parameters(size)
    own = {"mask": of.mask(x)} if masked else {}
    biased = {"bias": bias} if norm != "l2" else {}
    y, *stats = nn.normalize(norm, x, weight=weight, return_stats=True, **biased, **options, **own)
    yield from (y, *stats)
    options.pop("eps", None)
    yield from nn.normalize_backward(norm, of.dy(x), x, *(None, *stats)[-2:], weight, **options, **own)


def _layer(of: _Data, *shape: int, masked: bool = False, dtype: Any = np.float32) -> Iterator[np.ndarray]:
    return _both("layer", of, of.x(*shape, dtype=dtype), shape[-1], masked, normalized_shape=shape[-1])


def _channels(norm: str, of: _Data, *shape: int, axis: int = 1, masked: bool = False, **own: Any) -> Any:
    return _both(norm, of, of.x(*shape), shape[axis], masked, channel_axis=axis, **own)


def _residual(of: _Data, *shape: int) -> Iterator[np.ndarray]:
    x = of.x(*shape)
    yield from nn.layer_norm(x, shape[-1], *_parameters(shape[-1]), residual=of.dy(x), return_stats=True)


def _inference(of: _Data, *shape: int, axis: int = 1, dtype: Any = np.float32) -> Iterator[np.ndarray]:
    x = of.x(*shape, dtype=dtype)
    weight, bias = _parameters(shape[axis])
    mean, var = bias * np.float32(0.3), weight**2 + 1
    y, mean, rstd = nn.batch_norm(x, mean, var, weight, bias, channel_axis=axis, return_stats=True)
    yield y
    yield from nn.batch_norm_backward(of.dy(x), x, mean, rstd, weight, training=False, channel_axis=axis)


def _running(of: _Data, *shape: int, axis: int = 1) -> Iterator[np.ndarray]:
    mean, var = np.zeros(shape[axis], np.float32), np.ones(shape[axis])
    yield nn.batch_norm(of.x(*shape), mean, var, training=True, channel_axis=axis)
    yield from (mean, var)


def _l2(of: _Data, *shape: int) -> Iterator[np.ndarray]:
    """An eps that is larger than the norms of half of the rows."""
    x = of.x(*shape)
    eps = float(np.median(np.linalg.norm(x, axis=-1)))
    return _both("l2", of, x, shape[-1], False, normalized_shape=shape[-1], eps=eps)


def _scale(of: _Data, *shape: int) -> Iterator[np.ndarray]:
    """One weight for all elements, and groups that lie between each other."""
    x = of.x(*shape).astype(np.float64)
    own = {"normalized_shape": (shape[0], shape[2]), "axis": (0, 2)}
    y, rstd = nn.normalize(SCALE.kind, x, weight=np.array(1.5), return_stats=True, **own)
    yield from (y, *nn.normalize_backward(SCALE.kind, of.dy(x), x, None, rstd, np.array(1.5), **own))


def _moments(of: _Data, *shape: int, axis: int | None = None) -> Iterator[np.ndarray]:
    found = nn.Moments.of(of.x(*shape), axis)
    yield from (np.asarray(found.mean), np.asarray(found.var()))


CASES: dict[str, Callable[[_Data], Iterator[np.ndarray]]] = {
    "rows": lambda of: _layer(of, ROWS, WIDTH),
    "rows of bfloat16": lambda of: _layer(of, ROWS, WIDTH, dtype=HALF),
    "rows of float64": lambda of: _layer(of, ROWS * 2, WIDTH // 2, dtype=np.float64),
    "narrow rows": lambda of: _layer(of, SIZE // 50, 50),
    "masked rows": lambda of: _layer(of, ROWS, WIDTH, masked=True),
    "long rows": lambda of: _layer(of, 70, SIZE // 70),
    "one row": lambda of: _layer(of, 1, SIZE),
    "one masked row": lambda of: _layer(of, 1, SIZE, masked=True),
    "rows with a residual": lambda of: _residual(of, ROWS, WIDTH),
    "one row with a residual": lambda of: _residual(of, 1, SIZE),
    "rows by their length": lambda of: _l2(of, ROWS, WIDTH),
    "groups": lambda of: _channels("group", of, 7, 64, 75, 64, num_groups=8),
    "samples": lambda of: _channels("instance", of, 7, 64, 75, 64),
    "channels": lambda of: _channels("batch", of, 7, 64, 75, 64, use_input_stats=True),
    "masked channels": lambda of: _channels("batch", of, 7, 64, 75, 64, masked=True),
    "one channel": lambda of: _channels("batch", of, 7, 1, 4800, 64),
    "one weight": lambda of: _scale(of, 7, 6400, 48),
    "columns": lambda of: _channels("batch", of, ROWS, WIDTH),
    "few columns": lambda of: _channels("batch", of, SIZE // 64, 64),
    "masked columns": lambda of: _channels("batch", of, SIZE // 64, 64, masked=True),
    "columns of samples": lambda of: _channels("instance", of, 7, 4800, 64, axis=-1),
    "columns of groups": lambda of: _channels("group", of, 7, 4800, 64, axis=-1, num_groups=8),
    "weights of rows": lambda of: _both("layer", of, of.x(7, 300, WIDTH), 300, False, normalized_shape=300, axis=1),
    "inference": lambda of: _inference(of, 7, 64, 75, 64),
    "inference of short runs": lambda of: _inference(of, 7, 6400, 48),
    "inference of columns": lambda of: _inference(of, ROWS, WIDTH),
    "running statistics": lambda of: _running(of, 7, 64, 75, 64),
    "running statistics of columns": lambda of: _running(of, SIZE // 64, 64),
    "moments": lambda of: _moments(of, ROWS, WIDTH),
    "moments of columns": lambda of: _moments(of, ROWS, WIDTH, axis=0),
}
"""Calls on more elements than the profile's `share_from`."""


def sharing_kernels() -> set[str]:
    """Return the names of all kernels that claim units of work."""
    found = set()
    for info in pkgutil.walk_packages(numbanorm.cpu.__path__, "numbanorm.cpu."):
        for value in vars(import_module(info.name)).values():
            if isinstance(value, Kernel) and [*inspect.signature(value._function).parameters][:2] == ["job", "workers"]:
                found.add(value.name)
    return found


@contextmanager
def _watched() -> Iterator[tuple[set[str], list[int]]]:
    """Tell which kernels run on several threads, and how many batches of units helpers did; give them time to."""
    shared: set[str] = set()
    helped: list[int] = []
    launch, own = Bound.on, helpers.compiled()

    def on(bound: Bound, threads: int, *arguments: Any) -> Any:
        problem = launch(bound, threads, *arguments)
        if threads > 1:
            shared.add(bound.name)
            helped.append(int(helpers.helpers().board[board.TICKET]) >> board.COUNT_BITS & board.COUNT)
        return problem

    def nap(board: Any, number: int) -> None:
        own.wake(board, number)
        time.sleep(0.001)

    with (
        mock.patch.object(Bound, "on", on),
        mock.patch.object(helpers, "compiled", return_value=own._replace(wake=nap)),
        mock.patch.object(helpers, "LOOKS", 1 << 22),
    ):
        yield shared, helped


def on_threads(threads: int) -> dict[str, Any]:
    """Return digests of the results of each call, which kernels ran on several threads, and what helpers did."""
    assert profile().numba_from <= SIZE
    sharing.always()
    nn.set_num_threads(threads)
    of = _Data()
    digests = {}
    with registered(SCALE), _watched() as (shared, helped):
        for name, call in CASES.items():
            results = list(call(of))
            assert all(np.isfinite(result.astype(np.float64)).all() for result in results), name
            digests[name] = [hashlib.sha256(result.tobytes()).hexdigest() for result in results]
    return {"digests": digests, "shared": sorted(shared), "helped": sum(helped)}


if __name__ == "__main__":
    json.dump(on_threads(int(sys.argv[1])), sys.stdout)
