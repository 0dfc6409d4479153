"""What spreads a model over processes, left out of a copy that is looked at: there the parameters are whole.

``fully_shard`` makes modules instances of classes of its own and gathers parameters in hooks; ``parallelize_module``
and transformers' plans for tensor parallelism move inputs and outputs in hooks, or in a ``forward`` on the instance.
Without them, and with parameters of the whole shapes, a copy is the model that was spread.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sigswap.conversion.wrappers import is_fully_sharded
from sigswap.transaction import Transaction

OF_TRANSFORMERS = ("transformers.distributed.", "transformers.integrations.tensor_parallel.")
"""Where transformers' hooks and forwards for tensor parallelism come from."""


def original_class(module: nn.Module) -> type[nn.Module]:
    """That of ``module`` before ``fully_shard`` made another one."""
    kinds = type(module).__mro__
    if not is_fully_sharded(module):
        return kinds[0]
    return next(each for each in kinds if not each.__module__.startswith("torch.distributed."))


def leave_out(model: nn.Module, memo: dict[int, Any]) -> None:
    """Keeps process groups out of a deepcopy of ``model`` with ``memo``: the copy has the same objects."""
    for module in model.modules():
        if is_fully_sharded(module):
            state = module._get_fsdp_state()  # type: ignore[operator]
            memo[id(state)] = state
        for value in vars(module).values():
            if type(value).__name__ in ("DeviceMesh", "ProcessGroup"):
                memo[id(value)] = value


@contextmanager
def copyable(model: nn.Module) -> Iterator[None]:
    """Inside, modules are of the classes that they had before ``fully_shard``, whose own refuse to be copied."""
    with Transaction() as undo, undo:
        for module in model.modules():
            if is_fully_sharded(module):
                undo.afterwards("the classes of modules", functools.partial(_set_class, module, type(module)))
                _set_class(module, original_class(module))
        yield


def strip(clone: nn.Module) -> None:
    """Takes the forwards off a copy that transformers has put on instances, around those of their classes."""
    for module in clone.modules():
        forward = vars(module).get("forward")
        if f"{getattr(forward, '__module__', '')}.".startswith(OF_TRANSFORMERS):
            del module.__dict__["forward"]


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind
