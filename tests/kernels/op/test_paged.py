"""sigswap.sigmoid_attention_paged against a float64 oracle that reads the pages key by key; and its op."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import Paged, oracle, paged, run, sequences
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import sigswap
from sigswap.errors import ArgumentError, SigswapError
from sigswap.kernels import reference
from sigswap.kernels.op import paged as op

OP = torch.ops.sigswap.sigmoid_attention_paged.default
CUDA = torch.cuda.is_available()
GPU = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")]
both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])

LENGTHS = st.lists(st.tuples(st.sampled_from([0, 1, 2, 7]), st.sampled_from([0, 1, 3, 8, 40])), max_size=4)
OPTIONS = st.fixed_dictionaries(
    {
        "is_causal": st.booleans(),
        "scale": st.sampled_from([None, 0.7]),
        "softcap": st.sampled_from([None, 1.5]),
        "window": st.sampled_from([None, (0, 0), (5, -1), (-1, 2), (3, 1)]),
        "row_cap": st.sampled_from([None, 0.2]),
    }
)


def bias_of(kind: str, total: int, heads: int) -> Tensor | float | None:
    shapes = {"heads": (heads,), "rows": (total, heads), "row": (total, 1), "one": ()}
    return {"none": None, "number": -1.5}[kind] if kind not in shapes else torch.randn(shapes[kind]).double() - 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    LENGTHS,
    OPTIONS,
    st.sampled_from([1, 3, 4, 16, 64]),
    st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    st.sampled_from(["none", "number", "heads", "rows", "row", "one"]),
    st.booleans(),
)
def test_matches_the_definition(
    lengths: list[tuple[int, int]],
    options: dict[str, Any],
    page_size: int,
    heads: tuple[int, int],
    bias: str,
    heads_first: bool,
) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"heads": heads[0], "kv_heads": heads[1], "value_dim": 3, "page_size": page_size}
    call = paged([m for m, _ in lengths], [n for _, n in lengths], heads_first=heads_first, **sizes)
    options["bias"] = bias_of(bias, len(call.query), heads[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "MAX_TILE_SCORES", 60)
        patch.setattr(reference, "MAX_BAND_ROWS", 3)
        torch.testing.assert_close(run(call, enable_gqa=True, **options), oracle(call, **options))


@both
@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_packed_sequences_and_decoding_row_by_row(is_causal: bool, device: str) -> None:
    """Without a causal mask rows do not differ in what they see, so they may be asked for one by one with all keys."""
    torch.manual_seed(0)
    rows, keys = [5, 0, 17, 1], [9, 3, 17, 6]
    call = paged(rows, keys, dtype=torch.float32, device=device)
    options: dict[str, Any] = {"is_causal": is_causal, "enable_gqa": True, "softcap": 2.0}
    out = run(call, **options)
    key, value = (torch.cat([own[side] for own in sequences(call)]) for side in (1, 2))
    ends = torch.tensor([0, 9, 12, 29, 35], dtype=torch.int32, device=device)
    varlen = sigswap.sigmoid_attention_varlen(
        call.query, key, value, call.cu_seqlens_q, ends, 17, 17, bottom_right=True, **options
    )
    torch.testing.assert_close(out, varlen, rtol=1e-4, atol=1e-5)
    for step in range(17):  # each row as the newest one of its sequence
        left = [max(0, length - step) for length in keys] if is_causal else keys
        lengths = torch.tensor(left, dtype=torch.int32, device=device)
        last = [end - 1 - step for end in (5, 5, 22, 23)]
        decoding = [number for number in range(4) if step < rows[number]]
        query = call.query[[last[number] for number in decoding]]
        ones = torch.arange(len(decoding) + 1, dtype=torch.int32, device=device)
        one = Paged(query, *call[1:3], call.block_table[decoding], lengths[decoding], ones, 1, max(keys))
        expected = out[[last[number] for number in decoding]]
        torch.testing.assert_close(run(one, **options), expected, rtol=1e-4, atol=1e-5)


@both
def test_which_pages_hold_the_keys_does_not_matter(device: str) -> None:
    call = paged([1, 3], [33, 50], page_size=16, dtype=torch.float32, device=device)
    out = run(call, is_causal=True, enable_gqa=True)
    moved = torch.randperm(len(call.key_cache), device=device)
    caches = [torch.empty_like(cache) for cache in call[1:3]]
    for old, new in zip(call[1:3], caches, strict=True):
        new[moved] = old
    table = moved.int()[call.block_table.clamp(max=len(moved) - 1).long()]
    elsewhere = call._replace(key_cache=caches[0], value_cache=caches[1], block_table=table)
    assert torch.equal(run(elsewhere, is_causal=True, enable_gqa=True), out)


@both
def test_shared_pages(device: str) -> None:
    """A prefix of two pages that two sequences have."""
    call = paged([1, 1], [20, 23], page_size=8, dtype=torch.float32, device=device)
    call.block_table[1, :2] = call.block_table[0, :2]
    torch.testing.assert_close(
        run(call, is_causal=True, enable_gqa=True).double(), oracle(call, is_causal=True), rtol=1e-4, atol=1e-5
    )


@both
def test_sequences_without_rows_or_keys(device: str) -> None:
    call = paged([2, 0, 1, 3], [0, 5, 0, 1], dtype=torch.float32, device=device)
    out = run(call, is_causal=True, enable_gqa=True)
    assert not out[:5].any() and out[5].any(-1).all()  # of the last sequence one row sees one key
    nothing = paged([], [], dtype=torch.float32, device=device)
    assert run(nothing, enable_gqa=True).shape == (0, 4, 8)
    no_keys = call._replace(block_table=call.block_table[:, :0], cache_seqlens=torch.zeros_like(call.cache_seqlens))
    assert not run(no_keys, enable_gqa=True).any()
    no_pages = no_keys._replace(key_cache=call.key_cache[:0], value_cache=call.value_cache[:0])
    assert not run(no_pages, enable_gqa=True).any()


def test_nothing_is_written_but_the_output() -> None:
    call = paged([1, 3], [33, 50], dtype=torch.float32, unread=0.0)
    before = [tensor.clone() for tensor in call[:6]]
    run(call, is_causal=True, enable_gqa=True)
    with pytest.raises(ArgumentError):
        run(call, is_causal=True)
    with pytest.raises(ArgumentError):
        run(call._replace(cache_seqlens=call.cache_seqlens + 100, max_seqlen_k=200), enable_gqa=True)
    assert all(torch.equal(new, old) for new, old in zip(call[:6], before, strict=True))


def test_numbers_of_other_types_are_lengths() -> None:
    call = paged([1, 3], [6, 9], dtype=torch.float32)
    expected = run(call, enable_gqa=True)
    other = call._replace(max_seqlen_q=numpy.int64(3), max_seqlen_k=torch.tensor(9))  # type: ignore[arg-type]
    assert torch.equal(run(other, enable_gqa=True), expected)
    with pytest.raises(ArgumentError, match="max_seqlen_q must be an integer"):
        run(call._replace(max_seqlen_q=3.5), enable_gqa=True)  # type: ignore[arg-type]


@both
def test_more_than_the_longest_may_be_said(device: str) -> None:
    call = paged([1, 3], [33, 50], dtype=torch.float32, device=device)
    huge = call._replace(max_seqlen_q=2**31 - 1, max_seqlen_k=2**31 - 1)
    torch.testing.assert_close(run(huge, enable_gqa=True), run(call, enable_gqa=True))


@both
def test_gradients_are_refused(device: str) -> None:
    call = paged([1, 3], [6, 9], dtype=torch.float32, device=device)
    bias = torch.zeros(4, device=device)
    for name in ("query", "key_cache", "value_cache", "bias"):
        needing = {"bias": bias, **call._asdict()}
        needing[name] = needing[name].detach().clone().requires_grad_()
        with pytest.raises(ArgumentError, match=f"{name} must not require a gradient.*varlen.bottom_right=True"):
            sigswap.sigmoid_attention_paged(**needing, enable_gqa=True)
        with torch.no_grad():
            sigswap.sigmoid_attention_paged(**needing, enable_gqa=True)
    with pytest.raises(ArgumentError, match="query must not require a gradient"):
        torch.func.grad(lambda q: run(call._replace(query=q), enable_gqa=True).sum())(call.query)
    with pytest.raises(SigswapError, match="forward-mode"):
        torch.func.jvp(lambda q: run(call._replace(query=q), enable_gqa=True), (call.query,), (call.query,))


def inputs_of(call: Paged, bias: Tensor | None = None) -> tuple[Any, ...]:
    """The op's."""
    return *call[:3], bias, *call[3:]


