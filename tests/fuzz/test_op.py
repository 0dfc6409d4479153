"""The first seeds of ``python -m tests.fuzz --part op``, and that a fault would be found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sigswap.kernels import reference
from tests.fuzz import op

PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
def test_random_problems_are_within_the_bound(part: int) -> None:
    faults = [(seed, found) for seed in range(part, 400, PARTS) if (found := op.attempt(seed))[1] is not None]
    assert faults == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("part", range(PARTS))
def test_random_problems_are_within_the_bound_on_a_gpu(part: int) -> None:
    faults = [(seed, found) for seed in range(part, 200, PARTS) if (found := op.attempt(seed, op.CUDA))[1] is not None]
    assert faults == []


_right = reference._probabilities


def _off(share: float) -> Callable[..., Any]:
    def wrong(*arguments: Any) -> Any:
        p, tanh = _right(*arguments)
        return p * (1 + share), tanh

    return wrong


def _sees_one_more(q: Any, k: Any, problem: Any, tile: Any) -> Any:
    options = problem.options
    if options.is_causal:
        options = options._replace(is_causal=False, window_right=1)
    return _right(q, k, dataclasses.replace(problem, options=options), tile)


@pytest.mark.parametrize("wrong", [_off(2.0**-8), _off(2.0**-16), _sees_one_more])
def test_a_fault_is_found(wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_probabilities", wrong)
    assert any(op.attempt(seed)[1] is not None for seed in range(40))
