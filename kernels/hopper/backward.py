"""The backward of sigmoid attention over long sequences on Hopper GPUs, in Gluon: one kernel for dK, dV and dQ.

:mod:`sigswap.kernels.triton.backward` computes the scores twice, once for dK and dV, once for dQ: seven matrix
products. Here they are computed once, and a block of keys adds its part of dQ to float32 sums in memory: five. What
makes that fast:

- An item is 128 keys, of which each of two warpgroups has 64, with dK and dV in registers; a warp loads queries and
  output gradients for both. They meet through memory barriers only, one tile of 64 rows apart at most, so that one
  computes probabilities while the other multiplies matrices.
- There are as many programs as multiprocessors, mostly. Each takes the next item when its loading warp has done with
  one, which is before that one ends: the first rows of the next are there then, and of heads of up to 64 columns keys
  and values.
- dS goes from one warpgroup to the other through shared memory: each computes half of the columns of dQ, over all 128
  keys, one tile late. Of heads of up to 64 columns it goes to a third warpgroup, for which there are registers then,
  also for that one's keys and the others' values, which so are not read from shared memory by each product, and for
  half a tile's time until it is handed over, in which no one waits for it to be there.
- Of 65 to 96 columns, which are loaded as 128, 64 and 32 are multiplied.
- The sums of dQ lie in memory as the registers of a matrix product hold them: each thread adds 16 bytes at a time,
  without a way through shared memory, whose bandwidth is the bottleneck.
- Of short sequences they are a ring in L2, and two warps of each program put them in order, as dQ, while the others are
  at the next heads (:mod:`sigswap.kernels.hopper.backward_ring`). Else they are filled with zeros before, and a second
  kernel puts them in order.
- Under a band (causal, a window) row biases differ. Scores start from them, so that no register holds them; of heads of
  up to 64 columns by a product of ones and of each bias in three terms of bfloat16. With a soft cap, which they are
  added to, they are read from shared memory where probabilities are computed.
- With a row cap delta comes with the output gradients, and dP starts from minus delta.
- A bias tensor that differs between rows comes with the queries, worked out before. Its gradient is a product of dS
  with ones, eight columns wide, next to that of dQ: sums over keys cost next to nothing there, and many shuffles in
  registers. It is added up in memory as dQ is. With a soft cap dS lies in memory with the cap's slope in it, which that
  gradient has not: then it is shuffles after all.

The sums are added in no fixed order: two runs differ by rounding. ``torch.use_deterministic_algorithms`` avoids that.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from sigswap.kernels.hopper.backward_common import (
    _ROWS,
    ROWS,
    Deltas,
    RowTiles,
    deltas_for,
    heads_at_once,
    ones_of_terms,
    row_tiles_for,
    sees_every_block,
    takes,
    visible_keys,
)
from sigswap.kernels.hopper.backward_items import _KEYS, _PLACE, _STAGES, KEYS, count_items, load
from sigswap.kernels.hopper.backward_queries import add_queries
from sigswap.kernels.hopper.backward_ring import CHUNK_ROWS, Chunks, Pieces, finish_tiles, ring_for
from sigswap.kernels.hopper.backward_warps import compute
from sigswap.kernels.hopper.common import tiles_like
from sigswap.kernels.hopper.grad_query import finish_columns_kernel, finish_kernel
from sigswap.kernels.hopper.packed import (
    Plan,
    TileNumbers,
    most_tiles,
    plan_for,
    programs_at_once,
    tile_numbers_for,
    tiles_of,
)
from sigswap.kernels.host.launch import Described, Launch
from sigswap.kernels.host.layout import Layout, contiguous_layout, layout_of
from sigswap.kernels.host.problem import MAX_PLANS, Gradients, Problem, Signature
from sigswap.kernels.host.results import Backward, gradients_for, hand_over, layouts_in_place, maker_of
from sigswap.kernels.host.tiles import limits_of
from sigswap.kernels.triton.sums import Sum

LONG = {64: (512, 511, 192), 128: (511, 511, 192)}
"""By the width of a head: with more visible keys per row, on average, this kernel is faster than
:mod:`sigswap.kernels.triton.backward`, as measured on an H100: without bias, with one per head, with one per row, which
cost that one more. The sums of dQ have to be filled with zeros before and put in order after, which takes as long for
short sequences as for long ones. (The first number on an H200: 1024 keys, causal, 309 TFLOP/s and 277.)"""


APART = (64,)
"""Columns of heads of which a warpgroup of its own adds up dQ: of more there are not enough registers."""


def supports(problem: Problem) -> bool:
    """Whether this kernel takes the backward: of long sequences in half precision, head_dim 33 to 128, without mask
    and dropout, where all of query, key and value want gradients."""
    signature = problem.signature
    width, value_width = signature.widths
    if width != value_width or width not in LONG or not takes(problem) or torch.are_deterministic_algorithms_enabled():
        return False
    long = LONG[width][0 if signature.bias is None else 1 if signature.bias.shape[2] == 1 else 2]
    if signature.packed is not None:
        band = signature.band()
        return not (band.has_left and band.has_right) or band.left + band.right + 1 > long
    return sees_every_block(signature, KEYS) and visible_keys(signature) > long * signature.q_len


def backward(problem: Problem) -> Gradients:
    grads, written, layouts = gradients_for(problem)
    grad_out = problem.readable_grad_out()
    row_delta = None if problem.row_delta is None else layout_of(problem.row_delta)
    plan = _plan(problem.signature, layout_of(grad_out), layouts, row_delta)
    new_query, new_key, new_value, new_bias, _ = written
    assert new_key is not None and new_value is not None
    sums = torch.zeros(plan.sums.shape, dtype=torch.float32, device=problem.query.device)
    parts = None if plan.sum_parts is None else plan.sum_parts.empty_parts()
    if parts is not None and plan.packed is not None:
        parts.zero_()  # there may be fewer items than parts: how many is in the GPU's memory
    tensors = problem.query, problem.key, problem.value, grad_out, new_key, new_value
    items = tiles = bias = floor = delta = None
    if plan.packed is not None:
        items, tiles = plan.packed.items(problem)
        assert tiles is not None
        if plan.packed.biases is not None:
            bias, floor = plan.packed.biases(items, tiles, problem.bias)
        if plan.packed.deltas is not None:
            delta, _ = plan.packed.deltas(items, tiles, problem.row_delta)
    elif plan.rows is not None:
        bias, floor = plan.rows.biases(problem, None)
    if plan.deltas is not None:
        delta = plan.deltas(problem)
    ring = (sums, new_query) if plan.finish is None else (None, None)
    if bias is None:
        plan.launch(*tensors, sums, parts, problem.bias, None, delta, items, *ring)
    else:
        plan.launch(*tensors, sums, None, bias, floor, delta, items, *ring)
    if plan.finish is not None:
        of_rows = None if bias is None else new_bias if parts is None else parts
        plan.finish(sums, new_query, of_rows, items, tiles)
    if plan.sum_parts is not None:
        assert parts is not None and new_bias is not None
        plan.sum_parts(parts, new_bias)
    hand_over(grads, written)
    return grads


def backward_again(problem: Problem) -> Backward | None:
    """See :func:`sigswap.kernels.dispatch.backward_again`. None: copies are needed."""
    device, grad_out, layouts = problem.signature.device, problem.grad_out, layouts_in_place(problem)
    if grad_out is None or layouts is None:
        return None
    plan = _plan(problem.signature, layout_of(grad_out), layouts, None)
    launch, finish, none = plan.launch, plan.finish, (None,) * 5
    makers = [maker_of(layout, device) for layout in layouts[:3] if layout is not None]
    new_sums = maker_of(plan.sums, device)

    def run(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Gradients:
        new_query, new_key, new_value = [make() for make in makers]
        sums = new_sums().zero_()
        ring = (sums, new_query) if finish is None else (None, None)
        launch(query, key, value, grad_out, new_key, new_value, sums, *none, *ring)
        if finish is not None:
            finish(sums, new_query, None, None, None)
        return new_query, new_key, new_value, None, None

    return run


def columns_of(signature: Signature) -> int:
    """How many columns of the heads are multiplied: 64, 96 or 128.

    TFLOP/s on an H200 in bfloat16 with 16,384 tokens of width 2048, full and causal, at length 4096, of this and of
    what went before, dQ by the two warpgroups at 64, and 128 columns at 96: at 64 562 / 454 and 492 / 435 (at 16,384
    530 / 499 and 499 / 450, at 1024 448 / 309 and 398 / 277), at 96 554 / 484 and 495 / 408; cuDNN's softmax 434 / 374
    and 416 / 365."""
    width = signature.widths[0]
    return 96 if width == 128 and max(signature.query.shape[3], signature.value.shape[3]) <= 96 else width


def programs_for(signature: Signature, items: int) -> int:
    """As many as multiprocessors, or, where there is no ring, one for each item, which then finds none behind its own.

    Times of the latter / the former on an H200: 64 columns 1.16 (1,024, causal), 1.04 (4,096, causal), 1.03 to 1.06
    (4,096); 128 columns 1.03, 1.04, but without a band 0.95 to 1.0.
    """
    band = signature.band()
    alike = signature.packed is None and not (band.has_left or band.has_right)
    if alike and columns_of(signature) not in APART:
        return items
    return min(items, limits_of(signature.device).multiprocessors)


class _Packed(NamedTuple):
    """What packed sequences need beside."""

    items: Plan
    biases: TileNumbers | None
    deltas: TileNumbers | None


class _Plan(NamedTuple):
    deltas: Deltas | None
    """Where rows have a cap."""
    launch: Launch
    sums: Layout
    """Of dQ, as the kernel adds it up."""
    finish: Launch | None
    """Where they are no ring, but those of all rows."""
    rows: RowTiles | None
    """Where the bias tensor differs between rows; of packed sequences packed has them."""
    packed: _Packed | None
    sum_parts: Sum | None
    """Where the gradient of the bias is a sum: of what launch writes, or, of rows' biases, finish."""


