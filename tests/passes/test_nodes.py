"""The accessors of a node's arguments give what they say, or raise, or None where that is documented."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from sigswap.passes.nodes import argument, axes_arg, edited_by, input_at, input_list, int_arg, number_arg, tensor_input
from sigswap.passes.ops import spelling_of


def nodes_of(x: Tensor) -> dict[str, Node]:
    """By spelling, the nodes of a few calls on ``x`` ([2, 3, 4])."""

    def function(x: Tensor) -> Tensor:
        y = torch.dropout(x, 0.25, True).sum((0, -1)) + torch.baddbmm(x, x, x[:, 0, :, None] * x[:, :1], alpha=3).sum()
        return torch.cat([y, y], 0).mul_(x.mean())

    graph = make_fx(function, pre_dispatch=True)(x).graph
    return {spelling_of(node): node for node in graph.nodes}


def test_arguments() -> None:
    nodes = nodes_of(torch.randn(2, 4, 4))
    dropout, product, cat, edit = (nodes[name] for name in ("dropout", "baddbmm", "cat", "mul"))
    assert number_arg(dropout, 1, "p") == 0.25
    assert (number_arg(product, None, "alpha", 1.0), number_arg(product, None, "beta", 1.0)) == (3, 1.0)
    assert argument(dropout, 2, "train") is True and argument(dropout, 3, "no such") is None
    assert int_arg(cat, 1, default=0) == 0 and int_arg(dropout, 1, "p") is None  # no integer
    assert tensor_input(product, 2) is product.args[2] is input_at(product, 2) and input_at(product, 3) is None
    assert input_list(cat) == [nodes["add"], nodes["add"]] and input_list(dropout) == []
    assert edited_by(edit) == [cat] and edited_by(product) == []


def test_axes_count_from_0() -> None:
    node = nodes_of(torch.randn(2, 4, 4))["sum"]
    graph = torch.fx.Graph()
    one, several, none = (graph.call_function(node.target, args) for args in ((node, -1), (node, [0, -1]), (node,)))
    assert (axes_arg(one, 1, 3), axes_arg(several, 1, 3), axes_arg(none, 1, 3)) == ((2,), (0, 2), None)


def test_what_is_not_there_is_named() -> None:
    nodes = nodes_of(torch.randn(2, 4, 4))
    with pytest.raises(TypeError, match="argument 1 of %dropout"):
        tensor_input(nodes["dropout"], 1)
    with pytest.raises(TypeError, match="alpha of %dropout"):
        number_arg(nodes["dropout"], None, "alpha")
    with pytest.raises(TypeError, match="mat1 of %baddbmm"):
        number_arg(nodes["baddbmm"], 1, "mat1")
