"""Calls of the dense op that were made before, which need no checks again.

Whether arguments are valid, what the op makes of them, and which kernel runs by which plan, depends on how tensors lie
in memory and on plain numbers. On the host that takes longer than a launch, so it is kept: for the forward with what
tells such tensors (:mod:`sigswap.kernels.op.alike`), and for the backward likewise, as hooks may have put other tensors
in the place of saved ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sigswap.kernels import reference, settings
from sigswap.kernels.host.problem import MAX_PLANS, Gradients, Options, Problem
from sigswap.kernels.host.results import Backward, Forward
from sigswap.kernels.op import registration
from sigswap.kernels.op.alike import Alike, are_aligned, like
from sigswap.kernels.op.registration import Function, check_on_one_device, gradients, is_plain, listens

_HALF = (torch.bfloat16, torch.float16)
"""What becomes of float32 depends on PyTorch's settings."""

_TYPES = (Tensor, torch.nn.Parameter)

MAX_KINDS = 8
"""Of calls that are equal in shapes and numbers, and of backwards of a call."""


class Known:
    """What was made of a call's arguments, once they were checked."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, options: Options) -> None:
        problem = Problem(query, key, value, None, None, None, options)
        self.alike = like(query, key, value)
        self.options, self.signature = options, problem.signature
        self.has_gradient = query.requires_grad or key.requires_grad or value.requires_grad
        self.forward = _forward_of(problem)
        self._backwards: list[_KnownBackward] = []

    def backward(self, needed: tuple[bool, ...], grad_out: Tensor, *saved: Tensor) -> Gradients | None:
        """The gradients of query, key and value; needed: which. None: through the dispatcher."""
        if listens():
            return None
        state = needed, torch.are_deterministic_algorithms_enabled(), settings.sigmoid_form
        for known in self._backwards:
            if known.state == state and known.alike(grad_out, *saved):
                return known.run(grad_out, *saved) if are_aligned(grad_out, *saved) else None
        # Only plain tensors have addresses: not what vmap makes of gradients.
        if not is_plain(grad_out, *saved) or saved[0].dtype not in _HALF or not are_aligned(grad_out, *saved):
            return None
        check_on_one_device("sigmoid_attention", (grad_out, *saved))
        query, key, value = saved
        problem = Problem(query, key, value, None, None, None, self.options, grad_out=grad_out)
        problem.output_mask = *needed, False, False
        run = _backward_of(problem)
        if len(self._backwards) >= MAX_KINDS:
            self._backwards.clear()
        self._backwards.append(_KnownBackward(state, like(grad_out, *saved), run))
        return run(grad_out, *saved)


class _KnownBackward(NamedTuple):
    state: tuple[Any, ...]
    alike: Alike
    """Of the output's gradient, query, key and value."""
    run: Backward


def key_of(query: Any, key: Any, value: Any, *numbers: Any) -> tuple[Any, ...] | None:
    """What a call shares with calls that may be known; None: it is none of the usual ones.

    numbers: the other arguments, of which equal ones mean the same: so 1 must not stand for True.
    """
    if type(query) not in _TYPES or type(key) not in _TYPES or type(value) not in _TYPES or listens():
        return None
    try:
        return query.shape, key.shape, value.shape, settings.sigmoid_form, numbers
    except RuntimeError:  # nested tensors have no shape
        return None


def known(kind: tuple[Any, ...], query: Tensor, key: Tensor, value: Tensor) -> Known | None:
    """kind: the call's :func:`key_of`."""
    try:
        candidates = _known.get(kind, ())
    except TypeError:  # sizes that are symbols have no hash
        return None
    for each in candidates:
        if each.alike(query, key, value):
            return each if are_aligned(query, key, value) else None
    return None


def remember(kind: tuple[Any, ...], query: Tensor, key: Tensor, value: Tensor, options: Options) -> None:
    """Of a call that went well, whose tensors the op took as they are."""
    if query.dtype not in _HALF or not is_plain(query, key, value) or not are_aligned(query, key, value):
        return
    if len(_known) >= MAX_PLANS:
        _known.clear()
    alike = _known.setdefault(kind, [])
    if len(alike) >= MAX_KINDS:
        alike.clear()
    alike.append(Known(query, key, value, options))


_known: dict[tuple[Any, ...], list[Known]] = {}


def run(known: Known, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The op, of tensors like those of the known call."""
    if known.has_gradient and torch.is_grad_enabled():
        out: Tensor = _Recorded.apply(known, query, key, value)
        return out
    return known.forward(query, key, value)


class _Recorded(Function):
    @staticmethod
    def forward(ctx: Any, known: Known, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.known = known
        ctx.save_for_backward(query, key, value)
        return known.forward(query, key, value)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        known, saved, needed = ctx.known, ctx.saved_tensors, ctx.needs_input_grad[1:]
        # With create_graph the dispatcher records that there is no second derivative.
        grads = None if torch.is_grad_enabled() else known.backward(needed, grad_out, *saved)
        if grads is None:
            wanted = *needed, False, False
            inputs = (grad_out, *saved, None, None, None, wanted, None)
            grads = gradients(torch.ops.sigswap.sigmoid_attention_backward.default, inputs, known.options, wanted)
        return None, *grads[:3]


def _forward_of(problem: Problem) -> Forward:
    """Of problems that differ from this one in addresses alone."""
    implementation = registration.implementation_for(problem.query.is_cuda)
    if implementation is not reference:
        forward: Forward = implementation.forward_again(problem)
        return forward
    options = problem.options
    return lambda query, key, value: reference.forward(Problem(query, key, value, None, None, None, options))


def _backward_of(problem: Problem) -> Backward:
    implementation = registration.implementation_for(problem.query.is_cuda)
    if implementation is not reference:
        backward: Backward = implementation.backward_again(problem)
        return backward
    options, needed = problem.options, problem.output_mask

    def run(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Gradients:
        again = Problem(query, key, value, None, None, None, options, grad_out=grad_out, output_mask=needed)
        return reference.backward(again)

    return run
