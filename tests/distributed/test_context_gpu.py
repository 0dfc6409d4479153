"""Attention among ranks on GPUs, over NCCL, with the kernels of long sequences: against one GPU in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor

import sigswap

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

HEADS, TOKENS, DIM = 4, 4096, 64
CASES: list[dict[str, Any]] = [
    {},
    {"key_heads": 2, "cap": 0.5},
    {"causal": False},
    {"bias": True},
    {"window": (300, 0)},
]
TOLERANCES = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


def oracle(tensors: list[Tensor], case: dict[str, Any]) -> Tensor:
    query, key, value, *bias = tensors
    group = HEADS // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    position = torch.arange(TOKENS, device=query.device)
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=query.device)
    if case.get("causal", True):
        seen = seen & (position <= position[:, None])
    if "window" in case:
        seen = seen & (position >= position[:, None] - case["window"][0])
    scores = query @ key.mT / math.sqrt(DIM)
    p = torch.sigmoid(scores + (bias[0] if bias else -seen.sum(-1, keepdim=True).double().log())) * seen
    return p @ value / (p.sum(-1, keepdim=True).clamp(min=case["cap"]) if "cap" in case else 1.0)


def check_on_gpus() -> int:
    torch.cuda.set_device(dist.get_rank())
    group = dist.new_group(backend="nccl", device_id=torch.device("cuda", dist.get_rank()))
    done = 0
    for dtype, form in ((torch.bfloat16, "ring"), (torch.bfloat16, "all_to_all"), (torch.float32, "ring")):
        for case in CASES:
            generator = torch.Generator("cuda").manual_seed(0)
            heads = (HEADS, case.get("key_heads", HEADS), case.get("key_heads", HEADS))
            shapes = [(1, each, TOKENS, DIM) for each in heads] + [(1, HEADS, TOKENS, 1)] * bool(case.get("bias"))
            whole = [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]
            exact = [each.double().requires_grad_() for each in whole]
            expected = oracle(exact, case)
            grad = torch.randn(expected.shape, generator=generator, device="cuda").to(dtype)
            gradients = torch.autograd.grad(expected, exact, grad.double())
            with sigswap.context_parallel(group, form=form) as context:  # type: ignore[arg-type]
                part = [context.shard(each, 2).detach().requires_grad_() for each in whole]
                out = sigswap.sigmoid_attention(
                    *part[:3],
                    bias=part[3] if len(part) > 3 else None,
                    is_causal=case.get("causal", True),
                    window=case.get("window"),
                    row_cap=case.get("cap"),
                    enable_gqa=True,
                )
                found = torch.autograd.grad(out, part, context.shard(grad, 2))
                pairs = [
                    (context.gather(mine, 2), theirs)
                    for mine, theirs in zip((out, *found), (expected, *gradients), strict=True)
                ]
            for number, (mine, theirs) in enumerate(pairs):
                error = float((mine.double() - theirs).norm() / theirs.norm())
                assert error < TOLERANCES[dtype], (dtype, form, case, number, error)
            done += 1
    return done


def test_on_two_gpus() -> None:
    assert on_ranks(2, check_on_gpus)[0] == 3 * len(CASES)
