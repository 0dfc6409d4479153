"""The peers of ``sigswap bench``: each computes softmax attention of a cell, and is called as its package documents."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sigswap.bench.cells import DTYPES, Cell, Mask
from sigswap.bench.inputs import Inputs, make_inputs
from sigswap.bench.peers import find_peer
from sigswap.errors import BenchmarkError

TRAIN = Cell("train", 2, 4, 4, 24, 24, 16, 16)
CAUSAL = Cell("train", 2, 4, 4, 24, 24, 16, 16, causal=True)
GROUPED = Cell("train", 2, 4, 2, 24, 24, 16, 16, causal=True)
WIDER_KEYS = Cell("train", 1, 2, 2, 24, 24, 192, 128, causal=True)
DECODE = Cell("decode", 3, 4, 2, 1, 50, 16, 16)
PAGED = Cell("decode", 3, 4, 2, 1, 48, 16, 16, page_size=8)
LATENT = Cell("decode", 2, 4, 1, 1, 50, 576, 512, latent=True)
VARLEN = Cell("varlen", 3, 2, 2, 40, 40, 16, 16, lengths=(7, 40, 13))
VARLEN_CAUSAL = Cell("varlen", 3, 2, 2, 40, 40, 16, 16, causal=True, lengths=(7, 40, 13))


@pytest.mark.parametrize("cell", [VARLEN, VARLEN_CAUSAL])
def test_padded_peer_is_softmax_attention_of_each_sequence(cell: Cell) -> None:
    inputs = make_inputs(cell, torch.float32, "cpu")
    padded = find_peer("padded").implementation(cell, inputs)
    out = padded.forward()
    for number, (length, *parts) in enumerate(
        zip(cell.lengths, *(torch.split(leaf, list(cell.lengths)) for leaf in inputs.leaves), strict=True)
    ):
        query, key, value = (part.transpose(0, 1) for part in parts)
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=cell.causal).transpose(0, 1)
        torch.testing.assert_close(out[number, :length], expected)
    assert torch.autograd.grad(out, padded.leaves, padded.grad_out)[0].shape == out.shape


FEATURES = [
    Cell("features", 2, 4, 2, 40, 40, 16, 16, True, softcap=0.5),
    Cell("features", 2, 2, 2, 40, 40, 16, 16, True, window=5),
    *(Cell("features", 3, 2, 2, 40, 40, 16, 16, mask=mask) for mask in get_args(Mask)),
]


def softmax_attention(cell: Cell, inputs: Inputs) -> Tensor:
    """Of a cell with features, but for dropout."""
    query, key, value = inputs.qkv
    group = cell.heads // cell.kv_heads
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * cell.head_dim**-0.5
    if cell.softcap is not None:
        scores = cell.softcap * torch.tanh(scores / cell.softcap)
    if inputs.mask is not None and inputs.mask.dtype == torch.bool:
        scores = scores.masked_fill(~inputs.mask, -torch.inf)
    elif inputs.mask is not None:
        scores = scores + inputs.mask
    row, at = torch.arange(cell.q_len)[:, None], torch.arange(cell.kv_len)
    hidden = torch.zeros(cell.q_len, cell.kv_len, dtype=torch.bool)
    if cell.causal:
        hidden |= at > row
    if cell.window is not None:
        hidden |= at < row - cell.window
    out: Tensor = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value
    return out


@pytest.mark.parametrize("cell", FEATURES, ids=lambda cell: cell.label)
@pytest.mark.parametrize("name", ["cudnn", "efficient", "flex", "flashinfer", "fa3", "fa4"])
def test_a_peer_has_a_feature_or_says_so(
    name: str, cell: Cell, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU PyTorch's own attention stands for its backends, and FlexAttention is traced but not compiled."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    peer = find_peer(name)
    dtype = torch.bfloat16 if name in ("fa3", "fa4") else torch.float32
    # On a CPU FlexAttention takes nothing that needs a gradient.
    made = make_inputs(cell, dtype, "cpu")
    mask = None if made.mask is None else made.mask.detach()
    inputs = Inputs(made.query.detach(), made.key.detach(), made.value.detach(), made.grad_out, mask)
    if not set(cell.features) <= set(peer.features):
        with pytest.raises(BenchmarkError, match="It does not take a "):
            peer.implementation(cell, inputs)
        return
    implementation = peer.implementation(cell, inputs)
    out = implementation.forward()
    truth = softmax_attention(cell, inputs)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.float(), truth.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["fa2", "cudnn", "efficient"])
def test_backends_of_sdpa_drop_probabilities(name: str) -> None:
    cell = Cell("features", 2, 3, 3, 40, 40, 16, 16, dropout_p=0.5)
    inputs = make_inputs(cell, torch.float32, "cpu")
    forward = find_peer(name).implementation(cell, inputs).forward
    assert not torch.equal(forward(), forward())


# FlashAttention-3 and 4, whose packages need a GPU: modules in their place that have the packages' parameters.


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    scale: float | None,
    softcap: float = 0.0,
    window: tuple[int | None, int | None] = (None, None),
) -> Tensor:
    """Of [batch, length, heads, head_dim]. A window is (left, right), both inclusive."""
    assert scale is None
    (batch, rows, heads, head_dim), (keys, kv_heads) = query.shape, key.shape[1:3]
    assert window[1] in (None, 0)
    cell = Cell(
        "features",
        batch,
        heads,
        kv_heads,
        rows,
        keys,
        head_dim,
        value.shape[-1],
        causal,
        softcap=softcap or None,
        window=window[0],
    )
    inputs = Inputs(*(x.transpose(1, 2).float() for x in (query, key, value)), grad_out=None)
    return softmax_attention(cell, inputs).transpose(1, 2).to(query.dtype)


def packed(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, *, causal: bool, scale: float | None) -> Tensor:
    """Of [tokens, heads, head_dim]."""
    bounds = ends.tolist()
    outs = [
        attention(*(x[None, start:end] for x in (query, key, value)), causal=causal, scale=scale)[0]
        for start, end in itertools.pairwise(bounds)
    ]
    return torch.cat(outs)


@dataclasses.dataclass
class Call:
    function: str
    shapes: list[tuple[int, ...]]
    contiguous: bool
    options: dict[str, Any]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The calls of both packages' functions. Their parameters are those of fa3-fwd 0.0.3 and flash-attn-4 4.0.0b36."""
    found: list[Call] = []

    def note(function: str, tensors: tuple[Tensor, ...], **options: Any) -> None:
        contiguous = all(tensor.is_contiguous() for tensor in tensors)
        found.append(Call(function, [tuple(tensor.shape) for tensor in tensors], contiguous, options))

    def fa3_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        softcap: float = 0.0,
        num_splits: int = 1,
    ) -> Tensor:
        note("fa3", (q, k, v), causal=causal, scale=softmax_scale)
        return attention(q, k, v, causal=causal, scale=softmax_scale, softcap=softcap)

    def fa3_kvcache(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        qv: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        num_splits: int = 0,
    ) -> Tensor:
        if qv is not None:  # scores are q k + qv v
            assert softmax_scale == (q.shape[-1] + qv.shape[-1]) ** -0.5
            note("fa3 qv", (q, k_cache, v_cache), causal=causal)
            whole = torch.cat((qv, q), -1), torch.cat((v_cache, k_cache), -1)
            return attention(*whole, v_cache, causal=causal, scale=None)
        assert k is None and v is None and k_cache.stride(-1) == v_cache.stride(-1) == 1
        note("fa3 kvcache", (q, k_cache, v_cache), causal=causal, scale=softmax_scale)
        return attention(q, k_cache, v_cache, causal=causal, scale=softmax_scale)

    def fa3_varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Tensor:
        note("fa3 varlen", (q, k, v), causal=causal, scale=softmax_scale, longest=(max_seqlen_q, max_seqlen_k))
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and cu_seqlens_q.equal(cu_seqlens_k)
        return packed(q, k, v, cu_seqlens_q, causal=causal, scale=softmax_scale)

    def fa4_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None = None,
        gather_kv_indices: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int | None, int | None] = (None, None),
        softcap: float = 0.0,
        num_splits: int = 1,
    ) -> tuple[Tensor, None]:
        assert qv is None and gather_kv_indices is None
        note("fa4", (q, k, v), causal=causal, scale=softmax_scale, splits=num_splits)
        return attention(q, k, v, causal=causal, scale=softmax_scale, softcap=softcap, window=window_size), None

    def fa4_varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> tuple[Tensor, None]:
        assert qv is None and cu_seqlens_q is not None and cu_seqlens_k is not None
        note("fa4 varlen", (q, k, v), causal=causal, scale=softmax_scale, longest=(max_seqlen_q, max_seqlen_k))
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and cu_seqlens_q.equal(cu_seqlens_k)
        return packed(q, k, v, cu_seqlens_q, causal=causal, scale=softmax_scale), None

    install(
        monkeypatch,
        "fa3_fwd_interface",
        flash_attn_func=fa3_func,
        flash_attn_with_kvcache=fa3_kvcache,
        flash_attn_varlen_func=fa3_varlen,
    )
    install(monkeypatch, "flash_attn")
    install(monkeypatch, "flash_attn.cute", flash_attn_func=fa4_func, flash_attn_varlen_func=fa4_varlen)
    return found


