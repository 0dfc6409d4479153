"""A checkpointed forward is computed again as what it was, wherever backward runs, and whatever is switched there."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sigswap


class Attention(nn.Module):
    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.by_hand = by_hand
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.by_hand:
            return x + ((q @ k.mT * 8**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Layers(nn.Module):
    """``how``: "reentrant", "not", or "nested": a checkpoint around checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Attention(False), Attention(True), Attention(False)])
        self.how: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "nested":
            return checkpoint(self.all, x, "not", use_reentrant=False)
        return self.all(x, self.how)

    def all(self, x: Tensor, how: str | None) -> Tensor:
        for layer in self.layers:
            x = layer(x) if how is None else checkpoint(layer, x, use_reentrant=how == "reentrant")
        return x


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
HOWS = ("reentrant", "not", "nested")


@pytest.fixture(scope="module")
def model() -> Layers:
    return sigswap.convert(Layers(), example_inputs=X)


def gradients(model: Layers, how: str | None, first: bool, again: bool, run: Callable[..., None]) -> list[Tensor]:
    """``first``: whether it is softmax in forward; ``again``: in backward, which ``run`` calls."""
    model.zero_grad()
    model.how = how
    with sigswap.softmax(model) if first else contextlib.nullcontext():
        loss = model(X.clone().requires_grad_()).square().sum()
    with sigswap.softmax(model) if again else contextlib.nullcontext():
        run(loss.backward)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def here(call: Callable[[], None]) -> None:
    call()


def in_a_thread(call: Callable[[], None]) -> None:
    """As on a GPU, whose part of backward runs in a thread with a context of its own."""
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


@pytest.mark.parametrize("run", [here, in_a_thread])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("how", HOWS)
def test_it_is_what_it_was(model: Layers, how: str, first: bool, again: bool, run: Callable[..., None]) -> None:
    expected = gradients(model, None, first, first, here)
    got = gradients(model, how, first, again, run)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", HOWS)
def test_one_layer_is_softmax(model: Layers, how: str) -> None:
    """By a switch of its own, and by one that the checkpointed function itself opens."""

    @contextlib.contextmanager
    def switched() -> Iterator[None]:
        with sigswap.softmax(model.layers[1]):
            yield

    model.how = None
    results = []
    for each in (None, how):
        model.zero_grad()
        model.how = each
        with switched():
            loss = model(X.clone().requires_grad_()).square().sum()
        in_a_thread(loss.backward)
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])

    class Opens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model.layers[1]

        def forward(self, x: Tensor) -> Tensor:
            x = model.layers[0](x)
            with switched():
                return model.layers[2](self.inner(x))

    opens = Opens()
    model.zero_grad()
    loss = checkpoint(opens, X.clone().requires_grad_(), use_reentrant=how == "reentrant").square().sum()
    in_a_thread(loss.backward)
    results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b)
