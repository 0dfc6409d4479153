"""Whether numbers are those of a float64 oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import handwritten
import torch
from handwritten import Handwritten
from torch import Tensor


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Fails where they differ by more than ``tolerance`` times the largest number expected."""
    scale = expected.abs().max().item() + 1e-9
    assert (actual.double() - expected.double()).abs().max().item() <= tolerance * scale


def close_with_gradients(
    actual: Tensor, expected: Tensor, leaves: Sequence[Tensor], exact: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Output and gradients are those of float64; returns the gradients."""
    close(actual.detach(), expected.detach())
    direction = torch.linspace(-1, 1, actual.numel()).view(actual.shape)
    grads = torch.autograd.grad((actual * direction).sum(), leaves)
    truths = torch.autograd.grad((expected * direction.double()).sum(), exact)
    for ours, theirs in zip(grads, truths, strict=True):
        close(ours, theirs)
    return grads


def oracle_of(model: Handwritten, row_cap: float | None = None) -> Handwritten:
    """The model in float64, with sigmoid written out in place of its softmax."""
    oracle = copy.deepcopy(model).double()
    oracle.normalise = handwritten.sigmoid if row_cap is None else handwritten.capped(row_cap)
    return oracle


def check(model: Handwritten, compiled: Callable[[Tensor], Tensor], x: Tensor, row_cap: float | None = None) -> None:
    """Output and all gradients of ``compiled``, which is ``model`` with sigmoid, are those of the oracle."""
    x64 = x.detach().double().requires_grad_()
    oracle = oracle_of(model, row_cap)
    x = x.detach().requires_grad_()
    actual, expected = compiled(x), oracle(x64)
    close_with_gradients(actual, expected, [x, *model.parameters()], [x64, *oracle.parameters()])
