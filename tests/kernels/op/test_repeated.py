"""A call like an earlier one, which is not checked again, computes what it should, and takes no wrong argument."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sigswap
from sigswap.errors import ArgumentError
from sigswap.kernels import settings
from sigswap.kernels.op import repeated


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    repeated._known.clear()
    yield
    repeated._known.clear()


def tensors(heads: int = 4, kv_heads: int = 4, rows: int = 7, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(heads + rows)
    shapes = (2, rows, heads, 16), (2, 9, kv_heads, 16), (2, 9, kv_heads, 8)
    return [torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes]


def exact(
    query: Tensor, key: Tensor, value: Tensor, *, bias: float | None = None, scale: float | None = None
) -> Tensor:
    query, key, value = query.double(), key.double(), value.double()
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    row_bias = -torch.tensor(float(key.shape[2])).log().double() if bias is None else bias
    return torch.sigmoid(scores + row_bias) @ value


def assert_near(out: Tensor, expected: Tensor) -> None:
    assert (out.double() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("options", [{}, {"scale": 0.4}, {"bias": -2.0}, {"bias": -1.0, "scale": 0.1}])
def test_the_second_call_is_known_and_has_its_own_numbers(options: dict[str, Any]) -> None:
    first, second = tensors(), [2 * tensor for tensor in tensors()]
    assert_near(sigswap.sigmoid_attention(*first, **options), exact(*first, **options))
    (known,) = repeated._known.values()
    assert_near(sigswap.sigmoid_attention(*second, **options), exact(*second, **options))
    assert list(repeated._known.values()) == [known]


@pytest.mark.parametrize("float_type", [torch.float16, torch.bfloat16])
def test_gradients_of_known_calls(float_type: torch.dtype) -> None:
    def gradients(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(sigswap.sigmoid_attention(*leaves).square().sum(), leaves)

    inputs = tensors(dtype=float_type)
    with torch.inference_mode():  # what is known from there holds for training
        sigswap.sigmoid_attention(*[tensor.clone() for tensor in inputs])
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(exact(*leaves).square().sum(), leaves)
    for _ in range(2):
        for grad, right in zip(gradients(inputs), expected, strict=True):
            assert (grad.double() - right).norm() <= 2e-2 * right.norm()


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"is_causal": 1}, "is_causal"),
        ({"enable_gqa": 0}, "enable_gqa"),
        ({"bias": 0}, "bias"),
        ({"softcap": -1.0}, "softcap"),
        ({"window": -3}, "window"),
        ({"row_cap": 0.0}, "row_cap"),
        ({"scale": torch.tensor(0.25, requires_grad=True)}, "scale"),
        ({"dropout_p": 1.5}, "dropout_p"),
    ],
)
def test_wrong_arguments_like_right_ones_are_refused(wrong: dict[str, Any], name: str) -> None:
    inputs = tensors()
    for right in ({"is_causal": True}, {"is_causal": False}, {"enable_gqa": False}, {"bias": 0.0}, {"scale": 0.25}):
        sigswap.sigmoid_attention(*inputs, **right)
    with pytest.raises(ArgumentError, match=name):
        sigswap.sigmoid_attention(*inputs, **wrong)


def test_tensors_unlike_known_ones_are_checked() -> None:
    query, key, value = tensors()
    sigswap.sigmoid_attention(query, key, value)
    for others in ((query.half(), key, value), (query, key[:, :, :5], value), (query, key.to("meta"), value)):
        with pytest.raises(ArgumentError):
            sigswap.sigmoid_attention(*others)
    query, key, value = tensors(kv_heads=2)
    sigswap.sigmoid_attention(query, key, value, enable_gqa=True)
    with pytest.raises(ArgumentError, match="enable_gqa"):
        sigswap.sigmoid_attention(query, key, value)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("other", [None, 1.0, "query"])
def test_what_is_no_tensor_is_refused(place: int, other: Any) -> None:
    inputs: list[Any] = list(tensors())
    sigswap.sigmoid_attention(*inputs)
    inputs[place] = other
    with pytest.raises(ArgumentError, match="must be a tensor"):
        sigswap.sigmoid_attention(*inputs)


def test_other_layouts_and_settings_are_other_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = tensors()
    expected = exact(query, key, value)
    odd = torch.empty(query.numel() + 1, dtype=query.dtype)[1:].view(query.shape).copy_(query)
    for form in ("auto", "accurate"):
        monkeypatch.setattr(settings, "sigmoid_form", form)
        for each in (query, query.contiguous(), odd):
            assert_near(sigswap.sigmoid_attention(each, key, value), expected)
    assert len({known.signature for known in repeated._known.values()}) == len(repeated._known) == 6


def test_what_is_none_of_the_usual_calls_is_not_kept() -> None:
    query, key, value = tensors()
    sigswap.sigmoid_attention(query, key, value, window=3)
    sigswap.sigmoid_attention(query, key, value, attn_mask=torch.ones(7, 9).bool())
    sigswap.sigmoid_attention(query[0], key[0], value[0])
    sigswap.sigmoid_attention(query.float(), key.float(), value.float())
    with torch.autocast("cpu", torch.bfloat16):
        sigswap.sigmoid_attention(query, key, value)
    torch.compile(sigswap.sigmoid_attention, backend="eager", fullgraph=True)(query, key, value)
    assert not repeated._known


def test_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated, "MAX_PLANS", 3)
    for rows in range(1, 9):
        query, key, value = tensors(rows=rows)
        assert_near(sigswap.sigmoid_attention(query, key, value), exact(query, key, value))
    assert len(repeated._known) <= 3
