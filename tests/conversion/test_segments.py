"""Softmax over the edges of a graph, beside other attention: no sigmoid takes its place, and the report has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sigswap
from sigswap import errors

SUMS = "index_add", "scatter_add", "scatter_add_", "scatter_reduce", "index_put"


class EdgeAttention(nn.Module):
    """Attention of each node to those with an edge to it, whose scores are products, or sums as in GAT."""

    def __init__(self, sums: str, heads: int, products: bool = True) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.sums, self.heads, self.products = sums, heads, products

    def forward(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        query, key, value = (proj(x).view(len(x), self.heads, -1) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.products:
            scores = (query[target] * key[source]).sum(-1) / key.shape[-1] ** 0.5
        else:
            scores = nn.functional.leaky_relu(query[target].sum(-1) + key[source].sum(-1))
        if self.heads == 1:
            scores = scores[:, 0]
        weights = (scores - scores.max()).exp()
        zeros = weights.new_zeros(len(x), *weights.shape[1:])
        index = target.view(-1, *(1,) * (weights.dim() - 1)).expand_as(weights)
        sums = {
            "index_add": lambda: zeros.index_add(0, target, weights),
            "scatter_add": lambda: zeros.scatter_add(0, index, weights),
            "scatter_add_": lambda: zeros.scatter_add_(0, index, weights),
            "scatter_reduce": lambda: zeros.scatter_reduce(0, index, weights, "sum"),
            "index_put": lambda: zeros.index_put((target,), weights, accumulate=True),
        }[self.sums]()
        shares = (weights / (sums.index_select(0, target) + 1e-16)).view(-1, self.heads, 1)
        return torch.zeros_like(value).index_add(0, target, shares * value[source]).flatten(1)


class Mixed(nn.Module):
    """As graph transformers have it: all nodes attend to all, and along the edges."""

    def __init__(self, *edges: object) -> None:
        super().__init__()
        self.everywhere = nn.MultiheadAttention(16, 2, batch_first=True)
        self.edges = EdgeAttention(*edges)  # type: ignore[arg-type]

    def forward(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        batch = x[None]
        return self.everywhere(batch, batch, batch, need_weights=False)[0][0] + self.edges(x, source, target)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(6, 16), torch.tensor([0, 1, 2, 3, 4, 5, 0, 2]), torch.tensor([1, 2, 3, 4, 5, 0, 3, 5])


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("sums", SUMS)
def test_products_along_edges_are_refused(sums: str, heads: int) -> None:
    with pytest.raises(errors.UnswappableSiteError, match="edges: its softmax is over segments"):
        sigswap.convert(Mixed(sums, heads), example_inputs=inputs())


def test_left_as_it_is_it_is_reported_and_computes_as_before() -> None:
    torch.manual_seed(0)
    model, given = Mixed("scatter_add_", 2), inputs()
    before = model.edges(*given)
    sigswap.convert(model, example_inputs=given, strict=False)
    (left,) = [site for site in sigswap.report(model).sites if site.status == "left"]
    assert left.path == "edges" and "segments" in left.reason
    assert torch.equal(model.edges(*given), before)


def test_sums_along_edges_are_reported() -> None:
    """As in GAT: no product of query and key, so no error."""
    model = sigswap.convert(Mixed("index_add", 2, False), example_inputs=inputs())
    assert [site.path for site in sigswap.report(model).sites if site.status == "left"] == ["edges"]
