"""Dask arrays: every norm, in any chunks, gives what it gives in memory, lazily and without rechunking."""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import sharing
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import normal
from tolerances import FLOAT32, FLOAT64, MOMENTS, STATISTICS_FLOAT32

import numbanorm as nn
from numbanorm.core import threads as kernel_threads

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")

SHAPE = (4, 6, 5, 3)
WEIGHT, BIAS = normal(1, (6,), np.float64), normal(2, (6,), np.float64)


@pytest.fixture(autouse=True, scope="module")
def _synchronous() -> Iterator[None]:
    with dask.config.set(scheduler="synchronous"):
        yield


def close(actual: Any, expected: np.ndarray, x: np.ndarray, slack: float = 0.0) -> None:
    """Compare with the result in memory, as a share of its scale."""
    found = actual.compute()
    assert found.dtype == actual.dtype == expected.dtype
    assert found.shape == actual.shape == expected.shape
    tolerance = {2: 1e-3, 4: FLOAT32, 8: FLOAT64}[expected.dtype.itemsize] + slack
    scale = max(float(np.abs(expected).max(initial=0)), 1.0)
    assert float(np.abs(found.astype(np.float64) - expected).max(initial=0)) <= tolerance * scale


Call = Callable[..., Any]

FORWARD: dict[str, Call] = {
    "batch": lambda x, **k: nn.batch_norm(x, weight=WEIGHT, bias=BIAS, training=True, **k),
    "batch, last axis": lambda x, **k: nn.batch_norm(x, training=True, channel_axis=-1, **k),
    "instance": lambda x, **k: nn.instance_norm(x, weight=WEIGHT, bias=BIAS, **k),
    "instance, last axis": lambda x, **k: nn.instance_norm(x, channel_axis=-1, **k),
    "instance, first axis": lambda x, **k: nn.instance_norm(x, channel_axis=0, **k),
    "group": lambda x, **k: nn.group_norm(x, 3, WEIGHT, BIAS, **k),
    "group, last axis": lambda x, **k: nn.group_norm(x, 3, channel_axis=-1, **k),
    "group, first axis": lambda x, **k: nn.group_norm(x, 2, channel_axis=0, **k),
    "layer": lambda x, **k: nn.layer_norm(x, (5, 3), normal(3, (5, 3)), normal(4, (5, 3)), **k),
    "layer, axis 1": lambda x, **k: nn.layer_norm(x, 6, WEIGHT, BIAS, axis=1, **k),
    "layer, axes turned": lambda x, **k: nn.layer_norm(x, (3, 6), normal(5, (3, 6)), axis=(3, 1), **k),
    "rms": lambda x, **k: nn.rms_norm(x, (5, 3), normal(3, (5, 3)), **k),
    "rms, axis 1": lambda x, **k: nn.rms_norm(x, 6, WEIGHT, axis=1, **k),
    "l2": lambda x, **k: nn.l2_norm(x, (5, 3), normal(3, (5, 3)), **k),
    "l2, axis 1, some clamped": lambda x, **k: nn.l2_norm(x, 6, eps=2.4, axis=1, **k),
}
UNCENTRED = "rms", "l2"


@st.composite
def chunkings(draw: st.DrawFn, shape: tuple[int, ...] = SHAPE) -> tuple[tuple[int, ...], ...]:
    """Cut each axis at most twice: any sizes, up to 81 chunks."""
    chunks = []
    for n in shape:
        cuts = sorted(draw(st.sets(st.integers(1, n - 1), max_size=2)) if n > 1 else [])
        chunks.append(tuple(b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True)))
    return tuple(chunks)


@pytest.mark.parametrize("name", FORWARD)
@settings(max_examples=8)
@given(data=st.data())
def test_any_chunks(name: str, data: st.DataObject) -> None:
    chunks = data.draw(chunkings())
    mean = data.draw(st.sampled_from([0.0, 1e6]))
    x = (normal(0, SHAPE, np.float64) + mean).astype(data.draw(st.sampled_from([np.float32, np.float64])))
    lazy = da.from_array(x, chunks=chunks)
    options: dict[str, Any] = {}
    if not name.startswith(UNCENTRED) and data.draw(st.booleans()):
        shape = data.draw(st.sampled_from([SHAPE, SHAPE[1:], (4, 1, 1, 1), (1, 6, 1, 3)]))
        options["mask"] = np.random.default_rng(0).random(shape) < 0.6
    expected = FORWARD[name](x, return_stats=True, **options)
    if options and data.draw(st.booleans()):
        options["mask"] = da.from_array(options["mask"], chunks=2)
    found = FORWARD[name](lazy, return_stats=True, **options)
    assert len(found) == len(expected)
    y = FORWARD[name](lazy, **options)
    # A float64 mean is rounded to an ulp, 1.2e-10 at 1e6, chunked or not.
    slack = np.spacing(mean) * expected[-1].max() if x.dtype == np.float64 else 0.0
    for result in (y, found[0]):
        assert result.chunks == lazy.chunks
        close(result, expected[0], x, slack)
    for statistic, exact in zip(found[1:], expected[1:], strict=True):
        assert isinstance(statistic, da.Array)
        assert statistic.shape == exact.shape
        np.testing.assert_allclose(
            statistic.compute(), exact, FLOAT32 if x.dtype == np.float32 else FLOAT64 + slack, 1e-6
        )
    assert y.name == FORWARD[name](da.from_array(x.copy(), chunks=chunks), **options).name


