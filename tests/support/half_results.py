"""Results in half precision that must be the same on every CPU; a process compiled for another imports this."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

import numbanorm as nn
from numbanorm.core.dtypes import HALF_RECORDS
from numbanorm.cpu import lanes

PATTERNS = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)

CALLS: dict[str, Callable[[np.ndarray], Any]] = {
    "batch": lambda x: nn.batch_norm(x, training=True),
    "batch, channels last": lambda x: nn.batch_norm(x, training=True, channel_axis=-1),
    "instance": lambda x: nn.instance_norm(x),
    "group": lambda x: nn.group_norm(x, 4),
    "layer": lambda x: nn.layer_norm(x, x.shape[-1]),
    "layer, channels": lambda x: nn.layer_norm(x, x.shape[1], axis=1),
    "rms": lambda x: nn.rms_norm(x, x.shape[-1]),
}


def records_of(halves: np.ndarray) -> np.ndarray:
    """Return an array in half precision as the records that kernels take its elements for."""
    return halves.view(HALF_RECORDS[halves.dtype.name])


@njit
def load_all_as_lanes(records: np.ndarray, whole: np.ndarray, part: np.ndarray) -> None:
    """Read every element among zeros, in full lanes and in lanes of which only some are read."""
    no = lanes.no_lanes(records)
    width = lanes.width_of(no)
    room = np.zeros_like(records[:width])
    for i in range(whole.shape[0]):
        room[i % width] = records[i]
        whole[i] = lanes.sum_of_lanes(lanes.load_lanes(no, room, 0))
        part[i] = lanes.sum_of_lanes(lanes.load_part(no, room, 0, i % width + 1))
        room[i % width] = records[0]


def results_that_no_cpu_rounds() -> dict[str, np.ndarray]:
    """Return float16 results whose sums are exact: vectors of any width and fused products give the same bits."""
    every = PATTERNS.view(np.float16).reshape(2, 64, 512)
    mean, var = np.zeros(64), np.exp2(np.arange(64) % 5)
    small = np.random.default_rng(0).integers(-2, 3, (16, 64, 32)).astype(np.float16)
    whole, part = np.empty((2, 1 << 16))
    load_all_as_lanes(records_of(PATTERNS.view(np.float16)), whole, part)
    results = {"whole lanes": whole, "parts of lanes": part, "every pattern": nn.batch_norm(every, mean, var, eps=0.0)}
    for name, call in CALLS.items():
        results[name] = call(small)
    dy = np.where(small > 0, np.float16(1), np.float16(-0.5))
    _, mean, rstd = nn.layer_norm(small, 32, return_stats=True)
    results["dx"], results["dweight"], results["dbias"] = nn.layer_norm_backward(
        dy, small, 32, mean, np.ones(rstd.shape)
    )
    return results
