"""Launch choices of the backward kernels; see `launch`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from ..core.norms import STD
from ..core.plan import Placement, Plan
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
    weights: str = ""  # of `affine.gatherer`, where the kernel multiplies dy by them
    weight: bool = False
    centred: bool = True
    fixed: bool = False
    cluster: int = 1  # blocks that share a row
    scale: str = STD  # of `numbanorm.core.norms.SCALES`, where sums are taken


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
    options: tuple[bool | str, ...]
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
    wide: bool


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _merge(units: int, entries: int, options: tuple[bool | str, ...], numbers: tuple[int, ...]) -> Merge:
    """Choose the threads of a merge: up to a block for each unit, a few entries for each thread."""
    team = min(512, power_of_two(-(-entries // 4)))
    block = block_of(team)
    return Merge(team, block, -(-units * team // block), options, numbers)


class _Reading(NamedTuple):
    """How the kernels of rows read a call's arrays; `Backward` fields but for tile and team."""

    x: Placement
    dy: Placement
    mask: Placement
    along: bool  # weights lie along the rows
    segment: int  # elements of a run that have one weight, or that all have weights of their own
    part: int  # of the ladders' numbers of elements that a thread's registers hold
    halves: bool  # elements of 16 bits
    fields: tuple[str, str, bool, int]  # source, result, wide, vector
    common: dict[str, Any]

    @property
    def strides(self) -> tuple[int, ...]:
        return *self.x.strides[:3], *self.dy.strides[:3], *self.mask.strides[:3]


def _read(plan: Plan, call: Call) -> _Reading:
    layout = plan.layout
    r1, inner = layout.view[3], layout.inner
    x, dy, mask = plan.x or plan.packed, plan.y or plan.packed, plan.mask or plan.packed
    wide = is_wide(call.source)
    lane = 8 if wide else 4
    sizes = (item_size(call.source), item_size(call.result), 1, lane, lane, item_size(call.result), 1)
    segment = r1 if inner == 1 or layout.size == 1 or inner >= r1 else inner
    mask_kind = "all" if not call.mask else "elements" if mask.strides[3] == 1 else "runs"
    multiples = (segment, *steps(x, plan), *steps(dy, plan))
    if mask_kind == "elements":
        multiples += steps(mask, plan)
    if segment < r1:
        multiples += (r1,)
    vector = vector_of(sizes, call.low, multiples)
    common = {
        "mask": mask_kind,
        "weight": call.weight,
        "centred": layout.centred,
        "fixed": call.fixed,
        "scale": layout.record.scale,
    }
    fields = (call.source, call.result, wide, vector)
    return _Reading(x, dy, mask, inner == 1, segment, 2 if wide else 1, max(sizes[:2]) == 2, fields, common)


@lru_cache(maxsize=4096)
def rows_backward(plan: Plan, call: Call, clusters: bool = False, fused: bool = True) -> BackwardPlan:
    """Choose the launches of backward in rows.

    `clusters` tells whether the device has any, `fused` whether one kernel may do all: not where groups lie in parts.
    """
    _, r0, k1, _ = plan.layout.view
    reading = _read(plan, call)
    found = None
    if fused and reading.along and r0 == k1 == 1:
        found = _fused(plan, call, reading, clusters)
    return found or _by_sums(plan, call, reading)


def _starts(plan: Plan, call: Call, reading: _Reading) -> tuple[int, int, int]:
    x, dy = reading.x.start * item_size(call.source), reading.dy.start * item_size(call.result)
    return x, dy, reading.mask.start


