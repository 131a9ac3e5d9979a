"""Compiles kernels for GPUs that need not be there, and reports what became of them."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from functools import cached_property

import numba.cuda.dispatcher as dispatcher
from cuda.core import Linker, LinkerOptions, ObjectCode
from numba import cuda
from numba.cuda import types

from numbanorm.cuda.toolchain import Kernel

ARCHITECTURES = [(8, 0), (9, 0), (10, 0)]


class _AnyDevice:
    compute_capability = (8, 0)


dispatcher.get_current_device = lambda: _AnyDevice  # device functions ask for one while they are typed


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX, and what the assembler said of it."""

    ptx: str
    log: str

    @cached_property
    def registers(self) -> int:
        return int(re.search(r"Used (\d+) registers", self.log).group(1))

    @cached_property
    def spilled(self) -> int:
        """Bytes of stack, of spill stores and of spill loads."""
        found = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", self.log)
        return sum(map(int, found.groups()))

    @cached_property
    def instructions(self) -> list[str]:
        """Instructions and labels in order, without operands."""
        return re.findall(r"^\s*(?:@!?%p\d+\s+)?(\$L\w+(?=:)|[a-z][\w.]+)", self.ptx, re.MULTILINE)


def compiled(kernel: Kernel, architecture: tuple[int, int]) -> Compiled:
    """Compile a kernel as its first launch does: every argument int64, but for eps."""
    names = inspect.signature(kernel.function).parameters
    signature = tuple(types.float64 if name in ("eps", "momentum", "value") else types.int64 for name in names)
    ptx, _ = cuda.compile_ptx(kernel.function, signature, cc=architecture)
    settings = LinkerOptions(arch="sm_{}{}".format(*architecture), ptxas_options=["-v"])
    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=settings)
    linker.link("cubin")
    return Compiled(ptx, linker.get_info_log())
