"""Norms that a user adds to the table, for as long as a test runs, and what the formula of any norm's record gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from numbanorm.core.layout import Layout
from numbanorm.core.norms import NORMS, NormRecord, register_norm

SCALE = NormRecord(
    kind="scale",
    title="ScaleNorm",
    reduced=frozenset({"normalized"}),
    centred=False,
    bias=False,
    affine="scalar",
)
"""RMS norm with one weight for all elements."""

POSITION = NormRecord(kind="position", title="PositionNorm", reduced=frozenset({"channel"}), by_channel=True)
WHOLE = NormRecord(
    kind="whole", title="WholeNorm", reduced=frozenset({"sample", "channel", "space"}), by_channel=True, affine="scalar"
)
CHANNEL_RMS = NormRecord(
    kind="channel-rms",
    title="ChannelRMSNorm",
    reduced=frozenset({"sample", "space"}),
    by_channel=True,
    centred=False,
    bias=False,
)
BATCH_GROUP = NormRecord(
    kind="batch-group",
    title="BatchGroupNorm",
    reduced=frozenset({"sample", "channel", "space"}),
    by_channel=True,
    grouped=True,
)
POSITION_GROUP = NormRecord(
    kind="position-group",
    title="PositionGroupNorm",
    reduced=frozenset({"channel"}),
    by_channel=True,
    grouped=True,
)

_ROWS, _SPACE = frozenset({"normalized"}), frozenset({"space"})
ADAPTIVE_LAYER = NormRecord(kind="adaptive-layer", title="AdaLN", reduced=_ROWS, affine="sample")
ADAPTIVE_RMS = NormRecord(
    kind="adaptive-rms", title="AdaRMSNorm", reduced=_ROWS, centred=False, bias=False, affine="sample"
)
ADAPTIVE_INSTANCE = NormRecord(
    kind="adaptive-instance", title="AdaIN", reduced=_SPACE, by_channel=True, affine="sample"
)
ADAPTIVE_GROUP = NormRecord(
    kind="adaptive-group",
    title="AdaGN",
    reduced=frozenset({"channel", "space"}),
    by_channel=True,
    grouped=True,
    affine="sample",
)
ADAPTIVE_BATCH = NormRecord(
    kind="adaptive-batch",
    title="ConditionalBN",
    reduced=frozenset({"sample", "space"}),
    by_channel=True,
    affine="sample",
)

ADAPTIVE = (ADAPTIVE_LAYER, ADAPTIVE_RMS, ADAPTIVE_INSTANCE, ADAPTIVE_GROUP, ADAPTIVE_BATCH)
"""Norms with weights for each sample."""

UNUSUAL = (SCALE, POSITION, WHOLE, CHANNEL_RMS, BATCH_GROUP, POSITION_GROUP)
"""What a record can say and none of the norms of the package does."""


@contextmanager
def registered(*records: NormRecord) -> Iterator[None]:
    """Keep norms in the table."""
    for record in records:
        register_norm(record)
    try:
        yield
    finally:
        for record in records:
            del NORMS[record.kind]
        Layout.of.cache_clear()


def by_formula(
    record: NormRecord, x: np.ndarray, weight: Any = None, bias: Any = None, eps: float | None = None, **options: Any
) -> np.ndarray:
    """Normalize in longdouble; `options` are those of `Layout.of`."""
    layout = Layout.of(record.kind, x.shape, **options)
    index = np.indices(x.shape)
    group, channel = (np.broadcast_to(found(*index), x.shape) for found in (layout.statistic, layout.weight))
    wide = x.astype(np.longdouble)
    if eps is None:
        eps = record.eps if record.eps is not None else float(np.finfo(x.dtype).eps)

    def mean_of(values: np.ndarray) -> np.ndarray:
        sums = np.zeros(layout.groups, np.longdouble)
        np.add.at(sums, group, values)
        return sums[group] / layout.count

    moved = wide - mean_of(wide) if record.centred else wide
    square = mean_of(moved * moved)
    y = moved / (np.sqrt(square + eps) if record.scale == "std" else np.maximum(np.sqrt(square * layout.count), eps))
    if weight is not None:
        y = y * np.ravel(weight)[channel]
    return np.asarray(y if bias is None else y + np.ravel(bias)[channel], np.float64)
