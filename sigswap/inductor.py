"""Lowering under plain ``torch.compile``: sigswap's pass in inductor's own hook for passes before autograd.

``torch.compile(converted_model)`` without ``backend="sigswap"`` runs each ``scaled_dot_product_attention`` that was
swapped as FlashSigmoid already; attention that computes its own scores runs unfused, unless this pass lowers it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

import sigswap.kernels
import sigswap.passes
from sigswap.passes.lower import lower


class InductorLowering(CustomGraphPass):
    """Lowers the attention of converted models in the graphs that inductor compiles.

    For one model: ``torch.compile(model, options={"pre_grad_custom_pass": sigswap.InductorLowering()})``. For all:
    :func:`enable_inductor_lowering`. It acts on graphs that contain a sigswap op, and on nothing else in them: no model
    that was not converted changes.

    ``after``: a pass that runs before it.
    """

    def __init__(self, after: Callable[[torch.fx.Graph], None] | None = None) -> None:
        self.after = after

    def __call__(self, graph: torch.fx.Graph) -> None:
        if self.after is not None:
            self.after(graph)
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        values = [node.meta.get("example_value", node.meta.get("val")) for node in inputs]
        module = graph.owning_module
        if module is not None and all(value is not None for value in values):
            lower(module, values, handwritten=False)

    def uuid(self) -> Any:
        """Of the pass's own source, so that inductor's caches hit as long as that stays the same."""
        own = _source_hash()
        if self.after is None:
            return own
        before = self.after.uuid() if isinstance(self.after, CustomGraphPass) else None
        return None if before is None else (own, before)


class Enabled:
    """What :func:`enable_inductor_lowering` gives: ``remove()`` ends it, and so does the end of a ``with``."""

    def __init__(self, added: InductorLowering | None) -> None:
        """``added``: None, if it was enabled before; then whoever did that removes it."""
        self.added = added

    def remove(self) -> None:
        """Puts back the pass that was there before. Models that are compiled already stay as they are."""
        if self.added is not None and torch._inductor.config.pre_grad_custom_pass is self.added:
            torch._inductor.config.pre_grad_custom_pass = self.added.after

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def enable_inductor_lowering() -> Enabled:
    """Makes every later ``torch.compile`` by inductor lower the attention of converted models, in this process.

    It sets ``torch._inductor.config.pre_grad_custom_pass``; a pass that is there runs first. To be called once, or as
    ``with sigswap.enable_inductor_lowering(): ...`` around the compilation, which is the first call of the model.
    """
    present = torch._inductor.config.pre_grad_custom_pass
    if isinstance(present, InductorLowering):
        return Enabled(None)
    added = InductorLowering(present)
    torch._inductor.config.pre_grad_custom_pass = added
    return Enabled(added)


@functools.cache
def _source_hash() -> bytes:
    files = [path for package in (sigswap.passes, sigswap.kernels) for path in Path(package.__path__[0]).glob("*.py")]
    return get_hash_for_files(tuple(sorted(str(path) for path in files)))