def install(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Callable[..., Any]) -> None:
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("cell", [TRAIN, CAUSAL, GROUPED, WIDER_KEYS, DECODE], ids=lambda cell: cell.label)
@pytest.mark.parametrize("name", ["fa3", "fa4"])
def test_flash_attention_is_called_with_batch_length_heads_head_dim(name: str, cell: Cell, calls: list[Call]) -> None:
    inputs = make_inputs(cell, torch.bfloat16, "cpu")
    implementation = find_peer(name).implementation(cell, inputs)
    out = implementation.forward()
    assert implementation.leaves == inputs.leaves and implementation.grad_out is inputs.grad_out
    gqa = cell.heads != cell.kv_heads
    query, key, value = (leaf.detach().float() for leaf in inputs.leaves)
    truth = F.scaled_dot_product_attention(query, key, value, is_causal=cell.causal, enable_gqa=gqa)
    torch.testing.assert_close(out.detach().float(), truth, rtol=1e-2, atol=1e-2)
    (call,) = calls
    assert call.shapes == [
        (cell.batch, cell.q_len, cell.heads, cell.head_dim),
        (cell.batch, cell.kv_len, cell.kv_heads, cell.head_dim),
        (cell.batch, cell.kv_len, cell.kv_heads, cell.value_dim),
    ]
    assert call.function == {"fa3": "fa3" if cell.trains else "fa3 kvcache", "fa4": "fa4"}[name]
    assert call.options["causal"] == cell.causal and call.options["scale"] is None
    assert call.options.get("splits", 0) == (0 if name == "fa3" or not cell.trains else 1)
    if cell.trains:
        assert call.contiguous  # the layout in which they are stored: nothing is copied
        assert all(grad is not None for grad in torch.autograd.grad(out, implementation.leaves, inputs.grad_out))


