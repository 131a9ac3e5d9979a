"""Small NumPy programs with norms in them: what a norm costs where it is used, by default and on one thread.

A kernel in a loop has the cores to itself. In a program the threads of NumPy's products still hold them, and what the
norm writes is read by the core that goes on. So each program is run with numbanorm's default threads and with one; all
else in it is the same. `peers.py` puts the ratios into its table, `bench_threads` follows them from commit to commit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import numba
import numpy as np

import numbanorm as nn

EPS = 1e-5
TOLERANCE = 1e-4
"""Largest difference from the same program with norms in float64, as a share of the scale."""

SETTLE_SECONDS = 0.004
"""How long the threads of what ran before may spin on the cores: a run takes that long before its time counts."""

TURN_SECONDS = 0.01
WAYS = ("default", "one", "without")
Program = Callable[[], np.ndarray]


class Norms(NamedTuple):
    """The norms that a program calls: ``layer(x, weight, bias)``, ``batch(x, mean, var, weight, bias)``."""

    layer: Callable[..., np.ndarray]
    batch: Callable[..., np.ndarray]


def _layer_exactly(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    normal = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + EPS)
    y: np.ndarray = (normal * weight + bias).astype(x.dtype)
    return y


def _batch_exactly(x: np.ndarray, *given: np.ndarray) -> np.ndarray:
    mean, var, weight, bias = (a.astype(np.float64).reshape(1, -1, 1, 1) for a in given)
    y: np.ndarray = ((x - mean) / np.sqrt(var + EPS) * weight + bias).astype(x.dtype)
    return y


OURS = Norms(
    lambda x, weight, bias: nn.layer_norm(x, x.shape[-1], weight, bias, EPS),
    lambda x, mean, var, weight, bias: nn.batch_norm(x, mean, var, weight, bias, eps=EPS),
)
EXACT = Norms(_layer_exactly, _batch_exactly)
WITHOUT = Norms(lambda x, *_: x, lambda x, *_: x)


class Draw:
    """Float32 arrays of random numbers, the same for every instance."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return self._random.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    def weight(self, size: int) -> np.ndarray:
        return (1 + self.normal(size, scale=0.1)).astype(np.float32)


def product(norms: Norms, rows: int) -> Program:
    """``layer_norm(x @ W)``, 1024 features."""
    draw = Draw()
    x, w = draw.normal(rows, 1024), draw.normal(1024, 1024, scale=1 / 32)
    weight, bias = draw.weight(1024), draw.normal(1024)
    return lambda: norms.layer(x @ w, weight, bias)


def elementwise(norms: Norms, rows: int) -> Program:
    """``maximum(layer_norm(x + r), 0)``, 1024 features."""
    draw = Draw()
    x, r, weight, bias = draw.normal(rows, 1024), draw.normal(rows, 1024), draw.weight(1024), draw.normal(1024)
    return lambda: np.maximum(norms.layer(np.add(x, r), weight, bias), 0)


def alone(norms: Norms, rows: int) -> Program:
    """One layer norm, 1024 features."""
    draw = Draw()
    x, weight, bias = draw.normal(rows, 1024), draw.weight(1024), draw.normal(1024)
    return lambda: norms.layer(x, weight, bias)


def transformer(norms: Norms, samples: int) -> Program:
    """A layer of MiniLM: 128 tokens a sample, 384 features, 12 heads, each norm after the addition."""
    tokens, width, heads = 128, 384, 12
    draw, depth = Draw(), width // heads
    x = draw.normal(samples, tokens, width)
    qkv, out = draw.normal(width, 3 * width, scale=width**-0.5), draw.normal(width, width, scale=width**-0.5)
    up = draw.normal(width, 4 * width, scale=width**-0.5)
    down = draw.normal(4 * width, width, scale=(4 * width) ** -0.5)
    first, second = [(draw.weight(width), draw.normal(width, scale=0.1)) for _ in range(2)]

    def run() -> np.ndarray:
        q, k, v = np.moveaxis((x @ qkv).reshape(samples, tokens, 3, heads, depth), 2, 0).swapaxes(2, 3)
        scores = q @ k.swapaxes(-1, -2) * np.float32(depth**-0.5)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        mixed = (scores @ v).swapaxes(1, 2).reshape(samples, tokens, width)
        h = norms.layer(x + mixed @ out, *first)
        inner = h @ up
        inner *= 1 / (1 + np.exp(np.float32(-1.702) * inner))  # GELU, nearly
        return norms.layer(h + inner @ down, *second)

    return run


