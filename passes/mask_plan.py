"""Plans what becomes of the masks and additive terms of one attention: a band, padding, a row bias or a tensor.

A band (causal, window) is two numbers for the op. A bias that varies by row alone is the op's row bias. A term that is
a bias under a mask is taken apart where that makes it smaller. Padding beside a bias that all sequences share is kept
out of that bias, which it would make [B, H, M, N]. Nothing is written here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch.fx import Node

from sigswap.masked import MASKED_SCORE
from sigswap.passes.labels import Label
from sigswap.passes.masks import Masks
from sigswap.passes.match import LabelledCondition, Modifiers, Operand, broadcast, labelled
from sigswap.passes.nodes import argument, dtype_of, input_at, memory_of
from sigswap.passes.normalize import has_symbol, same_in
from sigswap.passes.ops import op_name
from sigswap.passes.views import Groups, Views

Boolean = tuple[Operand, bool]
"""A mask that stays a tensor, and whether it is to be inverted."""


@dataclasses.dataclass(frozen=True)
class MaskPlan:
    """What becomes of masks and additive terms.

    ``row_biases``: the row bias is their sum. ``terms`` and ``tensors``: the attn_mask is the sum of the terms where
    all of the tensors let see. ``padding``: what is kept apart from it. ``left`` and ``right``: the window, -1 where it
    has no end.
    """

    row_biases: list[Operand]
    terms: list[Operand]
    tensors: list[Boolean]
    padding: list[Boolean]
    left: int
    right: int

    @property
    def band(self) -> dict[str, int]:
        """The op's options for the window."""
        right = self.right if self.right > 0 else -1
        return {"is_causal": self.right == 0, "window_left": self.left, "window_right": right}

    @property
    def words(self) -> list[str]:
        """For a report."""
        words = ["causal"] if self.right == 0 else []
        words += [f"window ({self.left}, {self.right})"] if self.left >= 0 or self.right > 0 else []
        if self.terms:
            words += ["additive mask"] + ["with a boolean one"] * bool(self.tensors)
        elif self.tensors:
            words.append("boolean mask")
        return words + ["padding"] * bool(self.padding)


