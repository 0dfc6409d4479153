"""``torch.compile(model, backend="sigswap")``: swaps softmax attention at compile time, then hands on to a compiler.

A converted model (:func:`sigswap.convert`) stays what it is, with what it leaves as softmax. An unconverted one
computes sigmoid attention, without new parameters, while its module stays as it was.
"""

from __future__ import annotations

import functools
import logging
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx

from sigswap.config import SigmoidConfig
from sigswap.conversion.places import SWAPPED_FORWARD
from sigswap.conversion.state import bias_terms, decided_models
from sigswap.errors import ArgumentError, Hint, UnswappableSiteError
from sigswap.functional import multi_head
from sigswap.functional.stand_ins import divided, ones, unshifted
from sigswap.functional.torch_functions import DIVISIONS, EXPONENTIALS, IN_PLACE, MULTIPLICATIONS, SHIFTS, SWAPS
from sigswap.passes.lower import LowerResult, lower
from sigswap.passes.normalize import graph_modules, modules_of
from sigswap.passes.swap import SwapResult, swap

logger = logging.getLogger("sigswap")
_OPTIONS = ("inner", "inner_options", "bias", "row_cap", "strict")
_KEPT = "its model is converted, and leaves it as softmax (exclude, strict=False, or inside sigswap.softmax)"


