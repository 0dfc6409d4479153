"""What calibration, ranking, distillation and comparison share: batches that cannot be counted, or gone through but
once; models without values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_once import made_once
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import sigswap
from sigswap.errors import ArgumentError, CalibrationError

X = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(X)


class Refusing(Stream):
    """Its length is an error of another kind than Python's."""

    def __len__(self) -> int:
        raise NotImplementedError("streams have none")


class Once:
    """Any iterable, which gives the same iterator again."""

    def __init__(self) -> None:
        self.batches = iter([X[:2], X[2:]])

    def __iter__(self) -> Iterator[Tensor]:
        return self.batches


@made_once
def converted() -> nn.Module:
    torch.manual_seed(0)
    return sigswap.convert(nn.Sequential(Attention()).eval(), example_inputs=X)


CALLS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "calibrate": lambda model, batches: sigswap.calibrate(model, batches, progress=False),
    "distill": lambda model, batches: sigswap.distill(model, None, batches, steps=3, train="sigmoid", progress=False),
    "compare": lambda model, batches: sigswap.compare(model, None, batches, progress=False),
    "rank_sites": lambda model, batches: sigswap.rank_sites(model, batches, progress=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_batches_without_a_length_are_as_a_list_of_them(call: str) -> None:
    models = [converted() for _ in range(3)]
    given = [[X[:2], X[2:]], DataLoader(Stream(), batch_size=2), DataLoader(Refusing(), batch_size=2)]
    results = [str(CALLS[call](model, batches)) for model, batches in zip(models, given, strict=True)]
    assert results[0] == results[1] == results[2]
    for model in models[1:]:
        assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("call", ["distill", "compare", "rank_sites"])
def test_a_model_on_the_meta_device_is_an_error_that_says_so(call: str) -> None:
    no_values = r"model has no values to run on: 0\.qkv\.weight is on the meta device\. Load its weights first"
    with pytest.raises(ArgumentError, match=no_values):
        CALLS[call](converted().to("meta"), [X])
    assert str(CALLS[call](converted(), [X]))


def test_a_model_whose_base_weights_alone_are_on_the_meta_device_is_not_calibrated() -> None:
    model: Any = converted()
    model[0].qkv.to("meta")
    with pytest.raises(ArgumentError, match=r"model has no values to run on: 0\.qkv\.weight"):
        sigswap.calibrate(model, X, progress=False)
    with pytest.raises(CalibrationError, match="on the meta device"):
        sigswap.calibrate(model.to("meta"), X, progress=False)


def test_an_original_and_a_teacher_on_the_meta_device() -> None:
    model, plain = converted(), nn.Sequential(Attention()).eval().to("meta")
    with pytest.raises(ArgumentError, match=r"original has no values to run on: 0\.qkv\.weight"):
        sigswap.compare(model, plain, [X], progress=False)
    with pytest.raises(ArgumentError, match=r"teacher has no values to run on: 0\.qkv\.weight"):
        sigswap.distill(model, plain, [X], steps=1, progress=False)


def test_without_batches_a_model_on_the_meta_device_is_the_same_error() -> None:
    with pytest.raises(ArgumentError, match=r"model has no values to run on: 0\.qkv\.weight"):
        sigswap.compare(converted().to("meta"), progress=False)


@pytest.mark.parametrize("part", ["the model", "a layer"])
def test_weights_that_accelerate_brings_are_values(part: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = sigswap.compare(converted(), None, [X], progress=False)
    model: Any = converted()
    accelerate.cpu_offload(model if part == "the model" else model[0].qkv, execution_device="cpu")
    assert model[0].qkv.weight.is_meta
    assert sigswap.compare(model, None, [X], progress=False) == expected


@pytest.mark.parametrize("call", ["calibrate", "distill"])
def test_batches_that_can_be_gone_through_but_once_are_an_error_that_says_so(call: str) -> None:
    with pytest.raises(ArgumentError, match=r"batches gave batches once, and then none.*Pass them as a list"):
        CALLS[call](converted(), Once())
