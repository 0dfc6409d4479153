"""Lookups in the batches of a distillation: in place of some of the user's sequences, if the model is a decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sigswap.conversion.recording import Inputs
from sigswap.errors import ArgumentError, Hint
from sigswap.training.language import TextInputs, read_language, vocabulary
from sigswap.training.lookups import SHORTEST, Lookups


class Mixer:
    """Puts ``lookups`` into batches. What step s gets depends on s and on the sizes of the batches before it alone.

    Without ``lookups`` it hands the batches on as they are; ``reason`` says why.
    """

    def __init__(
        self, lookups: Lookups | None, inputs: TextInputs | None, tokens: Tensor | None, reason: str = ""
    ) -> None:
        self.lookups, self.inputs, self.tokens, self.reason = lookups, inputs, tokens, reason
        self.sequences = self.mixed = 0

    def __call__(self, call: Inputs, step: int) -> Inputs:
        """``call`` with lookups for so many of its rows that their share of all sequences so far is as asked for.

        They are as long as the batch, without padding; labels are the ids. Sequences below 8 tokens get none.
        """
        if self.lookups is None or self.inputs is None or self.tokens is None:
            return call
        ids = self.inputs.ids(call)
        self.sequences += len(ids)
        owed = int(self.lookups.share * self.sequences) - self.mixed
        count = min(owed, len(ids)) if ids.shape[-1] >= SHORTEST else 0
        if count <= 0:
            return call
        self.mixed += count
        made = self.lookups.sequences(count, ids.shape[-1], self.tokens, step)
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(self.lookups.seed + step))
        rows = order[:count].to(ids.device)
        ids = ids.clone()
        ids[rows] = made.to(ids)
        args, kwargs = call
        new: dict[str, Any] = dict(kwargs)
        counted = torch.arange(ids.shape[-1])
        for name, value in (("attention_mask", 1), ("position_ids", counted), ("token_type_ids", 0), ("labels", made)):
            beside = new.get(name)
            if isinstance(beside, Tensor) and len(beside) == len(ids):
                new[name] = beside.clone()
                new[name][rows.to(beside.device)] = torch.as_tensor(value).to(beside)
        if self.inputs.keyword is None:
            return (ids, *args[1:]), new
        return args, {**new, self.inputs.keyword: ids}

    def __str__(self) -> str:
        """What was mixed in, as a report says it."""
        if self.lookups is None:
            return f"no lookups mixed in ({self.reason})"
        kinds = " and ".join(self.lookups.kinds)
        return f"lookups ({kinds} of random tokens): {self.mixed} of {self.sequences} sequences"


def mixer_for(given: float | bool | Lookups, tokens: Any, model: nn.Module, call: Inputs) -> Mixer:
    """The mixer that distill's argument ``lookups`` asks for, by a ``call`` of ``model``, which is in eval mode.

    True mixes them in where the model is a decoder and its vocabulary is large enough. Raises ArgumentError if a share
    is asked for in numbers and that cannot be.
    """
    lookups = Lookups.of(given)
    if not lookups.share:
        return Mixer(None, None, None, "they are switched off")
    inputs = read_language(model, call)
    if isinstance(inputs, str):
        if given is not True:
            raise ArgumentError(
                f"{{argument}} are for language models: {inputs}.",
                argument="lookups",
                hint=Hint("Pass {lookups}.", {"lookups": "False"}),
            )
        return Mixer(None, None, None, inputs)
    try:
        return Mixer(lookups, inputs, vocabulary(model, tokens))
    except ArgumentError as error:
        if given is not True or tokens is not None:
            raise
        return Mixer(None, None, None, error.message.rstrip("."))
