"""Every model type of transformers, small, with inputs by what its forward takes and its processors make."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.coverage.check import Built, randomised
from tests.coverage.small_configs import VOCABULARY, heads_of, scaled, shrunk, tiny, ungrouped

MOST_PARAMETERS = 30_000_000
FIELDS: dict[str, dict[str, Any]] = {}
"""Fields that the rules cannot know, by model type."""


def names() -> list[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return list(CONFIG_MAPPING_NAMES)


def build(model_type: str) -> Built:
    """The model type's class with a language model's head if it is one, else the bare model."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    cls = _model_class(model_type, config_class)
    failures: list[str] = []
    built: Built | None = None
    default = config_class()
    for rule, size in ((tiny, 32), (ungrouped, 32), (scaled(heads_of(default)), 32), (tiny, 64), (tiny, 224)):
        try:
            config = shrunk(default, rule, size)
            for name, value in FIELDS.get(model_type, {}).items():
                setattr(config, name, value)
            _check_size(cls, config)
            model = _made(cls, config)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        for inputs in _inputs(model, model_type):
            case = Built(lambda config=config: _made(cls, config), ((), inputs), _generation(model, inputs))
            built = built or case
            if _runs(model, inputs):
                return case
    if built is not None:
        return built  # says why it does not run
    raise RuntimeError("; ".join(dict.fromkeys(failures)))


def _made(cls: type, config: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomised(cls(copy.deepcopy(config)))


def _check_size(cls: type, config: Any) -> None:
    with torch.device("meta"):
        model = cls(copy.deepcopy(config))
    number = sum(p.numel() for p in model.parameters())
    if number > MOST_PARAMETERS:
        raise ValueError(f"{number / 1e6:.0f} million parameters: its config cannot be made small by these rules")


def _model_class(model_type: str, config_class: type) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    masked = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    for mapping in (
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        {} if model_type in masked else auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_MAPPING_NAMES,
        *(
            value
            for name, value in sorted(vars(auto).items())
            if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")
        ),
    ):
        name = mapping.get(model_type)
        if isinstance(name, list | tuple):
            name = name[0]
        if isinstance(name, str) and hasattr(transformers, name):
            return getattr(transformers, name)
    module = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    own = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, transformers.PreTrainedModel)
        and value.config_class is config_class
        and "forward" in vars(value)
    ]
    if not own:
        raise LookupError(f"no model class has {config_class.__name__}")
    return own[0]


def _runs(model: nn.Module, inputs: dict[str, Any]) -> bool:
    try:
        with torch.no_grad():
            torch.manual_seed(0)
            model(**copy.deepcopy(inputs))
    except Exception:
        return False
    return True


def _generation(model: Any, inputs: dict[str, Any]) -> dict[str, Any] | None:
    if not getattr(model, "can_generate", lambda: False)():
        return None
    return {name: value for name, value in inputs.items() if not name.startswith("decoder_")}


