"""The small kernels, of copies and of running statistics, compiled for three GPUs that need not be there."""

from __future__ import annotations

import pytest

toolchain = pytest.importorskip("numbanorm.cuda.toolchain", exc_type=ImportError)
if toolchain.SIMULATED:
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

from compiled import ARCHITECTURES, compiled  # noqa: E402

from numbanorm.cuda import copying, running  # noqa: E402

KERNELS = {
    **{f"copy {names}": copying._kernel(*names) for names in [
        ("float32", "float32", ""),
        ("bool", "bool", ""),
        ("float32", "bfloat16", ""),
        ("bfloat16", "float64", ""),
        ("float64", "int64", ""),
        ("float16", "float32", "float16"),
        ("bfloat16", "bfloat16", "float64"),
    ]},
    **{f"fill {name}": copying._filler(name) for name in ("float32", "float64", "bfloat16")},
    "given": running._as_statistics("float16", "float64"),
    "update": running._update("float32", "float32", False, True),
    "update, cumulative": running._update("bfloat16", "float64", True, False),
    "count": running._count_batch(),
}  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", KERNELS)
def test_they_compile(name: str, architecture: tuple[int, int]) -> None:
    found = compiled(KERNELS[name], architecture)
    assert found.spilled == 0
    assert found.registers <= 64  # so that every thread that fits on a multiprocessor has its own
    if name.startswith(("copy", "fill")) and "64" not in name:
        assert not [i for i in found.instructions if ".f64" in i and not i.startswith(("cvt", "ld.param", "mov"))]
