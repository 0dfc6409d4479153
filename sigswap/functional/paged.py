"""Sigmoid attention to keys and values in pages, as servers of language models keep them: decoding, several new tokens
at once (speculative decoding), and prefill in chunks."""

from __future__ import annotations

from torch import Tensor

from sigswap.errors import ArgumentError
from sigswap.functional.arguments import (
    Window,
    bias_terms,
    op_length,
    op_row_cap,
    op_scale,
    op_softcap,
    op_window,
)
from sigswap.functional.checks import check_dense, check_switches, check_types
from sigswap.kernels.op import paged
from sigswap.sequence.active import refuse_parts


def sigmoid_attention_paged(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    bias: Tensor | float | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    window: Window | None = None,
    enable_gqa: bool = False,
    row_cap: float | None = None,
) -> Tensor:
    """:func:`sigmoid_attention_varlen`, with ``bottom_right=True``, of keys and values that lie in pages of a cache.

    Sequence b has the rows ``query[cu_seqlens_q[b] : cu_seqlens_q[b + 1]]``: one when it decodes, several in
    speculative decoding, many in a chunk of a prefill; a batch may hold all of these. They are the last ones of their
    sequence: its causal mask and its window are aligned so that its last row is at its last key, of
    ``cache_seqlens[b]``. The cache is that of vLLM and of ``flash_attn_with_kvcache(block_table=)``: write the keys and
    values of the new rows to their pages before the call.

    Args:
        query: [total_q, H, D], of a floating point dtype.
        key_cache: [pages, page_size, Hk, D], of query's dtype; any page_size from 1 on, any strides with 1 for the
            last. One that is kept as [pages, Hk, page_size, D] is passed as ``.transpose(1, 2)``.
        value_cache: [pages, page_size, Hk, Dv], likewise. Of latent attention pass a view of key_cache,
            ``key_cache[..., :512]``: heads above 256 have a kernel only so.
        block_table: int32 [batch, most pages], on query's device: key j of sequence b is row ``j % page_size`` of the
            page ``block_table[b, j // page_size]``. What is behind a sequence's last page may be any number. Sequences
            may share pages.
        cache_seqlens: int32 [batch], likewise: how many keys each sequence has, those of the new rows included. A
            sequence may have none.
        cu_seqlens_q: int32 [batch + 1], likewise: where the sequences begin in query, and total_q at the end. A
            sequence may have no rows.
        max_seqlen_q: The rows of the longest sequence, or more. A number, for a tensor on a GPU has to be waited for.
        max_seqlen_k: The keys of the longest sequence, or more. Over how many programs of a GPU keys are split depends
            on it.
        bias: ``None``: -ln(n) in each row, where n is the number of keys that the row sees. A ``float``: that
            number in every row. A tensor: it broadcasts to [total_q, H], so that [H] is a number per head. An int is an
            error: in :class:`sigswap.SigmoidConfig` it is a number of keys n, whose bias is ``-math.log(n)``.
        is_causal: Row i of a sequence sees its keys 0 ... i + N - M, for M rows and N keys.
        scale, softcap, window, enable_gqa, row_cap: As those of :func:`sigmoid_attention`.

    Returns:
        [total_q, H, Dv], of query's dtype (autocast's dtype under autocast). A row that sees no key is 0.

    Raises:
        ArgumentError: An argument is not as above, or a gradient is asked for, of which there is none: the message says
            what to call instead. On a GPU the values in block_table, cache_seqlens and cu_seqlens_q are not checked,
            for that would wait for the GPU; ``sigswap.kernels.settings.check_lengths = True``, or the environment
            variable SIGSWAP_CHECK_LENGTHS=1, has them checked.

    Wrong values that are not checked reach no memory but the tensors': each sequence of rows is cut at query's end and
    after max_seqlen_q, its keys after as many as its pages hold (of many rows after max_seqlen_k), and a page that
    there is not is another one. In the output what no sequence has then is not written to: there is what the memory
    held before. That may be all of it, if cu_seqlens_q falls.
    """
    refuse_parts("sigmoid_attention_paged")
    tensors = {"query": query, "key_cache": key_cache, "value_cache": value_cache, "block_table": block_table}
    tensors |= {"cache_seqlens": cache_seqlens, "cu_seqlens_q": cu_seqlens_q}
    check_types(tensors, scale, 0.0, softcap, row_cap)
    check_switches(is_causal=is_causal, enable_gqa=enable_gqa)
    check_dense(bias=bias)
    visible_bias, const_bias, row_bias = bias_terms(bias)
    if row_bias is not None and row_bias.dim() < 2:
        row_bias = row_bias.reshape(1, -1)  # [], [1] or [H]; the op's is [1 | total_q, 1 | H]
    if query.dim() == 3 and key_cache.dim() == 4:
        heads, kv_heads = query.shape[1], key_cache.shape[2]
        if kv_heads > heads:
            raise ArgumentError(
                f"key_cache has {kv_heads} heads, more than query's {heads}: it must be [pages, page_size, heads, "
                "head_dim]. One that has its heads before the page's keys is that as .transpose(1, 2), without a copy."
            )
        if kv_heads != heads and not enable_gqa:
            raise ArgumentError(
                f"query has {heads} heads and key_cache {kv_heads}; enable_gqa=True lets key_cache and value_cache "
                "have fewer."
            )
    window_left, window_right = op_window(window)
    return paged.sigmoid_attention_paged(
        query,
        key_cache,
        value_cache,
        row_bias,
        block_table,
        cache_seqlens,
        cu_seqlens_q,
        op_length("max_seqlen_q", max_seqlen_q),
        op_length("max_seqlen_k", max_seqlen_k),
        scale=op_scale(query, scale),
        const_bias=const_bias,
        visible_bias=visible_bias,
        is_causal=is_causal,
        window_left=window_left,
        window_right=window_right,
        softcap=op_softcap(softcap),
        row_cap=op_row_cap(row_cap),
    )
