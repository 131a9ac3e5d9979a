"""Layers: parameters, running statistics and mode around the functions."""

from .base import Norm
from .norms import BatchNorm, GroupNorm, InstanceNorm, L2Norm, LayerNorm, RMSNorm

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "L2Norm", "LayerNorm", "Norm", "RMSNorm"]
