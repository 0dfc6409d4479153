"""Finds the softmax attentions in a pre-dispatch ATen graph: a walk over the data flow, no list of patterns.

From each softmax up, through scale, soft cap, casts, views, additive bias and masks, to the product of query and
key; and down, through dropout, casts and views, to the product with the value. Along the way the axis that holds
the keys is followed, so that a softmax over another axis (experts, slots, channels of a linear attention) is told
from one over the keys. A softmax for which both ends can't be shown is left alone, with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch.fx import Graph, Node

from sigswap.passes.axes import axis_map, chain_inputs
from sigswap.passes.heads import factor_heads, key_heads, score_heads, score_rows, with_heads
from sigswap.passes.nodes import argument, axes_arg, dtype_of, input_at, int_arg, rank_of, shape_of, tensor_input
from sigswap.passes.ops import OPAQUE, op_name, op_of, spelling_of
from sigswap.passes.products import PARAMETER, Factors, contraction, follow, is_parameter, product_of
from sigswap.passes.row_terms import counts_from_the_last_key
from sigswap.passes.site import ONE_HEAD, AttentionSite, FindResult, HeadLayout, LeftAlone

_LONGEST_WALK = 256  # ops between a product and its softmax; real models have fewer than 40


def find(graph: Graph) -> FindResult:
    """Every softmax attention in ``graph``, and every softmax that is left alone with its reason.

    ``graph``: pre-dispatch ATen with ``meta["val"]`` on its nodes (as ``make_fx(pre_dispatch=True)`` gives), and
    ``meta[PARAMETER]`` set on placeholders that are parameters. The graph is not changed.
    """
    sites: list[AttentionSite] = []
    left: list[LeftAlone] = []
    data = data_dependent(graph)
    for node in graph.nodes:
        op = op_of(node)
        if op.name == "scaled_dot_product_attention":
            sites.append(_sdpa_site(node))
        elif op.softmax:
            found = score_site(node, int_arg(node, 1), data)
            if isinstance(found, AttentionSite):
                sites.append(found)
            else:
                left.append(found)
        elif op.name in ("exp", "exp2") and (by_hand := _by_hand(node, data)) is not None:
            left.append(by_hand)
        elif any(part in op.name for part in OPAQUE):
            left.append(LeftAlone(node, f"it runs inside {op.name}, whose softmax cannot be reached", True))
    return FindResult(tuple(sites), tuple(left))


def _by_hand(node: Node, data: set[Node]) -> LeftAlone | None:
    """An attention whose softmax is in pieces: ``exp(s) / exp(s).sum(-1)``, or ``log_softmax(s, -1).exp()``."""
    rank, scores = rank_of(node), input_at(node)
    while scores is not None and op_of(scores).same:
        scores = input_at(scores)
    if scores is None or rank < 2:
        return None
    axes: list[int | None] = [rank - 1, rank - 2]
    if op_name(scores) == "log_softmax":
        scores, axes = tensor_input(scores), [int_arg(scores, 1)]
    for found in (score_site(node, axis, data, scores) for axis in axes):
        if isinstance(found, AttentionSite) or found.attention:
            return LeftAlone(node, f"its softmax is written by hand, with {spelling_of(node)}; call softmax", True)
    return None


def _sdpa_site(node: Node) -> AttentionSite:
    query, key = tensor_input(node, 0), tensor_input(node, 1)
    rank, query_shape = rank_of(query), shape_of(query)
    head = factor_heads(query, rank - 1)
    if head is None:
        head = HeadLayout(rank - 3, query_shape[-3]) if query_shape and rank >= 4 else ONE_HEAD
    mask = argument(node, 3, "attn_mask")
    if argument(node, 5, "is_causal"):
        mask_kind = "causal"
    elif isinstance(mask, Node):
        mask_kind = "boolean" if dtype_of(mask) == torch.bool else "additive"
    else:
        mask_kind = "none"
    scale = argument(node, 6, "scale")
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
        mask=mask_kind,
        scale=scale if isinstance(scale, float) else None,
        dropout=bool(argument(node, 4, "dropout_p")),
    )


def data_dependent(graph: Graph) -> set[Node]:
    """The nodes that depend on the model's inputs, not on its parameters alone."""
    data: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if not node.meta.get(PARAMETER):
                data.add(node)
        elif any(source in data for source in node.all_input_nodes):
            data.add(node)
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

    origin = _trace_scores(scores, key_axis, set())
    # Keys that no input reaches are weights (a router's), unless a layer computed them from learned queries (DETR).
    # Beside a true product they are a bias that depends on the query (DeBERTa, XLNet), so they come last.
    origin.products.sort(key=lambda product: product.key not in data)
    if origin.products and not _is_computed(origin.products[0].key, data):
        return LeftAlone(anchor, "its keys do not depend on the model's input (a router or a classifier)", False)
    found, lost = _weighted_sum(anchor, key_axis)
    # In doubt it is an attention, so that it is not left without a word: where a product of activations goes into the
    # scores, or comes after the probabilities, by ways that are not understood.
    into_product = next((node for node in lost if _has_product_below(node)), None)
    if not origin.products:
        doubtful = (found is not None or into_product is not None) and _has_product_above(scores)
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
    for term in origin.terms:
        if term not in data and counts_from_the_last_key(term, _with_above(term)):
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
    )


