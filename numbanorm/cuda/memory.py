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
_START = ir.Constant(I64, 0)


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


def _stored(name):
    return _STORED.get(name) or ir.IntType(int(name.lstrip("uint")))


def _bytes(kind):
    return {ir.FloatType(): 4, ir.DoubleType(): 8, ir.HalfType(): 2}.get(kind) or kind.width // 8


def _places(builder, rule, vector, count, arguments):
    """Yield, piece by piece, whether it is there, its offset, its run and its offset in that."""
    p, step, limit, run, stride = arguments
    there = None
    rows = _steps(builder, p, step, run) if rule == "runs" else None
    for _ in range(count):
        if there is None or rule != "whole":
            there = builder.icmp_signed("<", p, limit)
        if rule in ("flat", "whole"):
            row, within = _START, builder.mul(p, ir.Constant(I64, vector))
            offset = within
        elif rule == "runs":
            row, rest = next(rows)
            within = builder.mul(rest, ir.Constant(I64, vector))
            offset = builder.add(builder.mul(row, stride), within)
        else:
            row, within = p, _START
            offset = builder.mul(p, stride)
        yield there, offset, row, within
        p = builder.add(p, step)


def _steps(builder, start, step, length):
    """Yield quotient and rest, by a length, of a number that grows by steps: a division takes 25 instructions."""
    quotient, more = builder.udiv(start, length), builder.udiv(step, length)
    rest = builder.sub(start, builder.mul(quotient, length))
    rest_more = builder.sub(step, builder.mul(more, length))
    while True:
        yield quotient, rest
        rest, over = _less(builder, builder.add(rest, rest_more), length)
        quotient = builder.add(builder.add(quotient, more), builder.zext(over, I64))


def _less(builder, number, length):
    """Return a number below twice a length less that, if it can be, and whether it can."""
    over = builder.icmp_unsigned(">=", number, length)
    return builder.select(over, builder.sub(number, length), number), over


def _channels(builder, rule, vector, count, place, start, inner, size):
    """Yield ``flat // inner % size`` of every piece; see `gatherer`."""
    if rule not in ("flat", "whole"):
        for _, offset, _, _ in _places(builder, rule, vector, count, place):
            yield builder.urem(builder.udiv(builder.add(start, offset), inner), size)
        return
    p, step = (builder.mul(number, ir.Constant(I64, vector)) for number in place[:2])
    before = channel = None
    for quotient, _ in _steps(builder, builder.add(start, p), step, inner):
        if channel is None:
            channel = builder.urem(quotient, size)
            more = builder.urem(builder.udiv(step, inner), size)
        else:
            # One step more than `more` where the rest has run over.
            over = builder.sub(builder.sub(quotient, before), builder.udiv(step, inner))
            channel, _ = _less(builder, builder.add(builder.add(channel, more), over), size)
        before = quotient
        yield channel


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


def _read(builder, address, offset, kind, vector):
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


def _write(builder, address, offset, values):
    kind, vector = values.type.element, values.type.count
    size = _bytes(kind)
    per_word, word_kind = _words(kind, vector)
    for start in range(0, vector, per_word):
        word = part(builder, values, start, per_word)
        if size < 4:
            word = _glue(builder, word, word_kind)
        at = builder.add(offset, ir.Constant(I64, start))
        builder.store(word, _pointer(builder, address, at, word_kind, size), align=size * per_word)


def _where(builder, there, produce):
    """Produce a vector where a condition holds, zeros elsewhere."""
    before = builder.block
    with builder.if_then(there):
        values = produce()
        inside = builder.block
    merged = builder.phi(values.type)
    merged.add_incoming(ir.Constant(values.type, None), before)
    merged.add_incoming(values, inside)
    return merged


def _to_lanes(builder, raw, name, lane):
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


def _from_lanes(builder, values, name):
    """Turn lanes into elements as they are stored, rounded to nearest, ties to even."""
    width = values.type.count
    if name != "bfloat16":
        kind = ir.VectorType(_stored(name), width)
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


_PLACE = (types.int64,) * 5  # p, step, limit, run, stride


