"""Implementations of one attention that a model can switch between: transformers' and timm's settings for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sigswap.conversion.copies import tensors_of
from sigswap.conversion.example_inputs import resolve_inputs
from sigswap.conversion.recording import Recording
from sigswap.errors import ExampleInputsError


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
    """Sets what a transformers model runs inside one opaque op (flash, flex) to sdpa or eager; back again, unless kept.

    To which one: the first whose outputs equal the model's on the example inputs, or eager's, where its own cannot run
    here. Where neither does (attention sinks under sdpa, say) it stays, and is refused as opaque. On the meta device
    nothing can be compared, and the class's word for sdpa counts. A function that a user has registered stays, too: its
    softmax can be seen.

    ``before`` holds the implementations that were changed, by module path; ``note`` says so in words.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.model = model
        self.example_inputs = example_inputs
        self.before: dict[str, str] = {}
        self.note: list[str] = []
        self.kept = False

    def __enter__(self) -> ReachableAttention:
        opaque = {}
        for path, module in self.model.named_modules():
            implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
            if isinstance(implementation, str) and _is_opaque(implementation):
                opaque[path] = implementation
        chosen = self._equal_to(opaque) if opaque else None
        if chosen is not None:
            self.before = opaque
            names = ", ".join(sorted(set(opaque.values())))
            self.note = [f"The attention implementation was {names}, which cannot be seen into, and is {chosen} now."]
            # A config also sets its parts': all are read before the first is changed.
            set_implementations(self.model, dict.fromkeys(opaque, chosen))
        return self

    def _equal_to(self, opaque: Mapping[str, str]) -> str | None:
        if any(tensor.is_meta for tensor in tensors_of(self.model)):
            return "sdpa" if getattr(self.model, "_supports_sdpa", True) else "eager"
        recording = Recording(self.model)
        inputs = resolve_inputs(self.model, self.example_inputs)

        def outputs(implementation: str | None) -> list[Tensor] | None:
            def prepare(model: nn.Module) -> None:
                if implementation is not None:
                    set_implementations(model, dict.fromkeys(opaque, implementation))

            try:
                given = [recording.plainly(call, prepare) for call in inputs]
            except ExampleInputsError:
                return None
            return [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

        wanted = outputs(None) or outputs("eager")
        if not wanted:
            return "sdpa"  # who runs it next says why it fails
        return next((name for name in ("sdpa", "eager") if _equal(outputs(name), wanted)), None)

    def keep(self) -> None:
        self.kept = True

    def __exit__(self, *error: object) -> None:
        if not self.kept:
            set_implementations(self.model, self.before)


def _is_opaque(implementation: str) -> bool:
    """Whether it runs attention inside one op: flash or flex attention, a kernel of a hub ("owner/name")."""
    if not any(part in implementation for part in ("flash", "flex", "/")):
        return False
    interface = getattr(sys.modules.get("transformers.modeling_utils"), "AttentionInterface", None)
    registered = None if interface is None else interface().get(implementation)
    return registered is None or registered.__module__.startswith("transformers.")


def _equal(outputs: list[Tensor] | None, wanted: list[Tensor]) -> bool:
    if outputs is None or [x.shape for x in outputs] != [x.shape for x in wanted]:
        return False
    return all(
        bool((a - b).abs().max() <= (1e-4 if a.dtype.itemsize > 2 else 2e-2) * b.abs().max())
        for a, b in zip(outputs, wanted, strict=True)
        if a.numel()
    )


def set_implementations(model: nn.Module, implementations: Mapping[str, str]) -> None:
    """Past the checks of the model's own method: flash attention need not be installed to be put back."""
    for path, implementation in implementations.items():
        config: Any = model.get_submodule(path).config
        # Not the property _attn_implementation, which sets the parts' as well.
        config._attn_implementation_internal = implementation