def residual_block(norms: Norms, samples: int) -> Program:
    """A block of ResNet: 64 channels, 28 x 28, two convolutions by products, batch norm with running statistics."""
    channels, side = 64, 28
    draw = Draw()
    x = draw.normal(samples, channels, side, side)
    kernels = [draw.normal(channels, channels * 9, scale=(channels * 9) ** -0.5) for _ in range(2)]
    vectors = [
        (draw.normal(channels, scale=0.1), draw.weight(channels), draw.weight(channels), draw.normal(channels))
        for _ in range(2)
    ]

    def convolution(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        columns = windows.transpose(0, 1, 4, 5, 2, 3).reshape(samples, channels * 9, side * side)
        return (kernel @ columns).reshape(x.shape)

    def run() -> np.ndarray:
        h = np.maximum(norms.batch(convolution(x, kernels[0]), *vectors[0]), 0)
        return np.maximum(norms.batch(convolution(h, kernels[1]), *vectors[1]) + x, 0)

    return run


@dataclass(frozen=True)
class Case:
    """A program, its size, and how long the process sleeps before each run."""

    program: Callable[[Norms, int], Program]
    size: int
    asleep: float = 0.0


PROGRAMS = {
    **{f"product; layer norm {rows}x1024": Case(product, rows) for rows in (64, 256, 1024, 4096)},
    **{f"add; layer norm; maximum {rows}x1024": Case(elementwise, rows) for rows in (256, 4096)},
    "transformer layer 8x128x384": Case(transformer, 8),
    "residual block 8x64x28x28": Case(residual_block, 8),
    **{f"layer norm {rows}x1024 after 20 ms asleep": Case(alone, rows, 0.02) for rows in (256, 4096)},
}


def default_threads() -> int:
    """Return how many threads numbanorm uses where nobody has asked for fewer."""
    return int(numba.config.NUMBA_NUM_THREADS)


def compare(name: str, seconds: float = 4.0, most: int = 50) -> dict[str, Any]:
    """Run a program by default, on one thread, and without its norms, in turns.

    Parameters
    ----------
    name : str
        One of `PROGRAMS`.
    seconds : float, optional
        How long; at least five turns are made.
    most : int, optional
        Turns at most.

    Returns
    -------
    dict
        "seconds" of a run by `WAYS`, medians; "ratio": the median over the turns of default over one; "quartiles" of
        the same; "turns".
    """
    case, threads = PROGRAMS[name], default_threads()
    ours, without = case.program(OURS, case.size), case.program(WITHOUT, case.size)
    runs = {"default": (threads, ours), "one": (1, ours), "without": (threads, without)}
    if case.asleep:
        del runs["without"]  # nothing is left
    before = nn.get_num_threads()
    try:
        _check(name, case.program(EXACT, case.size)(), ours, {way: runs[way][0] for way in ("default", "one")})
        times = _interleaved(runs, case.asleep, seconds, most)
    finally:
        nn.set_num_threads(before)
    ratios = [ours / one for ours, one in zip(times["default"], times["one"], strict=True)]
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    medians = {way: statistics.median(found) for way, found in times.items()}
    return {"program": name, "seconds": medians, "ratio": middle, "quartiles": [low, high], "turns": len(ratios)}


def _check(name: str, exact: np.ndarray, ours: Program, threads: dict[str, int]) -> None:
    results = []
    for n in threads.values():
        nn.set_num_threads(n)
        results.append(ours())
    error = float(np.abs(results[0] - exact).max() / np.abs(exact).max())
    if not error <= TOLERANCE:
        raise ValueError(f"{name}: the result is off by {error:.1e} of its scale, allowed are {TOLERANCE:.0e}")
    if not np.allclose(*results, rtol=0, atol=TOLERANCE * float(np.abs(exact).max())):
        raise ValueError(f"{name}: the result on {threads['default']} threads is not that on one")


def _interleaved(
    runs: dict[str, tuple[int, Program]], asleep: float, seconds: float, most: int
) -> dict[str, list[float]]:
    """Return seconds of a run, by way and turn; the ways come in another order in every turn."""
    order, shuffle = list(runs), np.random.default_rng(0).shuffle
    times: dict[str, list[float]] = {way: [] for way in runs}
    end = time.perf_counter() + seconds
    while len(times["one"]) < 5 or (len(times["one"]) < most and time.perf_counter() < end):
        shuffle(order)
        for way in order:
            threads, run = runs[way]
            nn.set_num_threads(threads)
            times[way].append(_once_awake(run, asleep) if asleep else _settled(run))
    return times


def _settled(run: Program) -> float:
    """Return the mean time of a run, after some that do not count."""
    start, loops = time.perf_counter(), 0
    while not loops or time.perf_counter() - start < SETTLE_SECONDS:
        run()
        loops += 1
    once = (time.perf_counter() - start) / loops
    loops = max(1, round(TURN_SECONDS / once))
    start = time.perf_counter()
    for _ in repeat(None, loops):
        run()
    return (time.perf_counter() - start) / loops


def _once_awake(run: Program, asleep: float) -> float:
    time.sleep(asleep)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
