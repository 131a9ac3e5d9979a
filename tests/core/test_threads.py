"""Same bits on any number of threads, whosever they are, and in any batch; helpers; numbers; threads of the caller."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numba
import numpy as np
import pytest
import reference
import sharing
from engines import choosing, has_omp
from processes import run
from reference import error, normal
from tolerances import FLOAT32

import numbanorm as nn
from numbanorm.calls import host
from numbanorm.core import pool
from numbanorm.core import threads as kernel_threads
from numbanorm.cpu import board, bound, claims, engine
from numbanorm.cpu import helpers as cpu_helpers
from numbanorm.cpu import idle as cpu_idle
from numbanorm.cpu.dtypes import pointer
from numbanorm.cpu.helpers import Helpers
from numbanorm.cpu.jit import Kernel
from numbanorm.cpu.profile import profile

needs_two = pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs 2 threads")


def digest(results: Any) -> str:
    """Return a hash of all bits of a result, statistics and running statistics included."""
    parts = results if isinstance(results, tuple) else (results,)
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


class Workers:
    """Who does the units of calls on 2**17 elements and more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches = 0
        self._patch = monkeypatch
        run_shared = bound.run_shared

        def counted(*arguments: Any) -> Any:
            self.launches += 1
            return run_shared(*arguments)

        monkeypatch.setattr(bound, "run_shared", counted)
        sharing.always(monkeypatch)

    def use(self, name: str, number: int = 2) -> None:
        """Choose an engine, and the number of threads."""
        self._patch.setattr(kernel_threads, "_chosen", name)
        nn.set_num_threads(number)

    def digests(self, call: Callable[[], Any]) -> set[str]:
        """Return the hashes of the results on one thread and on two, by both engines."""
        found = set()
        for name in ("claims", "numba", "claims"):
            for number in (1, 2):
                self.use(name, number)
                before = self.launches
                found.add(digest(call()))
                assert (self.launches > before) == (number == 2)
        return found


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch, _one_thread: None) -> Iterator[Workers]:
    """Return what chooses them; calls are prepared anew before and after."""
    host.forget()
    yield Workers(monkeypatch)
    host.forget()


@pytest.fixture(params=["alone", "claims", "numba"])
def each(request: pytest.FixtureRequest, workers: Workers) -> Workers:
    """Run a test on one thread, and on two by both engines."""
    if request.param != "alone":
        if numba.config.NUMBA_NUM_THREADS < 2:
            pytest.skip("needs 2 threads")
        workers.use(request.param)
    return workers


def affine(c: int) -> tuple[np.ndarray, np.ndarray]:
    return normal(1, (c,)), normal(2, (c,))


def batch(x: np.ndarray, channel_axis: int = 1, **more: Any) -> Any:
    c = x.shape[channel_axis]
    mean, var = np.zeros(c), np.ones(c)
    own = {"channel_axis": channel_axis, "return_stats": True, **more}
    return *nn.batch_norm(x, mean, var, *affine(c), True, **own), mean, var


def instance(x: np.ndarray, channel_axis: int = 1, **more: Any) -> Any:
    c = x.shape[channel_axis]
    mean, var = np.zeros(c), np.ones(c)
    own = {"channel_axis": channel_axis, "return_stats": True, **more}
    return *nn.instance_norm(x, mean, var, *affine(c), **own), mean, var


def group(x: np.ndarray, groups: int, channel_axis: int = 1, **more: Any) -> Any:
    own = {"channel_axis": channel_axis, "return_stats": True, **more}
    return nn.group_norm(x, groups, *affine(x.shape[channel_axis]), **own)


def layer(x: np.ndarray, *axis: int, **more: Any) -> Any:
    lengths = tuple(x.shape[a] for a in axis)
    return nn.layer_norm(x, lengths, normal(1, lengths), normal(2, lengths), axis=axis, return_stats=True, **more)


def rms(x: np.ndarray, axis: int, **more: Any) -> Any:
    return nn.rms_norm(x, x.shape[axis], normal(1, (x.shape[axis],)), axis=axis, return_stats=True, **more)


