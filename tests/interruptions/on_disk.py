"""Calls that read and write directories: the model stays, and a whole one is found, with nothing beside it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import sigswap
from sigswap.errors import SigswapError
from tests.fuzz.loading import HERE, IDS, build
from tests.interruptions.cases import state_of
from tests.interruptions.check import Call, Checked


def _save(made: nn.Module, target: Path) -> None:
    sigswap.save(made, target, factory=f"{HERE}:build")


def _load(made: nn.Module, target: Path) -> None:
    sigswap.load(target, allow_code=True)


ON_DISK: dict[str, tuple[Callable[[nn.Module, Path], None], bool]] = {
    "save": (_save, False),
    "save over another model": (_save, True),
    "load": (_load, True),
}
"""Each call, and whether there is a model in the directory before it."""


class CheckedFiles(Checked):
    """A case on disk, in a new folder."""

    def __init__(self, name: str, turns: int = 1) -> None:
        self.name = name
        self.call, self.is_there = ON_DISK[name]
        self.temporary = tempfile.TemporaryDirectory()
        self.first, self.work = Path(self.temporary.name, "first"), Path(self.temporary.name, "work")
        torch.manual_seed(0)
        old, self.made = (sigswap.convert(build().eval(), example_inputs=IDS[:, :4]) for _ in range(2))
        self.outputs = {"the old model": _output(old), "the new model": _output(self.made)}
        _save(old, self.first)
        super().__init__(turns)

    def fresh(self) -> tuple[Call, Call]:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        target = self.work / "m"
        if self.is_there:
            shutil.copytree(self.first, target)
        return lambda: self.call(self.made, target), lambda: (state_of(self.made), *self._found(target))

    def _found(self, target: Path) -> tuple[str, list[str]]:
        """Which model is found, by its name or else after ``recover``, and what is in the folder then."""
        try:
            found = sigswap.load(target, allow_code=True)
            sigswap.recover(target)
        except SigswapError:
            try:
                sigswap.recover(target)
                found = sigswap.load(target, allow_code=True)
            except SigswapError as error:
                return ("nothing" if not target.exists() else f"lost: {error}"), os.listdir(self.work)
        output = _output(found)
        which = [name for name, wanted in self.outputs.items() if torch.equal(output, wanted)]
        return (which[0] if which else "a mixture"), os.listdir(self.work)


def _output(made: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = made(IDS[:, :4])
        return output
