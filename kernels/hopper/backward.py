"""The backward of sigmoid attention over long sequences on Hopper GPUs, in Gluon: one kernel for dK, dV and dQ.

:mod:`sigswap.kernels.triton.backward` computes the scores twice, once for dK and dV, once for dQ: seven matrix
products. Here they are computed once, and a block of keys adds its part of dQ to float32 sums in memory: five. What
makes that fast:

- A program has 128 keys, of which each of two warpgroups has 64, with dK and dV in registers; a warp loads queries and
  output gradients for both. They meet through memory barriers only, one tile of 64 rows apart at most, so that one
  computes probabilities while the other multiplies matrices.
- dS goes from one warpgroup to the other through shared memory: each computes half of the columns of dQ, over all 128
  keys, one tile late.
- The sums of dQ lie in memory as the registers of a matrix product hold them: each thread adds 16 bytes at a time,
  without a way through shared memory, whose bandwidth is the bottleneck. A second kernel puts them in order.
- Under a band (causal, a window) row biases differ. Scores start from them, so that no register holds them.
- A bias tensor that differs between rows comes with the queries, worked out before. Its gradient is a product of dS
  with ones, eight columns wide, next to that of dQ: sums over keys cost next to nothing there, and many shuffles in
  registers. It is added up in memory as dQ is.

The sums are added in no fixed order: two runs differ by rounding. ``torch.use_deterministic_algorithms`` avoids that.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
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
    ROWS,
    RowTiles,
    add_row_sums,
    add_tile,
    end_of_head,
    heads_at_once,
    load_head_bias,
    load_tiles,
    lowest_bias,
    next_tile,
    probabilities,
    put_row_biases,
    row_tiles_for,
    sees_every_block,
    start_at_biases,
    start_at_delta,
    start_of_scores,
    start_row_sums,
    sum_per_thread,
    takes,
    takes_delta,
    unknown_zero,
    visible_keys,
)
from sigswap.kernels.hopper.common import Numbers, Tiles, store_tile, sync
from sigswap.kernels.hopper.grad_query import finish_kernel
from sigswap.kernels.host.launch import Described, Launch
from sigswap.kernels.host.layout import Layout, contiguous_layout, layout_of
from sigswap.kernels.host.problem import MAX_PLANS, Gradients, Problem, Signature
from sigswap.kernels.host.results import gradients_for, hand_over
from sigswap.kernels.triton.common import _AUTO, _FAST, _FAST_BIAS, _LOG2E
from sigswap.kernels.triton.sums import Sum

LONG = {64: (1024, 511, 192), 128: (511, 511, 192)}
"""By the width of a head: with more visible keys per row, on average, this kernel is faster than
:mod:`sigswap.kernels.triton.backward`, as measured on an H100: without bias, with one per head, with one per row, which
cost that one more. The sums of dQ have to be filled with zeros before and put in order after, which takes as long for
short sequences as for long ones."""

KEYS, STAGES = 128, 3
"""The keys of a program; tiles of rows in flight."""

_KEYS, _STAGES = tl.constexpr(KEYS), tl.constexpr(STAGES)


def supports(problem: Problem) -> bool:
    """Whether this kernel takes the backward: of long sequences in half precision, head_dim 33 to 128, without mask,
    dropout and soft cap, where all of query, key and value want gradients."""
    signature = problem.signature
    width, value_width = signature.widths
    if width != value_width or width not in LONG or not takes(problem) or torch.are_deterministic_algorithms_enabled():
        return False
    if not takes_delta(problem, KEYS):
        return False
    long = LONG[width][0 if signature.bias is None else 1 if signature.bias.shape[2] == 1 else 2]
    return sees_every_block(signature, KEYS) and visible_keys(signature) > long * signature.q_len


def backward(problem: Problem) -> Gradients:
    grads, written, layouts = gradients_for(problem)
    grad_out = problem.readable_grad_out()
    delta = problem.row_delta
    plan = _plan(problem.signature, layout_of(grad_out), layouts, delta is not None)
    new_query, new_key, new_value, new_bias, _ = written
    assert new_key is not None and new_value is not None
    sums = torch.zeros(plan.sums.shape, dtype=torch.float32, device=problem.query.device)
    parts = None if plan.sum_parts is None else plan.sum_parts.empty_parts()
    tensors = problem.query, problem.key, problem.value, grad_out, new_key, new_value
    described = [by(tensor) for by, tensor in zip(plan.described, tensors, strict=True)]
    of_rows = None if plan.delta is None or delta is None else plan.delta(delta)
    if plan.rows is None:
        plan.launch(*described, sums, parts, problem.bias, None, of_rows)
        plan.finish(sums, new_query, None)
    else:
        biases, floor = plan.rows.biases(problem, None)
        plan.launch(*described, sums, None, plan.rows.described(biases), floor, of_rows)
        plan.finish(sums, new_query, new_bias if parts is None else parts)
    if plan.sum_parts is not None:
        assert parts is not None and new_bias is not None
        plan.sum_parts(parts, new_bias)
    hand_over(grads, written)
    return grads


class _Plan(NamedTuple):
    described: tuple[Described, ...]
    """query, key, value, grad_out and the gradients of key and value."""
    delta: Numbers | None
    """Below a row cap."""
    launch: Launch
    sums: Layout
    """Of dQ, as the kernel adds it up."""
    finish: Launch
    rows: RowTiles | None
    """Where the bias tensor differs between rows."""
    sum_parts: Sum | None
    """Where the gradient of the bias is a sum: of what launch writes, or, of rows' biases, finish."""