@pytest.mark.parametrize("heads_first", [False, True])
def test_opcheck(heads_first: bool) -> None:
    call = paged([5, 0, 3], [7, 4, 6], dtype=torch.float32, heads_first=heads_first, unread=0.0)
    options: dict[str, Any] = {"scale": 0.3}
    bias = None
    if heads_first:
        options |= {"window_left": 2, "softcap": 3.0, "const_bias": -1.0, "visible_bias": False, "is_causal": True}
        bias = torch.randn(8, 4)
    torch.library.opcheck(OP, inputs_of(call, bias), options)


def test_on_the_meta_device() -> None:
    call = paged([5, 0, 3], [7, 4, 6], value_dim=6, dtype=torch.bfloat16)
    there = Paged(*(each.to("meta") if isinstance(each, Tensor) else each for each in call))
    out = OP(*inputs_of(there), scale=0.3)
    assert out.device.type == "meta" and out.shape == (8, 4, 6) and out.dtype == torch.bfloat16
    table = torch.empty(3, (1 << 28) + 1, dtype=torch.int32, device="meta")
    with pytest.raises(ArgumentError, match=r"block_table .* must be of at most 1073741824 keys per sequence"):
        OP(*inputs_of(there._replace(block_table=table)), scale=0.3)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_once_for_all_lengths(backend: str) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)

    def function(call: Paged, bias: Tensor) -> Tensor:
        return run(call, bias=bias, is_causal=True, enable_gqa=True).square()

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    # All different, for sizes that are the same when it compiles are taken to be the same thereafter.
    sizes: dict[str, Any] = {"page_size": 16, "heads": 10, "kv_heads": 5, "head_dim": 24, "value_dim": 48}
    counts = []
    for rows, keys in (([5, 7], [40, 20]), ([3, 4, 8], [11, 5, 120]), ([9, 0, 2, 6], [13, 7, 5, 23])):
        call, bias = paged(rows, keys, dtype=torch.float32, **sizes), torch.randn(10)
        torch.testing.assert_close(compiled(call, bias), function(call, bias))
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3


