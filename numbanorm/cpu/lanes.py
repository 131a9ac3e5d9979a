"""Lanes: a vector of numbers as a Numba type, so that sums have one order.

A loop that adds into one scalar only vectorizes where LLVM may reorder its additions, and then the order, and with it
the last bit, depends on what else LLVM sees: serial and parallel twin, a fresh kernel and one from the cache on disk
came out different. Here the order is written down: lane ``j`` adds elements ``j, j + width, j + 2 * width, ...``, and
the lanes are added by halves. One variable of lanes is several vector registers, which also keeps the adders busy.

Lanes add, subtract and multiply with ``+ - *``; everything else is a function below, for compiled code only.
"""

from __future__ import annotations

import operator

from llvmlite import ir
from numba import types
from numba.core.typing import signature as typing_signature
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

from .dtypes import (
    LINE,
    element_format,
    element_pointer,
    extend_half,
    has_f16c,
    lane_of,
    round_to_bfloat16,
    rounds_to_bfloat16,
    truncate_half,
)
from .jit import scalar

WIDTHS = {types.float32: 32, types.float64: 16}
"""Lanes by lane type: two 512-bit or four 256-bit registers of float32; more would spill where there are 16 of them."""

HEAD_FROM = 128
"""Elements from which two parts of vectors at the ends of a run cost less than vectors that lie across lines.

In the cache, into memory that starts 16 bytes into a line, backward of 32,768 elements in rows of 64 takes 24 us so and
21 with vectors across lines, of 98,304 in rows of 768 36 and 45; LayerNorm in rows of 200 17.6 and 19.5.
"""

_I32 = ir.IntType(32)
_LLVM = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}


class Lanes(types.Type):
    """As many numbers as `WIDTHS` tells for the lane type, or half as many."""

    def __init__(self, element, parts=1):
        self.element = element
        self.width = WIDTHS[element] // parts
        super().__init__(f"Lanes({element}, {self.width})")


class Choice(types.Type):
    """One truth value a lane."""

    def __init__(self, width):
        self.width = width
        super().__init__(f"Choice({width})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(_LLVM[kind.element], kind.width))


@register_model(Choice)
class _ChoiceModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(ir.IntType(1), kind.width))


def _operation(symbol, name):
    @infer_global(symbol)
    class _Template(AbstractTemplate):
        def generic(self, arguments, keywords):
            if len(arguments) == 2 and isinstance(arguments[0], Lanes) and arguments[0] == arguments[1]:
                return typing_signature(arguments[0], *arguments)
            return None

    @lower_builtin(symbol, Lanes, Lanes)
    def _lower(context, builder, signature, arguments):
        return getattr(builder, name)(*arguments)


for _symbol, _name in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    _operation(_symbol, _name)


def _repeat(builder, scalar, width):
    undefined = ir.Constant(ir.VectorType(scalar.type, width), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, width), [0] * width))


def _first(builder, count, width):
    numbers = ir.Constant(ir.VectorType(_I32, width), list(range(width)))
    return builder.icmp_signed("<", numbers, _repeat(builder, builder.trunc(count, _I32), width))


def _read(context, builder, array, arguments, width, chosen=None):
    """Read neighbours as they are stored: all, or the chosen ones and zeros."""
    pointer = element_pointer(context, builder, array, *arguments)
    stored = pointer.type.pointee
    vector = ir.VectorType(stored, width)
    pointer = builder.bitcast(pointer, vector.as_pointer())
    size = context.get_abi_sizeof(stored)
    if chosen is None:
        return builder.load(pointer, align=size)
    name = f"llvm.masked.load.v{width}{'i' if isinstance(stored, ir.IntType) else 'f'}{8 * size}.p0"
    kind = ir.FunctionType(vector, [vector.as_pointer(), _I32, chosen.type, vector])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, [pointer, ir.Constant(_I32, size), chosen, ir.Constant(vector, None)])


