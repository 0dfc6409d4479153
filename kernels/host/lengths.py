"""Whether the numbers in cu_seqlens are where packed sequences can begin and end, and those of pages where keys lie."""

from __future__ import annotations

import itertools

import torch
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


def checked_keys(cache_seqlens: Tensor, block_table: Tensor, longest: int, pages: int, page_size: int) -> list[int]:
    """The numbers of keys in cache_seqlens, at most longest, whose pages block_table has, each one of a cache's pages.
    What the table has behind a sequence's last page does not matter. Waits for a GPU.

    Raises:
        ArgumentError: They are not. The message has the first number that is wrong.
    """
    lengths: list[int] = cache_seqlens.tolist()
    most = block_table.shape[1] * page_size
    for index, length in enumerate(lengths):
        if length < 0:
            raise ArgumentError(f"cache_seqlens must hold numbers >= 0; it is {length} at index {index}.")
        if length > most:
            raise ArgumentError(
                f"block_table has {block_table.shape[1]} pages of {page_size} keys for each sequence, which hold "
                f"{most} keys, but sequence {index} of cache_seqlens has {length}."
            )
        if length > longest:
            raise ArgumentError(f"max_seqlen_k is {longest}, but sequence {index} of cache_seqlens has {length} keys.")
    column = torch.arange(block_table.shape[1], device=block_table.device)
    wrong = (column * page_size < cache_seqlens[:, None]) & ((block_table < 0) | (block_table >= pages))
    for index, place in wrong.nonzero()[:1].tolist():
        raise ArgumentError(
            f"block_table must hold numbers of pages, 0 to {pages - 1}, for all of a sequence's keys; of sequence "
            f"{index}, which has {lengths[index]}, it has {int(block_table[index, place])} at index {place}."
        )
    return lengths
