"""The functions on dask arrays, chunk by chunk."""

from .calls import moments

__all__ = ["moments"]
