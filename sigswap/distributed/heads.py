"""Tensor parallelism: the parameters per head are sharded as the projections that make the heads are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from sigswap.conversion.record import converted_part, owners_of
from sigswap.conversion.state import HeadNorm, OwnerState, SiteState
from sigswap.errors import ConversionError, Hint


class _PerHead(NamedTuple):
    """A parameter whose first axis is the heads; ``path``: of its module below the owner's ``sigswap``."""

    path: str
    module: nn.Module
    name: str
    parameter: nn.Parameter


def shard_heads(model: nn.Module) -> nn.Module:
    """Shards sigswap's parameters per head over the ranks among which tensor parallelism has divided the heads.

    Call it on a converted model, in every process, after ``parallelize_module`` has sharded the projections of its
    attentions by columns (``ColwiseParallel``), and before ``fully_shard``, before the optimizer is made and before a
    sharded checkpoint is loaded. The parameters become DTensors on the projections' mesh with the placement
    ``Shard(0)``; their names and whole shapes stay. Rank 0's values count. Attentions whose projections are not
    sharded by columns are left, and so is what is sharded already.

    (``from_pretrained`` with a plan for tensor parallelism does this by itself.)

    Args:
        model: a converted model, or what is around one.

    Returns:
        ``model``.

    Raises:
        NotConvertedError: it is not converted.
        ConversionError: the heads of an attention cannot be divided evenly among the ranks, or its projections are
            sharded over several axes of a mesh. The model is as it was before the call.
    """
    part = converted_part(model)
    owners = owners_of(part)
    if not any(True for owner in owners.values() for _ in _per_head(owner)):
        return model
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    sharded = []
    for path, owner in owners.items():
        meshes = list(_meshes(part.get_submodule(path), owner))
        if not meshes:
            continue
        mesh = meshes[0]
        if mesh.ndim != 1 or any(other != mesh for other in meshes):
            raise ConversionError(
                f"{path or 'the model'}: its projections are sharded over {mesh}, of which the heads have no one axis.",
                argument="model",
                hint=Hint("Call shard_heads before fully_shard, and parallelize it over one axis: mesh['tp']."),
            )
        for each in _per_head(owner):
            if isinstance(each.parameter, DTensor):
                continue
            if each.parameter.shape[0] % mesh.size():
                raise ConversionError(
                    f"{path or 'the model'}: {each.parameter.shape[0]} heads cannot be divided evenly among "
                    f"{mesh.size()} ranks.",
                    argument="model",
                    hint=Hint("Parallelize it over a number of ranks that divides its heads."),
                )
            sharded.append((each, mesh))
    for each, mesh in sharded:
        whole = each.parameter.detach()
        values = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None if whole.is_meta else 0)
        setattr(each.module, each.name, nn.Parameter(values, requires_grad=each.parameter.requires_grad))
    return model


def with_heads(plan: Mapping[str, str], model: nn.Module) -> dict[str, str]:
    """transformers' plan for tensor parallelism of ``model``, and sigswap's parameters per head of each attention of
    which it shards a projection by columns."""
    added = {}
    for path, owner in owners_of(model).items():
        wildcards = _wildcards(path)
        if any(style == "colwise" and name.startswith(f"{wildcards}.") for name, style in plan.items()):
            for each in _per_head(owner):
                added[_wildcards(f"{path}.sigswap.{each.path}.{each.name}")] = "colwise"
    return {**plan, **added}


def _wildcards(name: str) -> str:
    """As transformers' plans have a name: its numbers are ``*``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _per_head(owner: OwnerState) -> Iterator[_PerHead]:
    for path, module in owner.named_modules():
        if isinstance(module, SiteState | HeadNorm):
            for name, parameter in module.named_parameters(recurse=False):
                yield _PerHead(path, module, name, parameter)


def _meshes(module: nn.Module, added: OwnerState) -> Iterator[Any]:
    """The meshes over which matrices of ``module`` are sharded by columns; those of ``added`` in it do not count."""
    from torch.distributed.tensor import DTensor, Shard

    own = {id(parameter) for parameter in added.parameters()}
    for parameter in module.parameters():
        if id(parameter) in own or not isinstance(parameter, DTensor) or parameter.dim() < 2:
            continue
        if any(isinstance(placement, Shard) and placement.dim == 0 for placement in parameter.placements):
            yield parameter.device_mesh
