"""Masks by blocks against the masks that they are of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sigswap.kernels.host import blocks
from sigswap.kernels.host.blocks import BLOCK, HEADER, Blocks, all_blocks_of, blocks_of, dense_mask, packed, unpacked


def masks() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    number = torch.arange(400) // 150
    band = torch.ones(300, 520, dtype=torch.bool).tril(100)
    by_head = torch.stack((band, ~band, torch.zeros_like(band)))[None]
    return {
        "random": torch.rand(2, 1, 257, 130, generator=generator) > 0.5,
        "documents": (number[:, None] == number)[None, None],
        "heads": by_head,
        "nothing": torch.zeros(1, 1, 10, 300, dtype=torch.bool),
        "everything": torch.ones(2, 3, 129, 256, dtype=torch.bool),
    }


def of_mask(mask: Tensor) -> Blocks:
    return blocks_of(tuple(mask.shape), lambda first, last: mask[:, :, first:last], mask.device)


def transposed(found: Blocks) -> Blocks:
    """The mask's transpose, but for the rows' counts."""
    return Blocks(found.visible, found.keys, found.rows, found.key_bits, found.row_bits)


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_blocks_hold_the_mask(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MAX_CHUNK", chunk)
    mask = masks()[name]
    q_len, kv_len = mask.shape[2:]
    for found in (of_mask(mask), all_blocks_of(mask)):
        assert torch.equal(dense_mask(found, q_len, kv_len), mask)
        assert torch.equal(dense_mask(transposed(found), kv_len, q_len), mask.mT)
        assert torch.equal(found.visible, mask.sum(-1).int())
        assert all(each.dtype == torch.int32 and each.is_contiguous() for each in found)


def test_lists_say_what_is_full_mixed_and_empty() -> None:
    mask = torch.zeros(1, 1, 300, 400, dtype=torch.bool)
    mask[..., :128, 128:256] = True  # full
    mask[..., 5, 399] = True  # mixed, in the last block, which is short
    mask[..., 256:, 384:] = True  # full up to the ends
    found = of_mask(mask)
    assert found.rows[0, 0, :, :2].tolist() == [[1, 1], [0, 0], [1, 0]]
    assert found.keys[0, 0, :, :2].tolist() == [[0, 0], [1, 0], [0, 0], [1, 1]]
    assert found.rows[0, 0, 0, HEADER : HEADER + 2].tolist() == [1, 3]
    assert found.rows[0, 0, :, 2].tolist() == [0, 2, 1]  # the longest first
    assert found.keys[0, 0, :, 2].tolist() == [3, 1, 0, 2]
    assert found.row_bits.shape == (1, BLOCK, BLOCK // 32)


def test_only_mixed_blocks_have_bits() -> None:
    number = torch.arange(2048) // 512
    found = of_mask((number[:, None] == number)[None, None])
    assert found.rows[..., :2].sum(2).tolist() == [[[64, 0]]]
    assert found.row_bits.shape[0] == 1  # a place to point to


def test_a_bit_for_each_score() -> None:
    tiles = torch.rand(3, BLOCK, BLOCK) > 0.5
    bits = packed(tiles)
    assert bits.shape == (3, BLOCK, BLOCK // 32) and bits.dtype == torch.int32
    assert torch.equal(unpacked(bits), tiles)
    for row, key in ((0, 0), (5, 31), (127, 32), (64, 127)):
        assert bool((bits[1, row, key // 32] >> (key % 32)) & 1) == bool(tiles[1, row, key])
