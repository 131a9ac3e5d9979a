"""Norms and statistics of files: the in-memory answer for any block size, files of every kind, nothing half done."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import sharing
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import run as run_process
from reference import normal
from registered import SCALE, UNUSUAL, by_formula, registered
from tolerances import FLOAT32, FLOAT64

import numbanorm as nn
from numbanorm import files
from numbanorm.cli.main import cli
from numbanorm.core import threads as kernel_threads
from numbanorm.core.layout import Layout
from numbanorm.core.norms import NORMS
from numbanorm.files import stores

RECORDS = {record.kind: record for record in (*NORMS.values(), *UNUSUAL)}


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    with registered(*UNUSUAL):
        yield


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Waiting for the disk takes most of the time, and is tested by itself."""
    if request.node.originalname != "test_synced_before_it_is_renamed":
        monkeypatch.setattr(os, "fsync", lambda _: None)


def in_memory(norm: str, x: np.ndarray) -> Any:
    if norm == "batch":
        return nn.batch_norm(x, training=True)
    return nn.layer_norm(x, x.shape[-1]) if norm == "layer" else nn.instance_norm(x)


def check(y: np.ndarray, expected: np.ndarray, mean_in_std: float = 0.0, dtype: Any = None) -> None:
    """Compare: within the suite's tolerances, and in float64 what rounding of a far mean to float64 allows."""
    assert y.dtype == (expected.dtype if dtype is None else dtype)
    assert y.shape == expected.shape
    scale = np.abs(expected).max(initial=1.0)
    allowed = FLOAT32 if y.dtype == np.float32 else FLOAT64 + 4e-16 * mean_in_std
    assert np.abs(y - expected).max(initial=0.0) <= allowed * scale


def least_std(x: np.ndarray, layout: Layout) -> float:
    """Return the least standard deviation of a group, at most 1: of few elements some lie close together."""
    group = np.broadcast_to(layout.statistic(*np.indices(x.shape)), x.shape)
    found = [float(x[group == g].std()) for g in range(layout.groups)]
    return min([s for s in found if s > 0], default=1.0) if min(found) < 1 else 1.0


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_block_gives_the_answer_of_memory(tmp_path: Path, data: st.DataObject) -> None:
    record = data.draw(st.sampled_from(list(RECORDS.values())))
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    mean = data.draw(st.sampled_from([0.0, 3.0, 1e6]))
    last = data.draw(st.booleans())
    groups = data.draw(st.integers(1, 3))
    channels = groups * data.draw(st.integers(1, 5))
    space = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=2))
    n = data.draw(st.integers(1, 5))
    shape = (n, *space, channels) if last else (n, channels, *space)
    options: dict[str, Any] = {"channel_axis": -1 if last else 1}
    if not record.by_channel:
        options = {"axis": data.draw(st.sampled_from([(-1,), (1,), (0,), (-2, -1), (1, 0)]))}
    if record.grouped:
        options["num_groups"] = groups
    layout = Layout.of(record.kind, shape, **options)
    if record.tracks and layout.count == 1:
        return
    order = data.draw(st.sampled_from("CF"))
    x = np.asarray(normal(0, shape, np.float64) + mean, dtype, order=order)
    weight = normal(1, layout.affine_shape, np.float64) if data.draw(st.booleans()) else None
    bias = normal(2, layout.affine_shape, np.float64) if data.draw(st.booleans()) and record.bias else None
    block = data.draw(st.integers(1, x.nbytes + 8))
    np.save(tmp_path / "x.npy", x)
    told: list[tuple[int, int]] = []
    files.apply(
        tmp_path / "x.npy",
        tmp_path / "y.npy",
        record.kind,
        weight=weight,
        bias=bias,
        block=block,
        progress=lambda *now: told.append(now),
        **options,
    )
    y = np.load(tmp_path / "y.npy")
    assert y.flags.f_contiguous == x.flags.f_contiguous
    check(y, by_formula(record, x, weight, bias, **options), mean / least_std(x, layout), dtype)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1] in (x.nbytes, 2 * x.nbytes)
    assert sorted(os.listdir(tmp_path)) == ["x.npy", "y.npy"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_statistics_of_any_block_are_those_of_memory(tmp_path: Path, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), max_size=4)))
    axis = data.draw(st.none() | st.sets(st.integers(0, len(shape) - 1), min_size=1)) if shape else None
    mean = data.draw(st.sampled_from([0.0, 1e6]))
    x = np.asarray(normal(0, shape, np.float64) + mean, order=data.draw(st.sampled_from("CF")))
    np.save(tmp_path / "x.npy", x)
    axes = None if axis is None else tuple(axis)
    block = data.draw(st.integers(1, x.nbytes + 8))
    found = files.stats(tmp_path / "x.npy", axes, block=block)
    expected = nn.Moments.of(x, axes)
    assert found.count == expected.count
    np.testing.assert_allclose(found.mean, expected.mean, 1e-15, 1e-15)
    np.testing.assert_allclose(found.var(), expected.var(), 1e-12, 1e-12 + 1e-15 * mean)
    found.update(x)  # along the same axes
    np.testing.assert_allclose(found.mean, expected.mean, 1e-15, 1e-15)


