"""The contract of a backend: what `numbanorm.cpu.backend` and `numbanorm.cuda.backend` both offer.

A backend says how a prepared call becomes a launch. Each function takes what `numbanorm.calls.prepare` worked out and
returns a launch: a function of arrays (NumPy arrays on the CPU; spans of device memory, with ``stream`` and
``workspace`` by name, on CUDA). Outputs are given, none is returned. Whatever depends on shapes and dtypes is settled
before the launch is returned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from .core.dtypes import Format
from .core.norms import NormRecord
from .core.plan import Placement, Plan
from .core.spec import ArraySpec

Launch = Callable[..., Any]

View = tuple[int, ArraySpec]
"""A part of an array: how far its first element is from that of the array, in bytes, and how it lies."""


class Reading(NamedTuple):
    """How a kernel reads an array.

    Attributes
    ----------
    given : ArraySpec
        How the caller's array lies.
    packed : ArraySpec or None
        The array without gaps that it is copied to first; None where it is read in its place.
    placement : Placement or None
        Where the elements lie in the view; None for what is read as it lies in memory, such as a weight.
    """

    given: ArraySpec
    packed: ArraySpec | None = None
    placement: Placement | None = None


class Forward(NamedTuple):
    """A forward call.

    Attributes
    ----------
    record, form, plan
        The norm, the input's dtype, and where the elements of what is normalized lie.
    x, weight, bias, mask, residual : Reading or None
        How the inputs are read; where input and residual are summed first, the sum is read as `x`.
    total : ArraySpec or None
        The sum of input and residual.
    sum_first : bool
        Whether it is formed before the norm, not within.
    fresh : ArraySpec
        What the kernels write to, unless it is `out`.
    deliver : ArraySpec or None
        What the result is copied to where that is not yet what the caller gets.
    written : ArraySpec
        What the kernels write to: `fresh`, or `out`.
    target : Placement
        Where the elements lie in it.
    stats : ArraySpec
        The statistics: rows COUNT, MEAN, M2 and RSTD.
    statistics : tuple of View
        Those that the caller gets, in them.
    samples : tuple
        ``(samples, groups from one to the next), groups from one channel to the next``, for running statistics.
    """

    record: NormRecord
    form: Format
    plan: Plan
    x: Reading
    weight: Reading | None
    bias: Reading | None
    mask: Reading | None
    residual: Reading | None
    total: ArraySpec | None
    sum_first: bool
    fresh: ArraySpec
    deliver: ArraySpec | None
    written: ArraySpec
    target: Placement
    stats: ArraySpec
    statistics: tuple[View, ...]
    samples: tuple[tuple[int, int], int]


class Backward(NamedTuple):
    """A backward call; attributes as those of `Forward`.

    Attributes
    ----------
    dy, mean, rstd : Reading or None
        How these inputs are read; no mean where the norm has none.
    gradient : ArraySpec
        dweight and dbias, as the caller gets them.
    packed_gradient : ArraySpec or None
        How they come out of the kernels, where that differs.
    """

    record: NormRecord
    form: Format
    plan: Plan
    x: Reading
    dy: Reading
    weight: Reading | None
    mean: Reading | None
    rstd: Reading
    mask: Reading | None
    fresh: ArraySpec
    deliver: ArraySpec | None
    gradient: ArraySpec
    packed_gradient: ArraySpec | None


class Backend(Protocol):
    """What a module must offer to be a backend."""

    def prepare_forward(self, call: Forward) -> Launch:
        """Return ``launch(x, residual, total, y, mask, weight, bias, stats, eps)``.

        It normalizes with the statistics of the input and writes them to `stats`: rows COUNT, MEAN, M2 and RSTD.
        """

    def prepare_apply(self, call: Forward) -> Launch:
        """Return ``launch(x, y, weight, bias, mean, var, stats, eps)``.

        It normalizes with given statistics: running ones, or, where `mean` and `var` are None, those in the rows MEAN
        and RSTD of `stats`.
        """

    def prepare_running(self, call: Forward) -> Launch:
        """Return ``launch(stats, mean, var, momentum)``, which moves running statistics towards those of a batch."""

    def prepare_statistics(self, call: Forward) -> Launch:
        """Return ``launch(x, mask, stats)``, which writes the statistics alone."""

    def prepare_backward(self, call: Backward, fixed: bool) -> Launch:
        """Return ``launch(dy, x, dx, mask, weight, mean, rstd, gradients)``.

        It writes dx, and dweight and dbias to the rows of `gradients`; `fixed`: the statistics do not depend on x.
        """

    def prepare_partial_sums(self, call: Backward) -> Launch:
        """Return ``launch(dy, x, weight, mean, rstd, sums)``.

        It writes, for groups that lie in parts, the sums of ``g`` and ``g * (x - mean) * rstd`` over each group's part,
        float64: ``g`` is dy, times the weight where weights lie along the groups.
        """

    def prepare_partial_gradient(self, call: Backward) -> Launch:
        """Return ``launch(dy, x, dx, mask, weight, mean, rstd, means, gradients)``.

        It writes dx of a part from the means of those sums over whole groups, and the gradients of weights that lie
        along the groups.
        """
