"""Swaps the softmax of each attention site of a Dynamo graph for a sigmoid, in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from sigswap.passes.find import find
from sigswap.passes.nodes import tensor_input
from sigswap.passes.normalize import graph_modules, normalize, renew, source_of
from sigswap.passes.ops import op_name
from sigswap.passes.site import AttentionSite, LeftAlone
from sigswap.passes.walks import with_above


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
    is_part: bool = False,
) -> SwapResult:
    """Replaces every attention softmax in ``graph_module`` (a Dynamo graph) and its checkpoint regions, in place.

    ``stand_ins`` maps a torch function, or the name of a Tensor method, to the function that takes its place: with the
    same arguments and the keywords ``terms``. The graph is linted and recompiled. ``keep``: why nothing is to be
    replaced; the sites are then among those left alone. ``is_part``: the graph goes on in another one.
    """
    whole = 0 if keep else _swap_whole(graph_module, stand_ins, terms)
    if not _may_have_site(graph_module):
        return SwapResult(whole, ())
    shadow = normalize(graph_module, example_inputs)
    found = find(shadow.graph, is_part=is_part)
    left = list(found.left_alone)
    swapped, changed = 0, list[Node]()
    for site in found.sites:
        reason = keep or _swap_site(site, stand_ins, terms, changed)
        if reason:
            left.append(LeftAlone(site.anchor, reason, True))
        else:
            swapped += 1
    for module in graph_modules(graph_module):
        module.graph.lint()
        module.recompile()
    is_renewed = len(changed) == swapped and renew(shadow, changed)  # each site had one call, and that alone is new
    return SwapResult(swapped + whole, tuple(left), shadow if is_renewed else None)


def _swap_site(
    site: AttentionSite,
    stand_ins: Mapping[Any, Callable[..., Any]],
    terms: Mapping[str, Any],
    changed: list[Node],
) -> str | None:
    """Swaps one site, and adds the Dynamo nodes of its calls to ``changed``; a reason if it cannot."""
    exponential_node = site.exponential if site.exponential is not site.anchor else None
    if any((call := source_of(shift)) is None or call.target not in stand_ins for shift in site.shifts):
        return "its scores are shifted by a reduction over their own row, which cannot be taken out"
    found = [source_of(node) for node in (site.anchor, exponential_node, *site.shifts) if node is not None]
    calls = [call for call in found if call is not None and call.target in stand_ins and call.args]
    if len(calls) < len(found) or len({call.graph for call in calls}) > 1:
        return "its softmax is inside a function that the graph holds as a whole"
    if any("out" in call.kwargs and op_name(site.anchor) not in ("softmax", "log_softmax") for call in calls):
        return "its softmax is written by hand, and a part of it writes to a tensor that it is given (out)"
    anchor, graph = calls[0], calls[0].graph
    own: dict[str, Any] = {"extra": site.extra} if any(site.extra) else {}
    if site.exponential is site.anchor:
        with graph.inserting_before(anchor):
            anchor.args = (graph.call_function(torch.clone, anchor.args[:1]), site.key_axis)
        anchor.target, anchor.op, anchor.kwargs = torch.softmax, "call_function", {}
    elif site.exponential is not None:
        exponential = calls[1]
        with graph.inserting_before(exponential):  # what is edited in place afterwards is not the copy
            own |= {"scores": graph.call_function(torch.clone, exponential.args[:1]), "dim": site.key_axis}
        if not site.weighted:  # the rest of it is a softmax
            anchor.args, anchor.target = (own.pop("scores"), own.pop("dim")), torch.softmax
        elif _is_inverse_first(site):
            anchor.args = anchor.args[1::-1]
        _replace(exponential, stand_ins[exponential.target], {})
        changed.append(exponential)
    for shift in calls[-len(site.shifts) :] if site.shifts else ():
        users = list(shift.users)
        with graph.inserting_after(shift):
            zeros = graph.call_function(stand_ins[shift.target], (shift,))
        for user in users:
            user.replace_input_with(shift, zeros)
        changed.append(shift)
    _replace(anchor, stand_ins[anchor.target], {**terms, **own})
    changed.append(anchor)
    return None


def _is_inverse_first(site: AttentionSite) -> bool:
    """Whether the anchor multiplies the reciprocal of the sum by the numbers, not them by it."""
    first = with_above(tensor_input(site.anchor), lambda node: node is site.exponential)
    return site.inverse is not None and site.inverse in first


_WHOLE_ATTENTIONS = (
    F.multi_head_attention_forward,
    torch._native_multi_head_attention,
    torch._transformer_encoder_layer_fwd,
)


_PARTS_OF_NAMES = ("softmax", "softmin", "attention", "attn")
_EXPONENTIALS = ("exp", "exp_", "exp2", "exp2_", "expm1", "expm1_")
_POWERS = ("pow", "float_power", "__pow__", "__rpow__")


def _may_have_site(graph_module: GraphModule) -> bool:
    """Whether any call could be, or hold, a softmax. Most graphs of converted models have none, and need no shadow."""
    for node in (node for module in graph_modules(graph_module) for node in module.graph.nodes):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        own = getattr(node.target, "namespace", None) == "sigswap"
        power = name in _POWERS and not all(isinstance(base, Node) for base in node.args[:1])
        known = name in _EXPONENTIALS or power or any(part in name for part in _PARTS_OF_NAMES)
        if node.op.startswith("call") and not own and known:
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
