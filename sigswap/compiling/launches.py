"""Replaces calls of sigswap's attention ops by their Triton launches, in a graph that inductor is about to lower.

Inductor then allocates for the kernels and launches them as its own, which costs the host less than a call of an op.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeGuard

import torch
import torch.fx
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional
from torch.fx import Node

from sigswap.kernels.host.problem import Options
from sigswap.kernels.op import dense  # noqa: F401  # registers the ops

logger = logging.getLogger("sigswap")

_KINDS: dict[Any, Literal["forward", "sums", "backward"]] = {
    torch.ops.sigswap.sigmoid_attention.default: "forward",
    torch.ops.sigswap.sigmoid_attention_sums.default: "sums",
    torch.ops.sigswap.sigmoid_attention_backward.default: "backward",
}
_LAUNCH = triton_kernel_wrapper_functional
_EMPTY = torch.ops.aten.empty_strided.default
_OTHER_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_OF_THE_VALUE = ("val", "tensor_meta", "eager_input_vals")
_BESIDE = {
    operator.getitem,
    torch.ops.aten.clone.default,
    torch.ops.aten.view.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.expand.default,
    torch.ops.aten.full.default,
    torch.ops.aten.unsqueeze.default,
}
"""What else an op may do: other functions of ATen may be ones that inductor decomposes earlier, and no longer knows."""


def make_launches_visible(graph: torch.fx.Graph) -> int:
    """Replaces what it can of the graph's calls, in place; the graph stays functional. Calls on a GPU only.

    graph: of ATen, with fake tensors in ``meta["val"]``, as inductor has it.

    Returns:
        How many calls were replaced. The others stay; the log says why, at level debug.
    """
    done = 0
    made: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _KINDS:
            reason = _replace(graph, node, made)
            if reason is None:
                done += 1
            else:
                logger.debug("%s stays an op for inductor: %s", node, reason)
    return done


def _replace(graph: torch.fx.Graph, call: Node, made: dict[Any, Node]) -> str | None:
    """The reason, if it was not done. made: launches that are in the graph already, by what they do."""
    kind = _KINDS[call.target]
    inputs = list(call.args)
    inputs += [None] * ((9 if kind == "backward" else 6) - len(inputs))  # trailing ones that are None are left out
    operands = [each for each in inputs if isinstance(each, Node)]
    values = [value for node in operands if _on_gpu(value := node.meta.get("val"))]
    if len(values) < len(operands):
        return "it is not on a GPU"
    numbers: dict[str, Any] = dict(call.kwargs)
    sizes = [number for value in values for number in (*value.shape, *value.stride(), value.storage_offset())]
    if not all(isinstance(number, int | float) for number in (*sizes, *numbers.values())):
        return "its lengths vary"
    if any(value.numel() == 0 for value in values):
        return "it has an empty tensor"
    if len(set(map(id, values))) < len(set(operands)):  # a pass before this one copied what is known of a node
        return "two of its operands share a fake tensor"
    # Not before it is needed: it imports Triton.
    from sigswap.kernels.host import traced as visible

    given = [each.meta["val"] if isinstance(each, Node) else each for each in inputs]
    try:
        fake_mode = detect_fake_mode(values)
        assert fake_mode is not None, "a graph of inductor has fake tensors"
        with fake_mode, torch.no_grad():
            launches = visible.launches(kind, given, Options(**numbers))
    except visible.NotVisible as error:
        return str(error)
    except Exception:  # of PyTorch's or Triton's; the op does as well
        logger.warning("%s stays an op for inductor: its launches could not be traced.", call, exc_info=True)
        return "its launches could not be traced"
    functions = {node.target for node in launches.graph.nodes if node.op == "call_function"}
    others = functions - {_LAUNCH, _EMPTY} - _OTHER_EMPTY - _BESIDE
    if others:
        return f"it also does {', '.join(map(str, others))}"
    with graph.inserting_before(call):
        results = _inline(launches.graph, graph, operands, made, call)
    if kind != "forward":
        for user in list(call.users):  # each takes one of the results
            index: Any = user.args[1]
            user.replace_all_uses_with(results[index])
            graph.erase_node(user)
    else:
        call.replace_all_uses_with(results[0])
    graph.erase_node(call)
    return None


def _on_gpu(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_cuda


def _inline(
    launches: torch.fx.Graph, graph: torch.fx.Graph, operands: Sequence[Node], made: dict[Any, Node], call: Node
) -> Sequence[Node]:
    """Copies the launches to where the graph inserts, and gives their results. What the graph knows of the call, such
    as the CUDA stream that it is on, it then knows of them."""
    own = {name: value for name, value in call.meta.items() if name not in _OF_THE_VALUE}
    copies: dict[Node, Node] = {}
    remaining = iter(operands)
    # Two results may not be one tensor, which a user could change in place.
    last = {node.args[0] for node in launches.output_node().all_input_nodes if node.target is operator.getitem}
    empty = []
    for node in launches.nodes:
        if node.op == "placeholder":
            copies[node] = next(remaining)
        elif node.op == "output":
            results = torch.fx.map_arg(node.args[0], copies.__getitem__)
        elif node.target in _OTHER_EMPTY:  # inductor may give some of these other strides than they have in eager
            value = node.meta["val"]
            arguments = list(value.shape), list(value.stride())
            kind = {"dtype": value.dtype, "device": value.device}
            copies[node] = graph.call_function(_EMPTY, arguments, kind)
            copies[node].meta["val"] = value
            empty.append(copies[node])
        elif node.target is _LAUNCH:
            new = graph.node_copy(node, copies.__getitem__)
            # Inductor keeps exactly these strides, which the kernels' arguments have.
            new.meta["eager_input_vals"] = (), torch.fx.map_arg(new.kwargs, lambda each: each.meta["val"])
            copies[node] = new
            if node not in last:
                copies[node] = made.setdefault((_what_it_does(new), repr(own.get("custom"))), new)
            if copies[node] is not new:
                graph.erase_node(new)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op == "call_function":
            copies[node].meta.update(own)
    results = results if isinstance(results, tuple | list) else (results,)
    for node in empty:
        if not node.users and node not in results:  # its launch was there already
            graph.erase_node(node)
    return results


def _what_it_does(launch: Node) -> Any:
    """Equal for launches with equal results: layers that share a mask count its keys once."""
    call: Mapping[str, Any] = launch.kwargs
    arguments: dict[str, Any] = dict(call["kwargs"])
    for name in call["tensors_to_clone"]:
        if arguments[name].target is not _EMPTY:
            return launch
        arguments[name] = arguments[name].args, tuple(arguments[name].kwargs.items())
    constant = kernel_side_table.get_constant_args(call["constant_args_idx"])
    return repr((call["kernel_idx"], call["grid"], arguments, constant))
