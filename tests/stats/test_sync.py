"""Synchronized batch norm: every rank gets what batch norm gives on all ranks' batches in one array."""

from __future__ import annotations

import multiprocessing as mp
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import SUPPORT
from ranks import C, in_threads, layer, part_of, run
from reference import normal
from tolerances import FLOAT32, FLOAT64
from training_tolerances import GRADIENT_FLOAT32, GRADIENT_FLOAT64

import numbanorm as nn


def scale(array: np.ndarray) -> float:
    return max(float(np.abs(array).max(initial=0)), 1.0)


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert float(np.abs(found.astype(np.float64) - expected).max(initial=0)) <= tolerance * scale(expected)


@settings(max_examples=40)
@given(data=st.data())
def test_threads_give_what_one_array_gives(data: st.DataObject) -> None:
    """Unequal and empty batches, masks, both memory orders, a mean of 1e6; forward, backward and running statistics."""
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=4).filter(lambda s: sum(s) > 1))
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    mean = data.draw(st.sampled_from([0.0, 1e6]))
    last = data.draw(st.booleans())
    shape = (sum(sizes), 3, C) if last else (sum(sizes), C, 3)
    x, dy = (normal(0, shape, np.float64) + mean).astype(dtype), normal(3, shape, dtype)
    mask = np.random.default_rng(4).random(shape) < 0.7 if data.draw(st.booleans()) else None
    options: dict[str, Any] = {"channel_axis": -1 if last else 1, "affine": data.draw(st.booleans())}
    options["momentum"] = data.draw(st.sampled_from([0.1, None]))
    cuts = np.cumsum(sizes)[:-1]
    parts = list(zip(np.split(x, cuts), np.split(dy, cuts), strict=True))
    masks = [None] * len(sizes) if mask is None else np.split(mask, cuts)

    def train(rank: int, sync: Any) -> Any:
        norm = layer(sync, **options)
        batch, gradient = parts[rank]
        y = norm(batch, mask=masks[rank])
        return y, norm.backward(gradient), norm

    results, board = in_threads(len(sizes), train)
    whole = layer(**options)
    expected_y = whole(x, mask=mask)
    expected_dx = whole.backward(dy)
    assert board.calls == 2  # a message forward, one backward
    far = 16 * np.spacing(mean) if dtype == np.float64 else 0.0  # two units of a mean of 1e6, times rstd
    close(np.concatenate([r[0] for r in results]), expected_y, (FLOAT64 if dtype == np.float64 else FLOAT32) + far)
    tolerance = GRADIENT_FLOAT64 if dtype == np.float64 else GRADIENT_FLOAT32
    close(np.concatenate([r[1] for r in results]), expected_dx, tolerance + far)
    for name in whole.grad:  # those of the own batch, for the trainer to add up
        total = np.sum([r[2].grad[name] for r in results], axis=0)
        close(total.astype(np.float64), whole.grad[name].astype(np.float64), tolerance * sum(sizes) + far)
    for _, _, norm in results:
        assert norm.num_batches_tracked == 1
        np.testing.assert_allclose(norm.running_mean, whole.running_mean, FLOAT32, FLOAT32)
        np.testing.assert_allclose(norm.running_var, whole.running_var, 2 * FLOAT32)
        for name, array in results[0][2].state_dict().items():  # to the bit the same everywhere
            np.testing.assert_array_equal(norm.state_dict()[name], array)


def test_batches_are_weighted_by_count() -> None:
    """Two ranks of 1 and 99 samples: an average of the ranks' means would be off by half the distance."""
    parts = [np.full((1, C), 100.0), np.zeros((99, C))]
    results, _ = in_threads(2, lambda rank, sync: (norm := layer(sync), norm(parts[rank]))[0].running_mean)
    np.testing.assert_allclose(results, np.full((2, C), 0.1 * 1.0), 1e-6)


def test_inference_does_not_communicate() -> None:
    def never(_: np.ndarray) -> list[np.ndarray]:
        raise AssertionError("communicated")

    x = normal(0, (4, C), np.float32)
    np.testing.assert_array_equal(layer(never).eval()(x), layer().eval()(x))


def test_without_running_statistics_and_alone() -> None:
    x, dy = normal(0, (6, C), np.float64), normal(1, (6, C), np.float64)
    alone, plain = layer(lambda message: [message], track_running_stats=False), layer(track_running_stats=False)
    close(alone(x), plain(x), FLOAT64)
    close(alone.backward(dy), plain.backward(dy), GRADIENT_FLOAT64)
    close(alone.eval()(x), plain.eval()(x), FLOAT64)


