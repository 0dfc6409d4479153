"""An interruption at any line leaves a model as it was or wholly changed, and the process as it was.

A sample; ``python -m tests.interruptions`` takes every line.
"""

from __future__ import annotations

import random
import signal
import threading

import pytest
import torch

import sigswap
from tests.interruptions.cases import CASES, Attention, X, copied, is_decided, process, state_of
from tests.interruptions.check import ERRORS, Checked

SAMPLED, SAMPLED_OF_CONVERT = 12, 4
"""Lines of each call; those that look at a model take longer."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_sample_of_lines(name: str) -> None:
    checked = Checked(name)
    number = SAMPLED_OF_CONVERT if name.startswith(("convert", "inspect")) else SAMPLED
    chosen = random.Random(name).sample(checked.lines, number)
    problems = [checked.problem(at, ERRORS[index % 2]) for index, at in enumerate(chosen)]
    assert [problem for problem in problems if problem is not None] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convert", "calibrate", "distill", "revert"])
def test_ctrl_c(name: str) -> None:
    """Real signals, after random times."""
    case, made = CASES[name], CASES[name].build()
    before = state_of(copied(made)), is_decided(made)
    done = copied(made)
    case.call(done)
    after = state_of(done), is_decided(done)
    around, times = process(), random.Random(0)
    for _ in range(20):
        other = copied(made)
        timer = threading.Timer(
            times.uniform(0, 0.05 if name == "revert" else 0.3), signal.raise_signal, [signal.SIGINT]
        )
        raised = False
        try:
            timer.start()
            case.call(other)
            timer.join()
        except KeyboardInterrupt:
            raised = True
        assert process() == around
        assert (state_of(other), is_decided(other)) in ([before, after] if raised else [after])


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
