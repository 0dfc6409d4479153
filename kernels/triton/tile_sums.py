"""Sums of tiles in memory, to which programs add what a matrix product gave them, in the order of its registers.

A thread holds, of each 16 rows and eight columns of a product's tile on Hopper GPUs, two numbers next to each other in
two rows that are eight apart. Those four are next to each other in memory, those of the next thread behind them, so
that a warp adds 512 bytes at a time, without a way through shared memory. On GPUs whose products lie in other registers
the compiler converts the tile first: what is added where is the same. A kernel per tile puts the sums in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sigswap.kernels.host.launch import Launch
from sigswap.kernels.host.layout import Layout, contiguous_layout, new_tensor
from sigswap.kernels.host.problem import Signature
from sigswap.kernels.host.tiles import Tile
from sigswap.kernels.triton.common import UNSPECIALIZED, single
from sigswap.kernels.triton.sums import zeros

# The gradient of an additive mask.


class MaskSums(NamedTuple):
    """Sums of dS by tiles [keys, rows], and what makes the mask's gradient of them."""

    layout: Layout
    """float32 [b, h, blocks of rows, blocks of keys, numbers of a tile], b and h as the mask's."""
    filled: bool
    """With zeros: some tiles are added to more than once, or not at all."""
    alone: bool
    """Whether a tile is stored by one program, not added to by several."""
    order: int
    """Of keys_kernel's programs."""
    finish: Launch

    def empty(self, device: torch.device) -> Tensor:
        if self.filled:
            return zeros(self.layout, device)
        return new_tensor(self.layout, device)

    def arguments(self) -> dict[str, int | bool]:
        """The keys_kernel's. Strides count tiles."""
        stride_b, stride_h, *_ = self.layout.strides_or_zero(5)
        numbers = self.layout.shape[4]
        strides = {"stride_sums_b": stride_b // numbers, "stride_sums_h": stride_h // numbers}
        return strides | {"ALONE": self.alone, "ORDER": self.order}


def are_by_tiles(signature: Signature) -> bool:
    """Whether the mask has all rows and keys, so that its gradient is made of tiles of dS."""
    mask = signature.attn_mask
    return mask is not None and signature.packed is None and mask.shape[2:] == (signature.q_len, signature.kv_len)


def is_alone(signature: Signature) -> bool:
    """Whether the mask is not broadcast, but for rows or keys, so that programs need not add to what others have."""
    mask = signature.attn_mask
    return mask is not None and mask.shape[:2] == (signature.batch, signature.heads)


def mask_sums_for(signature: Signature, grad: Layout, tile: Tile) -> MaskSums:
    """grad: of the mask's gradient, [b, h, M, N] with any strides. tile: of the kernel that adds."""
    batch, heads, q_len, kv_len = grad.shape
    row_blocks, key_blocks = triton.cdiv(q_len, tile.rows), triton.cdiv(kv_len, tile.keys)
    layout = contiguous_layout((batch, heads, row_blocks, key_blocks, tile.rows * tile.keys), torch.float32)
    over_batch, over_heads = batch < signature.batch, heads < signature.heads
    alone = is_alone(signature)
    band = signature.band()
    arguments = dict(zip(("stride_b", "stride_h", "stride_m", "stride_n"), grad.strides_or_zero(4), strict=True))
    arguments |= {"heads": heads, "q_len": q_len, "kv_len": kv_len}
    arguments |= {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "WARPS": tile.launch_options()["num_warps"]}
    blocks = batch * heads * row_blocks * key_blocks
    finish = Launch(finish_mask_kernel, blocks, signature.device, (layout, grad), arguments, num_warps=4)
    order = 2 * over_heads + over_batch
    return MaskSums(layout, not alone or band.has_left or band.has_right, alone, order, finish)


# The gradient of query.


class QuerySums(NamedTuple):
    """Sums of dX k by tiles of rows, and what makes dQ of them."""

    layout: Layout
    """float32 [B, H, blocks of rows, numbers of a tile]."""
    finish: Launch

    def empty(self, device: torch.device) -> Tensor:
        return zeros(self.layout, device)


def query_sums_for(signature: Signature, grad: Layout, tile: Tile) -> QuerySums:
    """grad: of dQ. tile: of the kernel that adds."""
    batch, heads, q_len, dim = grad.shape
    width = signature.widths[0]
    blocks = triton.cdiv(q_len, tile.rows)
    layout = contiguous_layout((batch, heads, blocks, tile.rows * width), torch.float32)
    strides = dict(zip(("stride_b", "stride_h", "stride_m"), grad.strides_or_zero(3), strict=True))
    arguments = strides | {"heads": heads, "q_len": q_len, "scale": signature.options.scale}
    arguments |= {"HEAD_DIM": dim, "BLOCK_M": tile.rows, "BLOCK_D": width}
    arguments["WARPS"] = tile.launch_options()["num_warps"]
    programs = batch * heads * blocks
    finish = Launch(finish_query_kernel, programs, signature.device, (layout, grad), arguments, num_warps=4)
    return QuerySums(layout, finish)


# Device functions and kernels.


@triton.jit
def places_of_tile(sums, SIZE: tl.constexpr):
    """Addresses in the order of memory, four for each thread: so all Triton versions hand them out to warps and threads
    in the order of a product's, and convert nothing."""
    return sums + (tl.arange(0, SIZE // 4)[:, None] * 4 + tl.arange(0, 4)[None, :])


@triton.jit
def add_tile(sums, tile, WARPS: tl.constexpr, ALONE: tl.constexpr):
    """Adds a tile to its sums, which start at this address; stores it there, if ALONE. WARPS: of the program.

    They lie by 16 * WARPS rows, eight columns, warps, threads, and their four numbers.
    """
    HEIGHT: tl.constexpr = tile.shape[0]
    WIDTH: tl.constexpr = tile.shape[1]
    OWN: tl.constexpr = WARPS if 16 * WARPS <= HEIGHT else HEIGHT // 16
    parts = tile.reshape(HEIGHT // (16 * OWN), OWN, 2, 8, WIDTH // 8, 4, 2).permute(0, 4, 1, 3, 5, 2, 6)
    parts = parts.reshape(HEIGHT * WIDTH // 4, 4)
    places = places_of_tile(sums, HEIGHT * WIDTH)
    if ALONE:
        tl.store(places, parts)
    else:
        tl.atomic_add(places, parts, sem="relaxed")


@triton.jit
def load_tile(sums, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WARPS: tl.constexpr):
    """The tile [HEIGHT, WIDTH] that add_tile() added to."""
    OWN: tl.constexpr = WARPS if 16 * WARPS <= HEIGHT else HEIGHT // 16
    parts = tl.load(places_of_tile(sums, HEIGHT * WIDTH))
    parts = parts.reshape(HEIGHT // (16 * OWN), WIDTH // 8, OWN, 8, 4, 2, 2).permute(0, 2, 5, 3, 1, 4, 6)
    return parts.reshape(HEIGHT, WIDTH)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def finish_mask_kernel(
    sums, grad, stride_b, stride_h, stride_m, stride_n, heads, q_len, kv_len,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """One program: one tile of the mask's gradient."""
    key_blocks = tl.cdiv(kv_len, BLOCK_N)
    row_blocks = tl.cdiv(q_len, BLOCK_M)
    key_block = tl.program_id(0) % key_blocks
    row_block = tl.program_id(0) // key_blocks % row_blocks
    unit = tl.program_id(0) // key_blocks // row_blocks
    batch64, head64 = (unit // heads).to(tl.int64), (unit % heads).to(tl.int64)
    tile = load_tile(sums + tl.program_id(0).to(tl.int64) * (BLOCK_M * BLOCK_N), BLOCK_N, BLOCK_M, WARPS)
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    col = key_block * BLOCK_N + tl.arange(0, BLOCK_N)
    pointers = grad + batch64 * stride_b + head64 * stride_h
    pointers += (row.to(tl.int64) * stride_m)[:, None] + (col.to(tl.int64) * stride_n)[None, :]
    tl.store(pointers, tile.T.to(grad.dtype.element_ty), mask=(row < q_len)[:, None] & (col < kv_len)[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def finish_query_kernel(
    sums, grad, stride_b, stride_h, stride_m, heads, q_len, scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of dQ of one head."""
    blocks = tl.cdiv(q_len, BLOCK_M)
    row = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    unit = tl.program_id(0) // blocks
    batch64, head64 = (unit // heads).to(tl.int64), (unit % heads).to(tl.int64)
    tile = load_tile(sums + tl.program_id(0).to(tl.int64) * (BLOCK_M * BLOCK_D), BLOCK_M, BLOCK_D, WARPS)
    dim = tl.arange(0, BLOCK_D)
    pointers = grad + batch64 * stride_b + head64 * stride_h + (row.to(tl.int64) * stride_m)[:, None] + dim[None, :]
    inside = (row < q_len)[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(pointers, (tile * single(scale)).to(grad.dtype.element_ty), mask=inside)
