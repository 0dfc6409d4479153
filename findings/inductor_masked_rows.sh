#!/usr/bin/env bash
# torch.compile turns a fully masked row of hand-written attention from NaN into 0, in inference only.
#
# Versions:  torch 2.13.0 (2.14.1 the same); CPU, needs a C++ compiler.
# Guess:     inductor keeps NaN: softmax of a row of -inf is NaN in eager, and therefore compiled.
# Behaviour: under no_grad inductor's pattern matcher finds softmax(q k^T / c + mask) v, and puts
#            scaled_dot_product_attention in its place, which defines such rows as 0. With a gradient it does not match
#            here, and the row stays NaN. So a model with a sequence that is all padding trains to NaN and evaluates to
#            finite numbers, and the mask's spelling decides: with masked_fill in place of the sum it stays NaN in both.
# Seen:      eager nan, compiled in inference 0.0 (attention patterns matched: 1), compiled in training nan;
#            with masked_fill nan
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q torch==2.13.0 numpy==2.4.6 setuptools
cat >"$folder/rows.py" <<'PYTHON'
import math

import torch
from torch._dynamo.utils import counters


def added(q, k, v, mask):
    return (q.matmul(k.transpose(-2, -1)).div(math.sqrt(q.size(-1))) + mask).softmax(-1).matmul(v)


def filled(q, k, v, mask):
    scores = q.matmul(k.transpose(-2, -1)).div(math.sqrt(q.size(-1)))
    return scores.masked_fill(mask != 0, -math.inf).softmax(-1).matmul(v)


torch.manual_seed(0)
q, k, v = (torch.randn(2, 4, 8, 16) for _ in range(3))
mask = torch.zeros(2, 1, 8, 8)
mask[0, :, 2] = -math.inf  # row 2 of the first sequence sees no key
row = 0, 0, 2, 0
with torch.no_grad():
    eager = added(q, k, v, mask)[row].item()
    inference = torch.compile(added)(q, k, v, mask)[row].item()
    matched = counters["inductor"]["fuse_attention"]
    by_filling = torch.compile(filled)(q, k, v, mask)[row].item()
torch._dynamo.reset()
training = torch.compile(added)(q.requires_grad_(), k, v, mask)[row].item()
print(
    f"torch {torch.__version__}: eager {eager}, compiled in inference {inference} (attention patterns matched: "
    f"{matched}), compiled in training {training}; with masked_fill {by_filling}"
)
as_seen = math.isnan(eager) and inference == 0 and matched == 1 and math.isnan(training) and math.isnan(by_filling)
assert as_seen, "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/rows.py"
