"""Distillation of a converted model from the softmax model, and the parameter groups of a fine-tuning.

Two stages, as LoLCATs (arXiv 2410.10254) and MOHAWK (arXiv 2408.10189) have them: first each converted module alone
learns the output that the teacher's has on the teacher's own inputs, then the whole model learns the teacher's output.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigswap.conversion.copies import device_of
from sigswap.conversion.example_inputs import accepts
from sigswap.conversion.record import is_converted, owners_of
from sigswap.conversion.recording import Inputs
from sigswap.conversion.softmax import softmax
from sigswap.conversion.state import OwnerState
from sigswap.errors import ArgumentError, CalibrationError, Hint
from sigswap.training.batches import as_calls, call_model, main_output, outputs_of, progress_bar
from sigswap.training.language import check_length, check_same_outputs
from sigswap.training.lifting import lifted_caps
from sigswap.training.lookups import Lookups
from sigswap.training.mixing import Mixer, mixer_for
from sigswap.training.recompute import checkpointed_layers
from sigswap.training.resuming import EVERY, Kept
from sigswap.training.sums import first_tensor

SIGMOID_LR = 10.0
"""The learning rate of sigswap's parameters, relative to the base model's: they are few, and of the size of scores."""
HIDDEN = 2.0
"""How much the error of the converted modules' own outputs counts end to end, relative to the output's loss."""
WARMUP = 0.1
"""The share of the steps in which the learning rate rises."""


@dataclasses.dataclass(frozen=True)
class DistillationReport:
    """Losses by step. ``layerwise``: the mean over the modules of the relative squared error of their outputs;
    ``end_to_end``: the loss of the model's output, without that of the modules' own. ``lookups``: which sequences
    that need looking back were mixed in, and how many; or why none. ``row_cap``: where the row caps stand."""

    layerwise: list[float]
    end_to_end: list[float]
    lookups: str = ""
    row_cap: str = ""

    def __str__(self) -> str:
        stages = (("layer-wise", self.layerwise), ("end to end", self.end_to_end))
        parts = [
            f"{name}: {len(losses)} steps, loss {losses[0]:.4g} to {losses[-1]:.4g}"
            for name, losses in stages
            if losses
        ]
        return "; ".join(
            [*parts, *filter(None, (self.lookups, self.row_cap)), "sigswap.compare shows what the loss does not"]
        )


def param_groups(
    model: nn.Module, lr: float, *, weight_decay: float = 0.01, sigmoid_lr: float | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters of a converted ``model`` in groups for a ``torch.optim`` optimizer.

    sigswap's parameters (c_h, w_h, QK-norm, LayerScale, hybrid-norm) get the learning rate ``sigmoid_lr`` (10 times
    ``lr`` by default) and no weight decay: decay would pull a calibrated bias back to the paper's. Vectors and scalars
    of the base model (biases, norms) get ``lr`` and no decay, all else ``lr`` and ``weight_decay``. Each group has a
    ``name``; empty ones are left out. Parameters with ``requires_grad=False`` are not in any, so that it works under
    LoRA, whose adapters are in the base groups.

    >>> optimizer = torch.optim.AdamW(sigswap.param_groups(model, 2e-5))
    >>> Trainer(model, args, optimizers=(optimizer, None), ...)

    Raises NotConvertedError, or ArgumentError if nothing is trainable.
    """
    ours = {id(parameter) for state in owners_of(model).values() for parameter in state.parameters()}
    groups: dict[str, list[nn.Parameter]] = {"sigmoid": [], "decay": [], "no_decay": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            name = "sigmoid" if id(parameter) in ours else "decay" if parameter.dim() > 1 else "no_decay"
            groups[name].append(parameter)
    rates = {"sigmoid": SIGMOID_LR * lr if sigmoid_lr is None else sigmoid_lr}
    made = [
        {
            "name": name,
            "params": parameters,
            "lr": rates.get(name, lr),
            "weight_decay": weight_decay if name == "decay" else 0.0,
        }
        for name, parameters in groups.items()
        if parameters
    ]
    if not made:
        raise ArgumentError(
            "{argument} has no parameter with requires_grad=True: there is nothing to train.", argument="model"
        )
    return made


def distill(
    model: nn.Module,
    teacher: nn.Module | None,
    batches: Any,
    *,
    steps: int,
    layerwise_steps: int = 0,
    train: Literal["all", "sigmoid"] = "all",
    lookups: bool | float | Lookups = True,
    tokens: Any = None,
    lr: float = 1e-4,
    sigmoid_lr: float | None = None,
    weight_decay: float = 0.0,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
    lift_row_cap: float | None = None,
    resume: str | os.PathLike[str] | None = None,
    callback: Callable[[int, float], object] | None = None,
    progress: bool = True,
) -> DistillationReport:
    """Trains a converted ``model`` to compute what ``teacher`` computes, in place. Calibrate it first.

    Each of ``layerwise_steps`` steps takes a batch through the teacher, and each converted module learns to give, on
    the teacher's inputs to it, the teacher's output: the relative squared error. Then each of ``steps`` steps compares
    the models' outputs: the Kullback-Leibler divergence of logits, or the relative squared error of other outputs plus
    that of their mean over the positions (those that ``attention_mask`` hides do not count). The mean relative squared
    error of the converted modules' own outputs is added, scaled to twice that loss. AdamW; the learning rate rises over
    the first tenth of each stage and falls to 0 along a cosine. Both models run in eval mode, without dropout. If it
    fails, the parameters are as they were.

    Text alone does not teach a language model to look back, and its loss does not show it. So in both stages a quarter
    of a decoder's sequences are lookups (:class:`sigswap.Lookups`): random tokens of its vocabulary that repeat, in
    place of sequences of the user's, chosen at random, of the same length and without padding; of batches of one
    sequence each fourth is one. Encoders, encoder-decoders and vision models get none. The report says what was done.

    Args:
        model: converted; its modules' trainable parameters are those with ``requires_grad``.
        teacher: the model before the conversion, or a converted copy, which then runs as softmax. ``None``: ``model``
            itself, with the swap switched off, without a second copy; that needs ``train="sigmoid"``, for a teacher
            whose weights are trained is none.
        batches: as for :func:`sigswap.calibrate`; they are gone through again and again until the steps are done.
        steps: end-to-end steps.
        layerwise_steps: layer-wise steps, before those.
        train: ``"sigmoid"``: sigswap's parameters alone; ``"all"``: everything with ``requires_grad``.
        lookups: the share of lookups, or a :class:`sigswap.Lookups` with the kinds, too. ``True``: a quarter, if the
            model is a decoder; a share is an error if it is not. ``False`` or 0: none.
        tokens: what lookups are made of: the model's tokenizer, whose special tokens and gaps are left out, or token
            ids. ``None``: all ids that the model knows but those that its config names as special.
        lr: the largest learning rate of the base parameters.
        sigmoid_lr: that of sigswap's parameters; 10 times ``lr`` by default.
        weight_decay: of the base model's matrices.
        accumulate: batches per step, whose gradients are averaged.
        autocast: ``torch.bfloat16``, say: both models run under ``torch.autocast`` with it, the losses in float32.
        checkpointing: recomputes the model's repeated layers in backward instead of keeping what is inside them.
        lift_row_cap: the row cap that each capped attention has after the end-to-end stage. It rises from what it is,
            by the same factor in each of the first 80% of the steps. ``math.inf``: at last there is none, which is the
            paper's sigmoid. For another schedule call :func:`sigswap.set_row_cap` in ``callback``.
        resume: a file to which the state is written, each hundredth step and when the run is interrupted. If it is
            there, the run goes on from it, to the same result if ``batches`` come in the same order; after the last
            step it gives that result at once.
        callback: called after each step with the number of steps done, of both stages, and the step's loss. The model
            is in eval mode then; ``sigswap.compare(model, teacher, ...)`` may be called.
        progress: shows a progress bar with the loss and the time left on standard error, if that is a terminal.

    Memory beyond the two models', per trained parameter: its gradient, AdamW's two moments and the value that a failed
    run goes back to, 16 bytes in float32.

    Raises:
        NotConvertedError: the model is not converted.
        ArgumentError: an argument is not as above, a sequence is longer than the model's positions, or ``resume``
            holds the state of another run.
        CalibrationError: a model fails on a batch, the loss is not finite, a module of ``model`` is not in the
            teacher, or the teacher's output is of another shape (a teacher with another vocabulary).
    """
    states = owners_of(model)
    _check_arguments(model, teacher, locals())
    source = model if teacher is None else teacher
    missing = [path for path in states if not _has(source, path)]
    if missing:
        raise CalibrationError(
            f"{{argument}} has no module {missing[0]!r}: it must be the model before the conversion.",
            argument="teacher",
        )
    ours = {parameter for state in states.values() for parameter in state.parameters()}
    base = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad and p not in ours}
    offloaded = [name for name, parameter in base.items() if parameter.is_meta]
    if train == "all" and offloaded:
        raise ArgumentError(
            f"{offloaded[0]} is on the meta device (accelerate offloads it, say), where it cannot be trained.",
            argument="model",
            hint=Hint("Pass {train}, or switch its requires_grad off.", {"train": "'sigmoid'"}),
        )
    frozen = base if train == "sigmoid" else {}
    calls = _endless(as_calls(batches))
    with ExitStack() as stack:
        stack.enter_context(_training(model, source, frozen))
        first = next(calls)
        check_length(model, first[1], 0)
        with ExitStack() as as_softmax:
            if is_converted(source):
                as_softmax.enter_context(softmax(source))
            mixer = mixer_for(lookups, tokens, source, first[1])
        if checkpointing:
            stack.enter_context(checkpointed_layers(model, list(states)))
        groups = param_groups(model, lr, weight_decay=weight_decay, sigmoid_lr=sigmoid_lr)
        settings = {
            "steps": steps,
            "layerwise_steps": layerwise_steps,
            "accumulate": accumulate,
            "lr": lr,
            "lift_row_cap": lift_row_cap,
        }
        names = {parameter: name for name, parameter in model.named_parameters()}
        trained = {names[p]: p for group in groups for p in group["params"]}
        run = _Run(
            _Lesson(model, source, list(states), autocast),
            groups,
            mixer,
            accumulate,
            None if resume is None else Kept(Path(resume), settings, trained),
            callback,
            stack.enter_context(lifted_caps(model, lift_row_cap)),
        )
        bar = stack.enter_context(progress_bar(progress))
        run.go(itertools.chain([first], calls), (layerwise_steps, steps), bar)
    return DistillationReport(*run.losses, lookups=str(mixer), row_cap=_caps_of(states))


