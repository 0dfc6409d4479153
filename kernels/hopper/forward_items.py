"""The items of the forward on Hopper GPUs, rows of a head each: how many rows, and in which order programs get them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sigswap.kernels.host.problem import Signature


class Tile(NamedTuple):
    """A tile configuration."""

    warpgroups: int
    """That compute, each with 64 rows of an item."""
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
    held: bool = False
    """Whether queries are held in registers, and not read from shared memory with each block of keys."""
    turns: bool = True
    """Whether the warpgroups take turns in starting their matrix products."""

    @property
    def rows(self) -> int:
        """Of an item."""
        return self.warpgroups * 64

    @property
    def registers(self) -> int:
        """Of a thread that computes."""
        return {2: 240, 3: 160, 4: 112}[self.warpgroups]

    def arguments(self, head_dim: int, value_dim: int) -> dict[str, int]:
        """The kernel's that are its own."""
        cut = pieces_of(head_dim, value_dim) == (2, 2)
        return {
            "WARPGROUPS": self.warpgroups,
            "STAGES": self.stages,
            "PARTS": triton.cdiv(head_dim, self.part),
            "V_PARTS": triton.cdiv(value_dim, self.v_part),
            "CUT": cut and head_dim <= 96,
            "V_CUT": cut and value_dim <= 96,
            "HELD": self.held,
            "TURNS": self.turns,
            "REGISTERS": self.registers,
        }


TILES = {
    (1, 1): Tile(4, 64, 6, 64, 64, 64),
    (2, 2): Tile(2, 128, 2, 128, 128, 128, held=True),
    (2, 3): Tile(2, 64, 4, 128, 64, 64),
    (2, 4): Tile(2, 64, 3, 128, 256, 128),
    (3, 2): Tile(2, 128, 2, 64, 128, 64),
    (3, 3): Tile(2, 64, 3, 64, 64, 64),
    (3, 4): Tile(2, 64, 2, 64, 256, 128),
    (4, 2): Tile(2, 64, 3, 256, 128, 64),
    (4, 3): Tile(2, 64, 2, 256, 64, 64),
    (4, 4): Tile(2, 64, 2, 256, 256, 128),
}
"""By how many times 64 columns hold head_dim, and value's. They fill shared memory or the registers, of which a thread
needs half as many as the output has columns, half as many as a block has keys, for scores, and half of that again, for
probabilities."""

LONG = Tile(3, 64, 4, 128, 128, 128, turns=False)
"""For head_dim 97 to 128 in long sequences: an item has more rows, so that keys and values are read less often from L2;
of short sequences the last item would be half empty, and of the longest without a band queries in registers are better.

TFLOP/s on an H200 in bfloat16 with 16,384 tokens of 16 heads, full and causal, at head_dim 128, by length:

==========  =========  =========  =========
..          1024       4096       16,384
==========  =========  =========  =========
TILES       683 / 521  711 / 674  748 / 671
LONG        615 / 450  752 / 684  727 / 724
==========  =========  =========  =========

Queries from shared memory gave 664 / 517, 684 / 653 and 723 / 695, cuDNN's softmax 572 / 422, 592 / 494 and 623 / 544.
In another run it was the other way round at 4096 causal: LONG 659, queries from shared memory 705 (full 730 and 706).
At head_dim 64 (32 heads) TILES give 521 / 397, 574 / 542 and 537 / 537, two warpgroups of 64 rows 457 / 369,
489 / 466 and 488 / 471, and :mod:`sigswap.kernels.triton.forward` 476 / 363, 529 / 471 and 523 / 470.
At 96 and 4096 TILES give 628 / 580, and 562 / 525 if 128 columns are multiplied; LONG gave 521 / 504."""


def pieces_of(head_dim: int, value_dim: int) -> tuple[int, int]:
    """How many times 64 columns hold them."""
    return triton.cdiv(head_dim, 64), triton.cdiv(value_dim, 64)


def tile_for(signature: Signature) -> Tile:
    dims = signature.query.shape[3], signature.value.shape[3]
    pieces = pieces_of(*dims)
    return LONG if pieces == (2, 2) and min(dims) > 96 and _is_long(signature) else TILES[pieces]


