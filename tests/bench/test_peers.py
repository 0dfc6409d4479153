"""The peers of ``sigswap bench``: each computes softmax attention of a cell, and is called as its package documents."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sigswap.bench.cells import Cell
from sigswap.bench.inputs import make_inputs
from sigswap.bench.peers import find_peer

VARLEN = Cell("varlen", 3, 2, 2, 40, 40, 16, 16, lengths=(7, 40, 13))
VARLEN_CAUSAL = Cell("varlen", 3, 2, 2, 40, 40, 16, 16, causal=True, lengths=(7, 40, 13))


@pytest.mark.parametrize("cell", [VARLEN, VARLEN_CAUSAL])
def test_padded_peer_is_softmax_attention_of_each_sequence(cell: Cell) -> None:
    inputs = make_inputs(cell, torch.float32, "cpu")
    padded = find_peer("padded").implementation(cell, inputs)
    out = padded.forward()
    for number, (length, *parts) in enumerate(
        zip(cell.lengths, *(leaf.split(cell.lengths) for leaf in inputs.leaves), strict=True)
    ):
        query, key, value = (part.transpose(0, 1) for part in parts)
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=cell.causal).transpose(0, 1)
        torch.testing.assert_close(out[number, :length], expected)
    assert torch.autograd.grad(out, padded.leaves, padded.grad_out)[0].shape == out.shape