@pytest.mark.parametrize("name", FORWARD)
def test_nothing_is_computed_before_it_is_asked_for(name: str) -> None:
    def forbidden(block: np.ndarray) -> np.ndarray:
        raise AssertionError("computed")

    x = da.ones(SHAPE, chunks=2).map_blocks(forbidden, meta=np.empty((0,) * 4))
    results = FORWARD[name](x, return_stats=True)
    with pytest.raises(AssertionError, match="computed"):
        results[0].compute()


@pytest.mark.parametrize(
    ("name", "chunks", "reads"),
    [
        ("batch", (4, 2, 5, 3), 1),
        ("batch", (2, 6, 5, 3), 2),
        ("instance", (1, 2, 5, 3), 1),
        ("instance", (4, 6, 2, 3), 2),
        ("group", (1, 2, 5, 3), 1),
        ("group", (1, 4, 5, 3), 1),
        ("group", (4, 3, 5, 3), 2),
        ("layer", (1, 1, 5, 3), 1),
        ("layer", (4, 6, 5, 2), 2),
        ("rms", (2, 2, 5, 3), 1),
        ("rms", (4, 6, 2, 3), 2),
        ("l2", (4, 6, 2, 3), 2),
    ],
)
def test_reads(name: str, chunks: tuple[int, ...], reads: int) -> None:
    """A chunk is read once where its groups lie in it; twice where not, never held until the statistics are there.

    Nor is it rechunked, as statistics may be.
    """
    alive, most, total = 0, 0, 0

    def release() -> None:
        nonlocal alive
        alive -= 1

    def read(block: np.ndarray) -> np.ndarray:
        nonlocal alive, most, total
        alive, total = alive + 1, total + 1
        most = max(most, alive)
        copy = block.copy()
        weakref.finalize(copy, release)
        return copy

    x = da.from_array(normal(0, SHAPE), chunks=chunks).map_blocks(read, meta=np.empty((0,) * 4, np.float32))
    y = FORWARD[name](x).map_blocks(lambda block: block[:0, :0, :0, :0], chunks=tuple((0,) * n for n in x.numblocks))
    rechunked = {dep for layer, deps in y.dask.dependencies.items() if "rechunk" in layer for dep in deps}
    assert not any(dep.startswith("read") for dep in rechunked)
    y.compute(optimize_graph=False)
    assert total == reads * x.npartitions
    assert most <= 2


@pytest.mark.parametrize("dtype", [np.float16, np.uint8, np.int16, np.int64, ">f4", np.bool_])
@pytest.mark.parametrize("name", ["batch", "instance", "group", "layer", "rms", "l2"])
@pytest.mark.parametrize("chunks", [(2, 3, 2, 3), SHAPE])
def test_dtypes(name: str, dtype: Any, chunks: tuple[int, ...]) -> None:
    x = (normal(0, SHAPE, np.float64) * 20 + 60).astype(dtype)
    y = FORWARD[name](da.from_array(x, chunks=chunks))
    close(y, FORWARD[name](x), x)
    assert y._meta.dtype == y.dtype


def test_residual() -> None:
    x, r = normal(0, SHAPE), normal(1, SHAPE)
    for chunks in (SHAPE, (2, 6, 2, 2)):
        lazy, added = da.from_array(x, chunks=chunks), da.from_array(r, chunks=(4, 2, 2, 3))
        for residual in (r, added):
            for f in (lambda a, b: nn.layer_norm(a, 3, residual=b, return_stats=True),
                      lambda a, b: nn.rms_norm(a, 3, residual=b),
                      lambda a, b: nn.l2_norm(a, 3, residual=b)):  # fmt: skip
                found, expected = f(lazy, residual), f(x, r)
                assert len(found) == len(expected)
                close(found[0], expected[0], x)
                np.testing.assert_array_equal(found[-1].compute(), expected[-1])


