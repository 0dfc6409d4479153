"""Reads a sigmoid attention off a shadow graph: query, key, value, and what is done to the scores between them.

Nothing is changed here. A form that the op does not have raises :class:`Refused`, with the reason.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Hashable, Sequence

import torch
from torch.fx import Node
from torch.fx.node import Argument

from sigswap.masked import MASKED_SCORE
from sigswap.passes.labels import Axes, Label, Labels
from sigswap.passes.masks import Condition, Masks
from sigswap.passes.nodes import argument, dtype_of, input_at, is_edit, is_floating, number_arg, shape_of, tensor_input
from sigswap.passes.normalize import has_symbol, source_of, tensor_of
from sigswap.passes.ops import op_name, op_of, spelling_of
from sigswap.passes.products import contraction
from sigswap.passes.site import AttentionSite, Factor

BLOCKS_OP = torch.ops.sigswap.sigmoid_attention_blocks.default
MASK_BLOCKS = torch.ops.sigswap.mask_blocks.default
_VARYING = "with a number that depends on a size that varies"


class Refused(Exception):
    """Why a site is not lowered."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor of the shadow, and what its axes are. ``factor``: by which it is to be multiplied."""

    node: Node
    axes: Axes
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class LabelledCondition:
    """A condition, with the labels of the mask's axes (those of ``condition.half``), and of its own node's."""

    condition: Condition
    axes: Axes
    own: Axes


@dataclasses.dataclass(frozen=True)
class FirstToken:
    """Arguments of ``sigswap::sigmoid_probs`` where the row bias knows the first visible key's score. ``offset``: what
    is added to that bias; ``const_bias``: the number in it."""

    share: Operand
    rest: Operand | None
    offset: Operand | None
    const_bias: float

    @property
    def operands(self) -> list[Operand]:
        return [operand for operand in (self.share, self.rest, self.offset) if operand is not None]


@dataclasses.dataclass
class Modifiers:
    """What stands between the product of query and key and the probabilities::

        cap * tanh(scale * query_factors * key_factors * q.k) + const_bias + sum(terms), masked

    without a ``cap``: scale * ..., no tanh. ``row_cap``: of the probabilities, as the op has it (0: none). ``left``
    and ``right``: a window, as the op has it; a causal mask is one with nothing to the right (0).
    """

    scale: float = 1.0
    cap: float | None = None
    const_bias: float = 0.0
    query_factors: list[tuple[Operand, bool]] = dataclasses.field(default_factory=list)  # (tensor, whether it divides)
    key_factors: list[tuple[Operand, bool]] = dataclasses.field(default_factory=list)
    terms: list[Operand] = dataclasses.field(default_factory=list)
    masks: list[LabelledCondition] = dataclasses.field(default_factory=list)
    fill: float = -math.inf  # the largest score that a masked one has got
    clamped: bool = False
    left: int = -1
    right: int = -1
    row_cap: float = 0.0
    first: FirstToken | None = None  # then neither const_bias nor the terms hold the anchor's own bias

    @property
    def is_bare(self) -> bool:
        """Whether nothing but scaling came yet."""
        return self.cap is None and not self.terms and not self.masks and self.const_bias == 0


@dataclasses.dataclass
class Call:
    """An attention as the op could compute it. ``path``: the nodes of the shadow that it would replace, in order."""

    labels: Labels
    query: Operand
    key: Operand
    value: Operand
    output: Operand
    rows: tuple[Label, ...]
    keys: tuple[Label, ...]
    head_dim: tuple[Label, ...]
    value_dim: tuple[Label, ...]
    modifiers: Modifiers
    visible_bias: bool
    dropout_p: float
    path: list[Node]
    seed: Node | None = None
    scale_by_dim: bool = False  # the scale is 1 / sqrt(head_dim), which varies
    blocks: tuple[Node, ...] = ()  # the tensors of a mask by blocks, if it is under one
    mask: Node | None = None  # whose blocks they are, if that is known: the modifiers hold it


