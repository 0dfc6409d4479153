"""transformers: directories that ``from_pretrained`` loads as sigmoid attention, or not at all.

A converted model's config.json carries three marks (:mod:`sigswap.saving.marks`), put there by :func:`sigswap.save` and
by the model's own ``save_pretrained`` (which Trainer and ``push_to_hub`` call):

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

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from sigswap.conversion import accelerate_hooks
from sigswap.conversion.install import apply_conversion
from sigswap.conversion.record import Conversion
from sigswap.conversion.state import OwnerState
from sigswap.errors import CheckpointError, Hint
from sigswap.saving.marks import (
    METHOD,
    QUANTIZATION_MARKS,
    check_format,
    config_parts,
    marked_config,
    marks_of,
    read_marks,
    rebased,
    without_gguf_marks,
)

_TARGET = "transformers.modeling_utils"
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
            for path, part in config_parts(config):
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
            apply_conversion(model, rebased(conversion, model))

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            from transformers import PreTrainedModel

            for module in model.modules():
                if isinstance(module, PreTrainedModel):
                    for owner in (module, module.config):
                        for name in QUANTIZATION_MARKS:
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
        with without_gguf_marks(self), marked_config(self.config, entry):
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

    model_class.save_pretrained = marking_save_pretrained
    model_class.from_pretrained = classmethod(checking_from_pretrained)
