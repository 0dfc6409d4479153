"""A maximum that is subtracted from the scores' rows: softmax ignores it, so it is taken out before the sigmoid."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sigswap
from sigswap import SigmoidConfig, errors
from sigswap.conversion.install import apply_conversion
from sigswap.conversion.record import Conversion, conversion_of
from tests.support.oracle import sigmoid_of_scores

FUTURE = torch.ones(6, 6).triu(1).bool()
Shift = Callable[[Tensor], Tensor]
SHIFTS: dict[str, Shift] = {
    "amax": lambda s: s - s.amax(-1, keepdim=True),
    "detached": lambda s: s - s.amax(-1, keepdim=True).detach(),
    "torch.amax": lambda s: s - torch.amax(s, dim=-1, keepdim=True),
    "values": lambda s: s - s.max(-1, keepdim=True).values,
    "first": lambda s: s - torch.max(s, dim=-1, keepdim=True)[0],
    "unsqueezed": lambda s: s - s.max(-1)[0].unsqueeze(-1),
    "of all": lambda s: s - s.max(),
    "added": lambda s: s + (-s.amax(-1, keepdim=True)),
    "logsumexp": lambda s: s - s.logsumexp(-1, keepdim=True),
    "in place": lambda s: s.sub_(s.amax(-1, keepdim=True)),
    "before the mask": lambda s: (s - s.amax(-1, keepdim=True)).masked_fill(
        torch.ones(6, 6).triu(1).bool(), -torch.inf
    ),
    "scaled": lambda s: s * 2 - s.amax(-1, keepdim=True) * 2,
    "in float64": lambda s: (s.double() - s.double().amax(-1, keepdim=True)).float(),
}


class Attention(nn.Module):
    """[B, 6, 16], two heads; another maximum, of the values, stays what it is."""

    def __init__(self, shift: Shift, softmax: Shift = lambda s: s.softmax(-1)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.shift, self.softmax = nn.Linear(16, 48), shift, softmax

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        v = v - torch.amax(v, dim=-1, keepdim=True)
        return (self.softmax(self.shift(q @ k.mT)) @ v).transpose(1, 2).flatten(2)


def unshifted(name: str) -> Shift:
    if name == "before the mask":
        return lambda s: s.masked_fill(FUTURE, -torch.inf)
    return lambda s: s * 2 if name == "scaled" else s


X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIFTS)
def test_a_row_shift_is_taken_out(name: str) -> None:
    model = Attention(SHIFTS[name])
    expected = Attention(unshifted(name), sigmoid_of_scores).double()(X.double())
    before = model(X)
    sigswap.convert(model, example_inputs=X)
    assert torch.allclose(model(X).double(), expected, rtol=1e-4, atol=1e-5)
    with sigswap.softmax(model):
        assert torch.equal(model(X), before)
    plan = Conversion.from_dict(json.loads(json.dumps(conversion_of(model).to_dict())))
    again = apply_conversion(Attention(SHIFTS[name]), plan)
    assert torch.equal(again(X), model(X))


def test_under_the_other_features() -> None:
    """Compiled, calibrated, with a bias that depends on the query."""
    model = Attention(SHIFTS["values"])
    sigswap.convert(model, SigmoidConfig(query_bias=True), example_inputs=X)
    sigswap.calibrate(model, [X], progress=False)
    eager = model(X)
    assert torch.allclose(torch.compile(model, backend="aot_eager", fullgraph=True)(X), eager, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model, backend="sigswap", options={"inner": "aot_eager"})
    assert torch.allclose(compiled(X), eager, rtol=1e-4, atol=1e-5)


def test_a_maximum_that_is_used_otherwise_is_refused() -> None:
    shifts: list[Shift] = [
        lambda s: (s - s.amax(-1, keepdim=True)) / s.mean(),
        lambda s: s - (m := s.amax(-1, keepdim=True)) + m * m,
        lambda s: s - s.mean(-1, keepdim=True),
        lambda s: s - s.amax(-1, keepdim=True) - s.mean(-1, keepdim=True) / 2,
    ]
    sigswap.convert(Attention(shifts[0]), example_inputs=X)
    for shift in shifts[1:]:
        with pytest.raises(errors.UnswappableSiteError, match="shifted"):
            sigswap.convert(Attention(shift), example_inputs=X)


def test_a_shift_that_was_not_seen_is_an_error() -> None:
    shifting = True

    def sometimes(s: Tensor) -> Tensor:
        return s - s.amax(-1, keepdim=True) if shifting else s

    model = Attention(sometimes)
    sigswap.convert(model, example_inputs=X)
    model(X)
    shifting = False
    with pytest.raises(errors.UnknownCallError, match="row shift before its softmax was not seen"):
        model(X)
