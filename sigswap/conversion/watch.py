"""Watches one run of a model: its calls of attention functions, its modules, and an ATen graph of all that it computes.

Nothing is traced. The model gets plain tensors (or fake ones), each op runs as it would without being watched, and a
mode that comes before autograd writes down which op ran on which tensors. So a forward may read values of its tensors
in any way: what it gets are their values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from types import FrameType
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode_temporarily

from sigswap.conversion import keeping
from sigswap.conversion.places import UNSEEN_FILES, Spot
from sigswap.conversion.threads import seen_in_threads
from sigswap.functional.torch_functions import FAMILIES, SWAPS, is_reciprocal
from sigswap.passes.products import PARAMETER
from sigswap.transaction import Transaction

Stack = tuple[tuple[str, int], ...]  # module path and number of the module call (a shared module is called twice)
Nodes = MutableMapping[Tensor, tuple[torch.fx.Node, int]]
CALL = "sigswap_call"  # node.meta key: the innermost recorded call that made the node
STACK = "sigswap_stack"  # node.meta key: the modules inside whose forward the node was made, outermost first
_BEFORE_AUTOGRAD = torch._C.DispatchKey.PreDispatch


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a family function, as the run saw it.

    ``stack``: the module calls it was made in, outermost first. ``spots``: the frames that led to it, innermost first,
    for each module call of the stack from the innermost out. ``mha``: the index of the multi_head_attention_forward
    call that made this one, or None. ``heads``: for multi_head_attention_forward, (heads, head_dim). ``in_function``:
    it was made inside an autograd.Function.
    """

    family: str
    stack: Stack
    spots: tuple[tuple[Spot, ...], ...]
    mha: int | None
    heads: tuple[int, int] | None
    in_function: bool


