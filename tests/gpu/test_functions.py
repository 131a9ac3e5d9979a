"""Every norm through the public functions on a GPU, over the full grid of shapes, against extended precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from gradients import backward, error_of_sum, forward
from gradients import expected as expected_gradients
from reference import ARRANGEMENTS, error, normal
from tolerances import FLOAT32, FLOAT32_HARD, FLOAT64
from training_tolerances import GRADIENT_FLOAT32, GRADIENT_FLOAT64, SUM_FLOAT32

import numbanorm as nn

pytestmark = pytest.mark.gpu

WIDTHS = [1, 2, 7, 32, 33, 64, 100, 128, 255, 256, 768, 1000, 1024, 1536, 2048, 3000, 4096, 5120, 8192, 12345, 16384]
WIDE = [32768, 65536, 100000, 131072, 262144]
HALVES = {"float16": 5e-4, "bfloat16": 4e-3}
"""Half a unit in the last place, as a share of the output's scale."""
GROUPS = 6

every_norm = pytest.mark.parametrize("name", ARRANGEMENTS)


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16) if name == "bfloat16" else np.dtype(name)


def affine(name: str, x: np.ndarray) -> dict[str, np.ndarray]:
    how = ARRANGEMENTS[name]
    return {n: normal(i + 1, how.shape_of(x, GROUPS)) for i, n in enumerate(how.affine)}


def placed(name: str, values: np.ndarray) -> np.ndarray:
    return ARRANGEMENTS[name].place(values)


def check_forward(library: Any, name: str, values: np.ndarray, tolerance: float, eps: float = 1e-5) -> None:
    """The output must be the standardized rows of `values`, times weight plus bias."""
    how = ARRANGEMENTS[name]
    groups = len(values)
    x = placed(name, values)
    y = library.get(how.call(library.put(x), groups, eps=eps))
    assert y.dtype == x.dtype
    exact = how.expected(values.astype(reference.LONG), eps)
    assert error(how.gather(y, groups).astype(np.float64), exact) <= tolerance


class TestForward:
    @every_norm
    @pytest.mark.parametrize("width", WIDTHS + WIDE)
    def test_widths(self, library: Any, name: str, width: int) -> None:
        if width == 1 and ARRANGEMENTS[name].norm in ("batch", "instance"):
            pytest.skip("a channel must have more than one value")
        groups = 2 if width in WIDE else GROUPS
        eps = 1.0 if width == 1 else 1e-5
        check_forward(library, name, normal(width, (groups, width)) + np.float32(0.5), FLOAT32, eps)

    @every_norm
    @pytest.mark.parametrize("width", [64, 1000, 4096, 65536])
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
    def test_dtypes(self, library: Any, name: str, width: int, dtype: str) -> None:
        values = normal(width, (2, width), np.float64).astype(dtype_of(dtype))
        check_forward(library, name, values, HALVES.get(dtype, FLOAT64))

    @every_norm
    @pytest.mark.parametrize("width", [100, 1024, 16384, 65536])
    @pytest.mark.parametrize("mean", [1e4, 1e6])
    def test_large_means(self, library: Any, name: str, width: int, mean: float) -> None:
        check_forward(library, name, (normal(width, (4, width), np.float64) + mean).astype(np.float32), FLOAT32_HARD)

    @every_norm
    def test_many_groups(self, library: Any, name: str) -> None:
        """More than 2**16 blocks."""
        check_forward(library, name, normal(0, (70_002, 24)), FLOAT32)

    @every_norm
    @pytest.mark.parametrize("width", [64, 1000, 20000])
    def test_weights(self, library: Any, name: str, width: int) -> None:
        x = placed(name, normal(width, (GROUPS, width)))
        options = affine(name, x)
        ours = ARRANGEMENTS[name].call(
            library.put(x), GROUPS, **{n: library.put(a) for n, a in options.items()}, return_stats=True
        )
        theirs = ARRANGEMENTS[name].call(x.astype(np.float64), GROUPS, **options, return_stats=True)
        for a, b in zip(ours, theirs, strict=True):
            assert error(library.get(a), b) <= FLOAT32_HARD

    @pytest.mark.parametrize("name", [name for name, how in ARRANGEMENTS.items() if how.centred])
    @pytest.mark.parametrize("width", [100, 1024, 20000])
    @pytest.mark.parametrize("share", [0.5, 0.01])
    def test_masks(self, library: Any, name: str, width: int, share: float) -> None:
        x = placed(name, normal(width, (GROUPS, width)))
        mask = np.random.default_rng(width).random(x.shape) < share
        ours = ARRANGEMENTS[name].call(library.put(x), GROUPS, mask=library.put(mask))
        theirs = ARRANGEMENTS[name].call(x.astype(np.float64), GROUPS, mask=mask)
        assert error(library.get(ours), theirs) <= FLOAT32_HARD

    def test_arrays_come_back(self, each_library: Any) -> None:
        x = each_library.put(normal(0, (64, 768)))
        out = each_library.put(np.zeros((64, 768), np.float32))
        y, mean, rstd = nn.layer_norm(x, 768, out=out, return_stats=True)
        assert y is out
        assert type(mean) is type(rstd) is type(nn.layer_norm(x, 768))
        assert error(each_library.get(y), reference.layer_norm(normal(0, (64, 768)), (1,)).y) <= FLOAT32

    def test_strides(self, library: Any) -> None:
        if library.name not in ("torch", "cupy"):
            pytest.skip("needs an array that can be sliced and transposed")
        whole = normal(0, (40, 30, 64))
        x = library.put(whole)
        views = [lambda a: a[:, ::2], lambda a: a[..., ::2], lambda a: a.transpose(0, 1), lambda a: a.swapaxes(1, 2)]
        if library.name == "cupy":
            views[2] = lambda a: a.transpose(1, 0, 2)
        for view in views:
            theirs = whole.swapaxes(0, 1) if view is views[2] else view(whole)
            expected = reference.layer_norm(theirs, (2,)).y
            assert error(library.get(nn.layer_norm(view(x), theirs.shape[2])), expected) <= FLOAT32

    @pytest.mark.huge
    def test_2_to_the_31_elements(self, library: Any) -> None:
        """Rows beyond 2**31 elements; only the first and the last are compared."""
        if library.name != "torch":
            pytest.skip("needs torch, to make the array on the device")
        import torch

        rows, width = 2**31 // 4096 + 3, 4096
        if torch.cuda.mem_get_info()[0] < 3 * 2 * rows * width:
            pytest.skip("needs 13 GB of device memory")
        x = torch.randn(rows, width, device="cuda", dtype=torch.float16)
        y = nn.layer_norm(x, width)
        for part in (slice(0, 2), slice(rows - 2, rows)):
            exact = reference.layer_norm(library.get(x[part]).astype(np.float64), (1,)).y
            assert error(library.get(y[part]).astype(np.float64), exact) <= HALVES["float16"]


