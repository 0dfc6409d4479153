"""What a graph proves of a mask: a band becomes two numbers, and what is not proved stays a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable

import handwritten
import pytest
import torch
import torch.nn.functional as F
from compare import close
from graphs import Graphs
from handwritten import HEAD_DIM, HEADS
from torch import Tensor

B, M, D = 2, 12, 8


def _documents(positions: Tensor) -> Tensor:
    """Packed documents, causal: each begins where the positions do not go up by one."""
    before = positions[:, :1] - 1
    number = (torch.diff(positions, prepend=before, dim=-1) != 1).cumsum(-1)
    n = torch.arange(positions.shape[1])
    batch, row, key = torch.arange(len(positions))[:, None, None, None], n[None, None, :, None], n[None, None, None]
    return (key <= row) & (number[batch, row] == number[batch, key])


MASKS: dict[str, tuple[Callable[[int], Tensor], tuple[bool, int, int, bool]]] = {
    # (the mask of n keys and queries) -> (is_causal, window_left, window_right, whether a tensor is left)
    "tril": (lambda n: torch.ones(n, n, dtype=torch.bool).tril(), (True, -1, -1, False)),
    "tril of floats": (lambda n: torch.tril(torch.ones(n, n)) != 0, (True, -1, -1, False)),
    "not triu": (lambda n: ~torch.ones(n, n, dtype=torch.bool).triu(1), (True, -1, -1, False)),
    "triu == 0": (lambda n: torch.triu(torch.ones(n, n), 1) == 0, (True, -1, -1, False)),
    "arange": (lambda n: torch.arange(n)[None] <= torch.arange(n)[:, None], (True, -1, -1, False)),
    "arange, less": (lambda n: torch.arange(n)[None] < torch.arange(1, n + 1)[:, None], (True, -1, -1, False)),
    "everywhere": (lambda n: (torch.arange(n)[:, None] >= 0).expand(n, n), (False, -1, -1, False)),
    "difference": (lambda n: (torch.arange(n)[:, None] - torch.arange(n)) >= 0, (True, -1, -1, False)),
    "scaled": (lambda n: 2 * torch.arange(n)[None] <= 2 * torch.arange(n)[:, None], (False, -1, -1, True)),
    "window": (
        lambda n: ((i := torch.arange(n))[:, None] - i < 3) & (i - i[:, None] <= 2),
        (False, 2, 2, False),
    ),
    "causal window": (
        lambda n: ((i := torch.arange(n))[:, None] >= i) & ~(i[:, None] - i > 4),
        (True, 4, -1, False),
    ),
    "a view of 4 axes": (
        lambda n: torch.ones(n, n, dtype=torch.bool).tril().view(1, 1, n, n).expand(B, 1, n, n),
        (True, -1, -1, False),
    ),
    "a part of a longer one": (
        lambda n: torch.ones(2 * n, 2 * n, dtype=torch.bool).tril()[:n, :n],
        (True, -1, -1, False),
    ),
    "another part": (lambda n: torch.ones(2 * n, 2 * n, dtype=torch.bool).tril()[n:, :n], (False, -1, -1, True)),
    "above the diagonal": (lambda n: torch.ones(n, n, dtype=torch.bool).triu(0), (False, 0, -1, False)),
    "strictly below": (lambda n: torch.ones(n, n, dtype=torch.bool).tril(-1), (False, -1, -1, True)),
    "transposed": (lambda n: torch.ones(n, n, dtype=torch.bool).tril().T, (False, 0, -1, False)),
    "flipped": (lambda n: torch.ones(n, n, dtype=torch.bool).tril().flip(0), (False, -1, -1, True)),
    "either": (
        lambda n: torch.ones(n, n, dtype=torch.bool).tril() | (torch.arange(n) < 2),
        (False, -1, -1, True),
    ),
    "with padding": (
        lambda n: (
            torch.ones(n, n, dtype=torch.bool).tril() & (torch.arange(n) < torch.tensor([[n], [4]]))[:, None, None]
        ),
        (True, -1, -1, True),
    ),
    "one document, as transformers finds it": (
        lambda n: _documents(torch.arange(n)[None].expand(B, n)),
        (True, -1, -1, False),
    ),
    "documents by positions": (
        lambda n: _documents((torch.arange(n) * 2 % n)[None].expand(B, n)),
        (True, -1, -1, True),
    ),
    "documents": (
        lambda n: torch.ones(n, n, dtype=torch.bool).tril() & ((d := torch.arange(n) // 4)[:, None] == d),
        (True, -1, -1, True),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, dynamic: bool, additive: bool) -> None:
    build, (causal, left, right, tensor) = MASKS[name]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = build(q.shape[2])
        if additive:
            mask = torch.where(mask, 0.0, torch.finfo(q.dtype).min)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    graphs = Graphs("eager")
    compiled = graphs.compile(attention, dynamic=dynamic)
    for n in (9, 13) if dynamic else (9,):
        q, k, v = (torch.randn(B, HEADS, n, HEAD_DIM) for _ in range(3))
        scores = (q.double() @ k.double().mT) * HEAD_DIM**-0.5
        expected = handwritten.sigmoid(scores.masked_fill(~build(n), -math.inf), -1) @ v.double()
        close(compiled(q, k, v), expected)
    (node,) = graphs.calls
    options = node.kwargs
    assert (options["is_causal"], options["window_left"], options["window_right"]) == (causal, left, right)
    assert (node.args[4] is not None) == tensor


def test_a_mask_that_depends_on_a_length_is_no_proof() -> None:
    """The offset of a cache: the same numbers at this length only."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past = k.shape[2] - q.shape[2]
        visible = torch.arange(k.shape[2]) <= (torch.arange(q.shape[2]) + past)[:, None]
        return torch.softmax((q @ k.mT).masked_fill(~visible, -math.inf), -1) @ v

    graphs = Graphs()
    compiled = graphs.compile(attention, dynamic=True)
    for m, n in ((5, 9), (3, 7), (6, 16)):
        q, k, v = torch.randn(B, HEADS, m, D), torch.randn(B, HEADS, n, D), torch.randn(B, HEADS, n, D)
        visible = torch.ones(m, n, dtype=torch.bool).tril(n - m)
        scores = (q.double() @ k.double().mT).masked_fill(~visible, -math.inf)
        close(compiled(q, k, v), handwritten.sigmoid(scores, -1) @ v.double())
    assert len(graphs.modules) == 1 and len(graphs.calls) == 1


