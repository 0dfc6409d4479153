"""Calibration inputs without data: made from what the model knows of itself."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigswap.conversion.copies import device_of
from sigswap.conversion.example_inputs import resolve_inputs
from sigswap.conversion.recording import Inputs
from sigswap.conversion.softmax import softmax
from sigswap.errors import ArgumentError, ExampleInputsError, Hint

BATCHES, SAMPLES = 4, 16
LENGTH = 64
_IDS = ("input_ids", "decoder_input_ids")


def own_batches(model: nn.Module, *, seed: int = 0) -> tuple[list[Inputs], str]:
    """Inputs for a converted ``model``, and what they are, in words.

    A decoder of transformers (one that can ``generate``) writes its texts itself, as softmax, sampling from its own
    distribution after a random first token. Any other text model gets uniformly random tokens, in sequences of 8 to 64
    with padding. Images are noise with equal power in every octave of scale, of mean 0 and variance 1, as a model that
    normalises its images expects. Other floating point inputs are white noise. Measured on all-MiniLM-L6-v2: random
    tokens beat tokens drawn by a Zipf law.

    Raises ArgumentError if the model does not say what its inputs look like, or ``seed`` is no number.
    """
    check_seed(seed)
    try:
        ((args, kwargs),) = resolve_inputs(model, None)
    except ExampleInputsError as error:
        raise ArgumentError(
            f"{type(model).__name__} does not say what its inputs look like, so none can be made for it.",
            argument="batches",
            hint=Hint("Pass {batches}.", {"batches": ""}),
        ) from error
    if args:
        kwargs = {"": args[0]}
    unknown = {name for name, x in kwargs.items() if not _is_known(name, x)}
    samples = next(iter(kwargs.values())).shape[0] if unknown else SAMPLES
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None) or LENGTH
    # Position tables may start after the padding's index (RoBERTa), so not the last few positions.
    length = max(2, min(LENGTH, longest - 4 if longest > 8 else longest))
    generator = torch.Generator().manual_seed(seed)
    writes = list(kwargs) in (["input_ids"], ["input_ids", "attention_mask"]) and _can_write(model)
    kinds: list[str] = []
    batches: list[Inputs] = []
    for _ in range(BATCHES):
        call: dict[str, Any] = {}
        for name, x in kwargs.items():
            if name in _IDS:
                ids = torch.randint(0, text.vocab_size, (samples, length), generator=generator)
                kinds.append("text that the model wrote itself" if writes else "uniformly random tokens")
                if writes:
                    ids = _written(model, ids[:, :1], length, int(torch.randint(0, 2**31, (1,), generator=generator)))
                call[name] = ids
            elif not _is_known(name, x):
                call[name] = x
            elif x.is_floating_point():
                image = x.dim() == 4
                kinds.append("noise images" if image else "white noise")
                noise = _octaves if image else torch.randn
                call[name] = noise((samples, *x.shape[1:]), generator=generator).to(x.dtype)
        if "attention_mask" in kwargs and "input_ids" in call:
            lengths = torch.randint(min(8, length), length + 1, (samples, 1), generator=generator)
            lengths[0] = length
            full = torch.full_like(lengths, length) if writes else lengths
            call["attention_mask"] = (torch.arange(length) < full).long()
        batches.append(((call[""],), {}) if args else ((), call))
    return batches, " and ".join(dict.fromkeys(kinds)) or "the model's example inputs"


def check_seed(seed: Any) -> None:
    """Raises ArgumentError unless it is a whole number that a generator of torch takes."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**64:
        raise ArgumentError(f"{{argument}} must be a whole number, not {seed!r}.", argument="seed")


def _is_known(name: str, x: Any) -> bool:
    """Whether a random value can stand for this input."""
    return isinstance(x, Tensor) and (name in (*_IDS, "attention_mask") or x.is_floating_point())


def _can_write(model: Any) -> bool:
    return hasattr(model, "can_generate") and model.can_generate() and not model.config.is_encoder_decoder


@torch.no_grad()
def _written(model: Any, first: Tensor, length: int, seed: int) -> Tensor:
    """[B, length] token ids that the model sampled after ``first`` [B, 1], running as softmax."""
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    with softmax(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        written: Tensor = model.generate(
            first.to(device),
            attention_mask=torch.ones_like(first, device=device),
            do_sample=True,
            top_k=0,
            min_new_tokens=length - 1,
            max_new_tokens=length - 1,
            pad_token_id=0,
        )
    return written.cpu()


def _octaves(shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
    """Noise [B, C, H, W]: a sum of white noise at every octave of scale, of variance 1 per image and channel."""
    height, width = shape[-2:]
    image = torch.zeros(shape)
    for octave in range(int(math.log2(max(1, min(height, width)))) + 1):
        size = (max(1, height >> octave), max(1, width >> octave))
        noise = torch.randn(*shape[:-2], *size, generator=generator)
        image += F.interpolate(noise, size=(height, width), mode="bilinear") if octave else noise
    return (image - image.mean((-2, -1), keepdim=True)) / image.std((-2, -1), keepdim=True)
