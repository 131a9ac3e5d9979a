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
from .base import Norm, layer_of

_CHANNELS = 8
_SMALL = 16
_LARGE = 1 << 15
"""Samples: few for the serial kernels, many for those that use all threads."""


def warmup(
    norms: Iterable[str] | None = None,
    dtypes: Iterable[Any] = ("float32",),
    *,
    backward: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> int:
    """Compile kernels ahead, so that later calls, in this process and in others, find them in the cache on disk.

    Parameters
    ----------
    norms : iterable of str, optional
        Names of norms; all if not given.
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
    steps = _steps(list(NORMS if norms is None else norms), [float_dtype(dtype) for dtype in dtypes], backward)
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
                orders = (False, True) if NORMS[norm].by_channel else (False,)
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
    by_channel = NORMS[norm].by_channel
    shape = (samples // 8, _CHANNELS, 8, 8) if by_channel else (samples, 64)
    x = np.zeros(shape, dtype)
    if last:
        x = np.zeros((shape[0], 8, 8, _CHANNELS), dtype).transpose(0, 3, 1, 2)
    y = layer(x)
    if backward:
        layer.backward(y)
    layer.eval()(x)
    if NORMS[norm].mixes_samples or last:
        return
    # Long groups past the caches have a kernel of their own on CPUs that write them by pairs (`cpu.rows.forward`).
    long = np.zeros((128, _CHANNELS, 48, 48) if by_channel else (1024, 2048), dtype)
    with serial() if samples == _SMALL else nullcontext():
        _layer(norm, 2048)(long)


def _layer(norm: str, width: int = 64) -> Norm:
    record = NORMS[norm]
    lengths: Any = (2, _CHANNELS) if record.grouped else (_CHANNELS if record.by_channel else width,)
    affine = {"affine" if record.by_channel else "elementwise_affine": True}
    make: Any = layer_of(norm)
    return make(*lengths, **affine)  # type: ignore[no-any-return]
