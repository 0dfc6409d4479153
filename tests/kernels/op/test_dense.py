"""The registered ops as PyTorch sees them: opcheck, graphs, compile, autograd, autocast, and the argument checks."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo.compiled_autograd
import torch._dynamo.testing
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sigswap
from sigswap.errors import ArgumentError, SigswapError
from sigswap.kernels import MASKED_SCORE, reference
from sigswap.kernels.host.problem import Options, Problem
from sigswap.kernels.op import dense, registration
from sigswap.kernels.op.registration import is_plain, options_of

ATTENTION = torch.ops.sigswap.sigmoid_attention.default
BACKWARD = torch.ops.sigswap.sigmoid_attention_backward.default
PROBS = torch.ops.sigswap.sigmoid_probs.default


def heads_tensor(
    *shape: int, requires_grad: bool = False, transposed: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    if transposed:
        batch, heads, length, dim = shape
        return torch.randn(batch, length, heads, dim, dtype=dtype).transpose(1, 2).requires_grad_(requires_grad)
    return torch.randn(shape, dtype=dtype, requires_grad=requires_grad)


def calls(graph: torch.fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


@pytest.mark.slow
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("features", ["plain", "bias and mask", "repeated mask", "dropout"])
def test_opcheck_attention(requires_grad: bool, features: str) -> None:
    batch = 6 if features == "repeated mask" else 2
    query = heads_tensor(batch, 4, 5, 8, requires_grad=requires_grad, transposed=True)
    key = heads_tensor(batch, 2, 7, 8, requires_grad=requires_grad)
    value = heads_tensor(batch, 2, 7, 3, requires_grad=requires_grad)
    args: list[Tensor | None] = [query, key, value]
    options: dict[str, Any] = {"scale": 0.3}
    if features == "bias and mask":
        bias = torch.randn(1, 4, 1, 1, requires_grad=requires_grad)
        mask = torch.randn(1, 1, 5, 7).where(torch.rand(5, 7) > 0.3, -torch.inf).requires_grad_(requires_grad)
        args += [bias, mask]
        options |= {"window_left": 2, "softcap": 3.0, "const_bias": -1.0, "visible_bias": False}
    if features == "repeated mask":
        args += [None, torch.randn(3, 1, 5, 7, requires_grad=requires_grad)]
    if features == "dropout":
        args += [None, None, torch.tensor([7])]
        options |= {"dropout_p": 0.25, "is_causal": True, "bottom_right": True}
    torch.library.opcheck(ATTENTION, tuple(args), options)


@pytest.mark.parametrize("mask_batch", [1, 2, 4])
def test_opcheck_attention_backward(mask_batch: int) -> None:
    query, key = heads_tensor(4, 4, 5, 8, transposed=True), heads_tensor(4, 2, 7, 8)
    bias, mask = torch.randn(1, 4, 1, 1), torch.randn(mask_batch, 1, 5, 7)
    args = (heads_tensor(4, 4, 5, 8), query, key, heads_tensor(4, 2, 7, 8, transposed=True), bias, mask, None)
    for needed in ([True] * 5, [False, True, False, False, True]):
        torch.library.opcheck(BACKWARD, (*args, needed), {"scale": 0.3})


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_probs(requires_grad: bool) -> None:
    scores = torch.randn(2, 3, 5, 7, requires_grad=requires_grad)
    bias = torch.randn(3, 1, 1, requires_grad=requires_grad)
    torch.library.opcheck(PROBS, (scores, bias))
    torch.library.opcheck(PROBS, (scores, None, 1, False, -2.0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "window_left": 3},
        {"softcap": 1.5, "visible_bias": False, "const_bias": -0.5},
        {"dropout_p": 0.4},
    ],
)
def test_gradcheck_attention(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    query = heads_tensor(1, 2, 4, 3, requires_grad=True, dtype=torch.float64)
    key = heads_tensor(1, 1, 5, 3, requires_grad=True, dtype=torch.float64)
    value = heads_tensor(1, 1, 5, 2, requires_grad=True, dtype=torch.float64)
    bias = heads_tensor(1, 2, 1, 1, requires_grad=True, dtype=torch.float64)
    mask = heads_tensor(1, 1, 4, 5, requires_grad=True, dtype=torch.float64)
    seed = torch.tensor([12])
    assert torch.autograd.gradcheck(
        lambda *tensors: dense.sigmoid_attention(*tensors, seed, scale=0.4, **options),
        (query, key, value, bias, mask),
    )


def test_gradcheck_probs() -> None:
    scores = torch.randn(2, 3, 4, dtype=torch.float64)
    scores[0, 1, 2] = -1e4
    bias = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, b: dense.sigmoid_probs(s, b), (scores.requires_grad_(), bias))


def test_a_second_derivative_is_an_error() -> None:
    query = heads_tensor(1, 1, 3, 4, requires_grad=True)
    out = dense.sigmoid_attention(query, query, query, scale=0.5)
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(SigswapError, match="second derivative"):
        torch.autograd.grad(grad.sum(), query)


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("visible_bias", [True, False])
def test_probs_match_the_definition(dim: int, visible_bias: bool) -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 5, 6, dtype=torch.float64)
    for index, masked in zip([(0, 0, 1), (1, 2, 3), (0, 4, 5)], [-torch.inf, -1e4, -5000.0], strict=True):
        scores[index] = masked
    shape = list(scores.shape)
    shape[dim] = 1
    bias = torch.randn(shape, dtype=torch.float64)
    p = dense.sigmoid_probs(scores, bias, dim, visible_bias, 0.5)
    visible = scores > -5000
    count = visible.sum(dim, keepdim=True).double()
    logits = scores + bias + 0.5 - (count.log() if visible_bias else 0)
    torch.testing.assert_close(p, torch.where(visible, 1 / (1 + torch.exp(-logits)), 0.0))
    assert (p[~visible] == 0).all()


def test_probs_of_masked_rows_and_nan() -> None:
    scores = torch.full((2, 3), -torch.inf, requires_grad=True)
    p = dense.sigmoid_probs(scores)
    assert torch.equal(p, torch.zeros(2, 3))
    (grad,) = torch.autograd.grad(p.sum(), scores)
    assert torch.equal(grad, torch.zeros(2, 3))
    assert dense.sigmoid_probs(torch.tensor([[torch.nan, 0.0]])).isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probs_compute_half_precision_in_float32(dtype: torch.dtype) -> None:
    scores = (torch.randn(64, 200) * 3).to(dtype)
    p = dense.sigmoid_probs(scores)
    assert p.dtype == dtype
    exact = torch.sigmoid(scores.double() - torch.tensor(200.0).double().log())
    torch.testing.assert_close(p.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_probs_save_no_more_than_p_and_the_mask() -> None:
    scores = torch.randn(4, 100, 100, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dense.sigmoid_probs(scores)
    large = [tensor.dtype for tensor in saved if tensor.numel() == scores.numel()]
    assert sorted(large, key=str) == [torch.bool, torch.float32]


def test_probs_are_one_node_until_inductor_decomposes_them() -> None:
    def function(scores: Tensor, bias: Tensor) -> Tensor:
        return dense.sigmoid_probs(scores, bias)

    graphs: list[torch.fx.Graph] = []

    def record(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(module.graph)
        return module

    scores = torch.randn(2, 3, 5, 7, requires_grad=True)
    bias = torch.randn(3, 1, 1, requires_grad=True)
    torch.compile(function, backend=record, fullgraph=True)(scores, bias)
    assert calls(graphs[0]) == [PROBS]
    assert calls(make_fx(function, pre_dispatch=True)(scores, bias).graph) == [PROBS]

    from torch._inductor.utils import run_and_get_code

    out, (code, *_) = run_and_get_code(torch.compile(function, fullgraph=True), scores, bias)
    assert "sigswap" not in code and "cpp_fused" in code
    torch.testing.assert_close(out, function(scores, bias))


def test_attention_is_one_node_before_dispatch() -> None:
    query = heads_tensor(1, 2, 3, 4, requires_grad=True)
    graph = make_fx(lambda q: dense.sigmoid_attention(q, q, q, scale=0.5), pre_dispatch=True)(query).graph
    assert calls(graph) == [ATTENTION]


def test_direct_calls_equal_calls_through_the_dispatcher() -> None:
    torch.manual_seed(0)
    inputs = [heads_tensor(2, 4, 5, 8, transposed=True), heads_tensor(2, 2, 7, 8), heads_tensor(2, 2, 7, 3)]
    inputs += [torch.randn(1, 4, 1, 1), torch.randn(1, 1, 5, 7)]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    options: dict[str, Any] = {"scale": 0.3, "is_causal": True, "softcap": 2, "dropout_p": 0.25}
    seed = torch.tensor([3])
    assert is_plain(*leaves, seed)
    direct = dense.sigmoid_attention(*leaves, seed, **options)
    dispatched = ATTENTION(*leaves, seed, **options)
    assert torch.equal(direct, dispatched)
    grad_out = torch.randn_like(direct)
    grads = torch.autograd.grad(direct, leaves, grad_out), torch.autograd.grad(dispatched, leaves, grad_out)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*grads, strict=True))
    with torch.no_grad():
        assert torch.equal(dense.sigmoid_attention(*leaves, seed, **options), direct)
    with torch.inference_mode():
        assert torch.equal(dense.sigmoid_attention(*leaves, seed, **options), direct)
        fresh = leaves[0] + 0  # an inference tensor
        assert is_plain(fresh) and torch.equal(dense.sigmoid_attention(fresh, *leaves[1:], seed, **options), direct)


class Subclass(Tensor):
    pass


def test_what_is_not_plain_goes_through_the_dispatcher() -> None:
    query = heads_tensor(1, 2, 3, 4)
    assert is_plain(query, None, torch.nn.Parameter(query))
    assert not is_plain(query, query.to("meta"))
    assert not is_plain(query.as_subclass(Subclass))
    assert not is_plain(torch.zeros(3, dtype=torch.complex64).conj().imag)  # a lazy negation
    assert not is_plain(FakeTensorMode().from_tensor(query))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_plain(query)
    with forward_ad.dual_level():
        assert not is_plain(query)
    seen = []
    torch.vmap(lambda q: seen.append(is_plain(q)) or q)(query)
    torch.func.grad(lambda q: seen.append(is_plain(q)) or q.sum())(query)
    make_fx(lambda q: seen.append(is_plain(q)) or q)(query)
    torch.jit.trace(lambda q: seen.append(is_plain(q)) or q + 1, query, check_trace=False)
    assert seen == [False] * 4
    assert is_plain(query)


@pytest.mark.parametrize("later", [False, True])
def test_what_hooks_make_of_saved_tensors_goes_through_the_dispatcher(
    later: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [heads_tensor(1, 2, 3, 4, requires_grad=True) for _ in range(3)]
    expected = torch.autograd.grad(dense.sigmoid_attention(*inputs, scale=0.5).sum(), inputs)
    negated: list[bool] = []

    def noting(run: Callable[[Problem], Any]) -> Callable[[Problem], Any]:
        def noted(problem: Problem) -> Any:
            tensors = *problem.inputs, problem.grad_out
            negated.extend(each.is_neg() for each in tensors if each is not None)
            return run(problem)

        return noted

    implementation = SimpleNamespace(forward=noting(reference.forward), backward=noting(reference.backward))
    monkeypatch.setattr(registration, "implementation_for", lambda cuda: implementation)
    hooks = torch.neg, torch._neg_view  # equal tensors, lazily negated
    with nullcontext() if later else torch.autograd.graph.saved_tensors_hooks(*hooks):
        out = dense.sigmoid_attention(*inputs, scale=0.5)
    if later:
        for saved in out.grad_fn._raw_saved_tensors[:3]:
            saved.register_hooks(*hooks)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert len(negated) == 7 and not any(negated)
    assert all(torch.equal(grad, truth) for grad, truth in zip(grads, expected, strict=True))


def test_options_of_other_types_go_through_the_dispatcher() -> None:
    numbers = 1.0, 0.0, True, False, False, -1, -1, 0.0, 0.0, 0.0
    for _ in range(2):  # equal ones are remembered
        assert options_of(*numbers) == Options(*numbers)
        converted = options_of(1, 0, *numbers[2:])
        assert converted is not None and type(converted.scale) is type(converted.const_bias) is float
        others = (True, *numbers[1:]), (*numbers[:3], 0, *numbers[4:]), (*numbers[:5], -1.0, *numbers[6:])
        for wrong in (*others, (torch.tensor(1.0), *numbers[1:]), ([1.0], *numbers[1:])):
            assert options_of(*wrong) is None
    query = heads_tensor(1, 2, 3, 4)
    out = dense.sigmoid_attention(query, query, query, scale=torch.tensor(0.5))
    assert torch.equal(out, dense.sigmoid_attention(query, query, query, scale=0.5))


def test_modes_and_the_profiler_see_the_op() -> None:
    query = heads_tensor(1, 2, 3, 4, requires_grad=True)
    seen: list[Any] = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    def step() -> None:
        dense.sigmoid_attention(query, query, query, scale=0.5).sum().backward()

    with Dispatch():
        step()
    assert {ATTENTION, BACKWARD} <= set(seen)
    seen.clear()
    with Function():
        step()
    assert ATTENTION in seen
    with torch.profiler.profile() as profile:
        step()
    names = {event.key for event in profile.key_averages()}
    assert {"sigswap::sigmoid_attention", "sigswap::sigmoid_attention_backward"} <= names


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend: str) -> None:
    def function(query: Tensor, key: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return dense.sigmoid_attention(query, key, key, bias, mask, scale=0.3, is_causal=True).square()

    query, key = heads_tensor(2, 4, 5, 8, requires_grad=True), heads_tensor(2, 2, 7, 8, requires_grad=True)
    bias, mask = torch.randn(1, 4, 1, 1, requires_grad=True), torch.randn(1, 1, 5, 7, requires_grad=True)
    inputs = (query, key, bias, mask)
    expected = function(*inputs)
    out = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.sum(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), inputs))


@pytest.mark.slow
@pytest.mark.parametrize("function_of", ["attention", "probs"])
def test_dynamic_shapes_do_not_recompile(function_of: str) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def attention(query: Tensor, key: Tensor) -> Tensor:
        return dense.sigmoid_attention(query, key, key, scale=0.3, is_causal=True)

    def probs(query: Tensor, key: Tensor) -> Tensor:
        return dense.sigmoid_probs(query @ key.mT)

    function = attention if function_of == "attention" else probs
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for batch, q_len, kv_len in ((3, 5, 7), (4, 9, 6), (5, 17, 33)):  # all differ: equal sizes get one symbol
        query = heads_tensor(batch, 2, q_len, 8, requires_grad=True)
        key = heads_tensor(batch, 2, kv_len, 8, requires_grad=True)
        out = compiled(query, key)
        torch.testing.assert_close(out, function(query, key))
        out.sum().backward()
        counts.append(counter.frame_count)
    # Not 1: with dynamic=True Dynamo takes the float defaults for symbols first, and starts over once.
    assert counts == [counts[0]] * 3


@pytest.mark.parametrize("repeated", ["never", "always"])
def test_dynamic_shapes_of_a_mask_do_not_recompile(repeated: str) -> None:
    """A mask per window, of images cut into windows, and a mask per batch element."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        return dense.sigmoid_attention(query, key, key, None, mask, scale=0.3, is_causal=True)

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for images, windows, q_len, kv_len in ((3, 4, 5, 7), (5, 3, 9, 6), (2, 11, 17, 33)):
        batch = images * windows
        query = heads_tensor(batch, 2, q_len, 8, requires_grad=True)
        key = heads_tensor(batch, 2, kv_len, 8, requires_grad=True)
        mask = torch.randn(windows if repeated == "always" else batch, 1, q_len, kv_len, requires_grad=True)
        inputs = (query, key, mask)
        out, expected = compiled(*inputs), function(*inputs)
        torch.testing.assert_close(out, expected)
        grads = torch.autograd.grad(out.sum(), inputs)
        torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), inputs))
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3


