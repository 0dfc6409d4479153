"""Save a converted model to a directory, and load it back: safetensors and JSON, never pickle.

A transformers model becomes a directory of transformers' own, see :mod:`sigswap.saving.transformers_hook`. Any other
model becomes ``model.safetensors`` and ``sigswap.json``, which holds the conversion and the *factory* that
builds the unconverted model: ``timm:NAME``, or ``module:function`` for a function of the user's.

A save is all or nothing, see :mod:`sigswap.saving.replacing`; other files in the target are left as they are.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sigswap.conversion import accelerate_hooks
from sigswap.conversion.install import apply_conversion
from sigswap.conversion.record import Conversion, conversion_of, is_converted, part_to_pass
from sigswap.conversion.wrappers import spread_parameter, wrappers_of
from sigswap.errors import ArgumentError, CheckpointError, Hint, NotConvertedError, SigswapError
from sigswap.optional import require
from sigswap.saving import marks, sources, transformers_hook
from sigswap.saving.factories import find_factory, is_added
from sigswap.saving.rebuilt import Difference, add_buffer, from_json, to_json
from sigswap.saving.replacing import replace_files
from sigswap.version import __version__

CONFIG = "sigswap.json"
WEIGHTS = "model.safetensors"
# The files of a transformers directory that go with the model and that save_pretrained does not write.
COMPANIONS = (
    *("tokenizer*", "vocab.*", "vocab-*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json"),
    *("*preprocessor_config.json", "processor_config.json", "chat_template*", "additional_chat_templates"),
    *("modules.json", "*sentence_transformers.json", "sentence_*_config.json", "[0-9]_*", "[0-9][0-9]_*"),
)


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    factory: str | None = None,
    factory_kwargs: Mapping[str, Any] | None = None,
    processor: Any = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """Saves a converted ``model`` to ``directory``, for :func:`load` and, if transformers', ``from_pretrained``.

    Tied weights are stored once. In a directory that exists already, the files of the model saved there before
    are replaced and all others kept; if the save fails, it is left as it was.

    Args:
        factory: what builds the unconverted model when it is loaded: ``"module:function"``, an importable
            function, or ``"timm:NAME"``. Needed unless the model is transformers' or timm's.
            **Loading imports that module and calls that function.**
        factory_kwargs: the arguments for it, of types that JSON has, or tuples of these.
        processor: transformers only: a tokenizer or processor, or several, saved beside the model. Without it,
            the files of the directory (or of the cached hub repository) that the model was loaded from are kept.
        max_shard_size: transformers only: weights beyond this size are split into several files.

    Raises:
        NotConvertedError: the model is not converted.
        CheckpointError: the model cannot be built again from what is known of it, or it has no data
            (meta device), or the directory cannot be written.
        ArgumentError: an argument does not fit the kind of model.
    """
    if factory is not None and not isinstance(factory, str):
        raise ArgumentError(
            f"{{argument}} must be a string, 'module:function' or 'timm:NAME', not {factory!r}: it is imported by that "
            "name.",
            argument="factory",
        )

    model = _savable(model)
    if not is_converted(model):
        raise NotConvertedError(
            "The model is not converted.",
            argument="model",
            hint=Hint("Call sigswap.convert(model) before sigswap.save."),
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta and not _fetches_offloaded(model):
            raise CheckpointError(
                f"{name} is on the meta device: there is no data to save.",
                hint=Hint("If accelerate offloads it, call accelerate.hooks.remove_hook_from_submodules first."),
            )
    if transformers_hook.is_transformers_model(model):
        if factory is not None or factory_kwargs is not None:
            raise ArgumentError(
                "{argument} is not for a transformers model: its config.json says how to build it.", argument="factory"
            )
        write = functools.partial(_write_transformers, model, processor, max_shard_size)
    else:
        if processor is not None:
            raise ArgumentError("{argument} is for transformers models only.", argument="processor")
        write = functools.partial(_write_factory, model, *find_factory(model, factory, factory_kwargs))
    replace_files(Path(directory), write, _stale)


def load(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The converted model that :func:`save` (or a converted model's ``save_pretrained``) wrote, in eval mode.

    It equals the saved model bit for bit, in the dtype that was saved, unless ``dtype`` asks for another. If it
    was saved with a factory, this **imports and calls that factory**: load only directories that you trust.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit the model; the message names
            the file or the tensor.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory.")
    if (directory / CONFIG).is_file():
        model = _load_factory(directory)
    elif marks.read_marks(directory) is not None:
        model = _load_transformers(directory)
    else:
        raise CheckpointError(
            f"{directory} holds no model saved by sigswap: there is no {CONFIG}, and no config.json with "
            'quantization_config.quant_method "sigswap".'
        )
    if dtype is not None:
        model = model.to(dtype)
    return model.to(device).eval() if device is not None else model.eval()


def _savable(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of ``model``, which is what is saved. Raises CheckpointError where that is not all
    of it.
    """
    spread = spread_parameter(model)
    for wrapper in wrappers_of(model):
        if wrapper.kind == "sharded":
            spread = f"those inside {wrapper.name}"
        if wrapper.kind == "adapted":
            raise CheckpointError(
                f"a {wrapper.name} has adapters, which sigswap.save does not save.",
                hint=Hint(
                    "Save them by its own save_pretrained, and the converted model before they are put on; or save "
                    "model.merge_and_unload()."
                ),
            )
        model = wrapper.inside
    if spread is not None:
        raise CheckpointError(
            f"the parameters of the model are spread over processes ({spread}).",
            hint=Hint("Load its full state_dict into a converted model that is not, and save that one."),
        )
    if part_to_pass(model) is not None:
        conversion_of(model)  # which says so
    return model


