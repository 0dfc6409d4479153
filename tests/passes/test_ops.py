"""The table of ops: a new spelling of attention is a row of it, or a word in one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import handwritten
import pytest
import torch
import torch.nn.functional as F
from compare import close_with_gradients
from graphs import Graphs
from torch import Tensor

from sigswap.passes.ops import OPS, Op

B, H, M, N, D = 2, 3, 5, 7, 8


def aliases() -> Iterator[tuple[str, str]]:
    """torch's functions that its documentation calls aliases of others, by their ATen names, and those others."""
    places: list[tuple[str, Any]] = [("", torch), ("", F), ("linalg_", torch.linalg), ("special_", torch.special)]
    for prefix, place in places:
        for name in dir(place):
            text = getattr(place, name).__doc__
            found = re.search(r"Alias (?:for|of) :func:`~?torch\.([a-z_]+)`", text if isinstance(text, str) else "")
            if found:
                yield prefix + name, found[1]


def test_an_alias_of_torchs_own_is_known_if_the_op_is() -> None:
    known = {(name, of) for name, of in aliases() if of in OPS}
    assert {("clip", "clamp"), ("swapaxes", "transpose"), ("linalg_matmul", "matmul")} <= known
    assert [(name, of) for name, of in sorted(known) if OPS.get(name) is not OPS[of]] == []


SPELLINGS = {
    "clip": lambda q, k, mask: torch.clip(q @ k.mT, -1e4, 1e4).masked_fill(mask, -torch.inf),
    "linalg.matmul": lambda q, k, mask: torch.linalg.matmul(q, k.mT).masked_fill(mask, -torch.inf),
    "negative": lambda q, k, mask: (torch.negative(q) @ torch.negative(k).mT).masked_fill(mask, -torch.inf),
    "greater": lambda q, k, mask: (q @ k.mT).masked_fill(
        torch.arange(N).greater(torch.arange(M)[:, None] + 2), -torch.inf
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_aliases_are_lowered(name: str) -> None:
    mask = torch.ones(M, N, dtype=torch.bool).triu(3)

    def attention(q: Tensor, k: Tensor, v: Tensor, normalise: Any = handwritten.softmax) -> Tensor:
        return normalise(SPELLINGS[name](q, k, mask), -1) @ v

    leaves = [torch.randn(shape, requires_grad=True) for shape in ((B, H, M, D), (B, H, N, D), (B, H, N, D))]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    graphs = Graphs()
    actual, expected = graphs.compile(attention)(*leaves), attention(*exact, handwritten.sigmoid)
    close_with_gradients(actual, expected, leaves, exact)
    assert len(graphs.calls) == 1 and graphs.unfused == 0
    assert graphs.calls[0].kwargs["window_right"] == (2 if name == "greater" else -1)


@torch.library.custom_op("toy::turned", mutates_args=())
def turned(x: Tensor) -> Tensor:
    """The last two axes in the other order, in memory of its own."""
    return x.mT.contiguous()


turned.register_fake(lambda x: torch.empty_like(x.mT, memory_format=torch.contiguous_format))
turned.register_autograd(lambda context, grad: turned(grad))


def test_a_row_is_all_that_a_new_op_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that nobody knows ends the walk, by name; with a row its attention is found, swapped and lowered."""

    def attention(q: Tensor, k: Tensor, v: Tensor, normalise: Any = handwritten.softmax) -> Tensor:
        return normalise(turned(k @ q.mT) * D**-0.5, -1) @ v

    leaves = [torch.randn(shape, requires_grad=True) for shape in ((B, H, M, D), (B, H, N, D), (B, H, N, D))]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="its scores come from turned"):
        Graphs().compile(attention)(*leaves)

    monkeypatch.setitem(OPS, "turned", Op("turned", moves=lambda args, rank: [*range(rank - 2), rank - 1, rank - 2]))
    graphs = Graphs()
    actual, expected = graphs.compile(attention)(*leaves), attention(*exact, handwritten.sigmoid)
    close_with_gradients(actual, expected, leaves, exact)
    assert len(graphs.calls) == 1 and graphs.unfused == 0