def test_autocast_acts_on_the_op_itself() -> None:
    call = paged([5, 3], [7, 6], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(call, enable_gqa=True)
    half = Paged(*(each.bfloat16() for each in call[:3]), *call[3:])
    assert torch.equal(out, run(half, enable_gqa=True)) and out.dtype == torch.bfloat16


def test_vmap_is_one_call_for_each() -> None:
    call = paged([1, 3], [6, 9], dtype=torch.float32)
    queries = torch.randn(3, *call.query.shape)
    out = torch.vmap(lambda query: run(call._replace(query=query), enable_gqa=True))(queries)
    for index in range(3):
        assert torch.equal(out[index], run(call._replace(query=queries[index]), enable_gqa=True))


def test_flops() -> None:
    call = paged([1, 3], [6, 9], head_dim=8, value_dim=6, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        run(call, enable_gqa=True)
    assert counter.get_total_flops() == 2 * 4 * (1 * 6 + 3 * 9) * (8 + 6)


GOOD = paged([5, 3], [7, 6], dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": GOOD.query[None]}, "query must be .total_length, heads, head_dim."),
        ({"query": GOOD.query.long()}, "query must be floating point"),
        ({"query": [1.0]}, "query must be a tensor"),
        ({"key_cache": GOOD.key_cache[0]}, "key_cache must be .pages, page_size, heads, head_dim."),
        ({"key_cache": GOOD.key_cache[:, :0]}, "key_cache must be .pages, page_size"),
        ({"key_cache": GOOD.key_cache.double()}, "key_cache must have query's dtype"),
        ({"value_cache": GOOD.value_cache.to("meta")}, "value_cache must be on query's device"),
        ({"key_cache": GOOD.key_cache[..., :7]}, "key_cache .* must have the head_dim"),
        ({"value_cache": GOOD.value_cache[1:]}, "value_cache .* must have the pages, their size and the heads"),
        ({"value_cache": GOOD.value_cache.mT.contiguous().mT}, "value_cache must have stride 1 in its last"),
        ({"query": GOOD.query[:, :3]}, "3 heads, which is not a multiple of the 2"),
        ({"bias": torch.zeros(4, 8)}, r"bias \[4, 8\] must broadcast to \[8, 4\]"),
        ({"bias": torch.zeros(4, dtype=torch.int64)}, "bias must be floating point"),
        ({"bias": -3}, "bias must be None, a float or a tensor"),
        ({"block_table": GOOD.block_table.long()}, "block_table must be int32, not torch.int64; cast it"),
        ({"block_table": GOOD.block_table[:1]}, r"block_table must be \[2, pages per sequence\]"),
        ({"block_table": GOOD.block_table.t().contiguous().t()}, "block_table must have stride 1 in its last"),
        ({"block_table": GOOD.block_table.to("meta")}, "block_table must be on query's device"),
        ({"cache_seqlens": GOOD.cache_seqlens.long()}, "cache_seqlens must be int32"),
        ({"cache_seqlens": GOOD.cache_seqlens[:1]}, r"cache_seqlens must be \[2\], as cu_seqlens_q has it"),
        ({"cu_seqlens_q": GOOD.cu_seqlens_q.long()}, "cu_seqlens_q must be int32"),
        ({"cu_seqlens_q": GOOD.cu_seqlens_q[None]}, r"cu_seqlens_q must be contiguous and \[batch"),
        ({"max_seqlen_q": 0}, "max_seqlen_q must be at least"),
        ({"max_seqlen_k": -1}, "max_seqlen_k must be at least"),
        ({"max_seqlen_k": "7"}, "max_seqlen_k must be an integer"),
        ({"scale": "1"}, "scale must be a number"),
        ({"softcap": -1.0}, "softcap must be None or positive"),
        ({"row_cap": 0.0}, "row_cap must be None, or positive"),
        ({"window": (-2, 0)}, "window must hold numbers >= 0"),
        ({"is_causal": 1}, "is_causal must be True or False"),
        ({"enable_gqa": False}, "query has 4 heads and key_cache 2; enable_gqa=True"),
    ],
)
def test_argument_errors(changes: dict[str, Any], message: str) -> None:
    good = GOOD._asdict() | {"enable_gqa": True}
    sigswap.sigmoid_attention_paged(**good)
    with pytest.raises(ArgumentError, match=message):
        sigswap.sigmoid_attention_paged(**(good | changes))


@pytest.mark.parametrize("enable_gqa", [False, True])
def test_caches_with_heads_before_the_keys_of_a_page_are_told_so(enable_gqa: bool) -> None:
    call = paged([5, 3], [7, 6], page_size=8, heads_first=True)
    as_kept = call._replace(key_cache=call.key_cache.transpose(1, 2), value_cache=call.value_cache.transpose(1, 2))
    with pytest.raises(ArgumentError, match=r"key_cache has 8 heads, more than query's 4: .* \.transpose\(1, 2\)"):
        run(as_kept, enable_gqa=enable_gqa)


def numbers(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


WRONG = [
    ({"cu_seqlens_q": numbers(0, 5, 9)}, "cu_seqlens_q must rise from 0 to 8"),
    ({"max_seqlen_q": 4}, "max_seqlen_q is 4, but sequence 0 of cu_seqlens_q has 5"),
    ({"cache_seqlens": numbers(7, -1)}, "cache_seqlens must hold numbers >= 0; it is -1 at index 1"),
    ({"max_seqlen_k": 6}, "max_seqlen_k is 6, but sequence 0 of cache_seqlens has 7 keys"),
    ({"cache_seqlens": numbers(7, 13), "max_seqlen_k": 13}, "has 3 pages of 4 keys .* which hold 12 keys, .* has 13"),
    ({"cache_seqlens": numbers(7, 9), "max_seqlen_k": 9}, "of sequence 1, which has 9, it has 1048576 at index 2"),
    ({"block_table": numbers([0, -1, 2], [3, 4, -9])}, "numbers of pages, 0 to 6, .* it has -1 at index 1"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_numbers(changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error on a CPU; where kernels run, on request, before they do: on a GPU nothing else looks at them."""
    wrong = inputs_of(GOOD._replace(**changes))
    with pytest.raises(ArgumentError, match=message):
        OP(*wrong, scale=0.3)
    ran: list[Any] = []

    class Kernels:
        forward = staticmethod(ran.append)

    monkeypatch.setattr(op, "implementation_for", lambda cuda: Kernels)
    OP(*wrong, scale=0.3)
    assert len(ran) == 1
    monkeypatch.setattr("sigswap.kernels.settings.check_lengths", True)
    with pytest.raises(ArgumentError, match=message):
        OP(*wrong, scale=0.3)
    assert len(ran) == 1
    OP(*inputs_of(GOOD), scale=0.3)
    assert len(ran) == 2
