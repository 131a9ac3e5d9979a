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
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import numba
import numpy as np
import pytest
import reference
from engines import choosing, has_omp
from processes import run
from reference import error, normal
from tolerances import FLOAT32

import numbanorm as nn
from numbanorm.calls import host
from numbanorm.core import pool
from numbanorm.core import threads as kernel_threads
from numbanorm.cpu import bound, claims, engine
from numbanorm.cpu.bound import FLOAT64_ADDRESS
from numbanorm.cpu.dtypes import pointer, store
from numbanorm.cpu.jit import Kernel

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
        monkeypatch.setattr(engine, "SHARE_FROM", engine.NUMBA_FROM)

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
        ((16, 20, 20, 32), -1),
        ((1, 1, 600, 600), 1),
        ((70000, 3), 1),
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
        assert engine.threads_for(engine.SHARE_FROM - 1) == 1
        assert engine.threads_for(engine.SHARE_FROM) == 1 + engine.HELPERS
        assert engine.threads_for(engine.SHARE_FROM * 100) == 64
        monkeypatch.setattr(kernel_threads, "_chosen", "numba")
        assert engine.threads_for(engine.NUMBA_FROM - 1) == 1
        assert engine.threads_for(engine.NUMBA_FROM) == 64


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


@Kernel
def _take(job):
    """Claim a unit."""
    return claims.claim(pointer(job), np.int64(-1), np.int64(UNITS))


@Kernel
def _finish(job, unit, y):
    """Do a unit, if it is one, and all that are left."""
    p_job, p_y = pointer(job), pointer(y)
    if unit < 0:
        unit = claims.claim(p_job, unit, np.int64(UNITS))
    while unit < UNITS:
        store(p_y, unit, np.float64(1.0))
        unit = claims.claim(p_job, unit, np.int64(UNITS))


def share(y: np.ndarray, caller: Callable[[], Any], helper: Callable[[], Any]) -> Any:
    """Run a job whose units write 1 to `y`; a helper claims the first, then each does as told, then all others."""
    take = _take.bound(claims.JOB)
    finish = _finish.bound(claims.JOB, claims.INT64, FLOAT64_ADDRESS)
    claimed = threading.Event()

    def entry(job: np.ndarray, workers: int, geometry: np.ndarray, y: Any) -> int:
        unit = -1
        if threading.current_thread().name == "numbanorm":
            unit = take(job)
            claimed.set()
            helper()
        else:
            assert claimed.wait(10)
            caller()
        finish(job, unit, y)
        return 0

    return engine.run_shared(entry, lambda: entry, 2, (np.zeros(1), y))


def nothing() -> None:
    """Do nothing."""


def fail(error: BaseException) -> None:
    """Raise an error."""
    raise error


@contextmanager
def offered(launch: Callable[[], Any], most: int) -> Iterator[kernel_threads.Task]:
    """Offer a launch to so many helpers."""
    task = kernel_threads.Task(lambda: launch, most)
    task.offer()
    yield task
    task.close()


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


class Gate:
    """Stops a helper where it would begin, as a machine does that has no core for it; the caller goes on then."""

    def __init__(self) -> None:
        self.reached, self.opened, self.left = threading.Event(), threading.Event(), threading.Event()

    def apart(self, original: Callable[..., Callable[[], Any]]) -> Callable[..., Callable[[], Any]]:
        """Return what makes launches for helpers that stop here first; they keep no array by then."""

        def made(*arguments: Any) -> Callable[[], Any]:
            launch = original(*arguments)

            def late() -> Any:
                self.reached.set()
                assert self.opened.wait(60)
                try:
                    return launch()
                finally:
                    self.left.set()

            return late

        return made


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch, workers: Workers) -> Iterator[Gate]:
    """Return a gate that is closed, in front of a helper of this test's own."""
    gate = Gate()
    run_shared = bound.run_shared

    def after_it(entry: Callable[..., Any], *rest: Any) -> Any:
        return run_shared(lambda *arguments: gate.reached.wait(30) and entry(*arguments), *rest)

    monkeypatch.setattr(bound, "run_shared", after_it)
    monkeypatch.setattr(kernel_threads, "_helpers", kernel_threads._Helpers())
    monkeypatch.setattr(engine, "_apart", gate.apart(engine._apart))
    monkeypatch.setattr(kernel_threads, "_chosen", "claims")
    monkeypatch.setattr(kernel_threads, "_requested", 2)  # on one core, too
    yield gate
    gate.opened.set()


