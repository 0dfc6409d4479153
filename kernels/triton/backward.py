"""The backward of sigmoid attention in Triton. It recomputes p, and needs neither the output nor a row statistic::

    dP = dO V^T (undone dropout in it);  dS = p (1 - p) dP;  dbias = sum_j dS;  dmask = dS
    dX = dS (1 - tanh^2), if softcap;  dQ = scale dX K;  dK = scale dX^T Q;  dV = p^T dO

Three kernels, each of which owns what it writes: one of dK and dV, by blocks of keys, over the query rows that see
them; one of dQ and dbias, by blocks of rows, over keys; and, where an additive mask wants its gradient, one by tiles
of the mask, over everything that the mask is broadcast to. So there are no atomics: all is deterministic.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sigswap.kernels.host.forms import FAST
from sigswap.kernels.host.launch import Described, Launch, by_rows, describable
from sigswap.kernels.host.layout import Layout, contiguous_layout, layout_of
from sigswap.kernels.host.problem import MAX_PLANS, Gradients, Problem, Signature, output_arguments
from sigswap.kernels.host.results import gradients_for, hand_over
from sigswap.kernels.host.tiles import Tile, fit, limits_of
from sigswap.kernels.triton.common import (
    _ACCURATE,
    _AUTO,
    _FAST,
    _FAST_BIAS,
    _ROW_BIAS_BLOCK,
    UNSPECIALIZED,
    elements,
    first_draw,
    is_edge,
    kept,
    keys_of_rows,
    load_rows,
    probabilities,
    row_biases,
    row_stride,
    rows_of_keys,
    single,
    store_rows,
    unit_of,
)
from sigswap.kernels.triton.row_biases import Counts, RowBiases, counts_for, row_biases_for
from sigswap.kernels.triton.sums import Sum


def supports(problem: Problem) -> bool:
    return problem.signature.too_much() is None


def backward(
    problem: Problem, *, key_tile: Tile | None = None, row_tile: Tile | None = None, tma: bool | None = None
) -> Gradients:
    """Deterministic. key_tile (of the kernel of dK and dV), row_tile (of dQ's) and tma are for tests and tuning."""
    grads, written, layouts = gradients_for(problem)
    if problem.signature.is_empty:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return grads
    grad_out, problem = problem.readable_grad_out(), problem.readable()
    query, key, value, bias, attn_mask = problem.inputs
    seed = problem.seed if problem.options.dropout_p > 0.0 else None
    new_query, new_key, new_value, new_bias, new_mask = written
    plan = _plan(problem.signature, layout_of(grad_out), layouts, key_tile, row_tile, tma)

    count = None if attn_mask is None or plan.counts is None else plan.counts(attn_mask)
    row_sums = None if plan.sum_rows is None else plan.sum_rows.empty_parts()
    if plan.keys is not None:
        row_bias, floor = bias, None
        if plan.row_biases is not None:
            row_bias, floor = plan.row_biases(problem, count)
        walked_query, walked_grad, *rest = plan.keys.describe(query, grad_out, row_bias)
        operands = walked_query, key, value, walked_grad, new_key, new_value
        operands += (new_query, row_sums) if plan.rows is None else (None, None)
        plan.keys.launch(*operands, rest[0] if rest else row_bias, floor, attn_mask, seed, *problem.cu_seqlens)
    if plan.rows is not None:
        keys = plan.rows.describe(key, value)
        sides = bias, count, attn_mask, seed
        plan.rows.launch(query, *keys, grad_out, new_query, row_sums, *sides, *problem.cu_seqlens)
    if plan.sum_rows is not None:
        plan.sum_rows(row_sums, new_bias)
    if plan.mask is not None and plan.sum_mask is not None:
        partial = plan.sum_mask.empty_parts()
        plan.mask(query, key, value, grad_out, partial, bias, count, attn_mask, seed)
        plan.sum_mask(partial, new_mask)
    hand_over(grads, written)
    return grads


# Plans.


class _Walk(NamedTuple):
    launch: Launch
    described: tuple[Described, ...] | None
    """What the kernel walks over (query, grad_out and row biases, or key and value), if it is loaded by tensor
    descriptors."""

    def describe(self, *tensors: Tensor) -> tuple:
        if self.described is None:
            return tensors
        return tuple([by(tensor) for by, tensor in zip(self.described, tensors, strict=False)])


class _Plan(NamedTuple):
    """The launches of a backward, in their order; None: not needed."""

    counts: Counts | None
    row_biases: RowBiases | None
    """For keys alone: every block of keys would work the rows' biases out again, replicated over its threads, which
    are as many logarithms as sigmoids. So they come from a tensor, where they differ between rows."""
    keys: _Walk | None
    """dK and dV, and if rows is None dQ and the row sums of dS, too."""
    rows: _Walk | None
    """dQ and the row sums of dS."""
    sum_rows: Sum | None
    mask: Launch | None
    sum_mask: Sum | None


@functools.lru_cache(MAX_PLANS)
def _plan(
    signature: Signature,
    grad_out: Layout,
    grads: tuple[Layout | None, ...],
    key_tile: Tile | None,
    row_tile: Tile | None,
    tma: bool | None,
) -> _Plan:
    """grads: of query, key, value, bias and attn_mask; None: not needed."""
    grad_query, grad_key, grad_value, grad_bias, grad_mask = grads
    keys = rows = row_biases = sum_rows = mask = sum_mask = None
    sums = grad_bias is not None
    need_rows, need_keys = grad_query is not None or sums, grad_key is not None or grad_value is not None
    together = need_keys and _together(signature, key_tile)
    if need_keys:
        row_biases = row_biases_for(signature)
        rows_too = (grad_query, sums) if together else (None, False)
        keys = _walk_rows_of_keys(signature, grad_out, grad_key, grad_value, *rows_too, row_biases, key_tile, tma)
    if need_rows and not together:
        rows = _walk_keys_of_rows(signature, grad_out, grad_query, sums, row_tile, tma)
    if grad_bias is not None:
        sum_rows = Sum(grad_bias, (*signature.query.shape[:3], 1), signature.device)
    if grad_mask is not None:
        parts, mask = _mask_launch(signature, grad_out)
        sum_mask = Sum(grad_mask, parts, signature.device)
    return _Plan(counts_for(signature), row_biases, keys, rows, sum_rows, mask, sum_mask)


def _together(signature: Signature, tile: Tile | None) -> bool:
    """Whether the kernel of dK and dV works out dQ and dbias, too: where one block has all keys, and there are so few
    rows that one program per head is enough."""
    if signature.packed is not None or not signature.plain:
        return False
    return signature.q_len <= 512 and signature.kv_len <= (tile or key_tile_for(signature)).keys


def _walk_rows_of_keys(
    signature: Signature,
    grad_out: Layout,
    grad_key: Layout | None,
    grad_value: Layout | None,
    grad_query: Layout | None,
    sums: bool,
    row_biases: RowBiases | None,
    tile: Tile | None,
    tma: bool | None,
) -> _Walk:
    """grad_query and sums: of what is worked out together with dK and dV."""
    query, key, value = signature.query, signature.key, signature.value
    tile = tile or key_tile_for(signature)
    if tma is None:
        tma = signature.tma(min(signature.q_len, signature.kv_len))
    described = None
    if tma and describable(query) and describable(grad_out):
        described = by_rows(query, tile.rows), by_rows(grad_out, tile.rows)
    arguments = signature.arguments(q=query, k=key, v=value, do=grad_out)
    _, _, attn_mask, seed = signature.side_layouts()
    bias: Layout | Described | None = signature.bias
    floor = None
    if row_biases is not None:
        bias = layout = row_biases.layout
        batch, heads, rows = layout.shape
        floor = row_biases.floor
        strides = layout.strides_or_zero(2)
        if described is not None:
            bias = Described((batch * heads, rows), (rows, 1), (1, tile.rows), torch.float32)
            described = *described, bias
            strides = strides[0] // rows, strides[1] // rows
        arguments |= {"stride_bias_b": strides[0], "stride_bias_h": strides[1], "const_bias": 0.0}
    row_sums = contiguous_layout(query.shape[:3], torch.float32) if sums else None
    arguments |= output_arguments(arguments, dk=grad_key, dv=grad_value, dq=grad_query, sum=row_sums)
    arguments |= _loop_arguments(tile, described)
    arguments["BIAS_ROWS"] = row_biases is not None
    arguments["VISIBLE"] = signature.options.visible_bias and row_biases is None
    floors = floor.strides_or_zero(2) if floor is not None else (0, 0)
    arguments["stride_floor_b"], arguments["stride_floor_h"] = floors
    walked = described or (query, grad_out)
    operands = walked[0], key, value, walked[1], grad_key, grad_value, grad_query, row_sums
    tensors = (*operands, bias, floor, attn_mask, seed, *signature.cu_layouts())
    blocks = triton.cdiv(signature.kv_len, tile.keys) * signature.batch * signature.kv_heads
    launch = Launch(_keys_kernel, blocks, signature.device, tensors, arguments, **tile.launch_options())
    return _Walk(launch, described)


def _walk_keys_of_rows(
    signature: Signature, grad_out: Layout, grad_query: Layout | None, sums: bool, tile: Tile | None, tma: bool | None
) -> _Walk:
    query, key, value = signature.query, signature.key, signature.value
    tile = tile or row_tile_for(signature)
    if tma is None:
        tma = signature.tma(min(signature.q_len, signature.kv_len))
    described = None
    if tma and describable(key) and describable(value):
        described = by_rows(key, tile.keys), by_rows(value, tile.keys)
    row_sums = contiguous_layout(query.shape[:3], torch.float32) if sums else None
    arguments = signature.arguments(q=query, k=key, v=value, do=grad_out)
    arguments |= output_arguments(arguments, dq=grad_query, sum=row_sums)
    arguments |= _loop_arguments(tile, described)
    outputs = grad_query, row_sums
    keys = described or (key, value)
    tensors = (query, *keys, grad_out, *outputs, *signature.side_layouts(), *signature.cu_layouts())
    blocks = triton.cdiv(signature.q_len, tile.rows) * signature.batch * signature.heads
    launch = Launch(_rows_kernel, blocks, signature.device, tensors, arguments, **tile.launch_options())
    return _Walk(launch, described)


def _loop_arguments(tile: Tile, described: tuple[Described, ...] | None) -> dict[str, int | bool]:
    return {"TMA": described is not None, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys}


def _mask_launch(signature: Signature, grad_out: Layout) -> tuple[tuple[int, ...], Launch]:
    """Partial sums of dS, float32 [parts, *mask's shape], and what computes them."""
    assert signature.attn_mask is not None
    query, key, value, shape = signature.query, signature.key, signature.value, signature.attn_mask.shape
    batch, heads, q_len, kv_len = signature.batch, signature.heads, signature.q_len, signature.kv_len
    block = 64 if signature.element_size == 2 and max(signature.widths) <= 128 else 32
    rows = min(block, max(16, triton.next_power_of_2(q_len)))
    keys = min(block, max(16, triton.next_power_of_2(kv_len)))
    row_blocks, key_blocks = triton.cdiv(q_len, rows), triton.cdiv(kv_len, keys)
    over_batch = shape[0] < batch
    over_heads, over_rows, over_keys = (
        of_mask == 1 and size > 1 for of_mask, size in zip(shape[1:], (heads, q_len, kv_len), strict=True)
    )
    tiles = shape[0] * shape[1] * (1 if over_rows else row_blocks) * (1 if over_keys else key_blocks)
    terms = batch // shape[0] * (heads if over_heads else 1)
    terms *= (row_blocks if over_rows else 1) * (key_blocks if over_keys else 1)
    splits = min(terms, max(1, 4 * limits_of(signature.device).multiprocessors // tiles))
    out = contiguous_layout((splits, *shape), torch.float32)
    arguments = signature.arguments(q=query, k=key, v=value, do=grad_out) | {
        "terms": terms,
        "terms_per_split": triton.cdiv(terms, splits),
        "tiles": tiles,
        "OVER_BATCH": over_batch,
        "OVER_HEADS": over_heads,
        "OVER_ROWS": over_rows,
        "OVER_KEYS": over_keys,
        "BLOCK_M": rows,
        "BLOCK_N": keys,
    }
    tensors = (query, key, value, grad_out, out, *signature.side_layouts())
    warps = min(4 if signature.element_size == 2 else 8, rows * keys // 64)  # as in Tile.launch_options()
    stages = 2 if signature.element_size == 2 and max(signature.widths) <= 64 else 1
    return out.shape, Launch(
        _mask_kernel, tiles * splits, signature.device, tensors, arguments, num_warps=warps, num_stages=stages
    )


# Tile configurations.


def key_tile_for(signature: Signature) -> Tile:
    """The tile of the kernel of dK and dV."""
    capability, shared, _ = limits_of(signature.device)
    size, dim, band = signature.element_size, max(signature.widths), signature.band()
    banded = band.has_left or band.has_right
    if size > 2:
        tile = Tile(32, 32, 8, 1)
    elif signature.only_masked and dim <= 128 and 90 <= capability < 100:
        tile = Tile(64, 64, 4, 2)
    elif not signature.plain:
        tile = Tile(32, 64, 8, 2 if dim <= 128 else 1)
    elif 90 <= capability < 100:
        if dim == 64 and signature.kv_len <= 64:
            tile = Tile(32, 64, 4, 2, 168)
        elif dim <= 64:
            banded_tile = Tile(64, 64, 4, 3, 168 if signature.form() == FAST else 0)
            tile = banded_tile if banded else Tile(128, 64, 4, 3)
        elif dim <= 128:
            tile = Tile(64, 64, 4, 2)
        else:
            tile = Tile(32, 64, 8, 2)
    else:
        tile = Tile(32 if dim > 64 else 64, 64, 4 if dim <= 64 else 8, 2)
    both = sum(signature.widths) * size
    # fit() takes what is loaded in the loop for keys: here, rows.
    turned = fit(tile._replace(rows=tile.keys, keys=tile.rows), both, both, shared)
    return _no_longer_than(turned._replace(rows=turned.keys, keys=turned.rows), signature)


def row_tile_for(signature: Signature) -> Tile:
    """The tile of the kernel of dQ."""
    capability, shared, _ = limits_of(signature.device)
    size, dim, band = signature.element_size, max(signature.widths), signature.band()
    banded = band.has_left or band.has_right
    if size > 2:
        tile = Tile(32, 32, 8, 1)
    elif signature.only_masked and dim <= 128 and 90 <= capability < 100:
        tile = Tile(64, 64, 4, 3 if dim <= 64 and not banded else 2)
    elif not signature.plain:
        tile = Tile(64, 32, 8, 2 if dim <= 128 else 1)
    elif 90 <= capability < 100:
        if dim <= 64:
            tile = Tile(64, 64, 4, 3) if banded else Tile(128, 64, 4, 3)
        elif dim <= 128:
            tile = Tile(128, 64, 8, 3)
        else:
            tile = Tile(64, 32, 8, 2)
    else:
        tile = Tile(64, 32 if dim > 64 else 64, 4 if dim <= 64 else 8, 2)
    both = sum(signature.widths) * size
    return _no_longer_than(fit(tile, both, both, shared), signature)


def _no_longer_than(tile: Tile, signature: Signature) -> Tile:
    rows = min(tile.rows, max(16, triton.next_power_of_2(signature.q_len)))
    keys = min(tile.keys, max(16, triton.next_power_of_2(signature.kv_len)))
    smaller = rows * keys <= tile.rows * tile.keys // 2
    return tile._replace(rows=rows, keys=keys, warps=4 if smaller else tile.warps)


# Device functions. In the kernel of dK and dV tiles of scores are [keys, rows], else [rows, keys].


@triton.jit
def _score_gradients(
    s, dp, row_bias, row, col, mask, stride_mask_m, stride_mask_n, seed, draw0, draw_len, q_len, kv_len, shift,
    left, right, scale, softcap, dropout_p, edge,
    MASK_ROWS: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, FORM: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """(p after dropout but for its factor 1 / (1 - dropout_p), dS, dX)."""
    p, slope = probabilities(
        s, row_bias, row, col, mask, stride_mask_m, stride_mask_n, q_len, kv_len, shift, left, right, scale, softcap,
        edge, MASK_ROWS, HAS_LEFT, HAS_RIGHT, SOFTCAP, FORM, ASM,
    )  # fmt: skip
    dropped = p
    if DROPOUT:
        keep = kept(seed, draw0, row, col, draw_len, dropout_p)
        dropped = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp / tl.maximum(1.0 - dropout_p, 1e-30), 0.0)  # with dropout_p = 1 nothing is kept
    ds = (p - p * p) * dp
    dx = ds
    if SOFTCAP:
        dx = ds * slope
    return dropped, ds, dx


@triton.jit
def _accumulate_keys(
    dk, dv, keys, values, col0, active, q, do, dq_out, sum_out, stride_q_n, stride_do_n, stride_dq_n, stride_sum_n,
    bias, bias_at, batch, head, mask, stride_mask_m, stride_mask_n, seed, draw0, draw_len, q_len, kv_len, shift,
    left, right, scale, softcap, const_bias, dropout_p,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr, BIAS_ROWS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, P_SCALE: tl.constexpr, FORM: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk += dX^T q and dv += p^T dO over all rows that see some of the keys; none, unless active is 1.

    With dq_out or sum_out these are all keys: then dQ and the row sums of dS are stored, too, for all rows.
    """
    col = (col0 + tl.arange(0, BLOCK_N))[:, None]
    last_col = tl.minimum(col0 + BLOCK_N, kv_len) - 1
    begin, end = rows_of_keys(col0, last_col, q_len, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M)
    if dq_out is not None or sum_out is not None:
        begin, end = 0, q_len
    for start in range(begin, end * active, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        edge = is_edge(start, start + BLOCK_M - 1, col0, last_col, shift, left, right, HAS_LEFT, HAS_RIGHT)
        rows = load_rows(q, batch, head, start, q_len, stride_q_n, HEAD_DIM, BLOCK_M, BLOCK_D, TMA)
        s = tl.dot(keys, rows.T, input_precision=PRECISION)
        grads = load_rows(do, batch, head, start, q_len, stride_do_n, VALUE_DIM, BLOCK_M, BLOCK_DV, TMA)
        dp = tl.dot(values, grads.T, input_precision=PRECISION)
        row_bias = tl.zeros((BLOCK_M,), tl.float32) + const_bias * unit_of(FORM)
        if BIAS_ROWS:
            if TMA:
                row_bias = bias.load([bias_at, start]).reshape(BLOCK_M) * unit_of(FORM)
            else:
                row_bias = tl.load(bias + row.to(tl.int64), mask=row < q_len, other=0.0) * unit_of(FORM)
        p, ds, dx = _score_gradients(
            s, dp, row_bias[None, :], row[None, :], col, mask, stride_mask_m, stride_mask_n, seed, draw0, draw_len,
            q_len, kv_len, shift, left, right, scale, softcap, dropout_p, edge,
            MASK_ROWS, HAS_LEFT, HAS_RIGHT, SOFTCAP, DROPOUT, FORM, ASM,
        )  # fmt: skip
        if P_SCALE != 1.0:
            p *= P_SCALE
        dv = tl.dot(p.to(grads.dtype), grads, dv, input_precision=PRECISION)
        dk = tl.dot(dx.to(rows.dtype), rows, dk, input_precision=PRECISION)
        if dq_out is not None:
            dq = tl.dot(dx.to(keys.dtype).T, keys, input_precision=PRECISION) * scale
            store_rows(dq_out, dq, start, q_len, stride_dq_n, HEAD_DIM, BLOCK_M, BLOCK_D)
        if sum_out is not None:
            tl.store(sum_out + row.to(tl.int64) * stride_sum_n, tl.sum(ds, 0), mask=row < q_len)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _keys_kernel(
    q, k, v, do, dk_out, dv_out, dq_out, sum_out, bias, floor, mask, seed, cu_q, cu_k,
    stride_q_b, stride_q_h, stride_q_n, stride_k_b, stride_k_h, stride_k_n,
    stride_v_b, stride_v_h, stride_v_n, stride_do_b, stride_do_h, stride_do_n,
    stride_dk_b, stride_dk_h, stride_dk_n, stride_dv_b, stride_dv_h, stride_dv_n,
    stride_dq_b, stride_dq_h, stride_dq_n, stride_sum_b, stride_sum_h, stride_sum_n,
    stride_bias_b, stride_bias_h, stride_floor_b, stride_floor_h,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, mask_batches,
    heads, group, q_len, kv_len, left, right, scale, softcap, const_bias, dropout_p,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr,
    BIAS_ROWS: tl.constexpr, VISIBLE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, P_SCALE: tl.constexpr,
    FORM: tl.constexpr, SLOW: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of BLOCK_N keys of one key head, over all query heads that use it. With dq_out or sum_out,
    which need that there is one block of keys, also dQ and the row sums of dS.

    The row bias is const_bias, less ln kv_len if VISIBLE, plus bias, if it is a number per head; or all in bias, a
    vector of rows (BIAS_ROWS), of which floor has each block's minimum, if FORM is AUTO. q, do, and a bias of rows:
    descriptors if TMA (stride_bias_b and stride_bias_h then count the bias's rows).
    """
    scale, softcap, const_bias, dropout_p = single(scale), single(softcap), single(const_bias), single(dropout_p)
    stride_q_b, stride_q_h, stride_q_n = elements(stride_q_b, stride_q_h, stride_q_n, UNIT, WIDE)
    stride_k_b, stride_k_h, stride_k_n = elements(stride_k_b, stride_k_h, stride_k_n, UNIT, WIDE)
    stride_v_b, stride_v_h, stride_v_n = elements(stride_v_b, stride_v_h, stride_v_n, UNIT, WIDE)
    stride_do_b, stride_do_h, stride_do_n = elements(stride_do_b, stride_do_h, stride_do_n, UNIT, WIDE)
    stride_dk_n, stride_dv_n = row_stride(stride_dk_n, WIDE), row_stride(stride_dv_n, WIDE)
    stride_dq_n = row_stride(stride_dq_n, WIDE)
    blocks = tl.cdiv(kv_len, BLOCK_N)
    # Under a causal mask the first keys take longest, and start first.
    col0 = tl.program_id(0) % blocks * BLOCK_N
    kv_heads = heads // group
    kv_head = (tl.program_id(0) // blocks) % kv_heads
    batch = tl.program_id(0) // blocks // kv_heads
    batch64, kv_head64 = batch.to(tl.int64), kv_head.to(tl.int64)
    draw_rows, draw_len = q_len, kv_len
    if cu_q is not None:
        q_start, k_start = tl.load(cu_q + batch).to(tl.int64), tl.load(cu_k + batch).to(tl.int64)
        q_len = (tl.load(cu_q + batch + 1) - q_start).to(tl.int32)
        kv_len = (tl.load(cu_k + batch + 1) - k_start).to(tl.int32)
        if col0 >= kv_len:
            return
        q += q_start * stride_q_n
        k += k_start * stride_k_n
        v += k_start * stride_v_n
        do += q_start * stride_do_n
        if dk_out is not None:
            dk_out += k_start * stride_dk_n
        if dv_out is not None:
            dv_out += k_start * stride_dv_n
        if BIAS_ROWS:
            bias += q_start
    k += batch64 * stride_k_b + kv_head64 * stride_k_h
    v += batch64 * stride_v_b + kv_head64 * stride_v_h
    if mask is not None:
        mask += (batch % mask_batches).to(tl.int64) * stride_mask_b
    if VISIBLE:
        const_bias -= tl.log(tl.maximum(kv_len, 1).to(tl.float32))
    shift = kv_len - q_len if BOTTOM_RIGHT else 0
    keys = load_rows(k, batch, kv_head, col0, kv_len, stride_k_n, HEAD_DIM, BLOCK_N, BLOCK_D, False)
    values = load_rows(v, batch, kv_head, col0, kv_len, stride_v_n, VALUE_DIM, BLOCK_N, BLOCK_DV, False)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)

    for member in range(0, group):
        head = kv_head * group + member
        head64 = head.to(tl.int64)
        draw0 = first_draw(batch, heads, head, draw_rows)
        q_head, do_head = q, do
        if not TMA:
            q_head += batch64 * stride_q_b + head64 * stride_q_h
            do_head += batch64 * stride_do_b + head64 * stride_do_h
        bias_head, mask_head, head_bias, dq_head, sum_head = bias, mask, const_bias, dq_out, sum_out
        if dq_out is not None:
            dq_head += batch64 * stride_dq_b + head64 * stride_dq_h
        if sum_out is not None:
            sum_head += batch64 * stride_sum_b + head64 * stride_sum_h
        bias_at = batch * stride_bias_b + head * stride_bias_h
        if bias is not None:
            if not (TMA and BIAS_ROWS):
                bias_head += batch64 * stride_bias_b + head64 * stride_bias_h
            if not BIAS_ROWS:
                head_bias += tl.load(bias_head).to(tl.float32)
        if mask is not None:
            mask_head += head64 * stride_mask_h
        fast = 1
        if FORM == _AUTO:
            lowest = head_bias
            if floor is not None:
                floors = floor + batch64 * stride_floor_b + head64 * stride_floor_h
                lowest = tl.full((), float("inf"), tl.float32)
                block_count = tl.cdiv(draw_rows, _ROW_BIAS_BLOCK)
                for at in range(0, block_count, 64):
                    block = at + tl.arange(0, 64)
                    lowest = tl.minimum(
                        lowest, tl.min(tl.load(floors + block, mask=block < block_count, other=float("inf")))
                    )
            fast = (lowest >= _FAST_BIAS).to(tl.int32)
        if FORM >= _FAST:
            dk, dv = _accumulate_keys(
                dk, dv, keys, values, col0, fast, q_head, do_head, dq_head, sum_head,
                stride_q_n, stride_do_n, stride_dq_n, stride_sum_n, bias_head, bias_at, batch, head, mask_head,
                stride_mask_m, stride_mask_n,
                seed, draw0, draw_len, q_len, kv_len, shift, left, right, scale, softcap, head_bias, dropout_p,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASK_ROWS, BIAS_ROWS, HAS_LEFT, HAS_RIGHT,
                SOFTCAP,
                DROPOUT, P_SCALE, _FAST, ASM, TMA, PRECISION,
            )  # fmt: skip
        if FORM != _FAST:
            dk, dv = _accumulate_keys(
                dk, dv, keys, values, col0, 1 - fast if FORM == _AUTO else 1, q_head, do_head,
                dq_head, sum_head, stride_q_n, stride_do_n, stride_dq_n, stride_sum_n, bias_head, bias_at, batch,
                head, mask_head, stride_mask_m, stride_mask_n, seed, draw0, draw_len, q_len, kv_len, shift, left,
                right, scale, softcap,
                head_bias, dropout_p, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASK_ROWS, BIAS_ROWS,
                HAS_LEFT, HAS_RIGHT, SOFTCAP, DROPOUT, P_SCALE, SLOW, ASM, TMA, PRECISION,
            )  # fmt: skip

    if dk_out is not None:
        dk_out += batch64 * stride_dk_b + kv_head64 * stride_dk_h
        store_rows(dk_out, dk * scale, col0, kv_len, stride_dk_n, HEAD_DIM, BLOCK_N, BLOCK_D)
    if dv_out is not None:
        factor = 1.0 / P_SCALE
        if DROPOUT:
            factor = factor / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
        dv_out += batch64 * stride_dv_b + kv_head64 * stride_dv_h
        store_rows(dv_out, dv * factor, col0, kv_len, stride_dv_n, VALUE_DIM, BLOCK_N, BLOCK_DV)


@triton.jit
def _accumulate_rows(
    dq, row_sum, rows, grads, row_bias, row0, active, k, v, stride_k_n, stride_v_n, batch, kv_head,
    mask, stride_mask_m, stride_mask_n, seed, draw0, draw_len, q_len, kv_len, shift, left, right, scale, softcap,
    dropout_p,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, SUM: tl.constexpr, FORM: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq += dX k and row_sum += sum_j dS over all keys that some of the rows see; none, unless active is 1."""
    row_bias *= unit_of(FORM)
    row = (row0 + tl.arange(0, BLOCK_M))[:, None]
    last_row = tl.minimum(row0 + BLOCK_M, q_len) - 1
    begin, end = keys_of_rows(row0, last_row, kv_len, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
    for start in range(begin, end * active, BLOCK_N):
        col = (start + tl.arange(0, BLOCK_N))[None, :]
        edge = is_edge(row0, last_row, start, start + BLOCK_N - 1, shift, left, right, HAS_LEFT, HAS_RIGHT)
        keys = load_rows(k, batch, kv_head, start, kv_len, stride_k_n, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
        s = tl.dot(rows, keys.T, input_precision=PRECISION)
        values = load_rows(v, batch, kv_head, start, kv_len, stride_v_n, VALUE_DIM, BLOCK_N, BLOCK_DV, TMA)
        dp = tl.dot(grads, values.T, input_precision=PRECISION)
        _, ds, dx = _score_gradients(
            s, dp, row_bias[:, None], row, col, mask, stride_mask_m, stride_mask_n, seed, draw0, draw_len,
            q_len, kv_len, shift, left, right, scale, softcap, dropout_p, edge,
            MASK_ROWS, HAS_LEFT, HAS_RIGHT, SOFTCAP, DROPOUT, FORM, ASM,
        )  # fmt: skip
        if SUM:
            row_sum += tl.sum(ds, 1)
        dq = tl.dot(dx.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq, row_sum


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _rows_kernel(
    q, k, v, do, dq_out, sum_out, bias, count, mask, seed, cu_q, cu_k,
    stride_q_b, stride_q_h, stride_q_n, stride_k_b, stride_k_h, stride_k_n,
    stride_v_b, stride_v_h, stride_v_n, stride_do_b, stride_do_h, stride_do_n,
    stride_dq_b, stride_dq_h, stride_dq_n, stride_sum_b, stride_sum_h, stride_sum_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_count_b, stride_count_h, stride_count_m,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, mask_batches,
    heads, group, q_len, kv_len, left, right, scale, softcap, const_bias, dropout_p,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr,
    BIAS_ROWS: tl.constexpr, VISIBLE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, P_SCALE: tl.constexpr,
    FORM: tl.constexpr, SLOW: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: dQ and the row sums of dS, of BLOCK_M rows of one query head. k, v: descriptors if TMA."""
    scale, softcap, const_bias, dropout_p = single(scale), single(softcap), single(const_bias), single(dropout_p)
    stride_q_b, stride_q_h, stride_q_n = elements(stride_q_b, stride_q_h, stride_q_n, UNIT, WIDE)
    stride_k_b, stride_k_h, stride_k_n = elements(stride_k_b, stride_k_h, stride_k_n, UNIT, WIDE)
    stride_v_b, stride_v_h, stride_v_n = elements(stride_v_b, stride_v_h, stride_v_n, UNIT, WIDE)
    stride_do_b, stride_do_h, stride_do_n = elements(stride_do_b, stride_do_h, stride_do_n, UNIT, WIDE)
    stride_dq_n = row_stride(stride_dq_n, WIDE)
    blocks = tl.cdiv(q_len, BLOCK_M)
    row0 = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    head = (tl.program_id(0) // blocks) % heads
    batch = tl.program_id(0) // blocks // heads
    kv_head = head // group
    batch64, head64, kv_head64 = batch.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)
    draw0, draw_len = first_draw(batch, heads, head, q_len), kv_len
    if cu_q is not None:
        q_start, k_start = tl.load(cu_q + batch).to(tl.int64), tl.load(cu_k + batch).to(tl.int64)
        q_len = (tl.load(cu_q + batch + 1) - q_start).to(tl.int32)
        kv_len = (tl.load(cu_k + batch + 1) - k_start).to(tl.int32)
        if row0 >= q_len:
            return
        q += q_start * stride_q_n
        k += k_start * stride_k_n
        v += k_start * stride_v_n
        do += q_start * stride_do_n
        if dq_out is not None:
            dq_out += q_start * stride_dq_n
        if sum_out is not None:
            sum_out += q_start * stride_sum_n
        if bias is not None:
            bias += q_start * stride_bias_m
    q += batch64 * stride_q_b + head64 * stride_q_h
    do += batch64 * stride_do_b + head64 * stride_do_h
    if not TMA:
        k += batch64 * stride_k_b + kv_head64 * stride_k_h
        v += batch64 * stride_v_b + kv_head64 * stride_v_h
    if bias is not None:
        bias += batch64 * stride_bias_b + head64 * stride_bias_h
        if not BIAS_ROWS:
            const_bias += tl.load(bias).to(tl.float32)
    if mask is not None:
        mask_batch = (batch % mask_batches).to(tl.int64)
        mask += mask_batch * stride_mask_b + head64 * stride_mask_h
        if count is not None:
            count += mask_batch * stride_count_b + head64 * stride_count_h
    shift = kv_len - q_len if BOTTOM_RIGHT else 0

    rows = load_rows(q, batch, head, row0, q_len, stride_q_n, HEAD_DIM, BLOCK_M, BLOCK_D, False)
    grads = load_rows(do, batch, head, row0, q_len, stride_do_n, VALUE_DIM, BLOCK_M, BLOCK_DV, False)
    row = row0 + tl.arange(0, BLOCK_M)
    row_bias = row_biases(
        row, bias, stride_bias_m, count, stride_count_m, const_bias, q_len, kv_len, shift, left, right,
        BIAS_ROWS, VISIBLE, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    fast = 1
    if FORM == _AUTO:
        fast = (tl.min(row_bias) >= _FAST_BIAS).to(tl.int32)
    if FORM >= _FAST:
        dq, row_sum = _accumulate_rows(
            dq, row_sum, rows, grads, row_bias, row0, fast, k, v, stride_k_n, stride_v_n, batch, kv_head, mask,
            stride_mask_m, stride_mask_n, seed, draw0, draw_len, q_len, kv_len, shift, left, right, scale, softcap,
            dropout_p,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASK_ROWS, HAS_LEFT, HAS_RIGHT, SOFTCAP,
            DROPOUT, sum_out is not None, _FAST, ASM, TMA, PRECISION,
        )  # fmt: skip
    if FORM != _FAST:
        dq, row_sum = _accumulate_rows(
            dq, row_sum, rows, grads, row_bias, row0, 1 - fast if FORM == _AUTO else 1, k, v, stride_k_n, stride_v_n,
            batch, kv_head, mask, stride_mask_m, stride_mask_n, seed, draw0, draw_len, q_len, kv_len, shift, left,
            right,
            scale, softcap, dropout_p, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASK_ROWS, HAS_LEFT,
            HAS_RIGHT, SOFTCAP, DROPOUT, sum_out is not None, SLOW, ASM, TMA, PRECISION,
        )  # fmt: skip
    if dq_out is not None:
        dq_out += batch64 * stride_dq_b + head64 * stride_dq_h
        store_rows(dq_out, dq * scale, row0, q_len, stride_dq_n, HEAD_DIM, BLOCK_M, BLOCK_D)
    if sum_out is not None:
        sum_out += batch64 * stride_sum_b + head64 * stride_sum_h
        tl.store(sum_out + row.to(tl.int64) * stride_sum_n, row_sum, mask=row < q_len)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _mask_kernel(
    q, k, v, do, out, bias, count, mask, seed,
    stride_q_b, stride_q_h, stride_q_n, stride_k_b, stride_k_h, stride_k_n,
    stride_v_b, stride_v_h, stride_v_n, stride_do_b, stride_do_h, stride_do_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_count_b, stride_count_h, stride_count_m,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, mask_batches,
    heads, group, q_len, kv_len, left, right, scale, softcap, const_bias, dropout_p,
    terms, terms_per_split, tiles,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr,
    BIAS_ROWS: tl.constexpr, VISIBLE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    OVER_BATCH: tl.constexpr, OVER_HEADS: tl.constexpr, OVER_ROWS: tl.constexpr, OVER_KEYS: tl.constexpr,
    ASM: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: one tile of the mask's gradient, summed over a part of what the mask is broadcast to.

    out: float32 [splits, mask_batches, H|1, M|1, N|1], contiguous.
    """
    scale, softcap, const_bias, dropout_p = single(scale), single(softcap), single(const_bias), single(dropout_p)
    stride_q_b, stride_q_h, stride_q_n = elements(stride_q_b, stride_q_h, stride_q_n, UNIT, WIDE)
    stride_k_b, stride_k_h, stride_k_n = elements(stride_k_b, stride_k_h, stride_k_n, UNIT, WIDE)
    stride_v_b, stride_v_h, stride_v_n = elements(stride_v_b, stride_v_h, stride_v_n, UNIT, WIDE)
    stride_do_b, stride_do_h, stride_do_n = elements(stride_do_b, stride_do_h, stride_do_n, UNIT, WIDE)
    row_blocks = tl.cdiv(q_len, BLOCK_M)
    key_blocks = tl.cdiv(kv_len, BLOCK_N)
    split = tl.program_id(0) // tiles
    at = tl.program_id(0) % tiles
    key_block, row_block, own_head = 0, 0, 0
    mask_keys, mask_rows, mask_heads = 1, 1, 1
    if not OVER_KEYS:
        key_block = at % key_blocks
        at = at // key_blocks
        mask_keys = kv_len
    if not OVER_ROWS:
        row_block = at % row_blocks
        at = at // row_blocks
        mask_rows = q_len
    if not OVER_HEADS:
        own_head = at % heads
        at = at // heads
        mask_heads = heads
    own_batch = at
    own_batch64 = own_batch.to(tl.int64)
    shift = kv_len - q_len if BOTTOM_RIGHT else 0

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for term in range(split * terms_per_split, tl.minimum((split + 1) * terms_per_split, terms)):
        rest = term
        column_block, line_block, head, batch = key_block, row_block, own_head, own_batch
        if OVER_KEYS:
            column_block = rest % key_blocks
            rest = rest // key_blocks
        if OVER_ROWS:
            line_block = rest % row_blocks
            rest = rest // row_blocks
        if OVER_HEADS:
            head = rest % heads
            rest = rest // heads
        if OVER_BATCH:
            batch += rest * mask_batches
        batch64, head64 = tl.cast(batch, tl.int64), tl.cast(head, tl.int64)
        kv_head64 = head64 // group
        row0, col0 = line_block * BLOCK_M, column_block * BLOCK_N
        rows = load_rows(
            q + batch64 * stride_q_b + head64 * stride_q_h, 0, 0, row0, q_len, stride_q_n, HEAD_DIM, BLOCK_M,
            BLOCK_D, False,
        )  # fmt: skip
        keys = load_rows(
            k + batch64 * stride_k_b + kv_head64 * stride_k_h, 0, 0, col0, kv_len, stride_k_n, HEAD_DIM, BLOCK_N,
            BLOCK_D, False,
        )  # fmt: skip
        s = tl.dot(rows, keys.T, input_precision=PRECISION)
        grads = load_rows(
            do + batch64 * stride_do_b + head64 * stride_do_h, 0, 0, row0, q_len, stride_do_n, VALUE_DIM, BLOCK_M,
            BLOCK_DV, False,
        )  # fmt: skip
        values = load_rows(
            v + batch64 * stride_v_b + kv_head64 * stride_v_h, 0, 0, col0, kv_len, stride_v_n, VALUE_DIM, BLOCK_N,
            BLOCK_DV, False,
        )  # fmt: skip
        dp = tl.dot(grads, values.T, input_precision=PRECISION)
        row = row0 + tl.arange(0, BLOCK_M)
        col = col0 + tl.arange(0, BLOCK_N)
        bias_head, count_head = bias, count
        term_bias = const_bias
        if bias is not None:
            bias_head += batch64 * stride_bias_b + head64 * stride_bias_h
            if not BIAS_ROWS:
                term_bias += tl.load(bias_head).to(tl.float32)
        if count is not None:
            count_head += own_batch64 * stride_count_b + head64 * stride_count_h
        row_bias = row_biases(
            row, bias_head, stride_bias_m, count_head, stride_count_m, term_bias, q_len, kv_len, shift, left, right,
            BIAS_ROWS, VISIBLE, HAS_LEFT, HAS_RIGHT,
        ) * unit_of(_ACCURATE)  # fmt: skip
        _, ds, _ = _score_gradients(
            s, dp, row_bias[:, None], row[:, None], col[None, :],
            mask + own_batch64 * stride_mask_b + head64 * stride_mask_h, stride_mask_m, stride_mask_n, seed,
            (batch64 * heads + head64) * q_len, kv_len, q_len, kv_len, shift, left, right, scale, softcap, dropout_p,
            True, MASK_ROWS, HAS_LEFT, HAS_RIGHT, SOFTCAP, DROPOUT, _ACCURATE, ASM,
        )  # fmt: skip
        total += ds

    base = ((tl.cast(split, tl.int64) * mask_batches + own_batch) * mask_heads + own_head) * mask_rows * mask_keys
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    col = key_block * BLOCK_N + tl.arange(0, BLOCK_N)
    if OVER_ROWS and OVER_KEYS:
        tl.store(out + base, tl.sum(tl.sum(total, 1), 0))
    elif OVER_ROWS:
        tl.store(out + base + col, tl.sum(total, 0), mask=col < kv_len)
    elif OVER_KEYS:
        tl.store(out + base + row, tl.sum(total, 1), mask=row < q_len)
    else:
        pointers = out + base + (row.to(tl.int64) * mask_keys)[:, None] + col[None, :]
        tl.store(pointers, total, mask=(row < q_len)[:, None] & (col < kv_len)[None, :])
