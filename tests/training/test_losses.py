"""The losses of a distillation against float64 by their definitions, in chunks, under masks, and compiled."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sigswap.training import losses


def logits(rows: int = 13, vocabulary: int = 29, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y, t = (3 * torch.randn(2, rows, vocabulary, generator=generator)).to(dtype)
    return y.requires_grad_(), t


def by_definition(y: Tensor, t: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """KL(t || y), the mean over the rows that count, and its gradient; in float64."""
    y, t = (x.detach().double() for x in (y, t))
    rows = torch.ones(len(y), dtype=torch.bool) if counted is None else counted
    p, q = (torch.exp(x) / torch.exp(x).sum(-1, keepdim=True) for x in (t, y))
    loss = (p * (p / q).log()).sum(-1)[rows].mean()
    gradient = (q - p) / rows.sum()
    gradient[~rows] = 0.0
    return loss, gradient


COUNTED = [None, torch.arange(13) % 3 > 0]


def eager(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return f


def compiled(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    made: Callable[..., Tensor] = torch.compile(f, backend="aot_eager", fullgraph=True)
    return made


@pytest.mark.parametrize("form", [eager, compiled])
@pytest.mark.parametrize("counted", COUNTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence(
    form: Callable[..., Callable[..., Tensor]],
    counted: Tensor | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses, "CHUNK", 4 * 29)  # four chunks
    y, t = logits(dtype=dtype)
    if counted is not None:
        with torch.no_grad():
            y[0] = math.nan  # a row that does not count
    expected, gradient = by_definition(y.nan_to_num(), t, counted)
    total, count = form(losses.divergence)(y, t, counted)
    loss = total / count
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    (0.5 * loss).backward()
    assert y.grad is not None
    near = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-4}
    torch.testing.assert_close(y.grad.double(), 0.5 * gradient, **near)


class Sizes(TorchDispatchMode):
    """The elements of the largest float32 tensor that an op gives."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.dtype == torch.float32:
            self.largest = max(self.largest, output.numel())
        return output


def test_the_divergence_of_half_precision_logits_holds_float32_for_a_chunk_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses, "CHUNK", 8 * 50)
    y, t = logits(200, 50, torch.bfloat16)
    with Sizes() as sizes:
        losses.divergence(y, t)[0].backward()
    assert 0 < sizes.largest <= 8 * 50


@pytest.mark.slow
@pytest.mark.parametrize("form", [eager, compiled])
@pytest.mark.parametrize("counted", [None, torch.tensor([[True] * 5, [True, True, False, False, True]])])
@pytest.mark.parametrize("is_logits", [False, True])
@pytest.mark.parametrize("inner", [(), (3,)])
def test_end_to_end_loss(
    form: Callable[..., Callable[..., Tensor]], counted: Tensor | None, is_logits: bool, inner: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(1)
    y, t = (torch.randn(2, 5, *inner, 7, generator=generator) for _ in range(2))
    ours, theirs = ([torch.randn(2, 5, 4, generator=generator) for _ in range(3)] for _ in range(2))
    leaves = [x.requires_grad_() for x in (y, *ours)]

    def relative(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().sum() / b.square().sum()

    rows = torch.ones(2, 5, dtype=torch.bool) if counted is None else counted
    wide = [x.detach().double().requires_grad_() for x in leaves]
    a, b = wide[0][rows], t.double()[rows]
    if is_logits:
        expected = (b.softmax(-1) * (b.log_softmax(-1) - a.log_softmax(-1))).sum(-1).mean()
    else:
        means = [torch.stack([x[i, rows[i]].mean(0) for i in range(2)]) for x in (wide[0], t.double())]
        expected = relative(a, b) + relative(*means)
    errors = [relative(x, y.double()) for x, y in zip(wide[1:], theirs, strict=True)]
    hidden = sum(errors[1:], errors[0]) / 3
    whole = expected + 2.0 * expected.detach() / hidden.detach() * hidden
    found = form(losses.quotients)(y, t, ours, theirs, counted, is_logits)
    got, shown = losses.end_to_end_loss(found, 3)
    torch.testing.assert_close(shown.double(), expected.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got.double(), whole, rtol=1e-5, atol=1e-7)
    gradients = torch.autograd.grad(got, leaves)
    for found, wanted in zip(gradients, torch.autograd.grad(whole, wide), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
