"""Writes a matched attention into its Dynamo graph as one call of ``sigswap::sigmoid_attention``."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.fx

from sigswap.masked import MASKED_SCORE
from sigswap.passes.labels import Axes, Label, Labels
from sigswap.passes.masks import Masks
from sigswap.passes.match import Call, FirstToken, Modifiers, Operand, Refused, Visible, broadcast, visible_of
from sigswap.passes.nodes import edited_by, memory_of
from sigswap.passes.normalize import has_symbol, rename, same_in, source_of, tensor_of
from sigswap.passes.ops import op_name, op_of, spelling_of
from sigswap.passes.site import Lowered

OP = torch.ops.sigswap.sigmoid_attention.default
FIRST_TOKEN_BIAS = torch.ops.sigswap.first_token_bias.default
# Calls that change what a call between them does.
_GRADIENTS = frozenset({"_set_grad_enabled", "_enter_inference_mode"})
_REGIONS = _GRADIENTS | {"_enter_autocast", "_exit_autocast"}
_WHERE = "nn_module_stack", "stack_trace", "source_fn_stack"


class Emission:
    """Writes one call of the op, in the place of a path of nodes."""

    def __init__(self, call: Call, masks: Masks) -> None:
        """Raises Refused: the attention's nodes cannot be had, or not be had where the op would be called."""
        self.asked, self.labels, self.masks = call, call.labels, masks
        source = source_of(call.path[-1])
        if source is None:
            raise Refused("its output is not in the graph")
        self.graph = source.graph
        # What is left out above the operands must have run under the same autocast and grad mode as the op will.
        self.regions = {node.target.__name__ for node in self.graph.nodes if _is_region(node)}  # type: ignore[union-attr]
        self.static: dict[Label, bool] = {}  # whether a label has the same size in every call
        self.written: dict[Hashable, tuple[torch.fx.Proxy, torch.fx.Proxy, torch.fx.Proxy | None]] = {}
        self.output, self.trail = self._output(call.output)
        self.query = self._base(call.query, upcast=True)
        self.key, self.value = self._key_and_value()
        for operand in (self.query, self.key, self.value, self.output):
            self._learn(operand)
        # Every label is whole from here on: what follows splits none.
        whole = self.labels.whole
        self.rows, self.keys, self.head_dim = whole(call.rows), whole(call.keys), whole(call.head_dim)
        self.value_dim = whole(call.value_dim)
        batch = [label for label in self._set_of(self.output) if label not in (*self.rows, *self.value_dim)]
        self.outer, self.heads = self._heads(batch)
        self.scores = self.outer, self.heads, self.rows, self.keys
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
                final = self._arrange(result, (self.outer, self.heads, self.rows, self.value_dim), self.output.axes)
            except Refused:
                while target.prev is not before:
                    self.graph.erase_node(target.prev)
                raise
            if dtype != self.dtype:
                final = final.to(dtype)
            # A product is contiguous, and so may be viewed; the op's result is [B, M, H, D] in memory.
            if len(self.asked.path) > 1 and _needs_strides(target):
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

    # Which nodes to read.

    def _base(self, operand: Operand, *, repeated: bool = False, upcast: bool = False) -> Operand:
        """The operand without the copies and transposes above it, as a tensor that the Dynamo graph has.

        ``repeated``: without what repeats it along an axis, too. ``upcast``: without casts from half precision, too.
        """
        best = operand if same_in(operand.node, self.graph) is not None else None
        current, copied = operand, False
        while not self.regions:
            node, op = current.node, op_of(current.node)
            source = node.args[0] if node.args and isinstance(node.args[0], torch.fx.Node) else None
            repeats, casts = op.broadcasts or op.name == "repeat_interleave", _is_upcast(node)
            if source is None or not (op.undone or op.copies or casts):
                break
            if (repeats and not repeated) or (casts and not upcast):
                break
            # A copy that is written to, perhaps through a view, is not what it was copied from.
            if memory_of(node) in self.masks.edited and memory_of(node) != memory_of(source):
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

    def _key_and_value(self) -> tuple[Operand, Operand]:
        """Both without what repeats their heads, if both are repeated alike."""
        call = self.asked
        plain = self._base(call.key, upcast=True), self._base(call.value)
        key, value = self._base(call.key, repeated=True, upcast=True), self._base(call.value, repeated=True)
        own = {*self.labels.whole(call.rows), *self.labels.whole(call.head_dim)}
        query = set(self._set_of(call.query))
        missing = [query - own - set(self._set_of(operand)) for operand in (key, value)]
        return (key, value) if missing[0] == missing[1] else plain

    def _set_of(self, operand: Operand) -> list[Label]:
        return [label for axis in self.labels.axes(operand.axes) for label in axis]

    def _heads(self, batch: Sequence[Label]) -> tuple[tuple[Label, ...], tuple[Label, ...]]:
        """The labels of the op's batch and heads. The queries that share a key are the inner part of the heads."""
        shared = [label for label in batch if label not in self._set_of(self.key)]
        if shared != [label for label in batch if label not in self._set_of(self.value)]:
            raise Refused("its keys and values are shared by different heads")
        if not shared or len(shared) == len(batch):
            return tuple(batch[:-1]), tuple(batch[-1:])
        end = max(batch.index(label) for label in shared) + 1
        start = end - 1
        while start > 0 and batch[start - 1] in shared:
            start -= 1
        start = max(start - 1, 0)
        return (*batch[:start], *batch[end:]), tuple(batch[start:end])

    def _output(self, output: Operand) -> tuple[Operand, list[torch.fx.Node]]:
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

    # Checks.

    def _check_region(self) -> None:
        """The op is called where the output was: what its inputs met on the way must hold there."""
        first, node = source_of(self.asked.path[0]), same_in(self.output.node, self.graph)
        if first is None or first.graph is not self.graph:
            raise Refused("its scores and its output are in different graphs (a checkpoint between them)")
        while node is not None and node is not first and node.op != "root":
            if _is_region(node):
                raise Refused("autocast or gradients are switched on or off between its scores and its output")
            node = node.prev

    def _check_edits(self) -> None:
        """No tensor that the op will read may be written to after it was first read."""
        found = self.asked.modifiers
        operands = [self.query, self.key, self.value, *found.terms]
        operands += [operand for operand, _ in found.query_factors + found.key_factors]
        operands += [] if self.asked.first is None else self.asked.first.operands
        nodes = [operand.node for operand in operands] + [visible.term.node for visible in found.masks]
        order = {node: number for number, node in enumerate(self.output.node.graph.nodes)}
        read: dict[int | None, int] = {}
        for node in nodes:
            read[memory_of(node)] = min(order[node], read.get(memory_of(node), order[node]))
        for node, number in order.items():
            before = number < order[self.output.node] and node not in self.asked.path
            if before and any(number > read.get(memory_of(edited), number) for edited in edited_by(node)):
                raise Refused("one of its operands is edited in place before its output")

    def _learn(self, operand: Operand) -> None:
        node = same_in(operand.node, self.graph)
        value = tensor_of(node) if node is not None else None
        if value is None:
            return
        for axis, size in zip(self.labels.axes(operand.axes), value.shape, strict=True):
            if isinstance(size, int):
                self.static.update(dict.fromkeys(axis, True))
            elif len(axis) == 1:
                self.static.setdefault(axis[0], False)

    # The call. Tensors are torch.fx proxies: what is done to them is written into the graph.

    def _write(self) -> tuple[torch.fx.Proxy, str]:
        """The call, and its operands in words."""
        call, found = self.asked, self.asked.modifiers
        k, shared = self._canonical(self.key, (self.outer, self.heads, self.keys, self.head_dim))
        v, value_shared = self._canonical(self.value, (self.outer, self.heads, self.keys, self.value_dim))
        q, own = self._canonical(self.query, (self.outer, self.heads, self.rows, self.head_dim))
        if own[1] != self.heads or (own[0] != self.outer and shared[0] != self.outer):
            raise Refused("its queries lack a batch axis of its keys")
        q = self._filled(q, 0, own[0], self.outer, k)
        k, v = self._filled(k, 0, shared[0], self.outer, q), self._filled(v, 0, value_shared[0], self.outer, q)
        repeated = shared[1] != self.heads
        if shared[1] != self.heads[: len(shared[1])] or value_shared[1] != shared[1]:
            raise Refused("its keys are shared by heads that are not neighbours")
        if own[3] != self.head_dim or shared[2:] != [self.keys, self.head_dim]:
            raise Refused("its query or key is broadcast along head_dim or its length")
        if value_shared[2:] != [self.keys, self.value_dim]:
            raise Refused("its value is broadcast along head_dim or its length")
        inputs = [same_in(operand.node, self.graph) for operand in (self.query, self.key, self.value)]
        dtypes = [_dtype(node) for node in inputs if node is not None]
        self.dtype = functools.reduce(torch.promote_types, dtypes)
        q, k, v = (x if dtype == self.dtype else x.to(self.dtype) for x, dtype in zip((q, k, v), dtypes, strict=True))
        for operand, divides in found.query_factors:
            q = self._times(q, operand, (self.outer, self.heads, self.rows, ()), divides)
        for operand, divides in found.key_factors:
            if repeated:
                raise Refused("its scores are multiplied by a tensor over keys that several heads share")
            k = self._times(k, operand, (self.outer, self.heads, self.keys, ()), divides)
        bias, attn_mask, band, padding, mask_words = self._masks(found, q)
        if padding is not None:
            # Where the value is 0 a key adds nothing to the output, nor, as dP = dO V^T is 0, to any gradient.
            v = self._call(torch.where, padding.transpose(2, 3), v, 0.0)
        seed = None
        if call.dropout_p:
            seed = None if call.seed is None else same_in(call.seed, self.graph)
            if seed is None:
                device = self.query.node.meta["val"].device
                seed = self._call(torch.randint, 0, 2**62, (1,), dtype=torch.int64, device=device)
        cap = found.cap
        if cap is not None and cap <= 0:
            raise Refused("its soft cap is not positive")
        scale = found.scale if cap is None else found.scale * cap
        words = [f"scale {scale:.4g}", *mask_words]
        words += [f"soft cap {cap:.4g}"] if cap is not None else []
        const_bias, visible_bias = found.const_bias, call.visible_bias and padding is None
        if call.first is not None:
            bias = self._first_token_bias(call.first, q, k, bias, attn_mask, padding, scale, band, cap or 0.0)
            const_bias, visible_bias = 0.0, False
            words.append("first token")
        words += ["row bias"] if bias is not None else []
        words += [f"{self.labels.size(self.heads)} heads over {self.labels.size(shared[1])}"] if repeated else []
        words += [f"dropout {call.dropout_p:.4g}"] if call.dropout_p else []
        result = self._call(
            OP,
            q,
            k,
            v,
            bias,
            attn_mask,
            seed,
            # The dimension may vary; then this is the number that the model would have worked out.
            scale=self._call(operator.pow, q.size(-1), -0.5) if call.scale_by_dim else scale,
            const_bias=const_bias,
            visible_bias=visible_bias,
            **band,
            softcap=cap or 0.0,
            dropout_p=call.dropout_p,
        )
        return result, ", ".join(words)

    def _first_token_bias(
        self,
        first: FirstToken,
        q: torch.fx.Proxy,
        k: torch.fx.Proxy,
        bias: torch.fx.Proxy | None,
        attn_mask: torch.fx.Proxy | None,
        padding: torch.fx.Proxy | None,
        scale: float,
        band: Mapping[str, Any],
        cap: float,
    ) -> torch.fx.Proxy:
        """The whole row bias. ``bias``, and a number in the modifiers, are added to the scores of each row.

        What is added to a row's scores, the first one included, is taken off again by its bias: with t added to both,
        t - logaddexp(s + t, r) is -logaddexp(s, r - t).
        """
        share = self._sum_of([first.share], q)
        rest = None if first.rest is None else self._sum_of([first.rest], q)
        added = self.asked.modifiers.const_bias
        if added:
            rest = share * 0.0 + added if rest is None else rest + added
        if bias is not None:
            rest = bias if rest is None else rest + bias
        result = self._call(
            FIRST_TOKEN_BIAS,
            q,
            k,
            share,
            rest,
            attn_mask,
            padding,
            scale=scale,
            const_bias=first.const_bias,
            visible_bias=self.asked.visible_bias,
            **band,
            softcap=cap,
        )
        return result if first.offset is None else result + self._sum_of([first.offset], q)

    @property
    def _counts(self) -> bool:
        """Whether -ln(visible keys) is added to the rows as it is."""
        return self.asked.visible_bias and self.asked.first is None

    def _masks(
        self, found: Modifiers, q: torch.fx.Proxy
    ) -> tuple[torch.fx.Proxy | None, torch.fx.Proxy | None, dict[str, Any], torch.fx.Proxy | None, list[str]]:
        """Row bias, attn_mask, the options of the band, padding, and words for them.

        Padding ([B, 1, 1, N], True is visible) is what is kept out of a bias that all sequences share, which it would
        make [B, H, M, N]. Then -ln(visible keys), if it is asked for, is in the row bias.
        """
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
        tensors: list[tuple[Operand, bool]] = []  # boolean; whether it is to be inverted
        for each in visible:
            side, distance = _band(each, self.labels, self.rows, self.keys)
            if side == "right":
                right = distance if right < 0 else min(right, distance)
            elif side == "left":
                left = distance if left < 0 else min(left, distance)
            elif side == "tensor":
                tensors.append((Operand(each.term.node, each.own), each.term.inverted))
        band = {"is_causal": right == 0, "window_left": left, "window_right": right if right > 0 else -1}
        words = ["causal"] if right == 0 else []
        words += [f"window ({left}, {right})"] if left >= 0 or right > 0 else []
        biases = [term for term in terms if self.keys and not set(self._set_of(term)) & set(self.keys)]
        terms = [term for term in terms if term not in biases]
        bias = self._sum_of(biases, q)
        apart = self._padding(terms, tensors)
        tensors = [each for each in tensors if each not in apart]
        if not apart:
            attn_mask = self._attn_mask(terms, tensors, q)
            padding = None
        else:
            key = self._identity(terms, tensors, apart, left, right)
            written = self.masks.written.get(key)  # layers often share it all
            if written is None or not written[0].node < same_in(self.output.node, self.graph):
                attn_mask, padding = self._attn_mask(terms, tensors, q), self._all_of(apart, q)
                assert attn_mask is not None and padding is not None
                counted = self._visible_bias(padding, attn_mask, left, right) if self._counts else None
                written = self.written[key] = attn_mask, padding, counted
            attn_mask, padding, counted = written
            bias = counted if bias is None else bias if counted is None else bias + counted
        if terms:
            words += ["additive mask"] + ["with a boolean one"] * bool(tensors)
        elif tensors:
            words.append("boolean mask")
        return bias, attn_mask, band, padding, words + ["padding"] * bool(apart)

    def _attn_mask(
        self, terms: Sequence[Operand], tensors: Sequence[tuple[Operand, bool]], q: torch.fx.Proxy
    ) -> torch.fx.Proxy | None:
        """The sum of the terms where all of the masks let see."""
        repeats = self._repeats([*terms, *(operand for operand, _ in tensors)])
        additive, boolean = self._sum_of(terms, q, repeats), self._all_of(tensors, q, repeats)
        if additive is None or boolean is None:
            return boolean if additive is None else additive
        return additive.masked_fill(self._call(torch.logical_not, boolean), -math.inf)

    def _sum_of(self, terms: Sequence[Operand], q: torch.fx.Proxy, repeats: bool = False) -> torch.fx.Proxy | None:
        result = None
        for term in terms:
            tensor = self._broadcast(term, q, repeats)
            if not term.node.meta["val"].dtype.is_floating_point:
                tensor = tensor.to(self.dtype)
            tensor = tensor if term.factor == 1.0 else tensor * term.factor
            result = tensor if result is None else result + tensor
        return result

    def _all_of(
        self, tensors: Sequence[tuple[Operand, bool]], q: torch.fx.Proxy, repeats: bool = False
    ) -> torch.fx.Proxy | None:
        """Where all of the masks, each inverted or not, let see."""
        result = None
        for operand, inverted in tensors:
            tensor = self._broadcast(operand, q, repeats)
            if operand.node.meta["val"].dtype != torch.bool:  # a triangle of a number, and of 0 elsewhere
                tensor = self._call(torch.ne, tensor, 0)
            tensor = self._call(torch.logical_not, tensor) if inverted else tensor
            result = tensor if result is None else result & tensor
        return result

    def _padding(self, terms: Sequence[Operand], tensors: Sequence[tuple[Operand, bool]]) -> list[tuple[Operand, bool]]:
        """The masks that differ by sequence, if they are padding beside a bias that does not."""
        if self._may_autocast() and self._device == "mps":  # counting needs float64
            return []
        differing = [each for each in tensors if set(self._set_of(each[0])) & set(self.outer)]
        padding = self._are_shared(terms) and all(self._is_padding(operand) for operand, _ in differing)
        return differing if padding else []

    def _are_shared(self, terms: Sequence[Operand]) -> bool:
        """Whether the terms are a bias per position that all sequences share."""
        sets = [set(self._set_of(term)) for term in terms]
        return any(each & set(self.rows) for each in sets) and not any(each & set(self.outer) for each in sets)

    def _is_padding(self, mask: Operand) -> bool:
        """Whether a mask hides keys of a sequence from all of its rows and heads."""
        labels = set(self._set_of(mask))
        return bool(labels & set(self.outer)) and bool(labels & set(self.keys)) and labels <= {*self.outer, *self.keys}

    def _visible_bias(
        self, padding: torch.fx.Proxy, attn_mask: torch.fx.Proxy, left: int, right: int
    ) -> torch.fx.Proxy:
        """-ln(visible keys) of each row: [B, H|1, M, 1]. A bias may be low enough to hide keys, too.

        The count is a product with the padding, so [B, H, M, N] is not written out. It is exact in float32; autocast
        would round it, but leaves float64 as it is.
        """
        final = torch.promote_types(self.dtype, torch.float32)
        exact = torch.float64 if self._may_autocast() else final
        seen = (attn_mask.to(final) > MASKED_SCORE).to(exact)
        seen = seen.tril(right) if right >= 0 else seen
        seen = seen.triu(-left) if left >= 0 else seen
        count = self._call(torch.matmul, seen.squeeze(0), padding.squeeze((1, 2)).transpose(0, 1).to(exact))
        return -count.permute(2, 0, 1).unsqueeze(3).clamp(min=1).to(final).log()

    def _identity(
        self,
        terms: Sequence[Operand],
        tensors: Sequence[tuple[Operand, bool]],
        apart: Sequence[tuple[Operand, bool]],
        *others: int,
    ) -> Hashable:
        """Equal for attentions whose masks, written out, would be equal."""
        masks = [*((term, False) for term in terms), *tensors, *apart]
        # What is edited in between, or was made without gradients, is not the same.
        if self.regions or any(memory_of(operand.node) in self.masks.edited for operand, _ in masks):
            return object()
        place = {label: (at, i) for at, group in enumerate(self.scores) for i, label in enumerate(group)}
        spelled = [
            (
                operand.node,
                operand.factor,
                inverted,
                tuple(tuple(map(place.get, axis)) for axis in self.labels.axes(operand.axes)),
            )
            for operand, inverted in masks
        ]
        sizes = tuple(tuple(self.labels.size([label]) for label in group) for group in self.scores)
        lengths = len(terms), len(tensors)
        return self.graph, *spelled, lengths, sizes, others, self.dtype, self._counts

    def _may_autocast(self) -> bool:
        """Whether autocast may be on where the op is called."""
        enabled = torch.amp.is_autocast_available(self._device) and torch.is_autocast_enabled(self._device)
        return bool(self.regions - _GRADIENTS) or enabled

    @property
    def _device(self) -> str:
        return self.query.node.meta["val"].device.type

    def _bias_and_mask(self, term: Operand) -> tuple[Operand, list[Visible]] | None:
        """A term that is a bias where a mask holds and hides the rest, as T5's, taken apart: if that makes it smaller,
        for the mask has a band, or is of padding while all sequences share the bias."""
        if same_in(term.node, self.graph) is not None:
            term = self._base(term)  # without copies of it
        # A number that varies proves nothing; where gradients are switched off on the way, the bias may have none.
        if has_symbol(term.node) or self.regions & _GRADIENTS:
            return None
        for content, visible in self._readings(term):
            # What was edited is not what it was; a bias inside of a function cannot be had.
            if {memory_of(term.node), memory_of(content)} & self.masks.edited or same_in(content, self.graph) is None:
                continue
            if term.node.meta["val"].dtype != content.meta["val"].dtype:
                continue
            bias = broadcast(content, term.axes, term.factor)
            kinds = [_band(each, self.labels, self.rows, self.keys)[0] for each in visible]
            masks = [
                Operand(each.term.node, each.own) for each, kind in zip(visible, kinds, strict=True) if kind == "tensor"
            ]
            if any(
                same_in(mask.node, self.graph) is None or memory_of(mask.node) in self.masks.edited for mask in masks
            ):
                continue
            smaller = len(masks) < len(visible) or not visible
            if smaller or (self._are_shared([bias]) and all(self._is_padding(mask) for mask in masks)):
                return bias, visible
        return None

    def _readings(self, term: Operand) -> list[tuple[torch.fx.Node, list[Visible]]]:
        """What the term may be: a bias, and what must hold where it is added to the scores; the rest is masked."""
        node, name = term.node, op_name(term.node)
        if name == "add" and len(node.args) == 2 and node.kwargs.get("alpha", 1) == 1 and term.factor > 0:
            left, right = node.args
            found = []
            for content, mask in ((left, right), (right, left)):
                if isinstance(content, torch.fx.Node) and isinstance(mask, torch.fx.Node):
                    terms = self.masks.visible_by_sum(mask, term.factor)
                    whole = broadcast(mask, term.axes).axes
                    found += [] if terms is None else [(content, [visible_of(each, whole) for each in terms])]
            return found
        if name == "where" and len(node.args) > 2:
            condition, content, fill, holds = *node.args[:3], True
        elif name == "masked_fill":
            content, condition, fill, holds = *node.args[:3], False
        else:
            return []
        number = self.masks.constant(fill)
        if not isinstance(content, torch.fx.Node) or number is None or not number * term.factor <= MASKED_SCORE:
            return []
        whole = broadcast(condition, term.axes).axes
        return [(content, [visible_of(each, whole) for each in self.masks.visible(condition, holds)])]

    def _repeats(self, operands: Sequence[Operand]) -> bool:
        """Whether the masks have the inner part of the batch only, as Swin's windows: the op repeats such a mask."""
        parts = {tuple(label for label in self._set_of(operand) if label in self.outer) for operand in operands} - {()}
        return len(parts) == 1 and parts == {self.outer[-len(next(iter(parts))) :]}

    def _broadcast(self, operand: Operand, q: torch.fx.Proxy, repeats: bool = False) -> torch.fx.Proxy:
        """A mask or a bias as [B|1, H|1, M|1, N|1]; ``repeats``: or with the inner part of the batch."""
        if same_in(operand.node, self.graph) is None:
            operand = self._base(operand, repeated=True)
        tensor, present = self._canonical(operand, self.scores)
        if self._has_keys_apart(operand):
            tensor = tensor.contiguous()  # once for all attentions that read it, rather than in each call of the op
        for dim in (0, 1):
            if present[dim] and not (dim == 0 and repeats):
                tensor = self._filled(tensor, dim, present[dim], self.scores[dim], q)
        if any(present[dim] and present[dim] != self.scores[dim] for dim in (2, 3)):
            raise Refused("one of its masks has a part of an axis")
        return tensor

    def _has_keys_apart(self, operand: Operand) -> bool:
        """Whether a row's numbers, one per key, are not neighbours in memory: as T5's, an embedding of the heads."""
        value = operand.node.meta["val"]
        layout = list(zip(self.labels.axes(operand.axes), value.shape, value.stride(), strict=True))
        if any(size > 1 and stride == 0 for _, size, stride in layout):  # what is expanded would be written out
            return False
        sets = [set(axis) for axis, size, stride in layout if size > 1 and stride != 1]
        rows = any(set(axis) & set(self.rows) for axis, size, _ in layout if size > 1)
        return rows and any(axis & set(self.keys) for axis in sets)

    def _times(
        self, tensor: torch.fx.Proxy, operand: Operand, groups: tuple[tuple[Label, ...], ...], divides: bool
    ) -> torch.fx.Proxy:
        """Query or key, times a tensor of the scores that does not vary along the other's length."""
        factor, present = self._canonical(operand, groups)
        for dim in (0, 1):
            if present[dim]:
                factor = self._filled(factor, dim, present[dim], groups[dim], tensor)
        result = tensor / factor if divides else tensor * factor
        return result if operand.node.meta["val"].dtype == self.dtype else result.to(self.dtype)

    def _canonical(
        self, operand: Operand, groups: tuple[tuple[Label, ...], ...]
    ) -> tuple[torch.fx.Proxy, list[tuple[Label, ...]]]:
        """The operand with one axis per group, and the labels in each of them (broadcast: none)."""
        node = same_in(operand.node, self.graph)
        if node is None:
            raise Refused("its operands are inside of a function that the graph holds as a whole")
        self._learn(operand)
        tensor = torch.fx.Proxy(node, torch.fx.proxy.GraphAppendingTracer(self.graph))
        units = list(self.labels.axes(operand.axes))
        tensor, units = self._exploded(tensor, units, groups)
        kept = [i for i, unit in enumerate(units) if unit]
        if len(kept) < len(units):
            tensor = tensor.squeeze(tuple(i for i in range(len(units)) if i not in kept))
            units = [units[i] for i in kept]
        order, counts, present = [], [], []
        for group in groups:
            members = sorted(
                (i for i, unit in enumerate(units) if unit[0] in group), key=lambda i: group.index(units[i][0])
            )
            order += members
            counts.append(len(members))
            present.append(tuple(label for i in members for label in units[i]))
        if sorted(order) != list(range(len(units))):
            raise Refused("one of its operands has an axis that is none of batch, heads, rows and keys")
        return self._joined(tensor, order, counts), present

    def _arrange(self, tensor: torch.fx.Proxy, groups: tuple[tuple[Label, ...], ...], axes: Axes) -> torch.fx.Proxy:
        """``tensor``, with one axis per group, with the axes given."""
        targets = self.labels.axes(axes)
        units = list(groups)
        tensor, units = self._exploded(tensor, units, targets)
        kept = [i for i, unit in enumerate(units) if unit]
        if len(kept) < len(units):
            tensor = tensor.squeeze(tuple(i for i in range(len(units)) if i not in kept))
            units = [units[i] for i in kept]
        order, counts = [], []
        for target in targets:
            members = sorted(
                (i for i, unit in enumerate(units) if unit[0] in target), key=lambda i: target.index(units[i][0])
            )
            order += members
            counts.append(len(members))
        return self._joined(tensor, order, counts)

    def _exploded(
        self, tensor: torch.fx.Proxy, units: list[tuple[Label, ...]], groups: Sequence[tuple[Label, ...]]
    ) -> tuple[torch.fx.Proxy, list[tuple[Label, ...]]]:
        """Splits each axis that is not a part of one group."""
        result: list[tuple[Label, ...]] = []
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

    def _joined(self, tensor: torch.fx.Proxy, order: list[int], counts: list[int]) -> torch.fx.Proxy:
        """Permutes by ``order``, and makes one axis of each run of as many axes as ``counts`` says."""
        if order != list(range(len(order))):
            tensor = tensor.permute(*order)
        for axis, count in enumerate(counts):
            if count == 0:
                tensor = tensor.unsqueeze(axis)
            elif count > 1:
                tensor = tensor.flatten(axis, axis + count - 1)
        return tensor

    def _filled(
        self,
        tensor: torch.fx.Proxy,
        dim: int,
        present: tuple[Label, ...],
        group: tuple[Label, ...],
        q: torch.fx.Proxy,
    ) -> torch.fx.Proxy:
        """Expands ``dim``, of which the labels ``present`` are there, to the whole group."""
        if present == group:
            return tensor
        sizes = [-1, -1, -1, -1]
        if not present:
            sizes[dim] = q.size(dim)
            return tensor.expand(*sizes)
        inner = present == group[: len(present)]  # what is missing is inside
        if not inner and present != group[len(group) - len(present) :]:
            raise Refused("one of its masks lacks a part of the batch")
        missing = self._call(operator.floordiv, q.size(dim), tensor.size(dim))
        at = dim + inner
        sizes.insert(at, missing)
        return tensor.unsqueeze(at).expand(*sizes).flatten(dim, dim + 1)

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.fx.Proxy:
        def unwrap(value: Any) -> Any:
            return value.node if isinstance(value, torch.fx.Proxy) else value

        node = self.graph.call_function(
            function, tuple(unwrap(arg) for arg in args), {name: unwrap(arg) for name, arg in kwargs.items()}
        )
        return torch.fx.Proxy(node, torch.fx.proxy.GraphAppendingTracer(self.graph))

    def _erase(self) -> None:
        """Erases what was replaced: above all dropout, which would go on drawing random numbers."""
        sources = [same_in(node, self.graph) for node in self.trail] + [source_of(node) for node in self.asked.path]
        for node in sorted({x for x in sources if x is not None and x.graph is self.graph}, reverse=True):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)


