"""FlexAttention with a softmax, compiled. On packed sequences: one long sequence, and a block mask of its documents."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sigswap.bench.cells import Cell
from sigswap.bench.inputs import Inputs
from sigswap.bench.peers.peer import Implementation, Peer


def _build(cell: Cell, inputs: Inputs) -> Implementation:
    """The block mask is not timed: a model makes it once."""
    return _packed(cell, inputs) if cell.lengths else _dense(cell, inputs)


def _dense(cell: Cell, inputs: Inputs) -> Implementation:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if cell.causal:
        block_mask = create_block_mask(_is_causal, None, None, cell.q_len, cell.kv_len, device=inputs.query.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = cell.heads != cell.kv_heads
    forward = functools.partial(compiled, *inputs.leaves, block_mask=block_mask, enable_gqa=gqa)
    return Implementation(forward, inputs.leaves, inputs.grad_out, _compiled_backward_can_repeat)


def _is_causal(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
    return row >= key


def _packed(cell: Cell, inputs: Inputs) -> Implementation:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, total, causal = inputs.query.device, sum(cell.lengths), cell.causal
    documents = torch.arange(cell.batch, device=device).repeat_interleave(torch.tensor(cell.lengths, device=device))

    def visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        same = documents[row] == documents[key]
        return same & (row >= key) if causal else same

    block_mask = create_block_mask(visible, None, None, total, total, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    leaves = inputs.leaves

    def forward() -> Tensor:
        query, key, value = (leaf.transpose(0, 1).unsqueeze(0) for leaf in leaves)
        return compiled(query, key, value, block_mask=block_mask).squeeze(0).transpose(0, 1)

    return Implementation(forward, leaves, inputs.grad_out, _compiled_backward_can_repeat)


@contextmanager
def _compiled_backward_can_repeat() -> Iterator[None]:
    """Compiled code may overwrite what forward saved for backward, unless told not to (which can cost it some peak
    memory). It is told per thread, so backward stays in this one."""
    import torch._functorch.config

    with torch._functorch.config.patch(donated_buffer=False), torch.autograd.set_multithreading_enabled(False):
        yield


FLEX = Peer(
    "flex", "FlexAttention with a softmax, compiled", ("train", "short", "decode", "varlen"), _build, setup="compile"
)
