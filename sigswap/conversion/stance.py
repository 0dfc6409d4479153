"""torch.compile's stance, which is the whole process's, held at eager for as long as any thread needs it.

Uses overlap in threads: each would put back what it found, and the last one what another had set.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sigswap.conversion.turns import Turn
from sigswap.transaction import Transaction

_turn = Turn()
_uses: set[object] = set()
_before: list[Any] = []  # the stance from before the first use; empty: there is no use


@contextmanager
def uncompiled() -> Iterator[None]:
    """While it is open, compiled code runs as it is written, in all threads."""
    use = object()
    try:
        try:
            hold(use)
            yield
        finally:
            release(use)
    finally:  # again, for an interruption may have come before that line
        release(use)


def hold(use: object) -> None:
    """Until :func:`release` of the same ``use``."""
    from torch._dynamo import eval_frame

    with Transaction() as undo, undo:
        _turn.take(undo.afterwards)
        _uses.add(use)
        if not _before:
            _before.append(eval_frame._stance)
        eval_frame._set_stance(eval_frame.DynamoStance("force_eager"))


def release(use: object) -> None:
    """Ends a use; one that is none, or has ended, is no error."""
    from torch._dynamo import eval_frame

    with Transaction() as undo, undo:
        _turn.take(undo.afterwards)
        _uses.discard(use)
        if not _uses and _before:
            if eval_frame._stance is not _before[0]:
                eval_frame._set_stance(_before[0])
            _before.clear()
