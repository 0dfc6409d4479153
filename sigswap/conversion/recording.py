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
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.fx
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from sigswap.conversion import accelerate_hooks
from sigswap.conversion.copies import Inputs as Inputs
from sigswap.conversion.copies import alive, copied, device_of, fake, placed, tensors_of
from sigswap.conversion.keeping import quiet, thread_state
from sigswap.conversion.turns import Turn
from sigswap.conversion.untouched import Untouched, collect_later, forget
from sigswap.conversion.watch import CALL, STACK, Call, Nodes, Stack, Watch
from sigswap.conversion.wrappers import spread_parameter
from sigswap.errors import ConfigError, ConversionError, ExampleInputsError, Hint, UnknownCallError
from sigswap.passes.find import find
from sigswap.passes.site import FindResult
from sigswap.transaction import Transaction

LOOKING = Turn()
"""Taken while a model is looked at: what is put back then (globals, threads' methods) is the whole process's."""
INPUT_FORMS = "a tensor, a tuple of positional arguments, a dict of keyword arguments, or a list of those"
Way = Literal["fake", "copy", "itself"]
Form = Callable[[nn.Module], AbstractContextManager[None]]
"""Puts what is run (a copy, or the model itself) into another form, and back when the run is over."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One call to look at: of the model, or of the module at ``path`` in it."""

    inputs: Inputs
    path: str = ""


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


@contextlib.contextmanager
def _as_it_is(model: nn.Module) -> Iterator[None]:
    yield


