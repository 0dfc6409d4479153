"""A lock that an interruption cannot leave locked: whose turn it is is known, and who is noted gives it back."""

from __future__ import annotations

import functools
import threading
import time

from sigswap.transaction import Note

_WAIT = 1e-3  # seconds


class Turn:
    """One thread at a time; in the thread whose turn it is, taking it again is nothing."""

    def __init__(self) -> None:
        self._owner: dict[None, tuple[int, object]] = {}  # one entry, or none: to set and to delete it is atomic

    def take(self, note: Note) -> None:
        """Waits for the turn, and keeps it for as long as ``note`` says."""
        thread = threading.get_ident()
        if self._owner.get(None, (None,))[0] == thread:
            return
        mine = thread, object()
        note("a lock", functools.partial(self._give, mine))
        while self._owner.setdefault(None, mine) is not mine:
            time.sleep(_WAIT)

    def _give(self, mine: tuple[int, object]) -> None:
        if self._owner.get(None) is mine:
            del self._owner[None]
