"""Saves that are interrupted at any line, or killed, leave the old files or the new ones, and say what they leave."""

from __future__ import annotations

import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from interrupting import Interrupted, lines_of
from torch import nn

import sigswap
from sigswap import files
from sigswap.errors import ArgumentError, CheckpointError
from sigswap.saving import replacing
from sigswap.saving.replacing import Work, leftovers, recover, replace_files

FILES = ("sigswap/saving/replacing.py", "sigswap/files.py", "sigswap/transaction.py")
OLD = {"sigswap.json": "old", "model.safetensors": "old", "notes.txt": "mine", "tokenizer.json": "old"}
NEW = {"config.json": "new", "model.safetensors": "new", "tokenizer.json": "new"}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def write(folder: Path) -> None:
    for name, text in NEW.items():
        (folder / name).write_text(text)


def stale(target: Path, names: Sequence[str]) -> list[str]:
    return ["sigswap.json"]


def old_in(target: Path) -> dict[str, str]:
    target.mkdir(parents=True)
    for name, text in OLD.items():
        (target / name).write_text(text)
    return OLD


def content(target: Path) -> dict[str, str] | None:
    return {path.name: path.read_text() for path in target.iterdir()} if target.exists() else None


def whole(target: Path) -> list[dict[str, str] | None]:
    """What the target may hold: all of the old files, or all of the new ones."""
    return [OLD, {**NEW, "notes.txt": "mine"}] if target.exists() and (target / "notes.txt").exists() else [None, NEW]


def disk_full() -> OSError:
    return OSError(28, "No space left on device")


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, disk_full])
def test_an_interruption_of_any_line(tmp_path: Path, existing: bool, error: Callable[[], BaseException]) -> None:
    at = 0
    while True:
        at += 1
        target = tmp_path / str(at) / "m"
        before = old_in(target) if existing else None
        run = Interrupted(FILES, at, error)
        try:
            run(lambda target=target: replace_files(target, write, stale))
        except CheckpointError as problem:
            assert content(target) == before or "holds the new model" in str(problem), run.place
        except (KeyboardInterrupt, OSError):
            assert error is KeyboardInterrupt or at <= 2, run.place  # before the first of the system's functions
        if run.place is None:
            break
        assert content(target) in whole(target), run.place
        assert not target.parent.exists() or os.listdir(target.parent) in ([], ["m"]), run.place
    assert at > 200


def test_a_second_interruption_while_the_first_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_of(lambda: replace_files(tmp_path / "counted", write, stale), FILES)
    go_back = Work.go_back
    raised = []
    for at in range(5, lines, 20):
        for again in range(1, 40, 6):
            target = tmp_path / f"{at}-{again}" / "m"
            old_in(target)
            second = Interrupted(FILES, again, KeyboardInterrupt)
            monkeypatch.setattr(Work, "go_back", lambda work, second=second: second(lambda: go_back(work)))
            raised.append(True)
            try:
                Interrupted(FILES, at, disk_full)(lambda target=target: replace_files(target, write, stale))
                raised[-1] = False  # what fails in the tidying up is no failure of the save
            except (KeyboardInterrupt, CheckpointError):
                pass
            assert content(target) in whole(target), (at, again)
    assert sum(raised) > len(raised) // 2


