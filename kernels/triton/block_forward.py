"""The forward under a mask by blocks: empty blocks are skipped, full ones run in a loop without any mask, and mixed
ones in a second loop, with a bit per score."""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from sigswap.kernels.host.blocks import BLOCK
from sigswap.kernels.host.launch import Launch, by_rows, describable
from sigswap.kernels.host.layout import Layout, layout_of
from sigswap.kernels.host.problem import MAX_PLANS, Problem, Signature, output_arguments
from sigswap.kernels.host.results import empty_output
from sigswap.kernels.host.tiles import Tile
from sigswap.kernels.triton import blocks as shared
from sigswap.kernels.triton.blocks import (
    _BLOCK,
    _HEADER,
    UNSPECIALIZED_BLOCKS,
    BlockLayouts,
    form_of,
    layouts_of,
    own_block,
    place_of,
    place_of_program,
    seen_in,
    within_block,
    words_of,
)
from sigswap.kernels.triton.common import (
    _AUTO,
    _FAST,
    _FAST_BIAS,
    elements,
    load_rows,
    places_of_rows,
    probabilities,
    row_biases,
    single,
    store_numbers,
    unit_of,
)
from sigswap.kernels.triton.forward import tile_for

supports = shared.supports

SPAN = 4
"""(Batch element, head) pairs that run at once."""


def forward(problem: Problem, *, tile: Tile | None = None, tma: bool | None = None, span: int | None = None) -> Tensor:
    """Deterministic. tile (whose sizes divide 128), tma and span are for tests and tuning."""
    out = empty_output(problem.query, problem.value) if problem.out is None else problem.out
    if problem.signature.is_empty:
        if problem.row_sums is not None:
            problem.row_sums.zero_()
        return out.zero_()
    problem = problem.readable()
    blocks, row_sums = problem.blocks, problem.row_sums
    assert blocks is not None
    of_sums = None if row_sums is None else layout_of(row_sums)
    launch = _launch(problem.signature, layout_of(out), of_sums, layouts_of(blocks), tile, tma, span)
    sides = problem.bias, blocks.visible, blocks.rows, blocks.row_bits
    launch(problem.query, problem.key, problem.value, out, row_sums, *sides)
    return out