def test_one_read_where_a_block_holds_groups_and_two_for_batch_norm(tmp_path: Path) -> None:
    x = normal(0, (64, 8, 4, 4), np.float32)
    np.save(tmp_path / "x.npy", x)
    reads = {}
    for norm, record in NORMS.items():
        totals: list[int] = []
        options = {"num_groups": 2} if record.grouped else {}
        files.apply(
            tmp_path / "x.npy",
            tmp_path / "y.npy",
            norm,
            block=4096,
            progress=lambda _, t, s=totals: s.append(t),
            **options,
        )
        reads[norm] = totals[-1] // x.nbytes
    assert reads == {norm: 2 if record.mixes_samples else 1 for norm, record in NORMS.items()}


@pytest.mark.parametrize("block", [1 << 20, 64])  # whole rows, and parts of them
def test_l2_norm_is_its_formula(tmp_path: Path, block: int) -> None:
    x = normal(0, (7, 40), np.float64) + 2.0
    x[3] = 0.0
    np.save(tmp_path / "x.npy", x)
    weight = normal(1, (40,), np.float64)
    files.apply(tmp_path / "x.npy", tmp_path / "y.npy", "l2", 40, weight=weight, block=block)
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    check(np.load(tmp_path / "y.npy"), x / np.maximum(lengths, 1e-12) * weight)
    files.apply(tmp_path / "x.npy", tmp_path / "y.npy", "l2", eps=5.0, block=block)
    check(np.load(tmp_path / "y.npy"), x / np.maximum(lengths, 5.0))


@pytest.mark.parametrize("block", [1 << 20, 64])
def test_a_registered_norm_is_its_formula(tmp_path: Path, block: int) -> None:
    x = normal(0, (7, 40), np.float64) + 2.0
    np.save(tmp_path / "x.npy", x)
    files.apply(tmp_path / "x.npy", tmp_path / "y.npy", "scale", 40, weight=np.array(3.0), eps=0.25, block=block)
    check(np.load(tmp_path / "y.npy"), 3.0 * x / np.sqrt((x * x).mean(1, keepdims=True) + 0.25))
    files.apply(tmp_path / "x.npy", tmp_path / "y.npy", "scale", weight=np.array(3.0), block=block)
    check(np.load(tmp_path / "y.npy"), by_formula(SCALE, x, 3.0, eps=1e-5, axis=(1,)))


def test_batch_norm_with_given_statistics_reads_once(tmp_path: Path) -> None:
    x = normal(0, (64, 8, 5), np.float32) + 1e6
    np.save(tmp_path / "x.npy", x)
    moments = files.stats(tmp_path / "x.npy", (0, 2))
    expected = nn.batch_norm(x, moments.mean, moments.var())
    totals: list[int] = []
    for given_statistics in ({"moments": moments}, {"running_mean": moments.mean, "running_var": moments.var()}):
        files.apply(
            tmp_path / "x.npy",
            tmp_path / "y.npy",
            "batch",
            block=900,
            progress=lambda _, t: totals.append(t),
            **given_statistics,
        )
        check(np.load(tmp_path / "y.npy"), expected)
    assert set(totals) == {x.nbytes}


