"""Zarr folders as stores; imports zarr, so it is imported when there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np

try:
    import zarr
    from zarr.errors import BaseZarrError
except ImportError as problem:
    raise ModuleNotFoundError(
        f'Zarr folders need zarr 3; get it with: pip install "numbanorm[zarr]" ({problem})', name="zarr"
    ) from problem

from .blocks import Region
from .stores import Source, dtype_in


class ZarrSource:
    """An array in a Zarr folder, of format 2 or 3.

    Parameters
    ----------
    path : Path
        The array's folder; an array in a group is a folder in the group's.
    """

    runs = False

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            found = zarr.open(str(path), mode="r")
        except (OSError, ValueError, KeyError, TypeError, BaseZarrError) as error:
            raise ValueError(f"source: expected a Zarr array, got the folder {str(path)!r}: {error}") from error
        if not isinstance(found, zarr.Array):
            names = ", ".join(sorted(found.array_keys())) or "none"
            raise ValueError(f"source: expected a Zarr array, got a group, {str(path)!r}; arrays in it: {names}")
        self.array = found
        self.shape: tuple[int, ...] = found.shape
        self.dtype = dtype_in(path, np.dtype(found.dtype))
        self.order = tuple(range(found.ndim))
        self.unit = tuple(max(n, 1) for n in found.shards or found.chunks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, region: Region, memory: memoryview) -> np.ndarray:
        """Return a region as a new array."""
        try:
            return np.require(self.array[region], requirements=["C", "A", "W"])
        except Exception as error:  # every codec has its own for garbage
            raise OSError(f"source: reading {str(self.path)!r} failed at {_words(region)}: {error!r}") from error


class ZarrSink:
    """An array in a Zarr folder to be written.

    Parameters
    ----------
    path : Path
        The folder, which exists and is empty.
    source : Source
        What the array is made from: a Zarr array's chunks, compressors, attributes and format are kept.
    dtype : np.dtype
        Of the new array.
    unit : tuple of int
        Its chunks, where the source is not a Zarr array.
    """

    def __init__(self, path: Path, source: Source, dtype: np.dtype[Any], unit: tuple[int, ...]) -> None:
        if isinstance(source, ZarrSource):
            old = source.array
            same = old.dtype == dtype
            kept: dict[str, Any] = {"chunks": old.chunks, "shards": old.shards, "attributes": dict(old.attrs)}
            if old.metadata.zarr_format == 3:
                kept["dimension_names"] = old.metadata.dimension_names
            if same:  # filters and serializers may depend on the dtype
                kept |= {"filters": old.filters or None, "compressors": old.compressors or None}
            kept["zarr_format"] = old.metadata.zarr_format
        else:
            kept = {"chunks": unit}
        self._array = zarr.create_array(str(path), shape=source.shape, dtype=dtype, fill_value=0, **kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, region: Region, values: np.ndarray) -> None:
        """Write a region, which is made of whole chunks."""
        self._array[region] = values


def _words(region: Region) -> str:
    return "[" + ", ".join(f"{s.start}:{s.stop}" for s in region) + "]"
