"""Launch choices: which kernel serves a plan, with how many threads, and why; frozen data and arithmetic on shapes.

Everything here depends on shapes, strides and alignment alone, and on whether the device has clusters of blocks: the
same call has the same bits on every GPU that has them, and on every one that has not. Figures are from an H100.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ..core.dtypes import NARROW
from ..core.norms import STD
from ..core.plan import Placement, Plan

WARP = 32
"""Threads of a warp."""

WORD = 16
"""Bytes of the widest load of a thread."""


class Rung(NamedTuple):
    """Groups of up to so many elements, and the threads that serve one."""

    elements: int
    team: int
    each: int  # elements a thread


LADDER = (
    Rung(32, 4, 8),
    Rung(64, 8, 8),
    Rung(128, 16, 8),
    Rung(256, 32, 8),
    Rung(512, 32, 16),
    Rung(1024, 32, 32),
    Rung(2048, 128, 16),
    Rung(4096, 256, 16),
    Rung(8192, 512, 16),
    Rung(16384, 512, 32),
)
"""Groups that registers hold, float32 lanes (float64: half as many elements at each step).

To keep 3 TB/s busy, half of it reads, at a latency of 600 ns, each of 132 multiprocessors needs about 7 KB of loads
under way. A thread has 32, 64 or 128 bytes under way and, within its `budget`, a multiprocessor has room for 512 to
1024 threads: 24 KB at least. Up to 1024 elements a warp serves a group, and no thread waits at a barrier.
"""

HALVES = (
    Rung(32, 4, 8),
    Rung(64, 4, 16),
    Rung(128, 8, 16),
    Rung(256, 16, 16),
    Rung(512, 16, 32),
    Rung(1024, 32, 32),
    Rung(2048, 64, 32),
    Rung(4096, 128, 32),
    Rung(8192, 256, 32),
    Rung(16384, 512, 32),
)
"""The same for elements of 16 bits: half the bytes in half the time leave a thread half the instructions, so what it
does once, for its group, is spread over twice as many elements.
"""

STREAM = Rung(0, 512, 16)
"""Groups beyond the ladder are read tile by tile, and once more for the output, from L2 while 132 groups fit in it."""

NARROW_BLOCK = 128
"""Threads of a block of several teams: 4 warps, so that the last block of a launch wastes little."""

CLUSTER = 8
"""Blocks that share a group whose parts registers hold, but no block alone: 8 times as many elements as the ladder.

Blocks of a cluster (compute capability 9.0) run at the same time and wait for each other, so that memory is read once;
elsewhere the same parts take two launches. 8 is the most that every device with clusters takes.
"""

CLUSTER_HALVES = {True: 1 << 15, False: 1 << 16}
"""Elements that a cluster takes of a group of 16 bits each, with a mean and without.

Rows of 65,536 float32 take 250 us in clusters, 366 without; of bfloat16 193 and 192, in InstanceNorm 187 and 155, but
in RMSNorm 125 and 155: there computing takes longer than memory, and of blocks of 256 threads there is room for two.
"""

SPLIT_BELOW = 256
"""Fewer groups than this, beyond the ladder, are cut into chunks: one block each would leave multiprocessors idle."""

SPLIT_BLOCKS = 1024
"""Chunks of all groups together: several for each of some 130 multiprocessors."""

MIN_CHUNK = 16384
"""Elements a chunk has at least: two tiles of `STREAM`."""

MAX_CHUNK = 1 << 22
"""Elements a chunk has at most: the count of a chunk's elements is a float32, exact up to 16 Mi."""


