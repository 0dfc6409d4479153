"""The lower pass on attention whose mask was taken apart into blocks before: bands are proved, all else keeps them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from graphs import Graphs
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


@pytest.mark.parametrize("inputs", [padded(left=False), padded(left=True), packed()], ids=["right", "left", "packed"])
def test_other_masks_stay_blocks_and_heads_are_not_repeated(inputs: dict[str, Tensor]) -> None:
    nodes, module = compiled_ops(llama(), **inputs)
    assert len(nodes) == 2 and nodes[0].args[4:] == nodes[1].args[4:]
    assert sum("mask_blocks" in str(node.target) for node in module.graph.nodes) == 1
    for node in nodes:
        assert node.target is BLOCKS_OP
        key = node.args[1]
        assert isinstance(key, torch.fx.Node) and key.meta["example_value"].shape == (B, 2, N, 8)
