"""What the warps of a program of :mod:`sigswap.kernels.hopper.backward_wide` do: one loads, two groups compute."""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sigswap.kernels.hopper.backward_common import (
    _ROWS,
    BY_THREAD,
    add_row_sums,
    add_tile,
    end_of_head,
    load_head_bias,
    lowest_bias,
    minus_of_keys,
    next_tile,
    probabilities,
    put_row_biases,
    soft_capped_probabilities,
    start_at_biases,
    start_at_delta,
    start_of_scores,
    start_row_sums,
    sum_per_thread,
    unknown_zero,
)
from sigswap.kernels.hopper.common import load_tile, store_tile, sync
from sigswap.kernels.hopper.stored_ds import _BLOCK, _KEYS, place_in_gluon
from sigswap.kernels.triton.common import _AUTO, _FAST_BIAS, _LOG2E

_SLOPE_SCALE = tl.constexpr(65536.0)


@gluon.jit
def _start_product(a, a_rest, b, b_rest, start, use_acc, REST: gl.constexpr):
    """a times the transpose of b: products of all columns of heads, which start is part of if use_acc."""
    token = warpgroup_mma(a, b.permute((1, 0)), start, use_acc=use_acc, is_async=True)
    if REST:
        token = warpgroup_mma(a_rest, b_rest.permute((1, 0)), token, is_async=True)
    return token


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The stage behind this one, and its barriers' phase."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def load(
    q, k, v, do, q_rest, k_rest, v_rest, do_rest, bias, delta, k_tile, v_tile, q_tiles, do_tiles,
    k_tile_rest, v_tile_rest, q_tiles_rest, do_tiles_rest, biases, deltas,
    k_full, v_full, q_full, do_full, q_empty, do_empty,
    batch, kv_head, heads, group, col0, begin, span, stride_bias_b, stride_bias_h,
    BIAS_ROWS: gl.constexpr, DELTA: gl.constexpr, Q_REST: gl.constexpr, V_REST: gl.constexpr,
):  # fmt: skip
    """One warp: all that the others compute with."""
    STAGES: gl.constexpr = q_tiles.shape[0]
    K_BYTES: gl.constexpr = k.block_type.nbytes + (k_rest.block_type.nbytes if Q_REST else 0)
    V_BYTES: gl.constexpr = v.block_type.nbytes + (v_rest.block_type.nbytes if V_REST else 0)
    Q_BYTES: gl.constexpr = q.block_type.nbytes + (q_rest.block_type.nbytes if Q_REST else 0)
    DO_BYTES: gl.constexpr = do.block_type.nbytes + (do_rest.block_type.nbytes if V_REST else 0)
    WITH_BIAS: gl.constexpr = bias.block_type.nbytes if BIAS_ROWS else 0
    WITH_DELTA: gl.constexpr = delta.block_type.nbytes if DELTA else 0
    mbarrier.expect(k_full, K_BYTES)
    load_tile(k, [batch, kv_head, col0, 0], k_full, k_tile.index(0))
    if Q_REST:
        load_tile(k_rest, [batch, kv_head, col0, 128], k_full, k_tile_rest.index(0))
    mbarrier.expect(v_full, V_BYTES)
    load_tile(v, [batch, kv_head, col0, 0], v_full, v_tile.index(0))
    if V_REST:
        load_tile(v_rest, [batch, kv_head, col0, 128], v_full, v_tile_rest.index(0))
    stage = 0
    phase = 1
    head = kv_head * group
    start = begin
    for _ in range(group * span):
        mbarrier.wait(q_empty.index(stage), phase)
        mbarrier.expect(q_full.index(stage), Q_BYTES + WITH_BIAS)
        if BIAS_ROWS:
            place = batch * stride_bias_b + head * stride_bias_h
            load_tile(bias, [place, start], q_full.index(stage), biases.index(stage))
        load_tile(q, [batch, head, start, 0], q_full.index(stage), q_tiles.index(stage))
        if Q_REST:
            load_tile(q_rest, [batch, head, start, 128], q_full.index(stage), q_tiles_rest.index(stage))
        mbarrier.wait(do_empty.index(stage), phase)
        mbarrier.expect(do_full.index(stage), DO_BYTES + WITH_DELTA)
        if DELTA:
            load_tile(delta, [batch * heads + head, start], do_full.index(stage), deltas.index(stage))
        load_tile(do, [batch, head, start, 0], do_full.index(stage), do_tiles.index(stage))
        if V_REST:
            load_tile(do_rest, [batch, head, start, 128], do_full.index(stage), do_tiles_rest.index(stage))
        stage, phase = _next(stage, phase, STAGES)
        start += _ROWS
        if start >= begin + span * _ROWS:
            head += 1
            start = begin


