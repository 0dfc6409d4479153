"""The forward of sigmoid attention over long sequences on Hopper GPUs, in Gluon, for a head_dim above 64.

:mod:`sigswap.kernels.triton.forward` leaves the order of things to Triton's compiler. Here:

- A program has 128 rows, of which each of two warpgroups has 64; a warp loads queries, keys and values for both.
- Within a warpgroup scores are a block of keys ahead: while it computes their probabilities, the product of those
  before with the values is under way.
- The warpgroups take turns in starting their matrix products, so that one computes probabilities while the other
  multiplies.
- There are as many programs as multiprocessors. Each goes from item to item, an item being 128 rows of a head; what
  the next one needs is loaded before the one before has ended.

At head_dim 64 there are twice as many probabilities for as many matrix products, and
:mod:`sigswap.kernels.triton.forward` is faster.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sigswap.kernels.hopper.common import Tiles, load_tile, log_of_visible, sigmoid, store_tile, sync
from sigswap.kernels.host.launch import Launch, describable
from sigswap.kernels.host.layout import Layout
from sigswap.kernels.host.problem import MAX_PLANS, Problem, Signature
from sigswap.kernels.host.tiles import limits_of
from sigswap.kernels.triton.common import _AUTO, _FAST, _FAST_BIAS, _LOG2E

WIDTH = 128
"""Of a head as the tiles hold it: head_dim 65 to 128."""

ROWS, KEYS, STAGES = 128, 128, 2
"""The rows of an item; the keys of a block; blocks of keys in flight."""

_WIDTH, _ROWS, _KEYS, _STAGES = (tl.constexpr(number) for number in (WIDTH, ROWS, KEYS, STAGES))
_HALF = tl.constexpr(ROWS // 2)


def supports(problem: Problem) -> bool:
    """Whether this kernel takes the forward: of long sequences in half precision, head_dim 65 to 128, without mask,
    dropout and soft cap."""
    signature = problem.signature
    operands = signature.query, signature.key, signature.value
    if signature.is_empty or signature.attn_mask is not None or not problem.is_uncapped:
        return False
    if signature.widths != (WIDTH, WIDTH) or not signature.tma(min(signature.q_len, signature.kv_len)):
        return False
    if limits_of(signature.device).capability >= 100:
        return False
    if not all(describable(each) and each.shape[3] % 8 == 0 for each in operands):
        return False
    band = signature.band()
    if band.has_left and band.has_right and band.left + band.right < KEYS:
        return False  # most of each block of keys is outside
    return _sees_in_every_item(signature)


def _sees_in_every_item(signature: Signature) -> bool:
    """Whether some row of each item sees some key. An item whose rows see none would yet work through a block of keys,
    where 0 times NaN is NaN."""
    shift, left, right = signature.options.band(signature.q_len, signature.kv_len)
    last_item = (signature.q_len - 1) // ROWS * ROWS
    first_sees = right is None or min(ROWS, signature.q_len) - 1 + shift + right >= 0
    return first_sees and (left is None or last_item + shift - left < signature.kv_len)


def forward(problem: Problem) -> Tensor:
    """Deterministic."""
    plan = _plan(problem.signature)
    out = problem.query.new_empty_strided(plan.out.shape, plan.out.strides)
    tensors = problem.query, problem.key, problem.value, out
    plan.launch(*(by(tensor) for by, tensor in zip(plan.described, tensors, strict=True)), problem.bias)
    return out


class _Plan(NamedTuple):
    described: tuple[Tiles, ...]
    """query, key, value and out."""
    launch: Launch
    out: Layout


@functools.lru_cache(MAX_PLANS)
def _plan(signature: Signature) -> _Plan:
    out = signature.output()
    described = (
        Tiles(signature.query, ROWS // 2),
        Tiles(signature.key, KEYS),
        Tiles(signature.value, KEYS),
        Tiles(out, ROWS // 2),
    )
    multiprocessors = limits_of(signature.device).multiprocessors
    units = signature.batch * signature.heads
    items = triton.cdiv(signature.q_len, ROWS) * units
    arguments = signature.arguments() | {"units": units, "at_once": _at_once(signature, items, multiprocessors)}
    tensors = (*described, signature.bias)
    launch = Launch(_kernel, min(items, multiprocessors), signature.device, tensors, arguments, num_warps=4)
    return _Plan(described, launch, out)


def _at_once(signature: Signature, items: int, multiprocessors: int) -> int:
    """Of how many heads the items are mixed. One where all items take equally long: then programs that run at the same
    time read the same keys. Under a causal mask items of many heads, the longest first, fill all programs equally; the
    number is one for which they still find most keys in the cache."""
    band, units = signature.band(), signature.batch * signature.heads
    if band.has_left == band.has_right:
        return 1
    return units if items <= 4 * multiprocessors else min(units, multiprocessors // 4)


# Device functions.


@gluon.jit
def _own_items(total):
    """How many of all items are this program's."""
    programs = gl.num_programs(0)
    rounds = total // programs
    return rounds + (_item(rounds) < total).to(gl.int32)


