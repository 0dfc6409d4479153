"""Distillation of a converted model from the softmax model, and the parameter groups of a fine-tuning.

Two stages, as LoLCATs (arXiv 2410.10254) and MOHAWK (arXiv 2408.10189) have them: first each converted module alone
learns the output that the teacher's has on the teacher's own inputs, then the whole model learns the teacher's output.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sigswap.conversion.keeping import gradients_enabled, in_eval_mode, thread_state, values_of
from sigswap.conversion.record import owners_of, part_to_pass, report
from sigswap.conversion.recording import Inputs
from sigswap.conversion.state import OwnerState
from sigswap.conversion.wrappers import check_module, check_undistributed, runnable, spread_parameter, wrappers_of
from sigswap.distributed.shards import fully_sharded, reshard
from sigswap.errors import ArgumentError, CalibrationError, Hint, check_flag
from sigswap.training import compiled
from sigswap.training.batches import as_calls, check_values, gone, progress_bar
from sigswap.training.distillation_report import DistillationReport
from sigswap.training.language import check_length
from sigswap.training.lesson import Lesson
from sigswap.training.lifting import lifted_caps
from sigswap.training.lookups import Lookups
from sigswap.training.mixing import mixer_for
from sigswap.training.ranks import conversions_of
from sigswap.training.recompute import checkpoint_layers
from sigswap.training.resuming import Kept
from sigswap.training.steps import Run
from sigswap.training.teaching import Original, adapter_parameters
from sigswap.training.together import Together, together, values_of_ranks
from sigswap.transaction import Transaction

SIGMOID_LR = 10.0
"""The learning rate of sigswap's parameters, relative to the base model's: they are few, and of the size of scores."""
COMPILED_CAPS = 4
"""In so many rises row caps are lifted where the step is compiled: a cap is a constant of compiled code."""


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

    Raises NotConvertedError, or ArgumentError if a rate is no number of 0 or more, nothing is trainable, or FSDP has
    put the parameters together.
    """
    rates: dict[str, Any] = {"lr": lr, "sigmoid_lr": sigmoid_lr, "weight_decay": weight_decay}
    _check_rates({name: rate for name, rate in rates.items() if not isinstance(rate, torch.Tensor)})
    ours = {id(parameter) for state in owners_of(model).values() for parameter in state.parameters()}
    groups: dict[str, list[nn.Parameter]] = {"sigmoid": [], "decay": [], "no_decay": []}
    parameters = list(model.parameters())
    if any(getattr(parameter, "_is_flat_param", False) for parameter in parameters):
        raise ArgumentError(
            "{argument}: its parameters were put together into others (by FullyShardedDataParallel).",
            argument="model",
            hint=Hint("Wrap it with use_orig_params=True, or use fully_shard."),
        )
    for parameter in parameters:
        if parameter.requires_grad:
            name = "sigmoid" if id(parameter) in ours else "decay" if parameter.dim() > 1 else "no_decay"
            groups[name].append(parameter)
    faster = {"sigmoid": SIGMOID_LR * lr if sigmoid_lr is None else sigmoid_lr}
    made = [
        {
            "name": name,
            "params": parameters,
            "lr": faster.get(name, lr),
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
    lengths: Sequence[int] | None = None,
    lr: float = 1e-4,
    sigmoid_lr: float | None = None,
    weight_decay: float = 0.0,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    compile: bool = False,
    checkpointing: bool = False,
    lift_row_cap: float | None = None,
    resume: str | os.PathLike[str] | None = None,
    group: Any = None,
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

    Where several processes train one model, each calls this. Those of data parallelism pass batches of their own (the
    model is the same on each, in DistributedDataParallel or not, or sharded by fully_shard), those of tensor
    parallelism the same ones. Each step is that of one process with all their batches as one, to rounding, and the
    student is the same on all of them. What fails on one rank is an error on all; a rank that is gone is found when the
    others wait for it.

    Args:
        model: converted; its modules' trainable parameters are those with ``requires_grad``.
        teacher: the model before the conversion, or a converted copy, which then runs as softmax. ``None``: ``model``
            itself, with the swap switched off, without a second copy. A teacher whose weights are trained is none: that
            needs ``train="sigmoid"``, or adapters of peft, which are switched off in the teacher; then
            ``train="all"`` trains what of the adapters and of sigswap's parameters has ``requires_grad``
            (``modules_to_save=["sigswap"]`` keeps the latter on), and all else has to be frozen, as peft makes it.
        batches: as for :func:`sigswap.calibrate`; they are gone through again and again until the steps are done.
        steps: end-to-end steps.
        layerwise_steps: layer-wise steps, before those.
        train: ``"sigmoid"``: sigswap's parameters alone; ``"all"``: everything with ``requires_grad``.
        lookups: the share of lookups, or a :class:`sigswap.Lookups` with the kinds, too. ``True``: a quarter, if the
            model is a decoder; a share is an error if it is not. ``False`` or 0: none.
        tokens: what lookups are made of: the model's tokenizer, whose special tokens and gaps are left out, or token
            ids. ``None``: all ids that the model knows but those that its config names as special.
        lengths: of language models: the tokens of each batch, one row behind the other and without padding, are cut
            into sequences of one of these lengths, chosen at random, so that all of them are learned at one cost. A
            batch with fewer tokens is one sequence. ``None``: batches stay as they are.
        lr: the largest learning rate of the base parameters.
        sigmoid_lr: that of sigswap's parameters; 10 times ``lr`` by default.
        weight_decay: of the base model's matrices.
        accumulate: batches per step, whose gradients are averaged.
        autocast: ``torch.bfloat16``, say: both models run under ``torch.autocast`` with it, the losses in float32.
        compile: end-to-end steps run compiled: the model by the backend "sigswap" (by inductor, if some of its
            attention stays softmax), the teacher and the losses by inductor. Losses differ by rounding. The first
            step takes a minute or more, and so does the first of each new shape; give batches of one shape. With
            ``checkpointing`` each layer is compiled by itself. Layer-wise steps and what the callback runs are not
            compiled.
        checkpointing: recomputes the model's repeated layers in backward instead of keeping what is inside them.
        lift_row_cap: the row cap that each capped attention has after the end-to-end stage. It rises from what it is,
            by the same factor in each of the first tenth of the steps, with ``compile`` in four rises, for each
            compiles anew; up to a cap of 1 the biases rise by half of its logarithm, as calibration sets them.
            ``math.inf``: after a cap of 1 there is none, which is the paper's sigmoid; a pretrained decoder loses much
            by it (docs/results.md). For another schedule call :func:`sigswap.set_row_cap` in ``callback``, which moves
            no bias.
        resume: a file to which the state is written, each hundredth step and when the run is interrupted. If it is
            there, the run goes on from it, to the same result if ``batches`` come in the same order; after the last
            step it gives that result at once. With several processes rank 0 reads and writes it (with parameters in
            parts it needs memory for all of the state, and an interruption writes nothing), and the run may go on in
            another number of processes, if their batches are the same ones all together.
        group: the torch.distributed process group of the ranks that have batches of their own. ``None``: those of
            fully_shard; with tensor parallelism alone, this one; else all, where torch.distributed is initialised.
        callback: called after each step with the number of steps done, of both stages, and the step's loss. The model
            is in eval mode then; ``sigswap.compare(model, teacher, ...)`` may be called. On a GPU each call waits for
            the step; without it losses are read every tenth step.
        progress: shows a progress bar with the loss and the time left on standard error, if that is a terminal.

    Memory beyond the two models', per trained parameter: its gradient, AdamW's two moments and the value that a failed
    run goes back to, 16 bytes in float32.

    Raises:
        NotConvertedError: the model is not converted.
        ArgumentError: an argument is not as above, a sequence is longer than the model's positions, ``resume`` holds
            the state of another run, or it is called inside ``torch.inference_mode``.
        CalibrationError: a model fails on a batch, the loss is not finite, a module of ``model`` is not in the
            teacher, or the teacher's output is of another shape (a teacher with another vocabulary).
    """
    _check_arguments(locals())
    _check_runnable(model, teacher, compile)
    model, teacher = runnable(model), None if teacher is None else runnable(teacher, "teacher")
    reshard(model)
    states = owners_of(model)
    check_values(model)
    if teacher is not None:
        check_values(teacher, "teacher")
    among = together(model, group)
    source = model if teacher is None else teacher
    missing = [path for path in states if not _has(source, path)]
    if missing:
        raise CalibrationError(
            f"{{argument}} has no module {missing[0]!r}: it must be the model before the conversion.",
            argument="teacher",
            hint=part_to_pass(model),
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
    own = source is model
    if own and train == "all":
        _check_own_teacher(teacher, base, adapter_parameters(model))
    settings: dict[str, Any] = {
        "steps": steps,
        "layerwise_steps": layerwise_steps,
        "accumulate": accumulate,
        "lr": lr,
        "lift_row_cap": lift_row_cap,
    }
    _check_same(among, model, states, {**settings, **_shared(locals())})
    calls = _endless(as_calls(batches))
    with Transaction() as undo, undo:
        _for_training(undo, model, source, frozen)
        with among.everyone.all_or_none():
            first = next(calls)
            check_length(model, first[1], 0)
        original = Original(source, with_adapters=not own or train == "sigmoid")
        original.keep(undo)
        with original.running():
            mixer = mixer_for(lookups, tokens, source, first[1], lengths)
        vocabulary = None if mixer.tokens is None else (len(mixer.tokens), int(mixer.tokens.sum()))
        among.everyone.check_same(**{"kind of batches": mixer.inputs, "tokens": vocabulary})
        reshard(model)
        settings |= {} if lengths is None else {"lengths": list(lengths)}
        if checkpointing:
            checkpoint_layers(undo, model, list(states))
        groups = param_groups(model, lr, weight_decay=weight_decay, sigmoid_lr=sigmoid_lr)
        names = {parameter: name for name, parameter in model.named_parameters()}
        trained = {names[p]: p for group in groups for p in group["params"]}
        kept = None if resume is None else Kept(Path(resume), settings, trained)
        lift = lifted_caps(undo, model, lift_row_cap, COMPILED_CAPS if compile else None)
        lesson = Lesson(undo, model, original, list(states), among, autocast, _backends(model) if compile else None)
        run = Run(lesson, groups, mixer, accumulate, kept, callback, lift, among)
        bar = progress_bar(undo, progress and among.everyone.rank == 0)
        run.go(itertools.chain([first], calls), (layerwise_steps, steps), bar)
    return DistillationReport(*run.losses, lookups=str(mixer), row_cap=_caps_of(states))


def _shared(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of distill's arguments those that change a step, and that are the same on all ranks."""
    names = ("train", "lookups", "lengths", "sigmoid_lr", "weight_decay", "autocast", "compile", "checkpointing")
    return {name: given[name] for name in names} | {"resume": given["resume"] is not None}


def _check_same(
    among: Together, model: nn.Module, states: Mapping[str, OwnerState], arguments: Mapping[str, Any]
) -> None:
    """Raises CalibrationError unless all ranks distill the same student in the same way."""
    if among.alone:
        return
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    base = values_of_ranks({name: p for name, p in trained.items() if ".sigswap." not in f".{name}"})
    among.everyone.check_same(**conversions_of(states), **arguments, weights=base)


def _backends(model: nn.Module) -> tuple[str, str]:
    """By which model and teacher are compiled.

    "sigswap" swaps what it finds in graphs without converted modules: where a model has attention that is to stay
    softmax, and breaks its graph, such a graph would be of that attention.
    """
    if report(model).count("left"):
        return compiled.SOFTMAX_BACKEND, compiled.SOFTMAX_BACKEND
    return compiled.SIGMOID_BACKEND, compiled.SOFTMAX_BACKEND


def _caps_of(states: Mapping[str, OwnerState]) -> str:
    """Where the row caps stand, as a report says it; "" if there are none."""
    caps = [site.row_cap for state in states.values() for site in state.sites() if site.row_cap is not None]
    if not caps:
        return ""
    least, most = min(caps), max(caps)
    shown = f"row cap {least:.4g}" if least == most else f"row caps between {least:.4g} and {most:.4g}"
    return f"{shown} in {len(caps)} attentions"


def _check_runnable(model: nn.Module, teacher: nn.Module | None, compile: bool) -> None:
    """Raises ArgumentError where no training is possible, or what is given is compiled."""
    check_module(model)
    if teacher is not None:
        check_module(teacher, "teacher")
    for name, module in (("model", model), ("teacher", teacher)):
        if module is not None and any(wrapper.kind == "compiled" for wrapper in wrappers_of(module)):
            raise ArgumentError(
                "{argument} is compiled.",
                argument=name,
                hint=Hint("Pass what was given to torch.compile, and {compile}.", {"compile": "True"}),
            )
    check_undistributed(model, "be distilled", by_ranks=True)
    if compile and spread_parameter(model) is not None:
        raise ArgumentError(
            "{argument}: a student whose parameters are spread over processes is not compiled by distill.",
            argument="compile",
            hint=Hint("Pass {compile}.", {"compile": "False"}),
        )
    if torch.is_inference_mode_enabled():
        raise ArgumentError("there are no gradients inside torch.inference_mode().", hint=Hint("Distil outside of it."))
    made = [name for name, parameter in model.named_parameters() if parameter.is_inference()]
    if made:
        raise ArgumentError(
            f"{{argument}}: {made[0]} was made inside torch.inference_mode(), and can never have a gradient.",
            argument="model",
            hint=Hint("Make the model outside of it."),
        )


def _check_rates(given: Mapping[str, Any]) -> None:
    """Raises ArgumentError for a rate in ``given`` that is no number, 0 or more; ``sigmoid_lr`` may be None."""
    for name, rate in given.items():
        optional = name == "sigmoid_lr" and rate is None
        if not optional and (not isinstance(rate, int | float) or isinstance(rate, bool) or not rate >= 0):
            raise ArgumentError(f"{{argument}} must be a number, 0 or more, not {rate!r}.", argument=name)


def check_choices(train: Any, lr: Any, lift_row_cap: Any) -> None:
    """Raises ArgumentError for a value that is not allowed, of those that the command line has as well."""
    if train not in ("all", "sigmoid"):
        raise ArgumentError(f"{{argument}} must be 'all' or 'sigmoid', not {train!r}.", argument="train")
    _check_rates({"lr": lr})
    is_number = isinstance(lift_row_cap, int | float) and not isinstance(lift_row_cap, bool)
    if lift_row_cap is not None and not (is_number and lift_row_cap > 0):
        raise ArgumentError(f"{{argument}} must be a number above 0, not {lift_row_cap!r}.", argument="lift_row_cap")


def _check_arguments(given: Mapping[str, Any]) -> None:
    """Raises ArgumentError for a value of distill's that is not allowed, by name in ``given``."""
    for name in ("steps", "layerwise_steps", "accumulate"):
        value, least = given[name], 1 if name == "accumulate" else 0
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            unit = "batches" if name == "accumulate" else "steps"
            raise ArgumentError(
                f"{{argument}} must be a number of {unit}, {least} or more, not {value!r}.", argument=name
            )
    check_choices(given["train"], given["lr"], given["lift_row_cap"])
    _check_rates({name: given[name] for name in ("sigmoid_lr", "weight_decay")})
    autocast = given["autocast"]
    if autocast not in (None, torch.bfloat16):
        raise ArgumentError(
            f"{{argument}} must be None or torch.bfloat16, not {autocast!r} (float16 would need scaled losses).",
            argument="autocast",
        )
    if given["callback"] is not None and not callable(given["callback"]):
        raise ArgumentError(f"{{argument}} must be a function, not {given['callback']!r}.", argument="callback")
    if not isinstance(given["resume"], str | os.PathLike | None):
        raise ArgumentError(f"{{argument}} must be the path of a file, not {given['resume']!r}.", argument="resume")
    for name in ("checkpointing", "compile"):
        check_flag(name, given[name])
    Lookups.of(given["lookups"])


def _endless(calls: Iterable[Inputs]) -> Iterator[tuple[int, Inputs]]:
    for turn in itertools.count():
        empty = True
        for index, call in enumerate(calls):
            empty = False
            yield index, call
        if empty and turn:
            raise gone()
        if empty:
            raise ArgumentError("{argument} is empty.", argument="batches", hint=Hint("Pass at least one batch."))


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _check_own_teacher(
    teacher: nn.Module | None, base: Mapping[str, nn.Parameter], adapters: Set[nn.Parameter]
) -> None:
    """Raises ArgumentError if what is trained of the model, by name in ``base``, changes the teacher in it."""
    changed = [name for name, parameter in base.items() if parameter not in adapters]
    if not changed and adapters:
        return
    what = "None" if teacher is None else "the model"
    also = f" ({changed[0]} is no adapter's)" if adapters and changed else ""
    raise ArgumentError(
        f"{{argument}}={what} takes the model's own weights as the teacher's, which train='all' would change{also}.",
        argument="teacher",
        hint=Hint(
            "Pass {train}, or {teacher}, or give the model adapters of peft.",
            {"train": "'sigmoid'", "teacher": "copy.deepcopy(model)"},
        ),
    )


def _for_training(undo: Transaction, model: nn.Module, teacher: nn.Module, frozen: Mapping[str, nn.Parameter]) -> None:
    """Eval mode, and ``frozen`` without gradients, until the transaction is left; the parameters that are trained are
    as they were if it fails."""
    thread_state(undo.on_failure)
    kept = {id(p) for p in frozen.values()}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    gradients = [(p, p.grad) for p in trained]

    def thaw() -> None:
        for name, parameter in frozen.items():
            parameter.requires_grad_(True)
            model.get_parameter(name).requires_grad_(True)  # another object, where accelerate offloads it
        for each in fully_sharded(model):
            if id(each.shard) in kept and each.whole is not None:
                each.whole.requires_grad_(True)

    def put_back_gradients() -> None:
        for parameter, gradient in gradients:
            parameter.grad = gradient

    undo.on_failure("the parameters", values_of(trained))
    in_eval_mode(undo.afterwards, model, teacher)
    undo.afterwards("requires_grad", thaw)
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    for each in fully_sharded(model):
        if id(each.shard) in kept and each.whole is not None:
            each.whole.requires_grad_(False)
    undo.afterwards("gradients", put_back_gradients)
    for parameter in trained:
        parameter.grad = None
    gradients_enabled(undo.afterwards, True)
