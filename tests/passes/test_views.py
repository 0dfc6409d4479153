"""Which tensors the op reads: those above copies, transposes, repeats and casts, where that is the same."""

from __future__ import annotations

from typing import Any

import handwritten
import pytest
import torch
from compare import close, oracle_of
from graphs import Graphs, calls_in
from handwritten import HEADS, Handwritten
from torch import Tensor

B, M, D = 2, 12, 8


def test_half_precision_stays_half() -> None:
    """An upcast of query and key, whose products are exact anyway, is left out; that of the scores, too."""

    class Upcast(Handwritten):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            scores = q.float() @ k.float().mT * 0.3 if q.dtype != torch.float64 else q @ k.mT * 0.3
            return self.merged(self.normalise(scores, -1).to(v.dtype) @ v)

    model, graphs = Upcast().bfloat16().eval(), Graphs()
    x = torch.randn(B, M, handwritten.DIM).bfloat16()
    actual = graphs.compile(model)(x)
    above = list(graphs.calls[0].all_input_nodes)
    for node in above:
        assert node.target != "float"
        above += node.all_input_nodes
    close(actual.detach(), oracle_of(model)(x.double()).detach(), 3e-2)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_copy_without_gradients_stays_without(off: Any) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with off():
            copied = k.clone()
        return torch.sigmoid(q @ copied.mT) @ v

    q, k, v = (torch.randn(B, HEADS, M, D) for _ in range(3))
    assert not Graphs().compile(attention)(q, k.requires_grad_(), v).requires_grad
    if off is torch.no_grad:  # an inference tensor is not to be kept for a backward
        Graphs().compile(attention)(q.requires_grad_(), k, v).sum().backward()
        assert k.grad is None and q.grad is not None


def test_repeats_are_left_out_below_a_region_that_is_over() -> None:
    """As a rotary embedding's tables, which a model makes first, without gradients or autocast."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            table = torch.arange(M).sin()[:, None]
        with torch.autocast("cpu", enabled=False):
            table = table + 1
        k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(B, HEADS, M, D) for x in (k * table, v))
        return torch.sigmoid(q @ k.mT) @ v

    q = torch.randn(B, HEADS, M, D, requires_grad=True)
    k, v = (torch.randn(B, HEADS // 2, M, D).requires_grad_() for _ in range(2))
    graphs = Graphs()
    grads = torch.autograd.grad(graphs.compile(attention)(q, k, v).sum(), (q, k, v))
    key = graphs.calls[0].args[1]
    assert isinstance(key, torch.fx.Node) and key.meta["example_value"].shape == (B, HEADS // 2, M, D)
    for grad, expected in zip(grads, torch.autograd.grad(attention(q, k, v).sum(), (q, k, v)), strict=True):
        close(grad, expected, 1e-5)


@pytest.mark.parametrize("case", ["before", "between", "after"])
def test_views_of_the_output_are_taken_with_it_up_to_a_region(case: str) -> None:
    """As of one whose batch and heads are merged: then the op has them apart."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if case == "before":
            with torch.no_grad():
                q = q * torch.arange(M).cos()[:, None]
        out = torch.bmm(torch.sigmoid(torch.bmm(q, k.mT) - 2.0), v)
        if case == "between":
            with torch.no_grad():
                return out.view(B, HEADS, M, D)
        out = out.view(B, HEADS, M, D)
        if case == "after":
            with torch.no_grad():
                return out * 2.0
        return out

    inputs = [torch.randn(B * HEADS, M, D).requires_grad_() for _ in range(3)]
    actual, expected = Graphs().compile(attention)(*inputs), attention(*inputs)
    assert actual.requires_grad == expected.requires_grad
    close(actual.detach(), expected.detach(), 1e-5)
    (((q, *_), _),) = calls_in(attention, *inputs)
    assert q.shape[:2] == ((1, B * HEADS) if case == "between" else (B, HEADS))
