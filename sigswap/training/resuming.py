"""The state of a distillation in a file, so that an interrupted one goes on where it was.

The file is that of one process, whatever number of ranks wrote it: rank 0 does, after all have brought the tensors
together, and rank 0 reads it and sends each tensor to the others. So a run may go on in another number of ranks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sigswap import files
from sigswap.conversion.wrappers import is_shard
from sigswap.distributed.ranks import Ranks
from sigswap.distributed.shards import put, whole
from sigswap.errors import ArgumentError, Hint
from sigswap.training.together import Together

_MAPPINGS = ("optimizer", "settings", "parameters")
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

    def write(self, among: Together, state: Mapping[str, Any], optimizer: Callable[[bool], dict[str, Any]]) -> None:
        """``state``, the parameters, the settings and what ``optimizer`` gives; complete, or what was there before
        stays. By rank 0: the others are needed where the parameters are in parts, and wait for nothing.
        """
        writes = among.everyone.rank == 0
        if not writes and not among.by_parts:
            return
        values = {name: _brought(parameter, writes) for name, parameter in self.trained.items()}
        kept = {**state, "optimizer": optimizer(writes), "settings": dict(self.settings), "parameters": values}
        if writes:
            files.write_whole(self.path, lambda new: torch.save(kept, new))

    def read(self, ranks: Ranks) -> dict[str, Any] | None:
        """The state, with its values given to the parameters; None if there is no file for rank 0.

        Other ranks get it without the optimizer's tensors (:func:`put_state`). Raises ArgumentError, in all ranks, if
        the file is damaged, or is of another model or other settings.
        """
        state: dict[str, Any] | None = None
        with ranks.all_or_none():
            if ranks.rank == 0:
                state = self._read()
        known = None if state is None else {name: state[name] for name in ("losses", "mixer")}
        known = ranks.gathered(known)[0]
        if known is None:
            return None
        for name, parameter in self.trained.items():
            put(parameter, ranks.sent(None if state is None else state["parameters"][name], parameter))
        return {"optimizer": {"state": {}}, **known} if state is None else state

    def _read(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        hint = Hint("Delete it, or pass another file as {resume}.", {"resume": ""})
        if not self.path.is_file():
            raise ArgumentError(
                f"{{argument}}={str(self.path)!r} is not a file.",
                argument="resume",
                hint=Hint("Pass the path of a file, which need not be there yet."),
            )
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            _check(state, self.trained)
        except Exception as error:  # of a file that is damaged, whatever torch.load raises
            raise ArgumentError(
                f"{{argument}}={str(self.path)!r} is not the state of a distillation: {error}",
                argument="resume",
                hint=hint,
            ) from error
        settings, values = state["settings"], state["parameters"]
        forms, wanted = ({name: (p.shape, p.dtype) for name, p in each.items()} for each in (values, self.trained))
        changed = [
            f"{name} was {settings.get(name)!r} and is {value!r}"
            for name, value in self.settings.items()
            if settings.get(name) != value
        ]
        if forms != wanted:
            changed.append("other parameters were trained")
        if changed:
            raise ArgumentError(
                f"{{argument}}={str(self.path)!r} holds another run: {'; '.join(changed)}.",
                argument="resume",
                hint=hint,
            )
        return state


def _check(state: Any, trained: Mapping[str, nn.Parameter]) -> None:
    """Raises ValueError unless ``state`` is made as :meth:`Kept.write` makes it."""

    def need(right: bool, what: str) -> None:
        if not right:
            raise ValueError(f"{what} is not what a distillation writes")

    need(isinstance(state, dict) and state.keys() >= {"losses", "mixer", *_MAPPINGS}, "its content")
    for name in _MAPPINGS:
        need(isinstance(state[name], dict), name)
    need(not any(isinstance(value, Tensor) for value in state["settings"].values()), "settings")
    for value in state["parameters"].values():
        need(isinstance(value, Tensor) and not bool(value.isnan().any()), "parameters")
    losses, mixer, moments = state["losses"], state["mixer"], state["optimizer"].get("state")
    need(isinstance(losses, list) and len(losses) == 2 and all(isinstance(each, list) for each in losses), "losses")
    need(all(isinstance(loss, float) and math.isfinite(loss) for each in losses for loss in each), "losses")
    need(isinstance(mixer, list) and len(mixer) == 2, "mixer")
    need(all(type(number) is int and number >= 0 for number in mixer), "mixer")
    need(isinstance(moments, dict), "optimizer")
    shapes = {parameter.shape for parameter in trained.values()}
    for number, values in moments.items():
        need(type(number) is int and 0 <= number < len(trained), "optimizer")
        need(isinstance(values, dict) and values.keys() == {"step", "exp_avg", "exp_avg_sq"}, "optimizer")
        for value in values.values():
            need(isinstance(value, Tensor) and value.is_floating_point(), "optimizer")
            need(value.dim() == 0 or value.shape in shapes, "optimizer")


def state_of(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]], kept: bool) -> dict[str, Any]:
    """The state_dict of an optimizer that has the ``groups`` undivided, with whole tensors; ``kept``: by this rank."""
    numbers = {parameter: index for index, parameter in enumerate(_parameters(groups))}
    state = {
        number: {name: _brought(value, kept) for name, value in optimizer.state[parameter].items()}
        for parameter, number in numbers.items()
        if parameter in optimizer.state
    }
    options = {group["name"]: group for group in optimizer.state_dict()["param_groups"]}
    each = [{**options[group["name"]], "params": [numbers[p] for p in group["params"]]} for group in groups]
    return {"state": state, "param_groups": each}


def put_state(
    optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]], kept: Mapping[str, Any], ranks: Ranks
) -> None:
    """Gives ``optimizer`` the tensors that :func:`state_of` found, which rank 0 has in ``kept``."""
    forms = {
        number: {name: value.dim() > 0 for name, value in state.items()} for number, state in kept["state"].items()
    }
    forms = ranks.gathered(forms)[0]
    places = {id(p): index for index, p in enumerate(_parameters(optimizer.param_groups))}
    own = optimizer.state_dict()
    for number, parameter in enumerate(_parameters(groups)):
        if number not in forms:
            continue
        values, state = kept["state"].get(number, {}), {}
        for name, is_like_it in forms[number].items():
            state[name] = torch.zeros((), dtype=torch.float32)
            if is_like_it:
                state[name] = torch.zeros_like(parameter)
            put(state[name], ranks.sent(values.get(name), state[name]))
        own["state"][places[id(parameter)]] = state
    optimizer.load_state_dict(own)


def _parameters(groups: Sequence[Mapping[str, Any]]) -> list[nn.Parameter]:
    return [parameter for group in groups for parameter in group["params"]]


def _brought(tensor: Tensor, kept: bool) -> Tensor:
    """All of ``tensor``, in the CPU's memory if it is in parts; where it is not ``kept``, nothing of it."""
    if not is_shard(tensor):
        return tensor.detach()
    found = whole(tensor)
    return found.cpu() if kept else found[:0]
