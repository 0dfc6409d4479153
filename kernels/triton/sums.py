"""Sums of float32 partial results, rounded once to the dtype of what they are summed into: one Triton kernel."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sigswap.kernels.host.launch import Launch
from sigswap.kernels.host.layout import Layout, contiguous_layout, new_tensor

TILE = 4096
"""Numbers that a program adds up at a time."""


class Sum:
    """``out.copy_(parts.sum_to_size(out.shape))``, in a fixed order, for tensors of these shapes.

    out: any floating-point dtype. It is 1 in the dimensions that are summed over, or lacks them, if they come first.
    parts: the shape of float32 numbers, contiguous.
    """

    def __init__(self, out: Layout, parts: tuple[int, ...], device: torch.device) -> None:
        self.parts = parts
        self._layout = contiguous_layout(parts, torch.float32)
        self._device = device
        self._launch = _launch(out, parts, device)

    def empty_parts(self) -> Tensor:
        return new_tensor(self._layout, self._device)

    def zero_parts(self) -> Tensor:
        return zeros(self._layout, self._device)

    def __call__(self, parts: Tensor, out: Tensor) -> None:
        if self._launch is None:
            out.copy_(parts.sum_to_size(out.shape))
        else:
            self._launch(parts, out)


def zeros(layout: Layout, device: torch.device) -> Tensor:
    """A contiguous tensor. By full(), which inductor lowers, as it does not torch.zeros()."""
    return torch.full(layout.shape, 0.0, dtype=layout.dtype, device=device)


def _launch(layout: Layout, parts: tuple[int, ...], device: torch.device) -> Launch | None:
    """None: out is not contiguous, the dimensions that are kept do not follow one another, or there is nothing to
    sum."""
    if layout.strides_or_zero(len(layout.shape)) != contiguous_layout(layout.shape).strides_or_zero(len(layout.shape)):
        return None
    out = (1,) * (len(parts) - len(layout.shape)) + tuple(layout.shape)
    kept = [dim for dim, size in enumerate(out) if size > 1]
    start, end = (kept[0], kept[-1] + 1) if kept else (0, 0)
    if out[start:end] != parts[start:end] or math.prod(parts) == 0 or math.prod(out) == 0:
        return None
    outer, middle, inner = (math.prod(parts[part]) for part in (slice(start), slice(start, end), slice(end, None)))
    terms = min(64, triton.next_power_of_2(outer)) if inner == 1 else TILE
    numbers = TILE // terms
    arguments = {"kept": middle, "inner": inner, "terms": outer * inner, "BLOCK_K": numbers, "BLOCK_T": terms}
    tensors = contiguous_layout(parts, torch.float32), layout
    return Launch(_sum_kernel, triton.cdiv(middle, numbers), device, tensors, arguments, num_warps=8)


@triton.jit(do_not_specialize=["kept", "terms"])
def _sum_kernel(parts, out, kept, inner, terms, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr):
    """out[k] = the sum over s and r of parts[s, k, r]; r goes up to inner, and terms is how many pairs there are."""
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for start in range(0, terms, BLOCK_T):
        term = start + tl.arange(0, BLOCK_T)
        offset = (term // inner).to(tl.int64) * kept * inner + term % inner
        pointers = parts + offset[:, None] + (k * inner)[None, :]
        total += tl.load(pointers, mask=(term < terms)[:, None] & (k < kept)[None, :], other=0.0)
    tl.store(out + k, tl.sum(total, 0).to(out.dtype.element_ty), mask=k < kept)
