"""Which kernel runs on a GPU: the first of a list that supports the problem.

To add a kernel, write one file in this folder and one word in a list below. The file has::

    supports(problem: Problem) -> bool
    forward(problem: Problem) -> Tensor        in FORWARD, BLOCK_FORWARD or PAGED_FORWARD
    backward(problem: Problem) -> Gradients    in BACKWARD, or BLOCK_BACKWARD; None for what is not needed

and, if it is used for problems so small that the GPU waits for the host, :func:`forward_again`, :func:`backward_again`.

``supports`` may look at :attr:`Problem.signature` (layouts, options) and :attr:`Problem.asked_for`, but not at
numbers in tensors: its answer is kept for all problems that are equal in these. The word is the file's place in this
folder. Files in ``triton/`` are imported where Triton is and the GPU is one that it compiles for, those in ``hopper/``
only on the GPUs that they are written for. The last word of a list takes everything; the log says once why it does.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sigswap.kernels.host.blocks import Blocks
from sigswap.kernels.host.layout import UNIT, whole_rows
from sigswap.kernels.host.problem import Gradients, Problem
from sigswap.kernels.host.results import Backward, Forward, empty_output

FORWARD = (
    "triton.decode",
    "hopper.decode_wide",
    "triton.decode_wide",
    "triton.short_masked",
    "hopper.forward",
    "triton.forward",
    "reference",
)
BACKWARD = ("triton.short_masked", "hopper.backward", "hopper.backward_wide", "triton.backward", "reference")

BLOCK_FORWARD = ("triton.block_forward", "reference")
"""Of problems under a mask by blocks, as BLOCK_BACKWARD."""
BLOCK_BACKWARD = ("triton.block_backward", "reference")

PAGED_FORWARD = ("hopper.paged_wide", "triton.paged", "reference")
"""Of problems whose keys and values lie in pages, which have no backward."""

PACKED_ROWS = 256
"""Of a sequence on average, from which on keys and values in pages are copied, if "hopper.forward" takes the copies."""

MOST_COPIED = 1 << 30
"""Bytes of such copies. How many keys all sequences have is not known, but how many the longest may have, for which
servers often say the most that their model takes; and the cache leaves them little memory."""

_HERE = nullcontext()

_log = logging.getLogger("sigswap")


def forward(problem: Problem) -> Tensor:
    with _on(problem.query.device):
        if problem.pages is not None and problem.query.shape[2] >= PACKED_ROWS * problem.pages.lengths.shape[0]:
            problem = in_packed_sequences(problem)
        if problem.signature.has_narrow_value:
            return with_wider_value(problem)
        out: Tensor = chosen(_forward_names(problem), problem).forward(problem)
        return out


def backward(problem: Problem) -> Gradients:
    """None: not needed."""
    with _on(problem.query.device):
        names = BACKWARD if problem.blocks is None else BLOCK_BACKWARD
        grads: Gradients = chosen(names, problem).backward(problem)
        return grads


def forward_again(problem: Problem) -> Forward:
    """:func:`forward` of problems that differ from this one, of query, key and value alone, in addresses only.

    By the kernel's own ``forward_again(problem)``, which may return None, if it has one.
    """
    signature, options, device = problem.signature, problem.options, problem.query.device

    def by_problem(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        again = Problem(query, key, value, None, None, None, options)
        again.has_signature(signature)
        return forward(again)

    if signature.has_narrow_value or signature.value_may_be_of_key:
        return by_problem
    run = _own("forward_again", FORWARD, problem)
    if run is None:
        return by_problem

    def by_plan(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with _on(device):
            out: Tensor = run(query, key, value)
            return out

    return by_plan


def backward_again(problem: Problem) -> Backward:
    """Likewise :func:`backward`, from the output's gradient, query, key and value."""
    signature, options, needed, device = problem.signature, problem.options, problem.output_mask, problem.query.device
    kernel = chosen(BACKWARD, problem)

    def by_problem(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Gradients:
        again = Problem(query, key, value, None, None, None, options, grad_out=grad_out, output_mask=needed)
        again.has_signature(signature)
        grads: Gradients = kernel.backward(again)
        return grads

    run = _own("backward_again", BACKWARD, problem) or by_problem

    def on_device(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Gradients:
        with _on(device):
            grads: Gradients = run(grad_out, query, key, value)
            return grads

    return on_device


def _own(name: str, names: tuple[str, ...], problem: Problem) -> Callable[..., Any] | None:
    with _on(problem.query.device):
        prepare = getattr(chosen(names, problem), name, None)
        run: Callable[..., Any] | None = None if prepare is None else prepare(problem)
        return run


def in_packed_sequences(problem: Problem) -> Problem:
    """The problem with its pages copied to packed sequences, if a kernel is made for these."""
    device = problem.query.device.index or 0
    takes = [kernel for name, kernel in _usable(FORWARD, device) if name == "hopper.forward"]
    signature = problem.signature
    if not takes or signature.is_empty or len(problem.key) == 0 or signature.too_much() is not None:
        return problem
    if _bytes_of_copies(problem) > MOST_COPIED:
        return problem
    pages = _module("triton.pages")
    problem = problem.readable()
    copied: Problem = pages.packed(problem)
    if chosen(FORWARD, copied) is not takes[0]:
        return problem
    pages.copy_pages(problem, copied)
    return copied


def _bytes_of_copies(problem: Problem) -> int:
    pages, key, value = problem.pages, problem.key, problem.value
    assert pages is not None
    of_a_key = key.shape[1] * (key.shape[3] + value.shape[3]) * key.element_size()
    return len(pages.lengths) * pages.longest_k * of_a_key


def with_wider_value(problem: Problem) -> Tensor:
    """The forward with columns of zeros in a copy of value, up to whole units of 16 bytes, and with rows of query and
    key that start at such units; the output has neither."""
    value = problem.value
    dim = value.shape[3]
    wider = value.new_zeros((*value.shape[:3], -(-dim // UNIT) * UNIT))
    wider[..., :dim].copy_(value)
    query, key = whole_rows(problem.query), whole_rows(problem.key)
    whole = dataclasses.replace(problem, query=query, key=key, value=wider, out=None)
    out = empty_output(problem.query, value) if problem.out is None else problem.out
    return out.copy_(chosen(_forward_names(whole), whole).forward(whole)[..., :dim])


def _forward_names(problem: Problem) -> tuple[str, ...]:
    if problem.pages is not None:
        return PAGED_FORWARD
    return FORWARD if problem.blocks is None else BLOCK_FORWARD


def undivided(grad_out: Tensor, out: Tensor, row_sums: Tensor, row_cap: float) -> tuple[Tensor, Tensor]:
    """As :func:`sigswap.kernels.reference.undivided`, in one kernel where Triton takes the dtype."""
    device = grad_out.device
    takes = grad_out.dtype != torch.float64 and _obstacle(device.index or 0) is None
    with _on(device):
        kernel = _module("triton.row_caps" if takes else "reference")
        grads: tuple[Tensor, Tensor] = kernel.undivided(grad_out, out, row_sums, row_cap)
        return grads


def blocks_of_mask(mask: Tensor) -> Blocks:
    """The blocks of a bool tensor [b, h, M, N] on a device that :func:`has_triton`."""
    with _on(mask.device):
        blocks: Blocks = _module("triton.block_plan").blocks_of_mask(mask)
        return blocks


def has_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on a CUDA device."""
    return _obstacle(device.index or 0) is None


def chosen(names: tuple[str, ...], problem: Problem) -> Any:
    """The module of the first of the kernels that supports the problem."""
    known, key = problem.signature.kernels, (names, problem.asked_for)
    kernel = known.get(key)
    if kernel is None:
        device = problem.query.device.index or 0
        name, kernel = next((name, each) for name, each in _usable(names, device) if each.supports(problem))
        if name == "reference":
            reason = problem.signature.too_much() or _obstacle(device) or "none of them supports the problem"
            _say_once(f"sigmoid_attention runs in plain PyTorch here, not in sigswap's Triton kernels: {reason}.")
        known[key] = kernel
    return kernel


def _on(device: torch.device) -> AbstractContextManager[object]:
    """The device as the current one; without a switch, if it is that already."""
    return _HERE if device.index == torch.cuda.current_device() else torch.cuda.device(device)


@functools.cache
def _usable(names: tuple[str, ...], device: int) -> list[tuple[str, Any]]:
    """The kernels, with their names, that can be imported and are for such a GPU."""
    kernels = []
    for name in names:
        room = name.partition(".")[0]
        if room in ("triton", "hopper") and _obstacle(device) is not None:
            continue
        if room == "hopper":
            if torch.cuda.get_device_capability(device)[0] != 9:
                continue
            try:
                kernels.append((name, _module(name)))
            except (ImportError, AttributeError) as error:  # Gluon is experimental: names change
                _say_once(f"Long sequences are slower than they could be: this Triton's Gluon differs ({error}).")
        else:
            kernels.append((name, _module(name)))
    return kernels


def _module(name: str) -> Any:
    return importlib.import_module(f"sigswap.kernels.{name}")


@functools.cache
def _obstacle(device: int) -> str | None:
    """Why no Triton kernel runs on the device; None: they do."""
    if torch.version.hip is not None:
        return "they are written for NVIDIA GPUs"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has a compute capability below 8.0"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton could not be imported ({error})"
    return None


@functools.cache
def _say_once(text: str) -> None:
    _log.warning("%s", text)
