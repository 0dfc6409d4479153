"""The find pass on small graphs: every spelling of attention is found, and what only looks like one is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sigswap.passes.find import find
from sigswap.passes.products import PARAMETER
from sigswap.passes.site import FindResult

B, H, M, N, D = 2, 3, 5, 7, 8


def found(function: Callable[..., Tensor], *shapes: tuple[int, ...], parameters: int = 0) -> FindResult:
    """``find`` on the graph of ``function``; its last ``parameters`` arguments are parameters."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        args = [torch.randn(shape) for shape in shapes]
        graph = make_fx(function, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*args).graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in placeholders[len(placeholders) - parameters :]:
        node.meta[PARAMETER] = True
    before = str(graph)
    result = find(graph)
    graph.lint()
    assert str(graph) == before, "find must not change the graph"
    return result


Q, K, V = (B, H, M, D), (B, H, N, D), (B, H, N, D)

PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda q, k: torch.matmul(q, k.transpose(-1, -2)),
    "at": lambda q, k: q @ k.mT,
    "einsum": lambda q, k: torch.einsum("bhmd,bhnd->bhmn", q, k),
    "einsum_ellipsis": lambda q, k: torch.einsum("...md,...nd->...mn", q, k),
    "bmm": lambda q, k: torch.bmm(q.reshape(B * H, M, D), k.reshape(B * H, N, D).mT).view(B, H, M, N),
    "baddbmm": lambda q, k: torch.baddbmm(q.new_zeros(1, 1, 1), q.reshape(B * H, M, D), k.reshape(B * H, N, D).mT).view(
        B, H, M, N
    ),
    "mul_sum": lambda q, k: (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1),
    "keys_first": lambda q, k: (k @ q.mT).mT,
}
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda s: s,
    "mul": lambda s: s * D**-0.5,
    "div": lambda s: s / D**0.5,
    "left_mul": lambda s: 0.125 * s,
    "in_place": lambda s: s.mul_(0.125),
    "tensor": lambda s: s * torch.ones(()),
    "softcap": lambda s: torch.tanh(s / 30.0) * 30.0,
}
MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda s: s,
    "additive": lambda s: s + torch.zeros(N),
    "in_place": lambda s: s.add_(torch.zeros(B, 1, 1, N)),
    "assigned": lambda s: s.copy_(s + torch.zeros(B, 1, 1, N)),
    "bias_left": lambda s: torch.zeros(H, M, N) + s,
    "masked_fill": lambda s: s.masked_fill(torch.ones(M, N).bool().tril(), float("-inf")),
    "where": lambda s: torch.where(torch.ones(M, N).bool().tril(), s, torch.finfo(s.dtype).min),
    "clamped": lambda s: s.clamp(min=-1e4),
}
SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "functional": lambda s: F.softmax(s, dim=-1),
    "torch": lambda s: torch.softmax(s, 3),
    "method": lambda s: s.softmax(-1),
    "module": torch.nn.Softmax(dim=-1),
    "float32": lambda s: F.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype),
    "upcast": lambda s: F.softmax(s.float(), dim=-1).type_as(s),
}
AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda p: p,
    "dropout": lambda p: F.dropout(p, 0.1),
    "head_mask": lambda p: p * torch.ones(H, 1, 1),
    "nan_to_num": lambda p: torch.nan_to_num(p),
}
SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda p, v: p @ v,
    "einsum": lambda p, v: torch.einsum("bhmn,bhnd->bmhd", p, v),
    "bmm": lambda p, v: torch.bmm(p.reshape(B * H, M, N), v.reshape(B * H, N, D)),
    "transposed": lambda p, v: (v.mT @ p.mT).mT,
    "mul_sum": lambda p, v: (p.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2),
}


@settings(max_examples=120, deadline=None)
@given(
    *(st.sampled_from(sorted(choices)) for choices in (PRODUCTS, SCALES, MASKS, SOFTMAXES, AFTER, SUMS)),
    st.booleans(),
)
def test_finds_every_spelling(
    product: str, scale: str, mask: str, softmax: str, after: str, weighted_sum: str, mask_first: bool
) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        steps = [SCALES[scale], MASKS[mask]]
        scores = PRODUCTS[product](q, k)
        for step in reversed(steps) if mask_first else steps:
            scores = step(scores)
        return SUMS[weighted_sum](AFTER[after](SOFTMAXES[softmax](scores)), v)

    result = found(attention, Q, K, V)
    assert not result.left_alone, [left.reason for left in result.left_alone]
    (site,) = result.sites
    assert site.kind == "softmax"
    assert site.key_axis == 3
    assert (site.head.axis, site.head.heads, site.head.merged) == (1, H, False)
    assert site.head_dim == D
    assert site.dropout == (after == "dropout")
    assert site.softcap == (scale == "softcap")
    (traced,) = site.products
    assert traced.query.position == (1 if product == "keys_first" else 0)


