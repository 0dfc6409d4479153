"""Proves from the graph that builds a mask what the mask is: a conjunction of half-planes and of tensors.

A mask [..., M, N] that comparisons of ``arange``, ``tril`` or ``triu`` make is a band around a diagonal; the kernels
take a band as two numbers, and skip the blocks outside of it. A mask of keys ([batch, 1, 1, N], padding) that was
combined with it stays a tensor of its own small shape. What is not proved stays the tensor that it is.

A proof must hold for every size of a dynamic graph, of which the shadow shows one. So numbers that may depend on a
symbolic size prove nothing; only ``arange``'s end and the sizes of constants may, for they do not enter the values.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument

from sigswap.masked import MASKED_SCORE
from sigswap.passes.axes import axis_map
from sigswap.passes.nodes import (
    argument,
    dtype_of,
    edited_by,
    input_at,
    int_arg,
    is_floating,
    memory_of,
    rank_of,
    shape_of,
    tensor_input,
)
from sigswap.passes.normalize import has_symbol, is_symbolic, source_of
from sigswap.passes.ops import Op, op_name, op_of


@dataclasses.dataclass(frozen=True)
class Affine:
    """An integer tensor: ``offset + sum(steps[axis] * index[axis])``."""

    steps: tuple[int, ...]
    offset: int


@dataclasses.dataclass(frozen=True)
class Constant:
    """A tensor of one number."""

    value: float


@dataclasses.dataclass(frozen=True)
class Condition:
    """What must hold where a mask is True: ``half`` >= 0, if known, and else ``node`` (inverted: its opposite).

    ``axes``: for each axis of ``node`` the axis of the mask that it is, or None for one of size 1.
    """

    node: Node
    axes: tuple[int | None, ...]
    half: Affine | None = None
    inverted: bool = False


@dataclasses.dataclass(frozen=True)
class Mask:
    """A tensor of two values: ``true`` where every condition holds, and ``false`` elsewhere."""

    conditions: tuple[Condition, ...]
    true: float = 1.0
    false: float = 0.0


Known = Affine | Constant | Mask | None


class Masks:
    """What is known of the nodes of one graph."""

    def __init__(self, graph: Graph) -> None:
        self._known: dict[Node, Known] = {}
        self.written: dict[Hashable, Any] = {}  # what the emission of attentions wrote, for others with the same masks
        # What is written to in place, perhaps through a view, is not what it was made as.
        self.edited = {memory_of(arg) for node in graph.nodes for arg in edited_by(node)}

    def visible(self, node: Node, where: bool = True) -> tuple[Condition, ...]:
        """What holds where the boolean tensor ``node`` is ``where``; in doubt, what the tensor itself says."""
        found = self.known(node)
        if isinstance(found, Constant) and bool(found.value) == where:
            return ()
        conditions = None
        if isinstance(found, Mask):
            conditions = _conditions_where(found, lambda value: bool(value) == where)
        return (dataclasses.replace(_itself(node), inverted=not where),) if conditions is None else conditions

    def visible_by_sum(self, node: Node, factor: float) -> tuple[Condition, ...] | None:
        """What holds where a tensor is 0 that, times ``factor``, is added to scores, if it masks the rest."""
        found = self.known(node)
        if isinstance(found, Constant) and found.value == 0:
            return ()
        if isinstance(found, Mask) and min(found.true * factor, found.false * factor) <= MASKED_SCORE:
            return _conditions_where(found, lambda value: value == 0)
        return None

    def constant(self, value: Argument) -> float | None:
        """A number, or a tensor of one number."""
        if isinstance(value, Node):
            found = self.known(value)
            return found.value if isinstance(found, Constant) else None
        return float(value) if isinstance(value, int | float | bool) else None

    def known(self, node: Node) -> Known:
        if node not in self._known:
            self._known[node] = None  # until it is known, for the sake of loops that no graph has
            self._known[node] = self._derive(node)
        return self._known[node]

    def _derive(self, node: Node) -> Known:
        if shape_of(node) is None or memory_of(node) in self.edited or not _counts(dtype_of(node)):
            return None
        if node.op == "get_attr":
            return _stored_number(node)
        op, args, source = op_of(node), node.args, input_at(node)
        if op.fills:
            return _fill(node, op)
        if op.name == "arange":
            return _arange(node)
        if op.name == "where":
            return self._where(node, *args[:3]) if len(args) > 2 else None
        if source is None:
            return None
        if op.same:
            return self._same(node, source)
        if op.views or (op.tiles and not has_symbol(node)):
            return self._viewed(node, source)
        if op.part and op.elementwise:
            return self._sliced(node, source)
        if op.name in ("add", "sub", "rsub", "mul", "neg"):
            return self._arithmetic(node, op.name)
        if op.compares is not None:
            return self._comparison(node, op.name, op.compares)
        if op.name == "logical_and":
            return self._both(node, *args[:2])
        if op.name == "logical_not":
            return self._not(node, source)
        if op.name == "masked_fill":
            return self._where(node, args[1], args[2], source)
        if op.name in ("tril", "triu"):
            return self._triangle(node, op.name)
        if op.name == "diff":
            return self._difference(node)
        if op.name == "cumsum":
            known = self.known(source)
            return known if _is_zero(known) else None
        if op.name == "index":
            return self._indexed(node, source, args[1])
        return None

    # Each of these gives what is known of ``node``, from what is known of its arguments.

    def _value(self, value: Argument, node: Node) -> Known:
        """Of an argument of ``node``, on ``node``'s axes."""
        if isinstance(value, int | float | bool):
            return Constant(float(value))
        if not isinstance(value, Node):
            return None
        before, shift = shape_of(value), rank_of(node) - rank_of(value)
        if before is None or shift < 0:
            return None
        return _moved(self.known(value), [axis + shift for axis in range(len(before))], rank_of(node))

    def _boolean(self, value: Argument, node: Node) -> Mask | None:
        """Of a boolean argument of ``node``: what is known, or the tensor itself, unless that is edited."""
        if not isinstance(value, Node) or dtype_of(value) != torch.bool or memory_of(value) in self.edited:
            return None
        known = self._value(value, node)
        if isinstance(known, Constant):
            return Mask(()) if known.value else None
        axes = tuple(range(rank_of(node) - rank_of(value), rank_of(node)))
        return known if isinstance(known, Mask) else Mask((Condition(value, axes),))

    def _same(self, node: Node, source: Node) -> Known:
        known, floating, boolean = self.known(source), is_floating(node), dtype_of(node) == torch.bool
        if known is None and floating:  # a boolean tensor as numbers is one of two values
            known = self._boolean(source, node)
        if isinstance(known, Constant):
            value = float(known.value != 0) if boolean else known.value
            return Constant(value) if floating or _is_whole(value) else None
        if known is None:
            return None
        if isinstance(known, Affine):
            return known if not floating and not boolean else None
        if boolean:
            return _checked(Mask(known.conditions, float(known.true != 0), float(known.false != 0)))
        return known if floating or (_is_whole(known.true) and _is_whole(known.false)) else None

    def _viewed(self, node: Node, source: Node) -> Known:
        axes, before = axis_map(node, source), shape_of(source)
        if axes is None or before is None or any(axis is None and before[i] != 1 for i, axis in enumerate(axes)):
            return None
        return _moved(self.known(source), axes, rank_of(node))

    def _sliced(self, node: Node, source: Node) -> Known:
        known = self.known(source)
        tensors = isinstance(known, Mask) and any(condition.half is None for condition in known.conditions)
        if shape_of(node) == shape_of(source) and not (tensors and has_symbol(node)):
            return known
        from_start = argument(node, 2, "start", 0) in (0, None) and argument(node, 4, "step", 1) == 1
        # From 0 on, half-planes stay what they are; tensors would have to be sliced, too.
        return known if op_name(node) in ("slice", "narrow") and from_start and not tensors else None

    def _arithmetic(self, node: Node, name: str) -> Known:
        if has_symbol(node) or node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
            return None
        left, right = (self._value(arg, node) for arg in (node.args[:2] if name != "neg" else (0, node.args[0])))
        if name == "rsub":
            left, right = right, left
        if name == "mul":
            return _combined(left, right, lambda a, b: a * b)
        sign = 1 if name == "add" else -1
        constants = isinstance(left, Constant) and isinstance(right, Constant)
        together = None if constants else _sum(left, right, sign, node)
        return _combined(left, right, lambda a, b: a + sign * b) if together is None else together

    def _comparison(self, node: Node, name: str, compare: Callable[[float, float], bool]) -> Known:
        if has_symbol(node):
            return None
        left, right = (self._value(arg, node) for arg in node.args[:2])
        constants = isinstance(left, Constant) and isinstance(right, Constant)
        if isinstance(left, Mask) or isinstance(right, Mask) or constants:
            return _combined(left, right, lambda a, b: float(compare(a, b)))
        if name in ("le", "lt"):
            left, right = right, left
        difference = _sum(left, right, -1, node)
        if difference is None or name in ("eq", "ne"):
            return None
        half = Affine(difference.steps, difference.offset - (name in ("gt", "lt")))
        return Mask((dataclasses.replace(_itself(node), half=half),))

    def _both(self, node: Node, *sources: Argument) -> Known:
        conditions: list[Condition] = []
        for source in sources:
            part = self._boolean(source, node)
            held = None if part is None else _conditions_where(part, bool)
            if held is None:
                return None
            conditions += held
        return Mask(tuple(conditions))

    def _not(self, node: Node, source: Node) -> Known:
        part = self._boolean(source, node)
        return None if part is None else dataclasses.replace(part, true=1 - part.true, false=1 - part.false)

    def _where(self, node: Node, condition: Argument, true: Argument, false: Argument) -> Known:
        """Of masked_fill, too, whose order it is."""
        held = self._boolean(condition, node)
        first, second = self._value(true, node), self._value(false, node)
        if held is None or has_symbol(node):
            return None
        if not held.true:
            held = Mask(held.conditions)
            first, second = second, first
        if isinstance(first, Constant) and isinstance(second, Constant):
            return _checked(Mask(held.conditions, first.value, second.value))
        # A mask, masked again.
        if isinstance(first, Mask) and isinstance(second, Constant) and second.value == first.false:
            return dataclasses.replace(first, conditions=(*held.conditions, *first.conditions))
        if len(held.conditions) == 1 and isinstance(second, Mask) and isinstance(first, Constant):
            again = dataclasses.replace(second, conditions=(_opposite(held.conditions[0]), *second.conditions))
            return again if first.value == second.false else None
        return None

    def _triangle(self, node: Node, name: str) -> Known:
        diagonal = argument(node, 1, "diagonal", 0)
        content, rank = self._value(node.args[0], node), rank_of(node)
        if not isinstance(diagonal, int) or has_symbol(node) or not isinstance(content, Constant) or rank < 2:
            return None
        # tril keeps j <= i + diagonal, triu j >= i + diagonal; the rest is 0.
        low = [0] * (rank - 2) + [1, -1]
        half = Affine(tuple(low), diagonal) if name == "tril" else Affine(tuple(-x for x in low), -diagonal)
        return _checked(Mask((dataclasses.replace(_itself(node), half=half),), content.value))

    # Documents that are packed behind one another begin where positions do not go up by one: transformers works that
    # out from positions, which may be an arange, and then there is one document.

    def _difference(self, node: Node) -> Known:
        """Of ``torch.diff(x, 1, dim, prepend)``, where x goes up evenly, also from what is prepended."""
        if has_symbol(node):
            return None
        known, before, after = self.known(tensor_input(node)), input_at(node, 3), input_at(node, 4)
        if not isinstance(known, Affine) or argument(node, 1, "n") not in (1, None) or after is not None:
            return None
        axis = (int_arg(node, 2, default=-1) or 0) % rank_of(node)
        if before is not None:
            first = self.known(before)
            if not isinstance(first, Affine) or (shape_of(before) or ())[axis] != 1:
                return None
            steps = [(a, b) for i, (a, b) in enumerate(zip(known.steps, first.steps, strict=True)) if i != axis]
            if any(a != b for a, b in steps) or known.offset - first.offset != known.steps[axis]:
                return None
        return Constant(float(known.steps[axis]))

    def _indexed(self, node: Node, source: Node, indices: Argument) -> Known:
        known = self.known(source)
        if isinstance(known, Constant):
            return known
        if not isinstance(known, Affine) or not isinstance(indices, Sequence) or has_symbol(node):
            return None
        if len(indices) != len(known.steps):
            return None
        steps, offset = [0] * rank_of(node), known.offset
        for step, index in zip(known.steps, indices, strict=True):
            at = self._value(index, node)
            if not isinstance(at, Affine) or at.offset < 0 or min(at.steps, default=0) < 0:
                return None
            steps = [a + step * b for a, b in zip(steps, at.steps, strict=True)]
            offset += step * at.offset
        return Affine(tuple(steps), offset)


