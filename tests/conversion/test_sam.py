"""Relative positions that are added to scores viewed as a grid: SAM, ViTDet, MViT's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import sigmoid_oracle
from torch import Tensor, nn

import sigswap

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def sam(implementation: str) -> nn.Module:
    from transformers import SamVisionConfig, SamVisionModel

    fields: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "output_channels": 8}
    config = SamVisionConfig(**fields, image_size=32, patch_size=8, window_size=3, global_attn_indexes=[1])
    return SamVisionModel._from_config(config, attn_implementation=implementation)


def vitdet() -> nn.Module:
    from transformers import VitDetConfig, VitDetModel

    fields: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    config = VitDetConfig(**fields, image_size=32, pretrain_image_size=32, patch_size=8, window_size=2)
    config.use_relative_position_embeddings, config.window_block_indices = True, [0]
    return VitDetModel(config)


def by_hand() -> nn.Module:
    class Attention(nn.Module):
        """As of the segment-anything package."""

        def __init__(self) -> None:
            super().__init__()
            self.patches, self.qkv = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 48)
            self.rel_pos_h, self.rel_pos_w = (nn.Parameter(torch.zeros(4, 4, 8)) for _ in range(2))

        def forward(self, image: Tensor) -> Tensor:
            x = self.patches(image).permute(0, 2, 3, 1)
            b, h, w, _ = x.shape
            qkv = self.qkv(x).reshape(b, h * w, 3, 2, -1).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.reshape(3, b * 2, h * w, -1).unbind(0)
            attn = (q * 0.35) @ k.transpose(-2, -1)
            grid = q.reshape(b * 2, h, w, 8)
            rel_h = torch.einsum("bhwc,hkc->bhwk", grid, self.rel_pos_h)
            rel_w = torch.einsum("bhwc,wkc->bhwk", grid, self.rel_pos_w)
            attn = attn.view(b * 2, h, w, h, w) + rel_h[:, :, :, :, None] + rel_w[:, :, :, None, :]
            attn = attn.view(b * 2, h * w, h * w).softmax(dim=-1)
            return (attn @ v).view(b, 2, h, w, -1).permute(0, 2, 3, 1, 4).reshape(b, h, w, -1)

    return Attention()


MODELS = {
    "sam eager": (lambda: sam("eager"), 2, ("SamVisionAttention",)),
    "sam sdpa": (lambda: sam("sdpa"), 2, ("SamVisionAttention",)),
    "vitdet": (vitdet, 2, ("VitDetAttention",)),
    "by hand": (by_hand, 1, ("Attention",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_grid_of_scores(name: str) -> None:
    build, sites, owners = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    double = build().eval().double()
    double.load_state_dict(model.state_dict())
    with torch.no_grad(), sigmoid_oracle(owners) as log:
        want = double(IMAGE.double())
    assert log.swapped == sites
    sigswap.convert(model, example_inputs=IMAGE)
    found = [site for site in sigswap.report(model).sites if site.status == "swapped"]
    assert [(site.heads, site.head_dim) for site in found] == [(2, 8)] * sites
    with torch.no_grad():
        got = model(IMAGE)
    got, want = (x if isinstance(x, Tensor) else x[0] for x in (got, want))
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
