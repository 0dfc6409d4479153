"""What the compiler makes of a model's attention: which sites are lowered to the op, with what, and which not."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._pytree import tree_map_only

from sigswap.compiling.backend import swap_and_lower
from sigswap.config import SigmoidConfig
from sigswap.conversion.example_inputs import resolve_inputs
from sigswap.conversion.keeping import thread_state
from sigswap.conversion.untouched import Untouched
from sigswap.conversion.wrappers import runnable
from sigswap.errors import ExampleInputsError, Hint
from sigswap.page import fragment
from sigswap.passes.normalize import modules_of, source_of
from sigswap.report import folded, write_page
from sigswap.transaction import Transaction

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class CompiledSite:
    """One attention in a compiled graph. ``status``: "lowered" (``detail``: the operands of the op), "unfused" (a
    sigmoid that the graph computes; ``detail``: why) or "softmax" (it was not swapped; ``detail``: why).

    ``path``: of the module whose code it is, as in ``model.named_modules()``; of several that Dynamo compiles to one
    graph (behind graph breaks), the first.
    """

    path: str
    status: str
    detail: str


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """The sites of a model's graphs, in their order, and the number of graphs."""

    sites: list[CompiledSite]
    graphs: int

    def count(self, status: str) -> int:
        """How many sites have this status."""
        return sum(site.status == status for site in self.sites)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an .html page, in one file, whose table sorts. Raises ArgumentError as :meth:`sigswap.Report.save`."""
        write_page(path, "sigswap: compiled attention", [self])

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return dataclasses.asdict(self)

    def _repr_html_(self) -> str:
        """What notebooks show."""
        return fragment(self)

    def __rich__(self) -> Table:
        """A table in which repeated layers share a line."""
        from rich.table import Table

        counts = ", ".join(f"{self.count(s)} {s}" for s in ("lowered", "unfused", "softmax") if self.count(s))
        graphs = "1 graph" if self.graphs == 1 else f"{self.graphs} graphs"
        table = Table(title=f"compiled attention: {counts or 'none'}, in {graphs}", title_justify="left")
        for column in ("path", "status", "operands or reason"):
            table.add_column(column, overflow="fold")
        for path, site in folded(self.sites):
            table.add_row(path or "(the model)", site.status, site.detail)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        stream = io.StringIO()
        Console(file=stream, width=140).print(self)
        return stream.getvalue()


def explain(model: nn.Module, example_inputs: Any = None) -> CompileReport:
    """What ``torch.compile(model, backend="sigswap")`` does with each attention of ``model``, converted or not.

    The model is traced by Dynamo and run once on the example inputs, without gradients, in its mode (train or eval);
    nothing is compiled further. The model is not changed.

    Args:
        model: On any device; on meta, too, if its forward asks for no values.
        example_inputs: As for :func:`sigswap.convert`; without them, as convert finds them.

    Raises:
        ExampleInputsError: The model does not run on the example inputs.
    """
    model = runnable(model)
    sites: list[CompiledSite] = []
    graphs = 0
    paths = {id(module): path for path, module in model.named_modules()}

    def record(graph_module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        swapped, lowered = swap_and_lower(graph_module, inputs, SigmoidConfig())
        found: list[tuple[torch.fx.Node | None, str, str]] = []
        found += [(site.node, "lowered", site.operands) for site in lowered.lowered]
        found += [(source_of(alone.anchor), "unfused", alone.reason) for alone in lowered.left_alone]
        found += [(source_of(alone.anchor), "softmax", alone.reason) for alone in swapped.left_alone if alone.attention]
        sites.extend(CompiledSite(_path(node, paths), status, detail) for node, status, detail in found)
        return graph_module.forward

    parameter = next(model.parameters(), None)
    args, kwargs = resolve_inputs(model, example_inputs)[0]
    if parameter is not None:
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(parameter.device), (args, kwargs))
    torch._dynamo.reset()
    values = [(buffer.detach(), buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        with Transaction() as undo, undo:
            thread_state(undo.afterwards)
            undo.afterwards("the values of buffers", functools.partial(_put_back, values))
            with Untouched(model).keep(), torch.no_grad():
                torch.compile(model, backend=record)(*args, **kwargs)
    except Exception as error:
        raise ExampleInputsError(
            f"{type(model).__name__} could not be compiled and run on the example inputs "
            f"({type(error).__name__}: {error}).",
            hint=Hint("Pass {example_inputs} that its forward accepts.", {"example_inputs": ""}),
        ) from error
    finally:
        torch._dynamo.reset()
    return CompileReport(sites, graphs)


def _put_back(values: Sequence[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in values:
        with torch.no_grad(), _unsafe_preserve_version_counter(buffer):
            buffer.copy_(value)


def _path(node: torch.fx.Node | None, paths: Mapping[int, str]) -> str:
    """The path of the innermost module in whose forward a node was made. ``paths``: of the model's modules, by id."""
    for number, kind in reversed(modules_of(node) if node is not None else []):
        path = paths.get(number)
        if path is not None and not issubclass(kind, nn.Softmax | nn.Sigmoid):  # but the module that calls it
            return path
    return _compiled_path(paths)


def _compiled_path(paths: Mapping[int, str]) -> str:
    """The path of the module whose forward Dynamo compiles now, as a whole or from a graph break on: what such a
    forward does itself has no module in Dynamo's stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and (path := paths.get(id(frame.f_locals.get("self")))) is not None:
            return path
        frame = frame.f_back
    return ""
