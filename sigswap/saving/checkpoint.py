"""Save a converted model to a directory, and load it back: safetensors and JSON, never pickle.

A transformers model becomes a directory of transformers' own, see :mod:`sigswap.saving.transformers_hook`. Any other
model becomes ``model.safetensors`` and ``sigswap.json``, which holds the conversion and the *factory* that
builds the unconverted model: ``timm:NAME``, or ``module:function`` for a function of the user's.

A save first writes every file to a directory beside the target. Only when all of them are complete are they
moved in, the config last. If anything fails, what was in the target before is there again; other files in the
target are left as they are.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import math
import os
import re
import shutil
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sigswap.conversion import accelerate_hooks
from sigswap.conversion.install import apply_conversion
from sigswap.conversion.record import Conversion, conversion_of, is_converted
from sigswap.errors import ArgumentError, CheckpointError, Hint, NotConvertedError, SigswapError
from sigswap.optional import require
from sigswap.saving import sources, transformers_hook
from sigswap.saving.rebuilt import Difference, add_buffer, from_json, is_same_function, to_json, unsaved_buffers
from sigswap.version import __version__

CONFIG = "sigswap.json"
WEIGHTS = "model.safetensors"
# The files of a transformers directory that go with the model and that save_pretrained does not write.
COMPANIONS = (
    *("tokenizer*", "vocab.*", "vocab-*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json"),
    *("*preprocessor_config.json", "processor_config.json", "chat_template*", "additional_chat_templates"),
    *("modules.json", "*sentence_transformers.json", "sentence_*_config.json", "[0-9]_*", "[0-9][0-9]_*"),
)
# Attributes that do not change what a model computes, and those that torch keeps for itself.
_NOT_COMPARED = ("training", "grad_checkpointing", *accelerate_hooks.MOVES)


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

    model = getattr(model, "_orig_mod", model)  # a compiled model is saved as the model that was compiled
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
        write = functools.partial(_write_factory, model, *_find_factory(model, factory, factory_kwargs))
    with _replacing(Path(directory)) as staging:
        write(staging)


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
    elif transformers_hook.read_marks(directory) is not None:
        model = _load_transformers(directory)
    else:
        raise CheckpointError(
            f"{directory} holds no model saved by sigswap: there is no {CONFIG}, and no config.json with "
            'quantization_config.quant_method "sigswap".'
        )
    if dtype is not None:
        model = model.to(dtype)
    return model.to(device).eval() if device is not None else model.eval()


def is_saved(directory: str | os.PathLike[str]) -> bool:
    """Whether ``directory`` holds a model that :func:`load` loads."""
    path = Path(directory)
    return (path / CONFIG).is_file() or transformers_hook.read_marks(path) is not None


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
        "format": transformers_hook.FORMAT,
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
    transformers_hook.check_format(config, str(path))
    fields = ("factory", "factory_kwargs", "attributes", "aliases", "unsaved_buffers", "conversion")
    missing = [name for name in fields if name not in config]
    if missing:
        raise CheckpointError(f"{path} lacks {missing}.")
    try:
        model = sources.build(config["factory"], from_json(config["factory_kwargs"]))
        for module_path, values in config["attributes"].items():
            if _is_added(module_path):
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


# Factories


def _find_factory(
    model: nn.Module, factory: str | None, kwargs: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any], Difference]:
    """The factory, its arguments, and what to set on what it builds, so that it equals ``model``."""
    if factory is not None:
        if not sources.is_factory(factory):
            raise ArgumentError(
                f"{{argument}}={factory!r} must be 'module:function' or 'timm:NAME'.", argument="factory"
            )
        kwargs = dict(kwargs or {})
        try:
            to_json(kwargs)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"{{argument}}={kwargs!r} must be of types that JSON has, or tuples: {error}.",
                argument="factory_kwargs",
            ) from None
        return factory, kwargs, _compare(model, factory, kwargs)
    if kwargs is not None:
        raise ArgumentError("{argument} needs a factory.", argument="factory_kwargs")
    cfg: Any = getattr(model, "pretrained_cfg", None)
    architecture = cfg.get("architecture") if isinstance(cfg, dict) else getattr(cfg, "architecture", None)
    if architecture is None:
        raise CheckpointError(
            f"sigswap.save does not know how to build a {type(model).__name__} again: it is neither a transformers "
            "nor a timm model.",
            argument="factory",
            hint=Hint(
                "Pass {factory}, a function that returns the unconverted model and that can be imported where the "
                "model will be loaded, with {factory_kwargs} if it takes arguments.",
                {"factory": "'module:function'", "factory_kwargs": "{...}"},
            ),
        )
    tag = cfg.get("tag") if isinstance(cfg, dict) else cfg.tag
    name = f"timm:{architecture}.{tag}" if tag else f"timm:{architecture}"
    problem: CheckpointError | None = None
    for candidate in _timm_kwargs(model):
        try:
            return name, candidate, _compare(model, name, candidate)
        except CheckpointError as error:
            problem = problem or error
    raise CheckpointError(
        f"The arguments that this timm model was built with could not be found out. With those that "
        f"could be: {problem}",
        argument="factory_kwargs",
        hint=Hint(
            "Pass {factory}, and the other arguments of timm.create_model as {factory_kwargs}.",
            {"factory": repr(name), "factory_kwargs": "{...}"},
        ),
    )


def _timm_kwargs(model: Any) -> Iterator[dict[str, Any]]:
    """Arguments of timm.create_model that may have been given, the likeliest first."""
    kwargs: dict[str, Any] = {}
    if isinstance(getattr(model, "num_classes", None), int):
        kwargs["num_classes"] = model.num_classes
    if isinstance(getattr(model, "in_chans", None), int):
        kwargs["in_chans"] = model.in_chans
    rates = [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]
    if rates:
        kwargs["drop_path_rate"] = max(rates)  # timm's rule gives the last block the whole rate
    yield kwargs
    sized = dict(kwargs)
    for owner in (getattr(model, "patch_embed", None), model):
        size = getattr(owner, "img_size", None)
        if size is not None:
            sized["img_size"] = list(size) if isinstance(size, tuple) else size
            yield sized
            break
    pool = getattr(model, "global_pool", None)
    pool = getattr(getattr(getattr(model, "head", None), "global_pool", None), "pool_type", pool)
    if isinstance(pool, str):
        yield {**kwargs, "global_pool": pool}
        yield {**sized, "global_pool": pool}


def _compare(model: nn.Module, factory: str, kwargs: dict[str, Any]) -> Difference:
    """Checks that the factory builds ``model``, but for values; returns what differs and can be set.

    What a module computes is set by its class, tensors, submodules and attributes. Attributes that are plain
    numbers or strings (a dropout rate, an eps, timm's fused_attn) are set again after loading, and so are buffers
    that no state_dict has, such as a table that the last run has left; any other difference is an error.
    """
    built = _build_without_data(lambda: sources.build(factory, kwargs), factory)
    apply_conversion(built, conversion_of(model))
    other_model = f"{factory!r}{f' with factory_kwargs={kwargs}' if kwargs else ''} builds another model than this one"
    ours, theirs = _tensors(model), _tensors(built)
    free, free_there = unsaved_buffers(model), unsaved_buffers(built)
    made = tuple(name for name in free if ours[name] != theirs.get(name) and (name not in theirs or name in free_there))
    for name in [*ours, *theirs]:
        if name not in made and ours.get(name) != theirs.get(name):
            raise CheckpointError(
                f"{other_model}: {name} is {_shape(ours.get(name))} in the model and "
                f"{_shape(theirs.get(name))} in what the factory builds."
            )
    modules, built_modules = dict(model.named_modules()), dict(built.named_modules())
    for path in [*modules, *built_modules]:
        kind, built_kind = (
            type(found[path]).__qualname__ if path in found else "not there" for found in (modules, built_modules)
        )
        if kind != built_kind:
            raise CheckpointError(
                f"{other_model}: module {path!r} is {kind} in the model and {built_kind} in what the factory builds."
            )
    differing: dict[str, dict[str, Any]] = {}
    for path, module in modules.items():
        if _is_added(path):
            continue  # built from the conversion alone
        for name, value in vars(module).items():
            if name.startswith("_") or name in _NOT_COMPARED:
                continue
            other = vars(built_modules[path]).get(name)
            plain = (
                value is None
                or isinstance(value, bool | int | str)
                or (isinstance(value, float) and math.isfinite(value))
            )
            if plain and other != value:
                differing.setdefault(path, {})[name] = value
            elif isinstance(value, types.FunctionType) and not is_same_function(value, other):
                raise CheckpointError(
                    f"{other_model}: {path}.{name} is another function in the model than in what the factory builds."
                )
            elif isinstance(value, tuple | list | torch.dtype) and _is_plain(value) and other != value:
                raise CheckpointError(
                    f"{other_model}: {path}.{name} is {value} in the model and {other} in what the factory builds."
                )
    return Difference(differing, made)


def _is_added(path: str) -> bool:
    """Whether a module is sigswap's, of a converted one."""
    return "sigswap" in path.split(".")


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _tensors(model: nn.Module) -> dict[str, tuple[int, ...]]:
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: tuple(tensor.shape) for name, tensor in named}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {list(shape)}"


