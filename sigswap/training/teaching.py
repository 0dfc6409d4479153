"""A model as it was before its conversion and its adapters, on the same weights: what a student without a second model
learns from."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sigswap.conversion.record import is_converted, owners_of
from sigswap.conversion.switches import run_as_softmax
from sigswap.transaction import Transaction


class Original:
    """``source`` without its swap, if it is converted, and on demand without peft's adapters.

    Modules are looked for once: what is entered for each batch should not cost a walk over the model.
    """

    def __init__(self, source: nn.Module, *, with_adapters: bool = True) -> None:
        self.source = source
        self.states = list(owners_of(source).values()) if is_converted(source) else []
        self.layers = [] if with_adapters else adapter_layers(source)
        self.parameters = [parameter for layer in self.layers for parameter in layer.parameters()]

    def keep(self, undo: Transaction) -> None:
        """Notes what :meth:`running` changes of the adapters, for an interruption between two of its lines."""
        trained = [(parameter, parameter.requires_grad) for parameter in self.parameters]

        def put_back() -> None:
            for parameter, flag in trained:
                parameter.requires_grad_(flag)

        undo.on_failure("requires_grad", put_back)
        for layer in self.layers:
            undo.on_failure("the adapters", functools.partial(layer.enable_adapters, not layer.disable_adapters))

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        """While it is open, ``source`` computes what the original does."""
        layers = [layer for layer in self.layers if not layer.disable_adapters]
        trained = [(parameter, parameter.requires_grad) for parameter in self.parameters]
        with run_as_softmax(self.states):
            try:
                for layer in layers:
                    layer.enable_adapters(False)
                yield self.source
            finally:
                for layer in layers:
                    layer.enable_adapters(True)
                for parameter, flag in trained:  # which peft sets as well
                    parameter.requires_grad_(flag)


def adapter_layers(model: nn.Module) -> list[Any]:
    """peft's layers around those of ``model``, known by what they can do, for peft need not be installed."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(type(module), "disable_adapters", None), property) and hasattr(module, "enable_adapters")
    ]


def adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that change nothing while the adapters are off."""
    found: set[nn.Parameter] = set()
    base: set[nn.Parameter] = set()
    for layer in adapter_layers(model):
        inner = layer.base_layer if hasattr(layer, "base_layer") else layer.original_module
        found.update(layer.parameters())
        base.update(inner.parameters())
    return found - base
