"""The forward of sigmoid attention over long sequences on Hopper GPUs, in Gluon, for a head_dim from 33 to 256.

:mod:`sigswap.kernels.triton.forward` leaves the order of things to Triton's compiler. Here:

- A program's rows are divided among two to four warpgroups, each of which has 64; a warp loads queries, keys and values
  for all of them. How many there are, and blocks of how many keys, :mod:`sigswap.kernels.hopper.forward_items` chooses.
- Within a warpgroup scores are a block of keys ahead: while it computes their probabilities, the product of those
  before with the values is under way.
- The warpgroups take turns in starting their matrix products, so that one computes probabilities while another
  multiplies. Of three, which take other rows' keys from L2 less often, each starts when it is ready.
- There are as many programs as multiprocessors. Each goes from item to item, an item being such rows of a head; what
  the next one needs is loaded before the one before has ended.
- Packed sequences come by a plan (:mod:`sigswap.kernels.hopper.packed`), which says which rows of which sequence an
  item has.
- With a row cap each warpgroup sums the probabilities of its rows, and divides them once, at the end.
- A width that is no power of two, which a tensor's has to be, is held in parts: 192 columns cost no more than that. Up
  to 96 columns are loaded as 128, of which 64 and 32 are multiplied.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
)

from sigswap.kernels.hopper.common import (
    takes_row_cap,
    takes_soft_cap,
    tiles_like,
)
from sigswap.kernels.hopper.forward_items import (
    Order,
    order_for,
    sees_in_every_item,
    tile_for,
)
from sigswap.kernels.hopper.forward_warps import _ROWS, ROWS, attend, load
from sigswap.kernels.hopper.packed import (
    Plan,
    is_long,
    plan_for,
    programs_at_once,
    tiles_of,
)
from sigswap.kernels.host.launch import Launch, describable
from sigswap.kernels.host.layout import Layout, layout_of
from sigswap.kernels.host.problem import MAX_PLANS, Problem, Signature, output_arguments
from sigswap.kernels.host.results import Forward, maker_of
from sigswap.kernels.host.tiles import limits_of

NARROWEST, WIDEST = 65, 256
"""Of head_dim, and of value's; or both are in NARROW."""

NARROW = range(33, 65)
FEWEST_NARROW = 1024
"""Of rows and of keys, of narrow heads: shorter sequences were not measured."""


def supports(problem: Problem) -> bool:
    """Whether this kernel takes the forward: of long sequences in half precision, head_dim 33 to 64 or 65 to 256, and
    value's in the same range, without mask and dropout."""
    signature = problem.signature
    operands = signature.query, signature.key, signature.value
    if signature.is_empty or signature.attn_mask is not None or problem.options.dropout_p > 0.0:
        return False
    if not takes_row_cap(problem) or not takes_soft_cap(problem):
        return False
    if not signature.tma(min(signature.q_len, signature.kv_len)) and not is_long(signature):
        return False
    if limits_of(signature.device).capability >= 100:
        return False
    narrow = all(each.shape[3] in NARROW for each in operands)
    if not narrow and not all(NARROWEST <= each.shape[3] <= WIDEST for each in operands):
        return False
    if narrow and signature.packed is None and min(signature.q_len, signature.kv_len) < FEWEST_NARROW:
        return False
    if narrow and signature.packed is not None and signature.band().has_right:
        return False  # 0.46 ms with 24 sequences of 256 to 2048 and 32 heads of 64 on an H200; 0.39 in Triton
    if not all(describable(each) and each.shape[3] % 8 == 0 for each in operands):
        return False
    rows = tile_for(signature).rows
    band = signature.band()
    if band.has_left and band.has_right and band.left + band.right < (2 * rows if narrow else rows):
        return False  # much of what the rows of an item see together is outside for each of them
    return signature.packed is not None or sees_in_every_item(signature, rows)


def forward(problem: Problem) -> Tensor:
    """Deterministic."""
    row_sums = problem.row_sums
    of_out = None if problem.out is None else layout_of(problem.out)
    plan = _plan(problem.signature, of_out, None if row_sums is None else layout_of(row_sums))
    out = problem.query.new_empty_strided(plan.out.shape, plan.out.strides) if problem.out is None else problem.out
    items = None if plan.items is None else plan.items(problem)[0]
    plan.launch(problem.query, problem.key, problem.value, out, row_sums, problem.bias, items)
    return out


