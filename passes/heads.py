"""Where the heads of an attention are: the axis that was split from the channels together with head_dim."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.fx

from sigswap.passes.axes import (
    ORDERED,
    RESHAPES,
    axis_map,
    chain_inputs,
    op_name,
    rank_of,
    reshape_groups,
    shape_of,
    static_int,
)
from sigswap.passes.products import LAYERS, Factors, follow
from sigswap.passes.site import HeadLayout, Product


def score_heads(product: Factors, scores: torch.fx.Node, shape: tuple[int, ...], key_axis: int) -> HeadLayout:
    """Where the heads are in the scores. See :func:`factor_heads`; the axis is followed from the query down."""
    found = factor_heads(product.query, product.query_dim_axis)
    if found is not None:
        axis = next((out for out, axes in product.query_axes.items() if axes == found.axis), None)
        followed = None if axis is None else _followed_heads(product.path, dataclasses.replace(found, axis=axis))
        return followed or HeadLayout(None, 1)
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
    return HeadLayout(batch[-1], shape[batch[-1]]) if len(batch) > 1 else HeadLayout(None, 1)


def _given_heads(product: Factors) -> HeadLayout | None:
    """The heads in the product of a query that the module was given as [batch, heads, ...]."""
    axes, sizes = sorted(product.query_axes.keys() - {product.query_axis}), shape_of(product.node)
    return HeadLayout(axes[-1], sizes[axes[-1]]) if len(axes) > 1 and sizes is not None else None


def score_rows(product: Factors, head: HeadLayout) -> int | None:
    """The axis of the scores that holds the query rows, beside or together with the heads; None: not known."""
    axes = set() if product.query_axis is None else {product.query_axis}
    for node, source in product.path:
        mapped = axis_map(node, source) if op_name(node) != "baddbmm" else list(range(rank_of(source)))
        before, after = shape_of(source), shape_of(node)
        groups = reshape_groups(before, after) if op_name(node) in RESHAPES and before and after else None
        moved: set[int | None] = set()
        for axis in axes:
            kept = None if mapped is None else mapped[axis]
            if kept is not None:
                moved.add(kept)
            else:  # split into rows and heads, or merged with the heads
                moved |= {a for old, new in groups or [([], [])] if axis in old for a in new if after[a] != 1}  # type: ignore[index]
        axes = moved
    if not head.merged:
        axes -= {head.axis}
    return next(iter(axes)) if len(axes) == 1 else None


def factor_heads(factor: torch.fx.Node, dim_axis: int) -> HeadLayout | None:
    """Where the heads are in a query: on the axis that was split from the channels together with head_dim.

    HeadLayout(None, 1): the channels were never split. None: it cannot be told (the split is outside of the graph).
    """
    steps: list[tuple[torch.fx.Node, torch.fx.Node]] = []  # (op, its input), from the split down
    node, axis = factor, dim_axis
    while True:
        joined = _joined_heads(node, axis)
        if joined is not None:
            return _followed_heads(steps, joined) or HeadLayout(None, 1)
        if op_name(node) in RESHAPES:
            source = node.args[0]
            before, after = shape_of(source), shape_of(node)
            groups = reshape_groups(before, after) if before and after else None
            for old, new in groups or []:
                others = [a for a in new if a != axis and after[a] != 1]  # type: ignore[index]
                if axis not in new or not others:
                    continue
                if len(old) > 1:
                    merged = _merged_heads(node, others[-1])
                    return None if merged is None else _followed_heads(steps, merged) or HeadLayout(None, 1)
                layouts = [HeadLayout(a, after[a]) for a in reversed(others)]  # type: ignore[index]
                followed = [found for layout in layouts if (found := _followed_heads(steps, layout)) is not None]
                found = next((x for x in followed if not x.merged), next(iter(followed), HeadLayout(None, 1)))
                sizes = shape_of(factor)
                if found.axis is None or found.merged or sizes is None:
                    return found
                return HeadLayout(found.axis, sizes[found.axis])  # some may have been sliced off (Falcon)
        step = _source_of(node, axis)
        if step is None:
            # A layer on [batch, length, channels]: its channels are head_dim as a whole.
            whole = op_name(node) in ("linear", "addmm") and rank_of(node) <= 3 and axis == rank_of(node) - 1
            return HeadLayout(None, 1) if whole else None
        steps.insert(0, (node, step[0]))
        node, axis = step


def _joined_heads(node: torch.fx.Node, axis: int) -> HeadLayout | None:
    """If ``node`` puts the pieces into which ``axis`` was split beside one another, elsewhere: those are the heads."""
    if op_name(node) not in ("cat", "concat", "concatenate", "stack"):
        return None
    parts: Sequence[torch.fx.Node] = node.args[0]  # type: ignore[assignment]
    to = (static_int(node.args[1]) if len(node.args) > 1 else 0) or 0
    to %= rank_of(node)
    stacked = op_name(node) == "stack"
    if to == axis or any(op_name(part) != "getitem" for part in parts):
        return None
    pieces = {part.args[0] for part in parts}
    split = next(iter(pieces))
    if len(pieces) != 1 or op_name(split) not in ("chunk", "split", "split_with_sizes", "tensor_split"):  # type: ignore[arg-type]
        return None
    along = (static_int(split.args[2]) if len(split.args) > 2 else 0) or 0  # type: ignore[union-attr]
    if along % rank_of(parts[0]) != axis - (stacked and axis > to):
        return None
    return HeadLayout(to, len(parts), merged=not stacked, outer=not stacked)


def _source_of(node: torch.fx.Node, axis: int) -> tuple[torch.fx.Node, int] | None:
    """The input of ``node`` from which ``axis`` comes, and that axis there."""
    if op_name(node) == "getitem" and isinstance(node.args[0], torch.fx.Node):
        pieces = node.args[0]
        if not pieces.args or not isinstance(pieces.args[0], torch.fx.Node):
            return None
        if op_name(pieces) == "unbind":
            gone = static_int(pieces.args[1]) if len(pieces.args) > 1 else 0
            gone = (gone or 0) % rank_of(pieces.args[0])
            return pieces.args[0], axis + (axis >= gone)
        return (
            (pieces.args[0], axis)
            if op_name(pieces) in ("chunk", "split", "split_with_sizes", "tensor_split")
            else None
        )
    if op_name(node) in ("layer_norm", "rms_norm"):
        return node.args[0], axis  # type: ignore[return-value]
    if op_name(node) in ("amax", "mean") and len(node.args) == 2 and isinstance(node.args[1], list):
        gone_axes = {a % rank_of(node.args[0]) for a in node.args[1]}  # type: ignore[arg-type]
        return node.args[0], [a for a in range(rank_of(node.args[0])) if a not in gone_axes][axis]  # type: ignore
    if op_name(node) in LAYERS:
        return None
    for source in chain_inputs(node):
        axes = axis_map(node, source)
        if axes is not None and axis in axes:
            return source, axes.index(axis)
    return None


def _followed_heads(steps: Sequence[tuple[torch.fx.Node, torch.fx.Node]], layout: HeadLayout) -> HeadLayout | None:
    """``layout`` at the input of the first of ``steps`` (op, its input), followed to the last; None: its axis ends."""
    found: HeadLayout | None = layout
    for node, source in steps:
        if found is None or found.axis is None:
            return found
        name = op_name(node)
        if name in RESHAPES:
            found = _reshaped_heads(source, node, found)
        elif name in ("getitem", "amax", "mean"):
            positions = {_source_of(node, a)[1]: a for a in range(rank_of(node))}  # type: ignore[index]
            axis = positions.get(found.axis)
            found = None if axis is None else dataclasses.replace(found, axis=axis)
        elif name not in ("layer_norm", "rms_norm", "baddbmm"):
            axes = axis_map(node, source)
            axis = None if axes is None else axes[found.axis]
            found = None if axis is None else dataclasses.replace(found, axis=axis)
    return found


def _reshaped_heads(source: torch.fx.Node, node: torch.fx.Node, layout: HeadLayout) -> HeadLayout | None:
    """``layout`` after the reshape ``node``, which may merge the heads with other axes or split them off again."""
    before, after, axis = shape_of(source), shape_of(node), layout.axis
    if before is None or after is None or axis is None:
        return None
    for old, new in reshape_groups(before, after) or []:
        if axis not in old:
            continue
        large = [a for a in new if after[a] != 1] or new[:1]
        if len(large) == 1:
            # An axis of one, such as a batch of one, is merged as any other: it may be larger in the next call.
            gone = len(before) > len(after) and before[axis + 1 : axis + 2] == (1,)
            if old == [axis] and not gone:
                return dataclasses.replace(layout, axis=large[0])
            if axis == old[0] and (layout.outer or not layout.merged):
                return HeadLayout(large[0], layout.heads, merged=True, outer=True)
            if axis == old[-1] and not layout.outer:
                return HeadLayout(large[0], layout.heads, merged=True)
        elif [a for a in old if before[a] != 1] == [axis] and layout.merged:
            split = large[0] if layout.outer else large[-1]
            if after[split] == layout.heads:
                return HeadLayout(split, layout.heads)
            if after[split] % layout.heads == 0:
                return dataclasses.replace(layout, axis=split)
        return None
    return None


def _merged_heads(node: torch.fx.Node, axis: int) -> HeadLayout | None:
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
    if op_name(current) not in RESHAPES:
        return None
    before, after = shape_of(inputs[0]), shape_of(current)
    if before is None or after is None:
        return None
    for old, new in reshape_groups(before, after) or []:
        if position in new:
            if new[-1] == position and len(old) > 1:  # [batch, heads] -> [batch*heads]
                heads = before[old[-1]]
                return HeadLayout(axis, heads, merged=True)
            if new[-1] > position and before[old[-1]] % after[new[-1]] == 0:  # [batch, heads*dim] -> [batch*heads, dim]
                heads = before[old[-1]] // after[new[-1]]
                if heads and after[position] % heads == 0:
                    return HeadLayout(axis, heads, merged=True)
    return None


def with_heads(factors: Factors, head: HeadLayout) -> Product:
    """``factors`` as the Product that a site holds, with the heads in each factor."""

    found, given = factor_heads(factors.query, factors.query_dim_axis), _given_heads(factors)
    if found is None and given is not None and _followed_heads(factors.path, given) == head:
        found = dataclasses.replace(given, axis=factors.query_axes[given.axis])  # type: ignore[index]

    def layout(operand: torch.fx.Node, which: int) -> HeadLayout:
        shape = shape_of(operand)
        if head.axis is None or shape is None:
            return HeadLayout(None, 1 if head.axis is None else 0)
        if found is not None and found.axis in factors.row_axes.values():
            return found if which == 0 else HeadLayout(None, 1)  # one head of keys for all
        for out_axis, axes in factors.batch_axes.items():
            if found is not None and axes[0] == found.axis:
                merged = found
            elif found is None and follow(factors.path, out_axis) == head.axis:
                merged = head
            else:
                continue
            if merged.merged:
                return dataclasses.replace(merged, axis=axes[which])
            return HeadLayout(axes[which], shape[axes[which]])
        # [batch*heads, M, D] whose scores are viewed as [batch, heads, M, N] afterwards
        if len(factors.batch_axes) == 1:
            axes = next(iter(factors.batch_axes.values()))
            return HeadLayout(axes[which], head.heads, merged=True)
        return HeadLayout(None, 0)

    shape = shape_of(factors.query)
    ordered = factors.query_in_order and all(
        op_name(node) in ORDERED | RESHAPES | {"baddbmm"} for node, _ in factors.path
    )
    return Product(
        node=factors.node,
        query_arg=factors.query_arg,
        key_arg=1 - factors.query_arg,
        query_dim_axis=factors.query_dim_axis,
        key_dim_axis=factors.key_dim_axis,
        query_head=layout(factors.query, 0),
        key_head=layout(factors.key, 1),
        head_dim=shape[factors.query_dim_axis] if shape else 0,
        rows_in_order=ordered,
        query_scale=_constant_scale(factors.query),
        key_scale=_constant_scale(factors.key),
    )


def _constant_scale(factor: torch.fx.Node) -> float:
    """The product of the numbers by which ``factor`` was multiplied on its way to the product."""
    scale, node = 1.0, factor
    while len(chain_inputs(node)) == 1 and op_name(node) not in ("linear", "conv2d", "convolution", "cat"):
        name, operand = op_name(node), node.args[1] if len(node.args) > 1 else None
        if name in ("mul", "multiply", "div", "divide", "true_divide"):
            if not isinstance(operand, int | float):
                break
            scale = scale * operand if name in ("mul", "multiply") else scale / operand
        elif name not in ORDERED | RESHAPES | {"transpose", "permute", "mT", "expand"} or name in ("add", "tanh"):
            break
        node = node.args[0]
    return scale


def key_heads(key: torch.fx.Node, head: HeadLayout, shape: tuple[int, ...] | None) -> int:
    """The heads of the key, before they were repeated for the query's (grouped-query attention)."""
    if head.axis == rank_of(key) - 2:  # the query's heads are further rows
        return 1
    if head.axis is None or head.merged or shape is None or head.axis >= len(shape):
        return head.heads
    return _unrepeated(key, head.axis)