def test_weights_may_be_dask_arrays() -> None:
    x = normal(0, SHAPE)
    lazy = da.from_array(x, chunks=(2, 4, 5, 3))
    weight, bias = da.from_array(WEIGHT, chunks=1), da.from_array(BIAS, chunks=6)
    close(nn.group_norm(lazy, 3, weight, bias), nn.group_norm(x, 3, WEIGHT, BIAS), x)
    close(nn.batch_norm(lazy, None, None, weight, bias, True), nn.batch_norm(x, None, None, WEIGHT, BIAS, True), x)


class TestRunning:
    """Running statistics change at once, though the result is lazy."""

    @pytest.mark.parametrize("function", [nn.batch_norm, nn.instance_norm])
    @pytest.mark.parametrize("chunks", [(2, 3, 5, 2), SHAPE])
    @pytest.mark.parametrize("masked", [False, True])
    def test_updated(self, function: Call, chunks: tuple[int, ...], masked: bool) -> None:
        x = normal(0, SHAPE, np.float64) + 3
        mask = np.random.default_rng(0).random(SHAPE) < 0.6 if masked else None
        here, there = ([np.zeros(6), np.ones(6)] for _ in range(2))
        expected = function(x, *here, WEIGHT, BIAS, True, mask=mask)
        y = function(da.from_array(x, chunks=chunks), *there, WEIGHT, BIAS, True, mask=mask)
        for a, b in zip(there, here, strict=True):
            np.testing.assert_allclose(a, b, 1e-13)
        assert isinstance(y, da.Array)
        close(y, expected, x)
        expected = function(x, *here, WEIGHT, BIAS, False)
        close(function(da.from_array(x, chunks=chunks), *here, WEIGHT, BIAS, False), expected, x)

    def test_a_failed_call_changes_nothing(self) -> None:
        mean, var = np.zeros(6), np.ones(6)
        with pytest.raises(ValueError, match="mask: "):
            nn.batch_norm(da.ones(SHAPE), mean, var, training=True, mask=np.ones(7, bool))
        with pytest.raises(TypeError, match="out: "):
            nn.batch_norm(da.ones(SHAPE), mean, var, training=True, out=np.empty(SHAPE))
        np.testing.assert_array_equal(mean, 0)
        np.testing.assert_array_equal(var, 1)

    def test_layers(self) -> None:
        x = normal(0, SHAPE, np.float64) + 3
        lazy = da.from_array(x, chunks=(2, 6, 5, 2))
        mask = x > 2
        for make in (lambda: nn.BatchNorm(6), lambda: nn.InstanceNorm(6, track_running_stats=True, momentum=None)):
            ours, theirs = make(), make()
            for counts in (None, mask, np.zeros(SHAPE, bool)):
                close(ours(lazy, mask=None if counts is None else da.from_array(counts)), theirs(x, mask=counts), x)
                np.testing.assert_allclose(ours.running_mean, theirs.running_mean, 1e-6)
                np.testing.assert_allclose(ours.running_var, theirs.running_var, 1e-6)
                assert ours.num_batches_tracked == theirs.num_batches_tracked
            close(ours.eval()(lazy), theirs.eval()(x), x.astype(np.float32).astype(np.float64))
        for norm in (nn.LayerNorm(3), nn.RMSNorm((5, 3)), nn.GroupNorm(2, 6), nn.InstanceNorm(6), nn.L2Norm((5, 3))):
            close(norm(lazy), norm(x), x)