def _itself(node: Node) -> Condition:
    return Condition(node, tuple(range(rank_of(node))))


def _opposite(condition: Condition) -> Condition:
    """Where ``condition`` does not hold. Of integers: not (a >= 0) is -a - 1 >= 0."""
    half = condition.half and Affine(tuple(-step for step in condition.half.steps), -condition.half.offset - 1)
    return dataclasses.replace(condition, half=half, inverted=not condition.inverted)


def _conditions_where(mask: Mask, holds: Callable[[float], bool]) -> tuple[Condition, ...] | None:
    """Terms that hold just where the mask's value does; None if there are no such."""
    true, false = holds(mask.true), holds(mask.false)
    if true and not false:
        return mask.conditions
    if false and not true and len(mask.conditions) == 1:
        return (_opposite(mask.conditions[0]),)
    return () if true and false else None


def _moved(known: Known, axes: Sequence[int | None], rank: int) -> Known:
    """``known`` of a tensor whose axes are those ``axes`` of another, broadcast or viewed."""
    if isinstance(known, Affine):
        steps = [0] * rank
        for step, axis in zip(known.steps, axes, strict=True):
            if axis is not None:
                steps[axis] = step
        return Affine(tuple(steps), known.offset)
    if isinstance(known, Mask):
        conditions = []
        for condition in known.conditions:
            half = _moved(condition.half, axes, rank)
            own = tuple(None if axis is None else axes[axis] for axis in condition.axes)
            conditions.append(dataclasses.replace(condition, half=half if isinstance(half, Affine) else None, axes=own))
        return dataclasses.replace(known, conditions=tuple(conditions))
    return known


