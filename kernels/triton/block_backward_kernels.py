"""The kernels of :mod:`sigswap.kernels.triton.block_backward`, which launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from sigswap.kernels.triton.blocks import (
    _BLOCK,
    _HEADER,
    UNSPECIALIZED_BLOCKS,
    own_block,
    place_of,
    place_of_program,
    seen_in,
    words_of,
)
from sigswap.kernels.triton.common import (
    _AUTO,
    _FAST,
    _FAST_BIAS,
    _ROW_BIAS_BLOCK,
    elements,
    load_numbers,
    load_rows,
    probabilities,
    row_biases,
    row_stride,
    single,
    store_rows,
    unit_of,
)

# Device functions. In the kernel of dK and dV tiles of scores are [keys, rows], else [rows, keys].


@triton.jit
def _score_gradients(
    s, dp, delta, row_bias, row, col, q_len, kv_len, scale, softcap, end, seen,
    SOFTCAP: tl.constexpr, FORM: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """(p, dS, dX). delta: of the rows below a row cap, else None. end: whether some of the keys are out of range, whose
    dP is 0, but not with delta. seen: which scores are visible; None: all."""
    p, slope = probabilities(
        s, row_bias, row, col, None, 0, 0, q_len, kv_len, 0, 0, 0, scale, softcap, False, False, False, False, SOFTCAP,
        FORM, ASM, seen,
    )  # fmt: skip
    if delta is not None:
        dp -= delta
        if end:
            dp = tl.where(col < kv_len, dp, 0.0)
    ds = (p - p * p) * dp
    dx = ds
    if SOFTCAP:
        dx = ds * slope
    return p, ds, dx


@triton.jit
def _accumulate_keys(
    dk, dv, keys, values, col0, count, listed, places, bits, q, do, delta, bias, bias_at, stride_q_n, stride_do_n,
    stride_delta_n, batch, head, q_len, kv_len, scale, softcap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, P_SCALE: tl.constexpr, FORM: tl.constexpr,
    ASM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """dk += dX^T q and dv += p^T dO over the first ``count`` blocks of rows that are listed."""
    col = (col0 + tl.arange(0, BLOCK_N))[:, None]
    block = tl.load(listed)
    if MIXED:
        place = place_of(places, 0, count)
        first, second, third, fourth = words_of(bits, place, col0 % _BLOCK, 0, BLOCK_N, BLOCK_M)
        place = place_of(places, BLOCK_M, count)
    for at in range(0, count * _BLOCK, BLOCK_M):
        start = block * _BLOCK + (at - at // _BLOCK * _BLOCK)
        row = start + tl.arange(0, BLOCK_M)
        rows = load_rows(q, batch, head, start, q_len, stride_q_n, HEAD_DIM, BLOCK_M, BLOCK_D, TMA)
        s = tl.dot(keys, rows.T, input_precision=PRECISION)
        grads = load_rows(do, batch, head, start, q_len, stride_do_n, VALUE_DIM, BLOCK_M, BLOCK_DV, TMA)
        dp = tl.dot(values, grads.T, input_precision=PRECISION)
        if TMA:
            row_bias = bias.load([bias_at, start]).reshape(BLOCK_M) * unit_of(FORM)
        else:
            row_bias = tl.load(bias + row.to(tl.int64), mask=row < q_len, other=0.0) * unit_of(FORM)
        row_delta = None
        if delta is not None:
            row_delta = load_numbers(delta, row, q_len, stride_delta_n)[None, :]
        seen = None
        if MIXED:
            seen = seen_in(first, second, third, fourth, BLOCK_M)
        p, _, dx = _score_gradients(
            s, dp, row_delta, row_bias[None, :], row[None, :], col, q_len, kv_len, scale, softcap,
            col0 + BLOCK_N > kv_len, seen, SOFTCAP, FORM, ASM,
        )  # fmt: skip
        if P_SCALE != 1.0:
            p *= P_SCALE
        dv = tl.dot(p.to(grads.dtype), grads, dv, input_precision=PRECISION)
        dk = tl.dot(dx.to(rows.dtype), rows, dk, input_precision=PRECISION)
        following = at + BLOCK_M
        block = tl.load(listed + following // _BLOCK)
        if MIXED:
            part = following - following // _BLOCK * _BLOCK
            first, second, third, fourth = words_of(bits, place, col0 % _BLOCK, part, BLOCK_N, BLOCK_M)
            place = place_of(places, following + BLOCK_M, count)
    return dk, dv


@triton.jit
def _accumulate_all_keys(
    dk, dv, keys, values, col0, active, listed, places, bits, q, do, delta, bias, bias_at, stride_q_n, stride_do_n,
    stride_delta_n, batch, head, q_len, kv_len, scale, softcap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, P_SCALE: tl.constexpr, FORM: tl.constexpr,
    ASM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Over the full blocks, and then the mixed ones; over none, unless active is 1. listed follows a header."""
    full = tl.load(listed - _HEADER)
    mixed = tl.load(listed - _HEADER + 1)
    dk, dv = _accumulate_keys(
        dk, dv, keys, values, col0, full * active, listed, places, bits, q, do, delta, bias, bias_at, stride_q_n,
        stride_do_n, stride_delta_n, batch, head, q_len, kv_len, scale, softcap, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
        BLOCK_M, BLOCK_N, SOFTCAP, P_SCALE, FORM, ASM, TMA, PRECISION, False,
    )  # fmt: skip
    return _accumulate_keys(
        dk, dv, keys, values, col0, mixed * active, listed + full, places + full, bits, q, do, delta, bias, bias_at,
        stride_q_n, stride_do_n, stride_delta_n, batch, head, q_len, kv_len, scale, softcap, HEAD_DIM, VALUE_DIM,
        BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SOFTCAP, P_SCALE, FORM, ASM, TMA, PRECISION, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED_BLOCKS)
