"""sigswap.kernels.reference against a naive float64 formula, its memory, and its random numbers against Triton's."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sigswap.kernels import reference
from sigswap.kernels.host.problem import Options, Problem
from sigswap.kernels.op import dense


def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    scale: float,
    const_bias: float = 0.0,
    visible_bias: bool = True,
    is_causal: bool = False,
    bottom_right: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    row_cap: float = 0.0,
) -> Tensor:
    """The definition, in float64, with the whole score matrix."""
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    q_len, kv_len = query.shape[2], key.shape[2]
    scores = scale * (query @ key.mT)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    visible = torch.ones(q_len, kv_len, dtype=torch.bool)
    for i, j in itertools.product(range(q_len), range(kv_len)):
        at = i + (kv_len - q_len if bottom_right else 0)
        visible[i, j] = not (
            (is_causal and j > at)
            or (window_left >= 0 and j < at - window_left)
            or (window_right >= 0 and j > at + window_right)
        )
    visible = visible.expand(scores.shape)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        visible = visible & (attn_mask > -5000)
        scores = scores + attn_mask.double()
    row_bias = torch.full((), const_bias, dtype=torch.float64)
    if visible_bias:
        row_bias = row_bias - visible.sum(-1, keepdim=True).clamp(min=1).double().log()
    if bias is not None:
        row_bias = row_bias + bias.double()
    logits = torch.where(visible, scores + row_bias, 0.0)
    p = torch.where(visible, 1 / (1 + torch.exp(-logits)), 0.0)
    divisor = p.sum(-1, keepdim=True).clamp(min=row_cap) if row_cap else 1.0
    if keep is not None:
        p = torch.where(keep, p / (1 - dropout_p), 0.0)
    return p @ value / divisor


@st.composite
def problems(draw: st.DrawFn) -> dict:
    kv_heads = draw(st.sampled_from([1, 2]))
    batch = draw(st.sampled_from([1, 2, 6]))
    return {
        "batch": batch,
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.sampled_from([1, 3])),
        "q_len": draw(st.sampled_from([1, 2, 17, 40])),
        "kv_len": draw(st.sampled_from([1, 3, 17, 41])),
        "head_dim": draw(st.sampled_from([1, 8, 20])),
        "value_dim": draw(st.sampled_from([1, 8])),
        "bias": draw(st.sampled_from([None, (1, 1, 1), (1, 0, 1), (0, 0, 0), (0, 1, 0)])),
        "mask": draw(st.sampled_from([None, "bool", "float"])),
        "mask_batch": draw(st.sampled_from([size for size in (1, 2, 3, 6) if batch % size == 0])),
        "mask_ones": draw(st.tuples(*[st.booleans()] * 3)),
        "masked_value": draw(st.sampled_from([-torch.inf, torch.finfo(torch.float32).min, -1e4])),
        "transposed": draw(st.booleans()),
        "tile": draw(st.sampled_from([1, 60, 500, 1 << 20])),
        "options": {
            "scale": draw(st.sampled_from([0.1, 0.7])),
            "const_bias": draw(st.sampled_from([0.0, -1.5])),
            "visible_bias": draw(st.booleans()),
            "is_causal": draw(st.booleans()),
            "bottom_right": draw(st.booleans()),
            "window_left": draw(st.sampled_from([-1, 0, 5])),
            "window_right": draw(st.sampled_from([-1, 0, 5])),
            "softcap": draw(st.sampled_from([0.0, 1.5])),
            "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.3])),
            "row_cap": draw(st.sampled_from([0.0, 0.2, 1.0])),
        },
        "seed": draw(st.integers(0, 2**62)),
    }


def heads_tensor(problem: dict, heads: int, length: int, dim: int) -> Tensor:
    shape = (problem["batch"], heads, length, dim)
    if problem["transposed"]:
        return torch.randn(shape[0], length, heads, dim, dtype=torch.float64).transpose(1, 2)
    return torch.randn(shape, dtype=torch.float64)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(problems())
def test_matches_the_definition_forward_and_backward(problem: dict) -> None:
    torch.manual_seed(problem["seed"] % 1000)
    options = problem["options"]
    batch, heads, q_len, kv_len = (problem[name] for name in ("batch", "heads", "q_len", "kv_len"))
    query = heads_tensor(problem, heads, q_len, problem["head_dim"])
    key = heads_tensor(problem, problem["kv_heads"], kv_len, problem["head_dim"])
    value = heads_tensor(problem, problem["kv_heads"], kv_len, problem["value_dim"])
    full = (batch, heads, q_len, kv_len)
    bias = None
    if problem["bias"] is not None:
        sizes = [1 if one else size for one, size in zip(problem["bias"], full, strict=False)]
        bias = torch.randn(*sizes, 1, dtype=torch.float64)
    mask = None
    if problem["mask"]:
        sizes = [1 if one else size for one, size in zip(problem["mask_ones"], full[1:], strict=True)]
        sizes = [problem["mask_batch"], *sizes]
        mask = torch.rand(sizes) > 0.4
        if problem["mask"] == "float":
            mask = torch.where(mask, torch.randn(sizes, dtype=torch.float64), problem["masked_value"])
    seed = torch.tensor([problem["seed"]])
    keep = None
    if options["dropout_p"]:
        row = torch.arange(batch * heads * q_len).view(*full[:3], 1)
        keep = reference.kept(seed, row, torch.arange(kv_len), options["dropout_p"])

    inputs = [t for t in (query, key, value, bias, mask) if t is not None and t.is_floating_point()]
    for tensor in inputs:
        tensor.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "MAX_TILE_SCORES", problem["tile"])
        patch.setattr(reference, "MAX_BAND_ROWS", 7)
        out = dense.sigmoid_attention(query, key, value, bias, mask, seed, **options)
        grad_out = torch.randn_like(out)
        grads = torch.autograd.grad(out, inputs, grad_out)
    whole_mask = None if mask is None else mask.repeat(batch // mask.shape[0], 1, 1, 1)
    expected = oracle(query, key, value, bias, whole_mask, keep, **options)
    torch.testing.assert_close(out, expected)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, inputs, grad_out), strict=True):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 193), (127, 127), (193, 17)])
def test_error_is_no_larger_than_naive_pytorchs(dtype: torch.dtype, q_len: int, kv_len: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 2, q_len, 32).to(dtype).requires_grad_()
    key = torch.randn(2, 2, kv_len, 32).to(dtype).requires_grad_()
    value = torch.randn(2, 2, kv_len, 32).to(dtype).requires_grad_()
    grad_out = torch.randn(2, 2, q_len, 32).to(dtype)
    scale = 32**-0.5

    def naive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        bias = -torch.tensor(kv_len, dtype=dtype).log()
        return torch.sigmoid(query @ key.mT * scale + bias) @ value

    inputs = (query, key, value)
    exact_inputs = tuple(t.detach().double().requires_grad_() for t in inputs)
    results = []
    for compute, args in (
        (lambda *a: dense.sigmoid_attention(*a, scale=scale), inputs),
        (naive, inputs),
        (lambda *a: oracle(*a, scale=scale), exact_inputs),
    ):
        out = compute(*args)
        results.append((out, *torch.autograd.grad(out, args, grad_out.to(out.dtype))))
    for ours, naives, exact in zip(*results, strict=True):
        error = (ours.double() - exact).norm() / exact.norm()
        naive_error = (naives.double() - exact).norm() / exact.norm()
        assert error <= 1.1 * naive_error + 2 * torch.finfo(torch.float32).eps


class LargestTensor(TorchDispatchMode):
    """Records how many elements the largest tensor has that an operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                # Storage, not numel: an expanded tensor takes no memory.
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