def _combined(left: Known, right: Known, function: Callable[[float, float], float]) -> Known:
    """``function`` of two numbers, or of a tensor of two values and a number."""
    if isinstance(left, Constant) and isinstance(right, Constant):
        return _checked(Constant(function(left.value, right.value)))
    if isinstance(left, Mask) and isinstance(right, Constant):
        return _checked(Mask(left.conditions, function(left.true, right.value), function(left.false, right.value)))
    if isinstance(left, Constant) and isinstance(right, Mask):
        return _checked(Mask(right.conditions, function(left.value, right.true), function(left.value, right.false)))
    if isinstance(left, Affine) and isinstance(right, Constant) and function(1, 3) == 3:  # a product
        left, right = right, left
    if isinstance(left, Constant) and isinstance(right, Affine) and function(3, 1) == 3:
        if not _is_whole(left.value):
            return None
        factor = int(left.value)
        return Affine(tuple(step * factor for step in right.steps), right.offset * factor)
    return None


def _checked(known: Constant | Mask) -> Known:
    values = (known.value,) if isinstance(known, Constant) else (known.true, known.false)
    if any(math.isnan(value) for value in values):
        return None
    return Constant(known.true) if isinstance(known, Mask) and known.true == known.false else known


def _sum(left: Known, right: Known, sign: int, node: Node) -> Affine | None:
    """``left + sign * right`` of what is known on the axes of ``node``, if both are integers that go up evenly."""
    first, second = (_as_affine(known, rank_of(node)) for known in (left, right))
    if first is None or second is None:
        return None
    steps = tuple(a + sign * b for a, b in zip(first.steps, second.steps, strict=True))
    return Affine(steps, first.offset + sign * second.offset)


