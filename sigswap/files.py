"""Files that are written whole or not at all. A leaf module: it imports nothing of sigswap's.

A file is written beside its target under another name, brought to the disk, and renamed: whatever comes in between,
the target holds what it held or what was to be written.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger("sigswap")
_LONGEST_NAME = 255
_SURELY_LOCKED = 60.0  # seconds after which a writer that lives has locked its file
# What fsync and flock say where a file system has neither.
_NOT_THERE = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EBADF)


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Calls ``write`` with the path of a new, empty file, which then takes the place of ``path``.

    A file that was there keeps its mode; a new one follows the umask. A link is followed, and what is no regular file
    (a pipe, /dev/stdout) is written as it is. If anything fails, what was there stays, and the new file is gone.
    """
    given = Path(path)
    if given.exists() and not stat.S_ISREG(given.stat().st_mode):
        write(given)
        return
    target = Path(os.path.realpath(given))
    start = f".{target.name}"[: _LONGEST_NAME // 2]  # a character may be two bytes, or more
    start = start if len(os.fsencode(target.name)) < _LONGEST_NAME // 2 else ".sigswap"
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    temporary = target.with_name(f"{start}.{secrets.token_hex(4)}.writing")
    handle = -1
    try:
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        lock(handle)
        _remove_dead(target.parent, start)
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
        write(temporary)
        set_mode(temporary, stat.S_IMODE(target.stat().st_mode) if target.exists() else mode)
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)
        if handle >= 0:
            os.close(handle)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes ``text`` as UTF-8, as :func:`write_whole` does it."""
    write_whole(path, lambda new: new.write_text(text, encoding="utf-8"))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes ``data``, as :func:`write_whole` does it."""
    write_whole(path, lambda new: new.write_bytes(data))


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk, as far as the file system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir() or os.name == "nt":  # Windows opens no folders
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
    finally:
        os.close(handle)


def set_mode(path: Path, mode: int) -> None:
    """Gives ``path`` the permission bits ``mode``, if it has others."""
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def lock(handle: int, *, wait: bool = False) -> bool:
    """Locks an open file against other openings of it, until it is closed; False if it is locked already.

    Where the system or the file system has no locks, all can lock it.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
    return True


def unlock(handle: int) -> None:
    """Before an open file is closed: an interruption that comes in between leaves no lock."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)


def is_locked(path: Path) -> bool:
    """Whether someone holds the lock of the file ``path``, as far as can be told: another user's may be."""
    try:
        file = path.open("rb")  # and no handle: an interruption before it is closed would keep the lock
    except FileNotFoundError:
        return False
    except OSError:
        return True
    with file:
        return not lock(file.fileno())


def _remove_dead(folder: Path, start: str) -> None:
    """Removes what a writer that was killed has left of the same file: none of it was ever whole."""
    with suppress(OSError):
        for path in folder.iterdir():
            if not (path.name.startswith(f"{start}.") and path.name.endswith(".writing")):
                continue
            if time.time() - path.stat().st_mtime > _SURELY_LOCKED and not is_locked(path):
                _log.warning(f"{path} was left by a process that was killed while it wrote, and is removed.")
                path.unlink(missing_ok=True)