# Each of 2**17 elements or more: from there on, with `workers`, they are shared.
CASES: dict[str, tuple[tuple[int, ...], Callable[..., Any], tuple[int, ...]]] = {
    # many groups: one group at a time
    "layer": ((512, 768), layer, (-1,)),
    "rms": ((512, 768), rms, (-1,)),
    "batch": ((16, 32, 20, 20), batch, ()),
    "instance": ((16, 32, 20, 20), instance, ()),
    "group": ((16, 32, 20, 20), group, (8,)),
    # few huge groups: chunks of one group at a time
    "layer, one row": ((1, 300_001), layer, (-1,)),
    "layer, everything": ((37, 90, 70), layer, (0, 1, 2)),
    "rms, one row": ((1, 300_001), rms, (-1,)),
    "batch, one channel": ((40, 1, 90, 90), batch, ()),
    "instance, one of each": ((1, 1, 500, 500), instance, ()),
    "group, one group": ((1, 16, 150, 150), group, (1,)),
    # columns: many tiles
    "batch, channels last": ((8, 20, 20, 700), batch, (-1,)),
    "batch, no space": ((300, 1500), batch, ()),
    "batch, short space": ((200, 100, 9), batch, ()),
    "instance, channels last": ((16, 20, 20, 64), instance, (-1,)),
    "group, channels last": ((16, 20, 20, 64), group, (8, -1)),
    "layer, channels first": ((16, 64, 20, 20), layer, (1,)),
    "rms, channels first": ((16, 64, 20, 20), rms, (1,)),
    # columns: few tiles, chunks of rows
    "batch, channels last, narrow": ((64, 60, 60, 3), batch, (-1,)),
    "batch, channels last, folded to one tile": ((32768, 6), batch, ()),
    "instance, channels last, narrow": ((1, 300, 300, 3), instance, (-1,)),
    "group, channels last, one sample": ((1, 70, 70, 96), group, (32, -1)),
    "group, channels last, one group": ((1, 70, 70, 30), group, (1, -1)),
    "layer, channels first, one sample": ((1, 2000, 10, 10), layer, (1,)),
}
every_case = pytest.mark.parametrize("case", CASES)


def data(shape: tuple[int, ...]) -> np.ndarray:
    """Return data whose sums depend on their order: a mean of 100, and sorted stretches."""
    x = normal(0, shape).reshape(-1)
    x[: x.size // 3].sort()
    return (x + np.float32(100)).reshape(shape)


@needs_two
class TestSameBits:
    @every_case
    def test_input(self, case: str, workers: Workers) -> None:
        shape, norm, options = CASES[case]
        x = data(shape)
        assert x.size >= 2**17
        assert len(workers.digests(lambda: norm(x, *options))) == 1

    @pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("rms")])
    def test_mask(self, case: str, workers: Workers) -> None:
        shape, norm, options = CASES[case]
        x, mask = data(shape), np.random.default_rng(0).random(shape) < 0.7
        assert len(workers.digests(lambda: norm(x, *options, mask=mask))) == 1

    @pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("layer", "rms"))])
    def test_residual(self, case: str, workers: Workers) -> None:
        shape, norm, options = CASES[case]
        x, residual = data(shape), normal(5, shape)
        assert len(workers.digests(lambda: norm(x, *options, residual=residual))) == 1


@needs_two
def test_same_bits_in_evaluation(workers: Workers) -> None:
    shapes = (
        ((16, 32, 20, 20), 1),
        ((16, 40, 40, 32), -1),
        ((1, 1, 600, 600), 1),
        ((300_000, 3), 1),
        ((64, 64, 7, 7), 1),
    )
    for shape, axis in shapes:
        x, c = data(shape), shape[axis]
        running = normal(3, (c,)), normal(4, (c,)) ** 2
        assert len(workers.digests(partial(nn.batch_norm, x, *running, *affine(c), channel_axis=axis))) == 1


