"""What the warps of a program of :mod:`sigswap.kernels.hopper.backward` do: one loads, two groups compute, and a third
one may add up dQ. A tile of scores is [keys, rows]."""

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
    add_sums_of_rows,
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
from sigswap.kernels.hopper.common import (
    as_operands,
    cut,
    load_tile,
    start_by_columns,
    start_over_columns,
    sync,
)
from sigswap.kernels.hopper.packed import load_rows, lowest_of_tiles, store_rows
from sigswap.kernels.triton.common import _AUTO, _FAST_BIAS, _LOG2E

KEYS, STAGES = 128, 3
"""The keys of a program; tiles of rows in flight."""

_KEYS, _STAGES = tl.constexpr(KEYS), tl.constexpr(STAGES)


@gluon.jit
def load(
    shared, packed, bias, biases, stride_bias_b, stride_bias_h, delta, deltas, heads,
    BIAS_ROWS: gl.constexpr, DELTA: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """One warp: all that the others compute with."""
    (
        q, k, v, do, k_tile, v_tile, q_tiles, do_tiles, kv_full, full, empty, batch, kv_head, group, col0, begin, span,
    ) = shared  # fmt: skip
    if PACKED:
        k_batch, rows, keys, first_tile = packed
        first_row = first_tile * _ROWS
        number_batch = 0
    else:
        k_batch = batch
        rows = 0
        keys = 0
        first_row = 0
        number_batch = batch
    mbarrier.expect(kv_full, k.block_type.nbytes + v.block_type.nbytes)
    load_rows(k, k_batch, kv_head, col0, 0, keys, kv_full, k_tile.index(0), PACKED)
    load_rows(v, k_batch, kv_head, col0, 0, keys, kv_full, v_tile.index(0), PACKED)
    stage = 0
    phase = 1
    head = kv_head * group
    start = begin
    for _ in range(group * span):
        mbarrier.wait(empty.index(stage), phase)
        # A tile of numbers of rows is 4 bytes each.
        numbers: gl.constexpr = 4 * _ROWS * (BIAS_ROWS + DELTA)
        mbarrier.expect(full.index(stage), q.block_type.nbytes + do.block_type.nbytes + numbers)
        if BIAS_ROWS:
            place = number_batch * stride_bias_b + head * stride_bias_h
            load_tile(bias, [place, first_row + start], full.index(stage), biases.index(stage))
        if DELTA:
            place = number_batch * heads + head
            load_tile(delta, [place, first_row + start], full.index(stage), deltas.index(stage))
        load_rows(q, batch, head, start, 0, rows, full.index(stage), q_tiles.index(stage), PACKED)
        load_rows(do, batch, head, start, 0, rows, full.index(stage), do_tiles.index(stage), PACKED)
        stage += 1
        start += _ROWS
        if stage == _STAGES:
            stage = 0
            phase ^= 1
        if start >= begin + span * _ROWS:
            head += 1
            start = begin


@gluon.jit
def _rounded(x, factor: gl.constexpr, dtype: gl.constexpr, DIM: gl.constexpr):
    """x times a factor, in half precision. Triton's conversion of pairs leaves their halves to be swapped. At 128
    columns own assembly was no faster: there are too few registers."""
    if dtype == gl.bfloat16 and DIM < 128:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x * factor], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return (x * factor).to(dtype)


@gluon.jit
def _zeros(HEIGHT: gl.constexpr, FIRST: gl.constexpr, of_first: gl.constexpr, of_rest: gl.constexpr, CUT: gl.constexpr):
    first = gl.zeros([HEIGHT, FIRST], gl.float32, of_first)
    if CUT:
        return first, gl.zeros([HEIGHT, 32], gl.float32, of_rest)
    else:
        return (first,)


@gluon.jit
def _put(target, sums, factor, CUT: gl.constexpr):
    pieces = cut(target, CUT)
    for j in gl.static_range(len(sums)):
        pieces[j].store((sums[j] * factor).to(target.dtype))


@gluon.jit
def add_queries(
    sums, k_tile, ds_tiles, ones, kv_full, ds_full, ds_empty, keys_read,
    batch, kv_head, heads, group, begin, span, q_len, packed, DIM: gl.constexpr, ROW_SUMS: gl.constexpr,
    PACKED: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """A warpgroup: dS times all keys, which is added to dQ in memory, and, without a soft cap, sums of rows of dS."""
    ROW_PRODUCT: gl.constexpr = ROW_SUMS and not SOFTCAP
    of_rows: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    of_row_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    no_rows = gl.zeros([_ROWS, DIM], gl.float32, of_rows)
    no_sums = gl.zeros([_ROWS, 8], gl.float32, of_row_sums)
    keys = k_tile.index(0).reshape([_KEYS, DIM])
    end = begin + span * _ROWS
    start = begin
    head = kv_head * group
    if PACKED:
        first_tile, tiles = packed
        tile = head * tiles + first_tile + begin // _ROWS
    else:
        tiles = gl.cdiv(q_len, _ROWS)
        tile = (batch * heads + head) * tiles + begin // _ROWS
    slot = 0
    phase = 0
    mbarrier.wait(kv_full, 0)
    for _ in range(group * span):
        mbarrier.wait(ds_full.index(slot), phase)
        ds = ds_tiles.index(slot)
        place = sums + tile.to(gl.int64) * (_ROWS * (DIM + 1 if ROW_SUMS else DIM))
        token = warpgroup_mma(ds.permute((1, 0)), keys, no_rows, use_acc=False, is_async=True)
        if ROW_PRODUCT:
            row_token = start_row_sums(ds, ones.index(0), no_sums)
            dq, row_sums = warpgroup_mma_wait(0, deps=[token, row_token])
        else:
            dq = warpgroup_mma_wait(0, deps=[token])
        sync()
        mbarrier.arrive(ds_empty.index(slot))
        add_tile(place, dq, of_rows)
        if ROW_PRODUCT:
            add_row_sums(place + _ROWS * DIM, row_sums, of_row_sums)
        start, tile, head = next_tile(start, tile, head, begin, end, tiles - span)
        slot ^= 1
        if slot == 0:
            phase ^= 1
    mbarrier.arrive(keys_read)


@gluon.jit
def compute(
    shared, packed, bias, parts, floor, biases, deltas, ones,
    PART: gl.constexpr, DIM: gl.constexpr, APART: gl.constexpr, VISIBLE: gl.constexpr, BANDED: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, BIAS_ROWS: gl.constexpr, SUMS: gl.constexpr,
    ROW_SUMS: gl.constexpr, GROUPED: gl.constexpr, DELTA: gl.constexpr, PACKED: gl.constexpr, P_SCALE: gl.constexpr,
    FORM: gl.constexpr, SLOW: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """One of the two warpgroups: dK and dV of its half of the keys, and, unless dQ is left to add_queries(), APART, its
    part of the columns of dQ."""
    (
        dk, dv, sums, k_tile, v_tile, q_tiles, do_tiles, ds_tiles, kv_full, full, empty, ds_full, ds_empty, keys_read,
        batch, kv_head, heads, group, col0, begin, span, blocks, q_len, kv_len, shift, left, right,
        stride_bias_b, stride_bias_h, scale, const_bias, fast, softcap,
    ) = shared  # fmt: skip
    HALF: gl.constexpr = _KEYS // 2
    WIDTH: gl.constexpr = k_tile.shape[-1]
    CUT: gl.constexpr = DIM == 96
    FIRST: gl.constexpr = 64 if CUT else DIM
    FIRST_COLUMNS: gl.constexpr = 64 if CUT else DIM // 2
    COLUMNS: gl.constexpr = DIM - FIRST_COLUMNS if PART == 1 else FIRST_COLUMNS
    # Products in flight that the product of two tiles is made of.
    PIECES: gl.constexpr = 2 if CUT else 1
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _ROWS, 16])
    of_keys: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FIRST, 16])
    of_rest: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    of_rows: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    of_row_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    dtype: gl.constexpr = k_tile.dtype
    # Scores start from the biases of rows, which with a soft cap are added to its result, in the sigmoid's unit.
    BY_ROW: gl.constexpr = (BANDED or BIAS_ROWS) and not SOFTCAP
    PUTS_BIASES: gl.constexpr = BANDED and not BIAS_ROWS
    # Neither p nor the soft cap's slope is kept until dP is known, unless dS is summed, which is without that slope.
    SLOPE_FIRST: gl.constexpr = SOFTCAP and not SUMS and not ROW_SUMS
    SLOPE_LAST: gl.constexpr = SOFTCAP and (SUMS or ROW_SUMS)
    ROW_PRODUCT: gl.constexpr = ROW_SUMS and not SOFTCAP
    HEAD_BIAS: gl.constexpr = bias is not None and not BIAS_ROWS
    # Of the sums of dQ and, behind it, of dS: a tile's numbers, and where those of dS begin, for this half.
    TILE_SUMS: gl.constexpr = _ROWS * (DIM + 1 if ROW_SUMS else DIM)
    ROW_SUMS_AT: gl.constexpr = _ROWS * (DIM - PART * FIRST_COLUMNS)

    col0 += PART * HALF
    key = gl.arange(0, HALF, gl.SliceLayout(1, of_scores))
    row = gl.arange(0, _ROWS, gl.SliceLayout(0, of_scores))
    no_scores = gl.zeros([HALF, _ROWS], gl.float32, of_scores)
    no_rows = gl.zeros([_ROWS, COLUMNS], gl.float32, of_rows)
    keys = k_tile.index(0).reshape([_KEYS, WIDTH])
    values = v_tile.index(0).reshape([_KEYS, WIDTH])
    if not BIAS_ROWS:
        biases = biases.index(PART)
    no_sums = gl.zeros([_ROWS, 8], gl.float32, of_row_sums)
    dk_acc = _zeros(HALF, FIRST, of_keys, of_rest, CUT)
    dv_acc = _zeros(HALF, FIRST, of_keys, of_rest, CUT)

    # Where a tile is: its first row, and its place among the sums of dQ, of which tiles follow one another by heads.
    end = begin + span * _ROWS
    total = group * span
    head = kv_head * group
    sums += PART * _ROWS * FIRST_COLUMNS
    start = begin
    if PACKED:
        k_batch, stored_keys, block, first_tile, tiles = packed
        tile = head * tiles + first_tile + begin // _ROWS
    else:
        k_batch = batch
        stored_keys = 0
        block = col0 // _KEYS
        tiles = gl.cdiv(q_len, _ROWS)
        tile = (batch * heads + head) * tiles + begin // _ROWS
    # Not the same number to Triton, which takes names of one number for one variable.
    tile_before = tile + 0
    row_bias = const_bias + 0.0
    if HEAD_BIAS:
        bias += batch.to(gl.int64) * stride_bias_b
        row_bias += load_head_bias(bias, head, stride_bias_h)
    if BIAS_ROWS and FORM == _AUTO:
        if PACKED:
            last_tile = gl.cdiv(gl.minimum(end, q_len), _ROWS)
            lowest = lowest_of_tiles(
                floor + first_tile, head * (stride_bias_h * tiles), group, stride_bias_h * tiles, begin // _ROWS,
                last_tile, BY_THREAD,
            )  # fmt: skip
            fast = lowest >= _FAST_BIAS
        else:
            place = batch * stride_bias_b + head * stride_bias_h
            fast = lowest_bias(floor, place, group, stride_bias_h, begin, end, q_len) >= _FAST_BIAS
    per_score = 1.0 / gl.where(fast, 0.5, _LOG2E) if SOFTCAP else scale
    if PUTS_BIASES:
        put_row_biases(
            biases, start, row_bias, per_score, q_len, kv_len, shift, left, right, VISIBLE, HAS_LEFT,
            HAS_RIGHT, APART,
        )  # fmt: skip
    elif VISIBLE:
        const_bias -= gl.log(gl.maximum(kv_len, 1).to(gl.float32))
        row_bias -= gl.log(gl.maximum(kv_len, 1).to(gl.float32))
    unit = gl.where(fast, 0.5, _LOG2E)
    # Where dS of the first tile goes.
    AT: gl.constexpr = 0 if APART else 1
    if APART:
        sync()
    else:
        # dS of a tile before the first: zeros.
        ds_tiles.index(0).slice(PART * HALF, HALF, 0).store(no_scores.to(dtype))
        fence_async_shared()
        sync()
        mbarrier.arrive(ds_full.index(0))

    # The first tile.
    mbarrier.wait(kv_full, 0)
    mbarrier.wait(full.index(0), 0)
    rows = cut(q_tiles.index(0).reshape([_ROWS, WIDTH]), CUT)
    grads = cut(do_tiles.index(0).reshape([_ROWS, WIDTH]), CUT)
    if BIAS_ROWS and not SOFTCAP:
        s_start = start_at_biases(biases.index(0), scale, of_scores, HALF)
    else:
        s_start = start_of_scores(biases, of_scores, HALF, BY_ROW)
    s_token = start_over_columns(cut(keys.slice(PART * HALF, HALF, 0), CUT), rows, s_start, BY_ROW)
    dp_start = no_scores
    if DELTA:
        minus = minus_of_keys(col0 + key, kv_len)
        dp_start = start_at_delta(deltas.index(0), minus, of_scores)
    dp_token = start_over_columns(cut(values.slice(PART * HALF, HALF, 0), CUT), grads, dp_start, DELTA)
    s = warpgroup_mma_wait(PIECES, deps=[s_token])
    if SOFTCAP:
        p, slope = soft_capped_probabilities(
            s, scale, softcap, unit, row_bias, biases.index(0) if BIAS_ROWS else biases, start, col0, key, row,
            shift, left, right, fast, BANDED, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, FORM, SLOW, not APART,
        )  # fmt: skip
    else:
        p = probabilities(
            s, scale, row_bias * unit, start, col0, key, row, shift, left, right, fast,
            BY_ROW, HAS_LEFT, HAS_RIGHT, FORM, SLOW, not APART,
        )  # fmt: skip
    p_operands = as_operands(_rounded(p, P_SCALE, dtype, DIM), of_keys, of_rest, CUT)
    if SLOPE_FIRST:
        slope = (p - p * p) * slope.to(gl.float32)
    dv_tokens = start_by_columns(p_operands, grads, dv_acc, CUT)
    dp = warpgroup_mma_wait(PIECES, deps=[dp_token])
    ds = slope * dp if SLOPE_FIRST else (p - p * p) * dp
    if ROW_SUMS and SOFTCAP:
        add_sums_of_rows(sums + tile.to(gl.int64) * TILE_SUMS + ROW_SUMS_AT, ds)
    ds_low = _rounded(ds * slope.to(gl.float32) if SLOPE_LAST else ds, 1.0, dtype, DIM)
    ds_operands = as_operands(ds_low, of_keys, of_rest, CUT)
    ds_tiles.index(AT).slice(PART * HALF, HALF, 0).store(ds_low)
    sum_of_ds = gl.zeros([128], gl.float32, BY_THREAD)
    if SUMS:
        sum_of_ds += gl.convert_layout(sum_per_thread(ds), BY_THREAD)
        parts += PART * 128 + gl.arange(0, 128, BY_THREAD)
        if PACKED:
            parts += (head.to(gl.int64) * blocks + block) * 256
        else:
            parts += ((batch * heads + head).to(gl.int64) * blocks + block) * 256
    results = warpgroup_mma_wait(0, deps=dv_tokens + p_operands)
    dv_acc = results[:PIECES]
    start_next, tile_next, head_next = next_tile(start, tile, head, begin, end, tiles - span)
    if GROUPED and SUMS:
        parts, sum_of_ds = end_of_head(parts, sum_of_ds, head_next - head, blocks, 256)
    if GROUPED and HEAD_BIAS:
        last_head = kv_head * group + group - 1
        row_bias = const_bias + load_head_bias(bias, gl.minimum(head_next, last_head), stride_bias_h)
    if PUTS_BIASES and not SOFTCAP:
        put_row_biases(
            biases, start_next, row_bias, scale, q_len, kv_len, shift, left, right, VISIBLE, HAS_LEFT,
            HAS_RIGHT, APART,
        )  # fmt: skip
    fence_async_shared()
    sync()
    mbarrier.arrive(ds_full.index(AT))
    if PUTS_BIASES and SOFTCAP:
        # All warps have read those of this tile. Another sync() comes before they read these.
        put_row_biases(
            biases, start_next, row_bias, per_score, q_len, kv_len, shift, left, right, VISIBLE, HAS_LEFT,
            HAS_RIGHT, APART,
        )  # fmt: skip

    # In each turn dK of the tile before, dQ of the one before that, and all else of this one.
    stage = 0
    phase = 0
    # Of dS: that which is read; if APART that which is written.
    slot = 1 - AT
    slot_phase = 1 - AT
    for _ in range(1, total):
        rows_before = cut(q_tiles.index(stage).reshape([_ROWS, WIDTH]), CUT)
        stage_before = stage
        phase_before = phase
        stage += 1
        if stage == _STAGES:
            stage = 0
            phase ^= 1
        tile_now = tile
        start = start_next
        tile = tile_next
        head = head_next
        zero = unknown_zero()
        keys_now = k_tile.index(zero).reshape([_KEYS, WIDTH])
        values_now = v_tile.index(zero).reshape([_KEYS, WIDTH])

        if not APART:
            mbarrier.wait(ds_full.index(slot), slot_phase)
        dk_tokens = start_by_columns(ds_operands, rows_before, dk_acc, CUT)
        if not APART:
            dq_token = warpgroup_mma(
                ds_tiles.index(slot).permute((1, 0)), keys_now.slice(PART * FIRST_COLUMNS, COLUMNS, 1), no_rows,
                use_acc=False, is_async=True,
            )  # fmt: skip
        if ROW_PRODUCT and not APART:
            own = ds_tiles.index(slot).slice(PART * HALF, HALF, 0)
            row_token = start_row_sums(own, ones.index(zero), no_sums)
        if not BIAS_ROWS or SOFTCAP:
            s_start = start_of_scores(biases, of_scores, HALF, BY_ROW)
        mbarrier.wait(full.index(stage), phase)
        if BIAS_ROWS and not SOFTCAP:
            s_start = start_at_biases(biases.index(stage), scale, of_scores, HALF)
        rows = cut(q_tiles.index(stage).reshape([_ROWS, WIDTH]), CUT)
        grads = cut(do_tiles.index(stage).reshape([_ROWS, WIDTH]), CUT)
        own_values = cut(values_now.slice(PART * HALF, HALF, 0), CUT)
        s_token = start_over_columns(cut(keys_now.slice(PART * HALF, HALF, 0), CUT), rows, s_start, BY_ROW)
        dp_start = no_scores
        if APART:
            if DELTA:
                dp_start = start_at_delta(deltas.index(stage), minus, of_scores)
            dp_token = start_over_columns(own_values, grads, dp_start, DELTA)
            results = warpgroup_mma_wait(2 * PIECES, deps=dk_tokens + ds_operands)
            dk_acc = results[:PIECES]
            sync()
            mbarrier.arrive(empty.index(stage_before))
        else:
            awaited = dk_tokens + ds_operands
            awaited += (dq_token,)
            if ROW_PRODUCT:
                awaited += (row_token,)
            results = warpgroup_mma_wait(PIECES, deps=awaited)
            dk_acc = results[:PIECES]
            sums_before = sums + tile_before.to(gl.int64) * TILE_SUMS
            if ROW_PRODUCT:
                add_row_sums(sums_before + ROW_SUMS_AT, results[2 * PIECES + 1], of_row_sums)
            add_tile(sums_before, results[2 * PIECES], of_rows)
            # The rows of the tile before and dS of the one before that are read.
            sync()
            mbarrier.arrive(empty.index(stage_before))
            tile_before = tile_now
            slot ^= 1
            if slot == 0:
                slot_phase ^= 1
            if DELTA:
                dp_start = start_at_delta(deltas.index(stage), minus, of_scores)
            dp_token = start_over_columns(own_values, grads, dp_start, DELTA)

        s = warpgroup_mma_wait(PIECES, deps=[s_token])
        if SOFTCAP:
            p, slope = soft_capped_probabilities(
                s, scale, softcap, unit, row_bias, biases.index(stage) if BIAS_ROWS else biases, start, col0, key, row,
                shift, left, right, fast, BANDED, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, FORM, SLOW, not APART,
            )  # fmt: skip
        else:
            p = probabilities(
                s, scale, row_bias * unit, start, col0, key, row, shift, left, right, fast,
                BY_ROW, HAS_LEFT, HAS_RIGHT, FORM, SLOW, not APART,
            )  # fmt: skip
        p_operands = as_operands(_rounded(p, P_SCALE, dtype, DIM), of_keys, of_rest, CUT)
        if SLOPE_FIRST:
            slope = (p - p * p) * slope.to(gl.float32)
        dv_tokens = start_by_columns(p_operands, grads, dv_acc, CUT)
        dp = warpgroup_mma_wait(PIECES, deps=[dp_token])
        ds = slope * dp if SLOPE_FIRST else (p - p * p) * dp
        if ROW_SUMS and SOFTCAP:
            add_sums_of_rows(sums + tile.to(gl.int64) * TILE_SUMS + ROW_SUMS_AT, ds)
        ds_low = _rounded(ds * slope.to(gl.float32) if SLOPE_LAST else ds, 1.0, dtype, DIM)
        ds_operands = as_operands(ds_low, of_keys, of_rest, CUT)
        # The other warpgroup has read what lies there: dS of two tiles before.
        if APART:
            mbarrier.wait(ds_empty.index(slot), slot_phase)
            written = slot
        else:
            mbarrier.wait(empty.index(stage_before), phase_before)
            written = slot ^ 1
        ds_tiles.index(written).slice(PART * HALF, HALF, 0).store(ds_low)
        if SUMS:
            sum_of_ds += gl.convert_layout(sum_per_thread(ds), BY_THREAD)
        start_next, tile_next, head_next = next_tile(start, tile, head, begin, end, tiles - span)
        if GROUPED and SUMS:
            parts, sum_of_ds = end_of_head(parts, sum_of_ds, head_next - head, blocks, 256)
        if GROUPED and HEAD_BIAS:
            row_bias = const_bias + load_head_bias(
                bias, gl.minimum(head_next, kv_head * group + group - 1), stride_bias_h
            )
        if PUTS_BIASES and not SOFTCAP:
            put_row_biases(
                biases, start_next, row_bias, scale, q_len, kv_len, shift, left, right, VISIBLE, HAS_LEFT,
                HAS_RIGHT, APART,
            )  # fmt: skip
        fence_async_shared()
        sync()
        mbarrier.arrive(ds_full.index(written))
        if PUTS_BIASES and SOFTCAP:
            # All warps have read those of this tile. Another sync() comes before they read these.
            put_row_biases(
                biases, start_next, row_bias, per_score, q_len, kv_len, shift, left, right, VISIBLE, HAS_LEFT,
                HAS_RIGHT, APART,
            )  # fmt: skip
        if APART:
            slot ^= 1
            if slot == 0:
                slot_phase ^= 1
        results = warpgroup_mma_wait(0, deps=dv_tokens + p_operands)
        dv_acc = results[:PIECES]

    # What is left: dK of the last tile, dQ of the last two.
    rows_before = cut(q_tiles.index(stage).reshape([_ROWS, WIDTH]), CUT)
    if APART:
        dk_tokens = start_by_columns(ds_operands, rows_before, dk_acc, CUT)
        results = warpgroup_mma_wait(0, deps=dk_tokens + ds_operands)
        dk_acc = results[:PIECES]
        sync()
    else:
        mbarrier.wait(ds_full.index(slot), slot_phase)
        dk_tokens = start_by_columns(ds_operands, rows_before, dk_acc, CUT)
        columns = keys.slice(PART * FIRST_COLUMNS, COLUMNS, 1)
        dq_token = warpgroup_mma(ds_tiles.index(slot).permute((1, 0)), columns, no_rows, use_acc=False, is_async=True)
        awaited = dk_tokens + ds_operands
        awaited += (dq_token,)
        results = warpgroup_mma_wait(0, deps=awaited)
        dk_acc = results[:PIECES]
        sums_before = sums + tile_before.to(gl.int64) * TILE_SUMS
        add_tile(sums_before, results[2 * PIECES], of_rows)
        if ROW_PRODUCT:
            own = ds_tiles.index(slot).slice(PART * HALF, HALF, 0)
            row_sums = warpgroup_mma_wait(0, deps=[start_row_sums(own, ones.index(0), no_sums)])
            add_row_sums(sums_before + ROW_SUMS_AT, row_sums, of_row_sums)
        slot ^= 1
        if slot == 0:
            slot_phase ^= 1
        mbarrier.wait(ds_full.index(slot), slot_phase)
        dq_token = warpgroup_mma(ds_tiles.index(slot).permute((1, 0)), columns, no_rows, use_acc=False, is_async=True)
        dq_tile = warpgroup_mma_wait(0, deps=[dq_token])
        sums += tile.to(gl.int64) * TILE_SUMS
        add_tile(sums, dq_tile, of_rows)
        if ROW_PRODUCT:
            own = ds_tiles.index(slot).slice(PART * HALF, HALF, 0)
            row_sums = warpgroup_mma_wait(0, deps=[start_row_sums(own, ones.index(0), no_sums)])
            add_row_sums(sums + ROW_SUMS_AT, row_sums, of_row_sums)
        # Both warpgroups read all the keys.
        sync()
        mbarrier.arrive(keys_read)

    # The results go out by way of where keys and values lay.
    _put(values.slice(PART * HALF, HALF, 0), dv_acc, 1.0 / P_SCALE, CUT)
    mbarrier.wait(keys_read, 0)
    _put(keys.slice(PART * HALF, HALF, 0), dk_acc, scale, CUT)
    fence_async_shared()
    sync()
    ROWS_AT: gl.constexpr = 3 if PACKED else 2
    own_dk = k_tile.index(0).slice(PART * HALF, HALF, ROWS_AT)
    own_dv = v_tile.index(0).slice(PART * HALF, HALF, ROWS_AT)
    store_rows(dk, k_batch, kv_head, col0, 0, stored_keys, own_dk, PACKED)
    store_rows(dv, k_batch, kv_head, col0, 0, stored_keys, own_dv, PACKED)
    if SUMS and not GROUPED:
        gl.store(parts, sum_of_ds)
    tma.store_wait(0)
