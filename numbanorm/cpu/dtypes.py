"""Elements in, lanes out: how each dtype is read into the lane type of the kernels and written back.

Lanes are float32 for float16, bfloat16, float32, bool and the 8- and 16-bit integers, float64 for all else. Numba knows
neither float16 nor bfloat16 arrays, so these arrive as records of one uint16 whose field names the format: the type
alone tells the kernel how to convert, and a conversion stays in a register.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import config, types
from numba.extending import intrinsic

from ..core.dtypes import NARROW

LINE = 64
"""Bytes of a cache line."""


def element_format(dtype: Any) -> str:
    """Return the name of a Numba element type: its own, or that of the half format that a record stands for."""
    if isinstance(dtype, types.Record):
        return next(iter(dtype.fields))
    return str(dtype)


def _bits(dtype):
    """Return the Numba type that an element is read and written as: uint16 where a record stands for half precision."""
    return types.uint16 if isinstance(dtype, types.Record) else dtype


def lane_of(array):
    """Return the Numba type in which the kernels compute with elements of an array."""
    return types.float32 if element_format(array.dtype) in NARROW else types.float64


@intrinsic
def pointer(typing_context, array):
    """Return the address of an argument's elements as a pointer, None for None.

    What `load` and `store` do with an array they do with its pointer. Functions that are called for every row take
    pointers: arrays are counted by atomic operations at every call, 70 ns a row for six of them, and all threads would
    count on one cache line. Arrays that a function allocates stay arrays: a pointer would not keep them alive.
    """
    if isinstance(array, types.NoneType):
        return array(array), lambda context, builder, signature, arguments: arguments[0]

    def generate(context, builder, signature, arguments):
        if isinstance(array, types.Array):
            return context.make_array(array)(context, builder, arguments[0]).data
        return arguments[0]

    return types.CPointer(array.dtype)(array), generate


@intrinsic
def shifted(typing_context, address, count):
    """Return the address that lies so many elements further on."""

    def generate(context, builder, signature, arguments):
        return builder.gep(arguments[0], [arguments[1]])

    return address(address, types.intp), generate


@intrinsic
def retyped(typing_context, address, like):
    """Return an address as that of elements of the dtype of `like`."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), generate


@intrinsic(prefer_literal=True)
def room(typing_context, like, count):
    """Return a pointer to room on the stack for a constant number of elements of the dtype of `like`, from a line on.

    It is gone when the function returns. An array takes Numba 30 ms to compile, and starts anywhere in a line.
    """

    def generate(context, builder, signature, arguments):
        with builder.goto_entry_block():
            start = builder.alloca(context.get_data_type(like.dtype), size=count.literal_value)
        start.align = LINE
        return start

    return types.CPointer(like.dtype)(like, count), generate


def element_pointer(context, builder, array, value, index):
    """Generate the address of an element of an array, or at a pointer, typed as it is stored."""
    data = context.make_array(array)(context, builder, value).data if isinstance(array, types.Array) else value
    stored = context.get_data_type(_bits(array.dtype))
    return builder.gep(builder.bitcast(data, stored.as_pointer()), [index])


@intrinsic
def load(typing_context, array, index):
    """Read one element as a lane. No slice, no test for a negative index: slices count references atomically."""
    element, name, result = _bits(array.dtype), element_format(array.dtype), lane_of(array)

    def generate(context, builder, signature, arguments):
        value = context.unpack_value(builder, element, element_pointer(context, builder, array, *arguments))
        if name in ("float16", "bfloat16"):
            return extend_half(builder, value, name, has_f16c())
        return context.cast(builder, value, element, result)

    return result(array, types.intp), generate


@intrinsic
def store(typing_context, array, index, value):
    """Write one lane as an element, rounded to nearest even."""
    name = element_format(array.dtype)
    number = types.float32 if name in ("float16", "bfloat16") else array.dtype

    def generate(context, builder, signature, arguments):
        item = arguments[2]
        if name in ("float16", "bfloat16"):
            item = truncate_half(builder, item, name, has_f16c())
        target = element_pointer(context, builder, array, *arguments[:2])
        context.pack_value(builder, _bits(array.dtype), item, target)
        return context.get_dummy_value()

    return types.none(array, types.intp, number), generate


