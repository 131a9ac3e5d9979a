"""kill -9 at random moments of `apply`: the old output stays, and the next run removes what the last one left."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import normal

import numbanorm as nn
from numbanorm import files
from numbanorm.files import atomic

CODE = """
import sys, time
from numbanorm import files

source, target, norm = sys.argv[1:]
print("ready", flush=True)
files.apply(source, target, norm, block=1 << 15, progress=lambda *_: time.sleep(0.002))
"""
SCRATCH = re.compile(r"\.(y\.npy|y\.zarr)\.\d+-[0-9a-f]{8}\.tmp")


def started(source: Path, target: Path, norm: str) -> subprocess.Popen[bytes]:
    """Return a process that has begun to normalize a file."""
    home = str(Path(nn.__file__).parents[1])
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", CODE, str(source), str(target), norm],
        env=os.environ | {"PYTHONPATH": home},
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    child.stdout.close()
    return child


def content(path: Path) -> dict[str, bytes]:
    """Return all bytes of a file, or of a folder."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "norm"), [("npy", "layer"), ("npy", "batch"), ("zarr", "layer")])
def test_killed_at_ten_random_moments(tmp_path: Path, suffix: str, norm: str) -> None:
    if suffix == "zarr":
        pytest.importorskip("zarr")
    np.save(tmp_path / "x.npy", normal(0, (200, 20, 256), np.float32))
    np.save(tmp_path / "old.npy", normal(1, (50, 20, 256), np.float32))
    target = tmp_path / f"y.{suffix}"
    files.apply(tmp_path / "old.npy", target, "layer")
    (tmp_path / "old.npy").unlink()
    old = content(target)
    child = started(tmp_path / "x.npy", tmp_path / f"new.{suffix}", norm)
    start = time.monotonic()
    assert child.wait(timeout=60) == 0
    duration = time.monotonic() - start
    new = content(tmp_path / f"new.{suffix}")
    moments, left = random.Random(suffix + norm), 0
    killed = 0
    while killed < 10:
        child = started(tmp_path / "x.npy", target, norm)
        time.sleep(moments.uniform(0, duration))
        child.send_signal(signal.SIGKILL)
        if child.wait(timeout=60) != 0:
            killed += 1
        beside = set(os.listdir(tmp_path)) - {"x.npy", target.name, f"new.{suffix}"}
        assert len(beside) <= 1
        assert all(SCRATCH.fullmatch(name) for name in beside)
        left += len(beside)
        found = content(target)
        assert found in (old, new)
        if found == new:  # renamed before it was killed: put the old output back
            assert not beside or suffix == "zarr"  # of a folder, the old one may be left
            shutil.rmtree(target) if suffix == "zarr" else target.unlink()
            np.save(tmp_path / "old.npy", normal(1, (50, 20, 256), np.float32))
            files.apply(tmp_path / "old.npy", target, "layer")
            (tmp_path / "old.npy").unlink()
            old = content(target)
    assert left >= 3  # it was killed at work, not before or after
    assert started(tmp_path / "x.npy", target, norm).wait(timeout=60) == 0
    assert content(target) == new
    assert sorted(os.listdir(tmp_path)) == sorted(["x.npy", target.name, f"new.{suffix}"])


def test_leftovers_of_the_dead_are_removed_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "y.npy"
    dead = [tmp_path / ".y.npy.1-0123abcd.tmp", tmp_path / ".y.npy.999999-00000000.tmp"]
    others = [tmp_path / name for name in (".x.npy.1-0123abcd.tmp", ".y.npy.1-0123abcd.tmp.npy", ".y.npy.tmp", "z")]
    for path in (*dead, *others):
        path.write_bytes(b"")
    dead.append(tmp_path / ".y.npy.7-0123abcd.tmp")
    dead[-1].mkdir()
    (dead[-1] / "chunk").write_bytes(b"")
    with atomic.replacing(target) as mine:
        assert not any(path.exists() for path in dead)
        with atomic.replacing(target) as second:  # another writer does not take a living one's for dead
            assert mine.exists()
            second.write_bytes(b"second")
        mine.write_bytes(b"mine")
    assert target.read_bytes() == b"mine"
    assert all(path.exists() for path in others)
    assert sorted(tmp_path.iterdir()) == sorted([target, *others])


def test_an_error_leaves_target_and_folder_as_they_were(tmp_path: Path) -> None:
    target = tmp_path / "y.zarr"
    target.mkdir()
    (target / "old").write_bytes(b"old")

    def fail() -> None:
        with atomic.replacing(target, folder=True) as scratch:
            (scratch / "new").write_bytes(b"new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert content(target) == {"old": b"old"}
    assert os.listdir(tmp_path) == ["y.zarr"]


@pytest.mark.parametrize("exchanged", [True, False])
def test_an_old_folder_is_removed_once_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanged: bool
) -> None:
    target = tmp_path / "y.zarr"
    target.mkdir()
    (target / "old").write_bytes(b"old")
    seen: list[dict[str, bytes]] = []
    remove = shutil.rmtree

    def watched(path: Any, **options: Any) -> None:
        seen.append(content(target))
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    if not exchanged:  # as where the system cannot exchange names

        def unable(*_: Path) -> None:
            raise OSError

        monkeypatch.setattr(atomic, "_rename_exchange", unable)
    with atomic.replacing(target, folder=True) as scratch:
        (scratch / "new").write_bytes(b"new")
    assert seen == [{"new": b"new"}]
    assert os.listdir(tmp_path) == ["y.zarr"]


def test_all_of_a_folder_is_on_the_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    sync, exchange = os.fsync, atomic._exchange

    def watch_sync(descriptor: int) -> None:
        seen.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def watch_exchange(scratch: Path, target: Path) -> None:
        seen.append("exchange")
        exchange(scratch, target)

    monkeypatch.setattr(os, "fsync", watch_sync)
    monkeypatch.setattr(atomic, "_exchange", watch_exchange)
    with atomic.replacing(tmp_path / "y.zarr", folder=True) as scratch:
        (scratch / "c").mkdir()
        (scratch / "c" / "0").write_bytes(b"chunk")
    assert seen == ["0", "c", scratch.name, "exchange", tmp_path.name]
