"""The tensors of a cell, on which sigswap and all peers run."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor

from sigswap.bench.cells import Cell


class Inputs(NamedTuple):
    """Query, key and value of a cell, and the gradient of the output.

    Each is [batch, heads, length, head_dim]. It is stored as [batch, length, heads, head_dim], as a linear layer writes
    it, or for decoding as [batch, heads, length, head_dim], as a cache is. In the suite varlen it is
    [tokens, heads, head_dim]. Value and ``grad_out`` have value_dim in head_dim's place. ``grad_out`` has the output's
    shape, and is None where there is no backward pass. Of a latent cell value is a view of key. ``mask`` is of the
    kind and shape that ``cell.mask`` says.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor | None
    mask: Tensor | None = None

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What has a gradient."""
        bias = () if self.mask is None or not self.mask.requires_grad else (self.mask,)
        return (*self.qkv, *bias)


def make_inputs(cell: Cell, dtype: torch.dtype, device: str) -> Inputs:
    """Normally distributed, the same in each run."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int, length: int, dim: int) -> Tensor:
        if cell.lengths:
            shape: tuple[int, ...] = (sum(cell.lengths), heads, dim)
        elif cell.trains:
            shape = (cell.batch, length, heads, dim)
        else:
            shape = (cell.batch, heads, length, dim)
        tensor = torch.randn(shape, dtype=dtype, device=device, generator=generator)
        return tensor.transpose(1, 2) if cell.trains and not cell.lengths else tensor

    query = draw(cell.heads, cell.q_len, cell.head_dim)
    key = draw(cell.kv_heads, cell.kv_len, cell.head_dim)
    value = key[..., : cell.value_dim] if cell.latent else draw(cell.kv_heads, cell.kv_len, cell.value_dim)
    if not cell.trains:
        return Inputs(query, key, value, None)
    grad_out = draw(cell.heads, cell.q_len, cell.value_dim)
    mask = _mask(cell, dtype, device, generator)
    return Inputs(query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), grad_out, mask)


def _mask(cell: Cell, dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensor | None:
    length = cell.kv_len
    if cell.mask is None:
        return None
    if cell.mask == "bias=1,H,N,N":
        bias = torch.randn(1, cell.heads, length, length, dtype=dtype, device=device, generator=generator)
        return bias.requires_grad_()
    if cell.mask == "documents=1,1,N,N":
        documents = document_ids(cell, device)
        return (documents[:, None] == documents)[None, None]
    visible = torch.arange(length, device=device) < padded_lengths(cell, device)[:, None]
    visible = visible[:, None, None, :]
    return visible.expand(-1, -1, length, -1).contiguous() if cell.mask == "padding=B,1,N,N" else visible


def document_ids(cell: Cell, device: torch.device | str) -> Tensor:
    """Of each token, int64 [N]: documents of a 32nd to a quarter of the length, the same in each run."""
    draw = random.Random(cell.kv_len)
    lengths: list[int] = []
    while sum(lengths) < cell.kv_len:
        lengths.append(draw.randint(max(1, cell.kv_len // 32), max(1, cell.kv_len // 4)))
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return documents[: cell.kv_len].to(device)


def padded_lengths(cell: Cell, device: torch.device | str) -> Tensor:
    """How many keys of each sequence are no padding, int64 [batch]: half of them to all, the same in each run."""
    draw = random.Random(cell.batch)
    return torch.tensor([draw.randint((cell.kv_len + 1) // 2, cell.kv_len) for _ in range(cell.batch)], device=device)


def cu_seqlens(cell: Cell, inputs: Inputs) -> Tensor:
    """0 and the end of each sequence in the packed tensors: int32 [batch + 1], on their device."""
    lengths = torch.tensor([0, *cell.lengths], device=inputs.query.device)
    return lengths.cumsum(0).to(torch.int32)


class Pages(NamedTuple):
    """Copies of key and value in pages: key_cache and value_cache are [pages, page_size, heads, head_dim], block_table
    is int32 [batch, pages of a sequence], and cache_seqlens int32 [batch]. Of a latent cell value_cache is a view of
    key_cache."""

    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    cache_seqlens: Tensor


def in_pages(cell: Cell, inputs: Inputs) -> Pages:
    """In random order, the same in each run. ``cell.page_size`` divides the number of keys."""
    assert cell.page_size is not None
    device, count = inputs.key.device, cell.kv_len // cell.page_size
    order = torch.randperm(cell.batch * count, generator=torch.Generator().manual_seed(0)).to(device)

    def cache(tensor: Tensor) -> Tensor:
        """Of [batch, heads, keys, head_dim]: page b of the sequences, one behind the other, becomes page order[b]."""
        heads, dim = tensor.shape[1], tensor.shape[3]
        pages = tensor.transpose(1, 2).reshape(cell.batch * count, -1, heads, dim)
        return torch.empty_like(pages).index_copy_(0, order, pages)

    table = order.view(cell.batch, count).to(torch.int32)
    lengths = torch.full((cell.batch,), cell.kv_len, dtype=torch.int32, device=device)
    key_cache = cache(inputs.key)
    value_cache = key_cache[..., : cell.value_dim] if cell.latent else cache(inputs.value)
    return Pages(key_cache, value_cache, table, lengths)


def padded(cell: Cell, inputs: Inputs) -> Inputs:
    """Copies of the packed tensors as [batch, longest, heads, head_dim], with zeros after each sequence."""
    assert inputs.grad_out is not None
    query, key, value, grad_out = (
        torch.nn.utils.rnn.pad_sequence(list(torch.split(tensor.detach(), list(cell.lengths))), batch_first=True)
        for tensor in (*inputs.qkv, inputs.grad_out)
    )
    return Inputs(query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), grad_out)
