"""What attention among ranks keeps from one call to the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sigswap.kernels.host.problem import Options
from sigswap.sequence.attention import SequenceAttention
from sigswap.sequence.exchange import SequenceGroup
from sigswap.sequence.inputs import Inputs


class OneRank(SequenceGroup):
    """A group of one, which sends to itself."""

    def __init__(self) -> None:
        self.size, self.rank = 1, 0

    def all_to_all(self, sent: Tensor, received: Tensor, *sizes: Any) -> None:
        received.copy_(sent)

    def sum(self, tensor: Tensor) -> None:
        pass


@pytest.mark.parametrize("window", [-1, 2])
def test_what_evaluation_has_worked_out_is_trained_with(window: int) -> None:
    """Under inference mode, whose tensors no training step can save."""
    query, key, value, rest = (torch.randn(1, 2, 6, d, dtype=torch.float64, requires_grad=True) for d in (4, 4, 3, 1))
    inputs = Inputs(query, key, value, None, None, torch.ones(1, 2, 1, 1, dtype=torch.float64), rest)
    attention = SequenceAttention(OneRank(), form="all_to_all", balanced=False, agreed=True)
    options = Options(0.5, is_causal=True, window_left=window)
    with torch.inference_mode():
        attention(inputs, options)
    out = attention(inputs, options)

    rows, keys = torch.arange(6)[:, None], torch.arange(6)
    seen = (keys <= rows) & ((keys >= rows - window) if window >= 0 else (keys >= 0))
    scores = 0.5 * query @ key.mT
    first = scores.gather(-1, seen.int().argmax(-1, keepdim=True).expand(1, 2, 6, 1))
    bias = -torch.logaddexp(first, seen.sum(-1, keepdim=True).double().log() - rest)
    expected = ((scores + bias).sigmoid() * seen) @ value
    torch.testing.assert_close(out, expected)
    leaves = query, key, value, rest
    torch.testing.assert_close(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(expected.sum(), leaves))
