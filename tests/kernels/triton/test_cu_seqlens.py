"""Wrong numbers in cu_seqlens, which nothing on the host sees: the Triton kernels stay within the tensors, on a GPU and
in Triton's interpreter, and compute what is left of the sequences as float64 does."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from in_interpreter import run_interpreted
from torch import Tensor

from sigswap.kernels import reference

pytest.importorskip("triton")

from sigswap.kernels import dispatch
from sigswap.kernels.host.layout import Layout
from sigswap.kernels.host.problem import Options, Packed, Problem
from sigswap.kernels.triton import backward, dropout, forward, row_biases, sums

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"

PAD = 64
"""Rows before and behind each tensor, and numbers, of which a sentinel must be left."""
SENTINEL = 7.0
HEADS, KV_HEADS, DIM = 2, 1, 16
RIGHT_Q, RIGHT_K = [0, 5, 22, 22, 39], [0, 9, 20, 33, 37]
LONGEST = 20, 19
LEAST, MOST = -(2**31), 2**31 - 1

WRONG: dict[str, tuple[list[int], list[int]]] = {
    "none": (RIGHT_Q, RIGHT_K),
    "negative": ([-3, 5, 22, 22, 39], [-9, 9, 20, 33, 37]),
    "not from 0": ([2, 5, 22, 22, 39], [4, 9, 20, 33, 37]),
    "descending": ([0, 22, 5, 22, 39], [0, 20, 9, 33, 37]),
    "falling to the left of all": ([0, 5, -40, 22, 39], [0, 9, 20, -33, 37]),
    "beyond the end": ([0, 5, 22, 22, 52], [0, 9, 20, 33, 60]),
    "beyond in the middle": ([0, 5, 70, 22, 39], [0, 9, 50, 33, 37]),
    "short of the end": ([0, 5, 22, 22, 30], [0, 9, 20, 33, 34]),
    "longer than said": ([0, 5, 5, 5, 39], [0, 0, 0, 33, 37]),
    "all far beyond": ([MOST] * 5, [MOST] * 5),
    "all far below": ([LEAST] * 5, [LEAST] * 5),
    "as far apart as can be": ([LEAST, MOST, LEAST, MOST, LEAST], [MOST, LEAST, MOST, LEAST, MOST]),
    "no sequences": ([0], [0]),
    "of queries alone": ([0, MOST, LEAST, 22, 39], RIGHT_K),
    "of keys alone": (RIGHT_Q, [0, LEAST, MOST, 33, 37]),
}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "band": {"is_causal": True, "bottom_right": True, "window_left": 12},
    "dropout": {"dropout_p": 0.3, "is_causal": True},
    "cap": {"row_cap": 0.5, "softcap": 2.0, "visible_bias": False, "const_bias": -1.0},
}


class Padded:
    """Tensors whose first dimension is cut from the middle of longer ones."""

    def __init__(self) -> None:
        self._all: list[tuple[Tensor, Tensor]] = []

    def tensor(self, *shape: int, dtype: torch.dtype, device: torch.device | str = DEVICE) -> Tensor:
        """Of sentinels."""
        whole = torch.full((shape[0] + 2 * PAD, *shape[1:]), SENTINEL, device=device, dtype=dtype)
        inside = torch.zeros(len(whole), dtype=torch.bool, device=device)
        inside[PAD : PAD + shape[0]] = True
        self._all.append((whole, inside))
        return whole[PAD : PAD + shape[0]]

    def like(self, layout: Layout, device: torch.device) -> Tensor:
        """For new_tensor()."""
        count = 1 + sum((n - 1) * stride for n, stride in zip(layout.shape, layout.strides, strict=True))
        return self.tensor(count, dtype=layout.dtype, device=device).as_strided(layout.shape, layout.strides)

    def assert_nothing_outside_is_written(self) -> None:
        for whole, inside in self._all:
            assert (whole[~inside] == SENTINEL).all()


class Sequence(NamedTuple):
    """Part of the packed tensors; expected of it."""

    rows: slice
    keys: slice
    out: Tensor
    sums: Tensor
    grads: tuple[Tensor, ...]
    """Of its rows' queries, its keys, values, and its rows' biases."""


def left_of(ends: list[int], total: int, longest: int) -> list[slice]:
    """What the documentation says is left of sequences."""
    found = []
    for start, stop in itertools.pairwise(ends):
        start, stop = min(max(start, 0), total), min(stop, total)
        found.append(slice(start, max(start, min(stop, start + longest))))
    return found


def are_alone(parts: list[slice], total: int) -> list[bool]:
    """Of each part, whether no other one has some of it."""
    covered = torch.zeros(total, dtype=torch.int64)
    for part in parts:
        covered[part] += 1
    return [bool((covered[part] == 1).all()) for part in parts]


def expected_of(problem: Problem, ends: tuple[list[int], list[int]]) -> list[Sequence]:
    """In float64, sequence by sequence."""
    options, bias, delta, grad_out = problem.options, problem.bias, problem.row_delta, problem.grad_out
    assert bias is not None and delta is not None and grad_out is not None
    group = HEADS // KV_HEADS
    found = []
    parts = (left_of(each, size, most) for each, size, most in zip(ends, (39, 37), LONGEST, strict=True))
    for number, (rows, keys) in enumerate(zip(*parts, strict=True)):
        q, do, d, b = (x[0, :, rows].double() for x in (problem.query, grad_out, delta, bias))
        k, v = (x[0, :, keys].double().repeat_interleave(group, 0) for x in (problem.key, problem.value))
        m, n = q.shape[1], k.shape[1]
        row, col = torch.arange(m, device=DEVICE)[:, None], torch.arange(n, device=DEVICE)
        at = row + (n - m if options.bottom_right else 0)
        seen = torch.ones(m, n, dtype=torch.bool, device=DEVICE)
        if options.is_causal:
            seen &= col <= at
        if options.window_left >= 0:
            seen &= col >= at - options.window_left
        s = options.scale * (q @ k.mT)
        slope = torch.ones_like(s)
        if options.softcap:
            tanh = torch.tanh(s / options.softcap)
            slope, s = 1 - tanh * tanh, options.softcap * tanh
        own = b + options.const_bias
        if options.visible_bias:
            own = own - seen.sum(1, keepdim=True).clamp(min=1).double().log()
        p = torch.where(seen, torch.sigmoid(s + own), 0.0)
        keep = torch.ones_like(p)
        if options.dropout_p:
            assert problem.seed is not None
            first = (number * HEADS + torch.arange(HEADS, device=DEVICE)[:, None, None]) * LONGEST[0]
            kept = reference.kept(problem.seed, first + row, col, options.dropout_p)
            keep = kept.double() / (1 - options.dropout_p)
        total = p.sum(-1, keepdim=True)
        out = (p * keep) @ v / (total.clamp(min=options.row_cap) if options.row_cap else 1.0)
        ds = p * (1 - p) * ((do @ v.mT) * keep - d)
        dx = ds * slope * options.scale
        shared = [x.unflatten(0, (KV_HEADS, group)).sum(1) for x in (dx.mT @ q, (p * keep).mT @ do)]
        found.append(Sequence(rows, keys, out, total, (dx @ k, *shared, ds.sum(-1, keepdim=True))))
    return found


@contextmanager
def padded_scratch(padded: Padded, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the kernels allocate for one another, too."""
    with monkeypatch.context() as patch:
        for module in (row_biases, dropout, sums):
            patch.setattr(module, "new_tensor", padded.like)
        yield


