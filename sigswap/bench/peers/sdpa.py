"""The backends of PyTorch's ``scaled_dot_product_attention``, and its use on packed sequences of different lengths.

In the suite varlen fa2 is ``torch.nn.attention.varlen``, which is the same kernel on packed tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sigswap.bench.cells import Cell
from sigswap.bench.inputs import Inputs, cu_seqlens
from sigswap.bench.inputs import padded as padded_inputs
from sigswap.bench.peers.peer import Implementation, Peer

BACKENDS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "fa2": functools.partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION),
    "cudnn": functools.partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION),
    "efficient": functools.partial(sdpa_kernel, SDPBackend.EFFICIENT_ATTENTION),
    "sdpa": nullcontext,
}
"""By peer: the context in which ``scaled_dot_product_attention`` runs as that peer."""


def _dense(name: str, cell: Cell, inputs: Inputs) -> Implementation:
    gqa = cell.heads != cell.kv_heads
    forward = functools.partial(
        F.scaled_dot_product_attention,
        *inputs.qkv,
        attn_mask=inputs.mask,
        dropout_p=cell.dropout_p,
        is_causal=cell.causal,
        enable_gqa=gqa,
    )
    return Implementation(forward, inputs.leaves, inputs.grad_out, BACKENDS[name])


def _fa2(cell: Cell, inputs: Inputs) -> Implementation:
    if not cell.lengths:
        return _dense("fa2", cell, inputs)
    from torch.nn.attention.varlen import varlen_attn

    ends = cu_seqlens(cell, inputs)
    window = (-1, 0) if cell.causal else (-1, -1)
    forward: Callable[[], Any] = functools.partial(
        varlen_attn, *inputs.qkv, ends, ends, cell.q_len, cell.kv_len, window_size=window
    )
    return Implementation(forward, inputs.leaves, inputs.grad_out)


def _padded(cell: Cell, inputs: Inputs) -> Implementation:
    """Padding and removing it are not timed. Under a causal mask no token sees the padding after it."""
    copies = padded_inputs(cell, inputs)
    query, key, value = (leaf.transpose(1, 2) for leaf in copies.qkv)
    mask = None
    if not cell.causal:
        at = torch.arange(cell.kv_len, device=query.device)
        mask = (at < torch.tensor(cell.lengths, device=query.device)[:, None])[:, None, None, :]

    def forward() -> Tensor:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=cell.causal)
        return out.transpose(1, 2)

    return Implementation(forward, copies.leaves, copies.grad_out)


def _nested(cell: Cell, inputs: Inputs) -> Implementation:
    offsets = cu_seqlens(cell, inputs).long()
    query, key, value = (
        torch.nested.nested_tensor_from_jagged(
            leaf, offsets, min_seqlen=min(cell.lengths), max_seqlen=max(cell.lengths)
        ).transpose(1, 2)
        for leaf in inputs.qkv
    )

    def forward() -> Tensor:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=cell.causal)
        return out.transpose(1, 2).values()

    return Implementation(forward, inputs.leaves, inputs.grad_out)


def _not_packed(cell: Cell, dtype: torch.dtype) -> str | None:
    return "It does not take packed sequences." if cell.lengths else None


FA2 = Peer(
    "fa2",
    "FlashAttention-2, a backend of SDPA; on packed sequences torch.nn.attention.varlen",
    ("train", "short", "decode", "varlen", "features", "models", "generation"),
    _fa2,
    features=("dropout",),
)
CUDNN = Peer(
    "cudnn",
    "cuDNN, a backend of SDPA",
    ("train", "short", "decode", "features", "models", "generation"),
    functools.partial(_dense, "cudnn"),
    features=("dropout", "mask", "bias"),
    why_not=_not_packed,
)
EFFICIENT = Peer(
    "efficient",
    "memory-efficient attention, a backend of SDPA",
    ("train", "short", "decode", "features", "models", "generation"),
    functools.partial(_dense, "efficient"),
    features=("dropout", "mask", "bias"),
    why_not=_not_packed,
)
SDPA = Peer(
    "sdpa",
    "SDPA with the backend that PyTorch chooses",
    ("host", "models", "generation"),
    functools.partial(_dense, "sdpa"),
)
PADDED = Peer("padded", "SDPA on padded sequences", ("varlen",), _padded)
NESTED = Peer("nested", "SDPA on jagged nested tensors", ("varlen",), _nested)
UNFUSED = Peer("unfused", "attention that a model computes with matrix products and a softmax", ("models",))
