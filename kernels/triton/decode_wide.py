"""Heads too wide for the other kernels, in Triton: latent attention, whose query and key are 576 wide and value 512.

DeepSeek's multi-head latent attention (arXiv 2405.04434) decodes in its absorbed form: each token has one key, for all
query heads, whose first 512 channels are its value, too. Where value is such a view of key, each tile of keys is loaded
once, and is a tile of values as well: the cache is read once.

Head dimensions are held in two parts, a power of 2 and what is left, as a tile's widths are powers of 2. As in
:mod:`sigswap.kernels.triton.decode` a program reads a part of the keys of one key head for some rows of the query heads
that use it, and partial outputs are added (:mod:`sigswap.kernels.triton.split_keys`). 16 heads are bound by memory, 128
by matrix products. So the sigmoid is always the accurate form.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sigswap.kernels.host.launch import Launch
from sigswap.kernels.host.layout import Layout
from sigswap.kernels.host.problem import MAX_HEAD_DIM, MAX_PLANS, WIDEST_HEAD_DIM, WIDEST_VALUE_DIM, Problem, Signature
from sigswap.kernels.host.results import empty_output
from sigswap.kernels.host.tiles import Tile
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
from sigswap.kernels.triton.split_keys import Parts, parts_of, splits_for
from sigswap.kernels.triton.wide_heads import main_and_rest, programs_at_once, shares_memory, tile_for


def supports(problem: Problem) -> bool:
    """Whether heads are wide, in half precision; there is no dropout."""
    signature = problem.signature
    if signature.packed is not None or problem.options.dropout_p > 0.0 or signature.element_size != 2:
        return False
    dim, value_dim = signature.query.shape[3], signature.value.shape[3]
    if max(dim, value_dim) <= MAX_HEAD_DIM or not 0 < dim <= WIDEST_HEAD_DIM or value_dim > WIDEST_VALUE_DIM:
        return False
    return _tile(signature, shared=False) is not None


def forward(problem: Problem, *, splits: int | None = None) -> Tensor:
    """Deterministic. splits: over how many programs the keys are split."""
    if problem.signature.is_empty:
        if problem.row_sums is not None:
            problem.row_sums.zero_()
        return empty_output(problem.query, problem.value).zero_()
    problem = problem.readable(masks=False)
    query, key, value, bias, attn_mask = problem.inputs
    plan = _plan(problem.signature, shares_memory(problem), problem.row_sums is not None, splits)
    out = query.new_empty_strided(plan.out.shape, plan.out.strides)
    count = None if attn_mask is None or plan.counts is None else plan.counts(attn_mask)
    partial, partial_sums = plan.parts.empty(out, problem.row_sums)
    plan.launch(query, key, value, partial, partial_sums, bias, count, attn_mask)
    plan.parts.sum(partial, partial_sums, out, problem.row_sums)
    return out


class _Plan(NamedTuple):
    launch: Launch
    out: Layout
    parts: Parts
    counts: Counts | None


@functools.lru_cache(MAX_PLANS)
def _plan(signature: Signature, shared: bool, sums: bool, splits: int | None) -> _Plan:
    """shared: whether the first part of a tile of keys is one of values. sums: whether the rows' are asked for."""
    out, tile = signature.output(), _tile(signature, shared)
    assert tile is not None, "supports() says no"
    kv_len, device = signature.kv_len, signature.device
    rows = signature.q_len * (signature.heads // signature.kv_heads)
    programs = signature.batch * signature.kv_heads * triton.cdiv(rows, tile.rows)
    if splits is None:
        splits = splits_for(programs, kv_len, programs_at_once(signature, tile, shared=shared))
    parts = parts_of(signature, out, splits, sums=sums)
    arguments = signature.arguments(q=signature.query, k=signature.key, v=signature.value, o=parts.target)
    main, rest = main_and_rest(signature.key.shape[3])
    arguments |= parts.arguments | {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
    arguments |= {"MAIN": main, "REST": rest, "SHARED": shared}
    written = parts.target, parts.target_sums
    tensors = (signature.query, signature.key, signature.value, *written, *signature.side_layouts()[:3])
    launch = Launch(_kernel, programs * splits, device, tensors, arguments, **tile.launch_options())
    return _Plan(launch, out, parts, counts_for(signature))


def _tile(signature: Signature, shared: bool) -> Tile | None:
    rows = signature.q_len * (signature.heads // max(1, signature.kv_heads))
    return tile_for(signature, rows, shared=shared)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _kernel(
    q, k, v, out, sum_out, bias, count, mask, stride_split,
    stride_q_b, stride_q_h, stride_q_n, stride_k_b, stride_k_h, stride_k_n,
    stride_v_b, stride_v_h, stride_v_n, stride_o_b, stride_o_h, stride_o_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_count_b, stride_count_h, stride_count_m,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, mask_batches,
    heads, group, q_len, kv_len, left, right, scale, softcap, const_bias, row_cap, splits,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHARED: tl.constexpr, MASK_ROWS: tl.constexpr,
    VISIBLE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, CAP: tl.constexpr, P_SCALE: tl.constexpr, ASM: tl.constexpr, UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One program: one part of the keys, for BLOCK_M of the group * q_len rows of one key head, those of one token one
    behind the other. MAIN, REST: the widths of the parts of HEAD_DIM. SHARED: values are the first part of keys.
    sum_out, if given: the rows' sums of p, contiguous. CAP: rows are divided here, for there is one part."""
    scale, softcap, const_bias = single(scale), single(softcap), single(const_bias)
    stride_q_b, stride_q_h, stride_q_n = elements(stride_q_b, stride_q_h, stride_q_n, UNIT, WIDE)
    stride_k_b, stride_k_h, stride_k_n = elements(stride_k_b, stride_k_h, stride_k_n, UNIT, WIDE)
    stride_v_b, stride_v_h, stride_v_n = elements(stride_v_b, stride_v_h, stride_v_n, UNIT, WIDE)
    stride_o_b, stride_o_h, stride_o_n = elements(stride_o_b, stride_o_h, stride_o_n, UNIT, WIDE)
    # Programs of the same keys run side by side, so that all but the first find them in the L2 cache.
    blocks = tl.cdiv(group * q_len, BLOCK_M)
    block = tl.program_id(0) % blocks
    at = tl.program_id(0) // blocks
    split = at % splits
    kv_heads = heads // group
    kv_head = at // splits % kv_heads
    batch = at // splits // kv_heads
    batch64, kv_head64 = batch.to(tl.int64), kv_head.to(tl.int64)
    index = block * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows beyond the last are copies of others: loaded from valid addresses, not stored.
    row = tl.minimum(index // group, q_len - 1)
    head = (kv_head * group + index % group).to(tl.int64)
    first_row = block * BLOCK_M // group
    last_row = tl.minimum((block * BLOCK_M + (BLOCK_M - 1)) // group, q_len - 1)
    shift = kv_len - q_len if BOTTOM_RIGHT else 0

    MAIN_DIM: tl.constexpr = HEAD_DIM if HEAD_DIM < MAIN else MAIN
    pointers = q + batch64 * stride_q_b + head * stride_q_h + row.to(tl.int64) * stride_q_n
    dim = tl.arange(0, MAIN)
    rows = tl.load(pointers[:, None] + dim[None, :], mask=(dim < MAIN_DIM)[None, :], other=0.0)
    if REST > 0:
        dim = tl.arange(0, REST)
        rows_rest = tl.load(pointers[:, None] + (MAIN + dim)[None, :], mask=(dim < HEAD_DIM - MAIN)[None, :], other=0.0)
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

    begin, end = keys_of_rows(first_row, last_row, kv_len, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
    part = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), splits), BLOCK_N) * BLOCK_N
    begin += split * part
    end = tl.minimum(begin + part, end)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    SUMS: tl.constexpr = CAP or sum_out is not None
    for start in range(begin, end, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        keys = load_rows(k, batch, kv_head, start, kv_len, stride_k_n, MAIN_DIM, BLOCK_N, MAIN, False)
        s = tl.dot(rows, keys.T)
        if REST > 0:
            keys_rest = load_rows(
                k + MAIN, batch, kv_head, start, kv_len, stride_k_n, HEAD_DIM - MAIN, BLOCK_N, REST, False
            )
            s = tl.dot(rows_rest, keys_rest.T, s)
        if SHARED:
            values = keys
        else:
            values = load_rows(v, batch, kv_head, start, kv_len, stride_v_n, VALUE_DIM, BLOCK_N, BLOCK_DV, False)
        p, _slope = probabilities(
            s, row_bias[:, None], row[:, None], col[None, :], mask, stride_mask_m, stride_mask_n, q_len, kv_len,
            shift, left, right, scale, softcap, True, MASK_ROWS, HAS_LEFT, HAS_RIGHT, SOFTCAP, _ACCURATE, ASM,
        )  # fmt: skip
        if SUMS:
            p = tl.where((col < kv_len)[None, :], p, 0.0)
            row_sum += tl.sum(p, 1)
        if P_SCALE != 1.0:
            p *= P_SCALE
        acc = tl.dot(p.to(values.dtype), values, acc)
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
