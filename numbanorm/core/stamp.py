"""A stamp of source code: kernels kept on disk serve as long as the sources that they were made from are the same."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path


@cache
def stamp_of(folder: Path, *others: Path) -> str:
    """Return the hash of all modules of a folder, and of others, whose constants are part of what is compiled."""
    digest = sha256()
    for path in (*sorted(folder.rglob("*.py")), *others):
        digest.update(path.read_bytes())
    return digest.hexdigest()
