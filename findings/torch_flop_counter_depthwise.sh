#!/usr/bin/env bash
# PyTorch's FLOP counter counts a depthwise convolution's weight gradient as a full one's: 384-fold, of 384 channels.
#
# Versions:  torch 2.14.1, numpy 2.4.6; CPU, float32.
# Guess:     FlopCounterMode counts a convolution's backward as twice its forward, a product for the input's gradient
#            and one for the weight's, as it does for a linear layer, and with groups as without: the forward is right
#            there.
# Behaviour: the formula for the weight's gradient takes the shapes of input and gradient, and not the groups: it counts
#            every pair of channels, so `groups` times what there is; transposed convolutions, too. In a ConvNeXt block,
#            where the depthwise convolution has 2% of the forward's FLOPs, it is then 75% of the backward's, and a step
#            of training is 9 times a forward by the count, where it is 3. Nothing is said.
# Seen:      backward / forward: groups 1 2.0, 8 9.0, 64 65.0; transposed: 1 2.0, 8 9.0, 64 65.0
#            a ConvNeXt block: convolution 1.6% of the forward, 75.4% of the backward; backward / forward 8.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q torch==2.14.1 numpy==2.4.6
cat >"$folder/flops.py" <<'PYTHON'
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def forward_and_backward(module, shape):
    inputs = torch.randn(shape, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        out = module(inputs)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def ratio(kind, groups):
    convolution = kind(64, 64, 7, padding=3, groups=groups)
    forward, backward = forward_and_backward(convolution, (2, 64, 14, 14))
    by_hand = 2 * 2 * 14 * 14 * 7 * 7 * 64 * 64 // groups
    assert forward == by_hand, f"changed: the forward is {forward}, not {by_hand}"
    return backward / forward


ratios = {kind: [ratio(kind, groups) for groups in (1, 8, 64)] for kind in (nn.Conv2d, nn.ConvTranspose2d)}
depthwise = nn.Conv2d(384, 384, 7, padding=3, groups=384)
rest = nn.Sequential(nn.LayerNorm(384), nn.Linear(384, 1536), nn.GELU(), nn.Linear(1536, 384))
convolution = forward_and_backward(depthwise, (1, 384, 14, 14))
linear = forward_and_backward(rest, (1, 14, 14, 384))
forward, backward = (a + b for a, b in zip(convolution, linear, strict=True))
shares = f"{convolution[0] / forward:.1%}", f"{convolution[1] / backward:.1%}"
print("backward / forward: groups 1 {}, 8 {}, 64 {};".format(*ratios[nn.Conv2d]), end=" ")
print("transposed: 1 {}, 8 {}, 64 {}".format(*ratios[nn.ConvTranspose2d]))
print(f"a ConvNeXt block: convolution {shares[0]} of the forward, {shares[1]} of the backward;", end=" ")
print(f"backward / forward {backward / forward:.1f}")
assert list(ratios.values()) == [[2.0, 9.0, 65.0]] * 2, "changed: look at it again"
assert linear[1] == 2 * linear[0] and backward > 7 * forward, "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/flops.py"
