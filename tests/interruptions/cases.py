"""Calls that change a model, and what of the model and the process has to be as before, or as they leave it."""

from __future__ import annotations

import copy
import gc
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch.utils import _device, _python_dispatch

import sigswap
from sigswap.conversion.record import RECORD
from sigswap.conversion.state import decided_models
from sigswap.conversion.switches import OBSERVED, SWITCHED
from sigswap.saving import peft_hook, weights

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ByHand(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + ((q @ k.mT * 8**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Only(ByHand):
    """One that cannot be copied: it is looked at as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(self.seen))
        return super().forward(x)


def _note(module: nn.Module, args: Any, output: Any) -> None:
    """A user's hook."""


def model(*parts: Callable[[], nn.Module]) -> nn.Module:
    """In a state in which a user may have it: partly frozen, partly in eval mode, with a hook and a gradient."""
    torch.manual_seed(0)
    made = nn.Sequential(*[part() for part in parts]).train()
    made[0].eval()
    made[0].requires_grad_(False)
    made[-1].register_forward_hook(_note)
    for parameter in made[-1].parameters():
        parameter.grad = torch.ones_like(parameter)
    return made


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)


def converted(**config: Any) -> nn.Module:
    made = model(Attention, ByHand)
    return sigswap.convert(made, sigswap.SigmoidConfig(**config), example_inputs=X)


class Case(NamedTuple):
    """``build`` makes the model that ``call`` changes."""

    build: Callable[[], nn.Module]
    call: Callable[[nn.Module], Any]


def _distilled(made: nn.Module, **arguments: Any) -> Any:
    return sigswap.distill(made, batches=[X], steps=2, progress=False, lookups=False, **arguments)


def _softmax(made: nn.Module) -> None:
    with sigswap.softmax(made), sigswap.softmax(made[0]):
        made(X)


def _watched(made: nn.Module) -> None:
    with sigswap.watch(made):
        made(X)


RICH: dict[str, Any] = {"query_bias": True, "layer_scale": 1.0, "qk_norm": "rms"}

CASES = {
    "convert": Case(lambda: model(Attention, ByHand, encoder), lambda made: sigswap.convert(made, example_inputs=X)),
    "convert what cannot be copied": Case(lambda: model(Only), lambda made: sigswap.convert(made, example_inputs=X)),
    "convert and calibrate": Case(
        lambda: model(Attention), lambda made: sigswap.convert(made, example_inputs=X, calibrate_with=[X])
    ),
    "revert": Case(lambda: sigswap.convert(model(Attention, encoder), example_inputs=X), sigswap.revert),
    "calibrate": Case(
        lambda: converted(**RICH), lambda made: sigswap.calibrate(made, [X], row_cap=0.5, refine=1, progress=False)
    ),
    "calibrate without data": Case(converted, lambda made: sigswap.calibrate(made, X, refine=0, progress=False)),
    "distill": Case(
        lambda: converted(row_cap=0.1),
        lambda made: _distilled(
            made, teacher=None, train="sigmoid", layerwise_steps=1, checkpointing=True, lift_row_cap=2.0
        ),
    ),
    "distill from a teacher": Case(converted, lambda made: _distilled(made, teacher=_TEACHER)),
    "compare": Case(converted, lambda made: sigswap.compare(made, None, [X], progress=False)),
    "rank_sites": Case(converted, lambda made: sigswap.rank_sites(made, [X], progress=False)),
    "inspect": Case(lambda: model(Attention, ByHand), lambda made: sigswap.inspect(made, example_inputs=X)),
    "softmax": Case(converted, _softmax),
    "watch": Case(lambda: model(Attention), _watched),
    "set_row_cap": Case(converted, lambda made: sigswap.set_row_cap(made, 0.5)),
}
_TEACHER = model(Attention, ByHand)


def state_of(made: nn.Module) -> Any:
    """All of a model that can be compared with that of a copy of it."""
    modules = []
    for path, module in made.named_modules():
        own = {
            name: value
            for name, value in sorted(vars(module).items())
            if isinstance(value, bool | int | float | str | None)
        }
        tensors = [(name, _values(x)) for name, x in (*module._parameters.items(), *module._buffers.items())]
        hooks = [
            list(each.values())
            for name, each in sorted(vars(module).items())
            if name.endswith("hooks") and isinstance(each, dict)
        ]
        kind, children = type(module), list(module._modules)
        modules.append((path, kind.__qualname__, hasattr(kind, "_sigswap_base"), own, tensors, hooks, children))
    record = vars(made).get(RECORD)
    known = None
    if record is not None:
        known = {**record.to_dict(), "report": record.report.sites, "fitted": record.fitted_length}
    return modules, known, getattr(next(made.children()), "seen", None)


def _values(x: Tensor | None) -> Any:
    if x is None:
        return None
    return x.detach().tolist(), x.requires_grad, None if x.grad is None else x.grad.tolist()


def is_decided(made: nn.Module) -> bool:
    return made in decided_models


def process() -> Any:
    """What of the process and this thread has to be as before in any case, but for random numbers."""
    return (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        _device.CURRENT_DEVICE,
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch._ops._len_torch_dispatch_stack_pre_dispatch(),
        torch._C._only_lift_cpu_tensors(),
        _python_dispatch.is_in_torch_dispatch_mode(),
        eval_frame._stance,
        threading.Thread.start,
        ThreadPoolExecutor.submit,
        SWITCHED.get(),
        OBSERVED.get(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        torch._C._get_torch_function_state(),
        gc.isenabled(),
        weights._complete.get(),
        peft_hook._saving.get(),
    )


def random_numbers() -> Any:
    return torch.get_rng_state().tolist(), random.getstate()


def copied(made: nn.Module) -> nn.Module:
    """A copy with the gradients, which deepcopy leaves out, and with what was decided about the model."""
    if any(isinstance(module, Only) for module in made.modules()):
        return model(Only)
    other = copy.deepcopy(made)
    for a, b in zip(made.parameters(), other.parameters(), strict=True):
        b.grad = None if a.grad is None else a.grad.clone()
    if is_decided(made):
        decided_models.add(other)
    return other
