"""Results go to memory 16 bytes at once, where their rows allow it: in what Triton compiles for a Hopper GPU that need
not be there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

try:
    from hopper_compiles import source_of
except ImportError as error:
    pytest.skip(f"this Triton has no Gluon, or another one: {error}", allow_module_level=True)

from sigswap.kernels.host.launch import Launch
from sigswap.kernels.host.layout import layout_of
from sigswap.kernels.host.problem import Options, Problem
from sigswap.kernels.host.results import gradient_arguments, gradients_for
from sigswap.kernels.triton import backward, decode, decode_wide, short_masked
from tests.support.h100 import pretended

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


@pytest.fixture(autouse=True)
def hopper() -> Iterator[None]:
    with pretended():
        yield


def rows(batch: int, heads: int, length: int, dim: int) -> Tensor:
    """That take no memory, stored as [B, N, H, D]."""
    return torch.empty(batch, length, heads, dim, dtype=torch.bfloat16, device="meta").transpose(1, 2)


def widths_of_stores(launch: Launch) -> set[int]:
    """Bytes that a thread stores at once."""
    options = dict(launch._options)
    ptx = triton.compile(source_of(launch), target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    stores = re.findall(r"st\.global(?:\.v(\d))?\.b(\d+)", ptx)
    assert stores
    return {int(count or 1) * int(bits) // 8 for count, bits in stores}


def with_gradients(dim: int, length: int = 200, mask: Tensor | None = None) -> tuple[Problem, Any]:
    """Of all but the mask; and their layouts."""
    tensors = [rows(4, 4, length, dim) for _ in range(4)]
    needed = True, True, True, False, False
    problem = Problem(*tensors[:3], None, mask, None, Options(0.1), grad_out=tensors[3], output_mask=needed)
    return problem, gradients_for(problem)[2]


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("dim", "bytes_at_once"), [(64, {16}), (40, {16}), (36, {2, 4})])
def test_decoding(dim: int, bytes_at_once: set[int], splits: int) -> None:
    problem = Problem(rows(1, 8, 1, dim), *(rows(1, 2, 1024, dim) for _ in range(2)), None, None, None, Options(0.1))
    plan = decode._plan(problem.signature, False, splits)
    assert widths_of_stores(plan.launch) <= bytes_at_once


def test_decoding_of_wide_heads() -> None:
    key = torch.empty(2, 1, 4096, 576, dtype=torch.bfloat16, device="meta")
    query = torch.empty(2, 16, 1, 576, dtype=torch.bfloat16, device="meta")
    problem = Problem(query, key, key[..., :512], None, None, None, Options(0.1))
    assert widths_of_stores(decode_wide._plan(problem.signature, True, False, None).launch) == {16}


@pytest.mark.parametrize(("dim", "bytes_at_once"), [(64, 16), (72, 16), (36, 2)])
def test_gradients(dim: int, bytes_at_once: int) -> None:
    problem, layouts = with_gradients(dim)
    grad_out = layout_of(problem.grad_out)
    plan = backward._plan(problem.signature, grad_out, None, layouts, None, None, None, 3)
    assert plan.keys is not None and plan.rows is not None
    assert widths_of_stores(plan.keys) == widths_of_stores(plan.rows) == {bytes_at_once}


def test_gradients_of_short_sequences_under_a_mask() -> None:
    mask = torch.empty(2, 4, 49, 49, dtype=torch.bfloat16, device="meta")
    problem, layouts = with_gradients(32, 49, mask)
    plan = short_masked._plan_backward(problem.signature, layout_of(problem.grad_out), None, layouts, 16)
    assert widths_of_stores(plan.launch) == {16}


def test_strides_of_gradients_are_in_units_where_all_allow_it() -> None:
    whole, odd = layout_of(torch.empty(2, 3, 5, 16)), layout_of(torch.empty(2, 3, 5, 20)[..., :16])
    arguments = gradient_arguments({"WIDE": False}, {"dq": whole, "dk": None})
    assert arguments == {
        **{"stride_dq_b": 30, "stride_dq_h": 10, "stride_dq_n": 2},
        **{"stride_dk_b": 0, "stride_dk_h": 0, "stride_dk_n": 0},
        **{"GRAD_UNIT": 8, "WIDE": False},
    }
    arguments = gradient_arguments({"WIDE": True}, {"dq": whole, "dk": odd})
    assert [arguments[f"stride_{name}_n"] for name in ("dq", "dk")] == [16, 20]
    assert arguments["GRAD_UNIT"] == 1 and arguments["WIDE"]
