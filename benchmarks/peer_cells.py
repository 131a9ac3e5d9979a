"""Cells of the comparison with peers: an operation on one array, and how each library's own users call it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import peer_calls
from peer_data import Data, Spec
from peer_grid import SPECS


@dataclass
class Cell:
    """One row of the table.

    Attributes
    ----------
    spec : Spec
        What is computed on which array.
    candidates : dict of str to callable
        "numbanorm" and its peers, each with a fresh output.
    reused : dict of str to callable
        The same with an output that is there already.
    beside : dict of str to tuple of arrays
        What a candidate's call changes in place: running statistics. They belong to the result of the first call.
    copy : callable
        `numpy.copyto` of x.
    reference : callable
        The result in float64.
    """

    spec: Spec
    candidates: dict[str, peer_calls.Call] = field(default_factory=dict)
    reused: dict[str, peer_calls.Call] = field(default_factory=dict)
    beside: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    copy: peer_calls.Call = lambda: None
    reference: peer_calls.Call = lambda: None

    @property
    def name(self) -> str:
        """The name of what is computed."""
        return self.spec.name

    def context(self) -> AbstractContextManager[Any]:
        """Return what the calls run in: torch's users enter inference mode once for many calls."""
        torch = peer_calls.torch
        return nullcontext() if torch is None or self.spec.records else torch.inference_mode()


def cells(wanted: re.Pattern[str], libraries: Iterable[str] = tuple(peer_calls.LIBRARIES)) -> Iterator[Cell]:
    """Yield the cells in whose names `wanted` is found, each with its data and with the peers that can do it."""
    for name, spec in SPECS.items():
        if wanted.search(name):
            yield make(spec, libraries)


def make(spec: Spec, libraries: Iterable[str] = tuple(peer_calls.LIBRARIES)) -> Cell:
    """Return a cell with its data and its calls."""
    data = Data(spec)
    cell = Cell(spec, reference=data.reference, copy=lambda: np.copyto(data.y, data.x))
    peer_calls.add_numbanorm(cell, data)
    for library in libraries:
        peer_calls.LIBRARIES[library](cell, data)
    return cell
