"""The backward of sigmoid attention over long sequences on Hopper GPUs, for heads wider than 128, in Gluon.

:mod:`hopper_bwd` gives each of two warpgroups dK and dV of 64 keys: of wider heads, registers do not hold them. Here
both warpgroups have the same 64 keys, and different products:

- The first computes the scores, probabilities and dV, the second dP, dS and dK: so each has one sum in registers, and
  what multiplies queries and output gradients comes from registers, not by way of shared memory, whose bandwidth is a
  bottleneck.
- What the second needs of the first is the slope of the sigmoid, p(1 - p), which goes through shared memory in
  float16, times 2^16: so small ones have as many bits as large ones, and more than bfloat16 leaves them.
- They meet through memory barriers only. While one computes in registers, the other multiplies matrices.
- dS goes to memory, and a second kernel multiplies it by the keys: dQ. Adding dQ up in memory, as :mod:`hopper_bwd`
  does, takes eight times as many bytes for 64 keys, more than the L2 cache adds while the products are computed.
- dS of all heads would take much memory. So both kernels are launched by turns, for as many heads as there is memory
  for; and where there is not enough for one, dQ is added up in memory after all.

Heads of 129 to 192 are held as 128 columns and 64, so that no product is wider than they are.

dQ that is added up is added in no fixed order: two runs differ by rounding. ``torch.use_deterministic_algorithms``
avoids that.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sigswap.kernels import reference
from sigswap.kernels.hopper import Numbers, Tiles, load_tile, store_tile, sync
from sigswap.kernels.hopper_bwd import (
    _BY_THREAD,
    _add,
    _add_rows,
    _head_bias,
    _lowest,
    _next_tile,
    _probabilities,
    _put_row_biases,
    _Rows,
    _start_at,
    _start_of_scores,
    _start_row_sums,
    _sum_per_thread,
    _unknown_zero,
    _visible_keys,
)
from sigswap.kernels.launch import (
    MAX_PLANS,
    Described,
    Launch,
    Layout,
    Signature,
    by_rows,
    contiguous_layout,
    describable,
    gradients_for,
    hand_over,
    layout_of,
    limits_of,
    new_tensor,
    row_biases_for,
    signature_of,
    unit_stride,
)
from sigswap.kernels.sums import Sum
from sigswap.kernels.triton_common import _AUTO, _FAST, _FAST_BIAS, _LOG2E, elements

MAX_DIM = 256

LONG = 255
"""With more visible keys per row, on average, this kernel is faster than :mod:`flash_bwd`: with 256 to 1,024 it took
0.28 to 0.41 of its time. Fewer have not been measured."""

ROWS, KEYS = 64, 64
"""A tile's rows; the keys of a program."""

BLOCK = 128
"""Rows of dQ that a program of _queries_kernel() computes."""

MULTIPLY_OPTIONS = {"num_warps": 8, "num_stages": 4}

STORED_BYTES, MOST_BYTES = 256 << 20, 512 << 20
"""What dS may take of as many key heads as go through memory at a time; and of one, which is the least, if that takes
more. 512 MiB are 16,384 queries and as many keys of one head; to add dQ up instead takes 1.2 to 1.3 times as long."""

_ROWS, _KEYS, _BLOCK = tl.constexpr(ROWS), tl.constexpr(KEYS), tl.constexpr(BLOCK)
_SLOPE_SCALE = tl.constexpr(65536.0)
_FINISHED = tl.constexpr(64)
"""Columns of dQ that a program of _finish_kernel() puts in order."""


def suits(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    output_mask: list[bool],
    options: reference.Options,
) -> bool:
    """Whether this kernel takes the backward: of long sequences in half precision, where query or value has a head_dim
    of 129 to 256, without mask, dropout and soft cap, where all of query, key and value want gradients."""
    if not 128 < max(query.shape[3], value.shape[3]) <= MAX_DIM:
        return False
    if key.shape[2] <= LONG or attn_mask is not None or options.dropout_p > 0.0 or options.softcap > 0.0:
        return False
    if not all(output_mask[:3]) or query.element_size() != 2 or abs(options.scale) < 1e-6:
        return False
    signature = signature_of(query, key, value, bias, attn_mask, options)
    if torch.are_deterministic_algorithms_enabled() and not _units_at_once(signature):
        return False
    if grad_out.stride(-1) == 1:
        return _suits(signature, layout_of(grad_out))
    return _suits(signature, contiguous_layout(grad_out.shape, grad_out.dtype))  # of unit_stride(grad_out)


@functools.lru_cache(MAX_PLANS)
def _suits(signature: Signature, grad_out: Layout) -> bool:
    operands = signature.query, signature.key, signature.value, grad_out
    if signature.is_empty or not signature.tma(signature.q_len) or limits_of(signature.device).capability >= 100:
        return False
    if min(signature.widths) < 128 or not all(describable(each) for each in operands):
        return False
    if any(each.shape[3] % 8 != 0 for each in operands):  # new gradients would not be describable
        return False
    return _sees_every_block(signature) and _visible_keys(signature) > LONG * signature.q_len


def _sees_every_block(signature: Signature) -> bool:
    """Whether some row sees some key of each program. A program whose keys no row sees would yet work through a tile of
    rows, where 0 times NaN is NaN."""
    shift, left, right = signature.options.band(signature.q_len, signature.kv_len)
    last_block = (signature.kv_len - 1) // KEYS * KEYS
    sees_last = right is None or signature.q_len - 1 + shift + right >= last_block
    return sees_last and (left is None or shift - left < min(KEYS, signature.kv_len))


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    output_mask: list[bool],
    options: reference.Options,
) -> tuple[Tensor | None, ...]:
    """``sigswap::sigmoid_attention_backward``, where it suits(), with None for what is not needed; the arguments are
    documented there."""
    inputs = query, key, value, bias, None
    signature = signature_of(*inputs, options)
    grads, written, layouts = gradients_for(signature, inputs, output_mask)
    grad_out = unit_stride(grad_out)
    plan = _plan(signature, layout_of(grad_out), layouts)
    new_query, new_key, new_value, new_bias, _ = written
    sums = ds = None
    if plan.ds is None:
        assert plan.sums is not None
        sums = torch.zeros(plan.sums.shape, dtype=torch.float32, device=query.device)
    else:
        ds = new_tensor(plan.ds.layout, query.device)
    parts = None if plan.sum_parts is None else plan.sum_parts.empty_parts()
    tensors = query, key, value, grad_out, new_key, new_value
    described = [None if by is None else by(tensors[index % 6]) for index, by in enumerate(plan.described)]
    floor = None
    by_head, by_row = (parts, None) if plan.rows is None else (None, new_bias if parts is None else parts)
    given: Any = bias
    if plan.rows is not None:
        biases, floor = plan.rows.biases(bias, None, None, query.device)
        given = plan.rows.described(biases)
    if plan.ds is None:
        for launch in plan.launches:
            launch(*described, None, sums, by_head, given, floor)
        assert plan.finish is not None
        plan.finish(sums, new_query, by_row)
    else:
        out, read = plan.ds.written(ds), plan.ds.read(ds)
        keys = [None if by is None else by(key) for by in plan.ds.keys]
        for launch, multiply in zip(plan.launches, plan.ds.multiply, strict=True):
            launch(*described, out, None, by_head, given, floor)
            multiply(read, *keys, new_query, by_row)
    if plan.sum_parts is not None:
        plan.sum_parts(parts, new_bias)
    hand_over(grads, written)
    return grads


