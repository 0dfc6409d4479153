"""Kernels of keys and values in pages against float64, and wrong numbers in the tensors that say where keys are, with
which they stay within the tensors; on a GPU, if there is one, else, Triton's, in its interpreter."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from paged import Paged, oracle
from torch import Tensor

from sigswap.kernels.host.layout import Layout, by_rows, heads_first
from sigswap.kernels.host.problem import Options, Pages, Problem
from sigswap.kernels.triton import paged as triton_kernel
from sigswap.kernels.triton import split_keys

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

SENTINEL = 7.0
LEAST, MOST = -(2**31), 2**31 - 1


def problem_of(call: Paged, bias: Tensor | None = None, out: Tensor | None = None, **options: Any) -> Problem:
    pages = Pages(call.cu_seqlens_q, call.block_table, call.cache_seqlens, call.max_seqlen_q, call.max_seqlen_k)
    views = heads_first(call.query), call.key_cache.transpose(1, 2), call.value_cache.transpose(1, 2)
    own = Options(options.pop("scale"), bottom_right=True, **options)
    return Problem(*views, None if bias is None else by_rows(bias), None, None, own, pages=pages, out=out)


def check(call: Paged, options: dict[str, Any], splits: int | None, kernel: Any = triton_kernel) -> None:
    """The error is at most 1.1 times that of the rounding of probabilities and output, which are of the inputs' dtype:
    at most half a unit of their last place each."""
    bias, window = options["bias"], options["window"] or (-1, -1)
    own: dict[str, Any] = {"scale": call.query.shape[2] ** -0.5, "is_causal": options["is_causal"]}
    own |= {"softcap": options["softcap"] or 0.0, "row_cap": options["row_cap"] or 0.0}
    own |= {"window_left": window[0], "window_right": window[1], "visible_bias": bias is None}
    if isinstance(bias, float):
        own["const_bias"] = bias
    of_rows = (bias if bias.dim() == 2 else bias[None]) if isinstance(bias, Tensor) else None
    before = [each.clone() for each in call[:3]]
    out = kernel.forward(problem_of(call, of_rows, **own), splits=splits)[0].transpose(0, 1)
    expected = oracle(call, **options)
    # Of what the rounded parts add up to.
    largest = oracle(call._replace(value_cache=call.value_cache.abs()), **options)
    unit = torch.finfo(call.query.dtype).eps
    error = (out.double() - expected).abs()
    assert out.dtype == call.query.dtype and out.shape == expected.shape
    assert (error <= 1.1 * unit * largest + 2e-5 * largest + 1e-6).all(), error.max()
    for new, old in zip(call[:3], before, strict=True):
        assert torch.equal(new.nan_to_num(), old.nan_to_num())


class Guarded:
    """Tensors cut from the middle of longer ones, of sentinels that must be left."""

    def __init__(self) -> None:
        self._all: list[tuple[Tensor, slice]] = []

    def cut(self, *shape: int, dtype: torch.dtype) -> Tensor:
        around = 64
        whole = torch.full((shape[0] + 2 * around, *shape[1:]), SENTINEL, dtype=dtype, device=DEVICE)
        self._all.append((whole, slice(around, around + shape[0])))
        return whole[self._all[-1][1]]

    def like(self, layout: Layout, device: torch.device) -> Tensor:
        """For new_tensor()."""
        return self.cut(layout.shape[0] * layout.strides[0], dtype=layout.dtype).as_strided(
            layout.shape, layout.strides
        )

    def assert_nothing_outside_is_written(self) -> None:
        for whole, inside in self._all:
            assert (whole[: inside.start] == SENTINEL).all() and (whole[inside.stop :] == SENTINEL).all()


ENDS, LENGTHS = [0, 1, 4, 4, 9], [20, 13, 7, 30]
TABLE = [[0, 5, 2, MOST], [6, 1, LEAST, -1], [4, 9, 9, 9], [3, 7, 8, 10]]
WRONG: dict[str, tuple[list[int], list[int], list[list[int]]]] = {
    "none": (ENDS, LENGTHS, TABLE),
    "rows beyond the end": ([0, 1, 4, 4, 90], LENGTHS, TABLE),
    "rows from before the first one": ([-7, 5, 5, MOST, LEAST], LENGTHS, TABLE),
    "all rows far beyond": ([MOST] * 5, LENGTHS, TABLE),
    "more keys than pages": (ENDS, [20, MOST, 33, 1000], TABLE),
    "fewer than no keys": (ENDS, [-1, 13, LEAST, -30], TABLE),
    "no such pages": (ENDS, LENGTHS, [[11, MOST, 2, 0], [-1, LEAST, 0, 0], [-5, 0, 0, 0], [1 << 20, 12, 8, 10]]),
    "everything": ([LEAST, MOST, LEAST, MOST, LEAST], [MOST] * 4, [[MOST, LEAST, -1, 11]] * 4),
}


def check_wrong(
    wrong: str,
    page_size: int,
    heads: int,
    dtype: torch.dtype,
    splits: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    latent: bool = False,
    kernel: Any = triton_kernel,
) -> None:
    """What is read outside of queries and caches is NaN, and so would be the rows that it reaches. Of 64 heads the
    longest sequence has several tiles of rows. latent: of a head of 576 whose first 512 channels are the value."""
    torch.manual_seed(0)
    ends, lengths, table = WRONG[wrong]
    lengths = [min(max(length * page_size // 8, LEAST), MOST) for length in lengths]
    guarded = Guarded()
    inside = []
    kv_heads, dim, value_dim = (1, 576, 512) if latent else (2, 16, 16)
    for shape in ((9, heads, dim), (11, page_size, kv_heads, dim), (11, page_size, kv_heads, value_dim)):
        whole = torch.full((shape[0] + 8, *shape[1:]), torch.nan, dtype=dtype, device=DEVICE)
        inside.append(whole[4:-4].copy_(torch.randn(shape)))
    if latent:
        inside[2] = inside[1][..., :value_dim]
    numbers = [torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in (table, lengths, ends)]
    call = Paged(inside[0], inside[1], inside[2], numbers[0], numbers[1], numbers[2], 5, 4 * page_size)
    out = guarded.cut(9, heads, value_dim, dtype=dtype)
    options: dict[str, Any] = {"is_causal": True, "scale": dim**-0.5, "row_cap": 0.1}
    with monkeypatch.context() as patch:
        patch.setattr(split_keys, "new_tensor", guarded.like)
        kernel.forward(problem_of(call, out=heads_first(out), window_left=18, **options), splits=splits)
        if CUDA:
            torch.cuda.synchronize()
    guarded.assert_nothing_outside_is_written()

    # What the documentation says is left of each sequence.
    parts, rising = [], all(start <= stop for start, stop in itertools.pairwise(ends))
    for start, stop in itertools.pairwise(ends):
        start, stop = min(max(start, 0), 9), min(stop, 9)
        parts.append(slice(start, max(start, min(stop, start + 5))))
    owners = torch.zeros(9, dtype=torch.int64)
    for rows in parts:
        owners[rows] += 1
    kept = [min(max(length, 0), 4 * page_size) for length in lengths]
    for number, rows in enumerate(parts):
        if (owners[rows] == 1).all() and rising:
            alone = paged_alone(call, number, rows, kept[number])
            bound = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-4}[dtype]
            expected = oracle(alone, window=(18, -1), **options)
            torch.testing.assert_close(out[rows].double(), expected, rtol=bound, atol=bound)


def paged_alone(call: Paged, number: int, rows: slice, keys: int) -> Paged:
    """One sequence, of right numbers."""
    length = torch.tensor([keys], dtype=torch.int32)
    ends = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
    table = call.block_table[number : number + 1].clamp(0, len(call.key_cache) - 1)
    return Paged(call.query[rows], *call[1:3], table, length, ends, 5, keys)
