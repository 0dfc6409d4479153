"""transformers: directories that ``from_pretrained`` loads as sigmoid attention, or not at all.

A converted model's config.json carries three marks (:mod:`sigswap.saving.marks`), put there by :func:`sigswap.save` and
by the model's own ``save_pretrained`` (which Trainer and ``push_to_hub`` call):

- ``quantization_config``, of method "sigswap", holds the conversion. transformers has a registry of
  quantization methods, and asks the registered one to change the model after it was built on the meta device
  and before its weights are read. That is just what a conversion needs, so :class:`SigswapQuantizer`
  registers as one; it quantizes nothing, and the model that comes out is not marked as quantized. (Where it is to be
  quantized as well, by another method: :mod:`sigswap.saving.quantized`.)
- ``attn_implementation``, which begins with "sigswap", and ``transformers_weights``, the name of a file that is not
  there, both of which say what to do, stop every loader that does not know the method: transformers only warns about
  that and would go on with softmax. One of them alone would not do, for a keyword argument overrides the first, and
  versions of transformers before 4.50 ignore the second.

``import sigswap`` must not import transformers, so all this is set up when transformers is, see :func:`install`.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from sigswap.conversion import accelerate_hooks
from sigswap.conversion.install import apply_conversion
from sigswap.conversion.record import Conversion, is_converted
from sigswap.conversion.state import OwnerState
from sigswap.distributed.heads import check_even, with_heads
from sigswap.errors import CheckpointError, Hint
from sigswap.saving import peft_hook, quantized, unloadable
from sigswap.saving.marks import (
    METHOD,
    QUANTIZATION_MARKS,
    check_marks,
    config_parts,
    is_own_code,
    marked_config,
    marks_of,
    read_marks,
    rebased,
    without_gguf_marks,
)
from sigswap.saving.model_card import TAGS
from sigswap.saving.weights import check_files
from sigswap.transaction import Note, Transaction, entries, whole
from sigswap.when_imported import WhenImported

_TARGET = "transformers.modeling_utils"
_WRAPPED = "_sigswap_wrapped"  # the attribute of PreTrainedModel that holds the methods that were wrapped
_SPREAD = ("distributed_config", "_tp_size", "_device_mesh")
_PLAIN = (Tensor, nn.Parameter)
_DISPATCHABLE = ("eager", "sdpa")  # what a conversion can see into; flash and flex attention run past it


def is_transformers_model(model: object) -> bool:
    """Whether ``model`` is a transformers model, without importing transformers."""
    module = sys.modules.get(_TARGET)
    return module is not None and isinstance(model, module.PreTrainedModel)


def keep_configs(note: Note, model: Any) -> None:
    """Notes what the configs of ``model`` hold: save_pretrained writes the model's class and dtype into them."""
    for config in (model.config, getattr(model, "generation_config", None)):
        if hasattr(config, "__dict__"):
            note("the model's config", whole(vars(config)))


def writes_quantized(model: Any) -> bool:
    """Whether transformers' save_pretrained knows how to write the quantized weights of ``model``."""
    return is_transformers_model(model) and getattr(model, "hf_quantizer", None) is not None


@contextmanager
def as_one_process(model: Any) -> Iterator[None]:
    """While it is open, save_pretrained brings no parts of ``model`` together: the state that it is given is whole."""
    owners: list[Any] = [module for module in model.modules() if hasattr(module, "config")]
    marks = [vars(thing) for module in owners for thing in (module, module.config) if hasattr(thing, "__dict__")]
    with Transaction() as undo, undo:
        for fields in marks:
            undo.afterwards("how the model is spread", entries(fields, *_SPREAD))
            for name in _SPREAD:
                if name in fields:
                    fields[name] = None
        yield


def _set_up(modeling_utils: ModuleType) -> None:
    """Registers sigswap with transformers, once. A version in which that is not possible is left as it is."""
    try:
        _register()
        _wrap(modeling_utils.PreTrainedModel)
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"this version of transformers cannot load or save models with sigmoid attention ({error}); sigswap needs "
            "5.17 or newer.",
            stacklevel=2,
        )


def install() -> None:
    """Makes transformers load and save converted models: at once if it is imported, else when it will be."""
    _waiting.install()


_waiting = WhenImported(_TARGET, _set_up)


