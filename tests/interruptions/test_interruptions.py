"""An interruption at any line leaves a model as it was or wholly changed, and the process as it was.

A sample; ``python -m tests.interruptions`` takes every line.
"""

from __future__ import annotations

import itertools
import random
import time

import pytest
import torch

import sigswap
from tests.interruptions.cases import Attention, X
from tests.interruptions.check import Attempt, signalled
from tests.interruptions.share import NAMES, checked

SAMPLED, SAMPLED_OF_CONVERT = 12, 4
"""Interruptions of each call; those that look at a model take longer."""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_sample(name: str) -> None:
    case = checked(name, turns=1)
    number = SAMPLED_OF_CONVERT if name.startswith(("convert", "inspect")) else SAMPLED
    problems = [case.problem(attempt) for attempt in itertools.islice(case.attempts(), number)]
    assert [problem for problem in problems if problem is not None] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convert", "calibrate", "distill", "revert", "save over another model", "load"])
def test_ctrl_c(name: str) -> None:
    """Real signals, after random times."""
    case, times = checked(name, turns=1), random.Random(0)
    number = 5 if name == "convert" else 20
    problems = [case.problem(Attempt(times.uniform(0, case.seconds))) for _ in range(number)]
    assert [problem for problem in problems if problem is not None] == []


def test_a_signal_is_seen() -> None:
    came, raised = signalled(lambda: time.sleep(5), 0.01)
    assert came and isinstance(raised, KeyboardInterrupt)
    assert signalled(lambda: None, 5) == (False, None)


class Odd(torch.nn.Sequential):
    """Its mode cannot be changed by its method."""

    def train(self, mode: bool = True) -> Odd:
        raise ValueError("no")


def test_the_mode_is_set_by_its_flag() -> None:
    made = sigswap.convert(Odd(Attention()), example_inputs=X)
    seen = []
    made[0].register_forward_hook(lambda module, args, output: seen.append(module.training))
    sigswap.calibrate(made, X, progress=False)
    assert made.training and made[0].training and set(seen) == {False}
