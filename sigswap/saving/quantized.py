"""transformers: models that are converted and quantized, loaded so by ``quantization_config=``, and saved so.

A config.json has room for one method of quantization, which of a converted model is "sigswap". Where the model is
quantized as well, that entry holds the other method's config under "quantized". What loads it is a quantizer of that
other method with the conversion's steps around its own (:func:`around`); when the model is there, it is just the other
method's, as peft and Trainer expect it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

from sigswap.errors import CheckpointError, Hint

METHODS = ("torchao", "bitsandbytes")
"""Those that are saved and loaded again: others may read more than a directory's safetensors."""
_STEPS = "_sigswap_steps"
_GIVEN = "_sigswap_given"  # of a stored entry: the quantization that from_pretrained was asked for


def method_of(quantization: Any) -> str | None:
    """The method of a quantization config, which may be a dict."""
    found = (
        quantization.get("quant_method")
        if isinstance(quantization, dict)
        else getattr(quantization, "quant_method", None)
    )
    return getattr(found, "value", found)


def entry_of(quantization: Any) -> dict[str, Any]:
    """What is stored of the quantization of a converted model. Raises CheckpointError if it cannot be loaded again."""
    method = method_of(quantization)
    if method not in METHODS:
        raise CheckpointError(
            f"A converted model that is quantized by {method!r} cannot be saved; by {' and '.join(METHODS)} it can.",
            hint=Hint("Save it in its original precision."),
        )
    data = quantization if isinstance(quantization, dict) else quantization.to_dict()
    plain: dict[str, Any] = json.loads(json.dumps(data, default=lambda value: getattr(value, "value", str(value))))
    return plain


def inner_quantizer(stored: Any) -> Any | None:
    """The quantizer of the other method that ``stored``, the entry of a config.json, is to be loaded with; or None."""
    from transformers.quantizers.auto import AutoHfQuantizer

    given = vars(stored).pop(_GIVEN, None)
    if given is not None:
        return AutoHfQuantizer.from_config(given, pre_quantized=False)
    known = getattr(stored, "quantized", None)
    return None if known is None else AutoHfQuantizer.from_config(known, pre_quantized=True)


class Steps:
    """What a conversion does while ``from_pretrained`` builds a model, each a function of its stored entry."""

    def __init__(self, attention: Callable[..., Any], before: Callable[..., Any], after: Callable[..., Any]) -> None:
        self.attention, self.before, self.after = attention, before, after


def around(quantizer: Any, stored: Any, steps: Steps) -> Any:
    """``quantizer``, of another method, which also converts while it loads a model, and is its own again after that."""
    own: Any = type(quantizer)

    class Converting(own):  # type: ignore[misc]
        def update_attn_implementation(self, config: Any) -> Any:
            config = steps.attention(stored, config)
            theirs = getattr(super(), "update_attn_implementation", None)
            return config if theirs is None else theirs(config)

        def update_tp_plan(self, config: Any) -> Any:
            # Before 5.19 or so there is no update_attn_implementation; this hook came at the same place.
            config = steps.attention(stored, config)
            theirs = getattr(super(), "update_tp_plan", None)
            return config if theirs is None else theirs(config)

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            steps.before(stored, model, kwargs.get("checkpoint_files"), quantized=self.pre_quantized)
            return super()._process_model_before_weight_loading(model, **kwargs)

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            result = super()._process_model_after_weight_loading(model, **kwargs)
            self.__class__ = own
            steps.after(model)
            return result

    Converting.__name__, Converting.__qualname__ = own.__name__, own.__qualname__
    quantizer.__class__ = Converting
    return quantizer


def wrap_merging(auto_quantizer: Any, method: str, config_class: Callable[..., Any]) -> None:
    """A ``quantization_config=`` for a directory whose own entry is of ``method`` is kept with that entry, once.

    transformers would refuse it: to it the directory is quantized already, in another way.
    """
    merge = auto_quantizer.merge_quantization_configs
    if hasattr(merge, _STEPS):
        return

    @functools.wraps(merge)
    def keeping_both(cls: Any, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        given = quantization_config_from_args
        if method_of(quantization_config) != method or given is None or method_of(given) == method:
            return merge(quantization_config, given)
        entry = quantization_config if isinstance(quantization_config, dict) else vars(quantization_config)
        stored = config_class(**entry)
        known = getattr(stored, "quantized", None)
        if known is not None:  # transformers says what of ``given`` counts, or that it does not fit
            stored.quantized = merge(known, given)
            return stored
        if isinstance(given, dict):
            from transformers.quantizers.auto import AutoQuantizationConfig

            given = AutoQuantizationConfig.from_dict(given)
        setattr(stored, _GIVEN, given)
        return stored

    setattr(keeping_both, _STEPS, True)
    auto_quantizer.merge_quantization_configs = classmethod(keeping_both)
