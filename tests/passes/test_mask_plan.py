"""What becomes of masks and biases: the op gets each as small as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import handwritten
import pytest
import torch
import torch.nn.functional as F
from compare import close, close_with_gradients
from graphs import Graphs, operands_of
from handwritten import HEAD_DIM, HEADS
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sigswap.functional.attention import probabilities

B, M, D = 2, 12, 8


def test_padding_keeps_its_small_shape() -> None:
    """The n x n mask that padding and causality were combined to is not passed on."""

    def attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        causal = torch.ones(M, M, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal & padding[:, None, None])

    q, k, v = (torch.randn(B, HEADS, M, D) for _ in range(3))
    ((_, mask, causal),) = operands_of(attention, q, k, v, torch.arange(M) < torch.tensor([[M], [5]]))
    assert (mask, causal) == ((B, 1, 1, M), True)


def _tril(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def _prefixed(n: int) -> Tensor:
    """The first rows see the first keys only; no band. Row 2 sees no key."""
    visible = torch.ones(n, n, dtype=torch.bool)
    return torch.where(torch.arange(n)[:, None] < 3, torch.arange(n) < 3 - torch.arange(n)[:, None] * 3 // 2, visible)


PADDED = torch.tensor([[9], [4]])


BIASES: dict[str, tuple[Callable[[Tensor, int], Tensor], Callable[[int], Tensor], bool, int]] = {
    # (the bias of n keys, under a mask) -> (what is visible, is_causal, the batch size of the op's mask)
    "where": (lambda b, n: torch.where(_tril(n), b, -math.inf), _tril, True, 1),
    "where, lowest number": (lambda b, n: torch.where(_tril(n), b, torch.finfo(b.dtype).min), _tril, True, 1),
    "masked_fill": (lambda b, n: b.masked_fill(~_tril(n), -1e9), _tril, True, 1),
    "a copy": (lambda b, n: torch.where(_tril(n).expand(B, 1, n, n), b, -math.inf).contiguous(), _tril, True, 1),
    "twice": (
        lambda b, n: torch.where(_tril(n), b, -math.inf).masked_fill(~(torch.arange(n)[:, None] >= 0), -math.inf),
        _tril,
        True,
        1,
    ),
    "everywhere": (
        lambda b, n: torch.where((torch.arange(n)[:, None] >= 0).expand(B, 1, n, n), b, -math.inf),
        lambda n: torch.ones(n, n, dtype=torch.bool),
        False,
        1,
    ),
    "padding": (
        lambda b, n: torch.where((torch.arange(n) < PADDED)[:, None, None], b, -math.inf),
        lambda n: (torch.arange(n) < PADDED)[:, None, None],
        False,
        1,
    ),
    "padding, a number added": (
        lambda b, n: b + (1.0 - (torch.arange(n) < PADDED)[:, None, None].to(b.dtype)) * -1e4,
        lambda n: (torch.arange(n) < PADDED)[:, None, None],
        False,
        1,
    ),
    "padding, a float mask added first": (
        lambda b, n: (
            torch.where((torch.arange(n) < PADDED)[:, None, None], b.new_zeros(()), torch.finfo(b.dtype).min) + b
        ),
        lambda n: (torch.arange(n) < PADDED)[:, None, None],
        False,
        1,
    ),
    "padding on the left": (
        lambda b, n: torch.where((torch.arange(n) >= n - PADDED)[:, None, None], b, -math.inf),
        lambda n: (torch.arange(n) >= n - PADDED)[:, None, None],
        False,
        1,
    ),
    "causal, and padding on the left": (
        lambda b, n: torch.where(_tril(n) & (torch.arange(n) >= n - PADDED)[:, None, None], b, -math.inf),
        lambda n: _tril(n) & (torch.arange(n) >= n - PADDED)[:, None, None],
        True,
        1,
    ),
    "a sequence of nothing but padding": (
        lambda b, n: b.masked_fill((torch.arange(n) >= PADDED - 4)[:, None, None], -math.inf),
        lambda n: (torch.arange(n) < PADDED - 4)[:, None, None],
        False,
        1,
    ),
    "padding, and a bias that hides": (
        lambda b, n: torch.where(
            (torch.arange(n) < PADDED)[:, None, None], torch.where(_prefixed(n), b, -math.inf), -math.inf
        ),
        lambda n: _prefixed(n) & (torch.arange(n) < PADDED)[:, None, None],
        False,
        1,
    ),
    "padding, half of it, and a number that does not mask": (
        lambda b, n: b + torch.where((torch.arange(n) < PADDED)[:, None, None], 0.0, -100.0),
        lambda n: torch.ones(n, n, dtype=torch.bool),
        False,
        B,
    ),
    "padding that depends on the row": (
        lambda b, n: torch.where(
            (torch.arange(n) < PADDED)[:, None, None] | torch.eye(n, dtype=torch.bool), b, -math.inf
        ),
        lambda n: (torch.arange(n) < PADDED)[:, None, None] | torch.eye(n, dtype=torch.bool),
        False,
        B,
    ),
    "a bias per sequence": (
        lambda b, n: torch.where((torch.arange(n) < PADDED)[:, None, None], b * PADDED[:, None, None] / 9, -math.inf),
        lambda n: (torch.arange(n) < PADDED)[:, None, None],
        False,
        B,
    ),
    "an edited bias under padding": (
        lambda b, n: torch.where((torch.arange(n) < PADDED)[:, None, None], c := b.clone(), -math.inf) + 0 * c.mul_(2),
        lambda n: (torch.arange(n) < PADDED)[:, None, None],
        False,
        B,
    ),
    "causal and padding": (
        lambda b, n: torch.where(_tril(n) & (torch.arange(n) < PADDED)[:, None, None], b, -math.inf),
        lambda n: _tril(n) & (torch.arange(n) < PADDED)[:, None, None],
        True,
        1,
    ),
    "a fill that does not mask": (
        lambda b, n: torch.where(_tril(n), b, -3.0),
        lambda n: torch.ones(n, n, dtype=torch.bool),
        False,
        1,
    ),
    "edited": (
        lambda b, n: torch.where(_tril(n), c := b.clone(), -math.inf) + 0 * c.add_(1),
        _tril,
        False,
        1,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", BIASES)
def test_a_bias_under_a_mask(name: str, dynamic: bool) -> None:
    """As T5's, which is one number where the causal mask hides a key: the bias stays as small as it is."""
    build, visible, causal, batch = BIASES[name]

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=build(bias, q.shape[2]))

    graphs = Graphs()
    compiled = graphs.compile(attention, dynamic=dynamic)
    for n in (9, 13) if dynamic else (9,):
        leaves = [torch.randn(B, HEADS, n, HEAD_DIM, requires_grad=True) for _ in range(3)]
        leaves += [torch.randn(1, HEADS, n, n, requires_grad=True)]
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        q, k, v, bias = exact
        scores = (q @ k.mT) * HEAD_DIM**-0.5 + torch.where(visible(n), build(bias, n), 0.0)
        expected = handwritten.sigmoid(scores.masked_fill(~visible(n), -math.inf), -1) @ v
        actual = compiled(*leaves)
        close_with_gradients(actual, expected, leaves, exact)
    assert len(graphs.calls) == 1
    q, k, v, bias = (leaf[..., :9, :9].detach() if leaf is leaves[3] else leaf[:, :, :9].detach() for leaf in leaves)
    ((_, mask, is_causal),) = operands_of(attention, q, k, v, bias)
    assert (mask, is_causal) == ((batch, HEADS, 9, 9), causal)


