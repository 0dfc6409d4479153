"""Attention whose softmax is not one call of softmax over the keys: in pieces, by its logarithm, over sinks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sigswap
from sigswap import SigmoidConfig, errors
from sigswap.conversion.install import apply_conversion
from sigswap.conversion.record import Conversion, conversion_of
from tests.support.oracle import sigmoid_of_scores

N = 6
FUTURE = torch.ones(N, N).triu(1).bool()
WEIGHTS = torch.rand(N, N, generator=torch.Generator().manual_seed(2)) + 0.1
X = torch.randn(2, N, 16, generator=torch.Generator().manual_seed(1))
Probabilities = Callable[[Tensor], Tensor]


class Attention(nn.Module):
    """[B, N, 16], two heads; ``probabilities``: of the scores, and a learned sink per head to them."""

    def __init__(self, probabilities: Callable[[Attention, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.probabilities = nn.Linear(16, 48), probabilities
        self.sinks = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(*t.shape[:-1], 2, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return (self.probabilities(self, q @ k.mT * 0.7) @ v).transpose(1, 2).flatten(2)


def divided(e: Tensor) -> Tensor:
    return e / e.sum(-1, keepdim=True)


def in_place(s: Tensor) -> Tensor:
    e = s.exp_()
    e /= e.sum(-1, keepdim=True)
    return e


def written_to(s: Tensor) -> Tensor:
    """All of it, but the gradient, for torch writes to no tensor that it is given where there is one."""
    if s.requires_grad:
        return divided(s.exp())
    e, total = torch.empty_like(s), torch.empty_like(s[..., :1])
    torch.exp(s, out=e)
    torch.sum(e, -1, keepdim=True, out=total)
    torch.div(e, total, out=e)
    return e


def with_sink(s: Tensor, sinks: Tensor, first: bool = False) -> Tensor:
    sink = sinks.reshape(1, -1, 1, 1).expand(s.shape[0], -1, s.shape[2], 1)
    return torch.cat([sink, s] if first else [s, sink], dim=-1)


def gpt_oss(a: Attention, s: Tensor) -> Tensor:
    logits = with_sink(s.masked_fill(FUTURE, torch.finfo(s.dtype).min), a.sinks)
    logits = logits - logits.max(dim=-1, keepdim=True).values
    return F.softmax(logits, dim=-1, dtype=logits.dtype)[..., :-1]


def causal(s: Tensor) -> Tensor:
    return sigmoid_of_scores(s, visible=~FUTURE)


SPELLINGS: dict[str, tuple[Callable[[Attention, Tensor], Tensor], Probabilities]] = {
    "by hand": (lambda a, s: divided(s.exp()), sigmoid_of_scores),
    "torch.exp": (lambda a, s: torch.div(e := torch.exp(s), torch.sum(e, -1, True)), sigmoid_of_scores),
    "maximum": (lambda a, s: divided((s - s.amax(-1, keepdim=True)).exp()), sigmoid_of_scores),
    "values": (lambda a, s: divided((s - s.max(-1, keepdim=True)[0].detach()).exp()), sigmoid_of_scores),
    "epsilon": (lambda a, s: (e := s.exp()) / (e.sum(-1, keepdim=True) + 1e-2), sigmoid_of_scores),
    "clamped": (lambda a, s: (e := s.exp()) / e.sum(-1, keepdim=True).clamp(min=1e-6), sigmoid_of_scores),
    "unsqueezed": (lambda a, s: (e := s.exp()) / e.sum(-1)[..., None], sigmoid_of_scores),
    "masked before": (lambda a, s: divided(s.masked_fill(FUTURE, -torch.inf).exp()), causal),
    "masked by where": (lambda a, s: divided(torch.where(FUTURE, -torch.inf, s).exp()), causal),
    "multiplied": (lambda a, s: divided(s.exp() * (~FUTURE).float()), causal),
    "multiplied in place": (lambda a, s: divided(s.exp().mul_((~FUTURE).float())), causal),
    "where": (lambda a, s: divided(torch.where(FUTURE, 0.0, s.exp())), causal),
    "masked_fill": (lambda a, s: divided((s - s.amax(-1, keepdim=True)).exp().masked_fill(FUTURE, 0)), causal),
    "weighted": (lambda a, s: divided(s.exp() * WEIGHTS), lambda s: sigmoid_of_scores(s + WEIGHTS.to(s.dtype).log())),
    "in place": (lambda a, s: in_place(s), sigmoid_of_scores),
    "reciprocal": (lambda a, s: (e := s.exp()) * (1 / e.sum(-1, keepdim=True)), sigmoid_of_scores),
    "reciprocal first": (
        lambda a, s: (e := (s - s.amax(-1, keepdim=True)).exp() * (~FUTURE)).sum(-1)[..., None].reciprocal() * e,
        causal,
    ),
    "times in place": (
        lambda a, s: (e := s.exp()).mul_((e.sum(-1, keepdim=True) + 1e-3).reciprocal()),
        sigmoid_of_scores,
    ),
    "by torch.div": (lambda a, s: torch.mul(e := s.exp(), torch.div(1.0, e.sum(-1)).unsqueeze(-1)), sigmoid_of_scores),
    "weighted reciprocal": (
        lambda a, s: 1 / (e := s.exp() * WEIGHTS).sum(-1, keepdim=True) * e,
        lambda s: sigmoid_of_scores(s + WEIGHTS.to(s.dtype).log()),
    ),
    "power": (lambda a, s: (e := s.exp()) * e.sum(-1, keepdim=True) ** -1, sigmoid_of_scores),
    "torch.pow": (lambda a, s: torch.mul(e := s.exp(), torch.pow(e.sum(-1, keepdim=True), -1)), sigmoid_of_scores),
    "a maximum that is read": (lambda a, s: (s - s.detach().max().item()).softmax(-1), sigmoid_of_scores),
    "a maximum that is read and added": (lambda a, s: (s + -float(s.detach().max())).softmax(-1), sigmoid_of_scores),
    "in float64": (lambda a, s: divided(s.double().exp()).to(s.dtype), sigmoid_of_scores),
    "logsumexp": (lambda a, s: (s - s.logsumexp(-1, keepdim=True)).exp(), sigmoid_of_scores),
    "logsumexp in place": (lambda a, s: (s - torch.logsumexp(s, -1)[..., None]).exp_(), sigmoid_of_scores),
    "masked logsumexp": (
        lambda a, s: torch.exp((t := s.masked_fill(FUTURE, -torch.inf)) - torch.logsumexp(t, -1, keepdim=True)),
        causal,
    ),
    "log_softmax": (lambda a, s: F.log_softmax(s, dim=-1).exp(), sigmoid_of_scores),
    "log_softmax masked": (lambda a, s: torch.exp(s.masked_fill(FUTURE, -torch.inf).log_softmax(-1)), causal),
    "log_softmax in float32": (lambda a, s: torch.log_softmax(s, -1, torch.float32).exp(), sigmoid_of_scores),
    "sink": (lambda a, s: with_sink(s, a.sinks).softmax(-1)[..., :-1], sigmoid_of_scores),
    "sink first": (lambda a, s: with_sink(s, a.sinks, True).softmax(-1)[..., 1:], sigmoid_of_scores),
    "gpt-oss": (gpt_oss, causal),
    "softmax1": (lambda a, s: F.pad(s, (0, 1)).softmax(-1)[..., :-1], sigmoid_of_scores),
    "padded": (lambda a, s: F.pad(s, (0, 2), value=-torch.inf).softmax(-1)[..., :-2], sigmoid_of_scores),
}


def expected(name: str) -> Tensor:
    want = Attention(lambda a, s: SPELLINGS[name][1](s)).double()
    return want(X.double())


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    error = ((a.double() - b).abs().max() / b.abs().max()).item()
    assert error <= tolerance, error


@pytest.mark.slow
@pytest.mark.parametrize("name", SPELLINGS)
def test_is_swapped(name: str) -> None:
    model = Attention(SPELLINGS[name][0])
    before = model(X)
    sigswap.convert(model, example_inputs=X)
    got = model(X)
    close(got, expected(name))
    with sigswap.softmax(model):
        assert torch.equal(model(X), before)
    want = Attention(lambda a, s: SPELLINGS[name][1](s)).double()
    want(X.double()).square().sum().backward()
    got.square().sum().backward()
    close(model.qkv.weight.grad, want.qkv.weight.grad, 1e-4)
    plan = Conversion.from_dict(json.loads(json.dumps(conversion_of(model).to_dict())))
    again = apply_conversion(Attention(SPELLINGS[name][0]), plan)
    assert torch.equal(again(X), got)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "maximum",
        "multiplied",
        "masked_fill",
        "log_softmax",
        "gpt-oss",
        "sink first",
        "reciprocal",
        "weighted reciprocal",
        "logsumexp",
    ],
)
def test_compiled(name: str) -> None:
    """A converted model under another backend, and a plain one under backend="sigswap"."""
    torch._dynamo.reset()
    converted = sigswap.convert(Attention(SPELLINGS[name][0]), example_inputs=X)
    close(torch.compile(converted, backend="aot_eager", fullgraph=True)(X), expected(name))
    plain = torch.compile(Attention(SPELLINGS[name][0]), backend="sigswap", options={"inner": "aot_eager"})
    close(plain(X), expected(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maximum", "multiplied", "log_softmax"])
@pytest.mark.parametrize("options", [{}, {"query_bias": True}, {"row_cap": 0.1}, {"first_token": True}], ids=str)
def test_calibrated(name: str, options: dict[str, Any]) -> None:
    """As if it called softmax."""
    fitted = []
    for form in (
        SPELLINGS[name][0],
        lambda a, s: (s.masked_fill(FUTURE, -torch.inf) if name == "multiplied" else s).softmax(-1),
    ):
        model = sigswap.convert(Attention(form), SigmoidConfig(**options), example_inputs=X)
        sigswap.calibrate(model, [X], progress=False)
        fitted.append(dict(model.sigswap.named_parameters()))
    assert fitted[0].keys() == fitted[1].keys() and fitted[0]
    for parameter, value in fitted[1].items():
        assert torch.allclose(fitted[0][parameter], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sink", "sink first", "gpt-oss", "softmax1"])
@pytest.mark.parametrize("options", [{}, {"query_bias": True}], ids=str)
def test_sinks_are_in_what_is_calibrated(name: str, options: dict[str, Any]) -> None:
    """The row's sum has them, so that the bias makes up for them, and the outputs come nearer."""
    model = Attention(SPELLINGS[name][0])
    if name != "softmax1":
        nn.init.constant_(model.sinks, 3.0)
    before = model(X)
    sigswap.convert(model, SigmoidConfig(**options), example_inputs=X)
    error = (model(X) - before).square().sum()
    sigswap.calibrate(model, [X], progress=False)
    assert (model(X) - before).square().sum() < (0.5 if options else 0.9) * error