def is_saved(directory: str | os.PathLike[str]) -> bool:
    """Whether ``directory`` holds a model that :func:`load` loads."""
    path = Path(directory)
    return (path / CONFIG).is_file() or marks.read_marks(path) is not None


# transformers


def _write_transformers(model: Any, processor: Any, max_shard_size: int | str, staging: Path) -> None:
    source = source_directory(model.config._name_or_path)
    if processor is None and source is not None:
        for path in source.iterdir():
            if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in COMPANIONS):
                copy = shutil.copytree if path.is_dir() else shutil.copyfile
                copy(path, staging / path.name)
    for part in processor if isinstance(processor, list | tuple) else (processor,):
        if part is not None:
            part.save_pretrained(staging)
    model.save_pretrained(staging, max_shard_size=max_shard_size)


def _fetches_offloaded(model: nn.Module) -> bool:
    """Whether transformers' save_pretrained brings the weights that accelerate has on meta between calls."""
    places = set(getattr(model, "hf_device_map", {}).values())
    known = len(places) > 1 and not places.isdisjoint(("cpu", "disk"))
    return known and transformers_hook.is_transformers_model(model) and accelerate_hooks.is_hooked(model)


def source_directory(name: str) -> Path | None:
    """The directory that a transformers model was loaded from, also if it is one of the hub's cache."""
    if not name:
        return None
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a directory that is gone
        return None
    return Path(config).parent if isinstance(config, str) else None