class TestMoments:
    @settings(max_examples=15)
    @given(data=st.data())
    def test_any_chunks_and_axes(self, data: st.DataObject) -> None:
        axes = data.draw(st.none() | st.sets(st.integers(-4, 3), min_size=1, max_size=4).map(tuple))
        if axes is not None and len({a % 4 for a in axes}) < len(axes):
            axes = (1,)
        x = normal(0, SHAPE, np.float64) + data.draw(st.sampled_from([0.0, 1e3]))
        mask = x > x.mean() if data.draw(st.booleans()) else None
        lazy = da.from_array(x, chunks=data.draw(chunkings()))
        exact = nn.Moments.of(x, axes, mask=mask)
        m = nn.Moments.of(lazy, axes, mask=mask)
        assert np.shape(m.count) == np.shape(exact.count)
        np.testing.assert_array_equal(m.count, exact.count)
        np.testing.assert_allclose(m.mean, exact.mean, MOMENTS, MOMENTS)
        np.testing.assert_allclose(m.var(), exact.var(), 1e-10 if abs(x.mean()) > 100 else MOMENTS, 1e-300)

    def test_update(self) -> None:
        x = normal(0, (40, 6), np.float64)
        m = nn.Moments.of(x[:15], 0).update(da.from_array(x[15:], chunks=(4, 5)))
        assert m.count == 40
        np.testing.assert_allclose(m.mean, x.mean(0), 1e-12, 1e-15)
        np.testing.assert_allclose(m.var(ddof=1), x.var(0, ddof=1), 1e-12)

    def test_float32_at_1e6(self) -> None:
        x = (normal(0, (3000, 4), np.float64) + 1e6).astype(np.float32)
        m = nn.Moments.of(da.from_array(x, chunks=(7, 3)), 0)
        np.testing.assert_allclose(m.var(), x.astype(np.longdouble).var(0).astype(float), STATISTICS_FLOAT32)

    def test_constants_have_no_variance(self) -> None:
        m = nn.Moments.of(da.full(1000, 0.1, chunks=7))
        assert (m.mean, m.var()) == (0.1, 0.0)

    def test_a_number_and_an_empty_array(self) -> None:
        assert nn.Moments.of(da.from_array(np.array(3.5))).mean == 3.5
        assert nn.Moments.of(da.zeros((0, 3)), 0).count == 0


def test_empty_chunks_and_arrays() -> None:
    x = normal(0, SHAPE)
    lazy = da.from_array(x, chunks=((0, 1, 3), 6, (4, 0, 1), 3))
    for f in FORWARD.values():
        close(f(lazy), f(x), x)
        close(f(lazy[:0]), f(x[:0]), x)


def test_infinities_spoil_their_own_group_only() -> None:
    x = normal(0, SHAPE, np.float64)
    x[1, 2, 3, 1] = np.inf
    y = nn.batch_norm(da.from_array(x, chunks=(2, 3, 2, 3)), training=True).compute()
    expected = nn.batch_norm(x, training=True)
    np.testing.assert_allclose(np.delete(y, 2, 1), np.delete(expected, 2, 1), 1e-10)
    assert np.isnan(y[:, 2]).all()