def keys_kernel(
    q, k, v, do, delta, dk_out, dv_out, bias, floor, lists, bits,
    stride_q_b, stride_q_h, stride_q_n, stride_k_b, stride_k_h, stride_k_n,
    stride_v_b, stride_v_h, stride_v_n, stride_do_b, stride_do_h, stride_do_n,
    stride_dk_b, stride_dk_h, stride_dk_n, stride_dv_b, stride_dv_h, stride_dv_n,
    stride_delta_b, stride_delta_h, stride_delta_n,
    stride_bias_b, stride_bias_h, stride_floor_b, stride_floor_h, stride_list_b, stride_list_h, stride_list_n,
    members, span, heads, group, q_len, kv_len, scale, softcap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, P_SCALE: tl.constexpr,
    FORM: tl.constexpr, SLOW: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of BLOCK_N keys of one key head, over all query heads that use it.

    bias has each row's, of which floor has each block's least, if FORM is AUTO. q, do and bias: descriptors if TMA
    (stride_bias_b and stride_bias_h then count the bias's rows).
    """
    scale, softcap = single(scale), single(softcap)
    stride_q_b, stride_q_h, stride_q_n = elements(stride_q_b, stride_q_h, stride_q_n, UNIT, WIDE)
    stride_k_b, stride_k_h, stride_k_n = elements(stride_k_b, stride_k_h, stride_k_n, UNIT, WIDE)
    stride_v_b, stride_v_h, stride_v_n = elements(stride_v_b, stride_v_h, stride_v_n, UNIT, WIDE)
    stride_do_b, stride_do_h, stride_do_n = elements(stride_do_b, stride_do_h, stride_do_n, UNIT, WIDE)
    stride_dk_n, stride_dv_n = row_stride(stride_dk_n, WIDE), row_stride(stride_dv_n, WIDE)
    kv_heads = heads // group
    number, member = place_of_program(tl.cdiv(kv_len, _BLOCK) * (_BLOCK // BLOCK_N), members, span)
    batch, kv_head = member // kv_heads, member % kv_heads
    batch64, kv_head64 = batch.to(tl.int64), kv_head.to(tl.int64)
    lists += batch64 * stride_list_b
    # In the order of the first query head's lists.
    _, col0 = own_block(lists + kv_head64 * group * stride_list_h, number, stride_list_n, BLOCK_N)
    if col0 >= kv_len:
        return
    own = lists + (col0 // _BLOCK).to(tl.int64) * stride_list_n + _HEADER
    k += batch64 * stride_k_b + kv_head64 * stride_k_h
    v += batch64 * stride_v_b + kv_head64 * stride_v_h
    keys = load_rows(k, batch, kv_head, col0, kv_len, stride_k_n, HEAD_DIM, BLOCK_N, BLOCK_D, False)
    values = load_rows(v, batch, kv_head, col0, kv_len, stride_v_n, VALUE_DIM, BLOCK_N, BLOCK_DV, False)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)

    for number_of_group in range(0, group):
        head = kv_head * group + number_of_group
        head64 = head.to(tl.int64)
        listed = own + head64 * stride_list_h
        places = listed + tl.cdiv(q_len, _BLOCK)
        q_head, do_head, bias_head, delta_head = q, do, bias, delta
        if not TMA:
            q_head += batch64 * stride_q_b + head64 * stride_q_h
            do_head += batch64 * stride_do_b + head64 * stride_do_h
            bias_head += batch64 * stride_bias_b + head64 * stride_bias_h
        if delta is not None:
            delta_head += batch64 * stride_delta_b + head64 * stride_delta_h
        bias_at = batch * stride_bias_b + head * stride_bias_h
        fast = 1
        if FORM == _AUTO:
            floors = floor + batch64 * stride_floor_b + head64 * stride_floor_h
            lowest = tl.full((), float("inf"), tl.float32)
            block_count = tl.cdiv(q_len, _ROW_BIAS_BLOCK)
            for at in range(0, block_count, 64):
                block = at + tl.arange(0, 64)
                lowest = tl.minimum(
                    lowest, tl.min(tl.load(floors + block, mask=block < block_count, other=float("inf")))
                )
            fast = (lowest >= _FAST_BIAS).to(tl.int32)
        if FORM >= _FAST:
            dk, dv = _accumulate_all_keys(
                dk, dv, keys, values, col0, fast, listed, places, bits, q_head, do_head, delta_head, bias_head, bias_at,
                stride_q_n, stride_do_n, stride_delta_n, batch, head, q_len, kv_len, scale, softcap, HEAD_DIM,
                VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SOFTCAP, P_SCALE, _FAST, ASM, TMA, PRECISION,
            )  # fmt: skip
        if FORM != _FAST:
            dk, dv = _accumulate_all_keys(
                dk, dv, keys, values, col0, 1 - fast if FORM == _AUTO else 1, listed, places, bits, q_head, do_head,
                delta_head, bias_head, bias_at, stride_q_n, stride_do_n, stride_delta_n, batch, head, q_len, kv_len,
                scale, softcap, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SOFTCAP, P_SCALE, SLOW, ASM,
                TMA, PRECISION,
            )  # fmt: skip

    if dk_out is not None:
        dk_out += batch64 * stride_dk_b + kv_head64 * stride_dk_h
        store_rows(dk_out, dk * scale, col0, kv_len, stride_dk_n, HEAD_DIM, BLOCK_N, BLOCK_D)
    if dv_out is not None:
        dv_out += batch64 * stride_dv_b + kv_head64 * stride_dv_h
        store_rows(dv_out, dv * (1.0 / P_SCALE), col0, kv_len, stride_dv_n, VALUE_DIM, BLOCK_N, BLOCK_DV)


@triton.jit
def _accumulate_rows(
    dq, row_sum, rows, grads, delta, row_bias, row0, count, listed, places, bits, k, v, stride_k_n, stride_v_n, batch,
    kv_head, q_len, kv_len, scale, softcap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, SUM: tl.constexpr, FORM: tl.constexpr,
    ASM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """dq += dX k and row_sum += sum_j dS over the first ``count`` blocks of keys that are listed."""
    row_bias *= unit_of(FORM)
    row = (row0 + tl.arange(0, BLOCK_M))[:, None]
    block = tl.load(listed)
    if MIXED:
        place = place_of(places, 0, count)
        first, second, third, fourth = words_of(bits, place, row0 % _BLOCK, 0, BLOCK_M, BLOCK_N)
        place = place_of(places, BLOCK_N, count)
    for at in range(0, count * _BLOCK, BLOCK_N):
        start = block * _BLOCK + (at - at // _BLOCK * _BLOCK)
        col = (start + tl.arange(0, BLOCK_N))[None, :]
        keys = load_rows(k, batch, kv_head, start, kv_len, stride_k_n, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
        s = tl.dot(rows, keys.T, input_precision=PRECISION)
        values = load_rows(v, batch, kv_head, start, kv_len, stride_v_n, VALUE_DIM, BLOCK_N, BLOCK_DV, TMA)
        dp = tl.dot(grads, values.T, input_precision=PRECISION)
        seen = None
        if MIXED:
            seen = seen_in(first, second, third, fourth, BLOCK_N)
        _, ds, dx = _score_gradients(
            s, dp, delta, row_bias[:, None], row, col, q_len, kv_len, scale, softcap, start + BLOCK_N > kv_len, seen,
            SOFTCAP, FORM, ASM,
        )  # fmt: skip
        if SUM:
            row_sum += tl.sum(ds, 1)
        dq = tl.dot(dx.to(keys.dtype), keys, dq, input_precision=PRECISION)
        following = at + BLOCK_N
        block = tl.load(listed + following // _BLOCK)
        if MIXED:
            part = following - following // _BLOCK * _BLOCK
            first, second, third, fourth = words_of(bits, place, row0 % _BLOCK, part, BLOCK_M, BLOCK_N)
            place = place_of(places, following + BLOCK_N, count)
    return dq, row_sum


@triton.jit
def _accumulate_all_rows(
    dq, row_sum, rows, grads, delta, row_bias, row0, active, listed, places, bits, k, v, stride_k_n, stride_v_n, batch,
    kv_head, q_len, kv_len, scale, softcap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, SUM: tl.constexpr, FORM: tl.constexpr,
    ASM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Over the full blocks, and then the mixed ones; over none, unless active is 1. listed follows a header."""
    full = tl.load(listed - _HEADER)
    mixed = tl.load(listed - _HEADER + 1)
    dq, row_sum = _accumulate_rows(
        dq, row_sum, rows, grads, delta, row_bias, row0, full * active, listed, places, bits, k, v, stride_k_n,
        stride_v_n, batch, kv_head, q_len, kv_len, scale, softcap, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M,
        BLOCK_N, SOFTCAP, SUM, FORM, ASM, TMA, PRECISION, False,
    )  # fmt: skip
    return _accumulate_rows(
        dq, row_sum, rows, grads, delta, row_bias, row0, mixed * active, listed + full, places + full, bits, k, v,
        stride_k_n, stride_v_n, batch, kv_head, q_len, kv_len, scale, softcap, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
        BLOCK_M, BLOCK_N, SOFTCAP, SUM, FORM, ASM, TMA, PRECISION, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED_BLOCKS)
def rows_kernel(
    q, k, v, do, delta, dq_out, sum_out, bias, visible, lists, bits,
    stride_q_b, stride_q_h, stride_q_n, stride_k_b, stride_k_h, stride_k_n,
    stride_v_b, stride_v_h, stride_v_n, stride_do_b, stride_do_h, stride_do_n,
    stride_dq_b, stride_dq_h, stride_dq_n, stride_sum_b, stride_sum_h, stride_sum_n,
    stride_delta_b, stride_delta_h, stride_delta_n, stride_bias_b, stride_bias_h, stride_bias_m,
    stride_seen_b, stride_seen_h, stride_list_b, stride_list_h, stride_list_n,
    members, span, heads, group, q_len, kv_len, scale, softcap, const_bias,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS_ROWS: tl.constexpr, VISIBLE: tl.constexpr,
    SOFTCAP: tl.constexpr, FORM: tl.constexpr, SLOW: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: dQ and the row sums of dS, of BLOCK_M rows of one query head. k, v: descriptors if TMA."""
    scale, softcap, const_bias = single(scale), single(softcap), single(const_bias)
    stride_q_b, stride_q_h, stride_q_n = elements(stride_q_b, stride_q_h, stride_q_n, UNIT, WIDE)
    stride_k_b, stride_k_h, stride_k_n = elements(stride_k_b, stride_k_h, stride_k_n, UNIT, WIDE)
    stride_v_b, stride_v_h, stride_v_n = elements(stride_v_b, stride_v_h, stride_v_n, UNIT, WIDE)
    stride_do_b, stride_do_h, stride_do_n = elements(stride_do_b, stride_do_h, stride_do_n, UNIT, WIDE)
    stride_dq_n = row_stride(stride_dq_n, WIDE)
    number, member = place_of_program(tl.cdiv(q_len, _BLOCK) * (_BLOCK // BLOCK_M), members, span)
    batch, head = member // heads, member % heads
    kv_head = head // group
    batch64, head64, kv_head64 = batch.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)
    lists += batch64 * stride_list_b + head64 * stride_list_h
    own, row0 = own_block(lists, number, stride_list_n, BLOCK_M)
    if row0 >= q_len:
        return
    q += batch64 * stride_q_b + head64 * stride_q_h
    do += batch64 * stride_do_b + head64 * stride_do_h
    if not TMA:
        k += batch64 * stride_k_b + kv_head64 * stride_k_h
        v += batch64 * stride_v_b + kv_head64 * stride_v_h
    if bias is not None:
        bias += batch64 * stride_bias_b + head64 * stride_bias_h
        if not BIAS_ROWS:
            const_bias += tl.load(bias).to(tl.float32)
    visible += batch64 * stride_seen_b + head64 * stride_seen_h

    rows = load_rows(q, batch, head, row0, q_len, stride_q_n, HEAD_DIM, BLOCK_M, BLOCK_D, False)
    grads = load_rows(do, batch, head, row0, q_len, stride_do_n, VALUE_DIM, BLOCK_M, BLOCK_DV, False)
    row = row0 + tl.arange(0, BLOCK_M)
    row_delta = None
    if delta is not None:
        delta += batch64 * stride_delta_b + head64 * stride_delta_h
        row_delta = load_numbers(delta, row, q_len, stride_delta_n)[:, None]
    row_bias = row_biases(
        row, bias, stride_bias_m, visible, 1, const_bias, q_len, kv_len, 0, 0, 0, BIAS_ROWS, VISIBLE, False, False
    )
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    SUM: tl.constexpr = sum_out is not None
    listed = own + _HEADER
    places = listed + tl.cdiv(kv_len, _BLOCK)
    fast = 1
    if FORM == _AUTO:
        fast = (tl.min(row_bias) >= _FAST_BIAS).to(tl.int32)
    if FORM >= _FAST:
        dq, row_sum = _accumulate_all_rows(
            dq, row_sum, rows, grads, row_delta, row_bias, row0, fast, listed, places, bits, k, v, stride_k_n,
            stride_v_n, batch, kv_head, q_len, kv_len, scale, softcap, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M,
            BLOCK_N, SOFTCAP, SUM, _FAST, ASM, TMA, PRECISION,
        )  # fmt: skip
    if FORM != _FAST:
        dq, row_sum = _accumulate_all_rows(
            dq, row_sum, rows, grads, row_delta, row_bias, row0, 1 - fast if FORM == _AUTO else 1, listed, places, bits,
            k, v, stride_k_n, stride_v_n, batch, kv_head, q_len, kv_len, scale, softcap, HEAD_DIM, VALUE_DIM, BLOCK_D,
            BLOCK_DV, BLOCK_M, BLOCK_N, SOFTCAP, SUM, SLOW, ASM, TMA, PRECISION,
        )  # fmt: skip
    if dq_out is not None:
        dq_out += batch64 * stride_dq_b + head64 * stride_dq_h
        store_rows(dq_out, dq * scale, row0, q_len, stride_dq_n, HEAD_DIM, BLOCK_M, BLOCK_D)
    if sum_out is not None:
        sum_out += batch64 * stride_sum_b + head64 * stride_sum_h
        tl.store(sum_out + row.to(tl.int64) * stride_sum_n, row_sum, mask=row < q_len)