def test_finds_merged_heads() -> None:
    def fairseq(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [M, B, H*D] -> [B*H, M, D]
        q, k, v = (x.reshape(x.shape[0], B * H, D).transpose(0, 1) for x in (q, k, v))
        return torch.bmm(torch.softmax(torch.bmm(q, k.mT) * D**-0.5, -1), v)

    (site,) = found(fairseq, (M, B, H * D), (N, B, H * D), (N, B, H * D)).sites
    assert (site.head.axis, site.head.heads, site.head.merged) == (0, H, True)

    def single_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT, -1) @ v

    (site,) = found(single_head, (B, M, D), (B, N, D), (B, N, D)).sites
    assert site.head.axis is None and site.head.heads == 1


def test_finds_heads_merged_with_others() -> None:
    """Heads outermost, the heads of a given query, and heads among the rows: the axis is followed, not guessed."""

    def joined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, M, H*D] -> [H*B, M, D]
        q, k, v = (torch.cat(x.chunk(H, -1)) for x in (q, k, v))
        return torch.bmm(torch.softmax(torch.bmm(q, k.mT) * D**-0.5, -1), v)

    def turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT).transpose(0, 1).flatten(0, 1)
        return torch.bmm(scores.softmax(-1), v.transpose(0, 1).flatten(0, 1))

    for function, shapes in ((joined, ((B, M, H * D), (B, N, H * D), (B, N, H * D))), (turned, (Q, K, V))):
        (site,) = found(function, *shapes).sites
        assert (site.head.axis, site.head.heads, site.head.merged, site.head.outer) == (0, H, True, True)
        assert (site.row_axis, site.key_axis, site.key_heads) == (1, 2, H)

    def rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # keys [B, N, D], keys first in the scores
        q = q.view(B, M, H, D).transpose(1, 2).reshape(B, H * M, D)
        return (k @ q.mT).softmax(1).mT @ v

    (site,) = found(rows, (B, M, H * D), (B, N, D), (B, N, D)).sites
    assert (site.head.axis, site.head.heads, site.head.merged, site.head.outer) == (2, H, True, True)
    assert (site.row_axis, site.key_axis, site.key_heads) == (2, 1, 1)


def test_finds_sdpa_with_every_argument() -> None:
    mask = torch.zeros(M, N)
    calls: dict[str, Callable[..., Tensor]] = {
        "none": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
        "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "additive": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, 0.1),
        "boolean": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask == 0),
    }
    for kind, call in calls.items():
        (site,) = found(call, Q, K, V).sites
        assert (site.kind, site.mask, site.head.heads, site.head_dim) == ("sdpa", kind, H, D)
    (site,) = found(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), Q, (B, 1, N, D), (B, 1, N, D)
    ).sites
    assert site.key_heads == 1


def test_finds_talking_heads() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, before: Tensor, after: Tensor) -> Tensor:
        scores = F.linear((q @ k.mT).permute(0, 2, 3, 1), before).permute(0, 3, 1, 2)
        return F.linear(scores.softmax(-1).permute(0, 2, 3, 1), after).permute(0, 3, 1, 2) @ v

    assert len(found(attention, Q, K, V, (H, H), (H, H), parameters=2).sites) == 1


def test_finds_scores_that_are_a_sum_of_products() -> None:
    def disentangled(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        index = torch.zeros(B, H, M, N, dtype=torch.int64)
        scores = q @ k.mT + torch.gather(q @ positions.mT, -1, index)
        return scores.softmax(-1) @ v

    (site,) = found(disentangled, Q, K, V, (9, D), parameters=1).sites
    assert len(site.products) >= 1


# Forms that are sites: function, shapes, parameters
FORMS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], int]] = {
    "sinks": (
        lambda q, k, v, s: torch.cat([q @ k.mT, s.expand(B, H, M, 1)], -1).softmax(-1)[..., :-1] @ v,
        (Q, K, V, (H, 1, 1)),
        1,
    ),
    "heads_mixed_by_an_einsum": (
        lambda q, k, v, w: torch.einsum("bhij,hg->bgij", torch.einsum("bhij,hg->bgij", q @ k.mT, w).softmax(-1), w) @ v,
        (Q, K, V, (H, H)),
        1,
    ),
    "three_operands": (
        lambda q, k, v, w: torch.einsum("bhid,bhjd,hg->bgij", q, k, w).softmax(-1) @ v,
        (Q, K, V, (H, H)),
        1,
    ),
    "three_operands_below": (
        lambda q, k, v, w: torch.einsum("bhij,bhjd,hg->bgid", (q @ k.mT).softmax(-1), v, w),
        (Q, K, V, (H, H)),
        1,
    ),
    "by_hand": (
        lambda q, k, v: (lambda e: (e / e.sum(-1, keepdim=True)) @ v)((q @ k.mT).exp()),
        (Q, K, V),
        0,
    ),
    "by_hand_keys_first": (
        lambda q, k, v: (lambda e: (e / e.sum(-2, keepdim=True)).mT @ v)((k @ q.mT).exp()),
        (Q, K, V),
        0,
    ),
    "log_softmax": (
        lambda q, k, v: F.log_softmax(q @ k.mT, -1).exp() @ v,
        (Q, K, V),
        0,
    ),
}


