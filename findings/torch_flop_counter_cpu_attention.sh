#!/usr/bin/env bash
# PyTorch's FLOP counter counts nothing of attention on a CPU, and nothing at all of an encoder layer in eval mode.
#
# Versions:  torch 2.14.1; CPU, float32.
# Guess:     FlopCounterMode has formulas for scaled_dot_product_attention, forward and backward, so that a model's count
#            does not depend on the device, nor on train or eval mode.
# Behaviour: the formulas are those of the CUDA kernels' ops. On a CPU the call becomes another op, which has none and is
#            counted as 0, silently; only the math backend, whose products are ops of their own, is counted. In eval
#            mode without gradients torch.nn.TransformerEncoderLayer is one fused op, and MultiheadAttention another:
#            the count of the whole layer is 0.
# Seen:      forward: default 0, math 65536; with backward: default 0, math 196608;
#            encoder layer: train 589824, eval 0
#            (tensors of [2, 4, 16, 8]; a layer of 32 channels and 64 hidden ones on [2, 16, 32])
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.14.1 numpy==2.4.6
cat >"$folder/count.py" <<'PYTHON'
import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

query, key, value = (torch.randn(2, 4, 16, 8, requires_grad=True) for _ in range(3))
layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
inputs = torch.randn(2, 16, 32)


def count(run, kernels=None):
    with contextlib.nullcontext() if kernels is None else sdpa_kernel(kernels):
        with FlopCounterMode(display=False) as counter:
            run()
    return counter.get_total_flops()


def forward():
    return scaled_dot_product_attention(query, key, value)


def with_backward():
    forward().sum().backward()


attention = [count(run, kernels) for run in (forward, with_backward) for kernels in (None, SDPBackend.MATH)]
trained = count(lambda: layer.train()(inputs))
with torch.no_grad():
    evaluated = count(lambda: layer.eval()(inputs))
print("forward: default {}, math {}; with backward: default {}, math {};".format(*attention))
print(f"encoder layer: train {trained}, eval {evaluated}")
products = 2 * 2 * 2 * 4 * 16 * 16 * 8  # two products, of two operations for each of batch, heads, rows, keys, head_dim
assert attention == [0, products, 0, 3 * products], "changed: look at it again"
assert trained > 0 and evaluated == 0, "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/count.py"
