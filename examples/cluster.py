"""Normalize an array larger than any worker's memory, in worker processes, and lose one of them on the way.

    python examples/cluster.py [--gigabytes 1.0] [--workers 2] [--memory 400MB] [--folder DIR]

Writes a Zarr store, takes the exact statistics of every channel by a tree over its chunks, kills a worker (-9) in the
middle, and normalizes the store into another. Then it compares with one process that streams the same store through
`numbanorm.files` in a few megabytes. Needs "numbanorm[dask,zarr]" and psutil, which dask.distributed brings.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import dask.array as da
import numpy as np
import zarr
from dask.distributed import Client, LocalCluster

import numbanorm as nn
from numbanorm import files

CHUNK = (32, 16, 64, 64)  # 8 MB of float32


def fill(path: Path, chunks: int) -> None:
    """Write a store of images whose channels have means of their own; no more than a chunk is ever in memory."""
    shape = (chunks * CHUNK[0], *CHUNK[1:])
    store = zarr.create_array(path, shape=shape, chunks=CHUNK, dtype="float32", compressors=None)
    channels = np.arange(CHUNK[1], dtype=np.float32)[:, None, None]
    for i in range(chunks):
        noise = np.random.default_rng(i).standard_normal(CHUNK, dtype=np.float32)
        store[i * CHUNK[0] : (i + 1) * CHUNK[0]] = 1000 * channels + (1 + i % 3) * noise


def kill_one(client: Client, after: float) -> threading.Thread:
    """Kill a worker process after a while, as a machine that fails would."""
    victim = min(client.run(os.getpid).values())

    def kill() -> None:
        time.sleep(after)
        os.kill(victim, signal.SIGKILL)
        print(f"  killed worker process {victim}")

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def normalize(client: Client, source: Path, target: Path) -> nn.BatchNorm:
    """Fit and apply: the lines that stay the same on any cluster."""
    x = da.from_zarr(source)
    norm = nn.BatchNorm(x.shape[1]).fit(x).eval()
    da.to_zarr(norm(x), target)
    return norm


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory", default="400MB", help="limit of each worker; Python and its libraries take 200 MB")
    parser.add_argument("--folder", type=Path, help="where the stores lie for a while")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, target = Path(folder, "x.zarr"), Path(folder, "y.zarr")
        fill(source, max(int(options.gigabytes * 1e9 / (4 * np.prod(CHUNK))), 1))
        size = zarr.open_array(source, mode="r").nbytes
        print(f"{size / 1e6:.0f} MB on disk, {options.workers} workers of {options.memory} each")
        with (
            LocalCluster(
                n_workers=options.workers, threads_per_worker=1, memory_limit=options.memory, dashboard_address=None
            ) as cluster,
            Client(cluster) as client,
        ):
            start = time.monotonic()
            normalize(client, source, Path(folder, "undisturbed.zarr"))
            seconds = time.monotonic() - start
            print(f"  {seconds:.1f} s undisturbed")
            killer = kill_one(client, 0.4 * seconds)
            norm = normalize(client, source, target)
            killer.join()
        moments = files.stats(source, (0, 2, 3))
        wrong = float(np.abs((norm.running_mean - moments.mean) / moments.std()).max())
        print(f"means beside those of one streaming process: {wrong:.1e} standard deviations off")
        y, z = (zarr.open_array(p, mode="r") for p in (target, Path(folder, "undisturbed.zarr")))
        step = CHUNK[0]
        differ = max(float(np.abs(y[i : i + step] - z[i : i + step]).max()) for i in range(0, y.shape[0], step))
        print(f"outputs with and without the killed worker: {differ:.1e} apart")
    return wrong, differ


if __name__ == "__main__":
    main()
