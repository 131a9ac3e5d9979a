"""Statistics by themselves: chunk by chunk, on as many threads as there are, and merged in order."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.plan import Plan
from . import columns, rows
from .bound import FLOAT64, FLOAT64_ADDRESS, GEOMETRY_ADDRESS, Bound
from .launch import tiles_of


class ChunkMoments:
    """The statistics of every group, from chunks.

    Parameters
    ----------
    plan, geometry
        The call.
    x, mask, lane
        Numba's types of these arrays.
    """

    def __init__(self, plan: Plan, geometry: np.ndarray, x: Any, mask: Any, lane: Any) -> None:
        chunks = int(geometry[0]["chunks"])
        self._columns = plan.columns
        self._geometry = geometry
        if plan.columns:
            self._table: tuple[int, ...] = (tiles_of(geometry), chunks, 3, int(geometry[0]["tile"]))
            self._chunks = Bound(columns.moments, geometry, (), x, mask, lane, FLOAT64_ADDRESS)
            kinds = GEOMETRY_ADDRESS, mask, FLOAT64_ADDRESS, FLOAT64_ADDRESS, FLOAT64
            self._merge = columns.merge_chunks.bound(*kinds)
        else:
            self._table = (plan.layout.groups, chunks, 3)
            self._chunks = Bound(rows.moments, geometry, (), x, mask, FLOAT64_ADDRESS)
            self._merge = rows.merge_chunks.bound(GEOMETRY_ADDRESS, FLOAT64_ADDRESS, FLOAT64_ADDRESS, FLOAT64)

    def __call__(self, threads: int, x: Any, mask: Any, weight: Any, stats: Any, eps: float) -> Any:
        """Write the rows COUNT, MEAN, M2 and RSTD; `weight` tells the lanes' dtype."""
        table = np.empty(self._table)
        lane, masked = ((weight,), (mask,)) if self._columns else ((), ())
        problem = self._chunks.on(threads, x, mask, *lane, table)
        if not problem:
            self._merge(self._geometry, *masked, table, stats, eps)
        return problem
