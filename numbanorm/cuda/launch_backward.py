"""Launch choices of the backward kernels; see `launch`."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ..core.plan import Plan
from .launch import (
    CLUSTER,
    LADDER,
    MIN_CHUNK,
    NARROW_BLOCK,
    SPLIT_BELOW,
    SPLIT_BLOCKS,
    STREAM,
    Call,
    Columns,
    ColumnsLaunch,
    Rung,
    block_of,
    columns,
    is_wide,
    item_size,
    power_of_two,
    steps,
    vector_of,
)

FUSED = (
    Rung(32, 4, 8),
    Rung(64, 8, 8),
    Rung(128, 16, 8),
    Rung(256, 32, 8),
    Rung(512, 64, 8),
    Rung(1024, 128, 8),
    Rung(2048, 256, 8),
    Rung(4096, 256, 16),
    Rung(8192, 512, 16),
)
"""Rows whose x, dy, dweight and dbias registers hold, four numbers an element; float64: half as many elements.

Beyond 8192 a thread would need 32 elements, 128 registers for them alone, or 1024 threads with 64 registers each: such
rows are read twice.
"""

FUSED_HALVES = (
    Rung(32, 4, 8),
    Rung(64, 4, 16),
    Rung(128, 8, 16),
    Rung(256, 16, 16),
    Rung(512, 32, 16),
    Rung(1024, 64, 16),
    Rung(2048, 128, 16),
    Rung(4096, 256, 16),
    Rung(8192, 512, 16),
)
"""The same for elements of 16 bits, for the reason of `launch.HALVES`."""

CLUSTERED = FUSED_HALVES[5:-1]
"""The part of a row that a block of a cluster takes, up to 4096 elements.

