"""Models run for what they and some of their modules give, compiled when that is asked for."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sigswap.conversion.keeping import hook
from sigswap.conversion.recording import Inputs
from sigswap.training.batches import call_model, main_output
from sigswap.transaction import Transaction

SIGMOID_BACKEND, SOFTMAX_BACKEND = "sigswap", "inductor"
"""By which the student and its teacher are compiled. "sigswap" would swap an unconverted teacher."""


class Watched:
    """A model and its modules ``paths``, whose outputs are kept while it is called here, and at no other time.

    The hooks are there until the transaction is left: code that is compiled with them would be compiled anew without.
    """

    def __init__(self, undo: Transaction, model: nn.Module, paths: Sequence[str], backend: str | None = None) -> None:
        """``backend``: the Dynamo backend that compiles the model; None: none does."""
        self.model = model
        self.found: list[tuple[str, Tensor]] = []
        self.watching = False

        def noting(path: str) -> Callable[..., None]:
            def note(module: nn.Module, args: Any, output: Any) -> None:
                if self.watching:
                    found = main_output(output)
                    if found is not None:
                        self.found.append((path, found))

            return note

        def run(*args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs)

        self.run = None if backend is None else compiled(run, backend=backend)
        for path in paths:
            hook(undo.afterwards, model.get_submodule(path), noting(path))

    def __call__(self, call: Inputs, index: int) -> tuple[Any, list[tuple[str, Tensor]]]:
        """The model's output for a batch, and what main_output finds in those of the modules, in the order of their
        calls. A call that returns no such tensor is not among them. Raises CalibrationError if the model fails."""
        self.found = []
        self.watching = True
        try:
            output = call_model(self.model, call, index, self.run)
            return output, self.found
        finally:
            self.watching = False
            self.found = []


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``function`` as torch.compile makes it, with a code object of its own.

    Dynamo counts by code object how often it compiles, eight times by default, and what other runs in this process
    have compiled must not count.
    """
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    made: Callable[..., Any] = torch.compile(own, **options)
    return made
