"""What the kernels under a mask by blocks (:class:`sigswap.kernels.host.blocks.Blocks`) share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sigswap.kernels.host.blocks import BLOCK, HEADER, WORDS, Blocks
from sigswap.kernels.host.forms import ACCURATE, AUTO
from sigswap.kernels.host.layout import Layout, contiguous_layout, layout_of
from sigswap.kernels.host.problem import Problem, Signature
from sigswap.kernels.host.tiles import Tile
from sigswap.kernels.triton.common import UNSPECIALIZED

_BLOCK = tl.constexpr(BLOCK)
_HEADER = tl.constexpr(HEADER)
_WORDS = tl.constexpr(WORDS)

UNSPECIALIZED_BLOCKS = (
    *UNSPECIALIZED,
    *("members", "span", "stride_seen_b", "stride_seen_h", "stride_list_b", "stride_list_h", "stride_list_n"),
)


def supports(problem: Problem) -> bool:
    return problem.signature.too_much() is None and problem.options.dropout_p == 0.0


def within_block(tile: Tile) -> Tile:
    """The tile, no larger than a block."""
    rows, keys = min(tile.rows, BLOCK), min(tile.keys, BLOCK)
    smaller = rows * keys <= tile.rows * tile.keys // 2
    return tile._replace(rows=rows, keys=keys, warps=4 if smaller and tile.warps == 8 else tile.warps)


def form_of(signature: Signature) -> int:
    """As :meth:`Signature.form`, but where it is by how many keys there are, the kernel decides: a row may see few."""
    form = signature.form()
    by_length = signature.mixed_forms and signature.query.dtype == torch.bfloat16 and signature.options.visible_bias
    return AUTO if form == ACCURATE and by_length else form


class BlockLayouts(NamedTuple):
    """Of the tensors of :class:`Blocks`, all contiguous."""

    visible: Layout
    rows: Layout
    keys: Layout
    bits: Layout

    def arguments(self, lists: Layout) -> dict[str, int]:
        """How visible, and the lists (rows or keys), lie in memory."""
        strides = (*self.visible.strides_or_zero(2), *lists.strides_or_zero(2), lists.shape[3])
        names = ("seen_b", "seen_h", "list_b", "list_h", "list_n")
        return {f"stride_{name}": stride for name, stride in zip(names, strides, strict=True)}


def layouts_of(blocks: Blocks) -> BlockLayouts:
    # The number of mixed blocks is nothing that a launch depends on.
    visible, rows, keys = map(layout_of, blocks[:3])
    return BlockLayouts(visible, rows, keys, contiguous_layout((1, BLOCK, WORDS)))


@triton.jit
def place_of_program(blocks, members, span):
    """(number in the order of the longest first, member): members are taken span at a time, each time all of their
    blocks, the longest first; so that what runs at once shares keys and values, and the short ones come last."""
    program = tl.program_id(0)
    first = program // (blocks * span) * span
    width = tl.minimum(span, members - first)
    rest = program - first * blocks
    return rest // width, first + rest % width


@triton.jit
def own_block(lists, number, stride, TILE: tl.constexpr):
    """(the list of the block that tile ``number`` is in, its first row or key), tiles counted from the longest list."""
    tiles: tl.constexpr = _BLOCK // TILE
    block = tl.load(lists + (number // tiles).to(tl.int64) * stride + 2)
    return lists + block.to(tl.int64) * stride, block * _BLOCK + number % tiles * TILE


# A loop over listed blocks loads the next block's number, the next part's words, and where those after them are, a
# round ahead. What is loaded in the round in which it is used would be staged in shared memory, with fewer rounds of
# keys and values in flight, and room for fewer programs on a multiprocessor.


@triton.jit
def place_of(places, at, count):
    """Where the bits of the block are that is ``at`` rows (or keys) after the first one listed; 0 behind the last."""
    entry = at // _BLOCK
    return tl.load(places + entry, mask=entry < count, other=0)


@triton.jit
def words_of(bits, place, lane0, other0, LANES: tl.constexpr, OTHERS: tl.constexpr):
    """The bits of a part of a mixed block: for each of its rows (then others are keys), or keys, the words that OTHERS
    bits are in, up to four. lane0, other0: the part's first within the block."""
    lane = lane0 + tl.arange(0, LANES)
    words = bits + tl.cast(place, tl.int64) * (_BLOCK * _WORDS) + (lane * _WORDS + other0 // 32)
    first = tl.load(words)
    if OTHERS < 32:
        first = first >> (other0 - other0 // 32 * 32)
    second, third, fourth = first, first, first
    if OTHERS >= 64:
        second = tl.load(words + 1)
    if OTHERS >= 128:
        third = tl.load(words + 2)
        fourth = tl.load(words + 3)
    return first, second, third, fourth


@triton.jit
def seen_in(first, second, third, fourth, OTHERS: tl.constexpr):
    """Which scores are visible, [LANES, OTHERS], by :func:`words_of`."""
    other = tl.arange(0, OTHERS)[None, :]
    word = first[:, None]
    if OTHERS >= 64:
        word = tl.where(other < 32, word, second[:, None])
    if OTHERS >= 128:
        word = tl.where(other < 64, word, tl.where(other < 96, third[:, None], fourth[:, None]))
    # In two steps, of which the first is the same for every eighth and the second's shift a constant in a thread.
    return (((word >> (other & 7)) >> (other & 24)) & 1) != 0