class Rows(NamedTuple):
    """What a rows kernel is compiled for; everything else is an argument."""

    source: str  # dtype of x
    result: str  # dtype of y
    wide: bool  # float64 lanes
    vector: int  # elements a load
    loads: int  # a tile
    team: int  # threads a group, or a chunk of one
    block: int  # threads
    rule: str  # where pieces lie, of `memory`
    held: bool = False  # one tile a thread is all: it stays in registers
    takes: str = "x"  # statistics from "x", or merged from the "table" of chunks, or given as "stats"
    leaves: str = "stats"  # statistics go to "stats", or a chunk's to the "table", or "nowhere"
    writes: bool = True  # y is written
    mask: str = "all"  # of `memory.chooser`
    weight: str = ""  # of `affine.gatherer`; "" where there is none
    bias: str = ""
    affine: str = ""  # dtype of weight and bias; "": that of the lanes
    added: bool = False  # x + residual is formed, and kept in total
    centred: bool = True
    scale: str = STD  # how statistics become rstd, of `numbanorm.core.norms.SCALES`
    split: bool = False  # groups are cut into chunks
    joined: bool = False  # whose blocks are a cluster, and know of each other's statistics
    kept: bool = False  # K1 is not 1
    registers: int = 255  # a thread may use


class Call(NamedTuple):
    """What of a call decides its launches, beside the plan: names of dtypes, and what there is."""

    source: str
    result: str
    weight: bool = False
    bias: bool = False
    mask: bool = False
    added: bool = False
    summed: bool = False  # x is the packed sum of an input and a residual
    fixed: bool = False  # backward: the statistics do not depend on x
    affine: str = ""  # dtype of weight and bias; "": that of the lanes
    low: tuple[int, ...] = ()  # the addresses modulo 16 of (x, y, mask, weight, bias, residual, total); () if all 0


def summed(call: Call) -> Call:
    """Return the call that goes on from the packed sum of input and residual."""
    low = (call.low[6], *call.low[1:5], 0, 0) if call.low else ()
    return call._replace(source=call.result, added=False, summed=True, low=low)


class Launch(NamedTuple):
    """One kernel, its blocks and the numbers that follow the addresses among its arguments."""

    choice: Rows
    blocks: int
    starts: tuple[int, int, int]  # bytes from the spans' addresses to their first elements: x, y, mask
    numbers: tuple[int, ...]


def block_of(team: int, narrow: int = NARROW_BLOCK) -> int:
    """Return the threads of a block: several teams where they are parts of a warp, else one team."""
    return narrow if team <= WARP else team


def item_size(name: str) -> int:
    """Return the bytes of an element."""
    return 1 if name == "bool" else int("".join(c for c in name if c.isdigit())) // 8


def is_wide(name: str) -> bool:
    """Tell whether a dtype computes in float64."""
    return name not in NARROW


def vector_of(sizes: tuple[int, ...], low: tuple[int, ...], multiples: tuple[int, ...]) -> int:
    """Return how many neighbours a load takes: the most of which everything is a multiple.

    Parameters
    ----------
    sizes : tuple of int
        Bytes of an element of each array: of x and y first.
    low : tuple of int
        Address of each array modulo 16; empty if all are 0.
    multiples : tuple of int
        Lengths, offsets and strides in elements.
    """
    vector = WORD // max(sizes[:2])
    while vector > 1:
        fits = all(m % vector == 0 for m in multiples)
        if fits and all(a % min(vector * s, WORD) == 0 for a, s in zip(low, sizes, strict=False)):
            break
        vector //= 2
    return vector


def steps(placement: Placement, plan: Plan) -> tuple[int, ...]:
    """Return an array's offset and strides as far as they are used."""
    lengths = plan.layout.view[:3]
    return placement.start, *(s for s, n in zip(placement.strides, lengths, strict=False) if n > 1)


class _Read(NamedTuple):
    """How a rows kernel reads and writes a call's arrays."""

    x: Placement
    y: Placement
    mask: Placement
    sizes: tuple[int, ...]  # bytes of an element of x, y, mask, weight, bias, residual and total
    vector: int
    weights: str  # of `affine.gatherer`
    masks: str  # of `memory.chooser`
    flat: bool  # whether pieces of a group are neighbours


