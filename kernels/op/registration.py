"""How a call of an attention op reaches its implementation: what ``ops`` and ``varlen_ops`` share.

An attention op is three pure functions in ``torch.ops.sigswap``::

    name(*inputs, *, options) -> Tensor
    name_sums(*inputs, *, options) -> the same, and the sum of each row's probabilities
    name_backward(grad_out, *inputs, output_mask, row_delta=None, *, options) -> a gradient of each of the first inputs

The inputs are tensors, and then numbers; the options are :class:`sigswap.kernels.host.problem.Options`.
:class:`AttentionOp` registers these functions with PyTorch's dispatcher: implementation, fake, autograd, autocast.

Without a row cap the backward needs the inputs alone. With one, the forward that is recorded is ``name_sums``, whose
results are saved, and the gradient first goes through the division (:func:`sigswap.kernels.reference.undivided`).

Every device runs :mod:`sigswap.kernels.reference`, but for CUDA, which runs :mod:`sigswap.kernels.dispatch`: Triton
kernels, imported at the first call.

Through the dispatcher, a function in Python costs tens of microseconds: its arguments are matched with the schema
above autograd and again below it. Eager calls on plain tensors (:func:`is_plain`), for which the dispatcher would run
autograd and the implementation and nothing else, run these two directly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from sigswap.errors import SigswapError
from sigswap.kernels import reference
from sigswap.kernels.host.problem import Gradients, Options, Problem
from sigswap.kernels.host.results import empty_gradients, empty_row_sums
from sigswap.kernels.op.sharding import meet_dtensors

OPTIONS = (
    "float scale, float const_bias=0.0, bool visible_bias=True, bool is_causal=False, bool bottom_right=False, "
    "SymInt window_left=-1, SymInt window_right=-1, float softcap=0.0, float dropout_p=0.0, float row_cap=0.0"
)
AUTOCAST_DEVICES = ("CPU", "CUDA", "XPU", "MPS")

_Library: Callable[..., Any] = torch.library.Library
library = _Library("sigswap", "DEF")
_unpack_dual: Callable[..., Any] = forward_ad.unpack_dual


class AttentionOp:
    """Defines and registers ``sigswap::<name>``, ``sigswap::<name>_sums`` and ``sigswap::<name>_backward``.

    Args:
        name: Of the op.
        inputs: Its schema's inputs: first query, key and value, then other tensors, then numbers.
        tensors: How many of the inputs are tensors.
        differentiable: How many of the tensors, from the first on, have a gradient.
        check: ``check(*inputs, options)`` raises ArgumentError unless the arguments are valid. It reads no values
            of tensors.
        forward: ``forward(run, inputs, options, row_sums)`` makes a problem of the inputs, has it ``run(problem)``, and
            returns the output; row_sums: where the rows' sums are written, or None.
        backward: ``backward(run, inputs, options)``, likewise, of the backward op's inputs; returns the gradients, None
            for what is not needed.
        empty: ``empty(*inputs)`` is the output, uninitialised.
    """

    def __init__(
        self,
        name: str,
        inputs: str,
        *,
        tensors: int,
        differentiable: int,
        check: Callable[..., None],
        forward: Callable[[Callable[[Problem], Tensor], tuple[Any, ...], Options, Tensor | None], Tensor],
        backward: Callable[[Callable[[Problem], Gradients], tuple[Any, ...], Options], Gradients],
        empty: Callable[..., Tensor],
    ) -> None:
        self.name = name
        self.tensors, self.differentiable = tensors, differentiable
        self._inputs = inputs.count(",") + 1
        self._check = check
        self._forward, self._backward = forward, backward
        self._empty = empty

        tags = (torch.Tag.pt2_compliant_tag,)
        library.define(f"{name}({inputs}, *, {OPTIONS}) -> Tensor", tags=tags)
        library.define(f"{name}_sums({inputs}, *, {OPTIONS}) -> (Tensor, Tensor)", tags=tags)
        results = ", ".join(["Tensor"] * differentiable)
        library.define(
            f"{name}_backward(Tensor grad_out, {inputs.replace('=None', '')}, bool[{differentiable}] output_mask, "
            f"Tensor? row_delta=None, *, {OPTIONS}) -> ({results})",
            tags=tags,
        )
        self.op = getattr(torch.ops.sigswap, name).default
        self.sums_op = getattr(torch.ops.sigswap, f"{name}_sums").default
        self.backward_op = getattr(torch.ops.sigswap, f"{name}_backward").default
        self._register()

    def run(self, inputs: tuple[Any, ...], options: Options) -> Tensor:
        """The op, directly. For inputs that :func:`is_plain`."""
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs[: self.tensors]):
            out: Tensor = _Attention.apply(self, None, options, False, *inputs)
            return out
        return self.forward(inputs, options)

    def forward(self, inputs: tuple[Any, ...], options: Options) -> Tensor:
        self._check(*inputs, options)
        return self._forward(implementation_for(inputs[0].is_cuda).forward, inputs, options, None)

    def forward_with_sums(self, inputs: tuple[Any, ...], options: Options) -> tuple[Tensor, Tensor]:
        self._check(*inputs, options)
        row_sums = empty_row_sums(inputs[0])
        return self._forward(implementation_for(inputs[0].is_cuda).forward, inputs, options, row_sums), row_sums

    def backward(self, inputs: tuple[Any, ...], options: Options) -> Gradients:
        """inputs: of the backward op, all of them. None: not needed."""
        check_on_one_device(self.name, inputs)
        return self._backward(implementation_for(inputs[1].is_cuda).backward, inputs, options)

    def _register(self) -> None:
        # The dispatcher leaves out trailing inputs, and options, that have their default value.
        def complete(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return inputs + (None,) * (self._inputs - len(inputs))

        def complete_backward(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return inputs + (None,) * (self._inputs + 3 - len(inputs))

        # TorchFunctionModes, such as sigswap's, are off inside of implementations.
        def forward(*inputs: Any, **keywords: Any) -> Tensor:
            with torch._C.DisableTorchFunction():
                return self.forward(complete(inputs), Options(**keywords))

        def forward_sums(*inputs: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
            with torch._C.DisableTorchFunction():
                return self.forward_with_sums(complete(inputs), Options(**keywords))

        def backward(*inputs: Any, **keywords: Any) -> tuple[Tensor, ...]:
            with torch._C.DisableTorchFunction():
                return as_results(inputs[1], self.backward(complete_backward(inputs), Options(**keywords)))

        def forward_fake(*inputs: Any, **keywords: Any) -> Tensor:
            inputs = complete(inputs)
            self._check(*inputs, Options(**keywords))
            return self._empty(*inputs)

        def forward_sums_fake(*inputs: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
            return forward_fake(*inputs, **keywords), empty_row_sums(inputs[0])

        def backward_fake(*inputs: Any, **keywords: Any) -> tuple[Tensor, ...]:
            output_mask = complete_backward(inputs)[-2]
            grads = empty_gradients(inputs[1 : 1 + self.differentiable], output_mask)
            return as_results(inputs[1], grads)

        def forward_autograd(keyset: torch._C.DispatchKeySet, *inputs: Any, **keywords: Any) -> Any:
            tensors = inputs[: self.tensors]
            check_no_tangents(self.name, tensors)
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
                return _recorded(_Attention, self, keyset, Options(**keywords), False, *complete(inputs))
            if (keyset & torch._C._after_ADInplaceOrView_keyset).raw_repr() in _IMPLEMENTED:
                return forward(
                    *inputs, **keywords
                )  # what is next, without matching the arguments with the schema again
            return below_autograd(self.op, keyset, inputs, keywords)

        def forward_sums_autograd(keyset: torch._C.DispatchKeySet, *inputs: Any, **keywords: Any) -> Any:
            tensors = inputs[: self.tensors]
            check_no_tangents(f"{self.name}_sums", tensors)
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
                return _recorded(_Attention, self, keyset, Options(**keywords), True, *complete(inputs))
            return below_autograd(self.sums_op, keyset, inputs, keywords)

        def backward_autograd(keyset: torch._C.DispatchKeySet, *inputs: Any, **keywords: Any) -> Any:
            tensors = inputs[: 1 + self.tensors]
            check_no_tangents(f"{self.name}_backward", tensors)
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
                return _recorded(_AttentionBackward, self, keyset, keywords, *inputs)
            if (keyset & torch._C._after_ADInplaceOrView_keyset).raw_repr() in _IMPLEMENTED:
                return backward(*inputs, **keywords)
            return below_autograd(self.backward_op, keyset, inputs, keywords)

        for name, implementation, fake, autograd in (
            (self.name, forward, forward_fake, forward_autograd),
            (f"{self.name}_sums", forward_sums, forward_sums_fake, forward_sums_autograd),
            (f"{self.name}_backward", backward, backward_fake, backward_autograd),
        ):
            library.impl(name, implementation, "CompositeExplicitAutograd")
            torch.library.register_fake(f"sigswap::{name}", fake, lib=library)
            library.impl(name, autograd, "Autograd", with_keyset=True)
        register_autocast(self.op)
        register_autocast(self.sums_op)
        for device in AUTOCAST_DEVICES:
            self._register_autocast(device)

    def _register_autocast(self, device: str) -> None:
        """Of a backward: what its forward was given is cast already."""
        keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

        def backward(*inputs: Any, **keywords: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(keyset):
                return self.backward_op(*inputs, **keywords)

        library.impl(f"{self.name}_backward", backward, f"Autocast{device}")


def register_autocast(op: Any) -> None:
    """Has an op's first three inputs, query, key and value, cast as softmax attention's are. For the op itself, so that
    it holds in graphs, too."""

    def cast(keyset: torch._C.DispatchKeySet, device_type: str, *inputs: Any, **keywords: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        own = [
            tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
            for tensor in inputs[:3]
        ]
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return op(*own, *inputs[3:], **keywords)

    for device in AUTOCAST_DEVICES:
        keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))
        name = op.name().removeprefix("sigswap::")
        library.impl(name, functools.partial(cast, keyset, device.lower()), f"Autocast{device}")


def as_results(query: Tensor, grads: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """As an op returns them: a gradient that is not needed has no elements."""
    return tuple([query.new_empty(0) if grad is None else grad for grad in grads])


def _keys(*names: str) -> int:
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keyset = keyset | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return keyset.raw_repr()


_IMPLEMENTED = _keys("CPU"), _keys("CUDA")
_NOT_PLAIN = ~_keys("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView", "BackendSelect")


_keys_of = torch._C._dispatch_keys
_included, _excluded = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set


def listens() -> bool:
    """Whether something may want to know of a call that no keys of the dispatcher tell of."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_function_stack() > 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether the dispatcher would run autograd and the implementation on these tensors, and nothing else.

    Not so for subclasses, on devices that are not CPU or CUDA, and under modes, torch.func, autocast, forward-mode
    derivatives, tracing, compilation and profiling.
    """
    if listens():
        return False
    # As the dispatcher works out where a call goes: the tensors' keys, and what the thread adds and takes away.
    keys = _included().raw_repr()
    for tensor in tensors:
        if tensor is not None:
            if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
                return False
            keys |= _keys_of(tensor).raw_repr()
    others = keys & _NOT_PLAIN
    return not others or not others & ~_excluded().raw_repr()


def options_of(*numbers: Any) -> Options | None:
    """For a direct call; None: not all have the schema's types. Then the dispatcher converts them, or raises."""
    try:
        return _options(*numbers)
    except TypeError:
        return None


