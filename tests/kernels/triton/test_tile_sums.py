"""Gradients under a mask with rows from scores that are computed once or twice, against float64: on a GPU, or in
Triton's interpreter."""

from __future__ import annotations

import dataclasses
import os
import random
from typing import Any

import pytest
import torch
from in_interpreter import run_interpreted
from torch import Tensor

pytest.importorskip("triton")

from sigswap.kernels.host.problem import Options, Problem
from sigswap.kernels.host.tiles import Tile
from sigswap.kernels.triton import backward, forward

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"

in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter, in a process of its own")

KINDS = ("own", "batch", "heads", "both", "repeated")
"""What the mask is broadcast over: nothing, the batch, heads, both, or half of the batch."""


def random_problem(index: int) -> Problem:
    """The problem number index: sizes, strides and features are drawn from it, and all kinds of masks in turn."""
    draw = random.Random(index)
    torch.manual_seed(index)
    dtype = draw.choice((torch.bfloat16, torch.float16)) if CUDA else draw.choice((torch.float32, torch.float16))
    kind = KINDS[index % len(KINDS)]
    batch, kv_heads, group = 4 if kind == "repeated" else 2, draw.choice((1, 2)), draw.choice((1, 1, 2))
    heads = max(2, kv_heads * group)
    kv_heads = heads // group
    lengths = (50, 128, 197, 256, 1000) if CUDA else (17, 48, 70)
    q_len, kv_len = draw.choice(lengths), draw.choice(lengths)
    dim, value_dim = draw.choice(((64, 64), (40, 64), (128, 128)) if CUDA else ((16, 16), (24, 40)))

    def rows(count: int, length: int, width: int) -> Tensor:
        tensor = torch.randn(batch, length, count, width, device=DEVICE, dtype=dtype)
        return tensor.transpose(1, 2) if draw.random() < 0.5 else tensor.transpose(1, 2).contiguous()

    own_batch = {"own": batch, "heads": batch, "repeated": 2}.get(kind, 1)
    shape = own_batch, 1 if kind in ("heads", "both") else heads, q_len, kv_len
    # Of some the rows are parts of longer ones, which start anywhere.
    in_memory = (*shape[:3], kv_len + 3) if index % 4 == 2 else shape
    mask = torch.randn(in_memory, device=DEVICE)
    mask = torch.where(torch.rand(in_memory, device=DEVICE) > 0.2, mask, -torch.inf).to(dtype)
    mask = mask[..., 1:-2] if index % 4 == 2 else mask
    if draw.random() < 0.3:  # heads last in memory, as T5's
        mask = mask.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    bias = None
    if draw.random() < 0.5:
        bias = torch.randn(1, heads, draw.choice((1, q_len)), 1, device=DEVICE).to(dtype)
    options = Options(
        dim**-0.5,
        const_bias=draw.choice((0.0, -1.0)),
        is_causal=draw.random() < 0.3,
        window_left=draw.choice((-1, -1, 9)),
        softcap=draw.choice((0.0, 0.0, 2.0)),
    )
    query, key, value = rows(heads, q_len, dim), rows(kv_heads, kv_len, dim), rows(kv_heads, kv_len, value_dim)
    needed = True, draw.random() < 0.8, True, bias is not None, True
    grad_out = rows(heads, q_len, value_dim)
    return Problem(query, key, value, bias, mask, None, options, grad_out=grad_out, output_mask=needed)


