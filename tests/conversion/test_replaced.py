"""A converted module that is exchanged for another, as BigBird's forward does with a short input."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sigswap
from sigswap import errors
from tests.support.oracle import count_attention_softmax, sigmoid_of_scores

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """[B, N, 16], two heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(16, 48)

    def probabilities(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return (self.probabilities(q @ k.mT * 0.7) @ v).transpose(1, 2).flatten(2)


class Scaled(Attention):
    """The same in another form: a short input's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Twice(Attention):
    def probabilities(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1) * 0.5 + scores.softmax(-1) * 0.5


class Sigmoid(Attention):
    def probabilities(self, scores: Tensor) -> Tensor:
        return sigmoid_of_scores(scores)


class Model(nn.Module):
    """Exchanges its attention for one of class ``short`` when an input is short, for good."""

    def __init__(self, short: type[Attention] = Scaled) -> None:
        super().__init__()
        self.attention: Any = Attention()
        self.short = short

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < 5 and type(self.attention).__name__ != self.short.__name__:
            new = self.short()
            new.qkv = self.attention.qkv
            self.attention = new
        return self.attention(x)


def test_another_form_of_it_is_converted_too() -> None:
    model = sigswap.convert(Model(), example_inputs=X)
    bias = model.attention.sigswap.get_submodule("0").bias
    nn.init.constant_(bias, 0.5)
    names = list(model.state_dict())
    got = model(X[:, :4])
    assert isinstance(model.attention, Scaled) and list(model.state_dict()) == names
    want = Sigmoid()
    want.probabilities = lambda scores: torch.sigmoid(scores - torch.tensor(4.0).log() + 0.5)  # type: ignore[method-assign]
    want.qkv = model.attention.qkv
    assert torch.allclose(got, 2 * want(X[:, :4]), atol=1e-6)
    assert model.attention.sigswap.get_submodule("0").bias is bias
    sigswap.revert(model)
    assert type(model.attention) is Scaled and "attention.sigswap.0.bias" not in model.state_dict()


def test_what_calls_otherwise_is_an_error() -> None:
    model = sigswap.convert(Model(Twice), example_inputs=X)
    with pytest.raises(errors.UnknownCallError, match="attention made"):
        model(X[:, :4])


def test_example_inputs_that_exchange_it() -> None:
    model = sigswap.convert(Model(), example_inputs=X[:, :4])
    assert type(model.attention).__name__ == "Attention"  # not for good: that only the model's own forward does
    want = Sigmoid()
    assert torch.allclose(model(X[:, :4]), 2 * want(X[:, :4]), atol=1e-6)
    with pytest.raises(errors.UnswappableSiteError, match="mixed"):
        sigswap.convert(Model(Twice), example_inputs=[X, X[:, :4]])


def test_what_a_user_exchanges_is_his_own(caplog: pytest.LogCaptureFixture) -> None:
    model = sigswap.convert(nn.Sequential(Model(), Model()), example_inputs=X)
    wrapped = nn.Sequential(model[0].attention)
    with caplog.at_level(logging.WARNING, "sigswap"):
        model[0].attention = wrapped
        assert not caplog.records
        model[1].attention = Attention()
        assert "1.attention" in caplog.text and "no longer" in caplog.text
        caplog.clear()
        model[0] = Model()
        assert "0.attention" in caplog.text
    assert not hasattr(model[1].attention, "sigswap")


@pytest.mark.parametrize("first", [8, 64])
def test_bigbird(tmp_path: Path, first: int) -> None:
    """Converted on a short input (which changes its modules) or a long one, saved, loaded: sigmoid, or an error."""
    from transformers import BigBirdConfig, BigBirdModel

    torch.manual_seed(0)
    config = BigBirdConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=128, block_size=4, num_random_blocks=1, initializer_range=0.5,
    )  # fmt: skip
    model = BigBirdModel(config).eval()
    long, short = (torch.arange(n)[None] % 97 for n in (64, 8))
    sigswap.convert(model, example_inputs={"input_ids": short if first == 8 else long})
    sigswap.save(model, tmp_path)
    for each in (model, sigswap.load(tmp_path)):
        with torch.no_grad():
            assert count_attention_softmax(lambda each=each: each(short if first == 8 else long)) == 0
            if first == 64:  # its attention has many softmaxes, and another one for short inputs
                with pytest.raises(errors.UnknownCallError, match="convert it again"):
                    each(short)
    if first == 8:
        with torch.no_grad():
            assert torch.equal(each(short).last_hidden_state, model(short).last_hidden_state)
