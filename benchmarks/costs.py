"""Small calls with one option each, in cache: what the option costs over the plain call.

`peers.py` makes a table of the differences; `bench_latency.Options` follows each call from commit to commit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import repeat
from typing import Any

import numpy as np

import numbanorm as nn

EPS = 1e-5
PLAIN = "plain"
TURN_SECONDS = 0.002
_TRACKED = (("", ""), ("layer, ", ""), ("", ", mask"))
_VIEWS = ("channels last", "sliced", "Fortran")
_BOTH = ("mask", "out=", "sliced out=", *_VIEWS, "float16 weights", "float16 x and weights")
SHAPES = {"LayerNorm 32x768": (32, 768), "BatchNorm 32x256": (32, 256)}
OPTIONS = {
    "LayerNorm 32x768": (PLAIN, "layer", *_BOTH),
    "BatchNorm 32x256": (PLAIN, *(f"{start}running statistics{end}" for start, end in _TRACKED), *_BOTH),
}
"""By norm; batch norm is in training."""

Call = Callable[[], Any]


def call_of(norm: str, option: str) -> Call:
    """Return a call on one thread, after a look at its first result.

    Raises
    ------
    NotImplementedError
        If this commit refuses the option.
    """
    shape = SHAPES[norm]
    random = np.random.default_rng(0)
    values = random.standard_normal(shape, dtype=np.float32) + np.float32(3)
    weight, bias = (random.standard_normal(shape[1]).astype(np.float32) for _ in "wb")
    if "float16" in option:
        weight, bias = weight.astype(np.float16), bias.astype(np.float16)
    if option == "float16 x and weights":
        values = values.astype(np.float16)
    batch = norm.startswith("BatchNorm")
    given: dict[str, Any] = {"weight": weight, "bias": bias}
    counts = None
    if "mask" in option:
        counts = random.random((shape[0], 1) if batch else shape) < 0.8
        given["mask"] = counts
    x = _placed(values, option)
    if option.endswith("out="):
        given["out"] = _placed(values, option.removesuffix(" out="))
    running = (np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32))
    if option.startswith("layer"):
        call, running = _layer_call(batch, x, weight, bias)
    elif batch:
        means = running if "running statistics" in option else (None, None)
        call = lambda: nn.batch_norm(x, *means, training=True, eps=EPS, **given)  # noqa: E731
    else:
        if x.ndim == 4:
            given["axis"] = 1
        call = lambda: nn.layer_norm(x, shape[1], eps=EPS, **given)  # noqa: E731
    try:
        y = call()
    except TypeError as error:
        raise NotImplementedError(f"this commit refuses {option}: {error}") from error
    found = y.transpose(0, 2, 3, 1).reshape(shape) if y.ndim == 4 else y
    exact, mean = _exactly(values, weight, bias, counts, batch)
    _agree(norm, option, found, exact, 4e-3 if y.dtype == np.float16 else 1e-5)
    if "running statistics" in option:
        _agree(norm, option, running[0], 0.1 * mean, 1e-5)
    return call


def _placed(values: np.ndarray, option: str) -> np.ndarray:
    """Return the values in memory of their own, as the option wants it."""
    rows, width = values.shape
    match option:
        case "channels last":
            return values.reshape(rows // 4, 2, 2, width).copy().transpose(0, 3, 1, 2)
        case "sliced":
            return np.tile(values, 3)[:, width : 2 * width]
        case "Fortran":
            return values.copy(order="F")
        case _:
            return values.copy()


def _layer_call(batch: bool, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> tuple[Call, Any]:
    norm = nn.BatchNorm(x.shape[1], EPS) if batch else nn.LayerNorm(x.shape[1], EPS).eval()
    norm.weight[...], norm.bias[...] = weight, bias
    return lambda: norm(x), (norm.running_mean, norm.running_var)


def _exactly(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, counts: Any, batch: bool) -> tuple[Any, Any]:
    """Return the result and the means in float64."""
    wide, axis = x.astype(np.float64), 0 if batch else 1
    where = {} if counts is None else {"where": counts}
    mean, var = (f(axis, keepdims=True, **where) for f in (wide.mean, wide.var))
    return (wide - mean) / np.sqrt(var + EPS) * weight + bias, mean.reshape(-1)


def _agree(norm: str, option: str, found: np.ndarray, exact: np.ndarray, allowed: float) -> None:
    error = np.abs(found.astype(np.float64) - exact).max() / np.abs(exact).max()
    if not error <= allowed:
        raise ValueError(f"{norm}, {option}: the result is off by {error:.1e} of its scale, allowed are {allowed:.0e}")


def measure(norm: str, seconds: float = 1.0) -> list[dict[str, Any]]:
    """Measure every option of a norm in turns with the plain call; the caller has set one thread.

    Parameters
    ----------
    norm : str
        One of `OPTIONS`.
    seconds : float, optional
        How long for each option; at least five turns are made.

    Returns
    -------
    list of dict
        "norm", "option", "seconds" of the call, and "extra": the median of the differences from the plain call in the
        same turn; or "missing", why there is none.
    """
    calls: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {option: {"norm": norm, "option": option} for option in OPTIONS[norm]}
    for option in rows:
        try:
            calls[option] = call_of(norm, option)
        except NotImplementedError as error:
            rows[option]["missing"] = str(error)
    loops = {option: _loops(call) for option, call in calls.items()}
    times: dict[str, list[float]] = {option: [] for option in calls}
    order, shuffle = list(calls), np.random.default_rng(0).shuffle
    end = time.perf_counter() + seconds * len(calls)
    while len(times[PLAIN]) < 5 or (len(times[PLAIN]) < 200 and time.perf_counter() < end):
        shuffle(order)
        for option in order:
            times[option].append(_seconds(calls[option], loops[option]))
    for option, found in times.items():
        rows[option]["seconds"] = float(np.median(found))
        rows[option]["extra"] = float(np.median(np.subtract(found, times[PLAIN])))
    return list(rows.values())


def _loops(call: Call) -> int:
    once = min(_seconds(call, 1) for _ in range(5))
    return max(1, round(TURN_SECONDS / once))


def _seconds(call: Call, loops: int) -> float:
    start = time.perf_counter()
    for _ in repeat(None, loops):
        call()
    return (time.perf_counter() - start) / loops
