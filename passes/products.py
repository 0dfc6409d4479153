"""What a product of query and key is: matrix products, einsums and sums, brought to one form."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

from torch.fx import Node

from sigswap.passes.axes import Step, axis_map, einsum_names
from sigswap.passes.nodes import argument, axes_arg, input_at, input_list, rank_of, shape_of, tensor_input
from sigswap.passes.ops import op_name, op_of

PARAMETER = "sigswap_parameter"  # node.meta key: set on the placeholders that are parameters


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A matrix product, or an einsum of two tensors, with a name for each axis of the factors and of the result.

    Axes of one name are the same axis. A batch axis of a matrix product has an int for a name.
    """

    factors: tuple[Node, Node]
    names: tuple[list[Hashable], list[Hashable]]
    out: list[Hashable]


def contraction(node: Node) -> Contraction | None:
    """``node`` as a product of two tensors (without what ``baddbmm`` and ``linear`` add); None: it is none."""
    op = op_of(node)
    if op.name == "einsum":
        return _einsum(node)
    if not (op.matrix or op.name == "linear"):
        return None
    first, second = (tensor_input(node, position) for position in (op.operands if op.matrix else (0, 1)))
    batch = range(max(rank_of(first), rank_of(second)) - 2)
    left: list[Hashable] = [*batch, "row", "inner"][-rank_of(first) :]
    right: list[Hashable] = [*batch, "inner", "column"] if op.matrix else [*batch, "column", "inner"]
    right = right[-rank_of(second) :] if rank_of(second) > 1 else ["inner"]
    out = [*batch, *(name for name in ("row", "column") if name in (*left, *right))]
    return Contraction((first, second), (left, right), out)


def _einsum(node: Node) -> Contraction | None:
    operands = input_list(node, 1)
    if len(operands) != 2:
        return None
    (first, second), out = einsum_names(node)
    if len(set(first)) < len(first) or len(set(second)) < len(second):
        return None
    return Contraction((operands[0], operands[1]), (first, second), out)


def sums_with(node: Node, operand: Node, axis: int) -> bool:
    """Whether an einsum of three or more tensors sums over ``axis`` of ``operand`` and of one that is no parameter."""
    operands = input_list(node, 1) if op_name(node) == "einsum" else []
    if len(operands) < 3 or operand not in operands:
        return False
    terms, out = einsum_names(node)
    name = terms[operands.index(operand)][axis]
    others = [term for term, x in zip(terms, operands, strict=True) if x is not operand and not is_parameter(x)]
    return name not in out and any(name in term for term in others)


@dataclasses.dataclass
class Factors:
    """A product whose output's ``key_axis`` comes from one factor; ``query_axis`` from the other, if known."""

    node: Node
    query: Node
    key: Node
    query_arg: int
    query_dim_axis: int
    key_dim_axis: int
    key_axis: int
    query_axis: int | None
    batch_axes: dict[int, tuple[int, int]]  # axis of the output -> (axis of the query, axis of the key)
    row_axes: dict[int, int]  # axis of the output -> axis of the query alone
    row_order: tuple[int, ...] | None  # of the query without the axis that is summed over, for the output's
    plain: bool = True  # of two tensors, summed over one axis
    path: list[Step] = dataclasses.field(default_factory=list)  # from the product down to the softmax's scores

    @property
    def query_axes(self) -> dict[int, int]:
        """Axis of the output -> axis of the query."""
        return {**{out: axes[0] for out, axes in self.batch_axes.items()}, **self.row_axes}


def product_of(node: Node, key_axis: int) -> Factors | str | None:
    """``node`` as a product whose ``key_axis`` comes from the key; a reason if it is a product but not that one."""
    op = op_of(node)
    found: Factors | str | None
    if op.name == "sum":
        found = _summed_product(node, key_axis)
    elif op.name == "linear" and key_axis != rank_of(node) - 1:
        return None  # a layer over another axis: the walk goes on through it
    elif op.matrix or op.name in ("linear", "einsum"):
        found = _contracted_product(node, key_axis)
    else:
        return None
    if isinstance(found, Factors) and (is_parameter(found.query) or is_parameter(found.key)):
        return "its scores are a product with a parameter (a router, a classifier, a pooling), not of query and key"
    return found


