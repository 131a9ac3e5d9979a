"""Which cells the comparison with peers has.

`KERNELS` are the 93 cells of the first comparisons, under the names that they had: functions, on arrays that lie as
kernels like them. `CALLS` are the others that programs are made of.
"""

from __future__ import annotations

from collections.abc import Iterable

from peer_data import Spec

Shapes = Iterable[tuple[int, ...]]
LAST = "channels last"


def _cross(operations: str, shapes: Shapes, views: tuple[str, ...] = ("",), dtype: str = "float32") -> list[Spec]:
    """Return every operation (a comma between two) on every shape in every view."""
    return [
        Spec(operation, shape, dtype, view)
        for operation in operations.split(", ")
        for shape in shapes
        for view in (views if len(shape) == 4 or LAST not in views else ("",))
    ]


_ROWS = [(1, 768), (8, 768), (128, 768), (512, 1024), (4096, 1024), (16384, 4096), (8, 1 << 20), (65536, 64)]
_IMAGES = [(4, 32, 28, 28), (32, 64, 56, 56), (32, 3, 224, 224), (8, 2048, 7, 7), (64, 256, 56, 56)]
_TABLES = [(4096, 256), (65536, 64)]
_BOTH = ("", LAST)

GRID: dict[str, Shapes] = {
    "layer": _ROWS,
    "rms": _ROWS,
    "residual + rms": [(1, 768), (8, 768), (128, 768), (4096, 1024), (16384, 4096)],
    "batch training": _IMAGES + _TABLES,
    "batch eval": _IMAGES + _TABLES,
    "instance": [(4, 32, 28, 28), (32, 64, 56, 56), (32, 3, 224, 224)],
    "group": [(4, 32, 28, 28), (32, 64, 56, 56), (8, 2048, 7, 7), (64, 256, 56, 56)],
    "layer backward": [(8, 768), (128, 768), (4096, 1024), (16384, 4096), (65536, 64)],
    "batch backward": [(4, 32, 28, 28), (32, 64, 56, 56), (4096, 256)],
    "group backward": [(4, 32, 28, 28), (32, 64, 56, 56)],
}
"""Shapes by operation, in float32: one token to 256 MB, few huge rows, many tiny ones, narrow and wide channels."""

OTHER_DTYPES: dict[str, Shapes] = {
    "layer": [(8, 768), (128, 768), (16384, 4096)],
    "rms": [(128, 768), (16384, 4096)],
    "batch training": [(32, 64, 56, 56)],
    "batch eval": [(32, 64, 56, 56)],
    "group": [(32, 64, 56, 56)],
    "instance": [(32, 64, 56, 56)],
    "layer backward": [(4096, 1024)],
}
"""Shapes by operation, in bfloat16 and float64."""

KERNELS = [spec for operation, shapes in GRID.items() for spec in _cross(operation, shapes, _BOTH)]
KERNELS += [
    spec
    for dtype in ("bfloat16", "float64")
    for operation, shapes in OTHER_DTYPES.items()
    for spec in _cross(operation, shapes, dtype=dtype)
]

CALLS = [
    # batch norm as everybody trains it
    *_cross("batch running", [(16, 8), (32, 256), (1024, 100), (256, 769), (4096, 256)]),
    *_cross("batch running", [(4, 64, 8, 8), (8, 64, 28, 28), (32, 64, 56, 56), (64, 512, 4, 4)], _BOTH),
    *_cross("batch running", [(16, 512, 7, 7), (4, 1280, 7, 7)], _BOTH),
    *_cross("batch running", [(8, 2048, 4, 4)], (LAST,)),
    # layers
    *_cross("module layer eval", [(1, 768), (128, 768), (8, 128, 384)]),
    *_cross("module rms eval", [(1, 768), (128, 768)]),
    *_cross("module batch eval", [(32, 256), (1, 64, 56, 56), (8, 64, 28, 28)], _BOTH),
    *_cross("module batch training", [(16, 8), (32, 256), (4, 64, 8, 8), (8, 64, 28, 28)], _BOTH),
    *_cross("module instance eval, module group eval", [(4, 32, 28, 28)]),
    *_cross("module layer step", [(32, 768), (128, 768), (4096, 1024)]),
    *_cross("module rms step", [(128, 768), (4096, 1024)]),
    *_cross("module batch step", [(32, 256), (8, 64, 28, 28), (32, 64, 56, 56)], _BOTH),
    *_cross("module instance step", [(4, 32, 28, 28)]),
    *_cross("module group step", [(4, 32, 28, 28), (32, 64, 56, 56)]),
    # masks
    *_cross("layer masked", [(32, 768), (128, 768)]),
    *_cross("batch masked", [(32, 256), (64, 128, 100), (8, 64, 28, 28)]),
    *_cross("instance masked", [(64, 128, 100)]),
    *_cross("group masked", [(8, 64, 28, 28)]),
    # views
    *_cross("layer", [(128, 768), (4096, 1024)], ("sliced",)),
    *_cross("layer", [(32, 768), (1024, 1024)], ("Fortran",)),
    *_cross("layer", [(16, 128, 768)], ("transposed",)),
    *_cross("rms, layer backward", [(128, 768)], ("sliced",)),
    *_cross("batch running", [(256, 256)], ("sliced", "Fortran")),
    *_cross("batch eval, instance, group", [(8, 64, 28, 28)], ("cropped",)),
    # narrow rows
    *_cross("layer, rms", [(16384, n) for n in (8, 12, 16, 28, 48, 56, 64)]),
    *_cross("layer backward", [(16384, 16), (16384, 48)]),
    # odd widths
    *_cross("layer, rms", [(1024, 100), (512, 300), (256, 769), (256, 1000)]),
    *_cross("layer backward", [(1024, 100), (256, 769)]),
    # small images, many channels
    *_cross("batch eval, group", [(64, 512, 4, 4), (4, 1280, 7, 7)], _BOTH),
    *_cross("instance", [(64, 512, 4, 4), (16, 512, 7, 7)]),
    *_cross("batch eval, group", [(8, 2048, 4, 4)], (LAST,)),
    # where a second thread begins to pay
    *_cross("layer", [(256, 1024), (1024, 1024)]),
    *_cross("batch eval", [(1, 64, 56, 56)]),
]

SPECS = {spec.name: spec for spec in KERNELS + CALLS}
