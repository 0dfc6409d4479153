"""Packed sequences on Hopper GPUs: what the kernels for one length need to take sequences of different lengths.

- A plan says of which sequence an item of the forward is, or a program of the backward. A small kernel makes it from
  cu_seqlens, so that no launch waits for their values. Wrong ones are cut off at the tensors' ends.
- The longest sequence comes first, so that all programs end at the same time. Of a sequence as many heads are mixed as
  fill the GPU a few times, what takes longest first: so what runs at once reads the same rows and keys, from L2.
- Descriptors have bounds: beyond them rows are zeros, and are not written. :class:`Ragged` ones, after the idea of
  ``triton.tools.ragged_tma``, have those of the sequence that a tile is loaded for. So the kernels need no masks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sigswap.kernels.hopper.common import Numbers, Tiles, load_tile, store_tile
from sigswap.kernels.host.launch import Launch
from sigswap.kernels.host.layout import Layout, contiguous_layout, new_tensor
from sigswap.kernels.host.problem import Problem, Signature
from sigswap.kernels.host.tiles import limits_of
from sigswap.kernels.triton.common import row_biases, single

SHORTEST = 256
"""Of rows and of keys, on average: of shorter sequences much of an item is empty."""

TILE = 64
"""Rows of a tile of dQ."""

_FAR = 1 << 30
"""Of rows that a descriptor of sequences has, for the hardware. See :class:`Ragged`."""

_MOST = 0x7FFF0000
"""Of a dimension, whose bound is never met."""

_TURN = 1 << 34
"""Elements; _FAR times as many are a multiple of 2^64 bytes."""

_ENTRY, _BLOCKS, _SEQUENCES = 8, 128, 32

_FAR_ROW, _NUMBERS, _AT_ONCE, _OTHERS, _TILE = (tl.constexpr(n) for n in (_FAR, _ENTRY, _BLOCKS, _SEQUENCES, TILE))


def is_long(signature: Signature) -> bool:
    """Whether packed sequences are long enough, as far as can be known without looking at their lengths."""
    if signature.packed is None or not signature.descriptors or signature.element_size != 2:
        return False
    if signature.batch == 0:  # no program would make the plan
        return False
    rows, keys = signature.query.shape[2], signature.key.shape[2]
    if (
        max(rows, keys) >= _FAR
        or max(each.strides[2] for each in (signature.query, signature.key, signature.value)) >= _TURN
    ):
        return False
    return min(rows, keys) >= SHORTEST * signature.batch


class Ragged(Tiles):
    """A [1, H, total, D] tensor of packed sequences for Gluon, whose tiles end with the sequence.

    Two dimensions are put before it, which are the rows' dimension again, so that a tile is addressed by the end of its
    sequence, and by how far its rows are from there: the rows' dimension ends where they reach the end. The first of
    the two takes back what is added so; addresses wrap around at 2^64.
    """

    def __init__(self, layout: Layout, rows: int, columns: int = 0) -> None:
        super().__init__(layout, rows, columns)
        _, heads, _, dim = self.shape
        _, of_head, of_row, _ = self.strides
        self.shape = (_MOST, _MOST, heads, _FAR, dim)
        self.strides = (_TURN - of_row, of_row, of_head, of_row, 1)
        self.block = (1, *self.block)

    def describe(self, tensor: Tensor) -> Any:
        shared = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=5)
        return TensorDescriptor(tensor, list(self.shape), list(self.strides), list(self.block), shared)


def tiles_of(signature: Signature) -> type[Tiles]:
    """How Gluon gets the problem's tensors."""
    return Tiles if signature.packed is None else Ragged


class TileNumbers(NamedTuple):
    """Puts numbers of rows, float32, in the order of the tiles of dQ, of which each begins at a multiple of 64, so that
    descriptors hold them; behind a sequence's last row they are 0. They are the row biases, or others that are given,
    [1, H|1, total, 1]."""

    launch: Launch
    layout: Layout
    floor: Layout | None
    """Of the least of each tile."""
    described: Numbers

    def __call__(self, plan: Tensor, tiles: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor | None]:
        out = new_tensor(self.layout, plan.device)
        floor = None if self.floor is None else new_tensor(self.floor, plan.device)
        self.launch(out, floor, given, plan, tiles)
        return out, floor


