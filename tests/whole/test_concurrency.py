"""Threads, nested regions, executors, forks, signals and exits of the program around: right bits, no abort, no hang.

By each engine: helpers that claim units, and Numba's threads under each of its layers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from engines import ENGINES, LAYERS, choosing, has_omp, has_tbb
from processes import WATCH, run

pytestmark = pytest.mark.slow

every_engine = pytest.mark.parametrize("engine", ENGINES)


PRELUDE = """
import hashlib, os, sys
import numba, numpy as np, numbanorm as nn
from numbanorm.core import threads
from numbanorm.cpu import board, engine
from numbanorm.cpu.profile import profile
from numbanorm.cpu.helpers import Helpers, helpers
import sharing
sharing.always()  # calls on little, too
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
assert xs[0].size >= profile().share_from
nn.set_num_threads(1)
expected = [work(x) for x in xs]
nn.set_num_threads(numba.config.NUMBA_NUM_THREADS)
"""

WATCHED = "work(xs[0])  # its kernels are compiled, which may take long\n" + WATCH


def run_on(engine: str, code: str, begin: str = WATCHED, **own: str) -> str:
    """Run code with `work`, every norm both ways, by an engine; a minute is enough unless `begin` is ""."""
    return run(PRELUDE + begin + code, **choosing(engine), NUMBA_NUM_THREADS="4", **own)


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
print(threads._layer(), len(helpers()), helpers().board[board.BUSY])
"""


@every_engine
def test_eight_threads(engine: str) -> None:
    """On arrays that they share, and on their own; at first they all find kernels to compile and threads to start."""
    found = run_on(engine, THREADS, begin="")
    assert found == ("unknown 3 0" if engine == "claims" else f"{engine} 0 0")  # helpers are everybody's


@every_engine
def test_one_layer_object_in_inference(engine: str) -> None:
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
    assert run_on(engine, code) == "ok"


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("engine", ["claims", "numba"])
def test_within_another_parallel_region(engine: str, layer: str) -> None:
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
threads._prepare()  # pip's TBB, which Numba alone does not find
region(4)
assert found == expected, found
# The workqueue layer aborts where two regions of Numba run at once, whosever they are.
if numba.threading_layer() != "workqueue" or not threads.uses_numba():
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
    chosen = choosing(layer) | {"NUMBANORM_THREADS": engine}
    assert run(PRELUDE + WATCHED + code, **chosen, NUMBA_NUM_THREADS="4") == "ok"


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
@pytest.mark.parametrize("engine", ["claims", "omp", "workqueue"])
def test_executors(engine: str, how: str) -> None:
    pytest.importorskip(how.split()[0])
    if engine == "omp" and not has_omp():
        pytest.skip("Numba has no OpenMP")
    assert run_on(engine, EXECUTORS[how] + "assert found == expected, found\nprint('ok')") == "ok"


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


def run_script(engine: str, code: str, script: Path) -> str:
    """Run code as `run_on` does, from a file: processes that are started afresh find its functions there."""
    script.write_text(PRELUDE + WATCHED + code)
    starter = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    return run(starter, **choosing(engine), NUMBA_NUM_THREADS="2")


@every_engine
@pytest.mark.parametrize("method", [pytest.param("fork", marks=needs_fork), "spawn", "forkserver"])
def test_multiprocessing(engine: str, method: str, tmp_path: Path) -> None:
    if method == "forkserver" and not hasattr(os, "fork"):
        pytest.skip("needs fork")
    assert run_script(engine, START.format(method=method), tmp_path / "script.py") == "ok"


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
@pytest.mark.parametrize("engine", ["claims", "omp", "workqueue"])
def test_executors_of_processes(engine: str, how: str, tmp_path: Path) -> None:
    """Event loops and schedulers that hand calls on to processes, which have threads of their own."""
    pytest.importorskip(how.split()[0])
    if engine == "omp" and not has_omp():
        pytest.skip("Numba has no OpenMP")
    if how.endswith("forkserver") and not hasattr(os, "fork"):
        pytest.skip("needs fork")
    assert run_script(engine, NESTED[how], tmp_path / "script.py") == "ok"


