"""The Triton kernels against float64, over random combinations of features: on a GPU, or in Triton's interpreter.

The bound is the error of the straightforward PyTorch computation in the same dtype.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import weakref
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from in_interpreter import run_interpreted
from torch import Tensor

from sigswap.functional.attention import sigmoid_attention
from sigswap.kernels import reference

pytest.importorskip("triton")

from sigswap.kernels import dispatch
from sigswap.kernels.hopper import backward as hopper_bwd
from sigswap.kernels.hopper import backward_wide as hopper_bwd_wide
from sigswap.kernels.hopper import forward as hopper_fwd
from sigswap.kernels.hopper import forward_items
from sigswap.kernels.host import problem as problems
from sigswap.kernels.host.layout import layout_of, output_layout, readable_mask
from sigswap.kernels.host.problem import Options, Packed, Problem
from sigswap.kernels.host.results import empty_row_sums
from sigswap.kernels.op import registration, repeated
from sigswap.kernels.triton import backward as flash_bwd
from sigswap.kernels.triton import decode, row_caps, short_masked, split_keys, sums
from sigswap.kernels.triton import forward as flash_fwd
from sigswap.kernels.triton.dropout import draws_for

CUDA = torch.cuda.is_available()
ON_HOPPER = CUDA and torch.cuda.get_device_capability()[0] == 9
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"

in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter, in a process of its own")


def problem_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    grad_out: Tensor,
    options: Options,
) -> Problem:
    """With a gradient of everything that may have one."""
    needed = tuple(t is not None and t.is_floating_point() for t in (query, key, value, bias, attn_mask))
    return Problem(query, key, value, bias, attn_mask, seed, options, grad_out=grad_out, output_mask=needed)


def random_problem(index: int, device: str = DEVICE, *, decoding: bool = False, repeats: int = 1) -> Problem:
    """The problem number index: sizes, strides and features are drawn from it. With repeats > 1 there is a mask, whose
    batch size is the problem's divided by it."""
    draw = random.Random(index)
    torch.manual_seed(index)
    large = device == "cuda"
    lengths = (1, 17, 50, 127, 193, 256, 577, 1000) if large else (1, 5, 17, 33, 40)
    dims = (16, 24, 40, 64, 64, 72, 80, 96, 128, 128, 160, 192, 256) if large else (16, 24, 40)
    dtypes = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32) if large else (torch.float32, torch.float16)
    dtype = draw.choice(dtypes)
    batch, kv_heads, group = draw.choice((1, 2, 3)), draw.choice((1, 2)), draw.choice((1, 1, 2, 4))
    heads = kv_heads * group
    mask_batch = batch
    if repeats > 1:
        mask_batch = max(2, batch)
        batch = repeats * mask_batch
    q_len, kv_len = draw.choice(lengths), draw.choice(lengths)
    if decoding:
        q_len, kv_len = draw.choice((1, 1, 2, 5)), draw.choice((600, 1000, 4097) if large else (40, 70))
    elif draw.random() < 0.3:
        kv_len = q_len
    head_dim = draw.choice(dims)
    value_dim = head_dim if draw.random() < 0.7 else draw.choice(dims)

    def heads_tensor(count: int, length: int, dim: int) -> Tensor:
        layout = draw.choice(("plain", "transposed", "sliced", "expanded"))
        if layout == "transposed":
            tensor = torch.randn(batch, length, count, dim, device=device).transpose(1, 2)
        elif layout == "sliced":
            tensor = torch.randn(batch, count, length, dim + 8, device=device)[..., :dim]
        elif layout == "expanded":
            tensor = torch.randn(1, count, length, dim, device=device).expand(batch, -1, -1, -1)
        else:
            tensor = torch.randn(batch, count, length, dim, device=device)
        return tensor.to(dtype)

    full = batch, heads, q_len, kv_len
    bias = attn_mask = None
    if draw.random() < 0.4:
        shape = [draw.choice((1, size)) for size in full[:3]]
        bias = (torch.randn(*shape, 1, device=device) - 1).to(dtype)
    if draw.random() < 0.45 or repeats > 1:
        own = mask_batch, heads, q_len, kv_len
        one = 1 if repeats == 1 else mask_batch
        shape = draw.choice(
            ((own[0], 1, 1, kv_len), (one, 1, q_len, kv_len), (one, heads, q_len, kv_len), own, (own[0], 1, q_len, 1))
        )
        attn_mask = torch.rand(shape, device=device) > 0.3
        if draw.random() < 0.6:
            masked = draw.choice((-torch.inf, torch.finfo(dtype).min, -1e4))
            attn_mask = torch.where(attn_mask, torch.randn(shape, device=device), masked).to(dtype)
    dropout_p = draw.choice((0.0, 0.0, 0.0, 0.2)) if not decoding else 0.0
    options = Options(
        scale=draw.choice((head_dim**-0.5, 0.3)) if head_dim <= 40 else head_dim**-0.5,
        const_bias=draw.choice((0.0, 0.0, -1.5, -6.0)),
        visible_bias=draw.random() < 0.8,
        is_causal=draw.random() < 0.35,
        bottom_right=draw.random() < 0.5,
        window_left=draw.choice((-1, -1, -1, 0, 5, 100)),
        window_right=draw.choice((-1, -1, -1, 0, 30)),
        softcap=draw.choice((0.0, 0.0, 0.0, 2.0)),
        dropout_p=dropout_p,
    )
    seed = torch.tensor([draw.randrange(2**62)], device=device) if dropout_p else None
    query = heads_tensor(heads, q_len, head_dim)
    key, value = heads_tensor(kv_heads, kv_len, head_dim), heads_tensor(kv_heads, kv_len, value_dim)
    return problem_of(query, key, value, bias, attn_mask, seed, heads_tensor(heads, q_len, value_dim), options)


def window_problem(index: int, device: str = DEVICE) -> Problem:
    """A problem for the kernels of windows: short sequences under a mask with rows, that others may have, too."""
    draw = random.Random(2000 + index)
    torch.manual_seed(2000 + index)
    dtype = draw.choice((torch.bfloat16, torch.float16)) if device == "cuda" else torch.float16
    mask_batch, repeats, heads = draw.choice((1, 2, 3)), draw.choice((1, 2, 5, 9)), draw.choice((1, 2, 3))
    batch, q_len, kv_len = mask_batch * repeats, draw.choice((1, 5, 16, 49, 64)), draw.choice((2, 16, 33, 49, 64))
    head_dim = draw.choice((16, 24, 32, 64))
    value_dim = draw.choice((head_dim, 16, 40))

    def rows(length: int, dim: int) -> Tensor:
        return torch.randn(batch, length, heads, dim + 8, device=device).to(dtype)[..., :dim].transpose(1, 2)

    q_len = max(q_len, 2)  # with one row all rows share the mask
    shape = mask_batch, draw.choice((1, heads)), q_len, draw.choice((kv_len, kv_len, kv_len, 1))
    attn_mask = torch.rand(shape, device=device) > 0.3
    if draw.random() < 0.7:
        attn_mask = torch.where(attn_mask, torch.randn(shape, device=device), draw.choice((-torch.inf, -1e4))).to(dtype)
    bias = None
    if draw.random() < 0.7:
        bias_shape = 1, draw.choice((1, heads)), draw.choice((1, q_len)), 1
        bias = (torch.randn(bias_shape, device=device) - 1).to(dtype)
    options = Options(
        scale=head_dim**-0.5,
        const_bias=draw.choice((0.0, -1.5)),
        visible_bias=draw.random() < 0.8,
        is_causal=draw.random() < 0.2,
        bottom_right=draw.random() < 0.5,
        window_left=draw.choice((-1, -1, 5)),
        window_right=draw.choice((-1, -1, 20)),
    )
    query, key, value = rows(q_len, head_dim), rows(kv_len, head_dim), rows(kv_len, value_dim)
    return problem_of(query, key, value, bias, attn_mask, None, rows(q_len, value_dim), options)


