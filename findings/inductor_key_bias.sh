#!/usr/bin/env bash
# A bias of one axis, a number for each key, runs in eager and in compiled training, and fails in compiled inference.
#
# Versions:  torch 2.14.1, numpy 2.4.6; CPU, float32, needs a C++ compiler.
# Guess:     scores + bias broadcasts by PyTorch's rules, whoever runs it; what trains under torch.compile evaluates
#            there.
# Behaviour: without gradients inductor finds softmax(q k^T / c + bias) v and puts scaled_dot_product_attention in its
#            place with the bias as attn_mask, as it is. That function says that attn_mask is to be broadcastable to the
#            scores, and its kernel for a CPU looks for two axes: IndexError, "Dimension out of range", with no word of
#            the bias. bias[None, :] is the same numbers, and right; so is a bias of one axis by the math kernel.
# Seen:      [6]: eager right, compiled in training right, compiled in inference IndexError;
#            [1, 6]: eager right, compiled in training right, compiled in inference right;
#            scaled_dot_product_attention under [6]: default IndexError, math right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q torch==2.14.1 numpy==2.4.6 setuptools
cat >"$folder/bias.py" <<'PYTHON'
import logging
import math

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

logging.disable(logging.ERROR)
torch.manual_seed(0)
query, key, value = (torch.randn(2, 4, 6, 16) for _ in range(3))
bias = torch.randn(6)
exact = (query.double() @ key.double().mT / 4 + bias).softmax(-1) @ value.double()


def attention(query, key, value, bias):
    return (query @ key.transpose(-2, -1) / math.sqrt(query.size(-1)) + bias).softmax(-1) @ value


def verdict(call):
    try:
        out = call()
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        return "IndexError" if "IndexError" in f"{type(error).__name__} {error}" else type(error).__name__
    return "right" if (out - exact).abs().max() < 1e-5 else "wrong"


def in_inference(bias):
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(attention)(query, key, value, bias)


def in_training(bias):
    torch._dynamo.reset()
    return torch.compile(attention)(query.clone().requires_grad_(), key, value, bias)


seen = {}
for each in (bias, bias[None, :]):
    name = str(list(each.shape))
    seen[name] = (
        verdict(lambda: attention(query, key, value, each)),
        verdict(lambda: in_training(each)),
        verdict(lambda: in_inference(each)),
    )
    print("{}: eager {}, compiled in training {}, compiled in inference {};".format(name, *seen[name]))
default = verdict(lambda: scaled_dot_product_attention(query, key, value, bias))
with sdpa_kernel(SDPBackend.MATH):
    by_math = verdict(lambda: scaled_dot_product_attention(query, key, value, bias))
print(f"scaled_dot_product_attention under [6]: default {default}, math {by_math}")
assert seen == {"[6]": ("right", "right", "IndexError"), "[1, 6]": ("right",) * 3}, "changed: look at it again"
assert (default, by_math) == ("IndexError", "right"), "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/bias.py"
