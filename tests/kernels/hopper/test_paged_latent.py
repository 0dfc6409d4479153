"""Latent attention in pages on Hopper GPUs: Triton's kernel compiles as it must to be fast, and the one in Gluon is
compared with float64 on a GPU. That it compiles is in test_decode_wide.py."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from h100 import pretended
from paged import Paged, paged, run

try:
    from hopper_compiles import assert_compiles, source_of
    from paged_kernel import WRONG, check, check_wrong, problem_of
except ImportError as error:
    pytest.skip(f"this Triton has no Gluon, or another one: {error}", allow_module_level=True)

from sigswap.kernels import dispatch, reference
from sigswap.kernels.hopper import paged_wide
from sigswap.kernels.host.layout import layout_of
from sigswap.kernels.triton import paged as kernel

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
DEVICE = "cuda" if ON_HOPPER else "cpu"

on_gpu = pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
PLAIN: dict[str, Any] = {"bias": None, "is_causal": True, "softcap": None, "window": None, "row_cap": None}


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


def latent(rows: list[int], keys: list[int], **more: Any) -> Paged:
    sizes: dict[str, Any] = {"heads": 128, "kv_heads": 1, "head_dim": 576, "value_dim": 512, "page_size": 64}
    return paged(rows, keys, latent=True, device=DEVICE, **(sizes | {"dtype": torch.bfloat16} | more))


@pytest.mark.parametrize(
    ("more", "chosen"),
    [
        ({}, paged_wide),
        ({"page_size": 256, "heads": 33, "head_dim": 520}, paged_wide),
        ({"heads": 66, "kv_heads": 2, "dtype": torch.float16}, paged_wide),
        ({"heads": 32}, kernel),
        ({"page_size": 32}, kernel),
        ({"page_size": 96}, kernel),
        ({"value_dim": 448}, kernel),
        ({"head_dim": 512}, kernel),
        ({"dtype": torch.float32}, reference),
    ],
)
def test_which_latent_attention_it_is_chosen_for(more: dict[str, Any], chosen: Any) -> None:
    problem = problem_of(latent([1, 2], [70, 3], **more), scale=1.0)
    with pretended():
        assert dispatch.chosen(dispatch.PAGED_FORWARD, problem) is chosen


def test_a_soft_cap_and_a_copied_value_are_left_to_others() -> None:
    call = latent([1, 2], [70, 3])
    copied = dataclasses.replace(problem_of(call, scale=1.0), value=call.value_cache.clone().transpose(1, 2))
    with pretended():
        assert dispatch.chosen(dispatch.PAGED_FORWARD, problem_of(call, scale=1.0, softcap=2.0)) is kernel
        assert dispatch.chosen(dispatch.PAGED_FORWARD, copied) is reference


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("index", range(100))
def test_random_calls_on_a_gpu(index: int) -> None:
    draw = random.Random(index)
    torch.manual_seed(index)
    choice = draw.choice
    row_counts = choice(((1,), (1,), (0, 1, 3), (1, 2, 5), (1, 40)))
    rows = [choice(row_counts) for _ in range(choice((1, 2, 5, 300)))]
    keys = [0 if draw.random() < 0.1 else m + choice((0, 1, 30, 300, 1000, 5000)) for m in rows]
    kv_heads = choice((1, 1, 1, 2))
    call = latent(
        rows,
        keys,
        page_size=choice((64, 64, 128, 192, 256)),
        heads=kv_heads * choice((33, 64, 70, 128)),
        kv_heads=kv_heads,
        head_dim=choice((576, 576, 520)),
        dtype=choice((torch.bfloat16, torch.float16)),
        heads_first=draw.random() < 0.3,
    )
    total, heads = call.query.shape[:2]
    bias: Any = choice((None, None, -1.5))
    shape = choice((None, None, (heads,), (total, 1), (total, heads)))
    if shape is not None:
        bias = (torch.randn(shape, device="cuda") - 1).to(call.query.dtype)
    window, row_cap = choice((None, None, (5, -1), (100, 0), (0, 30), (-1, 4))), choice((None, None, 0.2))
    options = {"bias": bias, "is_causal": draw.random() < 0.6, "softcap": None, "window": window, "row_cap": row_cap}
    check(call, options, (None, None, 1, 3)[index % 4], paged_wide)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_numbers_reach_nothing_outside(
    wrong: str, splits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_wrong(wrong, 64, 64, dtype, splits, monkeypatch, latent=True, kernel=paged_wide)


@pytest.mark.gpu
@on_gpu
def test_a_graph_goes_by_the_numbers_that_are_there_when_it_is_replayed() -> None:
    call = latent([1] * 8, [500, 700, 64, 65, 1, 300, 129, 1000])
    run(call, is_causal=True, enable_gqa=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(call, is_causal=True, enable_gqa=True)
    call.cache_seqlens.copy_(torch.tensor([400, 699, 1, 65, 1, 200, 128, 1000], dtype=torch.int32))
    graph.replay()
    assert torch.equal(out, run(call, is_causal=True, enable_gqa=True))
    check(call, PLAIN, None, paged_wide)
