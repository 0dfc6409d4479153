"""Looks for attention in a module: runs it once on fake tensors, records the graph, and finds the sites in it.

The run is on a structural copy whose parameters are fake (no memory, no compute of the model's size), so whatever the
forward does to its module (caches, buffers, counters) never reaches the user's model. A forward that needs values of
its inputs (``if mask.all()``) is run again on copies of the real parameters, under no_grad. The copy has no hooks, and
is on one device, wherever the model's modules are.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, _ops, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sigswap.conversion import accelerate_hooks
from sigswap.conversion.state import UNSEEN_FILES
from sigswap.errors import ExampleInputsError, Hint
from sigswap.functional.torch_functions import FAMILIES, SWAPS
from sigswap.passes.find import find
from sigswap.passes.products import PARAMETER
from sigswap.passes.site import FindResult

_set_mode: Callable[..., None] = _ops._set_mode_pre_dispatch
_unset_mode: Callable[..., Any] = _ops.unset_mode_pre_dispatch
Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments of one call of the model
INPUT_FORMS = "a tensor, a tuple of positional arguments, a dict of keyword arguments, or a list of those"
Stack = tuple[tuple[str, int], ...]  # module path and number of the module call (a shared module is called twice)
# Functions that give the value of a tensor to Python.
_VALUES = {
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
    torch.Tensor.__contains__,
}
_CALL = "sigswap_call"  # node.meta key: the innermost recorded call that made the node
_STACK = "sigswap_stack"  # node.meta key: the modules inside whose forward the node was made, outermost first


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a family function, as the run saw it.

    ``stack``: the module calls it was made in, outermost first. ``lines``: the code lines that led to it, for each
    module call of the stack from the innermost out. ``mha``: the index of the multi_head_attention_forward call that
    made this one, or None. ``heads``: for multi_head_attention_forward, (heads, head_dim). ``in_function``: it was
    made inside an autograd.Function.
    """

    family: str
    stack: Stack
    lines: tuple[tuple[tuple[str, int], ...], ...]
    mha: int | None
    heads: tuple[int, int] | None
    in_function: bool


@dataclasses.dataclass(frozen=True)
class Run:
    """One recorded run: its calls, what was found in its graph, and what each module returned."""

    calls: tuple[Call, ...]
    found: FindResult
    outputs: Mapping[str, Any]
    executed: Mapping[str, tuple[int, ...]]  # module path -> the numbers of its calls
    real: bool  # the run needed the values of the real parameters

    def call_of(self, node: torch.fx.Node) -> int | None:
        return node.meta.get(_CALL)

    def stack_of(self, node: torch.fx.Node) -> Stack:
        stack: Stack = node.meta.get(_STACK, (("", 1),))
        return stack


def run(model: nn.Module, inputs: Inputs, prepare: Callable[[nn.Module], None] | None = None) -> Run:
    """Records one forward of ``model`` on ``inputs`` (moved to the model's device) and finds its attention sites.

    ``prepare`` may change the copy before it runs (another attention implementation, say). The model itself is not
    touched. Raises ExampleInputsError if the forward fails.
    """
    on_meta = any(tensor.is_meta for tensor in _tensors_of(model))
    try:
        return _run(model, inputs, prepare, fake=True)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        if on_meta:
            raise ExampleInputsError(
                "the model's forward depends on the values of its tensors "
                f"({error}), so it cannot be looked at on the meta device.",
                hint=Hint("Convert it after its weights are loaded, or before accelerate offloads them."),
            ) from error
    return _run(model, inputs, prepare, fake=False)