def tile_numbers_for(signature: Signature, given: Layout | None, *, biases: bool) -> TileNumbers:
    """biases: whether they are the row biases, which given is a part of."""
    heads = given.shape[1] if given is not None else 1
    tiles = most_tiles(signature)
    layout = contiguous_layout((1, heads, tiles * TILE), torch.float32)
    floor = contiguous_layout((heads, tiles), torch.float32) if biases else None
    stride_h, stride_m = (0, 0) if given is None else given.strides_or_zero(3)[1:]
    arguments = signature.arguments() | {
        "tiles": tiles,
        "BIASES": biases,
        "TILE": TILE,
        "stride_given_h": stride_h,
        "stride_given_m": stride_m,
    }
    all_tiles = contiguous_layout((_ENTRY * tiles,), torch.int32)
    tensors = (layout, floor, given, all_tiles, all_tiles)
    launch = Launch(numbers_kernel, heads * tiles, signature.device, tensors, arguments, num_warps=1)
    return TileNumbers(launch, layout, floor, Numbers(layout, TILE))


def programs_at_once(signature: Signature) -> int:
    """For how many programs the heads of a sequence are mixed."""
    return 2 * limits_of(signature.device).multiprocessors


def most_tiles(signature: Signature) -> int:
    """Of dQ of a head."""
    return signature.query.shape[2] // TILE + signature.batch


