"""Checkpointing of layers, and what it leaves when one of them fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sigswap.errors import ArgumentError
from sigswap.training.recompute import checkpoint_layers
from sigswap.transaction import Transaction


class Layer(nn.Module):
    """Fails on what is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if (x < 0).any():
            raise ValueError("negative")
        return self.inner(x).square()


def _hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def test_a_layer_that_fails_leaves_no_hooks() -> None:
    """Though the error is kept, and with it the frames that it came through."""
    model, x = nn.Sequential(Layer(), Layer()), torch.ones(2, 4)
    with Transaction() as undo, undo:
        checkpoint_layers(undo, model, ["0.inner", "1.inner"])
        with pytest.raises(ValueError, match="negative") as raised:
            model(-x)
        assert _hooks() is None and raised.value.__traceback__ is not None
        model(x).sum().backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(found, model.parameters(), strict=True))


def test_a_model_without_layers_is_an_error() -> None:
    with pytest.raises(ArgumentError, match=r"no nn\.ModuleList"), Transaction() as undo, undo:
        checkpoint_layers(undo, Layer(), ["inner"])
