"""NumPy's allocator, made to fail: every array that NumPy makes is counted, and one, or all from one on, is refused.

It is set as C code sets one (`PyDataMem_SetHandler` of NumPy's C API, since NumPy 1.22): arrays that come out of
arithmetic, casts and copies are met as well as those that ``numpy.empty`` makes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

_MALLOC = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)  # PY: NumPy's own need the GIL
_TWO_SIZES = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
_REALLOC = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class _Handler(ctypes.Structure):
    """`PyDataMem_Handler` of numpy/ndarraytypes.h."""

    _fields_ = (
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("ctx", ctypes.c_void_p),
        ("malloc", _MALLOC),
        ("calloc", _TWO_SIZES),
        ("realloc", _REALLOC),
        ("free", ctypes.c_void_p),
    )


_NAME = b"mem_handler"
_python = ctypes.pythonapi
_python.PyCapsule_GetPointer.restype = ctypes.c_void_p
_python.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_python.PyCapsule_New.restype = ctypes.py_object
_python.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

_table = _python.PyCapsule_GetPointer(np._core._multiarray_umath._ARRAY_API, None)
_api = ctypes.cast(_table, ctypes.POINTER(ctypes.c_void_p))
_set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(_api[304])
_get_handler = ctypes.PYFUNCTYPE(ctypes.py_object)(_api[305])


class Allocations:
    """The number of allocations so far, and which of them fail."""

    def __init__(self) -> None:
        self.count = 0
        self._failing = range(0)
        self._usual = _Handler.from_address(_python.PyCapsule_GetPointer(_get_handler(), _NAME))
        usual = self._usual

        def malloc(ctx: Any, size: int) -> Any:
            return None if self._fails() else usual.malloc(usual.ctx, size)

        def calloc(ctx: Any, number: int, size: int) -> Any:
            return None if self._fails() else usual.calloc(usual.ctx, number, size)

        def realloc(ctx: Any, pointer: Any, size: int) -> Any:
            return None if self._fails() else usual.realloc(usual.ctx, pointer, size)

        own = _Handler(
            b"numbanorm tests", 1, usual.ctx, _MALLOC(malloc), _TWO_SIZES(calloc), _REALLOC(realloc), usual.free
        )
        _python.Py_IncRef(ctypes.py_object(own))  # for ever: arrays that were made under it may outlive everything
        self._capsule = _python.PyCapsule_New(ctypes.addressof(own), _NAME, None)

    def _fails(self) -> bool:
        self.count += 1
        return self.count in self._failing

    @contextmanager
    def failing(self, first: int, *, all_later: bool = False) -> Iterator[None]:
        """Refuse one allocation of what runs inside, counted from 1, or that one and all that come after it."""
        self.count = 0
        self._failing = range(first, 1 << 60 if all_later else first + 1)
        before = _set_handler(self._capsule)
        try:
            yield
        finally:
            _set_handler(before)
