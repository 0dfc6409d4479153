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
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sigswap.conversion import accelerate_hooks
from sigswap.conversion.keeping import thread_state
from sigswap.conversion.record import Conversion, conversion_of, is_converted, part_to_pass
from sigswap.conversion.wrappers import check_module, spread_parameter, wrappers_of
from sigswap.distributed.ranks import SAVE, Ranks
from sigswap.errors import ArgumentError, CheckpointError, Hint, NotConvertedError, SigswapError, check_flag
from sigswap.optional import require
from sigswap.saving import marks, model_card, remote_code, schema, sources, transformers_hook, unloadable, weights
from sigswap.saving.factories import (
    built_on_meta,
    check_buffers,
    check_plan_sizes,
    find_factory,
    finish,
    unmoved_random_state,
)
from sigswap.saving.gathered import Gathered
from sigswap.saving.rebuilt import Difference, from_json, to_json
from sigswap.saving.replacing import directory_at, leftovers, recover_hint, replace_files, warn_of_leftovers
from sigswap.transaction import Transaction
from sigswap.version import __version__

CONFIG = "sigswap.json"
WEIGHTS = "model.safetensors"
_RUN_CODE = Hint("Pass {allow_code} if you trust the directory.", {"allow_code": "True"})
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
    remote_code: bool = False,
) -> None:
    """Saves a converted ``model`` to ``directory``, for :func:`load` and, if transformers', ``from_pretrained``.

    Tied weights are stored once. A transformers model gets a model card (README.md), unless there is one that is not
    sigswap's: what was swapped, what its calibration said, how to load it. In a directory that exists already, the
    files of the model saved there before are replaced and all others kept; if the save fails, it is left as it was.

    A model whose parameters are spread over processes (fully_shard, tensor parallelism) is saved by all of them: each
    has to call this. Rank 0 writes, tensor by tensor; the others wait for it, and what fails there is an error in all
    of them. (Any other model is saved by the process that calls this; a transformers model by rank 0, inside
    DistributedDataParallel say.)

    Args:
        factory: what builds the unconverted model when it is loaded: ``"module:function"``, an importable
            function, or ``"timm:NAME"``. Needed unless the model is transformers' or timm's.
            **Loading imports that module and calls that function.**
        factory_kwargs: the arguments for it, of types that JSON has, or tuples of these.
        processor: transformers only: a tokenizer or processor, or several, saved beside the model. Without it,
            the files of the directory (or of the cached hub repository) that the model was loaded from are kept.
        max_shard_size: transformers only: weights beyond this size are split into several files. Rank 0 holds as much
            in memory if the model is spread.
        remote_code: transformers only: write a Python file beside the model, by which ``AutoModel.from_pretrained(...,
            trust_remote_code=True)`` loads it where sigswap is not installed, too; there it runs in plain PyTorch. For
            models whose attention is by ``F.scaled_dot_product_attention`` (``attn_implementation="sdpa"``).

    Raises:
        NotConvertedError: the model is not converted.
        CheckpointError: the model cannot be built again from what is known of it, or it has no data
            (meta device), or the directory cannot be written; or ``remote_code`` cannot hold its attention.
        ArgumentError: an argument does not fit the kind of model, or ``directory`` is no path.
    """
    if factory is not None and not isinstance(factory, str):
        raise ArgumentError(
            f"{{argument}} must be a string, 'module:function' or 'timm:NAME', not {factory!r}: it is imported by that "
            "name.",
            argument="factory",
        )
    check_module(model)
    target = directory_at(directory)

    with Transaction() as undo, undo:
        thread_state(undo.on_failure)
        model = _savable(model)
        if transformers_hook.is_transformers_model(model):
            transformers_hook.keep_configs(undo.on_failure, model)
        ranks = Ranks(SAVE, alone=spread_parameter(model) is None)
        ranks.arrive()
        with ranks.all_or_none():
            gathered, write = _writing(ranks, model, factory, factory_kwargs, processor, max_shard_size, remote_code)
        ranks.check_same(
            tensors=[(name, tuple(tensor.shape), tensor.dtype) for name, tensor in gathered.state.items()],
            conversion=conversion_of(model).to_dict(),
        )
        with ranks.all_or_none():
            try:
                if ranks.rank == 0:
                    replace_files(target, functools.partial(_write, model, write, target, remote_code), _stale)
            finally:
                gathered.drain()


