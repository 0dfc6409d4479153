"""What is a language model among the models that are trained and compared, and what it can be asked.

A *language model* here is a decoder: token ids [B, T] go in alone, logits [B, T, vocabulary] come out, and no logit
depends on a later token, which is tried and not guessed from the model's class. Encoders, masked language models,
encoder-decoders and vision models are none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sigswap.conversion.copies import device_of
from sigswap.conversion.example_inputs import accepts
from sigswap.conversion.recording import Inputs
from sigswap.errors import ArgumentError, CalibrationError, Hint
from sigswap.training.batches import call_model, main_output

_BESIDE = ("attention_mask", "position_ids", "token_type_ids", "labels")  # tensors that a text batch may also hold
_SPECIAL = ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "decoder_start")
TRIED = 64
"""Tokens of a batch on which it is tried whether a model is a decoder."""
FEWEST = 16
"""Tokens that a vocabulary has at least, without the special ones, if sequences are to be made of it."""


@dataclasses.dataclass(frozen=True)
class TextInputs:
    """Where the token ids are in the calls of a text model: the keyword, or None for the first positional argument."""

    keyword: str | None

    def ids(self, call: Inputs) -> Tensor:
        """[B, T]."""
        args, kwargs = call
        found: Tensor = args[0] if self.keyword is None else kwargs[self.keyword]
        return found

    def call(self, ids: Tensor) -> Inputs:
        """A call with ``ids`` [B, T] alone, without padding."""
        return ((ids,), {}) if self.keyword is None else ((), {self.keyword: ids})


def text_inputs(call: Inputs) -> TextInputs | str:
    """Where the ids are; in words, why ``call`` is not one of a text model's."""
    args, kwargs = call
    tensors = {name: x for name, x in kwargs.items() if isinstance(x, Tensor)}
    keyword = "input_ids" if "input_ids" in tensors else None
    if keyword is None and len(args) != 1:
        return "the batches hold no token ids alone"
    ids = tensors.pop(keyword) if keyword is not None else args[0]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
        return "the batches hold no token ids"
    for name, x in tensors.items():
        if name not in _BESIDE or x.dim() != 2 or x.shape[-1] != ids.shape[-1]:
            return f"the batches hold {name}{list(x.shape)} beside token ids"
    return TextInputs(keyword)


def read_language(model: nn.Module, call: Inputs) -> TextInputs | str:
    """How a language model is called, by a ``call`` of its own; in words, why ``model`` is none.

    It is run twice on at most two rows of the batch, once with another last token. The model is in eval mode.
    """
    inputs = text_inputs(call)
    if isinstance(inputs, str):
        return inputs
    ids = inputs.ids(call)[:2, :TRIED]
    if ids.shape[-1] < 2:
        return "the sequences have one token"
    other = ids.clone()
    other[:, -1] = torch.where(ids[:, 0] == ids[:, -1], ids[:, -1] + 1 - 2 * (ids[:, -1] > 0).to(ids.dtype), ids[:, 0])
    with torch.no_grad():
        outputs = [call_model(model, inputs.call(each), 0) for each in (ids, other)]
    logits, changed = (main_output(output) for output in outputs)
    width = vocabulary_size(model)
    if logits is None or changed is None or logits.shape[:2] != ids.shape or logits.dim() != 3:
        return f"{type(model).__name__} gives no logits for each token"
    if width is None or logits.shape[-1] < width:
        return f"{type(model).__name__} gives no logits over its vocabulary"
    moved = (changed - logits)[:, :-1].double().square().sum()
    # Experts may get other tokens into their products, whose rounding is then another one.
    rounding = max(1e-8, torch.finfo(logits.dtype).eps ** 2)
    if bool(moved > rounding * logits.double().square().sum()):
        return f"{type(model).__name__} sees later tokens: it is no decoder"
    return inputs


def vocabulary_size(model: Any) -> int | None:
    """How many token ids the model knows: the rows of its embedding, or what its config says, if that is less."""
    config = text_config(model)
    found = [getattr(config, "vocab_size", None)]
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embedding is None and config is None:
        embedding = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    if isinstance(embedding, nn.Embedding):
        found.append(embedding.num_embeddings)
    sizes = [size for size in found if isinstance(size, int)]
    return min(sizes) if sizes else None