class Recording:
    """The runs of one model: what they leave behind is put back to what it was when this was made.

    So the model must not be changed from outside before the last run. ``form`` is the form that it is run in.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.form: Form = _as_it_is
        self.older = alive(Tensor)
        self.untouched = Untouched(model)
        meta = [tensor.is_meta for tensor in tensors_of(model)]
        hooked = accelerate_hooks.is_hooked(model)
        self.spread = spread_parameter(model)
        self.ways: list[Way] = ["fake"]
        if self.spread is not None:  # where a run, if one rank came to it alone, would wait for the others
            return
        if not any(meta) and not hooked:  # without its hooks, nothing would move what goes from one device to another
            self.ways.append("copy")
        if hooked or not any(meta):
            self.ways.append("itself")

    def run(self, example: Example, form: Form | None = None) -> Run:
        """Watches one forward on ``example`` (moved to the model's device) and finds its attention sites.

        ``form``: one that the model may take later (another attention implementation, say), on top of its own. The
        model is not changed. Raises ExampleInputsError if its plain forward fails on the inputs, too, and else
        ConversionError.
        """
        errors: list[Exception] = []
        for way in self.ways:
            found = self._run(example, form, way)
            if isinstance(found, Exception):
                errors.append(found)
            elif found is not None:
                self.ways = self.ways[self.ways.index(way) :]  # one that has failed would fail again
                return found
        failures = "; ".join(dict.fromkeys(f"{type(error).__name__}: {error}" for error in errors))
        if form is not None:
            raise ConversionError(failures) from errors[-1]
        if self.spread is not None:
            raise ConversionError(
                f"{type(self.model).__name__} cannot be run on tensors without values ({failures}), and its parameters "
                f"are spread over processes ({self.spread}), so it is not run in another way.",
                hint=Hint("Convert it before fully_shard or tensor parallelism is applied to it."),
            ) from errors[-1]
        if "itself" not in self.ways:
            raise ExampleInputsError(
                f"the forward of {type(self.model).__name__} cannot be run on the meta device ({failures}).",
                hint=Hint("Convert the model after its weights are loaded."),
            ) from errors[-1]
        self.plainly(example)
        raise ConversionError(
            f"{type(self.model).__name__} runs on the example inputs, but not while it is watched ({failures})."
        ) from errors[-1]

    def check(self, example: Example, converted: Form) -> None:
        """Runs the model ``converted``; twice, where that costs no compute: a cache may change what the second run
        calls.

        Raises ConversionError if it fails: its calls are not those of its plan; and what ``converted`` raises if the
        model cannot be converted at all.
        """
        failures: list[str] = []
        for way in self.ways:
            found = self._run(example, converted, way, check=True)
            if not isinstance(found, Exception):
                return
            if isinstance(found, ConfigError | ConversionError):
                raise found
            failures.append(f"{type(found).__name__}: {found}")
            if isinstance(found, UnknownCallError):
                break
        raise ConversionError(
            f"{type(self.model).__name__} cannot be converted: its example inputs would fail then ({failures[-1]})."
        )

    def plainly(self, example: Example, form: Form = _as_it_is) -> Any:
        """What the model gives for ``example``, by its plain forward in inference. Raises ExampleInputsError."""
        own = {id(t): t.detach() for t in tensors_of(self.model) if not isinstance(t, nn.Parameter)}
        before = [(tensor, tensor.clone()) for tensor in own.values() if not tensor.is_meta]

        def put_back() -> None:
            for tensor, values in before:
                with torch.no_grad(), _unsafe_preserve_version_counter(tensor):
                    tensor.copy_(values)

        try:
            with Transaction() as undo, undo:
                thread_state(undo.afterwards)  # as it is outside of what follows
                with self.untouched.keep(), _inference(self.model), self.form(self.model), form(self.model):
                    undo.afterwards("the values of buffers", put_back)
                    (args, kwargs), _ = placed(example.inputs, _copied_to(device_of(self.model)))
                    return self.model.get_submodule(example.path)(*args, **kwargs)
        except Exception as error:
            where = f" of {example.path}" if example.path else ""
            hint = Hint(f"Pass {{example_inputs}} that its forward accepts: {INPUT_FORMS}.", {"example_inputs": ""})
            raise ExampleInputsError(
                f"{type(self.model).__name__} failed on the example inputs{where} ({type(error).__name__}: {error}).",
                hint=hint_of_ids(example.inputs) or hint,
            ) from error

    def _run(self, example: Example, form: Form | None, way: Way, check: bool = False) -> Run | Exception | None:
        mode = FakeTensorMode(allow_non_fake_inputs=True) if way == "fake" else None
        nodes: Nodes = WeakTensorKeyDictionary()
        found: Run | Exception | None
        try:
            with (
                Transaction() as undo,
                undo,
                self.untouched.keep(),
                collect_later() if mode is not None else nullcontext(),
            ):
                thread_state(undo.afterwards)  # here too, for an error of one way is the reason to try another
                found = self._looked_at(example, form or _as_it_is, way, mode, nodes, check)
        except Exception as error:
            found = error
        if mode is not None:
            if isinstance(found, Exception):  # whose frames hold the run's tensors
                _clear_frames(found)
                found = found.with_traceback(None)
                found.__context__ = found.__cause__ = None
            if nodes:
                forget(lambda: [tensor for tensor in nodes if isinstance(tensor, FakeTensor)])
            elif check:
                forget(lambda: [tensor for tensor in alive(FakeTensor) if tensor.fake_mode is mode])  # type: ignore[attr-defined]
        return found

    def _looked_at(
        self, example: Example, form: Form, way: Way, mode: FakeTensorMode | None, nodes: Nodes, check: bool
    ) -> Run | None:
        """What was seen; or, to ``check``, nothing: it has run, and twice where that costs no compute."""
        device = device_of(self.model)
        model, copies = (self.model, []) if way == "itself" else copied(self.model, mode)
        place = _copied_to(device) if mode is None else lambda tensor: fake(tensor, mode, device)
        (args, kwargs), given = placed(example.inputs, place)
        with _on_fakes(mode), _inference(model), self.form(model), form(model):
            part = model.get_submodule(example.path)
            if check and mode is not None:  # whose parameters have no values that could be written over
                part(*args, **kwargs)
                part(*args, **kwargs)
                return None
            watch = Watch(model, tensors_of(model), given, [*self.older, *copies], nodes)
            with watch.open():
                part(*args, **kwargs)
        return Run(
            tuple(watch.calls),
            find(watch.graph),
            watch.outputs,
            {path: tuple(numbers) for path, numbers in watch.executed.items()},
            way,
            tuple(watch.elsewhere),
        )


class _GroupedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within a fake mode: grouped matrix products of any dtype that they run in. Their rule for fake tensors takes
    bfloat16 alone (seen in 2.11 to 2.14), so that no mixture of experts in another dtype would run."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default or args[0].dtype == torch.bfloat16:
            return func(*args, **(kwargs or {}))
        given = {**(kwargs or {}), "out_dtype": None}
        return func(args[0].bfloat16(), args[1].bfloat16(), *args[2:5], **given).to(args[0].dtype)


@contextlib.contextmanager
def _on_fakes(mode: FakeTensorMode | None) -> Iterator[None]:
    if mode is None:
        yield
        return
    with mode, _GroupedProducts():  # type: ignore[no-untyped-call]
        yield


@contextlib.contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """All of the model in eval mode, without gradients, and uncompiled."""
    with Transaction() as undo, undo:
        quiet(undo, model)
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


def hint_of_ids(inputs: Inputs) -> Hint | None:
    """What to do about inputs that are lists of token ids, as a tokenizer gives them by default; None if none are."""
    for name, value in inputs[1].items():
        first = value
        while isinstance(first, list) and first:
            first = first[0]
        if isinstance(value, list) and isinstance(first, int):
            return Hint(f'{name} is a list: pass padding=True and return_tensors="pt" to the tokenizer.')
    return None
