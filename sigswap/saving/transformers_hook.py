"""transformers: directories that ``from_pretrained`` loads as sigmoid attention, or not at all.

A converted model's config.json carries three marks, put there by :func:`sigswap.save` and by the model's own
``save_pretrained`` (which Trainer and ``push_to_hub`` call):

- ``quantization_config``, of method "sigswap", holds the conversion. transformers has a registry of
  quantization methods, and asks the registered one to change the model after it was built on the meta device
  and before its weights are read. That is just what a conversion needs, so :class:`SigswapQuantizer`
  registers as one; it quantizes nothing, and the model that comes out is not marked as quantized.
- ``attn_implementation`` "sigswap" and ``transformers_weights``, the name of a file that is not there and that
  says what to do, stop every loader that does not know the method: transformers only warns about that and
  would go on with softmax. One of them alone would not do, for a keyword argument overrides the first, and
  versions of transformers before 4.50 ignore the second.

``import sigswap`` must not import transformers, so all this is set up when transformers is, see :func:`install`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from sigswap.conversion import accelerate_hooks
from sigswap.conversion.install import apply_conversion
from sigswap.conversion.record import Conversion, conversion_of, is_converted
from sigswap.conversion.state import OwnerState
from sigswap.errors import CheckpointError, Hint
from sigswap.saving import peft_hook
from sigswap.version import __version__

METHOD = "sigswap"
FORMAT = 1
# Not a file: the name is what a loader without sigswap prints when it cannot find it.
NO_SUCH_WEIGHTS = "SIGMOID-ATTENTION-MODEL-do-import-sigswap-before-loading.safetensors"
_TARGET = "transformers.modeling_utils"
# By these attributes transformers remembers, on the model and on its config, that a model is quantized.
_QUANTIZATION_MARKS = ("hf_quantizer", "is_quantized", "quantization_method", "quantization_config", "_is_quantized")
_DISPATCHABLE = ("eager", "sdpa")  # what a conversion can see into; flash and flex attention run past it


def install() -> None:
    """Makes transformers load and save converted models: at once if it is imported, else when it will be."""
    module = sys.modules.get(_TARGET)
    if module is not None:
        _register(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def is_transformers_model(model: object) -> bool:
    """Whether ``model`` is a transformers model, without importing transformers."""
    module = sys.modules.get(_TARGET)
    return module is not None and isinstance(model, module.PreTrainedModel)


def read_marks(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The conversion's entry in ``directory/config.json``; None if there is none.

    Raises CheckpointError if the file is there and is not JSON.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    entry = config.get("quantization_config") if isinstance(config, dict) else None
    return entry if isinstance(entry, dict) and entry.get("quant_method") == METHOD else None


class _Finder(importlib.abc.MetaPathFinder):
    """Runs :func:`_register` at the end of the import of transformers.modeling_utils."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register(modeling_utils: ModuleType) -> None:
    from transformers.quantizers.auto import (
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils import logging
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if METHOD in AUTO_QUANTIZER_MAPPING:
        return
    logger = logging.get_logger("transformers.sigswap")

    @register_quantization_config(METHOD)
    class SigswapConfig(QuantizationConfigMixin):
        """What config.json says about the conversion."""

        attn_implementation: dict[str, str | None]
        conversion: dict[str, Any]

        def __init__(self, **entry: Any) -> None:
            check_format(entry, "config.json")
            self.__dict__.update(entry, quant_method=METHOD)

    @register_quantizer(METHOD)
    class SigswapQuantizer(HfQuantizer):
        """Installs the stored conversion on the model that ``from_pretrained`` has built on the meta device."""

        quantization_config: SigswapConfig

        def __init__(self, quantization_config: SigswapConfig, **kwargs: Any) -> None:
            super().__init__(quantization_config, **kwargs)
            # Before 5.19 or so, a "pre-quantized" tensor that gets a prefix is not cast to from_pretrained's dtype.
            self.pre_quantized = hasattr(HfQuantizer, "get_new_dtype")

        def update_attn_implementation(self, config: Any) -> Any:
            vars(config).pop("transformers_weights", None)
            stored = self.quantization_config.attn_implementation
            for path, part in _config_parts(config):
                asked = part._attn_implementation
                if asked in _DISPATCHABLE:
                    continue
                if asked not in (METHOD, None):
                    logger.warning(
                        f"sigswap: attn_implementation={asked!r} cannot run sigmoid attention; "
                        f"{stored.get(path) or 'the default'!r} is used."
                    )
                part._attn_implementation_internal = stored.get(path)
            return config

        def update_tp_plan(self, config: Any) -> Any:
            # Before 5.19 or so there is no update_attn_implementation; this hook came at the same place.
            return self.update_attn_implementation(config)

        def get_new_dtype(self, converter: object, param: object, dtype: Any) -> Any:
            return dtype

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            conversion = Conversion.from_dict(self.quantization_config.conversion)
            apply_conversion(model, _rebased(conversion, model))

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            from transformers import PreTrainedModel

            for module in model.modules():
                if isinstance(module, PreTrainedModel):
                    for owner in (module, module.config):
                        for name in _QUANTIZATION_MARKS:
                            vars(owner).pop(name, None)
            for tensor in [*model.parameters(), *model.buffers()]:
                # transformers leaves CPU weights where they lie in the mapped file, at any offset. In the last bit,
                # results depend on the alignment, and those of the loaded model shall be those of the saved one.
                if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
                    tensor.data = tensor.data.clone()
            missing = [
                name
                for name, parameter in model.named_parameters()
                if ".sigswap." in f".{name}"
                and not parameter.is_meta
                and not getattr(parameter, "_is_hf_initialized", False)
            ]
            if missing:
                raise CheckpointError(
                    f"{model.config._name_or_path}: the weights lack sigswap's parameters {missing[:5]}"
                    f"{' and more' if len(missing) > 5 else ''}; the files do not belong to this config.json."
                )
            return model

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    model_class = modeling_utils.PreTrainedModel
    save_pretrained = model_class.save_pretrained
    from_pretrained = model_class.from_pretrained.__func__

    @functools.wraps(save_pretrained)
    def marking_save_pretrained(
        self: Any, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        entry = marks_of(self)
        if entry is None:
            return save_pretrained(self, save_directory, is_main_process, *args, **kwargs)
        with _without_gguf_marks(self), _marked_config(self.config, entry), peft_hook.marked(self):
            return save_pretrained(self, save_directory, is_main_process, *args, **kwargs)

    @functools.wraps(from_pretrained)
    def checking_from_pretrained(cls: Any, name: Any = None, *args: Any, **kwargs: Any) -> Any:
        loaded = from_pretrained(cls, name, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if isinstance(module, OwnerState):
                # Few as they are, they are not brought for each call: it is not the module that is called.
                accelerate_hooks.bring_for_good(module)
        directory = os.path.join(name, kwargs.get("subfolder") or "") if isinstance(name, str | os.PathLike) else ""
        if directory and marks_of(model) is None and read_marks(directory) is not None:
            raise CheckpointError(
                f"{directory} holds a model with sigmoid attention, but the config that was passed to "
                "from_pretrained does not say so, and softmax attention would have been loaded.",
                hint=Hint(f"Pass no config, or one that AutoConfig.from_pretrained({str(name)!r}, ...) returned."),
            )
        return loaded

    from_config = model_class._from_config.__func__

    @functools.wraps(from_config)
    def converting_from_config(cls: Any, config: Any, **kwargs: Any) -> Any:
        entry = getattr(config, "quantization_config", None)
        entry = vars(entry) if isinstance(entry, SigswapConfig) else entry
        if not isinstance(entry, dict) or entry.get("quant_method") != METHOD:
            return from_config(cls, config, **kwargs)
        stored, config = SigswapConfig(**entry), copy.deepcopy(config)
        if "attn_implementation" in kwargs:
            config._attn_implementation = kwargs.pop("attn_implementation")
        SigswapQuantizer(stored).update_attn_implementation(config)
        for part in [config for _, config in _config_parts(config)]:
            vars(part).pop("quantization_config", None)
        model = from_config(cls, config, **kwargs)
        return apply_conversion(model, _rebased(Conversion.from_dict(stored.conversion), model))

    model_class._from_config = classmethod(converting_from_config)
    model_class.save_pretrained = marking_save_pretrained
    model_class.from_pretrained = classmethod(checking_from_pretrained)


def check_format(entry: dict[str, Any], where: str) -> None:
    """Raises CheckpointError if ``entry`` was not written in a format that this version reads."""
    if entry.get("format") != FORMAT:
        raise CheckpointError(
            f"{where}: sigswap's format {entry.get('format')!r} is not the one that this version reads ({FORMAT}); "
            f"it was written by sigswap {entry.get('sigswap_version', 'of an unknown version')}."
        )


def marks_of(model: nn.Module) -> dict[str, Any] | None:
    """The entry that the config.json of ``model`` must have; None if it is not converted.

    Raises CheckpointError if the model is also quantized: config.json has room for one method.
    """
    if not is_converted(model):
        return None
    config = model.config
    if getattr(config, "quantization_config", None) is not None and not _is_unpacked_gguf(model):
        raise CheckpointError(
            "A model that is both quantized and converted cannot be saved.",
            hint=Hint("Save it in its original precision."),
        )
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "sigswap_version": __version__,
        "attn_implementation": {path: part._attn_implementation for path, part in _config_parts(config)},
        "conversion": conversion_of(model).to_dict(),
    }


def _is_unpacked_gguf(model: Any) -> bool:
    """Whether ``model`` is marked as quantized only because it was read from a GGUF file: its weights are plain floats.

    Seen with transformers 5.22 to 5.24, which leave the marks on a model whose weights they unpacked.
    """
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    return getattr(method, "value", method) == "gguf" and all(p.is_floating_point() for p in model.parameters())


@contextmanager
def _without_gguf_marks(model: Any) -> Iterator[None]:
    """While it is open, a model with unpacked GGUF weights is not marked as quantized: it is saved as what it is."""
    owners = [vars(model), vars(model.config)] if _is_unpacked_gguf(model) else []
    kept = [{name: owner.pop(name) for name in _QUANTIZATION_MARKS if name in owner} for owner in owners]
    try:
        yield
    finally:
        for owner, marks in zip(owners, kept, strict=True):
            owner.update(marks)


def _config_parts(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """``config`` and the configs inside it (text and vision of CLIP), each with its dotted path."""
    yield path, config
    for name in type(config).sub_configs:
        part = getattr(config, name, None)
        if hasattr(part, "_attn_implementation"):
            yield from _config_parts(part, f"{path}.{name}" if path else name)


def _rebased(conversion: Conversion, model: Any) -> Conversion:
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
        report=dataclasses.replace(
            conversion.report,
            sites=[dataclasses.replace(site, path=moved(site.path)) for site in conversion.report.sites],
        ),
    )


@contextmanager
def _marked_config(config: Any, entry: dict[str, Any]) -> Iterator[None]:
    """While it is open, ``config.save_pretrained`` writes a config.json with the marks; the config stays clean."""

    def to_json_file(path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        del config.__dict__["to_json_file"]  # else it would be serialized
        temporary = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
        try:
            config.to_json_file(temporary, *args, **kwargs)
            data = json.loads(temporary.read_text(encoding="utf-8"))
            data |= {
                "quantization_config": entry,
                "attn_implementation": METHOD,
                "transformers_weights": NO_SUCH_WEIGHTS,
            }
            temporary.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    # An attribute of the instance goes before the method of its class.
    config.__dict__["to_json_file"] = to_json_file
    try:
        yield
    finally:
        config.__dict__.pop("to_json_file", None)
