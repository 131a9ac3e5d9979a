"""float16 and bfloat16: every conversion, every norm forward and backward, and no copy of the array in float32."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradients
import numba
import numpy as np
import pytest
import reference
from gradients import error_of_sum
from half_results import CALLS, PATTERNS, load_all_as_lanes, records_of, results_that_no_cpu_rounds
from numba import njit
from processes import SUPPORT
from reference import ARRANGEMENTS, LONG, normal
from tolerances import RUNNING_FLOAT32
from training_tolerances import HALF_NEAR_ZERO, HALF_ROUNDED_OTHERWISE, HALF_ULPS, SUM_FLOAT32

import numbanorm as nn
from numbanorm.cpu import dtypes, lanes

every_arrangement = pytest.mark.parametrize("name", ARRANGEMENTS)


@pytest.fixture(params=["float16", "bfloat16"])
def half(request: pytest.FixtureRequest) -> Any:
    """Run a test in both formats; bfloat16 where ml_dtypes is installed."""
    if request.param == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(np.float16)


# --- conversions ----------------------------------------------------------------------------------------------------


@njit
def load_all(records: np.ndarray, out: np.ndarray) -> None:
    for i in range(out.shape[0]):
        out[i] = dtypes.load(records, i)


@njit
def store_all(values: np.ndarray, records: np.ndarray) -> None:
    for i in range(values.shape[0]):
        dtypes.store(records, i, values[i])


@njit
def store_all_as_lanes(values: np.ndarray, records: np.ndarray) -> None:
    no = lanes.no_lanes(records)
    for i in range(0, values.shape[0], lanes.width_of(no)):
        lanes.store_lanes(lanes.load_lanes(no, values, i), records, i)


def loaded(bits: np.ndarray, half: np.dtype[Any]) -> np.ndarray:
    """Convert as the kernels do."""
    out = np.empty(bits.shape, np.float32)
    load_all(records_of(bits.view(half)), out)
    return out


def stored(values: np.ndarray, half: np.dtype[Any]) -> np.ndarray:
    bits = np.empty(values.shape, np.uint16)
    store_all(values, records_of(bits.view(half)))
    return bits


def elementwise(function: Callable[..., Any], result: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Turn one of the conversions between bits and float32 into one of arrays."""

    @njit
    def convert(source: np.ndarray, out: np.ndarray) -> None:
        for i in range(out.shape[0]):
            out[i] = function(source[i])

    def run(source: np.ndarray) -> np.ndarray:
        out = np.empty(source.shape, result)
        convert(source, out)
        return out

    return run


