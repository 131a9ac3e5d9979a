"""Which format a path holds."""

from __future__ import annotations

import os
from pathlib import Path

from .stores import NpySource, Source


def open_source(path: str | os.PathLike[str]) -> Source:
    """Return what reads the array at `path`: a Zarr folder, or else a .npy file.

    Raises
    ------
    TypeError
        If its dtype is none that the norms take.
    ValueError
        If it holds no array, or not all of one.
    FileNotFoundError
        If there is nothing.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"source: there is no file {str(place)!r}")
    if place.is_dir():
        from .zarr import ZarrSource

        return ZarrSource(place)
    return NpySource(place)
