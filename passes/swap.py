"""Swaps the softmax of each attention site of a Dynamo graph for a sigmoid, in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from sigswap.passes.find import find
from sigswap.passes.normalize import graph_modules, normalize, renew, source_of
from sigswap.passes.site import LeftAlone


@dataclasses.dataclass(frozen=True)
class SwapResult:
    """What the pass did: the number of sites swapped, and the softmaxes left alone with their reasons."""

    swapped: int
    left_alone: tuple[LeftAlone, ...]
    shadow: GraphModule | None = dataclasses.field(default=None, repr=False, compare=False)
    """Of the graph as it is now, if there is one: for the next pass, which would make the same."""


def swap(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    stand_ins: Mapping[Any, Callable[..., Any]],
    terms: Mapping[str, Any],
    keep: str | None = None,
) -> SwapResult:
    """Replaces every attention softmax in ``graph_module`` (a Dynamo graph) and its checkpoint regions, in place.

    ``stand_ins`` maps a torch function, or the name of a Tensor method, to the function that takes its place: with the
    same arguments and the keywords ``terms``. The graph is linted and recompiled. ``keep``: why nothing is to be
    replaced; the sites are then among those left alone.
    """
    whole = 0 if keep else _swap_whole(graph_module, stand_ins, terms)
    if not _may_have_site(graph_module):
        return SwapResult(whole, ())
    shadow = normalize(graph_module, example_inputs)
    found = find(shadow.graph)
    left = list(found.left_alone)
    swapped: list[Node] = []
    for site in found.sites:
        source = source_of(site.anchor)
        if keep:
            left.append(LeftAlone(site.anchor, keep, True))
            continue
        if site.shifts:
            left.append(LeftAlone(site.anchor, "its scores are shifted by a reduction over their own row", True))
            continue
        if source is None or source.target not in stand_ins:
            reason = "its softmax is inside a function that the graph holds as a whole"
            left.append(LeftAlone(site.anchor, reason, True))
            continue
        _replace(source, stand_ins[source.target], terms)
        swapped.append(source)
    for module in graph_modules(graph_module):
        module.graph.lint()
        module.recompile()
    return SwapResult(len(swapped) + whole, tuple(left), shadow if renew(shadow, swapped) else None)


_WHOLE_ATTENTIONS = (
    F.multi_head_attention_forward,
    torch._native_multi_head_attention,
    torch._transformer_encoder_layer_fwd,
)


def _may_have_site(graph_module: GraphModule) -> bool:
    """Whether any call could be, or hold, a softmax. Most graphs of converted models have none, and need no shadow."""
    for node in (node for module in graph_modules(graph_module) for node in module.graph.nodes):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        own = getattr(node.target, "namespace", None) == "sigswap"
        if node.op.startswith("call") and not own and ("softmax" in name or "attention" in name or "attn" in name):
            return True
    return False


def _swap_whole(
    graph_module: GraphModule, stand_ins: Mapping[Any, Callable[..., Any]], terms: Mapping[str, Any]
) -> int:
    """Functions of torch.nn that are attention by definition, and whose softmax no graph node stands for."""
    count = 0
    for module in graph_modules(graph_module):
        for node in list(module.graph.nodes):
            if node.op == "call_function" and node.target in _WHOLE_ATTENTIONS:
                _replace(node, stand_ins[node.target], terms)
                count += 1
    return count


def _replace(node: Node, stand_in: Callable[..., Any], terms: Mapping[str, Any]) -> None:
    """Makes ``node`` a call of ``stand_in``; its place, users and metadata stay."""
    node.op = "call_function"
    node.target = stand_in
    node.kwargs = {**node.kwargs, **terms}