def _contracted_product(node: Node, key_axis: int) -> Factors | str:
    product, einsum = contraction(node), op_name(node) == "einsum"
    several = product is None
    if product is None:
        product = _query_and_key(node, key_axis)
    if product is None:
        return "its scores are an einsum in which query and key are not known"
    if not einsum and min(map(len, product.names)) < 2:
        # A linear layer follows an axis (talking heads), a matrix-vector product scores keys by one vector.
        return "its scores are a matrix-vector product, not one of queries and keys"
    name, out = product.out[key_axis], product.out
    if isinstance(name, int) or (name in product.names[0]) == (name in product.names[1]):
        return "its softmax runs over a batch axis of the product, not over keys"
    query_arg = 0 if name in product.names[1] else 1
    query, key = product.names[query_arg], product.names[1 - query_arg]
    contracted = [c for c in query if c in key and c not in out]
    if not contracted:
        return "its scores are an einsum that sums over no axis of query and key"
    rows = {i: query.index(c) for i, c in enumerate(out) if c in query and c not in key}
    return Factors(
        node,
        product.factors[query_arg],
        product.factors[1 - query_arg],
        query_arg,
        query.index(contracted[-1]),
        key.index(contracted[-1]),
        key_axis,
        max(rows, default=None),
        {i: (query.index(c), key.index(c)) for i, c in enumerate(out) if c in query and c in key},
        rows,
        _order([c for c in query if c not in contracted], [c for c in out if c != name]),
        plain=not several and len(contracted) == 1,
    )


def _order(names: list[Hashable], wanted: list[Hashable]) -> tuple[int, ...] | None:
    """Where each of ``wanted`` is in ``names``; None: they are not the same ones."""
    return tuple(map(names.index, wanted)) if len(names) == len(wanted) and set(names) == set(wanted) else None


def _query_and_key(node: Node, key_axis: int) -> Contraction | None:
    """Those two of the three or more tensors of an einsum: they share an axis that is summed over."""
    operands = input_list(node, 1)
    terms, out = einsum_names(node)
    known = [(x, names) for x, names in zip(operands, terms, strict=True) if len(set(names)) == len(names)]
    name = out[key_axis]
    for key, of_key in known:
        for query, of_query in known:
            shared = [c for c in of_key if c in of_query and c not in out]
            if name in of_key and name not in of_query and shared and not (is_parameter(key) or is_parameter(query)):
                return Contraction((query, key), (of_query, of_key), out)
    return None


def _summed_product(node: Node, key_axis: int) -> Factors | str:
    """``(query * key).sum(head_dim)``, with queries and keys spread over axes of their own."""
    reason = "its scores are a sum that is not a product of query and key"
    source, (contracted, *others) = tensor_input(node), axes_arg(node, 1, rank_of(tensor_input(node))) or (-1,)
    if op_name(source) != "mul" or contracted < 0 or others:
        return reason
    rank, whole = rank_of(source), shape_of(source)
    spread = [axis for axis in range(rank) if axis != contracted or argument(node, 2, "keepdim")]
    factors = [x for x in (input_at(source, 0), input_at(source, 1)) if x is not None and rank_of(x) == rank]
    shapes = [shape for x in factors if (shape := shape_of(x)) is not None]
    key_source = spread[key_axis]
    if len(shapes) != 2 or whole is None or key_source == contracted:
        return reason
    broad = [shape[key_source] == 1 != whole[key_source] for shape in shapes]
    if broad[0] == broad[1]:
        return reason
    query_arg = broad.index(True)
    query, key = factors[query_arg], factors[1 - query_arg]
    batch, rows = {}, {}
    for out_axis, axis in enumerate(spread):
        if axis in (key_source, contracted):
            continue
        if shapes[1 - query_arg][axis] == 1 != whole[axis]:
            rows[out_axis] = axis
        else:
            batch[out_axis] = (axis, axis)
    row = max(rows, default=None)
    # The factors are spread over axes of size 1, so the query has axes that the output does not have.
    return Factors(node, query, key, query_arg, contracted, contracted, key_axis, row, batch, rows, None)


def is_parameter(node: Node) -> bool:
    """Whether ``node`` is a parameter, as it is or through views, casts and scaling by a number."""
    while op_of(node).keeps_parameter:
        if any(isinstance(arg, Node) and rank_of(arg) > 0 for arg in node.args[1:]):
            return False
        source = input_at(node)
        if source is None:
            return False
        node = source
    return node.op == "get_attr" or bool(node.meta.get(PARAMETER))


def follow(path: Sequence[Step], axis: int | None) -> int | None:
    """The axis at the end of ``path`` that holds ``axis`` of its first input; None: it ends on the way."""
    for node, source in path:
        axes = axis_map(node, source) if axis is not None else None
        axis = axes[axis] if axes is not None and axis is not None else None
    return axis
