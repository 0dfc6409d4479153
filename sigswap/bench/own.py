"""sigswap's own op on a cell's tensors."""

from __future__ import annotations

import functools

from sigswap.bench.cells import Cell
from sigswap.bench.inputs import Inputs, cu_seqlens
from sigswap.bench.peers.peer import Implementation
from sigswap.functional.attention import sigmoid_attention, sigmoid_attention_varlen


def build(cell: Cell, inputs: Inputs) -> Implementation:
    gqa = cell.heads != cell.kv_heads
    if cell.lengths:
        ends = cu_seqlens(cell, inputs)
        forward = functools.partial(
            sigmoid_attention_varlen,
            *inputs.leaves,
            ends,
            ends,
            cell.q_len,
            cell.kv_len,
            is_causal=cell.causal,
            enable_gqa=gqa,
        )
    else:
        forward = functools.partial(sigmoid_attention, *inputs.leaves, is_causal=cell.causal, enable_gqa=gqa)
    return Implementation(forward, inputs.leaves, inputs.grad_out)
