"""Whether the numbers in cu_seqlens are where packed sequences can begin and end."""

from __future__ import annotations

import itertools

from torch import Tensor

from sigswap.errors import ArgumentError


def checked_ends(side: str, cu_seqlens: Tensor, longest: int, total: int) -> list[int]:
    """The numbers in cu_seqlens, which rise from 0 to total, the packed tensor's length, by at most longest. Waits for
    a GPU. side: "q" or "k".

    Raises:
        ArgumentError: They do not. The message has the first number that is wrong.
    """
    ends: list[int] = cu_seqlens.tolist()
    rule = f"cu_seqlens_{side} must rise from 0 to {total}, the length of the packed tensor"
    if ends[0] != 0:
        raise ArgumentError(f"{rule}; it begins with {ends[0]}.")
    for index, (start, stop) in enumerate(itertools.pairwise(ends)):
        if stop < start:
            raise ArgumentError(f"{rule}; it falls from {start} to {stop} at index {index + 1}.")
        if stop > total:
            raise ArgumentError(f"{rule}; it is {stop} at index {index + 1}.")
        if stop - start > longest:
            raise ArgumentError(
                f"max_seqlen_{side} is {longest}, but sequence {index} of cu_seqlens_{side} has {stop - start}."
            )
    if ends[-1] != total:
        raise ArgumentError(f"{rule}; it ends with {ends[-1]}.")
    return ends