@pytest.mark.slow
@pytest.mark.parametrize("name", BIASES)
def test_a_bias_under_a_mask_and_a_row_cap(name: str) -> None:
    """Padding stays in the mask: a hidden key would be in the sum of its row."""
    build, visible, _, _ = BIASES[name]

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=build(bias, q.shape[2]))

    graphs = Graphs(row_cap=0.5)
    leaves = [torch.randn(B, HEADS, 9, HEAD_DIM, requires_grad=True) for _ in range(3)]
    leaves += [torch.randn(1, HEADS, 9, 9, requires_grad=True)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    q, k, v, bias = exact
    scores = (q @ k.mT) * HEAD_DIM**-0.5 + torch.where(visible(9), build(bias, 9), 0.0)
    expected = handwritten.capped(0.5)(scores.masked_fill(~visible(9), -math.inf), -1) @ v
    close_with_gradients(graphs.compile(attention)(*leaves), expected, leaves, exact)
    assert len(graphs.calls) == 1


def test_what_is_hidden_after_a_capped_sigmoid_is_not_lowered() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, row_cap: float) -> Tensor:
        p = probabilities(q @ k.mT, visible_bias=False, const_bias=-2.0, row_cap=row_cap)
        return p.masked_fill(~_tril(M), 0.0) @ v

    q, k, v = (torch.randn(B, HEADS, M, D) for _ in range(3))
    graphs = Graphs()
    close(graphs.compile(attention)(q, k, v, 0.5), attention(q.double(), k.double(), v.double(), 0.5))
    assert not graphs.calls
    graphs.compile(lambda *inputs: attention(*inputs, None))(q, k, v)
    assert len(graphs.calls) == 1


