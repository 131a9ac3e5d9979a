"""Zarr folders, read and written by `apply` and `stats`: any chunks, both formats, damage, what is not replaced."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import normal
from tolerances import FLOAT32

import numbanorm as nn
from numbanorm import files

zarr = pytest.importorskip("zarr", minversion="3")
zarr_store = pytest.importorskip("numbanorm.files.zarr")

SHAPE = (9, 6, 20)


def stored(path: Path, x: np.ndarray, chunks: tuple[int, ...], **options: Any) -> Path:
    zarr.create_array(store=path, shape=x.shape, chunks=chunks, dtype=x.dtype, **options)[...] = x
    return path


def close(y: np.ndarray, expected: np.ndarray) -> None:
    assert y.dtype == expected.dtype
    assert y.shape == expected.shape
    assert np.abs(y - expected).max(initial=0) <= FLOAT32 * np.abs(expected).max(initial=1)


EXPECTED: dict[str, Any] = {
    "batch": lambda x: nn.batch_norm(x, training=True),
    "layer": lambda x: nn.layer_norm(x, 20),
    "instance": nn.instance_norm,
    "group": lambda x: nn.group_norm(x, 2),
    "rms": lambda x: nn.rms_norm(x, 20),
}


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_chunks_and_blocks(tmp_path: Path, data: st.DataObject) -> None:
    norm = data.draw(st.sampled_from(list(EXPECTED)))
    chunks = tuple(data.draw(st.integers(1, n)) for n in SHAPE)
    block = data.draw(st.integers(1, 5000))
    source, target = data.draw(st.sampled_from([("zarr", "zarr"), ("zarr", "npy"), ("npy", "zarr")]))
    x = normal(0, SHAPE, np.float32) + np.float32(data.draw(st.sampled_from([0, 1e4])))
    for path in tmp_path.glob("x.zarr/**/*"):
        path.unlink() if path.is_file() else None
    np.save(tmp_path / "x.npy", x)
    zarr.create_array(store=tmp_path / "x.zarr", shape=SHAPE, chunks=chunks, dtype=x.dtype, overwrite=True)[...] = x
    options = {"num_groups": 2} if norm == "group" else {}
    out = tmp_path / f"y.{target}"
    files.apply(tmp_path / f"x.{source}", out, norm, block=block, **options)
    y = np.load(out) if target == "npy" else zarr.open_array(out, mode="r")
    close(y[...], EXPECTED[norm](x))
    if source == target == "zarr":
        assert y.chunks == chunks
    moments = files.stats(tmp_path / f"x.{source}", (0, 2), block=block)
    np.testing.assert_allclose(moments.mean, nn.Moments.of(x, (0, 2)).mean, FLOAT32, FLOAT32)


@pytest.mark.parametrize("version", [2, 3])
def test_attributes_and_format_are_kept(tmp_path: Path, version: int) -> None:
    x = normal(0, SHAPE, np.float32)
    stored(tmp_path / "x.zarr", x, (4, 6, 7), zarr_format=version, attributes={"units": "K"}, compressors=None)
    files.apply(tmp_path / "x.zarr", tmp_path / "y.zarr", "layer")
    y = zarr.open_array(tmp_path / "y.zarr", mode="r")
    assert (y.metadata.zarr_format, dict(y.attrs), y.chunks) == (version, {"units": "K"}, (4, 6, 7))
    assert y.compressors == ()  # Zarr's own choice would be to compress
    close(y[...], nn.layer_norm(x, 20))


def test_shards_are_read_and_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(0, SHAPE, np.float32)
    stored(tmp_path / "x.zarr", x, (2, 3, 10), shards=(4, 6, 20))
    seen: list[tuple[tuple[int, int], ...]] = []

    def recorded(method: Any) -> Any:
        def record(self: Any, region: Any, values: Any) -> Any:
            seen.append(tuple((s.start, s.stop) for s in region))
            return method(self, region, values)

        return record

    monkeypatch.setattr(zarr_store.ZarrSource, "read", recorded(zarr_store.ZarrSource.read))
    monkeypatch.setattr(zarr_store.ZarrSink, "write", recorded(zarr_store.ZarrSink.write))
    files.apply(tmp_path / "x.zarr", tmp_path / "y.zarr", "batch", block=100)
    y = zarr.open_array(tmp_path / "y.zarr", mode="r")
    assert (y.chunks, y.shards) == ((2, 3, 10), (4, 6, 20))
    close(y[...], nn.batch_norm(x, training=True))
    shards = [((0, 4), (0, 6), (0, 20)), ((4, 8), (0, 6), (0, 20)), ((8, 9), (0, 6), (0, 20))]
    assert sorted(seen) == sorted(3 * shards)  # for the statistics, to be normalized, written


def test_in_place(tmp_path: Path) -> None:
    x = normal(0, SHAPE, np.float32)
    path = stored(tmp_path / "x.zarr", x, (4, 6, 7))
    files.apply(path, path, "layer")
    close(zarr.open_array(path, mode="r")[...], nn.layer_norm(x, 20))
    assert os.listdir(tmp_path) == ["x.zarr"]


def test_a_damaged_chunk_leaves_the_old_output(tmp_path: Path) -> None:
    x = normal(0, SHAPE, np.float32)
    stored(tmp_path / "x.zarr", x, (2, 6, 20))
    stored(tmp_path / "y.zarr", x[:1], (1, 6, 20))
    chunk = tmp_path / "x.zarr" / "c" / "3" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(OSError, match=r"source: reading .* failed at \[6:8, 0:6, 0:20\]"):
        files.apply(tmp_path / "x.zarr", tmp_path / "y.zarr", "layer", block=1000)
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "y.zarr", mode="r")[...], x[:1])
    assert sorted(os.listdir(tmp_path)) == ["x.zarr", "y.zarr"]


def test_what_is_no_array_is_neither_read_nor_replaced(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "g.zarr", mode="w")
    group.create_array("a", shape=(3, 4), dtype="float32")
    (tmp_path / "photos.zarr").mkdir()
    (tmp_path / "photos.zarr" / "cat").write_bytes(b"cat")
    np.save(tmp_path / "x.npy", np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"got a group, .*; arrays in it: a"):
        files.stats(tmp_path / "g.zarr")
    for target in ("g.zarr", "photos.zarr"):
        with pytest.raises(ValueError, match="source: expected a Zarr array"):
            files.apply(tmp_path / "x.npy", tmp_path / target, "layer")
    assert (tmp_path / "photos.zarr" / "cat").read_bytes() == b"cat"
    assert files.stats(tmp_path / "g.zarr" / "a").count == 12
