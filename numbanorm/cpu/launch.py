"""Launch choices of the CPU kernels, from shapes and the CPU: chunks, tiles, folds, and when threads pay.

Chunks decide the order of merging, so they may depend on the shape of a group but never on the number of threads, nor
on how many groups came along.
"""

from __future__ import annotations

from functools import lru_cache
from math import lcm

import numpy as np
from numba import config

from ..backend import Backward, Forward, Reading
from ..core.dtypes import Format
from ..core.norms import SCALES
from ..core.plan import Placement, Plan
from ..core.spec import ArraySpec, bounds
from .columns import BLOCK_ROWS, TILE
from .dtypes import LINE
from .profile import profile
from .rows import ROWS_APART, SHORT
from .rows_backward import FLUSH
from .sums import TOGETHER, UNIT_GROUPS
from .welford import BLOCK

CHUNK = 16384
"""Elements a chunk of the rows kernel: 64 KiB of float32, small against L2 (1 MiB), large against a launch (2 us)."""

UNIT = 2048
"""Elements whose statistics are taken before their output is written.

Enough for the divisions at the end of a narrow group's to overlap ((65536, 64): 2.2 ms, 2.3 with 512), and few, so that
streams go out while others come in ((65536, 1024): 26.4 ms, 27.8 with 8192).
"""

TOGETHER_RUN = 25088
"""Elements up to which runs of neighbouring groups are taken one after the other, as they lie in memory.

Batch norm in training (64, 256, 56, 56), runs of 3136 that are 3.2 MB from the channel's next, takes 25.3 ms channel by
channel on Zen 4, 16.7 with 12,544 elements, 16.3 with these and 16.0 with 50,176; (64, 1024, 14, 14) 8.8 and 4.4.
"""

SHARES = 4 * config.NUMBA_NUM_THREADS
"""Parts that must remain for threads, which differ by one in what they get: a quarter of a thread's work."""

SPAN = 8192
"""Elements a thread takes at a time, at least."""

FOLD_LANES = 192
"""Fewer lanes than this are folded: rows side by side, so that vectors are full (3 channels: 8 of 8 lanes, not 3)."""

PIECE = 1 << 17
"""Elements of a tile that are written with the same parameters: (4096, 256) takes 409 us with 32 Ki, 387 with these."""

ROWS_UP_TO = 1024
"""Longest rows that are written by rows (`rows._write_rows`)."""

NARROW = 64
"""Longest rows of whole lanes that are written by columns (`rows._write_columns`), and of others past the caches.

These are then written into the caches all the same: RMSNorm (262144, 16) takes 1.9 ms on Zen 4, where ends of rows wait
for the next to go past them 4.7, (100000, 48) 1.8 and 2.4, (65536, 100) 3.0 and 2.4.
"""

PAIRS_UP_TO = 1 << 17
"""Longest groups of which two are written beside the sums of the next two: four take 2 MiB of float32, as L2 has.

GroupNorm (64, 256, 56, 56) in groups of 100,352 takes 20.2 ms so, 22.4 group by group.
"""

NEAREST = 512
"""Elements by which columns ask ahead at least, where their rows lie one after the other: 2 KiB of float32."""

SPANS = 64
"""Parts, each with one fence, of an output that is streamed: as many threads can take one, and one has 128 KiB."""

STRIP = 32
"""Lanes that a vector holds: tiles are cut between them."""

SLAB_ELEMENTS = 1 << 16
"""Elements from which a slab pays: clearing and adding its gradients takes as long as about a twentieth of these."""

MAX_SLABS = 64
"""Slabs of samples with gradients of weights of their own: enough for 64 threads."""

MAX_CHUNKS = 64
"""Chunks a tile of the columns kernel: enough for 64 threads."""

TABLE_BYTES = 1 << 20
"""Bound on the partial moments of all chunks of the columns kernel, at 24 bytes a lane."""