class Match:
    """One attention whose scores are in the graph, with the paths that ``find`` has followed."""

    def __init__(self, site: AttentionSite, masks: Masks) -> None:
        self.product, self.anchor, self.output, self.masks = site.products[0], site.anchor, site.output, masks
        self.key_axis, self.labels = site.key_axis, Labels()
        self.up = [self.product.node, *self.product.path, site.anchor]  # from the product to the anchor
        self.down = [*site.weights_path, site.output]  # after the anchor to the output

    def call(self) -> Call:
        """Raises Refused."""
        self._check_uses()
        query, key, axes = self._scores()
        found, axes = self._modifiers(axes)
        if self.labels.whole(axes[self.key_axis]) != self.labels.whole(self.keys):
            raise Refused("its sigmoid is not over the keys of the product")
        visible_bias = self._row_bias(found, axes)
        axes, dropout_p = self._probabilities(found, axes, visible_bias)
        value, output, value_dim = self._weighted(axes)
        return Call(
            self.labels,
            query,
            key,
            value,
            output,
            self.rows,
            self.keys,
            self.head_dim,
            value_dim,
            found,
            visible_bias,
            dropout_p,
            [*self.up, *self.down],
        )

    def _check_uses(self) -> None:
        for node, following in itertools.pairwise([*self.up, *self.down]):
            others = [user for user in node.users if user is not following and _is_read(user)]
            if others:
                what = "probabilities" if node in self.down or node is self.anchor else "scores"
                used = "returned" if any(user.op == "output" for user in others) else "used elsewhere"
                raise Refused(f"its {what} are also {used} (output_attentions, say)")
            if is_edit(following) and following.args[0] is not node:
                raise Refused("another tensor is edited in place by its scores")
        if is_edit(self.product.node):
            raise Refused("its scores are added to another tensor in place")

    # The scores.

    def _scores(self) -> tuple[Operand, Operand, Axes]:
        """Query and key, and the axes of their product."""
        product = contraction(self.product.node)
        if product is None or _is_layer_with_bias(self.product.node):
            raise Refused("its scores are a product of a form that is not lowered (a sum, or a layer with a bias)")
        sizes: dict[Hashable, int] = {}
        for node, names in zip(product.factors, product.names, strict=True):
            for name, size in zip(names, shape_of(node) or (), strict=True):
                sizes[name] = max(sizes.get(name, 1), size)
        by_name = {name: () if size == 1 else (self.labels.new(size),) for name, size in sizes.items()}

        def operand(factor: Factor) -> Operand:
            sized = zip(product.names[factor.position], shape_of(factor.node) or (), strict=True)
            return Operand(factor.node, tuple(() if size == 1 else by_name[name] for name, size in sized))

        query, key = product.names[self.product.query.position], product.names[self.product.key.position]
        rows = [name for name in product.out if name in query and name not in key]
        if not rows:
            raise Refused("its product of query and key has no axis of queries")
        if sum(name in key and name not in product.out for name in query) > 1:
            raise Refused("its product of query and key is a sum over several axes")
        self.rows, self.keys = by_name[rows[-1]], by_name[product.out[self.product.key_axis]]
        self.head_dim = by_name[query[self.product.query.dim_axis]]
        return operand(self.product.query), operand(self.product.key), tuple(by_name[name] for name in product.out)

    def _modifiers(self, axes: Axes) -> tuple[Modifiers, Axes]:
        found = Modifiers()
        product = self.product.node
        if op_name(product) == "baddbmm":
            if has_symbol(product):
                raise Refused("its scores are scaled by a number that depends on a size that varies")
            found.scale = number_arg(product, None, "alpha", 1.0)
            beta = number_arg(product, None, "beta", 1.0)
            if beta:
                found.terms.append(broadcast(tensor_input(product), axes, beta))
        for source, node in zip(self.up, self.up[1:], strict=False):
            if node is self.anchor:
                break
            followed = self.labels.through(node, source, axes)
            if followed is None:
                raise Refused(f"its scores pass through {spelling_of(node)}")
            axes = followed
            shape = shape_of(node) or ()
            if any(self.labels.size(axis) != size for axis, size in zip(axes, shape, strict=True)):
                raise Refused("its scores are broadcast over axes that query and key do not have")
            self._modify(found, node, source, axes)
        if found.masks and found.fill > MASKED_SCORE:
            raise Refused("its masked scores are scaled to values that are not masked")
        return found, axes

    def _modify(self, found: Modifiers, node: Node, source: Node, axes: Axes) -> None:
        op, name, args = op_of(node), op_name(node), node.args
        if op.undone or op.copies:
            return
        if op.casts:
            if not is_floating(node):
                raise Refused("its scores are cast to integers")
            return
        if has_symbol(node):
            raise Refused(f"its scores pass through {spelling_of(node)} {_VARYING}")
        if name in ("mul", "div"):
            divides = name == "div"
            other = args[1] if args[0] is source else args[0]
            if (
                (divides and args[0] is not source)
                or len(args) > 2
                or node.kwargs.get("rounding_mode")
                or other is source
            ):
                raise Refused(f"its scores pass through {spelling_of(node)} in a form that is not lowered")
            self._scale(found, other, axes, divides)
        elif name in ("add", "sub", "rsub"):
            self._add(found, node, source, axes)
        elif name == "tanh":
            if not found.is_bare or found.clamped:
                raise Refused("its soft cap comes after masks, a bias or a clamp")
            found.cap = 1.0
        elif name == "masked_fill":
            self._mask(found, tensor_input(node, 1), args[2], axes, inverted=True)
        elif name == "where":
            inverted = args[2] is source
            self._mask(found, tensor_input(node), args[1] if inverted else args[2], axes, inverted)
        elif name in ("clamp", "clamp_min", "clamp_max", "maximum", "minimum"):
            self._clamp(node, source)
            found.clamped = True
        else:
            raise Refused(f"its scores pass through {spelling_of(node)}")

    def _scale(self, found: Modifiers, other: Argument, axes: Axes, divides: bool) -> None:
        if found.clamped:
            raise Refused("its scores are clamped and then scaled")
        number = self.masks.constant(other)
        if number is not None:
            if divides and number == 0:
                raise Refused("its scores are divided by 0")
            factor = 1 / number if divides else number
            if found.masks and factor <= 0:
                raise Refused("its masked scores are multiplied by a number that is not positive")
            found.fill *= factor
            if found.cap is None:
                found.scale *= factor
            else:
                found.cap *= factor
            found.const_bias *= factor
            found.terms = [dataclasses.replace(term, factor=term.factor * factor) for term in found.terms]
            return
        if not isinstance(other, Node):
            raise Refused("its scores are multiplied by a number that is not known")
        if not found.is_bare:
            raise Refused("its scores are multiplied by a tensor after a mask or a bias")
        operand = broadcast(other, axes)
        present = {label for axis in self.labels.axes(operand.axes) for label in axis}
        if not present & set(self.labels.whole(self.keys)):
            found.query_factors.append((operand, divides))
        elif not present & set(self.labels.whole(self.rows)):
            found.key_factors.append((operand, divides))
        else:
            raise Refused("its scores are multiplied by a tensor of their own size")

    def _add(self, found: Modifiers, node: Node, source: Node, axes: Axes) -> None:
        name, (left, right) = op_name(node), node.args[:2]
        alpha = self.masks.constant(argument(node, 2, "alpha", 1))
        if alpha is None or left is right:
            raise Refused(f"its scores pass through {spelling_of(node)} in a form that is not lowered")
        if name == "rsub":  # right - alpha * left
            left, right = right, left
        if left is not source and (name != "add" or alpha != 1):
            raise Refused("its scores are subtracted")
        other, sign = right if left is source else left, alpha if name == "add" else -alpha
        number = self.masks.constant(other)
        if number is not None and number * sign > MASKED_SCORE:
            found.const_bias += sign * number
        elif isinstance(other, Node):
            found.terms.append(broadcast(other, axes, sign))
        else:
            raise Refused("a number that is not known is added to its scores")

    def _mask(self, found: Modifiers, condition: Node, fill: Argument, axes: Axes, inverted: bool) -> None:
        """``inverted``: masked where the condition is True."""
        number = self.masks.constant(fill)
        if number is None or not number <= MASKED_SCORE:
            raise Refused("its scores are replaced by other values than a masked score's")
        found.fill = max(found.fill, number)
        self._conditions(found, condition, axes, inverted)

    def _conditions(self, found: Modifiers, condition: Node, axes: Axes, inverted: bool) -> None:
        if dtype_of(condition) != torch.bool:
            raise Refused("its mask is not boolean")
        whole = broadcast(condition, axes).axes
        found.masks += [labelled(each, whole) for each in self.masks.visible(condition, not inverted)]

    def _clamp(self, node: Node, source: Node) -> None:
        """Bounds that a sigmoid does not feel: masked scores stay masked, and from 5000 on it is 1."""
        name = op_name(node)
        bounds: list[tuple[Argument, Argument]]
        if name in ("maximum", "minimum"):
            bound = node.args[1] if node.args[0] is source else node.args[0]
            bounds = [(bound, None) if name == "maximum" else (None, bound)]
        elif name == "clamp":
            bounds = [(argument(node, 1, "min"), argument(node, 2, "max"))]
        else:
            bounds = [(node.args[1], None) if name == "clamp_min" else (None, node.args[1])]
        for low, high in bounds:
            lowest, highest = self.masks.constant(low), self.masks.constant(high)
            if (low is not None and (lowest is None or lowest > MASKED_SCORE)) or (
                high is not None and (highest is None or highest < -MASKED_SCORE)
            ):
                raise Refused("its scores are clamped")

    # The probabilities.

    def _row_bias(self, found: Modifiers, axes: Axes) -> bool:
        """Adds the anchor's own bias and row cap to ``found``; whether it counts the visible keys."""
        if op_name(self.anchor) == "sigmoid":
            return False
        if has_symbol(self.anchor):
            raise Refused("its bias depends on a size that varies")
        arguments = (argument(self.anchor, i, name) for i, name in ((1, "bias"), (6, "share"), (7, "rest")))
        bias, share, rest = (broadcast(x, axes) if isinstance(x, Node) else None for x in arguments)
        const_bias = number_arg(self.anchor, 4, "const_bias", 0.0)
        if share is not None:
            found.first = FirstToken(share, rest, bias, const_bias)
        else:
            found.terms += [] if bias is None else [bias]
            found.const_bias += const_bias
        found.row_cap = number_arg(self.anchor, 5, "row_cap", 0.0)
        return bool(argument(self.anchor, 3, "visible_bias", True))

    def _probabilities(self, found: Modifiers, axes: Axes, visible_bias: bool) -> tuple[Axes, float]:
        """The axes of the probabilities where they meet the value, and their dropout."""
        dropout_p = 0.0
        for source, node in zip([self.anchor, *self.down], self.down[:-1], strict=False):
            followed = self.labels.through(node, source, axes)
            if followed is None:
                raise Refused(f"its probabilities pass through {spelling_of(node)}")
            axes, op, args = followed, op_of(node), node.args
            if any(self.labels.size(axis) != size for axis, size in zip(axes, shape_of(node) or (), strict=True)):
                raise Refused("its probabilities are broadcast over axes that query and key do not have")
            if op.undone or op.copies or (op.casts and is_floating(node)):
                continue
            if has_symbol(node):
                raise Refused(f"its probabilities pass through {spelling_of(node)} {_VARYING}")
            if op.name == "dropout":
                if args[2] and (p := number_arg(node, 1, "p", 0.5)) > 0:
                    if dropout_p:
                        raise Refused("its probabilities pass through two dropouts")
                    dropout_p = p
                continue
            # What is hidden now was counted by a visible bias, and is in the sum of a row with a cap.
            counted = visible_bias or found.row_cap > 0 or found.first is not None
            hides = op.name in ("masked_fill", "where") and not counted and dropout_p == 0
            fill = (
                self.masks.constant(args[2] if op.name == "masked_fill" or args[1] is source else args[1])
                if hides
                else None
            )
            if fill == 0:  # after the sigmoid: a mask, too
                filled = op.name == "masked_fill"
                self._conditions(found, tensor_input(node, int(filled)), axes, filled or args[2] is source)
                continue
            raise Refused(f"its probabilities pass through {spelling_of(node)}")
        return axes, dropout_p

    def _weighted(self, axes: Axes) -> tuple[Operand, Operand, tuple[Label, ...]]:
        """Value, output, and the label of the value's head_dim."""
        product = contraction(self.output)
        if product is None or op_name(self.output) == "baddbmm" or _is_layer_with_bias(self.output):
            raise Refused("its product with the value is of a form that is not lowered")
        if product.factors[0] is product.factors[1]:
            raise Refused("its probabilities weight themselves")
        at = product.factors.index(self.down[-2] if len(self.down) > 1 else self.anchor)
        names, value, value_names = product.names[at], product.factors[1 - at], product.names[1 - at]
        named = dict(zip(names, axes, strict=True))
        shape = dict(zip(value_names, shape_of(value) or (), strict=True))
        own = [name for name in value_names if name not in named]
        summed = [name for name in value_names if name in named and name not in product.out]
        gone = [name for name in names if name not in product.out and name not in summed]
        keys = self.labels.whole(self.keys)
        if (
            len(own) != 1
            or own[0] not in product.out
            or gone
            or [self.labels.whole(named[name]) for name in summed] != [keys]
        ):
            raise Refused("its product with the value does not sum over the keys alone")
        value_dim = () if shape[own[0]] == 1 else (self.labels.new(shape[own[0]]),)
        named[own[0]] = value_dim
        for name, size in shape.items():
            if size not in (1, self.labels.size(named[name])):
                raise Refused("its value has an axis that its scores do not have")
        value_axes = tuple(() if shape[name] == 1 else named[name] for name in value_names)
        output_axes = tuple(named[name] for name in product.out)
        return Operand(value, value_axes), Operand(self.output, output_axes), value_dim