def _caps_of(states: Mapping[str, OwnerState]) -> str:
    """Where the row caps stand, as a report says it; "" if there are none."""
    caps = [site.row_cap for state in states.values() for site in state.sites() if site.row_cap is not None]
    return f"row cap {min(caps):.4g} to {max(caps):.4g} in {len(caps)} attentions" if caps else ""


def _check_arguments(model: nn.Module, teacher: nn.Module | None, given: Mapping[str, Any]) -> None:
    """Raises ArgumentError for a value of distill's that is not allowed, by name in ``given``."""
    for name in ("steps", "layerwise_steps", "accumulate"):
        value, least = given[name], 1 if name == "accumulate" else 0
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            unit = "batches" if name == "accumulate" else "steps"
            raise ArgumentError(
                f"{{argument}} must be a number of {unit}, {least} or more, not {value!r}.", argument=name
            )
    if given["train"] not in ("all", "sigmoid"):
        raise ArgumentError(f"{{argument}} must be 'all' or 'sigmoid', not {given['train']!r}.", argument="train")
    if (teacher is None or teacher is model) and given["train"] == "all":
        what = "None" if teacher is None else "the model"
        raise ArgumentError(
            f"{{argument}}={what} takes the model's own weights as the teacher's, which train='all' would change.",
            argument="teacher",
            hint=Hint("Pass {train}, or {teacher}.", {"train": "'sigmoid'", "teacher": "copy.deepcopy(model)"}),
        )
    for name in ("lr", "sigmoid_lr", "weight_decay"):
        rate = given[name]
        optional = name == "sigmoid_lr" and rate is None
        if not optional and (not isinstance(rate, int | float) or isinstance(rate, bool) or not rate >= 0):
            raise ArgumentError(f"{{argument}} must be a number, 0 or more, not {rate!r}.", argument=name)
    autocast = given["autocast"]
    if autocast not in (None, torch.bfloat16):
        raise ArgumentError(
            f"{{argument}} must be None or torch.bfloat16, not {autocast!r} (float16 would need scaled losses).",
            argument="autocast",
        )
    cap = given["lift_row_cap"]
    if cap is not None and (not isinstance(cap, int | float) or isinstance(cap, bool) or not cap > 0):
        raise ArgumentError(f"{{argument}} must be a number above 0, not {cap!r}.", argument="lift_row_cap")
    if not isinstance(given["checkpointing"], bool):
        raise ArgumentError(
            f"{{argument}} must be True or False, not {given['checkpointing']!r}.", argument="checkpointing"
        )
    Lookups.of(given["lookups"])