class Watch(TorchFunctionMode):
    """While it is open, runs of ``model`` are watched, in ``graph`` (for ``find``) and in the records beside it.

    ``parameters`` are tensors that the model holds, ``inputs`` those that it is given: placeholders of the graph, the
    former with ``meta[PARAMETER]``. So are those that are ``older`` than the run; any other whose making was not seen
    counts as an input. ``meta["val"]`` of a node is a tensor without data on the meta device.

    A parameter that the run writes to is as it was when the watch closes. ``nodes`` (empty) will have the tensors of
    the run that are still there.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[Tensor],
        inputs: Iterable[Tensor],
        older: Iterable[Tensor],
        nodes: Nodes,
    ) -> None:
        super().__init__()
        self.model = model
        # ScriptModules take no hooks, and so are in no stack. Held, so that none that the forward makes gets the id of
        # one that it drops.
        self.modules = {id(each): each for each in model.modules() if not isinstance(each, torch.jit.ScriptModule)}
        self.graph = torch.fx.Graph()
        self.calls: list[Call] = []
        self.outputs: dict[str, Tensor | None] = {}  # by module path; of several, the first
        self.executed: dict[str, list[int]] = {}  # module path -> the numbers of its calls
        self.stack: list[tuple[str, int]] = []
        self.open_calls: list[int] = []
        self.module_calls = 0
        self.thread = threading.get_ident()
        self.elsewhere: dict[tuple[str, str], None] = {}  # module path and family of calls in another thread
        self.nodes = nodes  # tensor -> its node, and the number of edits until that was made
        self.memory: dict[int, torch.fx.Node] = {}  # a tensor's memory -> the last node whose memory it is
        self.edits: dict[
            int, tuple[torch.fx.Node, int]
        ] = {}  # a tensor's memory -> its last edit, and the number of it
        self.edit_count = 0
        self.read: dict[float, torch.fx.Node] = {}  # number -> the tensor that it was read of
        self.older = {id(tensor): tensor for tensor in older}
        self.kept: dict[int, list[Tensor]] = {}  # a parameter's memory -> the parameters in it
        self.undo = contextlib.ExitStack()  # puts back the values of the parameters that were written to
        for tensor in inputs:
            self._placeholder(tensor, parameter=False)
        for tensor in parameters:
            self._placeholder(tensor, parameter=True)
            self.kept.setdefault(_memory(tensor), []).append(tensor)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        with Transaction() as undo, undo:
            undo.afterwards("the values of parameters", self._close)
            for path, module in self.model.named_modules():
                if id(module) in self.modules:
                    keeping.pre_hook(undo.afterwards, module, self._enter(path), prepend=True)
                    keeping.hook(undo.afterwards, module, self._leave(path), always_call=True)
            with seen_in_threads(self._note_elsewhere), enable_python_dispatcher(), _Ops(self), self:
                yield

    def _close(self) -> None:
        with torch.no_grad():
            self.undo.close()
        self.older.clear()

    # Modules and calls.

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if threading.get_ident() != self.thread:
                return
            self.module_calls += 1
            self.stack.append((path, self.module_calls))
            self.executed.setdefault(path, []).append(self.module_calls)

        return hook

    def _leave(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() != self.thread:
                return
            self.stack.pop()
            while isinstance(output, tuple | list) and output:
                output = output[0]
            self.outputs[path] = _bare(output) if isinstance(output, Tensor) else None

        return hook

    def _note_elsewhere(self) -> Callable[[Any], None]:
        path = self._where()[-1][0]

        def note(func: Any) -> None:
            if func in SWAPS:
                self.elsewhere[path, FAMILIES.get(func, "softmax")] = None

        return note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__dlpack__ and isinstance(args[0], FakeTensor):
            raise TypeError("a fake tensor has no memory that could be shared")  # torch would share a null pointer
        family = "division" if is_reciprocal(func, args) else FAMILIES.get(func)
        if isinstance(func, HigherOrderOperator):  # has rules for modes that it knows
            with _pop_mode_temporarily(_BEFORE_AUTOGRAD) if _is_watched() else contextlib.nullcontext():
                output = func(*args, **kwargs)
            self.note(func, args, kwargs, output)
            if family is not None:
                self.nodes[output[0]][0].args[0].meta[CALL] = len(self.calls)  # type: ignore[union-attr]
                self.calls.append(Call(family, self._where(), self._spots(), None, None, _in_function()))
            return output
        if family is None:
            return func(*args, **kwargs)
        self.open_calls.append(len(self.calls))
        outer = next((index for index in self.open_calls[:-1] if self.calls[index].family == "mha"), None)
        heads = (args[4], args[3] // args[4]) if family == "mha" else None
        self.calls.append(Call(family, self._where(), self._spots(), outer, heads, _in_function()))
        try:
            if family == "mha":
                # A mode gets this function whole; with the mode on again, the softmax inside it shows as well.
                with self:
                    return SWAPS[func].stand_in(_softmax_heads, *args, **kwargs)
            return func(*args, **kwargs)
        finally:
            self.open_calls.pop()

    def _where(self) -> Stack:
        return tuple(self.stack) or (("", 1),)

    def _spots(self) -> tuple[tuple[Spot, ...], ...]:
        """The frames that led to the recorded call, cut at each call of one of the model's modules. (One that a forward
        makes for itself, ``nn.Softmax(dim=-1)(scores)`` say, is none of them, and not in the stack.)"""
        levels: list[list[Spot]] = [[]]
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code.co_filename not in UNSEEN_FILES:
                levels[-1].append(Spot.of(frame))
            elif code.co_name == "_call_impl" and id(frame.f_locals.get("self")) in self.modules:
                levels.append([])
            frame = frame.f_back
        return tuple(tuple(level) for level in levels)

    # The graph.

    def before(self, func: Any, args: Any, kwargs: Any) -> None:
        """Keeps the values of the parameters that an op is about to write to."""
        for tensor in _written_by(func, args, kwargs):
            for parameter in self.kept.pop(_memory(tensor), ()):
                values = parameter.detach()
                self.undo.enter_context(_unsafe_preserve_version_counter(values))
                self.undo.callback(values.copy_, values.clone())

    def note(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Adds the node of an op that has run."""
        arguments = self._arguments(args)
        if func in _READS and isinstance(output, float):
            self.read[output] = arguments[0]
        elif (
            self.read and getattr(func, "overloadpacket", None) in _SUMS
        ):  # a number that was read of the scores, and shifts them
            arguments = tuple(self._number(value) for value in arguments)
        node = self.graph.call_function(func, arguments, self._arguments(kwargs))
        self._mark(node)
        for tensor in _written_by(func, args, kwargs):
            self.edit_count += 1
            self.edits[_memory(tensor)] = (node, self.edit_count)
            self._is(tensor, node)
        if isinstance(output, Tensor):
            self._is(output, node)
        elif isinstance(output, tuple | list):
            for index, item in enumerate(output):
                if isinstance(item, Tensor):
                    part = self.graph.call_function(operator.getitem, (node, index))
                    self._mark(part)
                    self._is(item, part)

    def _arguments(self, value: Any) -> Any:
        """``value`` with the node of each tensor in place of it."""
        if isinstance(value, Tensor):
            return self._node_of(value)
        if isinstance(value, tuple | list):
            return type(value)(map(self._arguments, value)) if type(value) in (tuple, list) else value
        return {key: self._arguments(item) for key, item in value.items()} if type(value) is dict else value

    def _number(self, value: Any) -> Any:
        """``value``; if it is a number that was read of a tensor, or minus that, the tensor's node."""
        if not isinstance(value, float):
            return value
        return self.read.get(value, self.read.get(-value, value))

    def _node_of(self, tensor: Tensor) -> torch.fx.Node:
        known = self.nodes.get(tensor)
        if known is None:
            return self._met(tensor)
        node, edits_until_then = known
        edit, number = self.edits.get(_memory(tensor), (None, 0))
        if number > edits_until_then:  # through another view of the same memory
            node = self.graph.call_function(torch.ops.aten.slice_scatter.default, (node, edit))
            self._mark(node)
            self._is(tensor, node)
        return node

    def _met(self, tensor: Tensor) -> torch.fx.Node:
        """A node for a tensor that no op has made: ``parameter.data``, a constant, one out of numpy or of vmap."""
        origin = self.memory.get(_memory(tensor))
        if origin is None:
            return self._placeholder(tensor, parameter=id(tensor) in self.older)
        old, new = origin.meta["val"], _bare(tensor)
        same = old is not None and new is not None and old.shape == new.shape
        node = self.graph.call_function(torch.ops.aten.alias.default if same else _in_the_memory_of, (origin,))
        self._mark(node)
        self._is(tensor, node)
        return node

    def _placeholder(self, tensor: Tensor, parameter: bool) -> torch.fx.Node:
        node = self.graph.placeholder(f"tensor_{len(self.graph.nodes)}")
        if parameter:
            node.meta[PARAMETER] = True
        self._mark(node)
        self._is(tensor, node)
        return node

    def _mark(self, node: torch.fx.Node) -> None:
        node.meta[STACK] = self._where()
        if self.open_calls:
            node.meta[CALL] = self.open_calls[-1]

    def _is(self, tensor: Tensor, node: torch.fx.Node) -> None:
        """From now on, ``node`` is what ``tensor`` holds."""
        node.meta["val"] = _bare(tensor)
        self.nodes[tensor] = (node, self.edit_count)
        self.memory[_memory(tensor)] = node


