"""The backward of sigmoid attention in Triton. It recomputes p, and needs neither the output nor a row statistic::

    dP = dO V^T (undone dropout in it);  dS = p (1 - p) dP;  dbias = sum_j dS;  dmask = dS
    dX = dS (1 - tanh^2), if softcap;  dQ = scale dX K;  dK = scale dX^T Q;  dV = p^T dO

Below a row cap dO is the gradient of the sums that the cap divides, and a number per row, delta, is subtracted from dP
(:mod:`sigswap.kernels.triton.row_caps`).

Three kernels, each of which owns what it writes: one of dK and dV, by blocks of keys, over the query rows that see
them; one of dQ and dbias, by blocks of rows, over keys; and, where an additive mask wants its gradient, one by tiles
of the mask, over everything that the mask is broadcast to. So there are no atomics: all is deterministic.

These are nine matrix products, and each kernel loads the mask. On Hopper GPUs the first adds dS to float32 sums of the
mask's gradient, and for heads of up to 64 columns dQ to sums of its own: seven products in two kernels, or five in one
(:mod:`sigswap.kernels.triton.tile_sums`). What several programs add to is then added up in no fixed order, which
``torch.use_deterministic_algorithms`` avoids.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sigswap.kernels.host.forms import FAST
from sigswap.kernels.host.launch import Described, Launch, by_rows, describable
from sigswap.kernels.host.layout import Layout, contiguous_layout, layout_of
from sigswap.kernels.host.problem import MAX_PLANS, Gradients, Problem, Signature, output_arguments
from sigswap.kernels.host.results import (
    Backward,
    gradient_arguments,
    gradients_for,
    hand_over,
    layouts_in_place,
    maker_of,
)
from sigswap.kernels.host.tiles import Tile, fit, limits_of
from sigswap.kernels.triton.backward_kernels import keys_kernel, mask_kernel, rows_kernel
from sigswap.kernels.triton.common import mask_unit
from sigswap.kernels.triton.dropout import Draws, draws_for
from sigswap.kernels.triton.row_biases import Counts, RowBiases, counts_for, row_biases_for
from sigswap.kernels.triton.sums import Sum
from sigswap.kernels.triton.tile_sums import (
    MaskSums,
    QuerySums,
    are_by_tiles,
    is_alone,
    mask_sums_for,
    query_sums_for,
)


def supports(problem: Problem) -> bool:
    return problem.signature.too_much() is None


def backward(
    problem: Problem,
    *,
    key_tile: Tile | None = None,
    row_tile: Tile | None = None,
    tma: bool | None = None,
    passes: int | None = None,
) -> Gradients:
    """Deterministic, if passes_for() is 3, or each number of the mask is one score's.

    key_tile (of the kernel of dK and dV), row_tile (of dQ's), tma and passes (how often scores are computed where a
    mask has rows, once to three times) are for tests and tuning.
    """
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
    delta = problem.row_delta
    of_delta = None if delta is None else layout_of(delta)
    passes = passes or passes_for(problem)
    tuning = key_tile, row_tile, tma, passes
    plan = _plan(problem.signature, layout_of(grad_out), of_delta, layouts, *tuning)

    count = None if attn_mask is None or plan.counts is None else plan.counts(attn_mask)
    row_sums = None
    if plan.sum_rows is not None:
        row_sums = plan.sum_rows.empty_parts() if plan.query_sums is None else plan.sum_rows.zero_parts()
    mask_sums = None if plan.mask_sums is None else plan.mask_sums.empty(query.device)
    query_sums = None if plan.query_sums is None else plan.query_sums.empty(query.device)
    if plan.keys is not None:
        row_bias, floor = bias, None
        if plan.row_biases is not None:
            row_bias, floor = plan.row_biases(problem, count)
        draws = None if plan.draws is None or seed is None else plan.draws(seed, problem.cu_seqlens[0])
        of_rows = (None if plan.query_sums else new_query, row_sums) if plan.rows is None else (None, None)
        outputs = new_key, new_value, *of_rows, mask_sums, query_sums
        sides = row_bias, floor, attn_mask, draws
        plan.keys(query, key, value, grad_out, delta, *outputs, *sides, *problem.cu_seqlens)
    if plan.rows is not None:
        own = bias, count, attn_mask, seed
        plan.rows(query, key, value, grad_out, delta, new_query, row_sums, *own, *problem.cu_seqlens)
    if plan.mask_sums is not None:
        plan.mask_sums.finish(mask_sums, new_mask)
    if plan.query_sums is not None:
        plan.query_sums.finish(query_sums, new_query)
    if plan.sum_rows is not None and row_sums is not None and new_bias is not None:
        plan.sum_rows(row_sums, new_bias)
    if plan.mask is not None and plan.sum_mask is not None and new_mask is not None:
        partial = plan.sum_mask.empty_parts()
        plan.mask(query, key, value, grad_out, delta, partial, bias, count, attn_mask, seed)
        plan.sum_mask(partial, new_mask)
    hand_over(grads, written)
    return grads


def backward_again(problem: Problem) -> Backward | None:
    """See :func:`sigswap.kernels.dispatch.backward_again`. None: kernels cannot read or write where the tensors are."""
    signature, grad_out, layouts = problem.signature, problem.grad_out, layouts_in_place(problem)
    if grad_out is None or layouts is None:
        return None
    plan = _plan(signature, layout_of(grad_out), None, layouts, None, None, None, 3)
    keys, rows, row_biases, options, none = plan.keys, plan.rows, plan.row_biases, problem.options, (None,) * 4
    makers = [None if layout is None else maker_of(layout, signature.device) for layout in layouts[:3]]

    def run(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Gradients:
        new_query, new_key, new_value = [None if make is None else make() for make in makers]
        if keys is not None:
            of_rows = new_query if rows is None else None
            biases: tuple[Tensor | None, Tensor | None] = None, None
            if row_biases is not None:
                biases = row_biases(Problem(query, key, value, None, None, None, options), None)
            keys(query, key, value, grad_out, None, new_key, new_value, of_rows, None, None, None, *biases, *none)
        if rows is not None:
            rows(query, key, value, grad_out, None, new_query, None, None, None, *none)
        return new_query, new_key, new_value, None, None

    return run


# Plans.


class _Plan(NamedTuple):
    """The launches of a backward, in their order; None: not needed."""

    counts: Counts | None
    row_biases: RowBiases | None
    """For keys alone: every block of keys would work the rows' biases out again, replicated over its threads, which
    are as many logarithms as sigmoids. So they come from a tensor, where they differ between rows."""
    draws: Draws | None
    """For keys alone, too."""
    keys: Launch | None
    """dK and dV, and if rows is None dQ and the row sums of dS, too."""
    rows: Launch | None
    """dQ and the row sums of dS."""
    sum_rows: Sum | None
    mask: Launch | None
    sum_mask: Sum | None
    mask_sums: MaskSums | None
    query_sums: QuerySums | None


@functools.lru_cache(MAX_PLANS)
def _plan(
    signature: Signature,
    grad_out: Layout,
    delta: Layout | None,
    grads: tuple[Layout | None, ...],
    key_tile: Tile | None,
    row_tile: Tile | None,
    tma: bool | None,
    passes: int,
) -> _Plan:
    """grads: of query, key, value, bias and attn_mask; None: not needed."""
    grad_query, grad_key, grad_value, grad_bias, grad_mask = grads
    keys = rows = row_biases = draws = sum_rows = mask = sum_mask = mask_sums = query_sums = None
    sums = grad_bias is not None
    need_rows, need_keys = grad_query is not None or sums, grad_key is not None or grad_value is not None
    tile = key_tile or key_tile_for(signature)
    if passes < 3 and grad_mask is not None and are_by_tiles(signature):
        mask_sums = mask_sums_for(signature, grad_mask, tile)
        need_keys = True
    if passes == 1 and signature.masked_by_rows and grad_query is not None:
        query_sums = query_sums_for(signature, grad_query, tile)
        need_keys = True
    together = query_sums is not None or (need_keys and _together(signature, key_tile))
    if need_keys:
        row_biases, draws = row_biases_for(signature), draws_for(signature)
        rows_too = (grad_query, sums) if together else (None, False)
        to_add = mask_sums, query_sums
        keys = _walk_rows_of_keys(
            signature,
            grad_out,
            delta,
            grad_key,
            grad_value,
            *rows_too,
            *to_add,
            row_biases,
            draws,
            tile,
            tma,
        )
    if need_rows and not together:
        rows = _walk_keys_of_rows(signature, grad_out, delta, grad_query, sums, row_tile, tma)
    if grad_bias is not None:
        sum_rows = Sum(grad_bias, (*signature.query.shape[:3], 1), signature.device)
    if grad_mask is not None and mask_sums is None:
        parts, mask = _mask_launch(signature, grad_out, delta)
        sum_mask = Sum(grad_mask, parts, signature.device)
    return _Plan(
        counts_for(signature, mask_unit(signature)),
        row_biases,
        draws,
        keys,
        rows,
        sum_rows,
        mask,
        sum_mask,
        mask_sums,
        query_sums,
    )


def _together(signature: Signature, tile: Tile | None) -> bool:
    """Whether the kernel of dK and dV works out dQ and dbias, too: where one block has all keys, and there are so few
    rows that one program per head is enough."""
    if signature.packed is not None or not signature.plain:
        return False
    return signature.q_len <= 512 and signature.kv_len <= (tile or key_tile_for(signature)).keys


def _stores_whole_units(signature: Signature) -> bool:
    """Whether gradients are stored 16 bytes at once. On an H200, head_dim 64, TFLOP/s without and with: 75 and 86 at 50
    tokens, 149 and 162 at 197; 405 and 389 at 577, where stores are few and registers are spilled."""
    return max(signature.q_len, signature.kv_len) <= 256


def _walk_rows_of_keys(
    signature: Signature,
    grad_out: Layout,
    delta: Layout | None,
    grad_key: Layout | None,
    grad_value: Layout | None,
    grad_query: Layout | None,
    sums: bool,
    mask_sums: MaskSums | None,
    query_sums: QuerySums | None,
    row_biases: RowBiases | None,
    draws: Draws | None,
    tile: Tile,
    tma: bool | None,
) -> Launch:
    """grad_query and sums: of what is worked out together with dK and dV."""
    query, key, value = signature.query, signature.key, signature.value
    if query_sums is not None:
        grad_query = None
    if tma is None:
        pays = signature.options.dropout_p == 0.0  # otherwise 0.46 ms without and 0.49 with them, at head_dim 64
        adds = mask_sums is not None or query_sums is not None
        tma = pays and signature.tma(min(signature.q_len, signature.kv_len), masked=adds)
    described: tuple[Described, ...] | None = None
    if tma and describable(query) and describable(grad_out):
        described = by_rows(query, tile.rows), by_rows(grad_out, tile.rows)
    arguments = signature.arguments(q=query, k=key, v=value, do=grad_out)
    words = None if draws is None else draws.layout
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
    arguments |= gradient_arguments(
        arguments, {"dk": grad_key, "dv": grad_value, "dq": grad_query}, in_units=_stores_whole_units(signature)
    )
    arguments |= output_arguments(arguments, sum=row_sums, delta=delta)
    arguments |= _loop_arguments(tile, described) | {"MASK_UNIT": mask_unit(signature)}
    arguments |= {"ALONE": False, "ORDER": 0, "stride_sums_b": 0, "stride_sums_h": 0}
    arguments |= {} if mask_sums is None else mask_sums.arguments()
    arguments |= {"ADD": query_sums is not None, "WARPS": tile.launch_options()["num_warps"]}
    arguments["draw_rows"] = 0 if words is None else words.shape[1]
    arguments["BIAS_ROWS"] = row_biases is not None
    arguments["VISIBLE"] = signature.options.visible_bias and row_biases is None
    floors = floor.strides_or_zero(2) if floor is not None else (0, 0)
    arguments["stride_floor_b"], arguments["stride_floor_h"] = floors
    walked = described or (query, grad_out)
    added = None if mask_sums is None else mask_sums.layout, None if query_sums is None else query_sums.layout
    operands = walked[0], key, value, walked[1], delta, grad_key, grad_value, grad_query, row_sums, *added
    tensors = (*operands, bias, floor, signature.attn_mask, words, *signature.cu_layouts())
    blocks = triton.cdiv(signature.kv_len, tile.keys) * signature.batch * signature.kv_heads
    return Launch(keys_kernel, blocks, signature.device, tensors, arguments, **tile.launch_options())


def _walk_keys_of_rows(
    signature: Signature,
    grad_out: Layout,
    delta: Layout | None,
    grad_query: Layout | None,
    sums: bool,
    tile: Tile | None,
    tma: bool | None,
) -> Launch:
    query, key, value = signature.query, signature.key, signature.value
    tile = tile or row_tile_for(signature)
    if tma is None:
        tma = signature.tma(min(signature.q_len, signature.kv_len))
    described = None
    if tma and describable(key) and describable(value):
        described = by_rows(key, tile.keys), by_rows(value, tile.keys)
    row_sums = contiguous_layout(query.shape[:3], torch.float32) if sums else None
    arguments = signature.arguments(q=query, k=key, v=value, do=grad_out)
    arguments |= gradient_arguments(arguments, {"dq": grad_query}, in_units=_stores_whole_units(signature))
    arguments |= output_arguments(arguments, sum=row_sums, delta=delta)
    arguments |= _loop_arguments(tile, described) | {"MASK_UNIT": mask_unit(signature)}
    outputs = delta, grad_query, row_sums
    keys = described or (key, value)
    tensors = (query, *keys, grad_out, *outputs, *signature.side_layouts(), *signature.cu_layouts())
    blocks = triton.cdiv(signature.q_len, tile.rows) * signature.batch * signature.heads
    return Launch(rows_kernel, blocks, signature.device, tensors, arguments, **tile.launch_options())


def _loop_arguments(tile: Tile, described: tuple[Described, ...] | None) -> dict[str, int | bool]:
    return {"TMA": described is not None, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys}


def _mask_launch(signature: Signature, grad_out: Layout, delta: Layout | None) -> tuple[tuple[int, ...], Launch]:
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
    arguments = signature.arguments(q=query, k=key, v=value, do=grad_out)
    arguments |= output_arguments(arguments, delta=delta) | {
        "terms": terms,
        "terms_per_split": triton.cdiv(terms, splits),
        "tiles": tiles,
        "OVER_BATCH": over_batch,
        "OVER_HEADS": over_heads,
        "OVER_ROWS": over_rows,
        "OVER_KEYS": over_keys,
        "BLOCK_M": rows,
        "BLOCK_N": keys,
        "MASK_UNIT": mask_unit(signature),
    }
    tensors = (query, key, value, grad_out, delta, out, *signature.side_layouts())
    warps = min(4 if signature.element_size == 2 else 8, rows * keys // 64)  # as in Tile.launch_options()
    stages = 2 if signature.element_size == 2 and max(signature.widths) <= 64 else 1
    return out.shape, Launch(
        mask_kernel, tiles * splits, signature.device, tensors, arguments, num_warps=warps, num_stages=stages
    )


def passes_for(problem: Problem) -> int:
    """How often scores are computed where a mask has rows: by one kernel, which adds to sums of dQ and of the mask's
    gradient; by two, of which the first adds to the latter; or by three that add to nothing.

    Milliseconds on an H200 with a mask [1, H, N, N], bfloat16, heads of 64, by one, two and three: 8 x 1,024 tokens and
    16 heads 0.58, 0.63, 0.80; 16 x 512 and 12 heads 0.24, 0.27, 0.34; 64 x 197 and 12 heads 0.31, 0.34, 0.38."""
    signature = problem.signature
    if not signature.masked_by_rows or signature.element_size != 2:
        return 3
    if not 90 <= limits_of(signature.device).capability < 100:
        return 3
    if torch.are_deterministic_algorithms_enabled():
        return 2 if is_alone(signature) else 3
    return 1 if max(signature.widths) <= 64 else 2  # wider ones have no registers left for dQ


# Tile configurations.


def key_tile_for(signature: Signature) -> Tile:
    """The tile of the kernel of dK and dV."""
    capability, shared, _ = limits_of(signature.device)
    size, dim, band = signature.element_size, max(signature.widths), signature.band()
    banded = band.has_left or band.has_right
    if size > 2:
        tile = Tile(64 if dim <= 64 else 32, 32, 4, 2) if dim <= 128 else Tile(32, 32, 8, 1)
    elif signature.masked_by_rows and dim <= 128 and 90 <= capability < 100:
        tile = Tile(64, 64, 4, 2)
    elif not signature.plain and not signature.masked_by_rows and 90 <= capability < 100:
        # As measured on an H200, with dropout at 64 and a soft cap at 128 and 256.
        tile = Tile(64, 64, 4, 3 if dim <= 64 else 2) if dim <= 128 else Tile(32, 32, 4, 2)
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
        tile = Tile(64 if dim <= 64 else 32, 32, 4, 2) if dim <= 128 else Tile(32, 32, 8, 1)
    elif signature.masked_by_rows and dim <= 128 and 90 <= capability < 100:
        tile = Tile(64, 64, 4, 3 if dim <= 64 and not banded else 2)
    elif not signature.plain and not signature.masked_by_rows and 90 <= capability < 100:
        tile = Tile(64, 64, 4, 2) if dim <= 128 else Tile(128, 32, 8, 2)
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
