"""What can be wrong with a call: one argument of a right one is spoiled, and the error must name it."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from random import Random
from typing import Any

import numpy as np
from draws import Case, native

Spoil = Callable[[Random, Any], Any]


class Refusing:
    """What says that it is an array, and then is none."""

    shape, dtype = (3,), np.dtype(np.float32)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise RuntimeError("no array today")


class Device:
    """What an array on a GPU looks like from outside."""

    shape, dtype = (4, 6), np.dtype(np.float32)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": "<f4", "data": (0, False), "version": 3}


def _shape_of(value: Any) -> tuple[int, ...]:
    return value.shape if isinstance(value, np.ndarray) else (3, 4)


NOT_NUMBERS: tuple[Spoil, ...] = (
    lambda r, a: np.zeros(_shape_of(a), r.choice((np.complex64, np.complex128))),
    lambda r, a: np.zeros(_shape_of(a), object),
    lambda r, a: np.full(_shape_of(a), r.choice(("a", b"a", "nan"))),
    lambda r, a: np.zeros(_shape_of(a), r.choice(("M8[s]", "m8[ns]"))),
    lambda r, a: np.zeros(_shape_of(a), [("real", np.float32), ("more", np.int8)]),
    lambda r, a: np.zeros(_shape_of(a), [("real", np.float32)]).view(np.recarray),
    lambda r, a: np.zeros(_shape_of(a), "V4"),
    lambda r, a: np.zeros(_shape_of(a), np.longdouble),
    lambda r, a: np.zeros(_shape_of(a), np.dtypes.StringDType()),
    lambda r, a: np.ma.masked_array(np.zeros(_shape_of(a), np.float32), np.zeros(_shape_of(a), bool)),
    lambda r, a: np.broadcast_to(np.complex64(1), (1 << 20, 1 << 20)),
    lambda r, a: np.broadcast_to(np.array(None), (1 << 20, 1 << 20)),
    lambda r, a: r.choice(("words", b"words", {"a": 1}, {1, 2}, range, object(), ..., 1j, Decimal("1.5"))),
    lambda r, a: [[1.0, 2.0], [3.0]],
    lambda r, a: iter([1.0, 2.0]),
    lambda r, a: Refusing(),
    lambda r, a: Device(),
)


def _not_integer(r: Random) -> Any:
    return r.choice((1.0, "1", True, 1j, [1.5], {}, np.float64(1), np.array([1]), Decimal(1), b"1"))


def _not_number(r: Random) -> Any:
    return r.choice(("1e-5", True, 1j, [1e-5], np.array([1e-5]), Decimal("1e-5"), b"1", {}))


def _spoil_output(r: Random, case: Case, out: np.ndarray) -> tuple[Any, tuple[str, ...]]:
    shape, dtype = out.shape, out.dtype
    kinds: list[Callable[[], Any]] = [
        lambda: np.ones((*shape, 1), dtype),
        lambda: np.ones((*shape[:-1], shape[-1] + 1), dtype),
        lambda: np.ones(shape, r.choice([kind for kind in ("f2", "f4", "f8", "i4", "c8") if np.dtype(kind) != dtype])),
        lambda: np.ones(shape, object),
        lambda: np.ma.masked_array(np.ones(shape, dtype)),
        lambda: np.ones(shape, dtype).tolist(),
        lambda: r.choice((True, "out", 3, ())),
        lambda: Device(),
    ]
    if dtype.kind == "f":
        kinds.append(lambda: np.ones(shape, dtype.newbyteorder()))
    if out.size:
        kinds.append(lambda: _read_only(np.ones(shape, dtype)))
    if out.size > 1:
        # Two elements on one place: backwards and forwards, as a window that slides, or all on one.
        kinds.append(lambda: np.lib.stride_tricks.as_strided(np.ones(1, dtype), shape, (0,) * len(shape)))
        if shape[-1] > 1 and shape[0] > 1 and len(shape) > 1:
            step = dtype.itemsize
            room = np.ones(sum(shape), dtype)
            sliding = (step, *(0,) * (len(shape) - 2), step)
            if all(n == 1 for n in shape[1:-1]):
                kinds.append(lambda: np.lib.stride_tricks.as_strided(room, shape, sliding))
    x = case.arguments["x"]
    turned = isinstance(x, np.ndarray) and x.size > 1 and x.dtype == dtype and x.dtype.isnative
    if turned and x.flags.carray and max(shape) > 1:
        kinds.append(lambda: x[tuple(slice(None, None, -1) for _ in shape)])
        kinds += [lambda: _beside(case, x)] * 4
    return r.choice(kinds)(), ("out",)


def _beside(case: Case, x: np.ndarray) -> np.ndarray:
    """Return an array that lies as `x` does, but an element further on, or before."""
    memory = next(placed.region.bytes for placed in (*case.inputs, *case.targets) if placed.array is x)
    at = x.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
    at += x.itemsize if at + x.nbytes + x.itemsize <= memory.size else -x.itemsize
    return np.ndarray(x.shape, x.dtype, memory, at)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


def spoil(r: Random, case: Case) -> bool:
    """Make a right call wrong in one way, and tell who is to blame; return False where nothing was found."""
    a = case.arguments
    name = r.choice(list(a))
    value = a[name]
    new: Any = None
    blamed: tuple[str, ...] = (name,)
    if name == "out":
        new, blamed = _spoil_output(r, case, value)
    elif name in ("x", "x2", "dy", "residual"):
        if name == "x2":
            blamed = ("x",)
        if case.name.endswith("object"):  # what has another number of axes may lack the layer's
            blamed += ("channel_axis",)
        if name in ("x", "x2") or r.random() < 0.7 or not isinstance(value, np.ndarray):
            new = r.choice(NOT_NUMBERS)(r, value)
        elif name == "dy" and r.random() < 0.3:
            new = np.ones(value.shape, r.choice((np.int32, bool, np.uint8)))
        elif name == "residual" and r.random() < 0.3:
            new = np.ones(value.shape, r.choice([k for k in (np.float32, np.float64, np.int8) if k != value.dtype]))
        else:
            new = np.ones((*value.shape, 2), native(value).dtype)
    elif name in ("weight", "bias", "running_mean", "running_var", "mean", "rstd"):
        wrong: list[Any] = [np.ones((*value.shape, 2), np.float32)]
        wrong += [np.ones((*value.shape[:-1], value.shape[-1] + 1) if value.ndim else (1,))]
        wrong += [np.ones(value.shape, r.choice((np.int64, bool, complex, object, "U1", "M8[s]", np.longdouble)))]
        wrong += [np.ma.masked_array(np.ones(value.shape)), Device(), "words", {}]
        writes = name.startswith("running") and (a.get("training") or a.get("use_input_stats"))
        if writes:
            wrong += [[0.5] * value.size, _read_only(np.ones(value.shape))]
            if value.size > 1:
                wrong += [np.lib.stride_tricks.as_strided(np.ones(1), value.shape, (0,))]
                wrong += [a["running_var" if name == "running_mean" else "running_mean"]]
            blamed += ("running_mean", "running_var")
        new = r.choice(wrong)
    elif name in ("mask", "mask2"):
        if "dy" in a and a.get("training") is False:  # nobody looks at it
            return False
        x = a["x"]
        exported = hasattr(x, "__dlpack__") and not hasattr(x, "shape")
        shape = np.from_dlpack(x).shape if exported else x.shape if hasattr(x, "shape") else np.shape(x)
        wrong = [np.ones(np.shape(value), kind) for kind in (np.uint8, np.float32, object)]
        wrong += [np.ones((2, *shape), bool), np.ones((*shape, shape[-1] + 2 if shape else 2), bool), Device(), "mask"]
        wrong += [np.ma.masked_array(np.ones(shape, bool)), [[True], [True, False]]]
        new = r.choice(wrong)
        blamed = ("mask",)
    elif name == "eps":
        new = r.choice((-1e-5, float("nan"), float("inf"), -(10**400), 10**400, _not_number(r)))
    elif name == "momentum":
        new = r.choice((float("nan"), float("inf"), 10**400, _not_number(r)))
    elif name in ("channel_axis", "num_groups", "normalized_shape", "axis"):
        huge = (2**31, 2**63, 2**70, -(2**63), -(2**70), 99, -99)
        new = r.choice((*huge, _not_integer(r), None if name != "axis" else "1"))
        if name in ("normalized_shape", "axis") and r.random() < 0.3:
            new = (r.choice((*huge, _not_integer(r))),)
        if new is None:
            new = "none"
        blamed = (name, "x")
        if name == "num_groups" and (new == 1 or 0 in np.shape(a["x"])):  # any number of groups divides no channels
            return False
    else:
        return False
    a[name] = new
    case.blamed = blamed
    case.note += f" wrong {name}"
    return True
