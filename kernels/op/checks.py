"""The argument checks of the attention ops: on shapes, dtypes, devices and plain numbers, without tensors' values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sigswap.errors import ArgumentError
from sigswap.kernels.host.problem import Options

MOST_KEYS = 1 << 30
"""That pages have room for, of one sequence: so that what kernels add to a key's number stays within 32 bits."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> None:
    """Raises ArgumentError unless the arguments are as :func:`sigswap.kernels.op.dense.sigmoid_attention` says."""
    if not (query.dim() == key.dim() == value.dim() == 4):
        raise ArgumentError(
            "query, key and value must be [batch, heads, length, head_dim], "
            f"not {_shape(query)}, {_shape(key)} and {_shape(value)}."
        )
    _check_dtypes_and_devices(query, key, value)
    batch, heads, q_len, head_dim = query.shape
    key_batch, kv_heads, kv_len, key_dim = key.shape
    value_batch, value_heads, value_len, _ = value.shape
    if key_batch != batch or key_dim != head_dim:
        raise ArgumentError(f"key {_shape(key)} must have the batch size and the head_dim of query {_shape(query)}.")
    if value_batch != batch or value_heads != kv_heads or value_len != kv_len:
        raise ArgumentError(f"value {_shape(value)} must have the batch size, heads and length of key {_shape(key)}.")
    _check_heads(heads, kv_heads)
    if bias is not None:
        _check_bias(bias, (batch, heads, q_len, 1), query)
    if attn_mask is not None:
        _check_broadcast("attn_mask", attn_mask, (batch, heads, q_len, kv_len), query, repeats=True)
        if attn_mask.dtype != torch.bool and attn_mask.dtype not in _DTYPES:
            raise ArgumentError(
                f"attn_mask must be bool or floating point of 16, 32 or 64 bits, not {attn_mask.dtype}."
            )
    _check_options(options, seed, query)


def check_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: Options,
) -> None:
    """Raises ArgumentError unless the arguments are as
    :func:`sigswap.kernels.op.varlen.sigmoid_attention_varlen` says."""
    if not (query.dim() == key.dim() == value.dim() == 3):
        raise ArgumentError(
            "query, key and value must be [total_length, heads, head_dim], "
            f"not {_shape(query)}, {_shape(key)} and {_shape(value)}."
        )
    _check_dtypes_and_devices(query, key, value)
    total_q, heads, head_dim = query.shape
    total_k, kv_heads, key_dim = key.shape
    if key_dim != head_dim:
        raise ArgumentError(f"key {_shape(key)} must have the head_dim of query {_shape(query)}.")
    if value.shape[0] != total_k or value.shape[1] != kv_heads:
        raise ArgumentError(f"value {_shape(value)} must have the length and the heads of key {_shape(key)}.")
    _check_heads(heads, kv_heads)
    if bias is not None:
        _check_bias(bias, (total_q, heads), query)
    _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query)
    _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, query)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ArgumentError(
            "cu_seqlens_q and cu_seqlens_k must be of as many sequences, "
            f"not {cu_seqlens_q.shape[0] - 1} and {cu_seqlens_k.shape[0] - 1}."
        )
    _check_longest(max_seqlen_q, max_seqlen_k)
    if max_seqlen_q <= 0 and total_q > 0:
        raise ArgumentError(f"max_seqlen_q must be at least the longest sequence's rows, not {max_seqlen_q}.")
    if max_seqlen_k <= 0 and total_k > 0:
        raise ArgumentError(f"max_seqlen_k must be at least the longest sequence's keys, not {max_seqlen_k}.")
    _check_options(options, seed, query)


def check_paged(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    bias: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: Options,
) -> None:
    """Raises ArgumentError unless the arguments are as
    :func:`sigswap.kernels.op.paged.sigmoid_attention_paged` says."""
    if query.dim() != 3:
        raise ArgumentError(f"query must be [total_length, heads, head_dim], not {_shape(query)}.")
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.dim() != 4 or cache.shape[1] == 0:
            raise ArgumentError(f"{name} must be [pages, page_size, heads, head_dim], not {_shape(cache)}.")
    _check_dtypes_and_devices(query, key_cache, value_cache, ("key_cache", "value_cache"))
    total_q, heads, head_dim = query.shape
    if key_cache.shape[3] != head_dim:
        raise ArgumentError(f"key_cache {_shape(key_cache)} must have the head_dim of query {_shape(query)}.")
    if value_cache.shape[:3] != key_cache.shape[:3]:
        raise ArgumentError(
            f"value_cache {_shape(value_cache)} must have the pages, their size and the heads of key_cache "
            f"{_shape(key_cache)}."
        )
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.shape[3] > 1 and cache.stride(3) != 1:  # a copy would be one of all pages
            raise ArgumentError(f"{name} must have stride 1 in its last dimension, not {cache.stride(3)}.")
    _check_heads(heads, key_cache.shape[2])
    if bias is not None:
        _check_bias(bias, (total_q, heads), query)
    _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query)
    sequences = cu_seqlens_q.shape[0] - 1
    for name, tensor, dims in (("block_table", block_table, 2), ("cache_seqlens", cache_seqlens, 1)):
        if tensor.dtype != torch.int32:
            raise ArgumentError(f"{name} must be int32, not {tensor.dtype}; cast it with .to(torch.int32).")
        if tensor.dim() != dims or tensor.shape[0] != sequences:
            wanted = f"[{sequences}, pages per sequence]" if dims == 2 else f"[{sequences}]"
            raise ArgumentError(f"{name} must be {wanted}, as cu_seqlens_q has it, not {_shape(tensor)}.")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ArgumentError(f"{name} must have stride 1 in its last dimension, not {tensor.stride(-1)}.")
        if tensor.device != query.device:
            raise ArgumentError(f"{name} must be on query's device {query.device}, not {tensor.device}.")
    if block_table.shape[1] * key_cache.shape[1] > MOST_KEYS:
        raise ArgumentError(
            f"block_table {_shape(block_table)} must be of at most {MOST_KEYS} keys per sequence, in pages of "
            f"{key_cache.shape[1]}; cut it at the longest sequence."
        )
    _check_longest(max_seqlen_q, max_seqlen_k)
    if max_seqlen_q <= 0 and total_q > 0:
        raise ArgumentError(f"max_seqlen_q must be at least the longest sequence's rows, not {max_seqlen_q}.")
    if max_seqlen_k < 0:
        raise ArgumentError(f"max_seqlen_k must be at least the longest sequence's keys, not {max_seqlen_k}.")
    _check_options(options, None, query)


