"""What a student learns from one batch: the losses beside its teacher, and their gradients.

Nothing in here waits for a GPU: a loss is handed on as a tensor, and what depends on a mask is decided where the batch
is before it is moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigswap.conversion.copies import device_of
from sigswap.conversion.keeping import hook
from sigswap.conversion.recording import Inputs
from sigswap.conversion.wrappers import is_shard
from sigswap.errors import CalibrationError
from sigswap.training import compiled
from sigswap.training.batches import call_model, main_output, not_compiled, on_device
from sigswap.training.compiled import Watched
from sigswap.training.inside import Inside
from sigswap.training.language import check_same_outputs
from sigswap.training.losses import Quotients, end_to_end_loss, quotients
from sigswap.training.teaching import Original
from sigswap.training.together import Together
from sigswap.transaction import Transaction


class Lesson:
    """The converted ``model``, its teacher ``original``, and the ``paths`` of the converted modules, which are in both.

    :meth:`layerwise` and :meth:`end_to_end` run one batch, under ``autocast`` if that is a dtype, add the gradients of
    its loss times ``weight`` to the model's parameters and return the loss, on its device. The batches of the ranks
    ``among`` which it is learned are one batch: the loss is that of all of them.
    """

    def __init__(
        self,
        undo: Transaction,
        model: nn.Module,
        original: Original,
        paths: Sequence[str],
        among: Together,
        autocast: torch.dtype | None = None,
        backends: tuple[str, str] | None = None,
    ) -> None:
        """``backends``: what compiles the model and the teacher end to end, and with inductor the losses."""
        self.model, self.original, self.paths, self.autocast = model, original, paths, autocast
        self.among, self.inside = among, Inside(undo, model)
        of_model, of_teacher = (None, None) if backends is None else backends
        self.student = Watched(undo, model, paths, of_model)
        self.teacher = Watched(undo, original.source, paths, of_teacher)
        self.quotients_of = quotients if backends is None else compiled.compiled(quotients, fullgraph=True)

    def layerwise(self, call: Inputs, index: int, weight: float = 1.0) -> Tensor:
        """One backward pass per module call, each through that module alone; not compiled."""
        calls: list[tuple[str, Any, Any, Tensor]] = []
        problem: Exception | None = None
        try:
            calls = self._taught(call, index)
        except Exception as error:
            problem = error
        truths = torch.zeros(2, len(calls), device=device_of(self.model))
        for each, (_, _, _, truth) in enumerate(calls):
            truths[1, each] = truth.float().square().sum()
        totals = self.among.totals(Quotients(*truths), problem)
        below = truths[1] if totals is None else totals.below
        total = torch.zeros((), device=device_of(self.model))
        for (path, args, kwargs, truth), energy in zip(calls, below.clamp(min=1e-12), strict=True):
            with self._cast():
                ours = main_output(self.inside(path, args, kwargs))
            assert ours is not None, "the teacher's module returns such a tensor"
            missing = F.mse_loss(whole_of(ours).float(), truth.float(), reduction="sum")
            loss = missing / energy.to(missing.device)
            torch.autograd.backward(weight * self.among.weight * loss / len(calls))
            total += loss.detach().to(total.device) / len(calls)
        return self.among.data.sum(total)

    def _taught(self, call: Inputs, index: int) -> list[tuple[str, Any, Any, Tensor]]:
        """The calls of the teacher's modules: their path, arguments and output."""
        calls: list[tuple[str, Any, Any, Tensor]] = []

        def recorder(path: str) -> Any:
            def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                found = main_output(output)
                if found is not None:
                    calls.append((path, args, kwargs, whole_of(found)))

            return record

        source = self.original.source
        with Transaction() as undo, undo:
            for path in self.paths:
                hook(undo.afterwards, source.get_submodule(path), recorder(path), with_kwargs=True)
            with self._teaching():
                call_model(source, call, index)
        if not calls:
            raise CalibrationError(f"batch {index} reaches none of the converted modules.", argument="batches")
        return calls

    def end_to_end(self, call: Inputs, index: int, weight: float = 1.0) -> Tensor:
        mine: Quotients | None = None
        modules, problem = 0, None
        try:
            mine, modules = self._compared(call, index)
        except Exception as error:
            problem = error
        totals = self.among.totals(mine, problem)
        assert mine is not None
        whole, loss = end_to_end_loss(mine, modules, totals)
        self.among.check_loss(loss)
        try:
            torch.autograd.backward(weight * self.among.weight * whole)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise not_compiled(error) from error
        return loss

    def _compared(self, call: Inputs, index: int) -> tuple[Quotients, int]:
        """What the loss is made of, and how many converted modules are in it."""
        mask = call[1].get("attention_mask")
        call = on_device(call, device_of(self.model))
        with self._teaching():
            truth, theirs = self.teacher(call, index)
        with self._cast():
            output, ours = self.student(call, index)
        t, y = main_output(truth), main_output(output)
        if t is None or y is None:
            raise CalibrationError(
                f"{type(self.model).__name__} returns no floating point tensor of two dimensions or more."
            )
        check_same_outputs(self.model, y, self.original.source, t, "teacher")
        if not ours:
            raise CalibrationError(f"batch {index} reaches none of the converted modules.", argument="batches")
        counted = _counted(mask, y, index)
        is_logits = getattr(output, "logits", None) is not None or y.shape[-1] == _vocabulary(self.model)
        y, t = whole_of(y), whole_of(t)
        outputs = [whole_of(x) for _, x in ours], [whole_of(x) for _, x in theirs]
        try:
            mine: Quotients = self.quotients_of(y, t.to(y.device), *outputs, counted, is_logits)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise not_compiled(error) from error
        return mine, len(ours)

    def _teaching(self) -> AbstractContextManager[Any]:
        """While it is open, the teacher runs as the original does, without gradients."""
        stack = ExitStack()
        stack.enter_context(self.original.running())
        stack.enter_context(torch.no_grad())
        stack.enter_context(self._cast())
        return stack

    def _cast(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device_of(self.model).type, self.autocast)


def whole_of(output: Tensor) -> Tensor:
    """An output of which each rank of tensor parallelism has a part, with its gradient; or ``output`` itself."""
    found: Tensor = output.full_tensor() if is_shard(output) else output  # type: ignore[attr-defined]
    return found


def _counted(mask: Any, y: Tensor, index: int) -> Tensor | None:
    """The positions [B, N] of an output [B, N, ..., C] that ``attention_mask`` does not hide; None: all."""
    if y.dim() < 3 or not isinstance(mask, Tensor) or mask.shape != y.shape[:2]:
        return None
    counted = mask.bool()
    if not bool(counted.any()):
        raise CalibrationError(f"attention_mask of batch {index} hides every position.", argument="batches")
    if bool(counted.all()):
        return None
    (moved,), _ = on_device(((counted,), {}), y.device)
    assert isinstance(moved, Tensor)
    return moved


def _vocabulary(model: nn.Module) -> int | None:
    return getattr(getattr(model, "config", None), "vocab_size", None)
