"""The loop over the steps of a distillation: gradients, optimizer, learning rate, what is kept and what is reported."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sigswap.conversion.copies import device_of
from sigswap.conversion.example_inputs import accepts
from sigswap.conversion.recording import Inputs
from sigswap.errors import CalibrationError, Hint
from sigswap.training.language import check_length
from sigswap.training.lesson import Lesson
from sigswap.training.mixing import Mixer
from sigswap.training.resuming import EVERY, Kept, put_state, state_of
from sigswap.training.together import Together, by_mesh

WARMUP = 0.1
"""The share of the steps in which the learning rate rises."""
UNREAD = 10
"""Steps whose losses are read at once on a GPU, which has to be waited for."""


@dataclasses.dataclass
class Run:
    """The steps of both stages. ``losses``: of each stage, as far as they have been read."""

    lesson: Lesson
    groups: list[dict[str, Any]]
    mixer: Mixer
    accumulate: int
    kept: Kept | None
    callback: Callable[[int, float], object] | None
    lift: Callable[[float], None]
    among: Together
    losses: tuple[list[float], list[float]] = dataclasses.field(default_factory=lambda: ([], []))
    unread: list[Tensor] = dataclasses.field(default_factory=list)  # the losses of the present stage after those
    stage: int = 0
    optimizer: torch.optim.Optimizer | None = None
    # What has been learned from: steps of each stage, sequences, lookups. None: nothing yet, or values are changing.
    taken: tuple[int, int, int, int] | None = None
    problem: Exception | None = None  # between two batches, of which the other ranks are told at the next one

    def go(self, calls: Iterator[tuple[int, Inputs]], counts: tuple[int, int], bar: Any) -> None:
        """Takes the steps that are not done yet; ``counts``: of the layer-wise and of the end-to-end stage."""
        task = bar.add_task("Distilling", total=sum(counts))
        former = None if self.kept is None else self.kept.read(self.among.everyone)
        if former is not None:
            for losses, before in zip(self.losses, former["losses"], strict=True):
                losses[:] = before
            self.mixer.sequences, self.mixer.mixed = former["mixer"]
            for _ in range(self.accumulate * self.done):
                next(calls)
            bar.update(task, completed=self.done)
        for stage, steps in enumerate(counts):
            self.stage, self.optimizer = stage, _optimizer(self.groups)
            if former is not None and self.losses[stage] and (stage == 1 or not self.losses[1]):
                put_state(self.optimizer, self.groups, former["optimizer"], self.among.everyone)
            try:
                self._stage(self.optimizer, calls, steps, sum(counts), lambda **shown: bar.update(task, **shown))
                if stage == 1:
                    self.among.place(self.problem, 0, 0)
            except BaseException:
                if self.among.alone or self.among.failed_everywhere or not self.among.by_parts:
                    self._write()
                raise
        if counts[1]:
            self.lift(1.0)

    def _stage(
        self,
        optimizer: torch.optim.Optimizer,
        calls: Iterator[tuple[int, Inputs]],
        steps: int,
        whole: int,
        show: Callable[..., None],
    ) -> None:
        """The steps of the present stage that are not taken yet; ``whole``: those of both."""
        rates, losses = [group["lr"] for group in optimizer.param_groups], self.losses[self.stage]
        # A GPU that is waited for has nothing to do meanwhile.
        at_once = self.callback is not None or device_of(self.lesson.model).type == "cpu"
        while (step := len(losses) + len(self.unread)) < steps:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate_share(step, steps)
            if self.stage == 1:
                self.lift(step / max(1, steps - 1))
            self._gradients(calls)
            if at_once or step + 1 == steps or len(self.unread) == UNREAD:
                self._read()
            self._update(optimizer, (step + 1) / max(1, steps - 1))
            show(advance=1, **({"description": f"Distilling, loss {losses[-1]:.4g}"} if losses else {}))
            if self.done % EVERY == 0 or self.done == whole:
                self._locally(self._write)
            if self.callback is not None:
                self._locally(functools.partial(self.callback, self.done, losses[-1]))

    def _locally(self, action: Callable[[], object]) -> None:
        """Does what other ranks need not succeed in."""
        try:
            action()
        except Exception as error:
            if self.among.alone:
                raise
            self.problem = self.problem or error

    @property
    def done(self) -> int:
        return len(self.losses[0]) + len(self.losses[1]) + len(self.unread)

    def _gradients(self, calls: Iterator[tuple[int, Inputs]]) -> None:
        """Of one step; its loss is then the last one of ``unread``."""
        loss_of = self.lesson.end_to_end if self.stage == 1 else self.lesson.layerwise
        first, losses = self.accumulate * self.done, []
        problem: Exception | None = None
        try:
            for part in range(self.accumulate):
                index, call = self._next(calls, first + part)
                losses.append(loss_of(call, index, 1 / self.accumulate))
        except Exception as error:
            if self.among.failed_everywhere:
                raise
            problem = error
        self.among.average([p for group in self.groups for p in group["params"]], problem)
        self.unread.append(sum(losses[1:], losses[0]) / self.accumulate)

    def _next(self, calls: Iterator[tuple[int, Inputs]], number: int) -> tuple[int, Inputs]:
        """The next batch, the ``number``-th of the run, as it is learned from."""
        model, mixer, problem = self.lesson.model, self.mixer, self.problem
        index, call, rows, length = 0, None, 0, 0
        try:
            index, call = next(calls)
            check_length(model, call, index)
            call = mixer.cut(call, number)
            rows, length = mixer.size(call)
        except Exception as error:
            problem = problem or error
        place = self.among.place(problem, rows, length)
        assert call is not None
        return index, _lean(model, mixer(call, number, place), is_language=mixer.inputs is not None)

    def _update(self, optimizer: torch.optim.Optimizer, share: float) -> None:
        """``share``: of the stage, at the next step."""
        self.among.clip([p for group in self.groups for p in group["params"]], 1.0)
        self.taken = None
        optimizer.step()
        optimizer.zero_grad()
        if self.stage == 1:
            self.lift(min(1.0, share))  # here, for it moves parameters: what is written is never between two steps
        first, second = (len(losses) for losses in self.losses)
        more = len(self.unread)
        first, second = (first + more, second) if self.stage == 0 else (first, second + more)
        self.taken = (first, second, self.mixer.sequences, self.mixer.mixed)

    def _read(self) -> None:
        """Waits for the losses that are not read yet. Raises CalibrationError if one is not finite."""
        losses = self.losses[self.stage]
        found = torch.stack(self.unread).tolist() if self.unread else []
        self.unread.clear()
        for loss in found:
            if not math.isfinite(loss):
                if self.taken is not None and len(losses) < self.taken[self.stage]:
                    self.taken = None  # it has been learned from
                self.among.failed_everywhere = True  # the loss is that of all ranks
                raise CalibrationError(
                    f"the loss is {loss} at step {len(losses)}.",
                    hint=Hint("Lower {lr}, or check the batches for NaN.", {"lr": ""}),
                )
            losses.append(loss)

    def _write(self) -> None:
        """The state after the last step that has been learned from, if a file is asked for."""
        if self.kept is None or self.taken is None or self.optimizer is None:
            return
        try:
            self._read()
        except CalibrationError:  # an interruption came before it was seen
            if self.taken is None:
                return
        first, second, *mixed = self.taken
        losses = [self.losses[0][:first], self.losses[1][:second]]
        whole = functools.partial(state_of, self.optimizer, self.groups)
        self.kept.write(self.among, {"losses": losses, "mixer": mixed}, whole)


def _optimizer(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    # Not all parameters at once: some may be spread over ranks.
    each = [{**group, "params": found} for group in groups for found in by_mesh(group["params"]).values()]
    return torch.optim.AdamW(each, fused=True if on_gpu else None)


def _lean(model: nn.Module, call: Inputs, *, is_language: bool) -> Inputs:
    """``call`` without what only costs: a cache, in which a module that is run by itself would find the teacher's keys,
    and of a language model the labels, for its loss is not looked at, and a mask that hides nothing, which would be
    made into one of rows and keys."""
    args, kwargs = call
    if is_language:
        kwargs = {name: value for name, value in kwargs.items() if name != "labels"}
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all()):
            del kwargs["attention_mask"]
    if accepts(model, "use_cache"):
        kwargs = {**kwargs, "use_cache": False}
    return args, kwargs


def learning_rate_share(step: int, steps: int) -> float:
    """Of the largest learning rate, at ``step`` from 0: up over the first tenth, then down along a cosine."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
