"""The old name of `numbanorm.stats.moments`, which code and pickles of 0.1 use; it goes with 0.3."""

import sys
import warnings

from .stats import moments

warnings.warn("numbanorm.moments is now numbanorm.stats.moments", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = moments
