"""Gradient checkpointing of a model's repeated layers, without its help and in eval mode."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.utils.checkpoint import checkpoint

from sigswap.errors import ArgumentError


@contextmanager
def checkpointed_layers(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """While it is open, each layer that holds one of the modules ``paths`` is recomputed in backward.

    A layer is an item of the outermost ``nn.ModuleList`` or ``nn.Sequential`` on the way to the module. transformers'
    own checkpointing runs in train mode alone, and there is dropout there. Raises ArgumentError if there is no layer.
    """
    layers = list(dict.fromkeys(layer for path in paths if (layer := _layer(model, path)) is not None))
    if not layers:
        raise ArgumentError(
            f"{type(model).__name__} has no nn.ModuleList or nn.Sequential of layers that hold attention.",
            argument="checkpointing",
        )
    before = {layer: vars(layer).get("forward") for layer in layers}
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, forward in before.items():
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _layer(model: nn.Module, path: str) -> nn.Module | None:
    parts = path.split(".")
    for index in range(len(parts)):
        parent = model.get_submodule(".".join(parts[:index]))
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            return model.get_submodule(".".join(parts[: index + 1]))
    return None
