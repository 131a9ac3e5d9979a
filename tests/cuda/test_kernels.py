"""The kernels' logic: every step of the ladder, every dtype and mask, against formulas in extended precision.

`test_cuda_simulator` runs this file in Numba's simulator, in a process of its own; ``pytest -m gpu`` on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

toolchain = pytest.importorskip("numbanorm.cuda.toolchain", exc_type=ImportError)

import numpy as np  # noqa: E402
from kernel_cases import COUNT, M2, MEAN, RSTD, Case, Device, Problem  # noqa: E402
from registered import SCALE, UNUSUAL, registered  # noqa: E402

from numbanorm.cuda import launch, launch_backward  # noqa: E402

pytestmark = pytest.mark.gpu
if not toolchain.SIMULATED and not toolchain.available():
    pytest.skip(f"no GPU: {toolchain.unavailable_reason()}", allow_module_level=True)


@pytest.fixture(autouse=True)
def _own_norms() -> Iterator[None]:
    """Norms that a user adds."""
    with registered(*UNUSUAL):
        yield


EPS = 1e-5

OUTPUT = {"float64": 1e-12, "float32": 1e-6, "float16": 5e-4, "bfloat16": 4e-3}
"""Error of the output as a share of its scale: that of the CPU; half a unit in the last place for the halves."""

GRADIENT = {"float64": 1e-11, "float32": 2e-6, "float16": 5e-4, "bfloat16": 4e-3}
"""The same of dx: five roundings and two averages."""

SUMS = {"float64": 1e-11, "float32": 2e-6}
"""Error of dweight, dbias and of M2 and rstd, by the lane type, as a share of the largest."""

ROWS = [
    # A step of the ladder each, up to its end or ragged; float64 takes half as many elements.
    Case("layer", (3, 7), axis=(1,)),
    Case("layer", (9, 32), axis=(1,)),
    Case("layer", (17, 62), axis=(1,)),
    Case("rms", (5, 128), axis=(1,)),
    Case("layer", (5, 250), axis=(1,)),
    Case("layer", (3, 512), axis=(1,)),
    Case("layer", (2, 1023), axis=(1,)),
    Case("layer", (2, 1024), axis=(1,)),
    Case("layer", (2, 2044), axis=(1,)),
    Case("layer", (2, 4096), axis=(1,), dtype="bfloat16"),
    Case("layer", (1, 8000), axis=(1,)),
    Case("rms", (1, 16384), axis=(1,), dtype="float16"),
    Case("layer", (1, 16384 // 2), axis=(1,), dtype="float64"),
    # Many blocks a group, and with a residual, so that x is replaced between the launches.
    Case("rms", (1, 20004), axis=(1,), residual=True),
    Case("batch", (1, 2, 20000)),
    # Runs: groups of several, weights of several channels a run.
    Case("batch", (5, 3, 40)),
    Case("batch", (3, 2, 33), mask="elements"),
    Case("batch", (4, 1, 40)),
    Case("instance", (2, 6, 36)),
    Case("group", (2, 6, 4, 5), num_groups=2),
    Case("group", (2, 6, 33), num_groups=3, mask="elements"),
    Case("group", (2, 7, 80), num_groups=2, channel_axis=2),
    Case("group", (2, 7, 80), num_groups=2, channel_axis=2, mask="rows", dtype="float16"),
    # Masks, absent weights, residuals, alignment, strides.
    Case("layer", (5, 100), axis=(1,), mask="elements"),
    Case("layer", (5, 104), axis=(1,), mask="elements", dtype="bfloat16"),
    Case("layer", (5, 100), axis=(1,), mask="rows"),
    Case("layer", (5, 100), axis=(1,), weight=False),
    Case("layer", (5, 100), axis=(1,), bias=False),
    Case("layer", (5, 100), axis=(1,), weight=False, bias=False, residual=True, dtype="bfloat16"),
    Case("rms", (5, 96), axis=(1,), residual=True),
    Case("layer", (3, 128), axis=(1,), shift=1),
    Case("layer", (3, 128), axis=(1,), shift=2, dtype="float16"),
    Case("layer", (3, 96), axis=(1,), order="sliced"),
    Case("layer", (40, 5), axis=(0,), order="F"),
    Case("layer", (3, 4, 40), axis=(1, 2)),
    # Parameters of 16 bits.
    Case("layer", (3, 48), axis=(1,), dtype="bfloat16", parameter="bfloat16"),
    Case("group", (2, 6, 4, 5), num_groups=2, dtype="float16", parameter="float16"),
    Case("batch", (3, 2, 40), dtype="bfloat16", parameter="bfloat16"),
    Case("layer", (2, 3, 40), axis=(1, 2), dtype="float16", parameter="float16", shift=1),
    # The other formula for rstd, and one weight for all elements.
    Case("l2", (5, 128), axis=(1,)),
    Case("l2", (3, 30), axis=(1,), dtype="float64"),
    Case("l2", (2, 2044), axis=(1,), dtype="bfloat16"),
    Case("l2", (1, 20004), axis=(1,)),
    Case("l2", (4, 40), axis=(1,), weight=False, residual=True),
    Case(SCALE.kind, (5, 100), axis=(1,)),
    Case(SCALE.kind, (3, 4, 40), axis=(1, 2), dtype="float16"),
    Case(SCALE.kind, (3, 40), axis=(1,), dtype="bfloat16", parameter="bfloat16", residual=True),
    Case(SCALE.kind, (1, 20004), axis=(1,), dtype="float64"),
    Case(SCALE.kind, (1, 1), axis=(1,)),
    Case("whole", (2, 6, 40), mask="elements"),
    Case("batch-group", (3, 6, 33), num_groups=2),
    Case("channel-rms", (3, 4, 40), dtype="bfloat16"),
]

FORWARD = [
    # Read tile by tile, since its runs are too many for registers; and with a second look.
    Case("batch", (3, 1, 3000)),
    Case("batch", (3, 1, 3000), scale=1e25),
    Case("layer", (1, 4000), axis=(1,)),
    # The same of elements of 16 bits.
    Case("layer", (3, 30), axis=(1,), dtype="bfloat16"),
    Case("layer", (9, 64), axis=(1,), dtype="float16"),
    Case("rms", (5, 128), axis=(1,), dtype="bfloat16"),
    Case("layer", (5, 250), axis=(1,), dtype="float16"),
    Case("layer", (3, 512), axis=(1,), dtype="bfloat16"),
    Case("layer", (2, 1000), axis=(1,), dtype="float16"),
    Case("layer", (2, 2048), axis=(1,), dtype="bfloat16"),
    Case("layer", (1, 8192), axis=(1,), dtype="float16"),
    Case("rms", (1, 140000), axis=(1,), residual=True),
    # A group by a cluster of blocks: whole tiles, ragged ones, blocks with nothing to do, masks.
    Case("layer", (2, 32768), axis=(1,)),
    Case("layer", (1, 17000), axis=(1,), dtype="bfloat16"),
    Case("group", (2, 4, 8200), num_groups=2),
    Case("layer", (1, 17001), axis=(1,), mask="elements"),
]
"""Forward alone: backward of these takes a minute in the simulator, and its ways are those of other rows."""

COLUMNS = [
    Case("batch", (40, 16)),
    Case("batch", (1, 7)),
    Case("batch", (40, 3), mask="elements"),
    Case("batch", (19, 3, 5), channel_axis=2, mask="rows", dtype="float16"),
    Case("batch", (9, 5, 260), channel_axis=2, dtype="bfloat16"),
    Case("batch", (70, 8), dtype="float64", weight=False),
    Case("batch", (70, 8), bias=False, shift=1),
    Case("batch", (20, 8), order="sliced"),
    Case("batch", (24, 12), order="F"),
    Case("layer", (2, 9, 20), axis=(1,)),
    Case("layer", (2, 9, 4, 5), axis=(1,), mask="elements"),
    Case("rms", (2, 9, 20), axis=(1,), dtype="bfloat16"),
    Case("rms", (6, 40), axis=(0,)),
    Case("instance", (3, 20, 8), channel_axis=2, dtype="float16"),
    Case("group", (2, 50, 12), num_groups=3, channel_axis=2),
    Case("group", (2, 20, 12), num_groups=4, channel_axis=2, mask="elements", dtype="float64"),
    Case("batch", (40, 3, 5), mask="rows"),
    Case("batch", (4100, 2)),
    Case("l2", (2, 9, 20), axis=(1,)),
    Case("l2", (70, 8), axis=(0,), dtype="float64"),
    Case("l2", (300, 12), axis=(0,), dtype="bfloat16", weight=False),
    Case(SCALE.kind, (2, 9, 20), axis=(1,)),
    Case(SCALE.kind, (70, 8), axis=(0,), dtype="float16"),
    Case("position", (2, 6, 40), mask="elements"),
    Case("channel-rms", (40, 8), dtype="float64"),
]

DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
INTEGERS = [
    case
    for dtype in DTYPES
    for case in (
        Case("layer", (3, 48), axis=(1,), dtype=dtype, mean=3.0, scale=20.0),
        Case("batch", (24, 8), dtype=dtype, mean=3.0, scale=20.0),
    )
]


def name_of(case: Case) -> str:
    own = [str(v) for k, v in vars(case).items() if k not in ("norm", "shape") and v != getattr(Case, k, None)]
    return "-".join([case.norm, "x".join(map(str, case.shape)), *own])


every_case = pytest.mark.parametrize("case", ROWS + COLUMNS + INTEGERS, ids=name_of)


def lane_of(problem: Problem) -> str:
    return str(problem.form.lane)


def check_output(y: np.ndarray, expected: np.ndarray, tolerance: float, scale: float = 0.0) -> None:
    assert np.isfinite(y.astype(np.float64)).all()
    scale = max(scale, float(np.abs(expected).max())) or 1.0
    assert np.abs(y.astype(np.longdouble) - expected).max() <= tolerance * scale


def check_statistics(stats: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert (stats[COUNT] == expected[COUNT]).all()
    deviation = np.sqrt(expected[M2] / np.maximum(expected[COUNT], 1))
    assert (
        np.abs(stats[MEAN] - expected[MEAN]) <= tolerance * np.maximum(deviation, np.abs(expected[MEAN]) * 1e-8)
    ).all()
    assert (np.abs(stats[M2] - expected[M2]) <= tolerance * expected[M2]).all()
    with np.errstate(invalid="ignore"):
        same = (stats[RSTD] == expected[RSTD]) | (np.abs(stats[RSTD] / expected[RSTD] - 1) <= tolerance)
    assert same.all()


def check_gradients(problem: Problem, stats: np.ndarray, found: Any) -> None:
    """Check dweight and dbias; where one number is all, and may cancel, its error is that of a sum of such terms."""
    dy = problem.dy.astype(np.longdouble)
    h = (problem.x.astype(np.longdouble) - stats[MEAN][problem.group]) * stats[RSTD][problem.group]
    size = problem.plan.layout.size
    for gradient, terms in zip(found, (dy * h, dy), strict=True):
        if gradient is not None:
            scale = float(np.sqrt((terms * terms).sum())) if size == 1 else 0.0
            check_output(gradient, problem.sums(terms, problem.channel, size), SUMS[lane_of(problem)], scale)


def run_forward(device: Device, problem: Problem) -> None:
    result, lane = str(problem.form.result), lane_of(problem)
    y, stats, total = device.forward(problem, EPS)
    source = problem.x
    if total is not None:
        source = total
        summed = problem.x.astype(np.longdouble) + problem.residual.astype(np.longdouble)
        check_output(total, summed, OUTPUT[result])
    expected = problem.statistics(source, EPS)
    check_statistics(stats, expected, SUMS[lane])
    check_output(y, problem.normalized(source, expected), OUTPUT[result])


@pytest.mark.parametrize("case", ROWS + COLUMNS + FORWARD + INTEGERS, ids=name_of)
def test_forward(device: Device, case: Case) -> None:
    problem = Problem(case)
    run_forward(device, problem)


@every_case
def test_statistics(device: Device, case: Case) -> None:
    problem = Problem(case)
    check_statistics(device.statistics(problem), problem.statistics(problem.x, 0.0), SUMS[lane_of(problem)])


@every_case
def test_apply(device: Device, case: Case) -> None:
    problem = Problem(case)
    stats = problem.statistics(problem.x, EPS) * np.array([[1.0], [1.1], [1.0], [0.9]])
    check_output(device.apply(problem, stats), problem.normalized(problem.x, stats), OUTPUT[str(problem.form.result)])


FLOAT_CASES = ROWS + COLUMNS + INTEGERS[4:6] + INTEGERS[-4:-2]
FIXED = [case for case in FLOAT_CASES if case.norm == "batch" and not case.mask]  # as batch norm has in inference


@pytest.mark.parametrize(
    ("case", "fixed"),
    [(case, False) for case in FLOAT_CASES] + [(case, True) for case in FIXED],
    ids=lambda value: name_of(value) if isinstance(value, Case) else "fixed" if value else "free",
)
def test_backward(device: Device, case: Case, fixed: bool) -> None:
    problem = Problem(case, separable=True)
    stats = problem.statistics(problem.x, EPS)
    dx, dweight, dbias = device.backward(problem, stats, fixed)
    expected = problem.gradients(stats, fixed)
    # Where dx cancels, as for groups of one, its error is that of the terms.
    term = float((np.abs(problem.dy).astype(float) * problem.gain() * stats[RSTD][problem.group]).max())
    check_output(dx, expected[0], GRADIENT[str(problem.form.result)], term)
    check_gradients(problem, stats, (dweight, dbias))


SMALL_GROUPS = [
    Case("l2", (6, 128), axis=(1,)),  # all in registers
    Case("l2", (6, 500), axis=(1,), dtype="float64", weight=False),
    Case("l2", (6, 3, 40), axis=(1, 2), dtype="bfloat16"),
    Case("l2", (4, 9000), axis=(1,)),  # sums first
    Case("l2", (4, 9, 20), axis=(1,)),  # in columns, with weights along the rows
    Case("l2", (40, 8), axis=(0,), weight=False),
]


@pytest.mark.parametrize("case", SMALL_GROUPS, ids=name_of)
def test_norms_below_eps(device: Device, case: Case) -> None:
    """L2 norm divides by eps where a group's norm is smaller, zeros included; then rstd does not depend on x."""
    problem, back = Problem(case), Problem(case, separable=True)
    exact = problem.statistics(problem.x, 0.0)
    eps = float(np.median(exact[M2]) ** 0.5)  # of half of the groups the norm is smaller, of one it is eps
    assert (exact[M2] < 0.999 * eps**2).any()
    assert (exact[M2] > 1.001 * eps**2).any()
    for one in (problem, back):
        one.x[...] = np.where(one.group == one.group.flat[0], 0, one.x)
    expected = problem.statistics(problem.x, eps)
    y, stats, _ = device.forward(problem, eps)
    check_statistics(stats, expected, SUMS[lane_of(problem)])
    check_output(y, problem.normalized(problem.x, expected), OUTPUT[str(problem.form.result)])
    assert not y[problem.group == problem.group.flat[0]].any()
    assert stats[RSTD].max() == pytest.approx(1 / eps, rel=1e-15)
    dx, dweight, _ = device.backward(back, expected, False)
    dx_expected, dweight_expected, _ = back.gradients(expected, False)
    check_output(dx, dx_expected, GRADIENT[str(problem.form.result)])
    check_output(dweight, dweight_expected, SUMS[lane_of(problem)])


