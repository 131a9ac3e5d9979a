"""The old name of `numbanorm.layers`, which code and pickles of 0.1 use; it goes with 0.3."""

import warnings

from .layers import *  # noqa: F403
from .layers.base import Last as _Last  # noqa: F401  (what trained layers hold in a pickle)

warnings.warn("numbanorm.norm is now numbanorm.layers", DeprecationWarning, stacklevel=2)
