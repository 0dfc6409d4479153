"""Whether numbers are those of a float64 oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
