"""FlashAttention-3 and FlashAttention-4, from their optional packages. Both take [batch, length, heads, head_dim].

Package fa3-fwd (module ``fa3_fwd_interface``) is FlashAttention-3 built without the backward pass, float16, windows and
pages.
Package flash-attn-4 (module ``flash_attn.cute``) compiles a kernel in some seconds for each head_dim and mask, but not
for each length, so both are measured in all cells. Both scale by 1 / sqrt(head_dim).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sigswap.bench.cells import Cell
from sigswap.bench.inputs import Inputs, cu_seqlens
from sigswap.bench.peers.peer import Implementation, Peer, package_module

_SUITES = ("train", "short", "decode", "varlen", "features")


def _build_fa3(cell: Cell, inputs: Inputs) -> Implementation:
    module = package_module("fa3_fwd_interface", "fa3-fwd")
    if cell.lengths:
        return _packed(module.flash_attn_varlen_func, cell, inputs)
    if cell.latent:
        return _latent(module.flash_attn_with_kvcache, cell, inputs)
    if not cell.trains:  # it splits the keys over the GPU, which flash_attn_func does not by default
        return _dense(module.flash_attn_with_kvcache, cell, inputs)
    return _dense(module.flash_attn_func, cell, inputs)


def _build_fa4(cell: Cell, inputs: Inputs) -> Implementation:
    module = package_module("flash_attn.cute", "flash-attn-4")
    if cell.lengths:
        return _packed(module.flash_attn_varlen_func, cell, inputs)
    if not cell.trains:  # 0: as many splits of the keys as fill the GPU; where the package has no splits, it says so
        return _dense(module.flash_attn_func, cell, inputs, num_splits=0)
    return _dense(module.flash_attn_func, cell, inputs)


def _dense(attention: Any, cell: Cell, inputs: Inputs, **options: Any) -> Implementation:
    if cell.softcap is not None:
        options["softcap"] = cell.softcap
    if cell.window is not None:
        options["window_size"] = (cell.window, 0 if cell.causal else None)

    def forward() -> Tensor:
        query, key, value = (leaf.transpose(1, 2) for leaf in inputs.qkv)
        return _output(attention(query, key, value, causal=cell.causal, **options)).transpose(1, 2)

    return Implementation(forward, inputs.leaves, inputs.grad_out)


def _latent(attention: Any, cell: Cell, inputs: Inputs) -> Implementation:
    """The channels that are values, too, and the others are given apart: scores are q k + qv v."""
    dim = cell.value_dim

    def forward() -> Tensor:
        query, key, value = (leaf.transpose(1, 2) for leaf in inputs.qkv)
        parts = query[..., dim:], key[..., dim:], value
        return _output(attention(*parts, qv=query[..., :dim], softmax_scale=cell.head_dim**-0.5)).transpose(1, 2)

    return Implementation(forward, inputs.leaves, inputs.grad_out)


def _packed(attention: Any, cell: Cell, inputs: Inputs) -> Implementation:
    ends = cu_seqlens(cell, inputs)
    lengths = {
        "cu_seqlens_q": ends,
        "cu_seqlens_k": ends,
        "max_seqlen_q": cell.q_len,
        "max_seqlen_k": cell.kv_len,
    }

    def forward() -> Tensor:
        return _output(attention(*inputs.qkv, **lengths, causal=cell.causal))

    return Implementation(forward, inputs.leaves, inputs.grad_out)


def _output(returned: Tensor | tuple[Tensor, ...]) -> Tensor:
    """FlashAttention-4 returns the logsumexp of each row as well, or None in its place."""
    return returned if isinstance(returned, Tensor) else returned[0]


def _why_not_fa3(cell: Cell, dtype: torch.dtype) -> str | None:
    if dtype != torch.bfloat16:
        return "The package fa3-fwd is built for bfloat16 alone."
    widths = cell.head_dim, cell.value_dim
    if cell.latent and widths == (576, 512):
        return None
    if max(widths) > 256 or any(width % 8 for width in widths):
        return "FlashAttention-3 needs head_dims of at most 256 that are multiples of 8."
    # What the package's own check says of unequal widths, as of version 0.0.3.
    unequal = (128 < cell.head_dim <= 192 and 96 < cell.value_dim <= 128) or cell.head_dim <= 64
    if cell.head_dim != cell.value_dim and not unequal:
        return f"FlashAttention-3 does not take head_dim {cell.head_dim} with values of {cell.value_dim}."
    return None


def _why_not_fa4(cell: Cell, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.bfloat16, torch.float16):
        return "FlashAttention-4 needs float16 or bfloat16."
    widths = cell.head_dim, cell.value_dim
    if max(widths) > 256 or any(width % 8 for width in widths):
        return "FlashAttention-4 needs head_dims of at most 256 that are multiples of 8."
    return None


FA3 = Peer(
    "fa3",
    "FlashAttention-3, forward only",
    _SUITES,
    _build_fa3,
    package="fa3-fwd",
    forward_only=True,
    features=("softcap",),
    why_not=_why_not_fa3,
)
FA4 = Peer(
    "fa4",
    "FlashAttention-4",
    _SUITES,
    _build_fa4,
    package="flash-attn-4",
    features=("softcap", "window"),
    why_not=_why_not_fa4,
)