def _run(model: nn.Module, inputs: Inputs, prepare: Callable[[nn.Module], None] | None, fake: bool) -> Run:
    device = device_of(model)
    devices = dict.fromkeys(str(parameter.device) for parameter in model.parameters() if not parameter.is_meta)
    if not fake and len(devices) > 1 and accelerate_hooks.is_hooked(model):
        device = torch.device("cpu")  # one device may not hold copies of all
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    clone, parameters = _clone(model, mode, device)
    for module in clone.modules():
        module.__dict__["training"] = False  # not .eval(): some models override it
    args, kwargs = tree_map_only(Tensor, lambda x: _converted(x, mode, device), inputs)
    recorder = _Recorder(clone)

    def forward(parameters: list[Tensor], args: Any, kwargs: Any) -> list[Tensor]:
        with recorder:
            output = clone(*args, **kwargs)
            recorder.stamp()
        recorder.outputs[""] = output
        return [leaf for leaf in tree_leaves(_tensor_tree(output)) if isinstance(leaf, Tensor)]

    spread = ""
    if len(devices) > 1:
        spread = (
            f" It lies on {', '.join(devices)}, and what was run is a copy on {device} alone, without hooks: if its "
            "own forward moves tensors between devices, convert the model before it is spread over them."
        )
    try:
        if prepare is not None:
            prepare(clone)
        with (
            mode,
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            torch.random.fork_rng(devices=[], enabled=not fake),
        ):
            traced = make_fx(forward, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(
                parameters, args, kwargs
            )
    except (DataDependentOutputException, DynamicOutputShapeException):
        raise
    except Exception as error:
        raise ExampleInputsError(
            f"{type(model).__name__} failed on the example inputs ({type(error).__name__}: {error}).{spread}",
            hint=Hint(f"Pass {{example_inputs}} that its forward accepts: {INPUT_FORMS}.", {"example_inputs": ""}),
        ) from error
    finally:
        _forget_fake_tensors()
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for node in placeholders[: len(parameters)]:
        node.meta[PARAMETER] = True
    return Run(
        tuple(recorder.calls),
        find(traced.graph),
        recorder.outputs,
        {path: tuple(numbers) for path, numbers in recorder.executed.items()},
        not fake,
    )


def _forget_fake_tensors() -> None:
    """Clears the functools caches that the run has put fake tensors into; the real model would get them from there."""
    for cache in gc.get_objects():
        if type(cache) is functools._lru_cache_wrapper:
            reached: list[object] = [cache]
            for _ in range(4):  # the cache's links, their tuples, what these hold
                reached = [inner for outer in reached for inner in gc.get_referents(outer) if not callable(inner)]
                if any(type(value) is FakeTensor for value in reached):
                    cache.cache_clear()
                    break
                reached = [
                    v for v in reached if isinstance(v, tuple | list | dict) or type(v).__name__ == "_lru_list_elem"
                ]


def _tensor_tree(output: Any) -> Any:
    """Model outputs of transformers are dicts, whatever pytree makes of them."""
    return dict(output) if isinstance(output, Mapping) else output


# The copy.


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a module of ``model`` holds: parameters, buffers, and tensors in plain attributes."""
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            for leaf in tree_leaves(value) if isinstance(value, list | tuple | dict) else [value]:
                if isinstance(leaf, Tensor):
                    yield leaf


def device_of(model: nn.Module) -> torch.device:
    """The device on which the copy runs: the model's, or the CPU for a model on the meta device."""
    for tensor in _tensors_of(model):
        if not tensor.is_meta:
            return tensor.device
    return torch.device("cpu")


def _clone(model: nn.Module, mode: Any, device: torch.device) -> tuple[nn.Module, list[Tensor]]:
    """A copy of the module tree around fake tensors (or around the model's own parameters), without hooks."""
    memo: dict[int, Any] = {}
    keep: list[Tensor] = []
    hooked = accelerate_hooks.is_hooked(model)
    for tensor in _tensors_of(model):
        if id(tensor) not in memo:
            if isinstance(mode, FakeTensorMode):
                memo[id(tensor)] = _converted(tensor, mode, device)
            else:
                # Without its hooks, nothing would move what goes from one device to another.
                value = tensor.detach().to(device, copy=True) if hooked else tensor.detach().clone()
                memo[id(tensor)] = (
                    nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
                )
            keep.append(tensor)
    accelerate_hooks.leave_out(model, memo)
    try:
        clone = copy.deepcopy(model, memo)
    except Exception as error:
        raise ExampleInputsError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and its attention is looked "
            "for in a copy.",
            hint=Hint("Remove the attribute that cannot be deep-copied before the conversion."),
        ) from error
    accelerate_hooks.strip(clone)
    for module in clone.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        # Users' hooks may write into the users' own objects.
        for name in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_forward_hooks_with_kwargs",
            "_forward_pre_hooks_with_kwargs",
        ):
            module.__dict__[name] = type(getattr(module, name))()
    owned = {id(t) for module in clone.modules() for t in (*module._parameters.values(), *module._buffers.values())}
    return clone, [fake for fake in memo.values() if isinstance(fake, Tensor) and id(fake) in owned]


