"""The Triton kernels against float64, over random combinations of features: on a GPU, or in Triton's interpreter.

The bound is the error of the straightforward PyTorch computation in the same dtype.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import weakref
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sigswap.kernels import reference

pytest.importorskip("triton")

from sigswap.kernels import (
    decode,
    dispatch,
    flash_bwd,
    flash_fwd,
    hopper_bwd,
    hopper_bwd_wide,
    hopper_fwd,
    launch,
    sums,
    windows,
)

CUDA = torch.cuda.is_available()
ON_HOPPER = CUDA and torch.cuda.get_device_capability()[0] == 9
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"

in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter, in a process of its own")


class Problem(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    attn_mask: Tensor | None
    seed: Tensor | None
    grad_out: Tensor
    options: reference.Options

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return self.query, self.key, self.value, self.bias, self.attn_mask, self.seed


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
    options = reference.Options(
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
    return Problem(query, key, value, bias, attn_mask, seed, heads_tensor(heads, q_len, value_dim), options)


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
    options = reference.Options(
        scale=head_dim**-0.5,
        const_bias=draw.choice((0.0, -1.5)),
        visible_bias=draw.random() < 0.8,
        is_causal=draw.random() < 0.2,
        bottom_right=draw.random() < 0.5,
        window_left=draw.choice((-1, -1, 5)),
        window_right=draw.choice((-1, -1, 20)),
    )
    query, key, value = rows(q_len, head_dim), rows(kv_len, head_dim), rows(kv_len, value_dim)
    return Problem(query, key, value, bias, attn_mask, None, rows(q_len, value_dim), options)


def straightforward(problem: Problem, dtype: torch.dtype, draws: Tensor | None = None) -> list[Tensor]:
    """Output and gradients by matmul, sigmoid and matmul, in dtype throughout.

    draws: the numbers of dropout's random numbers, [B, H, M, N]; by default they are counted.
    """
    options = problem.options
    leaves = [
        t if t is None or not t.is_floating_point() else t.detach().to(dtype).requires_grad_()
        for t in problem.inputs[:5]
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
    if options.dropout_p:
        assert problem.seed is not None
        if draws is None:
            draws = torch.arange(p.numel(), device=p.device).view(p.shape)
        keep = reference.random_uniform(problem.seed, draws) >= options.dropout_p
        p = p * keep / (1 - options.dropout_p)
    out = p @ v
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return [out, *torch.autograd.grad(out, wanted, problem.grad_out.to(dtype))]


def ours(problem: Problem, **tuning: Any) -> list[Tensor]:
    needed = [t is not None and t.is_floating_point() for t in problem.inputs[:5]]
    out = flash_fwd.forward(*problem.inputs, problem.options, **tuning)
    grads = flash_bwd.backward(problem.grad_out, *problem.inputs, needed, problem.options, **tuning)
    return [out, *(grad for grad, need in zip(grads, needed, strict=True) if need)]


def assert_no_worse(results: list[Tensor], problem: Problem) -> None:
    """Each result's Frobenius error is at most 1.1 times that of the straightforward computation."""
    assert_near(results, straightforward(problem, problem.query.dtype), straightforward(problem, torch.float64))


def assert_near(results: list[Tensor], naive: list[Tensor], exact: list[Tensor]) -> None:
    for number, (result, theirs, truth) in enumerate(zip(results, naive, exact, strict=len(results) > 1)):
        assert result.shape == truth.shape and result.dtype == theirs.dtype
        norm = truth.norm().item()
        error = (result.double() - truth).norm().item()
        # The error of a few numbers is a matter of luck, and one number may be what is left of a sum of large ones.
        ratio, floor = (1.1, 1e-12) if int((truth != 0).sum()) >= 256 else (2.0, 5e-7)
        # The GPU's exponential and reciprocal are good to about 1e-6, which float32 alone can feel.
        bound = ratio * (theirs.double() - truth).norm().item() + 1.5e-6 * norm + floor
        what = ("out", "query", "key", "value", "4th", "5th")[number]
        # Where the naive one overflows to NaN, ours need not.
        assert error <= bound or (math.isnan(bound) and error <= 1e-2 * norm), (what, error / norm, bound / norm)


