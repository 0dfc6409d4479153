"""The third warpgroup of a program of :mod:`sigswap.kernels.hopper.backward`, which adds up dQ of heads of up to 64
columns."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from sigswap.kernels.hopper.backward_common import _ROWS, add_row_sums, add_tile, next_tile, start_row_sums
from sigswap.kernels.hopper.backward_items import _KEYS, number_of
from sigswap.kernels.hopper.common import sync


@gluon.jit
def add_queries(
    sums, k_tiles, ds_tiles, ones, places, k_full, ds_full, ds_empty, keys_read, group, all_tiles,
    DIM: gl.constexpr, ROW_SUMS: gl.constexpr, RING: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """A warpgroup: all keys times dS, which is added to dQ in memory, and, without a soft cap, sums of rows of dS.

    A tile of dQ is [columns, rows] here: so the keys of an item stay in registers, and only dS is read from shared
    memory, whose bandwidth is the bottleneck.
    """
    ROW_PRODUCT: gl.constexpr = ROW_SUMS and not SOFTCAP
    of_columns: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _ROWS, 16])
    of_row_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    no_columns = gl.zeros([DIM, _ROWS], gl.float32, of_columns)
    no_sums = gl.zeros([_ROWS, 8], gl.float32, of_row_sums)
    slot = 0
    phase = 0
    buffer = 0
    kv_phase = 0
    mbarrier.wait(k_full.index(0), 0)
    span = number_of(places, 0, 1)
    while span > 0:
        begin = number_of(places, buffer, 0)
        head = number_of(places, buffer, 2) * group
        keys = k_tiles.index(buffer).reshape([_KEYS, DIM]).permute((1, 0)).load(gl.DotOperandLayout(0, of_columns, 2))
        end = begin + span * _ROWS
        start = begin + 0
        tile = number_of(places, buffer, 5) + begin // _ROWS
        for _ in range(group * span):
            mbarrier.wait(ds_full.index(slot), phase)
            ds = ds_tiles.index(slot)
            place = sums + tile.to(gl.int64) * (_ROWS * (DIM + 1 if ROW_SUMS else DIM))
            token = warpgroup_mma(keys, ds, no_columns, use_acc=False, is_async=True)
            if ROW_PRODUCT:
                row_token = start_row_sums(ds, ones.index(0), no_sums)
                dq, row_sums = warpgroup_mma_wait(0, deps=[token, row_token])
            else:
                dq = warpgroup_mma_wait(0, deps=[token])
            sync()
            mbarrier.arrive(ds_empty.index(slot))
            add_tile(place, dq, of_columns)
            if ROW_PRODUCT:
                add_row_sums(place + _ROWS * DIM, row_sums, of_row_sums)
            start, tile, head = next_tile(start, tile, head, begin, end, all_tiles - span)
            slot ^= 1
            if slot == 0:
                phase ^= 1
        if RING:
            sync()  # whoever waits for the barrier relies on what all warps have added
        mbarrier.arrive(keys_read.index(buffer))
        buffer ^= 1
        if buffer == 0:
            kv_phase ^= 1
        mbarrier.wait(k_full.index(buffer), kv_phase)
        span = number_of(places, buffer, 1)
