"""Normalizes a Dynamo graph: one ATen spelling for every softmax, matmul and sdpa, before autograd.

The result is a shadow, for the find pass to look at. The Dynamo graph itself stays what is compiled, so that its
autocast regions, checkpoint regions, in-place edits and guards are untouched; each shadow node knows the Dynamo node
that it came from (:func:`source_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.fx.node import map_arg

from sigswap.passes.nodes import input_at
from sigswap.passes.products import PARAMETER

_SOURCE = "sigswap_source"
_SAME = "sigswap_same"  # node.meta key: the Dynamo nodes whose value the shadow node is


def normalize(graph_module: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """The pre-dispatch ATen shadow of a Dynamo graph. ``example_inputs``: what Dynamo gives to a backend.

    Placeholders that are parameters carry ``meta[PARAMETER]``. Subgraphs of activation checkpointing are inlined.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # it imports sympy, which takes a second

    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    known = [node.meta.get("example_value", value) for node, value in zip(placeholders, example_inputs, strict=True)]
    # Fake tensors of our own with the sizes that Dynamo has seen: nothing that is done to them can add a guard.
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with mode:
        inputs = [_concrete(value) for value in known]

    def interpret(*args: Any) -> Any:
        return _Stamping(graph_module).run(*args)

    shadow = _trace(interpret, inputs, mode)
    shadow_placeholders = [node for node in shadow.graph.nodes if node.op == "placeholder"]
    for node, value, fake in zip(shadow_placeholders, example_inputs, known, strict=True):
        if isinstance(value, torch.nn.Parameter) or isinstance(fake, torch.nn.Parameter):
            node.meta[PARAMETER] = True
    return shadow


def _concrete(value: Any) -> Any:
    """A symbolic number's hint; for a tensor an empty one with the hints of its sizes."""
    if isinstance(value, torch.Tensor):
        sizes, strides = ([int(_concrete(number)) for number in numbers] for numbers in (value.shape, value.stride()))
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value.node.hint if value.node.hint is not None else 2  # an unbacked size: any will do
    return value


def _trace(function: Callable[..., Any], inputs: Sequence[Any], mode: FakeTensorMode) -> GraphModule:
    with mode, torch.fx.traceback.preserve_node_meta(), torch.no_grad():
        return make_fx(function, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*inputs)


def renew(shadow: GraphModule, nodes: Iterable[Node]) -> bool:
    """Brings a shadow up to date, in place, with Dynamo nodes that call another function than they did.

    Only those calls are traced, which takes a fraction of the time of a new shadow.

    Returns:
        Whether it is up to date. If not, because the change may reach further than those calls, it is of no use.
    """
    values = {same: node for node in shadow.graph.nodes for same in node.meta.get(_SAME, ())}
    if any(_is_autocast(node) for graph in {same.graph for same in values} for node in graph.nodes):
        return False  # what a call computes in depends on where it stands
    return all(_renew(shadow.graph, node, values) for node in nodes)


def _renew(graph: Graph, source: Node, values: Mapping[Node, Node]) -> bool:
    """values: the nodes of the shadow ``graph`` by the Dynamo nodes whose tensors they are."""
    old = [node for node in graph.nodes if source_of(node) is source]
    operands = [node for node in source.all_input_nodes if node in values]
    numbers = {node: _concrete(node.meta.get("example_value")) for node in source.all_input_nodes if node not in values}
    results = [node for node in old if source in node.meta.get(_SAME, ())]
    function = source.target
    known_numbers = all(isinstance(number, int | float) for number in numbers.values())
    if results != old[-1:] or not operands or not known_numbers or not callable(function):
        return False  # it ran more than once, or is no function of tensors
    if not {values[node] for node in operands} <= {read for node in old for read in node.all_input_nodes}:
        return False  # an operand was edited in place before: it is the edit that is read
    result, tensors = old[-1], [values[node].meta["val"] for node in operands]

    def call(*given: torch.Tensor) -> Any:
        known = {**numbers, **dict(zip(operands, given, strict=True))}
        with torch.fx.traceback.set_current_meta(source):
            return function(*map_arg(source.args, known.get), **map_arg(source.kwargs, known.get))

    try:
        traced = _trace(call, tensors, tensors[0].fake_mode).graph
    except Exception:  # who makes a new shadow will say why
        return False
    output = input_at(traced.output_node())
    if any(node.op == "get_attr" for node in traced.nodes) or output is None or output.op != "call_function":
        return False
    before, after = result.meta["val"], output.meta["val"]
    if (before.dtype, before.shape, before.stride()) != (after.dtype, after.shape, after.stride()):
        return False  # what reads it may do something else now
    copies = dict(zip(traced.find_nodes(op="placeholder"), (values[node] for node in operands), strict=True))
    with graph.inserting_before(result):
        for node in traced.nodes:
            if node.op == "call_function":
                copies[node] = graph.node_copy(node, copies.__getitem__)
                copies[node].meta[_SOURCE] = source
    new = copies[output]
    # Its views below have been traced: they are views of that same tensor.
    new.meta["val"], new.meta[_SAME] = before, result.meta[_SAME]
    result.replace_all_uses_with(new)
    for node in reversed(old):
        graph.erase_node(node)
    return True


