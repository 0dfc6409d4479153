"""Sharding rules: how the attention ops run on DTensors (torch.distributed.tensor), each rank on its shard.

Batch and heads can be sharded, for nothing in attention crosses them: query, key and value alike, row bias and mask
with them where they have that axis. Query heads that share key heads can be sharded if each rank gets whole groups. All
else is brought together first, by DTensor. Gradients of what is whole on each rank are partial sums.

The rules are registered when an op first meets DTensors: importing torch.distributed.tensor takes most of a second.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

_DTENSORS = "torch.distributed.tensor"
_waiting: list[Any] = []


def shard_batch_and_heads(attention: Any) -> None:
    """Gives the ops of an :class:`sigswap.kernels.op.registration.AttentionOp` for [B, H, N, D] these rules."""
    _waiting.append(attention)


def meet_dtensors() -> None:
    """Registers the rules, if there can be DTensors."""
    if not _waiting or _DTENSORS not in sys.modules:
        return
    from torch.distributed.tensor.experimental import register_sharding

    for attention in _waiting:
        register_sharding(attention.op)(functools.partial(_forward, 1))
        register_sharding(attention.sums_op)(functools.partial(_forward, 2))
        register_sharding(attention.backward_op)(_backward)
    _waiting.clear()


def _forward(results: int, *inputs: Any, **options: Any) -> list[tuple[list[Any], list[Any]]]:
    """``inputs``: query, key, value, and if given row bias, mask and seed, of which each is None or has a shape."""
    return [([out] * results, placements) for out, placements in _shardings(inputs)]


def _backward(
    grad_out: Any, query: Any, key: Any, value: Any, bias: Any, attn_mask: Any, seed: Any, output_mask: Sequence[bool],
    row_delta: Any = None, **options: Any,
) -> list[tuple[list[Any], list[Any]]]:  # fmt: skip
    from torch.distributed.tensor import Partial, Replicate

    shardings = []
    for out, placements in _shardings((query, key, value, bias, attn_mask, seed)):
        gradients = [
            Replicate() if not need else Partial() if out != Replicate() and placement == Replicate() else placement
            for need, placement in zip(output_mask, placements, strict=False)
        ]
        delta = [] if row_delta is None else [out]
        shardings.append((gradients, [out, *placements, *[None] * len(output_mask), *delta]))
    return shardings


def _shardings(inputs: Sequence[Any]) -> list[tuple[Any, list[Any]]]:
    """(placement of the output, placements of ``inputs``) over one axis of a mesh."""
    from torch.distributed.tensor import Replicate, Shard

    query, key = inputs[:2]
    found: list[tuple[Any, list[Any]]] = [(Replicate(), [None if x is None else Replicate() for x in inputs])]
    for axis in (0, 1):
        grouped = axis == 1 and key.shape[1] != query.shape[1]
        if grouped and any(key.shape[1] % size for size in query.mesh.shape):
            continue
        placements: list[Any] = [Shard(axis)] * 3
        for index, tensor in enumerate(inputs[3:]):
            if tensor is None:
                placements.append(None)
            elif index == 2 or tensor.shape[axis] == 1:  # the seed, or what is the same for all
                placements.append(Replicate())
            elif tensor.shape[axis] == query.shape[axis]:
                placements.append(Shard(axis))
            else:  # a mask that is repeated along the batch
                break
        else:
            found.append((Shard(axis), placements))
    return found