def _register() -> None:
    from transformers.quantizers.auto import (
        AUTO_QUANTIZER_MAPPING,
        AutoHfQuantizer,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if METHOD in AUTO_QUANTIZER_MAPPING:
        return
    steps = quantized.Steps(_choose_attention, _convert, _finish)

    @register_quantization_config(METHOD)
    class SigswapConfig(QuantizationConfigMixin):
        """What config.json says about the conversion."""

        attn_implementation: dict[str, str | None]
        conversion: dict[str, Any]

        def __init__(self, **entry: Any) -> None:
            check_marks(entry, "config.json: quantization_config")
            self.__dict__.update(entry, quant_method=METHOD)

    @register_quantizer(METHOD)
    class SigswapQuantizer(HfQuantizer):
        """Installs the stored conversion on the model that ``from_pretrained`` has built on the meta device."""

        quantization_config: SigswapConfig

        def __new__(cls, quantization_config: SigswapConfig, **kwargs: Any) -> Any:
            other = quantized.inner_quantizer(quantization_config)
            if other is None:
                return super().__new__(cls)
            return quantized.around(other, quantization_config, steps)

        def __init__(self, quantization_config: SigswapConfig, **kwargs: Any) -> None:
            super().__init__(quantization_config, **kwargs)
            # Before 5.19 or so, a "pre-quantized" tensor that gets a prefix is not cast to from_pretrained's dtype.
            self.pre_quantized = hasattr(HfQuantizer, "get_new_dtype")

        def update_attn_implementation(self, config: Any) -> Any:
            return _choose_attention(self.quantization_config, config)

        def update_tp_plan(self, config: Any) -> Any:
            # Before 5.19 or so there is no update_attn_implementation; this hook came at the same place.
            return self.update_attn_implementation(config)

        def get_new_dtype(self, converter: object, param: object, dtype: Any) -> Any:
            return dtype

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            _convert(self.quantization_config, model, kwargs.get("checkpoint_files"))

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            from transformers import PreTrainedModel

            for module in model.modules():
                if isinstance(module, PreTrainedModel):
                    for owner in (module, module.config):
                        for name in QUANTIZATION_MARKS:
                            vars(owner).pop(name, None)
            _finish(model)
            return model

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    quantized.wrap_merging(AutoHfQuantizer, METHOD, SigswapConfig)


def _choose_attention(stored: Any, config: Any) -> Any:
    """``config`` with an attention that a conversion can see into, by its entry ``stored``."""
    from transformers.utils import logging

    vars(config).pop("transformers_weights", None)
    if is_own_code(getattr(config, "auto_map", None)):  # of the directory, which holds that file
        del config.auto_map
    for path, part in config_parts(config):
        asked = part._attn_implementation
        if asked in _DISPATCHABLE:
            continue
        named = stored.attn_implementation.get(path)
        if named is not None and "/" in named:  # code of the hub's, which nobody who loads the directory has asked for
            logging.get_logger("transformers.sigswap").warning(
                f"sigswap: the directory names {named!r}, code of a hub's, for attention that stayed softmax; the "
                "default is used."
            )
            named = None
        if asked is not None and not str(asked).startswith(METHOD):
            logging.get_logger("transformers.sigswap").warning(
                f"sigswap: attn_implementation={asked!r} cannot run sigmoid attention; {named or 'the default'!r} is "
                "used."
            )
        part._attn_implementation_internal = named
    return config


def _convert(stored: Any, model: Any, files: Any, *, quantized: bool = False) -> None:
    """Converts a ``model`` without data, whose weights in ``files`` may be quantized. Raises CheckpointError."""
    conversion = Conversion.from_dict(stored.conversion)
    unloadable.check_marks(vars(stored), model, with_weights=True)
    apply_conversion(model, rebased(conversion, model))
    check_files(model, files, quantized=quantized)
    if getattr(model, "_tp_plan", None):  # which transformers applies next, if it is asked to
        model._tp_plan = with_heads(model._tp_plan, model)


def _finish(model: Any) -> None:
    """What is left when the weights have been read. Raises CheckpointError if sigswap's are not among them."""
    for tensor in [*model.parameters(), *model.buffers()]:
        # transformers leaves CPU weights where they lie in the mapped file, at any offset. In the last bit, results
        # depend on the alignment, and those of the loaded model shall be those of the saved one.
        if type(tensor) in _PLAIN and tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    missing = [
        name
        for name, parameter in model.named_parameters()
        if ".sigswap." in f".{name}" and not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False)
    ]
    if missing:
        raise CheckpointError(
            f"{model.config._name_or_path}: the weights lack sigswap's parameters {missing[:5]}"
            f"{' and more' if len(missing) > 5 else ''}; the files do not belong to this config.json."
        )
    check_even(model)
    for module in model.modules():
        if isinstance(module, OwnerState):
            # Few as they are, they are not brought for each call: it is not the module that is called.
            accelerate_hooks.bring_for_good(module)


