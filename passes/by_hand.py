"""A softmax in pieces, ``exp(scores) / exp(scores).sum(-1)``: where the numbers that ``exp`` gives meet their own sum.

Instead of the division there may be a product with the reciprocal of the sum, or all of it is ``exp(scores -
scores.logsumexp(-1))``.

In between they may be multiplied by other numbers or hidden: that is a softmax of the scores plus the logarithm of what
they were multiplied by. What becomes of the sum on its way (a small number is added, it is clamped) does not count, for
a sigmoid has no use for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch.fx import Node

from sigswap.passes.nodes import argument, axes_arg, edited_by, input_at, rank_of, tensor_input
from sigswap.passes.ops import op_name, op_of, spelling_of
from sigswap.passes.walks import unchanged_from


@dataclasses.dataclass(frozen=True)
class Division:
    """``node`` divides the numbers by their sum over ``axis``; ``weighted``: they were multiplied or hidden before.

    ``inverse``: the reciprocal of the sum, if ``node`` multiplies by it instead.
    """

    node: Node
    axis: int
    weighted: bool
    inverse: Node | None = None


def division_of(exponential: Node) -> Division | None:
    """The one division of what ``exponential`` gives by its own sum; None: there is none, or it has other uses."""
    numbers = _followed([exponential], _is_multiplied)
    sums = [user for number in numbers for user in number.users if op_name(user) == "sum"]
    axes = {axes_arg(total, 1, rank_of(tensor_input(total))) for total in sums}
    totals = _followed(sums, _is_no_division)
    divisions = {user: number for number in numbers for user in number.users if _divisor(user, number) in totals}
    scores = tensor_input(exponential)
    edited = any(scores in edited_by(user) for user in scores.users if user is not exponential)
    if len(divisions) != 1 or len(axes) != 1 or edited:
        return None
    (division,), (axis,) = divisions, axes
    inverse = _inverse_in(_other(division, divisions[division]))
    used = {user for node in (*numbers, *totals) for user in node.users}
    if axis is None or len(axis) != 1 or not used <= {*numbers, *totals, division}:
        return None
    if rank_of(division) != rank_of(exponential):
        return None
    return Division(division, axis[0], divisions[division] is not exponential, inverse)


def is_normalised(scores: Node, shifts: Sequence[Node], axis: int) -> bool:
    """Whether ``scores`` are others minus their logsumexp over ``axis``, one of ``shifts``: logarithms of a softmax."""
    scores = unchanged_from(scores)
    source = input_at(scores) if op_name(scores) == "sub" and "alpha" not in scores.kwargs else None
    for shift in shifts:
        if spelling_of(shift).endswith("logsumexp") and source is not None:
            same = unchanged_from(tensor_input(shift)) is unchanged_from(source)
            if same and axes_arg(shift, 1, rank_of(scores)) == (axis,):
                return True
    return False


def is_summed(exponential: Node) -> bool:
    """Whether what ``exponential`` gives is summed anywhere, as every softmax needs it. Numbers that only weight the
    products of query and key, such as the decays of linear attention, are not."""

    def onward(number: Node, user: Node) -> bool:
        changed = _is_multiplied(number, user) or op_name(user) in ("div", "add", "sub", "clamp")
        return changed and not _is_product_weighted(number, user)

    numbers = _followed([exponential], onward)
    return any(_sums(user, number) for number in numbers for user in number.users)


def is_segmented(exponential: Node) -> bool:
    """Whether what ``exponential`` gives is divided by sums over segments of it: a softmax as attention along the edges
    of a graph has it, which for each edge takes the sum over those that lead to the same node."""
    numbers = _followed([exponential], _is_multiplied)
    sums = [user for number in numbers for user in number.users if _sums_segments(user, number)]
    totals = _followed(sums, _is_no_division)
    return any(_divisor(user, number) in totals for number in numbers for user in number.users)


def _sums_segments(user: Node, number: Node) -> bool:
    """Whether ``user`` adds each of ``number`` to the sum that an index tells."""
    name = spelling_of(user).rstrip("_")
    if name == "index_put":
        return input_at(user, 2) is number and argument(user, 3, "accumulate") is True
    return name in ("index_add", "scatter_add", "scatter_reduce", "segment_reduce") and number in user.all_input_nodes


def _is_product_weighted(number: Node, user: Node) -> bool:
    """Whether ``user`` multiplies a product by ``number``, also the terms of one, before they are summed."""
    other = input_at(user, 1) if input_at(user) is number else input_at(user)
    if op_name(user) != "mul" or other is None:
        return False
    other = unchanged_from(other)
    return op_of(other).product or (op_name(other) == "mul" and len(other.all_input_nodes) == 2)


def _sums(user: Node, number: Node) -> bool:
    """Whether ``user`` adds ``number`` up, also as a product with a number for all."""
    if op_name(user) in ("sum", "mean"):
        return True
    if not op_of(user).product:
        return False
    others = [each for each in user.all_input_nodes if each is not number]
    return any(op_of(unchanged_from(each)).fills for each in others)


def _is_no_division(total: Node, user: Node) -> bool:
    """Whether ``user`` does something else with a sum than to divide by it."""
    if op_name(user) == "div":
        return is_inverse(user)
    return op_name(user) != "mul" or len(user.all_input_nodes) == 1 or _inverse_in(total) is None


def _divisor(user: Node, number: Node) -> Node | None:
    """What ``user`` divides ``number`` by, or the factor by which it does so, a reciprocal."""
    if op_name(user) == "div" and input_at(user) is number:
        return input_at(user, 1)
    other = _other(user, number) if op_name(user) == "mul" else None
    return other if _inverse_in(other) is not None else None


def _other(user: Node, number: Node) -> Node | None:
    """The other of the two factors."""
    return input_at(user, 1) if input_at(user) is number else input_at(user)


def _inverse_in(node: Node | None) -> Node | None:
    """The reciprocal that ``node`` is, in whatever form, or times a number."""
    while node is not None and not is_inverse(node):
        times_number = op_name(node) == "mul" and len(node.all_input_nodes) == 1
        node = input_at(node) if op_of(node).same or op_of(node).views or times_number else None
    return node


def is_inverse(node: Node) -> bool:
    """Whether ``node`` is 1 / x, or another number by x."""
    name, inputs = op_name(node), node.args
    return (
        name == "reciprocal"
        or (name == "div" and not isinstance(inputs[0], Node))
        or (spelling_of(node) == "pow" and bool(inputs[1] == -1))
    )


def _followed(start: list[Node], onward: Callable[[Node, Node], bool]) -> dict[Node, None]:
    """``start``, and what is made of it by ops that ``onward`` allows, in order."""
    found = dict.fromkeys(start)
    pending = list(found)
    while pending:
        node = pending.pop()
        for user in node.users:
            if user not in found and onward(node, user):
                found[user] = None
                pending.append(user)
    return found


def _is_multiplied(number: Node, user: Node) -> bool:
    """Whether ``user`` gives the same numbers, or some multiplied, or some of them replaced by 0."""
    op, name = op_of(user), op_name(user)
    if op.same and not op.cuts:
        return True
    if name == "mul":
        return not (input_at(user) is number and input_at(user, 1) is number) and _divisor(user, number) is None
    if name == "masked_fill":
        return input_at(user) is number and _is_zero(user.args[2])
    if name == "where":
        return input_at(user) is not number and any(_is_zero(other) for other in user.args[1:] if other is not number)
    return False


def _is_zero(value: object) -> bool:
    if not isinstance(value, Node):
        return isinstance(value, int | float) and value == 0
    value = unchanged_from(value)
    if not op_of(value).fills:
        return False
    number = {"full": 1, "scalar_tensor": 0}.get(op_name(value))
    return op_name(value) == "zeros" if number is None else _is_zero(argument(value, number, "fill_value"))
