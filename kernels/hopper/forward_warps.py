"""What the warps of a program of :mod:`sigswap.kernels.hopper.forward` do: one loads, two to four groups compute.

A tile of scores is [rows, keys]."""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from sigswap.kernels.hopper.common import (
    _SCALE,
    as_operands,
    cut,
    log_of_visible,
    scaled_sigmoid,
    sigmoid,
    sigmoid_of_rows,
    soft_capped,
    start_by_columns,
    start_over_columns,
    sync,
)
from sigswap.kernels.hopper.forward_items import item_of, own_items, place
from sigswap.kernels.hopper.packed import load_rows, place_of_rows, store_rows
from sigswap.kernels.triton.common import _AUTO, _FAST, _FAST_BIAS, _LOG2E

ROWS = 64
"""Of a warpgroup."""

_ROWS = tl.constexpr(ROWS)


@gluon.jit
def _row_biases(
    bias, row, q_len, kv_len, shift, left, right, stride_bias_m, head_bias,
    VISIBLE: gl.constexpr, BIAS_ROWS: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    result = gl.full(row.shape, 0.0, gl.float32, row.type.layout) + head_bias
    if BIAS_ROWS:
        place = bias + row.to(gl.int64) * stride_bias_m
        result += gl.load(place, mask=row < q_len, other=0.0).to(gl.float32)
    if VISIBLE:
        result -= log_of_visible(row, kv_len, shift, left, right, HAS_LEFT, HAS_RIGHT)
    return result


@gluon.jit
def _partial_sums(p):
    """Of each row four numbers: the sums of what each of four threads has of it."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _row_sums(
    partial, row_bias, row, end, kv_len, shift, left, right, fast, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr
):
    """Of the keys up to kv_len. Those behind it, before end, are zeros, so each has added sigmoid(row_bias), where the
    band does not hide it: that is taken off once, not masked in each block, for which there are no registers."""
    first = gl.full(row.shape, 0, gl.int32, row.type.layout) + kv_len
    last = gl.full(row.shape, 0, gl.int32, row.type.layout) + end
    if HAS_LEFT:
        first = gl.maximum(first, row + shift - left)
    if HAS_RIGHT:
        last = gl.minimum(last, row + shift + right + 1)
    behind = gl.maximum(last - first, 0).to(gl.float32) * sigmoid_of_rows(row_bias, fast)
    return gl.convert_layout(gl.sum(partial, 1), row.type.layout) - behind


@gluon.jit
def _probabilities(
    s, scale, row_bias, row, key, last_row, last_key, shift, left, right, fast, softcap,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, FORM: gl.constexpr, SLOW: gl.constexpr, SOFTCAP: gl.constexpr,
    SCALED: gl.constexpr,
):  # fmt: skip
    """sigmoid(scale * s + row_bias), both in the form's unit, or sigmoid(softcap * tanh(scale * s) + row_bias), softcap
    and row_bias in it; 0 outside the band. SCALED: SCALE times that."""
    x = soft_capped(s, scale, softcap, row_bias[:, None]) if SOFTCAP else s * scale + row_bias[:, None]
    if HAS_LEFT or HAS_RIGHT:
        edge = False
        if HAS_RIGHT:
            edge = last_key > last_row - _ROWS + 1 + shift + right
        if HAS_LEFT:
            edge = edge | (last_key - key.shape[0] + 1 < last_row + shift - left)
        if edge:
            if HAS_RIGHT:
                x = gl.where(key[None, :] <= (row + shift + right)[:, None], x, float("-inf"))
            if HAS_LEFT:
                x = gl.where(key[None, :] >= (row + shift - left)[:, None], x, float("-inf"))
    return scaled_sigmoid(x, fast, FORM, SLOW) if SCALED else sigmoid(x, fast, FORM, SLOW, False, 32)


@gluon.jit
def _next_stage(stage, phase, STAGES: gl.constexpr):
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def load(
    shared, plan,
    KEYS: gl.constexpr, WARPGROUPS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, V_PARTS: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, BOTTOM_RIGHT: gl.constexpr,
):  # fmt: skip
    """One warp: all that the others compute with."""
    (
        q, k, v, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
        units, order, heads, group, q_len, kv_len, shift, left, right, total,
    ) = shared  # fmt: skip
    PACKED: gl.constexpr = plan is not None
    of_part: gl.constexpr = q.block_type.shape[-1]
    of_v_part: gl.constexpr = v.block_type.shape[-1]
    stage = 0
    phase = 1
    q_phase = 1
    for turn in range(own_items(total, order)):
        if PACKED:
            q_begin, rows, k_batch, keys, _, head, row0, start, count = place_of_rows(
                plan, item_of(turn, order), heads, gl.abs(order), left, right,
                WARPGROUPS * _ROWS, KEYS, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT,
            )  # fmt: skip
            rows = gl.where(keys > 0, rows, 0)  # of rows that see no key zeros: what is in them may be NaN
            batch = q_begin + rows
        else:
            batch, head, row0, start, count = place(
                item_of(turn, order), units, order, heads, q_len, kv_len, shift, left, right,
                WARPGROUPS * _ROWS, KEYS, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            k_batch = batch
            rows = q_len
            keys = kv_len
        mbarrier.wait(q_empty, q_phase)
        q_phase ^= 1
        mbarrier.expect(q_full, WARPGROUPS * PARTS * q.block_type.nbytes)
        for j in gl.static_range(PARTS):
            for i in gl.static_range(WARPGROUPS):
                q_tile = q_tiles.index(i * PARTS + j)
                load_rows(q, batch, head, row0 + i * _ROWS, j * of_part, rows, q_full, q_tile, PACKED)
        for _ in range(count):
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), PARTS * k.block_type.nbytes)
            for j in gl.static_range(PARTS):
                tile = k_tiles.index(stage * PARTS + j)
                load_rows(k, k_batch, head // group, start, j * of_part, keys, k_full.index(stage), tile, PACKED)
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), V_PARTS * v.block_type.nbytes)
            for j in gl.static_range(V_PARTS):
                tile = v_tiles.index(stage * V_PARTS + j)
                load_rows(v, k_batch, head // group, start, j * of_v_part, keys, v_full.index(stage), tile, PACKED)
            start += KEYS
            stage, phase = _next_stage(stage, phase, STAGES)


@gluon.jit
def _columns(tiles, first, PARTS: gl.constexpr, CUT: gl.constexpr):
    """The columns of a block of rows, part by part: the tiles from the first on."""
    HEIGHT: gl.constexpr = tiles.shape[-2]
    WIDTH: gl.constexpr = tiles.shape[-1]
    columns = cut(tiles.index(first).reshape([HEIGHT, WIDTH]), CUT)
    for j in gl.static_range(1, PARTS):
        columns += (tiles.index(first + j).reshape([HEIGHT, WIDTH]),)
    return columns


@gluon.jit
def _added(tokens, p_operands):
    """The sums, once the products have been added; until then the probabilities stay in their registers."""
    awaited = tokens
    awaited += p_operands
    results = warpgroup_mma_wait(0, deps=awaited)
    return results[: len(tokens)]


@gluon.jit
def _in_pieces(tile, COLUMNS: gl.constexpr):
    """The tile, cut into pieces of so many columns, at most two."""
    if tile.shape[1] == COLUMNS:
        return (tile,)
    else:
        first, second = gl.split(tile.reshape([tile.shape[0], 2, COLUMNS]).permute((0, 2, 1)))
        return first, second


@gluon.jit
def attend(
    shared, sum_out, bias, plan,
    PART: gl.constexpr, WARPGROUPS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, V_PARTS: gl.constexpr,
    CUT: gl.constexpr, V_CUT: gl.constexpr, HELD: gl.constexpr, TURNS: gl.constexpr,
    VISIBLE: gl.constexpr, BIAS_ROWS: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    BOTTOM_RIGHT: gl.constexpr, CAP: gl.constexpr, P_SCALE: gl.constexpr, FORM: gl.constexpr, SLOW: gl.constexpr,
    SOFTCAP: gl.constexpr,
):  # fmt: skip
    """One of the warpgroups: its 64 rows of each item."""
    (
        out, q_tiles, k_tiles, v_tiles, out_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
        units, order, heads, all_rows, all_keys, same_shift, left, right, total,
        stride_bias_b, stride_bias_h, stride_bias_m, stride_sum_b, stride_sum_h, stride_sum_n, scale, const_bias,
        row_cap, softcap,
    ) = shared  # fmt: skip
    PACKED: gl.constexpr = plan is not None
    KEYS: gl.constexpr = k_tiles.shape[-2]
    of_v_part: gl.constexpr = v_tiles.shape[-1]
    of_store: gl.constexpr = out_tiles.shape[-1]
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    of_first: gl.constexpr = 64 if V_CUT else of_v_part
    of_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, of_first, 16])
    of_rest: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    # Products with values in flight.
    PRODUCTS: gl.constexpr = 2 if V_CUT else V_PARTS
    dtype: gl.constexpr = k_tiles.dtype
    SUMS: gl.constexpr = CAP or sum_out is not None
    # Probabilities are scaled as they are computed, but for their sums.
    SCALED: gl.constexpr = P_SCALE != 1.0 and not SUMS
    gl.static_assert(not SCALED or P_SCALE == _SCALE)
    # All but the last rows may see no key of the last blocks.
    SKIPS: gl.constexpr = HAS_RIGHT and KEYS <= (WARPGROUPS - 1 - PART) * _ROWS
    NEXT: gl.constexpr = (PART + 1) % WARPGROUPS
    row_of_part = PART * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, of_scores))
    key_of_block = gl.arange(0, KEYS, gl.SliceLayout(0, of_scores))
    no_scores = gl.zeros([_ROWS, KEYS], gl.float32, of_scores)
    out_tile = out_tiles.index(PART).reshape([_ROWS, of_store])

    stage = 0
    phase = 0
    q_phase = 0
    turn_phase = 0
    for turn in range(own_items(total, order)):
        if PACKED:
            q_begin, q_len, _, kv_len, shift, head, row0, start, count = place_of_rows(
                plan, item_of(turn, order), heads, gl.abs(order), left, right,
                WARPGROUPS * _ROWS, KEYS, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT,
            )  # fmt: skip
            batch = q_begin + q_len
        else:
            q_len = all_rows
            kv_len = all_keys
            shift = same_shift
            batch, head, row0, start, count = place(
                item_of(turn, order), units, order, heads, q_len, kv_len, shift, left, right,
                WARPGROUPS * _ROWS, KEYS, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
        own_bias = bias
        head_bias = const_bias + 0.0
        if bias is not None:
            if PACKED:
                own_bias += q_begin.to(gl.int64) * stride_bias_m + head.to(gl.int64) * stride_bias_h
            else:
                own_bias += batch.to(gl.int64) * stride_bias_b + head.to(gl.int64) * stride_bias_h
            if not BIAS_ROWS:
                head_bias += gl.load(own_bias).to(gl.float32)
        row = row0 + row_of_part
        last_row = row0 + (PART + 1) * _ROWS - 1
        row_bias = _row_biases(
            own_bias, row, q_len, kv_len, shift, left, right, stride_bias_m, head_bias,
            VISIBLE, BIAS_ROWS, HAS_LEFT, HAS_RIGHT,
        )  # fmt: skip
        fast = FORM == _FAST
        if FORM == _AUTO:
            if BIAS_ROWS:
                lowest = gl.min(row_bias, 0)
            else:  # without looking for the least of the rows
                lowest = head_bias
                if VISIBLE:
                    lowest -= gl.log(gl.minimum(count * KEYS, kv_len).to(gl.float32))
            fast = lowest >= _FAST_BIAS
        own_count = count
        if SKIPS:
            own_count = gl.minimum(count, gl.maximum(gl.cdiv(last_row + 1 + shift + right - start, KEYS), 1))
        unit = gl.where(fast, 0.5, _LOG2E)
        row_bias *= unit
        own_scale = scale / softcap if SOFTCAP else scale * unit
        own_cap = softcap * unit if SOFTCAP else 0
        sums = (gl.zeros([_ROWS, of_first], gl.float32, of_out),) * V_PARTS
        if V_CUT:
            sums += (gl.zeros([_ROWS, 32], gl.float32, of_rest),)

        # Scores of the first block of keys.
        mbarrier.wait(q_full, q_phase)
        q_phase ^= 1
        queries = _columns(q_tiles, PART * PARTS, PARTS, CUT)
        if HELD:
            in_shared = queries
            queries = (in_shared[0].load(gl.DotOperandLayout(0, of_scores, 2)),)
            for j in gl.static_range(1, len(in_shared)):
                queries += (in_shared[j].load(gl.DotOperandLayout(0, of_scores, 2)),)
            sync()
            mbarrier.arrive(q_empty)
        mbarrier.wait(k_full.index(stage), phase)
        s_token = start_over_columns(queries, _columns(k_tiles, stage * PARTS, PARTS, CUT), no_scores, False)
        s = warpgroup_mma_wait(0, deps=[s_token])
        sync()
        mbarrier.arrive(k_empty.index(stage))
        if not HELD:
            mbarrier.arrive(q_empty, pred=own_count == 1)
        p = _probabilities(
            s, own_scale, row_bias, row, start + key_of_block, last_row, start + KEYS - 1, shift, left, right, fast,
            own_cap, HAS_LEFT, HAS_RIGHT, FORM, SLOW, SOFTCAP, SCALED,
        )  # fmt: skip
        if SUMS:
            partial_sums = _partial_sums(p)
        p_operands = as_operands((p if SCALED else p * P_SCALE).to(dtype), of_out, of_rest, V_CUT)

        # In each turn the scores of this block, and the part of the block before in the output.
        for i in range(1, own_count):
            stage_before = stage
            phase_before = phase
            start += KEYS
            stage, phase = _next_stage(stage, phase, STAGES)
            if TURNS:
                mbarrier.wait(turns.index(PART), turn_phase)
                turn_phase ^= 1
            mbarrier.wait(k_full.index(stage), phase)
            s_token = start_over_columns(queries, _columns(k_tiles, stage * PARTS, PARTS, CUT), no_scores, False)
            mbarrier.wait(v_full.index(stage_before), phase_before)
            values = _columns(v_tiles, stage_before * V_PARTS, V_PARTS, V_CUT)
            sum_tokens = start_by_columns(p_operands, values, sums, V_CUT)
            if TURNS:
                sync()  # all four warps have had their turn
                mbarrier.arrive(turns.index(NEXT))
            s = warpgroup_mma_wait(PRODUCTS, deps=[s_token])
            sync()
            mbarrier.arrive(k_empty.index(stage))
            if not HELD:
                mbarrier.arrive(q_empty, pred=i == own_count - 1)  # for the next item's
            p = _probabilities(
                s, own_scale, row_bias, row, start + key_of_block, last_row, start + KEYS - 1, shift, left, right,
                fast, own_cap, HAS_LEFT, HAS_RIGHT, FORM, SLOW, SOFTCAP, SCALED,
            )  # fmt: skip
            if SUMS:
                partial_sums += _partial_sums(p)
            sums = _added(sum_tokens, p_operands)
            sync()
            mbarrier.arrive(v_empty.index(stage_before))
            p_operands = as_operands((p if SCALED else p * P_SCALE).to(dtype), of_out, of_rest, V_CUT)

        # The last block's part.
        if SKIPS and TURNS:
            for _ in range(count - own_count):
                mbarrier.wait(turns.index(PART), turn_phase)
                turn_phase ^= 1
                sync()
                mbarrier.arrive(turns.index(NEXT))
        mbarrier.wait(v_full.index(stage), phase)
        sum_tokens = start_by_columns(p_operands, _columns(v_tiles, stage * V_PARTS, V_PARTS, V_CUT), sums, V_CUT)
        sums = _added(sum_tokens, p_operands)
        tma.store_wait(0)  # The item before has left the tile.
        sync()
        mbarrier.arrive(v_empty.index(stage))
        stage, phase = _next_stage(stage, phase, STAGES)
        factor = 1.0 / P_SCALE
        if SUMS:
            row_sums = _row_sums(
                partial_sums, row_bias, row, start + KEYS, kv_len, shift, left, right, fast, HAS_LEFT, HAS_RIGHT
            )
            if sum_out is not None:
                own_sums = sum_out + head.to(gl.int64) * stride_sum_h
                own_sums += q_begin.to(gl.int64) * stride_sum_n if PACKED else batch.to(gl.int64) * stride_sum_b
                gl.store(own_sums + row.to(gl.int64) * stride_sum_n, row_sums, mask=row < q_len)
            if CAP:
                factor /= gl.maximum(row_sums, row_cap)
        for j in gl.static_range(V_PARTS):
            pieces = sums if V_CUT else _in_pieces(sums[j], of_store)
            for i in gl.static_range(of_v_part // of_store):
                if j + i > 0:
                    tma.store_wait(0)
                    sync()
                targets = cut(out_tile, V_CUT)
                for n in gl.static_range(len(targets)):
                    piece = pieces[i + n]
                    if CAP:
                        piece *= gl.convert_layout(factor, gl.SliceLayout(1, piece.type.layout))[:, None]
                    else:
                        piece *= factor
                    targets[n].store(piece.to(dtype))
                fence_async_shared()
                sync()
                column = j * of_v_part + i * of_store
                store_rows(out, batch, head, row0 + PART * _ROWS, column, q_len, out_tiles.index(PART), PACKED)
        if SKIPS:
            for _ in range(count - own_count):
                mbarrier.wait(k_full.index(stage), phase)
                mbarrier.arrive(k_empty.index(stage))
                mbarrier.wait(v_full.index(stage), phase)
                mbarrier.arrive(v_empty.index(stage))
                stage, phase = _next_stage(stage, phase, STAGES)
    tma.store_wait(0)
