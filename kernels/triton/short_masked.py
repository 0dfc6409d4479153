"""Sigmoid attention of short sequences under a mask with rows, as Swin's windows have it, in Triton.

All scores of a head fit into one tile. A program takes one head, and of the batch every sequence that has the same mask
(or a part of them): what the mask, the band and the row bias add to a score is one tile, loaded and worked out once.
The backward is one kernel for the same reason: dS stays in registers, and its sum over the batch is the gradient of
the mask.

What the batch's parts add up to is summed in a fixed order, by
:mod:`sigswap.kernels.triton.sums`: all is deterministic.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sigswap.kernels.host.launch import Launch
from sigswap.kernels.host.layout import Layout, contiguous_layout, layout_of
from sigswap.kernels.host.problem import MAX_PLANS, Gradients, Problem, Signature, output_arguments
from sigswap.kernels.host.results import gradient_arguments, gradients_for, hand_over
from sigswap.kernels.host.tiles import limits_of
from sigswap.kernels.triton.common import (
    _MASKED_SCORE,
    UNSPECIALIZED,
    elements,
    load_numbers,
    load_rows,
    sigmoid,
    single,
    store_numbers,
    store_rows,
    unit_of,
)
from sigswap.kernels.triton.sums import Sum

LONGEST = 64
"""The most rows or keys of a tile."""

FORWARD_PROGRAMS = 8
BACKWARD_PROGRAMS = 6
"""Per multiprocessor, if there is work for so many; each takes as many sequences as then remain for it."""


def supports(problem: Problem) -> bool:
    """Whether these kernels take the attention, forward and backward: others have no mask with rows, are longer, or
    have dropout, a soft cap, GQA, a row bias of the batch, or scores of float32, whose products run on the ordinary
    units."""
    signature = problem.signature
    query, key, value, bias, attn_mask = (
        signature.query,
        signature.key,
        signature.value,
        signature.bias,
        signature.attn_mask,
    )
    return (
        attn_mask is not None
        and attn_mask.shape[2] > 1
        and max(*query.shape[2:], *key.shape[2:], value.shape[3]) <= LONGEST
        and signature.heads == signature.kv_heads
        and signature.element_size == 2
        and problem.options.dropout_p == 0.0
        and problem.options.softcap == 0.0
        and (bias is None or bias.shape[0] == 1)
        and not signature.is_empty
        and signature.too_much() is None
    )


def forward(problem: Problem, programs: int = FORWARD_PROGRAMS) -> Tensor:
    """Deterministic. programs: overrides their number, for tests and tuning."""
    problem = problem.readable()
    query, key, value, bias, attn_mask = problem.inputs
    row_sums = problem.row_sums
    plan = _plan_forward(problem.signature, None if row_sums is None else layout_of(row_sums), programs)
    out = query.new_empty_strided(plan.out.shape, plan.out.strides)
    plan.launch(query, key, value, out, row_sums, bias, attn_mask)
    return out


def backward(problem: Problem, programs: int = BACKWARD_PROGRAMS) -> Gradients:
    """Deterministic. programs: overrides their number, for tests and tuning."""
    grads, written, layouts = gradients_for(problem)
    grad_out, problem = problem.readable_grad_out(), problem.readable()
    query, key, value, bias, attn_mask = problem.inputs
    *outputs, new_bias, new_mask = written
    delta = problem.row_delta
    of_delta = None if delta is None else layout_of(delta)
    plan = _plan_backward(problem.signature, layout_of(grad_out), of_delta, layouts, programs)
    sums = None if plan.sum_bias is None else plan.sum_bias.empty_parts()
    parts = None if plan.sum_mask is None else plan.sum_mask.empty_parts()
    plan.launch(query, key, value, grad_out, delta, *outputs, sums, parts, bias, attn_mask)
    if plan.sum_bias is not None and sums is not None and new_bias is not None:
        plan.sum_bias(sums, new_bias)
    if plan.sum_mask is not None and parts is not None and new_mask is not None:
        plan.sum_mask(parts, new_mask)
    hand_over(grads, written)
    return grads


class _ForwardPlan(NamedTuple):
    launch: Launch
    out: Layout


@functools.lru_cache(MAX_PLANS)
def _plan_forward(signature: Signature, row_sums: Layout | None, programs: int) -> _ForwardPlan:
    """row_sums: None: not asked for."""
    out = signature.output()
    arguments = signature.arguments(q=signature.query, k=signature.key, v=signature.value, o=out)
    arguments |= output_arguments(arguments, sum=row_sums)
    splits, divided = _division(signature, programs)
    tensors = signature.query, signature.key, signature.value, out, row_sums, signature.bias, signature.attn_mask
    options = {"num_warps": 4, "num_stages": 3}
    blocks = splits * divided["tiles"]
    return _ForwardPlan(Launch(_forward_kernel, blocks, signature.device, tensors, arguments | divided, **options), out)


class _BackwardPlan(NamedTuple):
    launch: Launch
    sum_bias: Sum | None
    """Of the sums of dS over keys, [splits * mask's batch, H, M, 1]."""
    sum_mask: Sum | None
    """Of the sums of dS over the batch's parts, [splits, mask's batch, H, M, N]."""


@functools.lru_cache(MAX_PLANS)
def _plan_backward(
    signature: Signature, grad_out: Layout, delta: Layout | None, grads: tuple[Layout | None, ...], programs: int
) -> _BackwardPlan:
    """grads: of query, key, value, bias and attn_mask; None: not needed."""
    query, key, value, device = signature.query, signature.key, signature.value, signature.device
    *written, grad_bias, grad_mask = grads
    arguments = signature.arguments(q=query, k=key, v=value, do=grad_out)
    arguments |= gradient_arguments(arguments, dict(zip(("dq", "dk", "dv"), written, strict=True)))
    arguments |= output_arguments(arguments, delta=delta)
    splits, divided = _division(signature, programs)
    batches, heads, rows = divided["mask_batches"], signature.heads, signature.q_len
    sum_bias = sum_mask = None
    if grad_bias is not None:
        sum_bias = Sum(grad_bias, (splits * batches, heads, rows, 1), device)
    if grad_mask is not None:
        sum_mask = Sum(grad_mask, (splits, batches, heads, rows, signature.kv_len), device)
    partial = (None if s is None else contiguous_layout(s.parts, torch.float32) for s in (sum_bias, sum_mask))
    tensors = (query, key, value, grad_out, delta, *written, *partial, signature.bias, signature.attn_mask)
    blocks, options = splits * divided["tiles"], {"num_warps": 4, "num_stages": 3}
    launch = Launch(_backward_kernel, blocks, device, tensors, arguments | divided, **options)
    return _BackwardPlan(launch, sum_bias, sum_mask)


def _division(signature: Signature, programs: int) -> tuple[int, dict[str, int]]:
    """The parts that the sequences with the same mask are divided into, and the kernels' arguments for it."""
    assert signature.attn_mask is not None
    batches = signature.attn_mask.shape[0]
    tiles, terms = batches * signature.heads, signature.batch // batches
    wanted = max(1, programs * limits_of(signature.device).multiprocessors // tiles)
    each = triton.cdiv(terms, min(terms, wanted))
    sizes = {"BLOCK_M": signature.q_len, "BLOCK_N": signature.kv_len}
    blocks = {name: max(16, triton.next_power_of_2(size)) for name, size in sizes.items()}
    return triton.cdiv(terms, each), {
        "mask_batches": batches,
        "tiles": tiles,
        "terms": terms,
        "terms_per_split": each,
        **blocks,
    }


# Device functions.


@triton.jit
def _added(
    mask, bias, own, head, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_bias_h, stride_bias_m,
    q_len, kv_len, left, right, const_bias,
    VISIBLE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """What is added to the scores, [BLOCK_M, BLOCK_N], in units of unit_of(FORM); and whether a row sees a key."""
    mask += own.to(tl.int64) * stride_mask_b + head.to(tl.int64) * stride_mask_h
    row = tl.arange(0, BLOCK_M)[:, None]
    col = tl.arange(0, BLOCK_N)[None, :]
    shift = kv_len - q_len if BOTTOM_RIGHT else 0
    visible = (row < q_len) & (col < kv_len)
    if HAS_LEFT:
        visible &= col >= row + (shift - left)
    if HAS_RIGHT:
        visible &= col <= row + (shift + right)
    tile = tl.load(mask + row.to(tl.int64) * stride_mask_m + col.to(tl.int64) * stride_mask_n, mask=visible, other=0)
    if mask.dtype.element_ty.is_int():
        visible &= tile != 0
        added = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        added = tile.to(tl.float32)
        visible &= (added <= _MASKED_SCORE) == 0  # NaN is visible
    row_bias = tl.zeros((BLOCK_M,), tl.float32) + const_bias
    if VISIBLE:
        row_bias -= tl.log(tl.maximum(tl.sum(visible.to(tl.int32), 1), 1).to(tl.float32))
    if bias is not None:
        bias += head.to(tl.int64) * stride_bias_h
        rows = tl.arange(0, BLOCK_M)
        row_bias += tl.load(bias + rows.to(tl.int64) * stride_bias_m, mask=rows < q_len, other=0.0).to(tl.float32)
    return (added + row_bias[:, None]) * unit_of(FORM), visible


@triton.jit
def _probabilities(s, scale, added, visible, FORM: tl.constexpr, ASM: tl.constexpr):
    """What is masked is exactly 0, also where the score is NaN."""
    x = tl.where(visible, s * (scale * unit_of(FORM)) + added, float("-inf"))
    return tl.where(visible, sigmoid(x, FORM, ASM), 0.0)


@triton.jit
def _rows_of(head, length, stride, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """All rows of one head of one sequence, [BLOCK, WIDTH]."""
    return load_rows(head, 0, 0, 0, length, stride, DIM, BLOCK, WIDTH, False)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    q, k, v, out, sum_out, bias, mask,
    stride_q_b, stride_q_h, stride_q_n, stride_k_b, stride_k_h, stride_k_n,
    stride_v_b, stride_v_h, stride_v_n, stride_o_b, stride_o_h, stride_o_n, stride_sum_b, stride_sum_h, stride_sum_n,
    stride_bias_h, stride_bias_m, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, mask_batches,
    heads, q_len, kv_len, left, right, scale, const_bias, row_cap, tiles, terms, terms_per_split,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    VISIBLE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    CAP: tl.constexpr, P_SCALE: tl.constexpr, FORM: tl.constexpr, ASM: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: one head, in a part of the sequences that have one mask. sum_out, if given: the rows' sums of p."""
    scale, const_bias = single(scale), single(const_bias)
    stride_q_b, stride_q_h, stride_q_n = elements(stride_q_b, stride_q_h, stride_q_n, UNIT, WIDE)
    stride_k_b, stride_k_h, stride_k_n = elements(stride_k_b, stride_k_h, stride_k_n, UNIT, WIDE)
    stride_v_b, stride_v_h, stride_v_n = elements(stride_v_b, stride_v_h, stride_v_n, UNIT, WIDE)
    stride_o_b, stride_o_h, stride_o_n = elements(stride_o_b, stride_o_h, stride_o_n, UNIT, WIDE)
    split, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    own, head = tile // heads, tile % heads
    head64 = head.to(tl.int64)
    added, visible = _added(
        mask, bias, own, head, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_bias_h,
        stride_bias_m, q_len, kv_len, left, right, const_bias, VISIBLE, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT, BLOCK_M,
        BLOCK_N, FORM,
    )  # fmt: skip
    q += head64 * stride_q_h
    k += head64 * stride_k_h
    v += head64 * stride_v_h
    out += head64 * stride_o_h
    for term in range(split * terms_per_split, tl.minimum((split + 1) * terms_per_split, terms)):
        batch = tl.cast(own + term * mask_batches, tl.int64)
        rows = _rows_of(q + batch * stride_q_b, q_len, stride_q_n, HEAD_DIM, BLOCK_M, BLOCK_D)
        keys = _rows_of(k + batch * stride_k_b, kv_len, stride_k_n, HEAD_DIM, BLOCK_N, BLOCK_D)
        values = _rows_of(v + batch * stride_v_b, kv_len, stride_v_n, VALUE_DIM, BLOCK_N, BLOCK_DV)
        s = tl.dot(rows, keys.T, input_precision=PRECISION)
        p = _probabilities(s, scale, added, visible, FORM, ASM)
        acc = tl.dot((p * P_SCALE).to(values.dtype), values, input_precision=PRECISION) * (1.0 / P_SCALE)
        if CAP or sum_out is not None:
            row_sum = tl.sum(p, 1)
            if CAP:
                acc /= tl.maximum(row_sum, single(row_cap))[:, None]
            if sum_out is not None:
                sums = sum_out + batch * stride_sum_b + head64 * stride_sum_h
                store_numbers(sums, row_sum, tl.arange(0, BLOCK_M), q_len, stride_sum_n)
        store_rows(out + batch * stride_o_b, acc, 0, q_len, stride_o_n, VALUE_DIM, BLOCK_M, BLOCK_DV)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_kernel(
    q, k, v, do, delta, dq_out, dk_out, dv_out, sums, parts, bias, mask,
    stride_q_b, stride_q_h, stride_q_n, stride_k_b, stride_k_h, stride_k_n,
    stride_v_b, stride_v_h, stride_v_n, stride_do_b, stride_do_h, stride_do_n,
    stride_dq_b, stride_dq_h, stride_dq_n, stride_dk_b, stride_dk_h, stride_dk_n,
    stride_dv_b, stride_dv_h, stride_dv_n, stride_delta_b, stride_delta_h, stride_delta_n,
    stride_bias_h, stride_bias_m, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, mask_batches,
    heads, q_len, kv_len, left, right, scale, const_bias, tiles, terms, terms_per_split,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    VISIBLE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    P_SCALE: tl.constexpr, FORM: tl.constexpr, ASM: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, GRAD_UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: all gradients of one head, in a part of the sequences that have one mask."""
    scale, const_bias = single(scale), single(const_bias)
    stride_q_b, stride_q_h, stride_q_n = elements(stride_q_b, stride_q_h, stride_q_n, UNIT, WIDE)
    stride_k_b, stride_k_h, stride_k_n = elements(stride_k_b, stride_k_h, stride_k_n, UNIT, WIDE)
    stride_v_b, stride_v_h, stride_v_n = elements(stride_v_b, stride_v_h, stride_v_n, UNIT, WIDE)
    stride_do_b, stride_do_h, stride_do_n = elements(stride_do_b, stride_do_h, stride_do_n, UNIT, WIDE)
    stride_dq_b, stride_dq_h, stride_dq_n = elements(stride_dq_b, stride_dq_h, stride_dq_n, GRAD_UNIT, WIDE)
    stride_dk_b, stride_dk_h, stride_dk_n = elements(stride_dk_b, stride_dk_h, stride_dk_n, GRAD_UNIT, WIDE)
    stride_dv_b, stride_dv_h, stride_dv_n = elements(stride_dv_b, stride_dv_h, stride_dv_n, GRAD_UNIT, WIDE)
    split, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    own, head = tile // heads, tile % heads
    head64 = head.to(tl.int64)
    added, visible = _added(
        mask, bias, own, head, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_bias_h,
        stride_bias_m, q_len, kv_len, left, right, const_bias, VISIBLE, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT, BLOCK_M,
        BLOCK_N, FORM,
    )  # fmt: skip
    q += head64 * stride_q_h
    k += head64 * stride_k_h
    v += head64 * stride_v_h
    do += head64 * stride_do_h
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for term in range(split * terms_per_split, tl.minimum((split + 1) * terms_per_split, terms)):
        batch = tl.cast(own + term * mask_batches, tl.int64)
        rows = _rows_of(q + batch * stride_q_b, q_len, stride_q_n, HEAD_DIM, BLOCK_M, BLOCK_D)
        keys = _rows_of(k + batch * stride_k_b, kv_len, stride_k_n, HEAD_DIM, BLOCK_N, BLOCK_D)
        values = _rows_of(v + batch * stride_v_b, kv_len, stride_v_n, VALUE_DIM, BLOCK_N, BLOCK_DV)
        grads = _rows_of(do + batch * stride_do_b, q_len, stride_do_n, VALUE_DIM, BLOCK_M, BLOCK_DV)
        s = tl.dot(rows, keys.T, input_precision=PRECISION)
        dp = tl.dot(grads, values.T, input_precision=PRECISION)
        p = _probabilities(s, scale, added, visible, FORM, ASM)
        if delta is not None:
            of_rows = delta + batch * stride_delta_b + head64 * stride_delta_h
            dp -= load_numbers(of_rows, tl.arange(0, BLOCK_M), q_len, stride_delta_n)[:, None]
        ds = (p - p * p) * dp
        total += ds
        if dv_out is not None:
            scaled = (p * P_SCALE).to(grads.dtype)
            dv = tl.dot(scaled.T, grads, input_precision=PRECISION) * (1.0 / P_SCALE)
            target = dv_out + batch * stride_dv_b + head64 * stride_dv_h
            store_rows(target, dv, 0, kv_len, stride_dv_n, VALUE_DIM, BLOCK_N, BLOCK_DV)
        if dk_out is not None:
            dk = tl.dot(ds.to(rows.dtype).T, rows, input_precision=PRECISION) * scale
            target = dk_out + batch * stride_dk_b + head64 * stride_dk_h
            store_rows(target, dk, 0, kv_len, stride_dk_n, HEAD_DIM, BLOCK_N, BLOCK_D)
        if dq_out is not None:
            dq = tl.dot(ds.to(keys.dtype), keys, input_precision=PRECISION) * scale
            target = dq_out + batch * stride_dq_b + head64 * stride_dq_h
            store_rows(target, dq, 0, q_len, stride_dq_n, HEAD_DIM, BLOCK_M, BLOCK_D)

    row, col = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    base = (tl.cast(split, tl.int64) * tiles + tile) * q_len
    if sums is not None:
        tl.store(sums + base + row, tl.sum(total, 1), mask=row < q_len)
    if parts is not None:
        inside = (row < q_len)[:, None] & (col < kv_len)[None, :]
        tl.store(parts + base * kv_len + (row * kv_len)[:, None] + col[None, :], total, mask=inside)
