"""``backend="sigswap"`` on converted models that leave something as softmax, and on reverted ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sigswap

COMPILED = {"backend": "sigswap", "options": {"inner": "eager"}}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 5, 16)


def test_what_is_excluded_stays_softmax(x: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    model = sigswap.convert(nn.Sequential(*(Attention() for _ in range(3))), example_inputs=x, exclude=["1"])
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, **COMPILED)(x), expected)
    assert "left as softmax: its model is converted" in caplog.text
    twin = copy.deepcopy(model)
    torch.testing.assert_close(torch.compile(twin, **COMPILED)(x), expected)
    kept = [site for site in sigswap.explain(model, x).sites if site.status == "softmax"]
    assert [(site.path, "its model is converted" in site.detail) for site in kept] == [("1", True)]


@pytest.mark.parametrize("alone", [False, True])
def test_inside_softmax_it_runs_as_softmax(x: Tensor, alone: bool) -> None:
    model = Attention() if alone else nn.Sequential(Attention(), Attention())
    original = model(x)
    sigswap.convert(model, example_inputs=x)
    expected = model(x)
    compiled = torch.compile(model, **COMPILED)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)
        with sigswap.softmax(model):
            torch.testing.assert_close(compiled(x), original)
    other = nn.Sequential(Attention(), Attention())  # shares nothing of what was compiled
    assert (torch.compile(other, **COMPILED)(x) - other(x)).abs().max() > 1e-3


def test_what_compile_attention_compiled_follows(x: Tensor) -> None:
    model = nn.Sequential(Attention(), Attention())
    original = model(x)
    sigswap.convert(model, example_inputs=x)
    expected = model(x)
    sigswap.compile_attention(model, options={"inner": "eager"})
    torch.testing.assert_close(model(x), expected)
    with sigswap.softmax(model):
        torch.testing.assert_close(model(x), original)
    torch.testing.assert_close(model(x), expected)
    sigswap.revert(model)
    assert all(module._compiled_call_impl is None for module in model.modules())
    torch.testing.assert_close(model(x), original)


def test_a_compilation_of_the_users_own_survives_revert(x: Tensor) -> None:
    model = sigswap.convert(nn.Sequential(Attention()), example_inputs=x)
    model[0].compile(backend="eager")
    assert sigswap.revert(model)[0]._compiled_call_impl is not None


def test_a_reverted_model_is_swapped_as_any_other_and_said_to_be(x: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(Attention())
    original = model(x)
    sigswap.revert(sigswap.convert(model, example_inputs=x))
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), original)
    other = nn.Sequential(Attention())
    torch.compile(other, **COMPILED)(x)
    assert "reverted" not in caplog.text and "sigswap.revert" not in caplog.text
    torch._dynamo.reset()
    assert (torch.compile(model, **COMPILED)(x) - original).abs().max() > 1e-3
    assert "sigswap.revert has made softmax again" in caplog.text


def test_what_is_excluded_in_a_graph_of_its_own_is_said_to_be_swapped(
    x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = self[0](x)
            torch._dynamo.graph_break()
            return self[1](x)

    model = sigswap.convert(Broken(Attention(), Attention()), example_inputs=x, exclude=["1"])
    torch.compile(model, **COMPILED)(x)
    assert "sigswap.convert has left as softmax" in caplog.text


def test_the_output_projection_of_multihead_attention_is_not_idle() -> None:
    x = torch.randn(2, 5, 32)
    model = nn.MultiheadAttention(32, 4, batch_first=True)
    assert not sigswap.inspect(model, example_inputs=(x, x, x)).notes
