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


class Own(nn.Module):
    """Query and key may lose some of head_dim, the output some of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head_dim, self.last = nn.Linear(16, 48), HEAD_DIM, 16

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        query, key = (each.view(2, -1, HEADS, HEAD_DIM)[..., : self.head_dim].transpose(1, 2) for each in (query, key))
        value = value.view(2, -1, HEADS, HEAD_DIM).transpose(1, 2)
        out = torch.softmax(query @ key.mT, -1) @ value
        return out.transpose(1, 2).flatten(2)[..., : self.last]


@pytest.mark.slow
@pytest.mark.parametrize("config", [{"query_bias": True}, {"qk_norm": "rms"}, {"qk_norm": "layer"}])
@pytest.mark.parametrize("head_dim", [1, 2])
def test_another_head_dim_than_was_converted(config: dict[str, Any], head_dim: int) -> None:
    x = torch.randn(2, 5, 16)
    model = sigswap.convert(Own().eval(), sigswap.SigmoidConfig(**config), example_inputs=x)
    model.head_dim = head_dim
    with pytest.raises(sigswap.errors.UnknownCallError, match="had a head_dim of 4 on axis -1 when it was converted"):
        model(x)


@pytest.mark.slow
@pytest.mark.parametrize("config", [{"layer_scale": 0.5}, {"hybrid_norm": True}])
@pytest.mark.parametrize("last", [1, 8])
def test_other_channels_than_were_converted(config: dict[str, Any], last: int) -> None:
    """One channel would be spread over all."""
    x = torch.randn(2, 5, 16)
    model = sigswap.convert(Own().eval(), sigswap.SigmoidConfig(**config), example_inputs=x)
    model.last = last
    with pytest.raises(sigswap.errors.UnknownCallError, match="which had 16 channels when it was converted"):
        model(x)