@gluon.jit
def compute_values(
    dv, dv_rest, sums, bias, floor, k_tile, v_tile, q_tiles, do_tiles,
    k_tile_rest, v_tile_rest, q_tiles_rest, do_tiles_rest, slopes, ds_tiles, biases,
    k_full, q_full, do_full, do_empty, slopes_full, ds_full, k_read, v_read,
    batch, kv_head, heads, group, col0, begin, span, q_len, kv_len, shift, left, right,
    stride_bias_b, stride_bias_h, scale, const_bias, fast, softcap,
    Q_REST: gl.constexpr, V_REST: gl.constexpr, VISIBLE: gl.constexpr, BANDED: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, BIAS_ROWS: gl.constexpr, ROW_SUMS: gl.constexpr, GROUPED: gl.constexpr,
    P_SCALE: gl.constexpr, FORM: gl.constexpr, SLOW: gl.constexpr, STORED: gl.constexpr, SOFTCAP: gl.constexpr,
    SUMS: gl.constexpr,
):  # fmt: skip
    """The first warpgroup: probabilities, dV, and, unless dS is STORED, the first columns of dQ."""
    STAGES: gl.constexpr = q_tiles.shape[0]
    WIDTH: gl.constexpr = k_tile.shape[4]
    V_WIDTH: gl.constexpr = v_tile.shape[4]
    DIM: gl.constexpr = WIDTH + (64 if Q_REST else 0)
    COLUMNS: gl.constexpr = 64 if DIM == 128 else 128
    V_PRODUCTS: gl.constexpr = 2 if V_REST else 1
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _ROWS, 16])
    of_values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_WIDTH, 16])
    of_rest: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    of_rows: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    as_operand: gl.constexpr = gl.DotOperandLayout(0, of_values, 2)
    as_rest: gl.constexpr = gl.DotOperandLayout(0, of_rest, 2)
    dtype: gl.constexpr = k_tile.dtype
    # Scores start from the biases of rows, which with a soft cap are added to its result, in the sigmoid's unit.
    BY_ROW: gl.constexpr = (BANDED or BIAS_ROWS) and not SOFTCAP
    HEAD_BIAS: gl.constexpr = bias is not None and not BIAS_ROWS
    TILE_SUMS: gl.constexpr = _ROWS * (DIM + 1 if ROW_SUMS else DIM)

    key = gl.arange(0, _KEYS, gl.SliceLayout(1, of_scores))
    row = gl.arange(0, _ROWS, gl.SliceLayout(0, of_scores))
    no_rows = gl.zeros([_ROWS, COLUMNS], gl.float32, of_rows)
    dv_acc = gl.zeros([_KEYS, V_WIDTH], gl.float32, of_values)
    if V_REST:
        dv_acc_rest = gl.zeros([_KEYS, 64], gl.float32, of_rest)

    # Where a tile is: its first row, and its place among the sums of dQ, of which tiles follow one another by heads.
    end = begin + span * _ROWS
    total = group * span
    head = kv_head * group
    tiles = gl.cdiv(q_len, _ROWS)
    start = begin
    tile = (batch * heads + head) * tiles + begin // _ROWS
    row_bias = const_bias + 0.0
    if HEAD_BIAS:
        bias += batch.to(gl.int64) * stride_bias_b
        row_bias += load_head_bias(bias, head, stride_bias_h)
    if BIAS_ROWS and FORM == _AUTO:
        place = batch * stride_bias_b + head * stride_bias_h
        fast = lowest_bias(floor, place, group, stride_bias_h, begin, end, q_len) >= _FAST_BIAS
    per_score = 1.0 / gl.where(fast, 0.5, _LOG2E) if SOFTCAP else scale
    if BANDED and not BIAS_ROWS:
        put_row_biases(
            biases, start, row_bias, per_score, q_len, kv_len, shift, left, right, VISIBLE, HAS_LEFT,
            HAS_RIGHT, False, False,
        )  # fmt: skip
        sync()
    elif VISIBLE:
        const_bias -= gl.log(gl.maximum(kv_len, 1).to(gl.float32))
        row_bias -= gl.log(gl.maximum(kv_len, 1).to(gl.float32))
    unit = gl.where(fast, 0.5, _LOG2E)

    # The first tile.
    mbarrier.wait(k_full, 0)
    keys = k_tile.index(0).reshape([_KEYS, WIDTH])
    keys_rest = k_tile_rest.index(0).reshape([_KEYS, 64]) if Q_REST else 0
    mbarrier.wait(q_full.index(0), 0)
    if BIAS_ROWS and not SOFTCAP:
        s_start = start_at_biases(biases.index(0), scale, of_scores, _KEYS)
    else:
        s_start = start_of_scores(biases, of_scores, _KEYS, BY_ROW)
    rows = q_tiles.index(0).reshape([_ROWS, WIDTH])
    rows_rest = q_tiles_rest.index(0).reshape([_ROWS, 64]) if Q_REST else 0
    s_token = _start_product(keys, keys_rest, rows, rows_rest, s_start, BY_ROW, Q_REST)
    s = warpgroup_mma_wait(0, deps=[s_token])
    if SOFTCAP:
        p, slope = soft_capped_probabilities(
            s, scale, softcap, unit, row_bias, biases.index(0) if BIAS_ROWS else biases, start, col0, key, row,
            shift, left, right, fast, BANDED, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, FORM, SLOW, 8,
        )  # fmt: skip
    else:
        p = probabilities(
            s, scale, row_bias * unit, start, col0, key, row, shift, left, right, fast,
            BY_ROW, HAS_LEFT, HAS_RIGHT, FORM, SLOW, 8,
        )  # fmt: skip
    p_operand = gl.convert_layout((p * P_SCALE).to(dtype), as_operand)
    if SOFTCAP and not SUMS:
        slopes.index(0).store(((p - p * p) * slope.to(gl.float32) * _SLOPE_SCALE).to(slopes.dtype))
    else:
        slopes.index(0).store(((p - p * p) * _SLOPE_SCALE).to(slopes.dtype))
    if SOFTCAP and SUMS:
        slopes.index(1).store(slope)
    tile_before = tile + 0
    start, tile, head_next = next_tile(start, tile, head, begin, end, tiles - span)
    head = head_next
    if GROUPED and HEAD_BIAS:
        row_bias = const_bias + load_head_bias(bias, gl.minimum(head, kv_head * group + group - 1), stride_bias_h)
    sync()
    if BANDED and not BIAS_ROWS:
        put_row_biases(
            biases, start, row_bias, per_score, q_len, kv_len, shift, left, right, VISIBLE, HAS_LEFT,
            HAS_RIGHT, False, False,
        )  # fmt: skip
        sync()
    mbarrier.arrive(slopes_full.index(0))

    # In each turn dV and dQ of the tile before, and all else of this one.
    # slopes and dS have two slots. Where dS is summed, which is without the soft cap's slope, that is in the second one
    # of slopes, and both are one tile's.
    stage = 0
    phase = 0
    slot = 0
    slot_phase = 0
    for _ in range(1, total):
        stage_before = stage
        phase_before = phase
        slot_before = slot
        slot_phase_before = slot_phase
        stage, phase = _next(stage, phase, STAGES)
        if STAGES == 2:
            slot = stage
            slot_phase = phase
        else:
            slot, slot_phase = _next(slot, slot_phase, 2)
        zero = unknown_zero()
        keys_now = k_tile.index(zero).reshape([_KEYS, WIDTH])
        keys_rest_now = k_tile_rest.index(zero).reshape([_KEYS, 64]) if Q_REST else 0
        if not BIAS_ROWS or SOFTCAP:
            s_start = start_of_scores(biases, of_scores, _KEYS, BY_ROW)
        mbarrier.wait(q_full.index(stage), phase)
        if BIAS_ROWS and not SOFTCAP:
            s_start = start_at_biases(biases.index(stage), scale, of_scores, _KEYS)
        rows = q_tiles.index(stage).reshape([_ROWS, WIDTH])
        rows_rest = q_tiles_rest.index(stage).reshape([_ROWS, 64]) if Q_REST else 0
        s_token = _start_product(keys_now, keys_rest_now, rows, rows_rest, s_start, BY_ROW, Q_REST)
        mbarrier.wait(do_full.index(stage_before), phase_before)
        grads_before = do_tiles.index(stage_before).reshape([_ROWS, V_WIDTH])
        dv_token = warpgroup_mma(p_operand, grads_before, dv_acc, is_async=True)
        if V_REST:
            grads_rest = do_tiles_rest.index(stage_before).reshape([_ROWS, 64])
            p_rest = gl.convert_layout(p_operand, as_rest)
            rest_token = warpgroup_mma(p_rest, grads_rest, dv_acc_rest, is_async=True)

        s = warpgroup_mma_wait(V_PRODUCTS, deps=[s_token])
        if SOFTCAP:
            p, slope = soft_capped_probabilities(
                s, scale, softcap, unit, row_bias, biases.index(stage) if BIAS_ROWS else biases, start, col0, key, row,
                shift, left, right, fast, BANDED, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, FORM, SLOW, 8,
            )  # fmt: skip
        else:
            p = probabilities(
                s, scale, row_bias * unit, start, col0, key, row, shift, left, right, fast,
                BY_ROW, HAS_LEFT, HAS_RIGHT, FORM, SLOW, 8,
            )  # fmt: skip
        p_next = gl.convert_layout((p * P_SCALE).to(dtype), as_operand)
        # The second warpgroup has read what lies there: this one has waited for dS of that tile.
        if SOFTCAP and SUMS:
            mbarrier.wait(ds_full.index(slot_before), slot_phase_before)  # now that of the tile before
            slopes.index(0).store(((p - p * p) * _SLOPE_SCALE).to(slopes.dtype))
            slopes.index(1).store(slope)
        elif SOFTCAP:
            slopes.index(slot).store(((p - p * p) * slope.to(gl.float32) * _SLOPE_SCALE).to(slopes.dtype))
        else:
            slopes.index(slot).store(((p - p * p) * _SLOPE_SCALE).to(slopes.dtype))
        tile_now = tile
        start, tile, head = next_tile(start, tile, head, begin, end, tiles - span)
        if GROUPED and HEAD_BIAS:
            row_bias = const_bias + load_head_bias(bias, gl.minimum(head, kv_head * group + group - 1), stride_bias_h)
        sync()
        mbarrier.arrive(slopes_full.index(slot))
        if V_REST:
            dv_acc, dv_acc_rest, p_operand, p_rest = warpgroup_mma_wait(
                0, deps=[dv_token, rest_token, p_operand, p_rest]
            )
        else:
            dv_acc, p_operand = warpgroup_mma_wait(0, deps=[dv_token, p_operand])
        p_operand = p_next
        if BANDED and not BIAS_ROWS:
            # All warps have read those of this tile. Another sync() comes before they read these.
            put_row_biases(
                biases, start, row_bias, per_score, q_len, kv_len, shift, left, right, VISIBLE, HAS_LEFT,
                HAS_RIGHT, False, False,
        )  # fmt: skip
        mbarrier.wait(ds_full.index(slot_before), slot_phase_before)
        # Both have read the output gradients of the tile before.
        sync()
        mbarrier.arrive(do_empty.index(stage_before))
        if not STORED:
            dq_token = warpgroup_mma(
                ds_tiles.index(slot_before).permute((1, 0)), keys_now.slice(0, COLUMNS, 1), no_rows,
                use_acc=False, is_async=True,
            )  # fmt: skip
            dq_tile = warpgroup_mma_wait(0, deps=[dq_token])
            add_tile(sums + tile_before.to(gl.int64) * TILE_SUMS, dq_tile, of_rows)
        tile_before = tile_now

    # What is left: dV and dQ of the last tile.
    mbarrier.wait(do_full.index(stage), phase)
    dv_token = warpgroup_mma(p_operand, do_tiles.index(stage).reshape([_ROWS, V_WIDTH]), dv_acc, is_async=True)
    dv_acc, p_operand = warpgroup_mma_wait(0, deps=[dv_token, p_operand])
    if V_REST:
        p_rest = gl.convert_layout(p_operand, as_rest)
        rest_token = warpgroup_mma(p_rest, do_tiles_rest.index(stage).reshape([_ROWS, 64]), dv_acc_rest, is_async=True)
        dv_acc_rest, p_rest = warpgroup_mma_wait(0, deps=[rest_token, p_rest])
    if STORED:
        sync()
        mbarrier.arrive(k_read)
    else:
        mbarrier.wait(ds_full.index(slot), slot_phase)
        dq_token = warpgroup_mma(
            ds_tiles.index(slot).permute((1, 0)), keys.slice(0, COLUMNS, 1), no_rows, use_acc=False, is_async=True
        )
        dq_tile = warpgroup_mma_wait(0, deps=[dq_token])
        sync()
        mbarrier.arrive(k_read)
        add_tile(sums + tile_before.to(gl.int64) * TILE_SUMS, dq_tile, of_rows)

    # dV goes out by way of where the values lay.
    mbarrier.wait(v_read, 0)
    v_tile.index(0).reshape([_KEYS, V_WIDTH]).store((dv_acc * (1.0 / P_SCALE)).to(dtype))
    if V_REST:
        v_tile_rest.index(0).reshape([_KEYS, 64]).store((dv_acc_rest * (1.0 / P_SCALE)).to(dtype))
    fence_async_shared()
    sync()
    store_tile(dv, [batch, kv_head, col0, 0], v_tile.index(0))
    if V_REST:
        store_tile(dv_rest, [batch, kv_head, col0, 128], v_tile_rest.index(0))
    tma.store_wait(0)