def context_length(model: nn.Module) -> int | None:
    """How many positions the model was made for, where its config says so."""
    length = getattr(text_config(model), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def vocabulary(model: nn.Module, tokens: Any = None) -> Tensor:
    """[V] int64, ascending: the ids of which sequences may be made, on the CPU.

    ``tokens``: a tokenizer of transformers, whose ids are taken without its special ones (and without the gaps that
    it leaves in the model's vocabulary), or the ids themselves. None: all ids that the model knows but those that its
    config names as special.

    Raises ArgumentError if ``tokens`` is neither, has an id that the model does not know, or leaves too few.
    """
    size = vocabulary_size(model)
    if size is None:
        raise ArgumentError(
            f"{type(model).__name__} does not say how many tokens it knows.",
            argument="tokens",
            hint=Hint("Pass {tokens}.", {"tokens": "range(...)"}),
        )
    special = set(getattr(tokens, "all_special_ids", ()) or ())
    found: Collection[int]
    if tokens is None:
        found = range(size)
        for config in (text_config(model), getattr(model, "generation_config", None)):
            for name in _SPECIAL:
                ids = getattr(config, f"{name}_token_id", None)
                special.update(ids if isinstance(ids, list | tuple) else [ids])
    elif hasattr(tokens, "get_vocab"):
        special.update(index for index, token in getattr(tokens, "added_tokens_decoder", {}).items() if token.special)
        # A tokenizer may know tokens that were added after the model's embedding was made.
        found = [index for index in tokens.get_vocab().values() if index < size]
    else:
        found = _as_ids(tokens)
        if found and not 0 <= min(found) <= max(found) < size:
            raise ArgumentError(f"{{argument}} has ids outside of 0 to {size - 1}.", argument="tokens")
    ids = torch.tensor(sorted(set(found) - special), dtype=torch.int64)
    if len(ids) < FEWEST:
        raise ArgumentError(
            f"{len(ids)} tokens without the special ones are too few to make sequences of: {FEWEST} are needed.",
            argument="tokens",
        )
    return ids


def _as_ids(tokens: Any) -> list[int]:
    if isinstance(tokens, Tensor):
        tokens = tokens.flatten().tolist()
    if isinstance(tokens, Iterable) and not isinstance(tokens, str | bytes | Mapping):
        ids = list(tokens)
        if all(isinstance(index, int) and not isinstance(index, bool) for index in ids):
            return ids
    raise ArgumentError(
        f"{{argument}} must be a tokenizer or token ids, not a {type(tokens).__name__}.", argument="tokens"
    )


def check_length(model: nn.Module, call: Inputs, index: int) -> None:
    """Raises ArgumentError if a text batch has more positions than the model: on a GPU that would end the process."""
    inputs, length = text_inputs(call), context_length(model)
    if isinstance(inputs, TextInputs) and length is not None and inputs.ids(call).shape[-1] > length:
        raise ArgumentError(
            f"batch {index} has sequences of {inputs.ids(call).shape[-1]} tokens, and {type(model).__name__} has "
            f"positions for {length}.",
            argument="batches",
            hint=Hint("Cut them into shorter ones."),
        )


def check_same_outputs(model: nn.Module, y: Tensor, original: nn.Module, t: Tensor, argument: str) -> None:
    """Raises CalibrationError unless two models' outputs on one batch are of one shape."""
    if y.shape == t.shape:
        return
    if y.shape[:-1] == t.shape[:-1]:
        raise CalibrationError(
            f"{{argument}} gives {t.shape[-1]} channels where the model gives {y.shape[-1]}: it is of another "
            "vocabulary or size.",
            argument=argument,
            hint=Hint("It must be the model before the conversion."),
        )
    raise CalibrationError(
        f"{{argument}} ({type(original).__name__}) gives an output of shape {list(t.shape)}, and the model "
        f"({type(model).__name__}) one of shape {list(y.shape)}.",
        argument=argument,
    )


def logits_at(model: nn.Module, inputs: TextInputs, ids: Tensor, positions: Tensor | None, index: int = 0) -> Tensor:
    """The logits [B, P, V] of a language model on ``ids`` [B, T] at the ``positions`` [P], or at all of them."""
    args, kwargs = inputs.call(ids)
    if accepts(model, "use_cache"):
        kwargs = {**kwargs, "use_cache": False}
    kept = positions is not None and accepts(model, "logits_to_keep")
    if kept:  # the others are never computed: a long sequence's would be the largest tensor by far
        kwargs = {**kwargs, "logits_to_keep": positions}
    logits = main_output(call_model(model, (args, kwargs), index))
    assert logits is not None, "read_language has seen logits"
    return logits if kept or positions is None else logits[:, positions.to(device_of(model))]
