"""A converted model whose heads are no longer those that were converted: its biases reach none but their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sigswap

transformers = pytest.importorskip("transformers")

HEADS, HEAD_DIM = 4, 4


def llama(attention: str, key_heads: int = HEADS) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=key_heads,
        head_dim=HEAD_DIM,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()
    return model


def half_of(model: Any) -> Any:
    """What tensor parallelism leaves on the first of two devices."""
    attention = model.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight = nn.Parameter(projection.weight[: projection.weight.shape[0] // 2])
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, : attention.o_proj.weight.shape[1] // 2])
    return model


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [2, 3, 8])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("attention, key_heads", [("sdpa", HEADS), ("sdpa", 2), ("eager", HEADS)])
def test_fewer_heads_than_were_converted(attention: str, key_heads: int, masked: bool, tokens: int) -> None:
    model = half_of(sigswap.convert(llama(attention, key_heads)))
    ids = torch.randint(1, 31, (2, tokens), generator=torch.Generator().manual_seed(1))
    mask: Tensor = torch.ones_like(ids)
    if masked:
        mask[0, 0] = 0
    with pytest.raises(sigswap.errors.UnknownCallError, match="had 4 heads when it was converted has 2 now"):
        model(input_ids=ids, attention_mask=mask)


def test_fewer_heads_with_biases_that_have_none() -> None:
    """Without values per head any number of heads is right."""
    config = sigswap.SigmoidConfig(learn_bias=False)
    model, expected = (
        half_of(sigswap.convert(llama("sdpa"), config)),
        sigswap.convert(half_of(llama("sdpa")), config),
    )
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits)
