"""Regional compilation: the attention of an eager model compiled, and nothing else of it."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from sigswap.conversion.record import owners_of
from sigswap.transaction import Transaction, entries

_Model = TypeVar("_Model", bound=nn.Module)


def compile_attention(model: _Model, **options: Any) -> _Model:
    """Compiles the modules of a converted model that own its attention, each by itself, in place; returns the model.

    The rest of the model stays eager. Attention that computes its own scores (Swin, T5, research code) then runs in the
    kernel, forward and backward, in memory linear in the length. Layers of the same class share what was compiled.
    Inside :func:`sigswap.softmax` they run as softmax, compiled; :func:`sigswap.revert` makes them eager again.
    It goes through ``nn.Module.compile``: a copy, a pickle and a saved model are not compiled. Attention that also
    returns its probabilities stays unfused, and is logged as a warning: transformers' does so with
    ``attn_implementation="eager"``. Its default, "sdpa", runs the kernel without any compilation.

    Args:
        model: A converted model.
        options: Of ``torch.compile(backend="sigswap")``: ``mode`` or ``options``, ``dynamic``, ``fullgraph``.

    Raises:
        NotConvertedError: The model is not converted.
    """
    with Transaction() as undo, undo:
        for path, state in owners_of(model).items():
            module = model.get_submodule(path)
            undo.on_failure("what was compiled", entries(vars(module), "_compiled_call_impl"))
            undo.on_failure("what was compiled", entries(vars(state), "compiled"))
            state.compiled = True
            module.compile(backend="sigswap", **options)
    return model
