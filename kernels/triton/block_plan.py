"""A mask tensor by blocks, found on the GPU without waiting for it: each block's kind and bits, and then the lists.

The number of mixed blocks is not known on the host, so there is room for the bits of all blocks: a quarter of the
mask's bytes. Only those of mixed blocks are written.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sigswap.kernels.host.blocks import BLOCK, HEADER, WORDS, Blocks
from sigswap.kernels.host.launch import Launch
from sigswap.kernels.host.layout import Layout, contiguous_layout, layout_of, new_tensor
from sigswap.kernels.host.problem import MAX_PLANS
from sigswap.kernels.triton.blocks import _BLOCK, _HEADER, _WORDS


def blocks_of_mask(mask: Tensor) -> Blocks:
    """Of a bool tensor [b, h, M, N], none 0, in any strides."""
    plan = _plan(layout_of(mask), mask.device)
    visible, rows, keys, row_bits, key_bits, kinds = (new_tensor(layout, mask.device) for layout in plan.layouts)
    visible.zero_()
    plan.look(mask, visible, kinds, row_bits, key_bits)
    for listing, ordering, lists in ((plan.list_rows, plan.order_rows, rows), (plan.list_keys, plan.order_keys, keys)):
        listing(kinds, lists)
        ordering(lists)
    return Blocks(visible, rows, keys, row_bits, key_bits)


class _Plan(NamedTuple):
    layouts: tuple[Layout, ...]
    look: Launch
    list_rows: Launch
    order_rows: Launch
    list_keys: Launch
    order_keys: Launch


@functools.lru_cache(MAX_PLANS)
def _plan(mask: Layout, device: torch.device) -> _Plan:
    batch, heads, q_len, kv_len = mask.shape
    row_blocks, key_blocks = triton.cdiv(q_len, BLOCK), triton.cdiv(kv_len, BLOCK)
    kinds = contiguous_layout((batch, heads, row_blocks, key_blocks))
    visible = contiguous_layout((batch, heads, q_len))
    rows = contiguous_layout((batch, heads, row_blocks, HEADER + 2 * key_blocks))
    keys = contiguous_layout((batch, heads, key_blocks, HEADER + 2 * row_blocks))
    bits = contiguous_layout((batch * heads * row_blocks * key_blocks, BLOCK, WORDS))
    strides = dict(zip(("stride_b", "stride_h", "stride_m", "stride_n"), mask.strides_or_zero(4), strict=True))
    sizes = {"heads": heads, "q_len": q_len, "kv_len": kv_len, "row_blocks": row_blocks, "key_blocks": key_blocks}
    look = Launch(_look_kernel, bits.shape[0], device, (mask, visible, kinds, bits, bits), strides | sizes, num_warps=8)

    def listed(lists: Layout, own: int, others: int, stride_own: int, stride_other: int) -> tuple[Launch, Launch]:
        programs = batch * heads * own
        arguments = {"own": own, "others": others, "stride_own": stride_own, "stride_other": stride_other}
        arguments["WIDTH"] = max(16, triton.next_power_of_2(others))
        listing = Launch(_list_kernel, programs, device, (kinds, lists), arguments)
        width = min(64, max(16, triton.next_power_of_2(own)))
        ordering = Launch(
            _order_kernel,
            batch * heads * triton.cdiv(own, width),
            device,
            (lists,),
            {"own": own, "stride_list": lists.shape[3], "WIDTH": width},
        )
        return listing, ordering

    return _Plan(
        (visible, rows, keys, bits, bits, kinds),
        look,
        *listed(rows, row_blocks, key_blocks, key_blocks, 1),
        *listed(keys, key_blocks, row_blocks, 1, key_blocks),
    )


_SIZES = (
    *("heads", "q_len", "kv_len", "row_blocks", "key_blocks", "own", "others"),
    *("stride_own", "stride_other", "stride_list"),
)


@triton.jit(do_not_specialize=_SIZES)
def _look_kernel(
    mask, visible, kinds, row_bits, key_bits, stride_b, stride_h, stride_m, stride_n, heads, q_len, kv_len, row_blocks,
    key_blocks,
):  # fmt: skip
    """One program: one block. Its kind: 0 empty, 1 mixed, 2 full."""
    number = tl.program_id(0)
    key_block = number % key_blocks
    row_block = number // key_blocks % row_blocks
    member = number // key_blocks // row_blocks
    batch, head = (member // heads).to(tl.int64), (member % heads).to(tl.int64)
    inner = tl.arange(0, _BLOCK)
    row, col = row_block * _BLOCK + inner, key_block * _BLOCK + inner
    places = mask + batch * stride_b + head * stride_h
    places += (row.to(tl.int64) * stride_m)[:, None] + (col.to(tl.int64) * stride_n)[None, :]
    tile = tl.load(places, mask=(row < q_len)[:, None] & (col < kv_len)[None, :], other=0).to(tl.int32)
    of_rows = tl.sum(tile, 1)
    seen = tl.sum(of_rows)
    whole = tl.minimum(q_len - row_block * _BLOCK, _BLOCK) * tl.minimum(kv_len - key_block * _BLOCK, _BLOCK)
    tl.store(kinds + number, (seen > 0).to(tl.int32) + (seen == whole).to(tl.int32))
    if seen > 0:
        # Of integers: the order does not matter.
        tl.atomic_add(visible + member.to(tl.int64) * q_len + row, of_rows, mask=row < q_len)
    if (seen > 0) & (seen < whole):
        word = tl.arange(0, _WORDS)
        at = number.to(tl.int64) * (_BLOCK * _WORDS) + (inner[:, None] * _WORDS + word[None, :])
        tl.store(row_bits + at, _packed(tile))
        tl.store(key_bits + at, _packed(tile.T))


@triton.jit
def _packed(tile):
    """[128, 128] of 0 and 1 as [128, 4] words, a bit each."""
    shift = tl.arange(0, 32)[None, None, :]
    return tl.sum(tl.reshape(tile, (_BLOCK, _WORDS, 32)) << shift, 2)


@triton.jit(do_not_specialize=_SIZES)
def _list_kernel(kinds, lists, own, others, stride_own, stride_other, WIDTH: tl.constexpr):
    """One program: the list of one block of rows (or keys), over all blocks of keys (or rows)."""
    number = tl.program_id(0) % own
    member = (tl.program_id(0) // own).to(tl.int64)
    other = tl.arange(0, WIDTH)
    inside = other < others
    place = member * own * others + (number * stride_own + other * stride_other)
    kind = tl.load(kinds + place, mask=inside, other=-1)
    full, mixed, empty = (kind == 2).to(tl.int32), (kind == 1).to(tl.int32), (kind == 0).to(tl.int32)
    fulls, mixeds = tl.sum(full), tl.sum(mixed)
    at = tl.where(kind == 2, tl.cumsum(full, 0), fulls + tl.cumsum(mixed, 0))
    at = tl.where(kind == 0, fulls + mixeds + tl.cumsum(empty, 0), at) - 1
    lists += (member * own + number) * (_HEADER + 2 * others)
    tl.store(lists, fulls)
    tl.store(lists + 1, mixeds)
    tl.store(lists + 3, 0)
    tl.store(lists + _HEADER + at, other, mask=inside)
    tl.store(lists + _HEADER + others + at, place.to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _order_kernel(lists, own, stride_list, WIDTH: tl.constexpr):
    """One program: where WIDTH of the blocks stand in the order of the longest lists first."""
    chunks = tl.cdiv(own, WIDTH)
    member = (tl.program_id(0) // chunks).to(tl.int64)
    number = tl.program_id(0) % chunks * WIDTH + tl.arange(0, WIDTH)
    lists += member * own * stride_list
    length = _lengths(lists, number, own, stride_list)
    rank = tl.zeros((WIDTH,), tl.int32)
    for start in range(0, own, WIDTH):
        other = start + tl.arange(0, WIDTH)
        others = _lengths(lists, other, own, stride_list)
        ahead = (others[None, :] > length[:, None]) | (
            (others[None, :] == length[:, None]) & (other[None, :] < number[:, None])
        )
        rank += tl.sum((ahead & (other < own)[None, :]).to(tl.int32), 1)
    tl.store(lists + rank.to(tl.int64) * stride_list + 2, number, mask=number < own)


@triton.jit
def _lengths(lists, number, own, stride_list):
    place = lists + number.to(tl.int64) * stride_list
    return tl.load(place, mask=number < own, other=0) + tl.load(place + 1, mask=number < own, other=0)
