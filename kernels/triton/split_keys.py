"""Keys split over several programs: how many there are, and how their partial outputs are added.

Partial outputs of sigmoid attention simply add: no maxima, no logsumexp. They are added in a fixed order, so that the
result is the same in every run. With a row cap partial sums of the rows add likewise, and the division comes at the
end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sigswap.kernels.host.launch import Launch
from sigswap.kernels.host.layout import Layout, cdiv, contiguous_layout, new_tensor, next_power_of_2
from sigswap.kernels.host.problem import Signature
from sigswap.kernels.triton.common import UNSPECIALIZED, single

MIN_KEYS = 256
"""Keys per program, at least: fewer don't pay for a partial output."""

AT_ONCE = 2
"""Programs that run at the same time on a multiprocessor, of which shared memory holds the tiles."""

WAVES, MIN_KEYS_IN_WAVES = 7, 1024
"""How many times as many programs there are as run at once, and the keys of each at least, where they do not run all
at once: the last ones leave less of the GPU idle then."""

TERMS, NUMBERS = 32, 4096
"""Partial outputs of a number that a program loads before it waits for the first of them, and such numbers: one behind
the other 128 of them would take longer than the attention of one sequence."""


def splits_for(programs: int, kv_len: int, at_once: int) -> int:
    """Over how many programs the keys of one head are split; ``programs``: of all heads, without a split.

    GB/s on an H200, 32 heads over 8 of 128, for so many programs in all: one sequence of 32,768 keys 2,668 (264, which
    run at once), 2,374 (528); eight 4,257 (256), 3,932 (512); 64 of 8,192 keys 4,102 (512), 4,422 (2,048),
    4,352 (4,096).
    """
    splits = at_once // programs
    if splits * programs < 0.9 * at_once:
        splits = max(splits, min(cdiv(WAVES * at_once, programs), kv_len // MIN_KEYS_IN_WAVES))
    return int(max(1, min(splits, cdiv(kv_len, MIN_KEYS))))


class Parts(NamedTuple):
    """What the programs of each part of the keys write, and what adds it. One part is the output itself."""

    target: Layout
    """Of one part's output."""
    target_sums: Layout | None
    """Of all parts' sums of the rows' probabilities, float32 [splits, B, H, M]; None: programs write none."""
    arguments: dict[str, Any]
    """Of the kernel of which the programs are."""
    add: Launch | None
    """Adds partial outputs, if there are several."""
    partial: Layout
    """Theirs, float32 [splits, B, H, M, Dv]."""

    def empty(self, out: Tensor, row_sums: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the programs write to: the output and the rows' sums, if these are asked for, or room for parts."""
        if self.add is None:
            return out, row_sums
        partial_sums = None if self.target_sums is None else new_tensor(self.target_sums, out.device)
        return new_tensor(self.partial, out.device), partial_sums

    def sum(self, partial: Tensor, partial_sums: Tensor | None, out: Tensor, row_sums: Tensor | None) -> None:
        """Adds to the output and to the rows' sums what was written to :meth:`empty`, where that is not they."""
        if self.add is not None:
            self.add(partial, partial_sums, out, row_sums)


def parts_of(signature: Signature, out: Layout, splits: int, *, sums: bool) -> Parts:
    """Of the keys, as many; sums: whether the rows' are asked for."""
    batch, heads, rows, _ = signature.query.shape
    partial = contiguous_layout((splits, batch, heads, rows, signature.value.shape[3]), torch.float32)
    capped = signature.options.row_cap > 0.0
    partial_sums = contiguous_layout(partial.shape[:4], torch.float32) if capped or sums else None
    arguments = {"stride_split": partial.strides[0], "splits": splits, "CAP": capped and splits == 1}
    if splits == 1:
        return Parts(out, partial_sums if sums else None, arguments, None, partial)
    target = Layout(partial.shape[1:], partial.strides[1:], partial.dtype, True)
    return Parts(target, partial_sums, arguments, _adder(signature, partial, partial_sums, sums=sums), partial)


def _adder(signature: Signature, partial: Layout, partial_sums: Layout | None, *, sums: bool) -> Launch:
    """What adds partial outputs, and the rows' partial sums, if a row cap divides by them; ``sums``: or they are asked
    for."""
    splits, batch, heads, rows, value_dim = partial.shape
    out = signature.output()
    terms = min(TERMS, next_power_of_2(splits))
    block = min(1024, NUMBERS // terms, next_power_of_2(value_dim * rows))
    total = batch * heads * rows * value_dim
    arguments: dict[str, Any] = dict(zip(("stride_o_b", "stride_o_h", "stride_o_n"), out.strides, strict=False))
    arguments |= {"total": total, "splits": splits, "heads": heads, "q_len": rows, "DIM": value_dim}
    arguments |= {"BLOCK": block, "TERMS": terms}
    row_cap = signature.options.row_cap
    own_sums = contiguous_layout(partial.shape[1:4], torch.float32) if sums else None
    tensors = partial, partial_sums, out, own_sums
    programs = cdiv(total, block)
    arguments |= {"row_cap": row_cap, "CAP": row_cap > 0.0}
    return Launch(_add_kernel, programs, signature.device, tensors, arguments)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _add_kernel(
    partial, partial_sums, out, sum_out, total, splits, heads, q_len, stride_o_b, stride_o_h, stride_o_n, row_cap,
    DIM: tl.constexpr, BLOCK: tl.constexpr, TERMS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """out = the sum of partial [splits, B, H, M, DIM] over its first dimension, divided by max(row_cap, the row's
    sum), if CAP; sum_out = that of partial_sums [splits, B, H, M], if given."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    terms = tl.zeros((TERMS, BLOCK), tl.float32)
    terms_of_sum = tl.zeros((TERMS, BLOCK), tl.float32)
    for start in range(0, splits, TERMS):
        split = start + tl.arange(0, TERMS)
        there = (split < splits)[:, None] & inside[None, :]
        offset = split.to(tl.int64)[:, None] * total + index[None, :]
        terms += tl.load(partial + offset, mask=there, other=0.0)
        if partial_sums is not None:
            of_rows = split.to(tl.int64)[:, None] * (total // DIM) + (index // DIM)[None, :]
            terms_of_sum += tl.load(partial_sums + of_rows, mask=there, other=0.0)
    acc, row_sum = tl.sum(terms, 0), tl.sum(terms_of_sum, 0)
    if CAP:
        acc /= tl.maximum(row_sum, single(row_cap))
    if sum_out is not None:
        tl.store(sum_out + index // DIM, row_sum, mask=inside & (index % DIM == 0))
    dim = index % DIM
    row = index // DIM % q_len
    head = index // DIM // q_len % heads
    batch = index // DIM // q_len // heads
    target = out + batch * stride_o_b + head * stride_o_h + row * stride_o_n + dim
    tl.store(target, acc.to(out.dtype.element_ty), mask=inside)