def test_kernels_use_one_thread_in_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    usable = kernel_threads.usable_threads

    def looked_at() -> int:
        seen.append(usable())
        return seen[-1]

    monkeypatch.setattr(kernel_threads, "usable_threads", looked_at)
    monkeypatch.setattr(kernel_threads, "get_num_threads", lambda: 2)
    sharing.always(monkeypatch)
    x = normal(0, (512, 600))
    of_rows = nn.layer_norm(x, 600, return_stats=True)[1:]
    of_channels = nn.batch_norm(x, training=True, return_stats=True)[1:]
    lazy = da.from_array(x, chunks=(256, 600))  # a chunk is large enough for threads
    seen.clear()
    for result in (
        nn.layer_norm(lazy, 600),
        nn.batch_norm(lazy, training=True),
        nn.layer_norm(lazy, 600, axis=-1, return_stats=True)[1],
        nn.layer_norm_backward(lazy, lazy, 600, *of_rows)[0],
        nn.batch_norm_backward(lazy, lazy, *of_channels)[0],
    ):
        result.compute(scheduler="threads")
        assert set(seen) == {1}
        seen.clear()
    assert usable() == 2


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: nn.layer_norm(da.ones((4, 3)), 3, out=np.empty((4, 3))), TypeError, "out: expected None"),
    (lambda: nn.layer_norm(da.ones((4, 3)), 4), ValueError, r"x: expected lengths \(4,\)"),
    (lambda: nn.layer_norm(da.ones((4, 3)), 3, da.ones(4)), ValueError, r"weight: expected shape \(3,\), got \(4,\)"),
    (lambda: nn.layer_norm(da.ones((4, 3)), 3, da.ones(3, dtype=int)), TypeError, "weight: expected a float dtype"),
    (lambda: nn.layer_norm(da.ones((4, 3)), 3, mask=da.ones((4, 3))), TypeError, "mask: expected dtype bool"),
    (lambda: nn.layer_norm(da.ones((4, 3)), 3, mask=da.ones((2, 3), dtype=bool)), ValueError, r"mask: .*\(4, 3\)"),
    (lambda: nn.layer_norm(da.ones((4, 3)), 3, residual=da.ones((4, 4))), ValueError, "residual: expected the shape"),
    (lambda: nn.layer_norm(da.ones((4, 3)), 3, residual=np.ones((4, 3), np.float32)), TypeError, "residual: .*dtype"),
    (lambda: nn.layer_norm(da.ones((4, 3), dtype=complex), 3), TypeError, "x: .*complex128"),
    (lambda: nn.layer_norm(da.ones((4, 3)), 3, stream=1), TypeError, "stream: "),
    (lambda: nn.group_norm(da.ones((4, 3)), 2), ValueError, "num_groups: expected a divisor"),
    (lambda: nn.batch_norm(da.ones((1, 3)), training=True), ValueError, "x: expected more than 1 value per channel"),
    (lambda: nn.batch_norm(da.ones((4, 3))), ValueError, "running_mean, running_var: expected both"),
    (lambda: nn.batch_norm(da.ones((4, 3)), da.zeros(3), da.ones(3)), TypeError, "running_mean: .*lazy"),
    (lambda: nn.batch_norm(da.ones((4, 3))[da.ones(4) > 0], training=True), ValueError, "x: expected known chunk"),
    (lambda: nn.batch_norm(da.ones((4, 3)), [0.0] * 3, [1.0] * 3, training=True), TypeError, "running_mean: .* list"),
    (lambda: nn.batch_norm(da.ones((4, 3)), *[np.ones(3)] * 2, training=True), ValueError, "memory of their own"),
    (lambda: nn.batch_norm(da.ones((4, 3)), *np.ones((2, 3)), training=True, momentum=None), TypeError, "momentum: "),
    (lambda: nn.normalize("l2", da.ones((4, 3)), 3, mask=np.ones(3, bool)), TypeError, "mask: expected None, L2Norm"),
    (lambda: nn.normalize("batch", *[da.ones((4, 6))] * 2), TypeError, "normalized_shape, axis: expected None"),
    (lambda: nn.normalize("batch", da.ones((4, 6)), residual=da.ones((4, 6))), TypeError, "residual: expected None"),
    (lambda: nn.Moments.of(da.ones((4, 3)), 2), ValueError, "axis: "),
    (lambda: nn.Moments.of(da.ones((4, 3)), mask=np.ones((4, 3))), TypeError, "mask: "),
    (lambda: nn.layer_norm(np.ones((4, 3)), 3, da.ones(3)), TypeError, "weight: .*lazy Array"),
    (lambda: nn.BatchNorm(3)(da.ones((4, 5))), ValueError, "x: expected 3 channels"),
    (lambda: nn.GroupNorm(3, 3)(da.ones((4, 6))), ValueError, "x: expected 3 channels"),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_come_with_the_call(wrong: tuple[Callable[[], Any], type[Exception], str]) -> None:
    call, error, message = wrong
    with pytest.raises(error, match=message):
        call()


def test_statistics_make_no_temporary_of_a_chunk() -> None:
    x = normal(0, (512, 64, 16, 16), np.float32)
    lazy = da.from_array(x, chunks=(128, -1, -1, -1))  # of 8 MB
    nn.Moments.of(lazy, (0, 2, 3))
    tracemalloc.start()
    nn.BatchNorm(64).fit(lazy)
    nn.batch_norm(lazy, np.zeros(64), np.ones(64), training=True)  # its statistics are taken at once
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


AT_ONCE: dict[str, Call] = {
    "moments": lambda x, **_: nn.Moments.of(x, (0, 2, 3)),
    "running": lambda x, **_: nn.batch_norm(x, np.zeros(6), np.ones(6), training=True),
}


@pytest.mark.parametrize("name", [*FORWARD, *AT_ONCE])
def test_building_a_graph_neither_hashes_nor_copies_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that lie in the graph, as those of `from_array` do, are read by tasks alone."""
    call = (FORWARD | AT_ONCE)[name]
    cut = 5 if name in AT_ONCE else 3  # what is computed at once copies a chunk with gaps, in its task
    x = da.from_array(normal(0, (1 << 14, *SHAPE[1:])), chunks=(1 << 13, 6, cut, 3))  # of 1.8 MB and more
    tokenize, hashed = dask.base.normalize_token.dispatch(np.ndarray), []

    def recorded(array: np.ndarray) -> Any:
        hashed.append(array.nbytes)
        return tokenize(array)

    call(x, return_stats=True)
    monkeypatch.setitem(dask.base.normalize_token._lookup, np.ndarray, recorded)
    tracemalloc.start()
    call(x, return_stats=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(hashed) < 1 << 12  # weights and statistics
    assert peak < 1 << 20
