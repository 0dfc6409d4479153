"""The backward of sigmoid attention over long sequences on Hopper GPUs, for heads wider than 128, in Gluon.

:mod:`sigswap.kernels.hopper.backward` gives each of two warpgroups dK and dV of 64 keys: of wider heads, registers do
not hold them. Here both warpgroups have the same 64 keys, and different products:

- The first computes the scores, probabilities and dV, the second dP, dS and dK: so each has one sum in registers, and
  what multiplies queries and output gradients comes from registers, not by way of shared memory, whose bandwidth is a
  bottleneck.
- What the second needs of the first is the slope of the sigmoid, p(1 - p), which goes through shared memory in
  float16, times 2^16: so small ones have as many bits as large ones, and more than bfloat16 leaves them. A soft cap's
  is part of it, or, where dS is summed for a bias, goes beside it.
- They meet through memory barriers only. While one computes in registers, the other multiplies matrices.
- With a row cap delta comes with the output gradients, and dP starts from minus delta.
- dS goes to memory, and a second kernel multiplies it by the keys: dQ. Adding dQ up in memory, as is done for narrower
  heads, takes eight times as many bytes for 64 keys, more than the L2 cache adds while the products are computed.
- dS of all heads would take much memory. So both kernels are launched by turns, for some heads at a time
  (:mod:`sigswap.kernels.hopper.stored_ds`); and where one takes too much, dQ is added up in memory after all.

Heads of 129 to 192 are held as 128 columns and 64, so that no product is wider than they are.

dQ that is added up is added in no fixed order: two runs differ by rounding. ``torch.use_deterministic_algorithms``
avoids that.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sigswap.kernels.hopper.backward_common import (
    _ROWS,
    ROWS,
    Deltas,
    RowTiles,
    deltas_for,
    heads_at_once,
    row_tiles_for,
    sees_every_block,
    takes,
    visible_keys,
)
from sigswap.kernels.hopper.backward_wide_warps import compute_keys, compute_values, load
from sigswap.kernels.hopper.common import Tiles
from sigswap.kernels.hopper.grad_query import PRODUCT_OPTIONS, finish_columns_kernel, product_kernel
from sigswap.kernels.hopper.stored_ds import _BLOCK, _KEYS, BLOCK, KEYS, Lines, lines_for, units_at_once
from sigswap.kernels.host.launch import Described, Launch, by_rows
from sigswap.kernels.host.layout import Layout, contiguous_layout, layout_of, new_tensor
from sigswap.kernels.host.problem import MAX_PLANS, Gradients, Problem, Signature
from sigswap.kernels.host.results import gradients_for, hand_over
from sigswap.kernels.triton.common import _AUTO, _FAST, _FAST_BIAS
from sigswap.kernels.triton.sums import Sum

MAX_DIM = 256

LONG = 255
"""With more visible keys per row, on average, this kernel is faster than :mod:`sigswap.kernels.triton.backward`: with
256 to 1,024 it took 0.28 to 0.41 of its time. Fewer have not been measured."""


def supports(problem: Problem) -> bool:
    """Whether this kernel takes the backward: of long sequences in half precision, where query or value has a head_dim
    of 129 to 256, and neither one below 65, without mask and dropout, where all of query, key and value want
    gradients; with a soft cap not where a bias does that differs between rows, whose sums are not those of dX, nor
    where any does and dQ is added up, for which there are too few registers."""
    signature = problem.signature
    if not 128 < max(signature.query.shape[3], signature.value.shape[3]) <= MAX_DIM:
        return False
    if min(signature.widths) < 128 or signature.packed is not None or not takes(problem):
        return False
    sums = problem.output_mask[3] and signature.bias is not None
    if problem.options.softcap > 0.0 and sums and (signature.biased_by_rows or not units_at_once(signature)):
        return False
    if torch.are_deterministic_algorithms_enabled() and not units_at_once(signature):
        return False
    return sees_every_block(signature, KEYS) and visible_keys(signature) > LONG * signature.q_len


def backward(problem: Problem) -> Gradients:
    grads, written, layouts = gradients_for(problem)
    grad_out = problem.readable_grad_out()
    plan = _plan(problem.signature, layout_of(grad_out), layouts, problem.row_delta is not None)
    new_query, new_key, new_value, new_bias, _ = written
    assert new_key is not None and new_value is not None
    parts = None if plan.sum_parts is None else plan.sum_parts.empty_parts()
    tensors = problem.query, problem.key, problem.value, grad_out, new_key, new_value
    given = *tensors, *(tensor if there else None for tensor, there in zip(tensors, plan.rest, strict=True))
    delta = None if plan.deltas is None else plan.deltas(problem)
    if plan.rows is None:
        bias, floor, by_head, by_row = problem.bias, None, parts, None
    else:
        bias, floor = plan.rows.biases(problem, None)
        by_head, by_row = None, new_bias if parts is None else parts
    if plan.ds is None:
        assert plan.sums is not None and plan.finish is not None
        sums = torch.zeros(plan.sums.shape, dtype=torch.float32, device=problem.query.device)
        for launch in plan.launches:
            launch(*given, None, sums, by_head, bias, floor, delta)
        plan.finish(sums, new_query, by_row, None, None)
    else:
        ds = new_tensor(plan.ds.layout, problem.query.device)
        rest_of_key = problem.key if plan.ds.rest_of_key else None
        for launch, multiply in zip(plan.launches, plan.ds.multiply, strict=True):
            launch(*given, ds, None, by_head, bias, floor, delta)
            multiply(ds, problem.key, rest_of_key, new_query, by_row)
    if plan.sum_parts is not None:
        assert parts is not None and new_bias is not None
        plan.sum_parts(parts, new_bias)
    hand_over(grads, written)
    return grads


class _Square(Described):
    """dS in memory, [keys of all tiles, rows of a tile], for Gluon."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout.shape, layout.strides, (KEYS, ROWS), layout.dtype)

    def describe(self, tensor: Tensor) -> Any:
        shared = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        return TensorDescriptor(tensor, list(self.shape), list(self.strides), list(self.block), shared)


