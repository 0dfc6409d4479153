"""Batches of inputs, and a model run on them: what calibration, ranking and distillation share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sigswap.conversion import accelerate_hooks
from sigswap.conversion.copies import device_of
from sigswap.conversion.example_inputs import as_call
from sigswap.conversion.keeping import hook
from sigswap.conversion.recording import Inputs, hint_of_ids
from sigswap.errors import ArgumentError, CalibrationError, Hint
from sigswap.transaction import Transaction

if TYPE_CHECKING:
    from rich.progress import Progress


def as_calls(batches: Any) -> Iterable[Inputs]:
    """``batches`` as calls (args, kwargs) that can be gone through again and again. Raises ArgumentError."""
    if isinstance(batches, Tensor | Mapping | tuple):
        batches = [batches]
    if not isinstance(batches, Iterable):
        raise ArgumentError(
            f"{{argument}} must be a list or another iterable of inputs, not a {type(batches).__name__}.",
            argument="batches",
        )
    if isinstance(batches, Iterator):
        batches = list(batches)
    return _Calls(batches)


@dataclasses.dataclass(frozen=True)
class _Calls:
    batches: Iterable[Any]

    def __iter__(self) -> Iterator[Inputs]:
        return (as_call(batch, "batches") for batch in self.batches)

    def __len__(self) -> int:
        """Raises TypeError where the batches cannot be counted before they have been gone through."""
        try:
            return len(self.batches)  # type: ignore[arg-type]
        except Exception as error:  # streams say it in many ways
            raise TypeError("no length is known") from error


def check_values(model: nn.Module, argument: str = "model") -> None:
    """Raises ArgumentError if ``model`` is on the meta device, unless accelerate brings its weights when it runs."""
    name = accelerate_hooks.without_values(model)
    if name is not None:
        raise ArgumentError(
            f"{{argument}} has no values to run on: {name} is on the meta device.",
            argument=argument,
            hint=Hint("Load its weights first (from_pretrained, or to_empty and load_state_dict)."),
        )


def gone() -> ArgumentError:
    """About batches that have been gone through once, and cannot be again."""
    return ArgumentError(
        "{argument} gave batches once, and then none: they are gone through several times.",
        argument="batches",
        hint=Hint("Pass them as a list."),
    )


def on_device(call: Inputs, device: torch.device) -> Inputs:
    """``call`` with its tensors on ``device``. To a GPU they are copied without waiting for what runs there."""

    def moved(x: Tensor) -> Tensor:
        if device.type == "cuda" and x.device.type == "cpu":
            return x.pin_memory().to(device, non_blocking=True)
        return x.to(device)

    found: Inputs = tree_map_only(Tensor, moved, call)
    return found


def call_model(model: nn.Module, call: Inputs, index: int, run: Callable[..., Any] | None = None) -> Any:
    """The model's output for a batch, moved to its device. Raises CalibrationError if it fails.

    ``run``: what is called in its place, a compiled form of it say. What fails to compile is an error of its own.
    """
    args, kwargs = on_device(call, device_of(model))
    try:
        return (model if run is None else run)(*args, **kwargs)
    except CalibrationError:
        raise
    except Exception as error:
        if run is not None and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise not_compiled(error) from error
        raise CalibrationError(
            f"{type(model).__name__} failed on batch {index} ({type(error).__name__}: {error}).",
            argument="batches",
            hint=hint_of_ids(call)
            or Hint(
                "Each batch must be a tensor, a tuple of positional arguments or a dict of keyword arguments that its "
                "forward takes."
            ),
        ) from error


def not_compiled(error: Exception) -> ArgumentError:
    """About ``compile``, for what Dynamo or a backend cannot do."""
    said = str(error).partition("\n\n")[0]  # and then Dynamo's advice
    return ArgumentError(
        f"{{argument}}: the step does not compile ({type(error).__name__}: {said}).",
        argument="compile",
        hint=Hint("Pass {compile}.", {"compile": "False"}),
    )


def main_output(output: Any) -> Tensor | None:
    """The first floating point tensor of two dimensions or more: hidden states or logits, not a loss."""
    if isinstance(output, Tensor):
        return output if output.dim() > 1 and output.is_floating_point() else None
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    for item in items:  # a plain loop, which Dynamo traces
        found = main_output(item)
        if found is not None:
            return found
    return None


def progress_bar(undo: Transaction, show: bool) -> Progress:
    """On standard error, until the transaction is left."""
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True, disable=not show)
    undo.afterwards("the progress bar", bar.stop)
    bar.start()
    return bar


@contextmanager
def outputs_of(model: nn.Module, paths: Sequence[str]) -> Iterator[list[tuple[str, Tensor]]]:
    """The outputs of the modules ``paths`` (what :func:`main_output` finds in them) while it is open, in the order of
    their calls. A call that returns no such tensor is not among them."""
    outputs: list[tuple[str, Tensor]] = []

    def noting(path: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            found = main_output(output)
            if found is not None:
                outputs.append((path, found))

        return note

    with Transaction() as undo, undo:
        for path in paths:
            hook(undo.afterwards, model.get_submodule(path), noting(path))
        yield outputs
