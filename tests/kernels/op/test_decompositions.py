"""The ops written out in ATen's, against the definition in float64 and its autograd."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from paged import oracle, paged
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import sigswap
from sigswap.kernels.host.blocks import Blocks, blocks_of
from sigswap.kernels.op.blocks import sigmoid_attention_blocks
from sigswap.kernels.op.mask_blocks import blocks_of_mask

OPS = torch.ops.sigswap
TABLE = sigswap.decompositions()


def definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    *,
    scale: float,
    const_bias: float = 0.0,
    visible_bias: bool = True,
    is_causal: bool = False,
    bottom_right: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    row_cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The output and the rows' sums, score by score."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = scale * torch.einsum("bhmd,bhnd->bhmn", query, key)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    rows, keys = scores.shape[-2:]
    seen = torch.ones(rows, keys, dtype=torch.bool)
    for i, j in itertools.product(range(rows), range(keys)):
        at = i + (keys - rows) * bottom_right
        early, late = 0 <= window_left < at - j, 0 <= window_right < j - at
        seen[i, j] = not (early or late or (is_causal and j > at))
    seen = seen.expand(scores.shape)
    if mask is not None:
        mask = mask.repeat(len(query) // len(mask), 1, 1, 1)
        seen = seen & (mask if mask.dtype == torch.bool else mask > -5000)
        scores = scores if mask.dtype == torch.bool else scores + mask
    number = seen.sum(-1, keepdim=True).clamp(min=1).double().log() if visible_bias else 0.0
    scores = scores + const_bias - number + (0.0 if bias is None else bias)
    probs = torch.sigmoid(scores.masked_fill(~seen, 0.0)) * seen
    sums = probs.sum(-1, keepdim=True)
    out = torch.einsum("bhmn,bhnd->bhmd", probs, value)
    return (out / sums.clamp(min=row_cap) if row_cap else out), sums


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "decoding": {"is_causal": True, "bottom_right": True, "const_bias": -0.5},
    "window": {"window_left": 2, "window_right": 1, "bottom_right": True},
    "soft cap": {"softcap": 1.5},
    "row cap": {"row_cap": 0.8, "visible_bias": False},
}
MASKS = ["none", "padding", "per row", "repeated", "one for all keys", "additive", "additive, per head"]


def mask_of(kind: str) -> Tensor | None:
    if kind == "none":
        return None
    if kind.startswith("additive"):
        mask = torch.randn((1, 4, 5, 7) if kind.endswith("head") else (6, 1, 1, 7), dtype=torch.float64)
        return mask.masked_fill(torch.rand(mask.shape) < 0.2, torch.finfo(torch.float32).min)
    shape = {"padding": (6, 1, 1, 7), "per row": (6, 1, 5, 7), "repeated": (2, 1, 5, 7)}.get(kind, (6, 1, 5, 1))
    mask = torch.rand(shape) > 0.3
    mask[0, :, 0] = False  # a row that sees nothing
    return mask


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", OPTIONS)
def test_dense(options: str, mask: str) -> None:
    chosen = {"scale": 0.4, **OPTIONS[options]}
    query, key = torch.randn(6, 4, 5, 8, dtype=torch.float64), torch.randn(6, 2, 7, 8, dtype=torch.float64)
    value, attn_mask = torch.randn(6, 2, 7, 3, dtype=torch.float64), mask_of(mask)
    for rows in (1, 5):
        bias = torch.randn(1, 4, rows, 1, dtype=torch.float64)
        inputs = [query, key, value, bias, attn_mask]
        needed = [x is not None and x.is_floating_point() for x in inputs]
        leaves = [x.clone().requires_grad_() if need else x for x, need in zip(inputs, needed, strict=True)]  # type: ignore[union-attr]
        expected, sums = definition(*leaves, **chosen)  # type: ignore[arg-type]
        ours = TABLE[OPS.sigmoid_attention_sums.default](*inputs, **chosen)
        torch.testing.assert_close(ours, (expected, sums))
        torch.testing.assert_close(TABLE[OPS.sigmoid_attention.default](*inputs, **chosen), expected)
        if "row_cap" in chosen:
            continue  # autograd undoes the division first
        grad = torch.randn_like(expected)
        grads = TABLE[OPS.sigmoid_attention_backward.default](grad, *inputs, None, needed, **chosen)
        theirs = torch.autograd.grad(expected, [x for x, need in zip(leaves, needed, strict=True) if need], grad)  # type: ignore[arg-type]
        torch.testing.assert_close([x for x, need in zip(grads, needed, strict=True) if need], list(theirs))


def mask_in_blocks(batch: int, heads: int) -> tuple[Tensor, Blocks]:
    """Bool [batch, heads, 140, 300], of 2 by 3 blocks: all three kinds in another order in each, with rows that see
    nothing."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(batch, heads, 140, 300, generator=generator) > 0.6
    for number, part in enumerate(mask.flatten(0, 1)):
        for step, what in ((0, False), (1, True)):
            first = 128 * ((number + step) % 3)
            part[:128, first : first + 128] = what
            first = 128 * ((number - step) % 3)
            part[128:, first : first + 128] = what
    mask[:, :, 3] = False
    return mask, blocks_of(tuple(mask.shape), lambda first, last: mask[:, :, first:last], mask.device)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
