"""Dropout in the Triton kernels: which probabilities of a tile are kept, as :mod:`sigswap.kernels.host.draws` says."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sigswap.kernels.host.draws import COLUMN, FIRST, LAST, RANGE, SECOND, SHIFT
from sigswap.kernels.host.launch import Launch
from sigswap.kernels.host.layout import Layout, contiguous_layout, new_tensor
from sigswap.kernels.host.problem import Signature
from sigswap.kernels.triton.common import sequence

_COLUMN, _FIRST, _SECOND = tl.constexpr(COLUMN), tl.constexpr(FIRST), tl.constexpr(SECOND)
_SHIFT = tl.constexpr(SHIFT)
_RANGE, _LAST = tl.constexpr(RANGE), tl.constexpr(LAST)
BLOCK = 256


class Draws(NamedTuple):
    """Draws the two words of each row: int32 [2, rows]. Rows are those of [B, H, M], or, of packed sequences, of
    [H, total]: as many as there are, however short most sequences are beside the longest.

    For kernels that walk over rows: there each thread would draw those of all the rows of a tile, forty
    multiplications for each.
    """

    launch: Launch
    layout: Layout

    def __call__(self, seed: Tensor, cu_q: Tensor | None) -> Tensor:
        out = new_tensor(self.layout, seed.device)
        self.launch(seed, out, cu_q)
        return out


def draws_for(signature: Signature) -> Draws | None:
    """None: there is no dropout."""
    if signature.options.dropout_p == 0.0:
        return None
    batch, heads, _, _ = signature.query.shape  # of packed sequences 1
    rows = batch * heads * signature.query.shape[2]
    layout = contiguous_layout((2, rows))
    blocks = triton.cdiv(rows, BLOCK)
    if signature.packed is not None:
        blocks = triton.cdiv(signature.q_len, BLOCK) * signature.batch * heads
    tensors = (contiguous_layout((1,), torch.int64), layout, signature.cu_layouts()[0])
    arguments = {"rows": rows, "heads": heads, "q_len": signature.q_len, "total_q": signature.query.shape[2]}
    return Draws(Launch(draws_kernel, blocks, signature.device, tensors, arguments | {"BLOCK": BLOCK}), layout)


@triton.jit
def first_row(batch, heads, head, q_len):
    """(b H + h) M."""
    return (batch.to(tl.int64) * heads + head) * q_len


@triton.jit
def first_place(head, total_q, start):
    """Where what was drawn for a packed sequence's rows of a head begins."""
    return head.to(tl.int64) * total_q + start


@triton.jit
def row_draws(seed, first, row):
    """The two words of each row, from the number of the head's first one."""
    first_word, second_word, _, _ = tl.randint4x(tl.load(seed), first + row)
    return first_word.to(tl.uint32), second_word.to(tl.uint32)


@triton.jit
def drawn_rows(draws, rows, first, row, inside):
    """The two words of each row that is inside, from what :func:`draws_kernel` wrote."""
    at = draws + first + row
    return (
        tl.load(at, mask=inside, other=0).to(tl.uint32, bitcast=True),
        tl.load(at + rows, mask=inside, other=0).to(tl.uint32, bitcast=True),
    )


@triton.jit
def kept(first_word, second_word, col, dropout_p):
    """Which probabilities are kept, of rows with these words."""
    x = ((col.to(tl.uint32) * _COLUMN) ^ first_word) * _FIRST
    x = (x ^ (x >> _SHIFT) ^ second_word) * _SECOND
    return x >= tl.minimum(dropout_p * _RANGE, _LAST).to(tl.uint32)


@triton.jit
def scale_of(dropout_p):
    """What is kept is multiplied by this: 0 where all is dropped."""
    return tl.where(dropout_p < 1.0, 1.0 / tl.maximum(1.0 - dropout_p, 1e-30), 0.0)


@triton.jit(do_not_specialize=["rows", "heads", "q_len", "total_q"])
def draws_kernel(seed, out, cu_q, rows, heads, q_len, total_q, BLOCK: tl.constexpr):
    """out: int32 [2, rows]. With cu_q (packed sequences) q_len is the longest, of total_q rows of each head."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first, place, inside = 0, row, row < rows
    if cu_q is not None:
        blocks = tl.cdiv(q_len, BLOCK)
        head = (tl.program_id(0) // blocks) % heads
        number = tl.program_id(0) // blocks // heads
        start, length = sequence(cu_q, number, q_len, total_q)
        row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
        first, place, inside = (
            first_row(number, heads, head, q_len),
            first_place(head, total_q, start) + row,
            row < length,
        )
    first_word, second_word = row_draws(seed, first, row)
    tl.store(out + place, first_word.to(tl.int32, bitcast=True), mask=inside)
    tl.store(out + rows + place, second_word.to(tl.int32, bitcast=True), mask=inside)
