"""Walks over all that a node comes from, or goes into."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from torch.fx import Node

from sigswap.passes.nodes import edited_by, input_at, int_arg, is_floating, rank_of, shape_of
from sigswap.passes.ops import op_name, op_of
from sigswap.passes.products import PARAMETER, is_parameter
from sigswap.passes.weights import weighted_sum


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
    return any(_is_product(below) for below in with_below(node))


def has_product_above(node: Node) -> bool:
    """Whether a product of two activations goes into ``node``, with no layer in between."""

    def is_end(above: Node) -> bool:
        op = op_of(above)
        mixes = (op.name == "einsum" and rank_of(above) > 3) or _mixes_products(above)  # heads, by a parameter
        return (op.product and not mixes) or op.layer or op.softmax

    above = list(with_above(node, is_end))
    seen = set(above)
    for each in above:  # grows: what is written into a tensor that was made empty
        for written in _written_into(each):
            new = [source for source in with_above(written, is_end) if source not in seen]
            above += new
            seen.update(new)
    return any(_is_product(each) and not weights_values(each) for each in above)


def weights_values(product: Node) -> bool:
    """Whether ``product`` is the last part of an attention, of probabilities and values: that makes no scores."""

    def is_end(above: Node) -> bool:
        op = op_of(above)
        return op.product or op.layer or op.softmax

    for above in (above for factor in product.all_input_nodes for above in with_above(factor, is_end)):
        axis = int_arg(above, 1) if op_of(above).softmax and rank_of(above) else None
        found = None if axis is None else weighted_sum(above, axis % rank_of(above))[0]
        if found is not None and found[0] is product:
            return True
    return False


def _mixes_products(node: Node) -> bool:
    """Whether ``node`` multiplies a parameter with what is a product of two activations, but for scale and form."""
    if not op_of(node).product or not any(map(is_parameter, node.all_input_nodes)):
        return False
    for source in node.all_input_nodes:
        while op_of(source).views or op_of(source).same or _is_scaled(source):
            source = source.all_input_nodes[0]
        if op_of(source).product and has_two_activations(source) and not weights_values(source):
            return True
    return False


def _is_scaled(node: Node) -> bool:
    return op_name(node) in ("mul", "div") and len(node.all_input_nodes) == 1


def _written_into(node: Node) -> list[Node]:
    """What ops write into ``node``, a tensor that was made full of one number, or empty, or into views of it."""
    if not (op_of(node).fills or "empty" in op_name(node)):
        return []
    views, found = [node], list[Node]()
    for view in views:  # grows
        for user in view.users:
            if view in edited_by(user):
                found += [source for source in user.all_input_nodes if source is not view]
            elif (op_of(user).views or op_of(user).part) and input_at(user) is view:
                views.append(user)
    return found


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


def _is_product(node: Node) -> bool:
    """Whether ``node`` is a product of two activations; so is a layer that has one for its weight."""
    op = op_of(node)
    if op.product:
        return has_two_activations(node)
    if op.name == "addmm" and not has_two_activations(node):
        return False
    weight = input_at(node, op.operands[-1] if op.name == "addmm" else 1) if op.layer else None
    if weight is None or not is_floating(weight):
        return False
    return any(above.op == "placeholder" and not above.meta.get(PARAMETER) for above in with_above(weight))


def has_two_activations(product: Node) -> bool:
    """Whether two factors of ``product`` or more are no parameters; one tensor may be both. What is added is none."""
    given = [*product.args[op_of(product).operands[0] :], *product.kwargs.values()]
    factors = [x for each in given for x in (each if isinstance(each, Sequence) else [each]) if isinstance(x, Node)]
    return sum(is_floating(factor) and rank_of(factor) > 0 and not is_parameter(factor) for factor in factors) > 1
