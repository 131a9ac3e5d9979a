"""The functions: one for each norm, forward and backward, and one for all."""

from .backward import (
    batch_norm_backward,
    group_norm_backward,
    instance_norm_backward,
    l2_norm_backward,
    layer_norm_backward,
    normalize_backward,
    rms_norm_backward,
)
from .forward import batch_norm, group_norm, instance_norm, l2_norm, layer_norm, normalize, rms_norm

__all__ = [
    "batch_norm",
    "batch_norm_backward",
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
    "rms_norm",
    "rms_norm_backward",
]
