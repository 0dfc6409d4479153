"""FlexAttention: its functions of the scores and of the mask are applied, and a sigmoid follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import _identity, create_block_mask, flex_attention, noop_mask

import sigswap
from sigswap import SigmoidConfig, errors
from sigswap.functional.flex import flex_attention as flex_sigmoid
from tests.support.oracle import sigmoid_of_scores

B, N, HEADS, D = 2, 6, 4, 8
X = torch.randn(B, N, 16, generator=torch.Generator().manual_seed(1))
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
DOCUMENT = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
QUERY, KEY = torch.arange(N)[:, None], torch.arange(N)
TABLE = torch.randn(HEADS, 2 * N - 1, generator=torch.Generator().manual_seed(3))


def alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return score + SLOPES[h] * (j - i)


def softcap(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return 2.0 * torch.tanh(score / 2.0)


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def documents(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (DOCUMENT[b, i] == DOCUMENT[b, j]) & (i >= j)


def causal_score(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.where(i >= j, score, -float("inf"))


def relative(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return score * 1.5 + TABLE[h, j - i + N - 1]


SAME_DOCUMENT = (DOCUMENT[:, None, :, None] == DOCUMENT[:, None, None, :]) & (QUERY >= KEY)
Case = tuple[Any, Any, Callable[[Tensor], Tensor], Tensor | None]
CASES: dict[str, Case] = {  # score_mod, mask_mod; the oracle's scores and mask
    "plain": (None, None, lambda s: s, None),
    "causal": (None, causal, lambda s: s, QUERY >= KEY),
    "documents": (None, documents, lambda s: s, SAME_DOCUMENT),
    "alibi": (alibi, causal, lambda s: s + SLOPES[:, None, None] * (KEY - QUERY), QUERY >= KEY),
    "softcap": (softcap, causal, lambda s: 2.0 * torch.tanh(s / 2.0), QUERY >= KEY),
    "masked by its score": (causal_score, None, lambda s: s, QUERY >= KEY),
    "relative": (relative, None, lambda s: s * 1.5 + TABLE[:, KEY - QUERY + N - 1], None),
}


class Flex(nn.Module):
    """[B, N, 16]; four heads of queries, two of keys."""

    function = staticmethod(flex_attention)

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.kv, self.options = nn.Linear(16, HEADS * D), nn.Linear(16, 4 * D), options
        self.score_mod, self.mask_mod, *_ = CASES[name]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        n = x.shape[1]
        mask = None if self.mask_mod is None else create_block_mask(self.mask_mod, x.shape[0], None, n, n, device="cpu")
        out = self.function(q, k, v, self.score_mod, mask, enable_gqa=True, scale=0.6, **self.options)
        return (out[0] * out[1][..., None] if isinstance(out, tuple) else out).transpose(1, 2).flatten(2)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.kv(x).view(*x.shape[:2], 4, D).transpose(1, 2).chunk(2, 1)
        return self.q(x).view(*x.shape[:2], HEADS, D).transpose(1, 2), k, v


def expected(name: str) -> Tensor:
    model = Flex(name).double()
    q, k, v = model.heads(X.double())
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    _, _, scores, visible = CASES[name]
    return (sigmoid_of_scores(scores(q @ k.mT * 0.6), visible=visible) @ v).transpose(1, 2).flatten(2)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    error = ((a.double() - b).abs().max() / b.abs().max()).item()
    assert error <= tolerance, error


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_is_swapped(name: str) -> None:
    model = Flex(name).eval()
    with torch.no_grad():
        before = model(X)
    sigswap.convert(model, example_inputs=X)
    (site,) = sigswap.report(model).sites
    assert (site.status, site.heads, site.head_dim) == ("swapped", HEADS, D)
    with torch.no_grad():  # which PyTorch's FlexAttention needs on a CPU
        close(model(X), expected(name))
        with sigswap.softmax(model):
            close(model(X), before.double())


@pytest.mark.parametrize("name", ["causal", "relative"])
def test_gradients(name: str) -> None:
    model = Flex(name).double()
    q, k, v = (x.detach().requires_grad_() for x in model.heads(X.double()))
    score_mod, mask_mod, scores, visible = CASES[name]
    options: tuple[Any, ...] = (score_mod or _identity, (mask_mod or noop_mask,), 0.6, {})
    flex_sigmoid(q, k, v, *options)[0].square().sum().backward()
    got = [x.grad for x in (q, k, v)]
    wide = [x.detach().requires_grad_() for x in (q, k, v)]
    repeated = [x.repeat_interleave(2, dim=1) for x in wide[1:]]
    p = sigmoid_of_scores(scores(wide[0] @ repeated[0].mT * 0.6), visible=visible)
    (p @ repeated[1]).square().sum().backward()
    for ours, theirs in zip(got, wide, strict=True):
        assert ours is not None and theirs.grad is not None
        close(ours, theirs.grad)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "softcap", "documents"])
def test_compiled(name: str) -> None:
    """Flex compiled on its own, the whole converted model compiled, and backend="sigswap" without convert."""
    torch._dynamo.reset()
    model = Flex(name).eval()
    model.function = torch.compile(flex_attention, backend="aot_eager")  # type: ignore[assignment]
    sigswap.convert(model, example_inputs=X)
    with torch.no_grad():
        close(model(X), expected(name))
    model = sigswap.convert(Flex(name).eval(), example_inputs=X)
    with torch.no_grad():
        close(torch.compile(model, backend="aot_eager")(X), expected(name))
        compiled = torch.compile(Flex(name).eval(), backend="sigswap", options={"inner": "aot_eager"})
        close(compiled(X), expected(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "softcap"])
@pytest.mark.parametrize("options", [{}, {"query_bias": True}, {"qk_norm": "rms"}], ids=str)
def test_calibrated(name: str, options: dict[str, Any]) -> None:
    model = Flex(name).eval()
    with torch.no_grad():
        before = model(X)
        sigswap.convert(model, SigmoidConfig(**options), example_inputs=X)
        error = (model(X) - before).square().sum()
        sigswap.calibrate(model, [X], progress=False)
        assert (model(X) - before).square().sum() < 0.9 * error


def test_a_logsumexp_that_is_used_is_refused() -> None:
    with pytest.raises(errors.UnswappableSiteError, match="logsumexp"):
        sigswap.convert(Flex("causal", return_lse=True).eval(), example_inputs=X)
