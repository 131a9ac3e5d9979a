"""The pool of outputs' memory: reused when nobody can see it, and never before."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from processes import run

import numbanorm as nn
from numbanorm.core.pool import ALIGNMENT, APART, PAGE, SMALLEST, Pool, limit_from

SHAPE = (1024, 2200)  # 8.6 MiB of float32: leased
SMALL = (1024, 1100)  # 4.3 MiB: references are counted
FLOAT32 = np.dtype(np.float32)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool(40 << 20)
    yield made
    made.clear()


@pytest.fixture(params=[SMALL, SHAPE], ids=["counted", "leased"])
def shape(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return request.param


def test_memory_comes_back_when_the_array_is_gone(pool: Pool, shape: tuple[int, ...]) -> None:
    first = pool.empty(shape, FLOAT32)
    place = address(first)
    assert pool.kept == 0
    del first
    assert (pool.kept > 0) == (shape == SHAPE)
    assert address(pool.empty(shape, FLOAT32)) == place


def test_arrays_are_aligned_writeable_and_of_the_shape_asked_for(pool: Pool) -> None:
    for shape in ((4096, 1100), (2048, 300), (3, 5, 170_001)):
        for dtype in (np.dtype(np.float64), np.dtype(np.float16), FLOAT32):
            array = pool.empty(shape, dtype)
            assert array.shape == shape
            assert array.dtype == dtype
            assert array.flags.carray
            assert address(array) % ALIGNMENT == 0
            array[...] = 1


def apart(output: np.ndarray, other: np.ndarray) -> int:
    """Return how far the starts of two arrays are from each other in a page."""
    ahead = (address(output) - address(other)) % PAGE
    return min(ahead, PAGE - ahead)


def test_an_output_starts_elsewhere_in_a_page_than_its_inputs(pool: Pool, shape: tuple[int, ...]) -> None:
    memory = np.empty(np.prod(shape) * 4 + 3 * PAGE, np.uint8)
    page = memory[-address(memory) % PAGE :]
    places = set()
    for first in range(0, PAGE, 176):
        x = page[first:][: np.prod(shape) * 4].view(np.float32).reshape(shape)
        output = pool.empty_like(x, FLOAT32)  # of one block, again and again
        assert address(output) % ALIGNMENT == 0
        assert apart(output, x) > APART - ALIGNMENT
        places.add(address(output) // PAGE * PAGE)
        for second in (0, 16, 1040, 2064, 3000):
            output = pool.empty(shape, FLOAT32, x, page[second:])
            assert address(output) % ALIGNMENT == 0
            assert min(apart(output, x), apart(output, page[second:])) > APART - 2 * ALIGNMENT
        output[...] = 1
    assert len(places) <= 4


def test_outputs_of_norms_start_elsewhere_in_a_page(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    y, mean, rstd, total = nn.layer_norm(x, shape[1], residual=x + 1, return_stats=True)
    assert min(apart(y, x), apart(total, x), apart(total, y)) > APART - 2 * ALIGNMENT
    dx, *_ = nn.layer_norm_backward(y, x, shape[1], mean, rstd)
    assert min(apart(dx, x), apart(dx, y)) > APART - 2 * ALIGNMENT
    channels = x[: shape[0] // 4 * 4].reshape(-1, 4, shape[1] // 4)
    assert apart(nn.batch_norm(channels, np.ones(4), np.ones(4)), channels) > APART - 2 * ALIGNMENT


@pytest.mark.parametrize(
    "look",
    [
        lambda a: a[3:5],
        lambda a: a.T,
        lambda a: a.reshape(-1)[::7],
        lambda a: a.view(np.int32),
        memoryview,
        lambda a: np.asarray(memoryview(a)),
        np.from_dlpack,
        lambda a: np.frombuffer(a, np.uint8),
        lambda a: np.lib.stride_tricks.as_strided(a, (4,), (4,)),
        lambda a: [a],
        lambda a: iter(a),
        lambda a: a.__array_interface__ and np.asarray(a, copy=False),
    ],
)
def test_memory_that_can_be_seen_is_not_reused(pool: Pool, look: Any, shape: tuple[int, ...]) -> None:
    first = pool.empty(shape, FLOAT32)
    place = address(first)
    seen = look(first)
    del first
    gc.collect()
    others = [pool.empty(shape, FLOAT32) for _ in range(2)]  # with the first, fewer than the limit
    assert all(address(other) != place for other in others)
    del seen, others
    gc.collect()
    assert place in [address(array) for array in [pool.empty(shape, FLOAT32) for _ in range(6)]]


@pytest.mark.torch
def test_a_tensor_keeps_its_memory(pool: Pool, shape: tuple[int, ...]) -> None:
    torch = pytest.importorskip("torch")
    first = pool.empty(shape, FLOAT32)
    first[...] = 7
    tensor = torch.from_numpy(first)[5:]
    del first
    gc.collect()
    for _ in range(4):
        pool.empty(shape, FLOAT32)[...] = 1
    assert bool((tensor == 7).all())


def test_the_limit_holds_and_the_longest_unused_go_first(pool: Pool) -> None:
    arrays = [pool.empty((2 << 20,), FLOAT32) for _ in range(8)]  # 8 MiB each, 32 may stay
    places = [address(array) for array in arrays]
    while arrays:
        del arrays[0]
    assert 0 < pool.kept <= pool.limit
    assert address(pool.empty((2 << 20,), FLOAT32)) == places[-1]
    big = pool.empty((16 << 20,), FLOAT32)
    del big
    assert pool.kept <= pool.limit


def test_the_limit_holds_where_references_are_counted(pool: Pool) -> None:
    arrays = [pool.empty(SMALL, FLOAT32) for _ in range(20)]
    assert 0 < pool._counted_bytes <= pool.limit
    places = {address(array) for array in arrays}
    assert len(places) == 20
    del arrays
    other = pool.empty((1024, 1000), FLOAT32)  # there is no room for another size beside those that nobody uses
    assert other.nbytes < pool._counted_bytes < 2 * other.nbytes
    held = [pool.empty(SMALL, FLOAT32) for _ in range(3)]
    lease = pool.empty((8 << 20,), FLOAT32)
    del lease
    assert pool.kept + pool._counted_bytes <= pool.limit
    pool.clear()
    assert pool._counted_bytes == pool.kept == 0
    for number, array in enumerate(held):  # what was in use when the pool forgot it is nobody else's
        array[...] = number
    assert [array.max() for array in held] == [0, 1, 2]


def test_small_arrays_and_a_pool_of_nothing_stay_with_numpy() -> None:
    assert Pool(1 << 30).empty((SMALLEST // 4 - 1,), FLOAT32).flags.owndata
    assert Pool(0).empty(SHAPE, FLOAT32).flags.owndata


def test_garbage_that_is_collected_inside_the_pool(pool: Pool) -> None:
    """A lease may die while the pool's lock is held by the same thread."""
    array = pool.empty(SHAPE, FLOAT32)
    with pool._lock:
        del array
    assert address(pool.empty(SHAPE, FLOAT32))
    assert not pool._returned