def check_row_cap(row_cap: float) -> None:
    if not 0.0 <= row_cap < math.inf:
        raise ArgumentError(f"row_cap must be positive and finite, or 0 for none, not {row_cap}.")


def _check_dtypes_and_devices(
    query: Tensor, key: Tensor, value: Tensor, names: tuple[str, str] = ("key", "value")
) -> None:
    dtype, device = query.dtype, query.device
    if dtype not in _DTYPES:
        raise ArgumentError(f"query must be floating point of 16, 32 or 64 bits, not {dtype}.")
    for name, tensor in zip(names, (key, value), strict=True):
        if tensor.dtype != dtype:
            raise ArgumentError(f"{name} must have query's dtype {dtype}, not {tensor.dtype}.")
    for name, tensor in zip(names, (key, value), strict=True):
        if tensor.device != device:
            raise ArgumentError(f"{name} must be on query's device {device}, not {tensor.device}.")


def _check_heads(heads: int, kv_heads: int) -> None:
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads != 0):
        raise ArgumentError(
            f"query has {heads} heads, which is not a multiple of the {kv_heads} heads of key and value."
        )


def _check_bias(bias: Tensor, full: tuple[int, ...], query: Tensor) -> None:
    _check_broadcast("bias", bias, full, query)
    if bias.dtype not in _DTYPES:
        raise ArgumentError(f"bias must be floating point of 16, 32 or 64 bits, not {bias.dtype}.")


def _check_broadcast(name: str, tensor: Tensor, full: tuple[int, ...], query: Tensor, *, repeats: bool = False) -> None:
    """repeats: the first size may be any divisor of the full one."""
    fits = tensor.dim() == len(full)
    if fits:
        for dim, (size, whole) in enumerate(zip(tensor.shape, full, strict=True)):
            # In this order: what holds already, of symbolic sizes, adds no guard.
            if size != 1 and size != whole and not (repeats and dim == 0 and size != 0 and whole % size == 0):
                fits = False
    if not fits:
        divisor = "; its batch size may be a divisor, too" if repeats else ""
        raise ArgumentError(
            f"{name} {_shape(tensor)} must broadcast to {list(full)} (1 in a dimension: for all{divisor})."
        )
    if tensor.device != query.device:
        raise ArgumentError(f"{name} must be on query's device {query.device}, not {tensor.device}.")


def _check_cu_seqlens(name: str, cu_seqlens: Tensor, query: Tensor) -> None:
    if cu_seqlens.dtype != torch.int32:
        raise ArgumentError(f"{name} must be int32, not {cu_seqlens.dtype}; cast it with .to(torch.int32).")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or not cu_seqlens.is_contiguous():
        raise ArgumentError(f"{name} must be contiguous and [batch + 1], not {_shape(cu_seqlens)}.")
    if cu_seqlens.device != query.device:
        raise ArgumentError(f"{name} must be on query's device {query.device}, not {cu_seqlens.device}.")


def _check_longest(max_seqlen_q: int, max_seqlen_k: int) -> None:
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(length, int | torch.SymInt):
            raise ArgumentError(f"{name} must be an int, not {type(length).__name__}; a tensor has .item().")


def _check_options(options: Options, seed: Tensor | None, query: Tensor) -> None:
    if options.window_left < -1 or options.window_right < -1:
        window = options.window_left, options.window_right
        raise ArgumentError(f"window {window} must hold numbers >= 0, or -1: no limit.")
    if not 0.0 <= options.softcap < math.inf:
        raise ArgumentError(f"softcap must be positive and finite, or 0 for none, not {options.softcap}.")
    if not 0.0 <= options.dropout_p <= 1.0:
        raise ArgumentError(f"dropout_p must be in [0, 1], not {options.dropout_p}.")
    check_row_cap(options.row_cap)
    if options.dropout_p > 0.0:
        if seed is None or seed.dtype != torch.int64 or seed.numel() != 1:
            raise ArgumentError("seed must be an int64 tensor of one element, since dropout_p > 0.")
        if seed.device != query.device:
            raise ArgumentError(f"seed must be on query's device {query.device}, not {seed.device}.")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