def straightforward(problem: Problem, dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradients that are needed, by matmul, sigmoid and matmul in dtype."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in problem.inputs]
    query, key, value, bias, mask = leaves
    assert query is not None and key is not None and value is not None and mask is not None
    options, group = problem.options, query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    added = mask.repeat(query.shape[0] // mask.shape[0], 1, 1, 1)
    scores = (query @ k.mT) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    shift, left, right = options.band(query.shape[2], key.shape[2])
    row = torch.arange(query.shape[2], device=DEVICE)[:, None] + shift
    column = torch.arange(key.shape[2], device=DEVICE)
    visible = (added > -5000).expand(scores.shape).clone()
    if left is not None:
        visible &= column >= row - left
    if right is not None:
        visible &= column <= row + right
    row_bias = options.const_bias - visible.sum(-1, keepdim=True).clamp(min=1).to(dtype).log()
    if bias is not None:
        row_bias = row_bias + bias
    out = torch.sigmoid((scores + added).masked_fill(~visible, -torch.inf) + row_bias) @ v
    wanted = [leaf for leaf, need in zip(leaves, problem.output_mask, strict=True) if need]
    assert problem.grad_out is not None
    return [out, *torch.autograd.grad(out, wanted, problem.grad_out.to(dtype))]


def assert_no_worse(problem: Problem, forward_tuning: dict[str, Any], tuning: dict[str, Any]) -> None:
    """Each error is at most 1.1 times that of the straightforward computation in the problem's dtype."""
    given = backward.backward(problem, **tuning)
    assert [grad is not None for grad in given] == list(problem.output_mask)
    results = [forward.forward(problem, **forward_tuning), *(grad for grad in given if grad is not None)]
    theirs, truth = straightforward(problem, problem.query.dtype), straightforward(problem, torch.float64)
    for number, (result, other, exact) in enumerate(zip(results, theirs, truth, strict=True)):
        assert result.dtype == problem.query.dtype
        error, norm = (result.double() - exact).norm().item(), exact.norm().item()
        bound = 1.1 * (other.double() - exact).norm().item() + 2e-6 * norm
        assert error <= bound, (number, error / norm, bound / norm)


@pytest.mark.slow
@pytest.mark.skipif(CUDA or INTERPRETED, reason="a GPU runs the kernels themselves")
@pytest.mark.parametrize("shard", range(5))
def test_in_the_interpreter(shard: int) -> None:
    run_interpreted(__file__, shard)


@in_interpreter
@pytest.mark.parametrize("index", range(20), ids=lambda index: f"{index}-shard{index % 5}")
def test_interpreted(index: int) -> None:
    tuning = {"passes": 1 + index // 5 % 2, "tma": index % 3 == 0}
    assert_no_worse(random_problem(index), {}, tuning)


@in_interpreter
def test_interpreted_programs_own_their_tiles_or_take_turns_shard1() -> None:
    """Eight warps over 128 keys, and rows of tiles that no program of the band gets to."""
    problem = random_problem(0)
    options = problem.options._replace(is_causal=True, window_left=3)
    problem = dataclasses.replace(problem, options=options)
    assert_no_worse(problem, {}, {"passes": 1, "key_tile": Tile(16, 128, 8, 2)})
    assert_no_worse(problem, {}, {"passes": 2, "key_tile": Tile(16, 16, 4, 2)})


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("index", range(40))
def test_random(index: int, passes: int) -> None:
    tuning = {"passes": passes, "tma": index % 3 > 0}
    assert_no_worse(random_problem(index), {}, tuning)


def test_nothing_is_added_in_any_order_where_that_was_asked_for() -> None:
    rows = torch.empty(2, 4, 256, 64, dtype=torch.bfloat16, device="meta")

    def passes(*shape: int) -> tuple[int, int]:
        mask = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        needed = (True, True, True, False, True)
        problem = Problem(rows, rows, rows, None, mask, None, Options(0.1), grad_out=rows, output_mask=needed)
        free = backward.passes_for(problem)
        torch.use_deterministic_algorithms(True)
        try:
            return free, backward.passes_for(problem)
        finally:
            torch.use_deterministic_algorithms(False)

    assert passes(1, 4, 256, 256) == (1, 3)
    assert passes(2, 1, 256, 256) == (1, 3)
    assert passes(2, 4, 256, 256) == (1, 2)