def test_flash_attention_3_takes_latent_attention_in_parts(calls: list[Call]) -> None:
    inputs = make_inputs(LATENT, torch.bfloat16, "cpu")
    out = find_peer("fa3").implementation(LATENT, inputs).forward()
    truth = softmax_attention(LATENT, Inputs(*(leaf.float() for leaf in inputs.qkv), None))
    torch.testing.assert_close(out.float(), truth, rtol=1e-2, atol=1e-2)
    (call,) = calls
    assert call.function == "fa3 qv" and call.shapes == [(2, 1, 4, 64), (2, 50, 1, 64), (2, 50, 1, 512)]
    with pytest.raises(BenchmarkError, match="at most 256"):
        find_peer("fa4").implementation(LATENT, inputs)
    with pytest.raises(BenchmarkError, match="at most 256"):
        find_peer("fa3").implementation(dataclasses.replace(LATENT, latent=False), inputs)


@pytest.mark.parametrize("name", ["fa2", "cudnn", "fa3", "fa4"])
def test_no_peer_reads_pages(name: str, calls: list[Call]) -> None:
    with pytest.raises(BenchmarkError, match="It does not take pages"):
        find_peer(name).implementation(PAGED, make_inputs(PAGED, torch.bfloat16, "cpu"))


@pytest.mark.parametrize("cell", [VARLEN, VARLEN_CAUSAL])
@pytest.mark.parametrize("name", ["fa3", "fa4"])
def test_flash_attention_of_packed_sequences(name: str, cell: Cell, calls: list[Call]) -> None:
    inputs = make_inputs(cell, torch.bfloat16, "cpu")
    out = find_peer(name).implementation(cell, inputs).forward()
    start = 0
    for length in cell.lengths:
        query, key, value = (leaf[start : start + length].detach().float().transpose(0, 1) for leaf in inputs.leaves)
        truth = F.scaled_dot_product_attention(query, key, value, is_causal=cell.causal).transpose(0, 1)
        torch.testing.assert_close(out[start : start + length].detach().float(), truth, rtol=1e-2, atol=1e-2)
        start += length
    (call,) = calls
    assert call.function == f"{name} varlen" and call.shapes == [tuple(leaf.shape) for leaf in inputs.leaves]
    assert call.options == {"causal": cell.causal, "scale": None, "longest": (40, 40)}
    assert torch.autograd.grad(out, inputs.leaves, inputs.grad_out)[0].shape == inputs.query.shape


