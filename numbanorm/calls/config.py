"""What this installation is made of: versions, processor, threads and the kernels' cache on disk."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba

from ..core.pool import POOL
from ..core.threads import get_num_threads
from ..cpu.profile import profile
from .dispatch import cuda_problem, handler

_numba: Any = numba  # its own annotations leave out what is asked of it here
_OPTIONAL = ("ml_dtypes", "click", "rich", "matplotlib")


def config() -> dict[str, str]:
    """Collect what a report of a problem, or of a timing, should say about the machine and the installation.

    Nothing is compiled.

    Returns
    -------
    dict of str to str
        Versions, processor, threads, cache and GPU, in the order in which they are shown.

    Examples
    --------
    >>> list(config())[:3]
    ['numbanorm', 'python', 'numba']
    """
    optional = {name: _version(name) for name in _OPTIONAL}
    return {
        "numbanorm": _version("numbanorm"),
        "python": f"{platform.python_version()} ({platform.python_implementation()}, {platform.platform(terse=True)})",
        "numba": _version("numba"),
        "llvmlite": f"{_version('llvmlite')} (LLVM {'.'.join(map(str, llvmlite.binding.llvm_version_info))})",
        "numpy": _version("numpy"),
        **{name: found for name, found in optional.items() if found},
        "not installed": ", ".join(name for name, found in optional.items() if not found) or "nothing",
        "processor": _processor(),
        "profile": profile().describe(),
        "threads": f"{get_num_threads()} of {_numba.config.NUMBA_NUM_THREADS}",
        "threading layer": _threading_layer(),
        "cache": _cache(),
        "pool": f"keeps up to {POOL.limit / 1e6:,.0f} MB of outputs' memory for reuse (NUMBANORM_POOL)",
        "gpu": cuda_problem() or handler("cuda").describe(),
    }


def show_config() -> None:
    """Print `config`, one line for each entry.

    Examples
    --------
    >>> show_config()  # doctest: +ELLIPSIS
    numbanorm        ...
    """
    for name, value in config().items():
        print(f"{name:<16} {value}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    """Name the processor as it is sold, where the system tells, and as LLVM compiles for it."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    target = _numba.config.CPU_NAME or llvmlite.binding.get_host_cpu_name()
    return f"{name}, {os.cpu_count()} cores, compiled for {target}"


def _threading_layer() -> str:
    try:
        return str(_numba.threading_layer())
    except ValueError:
        return "chosen when the first parallel kernel runs"


def _cache() -> str:
    from ..cpu import rows

    kernel: Any = rows.forward.serial
    if kernel.stats.cache_path is None:
        return "none: kernels are compiled anew in every process"
    files = list(Path(kernel.stats.cache_path).glob("*.nbc"))
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    return f"{kernel.stats.cache_path} ({len(files)} compiled kernels, {megabytes:.1f} MB)"
