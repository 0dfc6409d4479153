"""What a program of latent attention's kernel does on Hopper GPUs, of which two warpgroups compute and one warp loads.

- A tile of 64 keys is loaded once, and is a tile of values as well. There are two of them in shared memory, beside the
  queries; nothing else fits.
- Two warpgroups hold 256 columns of the output each. Each works out the probabilities of every other tile, and leaves
  them to the other in that tile's last channels, which only scores need. So no score is worked out twice, and one
  warpgroup multiplies while the other computes probabilities. Where tiles come slowly, for no other program has loaded
  them, the second one multiplies the first one's before its own has come: so their place is free the sooner.
- What a warpgroup has no more use for is loaded anew: half a tile at a time.
- Of keys in pages a tile lies in one page. What is behind a sequence's last key there may be anything.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sigswap.kernels.hopper.common import load_tile, log_of_visible, sigmoid, sync, tiles_like
from sigswap.kernels.host.problem import WIDEST_HEAD_DIM, WIDEST_VALUE_DIM
from sigswap.kernels.triton.common import _AUTO, _FAST, _FAST_BIAS, _LOG2E

ROWS, KEYS = 64, 64
"""Of a tile of scores."""

HALF, REST = WIDEST_VALUE_DIM // 2, WIDEST_HEAD_DIM - WIDEST_VALUE_DIM
"""Channels of the parts of a key: two halves that are a value, and the rest. A tile of the rest is as large as one of
probabilities, which take its place."""

_ROWS, _KEYS, _HALF, _REST = tl.constexpr(ROWS), tl.constexpr(KEYS), tl.constexpr(HALF), tl.constexpr(REST)

_SEQUENCES_AT_ONCE = tl.constexpr(256)
"""That a program looks at, to find its own."""


@gluon.jit(do_not_specialize=[
    "stride_q_b", "stride_q_h", "stride_q_n", "stride_o_b", "stride_o_h", "stride_o_n", "stride_split",
    "stride_bias_b", "stride_bias_h", "stride_bias_m", "stride_table", "heads", "group", "q_len", "kv_len", "total_q",
    "left", "right", "scale", "const_bias", "row_cap", "splits", "sequences", "tiles", "pages", "most_keys",
])  # fmt: skip
def attend_kernel(
    k, k_rest, q, out, sum_out, bias, table, lengths, cu_q,
    stride_q_b, stride_q_h, stride_q_n, stride_o_b, stride_o_h, stride_o_n, stride_split, stride_bias_b, stride_bias_h,
    stride_bias_m, stride_table, heads, group, q_len, kv_len, total_q, left, right, scale, const_bias, row_cap, splits,
    sequences, tiles, pages, most_keys,
    PAGE: gl.constexpr, ALIKE: gl.constexpr, ALONE: gl.constexpr, HEAD_DIM: gl.constexpr, UNIT: gl.constexpr,
    VISIBLE: gl.constexpr, BIAS_ROWS: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    BOTTOM_RIGHT: gl.constexpr, CAP: gl.constexpr, P_SCALE: gl.constexpr, FORM: gl.constexpr, SLOW: gl.constexpr,
):  # fmt: skip
    """One program: one part of the keys, for 64 of the group * q_len rows of one key head, those of one token one
    behind the other. sum_out, if given: the rows' sums of p, contiguous. CAP: rows are divided here, for there is one
    part. ALONE: no other program has the same keys, which come from memory one tile behind the other.

    table, lengths, cu_q: if given, rows are those of packed sequences, q_len of the longest, and keys lie in pages of
    PAGE, a multiple of 64: k is [pages, Hk, PAGE, D], and a sequence may have most_keys of them. tiles: programs of the
    rows of each sequence, if they are ALIKE, else of all. Whatever the numbers are, nothing outside of the tensors is
    read or written.
    """
    PAGED: gl.constexpr = table is not None
    # Programs of the same keys run side by side, so that all but the first find them in the L2 cache.
    number = gl.program_id(0) % tiles
    at = gl.program_id(0) // tiles
    split = at % splits
    kv_heads = heads // group
    kv_head = at // splits % kv_heads
    batch = at // splits // kv_heads
    q_start = 0
    if PAGED:
        if not ALIKE:
            batch, number = _tile_of(number, cu_q, sequences, total_q, group)
        q_start = gl.minimum(gl.maximum(gl.load(cu_q + batch), 0), total_q)
        q_end = gl.maximum(gl.minimum(gl.load(cu_q + batch + 1), total_q), q_start)
        q_len = gl.minimum(q_end - q_start, q_len)
        kv_len = gl.minimum(gl.maximum(gl.load(lengths + batch), 0), most_keys)
        table += batch.to(gl.int64) * stride_table
        batch *= 0  # rows of all sequences follow one another
    first = number * _ROWS
    shift = kv_len - q_len if BOTTOM_RIGHT else 0
    first_row = first // group
    last_row = gl.minimum((first + _ROWS - 1) // group, q_len - 1)
    begin = 0
    end = kv_len
    if HAS_RIGHT:
        end = gl.maximum(gl.minimum(end, last_row + shift + right + 1), 0)
    if HAS_LEFT:
        begin = gl.maximum(first_row + shift - left, 0) // _KEYS * _KEYS
    if PAGED:  # some programs have no rows
        end = gl.where(first < group * q_len, end, 0)
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
        stride_bias_b, stride_bias_h, stride_bias_m, heads, group, q_start, q_len, total_q, kv_len, shift, left, right,
        scale, const_bias, row_cap, split, batch, kv_head, first, first_row, last_row, begin, end, pairs,
    )  # fmt: skip
    loading = (
        k, k_rest, k_halves, k_rests, half_full, half_empty, rest_full, rest_empty, batch, kv_head, begin, pairs,
        pages, most_keys,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_attend, (
                computing, sum_out, bias, 0, ALONE, HEAD_DIM, UNIT, VISIBLE, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, CAP,
                P_SCALE, FORM, SLOW, PAGED,
            )),
            (_attend, (
                computing, sum_out, bias, 1, ALONE, HEAD_DIM, UNIT, VISIBLE, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, CAP,
                P_SCALE, FORM, SLOW, PAGED,
            )),
            (_load, (loading, table, PAGE)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _tile_of(place, cu_q, sequences, total_q, group):
    """(sequence, number of its tile) at a place in the tiles of all, as triton.paged has them: those of sequence b
    begin at ``cu_q[b] * group // 64 + b``. If ends do not rise, some sequence and tile."""
    by_thread: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    before = 0
    for start in range(0, sequences, _SEQUENCES_AT_ONCE):
        index = start + gl.arange(0, _SEQUENCES_AT_ONCE, by_thread)
        rows = gl.load(cu_q + index, mask=index < sequences, other=0)
        first = gl.minimum(gl.maximum(rows, 0), total_q) * group // _ROWS + index
        before += gl.sum(((first <= place) & (index < sequences)).to(gl.int32), 0)
    batch = gl.maximum(before - 1, 0)
    rows = gl.minimum(gl.maximum(gl.load(cu_q + batch), 0), total_q)
    return batch, gl.maximum(place - (rows * group // _ROWS + batch), 0)


@gluon.jit
def _page_of(table, start, pages, most_keys, PAGE: gl.constexpr):
    """The page in which a tile of keys is; behind a sequence's last one, some page."""
    page = gl.load(table + gl.minimum(start, most_keys - 1) // PAGE)
    return gl.minimum(gl.maximum(page, 0), pages - 1)


@gluon.jit
def _load(shared, table, PAGE: gl.constexpr):
    """One warp: the tiles of keys."""
    (
        k, k_rest, k_halves, k_rests, half_full, half_empty, rest_full, rest_empty, batch, kv_head, begin, pairs,
        pages, most_keys,
    ) = shared  # fmt: skip
    PAGED: gl.constexpr = table is not None
    page = _page_of(table, begin, pages, most_keys, PAGE) if PAGED else batch
    for pair in range(pairs):
        phase = (pair & 1) ^ 1
        for i in gl.static_range(2):
            start = begin + (2 * pair + i) * _KEYS
            row = start
            next_page = page
            if PAGED:  # read a tile ahead
                row = start % PAGE
                next_page = _page_of(table, start + _KEYS, pages, most_keys, PAGE)
            for j in gl.static_range(2):
                full = half_full.index(2 * i + j)
                mbarrier.wait(half_empty.index(2 * i + j), phase)
                mbarrier.expect(full, k.block_type.nbytes)
                load_tile(k, [page, kv_head, row, j * _HALF], full, k_halves.index(2 * i + j))
            mbarrier.wait(rest_empty.index(i), phase)
            mbarrier.expect(rest_full.index(i), k_rest.block_type.nbytes)
            load_tile(k_rest, [page, kv_head, row, 2 * _HALF], rest_full.index(i), k_rests.index(i))
            page = next_page


@gluon.jit
def _flat(tiles, number: gl.constexpr):
    """One of the tiles, [rows, columns]."""
    return tiles.index(number).reshape([tiles.shape[-2], tiles.shape[-1]])


@gluon.jit
def _query_rows(q, stride_h, stride_n, first, group, q_start, q_len, total_q, kv_head, layout: gl.constexpr):
    """The addresses of a program's rows of query, of one sequence. Rows beyond the last are copies of others."""
    index = first + gl.arange(0, _ROWS, gl.SliceLayout(1, layout))
    row = gl.minimum(q_start + gl.minimum(index // group, gl.maximum(q_len - 1, 0)), total_q - 1).to(gl.int64)
    head = (kv_head * group + index % group).to(gl.int64)
    return (q + head * stride_h + row * stride_n)[:, None]


@gluon.jit
def _clear(tile, rows):
    """Zeros instead of what lies in a page behind so many keys: there it may be NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, _KEYS, gl.SliceLayout(1, layout))
    for j in gl.static_range(_HALF // 64):
        part = tile.slice(64 * j, 64, 1)
        part.store(gl.where((row < rows)[:, None], part.load(layout), 0.0))
    fence_async_shared()
    sync()


@gluon.jit
def _add_own(sums, p_operand, k_halves, half_empty, rest_empty, rows, PART: gl.constexpr, PAGED: gl.constexpr):
    """The part in the output of the tile whose probabilities this warpgroup has, and which has so many keys."""
    HALF: gl.constexpr = 2 * PART + PART
    if PAGED and rows < _KEYS:
        _clear(_flat(k_halves, HALF), rows)
    token = warpgroup_mma(p_operand, _flat(k_halves, HALF), sums, is_async=True)
    results = warpgroup_mma_wait(0, deps=(token, p_operand))
    sync()
    mbarrier.arrive(half_empty.index(HALF))
    mbarrier.arrive(rest_empty.index(PART))
    return results[0]


@gluon.jit
def _add_other(
    sums, k_halves, k_rests, half_full, half_empty, rest_empty, p_full, phase, rows,
    PART: gl.constexpr, PAGED: gl.constexpr,
):  # fmt: skip
    """The part in the output of the other warpgroup's tile, which has so many keys."""
    TILE: gl.constexpr = 1 - PART
    HALF: gl.constexpr = 2 * TILE + PART
    mbarrier.wait(half_full.index(HALF), phase)
    mbarrier.wait(p_full.index(TILE), phase)
    if PAGED and rows < _KEYS:
        _clear(_flat(k_halves, HALF), rows)
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
    P_SCALE: gl.constexpr, FORM: gl.constexpr, SLOW: gl.constexpr, PAGED: gl.constexpr,
):  # fmt: skip
    """One of the warpgroups: half of the columns, and the probabilities of every other tile of keys."""
    (
        q, out, q_halves, q_rest, k_halves, k_rests, all_sums, q_full, half_full, half_empty, rest_full, rest_empty,
        p_full, sums_full, stride_q_b, stride_q_h, stride_q_n, stride_o_b, stride_o_h, stride_o_n, stride_split,
        stride_bias_b, stride_bias_h, stride_bias_m, heads, group, q_start, q_len, total_q, kv_len, shift, left, right,
        scale, const_bias, row_cap, split, batch, kv_head, first, first_row, last_row, begin, end, pairs,
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
    half = gl.load(
        _query_rows(q, stride_h, stride_n, first, group, q_start, q_len, total_q, kv_head, of_half) + channel[None, :]
    )
    _flat(q_halves, PART).store(half)
    if PART == 1:
        channel = 2 * _HALF + gl.arange(0, _REST, gl.SliceLayout(0, of_rest))
        pointers = (
            _query_rows(q, stride_h, stride_n, first, group, q_start, q_len, total_q, kv_head, of_rest)
            + channel[None, :]
        )
        _flat(q_rest, 0).store(gl.load(pointers, mask=(channel < HEAD_DIM)[None, :], other=0.0))
    fence_async_shared()
    sync()
    mbarrier.arrive(q_full)

    index = first + gl.arange(0, _ROWS, gl.SliceLayout(1, of_scores))
    row = gl.minimum(index // group, gl.maximum(q_len - 1, 0))
    head = kv_head * group + index % group
    key_of_tile = gl.arange(0, _KEYS, gl.SliceLayout(0, of_scores))
    row_bias = gl.full(row.shape, 0.0, gl.float32, row.type.layout) + const_bias
    if bias is not None:
        pointers = bias + batch64 * stride_bias_b + head.to(gl.int64) * stride_bias_h
        if BIAS_ROWS:
            pointers += gl.minimum(q_start + row, total_q - 1).to(gl.int64) * stride_bias_m
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
        start = begin + (2 * pair + PART) * _KEYS
        others = end - (begin + (2 * pair + 1 - PART) * _KEYS)
        if PART == 1 and ALONE:
            sums = _add_other(
                sums, k_halves, k_rests, half_full, half_empty, rest_empty, p_full, phase, others, PART, PAGED
            )
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
            sums = _add_own(sums, p_operand, k_halves, half_empty, rest_empty, end - start, PART, PAGED)
        if PART == 0 or not ALONE:
            sums = _add_other(
                sums, k_halves, k_rests, half_full, half_empty, rest_empty, p_full, phase, others, PART, PAGED
            )
        if PART == 1:
            sums = _add_own(sums, p_operand, k_halves, half_empty, rest_empty, end - start, PART, PAGED)

    factor = gl.full([_ROWS], 1.0 / P_SCALE, gl.float32, gl.SliceLayout(1, of_scores))
    if SUMS:
        all_sums.index(PART).store(partial_sums)
        sync()
        mbarrier.arrive(sums_full)
        mbarrier.wait(sums_full, 0)
        row_sums = partial_sums + all_sums.index(1 - PART).load(gl.SliceLayout(1, of_scores))
        if sum_out is not None and PART == 0:
            of_rows = (
                split.to(gl.int64) * (stride_split // (2 * _HALF)) + (batch64 * heads + head) * total_q + q_start + row
            )
            gl.store(sum_out + of_rows, row_sums, mask=index < group * q_len)
        if CAP:
            factor /= gl.maximum(row_sums, row_cap)
    sums *= gl.convert_layout(factor, gl.SliceLayout(1, of_out))[:, None]

    index = first + gl.arange(0, _ROWS, gl.SliceLayout(1, of_out))
    row = (q_start + index // group).to(gl.int64)
    head = (kv_head * group + index % group).to(gl.int64)
    out += split.to(gl.int64) * stride_split + batch64 * stride_o_b * UNIT
    targets = out + head * stride_o_h * UNIT + row * stride_o_n * UNIT
    column = PART * _HALF + gl.arange(0, _HALF, gl.SliceLayout(0, of_out))
    gl.store(targets[:, None] + column[None, :], sums.to(out.dtype.element_ty), mask=(index < group * q_len)[:, None])
