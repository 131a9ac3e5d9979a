"""The table of norms: every norm is one record here, and whatever the package does for a norm it reads from the record.

A record answers two questions about every element of an input, with whom it shares a mean and a variance and with whom
a weight and a bias, and tells which of the formulas that the kernels know turns statistics into a factor. Functions,
layers, explanations, the command line, files, dask arrays, both backends, tests and benchmarks iterate this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

SAMPLE, GROUP, CHANNEL, SPACE, OUTER, NORMALIZED = "sample", "group", "channel", "space", "outer", "normalized"
"""Roles of axes. Of norms by channel: samples, groups, channels of a group, space. Of the others: outer, normalized."""

CHANNEL_ROLES = frozenset({SAMPLE, GROUP, CHANNEL, SPACE})
AXIS_ROLES = frozenset({OUTER, NORMALIZED})

SCALES = ("std", "l2")
"""How the mean square deviation ``s`` of ``n`` elements becomes the factor, as kernels know it by its place here:
``1 / sqrt(s + eps)``, or ``1 / max(sqrt(n * s), eps)``."""

STD, L2 = SCALES

AFFINE_MAPS = ("elementwise", "scalar", "sample")
"""What shares a weight: each channel or normalized element has its own; one number serves all elements; each channel or
normalized element of each sample has its own, as in AdaLN and FiLM."""

TRACKING = ("never", "optional", "usual")
"""Whether running statistics of the channels are kept."""


@dataclass(frozen=True, kw_only=True)
class NormRecord:
    """One norm.

    Attributes
    ----------
    kind : str
        Its name in calls: ``"layer"``.
    title : str
        Its name in words and pictures, and that of its layer: ``"LayerNorm"``.
    reduced : frozenset of str
        Roles of the axes whose elements share a mean and a variance: some of ``"sample"``, ``"channel"``, ``"space"``
        for a norm by channel, ``"normalized"`` for one over the axes that the caller names.
    by_channel : bool
        True: the axes are samples, channels and space, and ``channel_axis`` tells them. False: the caller gives
        ``normalized_shape`` or ``axis``.
    grouped : bool
        Whether channels are cut into groups (``num_groups``).
    centred : bool
        Whether the mean is subtracted.
    scale : str
        One of `SCALES`.
    affine : str
        One of `AFFINE_MAPS`.
    bias : bool
        Whether there may be a bias.
    affine_by_default : bool
        Whether its layer has a weight unless told otherwise.
    eps : float or None
        The usual one; None for the machine epsilon of the result's dtype.
    tracking : str
        One of `TRACKING`.
    textbook : bool
        Whether textbooks put it beside the others.

    Examples
    --------
    >>> NORMS["layer"].title, NORMS["layer"].centred
    ('LayerNorm', True)
    """

    kind: str
    title: str
    reduced: frozenset[str]
    by_channel: bool = False
    grouped: bool = False
    centred: bool = True
    scale: Literal["std", "l2"] = "std"
    affine: Literal["elementwise", "scalar", "sample"] = "elementwise"
    bias: bool = True
    affine_by_default: bool = True
    eps: float | None = 1e-5
    tracking: Literal["never", "optional", "usual"] = "never"
    textbook: bool = False

    @property
    def tracks(self) -> bool:
        """Whether running statistics may be kept; such a norm refuses groups of one element in training."""
        return self.tracking != "never"

    @property
    def mixes_samples(self) -> bool:
        """Whether a sample's result depends on the other samples."""
        return SAMPLE in self.reduced

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the statistics that callers get."""
        return ("mean", "rstd") if self.centred else ("rstd",)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that there may be."""
        return ("weight", "bias") if self.bias else ("weight",)

    @property
    def takes_mask(self) -> bool:
        """Whether a mask may leave elements out of the statistics."""
        return self.centred

    @property
    def takes_residual(self) -> bool:
        """Whether a residual may be added before the norm."""
        return not self.by_channel

    @property
    def affine_roles(self) -> frozenset[str]:
        """Roles of the axes along which weights differ, within a sample."""
        return frozenset() if self.affine == "scalar" else frozenset({GROUP, CHANNEL, NORMALIZED})

    @property
    def weights_by_sample(self) -> bool:
        """Whether each sample has weights of its own: no layer can hold them, and no chunk of samples shares them."""
        return self.affine == "sample"

    @property
    def weights_within_groups(self) -> bool:
        """Whether elements that share a mean and a variance have different weights."""
        return bool(self.affine_roles & self.reduced)

    def rstd(self, square: Any, count: Any, eps: float) -> Any:
        """Return the factor of groups, as the kernels make it.

        Parameters
        ----------
        square : float64 array_like
            Mean square of a group's elements, or of their deviations from the mean.
        count : array_like
            Elements of a group.
        eps : float
            As the functions take it.
        """
        with np.errstate(all="ignore"):  # NaN, Inf and 0 go the way of all arithmetic
            if self.scale == L2:
                return 1.0 / np.maximum(np.sqrt(square * np.asarray(count, np.float64)), eps)
            return 1.0 / np.sqrt(square + eps)


