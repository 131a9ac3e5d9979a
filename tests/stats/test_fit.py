"""BatchNorm.fit and partial_fit: exact statistics of everything, in any split, with bounded memory."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import run
from reference import error, normal
from reference import moments as exact
from tolerances import FLOAT32, FLOAT64, MOMENTS

import numbanorm as nn
from numbanorm.stats import fit as fitting

FLOAT64_FAR = 4e-10
"""Beside FLOAT64, for a mean of 1e6 and a standard deviation of 1: three units in the last place of the mean. The call
on all data is up to two units off (measured), what is fitted half a unit."""


def statistics(x: np.ndarray, mask: np.ndarray | None = None, channel: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and population variance of the channels, in two passes in longdouble."""
    axes = tuple(a for a in range(x.ndim) if a != channel % x.ndim)
    count, mean, m2 = (a.squeeze(axes) for a in exact(x, axes, mask))
    return mean, m2 / np.maximum(count, 1)


def assert_exact(layer: nn.BatchNorm, x: np.ndarray, mask: np.ndarray | None = None, rtol: float = MOMENTS) -> None:
    mean, var = statistics(x, mask, layer.channel_axis)
    assert layer.running_mean.dtype == layer.running_var.dtype == np.float64
    # A float64 beside the exact mean; without its low part a mean of 1e6 drifts by 1e-9 standard deviations.
    assert (np.abs(layer.running_mean - mean) <= rtol * np.sqrt(var) + 1.2e-16 * np.abs(mean)).all()
    np.testing.assert_allclose(layer.running_var, np.asarray(var, np.float64), rtol, 0)


def snapshot(layer: nn.BatchNorm) -> tuple[Any, ...]:
    state = {name: (array.dtype, array.tobytes()) for name, array in layer.state_dict().items()}
    return state, repr(layer.moments), id(layer.moments)


# --- any split, any order -------------------------------------------------------------------------------------------


