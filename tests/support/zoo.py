"""The models that the acceptance tests convert: tiny, with random weights, from timm, transformers,
torch.nn and by hand.

Everything is seeded. Weights are drawn larger than the libraries' own initial ones: with those, scores are
all about 0, where softmax, a sigmoid with a wrong bias and a sigmoid with the right one hardly differ.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = tuple[Any, ...] | dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        name: what the tests call it.
        builder: makes the model (eval mode), given the variant.
        inputs: makes its inputs, given the variant: a tuple (positional) or a dict (keyword).
        sites: how many attention sites a report must list as swapped.
        owners: the module classes whose code calls the attention softmax (for the oracle).
        variants: e.g. the attention implementations; the first is the library's default.
        calls: how often attention softmax runs in one forward, where that is not ``sites``.
        others: how many other softmaxes (router, pooling) one forward runs.
        is_attention: tells them apart where the same class calls both (module, scores).
        fullgraph: whether the original compiles to one graph.
        inductor: whether the tests also compile it with inductor (slow, so only a few).
        float64: whether the original runs in float64 at all.
        gain: how large the weights are (LeViT's many norms make float32 gradients noisy with more).
    """

    name: str
    builder: Callable[[str], nn.Module]
    inputs: Callable[[str], Inputs]
    sites: int
    owners: tuple[str, ...]
    variants: tuple[str, ...] = ("",)
    calls: int = 0
    others: int = 0
    is_attention: Callable[[nn.Module, Tensor], bool] | None = None
    fullgraph: bool = True
    inductor: bool = False
    float64: bool = True
    gain: float = 1.3

    def build(self, variant: str | None = None) -> nn.Module:
        """The model with its random weights, in eval mode; every call gives the same one."""
        torch.manual_seed(0)
        model = self.builder(self.variants[0] if variant is None else variant)
        return randomise(model, gain=self.gain).eval()

    def make_inputs(self, variant: str | None = None) -> Inputs:
        """The model's inputs; every call gives the same ones."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return self.inputs(self.variants[0] if variant is None else variant)

    @property
    def softmax_calls(self) -> int:
        """How often the unconverted model runs attention softmax in one forward."""
        return self.calls or self.sites


def call(model: Callable[..., Any], inputs: Inputs) -> Any:
    """``model`` on a tuple (positional) or dict (keyword) of inputs."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def randomise(model: nn.Module, seed: int = 0, gain: float = 1.3) -> nn.Module:
    """Draws every parameter anew so that attention scores have a standard deviation of one to three."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 0:
                continue  # CLIP's temperature
            if parameter.dim() == 1:
                value = 0.2 * noise + (1.0 if name.endswith("weight") else 0.0)
            elif any(part in name.lower() for part in ("embed", "bias", "token", "shared", "wte", "wpe")):
                value = 0.7 * noise
            else:
                fan_in = parameter.numel() / parameter.shape[0]
                value = gain * noise / math.sqrt(fan_in)
            parameter.copy_(value)
    return model


# ---------------------------------------------------------------------------------------------- by hand


class RelativeBiasAttention(nn.Module):
    """einsum on [B, N, H, D], scale by division, a learned relative bias, softmax in float32."""

    def __init__(self, dim: int = 32, heads: int = 4, size: int = 10) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.relative_bias = nn.Parameter(torch.zeros(heads, 2 * size - 1))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, n, dim = x.shape
        q, k, v = self.qkv(x).view(batch, n, 3, self.heads, -1).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
        position = torch.arange(n, device=x.device)
        index = position[:, None] - position[None, :] + self.size - 1
        scores = scores + self.relative_bias[:, index]
        p = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
        return self.out(torch.einsum("bhij,bjhd->bihd", p, v).reshape(batch, n, dim))


class FairseqMoEAttention(nn.Module):
    """baddbmm and bmm on [B*H, M, D], boolean masks by masked_fill, and a router's softmax beside it."""

    def __init__(self, dim: int = 32, heads: int = 4, experts: int = 3) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.out_proj = nn.Linear(dim, dim)
        self.position_bias = nn.Parameter(torch.zeros(heads, 1, 1))
        self.router = nn.Linear(dim, experts)
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(experts))

    def forward(self, x: Tensor, key_padding_mask: Tensor, attn_mask: Tensor) -> Tensor:
        length, batch, dim = x.shape  # fairseq's layout: time first
        rows = batch * self.heads

        def split(t: Tensor) -> Tensor:
            return t.contiguous().view(length, rows, self.head_dim).transpose(0, 1)

        gate = torch.softmax(self.router(x), dim=-1)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        bias = self.position_bias.repeat(batch, length, length)
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=self.head_dim**-0.5)
        scores = scores.masked_fill(attn_mask, float("-inf"))
        scores = scores.view(batch, self.heads, length, length)
        scores = scores.masked_fill(key_padding_mask[:, None, None, :], float("-inf"))
        p = F.softmax(scores.view(rows, length, length), dim=-1)
        o = torch.bmm(p, v).transpose(0, 1).reshape(length, batch, dim)
        o = self.out_proj(o)
        return sum(gate[..., i, None] * expert(o) for i, expert in enumerate(self.experts))


