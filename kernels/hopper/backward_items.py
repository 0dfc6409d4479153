"""The items of the backward on Hopper GPUs, a block of keys of a head each: where they are, and who loads and counts
them.

The loading warp takes items, and tells the others in shared memory where they are.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from sigswap.kernels.hopper.backward_common import _ROWS
from sigswap.kernels.hopper.backward_ring import count, first_tile, items_ended, items_taken, take, taken, wait_for_room
from sigswap.kernels.hopper.common import load_tile, sync
from sigswap.kernels.hopper.packed import load_rows, place_of_keys

KEYS, STAGES = 128, 3
"""The keys of an item; tiles of rows in flight."""

PLACE = 13
"""Numbers that say where an item is: its first row, how many tiles of rows it has, its key head, first key and batch,
and the tile of its first head's first row among the sums of dQ; of packed sequences also how many rows and keys the
sequence has, the shift, where its keys end, how many of them are stored, the block among those of all sequences, and
the sequence's first tile in a head."""

_KEYS, _STAGES, _PLACE = (tl.constexpr(n) for n in (KEYS, STAGES, PLACE))


@gluon.jit
def _put_place(places, place, numbers):
    """By one warp."""
    for j in gl.static_range(len(numbers)):
        number = gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0])) + numbers[j]
        places.index(place * _PLACE + j).store(number)


@gluon.jit
def number_of(places, place, NUMBER: gl.constexpr):
    """Of a place, by its place in the tuple that was put there."""
    by_thread: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(places.index(place * _PLACE + NUMBER).load(by_thread), 0)


@gluon.jit
def _place_of_block(
    item, units, at_once, heads, group, q_len, kv_len, left, right,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, BOTTOM_RIGHT: gl.constexpr,
):  # fmt: skip
    """Of an item, a block of keys of a key head, the first row that sees some of them, down to a multiple of 64, how
    many tiles of rows there are from there, the head, the first key, the batch, and the head among all batches'.

    Under a causal mask the first keys take longest, and start first, in as many heads as fill the GPU."""
    blocks = gl.cdiv(kv_len, _KEYS)
    first = item // (at_once * blocks) * at_once
    among = gl.minimum(at_once, units - first)
    rest = item - first * blocks
    col0 = rest // among * _KEYS
    unit = first + rest % among
    kv_heads = heads // group
    shift = kv_len - q_len if BOTTOM_RIGHT else 0
    # The rows that see some of the keys; at least one tile, of which they then see none.
    begin = 0
    end = q_len
    if HAS_RIGHT:
        begin = gl.minimum(gl.maximum(col0 - shift - right, 0), q_len - 1) // _ROWS * _ROWS
    if HAS_LEFT:
        end = gl.minimum(end, gl.minimum(col0 + _KEYS, kv_len) - shift + left)
    return begin, gl.maximum(gl.cdiv(end - begin, _ROWS), 1), unit % kv_heads, col0, unit // kv_heads, unit


