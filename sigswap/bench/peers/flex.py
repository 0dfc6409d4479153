"""FlexAttention with a softmax, compiled. On packed sequences: one long sequence, and a block mask of its documents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sigswap.bench.cells import Cell
from sigswap.bench.inputs import Inputs, document_ids, padded_lengths
from sigswap.bench.peers.peer import Implementation, Peer


def _build(cell: Cell, inputs: Inputs) -> Implementation:
    """The block mask is not timed: a model makes it once."""
    return _packed(cell, inputs) if cell.lengths else _dense(cell, inputs)


def _dense(cell: Cell, inputs: Inputs) -> Implementation:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, block_mask = inputs.query.device, None
    visible = _mask_mod(cell, device)
    if visible is not None:
        batch = cell.batch if "padding" in (cell.mask or "") else None
        block_mask = create_block_mask(visible, batch, None, cell.q_len, cell.kv_len, device=device)
    forward = functools.partial(
        torch.compile(flex_attention, dynamic=False),
        *inputs.qkv,
        score_mod=_score_mod(cell, inputs),
        block_mask=block_mask,
        enable_gqa=cell.heads != cell.kv_heads,
    )
    return Implementation(forward, inputs.leaves, inputs.grad_out, _compiled_backward_can_repeat)


def _mask_mod(cell: Cell, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """Mask tensors as what they mean, which FlexAttention computes faster than it reads them."""
    if cell.mask == "documents=1,1,N,N":
        documents = document_ids(cell, device)
        return lambda batch, head, row, key: documents[row] == documents[key]
    if cell.mask in ("padding=B,1,N,N", "padding=B,1,1,N"):
        lengths = padded_lengths(cell, device)
        return lambda batch, head, row, key: key < lengths[batch]
    window = cell.window
    if window is not None:
        return lambda batch, head, row, key: (row >= key) & (row - key <= window)
    return (lambda batch, head, row, key: row >= key) if cell.causal else None


def _score_mod(cell: Cell, inputs: Inputs) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    softcap, bias = cell.softcap, inputs.mask
    if softcap is not None:
        return lambda score, batch, head, row, key: softcap * torch.tanh(score / softcap)
    if bias is not None and "bias" in cell.features:
        return lambda score, batch, head, row, key: score + bias[0, head, row, key]
    return None


def _packed(cell: Cell, inputs: Inputs) -> Implementation:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, total, causal = inputs.query.device, sum(cell.lengths), cell.causal
    documents = torch.arange(cell.batch, device=device).repeat_interleave(torch.tensor(cell.lengths, device=device))

    def visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        same = documents[row] == documents[key]
        return same & (row >= key) if causal else same

    block_mask = create_block_mask(visible, None, None, total, total, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def forward() -> Tensor:
        query, key, value = (leaf.transpose(0, 1).unsqueeze(0) for leaf in inputs.qkv)
        return compiled(query, key, value, block_mask=block_mask).squeeze(0).transpose(0, 1)

    return Implementation(forward, inputs.leaves, inputs.grad_out, _compiled_backward_can_repeat)


@contextmanager
def _compiled_backward_can_repeat() -> Iterator[None]:
    """Compiled code may overwrite what forward saved for backward, unless told not to (which can cost it some peak
    memory). It is told per thread, so backward stays in this one."""
    import torch._functorch.config

    with torch._functorch.config.patch(donated_buffer=False), torch.autograd.set_multithreading_enabled(False):
        yield


FLEX = Peer(
    "flex",
    "FlexAttention with a softmax, compiled",
    ("train", "short", "decode", "varlen", "features", "models", "generation"),
    _build,
    setup="compile",
    features=("softcap", "window", "mask", "bias"),
)
