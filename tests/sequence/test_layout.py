"""Which blocks of scores a rank computes: all visible ones once, no other, and the same amount on each rank."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sigswap.sequence.layout import Band, Call, Chunk, Layout, Segment, calls_of, range_of

WHOLE = [[Segment(0, 24)]]
SEGMENTS = {
    "whole": WHOLE,
    "documents": [[Segment(0, 5), Segment(5, 13), Segment(13, 24)]],
    "by row": [[Segment(3, 24)], [Segment(0, 11), Segment(11, 20)]],
    "nothing": [[]],
}
BANDS = [Band(None, None), Band(None, 0), Band(4, 0), Band(0, 0), Band(3, 2), Band(None, 5), Band(9, None), Band(1, 30)]


def positions(chunks: tuple[Chunk, ...]) -> list[int]:
    return [position for chunk in chunks for position in range(chunk.start, chunk.stop)]


def counted(calls: list[Call], rows: int, keys: int, batches: int) -> Tensor:
    """How often each score is computed, as the op reads a block's window."""
    counts = torch.zeros(batches, rows, keys, dtype=torch.int)
    for call in calls:
        one = slice(None) if call.batch is None else call.batch
        block = counts[one, call.rows, call.keys]
        row, key = torch.arange(block.shape[-2])[:, None], torch.arange(block.shape[-1])
        seen = torch.ones(block.shape[-2:], dtype=torch.bool)
        if call.left >= 0:
            seen &= key >= row - call.left
        if call.right >= 0:
            seen &= key <= row + call.right
        block += seen
    return counts


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("balanced", [True, False])
def test_all_visible_scores_are_computed_once(ranks: int, balanced: bool) -> None:
    layout = Layout(24 // ranks, ranks, balanced)
    parts = [positions(layout.chunks(rank)) for rank in range(ranks)]
    assert sorted(itertools.chain(*parts)) == list(range(24))
    for band, (name, segments) in itertools.product(BANDS, SEGMENTS.items()):
        for own, other in itertools.product(range(ranks), repeat=2):
            calls = calls_of(layout.chunks(own), layout.chunks(other), band, segments)
            assert all(call.rows.stop > call.rows.start and call.keys.stop > call.keys.start for call in calls)
            expected = torch.zeros(len(segments), len(parts[own]), len(parts[other]), dtype=torch.int)
            for batch, each in enumerate(segments):
                for (i, row), (j, key) in itertools.product(enumerate(parts[own]), enumerate(parts[other])):
                    together = any(start <= row < stop and start <= key < stop for start, stop in each)
                    left = band.left is None or key >= row - band.left
                    right = band.right is None or key <= row + band.right
                    expected[batch, i, j] = together and left and right
            found = counted(calls, len(parts[own]), len(parts[other]), len(segments))
            assert torch.equal(found, expected), (band, name, own, other)
            keys = range_of(calls)
            seen = expected.any(0).any(0).nonzero().flatten().tolist()
            assert (keys.start, keys.stop) == ((seen[0], seen[-1] + 1) if seen else (0, 0))


def test_a_causal_mask_is_few_calls_and_the_same_work_for_all() -> None:
    layout, band = Layout(8, 4, True), Band(None, 0)
    work = []
    for rank in range(4):
        calls = [calls_of(layout.chunks(rank), layout.chunks(other), band, [[Segment(0, 32)]]) for other in range(4)]
        assert all(len(each) == 1 for each in calls)
        work.append(sum(int(counted(each, 8, 8, 1).sum()) for each in calls))
    assert len(set(work)) == 1 and sum(work) == 32 * 33 // 2


def test_under_a_causal_mask_three_quarters_of_the_keys_are_sent() -> None:
    layout, band = Layout(8, 4, True), Band(None, 0)
    sent = 0
    for own, other in itertools.permutations(range(4), 2):
        keys = range_of(calls_of(layout.chunks(own), layout.chunks(other), band, [[Segment(0, 32)]]))
        sent += keys.stop - keys.start
    assert sent == 0.75 * 4 * 3 * 8


def test_what_a_window_hides_is_not_sent() -> None:
    layout, band = Layout(8, 4, True), Band(2, 0)
    for own, other in itertools.permutations(range(4), 2):
        keys = range_of(calls_of(layout.chunks(own), layout.chunks(other), band, [[Segment(0, 32)]]))
        assert keys.stop - keys.start <= 8  # the last two keys of the chunk before, of each of two chunks