class SoftcapAttention(nn.Module):
    """Scale on q alone, ``@``, heads shared by repeat_interleave, a soft cap, softmax by method, dropout."""

    def __init__(self, dim: int = 32, heads: int = 4, kv_heads: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * kv_heads * self.head_dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, n, dim = x.shape
        q = self.q(x).view(batch, n, self.heads, self.head_dim).transpose(1, 2) * self.head_dim**-0.5
        k, v = self.kv(x).view(batch, n, 2, self.kv_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
        v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        scores = torch.tanh(q @ k.transpose(-2, -1) / 2.0) * 2.0
        causal = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(causal, torch.finfo(scores.dtype).min)
        p = self.dropout(scores.softmax(dim=-1))
        return self.out((p @ v).transpose(1, 2).reshape(batch, n, dim))


class TwoSites(nn.Module):
    """Two sites of one spelling in one module, with a pooling softmax (no q.k) between them."""

    def __init__(self, dim: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.pool = nn.Linear(dim, 1)
        self.q2, self.kv2 = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, n, dim = q.shape
        q, k, v = (t.view(batch, -1, self.heads, dim // self.heads).transpose(1, 2) for t in (q, k, v))
        p = F.softmax(torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5, dim=-1)
        return torch.matmul(p, v).transpose(1, 2).reshape(batch, n, dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attend(*self.qkv(x).chunk(3, -1))
        weight = F.softmax(self.pool(x), dim=1)
        pooled = (weight * x).sum(1, keepdim=True)
        return x + self.attend(self.q2(x + pooled), *self.kv2(memory).chunk(2, -1))


class EncoderDecoder(nn.Module):
    """SDPA in a self-attending encoder and a causal decoder that cross-attends; one class for all three."""

    class Attention(nn.Module):
        def __init__(self, dim: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

        def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
            def split(t: Tensor) -> Tensor:
                return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

            k, v = self.kv(y).chunk(2, -1)
            o = F.scaled_dot_product_attention(split(self.q(x)), split(k), split(v), attn_mask=mask, is_causal=causal)
            return x + self.out(o.transpose(1, 2).flatten(2))

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.encoder = self.Attention(dim, heads)
        self.decoder = self.Attention(dim, heads)
        self.cross = self.Attention(dim, heads)

    def forward(self, source: Tensor, target: Tensor, source_mask: Tensor) -> Tensor:
        mask = source_mask[:, None, None, :]
        memory = self.encoder(source, source, mask)
        target = self.decoder(target, target, causal=True)
        return self.cross(target, memory, mask)


# ------------------------------------------------------------------------------------------------- timm


def _timm(build: Callable[[], nn.Module]) -> Callable[[str], nn.Module]:
    def builder(variant: str) -> nn.Module:
        model = build()
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = variant == "fused"
        return model

    return builder


def _vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5)


def _swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=32,
        patch_size=4,
        window_size=4,
        embed_dim=16,
        depths=(2, 1),
        num_heads=(2, 4),
        num_classes=5,
        drop_path_rate=0.0,
    )


def _levit() -> nn.Module:
    from timm.models.levit import Levit

    return Levit(
        img_size=64, num_classes=5, embed_dim=(32, 48), key_dim=8, depth=(1, 1), num_heads=(2, 3)
    )  # one block, the downsampling attention, one block


def _maxvit() -> nn.Module:
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg

    config = MaxxVitCfg(
        embed_dim=(16,),
        depths=(1,),
        block_type=("M",),
        stem_width=8,
        transformer_cfg=MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4), grid_size=(4, 4)),
    )
    return MaxxVit(config, img_size=32, num_classes=5)


def _images(size: int) -> Callable[[str], Inputs]:
    return lambda variant: (torch.randn(2, 3, size, size),)


# ----------------------------------------------------------------------------------------- transformers

VOCAB = 61


def hf(name: str, variant: str = "sdpa", **config: Any) -> nn.Module:
    """A tiny transformers model: ``name`` is its class, ``config`` replaces fields of its config."""
    import transformers

    cls = getattr(transformers, name)
    base = {**_HF[name], **config}
    made = cls.config_class(**base)
    made._attn_implementation = variant
    return cls(made)


def _decoder(**fields: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "use_cache": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **fields,
    }


def _encoder(**fields: Any) -> dict[str, Any]:
    return _decoder(**{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **fields})


_LLAMA = _decoder(num_key_value_heads=2)
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "dropout_rate": 0.0,
    "use_cache": False,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "scale_attn_by_inverse_layer_idx": True,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HF: dict[str, dict[str, Any]] = {
    "BertModel": _encoder(),
    "AlbertModel": _encoder(embedding_size=16),
    "LlamaModel": _LLAMA,
    "LlamaForCausalLM": _LLAMA,
    "Gemma2Model": _decoder(
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        attn_logit_softcapping=3.0,
    ),
    "T5Model": _T5,
    "T5ForConditionalGeneration": _T5,
    "BloomModel": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cache": False,
    },
    "DebertaV2Model": _encoder(
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=4,
        max_relative_positions=16,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        type_vocab_size=0,
    ),
    "XLNetModel": {
        "vocab_size": VOCAB,
        "d_model": 32,
        "n_layer": 2,
        "n_head": 4,
        "d_inner": 48,
        "dropout": 0.0,
        "use_mems_eval": False,
        "use_mems_train": False,
    },
    "GPT2Model": _GPT2,
    "GPT2LMHeadModel": _GPT2,
    "WhisperModel": {
        "vocab_size": VOCAB,
        "num_mel_bins": 8,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_source_positions": 12,
        "max_target_positions": 16,
        "dropout": 0.0,
        "use_cache": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
    "CLIPModel": {
        "text_config": {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        "projection_dim": 16,
    },
}


def _hf(name: str, **config: Any) -> Callable[[str], nn.Module]:
    return lambda variant: hf(name, variant, **config)


def tokens(batch: int = 2, length: int = 10) -> Tensor:
    """Random token ids, none of them special."""
    return torch.randint(3, VOCAB, (batch, length))


def padding_mask(length: int = 10, padded: int = 3, left: bool = False) -> Tensor:
    """1 for tokens, 0 for padding; the first of two rows is padded."""
    mask = torch.ones(2, length, dtype=torch.long)
    if left:
        mask[0, :padded] = 0
    else:
        mask[0, -padded:] = 0
    return mask


def _text(left: bool = False) -> Callable[[str], Inputs]:
    return lambda variant: {"input_ids": tokens(), "attention_mask": padding_mask(left=left)}


def _seq2seq(variant: str) -> Inputs:
    return {
        "input_ids": tokens(),
        "attention_mask": padding_mask(),
        "decoder_input_ids": tokens(2, 7),
    }


def _two_stream(variant: str) -> Inputs:
    perm_mask = torch.zeros(2, 10, 10)
    perm_mask[:, :, -1] = 1.0  # nobody sees the last token, which the second stream predicts
    target_mapping = torch.zeros(2, 1, 10)
    target_mapping[:, 0, -1] = 1.0
    return {"input_ids": tokens(), "perm_mask": perm_mask, "target_mapping": target_mapping}


def _whisper(variant: str) -> Inputs:
    return {"input_features": torch.randn(2, 8, 24), "decoder_input_ids": tokens(2, 7)}


def _clip(variant: str) -> Inputs:
    input_ids = tokens(2, 9)
    input_ids[:, -1] = 2  # the text's embedding is read at the end-of-text token
    return {"input_ids": input_ids, "pixel_values": torch.randn(2, 3, 32, 32)}


# --------------------------------------------------------------------------------------------- torch.nn

_MHA: dict[str, dict[str, Any]] = {
    "batch_first": {"batch_first": True},
    "seq_first": {},
    "weights": {"batch_first": True},
    "per_head_weights": {},
    "padding": {"batch_first": True},
    "attn_mask": {"batch_first": True},
    "float_mask_3d": {},
    "causal": {"batch_first": True},
    "bias_kv": {"add_bias_kv": True, "batch_first": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "kdim_vdim": {"kdim": 12, "vdim": 20, "batch_first": True},
    "no_bias": {"bias": False, "batch_first": True},
    "unbatched": {},
}


class _MHA_Caller(nn.Module):
    """Calls an nn.MultiheadAttention with keyword arguments that are not tensors, and drops a None."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(32, 4, **_MHA[variant])
        self.arguments: dict[str, Any] = {"need_weights": variant in ("weights", "per_head_weights", "bias_kv")}
        if variant == "per_head_weights":
            self.arguments["average_attn_weights"] = False
        if variant == "causal":
            self.arguments["is_causal"] = True

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **masks: Tensor) -> tuple[Tensor, ...]:
        out = self.mha(query, key, value, **masks, **self.arguments)
        return tuple(tensor for tensor in out if tensor is not None)


def _mha_inputs(variant: str) -> Inputs:
    n, m = 6, 8
    if variant == "unbatched":
        return {"query": torch.randn(n, 32), "key": torch.randn(m, 32), "value": torch.randn(m, 32)}
    batch_first = _MHA[variant].get("batch_first", False)
    if variant in ("causal", "padding", "no_bias"):
        m = n  # self-attention, where the fast path runs in eval mode

    def features(length: int, dim: int) -> Tensor:
        return torch.randn(2, length, dim) if batch_first else torch.randn(length, 2, dim)

    query = features(n, 32)
    inputs: dict[str, Any] = {"query": query}
    if m == n:
        inputs |= {"key": query, "value": query}
    else:
        inputs |= {
            "key": features(m, _MHA[variant].get("kdim", 32)),
            "value": features(m, _MHA[variant].get("vdim", 32)),
        }
    if variant in ("padding", "bias_kv", "zero_attn", "per_head_weights"):
        inputs["key_padding_mask"] = padding_mask(m) == 0
    if variant in ("attn_mask", "zero_attn"):
        inputs["attn_mask"] = torch.rand(n, m) > 0.7
    if variant == "float_mask_3d":
        mask = torch.randn(2 * 4, n, m)
        inputs["attn_mask"] = mask.masked_fill(torch.rand(2 * 4, n, m) > 0.8, float("-inf"))
    if variant == "causal":
        inputs["attn_mask"] = torch.ones(n, n, dtype=torch.bool).triu(1)
    return inputs


def _encoder_layer(variant: str) -> nn.Module:
    return nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True, norm_first=variant == "norm_first")


def _torch_encoder(variant: str) -> nn.Module:
    return nn.TransformerEncoder(_encoder_layer(variant), 2)


def _torch_encoder_inputs(variant: str) -> Inputs:
    return {"src": torch.randn(2, 10, 32), "src_key_padding_mask": padding_mask() == 0}


def _torch_decoder(variant: str) -> nn.Module:
    layer = nn.TransformerDecoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    return nn.TransformerDecoder(layer, 1)


def _torch_decoder_inputs(variant: str) -> Inputs:
    return {
        "tgt": torch.randn(2, 6, 32),
        "memory": torch.randn(2, 10, 32),
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(6),
        "memory_key_padding_mask": padding_mask() == 0,
    }


def _torch_transformer(variant: str) -> nn.Module:
    return nn.Transformer(32, 4, 1, 1, 48, dropout=0.0, batch_first=True)


def _torch_transformer_inputs(variant: str) -> Inputs:
    return {
        "src": torch.randn(2, 10, 32),
        "tgt": torch.randn(2, 6, 32),
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(6),
        "tgt_is_causal": True,
    }


# -------------------------------------------------------------------------------------------------- zoo

_SDPA_EAGER = ("sdpa", "eager")
_FUSED = ("fused", "unfused")


def _moe_inputs(variant: str) -> Inputs:
    return torch.randn(9, 2, 32), padding_mask(9) == 0, torch.ones(9, 9, dtype=torch.bool).triu(1)


ZOO: tuple[Entry, ...] = (
    Entry("vit", _timm(_vit), _images(32), 2, ("Attention",), _FUSED, inductor=True),
    Entry("swin", _timm(_swin), _images(32), 3, ("WindowAttention",), _FUSED),
    Entry("levit", _timm(_levit), _images(64), 3, ("Attention", "AttentionDownsample"), gain=1.0),
    Entry("maxvit", _timm(_maxvit), _images(32), 2, ("AttentionCl", "Attention2d"), _FUSED),
    Entry("bert", _hf("BertModel"), _text(), 2, ("BertSelfAttention",), _SDPA_EAGER, inductor=True),
    Entry("albert", _hf("AlbertModel"), _text(), 1, ("AlbertAttention",), _SDPA_EAGER, calls=2),  # one layer, run twice
    Entry("llama", _hf("LlamaModel"), _text(left=True), 2, ("LlamaAttention",), _SDPA_EAGER, inductor=True),
    Entry("gemma2", _hf("Gemma2Model"), _text(left=True), 2, ("Gemma2Attention",), ("eager",)),
    Entry("t5", _hf("T5Model"), _seq2seq, 6, ("T5Attention",), _SDPA_EAGER),
    Entry("bloom", _hf("BloomModel"), _text(left=True), 2, ("BloomAttention",), ("eager",)),
    Entry("deberta", _hf("DebertaV2Model"), _text(), 2, ("DisentangledSelfAttention",), ("eager",)),
    Entry("xlnet", _hf("XLNetModel"), _text(left=True), 2, ("XLNetRelativeAttention",), ("eager",)),
    Entry(
        "xlnet_two_stream",
        _hf("XLNetModel"),
        _two_stream,
        4,
        ("XLNetRelativeAttention",),
        ("eager",),
        float64=False,
    ),
    Entry("gpt2", _hf("GPT2Model"), _text(left=True), 2, ("GPT2Attention",), _SDPA_EAGER),
    Entry(
        "gpt2_upcast",  # baddbmm on an empty tensor with beta=0
        _hf("GPT2Model", reorder_and_upcast_attn=True),
        _text(left=True),
        2,
        ("GPT2Attention",),
        ("eager",),
        float64=False,
    ),
    Entry("whisper", _hf("WhisperModel"), _whisper, 3, ("WhisperAttention",), _SDPA_EAGER),
    Entry("clip", _hf("CLIPModel"), _clip, 2, ("CLIPAttention",), _SDPA_EAGER),
    Entry(
        "relative_bias",
        lambda variant: RelativeBiasAttention(),
        lambda variant: (torch.randn(2, 9, 32),),
        1,
        ("RelativeBiasAttention",),
    ),
    Entry(
        "fairseq_moe",
        lambda variant: FairseqMoEAttention(),
        _moe_inputs,
        1,
        ("FairseqMoEAttention",),
        others=1,
        is_attention=lambda module, scores: scores.shape[-1] != len(module.experts),
        inductor=True,
    ),
    Entry(
        "softcap",
        lambda variant: SoftcapAttention(),
        lambda variant: (torch.randn(2, 9, 32),),
        1,
        ("SoftcapAttention",),
    ),
    Entry(
        "two_sites",
        lambda variant: TwoSites(),
        lambda variant: (torch.randn(2, 7, 32), torch.randn(2, 9, 32)),
        2,
        ("TwoSites",),
        others=1,
        is_attention=lambda module, scores: scores.dim() == 4,
    ),
    Entry(
        "encoder_decoder",
        lambda variant: EncoderDecoder(),
        lambda variant: (torch.randn(2, 10, 32), torch.randn(2, 6, 32), padding_mask() == 1),
        3,
        ("EncoderDecoder.Attention", "Attention"),
    ),
    Entry("mha", _MHA_Caller, _mha_inputs, 1, ("MultiheadAttention",), tuple(_MHA)),
    Entry(
        "encoder_layer",
        _encoder_layer,
        lambda variant: (torch.randn(2, 10, 32),),
        1,
        ("MultiheadAttention",),
        ("norm_last", "norm_first"),
    ),
    Entry(
        "torch_encoder",
        _torch_encoder,
        _torch_encoder_inputs,
        2,
        ("MultiheadAttention",),
        ("norm_last", "norm_first"),
    ),
    Entry(
        "torch_decoder",  # breaks the graph where it looks whether its mask is causal
        _torch_decoder,
        _torch_decoder_inputs,
        2,
        ("MultiheadAttention",),
        fullgraph=False,
    ),
    Entry("torch_transformer", _torch_transformer, _torch_transformer_inputs, 3, ("MultiheadAttention",)),
)

BY_NAME = {entry.name: entry for entry in ZOO}

CASES: tuple[tuple[Entry, str], ...] = tuple((entry, variant) for entry in ZOO for variant in entry.variants)


def case_id(case: tuple[Entry, str]) -> str:
    """``bert-sdpa``"""
    entry, variant = case
    return f"{entry.name}-{variant}" if variant else entry.name
