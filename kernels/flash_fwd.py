"""The forward of sigmoid attention in Triton: one pass over the keys per block of query rows.

Sigmoid needs no row maximum, no row sum and no rescaling: o_i = sum_j sigmoid(s_ij + b_i) v_j is a plain sum, so
the loop is two matrix products with a sigmoid between them, and nothing is saved for the backward. Blocks of keys
that no row of the block sees are skipped; only blocks on the edge of the band compute a mask.

With two subtiles a program holds two blocks of rows: the sigmoid of one overlaps the matrix products of the other.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sigswap.kernels import reference
from sigswap.kernels.reference import Options
from sigswap.kernels.triton_common import (
    _ACCURATE,
    _AUTO,
    _FAST,
    _FAST_BIAS,
    UNSPECIALIZED,
    Tile,
    band_of,
    common_arguments,
    descriptor,
    fit,
    form_of,
    in_units,
    is_plain,
    kept,
    keys_of_rows,
    limits_of,
    load_rows,
    probabilities,
    row_biases,
    short_rows,
    store_rows,
    tma_fits,
    unit_of,
    unit_stride,
    visible_counts,
    width,
)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    options: Options,
    *,
    tile: Tile | None = None,
    tma: bool | None = None,
) -> Tensor:
    """``sigswap::sigmoid_attention``; the arguments are documented there, and valid here. Deterministic.

    tile and tma override the tile configuration and the use of tensor descriptors, for tests and tuning.
    """
    out = reference.empty_output(query, value)
    if out.numel() == 0 or key.shape[2] == 0:
        return out.zero_()
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    batch, heads, q_len, _ = query.shape
    kv_len = key.shape[2]
    band = band_of(options, q_len, kv_len)
    count = None
    if attn_mask is not None and options.visible_bias:
        count = visible_counts(attn_mask, q_len, kv_len, options, band)
    arguments = common_arguments(
        query, key, value, bias, attn_mask, seed, options, count=count, q_len=q_len, kv_len=kv_len, band=band
    )
    plain = is_plain(attn_mask, options)
    tile = tile or tile_for(query, value, q_len, plain, band.has_left or band.has_right)
    if tma is None:
        tma = plain and limits_of(query)[0] >= 90 and query.element_size() == 2 and kv_len >= 512
    tma = tma and tma_fits(query, key, value)
    launch(
        query,
        key,
        value,
        out,
        arguments,
        tile,
        (query.stride()[:3], key.stride()[:3], value.stride()[:3], out.stride()[:3]),
        blocks=triton.cdiv(q_len, tile.rows * tile.subtiles) * batch * heads,
        form=form_of(query, bias, attn_mask, options, kv_len, band),
        tma=tma,
    )
    return out


def tile_for(query: Tensor, value: Tensor, q_len: int, plain: bool, banded: bool) -> Tile:
    """The tile configuration. plain: no mask, no dropout, no softcap, which take registers."""
    capability, shared, _ = limits_of(query)
    size, dim = query.element_size(), max(width(query.shape[-1]), width(value.shape[-1]))
    if size > 2:
        # Products of float32 run on the ordinary units, from registers.
        tile = Tile(64 if dim <= 64 else 32, 32, 1, 8, 1)
    elif not plain:
        tile = Tile(64, 64, 1, 8, 2) if dim <= 128 else Tile(64, 32, 1, 8, 2)
    elif 90 <= capability < 100:
        if dim <= 64:
            # 168 registers: three programs per multiprocessor. Smaller tiles cut a causal triangle more finely.
            tile = Tile(64, 64, 1, 4, 3) if banded and q_len < 8192 else Tile(128, 64, 1, 4, 3, 168)
        elif dim <= 128:
            tile = Tile(64, 64, 1, 4, 3) if banded and q_len < 4096 else Tile(128, 64, 2, 8, 3)
        else:
            tile = Tile(128, 64, 1, 8, 2)
    elif dim <= 64:
        tile = Tile(128, 64, 1, 4, 3)
    else:
        tile = Tile(128, 64 if dim <= 128 else 32, 1, 8, 2)
    row_bytes = width(query.shape[-1]) * size
    key_bytes = (width(query.shape[-1]) + width(value.shape[-1])) * size
    return fit(short_rows(tile, q_len), row_bytes, key_bytes, shared)


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    arguments: dict[str, Any],
    tile: Tile,
    strides: tuple[tuple[int, ...], ...],
    *,
    blocks: int,
    form: int,
    tma: bool,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
) -> None:
    tensors: tuple[Any, ...] = query, key, value
    if tma:
        block_d, block_dv = arguments["BLOCK_D"], arguments["BLOCK_DV"]
        tensors = (
            descriptor(query, tile.rows, block_d),
            descriptor(key, tile.keys, block_d),
            descriptor(value, tile.keys, block_dv),
        )
    names = [f"stride_{tensor}_{dim}" for tensor in "qkvo" for dim in "bhn"]
    _forward_kernel[(blocks,)](
        *tensors,
        out,
        cu_q=cu_q,
        cu_k=cu_k,
        **in_units(names, strides),
        **arguments,
        DROPOUT=arguments["seed"] is not None,
        # Small probabilities would be subnormal in float16; they are held times 1024 there.
        P_SCALE=1024.0 if value.dtype == torch.float16 else 1.0,
        FORM=form,
        TMA=tma,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        SUBTILES=tile.subtiles,
        **tile.launch_options(),
    )


@triton.jit
def _accumulate(
    acc0, acc1, q0, q1, bias0, bias1, row0, begin, end, k, v, stride_k_n, stride_v_n, batch, head, kv_head,
    mask, stride_mask_m, stride_mask_n, seed, heads, q_len, kv_len, shift, left, right, scale, softcap, dropout_p,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr, MASK_ROWS: tl.constexpr,
    BAND_LEFT: tl.constexpr, BAND_RIGHT: tl.constexpr, CHECK: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, P_SCALE: tl.constexpr, FAST: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc += p v over the keys begin ... end. bias0 and bias1 are in units of unit_of(FAST)."""
    rows = (row0 + tl.arange(0, BLOCK_M))[:, None]
    for start in range(begin, end, BLOCK_N):
        cols = (start + tl.arange(0, BLOCK_N))[None, :]
        keys = load_rows(k, batch, kv_head, start, kv_len, stride_k_n, HEAD_DIM, BLOCK_N, BLOCK_D, TMA, CHECK)
        s0 = tl.dot(q0, keys.T, input_precision=PRECISION)
        if SUBTILES == 2:
            s1 = tl.dot(q1, keys.T, input_precision=PRECISION)
        values = load_rows(v, batch, kv_head, start, kv_len, stride_v_n, VALUE_DIM, BLOCK_N, BLOCK_DV, TMA, CHECK)
        p, _ = probabilities(
            s0, bias0[:, None], rows, cols, mask, stride_mask_m, stride_mask_n, q_len, kv_len, shift, left, right,
            scale, softcap, MASK_ROWS, BAND_LEFT, BAND_RIGHT, SOFTCAP, FAST, ASM,
        )  # fmt: skip
        if DROPOUT:
            p = tl.where(kept(seed, batch * heads + head, rows, cols, q_len, kv_len, dropout_p), p, 0.0)
        if P_SCALE != 1.0:
            p *= P_SCALE
        acc0 = tl.dot(p.to(values.dtype), values, acc0, input_precision=PRECISION)
        if SUBTILES == 2:
            p, _ = probabilities(
                s1, bias1[:, None], rows + BLOCK_M, cols, mask, stride_mask_m, stride_mask_n, q_len, kv_len, shift,
                left, right, scale, softcap, MASK_ROWS, BAND_LEFT, BAND_RIGHT, SOFTCAP, FAST, ASM,
            )  # fmt: skip
            if DROPOUT:
                keep = kept(seed, batch * heads + head, rows + BLOCK_M, cols, q_len, kv_len, dropout_p)
                p = tl.where(keep, p, 0.0)
            if P_SCALE != 1.0:
                p *= P_SCALE
            acc1 = tl.dot(p.to(values.dtype), values, acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def _accumulate_all(
    acc0, acc1, q0, q1, bias0, bias1, row0, active, k, v, stride_k_n, stride_v_n, batch, head, kv_head,
    mask, stride_mask_m, stride_mask_n, seed, heads, q_len, kv_len, shift, left, right, scale, softcap, dropout_p,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr, MASK_ROWS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, P_SCALE: tl.constexpr, FAST: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The whole sum (nothing, unless active is 1): blocks on the band's left edge, blocks that all rows see, blocks
    on the right edge."""
    bias0 *= unit_of(FAST)
    bias1 *= unit_of(FAST)
    last_row = tl.minimum(row0 + SUBTILES * BLOCK_M, q_len) - 1
    begin, inner_begin, inner_end, end = keys_of_rows(
        row0, last_row, kv_len, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N, not TMA
    )
    inner_end *= active
    end *= active
    if HAS_LEFT:
        acc0, acc1 = _accumulate(
            acc0, acc1, q0, q1, bias0, bias1, row0, begin, tl.minimum(inner_begin, end), k, v,
            stride_k_n, stride_v_n, batch, head, kv_head, mask, stride_mask_m, stride_mask_n, seed, heads, q_len,
            kv_len, shift, left, right, scale, softcap, dropout_p, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M,
            BLOCK_N, SUBTILES, MASK_ROWS, True, HAS_RIGHT, True, SOFTCAP, DROPOUT, P_SCALE, FAST, ASM, TMA, PRECISION,
        )  # fmt: skip
    acc0, acc1 = _accumulate(
        acc0, acc1, q0, q1, bias0, bias1, row0, inner_begin, inner_end, k, v,
        stride_k_n, stride_v_n, batch, head, kv_head, mask, stride_mask_m, stride_mask_n, seed, heads, q_len,
        kv_len, shift, left, right, scale, softcap, dropout_p, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M,
        BLOCK_N, SUBTILES, MASK_ROWS, False, False, False, SOFTCAP, DROPOUT, P_SCALE, FAST, ASM, TMA, PRECISION,
    )  # fmt: skip
    # Without descriptors the keys' end, where loads need a check, is an edge, too.
    if HAS_RIGHT or not TMA:
        acc0, acc1 = _accumulate(
            acc0, acc1, q0, q1, bias0, bias1, row0, inner_end, end, k, v,
            stride_k_n, stride_v_n, batch, head, kv_head, mask, stride_mask_m, stride_mask_n, seed, heads, q_len,
            kv_len, shift, left, right, scale, softcap, dropout_p, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M,
            BLOCK_N, SUBTILES, MASK_ROWS, HAS_LEFT, HAS_RIGHT, True, SOFTCAP, DROPOUT, P_SCALE, FAST, ASM, TMA,
            PRECISION,
        )  # fmt: skip
    return acc0, acc1


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    q, k, v, out, bias, count, mask, seed, cu_q, cu_k,
    stride_q_b, stride_q_h, stride_q_n, stride_k_b, stride_k_h, stride_k_n,
    stride_v_b, stride_v_h, stride_v_n, stride_o_b, stride_o_h, stride_o_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_count_b, stride_count_h, stride_count_m,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    heads, group, q_len, kv_len, left, right, scale, softcap, const_bias, dropout_p,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr, MASK_ROWS: tl.constexpr,
    BIAS_ROWS: tl.constexpr, VISIBLE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, P_SCALE: tl.constexpr,
    FORM: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program: SUBTILES * BLOCK_M query rows of one head. q, k, v: descriptors if TMA, else addresses.

    With cu_q and cu_k (packed sequences) q_len and kv_len are the longest; each sequence has its own.
    """
    stride_q_b, stride_q_h, stride_q_n = stride_q_b * UNIT, stride_q_h * UNIT, stride_q_n * UNIT
    stride_k_b, stride_k_h, stride_k_n = stride_k_b * UNIT, stride_k_h * UNIT, stride_k_n * UNIT
    stride_v_b, stride_v_h, stride_v_n = stride_v_b * UNIT, stride_v_h * UNIT, stride_v_n * UNIT
    stride_o_b, stride_o_h, stride_o_n = stride_o_b * UNIT, stride_o_h * UNIT, stride_o_n * UNIT
    blocks = tl.cdiv(q_len, SUBTILES * BLOCK_M)
    # Under a causal mask the last rows take longest: they start first.
    row0 = (blocks - 1 - tl.program_id(0) % blocks) * (SUBTILES * BLOCK_M)
    head = (tl.program_id(0) // blocks) % heads
    batch = tl.program_id(0) // blocks // heads
    kv_head = head // group
    batch64, head64, kv_head64 = batch.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)
    if cu_q is not None:
        q_start, k_start = tl.load(cu_q + batch).to(tl.int64), tl.load(cu_k + batch).to(tl.int64)
        q_len = (tl.load(cu_q + batch + 1) - q_start).to(tl.int32)
        kv_len = (tl.load(cu_k + batch + 1) - k_start).to(tl.int32)
        if row0 >= q_len:
            return
        q += q_start * stride_q_n
        k += k_start * stride_k_n
        v += k_start * stride_v_n
        out += q_start * stride_o_n
        if bias is not None:
            bias += q_start * stride_bias_m
    if not TMA:
        q += batch64 * stride_q_b + head64 * stride_q_h
        k += batch64 * stride_k_b + kv_head64 * stride_k_h
        v += batch64 * stride_v_b + kv_head64 * stride_v_h
    out += batch64 * stride_o_b + head64 * stride_o_h
    if bias is not None:
        bias += batch64 * stride_bias_b + head64 * stride_bias_h
        if not BIAS_ROWS:
            const_bias += tl.load(bias).to(tl.float32)
    if count is not None:
        count += batch64 * stride_count_b + head64 * stride_count_h
    if mask is not None:
        mask += batch64 * stride_mask_b + head64 * stride_mask_h
    shift = kv_len - q_len if BOTTOM_RIGHT else 0

    q0 = load_rows(q, batch, head, row0, q_len, stride_q_n, HEAD_DIM, BLOCK_M, BLOCK_D, TMA, True)
    row = row0 + tl.arange(0, BLOCK_M)
    bias0 = row_biases(
        row, bias, stride_bias_m, count, stride_count_m, const_bias, q_len, kv_len, shift, left, right,
        BIAS_ROWS, VISIBLE, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    acc0 = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    q1, bias1, acc1 = q0, bias0, acc0
    if SUBTILES == 2:
        q1 = load_rows(q, batch, head, row0 + BLOCK_M, q_len, stride_q_n, HEAD_DIM, BLOCK_M, BLOCK_D, TMA, True)
        bias1 = row_biases(
            row + BLOCK_M, bias, stride_bias_m, count, stride_count_m, const_bias, q_len, kv_len, shift, left, right,
            BIAS_ROWS, VISIBLE, HAS_LEFT, HAS_RIGHT,
        )  # fmt: skip

    fast = 1
    if FORM == _AUTO:
        fast = (tl.minimum(tl.min(bias0), tl.min(bias1)) >= _FAST_BIAS).to(tl.int32)
    # One of the two has no iterations. As the branches of an if they would not share their shared memory.
    if FORM != _ACCURATE:
        acc0, acc1 = _accumulate_all(
            acc0, acc1, q0, q1, bias0, bias1, row0, fast, k, v, stride_k_n, stride_v_n, batch, head, kv_head,
            mask, stride_mask_m, stride_mask_n, seed, heads, q_len, kv_len, shift, left, right, scale, softcap,
            dropout_p, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SUBTILES, MASK_ROWS, HAS_LEFT,
            HAS_RIGHT, SOFTCAP, DROPOUT, P_SCALE, True, ASM, TMA, PRECISION,
        )  # fmt: skip
    if FORM != _FAST:
        acc0, acc1 = _accumulate_all(
            acc0, acc1, q0, q1, bias0, bias1, row0, 1 - fast if FORM == _AUTO else 1, k, v, stride_k_n, stride_v_n,
            batch, head, kv_head,
            mask, stride_mask_m, stride_mask_n, seed, heads, q_len, kv_len, shift, left, right, scale, softcap,
            dropout_p, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SUBTILES, MASK_ROWS, HAS_LEFT,
            HAS_RIGHT, SOFTCAP, DROPOUT, P_SCALE, False, ASM, TMA, PRECISION,
        )  # fmt: skip

    factor = 1.0 / P_SCALE
    if DROPOUT:
        factor = factor / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    acc0 *= factor
    store_rows(out, acc0, row0, q_len, stride_o_n, VALUE_DIM, BLOCK_M, BLOCK_DV)
    if SUBTILES == 2:
        acc1 *= factor
        store_rows(out, acc1, row0 + BLOCK_M, q_len, stride_o_n, VALUE_DIM, BLOCK_M, BLOCK_DV)
