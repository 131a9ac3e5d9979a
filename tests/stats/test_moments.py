"""Moments: (count, mean, M2) of any axes, in any split."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import LONG, normal
from reference import moments as exact
from tolerances import MOMENTS, STATISTICS_FLOAT32

import numbanorm as nn
from numbanorm import Moments


def check(
    m: Moments, x: np.ndarray, axes: tuple[int, ...], mask: np.ndarray | None = None, rtol: float = MOMENTS
) -> None:
    """Compare with two passes in longdouble; the mean's error is measured in standard deviations."""
    count, mean, m2 = (a.squeeze(axes) for a in exact(x, axes, mask))
    counted = np.maximum(count, 1)
    std = np.sqrt(m2 / counted)
    assert np.shape(m.mean) == mean.shape
    assert np.asarray(m.mean).dtype == np.float64
    np.testing.assert_array_equal(np.broadcast_to(m.count, count.shape), count)
    # Beside rounding of the terms, the mean itself is a float64.
    assert (np.abs(m.mean - mean) <= rtol * std + 4e-16 * np.abs(mean)).all()
    np.testing.assert_allclose(np.asarray(m.var(), LONG) * counted, np.where(count > 0, m2, np.nan), rtol, 0)


AXES = [axes for k in range(1, 5) for axes in combinations(range(4), k)]


class TestAxes:
    SHAPE = (5, 6, 7, 40)

    @pytest.mark.parametrize("axes", AXES, ids=str)
    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    def test_every_set(self, axes: tuple[int, ...], dtype: Any) -> None:
        x = (normal(0, self.SHAPE, np.float64) + 3).astype(dtype)
        rtol = MOMENTS if dtype == np.float64 else STATISTICS_FLOAT32
        check(Moments.of(x, axes), x, axes, rtol=rtol)
        check(Moments.of(x, tuple(a - 4 for a in axes)), x, axes, rtol=rtol)

    @pytest.mark.parametrize("axes", AXES, ids=str)
    def test_strides(self, axes: tuple[int, ...]) -> None:
        x = normal(0, (5, 7, 40, 12), np.float64)[::-1, :, :, ::2].transpose(0, 3, 1, 2)
        check(Moments.of(x, axes), x, axes)
        check(Moments.of(np.asfortranarray(x), axes), x, axes)
        turned = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        check(Moments.of(turned, axes), x, axes)

    @pytest.mark.parametrize("axes", AXES, ids=str)
    @pytest.mark.parametrize("mask_shape", [(5, 6, 7, 40), (5, 1, 1, 1), (40,), (6, 1, 1), (1, 1, 7, 1)], ids=str)
    def test_masks(self, axes: tuple[int, ...], mask_shape: tuple[int, ...]) -> None:
        x = normal(0, self.SHAPE, np.float64) + 3
        mask = np.random.default_rng(1).random(mask_shape) < 0.5
        x[~np.broadcast_to(mask, x.shape)] = np.nan
        check(Moments.of(x, axes, mask=mask), x, axes, mask)

    def test_all_axes_by_default(self) -> None:
        x = normal(0, self.SHAPE, np.float64)
        m = Moments.of(x)
        check(m, x, (0, 1, 2, 3))
        assert m.count == x.size
        assert np.ndim(m.mean) == np.ndim(m.var()) == np.ndim(m.std()) == 0

    def test_one_axis_as_an_integer(self) -> None:
        x = normal(0, self.SHAPE, np.float64)
        check(Moments.of(x, 2), x, (2,))
        check(Moments.of(x, -1), x, (3,))
        check(Moments.of(x, np.int64(0)), x, (0,))

    def test_scalar_and_vector(self) -> None:
        assert Moments.of(3.5).mean == 3.5
        assert Moments.of(3.5).count == 1
        assert Moments.of([1.0, 2.0, 6.0]).mean == 3
        assert Moments.of([1.0, 2.0, 6.0]).var() == pytest.approx(14 / 3, rel=1e-15)


