"""Models of packages that are neither transformers, timm nor torchvision; their versions are in requirements.txt."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.coverage.check import Built, randomised

Make = Callable[[], nn.Module]
Inputs = Callable[[], tuple[Any, ...] | dict[str, Any]]

S: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 4, "dim_head": 8}
V: dict[str, Any] = {**S, "image_size": 32, "patch_size": 8, "num_classes": 5, "mlp_dim": 48}


def names() -> list[str]:
    return list(CASES)


def build(name: str) -> Built:
    """The case of that name. Raises ModuleNotFoundError if its package is not installed."""
    make, inputs = CASES[name]

    def seeded() -> nn.Module:
        torch.manual_seed(0)
        return randomised(make())

    torch.manual_seed(1)
    given = inputs()
    calls = ((), given) if isinstance(given, dict) else (given, {})
    factory = {"factory": "tests.coverage.cases:made", "factory_kwargs": {"name": name}}
    return Built(seeded, calls, factory=factory)


def _of(path: str, *args: Any, **kwargs: Any) -> Make:
    """``module:Class`` with these arguments; the package is imported when the model is made."""
    return lambda: _get(path)(*args, **kwargs)


def _get(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _image(size: int = 32, channels: int = 3) -> Inputs:
    return lambda: (torch.randn(2, channels, size, size),)


def _ids(length: int = 16, most: int = 60) -> Tensor:
    return torch.randint(1, most, (2, length))


def _features(length: int = 12, width: int = 32) -> Inputs:
    return lambda: (torch.randn(2, length, width),)


class Method(nn.Module):
    """A model whose way in is another method than forward, or takes arguments that are no tensors."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self.model, *inputs)


def _method(make: Make, call: Callable[..., Any]) -> Make:
    return lambda: Method(make(), call)


def _x(kind: str = "Decoder", wrapper: str = "TransformerWrapper", **options: Any) -> Make:
    def make() -> nn.Module:
        package = importlib.import_module("x_transformers")
        layers = getattr(package, kind)(dim=32, depth=2, heads=4, attn_dim_head=8, **options)
        return getattr(package, wrapper)(num_tokens=64, max_seq_len=32, attn_layers=layers)

    return make


def _x_vit() -> nn.Module:
    package = importlib.import_module("x_transformers")
    layers = package.Encoder(dim=32, depth=2, heads=4, attn_dim_head=8)
    return package.ViTransformerWrapper(image_size=32, patch_size=8, num_classes=5, attn_layers=layers)


def _open_clip(**vision: Any) -> Make:
    def make() -> nn.Module:
        from open_clip.model import CLIP

        text = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2}
        return CLIP(16, {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32, **vision}, text)

    return make


def _open_coca() -> nn.Module:
    from open_clip.coca_model import CoCa

    text = {
        "context_length": 16,
        "vocab_size": 64,
        "width": 32,
        "heads": 4,
        "layers": 2,
        "embed_cls": True,
        "output_tokens": True,
    }
    vision = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32}
    vision |= {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
    multimodal = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2}
    return CoCa(32, multimodal, text, vision)


def _texts_and_images() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 32, 32), _ids(16)


_UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
_DIT: dict[str, Any] = {
    "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "sample_size": 8, "patch_size": 2, "norm_num_groups": 4,
}  # fmt: skip


def _sliced() -> nn.Module:
    model = _get("diffusers:UNet2DConditionModel")(**_UNET)
    model.set_attn_processor(_get("diffusers.models.attention_processor:AttnProcessor")())
    return model


def _esm() -> nn.Module:
    return _get("esm.model.esm2:ESM2")(num_layers=2, embed_dim=32, attention_heads=4)


def _rtdl() -> nn.Module:
    cls = _get("rtdl_revisiting_models:FTTransformer")
    options = {**cls.get_default_kwargs(n_blocks=1), "d_block": 32, "attention_n_heads": 4}
    return cls(n_cont_features=3, cat_cardinalities=[4, 5], d_out=2, **options)


def _whisper() -> nn.Module:
    module = importlib.import_module("whisper.model")
    return module.Whisper(module.ModelDimensions(16, 12, 32, 4, 1, 64, 16, 32, 4, 1))


