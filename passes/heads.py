"""Where the heads of an attention are: the axis that was split from the channels together with head_dim."""

from __future__ import annotations

import dataclasses

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
    if found is not None and found.axis is None:
        return HeadLayout(None, 1)
    merged = _merged_heads(scores, 0) if len(shape) == 3 and key_axis != 0 else None
    if merged is not None:  # the module merged batch and heads in the scores themselves
        return HeadLayout(0, merged.heads, merged=True)
    if found is not None:
        for out_axis, (axis_in_query, _) in product.batch_axes.items():
            if axis_in_query != found.axis:
                continue
            axis = follow(product.path, out_axis)
            if axis is not None:
                return HeadLayout(axis, found.heads, found.merged)
            if found.merged:  # [batch*heads, M, N], viewed as [batch, heads, M, N] before the softmax
                split = [a for a in range(len(shape) - 2) if shape[a] == found.heads]
                return HeadLayout(split[-1], found.heads) if split else HeadLayout(None, 1)
        return HeadLayout(None, 1)
    query_axis = follow(product.path, product.query_axis)
    if query_axis is None:
        query_axis = key_axis - 1 if key_axis > 0 else 1
    batch = [axis for axis in range(len(shape)) if axis not in (query_axis, key_axis)]
    return HeadLayout(batch[-1], shape[batch[-1]]) if len(batch) > 1 else HeadLayout(None, 1)


def factor_heads(factor: torch.fx.Node, dim_axis: int) -> HeadLayout | None:
    """Where the heads are in a query: on the axis that was split from the channels together with head_dim.

    HeadLayout(None, 1): the channels were never split. None: it cannot be told (the split is outside of the graph).
    """
    steps: list[tuple[torch.fx.Node, torch.fx.Node]] = []  # (op, its input)
    node, axis = factor, dim_axis
    while True:
        if op_name(node) in RESHAPES:
            source = node.args[0]
            before, after = shape_of(source), shape_of(node)
            groups = reshape_groups(before, after) if before and after else None
            for old, new in groups or []:
                others = [a for a in new if a != axis and after[a] != 1]  # type: ignore[index]
                if axis not in new or not others:
                    continue
                if len([a for a in old if before[a] != 1]) > 1:  # type: ignore[index]
                    return _followed_heads(steps, _merged_heads(node, others[-1]))
                layouts = [HeadLayout(a, after[a]) for a in reversed(others)]  # type: ignore[index]
                followed = (_followed_heads(steps, layout) for layout in layouts)
                found = next((layout for layout in followed if layout is not None), HeadLayout(None, 1))
                sizes = shape_of(factor)
                if found.axis is None or found.merged or sizes is None:
                    return found
                return HeadLayout(found.axis, sizes[found.axis])  # some may have been sliced off (Falcon)
        step = _source_of(node, axis)
        if step is None:
            # A layer on [batch, length, channels]: its channels are head_dim as a whole.
            whole = op_name(node) in ("linear", "addmm") and rank_of(node) <= 3 and axis == rank_of(node) - 1
            return HeadLayout(None, 1) if whole else None
        steps.append((node, step[0]))
        node, axis = step


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


def _followed_heads(steps: list[tuple[torch.fx.Node, torch.fx.Node]], layout: HeadLayout | None) -> HeadLayout | None:
    """``layout`` at the input of the last step, followed down to the factor; None where its axis ends."""
    for node, source in reversed(steps):
        if layout is None or layout.axis is None:
            return layout
        axis: int | None = layout.axis
        if op_name(node) in ("getitem", "amax", "mean"):
            positions = {_source_of(node, a)[1]: a for a in range(rank_of(node))}  # type: ignore[index]
            axis = positions.get(layout.axis)
        elif op_name(node) not in ("layer_norm", "rms_norm"):
            axes = axis_map(node, source)
            axis = axes[layout.axis] if axes is not None else None
        if axis is None and op_name(node) in RESHAPES and not layout.merged:
            merged = _merged_axis(source, node, layout.axis)
            layout = None if merged is None else HeadLayout(merged, layout.heads, merged=True)
        else:
            layout = None if axis is None else dataclasses.replace(layout, axis=axis)
    return layout


def _merged_axis(source: torch.fx.Node, node: torch.fx.Node, axis: int) -> int | None:
    """The axis of the reshape ``node`` into which ``axis`` was merged as the inner one, or None."""
    before, after = shape_of(source), shape_of(node)
    for old, new in (reshape_groups(before, after) or []) if before and after else []:
        large = [a for a in new if after[a] != 1]  # type: ignore[index]
        if axis == old[-1] and len(large) == 1:
            return large[0]
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

    def layout(operand: torch.fx.Node, which: int) -> HeadLayout:
        if head.axis is None:
            return HeadLayout(None, 1)
        shape = shape_of(operand)
        for out_axis, axes in factors.batch_axes.items():
            if shape is None or follow(factors.path, out_axis) != head.axis:
                continue
            if head.merged:
                return HeadLayout(axes[which], head.heads, merged=True)
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
    node: torch.fx.Node = key
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
            return size[axis] if size else 1
        node, axis = step
