"""What of an attention's masks and additive terms becomes a band, padding, a row bias or a tensor. It writes nothing.

A band (causal, window) is two numbers for the op. A bias that varies by row alone is the op's row bias. A term that is
a bias under a mask is taken apart where that makes it smaller. Padding beside a bias that all sequences share is kept
out of that bias, which it would make [B, H, M, N].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch.fx

from sigswap.masked import MASKED_SCORE
from sigswap.passes.labels import Labels
from sigswap.passes.masks import Masks
from sigswap.passes.match import Modifiers, Operand, Visible, broadcast, visible_of
from sigswap.passes.nodes import argument, dtype_of, memory_of
from sigswap.passes.normalize import has_symbol, same_in
from sigswap.passes.ops import op_name
from sigswap.passes.views import Groups, Views, may_lack_gradients

Boolean = tuple[Operand, bool]
"""A mask that stays a tensor, and whether it is to be inverted."""


@dataclasses.dataclass(frozen=True)
class MaskPlan:
    """What becomes of masks and additive terms.

    ``row_biases``: added to the row bias. ``terms`` and ``tensors``: the op's attn_mask, the sum of the terms where all
    of the tensors let see. ``padding``: [B, 1, 1, N], kept apart from it. ``left``, ``right``: the window, as the op
    has it; -1: not bounded.
    """

    row_biases: list[Operand]
    terms: list[Operand]
    tensors: list[Boolean]
    padding: list[Boolean]
    left: int
    right: int

    @property
    def band(self) -> dict[str, Any]:
        """The op's options for the window."""
        right = self.right if self.right > 0 else -1
        return {"is_causal": self.right == 0, "window_left": self.left, "window_right": right}

    @property
    def words(self) -> list[str]:
        """What there is, for a report."""
        words = ["causal"] if self.right == 0 else []
        words += [f"window ({self.left}, {self.right})"] if self.left >= 0 or self.right > 0 else []
        if self.terms:
            words += ["additive mask"] + ["with a boolean one"] * bool(self.tensors)
        elif self.tensors:
            words.append("boolean mask")
        return words + ["padding"] * bool(self.padding)


