"""What the backwards in Gluon share: a tile of scores [keys, rows], its row biases, sums that many programs add to."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from sigswap.kernels.hopper.common import (
    Numbers,
    log_of_visible,
    sigmoid,
    soft_capped_with_slope,
    takes_row_cap,
    takes_soft_cap,
)
from sigswap.kernels.hopper.packed import is_long
from sigswap.kernels.host.launch import describable
from sigswap.kernels.host.layout import Layout, contiguous_layout, is_aligned, layout_of, new_tensor
from sigswap.kernels.host.problem import Problem, Signature
from sigswap.kernels.host.tiles import limits_of
from sigswap.kernels.triton.common import _AUTO, _FAST, _LOG2E, _ROW_BIAS_BLOCK
from sigswap.kernels.triton.row_biases import RowBiases, row_biases_for

ROWS = 64
"""Of a tile."""

_ROWS = tl.constexpr(ROWS)

_ADD = tl.constexpr(
    "{ .reg .b64 a; cvt.u64.u32 a, $8; add.s64 a, a, $4; "
    "red.relaxed.gpu.global.add.v4.f32 [a], {$12, $13, $14, $15}; "
    "mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0; }"
)
_ADD_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,l,l,l,l,r,r,r,r,f,f,f,f")
_ADD_ONE = tl.constexpr(
    "{ .reg .b64 a; .reg .pred first; setp.ge.s32 first, $8, 0; cvt.s64.s32 a, $8; add.s64 a, a, $4; "
    "@first red.relaxed.gpu.global.add.f32 [a], $12; "
    "@first red.relaxed.gpu.global.add.f32 [a + 32], $14; "
    "mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0; }"
)
BY_THREAD = tl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
"""One number, or several, of each thread of a warpgroup."""
_OF_TERMS = tl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0]))
"""Of put_row_biases()'s terms, and of what they are multiplied by."""


def takes(problem: Problem) -> bool:
    """Whether a backward in Gluon takes the problem, but for its lengths and the widths of its heads: half precision,
    without mask and dropout, where all of query, key and value want gradients."""
    signature, grad_out = problem.signature, problem.grad_out
    if grad_out is None or not all(problem.output_mask[:3]):
        return False
    if signature.attn_mask is not None or not takes_row_cap(problem) or not takes_soft_cap(problem):
        return False
    if (
        abs(problem.options.scale) < 1e-6
        or signature.is_empty
        or problem.options.dropout_p > 0.0
        or not (signature.tma(signature.q_len) or is_long(signature))
    ):
        return False
    if limits_of(signature.device).capability >= 100:
        return False
    # A strided one is copied.
    strided = grad_out.stride(-1) != 1
    of_grad = contiguous_layout(grad_out.shape, grad_out.dtype) if strided else layout_of(grad_out)
    # New gradients are describable where head_dims are multiples of 8.
    operands = signature.query, signature.key, signature.value, of_grad
    return all(describable(each) and each.shape[3] % 8 == 0 for each in operands)


def sees_every_block(signature: Signature, keys: int) -> bool:
    """Whether some row sees some key of each program, which has so many. Where no row sees one, a program would yet
    work through a tile of rows, where 0 times NaN is NaN."""
    shift, left, right = signature.options.band(signature.q_len, signature.kv_len)
    last_block = (signature.kv_len - 1) // keys * keys
    sees_last = right is None or signature.q_len - 1 + shift + right >= last_block
    return sees_last and (left is None or shift - left < min(keys, signature.kv_len))


def visible_keys(signature: Signature) -> int:
    """Of all rows together."""
    shift, left, right = signature.options.band(signature.q_len, signature.kv_len)
    row = np.arange(signature.q_len, dtype=np.int64) + shift
    first = 0 if left is None else np.maximum(row - left, 0)
    last = signature.kv_len - 1 if right is None else np.minimum(row + right, signature.kv_len - 1)
    return int(np.maximum(last - first + 1, np.zeros_like(row)).sum())


class Deltas(NamedTuple):
    """How a kernel gets a backward's row_delta."""

    layout: Layout
    described: Numbers

    def __call__(self, problem: Problem) -> Tensor:
        """row_delta is copied, unless it lies as descriptors need it."""
        delta = problem.row_delta
        assert delta is not None
        numbers = delta[..., 0]
        if numbers.stride() != self.layout.strides or not is_aligned(delta):
            numbers = new_tensor(self.layout, delta.device).copy_(numbers)
        return numbers


def deltas_for(signature: Signature) -> Deltas:
    batch, heads, rows = signature.query.shape[:3]
    apart = triton.cdiv(rows, 4) * 4
    layout = Layout((batch, heads, rows), (heads * apart, apart, 1), torch.float32, True)
    return Deltas(layout, Numbers(layout, ROWS))