def _read(plan: Plan, call: Call, writes: bool) -> _Read:
    layout = plan.layout
    _, r0, k1, r1 = layout.view
    x = plan.packed if call.summed else plan.x or plan.packed
    y, mask = plan.y or plan.packed, plan.mask or plan.packed
    parameter = item_size(call.affine) if call.affine else 8 if is_wide(call.source) else 4
    source, result = item_size(call.source), item_size(call.result)
    sizes = (source, result, 1, parameter, parameter, source, result)
    along = layout.inner == 1 and layout.size % r1 == 0 and (r0 == 1 or k1 * r1 % layout.size == 0)
    one = layout.inner % r1 == 0 and (r0 == 1 or k1 * r1 % (layout.inner * layout.size) == 0)
    multiples = (r1, *steps(x, plan), *(steps(y, plan) if writes else ()))
    if call.mask and mask.strides[3] == 1:
        multiples += steps(mask, plan)
    affine = call.weight or call.bias
    if affine and layout.inner > 1 and not one:
        multiples += (layout.inner,)
    same = layout.inner == 1 and layout.size == r1
    kind = "same" if same else "along" if along else "shared" if one else "element" if layout.inner == 1 else "piece"
    masks = "all" if not call.mask else "elements" if mask.strides[3] == 1 else "runs"
    together = k1 == 1 and all(p.strides[1] == r1 for p in (x, y)) and (masks != "elements" or mask.strides[1] == r1)
    flat = r0 == 1 or (together and masks != "runs" and not (affine and along))
    return _Read(x, y, mask, sizes, vector_of(sizes, call.low, multiples), kind, masks, flat)


class _Tiles(NamedTuple):
    """How the elements of a group are spread over threads and blocks."""

    rung: Rung
    loads: int  # a tile
    pieces: int
    chunks: int
    chunk_pieces: int
    joined: bool  # a cluster may take a group

    @property
    def held(self) -> bool:
        return self.rung is not STREAM


