"""Same bits on any number of threads and in any batch; setting the number of threads; threads of the caller; forks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import pytest
import reference
from processes import run
from reference import error, normal
from tolerances import FLOAT32

import numbanorm as nn

needs_two = pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs 2 threads")


def digest(results: Any) -> str:
    """Return a hash of all bits of a result, statistics and running statistics included."""
    parts = results if isinstance(results, tuple) else (results,)
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


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


# Each of 2**17 elements or more: from there on kernels run in parallel.
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
    def test_input(self, case: str) -> None:
        shape, norm, options = CASES[case]
        x = data(shape)
        assert x.size >= 2**17
        digests = set()
        for n in (1, 2, 1, 2):
            nn.set_num_threads(n)
            digests.add(digest(norm(x, *options)))
        assert len(digests) == 1

    @pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("rms")])
    def test_mask(self, case: str) -> None:
        shape, norm, options = CASES[case]
        x, mask = data(shape), np.random.default_rng(0).random(shape) < 0.7
        digests = set()
        for n in (1, 2):
            nn.set_num_threads(n)
            digests.add(digest(norm(x, *options, mask=mask)))
        assert len(digests) == 1

    @pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("layer", "rms"))])
    def test_residual(self, case: str) -> None:
        shape, norm, options = CASES[case]
        x, residual = data(shape), normal(5, shape)
        digests = set()
        for n in (1, 2):
            nn.set_num_threads(n)
            digests.add(digest(norm(x, *options, residual=residual)))
        assert len(digests) == 1


@needs_two
def test_same_bits_in_evaluation() -> None:
    for shape, axis in (((16, 32, 20, 20), 1), ((16, 20, 20, 32), -1), ((1, 1, 600, 600), 1), ((70000, 3), 1)):
        x, c = data(shape), shape[axis]
        running = normal(3, (c,)), normal(4, (c,)) ** 2
        digests = set()
        for n in (1, 2):
            nn.set_num_threads(n)
            digests.add(digest(nn.batch_norm(x, *running, *affine(c), channel_axis=axis)))
        assert len(digests) == 1


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
def test_values_in_parallel(case: str, threads: int) -> None:
    """Both twins: results, statistics and running statistics."""
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
def test_batch_invariance(case: str, threads: int) -> None:
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


def test_moments_of_a_row_do_not_depend_on_the_others(threads: int) -> None:
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

    def test_numbas_own_number_is_the_default(self) -> None:
        code = "import numba, numbanorm as nn; numba.set_num_threads(1); print(nn.get_num_threads())"
        assert run(code) == "1"


@needs_two
@pytest.mark.slow
class TestCallers:
    """Python threads and forked processes that call the kernels."""

    PYTHON_THREADS = """
import numpy as np, numbanorm as nn
from concurrent.futures import ThreadPoolExecutor
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

    @pytest.mark.parametrize("layer", ["default", "workqueue", "omp"])
    def test_python_threads(self, layer: str) -> None:
        if layer == "omp" and not has_omp():
            pytest.skip("this Numba has no OpenMP")
        assert run(self.PYTHON_THREADS, NUMBA_THREADING_LAYER=layer) == "ok"

    FORK = """
import os, numpy as np, numbanorm as nn
nn.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((512, 768), dtype=np.float32)
expected = nn.layer_norm(x, 768).tobytes(), nn.batch_norm(x, training=True).tobytes()
child = os.fork()
if child == 0:
    same = (nn.layer_norm(x, 768).tobytes(), nn.batch_norm(x, training=True).tobytes()) == expected
    os._exit(0 if same else 3)
_, status = os.waitpid(child, 0)
assert (nn.layer_norm(x, 768).tobytes(), nn.batch_norm(x, training=True).tobytes()) == expected
print(status)
"""

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.parametrize("layer", ["default", "workqueue"])
    def test_forked_child(self, layer: str) -> None:
        assert run(self.FORK, NUMBA_THREADING_LAYER=layer) == "0"


def has_omp() -> bool:
    try:
        from numba.np.ufunc import omppool  # noqa: F401
    except ImportError:
        return False
    return True


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
