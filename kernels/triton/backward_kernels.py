"""The kernels of :mod:`sigswap.kernels.triton.backward`, which has the formulas and launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from sigswap.kernels.triton.common import (
    _ACCURATE,
    _AUTO,
    _FAST,
    _FAST_BIAS,
    _ROW_BIAS_BLOCK,
    UNSPECIALIZED,
    elements,
    is_edge,
    keys_of_rows,
    load_numbers,
    load_rows,
    probabilities,
    row_biases,
    rows_of_keys,
    sequence,
    single,
    store_rows,
    unit_of,
)
from sigswap.kernels.triton.dropout import drawn_rows, first_place, first_row, kept, row_draws, scale_of
from sigswap.kernels.triton.tile_sums import add_tile

# Device functions. In the kernel of dK and dV tiles of scores are [keys, rows], else [rows, keys].


@triton.jit
def _score_gradients(
    s, dp, delta, row_bias, row, col, mask, stride_mask_m, stride_mask_n, first_word, second_word, q_len, kv_len,
    shift, left, right, scale, softcap, dropout_p, edge, end,
    MASK_ROWS: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, FORM: tl.constexpr, ASM: tl.constexpr, MASK_UNIT: tl.constexpr,
):  # fmt: skip
    """(p after dropout but for its factor 1 / (1 - dropout_p), dS, dX).

    first_word, second_word: what dropout drew for the rows. delta: of the rows below a row cap, else None. end: whether
    some of the keys are out of range, whose dP is 0, but not with delta.
    """
    p, slope = probabilities(
        s, row_bias, row, col, mask, stride_mask_m, stride_mask_n, q_len, kv_len, shift, left, right, scale, softcap,
        edge, MASK_ROWS, HAS_LEFT, HAS_RIGHT, SOFTCAP, FORM, ASM, None, MASK_UNIT,
    )  # fmt: skip
    dropped = p
    if DROPOUT:
        keep = kept(first_word, second_word, col, dropout_p)
        dropped = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * scale_of(dropout_p), 0.0)
    if delta is not None:
        dp -= delta
        if end:
            dp = tl.where(col < kv_len, dp, 0.0)
    ds = (p - p * p) * dp
    dx = ds
    if SOFTCAP:
        dx = ds * slope
    return dropped, ds, dx


@triton.jit
def _accumulate_keys(
    dk, dv, keys, values, col0, active, q, do, delta, dq_out, sum_out, mask_sums, dq_sums, stride_q_n, stride_do_n,
    stride_delta_n, stride_dq_n, stride_sum_n, bias, bias_at, batch, head, mask, stride_mask_m, stride_mask_n, draws,
    draw_rows, drawn, q_len, kv_len, shift, left, right, scale, softcap, const_bias, dropout_p,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr, BIAS_ROWS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, P_SCALE: tl.constexpr, FORM: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, MASK_UNIT: tl.constexpr, WARPS: tl.constexpr, ALONE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dk += dX^T q and dv += p^T dO over all rows that see some of the keys; none, unless active is 1.

    With dq_out or sum_out these are all keys: then dQ and the row sums of dS are stored, too, for all rows; if ADD,
    they are added to what other keys gave, dQ in dq_sums. mask_sums: where dS is added to, or stored, if ALONE.
    """
    col = (col0 + tl.arange(0, BLOCK_N))[:, None]
    last_col = tl.minimum(col0 + BLOCK_N, kv_len) - 1
    begin, end = rows_of_keys(col0, last_col, q_len, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M)
    if not ADD and (dq_out is not None or sum_out is not None):
        begin, end = 0, q_len
    for start in range(begin, end * active, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        edge = is_edge(start, start + BLOCK_M - 1, col0, last_col, shift, left, right, HAS_LEFT, HAS_RIGHT)
        rows = load_rows(q, batch, head, start, q_len, stride_q_n, HEAD_DIM, BLOCK_M, BLOCK_D, TMA)
        s = tl.dot(keys, rows.T, input_precision=PRECISION)
        grads = load_rows(do, batch, head, start, q_len, stride_do_n, VALUE_DIM, BLOCK_M, BLOCK_DV, TMA)
        dp = tl.dot(values, grads.T, input_precision=PRECISION)
        row_bias = tl.zeros((BLOCK_M,), tl.float32) + const_bias * unit_of(FORM)
        if BIAS_ROWS:
            if TMA:
                row_bias = bias.load([bias_at, start]).reshape(BLOCK_M) * unit_of(FORM)
            else:
                row_bias = tl.load(bias + row.to(tl.int64), mask=row < q_len, other=0.0) * unit_of(FORM)
        row_delta = None
        if delta is not None:
            row_delta = load_numbers(delta, row, q_len, stride_delta_n)[None, :]
        first_word, second_word = None, None
        if DROPOUT:
            first_word, second_word = drawn_rows(draws, draw_rows, drawn, row[None, :], row[None, :] < q_len)
        p, ds, dx = _score_gradients(
            s, dp, row_delta, row_bias[None, :], row[None, :], col, mask, stride_mask_m, stride_mask_n, first_word,
            second_word, q_len, kv_len, shift, left, right, scale, softcap, dropout_p, edge, col0 + BLOCK_N > kv_len,
            MASK_ROWS, HAS_LEFT, HAS_RIGHT, SOFTCAP, DROPOUT, FORM, ASM, MASK_UNIT,
        )  # fmt: skip
        if P_SCALE != 1.0:
            p *= P_SCALE
        dv = tl.dot(p.to(grads.dtype), grads, dv, input_precision=PRECISION)
        dk = tl.dot(dx.to(rows.dtype), rows, dk, input_precision=PRECISION)
        if dq_out is not None:
            dq = tl.dot(dx.to(keys.dtype).T, keys, input_precision=PRECISION) * scale
            store_rows(dq_out, dq, start, q_len, stride_dq_n, HEAD_DIM, BLOCK_M, BLOCK_D)
        if sum_out is not None:
            if ADD:
                place = sum_out + row.to(tl.int64) * stride_sum_n
                tl.atomic_add(place, tl.sum(ds, 0), mask=row < q_len, sem="relaxed")
            else:
                tl.store(sum_out + row.to(tl.int64) * stride_sum_n, tl.sum(ds, 0), mask=row < q_len)
        if dq_sums is not None:
            dq = tl.dot(dx.to(keys.dtype).T, keys, input_precision=PRECISION)
            add_tile(dq_sums + tl.cast(start, tl.int64) * BLOCK_D, dq, WARPS, False)
        if mask_sums is not None:
            place = (start // BLOCK_M * tl.cdiv(kv_len, BLOCK_N) + col0 // BLOCK_N).to(tl.int64)
            add_tile(mask_sums + place * (BLOCK_M * BLOCK_N), ds, WARPS, ALONE)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def keys_kernel(
    q, k, v, do, delta, dk_out, dv_out, dq_out, sum_out, mask_sums, dq_sums, bias, floor, mask, draws, cu_q, cu_k,
    stride_q_b, stride_q_h, stride_q_n, stride_k_b, stride_k_h, stride_k_n,
    stride_v_b, stride_v_h, stride_v_n, stride_do_b, stride_do_h, stride_do_n,
    stride_dk_b, stride_dk_h, stride_dk_n, stride_dv_b, stride_dv_h, stride_dv_n,
    stride_dq_b, stride_dq_h, stride_dq_n, stride_sum_b, stride_sum_h, stride_sum_n,
    stride_delta_b, stride_delta_h, stride_delta_n,
    stride_bias_b, stride_bias_h, stride_floor_b, stride_floor_h, stride_sums_b, stride_sums_h,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, mask_batches,
    heads, group, q_len, kv_len, total_q, total_k, left, right, scale, softcap, const_bias, dropout_p, draw_rows,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr,
    BIAS_ROWS: tl.constexpr, VISIBLE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, P_SCALE: tl.constexpr,
    FORM: tl.constexpr, SLOW: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, GRAD_UNIT: tl.constexpr, WIDE: tl.constexpr, MASK_UNIT: tl.constexpr,
    WARPS: tl.constexpr, ALONE: tl.constexpr, ADD: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of BLOCK_N keys of one key head, over all query heads that use it. With dq_out or sum_out,
    which need that there is one block of keys, also dQ and the row sums of dS; if ADD several blocks add to the latter.
    mask_sums and dq_sums: the sums of tiles of dS, stored if ALONE, and of dQ, if wanted. ORDER: of programs, so that
    those which add to the same tiles run at about the same time: fastest are blocks of keys; the batch (1); heads (2);
    both (3).

    The row bias is const_bias, less ln kv_len if VISIBLE, plus bias, if it is a number per head; or all in bias, a
    vector of rows (BIAS_ROWS), of which floor has each block's minimum, if FORM is AUTO. q, do, and a bias of rows:
    descriptors if TMA (stride_bias_b and stride_bias_h then count the bias's rows). draws: what draws_kernel wrote, of
    draw_rows rows.
    """
    scale, softcap, const_bias, dropout_p = single(scale), single(softcap), single(const_bias), single(dropout_p)
    stride_q_b, stride_q_h, stride_q_n = elements(stride_q_b, stride_q_h, stride_q_n, UNIT, WIDE)
    stride_k_b, stride_k_h, stride_k_n = elements(stride_k_b, stride_k_h, stride_k_n, UNIT, WIDE)
    stride_v_b, stride_v_h, stride_v_n = elements(stride_v_b, stride_v_h, stride_v_n, UNIT, WIDE)
    stride_do_b, stride_do_h, stride_do_n = elements(stride_do_b, stride_do_h, stride_do_n, UNIT, WIDE)
    stride_dk_b, stride_dk_h, stride_dk_n = elements(stride_dk_b, stride_dk_h, stride_dk_n, GRAD_UNIT, WIDE)
    stride_dv_b, stride_dv_h, stride_dv_n = elements(stride_dv_b, stride_dv_h, stride_dv_n, GRAD_UNIT, WIDE)
    stride_dq_b, stride_dq_h, stride_dq_n = elements(stride_dq_b, stride_dq_h, stride_dq_n, GRAD_UNIT, WIDE)
    blocks = tl.cdiv(kv_len, BLOCK_N)
    # Under a causal mask the first keys take longest, and start first.
    kv_heads = heads // group
    if ORDER == 0:
        col0 = tl.program_id(0) % blocks * BLOCK_N
        kv_head = (tl.program_id(0) // blocks) % kv_heads
        batch = tl.program_id(0) // blocks // kv_heads
    elif ORDER == 1:
        batches = tl.num_programs(0) // (blocks * kv_heads)
        batch = tl.program_id(0) % batches
        col0 = (tl.program_id(0) // batches) % blocks * BLOCK_N
        kv_head = tl.program_id(0) // batches // blocks
    elif ORDER == 2:
        kv_head = tl.program_id(0) % kv_heads
        col0 = (tl.program_id(0) // kv_heads) % blocks * BLOCK_N
        batch = tl.program_id(0) // kv_heads // blocks
    else:
        units = tl.num_programs(0) // blocks
        kv_head = tl.program_id(0) % units % kv_heads
        batch = tl.program_id(0) % units // kv_heads
        col0 = tl.program_id(0) // units * BLOCK_N
    batch64, kv_head64 = batch.to(tl.int64), kv_head.to(tl.int64)
    padded_len = q_len
    if cu_q is not None:
        q_start, q_len = sequence(cu_q, batch, q_len, total_q)
        k_start, kv_len = sequence(cu_k, batch, kv_len, total_k)
        if col0 >= kv_len:
            return
        q += q_start * stride_q_n
        k += k_start * stride_k_n
        v += k_start * stride_v_n
        do += q_start * stride_do_n
        if delta is not None:
            delta += q_start * stride_delta_n
        if dk_out is not None:
            dk_out += k_start * stride_dk_n
        if dv_out is not None:
            dv_out += k_start * stride_dv_n
        if BIAS_ROWS:
            bias += q_start
    k += batch64 * stride_k_b + kv_head64 * stride_k_h
    v += batch64 * stride_v_b + kv_head64 * stride_v_h
    if mask is not None:
        mask += (batch % mask_batches).to(tl.int64) * stride_mask_b
    if mask_sums is not None:
        mask_sums += (batch % mask_batches).to(tl.int64) * stride_sums_b * (BLOCK_M * BLOCK_N)
    if VISIBLE:
        const_bias -= tl.log(tl.maximum(kv_len, 1).to(tl.float32))
    shift = kv_len - q_len if BOTTOM_RIGHT else 0
    keys = load_rows(k, batch, kv_head, col0, kv_len, stride_k_n, HEAD_DIM, BLOCK_N, BLOCK_D, False)
    values = load_rows(v, batch, kv_head, col0, kv_len, stride_v_n, VALUE_DIM, BLOCK_N, BLOCK_DV, False)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)

    for member in range(0, group):
        head = kv_head * group + member
        head64 = head.to(tl.int64)
        drawn = first_place(head, total_q, q_start) if cu_q is not None else first_row(batch, heads, head, q_len)
        q_head, do_head = q, do
        if not TMA:
            q_head += batch64 * stride_q_b + head64 * stride_q_h
            do_head += batch64 * stride_do_b + head64 * stride_do_h
        bias_head, mask_head, head_bias, dq_head, sum_head = bias, mask, const_bias, dq_out, sum_out
        delta_head, mask_sums_head, dq_sums_head = delta, mask_sums, dq_sums
        if mask_sums is not None:
            mask_sums_head += head64 * stride_sums_h * (BLOCK_M * BLOCK_N)
        if dq_sums is not None:
            dq_sums_head += (batch64 * heads + head64) * (tl.cdiv(q_len, BLOCK_M) * BLOCK_M * BLOCK_D)
        if delta is not None:
            delta_head += batch64 * stride_delta_b + head64 * stride_delta_h
        if dq_out is not None:
            dq_head += batch64 * stride_dq_b + head64 * stride_dq_h
        if sum_out is not None:
            sum_head += batch64 * stride_sum_b + head64 * stride_sum_h
        bias_at = batch * stride_bias_b + head * stride_bias_h
        if bias is not None:
            if not (TMA and BIAS_ROWS):
                bias_head += batch64 * stride_bias_b + head64 * stride_bias_h
            if not BIAS_ROWS:
                head_bias += tl.load(bias_head).to(tl.float32)
        if mask is not None:
            mask_head += head64 * stride_mask_h
        fast = 1
        if FORM == _AUTO:
            lowest = head_bias
            if floor is not None:
                floors = floor + batch64 * stride_floor_b + head64 * stride_floor_h
                lowest = tl.full((), float("inf"), tl.float32)
                block_count = tl.cdiv(padded_len, _ROW_BIAS_BLOCK)
                for at in range(0, block_count, 64):
                    block = at + tl.arange(0, 64)
                    lowest = tl.minimum(
                        lowest, tl.min(tl.load(floors + block, mask=block < block_count, other=float("inf")))
                    )
            fast = (lowest >= _FAST_BIAS).to(tl.int32)
        if FORM >= _FAST:
            dk, dv = _accumulate_keys(
                dk, dv, keys, values, col0, fast, q_head, do_head, delta_head, dq_head, sum_head,
                mask_sums_head, dq_sums_head,
                stride_q_n, stride_do_n, stride_delta_n, stride_dq_n, stride_sum_n, bias_head, bias_at, batch, head,
                mask_head, stride_mask_m, stride_mask_n,
                draws, draw_rows, drawn, q_len, kv_len, shift, left, right, scale, softcap, head_bias, dropout_p,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASK_ROWS, BIAS_ROWS, HAS_LEFT, HAS_RIGHT,
                SOFTCAP,
                DROPOUT, P_SCALE, _FAST, ASM, TMA, PRECISION, MASK_UNIT, WARPS, ALONE, ADD,
            )  # fmt: skip
        if FORM != _FAST:
            dk, dv = _accumulate_keys(
                dk, dv, keys, values, col0, 1 - fast if FORM == _AUTO else 1, q_head, do_head, delta_head,
                dq_head, sum_head, mask_sums_head, dq_sums_head,
                stride_q_n, stride_do_n, stride_delta_n, stride_dq_n, stride_sum_n, bias_head,
                bias_at, batch, head, mask_head, stride_mask_m, stride_mask_n, draws, draw_rows, drawn, q_len,
                kv_len, shift, left, right, scale, softcap,
                head_bias, dropout_p, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASK_ROWS, BIAS_ROWS,
                HAS_LEFT, HAS_RIGHT, SOFTCAP, DROPOUT, P_SCALE, SLOW, ASM, TMA, PRECISION, MASK_UNIT, WARPS, ALONE, ADD,
            )  # fmt: skip

    if dk_out is not None:
        dk_out += batch64 * stride_dk_b + kv_head64 * stride_dk_h
        store_rows(dk_out, dk * scale, col0, kv_len, stride_dk_n, HEAD_DIM, BLOCK_N, BLOCK_D)
    if dv_out is not None:
        factor = 1.0 / P_SCALE
        if DROPOUT:
            factor *= scale_of(dropout_p)
        dv_out += batch64 * stride_dv_b + kv_head64 * stride_dv_h
        store_rows(dv_out, dv * factor, col0, kv_len, stride_dv_n, VALUE_DIM, BLOCK_N, BLOCK_DV)


@triton.jit
def _accumulate_rows(
    dq, row_sum, rows, grads, delta, row_bias, row0, active, k, v, stride_k_n, stride_v_n, batch, kv_head,
    mask, stride_mask_m, stride_mask_n, first_word, second_word, q_len, kv_len, shift, left, right, scale, softcap,
    dropout_p,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, SUM: tl.constexpr, FORM: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, MASK_UNIT: tl.constexpr,
):  # fmt: skip
    """dq += dX k and row_sum += sum_j dS over all keys that some of the rows see; none, unless active is 1."""
    row_bias *= unit_of(FORM)
    row = (row0 + tl.arange(0, BLOCK_M))[:, None]
    last_row = tl.minimum(row0 + BLOCK_M, q_len) - 1
    begin, end = keys_of_rows(row0, last_row, kv_len, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
    for start in range(begin, end * active, BLOCK_N):
        col = (start + tl.arange(0, BLOCK_N))[None, :]
        edge = is_edge(row0, last_row, start, start + BLOCK_N - 1, shift, left, right, HAS_LEFT, HAS_RIGHT)
        keys = load_rows(k, batch, kv_head, start, kv_len, stride_k_n, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
        s = tl.dot(rows, keys.T, input_precision=PRECISION)
        values = load_rows(v, batch, kv_head, start, kv_len, stride_v_n, VALUE_DIM, BLOCK_N, BLOCK_DV, TMA)
        dp = tl.dot(grads, values.T, input_precision=PRECISION)
        _, ds, dx = _score_gradients(
            s, dp, delta, row_bias[:, None], row, col, mask, stride_mask_m, stride_mask_n, first_word,
            second_word, q_len, kv_len, shift, left, right, scale, softcap, dropout_p, edge, start + BLOCK_N > kv_len,
            MASK_ROWS, HAS_LEFT, HAS_RIGHT, SOFTCAP, DROPOUT, FORM, ASM, MASK_UNIT,
        )  # fmt: skip
        if SUM:
            row_sum += tl.sum(ds, 1)
        dq = tl.dot(dx.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq, row_sum


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rows_kernel(
    q, k, v, do, delta, dq_out, sum_out, bias, count, mask, seed, cu_q, cu_k,
    stride_q_b, stride_q_h, stride_q_n, stride_k_b, stride_k_h, stride_k_n,
    stride_v_b, stride_v_h, stride_v_n, stride_do_b, stride_do_h, stride_do_n,
    stride_dq_b, stride_dq_h, stride_dq_n, stride_sum_b, stride_sum_h, stride_sum_n,
    stride_delta_b, stride_delta_h, stride_delta_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_count_b, stride_count_h, stride_count_m,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, mask_batches,
    heads, group, q_len, kv_len, total_q, total_k, left, right, scale, softcap, const_bias, dropout_p,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr,
    BIAS_ROWS: tl.constexpr, VISIBLE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, P_SCALE: tl.constexpr,
    FORM: tl.constexpr, SLOW: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, GRAD_UNIT: tl.constexpr, WIDE: tl.constexpr, MASK_UNIT: tl.constexpr,
):  # fmt: skip
    """One program: dQ and the row sums of dS, of BLOCK_M rows of one query head. k, v: descriptors if TMA."""
    scale, softcap, const_bias, dropout_p = single(scale), single(softcap), single(const_bias), single(dropout_p)
    stride_q_b, stride_q_h, stride_q_n = elements(stride_q_b, stride_q_h, stride_q_n, UNIT, WIDE)
    stride_k_b, stride_k_h, stride_k_n = elements(stride_k_b, stride_k_h, stride_k_n, UNIT, WIDE)
    stride_v_b, stride_v_h, stride_v_n = elements(stride_v_b, stride_v_h, stride_v_n, UNIT, WIDE)
    stride_do_b, stride_do_h, stride_do_n = elements(stride_do_b, stride_do_h, stride_do_n, UNIT, WIDE)
    stride_dq_b, stride_dq_h, stride_dq_n = elements(stride_dq_b, stride_dq_h, stride_dq_n, GRAD_UNIT, WIDE)
    blocks = tl.cdiv(q_len, BLOCK_M)
    row0 = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    head = (tl.program_id(0) // blocks) % heads
    batch = tl.program_id(0) // blocks // heads
    kv_head = head // group
    batch64, head64, kv_head64 = batch.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)
    head_row = first_row(batch, heads, head, q_len)
    if cu_q is not None:
        q_start, q_len = sequence(cu_q, batch, q_len, total_q)
        k_start, kv_len = sequence(cu_k, batch, kv_len, total_k)
        if row0 >= q_len:
            return
        q += q_start * stride_q_n
        k += k_start * stride_k_n
        v += k_start * stride_v_n
        do += q_start * stride_do_n
        if delta is not None:
            delta += q_start * stride_delta_n
        if dq_out is not None:
            dq_out += q_start * stride_dq_n
        if sum_out is not None:
            sum_out += q_start * stride_sum_n
        if bias is not None:
            bias += q_start * stride_bias_m
    q += batch64 * stride_q_b + head64 * stride_q_h
    do += batch64 * stride_do_b + head64 * stride_do_h
    if not TMA:
        k += batch64 * stride_k_b + kv_head64 * stride_k_h
        v += batch64 * stride_v_b + kv_head64 * stride_v_h
    if bias is not None:
        bias += batch64 * stride_bias_b + head64 * stride_bias_h
        if not BIAS_ROWS:
            const_bias += tl.load(bias).to(tl.float32)
    if mask is not None:
        mask_batch = (batch % mask_batches).to(tl.int64)
        mask += mask_batch * stride_mask_b + head64 * stride_mask_h
        if count is not None:
            count += mask_batch * stride_count_b + head64 * stride_count_h
    shift = kv_len - q_len if BOTTOM_RIGHT else 0

    rows = load_rows(q, batch, head, row0, q_len, stride_q_n, HEAD_DIM, BLOCK_M, BLOCK_D, False)
    grads = load_rows(do, batch, head, row0, q_len, stride_do_n, VALUE_DIM, BLOCK_M, BLOCK_DV, False)
    row = row0 + tl.arange(0, BLOCK_M)
    row_delta = None
    if delta is not None:
        delta += batch64 * stride_delta_b + head64 * stride_delta_h
        row_delta = load_numbers(delta, row, q_len, stride_delta_n)[:, None]
    row_bias = row_biases(
        row, bias, stride_bias_m, count, stride_count_m, const_bias, q_len, kv_len, shift, left, right,
        BIAS_ROWS, VISIBLE, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    first_word, second_word = None, None
    if DROPOUT:
        first_word, second_word = row_draws(seed, head_row, row[:, None])
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    fast = 1
    if FORM == _AUTO:
        fast = (tl.min(row_bias) >= _FAST_BIAS).to(tl.int32)
    if FORM >= _FAST:
        dq, row_sum = _accumulate_rows(
            dq, row_sum, rows, grads, row_delta, row_bias, row0, fast, k, v, stride_k_n, stride_v_n, batch, kv_head,
            mask, stride_mask_m, stride_mask_n, first_word, second_word, q_len, kv_len, shift, left, right, scale,
            softcap, dropout_p,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASK_ROWS, HAS_LEFT, HAS_RIGHT, SOFTCAP,
            DROPOUT, sum_out is not None, _FAST, ASM, TMA, PRECISION, MASK_UNIT,
        )  # fmt: skip
    if FORM != _FAST:
        dq, row_sum = _accumulate_rows(
            dq, row_sum, rows, grads, row_delta, row_bias, row0, 1 - fast if FORM == _AUTO else 1, k, v, stride_k_n,
            stride_v_n, batch, kv_head, mask, stride_mask_m, stride_mask_n, first_word, second_word, q_len, kv_len,
            shift, left, right,
            scale, softcap, dropout_p, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASK_ROWS, HAS_LEFT,
            HAS_RIGHT, SOFTCAP, DROPOUT, sum_out is not None, SLOW, ASM, TMA, PRECISION, MASK_UNIT,
        )  # fmt: skip
    if dq_out is not None:
        dq_out += batch64 * stride_dq_b + head64 * stride_dq_h
        store_rows(dq_out, dq * scale, row0, q_len, stride_dq_n, HEAD_DIM, BLOCK_M, BLOCK_D)
    if sum_out is not None:
        sum_out += batch64 * stride_sum_b + head64 * stride_sum_h
        tl.store(sum_out + row.to(tl.int64) * stride_sum_n, row_sum, mask=row < q_len)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def mask_kernel(
    q, k, v, do, delta, out, bias, count, mask, seed,
    stride_q_b, stride_q_h, stride_q_n, stride_k_b, stride_k_h, stride_k_n,
    stride_v_b, stride_v_h, stride_v_n, stride_do_b, stride_do_h, stride_do_n,
    stride_delta_b, stride_delta_h, stride_delta_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_count_b, stride_count_h, stride_count_m,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, mask_batches,
    heads, group, q_len, kv_len, left, right, scale, softcap, const_bias, dropout_p,
    terms, terms_per_split, tiles,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr,
    BIAS_ROWS: tl.constexpr, VISIBLE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    OVER_BATCH: tl.constexpr, OVER_HEADS: tl.constexpr, OVER_ROWS: tl.constexpr, OVER_KEYS: tl.constexpr,
    ASM: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    MASK_UNIT: tl.constexpr,
):  # fmt: skip
    """One program: one tile of the mask's gradient, summed over a part of what the mask is broadcast to.

    out: float32 [splits, mask_batches, H|1, M|1, N|1], contiguous.
    """
    scale, softcap, const_bias, dropout_p = single(scale), single(softcap), single(const_bias), single(dropout_p)
    stride_q_b, stride_q_h, stride_q_n = elements(stride_q_b, stride_q_h, stride_q_n, UNIT, WIDE)
    stride_k_b, stride_k_h, stride_k_n = elements(stride_k_b, stride_k_h, stride_k_n, UNIT, WIDE)
    stride_v_b, stride_v_h, stride_v_n = elements(stride_v_b, stride_v_h, stride_v_n, UNIT, WIDE)
    stride_do_b, stride_do_h, stride_do_n = elements(stride_do_b, stride_do_h, stride_do_n, UNIT, WIDE)
    row_blocks = tl.cdiv(q_len, BLOCK_M)
    key_blocks = tl.cdiv(kv_len, BLOCK_N)
    split = tl.program_id(0) // tiles
    at = tl.program_id(0) % tiles
    key_block, row_block, own_head = 0, 0, 0
    mask_keys, mask_rows, mask_heads = 1, 1, 1
    if not OVER_KEYS:
        key_block = at % key_blocks
        at = at // key_blocks
        mask_keys = kv_len
    if not OVER_ROWS:
        row_block = at % row_blocks
        at = at // row_blocks
        mask_rows = q_len
    if not OVER_HEADS:
        own_head = at % heads
        at = at // heads
        mask_heads = heads
    own_batch = at
    own_batch64 = own_batch.to(tl.int64)
    shift = kv_len - q_len if BOTTOM_RIGHT else 0

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for term in range(split * terms_per_split, tl.minimum((split + 1) * terms_per_split, terms)):
        rest = term
        column_block, line_block, head, batch = key_block, row_block, own_head, own_batch
        if OVER_KEYS:
            column_block = rest % key_blocks
            rest = rest // key_blocks
        if OVER_ROWS:
            line_block = rest % row_blocks
            rest = rest // row_blocks
        if OVER_HEADS:
            head = rest % heads
            rest = rest // heads
        if OVER_BATCH:
            batch += rest * mask_batches
        batch64, head64 = tl.cast(batch, tl.int64), tl.cast(head, tl.int64)
        kv_head64 = head64 // group
        row0, col0 = line_block * BLOCK_M, column_block * BLOCK_N
        rows = load_rows(
            q + batch64 * stride_q_b + head64 * stride_q_h, 0, 0, row0, q_len, stride_q_n, HEAD_DIM, BLOCK_M,
            BLOCK_D, False,
        )  # fmt: skip
        keys = load_rows(
            k + batch64 * stride_k_b + kv_head64 * stride_k_h, 0, 0, col0, kv_len, stride_k_n, HEAD_DIM, BLOCK_N,
            BLOCK_D, False,
        )  # fmt: skip
        s = tl.dot(rows, keys.T, input_precision=PRECISION)
        grads = load_rows(
            do + batch64 * stride_do_b + head64 * stride_do_h, 0, 0, row0, q_len, stride_do_n, VALUE_DIM, BLOCK_M,
            BLOCK_DV, False,
        )  # fmt: skip
        values = load_rows(
            v + batch64 * stride_v_b + kv_head64 * stride_v_h, 0, 0, col0, kv_len, stride_v_n, VALUE_DIM, BLOCK_N,
            BLOCK_DV, False,
        )  # fmt: skip
        dp = tl.dot(grads, values.T, input_precision=PRECISION)
        row = row0 + tl.arange(0, BLOCK_M)
        col = col0 + tl.arange(0, BLOCK_N)
        bias_head, count_head = bias, count
        term_bias = const_bias
        if bias is not None:
            bias_head += batch64 * stride_bias_b + head64 * stride_bias_h
            if not BIAS_ROWS:
                term_bias += tl.load(bias_head).to(tl.float32)
        if count is not None:
            count_head += own_batch64 * stride_count_b + head64 * stride_count_h
        row_bias = row_biases(
            row, bias_head, stride_bias_m, count_head, stride_count_m, term_bias, q_len, kv_len, shift, left, right,
            BIAS_ROWS, VISIBLE, HAS_LEFT, HAS_RIGHT,
        ) * unit_of(_ACCURATE)  # fmt: skip
        row_delta = None
        if delta is not None:
            of_rows = delta + batch64 * stride_delta_b + head64 * stride_delta_h
            row_delta = load_numbers(of_rows, row, q_len, stride_delta_n)[:, None]
        first_word, second_word = None, None
        if DROPOUT:
            first_word, second_word = row_draws(seed, first_row(batch64, heads, head64, q_len), row[:, None])
        _, ds, _ = _score_gradients(
            s, dp, row_delta, row_bias[:, None], row[:, None], col[None, :],
            mask + own_batch64 * stride_mask_b + head64 * stride_mask_h, stride_mask_m, stride_mask_n, first_word,
            second_word, q_len, kv_len, shift, left, right, scale, softcap, dropout_p,
            True, True, MASK_ROWS, HAS_LEFT, HAS_RIGHT, SOFTCAP, DROPOUT, _ACCURATE, ASM, MASK_UNIT,
        )  # fmt: skip
        total += ds

    base = ((tl.cast(split, tl.int64) * mask_batches + own_batch) * mask_heads + own_head) * mask_rows * mask_keys
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    col = key_block * BLOCK_N + tl.arange(0, BLOCK_N)
    if OVER_ROWS and OVER_KEYS:
        tl.store(out + base, tl.sum(tl.sum(total, 1), 0))
    elif OVER_ROWS:
        tl.store(out + base + col, tl.sum(total, 0), mask=col < kv_len)
    elif OVER_KEYS:
        tl.store(out + base + row, tl.sum(total, 1), mask=row < q_len)
    else:
        pointers = out + base + (row.to(tl.int64) * mask_keys)[:, None] + col[None, :]
        tl.store(pointers, total, mask=(row < q_len)[:, None] & (col < kv_len)[None, :])
