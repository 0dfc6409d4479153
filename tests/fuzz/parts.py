"""The parts of the long run, each of which makes something of a number and says what came of it."""

from __future__ import annotations

import argparse
import collections
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from tests.fuzz import commands, conversion, loading, op, saving


class Outcome(NamedTuple):
    """``worst``: of something with a bound, the largest error as a share of it."""

    kind: str
    result: str
    is_fault: bool
    worst: float = 0.0


class Found(NamedTuple):
    """What came of some numbers: how often each kind ended in what, the faults in words, and the largest errors."""

    part: str
    results: collections.Counter[tuple[str, str]]
    faults: list[str]
    worst: dict[str, float]


Attempt = Callable[[int], list[Outcome]]


def _loading(given: argparse.Namespace, folder: Path) -> Attempt:
    cases = list(loading.cases(folder))

    def attempt(seed: int) -> list[Outcome]:
        case = cases[seed % len(cases)]
        result = loading.attempt(case, seed, folder, not given.no_checksums)
        right = result in ("refused", "same") or result.endswith("(with a message)")
        return [Outcome(case.directory.name, result, not right)]

    return attempt


def _saving(given: argparse.Namespace, folder: Path) -> Attempt:
    pair = saving.pair(folder)

    def attempt(seed: int) -> list[Outcome]:
        result = saving.attempt(pair, seed, folder)
        return [Outcome("a kill" if seed % 2 else "an error", result, not result.startswith(("old", "new")))]

    return attempt


def _op(given: argparse.Namespace, folder: Path) -> Attempt:
    limits = op.CUDA if given.device == "cuda" else op.CPU
    if given.dtype is not None:
        limits = limits._replace(dtypes=tuple(getattr(torch, name) for name in given.dtype))

    def attempt(seed: int) -> list[Outcome]:
        kind, fault, worst = op.attempt(seed, limits)
        return [Outcome(kind, fault or "within the bound", fault is not None, 0.0 if fault else worst)]

    return attempt


def _conversion(given: argparse.Namespace, folder: Path) -> Attempt:
    def attempt(seed: int) -> list[Outcome]:
        fault = conversion.attempt(seed, folder)
        kinds = " and ".join(sorted({block["kind"] for block in conversion.drawn(seed)["blocks"]}))
        return [Outcome(kinds, fault or "right", fault is not None)]

    return attempt


def _commands(given: argparse.Namespace, folder: Path) -> Attempt:
    world = commands.World(folder)

    def attempt(seed: int) -> list[Outcome]:
        return [Outcome(*commands.attempt(world, seed))]

    return attempt


PARTS: dict[str, Callable[[argparse.Namespace, Path], Attempt]] = {
    "op": _op,
    "conversion": _conversion,
    "loading": _loading,
    "saving": _saving,
    "commands": _commands,
}
SECONDS_BETWEEN = 2.0
"""After which what was found is told."""


def work(share: int, shares: int, given: argparse.Namespace) -> Iterator[Found]:
    """A process's share of the numbers, one part after the other."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # each names what a killed save has left
    if {"loading", "commands"} & set(given.part):
        import transformers

        transformers.utils.logging.disable_progress_bar()
    seconds = 60 * given.minutes / len(given.part)
    for part in given.part:
        with tempfile.TemporaryDirectory() as name:
            start = time.monotonic()
            attempt = PARTS[part](given, Path(name))
            seeds = iter(range(given.first + share, given.first + given.count, shares))
            while time.monotonic() < start + seconds:
                found = Found(part, collections.Counter(), [], {})
                told = time.monotonic()
                for seed in seeds:
                    _note(found, seed, attempt(seed))
                    if time.monotonic() > min(told + SECONDS_BETWEEN, start + seconds):
                        break
                if not found.results:
                    break
                yield found


def _note(found: Found, seed: int, outcomes: list[Outcome]) -> None:
    for kind, result, is_fault, worst in outcomes:
        found.results[kind, "a fault" if is_fault else result.partition(" after ")[0]] += 1
        found.worst[kind] = max(found.worst.get(kind, 0.0), worst)
        if is_fault:
            found.faults.append(f"--part {found.part} --first {seed} --count 1: {kind}: {result}")
