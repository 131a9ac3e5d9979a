"""Normalization layers for arrays, as Numba kernels: batch, layer, instance, group and RMS norm.

Examples
--------
>>> import numpy as np
>>> import numbanorm as nn
>>> tokens = np.random.default_rng(0).standard_normal((8, 128, 768), dtype=np.float32)
>>> nn.layer_norm(tokens, 768).shape
(8, 128, 768)
"""

from .cpu.threads import get_num_threads, set_num_threads
from .functional import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from .layout import Layout
from .moments import Moments
from .norm import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, Norm, RMSNorm

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "Layout",
    "Moments",
    "Norm",
    "RMSNorm",
    "batch_norm",
    "get_num_threads",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "rms_norm",
    "set_num_threads",
]
