"""What a converted model's config.json says about the conversion, written and read.

:mod:`sigswap.saving.transformers_hook` says what the marks are for.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from sigswap import files
from sigswap.conversion.record import Conversion, conversion_of, is_converted
from sigswap.errors import CheckpointError, Hint
from sigswap.saving import quantized, schema, unloadable, weights
from sigswap.saving.weights import Stored
from sigswap.transaction import Transaction
from sigswap.version import __version__

METHOD = "sigswap"
_SUMMED = ("attn_implementation", "conversion", "quantized", unloadable.COPIED, unloadable.REPARAMETRIZED)
"""The last three only of what is so."""
_WEIGHTS = "model.safetensors"
# What transformers and others change in a config.json without that the model is another one, and the marks themselves.
_NOT_SUMMED = (
    *("quantization_config", "attn_implementation", "transformers_weights"),
    *("_name_or_path", "transformers_version"),
)
# No attention: the name is what transformers prints, in its own quotes, when it does not find it. sigswap knows it by
# its first word, and earlier versions wrote that alone.
ATTENTION = f"{METHOD} (pip install sigswap, and import it before the model is loaded)"
ATTENTION_OR_CODE = f"{METHOD} (pip install sigswap, and import it before; or pass trust_remote_code=True)"
# Not a file: the name is what a loader without sigswap prints when it cannot find it.
NO_SUCH_WEIGHTS = "SIGMOID-ATTENTION-MODEL-do-import-sigswap-before-loading.safetensors"
# Of a directory that holds sigswap.saving.remote_code's file, too.
NO_SUCH_WEIGHTS_OR_CODE = "SIGMOID-ATTENTION-MODEL-do-import-sigswap-or-pass-trust_remote_code.safetensors"
CODE = "modeling_sigswap"
"""The module of that file, which ``auto_map`` names."""
# By these attributes transformers remembers, on the model and on its config, that a model is quantized.
QUANTIZATION_MARKS = ("hf_quantizer", "is_quantized", "quantization_method", "quantization_config", "_is_quantized")


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What is in ``directory/config.json``, also NaN and infinities; nothing if it is not there or no object.

    Raises CheckpointError if the file is there and is not JSON.
    """
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except OSError as error:
        raise CheckpointError(f"{path} could not be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def read_marks(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The conversion's entry in ``directory/config.json``; None if there is none.

    Raises CheckpointError if the file is there and is not JSON.
    """
    entry = read_config(directory).get("quantization_config")
    return entry if isinstance(entry, dict) and entry.get("quant_method") == METHOD else None


def check_marks(entry: Mapping[str, Any], where: str) -> Conversion:
    """The conversion in an entry. Raises CheckpointError if the entry, at ``where``, is damaged."""
    schema.check_format(entry, where)
    schema.MARKS(entry, where)
    conversion = schema.conversion_from(entry["conversion"], f"{where}.conversion")
    schema.check_checksums({name: entry[name] for name in _SUMMED if name in entry}, entry.get("checksums"), where)
    return conversion


def check_directory(directory: Path) -> dict[str, dict[str, Stored]]:
    """What the weights in ``directory`` hold, by file, of those that are to be read.

    Raises CheckpointError if its config.json is not as it was saved, or it names files or models outside of itself.
    """
    path, config = directory / "config.json", read_config(directory)
    entry = config["quantization_config"]
    check_marks(entry, f"{path}: quantization_config")
    if entry.get("config_checksums") is not None:
        schema.check_checksums(_summed(config), entry["config_checksums"], str(path), "config_checksums")
    if (directory / "adapter_config.json").exists():
        raise CheckpointError(
            f"{directory / 'adapter_config.json'} names another model, which transformers would load instead.",
            hint=Hint("Load the model from a directory without adapters, and then these."),
        )
    names, index = {_WEIGHTS}, directory / f"{_WEIGHTS}.index.json"
    if not (directory / _WEIGHTS).is_file() and index.is_file():
        schema.record({"weight_map": schema.mapping(schema.text)}, open=True)(schema.read_json(index), str(index))
        names = set(schema.read_json(index)["weight_map"].values())
    outside = sorted(name for name in names if name != os.path.basename(name) or not name.endswith(".safetensors"))
    if outside:
        raise CheckpointError(f"{index} names {outside[:3]}, which are no safetensors files of {directory}.")
    headers = {name: weights.read_header(directory / name) for name in sorted(names)}
    known = entry.get("weights")
    if known is not None and known.keys() != names:
        raise CheckpointError(f"{directory} was saved with the weights {sorted(known)}, and has {sorted(names)}.")
    return headers


def check_weights(directory: Path, headers: Mapping[str, Mapping[str, Stored]]) -> None:
    """Raises CheckpointError if the weights in ``directory`` are not laid out as they were saved."""
    known = read_config(directory)["quantization_config"].get("weights")
    if known is not None:
        for name, header in headers.items():
            weights.check_digest(header, known[name], directory / name, '"weights" from config.json')


def note_files(directory: Path) -> None:
    """Writes into the marks in ``directory`` what the weights beside them are, for :func:`check_directory`."""
    path, config = directory / "config.json", read_config(directory)
    config["quantization_config"]["weights"] = {
        file.name: weights.digest(weights.read_header(file)) for file in sorted(directory.glob("*.safetensors"))
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def marks_of(model: nn.Module) -> dict[str, Any] | None:
    """The entry that the config.json of ``model`` must have; None if it is not converted.

    Raises CheckpointError if the model is also quantized in a way that cannot be loaded again.
    """
    if not is_converted(model):
        return None
    config = model.config
    fields: dict[str, Any] = {
        "attn_implementation": {path: part._attn_implementation for path, part in config_parts(config)},
        "conversion": conversion_of(model).to_dict(),
        **unloadable.marks_for(model),
    }
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not _is_unpacked_gguf(model):
        fields["quantized"] = quantized.entry_of(quantization)
    fields = json.loads(json.dumps(fields))
    schema.conversion_from(fields["conversion"], "the model's conversion")  # what is saved can be loaded
    return {
        "quant_method": METHOD,
        "format": schema.FORMAT,
        "sigswap_version": __version__,
        **fields,
        "checksums": schema.checksums(fields),
    }


def _is_unpacked_gguf(model: Any) -> bool:
    """Whether ``model`` is marked as quantized only because it was read from a GGUF file: its weights are plain floats.

    Seen with transformers 5.22 to 5.24, which leave the marks on a model whose weights they unpacked.
    """
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    return getattr(method, "value", method) == "gguf" and all(p.is_floating_point() for p in model.parameters())


@contextmanager
def without_gguf_marks(model: Any) -> Iterator[None]:
    """While it is open, a model with unpacked GGUF weights is not marked as quantized: it is saved as what it is."""
    owners = [vars(model), vars(model.config)] if _is_unpacked_gguf(model) else []
    kept = [{name: owner[name] for name in QUANTIZATION_MARKS if name in owner} for owner in owners]
    with Transaction() as undo, undo:
        for owner, marks in zip(owners, kept, strict=True):
            undo.afterwards("the marks of a GGUF file", functools.partial(owner.update, marks))
            for name in marks:
                del owner[name]
        yield


def config_parts(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """``config`` and the configs inside it (text and vision of CLIP), each with its dotted path."""
    yield path, config
    for name in type(config).sub_configs:
        part = getattr(config, name, None)
        if hasattr(part, "_attn_implementation"):
            yield from config_parts(part, f"{path}.{name}" if path else name)


def rebased(conversion: Conversion, model: Any) -> Conversion:
    """``conversion`` with the module paths of ``model``, which may have another head than the one it was made for.

    A model with a head holds the base model as its child ``base_model_prefix``.
    """
    modules = {path for path, _ in model.named_modules()}
    paths = [owner.path for owner in conversion.owners]
    if modules.issuperset(paths):
        return conversion
    prefix = f"{model.base_model_prefix}."
    if modules.issuperset(prefix + path for path in paths):

        def moved(path: str) -> str:
            return prefix + path
    else:

        def moved(path: str) -> str:
            return path.removeprefix(prefix)

    # What the head of the saved model owned is not in this one, as its weights are not.
    kept = [path for path in paths if moved(path) in modules]
    outside = [path for path in paths if path.startswith(prefix) and path not in kept]
    if not kept or outside:
        raise CheckpointError(
            f"{type(model).__name__} has no module {(outside or paths)[0]!r}, with or without {prefix!r} before it, "
            "where sigswap converted attention.",
            hint=Hint("Load the saved model with the class that it was saved from."),
        )
    fields = {path: conversion.config.for_path(path).fields() for path in kept}
    return dataclasses.replace(
        conversion,
        config=dataclasses.replace(conversion.config, overrides={moved(path): fields[path] for path in kept}),
        owners=tuple(
            dataclasses.replace(owner, path=moved(owner.path)) for owner in conversion.owners if owner.path in kept
        ),
        guarded=tuple(moved(path) for path in conversion.guarded if moved(path) in modules),
        attn_implementations={
            moved(path): name for path, name in conversion.attn_implementations.items() if moved(path) in modules
        },
        report=dataclasses.replace(
            conversion.report,
            sites=[dataclasses.replace(site, path=moved(site.path)) for site in conversion.report.sites],
        ),
    )


@contextmanager
def marked_config(config: Any, entry: dict[str, Any]) -> Iterator[None]:
    """While it is open, ``config.save_pretrained`` writes a config.json with the marks; the config stays clean."""

    def to_json_file(path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        def write(new: Path) -> None:
            config.to_json_file(new, *args, **kwargs)
            data = without_own_code(json.loads(new.read_text(encoding="utf-8")))
            data |= {
                "quantization_config": {**entry, "config_checksums": schema.checksums(_summed(data))},
                "attn_implementation": ATTENTION,
                "transformers_weights": NO_SUCH_WEIGHTS,
            }
            new.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")

        del config.__dict__["to_json_file"]  # else it would be serialized
        try:
            files.write_whole(path, write)
        finally:  # for the next: transformers writes a second one beside the parts of a model that is spread
            config.__dict__["to_json_file"] = to_json_file

    with Transaction() as undo, undo:
        undo.afterwards("the method of the config", lambda: config.__dict__.pop("to_json_file", None))
        # An attribute of the instance goes before the method of its class.
        config.__dict__["to_json_file"] = to_json_file
        yield


def _summed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json that have checksums: those that say what the model is."""
    summed = {name: value for name, value in config.items() if name not in _NOT_SUMMED}
    return without_own_code(summed)


def is_own_code(auto_map: Any) -> bool:
    """Whether the ``auto_map`` of a config names classes in sigswap's file alone."""
    names = list(auto_map.values()) if isinstance(auto_map, dict) else []
    # The hub's repository may stand before it.
    return bool(names) and all(
        isinstance(name, str) and name.rpartition("--")[2].rpartition(".")[0] == CODE for name in names
    )


def without_own_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json without an ``auto_map`` that is sigswap's."""
    return {name: value for name, value in config.items() if name != "auto_map" or not is_own_code(value)}
