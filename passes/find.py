"""Finds the softmax attentions in a pre-dispatch ATen graph: a walk over the data flow, no list of patterns.

From each softmax up, through scale, soft cap, casts, views, additive bias and masks, to the product of query and
key; and down, through dropout, casts and views, to the product with the value. Along the way the axis that holds
the keys is followed, so that a softmax over another axis (experts, slots, channels of a linear attention) is told
from one over the keys. A softmax for which both ends can't be shown is left alone, with the reason.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Graph, Node

from sigswap.passes.by_hand import division_of, is_normalised, is_segmented, is_summed
from sigswap.passes.heads import factor_heads, key_heads, score_heads, score_rows, with_heads
from sigswap.passes.nodes import (
    argument,
    dtype_of,
    edited_by,
    input_at,
    int_arg,
    memory_of,
    rank_of,
    shape_of,
    tensor_input,
)
from sigswap.passes.ops import OPAQUE, is_exponential, op_name, op_of, spelling_of
from sigswap.passes.products import PARAMETER
from sigswap.passes.row_terms import counts_from_the_last_key
from sigswap.passes.scores import trace_scores
from sigswap.passes.site import ONE_HEAD, AttentionSite, FindResult, HeadLayout, LeftAlone
from sigswap.passes.walks import (
    has_pairs_above,
    has_product_above,
    has_product_below,
    has_two_activations,
    unchanged_from,
    weights_values,
    with_above,
    with_below,
)
from sigswap.passes.weights import weighted_sum


def find(graph: Graph, *, is_part: bool = False) -> FindResult:
    """Every softmax attention in ``graph``, and every softmax that is left alone with its reason.

    ``graph``: pre-dispatch ATen with ``meta["val"]`` on its nodes (as ``make_fx(pre_dispatch=True)`` gives), and
    ``meta[PARAMETER]`` set on placeholders that are parameters. The graph is not changed. ``is_part``: what it
    returns goes on in another graph (after a graph break), so that a softmax may meet its value there.
    """
    sites: list[AttentionSite] = []
    left: list[LeftAlone] = []
    data = data_dependent(graph)
    for node in graph.nodes:
        op = op_of(node)
        if op.name == "scaled_dot_product_attention":
            sites.append(_sdpa_site(node))
        elif op.softmax or (op.name == "log_softmax" and _exponents(node)):
            found = score_site(node, int_arg(node, 1), data)
            if isinstance(found, AttentionSite) and not op.softmax and not _is_exponentiated(node):
                found = LeftAlone(node, "its log_softmax is changed before it becomes probabilities", True)
            if isinstance(found, AttentionSite):
                sites.append(found)
            else:
                left.append(_cut_off(found, data) if is_part and not found.attention else found)
        elif is_exponential(node):
            by_hand = _by_hand(node, data)
            if by_hand is None and is_part and _is_returned(node) and _of_two_activations(node, data):
                by_hand = LeftAlone(node, "the graph breaks within its softmax, which is written by hand", True)
            if by_hand is None and is_segmented(node):
                of_pairs = _of_pairs(node, data)
                by_hand = LeftAlone(node, "its softmax is over segments, as along the edges of a graph", of_pairs)
            if by_hand is not None:
                (sites if isinstance(by_hand, AttentionSite) else left).append(by_hand)  # type: ignore[arg-type]
        elif op.name == "flex_attention":
            if _reads_statistics(node):
                reason = "the logsumexp or the maximum of its scores is used, which a sigmoid does not have"
                left.append(LeftAlone(node, reason, True))
            else:
                sites.append(_site_of_call(node, "functions"))
        elif any(part in op.name for part in OPAQUE):
            left.append(LeftAlone(node, f"it runs inside {op.name}, whose softmax cannot be reached", True))
    return FindResult(tuple(sites), tuple(left))


def _cut_off(left: LeftAlone, data: set[Node]) -> LeftAlone:
    """``left``, in doubt if the graph begins after the product of query and key, or ends before that with the value."""
    scores, axis = tensor_input(left.anchor), int_arg(left.anchor, 1)
    if axis is None or not rank_of(scores):
        return left
    origin = trace_scores(scores, (axis % rank_of(scores),), set())
    found, _ = weighted_sum(left.anchor, axis % rank_of(scores))
    returned = found is None and _is_returned(left.anchor)
    if origin.products and origin.products[0].key in data and returned:
        return LeftAlone(left.anchor, "the graph breaks before its probabilities meet a value", True)
    if origin.is_given and found is not None and has_two_activations(found[0]):
        return LeftAlone(left.anchor, "the graph breaks between its scores and the product of query and key", True)
    if origin.is_given and returned and rank_of(scores) > 2:
        return LeftAlone(left.anchor, "the graph breaks before and after it, so what it is cannot be told", True)
    return left


def _is_returned(node: Node) -> bool:
    """Whether ``node``, or what is made of it, goes on in another graph."""
    return any(user.op == "output" for below in with_below(node) for user in below.users)


def _of_two_activations(exponential: Node, data: set[Node]) -> bool:
    """Whether ``exponential`` is taken of a product of query and key."""
    scores = input_at(exponential, 1 if op_name(exponential) == "pow" else 0)
    if scores is None or rank_of(scores) < 2:
        return False
    return any(
        _is_computed(product.key, data)
        for axis in (rank_of(scores) - 1, rank_of(scores) - 2)
        for product in trace_scores(scores, (axis,), set()).products
    )


def _of_pairs(exponential: Node, data: set[Node]) -> bool:
    """Whether ``exponential`` is taken of sums of products of two activations, of whatever form."""

    def is_end(above: Node) -> bool:
        op = op_of(above)
        return op.product or op.layer or op.softmax

    def is_pair(above: Node) -> bool:
        factors = [source for source in above.all_input_nodes if source in data]
        return op_name(above) == "mul" and len(factors) == 2 and any(op_name(user) == "sum" for user in above.users)

    above = list(with_above(exponential, is_end))
    return any(is_pair(each) or (op_of(each).product and has_two_activations(each)) for each in above)


def _by_hand(node: Node, data: set[Node]) -> AttentionSite | LeftAlone | None:
    """An attention whose softmax is in pieces, from ``node``, an exp: ``exp(s) / exp(s).sum(-1)``, or
    ``exp(s - s.logsumexp(-1))``."""
    rank, scores = rank_of(node), input_at(node, 1 if op_name(node) == "pow" else 0)
    if scores is None or rank < 2 or _is_logarithm(scores):
        return None
    division = division_of(node) if op_name(node) == "exp" else None
    if division is not None:
        found = score_site(division.node, division.axis, data, scores)
        if isinstance(found, AttentionSite):
            return dataclasses.replace(found, exponential=node, weighted=division.weighted, inverse=division.inverse)
        return found if found.attention else None
    summed = is_summed(node)
    for axis in (rank - 1, rank - 2):
        found = score_site(node, axis, data, scores)
        if isinstance(found, AttentionSite) and op_name(node) == "exp" and is_normalised(scores, found.shifts, axis):
            return dataclasses.replace(found, exponential=node)
        if (summed and (isinstance(found, AttentionSite) or found.attention)) or _weights_a_value(
            node, axis, data, scores
        ):
            reason = f"its softmax is written by hand, with {spelling_of(node)}, in an unknown form; call softmax"
            return LeftAlone(node, reason, True)
    return None


def _weights_a_value(node: Node, axis: int, data: set[Node], scores: Node) -> bool:
    """Whether ``node``, made of a product of query and key, goes into one with a value: an attention of some form."""
    products = trace_scores(scores, (axis,), set()).products
    return any(_is_computed(product.key, data) for product in products) and weighted_sum(node, axis)[0] is not None


def _is_logarithm(node: Node) -> bool:
    """Whether ``node`` is a log_softmax, in whatever dtype."""
    return op_name(unchanged_from(node)) == "log_softmax"


def _is_exponentiated(node: Node) -> bool:
    """Whether an exp takes the logarithms ``node`` back, in whatever dtype."""
    users = list(node.users)
    return any(op_name(user) == "exp" or (op_of(user).same and _is_exponentiated(user)) for user in users)


def _exponents(node: Node) -> bool:
    """Whether logarithms ``node`` go into an exponential, perhaps changed one by one."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if is_exponential(user):
                return True
            if op_of(user).elementwise and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def _sdpa_site(node: Node) -> AttentionSite:
    mask = argument(node, 3, "attn_mask")
    if argument(node, 5, "is_causal"):
        mask_kind = "causal"
    elif isinstance(mask, Node):
        mask_kind = "boolean" if dtype_of(mask) == torch.bool else "additive"
    else:
        mask_kind = "none"
    scale = argument(node, 6, "scale")
    site = _site_of_call(node, mask_kind, bool(argument(node, 4, "dropout_p")))
    return dataclasses.replace(site, scale=scale if isinstance(scale, float) else None)


