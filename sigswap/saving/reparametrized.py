"""Parameters of a transformers model that something else computes now, of which its config says nothing.

``torch.nn.utils.parametrize``, pruning and the older weight norms put others in a parameter's place, under other names,
which nothing would load. Some models of transformers do so themselves; these are built with those names again.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from sigswap.errors import CheckpointError, Hint

_HOOKS = (prune.BasePruningMethod, SpectralNorm, WeightNorm)


def check_names(model: Any) -> None:
    """Raises CheckpointError if a parameter of a transformers ``model`` was put behind others since it was built."""
    behind = {path: module for path, module in model.named_modules() if _is_reparametrized(module)}
    if not behind:
        return
    try:
        with torch.device("meta"):
            known = type(model)(copy.deepcopy(model.config)).state_dict().keys()
    except Exception:  # a class that needs more than its config: what it builds is not known
        return
    for path, module in behind.items():
        names = [name for part in module.state_dict() for name in [f"{path}.{part}" if path else part]]
        new = [name for name in names if name not in known and ".sigswap." not in f".{name}"]
        if new:
            raise CheckpointError(
                f"{path or 'the model'} is parametrized or pruned: its {new} would not be loaded again.",
                hint=Hint(
                    "Make plain parameters of them first, by torch.nn.utils.parametrize.remove_parametrizations, "
                    "torch.nn.utils.prune.remove or the like."
                ),
            )


def _is_reparametrized(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    return parametrize.is_parametrized(module) or any(isinstance(hook, _HOOKS) for hook in hooks)