FORK = """
def forked(inner, usable):
    child = os.fork()
    if child == 0:
        try:
            same = work(xs[1]) == expected[1] and (inner is None or inner(None, usable) == 0)
            same = same and threads.usable_threads() == usable
            same = same and len(helpers()) == (0 if threads.uses_numba() else usable - 1)
        except BaseException:
            same = False
        os._exit(0 if same else 3)
    return os.waitpid(child, 0)[1]
"""


@every_engine
@needs_fork
def test_os_fork(engine: str) -> None:
    """The child, and its own child; the parent goes on in parallel. Numba's threads do not come back, helpers do."""
    code = FORK + "print(forked(forked, 1 if threads.uses_numba() else 4), work(xs[2]) == expected[2])"
    assert run_on(engine, code) == "0 True"


@every_engine
@needs_fork
def test_os_fork_before_any_thread(engine: str) -> None:
    code = FORK + "print(forked(None, 4), work(xs[2]) == expected[2], forked(None, 1 if threads.uses_numba() else 4))"
    assert run_on(engine, code, begin="").splitlines()[-1] == "0 True 0"


@every_engine
@needs_fork
def test_fork_while_a_thread_is_in_a_kernel(engine: str) -> None:
    """The child waits for nothing that this thread holds."""
    code = """
import threading
stop = threading.Event()
def busy():
    while not stop.is_set():
        nn.layer_norm(xs[0], 24)
thread = threading.Thread(target=busy)
thread.start()
right = nn.layer_norm(xs[1], 24)
statuses = set()
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0 if all(np.array_equal(nn.layer_norm(xs[1], 24), right) for _ in range(3)) else 3)
    statuses.add(os.waitpid(child, 0)[1])
stop.set()
thread.join()
print(statuses)
"""
    assert run_on(engine, code).splitlines()[-1] == "{0}"  # after what TBB may have to say


@pytest.mark.torch
@needs_fork
@every_engine
def test_torch_data_loader(torch: object, engine: str) -> None:
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
    assert run_on(engine, code) == "ok"


LEFT_BEHIND = """
def left_behind():
    "Tell whether a lock is held or a call is on the board, which none is now."
    return threads._lock.locked() or helpers().board[board.BUSY] != 0
"""


@every_engine
def test_interrupts(engine: str) -> None:
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
    assert not left_behind()
    assert work(xs[1]) == expected[1]
print(caught)
"""
    assert run_on(engine, LEFT_BEHIND + code) == "40"


@every_engine
def test_interrupts_of_a_large_call(engine: str) -> None:
    """Once KeyboardInterrupt is there, nobody writes to `out` any more."""
    code = """
import random, signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)
rnd = random.Random(0)
x = data(0, (64, 32, 64, 64))
right = nn.batch_norm(x, training=True)
out = np.empty_like(x)
for _ in range(30):
    out[...] = 0
    timer = threading.Timer(rnd.uniform(0.0, 0.03), signal.raise_signal, [signal.SIGINT])
    try:
        timer.start()
        while True:
            nn.batch_norm(x, training=True, out=out)
    except KeyboardInterrupt:
        seen = out.copy()
    timer.join()
    time.sleep(0.01)
    assert np.array_equal(out, seen)
    assert not left_behind()
assert np.array_equal(nn.batch_norm(x, training=True, out=out), right)
print("ok")
"""
    assert run_on(engine, LEFT_BEHIND + code) == "ok"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs timers that signal")
@every_engine
def test_handlers_of_signals_that_call_norms(engine: str) -> None:
    """While the main thread is in a call itself."""
    code = """
import random, signal
rnd = random.Random(0)
calls = 0
def handle(*_):
    global calls
    calls += 1
    assert work(xs[1]) == expected[1]
    signal.setitimer(signal.ITIMER_REAL, rnd.uniform(0.0001, 0.01))
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.001)
while calls < 60:
    assert work(xs[0]) == expected[0]
signal.setitimer(signal.ITIMER_REAL, 0)
assert not left_behind()
print("ok")
"""
    assert run_on(engine, LEFT_BEHIND + code) == "ok"


EXITS = {
    "daemons at work": """
import threading, time
x = data(0, (64, 16, 64, 64))
def busy():
    while True:
        nn.batch_norm(x, training=True)
nn.batch_norm(x, training=True)
for _ in range(3):
    threading.Thread(target=busy, daemon=True).start()