def _site_of_call(node: Node, mask: str, dropout: bool = False) -> AttentionSite:
    """The site of a function of query, key and value that is attention."""
    query, key = tensor_input(node, 0), tensor_input(node, 1)
    rank, query_shape = rank_of(query), shape_of(query)
    head = factor_heads(query, rank - 1)
    if head is None:
        head = HeadLayout(rank - 3, query_shape[-3]) if query_shape and rank >= 4 else ONE_HEAD
    return AttentionSite(
        kind="sdpa",
        anchor=node,
        output=node,
        products=(),
        key_axis=rank - 1,
        row_axis=rank - 2,
        head=head,
        head_dim=query_shape[-1] if query_shape else None,
        key_heads=1 if head.axis == rank_of(key) - 2 else key_heads(key, head),  # the heads may be further rows
        mask=mask,
        dropout=dropout,
    )


def _reads_statistics(node: Node) -> bool:
    """Whether the logsumexp or the maximum of a flex_attention's scores is used, which a sigmoid does not have."""
    return any(user.args[1] != 0 and user.users for user in node.users if op_name(user) == "getitem")


def data_dependent(graph: Graph) -> set[Node]:
    """The nodes that depend on the model's inputs, not on its parameters alone."""
    data: set[Node] = set()
    in_memory: dict[int | None, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            if not node.meta.get(PARAMETER):
                data.add(node)
        elif any(source in data for source in node.all_input_nodes):
            data.add(node)
            for edited in edited_by(node):  # a cache that is written to is read by other views of it
                data.update(in_memory.get(memory_of(edited), ()))
        in_memory.setdefault(memory_of(node), []).append(node)
    return data


def score_site(
    anchor: Node, axis: int | None, data: set[Node], scores: Node | None = None
) -> AttentionSite | LeftAlone:
    """The attention whose probabilities ``anchor`` makes from ``scores`` over their axis ``axis``.

    ``data``: :func:`data_dependent` of the graph. The scores are the anchor's first argument by default.
    """
    scores = tensor_input(anchor) if scores is None else scores
    shape = shape_of(scores)
    if shape is None or axis is None or not shape:
        return LeftAlone(anchor, "the shape of its scores is not known", False)
    key_axis = axis % len(shape)

    origin = trace_scores(scores, (key_axis,), set())
    # Keys that no input reaches are weights (a router's), unless a layer computed them from learned queries (DETR).
    # Beside a true product they are a bias that depends on the query (DeBERTa, XLNet), so they come last.
    origin.products.sort(key=lambda product: product.key not in data)
    if origin.extra_terms and any(size > 1 and part in data for part, size in origin.extra_terms):
        origin.obstacle = "its softmax runs over the keys and extra logits, as many as its inputs say"
    if origin.products and not _is_computed(origin.products[0].key, data):
        return LeftAlone(anchor, "its keys do not depend on the model's input (a router or a classifier)", False)
    if origin.products and all(weights_values(product.node) for product in origin.products):
        return LeftAlone(anchor, "its scores are what an attention gives, not a product of query and key", False)
    found, lost = weighted_sum(anchor, key_axis)
    # In doubt it is an attention, so that it is not left without a word: where a product of activations goes into the
    # scores, or comes after the probabilities, by ways that are not understood.
    into_product = next((node for node in lost if has_product_below(node)), None)
    if not origin.products:
        doubtful = (found is not None or into_product is not None) and (
            has_product_above(scores) or has_pairs_above(scores, data)
        )
        return LeftAlone(anchor, origin.reason or "its scores are not a product of query and key", doubtful)
    if found is None and into_product is not None:
        reason = f"its probabilities cannot be followed through {spelling_of(into_product)} to the value"
        return LeftAlone(anchor, reason, True)
    if found is None:
        return LeftAlone(anchor, "its probabilities do not weight a value over the softmax's axis", False)
    output, weights = found
    if weights.remade and origin.obstacle is None:
        origin.obstacle = (
            "its probabilities are mixed with others or normalised again before they weight the value, which would "
            "undo or bend what a sigmoid gives"
        )
    if weights.dropped != origin.extra and any(origin.extra) and origin.obstacle is None:
        origin.obstacle = "its softmax runs over the keys and extra logits (attention sinks) that are not dropped"
    for term in origin.terms:
        if term not in data and counts_from_the_last_key(term, with_above(term)):
            origin.obstacle = (
                "its position bias counts from the last key, so each further key shifts whole rows, which a softmax "
                "ignores and a sigmoid does not"
            )
    if origin.obstacle:
        return LeftAlone(anchor, origin.obstacle, True)

    head = score_heads(origin.products[0], scores, shape, key_axis)
    products = tuple(with_heads(traced, head) for traced in origin.products)
    return AttentionSite(
        kind="softmax",
        anchor=anchor,
        output=output,
        products=products,
        key_axis=key_axis,
        row_axis=score_rows(origin.products[0], head),
        head=head,
        head_dim=products[0].head_dim,
        key_heads=key_heads(products[0].key.node, products[0].key.head),
        mask="+".join(sorted(origin.masks)) or "none",
        softcap=origin.softcap,
        dropout=weights.dropout,
        weights_path=weights.path,
        shifts=tuple(origin.shifts),
        extra=origin.extra,
    )


def _is_computed(node: Node, data: set[Node]) -> bool:
    """Whether ``node`` depends on the model's inputs, or is what a layer makes of parameters."""
    return node in data or any(op_of(above).layer or op_of(above).product for above in with_above(node))