@gluon.jit
def load(
    shared, plan, bias, biases, stride_bias_b, stride_bias_h, delta, deltas,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, BOTTOM_RIGHT: gl.constexpr,
    BIAS_ROWS: gl.constexpr, DELTA: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """One warp: takes items until there are none, and loads all that the others compute with."""
    PACKED: gl.constexpr = plan is not None
    (
        q, k, v, do, k_tiles, v_tiles, q_tiles, do_tiles, places, k_full, v_full, kv_empty, full, empty,
        counters, items, units, at_once, in_turn, turns, heads, group, all_tiles, q_len, kv_len, left, right,
    ) = shared  # fmt: skip
    BUFFERS: gl.constexpr = k_tiles.shape[0]
    if PACKED:
        items = gl.load(plan)
    # Of a ring, items are not those of programs that have not started, which may wait for others to end.
    item = taken(take(items_taken(counters))) if RING else gl.program_id(0)
    buffer = 0
    kv_phase = 1
    stage = 0
    phase = 1
    while item < items * units:
        if PACKED:
            (
                block, kv_head, batch, rows, own_q_len, k_batch, keys, stored_keys, shift, col0, begin, end, own_tile
            ) = place_of_keys(
                plan, item, units, at_once, left, right, _KEYS, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT
            )  # fmt: skip
            span = gl.maximum(gl.cdiv(end - begin, _ROWS), 1)
            number_batch = 0
            first_row = own_tile * _ROWS
            tile = kv_head * group * all_tiles + own_tile
            place = (
                begin, span, kv_head, col0, 0, tile, own_q_len, keys, shift, k_batch, stored_keys, block, own_tile
            )  # fmt: skip
        else:
            begin, span, kv_head, col0, batch, unit = _place_of_block(
                item, units, at_once, heads, group, q_len, kv_len, left, right, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT
            )
            tile = unit * (group * all_tiles)
            if RING:
                wait_for_room(counters, unit // in_turn, turns, units, in_turn, group * all_tiles)
                tile = first_tile(unit, turns, in_turn, group * all_tiles)
            place = begin, span, kv_head, col0, batch, tile  # type: ignore[assignment]
            number_batch = batch
            first_row = 0
            k_batch = batch
            rows = 0
            keys = 0
        head = kv_head * group
        start = begin
        for number in range(group * span):
            mbarrier.wait(empty.index(stage), phase)
            # A tile of numbers of rows is 4 bytes each.
            numbers: gl.constexpr = 4 * _ROWS * (BIAS_ROWS + DELTA)
            mbarrier.expect(full.index(stage), q.block_type.nbytes + do.block_type.nbytes + numbers)
            if BIAS_ROWS:
                of_head = number_batch * stride_bias_b + head * stride_bias_h
                load_tile(bias, [of_head, first_row + start], full.index(stage), biases.index(stage))
            if DELTA:
                of_head = number_batch * heads + head
                load_tile(delta, [of_head, first_row + start], full.index(stage), deltas.index(stage))
            load_rows(q, batch, head, start, 0, rows, full.index(stage), q_tiles.index(stage), PACKED)
            load_rows(do, batch, head, start, 0, rows, full.index(stage), do_tiles.index(stage), PACKED)
            if number == 0:
                mbarrier.wait(kv_empty.index(buffer), kv_phase)
                _put_place(places, buffer, place)
                sync()
                mbarrier.expect(k_full.index(buffer), k.block_type.nbytes)
                load_rows(k, k_batch, kv_head, col0, 0, keys, k_full.index(buffer), k_tiles.index(buffer), PACKED)
                mbarrier.expect(v_full.index(buffer), v.block_type.nbytes)
                load_rows(v, k_batch, kv_head, col0, 0, keys, v_full.index(buffer), v_tiles.index(buffer), PACKED)
            stage += 1
            start += _ROWS
            if stage == _STAGES:
                stage = 0
                phase ^= 1
            if start >= begin + span * _ROWS:
                head += 1
                start = begin
        if BUFFERS == 2:
            buffer ^= 1
        if buffer == 0:
            kv_phase ^= 1
        item = taken(take(items_taken(counters)))
        if not RING:
            item += gl.num_programs(0)
    mbarrier.wait(kv_empty.index(buffer), kv_phase)
    _put_place(places, buffer, (0, 0))
    sync()
    mbarrier.arrive(k_full.index(buffer))


@gluon.jit
def count_items(shared, RING: gl.constexpr):
    """Counts the program's items when all that they add to dQ is on its way: a release is slow, and the others need
    not wait for it."""
    counters, places, k_full, kv_empty, keys_read, in_turn, kv_heads = shared
    BUFFERS: gl.constexpr = k_full.shape[0]
    if RING:
        buffer = 0
        kv_phase = 0
        mbarrier.wait(k_full.index(0), 0)
        span = number_of(places, 0, 1)
        while span > 0:
            unit = number_of(places, buffer, 4) * kv_heads + number_of(places, buffer, 2)
            mbarrier.wait(keys_read.index(buffer), kv_phase)
            mbarrier.arrive(kv_empty.index(buffer))
            count(items_ended(counters, unit // in_turn), 1)
            if BUFFERS == 2:
                buffer ^= 1
            if buffer == 0:
                kv_phase ^= 1
            mbarrier.wait(k_full.index(buffer), kv_phase)
            span = number_of(places, buffer, 1)
