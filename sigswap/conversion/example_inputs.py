"""Inputs for one forward of a model: the user's, or what the model itself knows (transformers' config, timm's cfg)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sigswap.conversion.copies import Inputs
from sigswap.conversion.recording import INPUT_FORMS, Example
from sigswap.conversion.user_runs import noted_calls
from sigswap.conversion.wrappers import unwrapped
from sigswap.errors import ArgumentError, ExampleInputsError, Hint

_PASS_INPUTS = Hint(
    f"Pass {{example_inputs}}: {INPUT_FORMS} (one for each path through the model).", {"example_inputs": ""}
)


def resolve_examples(model: nn.Module, example_inputs: Any) -> list[Example]:
    """The calls to look at: ``example_inputs`` of the model or, by path, of its parts; what was noted of it by watch;
    or the model's own.

    Raises ExampleInputsError if there are none and the model offers none, or a path is not one of the model.
    """
    if example_inputs is None and noted_calls(model):
        return [*noted_calls(model)]
    given = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    if given and all(isinstance(each, Example) for each in given):
        return given
    if isinstance(example_inputs, Mapping) and _are_paths(model, example_inputs):
        modules = dict(model.named_modules(remove_duplicate=False))
        unknown = sorted(set(example_inputs) - set(modules))
        if unknown:
            raise ExampleInputsError(
                f"{{argument}} names {unknown}, which are no modules of {type(model).__name__}.",
                argument="example_inputs",
                hint=_PASS_INPUTS,
            )
        return [
            Example(call, path)
            for path, calls in example_inputs.items()
            for call in resolve_inputs(modules[path], calls)
        ]
    return [Example(call) for call in resolve_inputs(model, example_inputs)]


def _are_paths(model: nn.Module, names: Mapping[Any, Any]) -> bool:
    """Whether the keys are paths of modules, and not keyword arguments of the forward."""
    if not names or not all(isinstance(name, str) for name in names):
        return False
    if any("." in name or not name for name in names):
        return True
    parts = {path for path, _ in model.named_modules(remove_duplicate=False)}
    parameters = inspect.signature(model.forward).parameters.values()
    if all(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):  # takes whatever has a name
        return False
    return parts.issuperset(names) and not any(accepts(model, name) for name in names)


def resolve_inputs(model: nn.Module, example_inputs: Any) -> list[Inputs]:
    """The calls to look at: ``example_inputs`` as (args, kwargs), one for each, or the model's own.

    Raises ExampleInputsError if there are none and the model offers none.
    """
    if example_inputs is None:
        model = unwrapped(model)
        own: Inputs = ((_timm_images(model),), {}) if _is_timm(model) else ((), _own_inputs(model))
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return [tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, own)]
    calls = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    if not calls:
        raise ExampleInputsError("{argument} is an empty list.", argument="example_inputs", hint=_PASS_INPUTS)
    return [as_call(call) for call in calls]


def as_call(call: Any, name: str = "example_inputs") -> Inputs:
    """A tensor, a tuple of positional arguments or a mapping of keyword arguments as (args, kwargs). A list of tensors,
    as a DataLoader of a TensorDataset gives, is such a tuple.

    Raises ExampleInputsError, or ArgumentError for another argument than example_inputs, called ``name``.
    """
    if isinstance(call, Mapping):  # a BatchEncoding of transformers is one as well
        return (), dict(call)
    if isinstance(call, tuple) or (isinstance(call, list) and call and all(isinstance(x, Tensor) for x in call)):
        return tuple(call), {}
    if isinstance(call, Tensor):
        return (call,), {}
    hint = Hint('Tokenize text first: tokenizer(texts, padding=True, return_tensors="pt").')
    if name != "example_inputs":
        raise ArgumentError(
            f"{{argument}} holds a {type(call).__name__}; each must be a tensor, a tuple of positional arguments or a "
            "dict of keyword arguments.",
            argument=name,
            hint=hint if isinstance(call, str) else None,
        )
    raise ExampleInputsError(
        f"{{argument}} holds a {type(call).__name__}.",
        argument=name,
        hint=hint if isinstance(call, str) else _PASS_INPUTS,
    )


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has a parameter of that name."""
    return name in inspect.signature(model.forward).parameters


def _is_timm(model: nn.Module) -> bool:
    return any(isinstance(getattr(model, name, None), Mapping) for name in ("pretrained_cfg", "default_cfg"))


def _timm_images(model: Any) -> Tensor:
    """[2, C, H, W] of the size the model was built for."""
    cfg = getattr(model, "pretrained_cfg", None) or model.default_cfg
    channels, height, width = cfg.get("input_size", (3, 224, 224))
    patches = getattr(model, "patch_embed", None)
    size = getattr(patches, "img_size", None)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return torch.zeros(2, first.in_channels if first else channels, height, width)


def _own_inputs(model: Any) -> dict[str, Any]:
    """Keyword arguments that a transformers model accepts, from its dummy_inputs or its config."""
    if not hasattr(model, "dummy_inputs") or not hasattr(model, "config"):
        raise ExampleInputsError(f"{type(model).__name__} does not say what its inputs look like.", hint=_PASS_INPUTS)
    base = next((cls for cls in type(model).__mro__ if "dummy_inputs" in vars(cls)), None)
    if base is None:  # something around a transformers model, that lends its attributes
        raise ExampleInputsError(f"{type(model).__name__} does not say what its inputs look like.", hint=_PASS_INPUTS)
    if base.__name__ != "PreTrainedModel":
        return dict(model.dummy_inputs)
    config = model.config
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vision = getattr(config, "vision_config", config)
    main = getattr(model, "main_input_name", "input_ids")
    both = hasattr(config, "vision_config") and hasattr(config, "text_config")
    if "input_ids" in accepted and (main == "input_ids" or both):
        inputs["input_ids"] = _token_ids(text, 8)
        if "attention_mask" in accepted:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "pixel_values" in accepted and (main == "pixel_values" or both):
        size = getattr(vision, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        inputs["pixel_values"] = torch.zeros(2, getattr(vision, "num_channels", 3), height, width)
    if main == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 500)
        inputs["input_features"] = torch.zeros(2, config.num_mel_bins, frames)
    if main == "input_values":
        inputs["input_values"] = torch.zeros(2, 16000)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _token_ids(text, 5)
    if main not in inputs:
        raise ExampleInputsError(
            f"{type(model).__name__} takes {main!r}, and its config does not say its shape.", hint=_PASS_INPUTS
        )
    return inputs


def _token_ids(config: Any, length: int) -> Tensor:
    """[2, length] token ids, clear of the special ones at the start of the vocabulary where it is large enough."""
    vocabulary = getattr(config, "vocab_size", None) or 2
    ids = torch.arange(2 * length).view(2, length)
    return (ids + 10) % vocabulary if vocabulary > 2 * length + 10 else ids % vocabulary
