"""Walks over all that a node comes from, or goes into."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from torch.fx import Node

from sigswap.passes.nodes import is_floating, rank_of, shape_of
from sigswap.passes.ops import op_name, op_of
from sigswap.passes.products import is_parameter


def unchanged_from(node: Node) -> Node:
    """What has the same numbers as ``node``, before casts, copies and cuts."""
    while op_of(node).same and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def with_above(node: Node, is_end: Callable[[Node], bool] = lambda node: False) -> Iterator[Node]:
    """``node`` and what it comes from, but nothing that goes through an end."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        yield current
        if not is_end(current):
            pending += [source for source in current.all_input_nodes if source not in seen]
            seen.update(current.all_input_nodes)


def with_below(node: Node) -> Iterator[Node]:
    """``node`` and what is made of it, but nothing that goes through a layer or a softmax."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        yield current
        if not op_of(current).layer and (current is node or not op_of(current).softmax):
            pending += [user for user in current.users if user not in seen]
            seen.update(current.users)


def has_product_below(node: Node) -> bool:
    """Whether ``node`` is, or goes into, a product of two activations, with no layer in between."""
    return any(op_of(below).product and has_two_activations(below) for below in with_below(node))


def has_product_above(node: Node) -> bool:
    """Whether a product of two activations goes into ``node``, with no layer in between."""

    def is_end(above: Node) -> bool:
        op = op_of(above)
        mixes = op.name == "einsum" and rank_of(above) > 3  # heads, by a parameter
        return (op.product and not mixes) or op.layer or op.softmax

    return any(op_of(above).product and has_two_activations(above) for above in with_above(node, is_end))


def has_pairs_above(node: Node, data: Collection[Node]) -> bool:
    """Whether differences of each two of some activations go into ``node``, such as distances of queries and keys."""

    def is_end(above: Node) -> bool:
        op = op_of(above)
        return op.product or op.layer or op.softmax

    def is_pairwise(above: Node) -> bool:
        given = [source for source in above.all_input_nodes if source in data and is_floating(source)]
        shapes = [shape for source in given if (shape := shape_of(source)) is not None]
        if op_name(above) != "sub" or len(shapes) != 2:
            return False
        sizes = list(zip(*(shape[::-1] for shape in shapes), strict=False))
        return any(a == 1 != b for a, b in sizes) and any(b == 1 != a for a, b in sizes)

    return any(is_pairwise(above) for above in with_above(node, is_end))


def has_two_activations(product: Node) -> bool:
    return sum(rank_of(source) > 0 and not is_parameter(source) for source in product.all_input_nodes) > 1