@pytest.mark.parametrize("options", ["plain", "soft cap", "row cap"])
def test_under_a_mask_by_blocks(options: str, sizes: tuple[int, int]) -> None:
    chosen = {"scale": 0.4, **OPTIONS[options]}
    query, key = torch.randn(2, 4, 140, 8, dtype=torch.float64), torch.randn(2, 2, 300, 8, dtype=torch.float64)
    value = torch.randn(2, 2, 300, 3, dtype=torch.float64)
    mask, blocks = mask_in_blocks(*sizes)
    for rows in (1, 140):
        bias = torch.randn(1, 4, rows, 1, dtype=torch.float64)
        leaves = [x.clone().requires_grad_() for x in (query, key, value, bias)]
        expected, sums = definition(*leaves, mask.expand(2, -1, -1, -1), **chosen)
        inputs = (query, key, value, bias, *blocks)
        ours = TABLE[OPS.sigmoid_attention_blocks_sums.default](*inputs, **chosen)
        torch.testing.assert_close(ours, (expected, sums))
        torch.testing.assert_close(TABLE[OPS.sigmoid_attention_blocks.default](*inputs, **chosen), expected)
        if "row_cap" in chosen:
            continue  # autograd undoes the division first
        grad = torch.randn_like(expected)
        grads = TABLE[OPS.sigmoid_attention_blocks_backward.default](grad, *inputs, [True] * 4, **chosen)
        torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, grad))


def test_a_mask_by_blocks_that_are_all_full_or_empty() -> None:
    """The bits, of which there is one block at least, are of none of them."""
    query = torch.randn(1, 2, 256, 8, dtype=torch.float64)
    block = torch.arange(256) // 128
    mask = (block[:, None] >= block)[None, None]
    blocks = blocks_of((1, 1, 256, 256), lambda first, last: mask[:, :, first:last], mask.device)
    assert not blocks.row_bits.any()
    out = TABLE[OPS.sigmoid_attention_blocks.default](query, query, query, None, *blocks, scale=0.4)
    torch.testing.assert_close(out, definition(query, query, query, None, mask, scale=0.4)[0])


