"""Several compiled versions of one model: converted with sigswap's backend, and as each peer computes its attention."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sigswap.api import convert
from sigswap.bench.subject import ModelPeer, Subject
from sigswap.bench.timing import free, refusals
from sigswap.errors import BenchmarkError

TOLERANCE = 0.1
"""The relative error (Frobenius) of a compiled model's output to the eager one's above which it is wrong: rounding
adds up over many layers, and a wrong mask or bias in each of them changes more."""


@dataclasses.dataclass(frozen=True)
class Version:
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


def absent(subject: Subject, peers: Sequence[str], left_out: Collection[str]) -> dict[str, str]:
    """Why there is no version for some of the peers, by name."""
    refused = {}
    for peer in peers:
        if peer not in subject.peers:
            refused[peer] = subject.reasons.get(peer, "The model has no such attention.")
        elif peer in left_out:
            refused[peer] = "The model is compiled once more for it; --peers runs it."
    return refused


def make(
    names: Sequence[str], subject: Subject, inner: str | Callable[..., Any], mode: str | None, refused: dict[str, str]
) -> dict[str, Version]:
    """By name ("sigswap" or a peer's), but for those in ``refused``, where the reasons of others go.

    Nothing is compiled yet: that happens in the first calls.
    """
    versions: dict[str, Version] = {}
    for name in names:
        if name not in refused:
            with refusals(name, refused):
                versions[name] = _version(name, subject, inner, mode)
    return versions


def _version(name: str, subject: Subject, inner: str | Callable[..., Any], mode: str | None) -> Version:
    model, peer = subject.model, ModelPeer(prepare=functools.partial(_convert, subject))
    if name != "sigswap":
        peer = subject.peers[name]
    if peer.prepare is not None:
        model = copy.deepcopy(model)
        peer.prepare(model)
    compiled = torch.compile(model, backend=_own_backend(name, inner, mode))
    if keeps_memory(mode):
        compiled = _marking_steps(compiled)
    return Version(dataclasses.replace(subject, model=model), compiled, peer.context, checked=name == "sigswap")


def _convert(subject: Subject, model: nn.Module) -> None:
    convert(model, example_inputs=list(subject.examples or (subject.inputs, subject.training_inputs)))
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


def keeps_memory(mode: str | None) -> bool:
    """Whether what is compiled in this mode keeps the memory of its activations between two calls."""
    return mode is not None and bool(torch._inductor.list_mode_options(mode).get("triton.cudagraphs"))


def _marking_steps(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Tells CUDA graphs, whose memory all versions share, that nothing of the call before is needed any more.

    They find out by themselves, unless a backward pass never came, as that of a version that failed.
    """

    def call(**inputs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return compiled(**inputs)

    return call


@contextmanager
def several(number: int) -> Iterator[None]:
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


def warmed_up(
    versions: Mapping[str, Version],
    refused: dict[str, str],
    warm_up: Callable[[Version], Callable[[], object]],
) -> dict[str, Callable[[], object]]:
    """What to measure, by name: what ``warm_up`` gives for each version, which it compiles, and whose values it checks.

    Code that Dynamo could not compile for one version it skips from then on, for all: others would have graph breaks
    there. So when a version fails, all is forgotten, and those that were compiled already are compiled again.
    """
    calls: dict[str, Callable[[], object]] = {}
    waiting = list(versions)
    while waiting:
        name = waiting.pop(0)
        with refusals(name, refused), versions[name].context():
            calls[name] = warm_up(versions[name])
            if on_gpu(versions[name]):
                torch.cuda.synchronize()  # lest an error of this version show in the next one
        if name in refused:
            calls.pop(name, None)
            free()
            waiting += calls
            calls.clear()
    return {name: calls[name] for name in versions if name in calls}


def on_gpu(version: Version) -> bool:
    return next(version.subject.model.parameters()).is_cuda


@torch.no_grad()
def forward(subject: Subject, compiled: Callable[..., Any]) -> Any:
    """Of the subject's inputs, by its model, compiled or not."""
    return compiled(**subject.inputs)


@torch.no_grad()
def check_output(output: Tensor, truth: Tensor | None) -> None:
    """Raises BenchmarkError unless the output is finite and, but for rounding, the ``truth``, if that is known."""
    if not output.isfinite().all():
        raise BenchmarkError("wrong result: not all outputs are finite")
    if truth is not None:
        error = ((output.float() - truth.float()).norm() / truth.float().norm()).item()
        if not error <= TOLERANCE:
            raise BenchmarkError(f"wrong result: the relative error of the compiled model's output is {error:.2g}")