def _is_long(signature: Signature) -> bool:
    band = signature.band()
    shortest = min(signature.q_len, signature.kv_len)
    if band.has_left or shortest < 3072:
        return False
    return shortest > 4096 if band.has_right else signature.kv_len <= 8192


def sees_in_every_item(signature: Signature, rows: int) -> bool:
    """Whether some row of each item, which has so many, sees some key. An item whose rows see none would yet work
    through a block of keys, where 0 times NaN is NaN."""
    shift, left, right = signature.options.band(signature.q_len, signature.kv_len)
    last_item = (signature.q_len - 1) // rows * rows
    first_sees = right is None or min(rows, signature.q_len) - 1 + shift + right >= 0
    return first_sees and (left is None or last_item + shift - left < signature.kv_len)


class Order(NamedTuple):
    """Of the items. Those of so many heads are mixed, group by group: the last rows first, or, in every other group,
    last. The programs get them in turn."""

    at_once: int
    """Heads of a group."""
    to_and_fro: bool
    """Whether in every other turn the last program gets the first item."""


def order_for(signature: Signature, tile: Tile, programs: int) -> Order:
    """Programs that run at the same time should read the same keys, but under a causal mask items differ in length, and
    all programs should end at the same time."""
    band, units, blocks = signature.band(), signature.batch * signature.heads, triton.cdiv(signature.q_len, tile.rows)
    if band.has_left == band.has_right:
        return Order(1, True)  # all items take equally long
    counts = key_blocks(signature, tile)
    # A group for each turn, or for two: then a program gets items of all lengths. The fewer heads, the fewer keys.
    orders = [Order(programs // blocks, False), Order(2 * programs // blocks, True), Order(programs // 4, True)]
    orders = [order._replace(at_once=min(max(1, order.at_once), units)) for order in (*orders, Order(units, True))]
    times = [longest(order, counts + 1, units, programs) for order in orders]
    return next(order for order, time in zip(orders, times, strict=True) if time <= 1.02 * min(times))


def key_blocks(signature: Signature, tile: Tile) -> np.ndarray:
    """How many blocks of keys an item takes, by its rows; as place() has it."""
    shift, left, right = signature.options.band(signature.q_len, signature.kv_len)
    row = np.arange(0, signature.q_len, tile.rows)
    end = np.minimum(row + tile.rows, signature.q_len) + shift
    last = signature.kv_len if right is None else np.minimum(end + right, signature.kv_len)
    first = 0 if left is None else np.clip(row + shift - left, 0, signature.kv_len - 1) // tile.keys * tile.keys
    return np.maximum(-((first - last) // tile.keys), np.ones_like(row))


def longest(order: Order, times: np.ndarray, units: int, programs: int) -> int:
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
def own_items(total, order):
    """How many of all items are this program's."""
    programs = gl.num_programs(0)
    rounds = total // programs
    return rounds + (item_of(rounds, order) < total).to(gl.int32)


@gluon.jit
def item_of(turn, order):
    """The item of this program in its turn."""
    programs = gl.num_programs(0)
    slot = gl.program_id(0)
    return turn * programs + gl.where((order < 0) & (turn % 2 == 1), programs - 1 - slot, slot)


@gluon.jit
def place(
    item, units, order, heads, q_len, kv_len, shift, left, right,
    ROWS: gl.constexpr, KEYS: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """Of an item the batch, the head, the first row, the first key that some row sees, and how many blocks of keys."""
    blocks = gl.cdiv(q_len, ROWS)
    at_once = gl.abs(order)
    group = item // (at_once * blocks)
    first = group * at_once
    among = gl.minimum(at_once, units - first)
    rest = item - first * blocks
    # Under a causal mask the last rows take longest. They come first, and last in every other group of heads before.
    block = rest // among
    block = gl.where((gl.cdiv(units, at_once) - group) % 2 == 1, blocks - 1 - block, block)
    row0 = block * ROWS
    unit = first + rest % among
    begin = 0
    end = kv_len
    if HAS_LEFT:
        begin = gl.minimum(gl.maximum(row0 + shift - left, 0), kv_len - 1) // KEYS * KEYS
    if HAS_RIGHT:
        end = gl.minimum(end, gl.minimum(row0 + ROWS, q_len) + shift + right)
    return unit // heads, unit % heads, row0, begin, gl.maximum(gl.cdiv(end - begin, KEYS), 1)
