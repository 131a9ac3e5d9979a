"""Lanes: what one thread holds of an array, as one value that lies in registers.

An array in a kernel's local memory stays in registers only where every loop over it is unrolled, which is the
compiler's choice. A vector of numbers as a Numba type is always in registers, and its sums have an order that is
written down: by halves.

Lanes take ``+ - *`` with lanes and with scalars, and ``< >`` with either; the functions below serve scalars as well,
so that a merge of moments is written once, for one group a thread and for one group a lane.
"""

from __future__ import annotations

import operator
from functools import cache

from .toolchain import (
    SIMULATED,
    AbstractTemplate,
    infer_global,
    intrinsic,
    ir,
    lower_builtin,
    models,
    register_model,
    signature,
    types,
)

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
LLVM = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}


class Lanes(types.Type):
    """`width` numbers."""

    def __init__(self, element, width):
        self.element, self.width = element, width
        super().__init__(f"Lanes({element}, {width})")


class Choice(types.Type):
    """One truth value a lane."""

    def __init__(self, width):
        self.width = width
        super().__init__(f"Choice({width})")


if not SIMULATED:

    @register_model(Lanes)
    class _LanesModel(models.PrimitiveModel):
        def __init__(self, manager, kind):
            super().__init__(manager, kind, ir.VectorType(LLVM[kind.element], kind.width))

    @register_model(Choice)
    class _ChoiceModel(models.PrimitiveModel):
        def __init__(self, manager, kind):
            super().__init__(manager, kind, ir.VectorType(I1, kind.width))


def number(value):
    """Return an i32 constant, as vector instructions take their indices."""
    return ir.Constant(I32, value)


def part(builder, vector, start, width):
    """Return neighbouring lanes."""
    return builder.shuffle_vector(
        vector, vector, ir.Constant(ir.VectorType(I32, width), [*range(start, start + width)])
    )


def repeat(builder, scalar, width):
    """Return a vector of one value."""
    vector = ir.Constant(ir.VectorType(scalar.type, width), ir.Undefined)
    for i in range(width):
        vector = builder.insert_element(vector, scalar, number(i))
    return vector


def join(builder, parts):
    """Return one vector of the lanes of several."""
    width = parts[0].type.count
    whole = ir.Constant(ir.VectorType(parts[0].type.element, width * len(parts)), ir.Undefined)
    for i, vector in enumerate(parts):
        for j in range(width):
            whole = builder.insert_element(whole, builder.extract_element(vector, number(j)), number(i * width + j))
    return whole


def _vector(builder, value, kind, lanes):
    return value if isinstance(kind, Lanes) else repeat(builder, value, lanes.width)


def _operation(symbol, instruction, compares=False):
    @infer_global(symbol)
    class _Template(AbstractTemplate):
        def generic(self, arguments, keywords):
            found = [a for a in arguments if isinstance(a, Lanes)]
            if len(arguments) != 2 or not found or any(a not in (found[0], found[0].element) for a in arguments):
                return None
            return signature(Choice(found[0].width) if compares else found[0], *arguments)

    def lower(context, builder, signature, arguments):
        lanes = next(a for a in signature.args if isinstance(a, Lanes))
        a, b = (_vector(builder, v, k, lanes) for v, k in zip(arguments, signature.args, strict=True))
        return builder.fcmp_ordered(instruction, a, b) if compares else getattr(builder, instruction)(a, b)

    for kinds in ((Lanes, Lanes), (Lanes, types.Float), (types.Float, Lanes)):
        lower_builtin(symbol, *kinds)(lower)


if not SIMULATED:
    for _symbol, _name in (
        (operator.add, "fadd"),
        (operator.sub, "fsub"),
        (operator.mul, "fmul"),
    ):
        _operation(_symbol, _name)
    _operation(operator.lt, "<", compares=True)
    _operation(operator.gt, ">", compares=True)


@intrinsic
def pick(typing_context, condition, a, b):
    """Return `a` where the condition holds and `b` where not; all scalars, or all lanes."""

    def generate(context, builder, signature, arguments):
        return builder.select(*arguments)

    return a(condition, a, a), generate


@intrinsic
def like(typing_context, value, scalar):
    """Return a number in every lane of something of the type of `value`."""

    def generate(context, builder, signature, arguments):
        return repeat(builder, arguments[1], value.width) if isinstance(value, Lanes) else arguments[1]

    return value(value, value.element if isinstance(value, Lanes) else value), generate


@intrinsic
def some(typing_context, condition):
    """Tell whether a condition holds anywhere."""

    def generate(context, builder, signature, arguments):
        if not isinstance(condition, Choice):
            return arguments[0]
        return _folded(builder, arguments[0], 1, builder.or_)

    return types.boolean(condition), generate


@intrinsic
def choose(typing_context, choice, lanes):
    """Return the chosen lanes, and 0 in the others."""

    def generate(context, builder, signature, arguments):
        return builder.select(arguments[0], arguments[1], ir.Constant(arguments[1].type, None))

    return lanes(choice, lanes), generate


@intrinsic
def narrowed(typing_context, value):
    """Return float64 lanes, or a scalar, as float32."""
    result = Lanes(types.float32, value.width) if isinstance(value, Lanes) else types.float32

    def generate(context, builder, signature, arguments):
        return builder.fptrunc(arguments[0], context.get_value_type(result))

    return result(value), generate


