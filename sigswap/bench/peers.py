"""The implementations that ``sigswap bench`` compares, sigswap's own among them, on a cell's tensors."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sigswap.bench.cells import Cell
from sigswap.functional.attention import sigmoid_attention, sigmoid_attention_varlen


class Inputs(NamedTuple):
    """[batch, heads, length, head_dim], stored as [batch, length, heads, head_dim] but for decoding; varlen:
    [tokens, heads, head_dim]. ``grad_out`` is of query's shape, and None where there is no backward pass."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor | None

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


class Implementation(NamedTuple):
    """``forward`` takes nothing: it holds its inputs. It, and its backward pass, run within ``context()``."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, Tensor, Tensor]
    grad_out: Tensor | None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def make_inputs(cell: Cell, dtype: torch.dtype, device: str) -> Inputs:
    """Normally distributed, the same in each run."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int, length: int) -> Tensor:
        if cell.lengths:
            shape: tuple[int, ...] = (sum(cell.lengths), heads, cell.head_dim)
        elif cell.trains:
            shape = (cell.batch, length, heads, cell.head_dim)
        else:  # as a cache is stored
            shape = (cell.batch, heads, length, cell.head_dim)
        tensor = torch.randn(shape, dtype=dtype, device=device, generator=generator)
        return tensor.transpose(1, 2) if cell.trains and not cell.lengths else tensor

    query, key, value = draw(cell.heads, cell.q_len), *(draw(cell.kv_heads, cell.kv_len) for _ in range(2))
    if not cell.trains:
        return Inputs(query, key, value, None)
    grad_out = draw(cell.heads, cell.q_len)
    return Inputs(query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), grad_out)


def build(name: str, cell: Cell, inputs: Inputs) -> Implementation:
    """The implementation of that name ("sigswap" or a peer); raises whatever it raises where it cannot run."""
    if cell.suite == "varlen":
        return _VARLEN[name](cell, inputs)
    return _DENSE[name](cell, inputs)


def _sigswap(cell: Cell, inputs: Inputs) -> Implementation:
    gqa = cell.heads != cell.kv_heads
    forward = functools.partial(sigmoid_attention, *inputs.leaves, is_causal=cell.causal, enable_gqa=gqa)
    return Implementation(forward, inputs.leaves, inputs.grad_out)


def _sdpa(backend: str | None, cell: Cell, inputs: Inputs) -> Implementation:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    gqa = cell.heads != cell.kv_heads
    forward = functools.partial(F.scaled_dot_product_attention, *inputs.leaves, is_causal=cell.causal, enable_gqa=gqa)
    context = nullcontext if backend is None else functools.partial(sdpa_kernel, getattr(SDPBackend, backend))
    return Implementation(forward, inputs.leaves, inputs.grad_out, context)