class Plan(NamedTuple):
    """Makes the plan of a launch, int32: how many items all heads have, how many tiles dQ has, and then 8 numbers for
    each item: its sequence's first row, how many rows, first key, how many keys, first item, how many items, and first
    tile among those of dQ. And 8 numbers for each tile of dQ: its first row, how many, the first one within its
    sequence, how many rows and keys that has."""

    launch: Launch
    layout: Layout
    tiles: Layout | None
    most: int
    """Items that there may be."""

    def __call__(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        device = problem.query.device
        plan = new_tensor(self.layout, device)
        tiles = None if self.tiles is None else new_tensor(self.tiles, device)
        self.launch(plan, tiles, *problem.cu_seqlens)
        return plan, tiles


def plan_for(signature: Signature, size: int, *, by_keys: bool = False) -> Plan:
    """by_keys: an item is so many keys, whose program adds to dQ; else so many rows."""
    assert signature.packed is not None
    total_q, total_k = signature.query.shape[2], signature.key.shape[2]
    sequences, longest_q, longest_k = signature.packed
    # None is longer than all together, whatever was said: else there would be programs without end.
    longest_q, longest_k = min(longest_q, total_q), min(longest_k, total_k)
    most = (total_k if by_keys else total_q) // size + sequences
    layout = contiguous_layout((_ENTRY * (most + 1),), torch.int32)
    tiles = contiguous_layout((_ENTRY * most_tiles(signature),), torch.int32) if by_keys else None
    arguments = signature.arguments() | {
        "longest_q": longest_q,
        "longest_k": longest_k,
        "sequences": sequences,
        "chunks": max(1, triton.cdiv(triton.cdiv(longest_k if by_keys else longest_q, size), _BLOCKS)),
        "most": most,
        "most_tiles": most_tiles(signature),
        "BY_KEYS": by_keys,
        "SIZE": size,
        "TILE": TILE,
    }
    tensors = (layout, tiles, *signature.cu_layouts())
    launch = Launch(plan_kernel, sequences * arguments["chunks"], signature.device, tensors, arguments, num_warps=4)
    return Plan(launch, layout, tiles, most)


# Kernels.


@triton.jit
def _sequences(cu, number, inside, longest, total):
    """As triton.common.sequence(), of several."""
    begin = tl.minimum(tl.maximum(tl.load(cu + number, mask=inside, other=0), 0), total)
    end = tl.minimum(tl.maximum(tl.load(cu + number + 1, mask=inside, other=0), begin), total)
    return begin, tl.minimum(end - begin, longest)


@triton.jit(do_not_specialize=[
    "longest_q", "longest_k", "total_q", "total_k", "sequences", "chunks", "most", "most_tiles",
])  # fmt: skip
def plan_kernel(
    plan, tiles, cu_q, cu_k, longest_q, longest_k, total_q, total_k, sequences, chunks, most, most_tiles,
    BY_KEYS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: up to 128 items of one sequence, which come behind those of longer ones, and of as long ones before
    it."""
    own = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    q_begin, q_len = _sequences(cu_q, own, True, longest_q, total_q)
    k_begin, kv_len = _sequences(cu_k, own, True, longest_k, total_k)
    items = tl.cdiv(kv_len if BY_KEYS else q_len, SIZE)
    own_tiles = tl.cdiv(q_len, TILE) if BY_KEYS else 0
    if (chunk > 0) & (tl.maximum(items, own_tiles) <= chunk * _AT_ONCE):
        return
    length = q_len if BY_KEYS else kv_len
    # Of wrong cu_seqlens sequences may overlap, so that there are too many items and tiles: all are counted up to where
    # the plan ends, which also keeps sums within their type, and the last sequence gets what is left.
    first_item = 0
    first_tile = 0
    all_items = 0
    all_tiles = 0
    for first in range(0, sequences, _OTHERS):
        other = first + tl.arange(0, _OTHERS)
        _, others_q_len = _sequences(cu_q, other, other < sequences, longest_q, total_q)
        _, others_kv_len = _sequences(cu_k, other, other < sequences, longest_k, total_k)
        others_items = tl.cdiv(others_kv_len if BY_KEYS else others_q_len, SIZE)
        others_length = others_q_len if BY_KEYS else others_kv_len
        before = (others_length > length) | ((others_length == length) & (other < own))
        others_tiles = tl.cdiv(others_q_len, TILE)
        first_item = tl.minimum(first_item + tl.sum(tl.where(before, others_items, 0)), most)
        first_tile = tl.minimum(first_tile + tl.sum(tl.where(other < own, others_tiles, 0)), most_tiles)
        all_items = tl.minimum(all_items + tl.sum(others_items), most)
        all_tiles = tl.minimum(all_tiles + tl.sum(others_tiles), most_tiles)
    if tl.program_id(0) == 0:
        tl.store(plan, all_items)
        tl.store(plan + 1, all_tiles)
    if BY_KEYS:
        q_len = tl.where(first_tile + own_tiles <= most_tiles, q_len, 0)
    items = tl.minimum(items, most - first_item)
    item = chunk * _AT_ONCE + tl.arange(0, _AT_ONCE)
    entry = plan + (1 + first_item + item) * _NUMBERS
    inside = item < items
    tl.store(entry, q_begin, mask=inside)
    tl.store(entry + 1, q_len, mask=inside)
    tl.store(entry + 2, k_begin, mask=inside)
    tl.store(entry + 3, kv_len, mask=inside)
    tl.store(entry + 4, first_item, mask=inside)
    tl.store(entry + 5, items, mask=inside)
    tl.store(entry + 6, tl.minimum(first_tile, most_tiles - 1), mask=inside)
    if tiles is not None:
        own_tiles = tl.minimum(own_tiles, most_tiles - first_tile)
        for first in range(chunk * _AT_ONCE, own_tiles, chunks * _AT_ONCE):
            tile = first + tl.arange(0, _AT_ONCE)
            at = tiles + (first_tile + tile) * _NUMBERS
            there = tile < own_tiles
            tl.store(at, q_begin + tile * TILE, mask=there)
            tl.store(at + 1, tl.minimum(tl.maximum(q_len - tile * TILE, 0), TILE), mask=there)
            tl.store(at + 2, tile * TILE, mask=there)
            tl.store(at + 3, q_len, mask=there)
            tl.store(at + 4, kv_len, mask=there)


@triton.jit(do_not_specialize=["tiles", "left", "right", "const_bias", "stride_given_h", "stride_given_m"])
def numbers_kernel(
    out, floor, given, plan, all_tiles, tiles, left, right, const_bias, stride_given_h, stride_given_m,
    BIASES: tl.constexpr, VISIBLE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: the numbers of the rows of a tile of dQ, for one head; of the tiles that no sequence has, too."""
    head = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    at = all_tiles + tile * _NUMBERS
    there = tile < tl.load(plan + 1)
    first = tl.load(at, mask=there, other=0)
    length = tl.load(at + 1, mask=there, other=0)
    q_len = tl.load(at + 3, mask=there, other=0)
    kv_len = tl.load(at + 4, mask=there, other=0)
    place = tl.arange(0, TILE)
    inside = place < length
    numbers = tl.zeros((TILE,), tl.float32)
    if given is not None:
        own = given + head.to(tl.int64) * stride_given_h + (first + place).to(tl.int64) * stride_given_m
        numbers += tl.load(own, mask=inside, other=0.0).to(tl.float32)
    if BIASES:
        row = tl.load(at + 2, mask=there, other=0) + place
        shift = kv_len - q_len if BOTTOM_RIGHT else 0
        numbers += row_biases(
            row, given, 0, None, 0, single(const_bias), q_len, kv_len, shift, left, right,
            False, VISIBLE, HAS_LEFT, HAS_RIGHT,
        )  # fmt: skip
        tl.store(floor + tl.program_id(0), tl.min(tl.where(inside, numbers, float("inf"))))
    tl.store(out + tl.program_id(0).to(tl.int64) * TILE + place, tl.where(inside, numbers, 0.0))


# Device functions.


@gluon.jit
def load_rows(described, batch, head, row, column, length, barrier, tile, PACKED: gl.constexpr):
    """A tile from a row on. If PACKED, batch is where a sequence of that length ends, and row is counted within it."""
    if PACKED:
        load_tile(described, [_FAR_ROW, batch, head, _FAR_ROW - length + row, column], barrier, tile)
    else:
        load_tile(described, [batch, head, row, column], barrier, tile)


@gluon.jit
def store_rows(described, batch, head, row, column, length, tile, PACKED: gl.constexpr):
    """As load_rows()."""
    if PACKED:
        store_tile(described, [_FAR_ROW, batch, head, _FAR_ROW - length + row, column], tile)
    else:
        store_tile(described, [batch, head, row, column], tile)


@gluon.jit
def place_in(plan, program, units, at_once):
    """Of a program of a plan: the first row of its sequence, how many there are, likewise of keys, the sequence's first
    item, how many it has, and first tile of dQ; the program's item in the sequence, and its unit, which is a head. Of
    those behind the last one all but the first item, which is different for each, and the unit are 0.

    at_once: items of so many heads are mixed that there are as many.
    """
    place = program // units
    at = plan + (1 + place) * _NUMBERS
    there = place < gl.load(plan)
    q_begin = gl.load(at, mask=there, other=0)
    q_len = gl.load(at + 1, mask=there, other=0)
    k_begin = gl.load(at + 2, mask=there, other=0)
    kv_len = gl.load(at + 3, mask=there, other=0)
    first = gl.load(at + 4, mask=there, other=0)
    items = gl.load(at + 5, mask=there, other=1)
    first_tile = gl.load(at + 6, mask=there, other=0)
    first = gl.where(there, first, place)
    heads = gl.minimum(gl.maximum(at_once // items, 1), units)
    rest = program - first * units
    first_unit = rest // (heads * items) * heads
    rest -= first_unit * items
    among = gl.minimum(heads, units - first_unit)
    return q_begin, q_len, k_begin, kv_len, first, items, first_tile, rest // among, first_unit + rest % among


@gluon.jit
def place_of_rows(
    plan, item, heads, at_once, left, right,
    ROWS: gl.constexpr, KEYS: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    BOTTOM_RIGHT: gl.constexpr,
):  # fmt: skip
    """As place(), of packed sequences: and before it the first row, how many rows there are, where the keys end, how
    many there are, and the shift. If no row sees a key, there is none: one block, of zeros, is worked through then."""
    q_begin, q_len, k_begin, kv_len, _, items, _, number, head = place_in(plan, item, heads, at_once)
    row0 = (items - 1 - number) * ROWS
    shift = kv_len - q_len if BOTTOM_RIGHT else 0
    begin = 0
    end = kv_len
    if HAS_LEFT:
        begin = gl.maximum(row0 + shift - left, 0)
    if HAS_RIGHT:
        end = gl.minimum(end, gl.minimum(row0 + ROWS, q_len) + shift + right)
    kv_len = gl.where(end > begin, kv_len, 0)
    begin = begin // KEYS * KEYS
    count = gl.maximum(gl.cdiv(end - begin, KEYS), 1)
    return q_begin, q_len, k_begin + kv_len, kv_len, shift, head, row0, begin, count


@gluon.jit
def place_of_keys(
    plan, program, units, at_once, left, right,
    KEYS: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, BOTTOM_RIGHT: gl.constexpr,
):  # fmt: skip
    """Of a program of the backward: its block of keys among all, and the key head; where the rows of the sequence end,
    how many of them are loaded, and how many there are, and the same of keys: nothing is loaded if no row sees one of
    the keys. The shift, the block's first key in the sequence, the first row that sees some, down to a multiple of 64,
    the one behind the last, and the sequence's first tile of dQ."""
    q_begin, q_len, k_begin, kv_len, first, _, first_tile, number, head = place_in(plan, program, units, at_once)
    block = first + number
    col0 = number * KEYS
    shift = kv_len - q_len if BOTTOM_RIGHT else 0
    begin = 0
    end = q_len
    if HAS_RIGHT:
        begin = gl.maximum(col0 - shift - right, 0)
    if HAS_LEFT:
        end = gl.minimum(end, gl.minimum(col0 + KEYS, kv_len) - shift + left)
    sees = end > begin
    loaded = gl.where(sees, q_len, 0)
    loaded_keys = gl.where(sees, kv_len, 0)
    begin = gl.where(sees, begin, 0) // _TILE * _TILE
    end = gl.where(sees, end, 0)
    rows_end = q_begin + loaded
    keys_end = k_begin + kv_len
    return (
        block, head, rows_end, loaded, q_len, keys_end, loaded_keys, kv_len, shift, col0, begin, end, first_tile
    )  # fmt: skip


@gluon.jit
def lowest_of_tiles(floor, place, group, stride_h, begin, end, LAYOUT: gl.constexpr):
    """The least number of some tiles, of some heads, which are as many tiles apart as stride_h has times 64 rows."""
    lowest = gl.full([128], float("inf"), gl.float32, LAYOUT)
    for member in range(group):
        own = floor + (place + member * stride_h).to(gl.int64)
        for first in range(begin, end, 128):
            tile = first + gl.arange(0, 128, LAYOUT)
            lowest = gl.minimum(lowest, gl.load(own + tile, mask=tile < end, other=float("inf")))
    return gl.min(lowest, 0)
