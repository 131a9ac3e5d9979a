"""Ranks of synchronized batch norm: threads, or processes, which import this."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from reference import normal

import numbanorm as nn

C = 5
WEIGHT, BIAS = normal(1, (C,), np.float64), normal(2, (C,), np.float64)


def layer(sync: Any = None, **options: Any) -> nn.BatchNorm:
    norm = nn.BatchNorm(C, sync=sync, **options)
    if norm.weight is not None:
        norm.weight, norm.bias = WEIGHT.copy(), BIAS.copy()
    if norm.running_mean is not None:  # float32 would hide in which order the ranks' moments are merged
        norm.running_mean, norm.running_var = np.zeros(C), np.ones(C)
    return norm


SIZES = (1, 0, 7, 4)


def part_of(rank: int, ranks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return one rank's batch, gradient and mask; the sizes differ, one is 0."""
    rows = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    total = sum(SIZES[:ranks])
    x, dy = normal(0, (total, C, 3), np.float64) + 1e3, normal(1, (total, C, 3), np.float64)
    return x[rows], dy[rows], (np.random.default_rng(2).random(x.shape) < 0.7)[rows]


def train(rank: int, ranks: int, sync: Any) -> dict[str, np.ndarray]:
    """Train two steps, as one rank; return all that may be compared."""
    x, dy, mask = part_of(rank, ranks)
    norm = layer(sync)
    first = norm(x, mask=mask)
    dx = norm.backward(dy)
    second = norm(x * 2)
    return {"y": first, "dx": dx, "second": second, "dweight": norm.grad["weight"], "mean": norm.running_mean}


class Board:
    """Gathers between threads: everyone writes its message, waits, and reads all."""

    def __init__(self, ranks: int) -> None:
        self.calls = 0
        self._messages: list[Any] = [None] * ranks
        self._barrier = threading.Barrier(ranks)

    def of(self, rank: int) -> Callable[[np.ndarray], list[np.ndarray]]:
        def gather(message: np.ndarray) -> list[np.ndarray]:
            self._messages[rank] = message.copy()
            self._barrier.wait(timeout=60)
            gathered = list(self._messages)
            self.calls += rank == 0
            self._barrier.wait(timeout=60)
            return gathered

        return gather


def in_threads(ranks: int, work: Callable[[int, Any], Any]) -> tuple[list[Any], Board]:
    """Run ``work(rank, sync)`` in one thread for each rank; return results (or errors) in order."""
    board = Board(ranks)

    def caught(rank: int) -> Any:
        try:
            return work(rank, board.of(rank))
        except Exception as error:
            return error

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(caught, range(ranks))), board


class Pipes:
    """Gathers between processes: everybody sends its message to everybody."""

    def __init__(self, rank: int, pipes: dict[int, Any]) -> None:
        self._rank, self._pipes = rank, pipes

    def __call__(self, message: np.ndarray) -> list[np.ndarray]:
        for pipe in self._pipes.values():
            pipe.send(message)
        theirs = {other: pipe.recv() for other, pipe in self._pipes.items()}
        return [message if rank == self._rank else theirs[rank] for rank in range(len(theirs) + 1)]


def run(rank: int, ranks: int, pipes: dict[int, Any], results: Any) -> None:
    results.put((rank, train(rank, ranks, Pipes(rank, pipes))))