def source_of(node: Node) -> Node | None:
    """The Dynamo node that a shadow node came from; it may be in the graph of a submodule."""
    return node.meta.get(_SOURCE)


def has_symbol(node: Node) -> bool:
    """Whether a number among the arguments of the node may depend on a symbolic size."""
    source = source_of(node)
    if source is None:
        return True
    return any(is_symbolic(arg) for arg in source.all_input_nodes)


def is_symbolic(value: Any) -> bool:
    if not isinstance(value, Node):
        return False
    return not isinstance(value.meta.get("example_value", value.meta.get("val")), torch.Tensor)


def same_in(node: Node, graph: Graph) -> Node | None:
    """The first node of ``graph``, the Dynamo graph or one of its submodules', whose value a shadow node is."""
    return next((same for same in node.meta.get(_SAME, ()) if same.graph is graph and not same._erased), None)


def modules_of(node: Node) -> list[tuple[int, type]]:
    """The modules in whose forward Dynamo made a node, outermost first: each one's id and class.

    Dynamo has the ids as text, "@1" behind them in a second call. The names beside them begin with whatever local
    variable holds the model (args[0], of a decorated forward).
    """
    stack = node.meta.get("nn_module_stack") or {}
    numbers = (key.partition("@")[0] for key in stack)
    return [
        (int(number) if number.isdigit() else 0, kind)
        for number, (_, kind) in zip(numbers, stack.values(), strict=True)
    ]


def graph_modules(graph_module: GraphModule) -> Iterator[GraphModule]:
    """This one, and those in it, which its calls run."""
    return (module for module in graph_module.modules() if isinstance(module, GraphModule))


def tensor_of(node: Node) -> torch.Tensor | None:
    """The fake tensor of a node of the Dynamo graph (or of an exported one)."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, torch.Tensor) else None


def rename(node: Node, graph: Graph, replacement: Node) -> None:
    """From now on, the node of ``graph`` whose value the shadow node ``node`` is, is ``replacement``."""
    node.meta[_SAME] = [replacement, *(same for same in node.meta.get(_SAME, ()) if same.graph is not graph)]


class _Stamping(torch.fx.Interpreter):
    """Runs a graph under tracing, and stamps each traced node with the node that is being run."""

    def run_node(self, n: Node) -> Any:
        inner = _checkpointed(n, self.module)
        if n.target == "item":  # its value is not in a fake tensor
            result = _concrete(n.meta.get("example_value"))
        elif inner is not None:
            args, _ = self.fetch_args_kwargs_from_env(n)
            result = _Stamping(inner).run(*args[1:])
        elif n.op == "call_function" and getattr(n.target, "__name__", "") in _OF_VMAP:
            args, _ = self.fetch_args_kwargs_from_env(n)
            result = _OF_VMAP[n.target.__name__](*args)  # type: ignore[union-attr]
        else:
            result = super().run_node(n)
        proxy_mode = get_proxy_mode()
        assert proxy_mode is not None
        root = proxy_mode.tracer.graph._root
        node = root.prev
        while node is not root and node.op != "placeholder" and _SOURCE not in node.meta:
            node.meta[_SOURCE] = n
            node = node.prev
        if isinstance(result, torch.Tensor):
            slot = get_proxy_slot(result, proxy_mode.tracer, None)
            if slot is not None:
                slot.proxy.node.meta.setdefault(_SAME, []).append(n)
        return result


def _one_of(tensor: torch.Tensor, axis: int, *_: Any) -> torch.Tensor:
    """What a mapped function gets of ``tensor``: one part of it, of which nothing tells which one."""
    which = torch.empty(1, dtype=torch.int64, device=tensor.device)
    return tensor.index_select(axis, which).squeeze(axis)


def _all_of(tensor: torch.Tensor, _: int, count: int, axis: int) -> torch.Tensor:
    """What becomes of the results of a mapped function, of which ``tensor`` is one."""
    tensor = tensor.unsqueeze(axis)
    return tensor.expand([count if i == axis % tensor.dim() else size for i, size in enumerate(tensor.shape)])


def _nothing(*_: Any) -> None: ...


_OF_VMAP: dict[str, Callable[..., Any]] = {
    "lazy_load_decompositions": _nothing,
    "_vmap_increment_nesting": _nothing,
    "_vmap_decrement_nesting": _nothing,
    "_add_batch_dim": _one_of,
    "_remove_batch_dim": _all_of,
}
"""In the shadow, a function that torch.vmap maps runs once, on one part of what it is mapped over."""


def _is_autocast(node: Node) -> bool:
    return node.op == "call_function" and "autocast" in getattr(node.target, "__name__", "")


def _checkpointed(node: Node, module: torch.nn.Module) -> GraphModule | None:
    """The body of an activation checkpoint, if ``node`` is one."""
    if node.op != "call_function" or node.target is not torch.ops.higher_order.tag_activation_checkpoint:
        return None
    body = input_at(node)
    found = None if body is None or body.op != "get_attr" else getattr(module, str(body.target))
    return found if isinstance(found, GraphModule) else None
