"""Worker processes, a Zarr store on disk, data larger than a worker may hold, and a worker that is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import normal
from tolerances import FLOAT32

import numbanorm as nn

distributed = pytest.importorskip("distributed")
da = pytest.importorskip("dask.array")
zarr = pytest.importorskip("zarr", minversion="3")

pytestmark = pytest.mark.slow

CHUNK = (32, 16, 64, 64)  # 8 MiB of float32
CHUNKS = 60
LIMIT = 400 * 2**20  # bytes a worker; about 200 MB go to Python, NumPy, Numba and dask
MEAN = 1e6


def chunk(index: int) -> np.ndarray:
    """Return one chunk of the store; each has a scale and a mean of its own."""
    block = normal(0, CHUNK, np.float64) * (1 + index % 7) + MEAN + index
    return block.astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zarr") / "x.zarr"
    shape = (CHUNKS * CHUNK[0], *CHUNK[1:])
    array = zarr.create_array(store=path, shape=shape, chunks=CHUNK, dtype="float32", compressors=None)
    for index in range(CHUNKS):
        array[index * CHUNK[0] : (index + 1) * CHUNK[0]] = chunk(index)
    assert array.nbytes > LIMIT
    return path


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "memory_limit": LIMIT}
    with (
        distributed.LocalCluster(**options, dashboard_address=None, host="127.0.0.1") as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def expected() -> nn.Moments:
    """Return the moments of all chunks in this process, one chunk at a time."""
    moments = nn.Moments.of(chunk(0), (0, 2, 3))
    for index in range(1, CHUNKS):
        moments.update(chunk(index))
    return moments


def pids(client: Any) -> set[int]:
    return set(client.run(os.getpid).values())


def finished(client: Any, least: int) -> bool:
    """Tell whether the scheduler has seen that many results."""
    states = client.run_on_scheduler(lambda dask_scheduler: [ts.state for ts in dask_scheduler.tasks.values()])
    return sum(state in ("memory", "released") for state in states) >= least


def test_statistics(client: Any, store: Path, expected: nn.Moments) -> None:
    workers = pids(client)
    assert len(workers) == 2
    assert os.getpid() not in workers
    moments = nn.Moments.of(da.from_zarr(store), (0, 2, 3))
    assert moments.count == expected.count
    np.testing.assert_allclose(moments.mean, expected.mean, 1e-14)
    np.testing.assert_allclose(moments.var(), expected.var(), FLOAT32)
    assert pids(client) == workers  # none ran out of memory


@pytest.mark.parametrize("running", [True, False])
def test_batch_norm_to_a_store(client: Any, store: Path, expected: nn.Moments, tmp_path: Path, running: bool) -> None:
    workers = pids(client)
    norm = nn.BatchNorm(16, track_running_stats=running)
    da.to_zarr(norm(da.from_zarr(store)), str(tmp_path / "y.zarr"))
    result = zarr.open_array(tmp_path / "y.zarr", mode="r")
    for index in (0, 31, CHUNKS - 1):
        y = result[index * CHUNK[0] : (index + 1) * CHUNK[0]]
        correct = nn.batch_norm(chunk(index), expected.mean, expected.var())
        assert float(np.abs(y - correct).max()) <= FLOAT32 * float(np.abs(correct).max())
    assert pids(client) == workers


def test_a_killed_worker_changes_nothing(client: Any, store: Path) -> None:
    def slowly(block: np.ndarray, run: int) -> np.ndarray:
        """Give time to kill a worker; `run` tells the tasks of two computations apart. Goes to the workers by value."""
        time.sleep(0.03)
        return block

    def statistics(run: int) -> Any:
        x = da.from_zarr(store).map_blocks(slowly, run, dtype=np.float32)
        return client.compute(nn.batch_norm(x, training=True, return_stats=True)[1:])

    undisturbed = client.gather(statistics(1))
    before = pids(client)
    futures = statistics(2)
    deadline = time.monotonic() + 30
    while not finished(client, 10):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not any(future.done() for future in futures)
    os.kill(min(before), signal.SIGKILL)
    for result, correct in zip(client.gather(futures), undisturbed, strict=True):
        np.testing.assert_array_equal(result, correct)  # to the bit: the tree's order is that of the chunks
    client.wait_for_workers(2, timeout=30)
    assert min(before) not in pids(client)
