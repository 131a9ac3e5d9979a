"""What the simulator replaces: loads, stores and lanes, as LLVM instructions, run on the CPU against NumPy.

The instructions are those that a kernel is made of. Addresses in the GPU's memory are addresses in ours here.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

toolchain = pytest.importorskip("numbanorm.cuda.toolchain", exc_type=ImportError)
ml_dtypes = pytest.importorskip("ml_dtypes")
if toolchain.SIMULATED:
    pytest.skip("the simulator has functions of its own in their place", allow_module_level=True)

import llvmlite.binding as llvm  # noqa: E402
import numpy as np  # noqa: E402
from llvmlite import ir  # noqa: E402
from numba.cuda import types  # noqa: E402

from numbanorm.cuda import affine, lanes, memory  # noqa: E402
from numbanorm.cuda.lanes import Choice, Lanes  # noqa: E402

HALVES_NEED = "f16c" if llvm.get_process_triple().startswith("x86") else ""
FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()


class _Context:
    """What the instructions ask of Numba's context."""

    def get_dummy_value(self) -> None:
        return None

    def get_value_type(self, kind: Any) -> Any:
        if isinstance(kind, Lanes):
            return ir.VectorType(lanes.LLVM[kind.element], kind.width)
        return lanes.LLVM[kind]


def element_of(kind: Any) -> Any:
    return ir.IntType(1) if isinstance(kind, Choice) else lanes.LLVM[kind.element]


def run(function: Any, *arguments: Any) -> Any:
    """Run an intrinsic: integers, NumPy scalars and, for lanes, (kind, array); return its result likewise."""
    kinds = [a[0] if isinstance(a, tuple) else types.int64 if isinstance(a, int) else _kind(a) for a in arguments]
    signature, generate = function._defn(None, *kinds)
    module = ir.Module()
    made = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.IntType(64)]), "run")
    builder = ir.IRBuilder(made.append_basic_block())
    values, kept = [], []
    for argument, kind in zip(arguments, kinds, strict=True):
        if isinstance(argument, int):
            values.append(ir.Constant(ir.IntType(64), argument))
        elif isinstance(argument, tuple):
            array = np.ascontiguousarray(argument[1])
            kept.append(array)
            values.append(_load(builder, array, kind))
        else:
            values.append(ir.Constant(lanes.LLVM[kind], float(argument)))
    result = generate(_Context(), builder, signature, values)
    out = np.zeros(64, np.uint64)
    if result is not None:
        if isinstance(result.type, ir.IntType) and result.type.width == 1:
            result = builder.zext(result, ir.IntType(8))
        if isinstance(result.type, ir.VectorType) and result.type.element == ir.IntType(1):
            result = builder.zext(result, ir.VectorType(ir.IntType(8), result.type.count))
        pointer = builder.inttoptr(ir.Constant(ir.IntType(64), out.ctypes.data), result.type.as_pointer())
        builder.store(result, pointer, align=1)
    builder.ret_void()
    _execute(module)
    return None if result is None else _read(out, result.type)


def _kind(value: Any) -> Any:
    return types.float32 if isinstance(value, np.float32) else types.float64


def _load(builder: Any, array: np.ndarray, kind: Any) -> Any:
    """Load lanes from an array, which must outlive the call."""
    stored = ir.VectorType(ir.IntType(8) if isinstance(kind, Choice) else element_of(kind), len(array))
    pointer = builder.inttoptr(ir.Constant(ir.IntType(64), array.ctypes.data), stored.as_pointer())
    value = builder.load(pointer, align=1)
    return builder.trunc(value, ir.VectorType(ir.IntType(1), len(array))) if isinstance(kind, Choice) else value


def _read(out: np.ndarray, kind: Any) -> np.ndarray:
    count = kind.count if isinstance(kind, ir.VectorType) else 1
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    dtype = {"float": np.float32, "double": np.float64, "i8": np.uint8}[str(element)]
    values = out.view(dtype)[:count].copy()
    return values if isinstance(kind, ir.VectorType) else values[0]


def _execute(module: ir.Module) -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    if "half" in str(module) and HALVES_NEED and not features.get(HALVES_NEED):
        pytest.skip("this CPU cannot convert float16")
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten()
    )
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    with llvm.create_mcjit_compiler(parsed, machine) as engine:
        engine.finalize_object()
        ctypes.CFUNCTYPE(None, ctypes.c_int64)(engine.get_function_address("run"))(0)


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def aligned(size: int, dtype: Any) -> np.ndarray:
    """Return an array at an address of 64 bytes' alignment."""
    dtype = np.dtype(dtype)
    raw = np.zeros(size * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size * dtype.itemsize].view(dtype)


def numbers(size: int, dtype: Any) -> np.ndarray:
    array = aligned(size, dtype)
    values = np.random.default_rng(5).standard_normal(size) * 50
    array[...] = (values > 0) if array.dtype == bool else np.abs(values).astype(array.dtype)
    return array


RUN, STRIDE = 3, 40  # pieces a run; elements from one run or row to the next


def places(rule: str, vector: int, loads: int, p: int, step: int, limit: int) -> list[tuple[bool, int, int, int]]:
    """Return (there, offset, row, offset within the row) of each piece, by the rules of `memory`."""
    result = []
    for q in range(p, p + loads * step, step):
        row, within = {
            "flat": (0, q * vector),
            "whole": (0, q * vector),
            "runs": (q // RUN, q % RUN * vector),
            "rows": (q, 0),
        }[rule]
        result.append(((p if rule == "whole" else q) < limit, row * STRIDE + within, row, within))
    return result


def wide(name: str) -> bool:
    return name in ("float64", "int32", "uint32", "int64", "uint64")


def lane_of(name: str) -> tuple[Any, Any]:
    return (types.float64, np.float64) if wide(name) else (types.float32, np.float32)


@pytest.fixture(autouse=True)
def _no_instruction_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round to bfloat16 in integers: the instruction that the kernels use is none of this CPU."""

    def rounded_pair(builder: Any, low: Any, high: Any) -> Any:
        def constant(value: int) -> Any:
            return ir.Constant(ir.IntType(32), value)

        words = []
        for value in (low, high):
            bits = builder.bitcast(value, ir.IntType(32))
            odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
            up = builder.add(builder.add(bits, constant(0x7FFF)), odd)
            nan = builder.fcmp_unordered("uno", value, value)
            words.append(builder.lshr(builder.select(nan, constant(0x7FFF0000), up), constant(16)))
        return builder.or_(builder.shl(words[1], constant(16)), words[0])

    monkeypatch.setattr(memory, "_rounded_pair", rounded_pair)


NAMES = ["float32", "float64", "float16", "bfloat16", "bool", "int8", "uint8", "int16", "uint16", "int32", "uint64"]


@pytest.mark.parametrize("rule", ["flat", "whole", "runs", "rows"])
@pytest.mark.parametrize("name", NAMES)
def test_loads(name: str, rule: str) -> None:
    lane, scalar = lane_of(name)
    data = numbers(600, dtype_of(name))
    for vector in {1, 2, 16 // max(data.itemsize, 2)}:
        p, step, limit, loads = 1, 2, 5, 4
        found = run(memory.loader(name, lane, vector, loads, rule), data.ctypes.data, p, step, limit, RUN, STRIDE)
        parts = [
            data[at : at + vector].astype(scalar) if there else np.zeros(vector, scalar)
            for there, at, _, _ in places(rule, vector, loads, p, step, limit)
        ]
        assert found.dtype == scalar
        assert (found == np.concatenate(parts)).all()
        # As it is stored, and then cut.
        place = data.ctypes.data, p, step, limit, RUN, STRIDE
        raw = run(memory.raw_loader(name, lane, vector, loads, rule), *place)
        unpack = memory.unpacker(name, lane, vector, loads)
        assert (run(unpack, (Lanes(lane, len(raw)), raw)) == found).all()


@pytest.mark.parametrize("rule", ["flat", "whole", "runs", "rows"])
@pytest.mark.parametrize("name", NAMES[:4])
def test_stores(name: str, rule: str) -> None:
    lane, scalar = lane_of(name)
    for vector in {1, 2, 16 // dtype_of(name).itemsize}:
        p, step, limit, loads = 1, 2, 5, 4
        data, expected = numbers(600, dtype_of(name)), numbers(600, dtype_of(name))
        values = (np.random.default_rng(1).standard_normal(vector * loads) * 7).astype(scalar)
        values[0] = np.nan
        lanes_given = Lanes(lane, vector * loads), values
        run(memory.storer(name, lane, vector, loads, rule), data.ctypes.data, p, step, limit, RUN, STRIDE, lanes_given)
        for i, (there, at, _, _) in enumerate(places(rule, vector, loads, p, step, limit)):
            if there:
                expected[at : at + vector] = values[i * vector : (i + 1) * vector].astype(expected.dtype)
        assert np.array_equal(data.astype(float), expected.astype(float), equal_nan=True)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_rounding(name: str) -> None:
    """To nearest, ties to even, infinities and NaN kept: as ml_dtypes and NumPy round."""
    rng = np.random.default_rng(0)
    for _ in range(8):
        values = rng.integers(0, 2**32, 32, np.uint32).view(np.float32)
        ties = (rng.integers(0, 2**16, 32, np.uint32) << 16 | 0x8000).astype(np.uint32).view(np.float32)
        for given in (values, ties, np.array([np.inf, -np.inf, np.nan, 0, -0.0, 1e-40, 65519, 65520] * 4, np.float32)):
            found = run(memory.rounder(name, types.float32, 32), (Lanes(types.float32, 32), given))
            with np.errstate(over="ignore", invalid="ignore"):
                expected = given.astype(dtype_of(name)).astype(np.float32)
            assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize("rule", ["flat", "runs", "rows"])
@pytest.mark.parametrize("kind", ["all", "elements", "runs"])
def test_masks(kind: str, rule: str) -> None:
    mask = numbers(600, bool)
    for vector in (1, 2, 4, 8):
        p, step, limit, loads = 0, 3, 6, 4
        found = run(memory.chooser(kind, vector, loads, rule), mask.ctypes.data, p, step, limit, RUN, STRIDE)
        expected = []
        for there, at, row, _ in places(rule, vector, loads, p, step, limit):
            given = {
                "all": np.ones(vector),
                "elements": mask[at : at + vector],
                "runs": mask[row * STRIDE].repeat(vector),
            }
            expected.append(given[kind] if there else np.zeros(vector))
        assert (found == np.concatenate(expected)).all()


@pytest.mark.parametrize("vector", [1, 4, 8])
@pytest.mark.parametrize("rule", ["flat", "whole", "runs", "rows"])
@pytest.mark.parametrize("kind", ["along", "shared", "piece", "element"])
@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16"])
def test_weights(kind: str, rule: str, name: str, vector: int) -> None:
    stored = "" if name != "bfloat16" else name
    name = "float32" if stored else name
    lane, scalar = lane_of(name)
    weights, biases = (numbers(600, dtype_of(stored or name)) for _ in range(2))
    biases[...] = biases[::-1].copy()
    p, step, limit, loads, inner, size, start = 1, 2, 5, 4, 8, 11, 48
    place = p, step, limit, RUN, STRIDE

    def expected(of: np.ndarray, first: int) -> np.ndarray:
        parts = []
        for there, at, _, within in places(rule, vector, loads, p, step, limit):
            lone = np.arange(vector) if kind == "element" else np.zeros(vector, int)
            index = (start + at + lone) // inner % size
            if kind == "along":
                index = first + within + np.arange(vector)
            elif kind == "shared":
                index = np.full(vector, start // inner % size)
            parts.append(of[index] if there or kind == "shared" else np.zeros(vector))
        return np.concatenate(parts)

    gather = affine.gatherer(kind, lane, vector, loads, rule, stored)
    found = run(gather, weights.ctypes.data, start, *place, inner, size)
    weights_given, biases_given = weights, biases
    weights, biases = weights.astype(scalar), biases.astype(scalar)
    assert (found == expected(weights, start)).all()
    out = aligned(600, scalar)
    values = np.arange(1, vector * loads + 1).astype(scalar)
    store = affine.affine_storer(name, lane, vector, loads, rule, kind, kind, stored)
    given = (Lanes(lane, vector * loads), values)
    sources = weights_given.ctypes.data, biases_given.ctypes.data
    run(store, out.ctypes.data, *place, given, *sources, start, STRIDE, inner, size)
    wanted = values * expected(weights, start % size) + expected(biases, start % size)
    written = np.zeros(600, bool)
    for i, (there, at, _, _) in enumerate(places(rule, vector, loads, p, step, limit)):
        if there:
            assert np.allclose(out[at : at + vector], wanted[i * vector : (i + 1) * vector], rtol=1e-6)
            written[at : at + vector] = True
    assert not out[~written].any()


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("lane", [types.float32, types.float64], ids=str)
def test_lanes(lane: Any, width: int) -> None:
    scalar = np.float32 if lane == types.float32 else np.float64
    values = np.random.default_rng(2).standard_normal(16).astype(scalar)
    chosen = np.random.default_rng(3).random(16) < 0.4
    chosen[width:8] = False
    given, choice = (Lanes(lane, 16), values), (Choice(16), chosen.astype(np.uint8))
    rows, marks = values.reshape(-1, width), chosen.reshape(-1, width)
    assert np.allclose(run(lanes.fold(width), given), rows.sum(0) if width > 1 else values.sum(), rtol=1e-5)
    assert (run(lanes.count(width, lane), choice) == (marks.sum(0) if width > 1 else chosen.sum())).all()
    first = np.where(marks.any(0), rows[marks.argmax(0), np.arange(width)], 0)
    assert (run(lanes.first(width), choice, given) == first).all()
    assert (run(lanes.choose, choice, given) == np.where(chosen, values, 0)).all()
    other = (Lanes(lane, 16), -values)
    assert (run(lanes.pick, choice, given, other) == np.where(chosen, values, -values)).all()
    assert (run(lanes.like, given, scalar(3)) == np.full(16, 3)).all()
    assert bool(run(lanes.some, choice)) == chosen.any()
    assert not run(lanes.some, (Choice(16), np.zeros(16, np.uint8)))
    small = values[:width] if width > 1 else values[0]
    tiled = run(lanes.tile(16), (Lanes(lane, width), small) if width > 1 else small)
    assert (tiled == np.tile(np.atleast_1d(small), 16 // width)).all()
    turn = lanes.widened if lane == types.float32 else lanes.narrowed
    assert (run(turn, given) == values.astype(np.float64 if lane == types.float32 else np.float32)).all()


def test_numbers() -> None:
    data = numbers(8, np.float64)
    assert run(memory.read_number, data.ctypes.data, 5) == data[5]
    run(memory.write_number, data.ctypes.data, 3, np.float64(2.5))
    assert data[3] == 2.5


def test_inverses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps that refine what the GPU approximates, from a guess with 20 bits."""

    def guess(builder: Any, instruction: str, value: Any) -> Any:
        if "rsqrt" in instruction:
            kind = ir.FunctionType(DOUBLE, [DOUBLE])
            value = builder.call(ir.Function(builder.module, kind, "llvm.sqrt.f64"), [value])
        exact = builder.fdiv(ir.Constant(value.type, 1.0), value)
        if value.type == FLOAT:
            return exact
        mask = ir.Constant(ir.IntType(64), ~((1 << 32) - 1))
        return builder.bitcast(builder.and_(builder.bitcast(exact, ir.IntType(64)), mask), DOUBLE)

    monkeypatch.setattr(lanes, "_approximate", guess)
    for x in (1.0, 3.0, 7e-12, 1e300, 1e-300, 12345.678):
        assert abs(run(lanes.inverse, np.float64(x)) * x - 1) < 1e-15
        assert abs(run(lanes.inverse_root, np.float64(x)) * np.sqrt(x) - 1) < 1e-15
    assert run(lanes.inverse_root, np.float64(0)) == np.inf
    assert run(lanes.inverse_root, np.float64(np.inf)) == 0
    assert np.isnan(run(lanes.inverse_root, np.float64(np.nan)))
    assert (
        run(lanes.inverse, (Lanes(types.float32, 4), np.array([1, 2, 4, 8], np.float32))) == [1, 0.5, 0.25, 0.125]
    ).all()
