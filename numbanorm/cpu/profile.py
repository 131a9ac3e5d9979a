"""What launches take from the CPU: when lines are asked for ahead, when outputs go past the caches, when threads pay.

Nothing in a profile changes a bit of any result: it decides neither the order of summation nor how it is rounded. Two
profiles were measured; that of any other CPU follows from what the system says of its caches.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from llvmlite.binding import get_host_cpu_name
from numba import config

VARIABLE = "NUMBANORM_PROFILE"
"""The environment variable that names a profile, or a file that holds one."""

_KIB, _MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class CpuProfile:
    """What depends on the CPU.

    Attributes
    ----------
    name : str
        How it is chosen.
    l1, l2, l3 : int
        Bytes of a core's own data caches, and of the cache that cores share; 0 where there is none.
    ahead : int
        Elements by which rows ask for lines, on their way to the output; 0: the CPU's own prefetchers do better.
    ahead_sums : int
        The same for sums, whose lines go to L1.
    rows_ahead : int
        Rows by which columns ask ahead.
    ahead_from : int
        Elements of an array from which lines are asked for ahead: fewer lie in L2 already.
    stream_from : int
        Elements of an output from which it goes past the caches.
    pairs : bool
        Whether two long groups are written beside the sums of the next two.
    unit_bytes : int
        Bytes of rows whose sums are taken before they are written past the caches: of shorter rows so many, of longer
        ones up to 16 times as many, eight rows at most; 0: as many as into the caches.
    backward_bytes : int
        The same for backward, whatever the row's length; 0: one row, or 512 elements of narrow ones.
    together_size : int
        Elements of neighbouring groups that are taken run by run, as they lie in memory.
    share_from, wake_from : int
        Elements from which a call is worth the help of a thread that is awake, and worth waking one.
    share : int
        Elements for each further helper.
    split_from : int
        Elements from which a call with too few units is worth several launches.
    numba_from : int
        Elements from which a launch on Numba's threads pays.
    """

    name: str
    l1: int
    l2: int
    l3: int
    ahead: int = 0
    ahead_sums: int = 0
    rows_ahead: int = 8
    ahead_from: int = 1 << 18
    stream_from: int = 1 << 21
    pairs: bool = False
    unit_bytes: int = 4096
    backward_bytes: int = 1 << 18
    together_size: int = 1 << 18
    share_from: int = 1 << 16
    wake_from: int = 1 << 21
    share: int = 1 << 18
    split_from: int = 1 << 19
    numba_from: int = 1 << 17

    def describe(self) -> str:
        """Return the name and the caches in one line."""
        caches = ", ".join(f"L{n} {_bytes(size)}" for n, size in enumerate((self.l1, self.l2, self.l3), 1) if size)
        return f"{self.name} ({caches})"


ZEN4 = CpuProfile("zen4", 32 * _KIB, _MIB, 32 * _MIB, rows_ahead=16, together_size=1 << 21)
"""AMD EPYC 9004, from Zen 4 on: its prefetchers do better alone, but for columns, and L3 gives runs again in time."""

EMERALD_RAPIDS = CpuProfile(
    "emeraldrapids",
    48 * _KIB,
    2 * _MIB,
    0,
    ahead=512,
    ahead_sums=768,
    rows_ahead=4,
    pairs=True,
    unit_bytes=0,
    backward_bytes=0,
)
"""Intel Xeon of the 5th generation: memory gives and takes best by turns, and what is asked for ahead."""

TUNED = {profile.name: profile for profile in (ZEN4, EMERALD_RAPIDS)}
"""What was measured, by name."""

_MEASURED_ON = {
    "znver4": ZEN4,
    "znver5": ZEN4,
    "sapphirerapids": EMERALD_RAPIDS,
    "emeraldrapids": EMERALD_RAPIDS,
    "graniterapids": EMERALD_RAPIDS,
}
"""By LLVM's names of CPUs: these, and what is built alike."""

DEFAULT = "default"
"""The name of the profile that follows from the caches."""


