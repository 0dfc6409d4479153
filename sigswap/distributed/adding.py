"""Parameters that sigswap adds to a model that is spread over processes already: they are spread as those beside them.

Parameters per head are sharded as the heads are (:mod:`sigswap.distributed.heads`), and all that is added within a
module of ``fully_shard`` joins the parameters that it brings together.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from sigswap.conversion.record import owners_of
from sigswap.conversion.wrappers import is_shard
from sigswap.distributed.heads import divide_heads
from sigswap.distributed.ranks import CONVERSION, Ranks
from sigswap.distributed.shards import groups_of
from sigswap.transaction import Note


def holders(model: nn.Module) -> Ranks:
    """The ranks that hold parts of ``model``; this process alone if it is whole, or if they have no group in common."""
    meshes = {parameter.device_mesh for parameter in model.parameters() if is_shard(parameter)}  # type: ignore[attr-defined]
    if not meshes:
        return Ranks(CONVERSION, alone=True)
    everyone = Ranks(CONVERSION)
    mesh: Any = max(meshes, key=lambda each: each.size())
    if mesh.size() == everyone.size:
        return everyone
    return Ranks(CONVERSION, mesh.get_group()) if mesh.ndim == 1 else Ranks(CONVERSION, alone=True)


def spread_added(note: Note, model: nn.Module) -> None:
    """Spreads what sigswap has added to ``model`` and is whole on each rank, if what is beside it is spread.

    All ranks that hold parts of the model call this. ``note``: when it is undone. Raises ConversionError as
    :func:`sigswap.shard_heads` does.
    """
    divide_heads(note, model)
    for path, owner in owners_of(model).items():
        group = _group_of(model, path)
        if group is None:
            continue
        known = {id(each.sharded_param) for each in group.fsdp_params}
        for module in owner.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in known:
                    _join(note, group, module, name)


def _group_of(model: nn.Module, path: str) -> Any:
    """The parameters that fully_shard brings together for the module at ``path``; None: none."""
    while True:
        groups = groups_of(model.get_submodule(path))
        if groups:
            return groups[0]
        if not path:
            return None
        path = path.rpartition(".")[0]


def _join(note: Note, group: Any, module: nn.Module, name: str) -> None:
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo

    parameter: Any = module._parameters[name]
    note("a parameter's sharding", functools.partial(module._parameters.__setitem__, name, parameter))
    note(
        "the parameters of fully_shard",
        functools.partial(group.fsdp_params.__setitem__, slice(None), [*group.fsdp_params]),
    )
    if not parameter.is_meta and parameter.device != group.device:  # beside one that is offloaded after it is sharded
        parameter = nn.Parameter(parameter.detach().to(group.device), requires_grad=parameter.requires_grad)
        module._parameters[name] = parameter
    joined: Any = FSDPParam(
        parameter,
        ParamModuleInfo(module, name),
        group.mesh_info,
        group.post_forward_mesh_info,
        group.device,
        None,
        group.mp_policy,
        group.offload_policy,
    )
    joined.init_dtype_attrs(group.mp_policy)  # as its first forward does, which may be over
    group.fsdp_params.append(joined)
    module._is_fsdp_managed_module = True  # type: ignore[assignment]  # for Dynamo, as fully_shard does
    module._fsdp_use_orig_params = True  # type: ignore[assignment]
