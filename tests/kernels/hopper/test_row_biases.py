"""Row biases under a band in the backward of 64 columns on Hopper GPUs: a product of ones and of three terms each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sigswap

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_HOPPER, reason="needs an NVIDIA GPU of compute capability 9"),
]

LENGTH, DIM = 1280, 64


def gradients(
    biases: list[float], scale: float, dtype: torch.dtype, large: float = 1.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Of query, key and value, of one head per bias, and the same in float64. large: a factor of the second head."""
    torch.manual_seed(0)
    shape = 1, len(biases), LENGTH, DIM
    factors = torch.ones(len(biases), 1, 1, device="cuda")
    factors[1] = large
    leaves = [(torch.randn(shape, device="cuda") * factors).to(dtype).requires_grad_() for _ in range(3)]
    bias = torch.tensor(biases, device="cuda").view(1, -1, 1, 1)
    grad_out = torch.randn(shape, device="cuda").to(dtype)
    sigswap.sigmoid_attention(*leaves, bias=bias, is_causal=True, scale=scale).backward(grad_out)
    query, key, value = exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device="cuda").tril()
    scores = (query @ key.mT * scale + bias.double()).masked_fill(~visible, float("-inf"))
    (scores.sigmoid() @ value).backward(grad_out.double())
    return [leaf.grad for leaf in leaves], [leaf.grad for leaf in exact]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [DIM**-0.5, -0.01])
def test_biases_are_as_exact_as_float32(scale: float, dtype: torch.dtype) -> None:
    found, exact = gradients([-7.3, -0.123456, -4.6, 2.5], scale, dtype)
    bound = 4e-3 if dtype == torch.bfloat16 else 8e-4
    for head in range(4):
        for gradient, expected in zip(found, exact, strict=True):
            error = (gradient[:, head].double() - expected[:, head]).norm() / expected[:, head].norm()
            assert error < bound


@pytest.mark.parametrize("large", [1.0, 1e16])
def test_what_is_not_finite_spoils_no_other_head(large: float) -> None:
    found, exact = gradients([-7.3, float("-inf"), float("nan"), -6.9], DIM**-0.5, torch.bfloat16, large)
    for gradient, expected in zip(found, exact, strict=True):
        for head in (0, 3):
            error = (gradient[:, head].double() - expected[:, head]).norm() / expected[:, head].norm()
            assert error < 4e-3
        assert (gradient[:, 1] == 0).all()
        assert gradient[:, 2].isnan().any()
