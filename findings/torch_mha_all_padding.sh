#!/usr/bin/env bash
# nn.MultiheadAttention gives three answers for a sequence that is all padding; which one, its surroundings decide.
#
# Versions:  torch 2.13.0 (2.14.1 the same); CPU.
# Guess:     a masked row has one result: NaN as softmax has it, or 0 as scaled_dot_product_attention has it.
# Behaviour: with gradients on and need_weights=False it is 0 (scaled_dot_product_attention); with need_weights=True it
#            is NaN (softmax by hand); under no_grad in eval mode it is NaN in both (the fused fast path). An encoder
#            layer, which asks for no weights, is finite in training and NaN in inference, on equal inputs.
#            Batches that are padded to a fixed number of sequences have such rows.
# Seen:      gradients: need_weights=False 0.0, True nan; no_grad: False nan, True nan;
#            encoder layer: gradients finite, no_grad nan
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q torch==2.13.0 numpy==2.4.6
cat >"$folder/padding.py" <<'PYTHON'
import math
import warnings

import torch
from torch import nn

warnings.simplefilter("ignore")
torch.manual_seed(0)
x = torch.randn(2, 5, 16)
padding = torch.tensor([[False] * 5, [True] * 5])  # the second sequence holds nothing
attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
seen = {}
for gradients in (True, False):
    with torch.set_grad_enabled(gradients):
        for weights in (False, True):
            out = attention(x, x, x, key_padding_mask=padding, need_weights=weights)[0]
            seen[gradients, weights] = out[1, 0, 0].item()
        seen[gradients, "layer"] = layer(x, src_key_padding_mask=padding)[1, 0, 0].item()
print(f"torch {torch.__version__}: gradients: need_weights=False {seen[True, False]}, True {seen[True, True]};", end=" ")
print(f"no_grad: False {seen[False, False]}, True {seen[False, True]};", end=" ")
print(f"encoder layer: gradients {seen[True, 'layer']:.3f}, no_grad {seen[False, 'layer']}")
nan = [math.isnan(value) for value in seen.values()]
assert seen[True, False] == 0 and nan == [False, True, False, True, True, True], "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/padding.py"
