"""sigswap's parameters out of the weight decay of optimizers that others make."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from sigswap.conversion.record import owners_of
from sigswap.conversion.state import OwnerState
from sigswap.errors import ArgumentError, Hint
from sigswap.transaction import Transaction, whole

_OF_PARAMETERS = ("params", "param_names")
_APART = (*_OF_PARAMETERS, "weight_decay", "name")  # in which groups may differ that take the same steps


def exempt_from_decay(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Moves the parameters that sigswap gave to a converted ``model`` into groups without weight decay.

    Decay would pull a calibrated bias back to the paper's, and LayerScale to 0. transformers' Trainer leaves them alone
    by itself, once sigswap is imported, and :func:`sigswap.param_groups` makes groups that do; this is for optimizers
    that something else makes, such as ``timm.optim.create_optimizer_v2``.

    >>> optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-4, weight_decay=0.05)
    >>> sigswap.exempt_from_decay(optimizer, model)

    Each moves to a group with ``weight_decay=0`` that is otherwise as its own, and to a new one if there is none. Call
    it before a learning rate scheduler is made, for that counts the groups, and before a state_dict is loaded.

    It warns if the optimizer was made before the conversion, and therefore trains none of them.

    Returns:
        ``optimizer``, changed in place.

    Raises:
        NotConvertedError: The model is not converted.
        ArgumentError: The optimizer trains nothing of the model, or needs a new group and has a scheduler.
    """
    ours = {id(parameter) for state in owners_of(model).values() for parameter in state.parameters()}
    groups = optimizer.param_groups
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    if trained.isdisjoint(map(id, model.parameters())):
        raise ArgumentError("{argument} trains no parameter of the model.", argument="optimizer")
    wanted = {id(parameter) for parameter in model.parameters() if id(parameter) in ours and parameter.requires_grad}
    if wanted and wanted.isdisjoint(trained):
        warnings.warn(
            "the optimizer trains none of the parameters that sigswap gave to the model: it was made before the model "
            "was converted, or from some of its parameters. Make it anew from model.parameters().",
            stacklevel=2,
        )
    decayed = [group for group in groups if group.get("weight_decay") and any(id(p) in ours for p in group["params"])]
    free = [undecayed(groups, group) for group in decayed]
    inner = getattr(optimizer, "optimizer", optimizer)  # of what accelerate prepared
    if None in free and hasattr(inner.step, "_wrapped_by_lr_sched"):
        raise ArgumentError(
            "{argument} has a learning rate scheduler, which would not know a new group.",
            argument="optimizer",
            hint=Hint("Call sigswap.exempt_from_decay before the scheduler is made."),
        )
    with Transaction() as undo, undo:
        undo.on_failure("the optimizer's groups", _as_they_are(groups))
        _move(ours, groups, zip(decayed, free, strict=True))
    return optimizer


def _move(
    ours: Collection[int], groups: list[dict[str, Any]], moves: Iterable[tuple[dict[str, Any], dict[str, Any] | None]]
) -> None:
    """Moves the parameters ``ours`` from the first group of each pair to the second one, or to a new one."""
    for group, target in moves:
        kept = [id(parameter) not in ours for parameter in group["params"]]
        for name in _OF_PARAMETERS:
            if name not in group:
                continue
            each_kept = list(zip(kept, group[name], strict=True))
            moved = [each for keep, each in each_kept if not keep]
            group[name] = [each for keep, each in each_kept if keep]
            if target is None and name == "params":
                label = {"name": f"{group['name']}, no decay"} if "name" in group else {}
                names: dict[str, Any] = {"param_names": []} if "param_names" in group else {}
                target = {**group, **label, **names, "params": moved, "weight_decay": 0.0}
                groups.append(target)
            elif target is not None:
                target[name] = [*target.get(name, ()), *moved]


def _as_they_are(groups: list[dict[str, Any]]) -> Callable[[], None]:
    """What makes the groups what they are now."""
    before, each = list(groups), [whole(group) for group in groups]

    def put_back() -> None:
        groups[:] = before
        for fields in each:
            fields()

    return put_back


def decayed_parameters(optimizer: Any, model: nn.Module) -> list[str]:
    """The names of sigswap's parameters that the optimizer decays."""
    ours = dict(added_parameters(model))
    return [
        ours[id(parameter)]
        for group in optimizer.param_groups
        if group.get("weight_decay")
        for parameter in group["params"]
        if id(parameter) in ours
    ]


def added_parameters(model: nn.Module) -> Iterator[tuple[int, str]]:
    """The identity and the name of each parameter that sigswap gave to a model, converted or not."""
    for path, module in model.named_modules():
        if isinstance(module, OwnerState):
            for name, parameter in module.named_parameters(prefix=path):
                yield id(parameter), name


def undecayed(groups: Sequence[dict[str, Any]], group: dict[str, Any]) -> dict[str, Any] | None:
    """Which of ``groups`` takes the steps of ``group`` and decays nothing: it itself, another, or none."""
    if not group.get("weight_decay"):
        return group
    return next((other for other in groups if _is_free(other, group)), None)


def _is_free(group: dict[str, Any], like: dict[str, Any]) -> bool:
    """Whether it has no decay, and is otherwise as ``like``."""
    names = {name for name in (*group, *like) if name not in _APART}
    return group.get("weight_decay") == 0.0 and all(
        name in group and name in like and bool(group[name] == like[name]) for name in names
    )