def test_what_cannot_be_undone_is_kept_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m"
    old_in(target)
    rename, calls = os.rename, 0

    def failing(source: Path, destination: Path) -> None:
        nonlocal calls
        calls += 1
        if calls >= 4:
            raise disk_full()
        rename(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(CheckpointError, match=r"not as it was before.*kept in .*\.m\.saving-.*sigswap recover"):
            replace_files(target, write, stale)
        with pytest.raises(CheckpointError, match="Everything is kept"):
            recover(target, undo=True)
    assert content(target) not in whole(target)
    assert recover(target, undo=True) == [f"{target} is as it was before the save that was interrupted."]
    assert content(target) == OLD and os.listdir(tmp_path) == ["m"]


class Killed(BaseException):
    """Nothing is undone after it, as after kill -9."""


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Kills a save to a directory before its n-th rename."""

    def run(target: Path, at: int) -> None:
        rename, calls = os.rename, 0

        def killing(source: Path, destination: Path) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise Killed
            rename(source, destination)

        works: list[Work] = []
        create = Work.create
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", killing)
            patch.setattr(Work, "create", lambda work: (works.append(work), create(work)))
            patch.setattr(Work, "go_back", lambda work: None)
            patch.setattr(Work, "close", lambda work: None)
            with pytest.raises(Killed):
                replace_files(target, write, stale)
        for work in works:
            os.close(work._handle)

    return run


@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6])
def test_recover(tmp_path: Path, kill: Callable[[Path, int], None], at: int, undo: bool) -> None:
    target = tmp_path / "m"
    old_in(target)
    kill(target, at)
    assert len(leftovers(target)) == 1
    assert len(recover(target, undo=undo)) == 1
    assert content(target) == (OLD if undo else {**NEW, "notes.txt": "mine"})
    assert os.listdir(tmp_path) == ["m"] and recover(target) == []


def test_the_next_save_names_what_is_left_and_makes_the_target_whole_first(
    tmp_path: Path, kill: Callable[[Path, int], None], caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "m"
    old_in(target)
    kill(target, 4)

    def fails(folder: Path) -> None:
        raise disk_full()

    with pytest.raises(CheckpointError, match="as it was before"):
        replace_files(target, fails, stale)
    assert "was interrupted and left" in caplog.text and "sigswap recover" in caplog.text
    assert content(target) not in whole(target)  # it has not come to the target
    replace_files(target, lambda folder: (folder / "tokenizer.json").write_text("newest"), lambda *_: [])
    assert content(target) == {**NEW, "notes.txt": "mine", "tokenizer.json": "newest"}
    recover(target)
    assert content(target) == {**NEW, "notes.txt": "mine", "tokenizer.json": "newest"}


def test_a_first_save_that_was_killed_when_it_was_complete(tmp_path: Path, kill: Callable[[Path, int], None]) -> None:
    target = tmp_path / "m"
    kill(target, 1)
    assert content(target) is None
    replace_files(target, lambda folder: (folder / "config.json").write_text("later"), stale)
    with pytest.raises(CheckpointError, match=r"was made after .* complete, and is kept, in .*new\. Move that folder"):
        recover(target)
    assert content(target) == {"config.json": "later"}
    recover(target, undo=True)
    assert content(target) == {"config.json": "later"} and os.listdir(tmp_path) == ["m"]
    kill(tmp_path / "n", 1)
    recover(tmp_path / "n")
    assert content(tmp_path / "n") == NEW


def test_recover_waits_for_a_save_that_moves_files(tmp_path: Path, kill: Callable[[Path, int], None]) -> None:
    """Which ends, too, what was killed before it: two at it at once could lose files."""
    target = tmp_path / "m"
    old_in(target)
    kill(target, 3)
    half_moved, saving = content(target), Work(tmp_path / "another", target)
    saving.hold()
    thread = threading.Thread(target=recover, args=(target,))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and content(target) == half_moved
    saving.let_go()
    thread.join(30)
    assert not thread.is_alive() and content(target) == {**NEW, "notes.txt": "mine"}
    assert os.listdir(tmp_path) == ["m"]


def test_a_save_that_began_while_it_was_looked_at_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looking(folder: Path) -> None:
        write(folder)
        with monkeypatch.context() as patch:
            patch.setattr(Work, "in_use", lambda work: False)
            assert recover(tmp_path / "m") == [] and folder.is_dir()

    replace_files(tmp_path / "m", looking, stale)
    assert content(tmp_path / "m") == NEW


def test_folders_that_were_made_for_a_save_go_with_it(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (tmp_path / "a" / "b" / "mine").mkdir()
        raise disk_full()

    with pytest.raises(CheckpointError, match="as it was before"):
        replace_files(tmp_path / "a" / "b" / "c" / "d" / "m", fails, stale)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "mine"]
    replace_files(tmp_path / "x" / "y" / "m", write, stale)
    assert content(tmp_path / "x" / "y" / "m") == NEW and os.listdir(tmp_path / "x" / "y") == ["m"]


def test_a_save_that_runs_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = tmp_path / "m"

    def looking(folder: Path) -> None:
        assert leftovers(target) == [] and recover(target) == []
        write(folder)

    replace_files(target, looking, stale)
    assert content(target) == NEW and caplog.text == ""


@pytest.mark.parametrize("moved", [0, 1])
def test_a_folder_that_version_0_1_left(tmp_path: Path, moved: int) -> None:
    """It had no moves.json, and its only copy of the old files was in it."""
    target, work = tmp_path / "m", tmp_path / ".m.saving-abcdefgh"
    for folder in (work / "new", work / "old", target):
        folder.mkdir(parents=True)
    (target / "notes.txt").write_text("mine")
    for name in ("sigswap.json", "model.safetensors"):
        (work / "old" / name).write_text("old")
        (work / "new" / name).write_text("new")
    if moved:
        os.rename(work / "new" / "model.safetensors", target / "model.safetensors")
    replace_files(tmp_path / "other", write, stale)
    assert len(leftovers(target)) == 1
    recover(target, undo=True)
    assert content(target) == {"notes.txt": "mine", "sigswap.json": "old", "model.safetensors": "old"}
    assert not work.exists()


def test_a_journal_that_names_other_places_is_refused(tmp_path: Path, kill: Callable[[Path, int], None]) -> None:
    target = tmp_path / "m"
    old_in(target)
    kill(target, 3)
    journal = leftovers(target)[0].path / "moves.json"
    for text in (
        '{"new": ["../x"], "replaced": [], "whole": false}',
        "{",
        "[]",
        '{"new": [1], "replaced": [], "whole": false}',
    ):
        journal.write_text(text)
        with pytest.raises(CheckpointError, match=r"moves\.json"):
            recover(target)


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask_and_stay(tmp_path: Path, umask: Callable[[int], int], mask: int) -> None:
    umask(mask)

    def private(folder: Path) -> None:
        write(folder)
        (folder / "1_Pooling").mkdir(0o700)
        for name in NEW:
            (folder / name).chmod(0o600)

    target = tmp_path / "m"
    replace_files(target, private, stale)

    def modes() -> dict[str, int]:
        return {path.name: stat.S_IMODE(path.stat().st_mode) for path in (target, *target.iterdir())}

    assert modes() == {"m": 0o777 & ~mask, "1_Pooling": 0o777 & ~mask, **dict.fromkeys(NEW, 0o666 & ~mask)}
    (target / "model.safetensors").chmod(0o640)
    replace_files(target, private, stale)
    assert modes()["model.safetensors"] == 0o640 and modes()["config.json"] == 0o666 & ~mask


def test_saves_at_the_same_time_do_not_mix(tmp_path: Path) -> None:
    def save(number: int) -> None:
        replace_files(
            tmp_path / "m", lambda folder: [(folder / name).write_text(str(number)) for name in NEW], lambda *_: []
        )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save, range(64)))
    found = content(tmp_path / "m")
    assert found is not None and set(found) == set(NEW) and len(set(found.values())) == 1
    assert os.listdir(tmp_path) == ["m"]


def test_odd_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("é" * 127)
    replace_files(long, write, stale)
    assert content(long) == NEW
    with pytest.raises(CheckpointError, match="could not be written"):
        replace_files(tmp_path / ("x" * 300), write, stale)
    old_in(tmp_path / "mounted")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mounted")
    replace_files(tmp_path / "mounted", write, stale)
    assert content(tmp_path / "mounted") == {**NEW, "notes.txt": "mine"}
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        replace_files(tmp_path / "file", write, stale)
    assert replacing.leftovers(tmp_path / "nothing" / "there") == []


_SAVER = """
import signal
import sys
from pathlib import Path
from sigswap.saving.replacing import replace_files
signal.signal(signal.SIGINT, signal.default_int_handler)  # what was started in the background ignores it
text = 0
print("ready", flush=True)
while True:
    text += 1
    def write(folder):
        for name in ("config.json", "a", "b", "c"):
            (folder / name).write_text(str(text))
    replace_files(Path(sys.argv[1]), write, lambda *_: [])
"""


@pytest.mark.slow
@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("number", range(6))
def test_real_signals(tmp_path: Path, with_signal: signal.Signals, number: int) -> None:
    target = tmp_path / "m"
    process = subprocess.Popen([sys.executable, "-c", _SAVER, target], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    try:
        process.stdout.readline()
        time.sleep(0.1 + number * 0.0137)
        process.send_signal(with_signal)
        process.communicate(timeout=60)
    finally:
        process.kill()
    recover(target)
    found = content(target)
    assert found is not None and set(found) == {"config.json", "a", "b", "c"} and len(set(found.values())) == 1
    assert os.listdir(tmp_path) == ["m"]


def test_a_warning_and_not_an_error_if_the_work_folder_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(replacing.shutil, "rmtree", lambda path, ignore_errors: None)
    with caplog.at_level(logging.WARNING):
        replace_files(tmp_path / "m", write, stale)
    assert content(tmp_path / "m") == NEW and "cannot be removed" in caplog.text


def test_a_lock_does_not_outlive_an_interruption(tmp_path: Path) -> None:
    """Between the lines that give it back: the next save would wait for ever."""
    path = tmp_path / "lock"
    path.touch()
    assert not files.is_locked(path)
    handle = os.open(path, os.O_RDWR)
    assert files.lock(handle) and files.is_locked(path)
    files.unlock(handle)
    assert not files.is_locked(path)
    files.unlock(handle)
    os.close(handle)
    files.unlock(handle)  # of a file that is closed


@pytest.mark.parametrize("directory", ["", "a\0b", b"bytes", None, 3], ids=repr)
def test_what_is_no_path_is_said(directory: object) -> None:
    """None of them means the present directory, and none is another library's error."""
    for call in (sigswap.load, recover, lambda path: sigswap.save(nn.Linear(1, 1), path)):
        with pytest.raises(ArgumentError, match="directory must be the path"):
            call(directory)  # type: ignore[arg-type]


def test_a_link_to_itself(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for call in (sigswap.load, lambda path: replace_files(path, write, stale)):
        with pytest.raises(CheckpointError, match="loop"):
            call(loop)
    assert loop.is_symlink() and [path.name for path in tmp_path.iterdir()] == ["loop"]
