"""Implementations of one attention that a model can switch between: transformers' and timm's settings for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn


def other_implementations(model: nn.Module) -> Iterator[tuple[str, Callable[[Any], None]]]:
    """Those that a user may switch ``model`` to after the conversion: a name, and what switches a copy to it."""
    implementation = _attn_implementation(model)
    if implementation in ("sdpa", "eager"):
        other = "eager" if implementation == "sdpa" else "sdpa"
        yield f"attn_implementation={other!r}", lambda clone: clone.set_attn_implementation(other)
    if any(isinstance(getattr(module, "fused_attn", None), bool) for module in model.modules()):
        yield "fused_attn toggled", _toggle_fused_attn


def _toggle_fused_attn(clone: nn.Module) -> None:
    for module in clone.modules():
        fused = getattr(module, "fused_attn", None)
        if isinstance(fused, bool):
            vars(module)["fused_attn"] = not fused


def _attn_implementation(model: nn.Module) -> str | None:
    """The attention implementation of a transformers model; None for any other."""
    if not hasattr(model, "set_attn_implementation"):
        return None
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


class ReachableAttention:
    """Sets what a transformers model runs inside one opaque op (flash, flex) to sdpa; back again, unless it is kept.

    ``before`` holds the implementations that were changed, by module path.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before: dict[str, str] = {}
        self.kept = False

    def __enter__(self) -> ReachableAttention:
        for path, module in self.model.named_modules():
            implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
            if implementation not in (None, "sdpa", "eager"):
                self.before[path] = implementation
        # A config also sets its parts': all are read before the first is changed.
        set_implementations(self.model, dict.fromkeys(self.before, "sdpa"))
        return self

    def keep(self) -> None:
        self.kept = True

    def __exit__(self, *error: object) -> None:
        if not self.kept:
            set_implementations(self.model, self.before)


def set_implementations(model: nn.Module, implementations: Mapping[str, str]) -> None:
    """Past the checks of the model's own method: flash attention need not be installed to be put back."""
    for path, implementation in implementations.items():
        config: Any = model.get_submodule(path).config
        # Not the property _attn_implementation, which sets the parts' as well.
        config._attn_implementation_internal = implementation
