"""The float32 sums of dQ of :mod:`sigswap.kernels.hopper.backward` in a ring of memory that stays in L2, and what
becomes of them while other items are worked on.

Sums of all rows are twice dQ's bytes: filling them with zeros, adding to them and putting them in order would move them
through the GPU's memory three times. Heads that are worked on together have a turn. When all items of a turn have
ended, its tiles are rounded, written as dQ, and filled with zeros for a later turn, by warps that do nothing else.

What one program writes and another one reads is ordered by counters in memory, each of which is added to with release,
and waited for with acquire: of each turn how many of its items have ended, and how many of its tiles are free again.
No one waits for what has not been started: items and tiles are taken in order, those of a turn before those of the
next, and who takes items waits, before the first of a turn, for tiles of an earlier turn alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sigswap.kernels.hopper.backward_common import _ROWS, visible_keys
from sigswap.kernels.hopper.common import Numbers, Tiles, load_tile, sync
from sigswap.kernels.host.launch import Described
from sigswap.kernels.host.layout import Layout
from sigswap.kernels.host.problem import Signature

CHUNK_ROWS = tl.constexpr(4)
"""Of 256 numbers: the sums in chunks, of which a tile has one for each 16 columns."""


PIECE = tl.constexpr(16)
"""Rows and columns of dQ that are in registers at a time."""


class Ring(NamedTuple):
    """How many key heads have a turn, for how many turns there is room, and how many counters are behind the sums."""

    in_turn: int
    turns: int
    counters: int


LONGEST = {64: 4096, 96: 4096, 128: 1024}
"""By the columns of heads that are multiplied: visible keys per row, on average, of more of which it is no faster.

Times without a ring / with one on an H200, 16,384 tokens of width 2048: at 64 1.06 (1,024, causal), 1.04 (4,096,
causal), 0.98 to 0.99 (16,384, causal), without a band 1.02 to 1.09, 1.03 and 1.01; at 96 1.03 (4,096, causal); at 128
1.0 to 1.03, 0.98, 0.99, without a band 1.06, 0.98 to 1.0 and 1.0. At 128 who computes adds to the sums, too, and waits
when memory is busy. With a window of 512 or 1,024 0.98 to 1.02, with a soft cap 0.98 and 0.99."""


def ring_for(signature: Signature, columns: int, units: int, at_once: int, blocks: int, programs: int) -> Ring | None:
    """A turn is as many items as there are programs, at least. There is room for the turn that is worked on, for the
    one whose tiles are being finished, and for the next.

    units: key heads, with so many blocks of keys each; at_once of them are mixed.
    """
    if signature.packed is not None or signature.band().has_left or signature.options.softcap > 0.0:
        return None
    if visible_keys(signature) > LONGEST[columns] * signature.q_len:
        return None
    in_turn = at_once * triton.cdiv(programs, at_once * blocks)
    all_turns = triton.cdiv(units, in_turn)
    turns = min(1 + triton.cdiv(2 * programs, in_turn * blocks), all_turns)
    # Of items and tiles that were taken, and two of each turn.
    return Ring(in_turn, turns, 2 + 2 * all_turns)


class Chunks(Numbers):
    """The sums for the unit that copies tiles: all their numbers in rows of 256, in chunks."""

    def __init__(self, numbers: int) -> None:
        Described.__init__(self, (numbers // 256, 256), (256, 1), (CHUNK_ROWS.value, 256), torch.float32)


class Pieces(Tiles):
    """dQ [B, H, M, D] for the unit that copies tiles, 16 rows and columns of a head at a time."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout, PIECE.value, PIECE.value)

    def describe(self, tensor: Tensor) -> Any:
        shared = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=4)
        return TensorDescriptor(tensor, list(self.shape), list(self.strides), list(self.block), shared)


# Device functions, of one warp each.