def _flex(cell: Cell, inputs: Inputs) -> Implementation:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if cell.causal:
        block_mask = create_block_mask(_is_causal, None, None, cell.q_len, cell.kv_len, device=inputs.query.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = cell.heads != cell.kv_heads
    forward = functools.partial(compiled, *inputs.leaves, block_mask=block_mask, enable_gqa=gqa)
    return Implementation(forward, inputs.leaves, inputs.grad_out, _compiled_backward_can_repeat)


def _is_causal(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
    return row >= key


@contextmanager
def _compiled_backward_can_repeat() -> Iterator[None]:
    """Compiled code may overwrite what forward saved for backward, unless told not to (which can cost it some peak
    memory). It is told per thread, so backward stays in this one."""
    import torch._functorch.config

    with torch._functorch.config.patch(donated_buffer=False), torch.autograd.set_multithreading_enabled(False):
        yield


def _triton_sigmoid(cell: Cell, inputs: Inputs) -> Implementation:
    sigmoid = importlib.import_module("triton_sigmoid").sigmoid_attention
    query, key, value = inputs.leaves

    def forward() -> Tensor:  # of [batch, length, heads, head_dim], as the tensors are stored
        return sigmoid(*(x.transpose(1, 2) for x in (query, key, value)), is_causal=cell.causal).transpose(1, 2)

    return Implementation(forward, inputs.leaves, inputs.grad_out)


def _sigswap_varlen(cell: Cell, inputs: Inputs) -> Implementation:
    ends = _ends(cell, inputs)
    longest = cell.kv_len
    forward = functools.partial(
        sigmoid_attention_varlen, *inputs.leaves, ends, ends, longest, longest, is_causal=cell.causal
    )
    return Implementation(forward, inputs.leaves, inputs.grad_out)


def _fa2_varlen(cell: Cell, inputs: Inputs) -> Implementation:
    from torch.nn.attention.varlen import varlen_attn

    ends = _ends(cell, inputs)
    window = (-1, 0) if cell.causal else (-1, -1)
    forward: Callable[[], Any] = functools.partial(
        varlen_attn, *inputs.leaves, ends, ends, cell.q_len, cell.kv_len, window_size=window
    )
    return Implementation(forward, inputs.leaves, inputs.grad_out)


def _flex_varlen(cell: Cell, inputs: Inputs) -> Implementation:
    """One sequence of all tokens, whose block mask (not timed: a model makes it once) lets documents see themselves."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, total, causal = inputs.query.device, sum(cell.lengths), cell.causal
    documents = torch.arange(cell.batch, device=device).repeat_interleave(torch.tensor(cell.lengths, device=device))

    def visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        same = documents[row] == documents[key]
        return same & (row >= key) if causal else same

    block_mask = create_block_mask(visible, None, None, total, total, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    leaves = inputs.leaves

    def forward() -> Tensor:
        query, key, value = (leaf.transpose(0, 1).unsqueeze(0) for leaf in leaves)
        return compiled(query, key, value, block_mask=block_mask).squeeze(0).transpose(0, 1)

    return Implementation(forward, leaves, inputs.grad_out, _compiled_backward_can_repeat)


def _padded(cell: Cell, inputs: Inputs) -> Implementation:
    """Padding and removing it are not timed. Under a causal mask no token sees the padding after it."""
    leaves, grad_out = _pad(cell, inputs)
    query, key, value = (leaf.transpose(1, 2) for leaf in leaves)
    mask = None
    if not cell.causal:
        at = torch.arange(cell.kv_len, device=query.device)
        mask = (at < torch.tensor(cell.lengths, device=query.device)[:, None])[:, None, None, :]

    def forward() -> Tensor:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=cell.causal)
        return out.transpose(1, 2)

    return Implementation(forward, leaves, grad_out)


def _nested(cell: Cell, inputs: Inputs) -> Implementation:
    offsets = _ends(cell, inputs).long()
    query, key, value = (
        torch.nested.nested_tensor_from_jagged(
            leaf, offsets, min_seqlen=min(cell.lengths), max_seqlen=max(cell.lengths)
        ).transpose(1, 2)
        for leaf in inputs.leaves
    )

    def forward() -> Tensor:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=cell.causal)
        return out.transpose(1, 2).values()

    return Implementation(forward, inputs.leaves, inputs.grad_out)


def _triton_sigmoid_padded(cell: Cell, inputs: Inputs) -> Implementation:
    sigmoid = importlib.import_module("triton_sigmoid").sigmoid_attention_padded
    leaves, grad_out = _pad(cell, inputs)
    lengths = torch.tensor(cell.lengths, dtype=torch.int32, device=inputs.query.device)
    forward = functools.partial(sigmoid, *leaves, lengths, lengths, is_causal=cell.causal)
    return Implementation(forward, leaves, grad_out)


def _ends(cell: Cell, inputs: Inputs) -> Tensor:
    """0 and each sequence's end in the packed tensors, int32 [batch + 1]."""
    lengths = torch.tensor([0, *cell.lengths], device=inputs.query.device)
    return lengths.cumsum(0).to(torch.int32)


def _pad(cell: Cell, inputs: Inputs) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Copies of the leaves and of grad_out as [batch, longest, heads, head_dim], with zeros after each sequence."""
    assert inputs.grad_out is not None
    query, key, value, grad_out = (
        torch.nn.utils.rnn.pad_sequence(list(tensor.detach().split(cell.lengths)), batch_first=True)
        for tensor in (*inputs.leaves, inputs.grad_out)
    )
    return (query.requires_grad_(), key.requires_grad_(), value.requires_grad_()), grad_out


_Builder = Callable[[Cell, Inputs], Implementation]
_DENSE: dict[str, _Builder] = {
    "sigswap": _sigswap,
    "fa2": functools.partial(_sdpa, "FLASH_ATTENTION"),
    "cudnn": functools.partial(_sdpa, "CUDNN_ATTENTION"),
    "efficient": functools.partial(_sdpa, "EFFICIENT_ATTENTION"),
    "sdpa": functools.partial(_sdpa, None),
    "flex": _flex,
    "triton-sigmoid": _triton_sigmoid,
}
_VARLEN: dict[str, _Builder] = {
    "sigswap": _sigswap_varlen,
    "fa2": _fa2_varlen,
    "flex": _flex_varlen,
    "padded": _padded,
    "nested": _nested,
    "triton-sigmoid": _triton_sigmoid_padded,
}
