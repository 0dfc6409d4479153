"""dQ from what the Gluon kernels of the backward leave in memory: sums in the order of registers, or dS."""

from __future__ import annotations

import triton
import triton.language as tl

from sigswap.kernels.hopper.backward_common import _ROWS
from sigswap.kernels.hopper.stored_ds import _BLOCK, _KEYS, place_in_triton
from sigswap.kernels.triton.common import elements, store_rows

PRODUCT_OPTIONS = {"num_warps": 8, "num_stages": 4}
"""Of product_kernel()'s launch."""


@triton.jit
def _place(tile, heads, q_len, tiles, plan, all_tiles):
    """Of a tile of dQ its batch, head and first row, and where rows end: of packed sequences (Plan) the tile's own."""
    batch = (tile // tiles // heads).to(tl.int64)
    head = (tile // tiles % heads).to(tl.int64)
    start = tile % tiles * _ROWS
    if plan is not None:
        there = tile % tiles < tl.load(plan + 1)
        entry = all_tiles + tile % tiles * 8
        start = tl.load(entry, mask=there, other=0)
        q_len = start + tl.load(entry + 1, mask=there, other=0)
    return batch, head, start, q_len


@triton.jit(do_not_specialize=["heads", "q_len", "tiles", "scale", "stride_db_b", "stride_db_h", "stride_db_m"])
def finish_kernel(
    sums, dq, db, plan, all_tiles, stride_dq_b, stride_dq_h, stride_dq_n, heads, q_len, tiles, scale,
    stride_db_b, stride_db_h, stride_db_m,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: a tile of dQ, from the order in which add_tile() put it in memory, and sums of its rows of dS.

    plan, all_tiles: of packed sequences.
    """
    stride_dq_b, stride_dq_h, stride_dq_n = elements(stride_dq_b, stride_dq_h, stride_dq_n, UNIT, WIDE)
    tile = tl.program_id(0)
    batch, head, start, q_len = _place(tile, heads, q_len, tiles, plan, all_tiles)
    sums += tile.to(tl.int64) * (_ROWS * DIM if db is None else _ROWS * (DIM + 1))
    numbers = tl.load(sums + tl.arange(0, _ROWS * DIM))
    # [half of the columns, warp, eight columns, row, two columns, row and that 8 below, column]
    numbers = numbers.reshape(2, 4, DIM // 16, 8, 4, 2, 2).permute(1, 5, 3, 0, 2, 4, 6).reshape(_ROWS, DIM)
    dq += batch * stride_dq_b + head * stride_dq_h
    store_rows(dq, numbers * scale, start, q_len, stride_dq_n, HEAD_DIM, _ROWS, DIM)
    if db is not None:
        row = start + tl.arange(0, _ROWS)
        row_sums = tl.load(sums + _ROWS * DIM + tl.arange(0, _ROWS))
        db += batch * stride_db_b + head * stride_db_h
        tl.store(db + row.to(tl.int64) * stride_db_m, row_sums.to(db.dtype.element_ty), mask=row < q_len)


@triton.jit(do_not_specialize=["heads", "q_len", "tiles", "scale", "stride_db_b", "stride_db_h", "stride_db_m"])
def finish_columns_kernel(
    sums, dq, db, plan, all_tiles, stride_dq_b, stride_dq_h, stride_dq_n, heads, q_len, tiles, scale,
    stride_db_b, stride_db_h, stride_db_m,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One program: some COLUMNS of a tile of dQ, from the order in which add_tile() put it in memory, and, by the
    first of them, the sums of its rows of dS.

    FIRST: columns that were added as one tile; the rest are another one. plan, all_tiles: of packed sequences.
    """
    stride_dq_b, stride_dq_h, stride_dq_n = elements(stride_dq_b, stride_dq_h, stride_dq_n, UNIT, WIDE)
    CHUNKS: tl.constexpr = DIM // COLUMNS
    tile = tl.program_id(0) // CHUNKS
    column0 = tl.program_id(0) % CHUNKS * COLUMNS
    batch, head, start, q_len = _place(tile, heads, q_len, tiles, plan, all_tiles)
    sums += tile.to(tl.int64) * (_ROWS * DIM if db is None else _ROWS * (DIM + 1))
    width = tl.where(column0 < FIRST, FIRST, DIM - FIRST)
    before = tl.where(column0 < FIRST, 0, FIRST)
    if DIM == FIRST:
        # [warp, eight rows, column, two rows, column and that 8 behind, row]
        numbers = tl.load(sums + tl.arange(0, _ROWS * DIM)).reshape(DIM // 16, _ROWS // 8, 8, 4, 2, 2)
        numbers = numbers.permute(1, 3, 5, 0, 4, 2).reshape(_ROWS, DIM)
    else:
        # [warp, eight columns, row, two columns, row and that 8 below, column], of which a warp has 16 times its width.
        WARP: tl.constexpr = 16 * COLUMNS
        number = tl.arange(0, 4 * WARP)
        place = before * _ROWS + number // WARP * (16 * width) + (column0 - before) * 16 + number % WARP
        numbers = tl.load(sums + place).reshape(4, COLUMNS // 8, 8, 4, 2, 2)
        numbers = numbers.permute(0, 4, 2, 1, 3, 5).reshape(_ROWS, COLUMNS)
    row = start + tl.arange(0, _ROWS)
    column = column0 + tl.arange(0, COLUMNS)
    dq += batch * stride_dq_b + head * stride_dq_h + tl.cast(start, tl.int64) * stride_dq_n
    inside = (row < q_len)[:, None] & (column < HEAD_DIM)[None, :]
    pointers = dq + (tl.arange(0, _ROWS) * stride_dq_n)[:, None] + column[None, :]
    tl.store(pointers, (numbers * scale).to(dq.dtype.element_ty), mask=inside)
    if db is not None and column0 == 0:
        row_sums = tl.load(sums + _ROWS * DIM + tl.arange(0, _ROWS))
        db += batch * stride_db_b + head * stride_db_h
        tl.store(db + row.to(tl.int64) * stride_db_m, row_sums.to(db.dtype.element_ty), mask=row < q_len)


@triton.jit(do_not_specialize=[
    "heads", "group", "q_len", "kv_len", "left", "right", "scale", "first_head", "among", "lines", "line_tiles",
    "stride_db_b", "stride_db_h", "stride_db_m",
])  # fmt: skip
def product_kernel(
    ds, k, k_rest, dq, db, stride_dq_b, stride_dq_h, stride_dq_n, stride_db_b, stride_db_h, stride_db_m,
    heads, group, q_len, kv_len, left, right, scale, first_head, among, lines, line_tiles,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, ROW_SUMS: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: 128 rows of dQ of one head, dS times the keys; if ROW_SUMS, too, of each row the sum of dS.

    ds: [among * tiles * 64, 128] of the heads from first_head on, as :mod:`sigswap.kernels.hopper.stored_ds` says.
    """
    stride_dq_b, stride_dq_h, stride_dq_n = elements(stride_dq_b, stride_dq_h, stride_dq_n, UNIT, WIDE)
    REST: tl.constexpr = k_rest is not None
    COLUMNS: tl.constexpr = DIM - 64 if REST else DIM
    # Under a causal mask the last rows take longest, and start first.
    place = tl.program_id(0) % among
    blocks = tl.cdiv(q_len, _BLOCK)
    block = blocks - 1 - tl.program_id(0) // among
    start = block * _BLOCK
    head = (first_head + place) % heads
    batch = (first_head + place) // heads
    shift = kv_len - q_len if BOTTOM_RIGHT else 0
    begin = 0
    end = kv_len
    if HAS_RIGHT:
        end = tl.minimum(end, tl.minimum(start + _BLOCK, q_len) + shift + right)
    if HAS_LEFT:
        first = tl.maximum(start + shift - left, 0)
        begin = first // _KEYS * _KEYS
        end = tl.where(first < kv_len, end, 0)
    row_in_ds = place_in_triton(place, block, blocks, 0, lines, line_tiles)
    step = place_in_triton(place, block, blocks, 1, lines, line_tiles) - row_in_ds
    acc = tl.zeros((_BLOCK, COLUMNS), tl.float32)
    acc_rest = tl.zeros((_BLOCK, 64), tl.float32)
    # Sums of rows are a product, too: beside tl.sum() the others would wait for each other; and beside one of eight
    # columns, as Triton 3.6 makes it (findings/triton_sum_beside_products.sh).
    ones = tl.full((_KEYS, 16), 1.0, ds.dtype)
    sums = tl.zeros((_BLOCK, 16), tl.float32)
    for col0 in range(begin, end, _KEYS):
        tile = ds.load([row_in_ds, 0])
        row_in_ds += step
        keys = k.load([batch, head // group, col0, 0]).reshape(_KEYS, COLUMNS)
        acc = tl.dot(tile.T, keys, acc)
        if REST:
            acc_rest = tl.dot(tile.T, k_rest.load([batch, head // group, col0, COLUMNS]).reshape(_KEYS, 64), acc_rest)
        if ROW_SUMS:
            sums = tl.dot(tile.T, ones, sums)
    dq += batch.to(tl.int64) * stride_dq_b + head.to(tl.int64) * stride_dq_h + tl.cast(start, tl.int64) * stride_dq_n
    row = start + tl.arange(0, _BLOCK)
    column = tl.arange(0, COLUMNS)
    rows = dq + (tl.arange(0, _BLOCK) * stride_dq_n)[:, None]
    inside = (row < q_len)[:, None]
    tl.store(rows + column[None, :], (acc * scale).to(dq.dtype.element_ty), mask=inside & (column < HEAD_DIM)[None, :])
    if REST:
        column = COLUMNS + tl.arange(0, 64)
        value = (acc_rest * scale).to(dq.dtype.element_ty)
        tl.store(rows + column[None, :], value, mask=inside & (column < HEAD_DIM)[None, :])
    if ROW_SUMS:
        db += batch.to(tl.int64) * stride_db_b + head.to(tl.int64) * stride_db_h
        tl.store(db + row.to(tl.int64) * stride_db_m, tl.max(sums, 1).to(db.dtype.element_ty), mask=row < q_len)
