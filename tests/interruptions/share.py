"""One process's share of the long run."""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from forked import Died, forked

from tests.interruptions.cases import CASES, process
from tests.interruptions.check import Attempt, Checked, CheckedModel
from tests.interruptions.on_disk import ON_DISK, CheckedFiles

NAMES = (*CASES, *ON_DISK)
IN_A_ROW = 10
"""Interruptions of one case, at most, before it is the next one's turn."""


def checked(name: str, turns: int) -> Checked:
    return CheckedFiles(name, turns) if name in ON_DISK else CheckedModel(name, turns)


class Tried(NamedTuple):
    """What was wrong after an attempt, and whether the process was not fit for another one then."""

    problem: str | None
    poisoned: bool


def in_forks(each: Checked, attempts: Sequence[Attempt], end: float = float("inf")) -> Iterator[str | None]:
    """What was wrong after each of the attempts, as long as it is not ``end`` (of time.monotonic).

    They are made in a copy of this process, and after one that leaves the process in another state the next is made in
    a new copy: what it left behind is one problem, and not one of each that comes after it.
    """
    done = 0
    while done < len(attempts) and time.monotonic() < end:
        for tried in forked(functools.partial(_tried, each, attempts[done:], end)):
            if isinstance(tried, Died):
                attempt = attempts[min(done, len(attempts) - 1)]
                yield f"{each.name}, {attempt}: the process ended with exit code {tried.exit_code}"
            else:
                problem: str | None = tried.problem
                yield problem if problem is None or not tried.poisoned else f"{problem} (it is not used any more)"
            done += 1


def _tried(each: Checked, attempts: Sequence[Attempt], end: float) -> Iterator[Tried]:
    around = process()
    for attempt in attempts:
        problem = each.problem(attempt)
        poisoned = process() != around
        if poisoned and problem is None:
            problem = f"{each.name}, {attempt}: the process is not as it was"
        yield Tried(problem, poisoned)
        if poisoned or time.monotonic() >= end:
            return


def work(share: int, shares: int, given: argparse.Namespace) -> Iterator[tuple[str, int, int, float, list[str]]]:
    """A share of the interruptions: of a case, how many errors and how many signals there were, in how many seconds,
    and what was wrong."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    end = time.monotonic() + 60 * given.minutes
    count = sys.maxsize if given.count is None else -(-given.count // shares)
    names = given.case or NAMES
    in_a_row = max(1, min(IN_A_ROW, count // len(names)))
    attempts: dict[str, tuple[Checked, Iterator[Attempt]]] = {}
    for name in names:
        if time.monotonic() < end:
            each = checked(name, given.turns)
            attempts[name] = each, each.attempts(share, shares, signals=given.signals)
    while attempts and count > 0 and time.monotonic() < end:
        for name, (each, left) in list(attempts.items()):
            start, problems, kinds = time.monotonic(), [], collections.Counter[bool]()
            chosen = (attempt for attempt in left if given.line is None or given.line in str(attempt))
            batch = list(itertools.islice(chosen, min(in_a_row, count)))
            for attempt, problem in zip(batch, in_forks(each, batch, end), strict=False):
                kinds[isinstance(attempt.at, float)] += 1
                if problem is not None:
                    problems.append(problem)
            if kinds.total() < in_a_row:
                del attempts[name]
            count -= kinds.total()
            yield name, kinds[False], kinds[True], time.monotonic() - start, problems
            if count <= 0 or time.monotonic() >= end:
                break