@functools.lru_cache(MAX_PLANS)
def _plan(signature: Signature, grad_out: Layout, grads: tuple[Layout | None, ...], capped: bool) -> _Plan:
    grad_query, grad_key, grad_value, grad_bias, _ = grads
    assert grad_query is not None and grad_key is not None and grad_value is not None
    width = signature.widths[0]
    band = signature.band()
    described = (
        Tiles(signature.query, ROWS),
        Tiles(signature.key, KEYS),
        Tiles(signature.value, KEYS),
        Tiles(grad_out, ROWS),
        Tiles(grad_key, KEYS // 2),
        Tiles(grad_value, KEYS // 2),
    )
    tiles = triton.cdiv(signature.q_len, ROWS)
    blocks = triton.cdiv(signature.kv_len, KEYS)
    rows = row_tiles_for(signature)
    row_sums = rows is not None and grad_bias is not None
    head_sums = rows is None and grad_bias is not None
    numbers = ROWS * (width + 1 if row_sums else width)
    sums = contiguous_layout((signature.batch * signature.heads * tiles, numbers), torch.float32)
    sum_parts = parts = None
    if grad_bias is not None:
        # One of each row, or of each thread of the two warpgroups.
        shape = signature.batch, signature.heads, signature.q_len if row_sums else blocks * 256, 1
        if head_sums or grad_bias.shape != shape:
            sum_parts = Sum(grad_bias, shape, signature.device)
            parts = contiguous_layout(shape, torch.float32)
    units = signature.batch * signature.kv_heads
    arguments = signature.arguments() | {
        "units": units,
        "at_once": heads_at_once(signature, blocks, units),
        "DIM": width,
        "BANDED": band.has_left or band.has_right,
        "SUMS": head_sums,
        "ROW_SUMS": row_sums,
        "GROUPED": signature.heads > signature.kv_heads,
        "DELTA": capped,
    }
    delta = Numbers(contiguous_layout(signature.query.shape[:3], torch.float32), ROWS) if capped else None
    bias: Layout | Described | None = signature.bias
    floor = None
    if rows is not None:
        bias, floor = rows.described, rows.biases.floor
        arguments |= rows.arguments()
    tensors = (*described, sums, parts if head_sums else None, bias, floor, delta)
    launch = Launch(_kernel, blocks * units, signature.device, tensors, arguments, num_warps=4)
    of_rows = (parts or grad_bias) if row_sums else None
    strides = (0, 0, 0) if of_rows is None else of_rows.strides_or_zero(3)
    finish_arguments = signature.arguments(dq=grad_query) | {"tiles": tiles, "DIM": width}
    finish_arguments |= {f"stride_db_{dim}": stride for dim, stride in zip("bhm", strides, strict=True)}
    outputs = sums, grad_query, of_rows
    finish = Launch(finish_kernel, sums.shape[0], signature.device, outputs, finish_arguments, num_warps=8)
    return _Plan(described, delta, launch, sums, finish, rows, sum_parts)


# Device functions. A tile of scores is [keys, rows].


@gluon.jit
def _compute(
    dk, dv, sums, parts, bias, floor, k_tile, v_tile, q_tiles, do_tiles, ds_tiles,
    biases, deltas, ones, kv_full, full, empty, ds_full, keys_read,
    batch, kv_head, heads, group, col0, begin, span, blocks, q_len, kv_len, shift, left, right,
    stride_bias_b, stride_bias_h, scale, const_bias, fast,
    PART: gl.constexpr, DIM: gl.constexpr, VISIBLE: gl.constexpr, BANDED: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, BIAS_ROWS: gl.constexpr, SUMS: gl.constexpr, ROW_SUMS: gl.constexpr,
    GROUPED: gl.constexpr, DELTA: gl.constexpr, P_SCALE: gl.constexpr, FORM: gl.constexpr, SLOW: gl.constexpr,
):  # fmt: skip
    """One of the two warpgroups: dK and dV of its half of the keys, and its half of the columns of dQ."""
    HALF: gl.constexpr = _KEYS // 2
    COLUMNS: gl.constexpr = DIM // 2
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _ROWS, 16])
    of_keys: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    of_rows: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    of_row_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    as_operand: gl.constexpr = gl.DotOperandLayout(0, of_keys, 2)
    dtype: gl.constexpr = k_tile.dtype
    BY_ROW: gl.constexpr = BANDED or BIAS_ROWS
    HEAD_BIAS: gl.constexpr = bias is not None and not BIAS_ROWS
    # Of the sums of dQ and, behind it, of dS: a tile's numbers, and where those of dS begin, for this half.
    TILE_SUMS: gl.constexpr = _ROWS * (DIM + 1 if ROW_SUMS else DIM)
    ROW_SUMS_AT: gl.constexpr = _ROWS * (DIM - PART * COLUMNS)

    col0 += PART * HALF
    key = gl.arange(0, HALF, gl.SliceLayout(1, of_scores))
    row = gl.arange(0, _ROWS, gl.SliceLayout(0, of_scores))
    no_scores = gl.zeros([HALF, _ROWS], gl.float32, of_scores)
    no_rows = gl.zeros([_ROWS, COLUMNS], gl.float32, of_rows)
    keys = k_tile.index(0).reshape([_KEYS, DIM])
    values = v_tile.index(0).reshape([_KEYS, DIM])
    if not BIAS_ROWS:
        biases = biases.index(PART)
    no_sums = gl.zeros([_ROWS, 8], gl.float32, of_row_sums)
    dk_acc = gl.zeros([HALF, DIM], gl.float32, of_keys)

    # Where a tile is: its first row, and its place among the sums of dQ, of which tiles follow one another by heads.
    end = begin + span * _ROWS
    total = group * span
    head = kv_head * group
    tiles = gl.cdiv(q_len, _ROWS)
    sums += PART * _ROWS * COLUMNS
    start = begin
    tile = (batch * heads + head) * tiles + begin // _ROWS
    # Not the same number to Triton, which takes names of one number for one variable.
    tile_before = tile + 0
    row_bias = const_bias + 0.0
    if HEAD_BIAS:
        bias += batch.to(gl.int64) * stride_bias_b
        row_bias += load_head_bias(bias, head, stride_bias_h)
    if BIAS_ROWS and FORM == _AUTO:
        place = batch * stride_bias_b + head * stride_bias_h
        fast = lowest_bias(floor, place, group, stride_bias_h, begin, end, q_len) >= _FAST_BIAS
    if BANDED and not BIAS_ROWS:
        put_row_biases(biases, start, row_bias, scale, q_len, kv_len, shift, left, right, VISIBLE, HAS_LEFT, HAS_RIGHT)
    elif VISIBLE:
        const_bias -= gl.log(gl.maximum(kv_len, 1).to(gl.float32))
        row_bias -= gl.log(gl.maximum(kv_len, 1).to(gl.float32))
    unit = gl.where(fast, 0.5, _LOG2E)
    # dS of a tile before the first: zeros.
    ds_tiles.index(0).slice(PART * HALF, HALF, 0).store(no_scores.to(dtype))
    fence_async_shared()
    sync()
    mbarrier.arrive(ds_full.index(0))

    # The first tile.
    mbarrier.wait(kv_full, 0)
    mbarrier.wait(full.index(0), 0)
    rows = q_tiles.index(0).reshape([_ROWS, DIM])
    grads = do_tiles.index(0).reshape([_ROWS, DIM])
    if BIAS_ROWS:
        s_start = start_at_biases(biases.index(0), scale, of_scores, HALF)
    else:
        s_start = start_of_scores(biases, of_scores, HALF, BANDED)
    s_token = warpgroup_mma(
        keys.slice(PART * HALF, HALF, 0), rows.permute((1, 0)), s_start, use_acc=BY_ROW, is_async=True
    )
    dp_start = no_scores
    if DELTA:
        dp_start = start_at_delta(deltas.index(0), of_scores, HALF)
    dp_token = warpgroup_mma(
        values.slice(PART * HALF, HALF, 0), grads.permute((1, 0)), dp_start, use_acc=DELTA, is_async=True
    )
    s = warpgroup_mma_wait(1, deps=[s_token])
    p = probabilities(
        s, scale, row_bias * unit, start, col0, key, row, shift, left, right, fast,
        BY_ROW, HAS_LEFT, HAS_RIGHT, FORM, SLOW,
    )  # fmt: skip
    p_operand = gl.convert_layout((p * P_SCALE).to(dtype), as_operand)
    dv_token = warpgroup_mma(p_operand, grads, gl.zeros([HALF, DIM], gl.float32, of_keys), use_acc=False, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp_token])
    ds = (p - p * p) * dp
    ds_low = ds.to(dtype)
    ds_operand = gl.convert_layout(ds_low, as_operand)
    ds_tiles.index(1).slice(PART * HALF, HALF, 0).store(ds_low)
    sum_of_ds = gl.zeros([128], gl.float32, BY_THREAD)
    if SUMS:
        sum_of_ds += gl.convert_layout(sum_per_thread(ds), BY_THREAD)
        parts += PART * 128 + gl.arange(0, 128, BY_THREAD)
        parts += ((batch * heads + head).to(gl.int64) * blocks + col0 // _KEYS) * 256
    dv_acc, p_operand = warpgroup_mma_wait(0, deps=[dv_token, p_operand])
    start_next, tile_next, head_next = next_tile(start, tile, head, begin, end, tiles - span)
    if GROUPED and SUMS:
        parts, sum_of_ds = end_of_head(parts, sum_of_ds, head_next - head, blocks, 256)
    if GROUPED and HEAD_BIAS:
        last_head = kv_head * group + group - 1
        row_bias = const_bias + load_head_bias(bias, gl.minimum(head_next, last_head), stride_bias_h)
    if BANDED and not BIAS_ROWS:
        put_row_biases(
            biases, start_next, row_bias, scale, q_len, kv_len, shift, left, right, VISIBLE, HAS_LEFT, HAS_RIGHT
        )
    fence_async_shared()
    sync()
    mbarrier.arrive(ds_full.index(1))

    # In each turn dK of the tile before, dQ of the one before that, and all else of this one.
    stage = 0
    phase = 0
    slot = 0
    slot_phase = 0
    for _ in range(1, total):
        rows_before = q_tiles.index(stage).reshape([_ROWS, DIM])
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
        keys_now = k_tile.index(zero).reshape([_KEYS, DIM])
        values_now = v_tile.index(zero).reshape([_KEYS, DIM])

        mbarrier.wait(ds_full.index(slot), slot_phase)
        dk_token = warpgroup_mma(ds_operand, rows_before, dk_acc, is_async=True)
        dq_token = warpgroup_mma(
            ds_tiles.index(slot).permute((1, 0)), keys_now.slice(PART * COLUMNS, COLUMNS, 1), no_rows,
            use_acc=False, is_async=True,
        )  # fmt: skip
        if ROW_SUMS:
            own = ds_tiles.index(slot).slice(PART * HALF, HALF, 0)
            row_token = start_row_sums(own, ones.index(zero), no_sums)
        if not BIAS_ROWS:
            s_start = start_of_scores(biases, of_scores, HALF, BANDED)
        mbarrier.wait(full.index(stage), phase)
        if BIAS_ROWS:
            s_start = start_at_biases(biases.index(stage), scale, of_scores, HALF)
        rows = q_tiles.index(stage).reshape([_ROWS, DIM])
        grads = do_tiles.index(stage).reshape([_ROWS, DIM])
        s_token = warpgroup_mma(
            keys_now.slice(PART * HALF, HALF, 0), rows.permute((1, 0)), s_start, use_acc=BY_ROW, is_async=True
        )
        if ROW_SUMS:
            dk_acc, dq_tile, row_sums, ds_operand = warpgroup_mma_wait(
                1, deps=[dk_token, dq_token, row_token, ds_operand]
            )
        else:
            dk_acc, dq_tile, ds_operand = warpgroup_mma_wait(1, deps=[dk_token, dq_token, ds_operand])
        sums_before = sums + tile_before.to(gl.int64) * TILE_SUMS
        if ROW_SUMS:
            add_row_sums(sums_before + ROW_SUMS_AT, row_sums, of_row_sums)
        add_tile(sums_before, dq_tile, of_rows)
        # The rows of the tile before and dS of the one before that are read.
        sync()
        mbarrier.arrive(empty.index(stage_before))
        tile_before = tile_now
        slot ^= 1
        if slot == 0:
            slot_phase ^= 1
        dp_start = no_scores
        if DELTA:
            dp_start = start_at_delta(deltas.index(stage), of_scores, HALF)
        dp_token = warpgroup_mma(
            values_now.slice(PART * HALF, HALF, 0), grads.permute((1, 0)), dp_start, use_acc=DELTA, is_async=True
        )

        s = warpgroup_mma_wait(1, deps=[s_token])
        p = probabilities(
            s, scale, row_bias * unit, start, col0, key, row, shift, left, right, fast,
            BY_ROW, HAS_LEFT, HAS_RIGHT, FORM, SLOW,
        )  # fmt: skip
        p_operand = gl.convert_layout((p * P_SCALE).to(dtype), as_operand)
        dv_token = warpgroup_mma(p_operand, grads, dv_acc, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp_token])
        ds = (p - p * p) * dp
        ds_low = ds.to(dtype)
        ds_operand = gl.convert_layout(ds_low, as_operand)
        # The other warpgroup has read what lies there: dS of two tiles before.
        mbarrier.wait(empty.index(stage_before), phase_before)
        ds_tiles.index(slot ^ 1).slice(PART * HALF, HALF, 0).store(ds_low)
        if SUMS:
            sum_of_ds += gl.convert_layout(sum_per_thread(ds), BY_THREAD)
        start_next, tile_next, head_next = next_tile(start, tile, head, begin, end, tiles - span)
        if GROUPED and SUMS:
            parts, sum_of_ds = end_of_head(parts, sum_of_ds, head_next - head, blocks, 256)
        if GROUPED and HEAD_BIAS:
            row_bias = const_bias + load_head_bias(
                bias, gl.minimum(head_next, kv_head * group + group - 1), stride_bias_h
            )
        if BANDED and not BIAS_ROWS:
            put_row_biases(
                biases, start_next, row_bias, scale, q_len, kv_len, shift, left, right, VISIBLE, HAS_LEFT, HAS_RIGHT
            )
        fence_async_shared()
        sync()
        mbarrier.arrive(ds_full.index(slot ^ 1))
        dv_acc, p_operand = warpgroup_mma_wait(0, deps=[dv_token, p_operand])

    # What is left: dK of the last tile, dQ of the last two.
    mbarrier.wait(ds_full.index(slot), slot_phase)
    dk_token = warpgroup_mma(ds_operand, q_tiles.index(stage).reshape([_ROWS, DIM]), dk_acc, is_async=True)
    columns = keys.slice(PART * COLUMNS, COLUMNS, 1)
    dq_token = warpgroup_mma(ds_tiles.index(slot).permute((1, 0)), columns, no_rows, use_acc=False, is_async=True)
    dk_acc, dq_tile, ds_operand = warpgroup_mma_wait(0, deps=[dk_token, dq_token, ds_operand])
    sums_before = sums + tile_before.to(gl.int64) * TILE_SUMS
    add_tile(sums_before, dq_tile, of_rows)
    if ROW_SUMS:
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
    if ROW_SUMS:
        own = ds_tiles.index(slot).slice(PART * HALF, HALF, 0)
        row_sums = warpgroup_mma_wait(0, deps=[start_row_sums(own, ones.index(0), no_sums)])
        add_row_sums(sums + ROW_SUMS_AT, row_sums, of_row_sums)

    # The results go out by way of where keys and values lay, of which both warpgroups read all the keys.
    sync()
    mbarrier.arrive(keys_read)
    values.slice(PART * HALF, HALF, 0).store((dv_acc * (1.0 / P_SCALE)).to(dtype))
    mbarrier.wait(keys_read, 0)
    keys.slice(PART * HALF, HALF, 0).store((dk_acc * scale).to(dtype))
    fence_async_shared()
    sync()
    store_tile(dk, [batch, kv_head, col0, 0], k_tile.index(0).slice(PART * HALF, HALF, 2))
    store_tile(dv, [batch, kv_head, col0, 0], v_tile.index(0).slice(PART * HALF, HALF, 2))
    if SUMS and not GROUPED:
        gl.store(parts, sum_of_ds)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=[
    "heads", "group", "q_len", "kv_len", "left", "right", "scale", "const_bias", "units", "at_once",
])  # fmt: skip
def _kernel(
    q, k, v, do, dk, dv, sums, parts, bias, floor, delta, stride_bias_b, stride_bias_h,
    heads, group, q_len, kv_len, left, right, scale, const_bias, units, at_once,
    DIM: gl.constexpr, VISIBLE: gl.constexpr, BANDED: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    BOTTOM_RIGHT: gl.constexpr, BIAS_ROWS: gl.constexpr, SUMS: gl.constexpr, ROW_SUMS: gl.constexpr,
    GROUPED: gl.constexpr, DELTA: gl.constexpr, P_SCALE: gl.constexpr, FORM: gl.constexpr, SLOW: gl.constexpr,
):  # fmt: skip
    """One program: dK and dV of 128 keys of one key head, over all query heads that use it, and what they add to dQ.

    sums: float32 [B * H * ceil(M / 64), ...], zeros: of each tile of dQ half of the columns, then the other half; if
    ROW_SUMS of each row the sum of dS behind them.
    parts: float32 [B, H, blocks of keys, 2, 128]: sums of dS, if SUMS.
    bias, floor: of a tensor that differs between rows, BIAS_ROWS, b_i and the least of blocks of it (RowBiases);
    strides of bias count its rows then.
    delta: float32 [B * H, M], if DELTA: it is subtracted from dP.
    """
    # Under a causal mask the first keys take longest, and start first, in as many heads as fill the GPU.
    blocks = gl.cdiv(kv_len, _KEYS)
    first = gl.program_id(0) // (at_once * blocks) * at_once
    among = gl.minimum(at_once, units - first)
    rest = gl.program_id(0) - first * blocks
    col0 = rest // among * _KEYS
    unit = first + rest % among
    kv_heads = heads // group
    kv_head = unit % kv_heads
    batch = unit // kv_heads
    shift = kv_len - q_len if BOTTOM_RIGHT else 0
    # The rows that see some of the keys; at least one tile, of which they then see none.
    begin = 0
    end = q_len
    if HAS_RIGHT:
        begin = gl.minimum(gl.maximum(col0 - shift - right, 0), q_len - 1) // _ROWS * _ROWS
    if HAS_LEFT:
        end = gl.minimum(end, gl.minimum(col0 + _KEYS, kv_len) - shift + left)
    span = gl.maximum(gl.cdiv(end - begin, _ROWS), 1)
    fast = True
    if FORM == _AUTO and not BIAS_ROWS:
        # Of all heads and rows the least bias. No row sees more keys than a window has.
        count = kv_len
        if HAS_LEFT and HAS_RIGHT:
            count = gl.minimum(count, left + right + 1)
        lowest = const_bias + 0.0
        if VISIBLE:
            lowest -= gl.log(gl.maximum(count, 1).to(gl.float32))
        own = float("inf")
        for member in range(group):
            at = batch.to(gl.int64) * stride_bias_b + (kv_head * group + member).to(gl.int64) * stride_bias_h
            own = gl.minimum(own, gl.load(bias + at).to(gl.float32))
        fast = lowest + own >= _FAST_BIAS
    if FORM < _FAST:
        fast = False

    dtype: gl.constexpr = k.dtype
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    k_tile = gl.allocate_shared_memory(dtype, [1, 1, 1, _KEYS, DIM], k.layout)
    v_tile = gl.allocate_shared_memory(dtype, [1, 1, 1, _KEYS, DIM], v.layout)
    q_tiles = gl.allocate_shared_memory(dtype, [_STAGES, 1, 1, _ROWS, DIM], q.layout)
    do_tiles = gl.allocate_shared_memory(dtype, [_STAGES, 1, 1, _ROWS, DIM], do.layout)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_KEYS, _ROWS], dtype)
    ds_tiles = gl.allocate_shared_memory(dtype, [2, _KEYS, _ROWS], ds_layout)
    # What a partition has no use for is not handed to it.
    if not BIAS_ROWS:
        biases = gl.allocate_shared_memory(gl.float32, [2, _ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        row_biases: gl.constexpr = 0
        row_tiles: gl.constexpr = 0
        row_stride_b: gl.constexpr = 0
        row_stride_h: gl.constexpr = 0
    else:
        biases = gl.allocate_shared_memory(gl.float32, [_STAGES, 1, _ROWS], bias.layout)
        row_biases = bias
        row_tiles = biases
        row_stride_b = stride_bias_b
        row_stride_h = stride_bias_h
    if not DELTA:
        deltas: gl.constexpr = 0
        of_delta: gl.constexpr = 0
    else:
        deltas = gl.allocate_shared_memory(gl.float32, [_STAGES, 1, _ROWS], delta.layout)
        of_delta = delta
    if not ROW_SUMS:
        ones: gl.constexpr = 0
    else:
        ones_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, _KEYS // 2], dtype)
        ones = gl.allocate_shared_memory(dtype, [1, 8, _KEYS // 2], ones_layout)
        ones.index(0).store(gl.full([8, _KEYS // 2], 1.0, dtype, gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])))
    kv_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    keys_read = gl.allocate_shared_memory(gl.int64, [1], barrier)
    full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], barrier)
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    mbarrier.init(kv_full, 1)
    mbarrier.init(keys_read, 2)
    for i in gl.static_range(_STAGES):
        mbarrier.init(full.index(i), 1)
        mbarrier.init(empty.index(i), 2)
    for i in gl.static_range(2):
        mbarrier.init(ds_full.index(i), 2)
    fence_async_shared()

    gl.warp_specialize(
        [
            (_compute, (
                dk, dv, sums, parts, 0 if BIAS_ROWS else bias, floor, k_tile, v_tile, q_tiles, do_tiles, ds_tiles,
                biases, deltas, ones, kv_full, full, empty, ds_full, keys_read,
                batch, kv_head, heads, group, col0, begin, span, blocks, q_len, kv_len, shift, left, right,
                stride_bias_b, stride_bias_h, scale, const_bias, fast,
                0, DIM, VISIBLE, BANDED, HAS_LEFT, HAS_RIGHT, BIAS_ROWS, SUMS, ROW_SUMS, GROUPED, DELTA,
                P_SCALE, FORM, SLOW,
            )),
            (_compute, (
                dk, dv, sums, parts, 0 if BIAS_ROWS else bias, floor, k_tile, v_tile, q_tiles, do_tiles, ds_tiles,
                biases, deltas, ones, kv_full, full, empty, ds_full, keys_read,
                batch, kv_head, heads, group, col0, begin, span, blocks, q_len, kv_len, shift, left, right,
                stride_bias_b, stride_bias_h, scale, const_bias, fast,
                1, DIM, VISIBLE, BANDED, HAS_LEFT, HAS_RIGHT, BIAS_ROWS, SUMS, ROW_SUMS, GROUPED, DELTA,
                P_SCALE, FORM, SLOW,
            )),
            (load_tiles, (
                q, k, v, do, row_biases, of_delta, k_tile, v_tile, q_tiles, do_tiles, row_tiles, deltas,
                kv_full, full, empty,
                batch, kv_head, heads, group, col0, begin, span, row_stride_b, row_stride_h, _STAGES, BIAS_ROWS,
                DELTA,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
