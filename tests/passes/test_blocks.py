"""The lower pass on attention whose mask was taken apart into blocks before: bands are proved, all else keeps them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Graphs
from made_once import made_once
from torch import Tensor, nn

import sigswap
from sigswap.kernels.op import mask_blocks

BLOCKS_OP = torch.ops.sigswap.sigmoid_attention_blocks.default
B, N = 2, 12
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def blocks_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do for large masks on a GPU."""

    def pays(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> bool:
        return attn_mask.dtype == torch.bool and attn_mask.shape[2:] == (query.shape[2], key.shape[2])

    monkeypatch.setattr(mask_blocks, "pays", pays)


@made_once
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return sigswap.convert(
        LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, use_cache=False, **SIZES)),
        example_inputs={"input_ids": torch.zeros(B, N, dtype=torch.long)},
    )


def compiled_ops(model: nn.Module, **inputs: Tensor) -> tuple[list[torch.fx.Node], torch.fx.GraphModule]:
    """The attentions of the one graph that the compiled model is, whose outputs are those of eager code."""
    graphs = Graphs("eager")
    compiled = graphs.compile(copy.deepcopy(model))
    out, expected = compiled(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    (module,) = graphs.modules
    ops = (torch.ops.sigswap.sigmoid_attention.default, BLOCKS_OP)
    return [node for node in module.graph.nodes if node.target in ops], module


def test_a_causal_mask_is_a_band() -> None:
    nodes, module = compiled_ops(llama(), input_ids=torch.randint(0, 50, (B, N)))
    for node in nodes:
        assert node.target is not BLOCKS_OP and node.args[4] is None and node.kwargs["is_causal"]
    assert len(nodes) == 2 and not any("mask_blocks" in str(node.target) for node in module.graph.nodes)


def padded(*, left: bool) -> dict[str, Tensor]:
    mask = torch.arange(N) < torch.tensor([[N], [5]])
    return {"input_ids": torch.randint(0, 50, (B, N)), "attention_mask": mask.flip(1) if left else mask}


def packed() -> dict[str, Tensor]:
    positions = torch.cat((torch.arange(5), torch.arange(N - 5)))
    return {"input_ids": torch.randint(0, 50, (B, N)), "position_ids": positions.expand(B, N)}


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [padded(left=False), padded(left=True), packed()], ids=["right", "left", "packed"])
def test_other_masks_stay_blocks_and_heads_are_not_repeated(inputs: dict[str, Tensor]) -> None:
    nodes, module = compiled_ops(llama(), **inputs)
    assert len(nodes) == 2 and nodes[0].args[4:] == nodes[1].args[4:]
    assert sum("mask_blocks" in str(node.target) for node in module.graph.nodes) == 1
    for node in nodes:
        assert node.target is BLOCKS_OP
        key = node.args[1]
        assert isinstance(key, torch.fx.Node) and key.meta["example_value"].shape == (B, 2, N, 8)


class Layers(nn.Module):
    """Two attentions under the mask that ``mask_of`` makes of rows [M, 1], keys [1, N] and the input [B, N]."""

    def __init__(self, mask_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.mask_of = mask_of

    def forward(self, query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
        mask = self.mask_of(torch.arange(N)[:, None], torch.arange(N)[None], visible)
        once = sigswap.sigmoid_attention(query, key, key, attn_mask=mask, enable_gqa=True)
        return once + sigswap.sigmoid_attention(query + 1, key, key, attn_mask=mask, enable_gqa=True)


def oracle(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """The attention of :class:`Layers`, in float64."""
    key = key.double().repeat_interleave(2, 1)
    bias = -mask.sum(-1, keepdim=True).clamp(min=1).double().log()
    scores = (query.double() @ key.mT / 8**0.5, (query.double() + 1) @ key.mT / 8**0.5)
    return sum(((score + bias).sigmoid() * mask) @ key for score in scores)  # type: ignore[return-value]


MASKS: dict[str, tuple[bool, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "expanded over the batch": (True, lambda i, j, visible: (j <= i).expand(B, 1, N, N)),
    "expanded over the heads": (True, lambda i, j, visible: (j <= i).expand(B, 4, N, N)),
    "a window, expanded": (True, lambda i, j, visible: ((j <= i) & (j > i - 3)).expand(B, 4, N, N)),
    "data, expanded": (False, lambda i, j, visible: ((j <= i) & visible[:1, None, None]).expand(B, 4, N, N)),
    "off by one": (False, lambda i, j, visible: (j < i).expand(B, 4, N, N)),
    "from the second on": (False, lambda i, j, visible: torch.ones(1, 1, N + 1, N + 1).tril().bool()[:, :, :-1, 1:]),
    "or padding": (False, lambda i, j, visible: (j <= i) | visible[:, None, None]),
    "a window for each head": (
        False,
        lambda i, j, visible: ((j <= i) & (j > i - torch.arange(1, 5)[:, None, None]))[None],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKS)
def test_masks_of_all_kinds(name: str) -> None:
    """A band is flags, however it is expanded; what is none has one list of blocks."""
    is_band, mask_of = MASKS[name]
    torch.manual_seed(0)
    query, key, visible = torch.randn(B, 4, N, 8), torch.randn(B, 2, N, 8), torch.rand(B, N) < 0.5
    graphs = Graphs("eager")
    out = graphs.compile(Layers(mask_of))(query, key, visible)
    mask = mask_of(torch.arange(N)[:, None], torch.arange(N)[None], visible)
    torch.testing.assert_close(out.double(), oracle(query, key, mask), rtol=1e-5, atol=1e-5)
    targets = [node.target for node in graphs.nodes]
    assert (len(graphs.calls), targets.count(BLOCKS_OP)) == ((2, 0) if is_band else (0, 2))
    assert sum("mask_blocks" in str(target) for target in targets) == (0 if is_band else 1)


def test_a_mask_that_is_edited_between_two_attentions_is_looked_at_twice() -> None:
    def attend(query: Tensor, key: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        mask = given.clone()
        first = sigswap.sigmoid_attention(query, key, key, attn_mask=mask.expand(B, 4, N, N), enable_gqa=True)
        mask[..., 0] = ~mask[..., 0]
        return first, sigswap.sigmoid_attention(query, key, key, attn_mask=mask.expand(B, 4, N, N), enable_gqa=True)

    inputs = torch.randn(B, 4, N, 8), torch.randn(B, 2, N, 8), torch.rand(1, 1, N, N) < 0.5
    out = Graphs("eager").compile(attend)(*inputs)
    torch.testing.assert_close(out, attend(*inputs), rtol=1e-5, atol=1e-5)
    assert not torch.equal(*out)
