"""Implementations of one attention that a model can switch between: transformers' and timm's settings for it."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sigswap.conversion.copies import tensors_of
from sigswap.conversion.recording import Example, Form, Recording
from sigswap.errors import ExampleInputsError
from sigswap.transaction import Note, Transaction, entries


def other_implementations(model: nn.Module, now: str | None) -> Iterator[tuple[str, Form]]:
    """Those that a user may switch ``model`` to after the conversion: a name, and the form of the model with it.

    ``now``: the implementation that it is converted in, if that is not the one that it has.
    """
    implementation = now or _attn_implementation(model)
    if implementation in ("sdpa", "eager"):
        other = "eager" if implementation == "sdpa" else "sdpa"

        @contextlib.contextmanager
        def switched(clone: Any) -> Iterator[None]:
            clone.set_attn_implementation(other)
            yield

        yield f"attn_implementation={other!r}", switched
    if any(isinstance(getattr(module, "fused_attn", None), bool) for module in model.modules()):
        yield "fused_attn toggled", _fused_attn_toggled


@contextlib.contextmanager
def _fused_attn_toggled(clone: nn.Module) -> Iterator[None]:
    for module in clone.modules():
        fused = getattr(module, "fused_attn", None)
        if isinstance(fused, bool):
            vars(module)["fused_attn"] = not fused
    yield


def _attn_implementation(model: nn.Module) -> str | None:
    """The attention implementation of a transformers model; None for any other."""
    if not hasattr(model, "set_attn_implementation"):
        return None
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


@dataclasses.dataclass(frozen=True)
class Reachable:
    """A change of what a transformers model runs inside one opaque op (flash, flex) to sdpa or eager, if it needs one.

    ``before`` has the implementations to change, by module path, and ``now`` what they become.
    """

    before: Mapping[str, str] = dataclasses.field(default_factory=dict)
    now: str | None = None

    @property
    def note(self) -> list[str]:
        """Says so in words."""
        if self.now is None:
            return []
        names = ", ".join(sorted(set(self.before.values())))
        return [f"The attention implementation was {names}, which cannot be seen into, and is {self.now} now."]

    def install(self, model: nn.Module, note: Note) -> None:
        """Changes it, for as long as ``note`` says."""
        if self.now is not None:
            set_implementations(model, dict.fromkeys(self.before, self.now), note)

    @contextlib.contextmanager
    def form(self, model: nn.Module) -> Iterator[None]:
        """The model so changed, and as it was afterwards."""
        with Transaction() as undo, undo:
            self.install(model, undo.afterwards)
            yield


def reachable(recording: Recording, examples: Sequence[Example]) -> Reachable:
    """What is to be changed so that all attention of the recording's model can be seen. The model is not changed.

    To which one: the first whose outputs equal the model's on the example inputs, or eager's, where its own cannot run
    here. Where neither does (attention sinks under sdpa, say) it stays, and is refused as opaque. On the meta device
    nothing can be compared, and the class's word for sdpa counts. A function that a user has registered stays, too: its
    softmax can be seen.
    """
    opaque = {}
    for path, module in recording.model.named_modules():
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if isinstance(implementation, str) and _is_opaque(implementation):
            opaque[path] = implementation
    chosen = _equal_to(recording, examples, opaque) if opaque else None
    return Reachable() if chosen is None else Reachable(opaque, chosen)


def _equal_to(recording: Recording, examples: Sequence[Example], opaque: Mapping[str, str]) -> str | None:
    if any(tensor.is_meta for tensor in tensors_of(recording.model)):
        return "sdpa" if getattr(recording.model, "_supports_sdpa", True) else "eager"

    def outputs(implementation: str | None) -> list[Tensor] | None:
        change = Reachable() if implementation is None else Reachable(opaque, implementation)
        try:
            given = [recording.plainly(example, change.form) for example in examples]
        except ExampleInputsError:
            return None
        return [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    wanted = outputs(None) or outputs("eager")
    if not wanted:
        return "sdpa"  # who runs it next says why it fails
    return next((name for name in ("sdpa", "eager") if _equal(outputs(name), wanted)), None)


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


def set_implementations(model: nn.Module, implementations: Mapping[str, str], note: Note | None = None) -> None:
    """Past the checks of the model's own method: flash attention need not be installed to be put back.

    What is no longer in the model is left out.
    """
    modules = dict(model.named_modules())
    for path, implementation in implementations.items():
        config: Any = getattr(modules.get(path), "config", None)
        if config is None:
            continue
        # Not the property _attn_implementation, which sets the parts' as well.
        if note is not None:
            note("the attention implementation", entries(vars(config), "_attn_implementation_internal"))
        config._attn_implementation_internal = implementation
