"""Memory: spans of it, and how a thread reads and writes them, 128 bits at a time where they lie so.

Kernels are handed addresses, not arrays: an array costs 4 us of every launch. A thread reads `count` pieces of `vector`
neighbours, from piece `p` on, `step` pieces apart, and no further than piece `limit`. Where a piece lies is one of
four rules:

* ``"flat"``: pieces are neighbours, at ``p * vector``;
* ``"whole"``: likewise, and the limit never cuts a tile: it is asked for once, not for each piece;
* ``"runs"``: they are neighbours within runs of `run` pieces, at ``p // run * stride + p % run * vector``;
* ``"rows"``: they lie below each other, at ``p * stride``.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from .lanes import I8, I16, I32, I64, LLVM, Choice, Lanes, join, number, part, repeat
from .toolchain import intrinsic, ir, types

WORD = 16
"""Bytes of the widest load and store of a thread."""

_STORED = {"float32": ir.FloatType(), "float64": ir.DoubleType(), "float16": ir.HalfType(), "bfloat16": I16, "bool": I8}
START = ir.Constant(I64, 0)


class Span(NamedTuple):
    """Elements that lie side by side in device memory.

    Attributes
    ----------
    address : int
        Of the first element of the span (its lowest address), in bytes.
    dtype : np.dtype
        As `numbanorm.dtypes.format_of` takes it.
    size : int
        Number of elements.
    """

    address: int
    dtype: np.dtype[Any]
    size: int


def stored_type(name):
    """Return the LLVM type of an element in memory."""
    return _STORED.get(name) or ir.IntType(int(name.lstrip("uint")))


def _bytes(kind):
    return {ir.FloatType(): 4, ir.DoubleType(): 8, ir.HalfType(): 2}.get(kind) or kind.width // 8


def places(builder, rule, vector, count, arguments):
    """Yield, piece by piece, whether it is there, its offset, its run and its offset in that."""
    p, step, limit, run, stride = arguments
    there = None
    rows = divided(builder, p, step, run) if rule == "runs" else None
    for _ in range(count):
        if there is None or rule != "whole":
            there = builder.icmp_signed("<", p, limit)
        if rule in ("flat", "whole"):
            row, within = START, builder.mul(p, ir.Constant(I64, vector))
            offset = within
        elif rule == "runs":
            row, rest = next(rows)
            within = builder.mul(rest, ir.Constant(I64, vector))
            offset = builder.add(builder.mul(row, stride), within)
        else:
            row, within = p, START
            offset = builder.mul(p, stride)
        yield there, offset, row, within
        p = builder.add(p, step)


def divided(builder, start, step, length):
    """Yield quotient and rest, by a length, of a number that grows by steps: a division takes 25 instructions."""
    quotient, more = builder.udiv(start, length), builder.udiv(step, length)
    rest = builder.sub(start, builder.mul(quotient, length))
    rest_more = builder.sub(step, builder.mul(more, length))
    while True:
        yield quotient, rest
        rest, over = less(builder, builder.add(rest, rest_more), length)
        quotient = builder.add(builder.add(quotient, more), builder.zext(over, I64))


def less(builder, number, length):
    """Return a number below twice a length less that, if it can be, and whether it can."""
    over = builder.icmp_unsigned(">=", number, length)
    return builder.select(over, builder.sub(number, length), number), over


def _pointer(builder, address, offset, kind, size):
    where = builder.add(address, builder.mul(offset, ir.Constant(I64, size)))
    return builder.inttoptr(where, kind.as_pointer(1))


def _words(kind, vector):
    """Return how elements are moved: elements a word, and the LLVM type of a word.

    Narrow elements move as a vector of 32-bit words, cut by shifts: LLVM splits a vector of eight halves in two.
    """
    size = _bytes(kind)
    per_word = max(1, min(vector, WORD // size))
    if size >= 4:
        return per_word, ir.VectorType(kind, per_word)
    bits = 8 * size * per_word
    return per_word, ir.VectorType(I32, bits // 32) if bits >= 32 else ir.IntType(bits)


def read_elements(builder, address, offset, kind, vector):
    """Read `vector` neighbours in as few words as there are."""
    size = _bytes(kind)
    per_word, word_kind = _words(kind, vector)
    words = []
    for start in range(0, vector, per_word):
        at = builder.add(offset, ir.Constant(I64, start))
        word = builder.load(_pointer(builder, address, at, word_kind, size), align=size * per_word)
        words.append(word if size >= 4 else _cut(builder, word, kind, per_word))
    return join(builder, words)


def _cut(builder, word, kind, count):
    """Cut a word, or a vector of them, into narrow elements."""
    bits = 8 * _bytes(kind)
    values = ir.Constant(ir.VectorType(kind, count), ir.Undefined)
    for i in range(count):
        one = word
        if isinstance(word.type, ir.VectorType):
            one = builder.extract_element(word, number(i * bits // 32))
        shift = i * bits % min(32, one.type.width)
        if shift:
            one = builder.lshr(one, ir.Constant(one.type, shift))
        if one.type.width > bits:
            one = builder.trunc(one, ir.IntType(bits))
        values = builder.insert_element(values, builder.bitcast(one, kind), number(i))
    return values


def _glue(builder, values, word_kind):
    """Put narrow elements together to a word, or a vector of them."""
    bits = 8 * _bytes(values.type.element)
    one_kind = word_kind.element if isinstance(word_kind, ir.VectorType) else word_kind
    words = []
    for start in range(0, values.type.count, one_kind.width // bits):
        word = ir.Constant(one_kind, 0)
        for i in range(one_kind.width // bits):
            one = builder.bitcast(builder.extract_element(values, number(start + i)), ir.IntType(bits))
            if one_kind.width > bits:
                one = builder.shl(builder.zext(one, one_kind), ir.Constant(one_kind, i * bits))
            word = builder.or_(word, one)
        words.append(word)
    return words[0] if one_kind is word_kind else join(builder, [repeat(builder, word, 1) for word in words])


def write_elements(builder, address, offset, values):
    """Write neighbours in as few words as there are."""
    kind, vector = values.type.element, values.type.count
    size = _bytes(kind)
    per_word, word_kind = _words(kind, vector)
    for start in range(0, vector, per_word):
        word = part(builder, values, start, per_word)
        if size < 4:
            word = _glue(builder, word, word_kind)
        at = builder.add(offset, ir.Constant(I64, start))
        builder.store(word, _pointer(builder, address, at, word_kind, size), align=size * per_word)


def where_there(builder, there, produce):
    """Produce a vector where a condition holds, zeros elsewhere."""
    before = builder.block
    with builder.if_then(there):
        values = produce()
        inside = builder.block
    merged = builder.phi(values.type)
    merged.add_incoming(ir.Constant(values.type, None), before)
    merged.add_incoming(values, inside)
    return merged


def to_lanes(builder, raw, name, lane):
    """Turn elements as they are stored into lanes."""
    width = raw.type.count
    target = ir.VectorType(LLVM[lane], width)
    if name == "bfloat16":
        wide = builder.shl(builder.zext(raw, ir.VectorType(I32, width)), repeat(builder, number(16), width))
        raw = builder.bitcast(wide, ir.VectorType(ir.FloatType(), width))
        name = "float32"
    if "float" in name:
        return raw if raw.type == target else builder.fpext(raw, target)
    return (builder.sitofp if name.startswith("int") else builder.uitofp)(raw, target)


def _rounded_pair(builder, low, high):
    """Round two float32 to bfloat16, in one word.

    One instruction for both; in integers it takes seven each, and bfloat16 took as long as float32.
    """
    convert = ir.FunctionType(I32, [low.type, high.type])
    return builder.call(ir.InlineAsm(convert, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f"), [high, low])


def from_lanes(builder, values, name):
    """Turn lanes into elements as they are stored, rounded to nearest, ties to even."""
    width = values.type.count
    if name != "bfloat16":
        kind = ir.VectorType(stored_type(name), width)
        return values if values.type == kind else builder.fptrunc(values, kind)
    real = ir.FloatType()
    result = ir.Constant(ir.VectorType(I16, width), ir.Undefined)
    for start in range(0, width, 2):
        low = builder.extract_element(values, number(start))
        high = builder.extract_element(values, number(start + 1)) if start + 1 < width else ir.Constant(real, 0.0)
        pair = builder.bitcast(_rounded_pair(builder, low, high), ir.VectorType(I16, 2))
        for i in range(min(2, width - start)):
            result = builder.insert_element(result, builder.extract_element(pair, number(i)), number(start + i))
    return result


PLACE = (types.int64,) * 5  # p, step, limit, run, stride


@cache
def loader(dtype, lane, vector, count, rule):
    """Return ``load(address, p, step, limit, run, stride)``: the elements as lanes, 0 beyond the limit."""
    lanes = Lanes(lane, vector * count)

    @intrinsic
    def load(typing_context, address, p, step, limit, run, stride):
        def generate(context, builder, signature, arguments):
            parts = []
            for there, offset, _, _ in places(builder, rule, vector, count, arguments[1:]):
                kind = stored_type(dtype)
                raw = where_there(builder, there, partial(read_elements, builder, arguments[0], offset, kind, vector))
                parts.append(to_lanes(builder, raw, dtype, lane))
            return join(builder, parts)

        return lanes(types.int64, *PLACE), generate

    return load


def _packs(dtype, vector):
    """Tell whether a load of so many elements is whole 32-bit words of narrower ones."""
    return dtype in ("float16", "bfloat16") and vector % 2 == 0


@cache
def raw_loader(dtype, lane, vector, count, rule):
    """Return ``load(address, p, ...)``: what `loader` reads, as it is stored, two halves a number of 32 bits.

    So a thread reads ahead in half the registers, and no conversion waits for memory: `unpacker` converts.
    """
    if not _packs(dtype, vector):
        return loader(dtype, lane, vector, count, rule)
    lanes = Lanes(types.float32, vector * count // 2)
    word = ir.VectorType(ir.FloatType(), vector // 2)

    @intrinsic
    def load(typing_context, address, p, step, limit, run, stride):
        def generate(context, builder, signature, arguments):
            parts = []
            for there, offset, _, _ in places(builder, rule, vector, count, arguments[1:]):
                at = _pointer(builder, arguments[0], offset, word, 2)
                parts.append(where_there(builder, there, partial(builder.load, at, align=2 * vector)))
            return join(builder, parts)

        return lanes(types.int64, *PLACE), generate

    return load


@cache
def unpacker(dtype, lane, vector, count):
    """Return the function that makes lanes of what `raw_loader` has read."""
    packs = _packs(dtype, vector)
    result = Lanes(lane, vector * count)

    @intrinsic
    def unpacked(typing_context, raw):
        def generate(context, builder, signature, arguments):
            if not packs:
                return arguments[0]
            words = builder.bitcast(arguments[0], ir.VectorType(I32, vector * count // 2))
            return to_lanes(builder, _cut(builder, words, stored_type(dtype), vector * count), dtype, lane)

        return result(raw), generate

    return unpacked


@cache
def storer(dtype, lane, vector, count, rule):
    """Return ``store(address, p, step, limit, run, stride, lanes)``."""
    lanes = Lanes(lane, vector * count)

    @intrinsic
    def store(typing_context, address, p, step, limit, run, stride, values):
        def generate(context, builder, signature, arguments):
            own = places(builder, rule, vector, count, arguments[1:6])
            for i, (there, offset, _, _) in enumerate(own):
                values = from_lanes(builder, part(builder, arguments[6], i * vector, vector), dtype)
                with builder.if_then(there):
                    write_elements(builder, arguments[0], offset, values)
            return context.get_dummy_value()

        return types.none(types.int64, *PLACE, lanes), generate

    return store


@cache
def chooser(kind, vector, count, rule):
    """Return ``chosen(mask, p, step, limit, run, stride)``: the lanes that are there and count.

    `kind` is ``"all"`` (there is no mask), ``"elements"`` (a truth value each) or ``"runs"`` (one for each run or row).
    """

    @intrinsic
    def chosen(typing_context, mask, p, step, limit, run, stride):
        def generate(context, builder, signature, arguments):
            parts = []
            for there, offset, row, _ in places(builder, rule, vector, count, arguments[1:]):
                counts = repeat(builder, there, vector)
                if kind != "all":
                    at = offset if kind == "elements" else builder.mul(row, arguments[5])
                    width = vector if kind == "elements" else 1
                    raw = where_there(builder, there, partial(read_elements, builder, arguments[0], at, I8, width))
                    marked = builder.icmp_unsigned("!=", raw, ir.Constant(raw.type, None))
                    counts = join(builder, [marked] * (vector // width))
                parts.append(counts)
            return join(builder, parts)

        return Choice(vector * count)(types.int64, *PLACE), generate

    return chosen


@cache
def rounder(dtype, lane, width):
    """Return the function that rounds lanes as storing them would."""
    lanes = Lanes(lane, width)

    @intrinsic
    def rounded(typing_context, values):
        def generate(context, builder, signature, arguments):
            return to_lanes(builder, from_lanes(builder, arguments[0], dtype), dtype, lane)

        return lanes(lanes), generate

    return rounded


@intrinsic
def read_number(typing_context, address, index):
    """Read one float64."""

    def generate(context, builder, signature, arguments):
        raw = read_elements(builder, *arguments, ir.DoubleType(), 1)
        return builder.extract_element(raw, number(0))

    return types.float64(types.int64, types.int64), generate


@intrinsic
def write_number(typing_context, address, index, value):
    """Write one float64."""

    def generate(context, builder, signature, arguments):
        write_elements(builder, arguments[0], arguments[1], repeat(builder, arguments[2], 1))
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.float64), generate