def test_a_bias_under_a_mask_whose_fill_depends_on_a_length() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        n = q.shape[2]
        return torch.softmax(q @ k.mT + bias.masked_fill(~_tril(n), -600 * n), -1) @ v

    graphs = Graphs()
    compiled = graphs.compile(attention, dynamic=True)
    for n in (12, 5):  # at 5 the fill is -3000, which does not mask
        q, k, v = (torch.randn(B, HEADS, n, D) for _ in range(3))
        bias = torch.randn(1, HEADS, n, n)
        scores = (q @ k.mT + bias.masked_fill(~_tril(n), -600 * n)).double()
        expected = handwritten.sigmoid(scores.masked_fill(scores <= -5000, -math.inf), -1) @ v.double()
        close(compiled(q, k, v, bias), expected)


@pytest.mark.parametrize("content", ["bias", "zero"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_bias_under_a_mask_that_is_edited_later(content: str, causal: bool) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, padding: Tensor) -> Tensor:
        padding = padding.clone()
        shown = bias if content == "bias" else torch.zeros(())
        added = torch.where(_tril(M) & padding if causal else padding, shown, -math.inf)
        padding.logical_not_()
        return torch.softmax(q @ k.mT + added, -1) @ v

    q, k, v = (torch.randn(B, HEADS, M, D) for _ in range(3))
    bias, padding = torch.randn(1, HEADS, M, M), (torch.arange(M) < torch.tensor([[M], [4]]))[:, None, None]
    visible = _tril(M) & padding if causal else padding
    added = torch.where(visible, bias if content == "bias" else torch.zeros(()), -math.inf)
    expected = handwritten.sigmoid((q @ k.mT + added).double(), -1) @ v.double()
    graphs = Graphs()
    close(graphs.compile(attention)(q, k, v, bias, padding), expected)
    assert len(graphs.calls) == 1


def test_a_bias_that_was_masked_without_gradients_has_none() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        with torch.no_grad():
            added = torch.where(_tril(M), bias, -math.inf)
        return torch.softmax(q @ k.mT + added, -1) @ v

    q, k, v = (torch.randn(B, HEADS, M, D).requires_grad_() for _ in range(3))
    bias = torch.randn(1, HEADS, M, M).requires_grad_()
    Graphs().compile(attention)(q, k, v, bias).sum().backward()
    assert bias.grad is None and q.grad is not None


def test_a_bias_under_a_mask_from_outside_of_a_checkpoint() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, padding: Tensor) -> Tensor:
        visible = _tril(M) & padding

        def inside(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, visible: Tensor) -> Tensor:
            return torch.softmax(q @ k.mT + torch.where(visible, bias, -math.inf), -1) @ v

        return checkpoint(inside, q, k, v, bias, visible, use_reentrant=False)

    q, k, v = (torch.randn(B, HEADS, M, D).requires_grad_() for _ in range(3))
    bias, padding = torch.randn(1, HEADS, M, M), (torch.arange(M) < torch.tensor([[M], [4]]))[:, None, None]
    graphs = Graphs()
    actual = graphs.compile(attention)(q, k, v, bias, padding)
    added = torch.where(_tril(M) & padding, bias, -math.inf)
    close(actual.detach(), handwritten.sigmoid((q @ k.mT + added).double(), -1).detach() @ v.detach().double())
    assert len(graphs.calls) == 1


