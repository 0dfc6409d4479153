"""Writes a matched attention into its Dynamo graph as one call of ``sigswap::sigmoid_attention``."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node, Proxy

from sigswap.masked import MASKED_SCORE
from sigswap.passes.mask_plan import Boolean, MaskPlan, MaskPlanner
from sigswap.passes.masks import Masks
from sigswap.passes.match import BLOCKS_OP, Call, FirstToken, Operand, Refused
from sigswap.passes.nodes import dtype_of, edited_by, input_at, is_floating, memory_of, tensor_at
from sigswap.passes.normalize import rename, same_in, source_of, tensor_of
from sigswap.passes.ops import OPS, Op, op_of, spelling_of
from sigswap.passes.site import Lowered
from sigswap.passes.views import Group, Views, places_of

OP = torch.ops.sigswap.sigmoid_attention.default
FIRST_TOKEN_BIAS = torch.ops.sigswap.first_token_bias.default
_WHERE = "nn_module_stack", "stack_trace", "source_fn_stack"

Written = tuple[Proxy, Proxy, Proxy | None]
"""An attn_mask, the padding kept apart from it, and what the visible keys add to the row bias, if they do."""


class Emission:
    """Writes one call of the op, in the place of a path of nodes."""

    def __init__(self, call: Call, masks: Masks) -> None:
        """Raises Refused: the attention's nodes cannot be had, or not be had where the op would be called."""
        self.call, self.labels, self.masks = call, call.labels, masks
        source, query = source_of(call.path[-1]), tensor_at(call.query.node)
        if source is None or query is None:
            raise Refused("its output is not in the graph")
        self.graph = source.graph
        self.written: dict[Hashable, Any] = {}  # Written, or the nodes of a mask's blocks
        self.views = views = Views(self.graph, call.labels, masks.edited, query.device, call.path[-1])
        self.output, self.output_views = views.output(call.output)
        self.query = views.base(call.query, upcast=True)
        self.key, self.value = views.key_and_value(call)
        for operand in (self.query, self.key, self.value, self.output):
            views.learn(operand)
        self.groups = views.groups(call, self.output, self.key, self.value)
        self._check_region()
        self._check_edits()

    def emit(self) -> Lowered:
        """Raises Refused, and leaves the graph as it was."""
        last = self.output.node
        target = same_in(last, self.graph)
        assert target is not None
        before, dtype = target.prev, _dtype(target)
        with self.graph.inserting_before(target):
            try:
                result, words = self._write()
                outer, heads, rows, _ = self.groups.scores
                final = self.views.arrange(result, (outer, heads, rows, self.groups.value_dim), self.output.axes)
            except Refused:
                while target.prev is not before:
                    self.graph.erase_node(target.prev)
                raise
            if dtype != self.dtype:
                final = final.to(dtype)
            # A product is contiguous, and so may be viewed; the op's result is [B, M, H, D] in memory.
            if len(self.call.path) > 1 and _needs_strides(target):
                final = final.contiguous()
        added = target.prev
        while added is not before:
            added.meta.update({name: target.meta[name] for name in _WHERE if name in target.meta})
            added = added.prev
        self.masks.written.update(self.written)
        final.node.meta.update(target.meta)
        target.replace_all_uses_with(final.node)
        self._erase()
        rename(last, self.graph, final.node)
        return Lowered(result.node, words)

    # Checks.

    def _check_region(self) -> None:
        """The op is called where the output was: what its inputs met on the way must hold there."""
        first, last = source_of(self.call.path[0]), same_in(self.output.node, self.graph)
        assert last is not None
        if first is None or first.graph is not self.graph:
            raise Refused("its scores and its output are in different graphs (a checkpoint between them)")
        if self.views.switched(first, last):
            raise Refused("autocast or gradients are switched on or off between its scores and its output")

    def _check_edits(self) -> None:
        """No tensor that the op will read may be written to after it was first read."""
        found = self.call.modifiers
        operands = [self.query, self.key, self.value, *found.terms]
        operands += [operand for operand, _ in found.query_factors + found.key_factors]
        operands += [] if found.first is None else found.first.operands
        nodes = [operand.node for operand in operands] + [each.condition.node for each in found.masks]
        order = {node: number for number, node in enumerate(self.output.node.graph.nodes)}
        read: dict[int | None, int] = {}
        for node in nodes:
            read[memory_of(node)] = min(order[node], read.get(memory_of(node), order[node]))
        for node, number in order.items():
            before = number < order[self.output.node] and node not in self.call.path
            if before and any(number > read.get(memory_of(edited), number) for edited in edited_by(node)):
                raise Refused("one of its operands is edited in place before its output")

    # The call.

    def _write(self) -> tuple[Proxy, str]:
        """The call, and its operands in words."""
        call, found, groups, views = self.call, self.call.modifiers, self.groups, self.views
        outer, heads, rows, keys = groups.scores
        k, key_groups = views.canonical(self.key, (outer, heads, keys, groups.head_dim))
        v, value_groups = views.canonical(self.value, (outer, heads, keys, groups.value_dim))
        q, query_groups = views.canonical(self.query, (outer, heads, rows, groups.head_dim))
        if query_groups[1] != heads or (query_groups[0] != outer and key_groups[0] != outer):
            raise Refused("its queries lack a batch axis of its keys")
        q = views.filled(q, 0, query_groups[0], outer, k)
        k, v = views.filled(k, 0, key_groups[0], outer, q), views.filled(v, 0, value_groups[0], outer, q)
        repeated = key_groups[1] != heads
        if key_groups[1] != heads[: len(key_groups[1])] or value_groups[1] != key_groups[1]:
            raise Refused("its keys are shared by heads that are not neighbours")
        if query_groups[3] != groups.head_dim or key_groups[2:] != [keys, groups.head_dim]:
            raise Refused("its query or key is broadcast along head_dim or its length")
        if value_groups[2:] != [keys, groups.value_dim]:
            raise Refused("its value is broadcast along head_dim or its length")
        inputs = [same_in(operand.node, self.graph) for operand in (self.query, self.key, self.value)]
        dtypes = [_dtype(node) for node in inputs if node is not None]
        self.dtype = functools.reduce(torch.promote_types, dtypes)
        q, k, v = (x if dtype == self.dtype else x.to(self.dtype) for x, dtype in zip((q, k, v), dtypes, strict=True))
        for operand, divides in found.query_factors:
            q = self._times(q, operand, (outer, heads, rows, ()), divides)
        for operand, divides in found.key_factors:
            if repeated:
                raise Refused("its scores are multiplied by a tensor over keys that several heads share")
            k = self._times(k, operand, (outer, heads, keys, ()), divides)
        plan = MaskPlanner(views, groups, self.masks).plan(found)
        if call.blocks and (plan.tensors or call.mask is None):
            return self._under_blocks(q, k, v, plan), "mask by blocks"
        bias, attn_mask, padding = self._masks(plan, q)
        if padding is not None:
            # Where the value is 0 a key adds nothing to the output, nor, as dP = dO V^T is 0, to any gradient.
            v = views.call(torch.where, padding.transpose(2, 3), v, 0.0)
        seed: Node | None = None
        if call.dropout_p:
            seed = None if call.seed is None else same_in(call.seed, self.graph)
            if seed is None:
                seed = views.call(torch.randint, 0, 2**62, (1,), dtype=torch.int64, device=views.device).node
        cap = found.cap
        if cap is not None and cap <= 0:
            raise Refused("its soft cap is not positive")
        scale = found.scale if cap is None else found.scale * cap
        words = [f"scale {scale:.4g}", *plan.words]
        words += [f"soft cap {cap:.4g}"] if cap is not None else []
        const_bias, visible_bias = found.const_bias, call.visible_bias and padding is None
        if found.first is not None:
            options = {"scale": scale, "softcap": cap or 0.0, **plan.band}
            bias = self._first_token_bias(found.first, q, k, bias, attn_mask, padding, options)
            const_bias, visible_bias = 0.0, False
            words.append("first token")
        words += ["row bias"] if bias is not None else []
        words += [f"{self.labels.size(heads)} heads over {self.labels.size(key_groups[1])}"] if repeated else []
        words += [f"dropout {call.dropout_p:.4g}"] if call.dropout_p else []
        words += [f"row cap {found.row_cap:.4g}"] if found.row_cap else []
        result = views.call(
            OP,
            q,
            k,
            v,
            bias,
            attn_mask,
            seed,
            # The dimension may vary; then this is the number that the model would have worked out.
            scale=views.call(operator.pow, q.size(-1), -0.5) if call.scale_by_dim else scale,
            const_bias=const_bias,
            visible_bias=visible_bias,
            **plan.band,
            softcap=cap or 0.0,
            dropout_p=call.dropout_p,
            row_cap=found.row_cap,
        )
        return result, ", ".join(words)

    def _under_blocks(self, q: Proxy, k: Proxy, v: Proxy, plan: MaskPlan) -> Proxy:
        """The call under the mask by blocks that it had: only a band, which is two numbers, is better than that."""
        call, found = self.call, self.call.modifiers
        blocks = [same_in(node, self.graph) for node in call.blocks]
        if plan.terms or None in blocks:
            raise Refused("its mask by blocks cannot be had")
        key = self._same_blocks()
        known = self.masks.written.get(key)  # of an attention before it, for layers often share their mask
        if known is not None and known[0] < same_in(self.output.node, self.graph):
            blocks = known
        self.written[key] = blocks
        return self.views.call(
            BLOCKS_OP,
            q,
            k,
            v,
            self._sum_of(plan.row_biases, q),
            *blocks,
            scale=found.scale * (found.cap or 1.0),
            const_bias=found.const_bias,
            visible_bias=call.visible_bias,
            softcap=found.cap or 0.0,
            row_cap=found.row_cap,
        )

    def _same_blocks(self) -> Hashable:
        """Equal for attentions whose masks have the same blocks: each takes its own view of a mask."""
        mask = self.call.mask
        if mask is None or memory_of(mask) in self.masks.edited:
            return object()
        return self.graph, BLOCKS_OP, _part_of(mask)

    def _first_token_bias(
        self,
        first: FirstToken,
        q: Proxy,
        k: Proxy,
        bias: Proxy | None,
        attn_mask: Proxy | None,
        padding: Proxy | None,
        options: Mapping[str, object],
    ) -> Proxy:
        """The whole row bias. ``bias``, and a number in the modifiers, are added to the scores of each row.

        What is added to a row's scores, the first one included, is taken off again by its bias: with t added to both,
        t - logaddexp(s + t, r) is -logaddexp(s, r - t).
        """
        call, added = self.views.call, self.call.modifiers.const_bias
        share = self._sum_of([first.share], q)
        assert share is not None
        rest = self._plus(None if first.rest is None else self._sum_of([first.rest], q), bias)
        if added:
            rest = call(operator.add, call(operator.mul, share, 0.0) if rest is None else rest, added)
        result = call(
            FIRST_TOKEN_BIAS,
            q,
            k,
            share,
            rest,
            attn_mask,
            padding,
            const_bias=first.const_bias,
            visible_bias=self.call.visible_bias,
            **options,
        )
        return result if first.offset is None else call(operator.add, result, self._sum_of([first.offset], q))

    @property
    def _counts(self) -> bool:
        """Whether -ln(visible keys) is added to the rows as it is."""
        return self.call.visible_bias and self.call.modifiers.first is None

    def _masks(self, plan: MaskPlan, q: Proxy) -> tuple[Proxy | None, Proxy | None, Proxy | None]:
        """Row bias, attn_mask and padding ([B, 1, 1, N], True is visible), each None if there is none.

        With padding apart, -ln(visible keys), if it is asked for, is in the row bias.
        """
        bias = self._sum_of(plan.row_biases, q)
        if not plan.padding:
            return bias, self._attn_mask(plan, q), None
        key, here = self._identity(plan), same_in(self.output.node, self.graph)
        assert here is not None
        written = self.masks.written.get(key)  # layers often share it all
        # Autocast may round what is written out in it, and without gradients it has none.
        if written is None or not written[0].node < here or self.views.switched(written[0].node, here):
            attn_mask, padding = self._attn_mask(plan, q), self._all_of(plan.padding, q)
            assert attn_mask is not None and padding is not None
            counted = self._visible_bias(padding, attn_mask, plan) if self._counts else None
            written = self.written[key] = attn_mask, padding, counted
        attn_mask, padding, counted = written
        return self._plus(bias, counted), attn_mask, padding

    def _plus(self, left: Proxy | None, right: Proxy | None) -> Proxy | None:
        """The sum of those that there are."""
        if left is None or right is None:
            return right if left is None else left
        return self.views.call(operator.add, left, right)

    def _attn_mask(self, plan: MaskPlan, q: Proxy) -> Proxy | None:
        """The sum of the terms where all of the masks let see."""
        repeats = self._repeats([*plan.terms, *(operand for operand, _ in plan.tensors)])
        additive, boolean = self._sum_of(plan.terms, q, repeats), self._all_of(plan.tensors, q, repeats)
        if additive is None or boolean is None:
            return boolean if additive is None else additive
        return additive.masked_fill(self.views.call(torch.logical_not, boolean), -math.inf)

    def _sum_of(self, terms: Sequence[Operand], q: Proxy, repeats: bool = False) -> Proxy | None:
        result: Proxy | None = None
        for term in terms:
            tensor = self._broadcast(term, q, repeats)
            if not is_floating(term.node):
                tensor = tensor.to(self.dtype)
            tensor = tensor if term.factor == 1.0 else self.views.call(operator.mul, tensor, term.factor)
            result = self._plus(result, tensor)
        return result

    def _all_of(self, tensors: Sequence[Boolean], q: Proxy, repeats: bool = False) -> Proxy | None:
        """Where all of the masks, each inverted or not, let see."""
        result: Proxy | None = None
        for operand, inverted in tensors:
            tensor = self._broadcast(operand, q, repeats)
            if dtype_of(operand.node) != torch.bool:  # a triangle of a number, and of 0 elsewhere
                tensor = self.views.call(torch.ne, tensor, 0)
            tensor = self.views.call(torch.logical_not, tensor) if inverted else tensor
            result = tensor if result is None else self.views.call(operator.and_, result, tensor)
        return result

    def _visible_bias(self, padding: Proxy, attn_mask: Proxy, plan: MaskPlan) -> Proxy:
        """-ln(visible keys) of each row: [B, H|1, M, 1]. A bias may be low enough to hide keys, too.

        The count is a product with the padding, so [B, H, M, N] is not written out. It is exact in float32; autocast
        would round it, but leaves float64 as it is.
        """
        final, call = torch.promote_types(self.dtype, torch.float32), self.views.call
        exact = torch.float64 if self.views.may_autocast else final
        seen = call(operator.gt, attn_mask.to(final), MASKED_SCORE).to(exact)
        seen = seen.tril(plan.right) if plan.right >= 0 else seen
        seen = seen.triu(-plan.left) if plan.left >= 0 else seen
        count = call(torch.matmul, seen.squeeze(0), padding.squeeze((1, 2)).transpose(0, 1).to(exact))
        return call(operator.neg, count.permute(2, 0, 1).unsqueeze(3).clamp(min=1).to(final).log())

    def _identity(self, plan: MaskPlan) -> Hashable:
        """Equal for attentions whose masks, written out, would be equal."""
        masks = [*((term, False) for term in plan.terms), *plan.tensors, *plan.padding]
        if any(memory_of(operand.node) in self.masks.edited for operand, _ in masks):  # perhaps in between
            return object()
        places = places_of(self.groups.scores)
        spelled = [
            (
                operand.node,
                operand.factor,
                inverted,
                *(tuple(map(places.get, axis)) for axis in self.labels.axes(operand.axes)),
            )
            for operand, inverted in masks
        ]
        sizes = tuple(tuple(self.labels.size([label]) for label in group) for group in self.groups.scores)
        lengths = len(plan.terms), len(plan.tensors)
        return self.graph, *spelled, lengths, sizes, plan.left, plan.right, self.dtype, self._counts

    def _repeats(self, operands: Sequence[Operand]) -> bool:
        """Whether the masks have the inner part of the batch only, as Swin's windows: the op repeats such a mask."""
        outer = self.groups.outer
        parts = {tuple(label for label in self.views.labels_of(operand) if label in outer) for operand in operands}
        return any(parts - {()} == {outer[start:]} for start in range(len(outer)))

    def _broadcast(self, operand: Operand, q: Proxy, repeats: bool = False) -> Proxy:
        """A mask or a bias as [B|1, H|1, M|1, N|1]; ``repeats``: or with the inner part of the batch."""
        if same_in(operand.node, self.graph) is None:
            operand = self.views.base(operand, repeated=True)
        groups = self.groups.scores
        tensor, present = self.views.canonical(operand, groups)
        if self._has_keys_apart(operand):
            tensor = tensor.contiguous()  # once for all attentions that read it, rather than in each call of the op
        for dim in (0, 1):
            if present[dim] and not (dim == 0 and repeats):
                tensor = self.views.filled(tensor, dim, present[dim], groups[dim], q)
        if any(present[dim] and present[dim] != groups[dim] for dim in (2, 3)):
            raise Refused("one of its masks has a part of an axis")
        return tensor

    def _has_keys_apart(self, operand: Operand) -> bool:
        """Whether a row's numbers, one per key, are not neighbours in memory: as T5's, an embedding of the heads."""
        value = tensor_at(operand.node)
        if value is None:
            return False
        layout = list(zip(self.labels.axes(operand.axes), value.shape, value.stride(), strict=True))
        if any(size > 1 and stride == 0 for _, size, stride in layout):  # what is expanded would be written out
            return False
        sets = [set(axis) for axis, size, stride in layout if size > 1 and stride != 1]
        rows = any(set(axis) & set(self.groups.rows) for axis, size, _ in layout if size > 1)
        return rows and any(axis & set(self.groups.keys) for axis in sets)

    def _times(self, tensor: Proxy, operand: Operand, groups: Sequence[Group], divides: bool) -> Proxy:
        """Query or key, times a tensor of the scores that does not vary along the other's length."""
        factor, present = self.views.canonical(operand, groups)
        for dim in (0, 1):
            if present[dim]:
                factor = self.views.filled(factor, dim, present[dim], groups[dim], tensor)
        result = self.views.call(operator.truediv if divides else operator.mul, tensor, factor)
        return result if dtype_of(operand.node) == self.dtype else result.to(self.dtype)

    def _erase(self) -> None:
        """Erases what was replaced: above all dropout, which would go on drawing random numbers."""
        sources = [same_in(node, self.graph) for node in self.output_views] + [
            source_of(node) for node in self.call.path
        ]
        for node in sorted({x for x in sources if x is not None and x.graph is self.graph}, reverse=True):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)
        for taken in (same_in(node, self.graph) for node in self.call.blocks):
            if taken is not None and not taken.users:
                plan = taken.all_input_nodes[0]
                self.graph.erase_node(taken)
                if not plan.users:
                    self.graph.erase_node(plan)


def _part_of(node: Node) -> Hashable:
    """Equal for nodes that are the same view of a part of the same tensor, or of a part of that."""
    source = input_at(node)
    if source is None or not op_of(node).part:
        return node
    return _part_of(source), node.target, *map(str, node.args[1:]), str(node.kwargs)


def _dtype(node: Node) -> torch.dtype:
    """Of a node of the Dynamo graph: inside of autocast regions the shadow's may be another."""
    tensor = tensor_of(node)
    if tensor is None:
        raise Refused("the graph does not say the dtype of one of its operands")
    return tensor.dtype


def _needs_strides(node: Node) -> bool:
    """Whether a tensor, or a transpose or a part of it, is viewed or returned, so that its strides matter."""
    for user in node.users:
        name = str(user.target) if user.op == "call_method" else spelling_of(user)
        if user.op == "output" or name in ("view", "view_as", "as_strided", "_unsafe_view", "stride", "is_contiguous"):
            return True
        row = OPS.get(name, Op(name))
        views = row.moves is not None or row.part or row.splits or name in ("getitem", "unbind")
        if views and _needs_strides(user):
            return True
    return False
