"""Calls drawn by chance: functions, dtypes, shapes, values, memory; and what is wrong with some of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from random import Random
from typing import Any

import numpy as np
from guarded import Arena, Placed, Shape, strides_of
from judge import BFLOAT16, FLOATS, Judge, Result, View, axes_view, channel_view, lane, result_dtype
from reference import LONG, moments
from registered import UNUSUAL

import numbanorm as nn
from numbanorm.core.norms import NormRecord, record_of

ALL_DTYPES = (
    *map(np.dtype, ("float32", "float16", "float64", "bool", "int8", "uint8", "int16", "uint16")),
    *map(np.dtype, ("int32", "uint32", "int64", "uint64")),
    BFLOAT16,
)
FEW_DTYPES = (*map(np.dtype, ("float32", "float64", "int16")), BFLOAT16)
"""Those that stand for each way through the kernels, one for each lane and width: compiling for all takes minutes."""

MOST = 1500
"""Elements of an input at most, and bytes of its memory: two strips of the widest lanes, and a block and a half."""
ARENA_BYTES = 2 << 20

OTHERS = UNUSUAL
"""Norms that no function of the package is named for. They must be registered where calls are drawn and made."""

WIDE = ((13, 96), (9, 160), (2, 7, 96), (5, 6, 32), (4, 8, 32), (3, 6, 64), (3, 4, 8, 12), (2, 8, 4, 16))
"""Shapes of groups of whole vectors, enough of them for two to be written beside the sums of the next two."""

SPREAD = 32 << 10
"""Bytes from which an array lies in one piece."""


@dataclass
class Case:
    """One call.

    Attributes
    ----------
    function : callable
        What is called, with `arguments` by name.
    name : str
        Its name.
    arguments : dict
        What it is called with.
    results : list of Result
        What it must return, in order.
    inputs, targets : list of Placed
        Memory that must stay as it is, and memory that is written.
    moved : list of (ndarray, Result)
        What must stand in arrays after the call.
    blamed : tuple of str
        If not empty: the call must fail, and the message must begin with one of these names.
    """

    function: Callable[..., Any]
    name: str
    arguments: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    inputs: list[Placed] = field(default_factory=list)
    targets: list[Placed] = field(default_factory=list)
    moved: list[tuple[np.ndarray, Result]] = field(default_factory=list)
    blamed: tuple[str, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={_shown(v)}' for k, v in self.arguments.items())}) {self.note}"


def _shown(value: Any) -> str:
    if isinstance(value, np.ndarray):
        flags = "".join(
            letter for letter, on in (("r", not value.flags.writeable), ("m", not value.flags.aligned)) if on
        )
        kind = "" if type(value) is np.ndarray else f"{type(value).__name__}:"
        dtype = "bf16" if value.dtype == BFLOAT16 else value.dtype.str
        return f"<{kind}{dtype}{value.shape} strides {value.strides} {flags}>"
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}..."


class Subclass(np.ndarray):
    """What a library may derive from NumPy's array."""


class Wrapped:
    """What holds an array and hands it over when asked, as pandas does."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.array(self._array, dtype, copy=copy)


class Exporting:
    """What exports its memory by DLPack, and comes from a module that imports nothing by it."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