def _convert(builder, raw, name, lanes):
    """Turn elements as they are stored into lanes."""
    target = ir.VectorType(_LLVM[lanes.element], lanes.width)
    if name in ("float16", "bfloat16"):
        raw = extend_half(builder, raw, name, has_f16c())
        name = "float32"
    if name in ("float32", "float64"):
        return raw if raw.type == target else builder.fpext(raw, target)
    if name.startswith("int"):
        return builder.sitofp(raw, target)
    return builder.uitofp(raw, target)


def _unconvert(builder, vector, name, lanes):
    """Turn lanes into elements as they are stored, rounded to nearest even."""
    if name in ("float16", "bfloat16"):
        if lanes.element == types.float64:
            vector = builder.fptrunc(vector, ir.VectorType(ir.FloatType(), lanes.width))
        if name == "bfloat16" and lanes.width == 32 and rounds_to_bfloat16():
            return round_to_bfloat16(builder, vector)
        return truncate_half(builder, vector, name, has_f16c())
    if name == "float32" and lanes.element == types.float64:
        return builder.fptrunc(vector, ir.VectorType(ir.FloatType(), lanes.width))
    if name == "float64" and lanes.element == types.float32:
        return builder.fpext(vector, ir.VectorType(ir.DoubleType(), lanes.width))
    return vector


@intrinsic
def no_lanes(typing_context, array):
    """Return lanes of zeros, of the type in which elements of `array` are summed."""
    lanes = Lanes(lane_of(array))

    def generate(context, builder, signature, arguments):
        return ir.Constant(context.get_value_type(lanes), None)

    return lanes(array), generate


@intrinsic
def lanes_for(typing_context, array, half):
    """Return `no_lanes`, or half as many where `half` is not None: the CPU takes half as long for them.

    A sum of few elements is the same bit for bit: what is left out are zeros.
    """
    lanes = Lanes(lane_of(array), 1 if isinstance(half, types.NoneType) else 2)

    def generate(context, builder, signature, arguments):
        return ir.Constant(context.get_value_type(lanes), None)

    return lanes(array, half), generate


@intrinsic
def no_exact_lanes(typing_context):
    """Return float64 lanes of zeros."""
    lanes = Lanes(types.float64)

    def generate(context, builder, signature, arguments):
        return ir.Constant(context.get_value_type(lanes), None)

    return lanes(), generate


@intrinsic
def width_of(typing_context, lanes):
    """Return the number of lanes."""

    def generate(context, builder, signature, arguments):
        return ir.Constant(ir.IntType(64), lanes.width)

    return types.intp(lanes), generate


@intrinsic
def all_lanes(typing_context, like, value):
    """Return lanes that all hold one scalar."""

    def generate(context, builder, signature, arguments):
        return _repeat(builder, arguments[1], like.width)

    return like(like, like.element), generate


@intrinsic
def load_lanes(typing_context, like, array, index):
    """Read the elements from `index` on."""

    def generate(context, builder, signature, arguments):
        raw = _read(context, builder, array, arguments[1:], like.width)
        return _convert(builder, raw, element_format(array.dtype), like)

    return like(like, array, types.intp), generate


@intrinsic
def load_part(typing_context, like, array, index, count):
    """Read `count` elements, fewer than there are lanes; the other lanes are 0."""

    def generate(context, builder, signature, arguments):
        chosen = _first(builder, arguments[3], like.width)
        raw = _read(context, builder, array, arguments[1:3], like.width, chosen)
        return _convert(builder, raw, element_format(array.dtype), like)

    return like(like, array, types.intp, types.intp), generate


@intrinsic
def load_after(typing_context, like, array, index, skip):
    """Read the elements from `index` on, but not the first `skip`, in whose place lanes are 0."""

    def generate(context, builder, signature, arguments):
        chosen = builder.not_(_first(builder, arguments[3], like.width))
        raw = _read(context, builder, array, arguments[1:3], like.width, chosen)
        return _convert(builder, raw, element_format(array.dtype), like)

    return like(like, array, types.intp, types.intp), generate


