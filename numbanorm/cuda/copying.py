"""Copies between any two strided arrays, with a change of dtype or a sum on the way; constants written to memory.

This is the slow path: what the kernels cannot read or write in place costs one launch of these more, an element a
thread.
"""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ..core.dtypes import WIDE
from ..core.spec import ArraySpec
from .arrays import DeviceArray
from .lanes import I64, narrowed, tile
from .launch import item_size
from .memory import Span, loader, storer
from .toolchain import Kernel, cuda, intrinsic, ir, types

THREADS = 256
AXES = 4
"""Axes, after neighbours have been joined, that one launch walks; more are walked by the host."""


class Copy(NamedTuple):
    """A copy from ``source``, to which ``added`` is added where there is one, to ``target``.

    Attributes
    ----------
    names : tuple of str
        The dtypes of target, source and added; "" where nothing is added.
    numbers : tuple of int
        How many elements one launch copies, the lengths of all axes but the first, and the strides of target, source
        and added, in elements.
    walk : tuple of (int, int, int)
        Where each launch begins, in bytes from the first elements.
    """

    names: tuple[str, str, str]
    numbers: tuple[int, ...]
    walk: tuple[tuple[int, int, int], ...]

    def run(self, target: int, source: int, added: int, stream: int) -> None:
        """Queue it, between these addresses of first elements."""
        for t, s, a in self.walk:
            blocks = -(-self.numbers[0] // THREADS)
            _kernel(*self.names)(blocks, stream, target + t, source + s, added + a, *self.numbers)


@lru_cache(maxsize=4096)
def copying(target: ArraySpec, source: ArraySpec, added: ArraySpec | None = None) -> Copy:
    """Plan a copy between arrays of one shape."""
    shape = target.shape
    names = target.name, source.name, "" if added is None else added.name
    if 0 in shape:
        return Copy(names, (), ())
    arrays = (target, source) if added is None else (target, source, added)
    # An axis that continues the one before it, in all arrays, is joined to it.
    axes: list[tuple[int, list[int]]] = []
    for axis, length in enumerate(shape):
        steps = [array.strides[axis] for array in arrays] + [0] * (3 - len(arrays))
        if length == 1:
            continue
        if axes and all(before == step * length for before, step in zip(axes[-1][1], steps, strict=True)):
            axes[-1] = axes[-1][0] * length, steps
        else:
            axes.append((length, steps))
    axes = [(1, [0, 0, 0])] * (AXES - len(axes)) + axes
    walked, axes = axes[:-AXES], axes[-AXES:]
    walk = [
        tuple(sum(i * steps[k] for i, (_, steps) in zip(index, walked, strict=True)) for k in range(3))
        for index in product(*(range(length) for length, _ in walked))
    ]
    sizes = [array.dtype.itemsize for array in arrays] + [1] * (3 - len(arrays))
    strides = [steps[k] // sizes[k] for k in range(3) for _, steps in axes]
    lengths = [length for length, _ in axes]
    return Copy(names, (prod(lengths), *lengths[1:], *strides), tuple(walk))


def copy(target: DeviceArray, source: DeviceArray, stream: int, added: DeviceArray | None = None) -> None:
    """Queue a copy between arrays of one shape."""
    planned = copying(target.spec, source.spec, None if added is None else added.spec)
    planned.run(target.address, source.address, 0 if added is None else added.address, stream)


def fill(target: Span, value: float, stream: int) -> None:
    """Queue the writing of one value to all elements."""
    if target.size:
        _filler(target.dtype.name)(-(-target.size // THREADS), stream, target.address, target.size, float(value))


@cache
def mover(size: int) -> Any:
    """Return ``move(target, at, source, index)``, which copies one element of so many bytes as it is."""

    @intrinsic
    def move(typing_context, target, at, source, index):
        def generate(context, builder, signature, arguments):
            pointers = []
            for address, offset in (arguments[:2], arguments[2:]):
                where = builder.add(address, builder.mul(offset, ir.Constant(I64, size)))
                pointers.append(builder.inttoptr(where, ir.IntType(8 * size).as_pointer(1)))
            builder.store(builder.load(pointers[1], align=size), pointers[0], align=size)
            return context.get_dummy_value()

        return types.none(types.int64, types.int64, types.int64, types.int64), generate

    return move


@cache
def _kernel(target: str, source: str, added: str) -> Kernel:
    lane = types.float64 if {target, source, added} & WIDE else types.float32
    raw, plus = target == source and not added, bool(added)
    move = mover(item_size(target))
    # An integer or a truth value is only moved, or read: results are floats.
    load = loader(source, lane, 1, 1, "flat")
    narrow = lane is types.float64 and target == "bfloat16"  # which is rounded from float32 alone
    store = storer("float32" if raw else target, types.float32 if narrow else lane, 1, 1, "flat")
    load_added = loader(added or source, lane, 1, 1, "flat")
    ints = np.int64

    def copy(to, x, y, count, n1, n2, n3, to_0, to_1, to_2, to_3, x_0, x_1, x_2, x_3, y_0, y_1, y_2, y_3):
        i = ints(cuda.blockIdx.x) * THREADS + ints(cuda.threadIdx.x)
        if i < count:
            i3 = i % n3
            i //= n3
            i2 = i % n2
            i //= n2
            i1 = i % n1
            i //= n1
            t = i * to_0 + i1 * to_1 + i2 * to_2 + i3 * to_3
            s = i * x_0 + i1 * x_1 + i2 * x_2 + i3 * x_3
            if raw:
                move(to, t, x, s)
            else:
                value = load(x, s, ints(1), s + 1, ints(1), ints(1))
                if plus:
                    a = i * y_0 + i1 * y_1 + i2 * y_2 + i3 * y_3
                    value = value + load_added(y, a, ints(1), a + 1, ints(1), ints(1))
                if narrow:
                    store(to, t, ints(1), t + 1, ints(1), ints(1), narrowed(value))
                else:
                    store(to, t, ints(1), t + 1, ints(1), ints(1), value)

    return Kernel(copy, (target, source, added), THREADS)


@cache
def _filler(name: str) -> Kernel:
    lane = types.float64 if name in WIDE else types.float32
    scalar = np.float64 if name in WIDE else np.float32
    store, as_lane = storer(name, lane, 1, 1, "flat"), tile(1)
    ints = np.int64

    def fill(to, count, value):
        i = ints(cuda.blockIdx.x) * THREADS + ints(cuda.threadIdx.x)
        store(to, i, ints(1), count, ints(1), ints(1), as_lane(scalar(value)))

    return Kernel(fill, (name,), THREADS)