@gluon.jit
def _item(turn):
    """The item of this program in its turn: to and fro, so that the first program does not always get the longest."""
    programs = gl.num_programs(0)
    slot = gl.program_id(0)
    return turn * programs + gl.where(turn % 2 == 1, programs - 1 - slot, slot)


@gluon.jit
def _place(
    item, units, at_once, heads, q_len, kv_len, shift, left, right,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """Of an item the batch, the head, the first row, the first key that some row sees, and how many blocks of keys."""
    # The last rows first: under a causal mask they take longest.
    blocks = gl.cdiv(q_len, _ROWS)
    first = item // (at_once * blocks) * at_once
    among = gl.minimum(at_once, units - first)
    rest = item - first * blocks
    row0 = (blocks - 1 - rest // among) * _ROWS
    unit = first + rest % among
    begin = 0
    end = kv_len
    if HAS_LEFT:
        begin = gl.minimum(gl.maximum(row0 + shift - left, 0), kv_len - 1) // _KEYS * _KEYS
    if HAS_RIGHT:
        end = gl.minimum(end, gl.minimum(row0 + _ROWS, q_len) + shift + right)
    return unit // heads, unit % heads, row0, begin, gl.maximum(gl.cdiv(end - begin, _KEYS), 1)


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
def _probabilities(
    s, scale, row_bias, row, key, last_row, last_key, shift, left, right, fast,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, FORM: gl.constexpr, SLOW: gl.constexpr,
):  # fmt: skip
    """sigmoid(scale * s + row_bias), both in the form's unit; 0 outside the band."""
    x = s * scale + row_bias[:, None]
    if HAS_LEFT or HAS_RIGHT:
        edge = False
        if HAS_RIGHT:
            edge = last_key > last_row - _HALF + 1 + shift + right
        if HAS_LEFT:
            edge = edge | (last_key - _KEYS + 1 < last_row + shift - left)
        if edge:
            if HAS_RIGHT:
                x = gl.where(key[None, :] <= (row + shift + right)[:, None], x, float("-inf"))
            if HAS_LEFT:
                x = gl.where(key[None, :] >= (row + shift - left)[:, None], x, float("-inf"))
    return sigmoid(x, fast, FORM, SLOW)


@gluon.jit
def _next_stage(stage, phase):
    stage += 1
    if stage == _STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def _load(
    q, k, v, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    units, at_once, heads, group, q_len, kv_len, shift, left, right, total,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """One warp: all that the others compute with."""
    stage = 0
    phase = 1
    q_phase = 1
    for turn in range(_own_items(total)):
        batch, head, row0, start, count = _place(
            _item(turn), units, at_once, heads, q_len, kv_len, shift, left, right, HAS_LEFT, HAS_RIGHT
        )
        mbarrier.wait(q_empty, q_phase)
        q_phase ^= 1
        mbarrier.expect(q_full, 2 * q.block_type.nbytes)
        load_tile(q, [batch, head, row0, 0], q_full, q_tiles.index(0))
        load_tile(q, [batch, head, row0 + _HALF, 0], q_full, q_tiles.index(1))
        for _ in range(count):
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), k.block_type.nbytes)
            load_tile(k, [batch, head // group, start, 0], k_full.index(stage), k_tiles.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), v.block_type.nbytes)
            load_tile(v, [batch, head // group, start, 0], v_full.index(stage), v_tiles.index(stage))
            start += _KEYS
            stage, phase = _next_stage(stage, phase)


@gluon.jit
def _attend(
    out, bias, q_tiles, k_tiles, v_tiles, out_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
    units, at_once, heads, q_len, kv_len, shift, left, right, total,
    stride_bias_b, stride_bias_h, stride_bias_m, scale, const_bias,
    PART: gl.constexpr, VISIBLE: gl.constexpr, BIAS_ROWS: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, P_SCALE: gl.constexpr, FORM: gl.constexpr, SLOW: gl.constexpr,
):  # fmt: skip
    """One of the two warpgroups: its half of the rows of each item."""
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _KEYS, 16])
    of_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _WIDTH, 16])
    as_operand: gl.constexpr = gl.DotOperandLayout(0, of_out, 2)
    dtype: gl.constexpr = k_tiles.dtype
    row_of_part = PART * _HALF + gl.arange(0, _HALF, gl.SliceLayout(1, of_scores))
    key_of_block = gl.arange(0, _KEYS, gl.SliceLayout(0, of_scores))
    no_scores = gl.zeros([_HALF, _KEYS], gl.float32, of_scores)
    queries = q_tiles.index(PART).reshape([_HALF, _WIDTH])
    out_tile = out_tiles.index(PART)

    stage = 0
    phase = 0
    q_phase = 0
    turn_phase = 0
    for turn in range(_own_items(total)):
        batch, head, row0, start, count = _place(
            _item(turn), units, at_once, heads, q_len, kv_len, shift, left, right, HAS_LEFT, HAS_RIGHT
        )
        own_bias = bias
        head_bias = const_bias + 0.0
        if bias is not None:
            own_bias += batch.to(gl.int64) * stride_bias_b + head.to(gl.int64) * stride_bias_h
            if not BIAS_ROWS:
                head_bias += gl.load(own_bias).to(gl.float32)
        row = row0 + row_of_part
        last_row = row0 + (PART + 1) * _HALF - 1
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
                    lowest -= gl.log(gl.minimum(count * _KEYS, kv_len).to(gl.float32))
            fast = lowest >= _FAST_BIAS
        unit = gl.where(fast, 0.5, _LOG2E)
        row_bias *= unit
        own_scale = scale * unit
        out_acc = gl.zeros([_HALF, _WIDTH], gl.float32, of_out)

        # Scores of the first block of keys.
        mbarrier.wait(q_full, q_phase)
        q_phase ^= 1
        mbarrier.wait(k_full.index(stage), phase)
        keys = k_tiles.index(stage).reshape([_KEYS, _WIDTH])
        s_token = warpgroup_mma(queries, keys.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s_token])
        sync()
        mbarrier.arrive(k_empty.index(stage))
        p = _probabilities(
            s, own_scale, row_bias, row, start + key_of_block, last_row, start + _KEYS - 1, shift, left, right, fast,
            HAS_LEFT, HAS_RIGHT, FORM, SLOW,
        )  # fmt: skip
        p_operand = gl.convert_layout((p * P_SCALE).to(dtype), as_operand)

        # In each turn the scores of this block, and the part of the block before in the output.
        for _ in range(1, count):
            stage_before = stage
            phase_before = phase
            start += _KEYS
            stage, phase = _next_stage(stage, phase)
            mbarrier.wait(turns.index(PART), turn_phase)
            turn_phase ^= 1
            mbarrier.wait(k_full.index(stage), phase)
            keys = k_tiles.index(stage).reshape([_KEYS, _WIDTH])
            s_token = warpgroup_mma(queries, keys.permute((1, 0)), no_scores, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(stage_before), phase_before)
            values = v_tiles.index(stage_before).reshape([_KEYS, _WIDTH])
            out_token = warpgroup_mma(p_operand, values, out_acc, is_async=True)
            sync()  # all four warps have had their turn
            mbarrier.arrive(turns.index(1 - PART))
            s = warpgroup_mma_wait(1, deps=[s_token])
            sync()
            mbarrier.arrive(k_empty.index(stage))
            p = _probabilities(
                s, own_scale, row_bias, row, start + key_of_block, last_row, start + _KEYS - 1, shift, left, right,
                fast, HAS_LEFT, HAS_RIGHT, FORM, SLOW,
            )  # fmt: skip
            out_acc, p_operand = warpgroup_mma_wait(0, deps=[out_token, p_operand])
            sync()
            mbarrier.arrive(v_empty.index(stage_before))
            p_operand = gl.convert_layout((p * P_SCALE).to(dtype), as_operand)

        # The last block's part.
        mbarrier.arrive(q_empty)
        mbarrier.wait(v_full.index(stage), phase)
        values = v_tiles.index(stage).reshape([_KEYS, _WIDTH])
        out_token = warpgroup_mma(p_operand, values, out_acc, is_async=True)
        out_acc, p_operand = warpgroup_mma_wait(0, deps=[out_token, p_operand])
        tma.store_wait(0)  # The item before has left the tile.
        sync()
        mbarrier.arrive(v_empty.index(stage))
        stage, phase = _next_stage(stage, phase)
        out_tile.reshape([_HALF, _WIDTH]).store((out_acc * (1.0 / P_SCALE)).to(dtype))
        fence_async_shared()
        sync()
        store_tile(out, [batch, head, row0 + PART * _HALF, 0], out_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=[
    "stride_bias_b", "stride_bias_h", "stride_bias_m", "heads", "group", "q_len", "kv_len", "left", "right", "scale",
    "const_bias", "units", "at_once",
])  # fmt: skip
def _kernel(
    q, k, v, out, bias, stride_bias_b, stride_bias_h, stride_bias_m,
    heads, group, q_len, kv_len, left, right, scale, const_bias, units, at_once,
    VISIBLE: gl.constexpr, BIAS_ROWS: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    BOTTOM_RIGHT: gl.constexpr, P_SCALE: gl.constexpr, FORM: gl.constexpr, SLOW: gl.constexpr,
):  # fmt: skip
    """One program: some of the items."""
    shift = kv_len - q_len if BOTTOM_RIGHT else 0
    total = gl.cdiv(q_len, _ROWS) * units
    dtype: gl.constexpr = k.dtype
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(dtype, [2, 1, 1, _HALF, _WIDTH], q.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [_STAGES, 1, 1, _KEYS, _WIDTH], k.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [_STAGES, 1, 1, _KEYS, _WIDTH], v.layout)
    out_tiles = gl.allocate_shared_memory(dtype, [2, 1, 1, _HALF, _WIDTH], out.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], barrier)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    mbarrier.init(q_full, 1)
    mbarrier.init(q_empty, 2)
    for i in gl.static_range(_STAGES):
        mbarrier.init(k_full.index(i), 1)
        mbarrier.init(k_empty.index(i), 2)
        mbarrier.init(v_full.index(i), 1)
        mbarrier.init(v_empty.index(i), 2)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), 1)
    mbarrier.arrive(turns.index(0))
    fence_async_shared()

    gl.warp_specialize(
        [
            (_attend, (
                out, bias, q_tiles, k_tiles, v_tiles, out_tiles,
                q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
                units, at_once, heads, q_len, kv_len, shift, left, right, total,
                stride_bias_b, stride_bias_h, stride_bias_m, scale, const_bias,
                0, VISIBLE, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, P_SCALE, FORM, SLOW,
            )),
            (_attend, (
                out, bias, q_tiles, k_tiles, v_tiles, out_tiles,
                q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
                units, at_once, heads, q_len, kv_len, shift, left, right, total,
                stride_bias_b, stride_bias_h, stride_bias_m, scale, const_bias,
                1, VISIBLE, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, P_SCALE, FORM, SLOW,
            )),
            (_load, (
                q, k, v, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                units, at_once, heads, group, q_len, kv_len, shift, left, right, total, HAS_LEFT, HAS_RIGHT,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
