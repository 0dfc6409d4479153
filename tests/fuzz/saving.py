"""Saves that are interrupted at a line, or killed: the old model or the new one is there, by name or by recover."""

from __future__ import annotations

import inspect
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import sigswap
from sigswap.errors import SigswapError
from sigswap.saving import replacing
from tests.fuzz.loading import HERE, IDS, build

sys.path.append(str(Path(__file__).parents[1] / "support"))
from interrupting import Interrupted, lines_of

FILES = ("saving/checkpoint.py", "saving/replacing.py", "saving/weights.py", "sigswap/files.py", "transaction.py")
OF_THE_DISK = FILES[1:4]
"""Where an OSError can come from; Ctrl-C can come anywhere."""
_code, _first = inspect.getsourcelines(replacing.directory_at)
NOT_OF_THE_DISK = frozenset(("replacing.py", _first + index) for index in range(len(_code)))
"""The look at an argument: what the disk says there is passed over, and no other line of it asks the disk."""


class Pair(NamedTuple):
    """A saved directory, another model that is to be saved over it, both outputs, and how long that takes."""

    directory: Path
    save: Callable[[Path], None]
    outputs: tuple[Tensor, Tensor]
    lines: dict[tuple[str, ...], int]
    seconds: float


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS[:, :4])


def pair(folder: Path) -> Pair:
    """Two models of one class: what is left of a mixture of their files could be loaded."""
    torch.manual_seed(0)
    models = [sigswap.convert(build().eval(), example_inputs=IDS[:, :4]) for _ in range(2)]

    def save(target: Path, model: nn.Module = models[1]) -> None:
        sigswap.save(model, target, factory=f"{HERE}:build")

    save(folder / "first", models[0])
    lines = {files: lines_of(lambda: save(folder / "counted"), files) for files in (FILES, OF_THE_DISK)}
    start = time.perf_counter()
    save(folder / "counted")
    return Pair(folder / "first", save, (output(models[0]), output(models[1])), lines, time.perf_counter() - start)


def attempt(pair: Pair, seed: int, folder: Path) -> str:
    """What comes of one interruption: "old", "new", "by recover", or, of a fault, what is wrong."""
    rng = random.Random(seed)
    work = folder / "interrupted"
    shutil.rmtree(work, ignore_errors=True)
    target = work / "m"
    shutil.copytree(pair.directory, target)
    if seed % 2:
        _killed(lambda: pair.save(target), rng.random() * 1.2 * pair.seconds)
        how = "a kill"
    else:
        files = rng.choice([FILES, OF_THE_DISK])
        error = KeyboardInterrupt if files is FILES else lambda: OSError(28, "No space left on device")
        run = Interrupted(files, rng.randrange(1, pair.lines[files]), error)
        try:
            run(lambda: pair.save(target))
        except (SigswapError, KeyboardInterrupt):
            pass
        except OSError:
            if run.place not in NOT_OF_THE_DISK:
                return f"raw error after an interruption at {run.place}"
        how = f"an interruption at {run.place}"
    by = ""
    try:
        model = sigswap.load(target, allow_code=True)
    except SigswapError:
        try:
            sigswap.recover(target)
            model = sigswap.load(target, allow_code=True)
        except SigswapError as error:
            return f"lost after {how}: {error}"
        by = ", by recover"
    got = output(model)
    which = [name for name, wanted in zip(("old", "new"), pair.outputs, strict=True) if torch.equal(got, wanted)]
    if not which:
        return f"a mixture after {how}"
    sigswap.recover(target)
    if os.listdir(work) != ["m"]:
        return f"left behind after {how}: {os.listdir(work)}"
    if not torch.equal(output(sigswap.load(target, allow_code=True)), pair.outputs[which[0] == "new"]) and not by:
        by = ", and the new one by recover"  # the save was complete, and its moves were not
    return which[0] + by


def _killed(function: Callable[[], None], seconds: float) -> None:
    """Runs ``function`` in another process that is killed after so many seconds."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