def expected(norm: Callable[..., Any], x: np.ndarray, *options: int) -> tuple[np.ndarray, ...]:
    """Return what one of the functions above must return, from the definition."""
    if norm in (layer, rms):
        lengths = tuple(x.shape[a] for a in options)
        weight, bias = normal(1, lengths), normal(2, lengths)
        if norm is rms:
            true = reference.rms_norm(x, options, weight)
            return true.y, true.rstd
        true = reference.layer_norm(x, options, weight, bias)
        return true.y, true.mean, true.rstd
    *groups, axis = options if len(options) > (norm is group) else (*options, 1)
    c = x.shape[axis]
    if norm is group:
        true = reference.group_norm(x, *groups, *affine(c), channel_axis=axis)
        return true.y, true.mean, true.rstd
    function = reference.batch_norm if norm is batch else reference.instance_norm
    true = function(x, np.zeros(c), np.ones(c), *affine(c), True, channel_axis=axis)
    return true.y, true.mean, true.rstd, true.running_mean, true.running_var


@every_case
def test_values_in_parallel(case: str, each: Workers) -> None:
    """Results, statistics and running statistics."""
    shape, norm, options = CASES[case]
    x = data(shape)
    found, true = norm(x, *options), expected(norm, x, *options)
    assert error(found[0], true[0]) <= FLOAT32
    for statistic, correct in zip(found[1:], true[1:], strict=True):
        np.testing.assert_allclose(statistic, correct, 1e-6, 1e-8)


BATCHED: dict[str, tuple[tuple[int, ...], Callable[..., Any]]] = {
    "layer": ((8, 700), lambda x: nn.layer_norm(x, 700)),
    "layer, wide": ((6, 40_000), lambda x: nn.layer_norm(x, 40_000)),
    "layer, narrow": ((40_000, 7), lambda x: nn.layer_norm(x, 7)),
    "layer, tokens": ((6, 40, 768), lambda x: nn.layer_norm(x, 768)),
    "layer, channels first": ((6, 64, 30, 30), lambda x: nn.layer_norm(x, 64, axis=1)),
    "rms": ((8, 700), lambda x: nn.rms_norm(x, 700)),
    "rms, wide": ((6, 40_000), lambda x: nn.rms_norm(x, 40_000)),
    "instance": ((6, 5, 200, 200), nn.instance_norm),
    "instance, short": ((6, 50, 5, 5), nn.instance_norm),
    "instance, channels last": ((6, 100, 100, 3), lambda x: nn.instance_norm(x, channel_axis=-1)),
    "instance, channels last, wide": ((6, 12, 12, 700), lambda x: nn.instance_norm(x, channel_axis=-1)),
    "group": ((6, 32, 40, 40), lambda x: nn.group_norm(x, 4)),
    "group, one": ((6, 8, 200, 200), lambda x: nn.group_norm(x, 1)),
    "group, channels last": ((6, 40, 40, 32), lambda x: nn.group_norm(x, 4, channel_axis=-1)),
    "group, channels last, narrow": ((6, 200, 200, 4), lambda x: nn.group_norm(x, 2, channel_axis=-1)),
}


@pytest.mark.parametrize("case", BATCHED)
def test_batch_invariance(case: str, each: Workers) -> None:
    """What came along with a sample changes none of its bits."""
    shape, call = BATCHED[case]
    x = data(shape)
    y = call(x)
    for part in (slice(0, 1), slice(1, 3), slice(2, None), slice(len(x) - 1, len(x)), slice(None, None, 2)):
        np.testing.assert_array_equal(call(np.ascontiguousarray(x[part])), y[part])
    held = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    turned = np.moveaxis(held, -1, 1)  # the other memory order
    y = call(turned)
    for part in (slice(0, 1), slice(1, 3), slice(len(x) - 1, len(x))):
        np.testing.assert_array_equal(call(np.moveaxis(held[part].copy(), -1, 1)), y[part])


def test_moments_of_a_row_do_not_depend_on_the_others(each: Workers) -> None:
    x = data((6, 40_000))
    m = nn.Moments.of(x, 1)
    one = nn.Moments.of(x[2:3], 1)
    assert m.mean[2] == one.mean[0]
    assert m.var()[2] == one.var()[0]