time.sleep(0.1)
print("ok")
""",
    "a call at exit": """
import atexit
atexit.register(lambda: print("ok" if work(xs[1]) == expected[1] else "wrong"))
""",
    "the first large call at exit": """
import atexit
x = data(0, (64, 16, 64, 64))
from numbanorm.cpu import helpers as own
own._helpers = Helpers()
atexit.register(lambda: print("ok" if nn.batch_norm(x, training=True).any() else "wrong"))
""",
    "interrupted": """
import signal, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
x = data(0, (64, 32, 64, 64))
threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()
try:
    while True:
        nn.batch_norm(x, training=True)
except KeyboardInterrupt:
    print("ok")
    sys.exit(0)
""",
}


@pytest.mark.parametrize("how", EXITS)
@every_engine
def test_exit(engine: str, how: str) -> None:
    """Whoever is at work then."""
    for _ in range(3 if how == "daemons at work" else 1):
        assert run_on(engine, EXITS[how]).splitlines()[0] == "ok"


FAILING = """
from numba import prange
from numbanorm.cpu.bound import FLOAT64_ADDRESS
from numbanorm.cpu.claims import INT64, JOB, claim
from numbanorm.cpu.dtypes import pointer, store
from numbanorm.cpu.jit import Kernel, scalar
UNITS = 200
@scalar
def units(job, y, bad):
    unit = claim(job, np.int64(-1), np.int64(UNITS))
    while unit < UNITS:
        if unit == bad:
            scratch = np.empty(1 << 50)
            store(y, unit, scratch[unit])
        s = 0.0
        for i in range(20_000):
            s += np.sqrt(i)
        store(y, unit, s)
        unit = claim(job, unit, np.int64(UNITS))
@Kernel
def failing(job, workers, geometry, y, bad):
    p_job, p_y = pointer(job), pointer(y)
    for _ in prange(workers):
        units(p_job, p_y, bad)
    return 0
kinds = JOB, INT64, JOB, FLOAT64_ADDRESS, INT64
entry, geometry, y = failing.bound(*kinds), np.zeros(1, np.int64), np.zeros(UNITS)
def call(bad):
    y[:] = 0
    return engine.run_shared(entry, lambda: failing.bound(*kinds, parallel=True), 4, (geometry, y, bad))
failed = 0
for bad in range(0, UNITS, 5):
    try:
        call(bad)
    except MemoryError:
        failed += 1
        seen = y.copy()
        assert y[bad] == 0
    assert np.array_equal(seen, y)
    assert call(-1) == 0
    assert y.all()
print(failed)
"""


@every_engine
def test_memory_runs_out_in_a_unit(engine: str) -> None:
    """Whichever thread has claimed it: the caller raises MemoryError, nobody works on, and the next call is right."""
    assert run_on(engine, FAILING) == "40"


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
@pytest.mark.parametrize("engine", ["claims", "workqueue"])
def test_memory_runs_out(engine: str) -> None:
    """An output too large: MemoryError, running statistics as they were, and the next call works."""
    code = """
import resource
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
    assert run_on(engine, code) == "2 True"


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
    """Return, by engine, the hashes of everything at 1, 2 and 4 threads."""
    return {}


@every_engine
def test_same_bits(engine: str, bits: dict[str, str]) -> None:
    """All functions on 1, 2 and 4 threads, and the same as by the engines before."""
    pytest.importorskip("ml_dtypes")
    bits[engine] = run_on(engine, BITS, begin="")  # kernels for all dtypes may have to be compiled
    assert len(bits[engine].splitlines()) == 3
    assert len(set(bits.values())) == 1


@pytest.mark.skipif(not has_tbb(), reason="no tbb")
def test_tbb_of_pip_is_found() -> None:
    """Numba alone does not find it in a virtual environment."""
    code = "import numpy as np, numba, numbanorm as nn; nn.layer_norm(np.ones((512, 512)), 512)"
    code += "\nprint(numba.threading_layer())"
    for asked in ("tbb", "forksafe"):
        own = {"NUMBANORM_THREADS": "", "NUMBA_THREADING_LAYER": asked, "NUMBA_NUM_THREADS": "2"}
        assert run(code, **own) == "tbb"
