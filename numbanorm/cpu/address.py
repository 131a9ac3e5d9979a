"""How kernels take arrays: as the address of the first element, of a type that tells the dtype and nothing else.

Whatever an array's shape and strides are, it is read from its address by offsets that the geometry holds; so no view is
made, no array is counted as referred to, and one compiled kernel serves all. NumPy arrays alone may be passed: the
address is read out of NumPy's own struct. An address itself may be, as `numpy.intp`: its value lies in the same place.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, types
from numba.core.datamodel import models
from numba.extending import NativeValue, intrinsic, register_model, unbox

from ..core.dtypes import format_of

_BYTE = ir.IntType(8)
_WORD = ir.IntType(64)


class Address(types.CPointer):
    """The type of the address of an array's first element."""

    def __init__(self, dtype: Any) -> None:
        super().__init__(dtype)
        self.name = f"Address({dtype})"


@register_model(Address)
class _AddressModel(models.PointerModel):
    pass


@unbox(Address)
def _unbox_address(kind, value, c):
    """Read the field `data` of a PyArrayObject, which follows the head that all of Python's objects have."""
    head = ir.Constant(_WORD, object.__basicsize__)
    field = c.builder.gep(c.builder.bitcast(value, _BYTE.as_pointer()), [head])
    return NativeValue(c.builder.load(c.builder.bitcast(field, c.context.get_value_type(kind).as_pointer())))


@cache
def address_type(dtype: np.dtype[Any]) -> Address:
    """Return the type under which kernels take arrays of a dtype: half precision as records, see `dtypes`."""
    form = format_of(dtype)
    return Address(from_dtype(dtype if form is None or form.record is None else form.record))


@intrinsic
def record(typing_context, address):
    """Return the record at an address."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(address.dtype))

    return address.dtype(address), generate


@intrinsic
def number(typing_context, address):
    """Return an address as an integer; 0 for None."""
    if isinstance(address, types.NoneType):
        return types.int64(address), lambda context, builder, signature, arguments: ir.Constant(_WORD, 0)

    def generate(context, builder, signature, arguments):
        return builder.ptrtoint(arguments[0], _WORD)

    return types.int64(address), generate