def _as_affine(known: Known, rank: int) -> Affine | None:
    if isinstance(known, Constant) and _is_whole(known.value):
        return Affine((0,) * rank, int(known.value))
    return known if isinstance(known, Affine) else None


def _is_whole(value: float) -> bool:
    return math.isfinite(value) and value == int(value)


def _is_zero(known: Known) -> bool:
    return isinstance(known, Constant) and known.value == 0


def _fill(node: Node, op: Op) -> Known:
    if op.name in ("ones", "zeros"):
        return Constant(float(op.name == "ones"))
    if op.name == "scalar_tensor":
        value, symbolic = argument(node, 0), has_symbol(node)
    else:
        value, symbolic = node.args[-1] if len(node.args) > 1 else None, _fills_symbol(node)
    value = node.kwargs.get("fill_value", value)
    return Constant(float(value)) if isinstance(value, int | float | bool) and not symbolic else None


def _fills_symbol(node: Node) -> bool:
    """Whether the number that fills a constant may depend on a symbolic size."""
    source = source_of(node)
    if source is None:
        return True
    return any(is_symbolic(arg) for arg in (*source.args[1:], *source.kwargs.values()))


def _arange(node: Node) -> Known:
    numbers = [arg for arg in node.args if isinstance(arg, int)]
    if len(numbers) != len(node.args) or is_floating(node):
        return None
    start, step = (numbers[0] if len(numbers) > 1 else 0), (numbers[2] if len(numbers) > 2 else 1)
    source = source_of(node)
    if source is None or op_name(source) != "arange":
        return None if source is None or has_symbol(node) else Affine((int(step),), int(start))
    if len(source.args) > 1 and any(is_symbolic(arg) for arg in (source.args[0], *source.args[2:])):
        return None
    if any(is_symbolic(source.kwargs.get(name)) for name in ("start", "step")):
        return None
    return Affine((int(step),), int(start))


def _stored_number(node: Node) -> Known:
    """A tensor of one number that tracing has stored in the graph's module; not one that the model holds."""
    source = source_of(node)
    if source is None or source.op not in ("call_function", "call_method") or has_symbol(node):
        return None
    stored = operator.attrgetter(str(node.target))(node.graph.owning_module)
    return Constant(float(stored)) if type(stored) is torch.Tensor and stored.numel() == 1 else None


def _counts(dtype: torch.dtype | None) -> bool:
    """Whether numbers of the dtype behave as numbers: small integers wrap around."""
    if dtype is None:
        return False
    return dtype.is_floating_point or dtype in (torch.bool, torch.int32, torch.int64)