class _Ops(SchemaCheckMode):  # type: ignore[no-untyped-call]
    """The mode before autograd. There is place for a SchemaCheckMode there, and it is for runs on concrete tensors."""

    def __init__(self, watch: Watch) -> None:
        TorchDispatchMode.__init__(self, _BEFORE_AUTOGRAD)  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.watch.before(func, args, kwargs)
        output = func(*args, **kwargs)
        if func is torch.ops.aten.lift_fresh.default and args[0] not in self.watch.nodes:
            self.watch.older[id(args[0])] = args[0]  # torch.tensor(...), of numbers
        self.watch.note(func, args, kwargs, output)
        return output


_READS = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
_SUMS = tuple(getattr(torch.ops.aten, name) for name in ("add", "add_", "sub", "sub_", "rsub"))


def _is_watched() -> bool:
    """Whether ops are being written down, that is not within one that is."""
    return bool(torch._ops._len_torch_dispatch_stack_pre_dispatch())  # type: ignore[no-untyped-call]


def _in_the_memory_of(tensor: Tensor) -> Tensor:
    """What a node calls whose tensor is another form of the input's memory, got past the dispatcher."""
    raise NotImplementedError


def _written_by(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that an op writes to."""
    if not isinstance(func, OpOverload) or not func._schema.is_mutable:
        return
    if func in (torch.ops.aten.detach_.default, torch.ops.aten.requires_grad_.default):
        return
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = given.get(argument.name)
            yield from (x for x in (value if isinstance(value, tuple | list) else [value]) if isinstance(x, Tensor))


def _memory(tensor: Tensor) -> int:
    """What identifies the memory of a tensor; a nested or a vmapped one has none that can be named."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return id(tensor)


def _bare(tensor: Tensor) -> Tensor | None:
    """An empty tensor of that form on the meta device, under any mode; None if it has no plain form."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return None
    with no_dispatch():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


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
