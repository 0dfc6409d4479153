"""Calls that read and write directories: the model stays, and a whole one is found, with nothing beside it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sigswap
from sigswap.errors import SigswapError
from tests.fuzz.loading import HERE, IDS, Own, build
from tests.interruptions.cases import state_of
from tests.interruptions.check import Call, Checked, Places, signalled


def _save(made: nn.Module, target: Path) -> None:
    sigswap.save(made, target, factory=f"{HERE}:build" if isinstance(made, Own) else None)


def _load(made: nn.Module, target: Path) -> None:
    sigswap.load(target, allow_code=True)


def _recover(made: nn.Module, target: Path) -> None:
    sigswap.recover(target)


def _llama() -> nn.Module:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, pad_token_id=0, **sizes))


class Case(NamedTuple):
    """``call``, of a model and its directory, what is ``there`` before it, and what the model is before conversion."""

    call: Callable[[nn.Module, Path], None]
    there: str
    build: Callable[[], nn.Module] = build


ON_DISK = {
    "save": Case(_save, "nothing"),
    "save over another model": Case(_save, "a model"),
    "load": Case(_load, "a model"),
    "recover": Case(_recover, "a killed save"),
    "save as transformers does": Case(_save, "a model", _llama),
    "load as transformers does": Case(_load, "a model", _llama),
}


class CheckedFiles(Checked):
    """A case on disk, in a new folder."""

    def __init__(self, name: str, turns: int = 1, places: Places | None = None) -> None:
        self.name = name
        self.call, self.there, build = ON_DISK[name]
        self.temporary = tempfile.TemporaryDirectory()
        self.first, self.work = Path(self.temporary.name, "first"), Path(self.temporary.name, "work")
        torch.manual_seed(0)
        old, self.made = (sigswap.convert(build().eval(), example_inputs=IDS[:, :4]) for _ in range(2))
        self.outputs = {"the old model": _output(old), "the new model": _output(self.made)}
        _save(
            self.made, Path(self.temporary.name, "any")
        )  # by which transformers notes the model's class in its config
        self.first.mkdir()
        if self.there != "nothing":
            _save(old, self.first / "m")
        if self.there == "a killed save":
            _killed(lambda: _save(self.made, self.first / "m"), self.first)
        super().__init__(turns, places)

    def close(self) -> None:
        self.temporary.cleanup()

    def fresh(self) -> tuple[Call, Call]:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.first, self.work)
        target = self.work / "m"
        return lambda: self.call(self.made, target), lambda: (self._state(), *self._found(target))

    def _state(self) -> Any:
        config = getattr(self.made, "config", None)
        return state_of(self.made), None if config is None else (config.to_dict(), sorted(vars(config)))

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
        left = os.listdir(self.work)
        if not _in_time(lambda: _save(self.made, target)):
            return "a lock", left
        return (which[0] if which else "a mixture"), left


def _in_time(call: Callable[[], None]) -> bool:
    """Whether ``call`` does not wait for ever, for a lock that is still held say."""
    came, raised = signalled(call, 30.0)
    if raised is not None and not isinstance(raised, KeyboardInterrupt):
        raise raised
    return not came


def _killed(call: Callable[[], None], folder: Path) -> None:
    """In a process that ends as soon as there is a list of what is to be moved, in the middle of the moves."""
    child = os.fork()
    if child == 0:

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            if list(folder.glob(".*/moves.json")) and list(folder.glob(".*/old/*")):
                os._exit(0)
            return trace if frame.f_code.co_filename.endswith("saving/replacing.py") else None

        sys.settrace(trace)
        call()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status == 0, "the save was over before it was killed"


def _output(made: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Any = made(IDS[:, :4])
        found: Tensor = output if isinstance(output, Tensor) else output.logits
        return found
