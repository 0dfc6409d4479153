"""Latent attention on Hopper GPUs, in Gluon: query and key about 576 wide, and value key's first 512 channels.

What :mod:`sigswap.kernels.triton.decode_wide` does, with 64 rows a program and an order of its own:

- A tile of 64 keys is loaded once, by a warp of its own, and is a tile of values as well. There are two of them in
  shared memory, beside the queries; nothing else fits.
- Two warpgroups hold 256 columns of the output each. Each works out the probabilities of every other tile, and leaves
  them to the other in that tile's last channels, which only scores need. So no score is worked out twice, and one
  warpgroup multiplies while the other computes probabilities. Where tiles come slowly, for no other program has loaded
  them, the second one multiplies the first one's before its own has come: so their place is free the sooner.
- What a warpgroup has no more use for is loaded anew: half a tile at a time.

Fewer than 64 rows are padded.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sigswap.kernels.hopper.common import Tiles, load_tile, log_of_visible, sigmoid, sync, tiles_like
from sigswap.kernels.host.launch import Launch, describable
from sigswap.kernels.host.layout import Layout
from sigswap.kernels.host.problem import MAX_PLANS, WIDEST_HEAD_DIM, WIDEST_VALUE_DIM, Problem, Signature
from sigswap.kernels.host.tiles import limits_of
from sigswap.kernels.triton.common import _AUTO, _FAST, _FAST_BIAS, _LOG2E
from sigswap.kernels.triton.split_keys import Parts, parts_of, splits_for

ROWS, KEYS = 64, 64
"""Of a tile of scores."""

HALF, REST = WIDEST_VALUE_DIM // 2, WIDEST_HEAD_DIM - WIDEST_VALUE_DIM
"""Channels of the parts of a key: two halves that are a value, and the rest. A tile of the rest is as large as one of
probabilities, which take its place."""

WORTH_A_CALL = 1 << 26
"""Bytes of keys. In compiled code fewer are left to kernels that inductor launches itself: this one it cannot, and the
call of the op costs the host more than it saves."""

FEW_ROWS = 32
"""Rows of a key head up to which :mod:`sigswap.kernels.triton.decode_wide` is faster, which has them as they are and
two programs on a multiprocessor. On an H200, 64 sequences of 8,192 keys: 16 rows 156 microseconds (3,860 GB/s), here
205; 32 rows 203 and 226; 128 rows 611 and 298 (491 TFLOP/s)."""

_ROWS, _KEYS, _HALF, _REST = tl.constexpr(ROWS), tl.constexpr(KEYS), tl.constexpr(HALF), tl.constexpr(REST)


def supports(problem: Problem) -> bool:
    """Whether value is key's first channels, in half precision, without mask, soft cap and dropout, and there are more
    than a few rows."""
    signature, options = problem.signature, problem.options
    if signature.is_empty or signature.packed is not None or signature.attn_mask is not None:
        return False
    if options.dropout_p > 0.0 or options.softcap > 0.0 or signature.element_size != 2:
        return False
    dim, value_dim = signature.key.shape[3], signature.value.shape[3]
    if value_dim != WIDEST_VALUE_DIM or not value_dim < dim <= WIDEST_HEAD_DIM or not problem.value_is_of_key:
        return False
    limits = limits_of(signature.device)
    if limits.capability != 90 or not describable(signature.key):
        return False
    loaded = signature.batch * signature.kv_heads * signature.kv_len * dim * signature.element_size
    if not signature.descriptors:  # the op stays in compiled code, and chooses again when it is called
        return loaded >= WORTH_A_CALL
    return signature.q_len * (signature.heads // signature.kv_heads) > FEW_ROWS


def forward(problem: Problem, *, splits: int | None = None) -> Tensor:
    """Deterministic. splits: over how many programs the keys are split."""
    problem = problem.readable()  # key and value are: descriptors hold them
    query, key = problem.query, problem.key
    plan = _plan(problem.signature, problem.row_sums is not None, splits)
    out = query.new_empty_strided(plan.out.shape, plan.out.strides)
    partial, partial_sums = plan.parts.empty(out, problem.row_sums)
    plan.launch(key, key, query, partial, partial_sums, problem.bias)
    plan.parts.sum(partial, partial_sums, out, problem.row_sums)
    return out


class _Plan(NamedTuple):
    launch: Launch
    out: Layout
    parts: Parts


@functools.lru_cache(MAX_PLANS)
def _plan(signature: Signature, sums: bool, splits: int | None) -> _Plan:
    """sums: whether the rows' are asked for."""
    out, device = signature.output(), signature.device
    rows = signature.q_len * (signature.heads // signature.kv_heads)
    programs = signature.batch * signature.kv_heads * triton.cdiv(rows, ROWS)
    if splits is None:
        splits = splits_for(programs, signature.kv_len, limits_of(device).multiprocessors)
    parts = parts_of(signature, out, splits, sums=sums)
    arguments = signature.arguments(q=signature.query, o=parts.target)
    arguments |= parts.arguments | {"ALONE": rows <= ROWS}
    halves, rest = Tiles(signature.key, KEYS, HALF), Tiles(signature.key, KEYS, REST)
    tensors = (halves, rest, signature.query, parts.target, parts.target_sums, signature.bias)
    launch = Launch(_kernel, programs * splits, device, tensors, arguments, num_warps=4)
    return _Plan(launch, out, parts)


# Device functions.


@gluon.jit(do_not_specialize=[
    "stride_q_b", "stride_q_h", "stride_q_n", "stride_o_b", "stride_o_h", "stride_o_n", "stride_split",
    "stride_bias_b", "stride_bias_h", "stride_bias_m", "heads", "group", "q_len", "kv_len", "left", "right", "scale",
    "const_bias", "row_cap", "splits",
])  # fmt: skip
def _kernel(
    k, k_rest, q, out, sum_out, bias, stride_q_b, stride_q_h, stride_q_n, stride_o_b, stride_o_h, stride_o_n,
    stride_split, stride_bias_b, stride_bias_h, stride_bias_m, heads, group, q_len, kv_len, left, right, scale,
    const_bias, row_cap, splits,
    ALONE: gl.constexpr, HEAD_DIM: gl.constexpr, UNIT: gl.constexpr, VISIBLE: gl.constexpr, BIAS_ROWS: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, BOTTOM_RIGHT: gl.constexpr, CAP: gl.constexpr,
    P_SCALE: gl.constexpr, FORM: gl.constexpr, SLOW: gl.constexpr,
):  # fmt: skip
    """One program: one part of the keys, for 64 of the group * q_len rows of one key head, those of one token one
    behind the other. sum_out, if given: the rows' sums of p, contiguous. CAP: rows are divided here, for there is one
    part. ALONE: no other program has the same keys, which come from memory one tile behind the other."""
    # Programs of the same keys run side by side, so that all but the first find them in the L2 cache.
    blocks = gl.cdiv(group * q_len, _ROWS)
    first = gl.program_id(0) % blocks * _ROWS
    at = gl.program_id(0) // blocks
    split = at % splits
    kv_heads = heads // group
    kv_head = at // splits % kv_heads
    batch = at // splits // kv_heads
    shift = kv_len - q_len if BOTTOM_RIGHT else 0
    first_row = first // group
    last_row = gl.minimum((first + _ROWS - 1) // group, q_len - 1)
    begin = 0
    end = kv_len
    if HAS_RIGHT:
        end = gl.maximum(gl.minimum(end, last_row + shift + right + 1), 0)
    if HAS_LEFT:
        begin = gl.maximum(first_row + shift - left, 0) // _KEYS * _KEYS
    part = gl.cdiv(gl.cdiv(gl.maximum(end - begin, 0), splits), 2 * _KEYS) * (2 * _KEYS)
    begin += split * part
    end = gl.minimum(begin + part, end)
    pairs = gl.cdiv(gl.maximum(end - begin, 0), 2 * _KEYS)

    dtype: gl.constexpr = k.dtype
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_halves = gl.allocate_shared_memory(dtype, tiles_like(2, k.block_type), k.layout)
    q_rest = gl.allocate_shared_memory(dtype, tiles_like(1, k_rest.block_type), k_rest.layout)
    # Half j of tile i is 2 i + j.
    k_halves = gl.allocate_shared_memory(dtype, tiles_like(4, k.block_type), k.layout)
    k_rests = gl.allocate_shared_memory(dtype, tiles_like(2, k_rest.block_type), k_rest.layout)
    all_sums = gl.allocate_shared_memory(gl.float32, [2, _ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    half_full = gl.allocate_shared_memory(gl.int64, [4, 1], barrier)
    half_empty = gl.allocate_shared_memory(gl.int64, [4, 1], barrier)
    rest_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    rest_empty = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    p_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    sums_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    mbarrier.init(q_full, 2)
    mbarrier.init(sums_full, 2)
    for i in gl.static_range(4):
        mbarrier.init(half_full.index(i), 1)
        mbarrier.init(half_empty.index(i), 1)
    for i in gl.static_range(2):
        mbarrier.init(rest_full.index(i), 1)
        mbarrier.init(rest_empty.index(i), 2)
        mbarrier.init(p_full.index(i), 1)
    fence_async_shared()

    computing = (
        q, out, q_halves, q_rest, k_halves, k_rests, all_sums, q_full, half_full, half_empty, rest_full, rest_empty,
        p_full, sums_full, stride_q_b, stride_q_h, stride_q_n, stride_o_b, stride_o_h, stride_o_n, stride_split,
        stride_bias_b, stride_bias_h, stride_bias_m, heads, group, q_len, kv_len, shift, left, right, scale,
        const_bias, row_cap, split, batch, kv_head, first, first_row, last_row, begin, end, pairs,
    )  # fmt: skip
    loading = (
        k, k_rest, k_halves, k_rests, half_full, half_empty, rest_full, rest_empty, batch, kv_head, begin, pairs,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_attend, (
                computing, sum_out, bias, 0, ALONE, HEAD_DIM, UNIT, VISIBLE, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, CAP,
                P_SCALE, FORM, SLOW,
            )),
            (_attend, (
                computing, sum_out, bias, 1, ALONE, HEAD_DIM, UNIT, VISIBLE, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, CAP,
                P_SCALE, FORM, SLOW,
            )),
            (_load, (loading,)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _load(shared):
    """One warp: the tiles of keys."""
    (
        k, k_rest, k_halves, k_rests, half_full, half_empty, rest_full, rest_empty, batch, kv_head, begin, pairs,
    ) = shared  # fmt: skip
    for pair in range(pairs):
        phase = (pair & 1) ^ 1
        for i in gl.static_range(2):
            start = begin + (2 * pair + i) * _KEYS
            for j in gl.static_range(2):
                full = half_full.index(2 * i + j)
                mbarrier.wait(half_empty.index(2 * i + j), phase)
                mbarrier.expect(full, k.block_type.nbytes)
                load_tile(k, [batch, kv_head, start, j * _HALF], full, k_halves.index(2 * i + j))
            mbarrier.wait(rest_empty.index(i), phase)
            mbarrier.expect(rest_full.index(i), k_rest.block_type.nbytes)
            load_tile(k_rest, [batch, kv_head, start, 2 * _HALF], rest_full.index(i), k_rests.index(i))


@gluon.jit
def _flat(tiles, number: gl.constexpr):
    """One of the tiles, [rows, columns]."""
    return tiles.index(number).reshape([tiles.shape[-2], tiles.shape[-1]])


@gluon.jit
def _query_rows(q, stride_h, stride_n, first, group, q_len, kv_head, layout: gl.constexpr):
    """The addresses of a program's rows of query, of one sequence. Rows beyond the last are copies of others."""
    index = first + gl.arange(0, _ROWS, gl.SliceLayout(1, layout))
    row = gl.minimum(index // group, q_len - 1).to(gl.int64)
    head = (kv_head * group + index % group).to(gl.int64)
    return (q + head * stride_h + row * stride_n)[:, None]


@gluon.jit
def _add_own(sums, p_operand, k_halves, half_empty, rest_empty, PART: gl.constexpr):
    """The part in the output of the tile whose probabilities this warpgroup has."""
    HALF: gl.constexpr = 2 * PART + PART
    token = warpgroup_mma(p_operand, _flat(k_halves, HALF), sums, is_async=True)
    results = warpgroup_mma_wait(0, deps=(token, p_operand))
    sync()
    mbarrier.arrive(half_empty.index(HALF))
    mbarrier.arrive(rest_empty.index(PART))
    return results[0]


@gluon.jit
def _add_other(sums, k_halves, k_rests, half_full, half_empty, rest_empty, p_full, phase, PART: gl.constexpr):
    """The part in the output of the other warpgroup's tile."""
    TILE: gl.constexpr = 1 - PART
    HALF: gl.constexpr = 2 * TILE + PART
    mbarrier.wait(half_full.index(HALF), phase)
    mbarrier.wait(p_full.index(TILE), phase)
    token = warpgroup_mma(_flat(k_rests, TILE), _flat(k_halves, HALF), sums, is_async=True)
    sums = warpgroup_mma_wait(0, deps=[token])
    sync()
    mbarrier.arrive(half_empty.index(HALF))
    mbarrier.arrive(rest_empty.index(TILE))
    return sums


@gluon.jit
def _attend(
    shared, sum_out, bias, PART: gl.constexpr, ALONE: gl.constexpr, HEAD_DIM: gl.constexpr, UNIT: gl.constexpr,
    VISIBLE: gl.constexpr, BIAS_ROWS: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, CAP: gl.constexpr,
    P_SCALE: gl.constexpr, FORM: gl.constexpr, SLOW: gl.constexpr,
):  # fmt: skip
    """One of the warpgroups: half of the columns, and the probabilities of every other tile of keys."""
    (
        q, out, q_halves, q_rest, k_halves, k_rests, all_sums, q_full, half_full, half_empty, rest_full, rest_empty,
        p_full, sums_full, stride_q_b, stride_q_h, stride_q_n, stride_o_b, stride_o_h, stride_o_n, stride_split,
        stride_bias_b, stride_bias_h, stride_bias_m, heads, group, q_len, kv_len, shift, left, right, scale,
        const_bias, row_cap, split, batch, kv_head, first, first_row, last_row, begin, end, pairs,
    ) = shared  # fmt: skip
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _KEYS, 16])
    of_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _HALF, 16])
    of_half: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    of_rest: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    dtype: gl.constexpr = k_halves.dtype
    SUMS: gl.constexpr = CAP or sum_out is not None

    # Queries: a half from each warpgroup, and the rest from the second one.
    batch64 = batch.to(gl.int64)
    stride_h = stride_q_h.to(gl.int64) * UNIT
    stride_n = stride_q_n.to(gl.int64) * UNIT
    q += batch64 * stride_q_b * UNIT
    channel = PART * _HALF + gl.arange(0, _HALF, gl.SliceLayout(0, of_half))
    half = gl.load(_query_rows(q, stride_h, stride_n, first, group, q_len, kv_head, of_half) + channel[None, :])
    _flat(q_halves, PART).store(half)
    if PART == 1:
        channel = 2 * _HALF + gl.arange(0, _REST, gl.SliceLayout(0, of_rest))
        pointers = _query_rows(q, stride_h, stride_n, first, group, q_len, kv_head, of_rest) + channel[None, :]
        _flat(q_rest, 0).store(gl.load(pointers, mask=(channel < HEAD_DIM)[None, :], other=0.0))
    fence_async_shared()
    sync()
    mbarrier.arrive(q_full)

    index = first + gl.arange(0, _ROWS, gl.SliceLayout(1, of_scores))
    row = gl.minimum(index // group, q_len - 1)
    head = kv_head * group + index % group
    key_of_tile = gl.arange(0, _KEYS, gl.SliceLayout(0, of_scores))
    row_bias = gl.full(row.shape, 0.0, gl.float32, row.type.layout) + const_bias
    if bias is not None:
        pointers = bias + batch64 * stride_bias_b + head.to(gl.int64) * stride_bias_h
        if BIAS_ROWS:
            pointers += row.to(gl.int64) * stride_bias_m
        row_bias += gl.load(pointers).to(gl.float32)
    if VISIBLE:
        row_bias -= log_of_visible(row, kv_len, shift, left, right, HAS_LEFT, HAS_RIGHT)
    fast = FORM == _FAST
    if FORM == _AUTO:
        fast = gl.min(row_bias, 0) >= _FAST_BIAS
    unit = gl.where(fast, 0.5, _LOG2E)
    row_bias *= unit
    scale *= unit
    no_scores = gl.zeros([_ROWS, _KEYS], gl.float32, of_scores)
    sums = gl.zeros([_ROWS, _HALF], gl.float32, of_out)
    partial_sums = gl.zeros([_ROWS], gl.float32, gl.SliceLayout(1, of_scores))

    mbarrier.wait(q_full, 0)
    for pair in range(pairs):
        phase = pair & 1
        if PART == 1 and ALONE:
            sums = _add_other(sums, k_halves, k_rests, half_full, half_empty, rest_empty, p_full, phase, PART)
        # Scores of the own tile, as far as it has come.
        mbarrier.wait(half_full.index(2 * PART), phase)
        s_token = warpgroup_mma(
            _flat(q_halves, 0), _flat(k_halves, 2 * PART).permute((1, 0)), no_scores, use_acc=False, is_async=True
        )
        mbarrier.wait(half_full.index(2 * PART + 1), phase)
        s_token = warpgroup_mma(
            _flat(q_halves, 1), _flat(k_halves, 2 * PART + 1).permute((1, 0)), s_token, is_async=True
        )
        mbarrier.wait(rest_full.index(PART), phase)
        s_token = warpgroup_mma(_flat(q_rest, 0), _flat(k_rests, PART).permute((1, 0)), s_token, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s_token])

        start = begin + (2 * pair + PART) * _KEYS
        x = s * scale + row_bias[:, None]
        edge = start + _KEYS > end
        if HAS_RIGHT:
            edge = edge | (start + _KEYS - 1 > first_row + shift + right)
        if HAS_LEFT:
            edge = edge | (start < last_row + shift - left)
        if edge:
            key = start + key_of_tile
            x = gl.where((key < end)[None, :], x, float("-inf"))
            if HAS_RIGHT:
                x = gl.where(key[None, :] <= (row + shift + right)[:, None], x, float("-inf"))
            if HAS_LEFT:
                x = gl.where(key[None, :] >= (row + shift - left)[:, None], x, float("-inf"))
        p = sigmoid(x, fast, FORM, SLOW, False, 32)
        if SUMS:
            partial_sums += gl.sum(p, 1)
        rounded = (p * P_SCALE).to(dtype)
        _flat(k_rests, PART).store(rounded)
        p_operand = gl.convert_layout(rounded, gl.DotOperandLayout(0, of_out, 2))
        fence_async_shared()
        sync()
        mbarrier.arrive(p_full.index(PART))

        # Both tiles' parts of the output.
        if PART == 0:
            sums = _add_own(sums, p_operand, k_halves, half_empty, rest_empty, PART)
            sums = _add_other(sums, k_halves, k_rests, half_full, half_empty, rest_empty, p_full, phase, PART)
        else:
            if not ALONE:
                sums = _add_other(sums, k_halves, k_rests, half_full, half_empty, rest_empty, p_full, phase, PART)
            sums = _add_own(sums, p_operand, k_halves, half_empty, rest_empty, PART)

    factor = gl.full([_ROWS], 1.0 / P_SCALE, gl.float32, gl.SliceLayout(1, of_scores))
    if SUMS:
        all_sums.index(PART).store(partial_sums)
        sync()
        mbarrier.arrive(sums_full)
        mbarrier.wait(sums_full, 0)
        row_sums = partial_sums + all_sums.index(1 - PART).load(gl.SliceLayout(1, of_scores))
        if sum_out is not None and PART == 0:
            of_rows = split.to(gl.int64) * (stride_split // (2 * _HALF)) + (batch64 * heads + head) * q_len + row
            gl.store(sum_out + of_rows, row_sums, mask=index < group * q_len)
        if CAP:
            factor /= gl.maximum(row_sums, row_cap)
    sums *= gl.convert_layout(factor, gl.SliceLayout(1, of_out))[:, None]

    index = first + gl.arange(0, _ROWS, gl.SliceLayout(1, of_out))
    row = (index // group).to(gl.int64)
    head = (kv_head * group + index % group).to(gl.int64)
    out += split.to(gl.int64) * stride_split + batch64 * stride_o_b * UNIT
    targets = out + head * stride_o_h * UNIT + row * stride_o_n * UNIT
    column = PART * _HALF + gl.arange(0, _HALF, gl.SliceLayout(0, of_out))
    gl.store(targets[:, None] + column[None, :], sums.to(out.dtype.element_ty), mask=(index < group * q_len)[:, None])
