#!/usr/bin/env bash
# Causal scaled_dot_product_attention on a CPU is NaN for a scale of 0 or less; the same mask as a tensor is right.
#
# Versions:  torch 2.14.1; CPU, float32, the default kernel.
# Guess:     is_causal=True is short for a lower triangular attn_mask, and scale is any float: 0 averages over what is
#            visible, a negative one looks for the key least like the query (a learned temperature may get there).
# Behaviour: the CPU's flash kernel writes -inf over hidden scores first and multiplies by the scale then. -inf times 0
#            is NaN, and times a negative number it is +inf, so that each row with a hidden key is NaN. Given as a mask,
#            bool or float, the same positions are hidden after the scale, and all is right, as by the math kernel.
#            No error, no warning.
# Seen:      scale  0.5: is_causal right, bool mask right, float mask right, math kernel right
#            scale  0.0: is_causal NaN in 3 of 4 rows, bool mask right, float mask right, math kernel right
#            scale -0.5: is_causal NaN in 3 of 4 rows, bool mask right, float mask right, math kernel right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.14.1 numpy==2.4.6
cat >"$folder/scale.py" <<'PYTHON'
import math

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attention

torch.manual_seed(0)
query, key, value = (torch.randn(1, 2, 4, 8) for _ in range(3))
visible = torch.ones(4, 4, dtype=torch.bool).tril()
additive = torch.zeros(4, 4).masked_fill(~visible, -math.inf)


def verdict(output, scale):
    scores = (query.double() @ key.double().mT * scale).masked_fill(~visible, -math.inf)
    error = output - scores.softmax(-1) @ value.double()
    lost = int(error.isnan().any(-1).all(1).sum())
    if lost:
        return f"NaN in {lost} of 4 rows"
    return "right" if error.abs().max() < 1e-5 else "wrong"


for scale in (0.5, 0.0, -0.5):
    outputs = [
        attention(query, key, value, is_causal=True, scale=scale),
        attention(query, key, value, visible, scale=scale),
        attention(query, key, value, additive, scale=scale),
    ]
    with sdpa_kernel(SDPBackend.MATH):
        outputs.append(attention(query, key, value, is_causal=True, scale=scale))
    causal, *others = (verdict(each, scale) for each in outputs)
    print("scale {:4}: is_causal {}, bool mask {}, float mask {}, math kernel {}".format(scale, causal, *others))
    assert causal == ("right" if scale > 0 else "NaN in 3 of 4 rows"), "changed: look at it again"
    assert others == ["right"] * 3, "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/scale.py"