def test_compiled_autograd() -> None:
    query = heads_tensor(1, 2, 5, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(dense.sigmoid_attention(query, query, query, scale=0.3).square().sum(), query)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        dense.sigmoid_attention(query, query, query, scale=0.3).square().sum().backward()
    torch.testing.assert_close(query.grad, expected)


def test_autocast_acts_on_the_op_itself() -> None:
    query = heads_tensor(1, 2, 5, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dense.sigmoid_attention(query, query, query, scale=0.3)
        double = dense.sigmoid_attention(*[query.double()] * 3, scale=0.3)
    assert out.dtype == torch.bfloat16 and double.dtype == torch.float64
    half = query.detach().bfloat16()
    assert torch.equal(out, dense.sigmoid_attention(half, half, half, scale=0.3))
    (grad,) = torch.autograd.grad(out.sum(), query)
    assert grad.dtype == torch.float32


def test_autocast_does_not_reach_into_the_implementation() -> None:
    query = heads_tensor(1, 2, 33, 8, dtype=torch.float64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dense.sigmoid_attention(query, query, query, scale=0.3)
        (grad,) = torch.autograd.grad(out.sum(), query)
    expected = dense.sigmoid_attention(query, query, query, scale=0.3)
    assert torch.equal(out, expected)
    assert torch.equal(grad, torch.autograd.grad(expected.sum(), query)[0])


def test_masked_score_is_masked_and_the_next_larger_is_not() -> None:
    query = torch.zeros(1, 1, 1, 4)
    value = torch.ones(1, 1, 2, 4)
    mask = torch.tensor([MASKED_SCORE, 0.0]).view(1, 1, 1, 2)
    out = dense.sigmoid_attention(query, value, value, None, mask, scale=1.0)
    torch.testing.assert_close(out, torch.full((1, 1, 1, 4), 0.5))  # one key is visible: sigmoid(0 - ln 1)
    mask[..., 0] = MASKED_SCORE + 1
    out = dense.sigmoid_attention(query, value, value, None, mask, scale=1.0)
    torch.testing.assert_close(out, torch.full((1, 1, 1, 4), 1 / 3))  # two are: sigmoid(-ln 2) = 1 / 3


def test_output_is_stored_as_fused_softmax_attention_stores_it() -> None:
    query = heads_tensor(2, 3, 5, 4)
    out = dense.sigmoid_attention(query, query, query, scale=1.0)
    assert out.transpose(1, 2).is_contiguous()


GOOD: dict[str, Any] = {
    "query": torch.zeros(2, 4, 3, 8),
    "key": torch.zeros(2, 2, 5, 8),
    "value": torch.zeros(2, 2, 5, 6),
    "scale": 1.0,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(4, 3, 8)}, "query, key and value must be"),
        ({"query": torch.zeros(2, 4, 3, 8, dtype=torch.int64)}, "query must be floating point"),
        ({"key": torch.zeros(2, 2, 5, 8, dtype=torch.float64)}, "key must have query's dtype"),
        ({"value": torch.zeros(2, 2, 5, 6, device="meta")}, "value must be on query's device"),
        ({"key": torch.zeros(2, 2, 5, 7)}, "key .* must have the batch size and the head_dim"),
        ({"value": torch.zeros(2, 2, 4, 6)}, "value .* must have the batch size, heads and length"),
        ({"query": torch.zeros(2, 3, 3, 8)}, "3 heads, which is not a multiple of the 2"),
        ({"bias": torch.zeros(1, 4, 1, 5)}, r"bias \[1, 4, 1, 5\] must broadcast to \[2, 4, 3, 1\]"),
        ({"bias": torch.zeros(4, 1, 1)}, "bias"),
        ({"bias": torch.zeros(1, 1, 1, 1, dtype=torch.int64)}, "bias must be floating point"),
        ({"attn_mask": torch.zeros(2, 4, 5, 3)}, "attn_mask .* must broadcast"),
        ({"attn_mask": torch.zeros(3, 1, 3, 5)}, r"attn_mask \[3, 1, 3, 5\] must broadcast .*may be a divisor"),
        ({"attn_mask": torch.zeros(4, 1, 3, 5)}, "attn_mask .* must broadcast"),
        ({"attn_mask": torch.zeros(0, 1, 3, 5)}, "attn_mask .* must broadcast"),
        ({"attn_mask": torch.zeros(2, 2, 3, 5)}, "attn_mask .* must broadcast"),
        ({"attn_mask": torch.zeros(1, 1, 3, 5, dtype=torch.int64)}, "attn_mask must be bool or floating"),
        ({"window_left": -2}, "window"),
        ({"softcap": -1.0}, "softcap"),
        ({"softcap": float("nan")}, "softcap"),
        ({"dropout_p": 1.5}, "dropout_p must be in"),
        ({"dropout_p": 0.5}, "seed must be"),
        ({"dropout_p": 0.5, "seed": torch.zeros(1)}, "seed must be an int64"),
    ],
)
def test_argument_errors_of_attention(changes: dict[str, Any], message: str) -> None:
    dense.sigmoid_attention(**GOOD)
    with pytest.raises(ArgumentError, match=message):
        dense.sigmoid_attention(**(GOOD | changes))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(2, 3, dtype=torch.int64),), "scores must be floating point"),
        ((torch.zeros(2, 3), None, 2), "dim must be a dimension"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), r"bias \[2, 3\] must broadcast to \[2, 1\]"),
        ((torch.zeros(2, 3), torch.zeros(1, 2, 1)), "bias"),
        ((torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64)), "bias must be floating point"),
    ],
)
def test_argument_errors_of_probs(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        dense.sigmoid_probs(*args)


@pytest.mark.parametrize("recorded", [False, True])
def test_the_output_may_be_changed_in_place(recorded: bool) -> None:
    query, key, value = (torch.randn(2, 3, 5, 8, requires_grad=recorded) for _ in range(3))
    out = dense.sigmoid_attention(query, key, value, scale=1.0)
    expected = out.detach().clone().mul_(2).add_(1)
    expected[:, 0] = 0
    out.mul_(2)
    out.add_(1)
    out[:, 0] = 0
    assert torch.equal(out, expected)
    if recorded:
        assert torch.autograd.grad(out.sum(), value)[0][:, 0].eq(0).all()
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    "options",
    [{"is_causal": "no"}, {"window_left": 2.5}, {"window_right": "3"}],
)
def test_options_of_another_type_are_errors_in_eager_too(options: dict[str, Any]) -> None:
    tensors = [torch.randn(1, 2, 3, 8) for _ in range(3)]
    with pytest.raises((RuntimeError, TypeError)):
        dense.sigmoid_attention(*tensors, **{"scale": 1.0, **options})


