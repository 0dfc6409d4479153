"""The models of the suite models: each with a batch, what a training step of it is, and its softmax attentions.

They have random weights, which are the same in each run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigswap.bench.cells import ModelCell
from sigswap.bench.peers.sdpa import BACKENDS
from sigswap.saving.sources import require


class ModelPeer(NamedTuple):
    """A way in which a model computes its softmax attention.

    Attributes:
        context: What to enter, while compiling and running.
        prepare: What to do to the model, once, which is then a copy. A context could change the model in each turn, but
            from then on Dynamo's guards would take longer (in torch 2.11), and for the peers alone.
    """

    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    prepare: Callable[[Any], object] | None = None


@dataclasses.dataclass
class Subject:
    """A model and what is run on it.

    Attributes:
        model: In eval mode or not: that is set for each phase. Shared by the peers that have no copy.
        inputs: Keyword arguments of a forward pass.
        training_inputs: Keyword arguments of the forward pass of a training step.
        output: The tensor that a forward pass is for, from what the model returns.
        backward: The backward pass, from what the model returns.
        peers: By name.
        counting: The peers that may count as the model without sigswap; the fastest one does.
        after_conversion: Restores in a model what convert has changed beyond the attention.
    """

    model: nn.Module
    inputs: dict[str, Any]
    training_inputs: dict[str, Any]
    output: Callable[[Any], Tensor]
    backward: Callable[[Any], object]
    peers: Mapping[str, ModelPeer]
    counting: tuple[str, ...]
    after_conversion: Callable[[Any], object] = lambda model: None

    @property
    def leaves(self) -> list[Tensor]:
        """What a training step computes the gradients of."""
        tensors = (*self.model.parameters(), *self.training_inputs.values())
        return [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.requires_grad]


def build(cell: ModelCell, dtype: torch.dtype, device: str) -> Subject:
    """The cell's model and batch; both are the same in each run.

    Raises:
        SigswapError: The package that has the model is not installed.
    """
    torch.manual_seed(0)
    with torch.device(device):
        return _BUILDERS[cell.model](cell, dtype)


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


def _block(cell: ModelCell, dtype: torch.dtype) -> Subject:
    dim, heads = (64, 2) if cell.small else (2048, 16)
    model = Block(dim, heads, cell.length).to(dtype)
    x, grad_out = (torch.randn(cell.batch, cell.length, dim, dtype=dtype) for _ in range(2))
    return Subject(
        model,
        inputs={"x": x},
        training_inputs={"x": x.clone().requires_grad_()},  # from the block before it
        output=lambda returned: returned,
        backward=lambda returned: returned.backward(grad_out),
        peers=_SDPA,
        counting=tuple(_SDPA),
    )


def _vit(cell: ModelCell, dtype: torch.dtype) -> Subject:
    small = {"img_size": cell.length, "embed_dim": 64, "depth": 1, "num_heads": 2, "num_classes": 10}
    model = _timm("vit_base_patch16_224", small if cell.small else {})
    return _on_images(model.to(dtype), cell, dtype, _SDPA, tuple(_SDPA))


def _swin(cell: ModelCell, dtype: torch.dtype) -> Subject:
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


def _llama(cell: ModelCell, dtype: torch.dtype) -> Subject:
    transformers = require("transformers", "hf")
    sizes = {
        "hidden_size": 64 if cell.small else 2048,
        "num_hidden_layers": 1 if cell.small else 16,
        "num_attention_heads": 4 if cell.small else 32,
        "num_key_value_heads": 2 if cell.small else 8,
        "head_dim": 16 if cell.small else 64,
        "intermediate_size": 128 if cell.small else 8192,
        "vocab_size": 128 if cell.small else 32000,
        "max_position_embeddings": cell.length,
    }
    config = transformers.LlamaConfig(**sizes)
    # Not .to(dtype), which would round the frequencies of the rotary embeddings.
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    tokens = torch.randint(config.vocab_size, (cell.batch, cell.length))
    subject = Subject(
        model,
        inputs={"input_ids": tokens, "use_cache": False},
        training_inputs={"input_ids": tokens, "labels": tokens, "use_cache": False},
        output=lambda returned: returned.logits,
        backward=lambda returned: returned.loss.backward(),
        peers=_SDPA,
        counting=tuple(_SDPA),
    )
    if cell.model == "llama-no-mask":
        subject.after_conversion = _leave_out_mask  # convert sets the implementation to sdpa
        _leave_out_mask(model)
    return subject


def _leave_out_mask(model: Any) -> None:
    """Transformers makes no mask for an attention implementation that it has no mask function for."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    model.set_attn_implementation("sdpa_without_mask")


def _t5(cell: ModelCell, dtype: torch.dtype) -> Subject:
    """Without dropout, so that each run computes the same."""
    transformers = require("transformers", "hf")
    config = transformers.T5Config(
        d_model=64 if cell.small else 768,
        d_kv=16 if cell.small else 64,
        d_ff=128 if cell.small else 3072,
        num_layers=1 if cell.small else 12,
        num_heads=4 if cell.small else 12,
        vocab_size=128 if cell.small else 32128,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, dtype=dtype)
    source, target = torch.randint(1, config.vocab_size, (2, cell.batch, cell.length))
    peers = {
        "unfused": ModelPeer(prepare=functools.partial(_set_attention, implementation="eager")),
        "sdpa": ModelPeer(prepare=functools.partial(_set_attention, implementation="sdpa")),
    }
    return Subject(
        model,
        inputs={"input_ids": source, "decoder_input_ids": target, "use_cache": False},
        training_inputs={"input_ids": source, "labels": target, "use_cache": False},
        output=lambda returned: returned.logits,
        backward=lambda returned: returned.loss.backward(),
        peers=peers,
        counting=tuple(peers),
    )


def _set_attention(model: Any, implementation: str) -> None:
    """Sets the attention implementation of a transformers model, and of its parts."""
    for part in model.modules():
        if hasattr(part, "set_attn_implementation"):
            part.set_attn_implementation(implementation)


_SDPA = {name: ModelPeer(context) for name, context in BACKENDS.items()}
_BUILDERS: dict[str, Callable[[ModelCell, torch.dtype], Subject]] = {
    "block": _block,
    "vit": _vit,
    "llama": _llama,
    "llama-no-mask": _llama,
    "swin": _swin,
    "t5": _t5,
}
