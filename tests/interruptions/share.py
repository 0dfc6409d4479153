"""One process's share of the long run."""

from __future__ import annotations

import argparse
import collections
import logging
import sys
import time
from collections.abc import Iterator

import torch

from tests.interruptions.cases import CASES
from tests.interruptions.check import Attempt, Checked, CheckedModel
from tests.interruptions.on_disk import ON_DISK, CheckedFiles

NAMES = (*CASES, *ON_DISK)
IN_A_ROW = 10
"""Interruptions of one case, at most, before it is the next one's turn."""


def checked(name: str, turns: int) -> Checked:
    return CheckedFiles(name, turns) if name in ON_DISK else CheckedModel(name, turns)


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
            for attempt in left:
                if given.line is not None and given.line not in str(attempt):
                    continue
                kinds[isinstance(attempt.at, float)] += 1
                problem = each.problem(attempt)
                if problem is not None:
                    problems.append(problem)
                if kinds.total() == min(in_a_row, count) or time.monotonic() >= end:
                    break
            if kinds.total() < in_a_row:
                del attempts[name]
            count -= kinds.total()
            yield name, kinds[False], kinds[True], time.monotonic() - start, problems
            if count <= 0 or time.monotonic() >= end:
                break