@pytest.mark.parametrize("name", sorted(FORMS))
def test_finds_other_forms(name: str) -> None:
    function, shapes, parameters = FORMS[name]
    result = found(function, *shapes, parameters=parameters)
    (site,) = result.sites
    assert not result.left_alone and site.products and site.extra == ((0, 1) if name == "sinks" else (0, 0))
    assert (site.exponential is not None) == name.startswith("by_hand")
    assert site.key_axis == (2 if name == "by_hand_keys_first" else 3)


# What is no attention, or none that can be swapped: function, shapes, parameters, attention, part of the reason
NEAR_MISSES: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], int, bool, str]] = {
    "router": (lambda x, w: (x @ w).softmax(-1) @ x[:, :4], ((B, N, D), (D, 4)), 1, False, "parameter"),
    "router_linear": (lambda x, w: F.linear(x, w).softmax(-1) @ x[:, :4], ((B, N, D), (4, D)), 1, False, "parameter"),
    "cosine_router": (
        lambda x, w: (F.normalize(x, dim=-1) @ F.normalize(w, dim=0)).softmax(-1) @ x[:, :4],
        ((B, N, D), (D, 4)),
        1,
        False,
        "do not depend on the model's input",
    ),
    "classifier": (lambda x, w: F.linear(x.mean(1), w).softmax(-1), ((B, N, D), (10, D)), 1, False, "parameter"),
    "pooling": (
        lambda x, w: (F.linear(x, w).softmax(1) * x).sum(1),
        ((B, N, D), (1, D)),
        1,
        False,
        "not from a product",
    ),
    "pooling_after_attention": (
        lambda q, k, v, w: (F.linear(F.scaled_dot_product_attention(q, k, v), w).softmax(-2) * v[..., :M, :]).sum(-2),
        (Q, K, V, (1, D)),
        1,
        False,
        "",
    ),
    "linear_attention": (
        lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v),
        (Q, K, V),
        0,
        False,
        "not from a product",
    ),
    "no_value": (lambda q, k: (q @ k.mT).softmax(-1), (Q, K), 0, False, "do not weight a value"),
    "wrong_axis": (lambda q, k, v: (q @ k.mT).softmax(-2) @ v, (Q, K, V), 0, False, "do not weight a value"),
    "batch_axis": (lambda q, k, v: (q @ k.mT).softmax(1) @ v, (Q, K, V), 0, False, "batch axis"),
    "contrastive": (lambda x, y: (x @ y.mT).softmax(-1).diagonal().log().sum(), ((B, D), (B, D)), 0, False, ""),
    "renormalised": (
        lambda q, k, v: (lambda p: (p / p.sum(-1, keepdim=True)) @ v)((q @ k.mT).softmax(-1)),
        (Q, K, V),
        0,
        True,
        "normalised again",
    ),
    "mixed": (  # ConViT's gated positional attention
        lambda q, k, v, g: (g * (q @ k.mT).softmax(-1) + (1 - g) * torch.ones(M, N).softmax(-1)) @ v,
        (Q, K, V, (H, 1, 1)),
        1,
        True,
        "mixed with others",
    ),
    "slots": (  # the softmax is over the queries, the normalisation over the keys
        lambda q, k, v: (lambda p: ((p + 1e-8) / p.sum(-1, keepdim=True)) @ v)((q @ k.mT).softmax(-2)),
        (Q, K, V),
        0,
        False,
        "do not weight a value",
    ),
    "threshold": (
        lambda q, k, v: F.threshold((q @ k.mT).softmax(-1), 0.01, 0.0) @ v,
        (Q, K, V),
        0,
        True,
        "cannot be followed through threshold",
    ),
    "cosine": (
        lambda q, k, v: F.cosine_similarity(q[..., :, None, :], k[..., None, :, :], dim=-1).softmax(-1) @ v,
        (Q, K, V),
        0,
        True,
        "cosine_similarity",
    ),
    "by_hand_divided_below": (
        lambda q, k, v: (lambda e: (e @ v) / e.sum(-1, keepdim=True))(((q @ k.mT).clamp(max=9)).exp()),
        (Q, K, V),
        0,
        True,
        "by hand",
    ),
    "distances": (
        lambda q, k, v: (-(torch.cdist(q, k) ** 2)).softmax(-1) @ v,
        (Q, K, V),
        0,
        True,
        "distances",
    ),
    "differences": (
        lambda q, k, v: (-(q[..., :, None, :] - k[..., None, :, :]).abs().sum(-1)).softmax(-1) @ v,
        (Q, K, V),
        0,
        True,
        "not a product",
    ),
    "first_score": (
        lambda q, k, v: (lambda s: (s - s[..., :1]).softmax(-1))(q @ k.mT) @ v,
        (Q, K, V),
        0,
        True,
        "shifted by some of them",
    ),
    "topk": (
        lambda q, k, v: torch.zeros(B, H, M, N).scatter(-1, *((q @ k.mT).softmax(-1).topk(2))[::-1]) @ v,
        (Q, K, V),
        0,
        True,
        "topk",
    ),
    "kept_sink": (
        lambda q, k, v, s: torch.cat([q @ k.mT, s.expand(B, H, M, 1)], -1).softmax(-1)[..., 1:] @ v,
        (Q, K, V, (H, 1, 1)),
        1,
        True,
        "not dropped",
    ),
    "alibi_from_the_last_key": (
        lambda q, k, v, w: (q @ k.mT * D**-0.5 + torch.arange(1 - N, 1) * w[:, None, None].exp()).softmax(-1) @ v,
        (Q, K, V, (H,)),
        1,
        True,
        "counts from the last key",
    ),
    "shifted": (
        lambda q, k, v: (lambda s: (s - s.mean(-1, keepdim=True)).softmax(-1))(q @ k.mT) @ v,
        (Q, K, V),
        0,
        True,
        "shifted",
    ),
}