class _Square(Described):
    """dS in memory, [rows of all heads' keys, queries], for Gluon."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout.shape, layout.strides, (KEYS, ROWS), layout.dtype)

    def describe(self, tensor: Tensor) -> Any:
        shared = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        return TensorDescriptor(tensor, list(self.shape), list(self.strides), list(self.block), shared)


class _Stored(NamedTuple):
    """How dS goes through memory."""

    layout: Layout
    written: _Square
    read: Described
    keys: tuple[Described, Described | None]
    multiply: tuple[Launch, ...]
    """By the keys, after each launch."""


class _Plan(NamedTuple):
    described: tuple[Described | None, ...]
    """query, key, value, grad_out and the gradients of key and value; then the rest of their columns, if any."""
    launches: tuple[Launch, ...]
    """Several, if dS goes through memory: each of as many heads as there is memory for."""
    ds: _Stored | None
    sums: Layout | None
    """Else of dQ, as the kernel adds it up."""
    finish: Launch | None
    rows: _Rows | None
    """Where the bias tensor differs between rows."""
    sum_parts: Sum | None
    """Where the gradient of the bias is a sum: of what launches write, or, of rows' biases, what writes dQ."""


def _columns(dim: int) -> tuple[int, int]:
    """A head as tiles hold it: the columns of one tile, and those of another one behind it."""
    return (256, 0) if dim > 192 else (128, 64) if dim > 128 else (128, 0)


