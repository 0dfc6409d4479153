"""The first key that each row sees under a window: another one for each row, and often another rank's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sigswap.sequence.all_to_all import differentiated_once
from sigswap.sequence.exchange import SequenceGroup
from sigswap.sequence.layout import Layout


class Routes(NamedTuple):
    """``sent``: of this rank's keys, as b * M + i, those that the ranks need, one rank's behind another's, and
    ``sent_sizes`` of them. ``places``: of the rows of this rank, likewise, those whose keys come, in the order in which
    they come: ``received_sizes`` from each rank."""

    sent: Tensor
    sent_sizes: list[int]
    places: Tensor
    received_sizes: list[int]


def routes(firsts: Sequence[Tensor], layout: Layout, rank: int, batch: int, device: torch.device) -> Routes:
    """``firsts``: of each rank, the position of each row's first key, int64 [B|1, M]."""
    owner = torch.empty(layout.total, dtype=torch.long)
    place = torch.empty(layout.total, dtype=torch.long)
    for other in range(layout.ranks):
        for start, stop, at in layout.chunks(other):
            owner[start:stop] = other
            place[start:stop] = torch.arange(at, at + stop - start)
    rows = torch.arange(batch)[:, None] * layout.length
    sent, sizes = [], []
    for needed in firsts:
        mine = owner[needed.expand(batch, -1)] == rank
        sent.append((rows + place[needed.expand(batch, -1)])[mine])
        sizes.append(int(mine.sum()))
    own = owner[firsts[rank].expand(batch, -1)].flatten()
    counts = torch.bincount(own, minlength=layout.ranks)
    return Routes(torch.cat(sent).to(device), sizes, own.argsort(stable=True).to(device), counts.tolist())


def first_keys(key: Tensor, group: SequenceGroup, along: Routes) -> Tensor:
    """The first key of each row, [B, Hk, M, D], of ``key`` [B, Hk, M, D], this rank's part. Has gradients."""
    found: Tensor = _FirstKeys.apply(key, group, along)
    return found


class _FirstKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor, group: SequenceGroup, along: Routes) -> Tensor:
        ctx.group, ctx.along = group, along
        flat = key.transpose(1, 2).flatten(0, 1)
        sent = flat[along.sent]
        received = torch.empty_like(flat)
        group.all_to_all(sent, received, along.sent_sizes, along.received_sizes)
        found = torch.empty_like(received)
        found[along.places] = received
        return found.view(key.shape[0], key.shape[2], key.shape[1], key.shape[3]).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        group, along = ctx.group, ctx.along
        given = grad.detach().transpose(1, 2)
        flat = given.flatten(0, 1)
        sent = flat[along.places]
        received = flat.new_empty((len(along.sent), *flat.shape[1:]))
        group.all_to_all(sent, received, along.received_sizes, along.sent_sizes)
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(flat.shape, dtype=wide, device=flat.device).index_add_(0, along.sent, received.to(wide))
        whole = total.to(grad.dtype).view(given.shape).transpose(1, 2)
        return differentiated_once(whole, grad), None, None
