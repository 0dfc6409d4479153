"""What is counted as sent; and that the ring of sigmoid attention sends less than PyTorch's of softmax attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor

import sigswap
from sigswap.bench.distributed.cost import Attention
from sigswap.bench.distributed.softmax_ring import causal_attention_on_cpu
from sigswap.bench.distributed.traffic import Traffic, silenced

BATCH, HEADS, TOKENS, DIM = 2, 4, 32, 8


def parts(context: sigswap.ContextParallel, dtype: torch.dtype = torch.float32, key_heads: int = HEADS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, heads, TOKENS, DIM) for heads in (HEADS, key_heads, key_heads, HEADS)]
    whole = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [context.shard(each, 2).contiguous().requires_grad_() for each in whole]


def sent(attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> list[int]:
    """Forward and backward, by all ranks."""
    with Traffic() as forward:
        out = attention(query, key, value)
    with Traffic() as backward:
        torch.autograd.grad(out, (query, key, value), grad)
    total = torch.tensor([forward.sent, backward.sent])
    dist.all_reduce(total)
    return [int(each) for each in total]


def check_rings() -> dict[str, list[int]]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with sigswap.context_parallel(mesh, form="ring") as context:
            tensors = parts(context, dtype)
            sigswap.sigmoid_attention(*qkv_of(tensors))  # ranks agree at the first attention
            found[f"sigmoid {name}"] = sent(causal_sigmoid, *tensors)
            grouped = parts(context, dtype, 2)
            found[f"sigmoid {name} grouped"] = sent(causal_sigmoid, *grouped)
        found[f"softmax {name}"] = sent(lambda *qkv: causal_attention_on_cpu(*qkv, mesh), *tensors)
    with sigswap.context_parallel(mesh, form="all_to_all") as context:
        tensors = parts(context)
        sigswap.sigmoid_attention(*qkv_of(tensors))
        found["all_to_all fp32"] = sent(causal_sigmoid, *tensors)
        with silenced():
            assert sent(causal_sigmoid, *tensors)[0] == 0
    return found


def qkv_of(tensors: list[Tensor]) -> list[Tensor]:
    return tensors[:3]


def causal_sigmoid(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return sigswap.sigmoid_attention(query, key, value, is_causal=True, enable_gqa=True)


def test_the_ring_sends_less_than_softmax() -> None:
    found = on_ranks(2, check_rings)[0]
    keys = BATCH * HEADS * TOKENS * DIM  # of all ranks, and as many values
    for name, size in (("fp32", 4), ("bf16", 2)):
        ours, theirs = found[f"sigmoid {name}"], found[f"softmax {name}"]
        # Each key and value goes to the other rank, but for the last chunk's, which no row there sees; the same and the
        # gradients in the backward.
        assert ours == [0.75 * 2 * keys * size, 2 * 0.75 * 2 * keys * size]
        assert found[f"sigmoid {name} grouped"] == [bytes_ / 2 for bytes_ in ours]
        # All keys and values go to the other rank; their gradients go all round, in float32.
        assert theirs == [2 * keys * size, 2 * keys * size + 2 * 2 * keys * 4]
    assert found["all_to_all fp32"] == [4 * keys * 4 / 2, 4 * keys * 4 / 2]
    # The model of cost knows what was counted.
    for name, element in (("fp32", 4), ("bf16", 2)):
        cost = Attention(TOKENS, 2, HEADS, HEADS, DIM, element, BATCH)
        grouped = Attention(TOKENS, 2, HEADS, 2, DIM, element, BATCH)
        assert [2 * sent for sent in cost.ring()] == found[f"sigmoid {name}"]
        assert [2 * sent for sent in grouped.ring()] == found[f"sigmoid {name} grouped"]
        assert [2 * sent for sent in cost.softmax_ring()] == found[f"softmax {name}"]
    cost = Attention(TOKENS, 2, HEADS, HEADS, DIM, 4, BATCH)
    assert [2 * sent for sent in cost.all_to_all()] == found["all_to_all fp32"]