class TestHelpers:
    """Threads of Python's that take part in a launch, or are held up."""

    def test_a_helper_that_does_not_run_delays_no_call(self, gate: Gate) -> None:
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
        gate.opened.set()
        assert gate.left.wait(10)
        np.testing.assert_array_equal(y, expected)

    @pytest.mark.parametrize("shape", [(1024, 1100), (1024, 2200)], ids=["counted", "leased"])
    def test_a_late_helper_keeps_no_output_from_its_reuse(self, gate: Gate, shape: tuple[int, int]) -> None:
        """It has its addresses when the call ends, and finds another output there when it comes."""
        x = normal(0, shape)
        y = nn.layer_norm(x, shape[1])
        place, gone = address(y), weakref.ref(y)
        del y
        assert gone() is None
        z = pool.POOL.empty(shape, np.dtype(np.float32), x)
        assert address(z) == place
        z[...] = 7
        gate.opened.set()
        assert gate.left.wait(10)
        assert (z == 7).all()

    def test_no_array_is_kept_by_helpers_that_never_came(
        self, helpers: kernel_threads._Helpers, workers: Workers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nor do calls pile up for them."""
        monkeypatch.setattr(helpers, "_start", lambda number: setattr(helpers, "_number", number))
        monkeypatch.setattr(kernel_threads, "_requested", 3)
        arrays = [normal(i, (512, 512)) for i in range(3)]
        gone = []
        for _ in range(100):
            for x in arrays:
                gone.append(weakref.ref(nn.layer_norm(x, 512)))
        assert workers.launches == 300
        assert all(reference() is None for reference in gone)
        assert helpers.tasks == []
        assert helpers._calls.qsize() == 2

    @pytest.fixture
    def helpers(self, monkeypatch: pytest.MonkeyPatch) -> kernel_threads._Helpers:
        """Return helpers of this test's own."""
        helpers = kernel_threads._Helpers()
        monkeypatch.setattr(kernel_threads, "_helpers", helpers)
        monkeypatch.setattr(kernel_threads, "_chosen", "claims")
        return helpers

    def test_the_caller_waits_for_units_that_a_helper_has_claimed(self, helpers: kernel_threads._Helpers) -> None:
        y = np.zeros(UNITS)
        assert share(y, nothing, partial(time.sleep, 0.2)) == 0  # longer than one wait
        assert (y == 1).all()
        assert helpers.tasks == []

    def test_what_a_helper_raises_the_caller_raises(self, helpers: kernel_threads._Helpers) -> None:
        y = np.zeros(UNITS)
        with pytest.raises(MemoryError, match="of the helper"):
            share(y, nothing, partial(fail, MemoryError("of the helper")))
        assert y.sum() == UNITS - 1  # all but the one that was claimed and never done
        assert helpers.tasks == []
        share(y, nothing, nothing)
        assert (y == 1).all()
        assert helpers._number == 1  # it lives on

    def test_what_a_helper_raises_after_all_is_done_nobody_hears(
        self, helpers: kernel_threads._Helpers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = threading.Event()

        def failing(*arguments: Any) -> Any:
            seen.set()
            raise MemoryError

        monkeypatch.setattr(engine, "_apart", failing)
        y = np.zeros(UNITS)
        finish = _finish.bound(claims.JOB, claims.INT64, FLOAT64_ADDRESS)

        def entry(job: np.ndarray, workers: int, geometry: np.ndarray, y: Any) -> int:
            assert seen.wait(10)
            finish(job, -1, y)
            return 0

        assert engine.run_shared(entry, lambda: entry, 2, (np.zeros(1), y)) == 0
        assert (y == 1).all()

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
    def test_a_caller_that_fails_leaves_nobody_at_work(
        self, helpers: kernel_threads._Helpers, kind: type[BaseException]
    ) -> None:
        """Helpers finish the units that they have claimed, and claim no more, before the error comes out."""
        y = np.zeros(UNITS)
        with pytest.raises(kind):
            share(y, partial(fail, kind()), partial(time.sleep, 0.2))
        assert y.sum() == 1
        assert helpers.tasks == []
        time.sleep(0.1)
        assert y.sum() == 1

    def test_an_interrupt_at_any_step_leaves_nobody_at_work(self, helpers: kernel_threads._Helpers) -> None:
        """One call for each instruction of Python's between its start and its end, interrupted there."""
        modules = {kernel_threads.__file__, engine.__file__}
        steps = left = 0

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename not in modules:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace

        y = np.zeros(UNITS)
        interrupted = True
        before = sys.gettrace()
        while interrupted:
            steps += 1
            left = steps
            y[...] = 0
            try:
                sys.settrace(trace)
                share(y, nothing, partial(time.sleep, 0.005))
                interrupted = False
            except KeyboardInterrupt:
                sys.settrace(before)
                seen = y.sum()
            finally:
                sys.settrace(before)
            assert helpers.tasks == []
            if interrupted:
                time.sleep(0.01)
                assert y.sum() == seen
        assert (y == 1).all()
        assert steps > 100

    def test_a_helper_that_dies_is_replaced(
        self, helpers: kernel_threads._Helpers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(helpers, "_help", partial(fail, SystemExit()))
            patch.setattr(threading, "excepthook", lambda told: None)
            with offered(nothing, 1):
                assert until(lambda: helpers._number == 0)
        y = np.zeros(UNITS)
        share(y, nothing, nothing)
        assert (y == 1).all()
        assert helpers._number == 1

    def test_no_more_than_so_many_take_part(self, helpers: kernel_threads._Helpers) -> None:
        """However many there are, and awake for others."""
        taken: list[int] = []
        opened = threading.Event()
        for most in (3, 1, 2):
            taken.clear()
            opened.clear()

            def launch() -> None:
                taken.append(1)
                opened.wait(10)

            with offered(launch, most):
                assert until(lambda: len(taken) == most)  # noqa: B023
                helpers.call(3)
                time.sleep(0.05)
                assert len(taken) == most
                opened.set()
        assert helpers._number == 3

    def test_one_helper_goes_from_call_to_call(self, helpers: kernel_threads._Helpers) -> None:
        """It takes part in all that are open when it is awake, and in none that is closed."""
        order: list[str] = []
        opened, done = threading.Event(), threading.Event()

        def first() -> None:
            order.append("first")
            opened.wait(10)

        with offered(first, 1):
            assert until(lambda: order == ["first"])
            with offered(lambda: order.append("closed"), 1):
                pass
            with offered(done.set, 1):
                opened.set()
                assert done.wait(10)
        assert order == ["first"]

    def test_where_no_thread_can_be_started_the_caller_does_all(
        self, helpers: kernel_threads._Helpers, monkeypatch: pytest.MonkeyPatch, workers: Workers
    ) -> None:
        x = normal(0, (512, 512))
        expected = nn.layer_norm(x, 512)
        monkeypatch.setattr(threading.Thread, "start", lambda self: fail(RuntimeError("can't start new thread")))
        monkeypatch.setattr(kernel_threads, "_requested", 4)
        np.testing.assert_array_equal(nn.layer_norm(x, 512), expected)
        assert workers.launches == 1
        assert helpers._number == 0

    FORKED_WITHIN = """
import os, signal, threading, time
import numpy as np
from numbanorm.core import threads
started, over = threading.Event(), threading.Event()
def launch():
    started.set()
    over.wait()
children = []
def fork(*_):
    children.append(os.fork())
signal.signal(signal.SIGALRM, fork)
try:
    task = threads.Task(lambda: launch, 1)
    task.offer()
    started.wait()
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    while not children:
        task.wait()  # a handler forks in here, and the child comes back without the helper
    over.set()
    while children[0] == 0:
        task.wait()
except RuntimeError as error:
    os._exit(7 if children == [0] and "forked" in str(error) else 8)
print(os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]))
"""

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_child_that_is_forked_within_a_call_does_not_wait_for_helpers_of_its_parent(self) -> None:
        assert run(self.FORKED_WITHIN) == "7"


UNMAPPED = 1 << 44
"""An address that no array has; others lie as far apart."""


def test_who_finds_no_unit_left_reads_no_array(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays may be gone by then: a helper that reads one would end the process here."""
    monkeypatch.setattr(kernel_threads, "_chosen", "claims")
    monkeypatch.setattr(kernel_threads, "_requested", 2)
    run_shared = bound.run_shared
    answers = []

    def again(entry: Any, parallel: Any, count: int, arguments: tuple[Any, ...]) -> Any:
        job = claims.shared_job()
        job[claims.NEXT] = claims.NONE_LEFT
        geometry, *others = arguments
        places = [np.intp(UNMAPPED * (1 + i)) if isinstance(a, np.ndarray) else a for i, a in enumerate(others)]
        answers.append(entry(job, 1, geometry, *places))
        return run_shared(entry, parallel, count, arguments)

    monkeypatch.setattr(bound, "run_shared", again)
    for shape, norm, options in CASES.values():
        x = data(shape)
        norm(x, *options)
        if norm in (layer, rms):
            norm(x, *options, residual=x)
        if norm is not rms:
            norm(x, *options, mask=x > 100)
    for shape, axis in (((16, 32, 20, 20), 1), ((16, 20, 20, 32), -1), ((64, 64, 7, 7), 1)):
        x, c = data(shape), shape[axis]
        nn.batch_norm(x, np.zeros(c), np.ones(c), *affine(c), channel_axis=axis)
    for shape, axis in (((16, 32, 20, 20), 1), ((1, 32, 120, 120), 1), ((16, 20, 20, 32), -1), ((1, 90, 90, 32), -1)):
        x, c = data(shape), shape[axis]
        for mask in (None, x > 100):
            y, mean, rstd = nn.batch_norm(x, training=True, channel_axis=axis, mask=mask, return_stats=True)
            nn.batch_norm_backward(y, x, mean, rstd, normal(1, (c,)), channel_axis=axis, mask=mask)
            y, mean, rstd = nn.group_norm(x, 4, channel_axis=axis, mask=mask, return_stats=True)
            nn.group_norm_backward(y, x, 4, mean, rstd, normal(1, (c,)), channel_axis=axis, mask=mask)
    for shape in ((512, 768), (6, 40_000), (1, 300_001)):
        x = data(shape)
        y, mean, rstd = nn.layer_norm(x, shape[1], return_stats=True)
        nn.layer_norm_backward(y, x, shape[1], mean, rstd)
        y, rstd = nn.l2_norm(x, shape[1], return_stats=True)
        nn.l2_norm_backward(y, x, shape[1], rstd)
    assert len(answers) > 50
    assert set(answers) <= {0, None}  # not because addresses clash


@needs_two
@pytest.mark.slow
class TestCallers:
    """Python threads and forked processes that call the kernels."""

    PYTHON_THREADS = """
import numpy as np, numbanorm as nn
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from numbanorm.cpu import engine
engine.SHARE_FROM = engine.NUMBA_FROM
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
from numbanorm.cpu import engine
engine.SHARE_FROM = engine.NUMBA_FROM
nn.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((512, 768), dtype=np.float32)
def call():
    return nn.layer_norm(x, 768).tobytes(), nn.batch_norm(x, training=True).tobytes()
expected = call()
child = os.fork()
if child == 0:
    assert threads._helpers._number == 0
    assert call() == expected
    assert (threads.usable_threads(), threads._helpers._number) == ((1, 0) if threads.uses_numba() else (2, 1))
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