@dataclasses.dataclass
class _Run:
    """The loop over the steps of both stages."""

    lesson: _Lesson
    groups: list[dict[str, Any]]
    mixer: Mixer
    accumulate: int
    kept: Kept | None
    callback: Callable[[int, float], object] | None
    lift: Callable[[float], None]
    losses: tuple[list[float], list[float]] = dataclasses.field(default_factory=lambda: ([], []))
    state: dict[str, Any] | None = None  # after the last step; None where there is none, or while values change

    def go(self, calls: Iterator[tuple[int, Inputs]], counts: tuple[int, int], bar: Any) -> None:
        """Takes the steps that are not done yet; ``counts``: of the layer-wise and of the end-to-end stage."""
        task = bar.add_task("Distilling", total=sum(counts))
        former = None if self.kept is None else self.kept.read()
        if former is not None:
            for losses, before in zip(self.losses, former["losses"], strict=True):
                losses[:] = before
            self.mixer.sequences, self.mixer.mixed = former["mixer"]
            for _ in range(self.accumulate * self.done):
                next(calls)
            bar.update(task, completed=self.done)
        for stage, loss_of in enumerate((self.lesson.layerwise, self.lesson.end_to_end)):
            optimizer = torch.optim.AdamW([dict(group) for group in self.groups])
            rates = [group["lr"] for group in optimizer.param_groups]
            losses = self.losses[stage]
            if former is not None and losses and (stage == 1 or not self.losses[1]):
                optimizer.load_state_dict(former["optimizer"])
            try:
                while len(losses) < counts[stage]:
                    for group, rate in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate * learning_rate_share(len(losses), counts[stage])
                    if stage == 1:
                        self.lift(len(losses) / max(1, counts[1] - 1))
                    self._step(optimizer, losses, loss_of, calls)
                    bar.update(task, advance=1, description=f"Distilling, loss {losses[-1]:.4g}")
                    if self.kept is not None and (self.done % EVERY == 0 or self.done == sum(counts)):
                        self._write()
                    if self.callback is not None:
                        self.callback(self.done, losses[-1])
            except BaseException:
                self._write()
                raise
        if counts[1]:
            self.lift(1.0)

    @property
    def done(self) -> int:
        return len(self.losses[0]) + len(self.losses[1])

    def _step(
        self,
        optimizer: torch.optim.Optimizer,
        losses: list[float],
        loss_of: Callable[[Inputs, int, float], float],
        calls: Iterator[tuple[int, Inputs]],
    ) -> None:
        total = 0.0
        for part in range(self.accumulate):
            index, call = next(calls)
            check_length(self.lesson.model, call, index)
            call = self.mixer(call, self.accumulate * self.done + part)
            loss = loss_of(_without_cache(self.lesson.model, call), index, 1 / self.accumulate)
            if not math.isfinite(loss):
                raise CalibrationError(
                    f"the loss is {loss} at step {len(losses)}.",
                    hint=Hint("Lower {lr}, or check the batches for NaN.", {"lr": ""}),
                )
            total += loss / self.accumulate
        torch.nn.utils.clip_grad_norm_([p for group in self.groups for p in group["params"]], 1.0)
        self.state = None
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        self.state = {
            "losses": [list(each) for each in self.losses],
            "mixer": [self.mixer.sequences, self.mixer.mixed],
            "optimizer": optimizer.state_dict(),
        }

    def _write(self) -> None:
        if self.kept is not None and self.state is not None:
            self.kept.write(self.state)


