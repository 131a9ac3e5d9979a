"""Our time over that of NumPy, torch and onnxruntime, in one process, in turns; n/a where a peer is not installed.

The calls are those of `peer_cells`, each with a fresh output, on as many threads as this process has cores: that is
what the peers take.
"""

from __future__ import annotations

import os
import re
import sys
from functools import partial
from importlib.util import find_spec

import numpy as np

import numbanorm as nn

from . import common

PEERS = {"NumPy": "numpy", "torch": "torch", "onnxruntime": "onnxruntime"}


class Peers(common.Prepared):
    """Forward; "step" is forward and backward."""

    param_names = ("cell", "peer")
    params = (
        (
            "layer 128x768 float32",
            "rms 128x768 float32",
            "layer 4096x1024 float32",
            "batch training 32x64x56x56 float32",
            "group 4x32x28x28 float32",
            "instance 4x32x28x28 float32, channels last",
            "batch running 32x256 float32",
            "batch running 8x64x28x28 float32, channels last",
            "batch masked 32x256 float32",
            "layer 128x768 float32, sliced",
            "module batch step 8x64x28x28 float32",
            "module layer eval 1x768 float32",
            "module layer step 128x768 float32",
        ),
        tuple(PEERS),
    )

    def prepare(self, name: str, peer: str) -> None:
        if find_spec(PEERS[peer]) is None:
            raise NotImplementedError(f"{peer} is not installed")
        for other in {"torch", "onnxruntime", "jax"} - {PEERS[peer]}:
            sys.modules.setdefault(other, None)  # type: ignore[arg-type]  # not to be imported: seconds each
        import peer_cells
        import peers

        nn.set_num_threads(len(os.sched_getaffinity(0)))
        (cell,) = peer_cells.cells(re.compile(f"^{re.escape(name)}$"))
        if peer not in cell.candidates:
            raise NotImplementedError(f"{peer} has no such call")
        self.calls = {"ours": cell.candidates["numbanorm"], "theirs": cell.candidates[peer]}
        self.context = cell.context
        with self.context():
            peers.check(cell)
        if peer not in cell.candidates:
            raise ValueError(f"{name}: {peer} is wrong")
        self.measure = partial(peers.measure, budget=1.0, settle=peers.SETTLE)

    @common.tracked("x")
    def track_over_peer(self, cell: str, peer: str) -> float:
        """Our time over the peer's: less than 1 is faster."""
        with self.context():
            times = self.measure(self.calls)
        return float(np.median(times["ours"] / times["theirs"]))
