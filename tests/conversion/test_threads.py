"""Attention that a forward runs in another thread: no mode follows it there, so it is refused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sigswap
from sigswap import errors

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
POOL = ThreadPoolExecutor(1)
POOL.submit(int).result()  # its thread is there before any forward


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.attended(*(t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)))

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Submitted(Attention):
    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return POOL.submit(super().attended, q, k, v).result()


class Started(Attention):
    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(F.scaled_dot_product_attention(q, k, v)))
        thread.start()
        thread.join()
        return found[0].transpose(1, 2).flatten(2)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return POOL.submit(self.inner, x).result()


class Projected(Attention):
    """Only the layer before it is in a thread."""

    def forward(self, x: Tensor) -> Tensor:
        qkv = POOL.submit(self.qkv, x).result()
        return self.attended(*(t.unflatten(-1, (2, 8)).transpose(1, 2) for t in qkv.chunk(3, -1)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Submitted, Started, Inner])
def test_is_refused(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(), Attention()).eval()
    with pytest.raises(errors.UnswappableSiteError, match="0: its softmax runs in a thread"):
        sigswap.convert(model, example_inputs=X)
    sigswap.convert(model, example_inputs=X, strict=False)
    sites = sigswap.report(model).sites
    assert [(site.path, site.status) for site in sites] == [("1", "swapped"), ("0", "left")]


def test_what_is_no_attention_may_be_in_one() -> None:
    model = sigswap.convert(Projected().eval(), example_inputs=X)
    other = Attention().eval()
    other.load_state_dict(model.state_dict(), strict=False)
    sigswap.convert(other, example_inputs=X)
    assert torch.allclose(model(X), other(X), atol=1e-5)


def test_threads_are_as_they_were() -> None:
    before = threading.Thread.start, ThreadPoolExecutor.submit
    sigswap.inspect(Submitted(), example_inputs=X)
    assert (threading.Thread.start, ThreadPoolExecutor.submit) == before
