"""Calls a case with an exception at one of its lines, and says what is wrong afterwards."""

from __future__ import annotations

from typing import Any

from interruptions import Line, interrupted, lines_of

from sigswap.errors import SigswapError
from tests.interruptions.cases import CASES, copied, is_decided, process, random_numbers, state_of

ERRORS = (KeyboardInterrupt, RuntimeError)


class Checked:
    """One case, with what its model is before and after the call."""

    def __init__(self, name: str, turns: int = 1) -> None:
        self.name, self.call = name, CASES[name].call
        self.made = CASES[name].build()
        self.before = state_of(copied(self.made)), is_decided(self.made)
        self.lines = sorted(lines_of(self._called, turns))

    def _called(self) -> None:
        other = copied(self.made)
        self.call(other)
        self.after = state_of(other), is_decided(other)

    def problem(self, at: Line, kind: type[BaseException]) -> str | None:
        """What is wrong after an interruption at the line; None: nothing."""
        other, error = copied(self.made), kind("injected")
        around, numbers = process(), random_numbers()
        came, raised = interrupted(lambda: self.call(other), at, error)
        problem = self._wrong(other, raised, error, around)
        if problem is None and raised is not None and random_numbers() != numbers:
            problem = "the random state has moved"
        where = f"{at.file.rpartition('/')[2]}:{at.number} (turn {at.turn})"
        return None if problem is None or not came else f"{self.name}, {kind.__name__} at {where}: {problem}"

    def _wrong(self, other: Any, raised: BaseException | None, error: BaseException, around: Any) -> str | None:
        if raised is not None and raised is not error and not isinstance(raised, SigswapError):
            return f"raw {type(raised).__name__}: {raised}"
        if process() != around:
            return "the process is not as it was"
        now = state_of(other), is_decided(other)
        if now == self.after or (raised is not None and now == self.before):
            return None
        return f"half-changed ({type(raised).__name__}): {_difference(now[0], self.before[0])}"


def _difference(now: Any, before: Any) -> str:
    if isinstance(now, tuple | list) and isinstance(before, tuple | list) and len(now) == len(before):
        return next((_difference(a, b) for a, b in zip(now, before, strict=True) if a != b), "nothing")
    if isinstance(now, dict) and isinstance(before, dict):
        return str(
            {key: (before.get(key), now.get(key)) for key in {*now, *before} if now.get(key) != before.get(key)}
        )[:300]
    return f"{before!r:.150} -> {now!r:.150}"
