"""The tensors that results are written to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sigswap.kernels.host.layout import (
    UNIT,
    Layout,
    are_wide,
    has_unit_stride,
    has_whole_rows,
    layout_of,
    output_layout,
)
from sigswap.kernels.host.problem import Gradients, Problem

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The output, from query, key and value, of problems that differ in addresses alone."""
Backward = Callable[[Tensor, Tensor, Tensor, Tensor], Gradients]
"""Their gradients, likewise, from the output's gradient, query, key and value."""


def maker_of(layout: Layout, device: torch.device) -> Callable[[], Tensor]:
    """Makes tensors of a layout, uninitialised, on the device, which is the current one of its type.

    By the function that inductor's code allocates with, if PyTorch has it: it takes half the time.
    """
    make = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if make is None:
        return functools.partial(torch.empty_strided, layout.shape, layout.strides, dtype=layout.dtype, device=device)
    return functools.partial(make, tuple(layout.shape), tuple(layout.strides), layout.dtype)  # no torch.Size


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """The output, uninitialised: [B, H, M, Dv], stored as [B, M, H, Dv].

    Models merge the heads next (``out.transpose(1, 2).reshape(B, M, H * Dv)``), which is free in this layout.
    Fused softmax attention returns it, too. It is no view, so that it may be changed in place.
    """
    return query.new_empty_strided(*output_layout(query.shape, value.shape))


def empty_row_sums(query: Tensor) -> Tensor:
    """The rows' sums of probabilities, uninitialised: query's shape with 1 for the last size, contiguous, in float32
    (float64 of a float64 query)."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((*query.shape[:-1], 1), dtype=dtype)


def empty_varlen_output(query: Tensor, value: Tensor) -> Tensor:
    """The output for packed sequences, uninitialised: [total_q, H, Dv], contiguous."""
    return query.new_empty((query.shape[0], query.shape[1], value.shape[2]))


def empty_gradients(inputs: Sequence[Tensor | None], output_mask: Sequence[bool]) -> Gradients:
    """The gradients of the inputs, uninitialised, in their memory order; None: not needed."""
    pairs = zip(inputs, output_mask, strict=True)
    return tuple([torch.empty_like(tensor) if needed and tensor is not None else None for tensor, needed in pairs])


def gradients_for(problem: Problem) -> tuple[Gradients, Gradients, tuple[Layout | None, ...]]:
    """The gradients that the problem asks for, uninitialised, unless they exist already; where they are written; and
    the layouts of that.

    They are written in themselves, but for the first three, which kernels write: in new tensors, where the last
    dimension is strided.
    """
    signature = problem.signature
    needed = problem.output_mask if problem.grads is None else None
    grads = problem.grads or empty_gradients(problem.inputs, problem.output_mask)
    known = signature.gradient_layouts.get(needed)
    if known is not None:
        return grads, grads, known
    written = list(grads)
    for index, grad in enumerate(grads[:3]):
        if grad is not None and not has_unit_stride(grad.shape, grad.stride()):
            written[index] = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    layouts = tuple([None if new is None else layout_of(new) for new in written])
    if needed is not None and all(new is grad for new, grad in zip(written, grads, strict=True)):
        signature.gradient_layouts[needed] = layouts
    return grads, tuple(written), layouts


def gradient_arguments(
    arguments: dict[str, Any], grads: dict[str, Layout | None], *, in_units: bool = True
) -> dict[str, Any]:
    """Strides of the gradients of query, key and value, named as in Signature.arguments(), in units of 8 elements where
    all allow it (GRAD_UNIT), so that kernels store 16 bytes at once; and WIDE for all. None: not needed."""
    given = {name: layout for name, layout in grads.items() if layout is not None}
    unit = UNIT if in_units and all(has_whole_rows(layout) for layout in given.values()) else 1
    strides = {name: layout.strides_or_zero(3) for name, layout in given.items()}
    names = [f"stride_{name}_{dim}" for name in grads for dim in "bhn"]
    numbers = (stride // unit for name in grads for stride in strides.get(name, (0, 0, 0)))
    wide = arguments["WIDE"] or are_wide(strides.values())
    return dict(zip(names, numbers, strict=True)) | {"GRAD_UNIT": unit, "WIDE": wide}


def layouts_in_place(problem: Problem) -> tuple[Layout | None, ...] | None:
    """The layouts of new gradients, None for what is not needed, where kernels read all tensors as they lie, and write
    gradients in themselves; else None."""
    grads, written, layouts = gradients_for(problem)
    if any(new is not grad for new, grad in zip(written, grads, strict=True)) or problem.signature.is_empty:
        return None
    grad_out = problem.grad_out
    if grad_out is None or not problem.signature.is_readable or not has_unit_stride(grad_out.shape, grad_out.stride()):
        return None
    return layouts


def hand_over(grads: Gradients, written: Gradients) -> None:
    """Copies to the gradients what was written in new tensors."""
    if written is grads:
        return
    for grad, new in zip(grads, written, strict=True):
        if grad is not None and new is not None and grad is not new:
            grad.copy_(new)