_FIELDS = """
    K0 R0 K1 R1 samples inner size centred scale
    x_K0 x_R0 x_K1 y_K0 y_R0 y_K1 mask_K0 mask_R0 mask_K1 mask_R1
    x_itemsize y_itemsize lane_itemsize x_low x_high y_low y_high mask_low mask_high same
    mean_step count_step slabs gradients
    run_samples run_channels run_sample_step run_step run_mean_itemsize run_var_itemsize
    unit_groups together span_groups span_pieces ahead ahead_out stream pairs blocks narrow by_rows channel_runs
    back_groups back_narrow
    rows lanes tail tile block_rows chunk_rows chunk_runs chunk_width across chunks block_runs piece_runs piece_chunks
"""

GEOMETRY = np.dtype([(name, np.int64) for name in _FIELDS.split()], align=True)
"""What a kernel must know of a call; it reads it by name from the first of an array of two."""


@lru_cache(maxsize=4096)
def geometry(plan: Plan, affine: bool, itemsize: int = 4) -> np.ndarray:
    """Return the geometry of a plan's kernel call; without `affine` every element uses weight 0.

    The first record reads ``plan.x``, the second the packed sum of input and residual. `itemsize` is the input's.
    """
    layout = plan.layout
    both = np.zeros(2, GEOMETRY)
    for g, source in zip(both, (plan.x or plan.packed, plan.packed), strict=True):
        target = plan.y or plan.packed
        g["K0"], g["R0"], g["K1"], g["R1"] = layout.view
        if affine:
            g["samples"], g["inner"], g["size"] = layout.samples, layout.inner, layout.size
        else:
            g["samples"], g["inner"], g["size"] = 1, max(plan.size, 2), 1
        _write(g, "x", source)
        _write(g, "y", target)
        mask = plan.mask or plan.packed
        _write(g, "mask", mask)
        g["mask_R1"] = mask.strides[3]
        g["centred"], g["scale"] = layout.centred, SCALES.index(layout.record.scale)
        g["stream"] = plan.size >= profile().stream_from
        if plan.columns:
            # Folded rows keep their weights only where weights lie along the lanes.
            folds = layout.inner * layout.size <= layout.view[2] * layout.view[3]
            _columns(g, plan.size, folds and (plan.mask is None or mask.strides == plan.packed.strides))
        else:
            _rows(g, plan.size, itemsize)
    return both


def _write(g: np.void, prefix: str, placement: Placement) -> None:
    for name, stride in zip(("K0", "R0", "K1"), placement.strides[:3], strict=True):
        g[f"{prefix}_{name}"] = stride


