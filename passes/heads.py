"""Where the heads of an attention are: the axis that was split from the channels together with head_dim."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.fx import Node

from sigswap.passes.axes import Step, axis_map, chain_inputs, reshape_groups
from sigswap.passes.nodes import argument, axes_arg, input_at, input_list, int_arg, rank_of, shape_of, tensor_input
from sigswap.passes.ops import op_name, op_of
from sigswap.passes.products import Factors, follow
from sigswap.passes.site import ONE_HEAD, Factor, HeadLayout, Product


def score_heads(product: Factors, scores: Node, shape: tuple[int, ...], key_axis: int) -> HeadLayout:
    """Where the heads are in the scores. See :func:`factor_heads`; the axis is followed from the query down."""
    found = factor_heads(product.query, product.query_dim_axis) if product.plain else None
    if found is not None:
        axis = next((out for out, axes in product.query_axes.items() if axes == found.axis), None)
        followed = None if axis is None else _followed_heads(product.path, found.at(axis))
        return followed or ONE_HEAD
    given = _given_heads(product)
    followed = None if given is None else _followed_heads(product.path, given)
    if followed is not None:
        return followed
    merged = _merged_heads(scores, 0) if len(shape) == 3 and key_axis != 0 else None
    if merged is not None:  # the module merged batch and heads in the scores themselves
        return HeadLayout(0, merged.heads, merged=True)
    query_axis = follow(product.path, product.query_axis)
    if query_axis is None:
        query_axis = key_axis - 1 if key_axis > 0 else 1
    batch = [axis for axis in range(len(shape)) if axis not in (query_axis, key_axis)]
    return HeadLayout(batch[-1], shape[batch[-1]]) if len(batch) > 1 else ONE_HEAD


def _given_heads(product: Factors) -> HeadLayout | None:
    """The heads in the product of a query that the module was given as [batch, heads, ...]."""
    axes, sizes = sorted(product.query_axes.keys() - {product.query_axis}), shape_of(product.node)
    return HeadLayout(axes[-1], sizes[axes[-1]]) if len(axes) > 1 and sizes is not None else None


def score_rows(product: Factors, head: HeadLayout) -> int | None:
    """The axis of the scores that holds the query rows, beside or together with the heads; None: not known."""
    axes: set[int | None] = set() if product.query_axis is None else {product.query_axis}
    for node, source in product.path:
        mapped, groups = axis_map(node, source), list(_groups(node, source))
        moved: set[int | None] = set()
        for axis in axes:
            kept = None if mapped is None or axis is None else mapped[axis]
            if kept is not None:
                moved.add(kept)
            else:  # split into rows and heads, or merged with the heads
                moved |= {a for old, new in groups if axis in old for a in new if (shape_of(node) or ())[a] != 1}
        axes = moved
    if not head.merged:
        axes -= {head.axis}
    return next(iter(axes)) if len(axes) == 1 else None


def factor_heads(factor: Node, dim_axis: int) -> HeadLayout | None:
    """Where the heads are in a query: on the axis that was split from the channels together with head_dim.

    ONE_HEAD: the channels were never split. None: it cannot be told (the split is outside of the graph).
    """
    steps: list[Step] = []  # from the split down
    node, axis = factor, dim_axis
    while True:
        joined = _joined_heads(node, axis)
        if joined is not None:
            return _followed_heads(steps, joined) or ONE_HEAD
        after = shape_of(node) or ()
        for old, new in _groups(node, input_at(node)):
            others = [a for a in new if a != axis and after[a] != 1]
            if axis not in new or not others:
                continue
            if len(old) > 1:
                merged = _merged_heads(node, others[-1])
                return None if merged is None else _followed_heads(steps, merged) or ONE_HEAD
            layouts = [HeadLayout(a, after[a]) for a in reversed(others)]
            followed = [found for layout in layouts if (found := _followed_heads(steps, layout)) is not None]
            found = next((x for x in followed if not x.merged), next(iter(followed), ONE_HEAD))
            sizes = shape_of(factor)
            if found.axis is None or found.merged or sizes is None:
                return found
            return HeadLayout(found.axis, sizes[found.axis])  # some may have been sliced off (Falcon)
        step = _source_of(node, axis)
        if step is None:
            # A layer on [batch, length, channels]: its channels are head_dim as a whole.
            whole = op_name(node) in ("linear", "addmm") and rank_of(node) <= 3 and axis == rank_of(node) - 1
            return ONE_HEAD if whole else None
        steps.insert(0, (node, step[0]))
        node, axis = step


def _joined_heads(node: Node, axis: int) -> HeadLayout | None:
    """If ``node`` puts the pieces into which ``axis`` was split beside one another, elsewhere: those are the heads."""
    name, parts = op_name(node), input_list(node)
    to = int_arg(node, 1, default=0)
    if name not in ("cat", "stack") or to is None or not parts or any(op_name(part) != "getitem" for part in parts):
        return None
    to %= rank_of(node)
    pieces = {tensor_input(part) for part in parts}
    split = pieces.pop()
    along = int_arg(split, 2, default=0) or 0
    if to == axis or pieces or not op_of(split).splits:
        return None
    stacked = name == "stack"
    if along % rank_of(parts[0]) != axis - (stacked and axis > to):
        return None
    return HeadLayout(to, len(parts), merged=not stacked, outer=not stacked)


def _source_of(node: Node, axis: int) -> tuple[Node, int] | None:
    """The input of ``node`` from which ``axis`` comes, and that axis there."""
    op, source = op_of(node), input_at(node)
    if op.name == "getitem" and source is not None:
        whole = input_at(source)
        if whole is None:
            return None
        if op_name(source) == "unbind":
            gone = (int_arg(source, 1, default=0) or 0) % rank_of(whole)
            return whole, axis + (axis >= gone)
        return (whole, axis) if op_of(source).splits else None
    if op.norm and source is not None:
        return source, axis
    if op.name in ("amax", "mean") and source is not None and len(node.args) == 2 and isinstance(node.args[1], list):
        reduced = axes_arg(node, 1, rank_of(source)) or ()
        return source, [a for a in range(rank_of(source)) if a not in reduced][axis]
    if op.layer:
        return None
    for source in chain_inputs(node):
        axes = axis_map(node, source)
        if axes is not None and axis in axes:
            return source, axes.index(axis)
    return None


def _followed_heads(steps: Sequence[Step], layout: HeadLayout) -> HeadLayout | None:
    """``layout`` at the input of the first of ``steps``, followed to the last; None: its axis ends."""
    found: HeadLayout | None = layout
    for node, source in steps:
        before = None if found is None else found.axis
        if found is None or before is None:
            return found
        op = op_of(node)
        if op.reshapes:
            found = _reshaped_heads(source, node, found)
        elif not op.norm:
            if op.name in ("getitem", "amax", "mean"):
                origins = [_source_of(node, axis) for axis in range(rank_of(node))]
                axis = next((new for new, old in enumerate(origins) if old is not None and old[1] == before), None)
            else:
                axes = axis_map(node, source)
                axis = None if axes is None else axes[before]
            found = None if axis is None else found.at(axis)
    return found


def _groups(node: Node, source: Node | None) -> Iterator[tuple[list[int], list[int]]]:
    """The groups of axes that a reshape ``node`` turns into one another; none for any other op."""
    if op_of(node).reshapes and source is not None:
        before, after = shape_of(source), shape_of(node)
        if before and after:
            yield from reshape_groups(before, after) or ()


def _reshaped_heads(source: Node, node: Node, layout: HeadLayout) -> HeadLayout | None:
    """``layout`` after the reshape ``node``, which may merge the heads with other axes or split them off again."""
    before, after, axis = shape_of(source) or (), shape_of(node) or (), layout.axis
    for old, new in _groups(node, source):
        if axis is None or axis not in old:
            continue
        large = [a for a in new if after[a] != 1] or new[:1]
        if len(large) == 1:
            # An axis of one, such as a batch of one, is merged as any other: it may be larger in the next call.
            gone = len(before) > len(after) and before[axis + 1 : axis + 2] == (1,)
            if old == [axis] and not gone:
                return layout.at(large[0])
            if axis == old[0] and (layout.outer or not layout.merged):
                return HeadLayout(large[0], layout.heads, merged=True, outer=True)
            if axis == old[-1] and not layout.outer:
                return HeadLayout(large[0], layout.heads, merged=True)
        elif [a for a in old if before[a] != 1] == [axis] and layout.merged:
            split = large[0] if layout.outer else large[-1]
            if after[split] == layout.heads:
                return HeadLayout(split, layout.heads)
            if after[split] % layout.heads == 0:
                return layout.at(split)
        return None
    return None


def _merged_heads(node: Node, axis: int) -> HeadLayout | None:
    """If ``axis`` of ``node`` is batch*heads, the heads in it: the walk up ends where a reshape merged them."""
    current, position = node, axis
    while True:
        inputs = chain_inputs(current)
        if not inputs:
            return None
        for source in inputs:
            axes = axis_map(current, source)
            if axes is not None and position in axes:
                current, position = source, axes.index(position)
                break
        else:
            break
    before, after = shape_of(inputs[0]) or (), shape_of(current) or ()
    for old, new in _groups(current, inputs[0]):
        if position in new:
            # [batch, heads] -> [batch*heads], or [batch, heads*dim] -> [batch*heads, dim]
            inside = new[-1] > position
            heads, rest = divmod(before[old[-1]], after[new[-1]] if inside else 1)
            if (inside or len(old) > 1) and heads and not rest and after[position] % heads == 0:
                return HeadLayout(axis, heads, merged=True)
    return None


def with_heads(factors: Factors, head: HeadLayout) -> Product:
    """``factors`` as the Product that a site holds, with the heads in each factor."""
    found, given = factor_heads(factors.query, factors.query_dim_axis), _given_heads(factors)
    if found is None and given is not None and given.axis is not None and _followed_heads(factors.path, given) == head:
        found = given.at(factors.query_axes[given.axis])

    def layout(operand: Node, which: int) -> HeadLayout:
        shape = shape_of(operand)
        if not factors.plain:
            return HeadLayout(None, 0)
        if head.axis is None or shape is None:
            return HeadLayout(None, 1 if head.axis is None else 0)
        if found is not None and found.axis in factors.row_axes.values():
            return found if which == 0 else ONE_HEAD  # one head of keys for all
        for out_axis, axes in factors.batch_axes.items():
            if found is not None and axes[0] == found.axis:
                merged = found
            elif found is None and follow(factors.path, out_axis) == head.axis:
                merged = head
            else:
                continue
            return merged.at(axes[which]) if merged.merged else HeadLayout(axes[which], shape[axes[which]])
        # [batch*heads, M, D] whose scores are viewed as [batch, heads, M, N] afterwards
        if len(factors.batch_axes) == 1:
            axes = next(iter(factors.batch_axes.values()))
            return HeadLayout(axes[which], head.heads, merged=True)
        return HeadLayout(None, 0)

    def factor(node: Node, which: int, position: int, dim_axis: int) -> Factor:
        return Factor(node, position, dim_axis, layout(node, which), _constant_scale(node))

    shape = shape_of(factors.query)
    ordered = all(
        op_of(node).in_order
        or op_name(node) == "baddbmm"
        or _is_along(node, follow(factors.path[:i], factors.key_axis))
        for i, (node, _) in enumerate(factors.path)
    )
    return Product(
        factors.node,
        tuple(node for node, _ in factors.path),
        factors.key_axis,
        factor(factors.query, 0, factors.query_arg, factors.query_dim_axis),
        factor(factors.key, 1, 1 - factors.query_arg, factors.key_dim_axis),
        shape[factors.query_dim_axis] if shape else 0,
        factors.row_order if ordered else None,
    )


def _is_along(node: Node, key_axis: int | None) -> bool:
    """Whether ``node`` puts something beside the keys (attention sinks), so that each row stays where it is."""
    if op_name(node) == "pad":
        return key_axis == rank_of(node) - 1
    return op_name(node) == "cat" and key_axis is not None and (int_arg(node, 1) or 0) % rank_of(node) == key_axis


def _constant_scale(factor: Node) -> float:
    """The product of the numbers by which ``factor`` was multiplied on its way to the product."""
    scale, node = 1.0, factor
    while len(chain_inputs(node)) == 1:
        op, number = op_of(node), argument(node, 1, "other")
        if op.name in ("mul", "div") and isinstance(number, int | float):
            scale = scale * number if op.name == "mul" else scale / number
        elif not op.keeps_scale:
            break
        node = tensor_input(node)
    return scale


def key_heads(key: Node, head: HeadLayout) -> int:
    """The heads of the key, before they were repeated for the query's (grouped-query attention)."""
    if head.axis is None or head.merged or head.axis >= rank_of(key):
        return head.heads
    return _unrepeated(key, head.axis)


def _unrepeated(key: Node, axis: int) -> int:
    """The size of ``axis`` before an expand and reshape, or a repeat_interleave, repeated its heads."""
    node, sizes = key, shape_of(key)
    most = sizes[axis] if sizes else 1
    while True:
        size, source = shape_of(node), input_at(node)
        if op_name(node) == "repeat_interleave":
            repeats = int_arg(node, 1, "repeats")
            return size[axis] // repeats if size and repeats else (size or (1,))[axis]
        above = source
        while above is not None and op_of(above).same and op_of(above).copies:
            above = input_at(above)
        for old, new in _groups(node, source):
            if new == [axis] and len(old) == 2 and source is not None and above is not None and op_of(above).broadcasts:
                return (shape_of(source) or ())[old[0]]
        step = _source_of(node, axis)
        if step is None:
            return min(size[axis], most) if size else 1  # more, where only some were taken (a slice)
        node, axis = step
