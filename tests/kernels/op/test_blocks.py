"""The op under a mask by blocks, as an op of PyTorch's: against float64, traced, mapped, checked."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sigswap.errors import ArgumentError, SigswapError
from sigswap.kernels.host.blocks import Blocks, blocks_of
from sigswap.kernels.op.blocks import sigmoid_attention_blocks

OPS = torch.ops.sigswap


def problem(
    dtype: torch.dtype = torch.float64, heads: int = 4, kv_heads: int = 2, mask_shape: tuple[int, int] = (2, 1)
) -> tuple[list[Tensor], Tensor, Tensor, Blocks]:
    """Query, key and value; a row bias; a mask with a row that sees nothing; its blocks."""
    generator = torch.Generator().manual_seed(0)
    rows, keys, dim = 140, 150, 8
    shapes = (heads, rows), (kv_heads, keys), (kv_heads, keys)
    tensors = [torch.randn(2, h, n, dim, dtype=dtype, generator=generator).requires_grad_() for h, n in shapes]
    bias = torch.randn(1, heads, rows, 1, dtype=dtype, generator=generator).requires_grad_()
    mask = torch.rand(*mask_shape, rows, keys, generator=generator) > 0.5
    mask[:, :, 3] = False
    mask[:, :, 128:, :128] = True
    blocks = blocks_of(tuple(mask.shape), lambda first, last: mask[:, :, first:last], mask.device)
    return tensors, bias, mask, blocks


def exact(
    tensors: list[Tensor], bias: Tensor | None, mask: Tensor, row_cap: float = 0.0, softcap: float = 0.0
) -> Tensor:
    query, key, value = tensors
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).mT / math.sqrt(query.shape[-1])
    if softcap > 0.0:
        scores = softcap * (scores / softcap).tanh()
    scores = scores - mask.sum(-1, keepdim=True).clamp(min=1).to(query.dtype).log()
    probs = torch.where(mask, (scores if bias is None else scores + bias).sigmoid(), 0.0)
    if row_cap > 0.0:
        probs = probs / probs.sum(-1, keepdim=True).clamp(min=row_cap)
    return probs @ value.repeat_interleave(group, 1)


@pytest.mark.parametrize("options", [{}, {"row_cap": 0.7}, {"softcap": 1.5}], ids=str)
@pytest.mark.parametrize("mask_shape", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
def test_against_float64(options: dict[str, float], mask_shape: tuple[int, int]) -> None:
    tensors, bias, mask, blocks = problem(mask_shape=mask_shape)
    out = sigmoid_attention_blocks(*tensors, bias, blocks, scale=8**-0.5, **options)
    wanted = exact(tensors, bias, mask, **options)
    grad = torch.randn_like(out)
    torch.testing.assert_close(out, wanted)
    found, right = (torch.autograd.grad(each, [*tensors, bias], grad) for each in (out, wanted))
    for each, expected in zip(found, right, strict=True):
        torch.testing.assert_close(each, expected)


@pytest.mark.parametrize("sums", [False, True])
def test_opcheck(sums: bool) -> None:
    tensors, bias, _, blocks = problem(torch.float32)
    op = OPS.sigmoid_attention_blocks_sums if sums else OPS.sigmoid_attention_blocks
    torch.library.opcheck(op.default, (*tensors, bias, *blocks), {"scale": 0.3, "row_cap": 0.5 if sums else 0.0})
    out = torch.ones(2, 4, 140, 8)
    given = [each.detach() for each in tensors]
    inputs = (out, *given, bias.detach(), *blocks, [True, False, True, True])
    torch.library.opcheck(OPS.sigmoid_attention_blocks_backward.default, inputs, {"scale": 0.3})


def test_gradcheck() -> None:
    tensors, bias, _, blocks = problem()
    small = [each.detach()[:, :, :, :2].requires_grad_() for each in tensors]

    def run(*inputs: Tensor) -> Tensor:
        return sigmoid_attention_blocks(*inputs, blocks, scale=0.7, row_cap=0.4)

    assert torch.autograd.gradcheck(run, (*small, bias), fast_mode=True)


def test_compiled_without_graph_breaks() -> None:
    tensors, bias, mask, blocks = problem()

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, blocks: Blocks) -> Tensor:
        return 2 * sigmoid_attention_blocks(query, key, value, bias, blocks, scale=8**-0.5, row_cap=0.5)

    out = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors, bias, blocks)
    wanted = 2 * exact(tensors, bias, mask, row_cap=0.5)
    torch.testing.assert_close(out, wanted)
    found, right = (torch.autograd.grad(each.square().sum(), [*tensors, bias]) for each in (out, wanted))
    for each, expected in zip(found, right, strict=True):
        torch.testing.assert_close(each, expected)


def test_vmap_over_queries() -> None:
    (query, key, value), _, mask, blocks = problem()
    queries = torch.stack((query, query + 1))

    def run(query: Tensor) -> Tensor:
        return sigmoid_attention_blocks(query, key, value, None, blocks, scale=8**-0.5)

    wanted = torch.stack([exact([each, key, value], None, mask) for each in queries])
    torch.testing.assert_close(torch.vmap(run)(queries), wanted)


def test_autocast_casts_query_key_and_value() -> None:
    tensors, bias, mask, blocks = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = sigmoid_attention_blocks(*tensors, bias, blocks, scale=8**-0.5)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact(tensors, bias, mask), atol=0.02, rtol=0.02)


def test_flops_are_those_of_all_scores() -> None:
    tensors, _, _, blocks = problem()
    with FlopCounterMode(display=False) as counter:
        sigmoid_attention_blocks(*tensors, None, blocks, scale=1.0).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 4 * 140 * 150 * (2 * 8 + 5 * 8)


def test_there_is_no_second_derivative() -> None:
    tensors, _, _, blocks = problem()
    out = sigmoid_attention_blocks(*tensors, None, blocks, scale=1.0).square().sum()
    (grad,) = torch.autograd.grad(out, tensors[0], create_graph=True)
    with pytest.raises(SigswapError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"visible": lambda each: each[:, :, :-1].contiguous()}, r"visible of a mask by blocks must be"),
        ({"rows": lambda each: each[:, :, :1].contiguous()}, r"rows of a mask by blocks must be"),
        ({"keys": lambda each: each.repeat(3, 1, 1, 1)}, r"keys of a mask by blocks must be \['1\|2'"),
        ({"row_bits": lambda each: each.long()}, r"row_bits of a mask by blocks must be int32"),
        ({"key_bits": lambda each: each[..., :2].contiguous()}, r"key_bits of a mask by blocks must be"),
    ],
)
def test_wrong_blocks(changes: dict[str, Any], said: str) -> None:
    tensors, _, _, blocks = problem()
    wrong = blocks._replace(**{name: change(getattr(blocks, name)) for name, change in changes.items()})
    with pytest.raises(ArgumentError, match=said):
        sigmoid_attention_blocks(*tensors, None, wrong, scale=1.0)


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"window_left": 3}, {"window_right": 0}, {"dropout_p": 0.1}], ids=str
)
def test_what_goes_with_no_blocks(options: dict[str, Any]) -> None:
    tensors, _, _, blocks = problem()
    seed = {"is_causal": "no is_causal", "window_left": "no window", "window_right": "no window"}
    with pytest.raises(ArgumentError, match=seed.get(next(iter(options)), "seed|dropout_p")):
        OPS.sigmoid_attention_blocks(*tensors, None, *blocks, scale=1.0, **options)
