"""Lowers each sigmoid attention of a Dynamo graph to one call of ``sigswap::sigmoid_attention``, in place.

What is found: ``sigswap::sigmoid_probs`` (what a softmax became), and ``torch.sigmoid``, between a product of query and
key and a product with a value. Scale, soft cap, additive terms, masks, row bias and dropout on the way become operands
of the op (:mod:`sigswap.passes.match`); copies of keys and values that repeat their heads are left out, for the op
groups heads itself (:mod:`sigswap.passes.emit`). A call of the op that is in the graph already gets its masks and heads
looked at, too. Masks that the graph proves to be bands become ``is_causal`` and a window (:mod:`sigswap.passes.masks`).

As in :mod:`sigswap.passes.swap` it is a shadow of the graph that is read, and the Dynamo graph that is changed. What
cannot be lowered stays as it is, with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from sigswap.passes.emit import OP, Emission
from sigswap.passes.find import data_dependent, score_site
from sigswap.passes.masks import Masks
from sigswap.passes.match import BLOCKS_OP, Match, Refused, match_call
from sigswap.passes.nodes import number_arg, rank_of
from sigswap.passes.normalize import graph_modules, normalize, source_of
from sigswap.passes.ops import op_name
from sigswap.passes.site import LeftAlone, Lowered

_PROBS = torch.ops.sigswap.sigmoid_probs.default


@dataclasses.dataclass(frozen=True)
class LowerResult:
    """What the pass did. ``left_alone``: the sigmoid attentions that stay unfused, with their reasons."""

    lowered: tuple[Lowered, ...]
    left_alone: tuple[LeftAlone, ...]


def lower(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    handwritten: bool = True,
    stand_ins: Sequence[Callable[..., Any]] = (),
    shadow: GraphModule | None = None,
) -> LowerResult:
    """Lowers every sigmoid attention in ``graph_module`` (a Dynamo graph) and its checkpoint regions, in place.

    ``handwritten``: those around a plain ``torch.sigmoid``, too. ``stand_ins``: functions in the graph that contain an
    attention (a graph without one, and without sigswap's ops, is not looked at). ``shadow``: what
    :func:`~sigswap.passes.normalize.normalize` would give for the graph as it is, if somebody has it; it is used up.
    The graph is linted and recompiled.
    """
    if not _may_have_site(graph_module, handwritten, frozenset(stand_ins)):
        return LowerResult((), ())
    try:
        shadow = normalize(graph_module, example_inputs) if shadow is None else shadow
    except Exception as error:  # the graph itself compiles: what the shadow cannot run must not stop it
        first = next(iter(graph_module.graph.nodes))
        reason = f"the graph could not be traced a second time ({type(error).__name__}: {str(error)[:200]})"
        return LowerResult((), (LeftAlone(first, reason, True),))
    graph = shadow.graph
    graph.eliminate_dead_code()  # probabilities that nobody reads are no second use
    data, masks = data_dependent(graph), Masks(graph)
    lowered: list[Lowered] = []
    left: list[LeftAlone] = []
    replaced: set[Node] = set()
    for node in graph.nodes:
        if node.target is OP or node.target is BLOCKS_OP:
            lowered.append(_lower_again(node, masks))
        elif node.target is _PROBS or (handwritten and op_name(node) == "sigmoid" and rank_of(node) >= 2):
            found = _lower_scores(node, data, masks, replaced)
            if isinstance(found, Lowered):
                lowered.append(found)
            elif found.attention or node.target is _PROBS:
                left.append(dataclasses.replace(found, attention=True))
    for module in graph_modules(graph_module):
        module.graph.lint()
        module.recompile()
    return LowerResult(tuple(lowered), tuple(left))


def _lower_scores(anchor: Node, data: set[Node], masks: Masks, replaced: set[Node]) -> Lowered | LeftAlone:
    """Lowers the attention whose probabilities ``anchor`` makes from scores, and adds its nodes to ``replaced``."""
    rank = rank_of(anchor)
    axes = [int(number_arg(anchor, 2, "dim", -1)) % rank] if anchor.target is _PROBS else [rank - 1, rank - 2]
    sites = [score_site(anchor, axis, data) for axis in axes]
    site = next((site for site in sites if not isinstance(site, LeftAlone)), None)
    if site is None:
        alone = [left for left in sites if isinstance(left, LeftAlone)]
        return next((left for left in alone if left.attention), alone[0])
    if site.shifts:
        return LeftAlone(anchor, "its scores are shifted by a reduction over their own row", True)
    try:
        call = Match(site, masks).call()
        if not replaced.isdisjoint(call.path):
            raise Refused("a part of it is a part of another attention, which was lowered")
        result = Emission(call, masks).emit()
        replaced.update(call.path)
        return result
    except Refused as refused:
        return LeftAlone(anchor, str(refused), True)


def _lower_again(node: Node, masks: Masks) -> Lowered:
    """A call of the op, with what its masks and its keys' heads turn out to be."""
    try:
        return Emission(match_call(node, masks), masks).emit()
    except Refused as refused:
        return Lowered(source_of(node) or node, f"as it is: {refused}")


def _may_have_site(graph_module: GraphModule, handwritten: bool, stand_ins: frozenset[Callable[..., Any]]) -> bool:
    for node in (node for module in graph_modules(graph_module) for node in module.graph.nodes):
        if getattr(node.target, "namespace", None) == "sigswap" or node.target in stand_ins:
            return True
        if handwritten and (op_name(node) == "sigmoid" or node.target == "sigmoid"):
            return True
    return False