class _Stored(NamedTuple):
    """How dS goes through memory."""

    layout: Layout
    written: _Square
    """How launches get it."""
    rest_of_key: bool
    """Whether key has columns behind those of the first tile, which come once more, in tiles of their own."""
    multiply: tuple[Launch, ...]
    """By the keys, after each launch."""


class _Plan(NamedTuple):
    rest: tuple[bool, ...]
    """Which of query, key, value, grad_out and the gradients of key and value have columns behind those of the first
    tile. They are given once more, for tiles of these."""
    deltas: Deltas | None
    """Where rows have a cap."""
    launches: tuple[Launch, ...]
    """Several, if dS goes through memory: each of as many heads as there is memory for."""
    ds: _Stored | None
    sums: Layout | None
    """Else of dQ, as the kernel adds it up."""
    finish: Launch | None
    rows: RowTiles | None
    """Where the bias tensor differs between rows."""
    sum_parts: Sum | None
    """Where the gradient of the bias is a sum: of what launches write, or, of rows' biases, what writes dQ."""


def _columns(dim: int) -> tuple[int, int]:
    """A head as tiles hold it: the columns of one tile, and those of another one behind it."""
    return (256, 0) if dim > 192 else (128, 64) if dim > 128 else (128, 0)


@functools.lru_cache(MAX_PLANS)
def _plan(signature: Signature, grad_out: Layout, grads: tuple[Layout | None, ...], capped: bool) -> _Plan:
    grad_query, grad_key, grad_value, grad_bias, _ = grads
    assert grad_query is not None and grad_key is not None and grad_value is not None
    band = signature.band()
    operands = signature.query, signature.key, signature.value, grad_out, grad_key, grad_value
    lengths = ROWS, KEYS, KEYS, ROWS, KEYS, KEYS
    columns = [_columns(each.shape[3]) for each in operands]
    wide = [Tiles(*each) for each in zip(operands, lengths, (wide for wide, _ in columns), strict=True)]
    rest = [Tiles(*each) if each[2] else None for each in zip(operands, lengths, (r for _, r in columns), strict=True)]
    described = *wide, *rest
    width = sum(columns[0])
    rows = row_tiles_for(signature)
    row_sums = rows is not None and grad_bias is not None
    head_sums = rows is None and grad_bias is not None
    blocks = triton.cdiv(signature.kv_len, KEYS)
    sum_parts = parts = None
    if grad_bias is not None:
        # One of each row, or of each thread of the second warpgroup.
        shape = signature.batch, signature.heads, signature.q_len if row_sums else blocks * 128, 1
        if head_sums or grad_bias.shape != shape:
            sum_parts = Sum(grad_bias, shape, signature.device)
            parts = contiguous_layout(shape, torch.float32)
    of_rows = (parts or grad_bias) if row_sums else None
    strides = (0, 0, 0) if of_rows is None else of_rows.strides_or_zero(3)
    of_queries = signature.arguments(dq=grad_query) | {"DIM": width}
    of_queries |= {f"stride_db_{dim}": stride for dim, stride in zip("bhm", strides, strict=True)}
    units = signature.batch * signature.kv_heads
    among = units_at_once(signature)
    stored = sums = finish = None
    lines = Lines(1, 1)
    firsts = [0]
    if among > 0:
        firsts = list(range(0, units, among))
        lines = lines_for(signature)
        stored = _stored(signature, lines, grad_query, of_rows, firsts, among, of_queries)
    else:
        among = units
        tiles = triton.cdiv(signature.q_len, ROWS)
        numbers = ROWS * (width + 1 if row_sums else width)
        sums = contiguous_layout((signature.batch * signature.heads * tiles, numbers), torch.float32)
        finish_arguments = of_queries | {"tiles": tiles, "FIRST": _first_part(width), "COLUMNS": 64}
        chunks = sums.shape[0] * (width // 64)
        outputs = sums, grad_query, of_rows, None, None
        finish = Launch(finish_columns_kernel, chunks, signature.device, outputs, finish_arguments, num_warps=4)
    arguments = signature.arguments() | {
        "BANDED": band.has_left or band.has_right,
        "SUMS": head_sums,
        "ROW_SUMS": row_sums,
        "GROUPED": signature.heads > signature.kv_heads,
        "DELTA": capped,
        "STAGES": _stages(signature),
        "lines": lines.lines,
        "line_tiles": lines.tiles,
    }
    bias: Layout | Described | None = signature.bias
    floor = None
    if rows is not None:
        bias, floor = rows.described, rows.biases.floor
        arguments |= rows.arguments()
    ds = None if stored is None else stored.written
    deltas = deltas_for(signature) if capped else None
    tensors = (
        *(*described, ds, sums, parts if head_sums else None, bias, floor),
        None if deltas is None else deltas.described,
    )
    launches = []
    for first in firsts:
        count = min(among, units - first)
        at_once = heads_at_once(signature, blocks, count)
        own = arguments | {"first_unit": first, "units": count, "at_once": at_once}
        launches.append(Launch(_kernel, blocks * count, signature.device, tensors, own, num_warps=4))
    further = tuple([each is not None for each in rest])
    return _Plan(further, deltas, tuple(launches), stored, sums, finish, rows, sum_parts)


def _stages(signature: Signature) -> int:
    """Tiles of rows in flight: three of query and value with 192 and 128 columns, which shared memory holds."""
    return 3 if sum(sum(_columns(each.shape[3])) for each in (signature.query, signature.value)) <= 320 else 2


def _stored(
    signature: Signature,
    lines: Lines,
    grad_query: Layout,
    of_rows: Layout | None,
    firsts: list[int],
    among: int,
    arguments: dict[str, Any],
) -> _Stored:
    wide, rest = _columns(signature.query.shape[3])
    group = signature.heads // signature.kv_heads
    tiles = triton.cdiv(signature.q_len, BLOCK)
    layout = contiguous_layout((among * group * lines.lines * lines.tiles * KEYS, BLOCK), signature.query.dtype)
    read = Described(layout.shape, layout.strides, (KEYS, BLOCK), layout.dtype)
    arguments |= {"lines": lines.lines, "line_tiles": lines.tiles}
    by = by_rows(signature.key, KEYS)
    first_keys, *other_keys = (Described(by.shape, by.strides, (*by.block[:3], n), by.dtype) for n in (wide, rest) if n)
    keys = first_keys, other_keys[0] if other_keys else None
    multiply = []
    for first in firsts:
        count = min(among, signature.batch * signature.kv_heads - first) * group
        own = arguments | {"first_head": first * group, "among": count, "ROW_SUMS": of_rows is not None}
        tensors = read, *keys, grad_query, of_rows
        multiply.append(Launch(product_kernel, tiles * count, signature.device, tensors, own, **PRODUCT_OPTIONS))
    return _Stored(layout, _Square(layout), bool(other_keys), tuple(multiply))


def _first_part(width: int) -> int:
    """The columns of dQ that the first warpgroup computes."""
    return 64 if width == 128 else 128


# Device functions. A tile of scores is [keys, rows].


@gluon.jit(do_not_specialize=[
    "heads", "group", "q_len", "kv_len", "left", "right", "scale", "const_bias", "first_unit", "units", "at_once",
    "softcap", "lines", "line_tiles",
])  # fmt: skip
def _kernel(
    q, k, v, do, dk, dv, q_rest, k_rest, v_rest, do_rest, dk_rest, dv_rest, ds, sums, parts, bias, floor, delta,
    stride_bias_b, stride_bias_h, heads, group, q_len, kv_len, left, right, scale, const_bias,
    first_unit, units, at_once, softcap, lines, line_tiles,
    VISIBLE: gl.constexpr, BANDED: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    BOTTOM_RIGHT: gl.constexpr, BIAS_ROWS: gl.constexpr, SUMS: gl.constexpr, ROW_SUMS: gl.constexpr,
    GROUPED: gl.constexpr, DELTA: gl.constexpr, P_SCALE: gl.constexpr, FORM: gl.constexpr, SLOW: gl.constexpr,
    STAGES: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """One program: dK and dV of 64 keys of one key head, over all query heads that use it, and what they add to dQ.

    Of heads of 129 to 192 columns, the first tensors' tiles hold 128, and those of *_rest 64; else those are None.
    sums: float32 [B * H * ceil(M / 64), ...], zeros: of each tile of dQ the columns of the first warpgroup, then those
    of the second; if ROW_SUMS of each row the sum of dS behind them.
    parts: float32 [B, H, blocks of keys, 128]: sums of dS, if SUMS.
    bias, floor: of a tensor that differs between rows, BIAS_ROWS, b_i and the least of blocks of it (RowBiases);
    strides of bias count its rows then.
    delta: float32 [B * H, M], if DELTA, where rows have a cap: what is subtracted from dP.
    """
    # Under a causal mask the first keys take longest, and start first, in as many heads as fill the GPU.
    blocks = gl.cdiv(kv_len, _KEYS)
    first = gl.program_id(0) // (at_once * blocks) * at_once
    among = gl.minimum(at_once, units - first)
    rest = gl.program_id(0) - first * blocks
    col0 = rest // among * _KEYS
    place = first + rest % among
    unit = first_unit + place
    STORED: gl.constexpr = ds is not None
    kv_heads = heads // group
    kv_head = unit % kv_heads
    batch = unit // kv_heads
    shift = kv_len - q_len if BOTTOM_RIGHT else 0
    # The rows that see some of the keys; at least one tile, of which they then see none.
    begin = 0
    end = q_len
    BLOCK: gl.constexpr = _BLOCK if STORED else _ROWS
    if HAS_RIGHT:
        begin = gl.maximum(col0 - shift - right, 0)
    if HAS_LEFT:
        end = gl.minimum(end, gl.minimum(col0 + _KEYS, kv_len) - shift + left)
    if STORED:
        place = gl.where(begin < end, place, -1)  # dS of keys that no row sees has none
    if HAS_RIGHT:
        begin = gl.minimum(begin, q_len - 1) // BLOCK * BLOCK
    span = gl.maximum(gl.cdiv(end - begin, BLOCK), 1) * (BLOCK // _ROWS)
    fast = True
    if FORM == _AUTO and not BIAS_ROWS:
        # Of all heads and rows the least bias. No row sees more keys than a window has.
        count = kv_len
        if HAS_LEFT and HAS_RIGHT:
            count = gl.minimum(count, left + right + 1)
        lowest = const_bias + 0.0
        if VISIBLE:
            lowest -= gl.log(gl.maximum(count, 1).to(gl.float32))
        own = float("inf")
        for member in range(group):
            at = batch.to(gl.int64) * stride_bias_b + (kv_head * group + member).to(gl.int64) * stride_bias_h
            own = gl.minimum(own, gl.load(bias + at).to(gl.float32))
        fast = lowest + own >= _FAST_BIAS
    if FORM < _FAST:
        fast = False

    Q_REST: gl.constexpr = q_rest is not None
    V_REST: gl.constexpr = v_rest is not None
    dtype: gl.constexpr = k.dtype
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    k_tile = gl.allocate_shared_memory(dtype, [1, 1, 1, _KEYS, k.block_shape[3]], k.layout)
    v_tile = gl.allocate_shared_memory(dtype, [1, 1, 1, _KEYS, v.block_shape[3]], v.layout)
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, _ROWS, q.block_shape[3]], q.layout)
    do_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, _ROWS, do.block_shape[3]], do.layout)
    # What a partition has no use for is not handed to it.
    if not Q_REST:
        k_tile_rest: gl.constexpr = 0
        q_tiles_rest: gl.constexpr = 0
    else:
        k_tile_rest = gl.allocate_shared_memory(dtype, [1, 1, 1, _KEYS, 64], k_rest.layout)
        q_tiles_rest = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, _ROWS, 64], q_rest.layout)
    if not V_REST:
        v_tile_rest: gl.constexpr = 0
        do_tiles_rest: gl.constexpr = 0
    else:
        v_tile_rest = gl.allocate_shared_memory(dtype, [1, 1, 1, _KEYS, 64], v_rest.layout)
        do_tiles_rest = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, _ROWS, 64], do_rest.layout)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_KEYS, _ROWS], dtype)
    ds_tiles = gl.allocate_shared_memory(dtype, [2, _KEYS, _ROWS], ds_layout)
    of_slopes: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_KEYS, _ROWS], gl.float16)
    slopes = gl.allocate_shared_memory(gl.float16, [2, _KEYS, _ROWS], of_slopes)
    if not BIAS_ROWS:
        biases = gl.allocate_shared_memory(gl.float32, [_ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        row_biases: gl.constexpr = 0
        row_tiles: gl.constexpr = 0
        row_stride_b: gl.constexpr = 0
        row_stride_h: gl.constexpr = 0
    else:
        biases = gl.allocate_shared_memory(gl.float32, [STAGES, 1, _ROWS], bias.layout)
        row_biases = bias
        row_tiles = biases
        row_stride_b = stride_bias_b
        row_stride_h = stride_bias_h
    if not DELTA:
        deltas: gl.constexpr = 0
        of_delta: gl.constexpr = 0
    else:
        deltas = gl.allocate_shared_memory(gl.float32, [STAGES, 1, _ROWS], delta.layout)
        of_delta = delta
    if STORED or not ROW_SUMS:
        ones: gl.constexpr = 0
    else:
        ones_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, _KEYS], dtype)
        ones = gl.allocate_shared_memory(dtype, [1, 8, _KEYS], ones_layout)
        ones.index(0).store(gl.full([8, _KEYS], 1.0, dtype, gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])))
    k_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    k_read = gl.allocate_shared_memory(gl.int64, [1], barrier)
    v_read = gl.allocate_shared_memory(gl.int64, [1], barrier)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    slopes_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    mbarrier.init(k_full, 1)
    mbarrier.init(v_full, 1)
    mbarrier.init(k_read, 1)
    mbarrier.init(v_read, 1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), 1)
        mbarrier.init(do_full.index(i), 1)
        mbarrier.init(q_empty.index(i), 1)
        mbarrier.init(do_empty.index(i), 1)
    for i in gl.static_range(2):
        mbarrier.init(ds_full.index(i), 1)
        mbarrier.init(slopes_full.index(i), 1)
    fence_async_shared()

    gl.warp_specialize(
        [
            (compute_values, (
                dv, dv_rest if V_REST else 0, sums, 0 if BIAS_ROWS else bias, floor, k_tile, v_tile, q_tiles, do_tiles,
                k_tile_rest, v_tile_rest, q_tiles_rest, do_tiles_rest, slopes, ds_tiles, biases,
                k_full, q_full, do_full, do_empty, slopes_full, ds_full,
                k_read, v_read, batch, kv_head, heads, group, col0, begin, span, q_len, kv_len, shift, left, right,
                stride_bias_b, stride_bias_h, scale, const_bias, fast,
                softcap if SOFTCAP else 0,
                Q_REST, V_REST, VISIBLE, BANDED, HAS_LEFT, HAS_RIGHT, BIAS_ROWS, ROW_SUMS, GROUPED, P_SCALE, FORM,
                SLOW, STORED, SOFTCAP, SUMS,
            )),
            (compute_keys, (
                dk, dk_rest if Q_REST else 0, ds if STORED else 0, sums, parts, k_tile, v_tile, q_tiles, do_tiles,
                k_tile_rest, v_tile_rest, q_tiles_rest, do_tiles_rest, slopes, ds_tiles, ones, deltas,
                k_full, v_full, q_full, do_full, q_empty, slopes_full, ds_full,
                k_read, v_read, batch, kv_head, heads, group, col0, begin, span, blocks, q_len, kv_len, place,
                lines, line_tiles, shift - left, scale,
                Q_REST, V_REST, SUMS, ROW_SUMS, GROUPED, DELTA, STORED, SOFTCAP, HAS_LEFT,
            )),
            (load, (
                q, k, v, do, q_rest if Q_REST else 0, k_rest if Q_REST else 0, v_rest if V_REST else 0,
                do_rest if V_REST else 0, row_biases, of_delta, k_tile, v_tile, q_tiles, do_tiles,
                k_tile_rest, v_tile_rest, q_tiles_rest, do_tiles_rest, row_tiles, deltas,
                k_full, v_full, q_full, do_full, q_empty, do_empty,
                batch, kv_head, heads, group, col0, begin, span, row_stride_b, row_stride_h,
                BIAS_ROWS, DELTA, Q_REST, V_REST,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
