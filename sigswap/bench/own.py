"""sigswap's own op on a cell's tensors."""

from __future__ import annotations

import functools

from sigswap.bench.cells import Cell
from sigswap.bench.inputs import Inputs, cu_seqlens
from sigswap.bench.peers.peer import Implementation
from sigswap.functional.attention import sigmoid_attention, sigmoid_attention_varlen
from sigswap.functional.block_mask import BlockMask


def build(cell: Cell, inputs: Inputs) -> Implementation:
    gqa = cell.heads != cell.kv_heads
    if cell.lengths:
        ends = cu_seqlens(cell, inputs)
        forward = functools.partial(
            sigmoid_attention_varlen,
            *inputs.qkv,
            ends,
            ends,
            cell.q_len,
            cell.kv_len,
            is_causal=cell.causal,
            enable_gqa=gqa,
        )
    else:
        block_mask = None  # not timed: a model makes it once
        if cell.by_blocks and inputs.mask is not None:
            block_mask = BlockMask.from_mask(inputs.mask)
        forward = functools.partial(
            sigmoid_attention,
            *inputs.qkv,
            attn_mask=inputs.mask if block_mask is None else None,
            block_mask=block_mask,
            is_causal=cell.causal,
            dropout_p=cell.dropout_p,
            softcap=cell.softcap,
            window=None if cell.window is None else (cell.window, None),
            enable_gqa=gqa,
        )
    return Implementation(forward, inputs.leaves, inputs.grad_out)