@pytest.mark.parametrize("name", sorted(NEAR_MISSES))
def test_leaves_near_misses_alone(name: str) -> None:
    function, shapes, parameters, attention, reason = NEAR_MISSES[name]
    result = found(function, *shapes, parameters=parameters)
    assert not [site for site in result.sites if site.kind == "softmax"]
    assert result.left_alone
    left = result.left_alone[0]
    assert left.attention == attention
    assert reason in left.reason


def test_what_looks_alike() -> None:
    """Biases that do not count from the last key; random features, a loss, and a temperature by exp."""

    def features(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return (q @ w).exp() @ ((k @ w).exp().mT @ v)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return -(F.log_softmax(q @ k.mT, -1) * torch.eye(M, N)).sum(-1)

    def temperature(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return ((q @ k.mT) * w.exp()).softmax(-1) @ v

    def alibi(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return (q @ k.mT + torch.arange(N) * w[:, None, None]).softmax(-1) @ v

    def bias_per_key(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return (q @ k.mT + w).softmax(-1) @ v

    assert len(found(alibi, Q, K, V, (H,), parameters=1).sites) == 1
    assert len(found(bias_per_key, Q, K, V, (N,), parameters=1).sites) == 1
    assert not found(features, Q, K, V, (D, D), parameters=1).left_alone
    assert not found(loss, Q, K, V).left_alone

    def positions(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:  # differences that are no scores
        return (q @ k.mT - (x[:M, None] - x).abs()).softmax(-1) @ v

    assert len(found(positions, Q, K, V, (N,)).sites) == 1
    assert not found(temperature, Q, K, V, (H, 1, 1), parameters=1).left_alone

    def decays(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        """As gated linear attention: exp weights the products, whose rows nothing divides."""
        ends = g.cumsum(-1)
        return ((q @ k.mT) * (ends[..., :M, None] - ends[..., None, :]).exp().tril()) @ v

    def decays_by_channel(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        """As Kimi's: inside the product."""
        decay = (g[..., :M, None, :] - g[..., None, :, :]).exp()
        return (q.unsqueeze(-2) * k.unsqueeze(-3) * decay).sum(-1) @ v

    for function, shape in ((decays, (B, H, N)), (decays_by_channel, (B, H, N, D))):
        result = found(function, Q, K, V, shape)
        assert not result.sites and not result.left_alone


def test_a_router_beside_an_attention_stays() -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        gate = F.linear(q, w).softmax(-1)
        return ((q @ k.mT).softmax(-1) @ v) * gate[..., :1]

    result = found(layer, Q, K, V, (4, D), parameters=1)
    assert len(result.sites) == 1 and len(result.left_alone) == 1


def test_is_deterministic() -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT + k.sum()).softmax(-1) @ v + F.scaled_dot_product_attention(q, k, v)

    first, second = found(layer, Q, K, V), found(layer, Q, K, V)
    assert str(first) == str(second)