class MaskPlanner:
    """Makes the plan of one attention."""

    def __init__(self, views: Views, groups: Groups, masks: Masks) -> None:
        self.views, self.groups, self.masks = views, groups, masks

    def plan(self, found: Modifiers, *, keep_padding: bool) -> MaskPlan:
        """``keep_padding``: padding becomes part of the attn_mask in any case."""
        visible, terms, pending = list(found.masks), [], list(found.terms)
        while pending:
            term = pending.pop(0)
            hidden = self.masks.visible_by_sum(term.node, term.factor) if term.factor > 0 else None
            if hidden is not None:
                visible += [visible_of(each, term.axes) for each in hidden]
            elif (parts := self._bias_and_mask(term)) is not None:
                pending.insert(0, parts[0])
                visible += parts[1]
            else:
                terms.append(term)
        left, right = found.left, found.right
        tensors: list[Boolean] = []
        for each in visible:
            side, distance = _band(each, self.views.labels, self.groups)
            if side == "right":
                right = distance if right < 0 else min(right, distance)
            elif side == "left":
                left = distance if left < 0 else min(left, distance)
            elif side == "tensor":
                tensors.append((Operand(each.term.node, each.own), each.term.inverted))
        keys = set(self.groups.keys)
        biases = [term for term in terms if keys and not self._labels(term) & keys]
        terms = [term for term in terms if term not in biases]
        padding = [] if keep_padding else self._padding(terms, tensors)
        return MaskPlan(biases, terms, [each for each in tensors if each not in padding], padding, left, right)

    def _labels(self, operand: Operand) -> set[int]:
        return set(self.views.labels_of(operand))

    def _padding(self, terms: Sequence[Operand], tensors: Sequence[Boolean]) -> list[Boolean]:
        """The masks that differ by sequence, if they are padding beside a bias that does not."""
        differing = [each for each in tensors if self._labels(each[0]) & set(self.groups.outer)]
        padding = self._are_shared(terms) and all(self._is_padding(operand) for operand, _ in differing)
        return differing if padding else []

    def _are_shared(self, terms: Sequence[Operand]) -> bool:
        """Whether the terms are a bias per position that all sequences share."""
        sets = [self._labels(term) for term in terms]
        return any(each & set(self.groups.rows) for each in sets) and not any(
            each & set(self.groups.outer) for each in sets
        )

    def _is_padding(self, mask: Operand) -> bool:
        """Whether a mask hides keys of a sequence from all of its rows and heads."""
        labels, outer, keys = self._labels(mask), set(self.groups.outer), set(self.groups.keys)
        return bool(labels & outer) and bool(labels & keys) and labels <= outer | keys

    def _bias_and_mask(self, term: Operand) -> tuple[Operand, list[Visible]] | None:
        """A term that is a bias where a mask holds and hides the rest, as T5's, taken apart: if that makes it smaller,
        for the mask has a band, or is of padding while all sequences share the bias."""
        if same_in(term.node, self.views.graph) is not None:
            term = self.views.base(term)  # without copies of it
        # A number that varies proves nothing; where gradients are switched off on the way, the bias may have none.
        if has_symbol(term.node) or may_lack_gradients(self.views.regions):
            return None
        for content, visible in self._readings(term):
            # What was edited is not what it was; a bias inside of a function cannot be had.
            if {memory_of(term.node), memory_of(content)} & self.masks.edited or same_in(
                content, self.views.graph
            ) is None:
                continue
            if dtype_of(term.node) != dtype_of(content):
                continue
            bias = broadcast(content, term.axes, term.factor)
            kinds = [_band(each, self.views.labels, self.groups)[0] for each in visible]
            masks = [
                Operand(each.term.node, each.own) for each, kind in zip(visible, kinds, strict=True) if kind == "tensor"
            ]
            if any(
                same_in(mask.node, self.views.graph) is None or memory_of(mask.node) in self.masks.edited
                for mask in masks
            ):
                continue
            smaller = len(masks) < len(visible) or not visible
            if smaller or (self._are_shared([bias]) and all(self._is_padding(mask) for mask in masks)):
                return bias, visible
        return None

    def _readings(self, term: Operand) -> list[tuple[torch.fx.Node, list[Visible]]]:
        """What the term may be: a bias, and what must hold where it is added to the scores; the rest is masked."""
        node, name = term.node, op_name(term.node)
        args: tuple[Any, ...] = node.args
        if name == "add" and argument(node, 2, "alpha", 1) == 1 and term.factor > 0:
            found = []
            for content, mask in (args[:2], args[1::-1]):
                if isinstance(content, torch.fx.Node) and isinstance(mask, torch.fx.Node):
                    terms = self.masks.visible_by_sum(mask, term.factor)
                    whole = broadcast(mask, term.axes).axes
                    found += [] if terms is None else [(content, [visible_of(each, whole) for each in terms])]
            return found
        if name == "where" and len(args) > 2:
            condition, content, fill, holds = *args[:3], True
        elif name == "masked_fill":
            content, condition, fill, holds = *args[:3], False
        else:
            return []
        number = self.masks.constant(fill)
        if not isinstance(content, torch.fx.Node) or number is None or not number * term.factor <= MASKED_SCORE:
            return []
        whole = broadcast(condition, term.axes).axes
        return [(content, [visible_of(each, whole) for each in self.masks.visible(condition, holds)])]


def _band(visible: Visible, labels: Labels, groups: Groups) -> tuple[str, int]:
    """What a term lets a row see: ("right", r): keys up to row + r; ("left", l): keys from row - l on; ("all", 0); or
    ("tensor", 0): what its tensor says."""
    half, rows, keys = visible.term.half, groups.rows, groups.keys
    if half is None:
        return "tensor", 0
    if half.offset >= 0 and min(half.steps, default=0) >= 0:  # no index is negative
        return "all", 0
    row_step = key_step = 0
    for step, axis in zip(half.steps, labels.axes(visible.axes), strict=True):
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