def test_ddof() -> None:
    x = normal(0, (4, 30), np.float64)
    m = Moments.of(x, 1)
    for ddof in (0, 1, 1.5, 29):
        np.testing.assert_allclose(m.var(ddof), x.var(1, ddof=ddof), 1e-13)
        np.testing.assert_allclose(m.std(ddof=ddof), x.std(1, ddof=ddof), 1e-13)
    for ddof in (30, 31):
        assert np.isnan(m.var(ddof)).all()
    one = Moments.of(x[:, :1], 1)
    np.testing.assert_array_equal(one.var(), np.zeros(4))
    assert np.isnan(one.var(ddof=1)).all()


class TestSplits:
    @given(data=st.data())
    def test_any_split(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(1, 300))
        cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=6)))
        mean = data.draw(st.sampled_from([0.0, 1.0, -1e3]))
        width = data.draw(st.sampled_from([(), (1,), (3,), (3, 2)]))
        x = normal(data.draw(st.integers(0, 9)), (n, *width), np.float64) + mean
        parts = [x[a:b] for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
        mask = None
        masks: list[np.ndarray | None] = [None] * len(parts)
        if data.draw(st.booleans()):
            mask = np.random.default_rng(n).random(x.shape) < data.draw(st.sampled_from([0.1, 0.7]))
            masks = [mask[a:b] for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
        axes = (0,)
        updated = Moments.of(parts[0], axes, mask=masks[0])
        for part, counts in zip(parts[1:], masks[1:], strict=True):
            assert updated.update(part, mask=counts) is updated
        check(updated, x, axes, mask)
        merged = [Moments.of(part, axes, mask=counts) for part, counts in zip(parts, masks, strict=True)]
        while len(merged) > 1:  # in any order
            i = data.draw(st.integers(0, len(merged) - 1))
            one = merged.pop(i)
            j = data.draw(st.integers(0, len(merged) - 1))
            merged[j] = one + merged[j]
        check(merged[0], x, axes, mask)

    @pytest.mark.parametrize("batch", [1, 7, 1000])
    def test_a_mean_of_1e6(self, batch: int) -> None:
        x = (normal(0, (3000, 4), np.float64) + 1e6).astype(np.float32)
        m = Moments.of(x[:batch], 0)
        for start in range(batch, len(x), batch):
            m.update(x[start : start + batch])
        count, mean, m2 = exact(x, (0,))
        assert m.count == 3000
        assert float(np.abs(m.mean - mean).max()) < 1e-6
        np.testing.assert_allclose(m.var(), np.asarray(m2 / count, float)[0], 1e-6)

    @pytest.mark.parametrize("batch", [1, 2, 7, 100, 1000])
    @pytest.mark.parametrize("axes", [(0,), (0, 2), None])
    def test_a_mean_of_1e6_in_float64(self, batch: int, axes: Any) -> None:
        """Merged means that are rounded to a float64 would cost the variance 1e-10 and drift by 1e-9."""
        x = normal(0, (1500, 2, 3), np.float64) + 1e6
        parts = [Moments.of(x[i : i + batch], axes) for i in range(0, len(x), batch)]
        m = parts[-1]
        for part in parts[-2::-1]:
            m = m + part
        check(m, x, axes or (0, 1, 2))
        assert (np.abs(m.mean - exact(x, axes or (0, 1, 2))[1].squeeze(axes)) <= 0.51 * np.spacing(1e6)).all()

    def test_masks_at_1e6_in_float64(self) -> None:
        x = normal(0, (1500, 4), np.float64) + 1e6
        mask = np.random.default_rng(0).random(x.shape) < 0.3
        x[5, 1], mask[5, 1] = np.nan, False
        m = Moments.of(x[:700], 0, mask=mask[:700]).update(x[700:], mask=mask[700:])
        check(m, x, (0,), mask)

    def test_order_does_not_matter(self) -> None:
        x = normal(0, (90, 5), np.float64) * 10.0 ** np.arange(90)[:, None].clip(0, 6)
        parts = [Moments.of(x[i::3], 0) for i in range(3)]
        forwards = parts[0] + parts[1] + parts[2]
        backwards = parts[2] + (parts[1] + parts[0])
        np.testing.assert_allclose(forwards.var(), backwards.var(), MOMENTS)
        check(forwards, x, (0,))

    def test_addition_leaves_both_as_they_are(self) -> None:
        x = normal(0, (20, 3), np.float64)
        a, b = Moments.of(x[:5], 0), Moments.of(x[5:], 0)
        before = a.count, a.mean.copy(), a.var().copy(), b.count, b.mean.copy(), b.var().copy()
        total = a + b
        total.update(x)
        for now, then in zip((a.count, a.mean, a.var(), b.count, b.mean, b.var()), before, strict=True):
            np.testing.assert_array_equal(now, then)
        check(total, np.concatenate([x, x]), (0,))

    def test_nothing_and_something(self) -> None:
        x = normal(0, (20, 3), np.float64)
        empty = Moments.of(x[:0], 0)
        assert empty.count == 0
        np.testing.assert_array_equal(empty.mean, np.zeros(3))
        assert np.isnan(empty.var()).all()
        full = Moments.of(x, 0)
        for m in (empty + full, full + empty, Moments.of(x, 0).update(x[:0])):
            assert m.count == 20
            np.testing.assert_array_equal(m.mean, full.mean)
            np.testing.assert_array_equal(m.var(), full.var())
        assert (empty + empty).count == 0

    def test_an_infinite_batch_does_not_spoil_others(self) -> None:
        x = normal(0, (20, 3), np.float64)
        spoiled = x.copy()
        spoiled[4, 1] = np.inf
        m = Moments.of(spoiled[:10], 0).update(spoiled[10:])
        clean = Moments.of(x[:10], 0).update(x[10:])
        np.testing.assert_array_equal(np.delete(m.mean, 1), np.delete(clean.mean, 1))
        np.testing.assert_array_equal(np.delete(m.var(), 1), np.delete(clean.var(), 1))
        assert not np.isfinite(m.mean[1])

    def test_masked_and_unmasked_batches(self) -> None:
        x = normal(0, (30, 4), np.float64)
        mask = np.ones((30, 4), bool)
        mask[10:20] = np.random.default_rng(0).random((10, 4)) < 0.5
        m = Moments.of(x[:10], 0).update(x[10:20], mask=mask[10:20]).update(x[20:])
        check(m, x, (0,), mask)
        assert m.count.shape == (4,)

    def test_kept_axes_set_the_shape(self) -> None:
        """Batches of other sizes along the reduced axes."""
        x, y = normal(0, (4, 3, 10), np.float64), normal(1, (2, 3, 25), np.float64)
        m = Moments.of(x, (0, 2)).update(y)
        both = np.concatenate([x.transpose(1, 0, 2).reshape(3, -1), y.transpose(1, 0, 2).reshape(3, -1)], axis=1)
        check(m, both, (1,))

    def test_large_counts_do_not_overflow(self) -> None:
        m = Moments.of(np.array([0.0, 2.0]))
        for _ in range(40):
            m = m + m
        assert m.count == 2**41
        assert m.mean == 1
        assert m.var() == pytest.approx(1, rel=1e-14)


class TestHard:
    @pytest.mark.parametrize("n", [1000, 65536])
    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("mean", [1e6, -1e6])
    def test_large_mean(self, n: int, axis: int, mean: float) -> None:
        x = (normal(0, (6, n), np.float64) + mean).astype(np.float32)
        x = x if axis == 1 else np.ascontiguousarray(x.T)
        count, exact_mean, m2 = exact(x, (axis,))
        m = Moments.of(x, axis)
        np.testing.assert_allclose(m.var(ddof=1), np.asarray(m2 / (count - 1), float).squeeze(), STATISTICS_FLOAT32)
        assert float(np.abs(m.mean - exact_mean.squeeze()).max()) <= 1e-6

    @pytest.mark.parametrize("constant", [0.1, 1e6, 16777217.0, 1e300])
    def test_constant(self, constant: float) -> None:
        m = Moments.of(np.full((5, 1000), constant), 1)
        np.testing.assert_array_equal(m.mean, np.full(5, constant))
        np.testing.assert_array_equal(m.var(), np.zeros(5))
        m = Moments.of(np.full(3, constant)).update(np.full(1000, constant)) + Moments.of(np.full(7, constant))
        assert m.mean == constant
        assert m.var() == 0

    @pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.bool_])
    def test_narrow_integers(self, dtype: Any) -> None:
        x = np.random.default_rng(0).integers(0, 2 if dtype == np.bool_ else 120, (50, 2000)).astype(dtype)
        for axis in (0, 1):
            check(Moments.of(x, axis), x.astype(np.float64), (axis,), rtol=STATISTICS_FLOAT32)

    @pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64])
    def test_wide_integers(self, dtype: Any) -> None:
        x = np.random.default_rng(0).integers(0, 2**31, (50, 2000)).astype(dtype)
        for axis in (0, 1):
            check(Moments.of(x, axis), x, (axis,))

    def test_uint64_beyond_int64(self) -> None:
        x = np.array([2**63, 2**63 + 2**20, 2**64 - 2**20], np.uint64)
        assert Moments.of(x).mean == pytest.approx(float(sum(map(int, x)) / 3), rel=1e-15)

    def test_same_bits_on_any_number_of_threads(self) -> None:
        x = normal(0, (3, 200_000))
        nn.set_num_threads(1)
        one = [Moments.of(x, axes) for axes in (None, 0, 1)]
        try:
            nn.set_num_threads(2)
        except ValueError:
            pytest.skip("needs 2 threads")
        for m, axes in zip(one, (None, 0, 1), strict=True):
            other = Moments.of(x, axes)
            np.testing.assert_array_equal(other.mean, m.mean)
            np.testing.assert_array_equal(other.var(), m.var())


