"""The backward of sigmoid attention in Triton. It recomputes p, and needs neither the output nor a row statistic::

    dP = dO V^T (undone dropout in it);  dS = p (1 - p) dP;  dbias = sum_j dS;  dmask = dS
    dX = dS (1 - tanh^2), if softcap;  dQ = scale dX K;  dK = scale dX^T Q;  dV = p^T dO

Three kernels, each of which owns what it writes: one of dK and dV, by blocks of keys, over the query rows that see
them; one of dQ and dbias, by blocks of rows, over keys; and, where an additive mask wants its gradient, one by tiles
of the mask, over everything that the mask is broadcast to. So there are no atomics: all is deterministic.
"""

from __future__ import annotations

import math
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
    AUTO,
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
    row_bias_tensor,
    row_biases,
    rows_of_keys,
    store_rows,
    strides_of,
    tma_fits,
    unit_of,
    unit_stride,
    visible_counts,
    width,
)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    output_mask: list[bool],
    options: Options,
    *,
    key_tile: Tile | None = None,
    row_tile: Tile | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``sigswap::sigmoid_attention_backward``; the arguments are documented there, and valid here.

    key_tile (of the kernel of dK and dV), row_tile (of dQ's) and tma are for tests and tuning.
    """
    grads = reference.empty_gradients(query, key, value, bias, attn_mask, output_mask)
    grad_query, grad_key, grad_value, grad_bias, grad_mask = grads
    need_query, need_key, need_value, need_bias, need_mask = output_mask
    batch, heads, q_len, _ = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    if grad_out.numel() == 0 or kv_len == 0:
        for grad in grads:
            grad.zero_()
        return grads
    inputs = query, key, value, unit_stride(grad_out)
    query, key, value, grad_out = (unit_stride(tensor) for tensor in inputs)
    band = band_of(options, q_len, kv_len)
    count = None
    if attn_mask is not None and options.visible_bias:
        count = visible_counts(attn_mask, q_len, kv_len, options, band)
    plain = is_plain(attn_mask, options)
    form = form_of(query, bias, attn_mask, options, kv_len, band)
    arguments = common_arguments(
        query, key, value, bias, attn_mask, seed, options, count=count, q_len=q_len, kv_len=kv_len, band=band
    )
    if tma is None:
        tma = plain and limits_of(query)[0] >= 90 and query.element_size() == 2 and min(q_len, kv_len) >= 512
    tma = tma and tma_fits(query, key, value, grad_out)
    tensors = query, key, value, grad_out
    strides = query.stride()[:3], key.stride()[:3], value.stride()[:3], grad_out.stride()[:3]
    common = {"tensors": tensors, "arguments": arguments, "strides": strides, "tma": tma}

    if need_key or need_value:
        tile = key_tile or key_tile_for(query, value, q_len, kv_len, plain)
        new_key = _unit_stride_target(grad_key) if need_key else None
        new_value = _unit_stride_target(grad_value) if need_value else None
        blocks = triton.cdiv(kv_len, tile.keys) * batch * kv_heads
        new = {**common, "arguments": key_arguments(bias, arguments, query.device, form)}
        launch_keys(new_key, new_value, tile=tile, blocks=blocks, form=form, **new)
        _copy_if_other(grad_key, new_key)
        _copy_if_other(grad_value, new_value)
    if need_query or need_bias:
        tile = row_tile or row_tile_for(query, value, q_len, kv_len, plain)
        new_query = _unit_stride_target(grad_query) if need_query else None
        row_sums = query.new_empty((batch, heads, q_len), dtype=torch.float32) if need_bias else None
        blocks = triton.cdiv(q_len, tile.rows) * batch * heads
        launch_rows(new_query, row_sums, tile=tile, blocks=blocks, form=form, **common)
        _copy_if_other(grad_query, new_query)
        if row_sums is not None and bias is not None:
            grad_bias.copy_(row_sums.unsqueeze(-1).sum_to_size(bias.shape))
    if need_mask and attn_mask is not None:
        grad_mask.copy_(_mask_gradient(tensors, attn_mask, arguments, strides))
    return grads


def key_tile_for(query: Tensor, value: Tensor, q_len: int, kv_len: int, plain: bool) -> Tile:
    """The tile of the kernel of dK and dV."""
    capability, shared, _ = limits_of(query)
    size, dim = query.element_size(), max(width(query.shape[-1]), width(value.shape[-1]))
    if size > 2:
        tile = Tile(32, 32, 1, 8, 1)
    elif not plain:
        tile = Tile(32, 64, 1, 8, 2 if dim <= 128 else 1)
    elif 90 <= capability < 100:
        if dim <= 64:
            tile = Tile(128, 64, 1, 4, 3)
        elif dim <= 128:
            tile = Tile(64, 64, 1, 4, 2)
        else:
            tile = Tile(32, 64, 1, 8, 2)
    else:
        tile = Tile(32 if dim > 64 else 64, 64, 1, 4 if dim <= 64 else 8, 2)
    both = (width(query.shape[-1]) + width(value.shape[-1])) * size
    # fit() takes what is loaded in the loop for keys: here, rows.
    turned = fit(tile._replace(rows=tile.keys, keys=tile.rows), both, both, shared)
    return _no_longer_than(turned._replace(rows=turned.keys, keys=turned.rows), q_len, kv_len)


def row_tile_for(query: Tensor, value: Tensor, q_len: int, kv_len: int, plain: bool) -> Tile:
    """The tile of the kernel of dQ."""
    capability, shared, _ = limits_of(query)
    size, dim = query.element_size(), max(width(query.shape[-1]), width(value.shape[-1]))
    if size > 2:
        tile = Tile(32, 32, 1, 8, 1)
    elif not plain:
        tile = Tile(64, 32, 1, 8, 2 if dim <= 128 else 1)
    elif 90 <= capability < 100:
        if dim <= 64:
            tile = Tile(128, 64, 1, 4, 3)
        elif dim <= 128:
            tile = Tile(128, 64, 1, 8, 3)
        else:
            tile = Tile(64, 32, 1, 8, 2)
    else:
        tile = Tile(64, 32 if dim > 64 else 64, 1, 4 if dim <= 64 else 8, 2)
    both = (width(query.shape[-1]) + width(value.shape[-1])) * size
    return _no_longer_than(fit(tile, both, both, shared), q_len, kv_len)


def _no_longer_than(tile: Tile, q_len: int, kv_len: int) -> Tile:
    rows = min(tile.rows, max(16, triton.next_power_of_2(q_len)))
    keys = min(tile.keys, max(16, triton.next_power_of_2(kv_len)))
    smaller = rows * keys <= tile.rows * tile.keys // 2
    return tile._replace(rows=rows, keys=keys, warps=4 if smaller else tile.warps)


def _unit_stride_target(grad: Tensor) -> Tensor:
    """Where a kernel writes a gradient: the gradient itself, unless its last dimension is strided."""
    return grad if grad.stride(-1) == 1 or grad.shape[-1] == 1 else torch.empty(grad.shape, **_like(grad))


def _like(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": tensor.dtype, "device": tensor.device}


def _copy_if_other(grad: Tensor, written: Tensor | None) -> None:
    if written is not None and written is not grad:
        grad.copy_(written)


_STRIDES = tuple(f"stride_{tensor}_{dim}" for tensor in ("q", "k", "v", "do") for dim in "bhn")


def key_arguments(bias: Tensor | None, arguments: dict[str, Any], device: torch.device, form: int) -> dict[str, Any]:
    """The arguments of the kernel of dK and dV: its row bias is a number per head, or a vector of rows.

    Every block of keys would work the rows' biases out again, replicated over its threads: as many logarithms as
    sigmoids. So they come from a tensor, where they differ between rows.
    """
    arguments = dict(arguments)
    row_bias = floor = None
    visible = arguments.pop("VISIBLE")
    banded = arguments["HAS_LEFT"] or arguments["HAS_RIGHT"]
    if arguments["BIAS_ROWS"] or (visible and (banded or arguments["count"] is not None)):
        row_bias = row_bias_tensor(bias, {**arguments, "VISIBLE": visible}, device)
        if form == AUTO:
            floor = row_bias.amin(-1)
        arguments |= {"bias": row_bias, "const_bias": 0.0, "BIAS_ROWS": True}
    elif visible:
        arguments["const_bias"] -= math.log(max(1, arguments["kv_len"]))
    for name in ("count", "stride_count_b", "stride_count_h", "stride_count_m", "stride_bias_m"):
        del arguments[name]
    if row_bias is not None:
        arguments["stride_bias_b"], arguments["stride_bias_h"], _ = strides_of(row_bias, 3)
    stride_b, stride_h = strides_of(floor, 2)
    return {**arguments, "floor": floor, "stride_floor_b": stride_b, "stride_floor_h": stride_h}


def launch_keys(
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    *,
    tensors: tuple[Tensor, ...],
    arguments: dict[str, Any],
    strides: tuple[tuple[int, ...], ...],
    tile: Tile,
    blocks: int,
    form: int,
    tma: bool,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
) -> None:
    outputs = [f"stride_{tensor}_{dim}" for tensor in ("dk", "dv") for dim in "bhn"]
    _keys_kernel[(blocks,)](
        *_operands(tensors, arguments, tma, rows=tile.rows, keys=tile.keys),
        grad_key,
        grad_value,
        cu_q=cu_q,
        cu_k=cu_k,
        **in_units(_STRIDES, strides),
        **dict(zip(outputs, strides_or_zero(grad_key) + strides_or_zero(grad_value), strict=True)),
        **arguments,
        **_backward_options(arguments, tensors, tile, form, tma),
    )


def launch_rows(
    grad_query: Tensor | None,
    row_sums: Tensor | None,
    *,
    tensors: tuple[Tensor, ...],
    arguments: dict[str, Any],
    strides: tuple[tuple[int, ...], ...],
    tile: Tile,
    blocks: int,
    form: int,
    tma: bool,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
) -> None:
    sums = row_sums.stride() if row_sums is not None else (0, 0, 0)
    outputs = ("stride_dq_b", "stride_dq_h", "stride_dq_n", "stride_sum_b", "stride_sum_h", "stride_sum_n")
    _rows_kernel[(blocks,)](
        *_operands(tensors, arguments, tma, rows=tile.rows, keys=tile.keys),
        grad_query,
        row_sums,
        cu_q=cu_q,
        cu_k=cu_k,
        **in_units(_STRIDES, strides),
        **dict(zip(outputs, (*strides_or_zero(grad_query), *sums), strict=True)),
        **arguments,
        **_backward_options(arguments, tensors, tile, form, tma),
    )


def strides_or_zero(tensor: Tensor | None) -> tuple[int, ...]:
    return tuple(tensor.stride()[:3]) if tensor is not None else (0, 0, 0)


def _operands(tensors: tuple[Tensor, ...], arguments: dict[str, Any], tma: bool, *, rows: int, keys: int) -> tuple:
    if not tma:
        return tensors
    query, key, value, grad_out = tensors
    return (
        descriptor(query, rows, arguments["BLOCK_D"]),
        descriptor(key, keys, arguments["BLOCK_D"]),
        descriptor(value, keys, arguments["BLOCK_DV"]),
        descriptor(grad_out, rows, arguments["BLOCK_DV"]),
    )


def _backward_options(
    arguments: dict[str, Any], tensors: tuple[Tensor, ...], tile: Tile, form: int, tma: bool
) -> dict[str, Any]:
    return {
        "DROPOUT": arguments["seed"] is not None,
        "P_SCALE": 1024.0 if tensors[0].dtype == torch.float16 else 1.0,
        "FORM": form,
        "TMA": tma,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        **tile.launch_options(),
    }


def _mask_gradient(
    tensors: tuple[Tensor, ...], attn_mask: Tensor, arguments: dict[str, Any], strides: tuple[tuple[int, ...], ...]
) -> Tensor:
    """dS summed to the mask's shape, in float32. Sums over more than one program are added by torch.sum."""
    query = tensors[0]
    batch, heads, q_len, _ = query.shape
    kv_len = tensors[1].shape[2]
    dim = max(arguments["BLOCK_D"], arguments["BLOCK_DV"])
    block = 64 if query.element_size() == 2 and dim <= 128 else 32
    rows = min(block, max(16, triton.next_power_of_2(q_len)))
    keys = min(block, max(16, triton.next_power_of_2(kv_len)))
    row_blocks, key_blocks = triton.cdiv(q_len, rows), triton.cdiv(kv_len, keys)
    full = batch, heads, q_len, kv_len
    over_batch, over_heads, over_rows, over_keys = (
        of_mask == 1 and size > 1 for of_mask, size in zip(attn_mask.shape, full, strict=True)
    )
    tiles = attn_mask.shape[0] * attn_mask.shape[1]
    tiles *= (1 if over_rows else row_blocks) * (1 if over_keys else key_blocks)
    terms = (batch if over_batch else 1) * (heads if over_heads else 1)
    terms *= (row_blocks if over_rows else 1) * (key_blocks if over_keys else 1)
    splits = min(terms, max(1, 4 * limits_of(query)[2] // tiles))
    partial = query.new_empty((splits, *attn_mask.shape), dtype=torch.float32)
    _mask_kernel[(tiles * splits,)](
        *tensors,
        partial,
        **in_units(_STRIDES, strides),
        **arguments,
        batches=batch,
        terms=terms,
        terms_per_split=triton.cdiv(terms, splits),
        tiles=tiles,
        OVER_BATCH=over_batch,
        OVER_HEADS=over_heads,
        OVER_ROWS=over_rows,
        OVER_KEYS=over_keys,
        DROPOUT=arguments["seed"] is not None,
        BLOCK_M=rows,
        BLOCK_N=keys,
        num_warps=4 if query.element_size() == 2 else 8,
        num_stages=1,
    )
    return partial[0] if splits == 1 else partial.sum(0)


# Device functions. In the kernel of dK and dV tiles of scores are [keys, rows], else [rows, keys].


@triton.jit
def _score_gradients(
    s, dp, row_bias, row, col, mask, stride_mask_m, stride_mask_n, seed, head, q_len, kv_len, shift, left, right,
    scale, softcap, dropout_p,
    MASK_ROWS: tl.constexpr, BAND_LEFT: tl.constexpr, BAND_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, FAST: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """(p after dropout but for its factor 1 / (1 - dropout_p), dS, dX)."""
    p, slope = probabilities(
        s, row_bias, row, col, mask, stride_mask_m, stride_mask_n, q_len, kv_len, shift, left, right, scale, softcap,
        MASK_ROWS, BAND_LEFT, BAND_RIGHT, SOFTCAP, FAST, ASM,
    )  # fmt: skip
    dropped = p
    if DROPOUT:
        keep = kept(seed, head, row, col, q_len, kv_len, dropout_p)
        dropped = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * (1.0 / (1.0 - dropout_p)), 0.0)
    ds = (p - p * p) * dp
    dx = ds
    if SOFTCAP:
        dx = ds * slope
    return dropped, ds, dx


@triton.jit
def _accumulate_keys(
    dk, dv, keys, values, col0, begin, end, q, do, stride_q_n, stride_do_n, bias, batch, head, mask, stride_mask_m,
    stride_mask_n, seed, heads, q_len, kv_len, shift, left, right,
    scale, softcap, const_bias, dropout_p,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr, BIAS_ROWS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, EDGE: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, P_SCALE: tl.constexpr, FAST: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk += dX^T q and dv += p^T dO over the rows begin ... end; EDGE: where the band needs a mask."""
    col = (col0 + tl.arange(0, BLOCK_N))[:, None]
    for start in range(begin, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        rows = load_rows(q, batch, head, start, q_len, stride_q_n, HEAD_DIM, BLOCK_M, BLOCK_D, TMA, EDGE)
        s = tl.dot(keys, rows.T, input_precision=PRECISION)
        grads = load_rows(do, batch, head, start, q_len, stride_do_n, VALUE_DIM, BLOCK_M, BLOCK_DV, TMA, EDGE)
        dp = tl.dot(values, grads.T, input_precision=PRECISION)
        row_bias = tl.zeros((BLOCK_M,), tl.float32) + const_bias * unit_of(FAST)
        if BIAS_ROWS:
            row_bias = tl.load(bias + row.to(tl.int64), mask=row < q_len, other=0.0) * unit_of(FAST)
        p, _, dx = _score_gradients(
            s, dp, row_bias[None, :], row[None, :], col, mask, stride_mask_m, stride_mask_n, seed,
            batch * heads + head, q_len, kv_len, shift, left, right, scale, softcap, dropout_p,
            MASK_ROWS, EDGE and HAS_LEFT, EDGE and HAS_RIGHT, SOFTCAP, DROPOUT, FAST, ASM,
        )  # fmt: skip
        if P_SCALE != 1.0:
            p *= P_SCALE
        dv = tl.dot(p.to(grads.dtype), grads, dv, input_precision=PRECISION)
        dk = tl.dot(dx.to(rows.dtype), rows, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _accumulate_keys_all(
    dk, dv, keys, values, col0, active, q, do, stride_q_n, stride_do_n, bias, batch, head, mask, stride_mask_m,
    stride_mask_n, seed, heads, q_len, kv_len, shift, left, right,
    scale, softcap, const_bias, dropout_p,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr, BIAS_ROWS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, P_SCALE: tl.constexpr, FAST: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Over all rows that see some of the keys (none, unless active is 1): edge, inside, edge."""
    last_col = tl.minimum(col0 + BLOCK_N, kv_len) - 1
    begin, inner_begin, inner_end, end = rows_of_keys(
        col0, last_col, q_len, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, not TMA
    )
    inner_end *= active
    end *= active
    if HAS_RIGHT:
        dk, dv = _accumulate_keys(
            dk, dv, keys, values, col0, begin, tl.minimum(inner_begin, end), q, do, stride_q_n, stride_do_n, bias,
            batch, head, mask, stride_mask_m, stride_mask_n, seed, heads,
            q_len, kv_len, shift, left, right, scale, softcap, const_bias, dropout_p, HEAD_DIM, VALUE_DIM, BLOCK_D,
            BLOCK_DV, BLOCK_M, BLOCK_N, MASK_ROWS, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, True, SOFTCAP, DROPOUT, P_SCALE,
            FAST, ASM, TMA, PRECISION,
        )  # fmt: skip
    dk, dv = _accumulate_keys(
        dk, dv, keys, values, col0, inner_begin, inner_end, q, do, stride_q_n, stride_do_n, bias, batch, head, mask,
        stride_mask_m, stride_mask_n, seed, heads,
        q_len, kv_len, shift, left, right, scale, softcap, const_bias, dropout_p, HEAD_DIM, VALUE_DIM, BLOCK_D,
        BLOCK_DV, BLOCK_M, BLOCK_N, MASK_ROWS, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, False, SOFTCAP, DROPOUT, P_SCALE,
        FAST, ASM, TMA, PRECISION,
    )  # fmt: skip
    if HAS_LEFT or not TMA:
        dk, dv = _accumulate_keys(
            dk, dv, keys, values, col0, inner_end, end, q, do, stride_q_n, stride_do_n, bias, batch, head, mask,
            stride_mask_m, stride_mask_n, seed, heads,
            q_len, kv_len, shift, left, right, scale, softcap, const_bias, dropout_p, HEAD_DIM, VALUE_DIM, BLOCK_D,
            BLOCK_DV, BLOCK_M, BLOCK_N, MASK_ROWS, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, True, SOFTCAP, DROPOUT, P_SCALE,
            FAST, ASM, TMA, PRECISION,
        )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _keys_kernel(
    q, k, v, do, dk_out, dv_out, bias, floor, mask, seed, cu_q, cu_k,
    stride_q_b, stride_q_h, stride_q_n, stride_k_b, stride_k_h, stride_k_n,
    stride_v_b, stride_v_h, stride_v_n, stride_do_b, stride_do_h, stride_do_n,
    stride_dk_b, stride_dk_h, stride_dk_n, stride_dv_b, stride_dv_h, stride_dv_n,
    stride_bias_b, stride_bias_h, stride_floor_b, stride_floor_h,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    heads, group, q_len, kv_len, left, right, scale, softcap, const_bias, dropout_p,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr,
    BIAS_ROWS: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, P_SCALE: tl.constexpr,
    FORM: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of BLOCK_N keys of one key head, over all query heads that use it.

    The row bias is const_bias, plus bias, if it is a number per head; or all in bias, a vector of rows (BIAS_ROWS), of
    which floor has each head's minimum, if FORM is AUTO.
    """
    stride_q_b, stride_q_h, stride_q_n = stride_q_b * UNIT, stride_q_h * UNIT, stride_q_n * UNIT
    stride_k_b, stride_k_h, stride_k_n = stride_k_b * UNIT, stride_k_h * UNIT, stride_k_n * UNIT
    stride_v_b, stride_v_h, stride_v_n = stride_v_b * UNIT, stride_v_h * UNIT, stride_v_n * UNIT
    stride_do_b, stride_do_h, stride_do_n = stride_do_b * UNIT, stride_do_h * UNIT, stride_do_n * UNIT
    blocks = tl.cdiv(kv_len, BLOCK_N)
    # Under a causal mask the first keys take longest, and start first.
    col0 = tl.program_id(0) % blocks * BLOCK_N
    kv_heads = heads // group
    kv_head = (tl.program_id(0) // blocks) % kv_heads
    batch = tl.program_id(0) // blocks // kv_heads
    batch64, kv_head64 = batch.to(tl.int64), kv_head.to(tl.int64)
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
        if bias is not None:
            bias += q_start
    if not TMA:
        k += batch64 * stride_k_b + kv_head64 * stride_k_h
        v += batch64 * stride_v_b + kv_head64 * stride_v_h
    shift = kv_len - q_len if BOTTOM_RIGHT else 0
    keys = load_rows(k, batch, kv_head, col0, kv_len, stride_k_n, HEAD_DIM, BLOCK_N, BLOCK_D, TMA, True)
    values = load_rows(v, batch, kv_head, col0, kv_len, stride_v_n, VALUE_DIM, BLOCK_N, BLOCK_DV, TMA, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)

    for member in range(0, group):
        head = kv_head * group + member
        head64 = head.to(tl.int64)
        q_head, do_head = q, do
        if not TMA:
            q_head += batch64 * stride_q_b + head64 * stride_q_h
            do_head += batch64 * stride_do_b + head64 * stride_do_h
        bias_head, mask_head, head_bias = bias, mask, const_bias
        if bias is not None:
            bias_head += batch64 * stride_bias_b + head64 * stride_bias_h
            if not BIAS_ROWS:
                head_bias += tl.load(bias_head).to(tl.float32)
        if mask is not None:
            mask_head += batch64 * stride_mask_b + head64 * stride_mask_h
        fast = 1
        if FORM == _AUTO:
            lowest = head_bias
            if floor is not None:
                lowest = tl.load(floor + batch64 * stride_floor_b + head64 * stride_floor_h)
            fast = (lowest >= _FAST_BIAS).to(tl.int32)
        if FORM != _ACCURATE:
            dk, dv = _accumulate_keys_all(
                dk, dv, keys, values, col0, fast, q_head, do_head, stride_q_n, stride_do_n, bias_head,
                batch, head, mask_head, stride_mask_m, stride_mask_n,
                seed, heads, q_len, kv_len, shift, left, right, scale, softcap, head_bias, dropout_p, HEAD_DIM,
                VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASK_ROWS, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, SOFTCAP,
                DROPOUT, P_SCALE, True, ASM, TMA, PRECISION,
            )  # fmt: skip
        if FORM != _FAST:
            dk, dv = _accumulate_keys_all(
                dk, dv, keys, values, col0, 1 - fast if FORM == _AUTO else 1, q_head, do_head, stride_q_n,
                stride_do_n, bias_head, batch, head, mask_head,
                stride_mask_m, stride_mask_n, seed, heads, q_len, kv_len, shift, left, right, scale, softcap,
                head_bias, dropout_p, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASK_ROWS, BIAS_ROWS,
                HAS_LEFT, HAS_RIGHT, SOFTCAP, DROPOUT, P_SCALE, False, ASM, TMA, PRECISION,
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
    dq, row_sum, rows, grads, row_bias, row0, begin, end, k, v, stride_k_n, stride_v_n, batch, head, kv_head,
    mask, stride_mask_m, stride_mask_n, seed, heads, q_len, kv_len, shift, left, right, scale, softcap, dropout_p,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr,
    BAND_LEFT: tl.constexpr, BAND_RIGHT: tl.constexpr, CHECK: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, SUM: tl.constexpr, FAST: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq += dX k and row_sum += sum_j dS over the keys begin ... end. row_bias is in units of unit_of(FAST)."""
    row = (row0 + tl.arange(0, BLOCK_M))[:, None]
    for start in range(begin, end, BLOCK_N):
        col = (start + tl.arange(0, BLOCK_N))[None, :]
        keys = load_rows(k, batch, kv_head, start, kv_len, stride_k_n, HEAD_DIM, BLOCK_N, BLOCK_D, TMA, CHECK)
        s = tl.dot(rows, keys.T, input_precision=PRECISION)
        values = load_rows(v, batch, kv_head, start, kv_len, stride_v_n, VALUE_DIM, BLOCK_N, BLOCK_DV, TMA, CHECK)
        dp = tl.dot(grads, values.T, input_precision=PRECISION)
        _, ds, dx = _score_gradients(
            s, dp, row_bias[:, None], row, col, mask, stride_mask_m, stride_mask_n, seed, batch * heads + head,
            q_len, kv_len, shift, left, right, scale, softcap, dropout_p,
            MASK_ROWS, BAND_LEFT, BAND_RIGHT, SOFTCAP, DROPOUT, FAST, ASM,
        )  # fmt: skip
        if SUM:
            row_sum += tl.sum(ds, 1)
        dq = tl.dot(dx.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq, row_sum


@triton.jit
def _accumulate_rows_all(
    dq, row_sum, rows, grads, row_bias, row0, active, k, v, stride_k_n, stride_v_n, batch, head, kv_head,
    mask, stride_mask_m, stride_mask_n, seed, heads, q_len, kv_len, shift, left, right, scale, softcap, dropout_p,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, SUM: tl.constexpr, FAST: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Over all keys that some of the rows see (none, unless active is 1): edge, inside, edge."""
    row_bias *= unit_of(FAST)
    last_row = tl.minimum(row0 + BLOCK_M, q_len) - 1
    begin, inner_begin, inner_end, end = keys_of_rows(
        row0, last_row, kv_len, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N, not TMA
    )
    inner_end *= active
    end *= active
    if HAS_LEFT:
        dq, row_sum = _accumulate_rows(
            dq, row_sum, rows, grads, row_bias, row0, begin, tl.minimum(inner_begin, end), k, v, stride_k_n,
            stride_v_n, batch, head, kv_head, mask, stride_mask_m, stride_mask_n, seed, heads, q_len, kv_len, shift,
            left, right, scale, softcap, dropout_p, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
            MASK_ROWS, True, HAS_RIGHT, True, SOFTCAP, DROPOUT, SUM, FAST, ASM, TMA, PRECISION,
        )  # fmt: skip
    dq, row_sum = _accumulate_rows(
        dq, row_sum, rows, grads, row_bias, row0, inner_begin, inner_end, k, v, stride_k_n,
        stride_v_n, batch, head, kv_head, mask, stride_mask_m, stride_mask_n, seed, heads, q_len, kv_len, shift,
        left, right, scale, softcap, dropout_p, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
        MASK_ROWS, False, False, False, SOFTCAP, DROPOUT, SUM, FAST, ASM, TMA, PRECISION,
    )  # fmt: skip
    if HAS_RIGHT or not TMA:
        dq, row_sum = _accumulate_rows(
            dq, row_sum, rows, grads, row_bias, row0, inner_end, end, k, v, stride_k_n,
            stride_v_n, batch, head, kv_head, mask, stride_mask_m, stride_mask_n, seed, heads, q_len, kv_len, shift,
            left, right, scale, softcap, dropout_p, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
            MASK_ROWS, HAS_LEFT, HAS_RIGHT, True, SOFTCAP, DROPOUT, SUM, FAST, ASM, TMA, PRECISION,
        )  # fmt: skip
    return dq, row_sum


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _rows_kernel(
    q, k, v, do, dq_out, sum_out, bias, count, mask, seed, cu_q, cu_k,
    stride_q_b, stride_q_h, stride_q_n, stride_k_b, stride_k_h, stride_k_n,
    stride_v_b, stride_v_h, stride_v_n, stride_do_b, stride_do_h, stride_do_n,
    stride_dq_b, stride_dq_h, stride_dq_n, stride_sum_b, stride_sum_h, stride_sum_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_count_b, stride_count_h, stride_count_m,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    heads, group, q_len, kv_len, left, right, scale, softcap, const_bias, dropout_p,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr,
    BIAS_ROWS: tl.constexpr, VISIBLE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, P_SCALE: tl.constexpr,
    FORM: tl.constexpr, ASM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program: dQ and the row sums of dS, of BLOCK_M rows of one query head."""
    stride_q_b, stride_q_h, stride_q_n = stride_q_b * UNIT, stride_q_h * UNIT, stride_q_n * UNIT
    stride_k_b, stride_k_h, stride_k_n = stride_k_b * UNIT, stride_k_h * UNIT, stride_k_n * UNIT
    stride_v_b, stride_v_h, stride_v_n = stride_v_b * UNIT, stride_v_h * UNIT, stride_v_n * UNIT
    stride_do_b, stride_do_h, stride_do_n = stride_do_b * UNIT, stride_do_h * UNIT, stride_do_n * UNIT
    blocks = tl.cdiv(q_len, BLOCK_M)
    row0 = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
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
        do += q_start * stride_do_n
        if dq_out is not None:
            dq_out += q_start * stride_dq_n
        if sum_out is not None:
            sum_out += q_start * stride_sum_n
        if bias is not None:
            bias += q_start * stride_bias_m
    if not TMA:
        q += batch64 * stride_q_b + head64 * stride_q_h
        k += batch64 * stride_k_b + kv_head64 * stride_k_h
        v += batch64 * stride_v_b + kv_head64 * stride_v_h
        do += batch64 * stride_do_b + head64 * stride_do_h
    if bias is not None:
        bias += batch64 * stride_bias_b + head64 * stride_bias_h
        if not BIAS_ROWS:
            const_bias += tl.load(bias).to(tl.float32)
    if count is not None:
        count += batch64 * stride_count_b + head64 * stride_count_h
    if mask is not None:
        mask += batch64 * stride_mask_b + head64 * stride_mask_h
    shift = kv_len - q_len if BOTTOM_RIGHT else 0

    rows = load_rows(q, batch, head, row0, q_len, stride_q_n, HEAD_DIM, BLOCK_M, BLOCK_D, TMA, True)
    grads = load_rows(do, batch, head, row0, q_len, stride_do_n, VALUE_DIM, BLOCK_M, BLOCK_DV, TMA, True)
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
    if FORM != _ACCURATE:
        dq, row_sum = _accumulate_rows_all(
            dq, row_sum, rows, grads, row_bias, row0, fast, k, v, stride_k_n, stride_v_n, batch, head, kv_head, mask,
            stride_mask_m, stride_mask_n, seed, heads, q_len, kv_len, shift, left, right, scale, softcap, dropout_p,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASK_ROWS, HAS_LEFT, HAS_RIGHT, SOFTCAP,
            DROPOUT, sum_out is not None, True, ASM, TMA, PRECISION,
        )  # fmt: skip
    if FORM != _FAST:
        dq, row_sum = _accumulate_rows_all(
            dq, row_sum, rows, grads, row_bias, row0, 1 - fast if FORM == _AUTO else 1, k, v, stride_k_n, stride_v_n,
            batch, head, kv_head, mask, stride_mask_m, stride_mask_n, seed, heads, q_len, kv_len, shift, left, right,
            scale, softcap, dropout_p, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASK_ROWS, HAS_LEFT,
            HAS_RIGHT, SOFTCAP, DROPOUT, sum_out is not None, False, ASM, TMA, PRECISION,
        )  # fmt: skip
    if dq_out is not None:
        dq_out += batch64 * stride_dq_b + head64 * stride_dq_h
        store_rows(dq_out, dq * scale, row0, q_len, stride_dq_n, HEAD_DIM, BLOCK_M, BLOCK_D)
    if sum_out is not None:
        sum_out += batch64 * stride_sum_b + head64 * stride_sum_h
        tl.store(sum_out + row.to(tl.int64) * stride_sum_n, row_sum, mask=row < q_len)


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "batches", "terms", "terms_per_split", "tiles"))
def _mask_kernel(
    q, k, v, do, out, bias, count, mask, seed,
    stride_q_b, stride_q_h, stride_q_n, stride_k_b, stride_k_h, stride_k_n,
    stride_v_b, stride_v_h, stride_v_n, stride_do_b, stride_do_h, stride_do_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_count_b, stride_count_h, stride_count_m,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    heads, group, q_len, kv_len, left, right, scale, softcap, const_bias, dropout_p,
    batches, terms, terms_per_split, tiles,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr,
    BIAS_ROWS: tl.constexpr, VISIBLE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    OVER_BATCH: tl.constexpr, OVER_HEADS: tl.constexpr, OVER_ROWS: tl.constexpr, OVER_KEYS: tl.constexpr,
    ASM: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program: one tile of the mask's gradient, summed over a part of what the mask is broadcast to.

    out: float32 [splits, B|1, H|1, M|1, N|1], contiguous.
    """
    stride_q_b, stride_q_h, stride_q_n = stride_q_b * UNIT, stride_q_h * UNIT, stride_q_n * UNIT
    stride_k_b, stride_k_h, stride_k_n = stride_k_b * UNIT, stride_k_h * UNIT, stride_k_n * UNIT
    stride_v_b, stride_v_h, stride_v_n = stride_v_b * UNIT, stride_v_h * UNIT, stride_v_n * UNIT
    stride_do_b, stride_do_h, stride_do_n = stride_do_b * UNIT, stride_do_h * UNIT, stride_do_n * UNIT
    row_blocks = tl.cdiv(q_len, BLOCK_M)
    key_blocks = tl.cdiv(kv_len, BLOCK_N)
    split = tl.program_id(0) // tiles
    at = tl.program_id(0) % tiles
    key_block, row_block, own_head, own_batch = 0, 0, 0, 0
    mask_keys, mask_rows, mask_heads, mask_batches = 1, 1, 1, 1
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
    if not OVER_BATCH:
        own_batch = at
        mask_batches = batches
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
            batch = rest
        batch64, head64 = tl.cast(batch, tl.int64), tl.cast(head, tl.int64)
        kv_head64 = head64 // group
        row0, col0 = line_block * BLOCK_M, column_block * BLOCK_N
        rows = load_rows(
            q + batch64 * stride_q_b + head64 * stride_q_h, 0, 0, row0, q_len, stride_q_n, HEAD_DIM, BLOCK_M,
            BLOCK_D, False, True,
        )  # fmt: skip
        keys = load_rows(
            k + batch64 * stride_k_b + kv_head64 * stride_k_h, 0, 0, col0, kv_len, stride_k_n, HEAD_DIM, BLOCK_N,
            BLOCK_D, False, True,
        )  # fmt: skip
        s = tl.dot(rows, keys.T, input_precision=PRECISION)
        grads = load_rows(
            do + batch64 * stride_do_b + head64 * stride_do_h, 0, 0, row0, q_len, stride_do_n, VALUE_DIM, BLOCK_M,
            BLOCK_DV, False, True,
        )  # fmt: skip
        values = load_rows(
            v + batch64 * stride_v_b + kv_head64 * stride_v_h, 0, 0, col0, kv_len, stride_v_n, VALUE_DIM, BLOCK_N,
            BLOCK_DV, False, True,
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
            count_head += batch64 * stride_count_b + head64 * stride_count_h
        row_bias = row_biases(
            row, bias_head, stride_bias_m, count_head, stride_count_m, term_bias, q_len, kv_len, shift, left, right,
            BIAS_ROWS, VISIBLE, HAS_LEFT, HAS_RIGHT,
        ) * unit_of(False)  # fmt: skip
        _, ds, _ = _score_gradients(
            s, dp, row_bias[:, None], row[:, None], col[None, :],
            mask + batch64 * stride_mask_b + head64 * stride_mask_h, stride_mask_m, stride_mask_n, seed,
            batch64 * heads + head64, q_len, kv_len, shift, left, right, scale, softcap, dropout_p,
            MASK_ROWS, HAS_LEFT, HAS_RIGHT, SOFTCAP, DROPOUT, False, ASM,
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
