"""sigswap's own op on a cell's tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from sigswap.bench.cells import Cell
from sigswap.bench.inputs import Inputs, cu_seqlens, in_pages
from sigswap.bench.peers.peer import Implementation
from sigswap.functional.attention import sigmoid_attention, sigmoid_attention_varlen
from sigswap.functional.block_mask import BlockMask
from sigswap.functional.paged import sigmoid_attention_paged


def build(cell: Cell, inputs: Inputs) -> Implementation:
    gqa = cell.heads != cell.kv_heads
    forward: Callable[[], Tensor]
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
    elif cell.page_size is not None:
        pages, rows = in_pages(cell, inputs), torch.arange(cell.batch + 1, dtype=torch.int32, device=inputs.key.device)

        def forward() -> Tensor:
            query = inputs.query[:, :, 0]
            return sigmoid_attention_paged(query, *pages, rows, 1, cell.kv_len, enable_gqa=gqa)[:, :, None]
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