@functools.lru_cache(typed=True)
def _options(
    scale: Any,
    const_bias: Any,
    visible_bias: Any,
    is_causal: Any,
    bottom_right: Any,
    window_left: Any,
    window_right: Any,
    softcap: Any,
    dropout_p: Any,
    row_cap: Any,
) -> Options:
    floats, integers = (scale, const_bias, softcap, dropout_p, row_cap), (window_left, window_right)
    if not all(type(number) is float or type(number) is int for number in floats):
        raise TypeError
    if not all(type(number) is int for number in integers):
        raise TypeError
    if not all(type(switch) is bool for switch in (visible_bias, is_causal, bottom_right)):
        raise TypeError
    return Options(
        float(scale),
        float(const_bias),
        visible_bias,
        is_causal,
        bottom_right,
        window_left,
        window_right,
        float(softcap),
        float(dropout_p),
        float(row_cap),
    )


@functools.cache
def implementation_for(cuda: bool) -> ModuleType:
    if not cuda:
        return reference
    from sigswap.kernels import dispatch

    return dispatch


# Autograd. Written out rather than by torch.library.register_autograd, which takes longer per call.


class Function(_SingleLevelFunction):
    """torch.autograd.Function, but for torch.func, whose levels are the dispatcher's matter here (:func:`_recorded`).

    Function itself would want a setup_context, and would handle the levels a second time.
    """

    _compiled_autograd_key = torch.autograd.Function.__dict__["_compiled_autograd_key"]
    apply: ClassVar[Callable[..., Any]]


