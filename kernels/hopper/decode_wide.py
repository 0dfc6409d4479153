"""Latent attention on Hopper GPUs, in Gluon: query and key about 576 wide, and value key's first 512 channels.

What :mod:`sigswap.kernels.triton.decode_wide` does, with 64 rows a program and an order of its own
(:mod:`sigswap.kernels.hopper.decode_wide_warps`).

Fewer than 64 rows are padded.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
from torch import Tensor

from sigswap.kernels.hopper.common import Tiles
from sigswap.kernels.hopper.decode_wide_warps import HALF, KEYS, REST, ROWS, attend_kernel
from sigswap.kernels.host.launch import Launch, describable
from sigswap.kernels.host.layout import Layout
from sigswap.kernels.host.problem import MAX_PLANS, WIDEST_HEAD_DIM, WIDEST_VALUE_DIM, Problem, Signature
from sigswap.kernels.host.tiles import limits_of
from sigswap.kernels.triton.split_keys import Parts, parts_of, splits_for

WORTH_A_CALL = 1 << 26
"""Bytes of keys. In compiled code fewer are left to kernels that inductor launches itself: this one it cannot, and the
call of the op costs the host more than it saves."""

FEW_ROWS = 32
"""Rows of a key head up to which :mod:`sigswap.kernels.triton.decode_wide` is faster, which has them as they are and
two programs on a multiprocessor. On an H200, 64 sequences of 8,192 keys: 16 rows 156 microseconds (3,860 GB/s), here
205; 32 rows 203 and 226; 128 rows 611 and 298 (491 TFLOP/s)."""


def supports(problem: Problem) -> bool:
    """Whether value is key's first channels, in half precision, without mask, soft cap and dropout, and there are more
    than a few rows."""
    signature, options = problem.signature, problem.options
    if signature.is_empty or signature.packed is not None or signature.attn_mask is not None:
        return False
    if options.dropout_p > 0.0 or options.softcap > 0.0 or signature.element_size != 2:
        return False
    dim, value_dim = signature.key.shape[3], signature.value.shape[3]
    if value_dim != WIDEST_VALUE_DIM or not value_dim < dim <= WIDEST_HEAD_DIM or not problem.value_is_of_key:
        return False
    limits = limits_of(signature.device)
    if limits.capability != 90 or not describable(signature.key):
        return False
    loaded = signature.batch * signature.kv_heads * signature.kv_len * dim * signature.element_size
    if not signature.descriptors:  # the op stays in compiled code, and chooses again when it is called
        return loaded >= WORTH_A_CALL
    return signature.q_len * (signature.heads // signature.kv_heads) > FEW_ROWS


def forward(problem: Problem, *, splits: int | None = None) -> Tensor:
    """Deterministic. splits: over how many programs the keys are split."""
    problem = problem.readable()  # key and value are: descriptors hold them
    query, key = problem.query, problem.key
    plan = _plan(problem.signature, problem.row_sums is not None, splits)
    out = query.new_empty_strided(plan.out.shape, plan.out.strides)
    partial, partial_sums = plan.parts.empty(out, problem.row_sums)
    plan.launch(key, key, query, partial, partial_sums, problem.bias, None, None, None)
    plan.parts.sum(partial, partial_sums, out, problem.row_sums)
    return out


class _Plan(NamedTuple):
    launch: Launch
    out: Layout
    parts: Parts


@functools.lru_cache(MAX_PLANS)
def _plan(signature: Signature, sums: bool, splits: int | None) -> _Plan:
    """sums: whether the rows' are asked for."""
    out, device = signature.output(), signature.device
    rows = signature.q_len * (signature.heads // signature.kv_heads)
    tiles = triton.cdiv(rows, ROWS)
    programs = signature.batch * signature.kv_heads * tiles
    if splits is None:
        splits = splits_for(programs, signature.kv_len, limits_of(device).multiprocessors)
    parts = parts_of(signature, out, splits, sums=sums)
    arguments = signature.arguments(q=signature.query, o=parts.target)
    arguments |= parts.arguments | {"tiles": tiles, "ALONE": rows <= ROWS}
    arguments |= {"sequences": 0, "pages": 0, "most_keys": 0, "stride_table": 0, "PAGE": 0, "ALIKE": True}
    halves, rest = Tiles(signature.key, KEYS, HALF), Tiles(signature.key, KEYS, REST)
    tensors = (halves, rest, signature.query, parts.target, parts.target_sums, signature.bias, None, None, None)
    launch = Launch(attend_kernel, programs * splits, device, tensors, arguments, num_warps=4)
    return _Plan(launch, out, parts)
