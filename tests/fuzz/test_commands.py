"""The first seeds of ``python -m tests.fuzz --part commands``, and what earlier ones have found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sigswap.commands.cli import app
from tests.fuzz import commands

PARTS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[commands.World]:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    yield commands.World(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_a_command_line_ends_well(world: commands.World, part: int) -> None:
    faults = [(seed, found) for seed in range(part, 60, PARTS) if (found := commands.attempt(world, seed))[2]]
    assert faults == []


@pytest.mark.parametrize("name", ["[/]new", "[red]new"])
def test_a_name_may_look_like_markup(tmp_path: Path, name: str) -> None:
    done = CliRunner().invoke(
        app,
        [
            "convert",
            f"{commands.__name__}:tiny",
            "--out",
            str(tmp_path / name),
            "--example",
            f"{commands.__name__}:example",
        ],
    )
    assert done.exit_code == 0, done.stderr
    assert name in done.stdout.replace("\n", "")


def test_a_picture_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no picture")
    line = ["convert", f"{commands.__name__}:tiny", "--out", str(tmp_path / "out"), "--calibrate", str(tmp_path)]
    done = CliRunner().invoke(app, [*line, "--example", f"{commands.__name__}:example"])
    assert done.exit_code == 1 and "is no image that can be read" in done.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_too_long_is_no_raw_error() -> None:
    done = CliRunner().invoke(app, ["convert", f"{commands.__name__}:tiny", "--out", "x" * 300])
    assert done.exit_code == 1 and "too long" in done.stderr and commands.RAW not in done.stderr