_BESIDE_INPUTS = 4
"""Of _Attention's arguments come before the inputs."""


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        op: AttentionOp,
        way: torch._C.DispatchKeySet | None,
        options: Options,
        sums: bool,
        *inputs: Any,
    ) -> Any:
        """way: through the dispatcher, below a keyset; directly, if None. sums: of the op that returns the rows' sums,
        too."""
        ctx.op, ctx.options, ctx.numbers = op, options, inputs[op.tensors :]
        tensors = inputs[: op.tensors]
        if options.row_cap == 0.0 and not sums:
            ctx.save_for_backward(*tensors)
            if way is None:
                return op.forward(inputs, options)
            return _below_autograd_recorded(op.op, way, inputs, options._asdict())
        if way is None:
            out, row_sums = op.forward_with_sums(inputs, options)
        else:
            out, row_sums = _below_autograd_recorded(op.sums_op, way, inputs, options._asdict())
        ctx.save_for_backward(*tensors, *((out, row_sums) if options.row_cap > 0.0 else ()))
        if not sums:
            return out
        ctx.mark_non_differentiable(row_sums)
        return out, row_sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        op, saved, grad, row_delta = ctx.op, ctx.saved_tensors, grads[0], None
        tensors, results_of_forward = saved[: op.tensors], saved[op.tensors :]
        needed = ctx.needs_input_grad[_BESIDE_INPUTS : _BESIDE_INPUTS + op.differentiable]
        # With create_graph the dispatcher records that there is no second derivative.
        direct = not torch.is_grad_enabled() and is_plain(grad, *saved)  # hooks may have saved others
        if results_of_forward:
            check_on_one_device(op.name, (grad, *results_of_forward))
            implementation = implementation_for(grad.is_cuda) if direct else reference  # which is made of traceable ops
            grad, row_delta = implementation.undivided(grad, *results_of_forward, ctx.options.row_cap)
        inputs = (grad, *tensors, *ctx.numbers, needed, row_delta)
        by_op = functools.partial(gradients, op.backward_op, needed=needed)
        results = (op.backward if direct else by_op)(inputs, ctx.options)
        others = [None] * (len(tensors) - len(needed) + len(ctx.numbers))
        return *[None] * _BESIDE_INPUTS, *results, *others


