"""Weights and biases: which of them the elements of a tile have, and how results are written with them."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

from .lanes import I64, Lanes, join, number, part, repeat
from .memory import (
    PLACE,
    START,
    divided,
    from_lanes,
    less,
    places,
    read_elements,
    stored_type,
    to_lanes,
    where_there,
    write_elements,
)
from .toolchain import intrinsic, ir, types


def _channels(builder, rule, vector, count, place, start, inner, size):
    """Yield ``flat // inner % size`` of every piece; see `gatherer`."""
    if rule not in ("flat", "whole"):
        for _, offset, _, _ in places(builder, rule, vector, count, place):
            yield builder.urem(builder.udiv(builder.add(start, offset), inner), size)
        return
    p, step = (builder.mul(number, ir.Constant(I64, vector)) for number in place[:2])
    before = channel = None
    for quotient, _ in divided(builder, builder.add(start, p), step, inner):
        if channel is None:
            channel = builder.urem(quotient, size)
            more = builder.urem(builder.udiv(step, inner), size)
        else:
            # One step more than `more` where the rest has run over.
            over = builder.sub(builder.sub(quotient, before), builder.udiv(step, inner))
            channel, _ = less(builder, builder.add(builder.add(channel, more), over), size)
        before = quotient
        yield channel


def _group_weight(builder, lane, vector, name, address, start, inner, size):
    """Read the one weight of a group, for the pieces of which nothing is left to be read."""
    channel = builder.urem(builder.udiv(start, inner), size)
    weight = to_lanes(builder, read_elements(builder, address, channel, stored_type(name), 1), name, lane)
    return repeat(builder, builder.extract_element(weight, number(0)), vector)


class _Piece(NamedTuple):
    """Where the weights of one piece are: see `gatherer`; `channel` is that of a piece."""

    address: Any
    start: Any
    offset: Any
    within: Any
    inner: Any
    size: Any
    channel: Any = None


def _weights(builder, kind, lane, vector, name, piece):
    """Read the weights of one piece, stored as `name`."""
    address, start, offset, within, inner, size, channel = piece
    stored = stored_type(name)
    if kind == "along":
        return to_lanes(
            builder, read_elements(builder, address, builder.add(start, within), stored, vector), name, lane
        )
    scalars = []
    for i in range(vector if kind == "element" else 1):
        if kind == "element":
            flat = builder.add(builder.add(start, offset), ir.Constant(I64, i))
            channel = builder.urem(builder.udiv(flat, inner), size)
        scalars.append(to_lanes(builder, read_elements(builder, address, channel, stored, 1), name, lane))
    return join(builder, scalars if kind == "element" else scalars * vector)


@cache
def gatherer(kind, lane, vector, count, rule, stored=""):
    """Return ``gather(address, start, p, step, limit, run, stride, inner, size)``: weights, as lanes.

    They are stored in the dtype of the lanes if no other is named. The pieces' flat indices in the order of the packed
    array are ``start`` plus their offsets by the rule. `kind` is ``"along"``: the weights are neighbours as the
    elements are, the first one at ``start``, the same in every run; ``"shared"``: one weight for all, at
    ``start // inner % size``; ``"piece"``: one a piece, at ``flat // inner % size``; ``"element"``: each its own,
    likewise.
    """
    lanes = Lanes(lane, vector * count)
    name = stored or lane.name

    @intrinsic
    def gather(typing_context, address, start, p, step, limit, run, stride, inner, size):
        def generate(context, builder, signature, arguments):
            address, start, *place, inner, size = arguments
            if kind == "shared":
                return _group_weight(builder, lane, vector * count, name, address, start, inner, size)
            parts = []
            channels = _channels(builder, rule, vector, count, place, start, inner, size) if kind == "piece" else None
            for there, offset, _, within in places(builder, rule, vector, count, place):
                piece = _Piece(address, start, offset, within, inner, size, channels and next(channels))
                reading = partial(_weights, builder, kind, lane, vector, name, piece)
                parts.append(where_there(builder, there, reading))
            return join(builder, parts)

        return lanes(types.int64, types.int64, *PLACE, types.int64, types.int64), generate

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
            targets = places(builder, rule, vector, count, place)
            flats = places(builder, rule, vector, count, [*place[:4], packed])
            along = builder.urem(start, size) if "along" in (weight, bias) else START
            shared = {
                k: _group_weight(builder, lane, vector, name, source, start, inner, size)
                for k, kind, source in (("w", weight, w), ("b", bias, b))
                if kind == "shared"
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
                        place = _Piece(source, along if rows else start, flat, within, inner, size, channel)
                        operand = shared.get(which) or _weights(
                            builder, "along" if rows else kind, lane, vector, name, place
                        )
                        piece = combine(piece, operand)
                    write_elements(builder, address, offset, from_lanes(builder, piece, dtype))
            return context.get_dummy_value()

        return types.none(types.int64, *PLACE, lanes, *[types.int64] * 6), generate

    return store
