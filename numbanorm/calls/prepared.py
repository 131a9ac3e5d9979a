"""Prepared calls on arrays in host memory: all that depends on what arrays look like is settled, and a run launches.

Each object here serves the calls whose arrays look alike. What only addresses tell, overlaps and alignment, the kernels
look at; where they find something, the call is looked at closer.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np

from ..backend import Forward
from ..core.plan import COUNT, M2, MEAN, RSTD, Options
from ..core.pool import POOL
from ..core.spec import ArraySpec, spec_of
from . import check, prepare
from .arrays import as_array
from .memory import Output, Packing, aligned, backend, look, new, packed
from .prepare import public_statistic
from .running import fill, move

_empty = np.empty
_NO_STATS = np.empty((4, 0))


@cache
def _constant(size: int, dtype: np.dtype[Any], value: int) -> np.ndarray:
    return np.full(size, value, dtype)


def _check_out(out: np.ndarray, inputs: dict[str, Any]) -> None:
    """Check what specs do not tell of an output."""
    check.check_output(spec_of(out), out.shape, out.dtype, out.flags.writeable)
    check.check_apart(out, inputs)


class _Call:
    """What all prepared forward calls share.

    Parameters
    ----------
    call : Forward
        What is to be done.
    options : tuple
        As `numbanorm.core.plan.plan` takes them.
    """

    __slots__ = (
        "_back",
        "_call",
        "_dtype",
        "_launch",
        "_one",
        "_options",
        "_pack",
        "_pooled",
        "_rows",
        "_shape",
        "_stats_of",
        "_stats_shape",
        "_unusual",
        "_zero",
        "epsilon",
    )

    def __init__(self, call: Forward, options: Options) -> None:
        layout = call.plan.layout
        self._call, self._options = call, options
        output = Output(call)
        self._back, self._shape, self._dtype, self._pooled = output.back, output.shape, output.dtype, output.pooled
        size = layout.weights if call.weight is not None or call.bias is not None else 1
        self._one, self._zero = _constant(size, call.form.lane, 1), _constant(size, call.form.lane, 0)
        self._stats_shape = (4, layout.groups)
        self._stats_of = (4, *layout.stats_shape) if layout.stats_order is None else None
        self._rows = (MEAN, RSTD) if layout.centred else (RSTD,)
        self._pack = Packing(call.x, call.residual, call.mask, call.weight, call.bias)
        self._unusual = bool(self._pack) or call.plan.size == 0 or call.deliver is not None or call.sum_first
        self._launch: Any = None
        self.epsilon = call.form.epsilon if call.record.eps is None else None

    def public(self, stats: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return a backend's statistics as users get them: mean, where there is one, and rstd."""
        if self._stats_of is None:
            layout = self._call.plan.layout
            return tuple([public_statistic(stats[row], layout) for row in self._rows])
        shaped = stats.reshape(self._stats_of)
        return tuple([shaped[row, ...] for row in self._rows])

    def results(self, y: Any, stats: Any, total: Any, return_stats: bool) -> Any:
        """Return what the functions return."""
        if total is None:
            return (y, *self.public(stats)) if return_stats else y
        return (y, *self.public(stats), total) if return_stats else (y, total)

    def _new(self, *beside: np.ndarray) -> np.ndarray:
        """Return an output, in the order of memory."""
        if self._pooled:
            return POOL.empty(self._shape, self._dtype, *beside)
        return _empty(self._shape, self._dtype)

    def _delivered(self, y: np.ndarray, out: Any) -> np.ndarray:
        """Return what the caller gets of what the kernels wrote."""
        if out is not None and self._call.deliver is None:
            return y
        if self._back is not None:
            y = y.transpose(self._back)
        deliver = self._call.deliver
        if deliver is None:
            return y
        target: np.ndarray = new(deliver) if out is None else out
        np.copyto(target, y)
        return target


