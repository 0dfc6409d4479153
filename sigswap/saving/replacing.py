"""Replaces files of a directory, all of them or none, and finds what a process that was killed meanwhile has left.

A save works in a folder beside its target, ``.NAME.saving-xxxxxxxx``:

- ``lock``: locked as long as the save runs, so that what is left can be told from what is at work,
- ``new/``: the new files, until all are complete and on the disk,
- ``moves.json``: written then, and removed when all is done. While it is there, the target may be half moved,
- ``old/``: what was replaced.

What has been moved is read off the folders, never remembered: whoever finds ``moves.json``, the save that failed, a
later one or ``sigswap recover``, can go on or go back from wherever it stands, also twice. A folder that holds
``moves.json`` is never removed; one without it holds nothing that is needed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from sigswap import files
from sigswap.errors import ArgumentError, CheckpointError, Hint
from sigswap.transaction import Transaction

CONFIGS = ("config.json", "sigswap.json")
"""By these a directory is known as a model: the first to go, the last to come."""
_JOURNAL, _LOCK = "moves.json", "lock"
_LONGEST_NAME = 200  # bytes of a target's name that its work folder repeats
_BEING_MADE = 10.0  # seconds within which a work folder that is being made has its lock
_log = logging.getLogger("sigswap")

Stale = Callable[[Path, Sequence[str]], Sequence[str]]
"""From the target and the names of its new files: the names of old ones that must not stay beside them."""


def directory_at(directory: str | os.PathLike[str]) -> Path:
    """``directory``, which may not be there. Raises ArgumentError if it is no path, and CheckpointError if its links
    lead in a circle."""
    text = os.fspath(directory) if isinstance(directory, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        given = repr(directory) if isinstance(text, str | bytes) else f"a {type(directory).__name__}"
        raise ArgumentError(f"{{argument}} must be the path of a directory, not {given}.", argument="directory")
    try:
        Path(text).resolve()
    except RuntimeError as error:  # of Python before 3.13
        raise CheckpointError(f"{text} is a link that leads back to itself.") from error
    except OSError:
        pass  # whoever opens it says why
    return Path(text)


def replace_files(target: Path, write: Callable[[Path], object], stale: Stale) -> None:
    """Makes what ``write`` puts into the folder that it is given the content of ``target``, all of it or none.

    Other files in ``target`` stay. A file that is replaced keeps its mode; a new one follows the umask.

    Raises CheckpointError if files cannot be written, and whatever ``write`` raises.
    """
    work: Work | None = None
    try:
        target = directory_at(target).resolve()
        if target.exists() and not target.is_dir():
            raise CheckpointError(f"{target} is a file, and not a directory.")
        warn_of_leftovers(target)
        work = Work(_home(target) / f"{_prefix(target)}{secrets.token_hex(4)}", target)
        with Transaction() as undo, undo:
            undo.on_failure("the folders around it", _made_folders(target.parent))
            target.parent.mkdir(parents=True, exist_ok=True)
            undo.afterwards("the work folder", work.close)
            work.create()
            write(work.new)
            work.complete()
            undo.afterwards("the lock", work.let_go)
            undo.on_failure(f"{target} as it was", work.go_back)
            if not work.move_whole():
                work.hold()
                settle(target, but=work)
                work.prepare(stale)
                work.go_on()
    except (OSError, SafetensorError) as error:
        if work is not None and work.is_moving():
            raise CheckpointError(
                f"{target} could not be written, and is not as it was before: {error}. What was in it, and the new "
                f"model, are kept in {work.path}.",
                hint=recover_hint(target),
            ) from error
        if work is not None and work.holds_new:
            raise CheckpointError(f"{target} holds the new model, but saving it did not end well: {error}") from error
        raise CheckpointError(f"{target} could not be written, and is as it was before: {error}") from error


class Journal(NamedTuple):
    """What a save moves: names of ``new`` files, of those ``replaced``, or the ``whole`` folder of new files."""

    new: tuple[str, ...]
    replaced: tuple[str, ...]
    whole: bool


class Work:
    """The work folder ``path`` of a save to ``target``."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path, self.target = path, target
        self.new, self.old = path / "new", path / "old"
        self._journal, self._lock = path / _JOURNAL, path / _LOCK
        self._handle = self._target_handle = -1
        self.holds_new = False  # whether the moves were ended with the new files in the target

    def create(self) -> None:
        """Makes the folder and locks it."""
        self.path.mkdir()
        self._handle = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        files.lock(self._handle, wait=True)
        self.new.mkdir()
        self.old.mkdir()

    def close(self) -> None:
        """Unlocks the folder, and removes it unless it holds what is needed."""
        if not self.is_moving():
            self.remove()
        self.unlock()

    def take(self) -> bool:
        """Locks a folder that was left; False if somebody is at work in it."""
        with suppress(FileNotFoundError):  # of version 0.1
            self._handle = os.open(self._lock, os.O_RDWR)
            return files.lock(self._handle)
        return True

    def unlock(self) -> None:
        """Lets others work in the folder."""
        if self._handle >= 0:
            files.unlock(self._handle)
            handle, self._handle = self._handle, -1
            os.close(handle)

    def remove(self) -> None:
        """Removes the folder, the lock last. If it cannot be, a warning names it."""
        for part in (self.new, self.old, self.path):
            shutil.rmtree(part, ignore_errors=True)
        if os.path.lexists(self.path):
            _log.warning(f"{self.path} is not needed any more, and cannot be removed.")

    def is_moving(self) -> bool:
        """Whether the target may be half moved."""
        return os.path.lexists(self._journal) or self.is_of_version_0_1()

    def is_of_version_0_1(self) -> bool:
        """Whether a process of a version without moves.json was killed while it moved files."""
        return not os.path.lexists(self._lock) and _is_filled(self.old) and _is_filled(self.new)

    def is_new(self) -> bool:
        """Whether it has no lock because it is just being made or removed, as far as can be told."""
        with suppress(FileNotFoundError):
            return not os.path.lexists(self._lock) and time.time() - self.path.stat().st_mtime < _BEING_MADE
        return True

    def in_use(self) -> bool:
        """Whether the save that works here is still running."""
        return files.is_locked(self._lock)

    def complete(self) -> None:
        """Gives the new files their modes and brings them to the disk."""
        folder_mode = stat.S_IMODE(self.path.stat().st_mode)  # made by mkdir, so this is what the umask leaves
        for path in sorted(self.new.rglob("*"), reverse=True):  # what is in a folder before the folder
            before = self.target / path.relative_to(self.new)
            mode = folder_mode if path.is_dir() else folder_mode & 0o666
            files.set_mode(path, stat.S_IMODE(before.stat().st_mode) if before.exists() else mode)
            files.sync(path)
        files.sync(self.new)

    def move_whole(self) -> bool:
        """Makes the new files the target, in one step; False if there is a target already."""
        if os.path.lexists(self.target):
            return False
        self._write(Journal((), (), True))
        try:
            self.go_on()
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # another save was faster
                self._journal.unlink()
                return False
            raise
        return True

    def prepare(self, stale: Stale) -> None:
        """Notes what is to be moved."""
        names = sorted(os.listdir(self.new), key=lambda name: (name in CONFIGS, name))
        there = [name for name in [*names, *stale(self.target, names)] if os.path.lexists(self.target / name)]
        there.sort(key=lambda name: name not in CONFIGS)
        self._write(Journal(tuple(names), tuple(there), False))

    def go_on(self) -> None:
        """Does what is left of the moves, and ends them. OSError leaves them as far as they came."""
        journal = self.journal()
        if journal.whole:
            if os.path.lexists(self.new):
                os.rename(self.new, self.target)
        else:
            for name in journal.replaced:
                is_old = name not in journal.new or os.path.lexists(self.new / name)
                if is_old and os.path.lexists(self.target / name) and not os.path.lexists(self.old / name):
                    os.rename(self.target / name, self.old / name)
            for name in journal.new:
                if os.path.lexists(self.new / name):
                    os.rename(self.new / name, self.target / name)
        self._end(True)

    def go_back(self) -> None:
        """Undoes the moves that have been made, each of them even if another one fails, and ends them.

        Raises OSError that names what could not be moved; the moves are not ended then.
        """
        if not self.is_moving():
            return
        journal, problems = self.journal(), []
        moves = [(self.target / name, self.new / name) for name in reversed(journal.new)]
        moves += [(self.old / name, self.target / name) for name in reversed(journal.replaced)]
        moves += [(self.target, self.new)] if journal.whole else []
        for source, destination in moves:
            if os.path.lexists(source) and not os.path.lexists(destination):
                try:
                    os.rename(source, destination)
                except OSError as error:
                    problems.append(str(error))
        problems += [
            f"{self.old / name} is still there" for name in journal.replaced if os.path.lexists(self.old / name)
        ]
        if problems:
            raise OSError("; ".join(problems))
        self._end(False)

    def journal(self) -> Journal:
        """What is being moved. Raises CheckpointError if that cannot be read."""
        if self.is_of_version_0_1():
            old, new = os.listdir(self.old), os.listdir(self.new)
            return Journal(tuple(sorted({*old, *new}, key=lambda n: (n in CONFIGS, n))), tuple(sorted(old)), False)
        try:
            data = json.loads(self._journal.read_text(encoding="utf-8"))
            journal = Journal(tuple(data["new"]), tuple(data["replaced"]), data["whole"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._journal} is damaged ({error}); {self.new} and {self.old} are kept."
            ) from error
        names = (*journal.new, *journal.replaced)
        if not all(
            isinstance(name, str) and name == os.path.basename(name) and name not in ("", ".", "..") for name in names
        ):
            raise CheckpointError(f"{self._journal} names files outside of {self.target}; nothing was moved.")
        return journal

    def hold(self) -> None:
        """Waits until no other save moves files of the target, and keeps others from it."""
        if os.name != "nt" and self.target.is_dir():  # Windows opens no folders
            self._target_handle = os.open(self.target, os.O_RDONLY)
            files.lock(self._target_handle, wait=True)

    def let_go(self) -> None:
        """Lets other saves move files of the target."""
        if self._target_handle >= 0:
            files.unlock(self._target_handle)
            handle, self._target_handle = self._target_handle, -1
            os.close(handle)

    def _write(self, journal: Journal) -> None:
        temporary = self.path / f"{_JOURNAL}.new"
        temporary.write_text(json.dumps(journal._asdict()), encoding="utf-8")
        files.sync(temporary)
        os.replace(temporary, self._journal)
        files.sync(self.path)
        files.sync(self.path.parent)

    def _end(self, holds_new: bool) -> None:
        for folder in (self.old, self.target, self.target.parent):
            if folder.is_dir():
                files.sync(folder)
        if self.is_of_version_0_1():
            os.close(os.open(self._lock, os.O_CREAT, 0o600))
        self.holds_new = holds_new
        self._journal.unlink(missing_ok=True)
        with suppress(OSError):  # from here on the new files, or the old ones, are what the target holds
            files.sync(self.path)


