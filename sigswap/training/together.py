"""Ranks that distill one student together: whose batches are whose, what their gradients are, and how an error of one
becomes one of all.

Each rank of data parallelism has batches of its own. The loss is that of all these batches as one: its quotients are
added up before the backward pass, so that each rank differentiates its part of the one loss, and the gradients of the
parts are added up after it, here or by fully_shard. Ranks of tensor parallelism have the same batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from sigswap.conversion.copies import device_of
from sigswap.conversion.wrappers import is_shard
from sigswap.distributed.ranks import DISTILLATION, Ranks
from sigswap.distributed.shards import fully_sharded, part, whole
from sigswap.errors import ArgumentError, CalibrationError, Hint
from sigswap.training.losses import Quotients
from sigswap.training.mixing import Place

BUCKET = 1 << 25
"""Gradients that are added up in one message, at most, unless one has more."""
NEAR = 1e-2
"""Relative difference of the losses of ranks that should have the same one."""


class Together:
    """``everyone``: the ranks that run the student. ``data``: those of them that have other batches than this one."""

    def __init__(self, model: nn.Module, everyone: Ranks, data: Ranks) -> None:
        self.everyone, self.data = everyone, data
        self.device = device_of(model)
        self.by_parts = any(is_shard(parameter) for parameter in model.parameters())
        self._reduced = {id(each.shard) for each in fully_sharded(model)}  # by FSDP2 itself
        self._checked = False
        self.failed_everywhere = False  # what was raised was raised in all ranks, at the same place

    @property
    def alone(self) -> bool:
        return self.everyone.size == 1

    def place(self, problem: Exception | None, rows: int, length: int) -> Place:
        """Before a batch: that of this rank's ``rows`` of ``length``. Raises ``problem``, or that another rank has
        one."""
        if self.alone:
            if problem is not None:
                raise problem
            return Place(0, rows, length)
        found = self.everyone.numbers(int(problem is not None), rows, length, device=self.device)
        if any(failed for failed, _, _ in found):
            self.agree(problem)
        if self.data.size == 1:
            return Place(0, rows, length)
        by_rank = dict(zip(self.everyone.members(), found, strict=True))
        sizes = [by_rank[rank] for rank in self.data.members()]
        before = sum(rows for _, rows, _ in sizes[: self.data.rank])
        return Place(before, sum(rows for _, rows, _ in sizes), min(length for _, _, length in sizes))

    def agree(self, problem: Exception | None) -> None:
        """Raises ``problem``, or that another rank has one; every rank calls this."""
        try:
            self.everyone.agree(problem)
        except Exception:
            self.failed_everywhere = True
            raise

    def totals(self, mine: Quotients | None, problem: Exception | None) -> Quotients | None:
        """After a forward: the sums of all ranks' quotients; None if there are no others. Raises ``problem``, or that
        another rank has one."""
        if problem is not None and (self.alone or self.by_parts):
            raise problem  # the others wait in the middle of a forward: they are told by the end of this process
        if self.data.size == 1:
            return None
        size = 0 if mine is None else len(mine.above)
        found = self.data.numbers(int(problem is not None), size, device=self.device)
        if any(failed for failed, _ in found):
            self.agree(problem)
        counts = [count for _, count in found]
        if mine is None or len(set(counts)) > 1:
            self.agree(CalibrationError(f"the ranks' batches reach {counts} modules.", argument="batches"))
        assert mine is not None
        return Quotients(*self.data.sum(torch.stack([mine.above.detach(), mine.below])))

    def check_loss(self, loss: Tensor) -> None:
        """Raises CalibrationError if ranks of tensor parallelism find another loss; once, for it has to wait."""
        if self._checked or self.everyone.size == self.data.size:
            return
        self._checked = True
        values = self.everyone.gathered(float(loss))
        if max(values) - min(values) > NEAR * max(map(abs, values)):
            self.agree(
                CalibrationError(
                    f"the ranks of tensor parallelism find other losses: {values}.",
                    argument="batches",
                    hint=Hint(
                        "Pass the same batches to all of them, and parallelize the model so that its outputs and those "
                        "of its attentions are whole on each (no sequence parallelism)."
                    ),
                )
            )

    @property
    def weight(self) -> float:
        """What a rank's part of the loss is multiplied by, for gradients are averaged."""
        return float(self.data.size)

    def average(self, parameters: Sequence[nn.Parameter], problem: Exception | None) -> None:
        """Puts the mean of the ranks' gradients in place of this one's, where FSDP2 has not. Raises ``problem``, or
        that another rank has one, where the ranks are at one place."""
        if problem is not None and (self.alone or self.by_parts):
            raise problem
        if self.data.size == 1:
            return
        own = [parameter for parameter in parameters if id(parameter) not in self._reduced]
        flags = [int(problem is not None), *(int(parameter.grad is not None) for parameter in own)]
        found = self.data.sum(torch.tensor(flags, dtype=torch.int32, device=self.data.place(self.device))).tolist()
        if found[0]:
            self.agree(problem)
        there = [parameter for parameter, count in zip(own, found[1:], strict=True) if count]
        for bucket in _buckets(there):
            self._average(bucket)

    def _average(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [part(parameter.grad) for parameter in parameters if parameter.grad is not None]
        flat = self.data.sum(torch.cat([gradient.flatten() for gradient in gradients])).div_(self.data.size)
        for gradient, mean in zip(gradients, torch.split(flat, [each.numel() for each in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> None:
        """As torch's clip_grad_norm_, whose norm this is, wherever the parts of the gradients are."""
        if not self.by_parts:
            torch.nn.utils.clip_grad_norm_(parameters, most)
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms = [
            whole(torch.nn.utils.get_total_norm(group)).to(self.device)
            for group in by_mesh(gradients).values()
            if group
        ]
        if norms:
            share = (most / (torch.stack(norms).norm() + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                mine = part(gradient)
                mine.mul_(share.to(mine.device, mine.dtype))


def by_mesh(tensors: Iterable[Any]) -> dict[Any, list[Any]]:
    """Those that one call of an optimizer can take: on one mesh, or plain ones."""
    found: dict[Any, list[Any]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device_mesh if is_shard(tensor) else None, []).append(tensor)
    return found


def together(model: nn.Module, group: Any) -> Together:
    """Who distills ``model`` together. ``group``: the ranks with batches of their own; None: as the model is spread.

    Raises ArgumentError where that cannot be told, or does not fit.
    """
    shards: list[Any] = [parameter for parameter in model.parameters() if is_shard(parameter)]
    if not shards:
        ranks = Ranks(DISTILLATION, group)
        return Together(model, ranks, ranks)
    everyone = Ranks(DISTILLATION)
    meshes = {each.mesh for each in fully_sharded(model)}
    if not meshes:
        return Together(model, everyone, _beside_tensor_parallelism(shards, everyone, group))
    mesh = next(iter(meshes))
    if group is not None:
        data = Ranks(DISTILLATION, group)
    elif mesh.size() == everyone.size:
        data = everyone
    elif mesh.ndim == 1:
        data = Ranks(DISTILLATION, mesh.get_group())
    else:
        raise ArgumentError(
            f"{{argument}} is needed for a model that is sharded over a part of {mesh}.",
            argument="group",
            hint=Hint("Pass the process group of the ranks that have other batches than this one, with it."),
        )
    if any(each.size() != data.size for each in meshes):
        raise ArgumentError(
            f"{{argument}} has {data.size} ranks, and fully_shard has sharded the model over {mesh}.", argument="group"
        )
    return Together(model, everyone, data)


def _beside_tensor_parallelism(shards: Sequence[Any], everyone: Ranks, group: Any) -> Ranks:
    holders = {rank for shard in shards for rank in shard.device_mesh.mesh.flatten().tolist()}
    hint = Hint("Pass the process group of the ranks that hold the same part of the model as this one, with it.")
    if group is None:
        if len(holders) != everyone.size:
            raise ArgumentError(
                f"{{argument}} is needed: of {everyone.size} ranks, {len(holders)} hold the parts of one model.",
                argument="group",
                hint=hint,
            )
        return Ranks(DISTILLATION, alone=True)
    data = Ranks(DISTILLATION, group)
    shared = holders.intersection(data.members()) - {torch.distributed.get_rank()}
    if shared:
        raise ArgumentError(
            f"{{argument}} has ranks that hold other parts of one model: {sorted(shared)}.", argument="group", hint=hint
        )
    return data


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """Of one device and dtype each."""
    kinds: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        bucket = kinds.setdefault((parameter.device, parameter.dtype), [])
        if bucket and sum(part(each).numel() for each in bucket) + part(parameter).numel() > BUCKET:
            yield list(bucket)
            bucket.clear()
        bucket.append(parameter)
    yield from kinds.values()


def values_of_ranks(parameters: Mapping[str, nn.Parameter]) -> list[tuple[str, tuple[int, ...], float | None]]:
    """What has to be the same on all ranks of parameters: names, shapes, and the sums of those that are whole."""
    plain = [name for name, parameter in parameters.items() if not is_shard(parameter)]
    sums: dict[str, float] = {}
    if plain:
        stacked = torch.stack([parameters[name].detach().double().sum().cpu() for name in plain])
        sums = dict(zip(plain, stacked.tolist(), strict=True))
    return [(name, tuple(parameter.shape), sums.get(name)) for name, parameter in parameters.items()]
