"""Moments: of an array, of a stream of batches, of two parts."""

from __future__ import annotations

import numpy as np

import numbanorm as nn

from . import common

AXES = {"all": None, "rows": 1, "columns": 0}


def check(moments: nn.Moments, x: np.ndarray, axis: int | None) -> None:
    """Raise unless mean and variance agree with float64."""
    wide = x.astype(np.float64)
    np.testing.assert_allclose(moments.mean, wide.mean(axis), rtol=0, atol=1e-6)
    np.testing.assert_allclose(moments.var(), wide.var(axis), rtol=1e-5)


class Moments(common.Timed):
    """4096x1024, one thread."""

    param_names = ("over", "dtype")
    params = (tuple(AXES), ("float32", "float64"))

    def prepare(self, over: str, dtype: str) -> None:
        common.need("Moments")
        x = np.random.default_rng(0).standard_normal((4096, 1024), dtype=np.float32).astype(dtype)
        self.call, self.read = lambda: nn.Moments.of(x, AXES[over]), x
        check(self.call(), x, AXES[over])

    def time_of(self, over: str, dtype: str) -> None:
        """Seconds of Moments.of."""
        self.run()


class Stream(common.Timed):
    """The columns of 256x1024 float32, batch by batch."""

    param_names = ("batch",)
    params = ("1x1024", "64x1024")

    def prepare(self, batch: str) -> None:
        rows = int(batch.partition("x")[0])
        x = np.random.default_rng(0).standard_normal((256, 1024), dtype=np.float32)
        batches = [x[i : i + rows] for i in range(0, len(x), rows)]
        self.moments = common.need("Moments").of(batches[0], 0)
        for part in batches[1:]:
            self.moments.update(part)
        check(self.moments, x, 0)
        self.call, self.read = lambda: self.moments.update(batches[0]), batches[0]

    def time_update(self, batch: str) -> None:
        """Seconds of one update."""
        self.run()


class Merge(common.Timed):
    """Of two parts with 1024 means each."""

    params = ()

    def prepare(self) -> None:
        x = np.random.default_rng(0).standard_normal((64, 1024), dtype=np.float32)
        of = common.need("Moments").of
        first, second = of(x[:20], 0), of(x[20:], 0)
        self.call, self.read = lambda: first + second, first.mean
        check(self.call(), x, 0)

    def time_add(self) -> None:
        """Seconds of first + second."""
        self.run()
