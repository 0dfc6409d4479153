"""The attention ops on DTensors: results, gradients and placements, against one process in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor

import sigswap
from sigswap.errors import ArgumentError

BATCH, HEADS, ROWS, KEYS, DIM = 4, 4, 5, 6, 8


def oracle(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, cap: float) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT / math.sqrt(DIM)
    scores = scores - math.log(KEYS) if bias is None else scores + bias
    p = torch.sigmoid(scores if mask is None else scores + mask)
    return p @ value / (p.sum(-1, keepdim=True).clamp(min=cap) if cap else 1.0)


def tensors(key_heads: int, bias: tuple[int, ...] | None, mask: tuple[int, ...] | None) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, HEADS, ROWS, DIM), (BATCH, key_heads, KEYS, DIM), (BATCH, key_heads, KEYS, DIM), bias, mask]
    made = [None if shape is None else torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [None if each is None else each.requires_grad_() for each in made]


CASES: list[dict[str, Any]] = [
    {"axis": axis, "key_heads": key_heads, "bias": bias, "mask": mask, "cap": cap}
    for axis in (None, 0, 1, 2)
    for key_heads, bias, mask, cap in [
        (HEADS, None, None, 0.0),
        (HEADS, (BATCH, HEADS, ROWS, 1), (1, HEADS, ROWS, KEYS), 0.0),
        (2, (1, HEADS, 1, 1), (BATCH, 1, ROWS, KEYS), 0.5),
        (1, (1, 1, 1, 1), (1, 1, ROWS, KEYS), 0.0),
    ]
]
KEPT = {0: (4, 2, 1), 1: (4, 2), 2: (), None: ()}
"""By the axis that query, key and value come sharded along, the numbers of key heads with which the output stays so."""


def check_values() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for case in CASES:
        single = tensors(case["key_heads"], case["bias"], case["mask"])
        expected = oracle(*single, case["cap"])
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        given = [each for each in single if each is not None]
        gradients = torch.autograd.grad((expected * weight).sum(), given)

        def spread(tensor: Tensor | None, axis: int | None) -> Any:
            if tensor is None:
                return None
            long = axis is not None and tensor.shape[axis] > 1
            return distribute_tensor(tensor.detach(), mesh, [Shard(axis) if long else Replicate()]).requires_grad_()

        query, key, value, bias, mask = (spread(each, case["axis"]) for each in single)
        out = sigswap.sigmoid_attention(
            query, key, value, bias=bias, attn_mask=mask, enable_gqa=True, row_cap=case["cap"] or None
        )
        kept = case["key_heads"] in KEPT[case["axis"]]
        assert out.placements == (Shard(case["axis"]) if kept else Replicate(),), case
        torch.testing.assert_close(out.full_tensor(), expected)
        own = [each for each in (query, key, value, bias, mask) if each is not None]
        found = torch.autograd.grad(out, own, grad_outputs=distribute_tensor(weight, mesh, out.placements))
        for mine, gradient in zip(found, gradients, strict=True):
            torch.testing.assert_close(mine.full_tensor(), gradient)
    with pytest.raises(ArgumentError, match="dropout_p"):
        sigswap.sigmoid_attention(query, key, value, enable_gqa=True, dropout_p=0.5)


def test_values() -> None:
    on_ranks(2, check_values)
