"""The kernels under a mask by blocks in Triton's interpreter, against float64; test_block_mask_gpu.py has a GPU's.

The bound is the error of the straightforward PyTorch computation in the same dtype.
"""

from __future__ import annotations

import dataclasses
import os
import random

import pytest
import torch
from in_interpreter import run_interpreted
from torch import Tensor

pytest.importorskip("triton")

from sigswap.kernels.host.blocks import all_blocks_of, blocks_of, dense_mask
from sigswap.kernels.host.problem import Options, Problem
from sigswap.kernels.host.results import empty_row_sums
from sigswap.kernels.host.tiles import Tile
from sigswap.kernels.triton import block_backward, block_forward
from sigswap.kernels.triton.block_plan import blocks_of_mask

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter, in a process of its own")


@pytest.mark.slow
@pytest.mark.skipif(CUDA or INTERPRETED, reason="a GPU runs the kernels themselves")
@pytest.mark.parametrize("shard", range(8))
def test_in_the_interpreter(shard: int) -> None:
    run_interpreted(__file__, shard)


def random_problem(index: int) -> tuple[Problem, Tensor]:
    """The problem number index, and its mask."""
    draw = random.Random(index)
    torch.manual_seed(index)
    dtype = draw.choice((torch.float32, torch.float16))
    batch, kv_heads, group = draw.choice((1, 2)), draw.choice((1, 2)), draw.choice((1, 2))
    heads, dim = kv_heads * group, draw.choice((16, 24, 40))
    q_len, kv_len = draw.choice((5, 130, 200, 257)), draw.choice((17, 130, 256, 300))
    shape = draw.choice((1, batch)), draw.choice((1, heads)), q_len, kv_len
    kind = draw.choice(("documents", "random", "band", "nothing"))
    if kind == "documents":
        number = torch.arange(max(q_len, kv_len)) // draw.choice((40, 128, 150))
        mask = (number[:q_len, None] == number[:kv_len]).expand(shape)
    elif kind == "band":
        mask = torch.ones(shape, dtype=torch.bool).tril(draw.choice((0, 100)))
    else:
        mask = torch.rand(shape) > (0.5 if kind == "random" else 1.0)
    mask = mask.clone()
    mask[:, :, q_len // 2] = False
    row_cap = draw.choice((0.0, 0.0, 0.6))
    options = Options(
        dim**-0.5,
        const_bias=draw.choice((0.0, -2.0)),
        visible_bias=draw.random() < 0.6,
        softcap=draw.choice((0.0, 0.0, 2.0)),
        row_cap=row_cap,
    )
    bias = torch.randn(*(draw.choice((1, size)) for size in (batch, heads, q_len)), 1) if draw.random() < 0.5 else None

    def rows(count: int, length: int) -> Tensor:
        return torch.randn(batch, length, count, dim).to(dtype).transpose(1, 2)

    query, key, value, grad_out = rows(heads, q_len), rows(kv_heads, kv_len), rows(kv_heads, kv_len), rows(heads, q_len)
    found = blocks_of(shape, lambda first, last: mask[:, :, first:last], mask.device)
    problem = Problem(query, key, value, bias, None, None, options, blocks=found, grad_out=grad_out)
    problem.output_mask = (True, True, True, bias is not None, False)
    if row_cap > 0.0:
        problem.row_delta = torch.randn(batch, heads, q_len, 1)
    return problem, mask


def straightforward(problem: Problem, mask: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output, rows' sums, and gradients, of which those below a row cap are of the sums that it divides."""
    options, group = problem.options, problem.query.shape[1] // problem.key.shape[1]
    leaves = [None if x is None else x.to(dtype).requires_grad_() for x in problem.inputs[:4]]
    query, key, value, bias = leaves
    assert query is not None and key is not None and value is not None and problem.grad_out is not None
    keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ keys.mT * options.scale
    if options.softcap > 0.0:
        scores = options.softcap * (scores / options.softcap).tanh()
    row_bias = scores.new_full((), options.const_bias)
    if options.visible_bias:
        row_bias = row_bias - mask.sum(-1, keepdim=True).clamp(min=1).to(dtype).log()
    scores = scores + row_bias + (0.0 if bias is None else bias)
    probs = torch.where(mask, scores.sigmoid(), 0.0)
    sums = probs.sum(-1, keepdim=True)
    out = probs @ values
    grad_out = problem.grad_out.to(dtype)
    loss = (out * grad_out).sum()
    if problem.row_delta is not None:
        loss = loss - (sums * problem.row_delta.to(dtype)).sum()
    grads = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])
    capped = out / sums.clamp(min=options.row_cap) if options.row_cap > 0.0 else out
    return [capped.detach(), sums.detach(), *grads]