def _rows(g: np.void, size: int, itemsize: int) -> None:
    """Cut groups into chunks of about CHUNK elements: parts of a run, or whole runs."""
    cpu = profile()
    r0, r1 = int(g["R0"]), int(g["R1"])
    runs = max(1, CHUNK // max(r1, 1))
    g["chunk_width"] = min(r1, CHUNK)
    g["chunk_runs"] = min(runs, r0)
    g["across"] = -(-r1 // g["chunk_width"])
    g["chunks"] = -(-r0 // g["chunk_runs"]) * g["across"]
    g["block_runs"] = max(1, BLOCK // r1)
    g["piece_runs"] = runs
    group = r0 * r1
    g["together"] = 1
    g["unit_groups"] = max(1, min(UNIT // group, UNIT_GROUPS))
    if r0 > 1:
        most = max(UNIT, cpu.together_size) if size >= cpu.ahead_from and g["x_K1"] == r1 else UNIT
        several = min(-(-TOGETHER_RUN // r1), most // group, int(g["K0"] * g["K1"]) // SHARES, int(g["K1"]), TOGETHER)
        g["unit_groups"] = g["together"] = max(1, several)
    elif g["stream"] and cpu.pairs and _pairs(g):
        g["pairs"], g["unit_groups"] = 1, 2
    elif g["stream"] and cpu.unit_bytes:
        row = r1 * itemsize
        few = max(1, min(8, 16 * cpu.unit_bytes // row))
        g["unit_groups"] = min(cpu.unit_bytes // row, UNIT_GROUPS) if row <= cpu.unit_bytes else few
    g["blocks"] = r0 == 1 and r1 <= BLOCK
    packed = r0 == g["K1"] == 1 and (g["K0"] == 1 or g["y_K0"] == r1)
    along = packed and g["inner"] == 1 and g["size"] == r1
    g["by_rows"] = along and r1 % STRIP == 0 and r1 <= ROWS_UP_TO
    even = r1 % STRIP == 0
    short = NARROW if even else SHORT
    g["narrow"] = along and r1 <= (NARROW if g["stream"] else short) and not (even and g["stream"])
    g["back_narrow"] = along and r1 <= short and not (even and g["stream"])
    g["back_groups"] = _back_groups(g, itemsize)
    g["channel_runs"] = g["K0"] == 1 < r0 and g["inner"] == r1 and g["size"] == g["K1"]
    span = (size // SPANS if g["stream"] else SPAN) // group
    if (g["by_rows"] or g["narrow"]) and not g["stream"] and r1 < ROWS_APART:
        g["unit_groups"] = max(g["unit_groups"] // 4 * 4, 4)
    g["span_groups"] = max(g["together"], span // g["together"] * g["together"])
    g["span_pieces"] = max(1, size // (CHUNK * SPANS)) if g["stream"] else 1
    if cpu.ahead and size >= cpu.ahead_from:
        strided = r0 > 1 and g["x_R0"] > r1 and r1 <= CHUNK and g["together"] == 1
        g["ahead"] = g["x_R0"] if strided else cpu.ahead_sums
        g["ahead_out"] = cpu.ahead


def _back_groups(g: np.void, itemsize: int) -> int:
    """Return how many rows `along_backward` sums before it writes their dx: 1, or a multiple of 4."""
    r1 = int(g["R1"])
    rows = int(g["unit_groups"])
    if g["stream"] and profile().backward_bytes:
        rows = profile().backward_bytes // (r1 * itemsize)
    elif g["stream"]:
        if r1 > NARROW and not g["back_narrow"]:
            return 1
        rows = 512 // r1
    step = FLUSH if g["back_narrow"] else 4
    return min(max(rows // step, 1) * step, UNIT_GROUPS)


def _pairs(g: np.void) -> bool:
    """Tell whether two groups can be written beside the statistics of the next two (`rows.forward`).

    Each is one run of more than a block: of 1024 elements, two by two take 26.9 ms, (65536, 1024), and one by one 25.7.
    All begin alike in lines of the output, and weights of a channel change between vectors.
    """
    k0, r0, k1, r1, inner, size = (int(g[name]) for name in ("K0", "R0", "K1", "R1", "inner", "size"))
    packed = (k1 == 1 or g["y_K1"] == r1) and (k0 == 1 or g["y_K0"] == k1 * r1)
    along = inner == 1 and size == r1
    by_stretch = inner % STRIP == 0 and (r1 % inner == 0 or inner % r1 == 0)
    return r0 == 1 and BLOCK < r1 <= PAIRS_UP_TO and r1 % STRIP == 0 and packed and (along or by_stretch)


def _columns(g: np.void, size: int, folds: bool) -> None:
    """Fold few lanes, cut lanes into tiles of whole groups and rows into chunks."""
    rows, k1, r1 = int(g["R0"]), int(g["K1"]), int(g["R1"])
    lanes = k1 * r1
    tail = 0
    if folds and g["x_R0"] == lanes and g["y_R0"] == lanes:
        fold = max(1, min(FOLD_LANES // lanes, rows // 8))
        rows, tail, lanes = rows // fold, rows % fold * lanes, lanes * fold
        for name in ("x_R0", "y_R0", "mask_R0"):
            g[name] *= fold
    # As wide as may be: a row that is one tile is written as one run. GroupNorm (16, 256, 28, 28) takes 0.82 ms on Zen
    # 4 so, and 0.97 in tiles of 128 lanes, into NumPy's memory 0.91 and 2.28.
    tiles = -(-lanes // (TILE // r1 * r1))  # 1 where lanes were folded: all copies of a group merge in one tile
    step = lcm(r1, STRIP)  # whole groups and, if it may be, whole strips, so that strips of all tiles are aligned alike
    step = step if tiles > 1 and step <= TILE else r1
    g["tile"] = min(-(-lanes // (tiles * step)) * step, TILE // step * step if tiles > 1 else lanes)
    chunks = max(1, min(MAX_CHUNKS, rows // BLOCK_ROWS, TABLE_BYTES // (24 * lanes)))
    blocks = -(-rows // BLOCK_ROWS)
    g["chunk_rows"] = -(-blocks // chunks) * BLOCK_ROWS
    g["chunks"] = -(-rows // g["chunk_rows"])
    in_chunk = min(rows, int(g["chunk_rows"]))
    g["block_rows"] = -(-in_chunk // max(1, in_chunk // BLOCK_ROWS))  # of one size, no short last one
    g["piece_chunks"] = max(1, PIECE // (g["chunk_rows"] * g["tile"]))
    g["rows"], g["lanes"], g["tail"] = rows, lanes, tail
    cpu = profile()
    if size >= cpu.ahead_from:
        step = cpu.rows_ahead * int(g["x_R0"])
        g["ahead"] = max(NEAREST, step) if g["x_R0"] == lanes == g["tile"] else step
        g["ahead_out"] = cpu.ahead


def geometry_of_forward(call: Forward) -> np.ndarray:
    """Return the geometry of a forward call: its second record reads the packed sum of input and residual."""
    plan, form = call.plan, call.form
    x = call.x.given if call.x.packed is None else call.x.packed
    affine = call.weight is not None or call.bias is not None
    both = geometry(plan, affine, x.dtype.itemsize).copy()
    target = call.written
    for g in both:
        _bound(g, x, target, call.mask, form)
    packed = both[1]
    packed["x_itemsize"], (packed["x_low"], packed["x_high"]) = form.result.itemsize, bounds(target)
    return both


def geometry_of_backward(call: Backward, counted: bool = False) -> np.ndarray:
    """Return the geometry of a backward call; `counted`: each group has a count of its own."""
    plan, form = call.plan, call.form
    x = call.x.given if call.x.packed is None else call.x.packed
    both = geometry(plan, True, x.dtype.itemsize).copy()
    for g in both:
        _bound(g, x, call.fresh, call.mask, form)
        g["mean_step"], g["count_step"] = plan.layout.centred, counted
        g["slabs"] = slabs = _slabs(plan, both)
        # Units of one slab add to the same gradients where one weight serves all: each k1 then has its own.
        g["gradients"] = slabs * plan.layout.view[2] if plan.layout.size == 1 and not plan.columns else slabs
    return both


def _bound(g: np.void, x: ArraySpec, y: ArraySpec, mask: Reading | None, form: Format) -> None:
    """Tell where arrays begin and end, and how large elements are."""
    g["x_itemsize"], g["y_itemsize"], g["lane_itemsize"] = x.dtype.itemsize, y.dtype.itemsize, form.lane.itemsize
    g["x_low"], g["x_high"] = bounds(x)
    g["y_low"], g["y_high"] = bounds(y)
    g["same"] = x is y
    if mask is not None:
        g["mask_low"], g["mask_high"] = bounds(mask.given if mask.packed is None else mask.packed)


def _narrow(g: np.void, field: str) -> tuple[bool | None, ...]:
    """Return `narrow` and `half` as kernels of rows take them."""
    narrow = True if g[field] else None
    return narrow, True if narrow and g["R1"] * g["lane_itemsize"] <= LINE else None


def affine_ways(geometry: np.ndarray) -> tuple[bool | None, ...]:
    """Return the rows kernels' `along` and `across`."""
    along = geometry[0]["inner"] == 1
    return True if along else None, None if along else True


def variants(geometry: np.ndarray, whole: bool) -> tuple[bool | None, ...]:
    """Return what follows the geometry in the rows kernel; `whole`: without a mask."""
    g = geometry[0]
    affine = affine_ways(geometry)
    if not whole or not g["blocks"]:
        return True if whole and g["pairs"] else None, None, True, *affine, None, None, None
    narrow, half = _narrow(g, "narrow")
    rows = True if g["by_rows"] and not g["stream"] and not narrow else None
    return None, None if narrow or rows else True, None, *affine, rows, narrow, half


def variants_of_backward(geometry: np.ndarray) -> tuple[bool | None, ...]:
    """Return `pairs`, `wide`, `narrow` and `half` of the backward of rows with weights along them."""
    g = geometry[0]
    whole = g["R1"] % STRIP == 0
    long = g["stream"] and whole and g["back_groups"] == g["K1"] == 1 and g["R1"] > BLOCK
    pairs = bool(profile().pairs and long)
    return True if pairs else None, None if g["back_narrow"] else True, *_narrow(g, "back_narrow")


def by_row(plan: Plan, geometry: np.ndarray) -> bool | None:
    """Return, as the columns kernel takes it, whether each row of it has one weight: True or None."""
    return True if plan.layout.inner % int(geometry[0]["lanes"]) == 0 else None


def tiles_of(geometry: np.ndarray) -> int:
    """Return the tiles of the columns kernel."""
    g = geometry[0]
    return int(g["K0"]) * -(-int(g["lanes"]) // int(g["tile"]))


def group_of_lanes(plan: Plan, geometry: np.ndarray) -> np.ndarray:
    """Return the group of every lane of the columns kernel, where K0 is 1."""
    _, _, k1, r1 = plan.layout.view
    return np.arange(int(geometry[0]["lanes"])) // r1 % k1


def is_along(plan: Plan) -> bool:
    """Tell whether each group is one row with weights along it."""
    _, r0, _, r1 = plan.layout.view
    return plan.layout.inner == r0 == 1 and plan.layout.size == r1


def is_long(plan: Plan) -> bool:
    """Tell whether rows with weights along them are so long that their gradients are taken block by block."""
    layout = plan.layout
    k0, _, _, r1 = layout.view
    return layout.inner == 1 and layout.groups == k0 and layout.count == r1 > CHUNK


def gradients_of(geometry: np.ndarray) -> int:
    """Return how many units of a backward's work have gradients of their own."""
    return int(geometry[0]["gradients"])


def units_of_backward(plan: Plan, geometry: np.ndarray) -> int:
    """Return into how many units a backward's work is cut: each slab at each k1, or each tile of one."""
    g = geometry[0]
    if plan.columns:
        return int(g["slabs"]) * (1 if by_row(plan, geometry) else tiles_of(geometry) // int(g["K0"]))
    together = int(g["together"]) if g["K0"] == 1 and g["inner"] == g["R1"] and g["size"] == g["K1"] else 1
    return int(g["slabs"]) * -(-int(g["K1"]) // together)


def units_of_apply(plan: Plan, geometry: np.ndarray) -> int:
    """Return into how many units the work is cut where statistics are given."""
    g = geometry[0]
    if plan.columns:
        return tiles_of(geometry) * -(-int(g["chunks"]) // int(g["piece_chunks"]))
    pieces = -(-int(g["K0"] * g["R0"] * g["K1"]) // int(g["piece_runs"])) * int(g["across"])
    return -(-pieces // int(g["span_pieces"]))


def _slabs(plan: Plan, geometry: np.ndarray) -> int:
    """Return into how many slabs, from the shape alone, a backward cuts its work, each with gradients of its own."""
    k0, _, k1, _ = plan.layout.view
    samples = plan.layout.samples
    items, own = k0, k1  # items of work on each set of weights, and such sets
    if plan.columns:
        tiles = tiles_of(geometry) // k0
        items, own = (k0 * tiles, 1) if by_row(plan, geometry) else (k0, tiles)
    of_sample = (items, MAX_SLABS // own, TABLE_BYTES // (16 * plan.layout.size), plan.size // SLAB_ELEMENTS)
    return samples * max(1, min(n // samples for n in of_sample))
