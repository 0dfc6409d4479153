"""Kernels that come before others: the row biases, where rows differ, and the keys that each row sees under a mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sigswap.kernels.host.forms import AUTO
from sigswap.kernels.host.launch import Launch
from sigswap.kernels.host.layout import Layout, contiguous_layout, new_tensor
from sigswap.kernels.host.problem import Problem, Signature
from sigswap.kernels.triton.common import (
    _MASKED_SCORE,
    ROW_BIAS_BLOCK,
    UNSPECIALIZED,
    keys_of_rows,
    row_biases,
    sequence,
    single,
)


class Counts(NamedTuple):
    """Counts how many keys each row sees, int32 [b, H|1, M|1], under a mask [b, ...] and a band."""

    launch: Launch
    layout: Layout

    def __call__(self, attn_mask: Tensor) -> Tensor:
        count = new_tensor(self.layout, attn_mask.device)
        self.launch(attn_mask, count)
        return count


def counts_for(signature: Signature, unit: int = 1) -> Counts | None:
    """None: they are known without counting. unit: the kernel's MASK_UNIT."""
    if not signature.counted:
        return None
    batch, heads, rows = signature.count_shape()
    block_m, block_n = (1, 1024) if rows == 1 else (16, 128 if unit == 1 else 512)
    arguments = signature.arguments() | {"heads": heads, "q_len": rows, "BLOCK_M": block_m, "BLOCK_N": block_n}
    arguments["MASK_UNIT"] = unit
    # With rows == 1 there is no band, and q_len is the number of rows only.
    blocks = triton.cdiv(rows, block_m) * heads * batch
    layout = contiguous_layout((batch, heads, rows))
    launch = Launch(count_kernel, blocks, signature.device, (signature.attn_mask, layout), arguments)
    return Counts(launch, layout)


class RowBiases(NamedTuple):
    """Works out b_i, and the least of each block of rows."""

    launch: Launch
    layout: Layout
    """Of b_i: float32 [B|1, H|1, M], of packed sequences [1, H|1, total]. If not packed, rows are a multiple of 4
    long, so that descriptors can hold them; the added ones are finite."""
    floor: Layout | None
    """Of the least of each block of rows, float32 [B|1, H|1, blocks], or [sequences, ...] if packed; None if no
    kernel asks for it."""

    def __call__(self, problem: Problem, count: Tensor | None) -> tuple[Tensor, Tensor | None]:
        out = new_tensor(self.layout, problem.query.device)
        floor = None if self.floor is None else new_tensor(self.floor, problem.query.device)
        self.launch(out, floor, problem.bias, count, *problem.cu_seqlens)
        return out, floor


def row_biases_for(signature: Signature) -> RowBiases | None:
    """None: a head's rows all have the same."""
    if not signature.has_rows:
        return None
    shapes = [signature.bias.shape[:2]] if signature.bias is not None else []
    shapes += [signature.count_shape()[:2]] if signature.counted else []
    batch, heads = (max((shape[dim] for shape in shapes), default=1) for dim in (0, 1))
    batch = 1 if batch == 1 else signature.batch  # a mask's batch size may be a divisor
    rows = signature.query.shape[2] if signature.packed else triton.cdiv(signature.q_len, 4) * 4
    out = contiguous_layout((batch, heads, rows), torch.float32)
    sequences = signature.batch if signature.packed else batch
    blocks = triton.cdiv(signature.q_len, ROW_BIAS_BLOCK)
    floor = contiguous_layout((sequences, heads, blocks), torch.float32) if signature.form() == AUTO else None
    arguments = signature.arguments() | {"heads": heads, "BLOCK_M": ROW_BIAS_BLOCK, "stride_out_h": rows}
    tensors = (out, floor, *signature.side_layouts()[:2], *signature.cu_layouts())
    return RowBiases(Launch(bias_kernel, blocks * heads * sequences, signature.device, tensors, arguments), out, floor)


# Kernels.


