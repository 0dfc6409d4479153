"""Lowers each sigmoid attention of a Dynamo graph to one call of ``sigswap::sigmoid_attention``, in place.

What is found: ``sigswap::sigmoid_probs`` (what a softmax became), and ``torch.sigmoid``, between a product of query and key
and a product with a value. Scale, soft cap, additive terms, masks, row bias and dropout on the way become operands of the
op; copies of keys and values that repeat their heads are left out (the op groups heads itself). A call of the op that is
in the graph already gets its masks and heads looked at, too. Masks that the graph proves to be bands become ``is_causal``
and a window (:mod:`sigswap.passes.masks`).

As in :mod:`sigswap.passes.swap` it is a shadow of the graph that is read, and the Dynamo graph that is changed. What cannot
be lowered stays as it is, with the reason.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx

from sigswap.passes.axes import axis_map, chain_inputs, op_name, rank_of, shape_of
from sigswap.passes.find import data_dependent, score_site
from sigswap.passes.labels import COPIES, UNDONE, Axes, Label, Labels, contraction
from sigswap.passes.masks import MASKED_SCORE, Masks, Term
from sigswap.passes.normalize import normalize, same_in, source_of
from sigswap.passes.site import LeftAlone

_OP = torch.ops.sigswap.sigmoid_attention.default
_RESHAPES = frozenset("view reshape _unsafe_view flatten unflatten view_as reshape_as".split())
_BROADCASTS = frozenset({"expand", "expand_as", "broadcast_to"})
_CASTS = frozenset("to _to_copy type_as float half bfloat16 double".split())
# Calls that change what a call between them does.
_REGIONS = frozenset({"_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode"})


@dataclasses.dataclass(frozen=True)
class Lowered:
    """One site that is now a call of the op: ``node``, in the Dynamo graph, and its operands in words."""

    node: torch.fx.Node
    operands: str


@dataclasses.dataclass(frozen=True)
class LowerResult:
    """What the pass did. ``left_alone``: the sigmoid attentions that stay unfused, with their reasons."""

    lowered: tuple[Lowered, ...]
    left_alone: tuple[LeftAlone, ...]


def lower(
    graph_module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    handwritten: bool = True,
    stand_ins: Sequence[Callable[..., Any]] = (),
) -> LowerResult:
    """Lowers every sigmoid attention in ``graph_module`` (a Dynamo graph) and its checkpoint regions, in place.

    ``handwritten``: those around a plain ``torch.sigmoid``, too. ``stand_ins``: functions in the graph that contain an
    attention (a graph without one, and without sigswap's ops, is not looked at). The graph is linted and recompiled.
    """
    if not _may_have_site(graph_module, handwritten, frozenset(stand_ins)):
        return LowerResult((), ())
    shadow = normalize(graph_module, example_inputs).graph
    shadow.eliminate_dead_code()  # probabilities that nobody reads are no second use
    data, masks = data_dependent(shadow), Masks()
    lowered: list[Lowered] = []
    left: list[LeftAlone] = []
    for node in shadow.nodes:
        if node.target is _OP:
            lowered.append(_lower_again(node, masks))
            continue
        if node.target is torch.ops.sigswap.sigmoid_probs.default:
            axes = [_argument(node, 2, "dim", -1) % rank_of(node)]
        elif handwritten and op_name(node) == "sigmoid" and rank_of(node) >= 2:
            axes = [rank_of(node) - 1, rank_of(node) - 2]
        else:
            continue
        own = node.target is torch.ops.sigswap.sigmoid_probs.default
        sites = [score_site(node, axis, data) for axis in axes]
        site = next((site for site in sites if not isinstance(site, LeftAlone)), None)
        if site is None:
            found = next((alone for alone in sites if isinstance(alone, LeftAlone) and (alone.attention or own)), None)
            if found is not None:
                left.append(dataclasses.replace(found, attention=True))
            continue
        try:
            lowered.append(_Site(node, site.key_axis, site.products[0].node, site.output, masks).lower())
        except _Refused as refused:
            left.append(LeftAlone(node, str(refused), True))
    for module in graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            module.graph.lint()
            module.recompile()
    return LowerResult(tuple(lowered), tuple(left))


def _may_have_site(
    graph_module: torch.fx.GraphModule, handwritten: bool, stand_ins: frozenset[Callable[..., Any]]
) -> bool:
    for module in graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if getattr(node.target, "namespace", None) == "sigswap" or node.target in stand_ins:
                return True
            if handwritten and (op_name(node) == "sigmoid" or node.target == "sigmoid"):
                return True
    return False


class _Refused(Exception):
    """Why a site is not lowered."""


@dataclasses.dataclass(frozen=True)
class _Operand:
    """A tensor of the shadow, and what its axes are. ``factor``: by which it is to be multiplied."""

    node: torch.fx.Node
    axes: Axes
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class _Visible:
    """A term of a mask, and what the axes of the mask are (of ``term.half``), and those of the term's own node."""

    term: Term
    axes: Axes
    own: Axes


@dataclasses.dataclass
class _Modifiers:
    """What stands between the product of query and key and the probabilities; ``scale`` inside of the soft cap."""

    scale: float = 1.0
    cap: float | None = None
    const_bias: float = 0.0
    query_factors: list[tuple[_Operand, bool]] = dataclasses.field(default_factory=list)  # (tensor, it divides)
    key_factors: list[tuple[_Operand, bool]] = dataclasses.field(default_factory=list)
    terms: list[_Operand] = dataclasses.field(default_factory=list)  # are added
    masks: list[_Visible] = dataclasses.field(default_factory=list)

    left: int = -1  # the window, as the op has it; a causal mask is a window to the right of 0
    right: int = -1

    @property
    def is_bare(self) -> bool:
        """Whether nothing but scaling came yet."""
        return self.cap is None and not self.terms and not self.masks and self.const_bias == 0


@dataclasses.dataclass
class _Call:
    """The op's arguments, before they are written into the graph."""

    query: _Operand
    key: _Operand
    value: _Operand
    output: _Operand
    modifiers: _Modifiers
    visible_bias: bool
    dropout_p: float
    value_dim: tuple[Label, ...]
    seed: torch.fx.Node | None = None


class _Site:
    """One attention whose scores are in the graph."""

    def __init__(
        self, anchor: torch.fx.Node, key_axis: int, product: torch.fx.Node, output: torch.fx.Node, masks: Masks
    ) -> None:
        self.anchor, self.key_axis, self.product, self.output, self.masks = anchor, key_axis, product, output, masks
        self.labels = Labels()
        self.up = _path_up(anchor, product)
        self.down = _path_down(anchor, output)

    def lower(self) -> Lowered:
        self._check_uses()
        query, key, axes = self._scores()
        modifiers, axes = self._modifiers(axes)
        if self.labels.whole(axes[self.key_axis]) != self.labels.whole(self.keys):
            raise _Refused("its sigmoid is not over the keys of the product")
        visible_bias = self._row_bias(modifiers, axes)
        axes, dropout_p = self._probabilities(modifiers, axes, visible_bias)
        value, output = self._weighted(axes)
        call = _Call(query, key, value, output, modifiers, visible_bias, dropout_p, self.value_dim)
        # In the path's nodes is everything that the op replaces.
        path = [*self.up, *self.down]
        return _Emission(self.labels, self.rows, self.keys, self.contracted, self.masks, path).emit(call)

    def _check_uses(self) -> None:
        path = [*self.up, *self.down]
        for node, following in zip(path, path[1:], strict=False):
            others = [user for user in node.users if user is not following]
            if others:
                what = "probabilities" if node in self.down or node is self.anchor else "scores"
                used = "returned" if any(user.op == "output" for user in others) else "used elsewhere"
                raise _Refused(f"its {what} are also {used} (output_attentions, say)")

    # The scores.

    def _scores(self) -> tuple[_Operand, _Operand, Axes]:
        """Query and key, and the axes of their product."""
        product = contraction(self.product)
        if product is None:
            raise _Refused("its scores are a product of a form that is not lowered (a sum, or a layer with a bias)")
        left, right, names_left, names_right, names_out = product
        named = {**_sizes(self.product, names_out)}
        for node, names in ((left, names_left), (right, names_right)):
            for name, size in _sizes(node, names).items():
                named[name] = max(named.get(name, 1), size)
        by_name = {name: () if size == 1 else (self.labels.new(size),) for name, size in named.items()}
        self.by_name = by_name
        # Which factor is the query is known by the axis of the scores at the anchor, which is followed from the keys.
        candidates = []
        for query, key in (((left, names_left), (right, names_right)), ((right, names_right), (left, names_left))):
            columns = [name for name in names_out if name in key[1] and name not in query[1]]
            rows = [name for name in names_out if name in query[1] and name not in key[1]]
            candidates.append((query, key, rows, columns))
        contracted = [name for name in names_left if name in names_right and name not in names_out]
        if len(contracted) != 1:
            raise _Refused("its product of query and key contracts several axes")
        key_name = names_out[_axis_above(self.up, self.key_axis)]
        query, key, rows, columns = next(found for found in candidates if key_name in found[3])
        if len(columns) != 1 or not rows:
            raise _Refused("its keys have several axes")
        self.rows, self.keys, self.contracted = by_name[rows[-1]], by_name[key_name], by_name[contracted[0]]
        self.batch = [name for name in names_out if name not in (rows[-1], key_name)]
        operands = [
            _Operand(node, tuple(() if size == 1 else by_name[name] for name, size in zip(names, shape, strict=True)))
            for node, names in (query, key)
            for shape in [shape_of(node) or ()]
        ]
        return operands[0], operands[1], tuple(by_name[name] for name in names_out)

    def _modifiers(self, axes: Axes) -> tuple[_Modifiers, Axes]:
        found = _Modifiers()
        if op_name(self.product) == "baddbmm":
            found.scale = float(self.product.kwargs.get("alpha", 1))
            beta = float(self.product.kwargs.get("beta", 1))
            if beta:
                found.terms.append(_broadcast(self.product.args[0], axes, beta))
        for source, node in zip(self.up, self.up[1:], strict=False):
            if node is self.anchor:
                break
            followed = self.labels.through(node, source, axes)
            if followed is None:
                raise _Refused(f"its scores pass through {op_name(node)}")
            axes = followed
            shape = shape_of(node) or ()
            if any(self.labels.size(axis) != size for axis, size in zip(axes, shape, strict=True)):
                raise _Refused("its scores are broadcast over axes that query and key do not have")
            self._modify(found, node, source, axes)
        return found, axes

    def _modify(self, found: _Modifiers, node: torch.fx.Node, source: torch.fx.Node, axes: Axes) -> None:
        name, args = op_name(node), node.args
        if name in UNDONE or name in _RESHAPES or name in COPIES:
            return
        if name in _CASTS:
            if not node.meta["val"].dtype.is_floating_point:
                raise _Refused("its scores are cast to integers")
            return
        if name in ("mul", "multiply", "div", "divide", "true_divide"):
            divides = name.startswith(("div", "true"))
            other = args[1] if args[0] is source else args[0]
            if (
                (divides and args[0] is not source)
                or len(args) > 2
                or node.kwargs.get("rounding_mode")
                or other is source
            ):
                raise _Refused(f"its scores pass through {name} in a form that is not lowered")
            self._scale(found, other, axes, divides)
        elif name in ("add", "sub", "subtract", "rsub"):
            self._add(found, node, source, axes)
        elif name == "tanh":
            if not found.is_bare:
                raise _Refused("its soft cap comes after masks or a bias")
            found.cap = 1.0
        elif name == "masked_fill":
            self._mask(found, args[1], args[2], axes, inverted=True)
        elif name == "where":
            inverted = args[2] is source
            self._mask(found, args[0], args[1] if inverted else args[2], axes, inverted)
        elif name in ("clamp", "clamp_min", "clamp_max", "maximum", "minimum"):
            self._clamp(node, source)
        else:
            raise _Refused(f"its scores pass through {name}")

    def _scale(self, found: _Modifiers, other: Any, axes: Axes, divides: bool) -> None:
        number = self.masks.constant(other)
        if number is not None:
            if divides and number == 0:
                raise _Refused("its scores are divided by 0")
            factor = 1 / number if divides else number
            if found.masks and factor <= 0:
                raise _Refused("its masked scores are multiplied by a number that is not positive")
            if found.cap is None:
                found.scale *= factor
            else:
                found.cap *= factor
            found.const_bias *= factor
            found.terms = [dataclasses.replace(term, factor=term.factor * factor) for term in found.terms]
            return
        if not isinstance(other, torch.fx.Node):
            raise _Refused("its scores are multiplied by a number that is not known")
        if not found.is_bare:
            raise _Refused("its scores are multiplied by a tensor after a mask or a bias")
        operand = _broadcast(other, axes)
        present = {label for axis in self.labels.axes(operand.axes) for label in axis}
        if not present & set(self.labels.whole(self.keys)):
            found.query_factors.append((operand, divides))
        elif not present & set(self.labels.whole(self.rows)):
            found.key_factors.append((operand, divides))
        else:
            raise _Refused("its scores are multiplied by a tensor of their own size")

    def _add(self, found: _Modifiers, node: torch.fx.Node, source: torch.fx.Node, axes: Axes) -> None:
        name, (left, right) = op_name(node), node.args[:2]
        alpha = self.masks.constant(node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1))
        if alpha is None or left is right:
            raise _Refused(f"its scores pass through {name} in a form that is not lowered")
        first = right is source if name == "rsub" else left is source
        other = (left if name == "rsub" else right) if first else (right if name == "rsub" else left)
        if not first and (name != "add" or alpha != 1):
            raise _Refused("its scores are subtracted")
        sign = alpha if name == "add" else -alpha
        if name == "rsub" and first:
            raise _Refused("its scores are subtracted")
        number = self.masks.constant(other)
        if number is not None and number * sign > MASKED_SCORE:
            found.const_bias += sign * number
        elif isinstance(other, torch.fx.Node):
            found.terms.append(_broadcast(other, axes, sign))
        else:
            raise _Refused("a number that is not known is added to its scores")

    def _mask(self, found: _Modifiers, condition: Any, fill: Any, axes: Axes, inverted: bool) -> None:
        """``inverted``: masked where the condition is True."""
        number = self.masks.constant(fill)
        if number is None or number > MASKED_SCORE:
            raise _Refused("its scores are replaced by other values than a masked score's")
        self._conditions(found, condition, axes, inverted)

    def _conditions(self, found: _Modifiers, condition: torch.fx.Node, axes: Axes, inverted: bool) -> None:
        if condition.meta["val"].dtype != torch.bool:
            raise _Refused("its mask is not boolean")
        whole = _broadcast(condition, axes).axes
        found.masks += [_visible(term, whole) for term in self.masks.visible(condition, not inverted)]

    def _clamp(self, node: torch.fx.Node, source: torch.fx.Node) -> None:
        """Bounds that a sigmoid does not feel: masked scores stay masked, and from 5000 on it is 1."""
        name = op_name(node)
        if name in ("maximum", "minimum"):
            bound = node.args[1] if node.args[0] is source else node.args[0]
            bounds = [(bound, None) if name == "maximum" else (None, bound)]
        elif name == "clamp":
            low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
            bounds = [(low, node.args[2] if len(node.args) > 2 else node.kwargs.get("max"))]
        else:
            bounds = [(node.args[1], None) if name == "clamp_min" else (None, node.args[1])]
        for low, high in bounds:
            lowest, highest = self.masks.constant(low), self.masks.constant(high)
            if (low is not None and (lowest is None or lowest > MASKED_SCORE)) or (
                high is not None and (highest is None or highest < -MASKED_SCORE)
            ):
                raise _Refused("its scores are clamped")

    # The probabilities.

    def _row_bias(self, found: _Modifiers, axes: Axes) -> bool:
        """Adds the anchor's own bias to ``found``; whether it counts the visible keys."""
        if op_name(self.anchor) == "sigmoid":
            return False
        bias = _argument(self.anchor, 1, "bias", None)
        if bias is not None:
            found.terms.append(_broadcast(bias, axes))
        found.const_bias += _argument(self.anchor, 4, "const_bias", 0.0)
        return _argument(self.anchor, 3, "visible_bias", True)

    def _probabilities(self, found: _Modifiers, axes: Axes, visible_bias: bool) -> tuple[Axes, float]:
        """The axes of the probabilities where they meet the value, and their dropout."""
        dropout_p = 0.0
        for source, node in zip([self.anchor, *self.down], self.down[:-1], strict=False):
            followed = self.labels.through(node, source, axes)
            if followed is None:
                raise _Refused(f"its probabilities pass through {op_name(node)}")
            axes, name, args = followed, op_name(node), node.args
            if name in UNDONE or name in _RESHAPES or name in COPIES:
                continue
            if name in _CASTS and node.meta["val"].dtype.is_floating_point:
                continue
            if name == "dropout":
                if args[2] and args[1] > 0:
                    if dropout_p:
                        raise _Refused("its probabilities pass through two dropouts")
                    dropout_p = float(args[1])
                continue
            hides = name in ("masked_fill", "where") and not visible_bias and dropout_p == 0
            fill = (
                self.masks.constant(args[2] if name == "masked_fill" or args[1] is source else args[1])
                if hides
                else None
            )
            if fill == 0:  # after the sigmoid: a mask, too, if the bias does not count it
                condition, inverted = (args[1], True) if name == "masked_fill" else (args[0], args[2] is source)
                self._conditions(found, condition, axes, inverted)
                continue
            raise _Refused(f"its probabilities pass through {name}")
        return axes, dropout_p

    def _weighted(self, axes: Axes) -> tuple[_Operand, _Operand]:
        """Value and output."""
        product = contraction(self.output)
        if product is None or op_name(self.output) == "baddbmm":
            raise _Refused("its product with the value is of a form that is not lowered")
        left, right, names_left, names_right, names_out = product
        weights = self.down[-2] if len(self.down) > 1 else self.anchor
        if left is right:
            raise _Refused("its probabilities weight themselves")
        names, value, value_names = (
            (names_left, right, names_right) if left is weights else (names_right, left, names_left)
        )
        named = dict(zip(names, axes, strict=True))
        shape = dict(zip(value_names, shape_of(value) or (), strict=True))
        own = [name for name in value_names if name not in named]
        summed = [name for name in value_names if name in named and name not in names_out]
        gone = [name for name in names if name not in names_out and name not in summed]
        keys = self.labels.whole(self.keys)
        if (
            len(own) != 1
            or own[0] not in names_out
            or gone
            or [self.labels.whole(named[name]) for name in summed] != [keys]
        ):
            raise _Refused("its product with the value does not sum over the keys alone")
        value_dim = () if shape[own[0]] == 1 else (self.labels.new(shape[own[0]]),)
        named[own[0]] = self.value_dim = value_dim
        for name, size in shape.items():
            if size not in (1, self.labels.size(named[name])):
                raise _Refused("its value has an axis that its scores do not have")
        value_axes = tuple(() if shape[name] == 1 else named[name] for name in value_names)
        return _Operand(value, value_axes), _Operand(self.output, tuple(named[name] for name in names_out))


