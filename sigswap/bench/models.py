"""The suite models of ``sigswap bench``: whole compiled models with sigmoid attention, beside the same with softmax.

A cell is a model with random weights and a batch. It is compiled once for each way of computing its softmax attention
(the peers), and a converted copy with sigswap's backend. All are compiled first, then timed in turns, as in the other
suites: a GPU's clock drifts by more than what most of them differ by. Memory and kernels are measured one by one. The
optimizer's step is left out.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sigswap.bench.cells import DTYPES, MODELS, ModelCell
from sigswap.bench.results import Row
from sigswap.bench.subjects import ModelPeer, Subject, build
from sigswap.bench.timing import free, in_turns, launched_kernels, peak_mib, refusals, repeated_ms
from sigswap.conversion.api import convert
from sigswap.errors import BenchmarkError, SigswapError

PHASES = ("forward", "training step")
QUANTITIES = ("time", "memory", "kernels")
TOLERANCE = 0.1
"""The relative error (Frobenius) of a compiled model's output to the eager one's above which it is wrong: rounding
adds up over many layers, and a wrong mask or bias in each of them changes more."""

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
    for peer in peers:
        if peer not in subject.peers:
            refused["forward"][peer] = f"{MODELS[cell.model]} has no such attention."
        elif peer in left_out:
            refused["forward"][peer] = "The model is compiled once more for it; --peers runs it."
    with _several_versions(len(names)):
        versions: dict[str, _Version] = {}
        for name in names:
            if name not in refused["forward"]:
                with refusals(name, refused["forward"]):
                    versions[name] = _version(name, subject, inner, mode)
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


def keeps_memory(mode: str | None) -> bool:
    """Whether what is compiled in this mode keeps the memory of its activations between two calls."""
    return mode is not None and bool(torch._inductor.list_mode_options(mode).get("triton.cudagraphs"))


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
    absent = dict.fromkeys((name for name in figures if name not in {*measured, *refused}), needed)
    return Row(cell, dtype, phase, measured, {**refused, **absent}, quantity, original, unavailable=bool(absent))


# Several compiled versions of one model.


@dataclasses.dataclass(frozen=True)
class _Version:
    """A model as one of the implementations computes it.

    Attributes:
        subject: Its model is the one that was compiled.
        compiled: The compiled model.
        context: What to enter, while compiling and running.
        checked: Whether the compiled model's output has to be the eager one's.
    """

    subject: Subject
    compiled: Callable[..., Any]
    context: Callable[[], AbstractContextManager[Any]]
    checked: bool


def _version(name: str, subject: Subject, inner: str | Callable[..., Any], mode: str | None) -> _Version:
    """Nothing is compiled yet: that happens in the first calls."""
    model, peer = subject.model, ModelPeer(prepare=functools.partial(_convert, subject))
    if name != "sigswap":
        peer = subject.peers[name]
    if peer.prepare is not None:
        model = copy.deepcopy(model)
        peer.prepare(model)
    compiled = torch.compile(model, backend=_own_backend(name, inner, mode))
    if keeps_memory(mode):
        compiled = _marking_steps(compiled)
    return _Version(dataclasses.replace(subject, model=model), compiled, peer.context, checked=name == "sigswap")


def _convert(subject: Subject, model: nn.Module) -> None:
    convert(model, example_inputs=[subject.inputs, subject.training_inputs])
    subject.after_conversion(model)


def _own_backend(name: str, inner: str | Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    """What ``torch.compile`` would call for this backend and mode, but equal to nothing else.

    The versions have their code in common, and Dynamo's guards do not tell the backends of
    ``scaled_dot_product_attention`` apart. But what is compiled for one Dynamo backend never runs for another one that
    is not equal to it, whereas those that torch.compile makes are equal if their options are.
    """
    backend: Callable[..., Any] = torch._dynamo.lookup_backend("sigswap" if name == "sigswap" else inner)
    if name == "sigswap":
        return functools.partial(backend, options={"inner": inner}, mode=mode)
    if inner == "inductor":
        patches = {} if mode is None else torch._inductor.list_mode_options(mode)
        return functools.partial(backend, config_patches=patches)
    return functools.partial(backend)


def _marking_steps(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Tells CUDA graphs, whose memory all versions share, that nothing of the call before is needed any more.

    They find out by themselves, unless a backward pass never came, as that of a version that failed.
    """

    def call(**inputs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return compiled(**inputs)

    return call


@contextmanager
def _several_versions(number: int) -> Iterator[None]:
    """Starts without compiled code, and leaves none.

    AOTAutograd's cache is off, as its key does not have to tell the backends of ``scaled_dot_product_attention`` apart.
    Inductor's own cache may stay on: its graphs have the backend's operator in them. Dynamo's limit is one of the
    versions of a function's code, for whichever backend.
    """
    import torch._functorch.config

    free()
    limit = number * torch._dynamo.config.recompile_limit
    with torch._functorch.config.patch(enable_autograd_cache=False), torch._dynamo.config.patch(recompile_limit=limit):
        yield
    free()


# Measuring.


def _measure_phase(
    phase: str, versions: Mapping[str, _Version], refused: dict[str, str], no_memory: bool
) -> dict[str, _Figures]:
    """The figures of those versions that do not fail; the others' errors go into ``refused``."""
    for version in versions.values():  # all before the first is compiled: what changes later slows guards down
        version.subject.model.train(phase == "training step")
    calls = _calls(phase, versions, refused)
    contexts = {name: version.context for name, version in versions.items()}
    figures: dict[str, _Figures] = {}
    for name, time in in_turns(repeated_ms, calls, contexts, refused, ROUNDS).items():
        with refusals(name, refused), contexts[name]():
            further = _gpu_figures(calls[name], no_memory) if _on_gpu(versions[name]) else {}
            figures[name] = {(phase, quantity): value for quantity, value in {"time": time, **further}.items()}
    return figures


def _calls(phase: str, versions: Mapping[str, _Version], refused: dict[str, str]) -> dict[str, Callable[[], object]]:
    """What to measure, compiled.

    Code that Dynamo could not compile for one version it skips from then on, for all: others would have graph breaks
    there. So when a version fails, all is forgotten, and those that were compiled already are compiled again.
    """
    calls: dict[str, Callable[[], object]] = {}
    waiting = list(versions)
    while waiting:
        name = waiting.pop(0)
        with refusals(name, refused), versions[name].context():
            calls[name] = _warmed_up(phase, versions[name])
        if name in refused:
            free()
            waiting += calls
            calls.clear()
    return {name: calls[name] for name in versions if name in calls}


def _warmed_up(phase: str, version: _Version) -> Callable[[], object]:
    """The call to measure, after it has compiled and tuned, and its result was checked."""
    subject, compiled = version.subject, version.compiled
    if phase == "training step":
        _check_gradients(subject, compiled)
    else:
        truth = subject.output(_forward(subject, subject.model)) if version.checked else None
        _check_output(subject.output(_forward(subject, compiled)), truth)
    call = functools.partial(_step if phase == "training step" else _forward, subject, compiled)
    for _ in range(2):
        call()
    if _on_gpu(version):
        torch.cuda.synchronize()  # lest an error of this version show in the next one
    return call


def _gpu_figures(call: Callable[[], object], no_memory: bool) -> dict[str, float]:
    """By quantity."""
    figures = {} if no_memory else {"memory": peak_mib(call)}
    kernels = launched_kernels(call)
    return {**figures, "kernels": float(kernels)} if kernels else figures  # none: this machine's profiler does not work


def _on_gpu(version: _Version) -> bool:
    return next(version.subject.model.parameters()).is_cuda


@torch.no_grad()
def _forward(subject: Subject, compiled: Callable[..., Any]) -> Any:
    return compiled(**subject.inputs)


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


@torch.no_grad()
def _check_output(output: Tensor, truth: Tensor | None) -> None:
    """Raises BenchmarkError unless the output is finite and, but for rounding, the ``truth``, if that is known."""
    if not output.isfinite().all():
        raise BenchmarkError("wrong result: not all outputs are finite")
    if truth is not None:
        error = ((output.float() - truth.float()).norm() / truth.float().norm()).item()
        if not error <= TOLERANCE:
            raise BenchmarkError(f"wrong result: the relative error of the compiled model's output is {error:.2g}")
