"""The forward of sigmoid attention over long sequences on Hopper GPUs, in Gluon, for a head_dim from 65 to 256.

:mod:`sigswap.kernels.triton.forward` leaves the order of things to Triton's compiler. Here:

- A program has 128 rows, of which each of two warpgroups has 64; a warp loads queries, keys and values for both.
- Within a warpgroup scores are a block of keys ahead: while it computes their probabilities, the product of those
  before with the values is under way.
- The warpgroups take turns in starting their matrix products, so that one computes probabilities while the other
  multiplies.
- There are as many programs as multiprocessors. Each goes from item to item, an item being 128 rows of a head; what
  the next one needs is loaded before the one before has ended.
- With a row cap each warpgroup sums the probabilities of its rows, and divides them once, at the end.
- A width that is no power of two, which a tensor's has to be, is held in parts: 192 columns cost no more than that.

At head_dim 64 there are twice as many probabilities for as many matrix products, and
:mod:`sigswap.kernels.triton.forward` is faster.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
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
from sigswap.kernels.host.layout import Layout, contiguous_layout
from sigswap.kernels.host.problem import MAX_PLANS, Problem, Signature
from sigswap.kernels.host.tiles import limits_of
from sigswap.kernels.triton.common import _AUTO, _FAST, _FAST_BIAS, _LOG2E

NARROWEST, WIDEST = 65, 256
"""Of head_dim, and of value's."""

ROWS = 128
"""Of an item."""

