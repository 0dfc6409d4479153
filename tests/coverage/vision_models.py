"""timm: the smallest variant of each architecture family, on images as small as it takes. torchvision: one of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.coverage.check import Built, randomised

_S = {"depth": 2, "embed_dim": 48, "num_heads": 3}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    # With attention: the smallest, or made so by arguments of its class.
    "beit": ("beit_base_patch16_224", _S),
    "byoanet": ("botnet26t_256", {}),
    "byobnet": ("resnet50_clip", {}),
    "cait": ("cait_xxs24_224", {"depth": 2}),
    "coat": ("coat_lite_tiny", {}),
    "convit": ("convit_tiny", {"depth": 3, "local_up_to_layer": 2}),
    "cpubone": ("cpubone_nano", {}),
    "crossvit": ("crossvit_tiny_240", {}),
    "csatv2": ("csatv2", {}),
    "davit": ("davit_tiny", {"depths": [1, 1, 1, 1], "embed_dims": [24, 48, 96, 96], "num_heads": [1, 2, 4, 4]}),
    "deepseek_vit": ("deepseek_vit_412m", _S),
    "deit": ("deit_tiny_distilled_patch16_224", {"depth": 2}),
    "edgenext": ("edgenext_xx_small", {}),
    "efficientformer": ("efficientformer_l1", {}),
    "efficientformer_v2": ("efficientformerv2_s0", {}),
    "efficientvit_mit": ("efficientvit_b0", {}),
    "efficientvit_msra": ("efficientvit_m0", {}),
    "eva": ("eva02_tiny_patch14_224", {"depth": 2}),
    "fastvit": ("fastvit_sa12", {"layers": [1, 1, 1, 1], "embed_dims": [16, 32, 64, 64]}),
    "gcvit": ("gcvit_xxtiny", {}),
    "gemma4_vit": ("gemma4_vit_167m", {"depth": 2}),
    "hiera": ("hiera_tiny_224", {"embed_dim": 24}),
    "hieradet_sam2": ("sam2_hiera_tiny", {"embed_dim": 24}),
    "iformer": ("iformer_t", {}),
    "levit": ("levit_128s", {}),
    "lowformer": ("lowformer_b0", {}),
    "maxxvit": ("maxvit_pico_rw_256", {}),
    "metaformer": ("caformer_s18", {}),
    "mobilenetv3": ("mobilenetv4_hybrid_medium_075", {}),
    "mobilenetv5": ("mobilenetv5_base", {}),
    "mobilevit": ("mobilevit_xxs", {}),
    "mvitv2": ("mvitv2_tiny", {}),
    "naflexvit": ("naflexvit_base_patch16_gap", {}),
    "nest": ("nest_tiny", {}),
    "nextvit": ("nextvit_small", {}),
    "pit": ("pit_ti_224", {}),
    "pvt_v2": ("pvt_v2_b0", {}),
    "qwen3_vit": ("qwen3_vit_88m", {}),
    "shvit": ("shvit_s1", {}),
    "swiftformer": ("swiftformer_xs", {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", {"depths": [2, 1, 1, 1], "embed_dim": 24}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", {"depths": [2, 1, 1, 1], "embed_dim": 24}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", {"depths": [2, 1, 1, 1], "embed_dim": 24}),
    "tiny_vit": ("tiny_vit_5m_224", {}),
    "tnt": ("tnt_s_patch16_224", {"depth": 2}),
    "twins": ("twins_svt_small", {}),
    "vision_transformer": ("test_vit", {}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", {"depth": 2}),
    "vision_transformer_relpos": ("test_vit_relpos", {}),
    "vision_transformer_sam": ("samvit_base_patch16_224", _S),
    "visformer": ("visformer_tiny", {}),
    "vitamin": ("vitamin_small_224", {}),
    "volo": ("volo_d1_224", {}),
    "xcit": ("xcit_nano_12_p16_224", {"depth": 2}),
    # Without.
    "convmixer": ("convmixer_768_32", {"depth": 2}),
    "convnext": ("test_convnext", {}),
    "cspnet": ("cs3darknet_s", {}),
    "cspnext": ("cspnext_tiny", {}),
    "densenet": ("densenet121", {}),
    "dla": ("dla46x_c", {}),
    "dpn": ("dpn48b", {}),
    "efficientnet": ("test_efficientnet", {}),
    "efficientvim": ("efficientvim_m1", {}),
    "fasternet": ("fasternet_t0", {}),
    "focalnet": ("focalnet_tiny_srf", {"embed_dim": 24}),
    "ghostnet": ("ghostnet_050", {}),
    "hardcorenas": ("hardcorenas_a", {}),
    "hgnet": ("hgnetv2_b0", {}),
    "hrnet": ("hrnet_w18_small", {}),
    "inception_next": ("inception_next_atto", {}),
    "inception_resnet_v2": ("inception_resnet_v2", {}),
    "inception_v3": ("inception_v3", {}),
    "inception_v4": ("inception_v4", {}),
    "lcnetv2": ("lcnetv2_small", {}),
    "mambaout": ("test_mambaout", {}),
    "mlp_mixer": ("mixer_s32_224", {}),
    "nasnet": ("nasnetalarge", {}),
    "nfnet": ("nf_regnet_b0", {}),
    "pnasnet": ("pnasnet5large", {}),
    "rdnet": ("rdnet_tiny", {}),
    "regnet": ("regnetx_002", {}),
    "repghost": ("repghostnet_050", {}),
    "repvit": ("repvit_m0_9", {}),
    "res2net": ("res2net50_26w_4s", {}),
    "resnest": ("resnest14d", {}),
    "resnet": ("resnet10t", {}),
    "resnetv2": ("resnetv2_18", {}),
    "rexnet": ("rexnetr_100", {}),
    "selecsls": ("selecsls42", {}),
    "senet": ("legacy_seresnet18", {}),
    "sequencer": ("sequencer2d_s", {}),
    "sknet": ("skresnet18", {}),
    "starnet": ("starnet_s050", {}),
    "tresnet": ("tresnet_m", {}),
    "vgg": ("vgg11", {}),
    "vovnet": ("ese_vovnet19b_slim_dw", {}),
    "xception": ("legacy_xception", {}),
    "xception_aligned": ("xception41", {}),
}
"""One variant of each family; :func:`timm_names` has those that a newer timm adds as well."""


def timm_names() -> list[str]:
    import timm

    return sorted({_family(name) for name in timm.list_models()})


def _family(name: str) -> str:
    import timm

    return str(timm.models.model_entrypoint(name).__module__.rpartition(".")[2])


def build_timm(family: str) -> Built:
    """On the smallest image on which it runs."""
    import timm

    if family not in VARIANTS:
        raise LookupError(f"no variant of {family} is chosen yet: add one to VARIANTS in {__name__}")
    name, changes = VARIANTS[family]

    def make(options: dict[str, Any]) -> nn.Module:
        torch.manual_seed(0)
        return randomised(timm.create_model(name, num_classes=7, **options))

    error: Exception | None = None
    for size in (64, 96, 128, 160, 192, 224, 240, 256, 384):
        for options in ({"img_size": size, **changes}, changes):
            images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
            try:
                model = make(options)
                with torch.no_grad():
                    model(images)
            except Exception as failure:
                error = failure
                continue
            factory = {"factory": f"timm:{name}", "factory_kwargs": {"num_classes": 7, **options}}
            return Built(lambda options=options: make(options), ((images,), {}), factory=factory)
    assert error is not None
    raise error


def torchvision_names() -> list[str]:
    return list(_TORCHVISION)


def build_torchvision(name: str) -> Built:
    make, shape = _TORCHVISION[name]

    def seeded() -> nn.Module:
        torch.manual_seed(0)
        return randomised(make())

    factory = {"factory": "tests.coverage.cases:made", "factory_kwargs": {"name": f"torchvision/{name}"}}
    images = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return Built(seeded, ((images,), {}), factory=factory)


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 4, 32, 48, num_classes=7)


def _swin(block: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision.models import swin_transformer as module

        merging = module.PatchMergingV2 if block == "SwinTransformerBlockV2" else module.PatchMerging
        return module.SwinTransformer(
            [4, 4],
            24,
            [2, 2],
            [3, 6],
            [4, 4],
            num_classes=7,
            block=getattr(module, block),
            downsample_layer=merging,
        )

    return make


def _maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    return MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=7)


def _by_name(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **options)

    return make


def _mvit(version: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision.models.video.mvit import MSBlockConfig, MViT

        setting = [
            MSBlockConfig(1, 16, 16, [3, 3, 3], [3, 3, 3], [], [1, 2, 2]),
            MSBlockConfig(2, 16, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
            MSBlockConfig(2, 32, 32, [3, 3, 3], [3, 3, 3], [], [1, 1, 1]),
        ]
        newer = version == 2
        return MViT(
            (32, 32), 4, setting, residual_pool=newer, residual_with_cls_embed=not newer, rel_pos_embed=newer,
            proj_after_attn=newer, num_classes=7,
        )  # fmt: skip

    return make


def _swin3d() -> nn.Module:
    from torchvision.models.video import SwinTransformer3d

    return SwinTransformer3d([2, 4, 4], 24, [2, 1], [3, 6], [2, 4, 4], num_classes=7)


_IMAGES, _VIDEO = (2, 3, 64, 64), (2, 3, 4, 32, 32)
_TORCHVISION: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vit": (_vit, (2, 3, 32, 32)),
    "swin": (_swin("SwinTransformerBlock"), _IMAGES),
    "swin_v2": (_swin("SwinTransformerBlockV2"), _IMAGES),
    "maxvit": (_maxvit, _IMAGES),
    "mvit_v1": (_mvit(1), _VIDEO),
    "mvit_v2": (_mvit(2), _VIDEO),
    "swin3d": (_swin3d, _VIDEO),
    "alexnet": (_by_name("alexnet"), _IMAGES),
    "convnext": (_by_name("convnext_tiny"), _IMAGES),
    "densenet": (_by_name("densenet121"), _IMAGES),
    "efficientnet": (_by_name("efficientnet_b0"), _IMAGES),
    "googlenet": (_by_name("googlenet", init_weights=False), _IMAGES),
    "mnasnet": (_by_name("mnasnet0_5"), _IMAGES),
    "mobilenet_v3": (_by_name("mobilenet_v3_small"), _IMAGES),
    "regnet": (_by_name("regnet_y_400mf"), _IMAGES),
    "resnet": (_by_name("resnet18"), _IMAGES),
    "shufflenet": (_by_name("shufflenet_v2_x0_5"), _IMAGES),
    "squeezenet": (_by_name("squeezenet1_1"), _IMAGES),
    "deeplabv3": (_by_name("deeplabv3_mobilenet_v3_large", weights_backbone=None), _IMAGES),
    "r3d": (_by_name("r3d_18"), (1, 3, 4, 32, 32)),
}