@intrinsic
def store_lanes(typing_context, lanes, array, index):
    """Write the lanes as the elements from `index` on."""

    def generate(context, builder, signature, arguments):
        raw = _unconvert(builder, arguments[0], element_format(array.dtype), lanes)
        pointer = element_pointer(context, builder, array, *arguments[1:])
        size = context.get_abi_sizeof(pointer.type.pointee)
        builder.store(raw, builder.bitcast(pointer, raw.type.as_pointer()), align=size)
        return context.get_dummy_value()

    return types.none(lanes, array, types.intp), generate


@intrinsic
def stream_lanes(typing_context, lanes, array, index):
    """Write the lanes past the caches; the address must be a multiple of LINE bytes, a fault follows otherwise."""

    def generate(context, builder, signature, arguments):
        raw = _unconvert(builder, arguments[0], element_format(array.dtype), lanes)
        pointer = element_pointer(context, builder, array, *arguments[1:])
        store = builder.store(raw, builder.bitcast(pointer, raw.type.as_pointer()), align=LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))
        return context.get_dummy_value()

    return types.none(lanes, array, types.intp), generate


@intrinsic
def settle_streams(typing_context):
    """Let no later store overtake the streams: threads that wait for this one see what was streamed."""

    def generate(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), generate


def _store_chosen(context, builder, lanes, array, arguments, chosen):
    """Write the chosen lanes as elements."""
    raw = _unconvert(builder, arguments[0], element_format(array.dtype), lanes)
    pointer = element_pointer(context, builder, array, *arguments[1:3])
    stored = pointer.type.pointee
    size = context.get_abi_sizeof(stored)
    pointer = builder.bitcast(pointer, raw.type.as_pointer())
    name = f"llvm.masked.store.v{lanes.width}{'i' if isinstance(stored, ir.IntType) else 'f'}{8 * size}.p0"
    kind = ir.FunctionType(ir.VoidType(), [raw.type, pointer.type, _I32, chosen.type])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    builder.call(function, [raw, pointer, ir.Constant(_I32, size), chosen])
    return context.get_dummy_value()


@intrinsic
def store_part(typing_context, lanes, array, index, count):
    """Write the first `count` lanes as elements, fewer than there are lanes."""

    def generate(context, builder, signature, arguments):
        chosen = _first(builder, arguments[3], lanes.width)
        return _store_chosen(context, builder, lanes, array, arguments, chosen)

    return types.none(lanes, array, types.intp, types.intp), generate


@intrinsic
def store_after(typing_context, lanes, array, index, skip):
    """Write all lanes but the first `skip` as elements: lane j is for `index` + j."""

    def generate(context, builder, signature, arguments):
        chosen = builder.not_(_first(builder, arguments[3], lanes.width))
        return _store_chosen(context, builder, lanes, array, arguments, chosen)

    return types.none(lanes, array, types.intp, types.intp), generate


@intrinsic
def until_line(typing_context, array, index):
    """Return how many elements lie between `index` and the next start of a cache line."""

    def generate(context, builder, signature, arguments):
        pointer = element_pointer(context, builder, array, *arguments)
        size = context.get_abi_sizeof(pointer.type.pointee)
        kind = ir.IntType(64)
        bytes_left = builder.and_(builder.neg(builder.ptrtoint(pointer, kind)), ir.Constant(kind, LINE - 1))
        return builder.udiv(bytes_left, ir.Constant(kind, size))

    return types.intp(array, types.intp), generate


@intrinsic
def first_lanes(typing_context, like, count):
    """Choose the first `count` lanes."""

    def generate(context, builder, signature, arguments):
        return _first(builder, arguments[1], like.width)

    return Choice(like.width)(like, types.intp), generate


@intrinsic
def marked_lanes(typing_context, like, mask, index, count):
    """Choose, of the first `count` lanes, those that count in `mask` from `index` on."""

    def generate(context, builder, signature, arguments):
        chosen = _first(builder, arguments[3], like.width)
        raw = _read(context, builder, mask, arguments[1:3], like.width, chosen)
        return builder.icmp_unsigned("!=", raw, ir.Constant(raw.type, None))

    return Choice(like.width)(like, mask, types.intp, types.intp), generate


