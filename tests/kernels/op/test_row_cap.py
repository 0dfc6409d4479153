"""The row cap of the registered ops: the sums, the definition's properties, opcheck, torch.func, compile, errors.

Values and gradients over random options are in tests/kernels/test_reference.py and test_varlen.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.func import grad, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import sigswap
from sigswap.errors import ArgumentError, SigswapError
from sigswap.functional.attention import probabilities
from sigswap.kernels.op import dense, varlen

ATTENTION = torch.ops.sigswap.sigmoid_attention.default
SUMS = torch.ops.sigswap.sigmoid_attention_sums.default
BACKWARD = torch.ops.sigswap.sigmoid_attention_backward.default
VARLEN = torch.ops.sigswap.sigmoid_attention_varlen.default
VARLEN_SUMS = torch.ops.sigswap.sigmoid_attention_varlen_sums.default
VARLEN_BACKWARD = torch.ops.sigswap.sigmoid_attention_varlen_backward.default


def tensors(*shapes: tuple[int, ...], requires_grad: bool = False, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]


def explicit(query: Tensor, key: Tensor, value: Tensor, cap: float, bias: Tensor | float = 0.0) -> Tensor:
    """The definition without a mask, in operators that everything knows; rows of all sums."""
    p = torch.sigmoid(0.5 * query @ key.mT - math.log(key.shape[-2]) + bias)
    return p @ value / p.sum(-1, keepdim=True).clamp(min=cap)


def capped(query: Tensor, key: Tensor, value: Tensor, cap: float, bias: Tensor | None = None) -> Tensor:
    return sigswap.sigmoid_attention(
        query, key, value, bias=_visible(key, bias), scale=0.5, row_cap=cap, enable_gqa=query.shape != key.shape
    )


def _visible(key: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias - math.log(key.shape[-2])


@pytest.mark.parametrize("cap", [0.1, 1.0, 30.0])
def test_values_and_gradients(cap: float) -> None:
    query, key, value = tensors((2, 3, 17, 8), (2, 3, 21, 8), (2, 3, 21, 5), requires_grad=True)
    (bias,) = tensors((1, 3, 1, 1), requires_grad=True)
    inputs = query, key, value, bias
    out = capped(query, key, value, cap, bias)
    expected = explicit(query, key, value, cap, bias)
    torch.testing.assert_close(out, expected)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, grad_out)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, inputs, grad_out))


def test_the_cases_have_rows_above_and_below_each_cap() -> None:
    torch.manual_seed(0)
    query, key = tensors((2, 3, 170, 8), (2, 3, 21, 8))
    sums = SUMS(3 * query, key, key, scale=0.5)[1]
    assert (sums > 1.0).any() and (sums < 1.0).any()


def test_gradcheck() -> None:
    torch.manual_seed(1)
    query, key, value = tensors((1, 2, 4, 3), (1, 1, 5, 3), (1, 1, 5, 2), requires_grad=True)
    bias, mask = tensors((1, 2, 4, 1), (1, 1, 4, 5), requires_grad=True)
    for options in ({}, {"softcap": 1.5, "is_causal": True}, {"dropout_p": 0.4}, {"window_left": 1}):

        def attention(*inputs: Tensor, options: dict[str, Any] = options) -> Tensor:
            return dense.sigmoid_attention(*inputs, torch.tensor([12]), scale=2.0, row_cap=0.8, **options)

        assert torch.autograd.gradcheck(attention, (query, key, value, bias, mask))


def test_sums_are_those_of_the_probabilities_before_dropout_and_cap() -> None:
    query, key = tensors((2, 4, 5, 8), (2, 2, 7, 8))
    mask = torch.rand(2, 1, 5, 7) > 0.4
    mask[0, :, 2] = False
    scores = 0.5 * query @ key.repeat_interleave(2, 1).mT
    p = probabilities(scores.masked_fill(~mask, -torch.inf))
    for options in ({}, {"row_cap": 0.3}, {"dropout_p": 0.9}):
        out, sums = SUMS(query, key, key, None, mask, torch.tensor([3]), scale=0.5, **options)
        torch.testing.assert_close(sums, p.sum(-1, keepdim=True))
        assert torch.equal(out, ATTENTION(query, key, key, None, mask, torch.tensor([3]), scale=0.5, **options))
    half = SUMS(*[query.half()] * 3, scale=0.5)[1]
    assert half.dtype == torch.float32 and half.shape == (2, 4, 5, 1)


def test_dropout_acts_on_the_capped_probabilities() -> None:
    query, key, value = tensors((1, 2, 9, 8), (1, 2, 30, 8), (1, 2, 30, 4))
    seed, options = torch.tensor([5]), {"scale": 1.0, "dropout_p": 0.5}
    sums = SUMS(query, key, value, scale=1.0)[1]
    dropped = dense.sigmoid_attention(query, key, value, None, None, seed, **options)
    out = dense.sigmoid_attention(query, key, value, None, None, seed, row_cap=0.4, **options)
    torch.testing.assert_close(out, dropped / sums.clamp(min=0.4))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_without_a_cap_nothing_changes(requires_grad: bool) -> None:
    query, key, value = tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4), requires_grad=requires_grad)
    plain, none = (sigswap.sigmoid_attention(query, key, value, **kw) for kw in ({}, {"row_cap": None}))
    assert torch.equal(plain, none)
    assert torch.equal(plain, SUMS(query, key, value, scale=8**-0.5)[0])
    if requires_grad:  # no more is saved than the inputs
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            sigswap.sigmoid_attention(query, key, value)
        assert {t.data_ptr() for t in saved} == {query.data_ptr(), key.data_ptr(), value.data_ptr()}


def test_a_cap_that_no_row_reaches_is_a_number() -> None:
    query, key, value = tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4))
    plain = sigswap.sigmoid_attention(query, key, value)
    torch.testing.assert_close(sigswap.sigmoid_attention(query, key, value, row_cap=8.0), plain / 8)


def test_low_biases_and_a_low_cap_are_softmax() -> None:
    query, key, value = tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4))
    out = sigswap.sigmoid_attention(query, key, value, bias=-30.0, row_cap=1e-30)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(query, key, value))


def test_a_row_that_sees_nothing_is_0_and_has_no_gradient() -> None:
    query, key = tensors((1, 2, 4, 8), (1, 2, 6, 8), requires_grad=True)
    mask = torch.ones(1, 1, 4, 6, dtype=torch.bool)
    mask[..., 2, :] = False
    out = sigswap.sigmoid_attention(query, key, key, attn_mask=mask, row_cap=1e-3)
    assert out[:, :, 2].eq(0).all() and not out.isnan().any()
    grads = torch.autograd.grad(out.sum(), (query, key))
    assert grads[0][:, :, 2].eq(0).all() and not any(each.isnan().any() for each in grads)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_the_order_of_keys_do_not_matter(side: str) -> None:
    query, key, value = tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4))
    expected = sigswap.sigmoid_attention(query, key, value, row_cap=0.5)
    pad = (0, 0, 4, 0) if side == "left" else (0, 0, 0, 4)
    padded = [torch.nn.functional.pad(each, pad, value=3.0) for each in (key, value)]
    mask = torch.nn.functional.pad(torch.ones(7, dtype=torch.bool), pad[2:], value=False)
    out = sigswap.sigmoid_attention(query, *padded, attn_mask=mask.view(1, 1, 1, 11), row_cap=0.5)
    torch.testing.assert_close(out, expected)
    order = torch.randperm(7)
    shuffled = sigswap.sigmoid_attention(query, key[:, :, order], value[:, :, order], row_cap=0.5)
    torch.testing.assert_close(shuffled, expected)


def test_decoding_is_the_full_forward_and_no_future_is_seen() -> None:
    query, key, value = tensors((1, 2, 9, 8), (1, 2, 9, 8), (1, 2, 9, 4))
    full = sigswap.sigmoid_attention(query, key, value, is_causal=True, row_cap=0.3)
    for step in range(9):
        seen = key[:, :, : step + 1], value[:, :, : step + 1]
        one = sigswap.sigmoid_attention(query[:, :, step : step + 1], *seen, row_cap=0.3)
        torch.testing.assert_close(one, full[:, :, step : step + 1])
    later = key.clone()
    later[:, :, 5:] = 100.0
    changed = sigswap.sigmoid_attention(query, later, value, is_causal=True, row_cap=0.3)
    assert torch.equal(changed[:, :, :5], full[:, :, :5])


@pytest.mark.slow
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", [ATTENTION, SUMS])
@pytest.mark.parametrize("features", ["plain", "bias and mask", "dropout"])
def test_opcheck(requires_grad: bool, op: torch._ops.OpOverload, features: str) -> None:
    query = torch.randn(2, 5, 4, 8).transpose(1, 2).requires_grad_(requires_grad)
    key, value = tensors((2, 2, 7, 8), (2, 2, 7, 3), requires_grad=requires_grad, dtype=torch.float32)
    args: list[Tensor | None] = [query, key, value]
    options: dict[str, Any] = {"scale": 0.3, "row_cap": 0.7}
    if features == "bias and mask":
        args += tensors((1, 4, 1, 1), (1, 1, 5, 7), requires_grad=requires_grad, dtype=torch.float32)
    if features == "dropout":
        args += [None, None, torch.tensor([7])]
        options |= {"dropout_p": 0.25}
    torch.library.opcheck(op, tuple(args), options)
    if op is SUMS and features == "plain":
        torch.library.opcheck(op, tuple(args), {"scale": 0.3})


def test_opcheck_backward() -> None:
    query, key, value, grad_out = tensors((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3), (2, 4, 5, 3), dtype=torch.float32)
    bias, mask, delta = tensors((1, 4, 1, 1), (2, 1, 5, 7), (2, 4, 5, 1), dtype=torch.float32)
    for needed in ([True] * 5, [False, True, False, False, True]):
        args = (grad_out, query, key, value, bias, mask, None, needed, delta)
        torch.library.opcheck(BACKWARD, args, {"scale": 0.3, "row_cap": 1.0})


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_varlen(requires_grad: bool) -> None:
    query, key, value = tensors((8, 4, 8), (12, 2, 8), (12, 2, 3), requires_grad=requires_grad, dtype=torch.float32)
    bias = torch.randn(8, 4, requires_grad=requires_grad)
    cu_q, cu_k = torch.tensor([0, 5, 5, 8], dtype=torch.int32), torch.tensor([0, 2, 6, 12], dtype=torch.int32)
    inputs = query, key, value, bias, cu_q, cu_k, None, 5, 6
    for op in (VARLEN, VARLEN_SUMS):
        torch.library.opcheck(op, inputs, {"scale": 0.3, "row_cap": 0.5})
    if not requires_grad:
        args = (torch.randn(8, 4, 3), *inputs, [True] * 4, torch.randn(8, 4, 1))
        torch.library.opcheck(VARLEN_BACKWARD, args, {"scale": 0.3, "row_cap": 0.5})
        out, sums = VARLEN_SUMS(*inputs, scale=0.3, row_cap=0.5)
        first = [each[:length].transpose(0, 1)[None] for each, length in ((query, 5), (key, 2), (value, 2), (bias, 5))]
        own = SUMS(*first[:3], first[3][..., None], scale=0.3, row_cap=0.5)
        torch.testing.assert_close((out[:5].transpose(0, 1)[None], sums[:5].transpose(0, 1)[None]), own)


IN_DIMS = [(0, None, None, None), (0, 0, 2, None), (None, 1, None, 0), (None, None, None, 0)]


@pytest.mark.parametrize("in_dims", IN_DIMS)
def test_vmap_and_its_gradients(in_dims: tuple[int | None, ...]) -> None:
    shapes = (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4), (1, 3, 1, 1)
    mapped = [s if dim is None else (*s[:dim], 4, *s[dim:]) for s, dim in zip(shapes, in_dims, strict=True)]
    inputs = tensors(*mapped)
    ours, theirs = (
        vmap(lambda q, k, v, b, f=function: f(q, k, v, 0.6, b), in_dims)(*inputs) for function in (capped, explicit)
    )
    torch.testing.assert_close(ours, theirs)
    per_sample = [
        vmap(grad(lambda q, k, v, b, f=function: f(q, k, v, 0.6, b).square().sum(), (0, 1, 2, 3)), in_dims)(*inputs)
        for function in (capped, explicit)
    ]
    torch.testing.assert_close(*per_sample)
    looped = vmap(lambda q, k, v, b: SUMS(q, k, v, b, scale=0.5, dropout_p=0.0, row_cap=0.6), in_dims)(*inputs)
    assert looped[0].shape == ours.shape and looped[1].shape == (4, 2, 3, 5, 1)


def test_jacobian() -> None:
    query, key, value = tensors((1, 1, 2, 3), (1, 1, 4, 3), (1, 1, 4, 2))
    ours, theirs = (jacrev(lambda q, f=function: f(q, key, value, 0.6))(query) for function in (capped, explicit))
    torch.testing.assert_close(ours, theirs)


def test_a_second_derivative_and_a_forward_mode_one_are_errors() -> None:
    (query,) = tensors((1, 1, 3, 4), requires_grad=True)
    out = sigswap.sigmoid_attention(query, query, query, row_cap=0.5)
    (first,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(SigswapError, match="second derivative"):
        torch.autograd.grad(first.sum(), query)
    with pytest.raises(SigswapError, match="forward-mode"):
        torch.func.jvp(lambda q: SUMS(q, q, q, scale=1.0)[0], (query.detach(),), (query.detach(),))


def test_the_rows_sums_have_no_derivative() -> None:
    (query,) = tensors((1, 2, 5, 4), requires_grad=True)
    out, sums = SUMS(query, query, query, scale=0.5, row_cap=0.5)
    assert out.requires_grad and not sums.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole(dynamic: bool, backend: str) -> None:
    def function(query: Tensor, key: Tensor, mask: Tensor, packed: Tensor) -> Tensor:
        out = sigswap.sigmoid_attention(query, key, key, attn_mask=mask, row_cap=0.5, enable_gqa=True)
        probs = probabilities(query @ key.repeat_interleave(2, 1).mT, row_cap=0.5)
        cu = torch.tensor([0, 3, packed.shape[0]], dtype=torch.int32)
        own = sigswap.sigmoid_attention_varlen(packed, packed, packed, cu, cu, 20, 20, row_cap=0.5)
        return out.sum() + probs.square().sum() + own.square().sum()

    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    for length in (6, 9):
        inputs = tensors((2, 4, length, 8), (2, 2, 7, 8), (2, 1, length, 7), (length, 2, 8), requires_grad=True)
        out, expected = compiled(*inputs), function(*inputs)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out, inputs), torch.autograd.grad(expected, inputs))


def test_the_graph_of_a_backward_has_one_forward_and_its_results() -> None:
    (query,) = tensors((1, 2, 5, 8), requires_grad=True)

    def step(query: Tensor) -> Tensor:
        return torch.autograd.grad(dense.sigmoid_attention(query, query, query, scale=0.3, row_cap=0.5).sum(), query)[0]

    graph = make_fx(step)(query).graph
    called = [node.target for node in graph.nodes if getattr(node.target, "namespace", "") == "sigswap"]
    assert called == [SUMS, BACKWARD]


def test_export_keeps_the_op_and_its_cap() -> None:
    class Model(torch.nn.Module):
        def forward(self, query: Tensor) -> Tensor:
            return sigswap.sigmoid_attention(query, query, query, row_cap=0.5)

    (query,) = tensors((1, 2, 5, 8))
    program = torch.export.export(Model(), (query,))
    (node,) = [node for node in program.graph.nodes if node.target is ATTENTION]
    assert node.kwargs["row_cap"] == 0.5
    torch.testing.assert_close(program.module()(query), Model()(query))


def test_old_graphs_call_the_ops_as_they_were() -> None:
    (query,) = tensors((1, 2, 5, 8))
    schema = {"const_bias": 0.0, "visible_bias": True, "softcap": 0.0, "dropout_p": 0.0}
    out = ATTENTION(query, query, query, None, None, None, scale=0.3, **schema)
    grads = BACKWARD(out, query, query, query, None, None, None, [True, True, True, False, False], scale=0.3, **schema)
    assert torch.equal(out, dense.sigmoid_attention(query, query, query, scale=0.3)) and grads[0].shape == query.shape
    scores = query @ query.mT
    assert torch.equal(torch.ops.sigswap.sigmoid_probs(scores, None, -1, True, 0.0), probabilities(scores))


def test_autocast() -> None:
    (query,) = tensors((1, 2, 5, 8), dtype=torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sigswap.sigmoid_attention(query, query, query, row_cap=0.3)
        both = SUMS(query, query, query, scale=8**-0.5, row_cap=0.3)
    assert out.dtype == torch.bfloat16 and both[1].dtype == torch.float32 and torch.equal(out, both[0])
    (gradient,) = torch.autograd.grad(out.sum(), query)
    assert gradient.dtype == torch.float32
    exact = query.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(capped_by_scale(exact).sum(), exact)
    torch.testing.assert_close(gradient.double(), expected, atol=3e-2, rtol=3e-2)


def capped_by_scale(query: Tensor) -> Tensor:
    return sigswap.sigmoid_attention(query, query, query, row_cap=0.3)


@pytest.mark.parametrize("cap", [0.0, -1.0, math.inf, math.nan, "1", True])
def test_errors(cap: Any) -> None:
    (query,) = tensors((1, 2, 5, 8))
    cu = torch.tensor([0, 2], dtype=torch.int32)
    for call in (
        lambda: sigswap.sigmoid_attention(query, query, query, row_cap=cap),
        lambda: sigswap.sigmoid_attention_varlen(*[query[0]] * 3, cu, cu, 2, 2, row_cap=cap),
        lambda: probabilities(query, row_cap=cap),
    ):
        with pytest.raises(ArgumentError, match=r"row_cap must be (None, or positive and finite|a number)"):
            call()


def test_errors_of_the_ops() -> None:
    (query,) = tensors((1, 2, 5, 8))
    for cap in (-1.0, math.inf, math.nan):
        with pytest.raises(ArgumentError, match="row_cap must be positive and finite"):
            dense.sigmoid_attention(query, query, query, scale=1.0, row_cap=cap)
        with pytest.raises(ArgumentError, match="row_cap must be positive and finite"):
            dense.sigmoid_probs(query, row_cap=cap)


def test_probabilities_under_a_cap() -> None:
    (scores,) = tensors((2, 3, 5, 7), requires_grad=True)
    p = torch.sigmoid(scores - math.log(5))
    expected = p / p.sum(2, keepdim=True).clamp(min=0.9)
    torch.testing.assert_close(probabilities(scores, 2, row_cap=0.9), expected)
    assert torch.autograd.gradcheck(lambda s: probabilities(s, row_cap=0.9), scores)


def test_varlen_is_each_sequence_alone() -> None:
    query, key = tensors((9, 4, 8), (11, 2, 8), requires_grad=True)
    cu_q, cu_k = torch.tensor([0, 5, 9], dtype=torch.int32), torch.tensor([0, 4, 11], dtype=torch.int32)
    out = varlen.sigmoid_attention_varlen(query, key, key, None, cu_q, cu_k, None, 5, 7, scale=0.5, row_cap=0.4)
    parts = []
    for rows, keys in ((slice(0, 5), slice(0, 4)), (slice(5, 9), slice(4, 11))):
        q, k = query[rows].transpose(0, 1)[None], key[keys].transpose(0, 1)[None].repeat_interleave(2, 1)
        parts.append(explicit(q, k, k, 0.4)[0].transpose(0, 1))
    expected = torch.cat(parts)
    torch.testing.assert_close(out, expected)
    grad_out = torch.randn_like(out)
    grads = [torch.autograd.grad(each, (query, key), grad_out) for each in (out, expected)]
    torch.testing.assert_close(*grads)
