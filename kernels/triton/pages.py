"""Keys and values in pages of a cache: how kernels are launched on them, how Triton's read them, and how they become
packed sequences.

Many rows of a sequence read its keys again and again. Then kernels of packed sequences, which are made for that, are so
much faster that a copy pays: one launch for the keys, one for the values.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sigswap.kernels.host.launch import Launch
from sigswap.kernels.host.layout import Layout, contiguous_layout, layout_of, width
from sigswap.kernels.host.problem import MAX_PLANS, Packed, Problem, Signature

KEYS = 64
"""Of a program."""

STEP = 256
"""Of the keys that there is room for, in each sequence: so the next chunk of a prefill seldom makes new plans."""


class Places(NamedTuple):
    """Of all sequences' tiles of rows times query heads per key head."""

    of_longest: int
    """How many the longest sequence has."""
    total: int
    """For how many there are places, for each key head."""
    alike: bool
    """Whether each sequence has as many places as the longest; else it looks for its own."""


def places_for(signature: Signature, sequences: int, longest_q: int, rows: int) -> Places:
    """rows: of a tile."""
    group = signature.heads // signature.kv_heads
    of_longest = triton.cdiv(group * longest_q, rows)
    # Beside its own tiles a sequence gets at most one that is empty.
    most = group * signature.query.shape[2] // rows + sequences
    alike = sequences * of_longest <= most
    return Places(of_longest, sequences * of_longest if alike else most, alike)


def band_of_longest(signature: Signature, longest_q: int, longest_k: int, most_keys: int) -> tuple[dict[str, Any], int]:
    """What kernels are told of the band, and how many keys a tile of rows sees at most. Of all sequences the longest
    can be: what hides nothing there hides nothing in any."""
    _, left, right = signature.options.band(longest_q, most_keys)
    has_left, has_right = left is not None and left < most_keys - 1, right is not None and right < longest_q - 1
    if left is not None and has_left:
        longest_k = min(longest_k, left + longest_q)
    return {"left": left or 0, "right": right or 0, "HAS_LEFT": has_left, "HAS_RIGHT": has_right}, longest_k


def packed(problem: Problem) -> Problem:
    """The same problem with room for copies of all keys and values, one sequence behind the other; :func:`copy_pages`
    fills it. A sequence is cut after as many keys as the longest one was said to have, up to a multiple of STEP."""
    pages = problem.pages
    assert pages is not None
    longest = triton.cdiv(pages.longest_k, STEP) * STEP
    room = pages.lengths.shape[0] * longest
    key, value = (_room(tensor, room) for tensor in (problem.key, problem.value))
    ends = torch.zeros(pages.cu_q.shape, dtype=torch.int32, device=key.device)
    sequences = Packed(pages.cu_q, ends, pages.longest_q, longest)
    return dataclasses.replace(problem, key=key, value=value, packed=sequences, pages=None)


def copy_pages(problem: Problem, into: Problem) -> None:
    """Fills the room that :func:`packed` made. Wrong numbers in the table lead to other pages."""
    pages, sequences = problem.pages, into.packed
    assert pages is not None and sequences is not None
    most = min(sequences.longest_k, pages.table.shape[1] * problem.key.shape[2])
    torch.cumsum(pages.lengths.clamp(0, most), 0, dtype=torch.int32, out=sequences.cu_k[1:])
    for cache, target in ((problem.key, into.key), (problem.value, into.value)):
        _launch(layout_of(cache), layout_of(target), layout_of(pages.table), sequences.longest_k, cache.device)(
            cache, target, pages.table, sequences.cu_k
        )


def _room(cache: Tensor, keys: int) -> Tensor:
    """For [pages, heads, page_size, D]: [1, heads, keys, D], stored key by key."""
    heads, dim = cache.shape[1], cache.shape[3]
    return cache.new_empty(1, keys, heads, dim).transpose(1, 2)


@functools.lru_cache(MAX_PLANS)
def _launch(cache: Layout, target: Layout, table: Layout, longest: int, device: torch.device) -> Launch:
    pages, heads, page_size, dim = cache.shape
    sequences, tiles = table.shape[0], triton.cdiv(longest, KEYS)
    arguments = {
        "stride_page": cache.strides[0],
        "stride_head": cache.strides[1],
        "stride": cache.strides[2],
        "stride_out_h": target.strides[1],
        "stride_out_n": target.strides[2],
        "stride_table": table.strides[0],
        "pages": pages,
        "heads": heads,
        "tiles": tiles,
        "PAGE": page_size,
        "DIM": dim,
        "WIDTH": width(dim),
        "BLOCK": KEYS,
    }
    tensors = cache, target, table, contiguous_layout((sequences + 1,))
    return Launch(_copy_kernel, sequences * tiles * heads, device, tensors, arguments, num_warps=4)


@triton.jit(do_not_specialize=["stride_table", "pages", "heads", "tiles"])
def _copy_kernel(
    cache, out, table, ends, stride_page, stride_head, stride, stride_out_h, stride_out_n, stride_table, pages, heads,
    tiles, PAGE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: up to BLOCK keys of one sequence and one head."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.program_id(0) // heads % tiles
    batch = tl.program_id(0) // heads // tiles
    first = tl.load(ends + batch)
    end = tl.load(ends + batch + 1) - first
    start = tile * BLOCK
    page = pages_of(table + batch.to(tl.int64) * stride_table, start, end, PAGE, BLOCK)
    rows = load_paged(cache + head * stride_head, page, start, end, pages, stride_page, stride, PAGE, DIM, BLOCK, WIDTH)
    row = start + tl.arange(0, BLOCK)
    dim = tl.arange(0, WIDTH)
    places = (first.to(tl.int64) + row) * stride_out_n
    targets = out + head * stride_out_h + places[:, None] + dim[None, :]
    tl.store(targets, rows, mask=(row < end)[:, None] & (dim < DIM)[None, :])


# Device functions.


@triton.jit
def pages_of(table, start, end, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """The table's entries for the keys start ... start + BLOCK - 1, up to end; one number, if they lie in one page."""
    if PAGE % BLOCK == 0:
        return tl.load(table + start // PAGE, mask=start < end, other=0)
    else:
        col = start + tl.arange(0, BLOCK)
        return tl.load(table + col // PAGE, mask=col < end, other=0)


@triton.jit
def load_paged(
    cache, page, start, end, pages, stride_page, stride, PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The keys start ... of one head, [BLOCK, WIDTH]; zeros beyond end and beyond DIM. page: as pages_of has it."""
    row = tl.arange(0, BLOCK)
    dim = tl.arange(0, WIDTH)
    page = tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)
    if PAGE % BLOCK == 0:
        first = cache + page * stride_page + tl.cast(start % PAGE, tl.int64) * stride
        pointers = first + (row[:, None] * stride + dim[None, :])
    else:
        places = page * stride_page + ((start + row) % PAGE).to(tl.int64) * stride
        pointers = cache + places[:, None] + dim[None, :]
    inside = (start + row < end)[:, None]
    if DIM == WIDTH:
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        return tl.load(pointers, mask=inside & (dim < DIM)[None, :], other=0.0)