def sigswap_backend(
    graph_module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend named "sigswap".

    ``options`` of torch.compile:

    - ``inner``: the compiler that gets the swapped graph: the name of a Dynamo backend ("inductor" by default), or a
      callable ``(graph_module, example_inputs) -> callable``.
    - ``inner_options``: for it, as ``options`` of torch.compile are for inductor.
    - ``bias``: "visible" (default), an int n or a float, as in :class:`sigswap.SigmoidConfig`.
    - ``row_cap``: None (default) or a number, likewise.
    - ``strict``: an attention that cannot be swapped is an error (default) or is logged as a warning and stays softmax.

    ``mode`` of torch.compile goes to inductor.

    Raises ArgumentError (an unknown option) or UnswappableSiteError; Dynamo wraps both.
    """
    options = dict(options or {})
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise ArgumentError(
            f"{{argument}}: {unknown} are unknown to backend='sigswap'; it takes {list(_OPTIONS)}.", argument="options"
        )
    config = SigmoidConfig(bias=options.get("bias", "visible"), row_cap=options.get("row_cap"))
    inner = _inner_compiler(options.get("inner", "inductor"), options.get("inner_options"), mode)

    result, lowering = swap_and_lower(graph_module, example_inputs, config)
    stuck = [left for left in result.left_alone if left.attention and left.reason != _KEPT]
    reasons = "; ".join(dict.fromkeys(left.reason for left in stuck))
    if stuck and options.get("strict", True):
        raise UnswappableSiteError(
            f"{len(stuck)} softmax attention(s) in this graph cannot be swapped: {reasons}.",
            hint=Hint("Pass {options} to leave them as softmax.", {"options": "{'strict': False}"}),
        )
    if result.swapped and _is_decided(graph_module):
        logger.warning(
            "swapped attention that sigswap.convert has left as softmax, or sigswap.revert has made softmax again: "
            "backend='sigswap' swaps what is not converted in a graph in which nothing is. For softmax compile it with "
            "another backend, such as inductor."
        )
    logger.info("swapped %d softmax attention(s), %d softmax(es) left alone", result.swapped, len(result.left_alone))
    for left in result.left_alone:
        logger.log(
            logging.WARNING if left.attention else logging.INFO, "%s left as softmax: %s", left.anchor, left.reason
        )
    logger.info("lowered %d attention(s), %d stay unfused", len(lowering.lowered), len(lowering.left_alone))
    for reason in dict.fromkeys(left.reason for left in lowering.left_alone):
        logger.warning("an attention stays unfused: %s", reason)
    compiled: Callable[..., Any] = inner(graph_module, example_inputs)
    return compiled


def swap_and_lower(
    graph_module: torch.fx.GraphModule, example_inputs: Sequence[Any], config: SigmoidConfig
) -> tuple[SwapResult, LowerResult]:
    """The backend's passes, on a Dynamo graph, in place: each softmax attention becomes a sigmoid with the bias and the
    row cap of ``config``, and each sigmoid attention one call of the op."""
    visible_bias, const_bias = bias_terms(config)
    terms = {"visible_bias": visible_bias, "const_bias": const_bias, "row_cap": config.row_cap}
    keep = _KEPT if _is_converted(graph_module) else None
    swapped = swap(graph_module, example_inputs, _STAND_INS, terms, keep, _is_part(graph_module))
    return swapped, lower(graph_module, example_inputs, stand_ins=tuple(_STAND_INS.values()), shadow=swapped.shadow)


def _is_part(graph_module: torch.fx.GraphModule) -> bool:
    """Whether a graph break ended the graph, or came before it."""
    reason: Any = getattr(graph_module, "compile_subgraph_reason", None)  # Dynamo says there where the graph ended
    if reason is None:
        return False
    return reason.graph_break or any(frame.name.startswith("torch_dynamo_resume_in_") for frame in reason.user_stack)


def _is_converted(graph_module: torch.fx.GraphModule) -> bool:
    """Whether the graph is of a converted model, or a part of one that has a converted module in it."""
    for node in (node for module in graph_modules(graph_module) for node in module.graph.nodes):
        if f"in {SWAPPED_FORWARD}" in (node.meta.get("stack_trace") or ""):
            return True
        if any(hasattr(kind, "_sigswap_base") for _, kind in modules_of(node)):
            return True
    return False


def _is_decided(graph_module: torch.fx.GraphModule) -> bool:
    """Whether the graph is of a model that was converted or reverted."""
    seen = {number for node in graph_module.graph.nodes for number, _ in modules_of(node)}
    return any(id(module) in seen for model in decided_models for module in model.modules())


def _inner_compiler(inner: Any, inner_options: Any, mode: str | None) -> Callable[..., Any]:
    if callable(inner):
        given: Callable[..., Any] = inner
        return given
    if inner == "inductor":
        from torch._inductor.compile_fx import compile_fx

        from sigswap.compiling.inductor import InductorLaunches, with_pass

        patches = {**(torch._inductor.list_mode_options(mode) if mode else {}), **(inner_options or {})}
        hook = "post_grad_custom_post_pass"
        present = patches.get(hook, getattr(torch._inductor.config, hook))
        if hook not in patches or present is not None:  # else it was switched off
            patches[hook] = with_pass(present, InductorLaunches)
        return functools.partial(compile_fx, config_patches=patches)
    if inner == "sigswap":
        raise ArgumentError("{argument}: inner must be another backend than 'sigswap'.", argument="options")
    compiler = torch._dynamo.lookup_backend(inner)
    return functools.partial(compiler, **({"options": dict(inner_options)} if inner_options else {}))


def _whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which takes an attention before its own arguments, as one that takes bias and cap by keyword."""

    @functools.wraps(function)
    def stand_in(*args: Any, visible_bias: bool, const_bias: float, row_cap: float | None, **kwargs: Any) -> Any:
        attention = functools.partial(
            multi_head.sigmoid_heads, visible_bias=visible_bias, const_bias=const_bias, row_cap=row_cap
        )
        return function(attention, *args, **kwargs)

    return stand_in


_IN_PLACE = (torch.exp_, torch.Tensor.exp_, *IN_PLACE)
"""Whose result has to be in the memory of what they are given, which those of a stand-in are not."""

# A graph holds the call of a method by its name.
_STAND_INS: dict[Any, Callable[..., Any]] = {
    **{function: _whole(swap.stand_in) if swap.whole else swap.stand_in for function, swap in SWAPS.items()},
    **dict.fromkeys(SHIFTS, unshifted),
    **dict.fromkeys(EXPONENTIALS, ones),
    **dict.fromkeys((*DIVISIONS, *MULTIPLICATIONS, operator.truediv, operator.mul), divided),
}
_STAND_INS = {
    function.__name__ if isinstance(function, types.MethodDescriptorType) else function: stand_in
    for function, stand_in in _STAND_INS.items()
    if function not in _IN_PLACE
}