@pytest.mark.parametrize(
    "probabilities",
    [
        written_to,
        lambda s: torch.softmax(s, -1, out=torch.empty(0)),
        lambda s: torch.log_softmax(s, -1, out=(e := torch.empty_like(s))) is e and torch.exp(e, out=e),
        lambda s: torch.softmax(s - torch.amax(s, -1, keepdim=True, out=torch.empty(0)), -1, out=s),
        lambda s: divided(torch.exp(s, out=s)),
    ],
    ids=["by hand", "softmax", "log_softmax", "maximum", "scores"],
)
@torch.no_grad()
def test_into_a_tensor_that_is_given(probabilities: Probabilities) -> None:
    model = Attention(lambda a, s: probabilities(s))
    before = model(X)
    sigswap.convert(model, example_inputs=X)
    close(model(X), expected("by hand"))
    sigswap.calibrate(model, [X], progress=False)
    assert torch.equal(sigswap.revert(model)(X), before)


def test_what_is_not_whole_is_an_error() -> None:
    forms = ["divided"]

    def sometimes(a: Attention, s: Tensor) -> Tensor:
        e = s.exp()
        if forms[-1] == "divided":
            return e / e.sum(-1, keepdim=True)
        return e if forms[-1] == "not" else (e * 1.0).sum(-1, keepdim=True) / 2 + e

    model = sigswap.convert(Attention(sometimes), example_inputs=X)
    model(X)
    for form in ("not", "other"):
        forms.append(form)
        with pytest.raises(errors.UnknownCallError, match="written by hand"):
            model(X)