def assert_windows_no_worse(index: int) -> None:
    problem = window_problem(index)
    query, key, value, bias, attn_mask, _ = problem.inputs
    assert attn_mask is not None and windows.suits(query, key, value, bias, attn_mask, problem.options)
    needed = [t is not None and t.is_floating_point() for t in problem.inputs[:5]]
    for tuning in ({}, {"programs": 0}):  # 0: each program takes all sequences with its mask
        out = windows.forward(query, key, value, bias, attn_mask, problem.options, **tuning)
        inputs = problem.grad_out, query, key, value, bias, attn_mask
        grads = windows.backward(*inputs, needed, problem.options, **tuning)
        assert_no_worse([out, *(grad for grad, need in zip(grads, needed, strict=True) if need)], problem)


def hopper_problem(index: int, *, forward: bool = False, wide: bool = False) -> Problem:
    """A problem for the kernels of long sequences on Hopper GPUs; short ones, too, which have few tiles.

    forward: for that of the forward, which takes no narrow heads.
    wide: for that of the backward of wide heads.
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
    head_dim, value_dim = draw.choice(dims), draw.choice(dims)
    if wide:
        widths = (192, 128), (192, 192), (256, 256), (136, 72), (128, 200), (160, 160), (256, 128), (248, 184)
        head_dim, value_dim = draw.choice(widths)

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
    options = reference.Options(
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
    return Problem(query, key, value, bias, None, None, rows(heads, q_len, value_dim), options)


def assert_sums(index: int) -> None:
    draw = random.Random(index)
    shape = [draw.choice((1, 2, 3, 70)) for _ in range(draw.choice((2, 3, 4)))]
    kept = [draw.choice((1, size)) for size in shape]
    parts = torch.randn(shape, device=DEVICE)
    out = torch.empty(kept, dtype=draw.choice((torch.float32, torch.float16)), device=DEVICE)
    if draw.random() < 0.3:
        out = torch.empty([*kept, 2], dtype=out.dtype, device=DEVICE)[..., 0]  # not contiguous
    sums.Sum(launch.layout_of(out), tuple(shape), parts.device)(parts, out)
    exact = parts.double().sum_to_size(kept)
    bound = torch.finfo(out.dtype).eps * exact.abs() + 1e-6 * parts.numel() ** 0.5
    assert ((out.double() - exact).abs() <= bound).all()


class PackedProblem(NamedTuple):
    """Sequences one behind the other: query [1, H, total, D] and so on, and the sequences on their own."""

    whole: Problem
    packed: launch.Packed
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
    whole = Problem(query, key, value, bias, None, base.seed, grad_out, base.options)
    cu_q, cu_k = (
        torch.tensor([sum(lens[:i]) for i in range(len(lens) + 1)], dtype=torch.int32, device=device)
        for lens in (q_lens, k_lens)
    )
    # The longest may be given too long.
    packed = launch.Packed(cu_q, cu_k, max(q_lens) + draw.choice((0, 9)), max(k_lens) + draw.choice((0, 7)))
    each, draws = [], []
    for i, (m, n) in enumerate(zip(q_lens, k_lens, strict=True)):
        q, k = slice(sum(q_lens[:i]), sum(q_lens[: i + 1])), slice(sum(k_lens[:i]), sum(k_lens[: i + 1]))
        own_bias = bias if bias is None or bias.shape[2] == 1 else bias[:, :, q]
        tensors = query[:, :, q], key[:, :, k], value[:, :, k], own_bias, None, base.seed, grad_out[:, :, q]
        each.append(Problem(*tensors, base.options))
        head, row = torch.arange(heads, device=device)[:, None, None], torch.arange(m, device=device)[:, None]
        number = ((i * heads + head) * packed.longest_q + row) * packed.longest_k + torch.arange(n, device=device)
        draws.append(number[None])
    return PackedProblem(whole, packed, each, draws)


def assert_packed_no_worse(problem: PackedProblem) -> None:
    whole, packed = problem.whole, problem.packed
    needed = [t is not None for t in whole.inputs[:4]] + [False]
    out = flash_fwd.forward(*whole.inputs, whole.options, packed=packed)
    grads = flash_bwd.backward(whole.grad_out, *whole.inputs, needed, whole.options, packed=packed)
    results = [out, *(grad for grad, need in zip(grads, needed, strict=True) if need)]

    def joined(dtype: torch.dtype) -> list[Tensor]:
        parts = [straightforward(one, dtype, draw) for one, draw in zip(problem.each, problem.draws, strict=True)]
        tensors = [torch.cat(each, 2) for each in list(zip(*parts, strict=True))[:4]]
        if whole.bias is not None:
            biases = [part[4] for part in parts]
            tensors.append(torch.cat(biases, 2) if whole.bias.shape[2] > 1 else torch.stack(biases).sum(0))
        return tensors

    assert_near(results, joined(whole.query.dtype), joined(torch.float64))


@pytest.mark.skipif(CUDA or INTERPRETED, reason="a GPU runs the kernels themselves")
@pytest.mark.parametrize("shard", range(4))
def test_in_the_interpreter(shard: int) -> None:
    # Triton reads TRITON_INTERPRET when it is imported, which another test may have done already.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-o", "addopts=--import-mode=importlib"]  # no xdist in there
    selection = ["-k", f"interpreted and shard{shard}"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command + selection, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout


def shards(count: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("index", range(count), ids=lambda index: f"{index}-shard{index % 4}")


@in_interpreter
@shards(20)
def test_interpreted(index: int) -> None:
    problem = random_problem(index)
    assert_no_worse(ours(problem, tma=index % 2 == 0), problem)


@in_interpreter
@shards(8)
def test_interpreted_decoding(index: int) -> None:
    problem = random_problem(index, decoding=True)
    out = decode.forward(*problem.inputs[:5], problem.options, splits=1 + index % 3)
    assert_no_worse([out], problem)


@in_interpreter
@shards(11)
def test_interpreted_repeated_mask(index: int) -> None:
    problem = random_problem(index, repeats=2 + index % 2)
    assert_no_worse(ours(problem, tma=index % 2 == 0), problem)


@in_interpreter
@shards(12)
def test_interpreted_windows(index: int) -> None:
    assert_windows_no_worse(index)


@in_interpreter
def test_interpreted_windows_without_a_bias_whose_gradient_is_asked_for_shard2() -> None:
    query, key, value, grad_out = (torch.randn(4, 2, 8, 16).half() for _ in range(4))
    attn_mask, options = torch.randn(2, 1, 8, 8).half(), reference.Options(0.25)
    grads = windows.backward(grad_out, query, key, value, None, attn_mask, [True] * 5, options)
    assert grads[3] is None
    problem = Problem(query, key, value, None, attn_mask, None, grad_out, options)
    out = windows.forward(query, key, value, None, attn_mask, options)
    assert_no_worse([out, *grads[:3], grads[4]], problem)


@in_interpreter
def test_interpreted_windows_are_dispatched_shard1(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = dispatch._Kernels(flash_fwd, flash_bwd, decode, launch, windows, None, None)
    monkeypatch.setattr(dispatch, "kernels_for", lambda query, value: kernels)
    monkeypatch.setattr(dispatch, "_on", lambda device: nullcontext())
    for index, rest in ((0, {}), (0, {"dropout_p": 0.5}), (0, {"softcap": 2.0})):
        problem = window_problem(index)
        seed = torch.tensor([5]) if "dropout_p" in rest else None
        problem = problem._replace(seed=seed, options=problem.options._replace(**rest))
        before = windows._plan_forward.cache_info(), windows._plan_backward.cache_info()
        needed = [t is not None and t.is_floating_point() for t in problem.inputs[:5]]
        out = dispatch.forward(*problem.inputs, problem.options)
        grads = dispatch.backward(problem.grad_out, *problem.inputs, needed, problem.options)
        after = windows._plan_forward.cache_info(), windows._plan_backward.cache_info()
        calls = [new.hits + new.misses - old.hits - old.misses for new, old in zip(after, before, strict=True)]
        assert calls == ([0, 0] if rest else [1, 1])
        assert_no_worse([out, *(grad for grad, need in zip(grads, needed, strict=True) if need)], problem)


@in_interpreter
def test_interpreted_masks_are_copied_no_larger_than_they_are_shard3() -> None:
    heads_last = torch.randn(1, 6, 7, 3).permute(0, 3, 1, 2)
    for mask, numbers in ((heads_last, 126), (heads_last.expand(5, -1, -1, -1), 126), (heads_last.contiguous(), 126)):
        readable = launch.readable_mask(mask)
        assert readable is not None and torch.equal(readable, mask) and readable.stride(3) == 1
        assert readable.untyped_storage().nbytes() == 4 * numbers


@in_interpreter
@shards(12)
def test_interpreted_sums(index: int) -> None:
    assert_sums(index)


@in_interpreter
@shards(4)
def test_interpreted_decoding_with_a_repeated_mask(index: int) -> None:
    problem = random_problem(index, decoding=True, repeats=2)
    out = decode.forward(*problem.inputs[:5], problem.options, splits=1 + index % 3)
    assert_no_worse([out], problem)


@in_interpreter
def test_interpreted_plans_serve_other_tensors_and_keep_none_alive_shard0() -> None:
    options = reference.Options(0.25, is_causal=True)
    for _ in range(2):
        query, key, value, grad_out = (torch.randn(2, 3, 40, 16).half() for _ in range(4))
        problem = Problem(query, key, value, None, None, None, grad_out, options)
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
    options = reference.Options(1.0, softcap=5.0)
    for out in (
        flash_fwd.forward(query, key, value, None, None, None, options),
        decode.forward(query, key, value, None, None, options),
    ):
        assert out[0, 0, 3].isnan().all() and not out[0, 0, [0, 1, 2, 4, 5, 6, 7]].isnan().any()


@in_interpreter
@shards(12)
def test_interpreted_packed(index: int) -> None:
    assert_packed_no_worse(random_packed_problem(index))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("index", range(60))
def test_random_packed(index: int) -> None:
    assert_packed_no_worse(random_packed_problem(index))


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
    assert_no_worse([decode.forward(*problem.inputs[:5], problem.options)], problem)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("index", range(40))
def test_random_features_with_a_repeated_mask(index: int) -> None:
    problem = random_problem(index, repeats=2 + index % 3)
    assert_no_worse(ours(problem), problem)
    problem = random_problem(index, decoding=True, repeats=2 + index % 3)
    assert_no_worse([decode.forward(*problem.inputs[:5], problem.options)], problem)


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
    query, key, value, bias, *_ = problem.inputs
    needed = [True, True, True, bias is not None, False]
    out = flash_fwd.forward(*problem.inputs, problem.options)
    grads = hopper_bwd.backward(problem.grad_out, query, key, value, bias, needed, problem.options)
    assert_no_worse([out, *(grad for grad in grads if grad is not None)], problem)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("index", range(160))
def test_random_problems_on_hopper_with_wide_heads(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """dS goes through memory at once, by parts, or not."""
    problem = hopper_problem(index, wide=True)
    query, key, value, bias, *_ = problem.inputs
    assert query is not None and key is not None and value is not None
    units = key.shape[0] * key.shape[1]
    monkeypatch.setattr(hopper_bwd_wide, "_units_at_once", lambda signature: (units, (units + 1) // 2, 0)[index % 3])
    hopper_bwd_wide._plan.cache_clear()
    needed = [True, True, True, bias is not None, False]
    for tensor in (query, key, value):  # what is not written is not what it should be
        torch.full_like(tensor, torch.nan)
    grads = hopper_bwd_wide.backward(problem.grad_out, query, key, value, bias, needed, problem.options)
    hopper_bwd_wide._plan.cache_clear()
    out = flash_fwd.forward(*problem.inputs, problem.options)
    assert_no_worse([out, *(grad for grad in grads if grad is not None)], problem)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("index", range(120))
def test_random_problems_on_hopper_forward(index: int) -> None:
    problem = hopper_problem(index, forward=True)
    query, key, value, bias, *_ = problem.inputs
    assert query is not None and key is not None and value is not None
    shape, strides = reference.output_layout(query.shape, value.shape)
    torch.full(shape, torch.nan, dtype=query.dtype, device=DEVICE)  # what is not written is not what it should be
    out = hopper_fwd.forward(query, key, value, bias, problem.options)
    assert out.stride() == strides
    assert_no_worse([out], problem)
    assert torch.equal(out, hopper_fwd.forward(query, key, value, bias, problem.options))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"is_causal": True, "window_left": 700}])
@pytest.mark.parametrize(("batch", "heads", "length"), [(9, 7, 1100), (16, 16, 1024), (3, 5, 4100), (1, 2, 16384)])
def test_hopper_forward_computes_every_row(batch: int, heads: int, length: int, options: dict[str, Any]) -> None:
    """Programs divide the rows of all heads among them: more of them than there are programs, and not all causal."""
    query, key = (torch.randn(batch, heads, length, 128, device=DEVICE).bfloat16() for _ in range(2))
    value = torch.randn(batch, heads, length, 128, device=DEVICE).bfloat16()
    given = reference.Options(128**-0.5, **options)
    torch.full_like(query, torch.nan)
    out = hopper_fwd.forward(query, key, value, None, given)
    other = flash_fwd.forward(query, key, value, None, None, None, given)
    error = (out.float() - other.float()).norm(dim=-1) / other.float().norm(dim=-1)
    assert error.max().item() < 0.05  # of each row; both round probabilities to bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("const_bias", [0.0, -12.0])
def test_hopper_forward_sees_no_future_keys(const_bias: float) -> None:
    options = reference.Options(128**-0.5, const_bias, is_causal=True)
    query, key, value = (torch.randn(2, 4, 2048, 128, device=DEVICE).bfloat16() for _ in range(3))
    out = hopper_fwd.forward(query, key, value, None, options)
    for row in (63, 64, 127, 128, 1000):
        other_key, other_value = key.clone(), value.clone()
        other_key[:, :, row + 1 :] = 30.0
        other_value[:, :, row + 1 :] = 1e4
        other = hopper_fwd.forward(query, other_key, other_value, None, options)
        assert torch.equal(out[:, :, : row + 1], other[:, :, : row + 1])


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
def test_hopper_takes_the_forward_of_long_sequences() -> None:
    query, key, value = (torch.randn(2, 8, 2048, 128, device=DEVICE).bfloat16() for _ in range(3))
    options = reference.Options(128**-0.5)

    def suits(options: reference.Options = options, rows: int = 2048, dim: int = 128, **more: Any) -> bool:
        tensors = (tensor[:, :, :rows, :dim] for tensor in (query, key, value))
        return hopper_fwd.suits(*tensors, more.get("bias"), more.get("mask"), options)

    assert suits() and suits(options=options._replace(is_causal=True)) and suits(dim=96)
    assert suits(bias=torch.zeros(1, 8, 2048, 1, device=DEVICE))
    assert not suits(rows=256) and not suits(dim=64) and not suits(dim=100)
    assert suits(options=options._replace(is_causal=True, window_left=200))
    assert not suits(options=options._replace(is_causal=True, window_left=100))
    assert not suits(options=options._replace(dropout_p=0.1)) and not suits(options=options._replace(softcap=1.0))
    assert not suits(mask=torch.ones(2, 1, 1, 2048, dtype=torch.bool, device=DEVICE))
    taken = dispatch.forward(query, key, value, None, None, None, options)
    assert torch.equal(taken, hopper_fwd.forward(query, key, value, None, options))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
def test_hopper_takes_long_sequences_unless_all_is_to_be_deterministic() -> None:
    query, key, value, grad_out = (torch.randn(2, 8, 4096, 64, device="cuda").bfloat16() for _ in range(4))
    needed, options = [True, True, True, False, False], reference.Options(0.125)

    def suits(needed: list[bool] = needed, options: reference.Options = options, rows: int = 4096, **more: Any) -> bool:
        tensors = (grad_out[:, :, :rows], query[:, :, :rows], key[:, :, :rows], value[:, :, :rows])
        return hopper_bwd.suits(*tensors, more.get("bias"), more.get("mask"), needed, options)

    assert suits() and suits(options=options._replace(is_causal=True))
    assert not suits(rows=512) and not suits(needed=[True, True, False, False, False])
    assert not suits(rows=1024) and suits(rows=1024, bias=torch.zeros(1, 8, 1, 1, device="cuda"))
    assert not suits(options=options._replace(is_causal=True, window_left=300))
    assert not suits(options=options._replace(dropout_p=0.1)) and not suits(options=options._replace(softcap=1.0))
    assert suits(bias=torch.zeros(1, 8, 4096, 1, device="cuda"))
    assert not suits(mask=torch.ones(2, 1, 1, 4096, dtype=torch.bool, device="cuda"))
    arguments = grad_out, query, key, value, None, None, None, needed, options._replace(is_causal=True)
    fast = dispatch.backward(*arguments)
    torch.use_deterministic_algorithms(True)
    try:
        assert not suits()
        first, second = dispatch.backward(*arguments), dispatch.backward(*arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, two, three in zip(first[:3], second[:3], fast[:3], strict=True):
        assert one is not None and two is not None and three is not None
        assert torch.equal(one, two)
        assert (one.float() - three.float()).norm() < 5e-3 * one.float().norm()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(("length", "const_bias"), [(2048, 0.0), (2048, -6.0), (8192, 0.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hopper_gives_exactly_0_to_future_keys(length: int, const_bias: float, dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(1, 2, length, 64, device="cuda").to(dtype) for _ in range(3))
    grad_out = torch.zeros_like(query)
    grad_out[:, :, 0] = 1
    options = reference.Options(0.125, const_bias, is_causal=True)
    needed = [True, True, True, False, False]
    _, grad_key, grad_value, *_ = hopper_bwd.backward(grad_out, query, key, value, None, needed, options)
    assert grad_key is not None and grad_value is not None
    assert (grad_key[:, :, 1:] == 0).all() and (grad_value[:, :, 1:] == 0).all()
    assert (grad_value[:, :, 0] != 0).all()
