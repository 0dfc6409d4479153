"""sigswap.sigmoid_attention_varlen against a float64 oracle that takes the sequences one by one; and its op."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sigswap
from sigswap.errors import ArgumentError, SigswapError
from sigswap.kernels import dispatch, reference
from sigswap.kernels.host.problem import Options
from sigswap.kernels.op import varlen

OP = torch.ops.sigswap.sigmoid_attention_varlen.default
BACKWARD = torch.ops.sigswap.sigmoid_attention_varlen_backward.default
CUDA = torch.cuda.is_available()
ON_HOPPER = CUDA and torch.cuda.get_device_capability()[0] == 9
GPU = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")]
both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])


class Packed(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seed: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int


def cu_seqlens(lengths: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def packed(
    q_lens: list[int],
    k_lens: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    value_dim: int = 8,
    bias: str | None = None,
    seed: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    strided: bool = False,
) -> Packed:
    def heads_tensor(total: int, count: int, dim: int) -> Tensor:
        if strided:  # heads first in memory
            return torch.randn(count, total, dim, dtype=torch.float64, device=device).to(dtype).transpose(0, 1)
        return torch.randn(total, count, dim, dtype=torch.float64, device=device).to(dtype)

    total_q, total_k = sum(q_lens), sum(k_lens)
    shapes = {"heads": (1, heads), "rows": (total_q, heads), "row": (total_q, 1), "one": (1, 1)}
    return Packed(
        heads_tensor(total_q, heads, head_dim),
        heads_tensor(total_k, kv_heads, head_dim),
        heads_tensor(total_k, kv_heads, value_dim),
        None if bias is None else (torch.randn(shapes[bias], dtype=torch.float64, device=device) - 1).to(dtype),
        cu_seqlens(q_lens, device),
        cu_seqlens(k_lens, device),
        None if seed is None else torch.tensor([seed], device=device),
        max(q_lens, default=0),
        max(k_lens, default=0),
    )


def oracle(inputs: Packed, options: Options) -> Tensor:
    """The definition, in inputs' dtype, sequence by sequence and head by head."""
    query, key, value, bias, cu_q, cu_k, seed, max_q, _ = inputs
    heads = query.shape[1]
    group = heads // key.shape[1]
    out = query.new_zeros(query.shape[0], heads, value.shape[2])
    sequences = zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True)
    parts = []
    for number, ((q_start, q_stop), (k_start, k_stop)) in enumerate(sequences):
        m, n = q_stop - q_start, k_stop - k_start
        row = torch.arange(m, device=query.device)[:, None]
        col = torch.arange(n, device=query.device)[None, :]
        at = row + (n - m if options.bottom_right else 0)
        visible = (col <= at) if options.is_causal else torch.ones(m, n, dtype=torch.bool, device=query.device)
        if options.window_left >= 0:
            visible = visible & (col >= at - options.window_left)
        if options.window_right >= 0:
            visible = visible & (col <= at + options.window_right)
        columns = []
        for h in range(heads):
            q = query[q_start:q_stop, h]
            k, v = key[k_start:k_stop, h // group], value[k_start:k_stop, h // group]
            scores = options.scale * (q @ k.mT)
            if options.softcap:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            row_bias = torch.full((m, 1), options.const_bias, dtype=query.dtype, device=query.device)
            if options.visible_bias:
                row_bias = row_bias - visible.sum(1, keepdim=True).clamp(min=1).to(query.dtype).log()
            if bias is not None:
                row_bias = row_bias + bias.expand(query.shape[0], heads)[q_start:q_stop, h, None]
            p = torch.where(visible, torch.sigmoid(scores + row_bias), 0.0)
            divisor = p.sum(1, keepdim=True).clamp(min=options.row_cap) if options.row_cap else 1.0
            if options.dropout_p:
                assert seed is not None
                keep = reference.kept(seed, (number * heads + h) * max_q + row, col, options.dropout_p)
                p = torch.where(keep, p / (1 - options.dropout_p), 0.0)
            columns.append(p @ v / divisor)
        parts.append(torch.stack(columns, 1))
    return torch.cat(parts) if parts else out


def with_gradients(function: Any, inputs: Packed, grad_out: Tensor) -> list[Tensor]:
    """The output and the gradients of all that have one."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in inputs[:4]]
    out = function(Packed(*leaves, *inputs[4:]))
    return [out, *torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad_out)]


def ours(inputs: Packed, options: Options) -> Tensor:
    return varlen.sigmoid_attention_varlen(*inputs, **options._asdict())


LENGTHS = st.lists(st.tuples(st.sampled_from([0, 1, 2, 7, 33]), st.sampled_from([0, 1, 3, 8, 40])), max_size=4)
OPTIONS = st.builds(
    Options,
    scale=st.sampled_from([0.1, 0.7]),
    const_bias=st.sampled_from([0.0, -1.5]),
    visible_bias=st.booleans(),
    is_causal=st.booleans(),
    bottom_right=st.booleans(),
    window_left=st.sampled_from([-1, 0, 5]),
    window_right=st.sampled_from([-1, 0, 5]),
    softcap=st.sampled_from([0.0, 1.5]),
    dropout_p=st.sampled_from([0.0, 0.0, 0.3]),
    row_cap=st.sampled_from([0.0, 0.2, 1.0]),
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    LENGTHS,
    OPTIONS,
    st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    st.sampled_from([None, "heads", "rows", "row", "one"]),
    st.booleans(),
)
def test_matches_the_definition_forward_and_backward(
    lengths: list[tuple[int, int]], options: Options, heads: tuple[int, int], bias: str | None, strided: bool
) -> None:
    torch.manual_seed(0)
    inputs = packed(
        [q for q, _ in lengths],
        [k for _, k in lengths],
        heads=heads[0],
        kv_heads=heads[1],
        value_dim=3,
        bias=bias,
        seed=5 if options.dropout_p else None,
        strided=strided,
    )
    grad_out = torch.randn(inputs.query.shape[0], heads[0], 3, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "MAX_TILE_SCORES", 60)
        patch.setattr(reference, "MAX_BAND_ROWS", 7)
        results = with_gradients(lambda inputs: ours(inputs, options), inputs, grad_out)
    expected = with_gradients(lambda inputs: _connected(oracle(inputs, options), inputs), inputs, grad_out)
    torch.testing.assert_close(results, expected)


def _connected(out: Tensor, inputs: Packed) -> Tensor:
    """out with a derivative, 0, of inputs that it does not depend on."""
    return out + sum(0 * tensor.sum() for tensor in inputs[:4] if tensor is not None)


@pytest.mark.parametrize("is_causal", [False, True])
def test_public_function_equals_one_call_per_sequence(is_causal: bool) -> None:
    torch.manual_seed(0)
    q_lens = k_lens = [5, 0, 17, 1]
    inputs = packed(q_lens, k_lens)
    arguments: dict[str, Any] = {"is_causal": is_causal, "window": (4, 2), "softcap": 2.0, "enable_gqa": True}
    for bias in (None, -1.5, torch.randn(4, dtype=torch.float64)):
        out = sigswap.sigmoid_attention_varlen(*inputs[:3], *inputs[4:6], *inputs[7:], bias=bias, **arguments)
        start = 0
        for length in q_lens:
            q, k, v = (tensor[start : start + length].transpose(0, 1) for tensor in inputs[:3])
            per_head = bias.view(-1, 1, 1) if isinstance(bias, Tensor) else bias
            alone = sigswap.sigmoid_attention(q, k, v, bias=per_head, **arguments)
            torch.testing.assert_close(out[start : start + length].transpose(0, 1), alone)
            start += length


@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 4), (9, 1), (9, 4)])
def test_public_bias_shapes_have_gradients(shape: tuple[int, ...]) -> None:
    inputs = packed([5, 4], [3, 6])
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    arguments = (*inputs[:3], *inputs[4:6], *inputs[7:])
    out = sigswap.sigmoid_attention_varlen(*arguments, bias=bias, scale=0.3, enable_gqa=True)
    options = Options(0.3, visible_bias=False)
    expected = oracle(inputs._replace(bias=bias.reshape(1, -1) if bias.dim() < 2 else bias), options)
    torch.testing.assert_close(out, expected)
    (grad,) = torch.autograd.grad(out.sum(), bias)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), bias)[0])


@both
def test_neighbours_do_not_matter(device: str) -> None:
    inputs = packed([5, 9, 4], [6, 8, 3], bias="heads", dtype=torch.float32, device=device)
    options = Options(0.3, is_causal=True, bottom_right=True)
    grad_out = torch.randn(18, 4, 8, device=device)
    before = with_gradients(lambda inputs: ours(inputs, options), inputs, grad_out)
    others = torch.ones(18, dtype=torch.bool, device=device)
    others[5:14] = False
    other_keys = torch.ones(17, dtype=torch.bool, device=device)
    other_keys[6:14] = False
    changed = inputs._replace(
        query=torch.where(others[:, None, None], torch.nan, inputs.query),
        key=torch.where(other_keys[:, None, None], torch.inf, inputs.key),
        value=torch.where(other_keys[:, None, None], torch.nan, inputs.value),
    )
    after = with_gradients(lambda inputs: ours(inputs, options), changed, grad_out)
    for number, kept in ((0, ~others), (1, ~others), (2, ~other_keys), (3, ~other_keys)):
        assert torch.equal(before[number][kept], after[number][kept])


@both
def test_rows_without_keys_are_zero_with_zero_gradients(device: str) -> None:
    inputs = packed([3, 2, 4], [0, 2, 1], bias="rows", dtype=torch.float32, device=device)
    options = Options(0.3, is_causal=True, bottom_right=True)  # of the last sequence one row sees one key
    out, *grads = with_gradients(lambda inputs: ours(inputs, options), inputs, torch.ones(9, 4, 8, device=device))
    empty = torch.tensor([0, 1, 2, 5, 6, 7])
    assert not out[empty].any() and out[[3, 4, 8]].any(-1).all()
    assert not grads[0][empty].any() and not grads[3][empty].any()
    assert all(grad.isfinite().all() for grad in grads)


@both
def test_no_sequences(device: str) -> None:
    inputs = packed([], [], bias="heads", dtype=torch.float32, device=device)
    results = with_gradients(lambda inputs: ours(inputs, Options(1.0)), inputs, torch.zeros(0, 4, 8, device=device))
    assert [list(result.shape) for result in results] == [[0, 4, 8], [0, 4, 8], [0, 2, 8], [0, 2, 8], [1, 4]]
    assert not results[4].any()


def test_dropout_is_that_of_the_padded_batch() -> None:
    torch.manual_seed(0)
    lengths = [5, 9, 1]
    inputs = packed(lengths, lengths, kv_heads=4, seed=3)
    options = Options(0.3, dropout_p=0.4)
    out = ours(inputs, options)
    padded = torch.zeros(3, 3, 9, 4, 8, dtype=torch.float64)  # query, key and value
    starts = inputs.cu_seqlens_q.tolist()
    visible = torch.zeros(3, 1, 1, 9, dtype=torch.bool)
    for b, length in enumerate(lengths):
        for which in range(3):
            padded[which, b, :length] = inputs[which][starts[b] : starts[b + 1]]
        visible[b, ..., :length] = True
    q, k, v = padded.transpose(2, 3)
    batch = torch.ops.sigswap.sigmoid_attention(q, k, v, None, visible, inputs.seed, scale=0.3, dropout_p=0.4)
    for b, length in enumerate(lengths):
        torch.testing.assert_close(out[starts[b] : starts[b + 1]], batch[b, :, :length].transpose(0, 1))


@both
def test_no_sequence_is_longer_than_all_together(device: str) -> None:
    """Whatever is said to be the longest: not for what dropout draws, nor for how many programs are launched."""
    lengths = [5, 0, 11]
    inputs = packed(lengths, lengths, seed=3, dtype=torch.float32, device=device)
    grad_out = torch.randn(16, 4, 8, device=device)
    for options in (Options(0.3, dropout_p=0.4), Options(0.3, is_causal=True)):
        run = functools.partial(ours, options=options)
        huge, fitting = (
            with_gradients(run, inputs._replace(max_seqlen_q=most, max_seqlen_k=most), grad_out)
            for most in (2**31 - 1, 16)
        )
        assert all(torch.equal(one, other) for one, other in zip(huge, fitting, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("features", ["plain", "bias", "dropout"])
def test_opcheck(requires_grad: bool, features: str) -> None:
    inputs = packed(
        [5, 0, 3],
        [2, 4, 6],
        bias="rows" if features == "bias" else None,
        seed=7 if features == "dropout" else None,
        dtype=torch.float32,
        strided=True,
    )
    for tensor in inputs[:4]:
        if tensor is not None:
            tensor.requires_grad_(requires_grad)
    options: dict[str, Any] = {"scale": 0.3}
    if features == "bias":
        options |= {"window_left": 2, "softcap": 3.0, "const_bias": -1.0, "visible_bias": False}
    if features == "dropout":
        options |= {"dropout_p": 0.25, "is_causal": True, "bottom_right": True}
    torch.library.opcheck(OP, tuple(inputs), options)


def test_opcheck_backward() -> None:
    inputs = packed([5, 0, 3], [2, 4, 6], bias="heads", dtype=torch.float32)
    for needed in ([True] * 4, [False, True, False, True]):
        torch.library.opcheck(BACKWARD, (torch.randn(8, 4, 8), *inputs, needed), {"scale": 0.3})


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True, "window_left": 2}, {"softcap": 1.5, "bottom_right": True}, {"dropout_p": 0.4}]
)
@pytest.mark.parametrize("bias", ["heads", "rows"])
def test_gradcheck(options: dict[str, Any], bias: str) -> None:
    torch.manual_seed(0)
    inputs = packed([2, 0, 3], [1, 2, 4], heads=2, kv_heads=1, head_dim=3, value_dim=2, bias=bias, seed=12)
    leaves = tuple(tensor.requires_grad_() for tensor in inputs[:4] if tensor is not None)
    assert torch.autograd.gradcheck(
        lambda *tensors: ours(Packed(*tensors, *inputs[4:]), Options(0.4, **options)), leaves
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_once_for_all_lengths(backend: str) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)

    def function(inputs: Packed, bias: Tensor) -> Tensor:
        return sigswap.sigmoid_attention_varlen(
            *inputs[:3], *inputs[4:6], *inputs[7:], bias=bias, is_causal=True, enable_gqa=True
        ).square()

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for q_lens, k_lens in (([5, 7], [6, 9]), ([3, 4, 8], [11, 5, 2]), ([9, 0, 2, 6], [3, 7, 5, 13])):
        inputs = packed(q_lens, k_lens, dtype=torch.float32)
        leaves = [tensor.requires_grad_() for tensor in inputs[:3]]
        bias = torch.randn(4, requires_grad=True)
        out, expected = compiled(inputs, bias), function(inputs, bias)
        torch.testing.assert_close(out, expected)
        grads = torch.autograd.grad(out.sum(), [*leaves, bias])
        torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), [*leaves, bias]))
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3


def test_autocast_acts_on_the_op_itself() -> None:
    inputs = packed([5, 3], [4, 6], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(inputs, Options(0.3))
    half = inputs._replace(query=inputs.query.bfloat16(), key=inputs.key.bfloat16(), value=inputs.value.bfloat16())
    assert torch.equal(out, ours(half, Options(0.3)))


def test_second_and_forward_derivatives_are_errors() -> None:
    inputs = packed([3], [3], kv_heads=4)
    query = inputs.query.requires_grad_()
    out = ours(inputs, Options(0.3))
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(SigswapError, match="sigmoid_attention_varlen has no second derivative"):
        torch.autograd.grad(grad.sum(), query)
    with pytest.raises(SigswapError, match="forward-mode"):
        torch.func.jvp(lambda q: ours(inputs._replace(query=q), Options(0.3)), (query.detach(),), (query.detach(),))


GOOD = packed([5, 3], [4, 6], dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": GOOD.query[None]}, "query, key and value must be"),
        ({"query": GOOD.query.long()}, "query must be floating point"),
        ({"key": GOOD.key.double()}, "key must have query's dtype"),
        ({"value": GOOD.value.to("meta")}, "value must be on query's device"),
        ({"key": GOOD.key[..., :7]}, "key .* must have the head_dim"),
        ({"value": GOOD.value[:4]}, "value .* must have the length and the heads"),
        ({"query": GOOD.query[:, :3]}, "3 heads, which is not a multiple of the 2"),
        ({"bias": torch.zeros(4)}, r"bias \[4\] must broadcast to \[8, 4\]"),
        ({"bias": torch.zeros(1, 4, dtype=torch.int64)}, "bias must be floating point"),
        ({"cu_seqlens_q": GOOD.cu_seqlens_q.long()}, "cu_seqlens_q must be int32"),
        ({"cu_seqlens_k": GOOD.cu_seqlens_k[None]}, r"cu_seqlens_k must be contiguous and \[batch"),
        ({"cu_seqlens_k": GOOD.cu_seqlens_k.to("meta")}, "cu_seqlens_k must be on query's device"),
        ({"cu_seqlens_k": cu_seqlens([4, 4, 2])}, "as many sequences, not 2 and 3"),
        ({"cu_seqlens_q": cu_seqlens([5, 4])}, "cu_seqlens_q must rise from 0 to 8"),
        ({"cu_seqlens_k": torch.tensor([1, 4, 10]).int()}, "cu_seqlens_k must rise from 0 to 10"),
        ({"cu_seqlens_k": torch.tensor([0, 12, 10]).int()}, "cu_seqlens_k must rise from 0 to 10"),
        ({"max_seqlen_q": 4}, "max_seqlen_q is 4, but sequence 0 of cu_seqlens_q has 5"),
        ({"max_seqlen_k": torch.tensor(6)}, "max_seqlen_k must be an int"),
    ],
)
def test_argument_errors(changes: dict[str, Any], message: str) -> None:
    ours(GOOD, Options(1.0))
    with pytest.raises(ArgumentError, match=message):
        ours(GOOD._replace(**changes), Options(1.0))


@pytest.mark.parametrize("change", [{"cu_seqlens_q": cu_seqlens([5, 4])}, {"cu_seqlens_k": cu_seqlens([3, 6])}])
def test_ends_are_checked_on_request(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything runs: on a GPU nothing else looks at them."""
    wrong, ran = GOOD._replace(**change), []
    for _ in range(2):
        varlen._forward(ran.append, tuple(wrong), Options(1.0), None)
    assert len(ran) == 2
    monkeypatch.setattr("sigswap.kernels.settings.check_lengths", True)
    with pytest.raises(ArgumentError, match=f"{next(iter(change))} must rise from 0"):
        varlen._forward(ran.append, tuple(wrong), Options(1.0), None)
    assert len(ran) == 2
    varlen._forward(ran.append, tuple(GOOD), Options(1.0), None)
    assert len(ran) == 3


@both
@pytest.mark.parametrize("compiled", [False, True])
def test_ends_are_checked_by_the_op(compiled: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So in compiled code, too, without a guard; on a GPU if that is asked for."""
    inputs = [value.to(device) if isinstance(value, Tensor) else value for value in GOOD]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def attention(cu_seqlens_q: Tensor) -> Tensor:
        packed = (*inputs[:3], cu_seqlens_q, inputs[5], *inputs[7:])
        return sigswap.sigmoid_attention_varlen(*packed, enable_gqa=True)

    call = torch.compile(attention, backend=counter, fullgraph=True) if compiled else attention
    right, wrong = inputs[4], torch.tensor([0, 4, 3], dtype=torch.int32, device=device)
    call(right)
    if device == "cuda":
        call(wrong)
    monkeypatch.setattr("sigswap.kernels.settings.check_lengths", True)
    call(right)
    with pytest.raises(ArgumentError, match=r"cu_seqlens_q .* falls from 4 to 3 at index 2"):
        call(wrong)
    assert counter.frame_count == int(compiled)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
def test_what_a_cuda_graph_captures_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sigswap.kernels.settings.check_lengths", True)
    inputs = Packed(*(value.cuda() if isinstance(value, Tensor) else value for value in GOOD))
    expected = ours(inputs, Options(0.3))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ours(inputs, Options(0.3))
    graph.replay()
    torch.testing.assert_close(out, expected)


def test_argument_errors_of_the_public_function() -> None:
    arguments = (*GOOD[:3], *GOOD[4:6], *GOOD[7:])
    with pytest.raises(ArgumentError, match="enable_gqa=True lets"):
        sigswap.sigmoid_attention_varlen(*arguments)
    with pytest.raises(ArgumentError, match="bias must be None, a float or a tensor"):
        sigswap.sigmoid_attention_varlen(*arguments, enable_gqa=True, bias=8)
    with pytest.raises(ArgumentError, match="softcap"):
        sigswap.sigmoid_attention_varlen(*arguments, enable_gqa=True, softcap=-1.0)
    with pytest.raises(ArgumentError, match="window"):
        sigswap.sigmoid_attention_varlen(*arguments, enable_gqa=True, window=(1, 2, 3))
    for wrong in (5.0, "5", None, torch.tensor([5, 5])):
        with pytest.raises(ArgumentError, match="max_seqlen_k must be an integer"):
            sigswap.sigmoid_attention_varlen(*arguments[:-1], wrong, enable_gqa=True)


@pytest.mark.parametrize(
    ("integer", "compiled"),
    [*((each, False) for each in (numpy.int64, numpy.int32, numpy.array, torch.tensor)), (numpy.int64, True)],
)
def test_longest_lengths_of_any_integer_type(integer: Any, compiled: bool) -> None:
    arguments = (*GOOD[:3], *GOOD[4:6])
    longest = [integer(number) for number in GOOD[7:]]
    attention = sigswap.sigmoid_attention_varlen
    expected = attention(*arguments, *GOOD[7:], enable_gqa=True)
    if compiled:
        attention = torch.compile(attention, backend="aot_eager")
    torch.testing.assert_close(attention(*arguments, *longest, enable_gqa=True), expected)


def random_case(index: int, device: str) -> tuple[Packed, Options]:
    """The problem number index, of sizes for a GPU."""
    draw = torch.Generator().manual_seed(index)

    def choice(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (1,), generator=draw))]

    torch.manual_seed(index)
    lengths = [(choice(0, 1, 17, 128, 200, 513), choice(0, 1, 31, 128, 257, 600)) for _ in range(choice(1, 3, 6))]
    if choice(True, False):
        lengths = [(q, q) for q, _ in lengths]
    kv_heads = choice(1, 2)
    dim = choice(16, 40, 64, 64, 128, 128, 192)
    options = Options(
        scale=dim**-0.5,
        const_bias=choice(0.0, 0.0, -1.5),
        visible_bias=choice(True, True, True, False),
        is_causal=choice(True, False),
        bottom_right=choice(True, False),
        window_left=choice(-1, -1, 5, 100),
        window_right=choice(-1, -1, 0, 30),
        softcap=choice(0.0, 0.0, 2.0),
        dropout_p=choice(0.0, 0.0, 0.0, 0.2),
        row_cap=0.5 * (index % 2),
    )
    inputs = packed(
        [q for q, _ in lengths],
        [k for _, k in lengths],
        heads=kv_heads * choice(1, 1, 2, 4),
        kv_heads=kv_heads,
        head_dim=dim,
        value_dim=choice(dim, dim, 64),
        bias=choice(None, None, "heads", "rows", "row", "one"),
        seed=index if options.dropout_p else None,
        dtype=choice(torch.bfloat16, torch.bfloat16, torch.float16, torch.float32),
        device=device,
        strided=choice(True, False),
    )
    return inputs, options


def assert_no_worse(inputs: Packed, options: Options) -> None:
    """Each result's error is at most 1.1 times that of the oracle's own code in the inputs' dtype."""
    generator = torch.Generator(inputs.query.device).manual_seed(1)
    grad_out = torch.randn(
        *inputs.query.shape[:2], inputs.value.shape[2], device=inputs.query.device, generator=generator
    ).to(inputs.query.dtype)
    lengths = [cu.diff().tolist() for cu in (inputs.cu_seqlens_q, inputs.cu_seqlens_k)]
    probabilities = inputs.query.shape[1] * sum(q * k for q, k in zip(*lengths, strict=True))

    def naive(inputs: Packed) -> Tensor:
        return _connected(oracle(inputs, options), inputs)

    exact = inputs._replace(
        **{
            name: tensor.double()
            for name in ("query", "key", "value", "bias")
            if (tensor := getattr(inputs, name)) is not None
        }
    )
    results = with_gradients(lambda inputs: ours(inputs, options), inputs, grad_out)
    theirs = with_gradients(naive, inputs, grad_out)
    truths = with_gradients(naive, exact, grad_out.double())
    for number, (result, their, truth) in enumerate(zip(results, theirs, truths, strict=True)):
        assert result.shape == truth.shape and result.dtype == inputs.query.dtype
        norm = truth.norm().item()
        error = (result.double() - truth).norm().item()
        # The error of a few numbers is a matter of luck, and so is that of many that come from a few probabilities.
        # Below a cap PyTorch divides a row's only probability by itself, which leaves no error, nor a gradient; of that
        # the rounding of the output is left here.
        alone = options.row_cap > 0.0 and min(min(each, default=1) for each in lengths) <= 1
        few = min(int((truth != 0).sum()), probabilities) < 256
        ratio = (6.0 if few else 1.25) if alone else (2.5 if few else 1.1)
        bound = ratio * (their.double() - truth).norm().item() + 1e-6 * norm + 5e-7
        assert error <= bound, (number, error, bound, norm)


@pytest.mark.parametrize("index", range(6))
def test_error_is_no_larger_than_naive_pytorchs(index: int) -> None:
    assert_no_worse(*random_case(index, "cpu"))


LONG = [700, 1029, 300, 64, 1, 129, 0, 900, 513]
"""Long enough, together, for the kernels for Hopper GPUs."""
CROSS_Q, CROSS_K = [700, 1029, 300, 0, 77, 900, 600], [900, 1000, 0, 500, 900, 700, 600]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (40, 56), (96, 96), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("more", "bias", "cross"),
    [
        ({}, None, False),
        ({"is_causal": True}, None, False),
        ({"is_causal": True}, "heads", False),
        ({"is_causal": True}, "rows", False),
        ({"const_bias": -1.5, "visible_bias": False}, "row", False),
        ({"is_causal": True, "bottom_right": True}, "rows", True),
        ({"is_causal": True}, "heads", True),
        ({"window_left": 300, "window_right": 200}, None, False),
        ({"is_causal": True, "window_left": 600}, "rows", False),
        ({"is_causal": True, "row_cap": 0.01, "const_bias": -3.0}, "heads", False),
        ({"row_cap": 0.5}, "rows", False),
    ],
)
def test_long_sequences_on_a_hopper_gpu(
    dim: int,
    value_dim: int,
    dtype: torch.dtype,
    more: dict[str, Any],
    bias: str | None,
    cross: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And in which kernels: of 64 columns with keys hidden to the right the forward stays in Triton, and of more than
    128, or under a window of 501, the backward."""
    torch.manual_seed(0)
    q_lens, k_lens = (CROSS_Q, CROSS_K) if cross else (LONG, LONG)
    sizes: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": dim, "value_dim": value_dim, "bias": bias}
    inputs = packed(q_lens, k_lens, **sizes, dtype=dtype, device="cuda")
    chosen = []
    choose = dispatch.chosen
    monkeypatch.setattr(dispatch, "chosen", lambda *asked: (chosen.append(choose(*asked)), chosen[-1])[1])
    assert_no_worse(inputs, Options(scale=dim**-0.5, **more))
    narrow = dim <= 64 and ("is_causal" in more or "window_right" in more)
    no_backward = dim > 128 or "window_right" in more
    names = ["triton.forward" if narrow else "hopper.forward", "triton.backward" if no_backward else "hopper.backward"]
    assert [each.__name__.removeprefix("sigswap.kernels.") for each in chosen] == names


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("more", [{}, {"window_left": 100}, {"is_causal": True, "bottom_right": True}])
def test_rows_that_see_no_key_may_be_nan_on_a_hopper_gpu(more: dict[str, Any]) -> None:
    """Those of items of which no row sees one. With the window the last 412 of the first sequence see none, with the
    causal mask the first 512."""
    q_lens, k_lens = [1024, 700], [512, 0] if more else [1212, 0]
    inputs = packed(q_lens, k_lens, head_dim=128, value_dim=128, dtype=torch.bfloat16, device="cuda")
    before = ours(inputs, Options(0.1, **more))
    query = inputs.query.clone()
    query[1024:] = torch.nan
    if more:
        query[slice(832, 1024) if "window_left" in more else slice(0, 320)] = torch.nan
    after = ours(inputs._replace(query=query), Options(0.1, **more))
    assert torch.equal(before, after) and not after[1024:].any() and after[:1024].any()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("index", range(100))
def test_random_features_on_a_gpu(index: int) -> None:
    assert_no_worse(*random_case(index, "cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
def test_a_gpu_draws_the_dropout_of_the_cpu() -> None:
    inputs = packed([130, 0, 77, 1], [64, 9, 200, 3], seed=11, dtype=torch.float32)
    options = Options(0.3, dropout_p=0.5)
    grad_out = torch.randn(208, 4, 8)
    on_gpu = Packed(*(value.cuda() if isinstance(value, Tensor) else value for value in inputs))
    results = with_gradients(lambda inputs: ours(inputs, options), on_gpu, grad_out.cuda())
    expected = with_gradients(lambda inputs: ours(inputs, options), inputs, grad_out)
    for result, cpu in zip(results, expected, strict=True):
        torch.testing.assert_close(result.cpu(), cpu, rtol=1e-4, atol=1e-4)
