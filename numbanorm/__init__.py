"""Normalization layers for arrays, as Numba kernels: batch, layer, instance, group, RMS and L2 norm.

Examples
--------
>>> import numpy as np
>>> import numbanorm as nn
>>> tokens = np.random.default_rng(0).standard_normal((8, 128, 768), dtype=np.float32)
>>> nn.layer_norm(tokens, 768).shape
(8, 128, 768)
"""

from .calls.config import show_config
from .core.layout import Layout
from .core.norms import NormRecord, register_norm
from .core.threads import get_num_threads, set_num_threads
from .functional import (
    batch_norm,
    batch_norm_backward,
    group_norm,
    group_norm_backward,
    instance_norm,
    instance_norm_backward,
    l2_norm,
    l2_norm_backward,
    layer_norm,
    layer_norm_backward,
    normalize,
    normalize_backward,
    rms_norm,
    rms_norm_backward,
)
from .layers import BatchNorm, GroupNorm, InstanceNorm, L2Norm, LayerNorm, Norm, RMSNorm
from .layers.warmup import warmup
from .stats.moments import Moments

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "L2Norm",
    "LayerNorm",
    "Layout",
    "Moments",
    "Norm",
    "NormRecord",
    "RMSNorm",
    "batch_norm",
    "batch_norm_backward",
    "get_num_threads",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "l2_norm",
    "l2_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "normalize",
    "normalize_backward",
    "register_norm",
    "rms_norm",
    "rms_norm_backward",
    "set_num_threads",
    "show_config",
    "warmup",
]
