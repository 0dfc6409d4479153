"""Down from a softmax: from its probabilities to the product with the value, through dropout, casts and views."""

from __future__ import annotations

import dataclasses

from torch.fx import Node

from sigswap.passes.axes import axis_map, chain_inputs
from sigswap.passes.nodes import axes_arg, int_arg, rank_of, shape_of
from sigswap.passes.ops import is_exponential, op_name, op_of
from sigswap.passes.products import contraction, is_parameter, sums_with


@dataclasses.dataclass(frozen=True)
class Weights:
    """The probabilities at one node on their way down."""

    node: Node
    axis: int
    path: tuple[Node, ...] = ()  # from after the softmax to the node
    dropout: bool = False
    multiplied: bool = False  # by another tensor: a sum over the keys would then be the product with the value
    remade: bool = False  # added to something, or divided by more than a number
    dropped: tuple[int, int] = (0, 0)  # how many were cut off along the axis, at its start and at its end
    logarithms: bool = False  # a log_softmax's, before their exp


def weighted_sum(anchor: Node, key_axis: int) -> tuple[tuple[Node, Weights] | None, list[Node]]:
    """The product that contracts the probabilities' keys with a value, and the probabilities as it gets them.

    Also the ops by which the keys were lost, other than products of which the keys are known.
    """
    logarithms = op_name(anchor) == "log_softmax"
    pending, lost = [Weights(anchor, key_axis, logarithms=logarithms)], list[Node]()
    seen: set[tuple[Node, int]] = set()
    while pending:
        weights = pending.pop(0)
        for user in weights.node.users:
            if (user, weights.axis) in seen:
                continue
            seen.add((user, weights.axis))
            meets = _contracts(user, weights.node, weights.axis) or (weights.multiplied and _sums(user, weights))
            if meets and not weights.logarithms:
                return (user, weights), lost
            inputs = chain_inputs(user)
            axes = axis_map(user, weights.node) if weights.node in inputs else None
            axis = _axis_beside_parameter(user, weights) if axes is None else axes[weights.axis]
            exponent = weights.logarithms and is_exponential(user)
            if exponent:
                axis = weights.axis
            if axis is None:
                reduces = (op_of(user).reduces and op_name(user) != "topk") or op_name(user) == "sum"
                layer = op_of(user).layer and op_name(user) != "addmm"  # which may be a product of activations
                if contraction(user) is None and not layer and not reduces:
                    lost.append(user)
                continue
            name, tensors = op_name(user), len(inputs)
            pending.append(
                Weights(
                    user,
                    axis,
                    (*weights.path, user),
                    weights.dropout or "dropout" in name,
                    weights.multiplied or (name == "mul" and tensors == 2 and _is_spread(user, weights, anchor)),
                    weights.remade or name in ("add", "sub") or (name == "div" and tensors == 2),
                    _dropped(user, weights),
                    weights.logarithms and not exponent,
                )
            )
    return None, lost


def _is_spread(user: Node, weights: Weights, anchor: Node) -> bool:
    """Whether ``user`` multiplies the probabilities by what has an axis that they do not have, as a value has."""
    before, after = shape_of(weights.node) or (), shape_of(user) or ()
    return len(after) > rank_of(anchor) or before != after


def _dropped(user: Node, weights: Weights) -> tuple[int, int]:
    """How many numbers along the axis are cut off by ``user`` and before it."""
    before, after = weights.dropped
    if op_name(user) not in ("slice", "narrow") or (int_arg(user, 1, default=0) or 0) % rank_of(user) != weights.axis:
        return weights.dropped
    had, has = (shape_of(weights.node) or ())[weights.axis], (shape_of(user) or ())[weights.axis]
    start = int_arg(user, 2, "start", 0) or 0
    start = max(start + had, 0) if start < 0 else min(start, had)
    return before + start, after + had - start - has


def _axis_beside_parameter(user: Node, weights: Weights) -> int | None:
    """Where the keys are after an einsum with a parameter, which mixes other axes (the heads, say)."""
    product = contraction(user) if op_name(user) == "einsum" else None
    if product is None or weights.node not in product.factors:
        return None
    at = product.factors.index(weights.node)
    name = product.names[at][weights.axis]
    kept = is_parameter(product.factors[1 - at]) and name in product.out and name not in product.names[1 - at]
    return product.out.index(name) if kept else None


def _sums(user: Node, weights: Weights) -> bool:
    return op_name(user) == "sum" and axes_arg(user, 1, rank_of(weights.node)) == (weights.axis,)


def _contracts(user: Node, weights: Node, axis: int) -> bool:
    """Whether ``user`` is a product that sums over ``axis`` of ``weights``, and no layer."""
    if sums_with(user, weights, axis):
        return True
    product = contraction(user)
    if product is None or weights not in product.factors:
        return False
    at = product.factors.index(weights)
    name, other = product.names[at][axis], product.factors[1 - at]
    return name in product.names[1 - at] and name not in product.out and not (op_of(user).layer and is_parameter(other))
