"""Norms that a user has registered, on dask arrays: in any chunks what they give in memory, here and elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from reference import normal
from registered import BATCH_GROUP, CHANNEL_RMS, POSITION, POSITION_GROUP, SCALE, UNUSUAL, WHOLE, registered

import numbanorm as nn

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")

SHAPE = (4, 6, 5, 3)
CHUNKS = {
    "samples apart": (2, 6, 5, 3),
    "groups cut": (4, 4, 5, 3),
    "space apart": (4, 6, 2, 3),
    "all apart": (3, 2, 2, 2),
}
X, DY = normal(0, SHAPE, np.float64), normal(7, SHAPE, np.float64)
MASK = np.random.default_rng(0).random(SHAPE) < 0.6
KINDS = {record.kind: record for record in UNUSUAL}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registered(*UNUSUAL), dask.config.set(scheduler="synchronous"):
        yield


def options_of(kind: str, channel_axis: int = 1) -> dict[str, Any]:
    record = KINDS[kind]
    if not record.by_channel:
        return {"normalized_shape": (5, 3)}
    groups = {"num_groups": SHAPE[channel_axis] // (2 if channel_axis == 0 else 3)} if record.grouped else {}
    return {"channel_axis": channel_axis} | groups


def weight_of(kind: str, channel_axis: int = 1) -> np.ndarray:
    return normal(1, (SHAPE[channel_axis],) if KINDS[kind].affine_roles else (), np.float64)


def close(found: Any, expected: Any) -> None:
    """Compare as shares of the scale; squares of what is far from 1 lose more."""
    assert len(found) == len(expected)
    for lazy, exact in zip(found, expected, strict=True):
        assert isinstance(lazy, da.Array)
        array = lazy.compute()
        assert array.dtype == lazy.dtype == exact.dtype
        assert array.shape == lazy.shape == exact.shape
        scale = max(float(np.abs(exact).max(initial=0)), 1.0)
        assert float(np.abs(array - exact).max(initial=0)) <= 1e-11 * scale


CASES = [
    *((kind, chunks, 1) for kind in KINDS for chunks in CHUNKS),
    *((kind, "all apart", axis) for kind in KINDS if KINDS[kind].by_channel for axis in (0, -1)),
]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("kind", "chunks", "channel_axis"), CASES)
def test_any_chunks(kind: str, chunks: str, channel_axis: int, weighted: bool) -> None:
    """Result, statistics and all gradients, and with a mask where the norm takes one."""
    record, own = KINDS[kind], options_of(kind, channel_axis)
    weight = weight_of(kind, channel_axis) if weighted else None
    x, dy = da.from_array(X, chunks=CHUNKS[chunks]), da.from_array(DY, chunks=2)
    for options in [{}, {"mask": MASK}] if record.takes_mask else [{}]:
        expected = nn.normalize(kind, X, weight=weight, return_stats=True, **own, **options)
        close(nn.normalize(kind, x, weight=weight, return_stats=True, **own, **options), expected)
        mean, rstd = (None, *expected[1:])[-2:]
        exact = nn.normalize_backward(kind, DY, X, mean, rstd, weight, **own, **options)
        assert len(exact) == 1 + len(record.parameters)
        close(nn.normalize_backward(kind, dy, x, mean, rstd, weight, **own, **options), exact)


def test_one_weight_lies_whole_beside_every_chunk() -> None:
    seen: list[Any] = []

    def looked_at(block: np.ndarray) -> np.ndarray:
        seen.append(block.shape)
        return block

    weight = da.from_array(np.array(2.5)).map_blocks(looked_at, meta=np.empty(()))
    x = da.from_array(X, chunks=(2, 3, 2, 2))
    expected = nn.normalize(SCALE.kind, X, (5, 3), weight=np.array(2.5))
    close([nn.normalize(SCALE.kind, x, (5, 3), weight=weight)], [expected])
    assert seen == [()]


def test_layers() -> None:
    x, dy = da.from_array(X, chunks=(2, 4, 5, 2)), da.from_array(DY, chunks=3)
    for record, head in (
        (SCALE, ((5, 3),)),
        (POSITION, (6,)),
        (WHOLE, (6,)),
        (CHANNEL_RMS, (6,)),
        (BATCH_GROUP, (2, 6)),
        (POSITION_GROUP, (2, 6)),
    ):
        ours, theirs = (nn.Norm(record.kind, *head) for _ in range(2))
        close([ours(x)], [theirs(X)])
        close([ours.backward(dy)], [theirs.backward(DY)])
        assert ours.grad.keys() == theirs.grad.keys() == set(record.parameters)
        for name, gradient in theirs.grad.items():
            np.testing.assert_allclose(ours.grad[name].compute(), gradient, 1e-5, 1e-5)  # float32, like the weights


@pytest.mark.parametrize("reduced", [{"space"}, {"group", "channel", "space"}])
def test_what_is_not_groups_of_channels_is_refused(reduced: set[str]) -> None:
    """Channels that share nothing, or all groups that share all: chunks would be merged wrongly."""
    odd = nn.NormRecord(kind="odd", title="OddNorm", reduced=frozenset(reduced), by_channel=True, grouped=True)
    with registered(odd), pytest.raises(TypeError, match="x: expected an array in memory for OddNorm"):
        nn.normalize("odd", da.from_array(X), num_groups=2)


@pytest.mark.slow
def test_other_processes_learn_of_it_with_the_task() -> None:
    weight = np.array(2.5)
    expected = nn.normalize(SCALE.kind, X, (5, 3), weight=weight)
    whole, cut = (da.from_array(X, chunks=chunks) for chunks in ((2, 6, 5, 3), (4, 6, 5, 2)))
    results = [nn.normalize(SCALE.kind, x, (5, 3), weight=weight) for x in (whole, cut)]
    for found in dask.compute(*results, scheduler="processes", num_workers=1):
        np.testing.assert_allclose(found, expected, 1e-12)
