"""What the benchmarks share: cases named by strings, their exact results in float64, and how time is taken.

asv starts a process for every combination of parameters, and calls `setup` again before every timed call. So `setup`
keeps what it made first, and a timed call is a loop of about 10 ms: asv's own clock around a single call of a
microsecond would read double.

Calls on one thread are timed by the thread's own clock, which stands while another process has the core: on an idle
core it agrees with the wall's, on a shared one the wall's was seen to read three times as much.

Two commits are compared in another unit: a sample is the time of a call in 10 ms of calls, over that of `numpy.copyto`
in the 10 ms that follow. What a neighbour slows down for a minute, it slows down for both.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

import numpy as np

import numbanorm as nn

EPS = 1e-5
GROUPS = 8
SAMPLE_SECONDS = 0.01
IN_COPIES = "NUMBANORM_BENCH_IN_COPIES" in os.environ
"""Whether a `Timed` gives times of `numpy.copyto` of the same array, and not seconds: so asks `suite.py compare`."""

TOLERANCE = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 1e-5, "float64": 1e-10}
"""What tells a wrong result from a rounded one; bench_accuracy is about the rest."""

_FUNCTIONS = {
    "LayerNorm": "layer_norm",
    "RMSNorm": "rms_norm",
    "BatchNorm": "batch_norm",
    "BatchNormEval": "batch_norm",
    "InstanceNorm": "instance_norm",
    "GroupNorm": "group_norm",
}


def need(name: str) -> Callable[..., Any]:
    """Return a public function of the package, or make the benchmark n/a for a commit that has none."""
    if not hasattr(nn, name):
        raise NotImplementedError(f"this commit has no {name}")
    return getattr(nn, name)


def dtype_of(name: str) -> np.dtype[Any]:
    """Return a dtype, or make the benchmark n/a where ml_dtypes, or the commit's support, is missing."""
    if name == "bfloat16":
        try:
            from ml_dtypes import bfloat16
        except ImportError as error:
            raise NotImplementedError("bfloat16 needs ml_dtypes") from error
        try:
            nn.layer_norm(np.ones((1, 2), bfloat16), 2)
        except TypeError as error:
            raise NotImplementedError("this commit takes no bfloat16") from error
        return np.dtype(bfloat16)
    return np.dtype(name)