@functools.lru_cache(MAX_PLANS)
def _plan(signature: Signature, grad_out: Layout, grads: tuple[Layout | None, ...], row_delta: Layout | None) -> _Plan:
    grad_query, grad_key, grad_value, grad_bias, _ = grads
    assert grad_query is not None and grad_key is not None and grad_value is not None
    width = columns_of(signature)
    apart = width in APART
    band = signature.band()
    of_tiles = tiles_of(signature)
    described = (
        of_tiles(signature.query, ROWS),
        of_tiles(signature.key, KEYS),
        of_tiles(signature.value, KEYS),
        of_tiles(grad_out, ROWS),
        of_tiles(grad_key, KEYS // 2),
        of_tiles(grad_value, KEYS // 2),
    )
    packed = _packed_for(signature, row_delta) if signature.packed is not None else None
    rows = row_tiles_for(signature) if packed is None else None
    row_sums = signature.biased_by_rows and grad_bias is not None
    head_sums = not signature.biased_by_rows and grad_bias is not None
    if packed is None:
        batch, q_len = signature.batch, signature.q_len
        tiles = triton.cdiv(q_len, ROWS)
        blocks = triton.cdiv(signature.kv_len, KEYS)
    else:
        batch, q_len = 1, signature.query.shape[2]
        tiles = most_tiles(signature)
        blocks = packed.items.most
    numbers = ROWS * (width + 1 if row_sums else width)
    units = batch * signature.kv_heads
    at_once = heads_at_once(signature, blocks, units) if packed is None else programs_at_once(signature)
    count = min(blocks * units, limits_of(signature.device).multiprocessors)
    ring = None if row_sums else ring_for(signature, width, units, at_once, blocks, count)
    if ring is None:
        count = programs_for(signature, blocks * units)
    all_tiles = (units if ring is None else ring.in_turn * ring.turns) * (signature.heads // signature.kv_heads) * tiles
    # Behind the last tile are counters.
    counters = triton.cdiv(1 if ring is None else ring.counters, numbers)
    sums = contiguous_layout((all_tiles + counters, numbers), torch.float32)
    sum_parts = parts = None
    if grad_bias is not None:
        # One of each row, or of each thread of the two warpgroups.
        shape = batch, signature.heads, q_len if row_sums else blocks * 256, 1
        if head_sums or grad_bias.shape != shape:
            sum_parts = Sum(grad_bias, shape, signature.device)
            parts = contiguous_layout(shape, torch.float32)
    arguments = signature.arguments() | {
        "units": units,
        "at_once": at_once,
        "in_turn": 0 if ring is None else ring.in_turn,
        "turns": 0 if ring is None else ring.turns,
        "items": blocks,
        "all_tiles": tiles,
        "DIM": width,
        "APART": apart,
        "BANDED": band.has_left or band.has_right,
        "SUMS": head_sums,
        "ROW_SUMS": row_sums,
        "GROUPED": signature.heads > signature.kv_heads,
        "DELTA": row_delta is not None,
    }
    bias: Layout | Described | None = signature.bias
    floor = None
    if rows is not None:
        bias, floor = rows.described, rows.biases.floor
        arguments |= rows.arguments()
    deltas = deltas_for(signature) if row_delta is not None and packed is None else None
    delta = None if deltas is None else deltas.described
    if packed is not None and packed.biases is not None:
        bias, floor = packed.biases.described, packed.biases.floor
        arguments |= {"stride_bias_b": 0, "stride_bias_h": int(packed.biases.layout.shape[1] > 1), "VISIBLE": False}
    if packed is not None and packed.deltas is not None:
        delta = packed.deltas.described
    items, tiles_of_items = (None, None) if packed is None else (packed.items.layout, packed.items.tiles)
    chunks, pieces = (None, None) if ring is None else (Chunks(all_tiles * numbers), Pieces(grad_query))
    tensors = (
        *described, sums, parts if head_sums else None, bias, floor, delta, items, chunks,
        pieces,
    )  # fmt: skip
    launch = Launch(_kernel, count, signature.device, tensors, arguments, num_warps=4)
    if ring is not None:
        return _Plan(deltas, launch, sums, None, rows, packed, sum_parts)
    of_rows = (parts or grad_bias) if row_sums else None
    strides = (0, 0, 0) if of_rows is None else of_rows.strides_or_zero(3)
    finish_arguments = signature.arguments(dq=grad_query) | {"tiles": tiles, "DIM": width}
    of_tile, programs = finish_kernel, all_tiles
    if apart or width == 96:  # not two halves
        columns = 64 if apart else 32
        of_tile, programs = finish_columns_kernel, programs * (width // columns)
        finish_arguments |= {"FIRST": 64, "COLUMNS": columns}
    finish_arguments |= {f"stride_db_{dim}": stride for dim, stride in zip("bhm", strides, strict=True)}
    outputs = sums, grad_query, of_rows, items, tiles_of_items
    warps = 4 if width == 96 else 8
    finish = Launch(of_tile, programs, signature.device, outputs, finish_arguments, num_warps=warps)
    return _Plan(deltas, launch, sums, finish, rows, packed, sum_parts)


def _packed_for(signature: Signature, row_delta: Layout | None) -> _Packed:
    biases = tile_numbers_for(signature, signature.bias, biases=True) if signature.biased_by_rows else None
    deltas = None if row_delta is None else tile_numbers_for(signature, row_delta, biases=False)
    return _Packed(plan_for(signature, KEYS, by_keys=True), biases, deltas)


# Device functions.


@gluon.jit(do_not_specialize=[
    "heads", "group", "q_len", "kv_len", "left", "right", "scale", "const_bias", "units", "at_once", "in_turn",
    "turns", "items", "all_tiles", "softcap",
])  # fmt: skip
def _kernel(
    q, k, v, do, dk, dv, sums, parts, bias, floor, delta, plan, chunks, dq,
    stride_bias_b, stride_bias_h, heads, group, q_len, kv_len, left, right, scale, const_bias, units, at_once, in_turn,
    turns, items, all_tiles, softcap,
    DIM: gl.constexpr, APART: gl.constexpr, VISIBLE: gl.constexpr, BANDED: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, BOTTOM_RIGHT: gl.constexpr, BIAS_ROWS: gl.constexpr, SUMS: gl.constexpr,
    ROW_SUMS: gl.constexpr, GROUPED: gl.constexpr, DELTA: gl.constexpr, P_SCALE: gl.constexpr, FORM: gl.constexpr,
    SLOW: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """One program: of items, as long as there are some, dK and dV of 128 keys of one key head, over all query heads
    that use it, and what they add to dQ.

    DIM: columns that are multiplied, 64, 96 or 128. APART: whether a warpgroup of its own adds up dQ.
    sums: float32 [B * H * ceil(M / 64), ...], zeros: of each tile of dQ [columns, rows] if APART; else the columns of
    one warpgroup, half of them or 64, then the others; if ROW_SUMS of each row the sum of dS behind them. Behind all
    tiles is the counter of items that were taken, int32. If there is dq, tiles of a ring, and all its counters.
    parts: float32 [B, H, blocks of keys, 2, 128]: sums of dS, if SUMS.
    bias, floor: of a tensor that differs between rows, BIAS_ROWS, b_i and the least of blocks of it (RowBiases);
    strides of bias count its rows then.
    delta: float32 [B * H, M], if DELTA, where rows have a cap: what is subtracted from dP.
    items: blocks of keys of a key head. all_tiles: of dQ of a head.
    plan: of packed sequences, in a GPU's memory for so many items; in the order of their tiles are bias, floor and
    delta.
    chunks, dq: of a ring, its sums and dQ for the unit that copies tiles. in_turn, turns: see Ring.
    """
    PACKED: gl.constexpr = plan is not None
    RING: gl.constexpr = dq is not None
    BUFFERS: gl.constexpr = 2 if APART else 1
    dtype: gl.constexpr = k.dtype
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    k_tiles = gl.allocate_shared_memory(dtype, tiles_like(BUFFERS, k.block_type), k.layout)
    v_tiles = gl.allocate_shared_memory(dtype, tiles_like(BUFFERS, v.block_type), v.layout)
    q_tiles = gl.allocate_shared_memory(dtype, tiles_like(_STAGES, q.block_type), q.layout)
    do_tiles = gl.allocate_shared_memory(dtype, tiles_like(_STAGES, do.block_type), do.layout)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_KEYS, _ROWS], dtype)
    ds_tiles = gl.allocate_shared_memory(dtype, [2, _KEYS, _ROWS], ds_layout)
    places = gl.allocate_shared_memory(gl.int32, [BUFFERS * _PLACE, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # Scores start from row biases by a product. With more columns that was 1% to 2% slower.
    BIAS_PRODUCT: gl.constexpr = APART and BANDED and not BIAS_ROWS and not SOFTCAP
    terms: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
    # What a partition has no use for is not handed to it.
    if not BIAS_ROWS:
        if BIAS_PRODUCT:
            biases = gl.allocate_shared_memory(gl.bfloat16, [2 * _STAGES, _ROWS, 16], terms)
        else:
            biases = gl.allocate_shared_memory(gl.float32, [2, _ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        row_biases: gl.constexpr = 0
        row_tiles: gl.constexpr = 0
        row_stride_b: gl.constexpr = 0
        row_stride_h: gl.constexpr = 0
    else:
        biases = gl.allocate_shared_memory(gl.float32, [_STAGES, 1, _ROWS], bias.layout)
        row_biases = bias
        row_tiles = biases
        row_stride_b = stride_bias_b
        row_stride_h = stride_bias_h
    if not DELTA:
        deltas: gl.constexpr = 0
        of_delta: gl.constexpr = 0
    else:
        deltas = gl.allocate_shared_memory(gl.float32, [_STAGES, 1, _ROWS], delta.layout)
        of_delta = delta
    if not BIAS_PRODUCT and (SOFTCAP or not ROW_SUMS):
        ones: gl.constexpr = 0
    elif BIAS_PRODUCT:
        ones = gl.allocate_shared_memory(gl.bfloat16, [1, _KEYS // 2, 16], terms)
        ones.index(0).store(ones_of_terms(_KEYS // 2))
    else:
        SUMMED: gl.constexpr = _KEYS if APART else _KEYS // 2
        ones_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, SUMMED], dtype)
        ones = gl.allocate_shared_memory(dtype, [1, 8, SUMMED], ones_layout)
        ones.index(0).store(gl.full([8, SUMMED], 1.0, dtype, gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])))
    if not RING:
        first_chunks: gl.constexpr = 0
        first_results: gl.constexpr = 0
        second_chunks: gl.constexpr = 0
        second_results: gl.constexpr = 0
        zeros: gl.constexpr = 0
        first_loaded: gl.constexpr = 0
        second_loaded: gl.constexpr = 0
    else:
        CHUNKS: gl.constexpr = 4 if APART else 2
        first_chunks = gl.allocate_shared_memory(gl.float32, tiles_like(CHUNKS, chunks.block_type), chunks.layout)
        second_chunks = gl.allocate_shared_memory(gl.float32, tiles_like(CHUNKS, chunks.block_type), chunks.layout)
        zeros = gl.allocate_shared_memory(gl.float32, [CHUNK_ROWS, 256], chunks.layout)
        zeros.store(gl.zeros([CHUNK_ROWS, 256], gl.float32, gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])))
        first_results = gl.allocate_shared_memory(dtype, tiles_like(4, dq.block_type), dq.layout)
        first_loaded = gl.allocate_shared_memory(gl.int64, [CHUNKS, 1], barrier)
        second_results = gl.allocate_shared_memory(dtype, tiles_like(4, dq.block_type), dq.layout)
        second_loaded = gl.allocate_shared_memory(gl.int64, [CHUNKS, 1], barrier)
        for i in gl.static_range(CHUNKS):
            mbarrier.init(first_loaded.index(i), 1)
            mbarrier.init(second_loaded.index(i), 1)
    k_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], barrier)
    kv_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], barrier)
    # One of each buffer: who counts items, slowly, might miss that one barrier completes twice, and wait for ever.
    keys_read = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], barrier)
    full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], barrier)
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    for i in gl.static_range(BUFFERS):
        mbarrier.init(k_full.index(i), 1)
        mbarrier.init(v_full.index(i), 1)
        mbarrier.init(kv_empty.index(i), 3 if RING else 2)
        mbarrier.init(keys_read.index(i), 1 if APART else 2)
    for i in gl.static_range(_STAGES):
        mbarrier.init(full.index(i), 1)
        mbarrier.init(empty.index(i), 2)
    for i in gl.static_range(2):
        mbarrier.init(ds_full.index(i), 2)
        mbarrier.init(ds_empty.index(i), 1)
    fence_async_shared()

    computing = (
        dk, dv, sums, k_tiles, v_tiles, q_tiles, do_tiles, ds_tiles, places, k_full, v_full, kv_empty, full,
        empty, ds_full, ds_empty, keys_read, heads, group, items, all_tiles, q_len, kv_len, left, right,
        stride_bias_b, stride_bias_h, scale, const_bias, softcap if SOFTCAP else 0,
    )  # fmt: skip
    units_of_sums = turns * in_turn if RING else units
    counters = sums + (units_of_sums * group).to(gl.int64) * all_tiles * (_ROWS * (DIM + 1 if ROW_SUMS else DIM))
    counters = counters.to(gl.pointer_type(gl.int32), bitcast=True)
    loading = (
        q, k, v, do, k_tiles, v_tiles, q_tiles, do_tiles, places, k_full, v_full, kv_empty, full, empty,
        counters, items, units, at_once, in_turn, turns, heads, group, all_tiles, q_len, kv_len, left, right,
    )  # fmt: skip
    counting = counters, places, k_full, kv_empty, keys_read, in_turn, heads // group
    finishing = (
        counters, units, in_turn, turns, items, heads, group, all_tiles, scale,
    )  # fmt: skip
    FIRST: gl.constexpr = 64  # columns of dQ that are added as one tile
    # Who loads, who counts, and two that finish, are one warp each.
    if APART:
        gl.warp_specialize(
            [
                (compute, (
                    computing, 0 if BIAS_ROWS else bias, parts, floor, biases, deltas, ones, 0, DIM, APART,
                    VISIBLE, BANDED, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT, BIAS_ROWS, SUMS, ROW_SUMS, GROUPED, DELTA,
                    PACKED, P_SCALE, FORM, SLOW, SOFTCAP,
                )),
                (compute, (
                    computing, 0 if BIAS_ROWS else bias, parts, floor, biases, deltas, ones, 1, DIM, APART,
                    VISIBLE, BANDED, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT, BIAS_ROWS, SUMS, ROW_SUMS, GROUPED, DELTA,
                    PACKED, P_SCALE, FORM, SLOW, SOFTCAP,
                )),
                (add_queries, (
                    sums, k_tiles, ds_tiles, ones, places, k_full, ds_full, ds_empty, keys_read, group, all_tiles,
                    DIM, ROW_SUMS, RING, SOFTCAP,
                )),
                (load, (
                    loading, plan, row_biases, row_tiles, row_stride_b, row_stride_h, of_delta, deltas,
                    HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT, BIAS_ROWS, DELTA, RING,
                )),
                (count_items, (counting, RING)),
                (finish_tiles, (
                    finishing, chunks, dq, first_chunks, zeros, first_results, first_loaded, DIM, FIRST, RING
                )),
                (finish_tiles, (
                    finishing, chunks, dq, second_chunks, zeros, second_results, second_loaded, DIM, FIRST, RING
                )),
            ],
            [4, 4, 1, 1, 1, 1],
            [192, 96, 32, 32, 32, 32] if RING else [192, 104, 24, 24, 24, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (compute, (
                    computing, 0 if BIAS_ROWS else bias, parts, floor, biases, deltas, ones, 0, DIM, APART,
                    VISIBLE, BANDED, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT, BIAS_ROWS, SUMS, ROW_SUMS, GROUPED, DELTA,
                    PACKED, P_SCALE, FORM, SLOW, SOFTCAP,
                )),
                (compute, (
                    computing, 0 if BIAS_ROWS else bias, parts, floor, biases, deltas, ones, 1, DIM, APART,
                    VISIBLE, BANDED, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT, BIAS_ROWS, SUMS, ROW_SUMS, GROUPED, DELTA,
                    PACKED, P_SCALE, FORM, SLOW, SOFTCAP,
                )),
                (load, (
                    loading, plan, row_biases, row_tiles, row_stride_b, row_stride_h, of_delta, deltas,
                    HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT, BIAS_ROWS, DELTA, RING,
                )),
                (count_items, (counting, RING)),
                (finish_tiles, (
                    finishing, chunks, dq, first_chunks, zeros, first_results, first_loaded, DIM, FIRST, RING
                )),
                (finish_tiles, (
                    finishing, chunks, dq, second_chunks, zeros, second_results, second_loaded, DIM, FIRST, RING
                )),
            ],
            [4, 1, 1, 1, 1],
            [240, 24, 24, 24, 24],
        )  # fmt: skip