def straightforward(
    problem: Problem, dtype: torch.dtype, draws: Tensor | None = None, *, held: bool = False
) -> list[Tensor]:
    """Output and gradients by matmul, sigmoid and matmul, in dtype throughout.

    draws: the numbers of the rows, by which dropout draws, [B, H, M, 1]; by default they are counted.
    held: what a row cap divides by is a constant to the gradients.
    """
    options = problem.options
    leaves = [
        t if t is None or not t.is_floating_point() else t.detach().to(dtype).requires_grad_() for t in problem.inputs
    ]
    query, key, value, bias, mask = leaves
    assert query is not None and key is not None and value is not None
    if mask is not None and 1 < mask.shape[0] < query.shape[0]:
        mask = mask.repeat(query.shape[0] // mask.shape[0], 1, 1, 1)
    group = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    q_len, kv_len = query.shape[2], key.shape[2]
    scores = (query @ k.mT) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    shift, left, right = options.band(q_len, kv_len)
    row = torch.arange(q_len, device=query.device)[:, None] + shift
    col = torch.arange(kv_len, device=query.device)
    visible = torch.ones_like(scores, dtype=torch.bool)
    if left is not None:
        visible &= col >= row - left
    if right is not None:
        visible &= col <= row + right
    if mask is not None and mask.dtype == torch.bool:
        visible &= mask
    elif mask is not None:
        visible &= mask > -5000
        scores = scores + mask
    row_bias: float | Tensor = options.const_bias
    if options.visible_bias:
        row_bias = row_bias - visible.sum(-1, keepdim=True).clamp(min=1).to(dtype).log()
    if bias is not None:
        row_bias = row_bias + bias
    p = torch.sigmoid(scores.masked_fill(~visible, -torch.inf) + row_bias)
    divisor = p.sum(-1, keepdim=True).clamp(min=options.row_cap) if options.row_cap else None
    if divisor is not None and held:
        divisor = divisor.detach()
    if options.dropout_p:
        assert problem.seed is not None
        if draws is None:
            draws = torch.arange(p[..., 0].numel(), device=p.device).view(*p.shape[:3], 1)
        keep = reference.kept(problem.seed, draws, torch.arange(p.shape[3], device=p.device), options.dropout_p)
        p = p * keep / (1 - options.dropout_p)
    out = p @ v if divisor is None else p @ v / divisor
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return [out, *torch.autograd.grad(out, wanted, problem.grad_out.to(dtype))]


def ours(problem: Problem, **tuning: Any) -> list[Tensor]:
    return results_of(flash_fwd, flash_bwd, problem, **tuning)


def results_of(forward: Any, backward: Any, problem: Problem, **tuning: Any) -> list[Tensor]:
    """Of the forward of one module and the backward of another: the output, and the gradients that are needed."""
    if problem.options.row_cap:
        out, row_sums = with_sums(forward, problem, **tuning)
        assert torch.equal(out, forward.forward(problem, **tuning))
        assert problem.grad_out is not None
        grad_out, delta = row_caps.undivided(problem.grad_out, out, row_sums, problem.options.row_cap)
        grads = backward.backward(dataclasses.replace(problem, grad_out=grad_out, row_delta=delta), **tuning)
    else:
        out, grads = forward.forward(problem, **tuning), backward.backward(problem, **tuning)
    given = [tensor is not None for tensor in problem.inputs]
    expected = [need and tensor for need, tensor in zip(problem.output_mask, given, strict=True)]
    assert [grad is not None for grad in grads] == expected
    return [out, *(grad for grad in grads if grad is not None)]


def with_sums(forward: Any, problem: Problem, **tuning: Any) -> tuple[Tensor, Tensor]:
    """The output and the rows' sums of probabilities, which are compared with those of the reference in float64."""
    row_sums = empty_row_sums(problem.query)
    out = forward.forward(dataclasses.replace(problem, row_sums=row_sums), **tuning)
    exact = [t.double() if t is not None and t.is_floating_point() else t for t in problem.inputs]
    truth = row_sums.double()
    whole = Problem(*exact, problem.seed, problem.options, packed=problem.packed, row_sums=truth)
    reference.forward(whole)
    error = (row_sums - truth).norm() / truth.norm().clamp(min=1e-9)
    assert error <= (2e-2 if problem.query.dtype == torch.bfloat16 else 2e-3), error  # those of rounded scores
    return out, row_sums


def capped(problem: Problem, index: int) -> Problem:
    """With a row cap that is drawn from the index."""
    cap = random.Random(5000 + index).choice((0.03, 0.5, 1.0))
    return dataclasses.replace(problem, options=problem.options._replace(row_cap=cap))


def capped_packed(problem: PackedProblem, index: int) -> PackedProblem:
    return problem._replace(whole=capped(problem.whole, index), each=[capped(each, index) for each in problem.each])


def assert_no_worse(results: list[Tensor], problem: Problem) -> None:
    """Each result's Frobenius error is at most 1.1 times that of the straightforward computation.

    With a row cap it may be one rounding more: the kernels sum p before they round it for the product with the value,
    and round dO / r for both products of the backward. (The straightforward one sums what it rounded, so that rows with
    one key are exact.) Of the gradients' two parts, which nearly cancel in such rows, the rounding is that of one part;
    of the parts of dS, dA . v_j and dA . o, it is o's, whose direction is any: larger by the root of the value's width.
    """
    dtype = problem.query.dtype
    parts = straightforward(problem, torch.float64, held=True) if problem.options.row_cap else None
    assert_near(results, straightforward(problem, dtype), straightforward(problem, torch.float64), parts)


def assert_near(
    results: list[Tensor], naive: list[Tensor], exact: list[Tensor], parts: list[Tensor] | None = None
) -> None:
    for number, (result, theirs, truth) in enumerate(zip(results, naive, exact, strict=len(results) > 1)):
        assert result.shape == truth.shape and result.dtype == theirs.dtype
        what = ("out", "query", "key", "value", "4th", "5th")[number]
        norm = truth.norm().item()
        error = (result.double() - truth).norm().item()
        # The error of a few numbers is a matter of luck, and one number may be what is left of a sum of large ones.
        ratio, floor = (1.1, 1e-12) if int((truth != 0).sum()) >= 256 else (2.0, 5e-7)
        # The GPU's exponential and reciprocal are good to about 1e-6, which float32 alone can feel.
        bound = ratio * (theirs.double() - truth).norm().item() + 1.5e-6 * norm + floor
        if parts is not None:
            spread = 1.0 if what in ("out", "value") else math.sqrt(results[0].shape[-1])
            bound += 0.5 * torch.finfo(result.dtype).eps * spread * max(norm, parts[number].norm().item())
        # Where the naive one overflows to NaN, ours need not.
        assert error <= bound or (math.isnan(bound) and error <= 1e-2 * norm), (what, error / norm, bound / norm)


def assert_windows_no_worse(index: int, *, cap: bool = False) -> None:
    problem = capped(window_problem(index), index) if cap else window_problem(index)
    assert problem.attn_mask is not None and short_masked.supports(problem)
    for tuning in ({}, {"programs": 0}):  # 0: each program takes all sequences with its mask
        assert_no_worse(results_of(short_masked, short_masked, problem, **tuning), problem)


WIDE = (192, 128), (192, 192), (256, 256), (136, 72), (128, 200), (160, 160), (256, 128), (248, 184)
"""head_dim of query and key, and value's."""


def hopper_problem(
    index: int, *, forward: bool = False, wide: bool = False, widths: tuple[int, int] | None = None
) -> Problem:
    """A problem for the kernels of long sequences on Hopper GPUs; short ones, too, which have few tiles.

    forward: for that of the forward, which takes no narrow heads.
    wide: for that of the backward of wide heads.
    widths: head_dim and value's.
    """
    draw = random.Random(3000 + index)
    torch.manual_seed(3000 + index)
    dtype = draw.choice((torch.bfloat16, torch.bfloat16, torch.float16))
    batch, kv_heads, group = draw.choice((1, 2, 3)), draw.choice((1, 2, 5)), draw.choice((1, 1, 2, 3))
    lengths = (63, 64, 65, 128, 130, 257, 500, 1000, 1537)
    q_len, kv_len = draw.choice((1, *lengths)), draw.choice((9, *lengths))
    if draw.random() < 0.3:
        kv_len = q_len
    dims = draw.choice(((40, 48, 64, 64), (72, 80, 96, 128, 128)))
    if forward:
        dims = (72, 80, 96, 128, 128)
    head_dim, value_dim = widths or (draw.choice(dims), draw.choice(dims))
    if wide:
        head_dim, value_dim = draw.choice(WIDE)

    def rows(heads: int, length: int, dim: int) -> Tensor:
        layout = draw.choice(("plain", "transposed", "sliced"))
        if layout == "transposed":
            return torch.randn(batch, length, heads, dim, device=DEVICE).to(dtype).transpose(1, 2)
        if layout == "sliced":
            return torch.randn(batch, heads, length, dim + 8, device=DEVICE).to(dtype)[..., :dim]
        return torch.randn(batch, heads, length, dim, device=DEVICE).to(dtype)

    heads, bias = kv_heads * group, None
    if draw.random() < 0.6:
        shape = draw.choice((1, batch)), draw.choice((1, heads)), draw.choice((1, q_len)), 1
        bias = (torch.randn(shape, device=DEVICE) - draw.choice((1, 9))).to(dtype)
        if draw.random() < 0.3:  # as w_h . q_i, of a query cut from a projection
            bias = bias.transpose(1, 2).contiguous().transpose(1, 2)
    options = Options(
        scale=draw.choice((head_dim**-0.5, -0.2)),
        const_bias=draw.choice((0.0, 0.0, -1.5, -6.0, -12.0)),
        visible_bias=draw.random() < 0.8,
        is_causal=draw.random() < 0.4,
        bottom_right=draw.random() < 0.5,
        window_left=draw.choice((-1, -1, -1, 0, 5, 100)),
        window_right=draw.choice((-1, -1, -1, 0, 30)),
    )
    query, key, value = (
        rows(heads, q_len, head_dim),
        rows(kv_heads, kv_len, head_dim),
        rows(kv_heads, kv_len, value_dim),
    )
    return problem_of(query, key, value, bias, None, None, rows(heads, q_len, value_dim), options)


def assert_sums(index: int) -> None:
    draw = random.Random(index)
    shape = [draw.choice((1, 2, 3, 70)) for _ in range(draw.choice((2, 3, 4)))]
    kept = [draw.choice((1, size)) for size in shape]
    parts = torch.randn(shape, device=DEVICE)
    out = torch.empty(kept, dtype=draw.choice((torch.float32, torch.float16)), device=DEVICE)
    if draw.random() < 0.3:
        out = torch.empty([*kept, 2], dtype=out.dtype, device=DEVICE)[..., 0]  # not contiguous
    sums.Sum(layout_of(out), tuple(shape), parts.device)(parts, out)
    exact = parts.double().sum_to_size(kept)
    bound = torch.finfo(out.dtype).eps * exact.abs() + 1e-6 * parts.numel() ** 0.5
    assert ((out.double() - exact).abs() <= bound).all()


class PackedProblem(NamedTuple):
    """Sequences one behind the other: query [1, H, total, D] and so on, and the sequences on their own."""

    whole: Problem
    packed: Packed
    each: list[Problem]
    draws: list[Tensor]


def random_packed_problem(index: int, device: str = DEVICE) -> PackedProblem:
    draw = random.Random(1000 + index)
    base = random_problem(1000 + index, device)
    lengths = (0, 1, 17, 50, 127, 193, 300) if device == "cuda" else (0, 1, 5, 17, 33)
    sequences = draw.choice((1, 2, 5))
    q_lens = [draw.choice(lengths) for _ in range(sequences)] + [draw.choice(lengths[1:])]
    k_lens = q_lens if draw.random() < 0.5 else [draw.choice(lengths) for _ in range(sequences)] + [17]
    _, heads, _, dim = base.query.shape
    kv_heads, value_dim, dtype = base.key.shape[1], base.value.shape[3], base.query.dtype

    def rows(count: int, total: int, width: int) -> Tensor:
        # Cut from a wider tensor, as from a projection to query, key and value at once.
        return torch.randn(total, count, width + 8, device=device).to(dtype)[..., :width].transpose(0, 1)[None]

    query, grad_out = rows(heads, sum(q_lens), dim), rows(heads, sum(q_lens), value_dim)
    key, value = rows(kv_heads, sum(k_lens), dim), rows(kv_heads, sum(k_lens), value_dim)
    bias = None
    if draw.random() < 0.5:
        shape = 1, draw.choice((1, heads)), draw.choice((1, sum(q_lens))), 1
        bias = (torch.randn(shape, device=device) - 1).to(dtype)
    whole = problem_of(query, key, value, bias, None, base.seed, grad_out, base.options)
    cu_q, cu_k = (
        torch.tensor([sum(lens[:i]) for i in range(len(lens) + 1)], dtype=torch.int32, device=device)
        for lens in (q_lens, k_lens)
    )
    # The longest may be given too long.
    packed = Packed(cu_q, cu_k, max(q_lens) + draw.choice((0, 9)), max(k_lens) + draw.choice((0, 7)))
    each, draws = [], []
    for i, m in enumerate(q_lens):
        q, k = slice(sum(q_lens[:i]), sum(q_lens[: i + 1])), slice(sum(k_lens[:i]), sum(k_lens[: i + 1]))
        own_bias = bias if bias is None or bias.shape[2] == 1 else bias[:, :, q]
        tensors = query[:, :, q], key[:, :, k], value[:, :, k], own_bias, None, base.seed, grad_out[:, :, q]
        each.append(problem_of(*tensors, base.options))
        head, row = torch.arange(heads, device=device)[:, None, None], torch.arange(m, device=device)[:, None]
        draws.append(((i * heads + head) * packed.longest_q + row)[None])
    return PackedProblem(whole, packed, each, draws)


def assert_packed_no_worse(problem: PackedProblem) -> None:
    whole = dataclasses.replace(problem.whole, packed=problem.packed)
    results = ours(whole)

    def joined(dtype: torch.dtype) -> list[Tensor]:
        parts = [straightforward(one, dtype, draw) for one, draw in zip(problem.each, problem.draws, strict=True)]
        tensors = [torch.cat(each, 2) for each in list(zip(*parts, strict=True))[:4]]
        if whole.bias is not None:
            biases = [part[4] for part in parts]
            tensors.append(torch.cat(biases, 2) if whole.bias.shape[2] > 1 else torch.stack(biases).sum(0))
        return tensors

    assert_near(results, joined(whole.query.dtype), joined(torch.float64))


@pytest.mark.slow
@pytest.mark.skipif(CUDA or INTERPRETED, reason="a GPU runs the kernels themselves")
@pytest.mark.parametrize("shard", range(10))
def test_in_the_interpreter(shard: int) -> None:
    run_interpreted(__file__, shard)


def shards(count: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("index", range(count), ids=lambda index: f"{index}-shard{index % 10}")


@in_interpreter
@shards(20)
def test_interpreted(index: int) -> None:
    problem = random_problem(index)
    assert_no_worse(ours(problem, tma=index % 2 == 0), problem)


@in_interpreter
@shards(8)
def test_interpreted_decoding(index: int) -> None:
    problem = random_problem(index, decoding=True)
    out = decode.forward(problem, splits=1 + index % 3)
    assert_no_worse([out], problem)


@in_interpreter
@shards(11)
def test_interpreted_repeated_mask(index: int) -> None:
    problem = random_problem(index, repeats=2 + index % 2)
    assert_no_worse(ours(problem, tma=index % 2 == 0), problem)


def assert_masked_keys_may_hold_anything(index: int) -> None:
    """Keys that are not finite: rows that do not see them are as they were, and the others NaN."""
    draw = random.Random(7000 + index)
    problem = random_problem(index, decoding=index % 3 == 2)
    (batch, heads, rows, _), keys = problem.query.shape, problem.key.shape[2]
    chosen = torch.randperm(keys)[: max(1, keys // 5)].to(problem.key.device)
    shape = draw.choice(((batch, 1, 1, keys), (batch, heads, rows, keys)))
    mask = torch.rand(shape, device=problem.key.device) > 0.3
    if index % 2:
        mask[..., chosen] = False
        mask[:, :, -1:, chosen[:1]] = True
    if draw.random() < 0.5:
        mask = torch.where(mask, 0.0, draw.choice((-torch.inf, -1e4))).to(problem.query.dtype)
    options = problem.options._replace(dropout_p=0.0, softcap=draw.choice((0.0, 2.0)), row_cap=draw.choice((0.0, 0.5)))
    query = problem.query.clone()
    query[query == 0] = 1  # 0 times infinity would be NaN, and a score of the right sign
    finite = dataclasses.replace(problem, query=query, attn_mask=mask, bias=None, seed=None, options=options)
    key = problem.key.clone()
    key[:, :, chosen] = draw.choice((torch.nan, torch.inf, -torch.inf))
    key[:, :, chosen, 0] = torch.nan  # no score is finite
    poisoned = dataclasses.replace(finite, key=key)
    every = Problem(query, key, problem.value.isfinite().to(key.dtype), None, mask, None, options._replace(row_cap=0.0))
    sees = reference.forward(every).isnan().any(-1)
    kernels = [kernel for kernel in (decode, short_masked, flash_fwd, reference) if kernel.supports(finite)]
    for kernel in kernels:
        before, after = kernel.forward(finite), kernel.forward(poisoned)
        assert torch.equal(after[~sees], before[~sees]), kernel.__name__
        assert after[sees].isnan().all(), kernel.__name__


@in_interpreter
@shards(16)
def test_interpreted_masked_keys_may_hold_anything(index: int) -> None:
    assert_masked_keys_may_hold_anything(index)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("index", range(60))
def test_masked_keys_may_hold_anything(index: int) -> None:
    assert_masked_keys_may_hold_anything(index)


@in_interpreter
@shards(12)
def test_interpreted_windows(index: int) -> None:
    assert_windows_no_worse(index)


@in_interpreter
def test_interpreted_windows_without_a_bias_whose_gradient_is_asked_for_shard2() -> None:
    query, key, value, grad_out = (torch.randn(4, 2, 8, 16).half() for _ in range(4))
    attn_mask, options = torch.randn(2, 1, 8, 8).half(), Options(0.25)
    problem = problem_of(query, key, value, None, attn_mask, None, grad_out, options)
    problem.output_mask = (True,) * 5
    assert_no_worse(results_of(short_masked, short_masked, problem), problem)


@in_interpreter
def test_interpreted_windows_are_dispatched_shard1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_obstacle", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(dispatch, "_on", lambda device: nullcontext())
    for index, rest in ((0, {}), (0, {"dropout_p": 0.5}), (0, {"softcap": 2.0})):
        problem = window_problem(index)
        seed = torch.tensor([5]) if "dropout_p" in rest else None
        problem = dataclasses.replace(problem, seed=seed, options=problem.options._replace(**rest))
        before = short_masked._plan_forward.cache_info(), short_masked._plan_backward.cache_info()
        results = results_of(dispatch, dispatch, problem)
        after = short_masked._plan_forward.cache_info(), short_masked._plan_backward.cache_info()
        calls = [new.hits + new.misses - old.hits - old.misses for new, old in zip(after, before, strict=True)]
        assert calls == ([0, 0] if rest else [1, 1])
        assert_no_worse(results, problem)


@in_interpreter
@pytest.mark.parametrize("is_causal", [False, True])
def test_interpreted_known_calls_shard2(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the plans are kept, forward and backward."""
    monkeypatch.setattr(dispatch, "_obstacle", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(dispatch, "_on", lambda device: nullcontext())
    monkeypatch.setattr(dispatch, "_usable", dispatch._usable.__wrapped__)
    monkeypatch.setattr(registration, "implementation_for", lambda is_cuda: dispatch)
    monkeypatch.setattr(repeated, "_known", {})
    for rows, keys in ((40, 50), (70, 150)):
        for seed in range(3):
            torch.manual_seed(seed)
            shapes = (1, rows, 4, 24), (1, keys, 2, 24), (1, keys, 2, 24)
            leaves = [torch.randn(shape).half().transpose(1, 2).requires_grad_() for shape in shapes]
            grad_out = torch.randn(1, 4, rows, 24).half()
            out = sigmoid_attention(*leaves, is_causal=is_causal, enable_gqa=True)
            grads = torch.autograd.grad(out, leaves, grad_out)
            exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
            query, key, value = exact[0], *[each.repeat_interleave(2, 1) for each in exact[1:]]
            seen = torch.ones(rows, keys).tril().bool() if is_causal else torch.ones(rows, keys).bool()
            scores = query @ key.mT * 24**-0.5 - seen.sum(-1, keepdim=True).double().log()
            expected = torch.where(seen, scores.sigmoid(), 0.0) @ value
            right = torch.autograd.grad(expected, exact, grad_out.double())
            for each, other in zip((out, *grads), (expected, *right), strict=True):
                assert (each.double() - other).norm() <= 3e-3 * other.norm()
    assert len(repeated._known) == 2
    assert all(len(known._backwards) == 1 for (known,) in repeated._known.values())


@in_interpreter
def test_interpreted_masks_are_copied_no_larger_than_they_are_shard3() -> None:
    heads_last = torch.randn(1, 6, 7, 3).permute(0, 3, 1, 2)
    for mask, numbers in ((heads_last, 126), (heads_last.expand(5, -1, -1, -1), 126), (heads_last.contiguous(), 126)):
        readable = readable_mask(mask)
        assert readable is not None and torch.equal(readable, mask) and readable.stride(3) == 1
        assert readable.untyped_storage().nbytes() == 4 * numbers


@in_interpreter
@shards(20)
def test_interpreted_capped(index: int) -> None:
    problem = capped(random_problem(100 + index), index)
    assert_no_worse(ours(problem, tma=index % 2 == 0), problem)


@in_interpreter
@shards(8)
def test_interpreted_capped_decoding(index: int) -> None:
    problem = capped(random_problem(index, decoding=True), index)
    for splits in (1, 2, 3):
        out, _ = with_sums(decode, problem, splits=splits)
        assert torch.equal(out, decode.forward(problem, splits=splits))
        assert_no_worse([out], problem)


@in_interpreter
@shards(8)
def test_interpreted_capped_repeated_mask(index: int) -> None:
    problem = capped(random_problem(100 + index, repeats=2 + index % 2), index)
    assert_no_worse(ours(problem, tma=index % 2 == 0), problem)


@in_interpreter
@shards(12)
def test_interpreted_capped_windows(index: int) -> None:
    assert_windows_no_worse(index, cap=True)


@in_interpreter
@shards(12)
def test_interpreted_capped_packed(index: int) -> None:
    assert_packed_no_worse(capped_packed(random_packed_problem(index), index))


@pytest.mark.parametrize(
    ("programs", "keys", "expected"),
    [
        (8, 32768, 33),  # all run at once
        (64, 32768, 4),
        (128, 131072, 2),
        (8, 1024, 4),  # parts are not too short
        (512, 8192, 4),  # more than run at once: so many that the last are few
        (512, 1024, 1),
        (200, 65536, 10),
        (264, 8192, 1),
    ],
)
def test_over_how_many_programs_decoding_splits_keys(programs: int, keys: int, expected: int) -> None:
    assert split_keys.splits_for(programs, keys, at_once=264) == expected


@in_interpreter
def test_interpreted_capped_is_dispatched_shard0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_obstacle", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "_on", lambda device: nullcontext())
    monkeypatch.setattr(dispatch, "_usable", dispatch._usable.__wrapped__)  # what another test's GPU can is remembered
    short, few, cached = torch.randn(1, 2, 40, 16), torch.randn(1, 2, 1, 16), torch.randn(1, 2, 600, 16)
    long = torch.randn(1, 1, 1024, 128).bfloat16().expand(1, 20, -1, -1).contiguous()
    for query, key, window, forward, backward in (
        (short, short, -1, "triton.forward", "triton.backward"),
        (few, cached, -1, "triton.decode", "triton.backward"),
        (long, long, -1, "hopper.forward", "hopper.backward"),
        (long, long, 600, "triton.forward", "triton.backward"),
    ):
        options = Options(0.1, row_cap=0.5, window_left=window)
        problem = problem_of(query, key, key, None, None, None, torch.ones_like(query), options)
        sums = empty_row_sums(query)
        for names, each, kernel in (
            (dispatch.FORWARD, dataclasses.replace(problem, grad_out=None), forward),
            (dispatch.FORWARD, dataclasses.replace(problem, grad_out=None, row_sums=sums), forward),
            (dispatch.BACKWARD, dataclasses.replace(problem, row_delta=sums), backward),
        ):
            assert dispatch.chosen(names, each).__name__ == f"sigswap.kernels.{kernel}"


@in_interpreter
@shards(12)
def test_interpreted_sums(index: int) -> None:
    assert_sums(index)


@in_interpreter
@shards(4)
def test_interpreted_decoding_with_a_repeated_mask(index: int) -> None:
    problem = random_problem(index, decoding=True, repeats=2)
    out = decode.forward(problem, splits=1 + index % 3)
    assert_no_worse([out], problem)


@in_interpreter
def test_interpreted_plans_serve_other_tensors_and_keep_none_alive_shard0() -> None:
    options = Options(0.25, is_causal=True)
    for _ in range(2):
        query, key, value, grad_out = (torch.randn(2, 3, 40, 16).half() for _ in range(4))
        problem = problem_of(query, key, value, None, None, None, grad_out, options)
        misses = flash_fwd._plan.cache_info().misses, flash_bwd._plan.cache_info().misses
        results = ours(problem, tma=True)
        assert_no_worse(results, problem)
    assert misses == (flash_fwd._plan.cache_info().misses, flash_bwd._plan.cache_info().misses)
    references = [weakref.ref(tensor) for tensor in (query, key, value, grad_out)]
    del query, key, value, grad_out, problem, results
    assert all(reference() is None for reference in references)


@in_interpreter
def test_interpreted_softcap_keeps_nan_and_precision_settings_do_not_raise_shard1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends, "fp32_precision", "ieee")  # after which reading allow_tf32 may raise
    query, key, value = (torch.randn(1, 1, 8, 16).half() for _ in range(3))
    query[0, 0, 3, 0] = torch.nan
    options = Options(1.0, softcap=5.0)
    problem = Problem(query, key, value, None, None, None, options)
    for out in (flash_fwd.forward(problem), decode.forward(problem)):
        assert out[0, 0, 3].isnan().all() and not out[0, 0, [0, 1, 2, 4, 5, 6, 7]].isnan().any()


@in_interpreter
@pytest.mark.parametrize("cap", [30.0, 1e5])
def test_interpreted_softcap_far_above_the_scores_shard2(cap: float) -> None:
    """An error of tanh that is small beside 1 is not beside a score, once it is multiplied by the cap."""
    query, key, value, grad_out = (torch.randn(1, 1, 20, 16) for _ in range(4))
    options = Options(0.25, softcap=cap)
    problem = problem_of(query, key, value, None, None, None, grad_out, options)
    leaves = [x.double().requires_grad_() for x in (query, key, value)]
    scores = cap * torch.tanh(0.25 * leaves[0] @ leaves[1].mT / cap)
    expected = (scores - math.log(20)).sigmoid() @ leaves[2]
    grads = torch.autograd.grad(expected, leaves, grad_out.double())
    for out in (flash_fwd.forward(problem), decode.forward(problem)):
        torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=2e-6)
    for found, exact in zip(flash_bwd.backward(problem), grads, strict=False):
        assert found is not None
        torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6)


@in_interpreter
@shards(12)
def test_interpreted_packed(index: int) -> None:
    assert_packed_no_worse(random_packed_problem(index))


def test_dropout_draws_for_rows_that_packed_sequences_have() -> None:
    """Not for those that they would have if all were as long as the longest."""
    ends = torch.arange(1001, dtype=torch.int32)
    ends[-1] = 5000
    rows = torch.randn(1, 2, 5000, 8)
    options = Options(0.3, dropout_p=0.1)
    problem = Problem(rows, rows, rows, None, None, torch.tensor([1]), options, Packed(ends, ends, 4001, 4001))
    draws = draws_for(problem.signature)
    assert draws is not None and draws.layout.shape == (2, 2 * 5000)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("index", range(60))
def test_random_packed(index: int) -> None:
    assert_packed_no_worse(random_packed_problem(index))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("index", range(60))
def test_random_packed_capped(index: int) -> None:
    assert_packed_no_worse(capped_packed(random_packed_problem(index), index))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [1, 4, 12, 17, 20])
def test_values_narrower_than_a_load(width: int, dtype: torch.dtype) -> None:
    """As the op runs them: Triton 3.6 alone computes wrong outputs from them (Signature.has_narrow_value)."""
    torch.manual_seed(0)
    query, key = (torch.randn(1, 512, 9, 64, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(2))
    value = torch.randn(1, 512, 9, width, device="cuda", dtype=dtype).transpose(1, 2)
    bias = -torch.rand(1, 9, 512, 1, device="cuda").to(dtype)
    grad_out = torch.randn_like(value)
    problem = problem_of(query, key, value, bias, None, None, grad_out, Options(0.125, is_causal=True))
    grads = dispatch.backward(problem)
    assert_no_worse([dispatch.forward(problem), *(grad for grad in grads if grad is not None)], problem)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [0.0, 0.5])
@pytest.mark.parametrize(("dim", "width"), [(17, 8), (17, 16), (17, 17), (33, 8), (33, 17), (33, 24), (80, 24)])
def test_narrow_values_beside_odd_rows(dim: int, width: int, cap: float, dtype: torch.dtype) -> None:
    """Where query and key do not lie in whole units of 16 bytes, values that do are not loaded by them either."""
    torch.manual_seed(0)
    query, key = (torch.randn(1, 2, 257, dim, device="cuda", dtype=dtype) for _ in range(2))
    value = torch.randn(1, 2, 257, width, device="cuda", dtype=dtype)
    bias = -torch.rand(1, 2, 257, 1, device="cuda").to(dtype)
    problem = problem_of(
        query, key, value, bias, None, None, torch.randn_like(value), Options(dim**-0.5, is_causal=True, row_cap=cap)
    )
    results = [dispatch.forward(problem)]
    if not cap:
        results += [grad for grad in dispatch.backward(problem) if grad is not None]
    assert_no_worse(results, problem)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("index", range(320))
def test_random_features_capped(index: int) -> None:
    problem = capped(random_problem(index, repeats=1 + (index % 4 == 3)), index)
    assert_no_worse(ours(problem), problem)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("index", range(40))
def test_random_features_decoding_capped(index: int) -> None:
    problem = capped(random_problem(index, decoding=True), index)
    assert_no_worse([with_sums(decode, problem)[0]], problem)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("index", range(60))
def test_random_windows_capped(index: int) -> None:
    assert_windows_no_worse(index, cap=True)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("index", range(320))
def test_random_features(index: int) -> None:
    problem = random_problem(index)
    assert_no_worse(ours(problem), problem)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("index", range(40))
def test_random_features_decoding(index: int) -> None:
    problem = random_problem(index, decoding=True)
    assert_no_worse([decode.forward(problem)], problem)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("index", range(40))
def test_random_features_with_a_repeated_mask(index: int) -> None:
    problem = random_problem(index, repeats=2 + index % 3)
    assert_no_worse(ours(problem), problem)
    problem = random_problem(index, decoding=True, repeats=2 + index % 3)
    assert_no_worse([decode.forward(problem)], problem)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("index", range(60))
def test_random_windows(index: int) -> None:
    assert_windows_no_worse(index)
    assert_sums(index)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("index", range(120))
def test_random_problems_on_hopper(index: int) -> None:
    problem = hopper_problem(index)
    assert_no_worse(results_of(flash_fwd, hopper_bwd, problem), problem)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    ("widths", "index"),
    [
        *(((64, 64), 120 + index) for index in range(80)),
        *((widths, 200 + index) for widths in ((96, 96), (72, 96), (96, 80)) for index in range(30)),
        *(((40, 56), 230 + index) for index in range(10)),
    ],
)
def test_random_problems_on_hopper_of_narrow_heads(widths: tuple[int, int], index: int) -> None:
    problem = hopper_problem(index, widths=widths)
    assert_no_worse(results_of(flash_fwd, hopper_bwd, problem), problem)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("index", range(160))
def test_random_problems_on_hopper_with_wide_heads(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """dS goes through memory at once, by parts, or not."""
    problem = hopper_problem(index, wide=True)
    query, key, value, *_ = problem.inputs
    units = key.shape[0] * key.shape[1]
    monkeypatch.setattr(hopper_bwd_wide, "units_at_once", lambda signature: (units, (units + 1) // 2, 0)[index % 3])
    hopper_bwd_wide._plan.cache_clear()
    for tensor in (query, key, value):  # what is not written is not what it should be
        torch.full_like(tensor, torch.nan)
    results = results_of(flash_fwd, hopper_bwd_wide, problem)
    hopper_bwd_wide._plan.cache_clear()
    assert_no_worse(results, problem)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("index", range(120))
def test_random_problems_on_hopper_forward(index: int) -> None:
    assert_hopper_forward_no_worse(hopper_problem(index, forward=True))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    ("widths", "index"),
    [
        *((widths, 120 + index) for widths in ((192, 128), (192, 192), (256, 256)) for index in range(25)),
        *(((draw, value), 145 + index) for draw in (80, 136, 248) for value in (72, 160, 200) for index in range(5)),
    ],
)
def test_random_problems_on_hopper_forward_of_wide_heads(widths: tuple[int, int], index: int) -> None:
    assert_hopper_forward_no_worse(hopper_problem(index, forward=True, widths=widths))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    ("widths", "index"),
    [
        *(((64, 64), index) for index in range(60)),
        *((widths, 60 + index) for widths in ((40, 40), (48, 64), (64, 40)) for index in range(10)),
        *((widths, 90 + index) for widths in ((96, 96), (72, 96), (96, 80)) for index in range(20)),
        *((widths, 110 + index) for widths in ((96, 128), (128, 72)) for index in range(10)),
    ],
)
def test_random_problems_on_hopper_forward_of_narrow_heads(widths: tuple[int, int], index: int) -> None:
    assert_hopper_forward_no_worse(hopper_problem(index, forward=True, widths=widths))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("index", range(80))
def test_random_problems_on_hopper_forward_with_long_tiles(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sequences that are not long."""
    monkeypatch.setattr(forward_items, "_is_long", lambda signature: True)
    hopper_fwd._plan.cache_clear()
    problem = hopper_problem(index, forward=True, widths=((128, 128), (104, 120))[index % 4 == 3])
    assert forward_items.tile_for(problem.signature) == forward_items.LONG
    assert_hopper_forward_no_worse(problem)
    hopper_fwd._plan.cache_clear()


def assert_hopper_forward_no_worse(problem: Problem) -> None:
    shape, strides = output_layout(problem.query.shape, problem.value.shape)
    # What is not written is not what it should be.
    torch.full(shape, torch.nan, dtype=problem.query.dtype, device=DEVICE)
    out = hopper_fwd.forward(problem)
    assert out.stride() == strides
    assert_no_worse([out], problem)
    assert torch.equal(out, hopper_fwd.forward(problem))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    "widths", [(64, 64), (40, 56), (96, 96), (72, 96), (128, 128), (104, 120), (192, 128), (256, 256)]
)
@pytest.mark.parametrize("index", range(10))
def test_random_problems_on_hopper_forward_capped(
    widths: tuple[int, int], index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and row sums; every other one with the tiles of long sequences, where there are others."""
    monkeypatch.setattr(forward_items, "_is_long", lambda signature: index % 2 == 0)
    monkeypatch.setattr(problems, "LOW_CAP_TAIL_KEYS", (2048, 0)[index // 2 % 2])
    hopper_fwd._plan.cache_clear()
    problem = capped(hopper_problem(300 + index, forward=True, widths=widths), index)
    assert_hopper_forward_no_worse(problem)
    assert torch.equal(with_sums(hopper_fwd, problem)[0], hopper_fwd.forward(problem))
    if index % 5 == 0:  # sums without a cap
        problem = dataclasses.replace(problem, options=problem.options._replace(row_cap=0.0))
        assert torch.equal(with_sums(hopper_fwd, problem)[0], hopper_fwd.forward(problem))
    hopper_fwd._plan.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("widths", [None, (64, 64), (40, 56), (96, 96), (96, 80), (128, 128)])
@pytest.mark.parametrize("index", range(12))
def test_random_problems_on_hopper_backward_capped(
    widths: tuple[int, int] | None, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward is Triton's."""
    monkeypatch.setattr(problems, "LOW_CAP_TAIL_KEYS", (2048, 0)[index % 2])
    flash_fwd._plan.cache_clear()
    hopper_bwd._plan.cache_clear()
    problem = capped(hopper_problem(400 + index, widths=widths), index)
    assert_no_worse(results_of(flash_fwd, hopper_bwd, problem), problem)
    flash_fwd._plan.cache_clear()
    hopper_bwd._plan.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("index", range(30))
def test_random_problems_on_hopper_with_wide_heads_capped(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """dS goes through memory at once, by parts, or not."""
    problem = capped(hopper_problem(500 + index, wide=True), index)
    units = problem.key.shape[0] * problem.key.shape[1]
    monkeypatch.setattr(hopper_bwd_wide, "units_at_once", lambda signature: (units, (units + 1) // 2, 0)[index % 3])
    hopper_bwd_wide._plan.cache_clear()
    results = results_of(flash_fwd, hopper_bwd_wide, problem)
    hopper_bwd_wide._plan.cache_clear()
    assert_no_worse(results, problem)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("bias", [None, "heads", "rows"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dim", "length"), [(64, 4097), (64, 6144), (96, 4160), (128, 4096), (128, 6142), (256, 4096)])
def test_long_rows_on_hopper_capped(dim: int, length: int, causal: bool, bias: str | None) -> None:
    """Forward and backward with the row cap that calibration starts decoders at; some rows sum to more, some do not."""
    torch.manual_seed(dim + length)
    draw = random.Random(f"{dim} {length} {causal} {bias}")
    dtype = draw.choice((torch.bfloat16, torch.float16))
    query, key, value, grad_out = (
        torch.randn(1, heads, length, dim, device=DEVICE).to(dtype) for heads in (2, 1, 1, 2)
    )
    biases = {None: None, "heads": (1, 2, 1, 1), "rows": (1, 2, length, 1)}[bias]
    given = None if biases is None else (torch.randn(biases, device=DEVICE) - 5).to(dtype)
    options = Options(dim**-0.5, -5.0 if bias is None else 0.0, is_causal=causal, row_cap=0.01)
    problem = problem_of(query, key, value, given, None, None, grad_out, options)
    backward = hopper_bwd if dim <= 128 else hopper_bwd_wide
    assert_no_worse(results_of(hopper_fwd, backward, problem), problem)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_hopper_capped_sees_no_future_keys(dim: int) -> None:
    """Not in what rows sum to, either; nor do keys behind the last one count, of which there are some."""
    options = Options(dim**-0.5, -4.0, is_causal=True, row_cap=0.02)
    length = 2100
    query, key, value = (torch.randn(2, 4, length, dim, device=DEVICE).bfloat16() for _ in range(3))
    out, row_sums = with_sums(hopper_fwd, Problem(query, key, value, None, None, None, options))
    for row in (63, 64, 127, 128, 1000):
        other_key, other_value = key.clone(), value.clone()
        other_key[:, :, row + 1 :] = 30.0
        other_value[:, :, row + 1 :] = 1e4
        other = Problem(query, other_key, other_value, None, None, None, options, row_sums=torch.empty_like(row_sums))
        other_out = hopper_fwd.forward(other)
        assert other.row_sums is not None
        # Large scores of other rows make a warp take the accurate form.
        for one, two in ((out, other_out), (row_sums, other.row_sums)):
            one, two = one[:, :, : row + 1].float(), two[:, :, : row + 1].float()
            assert ((one - two).norm(dim=-1) <= 5e-3 * one.norm(dim=-1)).all()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_hopper_capped_through_the_op(dim: int) -> None:
    """With gradients, in eager and in compiled code, in which delta lies as the compiler likes."""
    query, key, value = (torch.randn(2, 4, 2051, dim, device=DEVICE).bfloat16().requires_grad_() for _ in range(3))
    bias = torch.randn(1, 4, 1, 1, device=DEVICE).sub(4).bfloat16().requires_grad_()
    cap = 0.0171

    def attend(*inputs: Tensor) -> Tensor:
        query, key, value, bias = inputs
        return sigmoid_attention(query, key, value, bias=bias, is_causal=True, row_cap=cap)

    grad_out = torch.randn_like(value)
    options = Options(dim**-0.5, visible_bias=False, is_causal=True, row_cap=cap)
    problem = problem_of(*(t.detach() for t in (query, key, value, bias)), None, None, grad_out, options)
    backward = hopper_bwd if dim <= 128 else hopper_bwd_wide
    below = dataclasses.replace(problem, row_delta=empty_row_sums(problem.query))
    assert dispatch.chosen(dispatch.FORWARD, dataclasses.replace(problem, grad_out=None)) is hopper_fwd
    assert dispatch.chosen(dispatch.BACKWARD, below) is backward
    for function in (attend, torch.compile(attend, fullgraph=True)):
        out = function(query, key, value, bias)
        grads = torch.autograd.grad(out, (query, key, value, bias), grad_out)
        assert_no_worse([out.detach(), *grads], problem)


def softcapped(problem: Problem, index: int) -> Problem:
    """With a soft cap that is drawn from the index: of some all scores are below, of some most are above."""
    cap = random.Random(6000 + index).choice((0.3, 2.0, 50.0))
    return dataclasses.replace(problem, options=problem.options._replace(softcap=cap))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    "widths", [(64, 64), (40, 56), (96, 96), (72, 96), (128, 128), (104, 120), (192, 128), (256, 256)]
)
@pytest.mark.parametrize("index", range(16))
def test_random_problems_on_hopper_forward_with_a_soft_cap(
    widths: tuple[int, int], index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other one with the tiles of long sequences, where there are others."""
    monkeypatch.setattr(forward_items, "_is_long", lambda signature: index % 2 == 0)
    hopper_fwd._plan.cache_clear()
    assert_hopper_forward_no_worse(softcapped(hopper_problem(600 + index, forward=True, widths=widths), index))
    hopper_fwd._plan.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("widths", [(64, 64), (40, 56), (96, 96), (96, 80), (128, 128), (104, 120)])
@pytest.mark.parametrize("index", range(24))
def test_random_problems_on_hopper_backward_with_a_soft_cap(widths: tuple[int, int], index: int) -> None:
    problem = softcapped(hopper_problem(700 + index, widths=widths), index)
    assert_no_worse(results_of(flash_fwd, hopper_bwd, problem), problem)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("index", range(60))
def test_random_problems_on_hopper_with_wide_heads_and_a_soft_cap(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """dS goes through memory at once, by parts, or not; a bias that differs between rows needs no gradient."""
    problem = softcapped(hopper_problem(800 + index, wide=True), index)
    if problem.bias is not None and problem.bias.shape[2] > 1:
        problem = dataclasses.replace(problem, output_mask=(True, True, True, False, False))
    units = problem.key.shape[0] * problem.key.shape[1]
    monkeypatch.setattr(hopper_bwd_wide, "units_at_once", lambda signature: (units, (units + 1) // 2, 0)[index % 3])
    hopper_bwd_wide._plan.cache_clear()
    results = results_of(flash_fwd, hopper_bwd_wide, problem)
    hopper_bwd_wide._plan.cache_clear()
    naive, exact = (straightforward(problem, dtype) for dtype in (problem.query.dtype, torch.float64))
    assert_near(results, naive[: len(results)], exact[: len(results)])


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("bias", [None, "heads", "rows"])
@pytest.mark.parametrize("band", ["full", "causal", "window"])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_soft_caps_through_the_op_on_hopper(dim: int, band: str, bias: str | None) -> None:
    """With gradients, also that of the bias, of grouped heads, whichever kernels take them; some scores are above the
    cap."""
    torch.manual_seed(dim)
    length = 2050
    query, key, value = (
        torch.randn(1, heads, length, dim, device=DEVICE).bfloat16().requires_grad_() for heads in (4, 2, 2)
    )
    shape = {None: None, "heads": (1, 4, 1, 1), "rows": (1, 4, length, 1)}[bias]
    given = None if shape is None else torch.randn(shape, device=DEVICE).sub(5).bfloat16().requires_grad_()
    bands: dict[str, dict[str, Any]] = {"full": {}, "causal": {"is_causal": True}}
    bands["window"] = {"is_causal": True, "window": (800, -1)}
    out = sigmoid_attention(query, key, value, bias=given, softcap=2.0, enable_gqa=True, **bands[band])
    inputs = [tensor for tensor in (query, key, value, given) if tensor is not None]
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, grad_out)
    window = {"window_left": 800} if band == "window" else {}
    options = Options(dim**-0.5, visible_bias=given is None, is_causal=band != "full", softcap=2.0, **window)
    detached = [None if tensor is None else tensor.detach() for tensor in (query, key, value, given)]
    problem = problem_of(*detached, None, None, grad_out, options)
    assert dispatch.chosen(dispatch.FORWARD, dataclasses.replace(problem, grad_out=None)) is hopper_fwd
    assert_no_worse([out.detach(), *grads], problem)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_hopper_with_a_soft_cap_sees_no_future_keys(dim: int) -> None:
    options = Options(dim**-0.5, is_causal=True, softcap=50.0)
    query, key, value = (torch.randn(2, 4, 2048, dim, device=DEVICE).bfloat16() for _ in range(3))
    out = hopper_fwd.forward(Problem(query, key, value, None, None, None, options))
    for row in (63, 64, 127, 128, 1000):
        other_key, other_value = key.clone(), value.clone()
        other_key[:, :, row + 1 :] = 30.0
        other_value[:, :, row + 1 :] = 1e4
        other = hopper_fwd.forward(Problem(query, other_key, other_value, None, None, None, options))
        # Large scores of other rows make a warp take the other form of the tanh.
        one, two = out[:, :, : row + 1].float(), other[:, :, : row + 1].float()
        assert ((one - two).norm(dim=-1) <= 5e-3 * one.norm(dim=-1)).all()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"is_causal": True, "window_left": 700}])
@pytest.mark.parametrize(("batch", "heads", "length"), [(9, 7, 1100), (16, 16, 1024), (3, 5, 4100), (1, 2, 16384)])
@pytest.mark.parametrize(
    ("dim", "value_dim"),
    [
        (64, 64),
        (96, 96),
        (128, 128),
        pytest.param(192, 128, id="wide-192-128"),
        pytest.param(256, 256, id="wide-256"),
    ],
)
def test_hopper_forward_computes_every_row(
    dim: int, value_dim: int, batch: int, heads: int, length: int, options: dict[str, Any]
) -> None:
    """Programs divide the rows of all heads among them: more of them than there are programs, and not all causal."""
    query, key = (torch.randn(batch, heads, length, dim, device=DEVICE).bfloat16() for _ in range(2))
    value = torch.randn(batch, heads, length, value_dim, device=DEVICE).bfloat16()
    given = Options(128**-0.5, **options)
    torch.full_like(query[..., :1].expand(-1, -1, -1, value_dim), torch.nan)
    problem = Problem(query, key, value, None, None, None, given)
    out, other = hopper_fwd.forward(problem), flash_fwd.forward(problem)
    error = (out.float() - other.float()).norm(dim=-1) / other.float().norm(dim=-1)
    assert error.max().item() < 0.05  # of each row; both round probabilities to bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("const_bias", [0.0, -12.0])
@pytest.mark.parametrize(
    ("dim", "length"),
    [
        (64, 2048),
        (96, 2048),
        (128, 2048),
        (128, 4096),
        pytest.param(192, 2048, id="wide-192"),
        pytest.param(256, 2048, id="wide-256"),
    ],
)
def test_hopper_forward_sees_no_future_keys(dim: int, length: int, const_bias: float) -> None:
    options = Options(dim**-0.5, const_bias, is_causal=True)
    query, key, value = (torch.randn(2, 4, length, dim, device=DEVICE).bfloat16() for _ in range(3))
    out = hopper_fwd.forward(Problem(query, key, value, None, None, None, options))
    for row in (63, 64, 127, 128, 1000):
        other_key, other_value = key.clone(), value.clone()
        other_key[:, :, row + 1 :] = 30.0
        other_value[:, :, row + 1 :] = 1e4
        other = hopper_fwd.forward(Problem(query, other_key, other_value, None, None, None, options))
        assert torch.equal(out[:, :, : row + 1], other[:, :, : row + 1])


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
def test_hopper_takes_the_forward_of_long_sequences_and_wide_heads() -> None:
    query, key, value = (torch.randn(2, 8, 2048, 264, device=DEVICE).bfloat16() for _ in range(3))
    options = Options(128**-0.5)

    def supports(options: Options = options, rows: int = 2048, dim: int = 128, **more: Any) -> bool:
        dims = dim, dim, more.get("value_dim", dim)
        tensors = (tensor[:, :, :rows, :d] for tensor, d in zip((query, key, value), dims, strict=True))
        return hopper_fwd.supports(Problem(*tensors, more.get("bias"), more.get("mask"), None, options))

    assert supports() and supports(options=options._replace(is_causal=True)) and supports(dim=96)
    assert supports(bias=torch.zeros(1, 8, 2048, 1, device=DEVICE))
    assert not supports(rows=256) and not supports(dim=64, rows=512) and not supports(dim=100)
    assert supports(dim=64) and not supports(dim=64, value_dim=128)
    assert supports(options=options._replace(is_causal=True, window_left=200))
    assert not supports(options=options._replace(is_causal=True, window_left=100))
    assert not supports(options=options._replace(dropout_p=0.1)) and supports(options=options._replace(softcap=1.0))
    assert not supports(mask=torch.ones(2, 1, 1, 2048, dtype=torch.bool, device=DEVICE))
    assert supports(dim=192, value_dim=128) and supports(dim=136) and supports(dim=256) and supports(value_dim=256)
    assert not supports(dim=264) and not supports(dim=256, value_dim=64) and not supports(dim=192, value_dim=100)
    for dim in (64, 96, 128, 192, 256):
        problem = Problem(*(tensor[..., :dim] for tensor in (query, key, value)), None, None, None, options)
        assert torch.equal(dispatch.forward(problem), hopper_fwd.forward(problem))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
def test_hopper_takes_long_sequences_unless_all_is_to_be_deterministic() -> None:
    query, key, value, grad_out = (torch.randn(2, 8, 4096, 64, device="cuda").bfloat16() for _ in range(4))
    needed, options = (True, True, True, False, False), Options(0.125)

    def supports(needed: tuple[bool, ...] = needed, options: Options = options, rows: int = 4096, **more: Any) -> bool:
        tensors = (query[:, :, :rows], key[:, :, :rows], value[:, :, :rows], more.get("bias"), more.get("mask"))
        asked_for = {"grad_out": grad_out[:, :, :rows], "output_mask": needed}
        return hopper_bwd.supports(Problem(*tensors, None, options, **asked_for))

    assert supports() and supports(options=options._replace(is_causal=True))
    assert not supports(rows=512) and not supports(needed=(True, True, False, False, False))
    assert supports(rows=1024) and supports(rows=1024, bias=torch.zeros(1, 8, 1, 1, device="cuda"))
    assert not supports(options=options._replace(is_causal=True, window_left=300))
    assert not supports(options=options._replace(dropout_p=0.1)) and supports(options=options._replace(softcap=1.0))
    assert supports(bias=torch.zeros(1, 8, 4096, 1, device="cuda"))
    assert not supports(mask=torch.ones(2, 1, 1, 4096, dtype=torch.bool, device="cuda"))
    causal = options._replace(is_causal=True)
    problem = Problem(query, key, value, None, None, None, causal, grad_out=grad_out, output_mask=needed)
    fast = dispatch.backward(problem)
    torch.use_deterministic_algorithms(True)
    try:
        assert not supports()
        first, second = dispatch.backward(problem), dispatch.backward(problem)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, two, three in zip(first[:3], second[:3], fast[:3], strict=True):
        assert one is not None and two is not None and three is not None
        assert torch.equal(one, two)
        assert (one.float() - three.float()).norm() < 5e-3 * one.float().norm()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
def test_hopper_takes_wide_heads_and_two_runs_do_not_differ_if_all_is_to_be_deterministic() -> None:
    query, key = (torch.randn(1, 4, 4096, 192, device="cuda").bfloat16() for _ in range(2))
    value, grad_out = (torch.randn(1, 4, 4096, 128, device="cuda").bfloat16() for _ in range(2))
    problem = problem_of(query, key, value, None, None, None, grad_out, Options(192**-0.5, is_causal=True))
    assert dispatch.chosen(dispatch.BACKWARD, problem) is hopper_bwd_wide
    others = flash_bwd.backward(problem)
    torch.use_deterministic_algorithms(True)
    try:
        assert dispatch.chosen(dispatch.BACKWARD, problem) is hopper_bwd_wide
        first, second = dispatch.backward(problem), dispatch.backward(problem)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, two, other in zip(first[:3], second[:3], others[:3], strict=True):
        assert one is not None and two is not None and other is not None
        assert torch.equal(one, two)
        assert (one.float() - other.float()).norm() < 1e-2 * other.float().norm()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(("length", "const_bias"), [(2048, 0.0), (2048, -6.0), (8192, 0.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 96, 128, pytest.param(192, id="wide-192"), pytest.param(256, id="wide-256")])
def test_hopper_gives_exactly_0_to_future_keys(dim: int, length: int, const_bias: float, dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(1, 2, length, dim, device="cuda").to(dtype) for _ in range(3))
    grad_out = torch.zeros_like(query)
    grad_out[:, :, 0] = 1
    options = Options(0.125, const_bias, is_causal=True)
    problem = problem_of(query, key, value, None, None, None, grad_out, options)
    backward = hopper_bwd.backward if dim <= 128 else hopper_bwd_wide.backward
    _, grad_key, grad_value, *_ = backward(problem)
    assert grad_key is not None and grad_value is not None
    assert (grad_key[:, :, 1:] == 0).all() and (grad_value[:, :, 1:] == 0).all()
    assert (grad_value[:, :, 0] != 0).all()
