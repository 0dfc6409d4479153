"""The state of a distillation in a file, so that an interrupted one goes on where it was."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sigswap import files
from sigswap.errors import ArgumentError, Hint

EVERY = 100
"""Steps after which the state is written, besides at an interruption and at the end."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """The file ``path`` for a run with these ``settings``, plain data, that trains these parameters."""

    path: Path
    settings: Mapping[str, Any]
    trained: Mapping[str, nn.Parameter]

    def __post_init__(self) -> None:
        if not self.path.absolute().parent.is_dir():
            raise ArgumentError(
                f"{{argument}}={str(self.path)!r} cannot be written: there is no directory {self.path.parent}.",
                argument="resume",
            )

    def write(self, state: Mapping[str, Any]) -> None:
        """``state``, the parameters and the settings; complete, or what was there before stays."""
        values = {name: parameter.detach() for name, parameter in self.trained.items()}
        kept = {**state, "settings": dict(self.settings), "parameters": values}
        files.write_whole(self.path, lambda new: torch.save(kept, new))

    def read(self) -> dict[str, Any] | None:
        """The state, with its values given to the parameters; None if there is no file.

        Raises ArgumentError if the file is damaged, or is of another model or other settings.
        """
        if not self.path.exists():
            return None
        hint = Hint("Delete it, or pass another file as {resume}.", {"resume": ""})
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            settings, values = state["settings"], state["parameters"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise ArgumentError(
                f"{{argument}}={str(self.path)!r} is not the state of a distillation: {error}",
                argument="resume",
                hint=hint,
            ) from error
        shapes, wanted = ({name: p.shape for name, p in each.items()} for each in (values, self.trained))
        changed = [
            f"{name} was {settings.get(name)!r} and is {value!r}"
            for name, value in self.settings.items()
            if settings.get(name) != value
        ]
        if shapes != wanted:
            changed.append("other parameters were trained")
        if changed:
            raise ArgumentError(
                f"{{argument}}={str(self.path)!r} holds another run: {'; '.join(changed)}.",
                argument="resume",
                hint=hint,
            )
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(values[name])
        return state