@pytest.mark.parametrize("features", ["plain", "causal", "mask", "dropout"])
def test_memory_is_linear_in_the_length(features: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MAX_TILE_SCORES", 1 << 16)
    length, heads = 1536, 2
    query = torch.randn(1, heads, length, 8)
    mask = (torch.rand(1, 1, 1, length) > 0.2) if features == "mask" else None
    options = Options(0.3, is_causal=features == "causal", dropout_p=0.5 if features == "dropout" else 0.0)
    seed = torch.tensor([3])
    with LargestTensor() as largest:
        problem = Problem(query, query, query, None, mask, seed, options)
        out = reference.forward(problem)
        needed = True, True, True, False, False
        reference.backward(dataclasses.replace(problem, grad_out=out, output_mask=needed))
    assert query.numel() <= largest.elements <= max(1 << 16, query.numel())


def test_the_memory_test_can_fail() -> None:
    query = torch.randn(1, 2, 256, 8)
    with LargestTensor() as largest:
        _ = query @ query.mT
    assert largest.elements == 2 * 256 * 256


TRITON_DRAWS = """
import torch, triton, triton.language as tl
from sigswap.kernels.triton.dropout import kept, row_draws

@triton.jit
def draw(seed, out, first, dropout_p, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    first_word, second_word = row_draws(seed, first.to(tl.int64), row)
    keep = kept(first_word, second_word, column, dropout_p)
    tl.store(out + row * COLUMNS + column, keep.to(tl.int8))

results = []
for seed in (0, 5, 2**31 + 7, 2**62 - 1):
    for first, dropout_p in ((0, 0.1), (2**31 - 8, 0.5), (2**32 - 5, 0.99), (3 * 2**33 + 5, 1.0), (7, 2.0**-20)):
        out = torch.empty(16, 256, dtype=torch.int8)
        draw[(1,)](torch.tensor([seed]), out, torch.tensor(first).item(), dropout_p, 16, 256)
        results.append((seed, first, dropout_p, out))
torch.save(results, __import__("sys").argv[1])
"""


def drawn(seed: int, row: int, columns: int) -> list[int]:
    """The numbers of a row, in Python's integers, as kernels/host/draws.py defines them."""
    word = 2**32
    state, key = [row % word, row // word, 0, 0], [seed % word, seed // word]
    for _ in range(10):
        low, high = state[0] * 0xD2511F53, state[2] * 0xCD9E8D57
        state = [high // word ^ state[1] ^ key[0], high % word, low // word ^ state[3] ^ key[1], low % word]
        key = [(key[0] + 0x9E3779B9) % word, (key[1] + 0xBB67AE85) % word]
    found = []
    for column in range(columns):
        x = (column * 0x9E3779B1 % word ^ state[0]) * 0x7FEB352D % word
        found.append((x ^ x >> 15 ^ state[1]) * 0x846CA68B % word)
    return found


def test_dropout_draws_the_same_in_triton(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    # A process of its own: Triton reads TRITON_INTERPRET when it is imported, and needs a file for its source.
    script, saved = tmp_path / "draw.py", tmp_path / "drawn.pt"
    script.write_text(TRITON_DRAWS)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    subprocess.run([sys.executable, str(script), str(saved)], check=True, timeout=120)
    results = torch.load(saved)
    assert len(results) == 20
    for seed, first, dropout_p, out in results:
        rows = torch.arange(first, first + 16)[:, None]
        kept = reference.kept(torch.tensor([seed]), rows, torch.arange(256), dropout_p)
        assert torch.equal(kept, out.bool()), (seed, first, dropout_p)
        limit = min(float(torch.tensor(dropout_p)), 1 - 2**-24) * 2**32
        expected = [[number >= limit for number in drawn(seed, first + row, 256)] for row in (0, 15)]
        assert kept[[0, 15]].tolist() == expected


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5])
def test_what_dropout_keeps_is_independent(dropout_p: float) -> None:
    """Each figure is a standard normal number, if no score knows of another: the share, products of neighbours in all
    directions and at the distances of tiles, of three and of four, and the spectra along rows and columns."""
    rows, columns = 1024, 1024
    kept = reference.kept(torch.tensor([2**40 + 3]), torch.arange(rows)[:, None], torch.arange(columns), dropout_p)
    x = (kept.double() - (1 - dropout_p)) / math.sqrt(dropout_p * (1 - dropout_p))
    figures = {"share": x.sum() / math.sqrt(x.numel())}
    for lag in (1, 2, 3, 4, 8, 16, 32, 64, 128, 512):
        for name, product in (
            ("columns", x[:, lag:] * x[:, :-lag]),
            ("rows", x[lag:] * x[:-lag]),
            ("diagonal", x[lag:, lag:] * x[:-lag, :-lag]),
            ("square", x[lag:, lag:] * x[:-lag, :-lag] * x[:-lag, lag:] * x[lag:, :-lag]),
        ):
            figures[f"{name} {lag}"] = product.sum() / math.sqrt(product.numel())
    three = x[:, 2:] * x[:, 1:-1] * x[:, :-2]
    figures["three"] = three.sum() / math.sqrt(three.numel())
    assert max(abs(float(figure)) for figure in figures.values()) < 4.5, figures
    for dim in (0, 1):
        power = torch.fft.rfft(x, dim=dim).abs().square().mean(1 - dim)[1:-1] / x.shape[dim]
        assert ((power - 1) * math.sqrt(x.shape[1 - dim])).abs().max() < 6


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty_sizes(shape: tuple[int, int, int, int]) -> None:
    batch, heads, q_len, kv_len = shape
    query = torch.randn(batch, heads, q_len, 8, requires_grad=True)
    key = torch.randn(batch, heads, kv_len, 8, requires_grad=True)
    bias = torch.zeros(1, heads, 1, 1, requires_grad=True)
    out = dense.sigmoid_attention(query, key, key, bias, scale=1.0)
    assert torch.equal(out, torch.zeros(batch, heads, q_len, 8))
    for grad in torch.autograd.grad(out.sum(), (query, key, bias)):
        assert not grad.any()


def test_only_the_gradients_asked_for_are_computed() -> None:
    query = torch.randn(1, 1, 5, 4)
    mask, bias = torch.randn(1, 1, 5, 5), torch.randn(1, 1, 1, 1)
    options = Options(0.5)
    problem = Problem(query, query, query, bias, mask, None, options, grad_out=query, output_mask=(True,) * 5)
    full = reference.backward(problem)
    for index in range(5):
        needed = tuple(i == index for i in range(5))
        grads = reference.backward(dataclasses.replace(problem, output_mask=needed))
        for i, grad in enumerate(grads):
            if i == index:
                torch.testing.assert_close(grad, full[i])
            else:
                assert grad is None


def test_a_repeated_mask_where_rows_are_beyond_every_key() -> None:
    """Tiles of rows whose window has no key left: they see nothing, and a mask repeats over the batch."""
    torch.manual_seed(0)
    query = torch.randn(6, 2, 1000, 16, dtype=torch.float64)
    key, value = torch.randn(2, 6, 1, 17, 16, dtype=torch.float64).unbind()
    mask = torch.rand(3, 2, 1000, 17) > 0.3
    out = dense.sigmoid_attention(
        query, key, value, None, mask, None, scale=0.25, visible_bias=False, is_causal=True, window_left=5
    )
    row, col = torch.arange(1000)[:, None], torch.arange(17)
    visible = mask.repeat(2, 1, 1, 1) & (col <= row) & (col >= row - 5)
    expected = torch.where(visible, torch.sigmoid(query @ key.mT * 0.25), 0.0) @ value
    torch.testing.assert_close(out, expected)
    assert (out[:, :, 22:] == 0).all()
