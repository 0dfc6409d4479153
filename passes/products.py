"""What a product of query and key is: matrix products, einsums and sums, brought to one form."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch.fx

from sigswap.passes.axes import Step, axis_map
from sigswap.passes.nodes import argument, axes_argument, input_at, input_list, rank_of, shape_of, tensor_input
from sigswap.passes.ops import op_name, op_of

PARAMETER = "sigswap_parameter"  # node.meta key: set on the placeholders that are parameters


@dataclasses.dataclass
class Factors:
    """A product whose output's ``key_axis`` comes from one factor; ``query_axis`` from the other, if known."""

    node: torch.fx.Node
    query: torch.fx.Node
    key: torch.fx.Node
    query_arg: int
    query_dim_axis: int
    key_dim_axis: int
    key_axis: int
    query_axis: int | None
    batch_axes: dict[int, tuple[int, int]]  # axis of the output -> (axis of the query, axis of the key)
    row_axes: dict[int, int]  # axis of the output -> axis of the query alone
    path: list[Step] = dataclasses.field(default_factory=list)  # from the product down to the softmax's scores
    query_in_order: bool = True

    @property
    def query_axes(self) -> dict[int, int]:
        """Axis of the output -> axis of the query."""
        return {**{out: axes[0] for out, axes in self.batch_axes.items()}, **self.row_axes}


def product_of(node: torch.fx.Node, key_axis: int) -> Factors | str | None:
    """``node`` as a product whose ``key_axis`` comes from the key; a reason if it is a product but not that one."""
    op = op_of(node)
    found: Factors | str | None
    if op.matrix or op.name == "linear":
        found = _matrix_product(node, key_axis)
    elif op.name == "einsum":
        found = _einsum_product(node, key_axis)
    elif op.name == "sum":
        found = _summed_product(node, key_axis)
    else:
        return None
    if isinstance(found, Factors) and (is_parameter(found.query) or is_parameter(found.key)):
        return "its scores are a product with a parameter (a router, a classifier, a pooling), not of query and key"
    return found


def matrix_factors(node: torch.fx.Node) -> tuple[torch.fx.Node, torch.fx.Node]:
    """The factors of a matrix product, or of ``linear``, which transposes the second one."""
    first, second = op_of(node).operands if op_of(node).matrix else (0, 1)
    return tensor_input(node, first), tensor_input(node, second)


def _matrix_product(node: torch.fx.Node, key_axis: int) -> Factors | str | None:
    first, second = matrix_factors(node)
    transposed = op_name(node) == "linear"
    rank, rank1, rank2 = rank_of(node), rank_of(first), rank_of(second)
    if rank1 < 2 or rank2 < 2:
        # A linear layer follows an axis (talking heads), a matrix-vector product scores keys by one vector.
        return "its scores are a matrix-vector product, not one of queries and keys"
    if transposed and key_axis != rank - 1:
        return None  # a linear layer over another axis: the walk goes on through it
    contracted2 = rank2 - 1 if transposed else rank2 - 2
    batch = {
        axis: (axis - (rank - rank1), axis - (rank - rank2))
        for axis in range(rank - 2)
        if axis >= rank - rank1 and axis >= rank - rank2
    }
    if key_axis == rank - 1:
        rows = {axis: axis - (rank - rank1) for axis in range(rank - rank1, rank - 1) if axis not in batch}
        return Factors(node, first, second, 0, rank1 - 1, contracted2, key_axis, rank - 2, batch, rows)
    if key_axis == rank - 2:
        swapped = {axis: (second_axis, first_axis) for axis, (first_axis, second_axis) in batch.items()}
        rows = {axis: axis - (rank - rank2) for axis in range(rank - rank2, rank) if axis not in (*batch, key_axis)}
        return Factors(node, second, first, 1, contracted2, rank1 - 1, key_axis, rank - 1, swapped, rows)
    return "its softmax runs over a batch axis of the product, not over keys"


def _einsum_product(node: torch.fx.Node, key_axis: int) -> Factors | str:
    labels = einsum_labels(node)
    if labels is None:
        return "its scores are an einsum that is not a product of two tensors"
    (first, second), out = labels
    operands = input_list(node, 1)
    label = out[key_axis]
    if (label in first) == (label in second):
        return "its softmax runs over a batch axis of the product, not over keys"
    query_arg = 0 if label in second else 1
    query, key = (first, second) if query_arg == 0 else (second, first)
    contracted = [c for c in query if c in key and c not in out]
    if len(contracted) != 1:
        return "its scores are an einsum that contracts no axis or several"
    rows = [c for c in out if c in query and c not in key]
    batch = {out.index(c): (query.index(c), key.index(c)) for c in out if c in query and c in key}
    factors = Factors(
        node,
        operands[query_arg],
        operands[1 - query_arg],
        query_arg,
        query.index(contracted[0]),
        key.index(contracted[0]),
        key_axis,
        out.index(rows[-1]) if rows else None,
        batch,
        {out.index(c): query.index(c) for c in rows},
    )
    factors.query_in_order = [c for c in query if c != contracted[0]] == [c for c in out if c != label]
    return factors


def einsum_labels(node: torch.fx.Node) -> tuple[tuple[list[str], list[str]], list[str]] | None:
    """The labels of a two-operand einsum's factors and output, an ellipsis spelled out as "0", "1", ..."""
    operands = input_list(node, 1)
    if len(operands) != 2:
        return None
    inputs, arrow, output = str(node.args[0]).replace(" ", "").partition("->")
    terms = inputs.split(",")

    def spelled(term: str, rank: int) -> list[str]:
        before, dots, after = term.partition("...")
        width = rank - len(before) - len(after) if dots else 0
        return [*before, *(str(i) for i in range(9 - width, 9)), *after]

    first, second = (spelled(term, rank_of(x)) for term, x in zip(terms, operands, strict=True))
    if len(set(first)) < len(first) or len(set(second)) < len(second):
        return None
    if not arrow:
        counts = [c for c in (*first, *second) if c.isalpha()]
        dotted = sorted({c for c in (*first, *second) if c.isdigit()})
        return (first, second), [*dotted, *sorted(c for c in set(counts) if counts.count(c) == 1)]
    return (first, second), spelled(output, rank_of(node))


def _summed_product(node: torch.fx.Node, key_axis: int) -> Factors | str:
    """``(query * key).sum(head_dim)``, with queries and keys spread over axes of their own."""
    reason = "its scores are a sum that is not a product of query and key"
    source, (contracted, *others) = tensor_input(node), axes_argument(node, 1, rank_of(tensor_input(node))) or (-1,)
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
    found = Factors(node, query, key, query_arg, contracted, contracted, key_axis, row, batch, rows)
    found.query_in_order = False  # the factors are spread over axes of size 1
    return found


def is_parameter(node: torch.fx.Node) -> bool:
    """Whether ``node`` is a parameter, as it is or through views, casts and scaling by a number."""
    while op_of(node).keeps_parameter:
        if any(isinstance(arg, torch.fx.Node) and rank_of(arg) > 0 for arg in node.args[1:]):
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