@functools.lru_cache(MAX_PLANS)
def _plan(signature: Signature, grad_out: Layout, grads: tuple[Layout | None, ...]) -> _Plan:
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
    rows = _rows(signature)
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
    among = _units_at_once(signature)
    stored = sums = finish = None
    firsts = [0]
    if among > 0:
        firsts = list(range(0, units, among))
        stored = _stored(signature, grad_query, of_rows, firsts, min(among, units), of_queries)
    else:
        among = units
        tiles = triton.cdiv(signature.q_len, ROWS)
        numbers = ROWS * (width + 1 if row_sums else width)
        sums = contiguous_layout((signature.batch * signature.heads * tiles, numbers), torch.float32)
        finish_arguments = of_queries | {"tiles": tiles, "FIRST": _first_part(width)}
        chunks = sums.shape[0] * (width // _FINISHED.value)
        outputs = sums, grad_query, of_rows
        finish = Launch(_finish_kernel, chunks, signature.device, outputs, finish_arguments, num_warps=4)
    arguments = signature.arguments() | {
        "BANDED": band.has_left or band.has_right,
        "SUMS": head_sums,
        "ROW_SUMS": row_sums,
        "GROUPED": signature.heads > signature.kv_heads,
        "STAGES": _stages(signature),
    }
    bias: Layout | Described | None = signature.bias
    floor = None
    if rows is not None:
        bias, floor = rows.described, rows.biases.floor
        length = rows.biases.layout.shape[2]
        stride_b, stride_h, _ = rows.biases.layout.strides_or_zero(3)
        arguments |= {"stride_bias_b": stride_b // length, "stride_bias_h": stride_h // length, "VISIBLE": False}
    ds = None if stored is None else stored.written
    tensors = (*described, ds, sums, parts if head_sums else None, bias, floor)
    launches = []
    for first in firsts:
        count = min(among, units - first)
        at_once = 1
        if band.has_left or band.has_right:
            at_once = min(count, triton.cdiv(2 * limits_of(signature.device).multiprocessors, blocks))
        own = arguments | {"first_unit": first, "units": count, "at_once": at_once}
        launches.append(Launch(_kernel, blocks * count, signature.device, tensors, own, num_warps=4))
    return _Plan(described, tuple(launches), stored, sums, finish, rows, sum_parts)


def _stages(signature: Signature) -> int:
    """Tiles of rows in flight: three of query and value with 192 and 128 columns, which shared memory holds."""
    return 3 if sum(sum(_columns(each.shape[3])) for each in (signature.query, signature.value)) <= 320 else 2


def _units_at_once(signature: Signature) -> int:
    """Of how many pairs of sequence and key head dS goes through memory at a time; 0: of none, dQ is added up."""
    q_len = triton.cdiv(signature.q_len, BLOCK) * BLOCK
    kv_len = triton.cdiv(signature.kv_len, KEYS) * KEYS
    own = signature.heads // signature.kv_heads * q_len * kv_len * signature.element_size
    if own > MOST_BYTES:
        return 0
    units = signature.batch * signature.kv_heads
    return triton.cdiv(units, triton.cdiv(units, max(1, STORED_BYTES // own)))


def _stored(
    signature: Signature,
    grad_query: Layout,
    of_rows: Layout | None,
    firsts: list[int],
    among: int,
    arguments: dict[str, Any],
) -> _Stored:
    wide, rest = _columns(signature.query.shape[3])
    group = signature.heads // signature.kv_heads
    tiles = triton.cdiv(signature.q_len, BLOCK)
    padded = triton.cdiv(signature.kv_len, KEYS) * KEYS
    layout = contiguous_layout((among * group * padded, tiles * BLOCK), signature.query.dtype)
    read = Described(layout.shape, layout.strides, (KEYS, BLOCK), layout.dtype)
    by = by_rows(signature.key, KEYS)
    keys = [Described(by.shape, by.strides, (*by.block[:3], n), by.dtype) if n else None for n in (wide, rest)]
    multiply = []
    for first in firsts:
        count = min(among, signature.batch * signature.kv_heads - first) * group
        own = arguments | {"first_head": first * group, "among": count, "ROW_SUMS": of_rows is not None}
        tensors = read, *keys, grad_query, of_rows
        multiply.append(Launch(_queries_kernel, tiles * count, signature.device, tensors, own, **MULTIPLY_OPTIONS))
    return _Stored(layout, _Square(layout), read, (keys[0], keys[1]), tuple(multiply))


def _first_part(width: int) -> int:
    """The columns of dQ that the first warpgroup computes."""
    return 64 if width == 128 else 128


def _rows(signature: Signature) -> _Rows | None:
    if signature.bias is None or signature.bias.shape[2] == 1:
        return None
    biases = row_biases_for(signature)
    assert biases is not None
    return _Rows(biases, Numbers(biases.layout, ROWS))


# Device functions. A tile of scores is [keys, rows].


@gluon.jit
def _start_product(a, a_rest, b, b_rest, start, use_acc, REST: gl.constexpr):
    """a times the transpose of b: products of all columns of heads, which start is part of if use_acc."""
    token = warpgroup_mma(a, b.permute((1, 0)), start, use_acc=use_acc, is_async=True)
    if REST:
        token = warpgroup_mma(a_rest, b_rest.permute((1, 0)), token, is_async=True)
    return token


@gluon.jit
def _end_of_head(parts, sum_of_ds, heads_on, blocks):
    """Where heads_on is 1, the sums go out, and those of the next head start. No branch: products are in flight."""
    ends = gl.full(sum_of_ds.shape, 0, gl.int32, sum_of_ds.type.layout) + heads_on != 0
    gl.store(parts, sum_of_ds, mask=ends)
    return parts + heads_on.to(gl.int64) * blocks * 128, gl.where(ends, 0.0, sum_of_ds)


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The stage behind this one, and its barriers' phase."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def _load(
    q, k, v, do, q_rest, k_rest, v_rest, do_rest, bias, k_tile, v_tile, q_tiles, do_tiles,
    k_tile_rest, v_tile_rest, q_tiles_rest, do_tiles_rest, biases,
    k_full, v_full, q_full, do_full, q_empty, do_empty,
    batch, kv_head, group, col0, begin, span, stride_bias_b, stride_bias_h,
    BIAS_ROWS: gl.constexpr, Q_REST: gl.constexpr, V_REST: gl.constexpr,
):  # fmt: skip
    """One warp: all that the others compute with."""
    STAGES: gl.constexpr = q_tiles.shape[0]
    K_BYTES: gl.constexpr = k.block_type.nbytes + (k_rest.block_type.nbytes if Q_REST else 0)
    V_BYTES: gl.constexpr = v.block_type.nbytes + (v_rest.block_type.nbytes if V_REST else 0)
    Q_BYTES: gl.constexpr = q.block_type.nbytes + (q_rest.block_type.nbytes if Q_REST else 0)
    DO_BYTES: gl.constexpr = do.block_type.nbytes + (do_rest.block_type.nbytes if V_REST else 0)
    WITH_BIAS: gl.constexpr = bias.block_type.nbytes if BIAS_ROWS else 0
    mbarrier.expect(k_full, K_BYTES)
    load_tile(k, [batch, kv_head, col0, 0], k_full, k_tile.index(0))
    if Q_REST:
        load_tile(k_rest, [batch, kv_head, col0, 128], k_full, k_tile_rest.index(0))
    mbarrier.expect(v_full, V_BYTES)
    load_tile(v, [batch, kv_head, col0, 0], v_full, v_tile.index(0))
    if V_REST:
        load_tile(v_rest, [batch, kv_head, col0, 128], v_full, v_tile_rest.index(0))
    stage = 0
    phase = 1
    head = kv_head * group
    start = begin
    for _ in range(group * span):
        mbarrier.wait(q_empty.index(stage), phase)
        mbarrier.expect(q_full.index(stage), Q_BYTES + WITH_BIAS)
        if BIAS_ROWS:
            place = batch * stride_bias_b + head * stride_bias_h
            load_tile(bias, [place, start], q_full.index(stage), biases.index(stage))
        load_tile(q, [batch, head, start, 0], q_full.index(stage), q_tiles.index(stage))
        if Q_REST:
            load_tile(q_rest, [batch, head, start, 128], q_full.index(stage), q_tiles_rest.index(stage))
        mbarrier.wait(do_empty.index(stage), phase)
        mbarrier.expect(do_full.index(stage), DO_BYTES)
        load_tile(do, [batch, head, start, 0], do_full.index(stage), do_tiles.index(stage))
        if V_REST:
            load_tile(do_rest, [batch, head, start, 128], do_full.index(stage), do_tiles_rest.index(stage))
        stage, phase = _next(stage, phase, STAGES)
        start += _ROWS
        if start >= begin + span * _ROWS:
            head += 1
            start = begin


@gluon.jit
def _compute_values(
    dv, dv_rest, sums, bias, floor, k_tile, v_tile, q_tiles, do_tiles,
    k_tile_rest, v_tile_rest, q_tiles_rest, do_tiles_rest, slopes, ds_tiles, biases,
    k_full, q_full, do_full, do_empty, slopes_full, ds_full, k_read, v_read,
    batch, kv_head, heads, group, col0, begin, span, q_len, kv_len, shift, left, right,
    stride_bias_b, stride_bias_h, scale, const_bias, fast,
    Q_REST: gl.constexpr, V_REST: gl.constexpr, VISIBLE: gl.constexpr, BANDED: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, BIAS_ROWS: gl.constexpr, ROW_SUMS: gl.constexpr, GROUPED: gl.constexpr,
    P_SCALE: gl.constexpr, FORM: gl.constexpr, SLOW: gl.constexpr, STORED: gl.constexpr,
):  # fmt: skip
    """The first warpgroup: probabilities, dV, and, unless dS is STORED, the first columns of dQ."""
    STAGES: gl.constexpr = q_tiles.shape[0]
    WIDTH: gl.constexpr = k_tile.shape[4]
    V_WIDTH: gl.constexpr = v_tile.shape[4]
    DIM: gl.constexpr = WIDTH + (64 if Q_REST else 0)
    COLUMNS: gl.constexpr = 64 if DIM == 128 else 128
    V_PRODUCTS: gl.constexpr = 2 if V_REST else 1
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _ROWS, 16])
    of_values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_WIDTH, 16])
    of_rest: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    of_rows: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    as_operand: gl.constexpr = gl.DotOperandLayout(0, of_values, 2)
    as_rest: gl.constexpr = gl.DotOperandLayout(0, of_rest, 2)
    dtype: gl.constexpr = k_tile.dtype
    BY_ROW: gl.constexpr = BANDED or BIAS_ROWS
    HEAD_BIAS: gl.constexpr = bias is not None and not BIAS_ROWS
    TILE_SUMS: gl.constexpr = _ROWS * (DIM + 1 if ROW_SUMS else DIM)

    key = gl.arange(0, _KEYS, gl.SliceLayout(1, of_scores))
    row = gl.arange(0, _ROWS, gl.SliceLayout(0, of_scores))
    no_rows = gl.zeros([_ROWS, COLUMNS], gl.float32, of_rows)
    dv_acc = gl.zeros([_KEYS, V_WIDTH], gl.float32, of_values)
    if V_REST:
        dv_acc_rest = gl.zeros([_KEYS, 64], gl.float32, of_rest)

    # Where a tile is: its first row, and its place among the sums of dQ, of which tiles follow one another by heads.
    end = begin + span * _ROWS
    total = group * span
    head = kv_head * group
    tiles = gl.cdiv(q_len, _ROWS)
    start = begin
    tile = (batch * heads + head) * tiles + begin // _ROWS
    row_bias = const_bias + 0.0
    if HEAD_BIAS:
        bias += batch.to(gl.int64) * stride_bias_b
        row_bias += _head_bias(bias, head, stride_bias_h)
    if BIAS_ROWS and FORM == _AUTO:
        place = batch * stride_bias_b + head * stride_bias_h
        fast = _lowest(floor, place, group, stride_bias_h, begin, end, q_len) >= _FAST_BIAS
    if BANDED and not BIAS_ROWS:
        _put_row_biases(biases, start, row_bias, scale, q_len, kv_len, shift, left, right, VISIBLE, HAS_LEFT, HAS_RIGHT)
        sync()
    elif VISIBLE:
        const_bias -= gl.log(gl.maximum(kv_len, 1).to(gl.float32))
        row_bias -= gl.log(gl.maximum(kv_len, 1).to(gl.float32))
    unit = gl.where(fast, 0.5, _LOG2E)

    # The first tile.
    mbarrier.wait(k_full, 0)
    keys = k_tile.index(0).reshape([_KEYS, WIDTH])
    keys_rest = k_tile_rest.index(0).reshape([_KEYS, 64]) if Q_REST else 0
    mbarrier.wait(q_full.index(0), 0)
    if BIAS_ROWS:
        s_start = _start_at(biases.index(0), scale, of_scores, _KEYS)
    else:
        s_start = _start_of_scores(biases, of_scores, _KEYS, BANDED)
    rows = q_tiles.index(0).reshape([_ROWS, WIDTH])
    rows_rest = q_tiles_rest.index(0).reshape([_ROWS, 64]) if Q_REST else 0
    s_token = _start_product(keys, keys_rest, rows, rows_rest, s_start, BY_ROW, Q_REST)
    s = warpgroup_mma_wait(0, deps=[s_token])
    p = _probabilities(
        s, scale, row_bias * unit, start, col0, key, row, shift, left, right, fast,
        BY_ROW, HAS_LEFT, HAS_RIGHT, FORM, SLOW,
    )  # fmt: skip
    p_operand = gl.convert_layout((p * P_SCALE).to(dtype), as_operand)
    slopes.index(0).store(((p - p * p) * _SLOPE_SCALE).to(slopes.dtype))
    tile_before = tile + 0
    start, tile, head_next = _next_tile(start, tile, head, begin, end, tiles - span)
    head = head_next
    if GROUPED and HEAD_BIAS:
        row_bias = const_bias + _head_bias(bias, gl.minimum(head, kv_head * group + group - 1), stride_bias_h)
    sync()
    if BANDED and not BIAS_ROWS:
        _put_row_biases(biases, start, row_bias, scale, q_len, kv_len, shift, left, right, VISIBLE, HAS_LEFT, HAS_RIGHT)
        sync()
    mbarrier.arrive(slopes_full.index(0))

    # In each turn dV and dQ of the tile before, and all else of this one.
    # slopes and dS have two slots.
    stage = 0
    phase = 0
    slot = 0
    slot_phase = 0
    for _ in range(1, total):
        stage_before = stage
        phase_before = phase
        slot_before = slot
        slot_phase_before = slot_phase
        stage, phase = _next(stage, phase, STAGES)
        if STAGES == 2:
            slot = stage
            slot_phase = phase
        else:
            slot, slot_phase = _next(slot, slot_phase, 2)
        zero = _unknown_zero()
        keys_now = k_tile.index(zero).reshape([_KEYS, WIDTH])
        keys_rest_now = k_tile_rest.index(zero).reshape([_KEYS, 64]) if Q_REST else 0
        if not BIAS_ROWS:
            s_start = _start_of_scores(biases, of_scores, _KEYS, BANDED)
        mbarrier.wait(q_full.index(stage), phase)
        if BIAS_ROWS:
            s_start = _start_at(biases.index(stage), scale, of_scores, _KEYS)
        rows = q_tiles.index(stage).reshape([_ROWS, WIDTH])
        rows_rest = q_tiles_rest.index(stage).reshape([_ROWS, 64]) if Q_REST else 0
        s_token = _start_product(keys_now, keys_rest_now, rows, rows_rest, s_start, BY_ROW, Q_REST)
        mbarrier.wait(do_full.index(stage_before), phase_before)
        grads_before = do_tiles.index(stage_before).reshape([_ROWS, V_WIDTH])
        dv_token = warpgroup_mma(p_operand, grads_before, dv_acc, is_async=True)
        if V_REST:
            grads_rest = do_tiles_rest.index(stage_before).reshape([_ROWS, 64])
            p_rest = gl.convert_layout(p_operand, as_rest)
            rest_token = warpgroup_mma(p_rest, grads_rest, dv_acc_rest, is_async=True)

        s = warpgroup_mma_wait(V_PRODUCTS, deps=[s_token])
        p = _probabilities(
            s, scale, row_bias * unit, start, col0, key, row, shift, left, right, fast,
            BY_ROW, HAS_LEFT, HAS_RIGHT, FORM, SLOW,
        )  # fmt: skip
        p_next = gl.convert_layout((p * P_SCALE).to(dtype), as_operand)
        # The second warpgroup has read what lies there: this one has waited for dS of that tile.
        slopes.index(slot).store(((p - p * p) * _SLOPE_SCALE).to(slopes.dtype))
        tile_now = tile
        start, tile, head = _next_tile(start, tile, head, begin, end, tiles - span)
        if GROUPED and HEAD_BIAS:
            row_bias = const_bias + _head_bias(bias, gl.minimum(head, kv_head * group + group - 1), stride_bias_h)
        sync()
        mbarrier.arrive(slopes_full.index(slot))
        if V_REST:
            dv_acc, dv_acc_rest, p_operand, p_rest = warpgroup_mma_wait(
                0, deps=[dv_token, rest_token, p_operand, p_rest]
            )
        else:
            dv_acc, p_operand = warpgroup_mma_wait(0, deps=[dv_token, p_operand])
        p_operand = p_next
        if BANDED and not BIAS_ROWS:
            # All warps have read those of this tile. Another sync() comes before they read these.
            _put_row_biases(
                biases, start, row_bias, scale, q_len, kv_len, shift, left, right, VISIBLE, HAS_LEFT, HAS_RIGHT
            )
        mbarrier.wait(ds_full.index(slot_before), slot_phase_before)
        # Both have read the output gradients of the tile before.
        sync()
        mbarrier.arrive(do_empty.index(stage_before))
        if not STORED:
            dq_token = warpgroup_mma(
                ds_tiles.index(slot_before).permute((1, 0)), keys_now.slice(0, COLUMNS, 1), no_rows,
                use_acc=False, is_async=True,
            )  # fmt: skip
            dq_tile = warpgroup_mma_wait(0, deps=[dq_token])
            _add(sums + tile_before.to(gl.int64) * TILE_SUMS, dq_tile, of_rows)
        tile_before = tile_now

    # What is left: dV and dQ of the last tile.
    mbarrier.wait(do_full.index(stage), phase)
    dv_token = warpgroup_mma(p_operand, do_tiles.index(stage).reshape([_ROWS, V_WIDTH]), dv_acc, is_async=True)
    dv_acc, p_operand = warpgroup_mma_wait(0, deps=[dv_token, p_operand])
    if V_REST:
        p_rest = gl.convert_layout(p_operand, as_rest)
        rest_token = warpgroup_mma(p_rest, do_tiles_rest.index(stage).reshape([_ROWS, 64]), dv_acc_rest, is_async=True)
        dv_acc_rest, p_rest = warpgroup_mma_wait(0, deps=[rest_token, p_rest])
    if STORED:
        sync()
        mbarrier.arrive(k_read)
    else:
        mbarrier.wait(ds_full.index(slot), slot_phase)
        dq_token = warpgroup_mma(
            ds_tiles.index(slot).permute((1, 0)), keys.slice(0, COLUMNS, 1), no_rows, use_acc=False, is_async=True
        )
        dq_tile = warpgroup_mma_wait(0, deps=[dq_token])
        sync()
        mbarrier.arrive(k_read)
        _add(sums + tile_before.to(gl.int64) * TILE_SUMS, dq_tile, of_rows)

    # dV goes out by way of where the values lay.
    mbarrier.wait(v_read, 0)
    v_tile.index(0).reshape([_KEYS, V_WIDTH]).store((dv_acc * (1.0 / P_SCALE)).to(dtype))
    if V_REST:
        v_tile_rest.index(0).reshape([_KEYS, 64]).store((dv_acc_rest * (1.0 / P_SCALE)).to(dtype))
    fence_async_shared()
    sync()
    store_tile(dv, [batch, kv_head, col0, 0], v_tile.index(0))
    if V_REST:
        store_tile(dv_rest, [batch, kv_head, col0, 128], v_tile_rest.index(0))
    tma.store_wait(0)