# Small questions about nodes.


def _band(visible: Visible, labels: Labels, rows: tuple[Label, ...], keys: tuple[Label, ...]) -> tuple[str, int]:
    """What a term lets a row see: ("right", r): keys up to row + r; ("left", l): keys from row - l on; ("all", 0); or
    ("tensor", 0): what its tensor says."""
    half = visible.term.half
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


def _is_upcast(node: torch.fx.Node) -> bool:
    """Whether ``node`` casts from half precision to a wider type: a product of such numbers is exact in both."""
    if not op_of(node).casts:
        return False
    source, result = node.args[0].meta["val"].dtype, node.meta["val"].dtype
    return source in (torch.float16, torch.bfloat16) and result in (torch.float32, torch.float64)


def _moves(node: torch.fx.Node, source: torch.fx.Node) -> bool:
    """Whether a reshape has to copy its tensor."""
    if not op_of(node).reshapes:
        return False
    try:
        source.meta["val"].view(node.meta["val"].shape)
    except (RuntimeError, ValueError):
        return True
    return False


def _is_region(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") in _REGIONS


def _dtype(node: torch.fx.Node) -> torch.dtype:
    """Of a node of the Dynamo graph: inside of autocast regions the shadow's may be another."""
    tensor = tensor_of(node)
    if tensor is None:
        raise Refused("the graph does not say the dtype of one of its operands")
    return tensor.dtype


def _needs_strides(node: torch.fx.Node) -> bool:
    """Whether a tensor, or a transpose of it, is viewed or returned, so that its strides matter."""
    for user in node.users:
        name = str(user.target) if user.op == "call_method" else spelling_of(user)
        if user.op == "output" or name in ("view", "view_as", "as_strided", "_unsafe_view", "stride", "is_contiguous"):
            return True
        if name in ("transpose", "permute", "unsqueeze", "squeeze", "getitem") and _needs_strides(user):
            return True
    return False