PARTS = [case for case in ROWS + COLUMNS if np.prod(case.shape) < 10000 and not case.residual and not case.parameter]


@pytest.mark.parametrize("case", PARTS, ids=name_of)
def test_groups_that_lie_in_parts(device: Device, case: Case) -> None:
    """Sums of a part, and dx and gradients of it from means that are those of whole groups."""
    problem = Problem(case, separable=True)
    layout, within = problem.plan.layout, case.record.weights_within_groups
    stats = problem.statistics(problem.x, EPS)
    dy = problem.dy.astype(np.longdouble)
    h = (problem.x.astype(np.longdouble) - stats[MEAN][problem.group]) * stats[RSTD][problem.group]
    weight = 1 if problem.weight is None else problem.weight.astype(np.longdouble)[problem.channel]
    g = dy * weight if within else dy
    sums = device.partial_sums(problem, stats)
    for found, terms in zip(sums, (g, g * h), strict=True):
        expected = problem.sums(terms, problem.group, layout.groups)
        most = problem.sums(np.abs(terms), problem.group, layout.groups).max()
        assert np.abs(found - expected).max() <= SUMS[lane_of(problem)] * most
    means = np.random.default_rng(5).standard_normal((2, layout.groups))
    a, b = (m[problem.group] * (1 if within else weight) for m in means)
    counted = 1 if problem.mask is None else problem.mask
    shift = counted * ((a if case.record.centred else 0) + h * b)
    expected = stats[RSTD][problem.group] * (dy * weight - shift)
    for wanted in (True, False):
        dx, *found = device.partial_gradient(problem, stats, means, wanted or layout.inner == 1)
        check_output(dx, expected, GRADIENT[str(problem.form.result)])
        if wanted:
            check_gradients(problem, stats, found)