@gluon.jit
def _store_ds(
    ds_out, tile, head, start, q_len, col0, lines, line_tiles, to_first, HAS_LEFT: gl.constexpr
):  # fmt: skip
    """Where product_kernel() finds it; nowhere, if head is negative. to_first: from a row to the first key it sees."""
    if head >= 0:
        key_block = col0 // _KEYS
        if HAS_LEFT:
            key_block -= gl.maximum(start // _BLOCK * _BLOCK + to_first, 0) // _KEYS
        row = place_in_gluon(head, start // _BLOCK, gl.cdiv(q_len, _BLOCK), key_block, lines, line_tiles)
        store_tile(ds_out, [row, start % _BLOCK], tile)


@gluon.jit
def compute_keys(
    dk, dk_rest, ds_out, sums, parts, k_tile, v_tile, q_tiles, do_tiles,
    k_tile_rest, v_tile_rest, q_tiles_rest, do_tiles_rest, slopes, ds_tiles, ones, deltas,
    k_full, v_full, q_full, do_full, q_empty, slopes_full, ds_full, k_read, v_read,
    batch, kv_head, heads, group, col0, begin, span, blocks, q_len, kv_len, place, lines, line_tiles, to_first, scale,
    Q_REST: gl.constexpr, V_REST: gl.constexpr, SUMS: gl.constexpr, ROW_SUMS: gl.constexpr, GROUPED: gl.constexpr,
    DELTA: gl.constexpr, STORED: gl.constexpr, SOFTCAP: gl.constexpr, HAS_LEFT: gl.constexpr,
):  # fmt: skip
    """The second warpgroup: dS, dK, and the other columns of dQ, unless dS is STORED."""
    STAGES: gl.constexpr = q_tiles.shape[0]
    WIDTH: gl.constexpr = k_tile.shape[4]
    V_WIDTH: gl.constexpr = v_tile.shape[4]
    DIM: gl.constexpr = WIDTH + (64 if Q_REST else 0)
    BEFORE: gl.constexpr = 64 if DIM == 128 else 128
    COLUMNS: gl.constexpr = DIM - BEFORE
    V_PRODUCTS: gl.constexpr = 2 if V_REST else 1
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _ROWS, 16])
    of_keys: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    of_rest: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    of_rows: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    of_row_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    as_operand: gl.constexpr = gl.DotOperandLayout(0, of_keys, 2)
    as_rest: gl.constexpr = gl.DotOperandLayout(0, of_rest, 2)
    dtype: gl.constexpr = k_tile.dtype
    TILE_SUMS: gl.constexpr = _ROWS * (DIM + 1 if ROW_SUMS else DIM)
    ROW_SUMS_AT: gl.constexpr = _ROWS * COLUMNS

    no_scores = gl.zeros([_KEYS, _ROWS], gl.float32, of_scores)
    no_rows = gl.zeros([_ROWS, COLUMNS], gl.float32, of_rows)
    no_sums = gl.zeros([_ROWS, 8], gl.float32, of_row_sums)
    dk_acc = gl.zeros([_KEYS, WIDTH], gl.float32, of_keys)
    if Q_REST:
        dk_acc_rest = gl.zeros([_KEYS, 64], gl.float32, of_rest)

    end = begin + span * _ROWS
    total = group * span
    head = kv_head * group
    tiles = gl.cdiv(q_len, _ROWS)
    if not STORED:
        sums += BEFORE * _ROWS
    start = begin
    tile = (batch * heads + head) * tiles + begin // _ROWS

    # The first tile.
    mbarrier.wait(v_full, 0)
    values = v_tile.index(0).reshape([_KEYS, V_WIDTH])
    values_rest = v_tile_rest.index(0).reshape([_KEYS, 64]) if V_REST else 0
    mbarrier.wait(do_full.index(0), 0)
    grads = do_tiles.index(0).reshape([_ROWS, V_WIDTH])
    grads_rest = do_tiles_rest.index(0).reshape([_ROWS, 64]) if V_REST else 0
    dp_start = no_scores
    if DELTA:
        minus = minus_of_keys(col0 + gl.arange(0, _KEYS, gl.SliceLayout(1, of_scores)), kv_len)
        dp_start = start_at_delta(deltas.index(0), minus, of_scores)
    dp_token = _start_product(values, values_rest, grads, grads_rest, dp_start, DELTA, V_REST)
    dp = warpgroup_mma_wait(0, deps=[dp_token])
    mbarrier.wait(slopes_full.index(0), 0)
    ds = slopes.index(0).load(of_scores).to(gl.float32) * (1.0 / _SLOPE_SCALE) * dp
    ds_low = (ds * slopes.index(1).load(of_scores).to(gl.float32)).to(dtype) if SOFTCAP and SUMS else ds.to(dtype)
    ds_operand = gl.convert_layout(ds_low, as_operand)
    ds_tiles.index(0).store(ds_low)
    sum_of_ds = gl.zeros([128], gl.float32, BY_THREAD)
    if SUMS:
        sum_of_ds += gl.convert_layout(sum_per_thread(ds), BY_THREAD)
        if GROUPED:
            parts += gl.arange(0, 128, BY_THREAD)
            parts += ((batch * heads + head).to(gl.int64) * blocks + col0 // _KEYS) * 128
    tile_before = tile + 0
    start, tile, head_next = next_tile(start, tile, head, begin, end, tiles - span)
    if GROUPED and SUMS:
        parts, sum_of_ds = end_of_head(parts, sum_of_ds, head_next - head, blocks, 128)
    head = head_next
    fence_async_shared()
    sync()
    mbarrier.arrive(ds_full.index(0))
    place *= group
    if STORED:
        _store_ds(
            ds_out, ds_tiles.index(0), place, begin, q_len, col0, lines, line_tiles, to_first, HAS_LEFT
        )  # fmt: skip
        place += head - kv_head * group
    mbarrier.wait(k_full, 0)
    keys = k_tile.index(0).reshape([_KEYS, WIDTH])
    keys_rest = k_tile_rest.index(0).reshape([_KEYS, 64]) if Q_REST else 0
    columns = keys_rest if Q_REST else keys.slice(BEFORE, COLUMNS, 1)

    # In each turn dK and dQ of the tile before, and all else of this one.
    # slopes and dS have two slots.
    stage = 0
    phase = 0
    slot = 0
    slot_phase = 0
    for _ in range(1, total):
        stage_before = stage
        phase_before = phase
        slot_before = slot
        stage, phase = _next(stage, phase, STAGES)
        if STAGES == 2:
            slot = stage
            slot_phase = phase
        else:
            slot, slot_phase = _next(slot, slot_phase, 2)
        zero = unknown_zero()
        values_now = v_tile.index(zero).reshape([_KEYS, V_WIDTH])
        values_rest_now = v_tile_rest.index(zero).reshape([_KEYS, 64]) if V_REST else 0
        keys_now = k_tile.index(zero).reshape([_KEYS, WIDTH])
        columns_now = k_tile_rest.index(zero).reshape([_KEYS, 64]) if Q_REST else keys_now.slice(BEFORE, COLUMNS, 1)
        rows_before = q_tiles.index(stage_before).reshape([_ROWS, WIDTH])
        grads = do_tiles.index(stage).reshape([_ROWS, V_WIDTH])
        grads_rest = do_tiles_rest.index(stage).reshape([_ROWS, 64]) if V_REST else 0
        mbarrier.wait(q_full.index(stage_before), phase_before)
        dk_token = warpgroup_mma(ds_operand, rows_before, dk_acc, is_async=True)
        if Q_REST:
            rows_rest = q_tiles_rest.index(stage_before).reshape([_ROWS, 64])
            ds_rest = gl.convert_layout(ds_operand, as_rest)
            rest_token = warpgroup_mma(ds_rest, rows_rest, dk_acc_rest, is_async=True)
        mbarrier.wait(do_full.index(stage), phase)
        dp_start = no_scores
        if DELTA:
            dp_start = start_at_delta(deltas.index(stage), minus, of_scores)
        dp_token = _start_product(values_now, values_rest_now, grads, grads_rest, dp_start, DELTA, V_REST)
        if Q_REST:
            dk_acc, dk_acc_rest, ds_operand, ds_rest = warpgroup_mma_wait(
                V_PRODUCTS, deps=[dk_token, rest_token, ds_operand, ds_rest]
            )
        else:
            dk_acc, ds_operand = warpgroup_mma_wait(V_PRODUCTS, deps=[dk_token, ds_operand])
        # Read are the queries of the tile before, and dS of two tiles before, by the first warpgroup too: it has
        # put slopes in memory since.
        if STORED:
            tma.store_wait(1)
        sync()
        mbarrier.arrive(q_empty.index(stage_before))
        dp = warpgroup_mma_wait(0, deps=[dp_token])

        mbarrier.wait(slopes_full.index(slot), slot_phase)
        if SOFTCAP and SUMS:
            ds = slopes.index(0).load(of_scores).to(gl.float32) * (1.0 / _SLOPE_SCALE) * dp
            ds_low = (ds * slopes.index(1).load(of_scores).to(gl.float32)).to(dtype)
        else:
            ds = slopes.index(slot).load(of_scores).to(gl.float32) * (1.0 / _SLOPE_SCALE) * dp
            ds_low = ds.to(dtype)
        ds_next = gl.convert_layout(ds_low, as_operand)
        ds_tiles.index(slot).store(ds_low)
        if SUMS:
            sum_of_ds += gl.convert_layout(sum_per_thread(ds), BY_THREAD)
        tile_now = tile
        start_now = start
        start, tile, head_next = next_tile(start, tile, head, begin, end, tiles - span)
        if GROUPED and SUMS:
            parts, sum_of_ds = end_of_head(parts, sum_of_ds, head_next - head, blocks, 128)
        fence_async_shared()
        sync()
        mbarrier.arrive(ds_full.index(slot))
        if STORED:
            _store_ds(
                ds_out, ds_tiles.index(slot), place, start_now, q_len, col0, lines, line_tiles, to_first, HAS_LEFT
            )  # fmt: skip
            place += head_next - head
        head = head_next
        ds_operand = ds_next
        if not STORED:
            dq_token = warpgroup_mma(
                ds_tiles.index(slot_before).permute((1, 0)), columns_now, no_rows, use_acc=False, is_async=True
            )
            sums_before = sums + tile_before.to(gl.int64) * TILE_SUMS
            if ROW_SUMS:
                row_token = start_row_sums(ds_tiles.index(slot_before), ones.index(zero), no_sums)
                dq_tile, row_sums = warpgroup_mma_wait(0, deps=[dq_token, row_token])
                add_row_sums(sums_before + ROW_SUMS_AT, row_sums, of_row_sums)
            else:
                dq_tile = warpgroup_mma_wait(0, deps=[dq_token])
            add_tile(sums_before, dq_tile, of_rows)
        tile_before = tile_now

    # What is left: dK and dQ of the last tile.
    mbarrier.arrive(v_read)
    mbarrier.wait(q_full.index(stage), phase)
    dk_token = warpgroup_mma(ds_operand, q_tiles.index(stage).reshape([_ROWS, WIDTH]), dk_acc, is_async=True)
    dk_acc, ds_operand = warpgroup_mma_wait(0, deps=[dk_token, ds_operand])
    if Q_REST:
        ds_rest = gl.convert_layout(ds_operand, as_rest)
        rest_token = warpgroup_mma(ds_rest, q_tiles_rest.index(stage).reshape([_ROWS, 64]), dk_acc_rest, is_async=True)
        dk_acc_rest, ds_rest = warpgroup_mma_wait(0, deps=[rest_token, ds_rest])
    if not STORED:
        dq_token = warpgroup_mma(ds_tiles.index(slot).permute((1, 0)), columns, no_rows, use_acc=False, is_async=True)
        dq_tile = warpgroup_mma_wait(0, deps=[dq_token])
        sums += tile_before.to(gl.int64) * TILE_SUMS
        add_tile(sums, dq_tile, of_rows)
        if ROW_SUMS:
            row_sums = warpgroup_mma_wait(0, deps=[start_row_sums(ds_tiles.index(slot), ones.index(0), no_sums)])
            add_row_sums(sums + ROW_SUMS_AT, row_sums, of_row_sums)

    if SUMS and not GROUPED:
        place = ((batch * heads + kv_head).to(gl.int64) * blocks + col0 // _KEYS) * 128 + unknown_zero()
        gl.store(parts + place + gl.arange(0, 128, BY_THREAD), sum_of_ds)
    # dK goes out by way of where the keys lay.
    mbarrier.wait(k_read, 0)
    sync()
    k_tile.index(0).reshape([_KEYS, WIDTH]).store((dk_acc * scale).to(dtype))
    if Q_REST:
        k_tile_rest.index(0).reshape([_KEYS, 64]).store((dk_acc_rest * scale).to(dtype))
    fence_async_shared()
    sync()
    store_tile(dk, [batch, kv_head, col0, 0], k_tile.index(0))
    if Q_REST:
        store_tile(dk_rest, [batch, kv_head, col0, 128], k_tile_rest.index(0))
    tma.store_wait(0)
