"""Stores: arrays in .npy files and Zarr folders, read and written a region at a time.

Both kinds have the same few names: a source has ``path, shape, dtype, order, unit`` and `read`, a sink has `write`;
both are closed at the end of a ``with`` block. Nothing is mapped into memory: mapped pages count as the process's own.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from ..core.dtypes import float_dtype, format_of
from .blocks import Region


class Source(Protocol):
    """An array to read from.

    Attributes
    ----------
    path : Path
        Where it lies.
    shape : tuple of int
        Its lengths.
    dtype : np.dtype
        What `read` returns; may be of foreign byte order.
    order : tuple of int
        Axes from the slowest to the fastest in the file.
    unit : tuple of int
        Extents of the smallest boxes that can be read by themselves.
    runs : bool
        Whether elements lie side by side in one file, so that short runs are slow to read.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: tuple[int, ...]
    unit: tuple[int, ...]
    runs: bool

    def read(self, region: Region, memory: memoryview) -> np.ndarray:
        """Return a region as an array that may be written to, in `memory` if the store can read into it."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


class Sink(Protocol):
    """An array to write to."""

    def write(self, region: Region, values: np.ndarray) -> None:
        """Write a region."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


def is_zarr(target: Path, source: Source) -> bool:
    """Tell whether a target is to be a Zarr folder: by its suffix, or else by its source.

    Raises
    ------
    ValueError
        If its suffix is that of another format.
    """
    from_zarr = source.path.is_dir()
    if target.suffix in (".npy", ".zarr"):
        return target.suffix == ".zarr"
    if target.suffix == source.path.suffix:
        return from_zarr
    raise ValueError(f"target: expected a name that ends in .npy or .zarr, got {str(target)!r}")


def dtype_in(path: Path, stored: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that a stored one stands for, in its own byte order.

    NumPy's format has no name for bfloat16: `numpy.save` writes ``V2``, two bytes of anything, and so do we.

    Raises
    ------
    TypeError
        If the norms do not take it.
    """
    if stored == np.dtype("V2") and stored.names is None:
        try:
            return float_dtype("bfloat16")
        except ValueError as error:
            raise TypeError(f"source: {str(path)!r} holds bfloat16, which needs numbanorm[half] ({error})") from None
    if stored.kind not in "fiub" or format_of(stored.newbyteorder("=")) is None:
        kinds = "float16, bfloat16, float32, float64, bool or an integer dtype"
        raise TypeError(f"source: expected {kinds} in {str(path)!r}, got {stored}")
    return stored


class NpySource:
    """A .npy file of any version, C- or Fortran-ordered.

    Parameters
    ----------
    path : Path
        The file.
    """

    runs = True

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            mapped = np.lib.format.open_memmap(path, mode="r")  # reads the header alone, and checks the length
        except (ValueError, TypeError, EOFError, SyntaxError, MemoryError, OverflowError) as error:
            raise ValueError(f"source: expected a whole .npy file of numbers, got {str(path)!r}: {error}") from error
        self.shape: tuple[int, ...] = mapped.shape
        self.dtype = dtype_in(path, mapped.dtype)
        axes = tuple(range(mapped.ndim))
        self.order = axes if mapped.flags.c_contiguous else axes[::-1]
        self.unit = (1,) * mapped.ndim
        self._start: int = mapped.offset
        self._file: io.FileIO | None = None

    def __enter__(self) -> Self:
        self._file = io.FileIO(self.path)
        with suppress(AttributeError, OSError):  # not on Windows and macOS
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()

    def read(self, region: Region, memory: memoryview) -> np.ndarray:
        """Return a region as an array over `memory`."""
        assert self._file is not None
        extents = tuple(region[a].stop - region[a].start for a in self.order)
        size = self.dtype.itemsize
        filled = memory[: prod(extents) * size]
        at = 0
        for first, count in _runs(self.shape, self.order, region):
            self._fill(self._start + first * size, filled[at : at + count * size])
            at += count * size
        stored = np.frombuffer(filled, self.dtype).reshape(extents)
        return stored.transpose([self.order.index(a) for a in range(len(self.order))])

    def _fill(self, offset: int, part: memoryview) -> None:
        assert self._file is not None
        try:
            self._file.seek(offset)
            while part:
                got = self._file.readinto(part)
                if not got:
                    raise ValueError(f"source: {str(self.path)!r} was cut short while it was read")
                part = part[got:]
        except OSError as error:
            raise OSError(error.errno, f"source: reading failed: {error.strerror}", str(self.path)) from error


class NpySink:
    """A .npy file to be written, header first.

    Parameters
    ----------
    path : Path
        The file, which exists and is empty.
    shape, dtype, order
        As `Source` has them.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], order: tuple[int, ...]) -> None:
        self._path, self._shape, self._order, self._size = path, shape, order, dtype.itemsize
        self._file = path.open("r+b", buffering=0)
        header = io.BytesIO()
        fields = {"descr": dtype.str, "fortran_order": order != tuple(sorted(order)), "shape": shape}
        np.lib.format.write_array_header_1_0(header, fields)
        self._start = header.tell()
        self._put(0, header.getbuffer())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, region: Region, values: np.ndarray) -> None:
        """Write a region."""
        stored = np.ascontiguousarray(values.transpose(self._order))
        memory = stored.reshape(-1).view(np.uint8).data
        at = 0
        for first, count in _runs(self._shape, self._order, region):
            part = memory[at : at + count * self._size]
            self._put(self._start + first * self._size, part)
            at += len(part)

    def _put(self, offset: int, part: memoryview) -> None:
        start, length = offset, len(part)
        try:
            self._file.seek(offset)
            while part:
                part = part[self._file.write(part) :]
        except OSError as error:
            raise OSError(error.errno, f"target: writing failed: {error.strerror}", str(self._path)) from error
        with suppress(AttributeError, OSError):  # starts to write to the disk: what is not there yet cannot be dropped
            os.posix_fadvise(self._file.fileno(), start, length, os.POSIX_FADV_DONTNEED)


def _runs(shape: tuple[int, ...], order: tuple[int, ...], region: Region) -> Iterator[tuple[int, int]]:
    """Return where a region's runs of neighbours in the file begin, and how long they are, in elements."""
    lengths = [shape[a] for a in order]
    box = [region[a] for a in order]
    split = len(box)  # axes from here on are whole
    while split > 0 and box[split - 1] == slice(0, lengths[split - 1]):
        split -= 1
    inner = prod(lengths[split:])
    if split == 0:
        yield 0, inner
        return
    along = box[split - 1]
    outer = box[: split - 1]
    steps = [prod(lengths[i + 1 :]) for i in range(split - 1)]
    for index in np.ndindex(*(s.stop - s.start for s in outer)):
        first = sum((s.start + i) * step for s, i, step in zip(outer, index, steps, strict=True))
        yield first + along.start * inner, (along.stop - along.start) * inner