def values_of(rnd: Random, gen: np.random.Generator, dtype: np.dtype[Any], lengths: tuple[int, ...]) -> np.ndarray:
    """Draw values: harmless ones, and all those that break formulas."""
    if dtype.kind == "b":
        return gen.random(lengths) < rnd.choice((0.5, 0.1, 1.0))
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        low, high = (info.min, info.max) if rnd.random() < 0.3 else (max(info.min, -20), 20)
        return gen.integers(low, high, lengths, dtype, endpoint=True)
    kind = rnd.choice(
        ("normal", "normal", "normal", "shifted", "shifted", "constant", "few", "huge", "tiny", "bits", "bad")
    )
    plain = gen.standard_normal(lengths)
    if kind == "shifted":
        most = {2: 1.5, 4: 6, 8: 9}[dtype.itemsize]
        plain = plain * rnd.choice((1e-3, 1.0, 30.0)) + 10 ** rnd.uniform(0, most)
    elif kind == "constant":
        plain = np.full(lengths, rnd.choice((0.0, -0.0, 0.1, -3.7, 1e4, 16777217.0)))
    elif kind == "few":
        plain = gen.integers(0, 2, lengths) * rnd.choice((1.0, 0.1)) + rnd.choice((0.0, 1e3))
    elif kind == "huge":
        plain = gen.uniform(-1, 1, lengths) * (6e4 if dtype == np.float16 else 3e38 if dtype.itemsize < 8 else 1e150)
    elif kind == "tiny":
        least = float(np.finfo(np.float32).smallest_subnormal) if dtype.itemsize < 8 else 1e-140
        least = 6e-8 if dtype == np.float16 else least
        plain = gen.integers(-40, 40, lengths) * least
    elif kind == "bits" and dtype.itemsize < 8:
        whole = gen.integers(0, 1 << (8 * dtype.itemsize), lengths, np.uint64).astype(f"u{dtype.itemsize}")
        return np.asarray(whole).view(dtype)
    with np.errstate(all="ignore"):
        out = np.asarray(plain).astype(dtype)
    if kind == "bad" and out.size:
        flat = out.reshape(-1).view(f"u{dtype.itemsize}")
        quiet = {np.dtype(np.float16): 0x7E01, BFLOAT16: 0x7FC1, np.dtype(np.float32): 0x7FC12345}
        signalling = {np.dtype(np.float16): 0x7C01, BFLOAT16: 0x7F81, np.dtype(np.float32): 0x7F812345}
        infinite = {np.dtype(np.float16): 0x7C00, BFLOAT16: 0x7F80, np.dtype(np.float32): 0x7F800000}
        wide = {"quiet": 0x7FF8000012345678, "signalling": 0x7FF0000012345678, "infinite": 0x7FF0000000000000}
        for _ in range(rnd.randint(1, 3)):
            which = rnd.choice(("quiet", "signalling", "infinite"))
            table = {"quiet": quiet, "signalling": signalling, "infinite": infinite}[which]
            bits = table.get(dtype, wide[which])
            sign = rnd.choice((0, 1)) << (8 * dtype.itemsize - 1)
            flat[rnd.randrange(flat.size)] = bits | sign
    return out


def lengths_of(rnd: Random, least: int, most: int = 6) -> tuple[int, ...]:
    """Draw lengths of axes: mostly short, sometimes one that fills lanes and blocks, sometimes none at all."""
    ndim = min(most, max(least, rnd.choice((0, 1, 2, 2, 2, 3, 3, 4, 4, 5, 6))))
    lengths = [rnd.choice((1, 2, 2, 3, 3, 4, 5, 7)) for _ in range(ndim)]
    if ndim and rnd.random() < 0.3:
        lengths[rnd.randrange(ndim)] = rnd.choice((8, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 127, 130, 513, 1025))
    wide = [shape for shape in WIDE if least <= len(shape) <= most]
    if wide and rnd.random() < 0.08:
        lengths = list(rnd.choice(wide))
        ndim = len(lengths)
    if ndim and rnd.random() < 0.04:
        lengths[rnd.randrange(ndim)] = 0
    while prod(lengths) > MOST:
        lengths[max(range(ndim), key=lambda a: lengths[a] if lengths[a] < 100 else 1)] = 1
        if all(n in (1,) or n > 100 for n in lengths) and prod(lengths) > MOST:
            lengths[lengths.index(max(lengths))] = 1
    return tuple(lengths)


def function_of(record: NormRecord, backward: bool = False) -> tuple[Callable[..., Any], str]:
    """Return what a norm is called by, forward or backward, and its name."""
    name = f"{record.kind}_norm{'_backward' if backward else ''}"
    if hasattr(nn, name):
        return getattr(nn, name), name
    any_norm = (
        partial(nn.normalize_backward, record.kind, mean=None) if backward else partial(nn.normalize, record.kind)
    )
    return any_norm, f"{record.kind}{' backward' if backward else ''}"


