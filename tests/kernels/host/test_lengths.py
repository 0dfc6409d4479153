"""What cu_seqlens, cache_seqlens and block tables may hold."""

from __future__ import annotations

import re

import pytest
import torch

from sigswap.errors import ArgumentError
from sigswap.kernels.host.lengths import checked_ends, checked_keys


@pytest.mark.parametrize(("ends", "total"), [([0, 3, 7], 7), ([0, 0, 4, 4, 4, 7, 7], 7), ([0], 0), ([0, 0], 0)])
def test_right_ends(ends: list[int], total: int) -> None:
    assert checked_ends("q", torch.tensor(ends, dtype=torch.int32), 4, total) == ends


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([1, 3, 7], "cu_seqlens_k must rise from 0 to 7, the length of the packed tensor; it begins with 1."),
        ([-3, 0, 7], "it begins with -3."),
        ([0, 4, 3, 7], "it falls from 4 to 3 at index 2."),
        ([0, 4, -(2**31), 7], "it falls from 4 to -2147483648 at index 2."),
        ([0, 3, 8], "it is 8 at index 2."),
        ([0, 2**31 - 1, 7], "it is 2147483647 at index 1."),
        ([0, 3, 6], "it ends with 6."),
        ([0], "it ends with 0."),
        ([0, 2, 7], "max_seqlen_k is 4, but sequence 1 of cu_seqlens_k has 5."),
    ],
)
def test_the_first_wrong_number_is_named(ends: list[int], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        checked_ends("k", torch.tensor(ends, dtype=torch.int32), 4, 7)


def numbers(*values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_right_pages() -> None:
    """What is behind a sequence's last page does not matter."""
    table = numbers([4, 0, 1], [2, -1, 99], [99, -1, -1])
    assert checked_keys(numbers(12, 4, 0), table, 12, 5, 4) == [12, 4, 0]
    assert checked_keys(numbers(), table[:0], 0, 5, 4) == []


@pytest.mark.parametrize(
    ("keys", "table", "message"),
    [
        ([5, -1], [[0, 1], [2, 3]], "cache_seqlens must hold numbers >= 0; it is -1 at index 1."),
        ([5, 7], [[0, 1], [2, 3]], "max_seqlen_k is 6, but sequence 1 of cache_seqlens has 7 keys."),
        (
            [5, 9],
            [[0, 1], [2, 3]],
            "2 pages of 4 keys for each sequence, which hold 8 keys, but sequence 1 of cache_seqlens has 9.",
        ),
        (
            [5, 6],
            [[0, 1], [2, 5]],
            "block_table must hold numbers of pages, 0 to 4, for all of a sequence's keys; of sequence 1, which has 6, "
            "it has 5 at index 1.",
        ),
        ([5, 4], [[0, -2], [2, 5]], "of sequence 0, which has 5, it has -2 at index 1."),
    ],
)
def test_the_first_wrong_page_is_named(keys: list[int], table: list[list[int]], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        checked_keys(numbers(*keys), numbers(*table), 6, 5, 4)
