"""Parameters of which each process holds a part: DTensors, by fully_shard (FSDP2) or by tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from sigswap.conversion.distributed_hooks import original_class
from sigswap.conversion.wrappers import is_fully_sharded, is_shard


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``, without gradient; every rank of its mesh has to ask. A plain tensor is whole."""
    if not is_shard(tensor):
        return tensor.detach()
    shard: Any = tensor.detach()
    kind = shard.device_mesh.device_type
    found: Tensor = (shard if shard.device.type == kind else shard.to(kind)).full_tensor()
    return found


def part(tensor: Tensor) -> Tensor:
    """What this process holds of it, in the same memory."""
    if not is_shard(tensor):
        return tensor.detach()
    shard: Any = tensor.detach()
    found: Tensor = shard.to_local()
    return found


def put(tensor: Tensor, value: Tensor) -> None:
    """Gives ``tensor`` the whole ``value``, which is the same on all ranks; they need not wait for one another."""
    if not is_shard(tensor):
        tensor.detach().copy_(value)
        return
    from torch.distributed.tensor import DTensor, Replicate

    shard: Any = tensor.detach()
    mesh = shard.device_mesh
    value = value.detach().to(mesh.device_type, shard.dtype)
    spread = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    shard.to_local().copy_(spread.redistribute(placements=shard.placements).to_local())


class Fully(NamedTuple):
    """A parameter of fully_shard's. ``whole``: the one that a forward sees in its place, once there was one. ``mesh``:
    over which fully_shard has sharded it. ``divided``: how tensor parallelism had before; None: it had not."""

    shard: nn.Parameter
    whole: nn.Parameter | None
    mesh: Any
    divided: Division | None


class Division(NamedTuple):
    """How a parameter is spread: over each axis of ``mesh`` by the placement that is next in order."""

    mesh: Any
    placements: tuple[Any, ...]


def fully_sharded(model: nn.Module) -> Iterator[Fully]:
    """The parameters that FSDP2 brings together for a forward, and whose gradients it averages over its ranks."""
    for module in model.modules():
        for group in groups_of(module):
            for each in group.fsdp_params:
                spec = getattr(each, "_unsharded_dtensor_spec", None) or getattr(each, "_tp_spec", None)
                divided = None if spec is None else Division(spec.mesh, tuple(spec.placements))
                whole = getattr(each, "_unsharded_param", None)
                yield Fully(each.sharded_param, whole, group.mesh_info.mesh, divided)


def groups_of(module: nn.Module) -> list[Any]:
    """The groups of parameters that fully_shard made for ``module`` itself (torch's FSDPParamGroup)."""
    if not is_fully_sharded(module):
        return []
    state: Any = module._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None)  # up to 2.11 there is one
    return [group for group in ([state._fsdp_param_group] if groups is None else groups) if group is not None]


def divided(model: nn.Module) -> dict[int, Division]:
    """How tensor parallelism has divided the parameters of ``model``, by their ids, whatever fully_shard did then."""
    fully = {id(each.shard): each.divided for each in fully_sharded(model)}
    found: dict[int, Division] = {}
    for parameter in model.parameters():
        shard: Any = parameter
        own = fully.get(id(parameter))
        if id(parameter) not in fully and is_shard(parameter):
            own = Division(shard.device_mesh, tuple(shard.placements))
        if own is not None:
            found[id(parameter)] = own
    return found


def reshard(model: nn.Module) -> None:
    """After a forward without backward the parameters of FSDP2's outermost module are whole: each process has its part
    again, which is what optimizers and checkpoints know."""
    for module in model.modules():
        if is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]


def original_name(module: nn.Module) -> str:
    """That of its class, before fully_shard made another one."""
    return original_class(module).__qualname__