_ROWS = tl.constexpr(ROWS)
_HALF = tl.constexpr(ROWS // 2)


def supports(problem: Problem) -> bool:
    """Whether this kernel takes the forward: of long sequences in half precision, head_dim 65 to 256, without mask,
    dropout and soft cap."""
    signature = problem.signature
    operands = signature.query, signature.key, signature.value
    if signature.is_empty or signature.attn_mask is not None:
        return False
    if not signature.tma(min(signature.q_len, signature.kv_len)):
        return False
    if limits_of(signature.device).capability >= 100:
        return False
    if not all(NARROWEST <= each.shape[3] <= WIDEST for each in operands):
        return False
    if not all(describable(each) and each.shape[3] % 8 == 0 for each in operands):
        return False
    band = signature.band()
    if band.has_left and band.has_right and band.left + band.right < ROWS:
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
    row_sums = problem.row_sums
    plan = _plan(problem.signature, row_sums is not None)
    out = problem.query.new_empty_strided(plan.out.shape, plan.out.strides)
    tensors = problem.query, problem.key, problem.value, out
    plan.launch(*(by(tensor) for by, tensor in zip(plan.described, tensors, strict=True)), problem.bias, row_sums)
    return out


class Tile(NamedTuple):
    """A tile configuration."""

    keys: int
    """Of a block."""
    stages: int
    """Blocks of keys in flight."""
    part: int
    """Columns of a part of queries and keys."""
    v_part: int
    """Columns of a part of values, each of which is multiplied on its own."""
    stored: int
    """Columns of the output that are stored at a time: those of a part of values, or half of them."""


TILES = {
    (2, 2): Tile(128, 2, 128, 128, 128),
    (2, 3): Tile(64, 4, 128, 64, 64),
    (2, 4): Tile(64, 3, 128, 256, 128),
    (3, 2): Tile(128, 2, 64, 128, 64),
    (3, 3): Tile(64, 3, 64, 64, 64),
    (3, 4): Tile(64, 2, 64, 256, 128),
    (4, 2): Tile(64, 3, 256, 128, 64),
    (4, 3): Tile(64, 2, 256, 64, 64),
    (4, 4): Tile(64, 2, 256, 256, 128),
}
"""By how many times 64 columns hold head_dim, and value's. They fill shared memory or the registers, of which a thread
needs half as many as the output has columns, half as many as a block has keys, for scores, and half of that again, for
probabilities."""


class _Plan(NamedTuple):
    described: tuple[Tiles, ...]
    """query, key, value and out."""
    launch: Launch
    out: Layout


@functools.lru_cache(MAX_PLANS)
def _plan(signature: Signature, sums: bool) -> _Plan:
    """sums: whether the rows' sums are asked for."""
    tile = TILES[triton.cdiv(signature.query.shape[3], 64), triton.cdiv(signature.value.shape[3], 64)]
    out = signature.output()
    described = (
        Tiles(signature.query, ROWS // 2, tile.part),
        Tiles(signature.key, tile.keys, tile.part),
        Tiles(signature.value, tile.keys, tile.v_part),
        Tiles(out, ROWS // 2, tile.stored),
    )
    units = signature.batch * signature.heads
    programs = min(triton.cdiv(signature.q_len, ROWS) * units, limits_of(signature.device).multiprocessors)
    order = _order(signature, tile.keys, programs)
    arguments = signature.arguments() | {
        "units": units,
        "order": -order.at_once if order.to_and_fro else order.at_once,
        "STAGES": tile.stages,
        "PARTS": triton.cdiv(signature.query.shape[3], tile.part),
        "V_PARTS": triton.cdiv(signature.value.shape[3], tile.v_part),
    }
    row_sums = contiguous_layout((*signature.query.shape[:3], 1), torch.float32) if sums else None
    tensors = (*described, signature.bias, row_sums)
    return _Plan(described, Launch(_kernel, programs, signature.device, tensors, arguments, num_warps=4), out)


class _Order(NamedTuple):
    """Of the items. Those of so many heads are mixed, group by group: the last rows first, or, in every other group,
    last. The programs get them in turn."""

    at_once: int
    """Heads of a group."""
    to_and_fro: bool
    """Whether in every other turn the last program gets the first item."""


def _order(signature: Signature, keys: int, programs: int) -> _Order:
    """Programs that run at the same time should read the same keys, but under a causal mask items differ in length, and
    all programs should end at the same time."""
    band, units, blocks = signature.band(), signature.batch * signature.heads, triton.cdiv(signature.q_len, ROWS)
    if band.has_left == band.has_right:
        return _Order(1, True)  # all items take equally long
    counts = _key_blocks(signature, keys)
    # A group for each turn, or for two: then a program gets items of all lengths. The fewer heads, the fewer keys.
    orders = [_Order(programs // blocks, False), _Order(2 * programs // blocks, True), _Order(programs // 4, True)]
    orders = [order._replace(at_once=min(max(1, order.at_once), units)) for order in (*orders, _Order(units, True))]
    times = [_longest(order, counts + 1, units, programs) for order in orders]
    return next(order for order, time in zip(orders, times, strict=True) if time <= 1.02 * min(times))


def _key_blocks(signature: Signature, keys: int) -> np.ndarray:
    """How many blocks of keys an item takes, by its rows; as _place() has it."""
    shift, left, right = signature.options.band(signature.q_len, signature.kv_len)
    row = np.arange(0, signature.q_len, ROWS)
    end = np.minimum(row + ROWS, signature.q_len) + shift
    last = signature.kv_len if right is None else np.minimum(end + right, signature.kv_len)
    first = 0 if left is None else np.clip(row + shift - left, 0, signature.kv_len - 1) // keys * keys
    return np.maximum(-((first - last) // keys), np.ones_like(row))


def _longest(order: _Order, times: np.ndarray, units: int, programs: int) -> int:
    """How long the programs take, from the times of a head's items."""
    whole, rest = divmod(units, order.at_once)
    groups = [np.repeat(times, order.at_once)] * whole + [np.repeat(times, rest)] * (rest > 0)
    groups[-1::-2] = [group[::-1] for group in groups[-1::-2]]
    items = np.concatenate(groups)
    turns = np.zeros((triton.cdiv(len(items), programs), programs), dtype=np.int64)
    turns.flat[: len(items)] = items
    if order.to_and_fro:
        turns[1::2] = turns[1::2, ::-1].copy()
    return int(turns.sum(0).max())


# Device functions.


@gluon.jit
def _own_items(total, order):
    """How many of all items are this program's."""
    programs = gl.num_programs(0)
    rounds = total // programs
    return rounds + (_item(rounds, order) < total).to(gl.int32)


@gluon.jit
def _item(turn, order):
    """The item of this program in its turn."""
    programs = gl.num_programs(0)
    slot = gl.program_id(0)
    return turn * programs + gl.where((order < 0) & (turn % 2 == 1), programs - 1 - slot, slot)


@gluon.jit
def _place(
    item, units, order, heads, q_len, kv_len, shift, left, right,
    KEYS: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """Of an item the batch, the head, the first row, the first key that some row sees, and how many blocks of keys."""
    blocks = gl.cdiv(q_len, _ROWS)
    at_once = gl.abs(order)
    group = item // (at_once * blocks)
    first = group * at_once
    among = gl.minimum(at_once, units - first)
    rest = item - first * blocks
    # Under a causal mask the last rows take longest. They come first, and last in every other group of heads before.
    block = rest // among
    block = gl.where((gl.cdiv(units, at_once) - group) % 2 == 1, blocks - 1 - block, block)
    row0 = block * _ROWS
    unit = first + rest % among
    begin = 0
    end = kv_len
    if HAS_LEFT:
        begin = gl.minimum(gl.maximum(row0 + shift - left, 0), kv_len - 1) // KEYS * KEYS
    if HAS_RIGHT:
        end = gl.minimum(end, gl.minimum(row0 + _ROWS, q_len) + shift + right)
    return unit // heads, unit % heads, row0, begin, gl.maximum(gl.cdiv(end - begin, KEYS), 1)


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
            edge = edge | (last_key - key.shape[0] + 1 < last_row + shift - left)
        if edge:
            if HAS_RIGHT:
                x = gl.where(key[None, :] <= (row + shift + right)[:, None], x, float("-inf"))
            if HAS_LEFT:
                x = gl.where(key[None, :] >= (row + shift - left)[:, None], x, float("-inf"))
    return sigmoid(x, fast, FORM, SLOW)


@gluon.jit
def _summed(p, row_sum, key, end, kv_len):
    """Probabilities without those of keys beyond the last, before end, and row_sum with their sums."""
    if end > kv_len:
        p = gl.where(key[None, :] < kv_len, p, 0.0)
    return p, row_sum + gl.sum(p, 1)


@gluon.jit
def _next_stage(stage, phase, STAGES: gl.constexpr):
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def _load(
    q, k, v, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    units, order, heads, group, q_len, kv_len, shift, left, right, total,
    KEYS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, V_PARTS: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """One warp: all that the others compute with."""
    of_part: gl.constexpr = q.block_type.shape[3]
    of_v_part: gl.constexpr = v.block_type.shape[3]
    stage = 0
    phase = 1
    q_phase = 1
    for turn in range(_own_items(total, order)):
        batch, head, row0, start, count = _place(
            _item(turn, order), units, order, heads, q_len, kv_len, shift, left, right, KEYS, HAS_LEFT, HAS_RIGHT
        )
        mbarrier.wait(q_empty, q_phase)
        q_phase ^= 1
        mbarrier.expect(q_full, 2 * PARTS * q.block_type.nbytes)
        for j in gl.static_range(PARTS):
            load_tile(q, [batch, head, row0, j * of_part], q_full, q_tiles.index(j))
            load_tile(q, [batch, head, row0 + _HALF, j * of_part], q_full, q_tiles.index(PARTS + j))
        for _ in range(count):
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), PARTS * k.block_type.nbytes)
            for j in gl.static_range(PARTS):
                tile = k_tiles.index(stage * PARTS + j)
                load_tile(k, [batch, head // group, start, j * of_part], k_full.index(stage), tile)
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), V_PARTS * v.block_type.nbytes)
            for j in gl.static_range(V_PARTS):
                tile = v_tiles.index(stage * V_PARTS + j)
                load_tile(v, [batch, head // group, start, j * of_v_part], v_full.index(stage), tile)
            start += KEYS
            stage, phase = _next_stage(stage, phase, STAGES)


@gluon.jit
def _start_scores(q_tiles, k_tiles, no_scores, stage, PART: gl.constexpr, PARTS: gl.constexpr):
    """Starts the product of this warpgroup's queries with a block of keys, part by part of the head dimension."""
    KEYS: gl.constexpr = k_tiles.shape[3]
    of_part: gl.constexpr = k_tiles.shape[4]
    s = no_scores
    for j in gl.static_range(PARTS):
        queries = q_tiles.index(PART * PARTS + j).reshape([_HALF, of_part])
        keys = k_tiles.index(stage * PARTS + j).reshape([KEYS, of_part])
        s = warpgroup_mma(queries, keys.permute((1, 0)), s, use_acc=j > 0, is_async=True)
    return s


@gluon.jit
def _add_values(p_operand, v_tiles, sums, stage, V_PARTS: gl.constexpr):
    """Starts the products of probabilities with a block of values, which are added to sums."""
    KEYS: gl.constexpr = v_tiles.shape[3]
    of_v_part: gl.constexpr = v_tiles.shape[4]
    tokens = sums[:0]
    for j in gl.static_range(V_PARTS):
        values = v_tiles.index(stage * V_PARTS + j).reshape([KEYS, of_v_part])
        tokens += (warpgroup_mma(p_operand, values, sums[j], is_async=True),)
    return tokens


@gluon.jit
def _added(tokens, p_operand):
    """The sums, once the products have been added; until then the probabilities stay in their registers."""
    awaited = tokens
    awaited += (p_operand,)
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
def _attend(
    out, bias, sum_out, q_tiles, k_tiles, v_tiles, out_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
    units, order, heads, q_len, kv_len, shift, left, right, total,
    stride_bias_b, stride_bias_h, stride_bias_m, scale, const_bias, row_cap,
    PART: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, V_PARTS: gl.constexpr,
    VISIBLE: gl.constexpr, BIAS_ROWS: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, CAP: gl.constexpr, P_SCALE: gl.constexpr, FORM: gl.constexpr, SLOW: gl.constexpr,
):  # fmt: skip
    """One of the two warpgroups: its half of the rows of each item."""
    KEYS: gl.constexpr = k_tiles.shape[3]
    of_v_part: gl.constexpr = v_tiles.shape[4]
    of_store: gl.constexpr = out_tiles.shape[4]
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    of_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, of_v_part, 16])
    as_operand: gl.constexpr = gl.DotOperandLayout(0, of_out, 2)
    dtype: gl.constexpr = k_tiles.dtype
    SUMS: gl.constexpr = CAP or sum_out is not None
    # The first half of the rows may see no key of the last block.
    SKIPS: gl.constexpr = HAS_RIGHT and PART == 0 and KEYS <= _HALF
    row_of_part = PART * _HALF + gl.arange(0, _HALF, gl.SliceLayout(1, of_scores))
    key_of_block = gl.arange(0, KEYS, gl.SliceLayout(0, of_scores))
    no_scores = gl.zeros([_HALF, KEYS], gl.float32, of_scores)
    out_tile = out_tiles.index(PART)

    stage = 0
    phase = 0
    q_phase = 0
    turn_phase = 0
    for turn in range(_own_items(total, order)):
        batch, head, row0, start, count = _place(
            _item(turn, order), units, order, heads, q_len, kv_len, shift, left, right, KEYS, HAS_LEFT, HAS_RIGHT
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
                    lowest -= gl.log(gl.minimum(count * KEYS, kv_len).to(gl.float32))
            fast = lowest >= _FAST_BIAS
        own_count = count
        if SKIPS:
            own_count -= ((count > 1) & (start + (count - 1) * KEYS > last_row + shift + right)).to(gl.int32)
        unit = gl.where(fast, 0.5, _LOG2E)
        row_bias *= unit
        own_scale = scale * unit
        sums = (gl.zeros([_HALF, of_v_part], gl.float32, of_out),) * V_PARTS
        row_sum = gl.zeros([_HALF], gl.float32, gl.SliceLayout(1, of_scores))

        # Scores of the first block of keys.
        mbarrier.wait(q_full, q_phase)
        q_phase ^= 1
        mbarrier.wait(k_full.index(stage), phase)
        s_token = _start_scores(q_tiles, k_tiles, no_scores, stage, PART, PARTS)
        s = warpgroup_mma_wait(0, deps=[s_token])
        sync()
        mbarrier.arrive(k_empty.index(stage))
        mbarrier.arrive(q_empty, pred=own_count == 1)
        p = _probabilities(
            s, own_scale, row_bias, row, start + key_of_block, last_row, start + KEYS - 1, shift, left, right, fast,
            HAS_LEFT, HAS_RIGHT, FORM, SLOW,
        )  # fmt: skip
        if SUMS:
            p, row_sum = _summed(p, row_sum, start + key_of_block, start + KEYS, kv_len)
        p_operand = gl.convert_layout((p * P_SCALE).to(dtype), as_operand)

        # In each turn the scores of this block, and the part of the block before in the output.
        for i in range(1, own_count):
            stage_before = stage
            phase_before = phase
            start += KEYS
            stage, phase = _next_stage(stage, phase, STAGES)
            mbarrier.wait(turns.index(PART), turn_phase)
            turn_phase ^= 1
            mbarrier.wait(k_full.index(stage), phase)
            s_token = _start_scores(q_tiles, k_tiles, no_scores, stage, PART, PARTS)
            mbarrier.wait(v_full.index(stage_before), phase_before)
            sum_tokens = _add_values(p_operand, v_tiles, sums, stage_before, V_PARTS)
            sync()  # all four warps have had their turn
            mbarrier.arrive(turns.index(1 - PART))
            s = warpgroup_mma_wait(V_PARTS, deps=[s_token])
            sync()
            mbarrier.arrive(k_empty.index(stage))
            mbarrier.arrive(q_empty, pred=i == own_count - 1)  # for the next item's
            p = _probabilities(
                s, own_scale, row_bias, row, start + key_of_block, last_row, start + KEYS - 1, shift, left, right,
                fast, HAS_LEFT, HAS_RIGHT, FORM, SLOW,
            )  # fmt: skip
            if SUMS:
                p, row_sum = _summed(p, row_sum, start + key_of_block, start + KEYS, kv_len)
            sums = _added(sum_tokens, p_operand)
            sync()
            mbarrier.arrive(v_empty.index(stage_before))
            p_operand = gl.convert_layout((p * P_SCALE).to(dtype), as_operand)

        # The last block's part.
        if SKIPS:  # noqa: SIM102
            if own_count < count:  # known when it runs only
                mbarrier.wait(turns.index(PART), turn_phase)
                turn_phase ^= 1
                sync()
                mbarrier.arrive(turns.index(1 - PART))
        mbarrier.wait(v_full.index(stage), phase)
        sum_tokens = _add_values(p_operand, v_tiles, sums, stage, V_PARTS)
        sums = _added(sum_tokens, p_operand)
        tma.store_wait(0)  # The item before has left the tile.
        sync()
        mbarrier.arrive(v_empty.index(stage))
        stage, phase = _next_stage(stage, phase, STAGES)
        if sum_out is not None:
            gl.store(sum_out + (batch * heads + head).to(gl.int64) * q_len + row, row_sum, mask=row < q_len)
        divisor = row_sum
        if CAP:
            divisor = gl.convert_layout(gl.maximum(row_sum, row_cap), gl.SliceLayout(1, of_out))
        for j in gl.static_range(V_PARTS):
            pieces = _in_pieces(sums[j] / divisor[:, None] if CAP else sums[j], of_store)
            for i in gl.static_range(of_v_part // of_store):
                if j + i > 0:
                    tma.store_wait(0)
                    sync()
                out_tile.reshape([_HALF, of_store]).store((pieces[i] * (1.0 / P_SCALE)).to(dtype))
                fence_async_shared()
                sync()
                store_tile(out, [batch, head, row0 + PART * _HALF, j * of_v_part + i * of_store], out_tile)
        if SKIPS:  # noqa: SIM102
            if own_count < count:
                mbarrier.wait(k_full.index(stage), phase)
                mbarrier.arrive(k_empty.index(stage))
                mbarrier.wait(v_full.index(stage), phase)
                mbarrier.arrive(v_empty.index(stage))
                stage, phase = _next_stage(stage, phase, STAGES)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=[
    "stride_bias_b", "stride_bias_h", "stride_bias_m", "heads", "group", "q_len", "kv_len", "left", "right", "scale",
    "const_bias", "row_cap", "units", "order",
])  # fmt: skip
def _kernel(
    q, k, v, out, bias, sum_out, stride_bias_b, stride_bias_h, stride_bias_m,
    heads, group, q_len, kv_len, left, right, scale, const_bias, row_cap, units, order,
    STAGES: gl.constexpr, PARTS: gl.constexpr, V_PARTS: gl.constexpr,
    VISIBLE: gl.constexpr, BIAS_ROWS: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    BOTTOM_RIGHT: gl.constexpr, CAP: gl.constexpr, P_SCALE: gl.constexpr, FORM: gl.constexpr, SLOW: gl.constexpr,
):  # fmt: skip
    """One program: some of the items. sum_out, if given: the rows' sums of p, contiguous."""
    KEYS: gl.constexpr = k.block_type.shape[2]
    shift = kv_len - q_len if BOTTOM_RIGHT else 0
    total = gl.cdiv(q_len, _ROWS) * units
    dtype: gl.constexpr = k.dtype
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(dtype, [2 * PARTS, 1, 1, _HALF, q.block_type.shape[3]], q.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES * PARTS, 1, 1, KEYS, k.block_type.shape[3]], k.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES * V_PARTS, 1, 1, KEYS, v.block_type.shape[3]], v.layout)
    out_tiles = gl.allocate_shared_memory(dtype, [2, 1, 1, _HALF, out.block_type.shape[3]], out.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    mbarrier.init(q_full, 1)
    mbarrier.init(q_empty, 2)
    for i in gl.static_range(STAGES):
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
                out, bias, sum_out, q_tiles, k_tiles, v_tiles, out_tiles,
                q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
                units, order, heads, q_len, kv_len, shift, left, right, total,
                stride_bias_b, stride_bias_h, stride_bias_m, scale, const_bias, row_cap,
                0, STAGES, PARTS, V_PARTS, VISIBLE, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, CAP, P_SCALE, FORM,
                SLOW,
            )),
            (_attend, (
                out, bias, sum_out, q_tiles, k_tiles, v_tiles, out_tiles,
                q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
                units, order, heads, q_len, kv_len, shift, left, right, total,
                stride_bias_b, stride_bias_h, stride_bias_m, scale, const_bias, row_cap,
                1, STAGES, PARTS, V_PARTS, VISIBLE, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, CAP, P_SCALE, FORM,
                SLOW,
            )),
            (_load, (
                q, k, v, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                units, order, heads, group, q_len, kv_len, shift, left, right, total,
                KEYS, STAGES, PARTS, V_PARTS, HAS_LEFT, HAS_RIGHT,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