class TestFiles:
    CASES = (
        (None, False),
        (0, False),
        ((0, 2), False),
        ((0, 1), True),
    )

    @pytest.mark.parametrize(("axis", "masked"), CASES)
    def test_round_trip(self, axis: Any, masked: bool, tmp_path: Path) -> None:
        x = normal(0, (4, 5, 6), np.float64) + 1e6
        mask = np.random.default_rng(0).random(x.shape) < 0.5 if masked else None
        m = Moments.of(x, axis, mask=mask)
        path = tmp_path / "moments"
        m.save(path)
        assert [p.name for p in tmp_path.iterdir()] == ["moments"]  # of exactly this name, and no scratch file
        back = Moments.load(path)
        for a, b in ((back.count, m.count), (back.mean, m.mean), (back.var(), m.var())):
            np.testing.assert_array_equal(a, b)
            assert np.shape(a) == np.shape(b)
        np.testing.assert_array_equal(back.update(x).var(), m.update(x).var())
        np.testing.assert_array_equal((back + m).mean, (m + back).mean)

    def test_str_paths_and_overwriting(self, tmp_path: Path) -> None:
        path = str(tmp_path / "m.npz")
        Moments.of([1.0, 2.0]).save(path)
        Moments.of([5.0]).save(path)
        assert Moments.load(path).mean == 5

    def test_a_failed_save_keeps_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "m.npz"
        Moments.of([1.0, 2.0]).save(path)

        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(np, "savez", full)
        with pytest.raises(OSError, match="no space left"):
            Moments.of([5.0]).save(path)
        assert Moments.load(path).mean == 1.5
        assert [p.name for p in tmp_path.iterdir()] == ["m.npz"]

    def test_files_without_a_low_part_of_the_mean(self, tmp_path: Path) -> None:
        """Version 0.1.0 wrote such."""
        np.savez(tmp_path / "m.npz", count=np.int64(4), mean=np.ones(3), m2=np.full(3, 8.0), axis=np.array([0]))
        m = Moments.load(tmp_path / "m.npz").update(np.full((4, 3), 3.0))
        np.testing.assert_array_equal(m.mean, np.full(3, 2.0))
        np.testing.assert_array_equal(m.var(), np.full(3, 2.0))

    def test_readable_without_numbanorm(self, tmp_path: Path) -> None:
        path = tmp_path / "m.npz"
        Moments.of([[1.0, 3.0], [2.0, 6.0]], axis=1).save(path)
        with np.load(path, allow_pickle=False) as file:
            np.testing.assert_array_equal(file["mean"], [2, 4])
            np.testing.assert_array_equal(file["m2"], [2, 8])
            assert file["count"] == 2

    @staticmethod
    def garbage() -> dict[str, bytes]:
        good = io.BytesIO()
        np.savez(good, count=np.int64(2), mean=np.zeros(3), m2=np.zeros(3))

        def npz(**arrays: Any) -> bytes:
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)
            return buffer.getvalue()

        def archive(**members: bytes) -> bytes:
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as file:
                for name, data in members.items():
                    file.writestr(name, data)
            return buffer.getvalue()

        npy = io.BytesIO()
        np.save(npy, np.zeros(3))
        two, three = np.int64(2), np.zeros(3)
        return {
            "empty": b"",
            "text": b"no moments at all",
            "binary": bytes(range(256)) * 10,
            "truncated": good.getvalue()[:-100],
            "cut in half": good.getvalue()[: len(good.getvalue()) // 2],
            "a pickle": pickle.dumps({"count": 2}),
            "one array": npy.getvalue(),
            "other names": npz(a=three),
            "without m2": npz(count=two, mean=three),
            "other shapes": npz(count=two, mean=three, m2=np.zeros(4)),
            "count of another shape": npz(count=np.zeros(4, np.int64), mean=three, m2=three),
            "float count": npz(count=np.float64(2), mean=three, m2=three),
            "float32": npz(count=two, mean=np.zeros(3, np.float32), m2=three),
            "a low part of another shape": npz(count=two, mean=three, m2=three, mean_low=np.zeros(2)),
            "a low part of another dtype": npz(count=two, mean=three, m2=three, mean_low=two),
            "objects": npz(count=two, mean=np.array([None] * 3), m2=three),
            "members that are no arrays": archive(**{"count.npy": b"x", "mean.npy": b"y", "m2.npy": b"z"}),
        }

    @pytest.mark.parametrize(
        "kind",
        [
            "empty",
            "text",
            "binary",
            "truncated",
            "cut in half",
            "a pickle",
            "one array",
            "other names",
            "without m2",
            "other shapes",
            "count of another shape",
            "float count",
            "float32",
            "a low part of another shape",
            "a low part of another dtype",
            "objects",
            "members that are no arrays",
        ],
    )
    def test_garbage(self, kind: str, tmp_path: Path) -> None:
        path = tmp_path / "garbage"
        path.write_bytes(self.garbage()[kind])
        with pytest.raises(ValueError, match=r"path: expected a file written by Moments\.save, got .*garbage"):
            Moments.load(path)

    def test_pickles_are_refused(self, tmp_path: Path) -> None:
        """A pickle could run code: it must not be opened at all."""
        marker = tmp_path / "ran"

        class Evil:
            def __reduce__(self) -> Any:
                return (os.mkdir, (str(marker),))

        objects = np.empty(3, object)
        objects[:] = Evil()
        buffer = io.BytesIO()
        np.savez(buffer, count=np.int64(2), mean=objects, m2=np.zeros(3))
        (tmp_path / "evil.npz").write_bytes(buffer.getvalue())
        (tmp_path / "evil").write_bytes(pickle.dumps(Evil()))
        for name in ("evil.npz", "evil"):
            with pytest.raises(ValueError, match="path: "):
                Moments.load(tmp_path / name)
        assert not marker.exists()

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            Moments.load(tmp_path / "none.npz")

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            Moments.of([1.0]).save(tmp_path / "none" / "m.npz")


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": np.ones((4, 3), complex)}, TypeError, "x: .*complex128"),
    ({"x": "words"}, TypeError, "x: "),
    ({"x": np.ma.masked_array([[1.0, 2.0, 3.0]])}, TypeError, "x: .*masked array"),
    ({"x": np.ones((4, 4))}, ValueError, r"x: .*\(3,\).*\(4,\)"),
    ({"x": np.ones(3)}, ValueError, "x: |axis: "),
    ({"x": np.ones((4, 3, 2))}, ValueError, r"x: .*\(3,\).*\(3, 2\)"),
    ({"x": np.ones((4, 3)), "mask": np.ones((4, 3))}, TypeError, "mask: expected dtype bool"),
    ({"x": np.ones((4, 3)), "mask": np.ones((4, 2), bool)}, ValueError, r"mask: .*\(4, 3\), got \(4, 2\)"),
]