class RowTiles(NamedTuple):
    """How a kernel gets a bias tensor that differs between rows."""

    biases: RowBiases
    described: Numbers

    def arguments(self) -> dict[str, int]:
        """The kernel's that differ then: strides count rows."""
        length = self.biases.layout.shape[2]
        stride_b, stride_h, _ = self.biases.layout.strides_or_zero(3)
        return {"stride_bias_b": stride_b // length, "stride_bias_h": stride_h // length, "VISIBLE": False}


def row_tiles_for(signature: Signature) -> RowTiles | None:
    """None: no bias tensor differs between rows."""
    if not signature.biased_by_rows:
        return None
    biases = row_biases_for(signature)
    assert biases is not None
    return RowTiles(biases, Numbers(biases.layout, ROWS))


def heads_at_once(signature: Signature, blocks: int, units: int) -> int:
    """Of how many of the key heads, units in all, the blocks of keys are mixed: under a band as many as fill the GPU
    twice, or a few more, so that the last group has three quarters of that. A small one starts programs that take long
    when others end: with 16 heads of 128 blocks, groups of 3 took 5% longer than of 4 on an H200. Groups of four times
    as many as fill it twice took 10% longer: what they read and add to is not in L2 any more."""
    band = signature.band()
    if not (band.has_left or band.has_right):
        return 1
    fewest = min(units, triton.cdiv(2 * limits_of(signature.device).multiprocessors, blocks))
    filled = {size: (units % size or size) / size for size in range(fewest, min(units, 2 * fewest) + 1)}
    return next((size for size, part in filled.items() if part >= 0.75), max(filled, key=filled.__getitem__))


# Device functions. A tile of scores is [keys, rows].


@gluon.jit
def unknown_zero():
    """0, of which the compiler does not know that. Addresses that it is part of are worked out where they are used,
    and not kept in registers, of which there are none left."""
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def probabilities(
    s, scale, row_bias, start, col0, key, row, shift, left, right, fast,
    BY_ROW: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, FORM: gl.constexpr, SLOW: gl.constexpr,
    AT_ONCE: gl.constexpr,
):  # fmt: skip
    """sigmoid(scale * s + row_bias); 0 outside the band. If BY_ROW the row bias is in s already."""
    if FORM == _FAST:
        x = s * (scale * 0.5)
    elif FORM == _AUTO:
        x = s * (scale * gl.where(fast, 0.5, _LOG2E))
    else:
        x = s * (scale * _LOG2E)
    if not BY_ROW:
        x += row_bias
    else:
        x = _hide(x, start, col0, key, row, shift, left, right, HAS_LEFT, HAS_RIGHT)
    return sigmoid(x, fast, FORM, SLOW, True, AT_ONCE)


@gluon.jit
def _hide(x, start, col0, key, row, shift, left, right, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """-inf outside the band."""
    edge = False
    if HAS_RIGHT:
        edge = col0 + key.shape[0] - 1 > start + shift + right
    if HAS_LEFT:
        edge = edge | (col0 < start + _ROWS - 1 + shift - left)
    if edge:
        if HAS_RIGHT:
            x = gl.where((col0 + key)[:, None] <= (start + shift + right + row)[None, :], x, float("-inf"))
        if HAS_LEFT:
            x = gl.where((col0 + key)[:, None] >= (start + shift - left + row)[None, :], x, float("-inf"))
    return x


@gluon.jit
def soft_capped_probabilities(
    s, scale, softcap, unit, row_bias, biases, start, col0, key, row, shift, left, right, fast,
    BANDED: gl.constexpr, BIAS_ROWS: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    FORM: gl.constexpr, SLOW: gl.constexpr, AT_ONCE: gl.constexpr,
):  # fmt: skip
    """sigmoid(softcap * tanh(scale / softcap * s) + row_bias), and 1 - tanh^2 in float16, which takes fewer registers.

    unit: the form's. biases: of the rows; if BIAS_ROWS [1, rows] that were loaded for the tile, if BANDED in the form's
    unit already. They are read here, so that no register holds them while products are in flight.
    """
    if BIAS_ROWS:
        numbers = biases._reinterpret(gl.float32, [_ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        bias = (numbers.load(gl.SliceLayout(0, s.type.layout)) * unit)[None, :]
    elif BANDED:
        bias = biases.load(gl.SliceLayout(0, s.type.layout))[None, :]
    else:
        bias = row_bias * unit
    x, slope = soft_capped_with_slope(s, scale / softcap, softcap * unit, bias)
    x = _hide(x, start, col0, key, row, shift, left, right, HAS_LEFT, HAS_RIGHT)
    return sigmoid(x, fast, FORM, SLOW, True, AT_ONCE), slope


@gluon.jit
def add_tile(sums, tile, layout: gl.constexpr):
    """Adds a product's tile to memory, in the order of its registers: for each eight columns of the tile a thread has
    two of them in two rows that are 8 apart, 16 bytes."""
    HEIGHT: gl.constexpr = tile.shape[0]
    WIDTH: gl.constexpr = tile.shape[1]
    row = gl.arange(0, HEIGHT, gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
    lane = row % 8 * 4 + column % 8 // 2 + unknown_zero()
    offset = ((row // 16 * (WIDTH // 8) + column // 8) * 32 + lane) * 16
    address = gl.full([HEIGHT, WIDTH], 0, gl.int64, layout) + sums.to(gl.int64)
    gl.inline_asm_elementwise(_ADD, _ADD_CONSTRAINTS, [address, offset, tile], dtype=gl.int32, is_pure=False, pack=4)


@gluon.jit
def add_row_sums(sums, tile, layout: gl.constexpr):
    """Adds the first column of a product's tile, eight columns wide, to memory: a thread has two numbers in each of two
    rows that are 8 apart, and every fourth thread the first column."""
    HEIGHT: gl.constexpr = tile.shape[0]
    WIDTH: gl.constexpr = tile.shape[1]
    row = gl.arange(0, HEIGHT, gl.SliceLayout(1, layout))[:, None] + unknown_zero()
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
    offset = gl.where(column == 0, row * 4, -1)
    address = gl.full([HEIGHT, WIDTH], 0, gl.int64, layout) + sums.to(gl.int64)
    gl.inline_asm_elementwise(
        _ADD_ONE, _ADD_CONSTRAINTS, [address, offset, tile], dtype=gl.int32, is_pure=False, pack=4
    )


@gluon.jit
def add_sums_of_rows(sums, ds):
    """Adds the sums over keys of a tile [64, 64] to memory, those of each warp's 16 keys: many shuffles, but of numbers
    that no product has at hand."""
    of_warps = gl.sum(gl.sum(ds.reshape([4, 2, 8, _ROWS]), 1), 1)
    row = gl.arange(0, _ROWS, gl.SliceLayout(0, of_warps.type.layout))[None, :]
    gl.atomic_add(sums + (row + gl.full([4, _ROWS], 0, gl.int32, of_warps.type.layout)), of_warps, sem="relaxed")


@gluon.jit
def lowest_bias(floor, place, group, stride_h, begin, end, q_len):
    """The least bias of the rows begin to end of some heads."""
    blocks = gl.cdiv(q_len, _ROW_BIAS_BLOCK)
    end = gl.cdiv(gl.minimum(end, q_len), _ROW_BIAS_BLOCK)
    lowest = gl.full([128], float("inf"), gl.float32, BY_THREAD)
    for member in range(group):
        own = floor + (place + member * stride_h).to(gl.int64) * blocks
        for first in range(begin // _ROW_BIAS_BLOCK, end, 128):
            block = first + gl.arange(0, 128, BY_THREAD)
            lowest = gl.minimum(lowest, gl.load(own + block, mask=block < end, other=float("inf")))
    return gl.min(lowest, 0)


@gluon.jit
def lowest_of_heads(bias, head, group, stride_h):
    """The least bias of some heads."""
    lowest = float("inf")
    for member in range(group):
        lowest = gl.minimum(lowest, load_head_bias(bias, head + member, stride_h))
    return lowest


@gluon.jit
def sum_per_thread(ds):
    """Of a tile [64, 64] over what each of 128 threads has of it."""
    by_thread = ds.reshape([4, 2, 8, 8, 4, 2])
    return gl.sum(gl.sum(gl.sum(by_thread, 5), 3), 1).reshape([128])


@gluon.jit
def _reciprocal(number):
    """Worked out where it is used: see unknown_zero()."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [number], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def put_row_biases(
    biases, start, head_bias, scale, q_len, kv_len, shift, left, right,
    VISIBLE: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SHORT: gl.constexpr, TERMS: gl.constexpr,
):  # fmt: skip
    """b_i / scale of a tile's rows, in shared memory. SHORT: by log_of_visible()'s few instructions, which were faster
    at head_dim 64 (519 TFLOP/s instead of 504 with 16,384 keys on an H200), but cost registers.

    TERMS: biases is a bfloat16 tile [rows, 16], and each row's number the sum of the first three in it.
    """
    LAYOUT: gl.constexpr = gl.SliceLayout(1, _OF_TERMS) if TERMS else BY_THREAD
    row = start + gl.arange(0, _ROWS, LAYOUT)
    result = gl.full([_ROWS], 0.0, gl.float32, LAYOUT) + head_bias
    if VISIBLE:
        result -= log_of_visible(row, kv_len, shift, left, right, HAS_LEFT, HAS_RIGHT, SHORT)
    result *= _reciprocal(scale)
    if TERMS:
        # Infinity would meet zeros in the product.
        result = gl.where(result < -3e38, -3e38, gl.where(result > 3e38, 3e38, result))
        first = result.to(gl.bfloat16).to(gl.float32)
        second = (result - first).to(gl.bfloat16).to(gl.float32)
        # Those of the last eight columns meet zeros, so that all threads do the same.
        column = gl.arange(0, 16, gl.SliceLayout(0, _OF_TERMS))[None, :] % 8
        rest = gl.where(column == 2, (result - first - second)[:, None], 0.0)
        terms = gl.where(column == 0, first[:, None], gl.where(column == 1, second[:, None], rest))
        biases.store(terms.to(gl.bfloat16))
    else:
        biases.store(result)


@gluon.jit
def load_head_bias(bias, head, stride_h):
    return gl.load(bias + head.to(gl.int64) * stride_h).to(gl.float32)


@gluon.jit
def next_tile(start, tile, head, begin, end, skipped):
    """The first row of the tile behind this one, its place among the sums of dQ, and its head."""
    start_next = start + _ROWS
    tile_next = tile + 1
    head_next = head + 0
    if start_next >= end:
        start_next = begin
        tile_next += skipped
        head_next += 1
    return start_next, tile_next, head_next


@gluon.jit
def end_of_head(parts, sum_of_ds, heads_on, blocks, THREADS: gl.constexpr):
    """Where heads_on is 1, the sums go out, and those of the next head start. No branch: products are in flight.

    THREADS: that have sums of a block of keys.
    """
    ends = gl.full(sum_of_ds.shape, 0, gl.int32, sum_of_ds.type.layout) + heads_on != 0
    gl.store(parts, sum_of_ds, mask=ends)
    return parts + heads_on.to(gl.int64) * blocks * THREADS, gl.where(ends, 0.0, sum_of_ds)


@gluon.jit
def start_of_scores(biases, LAYOUT: gl.constexpr, KEYS_OF_PART: gl.constexpr, BANDED: gl.constexpr):
    """What the product of key and query is added to."""
    start = gl.zeros([KEYS_OF_PART, _ROWS], gl.float32, LAYOUT)
    if BANDED:
        start += biases.load(gl.SliceLayout(0, LAYOUT))[None, :]
    return start


@gluon.jit
def start_by_biases(ones, terms, no_scores):
    """start_of_scores(), as a product with what put_row_biases() put there as terms."""
    return warpgroup_mma(ones, terms.permute((1, 0)), no_scores, use_acc=False, is_async=True)


@gluon.jit
def ones_of_terms(HEIGHT: gl.constexpr):
    """What start_by_biases() multiplies terms by: [keys, 16], ones and behind the third column zeros."""
    column = gl.arange(0, 16, gl.SliceLayout(0, _OF_TERMS))[None, :]
    return gl.where(column < 3, gl.full([HEIGHT, 16], 1.0, gl.bfloat16, _OF_TERMS), 0.0)


@gluon.jit
def start_at_biases(biases, scale, LAYOUT: gl.constexpr, KEYS_OF_PART: gl.constexpr):
    """start_of_scores(), from biases [1, rows] that were loaded for the tile."""
    numbers = biases._reinterpret(gl.float32, [_ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    row_bias = numbers.load(gl.SliceLayout(0, LAYOUT)) * _reciprocal(scale)
    return gl.zeros([KEYS_OF_PART, _ROWS], gl.float32, LAYOUT) + row_bias[None, :]


@gluon.jit
def start_row_sums(ds, ones, no_sums):
    """Of dS [keys, rows] the sums over keys: all columns of [rows, 8]."""
    return warpgroup_mma(ds.permute((1, 0)), ones.permute((1, 0)), no_sums, use_acc=False, is_async=True)


@gluon.jit
def start_at_delta(deltas, minus, LAYOUT: gl.constexpr):
    """What the product of value and output gradient is added to below a row cap: minus delta, from numbers [1, rows]
    that were loaded for the tile.

    minus: minus_of_keys().
    """
    numbers = deltas._reinterpret(gl.float32, [_ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return minus[:, None] * numbers.load(gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def minus_of_keys(key, kv_len):
    """-1 of keys, 0 of those behind the last one, whose dS is then 0, as without delta."""
    return gl.where(key < kv_len, -1.0, 0.0)
