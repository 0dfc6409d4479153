#!/usr/bin/env bash
# A LoRA adapter on the feed-forward part of torch.nn.TransformerEncoderLayer does nothing in eval mode.
#
# Versions:  peft 0.21.2, torch 2.14.1, transformers 5.24.0; CPU, float32, no dropout.
# Guess:     an adapter with target_modules=["linear1", "linear2"] counts in eval mode as it counts in train mode; where
#            the layer has a fused path, it is left when its linears are no plain linears any more.
# Behaviour: in eval mode the layer hands linear1.weight and linear2.weight to one fused op. peft's linear answers
#            `weight` with the base layer's, which is frozen, so that gradients do not send the layer past the fused op
#            either. The output is the base model's, with gradients enabled and without, and has no gradient for the
#            adapter. Nothing is said.
# Seen:      train mode differs from the base model by 0.611, eval mode by 7.15e-07, under no_grad by 7.15e-07;
#            in eval mode the output requires a gradient: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.14.1 numpy==2.4.6
$pip peft==0.21.2 transformers==5.24.0
cat >"$folder/adapter.py" <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
model = get_peft_model(layer, LoraConfig(target_modules=["linear1", "linear2"], init_lora_weights=False))
inputs = torch.randn(2, 5, 16)


def difference(output):
    with model.disable_adapter():
        return (output - model.train()(inputs)).abs().max().item()


trained = model.train()(inputs)
evaluated = model.eval()(inputs)
with torch.no_grad():
    deployed = model.eval()(inputs)
differences = [difference(each) for each in (trained, evaluated, deployed)]
print("train mode differs from the base model by {:.3f}, eval mode by {:.3g}, under no_grad by {:.3g};".format(*differences))
print("in eval mode the output requires a gradient:", evaluated.requires_grad)
rounding = 1e-5
assert differences[0] > 0.1, "changed: look at it again"
assert max(differences[1:]) < rounding, "changed: look at it again"
assert not evaluated.requires_grad, "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/adapter.py"