class TestBackward:
    def check(self, library: Any, name: str, x: np.ndarray, dy: np.ndarray, tolerance: float, **options: Any) -> None:
        weight = affine(name, x)["weight"].astype(x.dtype)
        exact = expected_gradients(name, dy, x, GROUPS, weight, **options)
        own = {n: library.put(a) for n, a in options.items()}
        _, mean, rstd = forward(name, library.put(x), GROUPS, eps=1e-5, **own)
        got = backward(name, library.put(dy), library.put(x), GROUPS, mean, rstd, library.put(weight), **own)
        dx, dweight, dbias = (None if a is None else library.get(a) for a in got)
        assert error(dx.astype(np.float64), exact.dx.astype(np.float64)) <= tolerance
        for ours, theirs, term in zip((dweight, dbias), (exact.dweight, exact.dbias), exact.terms, strict=True):
            if ours is None:
                continue
            if x.dtype.itemsize == 2:  # one rounding to the dtype of the weight
                assert error(ours.astype(np.float64), theirs.astype(np.float64)) <= tolerance
            else:
                assert error_of_sum(ours, theirs, term, exact.count) <= max(SUM_FLOAT32, tolerance)

    @every_norm
    @pytest.mark.parametrize("width", [7, 33, 64, 100, 256, 768, 1000, 1024, 2048, 4096, 8192, 12345, 16384, 65536])
    def test_widths(self, library: Any, name: str, width: int) -> None:
        x, dy = (placed(name, normal(seed, (GROUPS, width))) for seed in (1, 2))
        self.check(library, name, x, dy, GRADIENT_FLOAT32)

    @every_norm
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
    def test_dtypes(self, library: Any, name: str, dtype: str) -> None:
        x, dy = (placed(name, normal(seed, (GROUPS, 1000), np.float64).astype(dtype_of(dtype))) for seed in (1, 2))
        self.check(library, name, x, dy, HALVES.get(dtype, GRADIENT_FLOAT64))

    @pytest.mark.parametrize("name", [name for name, how in ARRANGEMENTS.items() if how.centred])
    @pytest.mark.parametrize("width", [100, 1024])
    def test_masks(self, library: Any, name: str, width: int) -> None:
        x, dy = (placed(name, normal(seed, (GROUPS, width))) for seed in (1, 2))
        self.check(library, name, x, dy, GRADIENT_FLOAT32, mask=np.random.default_rng(width).random(x.shape) < 0.5)

    @every_norm
    def test_many_groups(self, library: Any, name: str) -> None:
        """dx of a few rows of many, and the sums over all of them."""
        x, dy = (placed(name, normal(seed, (70_002, 24))) for seed in (1, 2))
        _, mean, rstd = forward(name, x.astype(np.float64), 70_002, eps=1e-5)
        theirs = backward(name, dy.astype(np.float64), x.astype(np.float64), 70_002, mean, rstd)
        _, mean, rstd = forward(name, library.put(x), 70_002, eps=1e-5)
        ours = backward(name, library.put(dy), library.put(x), 70_002, mean, rstd)
        for a, b in zip(ours, theirs, strict=True):
            if b is not None:
                assert error(library.get(a), b) <= 1e-5
