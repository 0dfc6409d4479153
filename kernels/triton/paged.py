"""Rows of packed sequences against keys and values in pages of a cache, in Triton, split over the keys.

One program reads a part of the keys of one key head, once, for a tile of the rows of one sequence: some rows, and all
query heads that use the key head. Where the keys are split, programs write partial outputs, which a second kernel adds
(:mod:`sigswap.kernels.triton.split_keys`). How many programs there are depends on what the host knows: the number of
sequences and of rows, and the longest sequence. Either each sequence has as many tiles as that one, or, where this
would be more of them, a program finds its sequence by itself, and some find none. So calls that differ in numbers on
the GPU alone are the same launches, which CUDA graphs capture.

A tile of keys lies in one page, if pages are whole tiles, whose number is read once. Else the page of each key is.
Whatever the numbers are, nothing outside of the tensors is read or written.

Heads of latent attention are held in two parts (:mod:`sigswap.kernels.triton.wide_heads`). Their value is a view of
key, so that a tile of keys is loaded once, and is a tile of values as well.

Decoding is bound by memory: K and V are read once. So the sigmoid is always the accurate form.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sigswap.kernels.host.launch import Launch
from sigswap.kernels.host.layout import Layout, contiguous_layout, layout_of
from sigswap.kernels.host.problem import MAX_HEAD_DIM, MAX_PLANS, WIDEST_HEAD_DIM, WIDEST_VALUE_DIM, Problem, Signature
from sigswap.kernels.host.results import empty_output
from sigswap.kernels.host.tiles import Tile, fit, limits_of
from sigswap.kernels.triton.common import (
    _ACCURATE,
    UNSPECIALIZED,
    elements,
    is_edge,
    keys_of_rows,
    probabilities,
    row_biases,
    sequence,
    single,
    unit_of,
)
from sigswap.kernels.triton.pages import band_of_longest, load_paged, pages_of, places_for
from sigswap.kernels.triton.split_keys import AT_ONCE, MIN_KEYS, Parts, parts_of, splits_for
from sigswap.kernels.triton.wide_heads import main_and_rest, programs_at_once, shares_memory, tile_for

MOST_ROWS = 64
"""Of a tile: rows times query heads per key head."""


_SEQUENCES_AT_ONCE = tl.constexpr(256)
"""That a program looks at, to find its own."""


def supports(problem: Problem) -> bool:
    return problem.pages is not None and (problem.signature.too_much() is None or _is_latent(problem))


def forward(problem: Problem, *, splits: int | None = None) -> Tensor:
    """Deterministic. splits: over how many programs the keys are split."""
    pages = problem.pages
    assert pages is not None
    out = empty_output(problem.query, problem.value) if problem.out is None else problem.out
    signature = problem.signature
    if signature.is_empty or signature.key.shape[0] == 0 or pages.table.numel() == 0:
        return out.zero_()
    problem = problem.readable()
    query, key, value, bias, _ = problem.inputs
    # A generated token makes no new plan: for how many keys there are at most, it need not be exact.
    longest_k = -(-pages.longest_k // MIN_KEYS) * MIN_KEYS
    layouts = layout_of(out), layout_of(pages.table), layout_of(pages.cu_q)
    plan = _plan(problem.signature, *layouts, pages.longest_q, longest_k, splits)
    partial, partial_sums = plan.parts.empty(out, None)
    plan.launch(query, key, value, partial, partial_sums, bias, pages.table, pages.lengths, pages.cu_q)
    plan.parts.sum(partial, partial_sums, out, None)
    return out


def _is_latent(problem: Problem) -> bool:
    """Whether heads are wide, in half precision, and value is a view of key's first channels."""
    signature = problem.signature
    if signature.element_size != 2 or signature.key.shape[3] > WIDEST_HEAD_DIM or not shares_memory(problem):
        return False
    return signature.value.shape[3] <= WIDEST_VALUE_DIM and tile_for(signature, MOST_ROWS, shared=True) is not None


class _Plan(NamedTuple):
    launch: Launch
    parts: Parts


