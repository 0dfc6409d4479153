"""What runs attention while each process has a part of the sequence, and what may not run then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sigswap.errors import ContextParallelError

if TYPE_CHECKING:
    from sigswap.sequence.attention import SequenceAttention


class _Active:
    """Of the process, and not of a thread: gradient checkpointing runs a forward again in autograd's threads."""

    attention: SequenceAttention | None = None


active = _Active()


@contextmanager
def activated(attention: SequenceAttention) -> Iterator[None]:
    """Attention runs by ``attention`` inside."""
    if active.attention is not None:
        raise ContextParallelError("context parallelism is on already: one context_parallel is inside another one.")
    try:
        try:
            active.attention = attention
            yield
        finally:
            active.attention = None
    finally:  # again, for an interruption may have come before that line
        active.attention = None


def refuse_parts(what: str) -> None:
    """Raises ContextParallelError under context parallelism, where ``what`` would take a part for the whole."""
    if active.attention is not None:
        raise ContextParallelError(
            f"{what} cannot run under context parallelism, where each rank has some of the keys."
        )