NORMS: dict[str, NormRecord] = {}
"""Every norm by its name; see `register_norm`."""


def register_norm(record: NormRecord) -> NormRecord:
    """Add a norm to the table; everything in the package takes it from then on.

    Parameters
    ----------
    record : NormRecord
        What is to be known of it.

    Returns
    -------
    NormRecord
        The record.

    Raises
    ------
    TypeError
        If it is no record.
    ValueError
        If a field has no meaning, or another norm has its name.

    Examples
    --------
    A norm with one weight for all elements:

    >>> import numpy as np
    >>> import numbanorm as nn
    >>> scale = nn.NormRecord(kind="doc-scale", title="DocScaleNorm", reduced=frozenset({"normalized"}),
    ...                       centred=False, bias=False, affine="scalar")
    >>> scale is nn.register_norm(scale)
    True
    >>> nn.normalize("doc-scale", np.array([[3.0, 3.0]]), 2, weight=np.array(2.0), eps=0.0)
    array([[2., 2.]])
    """
    if not isinstance(record, NormRecord):
        raise TypeError(f"record: expected a NormRecord, got {type(record).__name__}")
    roles = CHANNEL_ROLES if record.by_channel else AXIS_ROLES
    if not record.reduced or not record.reduced <= roles:
        raise ValueError(f"reduced: expected some of {sorted(roles)}, got {sorted(record.reduced)}")
    for name, allowed in (("scale", SCALES), ("affine", AFFINE_MAPS), ("tracking", TRACKING)):
        if getattr(record, name) not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {getattr(record, name)!r}")
    if (record.tracks or record.grouped) and not record.by_channel:
        raise ValueError(f"by_channel: expected True where there are groups or running statistics, got {record.kind!r}")
    if record.scale == L2 and record.centred:
        raise ValueError("centred: expected False with scale='l2', got True")
    if NORMS.setdefault(record.kind, record) != record:
        raise ValueError(f"kind: expected a name that no other norm has, got {record.kind!r}")
    return record


for _record in (
    NormRecord(
        kind="batch",
        title="BatchNorm",
        reduced=frozenset({SAMPLE, SPACE}),
        by_channel=True,
        tracking="usual",
        textbook=True,
    ),
    NormRecord(kind="layer", title="LayerNorm", reduced=frozenset({NORMALIZED}), textbook=True),
    NormRecord(
        kind="instance",
        title="InstanceNorm",
        reduced=frozenset({SPACE}),
        by_channel=True,
        affine_by_default=False,
        tracking="optional",
        textbook=True,
    ),
    NormRecord(
        kind="group",
        title="GroupNorm",
        reduced=frozenset({CHANNEL, SPACE}),
        by_channel=True,
        grouped=True,
        textbook=True,
    ),
    NormRecord(kind="rms", title="RMSNorm", reduced=frozenset({NORMALIZED}), centred=False, bias=False, eps=None),
    NormRecord(
        kind="l2",
        title="L2Norm",
        reduced=frozenset({NORMALIZED}),
        centred=False,
        scale="l2",
        bias=False,
        affine_by_default=False,
        eps=1e-12,
    ),
):
    register_norm(_record)

OF_CHANNELS, OF_SAMPLES_CHANNELS, OF_AXES, OF_AXES_UNCENTRED = "batch", "instance", "layer", "rms"
"""Norms whose maps serve other purposes: statistics of each channel, as running ones are; of each channel of each
sample; and of any axes, with a mean and without."""


def record_of(kind: Any) -> NormRecord:
    """Return the record of a norm.

    Raises
    ------
    ValueError
        If there is no such norm.
    """
    record = NORMS.get(kind) if isinstance(kind, str) else None
    if record is None:
        raise ValueError(f"norm: expected one of {', '.join(map(repr, NORMS))}, got {kind!r}")
    return record
