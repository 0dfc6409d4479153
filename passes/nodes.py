"""Reads FX nodes: their tensors, their arguments, and the memory that they write to.

Sizes under dynamic shapes are read as their hints, so that looking at a graph never adds a guard to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import Argument


def tensor_at(node: Node) -> torch.Tensor | None:
    """The fake tensor that a node of a traced (ATen) graph gives; None if it gives none, or several."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def shape_of(node: Node) -> tuple[int, ...] | None:
    """Sizes of the node's tensor (hints where symbolic), or None if it has no tensor or no hint."""
    tensor = tensor_at(node)
    if tensor is None:
        return None
    sizes = []
    for size in tensor.shape:
        hint = size if isinstance(size, int) else size.node.hint
        if hint is None:
            return None
        sizes.append(int(hint))
    return tuple(sizes)


def rank_of(node: Node) -> int:
    """Number of axes of the node's tensor; 0 if it has none."""
    tensor = tensor_at(node)
    return 0 if tensor is None else tensor.dim()


def dtype_of(node: Node) -> torch.dtype | None:
    """The dtype of the node's tensor, or None if it has none."""
    tensor = tensor_at(node)
    return None if tensor is None else tensor.dtype


def is_floating(node: Node) -> bool:
    """Whether the node gives a tensor of a floating-point dtype."""
    dtype = dtype_of(node)
    return dtype is not None and dtype.is_floating_point


def static_int(value: Any) -> int | None:
    """``value`` as an int: itself, a symbolic size's hint, or a graph node's hint."""
    if isinstance(value, Node):
        value = value.meta.get("val")
    if isinstance(value, torch.SymInt):
        value = value.node.hint
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def argument(node: Node, position: int | None, name: str = "", default: Argument = None) -> Argument:
    """An argument of the node, given by its position (None: it has none) or by its name."""
    if position is not None and len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def int_arg(node: Node, position: int, name: str = "dim", default: int | None = None) -> int | None:
    """An argument that is one integer, such as the axis of an op; None: it is something else."""
    return static_int(argument(node, position, name, default))


def number_arg(node: Node, position: int | None, name: str, default: float | None = None) -> float:
    """An argument of an op that is always a number. Raises TypeError if it is none."""
    value = argument(node, position, name, default)
    if not isinstance(value, int | float):
        raise TypeError(f"{name} of {node.format_node()} is not a number")
    return value


def axes_arg(node: Node, position: int, rank: int, name: str = "dim") -> tuple[int, ...] | None:
    """An argument that is one axis or several of a tensor of ``rank`` axes, counted from 0; None: not given."""
    value = argument(node, position, name)
    axes = [value] if isinstance(value, int) else value if isinstance(value, Sequence) else []
    return tuple(axis % rank for axis in axes if isinstance(axis, int)) or None


def input_at(node: Node, position: int = 0) -> Node | None:
    """The positional argument of the node, if it is a node."""
    value = node.args[position] if len(node.args) > position else None
    return value if isinstance(value, Node) else None


def tensor_input(node: Node, position: int = 0) -> Node:
    """As :func:`input_at`, of an op whose argument is always a tensor. Raises TypeError if it is none."""
    value = input_at(node, position)
    if value is None:
        raise TypeError(f"argument {position} of {node.format_node()} is not a node")
    return value


def input_list(node: Node, position: int = 0) -> list[Node]:
    """The nodes in an argument that is a list of tensors, such as what ``cat`` joins."""
    value = node.args[position] if len(node.args) > position else ()
    return [part for part in value if isinstance(part, Node)] if isinstance(value, Sequence) else []


def is_edit(node: Node) -> bool:
    """Whether ``node`` writes to one of its arguments."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return False
    return target._schema.name != "aten::detach_"


def edited_by(node: Node) -> list[Node]:
    """The arguments that ``node`` writes to."""
    if not isinstance(node.target, torch._ops.OpOverload) or not is_edit(node):
        return []
    arguments = node.target._schema.arguments
    given = [*zip(arguments, node.args, strict=False)]
    given += [(each, node.kwargs[each.name]) for each in arguments if each.name in node.kwargs]
    return [
        value
        for each, value in given
        if isinstance(value, Node) and each.alias_info is not None and each.alias_info.is_write
    ]


def memory_of(node: Node) -> int | None:
    """What identifies the memory that a node's tensor is a view of; one within vmap has none that can be named."""
    tensor = tensor_at(node)
    try:
        return None if tensor is None else tensor.untyped_storage()._cdata
    except NotImplementedError:
        return id(tensor)
