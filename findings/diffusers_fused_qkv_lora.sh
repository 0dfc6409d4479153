#!/usr/bin/env bash
# diffusers: after fuse_qkv_projections a LoRA on the attention's projections does nothing, and still says it is active.
#
# Versions:  diffusers 0.42.1, peft 0.21.2, torch 2.14.1, transformers 5.24.0, numpy 2.4.6; CPU, float32.
# Guess:     fuse_qkv_projections puts three products into one, for speed: the output is that of before, with an adapter
#            too, or it says that it can't.
# Behaviour: the fused projection is made of each linear's weight, and peft's linear answers with its base layer's. With
#            an adapter on to_q, to_k and to_v the output is the base model's from then on, whichever comes first, and a
#            backward reaches no adapter; active_adapters() still names it, and nothing is said. The other way,
#            fuse_lora before makes it right, but then unfuse_lora takes nothing back. unfuse_qkv_projections mends it.
# Seen:      (SD3's transformer and Flux's, each) the adapter changes the output: True; with fused projections, then as
#            the base model: True, active ['default']; adapter after fusing, as the base model: True; adapters with a
#            gradient: 0 of 6; projections unfused, as with the adapter: True; LoRA fused, projections fused, LoRA
#            unfused, still as with the adapter: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.14.1 numpy==2.4.6
$pip diffusers==0.42.1 peft==0.21.2 transformers==5.24.0
cat >"$folder/fused.py" <<'PYTHON'
import logging
import warnings

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from peft import LoraConfig

heads = {"num_attention_heads": 4, "joint_attention_dim": 32, "in_channels": 4, "num_layers": 1}
text = {"encoder_hidden_states": torch.randn(1, 5, 32), "timestep": torch.tensor([0.3])}


def sd3():
    sizes = {"sample_size": 8, "patch_size": 1, "out_channels": 4, "pos_embed_max_size": 16, "attention_head_dim": 8}
    model = SD3Transformer2DModel(**heads, **sizes, caption_projection_dim=32, pooled_projection_dim=64)
    return model, {"hidden_states": torch.randn(1, 4, 8, 8), "pooled_projections": torch.randn(1, 64), **text}


def flux():
    sizes = {"patch_size": 1, "num_single_layers": 0, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
    model = FluxTransformer2DModel(**heads, **sizes, pooled_projection_dim=64)
    ids = {"img_ids": torch.randint(0, 8, (9, 3)).float(), "txt_ids": torch.zeros(5, 3)}
    return model, {"hidden_states": torch.randn(1, 9, 4), "pooled_projections": torch.randn(1, 64), **ids, **text}


def outcomes(make):
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    config = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)

    def equal(first, second):
        return bool((first - second).abs().max() < 1e-5)

    def out():
        return model(**inputs, return_dict=False)[0]

    base = out()
    model.add_adapter(config)
    adapted = out()
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    seen = {"changes": not equal(adapted, base)}
    model.fuse_qkv_projections()
    fused = out()
    fused.sum().backward()
    seen |= {"as base": equal(fused, base), "active": model.active_adapters()}
    seen |= {"gradients": f"{sum(each.grad is not None for each in adapters)} of {len(adapters)}"}
    model.unfuse_qkv_projections()
    seen |= {"unfused": equal(out(), adapted)}
    model.fuse_lora()
    model.fuse_qkv_projections()
    model.unfuse_lora()
    seen |= {"lora unfused": equal(out(), adapted)}

    torch.manual_seed(0)
    model = make()[0].eval()
    model.fuse_qkv_projections()
    base = out()
    model.add_adapter(config)
    return seen | {"after": equal(out(), base)}


for make in sd3, flux:
    seen = outcomes(make)
    print(
        f"{make.__name__}: the adapter changes the output: {seen['changes']}; with fused projections, then as the base "
        f"model: {seen['as base']}, active {seen['active']}; adapter after fusing, as the base model: {seen['after']}; "
        f"adapters with a gradient: {seen['gradients']}; projections unfused, as with the adapter: {seen['unfused']}; "
        f"LoRA fused, projections fused, LoRA unfused, still as with the adapter: {seen['lora unfused']}"
    )
    assert seen["active"] == ["default"] and seen["gradients"] == "0 of 6", "changed: look at it again"
    assert all(value for value in seen.values()), "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/fused.py"
