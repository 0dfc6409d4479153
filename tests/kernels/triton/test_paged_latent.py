"""Latent attention in pages, whose value is a view of key, against float64: on a GPU or in Triton's interpreter."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import random
from typing import Any

import pytest
import torch
from h100 import pretended
from in_interpreter import run_interpreted
from paged import Paged, oracle, paged, run
from torch import Tensor

from sigswap.kernels.op import paged as op

pytest.importorskip("triton")

from paged_kernel import WRONG, check, check_wrong, problem_of

from sigswap.kernels import dispatch, reference
from sigswap.kernels.triton import paged as kernel

CUDA = torch.cuda.is_available()
ON_HOPPER = CUDA and torch.cuda.get_device_capability()[0] == 9
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"

in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter, in a process of its own")
on_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")

WIDTHS = (576, 512), (576, 512), (576, 500), (512, 512), (400, 264), (320, 256), (257, 200)
"""Of key and of value."""


def latent(rows: list[int], keys: list[int], **more: Any) -> Paged:
    sizes: dict[str, Any] = {"heads": 16, "kv_heads": 1, "head_dim": 576, "value_dim": 512, "page_size": 64}
    return paged(rows, keys, latent=True, device=DEVICE, **(sizes | more))


def random_call(index: int) -> tuple[Paged, dict[str, Any]]:
    """The call number index, and the public function's options: sizes and features are drawn from it."""
    draw = random.Random(index)
    torch.manual_seed(index)
    choice = draw.choice
    row_counts = choice(((1,), (1,), (0, 1, 3), (1, 2, 5)) if CUDA else ((1,), (0, 1, 3)))
    rows = [choice(row_counts) for _ in range(choice((1, 2, 5) if CUDA else (1, 3)))]
    more = (0, 1, 30, 300, 1000, 5000) if CUDA else (0, 1, 30, 70)
    keys = [0 if draw.random() < 0.1 else m + choice(more) for m in rows]
    kv_heads, (head_dim, value_dim) = choice((1, 1, 1, 2)), choice(WIDTHS)
    call = latent(
        rows,
        keys,
        page_size=choice((1, 16, 16, 48, 64, 64, 128, 256)),
        heads=kv_heads * choice((1, 3, 16, 16, 20, 32, 70, 128) if CUDA else (1, 3, 16, 20, 70)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=choice((torch.bfloat16, torch.float16)) if CUDA else torch.float16,
        heads_first=draw.random() < 0.3,
    )
    total, heads = call.query.shape[:2]
    bias: Tensor | float | None = choice((None, None, -1.5))
    shape = choice((None, None, (heads,), (total, 1), (total, heads)))
    if shape is not None:
        bias = (torch.randn(shape, device=DEVICE) - 1).to(call.query.dtype)
    return call, {
        "bias": bias,
        "is_causal": draw.random() < 0.6,
        "softcap": choice((None, None, 2.0)),
        "window": choice((None, None, (5, -1), (100, 0), (0, 30), (-1, 4))),
        "row_cap": choice((None, None, 0.2)),
    }


PLAIN: dict[str, Any] = {"bias": None, "is_causal": True, "softcap": None, "window": None, "row_cap": None}


@pytest.mark.slow
@pytest.mark.skipif(CUDA or INTERPRETED, reason="a GPU runs the kernel itself")
@pytest.mark.parametrize("shard", range(2))
def test_in_the_interpreter(shard: int) -> None:
    run_interpreted(__file__, shard)


@in_interpreter
@pytest.mark.parametrize("index", [pytest.param(i, id=f"shard{i % 2}-{i}") for i in range(20)])
def test_interpreted(index: int) -> None:
    check(*random_call(index), (None, 1, 3)[index % 3])


@in_interpreter
@pytest.mark.parametrize("rows", [[1, 1, 1], [3, 0, 1, 1, 1]], ids=["alike-shard0", "apart-shard1"])
def test_interpreted_several_tiles_of_a_sequence(rows: list[int]) -> None:
    """As many tiles of each sequence, and a place for each tile that there may be."""
    check(latent(rows, [40, 9, 33, 2, 64][: len(rows)], heads=70, dtype=torch.float16), PLAIN, None)


@in_interpreter
@pytest.mark.parametrize("wrong", [pytest.param(each, id=f"{each}-shard{i % 2}") for i, each in enumerate(WRONG)])
def test_interpreted_wrong_numbers_reach_nothing_outside(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for page_size, heads, splits in ((8, 64, 1), (64, 4, 2)):
        check_wrong(wrong, page_size, heads, torch.float16, splits, monkeypatch, latent=True)


@in_interpreter
def test_interpreted_calls_are_dispatched_shard0(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value with memory of its own is plain PyTorch, as is what is wider."""
    monkeypatch.setattr(dispatch, "_obstacle", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))  # no Hopper GPU
    monkeypatch.setattr(dispatch, "_on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(op, "implementation_for", lambda is_cuda: dispatch)
    ran = []
    forward = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda problem: (ran.append(problem.value.shape[3]), forward(problem))[1])
    call = latent([1, 2], [40, 9], dtype=torch.float16)
    copied = call._replace(value_cache=call.value_cache.clone())
    for each, expected in ((call, [512]), (copied, [])):
        out = run(each, is_causal=True, enable_gqa=True)
        assert ran == expected
        ran.clear()
        torch.testing.assert_close(out.double(), oracle(call, is_causal=True), rtol=4e-3, atol=4e-3)


@pytest.mark.skipif(CUDA, reason="a GPU's own choice is tested there")
@pytest.mark.parametrize(
    ("widths", "more", "chosen"),
    [
        ((576, 512), {}, kernel),
        ((320, 200), {}, kernel),
        ((576, 512), {"dtype": torch.float32}, reference),
        ((576, 200), {}, reference),  # of which a tile of keys is more than twice as wide
        ((577, 512), {}, reference),
        ((576, 513), {}, reference),
    ],
)
def test_which_latent_attention_it_is_chosen_for(
    widths: tuple[int, int], more: dict[str, Any], chosen: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """And nobody is told that a kernel runs in plain PyTorch which does not: the rows are many enough that pages would
    be copied for another one."""
    dispatch._say_once.cache_clear()
    sizes: dict[str, Any] = {"head_dim": widths[0], "value_dim": widths[1], "dtype": torch.bfloat16}
    problem = problem_of(latent([300], [301], **(sizes | more)), scale=1.0)
    with pretended(), caplog.at_level(logging.WARNING, "sigswap"):
        assert dispatch.in_packed_sequences(problem) is problem
        assert dispatch.chosen(dispatch.PAGED_FORWARD, problem) is chosen
    assert ("plain PyTorch" in caplog.text) == (chosen is reference)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("index", range(100))
def test_random_calls_on_a_gpu(index: int) -> None:
    check(*random_call(index), (None, None, 1, 3)[index % 4])


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("heads", [16, 32, 128])
@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_as_servers_decode_on_a_gpu(page_size: int, heads: int, rows: int, dtype: torch.dtype) -> None:
    """64 sequences of some 8,000 keys."""
    draw = random.Random(rows)
    keys = [draw.randint(7000, 8192) for _ in range(64)]
    call = latent([rows] * 64, keys, page_size=page_size, heads=heads, dtype=dtype)
    check(call, PLAIN, None)
    problem = problem_of(call, scale=576**-0.5, is_causal=True)
    chosen = dispatch.chosen(dispatch.PAGED_FORWARD, problem)
    assert (chosen is kernel) == (not ON_HOPPER or heads <= 32 or page_size < 64)
    out = run(call, is_causal=True, enable_gqa=True)
    assert torch.equal(out, chosen.forward(problem)[0].transpose(0, 1))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("splits", [None, 1, 2])
def test_sequences_of_unlike_rows_on_a_gpu(splits: int | None, heads: int) -> None:
    draw = random.Random(heads)
    rows = [draw.choice((0, 1, 1, 1, 2)) for _ in range(300)]
    rows[3], rows[-2] = 40, 33
    keys = [m + draw.choice((0, 0, 3, 900)) for m in rows]
    check(latent(rows, keys, heads=heads, dtype=torch.bfloat16), PLAIN | {"window": (50, -1), "row_cap": 0.2}, splits)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("page_size", [16, 64])
def test_a_chunk_of_a_prefill_on_a_gpu(page_size: int, heads: int) -> None:
    """Its pages are not copied to packed sequences."""
    call = latent([300, 700], [2000, 700], page_size=page_size, heads=heads, dtype=torch.bfloat16)
    expected = oracle(call, is_causal=True)
    out = run(call, is_causal=True, enable_gqa=True)
    assert (out.double() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page_size", [8, 64])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_numbers_reach_nothing_outside_on_a_gpu(
    wrong: str, page_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for splits, heads in itertools.product((1, 2, 5), (4, 16, 128)):
        check_wrong(wrong, page_size, heads, dtype, splits, monkeypatch, latent=True)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("page_size", [16, 64])
def test_a_cuda_graph_decodes_as_sequences_grow(page_size: int) -> None:
    """The same launches for other keys and lengths, up to the longest that was said when they were captured."""
    longest = latent([1, 1, 2], [3000, 64, 65], page_size=page_size, dtype=torch.bfloat16, unread=0.0)

    def attend() -> Tensor:
        return run(longest, is_causal=True, enable_gqa=True)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for keys in ([1, 64, 2], [700, 1, 65], [3000, 64, 65]):
        longest.key_cache.copy_(torch.randn_like(longest.key_cache))
        longest.cache_seqlens.copy_(torch.tensor(keys))
        graph.replay()
        expected = oracle(longest, is_causal=True)
        assert (out.double() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("backend", ["inductor", "sigswap"])
def test_compiled_on_a_gpu(backend: str) -> None:
    """Value is a view of key in there, too."""
    call = latent([1, 3], [200, 133], dtype=torch.bfloat16)

    def attend(query: Tensor, cache: Tensor, *numbers: Any) -> Tensor:
        return run(Paged(query, cache, cache[..., :512], *numbers), is_causal=True, enable_gqa=True)

    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    assert torch.equal(compiled(*call[:2], *call[3:]), run(call, is_causal=True, enable_gqa=True))


@pytest.mark.gpu
@on_gpu
def test_a_copied_value_goes_to_another_kernel_on_a_gpu() -> None:
    """The choice is kept for problems that are equal but for where value lies."""
    call = latent([1, 3], [200, 133], dtype=torch.bfloat16, unread=0.0)
    problem = problem_of(call, scale=576**-0.5)
    for value, chosen in ((problem.value, kernel), (torch.randn_like(problem.key)[..., :512], reference)):
        other = dataclasses.replace(problem, value=value)
        assert dispatch.chosen(dispatch.PAGED_FORWARD, other) is chosen