def _tiles(plan: Plan, read: _Read, wide: bool) -> _Tiles:
    layout, vector = plan.layout, read.vector
    pieces = layout.count // vector
    part = 2 if wide else 1
    ladder = HALVES if max(read.sizes[:2]) == 2 else LADDER
    rung = next((r for r in ladder if layout.count * part <= r.elements), STREAM)
    if rung is ladder[-1] and not read.flat:
        rung = STREAM  # the offsets of runs would not fit in registers beside 32 elements
    most = CLUSTER_HALVES[layout.centred] if ladder is HALVES else CLUSTER * LADDER[-1].elements // part
    joined = rung is STREAM and read.flat and layout.count <= most
    if joined:
        rung = next(r for r in HALVES if -(-pieces // CLUSTER) * vector * part <= r.elements)
    loads = max(1, rung.each // part // vector)
    tile = rung.team * loads
    if rung is STREAM:
        chunk_pieces = -(-chunk_elements(plan) // (tile * vector)) * tile
    else:
        chunk_pieces = -(-pieces // CLUSTER) if joined else pieces
    chunks = CLUSTER if joined else -(-pieces // chunk_pieces)
    return _Tiles(rung, loads, pieces, chunks, chunk_pieces, joined)


@lru_cache(maxsize=4096)
def rows(plan: Plan, call: Call, takes: str, leaves: str, writes: bool) -> Launch:
    """Choose the launch of a rows kernel.

    Parameters
    ----------
    plan, call
        The call.
    takes, leaves, writes
        Which part of the work, as in `Rows`; where groups are not split, "table" stands for nothing.
    """
    layout = plan.layout
    _, r0, k1, r1 = layout.view
    wide = is_wide(call.source)
    read = _read(plan, call, writes)
    tiles = _tiles(plan, read, wide)
    rung, chunks = tiles.rung, tiles.chunks
    whole = tiles.held and tiles.pieces == chunks * rung.team * tiles.loads
    rule = "runs" if not read.flat else "whole" if whole else "flat"
    units = layout.groups * chunks
    block = block_of(rung.team)
    choice = Rows(
        source=call.source,
        result=call.result,
        wide=wide,
        vector=read.vector,
        loads=tiles.loads,
        team=rung.team,
        block=block,
        rule=rule,
        held=tiles.held,
        takes=takes,
        leaves=leaves,
        writes=writes,
        mask=read.masks if takes == "x" else "all",
        weight=read.weights if call.weight and writes else "",
        bias=read.weights if call.bias and writes else "",
        affine=call.affine if (call.weight or call.bias) and writes else "",
        added=call.added,
        centred=layout.centred,
        scale=layout.record.scale if leaves == "stats" else STD,
        split=chunks > 1,
        joined=tiles.joined and takes == "x" and leaves == "stats" and writes,
        kept=k1 > 1,
        registers=budget(rung, call, rule, tiles.joined),
    )
    x, y, mask, sizes = read[:4]
    strides = (*x.strides[:3], *y.strides[:3], *mask.strides[:3])
    head = (units, chunks, tiles.chunk_pieces, tiles.pieces, r1 // read.vector, k1, r0 * k1 * r1, r1)
    starts = (x.start * sizes[0], y.start * sizes[1], mask.start)
    return Launch(choice, -(-units * rung.team // block), starts, (*head, *strides, layout.inner, layout.size))


def budget(rung: Rung, call: Call, rule: str, joined: bool) -> int:
    """Return how many registers a thread may use; a tile that may be cut, masks and residuals need more."""
    if rung.each < 32:
        return 72 if rule == "whole" else 80
    if joined:
        return 104 if rule == "whole" else 128
    if call.mask or call.added:
        return 112
    return 80


def chunk_elements(plan: Plan) -> int:
    """Return how many elements of a group one block takes, from the shape alone."""
    layout = plan.layout
    if layout.groups >= SPLIT_BELOW:
        return min(layout.count, MAX_CHUNK)
    return min(max(MIN_CHUNK, -(-plan.size // SPLIT_BLOCKS)), MAX_CHUNK)


COLUMN_ROWS = 4
"""Rows a thread has under way in the columns kernels, of 128 bits each; twice as many of single lanes."""

COLUMN_THREADS = 256
"""Threads of their blocks; half as many for lanes of 16 bits, whose moments would fill the shared memory."""

SUM_TILES = 64
"""Tiles that a thread adds in float32: 64 equal terms are off by 6e-7, 500 by 4e-6."""

MAX_CHUNKS = 128
"""Chunks of rows, at most: each leaves 24 bytes a lane that must be merged."""


class Columns(NamedTuple):
    """What a columns kernel is compiled for."""

    source: str
    result: str
    wide: bool
    vector: int  # lanes a thread
    loads: int  # rows a tile
    across: int  # threads of a block along the lanes; the others lie below each other
    block: int  # threads
    mask: str = "all"
    weights: str = "element"  # "piece": weights lie along the rows; else "along" or "element", along the lanes
    weight: bool = False
    bias: bool = False
    centred: bool = True
    scale: str = STD  # of the sums


class ColumnsLaunch(NamedTuple):
    """One kernel, its blocks and the numbers that follow the addresses among its arguments."""

    choice: Columns
    blocks: int
    starts: tuple[int, int, int]
    numbers: tuple[int, ...]
    chunks: int
    entries: int  # of the table, a plane


class Close(NamedTuple):
    """The merge of a table of partial moments."""

    team: int
    block: int
    blocks: int
    scale: str  # as in `Rows`
    numbers: tuple[int, ...]


def power_of_two(number: int) -> int:
    """Return the least power of two that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


@lru_cache(maxsize=4096)
def columns(plan: Plan, call: Call, part: str) -> ColumnsLaunch:
    """Choose the launch of a columns kernel: "moments", "apply", and for backward "sums" and "emit"."""
    layout = plan.layout
    k0, rows, k1, r1 = layout.view
    lanes = k1 * r1
    x, y, mask = plan.x or plan.packed, plan.y or plan.packed, plan.mask or plan.packed
    wide = is_wide(call.source)
    lane = 8 if wide else 4
    item = max(item_size(call.source), item_size(call.result))
    sizes = (item_size(call.source), item_size(call.result), 1, lane, lane, item, 1)
    by_row = layout.inner % lanes == 0
    masked = call.mask and part != "apply"
    mask_kind = "all" if not masked else "elements" if mask.strides[3] == 1 else "runs"
    along = layout.inner == 1 and lanes % layout.size == 0
    multiples = (lanes, *_lane_steps(x, plan), *(_lane_steps(y, plan) if part != "moments" else ()))
    if mask_kind == "elements":
        multiples += _lane_steps(mask, plan)
    if along and (call.weight or call.bias):
        multiples += (layout.size,)
    vector = vector_of(sizes, call.low, multiples)
    block, count, across = _column_block(rows, lanes, vector, lane, part)
    tiles = -(-lanes // (across * vector))
    tile = block // across * count
    chunk_rows = _chunk_rows(rows, tile, tiles * k0, part)
    chunks = -(-rows // chunk_rows)
    choice = Columns(
        source=call.source,
        result=call.result,
        wide=wide,
        vector=vector,
        loads=count,
        across=across,
        block=block,
        mask=mask_kind,
        weights="piece" if by_row else "along" if along else "element",
        weight=call.weight and part != "moments",
        bias=call.bias and part == "apply",
        centred=layout.centred,
        scale=layout.record.scale if part == "sums" else STD,
    )
    entries = k0 * chunks * lanes
    head = (tiles, chunks, chunk_rows, rows, lanes)
    numbers: tuple[int, ...]
    if part == "moments":
        numbers = *head, entries, x.strides[0], x.strides[1], mask.strides[0], mask.strides[1]
    else:
        own = (x.strides[0], x.strides[1], y.strides[0], y.strides[1])
        numbers = *head, layout.groups, k1, r1, *own, layout.inner, layout.size
        if part != "apply":
            numbers += entries, mask.strides[0], mask.strides[1]
    starts = (x.start * sizes[0], y.start * sizes[1], mask.start)
    return ColumnsLaunch(choice, k0 * chunks * tiles, starts, numbers, chunks, entries)


def _column_block(rows: int, lanes: int, vector: int, lane: int, part: str) -> tuple[int, int, int]:
    """Return the threads of a block, the rows that each has under way, and the threads along the lanes."""
    block = COLUMN_THREADS // 2 if vector * lane > WORD else COLUMN_THREADS
    count = COLUMN_ROWS * (2 if vector == 1 and part in ("moments", "apply") else 1)
    if vector > 4 and part in ("sums", "emit"):
        count //= 2
    below = min(power_of_two(-(-rows // count)), block // 32)
    return block, count, min(power_of_two(-(-lanes // vector)), block // below)


def _chunk_rows(rows: int, tile: int, tiles: int, part: str) -> int:
    """Return the rows of a chunk: whole tiles, and as many as keep all multiprocessors busy."""
    leaves_sums = part in ("moments", "sums")
    wanted = min(MAX_CHUNKS, max(1, SPLIT_BLOCKS // tiles)) if leaves_sums else 1 << 20
    chunk = max((1 if leaves_sums else 4) * tile, -(-rows // (wanted * tile)) * tile)
    return min(chunk, SUM_TILES * tile) if part == "sums" else chunk


def _lane_steps(placement: Placement, plan: Plan) -> tuple[int, ...]:
    """Return an array's offset and the strides of K0 and the rows."""
    lengths = plan.layout.view[:2]
    return placement.start, *(s for s, n in zip(placement.strides, lengths, strict=False) if n > 1)


@lru_cache(maxsize=4096)
def close(plan: Plan, part: ColumnsLaunch) -> Close:
    """Choose the merge of the table that the columns kernels leave."""
    k0, _, k1, r1 = plan.layout.view
    lanes = k1 * r1
    entries = part.chunks * r1
    team = min(32, power_of_two(-(-entries // 4)))
    numbers = (k0 * k1, k1, part.chunks * lanes, r1, entries, r1, lanes, part.entries)
    return Close(team, NARROW_BLOCK, -(-k0 * k1 * team // NARROW_BLOCK), plan.layout.record.scale, numbers)
