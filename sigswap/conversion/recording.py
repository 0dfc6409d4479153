"""Looks for attention in a module: watches one run of it, and finds the sites in the graph of what it computed.

There are three ways to run it, and the next one is taken if one fails, for whatever reason:

- a copy around fake tensors: no memory and no compute of the model's size, and nothing that the forward does to its
  module (caches, buffers, counters) reaches the user's model;
- a copy around the model's own tensors, for a forward that needs values or an op that has no rule for fake tensors;
- the model itself, as it is, with its hooks, for what only works there.

Afterwards everything is as it was (:mod:`sigswap.conversion.untouched`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.fx
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from sigswap.conversion import accelerate_hooks
from sigswap.conversion.copies import copied, device_of, fake, tensors_of
from sigswap.conversion.untouched import Untouched, forget
from sigswap.conversion.watch import CALL, STACK, Call, Nodes, Stack, Watch
from sigswap.errors import ConversionError, ExampleInputsError, Hint, UnknownCallError
from sigswap.passes.find import find
from sigswap.passes.site import FindResult

Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments of one call of the model
INPUT_FORMS = "a tensor, a tuple of positional arguments, a dict of keyword arguments, or a list of those"
Way = Literal["fake", "copy", "itself"]
Prepare = Callable[[nn.Module], None]


@dataclasses.dataclass(frozen=True)
class Run:
    """One recorded run: its calls, what was found in its graph, and what each module returned."""

    calls: tuple[Call, ...]
    found: FindResult
    outputs: Mapping[str, Tensor | None]  # by module path, on the meta device; of several tensors the first
    executed: Mapping[str, tuple[int, ...]]  # module path -> the numbers of its calls
    way: Way
    elsewhere: tuple[tuple[str, str], ...]  # module path and family of calls in another thread

    def call_of(self, node: torch.fx.Node) -> int | None:
        return node.meta.get(CALL)

    def stack_of(self, node: torch.fx.Node) -> Stack:
        stack: Stack = node.meta.get(STACK, (("", 1),))
        return stack


class Recording:
    """The runs of one model: what they leave behind is put back to what it was when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.untouched = Untouched(model)
        meta = [tensor.is_meta for tensor in tensors_of(model)]
        hooked = accelerate_hooks.is_hooked(model)
        self.ways: list[Way] = ["fake"]
        if not any(meta) and not hooked:  # without its hooks, nothing would move what goes from one device to another
            self.ways.append("copy")
        if hooked or not any(meta):
            self.ways.append("itself")

    def run(self, inputs: Inputs, prepare: Prepare | None = None) -> Run:
        """Watches one forward on ``inputs`` (moved to the model's device) and finds its attention sites.

        ``prepare`` may change what is run before it runs (to another attention implementation, say). The model is not
        changed. Raises ExampleInputsError if its plain forward fails on the inputs, too, and else ConversionError.
        """
        errors: list[Exception] = []
        for way in self.ways:
            found = self._run(inputs, prepare, way)
            if isinstance(found, Exception):
                errors.append(found)
            else:
                self.ways = self.ways[self.ways.index(way) :]  # one that has failed would fail again
                return found
        failures = "; ".join(dict.fromkeys(f"{type(error).__name__}: {error}" for error in errors))
        if prepare is not None:
            raise ConversionError(failures) from errors[-1]
        if "itself" not in self.ways:
            raise ExampleInputsError(
                f"the forward of {type(self.model).__name__} cannot be run on the meta device ({failures}).",
                hint=Hint("Convert the model after its weights are loaded."),
            ) from errors[-1]
        self.plainly(inputs)
        raise ConversionError(
            f"{type(self.model).__name__} runs on the example inputs, but not while it is watched ({failures})."
        ) from errors[-1]

    def check(self, inputs: Inputs) -> None:
        """Runs the model, converted; twice, where that costs no compute: a cache may change what the second run calls.

        Raises ConversionError if it fails: its calls are not those of its plan.
        """
        failures: list[str] = []
        for way in self.ways:
            found = self._run(inputs, None, way, times=2 if way == "fake" else 1)
            if not isinstance(found, Exception):
                return
            failures.append(f"{type(found).__name__}: {found}")
            if isinstance(found, UnknownCallError):
                break
        raise ConversionError(
            f"{type(self.model).__name__} cannot be converted: its example inputs would fail then ({failures[-1]})."
        )

    def plainly(self, inputs: Inputs, prepare: Prepare | None = None) -> Any:
        """What the model gives for ``inputs``, by its plain forward in inference. Raises ExampleInputsError."""
        own = {id(t): t.detach() for t in tensors_of(self.model) if not isinstance(t, nn.Parameter)}
        before = [(tensor, tensor.clone()) for tensor in own.values() if not tensor.is_meta]
        try:
            with self.untouched.keep(), _inference(self.model):
                if prepare is not None:
                    prepare(self.model)
                args, kwargs = tree_map_only(Tensor, _copied_to(device_of(self.model)), inputs)
                return self.model(*args, **kwargs)
        except Exception as error:
            raise ExampleInputsError(
                f"{type(self.model).__name__} failed on the example inputs ({type(error).__name__}: {error}).",
                hint=Hint(f"Pass {{example_inputs}} that its forward accepts: {INPUT_FORMS}.", {"example_inputs": ""}),
            ) from error
        finally:
            for tensor, values in before:
                with _unsafe_preserve_version_counter(tensor):
                    tensor.copy_(values)

    def _run(self, inputs: Inputs, prepare: Prepare | None, way: Way, times: int = 1) -> Run | Exception:
        nodes: Nodes = WeakTensorKeyDictionary()
        found: Run | Exception
        try:
            with self.untouched.keep():
                found = self._watched(inputs, prepare, way, nodes, times)
        except Exception as error:
            found = error
        if way == "fake":
            if isinstance(found, Exception):  # whose frames hold the run's tensors
                _clear_frames(found)
                found = found.with_traceback(None)
                found.__context__ = found.__cause__ = None
            forget(lambda: [tensor for tensor in nodes if isinstance(tensor, FakeTensor)])
        return found

    def _watched(self, inputs: Inputs, prepare: Prepare | None, way: Way, nodes: Nodes, times: int) -> Run:
        device = device_of(self.model)
        mode = FakeTensorMode(allow_non_fake_inputs=True) if way == "fake" else None
        model = self.model if way == "itself" else copied(self.model, mode)
        place = _copied_to(device) if mode is None else lambda tensor: fake(tensor, mode, device)
        args, kwargs = tree_map_only(Tensor, place, inputs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        with mode or contextlib.nullcontext(), _inference(model):
            if prepare is not None:
                prepare(model)
            watch = Watch(model, tensors_of(model), given, nodes)
            with watch.open():
                for _ in range(times):
                    model(*args, **kwargs)
        return Run(
            tuple(watch.calls),
            find(watch.graph),
            watch.outputs,
            {path: tuple(numbers) for path, numbers in watch.executed.items()},
            way,
            tuple(watch.elsewhere),
        )


@contextlib.contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """All of the model in eval mode, without gradients, and uncompiled; the caller puts ``training`` back."""
    for module in model.modules():
        module.__dict__["training"] = False  # not .eval(): some models override it
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def _clear_frames(error: BaseException | None) -> None:
    """Empties the frames that an error has come through, which a log record may hold, too."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        for frame, _ in traceback.walk_tb(error.__traceback__):
            frame.f_locals  # noqa: B018  # brings a copy of the locals up to date
        error = error.__cause__ or error.__context__


def _copied_to(device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.detach().to(device, copy=True)
