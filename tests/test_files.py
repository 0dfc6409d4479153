"""Files are written whole, or what was there stays."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from interrupting import Interrupted

from sigswap import files


def test_a_new_file_follows_the_umask_and_an_old_one_keeps_its_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "new", "ü")
        (tmp_path / "old").write_text("old")
        (tmp_path / "old").chmod(0o604)
        files.write_bytes(tmp_path / "old", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "new").read_text(encoding="utf-8") == "ü" and (tmp_path / "old").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o604


@pytest.mark.parametrize("error", [KeyboardInterrupt, lambda: OSError(28, "disk full")])
def test_an_interruption_of_any_line_leaves_the_old_text_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    path, at = tmp_path / "file", 0
    while True:
        at += 1
        path.write_text("old")
        run = Interrupted(("sigswap/files.py",), at, error)
        try:
            run(lambda: files.write_text(path, "new"))
        except (KeyboardInterrupt, OSError):
            assert path.read_text() in ("old", "new")
        if run.place is None:
            break
    assert at > 30 and path.read_text() == "new"
    left = [each for each in tmp_path.iterdir() if each != path]
    assert len(left) <= 2  # of an interruption of the removal itself


def test_what_is_no_regular_file_is_written_as_it_is(tmp_path: Path) -> None:
    code = (
        "import sys; from sigswap import files as f; f.write_text('/dev/stdout', 'out'); f.write_text(sys.argv[1], 'x')"
    )
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "link"], capture_output=True, text=True, check=True)
    assert result.stdout == "out"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "x"


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    dead, at_work = tmp_path / ".file.00000000.writing", tmp_path / ".file.11111111.writing"
    other = tmp_path / ".other.00000000.writing"
    for path in (dead, at_work, other):
        path.write_text("half")
        os.utime(path, (0, 0))
    with at_work.open() as handle:
        files.lock(handle.fileno())
        files.write_text(tmp_path / "file", "new")
    assert set(tmp_path.iterdir()) == {tmp_path / "file", at_work, other}


def test_long_names(tmp_path: Path) -> None:
    files.write_text(tmp_path / ("é" * 127), "x")
    with pytest.raises(OSError, match="too long"):
        files.write_text(tmp_path / ("x" * 300), "x")