def _is_computed(node: Node, data: set[Node]) -> bool:
    """Whether ``node`` depends on the model's inputs, or is what a layer makes of parameters."""
    return node in data or any(op_of(above).layer or op_of(above).product for above in _with_above(node))


def _has_product_above(node: Node) -> bool:
    """Whether a product of two activations goes into ``node``, with no layer in between."""

    def is_end(above: Node) -> bool:
        op = op_of(above)
        mixes = op.name == "einsum" and rank_of(above) > 3  # heads, by a parameter
        return (op.product and not mixes) or op.layer or op.softmax

    return any(op_of(above).product and _has_two_activations(above) for above in _with_above(node, is_end))


def _has_product_below(node: Node) -> bool:
    """Whether ``node`` is, or goes into, a product of two activations, with no layer in between."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        op = op_of(current)
        if op.product and _has_two_activations(current):
            return True
        if not op.layer and not op.softmax:
            pending += [user for user in current.users if user not in seen]
            seen.update(current.users)
    return False


def _has_two_activations(product: Node) -> bool:
    return sum(rank_of(source) > 0 and not is_parameter(source) for source in product.all_input_nodes) > 1


def _with_above(node: Node, is_end: Callable[[Node], bool] = lambda node: False) -> Iterator[Node]:
    """``node`` and what it comes from, but nothing that goes through an end."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        yield current
        if not is_end(current):
            pending += [source for source in current.all_input_nodes if source not in seen]
            seen.update(current.all_input_nodes)


# Up: from the softmax to the product of query and key.


@dataclasses.dataclass
class _Origin:
    """Where scores come from: the products summed in them, and what was met on the way."""

    products: list[Factors] = dataclasses.field(default_factory=list)
    masks: set[str] = dataclasses.field(default_factory=set)
    softcap: bool = False
    reason: str | None = None  # why no product was found
    obstacle: str | None = None  # why the attention cannot be swapped
    shifts: list[Node] = dataclasses.field(default_factory=list)  # that are subtracted from them, see AttentionSite
    terms: list[Node] = dataclasses.field(default_factory=list)  # that are added to them


def _trace_scores(node: Node, key_axis: int, seen: set[tuple[Node, int]]) -> _Origin:
    op = op_of(node)
    if (node, key_axis) in seen or len(seen) > _LONGEST_WALK:
        return _Origin(reason="its scores come from too many ops to follow")
    seen.add((node, key_axis))
    product = product_of(node, key_axis)
    if isinstance(product, str):
        return _Origin(reason=product)
    origin = _Origin()
    if product is not None:
        origin.products.append(product)
        if op.name == "baddbmm" and node.kwargs.get("beta", 1) != 0:
            _merge_term(origin, node, tensor_input(node), key_axis, seen)
        return origin

    inputs = chain_inputs(node)
    if not inputs:
        origin.reason = f"its scores come from {spelling_of(node) or node.op}, not from a product of query and key"
        return origin
    if op.masks:
        origin.masks.add("boolean")
    origin.softcap = op.name == "tanh"
    for source in inputs:
        _merge_term(origin, node, source, key_axis, seen)
    if not origin.products:
        return origin
    if op.name in ("add", "sub"):
        for source in node.all_input_nodes:
            if _is_row_reduction(source):
                shift = _only_shift(source, node)
                origin.shifts += [] if shift is None else [shift]
                if shift is None:
                    origin.obstacle = (
                        "its scores are shifted by a reduction over their own row, which a softmax ignores and a "
                        "sigmoid does not; remove the shift"
                    )
    before, after = shape_of(inputs[0]), shape_of(node)
    if op.name == "pad" and before is not None and after is not None and after[key_axis] != before[key_axis]:
        origin.obstacle = "its softmax runs over the keys and padded logits"
    if op.name == "cat":
        axis = int_arg(node, 1, default=0)
        if axis is not None and axis % rank_of(node) == key_axis and len(origin.products) < len(inputs):
            origin.obstacle = "its softmax runs over the keys and extra logits (attention sinks)"
    return origin


