"""sigswap's passes in inductor's own hooks: lowering before autograd, and visible launches after it.

``torch.compile(converted_model)`` without ``backend="sigswap"`` runs each ``scaled_dot_product_attention`` that was
swapped as the op already; attention that computes its own scores runs unfused, unless this pass lowers it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

import sigswap.kernels
import sigswap.passes
from sigswap.compiling import launches
from sigswap.compiling.launches import make_launches_visible
from sigswap.kernels import settings
from sigswap.passes.lower import lower
from sigswap.transaction import Transaction


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
        return _with_uuid_of(self.after, _source_hash())


class InductorLaunches(CustomGraphPass):
    """Makes inductor launch the Triton kernels of sigswap as its own, instead of calling the op.

    A call of the op costs the host more than its launches. The op stays where the GPU works longer than that (from 2^26
    scores) and a kernel needs what inductor does not pass on (tensor descriptors, a limit on registers); where lengths
    vary; and off the GPU. ``backend="sigswap"`` has this pass, as has :func:`enable_inductor_lowering`.
    For one model that plain ``torch.compile`` compiles: ``options={"post_grad_custom_post_pass": ...}``.

    ``after``: a pass that runs before it.
    """

    def __init__(self, after: Callable[[torch.fx.Graph], None] | None = None) -> None:
        self.after = after

    def __call__(self, graph: torch.fx.Graph) -> None:
        if self.after is not None:
            self.after(graph)
        config = torch._inductor.config
        # Else inductor may lay tensors out in other strides than those that the kernels are told.
        if not config.cpp_wrapper and config.triton_kernel_default_layout_constraint == "needs_fixed_stride_order":
            make_launches_visible(graph)

    def uuid(self) -> Any:
        """Of the source of passes and kernels, and of what else chooses between kernels."""
        own = _source_hash(), settings.sigmoid_form, torch.backends.cuda.matmul.fp32_precision
        return _with_uuid_of(self.after, own)


class Enabled:
    """What :func:`sigswap.enable_inductor_lowering` gives: ``remove()`` ends it, and so does the end of a ``with``."""

    def __init__(self, added: dict[str, tuple[Any, Any]]) -> None:
        """``added``: by inductor's name for a hook, what is there now and what was there before; none, if it was
        enabled before: whoever did that removes it."""
        self.added = added

    def remove(self) -> None:
        """Puts back the passes that were there before. Models that are compiled already stay as they are."""
        for hook, (now, before) in self.added.items():
            if getattr(torch._inductor.config, hook) is now:
                setattr(torch._inductor.config, hook, before)

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def enable_inductor_lowering() -> Enabled:
    """Makes every later ``torch.compile`` by inductor lower the attention of converted models, in this process.

    It sets ``pre_grad_custom_pass`` and ``post_grad_custom_post_pass`` of ``torch._inductor.config``; passes that are
    there run first. To be called once, or as ``with sigswap.enable_inductor_lowering(): ...`` around the compilation,
    which is the first call of the model, and its first backward pass.
    """
    added = {}
    kinds = (("pre_grad_custom_pass", InductorLowering), ("post_grad_custom_post_pass", InductorLaunches))
    with Transaction() as undo, undo:
        for hook, kind in kinds:
            before = getattr(torch._inductor.config, hook)
            now = with_pass(before, kind)
            if now is not before:
                undo.on_failure("inductor's passes", functools.partial(setattr, torch._inductor.config, hook, before))
                setattr(torch._inductor.config, hook, now)
                added[hook] = now, before
        return Enabled(added)


def with_pass(present: Any, kind: type[InductorLowering | InductorLaunches]) -> Any:
    """The value of a hook with a pass of the ``kind`` behind those that are ``present``; the same, if it has one."""
    passes = list(present) if isinstance(present, list | tuple) else [] if present is None else [present]
    if any(isinstance(each, kind) for each in passes):
        return present
    if len(passes) == 1 and not hasattr(custom_graph_pass, "get_custom_graph_passes"):  # a hook takes one pass only
        return kind(passes[0])
    return [*passes, kind()] if passes else kind()


def _with_uuid_of(after: Callable[[torch.fx.Graph], None] | None, own: Any) -> Any:
    if after is None:
        return own
    before = after.uuid() if isinstance(after, CustomGraphPass) else None
    return None if before is None else (own, before)


@functools.cache
def _source_hash() -> bytes:
    folders = [Path(package.__path__[0]) for package in (sigswap.passes, sigswap.kernels)]
    files = [Path(launches.__file__), *(path for folder in folders for path in folder.rglob("*.py"))]
    return get_hash_for_files(tuple(sorted(str(path) for path in files)))
