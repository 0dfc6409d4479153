"""The lower pass: each attention becomes one call of the op, with the same result; what looks like one does not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import handwritten
import pytest
import torch
import torch.nn.functional as F
from graphs import OP, Graphs
from handwritten import HEAD_DIM, HEADS, MODELS, Handwritten
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sigswap.compiling.backend
from sigswap.functional.attention import probabilities

B, M, D = 2, 12, 8


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    scale = expected.abs().max().item() + 1e-9
    assert (actual.double() - expected.double()).abs().max().item() <= tolerance * scale


def close_with_gradients(
    actual: Tensor, expected: Tensor, leaves: Sequence[Tensor], exact: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Output and gradients are those of float64; returns the gradients."""
    close(actual.detach(), expected.detach())
    direction = torch.linspace(-1, 1, actual.numel()).view(actual.shape)
    grads = torch.autograd.grad((actual * direction).sum(), leaves)
    truths = torch.autograd.grad((expected * direction.double()).sum(), exact)
    for ours, theirs in zip(grads, truths, strict=True):
        close(ours, theirs)
    return grads


def oracle_of(model: Handwritten, row_cap: float | None = None) -> Handwritten:
    """The model in float64, with sigmoid written out in place of its softmax."""
    oracle = copy.deepcopy(model).double()
    oracle.normalise = handwritten.sigmoid if row_cap is None else handwritten.capped(row_cap)
    return oracle


def compare(model: Handwritten, compiled: Any, x: Tensor, row_cap: float | None = None) -> None:
    """Output and all gradients of ``compiled`` are those of the oracle."""
    x64 = x.detach().double().requires_grad_()
    oracle = oracle_of(model, row_cap)
    x = x.detach().requires_grad_()
    actual, expected = compiled(x), oracle(x64)
    close_with_gradients(actual, expected, [x, *model.parameters()], [x64, *oracle.parameters()])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("row_cap", [None, 0.6])
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_handwritten_attention_is_lowered(kind: type[Handwritten], row_cap: float | None) -> None:
    model, graphs = kind().eval(), Graphs(row_cap=row_cap)
    compare(model, graphs.compile(model), torch.randn(B, M, handwritten.DIM), row_cap)
    assert len(graphs.calls) == kind.sites and graphs.unfused == 0
    assert {node.kwargs["row_cap"] for node in graphs.calls} == {row_cap or 0.0}


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind.dynamic], ids=lambda kind: kind.__name__)
def test_one_graph_for_every_length(kind: type[Handwritten]) -> None:
    model, graphs = kind().eval(), Graphs()
    compiled = graphs.compile(model, dynamic=True)
    for length in (M, 7, 15):
        compare(model, compiled, torch.randn(B, length, handwritten.DIM))
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


@settings(max_examples=40, deadline=None, derandomize=True)
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


# ------------------------------------------------------------------------------------------------ masks


def _documents(positions: Tensor) -> Tensor:
    """Packed documents, causal: each begins where the positions do not go up by one."""
    before = positions[:, :1] - 1
    number = (torch.diff(positions, prepend=before, dim=-1) != 1).cumsum(-1)
    n = torch.arange(positions.shape[1])
    batch, row, key = torch.arange(len(positions))[:, None, None, None], n[None, None, :, None], n[None, None, None]
    return (key <= row) & (number[batch, row] == number[batch, key])