class MaskPlanner:
    """Makes the plan of one attention, whose tensors and axes are given."""

    def __init__(self, views: Views, groups: Groups, masks: Masks) -> None:
        self.views, self.groups, self.masks = views, groups, masks

    def plan(self, found: Modifiers) -> MaskPlan:
        """What becomes of the masks and terms of ``found``."""
        conditions, terms, pending = list(found.masks), [], list(found.terms)
        while pending:
            term = pending.pop(0)
            hidden = self.masks.visible_by_sum(term.node, term.factor) if term.factor > 0 else None
            if hidden is not None:
                conditions += [labelled(each, term.axes) for each in hidden]
            elif (parts := self._bias_and_mask(term)) is not None:
                pending.insert(0, parts[0])
                conditions += parts[1]
            else:
                terms.append(term)
        left, right = found.left, found.right
        tensors: list[Boolean] = []
        for each in conditions:
            side, distance = self._band(each)
            if side == "right":
                right = distance if right < 0 else min(right, distance)
            elif side == "left":
                left = distance if left < 0 else min(left, distance)
            elif side == "tensor":
                tensors.append((Operand(each.condition.node, each.own), each.condition.inverted))
        keys = set(self.groups.keys)
        biases = [term for term in terms if keys and not self._labels(term) & keys]
        terms = [term for term in terms if term not in biases]
        # Under a row cap hidden keys would be in the sums.
        padding = [] if found.row_cap else self._padding(terms, tensors)
        return MaskPlan(biases, terms, [each for each in tensors if each not in padding], padding, left, right)

    def _labels(self, operand: Operand) -> set[Label]:
        return set(self.views.labels_of(operand))

    def _padding(self, terms: Sequence[Operand], tensors: Sequence[Boolean]) -> list[Boolean]:
        """The masks that differ by sequence, if they are padding beside a bias that does not."""
        if self.views.may_autocast and self.views.device.type == "mps":  # counting needs float64
            return []
        differing = [each for each in tensors if self._labels(each[0]) & set(self.groups.outer)]
        padding = self._are_shared(terms) and all(self._is_padding(operand) for operand, _ in differing)
        return differing if padding else []

    def _are_shared(self, terms: Sequence[Operand]) -> bool:
        """Whether the terms are a bias per position that all sequences share."""
        together = {label for term in terms for label in self._labels(term)}
        return bool(together & set(self.groups.rows)) and not together & set(self.groups.outer)

    def _is_padding(self, mask: Operand) -> bool:
        """Whether a mask hides keys of a sequence from all of its rows and heads."""
        labels, outer, keys = self._labels(mask), set(self.groups.outer), set(self.groups.keys)
        return bool(labels & outer) and bool(labels & keys) and labels <= outer | keys

    def _can_be_had(self, node: Node) -> bool:
        """Whether ``node`` is in the Dynamo graph, and what it was made as."""
        return same_in(node, self.views.graph) is not None and memory_of(node) not in self.masks.edited

    def _bias_and_mask(self, term: Operand) -> tuple[Operand, list[LabelledCondition]] | None:
        """A term that is a bias where a mask holds and hides the rest, as T5's, taken apart: if that makes it smaller,
        for the mask has a band, or is of padding while all sequences share the bias."""
        if same_in(term.node, self.views.graph) is not None:
            term = self.views.base(term)  # without copies of it
        # A number that varies proves nothing; where gradients are switched off on the way, the bias may have none.
        varies = has_symbol(term.node) or memory_of(term.node) in self.masks.edited
        if varies or not self.views.has_the_ops_gradients(term.node):
            return None
        for content, conditions in self._readings(term):
            masks = [Operand(each.condition.node, each.own) for each in conditions if self._band(each)[0] == "tensor"]
            if dtype_of(term.node) != dtype_of(content) or not all(
                self._can_be_had(node) for node in (content, *(mask.node for mask in masks))
            ):
                continue
            bias = broadcast(content, term.axes, term.factor)
            smaller = len(masks) < len(conditions) or not conditions
            if smaller or (self._are_shared([bias]) and all(self._is_padding(mask) for mask in masks)):
                return bias, conditions
        return None

    def _readings(self, term: Operand) -> list[tuple[Node, list[LabelledCondition]]]:
        """What the term may be: a bias, and what must hold where it is added to the scores; the rest is masked."""
        node, name, first, second = term.node, op_name(term.node), input_at(term.node, 0), input_at(term.node, 1)
        if name == "add" and argument(node, 2, "alpha", 1) == 1 and term.factor > 0:
            if first is None or second is None:
                return []
            found = []
            for content, mask in ((first, second), (second, first)):
                hidden = self.masks.visible_by_sum(mask, term.factor)
                whole = broadcast(mask, term.axes).axes
                found += [] if hidden is None else [(content, [labelled(each, whole) for each in hidden])]
            return found
        if name == "where" and len(node.args) > 2:
            condition, bias, holds = first, second, True
        elif name == "masked_fill":
            condition, bias, holds = second, first, False
        else:
            return []
        fill = self.masks.constant(node.args[2])
        if condition is None or bias is None or fill is None or not fill * term.factor <= MASKED_SCORE:
            return []
        whole = broadcast(condition, term.axes).axes
        return [(bias, [labelled(each, whole) for each in self.masks.visible(condition, holds)])]

    def _band(self, labelled: LabelledCondition) -> tuple[str, int]:
        """What a condition lets a row see: ("right", r): keys up to row + r; ("left", l): keys from row - l on;
        ("all", 0); or ("tensor", 0): what its tensor says."""
        half, rows, keys = labelled.condition.half, self.groups.rows, self.groups.keys
        if half is None:
            return "tensor", 0
        if half.offset >= 0 and min(half.steps, default=0) >= 0:  # no index is negative
            return "all", 0
        row_step = key_step = 0
        for step, axis in zip(half.steps, self.views.labels.axes(labelled.axes), strict=True):
            if axis and step and axis not in (rows, keys):
                return "tensor", 0
            row_step += step if axis == rows and axis else 0
            key_step += step if axis == keys and axis else 0
        # With one row, whose number is 0, its step does not matter.
        if half.offset >= 0 and key_step == -1 and (row_step == 1 or not rows):
            return "right", half.offset
        if half.offset >= 0 and key_step == 1 and (row_step == -1 or not rows):
            return "left", half.offset
        return "tensor", 0