def test_a_window_as_long_as_integers_get_is_none() -> None:
    tensors = [torch.randn(1, 2, 6, 8, dtype=torch.float64) for _ in range(3)]
    wide = dense.sigmoid_attention(*tensors, scale=1.0, window_left=sys.maxsize, window_right=sys.maxsize)
    assert torch.equal(wide, dense.sigmoid_attention(*tensors, scale=1.0))
    tensors = [each.float() for each in tensors]
    with torch.autocast("cpu"):  # by the dispatcher, which takes no longer ones
        longer, none = (sigswap.sigmoid_attention(*tensors, window=window) for window in (2**70, None))
    assert torch.equal(longer, none)


def test_a_seed_of_any_shape() -> None:
    query = torch.randn(1, 2, 6, 8, requires_grad=True)
    results = []
    for shape in ((), (1,), (1, 1, 1, 1, 1, 1)):
        seed = torch.tensor(3).view(shape)
        out = dense.sigmoid_attention(query, query, query, None, None, seed, scale=1.0, dropout_p=0.4)
        results.append(torch.cat((out, *torch.autograd.grad(out.sum(), query))))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_what_is_no_number_or_no_float_type_is_an_error() -> None:
    query = torch.randn(1, 2, 3, 8)
    with pytest.raises(ArgumentError, match="softcap must be positive and finite"):
        dense.sigmoid_attention(query, query, query, scale=1.0, softcap=math.inf)
    eighth = query.to(torch.float8_e4m3fn)
    with pytest.raises(ArgumentError, match="query must be floating point of 16, 32 or 64 bits"):
        dense.sigmoid_attention(eighth, eighth, eighth, scale=1.0)
    with pytest.raises(ArgumentError, match="attn_mask must be bool or floating point of 16"):
        dense.sigmoid_attention(query, query, query, None, eighth[..., :1, :3], scale=1.0)
    with pytest.raises(ArgumentError, match="scale must be a number"):
        sigswap.sigmoid_attention(query, query, query, scale=torch.tensor(1.0, requires_grad=True))
    with pytest.raises(ArgumentError, match="window must hold integers"):
        sigswap.sigmoid_attention(query, query, query, window=(2.5, 0))


