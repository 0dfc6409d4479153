"""The forward of sigmoid attention in Triton: one pass over the keys per block of query rows.

Sigmoid needs no row maximum, no row sum and no rescaling: o_i = sum_j sigmoid(s_ij + b_i) v_j is a plain sum, so
the loop is two matrix products with a sigmoid between them, and nothing is saved for the backward. Blocks of keys
that no row of the block sees are skipped; only blocks on the edge of the band compute a mask.

With a row cap the probabilities are summed on the way, and the row is divided once, at the end.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sigswap.kernels.host.forms import AUTO, FAST
from sigswap.kernels.host.launch import Launch, by_rows, describable
from sigswap.kernels.host.layout import Layout, layout_of
from sigswap.kernels.host.problem import MAX_PLANS, Problem, Signature, output_arguments
from sigswap.kernels.host.results import Forward, empty_output, maker_of
from sigswap.kernels.host.tiles import Tile, fit, limits_of
from sigswap.kernels.triton.common import (
    _AUTO,
    _FAST,
    _FAST_BIAS,
    UNSPECIALIZED,
    elements,
    is_edge,
    keys_of_rows,
    load_rows,
    mask_unit,
    places_of_rows,
    probabilities,
    row_biases,
    sequence,
    single,
    store_numbers,
    unit_of,
)
from sigswap.kernels.triton.dropout import first_row, kept, row_draws, scale_of
from sigswap.kernels.triton.row_biases import Counts, counts_for


def supports(problem: Problem) -> bool:
    return problem.signature.too_much() is None


def forward(problem: Problem, *, tile: Tile | None = None, tma: bool | None = None) -> Tensor:
    """Deterministic. tile and tma override the tile configuration and the use of tensor descriptors, for tests and
    tuning."""
    if problem.signature.is_empty:
        if problem.row_sums is not None:
            problem.row_sums.zero_()
        out = empty_output(problem.query, problem.value) if problem.out is None else problem.out
        return out.zero_()
    problem = problem.readable()
    query, key, value, given, row_sums = problem.query, problem.key, problem.value, problem.out, problem.row_sums
    of_given = None if given is None else layout_of(given)
    of_sums = None if row_sums is None else layout_of(row_sums)
    plan = _plan(problem.signature, of_given, of_sums, tile, tma)
    out = query.new_empty_strided(plan.out.shape, plan.out.strides) if given is None else given
    count = None if problem.attn_mask is None or plan.counts is None else plan.counts(problem.attn_mask)
    seed = problem.seed if problem.options.dropout_p > 0.0 else None
    plan.launch(query, key, value, out, row_sums, problem.bias, count, problem.attn_mask, seed, *problem.cu_seqlens)
    return out


def forward_again(problem: Problem) -> Forward | None:
    """See :func:`sigswap.kernels.dispatch.forward_again`."""
    signature = problem.signature
    if signature.is_empty or not signature.is_readable:
        return None
    plan = _plan(signature, None, None, None, None)
    launch, new_output, others = plan.launch, maker_of(plan.out, signature.device), (None,) * 7

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = new_output()
        launch(query, key, value, out, *others)
        return out

    return run


class _Plan(NamedTuple):
    launch: Launch
    out: Layout
    counts: Counts | None


@functools.lru_cache(MAX_PLANS)
def _plan(
    signature: Signature,
    out: Layout | None,
    row_sums: Layout | None,
    tile: Tile | None,
    tma: bool | None,
) -> _Plan:
    """out: None: of a new output. row_sums: None: not asked for."""
    out = out or signature.output()
    query, key, value = signature.query, signature.key, signature.value
    tile = tile or tile_for(signature)
    described = None
    if tma is None:
        tma = signature.tma(signature.kv_len, masked=True) and signature.options.dropout_p == 0.0
    if tma and describable(key) and describable(value):
        described = by_rows(key, tile.keys), by_rows(value, tile.keys)
    arguments = signature.arguments(q=query, k=key, v=value, o=out)
    arguments |= output_arguments(arguments, sum=row_sums) | {
        "TMA": described is not None,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "MASK_UNIT": mask_unit(signature),
        "FILLED": signature.packed is None,
    }
    operands = query, *(described or (key, value)), out, row_sums
    tensors = (*operands, *signature.side_layouts(), *signature.cu_layouts())
    blocks = triton.cdiv(signature.q_len, tile.rows) * signature.batch * signature.heads
    launch = Launch(_forward_kernel, blocks, signature.device, tensors, arguments, **tile.launch_options())
    return _Plan(launch, out, counts_for(signature, mask_unit(signature)))


def tile_for(signature: Signature) -> Tile:
    capability, shared, _ = limits_of(signature.device)
    size, dim, band = signature.element_size, max(signature.widths), signature.band()
    banded, q_len = band.has_left or band.has_right, signature.q_len
    if size > 2:
        # As measured on an H200 at 64. Above 128 products run on the ordinary units, from registers.
        if dim <= 64:
            tile = Tile(128, 64, 8, 2)
        elif dim <= 128:
            tile = Tile(64, 32, 4, 2)
        else:
            tile = Tile(32, 32, 8, 1)
    elif signature.masked_by_rows and dim <= 128 and 90 <= capability < 100:
        tile = Tile(64, 64, 4, 3 if dim <= 64 else 2)
    elif not signature.plain and not signature.masked_by_rows and 90 <= capability < 100:
        # As measured on an H200, with dropout at 64 and a soft cap at 128 and 256. Eight warps of 64 rows take three
        # times as long.
        if dim <= 64:
            tile = Tile(128, 64, 8, 3)
        elif dim <= 128:
            tile = Tile(64, 64, 4, 3)
        else:
            tile = Tile(128, 64, 8, 2)
    elif not signature.plain:
        tile = Tile(64, 64, 8, 2) if dim <= 128 else Tile(64, 32, 8, 2)
    elif 90 <= capability < 100:
        # As measured on an H100. A limit on registers lets one more program fit on a multiprocessor.
        if dim <= 64 and banded:
            tile = Tile(64, 64, 4, 3) if q_len < 8192 else Tile(64, 64, 4, 3, 128)
        elif dim <= 64:
            fast = signature.form() == FAST or (signature.form() == AUTO and q_len <= 2048)
            tile = Tile(128, 64, 4, 3, 168 if fast else 0)
        elif dim <= 128:
            tile = Tile(64, 64, 4, 3)
        else:
            tile = Tile(128, 64, 8, 2)
    elif dim <= 64:
        tile = Tile(128, 64, 4, 3)
    else:
        tile = Tile(128, 64 if dim <= 128 else 32, 8, 2)
    width, value_width = signature.widths
    return fit(_short_rows(tile, q_len), width * size, (width + value_width) * size, shared)


def _short_rows(tile: Tile, rows: int) -> Tile:
    """The tile for few rows: no larger than needed."""
    size = max(16, triton.next_power_of_2(rows))
    if size < tile.rows:
        tile = tile._replace(rows=size, warps=4, registers=0)
    return tile


@triton.jit
def _accumulate(
    acc, row_sum, q, bias, row0, active, k, v, stride_k_n, stride_v_n, batch, kv_head,
    mask, stride_mask_m, stride_mask_n, first_word, second_word, q_len, kv_len, shift, left, right, scale, softcap,
    dropout_p,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, P_SCALE: tl.constexpr, FORM: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, SUMS: tl.constexpr, MASK_UNIT: tl.constexpr,
):  # fmt: skip
    """acc += p v, and row_sum += sum_j p if SUMS, over all keys that some of the rows see; none, unless active is 1."""
    bias *= unit_of(FORM)
    rows = (row0 + tl.arange(0, BLOCK_M))[:, None]
    last_row = tl.minimum(row0 + BLOCK_M, q_len) - 1
    begin, end = keys_of_rows(row0, last_row, kv_len, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
    for start in range(begin, end * active, BLOCK_N):
        cols = (start + tl.arange(0, BLOCK_N))[None, :]
        edge = is_edge(row0, last_row, start, start + BLOCK_N - 1, shift, left, right, HAS_LEFT, HAS_RIGHT)
        keys = load_rows(k, batch, kv_head, start, kv_len, stride_k_n, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
        scores = tl.dot(q, keys.T, input_precision=PRECISION)
        values = load_rows(v, batch, kv_head, start, kv_len, stride_v_n, VALUE_DIM, BLOCK_N, BLOCK_DV, TMA)
        p, _ = probabilities(
            scores, bias[:, None], rows, cols, mask, stride_mask_m, stride_mask_n, q_len, kv_len, shift, left, right,
            scale, softcap, edge, MASK_ROWS, HAS_LEFT, HAS_RIGHT, SOFTCAP, FORM, ASM,
            None, MASK_UNIT,
        )  # fmt: skip
        if SUMS:
            if start + BLOCK_N > kv_len:
                p = tl.where(cols < kv_len, p, 0.0)
            row_sum += tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(kept(first_word[:, None], second_word[:, None], cols, dropout_p), p, 0.0)
        if P_SCALE != 1.0:
            p *= P_SCALE
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
    return acc, row_sum


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    q, k, v, out, sum_out, bias, count, mask, seed, cu_q, cu_k,
    stride_q_b, stride_q_h, stride_q_n, stride_k_b, stride_k_h, stride_k_n,
    stride_v_b, stride_v_h, stride_v_n, stride_o_b, stride_o_h, stride_o_n,
    stride_sum_b, stride_sum_h, stride_sum_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_count_b, stride_count_h, stride_count_m,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, mask_batches,
    heads, group, q_len, kv_len, total_q, total_k, left, right, scale, softcap, const_bias, dropout_p, row_cap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr,
    BIAS_ROWS: tl.constexpr, VISIBLE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, CAP: tl.constexpr, P_SCALE: tl.constexpr,
    FORM: tl.constexpr, SLOW: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, MASK_UNIT: tl.constexpr, FILLED: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M query rows of one head. k, v: descriptors if TMA, else addresses. sum_out, if given, gets
    the rows' sums of p before dropout.

    With cu_q and cu_k (packed sequences) q_len and kv_len are the longest, of total_q rows and total_k
    keys; each sequence has its own. FILLED: there are keys for certain.
    """
    scale, softcap, const_bias, dropout_p = single(scale), single(softcap), single(const_bias), single(dropout_p)
    stride_q_b, stride_q_h, stride_q_n = elements(stride_q_b, stride_q_h, stride_q_n, UNIT, WIDE)
    stride_k_b, stride_k_h, stride_k_n = elements(stride_k_b, stride_k_h, stride_k_n, UNIT, WIDE)
    stride_v_b, stride_v_h, stride_v_n = elements(stride_v_b, stride_v_h, stride_v_n, UNIT, WIDE)
    stride_o_b, stride_o_h, stride_o_n = elements(stride_o_b, stride_o_h, stride_o_n, UNIT, WIDE)
    blocks = tl.cdiv(q_len, BLOCK_M)
    # Under a causal mask the last rows take longest: they start first.
    row0 = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    head = (tl.program_id(0) // blocks) % heads
    batch = tl.program_id(0) // blocks // heads
    kv_head = head // group
    batch64, head64, kv_head64 = batch.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)
    head_row = first_row(batch, heads, head, q_len)
    if cu_q is not None:
        q_start, q_len = sequence(cu_q, batch, q_len, total_q)
        k_start, kv_len = sequence(cu_k, batch, kv_len, total_k)
        if row0 >= q_len:
            return
        q += q_start * stride_q_n
        k += k_start * stride_k_n
        v += k_start * stride_v_n
        out += q_start * stride_o_n
        if sum_out is not None:
            sum_out += q_start * stride_sum_n
        if bias is not None:
            bias += q_start * stride_bias_m
    q += batch64 * stride_q_b + head64 * stride_q_h
    if not TMA:
        k += batch64 * stride_k_b + kv_head64 * stride_k_h
        v += batch64 * stride_v_b + kv_head64 * stride_v_h
    out += batch64 * stride_o_b + head64 * stride_o_h
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
    if FILLED:
        # The way around a loop that may have no iterations puts zeros in the accumulators, where ptxas then finds them
        # defined while products are in flight, and has each product wait for the one before (Triton 3.6 and 3.8).
        tl.assume(kv_len > 0)

    queries = load_rows(q, batch, head, row0, q_len, stride_q_n, HEAD_DIM, BLOCK_M, BLOCK_D, False)
    row_bias = row_biases(
        row0 + tl.arange(0, BLOCK_M), bias, stride_bias_m, count, stride_count_m, const_bias, q_len, kv_len, shift,
        left, right, BIAS_ROWS, VISIBLE, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    first_word, second_word = None, None
    if DROPOUT:
        first_word, second_word = row_draws(seed, head_row, row0 + tl.arange(0, BLOCK_M))
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    SUMS: tl.constexpr = CAP or sum_out is not None

    fast = 1
    if FORM == _AUTO:
        if BIAS_ROWS or count is not None:
            lowest = tl.min(row_bias)
        else:  # without looking for the least of the rows, for which the first keys would wait
            lowest = const_bias
            if VISIBLE:
                last_row = tl.minimum(row0 + BLOCK_M, q_len) - 1
                begin, end = keys_of_rows(row0, last_row, kv_len, shift, left, right, HAS_LEFT, HAS_RIGHT, 1)
                lowest -= tl.log(tl.maximum(end - begin, 1).to(tl.float32))
        fast = (lowest >= _FAST_BIAS).to(tl.int32)
    # One of the two has no iterations. As the branches of an if they would not share their shared memory.
    if FORM >= _FAST:
        acc, row_sum = _accumulate(
            acc, row_sum, queries, row_bias, row0, fast, k, v, stride_k_n, stride_v_n, batch, kv_head,
            mask, stride_mask_m, stride_mask_n, first_word, second_word, q_len, kv_len, shift, left, right, scale,
            softcap,
            dropout_p, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASK_ROWS, HAS_LEFT,
            HAS_RIGHT, SOFTCAP, DROPOUT, P_SCALE, _FAST, ASM, TMA, PRECISION, SUMS, MASK_UNIT,
        )  # fmt: skip
    if FORM != _FAST:
        acc, row_sum = _accumulate(
            acc, row_sum, queries, row_bias, row0, 1 - fast if FORM == _AUTO else 1, k, v, stride_k_n, stride_v_n,
            batch, kv_head,
            mask, stride_mask_m, stride_mask_n, first_word, second_word, q_len, kv_len, shift, left, right, scale,
            softcap,
            dropout_p, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASK_ROWS, HAS_LEFT,
            HAS_RIGHT, SOFTCAP, DROPOUT, P_SCALE, SLOW, ASM, TMA, PRECISION, SUMS, MASK_UNIT,
        )  # fmt: skip

    factor = 1.0 / P_SCALE
    if DROPOUT:
        factor *= scale_of(dropout_p)
    if CAP:
        acc *= (factor / tl.maximum(row_sum, single(row_cap)))[:, None]
    else:
        acc *= factor
    if sum_out is not None:
        sum_out += batch64 * stride_sum_b + head64 * stride_sum_h
        store_numbers(sum_out, row_sum, row0 + tl.arange(0, BLOCK_M), q_len, stride_sum_n)
    # One tl.store in this kernel's own source, of float32: inductor may fuse what follows the attention into it.
    place, inside = places_of_rows(out, row0, q_len, stride_o_n, VALUE_DIM, BLOCK_M, BLOCK_DV)
    tl.store(place, acc, mask=inside)