def _sam() -> nn.Module:
    return _get("segment_anything.modeling:ImageEncoderViT")(
        img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=4, out_chans=16, qkv_bias=True,
        use_rel_pos=True, window_size=2, global_attn_indexes=(1,),
    )  # fmt: skip


def _chronos() -> nn.Module:
    from transformers import T5Config

    importlib.import_module("chronos.chronos_bolt")
    config = T5Config(
        vocab_size=2, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0, pad_token_id=0,
        chronos_config={
            "context_length": 32, "prediction_length": 8, "input_patch_size": 8, "input_patch_stride": 8,
            "quantiles": [0.1, 0.5, 0.9], "use_reg_token": True,
        },
    )  # fmt: skip
    return _get("chronos.chronos_bolt:ChronosBoltModelForForecasting")(config)


CASES: dict[str, tuple[Make, Inputs]] = {
    # vit-pytorch
    "vit-pytorch/vit": (_of("vit_pytorch:ViT", **V), _image()),
    "vit-pytorch/simple_vit": (_of("vit_pytorch:SimpleViT", **V), _image()),
    "vit-pytorch/simple_vit_3d": (
        _of("vit_pytorch.simple_vit_3d:SimpleViT", image_size=16, image_patch_size=8, frames=4, frame_patch_size=2,
            num_classes=5, mlp_dim=48, **S),
        lambda: (torch.randn(2, 3, 4, 16, 16),),
    ),
    "vit-pytorch/qk_norm": (_of("vit_pytorch.simple_vit_with_qk_norm:SimpleViT", **V), _image()),
    "vit-pytorch/deepvit": (_of("vit_pytorch.deepvit:DeepViT", **V), _image()),
    "vit-pytorch/cait": (_of("vit_pytorch.cait:CaiT", cls_depth=1, **V), _image()),
    "vit-pytorch/t2t": (_of("vit_pytorch.t2t:T2TViT", image_size=32, num_classes=5, mlp_dim=48, **S), _image()),
    "vit-pytorch/cct": (
        _of("vit_pytorch.cct:CCT", img_size=32, embedding_dim=32, num_layers=2, num_heads=4, mlp_ratio=1,
            num_classes=5),
        _image(),
    ),
    "vit-pytorch/cross_vit": (
        _of("vit_pytorch.cross_vit:CrossViT", image_size=32, num_classes=5, depth=1, sm_dim=16, lg_dim=32,
            sm_patch_size=8, lg_patch_size=16, sm_enc_heads=2, sm_enc_mlp_dim=32, sm_enc_dim_head=8, lg_enc_depth=1,
            lg_enc_heads=4, lg_enc_mlp_dim=32, lg_enc_dim_head=8, cross_attn_depth=1, cross_attn_heads=2,
            cross_attn_dim_head=8),
        _image(),
    ),
    "vit-pytorch/pit": (
        _of("vit_pytorch.pit:PiT", image_size=32, patch_size=8, num_classes=5, dim=32, depth=(1, 1), heads=4,
            mlp_dim=48, dim_head=8),
        _image(),
    ),
    "vit-pytorch/levit": (
        _of("vit_pytorch.levit:LeViT", image_size=64, num_classes=5, dim=(16, 32), depth=1, heads=(2, 4), mlp_mult=2,
            stages=2, dim_key=8, dim_value=8),
        _image(64),
    ),
    "vit-pytorch/cvt": (
        _of("vit_pytorch.cvt:CvT", num_classes=5, s1_emb_dim=16, s2_emb_dim=24, s2_depth=1, s3_emb_dim=32, s3_depth=1,
            s3_heads=2),
        _image(),
    ),
    "vit-pytorch/twins_svt": (
        _of("vit_pytorch.twins_svt:TwinsSVT", num_classes=5, s1_emb_dim=16, s1_local_patch_size=4, s1_global_k=4,
            s2_emb_dim=16, s2_local_patch_size=4, s2_global_k=4, s3_emb_dim=16, s3_depth=1, s3_local_patch_size=4,
            s3_global_k=4, s4_emb_dim=16, s4_depth=1, s4_local_patch_size=2, s4_global_k=2),
        _image(64),
    ),
    "vit-pytorch/crossformer": (
        _of("vit_pytorch.crossformer:CrossFormer", num_classes=5, dim=(32, 32, 32, 32), depth=(1, 1, 1, 1),
            global_window_size=(4, 2, 2, 1), local_window_size=(4, 4, 2, 2)),
        _image(64),
    ),
    "vit-pytorch/regionvit": (
        _of("vit_pytorch.regionvit:RegionViT", num_classes=5, dim=(32, 32, 32, 32), depth=(1, 1, 1, 1), window_size=2),
        _image(64),
    ),
    "vit-pytorch/scalable_vit": (
        _of("vit_pytorch.scalable_vit:ScalableViT", num_classes=5, dim=32, heads=(2, 4), depth=(1, 1),
            reduction_factor=(2, 1), window_size=(4, None), iwsa_dim_key=8, iwsa_dim_value=8, ssa_dim_key=8,
            ssa_dim_value=8),
        _image(32),
    ),
    "vit-pytorch/sep_vit": (
        _of("vit_pytorch.sep_vit:SepViT", num_classes=5, dim=32, dim_head=8, heads=(2, 4), depth=(1, 1)),
        _image(56),
    ),
    "vit-pytorch/max_vit": (
        _of("vit_pytorch.max_vit:MaxViT", num_classes=5, dim=16, dim_head=8, depth=(1, 1), window_size=4,
            dim_conv_stem=16),
        _image(32),
    ),
    "vit-pytorch/nest": (
        _of("vit_pytorch.nest:NesT", image_size=32, patch_size=4, num_classes=5, dim=16, heads=2, num_hierarchies=2,
            block_repeats=(1, 1), dim_head=8),
        _image(),
    ),
    "vit-pytorch/mobile_vit": (
        _of("vit_pytorch.mobile_vit:MobileViT", (32, 32), dims=[16, 16, 16], num_classes=5,
            channels=[8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8]),
        _image(64),
    ),
    "vit-pytorch/xcit": (_of("vit_pytorch.xcit:XCiT", cls_depth=1, **V), _image()),
    "vit-pytorch/small_dataset": (_of("vit_pytorch.vit_for_small_dataset:ViT", **V), _image()),
    "vit-pytorch/parallel": (_of("vit_pytorch.parallel_vit:ViT", **V), _image()),
    "vit-pytorch/patch_merger": (_of("vit_pytorch.vit_with_patch_merger:ViT", **{**V, "depth": 4}), _image()),
    "vit-pytorch/rvt": (_of("vit_pytorch.rvt:RvT", **V), _image()),
    "vit-pytorch/ats_vit": (_of("vit_pytorch.ats_vit:ViT", max_tokens_per_depth=(12, 8), **V), _image()),
    "vit-pytorch/look_vit": (
        _of("vit_pytorch.look_vit:LookViT", dim=32, image_size=32, num_classes=5, depth=2, patch_size=16, heads=4,
            dim_head=8, highres_patch_size=8, cross_attn_heads=4, cross_attn_dim_head=8),
        _image(),
    ),
    "vit-pytorch/vivit": (
        _of("vit_pytorch.vivit:ViViT", image_size=16, image_patch_size=8,
            frames=4, frame_patch_size=2, num_classes=5, dim=32, spatial_depth=1, temporal_depth=1, heads=4,
            mlp_dim=48, dim_head=8),
        lambda: (torch.randn(2, 3, 4, 16, 16),),
    ),
    "vit-pytorch/na_vit": (
        _method(_of("vit_pytorch.na_vit:NaViT", **V), lambda model, a, b: model([[a, b], [b]])),
        lambda: (torch.randn(3, 16, 32), torch.randn(3, 8, 8)),
    ),
    # x-transformers
    "x-transformers/decoder": (_x(), lambda: (_ids(),)),
    "x-transformers/encoder": (_x("Encoder"), lambda: (_ids(),)),
    "x-transformers/alibi": (_x(alibi_pos_bias=True, alibi_num_heads=2), lambda: (_ids(),)),
    "x-transformers/rotary_xpos": (_x(rotary_xpos=True), lambda: (_ids(),)),
    "x-transformers/rel_pos_bias": (_x(rel_pos_bias=True), lambda: (_ids(),)),
    "x-transformers/kv_heads": (_x(attn_kv_heads=2), lambda: (_ids(),)),
    "x-transformers/flash": (_x(attn_flash=True), lambda: (_ids(),)),
    "x-transformers/qk_norm": (_x(attn_qk_norm=True), lambda: (_ids(),)),
    "x-transformers/softclamp": (_x(attn_softclamp_logits=True), lambda: (_ids(),)),
    "x-transformers/memory_kv": (_x(attn_num_mem_kv=2), lambda: (_ids(),)),
    "x-transformers/talking_heads": (_x(attn_pre_talking_heads=True, attn_post_talking_heads=True), lambda: (_ids(),)),
    "x-transformers/gated": (_x(attn_gate_values=True), lambda: (_ids(),)),
    "x-transformers/vit": (_x_vit, _image()),
    # of the same author, one idea each
    "local-attention/transformer": (
        _of("local_attention:LocalTransformer", num_tokens=64, max_seq_len=32, local_attn_window_size=8, **S),
        lambda: (_ids(32),),
    ),
    "conformer/conformer": (_of("conformer:Conformer", **S, conv_kernel_size=5), _features()),
    "linformer/lm": (
        _of("linformer:LinformerLM", num_tokens=64, dim=32, seq_len=16, depth=2, k=8, heads=4),
        lambda: (_ids(),),
    ),
    "perceiver-pytorch/perceiver": (
        _of("perceiver_pytorch:Perceiver", num_freq_bands=2, depth=2, max_freq=4.0, num_latents=6, latent_dim=32,
            cross_dim_head=8, latent_heads=4, latent_dim_head=8, num_classes=5),
        lambda: (torch.randn(2, 8, 8, 3),),
    ),
    "axial-attention/image": (
        _of("axial_attention:AxialImageTransformer", dim=32, depth=2, heads=4, reversible=False,
            axial_pos_emb_shape=(6, 6)),
        lambda: (torch.randn(2, 32, 6, 6),),
    ),
    "timesformer-pytorch/timesformer": (
        _of("timesformer_pytorch:TimeSformer", num_frames=4, num_classes=5, image_size=16, patch_size=8, **S),
        lambda: (torch.randn(2, 4, 3, 16, 16),),
    ),
    "tab-transformer-pytorch/tab": (
        _of("tab_transformer_pytorch:TabTransformer", categories=(4, 5, 3), num_continuous=2, dim_out=2,
            mlp_act=nn.ReLU(), **S),
        lambda: (torch.randint(0, 3, (2, 3)), torch.randn(2, 2)),
    ),
    "tab-transformer-pytorch/ft": (
        _of("tab_transformer_pytorch:FTTransformer", categories=(4, 5, 3), num_continuous=2, dim_out=2, **S),
        lambda: (torch.randint(0, 3, (2, 3)), torch.randn(2, 2)),
    ),
    "rtdl-revisiting-models/ft_transformer": (_rtdl, lambda: (torch.randn(2, 3), torch.randint(0, 4, (2, 2)))),
    "nystrom-attention/nystromformer": (
        _of("nystrom_attention:Nystromformer", num_landmarks=4, **S), _features(16)
    ),
    "slot-attention/slots": (
        _of("slot_attention:SlotAttention", num_slots=3, dim=32, iters=2, hidden_dim=32), _features()
    ),
    "palm-pytorch/palm": (_of("palm_pytorch:PaLM", num_tokens=64, **S), lambda: (_ids(),)),
    "coca-pytorch/coca": (
        _of("coca_pytorch.coca_pytorch:CoCa", num_tokens=64, dim=32, unimodal_depth=1, multimodal_depth=1,
            image_dim=32, num_img_queries=4, heads=4, dim_head=8, caption_loss_weight=1.0),
        lambda: {"text": _ids(), "image_tokens": torch.randn(2, 6, 32)},
    ),
    "itransformer/itransformer": (
        _of("iTransformer:iTransformer", num_variates=5, lookback_len=16, pred_length=4, **S),
        lambda: (torch.randn(2, 16, 5),),
    ),
    "halonet-pytorch/halo": (
        _of("halonet_pytorch:HaloAttention", dim=32, block_size=4, halo_size=2, dim_head=8, heads=4),
        lambda: (torch.randn(2, 32, 8, 8),),
    ),
    "megabyte-pytorch/megabyte": (
        _of("MEGABYTE_pytorch:MEGABYTE", num_tokens=64, dim=(32, 16), depth=(1, 1), max_seq_len=(8, 4), dim_head=8,
            heads=4),
        lambda: (_ids(32),),
    ),
    "reformer-pytorch/full": (
        _of("reformer_pytorch:ReformerLM", num_tokens=64, dim=32, depth=2, max_seq_len=32, heads=4, dim_head=8,
            bucket_size=8, causal=True, use_full_attn=True),
        lambda: (_ids(32),),
    ),
    "reformer-pytorch/lsh": (
        _of("reformer_pytorch:ReformerLM", num_tokens=64, dim=32, depth=1, max_seq_len=32, heads=4, dim_head=8,
            bucket_size=8, n_hashes=2, causal=True),
        lambda: (_ids(32),),
    ),
    "x-clip/clip": (
        _of("x_clip:CLIP", dim_text=32, dim_image=32, dim_latent=16, num_text_tokens=64, text_enc_depth=1,
            text_seq_len=16, text_heads=4, text_dim_head=8, visual_enc_depth=1, visual_heads=4, visual_dim_head=8,
            visual_image_size=32, visual_patch_size=8, visual_patch_dropout=0.0),
        lambda: (_ids(), torch.randn(2, 3, 32, 32)),
    ),
    # CLIPs
    "open-clip-torch/clip": (_open_clip(), _texts_and_images),
    "open-clip-torch/resnet": (_open_clip(layers=[1, 1, 1, 1], width=8, image_size=64),
                               lambda: (torch.randn(2, 3, 64, 64), _ids())),
    "open-clip-torch/attentional_pool": (_open_clip(attentional_pool=True, attn_pooler_heads=4), _texts_and_images),
    "open-clip-torch/coca": (_open_coca, lambda: {"image": torch.randn(2, 3, 32, 32), "text": _ids(15)}),
    # diffusers
    "diffusers/unet_2d_condition": (
        _of("diffusers:UNet2DConditionModel", **_UNET),
        lambda: {"sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([3, 7]),
                 "encoder_hidden_states": torch.randn(2, 5, 32)},
    ),
    "diffusers/unet_by_hand": (
        _sliced,
        lambda: {"sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([3, 7]),
                 "encoder_hidden_states": torch.randn(2, 5, 32)},
    ),
    "diffusers/unet_2d": (
        _of("diffusers:UNet2DModel", sample_size=16, layers_per_block=1, block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8, attention_head_dim=8),
        lambda: {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor([3, 7])},
    ),
    "diffusers/autoencoder_kl": (
        _of("diffusers:AutoencoderKL", block_out_channels=(32,), norm_num_groups=8, latent_channels=4),
        lambda: {"sample": torch.randn(1, 3, 16, 16)},
    ),
    "diffusers/dit": (
        _of("diffusers:DiTTransformer2DModel", **_DIT, num_embeds_ada_norm=10),
        lambda: {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 7]),
                 "class_labels": torch.tensor([1, 2])},
    ),
    "diffusers/sd3": (
        _of("diffusers:SD3Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, num_layers=2,
            attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
            pooled_projection_dim=16, out_channels=4),
        lambda: {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 32),
                 "pooled_projections": torch.randn(2, 16), "timestep": torch.tensor([3, 7])},
    ),
    "diffusers/flux": (
        _of("diffusers:FluxTransformer2DModel", patch_size=1, in_channels=4, num_layers=1, num_single_layers=1,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8)),
        lambda: {"hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 5, 32),
                 "pooled_projections": torch.randn(1, 16), "timestep": torch.tensor([0.3]),
                 "img_ids": torch.randn(16, 3), "txt_ids": torch.zeros(5, 3)},
    ),
    "diffusers/pixart": (
        _of("diffusers:PixArtTransformer2DModel", **{**_DIT, "out_channels": 8}, cross_attention_dim=32,
            caption_channels=16, num_embeds_ada_norm=10),
        lambda: {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 16),
                 "timestep": torch.tensor([3, 7]),
                 "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "diffusers/prior": (
        _of("diffusers:PriorTransformer", num_attention_heads=4, attention_head_dim=8, num_layers=2, embedding_dim=32,
            num_embeddings=5),
        lambda: {"hidden_states": torch.randn(2, 32), "timestep": torch.tensor([3, 7]),
                 "proj_embedding": torch.randn(2, 32), "encoder_hidden_states": torch.randn(2, 5, 32)},
    ),
    "diffusers/wan": (
        _of("diffusers:WanTransformer3DModel", patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12,
            in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32),
        lambda: {"hidden_states": torch.randn(1, 4, 2, 8, 8), "timestep": torch.tensor([3]),
                 "encoder_hidden_states": torch.randn(1, 5, 16)},
    ),
    # segmentation, medicine, geometry
    "segmentation-models-pytorch/segformer": (
        _of("segmentation_models_pytorch:Segformer", encoder_name="mit_b0", encoder_weights=None, classes=3),
        _image(64),
    ),
    "segmentation-models-pytorch/unet_mit": (
        _of("segmentation_models_pytorch:Unet", encoder_name="mit_b0", encoder_weights=None, classes=3), _image(64)
    ),
    "segmentation-models-pytorch/dpt": (
        _of("segmentation_models_pytorch:DPT", encoder_name="tu-vit_tiny_patch16_224", encoder_weights=None, classes=3,
            dynamic_img_size=True),
        _image(64),
    ),
    "segmentation-models-pytorch/unet": (
        _of("segmentation_models_pytorch:Unet", encoder_name="resnet18", encoder_weights=None, classes=3), _image(64)
    ),
    "monai/vit": (
        _of("monai.networks.nets:ViT", 1, 16, 8, hidden_size=32, mlp_dim=48, num_layers=2, num_heads=4),
        lambda: (torch.randn(2, 1, 16, 16, 16),),
    ),
    "monai/unetr": (
        _of("monai.networks.nets:UNETR", 1, 2, 32, feature_size=4, hidden_size=32, mlp_dim=48, num_heads=4,
            spatial_dims=2),
        lambda: (torch.randn(1, 1, 32, 32),),
    ),
    "monai/swin_unetr": (
        _of("monai.networks.nets:SwinUNETR", 1, 2, depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2), feature_size=12,
            window_size=4, spatial_dims=2),
        lambda: (torch.randn(1, 1, 64, 64),),
    ),
    "kornia/vit": (
        _of("kornia.models.vit:VisionTransformer", image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4),
        _image(),
    ),
    "kornia/tiny_vit": (
        _of("kornia.models.tiny_vit:TinyViT", img_size=64, num_classes=5, embed_dims=[16, 16, 32, 32],
            depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_sizes=[2, 2, 2, 2]),
        _image(64),
    ),
    "kornia/lightglue": (
        _method(
            _of("kornia.feature.lightglue:TransformerLayer", 32, 4),
            lambda model, a, b, x, y: model(a, b, x, y),
        ),
        lambda: (torch.randn(1, 7, 32), torch.randn(1, 9, 32), torch.randn(2, 1, 1, 7, 8), torch.randn(2, 1, 1, 9, 8)),
    ),
    "segment-anything/encoder": (_sam, _image(64)),
    # others
    "fair-esm/esm2": (_esm, lambda: (torch.randint(4, 24, (2, 12)),)),
    "openai-whisper/whisper": (_whisper, lambda: (torch.randn(2, 16, 24), _ids(8))),
    "chronos-forecasting/bolt": (_method(_chronos, lambda model, x: model(x)), lambda: (torch.randn(2, 32),)),
    "point-transformer-pytorch/layer": (
        _of("point_transformer_pytorch:PointTransformerLayer", dim=16, pos_mlp_hidden_dim=16, attn_mlp_hidden_mult=2),
        lambda: (torch.randn(1, 6, 16), torch.randn(1, 6, 3)),
    ),
    "denoising-diffusion-pytorch/unet": (
        _of("denoising_diffusion_pytorch:Unet", 16, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8,
            full_attn=(False, True)),
        lambda: (torch.randn(1, 3, 16, 16), torch.tensor([3])),
    ),
}  # fmt: skip