def forward_again(problem: Problem) -> Forward:
    """See :func:`sigswap.kernels.dispatch.forward_again`."""
    plan = _plan(problem.signature, None, None)
    launch, new_output = plan.launch, maker_of(plan.out, problem.signature.device)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = new_output()
        launch(query, key, value, out, None, None, None)
        return out

    return run


class _Plan(NamedTuple):
    launch: Launch
    out: Layout
    items: Plan | None
    """Of packed sequences."""


@functools.lru_cache(MAX_PLANS)
def _plan(signature: Signature, out: Layout | None, row_sums: Layout | None) -> _Plan:
    """out: None: of a new output. row_sums: None: not asked for."""
    tile = tile_for(signature)
    out = out or signature.output()
    tiles = tiles_of(signature)
    described = (
        tiles(signature.query, ROWS, tile.part),
        tiles(signature.key, tile.keys, tile.part),
        tiles(signature.value, tile.keys, tile.v_part),
        tiles(out, ROWS, tile.stored),
    )
    multiprocessors = limits_of(signature.device).multiprocessors
    items = None if signature.packed is None else plan_for(signature, tile.rows)
    if items is None:
        units = signature.batch * signature.heads
        programs = min(triton.cdiv(signature.q_len, tile.rows) * units, multiprocessors)
        order = order_for(signature, tile, programs)
    else:
        units = signature.heads
        programs = min(items.most * units, multiprocessors)
        order = Order(4 * programs_at_once(signature), True)
    arguments = signature.arguments() | {
        "units": units,
        "order": -order.at_once if order.to_and_fro else order.at_once,
    }
    arguments |= tile.arguments(signature.query.shape[3], signature.value.shape[3])
    arguments |= output_arguments(arguments, sum=row_sums)
    tensors = (*described, row_sums, signature.bias, None if items is None else items.layout)
    launch = Launch(_kernel, programs, signature.device, tensors, arguments, num_warps=4)
    return _Plan(launch, out, items)


# Device functions.


