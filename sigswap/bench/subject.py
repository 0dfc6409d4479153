"""What a model of ``sigswap bench`` is: what runs on it, and how it computes its softmax attention as each peer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from sigswap.bench.peers.sdpa import BACKENDS


class ModelPeer(NamedTuple):
    """A way in which a model computes its softmax attention.

    Attributes:
        context: What to enter, while compiling and running.
        prepare: What to do to the model, once, which is then a copy. A context could change the model in each turn, but
            from then on Dynamo's guards would take longer (in torch 2.11), and for the peers alone.
    """

    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    prepare: Callable[[Any], object] | None = None


@dataclasses.dataclass
class Subject:
    """A model and what is run on it.

    Attributes:
        model: In eval mode or not: that is set for each phase. Shared by the peers that have no copy.
        inputs: Keyword arguments of a forward pass.
        training_inputs: Keyword arguments of the forward pass of a training step.
        output: The tensor that a forward pass is for, from what the model returns: what of it counts, without padding.
        backward: The backward pass, from what the model returns.
        peers: By name.
        counting: The peers that may count as the model without sigswap; the fastest one does.
        after_conversion: Restores in a model what convert has changed beyond the attention.
        reasons: Why the model does not run as other peers, by name.
        examples: What convert runs the model on; None: ``inputs`` and ``training_inputs``.
        stays_in_eval: A training step leaves the model in eval mode, in which it computes the same (no dropout).
    """

    model: nn.Module
    inputs: dict[str, Any]
    training_inputs: dict[str, Any]
    output: Callable[[Any], Tensor]
    backward: Callable[[Any], object]
    peers: Mapping[str, ModelPeer]
    counting: tuple[str, ...]
    after_conversion: Callable[[Any], object] = lambda model: None
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)
    examples: Sequence[dict[str, Any]] | None = None
    stays_in_eval: bool = False

    @property
    def leaves(self) -> list[Tensor]:
        """What a training step computes the gradients of."""
        tensors = (*self.model.parameters(), *self.training_inputs.values())
        return [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.requires_grad]


SDPA = {name: ModelPeer(context) for name, context in BACKENDS.items()}
"""The backends of ``scaled_dot_product_attention``, for a model that calls it."""


def set_attention(model: Any, implementation: str) -> None:
    """Sets the attention implementation of a transformers model, and of its parts."""
    for part in model.modules():
        if hasattr(part, "set_attn_implementation"):
            part.set_attn_implementation(implementation)


FLEX = {"flex": ModelPeer(prepare=functools.partial(set_attention, implementation="flex_attention"))}
"""FlexAttention, for a model of transformers."""

MASKED_PEERS = {name: peer for name, peer in SDPA.items() if name != "fa2"} | FLEX
"""Those of a model of transformers that hands a mask tensor to its attention."""

TAKE_NO_MASK = {"fa2": "FlashAttention-2, as a backend of scaled_dot_product_attention, takes no mask tensor."}
"""Why others are not among them."""