def test_source_and_target_may_be_the_same_and_links_are_followed(tmp_path: Path) -> None:
    x = normal(0, (30, 40), np.float32)
    np.save(tmp_path / "real.npy", x)
    (tmp_path / "real.npy").chmod(0o640)
    (tmp_path / "link.npy").symlink_to("real.npy")
    files.apply(tmp_path / "link.npy", tmp_path / "link.npy", "layer", 40)
    check(np.load(tmp_path / "real.npy"), nn.layer_norm(x, 40))
    assert (tmp_path / "link.npy").is_symlink()
    assert (tmp_path / "real.npy").stat().st_mode & 0o777 == 0o640


def test_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", normal(0, (30, 40), np.float32))
    seen: list[tuple[str, str]] = []
    sync, replace = os.fsync, Path.replace

    def watch_sync(descriptor: int) -> None:
        seen.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        sync(descriptor)

    def watch_replace(self: Path, target: Path) -> Path:
        seen.append(("rename", self.name))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watch_sync)
    monkeypatch.setattr(Path, "replace", watch_replace)
    files.apply(tmp_path / "x.npy", tmp_path / "y.npy", "layer", 40)
    scratch = seen[0][1]
    assert scratch.startswith(f".y.npy.{os.getpid()}-")
    assert seen == [("sync", scratch), ("rename", scratch), ("sync", tmp_path.name)]


class TestKindsOfFiles:
    @pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
    def test_versions(self, tmp_path: Path, version: tuple[int, int]) -> None:
        x = normal(0, (9, 16), np.float32)
        with (tmp_path / "x.npy").open("wb") as file:
            np.lib.format.write_array(file, x, version)
        files.apply(tmp_path / "x.npy", tmp_path / "y.npy", "layer")
        check(np.load(tmp_path / "y.npy"), nn.layer_norm(x, 16))

    @pytest.mark.parametrize(
        ("dtype", "norm"),  # every dtype of a kernel is compiled, for up to 20 s: not all for both
        [("<f2", "layer"), (">f4", "layer"), (">f4", "batch"), (">f8", "layer"), ("u1", "batch"), (">i8", "layer")],
    )
    def test_dtypes(self, tmp_path: Path, dtype: str, norm: str) -> None:
        x = (normal(0, (20, 6), np.float64) * 50).astype(dtype)
        np.save(tmp_path / "x.npy", x)
        for block in (64, 1 << 20):
            files.apply(tmp_path / "x.npy", tmp_path / "y.npy", norm, block=block)
            y, expected = np.load(tmp_path / "y.npy"), in_memory(norm, x)
            assert y.dtype == expected.dtype
            assert y.dtype.isnative
            np.testing.assert_allclose(y, expected, 1e-3 if dtype == "<f2" else 2e-6, 1e-3 if dtype == "<f2" else 2e-6)
        assert files.stats(tmp_path / "x.npy").mean == pytest.approx(nn.Moments.of(x).mean, rel=1e-6)

    def test_bfloat16_as_numpy_saves_it(self, tmp_path: Path) -> None:
        x = normal(0, (20, 6), np.float32).astype(ml_dtypes.bfloat16)
        np.save(tmp_path / "x.npy", x)
        files.apply(tmp_path / "x.npy", tmp_path / "y.npy", "layer", block=64)
        y = np.load(tmp_path / "y.npy")
        np.save(tmp_path / "expected.npy", in_memory("layer", x))
        assert y.dtype == np.load(tmp_path / "expected.npy").dtype
        expected = in_memory("layer", x).astype(np.float32)
        np.testing.assert_allclose(y.view(ml_dtypes.bfloat16).astype(np.float32), expected, 2**-8, 2**-8)

    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("shape", [(0, 4, 3), (4, 6, 0)])
    def test_nothing(self, tmp_path: Path, norm: str, shape: tuple[int, ...]) -> None:
        np.save(tmp_path / "x.npy", np.zeros(shape, np.float32))
        files.apply(tmp_path / "x.npy", tmp_path / "y.npy", norm, num_groups=2 if NORMS[norm].grouped else None)
        y = np.load(tmp_path / "y.npy")
        assert y.shape == shape
        assert y.dtype == np.float32
        assert files.stats(tmp_path / "x.npy").count == 0

    def test_nan_and_infinity_stay_in_their_group(self, tmp_path: Path) -> None:
        x = normal(0, (5, 3, 40), np.float32)
        x[1, 2, 3], x[3, 0, 39] = np.nan, np.inf
        np.save(tmp_path / "x.npy", x)
        for norm in ("layer", "instance"):
            files.apply(tmp_path / "x.npy", tmp_path / "y.npy", norm, block=100)
            y = np.load(tmp_path / "y.npy")
            bad = np.isnan(y).any(2)
            assert bad.sum() == 2
            check(y[~bad], in_memory(norm, x)[~bad])


