"""Follows one axis of a tensor through the ops that may stand between a score and its softmax.

The walk in ``find`` needs to know, at every step, which axis holds the keys. Sizes under dynamic shapes are
compared by their hints, so that looking at a graph never adds a guard to it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

# Ops that map every element to one element; operands broadcast from the right.
ELEMENTWISE = frozenset(
    "add sub rsub subtract mul multiply div divide true_divide tanh where masked_fill clamp clamp_min clamp_max "
    "minimum maximum neg to _to_copy type_as float half bfloat16 double contiguous clone alias detach dropout "
    "feature_dropout alpha_dropout nan_to_num lift_fresh lift_fresh_copy masked_scatter index_put tril triu "
    "roll flip slice narrow index_select gather take_along_dim constant_pad_nd pad "
    "slice_scatter copy cat concat concatenate".split()
)
RESHAPES = frozenset("view reshape _unsafe_view flatten unflatten view_as reshape_as _reshape_alias".split())
# Ops that keep the order in which the rows of a tensor lie; `rows_in_order` allows these and RESHAPES.
ORDERED = frozenset(
    "add sub rsub subtract mul multiply div divide true_divide tanh where masked_fill clamp clamp_min clamp_max "
    "neg to _to_copy type_as float contiguous clone alias detach dropout nan_to_num tril triu unsqueeze squeeze".split()
)


def op_name(node: torch.fx.Node) -> str:
    """The ATen name without namespace, overload and in-place underscore; "" for anything that is not a call."""
    if node.op != "call_function":
        return ""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[-1]
        if name in ("max", "min") and target._overloadname == "other":
            return name + "imum"
        return name[:-1] if name.endswith("_") and not name.endswith("__") else name
    if target is operator.getitem:
        return "getitem"
    return getattr(target, "__name__", str(target))


def shape_of(node: torch.fx.Node) -> tuple[int, ...] | None:
    """Sizes of the node's tensor (hints where symbolic), or None if it has no tensor or no hint."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    sizes = []
    for size in value.shape:
        hint = size if isinstance(size, int) else size.node.hint
        if hint is None:
            return None
        sizes.append(int(hint))
    return tuple(sizes)


def rank_of(node: torch.fx.Node) -> int:
    """Number of axes of the node's tensor."""
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else 0


def static_int(value: Any) -> int | None:
    """``value`` as an int: itself, a symbolic size's hint, or a graph node's hint."""
    if isinstance(value, torch.fx.Node):
        value = value.meta.get("val")
    if isinstance(value, torch.SymInt):
        value = value.node.hint
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def chain_inputs(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The inputs through which scores may flow into ``node``; [] where the walk has to end."""
    name = op_name(node)
    args = node.args
    if name in ("cat", "concat", "concatenate"):
        return [part for part in args[0] if isinstance(part, torch.fx.Node)]
    if name == "where":
        candidates = list(args[1:3])
    elif name in ("copy", "add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide",
                  "minimum", "maximum"):  # fmt: skip
        candidates = list(args[:2])
    elif (
        name in ELEMENTWISE
        or name in RESHAPES
        or name in _VIEWS
        or name in _BROADCASTS
        or name in ("linear", "conv2d", "convolution")
    ):
        candidates = list(args[:1])
    else:
        return []
    return [x for x in candidates if isinstance(x, torch.fx.Node) and rank_of(x) > 0]


def axis_map(node: torch.fx.Node, source: torch.fx.Node) -> list[int | None] | None:
    """For every axis of ``source`` the axis of ``node`` that holds it, or None where it is merged, split or gone.

    None as a whole: the op is not one that keeps axes.
    """
    before, after = shape_of(source), shape_of(node)
    if before is None or after is None:
        return None
    name, rank = op_name(node), len(before)
    if name in ELEMENTWISE or name in _BROADCASTS - {"repeat"}:
        if len(after) < rank:
            return None
        return [axis + len(after) - rank for axis in range(rank)]
    if name in RESHAPES:
        return _reshape_map(before, after)
    if name == "repeat":
        shift = len(after) - rank
        return [axis + shift if after[axis + shift] == before[axis] else None for axis in range(rank)]
    if name == "linear":
        return [*range(rank - 1), None]
    if name in ("conv2d", "convolution"):
        weight = shape_of(node.args[1])
        pointwise = weight is not None and all(size == 1 for size in weight[2:])
        return [0, None, *range(2, rank)] if pointwise and rank == 4 else None
    if name in _VIEWS:
        return _VIEWS[name](node.args, rank)
    return None


def _permutation(order: Sequence[int], rank: int) -> list[int | None]:
    inverse: list[int | None] = [None] * rank
    for new, old in enumerate(order):
        inverse[old % rank] = new
    return inverse


def _swap(first: int, second: int, rank: int) -> list[int | None]:
    order = list(range(rank))
    order[first % rank], order[second % rank] = order[second % rank], order[first % rank]
    return _permutation(order, rank)


def _movedim(args: Sequence[Any], rank: int) -> list[int | None]:
    def as_tuple(value: Any) -> tuple[int, ...]:
        return tuple(axis % rank for axis in ([value] if isinstance(value, int) else value))

    sources, targets = as_tuple(args[1]), as_tuple(args[2])
    order: list[int] = [-1] * rank
    for old, new in zip(sources, targets, strict=True):
        order[new] = old
    rest = iter(axis for axis in range(rank) if axis not in sources)
    return _permutation([axis if axis >= 0 else next(rest) for axis in order], rank)


def _squeeze(args: Sequence[Any], rank: int) -> list[int | None] | None:
    if len(args) < 2:
        return None
    gone = {axis % rank for axis in ([args[1]] if isinstance(args[1], int) else args[1])}
    kept = [axis for axis in range(rank) if axis not in gone]
    return [kept.index(axis) if axis in kept else None for axis in range(rank)]


def _unsqueeze(args: Sequence[Any], rank: int) -> list[int | None]:
    new = args[1] % (rank + 1)
    return [axis + (axis >= new) for axis in range(rank)]


def _select(args: Sequence[Any], rank: int) -> list[int | None]:
    gone = args[1] % rank
    return [None if axis == gone else axis - (axis > gone) for axis in range(rank)]


_VIEWS: dict[str, Any] = {
    "permute": lambda args, rank: _permutation(args[1], rank),
    "transpose": lambda args, rank: _swap(args[1], args[2], rank),
    "swapaxes": lambda args, rank: _swap(args[1], args[2], rank),
    "swapdims": lambda args, rank: _swap(args[1], args[2], rank),
    "t": lambda args, rank: _swap(0, 1, rank) if rank == 2 else [0],
    "mT": lambda args, rank: _swap(-1, -2, rank),
    "numpy_T": lambda args, rank: _permutation(range(rank)[::-1], rank),
    "movedim": _movedim,
    "moveaxis": _movedim,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "select": _select,
}
_BROADCASTS = frozenset("expand expand_as broadcast_to repeat".split())


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


def _reshape_map(before: Sequence[int], after: Sequence[int]) -> list[int | None] | None:
    groups = reshape_groups(before, after)
    if groups is None or 0 in before:
        return None
    mapped: list[int | None] = [None] * len(before)
    for old, new in groups:
        # An axis of size 1 that appears or goes beside the one that matters does not count.
        old_large = [axis for axis in old if before[axis] != 1]
        new_large = [axis for axis in new if after[axis] != 1]
        if len(old_large) == 1 and len(new_large) == 1:
            mapped[old_large[0]] = new_large[0]
        elif len(old) == 1 and len(new) == 1:
            mapped[old[0]] = new[0]
    return mapped