def leftovers(target: Path) -> list[Work]:
    """The work folders that saves to ``target`` have left when they were killed, the oldest first."""
    target = directory_at(target).resolve()
    prefix = _prefix(target)
    found: list[tuple[float, Path]] = []
    for folder in (target.parent, target):
        with suppress(OSError):  # it is not there, or not to be read, or another save has just removed its own
            for path in folder.iterdir():
                if path.name.startswith(prefix) and path.is_dir():
                    found.append((path.stat().st_mtime, path))
    works = [Work(path, target) for _, path in sorted(found)]
    return [work for work in works if not work.in_use()]


def warn_of_leftovers(target: Path) -> None:
    """Names in a warning what saves to ``target`` have left when they were killed."""
    left = [str(work.path) for work in leftovers(target) if not work.is_new()]
    if left:
        _log.warning(f"A save to {target} was interrupted and left {', '.join(left)}. {recover_hint(target)}")


def settle(target: Path, but: Work) -> None:
    """Ends the moves of saves that were killed, so that all of ``target`` is of one model: the one saved last."""
    for work in leftovers(target):
        if work.path != but.path and work.is_moving() and not work.is_of_version_0_1() and not work.journal().whole:
            work.go_on()


def recover(directory: str | os.PathLike[str], *, undo: bool = False) -> list[str]:
    """Brings ``directory`` in order after a :func:`sigswap.save` to it was killed, and removes what that left behind.

    If the new model was complete, it becomes the content of ``directory``, or, with ``undo``, the model that was there
    before does. If not, what was there before is there still. A save that is still running is left alone.

    Returns:
        What was done, one sentence for each work folder that was found; nothing if there was none.

    Raises:
        CheckpointError: files cannot be moved; they are kept where they are, and the message names them.
    """
    target, done = directory_at(directory).resolve(), []
    for work in leftovers(target):
        try:
            with Transaction() as steps, steps:
                steps.afterwards("the lock of the work folder", work.unlock)
                if work.take() and os.path.lexists(work.path):
                    steps.afterwards("the lock", work.let_go)
                    work.hold()
                    done.append(_recovered(work, undo))
        except OSError as error:
            raise CheckpointError(f"{target}: {error}. Everything is kept, in it and in {work.path}.") from error
    return done


