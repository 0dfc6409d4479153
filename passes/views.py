"""Views the tensors of one attention as the op wants them: an axis for batch, heads, rows or keys, and head_dim each.

What is above an operand in the graph and only moves, copies or repeats it is left out. Nothing that is in the graph is
changed; what a view needs is added where the graph inserts. Tensors are torch.fx proxies: what is done to one is
written into the graph.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence, Set
from typing import Any

import torch
import torch.fx
from torch.fx import Graph, Node, Proxy

from sigswap.passes.labels import Axes, Label, Labels
from sigswap.passes.match import Call, Operand, Refused
from sigswap.passes.nodes import dtype_of, input_at, memory_of, tensor_at
from sigswap.passes.normalize import same_in, source_of, tensor_of
from sigswap.passes.ops import op_of

Group = tuple[Label, ...]
"""The labels of one axis of the op's tensors."""
_GRADIENTS = frozenset({"_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode"})
# Calls that change what a call between them does.
_REGIONS = _GRADIENTS | {"_enter_autocast", "_exit_autocast"}


@dataclasses.dataclass(frozen=True)
class Groups:
    """The labels of each axis of the op's tensors. ``outer``: of the batch."""

    outer: Group
    heads: Group
    rows: Group
    keys: Group
    head_dim: Group
    value_dim: Group

    @property
    def scores(self) -> tuple[Group, ...]:
        """Of scores and masks."""
        return self.outer, self.heads, self.rows, self.keys


