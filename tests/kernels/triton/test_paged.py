"""The Triton kernel of keys and values in pages against float64, on a GPU or in Triton's interpreter: random problems,
and wrong numbers in the tensors that say where keys are, with which it stays within the tensors."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from typing import Any

import pytest
import torch
from in_interpreter import run_interpreted
from paged import Paged, oracle, paged, run, sequences
from torch import Tensor

from sigswap.kernels.op import paged as op

pytest.importorskip("triton")

from paged_kernel import LEAST, MOST, SENTINEL, WRONG, check, check_wrong, problem_of

from sigswap.kernels import dispatch
from sigswap.kernels.host.problem import Problem
from sigswap.kernels.triton import forward as packed_kernel
from sigswap.kernels.triton import paged as kernel
from sigswap.kernels.triton import pages as page_copies

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"

in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter, in a process of its own")
on_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")


def random_call(index: int) -> tuple[Paged, dict[str, Any]]:
    """The call number index, and the public function's options: sizes and features are drawn from it."""
    draw = random.Random(index)
    torch.manual_seed(index)
    choice = draw.choice
    large = DEVICE == "cuda"
    dims = (16, 24, 40, 64, 64, 72, 80, 128, 128, 192, 256) if large else (16, 24, 40)
    dtypes = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32) if large else (torch.float32, torch.float16)
    more = (0, 1, 30, 300, 1000, 5000) if large else (0, 1, 7, 30, 70)
    row_counts = choice(((1,), (1,), (1, 2, 5), (0, 1, 40), (1, 17, 130))) if large else choice(((1,), (0, 1, 3, 9)))
    rows = [choice(row_counts) for _ in range(choice((1, 2, 5) if large else (1, 3)))]
    keys = [0 if draw.random() < 0.1 else m + choice(more) for m in rows]
    head_dim, kv_heads = choice(dims), choice((1, 2))
    call = paged(
        rows,
        keys,
        page_size=choice((1, 3, 16, 16, 64, 128, 100, 256) if large else (1, 3, 16, 64, 128)),
        heads=kv_heads * choice((1, 1, 3, 4, 8)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=head_dim if draw.random() < 0.7 else choice(dims),
        dtype=choice(dtypes),
        device=DEVICE,
        heads_first=draw.random() < 0.3,
    )
    total, heads = call.query.shape[:2]
    shape = choice((None, None, None, (heads,), (total, 1), (total, heads)))
    bias: Tensor | float | None = choice((None, None, None, -1.5))
    if shape is not None:
        bias = (torch.randn(shape, device=DEVICE) - 1).to(call.query.dtype)
    options = {
        "bias": bias,
        "is_causal": draw.random() < 0.6,
        "softcap": choice((None, None, 2.0)),
        "window": choice((None, None, (5, -1), (100, 0), (0, 30), (-1, 4))),
        "row_cap": choice((None, None, 0.2)),
    }
    return call, options


def mixed_call(count: int) -> tuple[Paged, dict[str, Any]]:
    """Of as many sequences; most decode, two have chunks of several tiles of rows."""
    torch.manual_seed(0)
    draw = random.Random(count)
    rows = [draw.choice((0, 1, 1, 1, 2)) for _ in range(count)]
    rows[3], rows[-2] = 40, 33
    keys = [m + draw.choice((0, 0, 3, 9)) for m in rows]
    sizes: dict[str, Any] = {"heads": 4, "kv_heads": 1, "head_dim": 16, "value_dim": 16, "page_size": 8}
    call = paged(rows, keys, dtype=torch.float32, device=DEVICE, **sizes)
    return call, {"bias": None, "is_causal": True, "softcap": None, "window": (20, -1), "row_cap": 0.2}


@pytest.mark.skipif(CUDA or INTERPRETED, reason="a GPU runs the kernel itself")
@pytest.mark.parametrize("shard", range(2))
def test_in_the_interpreter(shard: int) -> None:
    run_interpreted(__file__, shard)


@in_interpreter
@pytest.mark.parametrize("index", [pytest.param(i, id=f"shard{i % 2}-{i}") for i in range(24)])
def test_interpreted(index: int) -> None:
    check(*random_call(index), (None, 1, 3)[index % 3])


@in_interpreter
def test_interpreted_more_sequences_than_are_looked_at_at_once_shard1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_SEQUENCES_AT_ONCE", type(kernel._SEQUENCES_AT_ONCE)(8))
    check(*mixed_call(20), None)


@in_interpreter
@pytest.mark.parametrize("wrong", [pytest.param(each, id=f"{each}-shard{i % 2}") for i, each in enumerate(WRONG)])
def test_interpreted_wrong_numbers_reach_nothing_outside(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for page_size, heads, splits in ((8, 64, 1), (128, 4, 2)):
        check_wrong(wrong, page_size, heads, torch.float32, splits, monkeypatch)


@in_interpreter
def test_interpreted_calls_are_dispatched_shard0(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value of few columns is copied first, and the rest runs as it is; what no kernel takes is plain PyTorch."""
    monkeypatch.setattr(dispatch, "_obstacle", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))  # no Hopper GPU
    monkeypatch.setattr(dispatch, "_on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(op, "implementation_for", lambda is_cuda: dispatch)
    ran = []
    forward = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda problem: (ran.append(problem.value.shape[3]), forward(problem))[1])
    for value_dim, dtype, expected in ((5, torch.float16, [8]), (16, torch.float16, [16]), (5, torch.float64, [])):
        call = paged([1, 3], [20, 9], value_dim=value_dim, dtype=dtype)
        out = run(call, is_causal=True, enable_gqa=True)
        assert ran == expected
        ran.clear()
        bound = 2e-3 if dtype == torch.float16 else 1e-9
        torch.testing.assert_close(out.double(), oracle(call, is_causal=True), rtol=bound, atol=bound)


@in_interpreter
@pytest.mark.parametrize("page_size", [pytest.param(n, id=f"shard{i % 2}-{n}") for i, n in enumerate((1, 16, 64, 100))])
def test_interpreted_pages_become_packed_sequences(page_size: int) -> None:
    call = paged([1, 0, 2, 3], [70, 130, 0, 5], page_size=page_size, head_dim=24, value_dim=40, dtype=torch.float16)
    assert_copied(call)
    # Of a sequence that is longer than was said what was said; pages that there are not are others.
    longer = call._replace(cache_seqlens=torch.tensor([MOST, LEAST, 0, 300], dtype=torch.int32))
    most = min(256, call.block_table.shape[1] * page_size)
    assert copied_ends(longer) == [most, most, most, 2 * most]


def copied_ends(call: Paged) -> list[int]:
    """Where the copies of each sequence's keys end, behind which nothing was written."""
    problem = problem_of(call, scale=1.0)
    into = page_copies.packed(problem)
    for tensor in (into.key, into.value):
        tensor.fill_(SENTINEL)
    page_copies.copy_pages(problem, into)
    assert into.packed is not None
    assert into.key.shape[2] == len(call.cache_seqlens) * -(-call.max_seqlen_k // 256) * 256
    end = int(into.packed.cu_k[-1])
    assert (into.key[:, :, end:] == SENTINEL).all() and (into.value[:, :, end:] == SENTINEL).all()
    return into.packed.cu_k[1:].tolist()


def assert_copied(call: Paged) -> None:
    problem = problem_of(call, scale=1.0)
    into = page_copies.packed(problem)
    page_copies.copy_pages(problem, into)
    assert into.packed is not None and into.pages is None
    ends = into.packed.cu_k.tolist()
    assert ends == [0, *itertools.accumulate(call.cache_seqlens.tolist())]
    for (start, end), (_, key, value) in zip(itertools.pairwise(ends), sequences(call), strict=True):
        assert torch.equal(into.key[0, :, start:end], key.transpose(0, 1))
        assert torch.equal(into.value[0, :, start:end], value.transpose(0, 1))


@in_interpreter
def test_interpreted_many_rows_are_packed_sequences_shard1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernel of packed sequences stands for that of Hopper GPUs."""
    monkeypatch.setattr(dispatch, "_obstacle", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))  # no Hopper GPU
    monkeypatch.setattr(dispatch, "_on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(dispatch, "_usable", lambda names, device: [("hopper.forward", packed_kernel)])
    monkeypatch.setattr(dispatch, "PACKED_ROWS", 8)
    monkeypatch.setattr(op, "implementation_for", lambda is_cuda: dispatch)
    call = paged([20, 0, 9], [33, 2, 9], page_size=8, head_dim=16, value_dim=16, dtype=torch.float16)
    out = run(call, is_causal=True, window=(11, 0), enable_gqa=True)
    expected = oracle(call, is_causal=True, window=(11, 0))
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("why", ["memory", "no pages", "another GPU"])
def test_nothing_is_made_for_copies_that_are_not_to_be(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Made(Exception):
        pass

    def made(problem: Problem) -> Problem:
        raise Made

    monkeypatch.setattr(dispatch, "_usable", lambda names, device: [("hopper.forward", packed_kernel)])
    monkeypatch.setattr(page_copies, "packed", made)
    call = paged([300, 400], [600, 500], page_size=16, head_dim=64, value_dim=32, dtype=torch.float16)
    with pytest.raises(Made):
        dispatch.in_packed_sequences(problem_of(call, scale=1.0))
    if why == "memory":  # of two sequences of 2 heads, 96 columns and 2 bytes
        call = call._replace(max_seqlen_k=dispatch.MOST_COPIED // (2 * 2 * 96 * 2) + 1)
    if why == "no pages":
        call = call._replace(key_cache=call.key_cache[:0], value_cache=call.value_cache[:0])
    if why == "another GPU":
        monkeypatch.setattr(dispatch, "_usable", lambda names, device: [])
    problem = problem_of(call, scale=1.0)
    assert dispatch.in_packed_sequences(problem) is problem


PREFILLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window": (100, -1)},
    "row cap": {"is_causal": True, "row_cap": 0.5},
    "soft cap": {"is_causal": True, "softcap": 2.0},
    "bias": {"bias": -3.0},
}


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("features", PREFILLS)
@pytest.mark.parametrize(
    ("head_dim", "dtype", "page_size"), [(128, torch.bfloat16, 16), (64, torch.float16, 64), (192, torch.bfloat16, 256)]
)
def test_chunks_of_a_prefill(head_dim: int, dtype: torch.dtype, page_size: int, features: str) -> None:
    torch.manual_seed(head_dim)
    sizes: dict[str, Any] = {"heads": 8, "head_dim": head_dim, "value_dim": head_dim, "page_size": page_size}
    for rows, keys in (([700, 300, 0], [2000, 300, 5]), ([513], [1300]), ([260, 1, 600], [270, 900, 777])):
        call = paged(rows, keys, dtype=dtype, device=DEVICE, **sizes)
        out = run(call, enable_gqa=True, **PREFILLS[features])
        expected = oracle(call, **PREFILLS[features])
        assert (out.double() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("page_size", [16, 100])
def test_pages_are_copied_on_a_gpu(page_size: int) -> None:
    call = paged([300], [5000], page_size=page_size, head_dim=128, value_dim=96, dtype=torch.bfloat16, device=DEVICE)
    assert_copied(call)
    places = call.block_table.shape[1] * page_size  # fewer than there is room for
    for length, end in ((MOST, places), (LEAST, 0), (5001, 5001)):
        other = call._replace(cache_seqlens=torch.tensor([length], dtype=torch.int32, device=DEVICE))
        assert copied_ends(other) == [end]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("index", range(150))
def test_random_calls_on_a_gpu(index: int) -> None:
    check(*random_call(index), (None, None, 1, 3)[index % 4])


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("count", [20, 256, 1000])
@pytest.mark.parametrize("splits", [None, 1, 2])
def test_many_sequences_on_a_gpu(count: int, splits: int | None) -> None:
    check(*mixed_call(count), splits)


@pytest.mark.gpu
@on_gpu
def test_numbers_anywhere_in_memory() -> None:
    """Calls of one layout, but for where its tensors of numbers begin."""
    call, options = mixed_call(300)
    expected = run(call, enable_gqa=True, **options)
    for offset in (1, 2, 3, 4):
        moved = []
        for numbers in call[3:6]:
            memory = torch.empty(numbers.numel() + offset, dtype=torch.int32, device=DEVICE)
            moved.append(memory[offset:].view(numbers.shape).copy_(numbers))
        assert torch.equal(run(Paged(*call[:3], *moved, *call[6:]), enable_gqa=True, **options), expected)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("page_size", [8, 128])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_numbers_reach_nothing_outside(
    wrong: str, page_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for splits, heads in itertools.product((1, 2, 5), (4, 64)):
        check_wrong(wrong, page_size, heads, dtype, splits, monkeypatch)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("page_size", [16, 64])
def test_a_cuda_graph_decodes_as_sequences_grow(page_size: int) -> None:
    """The same launches for other lengths, rows of each sequence and pages, up to the longest that was said when they
    were captured."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"page_size": page_size, "dtype": torch.bfloat16, "device": DEVICE, "unread": 0.0}
    sizes |= {"heads": 8, "head_dim": 128, "value_dim": 128}
    lengths = ([1, 1, 2], [1, 300, 2]), ([2, 1, 1], [17, 301, 2000]), ([1, 2, 1], [3000, 64, 65])
    calls = [paged(rows, keys, **sizes) for rows, keys in lengths]
    pages, places = (max(each[index].shape[dim] for each in calls) for index, dim in ((1, 0), (3, 1)))
    still = Paged(
        torch.zeros_like(calls[0].query),
        *(torch.zeros(pages, *calls[0][side].shape[1:], dtype=torch.bfloat16, device=DEVICE) for side in (1, 2)),
        torch.zeros(3, places, dtype=torch.int32, device=DEVICE),
        *(torch.zeros_like(each) for each in calls[0][4:6]),
        2,
        3000,
    )

    def load(call: Paged) -> None:
        for own, given in zip(still[:6], call[:6], strict=True):
            own.zero_()
            own[tuple(slice(0, size) for size in given.shape)] = given

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(still, is_causal=True, enable_gqa=True)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(still, is_causal=True, enable_gqa=True)
    for call in calls:
        load(call)
        graph.replay()
        expected = oracle(call, is_causal=True)
        assert (out.double() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.gpu
@on_gpu
def test_a_cache_of_more_than_2_to_the_31_elements() -> None:
    call = paged([1, 3], [200, 133], page_size=64, dtype=torch.bfloat16, device=DEVICE, head_dim=128, unread=0.0)
    caches = []
    for cache in call[1:3]:
        pages, page_size, heads, dim = cache.shape
        apart = 1 << 29  # elements between pages, of which at least two are read from the sixth on
        memory = torch.empty(apart * (pages - 1) + page_size * heads * dim, dtype=torch.bfloat16, device=DEVICE)
        caches.append(memory.as_strided(cache.shape, (apart, heads * dim, dim, 1)).copy_(cache))
    far = call._replace(key_cache=caches[0], value_cache=caches[1])
    assert torch.equal(run(far, is_causal=True, enable_gqa=True), run(call, is_causal=True, enable_gqa=True))


@pytest.mark.gpu
@on_gpu
def test_compiles_without_a_graph_break_on_a_gpu() -> None:
    call = paged([1, 3], [200, 133], page_size=16, dtype=torch.bfloat16, device=DEVICE)
    compiled = torch.compile(lambda *given: run(Paged(*given), is_causal=True, enable_gqa=True), fullgraph=True)
    assert torch.equal(compiled(*call), run(call, is_causal=True, enable_gqa=True))
