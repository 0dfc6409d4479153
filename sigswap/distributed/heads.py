"""Tensor parallelism: the parameters per head are sharded as the projections that make the heads are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from sigswap.conversion.record import converted_part, owners_of
from sigswap.conversion.state import HeadNorm, OwnerState, SiteState
from sigswap.distributed.shards import Division, divided
from sigswap.errors import ConversionError, Hint
from sigswap.transaction import Note, Transaction, entries


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

    (A model that is converted when it is spread already does not need this, nor does one of ``from_pretrained`` with a
    plan for tensor parallelism.)

    Args:
        model: a converted model, or what is around one.

    Returns:
        ``model``.

    Raises:
        NotConvertedError: it is not converted.
        ConversionError: the heads of an attention cannot be divided evenly among the ranks, or its projections are
            sharded over several axes of a mesh. The model is as it was before the call.
    """
    with Transaction() as undo, undo:
        divide_heads(undo.on_failure, converted_part(model))
    return model


def divide_heads(note: Note, part: nn.Module) -> None:
    """:func:`shard_heads` of the model that was converted itself. ``note``: when it is undone."""
    owners = owners_of(part)
    if not any(True for owner in owners.values() for _ in _per_head(owner)):
        return
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    divisions = divided(part)
    sharded = []
    for path, owner in owners.items():
        mesh = mesh_of_heads(part, path, owner, divisions)
        if mesh is None:
            continue
        for each in _per_head(owner):
            if id(each.parameter) in divisions:
                continue
            if isinstance(each.parameter, DTensor):
                raise ConversionError(
                    f"{path or 'the model'}: fully_shard has sharded its parameters per head, which are to be sharded "
                    "as the heads are.",
                    argument="model",
                    hint=Hint("Call shard_heads before fully_shard."),
                )
            if each.parameter.shape[0] % mesh.size():
                raise _uneven(path, each.parameter.shape[0], mesh)
            sharded.append((each, mesh))
    for each, mesh in sharded:
        whole = each.parameter.detach()
        values = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None if whole.is_meta else 0)
        note("the parameters per head", entries(each.module._parameters, each.name))
        setattr(each.module, each.name, nn.Parameter(values, requires_grad=each.parameter.requires_grad))


def check_even(part: nn.Module) -> None:
    """Raises ConversionError where tensor parallelism has cut heads of a converted model through."""
    divisions = divided(part)
    for path, owner in owners_of(part).items() if divisions else ():
        mesh = mesh_of_heads(part, path, owner, divisions)
        for site in owner.sites() if mesh is not None else ():
            if site.plan.heads % mesh.size():
                raise _uneven(path, site.plan.heads, mesh)


def _uneven(path: str, heads: int, mesh: Any) -> ConversionError:
    return ConversionError(
        f"{path or 'the model'}: {heads} heads cannot be divided evenly among {mesh.size()} ranks.",
        argument="model",
        hint=Hint("Parallelize it over a number of ranks that divides its heads."),
    )


class DividedHeads(NamedTuple):
    """``mesh``: the ranks among which tensor parallelism has divided a model; None: it has not. ``owners``: what
    sigswap added to the modules whose heads are divided among them, each with an equal number of heads."""

    mesh: Any = None
    owners: frozenset[OwnerState] = frozenset()

    @property
    def size(self) -> int:
        return 1 if self.mesh is None else int(self.mesh.size())

    @property
    def number(self) -> int:
        """Of this rank among them, from 0."""
        return 0 if self.mesh is None else int(self.mesh.get_local_rank())

    @property
    def first(self) -> int:
        """The global rank that tells those that hold one copy of the model from others."""
        return 0 if self.mesh is None else int(self.mesh.mesh.min())

    def among(self, owner: OwnerState) -> int:
        """How many ranks have heads of ``owner``."""
        return self.size if owner in self.owners else 1


def divided_heads(part: nn.Module) -> DividedHeads:
    """Of the model that was converted itself, and whose parameters are not brought together at the moment.

    Raises ConversionError where its parts are over several meshes, or parameters per head are whole beside heads that
    are divided.
    """
    divisions = divided(part)
    meshes = {division.mesh for division in divisions.values()}
    if not meshes:
        return DividedHeads()
    mesh = next(iter(meshes))
    if len(meshes) > 1 or mesh.ndim != 1:
        raise ConversionError(
            f"its parameters are divided over {' and '.join(map(str, meshes))}, not over one axis.",
            argument="model",
            hint=Hint("Apply tensor parallelism over one axis of a mesh: mesh['tp']."),
        )
    found = set()
    for path, owner in owners_of(part).items():
        if mesh_of_heads(part, path, owner, divisions) is None:
            continue
        found.add(owner)
        if any(id(each.parameter) not in divisions for each in _per_head(owner)):
            raise ConversionError(
                f"{path or 'the model'}: its heads are divided by tensor parallelism, and its parameters per head not.",
                argument="model",
                hint=Hint("Call sigswap.shard_heads(model) after parallelize_module."),
            )
    return DividedHeads(mesh, frozenset(found))


def mesh_of_heads(part: nn.Module, path: str, owner: OwnerState, divisions: Mapping[int, Division]) -> Any:
    """The axis of a mesh over which the projections of the module at ``path`` are sharded by columns; None: none.

    ``divisions``: as :func:`sigswap.distributed.shards.divided` has them. Raises ConversionError for several axes.
    """
    meshes = list(_meshes(part.get_submodule(path), owner, divisions))
    if not meshes:
        return None
    mesh = meshes[0]
    if mesh.ndim != 1 or any(other != mesh for other in meshes):
        raise ConversionError(
            f"{path or 'the model'}: its projections are sharded over {mesh}, of which the heads have no one axis.",
            argument="model",
            hint=Hint("Call shard_heads before fully_shard, and parallelize it over one axis: mesh['tp']."),
        )
    return mesh


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


def _meshes(module: nn.Module, added: OwnerState, divisions: Mapping[int, Division]) -> Iterator[Any]:
    """The meshes over which matrices of ``module`` are sharded by columns; those of ``added`` in it do not count."""
    own = {id(parameter) for parameter in added.parameters()}
    for parameter in module.parameters():
        division = divisions.get(id(parameter))
        if id(parameter) in own or division is None or parameter.dim() < 2:
            continue
        if any(placement.is_shard(0) for placement in division.placements):
            yield division.mesh
