"""accelerate's hooks, which spread a model over devices: seen past in a copy, carried over a change of class.

Where accelerate has dispatched a model (``dispatch_model``, ``from_pretrained(device_map=...)``, ``cpu_offload``), an
instance attribute ``forward`` calls ``_hf_hook`` before and after ``_old_forward``, the class's forward bound to the
module. So a new class runs inside the hook as soon as ``_old_forward`` is its forward. To detach the hooks and attach
them again would do more: it moves weights.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from sigswap.transaction import entries, whole

# The methods of a dispatched model that accelerate replaces on the instance, by ones that warn.
MOVES = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")


def forward_is_replaced(module: nn.Module) -> bool:
    """Whether an attribute of the instance runs ``module``, other than accelerate's hook around its class's forward."""
    own = vars(module)
    if "forward" not in own:
        return "_hf_hook" in own  # a torch.fx.GraphModule: accelerate replaces the forward of its class
    return not (_calls_hook(own["forward"]) and _is_class_forward(module, "_old_forward"))


def is_unhooked(module: nn.Module) -> bool:
    """Whether ``module`` had a hook: its class's forward is left on the instance, bound, when that is removed."""
    return "_hf_hook" not in vars(module) and _is_class_forward(module, "forward")


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Makes ``module`` an instance of ``cls``, also inside the hook that it has, and without what is left of one."""
    if is_unhooked(module):
        del module.__dict__["forward"]
    inside = _is_class_forward(module, "_old_forward")
    module.__class__ = cls
    if inside:
        module.__dict__["_old_forward"] = types.MethodType(cls.forward, module)


def class_of(module: nn.Module) -> Callable[[], None]:
    """What makes ``module`` an instance of its present class again, inside the hook that it has, with its present
    children."""
    cls, forwards, children = type(module), entries(vars(module), "forward", "_old_forward"), whole(module._modules)

    def put_back() -> None:
        if type(module) is not cls:
            module.__class__ = cls
        forwards()
        children()

    return put_back


def is_hooked(model: nn.Module) -> bool:
    """Whether any module of ``model`` has a hook."""
    return any("_hf_hook" in vars(module) for module in model.modules())


def leave_out(model: nn.Module, memo: dict[int, Any]) -> None:
    """Keeps hooks, and the weights that they hold, out of a deepcopy of ``model`` with ``memo``, to be stripped."""
    for module in model.modules():
        if "_hf_hook" in vars(module):
            memo[id(vars(module)["_hf_hook"])] = "left out"


def strip(model: nn.Module) -> None:
    """Makes each module of ``model`` what it was before the hooks, except where its weights are."""
    for module in model.modules():
        own = vars(module)
        if "_hf_hook" not in own:
            continue
        class_forward = _is_class_forward(module, "_old_forward")
        del own["_hf_hook"]
        inside = own.pop("_old_forward", None)
        if _calls_hook(own.get("forward")):
            del own["forward"]
            if not class_forward:
                own["forward"] = inside  # replaced before the hook came


def execution_device(module: nn.Module) -> torch.device | None:
    """Where offloaded weights of ``module``, on meta between its calls, are during one; None if it has none."""
    for part in module.modules():
        for hook in _hooks(part):
            if _offloads(hook) and hook.execution_device is not None:
                return torch.device(hook.execution_device)
    return None


def offloads_inner_modules(module: nn.Module) -> bool:
    """Whether the hook of ``module`` itself brings and takes the weights of all modules in it."""
    return any(_offloads(hook) and hook.place_submodules for hook in _hooks(module))


def without_values(model: nn.Module) -> str | None:
    """The name of a parameter of ``model`` that is on the meta device also while its module runs; None if none is."""
    brought: set[nn.Module] = set()
    for module in model.modules():
        if offloads_inner_modules(module):
            brought.update(module.modules())
        elif any(_offloads(hook) for hook in _hooks(module)):
            brought.add(module)
    for path, module in model.named_modules():
        if module in brought:
            continue
        name: str
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.is_meta:
                return name
    return None


def bring_parameters(state: nn.Module) -> None:
    """The same for what a converted module carries, where accelerate has come after the conversion: few as they are,
    its parameters stay where they are used, for its parts are not called, and nothing would bring them.
    """
    if any("_hf_hook" in part.__dict__ for part in (state, *state._modules.values()) if part is not None):
        bring_for_good(state)


def bring_for_good(module: nn.Module) -> None:
    """Puts offloaded weights of ``module`` where they are during a call, and leaves them there."""
    offloading = [(part, hook) for part in module.modules() for hook in _hooks(part) if _offloads(hook)]
    for part, hook in offloading:
        hook.pre_forward(part)
    if offloading:
        strip(module)


def _offloads(hook: Any) -> bool:
    """Whether weights are on meta while the module does not run."""
    return getattr(hook, "offload", False) is True


def _calls_hook(forward: Any) -> bool:
    return isinstance(forward, functools.partial) and forward.func.__module__ == "accelerate.hooks"


def _is_class_forward(module: nn.Module, name: str) -> bool:
    """Whether the attribute ``name`` of the instance is the forward of its class."""
    bound = vars(module).get(name)
    return isinstance(bound, types.MethodType) and bound.__self__ is module and bound.__func__ is type(module).forward


def _hooks(module: nn.Module) -> Iterator[Any]:
    found = [vars(module)["_hf_hook"]] if "_hf_hook" in vars(module) else []
    while found:
        hook = found.pop()
        found += getattr(hook, "hooks", ())  # those of a SequentialHook
        yield hook