@intrinsic
def widened(typing_context, value):
    """Return float32 lanes, or a scalar, as float64."""
    result = Lanes(types.float64, value.width) if isinstance(value, Lanes) else types.float64

    def generate(context, builder, signature, arguments):
        return builder.fpext(arguments[0], context.get_value_type(result))

    return result(value), generate


def _approximate(builder, instruction, value):
    """Call an instruction that approximates a function of one float32 or float64."""
    kind = value.type
    letter = "f" if kind == ir.FloatType() else "d"
    return builder.call(
        ir.InlineAsm(ir.FunctionType(kind, [kind]), f"{instruction} $0, $1;", f"={letter},{letter}"), [value]
    )


def _refined(builder, value, correct):
    """Apply two steps of Newton's method to a float64; where the result is NaN (of 0, of infinity), none."""
    guess = value
    for _ in range(2):
        value = correct(value)
    return builder.select(builder.fcmp_unordered("uno", value, value), guess, value)


def _inverse(builder, value):
    if value.type == ir.FloatType():
        return _approximate(builder, "rcp.approx.f32", value)
    one = ir.Constant(value.type, 1.0)

    def correct(guess):
        return builder.fadd(guess, builder.fmul(guess, builder.fsub(one, builder.fmul(value, guess))))

    return _refined(builder, _approximate(builder, "rcp.approx.ftz.f64", value), correct)


@intrinsic
def inverse(typing_context, value):
    """Return 1/x of lanes or a scalar, to one or two units in the last place, for x far from overflow.

    Divisions and roots that round to nearest are subroutines, for which a kernel must clear its registers; in
    the backward of 16 elements a thread one of them made the difference between 240 registers and 134.
    """

    def generate(context, builder, signature, arguments):
        if not isinstance(value, Lanes):
            return _inverse(builder, arguments[0])
        result = ir.Constant(arguments[0].type, ir.Undefined)
        for i in range(value.width):
            one = _inverse(builder, builder.extract_element(arguments[0], number(i)))
            result = builder.insert_element(result, one, number(i))
        return result

    return value(value), generate


@intrinsic
def inverse_root(typing_context, value):
    """Return 1/sqrt(x) of a float64, to one or two units in the last place; infinity of 0."""

    def generate(context, builder, signature, arguments):
        (x,) = arguments
        half, three_halves = ir.Constant(x.type, 0.5), ir.Constant(x.type, 1.5)

        def correct(guess):
            square = builder.fmul(builder.fmul(half, x), builder.fmul(guess, guess))
            return builder.fmul(guess, builder.fsub(three_halves, square))

        return _refined(builder, _approximate(builder, "rsqrt.approx.ftz.f64", x), correct)

    return types.float64(types.float64), generate


def _folded(builder, vector, width, join_two):
    """Join the lanes by halves until `width` are left; a scalar if that is 1."""
    while vector.type.count > width:
        half = vector.type.count // 2
        vector = join_two(part(builder, vector, 0, half), part(builder, vector, half, half))
    return builder.extract_element(vector, number(0)) if width == 1 else vector


@cache
def fold(width):
    """Return the function that adds lanes that lie `width` apart, by halves: a scalar for width 1."""

    @intrinsic
    def folded(typing_context, lanes):
        result = lanes.element if width == 1 else Lanes(lanes.element, width)

        def generate(context, builder, signature, arguments):
            return _folded(builder, arguments[0], width, builder.fadd)

        return result(lanes), generate

    return folded


@cache
def count(width, element):
    """Return the function that counts chosen lanes that lie `width` apart."""
    result = element if width == 1 else Lanes(element, width)

    @intrinsic
    def counted(typing_context, choice):
        def generate(context, builder, signature, arguments):
            numbers = builder.uitofp(arguments[0], ir.VectorType(LLVM[element], choice.width))
            return _folded(builder, numbers, width, builder.fadd)

        return result(choice), generate

    return counted


@cache
def first(width):
    """Return the function that finds, of chosen lanes that lie `width` apart, the first one's number; 0 if none."""

    @intrinsic
    def found(typing_context, choice, lanes):
        result = lanes.element if width == 1 else Lanes(lanes.element, width)

        def generate(context, builder, signature, arguments):
            value = ir.Constant(ir.VectorType(LLVM[lanes.element], width), None)
            for start in reversed(range(0, lanes.width, width)):
                chosen = part(builder, arguments[0], start, width)
                value = builder.select(chosen, part(builder, arguments[1], start, width), value)
            return builder.extract_element(value, number(0)) if width == 1 else value

        return result(choice, lanes), generate

    return found


@cache
def tile(width):
    """Return the function that repeats lanes, or a scalar, side by side until there are `width`."""

    @intrinsic
    def tiled(typing_context, value):
        lanes = Lanes(value.element if isinstance(value, Lanes) else value, width)

        def generate(context, builder, signature, arguments):
            if not isinstance(value, Lanes):
                return repeat(builder, arguments[0], width)
            return join(builder, [arguments[0]] * (width // value.width))

        return lanes(value), generate

    return tiled


@intrinsic
def put(typing_context, array, at, value):
    """Write lanes, or a scalar, to an array from `at` on."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(array)(context, builder, arguments[0]).data
        width = value.width if isinstance(value, Lanes) else 1
        for i in range(width):
            scalar = builder.extract_element(arguments[2], number(i)) if isinstance(value, Lanes) else arguments[2]
            builder.store(scalar, builder.gep(data, [builder.add(arguments[1], ir.Constant(I64, i))]))
        return context.get_dummy_value()

    return types.none(array, types.int64, value), generate