def assert_no_worse(results: list[Tensor], problem: Problem, mask: Tensor) -> None:
    exact, plain = (straightforward(problem, mask, dtype) for dtype in (torch.float64, problem.query.dtype))
    for number, (result, right, other) in enumerate(zip(results, exact, plain, strict=True)):
        error, bound = (result.double() - right).abs().max(), (other.double() - right).abs().max()
        assert error <= 2 * bound + 1e-5 * right.abs().max() + 1e-6, (number, float(error), float(bound))


@in_interpreter
@pytest.mark.parametrize("index", range(8), ids=lambda index: f"{index}-shard{index % 8}")
def test_interpreted(index: int) -> None:
    problem, mask = random_problem(index)
    draw = random.Random(index)
    tiles = [Tile(draw.choice((16, 64, 128)), draw.choice((16, 32, 64, 128)), 4, 2) for _ in range(3)]
    tma = index % 2 == 0 and problem.query.shape[3] % 8 == 0
    forward = dataclasses.replace(problem, grad_out=None, row_sums=empty_row_sums(problem.query))
    span = draw.choice((1, 3, 100))
    out = block_forward.forward(forward, tile=tiles[0], tma=tma, span=span)
    grads = block_backward.backward(problem, block_backward.Tuning(*tiles[1:], tma, span, span))
    assert forward.row_sums is not None
    results = [out, forward.row_sums, *(grad for grad in grads if grad is not None)]
    assert_no_worse(results, problem, mask)


@in_interpreter
def test_interpreted_keys_that_are_not_seen_may_hold_anything_shard0() -> None:
    problem, mask = random_problem(1)
    hidden = torch.arange(mask.shape[3]) % 7 < 3
    mask = mask & ~hidden
    problem.blocks = blocks_of(tuple(mask.shape), lambda first, last: mask[:, :, first:last], mask.device)
    out = block_forward.forward(dataclasses.replace(problem, grad_out=None))
    key = problem.key.clone()
    key[:, :, hidden] = torch.nan
    assert torch.equal(block_forward.forward(dataclasses.replace(problem, key=key, grad_out=None)), out)


@in_interpreter
@pytest.mark.parametrize("index", range(4), ids=lambda index: f"{index}-shard{index % 4}")
def test_interpreted_plan(index: int) -> None:
    torch.manual_seed(index)
    mask = [
        torch.rand(2, 1, 300, 270) > 0.5,
        (torch.arange(500) // 200)[:, None].eq(torch.arange(500) // 200).expand(1, 2, 500, 500),
        (torch.rand(1, 300, 2, 500) > 0.9).permute(0, 2, 3, 1),
        torch.ones(1, 1, 200, 1000, dtype=torch.bool).tril(),
    ][index]
    found, wanted = blocks_of_mask(mask), all_blocks_of(mask)
    q_len, kv_len = mask.shape[2:]
    assert torch.equal(dense_mask(found, q_len, kv_len), mask)
    assert torch.equal(found.visible, wanted.visible)
    assert torch.equal(found.rows, wanted.rows) and torch.equal(found.keys, wanted.keys)
    turned = found._replace(rows=found.keys, keys=found.rows, row_bits=found.key_bits, key_bits=found.row_bits)
    assert torch.equal(dense_mask(turned, kv_len, q_len), mask.mT)