# (the probabilities of scores and a bias under padding, the heads of keys and values)
PADDED_FORMS: dict[str, tuple[Callable[[Tensor, Tensor, Callable[..., Tensor]], Tensor], int]] = {
    "soft cap": (lambda scores, bias, normalise: normalise(torch.tanh(scores / 2.0) * 2.0 + bias, -1), HEADS),
    "grouped heads": (lambda scores, bias, normalise: normalise(scores + bias, -1), HEADS // 2),
    "row bias": (
        lambda scores, bias, normalise: normalise(
            scores + scores.new_tensor([-1.0, 2.0])[:, None, None, None] + bias, -1
        ),
        HEADS,
    ),
    "a fixed bias": (lambda scores, bias, normalise: torch.sigmoid(scores + bias - 2.0), HEADS),
}


@pytest.mark.slow
@pytest.mark.parametrize("band", ["none", "causal", "window"])
@pytest.mark.parametrize("name", PADDED_FORMS)
def test_a_bias_under_padding_in_other_forms(name: str, band: str) -> None:
    form, heads = PADDED_FORMS[name]

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, normalise: Any = handwritten.softmax) -> Tensor:
        visible = torch.arange(M) < torch.tensor([[M], [5]])[:, None, None]
        if band != "none":
            visible = visible & _tril(M)
        if band == "window":
            visible = visible & torch.ones(M, M, dtype=torch.bool).triu(-3)
        k, v = (
            t[:, :, None].expand(B, heads, HEADS // heads, M, D).reshape(B, HEADS, M, D) if heads < HEADS else t
            for t in (k, v)
        )
        return form(q @ k.mT, torch.where(visible, bias, -math.inf), normalise) @ v

    shapes = (B, HEADS, M, D), (B, heads, M, D), (B, heads, M, D), (1, HEADS, M, M)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    graphs = Graphs()
    actual, expected = graphs.compile(attention)(*leaves), attention(*exact, handwritten.sigmoid)
    grads = close_with_gradients(actual, expected, leaves, exact)
    for ours in grads[1:3]:
        assert not ours[1, :, 5:].any()  # of padding
    (node,) = graphs.calls
    assert node.kwargs["visible_bias"] is False and node.kwargs["is_causal"] == (band != "none")
    assert node.kwargs["window_left"] == (3 if band == "window" else -1)
    ((_, mask, _),) = operands_of(attention, *(leaf.detach() for leaf in leaves))
    assert mask == (1, HEADS, M, M)


def test_dropout_of_a_bias_under_padding() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, p: float = 0.25) -> Tensor:
        padding = (torch.arange(M) < torch.tensor([[M], [5]]))[:, None, None]
        scores = q @ k.mT + torch.where(padding, bias, -math.inf)
        return F.dropout(handwritten.sigmoid(scores, -1) if p == 0 else torch.softmax(scores, -1), p) @ v

    inputs = [torch.randn(B, HEADS, M, D) for _ in range(3)] + [torch.randn(1, HEADS, M, M)]
    graphs = Graphs()
    compiled = graphs.compile(attention)
    mean = torch.stack([compiled(*inputs) for _ in range(400)]).double().mean(0)
    expected = attention(*(each.double() for each in inputs), p=0.0)
    assert graphs.calls[0].kwargs["dropout_p"] == 0.25
    assert (mean - expected).abs().max() < 0.1 * expected.abs().max()