class Views:
    """The tensors of one attention. Methods raise Refused where a tensor cannot be had, or not be viewed."""

    def __init__(self, graph: Graph, labels: Labels, edited: set[int | None], device: torch.device, last: Node) -> None:
        """``graph``: that is written to. ``edited``: the memory that an edit in place writes to, anywhere. ``last``: of
        the nodes that the op replaces."""
        self.graph, self.labels, self.edited, self.device, self.last = graph, labels, edited, device, last
        # What is left out above the operands must have run under the same autocast and grad mode as the op will.
        self.switches = [node for node in graph.nodes if region_of(node)]
        self.static: dict[Label, bool] = {}  # whether a label has the same size in every call

    @property
    def may_autocast(self) -> bool:
        """Whether autocast may be on where the op is called."""
        kind = self.device.type
        enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return enabled or any(region_of(node) not in _GRADIENTS for node in self.switches)

    def groups(self, call: Call, output: Operand, key: Operand, value: Operand) -> Groups:
        """The labels of the op's axes. The queries that share a key are the inner part of the heads.

        Every label is whole from here on: what follows splits none.
        """
        rows, value_dim = self.labels.whole(call.rows), self.labels.whole(call.value_dim)
        batch = [label for label in self.labels_of(output) if label not in (*rows, *value_dim)]
        outer, heads = self._heads(batch, key, value)
        return Groups(outer, heads, rows, self.labels.whole(call.keys), self.labels.whole(call.head_dim), value_dim)

    def _heads(self, batch: Sequence[Label], key: Operand, value: Operand) -> tuple[Group, Group]:
        shared = [label for label in batch if label not in self.labels_of(key)]
        if shared != [label for label in batch if label not in self.labels_of(value)]:
            raise Refused("its keys and values are shared by different heads")
        if not shared or len(shared) == len(batch):
            return tuple(batch[:-1]), tuple(batch[-1:])
        end = max(batch.index(label) for label in shared) + 1
        start = end - 1
        while start > 0 and batch[start - 1] in shared:
            start -= 1
        start = max(start - 1, 0)
        return (*batch[:start], *batch[end:]), tuple(batch[start:end])

    def labels_of(self, operand: Operand) -> list[Label]:
        """All labels on the operand's axes."""
        return [label for axis in self.labels.axes(operand.axes) for label in axis]

    # Which nodes to read.

    def base(self, operand: Operand, *, repeated: bool = False, upcast: bool = False) -> Operand:
        """The operand without the copies and transposes above it, as a tensor that the Dynamo graph has.

        ``repeated``: without what repeats it along an axis, too. ``upcast``: without casts from half precision, too.
        """
        best = operand if same_in(operand.node, self.graph) is not None else None
        current, copied = operand, False
        while self.runs_like_the_op(current.node):
            node, op, source = current.node, op_of(current.node), input_at(current.node)
            repeats, casts = op.broadcasts or op.name == "repeat_interleave", _is_upcast(node)
            if source is None or not (op.undone or op.copies or casts):
                break
            if (repeats and not repeated) or (casts and not upcast):
                break
            # A copy that is written to, perhaps through a view, is not what it was copied from.
            if memory_of(node) in self.edited and memory_of(node) != memory_of(source):
                break
            axes = current.axes if casts else self.labels.above(node, source, current.axes)
            if axes is None:
                break
            copied |= repeats or casts or op.copies or _moves(node, source)
            current = Operand(source, axes, operand.factor)
            if same_in(source, self.graph) is None:
                continue
            # Above a copy: that much is gained. Above a transpose: the op has its axes in another order anyway.
            if copied or best is None or (op.undone and not op.reshapes and all(len(axis) <= 1 for axis in axes)):
                best = current
        if best is None:
            raise Refused("its operands are inside of a function that the graph holds as a whole")
        return best

    def runs_like_the_op(self, node: Node, switches: Set[str] = _REGIONS) -> bool:
        """Whether no autocast or grad mode is switched between where ``node`` is called and where the op will be."""
        if not any(region_of(switch) in switches for switch in self.switches):
            return True
        place, end = source_of(node), source_of(self.last)
        if place is None or end is None or place.graph is not self.graph or end.graph is not self.graph:
            return False
        return not self.switched(min(place, end), max(place, end), switches)

    def has_the_ops_gradients(self, node: Node) -> bool:
        """Whether the grad mode is not switched between where ``node`` is called and where the op will be."""
        return self.runs_like_the_op(node, _GRADIENTS)

    def switched(self, start: Node, end: Node, switches: Set[str] = _REGIONS) -> bool:
        """Whether autocast or the grad mode is switched between two nodes of the graph."""
        return any(start < switch < end for switch in self.switches if region_of(switch) in switches)

    def key_and_value(self, call: Call) -> tuple[Operand, Operand]:
        """Both without what repeats their heads, if both are repeated alike."""
        plain = self.base(call.key, upcast=True), self.base(call.value)
        key, value = self.base(call.key, repeated=True, upcast=True), self.base(call.value, repeated=True)
        own = {*self.labels.whole(call.rows), *self.labels.whole(call.head_dim)}
        query = set(self.labels_of(call.query))
        missing = [query - own - set(self.labels_of(operand)) for operand in (key, value)]
        return (key, value) if missing[0] == missing[1] else plain

    def output(self, output: Operand) -> tuple[Operand, list[Node]]:
        """The output, or a view that is its only use and has plain axes; and the views up to it."""
        seen = [output]
        while len(seen[-1].node.users) == 1:
            user = next(iter(seen[-1].node.users))
            if not op_of(user).undone or op_of(user).broadcasts or not self.runs_like_the_op(user):
                break
            axes = self.labels.through(user, seen[-1].node, seen[-1].axes)
            if axes is None:
                break
            seen.append(Operand(user, axes))
        known = [operand for operand in seen if same_in(operand.node, self.graph) is not None]
        if not known:
            raise Refused("its output is inside of a function that the graph holds as a whole")
        plain = [operand for operand in known if all(len(axis) <= 1 for axis in self.labels.axes(operand.axes))]
        best = (plain or known)[0]
        return best, [operand.node for operand in seen[1 : seen.index(best) + 1]]

    # What is written.

    def canonical(self, operand: Operand, groups: Sequence[Group]) -> tuple[Proxy, list[Group]]:
        """The operand with one axis per group, and the labels in each of them (broadcast: none)."""
        node = same_in(operand.node, self.graph)
        if node is None:
            raise Refused("its operands are inside of a function that the graph holds as a whole")
        self.learn(operand)
        return self._regrouped(self._proxy(node), self.labels.axes(operand.axes), groups)

    def arrange(self, tensor: Proxy, groups: Sequence[Group], axes: Axes) -> Proxy:
        """``tensor``, with one axis per group, with the axes given."""
        return self._regrouped(tensor, groups, self.labels.axes(axes))[0]

    def filled(self, tensor: Proxy, dim: int, present: Group, group: Group, whole: Proxy) -> Proxy:
        """Expands ``dim``, of which the labels ``present`` are there, to the whole group, as ``whole`` has it."""
        if present == group:
            return tensor
        sizes: list[int | Proxy] = [-1, -1, -1, -1]
        if not present:
            sizes[dim] = whole.size(dim)
            return tensor.expand(*sizes)
        inner = present == group[: len(present)]  # what is missing is inside
        if not inner and present != group[len(group) - len(present) :]:
            raise Refused("one of its masks lacks a part of the batch")
        at = dim + inner
        sizes.insert(at, self.call(operator.floordiv, whole.size(dim), tensor.size(dim)))
        return tensor.unsqueeze(at).expand(*sizes).flatten(dim, dim + 1)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Proxy:
        """Writes a call of ``function``, of which any argument may be a proxy."""

        def unwrap(value: Any) -> Any:
            return value.node if isinstance(value, Proxy) else value

        given = {name: unwrap(value) for name, value in kwargs.items()}
        return self._proxy(self.graph.call_function(function, tuple(unwrap(value) for value in args), given))

    def learn(self, operand: Operand) -> None:
        """Notes which of the operand's sizes are the same in every call, as the Dynamo graph has them."""
        node = same_in(operand.node, self.graph)
        value = tensor_of(node) if node is not None else None
        if value is None:
            return
        for axis, size in zip(self.labels.axes(operand.axes), value.shape, strict=True):
            if isinstance(size, int):
                self.static.update(dict.fromkeys(axis, True))
            elif len(axis) == 1:
                self.static.setdefault(axis[0], False)

    def _proxy(self, node: Node) -> Proxy:
        return Proxy(node, torch.fx.proxy.GraphAppendingTracer(self.graph))

    def _regrouped(self, tensor: Proxy, axes: Sequence[Group], groups: Sequence[Group]) -> tuple[Proxy, list[Group]]:
        """``tensor``, whose axes are given, with one axis per group, and the labels in each of them."""
        tensor, units = self._exploded(tensor, axes, groups)
        broadcast = tuple(i for i, unit in enumerate(units) if not unit)
        if broadcast:
            tensor, units = tensor.squeeze(broadcast), [unit for unit in units if unit]
        places = places_of(groups)
        if any(unit[0] not in places for unit in units):
            raise Refused("one of its operands has an axis that is none of batch, heads, rows and keys")
        order = sorted(range(len(units)), key=lambda i: places[units[i][0]])
        if order != list(range(len(order))):
            tensor = tensor.permute(*order)
        present = []
        for axis in range(len(groups)):
            parts = [units[i] for i in order if places[units[i][0]][0] == axis]
            if not parts:
                tensor = tensor.unsqueeze(axis)
            elif len(parts) > 1:
                tensor = tensor.flatten(axis, axis + len(parts) - 1)
            present.append(tuple(label for part in parts for label in part))
        return tensor, present

    def _exploded(self, tensor: Proxy, units: Sequence[Group], groups: Sequence[Group]) -> tuple[Proxy, list[Group]]:
        """Splits each axis that is not a part of one group."""
        result: list[Group] = []
        for unit in units:
            if len(unit) <= 1 or any(unit == group[i : i + len(unit)] for group in groups for i in range(len(group))):
                result.append(unit)
                continue
            unknown = [label for label in unit if not self.static.get(label, False)]
            if len(unknown) > 1:
                raise Refused("an axis of one of its operands merges several sizes that vary")
            sizes = [-1 if label in unknown else self.labels.size([label]) for label in unit]
            tensor = tensor.unflatten(len(result), sizes)
            result += [(label,) for label in unit]
        return tensor, result


def places_of(groups: Sequence[Group]) -> dict[Label, tuple[int, int]]:
    """For each label the number of its group, and its place there."""
    return {label: (number, i) for number, group in enumerate(groups) for i, label in enumerate(group)}


def region_of(node: Node) -> str:
    """The function by which ``node`` switches autocast or gradients on or off; "" if it does not."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return name if name in _REGIONS else ""


def _is_upcast(node: Node) -> bool:
    """Whether ``node`` casts from half precision to a wider type: a product of such numbers is exact in both."""
    source = input_at(node)
    if source is None or not op_of(node).casts:
        return False
    return dtype_of(source) in (torch.float16, torch.bfloat16) and dtype_of(node) in (torch.float32, torch.float64)


def _moves(node: Node, source: Node) -> bool:
    """Whether a reshape has to copy its tensor."""
    before, after = tensor_at(source), tensor_at(node)
    if not op_of(node).reshapes or before is None or after is None:
        return False
    try:
        before.view(after.shape)
    except (RuntimeError, ValueError):
        return True
    return False
