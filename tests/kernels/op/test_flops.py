"""PyTorch's FLOP counter on the ops, compared with counts by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

import sigswap
from sigswap.kernels.op import flops


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def test_forward_and_backward() -> None:
    query, key = torch.randn(2, 4, 5, 8, requires_grad=True), torch.randn(2, 2, 7, 8, requires_grad=True)
    value = torch.randn(2, 2, 7, 6, requires_grad=True)
    product = 2 * 2 * 4 * 5 * 7  # of a multiplication and an addition per batch, head, row, key

    def forward(row_cap: float | None = None) -> torch.Tensor:
        return sigswap.sigmoid_attention(query, key, value, enable_gqa=True, row_cap=row_cap)

    assert counted(forward) == product * (8 + 6)
    assert counted(lambda: forward().sum().backward()) == product * (8 + 6) + product * (3 * 8 + 2 * 6)
    assert counted(lambda: forward(0.5).sum().backward()) == product * (8 + 6) + product * (3 * 8 + 2 * 6)


def test_packed_sequences() -> None:
    query = torch.randn(9, 2, 8, requires_grad=True)
    lengths = torch.tensor([0, 4, 9], dtype=torch.int32)
    pairs = 4 * 4 + 5 * 5

    def forward() -> torch.Tensor:
        return sigswap.sigmoid_attention_varlen(query, query, query, lengths, lengths, 5, 5)

    assert counted(forward) == 2 * 2 * pairs * 16
    assert counted(lambda: forward().sum().backward()) == 2 * 2 * pairs * (16 + 40)


def test_packed_sequences_of_more_than_2_to_the_31_pairs() -> None:
    query = torch.empty(0, 2, 8)
    lengths = torch.tensor([0, 65536, 65536 + 50000], dtype=torch.int32)
    given = query, query, query, None, lengths, lengths, None, 65536, 65536
    pairs = 65536**2 + 50000**2
    assert flops._forward_packed(*given) == 2 * 2 * pairs * 16
    assert flops._backward_packed(query, *given) == 2 * 2 * pairs * 40