def _load_transformers(directory: Path) -> nn.Module:
    transformers = require("transformers", "hf")
    config_path = directory / "config.json"
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        model_class = sources.transformers_class(config)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{config_path}: {error}") from error
    try:
        model: nn.Module
        model, info = model_class.from_pretrained(directory, dtype="auto", output_loading_info=True)
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        if isinstance(error, SigswapError):
            raise
        raise CheckpointError(f"{directory}: the weights could not be loaded: {error}") from error
    _check_keys(directory, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return model


# Any other model


def _write_factory(
    model: nn.Module, factory: str, kwargs: dict[str, Any], difference: Difference, staging: Path
) -> None:
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name} in the model's state_dict is a {type(value).__name__}, and no tensor.")
    kept, aliases = _untied(state)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    made = {name: buffers[name].detach().clone().contiguous() for name in difference.buffers}
    kept |= made
    save_file(kept, staging / WEIGHTS, metadata={"format": "pt"})
    config = {
        "format": marks.FORMAT,
        "sigswap_version": __version__,
        "factory": factory,
        "factory_kwargs": to_json(kwargs),
        "attributes": difference.attributes,
        "aliases": aliases,
        "unsaved_buffers": {name: _dtype_name(buffer) for name, buffer in model.named_buffers() if name not in state},
        "conversion": conversion_of(model).to_dict(),
    }
    if made:
        config["made_buffers"] = {
            name: {"shape": list(buffer.shape), "dtype": _dtype_name(buffer)} for name, buffer in made.items()
        }
    (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _load_factory(directory: Path) -> nn.Module:
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    marks.check_format(config, str(path))
    fields = ("factory", "factory_kwargs", "attributes", "aliases", "unsaved_buffers", "conversion")
    missing = [name for name in fields if name not in config]
    if missing:
        raise CheckpointError(f"{path} lacks {missing}.")
    try:
        model = sources.build(config["factory"], from_json(config["factory_kwargs"]))
        for module_path, values in config["attributes"].items():
            if is_added(module_path):
                continue  # written by an earlier version, and of no use
            for name, value in values.items():
                setattr(model.get_submodule(module_path), name, value)
        apply_conversion(model, Conversion.from_dict(config["conversion"]))
        made = {name: add_buffer(model, name, **form) for name, form in config.get("made_buffers", {}).items()}
    except (SigswapError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    _read_weights(model, directory / WEIGHTS, config["aliases"], made)
    buffers = dict(model.named_buffers())
    for name, dtype in config["unsaved_buffers"].items():
        if name in buffers:
            buffers[name].data = buffers[name].data.to(getattr(torch, dtype))
    return model


def _read_weights(model: nn.Module, path: Path, aliases: Mapping[str, str], made: Mapping[str, Tensor]) -> None:
    """Gives the model's tensors, and the buffers ``made``, the values and dtypes in the file, in place, so that ties
    between them stay."""
    targets = {**model.state_dict(keep_vars=True), **made}
    try:
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in stored}
            _check_keys(
                path,
                set(targets) - stored - set(aliases),
                stored - set(targets),
                [(name, shapes[name], tuple(targets[name].shape)) for name in stored & set(targets)
                 if shapes[name] != tuple(targets[name].shape)],
            )  # fmt: skip
            for name in sorted(stored):
                # The clone is aligned in memory; in the last bit, results on a CPU can depend on that.
                targets[name].data = file.get_tensor(name).clone().to(targets[name].device)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} could not be read: {error}") from error
    for name, source in aliases.items():
        if name not in targets or source not in targets:
            raise CheckpointError(f"{path}: the model has no tied tensors {name} and {source}.")
        owner_path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_path)
        tensors = owner._parameters if attribute in owner._parameters else owner._buffers
        tensors[attribute] = targets[source]


def _check_keys(where: Path, missing: Any, unexpected: Any, mismatched: Any) -> None:
    problems = [
        f"{what} {sorted(map(str, names))[:5]}{' and more' if len(names) > 5 else ''}"
        for what, names in (
            ("lacks the model's tensors", missing),
            ("has tensors that the model does not have:", unexpected),
            ("has tensors of another shape than the model's:", mismatched),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{where} {', and '.join(problems)}")


def _untied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that a safetensors file can hold, and for each name of a tied one the name it is stored under."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        same = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and same in first:
            aliases[name] = first[same]
            continue
        first[same] = name
        storage = tensor.untyped_storage().data_ptr()
        # Views of one storage (weights fused into one tensor) are stored each for itself.
        kept[name] = tensor.detach().clone() if storage in storages else tensor.detach().contiguous()
        storages.add(storage)
    return kept, aliases


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# What is replaced


def _stale(target: Path, new: Sequence[str]) -> list[str]:
    """Files of a model that was saved to ``target`` before, that would be taken for parts of the new one."""
    stale = [
        path.name
        for path in target.iterdir()
        if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", path.name)
    ]
    with suppress(CheckpointError):  # a damaged config.json is nobody's
        if CONFIG in new and marks.read_marks(target) is not None:
            stale += ["config.json", "generation_config.json"]
    return [name for name in [*stale, CONFIG] if name not in new]
