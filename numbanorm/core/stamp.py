"""A stamp of source code: kernels kept on disk serve as long as the sources that they were made from are the same."""

from __future__ import annotations

import re
from functools import cache
from hashlib import sha256
from pathlib import Path

_HOME = Path(__file__).parents[1]
_IMPORT = re.compile(r"^from (\.*)([\w.]*) import (\([^)]*\)|[^\n]*)", re.MULTILINE)
"""An import at the top of a module: dots, the module's name, and what is taken from it."""


@cache
def stamp_of(module: Path) -> str:
    """Return the hash of a module and of all modules of this package that it imports, and these import, at their top.

    Whatever is part of a kernel comes from one of them: functions that it calls, and constants.
    """
    digest = sha256()
    for path in sources(module):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def sources(module: Path) -> list[Path]:
    """Return the files of which `stamp_of` makes its hash: the module's own first, all others by name."""
    found, left = {module}, [module]
    while left:
        new = _imported(left.pop()) - found
        found |= new
        left.extend(new)
    return [module, *sorted(found - {module})]


def _imported(module: Path) -> set[Path]:
    """Return the files of the modules of this package that a module imports, whole or something of them."""
    files = set()
    for dots, name, taken in _IMPORT.findall(module.read_text(encoding="utf-8")):
        parts = name.split(".") if name else []
        if dots:
            start = module.parents[len(dots) - 1]
        elif parts[0] == _HOME.name:
            start, parts = _HOME, parts[1:]
        else:
            continue
        place = start.joinpath(*parts)
        files.add(place.with_suffix(".py"))
        files |= {place / f"{name}.py" for name in re.findall(r"\w+", taken)}
    return {file for file in files if file.is_file()}