def _build_without_data(factory: Callable[[], nn.Module], name: str) -> nn.Module:
    """What ``factory`` builds, on the meta device; on the CPU, if it needs values to be built."""
    state = torch.get_rng_state()
    try:
        with torch.device("meta"):
            return factory()
    except SigswapError:
        raise
    except Exception:
        try:
            return factory()
        except Exception as error:
            raise CheckpointError(
                f"{{argument}}={name!r} failed: {type(error).__name__}: {error}", argument="factory"
            ) from error
    finally:
        torch.set_rng_state(state)  # a save must not change the numbers that training draws next


# Replacing a directory's files


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yields a new directory beside ``target``; at the end its content is moved into it, all or nothing."""
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file, and not a directory.")
    target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.saving-"))
        staging, old = work / "new", work / "old"
        staging.mkdir()
        old.mkdir()
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error
    try:
        yield staging
        if target.exists():
            _move_in(staging, target, old)
        else:
            os.rename(staging, target)
    except OSError as error:
        raise CheckpointError(f"{target} could not be written, and is as it was before: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _move_in(staging: Path, target: Path, old: Path) -> None:
    """Moves what is in ``staging`` into ``target`` and what it replaces to ``old``; undoes that if it fails."""
    new = sorted((path.name for path in staging.iterdir()), key=lambda name: (name in ("config.json", CONFIG), name))
    replaced = [name for name in [*new, *_stale(target, new)] if (target / name).exists()]
    # The configs go first and come last: a process that is killed in between leaves no config, and a directory
    # that does not load, instead of one model's config beside another's weights.
    replaced.sort(key=lambda name: name not in ("config.json", CONFIG))
    moves = [(target / name, old / name) for name in replaced] + [(staging / name, target / name) for name in new]
    done: list[tuple[Path, Path]] = []
    try:
        for source, destination in moves:
            os.rename(source, destination)
            done.append((source, destination))
    except BaseException:
        for source, destination in reversed(done):
            os.rename(destination, source)
        raise


def _stale(target: Path, new: list[str]) -> list[str]:
    """Files of a model that was saved to ``target`` before, that would be taken for parts of the new one."""
    stale = [
        path.name
        for path in target.iterdir()
        if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", path.name)
    ]
    if CONFIG in new and transformers_hook.read_marks(target) is not None:
        stale += ["config.json", "generation_config.json"]
    return [name for name in [*stale, CONFIG] if name not in new]