@gluon.jit
def _compute_keys(
    dk, dk_rest, ds_out, sums, parts, k_tile, v_tile, q_tiles, do_tiles,
    k_tile_rest, v_tile_rest, q_tiles_rest, do_tiles_rest, slopes, ds_tiles, ones,
    k_full, v_full, q_full, do_full, q_empty, slopes_full, ds_full, k_read, v_read,
    batch, kv_head, heads, group, col0, begin, span, blocks, q_len, place, scale,
    Q_REST: gl.constexpr, V_REST: gl.constexpr, SUMS: gl.constexpr, ROW_SUMS: gl.constexpr, GROUPED: gl.constexpr,
    STORED: gl.constexpr,
):  # fmt: skip
    """The second warpgroup: dS, dK, and the other columns of dQ, unless dS is STORED."""
    STAGES: gl.constexpr = q_tiles.shape[0]
    WIDTH: gl.constexpr = k_tile.shape[4]
    V_WIDTH: gl.constexpr = v_tile.shape[4]
    DIM: gl.constexpr = WIDTH + (64 if Q_REST else 0)
    BEFORE: gl.constexpr = 64 if DIM == 128 else 128
    COLUMNS: gl.constexpr = DIM - BEFORE
    V_PRODUCTS: gl.constexpr = 2 if V_REST else 1
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _ROWS, 16])
    of_keys: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    of_rest: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    of_rows: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    of_row_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    as_operand: gl.constexpr = gl.DotOperandLayout(0, of_keys, 2)
    as_rest: gl.constexpr = gl.DotOperandLayout(0, of_rest, 2)
    dtype: gl.constexpr = k_tile.dtype
    TILE_SUMS: gl.constexpr = _ROWS * (DIM + 1 if ROW_SUMS else DIM)
    ROW_SUMS_AT: gl.constexpr = _ROWS * COLUMNS

    no_scores = gl.zeros([_KEYS, _ROWS], gl.float32, of_scores)
    no_rows = gl.zeros([_ROWS, COLUMNS], gl.float32, of_rows)
    no_sums = gl.zeros([_ROWS, 8], gl.float32, of_row_sums)
    dk_acc = gl.zeros([_KEYS, WIDTH], gl.float32, of_keys)
    if Q_REST:
        dk_acc_rest = gl.zeros([_KEYS, 64], gl.float32, of_rest)

    end = begin + span * _ROWS
    total = group * span
    head = kv_head * group
    tiles = gl.cdiv(q_len, _ROWS)
    if not STORED:
        sums += BEFORE * _ROWS
    start = begin
    tile = (batch * heads + head) * tiles + begin // _ROWS

    # The first tile.
    mbarrier.wait(v_full, 0)
    values = v_tile.index(0).reshape([_KEYS, V_WIDTH])
    values_rest = v_tile_rest.index(0).reshape([_KEYS, 64]) if V_REST else 0
    mbarrier.wait(do_full.index(0), 0)
    grads = do_tiles.index(0).reshape([_ROWS, V_WIDTH])
    grads_rest = do_tiles_rest.index(0).reshape([_ROWS, 64]) if V_REST else 0
    dp_token = _start_product(values, values_rest, grads, grads_rest, no_scores, False, V_REST)
    dp = warpgroup_mma_wait(0, deps=[dp_token])
    mbarrier.wait(slopes_full.index(0), 0)
    ds = slopes.index(0).load(of_scores).to(gl.float32) * (1.0 / _SLOPE_SCALE) * dp
    ds_low = ds.to(dtype)
    ds_operand = gl.convert_layout(ds_low, as_operand)
    ds_tiles.index(0).store(ds_low)
    sum_of_ds = gl.zeros([128], gl.float32, _BY_THREAD)
    if SUMS:
        sum_of_ds += gl.convert_layout(_sum_per_thread(ds), _BY_THREAD)
        if GROUPED:
            parts += gl.arange(0, 128, _BY_THREAD)
            parts += ((batch * heads + head).to(gl.int64) * blocks + col0 // _KEYS) * 128
    tile_before = tile + 0
    start, tile, head_next = _next_tile(start, tile, head, begin, end, tiles - span)
    if GROUPED and SUMS:
        parts, sum_of_ds = _end_of_head(parts, sum_of_ds, head_next - head, blocks)
    head = head_next
    fence_async_shared()
    sync()
    mbarrier.arrive(ds_full.index(0))
    ds_row = place * group * (blocks * _KEYS) + col0
    if STORED:
        store_tile(ds_out, [ds_row, begin], ds_tiles.index(0))
        ds_row += (head - kv_head * group) * (blocks * _KEYS)
    mbarrier.wait(k_full, 0)
    keys = k_tile.index(0).reshape([_KEYS, WIDTH])
    keys_rest = k_tile_rest.index(0).reshape([_KEYS, 64]) if Q_REST else 0
    columns = keys_rest if Q_REST else keys.slice(BEFORE, COLUMNS, 1)

    # In each turn dK and dQ of the tile before, and all else of this one.
    # slopes and dS have two slots.
    stage = 0
    phase = 0
    slot = 0
    slot_phase = 0
    for _ in range(1, total):
        stage_before = stage
        phase_before = phase
        slot_before = slot
        stage, phase = _next(stage, phase, STAGES)
        if STAGES == 2:
            slot = stage
            slot_phase = phase
        else:
            slot, slot_phase = _next(slot, slot_phase, 2)
        zero = _unknown_zero()
        values_now = v_tile.index(zero).reshape([_KEYS, V_WIDTH])
        values_rest_now = v_tile_rest.index(zero).reshape([_KEYS, 64]) if V_REST else 0
        keys_now = k_tile.index(zero).reshape([_KEYS, WIDTH])
        columns_now = k_tile_rest.index(zero).reshape([_KEYS, 64]) if Q_REST else keys_now.slice(BEFORE, COLUMNS, 1)
        rows_before = q_tiles.index(stage_before).reshape([_ROWS, WIDTH])
        grads = do_tiles.index(stage).reshape([_ROWS, V_WIDTH])
        grads_rest = do_tiles_rest.index(stage).reshape([_ROWS, 64]) if V_REST else 0
        mbarrier.wait(q_full.index(stage_before), phase_before)
        dk_token = warpgroup_mma(ds_operand, rows_before, dk_acc, is_async=True)
        if Q_REST:
            rows_rest = q_tiles_rest.index(stage_before).reshape([_ROWS, 64])
            ds_rest = gl.convert_layout(ds_operand, as_rest)
            rest_token = warpgroup_mma(ds_rest, rows_rest, dk_acc_rest, is_async=True)
        mbarrier.wait(do_full.index(stage), phase)
        dp_token = _start_product(values_now, values_rest_now, grads, grads_rest, no_scores, False, V_REST)
        if Q_REST:
            dk_acc, dk_acc_rest, ds_operand, ds_rest = warpgroup_mma_wait(
                V_PRODUCTS, deps=[dk_token, rest_token, ds_operand, ds_rest]
            )
        else:
            dk_acc, ds_operand = warpgroup_mma_wait(V_PRODUCTS, deps=[dk_token, ds_operand])
        # Read are the queries of the tile before, and dS of two tiles before, by the first warpgroup too: it has
        # put slopes in memory since.
        if STORED:
            tma.store_wait(1)
        sync()
        mbarrier.arrive(q_empty.index(stage_before))
        dp = warpgroup_mma_wait(0, deps=[dp_token])

        mbarrier.wait(slopes_full.index(slot), slot_phase)
        ds = slopes.index(slot).load(of_scores).to(gl.float32) * (1.0 / _SLOPE_SCALE) * dp
        ds_low = ds.to(dtype)
        ds_next = gl.convert_layout(ds_low, as_operand)
        ds_tiles.index(slot).store(ds_low)
        if SUMS:
            sum_of_ds += gl.convert_layout(_sum_per_thread(ds), _BY_THREAD)
        tile_now = tile
        start_now = start
        start, tile, head_next = _next_tile(start, tile, head, begin, end, tiles - span)
        if GROUPED and SUMS:
            parts, sum_of_ds = _end_of_head(parts, sum_of_ds, head_next - head, blocks)
        fence_async_shared()
        sync()
        mbarrier.arrive(ds_full.index(slot))
        if STORED:
            store_tile(ds_out, [ds_row, start_now], ds_tiles.index(slot))
            ds_row += (head_next - head) * (blocks * _KEYS)
        head = head_next
        ds_operand = ds_next
        if not STORED:
            dq_token = warpgroup_mma(
                ds_tiles.index(slot_before).permute((1, 0)), columns_now, no_rows, use_acc=False, is_async=True
            )
            sums_before = sums + tile_before.to(gl.int64) * TILE_SUMS
            if ROW_SUMS:
                row_token = _start_row_sums(ds_tiles.index(slot_before), ones.index(zero), no_sums)
                dq_tile, row_sums = warpgroup_mma_wait(0, deps=[dq_token, row_token])
                _add_rows(sums_before + ROW_SUMS_AT, row_sums, of_row_sums)
            else:
                dq_tile = warpgroup_mma_wait(0, deps=[dq_token])
            _add(sums_before, dq_tile, of_rows)
        tile_before = tile_now

    # What is left: dK and dQ of the last tile.
    mbarrier.arrive(v_read)
    mbarrier.wait(q_full.index(stage), phase)
    dk_token = warpgroup_mma(ds_operand, q_tiles.index(stage).reshape([_ROWS, WIDTH]), dk_acc, is_async=True)
    dk_acc, ds_operand = warpgroup_mma_wait(0, deps=[dk_token, ds_operand])
    if Q_REST:
        ds_rest = gl.convert_layout(ds_operand, as_rest)
        rest_token = warpgroup_mma(ds_rest, q_tiles_rest.index(stage).reshape([_ROWS, 64]), dk_acc_rest, is_async=True)
        dk_acc_rest, ds_rest = warpgroup_mma_wait(0, deps=[rest_token, ds_rest])
    if not STORED:
        dq_token = warpgroup_mma(ds_tiles.index(slot).permute((1, 0)), columns, no_rows, use_acc=False, is_async=True)
        dq_tile = warpgroup_mma_wait(0, deps=[dq_token])
        sums += tile_before.to(gl.int64) * TILE_SUMS
        _add(sums, dq_tile, of_rows)
        if ROW_SUMS:
            row_sums = warpgroup_mma_wait(0, deps=[_start_row_sums(ds_tiles.index(slot), ones.index(0), no_sums)])
            _add_rows(sums + ROW_SUMS_AT, row_sums, of_row_sums)

    if SUMS and not GROUPED:
        place = ((batch * heads + kv_head).to(gl.int64) * blocks + col0 // _KEYS) * 128 + _unknown_zero()
        gl.store(parts + place + gl.arange(0, 128, _BY_THREAD), sum_of_ds)
    # dK goes out by way of where the keys lay.
    mbarrier.wait(k_read, 0)
    sync()
    k_tile.index(0).reshape([_KEYS, WIDTH]).store((dk_acc * scale).to(dtype))
    if Q_REST:
        k_tile_rest.index(0).reshape([_KEYS, 64]).store((dk_acc_rest * scale).to(dtype))
    fence_async_shared()
    sync()
    store_tile(dk, [batch, kv_head, col0, 0], k_tile.index(0))
    if Q_REST:
        store_tile(dk_rest, [batch, kv_head, col0, 128], k_tile_rest.index(0))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=[
    "heads", "group", "q_len", "kv_len", "left", "right", "scale", "const_bias", "first_unit", "units", "at_once",
])  # fmt: skip
def _kernel(
    q, k, v, do, dk, dv, q_rest, k_rest, v_rest, do_rest, dk_rest, dv_rest, ds, sums, parts, bias, floor,
    stride_bias_b, stride_bias_h, heads, group, q_len, kv_len, left, right, scale, const_bias,
    first_unit, units, at_once,
    VISIBLE: gl.constexpr, BANDED: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    BOTTOM_RIGHT: gl.constexpr, BIAS_ROWS: gl.constexpr, SUMS: gl.constexpr, ROW_SUMS: gl.constexpr,
    GROUPED: gl.constexpr, P_SCALE: gl.constexpr, FORM: gl.constexpr, SLOW: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program: dK and dV of 64 keys of one key head, over all query heads that use it, and what they add to dQ.

    Of heads of 129 to 192 columns, the first tensors' tiles hold 128, and those of *_rest 64; else those are None.
    sums: float32 [B * H * ceil(M / 64), ...], zeros: of each tile of dQ the columns of the first warpgroup, then those
    of the second; if ROW_SUMS of each row the sum of dS behind them.
    parts: float32 [B, H, blocks of keys, 128]: sums of dS, if SUMS.
    bias, floor: of a tensor that differs between rows, BIAS_ROWS, b_i and the least of blocks of it (launch.RowBiases);
    strides of bias count its rows then.
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
        begin = gl.minimum(gl.maximum(col0 - shift - right, 0), q_len - 1) // BLOCK * BLOCK
    if HAS_LEFT:
        end = gl.minimum(end, gl.minimum(col0 + _KEYS, kv_len) - shift + left)
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
    if Q_REST:
        k_tile_rest = gl.allocate_shared_memory(dtype, [1, 1, 1, _KEYS, 64], k_rest.layout)
        q_tiles_rest = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, _ROWS, 64], q_rest.layout)
    else:
        k_tile_rest: gl.constexpr = 0
        q_tiles_rest: gl.constexpr = 0
    if V_REST:
        v_tile_rest = gl.allocate_shared_memory(dtype, [1, 1, 1, _KEYS, 64], v_rest.layout)
        do_tiles_rest = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, _ROWS, 64], do_rest.layout)
    else:
        v_tile_rest: gl.constexpr = 0
        do_tiles_rest: gl.constexpr = 0
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_KEYS, _ROWS], dtype)
    ds_tiles = gl.allocate_shared_memory(dtype, [2, _KEYS, _ROWS], ds_layout)
    of_slopes: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_KEYS, _ROWS], gl.float16)
    slopes = gl.allocate_shared_memory(gl.float16, [2, _KEYS, _ROWS], of_slopes)
    if BIAS_ROWS:
        biases = gl.allocate_shared_memory(gl.float32, [STAGES, 1, _ROWS], bias.layout)
        row_biases = bias
        row_tiles = biases
        row_stride_b = stride_bias_b
        row_stride_h = stride_bias_h
    else:
        biases = gl.allocate_shared_memory(gl.float32, [_ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        row_biases: gl.constexpr = 0
        row_tiles: gl.constexpr = 0
        row_stride_b: gl.constexpr = 0
        row_stride_h: gl.constexpr = 0
    if ROW_SUMS and not STORED:
        ones_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, _KEYS], dtype)
        ones = gl.allocate_shared_memory(dtype, [1, 8, _KEYS], ones_layout)
        ones.index(0).store(gl.full([8, _KEYS], 1.0, dtype, gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])))
    else:
        ones: gl.constexpr = 0
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
            (_compute_values, (
                dv, dv_rest if V_REST else 0, sums, 0 if BIAS_ROWS else bias, floor, k_tile, v_tile, q_tiles, do_tiles,
                k_tile_rest, v_tile_rest, q_tiles_rest, do_tiles_rest, slopes, ds_tiles, biases,
                k_full, q_full, do_full, do_empty, slopes_full, ds_full,
                k_read, v_read, batch, kv_head, heads, group, col0, begin, span, q_len, kv_len, shift, left, right,
                stride_bias_b, stride_bias_h, scale, const_bias, fast,
                Q_REST, V_REST, VISIBLE, BANDED, HAS_LEFT, HAS_RIGHT, BIAS_ROWS, ROW_SUMS, GROUPED, P_SCALE, FORM,
                SLOW, STORED,
            )),
            (_compute_keys, (
                dk, dk_rest if Q_REST else 0, ds if STORED else 0, sums, parts, k_tile, v_tile, q_tiles, do_tiles,
                k_tile_rest, v_tile_rest, q_tiles_rest, do_tiles_rest, slopes, ds_tiles, ones,
                k_full, v_full, q_full, do_full, q_empty, slopes_full, ds_full,
                k_read, v_read, batch, kv_head, heads, group, col0, begin, span, blocks, q_len, place, scale,
                Q_REST, V_REST, SUMS, ROW_SUMS, GROUPED, STORED,
            )),
            (_load, (
                q, k, v, do, q_rest if Q_REST else 0, k_rest if Q_REST else 0, v_rest if V_REST else 0,
                do_rest if V_REST else 0, row_biases, k_tile, v_tile, q_tiles, do_tiles,
                k_tile_rest, v_tile_rest, q_tiles_rest, do_tiles_rest, row_tiles,
                k_full, v_full, q_full, do_full, q_empty, do_empty,
                batch, kv_head, group, col0, begin, span, row_stride_b, row_stride_h, BIAS_ROWS, Q_REST, V_REST,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "q_len", "tiles", "scale", "stride_db_b", "stride_db_h", "stride_db_m"])