def test_the_public_function_broadcasts_and_does_not_repeat() -> None:
    query = torch.randn(4, 2, 3, 8)
    with pytest.raises(ArgumentError, match=r"attn_mask \[2, 1, 3, 3\] must broadcast to .* \[4\]"):
        sigswap.sigmoid_attention(query, query, query, attn_mask=torch.zeros(2, 1, 3, 3))


def test_no_images_of_several_windows() -> None:
    query = torch.randn(0, 2, 3, 8, requires_grad=True)
    mask = torch.randn(4, 1, 3, 3, requires_grad=True)
    out = dense.sigmoid_attention(query, query, query, None, mask, scale=1.0)
    assert out.shape == query.shape
    assert torch.equal(torch.autograd.grad(out.sum(), mask)[0], torch.zeros_like(mask))


def test_a_bfloat16_mask_is_compared_in_float32() -> None:
    query = torch.randn(1, 1, 2, 8, dtype=torch.bfloat16)
    mask = torch.tensor([0.0, -4992.0], dtype=torch.bfloat16).view(1, 1, 1, 2)  # bfloat16's neighbour of -5000
    out = dense.sigmoid_attention(query, query, query, None, mask, scale=0.0)
    assert torch.allclose(out.float(), query[..., :1, :].float() / 3, atol=1e-2)  # sigmoid(-ln 2): two are visible