# --- errors: all hear of them, nothing changes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "options", "kind", "message"),
    [
        (np.ones((3, C + 1)), {}, ValueError, "x: expected 5 channels"),
        (np.ones((3, C), complex), {}, TypeError, "x: expected"),
        (np.ones((3, C)), {"mask": np.ones((3, C))}, TypeError, "mask: expected dtype bool"),
        (np.ones((3, C)), {"out": np.ones((2, C))}, ValueError, "out: "),
    ],
)
def test_a_rank_that_fails_tells_the_others(x: Any, options: Any, kind: type[Exception], message: str) -> None:
    layers: dict[int, nn.BatchNorm] = {}

    def train(rank: int, sync: Any) -> Any:
        layers[rank] = layer(sync)
        return layers[rank](x, **options) if rank == 1 else layers[rank](np.ones((3, C)))

    results, _ = in_threads(3, train)
    with pytest.raises(kind, match=message):
        raise results[1]
    for rank in (0, 2):
        with pytest.raises(RuntimeError, match=r"sync: expected all processes to take part, but it failed in \[1\]"):
            raise results[rank]
    for norm in layers.values():
        assert norm.num_batches_tracked == 0
        np.testing.assert_array_equal(norm.running_mean, 0)


def test_a_backward_that_fails_tells_the_others() -> None:
    def train(rank: int, sync: Any) -> Any:
        norm = layer(sync)
        norm(normal(rank, (3, C), np.float64))
        return norm.backward(np.ones((3 - rank, C)))

    results, _ = in_threads(2, train)
    assert isinstance(results[0], RuntimeError)
    assert isinstance(results[1], ValueError)
    assert "dy: expected the shape of x" in str(results[1])


def test_one_element_in_all_batches() -> None:
    parts = [np.ones((1, C)), np.ones((0, C))]
    results, _ = in_threads(2, lambda rank, sync: layer(sync)(parts[rank]))
    for error in results:
        with pytest.raises(ValueError, match="expected more than 1 value per channel in all processes' batches"):
            raise error


def test_nothing_anywhere_changes_nothing() -> None:
    results, _ = in_threads(2, lambda rank, sync: (norm := layer(sync), norm(np.ones((0, C)))))
    for norm, y in results:
        assert y.shape == (0, C)
        assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("gathered", [[], [np.ones(3)], [np.ones(22), np.ones(3)]])
def test_a_callable_that_gathers_something_else(gathered: Any) -> None:
    norm = layer(lambda _: gathered)
    with pytest.raises(RuntimeError, match="sync: expected an array of shape"):
        norm(np.ones((3, C)))
    assert norm.num_batches_tracked == 0


def test_what_cannot_gather() -> None:
    with pytest.raises(TypeError, match="sync: expected an mpi4py communicator or a callable that gathers, got int"):
        nn.BatchNorm(C, sync=3)


# --- processes ------------------------------------------------------------------------------------------------------


def check(results: list[dict[str, np.ndarray]]) -> None:
    """Compare the ranks' results with those of one layer on all batches."""
    ranks = len(results)
    x, dy, mask = (np.concatenate(part) for part in zip(*(part_of(rank, ranks) for rank in range(ranks)), strict=True))
    norm = layer()
    expected = {"y": norm(x, mask=mask), "dx": norm.backward(dy), "second": norm(x * 2)}
    for name, array in expected.items():
        close(np.concatenate([result[name] for result in results]), array, 4e-12)  # a mean of 1e3
    close(np.sum([result["dweight"] for result in results], axis=0), norm.grad["weight"], 1e-11)
    for result in results:
        np.testing.assert_allclose(result["mean"], norm.running_mean, 1e-6)
        np.testing.assert_array_equal(result["mean"], results[0]["mean"])


def test_processes() -> None:
    context = mp.get_context("spawn")
    ranks = 3
    ends: list[dict[int, Any]] = [{} for _ in range(ranks)]
    for a in range(ranks):
        for b in range(a):
            ends[a][b], ends[b][a] = context.Pipe()
    results = context.Queue()
    workers = [context.Process(target=run, args=(rank, ranks, ends[rank], results)) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=240) for _ in workers)
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    check([found[rank] for rank in range(ranks)])


MPI = """
import sys
import numpy as np
from mpi4py import MPI

from ranks import train

comm = MPI.COMM_WORLD
result = train(comm.Get_rank(), comm.Get_size(), comm)
np.savez(f"{sys.argv[1]}/{comm.Get_rank()}-of-{comm.Get_size()}.npz", **result)
"""


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, 4])
def test_mpi4py(ranks: int, tmp_path: Path) -> None:
    """Ranks under mpiexec, by way of the communicator itself."""
    pytest.importorskip("mpi4py")
    launcher = shutil.which("mpiexec.mpich") or shutil.which("mpiexec")
    if launcher is None:
        pytest.skip("needs mpiexec: apt-get install mpich")
    path = os.pathsep.join([str(Path(nn.__file__).parents[1]), str(SUPPORT)])
    libraries = tmp_path / "lib"
    libraries.mkdir()
    for debian in sorted(Path("/usr/lib").glob("*/libmpich.so.12")):  # mpi4py's wheels ask for it by MPICH's own name
        (libraries / "libmpi.so.12").symlink_to(debian)
    search = os.pathsep.join([str(libraries), os.environ.get("LD_LIBRARY_PATH", "")])
    done = subprocess.run(
        [launcher, "-n", str(ranks), sys.executable, "-c", MPI, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path, "LD_LIBRARY_PATH": search, "NUMBA_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    names = [f"{rank}-of-{ranks}.npz" for rank in range(ranks)]
    assert sorted(path.name for path in tmp_path.glob("*.npz")) == names  # and not so many ranks that are alone
    check([dict(np.load(tmp_path / name)) for name in names])