def same_float32(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Assert equal bits; a NaN may be any NaN."""
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    number = ~np.isnan(theirs)
    np.testing.assert_array_equal(ours.view(np.uint32)[number], theirs.view(np.uint32)[number])


def same_half(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Assert equal bits; a NaN may be any NaN."""
    ours_is_nan, theirs_is_nan = (np.isnan(a.astype(np.float32)) for a in (ours.view(theirs.dtype), theirs))
    np.testing.assert_array_equal(ours_is_nan, theirs_is_nan)
    np.testing.assert_array_equal(ours[~ours_is_nan], theirs.view(np.uint16)[~ours_is_nan])


def hard_float32(half: np.dtype[Any]) -> np.ndarray:
    """Return float32 values at and next to every half, every tie between two, and every limit; and random ones."""
    with np.errstate(invalid="ignore"):
        values = PATTERNS.view(half).astype(np.float32)
    finite = np.unique(values[np.isfinite(values)])
    assert len(finite) == 2 * (0x7C00 if half == np.float16 else 0x7F80) - 1  # -0 is 0
    # The largest half, and as far beyond it as the next would be: half way there begins infinity.
    beyond = finite[-1].astype(np.float64) + np.diff(finite[-2:].astype(np.float64))
    edges = np.concatenate([-beyond, finite.astype(np.float64), beyond])
    ties = ((edges[1:] + edges[:-1]) / 2).astype(np.float32)  # exact: one bit more than a half has
    centres = np.concatenate([finite, ties])
    near = [np.nextafter(centres, np.float32(end)) for end in (-np.inf, np.inf)]
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    tiny = np.array([0, 1, 2, 0x7FFFFF, 0x800000, 0x33000000, 0x33000001, 0x32FFFFFF], np.uint32)  # 2**-25 among them
    limits = np.array([0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF], np.uint32)
    both_signs = np.concatenate([tiny, limits, tiny | 0x80000000, limits | 0x80000000]).astype(np.uint32)
    return np.concatenate([centres, *near, bits.view(np.float32), both_signs.view(np.float32)])


def rounded(values: np.ndarray, half: np.dtype[Any]) -> np.ndarray:
    """Round as the standards say: NumPy's and ml_dtypes's own conversion."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return values.astype(half)


def generated(convert: Any, kind: Any) -> str:
    """Return LLVM's code of a conversion of one scalar."""
    compiled = numba.njit(lambda value: convert(value))
    compiled.compile((kind,))
    return "".join(compiled.inspect_llvm().values())


class TestConversions:
    """All 65,536 patterns in, and float32 values around every rounding boundary out."""

    def test_load(self, half: Any) -> None:
        with np.errstate(invalid="ignore"):
            same_float32(loaded(PATTERNS, half), PATTERNS.view(half).astype(np.float32))

    def test_load_as_lanes(self, half: Any) -> None:
        """What sums read: vectors of halves."""
        whole, part = np.empty((2, 1 << 16))
        load_all_as_lanes(records_of(PATTERNS.view(half)), whole, part)
        with np.errstate(invalid="ignore"):
            exact = PATTERNS.view(half).astype(np.float64)
        np.testing.assert_array_equal(whole, exact)  # NaN equals NaN; a sum with zeros has no sign of -0
        np.testing.assert_array_equal(part, exact)

    def test_store_of_every_half(self, half: Any) -> None:
        with np.errstate(invalid="ignore"):
            values = PATTERNS.view(half).astype(np.float32)
        bits = stored(values, half)
        number = ~np.isnan(values)
        np.testing.assert_array_equal(bits[number], PATTERNS[number])  # -0 stays -0, subnormals stay
        assert np.isnan(bits[~number].view(half).astype(np.float32)).all()
        np.testing.assert_array_equal(bits[~number] >> 15, PATTERNS[~number] >> 15)

    def test_store_rounds_to_nearest_even(self, half: Any) -> None:
        values = hard_float32(half)
        same_half(stored(values, half), rounded(values, half))

    def test_store_as_lanes(self, half: Any) -> None:
        """What outputs are: vectors, with subnormal numbers among others and without."""
        values = hard_float32(half)
        values = np.concatenate([values, np.random.default_rng(1).permutation(values)])
        values = values[: len(values) // 64 * 64]
        bits = np.empty(values.shape, np.uint16)
        store_all_as_lanes(values, records_of(bits.view(half)))
        same_half(bits, rounded(values, half))

    @pytest.mark.skipif(not dtypes.rounds_to_bfloat16(), reason="this CPU does not round to bfloat16 itself")
    def test_the_cpu_rounds_to_bfloat16(self) -> None:
        half = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
        values = np.zeros(64, np.float32)
        store_all_as_lanes(values, records_of(np.empty(64, half)))
        assert any("vcvtne2ps2bf16" in code for code in store_all_as_lanes.inspect_asm().values())

    def test_float16_by_integer_arithmetic(self) -> None:
        """What CPUs without the conversion use."""
        up = elementwise(dtypes.float16_bits_to_float32, np.float32)
        same_float32(up(PATTERNS), PATTERNS.view(np.float16).astype(np.float32))
        values = hard_float32(np.dtype(np.float16))
        down = elementwise(dtypes.float32_to_float16_bits, np.uint16)
        same_half(down(values), rounded(values, np.dtype(np.float16)))

    def test_bfloat16(self) -> None:
        ml_dtypes = pytest.importorskip("ml_dtypes")
        up = elementwise(dtypes.bfloat16_to_float32, np.float32)
        same_float32(up(PATTERNS), (PATTERNS.astype(np.uint32) << 16).view(np.float32))
        values = hard_float32(np.dtype(ml_dtypes.bfloat16))
        down = elementwise(dtypes.float32_to_bfloat16, np.uint16)
        same_half(down(values), rounded(values, np.dtype(ml_dtypes.bfloat16)))

    @pytest.mark.skipif(not dtypes.has_f16c(), reason="this CPU does not convert float16 itself")
    def test_the_cpu_converts_float16(self) -> None:
        """Where it can, the CPU's own instructions are used, and they agree with the integer arithmetic."""
        for convert, kind in ((dtypes.float16_to_float32, "uint16"), (dtypes.float32_to_float16, "float32")):
            assert " half" in generated(convert, getattr(numba, kind))
        values = hard_float32(np.dtype(np.float16))
        fast = elementwise(dtypes.float32_to_float16, np.uint16)(values)
        slow = elementwise(dtypes.float32_to_float16_bits, np.uint16)(values)
        np.testing.assert_array_equal(fast, slow)  # NaN's payload too


# --- every norm -----------------------------------------------------------------------------------------------------


def ulps(ours: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Return how many steps of the format lie between results and the exact ones, rounded once."""

    def place(array: np.ndarray) -> np.ndarray:
        bits = array.view(np.int16).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFF), bits)

    return np.abs(place(ours) - place(rounded(exact.astype(np.float64), ours.dtype)))


def check_half(ours: np.ndarray, exact: np.ndarray, half: np.dtype[Any]) -> None:
    """Assert that results are the exact ones rounded, but for float32's own error."""
    assert ours.dtype == half
    assert ours.shape == exact.shape
    assert np.isfinite(ours.astype(np.float32)).all()
    steps = ulps(ours, exact)
    near_zero = np.abs(ours.astype(LONG) - exact) <= HALF_NEAR_ZERO * np.abs(exact).max()
    assert (near_zero | (steps <= HALF_ULPS)).all()
    assert np.mean((steps > 0) & ~near_zero) <= HALF_ROUNDED_OTHERWISE


def problem(name: str, half: np.dtype[Any], groups: int = 6, n: int = 768, mean: float = 1.5) -> Any:
    """Return x, dy, weight and bias in half precision."""
    how = ARRANGEMENTS[name]
    x = how.place((2.5 * normal(0, (groups, n), np.float64) + mean).astype(half))
    weight, bias = (normal(seed, how.shape_of(x, groups), np.float64).astype(half) for seed in (2, 3))
    return x, normal(1, x.shape, np.float64).astype(half), weight, bias


@every_arrangement
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("groups", "n"), [(6, 768), (48, 96), (6, 20000)])
def test_forward(name: str, masked: bool, groups: int, n: int, half: Any) -> None:
    how = ARRANGEMENTS[name]
    if masked and not how.centred:
        return
    x, _, weight, bias = problem(name, half, groups, n)
    parameters = dict(zip(how.affine, (weight, bias), strict=False))
    mask = np.random.default_rng(4).random(x.shape) < 0.6 if masked else None
    y = how.call(x, groups, eps=1e-5, **parameters, **({} if mask is None else {"mask": mask}))
    along = [1] * x.ndim
    along[gradients.weight_axis(name)] = -1
    rows = how.gather(x.astype(np.float64), groups)
    plain = reference.layer_norm(
        rows, (1,), eps=1e-5, mask=None if mask is None else how.gather(mask, groups), centred=how.centred
    ).y
    exact = how.place(plain).astype(LONG) * weight.astype(LONG).reshape(along)
    if how.centred:
        exact = exact + bias.astype(LONG).reshape(along)
    check_half(y, exact, half)


@every_arrangement
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("parameters", ["half", "float32", "none"])
def test_backward(name: str, masked: bool, parameters: str, half: Any) -> None:
    how = ARRANGEMENTS[name]
    if masked and not how.centred:
        return
    groups = 6
    x, dy, weight, _ = problem(name, half)
    weight = {"half": weight, "float32": weight.astype(np.float32), "none": None}[parameters]
    mask = np.random.default_rng(4).random(x.shape) < 0.6 if masked else None
    exact = gradients.expected(name, dy, x, groups, weight, mask)
    dx, *sums = gradients.gradients(name, dy, x, groups, weight, mask)
    check_half(dx, exact.dx, half)
    for ours, theirs, term in zip(sums, (exact.dweight, exact.dbias), exact.terms, strict=True):
        if ours is None:
            continue
        if parameters == "half":
            assert ours.dtype == half
            assert (ulps(ours, theirs) <= HALF_ULPS).all()
        else:
            assert ours.dtype == np.float32
            assert error_of_sum(ours, theirs, term, exact.count) <= SUM_FLOAT32


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("shape", [(40, 768), (3, 20000), (200, 8)])
def test_residual(norm: str, shape: tuple[int, int], half: Any) -> None:
    """The sum is rounded to the format once; what is normalized is the rounded sum."""
    n = shape[1]
    x, residual = (normal(seed, shape, np.float64).astype(half) for seed in (0, 1))
    function = nn.layer_norm if norm == "layer" else nn.rms_norm
    y, total = function(x, n, eps=1e-5, residual=residual)
    assert total.dtype == half
    np.testing.assert_array_equal(total, rounded(x.astype(np.float32) + residual.astype(np.float32), half))
    check_half(y, reference.layer_norm(total.astype(np.float64), (1,), centred=norm == "layer").y.astype(LONG), half)
    layer = nn.LayerNorm(n) if norm == "layer" else nn.RMSNorm(n, eps=1e-5)
    dy, dtotal = (normal(seed, shape, np.float64).astype(half) for seed in (2, 3))
    layer(x, residual=residual)
    dx = layer.backward(dy)
    check_half(dx, gradients.expected(f"{norm}-last", dy, total, shape[0]).dx, half)
    both = layer.backward(dy, dtotal)
    assert both.dtype == half
    assert (ulps(both, dx.astype(LONG) + dtotal.astype(LONG)) <= HALF_ULPS).all()


@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_running_statistics(norm: str, channel_axis: int, half: Any) -> None:
    """They are kept in float32 or in half precision; inference then uses them."""
    shape = (8, 6, 5, 7) if channel_axis == 1 else (8, 5, 7, 6)
    x = (2 * normal(0, shape, np.float64) + 3).astype(half)
    ours, theirs = getattr(nn, f"{norm}_norm"), getattr(reference, f"{norm}_norm")
    start = np.full(6, 0.5), np.full(6, 2.0)
    learning = (None, None, True, 0.3)  # no weight, no bias, from this input, momentum
    exact = theirs(x.astype(np.float64), *start, *learning, channel_axis=channel_axis)
    for dtype in (half, np.dtype(np.float32)):
        mean, var = (a.astype(dtype) for a in start)
        y = ours(x, mean, var, *learning, channel_axis=channel_axis)
        check_half(y, exact.y.astype(LONG), half)
        if dtype == half:
            assert not ulps(mean, exact.running_mean).any()
            assert not ulps(var, exact.running_var).any()
    np.testing.assert_allclose(mean, exact.running_mean, RUNNING_FLOAT32)
    np.testing.assert_allclose(var, exact.running_var, RUNNING_FLOAT32)
    own = (mean, var, None, None, False)
    exact = theirs(x.astype(np.float64), *own, channel_axis=channel_axis)
    check_half(ours(x, *own, channel_axis=channel_axis), exact.y.astype(LONG), half)


@every_arrangement
def test_sums_beyond_float16(name: str) -> None:
    """Sums of 3e6 and squares of 1e7 do not overflow at 65504."""
    how = ARRANGEMENTS[name]
    x = how.place((3000 + 100 * normal(0, (6, 1024), np.float64)).astype(np.float16))
    assert how.gather(x.astype(np.float64), 6).sum(1).min() > 1e6
    y = how.call(x, 6, eps=1e-5)
    rows = how.gather(x.astype(np.float64), 6)
    check_half(y, how.place(how.expected(rows)).astype(LONG), np.dtype(np.float16))
    dy = normal(1, x.shape, np.float64).astype(np.float16)
    dx = gradients.gradients(name, dy, x, 6)[0]
    check_half(dx, gradients.expected(name, dy, x, 6).dx, np.dtype(np.float16))


@every_arrangement
def test_subnormal_inputs(name: str) -> None:
    """Inputs below 6e-5 are numbers too."""
    how = ARRANGEMENTS[name]
    x = how.place((2e-5 * normal(0, (6, 256), np.float64)).astype(np.float16))
    y = how.call(x, 6, eps=1e-12)
    rows = how.gather(x.astype(np.float64), 6)
    check_half(y, how.place(how.expected(rows, 1e-12)).astype(LONG), np.dtype(np.float16))


def test_results_beyond_the_format_are_infinite(half: Any) -> None:
    """One of 4096 stands out by 64 standard deviations; a weight of 2000 takes that beyond 65504."""
    x = np.zeros((2, 4096), np.float32)
    x[:, 7] = 1.0
    weight = np.full(4096, 2000.0)
    y = nn.layer_norm(x.astype(half), 4096, weight, eps=0.0)
    np.testing.assert_array_equal(y, rounded(reference.layer_norm(x, (1,), weight, eps=0.0).y, half))
    assert np.isinf(y[:, 7].astype(np.float32)).all() == (half == np.float16)


# --- memory and other CPUs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", CALLS)
def test_no_float32_copy(norm: str, half: Any) -> None:
    x = np.ones((4, 1024, 2, 1024), half)  # 16 MiB; a float32 copy would take 32
    call = CALLS[norm]
    call(np.ones((4, 8, 2, 64), half))  # compile
    call(x[:2].copy())  # and what large arrays have of their own
    tracemalloc.start()
    try:
        y = call(x)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < y.nbytes + (1 << 20)


ON_ANOTHER_CPU = """
import sys
import numpy as np
import numbanorm as nn
from numbanorm.cpu import dtypes

assert dtypes.has_f16c() == (sys.argv[1] == "True")
sys.path.insert(0, sys.argv[3])
import half_results
np.savez(sys.argv[2], **half_results.results_that_no_cpu_rounds())
"""


@pytest.mark.slow
def test_on_a_cpu_that_does_not_convert_float16(tmp_path: Path) -> None:
    """Compiled for the oldest CPUs, float16 gives the same bits."""
    ours = results_that_no_cpu_rounds()
    path = tmp_path / "results.npz"
    command = [sys.executable, "-c", ON_ANOTHER_CPU, "False", str(path), str(SUPPORT)]
    subprocess.run(command, env=os.environ | {"NUMBA_CPU_NAME": "generic"}, cwd=tmp_path, check=True, timeout=300)
    with np.load(path) as theirs:
        assert set(theirs) == set(ours)
        for name, result in ours.items():
            number = ~np.isnan(result)
            np.testing.assert_array_equal(np.isnan(theirs[name]), ~number, name)
            np.testing.assert_array_equal(theirs[name][number], result[number], name)
            np.testing.assert_array_equal(np.signbit(theirs[name][number]), np.signbit(result[number]), name)
