"""The models of ``sigswap bench`` that are not transformers': a hand-written block, and timm's."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigswap.bench.cells import ModelCell
from sigswap.bench.subject import SDPA, ModelPeer, Subject
from sigswap.optional import require


class Block(nn.Module):
    """A pre-norm transformer block with QK-norm, rotary embeddings and LayerScale; causal."""

    cos: Tensor  # [length, head_dim / 2], as is sin
    sin: Tensor

    def __init__(self, dim: int, heads: int, length: int) -> None:
        super().__init__()
        head_dim = dim // heads
        self.head_dim = head_dim
        self.attention_norm = nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.query_norm = nn.RMSNorm(head_dim)
        self.key_norm = nn.RMSNorm(head_dim)
        self.out = nn.Linear(dim, dim, bias=False)
        self.attention_scale = nn.Parameter(torch.full((dim,), 0.1))
        self.mlp_norm = nn.RMSNorm(dim)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)
        self.mlp_scale = nn.Parameter(torch.full((dim,), 0.1))
        frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(length), frequencies)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        """``x``: [batch, length, dim], and so is the result."""
        batch, length, dim = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, -1, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, head_dim]
        query, key = self._rotate(self.query_norm(query)), self._rotate(self.key_norm(key))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_scale * self.out(attended.transpose(1, 2).reshape(batch, length, dim))
        out: Tensor = x + self.mlp_scale * self.down(F.gelu(self.up(self.mlp_norm(x))))
        return out

    def _rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.cos, self.sin
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def block(cell: ModelCell, dtype: torch.dtype) -> Subject:
    dim, heads = (64, 2) if cell.small else (2048, 16)
    model = Block(dim, heads, cell.length).to(dtype)
    x, grad_out = (torch.randn(cell.batch, cell.length, dim, dtype=dtype) for _ in range(2))
    return Subject(
        model,
        inputs={"x": x},
        training_inputs={"x": x.clone().requires_grad_()},  # from the block before it
        output=lambda returned: returned,
        backward=lambda returned: returned.backward(grad_out),
        peers=SDPA,
        counting=tuple(SDPA),
    )


def vit(cell: ModelCell, dtype: torch.dtype) -> Subject:
    small = {"img_size": cell.length, "embed_dim": 64, "depth": 1, "num_heads": 2, "num_classes": 10}
    model = _timm("vit_base_patch16_224", small if cell.small else {})
    return _on_images(model.to(dtype), cell, dtype, SDPA, tuple(SDPA))


def swin(cell: ModelCell, dtype: torch.dtype) -> Subject:
    """Without stochastic depth, so that each run computes the same. What counts is timm's default, which is unfused."""
    sizes: dict[str, Any] = {"drop_path_rate": 0.0}
    if cell.small:
        sizes.update(img_size=cell.length, embed_dim=32, depths=(2,), num_heads=(2,), num_classes=10)
    model = _timm("swin_tiny_patch4_window7_224", sizes)
    fused = next(module.fused_attn for module in model.modules() if hasattr(module, "fused_attn"))
    peers = {
        "unfused": ModelPeer(prepare=functools.partial(_fuse, fused=False)),
        "sdpa": ModelPeer(prepare=functools.partial(_fuse, fused=True)),
    }
    return _on_images(model.to(dtype), cell, dtype, peers, ("sdpa" if fused else "unfused",))


def _timm(name: str, sizes: Mapping[str, Any]) -> nn.Module:
    model: nn.Module = require("timm", "vision").create_model(name, **sizes)
    return model


def _on_images(
    model: nn.Module,
    cell: ModelCell,
    dtype: torch.dtype,
    peers: Mapping[str, ModelPeer],
    counting: tuple[str, ...],
) -> Subject:
    """A classifier of images."""
    images = {"x": torch.randn(cell.batch, 3, cell.length, cell.length, dtype=dtype)}
    labels = torch.arange(cell.batch) % 10
    return Subject(
        model,
        inputs=images,
        training_inputs=images,
        output=lambda returned: returned,
        backward=lambda returned: torch.autograd.backward(F.cross_entropy(returned, labels)),
        peers=peers,
        counting=counting,
    )


def _fuse(model: Any, fused: bool) -> None:
    """Tells timm's attention modules to use ``scaled_dot_product_attention``, or not to."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
