"""Norms and statistics of arrays in files that need not fit in memory."""

from .apply import apply, stats

__all__ = ["apply", "stats"]