def _wrap(model_class: Any) -> None:
    """Wraps what transformers has no place for: the two methods take and raise what they did."""
    if _WRAPPED in vars(model_class):
        return
    save_pretrained = model_class.save_pretrained
    from_pretrained = model_class.from_pretrained.__func__

    @functools.wraps(save_pretrained)
    def marking_save_pretrained(*args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else None
        entry = marks_of(model) if isinstance(model, nn.Module) else None
        if model is None or entry is None:
            return save_pretrained(*args, **kwargs)
        if not getattr(model, "_hf_peft_config_loaded", False):  # of which adapters alone are saved
            unloadable.warn_of(entry, stacklevel=2)
        with without_gguf_marks(model), marked_config(model.config, entry), peft_hook.marked(model):
            return save_pretrained(*args, **kwargs)

    @functools.wraps(from_pretrained)
    def checking_from_pretrained(*args: Any, **kwargs: Any) -> Any:
        loaded = from_pretrained(*args, **kwargs)
        name = args[1] if len(args) > 1 else kwargs.get("pretrained_model_name_or_path")
        model = loaded[0] if isinstance(loaded, tuple) and loaded else loaded
        if isinstance(name, str | os.PathLike) and isinstance(model, nn.Module) and not is_converted(model):
            _check_unmarked(name, kwargs.get("subfolder"))
        return loaded

    _wrap_from_config(model_class)
    _wrap_push(model_class)
    setattr(model_class, _WRAPPED, (save_pretrained, from_pretrained))
    model_class.save_pretrained = marking_save_pretrained
    model_class.from_pretrained = classmethod(checking_from_pretrained)


def _wrap_push(model_class: Any) -> None:
    """The model card that transformers makes when a converted model is pushed has sigswap's tags."""
    push_to_hub = model_class.push_to_hub

    @functools.wraps(push_to_hub)
    def tagging_push_to_hub(*args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else None
        if isinstance(model, nn.Module) and is_converted(model):
            given = kwargs.get("tags") or []
            given = [given] if isinstance(given, str) else list(given)
            kwargs["tags"] = [*given, *(tag for tag in TAGS if tag not in given)]
        return push_to_hub(*args, **kwargs)

    model_class.push_to_hub = tagging_push_to_hub


def _wrap_from_config(model_class: Any) -> None:
    """What AutoModel.from_config calls: from the config of a converted directory it builds a converted model."""
    from_config = model_class._from_config.__func__

    @functools.wraps(from_config)
    def converting_from_config(*args: Any, **kwargs: Any) -> Any:
        config: Any = args[1] if len(args) > 1 else kwargs.get("config")
        entry = getattr(config, "quantization_config", None)
        entry = entry if isinstance(entry, dict) or entry is None else vars(entry)
        if not entry or entry.get("quant_method") != METHOD:
            return from_config(*args, **kwargs)
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

        stored, config = AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD](**entry), copy.deepcopy(config)
        if "attn_implementation" in kwargs:
            config._attn_implementation = kwargs.pop("attn_implementation")
        AUTO_QUANTIZER_MAPPING[METHOD](stored).update_attn_implementation(config)
        for _, part in config_parts(config):
            vars(part).pop("quantization_config", None)
        model = from_config(args[0], **{**kwargs, "config": config})
        unloadable.check_marks(vars(stored), model, with_weights=False)
        return apply_conversion(model, rebased(Conversion.from_dict(stored.conversion), model))

    model_class._from_config = classmethod(converting_from_config)


def _check_unmarked(name: str | os.PathLike[str], subfolder: Any) -> None:
    """Raises CheckpointError if the directory from which softmax attention was loaded holds sigmoid attention."""
    directory = _part(name, subfolder)
    if _is_marked(directory):
        raise CheckpointError(
            f"{directory} holds a model with sigmoid attention, but the config that was passed to from_pretrained does "
            "not say so, and softmax attention would have been loaded.",
            hint=Hint(f"Pass no config, or one that AutoConfig.from_pretrained({str(name)!r}, ...) returned."),
        )


def _part(name: str | os.PathLike[str], subfolder: Any) -> str:
    return os.path.join(name, subfolder) if isinstance(subfolder, str) else os.fspath(name)


def _is_marked(directory: str) -> bool:
    """Whether it holds sigmoid attention, as far as its files can be read: what is wrong in them is transformers' to
    say."""
    try:
        return read_marks(directory) is not None
    except (OSError, ValueError, RecursionError, CheckpointError):
        return False