def saved(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


BAD_FILES = {
    "empty": (b"", ValueError, "expected a whole .npy file"),
    "garbage": (b"garbage" * 100, ValueError, "expected a whole .npy file"),
    "cut in the header": (saved(np.zeros((9, 9)))[:50], ValueError, "expected a whole .npy file"),
    "cut in the data": (saved(np.zeros((9, 9)))[:-1], ValueError, "expected a whole .npy file"),
    "pickled": (saved(np.array([{}, []], object), allow_pickle=True), ValueError, "expected a whole .npy file"),
    "a future version": (b"\x93NUMPY\x09\x00v\x00" + b" " * 200, ValueError, "expected a whole .npy file"),
    "code": (
        b"\x93NUMPY\x01\x00\x76\x00" + b"__import__('os').abort()".ljust(117) + b"\n" + bytes(64),
        ValueError,
        "expected a whole .npy file",
    ),
    "records": (saved(np.zeros(9, [("a", "f4")])), TypeError, "expected float16"),
    "complex": (saved(np.zeros((9, 9), complex)), TypeError, "expected float16"),
    "words": (saved(np.array(["a", "b"])), TypeError, "expected float16"),
    "dates": (saved(np.zeros(9, "M8[s]")), TypeError, "expected float16"),
    "long": (saved(np.zeros((9, 9), np.longdouble)), TypeError, "expected float16"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_leave_the_old_output(tmp_path: Path, name: str) -> None:
    content, kind, message = BAD_FILES[name]
    (tmp_path / "x.npy").write_bytes(content)
    (tmp_path / "y.npy").write_bytes(b"old")
    with pytest.raises(kind, match=message):
        files.apply(tmp_path / "x.npy", tmp_path / "y.npy", "layer")
    with pytest.raises(kind, match=message):
        files.stats(tmp_path / "x.npy")
    assert (tmp_path / "y.npy").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["x.npy", "y.npy"]


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "norm": ({"norm": "power"}, "norm: expected one of"),
    "no groups": ({"norm": "group"}, "num_groups: expected a number"),
    "groups": ({"norm": "group", "num_groups": 4}, "num_groups: expected a divisor of the 6"),
    "groups of layers": ({"norm": "layer", "num_groups": 2}, "num_groups: expected None"),
    "weight": ({"norm": "layer", "weight": np.ones(3)}, r"weight: expected shape \(5,\)"),
    "bias": ({"norm": "rms", "bias": np.ones(5)}, "bias: expected None for rms norm"),
    "bias of l2": ({"norm": "l2", "bias": np.ones(5)}, "bias: expected None for l2 norm"),
    "one weight": ({"norm": "scale", "weight": np.ones(5)}, r"weight: expected shape \(\), got \(5,\)"),
    "eps": ({"norm": "layer", "eps": -1.0}, "eps: expected a finite number"),
    "axis": ({"norm": "layer", "axis": 3}, "axis: expected one or more different axes"),
    "axis of batch": ({"norm": "batch", "axis": 0}, "axis: expected None"),
    "normalized_shape": ({"norm": "layer", "normalized_shape": 4}, "normalized_shape"),
    "channel_axis": ({"norm": "batch", "channel_axis": 7}, "channel_axis: expected an axis"),
    "running_mean": ({"norm": "batch", "running_mean": np.ones(6)}, "expected both or neither"),
    "running_var": ({"norm": "batch", "running_mean": np.ones(6), "running_var": np.ones(5)}, r"shape \(6,\)"),
    "moments": ({"norm": "layer", "moments": nn.Moments.of(np.ones(3))}, "expected None for layer norm"),
    "block": ({"norm": "layer", "block": 0}, "block: expected a positive integer"),
    "suffix": ({"norm": "layer", "target": "y.txt"}, "target: expected a name that ends in .npy or .zarr"),
    "folder": ({"norm": "layer", "target": "nowhere/y.npy"}, "target: there is no folder"),
    "a folder": ({"norm": "layer", "target": "folder.npy"}, "target: expected a regular file or nothing"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(tmp_path: Path, name: str) -> None:
    options, message = BAD_ARGUMENTS[name]
    np.save(tmp_path / "x.npy", np.zeros((4, 6, 5), np.float32))
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "y.npy").write_bytes(b"old")
    target = tmp_path / options.get("target", "y.npy")
    with pytest.raises(ValueError, match=message):
        files.apply(tmp_path / "x.npy", target, **{k: v for k, v in options.items() if k != "target"})
    assert (tmp_path / "y.npy").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["folder.npy", "x.npy", "y.npy"]


def test_devices_are_not_replaced(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 6), np.float32))
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(ValueError, match="target: expected a regular file or nothing"):
        files.apply(tmp_path / "x.npy", tmp_path / "pipe.npy", "layer")
    assert (tmp_path / "pipe.npy").is_fifo()


class _Reader(io.FileIO):
    """A file whose reads fail from an offset on."""

    bad = 5000

    def readinto(self, buffer: Any) -> int | None:
        if self.tell() >= self.bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().readinto(memoryview(buffer)[:1000])


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a_bad_block_leaves_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: str) -> None:
    np.save(tmp_path / "x.npy", np.zeros((400, 16), np.float32))
    (tmp_path / "y.npy").write_bytes(b"old")
    monkeypatch.setattr(stores.io, "FileIO", _Reader)
    with pytest.raises(OSError, match=r"source: reading failed: Input/output error: .*x\.npy"):
        files.apply(tmp_path / "x.npy", tmp_path / "y.npy", norm, block=1024)
    assert (tmp_path / "y.npy").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["x.npy", "y.npy"]
    monkeypatch.setattr(_Reader, "bad", 1 << 40)  # a thousand bytes at a time is all right
    files.apply(tmp_path / "x.npy", tmp_path / "y.npy", norm, block=1024)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), np.zeros((400, 16), np.float32))


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((400, 16), np.float32))
    (tmp_path / "y.npy").write_bytes(b"old")
    with pytest.raises(ValueError, match="was cut short while it was read"):
        files.apply(
            tmp_path / "x.npy",
            tmp_path / "y.npy",
            "layer",
            block=1024,
            progress=lambda *_: os.truncate(tmp_path / "x.npy", 5000),
        )
    assert (tmp_path / "y.npy").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["x.npy", "y.npy"]


