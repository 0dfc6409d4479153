"""Attention under a mask by blocks on a GPU: values and gradients against float64, and the plan of a mask tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import sigswap
from sigswap.kernels.op import mask_blocks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

ROWS = 2048
BOUNDS = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float32: 2e-5}
"""Of the error relative to the largest number."""


def documents(batch: int, heads: int, rows: int, keys: int) -> Tensor:
    ends = torch.tensor([100, 356, 1000, 1024, 1700, max(rows, keys)], device="cuda")
    place = torch.arange(max(rows, keys), device="cuda")
    number = torch.searchsorted(ends, place, right=True)
    return (number[:rows, None] == number[:keys])[None, None]


def at_random(batch: int, heads: int, rows: int, keys: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(3)
    visible = torch.rand(batch, heads, rows, keys, device="cuda", generator=generator) > 0.6
    visible[:, :, 17] = False
    return visible


def padding(batch: int, heads: int, rows: int, keys: int) -> Tensor:
    lengths = torch.tensor([keys - 300 * b - 77 for b in range(batch)], device="cuda")
    visible = torch.arange(keys, device="cuda") < lengths[:, None]
    return visible[:, None, None, :].expand(-1, -1, rows, -1)


def causal(batch: int, heads: int, rows: int, keys: int) -> Tensor:
    return torch.ones(1, 1, rows, keys, dtype=torch.bool, device="cuda").tril(keys - rows)


def by_head(batch: int, heads: int, rows: int, keys: int) -> Tensor:
    place = torch.arange(max(rows, keys), device="cuda")
    windows = torch.tensor([64 << head for head in range(heads)], device="cuda")
    return ((place[:rows, None] - place[:keys]).abs() < windows[:, None, None])[None]


MASKS: dict[str, Callable[[int, int, int, int], Tensor]] = {
    "documents": documents,
    "random": at_random,
    "padding": padding,
    "causal": causal,
    "by head": by_head,
}


def exact(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor | None, row_cap: float | None
) -> Tensor:
    """In float64, with all scores in memory."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    row_bias = -mask.sum(-1, keepdim=True).clamp(min=1).double().log() if bias is None else bias
    scores = query @ key.mT / math.sqrt(query.shape[-1]) + row_bias
    probs = scores.sigmoid() * mask
    if row_cap is not None:
        probs = probs / probs.sum(-1, keepdim=True).clamp(min=row_cap)
    return probs @ value


def assert_right(
    attention: Callable[..., Tensor], mask: Tensor, tensors: list[Tensor], bias: Tensor | None = None, **options: Any
) -> None:
    """Output and gradients, against float64."""
    leaves = [*tensors, *([bias] if bias is not None else [])]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = exact(*wide[:3], mask, wide[3] if bias is not None else None, options.get("row_cap"))
    given = [leaf.detach().requires_grad_() for leaf in leaves]
    out = attention(*given[:3], bias=given[3] if bias is not None else None, **options)
    grad = torch.randn_like(out)
    results = [out, *torch.autograd.grad(out, given, grad)]
    expected = [wanted, *torch.autograd.grad(wanted, wide, grad.double())]
    names = ("output", "query", "key", "value", "bias")
    for name, result, right in zip(names, results, expected, strict=False):
        error = (result.double() - right).abs().max() / right.abs().max()
        assert error < BOUNDS[out.dtype], f"{name}: {float(error):.2e}"


