"""PyTorch's own context parallelism: ``torch.distributed.tensor.experimental.context_parallel``, and the plan for a
module of which that is made. Both hand ``scaled_dot_product_attention`` DTensors that are sharded along the sequence,
and have DTensor's dispatcher run their ring; sigmoid attention meets the same DTensors, and runs its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sigswap.sequence.active import activated

_SEQUENCE = 2


def on_parts(query: Any, attention: Callable[..., Tensor], *inputs: Any, **options: Any) -> Tensor | None:
    """``attention(*inputs, **options)`` of the parts of DTensors among them, with the ranks that have the others, where
    PyTorch's context parallelism is on and ``query`` is sharded along the sequence; else None."""
    if type(query) is Tensor or not hasattr(query, "device_mesh") or not _is_on(query):
        return None
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental import _attention as of_torch

    from sigswap.sequence.attention import SequenceAttention
    from sigswap.sequence.exchange import SequenceGroup

    def part(value: Any) -> Any:
        return value.to_local() if isinstance(value, DTensor) else value

    mesh = query.device_mesh
    balanced = bool(of_torch._cp_options.enable_load_balance)
    among = SequenceAttention(SequenceGroup(mesh.get_group()), balanced=balanced, agreed=True)
    with activated(among):
        out = attention(*map(part, inputs), **{name: part(value) for name, value in options.items()})
    return DTensor.from_local(out, mesh, query.placements, run_check=False)


def _is_on(query: Any) -> bool:
    placements = query.placements
    if len(placements) != 1 or not placements[0].is_shard(_SEQUENCE):
        return False
    handlers = type(query)._op_dispatcher._custom_op_handlers
    return torch.ops.aten._scaled_dot_product_flash_attention.default in handlers
