"""Calls a case with an interruption, and says what is wrong afterwards."""

from __future__ import annotations

import random
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from interruptions import Line, interrupted, lines_of

from sigswap.errors import SigswapError
from tests.interruptions.cases import CASES, copied, is_decided, process, random_numbers, state_of

ERRORS = (KeyboardInterrupt, RuntimeError)

Call = Callable[[], Any]


class Attempt(NamedTuple):
    """An error at a line, or a signal after so many seconds."""

    at: Line | float
    kind: type[BaseException] = KeyboardInterrupt

    def __str__(self) -> str:
        if not isinstance(self.at, Line):
            return f"a signal after {1000 * self.at:.2f} ms"
        return f"{self.kind.__name__} at {self.at.file.rpartition('/')[2]}:{self.at.number} (turn {self.at.turn})"


class Places(NamedTuple):
    """Where a call can be interrupted: at these lines, and for so many seconds."""

    lines: list[Line]
    seconds: float

    def attempts(self, name: str, share: int = 0, shares: int = 1, *, signals: int = 0) -> Iterator[Attempt]:
        """All lines with each error, in a random order that is always the same for a name, and of a hundred so many
        are signals. A share is a part of them."""
        rng = random.Random(name)
        injected = [Attempt(at, kind) for at in self.lines for kind in ERRORS]
        rng.shuffle(injected)
        times = random.Random(f"{name} {share}/{shares}")
        for attempt in injected[share::shares]:
            yield attempt
            while times.random() < signals / 100:
                yield Attempt(times.uniform(0, 1.1 * self.seconds))


class Checked(ABC):
    """One call, with what it changes before and after it.

    ``turns``: of each line so many runs, and the last. ``places``: what they came to before, in another process.
    ``came``: whether the last attempt came to an interruption.
    """

    name: str
    before: Any
    after: Any
    came = False

    def __init__(self, turns: int = 1, places: Places | None = None) -> None:
        self.before = self.fresh()[1]()
        if places is None:
            lines = sorted(lines_of(self.fresh()[0], turns))
            call, state = self.fresh()
            start = time.perf_counter()
            call()
            places = Places(lines, time.perf_counter() - start)
        else:
            call, state = self.fresh()
            call()
        self.after = state()
        self.places = places

    def close(self) -> None:  # noqa: B027 most have nothing to remove
        """Removes what is on disk."""

    @abstractmethod
    def fresh(self) -> tuple[Call, Call]:
        """The call, on something of its own, and what gives the state of that."""

    def problem(self, attempt: Attempt) -> str | None:
        """What is wrong after it; None: nothing, or it came to no interruption."""
        self.came = False
        call, state = self.fresh()
        error = attempt.kind("injected")
        around, numbers = process(), random_numbers()
        if isinstance(attempt.at, Line):
            self.came, raised = interrupted(call, attempt.at, error)
        else:
            self.came, raised = signalled(call, attempt.at)
        if not self.came:
            return None
        allowed: Any = SigswapError if isinstance(attempt.at, Line) else (SigswapError, KeyboardInterrupt)
        if raised is not None and raised is not error and not isinstance(raised, allowed):
            return f"{self.name}, {attempt}: raw {type(raised).__name__}: {raised}"
        if (ours := process()) != around:
            return f"{self.name}, {attempt}: the process is not as it was: {first_difference(around, ours)}"
        moved, now = random_numbers() != numbers, state()
        if now == self.after:
            return None
        if raised is None or now != self.before:
            return (
                f"{self.name}, {attempt}: half-changed ({type(raised).__name__}): "
                f"from before: {first_difference(self.before, now)}; from after: {first_difference(self.after, now)}"
            )
        return f"{self.name}, {attempt}: the random state has moved" if moved else None


class CheckedModel(Checked):
    """A case that changes a model."""

    def __init__(self, name: str, turns: int = 1, places: Places | None = None) -> None:
        self.name, self.call, self.made = name, CASES[name].call, CASES[name].build()
        super().__init__(turns, places)

    def fresh(self) -> tuple[Call, Call]:
        other = copied(self.made)
        return lambda: self.call(other), lambda: (state_of(other), is_decided(other))


def signalled(call: Call, seconds: float) -> tuple[bool, BaseException | None]:
    """Runs ``call``, and so many seconds after it has begun the process gets a signal that is handled as Ctrl-C is.
    Whether it came before the end, and what the call raised."""
    ended = False
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    raised: BaseException | None = None
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
            call()
            ended = True
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except BaseException as error:
        error.__traceback__ = None
        raised = error
    finally:
        signal.signal(signal.SIGALRM, before)
    return not ended or raised is not None, None if ended else raised


def first_difference(before: Any, now: Any, where: str = "") -> str:
    """Where two states differ first, and what is there in each."""
    for kind in (list, tuple, dict):
        if isinstance(before, kind) and isinstance(now, kind):
            break
    else:
        return f"{where or 'it'} {before!r:.150} -> {now!r:.150}" if before != now else "nothing"
    if isinstance(before, dict):
        for key in (*before, *(key for key in now if key not in before)):
            if key not in now or key not in before:
                return f"{where}[{key!r}] is {'missing' if key not in now else f'new: {now[key]!r:.150}'}"
            if before[key] != now[key]:
                return first_difference(before[key], now[key], f"{where}[{key!r}]")
        return "nothing"
    for index, (a, b) in enumerate(zip(before, now, strict=False)):
        if a != b:
            return first_difference(a, b, f"{where}[{index}]")
    if len(before) == len(now):
        return "nothing"
    longer = before if len(before) > len(now) else now
    change = "missing" if longer is before else "new"
    return f"{where}[{min(len(before), len(now))}] is {change}: {longer[min(len(before), len(now))]!r:.150}"