@pytest.mark.parametrize("case", [ROWS[4], ROWS[15], COLUMNS[0]], ids=name_of)
def test_in_place(device: Device, case: Case) -> None:
    problem = Problem(case)
    apart, _, _ = device.forward(problem, EPS)
    same, _, _ = device.forward(problem, EPS, in_place=True)
    assert (apart == same).all()


@pytest.mark.parametrize("case", [ROWS[0], ROWS[15], ROWS[21], COLUMNS[0], COLUMNS[9]], ids=name_of)
def test_the_same_bits_again(device: Device, case: Case) -> None:
    """The simulator runs threads in another random order every time; a GPU, in whatever order it does."""
    problem = Problem(case, separable=True)
    stats = problem.statistics(problem.x, EPS)
    first, second = (
        (*device.forward(Problem(case), EPS)[:2], *device.backward(problem, stats, False)) for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert (a == b).all()


HARD = [
    Case("layer", (3, 300), axis=(1,)),
    Case("layer", (2, 2044), axis=(1,)),
    Case("batch", (3, 2, 40)),
    Case("batch", (300, 4)),
    Case("group", (2, 50, 6), num_groups=3, channel_axis=2),
]


def hard_values(kind: str, problem: Problem) -> np.ndarray:
    values = np.random.default_rng(3).standard_normal(problem.x.shape)
    if kind == "sorted":
        return np.sort(values.ravel()).reshape(values.shape) * 1e3
    if kind == "outlier":
        values.flat[0] = 1e6
    return values * {"large": 1e30, "small": 1e-30}.get(kind, 1.0) + {"mean 1e4": 1e4, "mean 1e6": 1e6}.get(kind, 0.0)


@pytest.mark.parametrize("kind", ["mean 1e4", "mean 1e6", "sorted", "outlier", "large", "small"])
@pytest.mark.parametrize("case", HARD, ids=name_of)
def test_hard_data(device: Device, case: Case, kind: str) -> None:
    problem = Problem(case)
    problem.x = problem.laid(hard_values(kind, problem), np.float32)
    eps = 0.0 if kind in ("large", "small") else EPS
    y, stats, _ = device.forward(problem, eps)
    expected = problem.statistics(problem.x, eps)
    check_statistics(stats, expected, SUMS["float32"])
    check_output(y, problem.normalized(problem.x, expected), 2e-6)


@pytest.mark.parametrize("case", HARD, ids=name_of)
def test_backward_of_a_large_mean(device: Device, case: Case) -> None:
    problem = Problem(case, separable=True)
    problem.x = problem.laid(hard_values("mean 1e6", problem), np.float32)
    stats = problem.statistics(problem.x, EPS)
    dx, dweight, _ = device.backward(problem, stats, False)
    expected = problem.gradients(stats, False)
    check_output(dx, expected[0], GRADIENT["float32"])
    check_output(dweight, expected[1], SUMS["float32"])


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9, 1e-30])
@pytest.mark.parametrize("case", HARD, ids=name_of)
def test_equal_elements_have_no_variance(device: Device, case: Case, value: float) -> None:
    problem = Problem(case)
    problem.x = problem.laid(np.full(case.shape, value), np.float32)
    _, stats, _ = device.forward(problem, EPS)
    assert (stats[M2] == 0).all()
    assert (stats[MEAN] == float(np.float32(value))).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("case", HARD, ids=name_of)
