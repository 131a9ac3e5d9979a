"""Asking for lines of memory before they are read."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .dtypes import LINE, element_pointer

_I32 = ir.IntType(32)


def _prefetcher(level, summary):
    """Make the function that asks for lines into one level of the caches: 3 is L1, 2 is L2."""

    def prefetch(typing_context, like, array, index):
        def generate(context, builder, signature, arguments):
            pointer = element_pointer(context, builder, array, *arguments[1:])
            size = context.get_abi_sizeof(pointer.type.pointee)
            byte = builder.bitcast(pointer, ir.IntType(8).as_pointer())
            kind = ir.FunctionType(ir.VoidType(), [byte.type, _I32, _I32, _I32])
            name = "llvm.prefetch.p0"
            function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
            for offset in range(0, like.width * size, LINE):
                at = builder.gep(byte, [ir.Constant(ir.IntType(64), offset)])
                builder.call(function, [at, *(ir.Constant(_I32, n) for n in (0, level, 1))])
            return context.get_dummy_value()

        return types.none(like, array, types.intp), generate

    prefetch.__doc__ = summary
    return intrinsic(prefetch)


prefetch = _prefetcher(
    2, "Ask for the lines of the lanes from `index` on, into L2; where there is no memory nothing happens."
)
prefetch_near = _prefetcher(3, "Do the same into L1.")