def test_llama_in_training_is_causal() -> None:
    """Without a cache transformers looks for packed documents, and builds a mask that is causal for all that."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=1, use_cache=False, **sizes))
    tokens = torch.randint(0, 50, (B, M))
    graphs = Graphs("eager")
    graphs.compile(model)(input_ids=tokens, labels=tokens)
    (node,) = graphs.calls
    assert node.args[4] is None and node.kwargs["is_causal"] and node.kwargs["window_left"] == -1


@pytest.mark.parametrize("whole", [True, False])
def test_positions_that_are_repeated(whole: bool) -> None:
    """For each sequence, as Whisper's, they go up evenly; behind one another they do not."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, _, n, _ = q.shape
        at = torch.arange(n).unsqueeze(0).repeat(batch, 1) if whole else torch.arange(n // 2).repeat(batch, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=at[:, None, :, None] >= at[:, None, None, :])

    graphs = Graphs()
    q, k, v = (torch.randn(B, HEADS, 8, D) for _ in range(3))
    out = graphs.compile(attention)(q, k, v)
    at = torch.arange(8) if whole else torch.arange(4).repeat(2)
    scores = (q.double() @ k.double().mT * D**-0.5).masked_fill(at[:, None] < at, -math.inf)
    close(out, handwritten.sigmoid(scores, -1) @ v.double())
    (node,) = graphs.calls
    assert node.kwargs["is_causal"] == whole and (node.args[4] is None) == whole


def _prefix(n: int) -> Tensor:
    mask = torch.full((n, n), -math.inf)
    mask[:, :3] = 0
    return mask.triu(1)


def _assigned(n: int) -> Tensor:
    hidden = torch.zeros(n, n, dtype=torch.bool)
    hidden[:, 4:] = True
    return torch.zeros(n, n).masked_fill(hidden, -math.inf)


def _wrapped(n: int) -> Tensor:
    i = torch.arange(n, dtype=torch.uint8)
    return torch.where(i[:, None] - i >= 0, 0.0, -math.inf)


EDITED_MASKS: dict[str, Callable[[int], Tensor]] = {
    "a prefix, written into -inf": _prefix,
    "assigned": _assigned,
    "integers that wrap around": _wrapped,
    "a condition that always holds": lambda n: torch.where(torch.ones(n, n).tril() >= 0, 0.0, -math.inf),
    "floats below the diagonal": lambda n: torch.where(torch.ones(n, n).tril(-1) == 0, 0.0, -math.inf),
    "a sum with a boolean": lambda n: torch.ones(n, n, dtype=torch.bool).tril() + torch.zeros(n, n),
}


@pytest.mark.parametrize("name", EDITED_MASKS)
def test_masks_that_are_not_what_they_seem(name: str) -> None:
    q, k, v = (torch.randn(B, HEADS, M, D) for _ in range(3))
    mask = EDITED_MASKS[name]
    actual = Graphs().compile(lambda q, k, v: torch.softmax(q @ k.mT + mask(M), -1) @ v)(q, k, v)
    close(actual, handwritten.sigmoid(q.double() @ k.double().mT + mask(M).double(), -1) @ v.double())
