"""Dropout of attention on DTensors: each rank drops of its own heads and batches, and copies drop the same.

The op draws by the place of a score in what it is given, so that the rules of DTensor, by which each rank runs it on a
shard with one seed, would drop the same of all shards. Here each shard has a seed of its own. It comes from the random
state of the rank: where ranks have copies of a shard, from that of the first of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_STEP = 0x9E3779B97F4A7C15 % 2**61
"""Between the seeds of two shards: far enough for their numbers to have nothing in common."""


def dropped(
    attention: Callable[..., Tensor],
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    attn_mask: Any,
    first_token: Any,
    **options: Any,
) -> Tensor:
    """``attention`` of DTensors by their shards; all but batch and heads is brought together first.

    Args:
        attention: Is called on plain tensors, with the ``options`` and a ``seed``.
        query: [..., H, M, D], a DTensor; the others are DTensors or, if None, not there.
        first_token: Two of them, or None.

    Returns:
        [..., H, M, Dv], a DTensor on query's mesh, sharded as query is where that could stay.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = query.device_mesh
    others = [key, value, bias, attn_mask, *(first_token or (None, None))]
    axes = [_axis(placement, query, others, mesh.size(at)) for at, placement in enumerate(query.placements)]

    def local(tensor: Any) -> Tensor | None:
        if tensor is None:
            return None
        placements, gradients = [], []
        for axis in axes:
            whole = axis is None or -axis > tensor.dim() or tensor.shape[axis] == 1
            placements.append(Replicate() if whole or axis is None else Shard(tensor.dim() + axis))
            gradients.append(Partial() if whole and axis is not None else placements[-1])
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
        found: Tensor = tensor.redistribute(mesh, placements).to_local(grad_placements=gradients)
        return found

    q, k, v, row_bias, mask, *terms = map(local, (query, *others))
    if first_token is not None:
        first_token = type(first_token)(*terms)
    seed = _seed(mesh, axes, query.device)
    out = attention(q, k, v, bias=row_bias, attn_mask=mask, first_token=first_token, seed=seed, **options)
    sharded = [Replicate() if axis is None else Shard(query.dim() + axis) for axis in axes]
    made: Tensor = DTensor.from_local(out, mesh, sharded, run_check=False)
    return made


def _axis(placement: Any, query: Any, others: list[Any], ranks: int) -> int | None:
    """The axis of query, counted from the end, that stays sharded over so many ranks; None: none."""
    if not placement.is_shard():
        return None
    axis = int(placement.dim) - int(query.dim())
    sizes = {other.shape[axis] for other in others if other is not None and -axis <= other.dim()} - {1}
    if axis > -3 or any(size % ranks for size in (query.shape[axis], *sizes)):
        return None
    if axis < -3 and sizes - {query.shape[axis]}:  # a mask that is repeated along the batch
        return None
    return axis


def _seed(mesh: Any, axes: list[int | None], device: torch.device) -> Tensor:
    """int64 [1]: of this rank's shard."""
    from torch.distributed._functional_collectives import broadcast

    seed = torch.randint(0, 2**61, (1,), dtype=torch.int64, device=device)
    number = 0
    for at, axis in enumerate(axes):
        if axis is None:
            seed = broadcast(seed, 0, (mesh, at))
        else:
            number = number * mesh.size(at) + mesh.get_local_rank(at)
    return seed + shift(number)


def shift(number: int) -> int:
    """From the seed of a call, below 2 ** 61, to that of the shard with this number, below 2 ** 62."""
    return number * _STEP % 2**61