def _recovered(work: Work, undo: bool) -> str:
    """Ends the moves of a work folder that nobody else is at work in, and removes it; says what was done."""
    target = work.target
    came_in = work.is_moving() and work.journal().whole and not os.path.lexists(work.new)
    if not work.is_moving():
        what = f"{work.path} held nothing that was needed, and is removed."
    elif undo and not came_in:  # what came in at once may have been changed since
        work.go_back()
        what = f"{target} is as it was before the save that was interrupted."
    elif work.journal().whole and os.path.lexists(work.new) and os.path.lexists(target):
        raise CheckpointError(
            f"{target} was made after the save that was interrupted, whose model is complete, and is kept, in "
            f"{work.new}.",
            hint=Hint("Move that folder to where you want it, or pass {undo} to remove it.", {"undo": "True"}),
        )
    else:
        work.go_on()
        what = f"{target} holds the model whose save was interrupted."
    work.remove()
    return what


def _made_folders(folder: Path) -> Callable[[], None]:
    """What removes those of ``folder`` and the folders around it that are not there now, if they are empty."""
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]

    def put_back() -> None:
        for each in missing:
            with suppress(OSError):
                each.rmdir()

    return put_back


def _home(target: Path) -> Path:
    """Where the work folder is: beside the target, or in it, if it is mounted or what it lies in cannot be written."""
    beside = target.parent
    if target.is_dir() and (os.path.ismount(target) or not os.access(beside, os.W_OK)):
        return target
    return beside


def _prefix(target: Path) -> str:
    name = target.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return f".{name}.saving-"


def _is_filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def recover_hint(target: Path) -> Hint:
    """What to do about what a save to ``target`` has left."""
    return Hint(f"Run `sigswap recover {target}`, or call sigswap.recover({str(target)!r}).")
