"""An interruption at any line leaves a model as it was or wholly changed, and the process as it was.

A sample; ``python -m tests.interruptions`` takes every line.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import itertools
import os
import random
import sys
import time
from typing import Any

import pytest
import torch
from interruptions import interrupted, lines_of
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

import sigswap
from sigswap.conversion.copies import _Placing
from sigswap.conversion.recording import _GroupedProducts
from sigswap.conversion.watch import Watch, _Ops
from sigswap.errors import SigswapError
from sigswap.saving import factories, peft_hook, weights
from tests.interruptions.cases import Attention, X, model, process
from tests.interruptions.check import ERRORS, Attempt, Checked, first_difference, signalled
from tests.interruptions.share import NAMES, checked, in_forks, work

SAMPLED, SAMPLED_OF_CONVERT = 12, 4
"""Interruptions of each call; those that look at a model take longer."""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_sample(name: str) -> None:
    if name.endswith("transformers does"):
        pytest.importorskip("transformers")
    case = checked(name, turns=1)
    number = SAMPLED_OF_CONVERT if name.startswith(("convert", "inspect")) else SAMPLED
    problems = [case.problem(attempt) for attempt in itertools.islice(case.places.attempts(name), number)]
    assert [problem for problem in problems if problem is not None] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convert", "calibrate", "distill", "revert", "save over another model", "load"])
def test_ctrl_c(name: str) -> None:
    """Real signals, after random times."""
    case, times = checked(name, turns=1), random.Random(0)
    number = 5 if name == "convert" else 20
    problems = [case.problem(Attempt(times.uniform(0, case.places.seconds))) for _ in range(number)]
    assert [problem for problem in problems if problem is not None] == []


def test_the_lines_are_those_of_the_call_alone() -> None:
    """And not those of the look at what it leaves, which loads and saves models."""
    with contextlib.closing(checked("recover", turns=0)) as case:
        for attempt in itertools.islice(case.places.attempts("recover"), 5):
            assert case.problem(attempt) is None and case.came, str(attempt)


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("mode", [FakeTensorMode, _GroupedProducts, _Placing, _Ops, Watch])
def test_an_interruption_as_a_mode_is_left(monkeypatch: Any, mode: type[Any], kind: type[BaseException]) -> None:
    """It comes before the first line of its ``__exit__``; of an Exception inspect tries another way."""
    leave, came, own = mode.__exit__, [], sigswap.conversion.__path__[0]

    def interrupted(self: Any, *error: Any) -> Any:
        if came or not sys._getframe(1).f_code.co_filename.startswith(own):  # torch's own code leaves modes, too
            return leave(self, *error)
        came.append(self)
        raise kind("injected")

    monkeypatch.setattr(mode, "__exit__", interrupted)
    around = process()
    with contextlib.suppress(KeyboardInterrupt, SigswapError):
        sigswap.inspect(model(Attention), example_inputs=X)
    assert came and first_difference(around, process()) == "nothing"


@pytest.mark.parametrize("name", ["save", "load"])
def test_an_error_as_the_meta_device_is_left(name: str) -> None:
    """Another way is tried after it, and that one is not on the meta device."""
    code, first = inspect.getsourcelines(factories._on_meta)
    with contextlib.closing(checked(name, turns=2)) as case:
        inside = [at for at in case.places.lines if at.file == factories.__file__]
        inside = [at for at in inside if first <= at.number < first + len(code)]
        assert len(inside) >= 4
        for at in inside:
            assert case.problem(Attempt(at, RuntimeError)) is None and case.came, at


@pytest.mark.parametrize("name", ["all of the model", "adapters"])
def test_an_interruption_ends_what_holds_for_a_call_of_transformers(name: str) -> None:
    made = model(Attention) if name == "adapters" else None
    if made is not None:
        sigswap.convert(made, example_inputs=X)

    def used() -> None:
        with weights.all_of_the_model() if made is None else peft_hook.marked(made):
            assert process() != around

    around = process()
    for at in lines_of(used):
        _, raised = interrupted(used, at, KeyboardInterrupt())
        assert isinstance(raised, KeyboardInterrupt) and process() == around, at


class _Poisons(Checked):
    """Its first attempt leaves a mode behind, its third ends the process."""

    def __init__(self) -> None:
        self.name = "poisons"

    def fresh(self) -> Any:
        raise NotImplementedError

    def problem(self, attempt: Attempt) -> str | None:
        if attempt.at == 1.0:
            TorchFunctionMode().__enter__()
            return "left behind"
        if attempt.at == 3.0:
            os._exit(7)
        return None if torch._C._len_torch_function_stack() == 0 else "another's fault"


def test_a_fault_is_counted_once() -> None:
    found = list(in_forks("poisons", _Poisons, [Attempt(float(number)) for number in range(1, 5)]))
    assert [tried.problem for tried in found] == [
        "left behind (it is not used any more)",
        None,
        "poisons, a signal after 3000.00 ms: the process ended with exit code 7",
        None,
    ]
    assert torch._C._len_torch_function_stack() == 0


def test_the_long_run_leaves_autograd_to_its_copies(monkeypatch: Any) -> None:
    """Torch refuses a backward pass in a copy of a process that has run one with threads."""
    backward, here = torch.autograd.backward, os.getpid()

    def only_in_copies(*arguments: Any, **keywords: Any) -> None:
        assert os.getpid() != here
        backward(*arguments, **keywords)

    monkeypatch.setattr(torch.autograd, "backward", only_in_copies)
    given = argparse.Namespace(count=2, minutes=1.0, turns=1, signals=0, case=["calibrate without data"], line=None)
    (found,) = work(0, 1, given)
    assert found[0] == "calibrate without data" and found[1] > 0 and found[4] == []


def test_the_first_difference_is_told() -> None:
    before = ([("a", {"x": 1, "y": [1.0, 2.0]})], None)
    assert first_difference(before, before) == "nothing"
    assert first_difference(before, ([("a", {"x": 1, "y": [1.0, 3.0]})], None)) == "[0][0][1]['y'][1] 2.0 -> 3.0"
    assert first_difference(before, ([("a", {"x": 1})], 3)) == "[0][0][1]['y'] is missing"
    assert first_difference([1], [1, "b"]) == "[1] is new: 'b'"