@gluon.jit
def take(counter):
    """How many were taken before, to be asked for by :func:`taken` when they are needed."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred first; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0; mov.u32 $0, 0; "
        "@first atom.relaxed.gpu.global.add.u32 $0, [$1], 1; }",
        "=&r,l", [counter.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def taken(number):
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _wait_for(counter, number):
    """Until as many have been counted."""
    gl.inline_asm_elementwise(
        "{ .reg .pred enough; .reg .b32 n; AGAIN: ld.relaxed.gpu.global.u32 n, [$1]; setp.ge.s32 enough, n, $2; "
        "@enough bra ENOUGH; nanosleep.u32 200; bra AGAIN; ENOUGH: ld.acquire.gpu.global.u32 n, [$1]; mov.u32 $0, 0; }",
        "=r,l,r", [counter.to(gl.int64), number], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def count(counter, number):
    """So many more, which the warp, or whom it waited for, is done with."""
    gl.inline_asm_elementwise(
        "{ .reg .pred first; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0; "
        "bar.warp.sync 0xffffffff; @first red.release.gpu.global.add.u32 [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [counter.to(gl.int64), number], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def items_taken(counters):
    return counters


@gluon.jit
def _tiles_taken(counters):
    return counters + 1


@gluon.jit
def items_ended(counters, turn):
    return counters + 2 + turn


@gluon.jit
def _tiles_free(counters, turn, units, in_turn):
    return counters + 2 + gl.cdiv(units, in_turn) + turn


@gluon.jit
def first_tile(unit, turns, in_turn, tiles):
    """In the ring, of a key head, all heads of which have so many tiles."""
    return unit % (turns * in_turn) * tiles


@gluon.jit
def wait_for_room(counters, turn, turns, units, in_turn, tiles):
    """Until the tiles that a turn adds to are those of an earlier turn no more."""
    if turn >= turns:
        _wait_for(_tiles_free(counters, turn - turns, units, in_turn), in_turn * tiles)


@gluon.jit
def finish_tiles(
    shared, chunks, dq, buffers, zeros, results, loaded, DIM: gl.constexpr, FIRST: gl.constexpr, RING: gl.constexpr
):
    """Takes tiles until there are none: writes them as dQ, from the order in which add_tile() put them in memory, and
    fills them with zeros. All goes through shared memory, a piece at a time: the warp has few registers, and what it
    would load and store by itself would keep the sums of others waiting.

    FIRST: columns that were added as one tile; the rest are another one.
    """
    if RING:
        counters, units, in_turn, turns, items, heads, group, tiles, scale = shared
        BUFFERS: gl.constexpr = buffers.shape[0]
        CHUNKS: gl.constexpr = DIM // 16
        phase = 0
        ended = -1
        finished = 0
        tile = taken(take(_tiles_taken(counters)))
        while tile < units * group * tiles:
            next_tile = take(_tiles_taken(counters))
            unit = tile // (group * tiles)
            among = tile % (group * tiles)
            turn = unit // in_turn
            if turn != ended:
                # Both are slow, and may wait for each other: once a turn, first what others wait for.
                if finished > 0:
                    _count_finished(_tiles_free(counters, ended, units, in_turn), finished)
                    finished = 0
                _wait_for(items_ended(counters, turn), gl.minimum(in_turn, units - turn * in_turn) * items)
                _others_see_memory()
                ended = turn
            place = (first_tile(unit, turns, in_turn, group * tiles) + among) * (CHUNKS * CHUNK_ROWS)
            head = unit * group + among // tiles  # of all batches
            start = among % tiles * _ROWS
            for chunk in gl.static_range(BUFFERS):
                _load_chunk(chunks, place, chunk, buffers.index(chunk), loaded.index(chunk))
            for chunk in gl.static_range(CHUNKS):
                mbarrier.wait(loaded.index(chunk % BUFFERS), phase ^ (chunk // BUFFERS % 2))
                tma.async_copy_shared_to_global(chunks, [place + chunk * CHUNK_ROWS, 0], zeros)
                tma.store_wait(1)  # for results of the chunk before, but not for zeros
                sync()
                numbers = buffers.index(chunk % BUFFERS)
                numbers = numbers._reinterpret(gl.float32, [4, 256], gl.SwizzledSharedLayout(1, 1, 1, [0]))
                for piece in gl.static_range(4):
                    _round(numbers.index(piece), scale, results.index(piece), DIM == FIRST)
                fence_async_shared()
                sync()
                for piece in gl.static_range(4):
                    _store(dq, head // heads, head % heads, start, results.index(piece), 4 * chunk + piece, DIM, FIRST)
                if chunk + BUFFERS < CHUNKS:
                    buffer = chunk % BUFFERS
                    _load_chunk(chunks, place, chunk + BUFFERS, buffers.index(buffer), loaded.index(buffer))
            if CHUNKS // BUFFERS % 2 == 1:
                phase ^= 1
            finished += 1
            tile = taken(next_tile)
        if finished > 0:
            _count_finished(_tiles_free(counters, ended, units, in_turn), finished)


@gluon.jit
def _round(numbers, scale, result, BY_COLUMN: gl.constexpr):
    values = numbers.load(gl.BlockedLayout([4], [32], [1], [0])) * scale
    # [eight columns, row, two columns, row and that 8 below, column], or, BY_COLUMN, rows and columns the other way.
    low = values.to(result.dtype).reshape([2, 8, 4, 2, 2])
    low = low.permute((0, 2, 4, 3, 1)) if BY_COLUMN else low.permute((3, 1, 0, 2, 4))
    result.reshape([PIECE, PIECE]).store(low.reshape([PIECE, PIECE]))


@gluon.jit
def _store(dq, batch, head, start, result, NUMBER: gl.constexpr, DIM: gl.constexpr, FIRST: gl.constexpr):
    """The piece of that number: of the columns that were added together, pieces follow one another by rows, or, if all
    were, by columns."""
    BEFORE: gl.constexpr = NUMBER * 4 // FIRST * FIRST
    ACROSS: gl.constexpr = (FIRST if BEFORE + FIRST <= DIM else DIM - BEFORE) // PIECE
    DOWN: gl.constexpr = (NUMBER - BEFORE // 4) // ACROSS
    ALONG: gl.constexpr = (NUMBER - BEFORE // 4) % ACROSS
    ROW: gl.constexpr = (ALONG if DIM == FIRST else DOWN) * PIECE
    COLUMN: gl.constexpr = BEFORE + (DOWN if DIM == FIRST else ALONG) * PIECE
    tma.async_copy_shared_to_global(dq, [batch, head, start + ROW, COLUMN], result)


@gluon.jit
def _load_chunk(chunks, place, chunk, buffer, loaded):
    mbarrier.expect(loaded, chunks.block_type.nbytes)
    load_tile(chunks, [place + chunk * CHUNK_ROWS, 0], loaded, buffer)


@gluon.jit
def _count_finished(counter, number):
    _wait_for_stores()
    count(counter, number)


@gluon.jit
def _others_see_memory():
    """What is in memory to this warp is so to the unit that copies tiles."""
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _wait_for_stores():
    """Until copies to memory are there, not only read, as tma.store_wait() does."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; fence.proxy.async.global; mov.u32 $0, 0;", "=r", [], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip
