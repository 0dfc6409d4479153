"""What the two warpgroups of a program of :mod:`sigswap.kernels.hopper.backward` do that compute. A tile of scores is
[keys, rows].

What does not change from one item to the next would be kept in registers, of which there are none left: so addresses
are worked out anew (unknown_zero), and an item's place is read again where it is needed."""

from __future__ import annotations

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
    lowest_of_heads,
    minus_of_keys,
    next_tile,
    probabilities,
    put_row_biases,
    soft_capped_probabilities,
    start_at_biases,
    start_at_delta,
    start_by_biases,
    start_of_scores,
    start_row_sums,
    sum_per_thread,
    unknown_zero,
)
from sigswap.kernels.hopper.backward_items import _KEYS, _STAGES, number_of
from sigswap.kernels.hopper.common import (
    as_operands,
    cut,
    start_by_columns,
    start_over_columns,
    sync,
)
from sigswap.kernels.hopper.packed import lowest_of_tiles, store_rows
from sigswap.kernels.triton.common import _AUTO, _FAST, _FAST_BIAS, _LOG2E


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
def _next_stage(stage):
    return gl.where(stage == _STAGES - 1, 0, stage + 1)


@gluon.jit
def compute(
    shared, bias, parts, floor, biases, deltas, ones,
    PART: gl.constexpr, DIM: gl.constexpr, APART: gl.constexpr, VISIBLE: gl.constexpr, BANDED: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, BOTTOM_RIGHT: gl.constexpr, BIAS_ROWS: gl.constexpr,
    SUMS: gl.constexpr, ROW_SUMS: gl.constexpr, GROUPED: gl.constexpr, DELTA: gl.constexpr, PACKED: gl.constexpr,
    P_SCALE: gl.constexpr, FORM: gl.constexpr, SLOW: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """One of the two warpgroups: dK and dV of its half of the keys, and, unless dQ is left to add_queries(), APART, its
    part of the columns of dQ."""
    (
        dk, dv, sums, k_tiles, v_tiles, q_tiles, do_tiles, ds_tiles, places, k_full, v_full, kv_empty, full,
        empty, ds_full, ds_empty, keys_read, heads, group, blocks, all_tiles, q_len, kv_len, left, right,
        stride_bias_b, stride_bias_h, scale, const_bias, softcap,
    ) = shared  # fmt: skip
    HALF: gl.constexpr = _KEYS // 2
    WIDTH: gl.constexpr = k_tiles.shape[-1]
    BUFFERS: gl.constexpr = k_tiles.shape[0]
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
    dtype: gl.constexpr = k_tiles.dtype
    # Scores start from the biases of rows, which with a soft cap are added to its result, in the sigmoid's unit.
    BY_ROW: gl.constexpr = (BANDED or BIAS_ROWS) and not SOFTCAP
    PUTS_BIASES: gl.constexpr = BANDED and not BIAS_ROWS
    # They start as a product, not as numbers that are read and copied to all keys, which took a tenth of the time.
    BIAS_PRODUCT: gl.constexpr = PUTS_BIASES and biases.dtype == gl.bfloat16
    # dS is handed over when the next tile's products have started: no one waits until it is in shared memory.
    LATE: gl.constexpr = APART and (not PUTS_BIASES or BIAS_PRODUCT)
    # Values stay in registers: products read one operand less from shared memory.
    HELD: gl.constexpr = APART and not SOFTCAP
    # Scores whose sigmoids are worked out together.
    AT_ONCE: gl.constexpr = 32 if APART else 8 if BANDED else 1
    # Neither p nor the soft cap's slope is kept until dP is known, unless dS is summed, which is without that slope.
    SLOPE_FIRST: gl.constexpr = SOFTCAP and not SUMS and not ROW_SUMS
    SLOPE_LAST: gl.constexpr = SOFTCAP and (SUMS or ROW_SUMS)
    ROW_PRODUCT: gl.constexpr = ROW_SUMS and not SOFTCAP
    HEAD_BIAS: gl.constexpr = bias is not None and not BIAS_ROWS
    # Of the sums of dQ and, behind it, of dS: a tile's numbers, and where those of dS begin, for this half.
    TILE_SUMS: gl.constexpr = _ROWS * (DIM + 1 if ROW_SUMS else DIM)
    ROW_SUMS_AT: gl.constexpr = _ROWS * (DIM - PART * FIRST_COLUMNS)

    key = gl.arange(0, HALF, gl.SliceLayout(1, of_scores))
    row = gl.arange(0, _ROWS, gl.SliceLayout(0, of_scores))
    no_scores = gl.zeros([HALF, _ROWS], gl.float32, of_scores)
    no_rows = gl.zeros([_ROWS, COLUMNS], gl.float32, of_rows)
    no_sums = gl.zeros([_ROWS, 8], gl.float32, of_row_sums)
    if not BIAS_ROWS and not BIAS_PRODUCT:
        biases = biases.index(PART)
    sums += PART * _ROWS * FIRST_COLUMNS
    if SUMS:
        parts += PART * 128 + gl.arange(0, 128, BY_THREAD)

    buffer = 0
    kv_phase = 0
    # Of queries and output gradients.
    stage = 0
    phase = 0
    # Of dS: that which is read; if APART that which is written.
    slot = 0
    slot_phase = 1 if APART else 0
    mbarrier.wait(k_full.index(0), 0)
    span = number_of(places, 0, 1)
    while span > 0:
        dk_acc = _zeros(HALF, FIRST, of_keys, of_rest, CUT)
        dv_acc = _zeros(HALF, FIRST, of_keys, of_rest, CUT)

        # Where a tile is: its first row, and its place among the sums of dQ, of which tiles follow one another by
        # heads.
        begin = number_of(places, buffer, 0)
        end = begin + span * _ROWS
        total = group * span
        kv_head = number_of(places, buffer, 2)
        head = kv_head * group
        col0 = number_of(places, buffer, 3) + PART * HALF
        batch = number_of(places, buffer, 4)
        start = begin + 0
        tile = number_of(places, buffer, 5) + begin // _ROWS
        rows_len = q_len
        keys_len = kv_len
        shift = kv_len - q_len if BOTTOM_RIGHT else 0
        if PACKED:
            rows_len = number_of(places, buffer, 6)
            keys_len = number_of(places, buffer, 7)
            shift = number_of(places, buffer, 8)
            first_tile = number_of(places, buffer, 12)
        zero = unknown_zero()
        keys = k_tiles.index(buffer + zero).reshape([_KEYS, WIDTH])
        values = v_tiles.index(buffer + zero).reshape([_KEYS, WIDTH])
        # Not the same number to Triton, which takes names of one number for one variable.
        tile_before = tile + 0
        without_head = const_bias + 0.0
        if VISIBLE and not PUTS_BIASES:
            without_head -= gl.log(gl.maximum(keys_len, 1).to(gl.float32))
        row_bias = without_head + 0.0
        fast = True
        if FORM < _FAST:
            fast = False
        if HEAD_BIAS:
            own_bias = bias + batch.to(gl.int64) * stride_bias_b
            row_bias += load_head_bias(own_bias, head, stride_bias_h)
            if FORM == _AUTO:
                lowest = lowest_of_heads(own_bias, head, group, stride_bias_h) + const_bias
                if VISIBLE:
                    # No row sees more keys than a window has.
                    count = gl.minimum(keys_len, left + right + 1) if HAS_LEFT and HAS_RIGHT else keys_len
                    lowest -= gl.log(gl.maximum(count, 1).to(gl.float32))
                fast = lowest >= _FAST_BIAS
        if BIAS_ROWS and FORM == _AUTO:
            if PACKED:
                last_tile = gl.cdiv(gl.minimum(end, rows_len), _ROWS)
                lowest = lowest_of_tiles(
                    floor + first_tile, head * (stride_bias_h * all_tiles), group, stride_bias_h * all_tiles,
                    begin // _ROWS, last_tile, BY_THREAD,
                )  # fmt: skip
                fast = lowest >= _FAST_BIAS
            else:
                place = batch * stride_bias_b + head * stride_bias_h
                fast = lowest_bias(floor, place, group, stride_bias_h, begin, end, rows_len) >= _FAST_BIAS
        per_score = 1.0 / gl.where(fast, 0.5, _LOG2E) if SOFTCAP else scale
        if PUTS_BIASES:
            bias_tile = biases
            if BIAS_PRODUCT:
                bias_tile = biases.index(PART * _STAGES + stage)
            put_row_biases(
                bias_tile, start, row_bias, per_score, rows_len, keys_len, shift, left, right, VISIBLE, HAS_LEFT,
                HAS_RIGHT, APART, BIAS_PRODUCT,
            )  # fmt: skip
        unit = gl.where(fast, 0.5, _LOG2E)
        if APART:
            if BIAS_PRODUCT:
                fence_async_shared()  # products read it
            sync()
        else:
            # dS of a tile before the first: zeros.
            ds_tiles.index(slot).slice(PART * HALF, HALF, 0).store(no_scores.to(dtype))
            fence_async_shared()
            sync()
            mbarrier.arrive(ds_full.index(slot))

        if HELD:
            mbarrier.wait(v_full.index(buffer), kv_phase)
            held_values = (values.slice(PART * HALF, HALF, 0).load(gl.DotOperandLayout(0, of_scores, 2)),)
        # The first tile.
        mbarrier.wait(full.index(stage), phase)
        rows = cut(q_tiles.index(stage).reshape([_ROWS, WIDTH]), CUT)
        grads = cut(do_tiles.index(stage).reshape([_ROWS, WIDTH]), CUT)
        if BIAS_PRODUCT:
            s_start = start_by_biases(ones.index(0), bias_tile, no_scores)
        elif BIAS_ROWS and not SOFTCAP:
            s_start = start_at_biases(biases.index(stage), scale, of_scores, HALF)
        else:
            s_start = start_of_scores(biases, of_scores, HALF, BY_ROW)
        s_token = start_over_columns(cut(keys.slice(PART * HALF, HALF, 0), CUT), rows, s_start, BY_ROW)
        dp_start = no_scores
        if DELTA:
            minus = minus_of_keys(col0 + key, keys_len)
            dp_start = start_at_delta(deltas.index(stage), minus, of_scores)
        if HELD:
            dp_token = start_over_columns(held_values, grads, dp_start, DELTA)
        else:
            mbarrier.wait(v_full.index(buffer), kv_phase)
            dp_token = start_over_columns(cut(values.slice(PART * HALF, HALF, 0), CUT), grads, dp_start, DELTA)
        s = warpgroup_mma_wait(PIECES, deps=[s_token])
        if SOFTCAP:
            p, slope = soft_capped_probabilities(
                s, scale, softcap, unit, row_bias, biases.index(stage) if BIAS_ROWS else biases, start, col0, key, row,
                shift, left, right, fast, BANDED, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, FORM, SLOW, AT_ONCE,
            )  # fmt: skip
        else:
            p = probabilities(
                s, scale, row_bias * unit, start, col0, key, row, shift, left, right, fast,
                BY_ROW, HAS_LEFT, HAS_RIGHT, FORM, SLOW, AT_ONCE,
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
        if APART:
            mbarrier.wait(ds_empty.index(slot), slot_phase)
            written = slot + 0
        else:
            written = slot ^ 1
        ds_tiles.index(written).slice(PART * HALF, HALF, 0).store(ds_low)
        sum_of_ds = gl.zeros([128], gl.float32, BY_THREAD)
        if SUMS:
            sum_of_ds += gl.convert_layout(sum_per_thread(ds), BY_THREAD)
            block = number_of(places, buffer, 11) if PACKED else col0 // _KEYS
            own_parts = parts + ((batch * heads + head).to(gl.int64) * blocks + block) * 256
        results = warpgroup_mma_wait(0, deps=dv_tokens + p_operands)
        dv_acc = results[:PIECES]
        start_next, tile_next, head_next = next_tile(start, tile, head, begin, end, all_tiles - span)
        if GROUPED and SUMS:
            own_parts, sum_of_ds = end_of_head(own_parts, sum_of_ds, head_next - head, blocks, 256)
        if GROUPED and HEAD_BIAS:
            last_head = kv_head * group + group - 1
            row_bias = without_head + load_head_bias(own_bias, gl.minimum(head_next, last_head), stride_bias_h)
        if PUTS_BIASES and not SOFTCAP:
            bias_tile = biases
            if BIAS_PRODUCT:
                bias_tile = biases.index(PART * _STAGES + _next_stage(stage))
            put_row_biases(
                bias_tile, start_next, row_bias, scale, rows_len, keys_len, shift, left, right, VISIBLE, HAS_LEFT,
                HAS_RIGHT, APART, BIAS_PRODUCT,
            )  # fmt: skip
        fence_async_shared()
        sync()
        if not LATE:
            mbarrier.arrive(ds_full.index(written))
        if PUTS_BIASES and SOFTCAP:
            # All warps have read those of this tile. Another sync() comes before they read these.
            put_row_biases(
                biases, start_next, row_bias, per_score, rows_len, keys_len, shift, left, right, VISIBLE, HAS_LEFT,
                HAS_RIGHT, APART, False,
            )  # fmt: skip

        if APART:
            slot ^= 1
            if slot == 0:
                slot_phase ^= 1

        # In each turn dK of the tile before, dQ of the one before that, and all else of this one.
        for _ in range(1, total):
            rows_before = cut(q_tiles.index(stage).reshape([_ROWS, WIDTH]), CUT)
            stage_before = stage + 0
            phase_before = phase + 0
            stage += 1
            if stage == _STAGES:
                stage = 0
                phase ^= 1
            tile_now = tile
            start = start_next
            tile = tile_next
            head = head_next
            zero = unknown_zero()
            keys_now = k_tiles.index(buffer + zero).reshape([_KEYS, WIDTH])
            values_now = v_tiles.index(buffer + zero).reshape([_KEYS, WIDTH])

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
            if BIAS_PRODUCT:
                bias_tile = biases.index(PART * _STAGES + stage + zero)
                s_start = start_by_biases(ones.index(zero), bias_tile, no_scores)
            elif not BIAS_ROWS or SOFTCAP:
                s_start = start_of_scores(biases, of_scores, HALF, BY_ROW)
            mbarrier.wait(full.index(stage), phase)
            if BIAS_ROWS and not SOFTCAP:
                s_start = start_at_biases(biases.index(stage), scale, of_scores, HALF)
            rows = cut(q_tiles.index(stage).reshape([_ROWS, WIDTH]), CUT)
            grads = cut(do_tiles.index(stage).reshape([_ROWS, WIDTH]), CUT)
            own_values = held_values if HELD else cut(values_now.slice(PART * HALF, HALF, 0), CUT)
            s_token = start_over_columns(cut(keys_now.slice(PART * HALF, HALF, 0), CUT), rows, s_start, BY_ROW)
            dp_start = no_scores
            if APART:
                if DELTA:
                    dp_start = start_at_delta(deltas.index(stage), minus, of_scores)
                dp_token = start_over_columns(own_values, grads, dp_start, DELTA)
                if BIAS_PRODUCT:
                    start_next, tile_next, head_next = next_tile(start, tile, head, begin, end, all_tiles - span)
                    if GROUPED and HEAD_BIAS:
                        row_bias = without_head + load_head_bias(
                            own_bias, gl.minimum(head_next, kv_head * group + group - 1), stride_bias_h
                        )
                    put_row_biases(
                        biases.index(PART * _STAGES + _next_stage(stage)), start_next, row_bias, scale, rows_len,
                        keys_len, shift, left, right, VISIBLE, HAS_LEFT, HAS_RIGHT, APART, BIAS_PRODUCT,
                    )  # fmt: skip
                if LATE:
                    fence_async_shared()
                results = warpgroup_mma_wait(2 * PIECES + BIAS_PRODUCT, deps=dk_tokens + ds_operands)
                dk_acc = results[:PIECES]
                sync()
                if LATE:
                    mbarrier.arrive(ds_full.index(slot ^ 1))
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
                    s, scale, softcap, unit, row_bias, biases.index(stage) if BIAS_ROWS else biases, start, col0, key,
                    row, shift, left, right, fast, BANDED, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, FORM, SLOW, AT_ONCE,
                )  # fmt: skip
            else:
                p = probabilities(
                    s, scale, row_bias * unit, start, col0, key, row, shift, left, right, fast,
                    BY_ROW, HAS_LEFT, HAS_RIGHT, FORM, SLOW, AT_ONCE,
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
                written = slot + 0
            else:
                mbarrier.wait(empty.index(stage_before), phase_before)
                written = slot ^ 1
            ds_tiles.index(written).slice(PART * HALF, HALF, 0).store(ds_low)
            if SUMS:
                sum_of_ds += gl.convert_layout(sum_per_thread(ds), BY_THREAD)
            if not BIAS_PRODUCT:
                start_next, tile_next, head_next = next_tile(start, tile, head, begin, end, all_tiles - span)
            if GROUPED and SUMS:
                own_parts, sum_of_ds = end_of_head(own_parts, sum_of_ds, head_next - head, blocks, 256)
            if GROUPED and HEAD_BIAS and not BIAS_PRODUCT:
                row_bias = without_head + load_head_bias(
                    own_bias, gl.minimum(head_next, kv_head * group + group - 1), stride_bias_h
                )
            if PUTS_BIASES and not SOFTCAP and not BIAS_PRODUCT:
                put_row_biases(
                    biases, start_next, row_bias, scale, rows_len, keys_len, shift, left, right, VISIBLE, HAS_LEFT,
                    HAS_RIGHT, APART, False,
                )  # fmt: skip
            if not LATE:
                fence_async_shared()
                sync()
                mbarrier.arrive(ds_full.index(written))
            if PUTS_BIASES and SOFTCAP:
                # All warps have read those of this tile. Another sync() comes before they read these.
                put_row_biases(
                    biases, start_next, row_bias, per_score, rows_len, keys_len, shift, left, right, VISIBLE, HAS_LEFT,
                    HAS_RIGHT, APART, False,
                )  # fmt: skip
            if APART:
                slot ^= 1
                if slot == 0:
                    slot_phase ^= 1
            results = warpgroup_mma_wait(0, deps=dv_tokens + p_operands)
            dv_acc = results[:PIECES]

        # What is left: dK of the last tile, dQ of the last two.
        zero = unknown_zero()
        keys = k_tiles.index(buffer + zero).reshape([_KEYS, WIDTH])
        values = v_tiles.index(buffer + zero).reshape([_KEYS, WIDTH])
        rows_before = cut(q_tiles.index(stage).reshape([_ROWS, WIDTH]), CUT)
        if APART:
            dk_tokens = start_by_columns(ds_operands, rows_before, dk_acc, CUT)
            if LATE:
                fence_async_shared()
            results = warpgroup_mma_wait(0, deps=dk_tokens + ds_operands)
            dk_acc = results[:PIECES]
            sync()
            if LATE:
                mbarrier.arrive(ds_full.index(slot ^ 1))
        else:
            mbarrier.wait(ds_full.index(slot), slot_phase)
            dk_tokens = start_by_columns(ds_operands, rows_before, dk_acc, CUT)
            columns = keys.slice(PART * FIRST_COLUMNS, COLUMNS, 1)
            dq_token = warpgroup_mma(
                ds_tiles.index(slot).permute((1, 0)), columns, no_rows, use_acc=False, is_async=True
            )
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
            dq_token = warpgroup_mma(
                ds_tiles.index(slot).permute((1, 0)), columns, no_rows, use_acc=False, is_async=True
            )
            dq_tile = warpgroup_mma_wait(0, deps=[dq_token])
            last_sums = sums + tile.to(gl.int64) * TILE_SUMS
            add_tile(last_sums, dq_tile, of_rows)
            if ROW_PRODUCT:
                own = ds_tiles.index(slot).slice(PART * HALF, HALF, 0)
                row_sums = warpgroup_mma_wait(0, deps=[start_row_sums(own, ones.index(0), no_sums)])
                add_row_sums(last_sums + ROW_SUMS_AT, row_sums, of_row_sums)
            # Both warpgroups read all the keys.
            sync()
            mbarrier.arrive(keys_read.index(buffer))
            slot ^= 1
            if slot == 0:
                slot_phase ^= 1
        mbarrier.arrive(empty.index(stage))
        stage += 1
        if stage == _STAGES:
            stage = 0
            phase ^= 1
        if SUMS and not GROUPED:
            gl.store(own_parts, sum_of_ds)

        # The results go out by way of where keys and values lay.
        kv_head = number_of(places, buffer, 2)
        col0 = number_of(places, buffer, 3) + PART * HALF
        k_batch = number_of(places, buffer, 9 if PACKED else 4)
        stored_keys = number_of(places, buffer, 10) if PACKED else 0
        ROWS_AT: gl.constexpr = 3 if PACKED else 2
        _put(values.slice(PART * HALF, HALF, 0), dv_acc, 1.0 / P_SCALE, CUT)
        fence_async_shared()
        sync()
        own_dv = v_tiles.index(buffer + zero).slice(PART * HALF, HALF, ROWS_AT)
        store_rows(dv, k_batch, kv_head, col0, 0, stored_keys, own_dv, PACKED)
        mbarrier.wait(keys_read.index(buffer), kv_phase)
        _put(keys.slice(PART * HALF, HALF, 0), dk_acc, scale, CUT)
        fence_async_shared()
        sync()
        own_dk = k_tiles.index(buffer + zero).slice(PART * HALF, HALF, ROWS_AT)
        store_rows(dk, k_batch, kv_head, col0, 0, stored_keys, own_dk, PACKED)
        tma.store_wait(0)
        sync()
        mbarrier.arrive(kv_empty.index(buffer))
        if BUFFERS == 2:
            buffer ^= 1
        if buffer == 0:
            kv_phase ^= 1
        mbarrier.wait(k_full.index(buffer), kv_phase)
        span = number_of(places, buffer, 1)