def _write(model: nn.Module, write: Callable[[Path], object], target: Path, with_code: bool, staging: Path) -> None:
    write(staging)
    if with_code:
        remote_code.write(staging, model)
    if transformers_hook.is_transformers_model(model) and model_card.may_write(target):
        (staging / model_card.FILE).write_text(model_card.model_card(model, with_code=with_code), encoding="utf-8")


def _writing(
    ranks: Ranks,
    model: nn.Module,
    factory: str | None,
    factory_kwargs: Mapping[str, Any] | None,
    processor: Any,
    max_shard_size: int | str,
    with_code: bool,
) -> tuple[Gathered, Callable[[Path], object]]:
    """What is to be written, and what writes it, by the arguments of :func:`save`."""
    if not is_converted(model):
        raise NotConvertedError(
            "The model is not converted.",
            argument="model",
            hint=Hint("Call sigswap.convert(model) before sigswap.save."),
        )
    unloadable.check_copies(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta and not _fetches_offloaded(model):
            raise CheckpointError(
                f"{name} is on the meta device: there is no data to save.",
                hint=Hint("If accelerate offloads it, call accelerate.hooks.remove_hook_from_submodules first."),
            )
        is_packed = is_traceable_wrapper_subclass(tensor) and not hasattr(tensor, "device_mesh")
        if is_packed and not transformers_hook.writes_quantized(model):
            raise CheckpointError(
                f"{name} is quantized (a {type(tensor).__name__}), in a way that no file can hold.",
                hint=Hint(
                    "Save it before it is quantized, and quantize it again after it is loaded; or load a transformers "
                    "model with quantization_config, and save that."
                ),
            )
    if transformers_hook.is_transformers_model(model):
        if factory is not None or factory_kwargs is not None:
            raise ArgumentError(
                "{argument} is not for a transformers model: its config.json says how to build it.", argument="factory"
            )
        if with_code:
            remote_code.check(model)
        unloadable.check_names(model)
        _check_shard_size(max_shard_size)
        for part in _parts(processor):
            if not callable(getattr(part, "save_pretrained", None)):
                raise ArgumentError(
                    f"{{argument}} must be a tokenizer or processor of transformers, or a list of such, not {part!r}.",
                    argument="processor",
                )
        gathered = Gathered(ranks, _state(model) if spread_parameter(model) is not None else {}, {})
        return gathered, functools.partial(_write_transformers, model, processor, max_shard_size, gathered)
    else:
        for name, given in (("processor", processor is not None), ("remote_code", with_code)):
            if given:
                raise ArgumentError("{argument} is for transformers models only.", argument=name)
        found = find_factory(model, factory, factory_kwargs)
        buffers = dict(model.named_buffers(remove_duplicate=False))
        gathered = Gathered(ranks, _state(model), {name: buffers[name] for name in found[-1].buffers})
        return gathered, functools.partial(_write_factory, model, *found, gathered)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict, of the parameters themselves."""
    state: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name} in the model's state_dict is a {type(value).__name__}, and no tensor.")
    return state


def save_plain(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Saves a model that is not converted, as :func:`save` saves one that is: whole or not at all.

    A transformers model by its own ``save_pretrained``, with the tokenizer's files; of any other model the state_dict
    in ``model.safetensors``, for ``safetensors.torch.load_model``. A ``sigswap.json`` in the directory is removed.

    Raises CheckpointError if the directory cannot be written.
    """

    def write(staging: Path) -> None:
        if transformers_hook.is_transformers_model(model):
            _copy_companions(model, staging)
            model.save_pretrained(staging)  # type: ignore[operator]
        else:
            save_model(model, str(staging / WEIGHTS), metadata={"format": "pt"})

    replace_files(directory_at(directory), write, _stale)


def load(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    allow_code: bool = False,
) -> nn.Module:
    """The converted model that :func:`save` (or a converted model's ``save_pretrained``) wrote, in eval mode.

    It equals the saved model bit for bit, in the dtype that was saved, unless ``dtype`` asks for another. All that the
    directory says is checked before anything is built or read. The global random state stays what it is.

    Args:
        directory: where it was saved.
        device: where the model is to be.
        dtype: what the model is to be in.
        allow_code: run code that the directory names: **a factory, ``module:function``, is imported and called**, and
            a transformers directory's own Python files are run. Only for directories that you trust. timm's
            architectures and transformers' own models need none.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit the model; the message names
            the file and the field or the tensor. Or ``allow_code`` is needed.
        ArgumentError: a ``dtype`` for quantized weights, or one that is not of floats; no such ``device``; or an
            ``allow_code`` that is not True or False.
    """
    directory = directory_at(directory)
    check_flag("allow_code", allow_code)  # "no" would be taken for a yes
    _check_place(device, dtype)
    with Transaction() as undo, undo:
        thread_state(undo.on_failure)
        try:
            warn_of_leftovers(directory)
            model = _load(directory, allow_code)
        except OSError as error:
            raise CheckpointError(f"{directory} could not be read: {error}") from error
        if dtype is not None:
            if transformers_hook.writes_quantized(model):
                raise ArgumentError(
                    f"{{argument}} is not for {directory}, whose weights are quantized.", argument="dtype"
                )
            model = model.to(dtype)
        return model.to(device).eval() if device is not None else model.eval()


def _check_place(device: Any, dtype: Any) -> None:
    """Before a model is loaded for a device that is not there."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)):
        raise ArgumentError(f"{{argument}} must be a torch.dtype of floats, not {dtype!r}.", argument="dtype")
    try:
        torch.empty(0, device="cpu" if device is None else device)
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(f"{{argument}}={device!r} cannot be used: {error}", argument="device") from error


def _load(directory: Path, allow_code: bool) -> nn.Module:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory.", hint=_recovery(directory) or _of_the_hub(directory))
    before = _stamps(directory)
    with unmoved_random_state():
        if (directory / CONFIG).is_file():
            model = _load_factory(directory, allow_code)
        elif marks.read_marks(directory) is not None:
            model = _load_transformers(directory, allow_code)
        else:
            raise CheckpointError(
                f"{directory} holds no model saved by sigswap: there is no {CONFIG}, and no config.json with "
                'quantization_config.quant_method "sigswap".',
                hint=_recovery(directory)
                or Hint(
                    "sigswap.convert converts a model, which transformers or timm loads, and sigswap.save saves it."
                ),
            )
    if _stamps(directory) != before:
        raise CheckpointError(f"{directory} was saved to while it was being loaded.", hint=Hint("Load it again."))
    return model


def saved_conversion(directory: str | os.PathLike[str]) -> Conversion | None:
    """The conversion of the model in ``directory``, without building it: no code runs. None if there is none.

    Raises CheckpointError if it is damaged.
    """
    path = directory_at(directory)
    if (path / CONFIG).is_file():
        return _read_config(path)[1]
    entry = marks.read_marks(path)
    return None if entry is None else marks.check_marks(entry, f"{path / 'config.json'}: quantization_config")


def _savable(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of ``model``, which is what is saved. Raises CheckpointError where that is not all
    of it.
    """
    for wrapper in wrappers_of(model):
        if wrapper.kind == "sharded":
            raise CheckpointError(
                f"the parameters of a model inside {wrapper.name} are spread over processes, in parts of several.",
                hint=Hint(
                    "Load its full state_dict into a converted model that is not, and save that one; or use "
                    "fully_shard in its place."
                ),
            )
        if wrapper.kind == "adapted":
            raise CheckpointError(
                f"a {wrapper.name} has adapters, which sigswap.save does not save.",
                hint=Hint(
                    "Save them by its own save_pretrained, and the converted model before they are put on; or save "
                    "model.merge_and_unload()."
                ),
            )
        model = wrapper.inside
    if part_to_pass(model) is not None:
        conversion_of(model)  # which says so
    return model


def is_saved(directory: str | os.PathLike[str]) -> bool:
    """Whether ``directory`` holds a model that :func:`load` loads."""
    path = Path(directory)
    return (path / CONFIG).is_file() or marks.read_marks(path) is not None


# transformers


def _write_transformers(
    model: Any, processor: Any, max_shard_size: int | str, gathered: Gathered, staging: Path
) -> None:
    if processor is None:
        _copy_companions(model, staging)
    try:
        for part in _parts(processor):
            part.save_pretrained(staging)
        if not gathered.state:
            model.save_pretrained(staging, max_shard_size=max_shard_size)
        else:
            with tempfile.TemporaryDirectory(dir=staging) as folder, transformers_hook.as_one_process(model):
                state = gathered.write_folder(Path(folder))
                model.save_pretrained(staging, max_shard_size=max_shard_size, state_dict=state)
    except (SigswapError, SafetensorError, OSError):
        raise
    except Exception as error:  # of a config that JSON cannot hold, say
        raise CheckpointError(f"transformers could not save the model: {type(error).__name__}: {error}") from error
    if not (staging / "config.json").is_file():
        raise CheckpointError(
            "transformers saves a model that is whole on each rank on rank 0 alone.",
            hint=Hint("Call sigswap.save on rank 0 of torch.distributed."),
        )
    marks.note_files(staging)


def _parts(processor: Any) -> list[Any]:
    given = processor if isinstance(processor, list | tuple) else (processor,)
    return [part for part in given if part is not None]


def _check_shard_size(size: int | str) -> None:
    """As transformers has it: a number of bytes, or one with KB, MB, GB or TB."""
    is_text = isinstance(size, str) and re.fullmatch(r"\s*\d*\.?\d+\s*[KMGT]B\s*", size, re.IGNORECASE)
    if not is_text and not isinstance(size, int | float):
        raise ArgumentError(
            f"{{argument}} must be a number of bytes, or one with a unit such as '5GB', not {size!r}.",
            argument="max_shard_size",
        )


def _copy_companions(model: Any, staging: Path) -> None:
    """The tokenizer's files and others beside what a transformers model was loaded from."""
    source = source_directory(model.config._name_or_path)
    for path in [] if source is None else source.iterdir():
        if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in COMPANIONS):
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, staging / path.name)


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


