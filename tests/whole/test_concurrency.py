"""Threads, nested regions, executors, forks and signals of the program around: right bits, no abort, no hang."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import pytest
from processes import WATCH, run

pytestmark = pytest.mark.slow


def has_tbb() -> bool:
    """Tell whether pip's TBB is there; on one CPU Numba waits for it without end when the interpreter exits."""
    try:
        ctypes.CDLL(str(Path(sys.prefix, "lib", "libtbb.so.12")))
    except OSError:
        return False
    return not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) > 1


def has_omp() -> bool:
    try:
        from numba.np.ufunc import omppool  # noqa: F401
    except ImportError:
        return False
    return True


LAYERS = [
    pytest.param("omp", marks=pytest.mark.skipif(not has_omp(), reason="Numba has no OpenMP")),
    "workqueue",
    pytest.param("tbb", marks=pytest.mark.skipif(not has_tbb(), reason="no tbb")),
]
every_layer = pytest.mark.parametrize("layer", LAYERS)


PRELUDE = """
import hashlib, os, sys
import numba, numpy as np, numbanorm as nn
def data(seed, shape=(16, 16, 24, 24)):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) + np.float32(seed)
def work(x):
    "Return a hash of every norm of an array, both ways."
    n, c = x.shape[:2]
    w, b = np.linspace(1, 2, c, dtype=np.float32), np.linspace(-1, 1, c, dtype=np.float32)
    g = x if x.dtype.kind in "fV" else x.astype(np.float32)  # what comes back is a float
    rows, last = x.reshape(n * c, -1), np.ascontiguousarray(np.moveaxis(x, 1, -1))
    digest = hashlib.sha256()
    def add(*arrays):
        for a in arrays:
            digest.update(np.ascontiguousarray(a).tobytes())
    mean, var = np.zeros(c), np.ones(c)
    y, m, r = nn.batch_norm(x, mean, var, w, b, training=True, return_stats=True)
    add(y, m, r, mean, var, *nn.batch_norm_backward(g, x, m, r, w), nn.batch_norm(x, mean, var))
    y, m, r = nn.batch_norm(last, None, None, w, b, training=True, channel_axis=-1, return_stats=True)
    add(y, m, r, *nn.batch_norm_backward(np.moveaxis(g, 1, -1), last, m, r, w, channel_axis=-1))
    y, m, r = nn.instance_norm(x, return_stats=True)
    add(y, m, r, *nn.instance_norm_backward(g, x, m, r))
    y, m, r = nn.group_norm(x, 4, w, b, return_stats=True)
    add(y, m, r, *nn.group_norm_backward(g, x, 4, m, r, w))
    y, m, r = nn.layer_norm(rows, rows.shape[1], return_stats=True)
    add(y, m, r, *nn.layer_norm_backward(g.reshape(rows.shape), rows, rows.shape[1], m, r))
    y, r = nn.rms_norm(rows, rows.shape[1], return_stats=True)
    add(y, r, *nn.rms_norm_backward(g.reshape(rows.shape), rows, rows.shape[1], r))
    return digest.hexdigest()
xs = [data(i) for i in range(4)]
assert xs[0].size >= 1 << 17  # kernels run in parallel
nn.set_num_threads(1)
expected = [work(x) for x in xs]
nn.set_num_threads(numba.config.NUMBA_NUM_THREADS)
"""

WATCHED = "work(xs[0])  # its kernels are compiled, which may take long\n" + WATCH


def run_on(layer: str, code: str, threads: int = 4, begin: str = WATCHED) -> str:
    """Run code with `work`, every norm both ways, under a threading layer; a minute is enough unless `begin` is ""."""
    return run(PRELUDE + begin + code, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS=str(threads))


THREADS = """
from concurrent.futures import ThreadPoolExecutor
def hammer(i):
    "Half of the threads share one array, the others have their own."
    which = 0 if i % 2 else i // 2
    x = xs[which] if i % 2 else xs[which].copy()
    return all(work(x) == expected[which] for _ in range(3))
with ThreadPoolExecutor(8) as pool:
    assert all(pool.map(hammer, range(8)))
assert work(xs[1]) == expected[1]
print(numba.threading_layer())
"""