class TestNumber:
    def test_set_and_get(self) -> None:
        for n in range(1, min(numba.config.NUMBA_NUM_THREADS, 4) + 1):
            nn.set_num_threads(n)
            assert nn.get_num_threads() == n
        nn.set_num_threads(np.int64(1))
        assert nn.get_num_threads() == 1
        assert type(nn.get_num_threads()) is int

    @pytest.mark.parametrize(
        ("n", "kind", "message"),
        [
            (0, ValueError, r"n: expected 1 to \d+ threads .*got 0"),
            (-1, ValueError, "n: .*got -1"),
            (10**6, ValueError, "n: .*got 1000000"),
            (1.0, TypeError, "n: expected an integer, got float"),
            ("2", TypeError, "n: expected an integer, got str"),
            (True, TypeError, "n: expected an integer, got bool"),
            (None, TypeError, "n: expected an integer, got NoneType"),
        ],
    )
    def test_wrong(self, n: Any, kind: type[Exception], message: str) -> None:
        nn.set_num_threads(1)
        with pytest.raises(kind, match=message):
            nn.set_num_threads(n)
        assert nn.get_num_threads() == 1

    NUMBAS_OWN = """
import threading, numba, numbanorm as nn
print(nn.get_num_threads() == numba.config.NUMBA_NUM_THREADS, threading.active_count())
print(numba.np.ufunc.parallel._is_initialized)
numba.set_num_threads(1)
print(nn.get_num_threads())
numba.set_num_threads(2)
print(nn.get_num_threads(), numba.get_num_threads())
nn.set_num_threads(1)
print(nn.get_num_threads())
"""

    @needs_two
    @pytest.mark.parametrize("name", ["claims", "workqueue"])
    def test_numbas_own_number_is_the_default(self, name: str) -> None:
        """Whatever the engine; to ask starts no threads."""
        assert run(self.NUMBAS_OWN, **choosing(name)).split() == ["True", "1", "False", "1", "2", "2", "1"]

    def test_a_call_wakes_no_more_helpers_than_it_has_work_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernel_threads, "_requested", 64)
        monkeypatch.setattr(kernel_threads, "_chosen", "claims")
        monkeypatch.setattr(Helpers, "may_help", lambda self, large: True)
        monkeypatch.setattr(Helpers, "at_hand", lambda self, number, large: number)
        cpu = profile()
        assert engine.threads_for(cpu.share_from - 1) == 1
        assert engine.threads_for(cpu.share_from) == 2
        assert engine.threads_for(cpu.share * 8) == 9
        assert engine.threads_for(cpu.share * 100) == 64
        monkeypatch.setattr(kernel_threads, "_chosen", "numba")
        assert engine.threads_for(cpu.numba_from - 1) == 1
        assert engine.threads_for(cpu.numba_from) == 64


