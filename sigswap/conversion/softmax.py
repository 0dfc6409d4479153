"""The switch back to softmax, for a while: a converted model without a copy of it, for comparison and as a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from sigswap.conversion.record import owners_of
from sigswap.conversion.switches import run_as_softmax as run_as_softmax


@contextmanager
def softmax(model: nn.Module) -> Iterator[nn.Module]:
    """While it is open, the converted ``model`` runs as softmax, on the same weights and without a copy.

    >>> with sigswap.softmax(model):
    ...     before = model(x)

    It holds for this thread, or this asyncio task, alone: others run ``model`` as they did, and so do threads that are
    started inside. Uses may be nested, and may overlap. What ``torch.utils.checkpoint`` computes again in backward runs
    as it did in forward, wherever that is; compiled code does so only in the same context.

    LayerScale and hybrid-norm are off, too: it is the model that :func:`revert` would give. Code that was compiled
    before follows (torch.compile compiles once more); an exported program does not. Raises NotConvertedError.
    """
    with run_as_softmax(owners_of(model).values()):
        yield model
