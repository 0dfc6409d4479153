"""The backward's way through the division of a row cap, in one Triton kernel: o_i = (sum_j p_ij v_j) / r_i, with
r_i = max(cap, sum_j p_ij)::

    dA_i = dO_i / r_i, the gradient of the sum that is divided;  delta_i = dA_i . o_i where the cap acts, else 0

With them the backward is that of plain sums, but for delta, which it subtracts from dP.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sigswap.kernels.host.launch import Launch
from sigswap.kernels.host.layout import Layout, are_wide, layout_of, unit_stride, width
from sigswap.kernels.host.problem import MAX_PLANS
from sigswap.kernels.triton.common import UNSPECIALIZED, load_numbers, load_rows, single, store_numbers, store_rows

TILE = 4096
"""Numbers of dO that a program holds."""


def undivided(grad_out: Tensor, out: Tensor, row_sums: Tensor, row_cap: float) -> tuple[Tensor, Tensor]:
    """dA, of grad_out's shape and dtype, and delta, of row_sums'.

    Args:
        grad_out: dO, [B, H, M, Dv], or [total, H, Dv] of packed sequences.
        out: o, of its shape and dtype.
        row_sums: float32, [B, H, M, 1], or [total, H, 1].
        row_cap: Positive.
    """
    grad_out, out = unit_stride(grad_out), unit_stride(out)
    grad, delta = torch.empty_like(grad_out), torch.empty_like(row_sums)
    if grad.numel() == 0:
        return grad, delta.zero_()
    tensors = [
        each if each.dim() == 4 else each.transpose(0, 1)[None] for each in (grad_out, out, row_sums, grad, delta)
    ]
    _launch(_Layouts(*map(layout_of, tensors)), grad_out.device, row_cap)(*tensors)
    return grad, delta


class _Layouts(NamedTuple):
    grad_out: Layout
    out: Layout
    row_sums: Layout
    grad: Layout
    delta: Layout


@functools.lru_cache(MAX_PLANS)
def _launch(layouts: _Layouts, device: torch.device, row_cap: float) -> Launch:
    batch, heads, rows, dim = layouts.out.shape
    wide = width(dim)
    block = min(max(1, TILE // wide), triton.next_power_of_2(rows))
    strides = [layout.strides_or_zero(3) for layout in layouts]
    names = [f"stride_{name}_{axis}" for name in ("do", "o", "sum", "da", "delta") for axis in "bhn"]
    arguments = dict(zip(names, (stride for each in strides for stride in each), strict=True))
    sizes = {"heads": heads, "q_len": rows, "row_cap": row_cap, "VALUE_DIM": dim, "BLOCK_M": block, "BLOCK_DV": wide}
    blocks = triton.cdiv(rows, block) * heads * batch
    return Launch(
        _undivided_kernel, blocks, device, layouts, arguments | sizes | {"WIDE": are_wide(strides)}, num_warps=4
    )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _undivided_kernel(
    do, o, sums, da, delta,
    stride_do_b, stride_do_h, stride_do_n, stride_o_b, stride_o_h, stride_o_n, stride_sum_b, stride_sum_h, stride_sum_n,
    stride_da_b, stride_da_h, stride_da_n, stride_delta_b, stride_delta_h, stride_delta_n, heads, q_len, row_cap,
    VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one head."""
    row_cap = single(row_cap)
    blocks = tl.cdiv(q_len, BLOCK_M)
    start = tl.program_id(0) % blocks * BLOCK_M
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    if WIDE:
        stride_do_n, stride_o_n = tl.cast(stride_do_n, tl.int64), tl.cast(stride_o_n, tl.int64)
        stride_da_n = tl.cast(stride_da_n, tl.int64)
    do += batch * stride_do_b + head * stride_do_h
    o += batch * stride_o_b + head * stride_o_h
    row = start + tl.arange(0, BLOCK_M)
    grads = load_rows(do, 0, 0, start, q_len, stride_do_n, VALUE_DIM, BLOCK_M, BLOCK_DV, False).to(tl.float32)
    outputs = load_rows(o, 0, 0, start, q_len, stride_o_n, VALUE_DIM, BLOCK_M, BLOCK_DV, False).to(tl.float32)
    total = load_numbers(sums + batch * stride_sum_b + head * stride_sum_h, row, q_len, stride_sum_n)
    grads = (grads / tl.maximum(total, row_cap)[:, None]).to(da.dtype.element_ty)
    # Of the rounded dA: dP - delta is dA . (v_j - o), in which roundings of dA then cancel as its parts do.
    number = tl.where(total > row_cap, tl.sum(grads.to(tl.float32) * outputs, 1), 0.0)
    da += batch * stride_da_b + head * stride_da_h
    store_rows(da, grads, start, q_len, stride_da_n, VALUE_DIM, BLOCK_M, BLOCK_DV)
    store_numbers(delta + batch * stride_delta_b + head * stride_delta_h, number, row, q_len, stride_delta_n)