@intrinsic
def choose(typing_context, choice, lanes):
    """Return the chosen lanes, and 0 in the others."""

    def generate(context, builder, signature, arguments):
        return builder.select(arguments[0], arguments[1], ir.Constant(arguments[1].type, None))

    return lanes(choice, lanes), generate


@intrinsic
def blended(typing_context, choice, lanes, others):
    """Return the chosen lanes, and those of `others` in place of the others."""

    def generate(context, builder, signature, arguments):
        return builder.select(*arguments)

    return lanes(choice, lanes, others), generate


@intrinsic
def chosen_count(typing_context, choice):
    """Return how many lanes are chosen."""

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[0], ir.IntType(choice.width))
        return builder.zext(builder.ctpop(bits), ir.IntType(64))

    return types.intp(choice), generate


@intrinsic
def fused(typing_context, a, b, c):
    """Return a * b + c, rounded once where the CPU can."""

    def generate(context, builder, signature, arguments):
        kind = arguments[0].type
        name = f"llvm.fmuladd.v{a.width}f{32 if a.element == types.float32 else 64}"
        function = builder.module.globals.get(name) or ir.Function(
            builder.module, ir.FunctionType(kind, [kind] * 3), name
        )
        return builder.call(function, arguments)

    return a(a, b, c), generate


@intrinsic
def sum_of_lanes(typing_context, lanes):
    """Add the lanes by halves, and return the sum as float64."""

    def generate(context, builder, signature, arguments):
        vector = arguments[0]
        width = lanes.width
        while width > 1:
            width //= 2
            low, high = (ir.Constant(ir.VectorType(_I32, width), [*range(a, a + width)]) for a in (0, width))
            vector = builder.fadd(
                builder.shuffle_vector(vector, vector, low), builder.shuffle_vector(vector, vector, high)
            )
        scalar = builder.extract_element(vector, ir.Constant(_I32, 0))
        return scalar if lanes.element == types.float64 else builder.fpext(scalar, ir.DoubleType())

    return types.float64(lanes), generate


@intrinsic
def store_sums(typing_context, a, b, c, d, array, index):
    """Write `sum_of_lanes` of four to float64 from `index` on, in half of the operations: the halves of all at once."""

    def generate(context, builder, signature, arguments):
        vectors = list(arguments[:4])
        width = a.width  # lanes that are left of each of the four, which lie one after the other
        while width > 1:
            width //= 2
            if len(vectors) > 1:
                pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
            else:
                pairs = [(vectors[0], vectors[0])]
            rows = 4 // len(pairs)
            low, high = (
                ir.Constant(
                    ir.VectorType(_I32, rows * width),
                    [2 * width * row + first + lane for row in range(rows) for lane in range(width)],
                )
                for first in (0, width)
            )
            vectors = [
                builder.fadd(builder.shuffle_vector(p, q, low), builder.shuffle_vector(p, q, high)) for p, q in pairs
            ]
        (sums,) = vectors
        doubles = ir.VectorType(ir.DoubleType(), 4)
        if sums.type != doubles:
            sums = builder.fpext(sums, doubles)
        target = element_pointer(context, builder, array, *arguments[4:])
        builder.store(sums, builder.bitcast(target, doubles.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.none(a, b, c, d, array, types.intp), generate


@intrinsic
def rounded(typing_context, lanes, array):
    """Return lanes as they would be read after they had been written to `array`, whose elements are floats."""

    def generate(context, builder, signature, arguments):
        name = element_format(array.dtype)
        return _convert(builder, _unconvert(builder, arguments[0], name, lanes), name, lanes)

    return lanes(lanes, array), generate


@scalar
def load_some(like, array, index, count):
    """Read `count` elements, or as many as there are lanes."""
    if count >= width_of(like):
        return load_lanes(like, array, index)
    return load_part(like, array, index, count)


@scalar
def store_some(lanes, array, index, count):
    """Write the first `count` lanes, or all."""
    if count >= width_of(lanes):
        store_lanes(lanes, array, index)
    else:
        store_part(lanes, array, index, count)