def test_nan_and_inf_spoil_their_group_alone(device: Device, case: Case, value: float) -> None:
    problem = Problem(case)
    problem.x.flat[0] = value
    y, stats, _ = device.forward(problem, EPS)
    spoilt = problem.group == problem.group.flat[0]
    assert np.isnan(y[spoilt]).all()
    assert np.isfinite(y[~spoilt]).all()
    assert spoilt.any()
    assert np.isnan(stats[RSTD]).sum() == 1


@pytest.mark.parametrize("case", [ROWS[23], ROWS[16], COLUMNS[2]], ids=name_of)
def test_nothing_counts(device: Device, case: Case) -> None:
    problem = Problem(case, separable=True)
    problem.mask = problem.counts = np.zeros(case.shape, bool)
    stats = problem.statistics(problem.x, EPS)
    assert not stats[:3].any()
    same = Problem(case)
    same.mask = same.counts = problem.mask
    y, found, _ = device.forward(same, EPS)
    check_statistics(found, stats, 1e-12)
    check_output(y, problem.normalized(problem.x, stats), OUTPUT["float32"])
    dx, _, _ = device.backward(problem, stats, False)
    check_output(dx, problem.gradients(stats, False)[0], GRADIENT["float32"])


@pytest.mark.parametrize(
    "case", [Case("layer", (600, 8), axis=(1,)), Case("layer", (2, 9, 40), axis=(1,))], ids=name_of
)
def test_sums_of_equal_terms(device: Device, case: Case) -> None:
    """Terms that round the same way every time: float32 may take 64 of them."""
    problem = Problem(case, separable=True)
    problem.dy = problem.laid(np.full(case.shape, 0.1), np.float32)
    stats = problem.statistics(problem.x, EPS)
    _, _, dbias = device.backward(problem, stats, False)
    check_output(dbias, problem.gradients(stats, False)[2], 1e-6)


