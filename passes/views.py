"""Views the tensors of one attention as the op wants them: one axis per batch, heads, rows or keys, head_dim.

What is above an operand in the graph and only moves, copies or repeats it is left out. Nothing of the graph's is
changed; the nodes that a view needs are appended where the graph inserts.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.fx

from sigswap.passes.labels import Axes, Label, Labels
from sigswap.passes.match import Call, Operand, Refused
from sigswap.passes.nodes import dtype_of, input_at, memory_of, tensor_at
from sigswap.passes.normalize import same_in, tensor_of
from sigswap.passes.ops import op_of

Group: TypeAlias = tuple[Label, ...]
Written: TypeAlias = Any
"""A torch.fx.Proxy: what is done to it is written into the graph. Its operators are set where no type checker looks."""
_GRADIENTS = frozenset({"_set_grad_enabled", "_enter_inference_mode"})
# Calls that change what a call between them does.
_REGIONS = _GRADIENTS | {"_enter_autocast", "_exit_autocast"}


@dataclasses.dataclass(frozen=True)
class Groups:
    """The labels that each axis of the op's tensors holds. ``outer``: of its batch."""

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
    """The tensors of one attention. Its methods raise Refused where a tensor cannot be had, or not be viewed."""

    def __init__(self, graph: torch.fx.Graph, labels: Labels, edited: set[int | None]) -> None:
        """``graph``: that the op is written into. ``edited``: the memory that is written to in place, anywhere."""
        self.graph, self.labels, self.edited = graph, labels, edited
        # What is left out above the operands must have run under the same autocast and grad mode as the op will.
        self.regions = {region_of(node) for node in graph.nodes} - {""}
        self.static: dict[Label, bool] = {}  # whether a label has the same size in every call

    def groups(self, call: Call, output: Operand, key: Operand, value: Operand) -> Groups:
        """The labels of the op's axes, in which the queries that share a key are the inner part of the heads.

        Every label is whole from here on: what follows splits none.
        """
        rows, value_dim = self.labels.whole(call.rows), self.labels.whole(call.value_dim)
        batch = [label for label in self.labels_of(output) if label not in (*rows, *value_dim)]
        outer, heads = self._heads(batch, key, value)
        return Groups(outer, heads, rows, self.labels.whole(call.keys), self.labels.whole(call.head_dim), value_dim)

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
        while not self.regions:
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

    def key_and_value(self, call: Call) -> tuple[Operand, Operand]:
        """Both without what repeats their heads, if both are repeated alike."""
        plain = self.base(call.key, upcast=True), self.base(call.value)
        key, value = self.base(call.key, repeated=True, upcast=True), self.base(call.value, repeated=True)
        own = {*self.labels.whole(call.rows), *self.labels.whole(call.head_dim)}
        query = set(self.labels_of(call.query))
        missing = [query - own - set(self.labels_of(operand)) for operand in (key, value)]
        return (key, value) if missing[0] == missing[1] else plain

    def output(self, output: Operand) -> tuple[Operand, list[torch.fx.Node]]:
        """The output, or a view that is its only use and has plain axes; and the views up to it."""
        seen = [output]
        while len(seen[-1].node.users) == 1 and not self.regions:
            user = next(iter(seen[-1].node.users))
            if not op_of(user).undone or op_of(user).broadcasts:
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

    # What is written.

    def canonical(self, operand: Operand, groups: tuple[Group, ...]) -> tuple[Written, list[Group]]:
        """The operand with one axis per group, and the labels in each of them (broadcast: none)."""
        node = same_in(operand.node, self.graph)
        if node is None:
            raise Refused("its operands are inside of a function that the graph holds as a whole")
        self.learn(operand)
        return self._regrouped(self._proxy(node), self.labels.axes(operand.axes), groups)

    def arrange(self, tensor: Written, groups: tuple[Group, ...], axes: Axes) -> Written:
        """``tensor``, with one axis per group, with the axes given."""
        return self._regrouped(tensor, groups, self.labels.axes(axes))[0]

    def filled(self, tensor: Written, dim: int, present: Group, group: Group, q: Written) -> Written:
        """Expands ``dim``, of which the labels ``present`` are there, to the whole group, which ``q`` has at ``dim``."""
        if present == group:
            return tensor
        sizes: list[Any] = [-1, -1, -1, -1]
        if not present:
            sizes[dim] = q.size(dim)
            return tensor.expand(*sizes)
        inner = present == group[: len(present)]  # what is missing is inside
        if not inner and present != group[len(group) - len(present) :]:
            raise Refused("one of its masks lacks a part of the batch")
        missing = self.call(operator.floordiv, q.size(dim), tensor.size(dim))
        at = dim + inner
        sizes.insert(at, missing)
        return tensor.unsqueeze(at).expand(*sizes).flatten(dim, dim + 1)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Written:
        """Writes a call of ``function``."""

        def unwrap(value: Any) -> Any:
            return value.node if isinstance(value, torch.fx.Proxy) else value

        node = self.graph.call_function(
            function, tuple(unwrap(arg) for arg in args), {name: unwrap(arg) for name, arg in kwargs.items()}
        )
        return self._proxy(node)

    def _proxy(self, node: torch.fx.Node) -> Written:
        """Writes a call of ``function``."""

        return torch.fx.Proxy(node, torch.fx.proxy.GraphAppendingTracer(self.graph))

    def learn(self, operand: Operand) -> None:
        """Which sizes never vary, as the Dynamo graph has them for the operand."""
        node = same_in(operand.node, self.graph)
        value = tensor_of(node) if node is not None else None
        if value is None:
            return
        for axis, size in zip(self.labels.axes(operand.axes), value.shape, strict=True):
            if isinstance(size, int):
                self.static.update(dict.fromkeys(axis, True))
            elif len(axis) == 1:
                self.static.setdefault(axis[0], False)

    def _regrouped(self, tensor: Written, axes: Axes, groups: tuple[Group, ...]) -> tuple[Written, list[Group]]:
        """``tensor``, whose axes are given, with one axis per group, and the labels in each of them."""
        tensor, units = self._exploded(tensor, axes, groups)
        kept = [i for i, unit in enumerate(units) if unit]
        if len(kept) < len(units):
            tensor = tensor.squeeze(tuple(i for i in range(len(units)) if i not in kept))
            units = [units[i] for i in kept]
        parts = [[i for i, unit in enumerate(units) if unit[0] in group] for group in groups]
        parts = [sorted(part, key=lambda i, g=group: g.index(units[i][0])) for part, group in zip(parts, groups)]
        order = [i for part in parts for i in part]
        if sorted(order) != list(range(len(units))):
            raise Refused("one of its operands has an axis that is none of batch, heads, rows and keys")
        if order != list(range(len(order))):
            tensor = tensor.permute(*order)
        for axis, part in enumerate(parts):
            if not part:
                tensor = tensor.unsqueeze(axis)
            elif len(part) > 1:
                tensor = tensor.flatten(axis, axis + len(part) - 1)
        return tensor, [tuple(label for i in part for label in units[i]) for part in parts]

    def _exploded(
        self, tensor: Written, units: Sequence[Group], groups: Sequence[Group]
    ) -> tuple[Written, list[Group]]:
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


def region_of(node: torch.fx.Node) -> str:
    """The function by which ``node`` switches autocast or gradients on or off; "" if it does not."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return name if name in _REGIONS else ""


def may_autocast(regions: set[str], device: str) -> bool:
    """Whether autocast may be on somewhere in a graph that has these regions."""
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return bool(regions - _GRADIENTS) or enabled


def may_lack_gradients(regions: set[str]) -> bool:
    """Whether gradients may be switched off somewhere in a graph that has these regions."""
    return bool(regions & _GRADIENTS)


def _is_upcast(node: torch.fx.Node) -> bool:
    """Whether ``node`` casts from half precision to a wider type: a product of such numbers is exact in both."""
    if not op_of(node).casts:
        return False
    source = input_at(node)
    half = source is not None and dtype_of(source) in (torch.float16, torch.bfloat16)
    return half and dtype_of(node) in (torch.float32, torch.float64)


def _moves(node: torch.fx.Node, source: torch.fx.Node) -> bool:
    """Whether a reshape has to copy its tensor."""
    before, after = tensor_at(source), tensor_at(node)
    if not op_of(node).reshapes or before is None or after is None:
        return False
    try:
        before.view(after.shape)
    except (RuntimeError, ValueError):
        return True
    return False
