"""Layers and moments as a release pickles them: `python tests/support/pickles.py` wrote ``tests/data``'s, under 0.1.

Every layer is pickled in training, between forward and backward, so that what backward needs is in the pickle too.
"""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import numbanorm as nn

PATH = Path(__file__).parents[1] / "data" / "pickles-0.1.pickle"
X, DY = np.random.default_rng(0).standard_normal((2, 3, 4, 2), dtype=np.float32) * 2 + 1


def made() -> dict[str, Any]:
    """Return one object of each kind that has something to remember."""
    one = partial(np.expand_dims, axis=0)  # gathers the messages of one process
    layers = {
        "batch": nn.BatchNorm(4),
        "batch, synchronized": nn.BatchNorm(4, sync=one),
        "instance": nn.InstanceNorm(4, affine=True, track_running_stats=True),
        "group": nn.GroupNorm(2, 4),
        "layer": nn.LayerNorm(2),
        "rms": nn.RMSNorm(2),
    }
    for layer in layers.values():
        layer.weight = layer.weight * np.float32(1.5)
        layer(X)
    return {**layers, "moments": nn.Moments.of(X, (0, 2))}


def answers(subject: Any) -> dict[str, Any]:
    """Return all that an object says of itself and computes from there on."""
    if isinstance(subject, nn.Moments):
        said = {"count": subject.count, "mean": subject.mean, "var": subject.var()}
        return said | {"var of more": subject.update(DY).var()}
    said = {"state": subject.state_dict(), "dx": subject.backward(DY), "grad": subject.grad}
    said |= {"y": subject(DY), "state after": subject.state_dict()}
    return said | {"evaluated": subject.eval()(X)}


if __name__ == "__main__":
    held = {name: pickle.dumps(subject) for name, subject in made().items()}
    PATH.write_bytes(pickle.dumps({name: (data, answers(pickle.loads(data))) for name, data in held.items()}))
