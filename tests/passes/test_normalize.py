"""The shadow of a graph: after a swap, the one at hand is brought up to date, and is what a new one would be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import handwritten
import pytest
import torch
import torch.fx
import torch.nn.functional as F
from handwritten import MODELS, Handwritten
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from sigswap.compiling import backend
from sigswap.passes import lower as lowering
from sigswap.passes.normalize import normalize, source_of
from sigswap.passes.swap import SwapResult, swap

BIAS = {"visible_bias": True, "const_bias": 0.0, "row_cap": None}


def swapped(function: Callable[..., Any], *inputs: Tensor, dynamic: bool | None = None) -> SwapResult:
    """What the swap does with the function's graph. If it gives a shadow, that is equal to a new one."""
    results: list[SwapResult] = []

    def record(graph_module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        results.append(swap(graph_module, example_inputs, backend._STAND_INS, BIAS))
        if results[-1].shadow is not None:
            results[-1].shadow.graph.lint()
            assert described(results[-1].shadow) == described(normalize(graph_module, example_inputs))
        return graph_module.forward

    torch.compile(function, backend=record, fullgraph=True, dynamic=dynamic)(*inputs)
    assert len(results) == 1
    return results[0]


def described(shadow: torch.fx.GraphModule) -> list[tuple[Any, ...]]:
    """All that a pass can know of the shadow's nodes. Memory is told by its first tensor."""
    number = {node: index for index, node in enumerate(shadow.graph.nodes)}
    memories: dict[int, int] = {}
    result = []
    for node, index in number.items():
        value: list[Any] = []
        for each in tree_leaves(node.meta.get("val")):
            value.append(each)
            if isinstance(each, Tensor):
                memory = memories.setdefault(each.untyped_storage()._cdata, index)
                value[-1] = each.dtype, each.shape, each.stride(), each.storage_offset(), memory
        arguments = torch.fx.map_arg((node.args, node.kwargs), lambda each: ("node", number[each]))
        known = sorted(each.name for each in node.meta.get("sigswap_same", ()))
        target = node.target if node.op == "call_function" else node.op
        result.append((target, repr(arguments), value, source_of(node), known, node.meta.get("nn_module_stack")))
    return result


def heads() -> list[Tensor]:
    """[B, H, M, D], as models have them."""
    return [torch.randn(2, 10, 4, 8).transpose(1, 2) for _ in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_handwritten(kind: type[Handwritten]) -> None:
    result = swapped(kind().eval(), torch.randn(2, 12, handwritten.DIM))
    assert result.swapped == kind.sites
    assert result.shadow is not None


def test_varying_lengths() -> None:
    assert swapped(handwritten.NanoGPT().eval(), torch.randn(2, 12, handwritten.DIM), dynamic=True).shadow is not None


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "dropout": lambda q, k, v: F.dropout(torch.softmax(q @ k.mT, -1), 0.5) @ v,
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2),
    "scale and mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, q[0, 0] @ k[0, 0].mT > 0, scale=0.3),
    "dtype": lambda q, k, v: F.softmax(q @ k.mT, dim=-1, dtype=torch.float64).to(v.dtype) @ v,
    "method": lambda q, k, v: (q @ k.mT).softmax(dim=-1) @ v,
    "one after the other": lambda q, k, v: torch.softmax(q @ (torch.softmax(q @ k.mT, -1) @ v).mT, -1) @ v,
    "the probabilities are edited": lambda q, k, v: torch.softmax(q @ k.mT, -1).mul_(2.0) @ v,
    "a view of the output is edited": lambda q, k, v: F.scaled_dot_product_attention(q, k, v).transpose(1, 2).mul_(2.0),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    result = swapped(FORMS[form], *heads())
    assert result.swapped == (2 if form == "one after the other" else 1)
    assert result.shadow is not None


def test_in_a_checkpoint() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(lambda q: torch.softmax(q @ k.mT, -1) @ v, q * 2, use_reentrant=False)

    assert swapped(function, *heads()).shadow is not None


def test_where_the_output_gets_another_order_in_memory_the_shadow_is_made_anew() -> None:
    result = swapped(F.scaled_dot_product_attention, *(each.contiguous() for each in heads()))
    assert result.swapped == 1 and result.shadow is None


def test_under_autocast_the_shadow_is_made_anew() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.softmax(q @ k.mT, -1) @ v

    result = swapped(function, *heads())
    assert result.swapped == 1 and result.shadow is None


def test_within_an_autocast_around_the_whole_graph() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert swapped(FORMS["method"], *heads()).shadow is not None
        assert swapped(FORMS["causal"], *heads()).shadow is not None


def test_the_scores_are_edited() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        scores.masked_fill_(scores > 1, -torch.inf)
        return torch.softmax(scores, -1) @ v

    result = swapped(function, *heads())
    assert result.swapped == 1 and result.shadow is None


def test_one_trace_for_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "normalize", None)
    compiled = torch.compile(handwritten.NanoGPT().eval(), backend="sigswap", options={"inner": "eager"})
    compiled(torch.randn(2, 12, handwritten.DIM))