def test_an_interrupt_leaves_the_old_output(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((400, 16), np.float32))
    (tmp_path / "y.npy").write_bytes(b"old")

    def interrupt(done: int, _: int) -> None:
        if done > 5000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.apply(tmp_path / "x.npy", tmp_path / "y.npy", "layer", block=1024, progress=interrupt)
    assert (tmp_path / "y.npy").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["x.npy", "y.npy"]


def test_a_full_disk_leaves_the_old_output(tmp_path: Path) -> None:
    """RLIMIT_FSIZE is the disk that is full: write(2) fails half way, as it does there."""
    np.save(tmp_path / "x.npy", np.zeros((4000, 64), np.float32))
    (tmp_path / "y.npy").write_bytes(b"old")
    code = f"""
import resource, signal
from numbanorm import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
try:
    files.apply({str(tmp_path / "x.npy")!r}, {str(tmp_path / "y.npy")!r}, "layer", block=65536)
except OSError as error:
    print(error)
"""
    said = run_process(code)
    assert "target: writing failed: File too large" in said
    assert (tmp_path / "y.npy").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["x.npy", "y.npy"]


MEMORY = """
import os, sys, threading
import numpy as np
import numbanorm as nn
from numbanorm import files

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

source, target, norm = sys.argv[1:]
small = resident()
peak = small
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, resident())
done = threading.Event()
thread = threading.Thread(target=watch)
thread.start()
files.apply(source, target, norm)
done.set()
thread.join()
print(peak - small, peak)
"""


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_memory_is_bounded(tmp_path: Path, norm: str) -> None:
    """A sparse file of 1.5 GB: the process grows by the blocks, its kernels and their compiler, and no more."""
    shape = (750, 500, 1000)
    with (tmp_path / "x.npy").open("wb") as file:
        fields = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, fields)
        file.truncate(file.tell() + 4 * int(np.prod(shape)))
    arguments = [str(tmp_path / "x.npy"), str(tmp_path / "y.npy"), norm]
    grown, peak = map(float, run_process(f"import sys; sys.argv[1:] = {arguments!r}\n{MEMORY}").split())
    assert grown < 200
    assert peak < 300
    assert (tmp_path / "y.npy").stat().st_size == (tmp_path / "x.npy").stat().st_size


