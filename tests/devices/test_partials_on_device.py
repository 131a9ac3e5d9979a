"""Sums and gradients of pieces in device memory are those of pieces in host memory, for any norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from reference import normal
from registered import UNUSUAL, registered
from standin import Foreign, host
from tolerances import FLOAT32

import numbanorm as nn
from numbanorm.core.norms import NORMS
from numbanorm.stats import groups, partials

SHAPE = (3, 4, 5, 2)
X, DY = normal(0, SHAPE), normal(1, SHAPE)
MASK = np.random.default_rng(0).random(SHAPE) < 0.6
KINDS = {record.kind: record for record in (*NORMS.values(), *UNUSUAL)}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registered(*UNUSUAL):
        yield


def close(found: Any, expected: Any) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 4 * FLOAT32 * max(1.0, np.abs(expected).max())


def statistics(maps: groups.Maps) -> list[np.ndarray]:
    """Return what might be mean, rstd and the means of sums of a norm's groups."""
    record = maps.record
    shape = [1 if a in maps.over and not record.by_channel else SHAPE[a] for a in maps.stats_axes]
    mean, rstd, first, second = (normal(seed, tuple(shape), np.float64) for seed in range(2, 6))
    return [mean if record.centred else None, np.abs(rstd), first, second]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_any_norm(kind: str, weighted: bool) -> None:
    record = KINDS[kind]
    options = (1, SHAPE[1] if record.grouped else None, None if record.by_channel else (2, 1))
    maps = groups.Maps(kind, options, len(SHAPE))
    mean, rstd, *means = statistics(maps)
    weight = normal(6, tuple(SHAPE[a] for a in maps.weight_axes)) if weighted else None
    along = weight if set(maps.weight_axes) <= set(maps.over) and record.weights_within_groups else None
    x, dy = Foreign(X), Foreign(DY)
    expected = groups.sums(kind, options, DY, X, mean, rstd, along)
    for found, exact in zip(groups.sums(kind, options, dy, x, mean, rstd, along), expected, strict=True):
        close(found, exact)
    for mask in [None, MASK] if record.takes_mask else [None]:
        exact = groups.gradient(kind, options, DY, X, mean, rstd, *means, weight, mask)
        found = [host(part) for part in groups.gradient(kind, options, dy, x, mean, rstd, *means, weight, mask)]
        for a, b in zip(found, exact[: len(found)], strict=False):
            close(a, b.astype(a.dtype))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_channels(channel_axis: int, by_sample: bool, weighted: bool) -> None:
    channels = SHAPE[channel_axis]
    shape = (SHAPE[0], channels) if by_sample else (channels,)
    mean, rstd, *means = (normal(seed, shape, np.float64) for seed in range(2, 6))
    weight = normal(6, (channels,)) if weighted else None
    own: dict[str, Any] = {"channel_axis": channel_axis}
    x, dy = Foreign(X), Foreign(DY)
    expected = partials.channel_sums(DY, X, mean, rstd, **own)
    for found, exact in zip(partials.channel_sums(dy, x, mean, rstd, **own), expected, strict=True):
        close(found, exact)
    found = partials.channel_gradient(dy, x, mean, rstd, *means, weight, mask=MASK, **own)
    close(host(found), partials.channel_gradient(DY, X, mean, rstd, *means, weight, mask=MASK, **own))


@pytest.mark.parametrize("axis", [(3,), (1,), (3, 1)])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("weighted", ["not", "all alike", "elementwise"])
def test_rows(axis: tuple[int, ...], centred: bool, weighted: str) -> None:
    shape = tuple(1 if a in axis else n for a, n in enumerate(SHAPE))
    mean, rstd, *means = (normal(seed, shape, np.float64) for seed in range(2, 6))
    own: dict[str, Any] = {"axis": axis}
    along = tuple(SHAPE[a] for a in axis)
    weight = {"not": None, "all alike": np.array(2.5), "elementwise": normal(6, along)}[weighted]
    given = mean if centred else None
    x, dy = Foreign(X), Foreign(DY)
    expected = partials.row_sums(DY, X, given, rstd, weight, **own)
    for found, exact in zip(partials.row_sums(dy, x, given, rstd, weight, **own), expected, strict=True):
        close(found, exact)
    dx, *gradients = partials.row_gradient(dy, x, given, rstd, *means, weight, mask=MASK if centred else None, **own)
    expected = partials.row_gradient(DY, X, given, rstd, *means, weight, mask=MASK if centred else None, **own)
    close(host(dx), expected[0])
    assert len(gradients) == (2 if centred else 1)
    if weighted == "all alike":
        each = partials.row_gradient(
            DY, X, given, rstd, *means, np.full(along, 2.5), mask=MASK if centred else None, **own
        )
        expected = expected[0], *(part.sum(dtype=np.float64) for part in each[1:])
    for found, exact in zip(gradients, expected[1:], strict=True):
        close(found, exact.astype(found.dtype))


CUT: dict[str, tuple[Any, dict[str, Any]]] = {
    "scale": (np.array(2.5), {"normalized_shape": (5, 2)}),
    "l2": (normal(6, (5, 2)), {"normalized_shape": (5, 2)}),
    "group": (normal(6, (4,)), {"num_groups": 2}),
    "position": (normal(6, (4,)), {}),
}


@pytest.mark.parametrize("kind", CUT)
def test_dask_chunks_that_cut_groups(kind: str) -> None:
    da = pytest.importorskip("dask.array")
    weight, own = CUT[kind]
    options = {"eps": 3.0} if kind == "l2" else {}  # which some norms are above and some below
    expected = nn.normalize(kind, X, weight=weight, return_stats=True, **own, **options)
    mean, rstd = (None, *expected[1:])[-2:]
    expected = nn.normalize_backward(kind, DY, X, mean, rstd, weight, **own)
    x, dy = (
        da.from_array(a, chunks=(3, 3, 3, 2)).map_blocks(Foreign, dtype=a.dtype, meta=np.empty((0,) * 4, a.dtype))
        for a in (X, DY)
    )
    dx, *gradients = nn.normalize_backward(kind, dy, x, mean, rstd, weight, **own)
    blocks = dx.map_blocks(host, dtype=dx.dtype, meta=np.empty((0,) * 4, dx.dtype))
    for found, exact in zip([blocks, *gradients], expected, strict=True):
        close(found.compute(scheduler="synchronous"), exact)
