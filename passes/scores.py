"""Up from a softmax: from its scores to the products of query and key, through scale, soft cap, casts, views, additive
bias and masks. The axis that holds the keys is followed at every step; it may be viewed as a grid on the way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from torch.fx import Node

from sigswap.masked import MASKED_SCORE
from sigswap.passes.axes import axes_above, axis_map, chain_inputs
from sigswap.passes.nodes import argument, input_at, int_arg, rank_of, shape_of, tensor_input
from sigswap.passes.ops import op_name, op_of, spelling_of
from sigswap.passes.products import PARAMETER, Factors, contraction, follow, is_parameter, product_of
from sigswap.passes.walks import with_above

_LONGEST_WALK = 256  # ops between a product and its softmax; real models have fewer than 40


@dataclasses.dataclass
class Origin:
    """Where scores come from: the products summed in them, and what was met on the way."""

    products: list[Factors] = dataclasses.field(default_factory=list)
    masks: set[str] = dataclasses.field(default_factory=set)
    softcap: bool = False
    reason: str | None = None  # why no product was found
    obstacle: str | None = None  # why the attention cannot be swapped
    shifts: list[Node] = dataclasses.field(default_factory=list)  # that are subtracted from them, see AttentionSite
    terms: list[Node] = dataclasses.field(default_factory=list)  # that are added to them
    is_given: bool = False  # they are an input of the graph
    extra: tuple[int, int] = (0, 0)  # logits before and behind those of the keys, see AttentionSite
    extra_terms: list[tuple[Node, int]] = dataclasses.field(default_factory=list)  # where they come from, how many each


def trace_scores(node: Node, keys: tuple[int, ...], seen: set[tuple[Node, tuple[int, ...]]]) -> Origin:
    """``keys``: the axis of the keys; several where it is viewed as a grid."""
    op = op_of(node)
    if (node, keys) in seen or len(seen) > _LONGEST_WALK:
        return Origin(reason="its scores come from too many ops to follow")
    seen.add((node, keys))
    inputs = _mixed_by_parameter(node, keys)
    product = product_of(node, keys[0]) if len(keys) == 1 and not inputs else None
    if isinstance(product, str):
        return Origin(reason=product)
    origin = Origin()
    if product is not None:
        origin.products.append(product)
        if op.name == "baddbmm" and node.kwargs.get("beta", 1) != 0:
            _merge_term(origin, node, tensor_input(node), keys, seen)
        return origin

    inputs = inputs or chain_inputs(node)
    if op.name == "cdist":
        origin.reason = (
            "its scores are distances of query and key, in which a term is constant along a row: a softmax ignores "
            "that, a sigmoid does not"
        )
        return origin
    if not inputs:
        origin.reason = f"its scores come from {spelling_of(node) or node.op}, not from a product of query and key"
        origin.is_given = node.op == "placeholder" and not node.meta.get(PARAMETER)
        return origin
    if op.masks:
        origin.masks.add("boolean")
    origin.softcap = op.name == "tanh"
    with_keys: list[bool] = []
    for source in inputs:
        known = len(origin.products)
        _merge_term(origin, node, source, keys, seen)
        with_keys.append(len(origin.products) > known)
    if not origin.products:
        return origin
    if op.name in ("add", "sub", "rsub"):
        for source in node.all_input_nodes:
            reduced = _is_row_reduction(source)
            if not reduced and not _is_one_of_the_scores(source, node, keys, origin.products):
                continue
            shift = _only_shift(source, node) if reduced else None
            origin.shifts += [] if shift is None else [shift]
            if shift is None:
                what = "a reduction over their own row" if reduced else "some of them"
                origin.obstacle = (
                    f"its scores are shifted by {what}, which a softmax ignores and a sigmoid does not: remove it"
                )
    if op.name == "pad":
        _note_padding(origin, node, keys)
    if op.name == "cat" and (int_arg(node, 1, default=0) or 0) % rank_of(node) in keys:
        sizes = [(shape_of(part) or ())[(int_arg(node, 1, default=0) or 0)] for part in inputs]
        _note_extra(origin, list(zip(inputs, sizes, strict=True)), with_keys)
    return origin


def _mixed_by_parameter(node: Node, keys: tuple[int, ...]) -> list[Node]:
    """The scores whose heads an einsum with a parameter mixes ("talking heads"); [] if ``node`` is none."""
    product = contraction(node) if op_name(node) == "einsum" and len(keys) == 1 else None
    if product is None:
        return []
    name = product.out[keys[0]]
    for at in range(2):
        own, other = product.names[at], product.names[1 - at]
        mixes = name in own and name not in other and is_parameter(product.factors[1 - at])
        if mixes and not is_parameter(product.factors[at]):
            return [product.factors[at]]
    return []


def _note_padding(origin: Origin, node: Node, keys: tuple[int, ...]) -> None:
    """Logits that ``pad`` puts beside those of the keys: masked ones, or one that is 0 (so softmax may give less)."""
    axis = rank_of(node) - 1 - keys[-1]
    numbers = argument(node, 1, "pad")
    given = numbers[2 * axis : 2 * axis + 2] if isinstance(numbers, Sequence) else ()
    sides = tuple(side for side in given if isinstance(side, int))
    value = argument(node, 3 if op_of(node).name == spelling_of(node) else 2, "value")
    if len(sides) == len(given) and not any(sides):
        return
    if isinstance(value, int | float) and value <= MASKED_SCORE:
        return  # they are no keys that anyone sees
    if len(sides) == 2 and sorted(sides) == [0, 1]:
        origin.extra = (origin.extra[0] + sides[0], origin.extra[1] + sides[1])
    else:
        origin.obstacle = "its softmax runs over the keys and padded logits"


def _note_extra(origin: Origin, parts: Sequence[tuple[Node, int]], with_keys: Sequence[bool]) -> None:
    """Logits that ``cat`` puts before or behind those of the keys (attention sinks)."""
    first, last = with_keys.index(True), len(with_keys) - 1 - with_keys[::-1].index(True)
    if not all(with_keys[first : last + 1]):
        origin.obstacle = "its softmax runs over extra logits that stand among those of the keys"
    before, after = parts[:first], parts[last + 1 :]
    origin.extra_terms += [*before, *after]
    origin.extra = (
        origin.extra[0] + sum(size for _, size in before),
        origin.extra[1] + sum(size for _, size in after),
    )


def _merge_term(
    origin: Origin, node: Node, source: Node, keys: tuple[int, ...], seen: set[tuple[Node, tuple[int, ...]]]
) -> None:
    """Adds to ``origin`` what flows from ``source`` into ``node``."""
    before, after = shape_of(source), shape_of(node)
    additive = op_name(node) in ("add", "sub", "baddbmm")
    above = axes_above(node, source, keys)
    if above is None or before is None or after is None or _broadcasts(before, above, after, keys):
        if additive:
            origin.masks.add("additive")
        elif origin.reason is None and above is None:
            origin.reason = f"the softmax's axis cannot be followed through {spelling_of(node)}"
        return
    term = trace_scores(source, above, seen)
    if op_of(node).mixes or op_name(node) == "einsum":
        term.products = [product for product in term.products if _mixes_heads(product, node, source)]
    for product in term.products:
        product.path.append((node, source))
    if term.products:
        origin.masks |= term.masks
    elif additive:
        origin.masks.add("additive")
        origin.terms.append(source)
    origin.terms += term.terms
    origin.shifts += term.shifts
    if term.products and any(term.extra):
        origin.extra = term.extra
    origin.extra_terms += term.extra_terms
    origin.is_given |= term.is_given
    origin.products += term.products
    origin.softcap |= term.softcap
    origin.obstacle = origin.obstacle or term.obstacle
    origin.reason = origin.reason or term.reason


def _broadcasts(before: tuple[int, ...], above: tuple[int, ...], after: tuple[int, ...], keys: tuple[int, ...]) -> bool:
    """Whether a term is one number for several keys."""
    return math.prod(before[axis] for axis in above) != math.prod(after[axis] for axis in keys) and any(
        before[axis] == 1 for axis in above
    )


def _mixes_heads(product: Factors, node: Node, source: Node) -> bool:
    """Whether a layer on the scores mixes heads ("talking heads"), and not queries or channels."""
    if op_name(node) == "einsum":
        mixed = {axis for axis, to in enumerate(axis_map(node, source) or ()) if to is None}
    else:
        mixed = {rank_of(source) - 1 if op_name(node) == "linear" else 1}
    return mixed <= {follow(product.path, axis) for axis in product.batch_axes}


def _is_row_reduction(node: Node) -> bool:
    while (source := _same_rows(node)) is not None:
        node = source
    return op_of(node).reduces


def _same_rows(node: Node) -> Node | None:
    """What ``node`` is made of, if that was one number per row as well, and 0 stays 0."""
    scaled = op_name(node) in ("mul", "div") and len(node.all_input_nodes) == 1
    return input_at(node) if op_of(node).keeps_row_numbers or scaled else None


def _is_one_of_the_scores(term: Node, scores: Node, keys: tuple[int, ...], products: Sequence[Factors]) -> bool:
    """Whether ``term`` shifts rows of ``scores`` by what was made of these scores, ``products``, themselves."""
    sizes, from_the_end = shape_of(scores) or (), [axis - rank_of(scores) for axis in keys]
    while op_of(term).same or op_of(term).broadcasts:
        term = tensor_input(term)
    of_term = shape_of(term) or ()
    one_for_all = all(len(of_term) < -axis or of_term[axis] == 1 for axis in from_the_end)
    if not one_for_all or all(sizes[axis] == 1 for axis in from_the_end):
        return False
    made_of = set(with_above(term, lambda above: op_of(above).layer or op_of(above).product or op_of(above).fills))
    return any(product.node in made_of for product in products)


def _only_shift(node: Node, user: Node) -> Node | None:
    """The maximum or logsumexp that ``node`` is, if nothing but ``user`` uses it."""
    while set(node.users) == {user} and (source := _same_rows(node)) is not None:
        node, user = source, node
    others = [other for other in node.users if other is not user and other.users]
    return node if not others and op_name(node) in ("amax", "max", "logsumexp") else None