def match_call(node: Node, masks: Masks) -> Call:
    """A call of the op that is in the graph, or of the one under a mask by blocks. Raises Refused."""
    query, key, value = (tensor_input(node, position) for position in range(3))
    shapes = [shape for tensor in (query, key, value) if (shape := shape_of(tensor)) is not None]
    if node.kwargs.get("bottom_right") or len(shapes) < 3:
        raise Refused("its band is aligned with the last key")

    def number(name: str, default: float | None = None) -> float:
        return number_arg(node, None, name, default)

    source = source_of(node)
    if source is None or has_symbol(node):
        raise Refused("a number among its arguments depends on a size that varies")
    # scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale)
    given = tensor_of(source.all_input_nodes[0])
    by_dim = source.target is not node.target and given is not None and not isinstance(given.shape[-1], int)
    if by_dim and (argument(source, 6, "scale") is not None or number("softcap", 0.0)):
        by_dim = False
    (batch, heads, q_len, head_dim), (_, kv_heads, kv_len, _), (*_, value_dim) = shapes
    labels = Labels()

    def new(size: int) -> tuple[Label, ...]:
        return () if size == 1 else (labels.new(size),)

    outer, rows, keys, dim, own = (new(size) for size in (batch, q_len, kv_len, head_dim, value_dim))
    shared = new(kv_heads)
    whole = (*shared, *new(heads // kv_heads))
    found = Modifiers()
    found.cap = number("softcap", 0.0) or None
    found.scale = number("scale") / (found.cap or 1.0)
    found.const_bias, found.row_cap = number("const_bias", 0.0), number("row_cap", 0.0)
    found.left = int(number("window_left", -1))
    found.right = 0 if node.kwargs.get("is_causal") else int(number("window_right", -1))
    axes = (outer, whole, rows, keys)
    blocks = tuple(tensor_input(node, position) for position in range(4, 9)) if node.target is BLOCKS_OP else ()
    bias = input_at(node, 3)
    attn_mask, seed = (_mask_of(blocks), None) if blocks else (input_at(node, 4), input_at(node, 5))
    if bias is not None:
        found.terms.append(broadcast(bias, axes))
    if attn_mask is not None and dtype_of(attn_mask) == torch.bool:
        operand = broadcast(attn_mask, axes)
        found.masks += [labelled(each, operand.axes) for each in masks.visible(attn_mask)]
    elif attn_mask is not None:
        found.terms.append(broadcast(attn_mask, axes))
    return Call(
        labels,
        Operand(query, (outer, whole, rows, dim)),
        Operand(key, (outer, shared, keys, dim)),
        Operand(value, (outer, shared, keys, own)),
        Operand(node, (outer, whole, rows, own)),
        rows,
        keys,
        dim,
        own,
        found,
        bool(node.kwargs.get("visible_bias", True)),
        number("dropout_p", 0.0),
        [node],
        seed,
        by_dim,
        blocks,
        attn_mask if blocks else None,
    )


def _mask_of(blocks: Sequence[Node]) -> Node | None:
    """The tensor whose blocks these are, if the graph finds them."""
    made = {input_at(node) for node in blocks}
    plan = made.pop() if len(made) == 1 else None
    return input_at(plan) if plan is not None and plan.target is MASK_BLOCKS else None


# Small questions about nodes.


def _is_read(node: Node, steps: int = 4) -> bool:
    """Whether the numbers of ``node`` may be read, and not its form alone, as by zeros in place of a row's maximum."""
    if op_of(node).fills:
        return False
    return steps == 0 or not node.users or any(_is_read(user, steps - 1) for user in node.users)


def _is_layer_with_bias(node: Node) -> bool:
    return op_name(node) == "linear" and input_at(node, 2) is not None


def broadcast(node: Node, axes: Axes, factor: float = 1.0) -> Operand:
    """``node``, broadcast against a tensor with the axes given."""
    shape = shape_of(node)
    if shape is None or len(shape) > len(axes):
        raise Refused("its scores are combined with a tensor of unknown shape")
    own = axes[len(axes) - len(shape) :]
    return Operand(node, tuple(() if size == 1 else axis for axis, size in zip(own, shape, strict=True)), factor)


def labelled(condition: Condition, axes: Axes) -> LabelledCondition:
    """``axes``: of the mask."""
    shape = shape_of(condition.node) or ()
    own = tuple(
        () if axis is None or size == 1 else axes[axis] for axis, size in zip(condition.axes, shape, strict=True)
    )
    return LabelledCondition(condition, axes, own)
