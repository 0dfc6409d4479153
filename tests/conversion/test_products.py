"""Products of query and key that are einsums over several axes, or of three tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sigswap
from sigswap import SigmoidConfig, errors
from tests.support.oracle import sigmoid_of_scores

B, N, H, D = 2, 5, 2, 8
X = torch.randn(B, N, 16, generator=torch.Generator().manual_seed(1))
Form = Callable[[nn.Module, Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]


class Attention(nn.Module):
    """[B, N, 16] to [B, N, 16]; q, k and v are [B, N, H, D]."""

    def __init__(self, form: Form, normalise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.form, self.normalise = nn.Linear(16, 48), form, normalise
        self.scale, self.mix = nn.Parameter(torch.rand(H)), nn.Parameter(torch.randn(H, H))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(*t.shape[:-1], H, D) for t in self.qkv(x).chunk(3, -1))
        return self.form(self, q, k, v, self.normalise).flatten(2)


def two_axes(a: nn.Module, q: Tensor, k: Tensor, v: Tensor, p: Callable[[Tensor], Tensor]) -> Tensor:
    q, k = (t.view(*t.shape[:-1], 2, 4) for t in (q, k))
    return torch.einsum("bhnm,bmhd->bnhd", p(torch.einsum("bnhcd,bmhcd->bhnm", q, k)), v)


def over_heads(a: nn.Module, q: Tensor, k: Tensor, v: Tensor, p: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.einsum("bnm,bmhd->bnhd", p(torch.einsum("bnhd,bmhd->bnm", q, k)), v)


def scaled(a: nn.Module, q: Tensor, k: Tensor, v: Tensor, p: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.einsum("bhnm,bmhd->bnhd", p(torch.einsum("bnhd,bmhd,h->bhnm", q, k, a.scale)), v)


def mixed(a: nn.Module, q: Tensor, k: Tensor, v: Tensor, p: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.einsum("bgnm,bmhd,gh->bnhd", p(torch.einsum("bnhd,bmhd,hg->bgnm", q, k, a.mix)), v, a.mix)


FORMS: dict[str, tuple[Form, int]] = {
    "two axes": (two_axes, H),
    "over heads": (over_heads, 1),
    "scaled": (scaled, H),
    "mixed": (mixed, H),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_einsum(name: str) -> None:
    form, heads = FORMS[name]
    want = Attention(form, sigmoid_of_scores).double()(X.double())
    model = sigswap.convert(Attention(form, lambda s: s.softmax(-1)), example_inputs=X)
    assert (model(X) - want).abs().max() <= 1e-5 * want.abs().max()
    assert model.sigswap.site(0).bias.numel() == heads
    compiled = torch.compile(model, backend="sigswap", options={"inner": "aot_eager"})
    assert (compiled(X) - want).abs().max() <= 1e-5 * want.abs().max()
    with pytest.raises(errors.ConfigError, match="query_bias"):
        sigswap.convert(Attention(form, lambda s: s.softmax(-1)), SigmoidConfig(query_bias=True), example_inputs=X)