def product_key_heads(product: Product) -> int:
    head = product.key_head
    if head.axis is None or head.merged:
        return head.heads
    key = [x for x in product.node.all_input_nodes if rank_of(x) > 1][-2:]
    return _unrepeated(key[product.key_arg], head.axis) if len(key) == 2 else head.heads


def _unrepeated(key: torch.fx.Node, axis: int) -> int:
    """The size of ``axis`` before an expand and reshape, or a repeat_interleave, repeated its heads."""
    node, shape = key, shape_of(key)
    most = shape[axis] if shape else 1
    while True:
        name = op_name(node)
        if name == "repeat_interleave":
            repeats = static_int(node.args[1])
            size = shape_of(node)
            return size[axis] // repeats if size and repeats else (size or (1,))[axis]
        if name in RESHAPES and isinstance(node.args[0], torch.fx.Node):
            before, after = shape_of(node.args[0]), shape_of(node)
            source = node.args[0]
            while op_name(source) in ("clone", "contiguous"):
                source = source.args[0]
            for old, new in (reshape_groups(before, after) or []) if before and after else []:
                if new == [axis] and len(old) == 2 and op_name(source) == "expand":
                    return before[old[0]]  # type: ignore[index]
        step = _source_of(node, axis)
        if step is None:
            size = shape_of(node)
            return min(size[axis], most) if size else 1  # more, where only some were taken (a slice)
        node, axis = step
