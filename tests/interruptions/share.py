"""One process's share of the long run.

Torch's autograd does not work in a copy of a process that has used it. So this process never runs a case: each batch
of interruptions builds its case anew, in a copy.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from forked import Died, forked

from tests.interruptions.cases import CASES, process
from tests.interruptions.check import Attempt, Checked, CheckedModel, Places, first_difference
from tests.interruptions.on_disk import ON_DISK, CheckedFiles

NAMES = (*CASES, *ON_DISK)
IN_A_ROW = 50
"""Interruptions of one case, at most, before it is the next one's turn."""


def checked(name: str, turns: int, places: Places | None = None) -> Checked:
    kind = CheckedFiles if name in ON_DISK else CheckedModel
    return kind(name, turns, places)


class Tried(NamedTuple):
    """What was wrong after an attempt, whether it came to an interruption, and whether the process was not fit for
    another one then."""

    problem: str | None
    came: bool
    poisoned: bool


def in_forks(
    name: str, build: Callable[[], Checked], attempts: Sequence[Attempt], end: float = float("inf")
) -> Iterator[Tried]:
    """What was wrong after each of the attempts, as long as it is not ``end`` (of time.monotonic).

    ``build`` and they are run in a copy of this process, and after one that leaves the process in another state the
    next is made in a new copy: what it left behind is one problem, and not one of each that comes after it.
    """
    done = 0
    while done < len(attempts) and time.monotonic() < end:
        for tried in forked(functools.partial(_tried, build, attempts[done:], end)):
            if isinstance(tried, Died):
                attempt = attempts[min(done, len(attempts) - 1)]
                yield Tried(f"{name}, {attempt}: the process ended with exit code {tried.exit_code}", True, True)
            elif tried.poisoned:
                yield tried._replace(problem=f"{tried.problem} (it is not used any more)")
            else:
                yield tried
            done += 1


def _tried(build: Callable[[], Checked], attempts: Sequence[Attempt], end: float) -> Iterator[Tried]:
    _one_of_many()
    around = process()
    with contextlib.closing(build()) as each:
        for attempt in attempts:
            problem = each.problem(attempt)
            left = first_difference(around, process())
            poisoned = left != "nothing"
            if poisoned and problem is None:
                problem = f"{each.name}, {attempt}: the process is not as it was: {left}"
            yield Tried(problem, each.came, poisoned)
            if poisoned or time.monotonic() >= end:
                return


def _one_of_many() -> None:
    """Sets this copy to one thread, and to no warnings."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


def _places(name: str, turns: int) -> Iterator[Places]:
    _one_of_many()
    with contextlib.closing(checked(name, turns)):  # lines that only a first call runs are none of a later one
        pass
    with contextlib.closing(checked(name, turns)) as each:
        yield each.places


def work(share: int, shares: int, given: argparse.Namespace) -> Iterator[tuple[str, int, int, float, list[str]]]:
    """A share of the interruptions: of a case, how many errors and how many signals there were, in how many seconds,
    and what was wrong."""
    end = time.monotonic() + 60 * given.minutes
    count = sys.maxsize if given.count is None else -(-given.count // shares)
    names = given.case or NAMES
    in_a_row = max(1, min(IN_A_ROW, count // len(names)))
    left: dict[str, tuple[Callable[[], Checked], Iterator[Attempt]]] = {}
    for name in names:
        if time.monotonic() < end:
            for places in forked(functools.partial(_places, name, given.turns)):
                if isinstance(places, Died):
                    yield name, 0, 0, 0.0, [f"{name}: the process ended with exit code {places.exit_code}"]
                    continue
                attempts = places.attempts(name, share, shares, signals=given.signals)
                chosen = (attempt for attempt in attempts if given.line is None or given.line in str(attempt))
                left[name] = functools.partial(checked, name, given.turns, places), chosen
    while left and count > 0 and time.monotonic() < end:
        for name, (build, chosen) in list(left.items()):
            start, problems, kinds = time.monotonic(), [], collections.Counter[bool]()
            batch = list(itertools.islice(chosen, min(in_a_row, count)))
            for attempt, tried in zip(batch, in_forks(name, build, batch, end), strict=False):
                kinds[isinstance(attempt.at, float)] += tried.came
                if tried.problem is not None:
                    problems.append(tried.problem)
            if len(batch) < in_a_row:
                del left[name]
            count -= kinds.total()
            yield name, kinds[False], kinds[True], time.monotonic() - start, problems
            if count <= 0 or time.monotonic() >= end:
                break