class _Emission:
    """Writes a call of the op into the Dynamo graph, in the place of a path of nodes."""

    def __init__(
        self,
        labels: Labels,
        rows: Sequence[Label],
        keys: Sequence[Label],
        head_dim: Sequence[Label],
        masks: Masks,
        path: Sequence[torch.fx.Node],
    ) -> None:
        self.labels, self.masks, self.path = labels, masks, path
        self.rows, self.keys, self.head_dim = rows, keys, head_dim
        source = source_of(path[-1])
        if source is None:
            raise _Refused("its output is not in the graph")
        self.graph = source.graph
        self.static: dict[Label, bool] = {}

    def emit(self, call: _Call) -> Lowered:
        whole = self.labels.whole
        output, last = self._output(call.output)
        query = self._base(call.query)
        key, value = self._key_and_value(call)
        for operand in (query, key, value, output):
            self._learn(operand)
        rows, keys, head_dim = whole(self.rows), whole(self.keys), whole(self.head_dim)
        value_dim = whole(call.value_dim)
        query_labels = [label for axis in self.labels.axes(query.axes) for label in axis]
        order = [label for axis in self.labels.axes(output.axes) for label in axis]
        batch = [label for label in order if label not in rows and label not in value_dim]
        if set(batch) - set(query_labels):
            raise _Refused("its queries lack a batch axis of its keys")
        outer, heads = self._heads(batch, key, value)
        self.groups = {"batch": outer, "heads": heads, "rows": rows, "keys": keys}
        self._check_region(last)
        operands = [query, key, value, *call.modifiers.terms]
        operands += [each for each, _ in call.modifiers.query_factors + call.modifiers.key_factors]
        nodes = [operand.node for operand in operands] + [visible.term.node for visible in call.modifiers.masks]
        self._check_edits(nodes)

        target = same_in(last, self.graph)
        assert target is not None
        before = target.prev
        with self.graph.inserting_before(target):
            try:
                result, words = self._write(call, query, key, value, head_dim, value_dim)
                final = self._arrange(result, (outer, heads, rows, value_dim), output.axes)
            except _Refused:
                while target.prev is not before:
                    self.graph.erase_node(target.prev)
                raise
            if last.meta["val"].dtype != query.node.meta["val"].dtype:
                final = final.to(last.meta["val"].dtype)
        final.node.meta.update({key: value for key, value in target.meta.items() if key != "eager_input_vals"})
        target.replace_all_uses_with(final.node)
        self._erase(last)
        return Lowered(result.node, words)

    # Which nodes to read.

    def _base(self, operand: _Operand, broadcast: bool = False) -> _Operand:
        """The operand without the copies and transposes above it, as a tensor that the Dynamo graph has."""
        best = operand if same_in(operand.node, self.graph) is not None else None
        current, pending = operand, False
        copied = False
        while True:
            node = current.node
            name = op_name(node)
            source = node.args[0] if node.args and isinstance(node.args[0], torch.fx.Node) else None
            if source is None or not (name in UNDONE or name in _RESHAPES or name in COPIES or _is_upcast(node)):
                break
            if (name in _BROADCASTS or name == "repeat_interleave") and not broadcast:
                break
            axes = current.axes if name in _CASTS else self.labels.above(node, source, current.axes)
            if axes is None:
                break
            copied |= name in COPIES or _is_upcast(node) or _moves(node, source) or name in _BROADCASTS
            current = _Operand(source, axes, operand.factor)
            pending = name in _RESHAPES and not copied
            if same_in(source, self.graph) is not None and not pending and (copied or name in UNDONE or best is None):
                if copied or len([axis for axis in axes if len(axis) > 1]) == 0:
                    best = current
        if best is None:
            raise _Refused("its operands are inside of a function that the graph holds as a whole")
        return best

    def _key_and_value(self, call: _Call) -> tuple[_Operand, _Operand]:
        """Both without the copies that repeat their heads, if both are repeated alike."""
        before = self._base(call.key), self._base(call.value)
        key, value = self._base(call.key, True), self._base(call.value, True)
        missing = [self._missing(operand, call) for operand in (key, value)]
        return (key, value) if missing[0] == missing[1] else before

    def _missing(self, operand: _Operand, call: _Call) -> set[Label]:
        own = {label for axis in self.labels.axes(operand.axes) for label in axis}
        return (
            {label for axis in self.labels.axes(call.query.axes) for label in axis}
            - own
            - {
                *self.labels.whole(self.rows),
                *self.labels.whole(self.head_dim),
            }
        )

    def _heads(
        self, batch: Sequence[Label], key: _Operand, value: _Operand
    ) -> tuple[tuple[Label, ...], tuple[Label, ...]]:
        """The labels of the op's batch and heads. The groups of queries that share keys must be the heads' inner part."""
        in_key, in_value = ({label for axis in self.labels.axes(x.axes) for label in axis} for x in (key, value))
        shared = [label for label in batch if label not in in_key]
        if shared != [label for label in batch if label not in in_value]:
            raise _Refused("its keys and values are shared by different heads")
        if not shared or len(shared) == len(batch):
            return tuple(batch[:-1]), tuple(batch[-1:])
        end = max(batch.index(label) for label in shared) + 1
        start = end - 1
        while start > 0 and batch[start - 1] in shared:
            start -= 1
        start = max(start - 1, 0)
        # The heads come last.
        return (*batch[:start], *batch[end:]), tuple(batch[start:end])

    def _output(self, output: _Operand) -> tuple[_Operand, torch.fx.Node]:
        """The output, or a view of it that nothing but it is used for and that needs no copy."""
        seen = [output]
        while len(seen[-1].node.users) == 1:
            user = next(iter(seen[-1].node.users))
            if op_name(user) not in _RESHAPES | UNDONE or op_name(user) in _BROADCASTS:
                break
            axes = self.labels.through(user, seen[-1].node, seen[-1].axes)
            if axes is None:
                break
            seen.append(_Operand(user, axes))
        known = [operand for operand in seen if same_in(operand.node, self.graph) is not None]
        if not known:
            raise _Refused("its output is inside of a function that the graph holds as a whole")
        plain = [operand for operand in known if all(len(axis) <= 1 for axis in self.labels.axes(operand.axes))]
        best = (plain or known)[0]
        self.trail = [operand.node for operand in seen[1 : seen.index(best) + 1]]
        return best, best.node

    # Checks.

    def _check_region(self, last: torch.fx.Node) -> None:
        """The op is called where the output was: what its inputs met on the way must hold there."""
        first, end = source_of(self.path[0]), same_in(last, self.graph)
        if first is None or first.graph is not self.graph:
            raise _Refused("its scores and its output are in different graphs (a checkpoint between them)")
        node = end
        while node is not None and node is not first and node.op != "root":
            if op_name(node) in _REGIONS or getattr(node.target, "__name__", "") in _REGIONS:
                raise _Refused("autocast or gradients are switched on or off between its scores and its output")
            node = node.prev

    def _check_edits(self, operands: Sequence[torch.fx.Node]) -> None:
        """No tensor that the op will read may be written to after it was first read."""
        roots = {_root(node): node for node in operands}
        inside = set(self.path)
        order = {node: i for i, node in enumerate(self.path[0].graph.nodes)}
        end = order[self.path[-1]]
        for node, position in order.items():
            if position > end:
                break
            edited = node.args[0] if node.args and node not in inside and _is_edit(node) else None
            if isinstance(edited, torch.fx.Node) and _root(edited) in roots:
                if position > order[roots[_root(edited)]]:
                    raise _Refused("one of its operands is edited in place before its output")

    def _learn(self, operand: _Operand) -> None:
        """Which labels have a size that is the same in every call."""
        node = same_in(operand.node, self.graph)
        value = node.meta.get("example_value", node.meta.get("val")) if node is not None else None
        if not isinstance(value, torch.Tensor):
            return
        for axis, size in zip(self.labels.axes(operand.axes), value.shape, strict=True):
            if isinstance(size, int):
                self.static.update(dict.fromkeys(axis, True))
            elif len(axis) == 1:
                self.static.setdefault(axis[0], False)

    # The call. Tensors are torch.fx proxies: what is done to them is written into the graph.

    def _write(
        self,
        call: _Call,
        query: _Operand,
        key: _Operand,
        value: _Operand,
        head_dim: tuple[Label, ...],
        value_dim: tuple[Label, ...],
    ) -> tuple[torch.fx.Proxy, str]:
        outer, heads, rows, keys = (self.groups[name] for name in ("batch", "heads", "rows", "keys"))
        found = call.modifiers
        q, _ = self._canonical(query, (outer, heads, rows, head_dim))
        k, present = self._canonical(key, (outer, heads, keys, head_dim))
        k = self._filled(k, 0, present[0], outer, q)
        v, present_value = self._canonical(value, (outer, heads, keys, value_dim))
        v = self._filled(v, 0, present_value[0], outer, q)
        repeated = present[1] != heads
        if present[1] != heads[: len(present[1])] or present_value[1] != present[1]:
            raise _Refused("its keys are shared by heads that are not neighbours")
        for operand, divides in found.query_factors:
            q = self._times(q, operand, (outer, heads, rows, ()), divides, query)
        for operand, divides in found.key_factors:
            if repeated:
                raise _Refused("its scores are multiplied by a tensor over keys that several heads share")
            k = self._times(k, operand, (outer, heads, keys, ()), divides, key)
        dtype = query.node.meta["val"].dtype
        if key.node.meta["val"].dtype != dtype:
            k = k.to(dtype)
        if value.node.meta["val"].dtype != dtype:
            v = v.to(dtype)
        bias, attn_mask, band, mask_words = self._masks(found, q)
        seed = None
        if call.dropout_p:
            seed = None if call.seed is None else same_in(call.seed, self.graph)
            if seed is None:
                device = query.node.meta["val"].device
                seed = self._call(torch.randint, 0, 2**62, (1,), dtype=torch.int64, device=device)
        cap = found.cap
        if cap is not None and cap <= 0:
            raise _Refused("its soft cap is not positive")
        scale = found.scale if cap is None else found.scale * cap
        options = {
            "scale": scale,
            "const_bias": found.const_bias,
            "visible_bias": call.visible_bias,
            **band,
            "softcap": cap or 0.0,
            "dropout_p": call.dropout_p,
        }
        words = [f"scale {scale:.4g}", *mask_words]
        words += [f"soft cap {cap:.4g}"] if cap is not None else []
        words += ["row bias"] if bias is not None else []
        words += [f"{self.labels.size(heads)} heads over {self.labels.size(present[1])}"] if repeated else []
        words += [f"dropout {call.dropout_p:.4g}"] if call.dropout_p else []
        return self._call(_OP, q, k, v, bias, attn_mask, seed, **options), ", ".join(words)

    def _masks(
        self, found: _Modifiers, q: torch.fx.Proxy
    ) -> tuple[torch.fx.Proxy | None, torch.fx.Proxy | None, dict[str, Any], list[str]]:
        """Row bias, attn_mask, the options of the band, and words for them."""
        outer, heads, rows, keys = (self.groups[name] for name in ("batch", "heads", "rows", "keys"))
        groups = outer, heads, rows, keys
        masks, additive, bias = list(found.masks), None, None
        words: list[str] = []
        for term in found.terms:
            terms = self.masks.visible_by_sum(term.node) if term.factor > 0 else None
            if terms is not None:
                masks += [_visible(each, term.axes) for each in terms]
                continue
            present = {label for axis in self.labels.axes(term.axes) for label in axis}
            is_row = not present & set(keys) and bool(keys)
            tensor = self._scaled(self._canonical_or_expanded(term, groups, q), term.factor)
            if is_row:
                bias = tensor if bias is None else bias + tensor
            else:
                additive = tensor if additive is None else additive + tensor
        boolean, left, right = None, found.left, found.right
        for visible in masks:
            side, distance = _band(visible, self.labels, rows, keys)
            if side == "right":
                right = distance if right < 0 else min(right, distance)
            elif side == "left":
                left = distance if left < 0 else min(left, distance)
            elif side == "tensor":
                tensor = self._canonical_or_expanded(_Operand(visible.term.node, visible.own), groups, q)
                if visible.term.inverted:
                    tensor = self._call(torch.logical_not, tensor)
                boolean = tensor if boolean is None else boolean & tensor
        causal = right == 0
        words += ["causal"] if causal else []
        words += [f"window ({left}, {right})"] if left >= 0 or (right >= 0 and not causal) else []
        if additive is not None:
            words.append("additive mask")
            if boolean is not None:
                additive = additive.masked_fill(self._call(torch.logical_not, boolean), -math.inf)
                words.append("with a boolean one")
        elif boolean is not None:
            words.append("boolean mask")
        options = {"is_causal": causal, "window_left": left, "window_right": -1 if causal else right}
        return bias, boolean if additive is None else additive, options, words

    def _canonical_or_expanded(
        self, operand: _Operand, groups: tuple[tuple[Label, ...], ...], q: torch.fx.Proxy
    ) -> torch.fx.Proxy:
        if same_in(operand.node, self.graph) is None:
            operand = self._base(operand, True)
        tensor, present = self._canonical(operand, groups)
        for dim in (0, 1):
            if present[dim]:
                tensor = self._filled(tensor, dim, present[dim], groups[dim], q)
        if any(present[dim] and present[dim] != groups[dim] for dim in (2, 3)):
            raise _Refused("one of its masks has a part of an axis")
        return tensor

    def _times(
        self,
        tensor: torch.fx.Proxy,
        operand: _Operand,
        groups: tuple[tuple[Label, ...], ...],
        divides: bool,
        target: _Operand,
    ) -> torch.fx.Proxy:
        factor = self._canonical_or_expanded(operand, groups, tensor)
        dtype = target.node.meta["val"].dtype
        result = tensor / factor if divides else tensor * factor
        return result if operand.node.meta["val"].dtype == dtype else result.to(dtype)

    def _scaled(self, tensor: torch.fx.Proxy, factor: float) -> torch.fx.Proxy:
        return tensor if factor == 1.0 else tensor * factor

    def _canonical(
        self, operand: _Operand, groups: tuple[tuple[Label, ...], ...]
    ) -> tuple[torch.fx.Proxy, list[tuple[Label, ...]]]:
        """The operand with one axis per group, and the labels in each of them (broadcast: none)."""
        node = same_in(operand.node, self.graph)
        if node is None:
            raise _Refused("its operands are inside of a function that the graph holds as a whole")
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
            raise _Refused("one of its operands has an axis that is none of batch, heads, rows and keys")
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
                raise _Refused("an axis of one of its operands merges several sizes that vary")
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
            raise _Refused("one of its masks lacks a part of the batch")
        missing = self._call(_floor_divide, q.size(dim), tensor.size(dim))
        at = dim + inner
        sizes.insert(at, missing)
        return tensor.unsqueeze(at).expand(*sizes).flatten(dim, dim + 1)

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.fx.Proxy:
        tracer = torch.fx.proxy.GraphAppendingTracer(self.graph)
        unwrap = lambda x: x.node if isinstance(x, torch.fx.Proxy) else x  # noqa: E731
        node = self.graph.call_function(
            function, tuple(unwrap(arg) for arg in args), {name: unwrap(arg) for name, arg in kwargs.items()}
        )
        return torch.fx.Proxy(node, tracer)

    def _erase(self, last: torch.fx.Node) -> None:
        """What was replaced, and above all dropout, which would go on drawing random numbers."""
        sources = [same_in(node, self.graph) for node in self.trail]
        sources += [source_of(node) for node in self.path]
        for node in sorted({x for x in sources if x is not None and x.graph is self.graph}, reverse=True):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)