@functools.lru_cache(MAX_PLANS)
def _launch(
    signature: Signature,
    out: Layout,
    row_sums: Layout | None,
    blocks: BlockLayouts,
    tile: Tile | None,
    tma: bool | None,
    span: int | None,
) -> Launch:
    """row_sums: None: not asked for."""
    query, key, value = signature.query, signature.key, signature.value
    tile = within_block(tile or tile_for(signature))
    described = None
    if tma is None:
        tma = signature.tma(signature.kv_len)
    if tma and describable(key) and describable(value):
        described = by_rows(key, tile.keys), by_rows(value, tile.keys)
    members = signature.batch * signature.heads
    arguments = signature.arguments(q=query, k=key, v=value, o=out)
    arguments |= (
        output_arguments(arguments, sum=row_sums)
        | blocks.arguments(blocks.rows)
        | {
            "FORM": form_of(signature),
            "TMA": described is not None,
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.keys,
            "members": members,
            "span": min(span or SPAN, members),
        }
    )
    tensors = (
        query,
        *(described or (key, value)),
        out,
        row_sums,
        signature.bias,
        blocks.visible,
        blocks.rows,
        blocks.bits,
    )
    programs = triton.cdiv(signature.q_len, BLOCK) * (BLOCK // tile.rows) * members
    return Launch(_forward_kernel, programs, signature.device, tensors, arguments, **tile.launch_options())


@triton.jit
def _accumulate(
    acc, row_sum, q, bias, row0, count, listed, places, bits, k, v, stride_k_n, stride_v_n, batch, kv_head, q_len,
    kv_len, scale, softcap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, P_SCALE: tl.constexpr, FORM: tl.constexpr,
    ASM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """acc += p v, and row_sum += sum_j p if SUMS, over the first ``count`` blocks of keys that are listed."""
    bias *= unit_of(FORM)
    rows = (row0 + tl.arange(0, BLOCK_M))[:, None]
    block = tl.load(listed)
    if MIXED:
        place = place_of(places, 0, count)
        first, second, third, fourth = words_of(bits, place, row0 % _BLOCK, 0, BLOCK_M, BLOCK_N)
        place = place_of(places, BLOCK_N, count)
    for at in range(0, count * _BLOCK, BLOCK_N):
        start = block * _BLOCK + (at - at // _BLOCK * _BLOCK)
        cols = (start + tl.arange(0, BLOCK_N))[None, :]
        keys = load_rows(k, batch, kv_head, start, kv_len, stride_k_n, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
        scores = tl.dot(q, keys.T, input_precision=PRECISION)
        values = load_rows(v, batch, kv_head, start, kv_len, stride_v_n, VALUE_DIM, BLOCK_N, BLOCK_DV, TMA)
        seen = None
        if MIXED:
            seen = seen_in(first, second, third, fourth, BLOCK_N)
        p, _ = probabilities(
            scores, bias[:, None], rows, cols, None, 0, 0, q_len, kv_len, 0, 0, 0, scale, softcap, False,
            False, False, False, SOFTCAP, FORM, ASM, seen,
        )  # fmt: skip
        if SUMS:
            if start + BLOCK_N > kv_len:
                p = tl.where(cols < kv_len, p, 0.0)
            row_sum += tl.sum(p, 1)
        if P_SCALE != 1.0:
            p *= P_SCALE
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
        following = at + BLOCK_N
        block = tl.load(listed + following // _BLOCK)
        if MIXED:
            part = following - following // _BLOCK * _BLOCK
            first, second, third, fourth = words_of(bits, place, row0 % _BLOCK, part, BLOCK_M, BLOCK_N)
            place = place_of(places, following + BLOCK_N, count)
    return acc, row_sum


@triton.jit
def _accumulate_both(
    acc, row_sum, q, bias, row0, active, listed, places, bits, k, v, stride_k_n, stride_v_n, batch, kv_head, q_len,
    kv_len, scale, softcap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, P_SCALE: tl.constexpr, FORM: tl.constexpr,
    ASM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Over the full blocks, and then the mixed ones; over none, unless active is 1. listed follows a header."""
    full = tl.load(listed - _HEADER)
    mixed = tl.load(listed - _HEADER + 1)
    acc, row_sum = _accumulate(
        acc, row_sum, q, bias, row0, full * active, listed, places, bits, k, v, stride_k_n, stride_v_n, batch, kv_head,
        q_len, kv_len, scale, softcap, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SOFTCAP, P_SCALE, FORM,
        ASM, TMA, PRECISION, SUMS, False,
    )  # fmt: skip
    return _accumulate(
        acc, row_sum, q, bias, row0, mixed * active, listed + full, places + full, bits, k, v, stride_k_n, stride_v_n,
        batch, kv_head, q_len, kv_len, scale, softcap, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
        SOFTCAP, P_SCALE, FORM, ASM, TMA, PRECISION, SUMS, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED_BLOCKS)
def _forward_kernel(
    q, k, v, out, sum_out, bias, visible, lists, bits,
    stride_q_b, stride_q_h, stride_q_n, stride_k_b, stride_k_h, stride_k_n,
    stride_v_b, stride_v_h, stride_v_n, stride_o_b, stride_o_h, stride_o_n,
    stride_sum_b, stride_sum_h, stride_sum_n, stride_bias_b, stride_bias_h, stride_bias_m,
    stride_seen_b, stride_seen_h, stride_list_b, stride_list_h, stride_list_n,
    members, span, heads, group, q_len, kv_len, scale, softcap, const_bias, row_cap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS_ROWS: tl.constexpr, VISIBLE: tl.constexpr,
    SOFTCAP: tl.constexpr, CAP: tl.constexpr, P_SCALE: tl.constexpr, FORM: tl.constexpr, SLOW: tl.constexpr,
    ASM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M query rows of one head. k, v: descriptors if TMA, else addresses. sum_out, if given, gets
    the rows' sums of p."""
    scale, softcap, const_bias = single(scale), single(softcap), single(const_bias)
    stride_q_b, stride_q_h, stride_q_n = elements(stride_q_b, stride_q_h, stride_q_n, UNIT, WIDE)
    stride_k_b, stride_k_h, stride_k_n = elements(stride_k_b, stride_k_h, stride_k_n, UNIT, WIDE)
    stride_v_b, stride_v_h, stride_v_n = elements(stride_v_b, stride_v_h, stride_v_n, UNIT, WIDE)
    stride_o_b, stride_o_h, stride_o_n = elements(stride_o_b, stride_o_h, stride_o_n, UNIT, WIDE)
    number, member = place_of_program(tl.cdiv(q_len, _BLOCK) * (_BLOCK // BLOCK_M), members, span)
    batch, head = member // heads, member % heads
    kv_head = head // group
    batch64, head64, kv_head64 = batch.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)
    lists += batch64 * stride_list_b + head64 * stride_list_h
    own, row0 = own_block(lists, number, stride_list_n, BLOCK_M)
    if row0 >= q_len:
        return
    q += batch64 * stride_q_b + head64 * stride_q_h
    if not TMA:
        k += batch64 * stride_k_b + kv_head64 * stride_k_h
        v += batch64 * stride_v_b + kv_head64 * stride_v_h
    out += batch64 * stride_o_b + head64 * stride_o_h
    if bias is not None:
        bias += batch64 * stride_bias_b + head64 * stride_bias_h
        if not BIAS_ROWS:
            const_bias += tl.load(bias).to(tl.float32)
    visible += batch64 * stride_seen_b + head64 * stride_seen_h

    queries = load_rows(q, batch, head, row0, q_len, stride_q_n, HEAD_DIM, BLOCK_M, BLOCK_D, False)
    row_bias = row_biases(
        row0 + tl.arange(0, BLOCK_M), bias, stride_bias_m, visible, 1, const_bias, q_len, kv_len, 0, 0, 0,
        BIAS_ROWS, VISIBLE, False, False,
    )  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    SUMS: tl.constexpr = CAP or sum_out is not None
    listed = own + _HEADER
    places = listed + tl.cdiv(kv_len, _BLOCK)

    fast = 1
    if FORM == _AUTO:
        fast = (tl.min(row_bias) >= _FAST_BIAS).to(tl.int32)
    # One of the two has no iterations. As the branches of an if they would not share their shared memory.
    if FORM >= _FAST:
        acc, row_sum = _accumulate_both(
            acc, row_sum, queries, row_bias, row0, fast, listed, places, bits, k, v, stride_k_n, stride_v_n, batch,
            kv_head, q_len, kv_len, scale, softcap, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SOFTCAP,
            P_SCALE, _FAST, ASM, TMA, PRECISION, SUMS,
        )  # fmt: skip
    if FORM != _FAST:
        acc, row_sum = _accumulate_both(
            acc, row_sum, queries, row_bias, row0, 1 - fast if FORM == _AUTO else 1, listed, places, bits, k, v,
            stride_k_n, stride_v_n, batch, kv_head, q_len, kv_len, scale, softcap, HEAD_DIM, VALUE_DIM, BLOCK_D,
            BLOCK_DV, BLOCK_M, BLOCK_N, SOFTCAP, P_SCALE, SLOW, ASM, TMA, PRECISION, SUMS,
        )  # fmt: skip

    factor = 1.0 / P_SCALE
    if CAP:
        acc *= (factor / tl.maximum(row_sum, single(row_cap)))[:, None]
    else:
        acc *= factor
    if sum_out is not None:
        sum_out += batch64 * stride_sum_b + head64 * stride_sum_h
        store_numbers(sum_out, row_sum, row0 + tl.arange(0, BLOCK_M), q_len, stride_sum_n)
    place, inside = places_of_rows(out, row0, q_len, stride_o_n, VALUE_DIM, BLOCK_M, BLOCK_DV)
    tl.store(place, acc, mask=inside)