@pytest.mark.parametrize(
    ("name", "dtype", "head_dim", "value_dim", "reason"),
    [
        ("fa3", "fp16", 64, 64, "built for bfloat16 alone"),
        ("fa3", "bf16", 288, 288, "at most 256"),
        ("fa3", "bf16", 100, 100, "multiples of 8"),
        ("fa3", "bf16", 128, 64, "does not take head_dim 128 with values of 64"),
        ("fa4", "fp32", 64, 64, "needs float16 or bfloat16"),
        ("fa4", "fp16", 288, 288, "at most 256"),
    ],
)
def test_flash_attention_says_which_cells_it_does_not_take(
    name: str, dtype: str, head_dim: int, value_dim: int, reason: str, calls: list[Call]
) -> None:
    cell = Cell("train", 1, 2, 2, 8, 8, head_dim, value_dim)
    with pytest.raises(BenchmarkError, match=reason):
        find_peer(name).implementation(cell, make_inputs(cell, DTYPES[dtype], "cpu"))
    assert not calls


@pytest.mark.parametrize(
    ("name", "cell", "module", "package"),
    [
        ("fa3", TRAIN, "fa3_fwd_interface", "fa3-fwd"),
        ("fa4", TRAIN, "flash_attn.cute", "flash-attn-4"),
        ("flashinfer", DECODE, "flashinfer.decode", "flashinfer-python"),
        ("flashinfer", LATENT, "flashinfer.mla", "flashinfer-python"),
        ("triton-sigmoid", TRAIN, "triton_sigmoid", "triton-sigmoid"),
    ],
)
def test_a_peer_whose_package_is_missing(
    name: str, cell: Cell, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert find_peer(name).package == package
    with pytest.raises(BenchmarkError, match=f"It needs the package {package}: .*{module.split('.')[0]}"):
        find_peer(name).implementation(cell, make_inputs(cell, torch.bfloat16, "cpu"))
