"""The suite models of ``sigswap bench``: whole compiled models with sigmoid attention, beside the same with softmax.

A cell is a model with random weights and a batch. It is compiled once for each way of computing its softmax attention
(the peers), and a converted copy with sigswap's backend. All are compiled first, then timed in turns, as in the other
suites: a GPU's clock drifts by more than what most of them differ by. Memory and kernels are measured one by one. The
optimizer's step is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sigswap.bench import plain_models, transformers_models
from sigswap.bench.cells import DTYPES, ModelCell
from sigswap.bench.results import Row
from sigswap.bench.subject import Subject
from sigswap.bench.timing import in_turns, launched_kernels, peak_mib, refusals, repeated_ms
from sigswap.bench.versions import (
    Version,
    absent,
    check_output,
    forward,
    keeps_memory,
    make,
    on_gpu,
    several,
    warmed_up,
)
from sigswap.errors import BenchmarkError, SigswapError

PHASES = ("forward", "training step")
QUANTITIES = ("time", "memory", "kernels")

ROUNDS = 16
"""How many turns each implementation has, in each phase."""

_Figures = dict[tuple[str, str], float]  # by phase and quantity


def measure(
    cell: ModelCell,
    dtype: str,
    peers: Sequence[str],
    left_out: Sequence[str] = (),
    *,
    device: str = "cuda",
    inner: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
) -> list[Row]:
    """The cell's rows, one for each of ``PHASES`` and of ``QUANTITIES``.

    Only errors that leave the GPU unusable are raised; others become reasons.

    Args:
        cell: The model and the batch.
        dtype: Of the weights and of the activations; of ``DTYPES``.
        peers: Of the suite's.
        left_out: Those of the peers that are not measured, as they were not asked for.
        device: "cuda" or, for small cells, "cpu", where there is the time only.
        inner: The compiler, of sigswap's model and of the others: "inductor" or, for tests, another backend of Dynamo.
        mode: Of torch.compile, with inductor. If it has CUDA graphs, which keep their memory, none is measured.
    """
    names = ("sigswap", *peers)
    try:
        subject = build(cell, DTYPES[dtype], device)
    except SigswapError as error:  # a package is missing
        reasons = dict.fromkeys(names, str(error))
        return [
            Row(cell, dtype, phase, {}, reasons, quantity, unavailable=True)
            for phase in PHASES
            for quantity in QUANTITIES
        ]
    figures: dict[str, _Figures] = {name: {} for name in names}
    refused: dict[str, dict[str, str]] = {phase: {} for phase in PHASES}  # by phase, then by implementation
    refused["forward"] = absent(subject, peers, left_out)
    with several(len(names)):
        versions = make(names, subject, inner, mode, refused["forward"])
        for phase in PHASES:
            for name, found in _measure_phase(phase, versions, refused[phase], keeps_memory(mode)).items():
                figures[name].update(found)
            versions = {name: version for name, version in versions.items() if name not in refused[phase]}
    for name, reason in refused["forward"].items():
        refused["training step"].setdefault(name, reason)
    return [
        _row(cell, dtype, phase, quantity, figures, refused[phase], subject.counting)
        for phase in PHASES
        for quantity in QUANTITIES
    ]


def _row(
    cell: ModelCell,
    dtype: str,
    phase: str,
    quantity: str,
    figures: Mapping[str, _Figures],
    refused: Mapping[str, str],
    counting: Sequence[str],
) -> Row:
    """``original`` is the fastest in this phase, in the rows of memory and kernels as well."""
    times = {name: figures[name][phase, "time"] for name in counting if (phase, "time") in figures.get(name, {})}
    original = min(times, key=times.__getitem__, default=None)
    measured = {name: found[phase, quantity] for name, found in figures.items() if (phase, quantity) in found}
    needed = "This needs a GPU, its profiler, and for memory a mode without CUDA graphs."
    lacking = dict.fromkeys((name for name in figures if name not in {*measured, *refused}), needed)
    return Row(cell, dtype, phase, measured, {**refused, **lacking}, quantity, original, unavailable=bool(lacking))


# Measuring.


def _measure_phase(
    phase: str, versions: Mapping[str, Version], refused: dict[str, str], no_memory: bool
) -> dict[str, _Figures]:
    """The figures of those versions that do not fail; the others' errors go into ``refused``."""
    for version in versions.values():  # all before the first is compiled: what changes later slows guards down
        version.subject.model.train(phase == "training step" and not version.subject.stays_in_eval)
    calls = warmed_up(versions, refused, functools.partial(_warmed_up, phase))
    contexts = {name: version.context for name, version in versions.items()}
    figures: dict[str, _Figures] = {}
    for name, time in in_turns(repeated_ms, calls, contexts, refused, ROUNDS).items():
        with refusals(name, refused), contexts[name]():
            further = _gpu_figures(calls[name], no_memory) if on_gpu(versions[name]) else {}
            figures[name] = {(phase, quantity): value for quantity, value in {"time": time, **further}.items()}
    return figures


def _warmed_up(phase: str, version: Version) -> Callable[[], object]:
    """The call to measure, after it has compiled and tuned, and its result was checked."""
    subject, compiled = version.subject, version.compiled
    if phase == "training step":
        _check_gradients(subject, compiled)
    else:
        truth = subject.output(forward(subject, subject.model)) if version.checked else None
        check_output(subject.output(forward(subject, compiled)), truth)
    call = functools.partial(_step if phase == "training step" else forward, subject, compiled)
    for _ in range(2):
        call()
    return call


def _gpu_figures(call: Callable[[], object], no_memory: bool) -> dict[str, float]:
    """By quantity."""
    figures = {} if no_memory else {"memory": peak_mib(call)}
    kernels = launched_kernels(call)
    return {**figures, "kernels": float(kernels)} if kernels else figures  # none: this machine's profiler does not work


def _step(subject: Subject, compiled: Callable[..., Any]) -> None:
    try:
        subject.backward(compiled(**subject.training_inputs))
    finally:  # another version may share the parameters
        _drop_gradients(subject)


def _drop_gradients(subject: Subject) -> None:
    for leaf in subject.leaves:
        leaf.grad = None


def _check_gradients(subject: Subject, compiled: Callable[..., Any]) -> None:
    """Raises BenchmarkError unless a training step gives gradients, and all are finite."""
    try:
        subject.backward(compiled(**subject.training_inputs))
        grads = [leaf.grad for leaf in subject.leaves if leaf.grad is not None]
        if not grads or not all(grad.isfinite().all() for grad in grads):
            raise BenchmarkError("wrong result: not all gradients are finite, or there are none")
    finally:
        _drop_gradients(subject)


# Models.


def build(cell: ModelCell, dtype: torch.dtype, device: str) -> Subject:
    """The cell's model and batch; both are the same in each run.

    Raises:
        SigswapError: The package that has the model is not installed.
    """
    torch.manual_seed(0)
    with torch.device(device):
        return _BUILDERS[cell.model](cell, dtype)


_BUILDERS: dict[str, Callable[[ModelCell, torch.dtype], Subject]] = {
    "block": plain_models.block,
    "vit": plain_models.vit,
    "llama": transformers_models.llama,
    "llama-no-mask": transformers_models.llama,
    "llama-right-padding": transformers_models.padded_llama,
    "llama-left-padding": transformers_models.padded_llama,
    "llama-packed": transformers_models.packed_llama,
    "gemma2": transformers_models.gemma2,
    "swin": plain_models.swin,
    "t5": transformers_models.t5,
    "t5-padding": transformers_models.t5,
    "whisper": transformers_models.whisper,
}