MASKS: dict[str, tuple[Callable[[int], Tensor], tuple[bool, int, int, bool]]] = {
    # (the mask of n keys and queries) -> (is_causal, window_left, window_right, whether a tensor is left)
    "tril": (lambda n: torch.ones(n, n, dtype=torch.bool).tril(), (True, -1, -1, False)),
    "tril of floats": (lambda n: torch.tril(torch.ones(n, n)) != 0, (True, -1, -1, False)),
    "not triu": (lambda n: ~torch.ones(n, n, dtype=torch.bool).triu(1), (True, -1, -1, False)),
    "triu == 0": (lambda n: torch.triu(torch.ones(n, n), 1) == 0, (True, -1, -1, False)),
    "arange": (lambda n: torch.arange(n)[None] <= torch.arange(n)[:, None], (True, -1, -1, False)),
    "arange, less": (lambda n: torch.arange(n)[None] < torch.arange(1, n + 1)[:, None], (True, -1, -1, False)),
    "everywhere": (lambda n: (torch.arange(n)[:, None] >= 0).expand(n, n), (False, -1, -1, False)),
    "difference": (lambda n: (torch.arange(n)[:, None] - torch.arange(n)) >= 0, (True, -1, -1, False)),
    "scaled": (lambda n: 2 * torch.arange(n)[None] <= 2 * torch.arange(n)[:, None], (False, -1, -1, True)),
    "window": (
        lambda n: ((i := torch.arange(n))[:, None] - i < 3) & (i - i[:, None] <= 2),
        (False, 2, 2, False),
    ),
    "causal window": (
        lambda n: ((i := torch.arange(n))[:, None] >= i) & ~(i[:, None] - i > 4),
        (True, 4, -1, False),
    ),
    "a view of 4 axes": (
        lambda n: torch.ones(n, n, dtype=torch.bool).tril().view(1, 1, n, n).expand(B, 1, n, n),
        (True, -1, -1, False),
    ),
    "a part of a longer one": (
        lambda n: torch.ones(2 * n, 2 * n, dtype=torch.bool).tril()[:n, :n],
        (True, -1, -1, False),
    ),
    "another part": (lambda n: torch.ones(2 * n, 2 * n, dtype=torch.bool).tril()[n:, :n], (False, -1, -1, True)),
    "above the diagonal": (lambda n: torch.ones(n, n, dtype=torch.bool).triu(0), (False, 0, -1, False)),
    "strictly below": (lambda n: torch.ones(n, n, dtype=torch.bool).tril(-1), (False, -1, -1, True)),
    "transposed": (lambda n: torch.ones(n, n, dtype=torch.bool).tril().T, (False, 0, -1, False)),
    "flipped": (lambda n: torch.ones(n, n, dtype=torch.bool).tril().flip(0), (False, -1, -1, True)),
    "either": (
        lambda n: torch.ones(n, n, dtype=torch.bool).tril() | (torch.arange(n) < 2),
        (False, -1, -1, True),
    ),
    "with padding": (
        lambda n: (
            torch.ones(n, n, dtype=torch.bool).tril() & (torch.arange(n) < torch.tensor([[n], [4]]))[:, None, None]
        ),
        (True, -1, -1, True),
    ),
    "one document, as transformers finds it": (
        lambda n: _documents(torch.arange(n)[None].expand(B, n)),
        (True, -1, -1, False),
    ),
    "documents by positions": (
        lambda n: _documents((torch.arange(n) * 2 % n)[None].expand(B, n)),
        (True, -1, -1, True),
    ),
    "documents": (
        lambda n: torch.ones(n, n, dtype=torch.bool).tril() & ((d := torch.arange(n) // 4)[:, None] == d),
        (True, -1, -1, True),
    ),
}


@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, dynamic: bool, additive: bool) -> None:
    build, (causal, left, right, tensor) = MASKS[name]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = build(q.shape[2])
        if additive:
            mask = torch.where(mask, 0.0, torch.finfo(q.dtype).min)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    graphs = Graphs("eager")
    compiled = graphs.compile(attention, dynamic=dynamic)
    for n in (9, 13) if dynamic else (9,):
        q, k, v = (torch.randn(B, HEADS, n, HEAD_DIM) for _ in range(3))
        scores = (q.double() @ k.double().mT) * HEAD_DIM**-0.5
        expected = handwritten.sigmoid(scores.masked_fill(~build(n), -math.inf), -1) @ v.double()
        close(compiled(q, k, v), expected)
    (node,) = graphs.calls
    options = node.kwargs
    assert (options["is_causal"], options["window_left"], options["window_right"]) == (causal, left, right)
    assert (node.args[4] is not None) == tensor


def test_a_mask_that_depends_on_a_length_is_no_proof() -> None:
    """The offset of a cache: the same numbers at this length only."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past = k.shape[2] - q.shape[2]
        visible = torch.arange(k.shape[2]) <= (torch.arange(q.shape[2]) + past)[:, None]
        return torch.softmax((q @ k.mT).masked_fill(~visible, -math.inf), -1) @ v

    graphs = Graphs()
    compiled = graphs.compile(attention, dynamic=True)
    for m, n in ((5, 9), (3, 7), (6, 16)):
        q, k, v = torch.randn(B, HEADS, m, D), torch.randn(B, HEADS, n, D), torch.randn(B, HEADS, n, D)
        visible = torch.ones(m, n, dtype=torch.bool).tril(n - m)
        scores = (q.double() @ k.double().mT).masked_fill(~visible, -math.inf)
        close(compiled(q, k, v), handwritten.sigmoid(scores, -1) @ v.double())
    assert len(graphs.modules) == 1 and len(graphs.calls) == 1


def test_llama_in_training_is_causal() -> None:
    """Without a cache transformers looks for packed documents, and builds a mask that is causal for all that."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=1, use_cache=False, **sizes))
    tokens = torch.randint(0, 50, (B, M))
    graphs = Graphs("eager")
    graphs.compile(model)(input_ids=tokens, labels=tokens)
    (node,) = graphs.calls
    assert node.args[4] is None and node.kwargs["is_causal"] and node.kwargs["window_left"] == -1


def calls_in(function: Callable[..., Any], *inputs: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of each call of the op in ``function``."""
    calls = []

    class Record(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is OP:
                calls.append((args, kwargs))
            return super().call_function(target, args, kwargs)

    torch._dynamo.reset()
    torch.compile(function, backend="sigswap", options={"inner": lambda module, _: Record(module).run})(*inputs)
    return calls


def operands_of(function: Callable[..., Any], *inputs: Tensor) -> list[tuple[tuple[int, ...], tuple[int, ...], bool]]:
    """Of each call of the op in ``function``: the shapes of its query and its mask, and whether it is causal."""
    calls = calls_in(function, *inputs)
    return [(tuple(args[0].shape), tuple(args[4].shape), options["is_causal"]) for args, options in calls]


def test_padding_keeps_its_small_shape() -> None:
    """The n x n mask that padding and causality were combined to is not passed on."""

    def attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        causal = torch.ones(M, M, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal & padding[:, None, None])

    q, k, v = (torch.randn(B, HEADS, M, D) for _ in range(3))
    ((_, mask, causal),) = operands_of(attention, q, k, v, torch.arange(M) < torch.tensor([[M], [5]]))
    assert (mask, causal) == ((B, 1, 1, M), True)


@pytest.mark.parametrize("expanded", [False, True])
def test_a_bias_with_its_heads_last_is_turned(expanded: bool) -> None:
    """T5's comes from an embedding of the heads. In the graph, so that attentions that share it share the copy."""

    def attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        bias = table.permute(2, 0, 1).unsqueeze(0)
        if expanded:  # a copy would be larger than what it is a copy of
            bias = bias.expand(B, -1, -1, -1)
        return torch.softmax(q @ k.mT + bias, -1) @ v

    q, k, v, table = *(torch.randn(B, HEADS, M, D) for _ in range(3)), torch.randn(M, M, HEADS)
    (((_, _, _, _, mask, *_), _),) = calls_in(attention, q, k, v, table)
    assert mask.stride() == ((0, 1, HEADS * M, HEADS) if expanded else (HEADS * M * M, M * M, M, 1))
    assert mask.untyped_storage().nbytes() == table.nbytes
    close(mask[-1], table.permute(2, 0, 1), 0.0)


def _tril(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def _prefixed(n: int) -> Tensor:
    """The first rows see the first keys only; no band. Row 2 sees no key."""
    visible = torch.ones(n, n, dtype=torch.bool)
    return torch.where(torch.arange(n)[:, None] < 3, torch.arange(n) < 3 - torch.arange(n)[:, None] * 3 // 2, visible)


PADDED = torch.tensor([[9], [4]])
BIASES: dict[str, tuple[Callable[[Tensor, int], Tensor], Callable[[int], Tensor], bool, int]] = {
    # (the bias of n keys, under a mask) -> (what is visible, is_causal, the batch size of the op's mask)
    "where": (lambda b, n: torch.where(_tril(n), b, -math.inf), _tril, True, 1),
    "where, lowest number": (lambda b, n: torch.where(_tril(n), b, torch.finfo(b.dtype).min), _tril, True, 1),
    "masked_fill": (lambda b, n: b.masked_fill(~_tril(n), -1e9), _tril, True, 1),
    "a copy": (lambda b, n: torch.where(_tril(n).expand(B, 1, n, n), b, -math.inf).contiguous(), _tril, True, 1),
    "twice": (
        lambda b, n: torch.where(_tril(n), b, -math.inf).masked_fill(~(torch.arange(n)[:, None] >= 0), -math.inf),
        _tril,
        True,
        1,
    ),
    "everywhere": (
        lambda b, n: torch.where((torch.arange(n)[:, None] >= 0).expand(B, 1, n, n), b, -math.inf),
        lambda n: torch.ones(n, n, dtype=torch.bool),
        False,
        1,
    ),
    "padding": (
        lambda b, n: torch.where((torch.arange(n) < PADDED)[:, None, None], b, -math.inf),
        lambda n: (torch.arange(n) < PADDED)[:, None, None],
        False,
        1,
    ),
    "padding, a number added": (
        lambda b, n: b + (1.0 - (torch.arange(n) < PADDED)[:, None, None].to(b.dtype)) * -1e4,
        lambda n: (torch.arange(n) < PADDED)[:, None, None],
        False,
        1,
    ),
    "padding, a float mask added first": (
        lambda b, n: (
            torch.where((torch.arange(n) < PADDED)[:, None, None], b.new_zeros(()), torch.finfo(b.dtype).min) + b
        ),
        lambda n: (torch.arange(n) < PADDED)[:, None, None],
        False,
        1,
    ),
    "padding on the left": (
        lambda b, n: torch.where((torch.arange(n) >= n - PADDED)[:, None, None], b, -math.inf),
        lambda n: (torch.arange(n) >= n - PADDED)[:, None, None],
        False,
        1,
    ),
    "causal, and padding on the left": (
        lambda b, n: torch.where(_tril(n) & (torch.arange(n) >= n - PADDED)[:, None, None], b, -math.inf),
        lambda n: _tril(n) & (torch.arange(n) >= n - PADDED)[:, None, None],
        True,
        1,
    ),
    "a sequence of nothing but padding": (
        lambda b, n: b.masked_fill((torch.arange(n) >= PADDED - 4)[:, None, None], -math.inf),
        lambda n: (torch.arange(n) < PADDED - 4)[:, None, None],
        False,
        1,
    ),
    "padding, and a bias that hides": (
        lambda b, n: torch.where(
            (torch.arange(n) < PADDED)[:, None, None], torch.where(_prefixed(n), b, -math.inf), -math.inf
        ),
        lambda n: _prefixed(n) & (torch.arange(n) < PADDED)[:, None, None],
        False,
        1,
    ),
    "padding, half of it, and a number that does not mask": (
        lambda b, n: b + torch.where((torch.arange(n) < PADDED)[:, None, None], 0.0, -100.0),
        lambda n: torch.ones(n, n, dtype=torch.bool),
        False,
        B,
    ),
    "padding that depends on the row": (
        lambda b, n: torch.where(
            (torch.arange(n) < PADDED)[:, None, None] | torch.eye(n, dtype=torch.bool), b, -math.inf
        ),
        lambda n: (torch.arange(n) < PADDED)[:, None, None] | torch.eye(n, dtype=torch.bool),
        False,
        B,
    ),
    "a bias per sequence": (
        lambda b, n: torch.where((torch.arange(n) < PADDED)[:, None, None], b * PADDED[:, None, None] / 9, -math.inf),
        lambda n: (torch.arange(n) < PADDED)[:, None, None],
        False,
        B,
    ),
    "an edited bias under padding": (
        lambda b, n: torch.where((torch.arange(n) < PADDED)[:, None, None], c := b.clone(), -math.inf) + 0 * c.mul_(2),
        lambda n: (torch.arange(n) < PADDED)[:, None, None],
        False,
        B,
    ),
    "causal and padding": (
        lambda b, n: torch.where(_tril(n) & (torch.arange(n) < PADDED)[:, None, None], b, -math.inf),
        lambda n: _tril(n) & (torch.arange(n) < PADDED)[:, None, None],
        True,
        1,
    ),
    "a fill that does not mask": (
        lambda b, n: torch.where(_tril(n), b, -3.0),
        lambda n: torch.ones(n, n, dtype=torch.bool),
        False,
        1,
    ),
    "edited": (
        lambda b, n: torch.where(_tril(n), c := b.clone(), -math.inf) + 0 * c.add_(1),
        _tril,
        False,
        1,
    ),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", BIASES)
def test_a_bias_under_a_mask(name: str, dynamic: bool) -> None:
    """As T5's, which is one number where the causal mask hides a key: the bias stays as small as it is."""
    build, visible, causal, batch = BIASES[name]

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=build(bias, q.shape[2]))

    graphs = Graphs()
    compiled = graphs.compile(attention, dynamic=dynamic)
    for n in (9, 13) if dynamic else (9,):
        leaves = [torch.randn(B, HEADS, n, HEAD_DIM, requires_grad=True) for _ in range(3)]
        leaves += [torch.randn(1, HEADS, n, n, requires_grad=True)]
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        q, k, v, bias = exact
        scores = (q @ k.mT) * HEAD_DIM**-0.5 + torch.where(visible(n), build(bias, n), 0.0)
        expected = handwritten.sigmoid(scores.masked_fill(~visible(n), -math.inf), -1) @ v
        actual = compiled(*leaves)
        close_with_gradients(actual, expected, leaves, exact)
    assert len(graphs.calls) == 1
    q, k, v, bias = (leaf[..., :9, :9].detach() if leaf is leaves[3] else leaf[:, :, :9].detach() for leaf in leaves)
    ((_, mask, is_causal),) = operands_of(attention, q, k, v, bias)
    assert (mask, is_causal) == ((batch, HEADS, 9, 9), causal)


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_under_a_mask_and_a_row_cap(name: str) -> None:
    """Padding stays in the mask: a hidden key would be in the sum of its row."""
    build, visible, _, _ = BIASES[name]

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=build(bias, q.shape[2]))

    graphs = Graphs(row_cap=0.5)
    leaves = [torch.randn(B, HEADS, 9, HEAD_DIM, requires_grad=True) for _ in range(3)]
    leaves += [torch.randn(1, HEADS, 9, 9, requires_grad=True)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    q, k, v, bias = exact
    scores = (q @ k.mT) * HEAD_DIM**-0.5 + torch.where(visible(9), build(bias, 9), 0.0)
    expected = handwritten.capped(0.5)(scores.masked_fill(~visible(9), -math.inf), -1) @ v
    close_with_gradients(graphs.compile(attention)(*leaves), expected, leaves, exact)
    assert len(graphs.calls) == 1


def test_what_is_hidden_after_a_capped_sigmoid_is_not_lowered() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, row_cap: float) -> Tensor:
        p = probabilities(q @ k.mT, visible_bias=False, const_bias=-2.0, row_cap=row_cap)
        return p.masked_fill(~_tril(M), 0.0) @ v

    q, k, v = (torch.randn(B, HEADS, M, D) for _ in range(3))
    graphs = Graphs()
    close(graphs.compile(attention)(q, k, v, 0.5), attention(q.double(), k.double(), v.double(), 0.5))
    assert not graphs.calls
    graphs.compile(lambda *inputs: attention(*inputs, None))(q, k, v)
    assert len(graphs.calls) == 1


def test_a_bias_under_a_mask_whose_fill_depends_on_a_length() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        n = q.shape[2]
        return torch.softmax(q @ k.mT + bias.masked_fill(~_tril(n), -600 * n), -1) @ v

    graphs = Graphs()
    compiled = graphs.compile(attention, dynamic=True)
    for n in (12, 5):  # at 5 the fill is -3000, which does not mask
        q, k, v = (torch.randn(B, HEADS, n, D) for _ in range(3))
        bias = torch.randn(1, HEADS, n, n)
        scores = (q @ k.mT + bias.masked_fill(~_tril(n), -600 * n)).double()
        expected = handwritten.sigmoid(scores.masked_fill(scores <= -5000, -math.inf), -1) @ v.double()
        close(compiled(q, k, v, bias), expected)


@pytest.mark.parametrize("content", ["bias", "zero"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_bias_under_a_mask_that_is_edited_later(content: str, causal: bool) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, padding: Tensor) -> Tensor:
        padding = padding.clone()
        shown = bias if content == "bias" else torch.zeros(())
        added = torch.where(_tril(M) & padding if causal else padding, shown, -math.inf)
        padding.logical_not_()
        return torch.softmax(q @ k.mT + added, -1) @ v

    q, k, v = (torch.randn(B, HEADS, M, D) for _ in range(3))
    bias, padding = torch.randn(1, HEADS, M, M), (torch.arange(M) < torch.tensor([[M], [4]]))[:, None, None]
    visible = _tril(M) & padding if causal else padding
    added = torch.where(visible, bias if content == "bias" else torch.zeros(()), -math.inf)
    expected = handwritten.sigmoid((q @ k.mT + added).double(), -1) @ v.double()
    graphs = Graphs()
    close(graphs.compile(attention)(q, k, v, bias, padding), expected)
    assert len(graphs.calls) == 1


def test_a_bias_that_was_masked_without_gradients_has_none() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        with torch.no_grad():
            added = torch.where(_tril(M), bias, -math.inf)
        return torch.softmax(q @ k.mT + added, -1) @ v

    q, k, v = (torch.randn(B, HEADS, M, D).requires_grad_() for _ in range(3))
    bias = torch.randn(1, HEADS, M, M).requires_grad_()
    Graphs().compile(attention)(q, k, v, bias).sum().backward()
    assert bias.grad is None and q.grad is not None


def test_a_bias_under_a_mask_from_outside_of_a_checkpoint() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, padding: Tensor) -> Tensor:
        visible = _tril(M) & padding

        def inside(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, visible: Tensor) -> Tensor:
            return torch.softmax(q @ k.mT + torch.where(visible, bias, -math.inf), -1) @ v

        return checkpoint(inside, q, k, v, bias, visible, use_reentrant=False)

    q, k, v = (torch.randn(B, HEADS, M, D).requires_grad_() for _ in range(3))
    bias, padding = torch.randn(1, HEADS, M, M), (torch.arange(M) < torch.tensor([[M], [4]]))[:, None, None]
    graphs = Graphs()
    actual = graphs.compile(attention)(q, k, v, bias, padding)
    added = torch.where(_tril(M) & padding, bias, -math.inf)
    close(actual.detach(), handwritten.sigmoid((q @ k.mT + added).double(), -1).detach() @ v.detach().double())
    assert len(graphs.calls) == 1


# (the probabilities of scores and a bias under padding, the heads of keys and values)
PADDED_FORMS: dict[str, tuple[Callable[[Tensor, Tensor, Callable[..., Tensor]], Tensor], int]] = {
    "soft cap": (lambda scores, bias, normalise: normalise(torch.tanh(scores / 2.0) * 2.0 + bias, -1), HEADS),
    "grouped heads": (lambda scores, bias, normalise: normalise(scores + bias, -1), HEADS // 2),
    "row bias": (
        lambda scores, bias, normalise: normalise(
            scores + scores.new_tensor([-1.0, 2.0])[:, None, None, None] + bias, -1
        ),
        HEADS,
    ),
    "a fixed bias": (lambda scores, bias, normalise: torch.sigmoid(scores + bias - 2.0), HEADS),
}


@pytest.mark.parametrize("band", ["none", "causal", "window"])
@pytest.mark.parametrize("name", PADDED_FORMS)
def test_a_bias_under_padding_in_other_forms(name: str, band: str) -> None:
    form, heads = PADDED_FORMS[name]

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, normalise: Any = handwritten.softmax) -> Tensor:
        visible = torch.arange(M) < torch.tensor([[M], [5]])[:, None, None]
        if band != "none":
            visible = visible & _tril(M)
        if band == "window":
            visible = visible & torch.ones(M, M, dtype=torch.bool).triu(-3)
        k, v = (
            t[:, :, None].expand(B, heads, HEADS // heads, M, D).reshape(B, HEADS, M, D) if heads < HEADS else t
            for t in (k, v)
        )
        return form(q @ k.mT, torch.where(visible, bias, -math.inf), normalise) @ v

    shapes = (B, HEADS, M, D), (B, heads, M, D), (B, heads, M, D), (1, HEADS, M, M)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    graphs = Graphs()
    actual, expected = graphs.compile(attention)(*leaves), attention(*exact, handwritten.sigmoid)
    grads = close_with_gradients(actual, expected, leaves, exact)
    for ours in grads[1:3]:
        assert not ours[1, :, 5:].any()  # of padding
    (node,) = graphs.calls
    assert node.kwargs["visible_bias"] is False and node.kwargs["is_causal"] == (band != "none")
    assert node.kwargs["window_left"] == (3 if band == "window" else -1)
    ((_, mask, _),) = operands_of(attention, *(leaf.detach() for leaf in leaves))
    assert mask == (1, HEADS, M, M)


def test_dropout_of_a_bias_under_padding() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, p: float = 0.25) -> Tensor:
        padding = (torch.arange(M) < torch.tensor([[M], [5]]))[:, None, None]
        scores = q @ k.mT + torch.where(padding, bias, -math.inf)
        return F.dropout(handwritten.sigmoid(scores, -1) if p == 0 else torch.softmax(scores, -1), p) @ v

    inputs = [torch.randn(B, HEADS, M, D) for _ in range(3)] + [torch.randn(1, HEADS, M, M)]
    graphs = Graphs()
    compiled = graphs.compile(attention)
    mean = torch.stack([compiled(*inputs) for _ in range(400)]).double().mean(0)
    expected = attention(*(each.double() for each in inputs), p=0.0)
    assert graphs.calls[0].kwargs["dropout_p"] == 0.25
    assert (mean - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("inside", [False, True])
def test_keys_are_counted_exactly_under_autocast(inside: bool) -> None:
    """bfloat16 has no 301."""
    n = 301
    q, k, bias = torch.zeros(B, 2, 2, D), torch.zeros(B, 2, n, D), torch.zeros(1, 1, 2, n)
    padding = (torch.arange(n) < torch.tensor([[n], [259]]))[:, None, None]

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT + torch.where(padding, bias, -math.inf), -1) @ v

    def function(*inputs: Tensor) -> Tensor:
        if not inside:
            return attention(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            return attention(*inputs)

    seen: list[Tensor] = []

    class Record(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            seen.extend([args[3]] if target is OP else [])
            return super().call_function(target, args, kwargs)

    torch._dynamo.reset()
    options = {"inner": lambda module, _: Record(module).run}
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        torch.compile(function, backend="sigswap", options=options)(q, k, k, bias)
    torch.testing.assert_close(seen[0][:, 0, 0, 0], -torch.tensor([n, 259.0]).log(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", ["plain", "edited", "crossed", "half edited"])
def test_layers_count_the_keys_that_they_share_once(case: str) -> None:
    """If nothing changes in between, and where it was counted comes first."""

    def layers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, padding: Tensor, normalise: Any) -> Tensor:
        weights = []
        for _ in range(2):
            weights.append(normalise(q @ k.mT + torch.where(padding, bias, -math.inf), -1))
            if case == "edited":
                bias.mul_(2.0)
            elif case == "half edited":
                padding[0, ..., 3:7].fill_(False)
        if case == "crossed":
            return weights[1] @ v - weights[0] @ v.flip(2)
        return weights[0] @ v - weights[1] @ v.flip(2)

    inputs = [torch.randn(B, HEADS, M, D) for _ in range(3)] + [torch.randn(1, HEADS, M, M)]
    padding = (torch.arange(M) < torch.tensor([[M], [5]]))[:, None, None]
    expected = layers(*(each.double() for each in inputs), padding.clone(), handwritten.sigmoid)
    graphs = Graphs()
    close(graphs.compile(layers)(*inputs, padding, handwritten.softmax), expected)
    assert len(graphs.calls) == 2
    if case == "plain":
        first, second = graphs.calls
        assert first.args[3] is second.args[3] and first.args[4] is second.args[4]


# ---------------------------------------------------------------------------------------------- regions


class Dropped(Handwritten):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged(F.dropout(self.normalise(q @ k.mT, -1), 0.25, self.training) @ v)


def test_dropout_becomes_the_ops() -> None:
    model, graphs = Dropped().train(), Graphs()
    compiled = graphs.compile(model)
    x = torch.randn(B, M, handwritten.DIM)
    with torch.no_grad():
        mean = torch.stack([compiled(x) for _ in range(400)]).double().mean(0)
        expected = oracle_of(model).eval()(x.double())
    (node,) = graphs.calls
    assert node.kwargs["dropout_p"] == 0.25
    assert not [n for n in graphs.nodes if getattr(n.target, "__name__", "") == "dropout"]
    assert (mean - expected).abs().max() < 0.1 * expected.abs().max()


class Checkpointed(Handwritten):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._attention, x, torch.ones(x.shape[1], x.shape[1]).tril() == 0, use_reentrant=False)

    def _attention(self, x: Tensor, hidden: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged(self.normalise((q @ k.mT).masked_fill(hidden, -math.inf), -1) @ v)


def test_checkpointed_regions_are_lowered() -> None:
    model, graphs = Checkpointed(), Graphs()
    compare(model, graphs.compile(model), torch.randn(B, M, handwritten.DIM))
    assert len(graphs.calls) == 1 and graphs.calls[0].kwargs["is_causal"]


class Autocast(Handwritten):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype != torch.float64):
            out = self.normalise(q @ k.mT * 0.3, -1) @ v
        return self.merged(out.to(x.dtype))


def test_autocast_regions() -> None:
    model, graphs = Autocast().eval(), Graphs()
    x = torch.randn(B, M, handwritten.DIM)
    actual = graphs.compile(model)(x)
    assert len(graphs.calls) == 1
    close(actual.detach(), oracle_of(model)(x.double()).detach(), 3e-2)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_a_region_without_autocast_under_autocast(checkpointed: bool) -> None:
    """They are as exact as in eager. In the graph that is not lowered they are not (3e-3): PyTorch traces the backward
    under the outer autocast (``torch._functorch.config.backward_pass_autocast``), which rounds its products."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(q @ k.mT * 0.3 - 2.0) @ v

    def region(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return attention(*inputs)

    def function(*inputs: Tensor) -> Tensor:
        return checkpoint(region, *inputs, use_reentrant=False) if checkpointed else region(*inputs)

    inputs = [torch.randn(B, HEADS, M, D).requires_grad_() for _ in range(3)]
    doubles = [each.detach().double().requires_grad_() for each in inputs]
    graphs = Graphs()
    with torch.autocast("cpu", torch.bfloat16):
        actual = graphs.compile(function)(*inputs)
    expected = attention(*doubles)
    assert len(graphs.calls) == 1
    close_with_gradients(actual, expected, inputs, doubles)


def test_a_region_without_gradients_is_not_crossed() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            weights = torch.sigmoid(q @ k.mT)
        return weights @ v

    q, k, v = (torch.randn(B, HEADS, M, D).requires_grad_() for _ in range(3))
    graphs = Graphs()
    graphs.compile(attention)(q, k, v).sum().backward()
    assert not graphs.calls and q.grad is None and v.grad is not None


def test_half_precision_stays_half() -> None:
    """An upcast of query and key, whose products are exact anyway, is left out; that of the scores, too."""

    class Upcast(Handwritten):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            scores = q.float() @ k.float().mT * 0.3 if q.dtype != torch.float64 else q @ k.mT * 0.3
            return self.merged(self.normalise(scores, -1).to(v.dtype) @ v)

    model, graphs = Upcast().bfloat16().eval(), Graphs()
    x = torch.randn(B, M, handwritten.DIM).bfloat16()
    actual = graphs.compile(model)(x)
    above = list(graphs.calls[0].all_input_nodes)
    for node in above:
        assert node.target != "float"
        above += node.all_input_nodes
    close(actual.detach(), oracle_of(model)(x.double()).detach(), 3e-2)


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


def test_a_mask_per_window_is_not_repeated() -> None:
    """Swin's: as large as the windows of one image, for a batch of images."""
    model = handwritten.CosineWindows()
    with torch.no_grad():
        ((query, mask, _),) = operands_of(model, torch.randn(3, 12, handwritten.DIM))
    assert (query, mask) == ((6, HEADS, 6, HEAD_DIM), (2, HEADS, 6, 6))


# --------------------------------------------------------------------- what a review found, once each

INF = math.inf


def _prefix(n: int) -> Tensor:
    mask = torch.full((n, n), -INF)
    mask[:, :3] = 0
    return mask.triu(1)


def _assigned(n: int) -> Tensor:
    hidden = torch.zeros(n, n, dtype=torch.bool)
    hidden[:, 4:] = True
    return torch.zeros(n, n).masked_fill(hidden, -INF)


def _wrapped(n: int) -> Tensor:
    i = torch.arange(n, dtype=torch.uint8)
    return torch.where(i[:, None] - i >= 0, 0.0, -INF)


EDITED_MASKS: dict[str, Callable[[int], Tensor]] = {
    "a prefix, written into -inf": _prefix,
    "assigned": _assigned,
    "integers that wrap around": _wrapped,
    "a condition that always holds": lambda n: torch.where(torch.ones(n, n).tril() >= 0, 0.0, -INF),
    "floats below the diagonal": lambda n: torch.where(torch.ones(n, n).tril(-1) == 0, 0.0, -INF),
    "a sum with a boolean": lambda n: torch.ones(n, n, dtype=torch.bool).tril() + torch.zeros(n, n),
}


@pytest.mark.parametrize("name", EDITED_MASKS)
def test_masks_that_are_not_what_they_seem(name: str) -> None:
    q, k, v = (torch.randn(B, HEADS, M, D) for _ in range(3))
    mask = EDITED_MASKS[name]
    actual = Graphs().compile(lambda q, k, v: torch.softmax(q @ k.mT + mask(M), -1) @ v)(q, k, v)
    close(actual, handwritten.sigmoid(q.double() @ k.double().mT + mask(M).double(), -1) @ v.double())


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: torch.sigmoid(q @ k.mT / q.shape[2]) @ v,
        lambda q, k, v: torch.sigmoid((q @ k.mT).clamp(-2e4, 2e4) * 1e-4) @ v,
        lambda q, k, v: torch.sigmoid(q @ k.mT + torch.ones(q.shape[2]).bool()) @ v,
        lambda q, k, v: (torch.sigmoid(q @ k.mT) @ v).view(B * HEADS, -1, D),
        lambda q, k, v: (torch.sigmoid(q @ k.mT) @ v).reshape(B, q.shape[2], -1),
        lambda q, k, v: torch.sigmoid(q @ k.mT) @ torch.sigmoid(k @ q.mT) @ v,
        lambda q, k, v: torch.sigmoid(torch.bmm(q[0], k[0].mT)).masked_fill(v[:, :1, :, :1] > 0, 0.0) @ v,
        lambda q, k, v: torch.sigmoid((o := torch.sigmoid(q @ k.mT).flatten(0, 1) @ v.flatten(0, 1)) @ o.mT) @ o,
    ],
    ids=["length", "clamp", "boolean", "view", "reshape", "two", "broadcast", "chain"],
)
def test_sigmoids_that_a_review_broke(function: Callable[..., Tensor]) -> None:
    compiled = Graphs().compile(function, dynamic=True)
    for length in (9, 13):
        tensors = [torch.randn(B, HEADS, length, D) for _ in range(3)]
        torch.testing.assert_close(compiled(*tensors), function(*tensors), rtol=1e-4, atol=1e-4)


def test_a_copy_without_gradients_stays_without() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            copied = k.clone()
        return torch.sigmoid(q @ copied.mT) @ v

    q, k, v = (torch.randn(B, HEADS, M, D).requires_grad_() for _ in range(3))
    Graphs().compile(attention)(q, k, v).sum().backward()
    assert k.grad is None and q.grad is not None


def test_head_dim_may_vary() -> None:
    compiled = Graphs().compile(F.scaled_dot_product_attention, dynamic=True)
    for dim in (8, 16):
        q, k, v = (torch.randn(3, 5, 7, dim) for _ in range(3))
        expected = handwritten.sigmoid(q.double() @ k.double().mT * dim**-0.5, -1) @ v.double()
        close(compiled(q, k, v), expected)