@pytest.mark.parametrize("case", [Case("layer", (5, 512), axis=(1,)), Case("rms", (70, 40), axis=(1,))], ids=name_of)
def test_rows_one_after_the_other(device: Device, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A team that takes several rows, as it does where there are thousands."""
    monkeypatch.setattr(launch_backward, "SLABS", 1)
    launch_backward.rows_backward.cache_clear()
    problem = Problem(case, separable=True)
    stats = problem.statistics(problem.x, EPS)
    dx, dweight, dbias = device.backward(problem, stats, False)
    launch_backward.rows_backward.cache_clear()
    expected = problem.gradients(stats, False)
    check_output(dx, expected[0], GRADIENT["float32"])
    check_output(dweight, expected[1], SUMS["float32"])
    if dbias is not None:
        check_output(dbias, expected[2], SUMS["float32"])


def test_the_cases_take_every_way() -> None:
    """Every step of both ladders, every rule, mask and kind of weights, in rows and columns."""
    forward, fused, general = set(), set(), set()
    for case in ROWS + COLUMNS + FORWARD:
        problem = Problem(case, separable=True)
        names = str(problem.x.dtype), str(problem.form.result)
        call = launch.Call(*names, case.weight, problem.bias is not None, bool(case.mask), case.residual)
        call = call._replace(low=(4,) * 7 if case.shift else (), affine=case.parameter)
        own = Problem(case)
        if own.plan.columns:
            choice = launch.columns(own.plan, call, "moments").choice
            forward |= {("columns", choice.mask), ("columns", choice.weights), ("columns", choice.vector)}
        else:
            choice = launch.rows(own.plan, call, "x", "stats", True).choice
            each = choice.vector * choice.loads * (2 if choice.wide else 1)
            forward |= {(choice.team, each, choice.held), choice.rule, choice.mask, choice.weight, choice.vector}
            forward |= {("split", choice.split), ("joined", choice.joined), ("affine", choice.affine)}
        if problem.plan.columns:
            how = launch_backward.columns_backward(problem.plan, call)
            general |= {("rows", how.rows is not None)}
        else:
            how = launch_backward.rows_backward(problem.plan, call)
            general |= set(how.parts)
            if "fused" in how.parts:
                choice = how.parts["fused"].choice
                fused.add((choice.team, choice.vector * choice.loads * (2 if choice.wide else 1)))
    for rung in launch.LADDER + launch.HALVES:
        assert (rung.team, rung.each, True) in forward, rung
    assert (launch.STREAM.team, launch.STREAM.each, False) in forward
    assert {"flat", "whole", "runs", "all", "elements", "along", "same", "shared", "piece", "", 1, 2, 4, 8} <= forward
    assert {("split", True), ("joined", True), ("affine", "bfloat16"), ("affine", "float16")} <= forward
    assert {("columns", k) for k in ("all", "elements", "runs", "piece", "along", "element", 1, 2, 4, 8)} <= forward
    assert {(rung.team, rung.each) for rung in launch_backward.FUSED} <= fused
    assert {"fused", "sums", "lanes", "emit", ("rows", True), ("rows", False)} <= general
    in_parts = set()
    for case in PARTS:
        problem = Problem(case, separable=True)
        kind = "".join(("columns " if problem.plan.columns else "", "masked " if case.mask else "", case.norm))
        in_parts.add(kind)
    assert {"layer", "batch", "group", "masked layer", "columns batch", "columns layer", "columns l2"} <= in_parts