class TestCommands:
    @staticmethod
    def run(*arguments: object) -> Result:
        return CliRunner(env={"COLUMNS": "100"}).invoke(cli, [str(a) for a in arguments])

    def test_apply(self, tmp_path: Path) -> None:
        x = normal(0, (20, 6, 4), np.float32)
        weight, bias = normal(1, (6,), np.float32), normal(2, (6,), np.float32)
        for name, array in (("x", x), ("weight", weight), ("bias", bias)):
            np.save(tmp_path / f"{name}.npy", array)
        out = tmp_path / "y.npy"
        given_parameters = "--weight", tmp_path / "weight.npy", "--bias", tmp_path / "bias.npy"
        result = self.run(
            "apply", tmp_path / "x.npy", "-o", out, "--norm", "group", "--groups", 2, "--eps", 0.1, *given_parameters
        )
        assert result.exit_code == 0, result.output
        assert result.output == f"The result is in {out}\n"
        check(np.load(out), nn.group_norm(x, 2, weight, bias, 0.1))
        self.run("apply", tmp_path / "x.npy", "-o", out, "--norm", "layer", "--axis", "1,2")
        check(np.load(out), nn.layer_norm(x, (6, 4)))
        self.run("apply", tmp_path / "x.npy", "-o", out, "--norm", "instance", "--channel-axis", "-1")
        check(np.load(out), nn.instance_norm(x, channel_axis=-1))

    def test_apply_of_a_registered_norm(self, tmp_path: Path) -> None:
        x = normal(0, (20, 6), np.float32)
        np.save(tmp_path / "x.npy", x)
        np.save(tmp_path / "weight.npy", np.array(2.0))
        arguments = "apply", tmp_path / "x.npy", "-o", tmp_path / "y.npy", "--norm", "scale"
        result = self.run(*arguments, "--weight", tmp_path / "weight.npy")
        assert result.exit_code == 0, result.output
        check(np.load(tmp_path / "y.npy"), by_formula(SCALE, x, 2.0, axis=(1,)), dtype=np.float32)
        assert "scale" in self.run("apply", "--help").output

    def test_statistics_of_one_file_normalize_another(self, tmp_path: Path) -> None:
        x, z = normal(0, (20, 6, 4), np.float32), normal(1, (3, 6, 4), np.float32)
        np.save(tmp_path / "x.npy", x)
        np.save(tmp_path / "z.npy", z)
        result = self.run("stats", tmp_path / "x.npy", "--axis", "0,2", "--save", tmp_path / "m.npz")
        assert result.exit_code == 0, result.output
        assert "80 elements for each of 6 means" in result.output
        assert f"{x.mean((0, 2), dtype=np.float64)[5]:.6g}"[:7] in result.output
        options = "--norm", "batch", "--moments", tmp_path / "m.npz"
        result = self.run("apply", tmp_path / "z.npy", "-o", tmp_path / "y.npy", *options)
        assert result.exit_code == 0, result.output
        moments = nn.Moments.of(x, (0, 2))
        check(np.load(tmp_path / "y.npy"), nn.batch_norm(z, moments.mean, moments.var()))

    def test_json(self, tmp_path: Path) -> None:
        x = normal(0, (20, 6), np.float64)
        x[3, 2] = np.nan
        np.save(tmp_path / "x.npy", x)
        found = json.loads(self.run("stats", tmp_path / "x.npy", "--axis", "0", "--json").output)
        assert found["count"] == 20
        np.testing.assert_allclose(np.array(found["mean"], float), x.mean(0), 1e-12)
        np.testing.assert_allclose(np.array(found["std"], float), x.std(0), 1e-12)
        assert found["var"][2] is None
        whole = json.loads(self.run("stats", tmp_path / "x.npy", "--json").output)
        assert whole["count"] == 120
        assert whole["mean"] is None

    def test_long_tables_say_what_is_missing(self, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", np.zeros((2, 1000)))
        output = self.run("stats", tmp_path / "x.npy", "--axis", "0").output
        assert "... and 980 more" in output
        assert output.count("\n") < 40

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["stats", "none.npy"], "source: there is no file"),
            (["stats", "x.npy", "--axis", "7"], "axis: expected different axes of an array of shape (4, 6), got (7,)"),
            (["stats", "x.npy", "--axis", "a"], "--axis: expected integers"),
            (["stats", "words.npy"], "source: expected float16"),
            (["apply", "x.npy", "-o", "x.txt", "--norm", "layer"], "expected a name that ends in .npy or .zarr"),
            (["apply", "x.npy", "-o", "y.npy", "--norm", "group"], "num_groups: expected a number"),
            (["apply", "x.npy", "-o", "y.npy", "--norm", "layer", "--weight", "words.npy"], "weight: expected"),
            (["apply", "x.npy", "-o", "y.npy", "--norm", "layer", "--weight", "text.txt"], "--weight: expected a .npy"),
            (["apply", "x.npy", "-o", "y.npy", "--norm", "batch", "--moments", "x.npy"], "written by Moments.save"),
        ],
    )
    def test_wrong_input_is_one_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], complaint: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        np.save("x.npy", np.zeros((4, 6)))
        np.save("words.npy", np.array(["a", "b"]))
        Path("text.txt").write_text("text")
        result = self.run(*arguments)
        assert result.exit_code == 1
        assert result.output.startswith("Error: ")
        assert result.output.count("\n") == 1
        assert complaint in result.output
        assert not Path("y.npy").exists()


def test_kernels_use_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others read and write."""
    seen: list[int] = []
    usable = kernel_threads.usable_threads
    monkeypatch.setattr(kernel_threads, "usable_threads", lambda: seen.append(usable()) or seen[-1])
    sharing.always(monkeypatch, 1 << 10)
    monkeypatch.setattr(kernel_threads, "get_num_threads", lambda: 2)
    np.save(tmp_path / "x.npy", normal(0, (512, 600), np.float32))  # large enough for threads
    for norm in ("layer", "batch"):
        files.apply(tmp_path / "x.npy", tmp_path / "y.npy", norm)
    files.stats(tmp_path / "x.npy")
    assert set(seen) == {1}
    assert usable() == 2