def draw(batch: int, heads: int, kv_heads: int, rows: int, keys: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = (heads, rows), (kv_heads, keys), (kv_heads, keys)
    return [
        torch.randn(batch, n, h, dim, device="cuda", generator=generator).to(dtype).transpose(1, 2) for h, n in shapes
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("bias", ["visible", "rows", "heads"])
def test_values_and_gradients(name: str, dtype: torch.dtype, bias: str) -> None:
    batch, heads, dim = 2, 4, 128 if bias != "heads" else 64
    mask = MASKS[name](batch, heads, ROWS, ROWS)
    shapes = {"rows": (batch, heads, ROWS, 1), "heads": (1, heads, 1, 1)}
    row_bias = torch.randn(shapes[bias], device="cuda") - 6 if bias in shapes else None
    block_mask = sigswap.BlockMask.from_mask(mask)
    tensors = draw(batch, heads, heads, ROWS, ROWS, dim, dtype)

    def attention(*inputs: Tensor, **options: Any) -> Tensor:
        return sigswap.sigmoid_attention(*inputs, block_mask=block_mask, **options)

    assert_right(attention, mask, tensors, row_bias)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("rows", "keys", "dim"), [(2000, 1900, 128), (300, 2048, 80), (1025, 640, 256)])
def test_grouped_heads_and_odd_sizes(name: str, rows: int, keys: int, dim: int) -> None:
    mask = MASKS[name](2, 8, rows, keys)
    tensors = draw(2, 8, 2, rows, keys, dim, torch.bfloat16)
    block_mask = sigswap.BlockMask.from_mask(mask)

    def attention(*inputs: Tensor, **options: Any) -> Tensor:
        return sigswap.sigmoid_attention(*inputs, block_mask=block_mask, enable_gqa=True, **options)

    assert_right(attention, mask, tensors)
    assert_right(attention, mask, tensors, row_cap=0.8)


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_tensor_gets_a_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = MASKS[name](2, 16, ROWS, ROWS)
    if name == "padding":
        mask = mask.contiguous()
    tensors = draw(2, 16, 16, ROWS, ROWS, 64, torch.bfloat16)
    calls = []
    found = mask_blocks._found
    monkeypatch.setattr(mask_blocks, "_found", lambda mask: calls.append(mask) or found(mask))

    def attention(*inputs: Tensor, **options: Any) -> Tensor:
        return sigswap.sigmoid_attention(*inputs, attn_mask=mask, **options)

    for _ in range(3):
        assert_right(attention, mask, tensors)
    assert len(calls) == 1
    blocks = mask_blocks.blocks_of_mask(mask)
    assert torch.equal(sigswap.BlockMask(blocks, ROWS, ROWS).dense().expand_as(mask), mask)
    changed = mask.clone()
    before = attention(*tensors)
    changed.copy_(~mask)
    mask = changed
    assert_right(attention, mask, tensors)
    mask.logical_not_()
    assert torch.equal(attention(*tensors), before)


def test_a_plan_in_a_captured_graph_follows_its_mask() -> None:
    mask = documents(1, 1, ROWS, ROWS).contiguous()
    tensors = draw(1, 16, 16, ROWS, ROWS, 64, torch.bfloat16)
    run = lambda: sigswap.sigmoid_attention(*tensors, attn_mask=mask)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for new in (documents(1, 1, ROWS, ROWS), causal(1, 1, ROWS, ROWS)):
        mask.copy_(new)
        graph.replay()
        assert torch.equal(out, run())


def test_compiled() -> None:
    mask = documents(1, 1, ROWS, ROWS)
    tensors = draw(1, 16, 16, ROWS, ROWS, 128, torch.bfloat16)
    block_mask = sigswap.BlockMask.from_mask(mask)
    compiled = torch.compile(lambda q, k, v, m: sigswap.sigmoid_attention(q, k, v, block_mask=m), fullgraph=True)
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    masked = torch.compile(
        lambda q, k, v, m: sigswap.sigmoid_attention(q, k, v, attn_mask=m), backend=counter, fullgraph=True
    )

    def by_blocks(*inputs: Tensor, **options: Any) -> Tensor:
        return compiled(*inputs, block_mask)

    def by_tensor(*inputs: Tensor, **options: Any) -> Tensor:
        return masked(*inputs, mask)

    assert_right(by_blocks, mask, tensors)
    assert_right(by_tensor, mask, tensors)
    targets = {node.target for module in counter.graphs for node in module.graph.nodes}
    assert torch.ops.sigswap.mask_blocks.default in targets
