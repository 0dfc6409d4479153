"""Tensors are alike if the dispatcher and a kernel's plan could not tell them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sigswap.kernels.op import alike


@pytest.fixture(params=["by PyTorch", "without"])
def like(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., alike.Alike]:
    if request.param == "without":
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    elif not hasattr(torch._C._dynamo.guards, "TensorGuards"):
        pytest.skip("this PyTorch has no such check")
    return alike.like


def pair(requires_grad: bool = False) -> list[Tensor]:
    return [torch.randn(2, 3, 4, 8).half().transpose(1, 2).requires_grad_(requires_grad) for _ in range(2)]


class Marked(torch.Tensor):
    pass


DIFFERENT: dict[str, Callable[[Tensor], Any]] = {
    "a size": lambda t: t[:1],
    "strides": lambda t: t.contiguous(),
    "a dtype": lambda t: t.bfloat16(),
    "a device": lambda t: t.to("meta"),
    "a gradient": lambda t: t.clone().requires_grad_(),
    "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "a subclass": lambda t: t.as_subclass(Marked),
    "fewer dimensions": lambda t: t[0],
    "a sign to come": lambda t: torch._neg_view(t),
    "no tensor": lambda t: 1.0,
    "none": lambda t: None,
}


@pytest.mark.parametrize("what", DIFFERENT)
@pytest.mark.parametrize("place", [0, 1])
def test_what_differs_is_not_alike(what: str, place: int, like: Callable[..., alike.Alike]) -> None:
    if what == "none" and not hasattr(torch._C._dynamo.guards, "TensorGuards"):
        pytest.skip("no caller gives it that")
    is_alike = like(*pair())
    others = pair()
    assert is_alike(*others)
    others[place] = DIFFERENT[what](others[place])
    assert not is_alike(*others)
    assert is_alike(*pair())


def test_what_changes_where_calls_go_makes_them_differ(like: Callable[..., alike.Alike]) -> None:
    is_alike = like(*pair())

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    def inside(tensor: Tensor) -> Tensor:
        seen.append(is_alike(tensor, tensor.clone()))
        return tensor

    seen: list[bool] = []
    with torch.autocast("cpu", torch.bfloat16):
        seen.append(is_alike(*pair()))
    inputs = pair()
    with Mode():
        seen.append(is_alike(*inputs))
    stacked = torch.stack(pair())
    torch.vmap(inside)(stacked)
    torch.func.functionalize(inside)(inputs[0])
    assert seen == [False] * 4
    with torch.no_grad():
        assert is_alike(*inputs)
    assert is_alike(*inputs)


def test_one_tensor_in_several_places(like: Callable[..., alike.Alike]) -> None:
    tensor, other = pair()
    is_alike, of_three = like(tensor, tensor), like(tensor, other[:1], tensor)
    assert is_alike(tensor, tensor) and is_alike(other, other) and of_three(other, tensor[:1], other)
    assert not is_alike(other[:1], other[:1]) and not is_alike(other, other[:1]) and not is_alike(1.0, 1.0)
    assert not of_three(other, other, other) and not of_three(other[:1], other[:1], other)


def test_what_required_gradients_goes_on_to(like: Callable[..., alike.Alike]) -> None:
    is_alike = like(*pair(requires_grad=True))
    assert is_alike(*pair(requires_grad=True)) and not is_alike(*pair())


def test_alignment() -> None:
    numbers = torch.zeros(64, dtype=torch.half)
    assert alike.are_aligned(numbers, numbers[8:]) and not alike.are_aligned(numbers, numbers[4:])
