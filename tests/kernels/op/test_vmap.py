"""The ops under torch.func: vmap, grad, vjp, jacobians and their compositions, against loops and plain autograd."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, vjp, vmap

import sigswap
from sigswap.errors import ArgumentError, SigswapError
from sigswap.functional.attention import attend
from sigswap.kernels.op import dense, varlen


def attention(query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    return dense.sigmoid_attention(query, key, key[..., :3], bias, mask, scale=0.3, window_left=4)


def explicit(query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """attention() in operators that torch.func knows."""
    key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    q_len, kv_len = query.shape[-2], key.shape[-2]
    visible = torch.arange(kv_len) >= torch.arange(q_len)[:, None] - 4
    scores = 0.3 * query @ key.mT - visible.sum(-1, keepdim=True).clamp(min=1).to(query.dtype).log()
    for term in (bias, mask):
        scores = scores if term is None else scores + term
    return (torch.sigmoid(scores) * visible) @ key[..., :3]


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def loop(function: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> Tensor:
    size = next(t.shape[dim] for t, dim in zip(inputs, in_dims, strict=True) if dim is not None)
    each = [
        function(*(t if dim is None else t.select(dim, i) for t, dim in zip(inputs, in_dims, strict=True)))
        for i in range(size)
    ]
    return torch.stack(each)


@pytest.mark.parametrize("in_dims", [d for d in itertools.product((0, None, 2), (None, 0, 4)) if d != (None, None)])
@pytest.mark.parametrize("batch", [1, 2])
def test_vmap(in_dims: tuple[int | None, ...], batch: int) -> None:
    def shape(dim: int | None, *sizes: int) -> tuple[int, ...]:
        return sizes if dim is None else (*sizes[:dim], 3, *sizes[dim:])

    query, key = tensors(shape(in_dims[0], batch, 4, 5, 8), shape(in_dims[1], batch, 2, 7, 8))
    torch.testing.assert_close(vmap(attention, in_dims)(query, key), loop(explicit, in_dims, query, key))


BIAS_AND_MASK = [
    ((2, 4, 5, 1), (1, 1, 5, 7), None, None),
    ((1, 4, 1, 1), (2, 4, 5, 7), 0, None),
    ((2, 1, 5, 1), (1, 4, 5, 1), None, 0),
    ((1, 1, 1, 1), (2, 1, 1, 7), 0, 0),
]


@pytest.mark.parametrize(("bias_shape", "mask_shape", "bias_dim", "mask_dim"), BIAS_AND_MASK)
def test_vmap_of_bias_and_mask(bias_shape: Any, mask_shape: Any, bias_dim: int | None, mask_dim: int | None) -> None:
    in_dims = (0, None, bias_dim, mask_dim)
    inputs = tensors(
        (3, 2, 4, 5, 8),
        (2, 2, 7, 8),
        bias_shape if bias_dim is None else (3, *bias_shape),
        mask_shape if mask_dim is None else (3, *mask_shape),
    )
    torch.testing.assert_close(vmap(attention, in_dims)(*inputs), loop(explicit, in_dims, *inputs))


@pytest.mark.parametrize("mask_batch", [1, 2, 4])
@pytest.mark.parametrize("mask_dim", [None, 0, 2])
def test_vmap_of_a_repeated_mask(mask_batch: int, mask_dim: int | None) -> None:
    def repeated(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        return explicit(query, key, None, mask.repeat(4 // mask_batch, 1, 1, 1))

    def ours(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        return attention(query, key, None, mask)

    in_dims = (0, None, mask_dim)
    query, key, mask = tensors((3, 4, 4, 5, 8), (4, 2, 7, 8), (3, mask_batch, 1, 5, 7))
    mask = mask[0] if mask_dim is None else mask.movedim(0, mask_dim)
    expected = loop(repeated, in_dims, query, key, mask)
    torch.testing.assert_close(vmap(ours, in_dims)(query, key, mask), expected)
    for which in ((0, 1, 2), (0,)):
        results = (
            vmap(grad(lambda *t, f=f: f(*t).square().sum(), which), in_dims)(query, key, mask) for f in (ours, repeated)
        )
        torch.testing.assert_close(*results)


def test_vmap_does_not_hide_that_a_mask_does_not_fit() -> None:
    query, mask = tensors((3, 2, 4, 5, 8), (3, 1, 5, 5))  # 3 divides the folded batch of 6, but not 2
    with pytest.raises(ArgumentError, match="attn_mask"):
        vmap(lambda q: attention(q, q, None, mask))(query)


def test_grad_and_vjp() -> None:
    inputs = tensors((2, 4, 5, 8), (2, 2, 7, 8), (1, 4, 1, 1), (1, 1, 5, 7))
    every = (0, 1, 2, 3)
    ours = grad_and_value(lambda *t: attention(*t).square().sum(), every)(*inputs)
    torch.testing.assert_close(ours, grad_and_value(lambda *t: explicit(*t).square().sum(), every)(*inputs))
    (out, pull), (expected, expected_pull) = vjp(attention, *inputs), vjp(explicit, *inputs)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(pull(torch.ones_like(out)), expected_pull(torch.ones_like(out)))


@pytest.mark.parametrize(("bias_shape", "mask_shape", "bias_dim", "mask_dim"), BIAS_AND_MASK)
def test_gradients_per_sample(bias_shape: Any, mask_shape: Any, bias_dim: int | None, mask_dim: int | None) -> None:
    in_dims = (0, None, bias_dim, mask_dim)
    inputs = tensors(
        (3, 2, 4, 5, 8),
        (2, 2, 7, 8),
        bias_shape if bias_dim is None else (3, *bias_shape),
        mask_shape if mask_dim is None else (3, *mask_shape),
    )
    for which in ((0, 1, 2, 3), (1,), (0, 3)):
        ours, theirs = (
            vmap(grad(lambda *t, f=f: f(*t).square().sum(), which), in_dims)(*inputs) for f in (attention, explicit)
        )
        torch.testing.assert_close(ours, theirs)


def test_grad_of_vmap_and_jacobian() -> None:
    inputs = tensors((3, 1, 4, 5, 8), (1, 2, 7, 8), (1, 4, 1, 1))
    ours, theirs = (
        grad(lambda q, k, b, f=f: vmap(f, (0, None, None))(q, k, b).square().sum(), (0, 1, 2))(*inputs)
        for f in (attention, explicit)
    )
    torch.testing.assert_close(ours, theirs)
    small = tensors((1, 2, 3, 4), (1, 1, 2, 4))
    torch.testing.assert_close(jacrev(attention, (0, 1))(*small), jacrev(explicit, (0, 1))(*small))


def test_outer_autograd_sees_through_an_inner_transform() -> None:
    query, key = tensors((2, 2, 3, 4), (2, 2, 3, 4))
    weight = torch.randn((), dtype=torch.float64, requires_grad=True)
    results = []
    for function in (attention, explicit):
        out = vmap(lambda q, k, f=function: f(q[None] * weight, k[None]))(query, key)
        results.append((out, torch.autograd.grad(out.sum(), weight)))
        out, _ = vjp(lambda q, f=function: f(q, key * weight), query)
        results[-1] += (torch.autograd.grad(out.sum(), weight),)
    torch.testing.assert_close(results[0], results[1])


def test_no_grad_inside_a_transform() -> None:
    query, key = tensors((1, 2, 3, 4), (1, 2, 3, 4))

    def function(query: Tensor) -> Tensor:
        with torch.no_grad():
            constant = attention(query, key)
        return (constant * query[..., :3]).sum()

    torch.testing.assert_close(grad(function)(query)[..., :3], attention(query, key))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_under_vmap(randomness: str) -> None:
    query = torch.zeros(3, 1, 2, 16, 4)
    key, value = torch.zeros(1, 2, 32, 4), torch.ones(1, 2, 32, 1)

    def function(query: Tensor) -> Tensor:
        return sigswap.sigmoid_attention(query, key, value, bias=0.0, dropout_p=0.5)

    torch.manual_seed(0)
    out = vmap(function, randomness=randomness)(query)
    assert out.std() > 0.1
    assert torch.equal(out[0], out[1]) == (randomness == "same")
    torch.manual_seed(0)
    gradients = vmap(grad(lambda q: function(q).sum()), randomness=randomness)(query)
    assert gradients.shape == query.shape
    if randomness == "same":
        torch.manual_seed(0)
        assert torch.equal(out[2], function(query[2]))


def test_errors_under_transforms() -> None:
    query, key = tensors((3, 2, 4, 5, 8), (3, 2, 3, 7, 8))
    with pytest.raises(ArgumentError, match="not a multiple"):
        vmap(attention)(query, key)
    with pytest.raises(ArgumentError, match=r"key .* must have the batch size"):
        vmap(attention)(query, key[:, :1])


def test_what_has_no_derivative_raises() -> None:
    query, key = tensors((2, 4, 5, 8), (2, 2, 7, 8))

    def function(query: Tensor) -> Tensor:
        return attention(query, key).sum()

    with pytest.raises(SigswapError, match="second derivative"):
        jacrev(jacrev(function))(query)
    with pytest.raises(SigswapError, match="second derivative"):
        grad(lambda q: grad(function)(q).sum())(query)
    for transform in (jacfwd, hessian, lambda f: jacrev(jacfwd(f))):
        with pytest.raises(SigswapError, match="forward-mode"):
            transform(function)(query)
    with forward_ad.dual_level(), pytest.raises(SigswapError, match="forward-mode"):
        function(forward_ad.make_dual(query, query))
    leaf = query.clone().requires_grad_()
    out = function(leaf)
    with forward_ad.dual_level(), pytest.raises(SigswapError, match="forward-mode"):
        torch.autograd.grad(out, leaf, forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))


def test_per_sample_gradients_of_a_module() -> None:
    """As Opacus and the torch.func tutorials have it."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = torch.nn.Linear(8, 24)
            self.bias = torch.nn.Parameter(torch.zeros(2, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            return attend(q, k, v, bias=self.bias, is_causal=True).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    block = Block()
    x = torch.randn(4, 1, 5, 8)
    parameters = dict(block.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(block, parameters, (x,)).square().sum()

    together = vmap(grad(loss), (None, 0))(parameters, x)
    for index in range(4):
        alone = torch.autograd.grad(loss(parameters, x[index]), list(parameters.values()))
        for name, expected in zip(parameters, alone, strict=True):
            torch.testing.assert_close(together[name][index], expected)


def test_compiled_vmap_of_grad() -> None:
    query, key = torch.randn(3, 1, 4, 5, 8), torch.randn(1, 2, 7, 8)

    def function(query: Tensor, key: Tensor) -> Tensor:
        return vmap(grad(lambda q, k: attention(q, k).square().sum(), 1), (0, None))(query, key)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key), function(query, key))


def test_varlen() -> None:
    query, key = tensors((3, 8, 2, 4), (3, 9, 2, 4))
    ends = torch.tensor([0, 5, 8], dtype=torch.int32), torch.tensor([0, 2, 9], dtype=torch.int32)

    def function(query: Tensor, key: Tensor) -> Tensor:
        return varlen.sigmoid_attention_varlen(query, key, key, None, *ends, None, 5, 7, scale=0.3)

    torch.testing.assert_close(vmap(function)(query, key), loop(function, (0, 0), query, key))
    gradients = vmap(grad(lambda q, k: function(q, k).square().sum(), (0, 1)), (0, None))(query, key[0])
    for index in range(3):
        leaves = query[index].clone().requires_grad_(), key[0].clone().requires_grad_()
        expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
        torch.testing.assert_close(tuple(g[index] for g in gradients), expected)
