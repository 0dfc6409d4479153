"""A model as it was before its conversion, on the same weights: what a student without a second model learns from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from sigswap.conversion.record import is_converted, owners_of
from sigswap.conversion.softmax import run_as_softmax


class Original:
    """``source`` without its swap, if it is converted.

    Modules are looked for once: what is entered for each batch should not cost a walk over the model.
    """

    def __init__(self, source: nn.Module) -> None:
        self.source = source
        self.states = list(owners_of(source).values()) if is_converted(source) else []

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        """While it is open, ``source`` computes what the original does."""
        with run_as_softmax(self.states):
            yield self.source
