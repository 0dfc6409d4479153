"""How to put back what calls change of a model and of torch's state in this thread, as steps of a transaction."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils import _device

from sigswap.conversion import thread_modes
from sigswap.conversion.stance import hold, release
from sigswap.conversion.switches import context_state
from sigswap.transaction import Note, Transaction, entries


def in_eval_mode(note: Note, *models: nn.Module) -> None:
    """Sets all modules to eval mode, by the flag alone: a model's own ``train`` may do more, and may fail."""
    training = {module: module.training for model in models for module in model.modules()}

    def put_back() -> None:
        for module, value in training.items():
            if module.training is not value:
                module.training = value

    note("train and eval mode", put_back)
    for module, value in training.items():
        if value:
            module.training = False


def gradients_enabled(note: Note, enabled: bool) -> None:
    note("the grad mode", functools.partial(torch.set_grad_enabled, torch.is_grad_enabled()))
    torch.set_grad_enabled(enabled)


def uncompiled(note: Note) -> None:
    """Compiled code runs as it is written."""
    use = object()
    note("torch.compile's stance", functools.partial(release, use))
    hold(use)


def quiet(undo: Transaction, *models: nn.Module) -> None:
    """Eval mode, no gradients, no compiled code, until the transaction is left."""
    in_eval_mode(undo.afterwards, *models)
    gradients_enabled(undo.afterwards, False)
    uncompiled(undo.afterwards)


def values_of(parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """What gives the parameters their present values."""
    before = [(parameter, parameter.detach().clone()) for parameter in parameters]

    def put_back() -> None:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)

    return put_back


_HOOKS = {
    "register_forward_hook": ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "register_forward_pre_hook": ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
}


def hook(note: Note, module: nn.Module, function: Callable[..., Any], **options: Any) -> None:
    """Registers a forward hook, for as long as ``note`` says."""
    _register(note, module, "register_forward_hook", function, options)


def pre_hook(note: Note, module: nn.Module, function: Callable[..., Any], **options: Any) -> None:
    """Registers a hook that runs before the forward, for as long as ``note`` says."""
    _register(note, module, "register_forward_pre_hook", function, options)


def _register(note: Note, module: nn.Module, method: str, function: Any, options: dict[str, Any]) -> None:
    hooks, *beside = (vars(module)[name] for name in _HOOKS[method])

    def remove() -> None:
        for key in [key for key, value in hooks.items() if value is function]:
            for each in beside:
                each.pop(key, None)
            del hooks[key]

    note("a hook of sigswap's", remove)
    getattr(module, method)(function, **options)


def device_mode(note: Note) -> None:
    """Puts back what ``with torch.device(...)`` could leave behind."""
    thread_modes.function_modes(note)
    note("torch.device", entries(vars(_device), "CURRENT_DEVICE"))


def thread_state(note: Note) -> None:
    """Puts back what an interruption could leave behind in this thread: modes, hooks, defaults, switches."""
    c: Any = torch._C  # whose stubs do not have all
    device_mode(note)
    thread_modes.dispatch_modes(note)
    thread_modes.saved_tensors_hooks(note)
    note("torch's default dtype", functools.partial(torch.set_default_dtype, torch.get_default_dtype()))
    note("torch's overrides", functools.partial(c._set_torch_function_state, c._get_torch_function_state()))
    context_state(note)
    note("the grad mode", functools.partial(torch.set_grad_enabled, torch.is_grad_enabled()))