@pytest.mark.parametrize(("given", "error", "message"), WRONG)
@pytest.mark.parametrize("masked", [False, True])
def test_failed_update_changes_nothing(
    given: dict[str, Any], error: type[Exception], message: str, masked: bool
) -> None:
    x = normal(0, (9, 3), np.float64)
    m = Moments.of(x, 0, mask=x > -1 if masked else None)
    before = np.copy(m.count), m.mean.copy(), m.var().copy()
    with pytest.raises(error, match=message):
        m.update(**given)
    for now, then in zip((m.count, m.mean, m.var()), before, strict=True):
        np.testing.assert_array_equal(now, then)


WRONG_AXES = [
    ((4, 3), 2, ValueError, "axis: "),
    ((4, 3), -3, ValueError, "axis: "),
    ((4, 3), (0, 0), ValueError, "axis: "),
    ((4, 3), (1, -1), ValueError, "axis: "),
    ((4, 3), (), ValueError, "axis: "),
    ((4, 3), 1.0, TypeError, "axis: expected an integer, got float"),
    ((4, 3), "last", TypeError, "axis: expected an integer, got str"),
    ((4, 3), True, TypeError, "axis: expected an integer, got bool"),
]


@pytest.mark.parametrize(("shape", "axis", "error", "message"), WRONG_AXES)
def test_wrong_axes(shape: tuple[int, ...], axis: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Moments.of(np.ones(shape), axis)


def test_wrong_sums() -> None:
    m = Moments.of(np.ones((4, 3)), 0)
    for other in (3, None, "moments", np.ones(3)):
        with pytest.raises(TypeError):
            m + other
    with pytest.raises(ValueError, match=r"expected moments of shape \(3,\), got \(2,\)"):
        m + Moments.of(np.ones((4, 2)), 0)


def test_pickled_and_copied() -> None:
    m = Moments.of(normal(0, (9, 3), np.float64), 0)
    back = pickle.loads(pickle.dumps(m))
    np.testing.assert_array_equal(back.var(), m.var())
    back.update(np.ones((1, 3)))
    assert (back.count, m.count) == (10, 9)


def test_results_are_not_views() -> None:
    """What a user does with a mean must not change the moments."""
    m = Moments.of(normal(0, (9, 3), np.float64), 0)
    variance = m.var()
    expected = variance.copy()
    variance[...] = 7
    np.testing.assert_array_equal(m.var(), expected)


def test_repr() -> None:
    assert repr(Moments.of([1.0, 3.0])) == "Moments(count=2, mean=2.0, var=1.0)"