def test_blocks_of_a_mask_and_what_differentiates_attention_under_them_are_written_out() -> None:
    """mask_blocks, forward and backward with a row cap, by AOTAutograd's table, of symbolic sizes."""

    def run(query: Tensor, mask: Tensor) -> Tensor:
        return sigmoid_attention_blocks(query, query, query, None, blocks_of_mask(mask), scale=0.4, row_cap=0.8)

    def loss_and_grads(query: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        out = run(query, mask)
        return (out, *torch.autograd.grad(out.square().sum(), query))

    def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
        query = torch.randn(batch, 2, length, 8, dtype=torch.float64, requires_grad=True)
        return query, torch.rand(batch, 1, length, length) > 0.3

    graph = make_fx(loss_and_grads, decomposition_table=TABLE, tracing_mode="symbolic")(*inputs(3, 140))
    assert "sigswap" not in graph.code
    query, mask = inputs(2, 270)
    expected, _ = definition(query, query, query, None, mask, scale=0.4, row_cap=0.8)
    (grad,) = torch.autograd.grad(expected.square().sum(), query)
    torch.testing.assert_close(graph(query, mask), (expected, grad))


def test_blocks_of_a_mask_are_written_out_in_exported_programs() -> None:
    class Blocked(torch.nn.Module):
        def forward(self, query: Tensor, mask: Tensor) -> Tensor:
            return sigmoid_attention_blocks(query, query, query, None, blocks_of_mask(mask), scale=0.4)

    query, mask = torch.randn(2, 2, 140, 8, dtype=torch.float64), torch.rand(2, 1, 140, 140) > 0.3
    program = torch.export.export(Blocked(), (query, mask)).run_decompositions(sigswap.decompositions())
    assert "sigswap" not in program.graph_module.code
    expected, _ = definition(query, query, query, None, mask, scale=0.4)
    torch.testing.assert_close(program.module()(query, mask), expected)


@pytest.mark.parametrize("options", ["plain", "decoding", "window"])
def test_packed(options: str) -> None:
    chosen = {"scale": 0.4, **OPTIONS[options]}
    query, key = torch.randn(9, 4, 8, dtype=torch.float64), torch.randn(11, 2, 8, dtype=torch.float64)
    value, bias = torch.randn(11, 2, 3, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    ends_q, ends_k = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 3, 3, 9], [0, 5, 7, 11]))
    leaves = [x.clone().requires_grad_() for x in (query, key, value, bias)]
    parts = []
    for (a, b), (c, d) in zip(itertools.pairwise(ends_q), itertools.pairwise(ends_k), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in (leaves[0][a:b], leaves[1][c:d], leaves[2][c:d]))
        part, _ = definition(q, k, v, leaves[3][a:b].t()[None, :, :, None], None, **chosen)
        parts.append(part[0].transpose(0, 1))
    expected = torch.cat(parts)
    inputs = (query, key, value, bias, ends_q, ends_k, None, 6, 5)
    torch.testing.assert_close(TABLE[OPS.sigmoid_attention_varlen.default](*inputs, **chosen), expected)
    grad = torch.randn_like(expected)
    grads = TABLE[OPS.sigmoid_attention_varlen_backward.default](grad, *inputs, [True] * 4, **chosen)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, grad))


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "row_cap": 0.3}, {"window": (3, 1), "softcap": 1.5}])
def test_paged(options: dict[str, Any]) -> None:
    call, bias = paged([2, 0, 3, 1], [9, 5, 2, 0], page_size=4), torch.randn(6, 4, dtype=torch.float64)
    window = options.get("window", (-1, -1))
    own = {name: value for name, value in options.items() if name != "window"}
    own |= {"window_left": window[0], "window_right": window[1], "visible_bias": False, "scale": 8**-0.5}
    out = TABLE[OPS.sigmoid_attention_paged.default](*call[:3], bias, *call[3:], **own)
    torch.testing.assert_close(out, oracle(call, bias=bias, **options))


def test_paged_without_a_page() -> None:
    call = paged([2, 1], [0, 0], page_size=4)
    empty = call._replace(key_cache=call.key_cache[:0], value_cache=call.value_cache[:0])
    out = TABLE[OPS.sigmoid_attention_paged.default](*empty[:3], None, *empty[3:], scale=0.5, is_causal=True)
    assert out.shape == (3, 4, 8) and (out == 0).all()


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_draws_the_ops_numbers(packed: bool) -> None:
    """Of the op on a CPU, whose numbers are those of the kernels (tests/kernels/test_reference.py)."""
    seed = torch.tensor([12])
    if packed:
        ends = torch.tensor([0, 3, 9], dtype=torch.int32)
        inputs: tuple[Any, ...] = (*(torch.randn(9, 2, 8) for _ in range(3)), None, ends, ends, seed, 7, 6)
        op = OPS.sigmoid_attention_varlen.default
    else:
        inputs, op = (*(torch.randn(2, 3, 5, 8) for _ in range(3)), None, None, seed), OPS.sigmoid_attention.default
    torch.testing.assert_close(TABLE[op](*inputs, scale=0.3, dropout_p=0.4), op(*inputs, scale=0.3, dropout_p=0.4))


