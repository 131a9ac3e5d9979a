"""One answer: in memory, streamed, from files, in dask's chunks and synchronized between ranks, whatever the cuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import in_threads
from reference import normal
from tolerances import FLOAT32, FLOAT64

import numbanorm as nn
from numbanorm import files

da = pytest.importorskip("dask.array")

AXES = (0, 2)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_batch_norm(tmp_path: Path, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    mean = data.draw(st.sampled_from([0.0, 1e6]))
    n, c, s = data.draw(st.tuples(st.integers(2, 60), st.integers(1, 6), st.integers(1, 40)))
    x = (normal(data.draw(st.integers(0, 99)), (n, c, s), np.float64) + mean).astype(dtype)
    cuts = sorted(data.draw(st.lists(st.integers(0, n), min_size=1, max_size=3)))
    batches = np.split(x, cuts)
    chunks = tuple(data.draw(st.integers(1, length)) for length in x.shape)
    block = data.draw(st.integers(1, 2 * x.nbytes))
    np.save(tmp_path / "x.npy", x)
    lazy = da.from_array(x, chunks=chunks)

    streamed = nn.Moments.of(batches[0], AXES)
    for batch in batches[1:]:
        streamed.update(batch)
    merged = nn.Moments.of(batches[-1], AXES)
    for batch in batches[-2::-1]:
        merged = nn.Moments.of(batch, AXES) + merged
    moments = {
        "memory": nn.Moments.of(x, AXES),
        "streamed": streamed,
        "merged": merged,
        "file": files.stats(tmp_path / "x.npy", AXES, block=block),
        "dask": nn.Moments.of(lazy, AXES),
    }
    exact = x.astype(np.longdouble)
    average, variance = exact.mean(AXES), exact.var(AXES)
    std = np.sqrt(variance)
    tolerance = FLOAT32 if dtype == np.float32 else FLOAT64
    for name, found in moments.items():
        assert found.count == n * s, name
        # What is left of a mean of 1e6 beside the rounding to one float64: nothing of the variance.
        assert (np.abs(found.mean - average) <= tolerance * std + np.spacing(mean)).all(), name
        assert (np.abs(found.var() - variance) <= 2 * tolerance * variance).all(), name

    def ranked(rank: int, sync: Any) -> Any:
        return nn.BatchNorm(c, sync=sync)(batches[rank])

    files.apply(tmp_path / "x.npy", tmp_path / "y.npy", "batch", block=block)
    results = {
        "memory": nn.batch_norm(x, training=True),
        "fitted": nn.BatchNorm(c).fit(batches).eval()(x),
        "file": np.load(tmp_path / "y.npy"),
        "dask": nn.batch_norm(lazy, training=True).compute(),
        "synchronized": np.concatenate(in_threads(len(batches), ranked)[0]),
    }
    y = (exact - average[:, None]) / np.sqrt(variance + np.longdouble(1e-5))[:, None]
    # A float64 mean of 1e6 is a float64: two units in its last place are 2.3e-10, over the standard deviation.
    far = float((2 * np.spacing(mean) / std).max()) if dtype == np.float64 else 0.0
    for name, found in results.items():
        assert found.dtype == dtype, name
        assert float(np.abs(found - y).max()) <= (tolerance + far) * max(float(np.abs(y).max()), 1.0), name


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_norms_of_samples(tmp_path: Path, data: st.DataObject) -> None:
    norm = data.draw(st.sampled_from(["layer", "rms", "instance", "group"]))
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    mean = data.draw(st.sampled_from([0.0, 1e6])) if norm != "rms" else 0.0
    shape = data.draw(st.tuples(st.integers(1, 9), st.sampled_from([2, 6]), st.integers(2, 40)))
    x = (normal(0, shape, np.float64) + mean).astype(dtype)
    head: tuple[Any, ...] = {"layer": (shape[2],), "rms": (shape[2],), "group": (2,)}.get(norm, ())
    function = getattr(nn, f"{norm}_norm")
    expected = function(x, *head)
    np.save(tmp_path / "x.npy", x)
    options = {"num_groups": 2} if norm == "group" else {}
    files.apply(tmp_path / "x.npy", tmp_path / "y.npy", norm, block=data.draw(st.integers(1, 2 * x.nbytes)), **options)
    chunks = tuple(data.draw(st.integers(1, length)) for length in shape)
    scale = max(float(np.abs(expected).max()), 1.0)
    far = 4 * np.spacing(mean) / float(x.std(-1).min()) if dtype == np.float64 else 0.0
    for found in (np.load(tmp_path / "y.npy"), function(da.from_array(x, chunks=chunks), *head).compute()):
        assert found.dtype == dtype
        assert float(np.abs(found - expected).max()) <= ((FLOAT32 if dtype == np.float32 else FLOAT64) + far) * scale