# Inputs.


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _tokens(config: Any, batch: int, length: int) -> Tensor:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "vocab_size", None) or VOCABULARY
    most = min(most if isinstance(most, int) else VOCABULARY, 100)
    return torch.randint(min(30, most // 2), most, (batch, length), generator=torch.Generator().manual_seed(2))


def _inputs(model: Any, model_type: str) -> Iterator[dict[str, Any]]:
    """What the forward may take, the likeliest first."""
    takes = inspect.signature(model.forward).parameters
    config = model.config
    ids = "input_ids" in takes
    if ids and any(name in takes for name in ("pixel_values", "pixel_values_videos", "input_features", "input_values")):
        yield from _several(model, model_type, takes)
    if "pixel_values" in takes and not ids:
        yield from _images(config, model_type, takes)
    for grid in ("grid_thw", "image_grid_thw"):
        if grid in takes and not ids:
            values = next((name for name in ("pixel_values", "hidden_states") if name in takes), "pixel_values")
            yield {values: _patches(config, 16), grid: torch.tensor([[1, 4, 4]])}
    if "pixel_values_videos" in takes and not ids:
        size = _size(config)
        yield {"pixel_values_videos": _random(1, 4, 3, size, size)}
    for name in ("input_features", "input_values", "audio_values"):
        if name in takes:
            yield from _audio(config, name, takes)
    if ids:
        yield from _text(config, takes)
    if "past_values" in takes:
        yield from _series(config, takes)
    for name in ("hidden_states", "inputs_embeds", "inputs", "encoder_hidden_states", "x", "embeddings"):
        if name in takes:
            width = getattr(config, "hidden_size", getattr(config, "d_model", 32))
            width = width if isinstance(width, int) else 32
            yield {name: _random(2, 10, width)}


def _text(config: Any, takes: Any) -> Iterator[dict[str, Any]]:
    inputs: dict[str, Any] = {"input_ids": _tokens(config, 2, 10)}
    decodes = {"decoder_input_ids": _tokens(config, 2, 7)} if "decoder_input_ids" in takes else {}
    if "attention_mask" in takes:
        mask = torch.ones(2, 10, dtype=torch.long)
        mask[0, :3] = 0
        yield {**inputs, **decodes, "attention_mask": mask}
    yield {**inputs, **decodes}
    if "bbox" in takes:
        box = torch.tensor([1, 2, 5, 9]).expand(2, 10, 4).contiguous()
        yield {**inputs, **decodes, "bbox": box}
    yield {"input_ids": _tokens(config, 2, 64), **decodes}


def _size(config: Any) -> int:
    vision = next((getattr(config, n) for n in ("vision_config", "backbone_config") if hasattr(config, n)), config)
    size = getattr(vision, "image_size", None) or getattr(config, "image_size", None) or 32
    if isinstance(size, dict):
        size = next(iter(size.values()))
    return size[0] if isinstance(size, list | tuple) else int(size)


def _patches(config: Any, number: int) -> Tensor:
    """[number, values of a patch], as the processors that give a grid beside it flatten an image."""
    patch, frames = getattr(config, "patch_size", 8), getattr(config, "temporal_patch_size", 1)
    channels = getattr(config, "in_channels", getattr(config, "num_channels", 3))
    return _random(number, channels * (frames or 1) * patch * patch)


def _images(config: Any, model_type: str, takes: Any) -> Iterator[dict[str, Any]]:
    channels = getattr(config, "num_channels", 3)
    size = _size(config)
    yield {"pixel_values": _random(2, channels if isinstance(channels, int) else 3, size, size)}
    yield from _processed(config, model_type, takes)
    for frames in (getattr(config, "num_frames", 4), 4):
        yield {"pixel_values": _random(2, frames, 3, size, size)}
    for other in (64, 128, 224):
        if other != size:
            yield {"pixel_values": _random(1, 3, other, other)}


def _audio(config: Any, name: str, takes: Any) -> Iterator[dict[str, Any]]:
    decodes = {"decoder_input_ids": _tokens(config, 2, 7)} if "decoder_input_ids" in takes else {}
    if name != "input_features":
        yield {name: _random(2, 4000), **decodes}
        yield {name: _random(2, 1, 4000), **decodes}
        yield {name: _random(2, 12, 16), **decodes}
        return
    audio = next((getattr(config, n) for n in ("audio_config", "encoder_config") if hasattr(config, n)), config)
    bins = next((getattr(audio, n) for n in ("num_mel_bins", "feature_size", "n_mels") if hasattr(audio, n)), 16)
    bins = next((getattr(audio, n) for n in ("feature_projection_input_dim", "input_dim") if hasattr(audio, n)), bins)
    frames = 2 * getattr(audio, "max_source_positions", 32)
    for shape in ((2, bins, frames), (2, 64, bins), (2, frames, bins), (2, 1, 64, bins)):
        yield {name: _random(*shape), **decodes}
        if "attention_mask" in takes:
            yield {name: _random(*shape), **decodes, "attention_mask": torch.ones(2, 64, dtype=torch.long)}


def _series(config: Any, takes: Any) -> Iterator[dict[str, Any]]:
    length = getattr(config, "context_length", 16)
    lags = max(getattr(config, "lags_sequence", None) or [0])
    channels = getattr(config, "num_input_channels", 1)
    yield {"past_values": _random(2, length, channels)}
    features = getattr(config, "num_time_features", 0)
    inputs = {
        "past_values": _random(2, length + lags),
        "past_time_features": _random(2, length + lags, features),
        "past_observed_mask": torch.ones(2, length + lags),
    }
    ahead = getattr(config, "prediction_length", None) or 4
    future = {"future_values": _random(2, ahead), "future_time_features": _random(2, ahead, features)}
    yield {**inputs, **future}
    yield {"past_values": _random(2, length)}


def _processed(config: Any, model_type: str, takes: Any) -> Iterator[dict[str, Any]]:
    """What the type's own image processor makes of a small picture."""
    import numpy
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    entry = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type)
    candidates = list(entry.values()) if isinstance(entry, dict) else list(entry or ())
    size = _size(config)
    picture = numpy.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=numpy.uint8)
    vision = getattr(config, "vision_config", config)
    wanted = {
        "patch_size": getattr(vision, "patch_size", None),
        "temporal_patch_size": getattr(vision, "temporal_patch_size", None),
        "merge_size": getattr(vision, "spatial_merge_size", None),
    }
    wanted = {key: value for key, value in wanted.items() if value is not None}
    for name in candidates:
        cls = getattr(transformers, name, None) if isinstance(name, str) else None
        if cls is None:
            continue
        for settings in (
            {**wanted, "size": {"height": size, "width": size}, "crop_size": {"height": size, "width": size}},
            {**wanted, "size": {"shortest_edge": size * size, "longest_edge": size * size}},
            {**wanted, "size": {"shortest_edge": size, "longest_edge": size}},
            {**wanted, "size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}},
            wanted,
            {},
        ):
            try:
                made = cls(**settings)(picture, return_tensors="pt")
            except Exception:
                continue
            tensors = {k: v for k, v in dict(made).items() if k in takes and isinstance(v, Tensor | list)}
            values = tensors.get("pixel_values")
            if isinstance(values, Tensor) and values.numel() <= 4 * 3 * 224 * 224:
                yield tensors


def _several(model: Any, model_type: str, takes: Any) -> Iterator[dict[str, Any]]:
    """Text beside images or audio: as many placeholder tokens as the model makes features of what it is given."""
    config = model.config
    others: list[dict[str, Any]] = []
    if "pixel_values" in takes:
        size = _size(config)
        others += list(_processed(config, model_type, takes))
        others.append({"pixel_values": _random(1, 3, size, size)})
        others.append({"pixel_values": _random(1, 1, 3, size, size)})
    else:
        name = next(n for n in ("input_features", "input_values", "pixel_values_videos") if n in takes)
        others += [{**{k: v[:1] for k, v in each.items()}} for each in _audio(config, name, {})]
    token = next(
        (
            value
            for name in ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index", "media_token_id")
            if isinstance(value := getattr(config, name, None), int)
        ),
        None,
    )
    for other in others:
        if token is None:
            text = {"input_ids": _tokens(config, len(next(iter(other.values()))), 10)}
            yield {**other, **text, "attention_mask": torch.ones_like(text["input_ids"])}
            yield {**other, **text}
            continue
        for number in _features(model, other):
            ids = _tokens(config, 1, 8)
            ids = torch.cat([ids[:, :2], torch.full((1, number), token), ids[:, 2:]], 1)
            text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            for name in ("token_type_ids", "mm_token_type_ids"):
                if name in takes:
                    text[name] = (ids == token).long()
            yield {**other, **text}
            text.pop("attention_mask")
            yield {**other, **text}


def _features(model: Any, inputs: dict[str, Any]) -> list[int]:
    """How many rows the model makes of an image or a sound, and then what is usual."""
    counts: list[int] = []
    for name in ("get_image_features", "get_audio_features", "get_placeholder_mask"):
        method = getattr(model, name, None) or getattr(getattr(model, "model", None), name, None)
        if method is None or name == "get_placeholder_mask":
            continue
        takes = inspect.signature(method).parameters
        given = {k: v for k, v in inputs.items() if k in takes or "kwargs" in takes}
        try:
            with torch.no_grad():
                features = method(**copy.deepcopy(given))
        except Exception:
            continue
        pooled = getattr(features, "pooler_output", None)
        features = features if pooled is None else pooled
        if hasattr(features, "last_hidden_state"):
            features = features.last_hidden_state
        items = features if isinstance(features, list | tuple) else [features]
        counts.append(sum(math.prod(x.shape[:-1]) for x in items if isinstance(x, Tensor)))
    values = inputs.get("pixel_values")
    patch = getattr(getattr(model.config, "vision_config", None), "patch_size", None)
    if isinstance(values, Tensor) and isinstance(patch, int) and values.dim() == 4:
        counts.append((values.shape[-1] // patch) * (values.shape[-2] // patch))
    return list(dict.fromkeys(n for n in counts if 0 < n < 600)) or [16, 4, 64]