@every_layer
def test_eight_threads(layer: str) -> None:
    """On arrays that they share, and on their own; at first they all find kernels to compile and threads to start."""
    assert run_on(layer, THREADS, begin="") == layer


@every_layer
def test_one_layer_object_in_inference(layer: str) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
norms = [nn.BatchNorm(16).eval(), nn.LayerNorm(24), nn.GroupNorm(4, 16), nn.InstanceNorm(16), nn.RMSNorm(24)]
norms = [norm.eval() for norm in norms]
first = [[norm(x).tobytes() for norm in norms] for x in xs]
def same(i):
    "Half of the threads share one array, the others have theirs."
    which = i % 4 if i % 2 else 0
    return [norm(xs[which]).tobytes() for norm in norms] == first[which]
with ThreadPoolExecutor(8) as pool:
    assert all(pool.map(same, range(24)))
print("ok")
"""
    assert run_on(layer, code) == "ok"


@every_layer
def test_within_another_parallel_region(layer: str) -> None:
    """A prange of the user's own, whose threads call back into Python, and one that runs beside ours."""
    code = """
from concurrent.futures import ThreadPoolExecutor
found = [None] * 4
def one(i):
    found[i] = work(xs[i])
@numba.njit(parallel=True)
def region(n):
    for i in numba.prange(n):
        with numba.objmode():
            one(i)
assert work(xs[0]) == expected[0]
region(4)
assert found == expected, found
if numba.threading_layer() != "workqueue":  # which aborts where two regions of Numba run at once, whosever they are
    @numba.njit(parallel=True, nogil=True)
    def total(a):
        s = 0.0
        for i in numba.prange(a.size):
            s += a[i]
        return s
    flat = np.ones(1 << 20)
    with ThreadPoolExecutor(2) as pool:
        theirs = pool.submit(lambda: [total(flat) for _ in range(200)])
        assert [work(x) for x in xs] == expected
        assert set(theirs.result()) == {float(1 << 20)}
print("ok")
"""
    assert run_on(layer, code) == "ok"


EXECUTORS = {
    "joblib threads": """
from joblib import Parallel, delayed
found = Parallel(n_jobs=4, backend="threading")(delayed(work)(x) for x in xs)
""",
    "joblib processes": """
from joblib import Parallel, delayed
def call(x):
    return nn.layer_norm(x, 24), nn.batch_norm(x, training=True)
ours = [[a.tobytes() for a in call(x)] for x in xs]
theirs = Parallel(n_jobs=2, backend="loky")(delayed(call)(x) for x in xs)
assert [[a.tobytes() for a in one] for one in theirs] == ours
found = expected
""",
    "dask threads": """
import dask
found = list(dask.compute(*(dask.delayed(work)(x) for x in xs), scheduler="threads", num_workers=4))
""",
    "distributed threads": """
from distributed import Client
with Client(processes=False, n_workers=1, threads_per_worker=4, dashboard_address=None) as client:
    found = client.gather(client.map(work, xs), errors="raise")
""",
    "asyncio threads": """
import asyncio
async def main():
    loop = asyncio.get_running_loop()
    return await asyncio.gather(*(loop.run_in_executor(None, work, x) for x in xs))
found = asyncio.run(main())
""",
}


@pytest.mark.parametrize("how", EXECUTORS)
@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_executors(layer: str, how: str) -> None:
    pytest.importorskip(how.split()[0])
    if layer == "omp" and not has_omp():
        pytest.skip("Numba has no OpenMP")
    assert run_on(layer, EXECUTORS[how] + "assert found == expected, found\nprint('ok')") == "ok"


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

START = """
import multiprocessing
def child(i):
    assert work(xs[i]) == expected[i]
    return expected[i]
if __name__ == "__main__":
    assert work(xs[0]) == expected[0]  # threads have started
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        assert pool.map(child, range(4)) == expected
    assert work(xs[1]) == expected[1]
    print("ok")
"""


