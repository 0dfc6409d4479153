"""Dropout on DTensors: what is dropped, on which rank, in eager and compiled, and its gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from ranks import on_ranks
from torch import Tensor

import sigswap
from sigswap.functional.attention import FirstToken, attend

BATCH, HEADS, TOKENS, RATE = 4, 4, 24, 0.25


def tensors(key_heads: int) -> list[Tensor]:
    """Query, key, and a value by which the output shows each probability."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(BATCH, each, TOKENS, 8, generator=generator) for each in (HEADS, key_heads)]
    return [*made, torch.eye(TOKENS).expand(BATCH, key_heads, TOKENS, TOKENS).contiguous()]


def probabilities(query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
    """In float64, causal, before dropout."""
    key = key.repeat_interleave(HEADS // key.shape[1], 1)
    counts = torch.arange(1, TOKENS + 1, dtype=torch.float64)[:, None]
    scores = query.double() @ key.double().mT / math.sqrt(8) - counts.log() + bias.double()
    return torch.sigmoid(scores).tril()


def check() -> list[Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    mesh, results = init_device_mesh("cpu", (size,)), []
    for axis, key_heads, kept in (
        (0, 4, True),
        (1, 4, True),
        (1, 2, True),
        (1, 1, True),
        (2, 4, False),
        (None, 4, False),
    ):
        whole = tensors(key_heads)
        c_h = torch.linspace(-1, 1, HEADS).view(1, HEADS, 1, 1)
        bias = distribute_tensor(c_h, mesh, [Shard(1) if axis == 1 else Replicate()]).requires_grad_()
        spread = [
            distribute_tensor(each, mesh, [Replicate() if axis is None or each.shape[axis] == 1 else Shard(axis)])
            for each in whole
        ]
        value = spread[2].detach().requires_grad_()

        def run(spread: Any = spread, value: Any = value, bias: Any = bias) -> Any:
            return attend(*spread[:2], value, bias=bias, is_causal=True, dropout_p=RATE, enable_gqa=True)

        torch.manual_seed(7 + rank)
        out = run()
        assert out.placements == ((Shard(axis),) if kept else (Replicate(),)), axis
        found, p = out.full_tensor(), probabilities(whole[0], whole[1], c_h)
        dropped = (found == 0) & (p > 0)
        torch.testing.assert_close(found.double(), torch.where(dropped, 0.0, p / (1 - RATE)), atol=1e-6, rtol=1e-5)
        share = dropped.sum() / (p > 0).sum()  # of 4,800
        assert abs(share - RATE) < 0.03, share
        first, second = dropped.chunk(size, axis)[:2] if kept else (dropped, ~dropped)
        assert not torch.equal(first, second)
        both = float((first & second)[..., -1, :].float().mean())  # independent: RATE squared
        assert not kept or abs(both - RATE**2) < 0.06, both
        gradients = torch.autograd.grad(out.sum(), (value, bias))  # of the same probabilities
        by_key = found.unflatten(1, (key_heads, -1)).sum((2, 3))
        expected = by_key[..., None].expand(-1, -1, -1, TOKENS)
        torch.testing.assert_close(gradients[0].full_tensor(), expected)
        slope = (found.double() * (1 - p)).sum((0, 2, 3)).view_as(c_h)
        torch.testing.assert_close(gradients[1].full_tensor().double(), slope, atol=1e-4, rtol=1e-4)
        results.append(found.tolist() if not kept else [])
        if axis in (1, None) and key_heads == 4:
            torch.manual_seed(7 + rank)
            torch.testing.assert_close(torch.compile(run, backend="aot_eager")().full_tensor(), found)
            torch.manual_seed(7 + rank)
            assert torch.equal(run().full_tensor(), found)
            torch.manual_seed(8 + rank)
            assert not torch.equal(run().full_tensor(), found)
    query, key, value = (distribute_tensor(each, mesh, [Shard(1)]) for each in tensors(HEADS))
    share = distribute_tensor(torch.ones(1, HEADS, 1, 1), mesh, [Shard(1)])
    out = attend(query, key, value, is_causal=True, dropout_p=RATE, first_token=FirstToken(share, None))
    assert out.placements == (Shard(1),) and out.full_tensor().isfinite().all()
    uneven = distribute_tensor(torch.randn(1, 3, TOKENS, 8), mesh, [Shard(1)])
    out = sigswap.sigmoid_attention(uneven, uneven, uneven, dropout_p=RATE)
    assert out.placements == (Replicate(),) and out.shape == uneven.shape
    return results


def test_dropout() -> None:
    first, second = on_ranks(2, check)
    assert first == second  # where each rank has a copy, whatever its own random state
