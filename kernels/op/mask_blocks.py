"""The plan of a mask tensor: its blocks, found once on the GPU and kept with the mask for all that share it.

``sigswap::mask_blocks`` finds them; :func:`blocks_of_mask` remembers, in eager code, what it has found. In compiled
code the op stands in the graph, once for each mask, for a compiler may write one buffer after another to the same
memory, which nothing would tell.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sigswap.errors import ArgumentError
from sigswap.kernels.host.blocks import BLOCK, HEADER, WORDS, Blocks, all_blocks_of
from sigswap.kernels.host.layout import layout_of
from sigswap.kernels.host.problem import MAX_HEAD_DIM
from sigswap.kernels.op.registration import library
from sigswap.kernels.op.vmap import looping

LEAST_MASK = 1 << 22
"""Numbers of a mask for which looking for blocks pays."""

LEAST_SCORES = 1 << 26
"""Scores for which it does."""

SHORTEST = 512
"""Rows and keys for which it does."""


_PLAIN = (Tensor, torch.nn.Parameter)


def pays(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> bool:
    """Whether attention on these tensors [B, H, M, D] is faster under blocks of attn_mask [B|1, H|1, M|1, N|1]."""
    if attn_mask.dtype != torch.bool or not query.is_cuda or query.device != attn_mask.device:
        return False
    (batch, heads, q_len, dim), kv_len = query.shape, key.shape[2]
    if attn_mask.shape[2:] != (q_len, kv_len) or q_len < SHORTEST or kv_len < SHORTEST:
        return False
    if _own(attn_mask).numel() < LEAST_MASK or batch * heads * q_len * kv_len < LEAST_SCORES:
        return False
    if max(dim, value.shape[3]) > MAX_HEAD_DIM or query.dtype == torch.float64:
        return False
    if torch.compiler.is_compiling():
        return not _is_exporting() and not hasattr(query, "device_mesh")
    if type(query) not in _PLAIN or type(attn_mask) not in _PLAIN or torch._C._are_functorch_transforms_active():
        return False
    from sigswap.kernels import dispatch

    return dispatch.has_triton(query.device)


def blocks_of_mask(attn_mask: Tensor) -> Blocks:
    """The blocks of a bool tensor [b, h, M, N] on a GPU. They are found again once the mask has changed."""
    own = _own(attn_mask)
    if torch.compiler.is_compiling() or type(own) is not Tensor or _is_watched():
        return _found(own)
    if own.is_inference() or (own.is_cuda and torch.cuda.is_current_stream_capturing()):
        # The one does not say when it changes; a graph that is captured may run on other numbers later.
        return _found(own)
    # Views come and go: what they are views of stays, and counts the changes of all of them.
    base = own._base if own._base is not None else own
    stream = torch.cuda.current_stream(own.device).cuda_stream if own.is_cuda else 0
    strides = layout_of(own).strides_or_zero(4)
    key = own.storage_offset(), own.shape, strides, own._version, stream
    known = _known.get(base)
    if known is None or known[0] != key:
        with torch.inference_mode(False):  # a training step may be the next that asks: it saves them for its backward
            known = _known[base] = (key, _found(own))
    blocks: Blocks = known[1]
    return blocks


_known: Any = WeakTensorKeyDictionary()
"""By tensor: of the last view of it that was asked for."""


def _is_exporting() -> bool:
    """torch.compiler.is_exporting(), of which Dynamo makes True in all that it traces (torch 2.11; not in 2.14)."""
    return torch.compiler._is_exporting_flag


def _is_watched() -> bool:
    """Whether someone looks at the ops that run, who may write them down as a program for other masks: one that found
    no op there would have the blocks of this mask in it."""
    included = torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
    return torch._C._len_torch_dispatch_stack() > 0 or included or torch._C._get_tracing_state() is not None


def _own(mask: Tensor) -> Tensor:
    """Without what is expanded over the batch or the heads."""
    for dim in (0, 1):
        if mask.stride(dim) == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _found(mask: Tensor) -> Blocks:
    return Blocks(*torch.ops.sigswap.mask_blocks.default(mask))


def _check(mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.numel() == 0:
        raise ArgumentError(f"mask must be bool [b, h, M, N], not {mask.dtype} {list(mask.shape)}.")


def _mask_blocks(mask: Tensor) -> tuple[Tensor, ...]:
    _check(mask)
    if mask.is_cuda:
        from sigswap.kernels import dispatch

        if dispatch.has_triton(mask.device):
            return dispatch.blocks_of_mask(mask)
    return all_blocks_of(mask)


def _mask_blocks_fake(mask: Tensor) -> tuple[Tensor, ...]:
    _check(mask)
    batch, heads, q_len, kv_len = mask.shape
    rows, keys = -(-q_len // BLOCK), -(-kv_len // BLOCK)
    shapes = (
        (batch, heads, q_len),
        (batch, heads, rows, HEADER + 2 * keys),
        (batch, heads, keys, HEADER + 2 * rows),
        *[(batch * heads * rows * keys, BLOCK, WORDS)] * 2,
    )
    return tuple([mask.new_empty(shape, dtype=torch.int32) for shape in shapes])


library.define(
    "mask_blocks(Tensor mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,)
)
library.impl("mask_blocks", _mask_blocks, "CompositeExplicitAutograd")
torch.library.register_vmap("sigswap::mask_blocks", looping(torch.ops.sigswap.mask_blocks.default), lib=library)
torch.library.register_fake("sigswap::mask_blocks", _mask_blocks_fake, lib=library)
