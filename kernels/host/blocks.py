"""A mask by blocks: which blocks of 128 rows by 128 keys are empty, full or mixed, and the bits of the mixed ones.

Kernels skip the empty blocks, run the full ones without a mask, and read one bit per score in the mixed ones. Nothing
here needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
"""Rows, and keys, of a block. The last ones may be shorter."""

HEADER = 4
"""Numbers before a list: how many full blocks are in it, how many mixed ones, and the number of the row or key block
whose list is the next longest one; the fourth is 0."""

WORDS = BLOCK // 32

MAX_CHUNK = 1 << 24
"""Scores, about, whose visibility is looked at at once."""

EMPTY, MIXED, FULL = 0, 1, 2

Part = Callable[[int, int], Tensor]
"""``part(first, last)``: which keys the rows first ... last - 1 see, bool [b, h, last - first, N]."""


class Blocks(NamedTuple):
    """The tensors of a mask [b, h, M, N], where b is the batch size or 1, and h the number of heads or 1: R blocks of
    rows, C blocks of keys, K of them mixed. All int32 and contiguous, on one device."""

    visible: Tensor
    """[b, h, M]: how many keys each row sees."""
    rows: Tensor
    """[b, h, R, HEADER + 2 C]: of each block of rows its header, its key blocks (the full ones, then the mixed ones,
    each by number; the others follow), and in the same order where the bits of each are."""
    keys: Tensor
    """[b, h, C, HEADER + 2 R]: likewise of each block of keys its row blocks."""
    row_bits: Tensor
    """[K, 128, 4]: of each mixed block and row 128 bits, one for each key; the first 32 in the first word, the first
    of them in its lowest bit. 1 is visible."""
    key_bits: Tensor
    """[K, 128, 4]: the same of each mixed block and key, one bit for each row."""


def blocks_of(sizes: tuple[int, int, int, int], part: Part, device: torch.device) -> Blocks:
    """By looking at a chunk of rows at a time. Waits for a GPU, which says how many blocks are mixed.

    Args:
        sizes: [b, h, M, N], none 0.
        part: Tells what is visible.
        device: Of what part returns.
    """
    batch, heads, q_len, kv_len = sizes
    row_blocks, key_blocks = -(-q_len // BLOCK), -(-kv_len // BLOCK)
    step = max(1, MAX_CHUNK // (batch * heads * key_blocks * BLOCK * BLOCK)) * BLOCK
    keys_in = _inside(kv_len, device)
    visible, kinds, places, row_bits, key_bits, count = [], [], [], [], [], 0
    for first in range(0, q_len, step):
        last = min(first + step, q_len)
        chunk = part(first, last)
        visible.append(chunk.sum(-1, dtype=torch.int32))
        tiles = _tiles(chunk)
        seen = tiles.sum((-2, -1), dtype=torch.int32)
        whole = _inside(last - first, device)[:, None] * keys_in
        kind = torch.where(seen == 0, EMPTY, torch.where(seen == whole, FULL, MIXED)).to(torch.uint8)
        mixed = kind == MIXED
        found = tiles[mixed]
        row_bits.append(packed(found))
        key_bits.append(packed(found.mT))
        places.append((mixed.flatten().cumsum(0).view(mixed.shape) - 1 + count).clamp_(min=0).to(torch.int32))
        kinds.append(kind)
        count += found.shape[0]
    kind, place = torch.cat(kinds, 2), torch.cat(places, 2)
    assert kind.shape[2:] == (row_blocks, key_blocks)
    bits = (
        torch.cat(each) if count else kind.new_zeros((1, BLOCK, WORDS), dtype=torch.int32)
        for each in (row_bits, key_bits)
    )
    return Blocks(torch.cat(visible, 2), lists_of(kind, place), lists_of(kind.mT, place.mT), *bits)


def all_blocks_of(mask: Tensor) -> Blocks:
    """Of a bool tensor [b, h, M, N], with room for the bits of all blocks, K = b h R C, as if all were mixed: so that
    no size depends on what is in the mask."""
    tiles = _tiles(mask)
    seen = tiles.sum((-2, -1), dtype=torch.int32)
    whole = _inside(mask.shape[2], mask.device)[:, None] * _inside(mask.shape[3], mask.device)
    kind = torch.where(seen == 0, EMPTY, torch.where(seen == whole, FULL, MIXED)).to(torch.uint8)
    place = torch.arange(kind.numel(), dtype=torch.int32, device=mask.device).view(kind.shape)
    flat = tiles.flatten(0, 3)
    visible = mask.sum(-1, dtype=torch.int32)
    return Blocks(visible, lists_of(kind, place), lists_of(kind.mT, place.mT), packed(flat), packed(flat.mT))


def lists_of(kind: Tensor, place: Tensor) -> Tensor:
    """A list for each of the last but one dimension's blocks: :attr:`Blocks.rows`, from [b, h, R, C] of both.

    place: int32, where the bits of a mixed block are.
    """
    order = (FULL - kind).argsort(dim=-1, stable=True)
    full, mixed = ((kind == which).sum(-1, dtype=torch.int32) for which in (FULL, MIXED))
    longest = (full + mixed).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    header = torch.stack((full, mixed, longest, torch.zeros_like(full)), -1)
    return torch.cat((header, order.to(torch.int32), place.gather(-1, order)), -1)


def packed(tiles: Tensor) -> Tensor:
    """Bool [n, 128, 128] as int32 [n, 128, 4], a bit each."""
    # Not torch.tensor([1, 2, 4 ...]), which torch.export would trace as a constant that is changed in place.
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=tiles.device)
    octets = (tiles.reshape(*tiles.shape[:-1], BLOCK // 8, 8) * weights).sum(-1, dtype=torch.uint8)
    words: Tensor = octets.contiguous().view(torch.int32)
    return words


def unpacked(bits: Tensor) -> Tensor:
    """The other way."""
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits.unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)


def dense_mask(blocks: Blocks, q_len: int, kv_len: int) -> Tensor:
    """The mask as it was: bool [b, h, M, N]."""
    rows = blocks.rows
    batch, heads, row_blocks, width = rows.shape
    key_blocks = (width - HEADER) // 2
    order, place = rows[..., HEADER : HEADER + key_blocks].long(), rows[..., HEADER + key_blocks :].long()
    at = torch.arange(key_blocks, device=rows.device)
    full, both = rows[..., :1], rows[..., :1] + rows[..., 1:2]
    kind = torch.where(at < full, FULL, torch.where(at < both, MIXED, EMPTY))
    # Nothing is changed in place: selective checkpoints that save every result would refuse it.
    kind, place = (each.scatter(-1, order, each) for each in (kind, place))
    mask = (kind == FULL)[..., None, None].expand(*kind.shape, BLOCK, BLOCK)
    mixed = kind == MIXED
    mask = mask.index_put((mixed,), unpacked(blocks.row_bits[place[mixed]]))
    mask = mask.transpose(3, 4).reshape(batch, heads, row_blocks * BLOCK, key_blocks * BLOCK)
    return mask[:, :, :q_len, :kv_len].contiguous()


def _inside(length: int, device: torch.device) -> Tensor:
    """How many of each block's rows, or keys, are below the length."""
    starts = torch.arange(0, length, BLOCK, device=device)
    return (length - starts).clamp(max=BLOCK)


def _tiles(chunk: Tensor) -> Tensor:
    """[b, h, m, n] as [b, h, m / 128, n / 128, 128, 128], False beyond the ends."""
    batch, heads, rows, keys = chunk.shape
    padded = torch.nn.functional.pad(chunk, (0, -keys % BLOCK, 0, -rows % BLOCK))
    return padded.reshape(batch, heads, -(-rows // BLOCK), BLOCK, -(-keys // BLOCK), BLOCK).transpose(3, 4)