def test_a_handler_of_signals_does_not_wait_for_what_it_interrupted(pool: Pool, shape: tuple[int, ...]) -> None:
    """Nor does a thread, for long: it stands in for the handler here, which would hang the tests."""
    made: list[np.ndarray] = []
    with pool._lock:
        other = threading.Thread(target=lambda: made.append(pool.empty(shape, FLOAT32)), daemon=True)
        other.start()
        other.join(10)
        assert made
    made[0][...] = 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_while_a_thread_is_inside_the_pool() -> None:
    """The lock that this thread holds is free in the child, which would wait for it without end."""
    code = """
import os, signal, threading
import numpy as np
from numbanorm.core.pool import POOL
inside, done = threading.Event(), threading.Event()
def hold():
    with POOL._lock:
        inside.set()
        done.wait()
thread = threading.Thread(target=hold)
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    POOL.empty((1 << 23,), np.dtype(np.uint8))
    POOL.empty((1 << 22,), np.dtype(np.uint8))
    os._exit(0)
print(os.waitpid(child, 0)[1])
done.set()
thread.join()
"""
    assert run(code) == "0"


def test_threads(pool: Pool) -> None:
    wrong = []

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        held: list[tuple[np.ndarray, float]] = []
        for step in range(300):
            array = pool.empty((int(rng.integers(2, 12)) << 18,), FLOAT32)  # 2 to 11 MiB
            value = number * 1000.0 + step
            array[::4096] = value
            held.append((array[::4096], value))
            if len(held) > 3:
                view, expected = held.pop(int(rng.integers(0, 4)))
                if not (view == expected).all():
                    wrong.append(value)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.kept <= pool.limit


def test_outputs_of_norms_are_not_overwritten_by_later_calls() -> None:
    x = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    results = [nn.layer_norm(x + i, 1024) for i in range(3)]
    copies = [result.copy() for result in results]
    views = [result[::2, 5:] for result in results]
    del results
    for i in range(5):
        nn.layer_norm(x * i, 1024)
    for view, copy in zip(views, copies, strict=True):
        np.testing.assert_array_equal(view, copy[::2, 5:])


@pytest.mark.parametrize(
    ("text", "limit"), [("0", 0), ("4096", 4096), ("64M", 64 << 20), ("2g", 2 << 30), ("1KiB", 1024)]
)
def test_limits(text: str, limit: int) -> None:
    assert limit_from(text) == limit


@pytest.mark.parametrize("text", ["", "many", "-1", "1.5G", "M"])
def test_wrong_limits(text: str) -> None:
    with pytest.raises(ValueError, match="NUMBANORM_POOL: expected a number of bytes"):
        limit_from(text)


@pytest.mark.parametrize(("value", "owns"), [("0", True), ("64M", False)])
def test_the_environment_switches_it(value: str, owns: bool) -> None:
    code = "import numpy as np, numbanorm as nn; print(nn.layer_norm(np.ones((1024, 1024)), 1024).flags.owndata)"
    assert run(code, NUMBANORM_POOL=value) == str(owns)


def test_a_process_may_end_while_memory_is_in_use() -> None:
    """The last leases go when nothing can be imported any more."""
    code = """
import os
os.dup2(1, 2)
import numpy as np
from numbanorm.core.pool import POOL
held = [POOL.empty((1 << 23,), np.dtype(np.uint8)), POOL.empty((1 << 22,), np.dtype(np.uint8))]
print("done", flush=True)
"""
    assert run(code) == "done"
