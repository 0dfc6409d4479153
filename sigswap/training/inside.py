"""Modules of a model that are run by themselves, also where fully_shard holds their parameters in parts."""

from __future__ import annotations

from typing import Any

from torch import nn

from sigswap.conversion.wrappers import is_fully_sharded
from sigswap.transaction import Transaction, entries

_RUN = "_sigswap_run"


class Inside:
    """Runs a module of ``model``, by its path. FSDP2 brings the parameters of the module that it was called on together
    when that one is run, and of all below it, so it has to take such a run for one of that, and of the outermost one.
    """

    def __init__(self, undo: Transaction, model: nn.Module) -> None:
        self.model = model
        self.units = {path: module for path, module in model.named_modules() if is_fully_sharded(module)}
        if not self.units:
            return
        from torch.distributed.fsdp import register_fsdp_forward_method

        for unit in self.units.values():
            undo.afterwards("a method of a module", entries(vars(unit), _RUN))
            setattr(unit, _RUN, _run)
            register_fsdp_forward_method(unit, _RUN)

    def __call__(self, path: str, args: Any, kwargs: Any) -> Any:
        """What the module gives for these arguments."""
        module = self.model.get_submodule(path)
        around = [unit for other, unit in self.units.items() if other != path and f"{path}.".startswith(f"{other}.")]
        around += [self.units[""]] if "" in self.units and path else []
        around.sort(key=lambda unit: sum(1 for _ in unit.modules()))
        entered = list(dict.fromkeys([around[-1], around[0]])) if around else []  # the outermost and the nearest one

        def run(depth: int) -> Any:
            if depth == len(entered):
                return module(*args, **kwargs)
            return getattr(entered[depth], _RUN)(lambda: run(depth + 1))

        return run(0)


def _run(function: Any) -> Any:
    return function()
