"""Every kind of kernel compiled for three GPUs that need not be there: registers, spills, loads, float64.

The choices are those that the launch tables make for real shapes, each step of the ladders among them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

toolchain = pytest.importorskip("numbanorm.cuda.toolchain", exc_type=ImportError)
if toolchain.SIMULATED:
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

from compiled import ARCHITECTURES, Compiled, compiled  # noqa: E402

from numbanorm.core.norms import record_of  # noqa: E402
from numbanorm.core.plan import Plan, plan  # noqa: E402
from numbanorm.cuda import columns, columns_backward, launch, launch_backward, rows, rows_backward, rows_fused, sums  # noqa: E402  # noqa: E402
from numbanorm.cuda.launch import Call, Columns, Rows  # noqa: E402
from numbanorm.cuda.launch_backward import Backward  # noqa: E402

WIDTHS = [rung.elements for rung in launch.LADDER]
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


def plan_of(
    norm: str, shape: tuple[int, ...], dtype: str, masked: bool = False, back: bool = False, **how: Any
) -> Plan:
    strides = tuple(SIZES[dtype] * _product(shape[i + 1 :]) for i in range(len(shape)))
    mask = tuple(s // SIZES[dtype] for s in strides) if masked else None
    options = how.get("channel_axis", 1), how.get("num_groups"), how.get("axis")
    x = (strides, SIZES[dtype])
    return plan(norm, options, shape, x, x if back else None, mask, back)


def _product(numbers: tuple[int, ...]) -> int:
    result = 1
    for n in numbers:
        result *= n
    return result


def rows_choices() -> Iterator[Any]:
    """Yield what the rows kernel is compiled for: (its name, its choice)."""

    def one(norm: str, shape: tuple[int, ...], dtype: str, part: Any = ("x", "stats", True), **how: Any) -> Rows:
        call = Call(dtype, dtype, True, record_of(norm).bias, how.pop("masked", False), how.pop("added", False))
        call = call._replace(low=(how.pop("low"),) * 7 if "low" in how else ())
        return launch.rows(plan_of(norm, shape, dtype, call.mask, **how), call, *part).choice

    for width in WIDTHS:
        yield one("layer", (4096, width), "float32", axis=(1,))
    for dtype in ("bfloat16", "float16"):
        yield one("rms", (4096, 1024), dtype, axis=(1,))
        yield one("layer", (4096, 8192), dtype, axis=(1,))
    yield one("layer", (4096, 16384), "bfloat16", axis=(1,), masked=True, added=True)
    yield one("layer", (4096, 8192), "float64", axis=(1,))
    yield one("layer", (4096, 4096), "float32", axis=(1,), low=4)
    yield one("layer", (4096, 16384), "float32", axis=(1,), low=4, masked=True)
    yield one("layer", (4096, 1024), "float32", axis=(1,), masked=True, added=True)
    yield one("layer", (4096, 65536), "float32", axis=(1,))
    yield one("group", (64, 64, 56, 56), "float32", num_groups=8)
    yield one("group", (64, 64, 4, 4), "bfloat16", num_groups=8)
    yield one("group", (64, 512, 64), "float32", num_groups=2, channel_axis=2)
    yield one("instance", (64, 64, 56, 56), "float32")
    for part in (
        ("x", "table", False),
        ("table", "stats", True),
        ("table", "stats", False),
        ("stats", "nowhere", True),
    ):
        yield one("batch", (64, 64, 56, 56), "float32", part)
    yield one("batch", (64, 64, 56, 56), "bfloat16", ("x", "table", False), masked=True)
    for width in (1024, 8192, 65536):
        yield one("l2", (4096, width), "float32", axis=(1,))
    yield one("l2", (4096, 16384), "bfloat16", axis=(1,))
    yield one("l2", (8, 1 << 20), "float64", ("table", "stats", True), axis=(1,))


def columns_choices() -> Iterator[tuple[str, Columns]]:
    """Yield what the columns kernels are compiled for: (part, choice)."""
    for dtype in ("float32", "bfloat16", "float64"):
        for part in ("moments", "apply", "sums", "emit"):
            call = Call(dtype, dtype, True, True)
            yield part, launch.columns(plan_of("batch", (65536, 256), dtype), call, part).choice
    call = Call("float32", "float32", True, True)
    for part in ("moments", "apply", "sums", "emit"):
        masked = plan_of("layer", (64, 256, 3136), "float32", True, axis=(1,))
        yield part, launch.columns(masked, call._replace(mask=True), part).choice
        odd = plan_of("group", (64, 3136, 12), "float32", num_groups=4, channel_axis=2)
        yield part, launch.columns(odd, call._replace(low=(4,) * 7), part).choice
    for dtype in ("float32", "bfloat16", "float64"):
        yield "sums", launch.columns(plan_of("l2", (65536, 256), dtype, axis=(0,)), Call(dtype, dtype), "sums").choice


def backward_choices() -> Iterator[tuple[str, Backward]]:
    """Yield what the backward kernels of rows are compiled for: (part, choice)."""

    def parts(norm: str, shape: tuple[int, ...], dtype: str, **how: Any) -> Iterator[tuple[str, Backward]]:
        call = Call(dtype, dtype, True, mask=how.pop("masked", False), low=how.pop("low", ()))
        clusters = how.pop("clusters", False)
        made = launch_backward.rows_backward(plan_of(norm, shape, dtype, call.mask, True, **how), call, clusters)
        return ((name, part.choice) for name, part in made.parts.items())

    for rung in launch_backward.FUSED:
        yield from parts("layer", (4096, rung.elements), "float32", axis=(1,))
    yield from parts("layer", (4096, 8192), "bfloat16", axis=(1,), masked=True)
    yield from parts("rms", (4096, 4096), "float16", axis=(1,))
    yield from parts("layer", (4096, 4096), "float64", axis=(1,))
    yield from parts("layer", (4096, 2048), "float32", axis=(1,), low=(4,) * 7)
    for clusters in (False, True):
        yield from parts("layer", (4096, 65536), "float32", axis=(1,), clusters=clusters)
        yield from parts("layer", (4096, 65536), "bfloat16", axis=(1,), masked=True, clusters=clusters)
        yield from parts("layer", (4096, 16384), "bfloat16", axis=(1,), clusters=clusters)
    yield from parts("group", (64, 64, 56, 56), "float32", num_groups=8)
    yield from parts("batch", (64, 64, 56, 56), "bfloat16")
    for width in (1024, 4096, 8192):
        yield from parts("l2", (4096, width), "float32", axis=(1,))
    yield from parts("l2", (4096, 4096), "float64", axis=(1,))
    for clusters in (False, True):
        yield from parts("l2", (4096, 16384), "bfloat16", axis=(1,), clusters=clusters)


KERNELS = {
    "moments": columns.moments_kernel,
    "apply": columns.apply_kernel,
    "emit": lambda c: columns_backward.emit_kernel(c, False),
    "fused": rows_fused.fused_kernel,
    "lanes": rows_backward.lanes_kernel,
}


def kernel_of(part: str, choice: Any) -> toolchain.Kernel:
    if isinstance(choice, Rows):
        return rows.kernel(choice)
    if isinstance(choice, Backward):
        return {"sums": rows_backward.sums_kernel, "emit": rows_backward.emit_kernel, **_OF_ROWS}[part](choice)
    return {**KERNELS, "sums": columns_backward.sums_kernel}[part](choice)


_OF_ROWS = {"fused": rows_fused.fused_kernel, "lanes": rows_backward.lanes_kernel}


@cache
def built(part: str, choice: Any, architecture: tuple[int, int]) -> Compiled:
    return compiled(kernel_of(part, choice), architecture)


CHOICES = list(
    dict.fromkeys(
        [("rows", choice) for choice in rows_choices()] + [*columns_choices()] + [*backward_choices()],
    )
)
MERGES = {
    "close": lambda: columns.close_kernel(32, 128),
    "close, l2": lambda: columns.close_kernel(32, 128, "l2"),
    "groups": lambda: sums.groups_kernel(512, 512, False, True, True),
    "groups, l2": lambda: sums.groups_kernel(512, 512, False, True, False, "l2"),
    "weights": lambda: sums.weights_kernel(512, 512, False),
    "slabs": lambda: sums.slabs_kernel(False),
    "row sums": lambda: columns_backward.rows_kernel(Backward("float32", "float32", False, 4, 2, 512, 512)),
}


def name_of(value: Any) -> str:
    if isinstance(value, str):
        return value
    own = [v for k, v in value._asdict().items() if v != value._field_defaults.get(k, None) and v is not False]
    return "-".join(map(str, own))


FIRST = dict(reversed([((part, choice.source), choice) for part, choice in CHOICES]))
"""The first choice of each part and dtype: the newest architecture differs from the one before it in nothing told."""
BUILDS = [
    pytest.param(
        part, choice, architecture, id=f"{name_of(part)}-{name_of(choice)}-sm_{architecture[0]}{architecture[1]}"
    )
    for part, choice in CHOICES
    for architecture in ARCHITECTURES
    if architecture < ARCHITECTURES[-1] or choice is FIRST[part, choice.source]
]
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: f"sm_{a[0]}{a[1]}")


@pytest.mark.parametrize(("part", "choice", "architecture"), BUILDS)
def test_registers(part: str, choice: Any, architecture: tuple[int, int]) -> None:
    kernel = kernel_of(part, choice)
    if kernel.cluster > 1 and architecture < (9, 0):
        pytest.skip("has no clusters")
    result = built(part, choice, architecture)
    # On sm_80, 512 threads that hold 8192 elements of four arrays lack 30 registers of their 128.
    most = 400 if architecture < (9, 0) and part == "fused" and choice.block == 512 else 0
    assert result.spilled <= most, result.log
    assert most or not [i for i in result.instructions if i.startswith(("ld.local", "st.local"))]
    assert result.registers <= kernel.registers_on(architecture)
    assert result.registers * kernel.threads <= toolchain.REGISTERS
    assert result.shared <= 48 * 1024


@every_architecture
@pytest.mark.parametrize("name", MERGES)
def test_registers_of_merges(name: str, architecture: tuple[int, int]) -> None:
    kernel = MERGES[name]()
    result = compiled(kernel, architecture)
    assert result.spilled == 0, result.log
    assert result.registers * kernel.threads <= toolchain.REGISTERS


WIDE_LOADS = {"ld.global.v4.f32", "ld.global.v4.u32", "ld.global.v4.b32", "ld.global.v2.f64", "ld.global.v2.b64"}
WIDE_STORES = {name.replace("ld.", "st.") for name in WIDE_LOADS}


@pytest.mark.parametrize(
    ("part", "choice"), [(p, c) for p, c in CHOICES if c.vector * SIZES[c.source] == 16], ids=name_of
)
def test_loads_and_stores_of_128_bits(part: str, choice: Any) -> None:
    """Where alignment allows, every load of x and dy and every store of y and dx is one of 128 bits."""
    size = SIZES[choice.source]
    result = built(part, choice, (9, 0))
    loads = [i for i in result.instructions if i in WIDE_LOADS]
    stores = [i for i in result.instructions if i in WIDE_STORES]
    arrays = 2 if part in ("fused", "sums", "emit", "lanes") else 1
    if getattr(choice, "takes", "") == "table" and not choice.writes:
        arrays = 0
    assert len(loads) >= arrays * choice.loads
    if getattr(choice, "writes", part not in ("sums", "moments")):
        assert len(stores) >= choice.loads
    for instruction in result.instructions:
        if instruction.startswith(("ld.global", "st.global")) and instruction not in WIDE_LOADS | WIDE_STORES:
            # Statistics, one weight for many elements, a pivot, truth values of a mask.
            narrow = {"f64", "b64"} if size < 8 else set()
            lone = {"f32", "b32", "u32"} if getattr(choice, "weights", "") != "along" else {"f32", "b32"}
            lone |= {"u16", "b16"} if size == 2 else set()  # the pivot
            masks = {"u8", "b8", "u16", "b16", "u32", "b32", "u64"} if choice.mask != "all" else set()
            assert instruction.rsplit(".", 1)[1] in narrow | lone | masks | {"f64", "b64", "u64"}, instruction


def loops(result: Compiled) -> Iterator[list[str]]:
    """Yield the instructions of every innermost loop."""
    body = result.ptx.splitlines()
    labels = {m[1]: i for i, line in enumerate(body) if (m := re.match(r"\s*(\$L\w+):", line))}
    spans = []
    for i, line in enumerate(body):
        for target in re.findall(r"\bbra(?:\.uni)?\s+(\$L\w+)", line):
            if labels[target] <= i:
                spans.append((labels[target], i))
    for start, end in spans:
        if not any((a, b) != (start, end) and a >= start and b <= end for a, b in spans):
            yield body[start : end + 1]


def reads_elements(lines: list[str]) -> bool:
    return any(re.search(r"ld\.global\.(v4\.[fub]32|v2\.b64|[fu]32|b32)\b", line) for line in lines)


NARROW = [(part, choice) for part, choice in CHOICES if not choice.wide]


OVER_ROWS = ("fused", "lanes")  # their loops are over rows, and read statistics in float64 once a row


@pytest.mark.parametrize(("part", "choice"), [(p, c) for p, c in NARROW if p not in OVER_ROWS], ids=name_of)
def test_no_float64_in_loops_over_elements(part: str, choice: Any) -> None:
    """Loops that read float32 or half elements have no float64."""
    for body in loops(built(part, choice, (9, 0))):
        if reads_elements(body):
            assert not [line for line in body if ".f64" in line], "\n".join(body)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("part", ["rows", "fused", "moments", "sums", "emit"])
def test_float64_is_for_scalars(part: str, count: int) -> None:
    """A tile twice as large has not one float64 instruction more (fewer, where other loops are unrolled less)."""
    choices = [choice for name, choice in NARROW if name == part and choice.vector == 4 and choice.loads == 4]
    choices = [c for c in choices if isinstance(c, Rows | Backward | Columns)][:1]
    assert choices
    (choice,) = choices
    numbers = [
        sum(".f64" in i for i in built(part, choice._replace(loads=c), (9, 0)).instructions) for c in (count, 2 * count)
    ]
    assert numbers[1] <= numbers[0]
    assert numbers[0] > 0