class Prepared(_Call):
    """Normalizes with the statistics of the input."""

    __slots__ = ("_columns",)

    def __init__(self, call: Forward, options: Options) -> None:
        super().__init__(call, options)
        self._columns = call.plan.columns
        if call.plan.size and not call.sum_first:
            self._launch = backend().prepare_forward(call)

    def run(
        self, x: Any, weight: Any, bias: Any, eps: float, mask: Any, residual: Any, out: Any, keep: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return the result, the backend's statistics, if they are to be kept, and the sum of input and residual."""
        if self._unusual:
            return self._run_unusual(x, weight, bias, eps, mask, residual, out, keep)
        y = out
        if y is None:
            y = POOL.empty(self._shape, self._dtype, x) if self._pooled else _empty(self._shape, self._dtype)
        elif not out.flags.writeable:
            _check_out(out, {})
        total = None if residual is None else self._new(x, y)
        stats = _empty(self._stats_shape) if keep or self._columns else _NO_STATS
        w, b = self._one if weight is None else weight, self._zero if bias is None else bias
        if self._launch(x, residual, total, y, mask, w, b, stats, eps, keep):
            return self._look_closer(x, weight, bias, eps, mask, residual, out, keep)
        if self._back is not None:
            if out is None:
                y = y.transpose(self._back)
            if total is not None:
                total = total.transpose(self._back)
        return y, stats, total

    def _run_unusual(
        self, x: Any, weight: Any, bias: Any, eps: float, mask: Any, residual: Any, out: Any, keep: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Do the same where arrays have to be copied first, or the result afterwards, or there are no elements."""
        call = self._call
        if out is not None:
            _check_out(out, {"x": x, "residual": residual, "weight": weight, "bias": bias, "mask": mask})
        if call.sum_first:
            return self._run_summed(x, residual, weight, bias, eps, mask, out, keep)
        if call.plan.size == 0:
            stats = np.zeros(self._stats_shape)
            stats[RSTD] = call.record.rstd(np.float64(0.0), 0, eps)
            y = _empty(x.shape, self._dtype) if out is None else out
            return y, stats, None if residual is None else _empty(x.shape, self._dtype)
        read, added, marked, w, b = self._pack(x, residual, mask, weight, bias)
        y = out if out is not None and call.deliver is None else self._new(read)
        total = None if residual is None else self._new(read, y)
        stats = _empty(self._stats_shape) if keep or self._columns else _NO_STATS
        w, b = self._one if w is None else w, self._zero if b is None else b
        if self._launch(read, added, total, y, marked, w, b, stats, eps, keep):
            return self._look_closer(x, weight, bias, eps, mask, residual, out, keep)
        if total is not None and self._back is not None:
            total = total.transpose(self._back)
        return self._delivered(y, out), stats, total

    def _run_summed(
        self, x: Any, residual: Any, weight: Any, bias: Any, eps: float, mask: Any, out: Any, keep: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Normalize the sum of input and residual, where the kernel cannot form it."""
        call = self._call
        assert call.total is not None
        total = new(call.total)  # in the order of memory in which statistics are read
        with np.errstate(all="ignore"):
            np.add(x, residual, out=total, dtype=self._dtype)
        then = prepared_for(call.record.kind, self._options, total, weight, bias, mask, None, out)
        y, stats, _ = then.run(total, weight, bias, eps, mask, None, out, keep)
        return y, stats, total

    def _look_closer(
        self, x: Any, weight: Any, bias: Any, eps: float, mask: Any, residual: Any, out: Any, keep: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Serve a call whose arrays are misaligned, or whose output lies within the bounds of an input.

        Raises
        ------
        ValueError
            If they share memory.
        """
        if out is not None:
            check.check_apart(out, {"x": x, "residual": residual, "weight": weight, "bias": bias, "mask": mask})
        read = (aligned(x), aligned(weight), aligned(bias))
        added = aligned(residual)
        then = prepared_for(self._call.record.kind, self._options, *read, mask, added)
        y, stats, total = then.run(*read, eps, mask, added, None, keep)
        if out is not None:
            np.copyto(out, y)
            y = out
        return y, stats, total


class Tracking(Prepared):
    """Normalizes with the statistics of the input, and moves running statistics towards them."""

    __slots__ = ("_update",)

    def __init__(self, call: Forward, options: Options, mean: ArraySpec, var: ArraySpec) -> None:
        super().__init__(call, options)
        plain = all(map(_is_plain, (mean, var)))
        # NumPy adds up pair by pair what lies side by side: bits that are kept where samples do.
        bound = call.plan.size > 0 and plain and call.plan.layout.stats_order is None
        self._update = backend().prepare_running(call, mean.dtype, var.dtype) if bound else None

    def train(
        self, x: Any, weight: Any, bias: Any, eps: float, mask: Any, out: Any, mean: Any, var: Any, momentum: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the result and the backend's statistics; the running ones are moved when all else is done.

        Raises
        ------
        ValueError
            If they cannot be written, or share memory; nothing is written then.
        """
        if not (mean.flags.writeable and var.flags.writeable):
            for name, array in (("running_mean", mean), ("running_var", var)):
                check.check_updatable(spec_of(array), name, array.flags.writeable)
        if out is not None:  # it is written before the running statistics are
            check.check_two(mean, var)
        y, stats, _ = self.run(x, weight, bias, eps, mask, None, out, True)
        update = self._update
        if update is None or update(mean, var, stats, momentum, False):
            check.check_two(mean, var)
            if self._call.plan.size:
                layout = self._call.plan.layout
                count, batch_mean, m2 = (public_statistic(stats[row], layout) for row in (COUNT, MEAN, M2))
                move(mean, var, count, batch_mean, m2, momentum)
        return y, stats


class Applying(_Call):
    """Normalizes with given statistics."""

    __slots__ = ("_plain",)

    def __init__(
        self, call: Forward, options: Options, mean: ArraySpec | None = None, var: ArraySpec | None = None
    ) -> None:
        super().__init__(call, options)
        given = [spec for spec in (mean, var) if spec is not None]
        self._plain = len(given) == 2 and all(map(_is_plain, given))
        if call.plan.size:
            kinds = [spec.dtype for spec in given] if self._plain else []
            self._launch = backend().prepare_apply(call, *kinds)

    def statistics(self, mean: Any, rstd: Any) -> np.ndarray:
        """Return statistics, shaped as users get them, as `apply` takes them; no mean where the norm has none."""
        layout = self._call.plan.layout
        stats = np.zeros(self._stats_shape)
        spec = prepare.statistic_spec(layout)
        for row, name, value in ((MEAN, "mean", mean), (RSTD, "rstd", rstd)):
            if name in self._call.record.statistics:
                array = as_array(value, name)
                check.check_statistic(spec_of(array), name, layout)
                stats[row] = packed(array, spec).ravel("K")
        stats[COUNT] = layout.count
        return stats

    def given(
        self, x: Any, weight: Any, bias: Any, eps: float, out: Any, mean: Any, var: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Normalize with running statistics; return the result, and them as a backend's."""
        if out is not None:
            _check_out(out, {"running_mean": mean, "running_var": var})
        if self._plain:
            stats = _empty(self._stats_shape)
            return self.apply(x, weight, bias, out, stats, mean, var, eps), stats
        stats = fill(mean, var, eps, self._stats_shape)
        return self.apply(x, weight, bias, out, stats), stats

    def apply(
        self,
        x: Any,
        weight: Any,
        bias: Any,
        out: Any,
        stats: np.ndarray,
        mean: Any = None,
        var: Any = None,
        eps: float = 0.0,
    ) -> np.ndarray:
        """Normalize with the rows MEAN and RSTD of `stats`, to which running statistics are put first, if given."""
        if self._unusual:
            return self._apply_unusual(x, weight, bias, out, stats, mean, var, eps)
        y: np.ndarray = out
        if y is None:
            y = POOL.empty(self._shape, self._dtype, x) if self._pooled else _empty(self._shape, self._dtype)
        w, b = self._one if weight is None else weight, self._zero if bias is None else bias
        if self._launch(x, y, w, b, mean, var, stats, eps):
            return self._look_closer(x, weight, bias, out, stats, mean, var, eps)
        return y if self._back is None or out is not None else y.transpose(self._back)

    def _apply_unusual(
        self, x: Any, weight: Any, bias: Any, out: Any, stats: np.ndarray, mean: Any, var: Any, eps: float
    ) -> np.ndarray:
        """Do the same where arrays have to be copied first, or the result afterwards, and where there is nothing."""
        if out is not None:
            _check_out(out, {"x": x, "weight": weight, "bias": bias})
        if self._call.plan.size == 0:
            if mean is not None:
                stats[...] = fill(mean, var, eps, self._stats_shape)
            return _empty(x.shape, self._dtype) if out is None else out
        read, _, _, w, b = self._pack(x, None, None, weight, bias)
        y = out if out is not None and self._call.deliver is None else self._new(read)
        w, b = self._one if w is None else w, self._zero if b is None else b
        if self._launch(read, y, w, b, mean, var, stats, eps):
            return self._look_closer(x, weight, bias, out, stats, mean, var, eps)
        return self._delivered(y, out)

    def _look_closer(
        self, x: Any, weight: Any, bias: Any, out: Any, stats: np.ndarray, mean: Any, var: Any, eps: float
    ) -> np.ndarray:
        """As `Prepared._look_closer`."""
        if out is not None:
            check.check_apart(out, {"x": x, "weight": weight, "bias": bias})
        if mean is not None:
            stats[...] = fill(mean, var, eps, self._stats_shape)
        x, weight, bias = aligned(x), aligned(weight), aligned(bias)
        then = applying_for(self._call.record.kind, self._options, x, weight, bias)
        y = then.apply(x, weight, bias, None, stats)
        if out is None:
            return y
        np.copyto(out, y)
        return out  # type: ignore[no-any-return]


class Measuring:
    """Takes statistics, and writes nothing else."""

    def __init__(self, call: Forward) -> None:
        self.call = call
        self._pack = Packing(call.x, call.mask)
        self._launch = backend().prepare_statistics(call) if call.plan.size else None

    def run(self, x: Any, mask: Any) -> np.ndarray:
        """Return the rows COUNT, MEAN, M2 and RSTD, with eps 0."""
        shape = (4, self.call.plan.layout.groups)
        if self._launch is None:
            return np.zeros(shape)
        stats = _empty(shape)
        x, mask = self._pack(aligned(x), mask)
        self._launch(x, mask, stats)
        return stats


def _is_plain(spec: ArraySpec) -> bool:
    """Tell whether kernels take a running statistic: float32 or float64, without gaps."""
    packed = spec.size < 2 or spec.strides[0] == spec.dtype.itemsize
    return packed and spec.dtype.isnative and spec.dtype.char in "fd"


def prepared_for(norm: str, options: Options, *arrays: Any, from_input: bool = True) -> Any:
    """Return what serves forward calls whose arrays look like these; see `prepare_call`.

    Parameters
    ----------
    norm, options
        As `numbanorm.core.plan.plan` takes them.
    *arrays : ndarray or None
        x, weight, bias, mask, residual, out, running mean and variance; the last ones may be left out.
    from_input : bool, optional
        False: normalize with the running statistics.
    """
    specs = [look(array) for array in arrays]
    specs += [None] * (8 - len(specs))
    return prepare_call(norm, options, tuple(specs), from_input)


@lru_cache(maxsize=4096)
def prepare_call(
    norm: str, options: Options, specs: tuple[ArraySpec | None, ...], from_input: bool
) -> Prepared | Tracking | Applying:
    """Return what serves forward calls whose arrays look so.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.
    """
    x, weight, bias, mask, residual, out, mean, var = specs
    assert x is not None
    tracked = check.check_both(mean, var)
    if from_input:
        call = prepare.forward(norm, options, x, weight, bias, mask, residual, out)
        check.check_count(call.plan.layout, x)
        if not tracked:
            return Prepared(call, options)
        check.check_running(mean, var, call.plan.layout.size)
        assert mean is not None
        assert var is not None
        return Tracking(call, options, mean, var)
    if mask is not None:
        check.check_mask(mask, x.shape)  # statistics that are given are not limited by it
    call = prepare.forward(prepare.of_running_statistics(norm), options, x, weight, bias, None, residual, out)
    check.check_running(mean, var, call.plan.layout.size)
    return Applying(call, options, mean, var)


def applying_for(
    norm: str, options: Options, x: np.ndarray, weight: Any = None, bias: Any = None, out: Any = None
) -> Applying:
    """Return what normalizes arrays that look like these with statistics of every group."""
    return _prepare_applying(norm, options, *map(look, (x, weight, bias, out)))


@lru_cache(maxsize=4096)
def _prepare_applying(
    norm: str,
    options: Options,
    x: ArraySpec,
    weight: ArraySpec | None,
    bias: ArraySpec | None,
    out: ArraySpec | None,
) -> Applying:
    return Applying(prepare.forward(norm, options, x, weight, bias, None, None, out), options)


def measuring_for(norm: str, options: Options, x: np.ndarray, mask: Any = None) -> Measuring:
    """Return what takes the statistics of arrays that look like these."""
    return _prepare_measuring(norm, options, look(x), look(mask))


@lru_cache(maxsize=4096)
def _prepare_measuring(norm: str, options: Options, x: ArraySpec, mask: ArraySpec | None) -> Measuring:
    return Measuring(prepare.forward(norm, options, x, None, None, mask))


caches = (prepare_call, _prepare_applying, _prepare_measuring, _constant)
"""What has been prepared, by specs."""
