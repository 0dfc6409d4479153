"""Gradient checkpointing of a model's repeated layers, without its help and in eval mode."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sigswap.conversion.thread_modes import saved_tensors_hooks
from sigswap.errors import ArgumentError
from sigswap.transaction import Transaction, entries


def checkpoint_layers(undo: Transaction, model: nn.Module, paths: Sequence[str]) -> None:
    """Until the transaction is left, each layer that holds one of the modules ``paths`` is recomputed in backward.

    A layer is an item of the outermost ``nn.ModuleList`` or ``nn.Sequential`` on the way to the module. transformers'
    own checkpointing runs in train mode alone, and there is dropout there. Raises ArgumentError if there is no layer.
    """
    layers = list(dict.fromkeys(layer for path in paths if (layer := _layer(model, path)) is not None))
    if not layers:
        raise ArgumentError(
            f"{type(model).__name__} has no nn.ModuleList or nn.Sequential of layers that hold attention.",
            argument="checkpointing",
        )
    for layer in layers:
        undo.afterwards("a layer's forward", entries(vars(layer), "forward"))
        layer.forward = functools.partial(_checkpointed, layer.forward)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    with Transaction() as undo, undo:
        saved_tensors_hooks(undo.on_failure)  # here, where the error still comes through the checkpoint alone
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _layer(model: nn.Module, path: str) -> nn.Module | None:
    parts = path.split(".")
    for index in range(len(parts)):
        parent = model.get_submodule(".".join(parts[:index]))
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            return model.get_submodule(".".join(parts[: index + 1]))
    return None
