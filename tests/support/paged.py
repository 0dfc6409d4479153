"""Calls of sigmoid attention to keys and values in pages, and an oracle, which shares no code with sigswap."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sigswap

NOWHERE = 1 << 20
"""A page that there is not: what tables have behind a sequence's last page."""


class Paged(NamedTuple):
    """In the order of the public function's arguments."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    cu_seqlens_q: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def paged(
    rows: list[int],
    keys: list[int],
    *,
    page_size: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    value_dim: int = 8,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    heads_first: bool = False,
    latent: bool = False,
    unread: float = torch.nan,
) -> Paged:
    """Of as many rows and keys as each sequence has, in pages in a random order; heads_first: in their memory, which
    has room between its rows then. latent: value is a view of key's first channels. unread: what the cache has where no
    sequence has a key."""
    sequences = len(rows)
    widest = max((-(-n // page_size) for n in keys), default=0) + 1
    used = [-(-n // page_size) for n in keys]
    pages = sum(used) + 3

    def cache(dim: int) -> Tensor:
        shape = (pages, kv_heads, page_size, dim + 8) if heads_first else (pages, page_size, kv_heads, dim)
        made = torch.randn(shape, dtype=torch.float64, device=device).to(dtype)
        return made[..., :dim].transpose(1, 2) if heads_first else made

    key_cache = cache(head_dim)
    value_cache = key_cache[..., :value_dim] if latent else cache(value_dim)
    table = torch.full((sequences, widest), NOWHERE, dtype=torch.int32)
    order = iter(torch.randperm(pages).tolist())
    is_read = torch.zeros(pages, page_size, dtype=torch.bool)
    for sequence, (count, length) in enumerate(zip(used, keys, strict=True)):
        for place in range(count):
            page = next(order)
            table[sequence, place] = page
            is_read[page, : length - place * page_size] = True
    for each in (key_cache, value_cache):
        each[~is_read.to(device)] = unread
    query = torch.randn(sum(rows), heads, head_dim, dtype=torch.float64, device=device).to(dtype)
    ends = torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32, device=device)
    lengths = torch.tensor(keys, dtype=torch.int32, device=device)
    longest = max(rows, default=0), max(keys, default=0)
    return Paged(query, key_cache, value_cache, table.to(device), lengths, ends, *longest)


def run(call: Paged, **options: Any) -> Tensor:
    return sigswap.sigmoid_attention_paged(*call, **options)


def sequences(call: Paged) -> list[tuple[slice, Tensor, Tensor]]:
    """Of each sequence its rows, and its keys and values [N, Hk, D], key by key."""
    found = []
    page_size = call.key_cache.shape[1]
    ends = call.cu_seqlens_q.tolist()
    for number, length in enumerate(call.cache_seqlens.tolist()):
        place = torch.arange(length, device=call.query.device)
        page = call.block_table[number].long()[place // page_size]
        both = (cache[page, place % page_size] for cache in (call.key_cache, call.value_cache))
        found.append((slice(ends[number], ends[number + 1]), *both))
    return found


def oracle(
    call: Paged,
    *,
    bias: Tensor | float | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    window: tuple[int, int] | None = None,
    enable_gqa: bool = True,
    row_cap: float | None = None,
) -> Tensor:
    """The definition, in float64, sequence by sequence. Without a key it has no probability to multiply by."""
    heads, dim = call.query.shape[1:]
    device = call.query.device
    out = torch.zeros(len(call.query), heads, call.value_cache.shape[3], dtype=torch.float64, device=device)
    of_rows = bias.double().expand(len(call.query), heads) if isinstance(bias, Tensor) else None
    for rows, key, value in sequences(call):
        m, n, kv_heads = rows.stop - rows.start, len(key), key.shape[1]
        query = call.query[rows].double().view(m, kv_heads, heads // kv_heads, dim)
        scores = torch.einsum("mkgd,nkd->kgmn", query, key.double()).reshape(heads, m, n)
        scores *= dim**-0.5 if scale is None else scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(n - m, n, device=device)[:, None]
        column = torch.arange(n, device=device)
        seen = torch.ones(m, n, dtype=torch.bool, device=device)
        if is_causal:
            seen &= column <= place
        if window is not None:
            left, right = window
            seen &= (column >= place - left) if left >= 0 else True
            seen &= (column <= place + right) if right >= 0 else True
        if of_rows is not None:
            row_bias = of_rows[rows].t()[..., None]
        elif bias is None:
            row_bias = -seen.sum(1, keepdim=True).clamp(min=1).double().log()
        else:
            row_bias = torch.full((1, 1), float(bias), dtype=torch.float64, device=device)
        p = torch.where(seen, torch.sigmoid(scores + row_bias), 0.0)
        divisor = p.sum(-1, keepdim=True).clamp(min=row_cap) if row_cap is not None else 1.0
        of_heads = (p / divisor).view(kv_heads, heads // kv_heads, m, n)
        out[rows] = torch.einsum("kgmn,nkd->mkgd", of_heads, value.double()).flatten(1, 2)
    return out
