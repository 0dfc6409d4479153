"""What cu_seqlens may hold."""

from __future__ import annotations

import re

import pytest
import torch

from sigswap.errors import ArgumentError
from sigswap.kernels.host.lengths import checked_ends


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
