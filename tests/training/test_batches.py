"""Batches that cannot be counted, or gone through but once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import sigswap
from sigswap.errors import ArgumentError

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


@pytest.mark.parametrize("call", ["calibrate", "distill"])
def test_batches_that_can_be_gone_through_but_once_are_an_error_that_says_so(call: str) -> None:
    with pytest.raises(ArgumentError, match=r"batches gave batches once, and then none.*Pass them as a list"):
        CALLS[call](converted(), Once())