def learning_rate_share(step: int, steps: int) -> float:
    """Of the largest learning rate, at ``step`` from 0: up over the first tenth, then down along a cosine."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@dataclasses.dataclass(frozen=True)
class _Lesson:
    """The converted ``model``, its ``teacher``, and the ``paths`` of the converted modules, which are in both.

    Each method runs one batch, under ``autocast`` if that is a dtype, adds the gradients of its loss times ``weight``
    to the model's parameters and returns the loss.
    """

    model: nn.Module
    teacher: nn.Module
    paths: Sequence[str]
    autocast: torch.dtype | None = None

    def layerwise(self, call: Inputs, index: int, weight: float = 1.0) -> float:
        """One backward pass per module call, each through that module alone."""
        calls: list[tuple[str, Any, Any, Any]] = []

        def recorder(path: str) -> Any:
            return lambda module, args, kwargs, output: calls.append((path, args, kwargs, output))

        hooks = [
            self.teacher.get_submodule(path).register_forward_hook(recorder(path), with_kwargs=True)
            for path in self.paths
        ]
        try:
            self._taught(call, index)
        finally:
            for hook in hooks:
                hook.remove()
        if not calls:
            raise CalibrationError(f"batch {index} reaches none of the converted modules.", argument="batches")
        total = 0.0
        for path, args, kwargs, output in calls:
            with self._cast():
                ours = first_tensor(self.model.get_submodule(path)(*args, **kwargs))
            loss = _relative_error(ours, first_tensor(output))
            torch.autograd.backward(weight * loss / len(calls))
            total += float(loss.detach()) / len(calls)
        return total

    def end_to_end(self, call: Inputs, index: int, weight: float = 1.0) -> float:
        with outputs_of(self.teacher, self.paths) as theirs:
            truth = self._taught(call, index)
        with outputs_of(self.model, self.paths) as ours, self._cast():
            output = call_model(self.model, call, index)
        t, y = main_output(truth), main_output(output)
        if t is None or y is None:
            raise CalibrationError(
                f"{type(self.model).__name__} returns no floating point tensor of two dimensions or more."
            )
        check_same_outputs(self.model, y, self.teacher, t, "teacher")
        # The modules, and the teacher, may be on several devices.
        errors = [_relative_error(a, b.to(a.device)).to(y.device) for (_, a), (_, b) in zip(ours, theirs, strict=True)]
        if not errors:
            raise CalibrationError(f"batch {index} reaches none of the converted modules.", argument="batches")
        hidden = sum(errors[1:], errors[0]) / len(errors)
        t = t.to(y.device)
        mask = call[1].get("attention_mask")
        pooled = None
        if y.dim() > 2:
            positions = torch.ones(y.shape[:2], dtype=torch.bool, device=y.device)
            if isinstance(mask, Tensor) and mask.shape == y.shape[:2]:
                positions = mask.to(y.device).bool()
            pooled = [_mean(x, positions) for x in (y, t)]
            t, y = (x.flatten(0, 1) if bool(positions.all()) else x[positions] for x in (t, y))
        if getattr(output, "logits", None) is not None or y.shape[-1] == _vocabulary(self.model):
            loss = F.kl_div(
                y.float().log_softmax(-1), t.float().log_softmax(-1), reduction="batchmean", log_target=True
            )
            loss = loss / (y.numel() // y.shape[0] // y.shape[-1])  # per position
        else:
            # Of the mean over the positions as well: what is common to the errors of all tokens is what pooling keeps.
            loss = _relative_error(y, t) + (_relative_error(*pooled) if pooled is not None else 0.0)
        # Scaled to the loss, which may be a divergence or an error, so that neither drowns the other as they shrink.
        share = HIDDEN * loss.detach() / hidden.detach().clamp(min=1e-12)
        torch.autograd.backward(weight * (loss + share * hidden))
        return float(loss.detach())

    def _taught(self, call: Inputs, index: int) -> Any:
        """The teacher's output, as softmax and without gradients."""
        with ExitStack() as stack:
            if is_converted(self.teacher):
                stack.enter_context(softmax(self.teacher))
            stack.enter_context(torch.no_grad())
            stack.enter_context(self._cast())
            return call_model(self.teacher, call, index)

    def _cast(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device_of(self.model).type, self.autocast)


