#!/usr/bin/env bash
# In eval mode torch.nn.TransformerEncoderLayer reads a float mask as a bool one: under ALiBi a token sees itself alone.
#
# Versions:  torch 2.14.1; CPU, float32, no dropout, no padding.
# Guess:     a float src_mask is added to the scores, as the documentation says, in train mode, in eval mode, with
#            gradients and without.
# Behaviour: with gradients it is. Without, in eval mode, the layer is one fused op, which casts the mask to bool: 0
#            stays visible, and every other number, -0.1 as well as -inf, hides the position. So masks of 0 and -inf,
#            which are what tests have, are right, and relative position biases, which are not 0 off the diagonal, leave
#            each token itself. A float src_key_padding_mask does the same; a bias without any 0 makes all NaN. Nothing
#            is said. torch.nn.MultiheadAttention alone adds the same mask in each of these modes.
# Seen:      largest difference to the layer written out: 0 and -inf: gradients 2.4e-07, none 2.4e-07;
#            ALiBi: gradients 2.4e-07, none 0.98; ALiBi without gradients beside a mask of itself alone: 0;
#            MultiheadAttention under ALiBi without gradients beside with: 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.14.1 numpy==2.4.6
cat >"$folder/mask.py" <<'PYTHON'
import math

import torch
from torch import nn

torch.manual_seed(0)
tokens, heads, width = 5, 2, 16
layer = nn.TransformerEncoderLayer(width, heads, 32, dropout=0.0, batch_first=True).eval()
inputs = torch.randn(1, tokens, width)
place = torch.arange(tokens)
alibi = -0.1 * (place[:, None] - place).abs().float()
causal = torch.zeros(tokens, tokens).masked_fill(place[:, None] < place, -math.inf)
itself = ~torch.eye(tokens, dtype=torch.bool)


def written_out(bias):
    own = layer.self_attn
    query, key, value = (
        each.view(tokens, heads, -1).transpose(0, 1)
        for each in nn.functional.linear(inputs[0], own.in_proj_weight, own.in_proj_bias).chunk(3, -1)
    )
    scores = query @ key.mT / math.sqrt(width // heads) + bias
    mixed = (scores.softmax(-1) @ value).transpose(0, 1).reshape(1, tokens, width)
    middle = layer.norm1(inputs + own.out_proj(mixed))
    return layer.norm2(middle + layer.linear2(layer.linear1(middle).relu()))


def apart(first, second):
    return (first - second).abs().max().item()


def without_gradients(module, *args, **options):
    with torch.no_grad():
        return module(*args, **options)


seen = {}
for name, mask in (("0 and -inf", causal), ("ALiBi", alibi)):
    seen[name] = [
        apart(out, written_out(mask))
        for out in (layer(inputs, src_mask=mask), without_gradients(layer, inputs, src_mask=mask))
    ]
    print("{}: gradients {:.2g}, none {:.2g}".format(name, *seen[name]))
alone = apart(
    without_gradients(layer, inputs, src_mask=alibi), without_gradients(layer, inputs, src_mask=itself)
)
options = {"attn_mask": alibi, "need_weights": False}
attention = apart(
    layer.self_attn(inputs, inputs, inputs, **options)[0],
    without_gradients(layer.self_attn, inputs, inputs, inputs, **options)[0],
)
print(f"ALiBi without gradients beside a mask of itself alone: {alone:.2g}")
print(f"MultiheadAttention under ALiBi without gradients beside with: {attention:.2g}")
assert max(*seen["0 and -inf"], seen["ALiBi"][0], attention) < 1e-5, "changed: look at it again"
assert seen["ALiBi"][1] > 0.1 and alone < 1e-6, "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/mask.py"
