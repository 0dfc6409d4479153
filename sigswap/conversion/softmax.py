"""The switch back to softmax, for a while: a converted model without a copy of it, for comparison and as a teacher."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from sigswap.conversion.record import owners_of
from sigswap.conversion.state import OwnerState

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def softmax(model: Model) -> Iterator[Model]:
    """While it is open, the converted ``model`` runs as softmax, on the same weights and without a copy.

    >>> with sigswap.softmax(model):
    ...     before = model(x)

    LayerScale and hybrid-norm are off, too: it is the model that :func:`revert` would give. Code that was compiled
    before follows (torch.compile compiles once more); an exported program does not. Raises NotConvertedError.
    """
    with run_as_softmax(owners_of(model).values()):
        yield model


@contextmanager
def run_as_softmax(states: Collection[OwnerState]) -> Iterator[None]:
    """While it is open, these converted modules run as softmax."""
    switched = [state for state in states if not state.softmax]
    for state in switched:
        state.softmax = True
    try:
        yield
    finally:
        for state in switched:
            del state.softmax  # the class's again: nothing of it stays in what is saved
