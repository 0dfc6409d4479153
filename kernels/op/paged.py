"""The registered op for decoding: new rows of packed sequences, whose keys and values lie in pages of a cache.

``sigmoid_attention_paged`` (``torch.ops.sigswap`` holds it) has no gradient: a cache that is written to as sequences
grow is for inference. :mod:`sigswap.kernels.op.registration` says what runs it. This module imports no Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sigswap.errors import ArgumentError
from sigswap.kernels import settings
from sigswap.kernels.host.layout import by_rows, heads_first
from sigswap.kernels.host.lengths import checked_ends, checked_keys
from sigswap.kernels.host.problem import Options, Pages, Problem
from sigswap.kernels.op import checks
from sigswap.kernels.op.registration import (
    below_autograd,
    check_no_tangents,
    implementation_for,
    is_plain,
    library,
    options_of,
    register_autocast,
)
from sigswap.kernels.op.vmap import looping

_check: Callable[..., None] = checks.check_paged


def sigmoid_attention_paged(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    bias: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    const_bias: float = 0.0,
    visible_bias: bool = True,
    is_causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    row_cap: float = 0.0,
) -> Tensor:
    """Sigmoid attention of the last rows of each of several sequences to all of its keys, which lie in pages; each is
    :func:`sigswap.kernels.op.dense.sigmoid_attention` of its own rows and keys, aligned at the bottom right.

    Under autocast query, key_cache and value_cache are cast to its dtype, which copies caches of another one.

    Args:
        query: [total_q, H, D], any strides.
        key_cache: [pages, page_size, Hk, D], any strides with 1 for the last; query head h uses key head
            h // (H / Hk). Rows of pages that no sequence has are not read.
        value_cache: [pages, page_size, Hk, Dv], likewise.
        bias: Row bias, floating point, [1|total_q, 1|H].
        block_table: int32 [B, most pages], any strides with 1 for the last: key j of sequence b is row j % page_size
            of the page block_table[b, j // page_size]. What is behind a sequence's last page may be any number. Pages
            may be shared.
        cache_seqlens: int32 [B]: each sequence's keys.
        cu_seqlens_q: int32 [B + 1], contiguous: sequence b has the rows cu_seqlens_q[b] ... cu_seqlens_q[b + 1] - 1.
            From 0 to total_q; a sequence may have no rows.
        max_seqlen_q: At least the rows of the longest sequence.
        max_seqlen_k: At least the keys of the longest sequence. Over how many programs of a GPU keys are split depends
            on it, and of many rows how much memory copies of keys and values take, which sequences are cut by.
        scale: This and all that follow: as those of ``sigmoid_attention``.

    Returns:
        [total_q, H, Dv] of query's dtype, contiguous. Rows that see no key are 0.

    Raises:
        ArgumentError: A shape, dtype, device or value is not as above, or a gradient is asked for. Where the Triton
            kernel runs, the values in block_table, cache_seqlens and cu_seqlens_q are checked only if
            :data:`sigswap.kernels.settings.check_lengths` is set, for that waits for the GPU. Else they are brought
            into range: a sequence's rows as those of ``sigmoid_attention_varlen``, its keys from 0 to as many as its
            pages hold, and pages from the first to the last one. Rows that no sequence has are uninitialised then, and
            if cu_seqlens_q falls, all rows may be.
    """
    inputs = query, key_cache, value_cache, bias, block_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, max_seqlen_k
    if is_plain(*inputs[:7]):
        options = options_of(
            scale, const_bias, visible_bias, is_causal, True, window_left, window_right, softcap, 0.0, row_cap
        )
        if options is not None:
            _check_no_gradient(inputs)
            return _run(inputs, options)
    out: Tensor = torch.ops.sigswap.sigmoid_attention_paged.default(
        *inputs,
        scale=scale,
        const_bias=const_bias,
        visible_bias=visible_bias,
        is_causal=is_causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        row_cap=row_cap,
    )
    return out


def _run(inputs: tuple[Any, ...], options: Options) -> Tensor:
    _check(*inputs, options)
    if settings.check_lengths:
        _check_numbers(inputs)
    query, key_cache, value_cache, bias, block_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, max_seqlen_k = inputs
    # No sequence is longer than all together, whatever was said: launches would have programs without end.
    most_keys = block_table.shape[1] * key_cache.shape[1]
    longest = min(max_seqlen_q, query.shape[0]), min(max_seqlen_k, most_keys)
    pages = Pages(cu_seqlens_q, block_table, cache_seqlens, *longest)
    views = heads_first(query), key_cache.transpose(1, 2), value_cache.transpose(1, 2)
    out = _empty(query, value_cache)
    problem = Problem(*views, None if bias is None else by_rows(bias), None, None, options, pages=pages)
    problem.out = heads_first(out)
    implementation_for(query.is_cuda).forward(problem)
    return out


def _empty(query: Tensor, value_cache: Tensor) -> Tensor:
    """The output, uninitialised."""
    return query.new_empty((*query.shape[:2], value_cache.shape[3]))


def _check_numbers(inputs: tuple[Any, ...]) -> None:
    query, key_cache, _, _, block_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, max_seqlen_k = inputs
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # there is nothing in the tensors yet
    checked_ends("q", cu_seqlens_q, max_seqlen_q, query.shape[0])
    checked_keys(cache_seqlens, block_table, max_seqlen_k, *key_cache.shape[:2])


def _check_no_gradient(inputs: tuple[Any, ...]) -> None:
    if not torch.is_grad_enabled():
        return
    names = "query", "key_cache", "value_cache", "bias"
    for name, tensor in zip(names, inputs, strict=False):
        if tensor is not None and tensor.requires_grad:
            raise ArgumentError(
                f"{name} must not require a gradient, for sigmoid_attention_paged has none: call it within "
                "torch.no_grad(), or sigmoid_attention_varlen(bottom_right=True), which has gradients."
            )


def _implementation(*inputs: Any, **keywords: Any) -> Tensor:
    # TorchFunctionModes, such as sigswap's, are off inside of implementations.
    with torch._C.DisableTorchFunction():
        return _run(inputs, Options(bottom_right=True, **keywords))


def _fake(*inputs: Any, **keywords: Any) -> Tensor:
    _check(*inputs, Options(bottom_right=True, **keywords))
    return _empty(inputs[0], inputs[2])


def _autograd(keyset: torch._C.DispatchKeySet, *inputs: Any, **keywords: Any) -> Any:
    check_no_tangents("sigmoid_attention_paged", inputs[:4])
    _check_no_gradient(inputs)
    return below_autograd(_OP, keyset, inputs, keywords)


library.define(
    "sigmoid_attention_paged(Tensor query, Tensor key_cache, Tensor value_cache, Tensor? bias, Tensor block_table, "
    "Tensor cache_seqlens, Tensor cu_seqlens_q, SymInt max_seqlen_q, SymInt max_seqlen_k, *, float scale, "
    "float const_bias=0.0, bool visible_bias=True, bool is_causal=False, SymInt window_left=-1, "
    "SymInt window_right=-1, float softcap=0.0, float row_cap=0.0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_OP = torch.ops.sigswap.sigmoid_attention_paged.default
library.impl("sigmoid_attention_paged", _implementation, "CompositeExplicitAutograd")
library.impl("sigmoid_attention_paged", _autograd, "Autograd", with_keyset=True)
torch.library.register_fake("sigswap::sigmoid_attention_paged", _fake, lib=library)
torch.library.register_vmap("sigswap::sigmoid_attention_paged", looping(_OP), lib=library)
register_autocast(_OP)
