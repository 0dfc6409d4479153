"""Follows one axis of a tensor through the ops that may stand between a score and its softmax.

The walk in ``find`` needs to know, at every step, which axis holds the keys.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch.fx import Node

from sigswap.passes.nodes import input_at, input_list, rank_of, shape_of
from sigswap.passes.ops import AxisMap, op_of

Step = tuple[Node, Node]
"""An op, and the input of it that a walk comes from or goes to."""


def chain_inputs(node: Node) -> list[Node]:
    """The inputs through which scores may flow into ``node``; [] where the walk has to end."""
    found: list[Node] = []
    for position in op_of(node).flows_from:
        given = node.args[position] if position < len(node.args) else None
        parts = given if isinstance(given, Sequence) else [given]
        found += [part for part in parts if isinstance(part, Node) and rank_of(part) > 0]
    return found


def axis_map(node: Node, source: Node) -> AxisMap | None:
    """For every axis of ``source`` the axis of ``node`` that holds it, or None where it is merged, split or gone.

    None as a whole: the op is not one that keeps axes.
    """
    before, after, op = shape_of(source), shape_of(node), op_of(node)
    if before is None or after is None:
        return None
    rank, shift = len(before), len(after) - len(before)
    if op.elementwise or op.broadcasts or op.name == "baddbmm":  # of its first argument, which is added
        return None if shift < 0 else [axis + shift for axis in range(rank)]
    if op.reshapes:
        return _reshape_map(before, after)
    if op.tiles:
        return [axis + shift if after[axis + shift] == before[axis] else None for axis in range(rank)]
    if op.name == "linear":
        return [*range(rank - 1), None]
    if op.name == "einsum":
        terms, out = einsum_names(node)
        names = terms[input_list(node, 1).index(source)]
        return [out.index(name) if name in out else None for name in names] if len({*names}) == rank else None
    if op.name == "convolution":
        weight = input_at(node, 1)
        kernel = None if weight is None else shape_of(weight)
        pointwise = kernel is not None and all(size == 1 for size in kernel[2:])
        return [0, None, *range(2, rank)] if pointwise and rank == 4 else None
    return op.moves(node.args, rank) if op.moves is not None else None


def einsum_names(node: Node) -> tuple[list[list[Hashable]], list[Hashable]]:
    """A name for each axis of each operand of an einsum, and of its result. An ellipsis is spelled out, as "0", "1"."""
    inputs, arrow, output = str(node.args[0]).replace(" ", "").partition("->")

    def spelled(term: str, rank: int) -> list[Hashable]:
        before, dots, after = term.partition("...")
        width = rank - len(before) - len(after) if dots else 0
        return [*before, *(str(i) for i in range(9 - width, 9)), *after]

    terms = [spelled(term, rank_of(x)) for term, x in zip(inputs.split(","), input_list(node, 1), strict=True)]
    if not arrow:
        every = [name for term in terms for name in term]
        names = sorted({str(name) for name in every})
        output = "".join(name for name in names if name.isdigit() or every.count(name) == 1)
    return terms, spelled(output, rank_of(node))


def axes_above(node: Node, source: Node, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes of ``source`` that hold ``axes`` of ``node``: one axis may be split into a grid, and merged again.

    None: they are merged with others, or new.
    """
    mapped, before, after = axis_map(node, source), shape_of(source), shape_of(node)
    if mapped is not None and all(axis in mapped for axis in axes):
        return tuple(mapped.index(axis) for axis in axes)
    if not op_of(node).reshapes or before is None or after is None:
        return None
    above: list[int] = []
    for old, new in reshape_groups(before, after) or ():
        large = {axis for axis in new if after[axis] != 1}
        if large & set(axes):
            if not large <= set(axes):
                return None
            above += [axis for axis in old if before[axis] != 1]
    return tuple(above) or None


def reshape_groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """The smallest groups of neighbouring axes that a reshape turns into one another."""
    groups, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        old, new = [], []
        old_size = new_size = 1
        if i < len(before):
            old.append(i)
            old_size, i = before[i], i + 1
        if j < len(after):
            new.append(j)
            new_size, j = after[j], j + 1
        while old_size != new_size:
            if old_size < new_size and i < len(before):
                old.append(i)
                old_size, i = old_size * before[i], i + 1
            elif new_size < old_size and j < len(after):
                new.append(j)
                new_size, j = new_size * after[j], j + 1
            else:
                return None
        groups.append((old, new))
    return groups


def _reshape_map(before: Sequence[int], after: Sequence[int]) -> AxisMap | None:
    groups = reshape_groups(before, after)
    if groups is None or 0 in before:
        return None
    mapped: AxisMap = [None] * len(before)
    for old, new in groups:
        # An axis of size 1 that appears or goes beside the one that matters does not count.
        old_large = [axis for axis in old if before[axis] != 1]
        new_large = [axis for axis in new if after[axis] != 1]
        if len(old_large) == 1 and len(new_large) == 1:
            mapped[old_large[0]] = new_large[0]
        elif len(old) == 1 and len(new) == 1:
            mapped[old[0]] = new[0]
    return mapped
