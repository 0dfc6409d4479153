"""What the passes give to the compiler after them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor

import sigswap.compiling.backend  # noqa: F401  the backend's name

OP = torch.ops.sigswap.sigmoid_attention.default


class Graphs:
    """A backend that records what the passes give to the inner compiler: ``Graphs().compile(model)``."""

    def __init__(self, inner: str = "aot_eager", row_cap: float | None = None) -> None:
        self.modules: list[torch.fx.GraphModule] = []
        self.inner, self.row_cap = inner, row_cap

    def compile(self, model: Callable[..., Any], dynamic: bool | None = None, fullgraph: bool = True) -> Any:
        torch._dynamo.reset()
        options = {"inner": self._record, "row_cap": self.row_cap}
        return torch.compile(model, backend="sigswap", options=options, dynamic=dynamic, fullgraph=fullgraph)

    def _record(self, module: torch.fx.GraphModule, inputs: Any) -> Any:
        self.modules.append(module)
        return torch._dynamo.lookup_backend(self.inner)(module, inputs)

    @property
    def calls(self) -> list[torch.fx.Node]:
        """Of the op."""
        return [node for node in self.nodes if node.target is OP]

    @property
    def nodes(self) -> list[torch.fx.Node]:
        modules = [m for graph in self.modules for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        return [node for module in modules for node in module.graph.nodes]

    @property
    def unfused(self) -> int:
        names = ("softmax", "sigmoid", "sigmoid_probs.default")
        return sum(getattr(node.target, "__name__", node.target) in names for node in self.nodes)


def calls_in(function: Callable[..., Any], *inputs: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of each call of the op in ``function``."""
    calls = []

    class Record(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is OP:
                calls.append((args, kwargs))
            return super().call_function(target, args, kwargs)

    torch._dynamo.reset()
    torch.compile(function, backend="sigswap", options={"inner": lambda module, _: Record(module).run})(*inputs)
    return calls


def operands_of(function: Callable[..., Any], *inputs: Tensor) -> list[tuple[tuple[int, ...], tuple[int, ...], bool]]:
    """Of each call of the op in ``function``: the shapes of its query and its mask, and whether it is causal."""
    calls = calls_in(function, *inputs)
    return [(tuple(args[0].shape), tuple(args[4].shape), options["is_causal"]) for args, options in calls]