@functools.lru_cache(MAX_PLANS)
def _plan(
    signature: Signature, out: Layout, table: Layout, cu_q: Layout, longest_q: int, longest_k: int, splits: int | None
) -> _Plan:
    kv_heads, page_size, device = signature.kv_heads, signature.key.shape[2], signature.device
    group = signature.heads // kv_heads
    most_keys = table.shape[1] * page_size
    band, longest_k = band_of_longest(signature, longest_q, longest_k, most_keys)
    latent = signature.key.shape[3] > MAX_HEAD_DIM
    tile = _latent_tile(signature, group * longest_q) if latent else _tile(signature, group * longest_q, longest_k)
    sequences = table.shape[0]
    places = places_for(signature, sequences, longest_q, tile.rows)
    programs = places.total * kv_heads
    if splits is None:
        most = programs_at_once(signature, tile, shared=True) if latent else AT_ONCE * limits_of(device).multiprocessors
        splits = splits_for(programs, longest_k, most)
    parts = parts_of(signature, out, splits, sums=False)
    arguments = signature.arguments(q=signature.query, k=signature.key, v=signature.value, o=parts.target)
    arguments |= band | {"q_len": longest_q, "pages": signature.key.shape[0], "PAGE": page_size, "most_keys": most_keys}
    arguments |= parts.arguments | {"sequences": sequences, "tiles": places.of_longest, "ALIKE": places.alike}
    arguments |= {"stride_table": table.strides[0], "BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
    main, rest = main_and_rest(signature.key.shape[3]) if latent else (signature.widths[0], 0)
    arguments |= {"MAIN": main, "REST": rest, "SHARED": latent}
    # Whether the lengths are aligned does not matter: no thread loads two of them at once.
    numbers = table, contiguous_layout((sequences,)), cu_q
    written = parts.target, parts.target_sums
    tensors = (signature.query, signature.key, signature.value, *written, signature.bias, *numbers)
    launch = Launch(_paged_kernel, programs * splits, device, tensors, arguments, **tile.launch_options())
    return _Plan(launch, parts)


def _latent_tile(signature: Signature, rows: int) -> Tile:
    tile = tile_for(signature, rows, shared=True)
    assert tile is not None, "supports() says no"
    return tile


def _tile(signature: Signature, rows: int, keys: int) -> Tile:
    """For as many rows and keys at most."""
    dim, size = max(signature.widths), signature.element_size
    block_m = min(MOST_ROWS, max(16, triton.next_power_of_2(rows)))
    block_n = max(16, min(128, 16384 // (dim * size), triton.next_power_of_2(keys)))
    tile = Tile(block_m, block_n, 4 if dim <= 128 or block_m < 64 else 8, 3 if dim <= 128 else 2)
    widths = signature.widths
    return fit(tile, widths[0] * size, sum(widths) * size, limits_of(signature.device).shared)


@triton.jit
def _tile_of(place, cu_q, sequences, total_q, group, BLOCK_M: tl.constexpr):
    """(sequence, number of its tile) at a place in the tiles of all. If ends do not rise, some sequence and tile.

    The tiles of sequence b begin at place ``cu_q[b] * group // BLOCK_M + b``, which leaves it as many as it needs.
    """
    before = 0
    for start in range(0, sequences, _SEQUENCES_AT_ONCE):
        index = start + tl.arange(0, _SEQUENCES_AT_ONCE)
        rows = tl.load(cu_q + index, mask=index < sequences, other=0).to(tl.int64)
        first = tl.minimum(tl.maximum(rows, 0), total_q) * group // BLOCK_M + index
        before += tl.sum(((first <= place) & (index < sequences)).to(tl.int32))
    batch = tl.maximum(before - 1, 0)
    rows = tl.minimum(tl.maximum(tl.load(cu_q + batch).to(tl.int64), 0), total_q)
    number = place - (rows * group // BLOCK_M + batch)
    return batch, tl.minimum(tl.maximum(number, 0), place).to(tl.int32)


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "pages", "most_keys", "stride_table", "sequences"))
def _paged_kernel(
    q, k, v, out, sum_out, bias, table, lengths, cu_q, stride_split,
    stride_q_b, stride_q_h, stride_q_n, stride_k_b, stride_k_h, stride_k_n,
    stride_v_b, stride_v_h, stride_v_n, stride_o_b, stride_o_h, stride_o_n,
    stride_bias_h, stride_bias_m, stride_table, pages, most_keys,
    heads, group, q_len, total_q, left, right, scale, softcap, const_bias, row_cap, sequences, tiles, splits,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHARED: tl.constexpr, PAGE: tl.constexpr, VISIBLE: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, CAP: tl.constexpr, P_SCALE: tl.constexpr,
    ASM: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """One program: one part of the keys, for BLOCK_M of the rows of one sequence times the query heads of one key head.

    k and v are [pages, Hk, PAGE, DIM]: stride_k_b is that between pages. MAIN, REST: the widths of the parts of
    HEAD_DIM. SHARED: values are the first part of keys. sum_out, if given: the rows' sums of p, contiguous. CAP: rows
    are divided here, for there is one part. ALIKE: each sequence has as many tiles.
    """
    scale, softcap, const_bias = single(scale), single(softcap), single(const_bias)
    stride_q_b, stride_q_h, stride_q_n = elements(stride_q_b, stride_q_h, stride_q_n, UNIT, WIDE)
    stride_k_b, stride_k_h, stride_k_n = elements(stride_k_b, stride_k_h, stride_k_n, UNIT, WIDE)
    stride_v_b, stride_v_h, stride_v_n = elements(stride_v_b, stride_v_h, stride_v_n, UNIT, WIDE)
    stride_o_b, stride_o_h, stride_o_n = elements(stride_o_b, stride_o_h, stride_o_n, UNIT, WIDE)
    kv_heads = heads // group
    kv_head = tl.program_id(0) % kv_heads
    split = tl.program_id(0) // kv_heads % splits
    at = tl.program_id(0) // kv_heads // splits
    if ALIKE:
        batch, number = at // tiles, at % tiles
    else:
        batch, number = _tile_of(at, cu_q, sequences, total_q, group, BLOCK_M)
    q_start, q_len = sequence(cu_q, batch, q_len, total_q)
    first = number * BLOCK_M
    kv_len = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), most_keys)
    shift = kv_len - q_len
    index = first + tl.arange(0, BLOCK_M)
    row = index // group
    head = (kv_head * group + index % group).to(tl.int64)
    first_row, last_row = first // group, tl.minimum((first + BLOCK_M - 1) // group, q_len - 1)

    MAIN_DIM: tl.constexpr = HEAD_DIM if HEAD_DIM < MAIN else MAIN
    dim = tl.arange(0, MAIN)
    pointers = q + head * stride_q_h + (q_start + row) * stride_q_n
    there = (row < q_len)[:, None]
    rows = tl.load(pointers[:, None] + dim[None, :], mask=there & (dim < MAIN_DIM)[None, :], other=0.0)
    if REST > 0:
        dim = MAIN + tl.arange(0, REST)
        rows_rest = tl.load(pointers[:, None] + dim[None, :], mask=there & (dim < HEAD_DIM)[None, :], other=0.0)
    if bias is not None:
        bias += head * stride_bias_h + q_start * stride_bias_m
    row_bias = row_biases(
        row, bias, stride_bias_m, None, 0, const_bias, q_len, kv_len, shift, left, right,
        bias is not None, VISIBLE, HAS_LEFT, HAS_RIGHT,
    ) * unit_of(_ACCURATE)  # fmt: skip
    k += kv_head.to(tl.int64) * stride_k_h
    v += kv_head.to(tl.int64) * stride_v_h
    table += batch.to(tl.int64) * stride_table

    begin, end = keys_of_rows(first_row, last_row, kv_len, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
    # Not a return: a kernel that may end before its loop gets up to twice the registers.
    end = tl.where(first < group * q_len, end, 0)
    part = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), splits), BLOCK_N) * BLOCK_N
    begin += split * part
    end = tl.minimum(begin + part, end)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    SUMS: tl.constexpr = CAP or sum_out is not None
    # Read a tile ahead: a load of keys that waited for that of their page would be one tile less ahead of its product.
    page = pages_of(table, begin, end, PAGE, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        keys = load_paged(k, page, start, end, pages, stride_k_b, stride_k_n, PAGE, MAIN_DIM, BLOCK_N, MAIN)
        if SHARED:
            values = keys
        else:
            values = load_paged(v, page, start, end, pages, stride_v_b, stride_v_n, PAGE, VALUE_DIM, BLOCK_N, BLOCK_DV)
        if REST > 0:
            keys_rest = load_paged(
                k + MAIN, page, start, end, pages, stride_k_b, stride_k_n, PAGE, HEAD_DIM - MAIN, BLOCK_N, REST
            )
        page = pages_of(table, start + BLOCK_N, end, PAGE, BLOCK_N)
        s = tl.dot(rows, keys.T, input_precision=PRECISION)
        if REST > 0:
            s = tl.dot(rows_rest, keys_rest.T, s)
        edge = True  # of latent attention: beside a branch its products, of 64 rows, would not be asynchronous
        if not SHARED:
            edge = is_edge(first_row, last_row, start, start + BLOCK_N - 1, shift, left, right, HAS_LEFT, HAS_RIGHT)
        p, _slope = probabilities(
            s, row_bias[:, None], row[:, None], col[None, :], None, 0, 0, q_len, kv_len, shift, left, right, scale,
            softcap, edge, False, HAS_LEFT, HAS_RIGHT, SOFTCAP, _ACCURATE, ASM,
        )  # fmt: skip
        if SUMS:
            p = tl.where((col < kv_len)[None, :], p, 0.0)
            row_sum += tl.sum(p, 1)
        if P_SCALE != 1.0:
            p *= P_SCALE
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
    if P_SCALE != 1.0:
        acc *= 1.0 / P_SCALE
    if CAP:
        acc /= tl.maximum(row_sum, single(row_cap))[:, None]
    place = q_start + row
    before = split.to(tl.int64) * (stride_split // VALUE_DIM)  # rows of other parts
    if sum_out is not None:
        tl.store(sum_out + before + head * total_q + place, row_sum, mask=row < q_len)
    dim = tl.arange(0, BLOCK_DV)
    targets = out + before * VALUE_DIM + head * stride_o_h + place * stride_o_n
    inside = (row < q_len)[:, None] & (dim < VALUE_DIM)[None, :]
    tl.store(targets[:, None] + dim[None, :], acc.to(out.dtype.element_ty), mask=inside)