def _finish_kernel(
    sums, dq, db, stride_dq_b, stride_dq_h, stride_dq_n, heads, q_len, tiles, scale,
    stride_db_b, stride_db_h, stride_db_m,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, FIRST: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: 64 columns of a tile of dQ, from the order in which hopper_bwd._add() put it in memory, and, by the
    first of them, the sums of its rows of dS.

    FIRST: columns of the first warpgroup.
    """
    stride_dq_b, stride_dq_h, stride_dq_n = elements(stride_dq_b, stride_dq_h, stride_dq_n, UNIT, WIDE)
    CHUNKS: tl.constexpr = DIM // _FINISHED
    tile = tl.program_id(0) // CHUNKS
    column0 = tl.program_id(0) % CHUNKS * _FINISHED
    head = (tile // tiles % heads).to(tl.int64)
    batch = (tile // tiles // heads).to(tl.int64)
    start = tile % tiles * _ROWS
    sums += tile.to(tl.int64) * (_ROWS * DIM if db is None else _ROWS * (DIM + 1))
    width = tl.where(column0 < FIRST, FIRST, DIM - FIRST)
    before = tl.where(column0 < FIRST, 0, FIRST)
    # [warp, eight columns, row, two columns, row and that 8 below, column], of which a warp has 16 times its width.
    WARP: tl.constexpr = 16 * _FINISHED
    number = tl.arange(0, 4 * WARP)
    place = before * _ROWS + number // WARP * (16 * width) + (column0 - before) * 16 + number % WARP
    numbers = tl.load(sums + place).reshape(4, _FINISHED // 8, 8, 4, 2, 2)
    numbers = numbers.permute(0, 4, 2, 1, 3, 5).reshape(_ROWS, _FINISHED)
    row = start + tl.arange(0, _ROWS)
    column = column0 + tl.arange(0, _FINISHED)
    dq += batch * stride_dq_b + head * stride_dq_h
    inside = (row < q_len)[:, None] & (column < HEAD_DIM)[None, :]
    pointers = dq + (row * stride_dq_n)[:, None] + column[None, :]
    tl.store(pointers, (numbers * scale).to(dq.dtype.element_ty), mask=inside)
    if db is not None and column0 == 0:
        row_sums = tl.load(sums + _ROWS * DIM + tl.arange(0, _ROWS))
        db += batch * stride_db_b + head * stride_db_h
        tl.store(db + row.to(tl.int64) * stride_db_m, row_sums.to(db.dtype.element_ty), mask=row < q_len)


@triton.jit(do_not_specialize=[
    "heads", "group", "q_len", "kv_len", "left", "right", "scale", "first_head", "among",
    "stride_db_b", "stride_db_h", "stride_db_m",
])  # fmt: skip
def _queries_kernel(
    ds, k, k_rest, dq, db, stride_dq_b, stride_dq_h, stride_dq_n, stride_db_b, stride_db_h, stride_db_m,
    heads, group, q_len, kv_len, left, right, scale, first_head, among,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, ROW_SUMS: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: 128 rows of dQ of one head, dS times the keys; if ROW_SUMS, too, of each row the sum of dS.

    ds: [among * keys, queries] of the heads from first_head on, the keys of each up to a multiple of 64. Tiles of 64
    keys and 128 rows in which no row sees a key are not there.
    """
    stride_dq_b, stride_dq_h, stride_dq_n = elements(stride_dq_b, stride_dq_h, stride_dq_n, UNIT, WIDE)
    REST: tl.constexpr = k_rest is not None
    COLUMNS: tl.constexpr = DIM - 64 if REST else DIM
    # Under a causal mask the last rows take longest, and start first.
    place = tl.program_id(0) % among
    start = (tl.cdiv(q_len, _BLOCK) - 1 - tl.program_id(0) // among) * _BLOCK
    head = (first_head + place) % heads
    batch = (first_head + place) // heads
    shift = kv_len - q_len if BOTTOM_RIGHT else 0
    begin = 0
    end = kv_len
    if HAS_RIGHT:
        end = tl.minimum(end, start + _BLOCK + shift + right)
    if HAS_LEFT:
        first = tl.maximum(start + shift - left, 0)
        begin = first // _KEYS * _KEYS
        end = tl.where(first < kv_len, end, 0)
    first_key = place * (tl.cdiv(kv_len, _KEYS) * _KEYS)
    acc = tl.zeros((_BLOCK, COLUMNS), tl.float32)
    acc_rest = tl.zeros((_BLOCK, 64), tl.float32)
    sums = tl.zeros((_BLOCK,), tl.float32)
    for col0 in range(begin, end, _KEYS):
        tile = ds.load([first_key + col0, start])
        keys = k.load([batch, head // group, col0, 0]).reshape(_KEYS, COLUMNS)
        acc = tl.dot(tile.T, keys, acc)
        if REST:
            acc_rest = tl.dot(tile.T, k_rest.load([batch, head // group, col0, COLUMNS]).reshape(_KEYS, 64), acc_rest)
        if ROW_SUMS:
            sums += tl.sum(tile.to(tl.float32), 0)
    dq += batch.to(tl.int64) * stride_dq_b + head.to(tl.int64) * stride_dq_h
    row = start + tl.arange(0, _BLOCK)
    column = tl.arange(0, COLUMNS)
    rows = dq + (row * stride_dq_n)[:, None]
    inside = (row < q_len)[:, None]
    tl.store(rows + column[None, :], (acc * scale).to(dq.dtype.element_ty), mask=inside & (column < HEAD_DIM)[None, :])
    if REST:
        column = COLUMNS + tl.arange(0, 64)
        value = (acc_rest * scale).to(dq.dtype.element_ty)
        tl.store(rows + column[None, :], value, mask=inside & (column < HEAD_DIM)[None, :])
    if ROW_SUMS:
        db += batch.to(tl.int64) * stride_db_b + head.to(tl.int64) * stride_db_h
        tl.store(db + row.to(tl.int64) * stride_db_m, sums.to(db.dtype.element_ty), mask=row < q_len)