class Maker:
    """Draws cases.

    Parameters
    ----------
    rnd : Random
        What decides.
    arena : Arena
        Where arrays lie.
    dtypes : sequence of np.dtype
        Of inputs.
    """

    def __init__(self, rnd: Random, arena: Arena, dtypes: Any = ALL_DTYPES) -> None:
        self.rnd, self.arena, self.dtypes = rnd, arena, dtypes
        self.gen = np.random.default_rng(rnd.getrandbits(64))
        self.inputs: list[Placed] = []
        self.targets: list[Placed] = []
        self.notes: list[str] = []
        arena.clear()

    def chance(self, share: float) -> bool:
        return self.rnd.random() < share

    def place(
        self,
        dtype: np.dtype[Any],
        lengths: tuple[int, ...],
        values: Any,
        *,
        target: bool = False,
        strides: tuple[int, ...] | None = None,
    ) -> np.ndarray:
        """Return an array of these values somewhere in memory, with strides of its own unless some are given."""
        rnd = self.rnd
        if strides is None:
            if dtype.itemsize > 1 and dtype != BFLOAT16 and not target and self.chance(0.08):
                dtype = dtype.newbyteorder()
            strides = strides_of(rnd, lengths, dtype.itemsize, shared=not target)
        how = Shape.of(lengths, strides, dtype.itemsize)
        if how.span > SPREAD:
            how = Shape.of(
                lengths, tuple(dtype.itemsize * prod(lengths[a + 1 :]) for a in range(len(lengths))), dtype.itemsize
            )
        placed = self.arena.place(rnd, dtype, how, odd=self.chance(0.08))
        with np.errstate(all="ignore"):
            placed.array[...] = values
        placed.watch()
        if target:
            self.targets.append(placed)
        else:
            self.inputs.append(placed)
            if self.chance(0.15):
                placed.array.setflags(write=False)
        return placed.array

    def input(
        self, dtype: np.dtype[Any], lengths: tuple[int, ...], strides: tuple[int, ...] | None = None
    ) -> np.ndarray:
        return self.place(dtype, lengths, values_of(self.rnd, self.gen, dtype, lengths), strides=strides)

    def residual(self, x: np.ndarray) -> np.ndarray | None:
        """Draw what is added to an input, or nothing; half of them lie as it does."""
        if not self.chance(0.25):
            return None
        alike = x.strides if x.dtype.isnative and self.chance(0.5) else None
        return self.input(x.dtype.newbyteorder("="), x.shape, alike)

    def parameter(self, lengths: tuple[int, ...], share: float = 0.6) -> np.ndarray | None:
        """Draw a weight or bias of any float dtype, or none."""
        if not self.chance(share):
            return None
        dtype = self.rnd.choice(sorted(FLOATS, key=str))
        values = np.asarray(self.gen.standard_normal(lengths))
        if self.chance(0.03) and values.size:
            values.reshape(-1)[self.rnd.randrange(values.size)] = self.rnd.choice((np.nan, np.inf, -np.inf))
        return self.place(dtype, lengths, values)

    def mask(self, lengths: tuple[int, ...]) -> np.ndarray | None:
        if not self.chance(0.3):
            return None
        own = tuple(1 if self.chance(0.3) else n for n in lengths)
        if self.chance(0.2):
            own = own[self.rnd.randrange(len(own) + 1) :]
        return self.place(np.dtype(bool), own, self.gen.random(own) < self.rnd.choice((0.5, 0.9, 0.1, 0.0, 1.0)))

    def out(self, dtype: np.dtype[Any], x: np.ndarray, *others: np.ndarray | None) -> np.ndarray | None:
        """Draw where to write: nowhere, apart, or over an input as a whole."""
        if self.chance(0.6):
            return None
        if self.chance(0.3):
            source = self.rnd.choice([a for a in (x, *others) if a is not None])
            placed = next((p for p in self.inputs if p.array is source), None)
            shared = any(n > 1 and s == 0 for n, s in zip(source.shape, source.strides, strict=True))
            own = Shape.of(source.shape, source.strides, source.itemsize).span >= source.nbytes
            native = source.dtype == dtype and source.dtype.isnative
            if placed is not None and native and source.flags.writeable and not shared and own and not _slides(source):
                self.inputs.remove(placed)
                self.targets.append(placed)
                return source
        return self.place(dtype, x.shape, 7, target=True)

    def eps(self, record: NormRecord) -> Any:
        if record.eps is None and self.chance(0.3):
            return None
        if record.scale == "l2":  # which must be larger than some vectors, and smaller than others
            return self.rnd.choice((1e-12, 1e-12, 1e-3, 1, np.float32(2.5), 30.0, 1e4, 0.0))
        return self.rnd.choice((1e-5, 1e-5, 1e-5, 1e-3, 1e-12, 1, np.float32(1e-5), 0.0))

    def wrapped(self, x: np.ndarray) -> Any:
        """Return an input as some other object that NumPy converts; results for it come as plain arrays."""
        if not self.chance(0.08):
            return x
        kind = self.rnd.choice(("list", "matrix", "memmap", "subclass", "memoryview", "wrapped", "exporting"))
        self.notes.append(kind)
        if kind == "list" and x.size and x.dtype.kind in "f" and x.dtype.itemsize == 8:
            return x.tolist()
        if kind == "matrix" and x.ndim == 2:
            return x.view(np.matrix)
        if kind in ("memmap", "subclass"):
            return x.view(np.memmap if kind == "memmap" else Subclass)
        if kind == "memoryview" and x.dtype != BFLOAT16 and x.dtype.isnative and x.size:
            return memoryview(x)
        if kind == "wrapped":
            return Wrapped(x)
        exports = x.dtype.isnative and x.dtype != BFLOAT16 and x.flags.aligned and x.flags.writeable
        if kind == "exporting" and exports and all(s % x.itemsize == 0 for s in x.strides):
            return Exporting(x)
        return x

    def case(self, function: Callable[..., Any], name: str, arguments: dict[str, Any], results: list[Result]) -> Case:
        given = {k: v for k, v in arguments.items() if v is not None}
        return Case(function, name, given, results, self.inputs, self.targets, note=" ".join(self.notes))

    # --- functions ----------------------------------------------------------------------------------------------------

    def draw(self) -> Case:
        """Draw a call that is right."""
        kinds = ("batch", "evaluation", "instance", "group", "layer", "rms", "l2", "other")
        kind = self.rnd.choice((*kinds, *kinds, *(f"{k} backward" for k in kinds), "moments", "object"))
        if kind == "moments":
            return self.moments()
        if kind == "object":
            return self.object()
        norm, _, backward = kind.partition(" ")
        training = norm != "evaluation"
        record = self.rnd.choice(OTHERS) if norm == "other" else record_of(norm if training else "batch")
        if record.by_channel:
            return self.over_channels(record, training, bool(backward))
        return self.over_axes(record, bool(backward))

    def problem(self, record: NormRecord) -> tuple[np.ndarray, View, dict[str, Any], tuple[int, ...]]:
        """Draw an input, and what to tell the function about it: (x, view, arguments, shape of a weight)."""
        rnd = self.rnd
        dtype = rnd.choice(self.dtypes)
        one = record.affine == "scalar"
        if not record.by_channel:
            lengths = lengths_of(rnd, 1)
            ndim = len(lengths)
            options: dict[str, Any] = {}
            axes = tuple(range(rnd.randrange(ndim), ndim))
            if self.chance(0.4):
                axes = tuple(rnd.sample(range(ndim), rnd.randint(1, ndim)))
                options["axis"] = tuple(a - ndim if self.chance(0.3) else a for a in axes)
            shape = tuple(lengths[a] for a in axes)
            options["normalized_shape"] = shape[0] if len(shape) == 1 and self.chance(0.5) else shape
            if len(axes) == 1 and "axis" in options and self.chance(0.5):
                options["axis"] = options["axis"][0]
            return self.input(dtype, lengths), axes_view(record, lengths, axes), options, () if one else shape
        lengths = lengths_of(rnd, 2)
        axis = rnd.choice((1, 1, -1, rnd.randrange(-len(lengths), len(lengths))))
        c = lengths[axis]
        groups = 1
        options = {} if axis == 1 and self.chance(0.5) else {"channel_axis": axis}
        if record.grouped:
            groups = rnd.choice([d for d in range(1, c + 1) if c % d == 0] or [1])
            options["num_groups"] = groups
        view = channel_view(record, lengths, axis, groups)
        return self.input(dtype, lengths), view, options, () if one else (c,)

    def over_axes(self, record: NormRecord, backward: bool) -> Case:
        x, view, options, shape = self.problem(record)
        mask = self.mask(x.shape) if record.takes_mask else None
        weight = self.parameter(shape)
        eps = self.eps(record)
        if backward:
            return self.backward(x, view, options, weight, mask, eps)
        bias = self.parameter(shape) if record.bias else None
        residual = self.residual(x)
        dtype = result_dtype(x.dtype)
        source = native(x)
        if residual is not None:
            with np.errstate(all="ignore"):
                source = np.add(source.astype(dtype), native(residual).astype(dtype))
        judge = Judge(source, x.dtype, view, native_mask(mask))
        judge.settle(_eps(eps, dtype))
        results = [judge.forward(native(weight), native(bias))]
        stats = self.chance(0.4)
        results += judge.statistics() if stats else []
        if residual is not None:
            results.append(Result("total", source.astype(LONG), dtype))
        out = self.out(dtype, x, residual)
        arguments = {
            "x": self.wrapped(x) if out is not x else x,
            **options,
            "weight": weight,
            "bias": bias,
            "eps": eps,
            "mask": mask,
        }
        arguments |= {"residual": residual, "out": out, "return_stats": stats}
        return self.case(*function_of(record), arguments, results)

    def over_channels(self, record: NormRecord, training: bool, backward: bool) -> Case:
        x, view, options, shape = self.problem(record)
        mask = self.mask(x.shape) if record.takes_mask else None
        weight = self.parameter(shape)
        eps = self.eps(record)
        if backward and training:
            return self.backward(x, view, options, weight, mask, eps)
        bias = self.parameter(shape) if record.bias else None
        judge = Judge(native(x), x.dtype, view, native_mask(mask) if training else None)
        moved: list[Result] = []
        function = function_of(record)
        if record.tracks:
            options["use_input_stats" if record.kind == "instance" else "training"] = training
        if not training and self.chance(0.3):
            options["use_input_stats"] = options.pop("training")
            function = nn.instance_norm, "instance_norm"
        if not training or (record.tracks and self.chance(0.5)):
            dtype = self.rnd.choice(sorted(FLOATS, key=str))
            mean = self.place(dtype, shape, self.gen.standard_normal(shape), target=training)
            var = self.place(dtype, shape, self.gen.random(shape) * 3, target=training)
            options |= {"running_mean": mean, "running_var": var}
            if training:
                options["momentum"] = self.rnd.choice((0.1, 0.1, 0.5, 0, 1.0, np.float32(0.25)))
                moved = judge.running(native(mean), native(var), options["momentum"])
        if not training:
            wide = native(var).astype(LONG)
            judge.give(native(mean), 1 / np.sqrt(wide + LONG(float(eps))))
        else:
            judge.settle(float(eps))
        if backward:
            return self.given_backward(x, view, options, weight, judge)
        stats = self.chance(0.4)
        results = [judge.forward(native(weight), native(bias)), *(judge.statistics() if stats else [])]
        if not training and stats:
            results[1:] = [
                Result("mean", native(mean).astype(LONG), np.dtype(np.float64)),
                Result(
                    "rstd", judge.rstd.reshape(shape), np.dtype(np.float64), 1e-15 * np.abs(judge.rstd.reshape(shape))
                ),
            ]
        out = self.out(result_dtype(x.dtype), x)
        arguments = {
            "x": self.wrapped(x) if out is not x else x,
            **options,
            "weight": weight,
            "bias": bias,
            "eps": eps,
            "mask": mask,
        }
        arguments |= {"out": out, "return_stats": stats}
        case = self.case(*function, arguments, results)
        case.moved = [(options[result.name], result) for result in moved]
        if training and record.tracks and x.size and judge.x.size // judge.mean.size == 1:
            case.blamed = ("x",)  # one value a channel has no variance
        return case

    def gradient(self, x: np.ndarray) -> np.ndarray:
        dtype = result_dtype(x.dtype) if self.chance(0.8) else self.rnd.choice(sorted(FLOATS, key=str))
        return (
            self.input(dtype, x.shape)
            if self.chance(0.2)
            else self.place(dtype, x.shape, self.gen.standard_normal(x.shape))
        )

    def backward(self, x: np.ndarray, view: View, options: dict[str, Any], weight: Any, mask: Any, eps: Any) -> Case:
        judge = Judge(native(x), x.dtype, view, native_mask(mask))
        judge.settle(_eps(eps, result_dtype(x.dtype)))
        for name in view.record.statistics:
            exact = np.asarray(view.public(getattr(judge, name)), np.float64)
            options[name] = self.place(np.dtype(np.float64), exact.shape, exact)
        arguments = {"x": x, **options, "weight": weight, "mask": mask}
        return self.gradients(arguments, judge, weight, False)

    def given_backward(self, x: np.ndarray, view: View, options: dict[str, Any], weight: Any, judge: Judge) -> Case:
        """Draw the gradients of an evaluation with statistics that do not depend on x."""
        mean = options.pop("running_mean")
        options.pop("running_var")
        options.pop("use_input_stats", None)
        rstd = np.asarray(judge.rstd, np.float64).reshape(mean.shape)
        arguments = {"x": x, **options, "training": False, "mean": mean, "weight": weight, "mask": self.mask(x.shape)}
        arguments["rstd"] = self.place(np.dtype(np.float64), rstd.shape, rstd)
        return self.gradients(arguments, judge, weight, True)

    def gradients(self, arguments: dict[str, Any], judge: Judge, weight: Any, fixed: bool) -> Case:
        x = arguments["x"]
        dy = self.gradient(x)
        mean = native(arguments["mean"]) if "mean" in arguments else np.zeros(1)
        judge.give(mean, native(arguments["rstd"]))
        kind = lane(x.dtype) if weight is None else weight.dtype
        results = judge.backward(native(dy), native(weight), kind, fixed)
        arguments |= {"dy": dy, "x": self.wrapped(x)}
        return self.case(*function_of(judge.view.record, backward=True), arguments, results)

    # --- objects ------------------------------------------------------------------------------------------------------

    def moments(self) -> Case:
        """Draw the moments of two batches, one after the other or added."""
        rnd = self.rnd
        lengths = lengths_of(rnd, 0)
        dtype = rnd.choice(self.dtypes)
        batches = [self.input(dtype, lengths) for _ in range(2)]
        masks = [self.mask(lengths) for _ in range(2)]
        axis: Any = None
        axes = tuple(range(len(lengths)))
        if lengths and self.chance(0.7):
            axes = axis = tuple(rnd.sample(axes, rnd.randint(1, len(axes))))
        add = self.chance(0.5)

        def function(x: Any, x2: Any, mask: Any = None, mask2: Any = None) -> Any:
            m = nn.Moments.of(x, axis, mask=mask)
            m = m + nn.Moments.of(x2, axis, mask=mask2) if add else m.update(x2, mask=mask2)
            return tuple(np.asarray(part) for part in (m.count, m.mean, m.var()))

        wide = np.stack([native(batch).astype(LONG) for batch in batches])
        counted = np.stack(
            [np.ones(lengths, bool) if mask is None else np.broadcast_to(native(mask), lengths) for mask in masks]
        )
        count, mean, m2 = moments(wide, (0, *(a + 1 for a in axes)), counted)
        kept = tuple(n for a, n in enumerate(lengths) if a not in axes)
        count, mean, m2 = (a.reshape(kept) for a in (count, mean, m2))
        judge = Judge(wide.reshape(2, -1), dtype, axes_view(record_of("layer"), (2, wide.size // 2), (0, 1)))
        largest = np.where(np.isfinite(judge.x), np.abs(judge.x), 0).max(initial=0)
        sane = np.isfinite(mean) & np.isfinite(m2)
        var = np.where(count > 0, m2 / np.maximum(count, 1), np.nan)
        deviation = np.sqrt(np.where(sane & (count > 0), var, 0))
        slack = judge.bits * largest
        number = np.dtype(np.float64)
        shown = (
            count
            if any(mask is not None for mask in masks)
            else np.asarray(count.max(initial=2 * prod(lengths[a] for a in axes)))
        )
        if not any(mask is not None for mask in masks):
            shown = np.asarray(2 * prod(lengths[a] for a in axes))
        results = [
            Result("count", shown.astype(np.int64), np.dtype(np.int64)),
            Result("mean", mean, number, np.where(sane, judge.base * deviation + 4 * slack, 0), sane),
            Result("var", var, number, 4 * (judge.base * deviation + slack) * (deviation + slack), sane),
        ]
        arguments = {"x": batches[0], "x2": batches[1], "mask": masks[0], "mask2": masks[1]}
        case = self.case(function, "Moments", arguments, results)
        case.note += f"axis={axis}, {'added' if add else 'updated'}"
        return case

    def object(self) -> Case:
        """Draw a layer: it must give what the functions give, bit by bit."""
        named = map(record_of, ("layer", "rms", "l2", "group", "instance", "batch"))
        record = self.rnd.choice((*named, self.rnd.choice(OTHERS)))
        x, view, options, shape = self.problem(record)
        del view
        if "axis" in options:
            options.pop("axis")
            options["normalized_shape"] = x.shape[-1:]
            shape = x.shape[-1:] if record.affine == "elementwise" else ()
        if 0 in x.shape:
            return self.draw()
        eps = self.eps(record)
        weight, bias = self.parameter(shape, 1.0), self.parameter(shape, 1.0)
        dy = self.gradient(x)
        mask = self.mask(x.shape) if record.takes_mask else None
        layer: Any
        channel_axis = options.get("channel_axis", 1)
        if not record.by_channel:
            layer = nn.Norm(record.kind, options["normalized_shape"], eps)
        else:
            channels = x.shape[channel_axis]
            own = (options["num_groups"], channels) if record.grouped else (channels,)
            layer = nn.Norm(record.kind, *own, eps, channel_axis=channel_axis)
        layer.weight = weight
        if record.bias:
            layer.bias = bias

        def function(x: Any, dy: Any, mask: Any = None) -> Any:
            y = layer(x, mask=mask)
            return y, layer.backward(dy), *(layer.grad[name] for name in ("weight", "bias") if name in layer.grad)

        parameters = {"weight": weight, "bias": bias} if record.bias else {"weight": weight}
        if mask is not None:
            options["mask"] = mask
        forward, back = function_of(record)[0], function_of(record, backward=True)[0]
        more = {"training": True} if record.kind == "batch" else {}
        case = self.case(function, f"{type(layer).__name__} object", {"x": x, "dy": dy, "mask": mask}, [])
        samples = x.shape[0 if channel_axis % x.ndim else 1] if record.kind == "instance" else 1
        if record.tracks and x.size // shape[0] // samples == 1:
            case.blamed = ("x",)
            return case
        y, *stats = forward(x, **options, **more, **parameters, eps=eps, return_stats=True)
        given = dict(zip(record.statistics, stats, strict=True))
        theirs = (y, *back(dy=dy, x=x, **options, **given, weight=weight))
        case.results = [
            Result(name, a, a.dtype) for name, a in zip(("y", "dx", "dweight", "dbias"), theirs, strict=False)
        ]
        return case


def native(array: Any) -> Any:
    """Return a copy in native byte order, C order; None of None."""
    return None if array is None else np.array(array, array.dtype.newbyteorder("="), order="C", copy=True)


def native_mask(mask: Any) -> Any:
    return None if mask is None else np.array(mask)


def _eps(eps: Any, dtype: np.dtype[Any]) -> float:
    if eps is not None:
        return float(eps)
    return 2.0**-7 if dtype == BFLOAT16 else float(np.finfo(dtype).eps)


def _slides(array: np.ndarray) -> bool:
    """Tell whether elements share memory."""
    reach = array.itemsize
    for n, s in sorted(zip(array.shape, array.strides, strict=True), key=lambda pair: abs(pair[1])):
        if n > 1 and abs(s) < reach:
            return True
        reach += (n - 1) * abs(s)
    return False
