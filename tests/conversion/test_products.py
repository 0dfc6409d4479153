"""Products of query and key that are einsums: over several axes, of three tensors, of axes in another order."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sigswap
from sigswap import SigmoidConfig, errors
from sigswap.conversion.install import apply_conversion
from sigswap.conversion.record import conversion_of
from sigswap.saving import schema
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


ORDERS = {  # of the scores of queries and keys [B, N, H, D], and the axis of the keys
    "bhnm": -1,
    "hbnm": -1,
    "bmhn": 1,
}


class Ordered(nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.order = nn.Linear(16, 48), order

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(*t.shape[:-1], H, D) for t in self.qkv(x).chunk(3, -1))
        p = torch.einsum(f"bnhd,bmhd->{self.order}", q, k).softmax(ORDERS[self.order])
        return torch.einsum(f"{self.order},bmhd->bnhd", p, v).flatten(2)


def test_the_rows_of_an_einsum_whose_axes_are_in_another_order() -> None:
    """``query_bias`` follows them: by the definition, calibrated, and from what a directory says of it."""
    config, weight = SigmoidConfig(query_bias=True), torch.randn(H, D)
    for order in ORDERS:
        model = sigswap.convert(Ordered(order).double(), config, example_inputs=X.double())
        sigswap.calibrate(model, [X.double()])
        fitted = model.get_parameter("sigswap.0.query_weight").detach()
        if order == "bhnm":
            first = fitted
        torch.testing.assert_close(fitted, first, rtol=1e-6, atol=1e-9)
        model = sigswap.convert(Ordered(order), config, example_inputs=X)
        data = json.loads(json.dumps(conversion_of(model).to_dict()))
        loaded = apply_conversion(Ordered(order), schema.conversion_from(data, "conversion"))
        for each in (model, loaded, pickle.loads(pickle.dumps(model))):
            each.get_parameter("sigswap.0.query_weight").data.copy_(weight)
            q, k, v = (t.view(*t.shape[:-1], H, D).transpose(1, 2) for t in model.qkv(X).double().chunk(3, -1))
            bias = (q * weight.double()[:, None]).sum(-1, keepdim=True) - math.log(X.shape[1])
            want = ((q @ k.mT + bias).sigmoid() @ v).transpose(1, 2).flatten(2)
            assert (each(X) - want).abs().max() <= 1e-5 * want.abs().max(), order