class Case:
    """One norm on one array, from a string: ``"GroupNorm NHWC 32x56x56x64 float32"``.

    The words are norm, order of memory (the shape is in that order too; without it the norm runs over the last axis),
    shape, dtype. GroupNorm has 8 groups; BatchNormEval is batch norm with running statistics.

    Parameters
    ----------
    name : str
        The words.
    data : str, optional
        ``"unit"``: mean 0, standard deviation 1; ``"offset 1e6"``: mean 1,000,000; ``"std 1e-3"``: mean 1 and a
        variance below eps.
    """

    def __init__(self, name: str, data: str = "unit") -> None:
        norm, *order, shape, dtype = name.split()
        self.norm = norm
        self.dtype_name = dtype
        self.dtype = dtype_of(dtype)
        lengths = tuple(map(int, shape.split("x")))
        self.axis = 1 if order and order[0] != "NHWC" else len(lengths) - 1
        mean, std = {"unit": (0, 1), "offset 1e6": (1e6, 1), "std 1e-3": (1, 1e-3)}[data]
        rng = np.random.default_rng(0)
        x = rng.standard_normal(lengths, dtype=np.float32)
        x *= std
        x += mean
        self.x = x.astype(self.dtype, copy=False)
        size = lengths[self.axis]
        self.weight, self.bias = (rng.uniform(0.5, 1.5, size).astype(self.dtype) for _ in range(2))
        self.running_mean, self.running_var = rng.standard_normal(size) + mean, rng.uniform(0.5, 1.5, size)
        self.forward = need(_FUNCTIONS[norm])
        self.head: tuple[Any, ...] = {"LayerNorm": (size,), "RMSNorm": (size,), "GroupNorm": (GROUPS,)}.get(norm, ())
        self.options = {"axis" if norm in ("LayerNorm", "RMSNorm") else "channel_axis": self.axis}
        self.affine = {"weight": self.weight} if norm == "RMSNorm" else {"weight": self.weight, "bias": self.bias}
        self.mode: dict[str, Any] = {"eps": EPS}
        if norm == "BatchNorm":
            self.mode["training"] = True
        elif norm == "BatchNormEval":
            self.mode |= {"running_mean": self.running_mean, "running_var": self.running_var}

    def call(self, **more: Any) -> Callable[[], Any]:
        """Return the forward call."""
        forward, x, head, options = self.forward, self.x, self.head, self.affine | self.mode | self.options | more
        return lambda: forward(x, *head, **options)

    def backward_call(self, dy: np.ndarray) -> Callable[[], tuple[np.ndarray, ...]]:
        """Return the backward call, after the forward call that gives it its statistics."""
        backward = need(f"{_FUNCTIONS[self.norm]}_backward")
        _, *saved = self.call(return_stats=True)()
        x, head, weight, options = self.x, self.head, self.weight, dict(self.options)
        if self.norm == "BatchNormEval":
            options["training"] = False
        return lambda: backward(dy, x, *head, *saved, weight, **options)

    # --- the same in float64, from the definitions, in two passes

    def _per_weight(self, vector: np.ndarray) -> np.ndarray:
        shape = [1] * self.x.ndim
        shape[self.axis] = -1
        return np.asarray(vector, np.float64).reshape(shape)

    def _averaged(self, values: np.ndarray) -> np.ndarray:
        """Return each element's mean over the elements that share its statistics."""
        a, ndim = self.axis, values.ndim
        if self.norm in ("LayerNorm", "RMSNorm"):
            return values.mean(a, keepdims=True)
        if self.norm == "BatchNorm":
            return values.mean(tuple(i for i in range(ndim) if i != a), keepdims=True)
        groups = GROUPS if self.norm == "GroupNorm" else values.shape[a]
        split = values.reshape(*values.shape[:a], groups, -1, *values.shape[a + 1 :])
        means = split.mean(tuple(i for i in range(1, ndim + 1) if i != a), keepdims=True)
        return np.broadcast_to(means, split.shape).reshape(values.shape)

    def _standardized(self, x: np.ndarray, own: tuple[slice, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Return (h, rstd); `own` picks the channels of `x` out of those of the running statistics."""
        if self.norm == "BatchNormEval":
            mean, var = (self._per_weight(vector)[own] for vector in (self.running_mean, self.running_var))
        else:
            mean = np.zeros(()) if self.norm == "RMSNorm" else self._averaged(x)
            var = self._averaged(np.square(x - mean))
        rstd = 1 / np.sqrt(var + EPS)
        return (x - mean) * rstd, rstd

    def part(self, most: int = 1 << 20) -> tuple[slice, ...]:
        """Return a part of x of about `most` elements that holds all elements of each of its statistics."""
        axis = self.axis if self.norm.startswith("BatchNorm") else 0
        n = self.x.shape[axis]
        return (slice(None),) * axis + (slice(max(1, n * most // self.x.size)),)

    def exact(self, part: tuple[slice, ...]) -> np.ndarray:
        """Return the output of a part of x."""
        own = part if self.norm.startswith("BatchNorm") else ()
        h, _ = self._standardized(self.x[part].astype(np.float64), own)
        y: np.ndarray = h * self._per_weight(self.weight)[own]
        return y if self.norm == "RMSNorm" else y + self._per_weight(self.bias)[own]

    def exact_backward(self, dy: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return dx, dweight and, where there is a bias, dbias."""
        h, rstd = self._standardized(self.x.astype(np.float64))
        wide = dy.astype(np.float64)
        g = wide * self._per_weight(self.weight)
        if self.norm == "BatchNormEval":
            dx = rstd * g
        else:
            centre = 0.0 if self.norm == "RMSNorm" else self._averaged(g)
            dx = rstd * (g - centre - h * self._averaged(g * h))
        others = tuple(i for i in range(dy.ndim) if i != self.axis)
        gradients = dx, (wide * h).sum(others), wide.sum(others)
        return gradients[:2] if self.norm == "RMSNorm" else gradients

    def check(self, y: np.ndarray) -> None:
        """Raise unless `y` is the output."""
        part = self.part()
        assert y.shape == self.x.shape
        assert y.dtype == self.dtype
        self._agree(y[part], self.exact(part))

    def check_backward(self, gradients: tuple[np.ndarray, ...], dy: np.ndarray) -> None:
        """Raise unless these are the gradients."""
        exact = self.exact_backward(dy)
        assert len(gradients) == len(exact)
        for ours, theirs in zip(gradients, exact, strict=True):
            self._agree(ours, theirs)

    def _agree(self, ours: np.ndarray, exact: np.ndarray) -> None:
        found = error(ours, exact)
        limit = TOLERANCE[self.dtype_name]
        assert found <= limit, f"{self.norm}: the result is off by {found:.1e} of its scale, allowed are {limit:.0e}"


def error(ours: np.ndarray, exact: np.ndarray) -> float:
    """Return the largest deviation, over the largest value."""
    return float(np.abs(ours.astype(np.float64) - exact).max() / np.abs(exact).max())


def tracked(unit: str, *, less_is_better: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that gives a track function its unit, and tells the dashboard which way is better."""

    def mark(function: Any) -> Callable[..., Any]:
        function.unit, function.less_is_better = unit, less_is_better
        return function

    return mark


class Prepared:
    """A benchmark whose `setup` works once in a process; subclasses fill in `prepare`."""

    version = "1"
    _prepared: tuple[Any, ...] | None = None

    def setup(self, *params: Any) -> None:
        if self._prepared != params:
            nn.set_num_threads(1)
            self.prepare(*params)
            self._prepared = params

    def prepare(self, *params: Any) -> None:
        raise TypeError(f"{type(self).__name__}: expected a prepare of its own")


class Timed(Prepared):
    """A benchmark in seconds; `prepare` sets `call` and the array that it reads, and `run` loops over it for 10 ms."""

    rounds = 1
    repeat = (5, 30, 0.3)
    warmup_time = 0.02
    call: Callable[[], Any]
    read: np.ndarray
    loops = 1
    elapsed = 0.0

    def setup(self, *params: Any) -> None:
        fresh = self._prepared != params
        super().setup(*params)
        if fresh:
            self.loops = loops_for(self.call)
            if IN_COPIES:
                self.copy = copies(np.empty_like(self.read), self.read)
                self.copy_loops = loops_for(self.copy)

    def timer(self) -> float:
        """Return the clock that asv reads before and after `run`: one call's share of the loop."""
        return self.elapsed if IN_COPIES else time.thread_time() / self.loops

    def run(self) -> None:
        if IN_COPIES:
            self.elapsed += seconds_of(self.call, self.loops) / seconds_of(self.copy, self.copy_loops)
            return
        call = self.call
        for _ in repeat(None, self.loops):
            call()


Clock = Callable[[], float]


def loops_for(call: Callable[[], Any], clock: Clock = time.thread_time) -> int:
    """Return how many calls take about 10 ms; the first call, which may compile, is not counted."""
    call()
    once = min(seconds_of(call, 1, clock) for _ in range(3))
    return max(1, round(SAMPLE_SECONDS / max(once, 1e-7)))


def seconds_of(call: Callable[[], Any], loops: int, clock: Clock = time.thread_time) -> float:
    """Return the mean time of a call."""
    start = clock()
    for _ in repeat(None, loops):
        call()
    return (clock() - start) / loops


def median_seconds(call: Callable[[], Any], turns: int = 9) -> float:
    """Return the median over turns of about 10 ms, for a call on one thread."""
    loops = loops_for(call)
    return statistics.median(seconds_of(call, loops) for _ in range(turns))


def median_ratio(
    ours: Callable[[], Any], theirs: Callable[[], Any], clock: Clock = time.thread_time, turns: int = 9
) -> float:
    """Return the median, over interleaved turns, of our time over theirs; for threads give the wall's clock."""
    our_loops, their_loops = loops_for(ours, clock), loops_for(theirs, clock)
    return statistics.median(
        seconds_of(ours, our_loops, clock) / seconds_of(theirs, their_loops, clock) for _ in range(turns)
    )


def copies(target: np.ndarray, source: np.ndarray, threads: int = 1) -> Callable[[], Any]:
    """Return a call of `numpy.copyto`, shared out among as many threads."""
    to, of = (array.reshape(-1).view(np.uint8) for array in (target, source))
    if threads == 1:
        return lambda: np.copyto(to, of)
    pool = ThreadPoolExecutor(threads)
    parts = list(zip(np.array_split(to, threads), np.array_split(of, threads), strict=True))
    return lambda: list(pool.map(lambda part: np.copyto(*part), parts))
