"""What becomes of a converted module that is exchanged for another one, as some forwards do by themselves.

A BigBird of transformers that gets a short input makes new attention modules of the old ones' layers, for good. They
would be softmax, without a word. So a new module that has layers or weights of the converted one takes its conversion
over; if its calls are others than those that were planned, its forward raises UnknownCallError. Where a converted
module is exchanged for something else, or with what holds it, the log says so.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from sigswap.conversion import accelerate_hooks
from sigswap.conversion.mode import base_class, swapped_class
from sigswap.conversion.state import OwnerState

logger = logging.getLogger("sigswap")
_hooks: list[Any] = []


def watch_for_exchanges() -> None:
    """From now on, in this process, :func:`_exchanged` sees each module that is put into the place of another."""
    if not _hooks:
        _hooks.append(register_module_module_registration_hook(_exchanged))


def _exchanged(parent: nn.Module, name: str, new: Any) -> None:
    old = parent._modules.get(name)
    if old is None or old is new or not isinstance(new, nn.Module):
        return
    owners = [module for module in old.modules() if base_class(module) is not None]
    if not owners:
        return
    kept = {id(module) for module in new.modules()}
    if id(old) not in kept and owners[0] is old and _is_made_of(new, old):
        _take_over(old, new)
        kept.add(id(old))
    gone = [_path(owner) for owner in owners if id(owner) not in kept]
    if gone:
        logger.warning(
            "%s of a %s, a converted module or one that holds such, was exchanged for a %s: what is sigmoid attention "
            "no longer is %s",
            name,
            type(parent).__name__,
            type(new).__name__,
            ", ".join(gone[:5]) + (", ..." if len(gone) > 5 else ""),
        )


def _is_made_of(new: nn.Module, old: nn.Module) -> bool:
    """Whether ``new``, which nobody has converted, has layers or weights of ``old``."""
    if hasattr(new, "sigswap"):
        return False
    own = {id(part) for part in (*old.children(), *old.parameters()) if not isinstance(part, OwnerState)}
    own -= {id(parameter) for parameter in old._modules["sigswap"].parameters()}  # type: ignore[union-attr]
    return any(id(part) in own for part in (*new.children(), *new.parameters()))


def _take_over(old: nn.Module, new: nn.Module) -> None:
    new.add_module("sigswap", old._modules["sigswap"])
    accelerate_hooks.set_class(new, swapped_class(type(new)))
    logger.info(
        "%s: its %s has become a %s, which is converted, too", _path(old), type(old).__name__, type(new).__name__
    )


def _path(owner: nn.Module) -> str:
    state = owner._modules.get("sigswap")
    return (isinstance(state, OwnerState) and state.plan.path) or type(owner).__name__