def _load_transformers(directory: Path, allow_code: bool) -> nn.Module:
    transformers = require("transformers", "hf")
    config_path = directory / "config.json"
    headers = marks.check_directory(directory)
    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=allow_code)
        with_code = allow_code and not marks.is_own_code(getattr(config, "auto_map", None))
        own = sources.custom_class(config, directory) if with_code else None
        model_class = own or sources.transformers_class(config)
    except Exception as error:  # of a config that is damaged, whatever transformers raises
        named = marks.read_config(directory).get("auto_map")
        needs = _RUN_CODE if not allow_code and named is not None and not marks.is_own_code(named) else None
        raise CheckpointError(f"{config_path}: {_told(error)}", hint=needs) from error
    try:
        model: nn.Module
        with weights.all_of_the_model():
            model, info = model_class.from_pretrained(
                directory, dtype="auto", output_loading_info=True, use_safetensors=True
            )
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{directory}: the model could not be loaded: {_told(error)}") from error
    weights.check_keys(directory, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    marks.check_weights(directory, headers)
    return model


# Any other model


def _write_factory(
    model: nn.Module,
    factory: str,
    kwargs: dict[str, Any],
    difference: Difference,
    gathered: Gathered,
    staging: Path,
) -> None:
    gathered.write_file(staging / WEIGHTS)
    saved = {*gathered.state, *gathered.aliases}.difference(difference.buffers)
    made = {name: gathered.state[name] for name in difference.buffers}
    config = {
        "format": schema.FORMAT,
        "sigswap_version": __version__,
        "factory": factory,
        "factory_kwargs": to_json(kwargs),
        "attributes": difference.attributes,
        "aliases": gathered.aliases,
        "unsaved_buffers": {name: _dtype_name(buffer) for name, buffer in model.named_buffers() if name not in saved},
        "conversion": conversion_of(model).to_dict(),
    }
    if made:
        config["made_buffers"] = {
            name: {"shape": list(buffer.shape), "dtype": _dtype_name(buffer)} for name, buffer in made.items()
        }
    config = json.loads(json.dumps(config))
    schema.conversion_from(config["conversion"], "the model's conversion")  # what is saved can be loaded
    config["tensors"] = weights.digest(weights.read_header(staging / WEIGHTS))
    config["checksums"] = schema.checksums(_summed(config))
    (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _read_config(directory: Path) -> tuple[dict[str, Any], Conversion]:
    """The fields of a sigswap.json, and the conversion among them. Raises CheckpointError."""
    path = directory / CONFIG
    config = schema.read_json(path)
    schema.check_format(config, str(path))
    schema.CONFIG_FILE(config, str(path))
    conversion = schema.conversion_from(config["conversion"], f"{path}: conversion")
    schema.check_checksums(_summed(config), config.get("checksums"), str(path))
    return config, conversion


def _load_factory(directory: Path, allow_code: bool) -> nn.Module:
    path, file = directory / CONFIG, directory / WEIGHTS
    config, conversion = _read_config(directory)
    factory, kwargs, aliases = config["factory"], from_json(config["factory_kwargs"]), config["aliases"]
    made = config.get("made_buffers", {})
    if not factory.startswith("timm:") and not allow_code:
        raise CheckpointError(
            f"{directory} is loaded by importing and calling {factory!r}, which can be any code.", hint=_RUN_CODE
        )
    header = weights.read_header(file)
    try:
        check_plan_sizes(conversion, header, aliases, file)
        check_buffers(made, header, file)
        without_data = built_on_meta(factory, kwargs)
        if without_data is not None:  # so that nothing of a wrong size is allocated
            targets = finish(without_data, config["attributes"], conversion, made)
            weights.check_header(targets, header, aliases, file)
        model = sources.build(factory, kwargs)
        targets = finish(model, config["attributes"], conversion, made)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a factory raises on arguments that are not its own
        raise CheckpointError(f"{path}: {_told(error)}") from error
    weights.read_weights(model, targets, file, header, aliases, config.get("tensors"))
    buffers = dict(model.named_buffers())
    for name, dtype in config["unsaved_buffers"].items():
        if name in buffers:
            wanted = getattr(torch, dtype, None)
            if not isinstance(wanted, torch.dtype):
                raise CheckpointError(f"{path}: unsaved_buffers[{name!r}]: {dtype!r} is no dtype.")
            weights.check_dtype(name, wanted, buffers[name].dtype, path)
            buffers[name].data = buffers[name].data.to(wanted)
    return model


def _summed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a sigswap.json that have checksums: those that say what the model is."""
    others = ("format", "sigswap_version", "tensors", "checksums")
    return {name: value for name, value in config.items() if name not in others}


def _told(error: Exception) -> str:
    """An error of sigswap's in its words; another one with its type."""
    return str(error) if isinstance(error, SigswapError) else f"{type(error).__name__}: {error}"


def _recovery(directory: Path) -> Hint | None:
    """What to do if a save to ``directory`` was killed."""
    return recover_hint(directory) if leftovers(directory) else None


def _of_the_hub(directory: Path) -> Hint | None:
    """What to do if ``directory`` may be the name of a model on the hub."""
    if directory.exists() or directory.is_absolute() or len(directory.parts) > 2:
        return None
    return Hint("A model of the hub is loaded by transformers' from_pretrained, once sigswap is imported.")


def _stamps(directory: Path) -> list[tuple[str, int, int]]:
    """By which is seen whether a model's files were replaced."""
    names = [*directory.glob("*.safetensors*"), *(directory / name for name in ("config.json", CONFIG))]
    found = []
    for path in sorted(names):
        with suppress(FileNotFoundError):
            stat = path.stat()
            found.append((path.name, stat.st_ino, stat.st_mtime_ns))
    return found


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
    return [name for name in [*stale, CONFIG, remote_code.FILE] if name not in new]