def gradients(
    backward_op: Any, inputs: tuple[Any, ...], options: Options, needed: Sequence[bool]
) -> list[Tensor | None]:
    """By the backward op, through the dispatcher. inputs: its inputs; needed: of which of the results."""
    results = backward_op(*inputs, **options._asdict())
    return [grad if need else None for grad, need in zip(results, needed, strict=True)]


def check_on_one_device(name: str, inputs: Sequence[Any]) -> None:
    """Of a backward: what it got from the forward may have been moved since. Kernels take addresses, and would read on
    the GPU what lies elsewhere."""
    device = inputs[0].device
    for each in inputs:
        if isinstance(each, Tensor) and each.device != device:
            raise SigswapError(
                f"The backward of {name} needs a tensor that is on {each.device} now, and the output's gradient is on "
                f"{device}. Leave parameters and inputs where they are until backward has run, and have hooks on "
                "saved tensors return them to their device."
            )


class _AttentionBackward(Function):
    @staticmethod
    def forward(
        ctx: Any, op: AttentionOp, keyset: torch._C.DispatchKeySet, keywords: dict[str, Any], *inputs: Any
    ) -> Any:
        ctx.name = op.name
        return _below_autograd_recorded(op.backward_op, keyset, inputs, keywords)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise SigswapError(f"{ctx.name} has no second derivative. Compute its first without create_graph.")


def _recorded(function: type[Function], *arguments: Any) -> Any:
    """function.apply, also as one of several levels of torch.func."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    with enable_single_level_autograd_function():
        return function.apply(*arguments)


def below_autograd(
    op: torch._ops.OpOverload, keyset: torch._C.DispatchKeySet, inputs: tuple[Any, ...], keywords: dict[str, Any]
) -> Any:
    meet_dtensors()
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs, **keywords)


def _below_autograd_recorded(*arguments: Any) -> Any:
    """In the forward of an autograd function, which has disabled derivatives: torch.func's outer levels need them."""
    if not torch._C._are_functorch_transforms_active():
        return below_autograd(*arguments)
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return below_autograd(*arguments)


def check_no_tangents(name: str, tensors: tuple[Tensor | None, ...]) -> None:
    if forward_ad._current_level < 0:
        return
    if any(tensor is not None and _unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise SigswapError(f"{name} has no forward-mode derivative (jvp). Use backward mode (grad, vjp).")
