"""Compiles kernels for GPUs that need not be there, and reports what became of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from unittest import mock

import numba.cuda.dispatcher as dispatcher
from untraced import untraced

from numbanorm.cuda.toolchain import Kernel

ARCHITECTURES = [(8, 0), (9, 0), (10, 0)]


class _AnyDevice:
    compute_capability = (8, 0)


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX, and what the assembler said of it."""

    ptx: str
    log: str

    @cached_property
    def registers(self) -> int:
        return int(re.search(r"Used (\d+) registers", self.log).group(1))

    @cached_property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        found = re.search(r"(\d+) bytes smem", self.log)
        return int(found.group(1)) if found else 0

    @cached_property
    def spilled(self) -> int:
        """Bytes of stack, of spill stores and of spill loads."""
        found = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", self.log)
        return sum(map(int, found.groups()))

    @cached_property
    def instructions(self) -> list[str]:
        """Instructions and labels in order, without operands."""
        return re.findall(r"^\s*(?:@!?%p\d+\s+)?(\$L\w+(?=:)|[a-z][\w.]+)", self.ptx, re.MULTILINE)


@untraced
def compiled(kernel: Kernel, architecture: tuple[int, int]) -> Compiled:
    """Compile a kernel as its first launch does."""
    with mock.patch.object(dispatcher, "get_current_device", return_value=_AnyDevice):  # typing asks for one
        made = kernel.assemble(architecture)
    return Compiled(made.ptx, made.log)
