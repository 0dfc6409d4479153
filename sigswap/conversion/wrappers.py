"""What people put around a model: seen through, where the model inside is what counts, or named in an error.

A *wrapper* hands its calls on to one model: what torch.compile returns, ``DistributedDataParallel``, ``DataParallel``,
``FullyShardedDataParallel``, a ``PeftModel``, lightning fabric's module. Any other module around a converted model (a
``LightningModule``, an ``nn.Sequential``) is a *holder*: it may do anything with it, so it is seen through only where
nothing is run.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn

from sigswap.conversion.untouched import unfrozen
from sigswap.errors import ArgumentError, ConversionError, Hint

# By kind: the module that defines the class, its name, and what of it is the model inside.
_KINDS = {
    "compiled": [("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod")],
    "parallel": [
        ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
        ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ],
    "sharded": [("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "module")],
    "adapted": [
        ("peft.peft_model", "PeftModel", "get_base_model()"),
        ("peft.mixed_model", "PeftMixedModel", "base_model"),
        ("peft.tuners.tuners_utils", "BaseTuner", "model"),
    ],
    "fabric": [("lightning.fabric.wrappers", "_FabricModule", "module")],
}


class Wrapper(NamedTuple):
    """``name``: of its class. ``spelled``: how the model ``inside`` is got from it."""

    kind: str
    name: str
    inside: nn.Module
    spelled: str


def check_module(model: object, name: str = "model") -> None:
    """Raises ArgumentError about the argument ``name`` unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{{argument}} must be a torch.nn.Module, not a {type(model).__name__}.", argument=name)


def wrapper_of(model: nn.Module) -> Wrapper | None:
    """``model`` as a wrapper; None if it is none. Packages that are not imported are not imported for it."""
    for kind, classes in _KINDS.items():
        for module, name, attribute in classes:
            cls = getattr(sys.modules.get(module), name, None)
            if cls is None or not isinstance(model, cls):
                continue
            found: Any = getattr(model, attribute.removesuffix("()"))
            return Wrapper(kind, name, found() if attribute.endswith("()") else found, f".{attribute}")
    return None


def wrappers_of(model: nn.Module) -> Iterator[Wrapper]:
    """The wrappers around a model, from the outermost on. Raises ArgumentError if it is no module."""
    check_module(model)
    wrapper = wrapper_of(model)
    while wrapper is not None:
        yield wrapper
        wrapper = wrapper_of(wrapper.inside)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside all its wrappers; ``model`` itself if it has none."""
    for wrapper in wrappers_of(model):
        model = wrapper.inside
    return model


def runnable(model: nn.Module, name: str = "model") -> nn.Module:
    """What to run in place of ``model``, to the same result: the model inside its wrappers, or inside those around
    adapters that are more than layers in it (prompts, a router of adapters).

    Raises ArgumentError about the argument ``name`` where the model inside has not got its parameters.
    """
    check_module(model, name)
    for wrapper in wrappers_of(model):
        if wrapper.kind == "sharded":
            raise ArgumentError(
                f"{{argument}} is inside {wrapper.name}, without which it cannot run.",
                argument=name,
                hint=Hint("Do so before it is wrapped."),
            )
        if wrapper.kind == "adapted" and _acts_outside(model):
            return model
        model = wrapper.inside
    return model


def _acts_outside(adapted: Any) -> bool:
    """Whether a model of peft's does more than the layers that it has put into the model inside."""
    tuner = adapted.base_model if type(adapted).__name__.startswith("Peft") else adapted
    known = getattr(sys.modules["peft.tuners.tuners_utils"], "BaseTuner", ())
    return not isinstance(tuner, known) or type(tuner).__name__ == "XLoraModel"


def check_undistributed(model: nn.Module, to_do: str, *, by_ranks: bool = False, in_parts: bool = False) -> None:
    """Raises ConversionError if the parameters of ``model`` are spread over processes, or kept equal in them by what
    knows only those that it was made with. ``to_do``: what is not possible then, "be converted" say. ``in_parts``: it
    is for what has parts that are DTensors; ``by_ranks``: or is the same on all ranks, too.
    """
    for wrapper in wrappers_of(model):
        if by_ranks and wrapper.name == "DistributedDataParallel":
            continue
        if wrapper.kind in ("parallel", "sharded"):
            raise ConversionError(
                f"a model inside {wrapper.name} cannot {to_do}.",
                argument="model",
                hint=Hint(f"Do so with what was given to {wrapper.name}, in each process, and wrap it afterwards."),
            )
    spread = None if by_ranks or in_parts else spread_parameter(model)
    if spread is not None:
        raise ConversionError(
            f"a model whose parameters are spread over devices ({spread}) cannot {to_do}.",
            argument="model",
            hint=Hint("Do so before fully_shard or tensor parallelism is applied to it."),
        )


def check_unreduced(model: nn.Module, to_do: str) -> None:
    """Raises ConversionError if there is a DistributedDataParallel around ``model``, which does not know of parameters
    that the model gets now, so that each rank would train its own. ``to_do``: what adds them, "be converted" say.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    with unfrozen():
        if _is_in_ddp(model):
            gc.collect()  # it may be one that nobody holds any more
        inside = _is_in_ddp(model)
    if inside:
        raise ConversionError(
            f"what is inside DistributedDataParallel cannot {to_do}: that would not reduce the gradients of the "
            "parameters that are added.",
            argument="model",
            hint=Hint(
                "Do so in each process before DistributedDataParallel is made, or delete that and make a new one."
            ),
        )


def _is_in_ddp(model: nn.Module) -> bool:
    kind = getattr(sys.modules.get("torch.nn.parallel.distributed"), "DistributedDataParallel", nn.Identity)
    # Not by issubclass: it is an abstract class, which asks Python code about each type in the process.
    wrappers = [thing for thing in gc.get_objects() if kind in type(thing).__mro__]
    return any(module is model for wrapper in wrappers for module in wrapper.module.modules())


def is_shard(tensor: Tensor) -> bool:
    """Whether it is a DTensor. torch.distributed.tensor is not imported for it."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether fully_shard (FSDP2) was called on ``module`` itself."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def spread_parameter(model: nn.Module) -> str | None:
    """The name of a parameter of which each process holds a part (fully_shard, tensor parallelism); None if none is."""
    for name, tensor in model.named_parameters():
        if is_shard(tensor):
            return name
    for path, module in model.named_modules():  # after a forward the outermost one's are whole for a while
        if is_fully_sharded(module):
            return f"{path}.*".removeprefix(".")
    return None


def check_uncompiled(model: nn.Module) -> None:
    """Raises ConversionError if ``model``, or a part of it, is compiled."""
    for path, module in model.named_modules():
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            raise ConversionError(
                f"{path or 'the model'} is compiled.",
                hint=Hint("Convert the model first and compile it afterwards: torch.compile(sigswap.convert(model))."),
            )
