"""Where a model comes from, as a string: what the command line takes and what a saved directory stores.

``timm:NAME`` is a timm architecture, ``module:function`` a function that returns a model, anything else a
directory or a hub id of transformers.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sigswap.errors import ArgumentError
from sigswap.optional import require

ANSWER = 5.0
"""Seconds in which the hub has to say whether it has a model."""
# Arguments of timm.create_model by which it reads weights from elsewhere, some of them pickled.
_TIMM_FILES = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "model_name"}


def is_factory(spec: str) -> bool:
    """Whether ``spec`` is ``timm:NAME`` or ``module:function``, and not a directory or a hub id."""
    return ":" in spec and not os.path.isdir(spec)


def resolve(spec: str) -> Any:
    """The object that ``module:name`` means, imported. Raises ArgumentError if there is none."""
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ArgumentError(f"{spec!r} must be 'module:function', for example 'mypackage.models:build'.")
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ArgumentError(
            f"{spec!r}: there is no module {module_name!r} on the import path ({os.getcwd()} "
            f"{'is' if os.getcwd() in sys.path or '' in sys.path else 'is not'} on it)."
        ) from None
    for part in name.split("."):
        if not hasattr(target, part):
            raise ArgumentError(f"{spec!r}: module {module_name!r} has no {name!r}.")
        target = getattr(target, part)
    return target


def build(spec: str, kwargs: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """The model that ``timm:NAME`` or ``module:function`` builds with ``kwargs``.

    ``pretrained`` is for timm alone: load the published weights.

    Raises:
        ArgumentError: no such architecture or function, or it does not return a module, or the published weights
            cannot be had.
        SigswapError: timm is not installed.
    """
    if spec.startswith("timm:"):
        timm = require("timm", "vision")
        name = spec.removeprefix("timm:")
        if not timm.is_model(name):
            raise ArgumentError(f"{spec!r}: timm {timm.__version__} has no architecture {name!r}.")
        others = sorted(set(kwargs) & _TIMM_FILES)
        if others:
            raise ArgumentError(f"{spec!r}: {others} name other files, which sigswap reads no weights from.")
        try:
            made: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
        except Exception as error:  # of the hub, of the network and of the disk
            if not pretrained:
                raise
            raise ArgumentError(
                f"{spec!r}: the published weights could not be read: {type(error).__name__}: {error}"
            ) from error
        return made
    function = resolve(spec)
    if not callable(function):
        raise ArgumentError(f"{spec!r} is a {type(function).__name__}, and cannot be called.")
    model = function(**kwargs)
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{spec!r} returned a {type(model).__name__}, and not a torch.nn.Module.")
    return model


def transformers_class(config: Any) -> type[Any]:
    """The class that ``config.architectures`` names, so that a causal LM stays one; else the base model's."""
    transformers = require("transformers", "hf")
    modeling = type(config).__module__.replace(".configuration_", ".modeling_")
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is None and modeling.startswith("transformers.models."):  # a part of a model, of its own module only
            found = getattr(importlib.import_module(modeling), name, None)
        if isinstance(found, type):
            return found
    base: type[Any] = transformers.MODEL_MAPPING[type(config)]
    return base


def custom_class(config: Any, directory: Path) -> type[Any] | None:
    """The class that ``auto_map`` names in Python files of ``directory`` (or of a repository that it names), whose code
    runs. None: ``config`` has no such class for its architecture."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    named = [name for auto, name in (getattr(config, "auto_map", None) or {}).items() if auto.startswith("AutoModel")]
    for name in named:
        if isinstance(name, str) and name.rpartition(".")[2] in (config.architectures or ()):
            found: type[Any] = get_class_from_dynamic_module(name, directory)
            return found
    return None


def from_transformers(name: str, *, weights: bool = True, **options: Any) -> nn.Module:
    """The model in a transformers directory or of a hub id, in eval mode and in the dtype it was saved in.

    Without ``weights`` only its config is read and the model is on the meta device.

    Raises:
        ArgumentError: there is no such directory or hub id, or it does not hold a transformers model.
        SigswapError: transformers is not installed.
    """
    transformers = require("transformers", "hf")
    if os.path.isdir(name) and not (Path(name) / "config.json").is_file():
        raise ArgumentError(f"{name}: the directory has no config.json, so it is no transformers model.")
    if not os.path.isdir(name):
        _ask_the_hub(name)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        model_class = transformers_class(config)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ArgumentError(f"{name}: not a directory or hub id of a transformers model: {error}") from error
    model: nn.Module
    if weights:
        try:
            model = model_class.from_pretrained(name, dtype="auto", **options)
        except OSError as error:
            raise ArgumentError(f"{name}: {error}") from error
        return model
    with torch.device("meta"):
        model = model_class(config)
    return model.eval()


def _ask_the_hub(name: str) -> None:
    """Raises ArgumentError if ``name`` is neither in the cache nor on the hub, or the hub does not answer at once.

    transformers asks for many files, each several times, and so takes half a minute to say that of a mistyped name.
    """
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    nothing = f"{name}: not a directory or hub id of a transformers model"
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        url = hf_hub_url(name, "config.json")
    except HFValidationError as error:
        raise ArgumentError(f"{nothing}: there is no such directory.") from error
    if HF_HUB_OFFLINE:
        raise ArgumentError(f"{nothing}: it is not in the hub's cache, and HF_HUB_OFFLINE is set.")
    try:
        get_hf_file_metadata(url, token=get_token(), timeout=ANSWER)
    except GatedRepoError:
        return  # of which transformers says what to do
    except RepositoryNotFoundError as error:
        raise ArgumentError(f"{nothing}: there is no such directory, and the hub has no such model.") from error
    except HfHubHTTPError:
        return
    except Exception as error:  # of the network
        raise ArgumentError(
            f"{nothing}: there is no such directory, it is not in the hub's cache, and the hub cannot be reached "
            f"({type(error).__name__})."
        ) from error