Twice as many, in blocks of 512 threads that have no registers to read ahead, are no gain: rows of 65,536 float32 took
498 us both ways, of bfloat16 407 instead of 325.
"""

FUSED_BLOCK = 256
"""Threads of a block of several teams: two blocks on each of some 130 multiprocessors keep 16 warps busy on it."""

SLABS = 264
"""Blocks of FUSED_BLOCK threads, if there are rows enough: two for each of some 130 multiprocessors."""

SLAB_ROWS = 64
"""Rows whose products a thread adds in float32: 64 equal terms are off by 6e-7, 500 by 4e-6."""

SUM_CHUNK = 1 << 19
"""Elements a chunk of sums has at most: 64 tiles of 512 threads with 16 elements, for the same reason."""

SUM_EACH = 16
"""Elements a thread has under way of x, and as many of dy."""

ALIGNMENT = 256
"""Bytes to which the parts of the workspace are aligned."""


class Backward(NamedTuple):
    """What a backward kernel of rows is compiled for."""

    source: str  # dtype of x
    result: str  # dtype of dy and dx
    wide: bool
    vector: int
    loads: int  # a tile
    team: int
    block: int
    rule: str = "flat"
    mask: str = "all"
    weights: str = ""  # of `memory.gatherer`, where the kernel multiplies dy by them
    weight: bool = False
    centred: bool = True
    fixed: bool = False
    cluster: int = 1  # blocks that share a row


class Part(NamedTuple):
    """One kernel, its blocks and the numbers that follow the addresses among its arguments."""

    choice: Backward
    blocks: int
    numbers: tuple[int, ...]


class Merge(NamedTuple):
    """A merge of partial sums."""

    team: int
    block: int
    blocks: int
    options: tuple[bool, ...]
    numbers: tuple[int, ...]


class BackwardPlan(NamedTuple):
    """All launches of one call of backward."""

    starts: tuple[int, int, int]  # bytes from the spans' addresses to their first elements: x, dy, mask
    parts: dict[str, Part]
    groups: Merge | None
    weights: Merge | None
    table: int  # bytes of partial sums; those of the groups' means follow, then the slabs
    slabs: int
    workspace: int  # bytes


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _merge(units: int, entries: int, options: tuple[bool, ...], numbers: tuple[int, ...]) -> Merge:
    """Choose the threads of a merge: up to a block for each unit, a few entries for each thread."""
    team = min(512, power_of_two(-(-entries // 4)))
    block = block_of(team)
    return Merge(team, block, -(-units * team // block), options, numbers)


@lru_cache(maxsize=4096)
def rows_backward(plan: Plan, call: Call, clusters: bool = False) -> BackwardPlan:
    """Choose the launches of backward in rows; `clusters` tells whether the device has any."""
    layout = plan.layout
    k0, r0, k1, r1 = layout.view
    inner, size, groups = layout.inner, layout.size, layout.groups
    x, dy = plan.x or plan.packed, plan.y or plan.packed
    mask = plan.mask or plan.packed
    wide = is_wide(call.source)
    lane = 8 if wide else 4
    sizes = (item_size(call.source), item_size(call.result), 1, lane, lane, item_size(call.result), 1)
    along = inner == 1
    segment = r1 if along or size == 1 or inner >= r1 else inner
    segments = r1 // segment
    mask_kind = "all" if not call.mask else "elements" if mask.strides[3] == 1 else "runs"
    multiples = (segment, *steps(x, plan), *steps(dy, plan))
    if mask_kind == "elements":
        multiples += steps(mask, plan)
    if segments > 1:
        multiples += (r1,)
    vector = vector_of(sizes, call.low, multiples)
    part = 2 if wide else 1
    starts = (x.start * sizes[0], dy.start * sizes[1], mask.start)
    fields = (call.source, call.result, wide, vector)
    common = {
        "mask": mask_kind,
        "weight": call.weight,
        "centred": layout.centred,
        "fixed": call.fixed,
    }
    numbers: tuple[int, ...]
    rung = next((r for r in (FUSED_HALVES if max(sizes[:2]) == 2 else FUSED) if r1 * part <= r.elements), None)
    if rung is not None and rung.team == 512 and call.mask:
        rung = None  # a mask beside all that would not fit in registers
    cluster = 1
    if rung is None and clusters:
        cluster = CLUSTER
        rung = next((r for r in CLUSTERED if -(-r1 // (cluster * vector)) * vector * part <= r.elements), None)
    if rung is not None and ((vector == 1 and rung.each > 8) or (wide and rung.team > 256)):
        rung = None  # with all their addresses, or in a block of 512 threads, they would not fit in registers
    if along and r0 == 1 and k1 == 1 and rung is not None:
        count = max(1, rung.each // part // vector)
        block = block_of(rung.team, FUSED_BLOCK)
        teams = block // rung.team
        slab_rows = min(SLAB_ROWS, -(-k0 * block * cluster // (teams * SLABS * FUSED_BLOCK)))
        made = -(-k0 // (teams * slab_rows))
        rule = "whole" if r1 == cluster * rung.team * count * vector else "flat"
        choice = Backward(*fields, count, rung.team, block, rule=rule, cluster=cluster, **common)
        part_pieces = -(-r1 // (vector * cluster))
        numbers = (k0, slab_rows, r1 // vector, part_pieces, size, dy.strides[0], x.strides[0], mask.strides[0])
        behind = _rounded(48 * cluster * made) if cluster > 1 else 0
        fused = {"fused": Part(choice, made * cluster, numbers)}
        return BackwardPlan(starts, fused, None, None, 0, behind, behind + made * 2 * size * lane)

    strides = (*x.strides[:3], *dy.strides[:3], *mask.strides[:3])
    together = k1 == 1 and x.strides[1] == dy.strides[1] == r1 and (mask_kind != "elements" or mask.strides[1] == r1)
    flat = r0 == 1 or (together and segments == 1 and mask_kind != "runs" and not along)

    def part_of(elements: int, units: int) -> tuple[Backward, int, int, int]:
        """Return the choice for units of so many elements, and their pieces, chunks and pieces a chunk."""
        found = next((r for r in LADDER if elements * part <= r.elements), STREAM)
        count = max(1, min(found.each, SUM_EACH) // part // vector)
        tile = found.team * count
        pieces = elements // vector
        chunk = SUM_CHUNK
        if units < SPLIT_BELOW:
            chunk = min(max(MIN_CHUNK, -(-plan.size // SPLIT_BLOCKS)), SUM_CHUNK)
        chunk_pieces = -(-min(chunk, elements) // (tile * vector)) * tile
        choice = Backward(*fields, count, found.team, block_of(found.team), rule="flat" if flat else "runs", **common)
        return choice, pieces, -(-pieces // chunk_pieces), chunk_pieces

    parts = {}
    head: tuple[int, ...]
    choice, pieces, chunks, chunk_pieces = part_of(r0 * segment, groups * segments)
    units = groups * segments * chunks
    weighted_here = along and call.weight
    choice = choice._replace(weights="along" if weighted_here else "")
    head = (units, chunks, chunk_pieces, pieces, segment // vector, k1, r0 * k1 * r1, r1, segments, segment)
    parts["sums"] = Part(choice, -(-units * choice.team // choice.block), (*head, *strides, inner, size))
    entries = segments * chunks
    merge_groups = _merge(
        groups, entries, (call.weight and not along, layout.centred, call.mask),
        (groups, k1, k1 * entries, entries, segments, chunks, chunks, 1, units, r1, segment, 0, inner, size,
         layout.count),
    )  # fmt: skip
    table = _rounded(24 * units)
    behind = table + _rounded(16 * groups)
    if along:
        lanes, rows = k1 * r1, k0 * r0
        tiles = -(-lanes // (vector * NARROW_BLOCK))
        slab_rows = max(1, min(SLAB_ROWS, -(-rows * tiles // SPLIT_BLOCKS)))
        slabs = -(-rows // slab_rows)
        choice = choice._replace(loads=1, team=1, block=NARROW_BLOCK, rule="flat")
        numbers = (tiles, slab_rows, rows, r0, k1, r1, groups, *strides, size)
        parts["lanes"] = Part(choice, tiles * slabs, numbers)
        return BackwardPlan(starts, parts, merge_groups, None, table, behind, behind + slabs * 2 * size * lane)
    repeats = groups * segments // size
    merge_weights = _merge(size, repeats * chunks, (), (size, chunks, 1, repeats, chunks, 0, size * chunks, units))
    choice, pieces, chunks, chunk_pieces = part_of(r0 * r1, groups)
    one = inner % r1 == 0 and (r0 == 1 or k1 * r1 % (inner * size) == 0)
    choice = choice._replace(weights=("group" if one else "piece") if call.weight else "")
    units = groups * chunks
    head = (units, chunks, chunk_pieces, pieces, r1 // vector, k1, r0 * k1 * r1, r1, groups)
    parts["emit"] = Part(choice, -(-units * choice.team // choice.block), (*head, *strides, inner, size))
    return BackwardPlan(starts, parts, merge_groups, merge_weights, table, behind, behind)


class ColumnsBackward(NamedTuple):
    """All launches of one call of backward in columns."""

    sums: ColumnsLaunch
    emit: ColumnsLaunch
    rows: Part | None  # the sums of rows, where weights lie along them
    groups: Merge
    weights: Merge
    table: int
    means: int
    workspace: int


@lru_cache(maxsize=4096)
def columns_backward(plan: Plan, call: Call) -> ColumnsBackward:
    """Choose the launches of backward in columns."""
    layout = plan.layout
    k0, rows, k1, r1 = layout.view
    inner, size, groups = layout.inner, layout.size, layout.groups
    lanes = k1 * r1
    sums = columns(plan, call, "sums")
    emit = columns(plan, call, "emit")
    choice: Columns = sums.choice
    by_row = choice.weights == "piece"
    chunks = sums.chunks
    merge_groups = _merge(
        groups, chunks * r1, (call.weight and not by_row, layout.centred, call.mask),
        (groups, k1, chunks * lanes, r1, chunks, r1, lanes, 1, sums.entries, r1, 0, 1, inner, size, layout.count),
    )  # fmt: skip
    table, means = _rounded(24 * sums.entries), _rounded(16 * groups)
    numbers: tuple[int, ...]
    if not by_row:
        numbers = (size, inner, k0 * chunks, lanes // (inner * size), inner, lanes, inner * size, sums.entries)
        merge_weights = _merge(size, k0 * chunks * lanes // size, (), numbers)
        return ColumnsBackward(sums, emit, None, merge_groups, merge_weights, table, means, table + means)
    per = inner // lanes
    found = next((r for r in LADDER if lanes <= r.elements), STREAM)
    team, block = found.team, block_of(found.team)
    count = max(1, 8 // choice.vector)
    row_choice = Backward(
        call.source, call.result, choice.wide, choice.vector, count, team, block, centred=layout.centred
    )
    x, dy = plan.x or plan.packed, plan.y or plan.packed
    all_rows = k0 * rows
    numbers = (all_rows, rows, lanes // choice.vector, k1, r1, x.strides[0], x.strides[1], dy.strides[0], dy.strides[1])
    row_part = Part(row_choice, -(-all_rows * team // block), numbers)
    repeats = all_rows // (per * size)
    merge_weights = _merge(size, repeats * per, (), (size, per, 1, repeats, per, 0, per * size, all_rows))
    total = table + means + 16 * all_rows
    return ColumnsBackward(sums, emit, row_part, merge_groups, merge_weights, table, means, total)