@triton.jit(do_not_specialize=UNSPECIALIZED)
def bias_kernel(
    out, floor, bias, count, cu_q, cu_k, stride_out_h,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_count_b, stride_count_h, stride_count_m,
    mask_batches, heads, q_len, kv_len, total_q, total_k, left, right, const_bias,
    VISIBLE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out[b, h, i] = b_i; rows are stride_out_h apart. Of packed sequences out[0, h, i], of all rows.

    floor[b, h, k]: the least of block k's, also of packed sequences.
    """
    const_bias = single(const_bias)
    blocks = tl.cdiv(q_len, BLOCK_M)
    head = (tl.program_id(0) // blocks) % heads
    batch = tl.program_id(0) // blocks // heads
    batch64, head64 = batch.to(tl.int64), head.to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    if bias is not None:
        bias += batch64 * stride_bias_b + head64 * stride_bias_h
    if count is not None:
        count += (batch % mask_batches).to(tl.int64) * stride_count_b + head64 * stride_count_h
    if cu_q is not None:
        q_start, q_len = sequence(cu_q, batch, q_len, total_q)
        _, kv_len = sequence(cu_k, batch, kv_len, total_k)
        out += head64 * stride_out_h + q_start
        if bias is not None:
            bias += q_start * stride_bias_m
    else:
        out += (batch64 * heads + head) * stride_out_h
    shift = kv_len - q_len if BOTTOM_RIGHT else 0
    result = row_biases(
        row, bias, stride_bias_m, count, stride_count_m, const_bias, q_len, kv_len, shift, left, right,
        bias is not None, VISIBLE, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    # Up to the stride: descriptors read it. Rows beyond the last have finite biases, too.
    tl.store(out + row, result, mask=row < (q_len if cu_q is not None else stride_out_h))
    if floor is not None:
        tl.store(floor + tl.program_id(0), tl.min(tl.where(row < q_len, result, float("inf"))))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def count_kernel(
    mask, count, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    heads, q_len, kv_len, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_UNIT: tl.constexpr,
):  # fmt: skip
    """count[b, h, i] = the keys that row i sees: in its band, and not masked. b and h: of the mask."""
    blocks = tl.cdiv(q_len, BLOCK_M)
    start = tl.program_id(0) % blocks * BLOCK_M
    head = (tl.program_id(0) // blocks) % heads
    batch = tl.program_id(0) // blocks // heads
    shift = kv_len - q_len if BOTTOM_RIGHT else 0
    row = start + tl.arange(0, BLOCK_M)
    mask += batch.to(tl.int64) * stride_mask_b + head.to(tl.int64) * stride_mask_h
    total = tl.zeros((BLOCK_M,), tl.int32)
    last_row = tl.minimum(start + BLOCK_M, q_len) - 1
    begin, end = keys_of_rows(start, last_row, kv_len, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
    for key in range(begin, end, BLOCK_N):
        col = key + tl.arange(0, BLOCK_N)
        pointers = mask + (row.to(tl.int64) * stride_mask_m)[:, None] + (col.to(tl.int64) * stride_mask_n)[None, :]
        inside = (row < q_len)[:, None] & (col < kv_len // MASK_UNIT * MASK_UNIT)[None, :]
        if HAS_LEFT:
            inside &= col[None, :] >= (row + (shift - left))[:, None]
        if HAS_RIGHT:
            inside &= col[None, :] <= (row + (shift + right))[:, None]
        if mask.dtype.element_ty.is_int():
            visible = tl.load(pointers, mask=inside, other=0) != 0
        else:
            tile = tl.load(pointers, mask=inside, other=float("-inf"))
            visible = (tile.to(tl.float32) <= _MASKED_SCORE) == 0  # NaN is visible
        total += tl.sum((visible & inside).to(tl.int32), 1)
    offset = (batch.to(tl.int64) * heads + head) * q_len
    tl.store(count + offset + row, total, mask=row < q_len)
