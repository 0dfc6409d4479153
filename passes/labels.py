"""Follows the axes of tensors as products of labels, through views that merge and split them.

A label is an axis that means one thing: a batch axis, the heads, the queries, the keys, head_dim. An axis of a tensor
is a tuple of labels, outer first: () has size 1 (or is broadcast), two labels are two axes merged by a reshape. Where a
reshape splits an axis that was taken for one label, the label splits, in every tensor at once. So a product of
[batch*heads, length, head_dim] whose scores are viewed as [batch, heads, length, length] has the same labels as one of
[batch, heads, length, head_dim]; and a key whose heads were repeated by expand and reshape lacks the label of the
groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.fx import Node

from sigswap.passes.axes import axis_map, reshape_groups
from sigswap.passes.nodes import int_arg, shape_of
from sigswap.passes.ops import op_of

Label = int
Axes = tuple[tuple[Label, ...], ...]  # per axis of a tensor


class Labels:
    """The labels of one attention: their sizes, and how they were split."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._parts: dict[Label, tuple[Label, Label]] = {}

    def new(self, size: int) -> Label:
        self._sizes.append(size)
        return len(self._sizes) - 1

    def size(self, labels: Sequence[Label]) -> int:
        return math.prod(self._sizes[label] for label in labels)

    def whole(self, labels: Sequence[Label]) -> tuple[Label, ...]:
        """``labels``, each that was split replaced by its parts."""
        parts = (self.whole(self._parts[label]) if label in self._parts else (label,) for label in labels)
        return tuple(label for part in parts for label in part)

    def axes(self, axes: Axes) -> Axes:
        return tuple(self.whole(axis) for axis in axes)

    def through(self, node: Node, source: Node, axes: Axes) -> Axes | None:
        """The axes of ``node``, which is a view or an elementwise op of ``source``, whose axes are given.

        None: the op is none of these, or an axis cannot be followed.
        """
        before, after, op = shape_of(source), shape_of(node), op_of(node)
        if before is None or after is None:
            return None
        if op.reshapes:
            return self._reshaped(axes, before, after)
        mapped = axis_map(node, source) if op.labelled else None
        if mapped is None or any(
            (axis is None and before[i] != 1) or (axis is not None and before[i] not in (1, after[axis]))
            for i, axis in enumerate(mapped)
        ):
            return None
        result: list[tuple[Label, ...]] = [()] * len(after)
        for axis, target in zip(axes, mapped, strict=True):
            if target is not None:
                result[target] = axis
        return tuple(result)

    def above(self, node: Node, source: Node, axes: Axes) -> Axes | None:
        """The axes of ``source``, of which ``node`` is a view, a copy or a broadcast, and has the axes given.

        A broadcast axis has no label in ``source``. None: the op is none of these, or an axis cannot be followed.
        """
        before, after, op = shape_of(source), shape_of(node), op_of(node)
        if before is None or after is None:
            return None
        if op.reshapes:
            return self._reshaped(axes, after, before)
        if op.name == "repeat_interleave":
            return self._unrepeated(node, before, axes)
        mapped = axis_map(node, source) if op.undone else None
        if mapped is None:
            return None
        if any(axis is None and before[i] != 1 for i, axis in enumerate(mapped)):
            return None
        result: list[tuple[Label, ...]] = []
        for i, axis in enumerate(mapped):
            result.append(() if axis is None or before[i] == 1 else axes[axis])
            if axis is not None and before[i] not in (1, after[axis]):
                return None
        return tuple(result)

    def split(self, label: Label, inner: int) -> tuple[Label, Label]:
        """Splits ``label`` in two, of which the inner one has size ``inner``."""
        self._parts[label] = self.new(self._sizes[label] // inner), self.new(inner)
        return self._parts[label]

    def _unrepeated(self, node: Node, before: tuple[int, ...], axes: Axes) -> Axes | None:
        repeats, axis = int_arg(node, 1, "repeats"), int_arg(node, 2)
        if repeats is None or axis is None:
            return None
        axis %= len(before)
        outer = self._take(list(self.whole(axes[axis])), before[axis])
        if outer is None:
            return None
        return (*axes[:axis], outer, *axes[axis + 1 :])

    def _reshaped(self, axes: Axes, before: Sequence[int], after: Sequence[int]) -> Axes | None:
        groups = reshape_groups(before, after)
        if groups is None or 0 in before:
            return None
        result: list[tuple[Label, ...]] = [()] * len(after)
        for old, new in groups:
            pending = [label for axis in old for label in self.whole(axes[axis])]
            if len(pending) == 0 and len([axis for axis in old if before[axis] != 1]) <= 1:
                large = [axis for axis in new if after[axis] != 1]
                if len(large) > 1:
                    return None
                continue  # a broadcast axis of its own
            if self.size(pending) != math.prod(before[axis] for axis in old):
                return None
            for axis in new:
                taken = self._take(pending, after[axis])
                if taken is None:
                    return None
                result[axis] = taken
        return tuple(result)

    def _take(self, pending: list[Label], size: int) -> tuple[Label, ...] | None:
        """Takes the first labels off ``pending``, whose sizes multiply to ``size``; splits the last, if need be."""
        taken: list[Label] = []
        while self.size(taken) < size:
            if not pending or size % self.size(taken):
                return None
            label, rest = pending.pop(0), size // self.size(taken)
            if self.size([label]) > rest:
                if self.size([label]) % rest:
                    return None
                label, inner = self.split(label, self.size([label]) // rest)
                pending.insert(0, inner)
            taken.append(label)
        return tuple(taken) if self.size(taken) == size else None