def check(
    ends: tuple[list[int], list[int]],
    features: dict[str, Any],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    kernels: tuple[Any, Any] = (forward, backward),
) -> None:
    torch.manual_seed(0)
    padded = Padded()
    options = Options(0.25, **features)

    def rows(total: int, heads: int, dim: int = DIM, *, kind: torch.dtype = dtype, drawn: bool = True) -> Tensor:
        tensor = padded.tensor(total, heads, dim, dtype=kind)
        if drawn:
            tensor.copy_(torch.randn(total, heads, dim))
        return tensor.transpose(0, 1)[None]

    query, key, value, grad_out = rows(39, HEADS), rows(37, KV_HEADS), rows(37, KV_HEADS), rows(39, HEADS)
    bias, delta = rows(39, HEADS, 1), rows(39, HEADS, 1, kind=torch.float32)
    out, row_sums = rows(39, HEADS, drawn=False), rows(39, HEADS, 1, kind=torch.float32, drawn=False)
    grads = [rows(total, heads, drawn=False) for total, heads in ((39, HEADS), (37, KV_HEADS), (37, KV_HEADS))]
    grads.append(rows(39, HEADS, 1, drawn=False))
    seed = torch.tensor([3], device=DEVICE) if options.dropout_p else None
    cu_seqlens = [torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in ends]
    packed = Packed(*cu_seqlens, *LONGEST)
    problem = Problem(query, key, value, bias, None, seed, options, packed, out=out, row_sums=row_sums)
    backwards = Problem(query, key, value, bias, None, seed, options, packed, grad_out=grad_out, row_delta=delta)
    backwards.output_mask, backwards.grads = (True, True, True, True, False), (*grads, None)
    with padded_scratch(padded, monkeypatch):
        kernels[0].forward(problem)
        kernels[1].backward(backwards)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    padded.assert_nothing_outside_is_written()

    sequences = expected_of(backwards, ends)
    own_rows = are_alone([each.rows for each in sequences], 39)
    own_keys = are_alone([each.keys for each in sequences], 37)
    bound = {torch.bfloat16: 5e-2, torch.float16: 5e-3, torch.float32: 1e-3}[dtype]
    for each, has_own_rows, has_own_keys in zip(sequences, own_rows, own_keys, strict=True):
        pairs = []
        if has_own_rows:
            of_rows = (out, each.out), (row_sums, each.sums), (grads[0], each.grads[0]), (grads[3], each.grads[3])
            pairs += [(result[0, :, each.rows], expected) for result, expected in of_rows]
        if has_own_rows and has_own_keys:  # their gradients need biases of rows, which are in memory
            of_keys = zip(grads[1:3], each.grads[1:3], strict=True)
            pairs += [(result[0, :, each.keys], expected) for result, expected in of_keys]
        for result, expected in pairs:
            torch.testing.assert_close(result.double(), expected, rtol=bound, atol=bound)


@pytest.mark.skipif(CUDA or INTERPRETED, reason="a GPU runs the kernels themselves")
def test_in_the_interpreter() -> None:
    run_interpreted(__file__, 0)


@pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter, in a process of its own")
@pytest.mark.parametrize("wrong", WRONG)
def test_interpreted_wrong_ends_reach_nothing_outside_shard0(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features = list(FEATURES)[list(WRONG).index(wrong) % len(FEATURES)]
    check(WRONG[wrong], FEATURES[features], torch.float32, monkeypatch)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_ends_reach_nothing_outside(
    wrong: str, features: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(WRONG[wrong], FEATURES[features], dtype, monkeypatch)
    check(WRONG[wrong], FEATURES[features], dtype, monkeypatch, (dispatch, dispatch))
