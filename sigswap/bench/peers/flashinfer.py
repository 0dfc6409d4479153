"""FlashInfer, from its optional package flashinfer-python: decoding on pages, and latent attention.

It plans once for a batch's lengths and then runs in each layer of a model: planning, which reads lengths and page
numbers and decides how the keys are split, is not timed, and ``run`` alone is. Keys that are not in pages are seen as
pages without a copy. At its first plan for a dtype and head_dim it compiles a kernel with nvcc for some minutes, and
keeps it on disk, but not for each length, so it is measured in all cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sigswap.bench.cells import Cell
from sigswap.bench.inputs import Inputs, in_pages
from sigswap.bench.peers.peer import Implementation, Peer, package_module

PACKAGE = "flashinfer-python"

_WORKSPACE_BYTES = 128 * 2**20  # what its documentation recommends; zeros at first
_PAGE_SIZE = 64  # of keys that are not in pages: their split keys begin and end at pages


class _Cache(NamedTuple):
    """Pages of key and value, [pages, page_size, heads, head_dim] if ``layout`` is "NHD", [pages, heads, page_size,
    head_dim] if it is "HND", and which pages a sequence has: ``table`` is int32 [batch, pages of a sequence]."""

    layout: str
    key: Tensor
    value: Tensor
    table: Tensor
    page_size: int


def _build(cell: Cell, inputs: Inputs) -> Implementation:
    planned = _latent if cell.latent else _decode
    run = planned(cell, inputs.query[:, :, 0], _cache(cell, inputs))

    def forward() -> Tensor:
        return run()[:, :, None]

    return Implementation(forward, inputs.leaves, inputs.grad_out)


def _decode(cell: Cell, query: Tensor, cache: _Cache) -> Callable[[], Tensor]:
    module = package_module("flashinfer.decode", PACKAGE)
    on_tensor_cores = cell.heads >= 4 * cell.kv_heads  # SGLang's rule for which of its kernels to take
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(query), cache.layout, use_tensor_cores=on_tensor_cores
    )
    starts, lengths = _starts(cell, cache)
    wrapper.plan(
        starts,
        cache.table.flatten(),
        torch.full_like(lengths, cache.page_size),  # keys in each last page: all pages are full
        cell.heads,
        cell.kv_heads,
        cell.head_dim,
        cache.page_size,
        q_data_type=query.dtype,
        kv_data_type=query.dtype,
    )
    pages = cache.key, cache.value

    def run() -> Tensor:
        out: Tensor = wrapper.run(query, pages)
        return out

    return run


def _latent(cell: Cell, query: Tensor, cache: _Cache) -> Callable[[], Tensor]:
    """By the kernel that the wrapper chooses for the GPU: on Hopper that of FlashAttention-3's kind. Query and key hold
    the channels that are values, too, and behind them the others."""
    module = package_module("flashinfer.mla", PACKAGE)
    wrapper = module.BatchMLAPagedAttentionWrapper(_workspace(query))
    starts, lengths = _starts(cell, cache)
    rows = torch.arange(cell.batch + 1, dtype=torch.int32, device=query.device)
    wrapper.plan(
        metadata=module.MLAPlanMetadata.csr(rows, starts, cache.table.flatten(), lengths),
        num_heads=cell.heads,
        head_dim_ckv=cell.value_dim,
        head_dim_kpe=cell.head_dim - cell.value_dim,
        page_size=cache.page_size,
        causal=False,
        sm_scale=cell.head_dim**-0.5,
        q_data_type=query.dtype,
        kv_data_type=query.dtype,
    )
    pages = cache.key.flatten(1, 2)  # [pages, page_size, head_dim] of the one head

    def run() -> Tensor:
        out: Tensor = wrapper.run(query=query, kv_cache=pages)
        return out

    return run


def _workspace(query: Tensor) -> Tensor:
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=query.device)


def _starts(cell: Cell, cache: _Cache) -> tuple[Tensor, Tensor]:
    """Where each sequence's page numbers begin and end in the flattened table, int32 [batch + 1], and its number of
    keys, int32 [batch]."""
    numbers = torch.arange(cell.batch + 1, dtype=torch.int32, device=cache.table.device)
    return numbers * cache.table.shape[1], torch.full_like(numbers[1:], cell.kv_len)


def _cache(cell: Cell, inputs: Inputs) -> _Cache:
    if cell.page_size is not None:
        pages = in_pages(cell, inputs)
        return _Cache("NHD", pages.key_cache, pages.value_cache, pages.block_table, cell.page_size)
    size = math.gcd(cell.kv_len, _PAGE_SIZE)
    count = cell.kv_len // size
    # A page begins every ``size`` keys of the cache, at those of other heads, too, which are not in the table: the
    # next sequence begins as many pages on as its heads have.
    firsts = torch.arange(cell.batch, device=inputs.key.device)[:, None] * (cell.kv_heads * count)
    table = firsts + torch.arange(count, device=inputs.key.device)
    key, value = (_as_pages(tensor, size) for tensor in (inputs.key, inputs.value))
    return _Cache("HND", key, value, table.to(torch.int32), size)


def _as_pages(tensor: Tensor, size: int) -> Tensor:
    """A view of [batch, heads, length, dim] as [pages, heads, size, dim], in which pages overlap: page p begins at row
    p * size of all batches' and heads' rows, and its head h is h * length rows further on."""
    batch, heads, length, dim = tensor.shape
    row = tensor.stride(2)
    count = ((batch - 1) * heads + 1) * (length // size)
    return tensor.as_strided((count, heads, size, dim), (size * row, length * row, row, 1))


def _why_not(cell: Cell, dtype: torch.dtype) -> str | None:
    if cell.trains:
        return "FlashInfer is measured where each sequence has one query on cached keys."
    if dtype not in (torch.bfloat16, torch.float16):
        return "FlashInfer's kernels need float16 or bfloat16."
    if cell.latent and cell.kv_heads != 1:
        return "FlashInfer's latent attention has one head of keys."
    if not cell.latent and cell.head_dim != cell.value_dim:
        return f"FlashInfer's decoding does not take head_dim {cell.head_dim} with values of {cell.value_dim}."
    return None


FLASHINFER = Peer(
    "flashinfer",
    "FlashInfer's decoding on pages, and its latent attention",
    ("decode", "features"),
    _build,
    package=PACKAGE,
    forward_only=True,
    features=("pages",),
    why_not=_why_not,
)
