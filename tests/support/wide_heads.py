"""Attention of wide heads in float64, and a bound for what kernels compute of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from sigswap.kernels.host.problem import Problem
from sigswap.kernels.host.results import empty_row_sums


def straightforward(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and the rows' sums of probabilities, by matmul, sigmoid and matmul, in dtype throughout; a sequence at a
    time, which takes less memory."""
    given = problem.query, problem.key, problem.value, problem.bias, problem.attn_mask
    results = []
    for b in range(len(problem.query)):
        query, key, value, bias, mask = (x if x is None or len(x) == 1 else x[b % len(x)][None] for x in given)
        one = dataclasses.replace(problem, query=query, key=key, value=value, bias=bias, attn_mask=mask)
        results.append(_of_one(one, dtype))
    outs, sums = zip(*results, strict=True)
    return torch.cat(outs), torch.cat(sums)


def _of_one(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    options, mask = problem.options, problem.attn_mask
    group = problem.query.shape[1] // problem.key.shape[1]
    query = problem.query.to(dtype)
    key, value = (each.to(dtype).repeat_interleave(group, 1) for each in (problem.key, problem.value))
    scores = query @ key.mT * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    shift, left, right = options.band(query.shape[2], key.shape[2])
    distance = (
        torch.arange(key.shape[2], device=scores.device)
        - torch.arange(query.shape[2], device=scores.device)[:, None]
        - shift
    )
    visible = torch.ones_like(scores, dtype=torch.bool)
    if left is not None:
        visible &= distance >= -left
    if right is not None:
        visible &= distance <= right
    if mask is not None and mask.dtype == torch.bool:
        visible &= mask
    elif mask is not None:
        visible &= mask > -5000
        scores = scores + mask.to(dtype)
    row_bias: float | Tensor = options.const_bias
    if options.visible_bias:
        row_bias = row_bias - visible.sum(-1, keepdim=True).clamp(min=1).to(dtype).log()
    if problem.bias is not None:
        row_bias = row_bias + problem.bias.to(dtype)
    p = torch.sigmoid(scores.masked_fill(~visible, -torch.inf) + row_bias)
    sums = p.sum(-1, keepdim=True)
    return (p @ value / sums.clamp(min=options.row_cap) if options.row_cap else p @ value), sums


def assert_no_worse(out: Tensor, problem: Problem) -> None:
    (exact, _), (naive, _) = (straightforward(problem, dtype) for dtype in (torch.float64, out.dtype))
    assert out.shape == exact.shape and out.dtype == problem.query.dtype
    assert (out[exact == 0] == 0).all()  # rows that see no key
    norm, eps = exact.norm().item(), torch.finfo(out.dtype).eps
    # The error of few probabilities is a matter of luck: all columns of the output have it.
    ratio = 1.1 if out.shape[:3].numel() * problem.key.shape[2] >= 2000 else 2.0
    # With a row cap it may be one rounding more: p is summed before it is rounded.
    allowed = ratio * (naive.double() - exact).norm().item() + (1.5e-6 + eps / 2 * bool(problem.options.row_cap)) * norm
    error = (out.double() - exact).norm().item()
    # Where the naive one overflows to NaN, ours need not.
    assert error <= allowed + 1e-12 or (math.isnan(allowed) and error <= 1e-2 * norm), (error / norm, allowed / norm)


def assert_forward_no_worse(forward: Callable[[Problem], Tensor], problem: Problem) -> None:
    """Its output, with and without the rows' sums of probabilities, and these."""
    out = forward(problem)
    assert_no_worse(out, problem)
    row_sums = empty_row_sums(problem.query).fill_(torch.nan)
    assert torch.equal(forward(dataclasses.replace(problem, row_sums=row_sums)), out)
    _, exact = straightforward(problem, torch.float64)
    assert (row_sums - exact).norm() <= (2e-2 if out.dtype == torch.bfloat16 else 2e-3) * exact.norm()
