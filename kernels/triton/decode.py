"""Decoding in Triton: few query rows against many cached keys, split over the keys.

One program reads a part of the keys of one key head, once, for all query heads that use it (their rows are one tile)
and writes a partial output; a second kernel adds them (:mod:`sigswap.kernels.triton.split_keys`).

This is bound by memory: K and V are read once. So the sigmoid is always the accurate form.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sigswap.kernels.host.launch import Launch
from sigswap.kernels.host.layout import Layout, cdiv, next_power_of_2
from sigswap.kernels.host.problem import MAX_PLANS, Problem, Signature
from sigswap.kernels.host.results import Forward, empty_output, maker_of
from sigswap.kernels.host.tiles import limits_of
from sigswap.kernels.triton.common import (
    _ACCURATE,
    UNSPECIALIZED,
    elements,
    keys_of_rows,
    load_rows,
    probabilities,
    row_biases,
    single,
    unit_of,
)
from sigswap.kernels.triton.row_biases import Counts, counts_for
from sigswap.kernels.triton.split_keys import AT_ONCE, MIN_KEYS, Parts, parts_of, splits_for

MAX_ROWS = 64
"""Query rows times query heads per key head, at most. With more, the forward kernel fills the GPU as well."""


def supports(problem: Problem) -> bool:
    """Whether decoding is expected to be faster than the forward kernel; it has no dropout."""
    signature = problem.signature
    if signature.packed is not None or signature.kv_len < 2 * MIN_KEYS or problem.options.dropout_p > 0.0:
        return False
    rows = signature.q_len * (signature.heads // max(1, signature.kv_heads))
    return rows <= MAX_ROWS and signature.too_much() is None


def forward(problem: Problem, *, splits: int | None = None) -> Tensor:
    """Deterministic. splits: over how many programs the keys are split."""
    if problem.signature.is_empty:
        if problem.row_sums is not None:
            problem.row_sums.zero_()
        return empty_output(problem.query, problem.value).zero_()
    problem = problem.readable(masks=False)
    query, key, value, bias, attn_mask = problem.inputs
    plan = _plan(problem.signature, problem.row_sums is not None, splits)
    out = query.new_empty_strided(plan.out.shape, plan.out.strides)
    count = None if attn_mask is None or plan.counts is None else plan.counts(attn_mask)
    partial, partial_sums = plan.parts.empty(out, problem.row_sums)
    plan.launch(query, key, value, partial, partial_sums, bias, count, attn_mask)
    plan.parts.sum(partial, partial_sums, out, problem.row_sums)
    return out


def forward_again(problem: Problem) -> Forward | None:
    """See :func:`sigswap.kernels.dispatch.forward_again`. None: copies are needed, or there is a row cap."""
    signature = problem.signature
    if signature.is_empty or not signature.is_readable or problem.options.row_cap > 0.0:
        return None
    plan = _plan(signature, False, None)
    launch, add, sides = plan.launch, plan.parts.add, (None,) * 4
    new_output, new_parts = maker_of(plan.out, signature.device), maker_of(plan.parts.partial, signature.device)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = new_output()
        if add is None:
            launch(query, key, value, out, *sides)
        else:
            parts = new_parts()
            launch(query, key, value, parts, *sides)
            add(parts, None, out, None)
        return out

    return run


class _Plan(NamedTuple):
    launch: Launch
    out: Layout
    parts: Parts
    counts: Counts | None


@functools.lru_cache(MAX_PLANS)
def _plan(signature: Signature, sums: bool, splits: int | None) -> _Plan:
    """sums: whether the rows' sums are asked for."""
    out = signature.output()
    batch, heads, kv_heads = signature.batch, signature.heads, signature.kv_heads
    q_len, kv_len, device = signature.q_len, signature.kv_len, signature.device
    rows = q_len * (heads // kv_heads)
    block_m = min(MAX_ROWS, max(16, next_power_of_2(rows)))
    dim = max(signature.widths)
    block_n = max(16, min(128, 16384 // (dim * signature.element_size), next_power_of_2(kv_len)))
    programs = batch * kv_heads * cdiv(rows, block_m)
    if splits is None:
        splits = splits_for(programs, kv_len, AT_ONCE * limits_of(device).multiprocessors)
    parts = parts_of(signature, out, splits, sums=sums)
    arguments = signature.arguments(q=signature.query, k=signature.key, v=signature.value, o=parts.target)
    arguments |= parts.arguments | {"BLOCK_M": block_m, "BLOCK_N": block_n}
    written = parts.target, parts.target_sums
    tensors = (signature.query, signature.key, signature.value, *written, *signature.side_layouts()[:3])
    stages = 3 if dim <= 128 else 2
    launch = Launch(_decode_kernel, programs * splits, device, tensors, arguments, num_warps=4, num_stages=stages)
    return _Plan(launch, out, parts, counts_for(signature))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _decode_kernel(
    q, k, v, out, sum_out, bias, count, mask, stride_split,
    stride_q_b, stride_q_h, stride_q_n, stride_k_b, stride_k_h, stride_k_n,
    stride_v_b, stride_v_h, stride_v_n, stride_o_b, stride_o_h, stride_o_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_count_b, stride_count_h, stride_count_m,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, mask_batches,
    heads, group, q_len, kv_len, left, right, scale, softcap, const_bias, row_cap, splits,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr, VISIBLE: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    CAP: tl.constexpr, P_SCALE: tl.constexpr, ASM: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One program: one part of the keys, for BLOCK_M of the group * q_len rows of one key head. sum_out, if given: the
    rows' sums of p, contiguous. CAP: rows are divided here, for there is one part."""
    scale, softcap, const_bias = single(scale), single(softcap), single(const_bias)
    stride_q_b, stride_q_h, stride_q_n = elements(stride_q_b, stride_q_h, stride_q_n, UNIT, WIDE)
    stride_k_b, stride_k_h, stride_k_n = elements(stride_k_b, stride_k_h, stride_k_n, UNIT, WIDE)
    stride_v_b, stride_v_h, stride_v_n = elements(stride_v_b, stride_v_h, stride_v_n, UNIT, WIDE)
    stride_o_b, stride_o_h, stride_o_n = elements(stride_o_b, stride_o_h, stride_o_n, UNIT, WIDE)
    split = tl.program_id(0) % splits
    at = tl.program_id(0) // splits
    blocks = tl.cdiv(group * q_len, BLOCK_M)
    kv_heads = heads // group
    kv_head = (at // blocks) % kv_heads
    batch = at // blocks // kv_heads
    batch64, kv_head64 = batch.to(tl.int64), kv_head.to(tl.int64)
    index = at % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    row = index % q_len
    # Rows beyond the last are copies of others: loaded from valid addresses, not stored.
    head = (kv_head * group + tl.minimum(index // q_len, group - 1)).to(tl.int64)
    shift = kv_len - q_len if BOTTOM_RIGHT else 0

    dim = tl.arange(0, BLOCK_D)
    pointers = q + batch64 * stride_q_b + head * stride_q_h + row.to(tl.int64) * stride_q_n
    rows = tl.load(pointers[:, None] + dim[None, :], mask=(dim < HEAD_DIM)[None, :], other=0.0)
    if bias is not None:
        bias += batch64 * stride_bias_b + head * stride_bias_h
    if mask is not None:
        mask_batch = (batch % mask_batches).to(tl.int64)
        mask += mask_batch * stride_mask_b + (head * stride_mask_h)[:, None]
        if count is not None:
            count += mask_batch * stride_count_b + head * stride_count_h
    row_bias = row_biases(
        row, bias, stride_bias_m, count, stride_count_m, const_bias, q_len, kv_len, shift, left, right,
        bias is not None, VISIBLE, HAS_LEFT, HAS_RIGHT,
    ) * unit_of(_ACCURATE)  # fmt: skip
    k += batch64 * stride_k_b + kv_head64 * stride_k_h
    v += batch64 * stride_v_b + kv_head64 * stride_v_h

    begin, end = keys_of_rows(0, q_len - 1, kv_len, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
    part = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), splits), BLOCK_N) * BLOCK_N
    begin += split * part
    end = tl.minimum(begin + part, end)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    SUMS: tl.constexpr = CAP or sum_out is not None
    for start in range(begin, end, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        keys = load_rows(k, batch, kv_head, start, kv_len, stride_k_n, HEAD_DIM, BLOCK_N, BLOCK_D, False)
        values = load_rows(v, batch, kv_head, start, kv_len, stride_v_n, VALUE_DIM, BLOCK_N, BLOCK_DV, False)
        s = tl.dot(rows, keys.T, input_precision=PRECISION)
        p, _slope = probabilities(
            s, row_bias[:, None], row[:, None], col[None, :], mask, stride_mask_m, stride_mask_n, q_len, kv_len,
            shift, left, right, scale, softcap, True, MASK_ROWS, HAS_LEFT, HAS_RIGHT, SOFTCAP, _ACCURATE, ASM,
        )  # fmt: skip
        if SUMS:
            p = tl.where((col < kv_len)[None, :], p, 0.0)
            row_sum += tl.sum(p, 1)
        if P_SCALE != 1.0:
            p *= P_SCALE
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
    if P_SCALE != 1.0:
        acc *= 1.0 / P_SCALE
    if CAP:
        acc /= tl.maximum(row_sum, single(row_cap))[:, None]
    before = split.to(tl.int64) * (stride_split // VALUE_DIM)  # rows of other parts
    if sum_out is not None:
        of_rows = (before + (batch64 * heads + head) * q_len) + row
        tl.store(sum_out + of_rows, row_sum, mask=index < group * q_len)

    dim = tl.arange(0, BLOCK_DV)
    out += before * VALUE_DIM + batch64 * stride_o_b  # a product of a constant, so that 16 bytes are stored at once
    targets = out + head * stride_o_h + row.to(tl.int64) * stride_o_n
    inside = (index < group * q_len)[:, None] & (dim < VALUE_DIM)[None, :]
    tl.store(targets[:, None] + dim[None, :], acc.to(out.dtype.element_ty), mask=inside)