def _relative_error(y: Tensor, t: Tensor) -> Tensor:
    y, t = y.float(), t.float()
    return (y - t).square().sum() / t.square().sum().clamp(min=1e-12)


def _mean(x: Tensor, positions: Tensor) -> Tensor:
    """The mean of [B, N, ...] over the ``positions`` [B, N] that are True."""
    weight = positions.float().view(*positions.shape, *[1] * (x.dim() - 2))
    return (x.float() * weight).sum(1) / weight.sum(1).clamp(min=1)


def _vocabulary(model: nn.Module) -> int | None:
    return getattr(getattr(model, "config", None), "vocab_size", None)


def _without_cache(model: nn.Module, call: Inputs) -> Inputs:
    """A module that is run by itself on recorded arguments must not find the teacher's keys in a cache."""
    args, kwargs = call
    return (args, {**kwargs, "use_cache": False}) if accepts(model, "use_cache") else call


def _endless(calls: Iterable[Inputs]) -> Iterator[tuple[int, Inputs]]:
    for _ in itertools.count():
        empty = True
        for index, call in enumerate(calls):
            empty = False
            yield index, call
        if empty:
            raise ArgumentError("{argument} is empty.", argument="batches", hint=Hint("Pass at least one batch."))


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


@contextmanager
def _training(model: nn.Module, teacher: nn.Module, frozen: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Eval mode, ``frozen`` without gradients; modes back at the end, and the parameters too if it fails."""
    training: Mapping[nn.Module, bool] = {m: m.training for root in (model, teacher) for m in root.modules()}
    kept = {id(p) for p in frozen.values()}
    before = {p: p.detach().clone() for p in model.parameters() if p.requires_grad and id(p) not in kept}
    gradients = {p: p.grad for p in before}
    for module in (model, teacher):
        module.eval()
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    for parameter in before:
        parameter.grad = None
    try:
        with torch.enable_grad():
            yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in before.items():
                parameter.copy_(value)
        raise
    finally:
        for name in frozen:
            model.get_parameter(name).requires_grad_(True)  # another object, where accelerate offloads it
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for module, mode in training.items():
            module.training = mode