def run_script(layer: str, code: str, script: Path) -> str:
    """Run code as `run_on` does, from a file: processes that are started afresh find its functions there."""
    script.write_text(PRELUDE + WATCHED + code)
    starter = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    return run(starter, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2")


@every_layer
@pytest.mark.parametrize("method", [pytest.param("fork", marks=needs_fork), "spawn", "forkserver"])
def test_multiprocessing(layer: str, method: str, tmp_path: Path) -> None:
    if method == "forkserver" and not hasattr(os, "fork"):
        pytest.skip("needs fork")
    assert run_script(layer, START.format(method=method), tmp_path / "script.py") == "ok"


ASYNCIO = """
import asyncio, multiprocessing
from concurrent.futures import ProcessPoolExecutor
async def main():
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(2, multiprocessing.get_context({method!r})) as pool:
        there = [loop.run_in_executor(pool, work, x) for x in xs]
        here = [loop.run_in_executor(None, work, x) for x in xs]  # while the processes start and work
        return await asyncio.gather(*there, *here)
if __name__ == "__main__":
    assert asyncio.run(main()) == expected * 2
    print("ok")
"""

NESTED = {
    "asyncio spawn": ASYNCIO.format(method="spawn"),
    "asyncio forkserver": ASYNCIO.format(method="forkserver"),
    "distributed": """
from concurrent.futures import ThreadPoolExecutor
def task(x):
    "Be one of four tasks of a worker process at once, with threads of its own."
    with ThreadPoolExecutor(2) as pool:
        return os.getpid(), *pool.map(work, (x, x))
if __name__ == "__main__":
    from distributed import Client, LocalCluster
    options = {"n_workers": 1, "threads_per_worker": 4, "processes": True}
    with LocalCluster(**options, dashboard_address=None, host="127.0.0.1") as cluster, Client(cluster) as client:
        found = client.gather(client.map(task, xs), errors="raise")
    (worker,) = {one[0] for one in found}
    assert worker != os.getpid()
    assert [one[1:] for one in found] == [(one, one) for one in expected]
    print("ok")
""",
}


@pytest.mark.parametrize("how", NESTED)
@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_executors_of_processes(layer: str, how: str, tmp_path: Path) -> None:
    """Event loops and schedulers that hand calls on to processes, which have threads of their own."""
    pytest.importorskip(how.split()[0])
    if layer == "omp" and not has_omp():
        pytest.skip("Numba has no OpenMP")
    if how.endswith("forkserver") and not hasattr(os, "fork"):
        pytest.skip("needs fork")
    assert run_script(layer, NESTED[how], tmp_path / "script.py") == "ok"


@every_layer
@needs_fork
def test_os_fork(layer: str) -> None:
    """The child, and its own child; the parent goes on in parallel."""
    code = """
assert work(xs[0]) == expected[0]
def forked(inner):
    child = os.fork()
    if child == 0:
        try:
            same = work(xs[1]) == expected[1] and (inner is None or inner(None) == 0)
        except BaseException:
            same = False
        os._exit(0 if same else 3)
    return os.waitpid(child, 0)[1]
print(forked(forked), work(xs[2]) == expected[2])
"""
    assert run_on(layer, code) == "0 True"


@every_layer
@needs_fork
def test_fork_while_a_thread_is_in_a_kernel(layer: str) -> None:
    """The child waits for nothing that this thread holds."""
    code = """
import threading
stop = threading.Event()
def busy():
    while not stop.is_set():
        nn.layer_norm(xs[0], 24)
thread = threading.Thread(target=busy)
thread.start()
statuses = set()
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0 if nn.layer_norm(xs[1], 24).any() else 3)
    statuses.add(os.waitpid(child, 0)[1])
stop.set()
thread.join()
print(statuses)
"""
    assert run_on(layer, code).splitlines()[-1] == "{0}"  # after what TBB may have to say


@pytest.mark.torch
@needs_fork
@every_layer
def test_torch_data_loader(torch: object, layer: str) -> None:
    code = """
import torch
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        return torch.from_numpy(nn.layer_norm(xs[i % 4], 24))
own = [nn.layer_norm(x, 24) for x in xs]
loader = torch.utils.data.DataLoader(Rows(), batch_size=2, num_workers=2, multiprocessing_context="fork")
found = torch.cat(list(loader)).numpy()
assert found.tobytes() == np.concatenate([own[i % 4][None] for i in range(8)]).tobytes()
print("ok")
"""
    assert run_on(layer, code) == "ok"


def test_interrupts() -> None:
    """Ctrl-C again and again, wherever it comes: no lock is left behind, and the next call gives the same bits."""
    code = """
import random, signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it otherwise
rnd = random.Random(0)
caught = 0
for _ in range(40):
    timer = threading.Timer(rnd.uniform(0.0, 0.05), signal.raise_signal, [signal.SIGINT])
    try:
        timer.start()
        while True:
            work(xs[0])
    except KeyboardInterrupt:
        caught += 1
    timer.join()
    assert not __import__("numbanorm.core.threads").core.threads._lock.locked()
    assert work(xs[1]) == expected[1]
print(caught)
"""
    assert run_on("workqueue", code) == "40"


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_memory_runs_out() -> None:
    """An output too large: MemoryError, running statistics as they were, and the next call works."""
    code = """
import resource
nn.set_num_threads(1)
norm, instance = nn.BatchNorm(64), nn.InstanceNorm(64, affine=True, track_running_stats=True)
x = np.ones((64, 64, 64, 64), np.float32)
norm(x[:2]), instance(x[:2])
before = [[a.tobytes() for a in layer.state_dict().values()] for layer in (norm, instance)]
mapped = np.lib.stride_tricks.as_strided(x, (4096, 64, 64, 64), (0, *x.strides[1:]))  # 4 GiB, if it were all there
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), resource.RLIM_INFINITY))
for layer in (norm, instance):
    try:
        layer(mapped)
    except MemoryError:
        pass
    else:
        print("no error")
after = [[a.tobytes() for a in layer.state_dict().values()] for layer in (norm, instance)]
assert after == before
y = norm(x[:2])
print(norm.num_batches_tracked, bool(np.isfinite(y).all()))
"""
    assert run_on("workqueue", code) == "2 True"


BITS = """
import ml_dtypes
def results(dtype, threads):
    "Return a hash of all functions on one dtype; float32 on all shapes, the others on one of each kernel."
    nn.set_num_threads(threads)
    x = xs[1] if dtype.kind in "fV" else np.rint(xs[1] * 5)
    digest = hashlib.sha256(work(x.astype(dtype)).encode())
    if dtype == np.float32:
        for shape, axis in (((1, 1, 400, 400), 1), ((60_000, 3), 1), ((300, 1500), 1), ((2, 100, 90, 9), 1)):
            x = data(3, shape)
            y, m, r = nn.batch_norm(x, training=True, channel_axis=axis, return_stats=True)
            for a in (y, m, r, *nn.batch_norm_backward(x, x, m, r, channel_axis=axis), nn.layer_norm(x, shape)):
                digest.update(a.tobytes())
            moments = nn.Moments.of(x, 0)
            digest.update(moments.mean.tobytes() + moments.var().tobytes())
    return digest.hexdigest()
for name in ("float32", "float64", "bfloat16"):
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    found = {results(dtype, n) for n in (1, 2, 4)}
    assert len(found) == 1, name
    print(name, *found)
"""


@pytest.fixture(scope="module")
def bits() -> dict[str, str]:
    """Return, by layer, the hashes of everything at 1, 2 and 4 threads."""
    return {}


@every_layer
def test_same_bits(layer: str, bits: dict[str, str]) -> None:
    """All functions on 1, 2 and 4 threads, and the same as under the layers before."""
    pytest.importorskip("ml_dtypes")
    bits[layer] = run_on(layer, BITS, begin="")  # kernels for all dtypes may have to be compiled
    assert len(bits[layer].splitlines()) == 3
    assert len(set(bits.values())) == 1


@pytest.mark.skipif(not has_tbb(), reason="no tbb")
def test_tbb_of_pip_is_found() -> None:
    """Numba alone does not find it in a virtual environment."""
    code = "import numpy as np, numba, numbanorm as nn; nn.layer_norm(np.ones((512, 512)), 512)"
    code += "\nprint(numba.threading_layer())"
    for asked in ("tbb", "forksafe"):
        assert run(code, NUMBA_THREADING_LAYER=asked, NUMBA_NUM_THREADS="2") == "tbb"
