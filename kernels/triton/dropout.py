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

_COLUMN, _FIRST, _SECOND = tl.constexpr(COLUMN), tl.constexpr(FIRST), tl.constexpr(SECOND)
_SHIFT = tl.constexpr(SHIFT)
_RANGE, _LAST = tl.constexpr(RANGE), tl.constexpr(LAST)
BLOCK = 256


class Draws(NamedTuple):
    """Draws the two words of each row: int32 [2, rows].

    For kernels that walk over rows: there each thread would draw those of all the rows of a tile, forty
    multiplications for each.
    """

    launch: Launch
    layout: Layout

    def __call__(self, seed: Tensor) -> Tensor:
        out = new_tensor(self.layout, seed.device)
        self.launch(seed, out)
        return out


def draws_for(signature: Signature) -> Draws | None:
    """None: there is no dropout."""
    if signature.options.dropout_p == 0.0:
        return None
    rows = signature.batch * signature.heads * signature.q_len
    layout = contiguous_layout((2, rows))
    tensors = (contiguous_layout((1,), torch.int64), layout)
    arguments = {"rows": rows, "BLOCK": BLOCK}
    return Draws(Launch(draws_kernel, triton.cdiv(rows, BLOCK), signature.device, tensors, arguments), layout)


@triton.jit
def first_row(batch, heads, head, q_len):
    """(b H + h) M."""
    return (batch.to(tl.int64) * heads + head) * q_len


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


@triton.jit(do_not_specialize=["rows"])
def draws_kernel(seed, out, rows, BLOCK: tl.constexpr):
    """out: int32 [2, rows]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first_word, second_word = row_draws(seed, 0, row)
    tl.store(out + row, first_word.to(tl.int32, bitcast=True), mask=row < rows)
    tl.store(out + rows + row, second_word.to(tl.int32, bitcast=True), mask=row < rows)