@pytest.mark.parametrize("by_blocks", [False, True])
def test_dropout_is_written_out_in_exported_programs(by_blocks: bool) -> None:
    mask = sigswap.BlockMask.from_mask(torch.ones(5, 5).tril().bool()) if by_blocks else None

    class Dropped(torch.nn.Module):
        def forward(self, query: Tensor) -> Tensor:
            return sigswap.sigmoid_attention(query, query, query, dropout_p=0.4, block_mask=mask)

    query = torch.randn(2, 3, 5, 8)
    program = torch.export.export(Dropped(), (query,)).run_decompositions(sigswap.decompositions())
    assert "sigswap" not in program.graph_module.code
    outputs = []
    for call in (program.module(), Dropped()):
        torch.manual_seed(1)
        outputs.append(call(query))
    torch.testing.assert_close(*outputs)


def test_a_nan_in_a_mask_is_none_that_hides() -> None:
    query = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    mask = torch.zeros(1, 1, 1, 3, dtype=torch.float64)
    mask[..., 1] = torch.nan
    assert TABLE[OPS.sigmoid_attention.default](query, query, query, None, mask, scale=0.3).isnan().all()


def test_half_precision_is_computed_in_float32() -> None:
    query, key, value = (torch.randn(1, 2, 40, 16) for _ in range(3))
    low = [x.bfloat16() for x in (query, key, value)]
    out = TABLE[OPS.sigmoid_attention.default](*low, scale=0.25)
    exact, _ = definition(*(x.double() for x in low), None, None, scale=0.25)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, exact.bfloat16())


def test_all_that_differentiates_a_call_is_written_out() -> None:
    """Forward and backward of a call with a row cap, by AOTAutograd's table, of symbolic sizes."""

    def loss_and_grads(query: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        out = sigswap.sigmoid_attention(query, query, query, attn_mask=mask, row_cap=1.0)
        return (out, *torch.autograd.grad(out.square().sum(), query))

    def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, 2, length, 8, requires_grad=True), torch.rand(batch, 1, 1, length) > 0.3

    graph = make_fx(loss_and_grads, decomposition_table=TABLE, tracing_mode="symbolic")(*inputs(3, 5))
    assert "sigswap" not in graph.code
    other = inputs(2, 11)
    torch.testing.assert_close(graph(*other), loss_and_grads(*other))


@pytest.mark.parametrize("cap", [None, 1.0])
def test_the_output_lies_as_the_ops(cap: float | None) -> None:
    """So that a view of it with the heads merged, as in many models, is one in the program, too."""

    class Merged(torch.nn.Module):
        def forward(self, query: Tensor) -> Tensor:
            return sigswap.sigmoid_attention(query, query, query, row_cap=cap).transpose(1, 2).view(2, 5, 24)

    query = torch.randn(2, 3, 5, 8)
    program = torch.export.export(Merged(), (query,)).run_decompositions(sigswap.decompositions())
    assert "sigswap" not in program.graph_module.code
    torch.testing.assert_close(program.module()(query), Merged()(query))


def test_composite_ops_are_written_out_in_exported_programs() -> None:
    class Probabilities(torch.nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return OPS.sigmoid_probs.default(scores)

    scores = torch.randn(2, 3, 5, dtype=torch.float64)
    program = torch.export.export(Probabilities(), (scores,)).run_decompositions(sigswap.decompositions())
    assert "sigswap" not in program.graph_module.code
    torch.testing.assert_close(program.module()(scores), torch.sigmoid(scores - torch.tensor(5.0).double().log()))