def _lower_again(node: torch.fx.Node, masks: Masks) -> Lowered:
    """A call of the op, with what its masks and its keys' heads turn out to be."""
    try:
        return _lower_call(node, masks)
    except _Refused as refused:
        return Lowered(source_of(node) or node, f"as it is: {refused}")


def _lower_call(node: torch.fx.Node, masks: Masks) -> Lowered:
    options = node.kwargs
    tensors = [*node.args, *[None] * 6][:6]
    shapes = [shape_of(tensor) for tensor in tensors[:3]]
    if options.get("bottom_right") or None in shapes:
        raise _Refused("its band is aligned with the last key")
    (batch, heads, q_len, head_dim), (_, kv_heads, kv_len, _), (*_, value_dim) = shapes  # type: ignore[misc]
    labels = Labels()

    def new(size: int) -> tuple[Label, ...]:
        return () if size == 1 else (labels.new(size),)

    outer, rows, keys, dim, own = (new(size) for size in (batch, q_len, kv_len, head_dim, value_dim))
    shared = new(kv_heads)
    whole = (*shared, *new(heads // kv_heads))
    found = _Modifiers()
    found.cap = options.get("softcap") or None
    found.scale = options["scale"] if found.cap is None else options["scale"] / found.cap
    found.const_bias = options.get("const_bias", 0.0)
    found.left, found.right = options.get("window_left", -1), options.get("window_right", -1)
    if options.get("is_causal"):
        found.right = 0
    axes = (outer, whole, rows, keys)
    bias, attn_mask = tensors[3:5]
    if bias is not None:
        found.terms.append(_broadcast(bias, axes))
    if attn_mask is not None and attn_mask.meta["val"].dtype == torch.bool:
        operand = _broadcast(attn_mask, axes)
        found.masks += [_visible(term, operand.axes) for term in masks.visible(attn_mask)]
    elif attn_mask is not None:
        found.terms.append(_broadcast(attn_mask, axes))
    call = _Call(
        _Operand(tensors[0], (outer, whole, rows, dim)),
        _Operand(tensors[1], (outer, shared, keys, dim)),
        _Operand(tensors[2], (outer, shared, keys, own)),
        _Operand(node, (outer, whole, rows, own)),
        found,
        options.get("visible_bias", True),
        options.get("dropout_p", 0.0),
        own,
        tensors[5],
    )
    return _Emission(labels, rows, keys, dim, masks, [node]).emit(call)


# Small questions about nodes.


def _floor_divide(a: int, b: int) -> int:
    return a // b


def _argument(node: torch.fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _sizes(node: torch.fx.Node, names: Sequence[Any]) -> dict[Any, int]:
    return dict(zip(names, shape_of(node) or (), strict=True))


def _broadcast(node: torch.fx.Node, axes: Axes, factor: float = 1.0) -> _Operand:
    """``node``, broadcast against a tensor with the axes given."""
    shape = shape_of(node)
    if shape is None or len(shape) > len(axes):
        raise _Refused("its scores are combined with a tensor of unknown shape")
    own = axes[len(axes) - len(shape) :]
    return _Operand(node, tuple(() if size == 1 else axis for axis, size in zip(own, shape, strict=True)), factor)


def _visible(term: Term, axes: Axes) -> _Visible:
    """``axes``: of the mask."""
    shape = shape_of(term.node) or ()
    own = tuple(() if axis is None or size == 1 else axes[axis] for axis, size in zip(term.axes, shape, strict=True))
    return _Visible(term, axes, own)


def _band(visible: _Visible, labels: Labels, rows: tuple[Label, ...], keys: tuple[Label, ...]) -> tuple[str, int]:
    """What a term lets a row see: ("right", r): keys up to row + r; ("left", l): keys from row - l on; ("all", 0); or
    ("tensor", 0): what its tensor says."""
    half = visible.term.half
    if half is None:
        return "tensor", 0
    row_step = key_step = 0
    for step, axis in zip(half.steps, labels.axes(visible.axes), strict=True):
        if axis and step and axis not in (rows, keys):
            return "tensor", 0
        row_step += step if axis == rows and axis else 0
        key_step += step if axis == keys and axis else 0
    if row_step == key_step == 0:
        return ("all" if half.offset >= 0 else "tensor"), 0
    # With one row, whose number is 0, its step does not matter.
    if half.offset >= 0 and key_step == -1 and (row_step == 1 or not rows):
        return "right", half.offset
    if half.offset >= 0 and key_step == 1 and (row_step == -1 or not rows):
        return "left", half.offset
    return "tensor", 0


def _path_up(anchor: torch.fx.Node, product: torch.fx.Node) -> list[torch.fx.Node]:
    """The nodes from the product to the anchor, through which the scores flow."""
    pending: list[list[torch.fx.Node]] = [[anchor]]
    seen: set[torch.fx.Node] = set()
    while pending:
        path = pending.pop()
        if path[-1] is product:
            return path[::-1]
        inputs = [path[-1].args[0]] if path[-1] is anchor else chain_inputs(path[-1])
        for node in inputs:
            if node not in seen:
                seen.add(node)
                pending.append([*path, node])
    raise _Refused("its scores cannot be followed from the product of query and key")


def _path_down(anchor: torch.fx.Node, output: torch.fx.Node) -> list[torch.fx.Node]:
    """The nodes after the anchor down to the output, through which the probabilities flow."""
    pending: list[list[torch.fx.Node]] = [[anchor]]
    seen: set[torch.fx.Node] = set()
    while pending:
        path = pending.pop(0)
        if path[-1] is output:
            return path[1:]
        for node in path[-1].users:
            if node not in seen and (node is output or path[-1] in chain_inputs(node)):
                seen.add(node)
                pending.append([*path, node])
    raise _Refused("its probabilities cannot be followed to the product with the value")


def _axis_above(path: Sequence[torch.fx.Node], axis: int) -> int:
    """The axis of the first node of the path that is ``axis`` of the one before the last."""
    for node, source in zip(path[-2:0:-1], path[-3::-1], strict=False):
        if op_name(node) == "baddbmm":
            continue
        axes = axis_map(node, source)
        if axes is None or axis not in axes:
            raise _Refused(f"its keys cannot be followed through {op_name(node)}")
        axis = axes.index(axis)
    return axis


def _is_upcast(node: torch.fx.Node) -> bool:
    """Whether ``node`` casts from half precision to a wider type: a product of such numbers is exact in both."""
    if op_name(node) not in _CASTS:
        return False
    source, result = node.args[0].meta["val"].dtype, node.meta["val"].dtype
    return source in (torch.float16, torch.bfloat16) and result in (torch.float32, torch.float64)


def _moves(node: torch.fx.Node, source: torch.fx.Node) -> bool:
    """Whether a reshape has to copy its tensor."""
    if op_name(node) not in _RESHAPES:
        return False
    try:
        source.meta["val"].view(node.meta["val"].shape)
    except (RuntimeError, ValueError):
        return True
    return False


_ALIASES = (
    UNDONE | _RESHAPES | frozenset("slice select narrow getitem unbind split split_with_sizes chunk detach".split())
)


def _root(node: torch.fx.Node) -> torch.fx.Node:
    """The node whose memory ``node`` is, or may be."""
    while (op_name(node) in _ALIASES or _is_edit(node)) and node.args and isinstance(node.args[0], torch.fx.Node):
        node = node.args[0]
    return node


def _is_edit(node: torch.fx.Node) -> bool:
    """Whether ``node`` writes to its first argument."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
