"""explain leaves the model, the process and random numbers as they were, whether the model runs or not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sigswap
from sigswap.errors import ArgumentError, ExampleInputsError


class Counting(nn.Module):
    """In train mode it draws random numbers, and changes a buffer and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.calls, self.lengths = nn.Linear(16, 48), nn.BatchNorm1d(16), 0, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.lengths.append(x.shape[1])
        x = self.norm(x.mT).mT
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_changed(converted: bool, fails: bool) -> None:
    model, x = Counting().train(), torch.randn(2, 5, 16)
    if converted:
        sigswap.convert(model, example_inputs=x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own, random = dict(vars(model)), torch.get_rng_state()
    if fails:
        with pytest.raises(ExampleInputsError):
            sigswap.explain(model, (x, x))
    else:
        assert sigswap.explain(model, x).count("lowered") == 1
    assert vars(model) == own and model.calls == 0 and model.lengths == []
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_no_model() -> None:
    with pytest.raises(ArgumentError, match=r"model must be a torch\.nn\.Module, not a str"):
        sigswap.explain("model", torch.zeros(1))  # type: ignore[arg-type]