@intrinsic
def counts(typing_context, mask, index):
    """Read one element of a mask."""

    def generate(context, builder, signature, arguments):
        return context.unpack_value(builder, types.boolean, element_pointer(context, builder, mask, *arguments))

    return types.boolean(mask, types.intp), generate


@intrinsic
def lane(typing_context, array, value):
    """Round a float64 scalar to the lane type of `array`."""

    def generate(context, builder, signature, arguments):
        return context.cast(builder, arguments[1], types.float64, signature.return_type)

    return lane_of(array)(array, types.float64), generate


def extend_half(builder, bits, name, in_hardware):
    """Generate the conversion of half precision, as uint16, to float32: of a scalar or of a vector."""
    width = getattr(bits.type, "count", None)

    def kind(scalar):
        return scalar if width is None else ir.VectorType(scalar, width)

    def constant(scalar, value):
        return ir.Constant(kind(scalar), value if width is None else [value] * width)

    integer, real = ir.IntType(32), ir.FloatType()
    if name == "bfloat16":  # the upper half of a float32
        return builder.bitcast(builder.shl(builder.zext(bits, kind(integer)), constant(integer, 16)), kind(real))
    if in_hardware:
        return builder.fpext(builder.bitcast(bits, kind(ir.HalfType())), kind(real))
    wide = builder.zext(bits, kind(integer))
    magnitude = builder.shl(builder.and_(wide, constant(integer, 0x7FFF)), constant(integer, 13))
    # The exponent bias differs by 112; the product also turns float16's subnormals into float32's normal numbers.
    scaled = builder.fmul(builder.bitcast(magnitude, kind(real)), constant(real, 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, constant(integer, 0x7C00 << 13))
    infinite = builder.or_(magnitude, constant(integer, 0x7F800000))
    result = builder.select(special, infinite, builder.bitcast(scaled, kind(integer)))
    sign = builder.shl(builder.and_(wide, constant(integer, 0x8000)), constant(integer, 16))
    return builder.bitcast(builder.or_(result, sign), kind(real))


def truncate_half(builder, value, name, in_hardware):
    """Generate the rounding of float32, a scalar or a vector, to half precision: to nearest even, NaN kept."""
    width = getattr(value.type, "count", None)

    def kind(scalar):
        return scalar if width is None else ir.VectorType(scalar, width)

    def constant(number):
        return ir.Constant(kind(ir.IntType(32)), number if width is None else [number] * width)

    integer, real = kind(ir.IntType(32)), kind(ir.FloatType())
    short = kind(ir.IntType(16))
    if name == "float16" and in_hardware:
        return builder.bitcast(builder.fptrunc(value, kind(ir.HalfType())), short)
    bits = builder.bitcast(value, integer)
    magnitude = builder.and_(bits, constant(0x7FFFFFFF))
    is_nan = builder.fcmp_unordered("uno", value, value)

    def rounded(value, dropped, offset):
        """Drop low bits, to nearest even, after subtracting an offset."""
        odd = builder.and_(builder.lshr(value, constant(dropped)), constant(1))
        carry = builder.add(odd, constant(((1 << (dropped - 1)) - 1 - offset) & 0xFFFFFFFF))
        return builder.lshr(builder.add(value, carry), constant(dropped))

    if name == "bfloat16":  # LLVM's own truncation to bfloat crashed
        quiet = builder.or_(builder.lshr(bits, constant(16)), constant(0x40))
        return builder.trunc(builder.select(is_nan, quiet, rounded(bits, 16, 0)), short)
    half = rounded(magnitude, 13, 112 << 23)  # the exponent bias differs by 112
    # Below 2**-14: float16's subnormals, spaced as float32 is at 0.5.
    at_half = builder.fadd(builder.bitcast(magnitude, real), builder.bitcast(constant(0x3F000000), real))
    tiny = builder.sub(builder.bitcast(at_half, integer), constant(0x3F000000))
    half = builder.select(builder.icmp_unsigned("<", magnitude, constant(0x38800000)), tiny, half)
    half = builder.select(builder.icmp_unsigned(">=", magnitude, constant(0x47800000)), constant(0x7C00), half)
    payload = builder.and_(builder.lshr(magnitude, constant(13)), constant(0x3FF))
    half = builder.select(is_nan, builder.or_(payload, constant(0x7E00)), half)
    sign = builder.and_(builder.lshr(bits, constant(16)), constant(0x8000))
    return builder.trunc(builder.or_(half, sign), short)


class _BFloat(ir.Type):
    """LLVM's own type for bfloat16, which llvmlite does not name."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


def _instruction(builder, kind, name):
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


def round_to_bfloat16(builder, value):
    """Generate the rounding of 32 float32 by the CPU, as `truncate_half` rounds.

    One instruction in place of twenty, but it takes subnormal numbers for 0: where there are any, the twenty do it.
    """
    half = ir.VectorType(ir.FloatType(), 16)
    parts = [
        builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(ir.IntType(32), 16), [*range(i, i + 16)]))
        for i in (0, 16)
    ]
    subnormal = ir.Constant(ir.IntType(32), 0x20)
    is_one = ir.FunctionType(ir.VectorType(ir.IntType(1), 16), [half, subnormal.type])
    classify = _instruction(builder, is_one, "llvm.x86.avx512.fpclass.ps.512")
    found = builder.or_(*(builder.call(classify, [part, subnormal]) for part in parts))
    some = builder.icmp_unsigned("!=", builder.bitcast(found, ir.IntType(16)), ir.Constant(ir.IntType(16), 0))
    short = ir.VectorType(ir.IntType(16), 32)
    with builder.if_else(some, likely=False) as (exact, fast):
        with exact:
            slow_result = truncate_half(builder, value, "bfloat16", False)
            slow_block = builder.block
        with fast:
            packed = ir.VectorType(_BFloat(), 32)
            kind = ir.FunctionType(packed, [half, half])
            convert = _instruction(builder, kind, "llvm.x86.avx512bf16.cvtne2ps2bf16.512")
            fast_result = builder.bitcast(builder.call(convert, [parts[1], parts[0]]), short)
            fast_block = builder.block
    result = builder.phi(short)
    result.add_incoming(slow_result, slow_block)
    result.add_incoming(fast_result, fast_block)
    return result


def _conversions(name, in_hardware):
    """Make the conversions of a half format from and to float32, of scalars."""

    @intrinsic
    def extend(typing_context, bits):
        def generate(context, builder, signature, arguments):
            return extend_half(builder, arguments[0], name, in_hardware)

        return types.float32(types.uint16), generate

    @intrinsic
    def truncate(typing_context, value):
        def generate(context, builder, signature, arguments):
            return truncate_half(builder, arguments[0], name, in_hardware)

        return types.uint16(types.float32), generate

    return extend, truncate


def has_f16c() -> bool:
    """Tell whether the CPU that Numba compiles for converts float16 itself; elsewhere LLVM's conversion crashes."""
    return _has("f16c")


def rounds_to_bfloat16() -> bool:
    """Tell whether the CPU that Numba compiles for rounds to bfloat16 itself."""
    return _has("avx512bf16") and _has("avx512dq")


def _has(feature: str) -> bool:
    if config.CPU_NAME or config.CPU_FEATURES:  # the user compiles for another CPU than this one
        return f"+{feature}" in (config.CPU_FEATURES or "")
    return bool(llvmlite.binding.get_host_cpu_features().get(feature, False))


float16_bits_to_float32, float32_to_float16_bits = _conversions("float16", in_hardware=False)
float16_to_float32, float32_to_float16 = _conversions("float16", in_hardware=has_f16c())
bfloat16_to_float32, float32_to_bfloat16 = _conversions("bfloat16", in_hardware=False)