@given(data=st.data())
def test_any_split_and_order(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 300))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=6)))
    mean = data.draw(st.sampled_from([0.0, -1e3, 1e6]))
    space = data.draw(st.sampled_from([(), (1,), (3, 2)]))
    last = data.draw(st.booleans())
    x = normal(data.draw(st.integers(0, 9)), (n, 3, *space), np.float64) + mean
    x = np.ascontiguousarray(np.moveaxis(x, 1, -1)) if last else x
    parts = [x[a:b] for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
    order = data.draw(st.permutations(range(len(parts))))
    mask = masks = None
    if data.draw(st.booleans()):
        mask = np.random.default_rng(n).random(x.shape) < 0.6
        mask[0] = True
        masks = [mask[a:b] for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
        masks = [masks[i] for i in order]
    fitted = nn.BatchNorm(3, channel_axis=-1 if last else 1).fit(iter([parts[i] for i in order]), mask=masks)
    assert_exact(fitted, x, mask)
    stepwise = nn.BatchNorm(3, channel_axis=-1 if last else 1)
    for number, i in enumerate(order):
        stepwise.partial_fit(parts[i], mask=None if masks is None else masks[number])
    for name, array in fitted.state_dict().items():
        np.testing.assert_array_equal(stepwise.state_dict()[name], array)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("n", [30, 5000])
def test_a_mean_of_1e6_in_batches_of_any_size(n: int, size: int) -> None:
    """With the mean in one float64, the variance of 30 elements would be off by 6e-11, that of 5000 by 1e-10."""
    x = normal(n, (n, 2), np.float64) + 1e6
    parts = [x[i : i + size] for i in range(0, n, size)]
    there, back = nn.BatchNorm(2).fit(parts), nn.BatchNorm(2).fit(parts[::-1])
    assert_exact(there, x)
    np.testing.assert_allclose(there.running_mean, back.running_mean, 1e-12)
    np.testing.assert_allclose(there.running_var, back.running_var, 1e-12)


@pytest.mark.parametrize(("dtype", "scale", "mean"), [(np.float32, FLOAT32, 0.0), (np.float32, FLOAT32, 1e6)])
def test_inference_gives_what_training_would_on_all_at_once(dtype: Any, scale: float, mean: float) -> None:
    x = (normal(0, (97, 5, 4), np.float64) + mean).astype(dtype)
    expected = nn.BatchNorm(5)(x)
    y = nn.BatchNorm(5).fit([x[:1], x[1:50], x[50:]]).eval()(x)
    assert y.dtype == dtype
    assert error(y, expected) <= scale


@pytest.mark.parametrize(("mean", "more"), [(0.0, 0.0), (1e6, FLOAT64_FAR)])
def test_inference_in_float64(mean: float, more: float) -> None:
    x = normal(0, (97, 5, 4), np.float64) + mean
    y = nn.BatchNorm(5).fit([x[:1], x[1:50], x[50:]]).eval()(x)
    np.testing.assert_allclose(y, nn.BatchNorm(5)(x), 0, FLOAT64 * np.abs(y).max() + more)


# --- what may be fitted ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "BLOCK_BYTES", 1000)


@pytest.mark.usefixtures("small_blocks")
class TestSources:
    X = normal(0, (60, 4, 5), np.float64) + 3

    def test_one_array_is_one_batch(self) -> None:
        layer = nn.BatchNorm(4).fit(self.X)
        assert_exact(layer, self.X)
        assert layer.num_batches_tracked == 1

    def test_orders_of_memory(self) -> None:
        for x in (np.asfortranarray(self.X), self.X[::-1, ::-1, ::2], self.X.transpose(2, 1, 0)):
            assert_exact(nn.BatchNorm(4).fit(x), x)

    def test_channels_first_of_all(self) -> None:
        x = np.ascontiguousarray(self.X.transpose(1, 0, 2))
        layer = nn.BatchNorm(4, channel_axis=0).fit(x)
        assert_exact(layer, x)

    def test_one_sample(self) -> None:
        x = normal(0, (1, 4, 3000), np.float64)
        assert_exact(nn.BatchNorm(4).fit(x), x)

    def test_masks_of_an_array(self) -> None:
        for shape in ((60, 4, 5), (60, 1, 1), (5,), (1, 4, 5)):
            mask = np.random.default_rng(1).random(shape) < 0.6
            mask[..., 0] = True
            assert_exact(nn.BatchNorm(4).fit(self.X, mask=mask), self.X, np.broadcast_to(mask, self.X.shape))

    @pytest.mark.parametrize("mode", ["r", "r+", "c"])
    def test_a_mapped_file(self, mode: Any, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", self.X)
        x = np.load(tmp_path / "x.npy", mmap_mode=mode)
        if mode != "r":  # pages that were written are not lost when pages are given back
            x[3] = 7.0
        layer = nn.BatchNorm(4).fit(x)
        expected = self.X.copy()
        if mode != "r":
            expected[3] = 7.0
        np.testing.assert_array_equal(x, expected)
        assert_exact(layer, expected)

    def test_zarr(self, tmp_path: Path) -> None:
        zarr = pytest.importorskip("zarr")
        x = zarr.create_array(store=tmp_path / "x.zarr", shape=self.X.shape, chunks=(7, 4, 5), dtype="float64")
        x[...] = self.X
        assert_exact(nn.BatchNorm(4).fit(x), self.X)

    def test_dask(self) -> None:
        da = pytest.importorskip("dask.array")
        x = da.from_array(self.X, chunks=(13, 3, 2))
        layer = nn.BatchNorm(4).fit(x)
        assert_exact(layer, self.X)
        assert layer.num_batches_tracked == 1
        mask = np.random.default_rng(1).random(self.X.shape) < 0.6
        for given_mask in (mask, da.from_array(mask, chunks=(13, 3, 2))):
            assert_exact(nn.BatchNorm(4).fit(x, mask=given_mask), self.X, mask)
        assert_exact(nn.BatchNorm(4).partial_fit(x[:20]).partial_fit(x[20:]), self.X)

    def test_lists_of_numbers_and_other_dtypes(self) -> None:
        layer = nn.BatchNorm(2).fit([[[1.0, 2.0], [3.0, 6.0]], [[5.0, 1.0]]])
        np.testing.assert_array_equal(layer.running_mean, [3.0, 3.0])
        x = np.random.default_rng(0).integers(0, 200, (50, 3)).astype(np.uint8)
        assert_exact(nn.BatchNorm(3).fit([x[:20], x[20:].astype(np.float64)]), x, rtol=FLOAT32)

    def test_batches_of_other_lengths_and_dimensions(self) -> None:
        long, flat = normal(0, (5, 3, 8), np.float64), normal(1, (9, 3), np.float64)
        layer = nn.BatchNorm(3).fit([long, flat])
        assert_exact(layer, np.concatenate([np.moveaxis(long, 1, -1).reshape(-1, 3), flat]))
        assert layer.num_batches_tracked == 2

    def test_one_batch_is_held_at_a_time(self) -> None:
        def batches() -> Iterator[np.ndarray]:
            for seed in range(40):
                yield normal(seed, (1000, 4), np.float64)

        layer = nn.BatchNorm(4).fit(batches())
        tracemalloc.start()
        layer.fit(batches())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10 * 32_000  # all would be 40 * 32,000 bytes
        assert layer.num_batches_tracked == 40


@pytest.mark.slow
def test_a_file_beyond_the_limit_of_memory(tmp_path: Path) -> None:
    """400 MB of a sparse file grow the process by its blocks of 8 MB, and no more.

    A block takes the parallel kernel, a small array the serial one: the first call here is as large as a block, or
    the compiler's memory (55 MB, if the cache on disk has no kernel) would count.
    """
    code = f"""
import re
import numpy as np
import numbanorm as nn
x = np.lib.format.open_memmap({str(tmp_path / "x.npy")!r}, "w+", np.float32, (1_600_000, 64))
x[-1] = 1_600_000
del x
nn.BatchNorm(64).fit(np.ones((40_000, 64), np.float32))
open("/proc/self/clear_refs", "w").write("5")
status = lambda name: int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = status("VmRSS")
layer = nn.BatchNorm(64).fit(np.load({str(tmp_path / "x.npy")!r}, mmap_mode="r"))
print(status("VmHWM") - before, *layer.running_mean[[0, -1]])
"""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc/self/clear_refs")
    extra, first, last = map(float, run(code).split())
    assert first == last == pytest.approx(1.0, abs=0.002)  # 1e-6 of the standard deviation, 1265
    assert extra < 30


# --- state ----------------------------------------------------------------------------------------------------------


def test_fit_starts_anew_and_partial_fit_continues() -> None:
    x, y = normal(0, (20, 3), np.float64), normal(1, (30, 3), np.float64) + 5
    layer = nn.BatchNorm(3)
    layer(x)
    assert layer.fit([x]).partial_fit(y) is layer
    assert layer.num_batches_tracked == 2
    assert_exact(layer, np.concatenate([x, y]))
    assert_exact(layer.fit([y]), y)
    assert layer.num_batches_tracked == 1


def test_training_calls_in_between_are_lost() -> None:
    x, y = normal(0, (20, 3), np.float64), normal(1, (30, 3), np.float64)
    layer = nn.BatchNorm(3).fit([x])
    layer(y + 100)
    assert (np.abs(layer.running_mean) > 5).all()
    assert_exact(layer.partial_fit(y), np.concatenate([x, y]))


def test_inference_and_other_parameters_leave_the_moments() -> None:
    x = normal(0, (20, 3), np.float64)
    layer = nn.BatchNorm(3).fit([x[:5]])
    layer.eval()(x)
    layer.load_state_dict({"weight": np.full(3, 2.0)}, strict=False)
    assert_exact(layer.partial_fit(x[5:]), x)


@pytest.mark.parametrize("how", ["load_state_dict", "reset_running_stats"])
def test_other_running_statistics_forget_the_moments(how: str) -> None:
    x, y = normal(0, (20, 3), np.float64), normal(1, (30, 3), np.float64)
    layer = nn.BatchNorm(3).fit([x])
    if how == "load_state_dict":
        layer.load_state_dict(nn.BatchNorm(3).state_dict())
    else:
        layer.reset_running_stats()
    assert layer.moments is None
    assert_exact(layer.partial_fit(y), y)
    assert layer.num_batches_tracked == 1


def test_moments_saved_and_assigned(tmp_path: Path) -> None:
    x = normal(0, (20, 3), np.float64) + 1e6
    first = nn.BatchNorm(3).fit([x[:7], x[7:9]])
    first.moments.save(tmp_path / "m.npz")
    second = nn.BatchNorm(3).load_state_dict(first.state_dict())
    second.moments = nn.Moments.load(tmp_path / "m.npz")
    second.partial_fit(x[9:])
    assert second.num_batches_tracked == 3
    assert_exact(second, x)


def test_the_moments_are_not_views() -> None:
    layer = nn.BatchNorm(3).fit([normal(0, (20, 3), np.float64)])
    layer.running_mean[...] = 7
    assert (layer.moments.mean < 1).all()


def test_training_continues_after_fit() -> None:
    x = normal(0, (20, 3), np.float64)
    layer = nn.BatchNorm(3, momentum=None).fit([x] * 3)
    mean = layer.running_mean.copy()
    layer(x + 4)
    np.testing.assert_allclose(layer.running_mean, mean + 1, 1e-12)  # the fourth batch: a share of a quarter
    assert layer.num_batches_tracked == 4


def test_channels_of_which_nothing_counts() -> None:
    x = normal(0, (20, 3), np.float64)
    mask = np.array([True, False, True])
    layer = nn.BatchNorm(3).fit(x, mask=mask)
    assert (layer.running_mean[1], layer.running_var[1]) == (0.0, 1.0)
    assert_exact(layer.partial_fit(x[:, :] + 1, mask=~mask), x + np.array([0.0, 1.0, 0.0]))


def test_empty_batches_do_not_count() -> None:
    x = normal(0, (20, 3), np.float64)
    layer = nn.BatchNorm(3).fit([x[:0], x, x[:0]])
    assert_exact(layer, x)
    assert layer.num_batches_tracked == 1
    before = snapshot(layer)
    layer.partial_fit(x[:0]).partial_fit(x, mask=np.zeros(3, bool))
    assert snapshot(layer) == before


# --- errors: nothing has changed ------------------------------------------------------------------------------------

GOOD = np.ones((4, 3))
WRONG: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "no batches": ([], None, ValueError, "batches: expected one or more elements that count, got none"),
    "nothing in them": ([GOOD[:0]], None, ValueError, "batches: expected one or more elements that count, got none"),
    "nothing counts": (GOOD, np.zeros(3, bool), ValueError, "batches: expected one or more elements that count"),
    "no iterable": (3, None, TypeError, "batches: expected an array, or an iterable of one for each batch, got int"),
    "a bad batch": ([GOOD, np.ones((4, 2))], None, ValueError, "batches: batch 1: x: expected 3 channels along axis 1"),
    "one dimension": ([GOOD, np.ones(3)], None, ValueError, "batches: batch 1: "),
    "strings": ([GOOD, np.array([["a"] * 3])], None, TypeError, "batches: batch 1: x: expected float16, bfloat16"),
    "no array": ([GOOD, {}], None, ValueError, "batches: batch 1: x: expected "),
    "one mask": ([GOOD, GOOD], np.ones(3, bool), TypeError, "mask: expected an iterable of one mask for each batch"),
    "no mask": ([GOOD, GOOD], 3, TypeError, "mask: expected an array, or an iterable of one for each batch, got int"),
    "few masks": ([GOOD, GOOD], [None], ValueError, "mask: expected one for each batch, got 1"),
    "many masks": ([GOOD], [None, None], ValueError, "mask: expected one for each batch, got more"),
    "a float mask": ([GOOD], [GOOD], TypeError, "batches: batch 0: mask: expected dtype bool"),
    "a mask of another shape": (GOOD, np.ones(4, bool), ValueError, "mask: expected a shape that broadcasts to"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case: str) -> None:
    batches, mask, kind, message = WRONG[case]
    layer = nn.BatchNorm(3).fit([GOOD, 2 * GOOD])
    before = snapshot(layer)
    with pytest.raises(kind, match=re.escape(message)):
        layer.fit(batches, mask=mask)
    assert snapshot(layer) == before


def test_errors_of_the_source_pass_through() -> None:
    def batches() -> Iterator[np.ndarray]:
        yield GOOD
        raise OSError("gone")

    layer = nn.BatchNorm(3).fit([GOOD])
    before = snapshot(layer)
    with pytest.raises(OSError, match="gone"):
        layer.fit(batches())
    assert snapshot(layer) == before


def test_errors_of_partial_fit() -> None:
    layer = nn.BatchNorm(3).fit([GOOD])
    before = snapshot(layer)
    with pytest.raises(ValueError, match="x: expected 3 channels"):
        layer.partial_fit(np.ones((4, 2)))
    with pytest.raises(TypeError, match="mask: expected dtype bool"):
        layer.partial_fit(GOOD, mask=GOOD)
    assert snapshot(layer) == before


def test_without_running_statistics() -> None:
    layer = nn.BatchNorm(3, track_running_stats=False)
    for call in (layer.fit, layer.partial_fit):
        with pytest.raises(ValueError, match="expected a layer with track_running_stats=True"):
            call(GOOD)