def _converted(tensor: Tensor, mode: Any, device: torch.device) -> Tensor:
    """``tensor`` as a fake tensor of ``mode`` (or itself), on ``device`` if it was on another or on meta."""
    if not isinstance(mode, FakeTensorMode):
        return tensor.detach().to(device, copy=True)
    if isinstance(tensor, FakeTensor) and tensor.fake_mode is mode:
        return tensor
    if tensor.device == device and not isinstance(tensor, FakeTensor):
        return mode.from_tensor(tensor)
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


# The recording.


class _Recorder(TorchFunctionMode):
    """Records the calls of family functions, and stamps each new graph node with its call and its module stack."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.outputs: dict[str, Any] = {}
        self.executed: dict[str, list[int]] = {}
        self.stack: list[tuple[str, int]] = []
        self.module_calls = 0
        self.open_calls: list[int] = []
        self.last: torch.fx.Node | None = None
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks
            module.register_forward_pre_hook(self._enter(path))
            module.register_forward_hook(self._leave(path), always_call=True)

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.stamp()
            self.module_calls += 1
            self.stack.append((path, self.module_calls))
            self.executed.setdefault(path, []).append(self.module_calls)

        return hook

    def _leave(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.stamp()
            self.stack.pop()
            self.outputs[path] = output

        return hook

    def stamp(self) -> None:
        """Gives the nodes made since the last stamp the current call and module stack."""
        proxy_mode = get_proxy_mode()
        if proxy_mode is None:
            return
        root = proxy_mode.tracer.graph._root
        node = root.prev
        while node is not root and node is not self.last:
            if _STACK not in node.meta:
                node.meta[_STACK] = tuple(self.stack) or (("", 1),)
                if self.open_calls:
                    node.meta[_CALL] = self.open_calls[-1]
            node = node.prev
        self.last = root.prev if root.prev is not root else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        family = FAMILIES.get(func)
        if func in _VALUES and not isinstance(args[0], FakeTensor):
            # On real tensors a value is to be had, though not from within the trace.
            proxy_mode = _unset_mode(torch._C._TorchDispatchModeKey.PROXY)
            try:
                return func(*args, **kwargs)
            finally:
                _set_mode(proxy_mode)
        if family is None:
            output = func(*args, **kwargs)
            self.stamp()
            return output
        self.stamp()
        self.open_calls.append(len(self.calls))
        outer = next((index for index in self.open_calls[:-1] if self.calls[index].family == "mha"), None)
        heads = (args[4], args[3] // args[4]) if family == "mha" else None
        self.calls.append(Call(family, tuple(self.stack) or (("", 1),), _code_lines(), outer, heads, _in_function()))
        try:
            if family == "mha":
                # A mode gets this function whole; with the mode on again, the softmax inside it shows as well.
                with self:
                    return SWAPS[func].stand_in(_softmax_heads, *args, **kwargs)
            return func(*args, **kwargs)
        finally:
            self.stamp()
            self.open_calls.pop()


def _softmax_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """The softmax attention that a :class:`sigswap.functional.multi_head.Attention` stands in for, to be looked at."""
    output = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal)
    return output, (query @ key.mT if need_weights else None)


def _in_function() -> bool:
    """Whether the recorded call is made in the forward of an autograd.Function, whose first argument is its context."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != "_call_impl":
        first = frame.f_code.co_varnames[:1]
        if first and isinstance(frame.f_locals.get(first[0]), torch.autograd.function.FunctionCtx):
            return True
        frame = frame.f_back
    return False


def _code_lines() -> tuple[tuple[tuple[str, int], ...], ...]:
    """The code lines that led to the recorded call, cut at each call of a module."""
    levels: list[list[tuple[str, int]]] = [[]]
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_filename not in UNSEEN_FILES:
            levels[-1].append((code.co_filename, frame.f_lineno))
        elif code.co_name == "_call_impl":
            levels.append([])
        frame = frame.f_back
    return tuple(tuple(level) for level in levels)
