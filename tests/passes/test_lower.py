"""The lower pass: each attention becomes one call of the op, with the same result; what looks like one does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import handwritten
import pytest
import torch
import torch.nn.functional as F
from compare import check, close
from graphs import OP, Graphs
from handwritten import HEADS, MODELS, Handwritten
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sigswap.compiling.backend

B, M, D = 2, 12, 8


@pytest.mark.slow
@pytest.mark.parametrize("row_cap", [None, 0.6])
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_handwritten_attention_is_lowered(kind: type[Handwritten], row_cap: float | None) -> None:
    model, graphs = kind().eval(), Graphs(row_cap=row_cap)
    check(model, graphs.compile(model), torch.randn(B, M, handwritten.DIM), row_cap)
    assert len(graphs.calls) == kind.sites and graphs.unfused == 0
    assert {node.kwargs["row_cap"] for node in graphs.calls} == {row_cap or 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind.dynamic], ids=lambda kind: kind.__name__)
def test_one_graph_for_every_length(kind: type[Handwritten]) -> None:
    model, graphs = kind().eval(), Graphs()
    compiled = graphs.compile(model, dynamic=True)
    for length in (M, 7, 15):
        check(model, compiled, torch.randn(B, length, handwritten.DIM))
    assert len(graphs.modules) == 1 and len(graphs.calls) == kind.sites and graphs.unfused == 0


# ------------------------------------------------------------------------------------- generated graphs


@st.composite
def attentions(draw: st.DrawFn) -> tuple[dict[str, Any], Callable[..., Tensor]]:
    """A form of attention, as ``function(q, k, v, bias, normalise)`` of [B, H, M, D] tensors."""
    form = {
        "layout": draw(st.sampled_from(["matmul", "bmm", "einsum", "bnhd", "keys first"])),
        "scale": draw(st.sampled_from(["query", "mul", "div", "key", "none", "tensor"])),
        "softcap": draw(st.booleans()),
        "bias": draw(st.sampled_from([None, "heads", "rows", "keys", "full", "number"])),
        "mask": draw(st.sampled_from([None, "causal", "window", "padding", "additive", "triu", "where", "both"])),
        "groups": draw(st.sampled_from([1, 1, 2, "interleave"])),
        "upcast": draw(st.booleans()),
    }

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, normalise: Any) -> Tensor:
        batch, heads, m, d = q.shape
        n = k.shape[2]
        if form["groups"] == 2:
            k, v = (
                t[:, : heads // 2, None].expand(batch, heads // 2, 2, n, d).reshape(q.shape[0], heads, n, d)
                for t in (k, v)
            )
        elif form["groups"] == "interleave":
            k, v = (t[:, : heads // 2].repeat_interleave(2, dim=1) for t in (k, v))
        scale = d**-0.5
        if form["scale"] == "query":
            q = q * scale
        elif form["scale"] == "key":
            k = k / d**0.5
        if form["layout"] == "bmm":
            scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(batch, heads, m, n)
        elif form["layout"] == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k)
        elif form["layout"] == "bnhd":
            scores = torch.einsum("bihd,bjhd->bhij", q.transpose(1, 2), k.transpose(1, 2))
        elif form["layout"] == "keys first":
            scores = (k @ q.mT).mT
        else:
            scores = q @ k.mT
        if form["scale"] == "mul":
            scores = scale * scores
        elif form["scale"] == "div":
            scores = scores / d**0.5
        elif form["scale"] == "tensor":
            scores = scores * bias[:, :1, :1].abs()
        if form["softcap"]:
            scores = torch.tanh(scores / 3.0) * 3.0
        if form["bias"] is not None:
            part = {
                "heads": bias[:, :1, :1],
                "rows": bias[:1, :, :1],
                "keys": bias[0, 0],
                "full": bias,
                "number": 0.25,
            }[form["bias"]]
            scores = scores + part
        i, j = torch.arange(m), torch.arange(n)
        padding = j[None] < torch.tensor([n, n - 3])[:, None]
        low = torch.finfo(torch.float32).min
        if form["mask"] == "causal":
            scores = scores.masked_fill(j > i[:, None], -math.inf)
        elif form["mask"] == "window":
            scores = scores.masked_fill(~((i[:, None] - j < 3) & (j - i[:, None] <= 1)), low)
        elif form["mask"] == "padding":
            scores = scores.masked_fill(~padding[:, None, None], low)
        elif form["mask"] == "additive":
            scores = scores + (1.0 - padding[:, None, None].to(scores.dtype)) * -1e9
        elif form["mask"] == "triu":
            scores = scores + torch.triu(torch.full((m, n), -math.inf, dtype=scores.dtype), 1)
        elif form["mask"] == "where":
            scores = torch.where(torch.ones(m, n, dtype=torch.bool).tril(2), scores, low)
        elif form["mask"] == "both":
            visible = (j <= i[:, None]) & padding[:, None, None]
            scores = scores + torch.where(visible, 0.0, low).to(scores.dtype)
        if form["upcast"]:
            scores = scores.double()
        weights = normalise(scores, -1).to(v.dtype)
        if form["layout"] == "bmm":
            return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).view(batch, heads, m, -1)
        if form["layout"] == "bnhd":
            return torch.einsum("bhij,bjhd->bihd", weights, v.transpose(1, 2)).transpose(1, 2)
        return weights @ v

    return form, function


@settings(max_examples=15, deadline=None, derandomize=True)
@given(attentions())
def test_generated_attention_is_lowered(drawn: tuple[dict[str, Any], Callable[..., Tensor]]) -> None:
    _, function = drawn
    tensors = [torch.randn(B, HEADS, M, D) for _ in range(3)] + [torch.randn(HEADS, M, M)]
    inputs = [tensor.requires_grad_() for tensor in tensors]
    double = [tensor.detach().double().requires_grad_() for tensor in tensors]
    graphs = Graphs()
    actual = graphs.compile(lambda *args: function(*args, handwritten.softmax))(*inputs)
    expected = function(*double, handwritten.sigmoid)
    assert len(graphs.calls) == 1 and graphs.unfused == 0
    close(actual.detach(), expected.detach())
    weights = torch.linspace(-1, 1, actual.numel()).view(actual.shape)
    grads = torch.autograd.grad((actual * weights).sum(), inputs, allow_unused=True)
    exact = torch.autograd.grad((expected * weights.double()).sum(), double, allow_unused=True)
    for ours, theirs in zip(grads, exact, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            close(ours, theirs)


# ------------------------------------------------------------------------------------------ near misses


def _scores_used_twice(q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = q @ k.mT
    return torch.sigmoid(scores) @ v, scores.mean()


def _edited_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k * 1
    scores = q @ k.mT
    k[:, :, 0].mul_(2)
    return torch.sigmoid(scores) @ v + k


def _edited_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    v = v.clone()
    weights = torch.sigmoid(q @ k.mT)
    v[:, :, 0].zero_()
    scores = q.clone()
    half = scores[..., :4]
    kept = torch.sigmoid(scores @ k.mT)
    half.add_(1)
    return weights @ v + kept @ scores


NEAR_MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "probabilities returned": (lambda q, k, v: ((p := torch.sigmoid(q @ k.mT)) @ v, p), "also returned"),
    "probabilities used twice": (lambda q, k, v: ((p := torch.sigmoid(q @ k.mT)) @ v) * p.mean(), "used elsewhere"),
    "scores used twice": (_scores_used_twice, "used elsewhere"),
    "scores that mask themselves": (
        lambda q, k, v: torch.sigmoid((s := q @ k.mT).masked_fill(s < 0, -math.inf)) @ v,
        "used elsewhere",
    ),
    "edited key": (_edited_key, "edited in place"),
    "masked with a score": (lambda q, k, v: torch.sigmoid((q @ k.mT).tril()) @ v, "pass through tril"),
    "filled with 0": (
        lambda q, k, v: torch.sigmoid((q @ k.mT).masked_fill(torch.ones(M, M).triu(1) > 0, 0.0)) @ v,
        "other values",
    ),
    "a gate on the probabilities": (lambda q, k, v: (torch.sigmoid(q @ k.mT) * q[..., :1]) @ v, "pass through mul"),
    "power": (lambda q, k, v: torch.sigmoid((q @ k.mT) ** 2) @ v, ""),
    "clamped": (lambda q, k, v: torch.sigmoid((q @ k.mT).clamp(-1, 1)) @ v, "clamped"),
    "a mask that turns visible": (
        lambda q, k, v: torch.sigmoid((q @ k.mT).masked_fill(torch.ones(M, M).triu(1) > 0, -6000.0) * 1e-3) @ v,
        "scaled to values",
    ),
    "scaled by a tensor of its size": (lambda q, k, v: torch.sigmoid((q @ k.mT) * (q @ q.mT).detach()) @ v, ""),
    "talking heads": (
        lambda q, k, v: torch.sigmoid(F.linear((q @ k.mT).movedim(1, -1), torch.eye(HEADS)).movedim(-1, 1)) @ v,
        "",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay_as_they_are(name: str) -> None:
    """They compute what they did, and the report says why they are not lowered."""
    function, reason = NEAR_MISSES[name]
    tensors = [torch.randn(B, HEADS, M, M) for _ in range(3)]
    graphs, results = Graphs(), []
    original = sigswap.compiling.backend.lower

    def recorded(*args: Any, **kwargs: Any) -> Any:
        results.append(original(*args, **kwargs))
        return results[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sigswap.compiling.backend, "lower", recorded)
        actual = graphs.compile(function)(*tensors)
    assert not graphs.calls
    if reason:
        assert [left for result in results for left in result.left_alone if reason in left.reason]
    torch.testing.assert_close(actual, function(*tensors))


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: torch.sigmoid(q) * v,  # a gate
        lambda q, k, v: F.silu(q @ k.mT) @ v,
        lambda q, k, v: torch.sigmoid(F.linear(q, torch.eye(M))) @ v,  # a layer
        lambda q, k, v: (torch.sigmoid(q @ k.mT) * v).sum(-1),  # not a sum over the keys
        lambda q, k, v: torch.sigmoid(q @ k.mT).mT @ v,  # sums over the queries: the keys are the queries
    ],
    ids=["gate", "silu", "layer", "not multiplied", "transposed"],
)
def test_other_sigmoids_are_computed_as_before(function: Callable[..., Tensor]) -> None:
    tensors = [torch.randn(B, HEADS, M, M) for _ in range(3)]
    torch.testing.assert_close(Graphs().compile(function)(*tensors), function(*tensors), rtol=1e-4, atol=1e-4)


def test_edits_of_what_was_read_keep_their_order() -> None:
    tensors = [torch.randn(B, HEADS, M, M) for _ in range(3)]
    torch.testing.assert_close(Graphs().compile(_edited_view)(*tensors), _edited_view(*tensors), rtol=1e-4, atol=1e-4)


def test_modules_of_torch_nn_run_the_op() -> None:
    """Inside of F.multi_head_attention_forward, which a Dynamo graph holds as a whole, it is the op that runs, too."""
    ops: list[Any] = []

    def aot(module: torch.fx.GraphModule, inputs: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            ops.extend(node for node in graph.graph.nodes if node.target is OP)
            return graph.forward

        return aot_autograd(fw_compiler=compiler)(module, inputs)

    model = nn.MultiheadAttention(handwritten.DIM, HEADS, batch_first=True)
    torch._dynamo.reset()
    x = torch.randn(B, M, handwritten.DIM)
    torch.compile(model, backend="sigswap", options={"inner": aot})(x, x, x, need_weights=False)
    assert len(ops) == 1


# --------------------------------------------------------------------- what a review found, once each


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: torch.sigmoid(q @ k.mT / q.shape[2]) @ v,
        lambda q, k, v: torch.sigmoid((q @ k.mT).clamp(-2e4, 2e4) * 1e-4) @ v,
        lambda q, k, v: torch.sigmoid(q @ k.mT + torch.ones(q.shape[2]).bool()) @ v,
        lambda q, k, v: (torch.sigmoid(q @ k.mT) @ v).view(B * HEADS, -1, D),
        lambda q, k, v: (torch.sigmoid(q @ k.mT) @ v).reshape(B, q.shape[2], -1),
        lambda q, k, v: (torch.sigmoid(q @ k.mT) @ v).select(0, 1).view(-1, D),
        lambda q, k, v: torch.stack([o.view(-1, D) for o in (torch.sigmoid(q @ k.mT) @ v).unbind(0)]),
        lambda q, k, v: (torch.sigmoid(q @ k.mT) @ v).chunk(2, 0)[1].narrow(0, 0, 1).view(-1, D),
        lambda q, k, v: torch.sigmoid(q @ k.mT) @ torch.sigmoid(k @ q.mT) @ v,
        lambda q, k, v: torch.sigmoid(torch.bmm(q[0], k[0].mT)).masked_fill(v[:, :1, :, :1] > 0, 0.0) @ v,
        lambda q, k, v: torch.sigmoid((o := torch.sigmoid(q @ k.mT).flatten(0, 1) @ v.flatten(0, 1)) @ o.mT) @ o,
    ],
    ids=["length", "clamp", "boolean", "view", "reshape", "select", "unbind", "chunk", "two", "broadcast", "chain"],
)
def test_sigmoids_that_a_review_broke(function: Callable[..., Tensor]) -> None:
    compiled = Graphs().compile(function, dynamic=True)
    for length in (9, 13):
        tensors = [torch.randn(B, HEADS, length, D) for _ in range(3)]
        torch.testing.assert_close(compiled(*tensors), function(*tensors), rtol=1e-4, atol=1e-4)


def test_head_dim_may_vary() -> None:
    compiled = Graphs().compile(F.scaled_dot_product_attention, dynamic=True)
    for dim in (8, 16):
        q, k, v = (torch.randn(3, 5, 7, dim) for _ in range(3))
        expected = handwritten.sigmoid(q.double() @ k.double().mT * dim**-0.5, -1) @ v.double()
        close(compiled(q, k, v), expected)