REFUSED: dict[str, tuple[Callable[[Attention, Tensor], Tensor], str]] = {
    "sink that is kept": (lambda a, s: with_sink(s, a.sinks).softmax(-1)[..., 1:], "not dropped"),
    "logsumexp that is used": (lambda a, s: (s - (n := s.logsumexp(-1, keepdim=True))).exp() * n.sigmoid(), "by hand"),
    "logsumexp of others": (lambda a, s: (s - (2 * s).logsumexp(-1, keepdim=True)).exp(), "by hand"),
    "power": (lambda a, s: divided(math.e**s), "by hand"),
    "log_softmax to another base": (lambda a, s: torch.exp2(s.log_softmax(-1) / math.log(2)), "log_softmax is changed"),
    "log_softmax and more": (lambda a, s: (s.log_softmax(-1) * 2).exp(), "log_softmax is changed"),
    "mean that is read": (lambda a, s: (s - s.mean().item()).softmax(-1), "shifted"),
    "heads mixed by a product": (
        lambda a, s: (a.qkv.weight[:2, :2] @ s.flatten(2)).unflatten(2, (N, N)).softmax(-1),
        "cannot be followed",
    ),
    "heads mixed by tensordot": (
        lambda a, s: torch.tensordot(a.qkv.weight[:2, :2], s, ([1], [1])).transpose(0, 1).softmax(-1),
        "tensordot",
    ),
    "no sum": (lambda a, s: (s - 3).exp(), "by hand"),
    "norm": (lambda a, s: F.normalize(s.exp(), p=1, dim=-1), "by hand"),
    "running sum": (lambda a, s: (e := s.exp()) / e.cumsum(-1)[..., -1:], "by hand"),
    "sum by einsum": (lambda a, s: (e := s.exp()) / torch.einsum("bhij->bhi", e)[..., None], "by hand"),
    "masked and normalised again": (lambda a, s: divided(s.softmax(-1) * ~FUTURE), "normalised again"),
    "exp2": (lambda a, s: divided(torch.exp2(s)), "by hand"),
    "another division": (lambda a, s: (e := s.exp()) / (e / 2).sum(-1, keepdim=True), "by hand"),
    "first score": (lambda a, s: (s - s[..., :1]).softmax(-1), "shifted"),
    "own score": (lambda a, s: (s - s.diagonal(dim1=-2, dim2=-1)[..., None]).softmax(-1), "shifted"),
    "minimum": (lambda a, s: (s - s.amin(-1, keepdim=True)).softmax(-1), "shifted"),
    "topk": (lambda a, s: torch.zeros_like(s).scatter(-1, *reversed(s.softmax(-1).topk(2))), "topk"),
    "threshold": (lambda a, s: F.threshold(s.softmax(-1), 0.1, 0.0), "threshold"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_in_doubt(name: str) -> None:
    with pytest.raises(errors.UnswappableSiteError, match=REFUSED[name][1]):
        sigswap.convert(Attention(REFUSED[name][0]), example_inputs=X)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_is_in_doubt_where_it_is_compiled(name: str) -> None:
    torch._dynamo.reset()
    model = torch.compile(Attention(REFUSED[name][0]), backend="sigswap", options={"inner": "eager"})
    with pytest.raises(Exception, match=f"{REFUSED[name][1]}|the graph breaks"):
        model(X)


def test_distances_of_pairs_are_in_doubt() -> None:
    class Distances(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return torch.softmax(-F.pairwise_distance(q[:, :, None], k[:, None]), -1) @ v

    with pytest.raises(errors.UnswappableSiteError, match="pairwise_distance"):
        sigswap.convert(Distances(lambda a, s: s), example_inputs=X)


ONE_SEQUENCE: dict[str, Callable[[Tensor, Tensor, Tensor, Attention], Tensor]] = {
    "addmm": lambda q, k, v, a: torch.addmm(a.qkv.bias[:1], q, k.mT).softmax(-1) @ v,
    "addmm of a value": lambda q, k, v, a: torch.addmm(q, (q @ k.mT).softmax(-1), v),
    "addbmm": lambda q, k, v, a: torch.addbmm(q.new_zeros(N, N), q[None], k.mT[None]).softmax(-1) @ v,
    "addmv": lambda q, k, v, a: torch.addmv(a.qkv.bias[:1], k, q[0]).softmax(0) @ v,
    "mv of a value": lambda q, k, v, a: v.mT.mv((k @ q[0]).softmax(0)),
    "outer": lambda q, k, v, a: torch.outer(q[:, 0], k[:, 0]).softmax(-1) @ v,
    "vecdot": lambda q, k, v, a: torch.linalg.vecdot(q[:, None], k[None]).softmax(-1) @ v,
    "multi_dot": lambda q, k, v, a: torch.linalg.multi_dot([q, k.mT, k, q.mT]).softmax(-1) @ v,
    "multi_dot of a value": lambda q, k, v, a: torch.linalg.multi_dot([(q @ k.mT).softmax(-1), v, a.qkv.weight[:16]]),
    "bilinear": lambda q, k, v, a: (
        F.bilinear(q.repeat_interleave(N, 0), k.repeat(N, 1), a.qkv.weight[None, :16]).view(N, N).softmax(-1) @ v
    ),
    "inner of one tensor": lambda q, k, v, a: torch.inner(q, q).softmax(-1) @ v,
    "embedding_bag": lambda q, k, v, a: F.embedding_bag(
        torch.arange(N).expand(N, N), v, per_sample_weights=(q @ k.mT).softmax(-1), mode="sum"
    ),
}


@pytest.mark.parametrize("name", ONE_SEQUENCE)
def test_products_of_other_names_are_in_doubt(name: str) -> None:
    class OneSequence(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return ONE_SEQUENCE[name](*self.qkv(x[0]).chunk(3, -1), self)

    model = OneSequence(lambda a, s: s)
    model(X)
    with pytest.raises(errors.UnswappableSiteError):
        sigswap.convert(nn.Sequential(Attention(lambda a, s: s.softmax(-1)), model), example_inputs=X)


NO_ATTENTION: dict[str, Callable[[Tensor, Attention], Tensor]] = {
    "classifier": lambda y, a: torch.addmm(a.qkv.bias, y, a.qkv.weight.mT).softmax(-1) @ a.qkv.weight,
    "pooling": lambda y, a: torch.mv(y, a.qkv.weight[0]).softmax(0) @ y,
    "pooling with a bias": lambda y, a: torch.addmv(a.qkv.bias[:1], y, a.qkv.weight[0]).softmax(0) @ y,
    "embedding_bag": lambda y, a: F.embedding_bag(
        (top := F.linear(y, a.qkv.weight).topk(3))[1], a.qkv.weight, per_sample_weights=top[0].softmax(-1), mode="sum"
    ),
}


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_products_of_other_names_with_parameters_are_none(name: str) -> None:
    class Pooled(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return NO_ATTENTION[name](x[0], self)

    attention = Attention(lambda a, s: s.softmax(-1))
    model = sigswap.convert(nn.Sequential(attention, Pooled(lambda a, s: s)), example_inputs=X)
    assert [site.status for site in sigswap.report(model).sites] == ["swapped", "left"]


ROUTERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rows": lambda y, w: ((w @ y.mT).softmax(1).mT[..., None] * y[:, :, None]).sum(2),
    "codebook": lambda y, w: (-torch.cdist(y, w)).softmax(-1) @ w,
    "slots": lambda y, w: (scores := y @ w.mT).softmax(-1) @ (scores.softmax(1).mT @ y),
    "linear attention": lambda y, w: y.softmax(-1) @ (y.softmax(1).mT @ y),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_what_an_attention_gives_makes_no_scores(name: str) -> None:
    """A router that takes what hand-written attention gives, with no layer between them."""

    class Routed(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return ROUTERS[name](super().forward(x), self.qkv.weight[:3])

    model = sigswap.convert(Routed(lambda a, s: s.softmax(-1)), example_inputs=X)
    assert sigswap.report(model).count("swapped") == 1
    want = Routed(lambda a, s: sigmoid_of_scores(s)).double()
    close(model(X), want(X.double()))


def test_heads_are_mixed() -> None:
    """Talking heads by an einsum with a parameter, before the softmax and after it."""

    def talking(normalise: Probabilities) -> Callable[[Attention, Tensor], Tensor]:
        mix = torch.randn(2, 2, generator=torch.Generator().manual_seed(5))

        def probabilities(a: Attention, s: Tensor) -> Tensor:
            a.mix = nn.Parameter(mix.to(s.dtype)) if not hasattr(a, "mix") else a.mix
            p = normalise(torch.einsum("bhij,hg->bgij", s, a.mix))
            return torch.einsum("bhij,hg->bgij", p, a.mix)

        return probabilities

    model = Attention(talking(lambda s: s.softmax(-1)))
    model(X)
    sigswap.convert(model, example_inputs=X)
    close(model(X), Attention(talking(sigmoid_of_scores)).double()(X.double()))
