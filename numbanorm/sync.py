"""The old name of `numbanorm.stats.sync`, which code and pickles of 0.1 use; it goes with 0.3."""

import sys
import warnings

from .stats import sync

warnings.warn("numbanorm.sync is now numbanorm.stats.sync", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = sync