@gluon.jit(do_not_specialize=[
    "stride_bias_b", "stride_bias_h", "stride_bias_m", "heads", "group", "q_len", "kv_len", "left", "right", "scale",
    "const_bias", "row_cap", "stride_sum_b", "stride_sum_h", "stride_sum_n", "units", "order",
    "softcap",
])  # fmt: skip
def _kernel(
    q, k, v, out, sum_out, bias, plan, stride_sum_b, stride_sum_h, stride_sum_n, stride_bias_b, stride_bias_h,
    stride_bias_m, heads, group, q_len, kv_len, left, right, scale, const_bias, row_cap, units, order, softcap,
    WARPGROUPS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, V_PARTS: gl.constexpr,
    CUT: gl.constexpr, V_CUT: gl.constexpr, HELD: gl.constexpr, TURNS: gl.constexpr, REGISTERS: gl.constexpr,
    VISIBLE: gl.constexpr, BIAS_ROWS: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    BOTTOM_RIGHT: gl.constexpr, CAP: gl.constexpr, P_SCALE: gl.constexpr, FORM: gl.constexpr, SLOW: gl.constexpr,
    SOFTCAP: gl.constexpr,
):  # fmt: skip
    """One program: some of the items. sum_out, if given: the rows' sums of p. plan, if given: of packed sequences."""
    KEYS: gl.constexpr = k.block_type.shape[-2]
    shift = kv_len - q_len if BOTTOM_RIGHT else 0
    total = gl.cdiv(q_len, WARPGROUPS * _ROWS) * units
    if plan is not None:
        total = gl.load(plan) * units
    dtype: gl.constexpr = k.dtype
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(dtype, tiles_like(WARPGROUPS * PARTS, q.block_type), q.layout)
    k_tiles = gl.allocate_shared_memory(dtype, tiles_like(STAGES * PARTS, k.block_type), k.layout)
    v_tiles = gl.allocate_shared_memory(dtype, tiles_like(STAGES * V_PARTS, v.block_type), v.layout)
    out_tiles = gl.allocate_shared_memory(dtype, tiles_like(WARPGROUPS, out.block_type), out.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    turns = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], barrier)
    mbarrier.init(q_full, 1)
    mbarrier.init(q_empty, WARPGROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), 1)
        mbarrier.init(k_empty.index(i), WARPGROUPS)
        mbarrier.init(v_full.index(i), 1)
        mbarrier.init(v_empty.index(i), WARPGROUPS)
    for i in gl.static_range(WARPGROUPS):
        mbarrier.init(turns.index(i), 1)
    mbarrier.arrive(turns.index(0))
    fence_async_shared()

    computing = (
        out, q_tiles, k_tiles, v_tiles, out_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
        units, order, heads, q_len, kv_len, shift, left, right, total,
        stride_bias_b, stride_bias_h, stride_bias_m, stride_sum_b, stride_sum_h, stride_sum_n, scale, const_bias,
        row_cap, softcap if SOFTCAP else 0,
    )  # fmt: skip
    loading = (
        q, k, v, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
        units, order, heads, group, q_len, kv_len, shift, left, right, total,
    )  # fmt: skip
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (attend, (
                    computing, sum_out, bias, plan, 0, WARPGROUPS, STAGES, PARTS, V_PARTS, CUT, V_CUT, HELD, TURNS,
                    VISIBLE, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT, CAP, P_SCALE, FORM, SLOW, SOFTCAP,
                )),
                (attend, (
                    computing, sum_out, bias, plan, 1, WARPGROUPS, STAGES, PARTS, V_PARTS, CUT, V_CUT, HELD, TURNS,
                    VISIBLE, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT, CAP, P_SCALE, FORM, SLOW, SOFTCAP,
                )),
                (load, (
                    loading, plan, KEYS, WARPGROUPS, STAGES, PARTS, V_PARTS, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT,
                )),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
    elif WARPGROUPS == 3:
        gl.warp_specialize(
            [
                (attend, (
                    computing, sum_out, bias, plan, 0, WARPGROUPS, STAGES, PARTS, V_PARTS, CUT, V_CUT, HELD, TURNS,
                    VISIBLE, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT, CAP, P_SCALE, FORM, SLOW, SOFTCAP,
                )),
                (attend, (
                    computing, sum_out, bias, plan, 1, WARPGROUPS, STAGES, PARTS, V_PARTS, CUT, V_CUT, HELD, TURNS,
                    VISIBLE, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT, CAP, P_SCALE, FORM, SLOW, SOFTCAP,
                )),
                (attend, (
                    computing, sum_out, bias, plan, 2, WARPGROUPS, STAGES, PARTS, V_PARTS, CUT, V_CUT, HELD, TURNS,
                    VISIBLE, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT, CAP, P_SCALE, FORM, SLOW, SOFTCAP,
                )),
                (load, (
                    loading, plan, KEYS, WARPGROUPS, STAGES, PARTS, V_PARTS, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT,
                )),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (attend, (
                    computing, sum_out, bias, plan, 0, WARPGROUPS, STAGES, PARTS, V_PARTS, CUT, V_CUT, HELD, TURNS,
                    VISIBLE, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT, CAP, P_SCALE, FORM, SLOW, SOFTCAP,
                )),
                (attend, (
                    computing, sum_out, bias, plan, 1, WARPGROUPS, STAGES, PARTS, V_PARTS, CUT, V_CUT, HELD, TURNS,
                    VISIBLE, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT, CAP, P_SCALE, FORM, SLOW, SOFTCAP,
                )),
                (attend, (
                    computing, sum_out, bias, plan, 2, WARPGROUPS, STAGES, PARTS, V_PARTS, CUT, V_CUT, HELD, TURNS,
                    VISIBLE, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT, CAP, P_SCALE, FORM, SLOW, SOFTCAP,
                )),
                (attend, (
                    computing, sum_out, bias, plan, 3, WARPGROUPS, STAGES, PARTS, V_PARTS, CUT, V_CUT, HELD, TURNS,
                    VISIBLE, BIAS_ROWS, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT, CAP, P_SCALE, FORM, SLOW, SOFTCAP,
                )),
                (load, (
                    loading, plan, KEYS, WARPGROUPS, STAGES, PARTS, V_PARTS, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT,
                )),
            ],
            [4, 4, 4, 1],
            [REGISTERS, REGISTERS, REGISTERS, 24],
        )  # fmt: skip
