"""Heads travel: each rank gets the whole sequence for some of the heads, computes, and gives each rank its rows back.

(The form that DeepSpeed calls Ulysses, arXiv 2309.14509.) Two exchanges per attention, forward and backward, of query,
key, value and output; nothing is sent while the attention is computed, and the attention is one call for all positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sigswap.errors import SigswapError
from sigswap.sequence.exchange import SequenceGroup
from sigswap.sequence.layout import Layout


def to_heads(tensor: Tensor, ranks: SequenceGroup, layout: Layout) -> Tensor:
    """[B, H, M, d], this rank's part of the sequence, to [B, H / n, n M, d]: some of the heads, in the sequence's
    order. H is a multiple of n. Has gradients."""
    moved: Tensor = _ToHeads.apply(tensor, ranks, layout)
    return moved


def to_sequence(tensor: Tensor, ranks: SequenceGroup, layout: Layout) -> Tensor:
    """The inverse of :func:`to_heads`. Has gradients."""
    moved: Tensor = _ToSequence.apply(tensor, ranks, layout)
    return moved


def _heads_out(tensor: Tensor, ranks: SequenceGroup, layout: Layout) -> Tensor:
    batch, heads, length, width = tensor.shape
    own = heads // ranks.size
    sent = tensor.view(batch, ranks.size, own, length, width).permute(1, 3, 0, 2, 4).contiguous()
    received = torch.empty_like(sent)  # [rank, its positions, B, H / n, d]
    ranks.all_to_all(sent, received)
    ordered = received.new_empty((layout.total, batch, own, width))
    for rank in range(ranks.size):
        for start, stop, at in layout.chunks(rank):
            ordered[start:stop] = received[rank, at : at + stop - start]
    return ordered.permute(1, 2, 0, 3)


def _heads_back(tensor: Tensor, ranks: SequenceGroup, layout: Layout) -> Tensor:
    batch, own, _, width = tensor.shape
    ordered = tensor.permute(2, 0, 1, 3)
    sent = tensor.new_empty((ranks.size, layout.length, batch, own, width))
    for rank in range(ranks.size):
        for start, stop, at in layout.chunks(rank):
            sent[rank, at : at + stop - start] = ordered[start:stop]
    received = torch.empty_like(sent)  # [heads' rank, M, B, H / n, d]
    ranks.all_to_all(sent, received)
    # Stored as [B, M, H, d], in which models merge the heads for nothing.
    merged = received.permute(2, 1, 0, 3, 4).reshape(batch, layout.length, ranks.size * own, width)
    return merged.transpose(1, 2)


def differentiated_once(gradient: Tensor, of: Tensor) -> Tensor:
    """``gradient``, which was computed from ``of`` beside autograd, and whose own derivative is an error."""
    if not torch.is_grad_enabled() or not of.requires_grad:
        return gradient
    marked: Tensor = _Once.apply(gradient, of)
    return marked


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, of: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise SigswapError(
            "Attention has no second derivative under context parallelism. Compute its first without create_graph."
        )


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: SequenceGroup, layout: Layout) -> Tensor:
        ctx.ranks, ctx.layout = ranks, layout
        return _heads_out(tensor, ranks, layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return differentiated_once(_heads_back(grad.detach(), ctx.ranks, ctx.layout), grad), None, None


class _ToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: SequenceGroup, layout: Layout) -> Tensor:
        ctx.ranks, ctx.layout = ranks, layout
        return _heads_back(tensor, ranks, layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return differentiated_once(_heads_out(grad.detach(), ctx.ranks, ctx.layout), grad), None, None
