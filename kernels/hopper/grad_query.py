"""dQ, in the memory order of a gradient, from what the Gluon kernels of the backward leave of it."""

from __future__ import annotations

import triton
import triton.language as tl

from sigswap.kernels.hopper.backward_common import _ROWS
from sigswap.kernels.triton.common import elements, store_rows


@triton.jit(do_not_specialize=["heads", "q_len", "tiles", "scale", "stride_db_b", "stride_db_h", "stride_db_m"])
def finish_kernel(
    sums, dq, db, stride_dq_b, stride_dq_h, stride_dq_n, heads, q_len, tiles, scale,
    stride_db_b, stride_db_h, stride_db_m,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: a tile of dQ, from the order in which add_tile() put it in memory, and sums of its rows of dS."""
    stride_dq_b, stride_dq_h, stride_dq_n = elements(stride_dq_b, stride_dq_h, stride_dq_n, UNIT, WIDE)
    tile = tl.program_id(0)
    head = (tile // tiles % heads).to(tl.int64)
    batch = (tile // tiles // heads).to(tl.int64)
    start = tile % tiles * _ROWS
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
