"""A copy of a model around other tensors, to be run in its place."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from sigswap.conversion import accelerate_hooks, distributed_hooks
from sigswap.conversion.wrappers import is_shard

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
_HARMLESS = ("transformers.", "torch.nn.utils.")
"""Where hooks come from that write to nothing but the module and what they are given."""


Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments of one call


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a module of ``model`` holds: parameters, buffers, and tensors in plain attributes."""
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            for leaf in tree_leaves(value) if isinstance(value, list | tuple | dict) else [value]:
                if isinstance(leaf, Tensor):
                    yield leaf


def alive(kind: type[Tensor]) -> list[Tensor]:
    """The tensors of that type, or of one derived from it, that there are in the process."""
    kinds, found = [kind], {kind}
    while kinds:
        new = set(type.__subclasses__(kinds.pop())) - found
        found |= new
        kinds.extend(new)
    return [thing for thing in gc.get_objects() if type(thing) in found]


def device_of(model: nn.Module) -> torch.device:
    """The model's device, of its first tensor; the CPU for a model on the meta device."""
    for tensor in tensors_of(model):
        if not tensor.is_meta:
            return tensor.device
    return torch.device("cpu")


def copied(model: nn.Module, mode: FakeTensorMode | None) -> tuple[nn.Module, list[Tensor]]:
    """A copy of the module tree, without the users' hooks and those that spread it over processes, and all tensors that
    were made for it.

    Its tensors are fake ones of ``mode``, all on one device; without a mode they are others with the model's own
    memory. Raises whatever ``copy.deepcopy`` of an attribute raises.
    """
    memo: dict[int, object] = {}
    keep: list[Tensor] = []
    device = device_of(model)
    for tensor in tensors_of(model):
        if id(tensor) not in memo:
            memo[id(tensor)] = _shared(tensor) if mode is None else fake(tensor, mode, device)
            keep.append(tensor)
    accelerate_hooks.leave_out(model, memo)
    distributed_hooks.leave_out(model, memo)
    with distributed_hooks.copyable(model):
        clone = copy.deepcopy(model, memo)
    accelerate_hooks.strip(clone)
    distributed_hooks.strip(clone)
    for module in clone.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        # Users' hooks may write into the users' own objects.
        hooks = {**module._forward_hooks, **module._forward_pre_hooks}
        for key in [key for key, hook in hooks.items() if not _stays(hook)]:
            for name in _HOOKS:
                module.__dict__[name].pop(key, None)
    return clone, [thing for thing in memo.values() if isinstance(thing, Tensor)]


def placed(inputs: Inputs, place: Callable[[Tensor], Tensor]) -> tuple[Inputs, list[Tensor]]:
    """A copy of the arguments, in which ``place`` of it stands for each tensor, and all tensors so placed.

    Objects that are given (a KV cache) are copied with the tensors in them, for the call may write to them; one that
    cannot be copied is given as it is.
    """
    mode = _Placing(place)
    memo: dict[int, Any] = {}

    def leaf_of_copy(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return mode.placed(leaf, memo)
        try:
            return copy.deepcopy(leaf, memo)
        except Exception:
            return leaf

    with torch.no_grad(), mode:
        copied_inputs: Inputs = tree_map(leaf_of_copy, inputs)
    return copied_inputs, mode.made


class _Placing(TorchFunctionMode):
    """``copy.deepcopy`` of any tensor, also of one that autograd has made, is ``place`` of it."""

    def __init__(self, place: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.place = place
        self.made: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.placed(*args) if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))

    def placed(self, tensor: Tensor, memo: dict[int, Any]) -> Any:
        if id(tensor) not in memo:
            memo[id(tensor)] = self.place(tensor)
            self.made.append(memo[id(tensor)])
        return memo[id(tensor)]


def _stays(hook: object) -> bool:
    where = hook.__module__ if hasattr(hook, "__qualname__") else type(hook).__module__
    return f"{where}.".startswith(_HARMLESS) and not f"{where}.".startswith(distributed_hooks.OF_TRANSFORMERS)


def _shared(tensor: Tensor) -> Tensor:
    value = tensor.detach()
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def fake(tensor: Tensor, mode: FakeTensorMode, device: torch.device) -> Tensor:
    """``tensor`` as a fake tensor of ``mode``, on ``device`` if it was on another or on meta; of a part, the whole."""
    if isinstance(tensor, FakeTensor) and tensor.fake_mode is mode:
        return tensor
    if tensor.device == device and not isinstance(tensor, FakeTensor) and not is_shard(tensor):
        return mode.from_tensor(tensor)
    with mode:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