def derived(name: str, l1: int, l2: int, l3: int) -> CpuProfile:
    """Return the profile of a CPU of which only the caches are known, in bytes.

    Lines are asked for ahead by columns alone, whose rows no prefetcher follows; the rest are the shares of the caches
    that both measured CPUs agree on.
    """
    return CpuProfile(
        name,
        l1,
        l2,
        l3,
        ahead_from=max(l2 // 2, _MIB) // 4,
        stream_from=max(4 * l2, 8 * _MIB) // 4,
        backward_bytes=max(l2 // 4, 64 * _KIB),
        together_size=max(l2 // 2, 256 * _KIB) // 4,
    )


def caches(cpu: str) -> tuple[int, int, int]:
    """Return the bytes of L1, L2 and L3, as the system tells them, or as is usual where it does not."""
    found = {level: size for level, size in _told() if size}
    usual = (128 * _KIB, 4 * _MIB, 0) if cpu.startswith("apple") else (32 * _KIB, _MIB, 0)
    return found.get(1, usual[0]), found.get(2, usual[1]), found.get(3, usual[2])


def _told(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> list[tuple[int, int]]:
    """Return (level, bytes) of the first core's caches for data, as Linux tells them."""
    told = []
    for place in sorted(folder.glob("index*")):
        try:
            kind, level, size = ((place / name).read_text().strip() for name in ("type", "level", "size"))
            if kind in ("Data", "Unified"):
                told.append((int(level), int(size.removesuffix("K")) * _KIB))
        except (OSError, ValueError):
            continue
    return told


def choose(cpu: str, asked: str) -> CpuProfile:
    """Return the profile for a CPU, or the one that is asked for by name or file.

    Parameters
    ----------
    cpu : str
        LLVM's name of it.
    asked : str
        A name of `TUNED`, "default", the path of a TOML file with attributes of a profile, which stand in for those of
        the default, or "": the one that suits.

    Raises
    ------
    ValueError
        If there is no such profile, or the file is none.
    """
    if asked in TUNED:
        return TUNED[asked]
    if not asked and cpu in _MEASURED_ON:
        return _MEASURED_ON[cpu]
    default = derived(DEFAULT, *caches(cpu))
    if asked in ("", DEFAULT):
        return default
    path = Path(asked)
    if not path.is_file():
        raise ValueError(f"{VARIABLE}: expected {', '.join([*TUNED, DEFAULT])}, or a file, got {asked!r}")
    return _read(path, default)


def _read(path: Path, default: CpuProfile) -> CpuProfile:
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{VARIABLE}: {path} is no TOML file: {error}") from None
    kinds = {field.name: type(getattr(default, field.name)) for field in fields(CpuProfile)}
    for name, value in told.items():
        if name not in kinds:
            raise ValueError(f"{VARIABLE}: {path}: expected {', '.join(kinds)}, got {name!r}")
        if type(value) is not kinds[name] or (kinds[name] is int and value < 0):
            expected = {int: "an integer of 0 or more", bool: "true or false", str: "a string"}[kinds[name]]
            raise ValueError(f"{VARIABLE}: {path}: {name}: expected {expected}, got {value!r}")
    if told.get("share") == 0:
        raise ValueError(f"{VARIABLE}: {path}: share: expected an integer of 1 or more, got 0")
    return replace(default, **{"name": str(path), **told})


@cache
def _chosen() -> CpuProfile:
    cpu: Any = config.CPU_NAME or get_host_cpu_name()
    return choose(cpu, os.environ.get(VARIABLE, ""))


_used: CpuProfile | None = None


def profile() -> CpuProfile:
    """Return the profile that launches go by: chosen when the first is prepared, and the same from then on."""
    return _chosen() if _used is None else _used


def use(other: CpuProfile | None) -> None:
    """Go by another profile from now on; None: by the chosen one. What is prepared already goes by its own."""
    global _used
    _used = other


def _bytes(size: int) -> str:
    return f"{size // _MIB} MiB" if size % _MIB == 0 else f"{size // _KIB} KiB"