class TestChoice:
    """Which engine: what the environment says when numbanorm is imported."""

    @pytest.mark.parametrize(
        ("asked", "layer", "chosen"),
        [
            (None, "default", "claims"),
            ("", "default", "claims"),
            (None, "omp", "numba"),
            ("", "forksafe", "numba"),
            ("claims", "omp", "claims"),
            (" Claims ", "tbb", "claims"),
            ("numba", "default", "numba"),
            ("NUMBA", "workqueue", "numba"),
        ],
    )
    def test_engine(self, asked: str | None, layer: str, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("NUMBANORM_THREADS", raising=False)
        if asked is not None:
            monkeypatch.setenv("NUMBANORM_THREADS", asked)
        monkeypatch.setattr(numba.config, "THREADING_LAYER", layer)
        assert kernel_threads._engine() == chosen

    def test_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NUMBANORM_THREADS", "openmp")
        with pytest.raises(ValueError, match="NUMBANORM_THREADS: expected one of claims, numba, got 'openmp'"):
            kernel_threads._engine()

    def test_a_layer_in_the_environment(self) -> None:
        code = "from numbanorm.core import threads; print(threads.uses_numba())"
        assert run(code, NUMBANORM_THREADS="", NUMBA_THREADING_LAYER="workqueue") == "True"
        assert run(code, NUMBANORM_THREADS="", NUMBA_THREADING_LAYER="default") == "False"


UNITS = 100
ARRIVED, LEAVE, CALLER_FAILS, HELPER_FAILS = UNITS, UNITS + 1, UNITS + 2, UNITS + 3
"""Places behind those of the units: where a helper tells that it has claimed one, waits, and who is to fail."""


@Kernel
def _mark(job, workers, geometry, marks):
    """Write 1 for each unit; the caller does none before a helper has one, which waits until it may go on.

    Where none comes for a second, the caller does all.
    """
    p_job, p_marks = pointer(job), pointer(marks)
    helps = claims._look(p_job, claims.JOB_FIRST) >= 0
    unit = claims.claim(p_job, np.int64(-1), np.int64(UNITS))
    if helps:
        claims._add(p_marks, ARRIVED, 1)
        while claims._look(p_marks, LEAVE) == 0:
            pass
    for _ in range(1 << 30):
        if claims._look(p_marks, ARRIVED) != 0:
            break
    if claims._look(p_marks, HELPER_FAILS if helps else CALLER_FAILS) != 0:
        raise MemoryError
    while unit < UNITS:
        claims._add(p_marks, unit, 1)
        unit = claims.claim(p_job, unit, np.int64(UNITS))
    return 0


def mark(helpers: Helpers, number: int = 1, leave_after: float = 0.0, **told: int) -> np.ndarray:
    """Run the kernel above with so many helpers, which may go on after some seconds; return what it wrote."""
    marks = np.zeros(UNITS + 4, np.int64)
    for place in told.values():
        marks[place] = 1
    entry = _mark.bound(claims.JOB, claims.INT64, claims.JOB, claims.JOB)
    helpers.start(number)
    locks = helpers.board[board.HELPERS + board.LOCK :: board.OF_HELPER]
    assert until(lambda: np.count_nonzero(locks) >= number)  # all of them can be called
    timer = threading.Timer(leave_after, marks.__setitem__, (LEAVE, 1))
    timer.start()
    try:
        assert helpers.run(entry, number, (np.zeros(1, np.int64), marks)) == 0
    except BaseException as error:
        error.marks = marks  # type: ignore[attr-defined]
        raise
    finally:
        seen = marks.copy()
        timer.join()
        time.sleep(0.005)
        assert (marks[:UNITS] == seen[:UNITS]).all(), "somebody was still at work"
    return marks


def fail(error: BaseException) -> None:
    """Raise an error."""
    raise error


def until(condition: Callable[[], bool]) -> bool:
    """Wait until something holds, for a while."""
    for _ in range(2000):
        if condition():
            return True
        time.sleep(0.01)
    return False


def address(array: np.ndarray) -> int:
    """Return where an array begins."""
    return array.__array_interface__["data"][0]


@pytest.fixture
def helpers(monkeypatch: pytest.MonkeyPatch, workers: Workers) -> Helpers:
    """Return helpers of this test's own."""
    own = Helpers()
    monkeypatch.setattr(cpu_helpers, "_helpers", own)
    monkeypatch.setattr(kernel_threads, "_chosen", "claims")
    monkeypatch.setattr(kernel_threads, "_requested", 2)  # on one core, too
    monkeypatch.setattr(cpu_helpers, "LOOKS", 1 << 24)  # 10 ms: it is still awake when the call comes
    return own


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch, helpers: Helpers) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Hold helpers up where they begin, as a machine does that has no core for them; return what opens and tells."""
    opened, left = threading.Event(), threading.Event()
    own = cpu_helpers.compiled()

    def late(*arguments: Any) -> Any:
        assert opened.wait(60)
        left.set()
        own.serve(*arguments)

    monkeypatch.setattr(cpu_helpers, "compiled", lambda: own._replace(serve=late))
    yield opened, left
    opened.set()


class TestHelpers:
    """Threads of Python's that take part in a launch, or are held up."""

    def test_a_helper_that_does_not_run_delays_no_call(self, gate: tuple[threading.Event, threading.Event]) -> None:
        """Not the first one, nor one after all have slept; it comes when the call is over, and does nothing."""
        x = normal(0, (1024, 1024))
        nn.set_num_threads(1)
        expected = nn.layer_norm(x, 1024)
        kernel_threads._requested = 2
        for _ in range(3):
            time.sleep(0.02)
            start = time.perf_counter()
            y = nn.layer_norm(x, 1024)
            assert time.perf_counter() - start < 10  # the gate would hold it for a minute
            np.testing.assert_array_equal(y, expected)
        gate[0].set()
        assert gate[1].wait(10)
        time.sleep(0.05)
        np.testing.assert_array_equal(y, expected)

    @pytest.mark.parametrize("shape", [(1024, 1100), (1024, 2200)], ids=["counted", "leased"])
    def test_a_late_helper_keeps_no_output_from_its_reuse(
        self, gate: tuple[threading.Event, threading.Event], shape: tuple[int, int]
    ) -> None:
        """The board still tells where it was when the helper comes."""
        x = normal(0, shape)
        y = nn.layer_norm(x, shape[1])
        place, gone = address(y), weakref.ref(y)
        del y
        assert gone() is None
        z = pool.POOL.empty(shape, np.dtype(np.float32), x)
        assert address(z) == place
        z[...] = 7
        gate[0].set()
        assert gate[1].wait(10)
        time.sleep(0.05)
        assert (z == 7).all()

    def test_no_array_is_kept_by_helpers_that_never_came(
        self, helpers: Helpers, workers: Workers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(threading.Thread, "start", lambda self: None)
        monkeypatch.setattr(kernel_threads, "_requested", 3)
        arrays = [normal(i, (512, 512)) for i in range(3)]
        gone = []
        for _ in range(100):
            for x in arrays:
                gone.append(weakref.ref(nn.layer_norm(x, 512)))
        assert workers.launches == 300
        assert all(reference() is None for reference in gone)

    def test_the_caller_waits_for_units_that_a_helper_has_claimed(self, helpers: Helpers) -> None:
        start = time.perf_counter()
        assert (mark(helpers, leave_after=0.2)[:UNITS] == 1).all()
        assert time.perf_counter() - start >= 0.2

    def test_what_a_helper_runs_out_of_the_caller_hears(self, helpers: Helpers) -> None:
        with pytest.raises(MemoryError) as caught:
            mark(helpers, fails=HELPER_FAILS)
        assert caught.value.marks[:UNITS].sum() == UNITS - 1  # type: ignore[attr-defined]  # all but the one it had
        assert (mark(helpers)[:UNITS] == 1).all()
        assert len(helpers) == 1  # it lives on

    def test_a_caller_that_fails_leaves_nobody_at_work(self, helpers: Helpers) -> None:
        """Helpers finish the units that they have claimed, and claim no more, before the error comes out."""
        with pytest.raises(MemoryError) as caught:
            mark(helpers, leave_after=0.2, fails=CALLER_FAILS)
        assert 1 <= caught.value.marks[:UNITS].sum() < UNITS  # type: ignore[attr-defined]
        assert (mark(helpers)[:UNITS] == 1).all()

    def test_an_interrupt_at_any_step_leaves_nobody_at_work(self, helpers: Helpers) -> None:
        """One call for each instruction of Python's between its start and its end, interrupted there."""
        mark(helpers)
        steps = left = 0

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename != cpu_helpers.__file__:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace

        interrupted = True
        before = sys.gettrace()
        while interrupted:
            steps += 1
            left = steps
            try:
                sys.settrace(trace)
                marks = mark(helpers, leave_after=0.003)  # which looks whether somebody is at work
                interrupted = False
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(before)
            assert helpers.board[board.BUSY] == 0
        assert (marks[:UNITS] == 1).all()
        assert steps > 60

    def test_no_more_than_so_many_take_part(self, helpers: Helpers) -> None:
        """However many there are, and awake for others."""
        for most in (3, 1, 2):
            marks = mark(helpers, most, leave_after=0.1)
            assert 1 <= marks[ARRIVED] <= most
            assert len(helpers) == 3
        for _ in range(3):  # whoever is called twice comes once, and sleeps again
            cpu_helpers.compiled().wake(helpers.board, 3)
        assert until(lambda: helpers._awake() == 0)

    def test_who_finds_another_call_on_the_board_works_alone(self, helpers: Helpers) -> None:
        x = normal(0, (512, 512))
        nn.set_num_threads(1)
        expected = nn.layer_norm(x, 512)
        kernel_threads._requested = 2
        with ThreadPoolExecutor(1) as other:
            first = other.submit(mark, helpers, leave_after=0.5)
            assert until(lambda: helpers.board[board.BUSY] == 1)
            np.testing.assert_array_equal(nn.layer_norm(x, 512), expected)
            assert not first.done()
            assert (first.result()[:UNITS] == 1).all()
        assert helpers.board[board.BUSY] == 0

    def test_units_without_number_are_claimed_in_batches(self, helpers: Helpers) -> None:
        """More of them than a ticket counts."""
        total = 3 * board.COUNT + 5
        job = claims.job_on(helpers.board)
        count = _count.bound(claims.JOB, claims.INT64, claims.INT64)
        assert count(job, 1, total) == total * (total - 1) // 2
        assert helpers.board[board.TOTAL] <= board.COUNT
        assert helpers.board[board.DONE] == helpers.board[board.TOTAL]

    def test_where_no_thread_can_be_started_the_caller_does_all(
        self, helpers: Helpers, monkeypatch: pytest.MonkeyPatch, workers: Workers
    ) -> None:
        x = normal(0, (512, 512))
        expected = nn.layer_norm(x, 512)
        monkeypatch.setattr(threading.Thread, "start", lambda self: fail(RuntimeError("can't start new thread")))
        monkeypatch.setattr(kernel_threads, "_requested", 4)
        before = workers.launches
        np.testing.assert_array_equal(nn.layer_norm(x, 512), expected)
        assert workers.launches == before + 1

    FORKED_WITHIN = """
import os, signal, time
import numpy as np
from numbanorm.cpu import board, helpers
own = helpers.helpers()
children = []
def fork(*_):
    children.append(os.fork())
signal.signal(signal.SIGALRM, fork)
def entry(job, workers):
    job[board.JOB_MINE] = 1  # as if a helper had claimed the one unit that there is
    own.board[board.TOTAL] = 1
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    return 0
own.start = lambda number: number
pause = own._pause
def over():
    pause()
    if children and children[0]:
        own.board[board.DONE] = 1
own._pause = over
try:
    own.run(entry, 1, ())  # a handler forks in here, and the child comes back without the helper
except RuntimeError as error:
    os._exit(7 if children == [0] and "forked" in str(error) else 8)
print(os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]))
"""

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_child_that_is_forked_within_a_call_does_not_wait_for_helpers_of_its_parent(self) -> None:
        assert run(self.FORKED_WITHIN) == "7"


@Kernel
def _count(job, workers, total):
    """Return the sum of all units' numbers."""
    p_job = pointer(job)
    found = np.int64(0)
    unit = claims.claim(p_job, np.int64(-1), total)
    while unit < total:
        found += unit
        unit = claims.claim(p_job, unit, total)
    return found


class TestAtHand:
    """Who takes part in a call: by how long ago the last one was, and what else the machine does."""

    @pytest.fixture
    def told(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
        """Return what asks helpers of its own, for two, so many seconds after a call, with so many cores idle."""

        def ask(since: float, idle: int | None, large: bool = False, awake: int = 0) -> int:
            own = Helpers()
            own._number = 2
            own.last = time.perf_counter() - since
            own.board[board.HELPERS : board.HELPERS + board.OF_HELPER * awake : board.OF_HELPER] = board.AWAKE
            monkeypatch.setattr(cpu_helpers, "idle_cores", lambda: idle)
            return own.at_hand(2, large) if own.may_help(large) else 0

        return ask

    def test_after_a_while_only_large_calls_are_shared(self, told: Callable[..., int]) -> None:
        assert told(1.0, 4) == 0
        assert told(1.0, 4, large=True) == 2
        assert told(-1.0, 4) == 2  # the last one has just ended, whatever the clock does

    def test_no_more_help_than_cores_are_idle(self, told: Callable[..., int]) -> None:
        assert [told(-1.0, idle) for idle in (0, 1, 2)] == [0, 1, 2]
        assert [told(1.0, idle, large=True) for idle in (0, 1, 2)] == [0, 1, 2]

    def test_who_is_awake_holds_a_core_of_those_that_are_not_idle(self, told: Callable[..., int]) -> None:
        assert [told(-1.0, idle, awake=1) for idle in (0, 1)] == [1, 2]

    def test_where_the_system_does_not_say_only_large_calls_are_shared(self, told: Callable[..., int]) -> None:
        assert told(-1.0, None) == 0
        assert told(-1.0, None, awake=2) == 0
        assert told(1.0, None, large=True) == 2

    def test_the_system_is_not_asked_at_every_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[int] = []
        monkeypatch.setattr(cpu_helpers, "_ASK_AGAIN", 60.0)
        for idle in (1, 0):
            own = Helpers()
            asked.clear()
            monkeypatch.setattr(cpu_helpers, "idle_cores", lambda: asked.append(1) or idle)  # noqa: B023
            assert [own.at_hand(2, True) for _ in range(5) if own.may_help(True)] == ([1] * 5 if idle else [0])
            assert len(asked) == 1


class TestIdleCores:
    """What Linux tells of the threads that run."""

    @pytest.mark.parametrize(
        ("text", "idle"),
        [
            ("0.20 0.18 0.12 1/80 11206\n", 3),
            ("9.20 9.18 9.12 3/80 11206\n", 1),
            ("9.20 9.18 9.12 9/80 11206\n", 0),
            ("0.20 0.18 0.12 0/0 11206\n", None),
            ("0.20 0.18\n", None),
            ("0.20 0.18 0.12 many/80 11206\n", None),
            ("", None),
        ],
    )
    def test_load(self, text: str, idle: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "loadavg").write_text(text)
        monkeypatch.setattr(cpu_idle, "_LOAD", str(tmp_path / "loadavg"))
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 4)
        assert cpu_idle.idle_cores() == idle
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
        assert cpu_idle.idle_cores() is None  # on which cores the others run is not known

    def test_no_such_system(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cpu_idle, "_LOAD", str(tmp_path / "none"))
        assert cpu_idle.idle_cores() is None
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        assert cpu_idle.idle_cores() is None

    @pytest.mark.skipif(sys.platform != "linux", reason="Linux tells it")
    def test_here(self) -> None:
        found = cpu_idle.idle_cores()
        assert found is None or 0 <= found < os.cpu_count()  # type: ignore[operator]


@needs_two
@pytest.mark.slow
class TestCallers:
    """Python threads and forked processes that call the kernels."""

    PYTHON_THREADS = """
import numpy as np, numbanorm as nn
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
import sharing
sharing.always()
nn.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((512, 768), dtype=np.float32)
xs = [x + np.float32(i) for i in range(4)]
expected = [(nn.layer_norm(a, 768), nn.batch_norm(a, training=True)) for a in xs]
def work(i):
    same = True
    for _ in range(100):
        a, b = nn.layer_norm(xs[i], 768), nn.batch_norm(xs[i], training=True)
        same = same and np.array_equal(a, expected[i][0]) and np.array_equal(b, expected[i][1])
    return same
with ThreadPoolExecutor(4) as pool:
    assert all(pool.map(work, range(4)))
print("ok")
"""

    @pytest.mark.parametrize("name", ["claims", "default", "workqueue", "omp"])
    def test_python_threads(self, name: str) -> None:
        if name == "omp" and not has_omp():
            pytest.skip("this Numba has no OpenMP")
        assert run(self.PYTHON_THREADS, **choosing(name)) == "ok"

    FORK = """
import os, numpy as np, numbanorm as nn
from numbanorm.core import threads
from numbanorm.cpu.helpers import helpers
import sharing
sharing.always()
nn.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((512, 768), dtype=np.float32)
def call():
    return nn.layer_norm(x, 768).tobytes(), nn.batch_norm(x, training=True).tobytes()
expected = call()
child = os.fork()
if child == 0:
    assert len(helpers()) == 0
    assert call() == expected
    assert (threads.usable_threads(), len(helpers())) == ((1, 0) if threads.uses_numba() else (2, 1))
    os._exit(0)
_, status = os.waitpid(child, 0)
assert call() == expected
print(status)
"""

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.parametrize("name", ["claims", "default", "workqueue"])
    def test_forked_child(self, name: str) -> None:
        """By helpers of its own; on one thread where Numba's were started before."""
        assert run(self.FORK, **choosing(name)) == "0"


def test_python_threads_on_small_arrays() -> None:
    """Serial kernels hold no lock, and share no memory between calls on arrays of one shape."""
    xs = [normal(i, (20, 300)) for i in range(8)]

    def results(x: np.ndarray) -> list[bytes]:
        y, mean, rstd = nn.batch_norm(x, training=True, return_stats=True)
        return [array.tobytes() for array in (nn.layer_norm(x, 300), y, mean, rstd)]

    expected = [results(x) for x in xs]
    assert len({each[0] for each in expected}) == 8
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda i: results(xs[i % 8]) == expected[i % 8], range(400)))
