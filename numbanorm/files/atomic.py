"""Files and folders that appear under their name whole or not at all.

What is being written lies beside its target as ``.NAME.<process id>-<random>.tmp``, under a lock (`flock`) that goes
with its process, however that ends. So whoever writes to the same target next knows which leftovers are dead, also
where process ids mean nothing (containers that share a folder), and removes them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: an open file cannot be removed there, which protects it as well
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(path: str | os.PathLike[str], *, folder: bool = False) -> Iterator[Path]:
    """Write a file, or a folder, that takes its target's place when it is complete and on the disk.

    If the block raises, the target is as it was, and nothing is left beside it.

    Parameters
    ----------
    path : str or path
        The target. Links are followed; an existing file's permissions are kept.
    folder : bool, optional
        True: a folder, otherwise a file.

    Yields
    ------
    Path
        An empty file or folder to write to, in the folder of the target.

    Raises
    ------
    ValueError
        If the target's folder does not exist, or the target is something else than what is to be written.
    OSError
        If writing fails.

    Examples
    --------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "greeting.txt"
    >>> with replacing(target) as scratch:
    ...     size = scratch.write_text("hello")
    ...     target.exists()
    False
    >>> target.read_text()
    'hello'
    """
    target = Path(os.path.realpath(path))
    check_target(target, folder=folder)
    remove_dead(target)
    scratch, lock = _claim(target, folder)
    try:
        yield scratch
        _sync(scratch)
        _exchange(scratch, target)
        _sync_one(target.parent)
    finally:
        _remove(scratch)  # after an exchange of folders: the old one
        os.close(lock)


def check_target(path: str | os.PathLike[str], *, folder: bool = False) -> None:
    """Raise ValueError where `replacing` could not write to `path`."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise ValueError(f"target: there is no folder {str(target.parent)!r}")
    if target.exists() and not (target.is_dir() if folder else target.is_file()):
        kind = "a folder" if folder else "a regular file"
        raise ValueError(f"target: expected {kind} or nothing at {str(target)!r}, got something else")


def remove_dead(path: str | os.PathLike[str]) -> None:
    """Remove what processes that are gone have left beside a target."""
    target = Path(os.path.realpath(path))
    name = re.compile(rf"\.{re.escape(target.name)}\.\d+-[0-9a-f]{{8}}\.tmp")
    for left in [entry for entry in target.parent.iterdir() if name.fullmatch(entry.name)]:
        with suppress(OSError):  # somebody writes to it, or has removed it meanwhile
            lock = os.open(left, os.O_RDONLY)
            try:
                _lock(lock)
                _remove(left)
            finally:
                os.close(lock)


def _claim(target: Path, folder: bool) -> tuple[Path, int]:
    """Make the scratch file or folder; return it and the descriptor that holds its lock."""
    while True:
        scratch = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        if folder:
            scratch.mkdir()
            lock = os.open(scratch, os.O_RDONLY)
        else:
            lock = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            if target.exists():
                scratch.chmod(stat.S_IMODE(target.stat().st_mode))
            try:
                _lock(lock)
                if scratch.exists():  # nobody took it for dead before it was locked
                    return scratch, lock
            except BlockingIOError:
                pass
            except OSError as error:  # a file system without locks: leftovers stay there
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                return scratch, lock
        except BaseException:
            os.close(lock)
            _remove(scratch)
            raise
        os.close(lock)


def _lock(descriptor: int) -> None:
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _exchange(scratch: Path, target: Path) -> None:
    """Put `scratch` in the target's place; where that was a folder, it goes to the place of `scratch`."""
    if not (scratch.is_dir() and target.exists()):
        scratch.replace(target)
        return
    with suppress(OSError):
        _rename_exchange(scratch, target)
        return
    aside = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.old")
    target.rename(aside)
    try:
        scratch.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside)


@cache
def _renameat2() -> Any:
    try:
        return ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return None


def _rename_exchange(a: Path, b: Path) -> None:
    """Exchange two names in one step: Linux can, with renameat2(2); OSError elsewhere."""
    function = _renameat2()
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    at_here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if function(at_here, os.fsencode(a), at_here, os.fsencode(b), exchange) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _sync(path: Path) -> None:
    """Wait until a file, or a folder and all in it, is on the disk."""
    if path.is_dir():
        for parent, _, names in os.walk(path, topdown=False):
            for name in names:
                _sync_one(Path(parent, name))
            _sync_one(Path(parent))
    else:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # Windows has no descriptors of folders
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
