"""The attention ops on DTensors: results, gradients and placements, against one process in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from ranks import on_ranks
from torch import Tensor

import sigswap

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
"""By the axis that query, key and value come sharded along, the numbers of key heads with which the output stays so.
Along the sequence it may become a sum over the ranks."""


def check_values() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

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
        if case["axis"] == 2:
            assert out.placements in ((Shard(2),), (Partial(),)), case
        else:
            assert out.placements == (Shard(case["axis"]) if kept else Replicate(),), case
        torch.testing.assert_close(out.full_tensor(), expected)
        own = [each for each in (query, key, value, bias, mask) if each is not None]
        placements = [Replicate() if out.placements == (Partial(),) else out.placements[0]]
        found = torch.autograd.grad(out, own, grad_outputs=distribute_tensor(weight, mesh, placements))
        for mine, gradient in zip(found, gradients, strict=True):
            torch.testing.assert_close(mine.full_tensor(), gradient)


def test_values() -> None:
    on_ranks(2, check_values)


def check_numbers() -> list[Any]:
    """The same shapes one after the other with other options, and other needs of gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(BATCH, HEADS, KEYS, DIM, generator=generator, dtype=torch.float64) for _ in range(3)]
    found: list[Any] = []
    for axis, bias, needs, causal in [
        (2, -1.0, (True, False, False), False),
        (2, -1.0, (True, True, True), False),
        (2, -1.0, (True, True, True), True),
        (2, None, (True, True, True), False),
        (0, None, (False, True, False), False),
        (0, None, (True, True, True), False),
        (0, None, (True, True, True), True),
    ]:
        single = [each.clone().requires_grad_(need) for each, need in zip(whole, needs, strict=True)]
        seen = torch.ones(KEYS, KEYS, dtype=torch.bool)
        seen = seen.tril() if causal else seen
        scores = single[0] @ single[1].mT / math.sqrt(DIM) + (bias or -seen.sum(-1, keepdim=True).double().log())
        expected = (torch.sigmoid(scores) * seen) @ single[2]
        expected.square().sum().backward()
        spread = [
            distribute_tensor(each, mesh, [Shard(axis)]).requires_grad_(need)
            for each, need in zip(whole, needs, strict=True)
        ]
        out = sigswap.sigmoid_attention(*spread, bias=bias, is_causal=causal)
        found.append(repr(out.placements[0]))  # type: ignore[attr-defined]
        torch.testing.assert_close(out.full_tensor(), expected.detach())  # type: ignore[attr-defined]
        out.square().sum().backward()
        for mine, theirs in zip(spread, single, strict=True):
            assert (mine.grad is None) == (theirs.grad is None)
            if mine.grad is not None:
                torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad)
    return found


def test_numbers() -> None:
    found = on_ranks(2, check_numbers)[0]
    # Keys that are sharded with the rows make sums where nothing is to be known of all keys, and no positions.
    assert "Partial" in found[0] and "Partial" in found[1]
    assert found[2] == "Replicate()" and found[3] == "Shard(dim=2)"
    assert set(found[4:]) == {"Shard(dim=0)"}