def _fused(plan: Plan, call: Call, reading: _Reading, clusters: bool) -> BackwardPlan | None:
    """Choose the one launch for rows that registers hold; None where they do not."""
    k0, _, _, r1 = plan.layout.view
    size = plan.layout.size
    _, _, wide, vector = reading.fields
    ladder, part = FUSED_HALVES if reading.halves else FUSED, reading.part
    rung = next((r for r in ladder if r1 * part <= r.elements), None)
    if rung is not None and rung.team == 512 and call.mask:
        rung = None  # a mask beside all that would not fit in registers
    cluster = 1
    if rung is None and clusters:
        cluster = CLUSTER
        rung = next((r for r in CLUSTERED if -(-r1 // (cluster * vector)) * vector * part <= r.elements), None)
    if rung is None or (vector == 1 and rung.each > 8) or (wide and rung.team > 256):
        return None  # with all their addresses, or in a block of 512 threads, they would not fit in registers
    count = max(1, rung.each // part // vector)
    block = block_of(rung.team, FUSED_BLOCK)
    teams = block // rung.team
    slab_rows = min(SLAB_ROWS, -(-k0 * block * cluster // (teams * SLABS * FUSED_BLOCK)))
    made = -(-k0 // (teams * slab_rows))
    rule = "whole" if r1 == cluster * rung.team * count * vector else "flat"
    choice = Backward(*reading.fields, count, rung.team, block, rule=rule, cluster=cluster, **reading.common)
    part_pieces = -(-r1 // (vector * cluster))
    steps_of_rows = reading.dy.strides[0], reading.x.strides[0], reading.mask.strides[0]
    numbers = (k0, slab_rows, r1 // vector, part_pieces, size, *steps_of_rows)
    behind = _rounded(48 * cluster * made) if cluster > 1 else 0
    parts = {"fused": Part(choice, made * cluster, numbers)}
    workspace = behind + made * 2 * size * (8 if wide else 4)
    return BackwardPlan(_starts(plan, call, reading), parts, None, None, 0, behind, workspace, wide)


def _unit(plan: Plan, call: Call, reading: _Reading, elements: int, units: int) -> tuple[Backward, int, int, int]:
    """Return the choice for units of so many elements, and their pieces, chunks and pieces a chunk."""
    x, dy, mask = reading.x, reading.dy, reading.mask
    _, r0, k1, r1 = plan.layout.view
    masks = reading.common["mask"]
    together = k1 == 1 and x.strides[1] == dy.strides[1] == r1 and (masks != "elements" or mask.strides[1] == r1)
    flat = r0 == 1 or (together and reading.segment == r1 and masks != "runs" and not reading.along)
    vector, part = reading.fields[3], reading.part
    found = next((r for r in LADDER if elements * part <= r.elements), STREAM)
    count = max(1, min(found.each, SUM_EACH) // part // vector)
    tile = found.team * count
    pieces = elements // vector
    chunk = SUM_CHUNK
    if units < SPLIT_BELOW:
        chunk = min(max(MIN_CHUNK, -(-plan.size // SPLIT_BLOCKS)), SUM_CHUNK)
    chunk_pieces = -(-min(chunk, elements) // (tile * vector)) * tile
    own = {"rule": "flat" if flat else "runs", **reading.common}
    choice = Backward(*reading.fields, count, found.team, block_of(found.team), **own)
    return choice, pieces, -(-pieces // chunk_pieces), chunk_pieces


def _by_sums(plan: Plan, call: Call, reading: _Reading) -> BackwardPlan:
    """Choose the launches that take sums first, then write dx."""
    layout = plan.layout
    k0, r0, k1, r1 = layout.view
    inner, size, groups = layout.inner, layout.size, layout.groups
    along, segment, (*_, wide, vector) = reading.along, reading.segment, reading.fields
    segments = r1 // segment
    starts = _starts(plan, call, reading)
    parts: dict[str, Part] = {}
    head: tuple[int, ...]
    choice, pieces, chunks, chunk_pieces = _unit(plan, call, reading, r0 * segment, groups * segments)
    units = groups * segments * chunks
    choice = choice._replace(weights="along" if along and call.weight else "")
    head = (units, chunks, chunk_pieces, pieces, segment // vector, k1, r0 * k1 * r1, r1, segments, segment)
    parts["sums"] = Part(choice, -(-units * choice.team // choice.block), (*head, *reading.strides, inner, size))
    entries = segments * chunks
    merge_groups = _merge(
        groups, entries, (call.weight and not along, call.mask, layout.record.scale),
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
        choice = choice._replace(loads=1, team=1, block=NARROW_BLOCK, rule="flat", scale=STD)
        head = (tiles, slab_rows, rows, r0, k1, r1, groups)
        parts["lanes"] = Part(choice, tiles * slabs, (*head, *reading.strides, size))
        workspace = behind + slabs * 2 * size * (8 if wide else 4)
        return BackwardPlan(starts, parts, merge_groups, None, table, behind, workspace, wide)
    repeats = groups * segments // size
    merge_weights = _merge(size, repeats * chunks, (), (size, chunks, 1, repeats, chunks, 0, size * chunks, units))
    choice, pieces, chunks, chunk_pieces = _unit(plan, call, reading, r0 * r1, groups)
    one = inner % r1 == 0 and (r0 == 1 or k1 * r1 % (inner * size) == 0)
    choice = choice._replace(weights=("shared" if one else "piece") if call.weight else "", scale=STD)
    units = groups * chunks
    head = (units, chunks, chunk_pieces, pieces, r1 // vector, k1, r0 * k1 * r1, r1, groups)
    parts["emit"] = Part(choice, -(-units * choice.team // choice.block), (*head, *reading.strides, inner, size))
    return BackwardPlan(starts, parts, merge_groups, merge_weights, table, behind, behind, wide)


def as_sums(merge: Merge) -> Merge:
    """Return the merge of groups that leaves sums, which that of means divides by counts."""
    return merge._replace(options=(merge.options[0], False, STD), numbers=(*merge.numbers[:-1], 1))


def weighing(plan: Plan) -> Merge:
    """Choose the launch that multiplies means of groups, shape (2, groups), by the groups' weights."""
    layout = plan.layout
    _, _, k1, r1 = layout.view
    numbers = layout.groups, k1, k1, 1, 1, 1, 0, 0, layout.groups, r1, 0, 0, layout.inner, layout.size, 1
    return _merge(layout.groups, 1, (True, False, STD), numbers)


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
        groups, chunks * r1, (call.weight and not by_row, call.mask, layout.record.scale),
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
