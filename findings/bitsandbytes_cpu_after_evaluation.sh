#!/usr/bin/env bash
# bitsandbytes on a CPU: after one forward in eval mode a Linear4bit passes no gradient on, in train mode either.
#
# Versions:  bitsandbytes 0.50.2, torch 2.14.1; a CPU with AVX512-BF16 (elsewhere the script says so, and ends with 0).
# Guess:     eval mode is undone by train mode: validating between two epochs of QLoRA changes no gradient.
# Behaviour: on such CPUs the first forward of an input without gradient in eval mode packs the 4-bit weights in another
#            order, for a faster kernel, for good. That kernel has no backward pass. From then on the input of the layer
#            gets no gradient, whatever the mode: None here; in a model the adapters of layers before it get none, or
#            zeros. Nothing is raised.
# Seen:      in train mode: the gradient of the input is a tensor
#            after an evaluation, in train mode: the gradient of the input is None
set -euo pipefail
if ! grep -qw avx512_bf16 /proc/cpuinfo; then
    echo "This CPU has no AVX512-BF16, and takes another path."
    exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.14.1 numpy==2.4.6 bitsandbytes==0.50.2
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from bitsandbytes.nn import Linear4bit, Params4bit

torch.manual_seed(0)
layer = Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
layer.weight = Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4")
layer = layer.to("cpu")


def trained(name):
    """Whether the input gets a gradient, in train mode."""
    x = torch.ones(3, 64, requires_grad=True)
    layer.train()(x).square().sum().backward()
    print(f"{name}: the gradient of the input is {'None' if x.grad is None else 'a tensor'}")
    return x.grad is not None


before = trained("in train mode")
with torch.no_grad():
    layer.eval()(torch.ones(3, 64))
after = trained("after an evaluation, in train mode")
assert before and not after, "changed: look at it again"
PYTHON