@cache
def loader(dtype, lane, vector, count, rule):
    """Return ``load(address, p, step, limit, run, stride)``: the elements as lanes, 0 beyond the limit."""
    lanes = Lanes(lane, vector * count)

    @intrinsic
    def load(typing_context, address, p, step, limit, run, stride):
        def generate(context, builder, signature, arguments):
            parts = []
            for there, offset, _, _ in _places(builder, rule, vector, count, arguments[1:]):
                kind = _stored(dtype)
                raw = _where(builder, there, partial(_read, builder, arguments[0], offset, kind, vector))
                parts.append(_to_lanes(builder, raw, dtype, lane))
            return join(builder, parts)

        return lanes(types.int64, *_PLACE), generate

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
            for there, offset, _, _ in _places(builder, rule, vector, count, arguments[1:]):
                at = _pointer(builder, arguments[0], offset, word, 2)
                parts.append(_where(builder, there, partial(builder.load, at, align=2 * vector)))
            return join(builder, parts)

        return lanes(types.int64, *_PLACE), generate

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
            return _to_lanes(builder, _cut(builder, words, _stored(dtype), vector * count), dtype, lane)

        return result(raw), generate

    return unpacked


@cache
def storer(dtype, lane, vector, count, rule):
    """Return ``store(address, p, step, limit, run, stride, lanes)``."""
    lanes = Lanes(lane, vector * count)

    @intrinsic
    def store(typing_context, address, p, step, limit, run, stride, values):
        def generate(context, builder, signature, arguments):
            places = _places(builder, rule, vector, count, arguments[1:6])
            for i, (there, offset, _, _) in enumerate(places):
                values = _from_lanes(builder, part(builder, arguments[6], i * vector, vector), dtype)
                with builder.if_then(there):
                    _write(builder, arguments[0], offset, values)
            return context.get_dummy_value()

        return types.none(types.int64, *_PLACE, lanes), generate

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
            for there, offset, row, _ in _places(builder, rule, vector, count, arguments[1:]):
                counts = repeat(builder, there, vector)
                if kind != "all":
                    at = offset if kind == "elements" else builder.mul(row, arguments[5])
                    width = vector if kind == "elements" else 1
                    raw = _where(builder, there, partial(_read, builder, arguments[0], at, I8, width))
                    marked = builder.icmp_unsigned("!=", raw, ir.Constant(raw.type, None))
                    counts = join(builder, [marked] * (vector // width))
                parts.append(counts)
            return join(builder, parts)

        return Choice(vector * count)(types.int64, *_PLACE), generate

    return chosen


def _group_weight(builder, lane, vector, name, address, start, inner, size):
    """Read the one weight of a group, for the pieces of which nothing is left to be read."""
    channel = builder.urem(builder.udiv(start, inner), size)
    weight = _to_lanes(builder, _read(builder, address, channel, _stored(name), 1), name, lane)
    return repeat(builder, builder.extract_element(weight, number(0)), vector)


def _weights(builder, kind, lane, vector, name, address, start, offset, within, inner, size, channel):
    """Read the weights of one piece, stored as `name`; see `gatherer`. `channel` is that of a piece."""
    stored = _stored(name)
    if kind == "along":
        return _to_lanes(builder, _read(builder, address, builder.add(start, within), stored, vector), name, lane)
    scalars = []
    for i in range(vector if kind == "element" else 1):
        if kind == "element":
            flat = builder.add(builder.add(start, offset), ir.Constant(I64, i))
            channel = builder.urem(builder.udiv(flat, inner), size)
        scalars.append(_to_lanes(builder, _read(builder, address, channel, stored, 1), name, lane))
    return join(builder, scalars if kind == "element" else scalars * vector)


@cache
def gatherer(kind, lane, vector, count, rule, stored=""):
    """Return ``gather(address, start, p, step, limit, run, stride, inner, size)``: weights, as lanes.

    They are stored in the dtype of the lanes if no other is named. The pieces' flat indices in the order of the packed
    array are ``start`` plus their offsets by the rule. `kind` is ``"along"``: the weights are neighbours as the
    elements are, the first one at ``start``, the same in every run; ``"group"``: one weight for all, at
    ``start // inner % size``; ``"piece"``: one a piece, at ``flat // inner % size``; ``"element"``: each its own,
    likewise.
    """
    lanes = Lanes(lane, vector * count)
    name = stored or lane.name

    @intrinsic
    def gather(typing_context, address, start, p, step, limit, run, stride, inner, size):
        def generate(context, builder, signature, arguments):
            address, start, *place, inner, size = arguments
            if kind == "group":
                return _group_weight(builder, lane, vector * count, name, address, start, inner, size)
            parts = []
            channels = _channels(builder, rule, vector, count, place, start, inner, size) if kind == "piece" else None
            for there, offset, _, within in _places(builder, rule, vector, count, place):
                where = address, start, offset, within, inner, size, channels and next(channels)
                reading = partial(_weights, builder, kind, lane, vector, name, *where)
                parts.append(_where(builder, there, reading))
            return join(builder, parts)

        return lanes(types.int64, types.int64, *_PLACE, types.int64, types.int64), generate

    return gather


@cache
def affine_storer(dtype, lane, vector, count, rule, weight, bias, stored=""):
    """Return ``store(address, p, ..., stride, lanes, weight, bias, start, packed, inner, size)``.

    Each piece is multiplied by its weights and added to its biases, of the kinds that `gatherer` knows ("" where there
    are none), and written, before the weights of the next are read: held all at once they would take as many registers
    as the elements do. `packed` is the stride of runs in the packed array, in which weights are looked up. The kind
    ``"same"`` is ``"along"`` from the first weight on in every group.
    """
    lanes = Lanes(lane, vector * count)
    name = stored or lane.name

    @intrinsic
    def store(typing_context, address, p, step, limit, run, stride, values, w, b, start, packed, inner, size):
        def generate(context, builder, signature, arguments):
            address, *place, values, w, b, start, packed, inner, size = arguments
            targets = _places(builder, rule, vector, count, place)
            flats = _places(builder, rule, vector, count, [*place[:4], packed])
            along = builder.urem(start, size) if "along" in (weight, bias) else _START
            shared = {
                k: _group_weight(builder, lane, vector, name, source, start, inner, size)
                for k, kind, source in (("w", weight, w), ("b", bias, b))
                if kind == "group"
            }
            channels = None
            if "piece" in (weight, bias):
                channels = _channels(builder, rule, vector, count, [*place[:4], packed], start, inner, size)
            for i, ((there, offset, _, _), (_, flat, _, within)) in enumerate(zip(targets, flats, strict=True)):
                channel = channels and next(channels)
                with builder.if_then(there):
                    piece = part(builder, values, i * vector, vector)
                    for which, kind, source, combine in (
                        ("w", weight, w, builder.fmul),
                        ("b", bias, b, builder.fadd),
                    ):
                        if not kind:
                            continue
                        rows = kind in ("along", "same")
                        where = source, along if rows else start, flat, within, inner, size, channel
                        operand = shared.get(which) or _weights(
                            builder, "along" if rows else kind, lane, vector, name, *where
                        )
                        piece = combine(piece, operand)
                    _write(builder, address, offset, _from_lanes(builder, piece, dtype))
            return context.get_dummy_value()

        return types.none(types.int64, *_PLACE, lanes, *[types.int64] * 6), generate

    return store


@cache
def rounder(dtype, lane, width):
    """Return the function that rounds lanes as storing them would."""
    lanes = Lanes(lane, width)

    @intrinsic
    def rounded(typing_context, values):
        def generate(context, builder, signature, arguments):
            return _to_lanes(builder, _from_lanes(builder, arguments[0], dtype), dtype, lane)

        return lanes(lanes), generate

    return rounded


def _told(instructions):
    """Return a function without arguments that is a few instructions, which memory accesses do not pass."""

    @intrinsic
    def tell(typing_context):
        def generate(context, builder, signature, arguments):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(ir.InlineAsm(kind, instructions, "~{memory}", side_effect=True), [])
            return context.get_dummy_value()

        return types.none(), generate

    return tell


show_to_cluster = _told("fence.acq_rel.cluster;")
"""Let what this thread has written be seen by the blocks of its cluster, once they have waited for each other."""

wait_for_cluster = _told("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;")
"""Wait until all threads of the cluster have come so far. To arrive shows nothing of what was written: that would let
every thread wait until all that it wrote, results too, is in L2."""


@intrinsic
def read_number(typing_context, address, index):
    """Read one float64."""

    def generate(context, builder, signature, arguments):
        raw = _read(builder, *arguments, ir.DoubleType(), 1)
        return builder.extract_element(raw, number(0))

    return types.float64(types.int64, types.int64), generate


@intrinsic
def write_number(typing_context, address, index, value):
    """Write one float64."""

    def generate(context, builder, signature, arguments):
        _write(builder, arguments[0], arguments[1], repeat(builder, arguments[2], 1))
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.float64), generate
