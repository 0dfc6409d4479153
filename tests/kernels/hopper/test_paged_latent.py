"""Latent attention in pages: Triton's kernel compiles for Hopper GPUs as it must to be fast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from paged import Paged

try:
    from hopper_compiles import assert_compiles, source_of
    from paged_kernel import problem_of
except ImportError as error:
    pytest.skip(f"this Triton has no Gluon, or another one: {error}", allow_module_level=True)

from sigswap.kernels.host.layout import layout_of
from sigswap.kernels.triton import paged as kernel


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "rows", "spilled"),
    [(16, 1, 0), (32, 1, 0), (16, 3, 0), (128, 1, 128), (128, 3, 0)],  # those of 128 are outside of the loop
)
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.usefixtures("no_memory")
def test_it_spills_no_registers(page_size: int, heads: int, rows: int, spilled: int, tmp_path: Path) -> None:
    sequences, places = 64, 8192 // page_size

    def numbers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    query = torch.empty(sequences * rows, heads, 576, dtype=torch.bfloat16, device="meta")
    cache = torch.empty(sequences * places, page_size, 1, 576, dtype=torch.bfloat16, device="meta")
    table, lengths, ends = numbers(sequences, places), numbers(sequences), numbers(sequences + 1)
    call = Paged(query, cache, cache[..., :512], table, lengths, ends, rows, 8192)
    problem = problem_of(call, scale=576**-0.5, is_causal=True)
    assert kernel.supports(problem)
    out = torch.empty(1, heads, sequences * rows, 512, dtype=torch.bfloat16, device="meta")
    plan = kernel._plan(problem.signature, layout_of(out), layout_of(table), layout_of(ends), rows, 8192, None)
    assert_compiles(source_of(plan.launch), plan.launch._options, spilled, tmp_path)
