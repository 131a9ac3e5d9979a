"""Warm up: compile kernels ahead, into the cache on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np

from ..core.dtypes import float_dtype
from ..core.norms import NORMS
from ..core.threads import serial
from .base import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, Norm, RMSNorm

_CHANNELS = 8
_SMALL = 16
_LARGE = 1 << 15
"""Samples: few for the serial kernels, many for those that use all threads."""


def warmup(
    norms: Iterable[str] = tuple(NORMS),
    dtypes: Iterable[Any] = ("float32",),
    *,
    backward: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> int:
    """Compile kernels ahead, so that later calls, in this process and in others, find them in the cache on disk.

    Parameters
    ----------
    norms : iterable of str, optional
        ``"batch"``, ``"layer"``, ``"instance"``, ``"group"``, ``"rms"``; all if not given.
    dtypes : iterable of dtype-like, optional
        Float dtypes of the inputs; bfloat16 by name needs ml_dtypes.
    backward : bool, optional
        False: forward alone.
    progress : callable, optional
        Called before each step with how many are done, how many there are, and what comes.

    Returns
    -------
    int
        Number of steps taken; those whose kernels were compiled already take no time.

    Raises
    ------
    ValueError
        If a norm or a dtype is unknown.

    Examples
    --------
    >>> import numbanorm as nn
    >>> nn.warmup(["rms"], ["float32"], backward=False)
    2
    """
    steps = _steps(list(norms), [float_dtype(dtype) for dtype in dtypes], backward)
    for done, (name, step) in enumerate(steps):
        if progress is not None:
            progress(done, len(steps), name)
        step()
    if progress is not None:
        progress(len(steps), len(steps), "")
    return len(steps)


def _steps(norms: list[str], dtypes: list[np.dtype[Any]], backward: bool) -> list[tuple[str, Callable[[], None]]]:
    for norm in norms:
        if norm not in NORMS:
            raise ValueError(f"norms: expected some of {', '.join(NORMS)}, got {norm!r}")
    found: list[tuple[str, Callable[[], None]]] = []
    for dtype in dtypes:
        for norm in norms:
            for samples in (_SMALL, _LARGE):
                orders = (False,) if norm in ("layer", "rms") else (False, True)
                for last in orders:
                    kind = "serial" if samples == _SMALL else "parallel"
                    order = ", channels last" if last else ""
                    found.append(
                        (f"{norm} {dtype}{order}, {kind}", partial(_call, norm, dtype, samples, last, backward))
                    )
    return found


def _call(norm: str, dtype: np.dtype[Any], samples: int, last: bool, backward: bool) -> None:
    """Run a norm, forward in both modes and backward, on an array of its usual shape."""
    layer = _layer(norm)
    shape = (samples, 64) if norm in ("layer", "rms") else (samples // 8, _CHANNELS, 8, 8)
    x = np.zeros(shape, dtype)
    if last:
        x = np.zeros((shape[0], 8, 8, _CHANNELS), dtype).transpose(0, 3, 1, 2)
    y = layer(x)
    if backward:
        layer.backward(y)
    layer.eval()(x)
    if norm == "batch" or last:
        return
    # Long groups past the caches have a kernel of their own on CPUs that write them by pairs (`cpu.rows.forward`).
    long = np.zeros((1024, 2048) if norm in ("layer", "rms") else (128, _CHANNELS, 48, 48), dtype)
    with serial() if samples == _SMALL else nullcontext():
        _layer(norm, 2048)(long)


def _layer(norm: str, width: int = 64) -> Norm:
    match norm:
        case "batch":
            return BatchNorm(_CHANNELS)
        case "layer":
            return LayerNorm(width)
        case "instance":
            return InstanceNorm(_CHANNELS, affine=True)
        case "group":
            return GroupNorm(2, _CHANNELS)
        case _:
            return RMSNorm(width)