def _merge_term(origin: _Origin, node: Node, source: Node, key_axis: int, seen: set[tuple[Node, int]]) -> None:
    """Adds to ``origin`` what flows from ``source`` into ``node``."""
    axes, before, after = axis_map(node, source), shape_of(source), shape_of(node)
    additive = op_name(node) in ("add", "sub", "baddbmm")
    source_axis = axes.index(key_axis) if axes is not None and key_axis in axes else None
    if source_axis is None or before is None or after is None or (before[source_axis] == 1 != after[key_axis]):
        if additive:
            origin.masks.add("additive")
        elif origin.reason is None and source_axis is None:
            origin.reason = f"the softmax's axis cannot be followed through {spelling_of(node)}"
        return
    term = _trace_scores(source, source_axis, seen)
    if op_of(node).mixes:
        term.products = [product for product in term.products if _mixes_heads(product, node, source)]
    for product in term.products:
        product.path.append((node, source))
    if term.products:
        origin.masks |= term.masks
    elif additive:
        origin.masks.add("additive")
        origin.terms.append(source)
    origin.terms += term.terms
    origin.shifts += term.shifts
    origin.products += term.products
    origin.softcap |= term.softcap
    origin.obstacle = origin.obstacle or term.obstacle
    origin.reason = origin.reason or term.reason


def _mixes_heads(product: Factors, node: Node, source: Node) -> bool:
    """Whether a linear layer on the scores mixes heads ("talking heads"), and not queries or channels."""
    mixed = rank_of(source) - 1 if op_name(node) == "linear" else 1
    return any(follow(product.path, axis) == mixed for axis in product.batch_axes)


def _is_row_reduction(node: Node) -> bool:
    while (source := _same_rows(node)) is not None:
        node = source
    return op_of(node).reduces


def _same_rows(node: Node) -> Node | None:
    """What ``node`` is made of, if that was one number per row as well, and 0 stays 0."""
    scaled = op_name(node) in ("mul", "div") and len(node.all_input_nodes) == 1
    return input_at(node) if op_of(node).keeps_row_numbers or scaled else None


def _only_shift(node: Node, user: Node) -> Node | None:
    """The maximum or logsumexp that ``node`` is, if nothing but ``user`` uses it."""
    while set(node.users) == {user} and (source := _same_rows(node)) is not None:
        node, user = source, node
    others = [other for other in node.users if other is not user and other.users]
    return node if not others and op_name(node) in ("amax", "max", "logsumexp") else None


# Down: from the softmax to the product with the value.


@dataclasses.dataclass(frozen=True)
class _Weights:
    """The probabilities at one node on their way down."""

    node: Node
    axis: int
    path: tuple[Node, ...] = ()  # from after the softmax to the node
    dropout: bool = False
    multiplied: bool = False  # by another tensor: a sum over the keys would then be the product with the value
    remade: bool = False  # added to something, or divided by more than a number


def _weighted_sum(anchor: Node, key_axis: int) -> tuple[tuple[Node, _Weights] | None, list[Node]]:
    """The product that contracts the probabilities' keys with a value, and the probabilities as it gets them.

    Also the ops by which the keys were lost, other than products of which the keys are known.
    """
    pending, lost = [_Weights(anchor, key_axis)], list[Node]()
    seen: set[tuple[Node, int]] = set()
    while pending:
        weights = pending.pop(0)
        for user in weights.node.users:
            if (user, weights.axis) in seen:
                continue
            seen.add((user, weights.axis))
            if _contracts(user, weights.node, weights.axis) or (weights.multiplied and _sums(user, weights)):
                return (user, weights), lost
            inputs = chain_inputs(user)
            axes = axis_map(user, weights.node) if weights.node in inputs else None
            axis = _axis_beside_parameter(user, weights) if axes is None else axes[weights.axis]
            if axis is None:
                reduces = op_of(user).reduces or op_name(user) == "sum"
                if contraction(user) is None and not op_of(user).layer and not reduces:
                    lost.append(user)
                continue
            name, tensors = op_name(user), len(inputs)
            pending.append(
                _Weights(
                    user,
                    axis,
                    (*weights.path, user),
                    weights.dropout or "dropout" in name,
                    weights.multiplied or (name == "mul" and tensors == 2),
                    weights.remade or name in ("add", "sub") or (name == "div" and tensors == 2),
                )
            )
    return None, lost


def _axis_beside_parameter(user: Node, weights: _Weights) -> int | None:
    """Where the keys are after an einsum with a parameter, which mixes other axes (the heads, say)."""
    product = contraction(user) if op_name(user) == "einsum" else None
    if product is None or weights.node not in product.factors:
        return None
    at = product.factors.index(weights.node)
    name = product.names[at][weights.axis]
    kept = is_parameter(product.factors[1 - at]) and name in product.out and name not in product.names[1 - at]
    return product.out.index(name) if kept else None


def _sums(user: Node, weights: _Weights) -> bool:
    return op_name(user) == "sum" and axes_arg(user, 1, rank_of(weights.node)) == (weights.axis,)


def _contracts(user: Node, weights: Node, axis: int) -> bool:
    """Whether ``user`` is a product that sums over ``axis`` of ``weights``, and no layer."""
    product = contraction(user)
    if product is None or weights not in product.factors:
        return False
    at = product.factors.index(weights)
    name, other = product.names[at][axis], product.factors[1 - at]
    return name in product.names[1 - at] and name not in product.out and not (op_of(user).layer and is_parameter(other))
