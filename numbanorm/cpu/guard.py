"""What can be told of a call only from addresses: whether arrays overlap, and whether they are aligned."""

from __future__ import annotations

from .address import number, record
from .jit import scalar

OVERLAP, MISALIGNED = 1, 2
"""What `clash` returns where the output may share memory with an input, and where an address is no multiple of an
element's size. The host then looks closer."""


@scalar
def _meets(start, stop, at, low, high):
    """Tell whether two stretches of memory meet; an address of 0 is that of no array."""
    return at != 0 and start < at + high and at + low < stop


@scalar
def clash(geometry, y, x, residual, mask, weight, bias):
    """Return 0 where all is well with the addresses, else `OVERLAP` or `MISALIGNED`; y may be all of x or residual."""
    g = record(geometry)
    x_at, residual_at, y_at, mask_at = number(x), number(residual), number(y), number(mask)
    weight_at, bias_at = number(weight), number(bias)
    if (
        x_at % g.x_itemsize != 0
        or (y_at | residual_at) % g.y_itemsize != 0
        or (weight_at | bias_at) % g.lane_itemsize != 0
    ):
        return MISALIGNED
    if y_at == 0:
        return 0
    start, stop = y_at + g.y_low, y_at + g.y_high
    parameters = g.samples * g.size * g.lane_itemsize
    same = g.same != 0
    if not (same and x_at == y_at) and _meets(start, stop, x_at, g.x_low, g.x_high):
        return OVERLAP
    if not (same and residual_at == y_at) and _meets(start, stop, residual_at, g.x_low, g.x_high):
        return OVERLAP
    if _meets(start, stop, mask_at, g.mask_low, g.mask_high):
        return OVERLAP
    if _meets(start, stop, weight_at, 0, parameters) or _meets(start, stop, bias_at, 0, parameters):
        return OVERLAP
    return 0
