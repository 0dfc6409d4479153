"""What a model may hold that its saved directory cannot say, so that nothing would load it again as it is.

- Parameters of a transformers model that something else computes now. ``torch.nn.utils.parametrize``, pruning and the
  older weight norms put others in a parameter's place, under other names, which nothing would load. Some models of
  transformers do so themselves; these are built with those names again.
- Converted modules that were not there when the model was converted, such as copies: they would be loaded as softmax.

:func:`sigswap.save` makes an error of it. ``save_pretrained`` is what Trainer calls in mid-training, and Trainer itself
resumes from such a directory, for it loads the files' state_dict into a model that has all this already. So there it is
a warning, and a mark in config.json by which loading the directory is an error.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from sigswap.conversion.record import conversion_of, owners_of
from sigswap.errors import CheckpointError, CheckpointWarning, Hint

COPIED = "copied_modules"
REPARAMETRIZED = "reparametrized_modules"
"""The fields of the marks in config.json: paths of modules."""

_HOOKS = (prune.BasePruningMethod, SpectralNorm, WeightNorm)
_TAKE_OFF = "by torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove or the like"


def check_copies(model: nn.Module) -> None:
    """Raises CheckpointError if a module of a converted ``model`` is converted that was not there at the conversion."""
    for path in _copied(model):
        raise CheckpointError(
            f"{path} is a converted module that was not there when the model was converted (a copy, say).",
            hint=Hint("Keep the state_dict, revert and convert the model, and load the state_dict into it again."),
        )


def check_names(model: Any) -> None:
    """Raises CheckpointError if a parameter of a transformers ``model`` was put behind others since it was built."""
    for path, names in _reparametrized(model).items():
        raise CheckpointError(
            f"{path or 'the model'} is parametrized or pruned: its {names} would not be loaded again.",
            hint=Hint(f"Make plain parameters of them first, {_TAKE_OFF}."),
        )


def marks_for(model: Any) -> dict[str, list[str]]:
    """The fields by which config.json says what of a converted transformers ``model`` would not be loaded again."""
    found = {COPIED: _copied(model), REPARAMETRIZED: list(_reparametrized(model))}
    return {name: paths for name, paths in found.items() if paths}


def warn_of(marks: Mapping[str, Any], stacklevel: int) -> None:
    """Warns whoever saves a model with ``marks`` that have such fields. ``stacklevel``: as of the caller."""
    resumes = "A Trainer can still resume from it, with a model made in the same way."
    if marks.get(COPIED):
        warnings.warn(
            f"what is saved cannot be loaded by from_pretrained or sigswap.load: {_some(marks[COPIED])} converted, but "
            "not there when the model was converted (a copy, say). Before the last save, keep the state_dict, revert "
            f"and convert the model, and load the state_dict into it again. {resumes}",
            CheckpointWarning,
            stacklevel=stacklevel + 1,
        )
    if marks.get(REPARAMETRIZED):
        warnings.warn(
            f"what is saved cannot be loaded by from_pretrained or sigswap.load: {_some(marks[REPARAMETRIZED])} "
            f"parametrized or pruned. Before the last save, make plain parameters of that, {_TAKE_OFF}. {resumes}",
            CheckpointWarning,
            stacklevel=stacklevel + 1,
        )


def check_marks(marks: Mapping[str, Any], model: Any, *, with_weights: bool) -> None:
    """Raises CheckpointError if ``marks`` name a module that ``model``, which is being loaded, has and cannot be given
    as it was saved. ``with_weights``: whether weights are to be read into it.
    """
    name = model.config._name_or_path or "the config"
    for path in _present(marks.get(COPIED, ()), model):
        raise CheckpointError(
            f"{name}: {path} was a converted module that was not there when the model was converted (a copy, say); it "
            "would be loaded as softmax attention.",
            hint=Hint("Convert a model of the same modules, and load the state_dict of the directory's files into it."),
        )
    for path in _present(marks.get(REPARAMETRIZED, ()) if with_weights else (), model):
        raise CheckpointError(
            f"{name}: {path or 'the model'} was parametrized or pruned when it was saved, and the weights are those of "
            "that.",
            hint=Hint(
                "Build the model by from_config from the directory's config, parametrize or prune it in the same way, "
                "and load the state_dict of the directory's files into it. Then make plain parameters of them, "
                f"{_TAKE_OFF}, and save it anew."
            ),
        )


def _copied(model: nn.Module) -> list[str]:
    planned = {owner.path for owner in conversion_of(model).owners}
    return [path for path in owners_of(model) if path not in planned]


def _reparametrized(model: Any) -> dict[str, list[str]]:
    """By the path of a module, the names in its state_dict that a model built from the config does not have."""
    behind = {path: module for path, module in model.named_modules() if _is_reparametrized(module)}
    if not behind:
        return {}
    try:
        with torch.device("meta"):
            known = type(model)(copy.deepcopy(model.config)).state_dict().keys()
    except Exception:  # a class that needs more than its config: what it builds is not known
        return {}
    found = {}
    for path, module in behind.items():
        names = [name for part in module.state_dict() for name in [f"{path}.{part}" if path else part]]
        new = [name for name in names if name not in known and ".sigswap." not in f".{name}"]
        if new:
            found[path] = new
    return found


def _is_reparametrized(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    return parametrize.is_parametrized(module) or any(isinstance(hook, _HOOKS) for hook in hooks)


def _present(paths: Iterable[str], model: Any) -> list[str]:
    """Those of ``paths`` that are in ``model``, which may have another head than the one that was saved."""
    modules, prefix = {path for path, _ in model.named_modules()}, f"{model.base_model_prefix}."
    return [path for path in paths if not modules.isdisjoint((path, prefix + path, path.removeprefix(prefix)))]


def _some(paths: list[str]) -> str:
    """The subject of a sentence, and its verb."""
    names = ", ".join(path or "the model" for path in paths[:3])
    return f"{names}{', ...' if paths[3:] else ''} {'are' if paths[1:] else 'is'}"
